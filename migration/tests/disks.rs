//! Disks that are copied: storage that fails at either side, frames that come too late, and a guest that
//! writes all the time.

#![allow(clippy::unwrap_used, clippy::panic, reason = "tests")]

#[path = "disks/followers.rs"]
mod followers;
#[path = "disks/mirrors.rs"]
mod mirrors;
mod pair;

use std::fs::File;
use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use memory::{AwaitedBlocks, DirtyBitmap, RamBlock};
use migration::testing::{MemoryDisk, MemoryGuest, Moment, Peer, blocks, disk_name, ram};
use migration::{
    Accept, Block, BlockInfo, ConnectionLimit, Decision, Destination, DestinationDisk, Fate, Host,
    Journal, Mode, NewImage, NoJournal, Offer, Outcome, Policy, Progress, ReadDisk, Receiving,
    Refusal, Report, Sending, Source, SourceDisk, StartFailure, Stopped, Whereabouts, receive,
    send,
};
use serde_json::json;
use uuid::Uuid;

use pair::{Dialer, PAGES, PATIENCE};

/// Bytes of the disk: it ends within a page.
const SIZE: usize = (4 << 20) + 512;

/// An image that is full when so many bytes were written to it.
struct Image {
    disk: Arc<MemoryDisk>,
    room: AtomicU64,
    syncs: AtomicU64,
}

impl Image {
    fn with_room(room: u64) -> Arc<Self> {
        Arc::new(Self {
            disk: MemoryDisk::new(SIZE),
            room: AtomicU64::new(room),
            syncs: AtomicU64::new(0),
        })
    }
}

impl NewImage for Image {
    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        let take = |room: u64| room.checked_sub(data.len() as u64);
        let taken = self
            .room
            .fetch_update(Ordering::SeqCst, Ordering::SeqCst, take);
        taken.map_err(|_| io::Error::from(io::ErrorKind::StorageFull))?;
        self.disk.write(offset, data)
    }

    fn zero(&self, offset: u64, len: u64) -> io::Result<()> {
        self.disk.zero(offset, len)
    }

    fn sync(&self) -> io::Result<()> {
        self.syncs.fetch_add(1, Ordering::SeqCst);
        self.disk.sync()
    }
}

struct Machine {
    ram: Arc<RamBlock>,
    image: Arc<Image>,
    discarded: Arc<AtomicBool>,
}

impl Destination for Machine {
    fn blocks(&self) -> Vec<Block> {
        blocks(&self.ram)
    }

    fn disks(&self) -> Vec<DestinationDisk> {
        vec![DestinationDisk {
            name: disk_name(0),
            size: SIZE as u64,
            image: Arc::clone(&self.image) as Arc<dyn NewImage>,
        }]
    }

    fn dry_run(&mut self, _: &[u8]) -> Result<(), Refusal> {
        Ok(())
    }

    fn load(&mut self, _: &[u8]) -> Result<(), Refusal> {
        Ok(())
    }

    fn await_blocks(&mut self, _: &[Option<Arc<AwaitedBlocks>>]) -> Result<(), Refusal> {
        Ok(())
    }

    fn take_over(&mut self) -> Result<(), Refusal> {
        Ok(())
    }

    fn start(&mut self, _: Duration, _: bool) -> Result<Instant, StartFailure> {
        Ok(Instant::now())
    }

    fn discard(&mut self) {
        self.discarded.store(true, Ordering::SeqCst);
    }
}

struct Place {
    image: Arc<Image>,
    discarded: Arc<AtomicBool>,
}

impl Host for Place {
    fn prepare(&self, _: Uuid, _: &Offer, _: Vec<File>) -> Result<Box<dyn Destination>, Refusal> {
        Ok(Box::new(Machine {
            ram: ram(PAGES),
            image: Arc::clone(&self.image),
            discarded: Arc::clone(&self.discarded),
        }))
    }

    fn journal(&self, _: Uuid, _: &str) -> io::Result<Box<dyn Journal>> {
        Ok(Box::new(NoJournal))
    }

    fn fate(&self, _: Uuid) -> Fate {
        Fate::Unknown
    }
}

/// A guest with one disk.
struct Guest {
    guest: MemoryGuest,
    disk: SourceDisk,
    throttled: Arc<Mutex<Vec<u8>>>,
    /// The engine has asked the guest to offer bases.
    offers_bases: bool,
}

