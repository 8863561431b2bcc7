//! Restores into a machine that is only memory.

mod record;

use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use memory::{Pages, RamBlock, RamConfig};
use parking_lot::Mutex;
use uuid::Uuid;

use super::tests::{content, example, guest};
use super::*;
use crate::message::Offer;
use crate::pages::Block;
use crate::{Decision, Destination, Fate, Host, Journal, StartFailure};

/// Behaviour of a test's machine, and a record of what the test saw.
#[derive(Default)]
struct Seen {
    /// Pages of the first block that are read while the state is loaded.
    at_load: Vec<usize>,
    /// Pages of the first block that the guest reads.
    by_guest: Vec<usize>,
    /// The first byte of each page that was read, and whether memory was lost by then.
    read: Vec<(usize, u8, Pages)>,
    blocks: Vec<Block>,
    offer: Option<Offer>,
    /// The machine of this VM cannot be loaded.
    refuses: Option<String>,
    /// The VMs whose machines were made.
    machines: Vec<String>,
    /// The machine of no VM is made before so many are being made.
    at_once: usize,
    making: usize,
    started: usize,
    /// Called at the guest's start.
    at_start: Option<Box<dyn FnOnce() + Send>>,
    /// The start ends when the memory is lost.
    is_lost_at_start: bool,
    failed: Option<Refusal>,
    discarded: usize,
}

#[derive(Clone, Default)]
struct OnlyMemory(Arc<Mutex<Seen>>);

impl Host for OnlyMemory {
    fn prepare(
        &self,
        _: Uuid,
        offer: &Offer,
        files: Vec<File>,
    ) -> Result<Box<dyn Destination>, Refusal> {
        let mut seen = self.0.lock();
        seen.making += 1;
        let deadline = Instant::now() + Duration::from_secs(60);
        while seen.making < seen.at_once {
            assert!(Instant::now() < deadline, "machines are not made at once");
            parking_lot::MutexGuard::unlocked(&mut seen, thread::yield_now);
        }
        seen.blocks = guest(&[]);
        let mut offset = 0;
        for (block, file) in seen.blocks.iter_mut().zip(files) {
            let config = RamConfig::anonymous(block.ram.len() as u64);
            let view = RamBlock::view_of_file(&config, file, offset);
            offset += config.size;
            block.ram = Arc::new(view.map_err(|error| Refusal::new("no-view", error.to_string()))?);
        }
        seen.offer = Some(offer.clone());
        seen.machines.push(offer.vm.clone());
        Ok(Box::new(Machine {
            vm: offer.vm.clone(),
            seen: Arc::clone(&self.0),
            guest: None,
        }))
    }

    fn journal(&self, _: Uuid, _: &str) -> std::io::Result<Box<dyn Journal>> {
        Err(std::io::ErrorKind::Unsupported.into())
    }

    fn fate(&self, _: Uuid) -> Fate {
        Fate::Unknown
    }
}

struct Machine {
    vm: String,
    seen: Arc<Mutex<Seen>>,
    guest: Option<JoinHandle<()>>,
}

fn read(seen: &Mutex<Seen>, pages: Vec<usize>) {
    let ram = Arc::clone(&seen.lock().blocks[0].ram);
    for page in pages {
        let mut byte = [0];
        ram.slice(page * PAGE, 1).unwrap().copy_to(&mut byte[..]);
        seen.lock().read.push((page, byte[0], ram.pages()));
    }
}

impl Destination for Machine {
    fn blocks(&self) -> Vec<Block> {
        self.seen.lock().blocks.clone()
    }

    fn dry_run(&mut self, _: &[u8]) -> Result<(), Refusal> {
        Ok(())
    }

    fn load(&mut self, state: &[u8]) -> Result<(), Refusal> {
        assert_eq!(state, b"the state");
        let seen = self.seen.lock();
        if seen.refuses.as_ref() == Some(&self.vm) {
            return Err(Refusal::new("cannot-be-loaded", "no"));
        }
        let pages = seen.at_load.clone();
        drop(seen);
        read(&self.seen, pages);
        Ok(())
    }

    fn take_over(&mut self) -> Result<(), Refusal> {
        Ok(())
    }

