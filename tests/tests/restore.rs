//! VMs made from snapshots: how they get their memory, what of them may differ, and forks.

#![allow(clippy::unwrap_used, reason = "tests")]

use std::fs::{self, OpenOptions};
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use guest::Line;
use spec::{MemoryRestoreMode, MigrationPhase, RestoreConfig, VmId, VmInfo, VmState};
use tests::snapshots::{from, over, refused, snapshot};
use tests::{Face, Service, dirtier, vsock_ask, vsock_ask_again};
use tokio::io::AsyncBufReadExt as _;
use tokio::net::UnixListener;

const PATIENCE: Duration = Duration::from_secs(60);

const MODES: [MemoryRestoreMode; 3] = [
    MemoryRestoreMode::Copy,
    MemoryRestoreMode::OnDemand,
    MemoryRestoreMode::Map,
];

fn with(dir: &Path, mode: MemoryRestoreMode) -> RestoreConfig {
    RestoreConfig {
        memory_restore_mode: mode,
        ..from(dir, true)
    }
}

/// Restores, and waits until no page is missing.
async fn restored(at: &Service, vm: &VmId, what: &RestoreConfig) -> spec::MigrationInfo {
    let begun = at.client().vms_restore(vm, what).await.unwrap();
    over(at, &begun).await
}

/// A snapshot of a guest that writes, which is gone.
async fn example(at: &Service, memory: Option<u64>) -> (VmId, PathBuf, PathBuf) {
    let (vm, port) = dirtier::boot_with(at, memory).await.unwrap();
    at.client().vms_pause(&vm).await.unwrap();
    let dir = at.path("example");
    let taken = snapshot(at, &vm, &dir).await;
    assert_eq!(taken.phase, MigrationPhase::Completed, "{taken:?}");
    at.client().vms_delete(&vm).await.unwrap();
    (vm, port, dir)
}

/// Waits until the VM is off.
async fn off(at: &Service, vm: &VmId) -> VmInfo {
    at.reaches(vm, VmState::Shutdown).await.unwrap()
}

/// In each mode the guest finds its memory, can be saved again, moves on, and boots anew.
#[tokio::test]
async fn guest_comes_back_in_each_mode() {
    let (a, b) = tokio::join!(Service::start(Face::Many), Service::start(Face::Many));
    let (a, b) = (a.unwrap(), b.unwrap());
    let (vm, port, dir) = example(&a, None).await;
    for mode in MODES {
        for (prefault, verify) in [(false, false), (true, true)] {
            let what = RestoreConfig {
                prefault: prefault && mode != MemoryRestoreMode::OnDemand,
                verify,
                ..with(&dir, mode)
            };
            let came = restored(&a, &vm, &what).await;
            assert_eq!(came.phase, MigrationPhase::Completed, "{what:?}: {came:?}");
            dirtier::check(&port).await.unwrap();
            a.client().vms_pause(&vm).await.unwrap();
            let second = a.path(format!("second-{mode:?}-{verify}"));
            let again = snapshot(&a, &vm, &second).await;
            assert_eq!(
                again.phase,
                MigrationPhase::Completed,
                "{what:?}: {again:?}"
            );
            a.client().vms_resume(&vm).await.unwrap();

            let wait = tests::await_anyone(format!("unix:{}", b.path("in").display()));
            let coming = b.client().migrations_receive(&wait).await.unwrap();
            let to = spec::StartMigration::to(coming.endpoint.clone());
            let going = a.client().vms_migrate(&vm, &to).await.unwrap();
            assert_eq!(over(&b, &coming).await.phase, MigrationPhase::Completed);
            over(&a, &going).await;
            dirtier::check(&port).await.unwrap();
            b.client().vms_delete(&vm).await.unwrap();

            restored(&a, &vm, &with(&second, mode)).await;
            dirtier::check(&port).await.unwrap();
            a.client().vms_reboot(&vm).await.unwrap();
            dirtier::check(&port).await.unwrap();
            a.client().vms_delete(&vm).await.unwrap();
        }
    }
}

