//! Snapshots of a guest that writes to its memory, and guests made from them, over REST.

#![allow(clippy::unwrap_used, reason = "tests")]

#[path = "snapshot/interrupted.rs"]
mod interrupted;

use std::fs;
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use openapi::{Client, News};
use spec::{
    AwaitMigration, MigrationPhase, StartMigration, VmConfig, VmId, VmMemoryZoneUpdateData,
    VmResizeZone, VmSnapshotConfig, VmState,
};
use tests::snapshots::{from, over, refused, restore, snapshot, to};
use tests::{Face, Service, built, dirtier};

const PATIENCE: Duration = Duration::from_secs(60);

/// The guest goes on after its snapshot, and comes back from it as it was: here and in another service.
#[tokio::test]
async fn guest_comes_back_from_its_snapshot() {
    let (a, b) = tokio::join!(Service::start(Face::Many), Service::start(Face::Many));
    let (a, b) = (a.unwrap(), b.unwrap());
    let (vm, port) = dirtier::boot(&a).await.unwrap();
    let dir = a.path("snapshot");
    // A device that was plugged while the guest runs comes back where it is.
    let image = a.path("hot");
    fs::File::create(&image).unwrap().set_len(1 << 20).unwrap();
    let disk = serde_json::json!({ "id": "hot", "path": image, "image_type": "Raw" });
    let disk = serde_json::from_value(disk).unwrap();
    let added = a.client().vms_add_disk(&vm, &disk).await.unwrap().unwrap();
    let place = async |at: &Service, vm: &VmId| {
        let tree = at.client().vms_info(vm).await.unwrap().device_tree;
        tree.unwrap().0["hot"].pci_bdf.clone()
    };
    a.client().vms_pause(&vm).await.unwrap();
    let taken = snapshot(&a, &vm, &dir).await;
    assert_eq!(taken.phase, MigrationPhase::Completed, "{taken:?}");
    assert!(taken.pages > 100 && taken.zero_pages > 1000, "{taken:?}");
    let events = a.client().vms_info(&vm).await.unwrap();
    assert_eq!(events.state, VmState::Paused, "it stays paused");
    a.client().vms_resume(&vm).await.unwrap();
    dirtier::check(&port).await.unwrap();
    a.client().vms_delete(&vm).await.unwrap();

    let came = restore(&b, &vm, &dir, true).await;
    assert_eq!(came.phase, MigrationPhase::Completed, "{came:?}");
    assert_eq!(
        (came.pages, came.zero_pages),
        (taken.pages, taken.zero_pages)
    );
    dirtier::check(&port).await.unwrap();
    assert_eq!(place(&b, &vm).await, Some(added.bdf));
    let socket = b.client().vms_list().await.unwrap()[0].api_socket.clone();
    assert!(
        Path::new(&socket.unwrap()).exists(),
        "it has a socket of its own"
    );
    let events = seen(&b, &vm, 4).await;
    assert_eq!(events, "restoring created restored resumed");
    let events = seen(&a, &vm, 9).await;
    assert_eq!(
        events,
        "created booted device-added paused snapshotting snapshotted resumed shutdown deleted"
    );
    b.client().vms_delete(&vm).await.unwrap();

    // Again, under another name, and paused.
    let other: VmId = "other".parse().unwrap();
    restore(&a, &other, &dir, false).await;
    let info = a.client().vms_info(&other).await.unwrap();
    assert_eq!(info.state, VmState::Paused);
    // A snapshot of a restored guest that never ran, and a guest from that.
    let second = a.path("second");
    let again = snapshot(&a, &other, &second).await;
    assert_eq!(again.phase, MigrationPhase::Completed, "{again:?}");
    a.client().vms_delete(&other).await.unwrap();
    restore(&a, &vm, &second, false).await;
    a.client().vms_resume(&vm).await.unwrap();
    dirtier::check(&port).await.unwrap();

    // A restore that fails has an end, too, also if no VM was made.
    let lost: VmId = "lost".parse().unwrap();
    let path = dir.join("memory.bin");
    let mut options = fs::File::options();
    let memory = options.read(true).write(true).open(path).unwrap();
    let mut byte = [0];
    // Where the kernel is.
    memory.read_exact_at(&mut byte, 2 << 20).unwrap();
    memory.write_all_at(&[!byte[0]], 2 << 20).unwrap();
    let failed = restore(&a, &lost, &dir, false).await;
    assert_eq!(failed.phase, MigrationPhase::Failed, "{failed:?}");
    let events = seen(&a, &lost, 3).await;
    assert_eq!(events, "restoring created restore-failed");
}

