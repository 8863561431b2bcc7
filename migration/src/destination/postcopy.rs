//! Pages that come after the guest.
//!
//! The guest may give memory back while its pages are missing: to its balloon, by unplugging
//! memory, or by reporting it as free. The page is then gone here and still at the source. It counts
//! as received, so that the source's copy is dropped when it comes, and a thread that waits for it
//! gets zeros. Memory that is plugged meanwhile was never at the source and is not missing.

#[cfg(test)]
mod tests;

use std::collections::HashMap;
use std::io::ErrorKind;
use std::sync::atomic::{AtomicU8, Ordering};
use std::time::{Duration, Instant};

use hdrhistogram::Histogram;
use memory::{DirtyBitmap, DirtyPages, Fault, UserFaults};
use parking_lot::{Mutex, RwLock};

use crate::link::Stream;
use crate::message::Refusal;
use crate::pages::{self, Block, Decoded, Filling, PAGE};
use crate::progress::{Progress, micros};
use crate::wire::{self, Kind, WireError};

/// From one look whether it is over to the next.
pub(super) const LOOK: Duration = Duration::from_millis(50);
/// Before a page that could not be filled is tried again.
const AGAIN: Duration = Duration::from_millis(1);
/// The longest wait for a page that is told from longer ones, in microseconds: 1 minute.
const LONGEST: u64 = 60_000_000;
/// Digits to which the lengths of waits are kept.
const DIGITS: u8 = 2;

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

/// Bits of the pages of a block that are missing, in pieces: block, first page, words.
pub(super) fn missing_pieces(block: u32, missing: &DirtyPages) -> Vec<(u32, u64, Vec<u64>)> {
    // 32 KiB of bits, far below the 1 MiB that a control frame may have.
    const WORDS: usize = 4096;
    let pieces = missing.words().chunks(WORDS).enumerate();
    let pieces = pieces.filter(|(_, piece)| piece.iter().any(|word| *word != 0));
    pieces
        .map(|(index, piece)| (block, (index * WORDS * 64) as u64, piece.to_vec()))
        .collect()
}

/// Memory of which pages are still at the source.
pub(crate) struct PostcopyReceiver {
    faults: UserFaults,
    /// Missing pages of each block.
    missing: Vec<DirtyBitmap>,
    /// Pages that a thread waits for, and since when.
    waited: Mutex<HashMap<(usize, usize), Instant>>,
    /// Read while a page is filled, written while the news of given back memory are taken: a page
    /// cannot be given back between the look whether it is missing and its filling.
    filling: RwLock<()>,
    /// The faults channel; `None` without a connection.
    ask: Mutex<Option<Box<dyn Ask>>>,
    /// How long pages were waited for, in microseconds. Of a fixed size: sorting all lengths would hold
    /// up the next fault.
    latencies: Mutex<Histogram<u64>>,
    /// A [`Stage`].
    stage: AtomicU8,
    /// How long is waited for a page before.
    patience: Duration,
    /// Halts the guest, and marks its memory as lost.
    halt: Box<dyn Fn() + Send + Sync>,
    /// Why missing pages cannot be brought any more. Set before the waits end, so that a thread whose
    /// wait has ended finds the reason.
    failure: Mutex<Option<Refusal>>,
    #[cfg(feature = "testing")]
    injected: crate::testing::UnreadableFaults,
    /// A duty that is neglected, to show what it is for.
    #[cfg(test)]
    neglected: Option<tests::Duty>,
}

impl PostcopyReceiver {
    /// `missing` is what the source has still. What this side has of it is of an earlier time, and
    /// thrown away. `halt` halts the guest and marks its memory as lost
    /// ([`Destination::halter`](crate::Destination::halter)).
    pub(crate) fn new(
        blocks: &[Block],
        missing: Vec<DirtyBitmap>,
        ask: impl Ask + 'static,
        patience: Duration,
        halt: Box<dyn Fn() + Send + Sync>,
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
        let latencies = Histogram::new_with_bounds(1, LONGEST, DIGITS);
        let latencies = latencies.map_err(|error| std::io::Error::other(error.to_string()))?;
        Ok(Self {
            faults: UserFaults::new(blocks)?,
            missing,
            waited: Mutex::default(),
            filling: RwLock::default(),
            ask: Mutex::new(Some(Box::new(ask))),
            latencies: Mutex::new(latencies),
            stage: AtomicU8::new(Stage::Before as u8),
            patience,
            halt,
            failure: Mutex::default(),
            #[cfg(feature = "testing")]
            injected: crate::testing::UnreadableFaults::of_this_thread(),
            #[cfg(test)]
            neglected: None,
        })
    }

