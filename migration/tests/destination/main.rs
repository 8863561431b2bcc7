//! A destination, and a source that is a script: it says what the test says, and stops where the test
//! stops. Machines are of memory alone.

#![allow(clippy::unwrap_used, clippy::panic, reason = "tests")]

mod trickle;
mod wait;

use std::io::Write as _;
use std::sync::atomic::Ordering;
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use migration::testing::Peer;
use migration::{Dial as _, Phase, Report, Resolution, Step};
use serde_json::json;
use uuid::Uuid;

use wait::{BOUND, Mood, NEVER_RAN, RAN, Wait, commit, offer};

const PATIENT: Duration = BOUND;
/// The step at which the test cuts the connection.
const HASTY: Duration = Duration::from_millis(300);

#[test]
fn stranger_does_not_end_the_wait() {
    let wait = Wait::new(PATIENT, false);
    let connecting = |report: &Report, code: &str| {
        let error = report.error.as_ref();
        report.phase == Phase::Connecting && error.is_some_and(|error| error.code == code)
    };
    // It leaves after its hello.
    drop(Peer::control(&wait.way, Uuid::from_u128(1)));
    wait.until(|report| connecting(report, "connection-lost"));
    // It says something else than its offer.
    let mut odd = Peer::control(&wait.way, Uuid::from_u128(2));
    assert!(odd.say(&commit()));
    wait.until(|report| connecting(report, "stream-damaged"));
    // It gives up by itself.
    let mut shy = Peer::control(&wait.way, Uuid::from_u128(3));
    let why = json!({ "Abort": { "code": "changed-its-mind", "detail": "no" } });
    assert!(shy.say(&why));
    wait.until(|report| connecting(report, "changed-its-mind"));
    wait.completes(Uuid::from_u128(4));
}

#[test]
fn refused_offer_keeps_waiting() {
    let wait = Wait::new(PATIENT, false);
    wait.become_(Mood::Refuses);
    let mut source = wait.offered(Uuid::from_u128(1));
    assert!(source.recv().unwrap().contains("cpu-lacks-features"));
    let refused = |report: &Report| report.phase == Phase::Connecting && report.error.is_some();
    assert_eq!(
        wait.until(refused).error.unwrap().code,
        "cpu-lacks-features"
    );
    // The memory that it speaks of is not what the machine has.
    wait.become_(Mood::Willing);
    let mut source = Peer::control(&wait.way, Uuid::from_u128(2));
    let mut wrong = offer(1);
    wrong.blocks[0].size *= 2;
    assert!(source.offer(&wrong));
    assert!(source.recv().unwrap().starts_with("Welcome"));
    assert!(source.recv().unwrap().contains("memory-differs"));
    assert!(wait.marks.discarded.swap(false, Ordering::SeqCst));
    // Even a fault of this program costs one offer, and nothing else.
    wait.become_(Mood::PanicsAtOffer);
    let mut source = wait.offered(Uuid::from_u128(3));
    assert!(source.recv().is_err());
    wait.completes(Uuid::from_u128(4));
}

#[test]
fn a_refused_offer_ends_a_wait_for_one() {
    let mut wait = Wait::new(PATIENT, true);
    drop(Peer::control(&wait.way, Uuid::from_u128(1)));
    wait.until(|report| report.error.is_some());
    wait.become_(Mood::Refuses);
    let mut source = wait.offered(Uuid::from_u128(2));
    assert!(source.recv().unwrap().contains("cpu-lacks-features"));
    assert_eq!(wait.outcome().unwrap_err().code, "cpu-lacks-features");
}

