//! Disk images: raw files and block devices, and qcow2 with its backing files.

use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::os::unix::fs::{FileExt, MetadataExt as _};
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use devices::event_loop::panic_message;
use devices::host_file::lock::{self, Lockable};
use devices::host_file::{Access, FileKind, LockError, LockMode, OpenError, Request};
use imago::FormatAccess;
use imago::file::File as Storage;
use parking_lot::{Mutex, RwLock};
use rustix::fs::{FallocateFlags, fallocate};

use super::copy::Written;
use super::format::{self, ImageFormat, RefusedWrite};
use super::frozen::check_writable;
use super::geometry::Geometry;
use super::incomplete;
use super::overlay::BaseImage;
use super::qcow2;

/// Bytes of a sector, the unit of virtio-blk (virtio 1.3, 5.2.4).
pub(super) const SECTOR: u64 = 512;
/// The kinds of file that hold an image.
const KINDS: [FileKind; 2] = [FileKind::Regular, FileKind::BlockDevice];

/// An image that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// The image cannot be opened, or is neither a file nor a block device.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// A disk has whole blocks, and at least one.
    #[error("{} has {size} bytes; the size of a disk must be a positive multiple of {block}", path.display())]
    Size {
        /// The image.
        path: PathBuf,
        /// Its size.
        size: u64,
        /// The size of a block.
        block: u64,
    },
    /// The image is not of the format that the configuration names, or of one that is not served.
    #[error("{} {why}", path.display())]
    Format {
        /// The image.
        path: PathBuf,
        /// The fault.
        why: String,
    },
    /// The image builds on another one, which the configuration does not allow.
    #[error("{} has a backing file; set `backing_files` to allow it", path.display())]
    Backing {
        /// The image.
        path: PathBuf,
    },
    /// The image keeps its data in another file, which the configuration does not allow.
    #[error("{} has an external data file; set `data_files` to allow it", path.display())]
    Data {
        /// The image.
        path: PathBuf,
    },
    /// The image names a file that is not below an allowed directory.
    #[error(
        "{} names {}, which is not below the image's own directory or an allowed one \
         (`--image-dir`)", path.display(), named.display()
    )]
    Outside {
        /// The image.
        path: PathBuf,
        /// The file that the image names.
        named: PathBuf,
    },
    /// Another user has the image.
    #[error(transparent)]
    Lock(#[from] LockError),
    /// A snapshot needs the image as it is.
    #[error("{} is frozen: {why}", path.display())]
    Frozen {
        /// The image.
        path: PathBuf,
        /// The snapshot, and what can be done.
        why: String,
    },
    /// A guest moved onto the image, and the rest of it never came.
    #[error(
        "{} is incomplete: blocks of it were still at the source of a migration when the guest's \
         machine ended. The source's image has them as of the move; delete {} to use the image all \
         the same, with zeros or old content in their place", path.display(), mark.display()
    )]
    Incomplete {
        /// The image.
        path: PathBuf,
        /// The file beside the image that says so.
        mark: PathBuf,
    },
}

/// An image, opened and locked.
pub(super) struct Image {
    pub(super) kind: Kind,
    pub(super) readonly: bool,
    pub(super) geometry: Geometry,
    /// Records writes while a copy is made.
    pub(super) written: Arc<Written>,
    /// The options for opening the image again, with its format.
    how: Opening,
    format: ImageFormat,
    /// The file of the image, locked. Behind `kind`: the lock ends last.
    lock: Arc<Lockable>,
    /// The files that the image names, locked for as long as they are open.
    below: Mutex<Vec<Arc<Lockable>>>,
    /// The image right below this one, by its real path.
    base: Option<(PathBuf, ImageFormat)>,
}

pub(super) enum Kind {
    Raw(File),
    Qcow2(Box<RwLock<FormatAccess<Storage>>>),
}

/// How an image is opened.
#[derive(Clone, Debug)]
pub(super) struct Opening {
    pub(super) path: PathBuf,
    pub(super) readonly: bool,
    pub(super) direct: bool,
    /// Detected when absent.
    pub(super) format: Option<ImageFormat>,
    /// The format was detected, now or when the disk was configured: no operator has confirmed it.
    pub(super) is_detected: bool,
    pub(super) backing_files: bool,
    pub(super) data_files: bool,
    /// Directories below which an image may name files, besides its own.
    pub(super) directories: Vec<PathBuf>,
    pub(super) lock: LockMode,
    /// Another machine still has the image; [`Image::take_over`] comes later.
    pub(super) is_incoming: bool,
}