#[tokio::test]
async fn one_vm_a_socket_restores_on_demand() {
    let service = Service::start(Face::One).await.unwrap();
    let (_, port) = dirtier::boot(&service).await.unwrap();
    let client = service.client();
    client.vm_pause().await.unwrap();
    let dir = service.path("snapshot");
    client
        .vm_snapshot(&tests::snapshots::to(&dir))
        .await
        .unwrap();
    for mode in MODES {
        client.vm_delete().await.unwrap();
        client.vm_restore(&with(&dir, mode)).await.unwrap();
        assert_eq!(client.vm_info().await.unwrap().state, VmState::Running);
        dirtier::check(&port).await.unwrap();
    }
}

/// A VM whose pages still come is not stopped: devices may wait for pages. It can be ended.
#[tokio::test]
async fn guest_on_demand_is_paused_when_its_pages_are_there() {
    let service = Service::start(Face::Many).await.unwrap();
    let (vm, port, dir) = example(&service, Some(512 << 20)).await;
    let client = service.client();
    let what = with(&dir, MemoryRestoreMode::OnDemand);
    let begun = client.vms_restore(&vm, &what).await.unwrap();
    let id: VmId = begun.id.parse().unwrap();
    let runs =
        |info: &spec::MigrationInfo| info.phase.is_over() || info.phase == MigrationPhase::Postcopy;
    service.until(&id, PATIENCE, runs).await.unwrap();
    let dirs = service.path("too-early");
    let to = spec::StartMigration::to("unix:/nowhere");
    let early = [
        client.vms_pause(&vm).await.err(),
        client.vms_migrate(&vm, &to).await.err(),
    ];
    // On a fast host the pages may be there by now.
    for error in early.into_iter().flatten() {
        refused::<()>(Err(error), 409, "pages-arriving");
    }
    let came = over(&service, &begun).await;
    assert_eq!(
        (came.phase, came.remaining_pages),
        (MigrationPhase::Completed, 0)
    );
    assert!(came.faults > 0, "the guest waited for none: {came:?}");
    if client.vms_info(&vm).await.unwrap().state == VmState::Running {
        client.vms_pause(&vm).await.unwrap();
    }
    let again = snapshot(&service, &vm, &dirs).await;
    assert_eq!(again.phase, MigrationPhase::Completed, "{again:?}");
    client.vms_resume(&vm).await.unwrap();
    dirtier::check(&port).await.unwrap();
    client.vms_delete(&vm).await.unwrap();

    // Ended, and booted anew, while pages come.
    for end in ["delete", "reboot", "shutdown"] {
        let begun = client.vms_restore(&vm, &what).await.unwrap();
        let id: VmId = begun.id.parse().unwrap();
        service.until(&id, PATIENCE, runs).await.unwrap();
        match end {
            "delete" => client.vms_delete(&vm).await.unwrap(),
            "shutdown" => client.vms_shutdown(&vm).await.unwrap(),
            _ => client.vms_reboot(&vm).await.unwrap(),
        }
        let ended = over(&service, &begun).await;
        assert_eq!(ended.phase, MigrationPhase::Completed, "{end}: {ended:?}");
        if end == "reboot" {
            dirtier::check(&port).await.unwrap();
        }
        if end != "delete" {
            client.vms_delete(&vm).await.unwrap();
        }
    }
}

