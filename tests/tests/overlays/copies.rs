//! Snapshots that have copies of the disks: the VM keeps its images.

use std::process::{Output, Stdio};

use openapi::Client;
use rustix::process::Signal;
use spec::VmState;

use super::*;

fn with_copies(dir: &Path) -> VmSnapshotConfig {
    VmSnapshotConfig {
        disks: SnapshotDisks::Copy,
        ..to(dir)
    }
}

fn remote(at: &Service, arguments: &[&str]) -> Output {
    let mut command = Command::new(built("wh-remote").unwrap());
    command.arg("--api-socket").arg(at.socket());
    command.args(arguments).output().unwrap()
}

/// A service that is killed leaves a whole snapshot or none; a whole one needs nothing of the VM that was.
#[tokio::test]
async fn killed_service_leaves_whole_copies_or_no_snapshot() {
    let mut service = Service::start(Face::Many).await.unwrap();
    for (n, delay) in [0, 15, 40, 80, 200].into_iter().enumerate() {
        let (vm, disk) = boot(&service, "qcow2").await;
        writes_on(port(&service, "guest")).await;
        if n % 2 == 0 {
            service.client().vms_pause(&vm).await.unwrap();
        }
        let dir = service.path(format!("killed-{n}"));
        let begun = service.client().vms_snapshot(&vm, &with_copies(&dir)).await;
        begun.unwrap();
        tokio::time::sleep(Duration::from_millis(delay)).await;
        service.signal(Signal::KILL).unwrap();
        service.ended(PATIENCE).await.unwrap();
        service.start_again().await.unwrap();
        fs::remove_file(disk).unwrap();
        if dir.join("manifest.json").exists() {
            let begun = service.client().vms_restore(&vm, &from(&dir, true)).await;
            completed(&service, begun.unwrap()).await;
            writes_on(port(&service, "guest")).await;
            service.client().vms_delete(&vm).await.unwrap();
        }
    }
}

/// The folder is full before all of the disk is there: nothing is left, and the VM writes to its image.
#[tokio::test]
async fn full_folder_leaves_nothing_of_a_copy() {
    let mount = "mount -t tmpfs -o size=128k snapshots /srv && exec \"$@\"";
    let wrapper = ["unshare", "--mount", "sh", "-c", mount, "sh"];
    let service = Service::start_with(&wrapper, &[]).await.unwrap();
    let client = service.client();
    let (vm, _) = boot(&service, "raw").await;
    let before = client.vms_info(&vm).await.unwrap().config;
    for is_paused in [true, false] {
        writes_on(port(&service, "guest")).await;
        if is_paused {
            client.vms_pause(&vm).await.unwrap();
        }
        let full = Path::new("/srv/full");
        let begun = client.vms_snapshot(&vm, &with_copies(full)).await;
        let why = over(&service, &begun.unwrap()).await.error.unwrap();
        assert_eq!(why.code, "no-space", "{why:?}");
        assert!(why.detail.contains("the disk"), "{why:?}");
        assert_eq!(client.vms_info(&vm).await.unwrap().config, before);
        if is_paused {
            client.vms_resume(&vm).await.unwrap();
        }
        let left = fs::read_dir(format!("/proc/{}/root/srv", service.pid())).unwrap();
        assert_eq!(left.count(), 0);
    }
    writes_on(port(&service, "guest")).await;
}

/// The command line makes a snapshot, describes it, and starts a program from it, which opens only what
/// the snapshot names. What the restored VMs leave beside the copy is listed and removed.
#[tokio::test]
async fn commands_copy_describe_and_restore_disks() {
    let service = Service::start(Face::Many).await.unwrap();
    let client = service.client();
    let (vm, disk) = boot(&service, "qcow2").await;
    writes_on(port(&service, "guest")).await;
    let dir = fs::canonicalize(service.path("")).unwrap().join("snapshot");
    let folder = dir.to_str().unwrap();
    let wrong = remote(
        &service,
        &["--vm", "guest", "snapshot", folder, "--disks", "copies"],
    );
    assert_eq!(wrong.status.code(), Some(2));
    let without = [
        "--vm",
        "guest",
        "snapshot",
        folder,
        "--max-downtime-ms",
        "9",
    ];
    let refused = String::from_utf8(remote(&service, &without).stderr).unwrap();
    assert!(refused.contains("needs `disks` set to `Copy`"), "{refused}");
    assert!(!dir.exists());
    let taken = ["--vm", "guest", "snapshot", folder, "--disks", "copy"];
    let taken = remote(&service, &taken);
    assert!(taken.status.success(), "{taken:?}");
    client.vms_delete(&vm).await.unwrap();
    fs::remove_file(disk).unwrap();
    let described = remote(&service, &["describe", folder]).stdout;
    let described: serde_json::Value = serde_json::from_slice(&described).unwrap();
    let copy = &described["disk_images"][0];
    assert_eq!(copy["disk"], "disk");
    assert_eq!(copy["size"], 2 << 20);
    assert_eq!(copy["path"], format!("{folder}/disk-0.raw"));
    let whole = fs::read(dir.join("disk-0.raw")).unwrap();

    let socket = service.path("one.sock");
    let mut program = Command::new(built("whimbrel").unwrap())
        .arg("--api-socket")
        .arg(&socket)
        .arg("--restore")
        .arg(format!("source_url=file://{folder},resume=on"))
        .arg("--landlock")
        .stdin(Stdio::null())
        .spawn()
        .unwrap();
    let running = async {
        let client = Client::unix(&socket);
        let is_running = async || {
            client
                .vm_info()
                .await
                .is_ok_and(|info| info.state == VmState::Running)
        };
        while !is_running().await {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        client
    };
    let one = tokio::time::timeout(PATIENCE, running).await.unwrap();
    writes_on(port(&service, "guest")).await;
    one.shut_service_down().await.unwrap();
    assert!(program.wait().unwrap().success());

    let what = RestoreConfig {
        count: Some(2),
        overrides: Some(apart(&service, "made")),
        ..from(&dir, true)
    };
    let begun = client.vms_restore(&"made".parse().unwrap(), &what).await;
    completed(&service, begun.unwrap()).await;
    for n in 1..=2 {
        let made: VmId = format!("made-{n}").parse().unwrap();
        writes_on(port(&service, made.as_str())).await;
        assert_eq!(overlay(&service, &made).await.parent(), Some(&*dir));
        client.vms_delete(&made).await.unwrap();
    }
    assert!(
        fs::read(dir.join("disk-0.raw")).unwrap() == whole,
        "nothing wrote to the copy"
    );
    let image = format!("{folder}/disk-0.raw");
    let removed = remote(&service, &["snapshot", "overlays", "--remove", &image]);
    let text = String::from_utf8(removed.stdout).unwrap();
    assert_eq!(text.matches(" removed").count(), 3, "{text}");
    assert_eq!(fs::read_dir(&dir).unwrap().count(), 6, "the snapshot");
}