impl Guest {
    fn new(disk: SourceDisk) -> Self {
        Self {
            guest: MemoryGuest::new(ram(PAGES)),
            disk,
            throttled: Arc::default(),
            offers_bases: false,
        }
    }
}

impl Source for Guest {
    fn offer(&mut self) -> Result<Offer, Refusal> {
        self.guest.offer()
    }

    fn blocks(&self) -> Vec<Block> {
        self.guest.blocks()
    }

    fn disks(&self) -> Vec<SourceDisk> {
        vec![self.disk.clone()]
    }

    fn may_offer_bases(&mut self) {
        self.offers_bases = true;
    }

    fn start_tracking(&mut self) -> Result<(), Refusal> {
        self.disk.dirty.set_enabled(true);
        self.disk.dirty.mark_all();
        self.guest.start_tracking()
    }

    fn stop_tracking(&mut self) -> Result<(), Refusal> {
        self.disk.dirty.set_enabled(false);
        self.guest.stop_tracking()
    }

    fn harvest(&mut self) -> Result<(), Refusal> {
        self.guest.harvest()
    }

    fn throttle(&mut self, percent: u8) {
        self.throttled.lock().unwrap().push(percent);
    }

    fn dry_run(&mut self) -> Result<Vec<u8>, Refusal> {
        self.guest.dry_run()
    }

    fn pre_sync(&mut self) {}

    fn stop(&mut self) -> Result<Stopped, Refusal> {
        self.guest.stop()
    }

    fn save(&mut self) -> Result<Vec<u8>, Refusal> {
        self.guest.save()
    }

    fn flush(&mut self) -> Result<(), Refusal> {
        self.guest.flush()
    }

    fn hand_over(&mut self) -> Result<(), Refusal> {
        self.guest.hand_over()
    }

    fn show(&mut self, guest: &Whereabouts) {
        self.guest.show(guest);
    }

    fn resume_copying(&mut self) -> Result<(), Refusal> {
        self.guest.resume_copying()
    }

    fn resume(&mut self) -> Result<(), Refusal> {
        self.guest.resume()
    }

    fn gone(&mut self) {}

    fn ended(&mut self, outcome: &Outcome) {
        self.guest.ended(outcome);
    }
}

/// Migrates a guest. Returns the outcome, and how both sides report it.
fn migrate(guest: &mut Guest, image: &Arc<Image>, policy: &Policy) -> (Outcome, [Report; 2]) {
    let (dialer, mut acceptor) = Dialer::new();
    let reports = [Progress::default(), Progress::default()];
    let far = reports[1].clone();
    let discarded = Arc::new(AtomicBool::new(false));
    let place = Place {
        image: Arc::clone(image),
        discarded: Arc::clone(&discarded),
    };
    let receiver = thread::spawn(move || {
        receive(Receiving {
            accept: &mut acceptor,
            limit: &ConnectionLimit::default(),
            once: true,
            host: &place,
            progress: &far,
            decision: &Decision::default(),
            patience: PATIENCE,
            lingers: &|| {},
        })
    });
    let sending = Sending {
        id: Uuid::from_u128(1),
        policy,
        dial: &*dialer,
        journal: &mut NoJournal,
        progress: &reports[0],
        decision: &Decision::default(),
    };
    let outcome = send(sending, guest);
    let received = receiver.join().unwrap();
    assert_eq!(received.is_ok(), outcome == Outcome::Moved, "{received:?}");
    assert_eq!(discarded.load(Ordering::SeqCst), outcome != Outcome::Moved);
    (outcome, reports.map(|progress| progress.report()))
}

fn policy(mode: Mode) -> Policy {
    Policy {
        mode,
        connections: Some(2),
        // Not a test of speed.
        max_downtime: Duration::from_secs(20),
        patience: PATIENCE,
        ..Policy::default()
    }
}

fn filled() -> Arc<MemoryDisk> {
    let disk = MemoryDisk::new(SIZE);
    for page in 0..SIZE / 4096 {
        disk.fill(page * 4096, 4096, 1 + page as u8 % 250);
    }
    disk.fill(SIZE - 512, 512, 7);
    disk
}