/// A page that is not what it was ends the VM, which says why; the service and its other VMs stay.
#[tokio::test]
async fn damaged_page_ends_the_vm_with_its_reason() {
    let service = Service::start(Face::Many).await.unwrap();
    let (vm, _, dir) = example(&service, None).await;
    let memory = dir.join("memory.bin");
    let content = fs::read(&memory).unwrap();
    let last = content.iter().rposition(|byte| *byte != 0).unwrap();
    let file = OpenOptions::new().write(true).open(&memory).unwrap();
    file.write_all_at(&[content[last] ^ 1], last as u64)
        .unwrap();
    let came = restored(&service, &vm, &with(&dir, MemoryRestoreMode::OnDemand)).await;
    assert_eq!(came.phase, MigrationPhase::Failed);
    let why = came.error.unwrap();
    assert_eq!(why.code, "snapshot-damaged");
    // Unless loading it needed the page, there is a VM, which shows the same.
    let info = off(&service, &vm).await;
    let failure = info.failure.unwrap();
    assert_eq!((failure.code, failure.detail), (why.code, why.detail));
    service.client().vms_delete(&vm).await.unwrap();

    let verified = RestoreConfig {
        verify: true,
        ..with(&dir, MemoryRestoreMode::Map)
    };
    let came = restored(&service, &vm, &verified).await;
    assert_eq!(came.error.unwrap().code, "snapshot-damaged");
    assert!(service.client().vms_list().await.unwrap().is_empty());
}

/// A mapped file that shrinks takes pages away from the guest, which ends; the service does not.
#[tokio::test]
async fn file_that_shrinks_ends_the_vm() {
    let service = Service::start(Face::Many).await.unwrap();
    let (vm, _, dir) = example(&service, None).await;
    let came = restored(&service, &vm, &with(&dir, MemoryRestoreMode::Map)).await;
    assert_eq!(came.phase, MigrationPhase::Completed, "{came:?}");
    let file = OpenOptions::new().write(true).open(dir.join("memory.bin"));
    file.unwrap().set_len(4096).unwrap();
    let info = off(&service, &vm).await;
    assert_eq!(info.failure.unwrap().code, "memory-lost");
    service.client().vms_delete(&vm).await.unwrap();
    dirtier::boot(&service).await.unwrap();
}

/// A working set is recorded until the guest is ready, and later restores bring it first; canceled and
/// abandoned recordings leave no record.
#[tokio::test]
async fn working_set_is_recorded_and_brought_first() {
    let service = Service::start(Face::Many).await.unwrap();
    let (vm, port, dir) = example(&service, None).await;
    let client = service.client();
    let record = dir.join("working-set.json");
    let what = spec::RecordWorkingSet {
        source_url: format!("file://{}", dir.display()),
        limit_s: 600,
        overrides: None,
    };
    let too_long = spec::RecordWorkingSet {
        limit_s: 3601,
        ..what.clone()
    };
    let refusal = client.vms_record(&vm, &too_long).await;
    refused(refusal, 422, "invalid-configuration");
    refused(client.vms_stop_recording(&vm).await, 404, "no-such-vm");
    for end in ["cancel", "delete", "stop"] {
        let begun = client.vms_record(&vm, &what).await.unwrap();
        let id: VmId = begun.id.parse().unwrap();
        let runs = |info: &spec::MigrationInfo| info.phase == MigrationPhase::Postcopy;
        service.until(&id, PATIENCE, runs).await.unwrap();
        // The guest runs, on pages that come as it touches them.
        dirtier::check(&port).await.unwrap();
        match end {
            "cancel" => client.migrations_cancel(&id).await.unwrap(),
            "delete" => client.vms_delete(&vm).await.unwrap(),
            _ => client.vms_stop_recording(&vm).await.unwrap(),
        }
        let ended = over(&service, &begun).await;
        match end {
            "cancel" => assert_eq!(ended.phase, MigrationPhase::Canceled, "{ended:?}"),
            "delete" => assert_eq!(ended.error.unwrap().code, "recording-ended"),
            _ => assert_eq!(ended.phase, MigrationPhase::Completed, "{ended:?}"),
        }
        assert_eq!(record.exists(), end == "stop", "{end}");
        if end != "delete" {
            // It has all of its memory, and is a VM as any other.
            refused(client.vms_stop_recording(&vm).await, 409, "not-recording");
            dirtier::check(&port).await.unwrap();
            client.vms_delete(&vm).await.unwrap();
        }
    }
    let content: serde_json::Value = serde_json::from_slice(&fs::read(&record).unwrap()).unwrap();
    let pages = content["pages"].as_u64();
    assert!(pages > Some(0), "{content}");
    for mode in [MemoryRestoreMode::OnDemand, MemoryRestoreMode::Map] {
        let came = restored(&service, &vm, &with(&dir, mode)).await;
        assert_eq!(came.phase, MigrationPhase::Completed, "{came:?}");
        assert_eq!(came.working_set_pages, pages);
        assert!(came.working_set_us.is_some() && came.first_instruction_us.is_some());
        dirtier::check(&port).await.unwrap();
        client.vms_delete(&vm).await.unwrap();
    }
}

