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
//! Disks that are copied come first, in rounds, since they take longest ([`disks`](super::disks)). What the
//! guest writes to them while its memory is protected is copied behind that, and the last blocks in the stop. A stop in which that takes too long is called off, and tried
//! again.
//!
//! Two threads copy. The *fault thread* copies the pages that the guest waits for and releases them
//! without waiting for the storage. The *writer* copies all others, in order, and writes to the files, or to the memory
//! from which forks are mapped.
//! [`Image::left`] gives each page to exactly one of them, and only that one releases it: a page that
//! was released before it was copied would be of a later moment.
//!
//! The fault thread never writes to guest memory and never waits for a thread that does, so that every
//! writer may wait for it: a vCPU, a device's event loop, the kernel within a system call. It allocates
//! nothing once memory is protected (see [`copies`]).

mod copies;

use std::sync::Barrier;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use memory::{DirtyBitmap, PageBuffer, WriteProtection};
use parking_lot::Mutex;

use self::copies::Copies;
use super::disks::DiskImages;
use super::memory_file::{MemoryFile, PageSink};
use super::write::{SavedState, Writing, complete, end, in_folder};
use crate::MigrationError;
use crate::decision::Decision;
use crate::message::{Offer, Refusal};
use crate::pages::{Block, PAGE};
use crate::progress::{Downtime, Phase, Progress, micros};
use crate::source::Stopped;
use crate::threads::{give_way, in_span};

