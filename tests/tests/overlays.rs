//! Snapshots and forks whose disks are frozen: the VM and each VM that is made continue on overlays.
//!
//! The guest writes to its disk without end, and checks what it wrote before. It notices a disk that is of
//! another moment than its memory.

#![allow(clippy::unwrap_used, reason = "tests")]

#[path = "overlays/copies.rs"]
mod copies;

#[path = "overlays/forks.rs"]
mod forks;

#[path = "overlays/frozen.rs"]
mod frozen;

#[path = "overlays/given.rs"]
mod given;

use std::fs;
use std::io::{BufRead as _, BufReader, Write as _};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use guest::{DISK_PAGES, Line, Options, Workload};
use spec::{ForkVm, ImageType, MigrationPhase, OverlayState, RestoreConfig, SnapshotDisks};
use spec::{VmId, VmSnapshotConfig};
use tests::snapshots::{from, over, refused, to};
use tests::{Face, Service, built};

const PATIENCE: Duration = Duration::from_secs(60);

fn with_overlays(dir: &Path) -> VmSnapshotConfig {
    VmSnapshotConfig {
        disks: SnapshotDisks::Overlay,
        ..to(dir)
    }
}

/// The socket of a guest's serial port: of the first VM, and of those that are made.
fn port(at: &Service, vm: &str) -> PathBuf {
    at.path(format!("{vm}.port"))
}

/// The serial port of VM `{n}` of those that are made, each with its own socket.
fn apart(at: &Service, name: &str) -> spec::Overrides {
    let socket = port(at, &format!("{name}-{{n}}"));
    let text = serde_json::json!({ "serial": { "mode": "Socket", "socket": socket } });
    serde_json::from_value(text).unwrap()
}

fn qemu_img(args: &[&str]) -> String {
    let run = Command::new("qemu-img").args(args).output();
    let run = run.expect("qemu-img, of the package qemu-utils");
    assert!(run.status.success(), "{args:?}: {run:?}");
    String::from_utf8(run.stdout).unwrap()
}

/// Boots the guest with a disk of this format.
async fn boot(at: &Service, format: &str) -> (VmId, PathBuf) {
    let writing = Options {
        workload: Workload::Io,
        ..Options::default()
    };
    let (mut config, _) = at.pocket("guest", writing).unwrap();
    let disk = fs::canonicalize(at.path("")).unwrap().join("disk");
    qemu_img(&["create", "-q", "-f", format, disk.to_str().unwrap(), "2M"]);
    let text = serde_json::json!([{ "id": "disk", "path": disk }]);
    config.disks = serde_json::from_value(text).unwrap();
    let text = serde_json::json!({ "mode": "Socket", "socket": port(at, "guest") });
    config.serial = serde_json::from_value(text).unwrap();
    let vm = at.create("guest", config).await.unwrap();
    at.client().vms_boot(&vm).await.unwrap();
    (vm, disk)
}

/// Waits until the guest has written its whole disk once more, and checks that all was as it left it.
async fn writes_on(port: PathBuf) {
    let asked = tokio::task::spawn_blocking(move || {
        let stream = UnixStream::connect(&port).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        let mut lines = BufReader::new(stream.try_clone().unwrap()).lines();
        let mut ask = || loop {
            writeln!(&stream, "{}", guest::Command::Io).unwrap();
            let line = lines.find_map(|line| match Line::parse(&line.unwrap()) {
                Some(Line::Io { blocks, bad, .. }) => Some((blocks, bad)),
                _ => None,
            });
            let (blocks, bad) = line.unwrap();
            assert_eq!(bad, 0, "{}: the disk is of another moment", port.display());
            if blocks > 0 {
                return blocks;
            }
        };
        let (first, begun) = (ask(), Instant::now());
        while ask() < first + DISK_PAGES as u64 + 1 {
            assert!(begun.elapsed() < PATIENCE, "the guest does not write");
            std::thread::sleep(Duration::from_millis(10));
        }
    });
    asked.await.unwrap();
}

