//! The failure table of docs/migration.md, row by row. A [`Proxy`] between two service processes kills
//! one of them, or harms the stream, at the frame that the case names. Whatever happens, at most one copy of the guest runs, and its memory is whole.
//! `CASE='Kill(Source)' cargo test ...` runs the cases that have this in what is printed of them.

#![allow(clippy::unwrap_used, clippy::panic, reason = "tests")]

#[path = "hand_over/doubt.rs"]
mod doubt;

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};
use spec::{
    AwaitMigration, MemoryMode, MigrationInfo, MigrationOutcome, MigrationPhase, MigrationSide,
    StartMigration, VmId, VmState,
};
use tests::{Face, Frame, Proxy, Service, Side, Verdict, dirtier, trials};

use self::doubt::{happened, refused_with_advice, resolve};

/// How many at once: a guest's ring 0 takes a core while it boots.
const AT_ONCE: usize = 3;
/// A bound, and no measure: the machine may be busy.
const PATIENCE: Duration = Duration::from_secs(180);
/// Memory of the guest, which writes to a quarter of it. More would only add zeros and time.
const MEMORY: u64 = 64 << 20;
/// How long a frozen process stays stopped: less than the patience of the other side.
const FROZEN: Duration = Duration::from_secs(2);

/// The guest's place at the end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Ends {
    /// The guest continues at the source.
    AtSource,
    /// The guest runs at the destination.
    AtDestination,
    /// The guest is paused at the destination until it is resolved; `run` resumes it whole.
    InDoubtAtDestination,
    /// The source holds it, and lets it run on when the destination, which died, is there again.
    AtSourceOnceAsked,
    /// The guest continues at the source, unless that died; the destination has not accepted it, and
    /// keeps waiting.
    Unheard,
    /// The guest is gone with the process that ran it, and the other side reports that.
    Lost,
    /// Like [`Lost`](Self::Lost), after a resolution: half of the memory was in the process that died.
    LostInHalves,
}

/// The proxy's action at the frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Blow {
    /// Kills a side; the frame is lost.
    Kill(Side),
    /// Kills a side; the frame arrives.
    KillAfter(Side),
    /// Stops a side's process (SIGSTOP) and continues it 2 seconds later; the frame arrives meanwhile.
    Freeze(Side),
    Fault(Verdict),
}

#[derive(Clone, Copy, Debug)]
struct Case {
    mode: MemoryMode,
    from: Side,
    name: &'static str,
    /// The how-manieth of its name, from 0.
    nth: usize,
    blow: Blow,
    ends: Ends,
    /// Half of a guest is not given up, but deleted.
    is_deleted: bool,
}

impl Case {
    /// The limit for the pages that come unasked, in bytes a second. On a busy machine all of them could be
    /// there before the guest has missed as many as the case needs.
    fn bandwidth(&self) -> Option<u64> {
        (self.name == "Fault" && self.nth > 0).then_some(1 << 20)
    }
}

fn signal(pid: u32, signal: Signal) {
    let pid = i32::try_from(pid).ok().and_then(Pid::from_raw).unwrap();
    kill_process(pid, signal).unwrap();
}

fn kill(pid: u32) {
    signal(pid, Signal::KILL);
    // Long enough for it to be gone, with its connections.
    thread::sleep(Duration::from_millis(30));
}

/// How far a trial is.
#[derive(Default)]
struct Marks {
    /// The request to migrate was answered: no process is killed before.
    begun: AtomicBool,
    fell: AtomicBool,
}

/// Lets a case's blow fall once.
fn judge(case: Case, pids: [u32; 2], marks: Arc<Marks>) -> impl Fn(&Frame) -> Verdict {
    move |frame| {
        let here =
            (frame.from, frame.name.as_str(), frame.before) == (case.from, case.name, case.nth);
        if !here || marks.fell.swap(true, Ordering::SeqCst) {
            return Verdict::Pass;
        }
        while !marks.begun.load(Ordering::SeqCst) {
            thread::sleep(Duration::from_millis(1));
        }
        let pid = |side| pids[usize::from(side == Side::Destination)];
        match case.blow {
            Blow::Kill(side) => {
                kill(pid(side));
                Verdict::Cut
            }
            // It has sent it, and is dead when it arrives.
            Blow::KillAfter(side) => {
                kill(pid(side));
                Verdict::Pass
            }
            Blow::Freeze(side) => {
                let frozen = pid(side);
                signal(frozen, Signal::STOP);
                thread::spawn(move || {
                    thread::sleep(FROZEN);
                    signal(frozen, Signal::CONT);
                });
                Verdict::Pass
            }
            Blow::Fault(verdict) => verdict,
        }
    }
}