    fn start(&mut self, _: Duration, _: bool) -> Result<Instant, StartFailure> {
        let seen = Arc::clone(&self.seen);
        seen.lock().started += 1;
        let act = seen.lock().at_start.take();
        act.into_iter().for_each(|act| act());
        let pages = seen.lock().by_guest.clone();
        self.guest = Some(thread::spawn(move || read(&seen, pages)));
        let seen = self.seen.lock();
        if seen.is_lost_at_start {
            let ram = Arc::clone(&seen.blocks[0].ram);
            drop(seen);
            let deadline = Instant::now() + Duration::from_secs(60);
            while ram.pages() != Pages::Lost {
                assert!(Instant::now() < deadline, "the memory is not lost");
                thread::sleep(Duration::from_millis(1));
            }
        }
        Ok(Instant::now())
    }

    fn fail(&mut self, why: &Refusal) {
        self.seen.lock().failed = Some(why.clone());
    }

    fn discard(&mut self) {
        self.seen.lock().discarded += 1;
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        if let Some(guest) = self.guest.take() {
            guest.join().unwrap();
        }
    }
}

fn restored(
    dir: &Path,
    memory: Memory,
    verify: bool,
    to: &OnlyMemory,
) -> (Result<(), Refusal>, Progress, bool) {
    let progress = Progress::default();
    let (result, arrived) = restored_with(dir, memory, verify, to, &progress, None);
    (result, progress, arrived)
}

fn restored_with(
    dir: &Path,
    memory: Memory,
    verify: bool,
    to: &OnlyMemory,
    progress: &Progress,
    recorder: Option<&Recorder>,
) -> (Result<(), Refusal>, bool) {
    let snapshot = Snapshot::open(dir).unwrap();
    let decision = Decision::default();
    let arrived = Mutex::new(false);
    let result = restore(&Restoring {
        id: Uuid::new_v4(),
        offers: vec![snapshot.offer()],
        snapshot: &snapshot,
        memory,
        verify,
        host: to,
        resume: true,
        recorder,
        left: "",
        arrived: &|| *arrived.lock() = true,
        progress,
        decision: &decision,
    });
    let arrived = *arrived.lock();
    (result, arrived)
}

/// Changes a byte of a page in the file of the memory.
fn damage(dir: &Path, page: usize) {
    let file = OpenOptions::new()
        .write(true)
        .open(dir.join(MEMORY))
        .unwrap();
    file.write_all_at(&[0xaa], (page * PAGE + 9) as u64)
        .unwrap();
}

#[test]
fn every_mode_restores_the_memory() {
    let (dir, expected) = example();
    for memory in [Memory::Copy, Memory::OnDemand, Memory::Map] {
        // Pages with content and without, from the state's load and from the guest, some of them twice.
        let to = OnlyMemory::default();
        to.0.lock().at_load = vec![6, 7];
        to.0.lock().by_guest = vec![299, 0, 1, 6, 5];
        let (result, progress, arrived) = restored(dir.path(), memory, true, &to);
        let early = memory == Memory::OnDemand;
        assert_eq!((result, arrived), (Ok(()), early), "{memory:?}");
        let report = progress.report();
        let counts = (
            report.phase,
            report.pages,
            report.zero_pages,
            report.remaining_pages,
        );
        assert_eq!(counts, (Phase::Completed, 5, 302, 0), "{memory:?}");
        let seen = to.0.lock();
        let bytes: Vec<_> = seen
            .read
            .iter()
            .map(|(page, byte, _)| (*page, *byte))
            .collect();
        let number = |page: usize| match page {
            1 | 7 => (page, 0),
            page => (page, (page % 251 + 1) as u8),
        };
        assert_eq!(bytes, [6, 7, 299, 0, 1, 6, 5].map(number), "{memory:?}");
        assert!(content(&seen.blocks) == expected, "{memory:?}");
        assert!(
            seen.blocks
                .iter()
                .all(|block| block.ram.pages() == Pages::There)
        );
        assert!(seen.failed.is_none() && seen.discarded == 0);
    }
}

/// The guest waits for a page that is damaged: it ends, and does not see what is in the page's place as
/// long as its memory counts as whole.
#[test]
fn damaged_page_ends_a_guest_that_waits_for_it() {
    let (dir, _) = example();
    damage(dir.path(), 299);
    let to = OnlyMemory::default();
    to.0.lock().by_guest = vec![299];
    let (result, progress, arrived) = restored(dir.path(), Memory::OnDemand, false, &to);
    let why = result.unwrap_err();
    assert!(arrived, "the guest ran");
    assert_eq!(why.code, "snapshot-damaged");
    assert!(why.detail.contains("page 299 of low"), "{why}");
    assert_eq!(progress.report().phase, Phase::Failed);
    let seen = to.0.lock();
    assert_eq!(seen.failed.as_ref(), Some(&why));
    assert_eq!(seen.read, [(299, 0, Pages::Lost)]);
}

