//! Copies of disks in a snapshot: raw images, sparse, of the moment of its memory.
//!
//! ```text
//!   paused   all blocks, and then the memory
//!   live     rounds ─ memory is protected ─ rounds ─ stop: the last blocks ─ memory ─ sync, hash
//! ```
//!
//! The disk itself is only read: whatever fails, it is as it was.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use memory::PageBuffer;
use rustix::fs::{FallocateFlags, SeekFrom, fallocate, seek};
use rustix::io::Errno;
use xxhash_rust::xxh3::Xxh3;

use super::manifest::{DiskInfo, MAX_DISKS, disk_file};
use super::read::{RestoreError, Snapshot};
use super::sparse;
use super::write::{Folder, Writing, host};
use crate::MigrationError;
use crate::copier::Copier;
use crate::decision::Decision;
use crate::disks::{DestinationDisk, NewImage, SourceDisk};
use crate::message::Refusal;
use crate::pages::is_zero;
use crate::policy::{AfterCallOff, Policy};
use crate::progress::Progress;

/// Bytes of an image that are read at once, and the unit of its hash: see [`DiskInfo::hash`].
const PART: usize = 1 << 20;

/// The disks that a snapshot copies.
pub struct CopiedDisks<'a> {
    /// The disks.
    pub disks: Vec<SourceDisk>,
    /// Starts to mark the blocks that the guest writes, and marks all that may have content.
    pub start_tracking: &'a dyn Fn() -> Result<(), Refusal>,
    /// `max_downtime`, `deadline` and `max_bandwidth` apply, to a guest that runs.
    pub policy: &'a Policy,
}

/// The images of disks, while they are written.
pub(super) struct DiskImages<'a> {
    copier: Copier,
    images: Vec<(SourceDisk, Arc<RawImage>)>,
    policy: &'a Policy,
    decision: &'a Decision,
}

impl<'a> DiskImages<'a> {
    /// Creates an image of zeros for each disk that is copied, and starts to track what the guest writes.
    /// Returns `None` if no disk is copied.
    pub(super) fn create(
        folder: &mut Folder,
        writing: &'a Writing<'_>,
    ) -> Result<Option<Self>, MigrationError> {
        let Some(copied) = &writing.disks else {
            return Ok(None);
        };
        if copied.disks.len() > MAX_DISKS {
            let count = copied.disks.len();
            let why = format!("{count} disks are to be copied; a snapshot has {MAX_DISKS} at most");
            return Err(MigrationError::here("cannot-be-saved", why));
        }
        let mut copier = Copier::new(writing.id, writing.progress, writing.decision);
        let mut images = Vec::new();
        for (index, disk) in copied.disks.iter().enumerate() {
            let (file, path) = folder.create(&disk_file(index))?;
            let sized = file.set_len(disk.size);
            sized.map_err(|error| host("write", &path, &error))?;
            let image = Arc::new(RawImage { file, path });
            let to = DestinationDisk {
                name: disk.name.clone(),
                size: disk.size,
                image: Arc::clone(&image) as Arc<dyn NewImage>,
            };
            copier.add(disk.clone(), to);
            images.push((disk.clone(), image));
        }
        (copied.start_tracking)().map_err(MigrationError::Here)?;
        Ok(Some(Self {
            copier,
            images,
            policy: copied.policy,
            decision: writing.decision,
        }))
    }

    /// Copies rounds beside a guest that runs, until the rest fits into the stop.
    pub(super) fn rounds(&mut self) -> Result<(), MigrationError> {
        self.copier.rounds(self.policy).map(drop).map_err(of_folder)
    }

    /// Copies what is left of the disks of a guest that is paused. Returns the number of blocks of 4 KiB.
    pub(super) fn last(&mut self) -> Result<u64, MigrationError> {
        self.copier.last().map_err(of_folder)
    }

    /// Copies what is left of the disks of a guest that was stopped at `begun`, for as long as the stop may
    /// take. Returns the number of blocks of 4 KiB; `None` if the guest must resume before all are copied.
    pub(super) fn last_in_stop(&mut self, begun: Instant) -> Result<Option<u64>, MigrationError> {
        let cut = begun.checked_add(self.policy.promise());
        let (blocks, is_all) = self.copier.last_until(cut).map_err(of_folder)?;
        Ok(is_all.then_some(blocks))
    }

    /// Decides after so many stops were called off.
    pub(super) fn after_call_off(&self, times: u32) -> Result<(), MigrationError> {
        if self.policy.after_call_off(times, false) != AfterCallOff::GiveUp {
            return Ok(());
        }
        let why = format!(
            "{times} stops of the guest were called off because the last blocks of its disks were not \
             copied within {} ms: the limit is {} ms (`max_downtime_ms`)",
            self.policy.promise().as_millis(),
            self.policy.max_downtime.as_millis()
        );
        Err(MigrationError::here("stop-too-long", why))
    }

    /// Makes the images durable, and returns what the manifest says of them.
    pub(super) fn finish(self) -> Result<Vec<DiskInfo>, MigrationError> {
        // The guest runs by now: neither lengthens its stop.
        self.copier.sync().map_err(of_folder)?;
        let info = |(disk, image): &(SourceDisk, Arc<RawImage>)| {
            let nothing = |_, _: &[u8]| Ok::<_, MigrationError>(());
            Ok(DiskInfo {
                name: disk.name.clone(),
                size: disk.size,
                hash: read_parts(&image.file, &image.path, disk.size, self.decision, nothing)?,
            })
        };
        self.images.iter().map(info).collect()
    }
}