/// Pages that the writer copies at once: 2 MiB, so that a huge page is released as a whole and stays one.
const CHUNK: usize = 512;
/// Pages that one call protects, after which a cancel is looked for.
const PIECE: usize = WriteProtection::PIECE / PAGE;
/// At most this many runs of pages are protected in the stop, at about 2 µs each.
const FEW_RUNS: usize = 32;
/// Pages between two written ones that are protected with them: a longer call is cheaper than two.
const GAP: usize = 16;
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

    /// Resumes a guest whose stop took too long. Another stop follows.
    ///
    /// # Errors
    /// The vCPUs do not start.
    fn resume_copying(&mut self) -> Result<(), Refusal>;

    /// The guest runs again, and its memory is about to be copied. What this takes is not in the stop.
    fn resumed(&mut self);

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
        let mut file = MemoryFile::create(folder, &blocks, writing)?;
        let mut disks = DiskImages::create(folder, writing)?;
        if let Some(disks) = &mut disks {
            // A host that cannot is found before the disks are copied. The protection itself begins behind
            // that: the kernel makes no huge pages while it lasts.
            protection(&blocks)?.end();
            writing.progress.enter(Phase::Precopy);
            disks.rounds()?;
        }
        let image = Image::new(&blocks, writing.progress, writing.decision)?;
        let state = image.take(guest, disks.as_mut(), &mut file)?;
        guest.sync();
        complete(writing, offer, &state, file, disks, folder)
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
    /// Pages that were released before the stop, because the guest writes to them.
    released: Vec<DirtyBitmap>,
    /// Whether the stop is still to come. Held while the fault thread releases a page before the stop.
    is_arming: Mutex<bool>,
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
        let protection = protection(blocks)?;
        let mut end = 0;
        let mut starts = Vec::new();
        let mut left = Vec::new();
        let mut released = Vec::new();
        for block in blocks {
            starts.push(end);
            end += block.ram.len() / PAGE;
            left.push(plugged(block));
            let none = DirtyBitmap::new(block.ram.len());
            none.set_enabled(true);
            released.push(none);
        }
        Ok(Self {
            blocks,
            starts,
            protection,
            left,
            released,
            is_arming: Mutex::new(true),
            over: AtomicBool::new(false),
            progress,
            decision,
        })
    }

    /// Stops the guest for a moment, and copies the memory that it has then. Returns its state.
    pub(super) fn take(
        &self,
        guest: &mut dyn RunningGuest,
        disks: Option<&mut DiskImages<'_>>,
        sink: &mut (dyn PageSink + Send),
    ) -> Result<SavedState, MigrationError> {
        let mut memory = copies::memory();
        let copies = Copies::new(&mut memory);
        let is_serving = Barrier::new(2);
        let state = thread::scope(|scope| {
            let serve = || self.serve(&copies, &is_serving);
            let server = spawn(scope, "snapshot-faults", serve)?;
            // A thread that starts needs the lock of the memory map for writing, as one that allocates.
            is_serving.wait();
            let taken = self.arm_and_stop(guest, disks).and_then(|state| {
                let copy = || self.copy_all(&copies, &mut *sink);
                join(spawn(scope, "snapshot-copy", copy)?).map(|()| state)
            });
            self.over.store(true, Ordering::Release);
            copies.end();
            // Its error first: it ended the protection, from which other errors follow.
            join(server)?;
            taken
        })?;
        copies.write(sink)?;
        Ok(state)
    }

    /// Protects memory and copies disks until the stop for the rest of both is short, and stops the guest.
    fn arm_and_stop(
        &self,
        guest: &mut dyn RunningGuest,
        mut disks: Option<&mut DiskImages<'_>>,
    ) -> Result<SavedState, MigrationError> {
        self.arm()?;
        let mut called_off = 0;
        loop {
            if let Some(disks) = &mut disks {
                // Protecting takes a while for much memory, and the guest wrote to its disks meanwhile.
                disks.rounds()?;
            }
            // In this order: a round of disks takes longer than one of memory, in which few blocks are
            // written.
            self.settle()?;
            if let Some(state) = self.stop(guest, disks.as_deref_mut())? {
                return Ok(state);
            }
            called_off += 1;
            self.progress.update(|report| {
                report.phase = Phase::Precopy;
                report.called_off = called_off;
            });
            if let Some(disks) = &disks {
                disks.after_call_off(called_off)?;
            }
        }
    }

    /// Protects all pages while the guest runs.
    fn arm(&self) -> Result<(), MigrationError> {
        for (index, block) in self.blocks.iter().enumerate() {
            let pages = block.ram.len() / PAGE;
            for first in (0..pages).step_by(PIECE) {
                self.check()?;
                let pages = PIECE.min(pages - first);
                // What is not plugged is not in the guest's memory.
                if is_plugged(block, first, pages) {
                    self.protect(index, first, pages)?;
                }
            }
        }
        Ok(())
    }

    /// Protects what the guest wrote meanwhile, until that is little.
    fn settle(&self) -> Result<(), MigrationError> {
        // Each round takes a fraction of the time of the one before, in which the guest writes that
        // fraction of the pages. A guest that is faster than the rounds ends them.
        let mut last = usize::MAX;
        loop {
            self.check()?;
            let runs = self.protect_released()?;
            if runs <= FEW_RUNS || runs >= last {
                return Ok(());
            }
            last = runs;
        }
    }

    /// Protects again what was released. Returns how many runs of pages that were.
    fn protect_released(&self) -> Result<usize, MigrationError> {
        let mut count = 0;
        for (index, released) in self.released.iter().enumerate() {
            let runs = joined(released.take().runs(), GAP);
            count += runs.len();
            for (first, pages) in runs {
                self.protect(index, first, pages)?;
            }
        }
        Ok(count)
    }

    /// The stop: the guest's state, the blocks that it wrote last to its disks, and the protection of the
    /// pages that it wrote last. Returns `None` if the guest runs on because the blocks took too long.
    fn stop(
        &self,
        guest: &mut dyn RunningGuest,
        disks: Option<&mut DiskImages<'_>>,
    ) -> Result<Option<SavedState>, MigrationError> {
        self.progress.enter(Phase::Stopped);
        let begun = Instant::now();
        let stopped = guest.stop().map_err(MigrationError::Here)?;
        let pause_us = micros(begun.elapsed());
        let saving = Instant::now();
        let state = guest.save().map_err(MigrationError::Here)?;
        let save_us = micros(saving.elapsed());
        let copying = Instant::now();
        let copied = disks.map_or(Ok(Some(0)), |disks| disks.last_in_stop(begun))?;
        let Some(pages) = copied else {
            // No page is protected for the image yet: it is as if there had been no stop.
            guest.resume_copying().map_err(MigrationError::Here)?;
            tracing::info!(
                stopped_ms = begun.elapsed().as_millis() as u64,
                "snapshot: the stop is called off, since copying the last blocks took too long"
            );
            return Ok(None);
        };
        let transfer_us = micros(copying.elapsed());
        let protecting = Instant::now();
        {
            // Under the lock: the fault thread may hold the event of a second writer to a page that it
            // has released for the first. It must not release that page again after this.
            let mut is_arming = self.is_arming.lock();
            self.protect_released()?;
            *is_arming = false;
        }
        let protect_us = micros(protecting.elapsed());
        guest.resume().map_err(MigrationError::Here)?;
        let downtime = Downtime {
            total_us: micros(begun.elapsed()),
            pause_us,
            save_us,
            transfer_us,
            protect_us,
            pages,
            ..Downtime::default()
        };
        self.progress.update(|report| {
            report.phase = Phase::Copying;
            report.downtime = Some(downtime);
        });
        guest.resumed();
        Ok(Some(SavedState {
            state,
            stopped_at: stopped.clocks_at,
        }))
    }

    /// The writer: copies and releases the pages that the fault thread does not.
    fn copy_all(&self, copies: &Copies<'_>, sink: &mut dyn PageSink) -> Result<(), MigrationError> {
        give_way();
        let mut buffer = PageBuffer::new(CHUNK * PAGE);
        for (index, block) in self.blocks.iter().enumerate() {
            let pages = block.ram.len() / PAGE;
            for first in (0..pages).step_by(CHUNK) {
                self.check()?;
                copies.write(sink)?;
                let count = CHUNK.min(pages - first);
                if !is_plugged(block, first, count) {
                    let zeros = &mut buffer[..count * PAGE];
                    zeros.fill(0);
                    sink.put(self.starts[index] + first, zeros)?;
                    continue;
                }
                let chunk = first..pages.min(first + CHUNK);
                let ours = chunk.filter(|&page| self.left[index].take_page(page));
                for (first, pages) in joined(ours.map(|page| (page, 1)), 0) {
                    let content = &mut buffer[..pages * PAGE];
                    copy(block, first * PAGE, content)?;
                    self.release(index, first, pages)?;
                    sink.put(self.starts[index] + first, content)?;
                }
            }
        }
        Ok(())
    }

    /// The fault thread. When it ends, for whatever reason, no page is protected and no thread waits.
    fn serve(&self, copies: &Copies<'_>, is_serving: &Barrier) -> Result<(), MigrationError> {
        struct End<'a>(&'a WriteProtection, &'a AtomicBool);
        impl Drop for End<'_> {
            fn drop(&mut self) {
                self.0.end();
                self.1.store(true, Ordering::Release);
            }
        }
        let _end = End(&self.protection, &self.over);
        let mut spare = copies.buffer();
        is_serving.wait();
        while !self.over.load(Ordering::Acquire) {
            for (block, page) in self.protection.wait(LOOK).map_err(|error| host(&error))? {
                let Some(buffer) = spare? else { return Ok(()) };
                spare = match self.fault(block, page, buffer)? {
                    None => Ok(Some(buffer)),
                    Some(number) => {
                        copies.put(number, buffer);
                        copies.buffer()
                    }
                };
            }
        }
        Ok(())
    }

    /// A thread of the guest waits to write to a page. If the page is to be copied, fills `copy` and
    /// returns the number that the page has in the file.
    fn fault(
        &self,
        block: usize,
        page: usize,
        content: &mut [u8],
    ) -> Result<Option<usize>, MigrationError> {
        let is_arming = self.is_arming.lock();
        if *is_arming {
            // Noted first: a page that is released and not noted would not be protected in the stop.
            self.released[block].mark(page * PAGE, PAGE);
            self.release(block, page, 1)?;
            return Ok(None);
        }
        drop(is_arming);
        if !self.left[block].take_page(page) {
            // Another thread has taken it, and wakes this waiter too when it releases the page.
            return Ok(None);
        }
        copy(&self.blocks[block], page * PAGE, content)?;
        self.release(block, page, 1)?;
        self.progress.update(|report| report.faults += 1);
        Ok(Some(self.starts[block] + page))
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

/// Prepares the protection of memory.
fn protection(blocks: &[Block]) -> Result<WriteProtection, MigrationError> {
    let rams = blocks.iter().map(|block| block.ram.clone()).collect();
    WriteProtection::new(rams).map_err(|error| {
        let why = format!("{error}; a paused VM can be snapshotted on any host");
        MigrationError::here("live-unsupported", why)
    })
}

fn spawn<'scope, T: Send + 'scope>(
    scope: &'scope thread::Scope<'scope, '_>,
    name: &str,
    work: impl FnOnce() -> T + Send + 'scope,
) -> Result<thread::ScopedJoinHandle<'scope, T>, MigrationError> {
    let builder = thread::Builder::new().name(name.to_owned());
    let spawned = builder.spawn_scoped(scope, in_span(work));
    spawned.map_err(|error| MigrationError::here("host-refused", error))
}