/// A change of a file of a snapshot.
#[derive(Clone, Copy)]
enum Change {
    Truncate(&'static str, u64),
    /// Zeros from an offset on, as many as the number says.
    Erase(&'static str, u64, usize),
}

impl Change {
    fn make(self, dir: &Path) {
        let open = |name| OpenOptions::new().write(true).open(dir.join(name)).unwrap();
        match self {
            Self::Truncate(name, len) => open(name).set_len(len).unwrap(),
            Self::Erase(name, at, len) => open(name).write_all_at(&vec![0; len], at).unwrap(),
        }
    }
}

/// The files change while the guest runs. A page whose hash is gone must not count as one of zeros.
#[test]
fn files_that_change_under_a_guest_end_it() {
    const PLACE: u64 = 299;
    let changes = [
        (
            Change::Truncate(MEMORY, PLACE * PAGE as u64),
            "snapshot-unreadable",
        ),
        (
            Change::Erase(MEMORY, PLACE * PAGE as u64, PAGE),
            "snapshot-damaged",
        ),
        (Change::Truncate(HASHES, PLACE * 8), "snapshot-unreadable"),
        (Change::Erase(HASHES, PLACE * 8, 8), "snapshot-damaged"),
    ];
    for touched in [true, false] {
        for (number, (change, code)) in changes.into_iter().enumerate() {
            let (dir, _) = example();
            let to = OnlyMemory::default();
            if touched {
                to.0.lock().by_guest = vec![299];
            }
            let path = dir.path().to_owned();
            to.0.lock().at_start = Some(Box::new(move || change.make(&path)));
            let (result, _, arrived) = restored(dir.path(), Memory::OnDemand, false, &to);
            let why = result.unwrap_err();
            assert_eq!(
                (arrived, why.code.as_str()),
                (true, code),
                "{number}: {why}"
            );
            let seen = to.0.lock();
            assert_eq!(seen.failed.as_ref(), Some(&why));
            let found = touched.then_some((299, 0, Pages::Lost));
            assert_eq!(seen.read, found.as_slice(), "{number}");
        }
    }
}

/// A guest that waits for a page of which nothing is heard ends, with its reason, and sees no zeros.
#[test]
fn unreadable_faults_end_a_guest_on_demand() {
    for at_load in [true, false] {
        let (dir, _) = example();
        let unreadable = crate::testing::UnreadableFaults::new();
        let to = OnlyMemory::default();
        if at_load {
            to.0.lock().at_load = vec![299];
            unreadable.fail();
        } else {
            to.0.lock().by_guest = vec![299];
            to.0.lock().at_start = Some(Box::new(move || unreadable.fail()));
            // Or reading ahead may bring the page before the guest touches it.
            to.0.lock().is_lost_at_start = true;
        }
        let (result, _, arrived) = restored(dir.path(), Memory::OnDemand, false, &to);
        let why = result.unwrap_err();
        assert_eq!((arrived, why.code.as_str()), (!at_load, "pages-not-served"));
        let seen = to.0.lock();
        assert_eq!(seen.failed.is_some(), !at_load);
        assert_eq!(seen.discarded, usize::from(at_load));
        assert_eq!(seen.read, [(299, 0, Pages::Lost)]);
    }
}

/// The same if only the reading ahead meets it.
#[test]
fn damaged_page_ends_a_guest_that_does_not_touch_it() {
    let (dir, _) = example();
    damage(dir.path(), 301);
    let to = OnlyMemory::default();
    let (result, _, _) = restored(dir.path(), Memory::OnDemand, false, &to);
    let why = result.unwrap_err();
    assert!(why.detail.contains("page 1 of high"), "{why}");
    assert_eq!(to.0.lock().failed.as_ref(), Some(&why));
    let lost = |block: &Block| block.ram.pages() == Pages::Lost;
    assert!(to.0.lock().blocks.iter().all(lost));
}

#[test]
fn damaged_page_that_loading_needs_makes_no_guest() {
    let (dir, _) = example();
    damage(dir.path(), 6);
    let to = OnlyMemory::default();
    to.0.lock().at_load = vec![6];
    let (result, _, arrived) = restored(dir.path(), Memory::OnDemand, false, &to);
    assert_eq!(result.unwrap_err().code, "snapshot-damaged");
    let seen = to.0.lock();
    assert!(!arrived && seen.discarded == 1 && seen.failed.is_none());
}

/// A mapped page is not checked when it is touched: only `verify` does, before there is a machine.
#[test]
fn verify_finds_a_damaged_page_before_it_is_mapped() {
    let (dir, _) = example();
    damage(dir.path(), 299);
    let to = OnlyMemory::default();
    let (result, _, _) = restored(dir.path(), Memory::Map, true, &to);
    assert_eq!(result.unwrap_err().code, "snapshot-damaged");
    assert!(to.0.lock().offer.is_none(), "no machine was made");
    let (result, _, _) = restored(dir.path(), Memory::Map, false, &to);
    assert_eq!(result, Ok(()));
}

#[test]
fn damaged_hashes_are_found_on_demand() {
    let (dir, _) = example();
    let file = OpenOptions::new()
        .write(true)
        .open(dir.path().join(HASHES))
        .unwrap();
    file.write_all_at(&[1], 8 * 20).unwrap();
    let to = OnlyMemory::default();
    let (result, _, _) = restored(dir.path(), Memory::OnDemand, false, &to);
    assert_eq!(result.unwrap_err().code, "snapshot-damaged");
    assert_eq!(to.0.lock().discarded, 1);
}

fn made_of(snapshot: &Snapshot, count: usize, to: &OnlyMemory) -> Result<(), Refusal> {
    let (progress, decision) = (Progress::default(), Decision::default());
    let offer = |n: usize| Offer {
        vm: format!("web-{n}"),
        ..snapshot.offer()
    };
    restore(&Restoring {
        id: Uuid::new_v4(),
        offers: (1..=count).map(offer).collect(),
        snapshot,
        memory: Memory::Map,
        verify: false,
        host: to,
        resume: true,
        recorder: None,
        left: "",
        arrived: &|| {},
        progress: &progress,
        decision: &decision,
    })
}

#[test]
fn forks_are_mapped_from_memory() {
    let blocks = guest(&[0, 5, 6, 299, 301]);
    let (progress, decision) = (Progress::default(), Decision::default());
    let captured =
        Snapshot::capture(Ok(tests::saved(&blocks)), |_| "", &progress, &decision).unwrap();
    let report = progress.report();
    assert_eq!(
        (report.pages, report.zero_pages, report.remaining_pages),
        (5, 302, 0)
    );
    let to = OnlyMemory::default();
    // The kernel has each of them wait: several are made at once.
    to.0.lock().at_once = 8;
    made_of(&captured, 20, &to).unwrap();
    let seen = to.0.lock();
    assert_eq!((seen.started, seen.discarded), (20, 0));
    for n in 1..=20 {
        assert!(seen.machines.contains(&format!("web-{n}")), "{n}");
    }
    // The original changes, and the copy does not.
    let expected = content(&blocks);
    blocks[0].ram.slice(0, 1).unwrap().copy_from(&[99_u8]);
    assert!(content(&seen.blocks) == expected);
}

/// None of them has run by then.
#[test]
fn no_machine_is_left_if_one_cannot_be_made() {
    let captured = Snapshot::capture(
        Ok(tests::saved(&guest(&[3]))),
        |_| "",
        &Progress::default(),
        &Decision::default(),
    );
    let to = OnlyMemory::default();
    to.0.lock().refuses = Some("web-7".to_owned());
    let why = made_of(&captured.unwrap(), 20, &to).unwrap_err();
    assert_eq!(
        (why.code.as_str(), why.detail.as_str()),
        ("cannot-be-loaded", "VM web-7: no")
    );
    let seen = to.0.lock();
    // Those that were being made at the same time are gone, too.
    assert!(seen.machines.len() >= 7, "{:?}", seen.machines);
    assert_eq!((seen.started, seen.discarded), (0, seen.machines.len()));
}

#[test]
fn canceled_capture_makes_nothing() {
    let decision = Decision::default();
    decision.cancel().unwrap();
    let saved = Ok(tests::saved(&guest(&[3])));
    let progress = Progress::default();
    // A client that sees the end may send its next request at once.
    let mut ended = None;
    let end = |outcome: Result<(), &Refusal>| {
        ended = Some((outcome.is_ok(), progress.report().phase.is_over()));
        ""
    };
    let refused = Snapshot::capture(saved, end, &progress, &decision).unwrap_err();
    assert_eq!(ended, Some((false, false)));
    assert_eq!(refused.code, "canceled");
    assert_eq!(progress.report().phase, Phase::Canceled);
}
