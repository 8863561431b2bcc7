//! Memory on demand: the guest runs before its memory is read, and a page is read when it is touched.
//!
//! ```text
//!   guest, devices ── touch a missing page ─► userfaultfd
//!   thread `watch`    reads the fault, and asks for the page
//!   thread `serve`    reads the page, checks it, fills it: the guest continues
//!   restore's thread  loads the machine, starts the guest, then reads all pages in their order
//! ```
//!
//! Every page is checked before it is filled. A page that cannot be read ends the guest: the threads that
//! wait for it are let go only when the guest is halted and its memory is marked as lost, so that none of
//! them uses the zeros that it finds.

use std::sync::mpsc::{self, Receiver, Sender};
use std::thread;
use std::time::Duration;

use memory::DirtyBitmap;
use parking_lot::Mutex;

use super::read::{Place, RestoreError, Snapshot, damaged};
use super::restore::{Restoring, load, start};
use super::{CHUNK, MEMORY, ZEROS};
use crate::MigrationError;
use crate::decision::Decision;
use crate::destination::Destination;
use crate::destination::postcopy::{Ask, PostcopyReceiver};
use crate::pages::{Block, PAGE};
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
    /// Halts the guest, and marks its memory as lost.
    halt: Box<dyn Fn() + Send + Sync>,
    /// Why a page could not be read.
    failure: Mutex<Option<RestoreError>>,
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
    let begun = OnDemand::new(restoring.snapshot, machine);
    let (on_demand, asked) = begun.inspect_err(|_| machine.discard())?;
    let (on_demand, progress) = (&on_demand, restoring.progress);
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
            load(restoring, machine)?;
            if !on_demand.receiver.start() {
                return Err(on_demand.why());
            }
            // From here on a cancel comes too late: the guest may run.
            if !restoring.decision.commit() {
                return Err(MigrationError::Canceled);
            }
            progress.enter(Phase::HandingOver);
            start(restoring, machine)
        };
        if let Err(error) = begin() {
            // While the threads are there: the machine may wait for a page.
            (on_demand.halt)();
            machine.discard();
            return Err(error);
        }
        progress.enter(Phase::Postcopy);
        (restoring.arrived)();
        let read = on_demand.read_ahead(progress);
        if let Err(error) = &read {
            (on_demand.halt)();
            machine.fail(&error.refusal());
        }
        read.map_err(MigrationError::from)
    })
}

impl<'a> OnDemand<'a> {
    fn new(
        snapshot: &'a Snapshot,
        machine: &dyn Destination,
    ) -> Result<(Self, Receiver<Page>), MigrationError> {
        let blocks = machine.blocks();
        let checked = snapshot
            .check_blocks(&blocks)
            .and_then(|()| snapshot.check_hashes());
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
        let receiver = PostcopyReceiver::new(&blocks, missing, ask, PATIENCE)
            .map_err(|error| MigrationError::here("no-userfaultfd", error))?;
        let on_demand = Self {
            snapshot,
            receiver,
            starts,
            halt: machine.halter(),
            failure: Mutex::default(),
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
            match self.fill(block, page * PAGE, &mut buffer) {
                Ok(_) => {}
                Err(RestoreError::Canceled) => return,
                Err(error) => {
                    self.failure.lock().get_or_insert(error);
                    // The watch thread sees that, and lets go the threads that wait.
                    (self.halt)();
                    return;
                }
            }
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
        for (page, data) in (offset / PAGE..).zip(pages) {
            if self.receiver.is_missing(block, page) {
                let filled = self.receiver.fill_page(block, page, Some(data));
                filled.map_err(|error| match self.has_ended() {
                    // The memory is not registered any more.
                    true => RestoreError::Canceled,
                    false => self.snapshot.unreadable(MEMORY, error),
                })?;
            }
        }
        Ok(())
    }

    /// Reads all pages in the order of the file, until none is missing or the machine ends.
    fn read_ahead(&self, progress: &Progress) -> Result<(), RestoreError> {
        // The decision was made: the guest runs.
        let no_cancel = Decision::default();
        let read = self
            .snapshot
            .read_all(progress, &no_cancel, |block, offset, content| {
                if let Some(error) = self.failure.lock().take() {
                    return Err(error);
                }
                if self.has_ended() {
                    return Err(RestoreError::Canceled);
                }
                if self.receiver.is_waited_for() {
                    // The guest comes first where there are few CPUs.
                    thread::yield_now();
                }
                self.fill_checked(block, offset, content)
            });
        let failure = self.failure.lock().take();
        match (failure, read) {
            (Some(failure), _) => Err(failure),
            // The VM was ended, and needs no pages.
            (None, Err(RestoreError::Canceled)) => Ok(()),
            (None, read) => read,
        }
    }

    /// Whether the machine has ended, and needs no pages.
    fn has_ended(&self) -> bool {
        self.receiver.is_lost() || !self.receiver.is_whole()
    }

    /// Why the guest cannot be started.
    fn why(&self) -> MigrationError {
        match self.failure.lock().take() {
            Some(failure) => failure.into(),
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
