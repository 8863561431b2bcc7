//! Snapshots of a running guest: the image is of one moment, in which the guest is stopped for its
//! device state only.
//!
//! ```text
//!   guest     runs            runs, and waits for      stopped      runs, and waits for its
//!                             nothing but a release                 page's copy at each first write
//!   engine    register ─ protect all ─ protect again ─ save state ─ copy all pages, release each ─ end
//!                        (arming)      what it wrote   and the last
//! ```
//!
//! Protecting a page table entry takes time, so that doing all of it in the stop would make the stop
//! grow with the memory. It is done before, while the guest runs: pages that it writes meanwhile are
//! released at once, noted, and protected again, in rounds that become shorter. The stop protects what
//! the last round left.
//!
//! Two threads copy. The *fault thread* copies the pages that the guest waits for and releases them
//! without waiting for the storage. The *writer* copies all others, in order, and writes to the files, or to the memory
//! from which forks are mapped.
//! [`Image::left`] gives each page to exactly one of them, and only that one releases it: a page that
//! was released before it was copied would be of a later moment.
//!
//! The fault thread never writes to guest memory and never waits for a thread that does, so that every
//! writer may wait for it: a vCPU, a device's event loop, the kernel within a system call.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use memory::{DirtyBitmap, WriteProtection};
use parking_lot::{Condvar, Mutex};

use super::memory_file::{MemoryFile, PageSink};
use super::write::{SavedState, Writing, complete, end, in_folder};
use crate::MigrationError;
use crate::decision::Decision;
use crate::message::{Offer, Refusal};
use crate::pages::{Block, PAGE};
use crate::progress::{Downtime, Phase, Progress, micros};
use crate::source::Stopped;
use crate::threads::in_span;

/// Pages that the writer copies at once: 2 MiB, so that a huge page is released as a whole and stays one.
const CHUNK: usize = 512;
/// Pages that one call protects, after which a cancel is looked for.
const PIECE: usize = WriteProtection::PIECE / PAGE;
/// So few runs of pages are protected in the stop, at about 2 µs each.
const FEW_RUNS: usize = 32;
/// Pages between two written ones that are protected with them: a longer call is cheaper than two.
const GAP: usize = 16;
/// Copies that wait for the writer at most: 64 MiB.
const MAX_QUEUED: usize = 16 << 10;
/// How long a page waits for room among them. Then the snapshot fails: storage must not stop a guest.
const STORAGE_PATIENCE: Duration = Duration::from_secs(1);
/// How often the fault thread looks whether it is still needed.
const LOOK: Duration = Duration::from_millis(5);

/// A guest that runs while a snapshot of it is written.
pub trait RunningGuest {
    /// Describes the VM.
    ///
    /// # Errors
    /// The VM cannot be saved; the text says why.
    fn offer(&mut self) -> Result<Offer, Refusal>;

    /// Returns the VM's RAM blocks, in the order of [`Offer::blocks`].
    fn blocks(&self) -> Vec<Block>;

    /// Pauses the guest.
    ///
    /// # Errors
    /// The vCPUs do not stop in time, or the machine is gone. The guest then continues.
    fn stop(&mut self) -> Result<Stopped, Refusal>;

    /// Saves vCPU and device state. The guest is paused.
    ///
    /// # Errors
    /// The state cannot be saved. The owner of the guest resumes it.
    fn save(&mut self) -> Result<Vec<u8>, Refusal>;

    /// Resumes a guest that ran before.
    ///
    /// # Errors
    /// The vCPUs do not start.
    fn resume(&mut self) -> Result<(), Refusal>;

    /// Makes durable what the guest had written to its disks by the time of the stop.
    fn sync(&mut self);
}

/// Writes a snapshot of a guest that runs.
///
/// # Errors
/// The host cannot write-protect memory (`live-unsupported`) or write files, the guest cannot be stopped
/// or saved, or the snapshot was canceled. The report says the same, and nothing is left of the snapshot.
pub fn write_live(writing: &Writing<'_>, guest: &mut dyn RunningGuest) -> Result<(), Refusal> {
    writing.progress.enter(Phase::Preparing);
    let written = in_folder(writing, |folder| {
        let offer = guest.offer().map_err(MigrationError::Here)?;
        let blocks = guest.blocks();
        let image = Image::new(&blocks, writing.progress, writing.decision)?;
        let mut file = MemoryFile::create(folder, &blocks, writing)?;
        let state = image.take(guest, &mut file)?;
        guest.sync();
        complete(writing, offer, &state, file, folder)
    });
    end(writing, written)
}

/// Memory as it is at one moment, while it is copied.
pub(super) struct Image<'a> {
    blocks: &'a [Block],
    /// The number that each block's first page has in the file.
    starts: Vec<usize>,
    protection: WriteProtection,
    /// The pages that no thread has taken to copy. Taking a page is the right and duty to release it.
    left: Vec<DirtyBitmap>,
    /// Until the stop, pages that were released because the guest writes to them: block and page.
    armed: Mutex<Option<Vec<(usize, usize)>>>,
    queue: Mutex<VecDeque<(usize, Vec<u8>)>>,
    room: Condvar,
    over: AtomicBool,
    progress: &'a Progress,
    decision: &'a Decision,
}

