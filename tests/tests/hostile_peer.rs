//! A peer that speaks the migration protocol and misbehaves, against services that are processes.
//! Each test is one way to misbehave; in each the service answers its clients meanwhile, and a good
//! migration works afterwards.

#![allow(clippy::unwrap_used, clippy::panic, reason = "tests")]

use std::fs;
use std::io::Write as _;
use std::path::PathBuf;
use std::time::Duration;

use migration::testing::Peer;
use migration::{Accept as _, Dial as _, Endpoint, Listener, Offer};
use serde_json::json;
use spec::{
    AwaitMigration, MemoryMode, MigrationInfo, MigrationPhase, StartMigration, VmId, VmState,
};
use tests::{Face, Service, dirtier};
use uuid::Uuid;

mod offers;
use offers::capture;

/// A bound, and no measure: the machine may be busy.
const PATIENCE: Duration = Duration::from_secs(300);
/// Memory of the guest: the size of the final move does not matter.
const MEMORY: u64 = 64 << 20;

/// Two services, a guest at the one, and its offer, which a hostile source can make, too.
struct Stage {
    source: Service,
    destination: Service,
    vm: VmId,
    port: PathBuf,
    offer: Offer,
    at: Endpoint,
    waiting: VmId,
    waits: usize,
}

fn name(info: &MigrationInfo) -> VmId {
    info.id.parse().unwrap()
}

async fn wait_at(service: &Service, at: &Endpoint) -> VmId {
    let body = AwaitMigration::at(at.to_string());
    name(&service.client().migrations_receive(&body).await.unwrap())
}

impl Stage {
    async fn new() -> Self {
        let (source, destination) =
            tokio::join!(Service::start(Face::Many), Service::start(Face::Many));
        let (source, destination) = (source.unwrap(), destination.unwrap());
        let booted = dirtier::boot_with(&source, Some(MEMORY)).await;
        let (vm, port) = booted.unwrap();
        let offer = capture(&source, &vm).await;
        let at = Endpoint::Unix(destination.path("at"));
        let waiting = wait_at(&destination, &at).await;
        Self {
            source,
            destination,
            vm,
            port,
            offer,
            at,
            waiting,
            waits: 0,
        }
    }

    /// A source that was welcomed.
    fn welcomed(&self, id: Uuid) -> Peer {
        let mut peer = Peer::control(&self.at, id);
        let heard = peer.recv().unwrap();
        assert!(heard.starts_with("Welcome"), "{heard}");
        peer
    }

    /// A source whose offer was accepted.
    fn prepared(&self, id: Uuid) -> Peer {
        let mut peer = self.welcomed(id);
        assert!(peer.offer(&self.offer));
        let heard = peer.recv().unwrap();
        assert!(heard.starts_with("Prepared"), "{heard}");
        peer
    }

    async fn until(&self, wanted: impl Fn(&MigrationInfo) -> bool) -> MigrationInfo {
        let service = &self.destination;
        service
            .until(&self.waiting, PATIENCE, wanted)
            .await
            .unwrap()
    }

    /// The destination waits, and says why the last one that came was none.
    async fn still_waits(&self, code: &str) {
        self.until(|info| {
            let error = info.error.as_ref();
            info.phase == MigrationPhase::Connecting && error.is_some_and(|one| one.code == code)
        })
        .await;
    }

    /// The destination has failed, and waits anew.
    async fn fails_and_waits_anew(&mut self) {
        let failed = self.until(|info| info.phase.is_over()).await;
        assert_eq!(failed.phase, MigrationPhase::Failed, "{failed:?}");
        self.has_no_vm().await;
        // The endpoint of the migration that failed may be taken for a moment still.
        self.waits += 1;
        let next = format!("at-{}", self.waits);
        self.at = Endpoint::Unix(self.destination.path(next));
        self.waiting = wait_at(&self.destination, &self.at).await;
    }

    async fn has_no_vm(&self) {
        let vms = self.destination.client().vms_list().await.unwrap();
        assert!(vms.is_empty(), "{vms:?}");
    }