/// Overrides under which VMs of the dirtying guest can run beside each other: each has its own socket.
fn apart(at: &Service) -> (spec::Overrides, impl Fn(usize) -> PathBuf) {
    let dir = at.path("ports");
    fs::create_dir_all(&dir).unwrap();
    let socket = format!("{}/{{n}}.sock", dir.display());
    let overrides = serde_json::json!({ "serial": { "mode": "Socket", "socket": socket } });
    let overrides = serde_json::from_value(overrides).unwrap();
    (overrides, move |n| dir.join(format!("{n}.sock")))
}

/// Several VMs of one snapshot run beside each other.
#[tokio::test]
async fn vms_of_one_snapshot_run_beside_each_other() {
    let service = Service::start(Face::Many).await.unwrap();
    let (vm, port, dir) = example(&service, None).await;
    let client = service.client();
    let (overrides, socket) = apart(&service);
    for mode in [MemoryRestoreMode::Copy, MemoryRestoreMode::Map] {
        restored(&service, &vm, &with(&dir, mode)).await;
        let several = RestoreConfig {
            count: Some(3),
            overrides: Some(overrides.clone()),
            ..with(&dir, mode)
        };
        let made = restored(&service, &vm, &several).await;
        assert_eq!(made.phase, MigrationPhase::Completed, "{mode:?}: {made:?}");
        dirtier::check(&port).await.unwrap();
        for n in 1..=3 {
            dirtier::check(&socket(n)).await.unwrap();
        }
        let all = client.vms_list().await.unwrap();
        let names: Vec<_> = all.iter().map(|vm| vm.id.as_str()).collect();
        assert_eq!(names, ["guest", "guest-1", "guest-2", "guest-3"]);
        for vm in all {
            let socket = vm.api_socket.unwrap();
            assert!(Path::new(&socket).exists(), "{socket}");
            client.vms_delete(&vm.id).await.unwrap();
        }
    }
}

#[tokio::test]
async fn forks_begin_where_their_vm_is_paused() {
    const FORKS: u32 = 20;
    let service = Service::start(Face::Many).await.unwrap();
    let (vm, port) = dirtier::boot(&service).await.unwrap();
    let client = service.client();
    let (overrides, socket) = apart(&service);
    let mut what = spec::ForkVm {
        count: FORKS,
        name: Some("fork".parse().unwrap()),
        resume: true,
        overrides,
        ..spec::ForkVm::default()
    };
    client.vms_pause(&vm).await.unwrap();
    let begun = client.vms_fork(&vm, &what).await.unwrap();
    let made = over(&service, &begun).await;
    assert_eq!(made.phase, MigrationPhase::Completed, "{made:?}");
    assert_eq!(client.vms_list().await.unwrap().len(), FORKS as usize + 1);
    // The VM continues beside its forks, and they go on without it.
    client.vms_resume(&vm).await.unwrap();
    dirtier::check(&port).await.unwrap();
    client.vms_delete(&vm).await.unwrap();
    for n in 1..=FORKS {
        dirtier::check(&socket(n as usize)).await.unwrap();
    }

    // A fork of a fork, under its own name. The first keeps its socket.
    let fork: VmId = "fork-7".parse().unwrap();
    client.vms_pause(&fork).await.unwrap();
    refused(client.vms_fork(&fork, &what).await, 409, "vm-exists");
    what.name = None;
    what.count = 1;
    let text = serde_json::json!({ "mode": "Socket", "socket": service.path("again{n}") });
    what.overrides.serial = serde_json::from_value(text).unwrap();
    let begun = client.vms_fork(&fork, &what).await.unwrap();
    let made = over(&service, &begun).await;
    assert_eq!(made.vm.map(String::from).as_deref(), Some("fork-7-1"));
    dirtier::check(&service.path("again1")).await.unwrap();
}

