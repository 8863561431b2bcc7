//! Memory on demand: the guest runs before its memory is read, and a page is read when it is touched.
//!
//! ```text
//!   guest, devices ── touch a missing page ─► userfaultfd
//!   thread `watch`    reads the fault, and asks for the page
//!   thread `serve`    reads the page, checks it, fills it: the guest continues
//!   thread `prefetch` brings the working set, if it was recorded
//!   restore's thread  loads the machine, starts the guest, then reads all pages in their order
//! ```
//!
//! Every page is checked before it is filled. A page that cannot be read ends the guest: the threads that
//! wait for it are let go only when the guest is halted and its memory is marked as lost, so that none of
//! them uses the zeros that it finds.
//!
//! While a working set is recorded no page is read ahead: each page that the guest touches is a fault.

use std::sync::mpsc::{self, Receiver, Sender};
use std::thread;
use std::time::Duration;

use memory::{DirtyBitmap, PageBuffer};

use super::read::{Place, RestoreError, Snapshot, damaged};
use super::record::Recorder;
use super::restore::{Restoring, load, start};
use super::working_set::WorkingSet;
use super::{CHUNK, HASHES, MEMORY, ZEROS};
use crate::MigrationError;
use crate::decision::Decision;
use crate::destination::Destination;
use crate::destination::postcopy::{Ask, PostcopyReceiver};
use crate::pages::{Block, Filling, PAGE};
use crate::progress::{Phase, Progress};
use crate::threads::in_span;
use crate::wire::WireError;

/// How long a page may take to be read before the guest runs. After that the guest waits as long as the
/// storage does.
const PATIENCE: Duration = Duration::from_secs(60);

/// A page that a thread waits for: the block's index, and the page's.
type Page = (usize, usize);

impl Ask for Sender<Page> {
    fn ask(&mut self, block: usize, page: usize) -> Result<(), WireError> {
        self.send((block, page)).map_err(|_| WireError::Closed)
    }
}

/// Memory of which pages are still in the file.
struct OnDemand<'a> {
    snapshot: &'a Snapshot,
    receiver: PostcopyReceiver,
    /// The offset of each block in the file.
    starts: Vec<u64>,
    progress: &'a Progress,
    recorder: Option<&'a Recorder>,
}

/// Ends all waits, also when the thread that restores panics: the others are joined then.
struct EndOnDrop<'a>(&'a PostcopyReceiver, &'a Progress);

impl Drop for EndOnDrop<'_> {
    fn drop(&mut self) {
        self.0.end(self.1);
        self.0.disconnect();
    }
}

pub(super) fn restore(
    restoring: &Restoring<'_>,
    machine: &mut dyn Destination,
) -> Result<(), MigrationError> {
    let begun = OnDemand::new(restoring, machine);
    let (on_demand, asked) = begun.inspect_err(|_| machine.discard())?;
    let (on_demand, progress) = (&on_demand, restoring.progress);
    let halt = machine.halter();
    thread::scope(|scope| {
        let _end = EndOnDrop(&on_demand.receiver, progress);
        let begin = || {
            let no_thread = |error| MigrationError::here("host-refused", error);
            let builder = |name: &str| thread::Builder::new().name(name.to_owned());
            let watch = in_span(|| on_demand.receiver.watch(progress));
            builder("watch")
                .spawn_scoped(scope, watch)
                .map_err(no_thread)?;
            let serve = in_span(move || on_demand.serve(&asked));
            builder("serve")
                .spawn_scoped(scope, serve)
                .map_err(no_thread)?;
            // Before the guest runs, and while it is made: what it touches then is there.
            let prefetching = match (restoring.snapshot.working_set(), on_demand.recorder) {
                (Some(set), None) => {
                    let prefetch = in_span(move || on_demand.prefetch(set));
                    let spawned = builder("prefetch").spawn_scoped(scope, prefetch);
                    Some(spawned.map_err(no_thread)?)
                }
                _ => None,
            };
            let loaded = load(restoring, machine);
            // First: the memory of such a guest is lost, of which a load may complain.
            if let Some(why) = on_demand.receiver.failure() {
                return Err(MigrationError::Here(why));
            }
            loaded?;
            if !on_demand.receiver.start() {
                return Err(on_demand.why());
            }
            // From here on a cancel comes too late: the guest may run.
            if !restoring.decision.commit() {
                return Err(MigrationError::Canceled);
            }
            progress.enter(Phase::HandingOver);
            start(restoring, machine)?;
            Ok(prefetching)
        };
        let prefetching = begin().inspect_err(|_| {
            // While the threads are there: the machine may wait for a page.
            halt();
            machine.discard();
        })?;
        progress.enter(Phase::Postcopy);
        (restoring.arrived)();
        let recorded = match on_demand.recorder {
            Some(recorder) => on_demand.record(recorder),
            None => Ok(()),
        };
        if let Some(prefetching) = prefetching {
            // The working set comes first. After a panic its pages are read ahead like the others.
            let _ = prefetching.join();
        }
        on_demand.read_ahead();
        match on_demand.receiver.failure() {
            None => recorded,
            Some(why) => {
                machine.fail(&why);
                Err(MigrationError::Here(why))
            }
        }
    })
}

