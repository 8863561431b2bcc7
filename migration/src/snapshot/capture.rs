//! A snapshot that stays in memory: what forks of a VM are made from.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt as _;

use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, memfd_create};
use uuid::Uuid;

use super::manifest::{FileInfo, Manifest};
use super::read::Snapshot;
use super::write::Saved;
use super::{CHUNK, conclude};
use crate::MigrationError;
use crate::decision::Decision;
use crate::message::Refusal;
use crate::pages::{Block, PAGE, is_zero};
use crate::progress::{Phase, Progress};

impl Snapshot {
    /// Copies a paused guest into memory of its own, which lives as long as a machine is mapped from it.
    /// Pages of zeros take no space. `end` frees the VM, before the report shows an end.
    ///
    /// # Errors
    /// The guest cannot be saved, the host has no memory, or the operation was canceled. The report says the same.
    pub fn capture(
        saved: Result<Saved, Refusal>,
        end: impl FnOnce(Result<(), &Refusal>),
        progress: &Progress,
        decision: &Decision,
    ) -> Result<Self, Refusal> {
        progress.enter(Phase::Stopped);
        let captured = saved.map_err(MigrationError::Here).and_then(|saved| {
            let memory = copy(&saved.blocks, progress, decision)?;
            Ok((saved, memory))
        });
        let (saved, memory) = match captured {
            Ok(captured) => captured,
            Err(error) => {
                let refusal = error.refusal();
                end(Err(&refusal));
                let _ = conclude(progress, Err(error));
                return Err(refusal);
            }
        };
        end(Ok(()));
        let none = FileInfo::of(&[]);
        let Saved {
            offer,
            state,
            stopped_at,
            ..
        } = saved;
        let manifest = Manifest::new(
            Uuid::new_v4(),
            offer.vm,
            offer.blocks,
            stopped_at,
            None,
            [none; 3],
        );
        Ok(Self::in_memory(
            manifest,
            offer.machine.into_vec(),
            state,
            memory,
        ))
    }
}

fn copy(
    blocks: &[Block],
    progress: &Progress,
    decision: &Decision,
) -> Result<File, MigrationError> {
    let refused = |error: io::Error| {
        let code = match error.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::OutOfMemory => "memory-short",
            _ => "host-refused",
        };
        MigrationError::here(code, format!("cannot copy the guest's memory: {error}"))
    };
    let total: u64 = blocks.iter().map(|block| block.ram.len() as u64).sum();
    progress.update(|report| {
        report.memory_bytes = total;
        report.remaining_pages = total / PAGE as u64;
    });
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    let file = File::from(memfd_create("forks", flags).map_err(|error| refused(error.into()))?);
    file.set_len(total).map_err(refused)?;
    let (mut position, mut buffer) = (0, vec![0; CHUNK * PAGE]);
    for block in blocks {
        for offset in (0..block.ram.len()).step_by(buffer.len()) {
            if decision.is_canceled() {
                return Err(MigrationError::Canceled);
            }
            let len = buffer.len().min(block.ram.len() - offset);
            let content = &mut buffer[..len];
            let slice = block.ram.slice(offset, len);
            let slice = slice.ok_or_else(|| MigrationError::here("machine-gone", "no memory"))?;
            slice.copy_to(&mut content[..]);
            let zeros = write_full(&file, content, position).map_err(refused)?;
            position += len as u64;
            let pages = (len / PAGE) as u64;
            progress.update(|report| {
                report.pages += pages - zeros;
                report.zero_pages += zeros;
                report.remaining_pages = report.remaining_pages.saturating_sub(pages);
            });
        }
    }
    // The machines that map it rely on its size, and see no page change.
    let seals = SealFlags::WRITE | SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL;
    fcntl_add_seals(&file, seals).map_err(|error| refused(error.into()))?;
    Ok(file)
}

/// Writes the pages that are not zeros, neighbours at once. Returns the number of the others.
fn write_full(file: &File, content: &[u8], position: u64) -> io::Result<u64> {
    let pages: Vec<bool> = content.chunks_exact(PAGE).map(is_zero).collect();
    let mut page = 0;
    for run in pages.chunk_by(|a, b| a == b) {
        let range = page * PAGE..(page + run.len()) * PAGE;
        if run.first() == Some(&false) {
            let at = position + range.start as u64;
            file.write_all_at(content.get(range).unwrap_or_default(), at)?;
        }
        page += run.len();
    }
    Ok(pages.iter().filter(|zero| **zero).count() as u64)
}
