//! The guest at the destination, as far as it uses its disks while blocks of them follow it: reads that
//! must find what was written last, and writes, some of which fail half-way.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use memory::{Admission, AwaitedBlocks, BlockRange, BlockUse, Claim, Waiter};
use migration::testing::MemoryDisk;

use crate::script::Dice;
use crate::world::World;

/// From one operation to the next.
const PAUSE: Duration = Duration::from_micros(100);
/// A bound, and no measure.
const PATIENCE: Duration = Duration::from_secs(30);

/// Ended, with a look at the whole disk, when it is dropped.
pub(crate) struct DiskUser {
    is_over: Arc<AtomicBool>,
    thread: Option<thread::JoinHandle<()>>,
}

struct Disk {
    disk: Arc<MemoryDisk>,
    blocks: Option<Arc<AwaitedBlocks>>,
    /// The content that a read must find.
    truth: Vec<u8>,
    waiter: Arc<Waiter>,
    waiting: BTreeMap<u64, BlockRange>,
}

impl Disk {
    /// Does an operation. Returns false if a read found something else than was written last.
    fn act(&mut self, ticket: u64, range: BlockRange, dice: &mut Dice) -> bool {
        let (from, len) = (range.offset as usize, range.len as usize);
        let claim = match &self.blocks {
            None => None,
            Some(blocks) => match blocks.admit(range, &self.waiter, ticket) {
                Admission::Free => None,
                Admission::Claimed(claim) => Some(claim),
                Admission::Waits => {
                    self.waiting.insert(ticket, range);
                    return true;
                }
            },
        };
        if range.usage == BlockUse::Read {
            return self.disk.read_back(from, len) == self.truth[from..from + len];
        }
        // The device's host fails now and then. What was written of a missing page is replaced.
        let fails = claim.is_some() && dice.roll(8) == 0;
        let byte = 3 + dice.roll(200) as u8;
        self.disk
            .fill(from, if fails { len / 2 } else { len }, byte);
        if fails {
            let present = self.blocks.as_ref().map(|blocks| blocks.missing());
            for at in from..from + len / 2 {
                let page = at / 4096;
                let is_missing = |words: &[u64]| words[page / 64] & 1 << (page % 64) != 0;
                if !present
                    .as_ref()
                    .is_some_and(|pages| is_missing(pages.words()))
                {
                    self.truth[at] = byte;
                }
            }
            return true;
        }
        self.truth[from..from + len].fill(byte);
        drop(claim.map(Claim::done));
        true
    }

    fn act_again(&mut self, dice: &mut Dice) -> bool {
        self.waiter.take_ready().into_iter().all(|ticket| {
            let range = self.waiting.remove(&ticket).unwrap();
            self.act(ticket, range, dice)
        })
    }

    fn left(&self) -> usize {
        self.blocks.as_ref().map_or(0, |blocks| blocks.left())
    }
}

impl DiskUser {
    pub(crate) fn start(
        disks: &[Arc<MemoryDisk>],
        awaited: &[Option<Arc<AwaitedBlocks>>],
        world: Arc<World>,
    ) -> Self {
        let then = world.disks_then.lock().unwrap().clone();
        let disks = disks.iter().zip(awaited).zip(then);
        let disk = |((disk, blocks), truth): ((&Arc<MemoryDisk>, &Option<_>), Vec<u8>)| Disk {
            disk: Arc::clone(disk),
            blocks: blocks.clone(),
            truth,
            waiter: Waiter::new(|| {}),
            waiting: BTreeMap::new(),
        };
        let mut disks: Vec<Disk> = disks.map(disk).collect();
        let is_over = Arc::new(AtomicBool::new(false));
        let over = Arc::clone(&is_over);
        let mut dice = Dice(disks.iter().map(|disk| disk.left() as u64).sum());
        let work = move || {
            let (mut is_right, mut ticket) = (true, 0);
            while !over.load(Ordering::SeqCst) {
                let index = dice.roll(disks.len() as u64) as usize;
                let disk = &mut disks[index];
                is_right &= disk.act_again(&mut dice);
                // As many as a small queue has.
                if disk.waiting.len() < 8 {
                    let sectors = disk.truth.len() as u64 / 512;
                    let (first, count) = (dice.roll(sectors), 1 + dice.roll(24));
                    let usage = [BlockUse::Read, BlockUse::Change][dice.roll(2) as usize];
                    let range = BlockRange {
                        offset: first * 512,
                        len: count.min(sectors - first) * 512,
                        usage,
                    };
                    ticket += 1;
                    is_right &= disk.act(ticket, range, &mut dice);
                }
                thread::sleep(PAUSE);
            }
            // A guest that is lost has no whole disk.
            if disks.iter().all(|disk| disk.left() == 0) {
                let until = Instant::now() + PATIENCE;
                for disk in &mut disks {
                    while !disk.waiting.is_empty() && Instant::now() < until {
                        is_right &= disk.act_again(&mut dice);
                    }
                    let is_whole = disk.disk.contents() == disk.truth;
                    is_right &= is_whole && disk.waiting.is_empty();
                }
            }
            if !is_right {
                world.disks_differed.store(true, Ordering::SeqCst);
            }
        };
        Self {
            is_over,
            thread: Some(thread::spawn(work)),
        }
    }
}

impl Drop for DiskUser {
    fn drop(&mut self) {
        self.is_over.store(true, Ordering::SeqCst);
        if let Some(thread) = self.thread.take() {
            thread.join().unwrap();
        }
    }
}
