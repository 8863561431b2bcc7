//! Verify mode finds a page that is not at the destination what it is at the source, names it, and
//! keeps the guest at the source.

#![allow(clippy::unwrap_used, clippy::panic, reason = "tests")]

mod pair;

use std::sync::Arc;
use std::thread;
use std::time::Duration;

use memory::PAGE_SIZE;
use migration::testing::{MemoryGuest, Moment, contents, fill_page, ram};
use migration::{
    ConnectionLimit, Decision, Mode, NoJournal, Outcome, Phase, Policy, Progress, Receiving,
    Report, Sending, receive, send,
};
use uuid::Uuid;

use pair::{Dialer, PAGES, PATIENCE, Place, Shared};

/// An injected fault, of the program or of the host's memory.
#[derive(Clone, Copy, Debug)]
enum Spoil {
    Nothing,
    /// The guest writes to the page in the last moment, and the dirty bit is lost.
    LoseDirtyBit(usize),
    /// A bit of the page is turned over in the destination's memory, behind the last round.
    TurnBit(usize),
}

/// Returns the outcome, and how both sides report it.
fn migrate(mode: Mode, connections: u16, verify: bool, spoil: Spoil) -> (Outcome, [Report; 2]) {
    let (dialer, mut acceptor) = Dialer::new();
    let there = Shared::default();
    let memory_there = Arc::clone(&there);
    let mut is_stopped = false;
    let mut guest = MemoryGuest::with_hook(ram(PAGES), move |moment, ram| {
        is_stopped |= moment == Moment::Stopped;
        match (moment, spoil) {
            (Moment::Harvest, Spoil::LoseDirtyBit(page)) if is_stopped => {
                // Taking the bit out makes the engine believe that the destination has the page
                // already.
                fill_page(ram, page, 9);
                assert!(ram.dirty().take_page(page));
            }
            (Moment::Stopped, Spoil::TurnBit(page)) => {
                // A frame checksum cannot find this one: the page was intact when it arrived.
                let there = memory_there.get().unwrap();
                let there = there.slice(page * PAGE_SIZE as usize + 7, 1).unwrap();
                let mut byte = [0_u8];
                there.copy_to(&mut byte[..]);
                there.copy_from(&[byte[0] ^ 4]);
            }
            // The guest writes a little, all the time.
            (Moment::Harvest, _) => fill_page(ram, 100, 1),
            _ => {}
        }
    });
    let memory_there = Arc::clone(&there);
    for page in (0..PAGES).filter(|page| page % 3 > 0) {
        fill_page(&guest.ram, page, 1 + page as u8 % 250);
    }
    let reports = [Progress::default(), Progress::default()];
    let far = reports[1].clone();
    let receiver = thread::spawn(move || {
        let receiving = Receiving {
            accept: &mut acceptor,
            limit: &ConnectionLimit::default(),
            once: true,
            host: &Place(there),
            progress: &far,
            decision: &Decision::default(),
            patience: PATIENCE,
            lingers: &|| {},
        };
        receive(receiving)
    });
    let policy = Policy {
        mode,
        verify,
        connections: Some(connections),
        // Not a test of speed.
        max_downtime: Duration::from_secs(20),
        patience: PATIENCE,
        ..Policy::default()
    };
    let sending = Sending {
        id: Uuid::from_u128(1),
        policy: &policy,
        dial: &*dialer,
        journal: &mut NoJournal,
        progress: &reports[0],
        decision: &Decision::default(),
    };
    let outcome = send(sending, &mut guest);
    let received = receiver.join().unwrap();
    assert_eq!(received.is_ok(), outcome == Outcome::Moved, "{received:?}");
    assert_eq!(guest.runs, outcome != Outcome::Moved);
    if let (Outcome::Moved, Spoil::Nothing) = (&outcome, spoil) {
        assert!(contents(&guest.ram) == contents(memory_there.get().unwrap()));
    }
    (outcome, reports.map(|progress| progress.report()))
}

#[test]
fn all_pages_are_compared_in_each_mode() {
    for mode in [Mode::Precopy, Mode::Hybrid, Mode::Postcopy, Mode::Auto] {
        for connections in [1, 3] {
            let (outcome, reports) = migrate(mode, connections, true, Spoil::Nothing);
            assert_eq!(outcome, Outcome::Moved, "{mode:?}");
            for report in &reports {
                // Each page counts once, whether it came before the guest or after.
                assert_eq!(report.verified_pages, PAGES as u64, "{mode:?} {report:?}");
            }
            assert_eq!(reports[1].phase, Phase::Completed);
        }
    }
}

#[test]
fn differing_page_keeps_guest_at_source() {
    // A page that had content before, and one that was zeros and was never written there.
    for page in [1234, 1500] {
        for spoil in [Spoil::LoseDirtyBit(page), Spoil::TurnBit(1234)] {
            let (outcome, reports) = migrate(Mode::Precopy, 2, true, spoil);
            let Outcome::Stayed { why, .. } = outcome else {
                panic!("{spoil:?} was not found");
            };
            let (Spoil::LoseDirtyBit(page) | Spoil::TurnBit(page)) = spoil else {
                panic!();
            };
            let named = format!("page {page} of block ram");
            assert_eq!(why.code, "memory-differs-at", "{why}");
            assert!(why.detail.contains(&named), "{why}");
            for report in reports {
                assert_eq!(report.phase, Phase::Failed);
                assert_eq!(report.error.unwrap().code, "memory-differs-at");
            }
            // Nothing else finds it.
            let (outcome, _) = migrate(Mode::Precopy, 2, false, spoil);
            assert_eq!(outcome, Outcome::Moved, "{spoil:?}");
        }
    }
}
