//! The last page fault of a guest that runs without all of its pages. Other pages yield for a moment after
//! one, and follow it.

use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use crate::disks::Contents;
use crate::pages::{PAGE, Run};
use crate::sender::SMALL_BATCH;

/// The time of the last page fault. Other pages yield for a moment after one.
pub(crate) struct FaultPriority {
    begun: Instant,
    /// Microseconds since then.
    last: AtomicU64,
    /// The page behind the last fault and what followed it, and its block: [`NOWHERE`] if none is left
    /// there.
    next: AtomicU64,
}

const NOWHERE: u64 = u64::MAX;
/// Bits of a page's number: a block of 4 PiB.
const PAGE_BITS: u32 = 40;

impl Default for FaultPriority {
    fn default() -> Self {
        Self {
            begun: Instant::now(),
            last: AtomicU64::new(0),
            next: AtomicU64::new(NOWHERE),
        }
    }
}

impl FaultPriority {
    /// A thread that waits for one page will soon wait for the next. In microseconds.
    const SOON: u64 = 1_000;
    const WAY: Duration = Duration::from_micros(100);

    fn now(&self) -> u64 {
        crate::progress::micros(self.begun.elapsed())
    }

    /// Records a page fault.
    pub(crate) fn is_needed(&self) {
        // 0 stands for no fault so far. Relaxed: a stale value only shifts the pause by a batch.
        self.last.store(self.now().max(1), Ordering::Relaxed);
    }

    /// Has the bulk pages follow a fault.
    pub(crate) fn follow(&self, block: u32, page: u64) {
        self.next.store(place(block, page), Ordering::Relaxed);
    }

    /// The batch behind the last fault, if something is to be sent there. The channels continue behind it
    /// until there is nothing, or another fault.
    pub(crate) fn behind_fault(&self, contents: Contents<'_>) -> Option<Run> {
        let next = self.next.swap(NOWHERE, Ordering::Relaxed);
        if next == NOWHERE {
            return None;
        }
        let (block, first) = ((next >> PAGE_BITS) as u32, next & ((1 << PAGE_BITS) - 1));
        let dirty = contents.dirty(block)?;
        let left = (dirty.pages() as u64).checked_sub(first)?;
        let pages = left.min(SMALL_BATCH as u64);
        let is_left = |page| dirty.is_dirty(page as usize * PAGE);
        if !(first..first + pages).any(is_left) {
            return None;
        }
        // Not if another fault came meanwhile: that one is followed.
        let behind = place(block, first + pages);
        let _ = self
            .next
            .compare_exchange(NOWHERE, behind, Ordering::Relaxed, Ordering::Relaxed);
        Some(Run {
            block,
            first,
            pages: pages as u32,
        })
    }

    fn give_way(&self) {
        let last = self.last.load(Ordering::Relaxed);
        if last != 0 && self.now().saturating_sub(last) < Self::SOON {
            // Once for each turn, however many faults there are: the bulk pages end the faults,
            // and a guest that faults all the time must not starve them.
            thread::sleep(Self::WAY);
        }
    }
}

/// The turn of a channel for bulk pages, which ends when it has sent some.
#[derive(Default)]
pub(crate) struct Turn {
    /// Bytes that were sent in it.
    sent: u64,
}

impl Turn {
    /// Bytes of a turn. A sleep takes longer than the time that it names, as long as these take on a fast
    /// link: with a turn of one batch, a guest that faults all the time had its pages two to four times later.
    const LENGTH: u64 = 256 << 10;

    /// Accounts for bytes.
    pub(crate) fn sent(&mut self, bytes: u64) {
        self.sent = self.sent.saturating_add(bytes);
    }

    /// At the end of the turn, leaves the link and the CPU to a thread that waits for pages, if there is
    /// one, and begins another turn.
    pub(crate) fn give_way(&mut self, priority: &FaultPriority) {
        if self.sent >= Self::LENGTH {
            self.sent = 0;
            priority.give_way();
        }
    }
}

/// A page and its block in one number; the block of 4 PiB that would be [`NOWHERE`] does not exist.
fn place(block: u32, page: u64) -> u64 {
    u64::from(block) << PAGE_BITS | page.min((1 << PAGE_BITS) - 1)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pages::Block;

    #[test]
    fn channel_rests_between_turns() {
        let (priority, mut turn) = (FaultPriority::default(), Turn::default());
        for (sent, left) in [(Turn::LENGTH - 1, Turn::LENGTH - 1), (1, 0), (5, 5)] {
            turn.sent(sent);
            turn.give_way(&priority);
            assert_eq!(turn.sent, left);
        }
    }

    #[test]
    fn bulk_pages_follow_the_last_fault() {
        let block = Block {
            name: "ram".to_owned(),
            ram: crate::testing::ram(100),
        };
        let dirty = block.ram.dirty();
        dirty.set_enabled(true);
        dirty.mark(20 * PAGE, 40 * PAGE);
        let contents = Contents {
            blocks: std::slice::from_ref(&block),
            disks: &[],
        };
        let priority = FaultPriority::default();
        let next = || {
            let run = priority.behind_fault(contents)?;
            for page in run.first..run.first + u64::from(run.pages) {
                let _ = dirty.take_page(page as usize);
            }
            Some((run.first, run.pages))
        };
        assert_eq!(next(), None, "no fault");
        priority.follow(0, 21);
        assert_eq!([next(), next()], [Some((21, 16)), Some((37, 16))]);
        // Another is followed, and the first no more.
        priority.follow(0, 20);
        assert_eq!([next(), next()], [Some((20, 16)), None]);
        priority.follow(0, 45);
        assert_eq!([next(), next()], [Some((45, 16)), None]);
        // The end of the block, and places that no guest has.
        dirty.mark(99 * PAGE, PAGE);
        priority.follow(0, 98);
        assert_eq!([next(), next()], [Some((98, 2)), None]);
        for (block, page) in [(0, 100), (0, u64::MAX), (1, 0), (u32::MAX, u64::MAX)] {
            priority.follow(block, page);
            assert_eq!(next(), None);
        }
    }
}
