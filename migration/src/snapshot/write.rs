//! Writing a snapshot of a paused guest.

use std::fmt;
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Write as _};
use std::ops::Range;
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::time::Instant;

use memory::{PageBuffer, RamBlock};
use rustix::fs::{CWD, RenameFlags, renameat_with};
use uuid::Uuid;

use super::disks::{CopiedDisks, DiskImages};
use super::manifest::{FileInfo, MAX_MANIFEST, Manifest};
use super::memory_file::{MemoryFile, PageSink};
use super::read::Snapshot;
use super::{CHUNK, HASHES, MACHINE, MANIFEST, MEMORY, STATE, conclude_with};
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
    /// When the guest's clocks were stopped.
    pub stopped_at: Instant,
    /// The memory, in the order of [`Offer::blocks`]. Does not change until the snapshot is written.
    pub blocks: Vec<Block>,
}

/// The state of a guest at one moment, without its memory.
pub(super) struct SavedState {
    pub(super) state: Vec<u8>,
    pub(super) stopped_at: Instant,
}

/// Parameters of a snapshot.
pub struct Writing<'a> {
    /// Identifies the snapshot.
    pub id: Uuid,
    /// The folder. Created if it does not exist; must not hold a snapshot.
    pub dir: &'a Path,
    /// Called when all but the manifest is written: what must be durable before the snapshot is complete.
    pub sealing: &'a (dyn Fn() -> Result<(), Refusal> + Sync),
    /// Called with the outcome, before the report shows it: who sees it can have the guest at once. Returns
    /// what the reason of a failure has to add, about what is left of the operation.
    pub end: &'a (dyn Fn(Result<(), &Refusal>) -> &'static str + Sync),
    /// The snapshot that has the pages which have not changed: only the others are written.
    pub base: Option<&'a Snapshot>,
    /// The disks whose content becomes a part of the snapshot.
    pub disks: Option<CopiedDisks<'a>>,
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
    let written = in_folder(writing, |folder| {
        let saved = save().map_err(MigrationError::Here)?;
        write_all(writing, saved, folder)
    });
    end(writing, written)
}

/// Reports the end of a snapshot.
pub(super) fn end(
    writing: &Writing<'_>,
    written: Result<(), MigrationError>,
) -> Result<(), Refusal> {
    // A guest that is reset interrupts the snapshot, and shows in errors of every kind.
    let written = written.map_err(|error| writing.decision.ended().unwrap_or(error));
    let why = written.as_ref().err().map(MigrationError::refusal);
    let more = (writing.end)(why.as_ref().map_or(Ok(()), Err));
    conclude_with(writing.progress, written, more)
}

/// Has `write` fill the folder, and removes all of it if that fails.
pub(super) fn in_folder(
    writing: &Writing<'_>,
    write: impl FnOnce(&mut Folder) -> Result<(), MigrationError>,
) -> Result<(), MigrationError> {
    let folder = Folder::new(writing.dir, writing.id);
    let mut folder = folder.map_err(|error| host("create", writing.dir, &error))?;
    let written = write(&mut folder);
    if written.is_err() {
        folder.remove();
    }
    written
}

pub(super) fn host(what: &str, path: &Path, error: &io::Error) -> MigrationError {
    host_unless_taken(SNAPSHOT_EXISTS, what, path, error)
}

/// The code of a failure because there is a snapshot.
const SNAPSHOT_EXISTS: &str = "snapshot-exists";

