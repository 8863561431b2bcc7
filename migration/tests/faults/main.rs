//! Whole migrations between guests of memory and disks alone, over links that fail: cut, silent, damaged, and
//! with sides that die. Whatever happens, at most one copy runs, its memory and its disks are what they were, and the
//! outcome is the one that docs/migration.md promises. A run is its seed: `SEED=17 cargo test ...`
//! shows it again.

#![allow(clippy::unwrap_used, clippy::panic, reason = "tests")]

mod disk_user;
mod link;
mod script;
mod world;

use std::io::Write;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{self, Receiver};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use migration::testing::{MemoryGuest, ram};
use migration::{
    ConnectionLimit, Decision, Mode, Outcome, Phase, Policy, Progress, Receiving, Resolution,
    Sending, receive, send,
};
use uuid::Uuid;

use self::link::{Life, TestAccept, TestDial};
use self::script::{Dice, Script, script_of};
use self::world::{
    CLOCKS_STOPPED_BEFORE, Cpu, Paper, TestHost, TestJournal, TestSource, World, disks,
};

/// Number of runs; the environment variable `SEEDS` sets more.
const SEEDS: u64 = 400;
const PAGES: usize = 300;
/// The limit of the stop of a guest some of whose stops take longer.
const MAX_DOWNTIME: Duration = Duration::from_millis(10);
/// The patience of each side.
const PATIENCE: Duration = Duration::from_millis(250);
/// The patience of runs without faults, long enough for a busy machine.
const LONG_PATIENCE: Duration = Duration::from_secs(8);
/// No migration takes longer, whatever fails. Limits of the engine may add up before a side gives up: 5 s
/// for each connection that does not say what it is for.
const BOUND: Duration = Duration::from_secs(60);

#[derive(Debug)]
struct Ending {
    outcome: Outcome,
    source: Phase,
    destination: Phase,
    took: Duration,
}

/// Receives, and once more if the process died: then with nothing but what was written down.
fn destination(
    host: TestHost,
    from: Receiver<UnixStream>,
    progress: &Progress,
    decision: &Decision,
    patience: Duration,
) -> Phase {
    let (mut host, mut from) = (host, from);
    loop {
        let mut accept = TestAccept {
            from,
            life: Arc::clone(&host.life),
        };
        let limit = ConnectionLimit::default();
        let receiving = Receiving {
            accept: &mut accept,
            host: &host,
            progress,
            decision,
            limit: &limit,
            once: false,
            patience,
            lingers: &|| {},
        };
        let received = receive(receiving);
        if !host.life.is_dead() {
            return match received {
                Ok(()) => Phase::Completed,
                Err(_) => Phase::Failed,
            };
        }
        // What ran in it is gone with the process, and so are its locks.
        host.world.at_destination.store(false, Ordering::SeqCst);
        let mut lock = host.world.lock.lock().unwrap();
        lock.take_if(|who| *who == "destination");
        drop(lock);
        // The new process keeps the endpoint and the journals. Everything else begins anew.
        from = accept.from;
        host = TestHost {
            world: host.world,
            life: Life::new(None),
            papers: host.papers,
        };
    }
}

