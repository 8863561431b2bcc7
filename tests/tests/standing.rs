//! A service that accepts VMs at any time, `serve --accept-migrations`: good sources, one after another
//! and side by side, and hostile ones among them.

#![allow(clippy::unwrap_used, clippy::panic, reason = "tests")]

use std::time::Duration;

use guest::{Line, Options, Order, Workload};
use migration::testing::Peer;
use migration::{Dial as _, Endpoint, Listener, Offer};
use rustix::process::Signal;
use spec::{MigrationInfo, MigrationPhase, StartMigration, VmId, VmState};
use tempfile::TempDir;
use tests::{Face, Serial, Service};
use uuid::Uuid;

mod offers;
use offers::capture;

/// A bound, and no measure: the machine may be busy.
const PATIENCE: Duration = Duration::from_secs(300);
/// Memory of a guest: the size does not matter.
const MEMORY: u64 = 64 << 20;
/// Migrations that a receiver has in progress at once.
const AT_ONCE: u128 = migration::MOST_AT_ONCE as u128;

/// Starts a service that accepts VMs at a TCP port of its own choice, and returns the endpoint.
async fn accepting() -> (Service, Endpoint) {
    let arguments = [
        "--accept-migrations",
        "tcp:127.0.0.1:0",
        "--migration-insecure",
        "--migration-allow",
        "/",
    ];
    let service = Service::start_with(&[], &arguments.map(str::to_owned)).await;
    let service = service.unwrap();
    let log = service.log();
    let at = log.split("VMs are accepted at ").nth(1).unwrap();
    let at = at.lines().next().unwrap().parse().unwrap();
    (service, at)
}

fn to(at: &Endpoint) -> StartMigration {
    StartMigration {
        insecure: true,
        verify: true,
        ..StartMigration::to(at.to_string())
    }
}

/// Moves a VM, and returns how that ended at the source.
async fn migrate(source: &Service, vm: &VmId, what: &StartMigration) -> MigrationInfo {
    let begun = source.client().vms_migrate(vm, what).await.unwrap();
    let is_over = |info: &MigrationInfo| info.phase.is_over();
    let begun = begun.id.parse().unwrap();
    source.until(&begun, PATIENCE, is_over).await.unwrap()
}

async fn moves(source: &Service, vm: &VmId, at: &Endpoint) {
    let sent = migrate(source, vm, &to(at)).await;
    assert_eq!(sent.phase, MigrationPhase::Completed, "{sent:?}");
}

/// Boots a guest that writes to its memory and beats.
async fn boot(at: &Service, name: &str) -> (VmId, Serial) {
    let options = Options {
        workload: Workload::Dirty {
            region_mib: Some(8),
            rate: Some(500),
            order: Order::Scattered,
        },
        heartbeat_ms: Some(50),
        ..Options::default()
    };
    let (mut config, serial) = at.pocket(name, options).unwrap();
    config.memory.size = MEMORY;
    let vm = at.create(name, config).await.unwrap();
    at.client().vms_boot(&vm).await.unwrap();
    serial.wait_for("heartbeat", 3, PATIENCE).await.unwrap();
    (vm, serial)
}

/// The guest has run on from where it was: its heartbeats, which it counts, come in order and go on.
async fn beats_on(serial: &Serial) {
    let before = serial.text().matches("heartbeat").count();
    let text = serial.wait_for("heartbeat", before + 3, PATIENCE).await;
    let lines = text.unwrap();
    let beats = lines.lines().filter_map(Line::parse);
    let beats: Vec<_> = beats
        .filter_map(|line| match line {
            Line::Heartbeat { count, .. } => Some(count),
            _ => None,
        })
        .collect();
    let expected: Vec<_> = (beats[0]..).take(beats.len()).collect();
    assert_eq!(beats, expected);
}

/// A source whose offer was accepted: the VM `name` is expected.
fn prepared(at: &Endpoint, id: u128, offer: &Offer, name: &str) -> Peer {
    let mut peer = welcomed(at, id);
    assert!(peer.offer(&named(offer, name)));
    let heard = peer.recv().unwrap();
    assert!(heard.starts_with("Prepared"), "{heard}");
    peer
}

