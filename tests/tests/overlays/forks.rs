//! Forks whose disks are frozen.

use spec::VmState;

use super::*;

/// A VM that runs is forked with its disk.
#[tokio::test]
async fn forks_of_a_running_vm_have_their_own_disks() {
    const FORKS: u32 = 3;
    let service = Service::start(Face::Many).await.unwrap();
    let client = service.client();
    let (vm, disk) = boot(&service, "raw").await;
    writes_on(port(&service, "guest")).await;
    let mut what = ForkVm {
        count: FORKS,
        name: Some("fork".parse().unwrap()),
        resume: true,
        overrides: apart(&service, "fork"),
        disks: SnapshotDisks::None,
    };
    refused(client.vms_fork(&vm, &what).await, 409, "disk-written");
    assert!(overlays(&disk).is_empty());
    what.disks = SnapshotDisks::Overlay;
    completed(&service, client.vms_fork(&vm, &what).await.unwrap()).await;
    let mut paths = vec![overlay(&service, &vm).await];
    for n in 1..=FORKS {
        let fork = format!("fork-{n}");
        writes_on(port(&service, &fork)).await;
        paths.push(overlay(&service, &fork.parse().unwrap()).await);
    }
    writes_on(port(&service, "guest")).await;
    paths.sort();
    paths.dedup();
    assert_eq!(overlays(&disk), paths);
    assert_eq!(paths.len(), FORKS as usize + 1);
}

/// Forks that cannot be made are refused before the disks of their VM are frozen. What only the host can refuse
/// comes later, and the error says where the VM is then.
#[tokio::test]
async fn refused_forks_leave_the_disks_of_their_vm() {
    let service = Service::start(Face::Many).await.unwrap();
    let client = service.client();
    let (vm, disk) = boot(&service, "raw").await;
    writes_on(port(&service, "guest")).await;
    let before = client.vms_info(&vm).await.unwrap().config;
    let log = service.path("forks.log");
    let taken = std::os::unix::net::UnixListener::bind(service.path("taken")).unwrap();
    let serial = |overrides: serde_json::Value| serde_json::json!({ "serial": overrides });
    let image = serde_json::json!([{ "id": "disk", "path": service.path("missing") }]);
    let mut overrides = serde_json::to_value(apart(&service, "fork")).unwrap();
    overrides["disks"] = image;
    let refusals = [
        // The VM's own socket.
        (
            serde_json::json!({}),
            "file-in-use",
            "which the VM guest has as `serial.socket`",
        ),
        (
            serial(serde_json::json!({ "mode": "File", "file": log })),
            "file-in-use",
            "VM guest-2: `serial.file` names",
        ),
        (
            serial(serde_json::json!({ "mode": "File", "file": disk })),
            "file-in-use",
            "`disks.0.path` and `serial.file` both name",
        ),
        (
            serial(serde_json::json!({ "mode": "File", "file": service.path("no/{n}") })),
            "path-unusable",
            "No such file or directory",
        ),
        (
            serial(serde_json::json!({ "mode": "Socket", "socket": service.path("taken") })),
            "console-unusable",
            "another program listens there",
        ),
        (overrides, "path-unusable", "missing"),
    ];
    for (overrides, code, why) in refusals {
        for is_paused in [true, false] {
            if is_paused {
                client.vms_pause(&vm).await.unwrap();
            }
            let what = ForkVm {
                count: 2,
                overrides: serde_json::from_value(overrides.clone()).unwrap(),
                disks: SnapshotDisks::Overlay,
                ..ForkVm::default()
            };
            let refused = client.vms_fork(&vm, &what).await;
            let Err(openapi::ClientError::Problem(problem)) = refused else {
                unreachable!("{overrides}: {refused:?}");
            };
            assert_eq!((problem.status, &*problem.code), (422, code), "{problem:?}");
            assert!(problem.detail.contains(why), "{problem:?}");
            assert!(overlays(&disk).is_empty());
            if is_paused {
                client.vms_resume(&vm).await.unwrap();
            }
        }
    }
    drop(taken);
    let info = client.vms_info(&vm).await.unwrap();
    assert_eq!((&info.config, info.state), (&before, VmState::Running));
    assert!(!log.exists(), "a check makes nothing");
    writes_on(port(&service, "guest")).await;
    assert_eq!(client.vms_list().await.unwrap().len(), 1);
}

/// Only the host can refuse a tap. The copy of the VM was made by then, and the error says where the VM is.
#[tokio::test]
async fn failed_forks_tell_that_their_vm_is_on_overlays() {
    let service = Service::start(Face::Many).await.unwrap();
    let client = service.client();
    let (mut config, serial) = service.pocket("guest", Options::default()).unwrap();
    let disk = fs::canonicalize(service.path("")).unwrap().join("disk");
    fs::File::create(&disk).unwrap().set_len(1 << 20).unwrap();
    let disks = serde_json::json!([{ "path": disk, "image_type": "Raw" }]);
    config.disks = serde_json::from_value(disks).unwrap();
    let net = serde_json::json!([{ "id": "net", "tap": format!("wo{:x}", std::process::id()) }]);
    config.net = serde_json::from_value(net).unwrap();
    let vm = service.create("guest", config).await.unwrap();
    client.vms_boot(&vm).await.unwrap();
    serial.wait_for("ready", 1, PATIENCE).await.unwrap();
    let overrides = serde_json::json!({
        "net": [{ "id": "net", "tap": "lo" }],
        "serial": { "mode": "Null" },
    });
    let what = ForkVm {
        overrides: serde_json::from_value(overrides).unwrap(),
        disks: SnapshotDisks::Overlay,
        ..ForkVm::default()
    };
    let failed = over(&service, &client.vms_fork(&vm, &what).await.unwrap()).await;
    let why = failed.error.unwrap();
    assert_eq!(why.code, "tap-unusable", "{why:?}");
    assert!(why.detail.contains("continue on overlays"), "{why:?}");
    assert_eq!(overlays(&disk), [overlay(&service, &vm).await]);
    assert_eq!(client.vms_list().await.unwrap().len(), 1);
}