/// A full disk has one code for all files of a folder.
fn of_folder(error: MigrationError) -> MigrationError {
    match error {
        MigrationError::Here(why) if why.code == "disk-full" => {
            MigrationError::here("no-space", why.detail)
        }
        other => other,
    }
}

/// A raw image in the folder, under a name of its own until the snapshot is complete.
struct RawImage {
    file: File,
    path: PathBuf,
}

impl NewImage for RawImage {
    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.file.write_all_at(data, offset)
    }

    fn zero(&self, offset: u64, len: u64) -> io::Result<()> {
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        match fallocate(&self.file, flags, offset, len) {
            // A file system that punches no holes.
            Err(Errno::OPNOTSUPP) => {
                let len = usize::try_from(len).unwrap_or(usize::MAX);
                self.file.write_all_at(&vec![0; len], offset)
            }
            done => Ok(done?),
        }
    }

    fn sync(&self) -> io::Result<()> {
        self.file.sync_all()
    }
}

/// Reads the parts of an image that are not all zeros, in their order, and returns their hash.
fn read_parts<E: From<RestoreError>>(
    file: &File,
    path: &Path,
    size: u64,
    decision: &Decision,
    mut take: impl FnMut(u64, &[u8]) -> Result<(), E>,
) -> Result<u64, E> {
    let failed = |source| RestoreError::Host {
        path: path.to_owned(),
        source,
    };
    let (mut all, mut at) = (Xxh3::new(), 0);
    let mut buffer = PageBuffer::new(PART);
    loop {
        if decision.is_canceled() {
            return Err(RestoreError::Canceled.into());
        }
        let Some(data) = next_data(file, at).map_err(failed)? else {
            return Ok(all.digest());
        };
        // Parts begin at multiples of their size, wherever the data does.
        at = data - data % PART as u64;
        if at >= size {
            return Ok(all.digest());
        }
        let len = usize::try_from(size - at).map_or(PART, |left| left.min(PART));
        let part = &mut buffer[..len];
        file.read_exact_at(part, at).map_err(failed)?;
        if !is_zero(part) {
            all.update(&at.to_le_bytes());
            all.update(part);
            take(at, part)?;
        }
        at += len as u64;
    }
}

/// Returns where the next data of a file begins, from `at` on; `None` if there is only a hole.
fn next_data(file: &File, at: u64) -> io::Result<Option<u64>> {
    match seek(file, SeekFrom::Data(at)) {
        Ok(data) => Ok(Some(data)),
        Err(Errno::NXIO) => Ok(None),
        // A file system that does not say: all of it may be data.
        Err(Errno::INVAL | Errno::OPNOTSUPP) => Ok(Some(at)),
        Err(error) => Err(error.into()),
    }
}

impl Snapshot {
    /// Returns the disks that were copied, and the paths of their images.
    pub fn disks(&self) -> impl Iterator<Item = (&DiskInfo, PathBuf)> {
        let disks = self.manifest().disks.iter().enumerate();
        disks.map(|(index, disk)| (disk, self.dir().join(disk_file(index))))
    }

    /// Checks the content of all copied disks against their hashes.
    ///
    /// # Errors
    /// An image differs from its hash, the host cannot read, or restoring was canceled.
    pub fn verify_disks(&self, decision: &Decision) -> Result<(), RestoreError> {
        (0..self.disk_images().len())
            .try_for_each(|index| self.read_disk(index, decision, |_, _| Ok(())))
    }

    /// Reads the parts of a copied disk that have content, and checks them as a whole at the end.
    fn read_disk<E: From<RestoreError>>(
        &self,
        index: usize,
        decision: &Decision,
        take: impl FnMut(u64, &[u8]) -> Result<(), E>,
    ) -> Result<(), E> {
        let (disk, file) = (
            self.manifest().disks.get(index),
            self.disk_images().get(index),
        );
        let Some((disk, file)) = disk.zip(file) else {
            return Ok(());
        };
        let name = disk_file(index);
        let path = self.dir().join(&name);
        if read_parts(file, &path, disk.size, decision, take)? == disk.hash {
            return Ok(());
        }
        let why = format!("{name}, the disk {:?}, differs from its hash", disk.name);
        Err(RestoreError::Damaged(why).into())
    }

    /// Copies the images of the disks into the folder of another snapshot.
    pub(super) fn copy_disks(
        &self,
        folder: &mut Folder,
        progress: &Progress,
        decision: &Decision,
    ) -> Result<(), MigrationError> {
        let disks = &self.manifest().disks;
        let total: u64 = disks.iter().map(|disk| disk.size).sum();
        progress.update(|report| {
            report.disk_bytes = total;
            report.disk_remaining_bytes = total;
        });
        for (index, disk) in disks.iter().enumerate() {
            let (file, path) = folder.create(&disk_file(index))?;
            let failed = |error| host("write", &path, &error);
            file.set_len(disk.size).map_err(failed)?;
            self.read_disk(index, decision, |at, part| {
                sparse::write_full(&file, part, at)
                    .map(drop)
                    .map_err(failed)
            })?;
            file.sync_all().map_err(failed)?;
            progress.update(|report| report.disk_remaining_bytes -= disk.size);
        }
        Ok(())
    }
}