impl Opening {
    fn request(&self) -> Request<'_> {
        Request {
            access: match self.readonly {
                true => Access::Read,
                false => Access::Write,
            },
            ..Request::read(&self.path, &KINDS)
        }
    }

    /// Opens the file of the image once more, for direct I/O if that is configured. The path may name another
    /// file by now, which was neither checked nor locked.
    ///
    /// # Errors
    /// It does, or the host refuses.
    pub(super) fn open_again(&self, opened: &File) -> Result<File, ImageError> {
        let failed = |source| OpenError::Host {
            path: self.path.clone(),
            source,
        };
        let again = Request {
            direct: self.direct,
            ..self.request()
        };
        let again = again.open()?;
        let identity = |file: &File| file.metadata().map(|found| (found.dev(), found.ino()));
        if identity(&again).map_err(failed)? != identity(opened).map_err(failed)? {
            return Err(ImageError::Format {
                path: self.path.clone(),
                why: "was replaced by another file while it was opened".to_owned(),
            });
        }
        Ok(again)
    }
}

impl Image {
    pub(super) fn open(how: Opening) -> Result<Self, ImageError> {
        let path = how.path.clone();
        let failed = |source| OpenError::Host {
            path: path.clone(),
            source,
        };
        let mut file = how.request().open()?;
        if !how.is_incoming {
            // A guest that has just come gets the rest of its image from its source.
            incomplete::check(&path)?;
        }
        let format = format::check(&file, how.format).map_err(|why| ImageError::Format {
            path: path.clone(),
            why,
        })?;
        if how.direct && format == ImageFormat::Raw {
            file = how.open_again(&file)?;
        }
        let file = Lockable(file);
        if !how.is_incoming {
            lock::take(&file.0, &path, how.readonly, how.lock)?;
        }
        if !how.readonly {
            // Behind the lock: who freezes an image has it locked until it is marked.
            check_writable(&path)?;
        }
        let (kind, below, base) = match format {
            ImageFormat::Raw => {
                let file = file.0.try_clone().map_err(failed)?;
                (Kind::Raw(file), Vec::new(), None)
            }
            ImageFormat::Qcow2 => {
                let opened = qcow2::open(&how, &file.0)?;
                let image = Box::new(RwLock::new(opened.image));
                (Kind::Qcow2(image), opened.below, opened.base)
            }
        };
        let geometry = match &kind {
            Kind::Raw(file) if how.direct => Geometry::of(file).map_err(failed)?,
            _ => Geometry::ANY,
        };
        let image = Self {
            kind,
            geometry,
            written: Arc::default(),
            readonly: how.readonly,
            how,
            format,
            lock: Arc::new(file),
            below: Mutex::new(below.into_iter().map(Arc::new).collect()),
            base,
        };
        let size = image.size().map_err(failed)?;
        let block = geometry.logical;
        if size == 0 || !size.is_multiple_of(block) {
            return Err(ImageError::Size { path, size, block });
        }
        Ok(image)
    }

    /// The format, detected or as configured.
    pub(super) fn format(&self) -> ImageFormat {
        self.format
    }

    pub(super) fn file(&self) -> &File {
        &self.lock.0
    }

    /// Asks about the files that the image names.
    pub(super) fn named_files<T>(&self, ask: impl Fn(&File) -> T) -> Vec<T> {
        self.below.lock().iter().map(|file| ask(&file.0)).collect()
    }

    #[cfg(test)]
    pub(super) fn how(&self) -> &Opening {
        &self.how
    }

    /// Returns the locked part of the image.
    pub(super) fn lock_mode(&self) -> LockMode {
        self.how.lock
    }

    /// The image right below this one, if it builds on one of a format that is served.
    pub(super) fn base(&self) -> Option<BaseImage> {
        let (path, format) = self.base.clone()?;
        // What the overlay may name, its base may: the directories of the overlay count, too.
        let own = self.how.path.parent().map(Path::to_owned);
        let image_dirs = self.how.directories.iter().cloned().chain(own).collect();
        Some(BaseImage {
            path,
            format,
            backing_files: true,
            image_dirs,
            lock: self.how.lock,
        })
    }

    /// The path by which the image was opened.
    pub(super) fn path(&self) -> &Path {
        &self.how.path
    }

    /// Opens an overlay whose backing file is this image, for the user of this one. The overlay is locked,
    /// and the images below it are not: this image keeps its locks.
    pub(super) fn open_overlay(&self, overlay: &Path) -> Result<Self, ImageError> {
        let mut opened = Self::open(Opening {
            path: overlay.to_owned(),
            format: Some(ImageFormat::Qcow2),
            // The header names its own format and that of the image, which no guest can change.
            is_detected: false,
            backing_files: true,
            data_files: false,
            is_incoming: true,
            ..self.how.clone()
        })?;
        self.check_size(&opened)?;
        opened.lock_opened()?;
        // The guest has read it.
        opened.geometry = self.geometry;
        Ok(opened)
    }