/// A snapshot is whole: a VM that is made from it writes to its disk. The VM is deleted.
async fn writes_on_again(at: &Service, dir: &Path) {
    let client = at.client();
    let what = RestoreConfig {
        count: Some(1),
        overrides: Some(apart(at, "again")),
        ..from(dir, true)
    };
    let begun = client.vms_restore(&"again".parse().unwrap(), &what).await;
    completed(at, begun.unwrap()).await;
    writes_on(port(at, "again-1")).await;
    client
        .vms_delete(&"again-1".parse().unwrap())
        .await
        .unwrap();
}

/// The path of the VM's disk, which is an overlay.
async fn overlay(at: &Service, vm: &VmId) -> PathBuf {
    let config = at.client().vms_info(vm).await.unwrap().config;
    let disk = config.disks.unwrap().remove(0);
    assert!(disk.backing_files && !disk.readonly && !disk.image_type_detected);
    assert_eq!(disk.image_type, Some(ImageType::Qcow2));
    disk.path.unwrap().into()
}

/// The overlays in the folder of the disk.
fn overlays(disk: &Path) -> Vec<PathBuf> {
    beside(disk, |name| name.ends_with(".qcow2"))
}

/// The records of snapshots that need one of the images: overlays, and those that are frozen.
fn records(disk: &Path) -> Vec<PathBuf> {
    let needed = beside(disk, |name| name.contains(".snapshot-"));
    let folders = beside(disk, |name| name.ends_with(".frozen")).into_iter();
    let marks = folders.flat_map(|folder| fs::read_dir(folder).unwrap());
    let marks = marks.map(|entry| entry.unwrap().path());
    let mut all: Vec<_> = needed.into_iter().chain(marks).collect();
    all.sort();
    all
}

/// The files in the folder of the disk whose names begin with that of the disk.
fn beside(disk: &Path, is_wanted: impl Fn(&str) -> bool) -> Vec<PathBuf> {
    let start = format!("{}.", disk.file_name().unwrap().to_str().unwrap());
    let all = fs::read_dir(disk.parent().unwrap()).unwrap();
    let mut all: Vec<_> = all.map(|entry| entry.unwrap().path()).collect();
    all.retain(|path| {
        let name = path.file_name().unwrap().to_str().unwrap();
        name.starts_with(&start) && is_wanted(name)
    });
    all.sort();
    all
}

async fn completed(at: &Service, begun: spec::MigrationInfo) {
    let ended = over(at, &begun).await;
    assert_eq!(ended.phase, MigrationPhase::Completed, "{ended:?}");
}

/// The snapshots are of a running and of a paused VM. They are restored several times, beside the VM,
/// while the VM changes to a second overlay.
#[tokio::test]
async fn guest_is_restored_with_the_disk_of_its_moment() {
    for format in ["raw", "qcow2"] {
        let service = Service::start(Face::Many).await.unwrap();
        let client = service.client();
        let (vm, disk) = boot(&service, format).await;
        writes_on(port(&service, "guest")).await;
        let live = service.path("live");
        completed(
            &service,
            client
                .vms_snapshot(&vm, &with_overlays(&live))
                .await
                .unwrap(),
        )
        .await;
        let first = overlay(&service, &vm).await;
        assert_eq!(overlays(&disk), std::slice::from_ref(&first));
        let frozen = fs::read(&disk).unwrap();
        writes_on(port(&service, "guest")).await;
        // The next machine finds what the guest wrote last.
        client.vms_pause(&vm).await.unwrap();
        let paused = service.path("paused");
        let begun = client.vms_snapshot(&vm, &with_overlays(&paused)).await;
        completed(&service, begun.unwrap()).await;
        let second = overlay(&service, &vm).await;
        assert_ne!(second, first);
        client.vms_resume(&vm).await.unwrap();
        writes_on(port(&service, "guest")).await;

        for (name, dir, base) in [
            ("a", &live, &disk),
            ("b", &paused, &first),
            ("c", &live, &disk),
        ] {
            let what = RestoreConfig {
                count: Some(2),
                overrides: Some(apart(&service, name)),
                ..from(dir, true)
            };
            let id: VmId = name.parse().unwrap();
            completed(&service, client.vms_restore(&id, &what).await.unwrap()).await;
            for n in 1..=2 {
                let made = format!("{name}-{n}");
                writes_on(port(&service, &made)).await;
                let made: VmId = made.parse().unwrap();
                let own = overlay(&service, &made).await;
                client.vms_reboot(&made).await.unwrap();
                client.vms_delete(&made).await.unwrap();
                qemu_img(&["check", "-q", own.to_str().unwrap()]);
                let info = qemu_img(&["info", own.to_str().unwrap()]);
                let base = base.file_name().unwrap().to_str().unwrap();
                assert!(info.contains(&format!("backing file: ./{base} ")), "{info}");
                fs::remove_file(own).unwrap();
            }
        }
        assert_eq!(overlays(&disk).len(), 2, "those of the VM");
        writes_on(port(&service, "guest")).await;
        client.vms_delete(&vm).await.unwrap();
        assert!(
            fs::read(&disk).unwrap() == frozen,
            "{format}: nothing wrote to the frozen image"
        );
        for image in overlays(&disk) {
            qemu_img(&["check", "-q", image.to_str().unwrap()]);
        }
    }
}

