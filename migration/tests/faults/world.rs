//! Both sides of a migration, of memory alone: a guest whose CPU writes, a destination, their journals,
//! and the checks that hold at each step.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use memory::{AwaitedBlocks, RamBlock};
use migration::testing::{MemoryDisk, MemoryGuest, blocks, contents, disk_name, fill_page, ram};
use migration::{
    Block, Destination, DestinationDisk, Fate, Host, Journal, Offer, Outcome, Refusal, Source,
    SourceDisk, StartFailure, Step, Stopped, Whereabouts,
};
use uuid::Uuid;

use crate::PAGES;
use crate::disk_user::DiskUser;
use crate::link::Life;
use crate::script::Dice;

/// Time before the stop, as the source counts it: the destination must receive the source's
/// opinion and not the engine's.
pub(crate) const CLOCKS_STOPPED_BEFORE: Duration = Duration::from_secs(100);

/// The places where copies of the guest run.
#[derive(Default)]
pub(crate) struct World {
    pub(crate) at_source: AtomicBool,
    pub(crate) at_destination: AtomicBool,
    pub(crate) ran_at_destination: AtomicBool,
    /// Memory was not what it should have been when it was loaded.
    pub(crate) differed: AtomicBool,
    /// Disks were not what they should have been, or not durable.
    pub(crate) disks_differed: AtomicBool,
    /// The content of the disks when the guest was saved.
    pub(crate) disks_then: Mutex<Vec<Vec<u8>>>,
    /// Blocks that came after the guest.
    pub(crate) followed: AtomicU64,
    pub(crate) lock: Mutex<Option<&'static str>>,
    /// When the guest's clocks were read.
    pub(crate) clocks_at: Mutex<Option<Instant>>,
    /// The time that the destination adds to the clocks.
    pub(crate) stopped_for: Mutex<Duration>,
}

impl World {
    pub(crate) fn run(&self, here: &AtomicBool, there: &AtomicBool) {
        // The store comes before the check. If both sides start at once, at least one sees the
        // other.
        here.store(true, Ordering::SeqCst);
        assert!(!there.load(Ordering::SeqCst), "two copies run");
    }
}

fn hash(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |sum: u64, byte| {
        (sum ^ u64::from(*byte)).wrapping_mul(0x100_0000_01b3)
    })
}

pub(crate) fn sum(ram: &RamBlock) -> u64 {
    hash(&contents(ram))
}

/// The length of a stop that is called off.
const LONG_STOP: Duration = Duration::from_millis(60);

/// The sizes of a guest's disks: one that ends within a page.
const DISK_SIZES: [usize; 2] = [40 * 4096 + 1536, 512];

pub(crate) fn disks(count: usize) -> Vec<Arc<MemoryDisk>> {
    let sizes = DISK_SIZES.into_iter().take(count);
    sizes.map(MemoryDisk::new).collect()
}

/// Writes some sectors of a disk, zeros among them.
pub(crate) fn write_disk(disks: &[Arc<MemoryDisk>], dice: &mut Dice) {
    let Some(disk) = disks.get(dice.roll(DISK_SIZES.len() as u64) as usize) else {
        return;
    };
    let sectors = disk.contents().len() as u64 / 512;
    let (first, count) = (dice.roll(sectors), 1 + dice.roll(20));
    disk.fill(
        first as usize * 512,
        count as usize * 512,
        dice.roll(3) as u8,
    );
}

/// The guest's CPU: writes to memory whenever it runs, also while pages are read to be sent.
pub(crate) struct Cpu {
    /// Locked for each write, so that none is under way once the guest is stopped.
    pub(crate) runs: Arc<Mutex<bool>>,
    pub(crate) is_over: Arc<AtomicBool>,
    pub(crate) thread: Option<thread::JoinHandle<()>>,
}

