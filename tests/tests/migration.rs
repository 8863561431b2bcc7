//! Guests move between services that are processes of their own, over REST; and services are killed
//! on the way.

#![allow(clippy::unwrap_used, reason = "tests")]

use std::time::Duration;

use openapi::ClientError;
use rustix::process::Signal;
use spec::{
    AwaitMigration, HotplugMethod, MemoryMode, MigrationActivity, MigrationInfo, MigrationOutcome,
    MigrationPhase, ReceiveMigrationData, ResolveMigration, SendMigrationData, StartMigration,
    VmId, VmResize, VmState,
};
use tests::{Face, Service, await_anyone, dirtier, snapshots};

const PATIENCE: Duration = Duration::from_secs(60);

async fn pair() -> [Service; 2] {
    let (a, b) = tokio::join!(Service::start(Face::Many), Service::start(Face::Many));
    [a.unwrap(), b.unwrap()]
}

async fn kill(service: &mut Service) {
    service.signal(Signal::KILL).unwrap();
    service.ended(PATIENCE).await.unwrap();
}

fn name(info: &MigrationInfo) -> VmId {
    info.id.parse().unwrap()
}

async fn receive(at: &Service) -> MigrationInfo {
    let body = await_anyone("tcp:127.0.0.1:0");
    at.client().migrations_receive(&body).await.unwrap()
}

async fn until(at: &Service, id: &VmId, wanted: impl Fn(&MigrationInfo) -> bool) -> MigrationInfo {
    at.until(id, PATIENCE, wanted).await.unwrap()
}

#[tokio::test]
async fn a_guest_moves_between_two_services_and_back() {
    let services = pair().await;
    let (vm, port) = dirtier::boot(&services[0]).await.unwrap();
    // The guest stays paused where either side says so, and runs when it is resumed there.
    for (turn, (mode, here, there)) in [
        (MemoryMode::Auto, true, true),
        (MemoryMode::Postcopy, true, false),
        (MemoryMode::Precopy, false, true),
    ]
    .into_iter()
    .enumerate()
    {
        let (from, to) = (&services[turn % 2], &services[(turn + 1) % 2]);
        let waiting = AwaitMigration {
            resume: there,
            ..await_anyone("tcp:127.0.0.1:0")
        };
        let waiting = to.client().migrations_receive(&waiting).await.unwrap();
        assert_eq!(waiting.phase, MigrationPhase::Connecting);
        let what = StartMigration {
            insecure: true,
            mode,
            resume: here,
            ..StartMigration::to(waiting.endpoint.clone())
        };
        let begun = from.client().vms_migrate(&vm, &what).await.unwrap();
        let sent = until(from, &name(&begun), |info| info.phase.is_over()).await;
        assert_eq!(sent.phase, MigrationPhase::Completed, "{sent:?}");
        let received = until(to, &name(&waiting), |info| info.phase.is_over()).await;
        assert_eq!(received.phase, MigrationPhase::Completed, "{received:?}");
        assert_eq!(received.vm.as_ref(), Some(&vm));
        assert!(from.client().vms_list().await.unwrap().is_empty());
        let state = async || to.client().vms_info(&vm).await.unwrap().state;
        if !(here && there) {
            assert_eq!(state().await, VmState::Paused);
            to.client().vms_resume(&vm).await.unwrap();
        }
        assert_eq!(state().await, VmState::Running);
        for info in [&sent, &received] {
            let steps = &info.timeline;
            for pair in steps.windows(2) {
                assert_eq!(pair[0].at_us + pair[0].took_us, pair[1].at_us, "{info:?}");
            }
            let last = steps.last().unwrap();
            assert_eq!(last.at_us + last.took_us, info.elapsed_us, "{info:?}");
            assert!(
                steps
                    .iter()
                    .any(|step| step.step == MigrationActivity::HandOver)
            );
        }
        println!(
            "{:?}, predicted {:?} us",
            sent.downtime.unwrap(),
            sent.predicted_downtime_us
        );
    }
    dirtier::check(&port).await.unwrap();
    let info = services[0].client().migrations_list().await.unwrap();
    assert_eq!(info.len(), 3, "its history");
}