impl<'a> Image<'a> {
    pub(super) fn new(
        blocks: &'a [Block],
        progress: &'a Progress,
        decision: &'a Decision,
    ) -> Result<Self, MigrationError> {
        let rams = blocks.iter().map(|block| block.ram.clone()).collect();
        let protection = WriteProtection::new(rams).map_err(|error| {
            let why = format!("{error}; a paused VM can be snapshotted on any host");
            MigrationError::here("live-unsupported", why)
        })?;
        let mut end = 0;
        let mut starts = Vec::new();
        let mut left = Vec::new();
        for block in blocks {
            starts.push(end);
            end += block.ram.len() / PAGE;
            let all = DirtyBitmap::new(block.ram.len());
            all.mark_all();
            left.push(all);
        }
        Ok(Self {
            blocks,
            starts,
            protection,
            left,
            armed: Mutex::new(Some(Vec::new())),
            queue: Mutex::default(),
            room: Condvar::new(),
            over: AtomicBool::new(false),
            progress,
            decision,
        })
    }

    /// Stops the guest for a moment, and copies the memory that it has then. Returns its state.
    pub(super) fn take(
        &self,
        guest: &mut dyn RunningGuest,
        sink: &mut dyn PageSink,
    ) -> Result<SavedState, MigrationError> {
        thread::scope(|scope| {
            let server = thread::Builder::new().name("snapshot-faults".to_owned());
            let server = server.spawn_scoped(scope, in_span(|| self.serve()));
            let server = server.map_err(|error| MigrationError::here("host-refused", error))?;
            let taken = self
                .arm()
                .and_then(|()| self.stop(guest))
                .and_then(|state| self.copy_all(sink).map(|()| state));
            self.over.store(true, Ordering::Release);
            self.room.notify_all();
            // Its error first: it ended the protection, from which other errors follow.
            server.join().map_err(|_| {
                MigrationError::here("host-refused", "the thread that serves faults panicked")
            })??;
            let state = taken?;
            self.write_queued(sink)?;
            Ok(state)
        })
    }

    /// Protects all pages while the guest runs.
    fn arm(&self) -> Result<(), MigrationError> {
        for (index, block) in self.blocks.iter().enumerate() {
            let pages = block.ram.len() / PAGE;
            for first in (0..pages).step_by(PIECE) {
                self.check()?;
                self.protect(index, first, PIECE.min(pages - first))?;
            }
        }
        // Each round takes a fraction of the time of the one before, in which the guest writes that
        // fraction of the pages. A guest that is faster than the rounds ends them.
        let mut last = usize::MAX;
        loop {
            self.check()?;
            let released = self.armed.lock().as_mut().map(std::mem::take);
            let runs = runs(released.unwrap_or_default());
            for &(block, first, pages) in &runs {
                self.protect(block, first, pages)?;
            }
            if runs.len() <= FEW_RUNS || runs.len() >= last {
                return Ok(());
            }
            last = runs.len();
        }
    }

    /// The stop: the guest's state, and the protection of the pages that it wrote last.
    fn stop(&self, guest: &mut dyn RunningGuest) -> Result<SavedState, MigrationError> {
        self.progress.enter(Phase::Stopped);
        let begun = Instant::now();
        let stopped = guest.stop().map_err(MigrationError::Here)?;
        let pause_us = micros(begun.elapsed());
        let saving = Instant::now();
        let state = guest.save().map_err(MigrationError::Here)?;
        let save_us = micros(saving.elapsed());
        let protecting = Instant::now();
        {
            // Under the lock: the fault thread may hold the event of a second writer to a page that it
            // has released for the first. It must not release that page again after this.
            let mut armed = self.armed.lock();
            for (block, first, pages) in runs(armed.take().unwrap_or_default()) {
                self.protect(block, first, pages)?;
            }
        }
        let protect_us = micros(protecting.elapsed());
        guest.resume().map_err(MigrationError::Here)?;
        let downtime = Downtime {
            total_us: micros(begun.elapsed()),
            pause_us,
            save_us,
            protect_us,
            ..Downtime::default()
        };
        self.progress.update(|report| {
            report.phase = Phase::Copying;
            report.downtime = Some(downtime);
        });
        Ok(SavedState {
            state,
            stopped_at: stopped.clocks_at,
        })
    }

    /// Copies and releases the pages that the fault thread does not.
    fn copy_all(&self, sink: &mut dyn PageSink) -> Result<(), MigrationError> {
        let mut buffer = vec![0; CHUNK * PAGE];
        for (index, block) in self.blocks.iter().enumerate() {
            let pages = block.ram.len() / PAGE;
            for first in (0..pages).step_by(CHUNK) {
                self.check()?;
                self.write_queued(sink)?;
                let chunk = first..pages.min(first + CHUNK);
                let ours = chunk.filter(|&page| self.left[index].take_page(page));
                for (_, first, pages) in runs_of(ours.map(|page| (index, page)), 0) {
                    let content = &mut buffer[..pages * PAGE];
                    copy(block, first * PAGE, content)?;
                    self.release(index, first, pages)?;
                    sink.put(self.starts[index] + first, content)?;
                }
            }
        }
        Ok(())
    }