    /// Asks for what is touched, until it is over. On a thread of its own, which touches no guest
    /// memory.
    pub(crate) fn watch(&self, progress: &Progress) {
        let Err(error) = self.serve_faults(progress) else {
            return;
        };
        let runs_here = self.stage() == Stage::Started as u8;
        if runs_here && self.left() == 0 {
            // A guest that has all of its memory needs no watch.
            return self.end(progress);
        }
        let why = format!("cannot serve the missing pages of the guest's memory: {error}");
        self.fail(Refusal::new("pages-not-served", why), progress);
    }

    fn serve_faults(&self, progress: &Progress) -> std::io::Result<()> {
        let mut later = Vec::new();
        let mut looked = Instant::now();
        while self.is_whole() {
            // A page in `later` has a thread waiting for it, so the loop must not sleep until the
            // next event.
            let look = if later.is_empty() { LOOK } else { AGAIN };
            for (block, page) in self.next_faults(look, &mut later)? {
                if !self.expect(block, page) {
                    // It was never written, or given back, or it has come by now.
                    later.push((block, page));
                }
            }
            self.zero(&mut later)?;
            if self.faults.is_lost() {
                self.end(progress);
                return Ok(());
            }
            // Not behind each fault: the next one waits.
            if looked.elapsed() < LOOK {
                continue;
            }
            looked = Instant::now();
            let is_late = |since: &Instant| since.elapsed() > self.patience;
            // This has no effect once the guest runs here: `give_up` leaves the stage `Started`
            // alone.
            if self.waited.lock().values().any(is_late) {
                self.give_up();
            }
            self.report_faults(progress);
        }
        Ok(())
    }

    /// Wakes threads that wait for pages which do not come, with zeros. Keeps those pages for which that
    /// is not possible yet.
    ///
    /// Called after all events of a turn: UFFDIO_ZEROPAGE fails with EAGAIN until a pending removal is
    /// read. A page that has content by now is safe: the call fails with EEXIST, and `zero` only wakes
    /// the thread.
    fn zero(&self, later: &mut Vec<(usize, usize)>) -> std::io::Result<()> {
        let mut failed = Ok(());
        later.retain(|(block, page)| match self.faults.zero(*block, *page) {
            Ok(()) => false,
            Err(error) => {
                // WouldBlock: memory is being given back, which waits for this thread to read it.
                if error.kind() != ErrorKind::WouldBlock && self.is_whole() {
                    failed = Err(error);
                }
                true
            }
        });
        failed
    }

    /// Ends a guest whose missing pages cannot be brought any more, and all waits for them. Only the
    /// first failure counts.
    pub(crate) fn fail(&self, why: Refusal, progress: &Progress) {
        tracing::error!(%why, left = self.left(), "the missing pages of a guest cannot be brought");
        self.failure.lock().get_or_insert(why);
        // Before the waits end: a thread that is let go finds zeros, and no vCPU and no device may use
        // them.
        (self.halt)();
        self.end(progress);
    }

    /// Returns why missing pages cannot be brought any more.
    pub(crate) fn failure(&self) -> Option<Refusal> {
        self.failure.lock().clone()
    }