fn run(seed: u64, script: Script) -> (Ending, Arc<World>) {
    let world = Arc::new(World::default());
    world.at_source.store(true, Ordering::SeqCst);
    *world.lock.lock().unwrap() = Some("source");
    let (source_life, destination_life) = (
        Life::new(script.source_dies_at),
        Life::new(script.destination_dies_at),
    );
    let (to, from) = mpsc::channel();
    let dial = TestDial {
        to: Mutex::new(Some(to)),
        count: AtomicU64::new(0),
        plan: script.plan,
        life: Arc::clone(&source_life),
    };
    let host = TestHost {
        world: Arc::clone(&world),
        life: destination_life,
        papers: Mutex::default(),
    };
    let (here, there) = (Progress::default(), Progress::default());
    let (decide_here, decide_there) = (Decision::default(), Decision::default());
    let (far, decide_far, patience) = (there.clone(), decide_there.clone(), script.patience());
    let receiver = thread::spawn(move || destination(host, from, &far, &decide_far, patience));
    let paper = Paper::default();
    let (memory, disks) = (ram(PAGES), disks(script.disks));
    let mut guest = MemoryGuest::new(Arc::clone(&memory));
    guest.disks.clone_from(&disks);
    let mut source = TestSource {
        cpu: Cpu::start(memory, disks, seed, script.writes),
        guest,
        world: Arc::clone(&world),
        life: Arc::clone(&source_life),
        paper: paper.clone(),
        dice: Dice(seed),
        writes: script.writes,
        paused: false,
        long_stops: script.long_stops,
    };
    source.scribble();
    let policy = Policy {
        connections: Some(script.connections),
        mode: script.mode,
        // Precopy may never converge with this many writes. The deadline forces the stop.
        deadline: Some(Duration::from_millis(200)),
        at_deadline: migration::AtDeadline::Stop,
        patience: script.patience(),
        verify: script.verify,
        max_downtime: if script.long_stops > 0 {
            MAX_DOWNTIME
        } else {
            Policy::default().max_downtime
        },
        ..Policy::default()
    };
    let canceler = script.cancel_after_us.map(|us| {
        let decision = decide_here.clone();
        thread::spawn(move || {
            thread::sleep(Duration::from_micros(us));
            decision.cancel()
        })
    });
    let refuser = script.refuse_after_us.map(|us| {
        let decision = decide_there.clone();
        thread::spawn(move || {
            thread::sleep(Duration::from_micros(us));
            decision.cancel()
        })
    });
    // An operator resolves what a side cannot: the guest runs at a source whose destination cannot be
    // reached, and at a destination whose source is dead.
    let (watched, other) = (decide_here.clone(), decide_there.clone());
    let (dead, stop) = (Arc::clone(&source_life), Arc::new(AtomicBool::new(false)));
    let (ended, mourned) = (Arc::clone(&stop), Arc::clone(&world));
    let operator = thread::spawn(move || {
        while !ended.load(Ordering::SeqCst) {
            thread::sleep(Duration::from_millis(1));
            if dead.is_dead() {
                // What ran in it is gone with the process, and so are its locks.
                mourned.at_source.store(false, Ordering::SeqCst);
                mourned.lock.lock().unwrap().take_if(|who| *who == "source");
                let _ = watched.resolve(Resolution::Discard);
                // Refused in postcopy, where the dead source had the rest of the memory. Without
                // effect where the destination is dead, too.
                if !other.resolve(Resolution::Run) || other.outcome(BOUND).is_err() {
                    let _ = other.resolve(Resolution::Discard);
                }
            }
        }
    });
    let start = Instant::now();
    let mut journal = TestJournal {
        paper,
        life: Arc::clone(&source_life),
    };
    let sending = Sending {
        id: Uuid::from_u128(seed.into()),
        policy: &policy,
        dial: &dial,
        journal: &mut journal,
        progress: &here,
        decision: &decide_here,
    };
    let outcome = send(sending, &mut source);
    let took = start.elapsed();
    if let Outcome::Stayed { pending_abort, .. } = &outcome {
        if let Some(pending_abort) = pending_abort {
            pending_abort.send(&dial);
        }
        // It finds its end by itself; one that never heard of the guest, or began anew, waits for another.
        let waits = |phase: Phase| phase == Phase::Connecting || phase.is_over();
        while !receiver.is_finished() && !waits(there.report().phase) {
            assert!(start.elapsed() < BOUND, "SEED={seed}: {:?}", there.report());
            thread::sleep(Duration::from_micros(200));
        }
        let _ = decide_there.cancel();
    }
    drop(dial);
    let destination = receiver.join().unwrap();
    stop.store(true, Ordering::SeqCst);
    operator.join().unwrap();
    for canceler in canceler.into_iter().chain(refuser) {
        let _ = canceler.join().unwrap();
    }
    let ending = Ending {
        outcome,
        source: here.report().phase,
        destination,
        took,
    };
    (ending, world)
}

/// The invariants of every run.
fn check(seed: u64, script: &Script) -> Ending {
    check_world(seed, script).0
}

fn check_world(seed: u64, script: &Script) -> (Ending, Arc<World>) {
    let (ending, world) = run(seed, *script);
    let (at_source, at_destination) = (
        world.at_source.load(Ordering::SeqCst),
        world.at_destination.load(Ordering::SeqCst),
    );
    let told = format!(
        "SEED={seed} {script:?}: {ending:?}, runs at the source: {at_source}, at the destination: {at_destination}"
    );
    assert!(!(at_source && at_destination), "two copies: {told}");
    assert!(ending.took < BOUND, "it takes too long: {told}");
    assert!(ending.source.is_over(), "{told}");
    let dies = script.source_dies_at.is_some() || script.destination_dies_at.is_some();
    if !dies {
        assert!(at_source || at_destination, "the guest is lost: {told}");
        assert_eq!(ending.outcome == Outcome::Moved, at_destination, "{told}");
    }
    let differed = world.differed.load(Ordering::SeqCst);
    assert!(
        !differed || script.mode != Mode::Precopy,
        "memory differs: {told}"
    );
    let differed = world.disks_differed.load(Ordering::SeqCst);
    assert!(!differed, "disks differ, or are not durable: {told}");
    // Whatever fails, what is in the wrong place, or old, must not be.
    if let Outcome::Stayed { why, .. } = &ending.outcome {
        assert_ne!(why.code, "memory-differs-at", "{told}");
    }
    // A destination that dies behind the hand-over takes the guest with it, as every host does.
    if script.source_dies_at.is_none() && matches!(ending.outcome, Outcome::Stayed { .. }) {
        assert!(at_source, "it stayed, and is lost: {told}");
    }
    (ending, world)
}