impl Cpu {
    /// Writes as fast as so many pages from harvest to harvest suggest; none for 0.
    pub(crate) fn start(
        ram: Arc<RamBlock>,
        disks: Vec<Arc<MemoryDisk>>,
        seed: u64,
        writes: u64,
    ) -> Self {
        let (runs, is_over) = (Arc::new(Mutex::new(true)), Arc::new(AtomicBool::new(false)));
        let (running, ended) = (Arc::clone(&runs), Arc::clone(&is_over));
        let mut dice = Dice(!seed);
        let write = move || {
            while !ended.load(Ordering::SeqCst) {
                let running = running.lock().unwrap();
                for _ in 0..if *running { 1 + writes / 20 } else { 0 } {
                    write_page(&ram, &mut dice);
                    write_disk(&disks, &mut dice);
                }
                drop(running);
                // Not under the lock: `stop` has to get it between two bursts.
                thread::sleep(Duration::from_micros(100));
            }
        };
        let thread = (writes > 0).then(|| thread::spawn(write));
        Self {
            runs,
            is_over,
            thread,
        }
    }

    pub(crate) fn run(&self, runs: bool) {
        *self.runs.lock().unwrap() = runs;
    }
}

impl Drop for Cpu {
    fn drop(&mut self) {
        self.is_over.store(true, Ordering::SeqCst);
        if let Some(thread) = self.thread.take() {
            thread.join().unwrap();
        }
    }
}

pub(crate) fn write_page(ram: &RamBlock, dice: &mut Dice) {
    let page = dice.roll(PAGES as u64) as usize;
    fill_page(ram, page, dice.roll(3) as u8);
}

pub(crate) struct TestSource {
    pub(crate) cpu: Cpu,
    pub(crate) guest: MemoryGuest,
    pub(crate) world: Arc<World>,
    pub(crate) life: Arc<Life>,
    /// Its journal.
    pub(crate) paper: Paper,
    pub(crate) dice: Dice,
    /// Pages that the guest writes from harvest to harvest.
    pub(crate) writes: u64,
    pub(crate) paused: bool,
    /// Stops that take too long.
    pub(crate) long_stops: u32,
}

impl TestSource {
    pub(crate) fn scribble(&mut self) {
        if !self.world.at_source.load(Ordering::SeqCst) {
            return;
        }
        for _ in 0..self.writes {
            write_page(&self.guest.ram, &mut self.dice);
            write_disk(&self.guest.disks, &mut self.dice);
        }
    }
}

impl Source for TestSource {
    fn offer(&mut self) -> Result<Offer, Refusal> {
        self.life.step()?;
        self.guest.offer()
    }

    fn blocks(&self) -> Vec<Block> {
        self.guest.blocks()
    }

    fn disks(&self) -> Vec<SourceDisk> {
        self.guest.disks()
    }

    fn start_tracking(&mut self) -> Result<(), Refusal> {
        self.life.step()?;
        self.guest.start_tracking()
    }

    fn stop_tracking(&mut self) -> Result<(), Refusal> {
        self.life.step()?;
        self.guest.stop_tracking()
    }

    fn harvest(&mut self) -> Result<(), Refusal> {
        self.life.step()?;
        self.scribble();
        Ok(())
    }

    fn throttle(&mut self, percent: u8) {
        if percent > 0 {
            self.writes /= 2;
        }
    }

    fn dry_run(&mut self) -> Result<Vec<u8>, Refusal> {
        self.life.step()?;
        self.guest.dry_run()
    }

    fn pre_sync(&mut self) {}

    fn stop(&mut self) -> Result<Stopped, Refusal> {
        self.life.step()?;
        self.scribble();
        self.cpu.run(false);
        self.world.at_source.store(false, Ordering::SeqCst);
        if let Some(left) = self.long_stops.checked_sub(1) {
            self.long_stops = left;
            std::thread::sleep(LONG_STOP);
        }
        // Far in the past, so that the test can tell this time from one that the engine measures.
        let clocks_at = Instant::now() - CLOCKS_STOPPED_BEFORE;
        *self.world.clocks_at.lock().unwrap() = Some(clocks_at);
        Ok(Stopped {
            was_paused: self.paused,
            clocks_at,
        })
    }

    fn save(&mut self) -> Result<Vec<u8>, Refusal> {
        self.life.step()?;
        assert!(!self.world.at_source.load(Ordering::SeqCst));
        let disks = self.guest.disks.iter().map(|disk| disk.contents());
        *self.world.disks_then.lock().unwrap() = disks.collect();
        // The state is a checksum of memory: `load` at the destination notices any stale page.
        Ok(sum(&self.guest.ram).to_le_bytes().to_vec())
    }