struct Trial {
    source: Service,
    destination: Service,
    sockets: [PathBuf; 2],
    vm: VmId,
    port: PathBuf,
    sent: VmId,
    received: VmId,
}

fn name(info: &MigrationInfo) -> VmId {
    info.id.parse().unwrap()
}

/// Waits for a migration to come to something.
async fn until(at: &Service, id: &VmId, wanted: impl Fn(&MigrationInfo) -> bool) -> MigrationInfo {
    at.until(id, PATIENCE, wanted).await.unwrap()
}

async fn over(at: &Service, id: &VmId) -> MigrationPhase {
    until(at, id, |info| info.phase.is_over()).await.phase
}

async fn reaches(at: &Service, id: &VmId, phase: MigrationPhase) {
    until(at, id, |info| info.phase == phase).await;
}

async fn runs(at: &Service, vm: &VmId) -> bool {
    matches!(at.client().vms_info(vm).await, Ok(info) if info.state == VmState::Running)
}

async fn has(at: &Service, vm: &VmId) -> bool {
    at.client().vms_info(vm).await.is_ok()
}

async fn await_at(at: &Service, socket: &std::path::Path) -> MigrationInfo {
    let body = AwaitMigration::at(format!("unix:{}", socket.display()));
    at.client().migrations_receive(&body).await.unwrap()
}

async fn begin(case: &Case) -> (Trial, Arc<Marks>) {
    let (source, destination) =
        tokio::join!(Service::start(Face::Many), Service::start(Face::Many));
    let (source, destination) = (source.unwrap(), destination.unwrap());
    let (vm, port) = dirtier::boot_with(&source, Some(MEMORY)).await.unwrap();
    let sockets = [source.path("to"), source.path("at")];
    let received = name(&await_at(&destination, &sockets[1]).await);
    let marks = Arc::new(Marks::default());
    let pids = [source.pid(), destination.pid()];
    let judge = judge(*case, pids, marks.clone());
    Proxy::between(&sockets[0], &sockets[1], judge).unwrap();
    let what = StartMigration {
        mode: case.mode,
        connections: Some(1),
        verify: true,
        max_bandwidth: case.bandwidth(),
        ..StartMigration::to(format!("unix:{}", sockets[0].display()))
    };
    let sent = name(&source.client().vms_migrate(&vm, &what).await.unwrap());
    marks.begun.store(true, Ordering::SeqCst);
    let trial = Trial {
        source,
        destination,
        sockets,
        vm,
        port,
        sent,
        received,
    };
    (trial, marks)
}

/// Waits for the death of a side, which comes at a frame that the migration sends, if it does.
async fn dies(service: &mut Service, migration: &VmId) {
    if let Err(error) = service.ended(PATIENCE).await {
        panic!(
            "{error:#}\n{:#?}",
            service.client().migrations_info(migration).await
        );
    }
}

async fn at_destination(trial: &Trial) {
    let Trial {
        destination,
        vm,
        received,
        ..
    } = trial;
    assert_eq!(over(destination, received).await, MigrationPhase::Completed);
    assert!(runs(destination, vm).await);
    dirtier::check(&trial.port).await.unwrap();
}

async fn at_source(trial: &Trial) {
    assert_eq!(
        over(&trial.source, &trial.sent).await,
        MigrationPhase::Failed
    );
    assert!(runs(&trial.source, &trial.vm).await);
    dirtier::check(&trial.port).await.unwrap();
}

