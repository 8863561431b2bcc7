//! Pages that come after the guest.

use std::collections::HashMap;
use std::io::ErrorKind;
use std::sync::atomic::{AtomicU8, Ordering};
use std::time::{Duration, Instant};

use memory::{DirtyBitmap, Fault, UserFaults};
use parking_lot::Mutex;

use crate::link::Stream;
use crate::pages::{self, Block, Decoded, PAGE};
use crate::progress::{Progress, micros};
use crate::wire::{self, Kind, WireError};

/// From one look whether it is over to the next.
const LOOK: Duration = Duration::from_millis(50);
/// Before a page that could not be filled is tried again.
const AGAIN: Duration = Duration::from_millis(1);
/// Waits of which the lengths are kept, the last ones.
const KEPT: usize = 1 << 16;

/// How far the hand-over of a guest with missing pages has come.
#[repr(u8)]
enum Stage {
    /// The guest does not run here yet: if pages fail to arrive, the migration is given up.
    Before = 0,
    /// The guest runs here: missing pages are awaited without a time limit.
    Started = 1,
    /// No pages are waited for any more.
    Over = 2,
}

/// Requests pages that a thread waits for.
pub(crate) trait Ask: Send {
    /// Requests a page: the block's index, and the page's. After an error nothing is asked for until
    /// there is another channel, which gets all requests again.
    ///
    /// # Errors
    /// The channel is closed.
    fn ask(&mut self, block: usize, page: usize) -> Result<(), WireError>;
}

impl Ask for Box<dyn Stream> {
    fn ask(&mut self, block: usize, page: usize) -> Result<(), WireError> {
        let body = pages::encode_fault(block as u32, page as u64);
        wire::write(&mut **self, Kind::Fault, &[&body])
    }
}

/// Memory of which pages are still at the source.
pub(crate) struct PostcopyReceiver {
    faults: UserFaults,
    /// Missing pages of each block.
    missing: Vec<DirtyBitmap>,
    /// Pages that a thread waits for, and since when.
    waited: Mutex<HashMap<(usize, usize), Instant>>,
    /// The faults channel; `None` without a connection.
    ask: Mutex<Option<Box<dyn Ask>>>,
    /// How long pages were waited for, in microseconds.
    latencies: Mutex<Vec<u64>>,
    /// A [`Stage`].
    stage: AtomicU8,
    /// How long is waited for a page before.
    patience: Duration,
}

impl PostcopyReceiver {
    /// `missing` is what the source has still. What this side has of it is of an earlier time, and
    /// thrown away.
    pub(crate) fn new(
        blocks: &[Block],
        missing: Vec<DirtyBitmap>,
        ask: impl Ask + 'static,
        patience: Duration,
    ) -> std::io::Result<Self> {
        for (block, missing) in blocks.iter().zip(&missing) {
            // Or the host fills holes with zeros, to make a huge page, before anybody watches them.
            block.ram.refuse_huge_pages()?;
            // Also pages that were never written here: a neighbour that was may have brought the whole
            // huge page, and what is there already is not missed.
            // Before the registration: with UFFD_FEATURE_EVENT_REMOVE a discard of registered
            // memory blocks until the event is read, and no thread reads yet.
            for (first, pages) in missing.snapshot().runs() {
                block.ram.discard(first * PAGE, pages * PAGE)?;
            }
        }
        let blocks = blocks.iter().map(|block| block.ram.clone()).collect();
        Ok(Self {
            faults: UserFaults::new(blocks)?,
            missing,
            waited: Mutex::default(),
            ask: Mutex::new(Some(Box::new(ask))),
            latencies: Mutex::default(),
            stage: AtomicU8::new(Stage::Before as u8),
            patience,
        })
    }

    /// Asks for what is touched, until it is over. On a thread of its own, which touches no guest
    /// memory.
    pub(crate) fn watch(&self, progress: &Progress) {
        let mut later = Vec::new();
        while self.is_whole() {
            // A page in `later` has a thread waiting for it, so the loop must not sleep until the
            // next event.
            let look = if later.is_empty() { LOOK } else { AGAIN };
            let faults = match self.faults.wait(look) {
                Ok(faults) => faults,
                Err(error) => {
                    tracing::error!(%error, "cannot request the pages that a guest waits for");
                    return;
                }
            };
            for fault in faults {
                match fault {
                    Fault::Missing(block, page) => {
                        if !self.expect(block, page) {
                            // It was never written, or given back, or it has come by now.
                            later.push((block, page));
                        }
                    }
                    Fault::Removed(block, first, pages) => {
                        later.extend(self.removed(block, first, pages));
                    }
                }
            }
            // After all events of this turn: UFFDIO_ZEROPAGE fails with EAGAIN until a pending
            // removal is read. A page that has content by now is safe: the call fails with EEXIST,
            // and `zero` only wakes the thread.
            later.retain(|(block, page)| match self.faults.zero(*block, *page) {
                // Memory is being given back, which waits for us to hear of it.
                Err(error) if error.kind() == ErrorKind::WouldBlock => true,
                Err(error) => {
                    tracing::error!(%error, "cannot fill a page");
                    false
                }
                Ok(()) => false,
            });
            if self.faults.is_lost() {
                self.end(progress);
                return;
            }
            let is_late = |since: &Instant| since.elapsed() > self.patience;
            // This has no effect once the guest runs here: `give_up` leaves the stage `Started`
            // alone.
            if self.waited.lock().values().any(is_late) {
                self.give_up();
            }
            self.report_faults(progress);
        }
    }