#[test]
fn full_storage_keeps_the_guest_at_the_source() {
    for mode in [Mode::Precopy, Mode::Hybrid] {
        let disk = filled();
        let mut guest = Guest::new(disk.at_source(&disk_name(0)));
        let image = Image::with_room(1 << 20);
        let (outcome, reports) = migrate(&mut guest, &image, &policy(mode));
        assert!(matches!(outcome, Outcome::Stayed { .. }));
        assert!(guest.guest.runs);
        for report in reports {
            assert_eq!(report.error.unwrap().code, "disk-full", "{mode:?}");
        }
        assert!(!guest.disk.dirty.is_enabled(), "tracking has ended");
    }
}

/// A disk that cannot be read behind so many bytes, as one that shrank.
struct Broken(Arc<MemoryDisk>, u64);

impl ReadDisk for Broken {
    fn read(&self, offset: u64, data: &mut [u8]) -> io::Result<()> {
        match offset < self.1 {
            true => self.0.read(offset, data),
            false => Err(io::ErrorKind::UnexpectedEof.into()),
        }
    }
}

#[test]
fn disk_that_shrank_keeps_the_guest_at_the_source() {
    let disk = filled();
    let content = Arc::new(Broken(Arc::clone(&disk), 3 << 20));
    let mut guest = Guest::new(SourceDisk {
        content,
        ..disk.at_source(&disk_name(0))
    });
    let image = Image::with_room(u64::MAX);
    let (_, reports) = migrate(&mut guest, &image, &policy(Mode::Auto));
    assert!(guest.guest.runs);
    for report in reports {
        let error = report.error.unwrap();
        assert_eq!(error.code, "disk-unreadable");
        assert!(error.detail.contains("disk0"), "{error}");
    }
}

/// Returns a guest of memory, and whether it was stopped.
fn stoppable() -> (MemoryGuest, Arc<AtomicBool>) {
    let stopped = Arc::new(AtomicBool::new(false));
    let stops = Arc::clone(&stopped);
    let guest = MemoryGuest::with_hook(ram(PAGES), move |moment, _| {
        stops.fetch_or(moment == Moment::Stopped, Ordering::SeqCst);
    });
    (guest, stopped)
}

/// A guest that writes to its disk as fast as that is copied is slowed down, and moves; or blocks follow it.
#[test]
fn busy_disk_ends_in_a_stop_that_the_policy_allows() {
    for mode in [Mode::Auto, Mode::Postcopy, Mode::Precopy] {
        let disk = filled();
        let source = disk.at_source(&disk_name(0));
        /// Each read of the first page is followed by a write to all pages, until vCPUs are slow.
        struct Busy(Arc<MemoryDisk>, Arc<Mutex<Vec<u8>>>, Arc<AtomicBool>);
        impl ReadDisk for Busy {
            fn read(&self, offset: u64, data: &mut [u8]) -> io::Result<()> {
                self.0.read(offset, data)?;
                let percent = self.1.lock().unwrap().last().copied().unwrap_or(0);
                if offset == 0 && percent < 60 && !self.2.load(Ordering::SeqCst) {
                    self.0.fill(0, SIZE, percent);
                }
                Ok(())
            }
        }
        let throttled = Arc::default();
        let (memory, stopped) = stoppable();
        let content = Arc::new(Busy(Arc::clone(&disk), Arc::clone(&throttled), stopped));
        let mut guest = Guest::new(SourceDisk { content, ..source });
        guest.guest = memory;
        guest.throttled = throttled;
        let image = Image::with_room(u64::MAX);
        let policy = Policy {
            // So short that all of the disk is too much, and its deadline is over at once.
            max_downtime: Duration::from_millis(30),
            max_bandwidth: Some(16 << 20),
            deadline: Some(Duration::from_millis(1)),
            at_deadline: match mode {
                Mode::Precopy => migration::AtDeadline::Throttle,
                _ => migration::AtDeadline::Postcopy,
            },
            ..policy(mode)
        };
        let (outcome, [sent, _]) = migrate(&mut guest, &image, &policy);
        assert_eq!(outcome, Outcome::Moved, "{mode:?} {sent:?}");
        let percents = guest.throttled.lock().unwrap().clone();
        let is_slowed = percents.contains(&60);
        assert_eq!(is_slowed, mode == Mode::Precopy, "{mode:?} {percents:?}");
        assert!(disk.contents() == image.disk.contents(), "{mode:?}");
        assert!(image.disk.is_synced());
        assert!(image.syncs.load(Ordering::SeqCst) >= 2, "{sent:?}");
        assert_eq!(sent.disk_bytes, SIZE as u64);
    }
}