/// A guest whose memory is two zones, in both of which it writes, moves while it runs, is saved while it
/// runs, and comes back from that in each way that there is.
#[tokio::test]
async fn guest_with_zones_moves_and_comes_back() {
    let (a, b) = tokio::join!(Service::start(Face::Many), Service::start(Face::Many));
    let (a, b) = (a.unwrap(), b.unwrap());
    let divide = |config: &mut VmConfig| {
        let rest = config.memory.size - (8 << 20);
        let memory = serde_json::json!({
            "size": 0, "zones": [
                { "id": "low", "size": 8 << 20, "host_numa_node": 0 },
                { "id": "rest", "size": rest, "shared": true },
            ],
        });
        config.memory = serde_json::from_value(memory).unwrap();
        let nodes = serde_json::json!([{
            "guest_numa_id": 0, "cpus": [0], "memory_zones": ["low", "rest"],
        }]);
        config.numa = serde_json::from_value(nodes).unwrap();
    };
    // Of the region that the guest writes to, a part is in each zone.
    let options = dirtier::options(16, 1000, 100);
    let (vm, port) = dirtier::boot_as(&a, options, divide).await.unwrap();
    let before = a.client().vms_info(&vm).await.unwrap();
    let waiting = AwaitMigration {
        once: true,
        ..AwaitMigration::at(format!("unix:{}", b.path("move").display()))
    };
    let waiting = b.client().migrations_receive(&waiting).await.unwrap();
    let mut what = StartMigration::to(waiting.endpoint.clone());
    what.verify = true;
    let begun = a.client().vms_migrate(&vm, &what).await.unwrap();
    for (at, begun) in [(&a, &begun), (&b, &waiting)] {
        let ended = over(at, begun).await;
        assert_eq!(ended.phase, MigrationPhase::Completed, "{ended:?}");
    }
    dirtier::check(&port).await.unwrap();
    let info = b.client().vms_info(&vm).await.unwrap();
    assert_eq!(info.config, before.config);
    let zone = VmResizeZone {
        id: "low".to_owned(),
        desired_ram: 0,
    };
    let refused_by = b.client().vms_resize_zone(&vm, &zone).await;
    refused(refused_by, 501, "unsupported-resize");

    let dir = b.path("snapshot");
    let taken = snapshot(&b, &vm, &dir).await;
    assert_eq!(taken.phase, MigrationPhase::Completed, "{taken:?}");
    b.client().vms_delete(&vm).await.unwrap();
    for mode in ["Copy", "OnDemand", "Map"] {
        let mut body = from(&dir, true);
        body.memory_restore_mode = serde_json::from_value(mode.into()).unwrap();
        let update = |id: &str, host_numa_node| VmMemoryZoneUpdateData {
            id: id.to_owned(),
            host_numa_node,
        };
        body.zone_updates = Some(vec![update("rest", 0)]);
        let begun = a.client().vms_restore(&vm, &body).await.unwrap();
        let came = over(&a, &begun).await;
        assert_eq!(came.phase, MigrationPhase::Completed, "{mode}: {came:?}");
        dirtier::check(&port).await.unwrap();
        let info = a.client().vms_info(&vm).await.unwrap();
        let zones = info.config.memory.zones.unwrap();
        assert_eq!(zones[1].host_numa_node, Some(0));
        a.client().vms_delete(&vm).await.unwrap();
        body.zone_updates = Some(vec![update("lower", 0)]);
        refused(
            a.client().vms_restore(&vm, &body).await,
            422,
            "invalid-configuration",
        );
    }
}

