//! Decisions of an operator about a migration in doubt, while the other side cannot be reached.

#![allow(clippy::unwrap_used, clippy::panic, reason = "tests")]

mod pair;

use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use migration::testing::{MemoryGuest, Moment, ram};
use migration::{
    ConnectionLimit, Decision, NoJournal, Outcome, Phase, Policy, Progress, Receiving, Resolution,
    Sending, receive, send,
};
use uuid::Uuid;

use pair::{Dialer, PAGES, Place, Shared};

/// Long enough on a machine that has other things to do.
const BOUND: Duration = Duration::from_secs(20);

fn until(what: &str, is_so: impl Fn() -> bool) {
    let start = Instant::now();
    while !is_so() {
        assert!(start.elapsed() < BOUND, "never: {what}");
        thread::sleep(Duration::from_millis(5));
    }
}

/// The source waits to hear whether its guest runs at the destination. There the operator decides that
/// it does not: the source gets that answer when it asks, and lets the guest run.
#[test]
fn discard_at_destination_reaches_source() {
    let (dialer, mut acceptor) = Dialer::new();
    let way = Arc::clone(&dialer);
    let mut guest = MemoryGuest::with_hook(ram(PAGES), move |moment, _| {
        if moment == Moment::Committed {
            // The source has committed, and `Commit` cannot reach the destination: neither side may
            // decide alone.
            way.cut();
        }
    });
    let (here, there) = (Progress::default(), Progress::default());
    let (decide_here, decide_there) = (Decision::default(), Decision::default());
    let patience = Duration::from_secs(2);
    let policy = Policy {
        patience,
        ..Policy::default()
    };
    thread::scope(|scope| {
        scope.spawn(|| {
            let receiving = Receiving {
                accept: &mut acceptor,
                limit: &ConnectionLimit::default(),
                once: true,
                host: &Place(Shared::default()),
                progress: &there,
                decision: &decide_there,
                patience,
                lingers: &|| {},
            };
            assert_eq!(receive(receiving).unwrap_err().code, "resolved");
        });
        let sender = scope.spawn(|| {
            let sending = Sending {
                id: Uuid::from_u128(1),
                policy: &policy,
                dial: &*dialer,
                journal: &mut NoJournal,
                progress: &here,
                decision: &decide_here,
            };
            send(sending, &mut guest)
        });
        for side in [&here, &there] {
            until("in doubt", || side.report().phase == Phase::InDoubt);
        }
        assert!(decide_there.resolve(Resolution::Discard));
        until("discarded", || there.report().phase == Phase::Failed);
        // The link is still cut, so the source cannot know the decision and has to keep its guest
        // paused.
        assert_eq!(here.report().phase, Phase::InDoubt);
        dialer.mend();
        let start = Instant::now();
        while !sender.is_finished() {
            if start.elapsed() > BOUND {
                // So that the threads end.
                let _ = decide_here.resolve(Resolution::Discard);
            }
            thread::sleep(Duration::from_millis(5));
        }
        let Outcome::Stayed { why, .. } = sender.join().unwrap() else {
            panic!("the source was not told");
        };
        assert_eq!(why.code, "resolved");
    });
    assert!(guest.runs);
}