/// A snapshot that fails, on a full disk, leaves no overlay of a paused VM. One that runs has written to it
/// by then, and continues there.
#[tokio::test]
async fn failed_snapshot_leaves_disks_that_are_whole() {
    // The service alone sees the small file system. The wrapper becomes the service.
    let mount = "mount -t tmpfs -o size=64k snapshots /srv && exec \"$@\"";
    let wrapper = ["unshare", "--mount", "sh", "-c", mount, "sh"];
    let service = Service::start_with(&wrapper, &[]).await.unwrap();
    let client = service.client();
    let (vm, disk) = boot(&service, "raw").await;
    for is_paused in [true, false] {
        writes_on(port(&service, "guest")).await;
        if is_paused {
            client.vms_pause(&vm).await.unwrap();
        }
        let before = client.vms_info(&vm).await.unwrap().config;
        let full = Path::new("/srv/full");
        let begun = client.vms_snapshot(&vm, &with_overlays(full)).await;
        let error = over(&service, &begun.unwrap()).await.error.unwrap();
        let says = error.detail.contains("on overlays");
        assert_eq!((&*error.code, says), ("no-space", !is_paused));
        // What is below the overlay of a VM stays frozen.
        assert_eq!(records(&disk).is_empty(), is_paused);
        let config = client.vms_info(&vm).await.unwrap().config;
        assert_eq!(config == before, is_paused);
        if is_paused {
            assert!(overlays(&disk).is_empty());
            client.vms_resume(&vm).await.unwrap();
        } else {
            assert_eq!(overlays(&disk), [overlay(&service, &vm).await]);
        }
    }
    writes_on(port(&service, "guest")).await;
}

/// A paused VM is rebooted while its snapshot is written, which is canceled unless it was complete. If the
/// disk was an overlay by then, the next machine continues on it; else nothing is left of the overlay.
#[tokio::test]
async fn reboot_ends_the_snapshot_of_a_paused_vm() {
    let service = Service::start(Face::Many).await.unwrap();
    let client = service.client();
    let (vm, disk) = boot(&service, "raw").await;
    for n in 0..4 {
        writes_on(port(&service, "guest")).await;
        client.vms_pause(&vm).await.unwrap();
        let before = client.vms_info(&vm).await.unwrap().config;
        let images = overlays(&disk).len();
        let dir = service.path(format!("snapshot-{n}"));
        let begun = client.vms_snapshot(&vm, &with_overlays(&dir)).await;
        let begun = begun.unwrap();
        if n > 0 {
            // The steps until the state is saved take some milliseconds.
            tokio::time::sleep(Duration::from_millis(n)).await;
        }
        client.vms_reboot(&vm).await.unwrap();
        let ended = over(&service, &begun).await;
        let config = client.vms_info(&vm).await.unwrap().config;
        let is_whole = ended.phase == MigrationPhase::Completed;
        assert_eq!(dir.join("manifest.json").exists(), is_whole);
        if config == before {
            assert!(!is_whole, "the snapshot names the image of the VM");
            assert_eq!(overlays(&disk).len(), images, "{ended:?}");
        } else {
            assert_eq!(overlays(&disk).len(), images + 1, "{ended:?}");
            assert!(overlays(&disk).contains(&overlay(&service, &vm).await));
            assert!(!records(&disk).is_empty(), "{ended:?}");
        }
        writes_on(port(&service, "guest")).await;
    }
}