    /// Opens a new image, which has this one's content, for the user of this one: with the same access, and
    /// with blocks of the size that the guest knows. The caller has its lock, until
    /// [`Image::lock_opened`].
    pub(super) fn open_successor(
        &self,
        new: &Path,
        format: ImageFormat,
        is_detected: bool,
    ) -> Result<Self, ImageError> {
        let mut opened = Self::open(Opening {
            path: new.to_owned(),
            format: Some(format),
            is_detected,
            backing_files: false,
            data_files: false,
            is_incoming: true,
            ..self.how.clone()
        })?;
        self.check_size(&opened)?;
        let (ours, needed) = (self.geometry.logical, opened.geometry.logical);
        if needed > ours {
            let path = new.to_owned();
            let why = format!(
                "needs blocks of {needed} bytes for direct I/O, and the guest uses blocks of {ours}"
            );
            return Err(ImageError::Format { path, why });
        }
        opened.geometry = Geometry {
            // Of buffers, which only the host cares about.
            align: opened.geometry.align,
            ..self.geometry
        };
        Ok(opened)
    }

    /// Fails unless an image that takes the place of this one has its size.
    fn check_size(&self, successor: &Self) -> Result<(), ImageError> {
        let path = successor.how.path.clone();
        let failed = |source| OpenError::Host {
            path: path.clone(),
            source,
        };
        let sizes = [
            self.size().map_err(failed)?,
            successor.size().map_err(failed)?,
        ];
        let [ours, theirs] = sizes;
        if ours != theirs {
            let why = format!("has {theirs} bytes, and the disk {ours}");
            return Err(ImageError::Format { path, why });
        }
        Ok(())
    }

    /// Locks an image that was opened as one that another user still has.
    pub(super) fn lock_opened(&mut self) -> Result<(), LockError> {
        let how = &self.how;
        lock::take(&self.lock.0, &how.path, self.readonly, how.lock)?;
        self.how.is_incoming = false;
        Ok(())
    }

    /// Notes that the file of the image was renamed.
    pub(super) fn renamed(&mut self, path: &Path) {
        path.clone_into(&mut self.how.path);
    }

    /// Locks the images below this overlay as `base` and those below it are locked, but only for reading.
    /// There is no moment in which another user could write to them.
    pub(super) fn inherit_locks(&self, base: &Self) -> Result<(), ImageError> {
        lock::stop_writing(&base.lock.0, &base.how.path, base.how.lock)?;
        // Shared, as an image that is dropped ends its locks.
        let mut below = vec![Arc::clone(&base.lock)];
        below.extend(base.below.lock().iter().cloned());
        *self.below.lock() = below;
        Ok(())
    }

    /// Locks the image for a user who writes, as before [`Image::inherit_locks`].
    pub(super) fn lock_again(&self) -> Result<(), LockError> {
        let lock = |readonly| lock::take(&self.lock.0, &self.how.path, readonly, self.how.lock);
        lock(false).inspect_err(|_| {
            // The refusal has released all of them. Nobody writes: the one who reads denies that.
            if let Err(error) = lock(true) {
                tracing::error!(%error, "an image below an overlay is not locked");
            }
        })
    }

    /// Whether buffers and lengths must be aligned.
    pub(super) fn is_direct(&self) -> bool {
        self.how.direct
    }

    /// Whether a write could make the image look like one of another format, so that its data must be
    /// looked at, in a copy that the guest cannot change: [`Image::write_at`] does.
    ///
    /// A guest that writes a qcow2 header to a disk whose format was detected as raw would choose the
    /// files that the next detection leads to. QEMU refuses such writes, too (`raw_co_pwritev`).
    pub(super) fn is_watched(&self, offset: u64, len: usize, capacity: u64) -> bool {
        self.how.is_detected
            && self.format == ImageFormat::Raw
            && format::is_telling(offset, len, capacity)
    }

    /// Refuses data that would make the image one of another format.
    fn check_write(&self, data: &[u8], offset: u64) -> io::Result<()> {
        let capacity = self.size()?;
        if !self.is_watched(offset, data.len(), capacity) {
            return Ok(());
        }
        match format::written(data, offset, capacity) {
            Some(format) => Err(io::Error::other(RefusedWrite { format })),
            None => Ok(()),
        }
    }

    /// Bytes of the disk.
    pub(super) fn size(&self) -> io::Result<u64> {
        match &self.kind {
            // A block device's size is where its end is; its metadata do not say.
            Kind::Raw(file) => (&mut &*file).seek(SeekFrom::End(0)),
            Kind::Qcow2(image) => Ok(image.read().size()),
        }
    }

