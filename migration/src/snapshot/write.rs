//! Writing a snapshot of a paused guest.

use std::fmt;
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, BufWriter, Seek as _, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, FileExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::time::Instant;

use rustix::fs::{CWD, RenameFlags, renameat_with};
use uuid::Uuid;
use xxhash_rust::xxh3::Xxh3;

use super::manifest::{FileInfo, Manifest};
use super::{CHUNK, HASHES, MACHINE, MANIFEST, MEMORY, STATE, ZEROS, conclude, hashes};
use crate::MigrationError;
use crate::decision::Decision;
use crate::message::{Offer, Refusal};
use crate::pages::{Block, PAGE};
use crate::progress::{Phase, Progress};

/// A paused guest, as a migration's source would send it.
pub struct Saved {
    /// The offer of the machine.
    pub offer: Offer,
    /// The state of vCPUs and devices.
    pub state: Vec<u8>,
    /// The memory, in the order of [`Offer::blocks`]. Does not change until the snapshot is written.
    pub blocks: Vec<Block>,
}

/// Parameters of a snapshot.
pub struct Writing<'a> {
    /// Identifies the snapshot.
    pub id: Uuid,
    /// The folder. Created if it does not exist; must not hold a snapshot.
    pub dir: &'a Path,
    /// Receives the progress report.
    pub progress: &'a Progress,
    /// Carries the cancel request.
    pub decision: &'a Decision,
}

/// Writes a snapshot of a guest that `save` saves.
///
/// # Errors
/// `save` fails, the host cannot write, or the snapshot was canceled. The report says the same, and
/// nothing is left of the snapshot.
pub fn write(
    writing: &Writing<'_>,
    save: impl FnOnce() -> Result<Saved, Refusal>,
) -> Result<(), Refusal> {
    writing.progress.enter(Phase::Preparing);
    let written = Folder::new(writing.dir, writing.id)
        .map_err(|error| host("create", writing.dir, &error))
        .and_then(|mut folder| {
            let saved = save().map_err(MigrationError::Here);
            let written = saved.and_then(|saved| write_all(writing, saved, &mut folder));
            if written.is_err() {
                folder.remove();
            }
            written
        });
    conclude(writing.progress, written)
}

fn host(what: &str, path: &Path, error: &io::Error) -> MigrationError {
    let code = match error.kind() {
        io::ErrorKind::AlreadyExists => "snapshot-exists",
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => "no-space",
        _ => "host-refused",
    };
    MigrationError::here(code, format!("cannot {what} {}: {error}", path.display()))
}

fn write_all(
    writing: &Writing<'_>,
    saved: Saved,
    folder: &mut Folder,
) -> Result<(), MigrationError> {
    let machine = folder.write(MACHINE, &saved.offer.machine)?;
    let state = folder.write(STATE, &saved.state)?;
    let hashes = write_memory(writing, &saved.blocks, folder)?;
    let unsaved = |error: &dyn fmt::Display| MigrationError::here("cannot-be-saved", error);
    let files = [machine, state, hashes];
    let manifest = Manifest::new(writing.id, saved.offer.vm, saved.offer.blocks, files);
    manifest.validate().map_err(|error| unsaved(&error))?;
    let text = serde_json::to_vec_pretty(&manifest).map_err(|error| unsaved(&error))?;
    folder.write(MANIFEST, &text)?;
    // From here on a cancel comes too late.
    if !writing.decision.commit() {
        return Err(MigrationError::Canceled);
    }
    folder.commit()
}