fn welcomed(at: &Endpoint, id: u128) -> Peer {
    let mut peer = Peer::control(at, Uuid::from_u128(id));
    let heard = peer.recv().unwrap();
    assert!(heard.starts_with("Welcome"), "{heard}");
    peer
}

fn named(offer: &Offer, name: &str) -> Offer {
    Offer {
        vm: name.to_owned(),
        ..offer.clone()
    }
}

#[tokio::test]
async fn guests_arrive_one_after_another_and_side_by_side() {
    let source = Service::start(Face::Many).await.unwrap();
    let (destination, at) = accepting().await;
    let mut guests = Vec::new();
    for name in ["first", "second", "third", "fourth"] {
        guests.push(boot(&source, name).await);
    }
    // A receiver that waits is no migration.
    assert!(
        destination
            .client()
            .migrations_list()
            .await
            .unwrap()
            .is_empty()
    );
    for (vm, serial) in &guests[..2] {
        moves(&source, vm, &at).await;
        beats_on(serial).await;
    }
    tokio::join!(
        moves(&source, &guests[2].0, &at),
        moves(&source, &guests[3].0, &at)
    );
    for (vm, serial) in &guests {
        beats_on(serial).await;
        destination.reaches(vm, VmState::Running).await.unwrap();
    }
    let all = destination.client().migrations_list().await.unwrap();
    assert_eq!(all.len(), 4, "{all:?}");
    for one in &all {
        let is_over = |info: &MigrationInfo| info.phase.is_over();
        let id = one.id.parse().unwrap();
        let one = destination.until(&id, PATIENCE, is_over).await.unwrap();
        assert_eq!(one.phase, MigrationPhase::Completed, "{one:?}");
    }
    // Each has the socket that a VM which is created has.
    let summaries = destination.client().vms_list().await.unwrap();
    assert!(summaries.iter().all(|vm| vm.api_socket.is_some()));
    assert!(source.client().vms_list().await.unwrap().is_empty());
}