/// Snapshots, forks and restores that are canceled at some moment leave neither a VM nor an image nor a folder
/// of theirs. A VM that was saved while it ran may continue on its overlay.
#[tokio::test]
async fn canceled_operations_leave_nothing() {
    const FORKS: u32 = 3;
    let service = Service::start(Face::Many).await.unwrap();
    let client = service.client();
    let (vm, disk) = boot(&service, "raw").await;
    writes_on(port(&service, "guest")).await;
    let dir = service.path("snapshot");
    let begun = client.vms_snapshot(&vm, &with_overlays(&dir)).await;
    completed(&service, begun.unwrap()).await;
    for delay in [0, 5, 40, 120] {
        // Cancels, unless it is over by then. Returns whether it completed.
        let canceled = async |begun: Result<spec::MigrationInfo, openapi::ClientError>| {
            let begun = begun.unwrap();
            tokio::time::sleep(Duration::from_millis(delay)).await;
            let _ = client.migrations_cancel(&begun.id.parse().unwrap()).await;
            let ended = over(&service, &begun).await;
            let is_complete = ended.phase == MigrationPhase::Completed;
            let is_either = is_complete || ended.phase == MigrationPhase::Canceled;
            assert!(is_either, "{ended:?}");
            is_complete
        };
        // Ends the VMs with this name, of which there are all or none, and removes their overlays.
        let removed = async |name: &str, count: usize, is_complete: bool| {
            let all = client.vms_list().await.unwrap();
            let mut made = all.into_iter().map(|vm| vm.id).collect::<Vec<_>>();
            made.retain(|id| id.as_str().starts_with(name));
            assert_eq!(made.len(), if is_complete { count } else { 0 });
            for id in made {
                let own = overlay(&service, &id).await;
                client.vms_delete(&id).await.unwrap();
                fs::remove_file(own).unwrap();
            }
        };
        for mode in ["Copy", "OnDemand", "Map"] {
            let before = overlays(&disk);
            let what = RestoreConfig {
                memory_restore_mode: serde_json::from_value(mode.into()).unwrap(),
                overrides: Some(apart(&service, "other")),
                ..from(&dir, true)
            };
            let begun = client.vms_restore(&"other".parse().unwrap(), &what).await;
            let is_complete = canceled(begun).await;
            removed("other", 1, is_complete).await;
            assert_eq!(overlays(&disk), before, "{mode}");
        }
        for is_paused in [true, false] {
            if is_paused {
                client.vms_pause(&vm).await.unwrap();
            }
            // The images that may have been added: that of the VM.
            let added = async |before: Vec<PathBuf>| {
                let own = overlay(&service, &vm).await;
                let mut more = overlays(&disk);
                more.retain(|path| !before.contains(path));
                assert!(more.is_empty() || more == [own], "{more:?}");
                !more.is_empty()
            };
            let before = overlays(&disk);
            let to = service.path(format!("to-{is_paused}-{delay}"));
            let begun = client.vms_snapshot(&vm, &with_overlays(&to)).await;
            let is_complete = canceled(begun).await;
            assert_eq!(to.exists(), is_complete);
            // A paused VM returns to its image.
            let is_added = added(before).await;
            assert!(is_added == is_complete || !is_paused, "{is_added}");

            let before = overlays(&disk);
            let what = ForkVm {
                count: FORKS,
                name: Some("fork".parse().unwrap()),
                resume: true,
                overrides: apart(&service, "fork"),
                disks: SnapshotDisks::Overlay,
            };
            let is_complete = canceled(client.vms_fork(&vm, &what).await).await;
            removed("fork", FORKS as usize, is_complete).await;
            added(before).await;
            if is_paused {
                client.vms_resume(&vm).await.unwrap();
            }
            writes_on(port(&service, "guest")).await;
        }
    }
}

