//! Snapshots that are canceled, whose guest ends, or whose service is killed.

use std::time::Duration;

use rustix::process::Signal;
use spec::{MigrationPhase, VmSnapshotConfig, VmState};
use tests::snapshots::{over, refused, restore, snapshot, to};
use tests::{Face, Service, dirtier};

use super::PATIENCE;

/// A snapshot of each kind that is canceled is complete or gone. Its base is intact, and its guest as before.
#[tokio::test]
async fn canceled_snapshot_is_whole_or_gone() {
    let service = Service::start(Face::Many).await.unwrap();
    let client = service.client();
    let (vm, port) = dirtier::boot(&service).await.unwrap();
    let base = service.path("base");
    snapshot(&service, &vm, &base).await;
    let kinds = [(false, false), (false, true), (true, false), (true, true)];
    for (is_paused, has_base) in kinds {
        for delay in [0, 5, 30, 100] {
            if is_paused {
                client.vms_pause(&vm).await.unwrap();
            }
            let dir = service.path(format!("canceled-{is_paused}-{has_base}-{delay}"));
            let what = VmSnapshotConfig {
                base_url: has_base.then(|| format!("file://{}", base.display())),
                ..to(&dir)
            };
            let begun = client.vms_snapshot(&vm, &what).await.unwrap();
            tokio::time::sleep(Duration::from_millis(delay)).await;
            // Too late for a snapshot that is complete.
            let _ = client.migrations_cancel(&begun.id.parse().unwrap()).await;
            let ended = over(&service, &begun).await;
            let is_complete = ended.phase == MigrationPhase::Completed;
            assert!(
                is_complete || ended.phase == MigrationPhase::Canceled,
                "{ended:?}"
            );
            assert_eq!(dir.join("manifest.json").exists(), is_complete);
            assert!(is_complete || !dir.exists(), "{ended:?}");
            if is_paused {
                let info = client.vms_info(&vm).await.unwrap();
                assert_eq!(info.state, VmState::Paused);
                client.vms_resume(&vm).await.unwrap();
            }
            dirtier::check(&port).await.unwrap();
        }
    }
    client.vms_delete(&vm).await.unwrap();
    let came = restore(&service, &vm, &base, true).await;
    assert_eq!(came.phase, MigrationPhase::Completed, "{came:?}");
    dirtier::check(&port).await.unwrap();
}

/// A live snapshot is complete or gone if its guest is reset or deleted; a guest that stays runs.
#[tokio::test]
async fn requests_during_a_live_snapshot() {
    let service = Service::start(Face::Many).await.unwrap();
    let client = service.client();
    let (vm, port) = dirtier::boot(&service).await.unwrap();
    for delay in [0, 5, 30, 100, 200] {
        for is_reset in [true, false] {
            let dir = service.path(format!("ended-{is_reset}-{delay}"));
            let begun = client.vms_snapshot(&vm, &to(&dir)).await.unwrap();
            tokio::time::sleep(Duration::from_millis(delay)).await;
            let done = if is_reset {
                client.vms_reboot(&vm).await
            } else {
                client.vms_delete(&vm).await
            };
            // The guest may be in the stop, which is short, and ends before the snapshot does.
            let is_done = done.is_ok();
            if !is_done {
                refused(done, 409, "vm-migrating");
            }
            let ended = over(&service, &begun).await;
            let is_complete = ended.phase == MigrationPhase::Completed;
            assert_eq!(dir.join("manifest.json").exists(), is_complete, "{ended:?}");
            assert!(is_complete || !dir.exists(), "{ended:?}");
            if is_reset {
                dirtier::check(&port).await.unwrap();
            } else {
                if !is_done {
                    client.vms_delete(&vm).await.unwrap();
                }
                dirtier::boot(&service).await.unwrap();
            }
        }
    }
}

/// A guest may be deleted while its snapshot is written, and a service may die: what is left is a whole
/// snapshot or none.
#[tokio::test]
async fn what_is_left_of_an_interrupted_snapshot_is_whole_or_none() {
    let mut service = Service::start(Face::Many).await.unwrap();
    let (vm, old_port) = dirtier::boot(&service).await.unwrap();
    let old = service.path("old");
    snapshot(&service, &vm, &old).await;
    service.client().vms_delete(&vm).await.unwrap();
    let delays = [0, 5, 20, 60, 150];
    let cases = delays.map(|delay| [(delay, true), (delay, false)]);
    for (delay, is_paused) in cases.into_iter().flatten() {
        let (vm, port) = dirtier::boot(&service).await.unwrap();
        if is_paused {
            service.client().vms_pause(&vm).await.unwrap();
        }
        let dir = service.path(format!("killed-{is_paused}-{delay}"));
        let what = VmSnapshotConfig {
            base_url: Some(format!("file://{}", old.display())),
            ..to(&dir)
        };
        service.client().vms_snapshot(&vm, &what).await.unwrap();
        tokio::time::sleep(Duration::from_millis(delay)).await;
        service.signal(Signal::KILL).unwrap();
        service.ended(PATIENCE).await.unwrap();
        service.start_again().await.unwrap();
        if dir.join("manifest.json").exists() {
            let came = restore(&service, &vm, &dir, true).await;
            assert_eq!(came.phase, MigrationPhase::Completed, "{delay}: {came:?}");
            dirtier::check(&port).await.unwrap();
            service.client().vms_delete(&vm).await.unwrap();
        }
    }
    // The older snapshot, on which those were increments, is intact.
    let came = restore(&service, &vm, &old, true).await;
    assert_eq!(came.phase, MigrationPhase::Completed, "{came:?}");
    dirtier::check(&old_port).await.unwrap();
    service.client().vms_pause(&vm).await.unwrap();
    let dir = service.path("deleted");
    let begun = service.client().vms_snapshot(&vm, &to(&dir)).await.unwrap();
    service.client().vms_delete(&vm).await.unwrap();
    let ended = over(&service, &begun).await;
    let is_there = dir.join("manifest.json").exists();
    assert_eq!(
        ended.phase == MigrationPhase::Completed,
        is_there,
        "{ended:?}"
    );
    assert!(is_there || !dir.exists(), "nothing is left");
}