    fn turn(&self, from: Stage, to: Stage) -> bool {
        let (from, to) = (from as u8, to as u8);
        // Not a plain store: `start` and `give_up` race on different threads. If both succeeded,
        // the guest would run on zeros in place of its pages.
        let turned = self
            .stage
            .compare_exchange(from, to, Ordering::AcqRel, Ordering::Acquire);
        turned.is_ok()
    }

    /// The guest runs here from now on. False if pages did not come that were waited for before.
    pub(crate) fn start(&self) -> bool {
        self.turn(Stage::Before, Stage::Started)
    }

    /// Ends the wait for pages because the source is gone and the guest does not run here yet.
    pub(crate) fn give_up(&self) {
        if !self.turn(Stage::Before, Stage::Over) {
            return;
        }
        // Only after the stage has changed. The threads that this wakes find zeros, and `load` has
        // to see that their result is worthless.
        if let Err(error) = self.faults.end() {
            tracing::error!(%error, "cannot release missing pages");
        }
    }

    /// Whether all that was waited for so far has come.
    pub(crate) fn is_whole(&self) -> bool {
        self.stage.load(Ordering::Acquire) != Stage::Over as u8
    }

    pub(crate) fn is_missing(&self, block: usize, page: usize) -> bool {
        let missing = self.missing.get(block);
        missing.is_some_and(|missing| missing.is_dirty(page * PAGE))
    }

    /// Whether a thread waits for a page.
    pub(crate) fn is_waited_for(&self) -> bool {
        !self.waited.lock().is_empty()
    }

    /// Waits for a page, and asks the source for it. False if it is not missing.
    ///
    /// One lock covers the check and the entry: `fill` removes the page from `missing` first and the entry
    /// from `waited` then. Without the lock an entry could be added between both steps and never be
    /// removed. No thread would wait for it, but it would time out and end a good migration.
    fn expect(&self, block: usize, page: usize) -> bool {
        let mut waited = self.waited.lock();
        if !self.is_missing(block, page) {
            return false;
        }
        // Several threads may wait for one page. The latency counts from the first.
        waited.entry((block, page)).or_insert_with(Instant::now);
        // The request may block on the socket, and `fill` needs this lock to bring pages.
        drop(waited);
        self.ask_for(block, page);
        true
    }

    /// Removes pages that the guest gave back from the missing ones. Returns those that a thread still waits
    /// for.
    fn removed(&self, block: usize, first: usize, pages: usize) -> Vec<(usize, usize)> {
        let Some(missing) = self.missing.get(block) else {
            return Vec::new();
        };
        let mut waited = self.waited.lock();
        // The source still has old content for these pages. As they are no longer missing, `fill`
        // drops it; a thread that waits gets zeros, as after any discard.
        let removed = (first..first.saturating_add(pages)).filter(|page| missing.take_page(*page));
        removed
            .filter(|page| waited.remove(&(block, *page)).is_some())
            .map(|page| (block, page))
            .collect()
    }

    fn ask_for(&self, block: usize, page: usize) {
        // The lock covers the write: `watch` and `connect` must not interleave their frames.
        let mut ask = self.ask.lock();
        let Some(channel) = &mut *ask else { return };
        if channel.ask(block, page).is_err() {
            // It is asked for again over the next connection.
            *ask = None;
        }
    }

    /// Fills pages that came, if they are `admitted` (by page and content; absent: zeros). Some may have
    /// been given back meanwhile.
    pub(super) fn fill(
        &self,
        came: &Decoded<'_>,
        mut admitted: impl FnMut(usize, Option<&[u8; PAGE]>) -> bool,
    ) -> Result<(), WireError> {
        if !self.is_whole() {
            // The machine has ended: the pages are not needed.
            return Ok(());
        }
        for (page, data) in came.pages() {
            // A page can come twice, over a lost connection and its successor. The guest may also
            // have given it back: filling it would restore old content.
            if self.is_missing(came.block, page) && admitted(page, data) {
                self.fill_page(came.block, page, data)?;
            }
        }
        Ok(())
    }