/// They sit there and say nothing, or the beginning of something, in any number.
#[test]
fn silent_connections_keep_no_source_out() {
    let wait = Wait::new(PATIENT, false);
    let (mut silent, mut greeted) = (Vec::new(), Vec::new());
    // More than MAX_PENDING (64), so the router has to evict some to admit the source.
    for number in 0..300_u32 {
        let mut stream = wait.way.dial().unwrap();
        // The beginning of a frame.
        if number % 2 == 0 && stream.write_all(&[1, 0, 0, 0]).is_err() {
            continue;
        }
        silent.push(stream);
    }
    for number in 0..100 {
        // These have said hello, so they have the longer limit of an offer.
        greeted.push(Peer::control(&wait.way, Uuid::from_u128(10_000 + number)));
    }
    wait.completes(Uuid::from_u128(1));
    drop((silent, greeted));
}

#[test]
fn unknown_connections_are_answered() {
    let wait = Wait::new(PATIENT, false);
    let id = Uuid::from_u128(1);
    let refused = |peer: &mut Peer, code: &str| {
        let heard = peer.recv().unwrap();
        assert!(
            heard.starts_with("Refused") && heard.contains(code),
            "{heard}"
        );
    };
    refused(&mut Peer::ram(&wait.way, id, 0), "out-of-order");
    let mut source = wait.offered(id);
    assert!(source.recv().unwrap().starts_with("Prepared"));
    // While a migration is in progress. Its own outcome is open: no answer is made up.
    refused(&mut Peer::control(&wait.way, Uuid::from_u128(2)), "busy");
    refused(&mut Peer::again(&wait.way, id), "out-of-order");
    // Of two connections for one channel, either may be routed first. The other one is refused.
    let (tell, heard) = mpsc::channel();
    for _ in 0..2 {
        let mut peer = Peer::ram(&wait.way, id, 0);
        let tell = tell.clone();
        // The one with the channel hears nothing until the migration ends.
        thread::spawn(move || tell.send(peer.recv()));
    }
    let first = heard.recv().unwrap().unwrap();
    assert!(first.contains("out-of-order"), "{first}");
    let mut kept = Vec::new();
    // A refused connection must leave nothing behind: enough of them to exhaust a limit if it did.
    for _ in 0..40 {
        let mut second = Peer::ram(&wait.way, id, 0);
        refused(&mut second, "out-of-order");
        let mut beyond = Peer::ram(&wait.way, id, 1);
        refused(&mut beyond, "out-of-order");
        kept.extend([second, beyond]);
    }
    // Earlier migrations, unlike the one in progress, have an outcome in the journal.
    let asks = |id| Peer::again(&wait.way, id).recv().unwrap();
    assert_eq!(asks(RAN), "Ended");
    assert!(asks(NEVER_RAN).starts_with("NotHere"));
    assert!(asks(Uuid::from_u128(9)).contains("unknown-migration"));
    wait.decision.cancel().unwrap();
}

#[test]
fn discard_is_answered_to_source() {
    let mut wait = Wait::new(PATIENT, false);
    let id = Uuid::from_u128(1);
    let (mut source, _ram) = wait.ready(id);
    assert!(source.recv().unwrap().starts_with("Ready"));
    assert!(
        !wait.decision.resolve(Resolution::Discard),
        "there is no doubt"
    );
    // The source is lost behind `Ready`: it may have committed, so the destination must wait.
    drop(source);
    wait.until(|report| report.phase == Phase::InDoubt);
    assert!(wait.decision.resolve(Resolution::Discard));
    wait.until(|report| report.phase.is_over());
    assert!(wait.marks.discarded.load(Ordering::SeqCst));
    let heard = Peer::again(&wait.way, id).recv().unwrap();
    assert!(
        heard.starts_with("NotHere") && heard.contains("resolved"),
        "{heard}"
    );
    assert_eq!(wait.outcome().unwrap_err().code, "resolved");
    let steps = wait.marks.steps.lock().unwrap();
    assert_eq!(steps[..], [Step::Prepare, Step::Ready, Step::Aborted]);
}

