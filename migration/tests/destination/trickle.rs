//! Sources that send a byte now and then, or only show that they live, for as long as anybody listens.

use std::thread;
use std::time::{Duration, Instant};

use migration::testing::Peer;
use migration::{Phase, Report};
use serde_json::json;
use uuid::Uuid;

use super::wait::{BOUND, Wait, commit};

/// How long the destination lets a source be silent.
const PATIENCE: Duration = Duration::from_secs(1);
const ID: Uuid = Uuid::from_u128(1);

/// Sends the beginning of a control message, byte by byte, until nobody listens.
fn trickle(mut source: Peer) {
    let start = Instant::now();
    // Of 1 MiB.
    let mut head = [2, 0, 0, 0, 0, 0, 16, 0, 1, 2, 3, 4].into_iter();
    while source.bytes(&[head.next().unwrap_or(0)]) {
        assert!(start.elapsed() < BOUND, "it is listened to for ever");
        thread::sleep(PATIENCE / 20);
    }
}

fn is_completed(report: &Report) -> bool {
    report.phase == Phase::Completed
}

/// The guest runs: the source only has to say that it knows.
#[test]
fn after_the_start() {
    let mut wait = Wait::new(PATIENCE, false);
    let (mut source, _ram) = wait.ready(ID);
    assert!(source.recv().unwrap().starts_with("Ready"));
    assert!(source.say(&commit()));
    assert!(source.recv().unwrap().starts_with("Running"));
    trickle(source);
    wait.until(is_completed);
    // It may ask, and trickle again.
    let mut again = Peer::again(&wait.way, ID);
    assert!(again.recv().unwrap().starts_with("Running"));
    trickle(again);
    // It need not answer anybody any more.
    wait.decision.relieve();
    assert_eq!(wait.outcome(), Ok(()));
}

#[test]
fn while_pages_follow() {
    let mut wait = Wait::new(PATIENCE, false);
    let (mut source, channels) = wait.ready_to_follow(ID);
    assert!(source.recv().unwrap().starts_with("Ready"));
    assert!(source.say(&commit()));
    assert!(source.recv().unwrap().starts_with("Running"));
    assert!(source.say("Complete"));
    wait.until(|report| report.phase == Phase::Postcopy);
    trickle(source);
    wait.until(|report| report.phase == Phase::PostcopyPaused);
    drop(channels);
    let mut source = Peer::again(&wait.way, ID);
    assert!(source.recv().unwrap().starts_with("Prepared"));
    let mut ram = Peer::ram(&wait.way, ID, 0);
    let _faults = Peer::faults(&wait.way, ID);
    assert!(ram.frame(18, &2_u32.to_le_bytes()));
    assert!(source.say(&json!({ "PagesSent": { "round": 2 } })));
    assert_eq!(source.recv().unwrap(), "Completed");
    trickle(source);
    wait.until(is_completed);
    // It need not answer anybody any more.
    wait.decision.relieve();
    assert_eq!(wait.outcome(), Ok(()));
}

/// The VM was ended: a source that has more to send, and shows that it lives, has nothing to wait for.
#[test]
fn pings_do_not_hold_what_is_left_of_an_ended_vm() {
    let mut wait = Wait::new(BOUND, false);
    let (mut source, _channels) = wait.ready_to_follow(ID);
    assert!(source.recv().unwrap().starts_with("Ready"));
    assert!(source.say(&commit()));
    assert!(source.recv().unwrap().starts_with("Running"));
    assert!(source.say("Complete") && source.say(&json!({ "Ping": 1 })));
    assert_eq!(source.recv().unwrap(), "Pong(1)");
    let ram = wait.marks.ram.lock().unwrap().take().unwrap();
    ram.lose_awaited();
    assert!(source.say(&json!({ "Ping": 2 })));
    assert_eq!(source.recv().unwrap(), "Completed");
    assert!(source.say("Complete"));
    assert_eq!(wait.outcome(), Ok(()));
}

/// Pages that are not needed any more, without an end, are not received either.
#[test]
fn rounds_without_end_do_not_hold_what_is_left_of_an_ended_vm() {
    let mut wait = Wait::new(PATIENCE, false);
    let (mut source, [mut ram, _faults]) = wait.ready_to_follow(ID);
    assert!(source.recv().unwrap().starts_with("Ready"));
    assert!(source.say(&commit()));
    assert!(source.recv().unwrap().starts_with("Running"));
    assert!(source.say("Complete"));
    assert!(source.say(&json!({ "PagesSent": { "round": 2 } })));
    wait.until(|report| report.phase == Phase::Postcopy);
    let memory = wait.marks.ram.lock().unwrap().take().unwrap();
    memory.lose_awaited();
    let start = Instant::now();
    // One page of zeros, again and again: block, runs, and the run.
    let zeros = [0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0];
    while ram.frame(17, &zeros) {
        assert!(start.elapsed() < BOUND, "it is listened to for ever");
        thread::sleep(PATIENCE / 20);
    }
    let mut again = Peer::again(&wait.way, ID);
    assert_eq!(again.recv().unwrap(), "Completed");
    assert!(again.say("Complete"));
    assert_eq!(wait.outcome(), Ok(()));
}

/// The migration has failed, and the source may say why.
#[test]
fn last_words() {
    let mut wait = Wait::new(PATIENCE, false);
    let mut source = wait.offered(ID);
    assert!(source.recv().unwrap().starts_with("Prepared"));
    let mut ram = Peer::ram(&wait.way, ID, 0);
    assert!(source.say(&json!({ "Round": 1 })));
    assert!(ram.bytes(b"no frame at all"));
    trickle(source);
    assert_eq!(wait.outcome().unwrap_err().code, "stream-damaged");
}

/// What limits the time of a source must not end with the listener.
#[test]
fn limits_outlive_the_listener() {
    let mut wait = Wait::new(PATIENCE, false);
    let (mut source, _ram) = wait.ready(ID);
    assert!(source.recv().unwrap().starts_with("Ready"));
    wait.close_way();
    trickle(source);
    wait.until(|report| report.phase == Phase::InDoubt);
    assert!(wait.decision.resolve(migration::Resolution::Discard));
    // It need not answer anybody any more.
    wait.decision.relieve();
    assert_eq!(wait.outcome().unwrap_err().code, "resolved");
}