    /// Fills a page that is missing; absent content: zeros.
    pub(crate) fn fill_page(
        &self,
        block: usize,
        page: usize,
        data: Option<&[u8; PAGE]>,
    ) -> std::io::Result<()> {
        let fill = || match data {
            Some(data) => self.faults.fill(block, page, data),
            None => self.faults.zero(block, page),
        };
        // No lock is held in this loop: the watch thread has to read the removal, and takes
        // `waited` for it.
        loop {
            match fill() {
                // Memory is being given back; the watch thread reads that event.
                Err(error) if error.kind() == ErrorKind::WouldBlock && self.is_whole() => {
                    std::thread::yield_now();
                }
                filled => break filled?,
            }
        }
        // After the page is filled: a fault on a page that is not missing is answered with zeros.
        if let Some(missing) = self.missing.get(block) {
            let _ = missing.take_page(page);
        }
        if let Some(since) = self.waited.lock().remove(&(block, page)) {
            let mut latencies = self.latencies.lock();
            if latencies.len() == KEPT {
                latencies.clear();
            }
            latencies.push(micros(since.elapsed()));
        }
        Ok(())
    }

    /// The machine has ended, and needs no pages.
    pub(crate) fn is_lost(&self) -> bool {
        self.faults.is_lost()
    }

    /// How many pages are missing.
    pub(crate) fn left(&self) -> usize {
        self.missing.iter().map(DirtyBitmap::count).sum()
    }

    /// Bits of what is missing, in pieces: block, first page, words.
    pub(super) fn still_missing(&self) -> Vec<(u32, u64, Vec<u64>)> {
        // 32 KiB of bits, far below the 1 MiB that a control frame may have.
        const WORDS: usize = 4096;
        let mut all = Vec::new();
        for (block, missing) in (0..).zip(&self.missing) {
            let words = missing.snapshot().words().to_vec();
            for (index, piece) in words.chunks(WORDS).enumerate() {
                if piece.iter().any(|word| *word != 0) {
                    all.push((block, (index * WORDS * 64) as u64, piece.to_vec()));
                }
            }
        }
        all
    }

    /// There is no connection; what is waited for waits.
    pub(crate) fn disconnect(&self) {
        *self.ask.lock() = None;
    }

    /// There is one again: what is waited for is asked for again.
    pub(super) fn connect(&self, ask: impl Ask + 'static) {
        // The stream comes first. A fault between these two lines is asked for twice, which is
        // harmless; in the other order it would never be asked for.
        *self.ask.lock() = Some(Box::new(ask));
        // A copy, so that the socket is not written under a lock that `fill` needs.
        let waited: Vec<_> = self.waited.lock().keys().copied().collect();
        for (block, page) in waited {
            self.ask_for(block, page);
        }
    }

    fn report_faults(&self, progress: &Progress) {
        let mut sorted = self.latencies.lock().clone();
        if sorted.is_empty() {
            return;
        }
        sorted.sort_unstable();
        let at = |percent: usize| sorted.get(sorted.len() * percent / 100).copied();
        let last = sorted.last().copied().unwrap_or(0);
        progress.update(|report| {
            report.faults = sorted.len() as u64;
            report.fault_p50_us = at(50).unwrap_or(last);
            report.fault_p99_us = at(99).unwrap_or(last);
        });
    }

    /// Ends all waits: all pages are present, or none will come any more.
    pub(crate) fn end(&self, progress: &Progress) {
        self.stage.store(Stage::Over as u8, Ordering::Release);
        self.report_faults(progress);
        if let Err(error) = self.faults.end() {
            tracing::error!(%error, "cannot release missing pages");
        }
    }
}