/// Twenty forks have a MAC address, a tap, a CID and a vsock socket each: the host connects into each of them,
/// and each to the host. An event ends the connections that were open in the VM that is forked.
#[tokio::test]
async fn forks_have_their_own_network_and_vsock() {
    const FORKS: usize = 20;
    const PORT: u32 = guest::Workload::VSOCK_PORT;
    let service = Service::start(Face::Many).await.unwrap();
    let client = service.client();
    let answering = guest::Options {
        workload: guest::Workload::Vsock,
        ..guest::Options::default()
    };
    let (mut config, serial) = service.pocket("guest", answering).unwrap();
    let dir = service.path("vsock");
    fs::create_dir(&dir).unwrap();
    let tap = format!("wf{:x}n", std::process::id());
    let mac = "02:00:00:00:00:ff";
    let net = serde_json::json!([{ "id": "net", "tap": format!("{tap}0"), "mac": mac }]);
    config.net = serde_json::from_value(net).unwrap();
    let vsock = serde_json::json!({ "cid": 3, "socket": dir.join("0") });
    config.vsock = serde_json::from_value(vsock).unwrap();
    let vm = service.create("guest", config).await.unwrap();
    // The host's end of a guest's connections to the port: guest 0 is the one that is forked.
    let listen = |n: usize| UnixListener::bind(dir.join(format!("{n}_{PORT}"))).unwrap();
    let hosts: Vec<_> = (0..=FORKS).map(listen).collect();
    client.vms_boot(&vm).await.unwrap();
    serial.wait_for("ready", 1, PATIENCE).await.unwrap();
    // Returns the connection that guest `n` made, and the identity that the guest sent on it.
    let called = async |n: usize| {
        let connection = tokio::time::timeout(PATIENCE, hosts[n].accept()).await;
        let connection = connection.unwrap_or_else(|_| unreachable!("VM {n} does not connect"));
        let mut reader = tokio::io::BufReader::new(connection.unwrap().0);
        let mut line = String::new();
        let read = tokio::time::timeout(PATIENCE, reader.read_line(&mut line)).await;
        read.unwrap().unwrap();
        (reader, Line::parse(&line))
    };
    let asked = async |n: usize| {
        let answer = vsock_ask(&dir.join(format!("{n}")), PORT).await;
        let (connection, line) = answer.unwrap();
        (connection, Line::parse(&line))
    };
    let is = |cid, mac, connections, (resets, lost)| {
        let mac = guest::Address(mac);
        Some(Line::Vsock {
            cid,
            mac,
            connections,
            resets,
            lost,
        })
    };
    let (_outgoing, who) = called(0).await;
    assert_eq!(who, is(3, 0x0200_0000_00ff, 1, (0, 0)));
    let (incoming, who) = asked(0).await;
    assert_eq!(who, is(3, 0x0200_0000_00ff, 2, (0, 0)));
    client.vms_pause(&vm).await.unwrap();
    let overrides = serde_json::json!({
        "net": [{ "id": "net", "tap": format!("{tap}{{n}}"), "mac": "02:00:00:00:01:00" }],
        "vsock": { "cid": 100, "socket": dir.join("{n}") },
        "serial": { "mode": "File", "file": service.path("serial-{n}") },
    });
    let what = spec::ForkVm {
        count: FORKS as u32,
        resume: true,
        overrides: serde_json::from_value(overrides).unwrap(),
        ..spec::ForkVm::default()
    };
    fs::write(service.path("serial-1"), "of before\n").unwrap();
    let made = over(&service, &client.vms_fork(&vm, &what).await.unwrap()).await;
    assert_eq!(made.phase, MigrationPhase::Completed, "{made:?}");
    let serial = fs::read_to_string(service.path("serial-1")).unwrap();
    assert!(serial.starts_with("of before\n"), "{serial}");
    for n in 1..=FORKS {
        let (cid, mac) = (99 + n as u64, 0x0200_0000_0100 + n as u64 - 1);
        // Both connections of the VM are gone, by one event.
        let (_outgoing, who) = called(n).await;
        assert_eq!(who, is(cid, mac, 1, (1, 2)), "fork {n}");
        let (_incoming, who) = asked(n).await;
        assert_eq!(who, is(cid, mac, 2, (1, 2)), "fork {n}");
        let fork: VmId = format!("guest-{n}").parse().unwrap();
        let config = client.vms_info(&fork).await.unwrap().config;
        let (net, vsock) = (config.net.unwrap(), config.vsock.unwrap());
        assert_eq!(vsock.cid, cid);
        let mac = net[0].mac.as_ref().map(ToString::to_string);
        assert_eq!(mac, Some(format!("02:00:00:00:01:{:02x}", n - 1)));
        let name = format!("{tap}{n}");
        assert_eq!(net[0].tap.as_deref(), Some(name.as_str()));
        assert!(Path::new("/sys/class/net").join(name).exists());
    }
    // A tap that another VM has is not taken from it.
    let mut taken = what.overrides.clone();
    let other = serde_json::json!({ "cid": 200, "socket": dir.join("other") });
    taken.vsock = serde_json::from_value(other).unwrap();
    let other = serde_json::json!({ "mode": "Off" });
    taken.serial = serde_json::from_value(other).unwrap();
    let again = spec::ForkVm {
        count: 1,
        name: Some("again".parse().unwrap()),
        overrides: taken,
        ..spec::ForkVm::default()
    };
    let refused = client.vms_fork(&vm, &again).await.unwrap_err().to_string();
    let why = format!("the tap {tap}1, which the VM guest-1 has as `net.0.tap`");
    assert!(refused.contains(&why), "{refused}");
    // Only the host knows that this is not a tap.
    let mut again = again;
    again.overrides.net[0].tap = Some("lo".to_owned());
    let failed = over(&service, &client.vms_fork(&vm, &again).await.unwrap()).await;
    let why = failed.error.unwrap();
    assert_eq!(why.code, "tap-unusable", "{why:?}");
    assert_eq!(client.vms_list().await.unwrap().len(), FORKS + 1);
    // The VM has lost none of its connections.
    client.vms_resume(&vm).await.unwrap();
    let answer = tokio::task::spawn_blocking(move || vsock_ask_again(&incoming)).await;
    let who = Line::parse(&answer.unwrap().unwrap());
    assert_eq!(who, is(3, 0x0200_0000_00ff, 2, (0, 0)));
}