/// The operator was promised that the guest does not run there: an order that comes later is refused.
#[test]
fn discard_wins_over_late_commit() {
    let mut wait = Wait::new(PATIENT, false);
    let id = Uuid::from_u128(1);
    let (mut source, _ram) = wait.ready(id);
    assert!(source.recv().unwrap().starts_with("Ready"));
    drop(source);
    wait.until(|report| report.phase == Phase::InDoubt);
    let mut source = Peer::again(&wait.way, id);
    assert_eq!(source.recv().unwrap(), "Waiting");
    // The destination reads from its source at this point, so the decision waits in the open
    // question until the commit comes.
    assert!(wait.decision.resolve(Resolution::Discard));
    assert!(source.say(&commit()));
    assert!(source.recv().unwrap().starts_with("NotHere"));
    assert_eq!(wait.outcome().unwrap_err().code, "resolved");
    assert!(!wait.marks.runs.load(Ordering::SeqCst));
}

/// An `Abort` of the source is final: the guest may run there already.
#[test]
fn abort_wins_over_run() {
    let mut wait = Wait::new(PATIENT, false);
    let id = Uuid::from_u128(1);
    let (mut source, _ram) = wait.ready(id);
    assert!(source.recv().unwrap().starts_with("Ready"));
    drop(source);
    wait.until(|report| report.phase == Phase::InDoubt);
    let mut source = Peer::again(&wait.way, id);
    assert_eq!(source.recv().unwrap(), "Waiting");
    // Accepted, but not acted on: a source is connected, and it decides differently.
    assert!(wait.decision.resolve(Resolution::Run));
    assert!(source.say(&json!({ "Abort": { "code": "stays", "detail": "it stays" } })));
    assert!(source.recv().unwrap().starts_with("NotHere"));
    assert_eq!(wait.outcome().unwrap_err().code, "stays");
    assert!(!wait.marks.runs.load(Ordering::SeqCst));
}

/// Behind the commit point nothing can be canceled: a source that only shows that it lives must not
/// hold the guest for ever.
#[test]
fn undecided_source_leaves_doubt() {
    let mut wait = Wait::new(HASTY, false);
    let id = Uuid::from_u128(1);
    let (mut source, _ram) = wait.ready(id);
    assert!(source.recv().unwrap().starts_with("Ready"));
    assert!(wait.decision.cancel().is_err());
    // Until it is not listened to any more.
    while source.say(&json!({ "Ping": 1 })) && source.recv().is_ok() {
        thread::sleep(HASTY / 20);
    }
    wait.until(|report| report.phase == Phase::InDoubt);
    assert!(wait.decision.resolve(Resolution::Run));
    let mut source = Peer::again(&wait.way, id);
    assert!(source.recv().unwrap().starts_with("Running"));
    assert!(source.say("Complete"));
    assert_eq!(wait.outcome(), Ok(()));
}

/// The guest may have run: the source must not resume it. The guest is lost, and both sides report that.
#[test]
fn maybe_run_is_not_never_ran() {
    for (number, mood) in [(1, Mood::MayHaveRun), (2, Mood::PanicsInStart)] {
        let mut wait = Wait::new(PATIENT, false);
        let id = Uuid::from_u128(number);
        let (mut source, _ram) = wait.ready(id);
        assert!(source.recv().unwrap().starts_with("Ready"));
        wait.become_(mood);
        assert!(source.say(&commit()));
        let heard = source
            .recv()
            // A panic drops the control connection. The answer then comes from `linger`.
            .or_else(|_| Peer::again(&wait.way, id).recv())
            .unwrap();
        assert_eq!(heard, "Ended", "{mood:?}");
        assert!(wait.outcome().is_err());
        assert!(wait.marks.discarded.load(Ordering::SeqCst));
        // A restarted host answers from the last step, so it must not be `Aborted`.
        let steps = wait.marks.steps.lock().unwrap();
        assert_eq!(steps.last(), Some(&Step::Running), "{mood:?}");
    }
}

