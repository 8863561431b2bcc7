//! Merging: a chain of increments as one snapshot that needs no base.
//!
//! The sizes come from a manifest that no machine has confirmed. Nothing here is allocated by them, and each
//! loop over them can be canceled.

use std::os::unix::fs::FileExt as _;

use super::manifest::FileInfo;
use super::read::Snapshot;
use super::write::{Folder, Writing, end, host, in_folder, seal};
use super::{HASHES, MACHINE, MEMORY, STATE};
use crate::MigrationError;
use crate::message::Refusal;
use crate::pages::{PAGE, is_zero};
use crate::progress::Phase;

/// Writes a snapshot with all of the memory that an increment and its bases have. Neither is changed.
///
/// # Errors
/// The chain is damaged, the host cannot read or write, or merging was canceled. The report says the same,
/// and nothing is left of the new snapshot.
pub fn merge(writing: &Writing<'_>, chain: &Snapshot) -> Result<(), Refusal> {
    writing.progress.enter(Phase::Preparing);
    let merged = in_folder(writing, |folder| merge_into(writing, chain, folder));
    end(writing, merged)
}

fn merge_into(
    writing: &Writing<'_>,
    chain: &Snapshot,
    folder: &mut Folder,
) -> Result<(), MigrationError> {
    // The increment has the hashes of all pages. Those of its bases only say where a page is read.
    let hashes = copy_hashes(writing, chain, folder)?;
    writing.progress.enter(Phase::Copying);
    copy_memory(writing, chain, folder)?;
    // Those of the increment: a snapshot has whole disks, whatever its base has.
    chain.copy_disks(folder, writing.progress, writing.decision)?;
    let machine = folder.write(MACHINE, chain.machine())?;
    let state = folder.write(STATE, chain.state())?;
    let files = [machine, state, hashes];
    let merged = chain.manifest().merged(writing.id, files);
    seal(writing, &merged, folder)
}

fn copy_hashes(
    writing: &Writing<'_>,
    chain: &Snapshot,
    folder: &mut Folder,
) -> Result<FileInfo, MigrationError> {
    let info = chain.manifest().hashes;
    let (file, path) = folder.create(HASHES)?;
    let failed = |error| host("write", &path, &error);
    file.set_len(info.size).map_err(failed)?;
    chain.read_hashes(writing.decision, |position, content| {
        for (part, at) in content.chunks(PAGE).zip((position..).step_by(PAGE)) {
            // The hashes of memory that is not plugged stay holes.
            if !is_zero(part) {
                file.write_all_at(part, at).map_err(failed)?;
            }
        }
        Ok::<_, MigrationError>(())
    })?;
    file.sync_all().map_err(failed)?;
    Ok(info)
}

fn copy_memory(
    writing: &Writing<'_>,
    chain: &Snapshot,
    folder: &mut Folder,
) -> Result<(), MigrationError> {
    let (file, path) = folder.create(MEMORY)?;
    let failed = |error| host("write", &path, &error);
    let damaged = || MigrationError::here("snapshot-damaged", "the memory is too large");
    let (mut starts, mut size) = (Vec::new(), 0_u64);
    for block in &chain.manifest().memory {
        starts.push(size);
        size = size.checked_add(block.size).ok_or_else(damaged)?;
    }
    file.set_len(size).map_err(failed)?;
    // Pages of zeros are not among those that are read, and stay holes.
    let read = chain.read_all(
        writing.progress,
        writing.decision,
        |block, offset, content| {
            let start = starts.get(block).ok_or_else(damaged)?;
            file.write_all_at(content, start + offset as u64)
                .map_err(failed)
        },
    );
    read?;
    file.sync_all().map_err(failed)
}