/// Explains that the host refused, `taken` being the code for a name that is taken.
fn host_unless_taken(taken: &str, what: &str, path: &Path, error: &io::Error) -> MigrationError {
    let code = match error.kind() {
        io::ErrorKind::AlreadyExists => taken,
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
    writing.progress.enter(Phase::Stopped);
    let mut file = MemoryFile::create(folder, &saved.blocks, writing)?;
    let mut disks = DiskImages::create(folder, writing)?;
    if let Some(disks) = &mut disks {
        // In one pass: nothing changes meanwhile.
        disks.last()?;
    }
    copy_paused(whole(&saved.blocks), writing.decision, &mut file)?;
    let state = SavedState {
        state: saved.state,
        stopped_at: saved.stopped_at,
    };
    complete(writing, saved.offer, &state, file, disks, folder)
}

/// Writes the other files of a snapshot whose memory is in `file`, and gives all their names.
pub(super) fn complete(
    writing: &Writing<'_>,
    offer: Offer,
    saved: &SavedState,
    file: MemoryFile<'_>,
    disks: Option<DiskImages<'_>>,
    folder: &mut Folder,
) -> Result<(), MigrationError> {
    let hashes = file.finish()?;
    let disks = disks.map(DiskImages::finish).transpose()?;
    let machine = folder.write(MACHINE, &offer.machine)?;
    let state = folder.write(STATE, &saved.state)?;
    let files = [machine, state, hashes];
    let base = writing.base.map(Snapshot::as_base);
    let manifest = Manifest::new(
        writing.id,
        offer.vm,
        offer.blocks,
        saved.stopped_at,
        base,
        disks.unwrap_or_default(),
        files,
    );
    seal(writing, &manifest, folder)
}

/// Writes the manifest of a folder that is complete but for it, and gives all files their names.
pub(super) fn seal(
    writing: &Writing<'_>,
    manifest: &Manifest,
    folder: &mut Folder,
) -> Result<(), MigrationError> {
    let unsaved = |error: &dyn fmt::Display| MigrationError::here("cannot-be-saved", error);
    manifest.validate().map_err(|error| unsaved(&error))?;
    let text = serde_json::to_vec_pretty(manifest).map_err(|error| unsaved(&error))?;
    if text.len() as u64 > MAX_MANIFEST {
        let why = format!(
            "the manifest has {} bytes, more than {MAX_MANIFEST}",
            text.len()
        );
        return Err(unsaved(&why));
    }
    folder.write(MANIFEST, &text)?;
    (writing.sealing)().map_err(MigrationError::Here)?;
    // From here on a cancel comes too late.
    if !writing.decision.commit() {
        return Err(MigrationError::Canceled);
    }
    folder.commit()
}

/// All of these blocks, one after another.
pub(super) fn whole(blocks: &[Block]) -> impl Iterator<Item = (&RamBlock, Range<usize>)> {
    blocks.iter().map(|block| (&*block.ram, 0..block.ram.len()))
}

/// Copies parts of the memory of a paused guest, whole pages each.
pub(super) fn copy_paused<'a>(
    parts: impl Iterator<Item = (&'a RamBlock, Range<usize>)>,
    decision: &Decision,
    sink: &mut dyn PageSink,
) -> Result<(), MigrationError> {
    let mut buffer = PageBuffer::new(CHUNK * PAGE);
    let mut position = 0;
    for (ram, part) in parts {
        for offset in part.clone().step_by(buffer.len()) {
            if decision.is_canceled() {
                return Err(MigrationError::Canceled);
            }
            let len = buffer.len().min(part.end - offset);
            // A copy: Rust must not hold a reference to memory that a device of the host could change.
            if !ram.read_pages(offset, &mut buffer[..len]) {
                return Err(MigrationError::here("machine-gone", "no memory"));
            }
            sink.put(position / PAGE, &buffer[..len])?;
            position += len;
        }
    }
    Ok(())
}

/// A folder in which a snapshot or core dump is written: files with names of their own, until all are
/// complete.
pub(super) struct Folder {
    dir: PathBuf,
    /// The folder did not exist before.
    is_new: bool,
    id: Uuid,
    /// The code of a failure because one of the final names is taken.
    taken: &'static str,
    /// The final names of the files that exist, in the order in which they get them.
    files: Vec<String>,
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
            taken: SNAPSHOT_EXISTS,
            files: Vec::new(),
        })
    }

    /// Returns the folder of a file to write, which must exist, and the file's name, which must not.
    pub(super) fn beside(path: &Path, id: Uuid) -> Result<(Self, String), MigrationError> {
        const TAKEN: &str = "file-exists";
        let failed = |kind: io::ErrorKind| host_unless_taken(TAKEN, "create", path, &kind.into());
        let name = path.file_name().and_then(|name| name.to_str());
        let (Some(dir), Some(name)) = (path.parent(), name) else {
            return Err(failed(io::ErrorKind::InvalidFilename));
        };
        if path.symlink_metadata().is_ok() {
            return Err(failed(io::ErrorKind::AlreadyExists));
        }
        let folder = Self {
            dir: dir.to_owned(),
            is_new: false,
            id,
            taken: TAKEN,
            files: Vec::new(),
        };
        Ok((folder, name.to_owned()))
    }

    fn partial(&self, name: &str) -> PathBuf {
        self.dir.join(format!(".{name}.{}", self.id))
    }

    /// Creates a file that gets the name `name` when all are complete. Nothing may have that name yet: the
    /// end of a long copy would be too late to find that.
    pub(super) fn create(&mut self, name: &str) -> Result<(File, PathBuf), MigrationError> {
        let final_path = self.dir.join(name);
        if final_path.symlink_metadata().is_ok() {
            let error = io::ErrorKind::AlreadyExists.into();
            return Err(host_unless_taken(self.taken, "create", &final_path, &error));
        }
        let path = self.partial(name);
        // It holds the guest's memory or disk: for its owner only.
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&path)
            .map_err(|error| host("create", &path, &error))?;
        self.files.push(name.to_owned());
        Ok((file, path))
    }

    pub(super) fn write(&mut self, name: &str, content: &[u8]) -> Result<FileInfo, MigrationError> {
        let (mut file, path) = self.create(name)?;
        file.write_all(content)
            .and_then(|()| file.sync_all())
            .map_err(|error| host("write", &path, &error))?;
        Ok(FileInfo::of(content))
    }

    /// Gives the files their names, the manifest last.
    pub(super) fn commit(&mut self) -> Result<(), MigrationError> {
        let failed =
            |error: &io::Error| host_unless_taken(self.taken, "complete", &self.dir, error);
        let sync = || File::open(&self.dir).and_then(|dir| dir.sync_all());
        for name in &self.files {
            if name == MANIFEST {
                // A manifest on the disk says that the other files are there.
                sync().map_err(|error| failed(&error))?;
            }
            // Another one into the same folder may have been faster.
            let path = self.dir.join(name);
            renameat_with(CWD, self.partial(name), CWD, &path, RenameFlags::NOREPLACE)
                .map_err(|error| failed(&error.into()))?;
        }
        sync().map_err(|error| failed(&error))?;
        if self.is_new {
            // The name of the folder, too, must survive a crash of the host.
            let parent = self.dir.parent().filter(|at| !at.as_os_str().is_empty());
            let parent = File::open(parent.unwrap_or(Path::new(".")));
            let synced = parent.and_then(|parent| parent.sync_all());
            synced.map_err(|error| failed(&error))?;
        }
        Ok(())
    }

    /// Removes what was written. Only this snapshot or dump has files of these names.
    pub(super) fn remove(&self) {
        // The manifest first: as long as it is there, it says that the others are.
        for name in self.files.iter().rev() {
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