#[tokio::test]
async fn one_vm_socket_migrates() {
    let (a, b) = tokio::join!(Service::start(Face::One), Service::start(Face::One));
    let (a, b) = (a.unwrap(), b.unwrap());
    let (_, port) = dirtier::boot(&a).await.unwrap();
    let url = format!("unix:{}", b.path("migration").display());
    let receiving = async {
        let body = serde_json::json!({ "receiver_url": url });
        let body: ReceiveMigrationData = serde_json::from_value(body).unwrap();
        b.client().vm_receive_migration(&body).await
    };
    let sending = async {
        while !b.path("migration").exists() {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
        let body = serde_json::json!({ "destination_url": url, "local": true, "downtime_ms": 200 });
        let body: SendMigrationData = serde_json::from_value(body).unwrap();
        a.client().vm_send_migration(&body).await?;
        // The answer came at once. The end is in the progress, which stays when the VM has gone.
        loop {
            let progress = a.client().vm_migration_progress().await?;
            if progress.state.ongoing.is_none() {
                return Ok::<_, ClientError>(progress);
            }
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    };
    // Ends with the first error: a source that failed would leave the destination waiting.
    let ((), sent) = tokio::try_join!(receiving, sending).unwrap();
    assert!(sent.state.finished.is_some(), "{sent:?}");
    assert_eq!(sent.downtime_configured_ms, 200);
    assert_eq!(b.client().vm_info().await.unwrap().state, VmState::Running);
    assert!(a.client().vm_info().await.is_err(), "it is no longer there");
    dirtier::check(&port).await.unwrap();
    let body = serde_json::json!({ "destination_url": "tcp:127.0.0.1:1", "tls_dir": "/nowhere" });
    let refused = b
        .client()
        .vm_send_migration(&serde_json::from_value(body).unwrap())
        .await;
    assert!(refused.unwrap_err().to_string().contains("/nowhere/"));

    // As a client of an older version: the answer comes when the VM has moved back.
    let url = format!("unix:{}", a.path("back").display());
    let receiving = async {
        let body = serde_json::json!({ "receiver_url": url });
        let body: ReceiveMigrationData = serde_json::from_value(body).unwrap();
        a.client().vm_receive_migration(&body).await
    };
    let sending = async {
        while !a.path("back").exists() {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
        let body = serde_json::json!({ "destination_url": url });
        let body: SendMigrationData = serde_json::from_value(body).unwrap();
        let client = b.client().clone().waiting(PATIENCE);
        client.vm_send_migration(&body).await?;
        b.client().vm_migration_progress().await
    };
    let ((), sent) = tokio::try_join!(receiving, sending).unwrap();
    assert!(sent.state.finished.is_some(), "{sent:?}");
    assert_eq!(a.client().vm_info().await.unwrap().state, VmState::Running);
    dirtier::check(&port).await.unwrap();
}

/// With the defaults a migration ends whatever the guest does: one that writes faster than its memory can be
/// copied moves first, and its pages follow.
#[tokio::test]
async fn guest_that_writes_too_fast_moves_with_the_defaults() {
    let services = pair().await;
    let (vm, port) = dirtier::boot_writing(&services[0], Some(64 << 20), 16, 20_000)
        .await
        .unwrap();
    let waiting = receive(&services[1]).await;
    let what = StartMigration {
        // 4,000 pages a second.
        max_bandwidth: Some(16 << 20),
        insecure: true,
        ..StartMigration::to(waiting.endpoint.clone())
    };
    let begun = services[0].client().vms_migrate(&vm, &what).await.unwrap();
    let sent = until(&services[0], &name(&begun), |info| info.phase.is_over()).await;
    assert_eq!(sent.phase, MigrationPhase::Completed, "{sent:?}");
    assert_eq!(sent.throttle_percent, 0, "{sent:?}");
    // Each round, and what it left.
    let rounds: Vec<_> = sent.history.iter().map(|round| round.round).collect();
    assert!(
        rounds.len() >= 3 && rounds.iter().copied().eq(1..=rounds.len() as u32),
        "{sent:?}"
    );
    assert!(
        sent.history.iter().all(|round| round.dirty_pages > 0),
        "{sent:?}"
    );
    let received = until(&services[1], &name(&waiting), |info| info.phase.is_over()).await;
    assert!(received.faults > 0, "no page was waited for: {received:?}");
    dirtier::check(&port).await.unwrap();
    println!("{} rounds, {} faults", sent.rounds, received.faults);
}

/// While a guest moves its size stays: the destination's machine was built from its configuration.
#[tokio::test]
async fn resizes_are_refused_while_a_guest_moves() {
    let services = pair().await;
    let client = services[0].client();
    let options = guest::Options {
        heartbeat_ms: Some(100),
        ..guest::Options::default()
    };
    let (mut config, _) = services[0].pocket("guest", options).unwrap();
    config.cpus.max_vcpus = 2;
    config.memory.hotplug_method = HotplugMethod::VirtioMem;
    config.memory.hotplug_size = Some(128 << 20);
    config.balloon = serde_json::from_value(serde_json::json!({ "size": 0 })).unwrap();
    let vm = services[0].create("guest", config).await.unwrap();
    client.vms_boot(&vm).await.unwrap();
    let before = client.vms_info(&vm).await.unwrap();
    let waiting = receive(&services[1]).await;
    let what = StartMigration {
        // The first round takes minutes.
        max_bandwidth: Some(16 << 10),
        insecure: true,
        ..StartMigration::to(waiting.endpoint)
    };
    let begun = client.vms_migrate(&vm, &what).await.unwrap();
    until(&services[0], &name(&begun), |info| {
        info.phase == MigrationPhase::Precopy
    })
    .await;
    let none = VmResize::default();
    let resizes = [
        VmResize {
            desired_vcpus: Some(2),
            ..none.clone()
        },
        VmResize {
            desired_ram: Some(before.config.memory.size + (128 << 20)),
            ..none.clone()
        },
        VmResize {
            desired_balloon: Some(16 << 20),
            ..none
        },
    ];
    for sizes in &resizes {
        let refused = client.vms_resize(&vm, sizes).await;
        snapshots::refused(refused, 409, "vm-migrating");
    }
    let info = client.vms_info(&vm).await.unwrap();
    assert_eq!(info.config, before.config);
    assert_eq!(info.memory_actual_size, before.memory_actual_size);
    assert_eq!(info.vcpus_actual_count, before.vcpus_actual_count);
    assert_eq!(info.pending_resizes, []);
    client.migrations_cancel(&name(&begun)).await.unwrap();
    let ended = until(&services[0], &name(&begun), |info| info.phase.is_over()).await;
    assert_eq!(ended.phase, MigrationPhase::Canceled, "{ended:?}");
    // The migration was the only reason.
    for sizes in &resizes {
        client.vms_resize(&vm, sizes).await.unwrap();
    }
}

/// The destination dies while memory is copied: the guest runs on, and moves with the next attempt.
#[tokio::test]
async fn dead_destination_keeps_guest_at_source() {
    let mut services = pair().await;
    let (vm, port) = dirtier::boot(&services[0]).await.unwrap();
    let waiting = receive(&services[1]).await;
    let what = StartMigration {
        max_bandwidth: Some(2 << 20),
        insecure: true,
        ..StartMigration::to(waiting.endpoint)
    };
    let begun = services[0].client().vms_migrate(&vm, &what).await.unwrap();
    until(&services[0], &name(&begun), |info| {
        info.phase == MigrationPhase::Precopy
    })
    .await;
    kill(&mut services[1]).await;
    let failed = until(&services[0], &name(&begun), |info| info.phase.is_over()).await;
    assert_eq!(failed.phase, MigrationPhase::Failed, "{failed:?}");
    let info = services[0].client().vms_info(&vm).await.unwrap();
    assert_eq!(info.state, VmState::Running);
    services[1].start_again().await.unwrap();
    // It knows what it was about.
    let known = services[1].client().migrations_list().await.unwrap();
    let [recalled] = &known[..] else {
        unreachable!("{known:?}");
    };
    assert_eq!(recalled.phase, MigrationPhase::Failed);
    assert_eq!(recalled.error.as_ref().unwrap().code, "service-ended");
    let waiting = receive(&services[1]).await;
    let what = StartMigration {
        insecure: true,
        ..StartMigration::to(waiting.endpoint)
    };
    let begun = services[0].client().vms_migrate(&vm, &what).await.unwrap();
    let sent = until(&services[0], &name(&begun), |info| info.phase.is_over()).await;
    assert_eq!(sent.phase, MigrationPhase::Completed, "{sent:?}");
    dirtier::check(&port).await.unwrap();
}

/// The source dies while memory is copied: nothing is left at the destination.
#[tokio::test]
async fn dead_source_leaves_no_vm() {
    let mut services = pair().await;
    let (vm, _) = dirtier::boot(&services[0]).await.unwrap();
    let waiting = receive(&services[1]).await;
    let what = StartMigration {
        max_bandwidth: Some(2 << 20),
        insecure: true,
        ..StartMigration::to(waiting.endpoint.clone())
    };
    let begun = services[0].client().vms_migrate(&vm, &what).await.unwrap();
    until(&services[0], &name(&begun), |info| {
        info.phase == MigrationPhase::Precopy
    })
    .await;
    kill(&mut services[0]).await;
    let failed = until(&services[1], &name(&waiting), |info| info.phase.is_over()).await;
    assert_eq!(failed.phase, MigrationPhase::Failed, "{failed:?}");
    assert!(services[1].client().vms_list().await.unwrap().is_empty());
    let body = ResolveMigration {
        outcome: MigrationOutcome::Run,
    };
    let refused = services[1]
        .client()
        .migrations_resolve(&name(&waiting), &body)
        .await;
    assert!(refused.unwrap_err().to_string().contains("not in doubt"));
}
