//! A guest that runs at the destination and cannot get the rest of its memory.

#![allow(clippy::unwrap_used, clippy::panic, reason = "tests")]

mod pair;

use std::fs::File;
use std::io;
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use memory::{Pages, RamBlock};
use migration::testing::{MemoryGuest, UnreadableFaults, blocks, fill_page, ram};
use migration::{
    Block, ConnectionLimit, Decision, Destination, Fate, Host, Journal, Mode, NoJournal, Offer,
    Outcome, Phase, Policy, Progress, Receiving, Refusal, Sending, StartFailure, Step, receive,
    send,
};
use uuid::Uuid;

use pair::{Dialer, PAGES, Place};

/// The page that the guest reads at the destination: the last one that is sent.
const TOUCHED: usize = PAGES - 1;
const CONTENT: u8 = 7;

/// State of the destination's machine that the test can see.
#[derive(Default)]
struct Seen {
    failed: Option<Refusal>,
    discarded: bool,
    read: Option<JoinHandle<(u8, Pages)>>,
}

#[derive(Clone)]
struct Machine {
    ram: Arc<RamBlock>,
    unreadable: UnreadableFaults,
    seen: Arc<Mutex<Seen>>,
}

impl Destination for Machine {
    fn blocks(&self) -> Vec<Block> {
        blocks(&self.ram)
    }

    fn dry_run(&mut self, _: &[u8]) -> Result<(), Refusal> {
        Ok(())
    }

    fn load(&mut self, _: &[u8]) -> Result<(), Refusal> {
        Ok(())
    }

    fn take_over(&mut self) -> Result<(), Refusal> {
        Ok(())
    }

    fn start(&mut self, _: Duration, _: bool) -> Result<Instant, StartFailure> {
        self.unreadable.fail();
        let ram = Arc::clone(&self.ram);
        let read = thread::spawn(move || {
            let mut byte = [1_u8];
            let page = ram.slice(TOUCHED * memory::PAGE_SIZE as usize, 1).unwrap();
            page.copy_to(&mut byte[..]);
            (byte[0], ram.pages())
        });
        self.seen.lock().unwrap().read = Some(read);
        Ok(Instant::now())
    }

    fn fail(&mut self, why: &Refusal) {
        self.seen.lock().unwrap().failed = Some(why.clone());
    }

    fn discard(&mut self) {
        self.seen.lock().unwrap().discarded = true;
    }
}

impl Host for Machine {
    fn prepare(&self, _: Uuid, _: &Offer, _: Vec<File>) -> Result<Box<dyn Destination>, Refusal> {
        Ok(Box::new(self.clone()))
    }

    fn journal(&self, _: Uuid, _: &str) -> io::Result<Box<dyn Journal>> {
        Ok(Box::new(NoJournal))
    }

    fn fate(&self, _: Uuid) -> Fate {
        Fate::Unknown
    }
}

/// A destination that records its steps, and with each whether the guest is incomplete.
struct Recorded {
    place: Place,
    steps: Arc<Mutex<Vec<(Step, bool)>>>,
}

struct Steps(Arc<Mutex<Vec<(Step, bool)>>>);

impl Journal for Steps {
    fn record(&mut self, step: Step) -> io::Result<()> {
        self.0.lock().unwrap().push((step, false));
        Ok(())
    }

    fn record_incomplete(&mut self) -> io::Result<()> {
        self.0.lock().unwrap().push((Step::Running, true));
        Ok(())
    }
}

impl Host for Recorded {
    fn prepare(
        &self,
        id: Uuid,
        offer: &Offer,
        files: Vec<File>,
    ) -> Result<Box<dyn Destination>, Refusal> {
        self.place.prepare(id, offer, files)
    }

    fn journal(&self, _: Uuid, _: &str) -> io::Result<Box<dyn Journal>> {
        Ok(Box::new(Steps(Arc::clone(&self.steps))))
    }