    /// Reads the events of the memory. Returns the pages that were touched, and adds to `later` those that
    /// do not come and for which a thread waits.
    fn next_faults(
        &self,
        patience: Duration,
        later: &mut Vec<(usize, usize)>,
    ) -> std::io::Result<Vec<(usize, usize)>> {
        if !self.faults.poll(patience)? {
            return Ok(Vec::new());
        }
        #[cfg(feature = "testing")]
        self.injected.check()?;
        // The thread that gives memory back takes the pages away as soon as its event was read. Until
        // then UFFDIO_COPY fails, and behind that it would bring old content back. So no page may be
        // filled between the read and the note that these are not missing any more.
        let filling = self.filling.write();
        let faults = self.faults.read()?;
        let mut touched = Vec::new();
        for fault in faults {
            match fault {
                Fault::Missing(block, page) => touched.push((block, page)),
                Fault::Removed(block, first, pages) => {
                    later.extend(self.removed(block, first, pages));
                }
            }
        }
        drop(filling);
        Ok(touched)
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

    /// The guest runs here from now on. False if pages did not come that were waited for before. Called again
    /// after a start that failed, when an operator decides again.
    pub(crate) fn start(&self) -> bool {
        self.turn(Stage::Before, Stage::Started) || self.stage() == Stage::Started as u8
    }

    fn stage(&self) -> u8 {
        self.stage.load(Ordering::Acquire)
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
        self.stage() != Stage::Over as u8
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
        let removed = (first..first.saturating_add(pages)).filter(|page| {
            #[cfg(test)]
            if self.neglected == Some(tests::Duty::Received) {
                return missing.is_dirty(page * PAGE);
            }
            missing.take_page(*page)
        });
        let removed = removed
            .filter(|page| waited.remove(&(block, *page)).is_some())
            .map(|page| (block, page));
        #[cfg(test)]
        if self.neglected == Some(tests::Duty::Wake) {
            drop(removed.collect::<Vec<_>>());
            return Vec::new();
        }
        removed.collect()
    }

    /// Asks the source for a page of memory or of a disk, if there is a connection.
    pub(super) fn ask_for(&self, block: usize, page: usize) {
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
        for (first, content) in came.fillings() {
            let (mut page, mut rest) = (first, content);
            while !rest.is_empty() {
                // A page can come twice, over a lost connection and its successor. The guest may also
                // have given it back: filling it would restore old content.
                let is_wanted = |index: &usize| {
                    let page = page + index;
                    self.is_missing(came.block, page) && admitted(page, rest.get(*index))
                };
                let run = (0..rest.len()).take_while(is_wanted).count();
                let (wanted, behind) = rest.split(run);
                self.fill_pages(came.block, page, wanted)?;
                // The next one is not wanted.
                page += run + 1;
                rest = behind.split(1).1;
            }
        }
        Ok(())
    }

    /// Fills a page, unless it is not missing or is given back meanwhile; absent content: zeros.
    pub(crate) fn fill_page(
        &self,
        block: usize,
        page: usize,
        data: Option<&[u8; PAGE]>,
    ) -> std::io::Result<()> {
        loop {
            // For one try: while a removal is pending, the watch thread needs the lock to read it.
            let filling = self.filling.read();
            if !self.is_missing(block, page) {
                return Ok(());
            }
            let filled = match data {
                Some(data) => self.faults.fill(block, page, data),
                None => self.faults.zero(block, page),
            };
            drop(filling);
            match filled {
                // Memory is being given back; the watch thread reads that event.
                Err(error) if error.kind() == ErrorKind::WouldBlock && self.is_whole() => {
                    std::thread::yield_now();
                }
                filled => break filled?,
            }
        }
        self.came(block, page, 1);
        Ok(())
    }

    /// Notes that pages are filled. Not before: a fault on a page that is not missing is answered with
    /// zeros.
    fn came(&self, block: usize, first: usize, pages: usize) {
        let Some(missing) = self.missing.get(block) else {
            return;
        };
        for page in first..first.saturating_add(pages) {
            let _ = missing.take_page(page);
            if let Some(since) = self.waited.lock().remove(&(block, page)) {
                self.latencies
                    .lock()
                    .saturating_record(micros(since.elapsed()));
            }
        }
    }

    /// Fills those of neighbouring pages that are missing, as many as possible with one system call.
    pub(crate) fn fill_pages(
        &self,
        block: usize,
        first: usize,
        content: Filling<'_>,
    ) -> std::io::Result<()> {
        let (mut page, mut rest) = (first, content);
        while !rest.is_empty() {
            let filled = self.fill_run(block, page, rest)?;
            if filled == 0 {
                // It is not missing any more, or memory is being given back.
                self.fill_page(block, page, rest.get(0))?;
            }
            page += filled.max(1);
            (_, rest) = rest.split(filled.max(1));
        }
        Ok(())
    }

    /// Fills neighbouring pages up to the first that is not missing, and returns how many. Less if some came
    /// meanwhile, or memory is being given back.
    fn fill_run(&self, block: usize, first: usize, content: Filling<'_>) -> std::io::Result<usize> {
        // As in `fill_page`: no page may be given back between the look and its filling.
        let filling = self.filling.read();
        let run = (first..first.saturating_add(content.len()))
            .take_while(|page| self.is_missing(block, *page))
            .count();
        let filled = match content.split(run).0 {
            run if run.len() < 2 => 0,
            Filling::Data(pages) => self.faults.fill_run(block, first, pages)?,
            Filling::Zeros(pages) => self.faults.zero_run(block, first, pages)?,
        };
        drop(filling);
        self.came(block, first, filled);
        Ok(filled)
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
        let blocks = (0..).zip(&self.missing);
        let pieces = blocks.flat_map(|(block, missing)| missing_pieces(block, &missing.snapshot()));
        pieces.collect()
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

    /// Notes how long requests to disks waited for blocks.
    pub(super) fn record_waits(&self, waited: &[Duration]) {
        let mut latencies = self.latencies.lock();
        let waited = waited.iter().map(|span| micros(*span));
        waited.for_each(|us| latencies.saturating_record(us));
    }

    fn report_faults(&self, progress: &Progress) {
        let latencies = self.latencies.lock();
        let (count, p50, p99) = (
            latencies.len(),
            latencies.value_at_quantile(0.5),
            latencies.value_at_quantile(0.99),
        );
        drop(latencies);
        if count > 0 {
            progress.update(|report| {
                report.faults = count;
                report.fault_p50_us = p50;
                report.fault_p99_us = p99;
            });
        }
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