impl<'a> OnDemand<'a> {
    fn new(
        restoring: &Restoring<'a>,
        machine: &dyn Destination,
    ) -> Result<(Self, Receiver<Page>), MigrationError> {
        let snapshot = restoring.snapshot;
        let blocks = machine.blocks();
        let checked = snapshot
            .check_blocks(&blocks)
            .and_then(|()| snapshot.check_hashes(restoring.decision));
        checked.map_err(MigrationError::from)?;
        let mut missing = Vec::new();
        let mut starts = Vec::new();
        let mut position = 0;
        for block in &blocks {
            missing.push(with_content(snapshot, block, position).map_err(MigrationError::from)?);
            starts.push(position);
            position += block.ram.len() as u64;
        }
        // Threads wait in the kernel for an answer to each request, so the queue has at most as many
        // as there are threads.
        let (ask, asked) = mpsc::channel();
        let halt = machine.halter();
        let receiver = PostcopyReceiver::new(&blocks, missing, ask, PATIENCE, halt)
            .map_err(|error| MigrationError::here("no-userfaultfd", error))?;
        let on_demand = Self {
            snapshot,
            receiver,
            starts,
            progress: restoring.progress,
            recorder: restoring.recorder,
        };
        Ok((on_demand, asked))
    }

    /// Fills the pages that are asked for, until there is nothing to ask for any more.
    fn serve(&self, asked: &Receiver<Page>) {
        let mut buffer = [0; PAGE];
        while let Ok((block, page)) = asked.recv() {
            // The thread that reads ahead may have been faster.
            if !self.receiver.is_missing(block, page) {
                continue;
            }
            // Before the thread that waits continues: it may be the last one that is recorded.
            if let (Some(recorder), Some(start)) = (self.recorder, self.starts.get(block)) {
                recorder.add(start / PAGE as u64 + page as u64);
            }
            let filled = self.fill(block, page * PAGE, &mut buffer);
            let filled = filled.and_then(|_| self.check_came(block, page));
            if let Err(error) = filled {
                return self.fail(&error);
            }
        }
    }

    /// Waits until the working set is recorded, and writes it.
    fn record(&self, recorder: &Recorder) -> Result<(), MigrationError> {
        let pages = recorder.finish(self.snapshot, || self.has_ended())?;
        self.progress
            .update(|report| report.working_set_pages = Some(pages));
        Ok(())
    }

    /// Brings the working set, the pages that were touched first before the others.
    fn prefetch(&self, set: &WorkingSet) {
        let progress = self.progress;
        progress.update(|report| report.working_set_pages = Some(set.pages()));
        let mut buffer = PageBuffer::new(CHUNK * PAGE);
        for (block, pages) in self.snapshot.in_blocks(set) {
            if self.has_ended() {
                return;
            }
            let Some(buffer) = buffer.get_mut(..pages.len() * PAGE) else {
                return;
            };
            if let Err(error) = self.fill(block, pages.start * PAGE, buffer) {
                return self.fail(&error);
            }
        }
        let elapsed = progress.elapsed_us();
        progress.update(|report| report.working_set_us = Some(elapsed));
    }