/// Writes the memory, and the hash of each page.
fn write_memory(
    writing: &Writing<'_>,
    blocks: &[Block],
    folder: &mut Folder,
) -> Result<FileInfo, MigrationError> {
    let (memory, memory_path) = folder.create(MEMORY)?;
    let (file, hashes_path) = folder.create(HASHES)?;
    let failed = |error: &io::Error| host("write", &memory_path, error);
    let not_hashed = |error: &io::Error| host("write", &hashes_path, error);
    let total: usize = blocks.iter().map(|block| block.ram.len()).sum();
    let progress = writing.progress;
    progress.update(|report| {
        report.phase = Phase::Stopped;
        report.memory_bytes = total as u64;
        report.remaining_pages = (total / PAGE) as u64;
    });
    memory
        .set_len(total as u64)
        .map_err(|error| failed(&error))?;
    let mut hashed = BufWriter::new(file);
    let (mut all, mut size) = (Xxh3::new(), 0_u64);
    let mut buffer = vec![0; CHUNK * PAGE];
    let mut position = 0_u64;
    let begun = Instant::now();
    for block in blocks {
        for offset in (0..block.ram.len()).step_by(buffer.len()) {
            if writing.decision.is_canceled() {
                return Err(MigrationError::Canceled);
            }
            let len = buffer.len().min(block.ram.len() - offset);
            let content = &mut buffer[..len];
            // A copy: Rust must not hold a reference to memory that a device of the host could change.
            if !block.ram.read_pages(offset, content) {
                return Err(MigrationError::here("machine-gone", "no memory"));
            }
            let marks: Vec<u64> = hashes(content).collect();
            for mark in &marks {
                all.update(&mark.to_le_bytes());
            }
            size += marks.len() as u64 * 8;
            if block.ram.plugged_pages(offset, len) > 0 {
                let raw: Vec<u8> = marks.iter().flat_map(|mark| mark.to_le_bytes()).collect();
                hashed.write_all(&raw)
            } else {
                // Memory that is not plugged is a hole in this file, too.
                hashed.seek_relative(marks.len() as i64 * 8)
            }
            .map_err(|error| not_hashed(&error))?;
            // Neighbouring pages with content in one write; pages of zeros stay holes.
            let mut page = 0;
            for run in marks.chunk_by(|a, b| (*a == ZEROS) == (*b == ZEROS)) {
                let range = page * PAGE..(page + run.len()) * PAGE;
                if run.first() != Some(&ZEROS) {
                    let at = position + range.start as u64;
                    memory
                        .write_all_at(&content[range], at)
                        .map_err(|error| failed(&error))?;
                }
                page += run.len();
            }
            position += len as u64;
            let zeros = marks.iter().filter(|mark| **mark == ZEROS).count() as u64;
            let pages = marks.len() as u64;
            let us = u64::try_from(begun.elapsed().as_micros())
                .unwrap_or(u64::MAX)
                .max(1);
            progress.update(|report| {
                report.zero_pages += zeros;
                report.pages += pages - zeros;
                report.sent_bytes += (pages - zeros) * PAGE as u64;
                report.remaining_pages = report.remaining_pages.saturating_sub(pages);
                report.bytes_per_second = position.saturating_mul(1_000_000) / us;
            });
        }
    }
    let file = hashed
        .into_inner()
        .map_err(|error| not_hashed(error.error()))?;
    file.set_len(size)
        .and_then(|()| file.sync_all())
        .map_err(|error| not_hashed(&error))?;
    memory.sync_all().map_err(|error| failed(&error))?;
    Ok(FileInfo {
        size,
        hash: all.digest(),
    })
}

/// A snapshot's folder while it is written: files with names of their own, until all are complete.
struct Folder {
    dir: PathBuf,
    /// The folder did not exist before.
    is_new: bool,
    id: Uuid,
    /// The final names of the files that exist, in the order in which they get them.
    files: Vec<&'static str>,
}

impl Folder {
    fn new(dir: &Path, id: Uuid) -> io::Result<Self> {
        let is_new = match DirBuilder::new().mode(0o700).create(dir) {
            Ok(()) => true,
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists && dir.is_dir() => false,
            Err(error) => return Err(error),
        };
        let names = [MANIFEST, MACHINE, STATE, MEMORY, HASHES];
        // A dangling link is in the way as a file is.
        let taken = |name: &&str| dir.join(name).symlink_metadata().is_ok();
        if let Some(name) = names.iter().find(|name| taken(name)) {
            let why = format!("there is {name} already");
            return Err(io::Error::new(io::ErrorKind::AlreadyExists, why));
        }
        Ok(Self {
            dir: dir.to_owned(),
            is_new,
            id,
            files: Vec::new(),
        })
    }

    fn partial(&self, name: &str) -> PathBuf {
        self.dir.join(format!(".{name}.{}", self.id))
    }

    fn create(&mut self, name: &'static str) -> Result<(File, PathBuf), MigrationError> {
        let path = self.partial(name);
        // It holds the guest's memory: for its owner only.
        let file = OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&path)
            .map_err(|error| host("create", &path, &error))?;
        self.files.push(name);
        Ok((file, path))
    }

    fn write(&mut self, name: &'static str, content: &[u8]) -> Result<FileInfo, MigrationError> {
        let (mut file, path) = self.create(name)?;
        file.write_all(content)
            .and_then(|()| file.sync_all())
            .map_err(|error| host("write", &path, &error))?;
        Ok(FileInfo::of(content))
    }

    /// Gives the files their names, the manifest last.
    fn commit(&mut self) -> Result<(), MigrationError> {
        let failed = |error: &io::Error| host("complete", &self.dir, error);
        let sync = || File::open(&self.dir).and_then(|dir| dir.sync_all());
        for name in &self.files {
            if *name == MANIFEST {
                // A manifest on the disk says that the other files are there.
                sync().map_err(|error| failed(&error))?;
            }
            // Another snapshot into the same folder may have been faster.
            let path = self.dir.join(name);
            renameat_with(CWD, self.partial(name), CWD, &path, RenameFlags::NOREPLACE)
                .map_err(|error| failed(&error.into()))?;
        }
        sync().map_err(|error| failed(&error))
    }

    /// Removes what was written. Only this snapshot has files of these names.
    fn remove(&self) {
        for name in &self.files {
            let partial = self.partial(name);
            // Renamed, if the end failed: then it is the file of that name, since nothing was replaced.
            if fs::remove_file(&partial).is_err() {
                let _ = fs::remove_file(self.dir.join(name));
            }
        }
        if self.is_new {
            // Fails if something else was put there meanwhile.
            let _ = fs::remove_dir(&self.dir);
        }
    }
}