/// A running VM is forked without a pause, and goes on; its forks begin at one moment of it.
#[tokio::test]
async fn running_vm_is_forked_and_goes_on() {
    const FORKS: u32 = 3;
    let service = Service::start(Face::Many).await.unwrap();
    let client = service.client();
    let booted = dirtier::boot_writing(&service, Some(256 << 20), 64, 50_000).await;
    let (vm, port) = booted.unwrap();
    let (overrides, socket) = apart(&service);
    let what = spec::ForkVm {
        count: FORKS,
        resume: true,
        overrides,
        ..spec::ForkVm::default()
    };
    for _ in 0..2 {
        let begun = client.vms_fork(&vm, &what).await.unwrap();
        let made = over(&service, &begun).await;
        assert_eq!(made.phase, MigrationPhase::Completed, "{made:?}");
        // How many pages the guest waits for depends on how busy this host is.
        assert!(made.downtime.unwrap().total_us > 0, "{made:?}");
        let info = client.vms_info(&vm).await.unwrap();
        assert_eq!(info.state, VmState::Running);
        dirtier::check(&port).await.unwrap();
        for n in 1..=FORKS {
            dirtier::check(&socket(n as usize)).await.unwrap();
            let fork: VmId = format!("guest-{n}").parse().unwrap();
            client.vms_delete(&fork).await.unwrap();
        }
    }
    dirtier::check(&port).await.unwrap();
}