#[test]
fn a_guest_moves_when_nothing_fails() {
    for (connections, mode) in [
        (1, Mode::Precopy),
        (2, Mode::Precopy),
        (3, Mode::Precopy),
        (1, Mode::Hybrid),
        (2, Mode::Auto),
        (2, Mode::Postcopy),
    ] {
        for (writes, disks) in [(0, 0), (0, 1), (20, 2), (400, 2)] {
            let script = Script {
                disks,
                is_patient: true,
                mode,
                connections,
                writes,
                verify: true,
                ..Script::default()
            };
            let (ending, world) = check_world(u64::from(connections), &script);
            let stopped_for = *world.stopped_for.lock().unwrap();
            assert!(stopped_for >= CLOCKS_STOPPED_BEFORE, "{stopped_for:?}");
            assert_eq!(ending.outcome, Outcome::Moved, "{script:?} {ending:?}");
            assert_eq!(ending.destination, Phase::Completed);
            let followed = world.followed.load(Ordering::SeqCst);
            let may_follow = mode == Mode::Postcopy && disks > 0 && writes > 0;
            assert!(followed > 0 || !may_follow, "{script:?}");
        }
    }
}

#[test]
fn exactly_one_copy_survives_any_fault() {
    let seeds = match std::env::var("SEED") {
        Ok(seed) => vec![seed.parse().unwrap()],
        Err(_) => {
            let count = std::env::var("SEEDS")
                .ok()
                .and_then(|count| count.parse().ok());
            (0..count.unwrap_or(SEEDS)).collect()
        }
    };
    let (moved, total) = (AtomicU64::new(0), seeds.len() as u64);
    let (start, seeds) = (Instant::now(), Mutex::new(seeds.into_iter()));
    // Most of the time is spent waiting for sides that are silent.
    thread::scope(|scope| {
        for _ in 0..6 {
            scope.spawn(|| {
                loop {
                    let next = seeds.lock().unwrap().next();
                    let Some(seed) = next else { return };
                    let _watch = Watch::begin(seed);
                    let ending = check(seed, &script_of(seed));
                    moved.fetch_add(
                        u64::from(ending.outcome == Outcome::Moved),
                        Ordering::SeqCst,
                    );
                }
            });
        }
    });
    let moved = moved.into_inner();
    assert!(
        moved > total / 20 || total < 20,
        "{moved} of {total} moved their guest"
    );
    println!(
        "{total} migrations in {:?}, {moved} of them moved their guest",
        start.elapsed()
    );
}

/// Silent or slow connections do not block other connections, nor the end of the wait.
#[test]
fn strangers_delay_no_source() {
    let (to, from) = mpsc::channel();
    let life = Life::new(None);
    let mut accept = TestAccept {
        from,
        life: Arc::clone(&life),
    };
    let host = TestHost {
        world: Arc::default(),
        life,
        papers: Mutex::default(),
    };
    let (progress, decision) = (Progress::default(), Decision::default());
    let receiving = Receiving {
        accept: &mut accept,
        host: &host,
        progress: &progress,
        decision: &decision,
        limit: &ConnectionLimit::default(),
        once: false,
        patience: LONG_PATIENCE,
        lingers: &|| {},
    };
    let (mut near, far) = UnixStream::pair().unwrap();
    to.send(far).unwrap();
    let canceler = {
        let decision = decision.clone();
        thread::spawn(move || {
            // The beginning of a greeting that is as long as one may be.
            near.write_all(&[1, 0, 0, 0, 0, 16, 0, 0]).unwrap();
            thread::sleep(Duration::from_millis(200));
            decision.cancel().unwrap();
            // It says the rest byte by byte, as long as it is listened to.
            while near.write_all(&[0]).is_ok() {
                thread::sleep(Duration::from_millis(100));
            }
        })
    };
    let start = Instant::now();
    assert_eq!(receive(receiving).unwrap_err().code, "canceled");
    assert!(
        start.elapsed() < Duration::from_secs(2),
        "{:?}",
        start.elapsed()
    );
    canceler.join().unwrap();
}

/// Ends the tests when a migration does not end, and says which.
struct Watch(Arc<AtomicBool>);

impl Watch {
    fn begin(seed: u64) -> Self {
        let over = Arc::new(AtomicBool::new(false));
        let watched = Arc::clone(&over);
        thread::spawn(move || {
            let start = Instant::now();
            while !watched.load(Ordering::SeqCst) {
                if start.elapsed() > BOUND * 2 {
                    eprintln!("SEED={seed} does not end: {:?}", script_of(seed));
                    // Not a panic: that would end this thread alone and leave the stuck migration
                    // running.
                    std::process::exit(101);
                }
                thread::sleep(Duration::from_millis(50));
            }
        });
        Self(over)
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.0.store(true, Ordering::SeqCst);
    }
}
