//! The pocket guest moves between two pools on `/dev/kvm`, while it writes to its memory. It checks
//! every page afterwards, and reports the stop that it saw.

#![expect(clippy::unwrap_used, reason = "a test that goes wrong panics")]

mod stage;

use std::path::Path;
use std::time::{Duration, Instant};

use control::{Registry, Request};
use guest::{Command, Crash, Line, Options, Workload};
use migration::testing::Issuer;
use spec::{AtDeadline, AwaitMigration, MemoryMode, MigrationPhase, StartMigration, VmState};
use vmm::{Pool, PoolConfig};

use stage::{Console, PATIENCE, Stage, assert_phase, over};

#[tokio::test]
async fn guest_moves_with_intact_memory() {
    for (rate, vcpus) in [(100, 1), (20_000, 2)] {
        let stage = Stage::new();
        let mut console = stage.boot(stage.config(rate, vcpus)).await;
        console.gap();
        let [sent, received] = stage.migrate(|_| {}).await;
        assert_eq!(sent.phase, MigrationPhase::Completed, "{sent:?}");
        assert_eq!(received.phase, MigrationPhase::Completed, "{received:?}");
        assert!(stage.here.list().is_empty(), "it is no longer here");
        for side in [&sent, &received] {
            assert_eq!(side.verified_pages, sent.memory_bytes / 4096, "{side:?}");
        }
        let vm = stage.there.get("pocket").unwrap();
        assert_eq!(vm.status().state, VmState::Running);
        let mut console = Console::connect(Path::new(&stage.path("serial")));
        let pages = console.verify();
        assert!(pages > 0);
        let gap = console.gap();
        let downtime = sent.downtime.unwrap();
        println!(
            "{rate} pages/s, {vcpus} vCPUs: {downtime:?}, predicted {:?}; the guest saw {gap} us; {pages} pages are as they were",
            sent.predicted_downtime_us
        );
        // The guest continues, and can be moved back.
        console.until(|line| matches!(line, Line::Heartbeat { .. }).then_some(()));
        vm.ask(Request::Shutdown).await.unwrap();
    }
}

#[tokio::test]
async fn postcopy_moves_pages() {
    for (mode, rate) in [(MemoryMode::Postcopy, 1_000), (MemoryMode::Hybrid, 50_000)] {
        let stage = Stage::new();
        let mut console = stage.boot(stage.config(rate, 2)).await;
        console.gap();
        let [sent, received] = stage
            .migrate(|what| {
                what.mode = mode;
                what.max_downtime_ms = 1;
            })
            .await;
        assert_eq!(sent.phase, MigrationPhase::Completed, "{sent:?}");
        assert_eq!(received.phase, MigrationPhase::Completed, "{received:?}");
        let mut console = Console::connect(Path::new(&stage.path("serial")));
        let pages = console.verify();
        println!(
            "{mode:?}, {rate} pages/s: {:?}; {} faults, {} us, 99 % within {} us; the guest saw {} us; {pages} pages are as they were",
            sent.downtime.unwrap(),
            received.faults,
            received.fault_p50_us,
            received.fault_p99_us,
            console.gap(),
        );
        // In rounds it may all have been sent before.
        assert!(received.faults > 0 || mode == MemoryMode::Hybrid);
    }
}

#[tokio::test]
async fn guest_moves_and_returns() {
    let stage = Stage::new();
    drop(stage.boot(stage.config(2_000, 2)).await);
    let (mut from, mut to) = (&stage.here, &stage.there);
    for turn in 0..6 {
        let waiting = AwaitMigration {
            insecure: true,
            allow: Some(vec![stage.path("")]),
            ..AwaitMigration::at("tcp:127.0.0.1:0")
        };
        let receive = to.receive_migration(&waiting).unwrap();
        let what = StartMigration {
            connections: Some(1 + turn % 3),
            insecure: true,
            ..StartMigration::to(receive.info().endpoint)
        };
        let send = from.send_migration("pocket", &what).unwrap();
        over(&*send).await;
        over(&*receive).await;
        assert_phase(&*send, MigrationPhase::Completed);
        (from, to) = (to, from);
    }
    let mut console = Console::connect(Path::new(&stage.path("serial")));
    assert!(console.verify() > 100);
}