/// Returns the first events of a VM.
async fn seen(at: &Service, vm: &VmId, count: usize) -> String {
    let mut events = at.client().events(Some(0), Some(vm)).await.unwrap();
    let mut names = Vec::new();
    while names.len() < count {
        match events.next().await.unwrap() {
            Some(News::Happened(event)) => names.push(event.event),
            other => unreachable!("{other:?} after {names:?}"),
        }
    }
    names.join(" ")
}

#[tokio::test]
async fn one_vm_a_socket_is_saved_as_cloud_hypervisors_clients_ask() {
    let service = Service::start(Face::One).await.unwrap();
    let (_, port) = dirtier::boot(&service).await.unwrap();
    let client = service.client();
    // Its clients make the folder first.
    let dir = service.path("snapshot");
    fs::create_dir(&dir).unwrap();
    refused(client.vm_snapshot(&to(&dir)).await, 405, "wrong-state");
    client.vm_pause().await.unwrap();
    client.vm_snapshot(&to(&dir)).await.unwrap();
    refused(
        client.vm_restore(&from(&dir, false)).await,
        409,
        "vm-exists",
    );
    client.vm_delete().await.unwrap();
    refused(client.vm_snapshot(&to(&dir)).await, 404, "vm-not-created");
    client.vm_restore(&from(&dir, false)).await.unwrap();
    assert_eq!(client.vm_info().await.unwrap().state, VmState::Paused);
    client.vm_resume().await.unwrap();
    dirtier::check(&port).await.unwrap();
}