    fn flush(&mut self) -> Result<(), Refusal> {
        self.life.step()?;
        assert_eq!(*self.world.lock.lock().unwrap(), Some("source"));
        Ok(())
    }

    fn hand_over(&mut self) -> Result<(), Refusal> {
        self.life.step()?;
        // Until the guest is given away on paper, no third program may find its disk free.
        let given = self.paper.0.lock().unwrap().last() == Some(&Step::Commit);
        assert!(given, "the disk is free and the guest is not given away");
        *self.world.lock.lock().unwrap() = None;
        Ok(())
    }

    fn resume_copying(&mut self) -> Result<(), Refusal> {
        self.life.step()?;
        // A guest that is still the source's has kept its locks.
        assert_eq!(*self.world.lock.lock().unwrap(), Some("source"));
        if !self.paused {
            self.cpu.run(true);
            self.world
                .run(&self.world.at_source, &self.world.at_destination);
        }
        Ok(())
    }

    fn resume(&mut self) -> Result<(), Refusal> {
        // Not a `step`: a dead source must not resume, and a live one must not die in here.
        if self.life.is_dead() {
            return Err(Refusal::new("dead", "the process is dead"));
        }
        *self.world.lock.lock().unwrap() = Some("source");
        if !self.paused {
            self.cpu.run(true);
            self.world
                .run(&self.world.at_source, &self.world.at_destination);
        }
        Ok(())
    }

    fn show(&mut self, _: &Whereabouts) {
        assert!(!self.world.at_source.load(Ordering::SeqCst));
    }

    fn gone(&mut self) {}

    fn ended(&mut self, _: &Outcome) {}
}

pub(crate) struct TestTarget {
    pub(crate) ram: Arc<RamBlock>,
    pub(crate) disks: Vec<Arc<MemoryDisk>>,
    pub(crate) world: Arc<World>,
    pub(crate) life: Arc<Life>,
    /// Blocks of the disks that come after the guest.
    pub(crate) awaited: Vec<Option<Arc<AwaitedBlocks>>>,
    /// The guest, as far as it uses its disks while blocks follow it.
    pub(crate) user: Option<DiskUser>,
}

impl Destination for TestTarget {
    fn blocks(&self) -> Vec<Block> {
        blocks(&self.ram)
    }

    fn disks(&self) -> Vec<DestinationDisk> {
        let disks = self.disks.iter().enumerate();
        disks
            .map(|(index, disk)| disk.at_destination(&disk_name(index)))
            .collect()
    }

    fn dry_run(&mut self, state: &[u8]) -> Result<(), Refusal> {
        self.life.step()?;
        assert_eq!(state, MemoryGuest::DRY_RUN);
        Ok(())
    }

    fn load(&mut self, state: &[u8]) -> Result<(), Refusal> {
        self.life.step()?;
        let then = self.world.disks_then.lock().unwrap();
        for (index, (disk, then)) in self.disks.iter().zip(&*then).enumerate() {
            let awaited = self.awaited.get(index).and_then(Option::as_ref);
            let missing = awaited.map(|blocks| blocks.missing());
            let is_missing = |page: usize| {
                let missing = missing.as_ref();
                missing.is_some_and(|pages| pages.words()[page / 64] & 1 << (page % 64) != 0)
            };
            let here = disk.contents();
            let mut pages = here.chunks(4096).zip(then.chunks(4096)).enumerate();
            let is_right = pages.all(|(page, (here, then))| is_missing(page) || here == then);
            if !is_right || !disk.is_synced() {
                self.world.disks_differed.store(true, Ordering::SeqCst);
            }
        }
        drop(then);
        if state != sum(&self.ram).to_le_bytes() {
            // So it is where pages were to follow, and their source is gone.
            self.world.differed.store(true, Ordering::SeqCst);
            return Err(Refusal::new("differs", "memory is not what it was"));
        }
        Ok(())
    }