    fn fate(&self, _: Uuid) -> Fate {
        Fate::Unknown
    }
}

/// A guest all of whose pages have content.
fn full_guest() -> MemoryGuest {
    let memory = ram(PAGES);
    (0..PAGES).for_each(|page| fill_page(&memory, page, CONTENT));
    MemoryGuest::new(memory)
}

/// Migrates a guest to a host, which is made in the destination's thread. Returns the results of both sides, and
/// what the destination reports at the end.
fn moved<H: Host>(
    policy: &Policy,
    guest: &mut MemoryGuest,
    host: impl FnOnce() -> H + Send,
) -> (Outcome, Result<(), Refusal>, Progress) {
    let (dialer, mut acceptor) = Dialer::new();
    let there = Progress::default();
    let (sent, received) = thread::scope(|scope| {
        let there = &there;
        let receiver = scope.spawn(move || {
            receive(Receiving {
                accept: &mut acceptor,
                limit: &ConnectionLimit::default(),
                once: true,
                host: &host(),
                progress: there,
                decision: &Decision::default(),
                patience: policy.patience,
                lingers: &|| {},
            })
        });
        let sent = send(
            Sending {
                id: Uuid::from_u128(1),
                policy,
                dial: &*dialer,
                journal: &mut NoJournal,
                progress: &Progress::default(),
                decision: &Decision::default(),
            },
            guest,
        );
        (sent, receiver.join().unwrap())
    });
    (sent, received, there)
}

/// A service that ends before all pages have come finds that in its journal.
#[test]
fn journal_tells_whether_all_pages_have_come() {
    for (mode, running) in [
        (Mode::Precopy, &[(Step::Running, false)][..]),
        (
            Mode::Postcopy,
            &[(Step::Running, true), (Step::Running, false)][..],
        ),
    ] {
        let mut guest = full_guest();
        let policy = Policy {
            mode,
            ..Policy::default()
        };
        let steps = Arc::default();
        let host = || Recorded {
            place: Place(Arc::default()),
            steps: Arc::clone(&steps),
        };
        let (sent, received, _) = moved(&policy, &mut guest, host);
        assert_eq!(sent, Outcome::Moved);
        received.unwrap();
        let steps = steps.lock().unwrap();
        assert!(steps.ends_with(running), "{mode:?}: {steps:?}");
        let all = steps.iter().filter(|(step, _)| *step == Step::Running);
        assert_eq!(all.count(), running.len(), "{steps:?}");
    }
}

/// The destination cannot read which pages its guest waits for. The guest ends there, with the reason; no
/// thread waits for ever, and none sees zeros as long as the memory counts as whole. The source does not
/// resume its copy.
#[test]
fn guest_ends_when_its_faults_are_unreadable() {
    let mut guest = full_guest();
    let policy = Policy {
        patience: Duration::from_secs(2),
        mode: Mode::Postcopy,
        // A page each second: the one that is touched does not come by itself.
        max_bandwidth: Some(4096),
        ..Policy::default()
    };
    let seen = Arc::new(Mutex::new(Seen::default()));
    let machine = || Machine {
        ram: ram(PAGES),
        unreadable: UnreadableFaults::new(),
        seen: Arc::clone(&seen),
    };
    let (sent, received, there) = moved(&policy, &mut guest, machine);
    let Outcome::Lost(why) = sent else {
        panic!("{sent:?}");
    };
    assert_eq!(why.code, "guest-lost");
    assert_eq!(received.unwrap_err().code, "pages-not-served");
    assert!(!guest.runs, "the guest has run at the destination");
    assert_eq!(there.report().phase, Phase::Failed);
    let mut seen = seen.lock().unwrap();
    assert_eq!(seen.failed.as_ref().unwrap().code, "pages-not-served");
    assert!(!seen.discarded, "the VM stays, and shows the reason");
    assert_eq!(seen.read.take().unwrap().join().unwrap(), (0, Pages::Lost));
}