#[tokio::test]
async fn silent_and_busy_peers_hold_up_nobody() {
    let source = Service::start(Face::Many).await.unwrap();
    let (destination, at) = accepting().await;
    let (vm, serial) = boot(&source, "guest").await;
    let offer = capture(&source, &vm).await;
    // They connect and say nothing, or greet and say no more.
    let silent: Vec<_> = (0..100).map(|_| at.dial().unwrap()).collect();
    let greeted: Vec<_> = (1000..1010)
        .map(|id| Peer::control(&at, Uuid::from_u128(id)))
        .collect();
    // All places but one are taken by sources that send no guest.
    let mut held: Vec<_> = (1..AT_ONCE)
        .map(|id| prepared(&at, id, &offer, &format!("held-{id}")))
        .collect();
    // The number of a migration in progress is not taken over.
    let mut same = welcomed(&at, 1);
    assert!(same.offer(&named(&offer, "other")));
    let heard = same.recv().unwrap();
    assert!(heard.starts_with("Refused"), "{heard}");
    moves(&source, &vm, &at).await;
    beats_on(&serial).await;
    // With the last place taken, a source hears so at once.
    held.push(prepared(&at, AT_ONCE, &offer, "last"));
    let heard = Peer::control(&at, Uuid::from_u128(AT_ONCE + 1))
        .recv()
        .unwrap();
    assert!(heard.contains("busy"), "{heard}");
    // One that leaves makes room, and takes what was made for it along.
    drop(held.pop());
    loop {
        let vms = destination.client().vms_list().await.unwrap();
        if !vms.iter().any(|vm| vm.id.as_str() == "last") {
            break;
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    drop(welcomed(&at, AT_ONCE + 2));
    drop((silent, greeted, held, same));
}

#[tokio::test]
async fn vm_that_exists_is_refused_by_name() {
    let source = Service::start(Face::Many).await.unwrap();
    let (destination, at) = accepting().await;
    let (vm, serial) = boot(&source, "guest").await;
    let (config, _) = destination.pocket("guest", Options::default()).unwrap();
    destination.create("guest", config).await.unwrap();
    let sent = migrate(&source, &vm, &to(&at)).await;
    let error = sent.error.unwrap();
    assert_eq!(error.code, "vm-exists");
    assert!(error.detail.contains("\"guest\""), "{}", error.detail);
    beats_on(&serial).await;
    let there = destination.client().vms_info(&vm).await.unwrap();
    assert_eq!(there.state, VmState::Created);
    // The receiver waits for others still.
    destination.client().vms_delete(&vm).await.unwrap();
    moves(&source, &vm, &at).await;
    beats_on(&serial).await;
}

#[tokio::test]
async fn shutdown_frees_the_endpoint_and_calls_off_what_is_on_its_way() {
    let dir = TempDir::new().unwrap();
    let at = Endpoint::Unix(dir.path().join("at"));
    let arguments = ["--accept-migrations".to_owned(), at.to_string()];
    let (source, destination) = tokio::join!(
        Service::start(Face::Many),
        Service::start_with(&[], &arguments)
    );
    let (source, mut destination) = (source.unwrap(), destination.unwrap());
    let (vm, serial) = boot(&source, "guest").await;
    let offer = capture(&source, &vm).await;
    let mut held = prepared(&at, 1, &offer, "held");
    let silent = at.dial().unwrap();
    // So slow that it is in progress when the service ends.
    let slow = StartMigration {
        max_bandwidth: Some(64 << 10),
        ..to(&at)
    };
    let begun = source.client().vms_migrate(&vm, &slow).await.unwrap();
    let id = begun.id.parse().unwrap();
    let copies = |info: &MigrationInfo| info.phase == MigrationPhase::Precopy;
    source.until(&id, PATIENCE, copies).await.unwrap();
    destination.signal(Signal::TERM).unwrap();
    let status = destination.ended(PATIENCE).await.unwrap();
    assert!(status.success(), "{status}:\n{}", destination.log());
    assert!(!dir.path().join("at").exists());
    let is_over = |info: &MigrationInfo| info.phase.is_over();
    let sent = source.until(&id, PATIENCE, is_over).await.unwrap();
    assert_ne!(sent.phase, MigrationPhase::Completed, "{sent:?}");
    beats_on(&serial).await;
    while held.recv().is_ok() {}
    drop(silent);
}

#[tokio::test]
async fn receiver_needs_trust_and_a_free_endpoint() {
    let taken = Listener::bind(&Endpoint::Tcp("127.0.0.1:0".to_owned())).unwrap();
    let taken = taken_endpoint(&taken);
    for (arguments, names) in [
        (vec!["tcp:127.0.0.1:0"], "--migration-insecure"),
        (vec!["udp:127.0.0.1:0"], "not an endpoint"),
        (
            vec![taken.as_str(), "--migration-insecure"],
            "cannot listen",
        ),
        (
            vec!["tcp:127.0.0.1:0", "--accept-tls-dir", "/nowhere"],
            "--accept-tls-dir /nowhere",
        ),
        (
            vec!["tcp:127.0.0.1:0", "--accept-tls-dir", "/usr"],
            "--migration-peer",
        ),
        (
            vec![
                "tcp:127.0.0.1:0",
                "--accept-tls-dir",
                "/usr",
                "--migration-peer",
                "host-a",
            ],
            "/usr/",
        ),
    ] {
        let mut all = vec!["--accept-migrations".to_owned()];
        all.extend(arguments.iter().map(|one| (*one).to_owned()));
        let refused = Service::start_with(&[], &all).await.unwrap_err();
        let refused = refused.to_string();
        assert!(refused.contains(names), "{arguments:?}: {refused}");
    }
}

fn taken_endpoint(listener: &Listener) -> String {
    listener.endpoint().unwrap().to_string()
}