    /// Gives the disk so many bytes, if it is an image that can grow.
    pub(super) fn resize(&self, size: u64) -> io::Result<()> {
        if self.readonly && self.file().metadata()?.is_file() {
            let why = "the disk is read-only (`readonly`), and so is its image";
            return Err(io::Error::new(io::ErrorKind::ReadOnlyFilesystem, why));
        }
        match &self.kind {
            Kind::Raw(file) if file.metadata()?.is_file() => file.set_len(size),
            // The host's administrator resizes it; the guest gets the new size.
            Kind::Raw(_) => Ok(()),
            Kind::Qcow2(image) => {
                let now = image.read().size();
                if size < now {
                    let why = "a qcow2 image cannot shrink while it is in use";
                    return Err(io::Error::new(io::ErrorKind::Unsupported, why));
                }
                image
                    .read()
                    .resize_grow(size, imago::format::PreallocateMode::Zero)
            }
        }
    }

    /// Lets another machine take the image over. Nothing is in flight, and nothing was written since
    /// the image was flushed.
    pub(super) fn hand_over(&self) {
        self.below.lock().clear();
        lock::release(&self.lock.0);
    }

    /// Takes the image, as the machine that had it left it. Nothing is in flight.
    pub(super) fn take_over(&self) -> Result<(), ImageError> {
        let how = &self.how;
        lock::take(&self.lock.0, &how.path, self.readonly, how.lock)?;
        if let Kind::Qcow2(image) = &self.kind {
            // The other machine may have changed the tables that this one has read.
            let how = Opening {
                is_incoming: false,
                ..how.clone()
            };
            let opened = qcow2::open(&how, &self.lock.0);
            let opened = opened.inspect_err(|_| lock::release(&self.lock.0))?;
            *image.write() = opened.image;
            *self.below.lock() = opened.below.into_iter().map(Arc::new).collect();
        }
        Ok(())
    }

    pub(super) fn read_at(&self, data: &mut [u8], offset: u64) -> io::Result<()> {
        match &self.kind {
            Kind::Raw(file) => file.read_exact_at(data, offset),
            Kind::Qcow2(image) => image.read().read(data, offset),
        }
    }

    pub(super) fn write_at(&self, data: &[u8], offset: u64) -> io::Result<()> {
        self.marking(offset, data.len() as u64, || match &self.kind {
            Kind::Raw(file) => {
                self.check_write(data, offset)?;
                file.write_all_at(data, offset)
            }
            Kind::Qcow2(image) => image.read().write(data, offset),
        })
    }

    /// Writes what came from the source of a migration. Not checked as a write of the guest is: it was on
    /// the disk before, and the configuration names the format.
    pub(super) fn write_arrived(&self, data: &[u8], offset: u64) -> io::Result<()> {
        match &self.kind {
            Kind::Raw(file) => file.write_all_at(data, offset),
            Kind::Qcow2(image) => image.read().write(data, offset),
        }
    }

    /// Changes a range, and marks it for the copy that is made, if one is.
    fn marking(
        &self,
        offset: u64,
        len: u64,
        change: impl FnOnce() -> io::Result<()>,
    ) -> io::Result<()> {
        // The library may panic half-way: that is contained by the caller, and must not lose the mark.
        let changed = catch_unwind(AssertUnwindSafe(change));
        self.written.mark(offset, len);
        changed.unwrap_or_else(|panic| resume_unwind(panic))
    }

    pub(super) fn flush(&self) -> io::Result<()> {
        match &self.kind {
            Kind::Raw(file) => file.sync_data(),
            Kind::Qcow2(image) => {
                let image = image.read();
                image.flush()?;
                image.sync()
            }
        }
    }

    pub(super) fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        self.marking(offset, len, || match &self.kind {
            Kind::Raw(file) => {
                let how = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
                Ok(fallocate(file, how, offset, len)?)
            }
            Kind::Qcow2(image) => image.write().discard_to_any(offset, len),
        })
    }

    pub(super) fn write_zeroes(&self, offset: u64, len: u64, unmap: bool) -> io::Result<()> {
        self.marking(offset, len, || match &self.kind {
            Kind::Raw(file) => {
                let how = if unmap {
                    FallocateFlags::PUNCH_HOLE
                } else {
                    FallocateFlags::ZERO_RANGE
                };
                Ok(fallocate(
                    file,
                    how | FallocateFlags::KEEP_SIZE,
                    offset,
                    len,
                )?)
            }
            Kind::Qcow2(image) => image.read().write_zeroes(offset, len),
        })
    }
}

/// Does something to an image of which the library may think that it is sound: a damaged one can
/// make it panic.
pub(super) fn contained<T>(f: impl FnOnce() -> io::Result<T>) -> io::Result<T> {
    catch_unwind(AssertUnwindSafe(f)).unwrap_or_else(|panic| {
        let why = panic_message(panic.as_ref());
        let why = format!("the image is damaged: {why}");
        Err(io::Error::new(io::ErrorKind::InvalidData, why))
    })
}