    /// The guest moves.
    async fn a_good_migration_works(&self) {
        let what = StartMigration::to(self.at.to_string());
        let begun = self.source.client().vms_migrate(&self.vm, &what).await;
        let sent = name(&begun.unwrap());
        let is_over = |info: &MigrationInfo| info.phase.is_over();
        let sent = self.source.until(&sent, PATIENCE, is_over).await.unwrap();
        assert_eq!(sent.phase, MigrationPhase::Completed, "{sent:?}");
        let received = self.until(is_over).await;
        assert_eq!(received.phase, MigrationPhase::Completed, "{received:?}");
        assert_eq!(received.error, None);
        let there = self.destination.client().vms_info(&self.vm).await.unwrap();
        assert_eq!(there.state, VmState::Running);
        dirtier::check(&self.port).await.unwrap();
    }
}

fn descriptors(service: &Service) -> usize {
    let all = fs::read_dir(format!("/proc/{}/fd", service.pid()));
    all.unwrap().count()
}

#[tokio::test]
async fn bad_offer_does_not_end_the_wait() {
    let stage = Stage::new().await;
    let mut id = 0;
    let mut next = || {
        id += 1;
        Uuid::from_u128(id)
    };
    // It leaves after its hello.
    drop(Peer::control(&stage.at, next()));
    stage.still_waits("connection-lost").await;
    // It speaks something else.
    let mut http = stage.at.dial().unwrap();
    http.write_all(b"GET / HTTP/1.1\r\nHost: whimbrel\r\n\r\n")
        .unwrap();
    stage.still_waits("stream-damaged").await;
    // A commit message for a guest that was never offered.
    let mut peer = stage.welcomed(next());
    assert!(peer.say(&json!({ "Abort": { "code": "changed-its-mind", "detail": "no" } })));
    stage.still_waits("changed-its-mind").await;
    let mut peer = stage.welcomed(next());
    assert!(peer.say(&json!({ "Commit": { "stood_for_ns": 0, "paused": false } })));
    stage.still_waits("stream-damaged").await;
    // Memory that is given, and does not come.
    let mut peer = stage.welcomed(next());
    let given = Offer {
        given: true,
        ..stage.offer.clone()
    };
    assert!(peer.offer(&given) && peer.bytes(&[0]));
    drop(peer);
    stage.still_waits("connection-lost").await;
    // A machine that cannot be read, and one whose memory is not what it says.
    for (offer, code) in [
        (
            Offer {
                machine: b"{}".to_vec().into(),
                ..stage.offer.clone()
            },
            "offer-unreadable",
        ),
        (
            Offer {
                blocks: Vec::new(),
                ..stage.offer.clone()
            },
            "offer-unreadable",
        ),
    ] {
        let mut peer = stage.welcomed(next());
        assert!(peer.offer(&offer));
        let heard = peer.recv().unwrap();
        assert!(heard.contains(code), "{heard}");
        stage.still_waits(code).await;
    }
    stage.has_no_vm().await;
    stage.a_good_migration_works().await;
}

#[tokio::test]
async fn many_connections_exhaust_nothing() {
    let stage = Stage::new().await;
    let before = descriptors(&stage.destination);
    let (mut silent, mut greeted) = (Vec::new(), Vec::new());
    let mut most = 0;
    for number in 0..1_100_u16 {
        let id = Uuid::from_u128(7);
        match number % 5 {
            0 => greeted.push(Peer::again(&stage.at, id)),
            1 => greeted.push(Peer::ram(&stage.at, id, number)),
            2 | 3 => greeted.push(Peer::control(&stage.at, id)),
            _ => silent.push(stage.at.dial().unwrap()),
        }
        if number % 50 == 0 {
            most = most.max(descriptors(&stage.destination));
            stage.destination.client().ping().await.unwrap();
        }
    }
    most = most.max(descriptors(&stage.destination));
    // 64 connections, of each two descriptors, and those of the clients.
    assert!(most <= before + 160, "{before} descriptors grew to {most}");
    // While all of them are held open, a source is heard: in front of it are those that wait to be
    // accepted.
    drop(stage.welcomed(Uuid::from_u128(8)));
    stage.a_good_migration_works().await;
    drop((silent, greeted));
}

#[tokio::test]
async fn silent_source_times_out() {
    let mut stage = Stage::new().await;
    let held = stage.prepared(Uuid::from_u128(1));
    // Meanwhile it has the place.
    let mut second = Peer::control(&stage.at, Uuid::from_u128(2));
    assert!(second.recv().unwrap().contains("busy"));
    stage.fails_and_waits_anew().await;
    stage.a_good_migration_works().await;
    drop(held);
}

