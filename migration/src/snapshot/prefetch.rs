//! The working set of mapped memory: its pages are mapped before the guest touches them.
//!
//! ```text
//!   restore's threads  make the machines, load them, start the guests
//!   thread `prefetch`  meanwhile has the host read the file, then maps the pages for each machine
//! ```
//!
//! All of this is a hint: a failure is logged, and the kernel brings the pages when they are touched.

use std::fs::File;
use std::ops::Range;
use std::sync::mpsc::{self, Receiver};
use std::sync::{Arc, Weak};
use std::thread;

use memory::RamBlock;
use parking_lot::Mutex;
use rustix::fs::{Advice, fadvise};

use super::read::Snapshot;
use super::restore::Restoring;
use super::working_set::WorkingSet;
use crate::MigrationError;
use crate::pages::{Block, PAGE};
use crate::progress::Phase;
use crate::threads::in_span;

/// The memory of a machine. Not owned: a machine that is deleted must not keep its memory for this.
type Memory = Vec<Weak<RamBlock>>;

/// Makes machines whose memory is mapped, and maps the working set in each of them meanwhile.
pub(super) fn beside(
    restoring: &Restoring<'_>,
    set: &WorkingSet,
    make_all: impl FnOnce(&Restoring<'_>, &(dyn Fn(&[Block]) + Sync)) -> Result<(), MigrationError>,
) -> Result<(), MigrationError> {
    let (progress, pages) = (restoring.progress, set.pages());
    progress.update(|report| report.working_set_pages = Some(pages));
    let (sender, machines) = mpsc::channel();
    thread::scope(|scope| {
        let prefetch = in_span(move || prefetch(restoring, set, &machines));
        let builder = thread::Builder::new().name("prefetch".to_owned());
        builder
            .spawn_scoped(scope, prefetch)
            .map_err(|error| MigrationError::here("host-refused", error))?;
        // Several threads make machines.
        let sender = Mutex::new(sender);
        make_all(restoring, &|blocks| {
            let memory = blocks.iter().map(|block| Arc::downgrade(&block.ram));
            // The other end is gone only if its thread panicked.
            let _ = sender.lock().send(memory.collect());
        })?;
        // The machines are there; this operation ends when their working set is, too.
        drop(sender);
        progress.enter(Phase::Postcopy);
        (restoring.arrived)();
        Ok(())
    })
}

/// Maps the working set in each machine that comes.
fn prefetch(restoring: &Restoring<'_>, set: &WorkingSet, machines: &Receiver<Memory>) {
    let (snapshot, progress) = (restoring.snapshot, restoring.progress);
    let parts = snapshot.in_blocks(set);
    match snapshot.memory() {
        // The host begins to read while the machines are made.
        Ok(file) => read_ahead(&file, set),
        Err(error) => return tracing::warn!(%error, "the working set is not read ahead"),
    }
    for memory in machines {
        if let Err(error) = populate(&memory, &parts) {
            return tracing::warn!(%error, "the working set is not mapped");
        }
        // Of several machines the last counts.
        let elapsed = progress.elapsed_us();
        progress.update(|report| report.working_set_us = Some(elapsed));
    }
}

/// Asks the host to read pages of the file into its page cache, without waiting for them.
fn read_ahead(file: &File, set: &WorkingSet) {
    for run in set.chunks() {
        let len = (run.end - run.start) * PAGE as u64;
        let len = std::num::NonZeroU64::new(len);
        if let Err(error) = fadvise(file, run.start * PAGE as u64, len, Advice::WillNeed) {
            return tracing::warn!(%error, "the working set is not read ahead");
        }
    }
}

/// Maps pages of a machine, as long as there is one.
fn populate(memory: &[Weak<RamBlock>], parts: &[(usize, Range<usize>)]) -> std::io::Result<()> {
    for (block, pages) in parts {
        let Some(ram) = memory.get(*block).and_then(Weak::upgrade) else {
            return Ok(());
        };
        ram.populate(pages.start * PAGE, pages.len() * PAGE)?;
    }
    Ok(())
}

impl Snapshot {
    /// Returns the runs of a working set in the order in which to bring them: the index of a block, and the
    /// pages in it.
    pub(super) fn in_blocks(&self, set: &WorkingSet) -> Vec<(usize, Range<usize>)> {
        let mut all = Vec::new();
        for run in set.chunks() {
            let mut begin = 0;
            for (index, block) in self.manifest().memory.iter().enumerate() {
                let end = begin + block.size / PAGE as u64;
                let (first, behind) = (run.start.max(begin), run.end.min(end));
                if first < behind {
                    // Within a block, which a machine has mapped: no cut.
                    all.push((index, (first - begin) as usize..(behind - begin) as usize));
                }
                begin = end;
            }
        }
        all
    }
}