#[test]
fn panic_before_commit_keeps_guest_at_source() {
    let mut wait = Wait::new(PATIENT, false);
    let id = Uuid::from_u128(1);
    wait.become_(Mood::PanicsInLoad);
    let (mut source, _ram) = wait.ready(id);
    assert!(source.recv().is_err());
    // While the stack unwinds the migration is still in progress: a source asks again.
    let start = Instant::now();
    let heard = loop {
        let heard = Peer::again(&wait.way, id).recv().unwrap();
        if !heard.contains("still in progress") || start.elapsed() > BOUND {
            break heard;
        }
        thread::sleep(Duration::from_millis(1));
    };
    assert!(heard.starts_with("NotHere"), "{heard}");
    assert_eq!(wait.outcome().unwrap_err().code, "internal");
    assert!(wait.marks.discarded.load(Ordering::SeqCst));
}

/// The source is lost, so the copy here may be the only one: a lock that another process holds must not
/// cost it.
#[test]
fn guest_that_cannot_run_now_stays_in_doubt() {
    let mut wait = Wait::new(PATIENT, false);
    let id = Uuid::from_u128(1);
    let (mut source, _ram) = wait.ready(id);
    assert!(source.recv().unwrap().starts_with("Ready"));
    drop(source);
    wait.until(|report| report.phase == Phase::InDoubt);
    let obstacles = [
        (Mood::Locked, "cannot-be-taken-over"),
        (Mood::NeverRuns, "cannot-go-on"),
    ];
    for (mood, code) in obstacles {
        wait.become_(mood);
        assert!(wait.decision.resolve(Resolution::Run));
        let why = wait.decision.outcome(BOUND).unwrap_err();
        assert_eq!(why.code, code);
        let report = wait.progress.report();
        assert_eq!((report.phase, report.error), (Phase::InDoubt, Some(why)));
        assert!(!wait.marks.discarded.load(Ordering::SeqCst), "{mood:?}");
        // A restarted host answers from the last step.
        let last = wait.marks.steps.lock().unwrap().last().copied();
        assert_eq!(last, Some(Step::Ready), "{mood:?}");
    }
    wait.become_(Mood::Willing);
    assert!(wait.decision.resolve(Resolution::Run));
    assert_eq!(wait.decision.outcome(BOUND), Ok(()));
    let mut source = Peer::again(&wait.way, id);
    assert!(source.recv().unwrap().starts_with("Running"));
    assert!(source.say("Complete"));
    assert_eq!(wait.outcome(), Ok(()));
    assert!(wait.marks.runs.load(Ordering::SeqCst));
}

/// Pings show that a source lives, and loading a state on trial that it is busy. Neither may hold the
/// endpoint and a machine for ever.
#[test]
fn source_that_sends_no_guest_loses_its_place() {
    let ping = |source: &mut Peer| source.say(&json!({ "Ping": 1 }));
    let guess = |source: &mut Peer| source.say("Guess") && source.frame(3, b"state");
    let busy: [&dyn Fn(&mut Peer) -> bool; 2] = [&ping, &guess];
    for (number, say) in (1..).zip(busy) {
        let mut wait = Wait::new(HASTY, false);
        let id = Uuid::from_u128(number);
        let mut source = wait.offered(id);
        let mut heard = source.recv().unwrap();
        assert!(heard.starts_with("Prepared"));
        let _ram = Peer::ram(&wait.way, id, 0);
        let start = Instant::now();
        while !heard.contains("source-stalled") && start.elapsed() < BOUND {
            // It fails once the destination reads no more, which has sent the reason by then.
            let _ = say(&mut source);
            let Ok(answer) = source.recv() else { break };
            heard = answer;
            thread::sleep(HASTY / 20);
        }
        assert!(heard.contains("source-stalled"), "{number}: {heard}");
        assert_eq!(wait.outcome().unwrap_err().code, "source-stalled");
        assert!(wait.marks.discarded.load(Ordering::SeqCst));
    }
}