/// The images that deleted VMs leave are listed with their users, and removed unless a snapshot or VM needs
/// them.
#[tokio::test]
async fn overlays_that_nothing_uses_are_removed() {
    let service = Service::start_with(&[], &["-v".to_owned()]).await.unwrap();
    let client = service.client();
    let (vm, disk) = boot(&service, "raw").await;
    writes_on(port(&service, "guest")).await;
    let [first, second] = ["first", "second"].map(|name| service.path(name));
    let begun = client.vms_snapshot(&vm, &with_overlays(&first)).await;
    completed(&service, begun.unwrap()).await;
    let frozen = overlay(&service, &vm).await;
    let begun = client.vms_snapshot(&vm, &with_overlays(&second)).await;
    completed(&service, begun.unwrap()).await;
    let what = ForkVm {
        count: 2,
        overrides: apart(&service, "fork"),
        disks: SnapshotDisks::Overlay,
        ..ForkVm::default()
    };
    let below = overlay(&service, &vm).await;
    completed(&service, client.vms_fork(&vm, &what).await.unwrap()).await;
    let own = overlay(&service, &vm).await;

    let find = async |path: &Path, remove| {
        let path = path.to_str().unwrap().to_owned();
        client.overlays(&spec::FindOverlays { path, remove }).await
    };
    let states = async |remove| {
        let found = find(&disk, remove).await.unwrap();
        let states = found
            .into_iter()
            .map(|one| (PathBuf::from(one.path), one.state));
        states.collect::<std::collections::BTreeMap<_, _>>()
    };
    // The VMs use all of them: those that are below an overlay, too.
    let all = states(true).await;
    assert_eq!(all.len(), 5);
    assert!(
        all.values().all(|state| *state == OverlayState::InUse),
        "{all:?}"
    );
    for fork in ["guest-1", "guest-2"] {
        client.vms_delete(&fork.parse().unwrap()).await.unwrap();
    }
    // The VM is off, and its configuration names an overlay.
    client.vms_shutdown(&vm).await.unwrap();
    let above = service.path("above.qcow2");
    let create = ["create", "-q", "-f", "qcow2", "-F", "qcow2", "-b"];
    qemu_img(
        &[
            &create[..],
            &[frozen.to_str().unwrap(), above.to_str().unwrap()],
        ]
        .concat(),
    );
    let listed = states(false).await;
    assert_eq!(listed[&own], OverlayState::InUse);
    assert_eq!(listed[&below], OverlayState::Backing);
    let unused = listed
        .values()
        .filter(|state| **state == OverlayState::Unused);
    assert_eq!(unused.count(), 2, "those of the forks: {listed:?}");
    assert_eq!(states(false).await, listed, "none is removed");
    client.vms_delete(&vm).await.unwrap();
    // By the command, and what is below the first that go.
    let run = Command::new(built("wh-remote").unwrap())
        .arg("--api-socket")
        .arg(service.socket())
        .args(["snapshot", "overlays", "--remove"])
        .arg(&disk)
        .output()
        .unwrap();
    let text = String::from_utf8(run.stdout).unwrap();
    assert_eq!(text.matches(" removed").count(), 4, "{text}");
    assert_eq!(overlays(&disk).first(), Some(&frozen));
    assert!(
        service
            .log()
            .contains("removed an overlay that nothing uses")
    );
    fs::remove_file(above).unwrap();
    let kept = find(&disk, true).await.unwrap();
    let reason = kept[0].reason.clone().unwrap();
    assert_eq!(kept[0].state, OverlayState::Snapshot);
    assert!(reason.contains(second.to_str().unwrap()), "{reason}");

    // The snapshot that needs it is whole.
    for dir in [&first, &second] {
        writes_on_again(&service, dir).await;
    }
    let left = states(true).await.into_values().collect::<Vec<_>>();
    assert_eq!(left.len(), 3);
    assert_eq!(overlays(&disk), std::slice::from_ref(&frozen));
    // A merged snapshot needs it, too, and a merge that fails does not.
    let whole = service.path("whole");
    for expected in [MigrationPhase::Completed, MigrationPhase::Failed] {
        let merge = spec::MergeSnapshots {
            source_url: format!("file://{}", second.display()),
            destination_url: format!("file://{}", whole.display()),
        };
        let begun = client.snapshots_merge(&merge).await.unwrap();
        assert_eq!(over(&service, &begun).await.phase, expected);
        assert_eq!(records(&frozen).len(), 2);
    }
    // Both are gone, but the records say how to go on.
    fs::remove_dir_all(&second).unwrap();
    fs::remove_dir_all(&whole).unwrap();
    for record in records(&frozen) {
        let kept = find(&disk, true).await.unwrap().remove(0);
        assert_eq!(kept.state, OverlayState::Snapshot);
        let reason = kept.reason.unwrap();
        let mut named = records(&frozen).into_iter();
        let named = named.any(|record| reason.contains(record.to_str().unwrap()));
        assert!(named, "{reason}");
        fs::remove_file(record).unwrap();
    }
    assert_eq!(states(true).await[&frozen], OverlayState::Removed);
    assert!(overlays(&disk).is_empty());

    refused(
        find(Path::new("web.raw"), true).await,
        422,
        "invalid-configuration",
    );
    let nowhere = find(Path::new("/no/such/folder/web.raw"), true).await;
    refused(nowhere, 422, "overlays-unreadable");
    let none = find(&service.path("no-such-image"), true).await;
    refused(none, 422, "no-such-image");
}

