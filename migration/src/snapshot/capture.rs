//! A snapshot that stays in memory: what forks of a VM are made from.

use std::fs::File;
use std::io;

use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, memfd_create};
use uuid::Uuid;

use super::live::{Image, RunningGuest};
use super::manifest::{FileInfo, Manifest};
use super::memory_file::PageSink;
use super::read::Snapshot;
use super::write::{Saved, SavedState, copy_paused, whole};
use super::{conclude_with, sparse};
use crate::MigrationError;
use crate::decision::Decision;
use crate::message::{Offer, Refusal};
use crate::pages::{Block, PAGE};
use crate::progress::{Phase, Progress};

impl Snapshot {
    /// Copies a paused guest into memory of its own, which lives as long as a machine is mapped from it.
    /// Pages of zeros take no space. `end` frees the VM, before the report shows an end.
    ///
    /// # Errors
    /// The guest cannot be saved, the host has no memory, or the operation was canceled. The report says the same.
    pub fn capture(
        saved: Result<Saved, Refusal>,
        end: impl FnOnce(Result<(), &Refusal>) -> &'static str,
        progress: &Progress,
        decision: &Decision,
    ) -> Result<Self, Refusal> {
        progress.enter(Phase::Stopped);
        let captured = saved.map_err(MigrationError::Here).and_then(|saved| {
            let mut copy = MemoryCopy::create(&saved.blocks, progress)?;
            copy_paused(whole(&saved.blocks), decision, &mut copy)?;
            let state = SavedState {
                state: saved.state,
                stopped_at: saved.stopped_at,
            };
            Self::captured(saved.offer, state, copy)
        });
        ended(captured, end, progress)
    }

    /// Copies a guest that runs, and stops for its device state only, as for a
    /// [live snapshot](super::write_live). Otherwise as [`Snapshot::capture`].
    ///
    /// # Errors
    /// The host cannot write-protect memory (`live-unsupported`), or as for a paused guest.
    pub fn capture_live(
        guest: &mut dyn RunningGuest,
        end: impl FnOnce(Result<(), &Refusal>) -> &'static str,
        progress: &Progress,
        decision: &Decision,
    ) -> Result<Self, Refusal> {
        progress.enter(Phase::Preparing);
        let mut capture = || {
            let offer = guest.offer().map_err(MigrationError::Here)?;
            let blocks = guest.blocks();
            let image = Image::new(&blocks, progress, decision)?;
            let mut copy = MemoryCopy::create(&blocks, progress)?;
            let state = image.take(guest, None, &mut copy)?;
            Self::captured(offer, state, copy)
        };
        ended(capture(), end, progress)
    }

    fn captured(offer: Offer, saved: SavedState, copy: MemoryCopy) -> Result<Self, MigrationError> {
        let memory = copy.seal()?;
        // No file of it is ever read, so that there is nothing to check against a hash.
        let none = FileInfo::of(&[]);
        let (id, at) = (Uuid::new_v4(), saved.stopped_at);
        let manifest = Manifest::new(id, offer.vm, offer.blocks, at, None, Vec::new(), [none; 3]);
        let machine = offer.machine.into_vec();
        Ok(Self::in_memory(manifest, machine, saved.state, memory))
    }
}

/// Frees the VM, and reports a failure.
fn ended(
    captured: Result<Snapshot, MigrationError>,
    end: impl FnOnce(Result<(), &Refusal>) -> &'static str,
    progress: &Progress,
) -> Result<Snapshot, Refusal> {
    let error = match captured {
        Ok(snapshot) => {
            end(Ok(()));
            return Ok(snapshot);
        }
        Err(error) => error,
    };
    let more = end(Err(&error.refusal()));
    match conclude_with(progress, Err(error), more) {
        Err(refusal) => Err(refusal),
        Ok(()) => Err(Refusal::new(
            "internal",
            "a failed copy was reported as complete",
        )),
    }
}

/// Memory of this process that holds a copy of the guest's.
struct MemoryCopy<'a> {
    file: File,
    progress: &'a Progress,
}

fn refused(error: impl Into<io::Error>) -> MigrationError {
    let error = error.into();
    let code = match error.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::OutOfMemory => "memory-short",
        _ => "host-refused",
    };
    MigrationError::here(code, format!("cannot copy the guest's memory: {error}"))
}

impl<'a> MemoryCopy<'a> {
    fn create(blocks: &[Block], progress: &'a Progress) -> Result<Self, MigrationError> {
        let total: u64 = blocks.iter().map(|block| block.ram.len() as u64).sum();
        sparse::begin(total, progress);
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        let file = File::from(memfd_create("forks", flags).map_err(refused)?);
        file.set_len(total).map_err(refused)?;
        Ok(Self { file, progress })
    }

    /// The machines that map it rely on its size, and see no page change.
    fn seal(self) -> Result<File, MigrationError> {
        let seals = SealFlags::WRITE | SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL;
        fcntl_add_seals(&self.file, seals).map_err(refused)?;
        Ok(self.file)
    }
}

impl PageSink for MemoryCopy<'_> {
    fn put(&mut self, first: usize, content: &[u8]) -> Result<(), MigrationError> {
        let position = (first * PAGE) as u64;
        sparse::put(&self.file, content, position, self.progress).map_err(refused)
    }
}