    /// Writes the copies that the fault thread has made.
    fn write_queued(&self, sink: &mut dyn PageSink) -> Result<(), MigrationError> {
        let queued = std::mem::take(&mut *self.queue.lock());
        self.room.notify_all();
        let mut queued = queued.iter();
        queued.try_for_each(|(page, content)| sink.put(*page, content))
    }

    /// The fault thread. When it ends, for whatever reason, no page is protected and no thread waits.
    fn serve(&self) -> Result<(), MigrationError> {
        struct End<'a>(&'a WriteProtection, &'a AtomicBool);
        impl Drop for End<'_> {
            fn drop(&mut self) {
                self.0.end();
                self.1.store(true, Ordering::Release);
            }
        }
        let _end = End(&self.protection, &self.over);
        while !self.over.load(Ordering::Acquire) {
            for (block, page) in self.protection.wait(LOOK).map_err(|error| host(&error))? {
                self.fault(block, page)?;
            }
        }
        Ok(())
    }

    /// A thread of the guest waits to write to a page.
    fn fault(&self, block: usize, page: usize) -> Result<(), MigrationError> {
        if let Some(released) = &mut *self.armed.lock() {
            // Noted first: a page that is released and not noted would not be protected in the stop.
            released.push((block, page));
            return self.release(block, page, 1);
        }
        if !self.left[block].take_page(page) {
            // Another thread has taken it, and wakes this waiter too when it releases the page.
            return Ok(());
        }
        let mut content = vec![0; PAGE];
        copy(&self.blocks[block], page * PAGE, &mut content)?;
        self.release(block, page, 1)?;
        self.progress.update(|report| report.faults += 1);
        self.enqueue(self.starts[block] + page, content)
    }

    fn enqueue(&self, page: usize, content: Vec<u8>) -> Result<(), MigrationError> {
        let deadline = Instant::now() + STORAGE_PATIENCE;
        let mut queue = self.queue.lock();
        while queue.len() >= MAX_QUEUED && !self.over.load(Ordering::Acquire) {
            if self.room.wait_until(&mut queue, deadline).timed_out() {
                let why = format!(
                    "the storage took no page for {} ms while the guest waited; {MAX_QUEUED} pages \
                     are waiting",
                    STORAGE_PATIENCE.as_millis()
                );
                return Err(MigrationError::here("storage-too-slow", why));
            }
        }
        queue.push_back((page, content));
        Ok(())
    }

    fn check(&self) -> Result<(), MigrationError> {
        if self.decision.is_canceled() {
            return Err(MigrationError::Canceled);
        }
        if self.over.load(Ordering::Acquire) {
            // Its error replaces this one.
            return Err(MigrationError::here(
                "host-refused",
                "the fault thread ended",
            ));
        }
        Ok(())
    }

    fn protect(&self, block: usize, first: usize, pages: usize) -> Result<(), MigrationError> {
        self.protection
            .protect(block, first, pages)
            .map_err(|error| host(&error))
    }

    fn release(&self, block: usize, first: usize, pages: usize) -> Result<(), MigrationError> {
        self.protection
            .release(block, first, pages)
            .map_err(|error| host(&error))
    }
}

/// Copies pages of guest memory, whether they are plugged or not: they were in the stop.
fn copy(block: &Block, offset: usize, to: &mut [u8]) -> Result<(), MigrationError> {
    let slice = block.ram.slice(offset, to.len());
    let slice = slice.ok_or_else(|| MigrationError::here("machine-gone", "no memory"))?;
    // A copy: Rust must not hold a reference to memory that a device of the host could change.
    slice.copy_to(to);
    Ok(())
}

fn host(error: &std::io::Error) -> MigrationError {
    let why = format!("the host cannot protect or release guest memory: {error}");
    MigrationError::here("host-refused", why)
}

/// Puts pages together that are near each other: block, first page, and number of pages.
fn runs(mut pages: Vec<(usize, usize)>) -> Vec<(usize, usize, usize)> {
    pages.sort_unstable();
    runs_of(pages.into_iter(), GAP)
}

/// The same for ascending pages, with the largest gap within a run.
fn runs_of(pages: impl Iterator<Item = (usize, usize)>, gap: usize) -> Vec<(usize, usize, usize)> {
    let mut runs: Vec<(usize, usize, usize)> = Vec::new();
    for (block, page) in pages {
        match runs.last_mut() {
            Some((of, first, count)) if *of == block && page <= *first + *count + gap => {
                *count = (*count).max(page + 1 - *first);
            }
            _ => runs.push((block, page, 1)),
        }
    }
    runs
}

#[cfg(test)]
mod tests;