#[tokio::test]
async fn rejects_unexpected_channels_and_frames() {
    let mut stage = Stage::new().await;
    let outside = {
        // Of block 0, one run: a page far behind its end.
        let mut body = vec![0, 0, 0, 0, 1, 0, 0, 0];
        body.extend((1_u64 << 40).to_le_bytes());
        body.extend(1_u32.to_le_bytes());
        body
    };
    for (number, (kind, body)) in (1..).zip([
        (16, vec![0xff; 64]),
        (17, outside),
        (2, b"\x65Guess".to_vec()),
        (18, vec![1]),
        (999, Vec::new()),
    ]) {
        let id = Uuid::from_u128(number);
        let mut control = stage.prepared(id);
        let mut many = Peer::ram(&stage.at, id, u16::MAX);
        assert!(many.recv().unwrap().contains("out-of-order"));
        let mut rams = Vec::new();
        for index in 0..stage.offer.connections {
            let mut ram = Peer::ram(&stage.at, id, index);
            ram.frame(kind, &body);
            rams.push(ram);
        }
        assert!(control.say(&json!({ "Round": 1 })));
        let heard = control.recv().unwrap();
        assert!(heard.starts_with("Refused"), "{kind}: {heard}");
        stage.fails_and_waits_anew().await;
    }
    stage.a_good_migration_works().await;
}

/// The journal of a migration in progress says how far it is, and not what will become of it.
#[tokio::test]
async fn question_elsewhere_is_not_never_ran() {
    let mut stage = Stage::new().await;
    let other = Endpoint::Unix(stage.destination.path("other"));
    wait_at(&stage.destination, &other).await;
    let (live, unknown) = (Uuid::from_u128(1), Uuid::from_u128(2));
    let held = stage.prepared(live);
    for id in [live, unknown] {
        let heard = Peer::again(&other, id).recv().unwrap();
        assert!(heard.contains("unknown-migration"), "{heard}");
    }
    drop(held);
    stage.fails_and_waits_anew().await;
    let heard = Peer::again(&other, live).recv().unwrap();
    assert!(heard.starts_with("NotHere"), "{heard}");
    // Its name is not used again: that would write over what became of it.
    let mut again = stage.welcomed(live);
    assert!(again.offer(&stage.offer));
    assert!(again.recv().unwrap().contains("journal"));
    stage.still_waits("journal").await;
    stage.has_no_vm().await;
    stage.a_good_migration_works().await;
}

/// The other way round: the destination is hostile.
#[tokio::test]
async fn destination_cannot_raise_connections() {
    let stage = Stage::new().await;
    for connections in [u16::MAX, 0] {
        let at = Endpoint::Unix(stage.source.path(format!("hostile-{connections}")));
        let mut listener = Listener::bind(&at).unwrap();
        let what = StartMigration {
            // Other modes have one more, for pages that are waited for.
            mode: MemoryMode::Precopy,
            connections: Some(2),
            ..StartMigration::to(at.to_string())
        };
        let begun = stage.source.client().vms_migrate(&stage.vm, &what).await;
        let sent = name(&begun.unwrap());
        let (mut control, _) = Peer::accepted(listener.accept(PATIENCE).unwrap().unwrap());
        assert!(control.say(&json!({ "Welcome": { "version": 1 } })));
        drop(control.recv_offer());
        let prepared = json!({ "connections": connections, "postcopy": false });
        assert!(control.say(&json!({ "Prepared": prepared })));
        let mut channels = Vec::new();
        while let Some(stream) = listener.accept(Duration::from_secs(2)).unwrap() {
            channels.push(stream);
            assert!(channels.len() <= 2, "{connections}");
        }
        assert!(!channels.is_empty(), "{connections}");
        drop((control, channels));
        let is_over = |info: &MigrationInfo| info.phase.is_over();
        let sent = stage.source.until(&sent, PATIENCE, is_over).await.unwrap();
        assert_eq!(sent.phase, MigrationPhase::Failed, "{sent:?}");
    }
    stage.a_good_migration_works().await;
}
