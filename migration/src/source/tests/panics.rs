//! A fault of this program in the middle of a migration.

use std::panic::{AssertUnwindSafe, catch_unwind};

use super::*;

#[test]
fn guest_stays_after_a_panic_before_the_commit() {
    let guest = MemoryGuest::with_hook(ram(PAGES), |moment, _| {
        assert_ne!(moment, Moment::Harvest, "as the test says");
    });
    let (outcome, guest) = migrate_guest(guest, &policy(), None, |dialed, _| {
        let mut peer = Peer::welcome(dialed, 4);
        peer.prepare(1, false);
        peer.accept();
        assert_eq!(peer.recv_abort(), "internal");
    });
    assert_eq!(stayed(&outcome), "internal");
    assert!(guest.runs);
}

/// Panics as soon as the guest is known to run at the destination.
struct Panics;

impl Journal for Panics {
    fn record(&mut self, step: Step) -> io::Result<()> {
        assert_ne!(step, Step::Running, "as the test says");
        Ok(())
    }
}

/// Where the guest runs is not known then. The migration must not look as if it were in progress.
#[test]
fn panic_behind_the_commit_ends_the_report() {
    let (to, dialed) = mpsc::channel();
    let peer = thread::spawn(move || {
        let mut peer = Peer::welcome(dialed, 4);
        peer.prepare(1, false);
        peer.accept();
        peer.until_committed();
        peer.say(&ToSource::Running { us: 1, told_us: 1 });
    });
    let (progress, policy) = (Progress::default(), policy());
    let mut guest = MemoryGuest::new(ram(PAGES));
    let sending = Sending {
        id: Uuid::from_u128(1),
        policy: &policy,
        dial: &Pipe(Mutex::new(to)),
        journal: &mut Panics,
        progress: &progress,
        decision: &Decision::default(),
    };
    let sent = catch_unwind(AssertUnwindSafe(|| send(sending, &mut guest)));
    assert!(sent.is_err());
    peer.join().unwrap();
    let report = progress.report();
    assert_eq!(report.phase, Phase::Failed);
    assert_eq!(report.error.unwrap().code, "internal");
}