    /// A page with content may have no hash any more: the file was changed since the hashes were
    /// checked. Then nothing fills the page, and its waiters would wait for ever.
    fn check_came(&self, block: usize, page: usize) -> Result<(), RestoreError> {
        match self.receiver.is_missing(block, page) && !self.has_ended() {
            true => Err(damaged(HASHES)),
            false => Ok(()),
        }
    }

    fn fail(&self, error: &RestoreError) {
        match error {
            // The VM was ended, and needs no pages.
            RestoreError::Canceled => {}
            error => self.receiver.fail(error.refusal(), self.progress),
        }
    }

    /// Reads pages and fills those that are missing.
    fn fill(&self, block: usize, offset: usize, buffer: &mut [u8]) -> Result<u64, RestoreError> {
        let start = self.starts.get(block).ok_or_else(|| damaged(MEMORY))?;
        let at = Place {
            block,
            offset,
            position: start + offset as u64,
        };
        self.snapshot.read(at, buffer, |block, offset, content| {
            self.fill_checked(block, offset, content)
        })
    }

    fn fill_checked(
        &self,
        block: usize,
        offset: usize,
        content: &[u8],
    ) -> Result<(), RestoreError> {
        let (pages, _) = content.as_chunks::<PAGE>();
        let pages = Filling::Data(pages);
        let filled = self.receiver.fill_pages(block, offset / PAGE, pages);
        filled.map_err(|error| match self.has_ended() {
            // The memory is not registered any more.
            true => RestoreError::Canceled,
            false => self.snapshot.unreadable(MEMORY, error),
        })
    }

    /// Reads all pages in the order of the file, until none is missing or the machine ends.
    fn read_ahead(&self) {
        // The decision was made: the guest runs.
        let no_cancel = Decision::default();
        let fill = |block, offset, content: &[u8]| {
            if self.has_ended() {
                return Err(RestoreError::Canceled);
            }
            if self.receiver.is_waited_for() {
                // The guest comes first where there are few CPUs.
                thread::yield_now();
            }
            self.fill_checked(block, offset, content)
        };
        let read = self.snapshot.read_all(self.progress, &no_cancel, fill);
        // A page that is left would become zeros with the end of the waits.
        let read = read.and_then(|()| match self.receiver.left() {
            left if left > 0 && !self.has_ended() => Err(damaged(HASHES)),
            _ => Ok(()),
        });
        if let Err(error) = read {
            self.fail(&error);
        }
    }

    /// Whether the machine has ended, and needs no pages.
    fn has_ended(&self) -> bool {
        self.receiver.is_lost() || !self.receiver.is_whole()
    }

    /// Why the guest cannot be started.
    fn why(&self) -> MigrationError {
        match self.receiver.failure() {
            Some(why) => MigrationError::Here(why),
            None => {
                let why = format!("pages of memory.bin were not read in {PATIENCE:?}");
                MigrationError::here("snapshot-unreadable", why)
            }
        }
    }
}

/// Returns the pages of a block that have content. Its bytes begin at `position` in the file.
fn with_content(
    snapshot: &Snapshot,
    block: &Block,
    position: u64,
) -> Result<DirtyBitmap, RestoreError> {
    let found = DirtyBitmap::new(block.ram.len());
    let pages = block.ram.len() / PAGE;
    for first in (0..pages).step_by(CHUNK) {
        let count = CHUNK.min(pages - first);
        let marks = snapshot.marks(position / PAGE as u64 + first as u64, count)?;
        let mut words = [0_u64; CHUNK / 64];
        for (page, _) in marks.iter().enumerate().filter(|(_, mark)| **mark != ZEROS) {
            if let Some(word) = words.get_mut(page / 64) {
                *word |= 1 << (page % 64);
            }
        }
        found.merge(first, &words);
    }
    Ok(found)
}