async fn run(case: Case) {
    let (mut trial, marks) = begin(&case).await;
    let victim = match case.blow {
        Blow::Kill(side) | Blow::KillAfter(side) => Some(side),
        Blow::Freeze(_) | Blow::Fault(_) => None,
    };
    match victim {
        Some(Side::Source) => dies(&mut trial.source, &trial.sent).await,
        Some(Side::Destination) => dies(&mut trial.destination, &trial.received).await,
        None => {}
    }
    let vm = &trial.vm.clone();
    match case.ends {
        Ends::AtSource => {
            at_source(&trial).await;
            if victim.is_none() {
                let phase = over(&trial.destination, &trial.received).await;
                assert_eq!(phase, MigrationPhase::Failed);
                assert!(!has(&trial.destination, vm).await);
            }
        }
        Ends::AtDestination => {
            at_destination(&trial).await;
            if victim.is_none() {
                let phase = over(&trial.source, &trial.sent).await;
                assert_eq!(phase, MigrationPhase::Completed);
                assert!(!has(&trial.source, vm).await);
            }
        }
        Ends::InDoubtAtDestination => {
            reaches(&trial.destination, &trial.received, MigrationPhase::InDoubt).await;
            assert!(!runs(&trial.destination, vm).await);
            refused_with_advice(&trial.destination, vm).await;
            resolve(&trial.destination, &trial.received, MigrationOutcome::Run).await;
            at_destination(&trial).await;
        }
        Ends::AtSourceOnceAsked => {
            reaches(&trial.source, &trial.sent, MigrationPhase::InDoubt).await;
            assert!(!runs(&trial.source, vm).await);
            refused_with_advice(&trial.source, vm).await;
            trial.destination.start_again().await.unwrap();
            await_at(&trial.destination, &trial.sockets[1]).await;
            at_source(&trial).await;
            assert!(!has(&trial.destination, vm).await);
        }
        Ends::Unheard => {
            // A connection without a valid hello does not end the wait.
            if victim.is_none() {
                at_source(&trial).await;
            }
            let waits = MigrationPhase::Connecting;
            reaches(&trial.destination, &trial.received, waits).await;
            assert!(!has(&trial.destination, vm).await);
        }
        Ends::Lost if victim == Some(Side::Destination) => {
            trial.destination.start_again().await.unwrap();
            await_at(&trial.destination, &trial.sockets[1]).await;
            let phase = over(&trial.source, &trial.sent).await;
            assert_eq!(phase, MigrationPhase::Completed);
            assert!(!has(&trial.source, vm).await);
            assert!(!has(&trial.destination, vm).await);
        }
        Ends::Lost => {
            let phase = over(&trial.destination, &trial.received).await;
            assert_eq!(phase, MigrationPhase::Failed);
            assert!(!has(&trial.destination, vm).await);
        }
        Ends::LostInHalves => {
            let (left, id) = match victim {
                Some(Side::Source) => (&trial.destination, &trial.received),
                _ => (&trial.source, &trial.sent),
            };
            // A source that did not hear that the guest runs there does not know where it is.
            let stands = [MigrationPhase::PostcopyPaused, MigrationPhase::InDoubt];
            let info = until(left, id, |info| stands.contains(&info.phase)).await;
            if info.phase == MigrationPhase::PostcopyPaused && info.side == MigrationSide::Source {
                // The guest is not here, whatever became of it.
                let shown = left.client().vms_info(vm).await.unwrap();
                assert_eq!(shown.state, VmState::Paused);
                let failure = shown.failure.map(|failure| failure.code);
                assert_eq!(failure.as_deref(), Some("destination-lost"));
                refused_with_advice(left, vm).await;
            }
            if case.is_deleted {
                left.client().vms_delete(vm).await.unwrap();
            } else {
                resolve(left, id, MigrationOutcome::Discard).await;
            }
            let info = until(left, id, |info| info.phase.is_over()).await;
            if case.is_deleted {
                assert_eq!(info.phase, MigrationPhase::Failed, "{info:?}");
                assert_eq!(info.error.unwrap().code, "guest-ended");
                happened(left, vm, "arrival-failed").await;
            }
            assert!(!has(left, vm).await);
        }
    }
    assert!(
        marks.fell.load(Ordering::SeqCst),
        "no such frame came: {case:?}"
    );
}