    fn await_blocks(&mut self, disks: &[Option<Arc<AwaitedBlocks>>]) -> Result<(), Refusal> {
        self.life.step()?;
        self.awaited = disks.to_vec();
        let left = disks.iter().flatten().map(|blocks| blocks.left() as u64);
        self.world.followed.fetch_add(left.sum(), Ordering::SeqCst);
        Ok(())
    }

    fn blocks_arrived(&mut self) -> Result<(), Refusal> {
        self.life.step()?;
        // Behind this the source may free the only other copy.
        let are_durable = self.disks.iter().all(|disk| disk.is_synced());
        let left: usize = self
            .awaited
            .iter()
            .flatten()
            .map(|blocks| blocks.left())
            .sum();
        if !are_durable || left > 0 {
            self.world.disks_differed.store(true, Ordering::SeqCst);
        }
        Ok(())
    }

    fn take_over(&mut self) -> Result<(), Refusal> {
        self.life.step()?;
        let mut lock = self.world.lock.lock().unwrap();
        // Once more after a try that failed behind it.
        let is_free = lock.is_none_or(|who| who == "destination");
        assert!(is_free, "the disk is {:?}'s", *lock);
        *lock = Some("destination");
        Ok(())
    }

    fn start(&mut self, stopped_for: Duration, paused: bool) -> Result<Instant, StartFailure> {
        // Before the flags are set: a process that dies here has run no instruction.
        self.life.step().map_err(StartFailure::NeverRan)?;
        let clocks_at = self.world.clocks_at.lock().unwrap().unwrap();
        assert!(
            stopped_for <= clocks_at.elapsed(),
            "{stopped_for:?} is more than the time since the clocks were read"
        );
        *self.world.stopped_for.lock().unwrap() = stopped_for;
        self.world.ran_at_destination.store(true, Ordering::SeqCst);
        if !paused {
            self.world
                .run(&self.world.at_destination, &self.world.at_source);
        }
        if self.awaited.iter().any(Option::is_some) {
            self.user = Some(DiskUser::start(
                &self.disks,
                &self.awaited,
                Arc::clone(&self.world),
            ));
        }
        Ok(Instant::now())
    }

    fn discard(&mut self) {
        self.user = None;
        let mut lock = self.world.lock.lock().unwrap();
        if *lock == Some("destination") {
            *lock = None;
        }
        self.world.at_destination.store(false, Ordering::SeqCst);
    }
}

/// State that survives a process.
#[derive(Clone, Default)]
pub(crate) struct Paper(pub(crate) Arc<Mutex<Vec<Step>>>);

pub(crate) struct TestJournal {
    pub(crate) paper: Paper,
    pub(crate) life: Arc<Life>,
}

impl Journal for TestJournal {
    fn record(&mut self, step: Step) -> io::Result<()> {
        // Death comes before the step is written, or after it.
        self.life.step().map_err(io::Error::other)?;
        self.paper.0.lock().unwrap().push(step);
        self.life.step().map_err(io::Error::other)
    }
}

pub(crate) struct TestHost {
    pub(crate) world: Arc<World>,
    pub(crate) life: Arc<Life>,
    pub(crate) papers: Mutex<BTreeMap<Uuid, Paper>>,
}

impl Host for TestHost {
    fn prepare(
        &self,
        _: Uuid,
        offer: &Offer,
        _: Vec<File>,
    ) -> Result<Box<dyn Destination>, Refusal> {
        self.life.step()?;
        Ok(Box::new(TestTarget {
            ram: ram(PAGES),
            disks: disks(offer.disks.len()),
            world: Arc::clone(&self.world),
            life: Arc::clone(&self.life),
            awaited: Vec::new(),
            user: None,
        }))
    }

    fn journal(&self, migration: Uuid, _: &str) -> io::Result<Box<dyn Journal>> {
        let paper = Paper::default();
        self.papers.lock().unwrap().insert(migration, paper.clone());
        Ok(Box::new(TestJournal {
            paper,
            life: Arc::clone(&self.life),
        }))
    }

    fn fate(&self, migration: Uuid) -> Fate {
        match self.papers.lock().unwrap().get(&migration) {
            None => Fate::Unknown,
            Some(paper) if paper.0.lock().unwrap().last() == Some(&Step::Running) => Fate::Ran,
            Some(_) => Fate::NeverRan,
        }
    }
}