/// A stop that is shorter than any can be is asked for to have pages follow. Disks do not hold it up.
#[test]
fn little_that_is_written_to_a_disk_holds_up_no_move() {
    let disk = filled();
    /// Each read of the first page is followed by a write to another.
    struct Little(Arc<MemoryDisk>, Arc<AtomicBool>);
    impl ReadDisk for Little {
        fn read(&self, offset: u64, data: &mut [u8]) -> io::Result<()> {
            self.0.read(offset, data)?;
            if offset == 0 && !self.1.load(Ordering::SeqCst) {
                self.0.fill(0, 4096, 8);
            }
            Ok(())
        }
    }
    for mode in [Mode::Postcopy, Mode::Hybrid] {
        let image = Image::with_room(u64::MAX);
        let (memory, stopped) = stoppable();
        let mut guest = Guest::new(SourceDisk {
            content: Arc::new(Little(Arc::clone(&disk), stopped)),
            ..disk.at_source(&disk_name(0))
        });
        guest.guest = memory;
        let policy = Policy {
            max_downtime: Duration::from_nanos(1),
            ..policy(mode)
        };
        let (outcome, _) = migrate(&mut guest, &image, &policy);
        assert_eq!(outcome, Outcome::Moved);
        assert!(disk.contents() == image.disk.contents());
    }
}

/// A destination that has accepted a guest with a disk, and the connections of its source.
struct Accepted {
    receiver: thread::JoinHandle<Result<(), Refusal>>,
    source: Peer,
    ram: Peer,
}

fn accept_by_hand(image: &Arc<Image>, postcopy: bool) -> Accepted {
    let (dialer, mut acceptor) = Dialer::new();
    let place = Place {
        image: Arc::clone(image),
        discarded: Arc::default(),
    };
    let receiver = thread::spawn(move || {
        receive(Receiving {
            accept: &mut acceptor,
            limit: &ConnectionLimit::default(),
            once: true,
            host: &place,
            progress: &Progress::default(),
            decision: &Decision::default(),
            patience: PATIENCE,
            lingers: &|| {},
        })
    });
    let id = Uuid::from_u128(1);
    let mut source = Peer::control(&*dialer, id);
    assert!(source.recv().unwrap().starts_with("Welcome"));
    let info = |name: String, size| BlockInfo { name, size };
    assert!(source.offer(&Offer {
        vm: "guest".to_owned(),
        machine: serde_bytes::ByteBuf::new(),
        blocks: vec![info("ram".to_owned(), PAGES as u64 * 4096)],
        connections: 1,
        postcopy,
        given: false,
        verify: false,
        disks: vec![info(disk_name(0), SIZE as u64)],
    }));
    assert!(source.recv().unwrap().starts_with("Prepared"));
    let ram = Peer::ram(&*dialer, id, 0);
    Accepted {
        receiver,
        source,
        ram,
    }
}

/// A round that is done is on the storage; the last page of a disk may be a part of one.
#[test]
fn blocks_are_durable_at_the_end_of_their_round() {
    let image = Image::with_room(u64::MAX);
    let Accepted {
        receiver,
        mut source,
        mut ram,
    } = accept_by_hand(&image, false);
    let pages = |first: u64, byte: u8| {
        let mut body = [1_u32.to_le_bytes(), 1_u32.to_le_bytes()].concat();
        body.extend(first.to_le_bytes());
        body.extend(1_u32.to_le_bytes());
        body.extend([byte; 4096]);
        body
    };
    // The last page is a part of one, and the disk has no page behind it.
    let last = SIZE as u64 / 4096;
    assert!(ram.frame(16, &pages(0, 5)) && ram.frame(16, &pages(last, 6)));
    assert!(ram.frame(18, &1_u32.to_le_bytes()), "the end of round 1");
    assert!(source.say(&json!({ "Round": 1 })));
    assert_eq!(source.recv().unwrap(), "RoundDone(1)");
    assert!(image.disk.is_synced());
    let before = image.disk.contents();
    assert!(before[..4096] == [5; 4096] && before[SIZE - 512..] == [6; 512]);
    assert!(source.say(&json!({ "Abort": { "code": "enough", "detail": "" } })));
    assert_eq!(receiver.join().unwrap().unwrap_err().code, "enough");
}