async fn all(cases: Vec<Case>) {
    trials(cases, AT_ONCE, run).await;
}

fn case(from: Side, name: &'static str, nth: usize, blow: Blow, ends: Ends) -> Case {
    Case {
        mode: MemoryMode::Precopy,
        from,
        name,
        nth,
        blow,
        ends,
        is_deleted: false,
    }
}

use Side::{Destination, Source};

/// The first frames: until the destination has accepted the offer, the source is a stranger.
const BEFORE_PREPARED: [(Side, &str, usize); 3] = [
    (Source, "Hello", 0),
    (Destination, "Welcome", 0),
    (Source, "Prepare", 0),
];

/// The frames of a precopy from there until the answer to the last state.
const BEFORE_READY: [(Side, &str, usize); 8] = [
    (Destination, "Prepared", 0),
    (Source, "Pages", 0),
    (Source, "Round", 0),
    (Destination, "RoundDone", 0),
    (Source, "SavedState", 0),
    (Destination, "GuessLoaded", 0),
    (Source, "Hashes", 0),
    (Source, "SavedState", 1),
];

#[tokio::test(flavor = "multi_thread")]
async fn source_killed_at_any_step() {
    let at = |(from, name, nth), ends| case(from, name, nth, Blow::Kill(Source), ends);
    let first = BEFORE_PREPARED.map(|frame| at(frame, Ends::Unheard));
    let early = first.into_iter();
    let early = early.chain(BEFORE_READY.map(|frame| at(frame, Ends::Lost)));
    let late = [
        // It has all that it needs.
        case(
            Source,
            "SavedState",
            1,
            Blow::KillAfter(Source),
            Ends::InDoubtAtDestination,
        ),
        case(
            Destination,
            "Ready",
            0,
            Blow::Kill(Source),
            Ends::InDoubtAtDestination,
        ),
        case(
            Source,
            "Commit",
            0,
            Blow::Kill(Source),
            Ends::InDoubtAtDestination,
        ),
        case(
            Source,
            "Commit",
            0,
            Blow::KillAfter(Source),
            Ends::AtDestination,
        ),
        case(
            Destination,
            "Running",
            0,
            Blow::Kill(Source),
            Ends::AtDestination,
        ),
        case(
            Source,
            "Complete",
            0,
            Blow::Kill(Source),
            Ends::AtDestination,
        ),
    ];
    all(early.chain(late).collect()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn destination_killed_at_any_step() {
    let early = BEFORE_PREPARED
        .into_iter()
        .chain(BEFORE_READY)
        .map(|(from, name, nth)| case(from, name, nth, Blow::Kill(Destination), Ends::AtSource));
    let late = [
        case(
            Destination,
            "Ready",
            0,
            Blow::Kill(Destination),
            Ends::AtSource,
        ),
        // The source has given the guest away to who is not there.
        case(
            Destination,
            "Ready",
            0,
            Blow::KillAfter(Destination),
            Ends::AtSourceOnceAsked,
        ),
        case(
            Source,
            "Commit",
            0,
            Blow::Kill(Destination),
            Ends::AtSourceOnceAsked,
        ),
        case(
            Destination,
            "Running",
            0,
            Blow::Kill(Destination),
            Ends::Lost,
        ),
        case(
            Destination,
            "Running",
            0,
            Blow::KillAfter(Destination),
            Ends::Lost,
        ),
    ];
    all(early.into_iter().chain(late).collect()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn side_killed_in_postcopy() {
    let half = |from, name, nth, blow| Case {
        mode: MemoryMode::Postcopy,
        ..case(from, name, nth, blow, Ends::LostInHalves)
    };
    all(vec![
        Case {
            is_deleted: true,
            ..half(Source, "Pages", 5, Blow::Kill(Source))
        },
        half(Source, "Pages", 5, Blow::Kill(Source)),
        half(Source, "Pages", 5, Blow::Kill(Destination)),
        half(Source, "PagesSent", 0, Blow::Kill(Destination)),
    ])
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn stream_damaged_at_any_step() {
    let harms = [Verdict::Cut, Verdict::Truncate, Verdict::Corrupt];
    let early = BEFORE_READY.into_iter().chain([(Destination, "Ready", 0)]);
    let early = early.map(|(from, name, nth)| (from, name, nth, Ends::AtSource));
    let late = [
        (Source, "Commit", 0, Ends::AtDestination),
        (Destination, "Running", 0, Ends::AtDestination),
        (Source, "Complete", 0, Ends::AtDestination),
    ];
    let first = BEFORE_PREPARED.map(|(from, name, nth)| (from, name, nth, Ends::Unheard));
    let precopy = first
        .into_iter()
        .chain(early)
        .chain(late)
        .flat_map(|(from, name, nth, ends)| {
            harms.map(|harm| case(from, name, nth, Blow::Fault(harm), ends))
        });
    let later = [
        (Source, "Missing", 0, Ends::AtSource),
        (Source, "Pages", 5, Ends::AtDestination),
        // The devices' state is loaded where rings are missing.
        (Destination, "Fault", 0, Ends::AtSource),
        (Destination, "Fault", 6, Ends::AtDestination),
        (Source, "PagesSent", 0, Ends::AtDestination),
        (Destination, "Completed", 0, Ends::AtDestination),
    ];
    let postcopy = later.into_iter().flat_map(|(from, name, nth, ends)| {
        harms.map(|harm| Case {
            mode: MemoryMode::Postcopy,
            ..case(from, name, nth, Blow::Fault(harm), ends)
        })
    });
    all(precopy.chain(postcopy).collect()).await;
}

/// Silence is a lost connection, after ten seconds; slowness is not.
#[tokio::test(flavor = "multi_thread")]
async fn stalled_and_slow_streams() {
    let stall = Blow::Fault(Verdict::Stall);
    let late = Blow::Fault(Verdict::Late(Duration::from_secs(3)));
    let mut cases = vec![
        case(Destination, "Prepared", 0, stall, Ends::AtSource),
        case(Source, "Pages", 0, stall, Ends::AtSource),
        case(Destination, "Ready", 0, stall, Ends::AtSource),
        case(Source, "Commit", 0, stall, Ends::AtDestination),
        case(Destination, "Running", 0, stall, Ends::AtDestination),
        case(Destination, "Prepared", 0, late, Ends::AtDestination),
        case(Source, "Pages", 0, late, Ends::AtDestination),
        case(Source, "Commit", 0, late, Ends::AtDestination),
    ];
    for blow in [stall, late] {
        cases.push(Case {
            mode: MemoryMode::Postcopy,
            ..case(Source, "Pages", 5, blow, Ends::AtDestination)
        });
    }
    all(cases).await;
}

/// A service that is stopped and continued (SIGSTOP, SIGCONT) finds its blocking calls interrupted
/// (`EINTR`). That is no reason for a migration to fail, in any phase and at either side.
#[tokio::test(flavor = "multi_thread")]
async fn side_frozen_at_any_step() {
    let hand_over = [
        (Destination, "Ready", 0),
        (Source, "Commit", 0),
        (Destination, "Running", 0),
        (Source, "Complete", 0),
    ];
    let postcopy = [
        (Source, "Missing", 0),
        (Source, "Pages", 5),
        (Destination, "Fault", 6),
        (Source, "PagesSent", 0),
    ];
    let mut cases = Vec::new();
    for side in [Source, Destination] {
        let first = [(Destination, "Welcome", 0), (Source, "Prepare", 0)];
        let frames = first.into_iter().chain(BEFORE_READY);
        for (from, name, nth) in frames.chain(hand_over) {
            let blow = Blow::Freeze(side);
            cases.push(case(from, name, nth, blow, Ends::AtDestination));
        }
        for (from, name, nth) in postcopy {
            cases.push(Case {
                mode: MemoryMode::Postcopy,
                ..case(from, name, nth, Blow::Freeze(side), Ends::AtDestination)
            });
        }
    }
    all(cases).await;
}