/// A restore that fails removes the overlays that it has made.
#[tokio::test]
async fn failed_restore_leaves_no_overlay() {
    let service = Service::start(Face::Many).await.unwrap();
    let client = service.client();
    let (vm, disk) = boot(&service, "raw").await;
    let dir = service.path("snapshot");
    completed(
        &service,
        client
            .vms_snapshot(&vm, &with_overlays(&dir))
            .await
            .unwrap(),
    )
    .await;
    let before = overlays(&disk);
    // The serial port's socket is in use by the VM that was saved.
    let failed = client
        .vms_restore(&"other".parse().unwrap(), &from(&dir, true))
        .await;
    let failed = over(&service, &failed.unwrap()).await;
    assert_eq!(failed.phase, MigrationPhase::Failed, "{failed:?}");
    assert_eq!(overlays(&disk), before);
    let why = failed.error.unwrap().detail;
    assert!(why.starts_with("the serial port's socket "), "{why}");
    assert!(
        why.contains("the VM guest of this service has it as `serial.socket`"),
        "{why}"
    );
    assert!(why.contains("`--overrides FILE`"), "{why}");
    for kind in ["raw", "qcow2", "overlay"] {
        given::restored_with(&service, &disk, &dir, kind).await;
        assert_eq!(overlays(&disk), before);
    }
    // A writer has the frozen image, which was released: nothing is made on top of it.
    client.vms_delete(&vm).await.unwrap();
    let marks = records(&disk).into_iter();
    marks.for_each(|mark| fs::remove_file(mark).unwrap());
    let mut holder = service.pocket("holder", Options::default()).unwrap().0;
    let text = serde_json::json!([{ "id": "disk", "path": disk, "image_type": "Raw" }]);
    holder.disks = serde_json::from_value(text).unwrap();
    let holder = service.create("holder", holder).await.unwrap();
    client.vms_boot(&holder).await.unwrap();
    let begun = client
        .vms_restore(&"late".parse().unwrap(), &from(&dir, true))
        .await;
    let failed = over(&service, &begun.unwrap()).await.error.unwrap();
    assert_eq!(failed.code, "no-overlay");
    assert!(failed.detail.contains("is in use by"), "{failed:?}");
    assert_eq!(overlays(&disk), before);
}