/// `whimbrel --restore` runs a guest from a snapshot, and ends with it. With `--landlock` it opens only what
/// the snapshot names.
#[tokio::test]
async fn program_starts_from_a_snapshot() {
    let service = Service::start(Face::Many).await.unwrap();
    let (vm, port) = dirtier::boot(&service).await.unwrap();
    service.client().vms_pause(&vm).await.unwrap();
    let dir = service.path("snapshot");
    snapshot(&service, &vm, &dir).await;
    service.client().vms_delete(&vm).await.unwrap();

    let socket = service.path("one.sock");
    let start = |url: String| {
        let mut command = Command::new(built("whimbrel").unwrap());
        command
            .arg("--api-socket")
            .arg(&socket)
            .args(["--restore", &url, "--landlock"]);
        command.stdin(Stdio::null()).spawn().unwrap()
    };
    let url = format!("source_url=file://{},resume=on", dir.display());
    let mut program = start(url);
    let running = async {
        let client = Client::unix(&socket);
        while !client
            .vm_info()
            .await
            .is_ok_and(|info| info.state == VmState::Running)
        {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        client
    };
    let client = tokio::time::timeout(PATIENCE, running).await.unwrap();
    dirtier::check(&port).await.unwrap();
    client.shut_service_down().await.unwrap();
    assert!(program.wait().unwrap().success());
    let nowhere = "source_url=file:///nowhere,resume=on".to_owned();
    assert_eq!(start(nowhere).wait().unwrap().code(), Some(1));
}

#[tokio::test]
async fn requests_that_cannot_be_are_refused_and_change_nothing() {
    let service = Service::start(Face::Many).await.unwrap();
    let (vm, port) = dirtier::boot(&service).await.unwrap();
    let client = service.client();
    let dir = service.path("snapshot");
    client.vms_pause(&vm).await.unwrap();
    let url = VmSnapshotConfig::to("tcp:host:1");
    refused(
        client.vms_snapshot(&vm, &url).await,
        422,
        "invalid-configuration",
    );
    let nowhere = snapshot(&service, &vm, &service.path("no/such/parent")).await;
    assert_eq!(nowhere.error.unwrap().code, "host-refused");
    assert_eq!(snapshot(&service, &vm, &dir).await.error, None);
    let twice = snapshot(&service, &vm, &dir).await;
    assert_eq!(twice.error.unwrap().code, "snapshot-exists");

    refused(
        client.vms_restore(&vm, &from(&dir, true)).await,
        409,
        "vm-exists",
    );
    let other: VmId = "other".parse().unwrap();
    // As Cloud Hypervisor has it.
    let on_demand = spec::RestoreConfig {
        memory_restore_mode: spec::MemoryRestoreMode::OnDemand,
        prefault: true,
        ..from(&dir, true)
    };
    refused(
        client.vms_restore(&other, &on_demand).await,
        501,
        "not-supported",
    );
    let empty = service.path("empty");
    fs::create_dir(&empty).unwrap();
    let result = client.vms_restore(&other, &from(&empty, true)).await;
    refused(result, 422, "snapshot-unreadable");
    // The serial port's socket belongs to the guest that lives.
    let taken = restore(&service, &other, &dir, true).await;
    let why = taken.error.unwrap();
    assert!(
        why.code == "console-unusable" || why.detail.contains("socket"),
        "{why:?}"
    );
    let memory = dir.join("memory.bin");
    let mut content = fs::read(&memory).unwrap();
    let byte = content.iter().position(|byte| *byte != 0).unwrap();
    content[byte] ^= 1;
    fs::write(&memory, content).unwrap();
    client.vms_resume(&vm).await.unwrap();
    dirtier::check(&port).await.unwrap();
    client.vms_delete(&vm).await.unwrap();
    // Of a host whose CPUs have features that no CPU has.
    let foreign = service.path("foreign");
    copy_with_features(&dir, &foreign);
    let unlike = restore(&service, &other, &foreign, true).await;
    let why = unlike.error.unwrap();
    assert_eq!(why.code, "cpu-lacks-features", "{why:?}");
    assert!(client.vms_list().await.unwrap().is_empty());
    let damaged = restore(&service, &other, &dir, true).await;
    assert_eq!(damaged.error.unwrap().code, "snapshot-damaged");
    assert!(client.vms_list().await.unwrap().is_empty());
}

/// Copies a snapshot, whose vCPUs get every feature of CPUID's leaf 1. The copy is no damaged one.
fn copy_with_features(from: &Path, to: &Path) {
    use serde_json::{Value, json};
    fs::create_dir(to).unwrap();
    for file in fs::read_dir(from).unwrap() {
        let file = file.unwrap();
        fs::copy(file.path(), to.join(file.file_name())).unwrap();
    }
    let read = |name| -> Value {
        let text = fs::read(to.join(name)).unwrap();
        serde_json::from_slice(&text).unwrap()
    };
    let (mut machine, mut manifest) = (read("machine.json"), read("manifest.json"));
    for row in machine["cpuid"].as_array_mut().unwrap() {
        if row[0] == 1 {
            (row[5], row[6]) = (u32::MAX.into(), u32::MAX.into());
        }
    }
    let machine = serde_json::to_vec(&machine).unwrap();
    let hash = xxhash_rust::xxh3::xxh3_64(&machine);
    manifest["machine"] = json!({ "size": machine.len(), "hash": hash });
    fs::write(to.join("machine.json"), machine).unwrap();
    let manifest = serde_json::to_vec(&manifest).unwrap();
    fs::write(to.join("manifest.json"), manifest).unwrap();
}

/// A guest that writes 50,000 pages a second is saved while it runs, and comes back from each of its
/// snapshots as it was at that moment.
#[tokio::test]
async fn running_guest_is_saved_and_comes_back() {
    let (a, b) = tokio::join!(Service::start(Face::Many), Service::start(Face::Many));
    let (a, b) = (a.unwrap(), b.unwrap());
    let booted = dirtier::boot_writing(&a, Some(256 << 20), 64, 50_000).await;
    let (vm, port) = booted.unwrap();
    let dirs: Vec<_> = (0..3).map(|i| a.path(format!("live-{i}"))).collect();
    for dir in &dirs {
        let taken = snapshot(&a, &vm, dir).await;
        assert_eq!(taken.phase, MigrationPhase::Completed, "{taken:?}");
        let downtime = taken.downtime.unwrap();
        // How many pages the guest waits for depends on how busy this host is.
        assert!(downtime.total_us > 0, "{downtime:?}");
        let info = a.client().vms_info(&vm).await.unwrap();
        assert_eq!(info.state, VmState::Running);
        dirtier::check(&port).await.unwrap();
    }
    a.client().vms_delete(&vm).await.unwrap();
    for dir in &dirs {
        let came = restore(&b, &vm, dir, true).await;
        assert_eq!(came.phase, MigrationPhase::Completed, "{came:?}");
        dirtier::check(&port).await.unwrap();
        b.client().vms_delete(&vm).await.unwrap();
    }
}

/// The pages of a guest's VM generation ID and VMClock: the GUID, disruption marker, generation counter.
fn generation(dir: &Path) -> ([u8; 16], u64, u64) {
    let memory = fs::File::open(dir.join("memory.bin")).unwrap();
    let mut id = [0; 16];
    memory.read_exact_at(&mut id, 0xd_e000).unwrap();
    let field = |at: u64| {
        let mut bytes = [0; 8];
        memory.read_exact_at(&mut bytes, 0xd_f000 + at).unwrap();
        u64::from_le_bytes(bytes)
    };
    (id, field(16), field(104))
}

/// Two guests of one snapshot are told that they are copies, and have identities of their own. A guest
/// that was only saved keeps its own.
#[tokio::test]
async fn restored_guests_get_a_new_generation() {
    let service = Service::start(Face::Many).await.unwrap();
    let client = service.client();
    let (vm, _) = dirtier::boot(&service).await.unwrap();
    let (first, again) = (service.path("first"), service.path("again"));
    snapshot(&service, &vm, &first).await;
    snapshot(&service, &vm, &again).await;
    let (id, disruptions, generations) = generation(&first);
    assert_ne!(id, [0; 16]);
    assert_eq!(generation(&again), (id, disruptions, generations));
    client.vms_delete(&vm).await.unwrap();
    let mut ids = vec![id];
    for resume in [true, false] {
        restore(&service, &vm, &first, resume).await;
        let dir = service.path(format!("restored-{resume}"));
        snapshot(&service, &vm, &dir).await;
        let (id, disrupted, generation) = generation(&dir);
        assert_eq!((disrupted, generation), (disruptions + 1, generations + 1));
        assert!(!ids.contains(&id), "{id:?} is not new");
        ids.push(id);
        client.vms_delete(&vm).await.unwrap();
    }
}

/// Five increments on a snapshot, all of a guest that runs and writes: each holds what is different, and the
/// last restores the guest as it was then, also when the folders were moved together or merged.
#[tokio::test]
async fn chain_of_five_increments_is_restored() {
    let service = Service::start(Face::Many).await.unwrap();
    let client = service.client();
    let (vm, port) = dirtier::boot(&service).await.unwrap();
    let parent = service.path("chain");
    fs::create_dir(&parent).unwrap();
    snapshot(&service, &vm, &parent.join("0")).await;
    for i in 1..=5 {
        dirtier::check(&port).await.unwrap();
        let what = VmSnapshotConfig {
            base_url: Some(format!(
                "file://{}",
                parent.join(format!("{}", i - 1)).display()
            )),
            ..to(&parent.join(format!("{i}")))
        };
        let begun = client.vms_snapshot(&vm, &what).await.unwrap();
        let taken = over(&service, &begun).await;
        assert_eq!(taken.phase, MigrationPhase::Completed, "{taken:?}");
        // The guest has written some pages, and not its kernel.
        let content = taken.memory_bytes / 4096 - taken.zero_pages;
        assert!(taken.pages > 0 && taken.pages < content, "{taken:?}");
    }
    client.vms_delete(&vm).await.unwrap();
    let moved = service.path("moved");
    fs::rename(&parent, &moved).unwrap();
    for (increment, mode) in [
        ("5", spec::MemoryRestoreMode::Copy),
        ("5", spec::MemoryRestoreMode::OnDemand),
        ("3", spec::MemoryRestoreMode::Copy),
    ] {
        let what = spec::RestoreConfig {
            memory_restore_mode: mode,
            verify: true,
            ..from(&moved.join(increment), true)
        };
        let begun = client.vms_restore(&vm, &what).await.unwrap();
        let came = over(&service, &begun).await;
        assert_eq!(came.phase, MigrationPhase::Completed, "{mode:?}: {came:?}");
        dirtier::check(&port).await.unwrap();
        client.vms_delete(&vm).await.unwrap();
    }

    // Merged, it needs none of them, and can be mapped.
    let (top, whole) = (moved.join("5"), service.path("whole"));
    let merge = |from: &Path| {
        let mut command = Command::new(built("wh-remote").unwrap());
        command.arg("--api-socket").arg(service.socket());
        command.args(["snapshot", "merge"]).arg(from).arg(&whole);
        command.output().unwrap()
    };
    let refused = merge(&service.path("nothing"));
    let why = String::from_utf8_lossy(&refused.stderr);
    assert!(
        !refused.status.success() && why.contains("snapshot-unreadable"),
        "{why}"
    );
    let merged = merge(&top);
    assert!(merged.status.success(), "{merged:?}");
    let twice = merge(&top);
    let why = String::from_utf8_lossy(&twice.stderr);
    assert!(
        !twice.status.success() && why.contains("snapshot-exists"),
        "{why}"
    );
    fs::remove_dir_all(&moved).unwrap();
    let what = spec::RestoreConfig {
        memory_restore_mode: spec::MemoryRestoreMode::Map,
        verify: true,
        ..from(&whole, true)
    };
    let begun = client.vms_restore(&vm, &what).await.unwrap();
    let came = over(&service, &begun).await;
    assert_eq!(came.phase, MigrationPhase::Completed, "{came:?}");
    dirtier::check(&port).await.unwrap();
}

/// The storage is full when a part of the memory is written: nothing is left there, and the VM is as before.
#[tokio::test]
async fn full_disk_leaves_the_vm_and_no_file() {
    // The service alone sees the small file system. The wrapper becomes the service.
    let mount = "mount -t tmpfs -o size=1m snapshots /srv && exec \"$@\"";
    let wrapper = ["unshare", "--mount", "sh", "-c", mount, "sh"];
    let service = Service::start_with(&wrapper, &[]).await.unwrap();
    let client = service.client();
    let booted = dirtier::boot_writing(&service, Some(64 << 20), 16, 50_000).await;
    let (vm, port) = booted.unwrap();
    let seen = format!("/proc/{}/root/srv", service.pid());
    for is_paused in [false, true] {
        if is_paused {
            client.vms_pause(&vm).await.unwrap();
        }
        let failed = snapshot(&service, &vm, Path::new("/srv/full")).await;
        assert_eq!(failed.phase, MigrationPhase::Failed, "{failed:?}");
        assert_eq!(failed.error.unwrap().code, "no-space");
        assert!(failed.pages > 0, "a part was written");
        assert_eq!(fs::read_dir(&seen).unwrap().count(), 0, "nothing is left");
        if is_paused {
            client.vms_resume(&vm).await.unwrap();
        }
        dirtier::check(&port).await.unwrap();
    }
    // With room it works.
    let taken = snapshot(&service, &vm, &service.path("room")).await;
    assert_eq!(taken.phase, MigrationPhase::Completed, "{taken:?}");
}