impl Drop for PostcopyReceiver {
    fn drop(&mut self) {
        self.stage.store(Stage::Over as u8, Ordering::Release);
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;
    use std::sync::Arc;

    use memory::{RamBlock, RamConfig};

    use super::*;

    /// A thread that gives memory back waits for the watch thread, so that must not wait for it in turn.
    #[test]
    fn discards_memory_during_postcopy() {
        const PAGES: usize = 512;
        let config = RamConfig::anonymous((PAGES * PAGE) as u64);
        let ram = Arc::new(RamBlock::new(&config).unwrap());
        let (near, _far) = UnixStream::pair().unwrap();
        let blocks = [Block {
            name: "ram".to_owned(),
            ram: Arc::clone(&ram),
        }];
        // Nothing is missing, so every fault takes the path through `later`.
        let missing = vec![DirtyBitmap::new(ram.len())];
        let patience = Duration::from_secs(10);
        let receiver = PostcopyReceiver::new(
            &blocks,
            missing,
            Box::new(near) as Box<dyn Stream>,
            patience,
        )
        .unwrap();
        assert!(receiver.start());
        let progress = Progress::default();
        std::thread::scope(|scope| {
            scope.spawn(|| receiver.watch(&progress));
            let (done, over) = std::sync::mpsc::channel();
            for first in 0..2 {
                let (done, ram) = (done.clone(), Arc::clone(&ram));
                scope.spawn(move || {
                    for round in 0..4_000 {
                        let at = (first + round * 2) % PAGES * PAGE;
                        if first == 0 {
                            ram.discard(at, PAGE).unwrap();
                        } else {
                            // Of the other's, too.
                            let at = round * 7 % PAGES * PAGE;
                            ram.slice(at, 1).unwrap().copy_from(&[1_u8]);
                            ram.discard(at, PAGE).unwrap();
                        }
                    }
                    done.send(()).unwrap();
                });
            }
            for _ in 0..2 {
                let waited = over.recv_timeout(Duration::from_secs(60));
                if waited.is_err() {
                    // The threads cannot be joined.
                    eprintln!("memory is not given back");
                    std::process::abort();
                }
            }
            receiver.end(&progress);
        });
    }

    /// A fault that was reported before its page came is looked at after it.
    #[test]
    fn received_page_is_not_awaited() {
        let config = RamConfig::anonymous(PAGE as u64);
        let ram = Arc::new(RamBlock::new(&config).unwrap());
        let blocks = [Block {
            name: "ram".to_owned(),
            ram,
        }];
        let missing = DirtyBitmap::new(PAGE);
        missing.set_enabled(true);
        missing.mark(0, PAGE);
        let (near, _far) = UnixStream::pair().unwrap();
        let patience = Duration::from_secs(10);
        let receiver = PostcopyReceiver::new(
            &blocks,
            vec![missing],
            Box::new(near) as Box<dyn Stream>,
            patience,
        )
        .unwrap();
        let run = pages::Run {
            block: 0,
            first: 0,
            pages: 1,
        };
        let body = pages::encode_missing(0, &[run]);
        let came = pages::decode(&body, &blocks, pages::Content::Zeros).unwrap();
        assert!(receiver.expect(0, 0), "it is missing");
        receiver.fill(&came, |_, _| true).unwrap();
        assert!(!receiver.expect(0, 0), "it has come");
        assert!(receiver.waited.lock().is_empty());
    }

    /// The host may back a page that is written with a huge page, of which all others are there, too.
    #[test]
    fn neighbours_of_received_page_are_missing() {
        const PAGES: usize = 4096;
        let config = RamConfig::anonymous((PAGES * PAGE) as u64);
        let ram = Arc::new(RamBlock::new(&config).unwrap());
        for page in (0..PAGES).step_by(64) {
            ram.slice(page * PAGE, PAGE)
                .unwrap()
                .copy_from(&[7_u8; PAGE]);
        }
        let missing = DirtyBitmap::new(ram.len());
        missing.set_enabled(true);
        for page in (0..PAGES).filter(|page| page % 64 != 0) {
            missing.mark(page * PAGE, PAGE);
        }
        let blocks = [Block {
            name: "ram".to_owned(),
            ram: Arc::clone(&ram),
        }];
        let (near, _far) = UnixStream::pair().unwrap();
        let patience = Duration::from_secs(10);
        let receiver = PostcopyReceiver::new(
            &blocks,
            vec![missing],
            Box::new(near) as Box<dyn Stream>,
            patience,
        )
        .unwrap();
        for page in [1, 63, 65, 1000, PAGES - 1] {
            let reader = Arc::clone(&ram);
            let read = std::thread::spawn(move || {
                let mut byte = [9_u8];
                reader.slice(page * PAGE, 1).unwrap().copy_to(&mut byte[..]);
                byte[0]
            });
            // If a huge page had brought this page along, the read would raise no fault, and the
            // wait would return nothing.
            let faults = receiver.faults.wait(patience).unwrap();
            assert_eq!(faults, [Fault::Missing(0, page)]);
            receiver.faults.fill(0, page, &[3; PAGE]).unwrap();
            assert_eq!(read.join().unwrap(), 3);
        }
        let mut byte = [9_u8];
        ram.slice(64 * PAGE, 1).unwrap().copy_to(&mut byte[..]);
        assert_eq!(byte, [7], "what came is there");
        receiver.faults.end().unwrap();
    }
}