fn join(
    thread: thread::ScopedJoinHandle<'_, Result<(), MigrationError>>,
) -> Result<(), MigrationError> {
    let name = thread.thread().name().unwrap_or_default().to_owned();
    thread.join().unwrap_or_else(|_| {
        let why = format!("the thread {name} panicked");
        Err(MigrationError::here("host-refused", why))
    })
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

/// Joins ascending runs of pages (first page, number of pages) between which are at most `gap` pages.
fn joined(runs: impl Iterator<Item = (usize, usize)>, gap: usize) -> Vec<(usize, usize)> {
    let mut all: Vec<(usize, usize)> = Vec::new();
    for (first, count) in runs {
        match all.last_mut() {
            Some((start, pages)) if first <= *start + *pages + gap => {
                *pages = first + count - *start;
            }
            _ => all.push((first, count)),
        }
    }
    all
}

#[cfg(test)]
pub(super) mod tests;

/// Whether a page of these is plugged. What the guest has of a block does not change during a live
/// snapshot: resizes are refused, and so are blocks of which the guest decides.
fn is_plugged(block: &Block, first: usize, pages: usize) -> bool {
    block.ram.plugged_pages(first * PAGE, pages * PAGE) > 0
}

/// The pages of a block that are copied.
fn plugged(block: &Block) -> DirtyBitmap {
    let all = DirtyBitmap::new(block.ram.len());
    all.set_enabled(true);
    let pages = block.ram.len() / PAGE;
    for first in (0..pages).step_by(CHUNK) {
        let pages = CHUNK.min(pages - first);
        if is_plugged(block, first, pages) {
            all.mark(first * PAGE, pages * PAGE);
        }
    }
    all
}