/// Frames that are not within a disk, or announce blocks that are not.
#[test]
fn invalid_blocks_of_disks_write_nothing() {
    let image = Image::with_room(u64::MAX);
    let run = |block: u32, first: u64, pages: u32, data: usize| {
        let mut body = [block.to_le_bytes(), 1_u32.to_le_bytes()].concat();
        body.extend(first.to_le_bytes());
        body.extend(pages.to_le_bytes());
        body.extend(vec![3; data]);
        body
    };
    let end = SIZE as u64 / 4096 + 1;
    for (kind, body) in [
        (16, run(1, end, 1, 4096)),
        (16, run(1, u64::MAX, 1, 4096)),
        (16, run(1, 0, 1, 4095)),
        (16, run(2, 0, 1, 4096)),
        (17, run(1, end - 1, 2, 0)),
        (19, run(1, end - 1, 2, 0)),
    ] {
        let Accepted {
            receiver,
            mut source,
            mut ram,
        } = accept_by_hand(&image, true);
        assert!(ram.frame(kind, &body));
        assert!(source.say(&json!({ "Round": 1 })));
        let told = source.recv().unwrap();
        assert!(told.contains("stream-damaged"), "{kind}: {told}");
        assert_eq!(receiver.join().unwrap().unwrap_err().code, "stream-damaged");
    }
    assert!(image.disk.contents().iter().all(|byte| *byte == 0));
}

/// The marks of a disk that is copied are complete at any moment of a stop.
#[test]
fn last_writes_before_the_stop_arrive() {
    for mode in [Mode::Precopy, Mode::Postcopy] {
        let disk = filled();
        let image = Image::with_room(u64::MAX);
        let mut guest = Guest::new(disk.at_source(&disk_name(0)));
        let (last, dirty): (_, Arc<DirtyBitmap>) = (Arc::clone(&disk), guest.disk.dirty.clone());
        guest.guest = MemoryGuest::with_hook(ram(PAGES), move |moment, _| {
            if moment == Moment::Stopped {
                last.fill(SIZE - 512, 512, 99);
                last.fill(8192, 4096, 0);
                assert!(dirty.count() == 2 || mode == Mode::Postcopy);
            }
        });
        let (outcome, [sent, _]) = migrate(&mut guest, &image, &policy(mode));
        assert_eq!(outcome, Outcome::Moved);
        assert!(disk.contents() == image.disk.contents());
        // In postcopy all blocks follow.
        let in_stop = sent.downtime.unwrap().pages;
        assert_eq!(in_stop >= 2, mode == Mode::Precopy, "{mode:?} {in_stop}");
    }
}

/// A destination of version 3 is offered no bases, and one of any version has none that was not offered.
#[test]
fn bases_that_were_not_offered_are_refused() {
    for version in [3, 4] {
        let (dialer, mut acceptor) = Dialer::new();
        let destination = thread::spawn(move || {
            let stream = acceptor.accept(PATIENCE).unwrap().unwrap();
            let (mut peer, _) = Peer::accepted(stream);
            assert!(peer.say(&json!({ "Welcome": { "version": version } })));
            let offer = peer.recv_offer();
            assert_eq!(offer.disks.len(), 1);
            assert!(peer.say(&json!({ "HasBases": [disk_name(0)] })));
        });
        let disk = filled();
        let mut guest = Guest::new(disk.at_source(&disk_name(0)));
        let progress = Progress::default();
        let sending = Sending {
            id: Uuid::from_u128(1),
            policy: &policy(Mode::Precopy),
            dial: &*dialer,
            journal: &mut NoJournal,
            progress: &progress,
            decision: &Decision::default(),
        };
        let outcome = send(sending, &mut guest);
        destination.join().unwrap();
        assert!(matches!(outcome, Outcome::Stayed { .. }), "{outcome:?}");
        assert_eq!(progress.report().error.unwrap().code, "bases-unexpected");
        assert_eq!(guest.offers_bases, version == 4);
    }
}