/// No image holds what the forks of a running VM left on a disk that the VM goes on writing to.
#[tokio::test]
async fn running_vm_with_a_writable_disk_is_not_forked() {
    let service = Service::start(Face::Many).await.unwrap();
    let client = service.client();
    let (mut config, serial) = service.pocket("guest", guest::Options::default()).unwrap();
    let image = service.path("image");
    fs::File::create(&image).unwrap().set_len(1 << 20).unwrap();
    let disk = serde_json::json!([{ "path": image, "image_type": "Raw" }]);
    config.disks = serde_json::from_value(disk).unwrap();
    let vm = service.create("guest", config).await.unwrap();
    client.vms_boot(&vm).await.unwrap();
    serial.wait_for("ready", 1, PATIENCE).await.unwrap();
    let what = spec::ForkVm::default();
    refused(client.vms_fork(&vm, &what).await, 409, "disk-written");
    // It can be tried again: nothing of the first attempt is left.
    refused(client.vms_fork(&vm, &what).await, 409, "disk-written");
    let info = client.vms_info(&vm).await.unwrap();
    assert_eq!(info.state, VmState::Running);
}

/// If one VM cannot be made, none is left, and the VM that is forked is as before.
#[tokio::test]
async fn forks_are_made_all_or_none() {
    let service = Service::start(Face::Many).await.unwrap();
    let (vm, port) = dirtier::boot(&service).await.unwrap();
    let client = service.client();
    client.vms_pause(&vm).await.unwrap();
    let (overrides, socket) = apart(&service);
    let what = spec::ForkVm {
        count: 4,
        overrides,
        ..spec::ForkVm::default()
    };
    // Somebody listens where the third is to have its port.
    let taken = std::os::unix::net::UnixListener::bind(socket(3)).unwrap();
    let why = client.vms_fork(&vm, &what).await.unwrap_err().to_string();
    assert!(
        why.contains("VM guest-3: the serial port's socket"),
        "{why}"
    );
    assert_eq!(client.vms_list().await.unwrap().len(), 1);
    assert!(!socket(1).exists(), "nothing is left of the first");

    // Of the VM's own port there is one.
    let same = spec::ForkVm::default();
    refused(client.vms_fork(&vm, &same).await, 422, "file-in-use");
    for (count, code) in [
        (0, "invalid-configuration"),
        (1025, "invalid-configuration"),
    ] {
        let what = spec::ForkVm {
            count,
            ..what.clone()
        };
        refused(client.vms_fork(&vm, &what).await, 422, code);
    }
    let disks = r#"{"overrides":{"disks":[{"id":"none","path":"/x"}]}}"#;
    let what_else: spec::ForkVm = serde_json::from_str(disks).unwrap();
    refused(
        client.vms_fork(&vm, &what_else).await,
        422,
        "invalid-configuration",
    );
    drop(taken);
    fs::remove_file(socket(3)).unwrap();
    let begun = client.vms_fork(&vm, &what).await.unwrap();
    assert_eq!(
        over(&service, &begun).await.phase,
        MigrationPhase::Completed
    );
    client.vms_resume(&vm).await.unwrap();
    dirtier::check(&port).await.unwrap();
}