/// A request that ends or replaces the machine cancels its migration, and a guest that does so has it fail;
/// the destination keeps nothing.
#[tokio::test]
async fn reset_ends_migration() {
    type End = (Option<Command>, Option<Request>, Option<VmState>);
    let ends: [End; 5] = [
        (Some(Command::Reset), None, Some(VmState::Running)),
        (Some(Command::PowerOff), None, Some(VmState::Shutdown)),
        (None, Some(Request::Reboot), Some(VmState::Running)),
        (None, Some(Request::Shutdown), Some(VmState::Shutdown)),
        (None, Some(Request::Delete), None),
    ];
    for (command, request, state) in ends {
        let stage = Stage::new();
        let mut console = stage.boot(stage.config(1_000, 1)).await;
        let both = stage.begin(|what| what.max_bandwidth = Some(4 << 20));
        while both[0].info().phase != MigrationPhase::Precopy {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
        let vm = stage.here.get("pocket").unwrap();
        if let Some(command) = command {
            console.send(command);
        }
        if let Some(request) = request.clone() {
            vm.ask(request).await.unwrap();
        }
        for side in &both {
            over(&**side).await;
            let info = side.info();
            // Both sides say so.
            let (phase, code) = match command {
                None => (MigrationPhase::Canceled, "canceled"),
                Some(Command::Reset) => (MigrationPhase::Failed, "guest-reset"),
                Some(_) => (MigrationPhase::Failed, "guest-ended"),
            };
            assert_eq!(info.phase, phase, "{command:?} {request:?} {info:?}");
            assert_eq!(info.error.unwrap().code, code, "{command:?} {request:?}");
        }
        assert!(stage.there.list().is_empty());
        if let Some(state) = state {
            let start = Instant::now();
            while vm.status().state != state {
                assert!(start.elapsed() < PATIENCE, "{command:?} {request:?}");
                tokio::time::sleep(Duration::from_millis(2)).await;
            }
        }
    }
}

/// A migration that cannot begin leaves its VM free.
#[tokio::test]
async fn migration_that_did_not_begin_leaves_no_mark() {
    let mut stage = Stage::new();
    let pool = Pool::start(&PoolConfig::default()).unwrap();
    // There can be no directory below a file.
    let pool = pool.with_journals(stage.dir.path().join("pocket/journals"));
    stage.here = Registry::new(pool);
    drop(stage.boot(stage.config(100, 1)).await);
    let what = StartMigration::to(format!("unix:{}", stage.path("nowhere")));
    for _ in 0..2 {
        let begun = stage.here.send_migration("pocket", &what);
        assert_eq!(begun.map(drop).unwrap_err().code, "journal");
    }
}

/// The failure of a guest names its registers, and where its migration was.
#[tokio::test]
async fn failure_names_registers_and_migration() {
    let stage = Stage::new();
    let mut console = stage.boot(stage.config(1_000, 1)).await;
    let both = stage.begin(|what| what.max_bandwidth = Some(4 << 20));
    while both[0].info().phase != MigrationPhase::Precopy || both[0].info().rounds == 0 {
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
    console.send(Command::Crash(Crash::TripleFault));
    for side in &both {
        over(&**side).await;
    }
    let vm = stage.here.get("pocket").unwrap();
    let failure = vm.status().failure.clone().unwrap();
    assert_eq!(failure.code, "triple-fault");
    for part in [
        "RIP 0x",
        "RSP 0x",
        "CR2 0x",
        "CR3 0x",
        "in phase precopy, round 1",
    ] {
        assert!(failure.detail.contains(part), "{part}: {}", failure.detail);
    }
}

/// A guest whose vCPUs write faster than its memory can be copied is slowed down until it can.
#[tokio::test]
async fn throttling_moves_busy_guest() {
    let stage = Stage::new();
    drop(stage.boot(stage.config(1_000_000, 1)).await);
    let [sent, _] = stage
        .migrate(|what| {
            what.max_bandwidth = Some(64 << 20);
            what.max_downtime_ms = 30;
            what.deadline_s = 1;
            what.at_deadline = Some(AtDeadline::Throttle);
        })
        .await;
    assert_eq!(sent.phase, MigrationPhase::Completed, "{sent:?}");
    assert!(sent.throttle_percent > 0, "{sent:?}");
    let mut console = Console::connect(Path::new(&stage.path("serial")));
    console.verify();
    println!(
        "slowed down by {} %: {:?}",
        sent.throttle_percent,
        sent.downtime.unwrap()
    );
}

/// Memory that is shared is given to another process of the host, and nothing is copied.
#[tokio::test]
async fn local_migration_shares_memory() {
    let stage = Stage::new();
    let mut config = stage.config(2_000, 2);
    config.memory.shared = true;
    drop(stage.boot(config).await);
    let mut what = StartMigration::to("tcp:127.0.0.1:1");
    (what.local, what.insecure) = (true, true);
    let refused = stage.here.send_migration("pocket", &what).err().unwrap();
    assert_eq!(refused.fields[0].pointer, "/local");
    let [sent, _] = stage.migrate(|what| what.local = true).await;
    assert_eq!(sent.phase, MigrationPhase::Completed, "{sent:?}");
    assert_eq!((sent.pages, sent.zero_pages), (0, 0), "{sent:?}");
    let mut console = Console::connect(Path::new(&stage.path("serial")));
    assert!(console.verify() > 0);
    println!(
        "local: {:?}, in {} us",
        sent.downtime.unwrap(),
        sent.elapsed_us
    );
}

#[tokio::test]
async fn guest_moves_over_tls() {
    for mode in [MemoryMode::Precopy, MemoryMode::Postcopy] {
        let stage = Stage::new();
        let issuer = Issuer::new();
        issuer.equip(stage.dir.path(), "127.0.0.1", &issuer);
        drop(stage.boot(stage.config(2_000, 1)).await);
        let tls_dir = Some(stage.dir.path().to_string_lossy().into_owned());
        let mut waiting = AwaitMigration {
            tls_dir: tls_dir.clone(),
            allow: Some(vec![stage.path("")]),
            ..AwaitMigration::at("tcp:127.0.0.1:0")
        };
        // Not every host whose certificate the CA signed.
        let refused = stage.there.receive_migration(&waiting).err().unwrap();
        assert_eq!(refused.fields[0].pointer, "/tls_peers");
        waiting.tls_peers = Some(vec!["127.0.0.1".to_owned()]);
        let receive = stage.there.receive_migration(&waiting).unwrap();
        let mut what = StartMigration {
            mode,
            insecure: true,
            connections: Some(2),
            ..StartMigration::to(receive.info().endpoint)
        };
        // Without, it is not understood, and nothing happens.
        let send = stage.here.send_migration("pocket", &what).unwrap();
        over(&*send).await;
        assert_phase(&*send, MigrationPhase::Failed);
        what.tls_dir = tls_dir;
        let send = stage.here.send_migration("pocket", &what).unwrap();
        over(&*send).await;
        over(&*receive).await;
        assert_phase(&*send, MigrationPhase::Completed);
        let mut console = Console::connect(Path::new(&stage.path("serial")));
        console.verify();
    }
}

/// How many devices the guest has found, and what it has done with those that it drives.
fn driven(console: &mut Console) -> [u64; 3] {
    console.ask(Command::Io, |line| match line {
        Line::Io {
            devices,
            random,
            blocks,
            bad,
            ..
        } => {
            assert_eq!(*bad, 0, "{line}");
            Some([*devices, *random, *blocks])
        }
        _ => None,
    })
}

/// In three PCI segments: the guest drives the entropy device of the second.
#[tokio::test]
async fn maximum_devices_keep_addresses() {
    let stage = Stage::new();
    let mut config = stage.config(1, 1);
    let options = Options {
        workload: Workload::Io,
        heartbeat_ms: Some(20),
        ..Options::default()
    };
    config.payload.cmdline = Some(options.to_string());
    let disk = |i: usize| {
        let path = stage.path(&format!("{i}.raw"));
        std::fs::File::create(&path)
            .unwrap()
            .set_len(1 << 20)
            .unwrap();
        let segment = if i < 5 { 2 } else { 0 };
        let disk = serde_json::json!({ "path": path, "pci_segment": segment });
        serde_json::from_value(disk).unwrap()
    };
    config.platform = Some(serde_json::from_str(r#"{"num_pci_segments":3}"#).unwrap());
    config.disks = Some((0..61).map(disk).collect());
    config.rng.pci_segment = Some(1);
    config.watchdog = true;
    let mut console = stage.boot(config).await;
    let before = driven(&mut console);
    assert_eq!(before[0], 64);
    let places = stage.here.get("pocket").unwrap().status().devices;
    let at = |id: &str| places[id].pci_bdf.as_deref().unwrap();
    assert_eq!(
        [at("_disk4"), at("_disk5"), at("__rng")],
        ["0002:00:05.0", "0000:00:01.0", "0001:00:01.0"]
    );
    let [sent, _] = stage.migrate(|_| {}).await;
    assert_eq!(sent.phase, MigrationPhase::Completed, "{sent:?}");
    let vm = stage.there.get("pocket").unwrap();
    assert_eq!(vm.status().devices, places);
    println!("64 devices: {:?}", sent.downtime.unwrap());
    let mut console = Console::connect(Path::new(&stage.path("serial")));
    let start = Instant::now();
    loop {
        let [_, random, blocks] = driven(&mut console);
        if random > before[1] + 1000 && blocks > before[2] + 10 {
            break;
        }
        assert!(start.elapsed() < PATIENCE, "{random}, {blocks}");
    }
    // And also after a reset.
    vm.ask(Request::Reboot).await.unwrap();
    assert_eq!(vm.status().devices, places);
}

#[tokio::test]
async fn paused_guest_moves_paused() {
    let stage = Stage::new();
    drop(stage.boot(stage.config(1_000, 1)).await);
    stage
        .here
        .get("pocket")
        .unwrap()
        .ask(Request::Pause)
        .await
        .unwrap();
    let [sent, _] = stage.migrate(|_| {}).await;
    assert_eq!(sent.phase, MigrationPhase::Completed, "{sent:?}");
    let vm = stage.there.get("pocket").unwrap();
    assert_eq!(vm.status().state, VmState::Paused);
    vm.ask(Request::Resume).await.unwrap();
    let mut console = Console::connect(Path::new(&stage.path("serial")));
    console.verify();
}

#[tokio::test]
async fn canceled_migration_keeps_guest() {
    let stage = Stage::new();
    let mut console = stage.boot(stage.config(2_000, 1)).await;
    // Slow enough to be called off.
    let both = stage.begin(|what| what.max_bandwidth = Some(2 << 20));
    // Earlier, the destination would not take this source for the one that it waits for.
    while both[0].info().phase != MigrationPhase::Precopy {
        assert!(!both[0].info().phase.is_over(), "{:?}", both[0].info());
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
    let busy = stage
        .here
        .send_migration("pocket", &StartMigration::to("unix:/nowhere"));
    assert_eq!(busy.err().unwrap().code, "vm-migrating");
    let vm = stage.here.get("pocket").unwrap();
    let refused = vm.ask(Request::Resize(spec::VmResize::default())).await;
    assert_eq!(refused.unwrap_err().code, "vm-migrating");
    both[0].cancel().unwrap();
    for side in &both {
        over(&**side).await;
    }
    // The other side got the reason, and did not just lose a connection.
    for side in &both {
        assert_eq!(side.info().phase, MigrationPhase::Canceled);
        assert_eq!(side.info().error.unwrap().code, "canceled");
    }
    assert_eq!(vm.status().state, VmState::Running);
    assert!(stage.there.list().is_empty());
    assert!(both[0].cancel().is_err());
    console.verify();

    // No destination listens there.
    let what = StartMigration::to(format!("unix:{}", stage.path("nobody")));
    let send = stage.here.send_migration("pocket", &what).unwrap();
    over(&*send).await;
    let error = send.info().error.unwrap();
    assert_eq!(error.code, "unreachable");
    assert!(
        error.detail.contains("cannot connect to unix:"),
        "{error:?}"
    );

    // It cannot be in time, and is not to take longer.
    let [sent, _] = stage
        .migrate(|what| {
            what.mode = MemoryMode::Precopy;
            what.max_bandwidth = Some(1 << 20);
            what.max_downtime_ms = 1;
            what.deadline_s = 1;
        })
        .await;
    assert_eq!(
        sent.error.clone().unwrap().code,
        "does-not-converge",
        "{sent:?}"
    );

    // The destination does not have what the guest needs.
    std::fs::rename(stage.path("pocket"), stage.path("elsewhere")).unwrap();
    let [sent, received] = stage.migrate(|_| {}).await;
    for side in [sent, received] {
        assert_eq!(
            side.error.clone().unwrap().code,
            "payload-missing",
            "{side:?}"
        );
    }
    console.verify();

    // And when all is well, it goes.
    std::fs::rename(stage.path("elsewhere"), stage.path("pocket")).unwrap();
    let [sent, _] = stage
        .migrate(|what| what.at_deadline = Some(AtDeadline::Stop))
        .await;
    assert_eq!(sent.phase, MigrationPhase::Completed, "{sent:?}");
    let mut console = Console::connect(Path::new(&stage.path("serial")));
    console.verify();
}

#[tokio::test]
async fn rejects_too_little_destination_memory() {
    let stage = Stage::new();
    let told = std::fs::read_to_string("/proc/meminfo").unwrap();
    let total: u64 = told.split_whitespace().nth(1).unwrap().parse().unwrap();
    let mut config = stage.config(100, 1);
    config.memory.size = (2 * total) << 10 & !((1 << 21) - 1);
    drop(stage.boot(config).await);
    for side in stage.migrate(|_| {}).await {
        let error = side.error.clone().unwrap();
        assert_eq!(error.code, "memory-short", "{side:?}");
        assert!(error.detail.contains("MiB available"), "{error:?}");
    }
    let vm = stage.here.get("pocket").unwrap();
    assert_eq!(vm.status().state, VmState::Running);
    assert!(stage.there.list().is_empty());
}
