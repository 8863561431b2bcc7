//! Disk images: raw files and block devices, and qcow2 with its backing files.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom};
use std::os::unix::fs::{FileExt, FileTypeExt, OpenOptionsExt};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use devices::event_loop::panic_message;
use imago::file::File as Storage;
use imago::format::gate::ImplicitOpenGate;
use imago::qcow2::Qcow2;
use imago::{FormatAccess, FormatDriverBuilder, Storage as _, StorageOpenOptions};
use parking_lot::{Mutex, RwLock};
use rustix::fs::{FallocateFlags, fallocate};

use super::geometry::Geometry;
use super::lock::{self, LockError, LockMode, Lockable};

/// Bytes of a sector, the unit of virtio-blk (virtio 1.3, 5.2.4).
pub(super) const SECTOR: u64 = 512;
/// Images under an image, at most.
const MAX_BACKING: usize = 32;
const QCOW2_MAGIC: [u8; 4] = *b"QFI\xfb";
/// How images of formats that are not served are known: a VHD of a fixed size by its footer.
const OTHER_FORMATS: [(SeekFrom, &[u8], &str); 4] = [
    (SeekFrom::Start(0), b"KDMV", "VMDK"),
    (SeekFrom::Start(0), b"vhdxfile", "VHDX"),
    (SeekFrom::Start(0), b"conectix", "VHD"),
    (SeekFrom::End(-(SECTOR as i64)), b"conectix", "VHD"),
];

/// The format of an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ImageFormat {
    /// The disk's bytes, one after the other.
    Raw,
    /// QEMU's copy-on-write format, version 2 or 3.
    Qcow2,
}

/// An image that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// It cannot be opened.
    #[error("{} cannot be opened: {source}", path.display())]
    Open {
        /// The image.
        path: PathBuf,
        /// The host's answer.
        source: io::Error,
    },
    /// It is neither a file nor a block device.
    #[error("{} is {what}, which is no disk image", path.display())]
    NotAnImage {
        /// The image.
        path: PathBuf,
        /// What it is.
        what: &'static str,
    },
    /// A disk has whole blocks, and one at least.
    #[error("{} has {size} bytes, which is no size of a disk: a multiple of {block} above 0", path.display())]
    Size {
        /// The image.
        path: PathBuf,
        /// Its size.
        size: u64,
        /// The size of a block.
        block: u64,
    },
    /// Said to be raw by nobody, and it begins like an image of another format, or the other way
    /// round. A guest could write such a beginning to a raw disk.
    #[error("{} {why}", path.display())]
    Format {
        /// The image.
        path: PathBuf,
        /// What is wrong.
        why: String,
    },
    /// It builds on another image, which was not allowed.
    #[error("{} builds on another image; that is allowed by `backing_files`", path.display())]
    Backing {
        /// The image.
        path: PathBuf,
    },
    /// Somebody else uses it.
    #[error(transparent)]
    Lock(#[from] LockError),
}

/// An image, opened and locked.
pub(super) struct Image {
    pub(super) kind: Kind,
    pub(super) readonly: bool,
    pub(super) geometry: Geometry,
    path: PathBuf,
    /// What is locked; for a raw image it is the image. Behind it: the locks end last.
    lock: Lockable,
    lock_mode: LockMode,
    /// What it builds on, locked for as long as these are open.
    below: Mutex<Vec<Lockable>>,
    direct: bool,
    backing_files: bool,
}

pub(super) enum Kind {
    Raw(File),
    Qcow2(Box<RwLock<FormatAccess<Storage>>>),
}

/// How an image is opened.
#[derive(Clone, Debug)]
pub(super) struct Opening<'a> {
    pub(super) path: &'a Path,
    pub(super) readonly: bool,
    pub(super) direct: bool,
    pub(super) format: Option<ImageFormat>,
    pub(super) backing_files: bool,
    pub(super) lock: LockMode,
    /// Somebody else has it still; [`Image::take_over`] comes later.
    pub(super) is_incoming: bool,
}

impl Image {
    pub(super) fn open(how: &Opening<'_>) -> Result<Self, ImageError> {
        let path = how.path.to_owned();
        let failed = |source| ImageError::Open {
            path: path.clone(),
            source,
        };
        check_kind(&path)?;
        let mut options = OpenOptions::new();
        options.read(true).write(!how.readonly);
        let format = format(options.open(&path).map_err(failed)?, how)?;
        let direct = if how.direct && format == ImageFormat::Raw {
            libc::O_DIRECT
        } else {
            0
        };
        options.custom_flags(direct | libc::O_CLOEXEC);
        let file = Lockable(options.open(&path).map_err(failed)?);
        if !how.is_incoming {
            lock::take(&file.0, &path, how.readonly, how.lock)?;
        }
        let (kind, below) = match format {
            ImageFormat::Raw => (Kind::Raw(file.0.try_clone().map_err(failed)?), Vec::new()),
            ImageFormat::Qcow2 => {
                let (image, below) = open_qcow2(how)?;
                (Kind::Qcow2(Box::new(RwLock::new(image))), below)
            }
        };
        let geometry = match &kind {
            Kind::Raw(file) if how.direct => Geometry::of(file).map_err(failed)?,
            _ => Geometry::ANY,
        };
        let image = Self {
            kind,
            geometry,
            readonly: how.readonly,
            path: path.clone(),
            lock: file,
            lock_mode: how.lock,
            below: Mutex::new(below),
            direct: how.direct,
            backing_files: how.backing_files,
        };
        let size = image.size().map_err(failed)?;
        let block = geometry.logical;
        if size == 0 || !size.is_multiple_of(block) {
            return Err(ImageError::Size { path, size, block });
        }
        Ok(image)
    }

    /// Whether buffers and lengths must be aligned.
    pub(super) fn is_direct(&self) -> bool {
        self.direct
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
        match &self.kind {
            Kind::Raw(file) if file.metadata()?.is_file() => file.set_len(size),
            // The host's administrator resizes it; the guest is told the new size.
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

    /// Takes the image, as it was left by whoever had it. Nothing is in flight.
    pub(super) fn take_over(&self) -> Result<(), ImageError> {
        lock::take(&self.lock.0, &self.path, self.readonly, self.lock_mode)?;
        if let Kind::Qcow2(image) = &self.kind {
            // What it knew of the image's tables may be wrong by now.
            let opened = open_qcow2(&Opening {
                path: &self.path,
                readonly: self.readonly,
                direct: self.direct,
                format: Some(ImageFormat::Qcow2),
                backing_files: self.backing_files,
                lock: self.lock_mode,
                is_incoming: false,
            });
            let (opened, below) = opened.inspect_err(|_| lock::release(&self.lock.0))?;
            *image.write() = opened;
            *self.below.lock() = below;
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
        match &self.kind {
            Kind::Raw(file) => file.write_all_at(data, offset),
            Kind::Qcow2(image) => image.read().write(data, offset),
        }
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
        match &self.kind {
            Kind::Raw(file) => {
                let how = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
                Ok(fallocate(file, how, offset, len)?)
            }
            Kind::Qcow2(image) => image.write().discard_to_any(offset, len),
        }
    }

    pub(super) fn write_zeroes(&self, offset: u64, len: u64, unmap: bool) -> io::Result<()> {
        match &self.kind {
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
        }
    }
}

/// Before it is opened: a pipe would wait for its other end.
fn check_kind(path: &Path) -> Result<(), ImageError> {
    let metadata = path.metadata().map_err(|source| ImageError::Open {
        path: path.to_owned(),
        source,
    })?;
    let kind = metadata.file_type();
    let what = match kind {
        kind if kind.is_file() || kind.is_block_device() => return Ok(()),
        kind if kind.is_dir() => "a directory",
        kind if kind.is_char_device() => "a character device",
        kind if kind.is_fifo() => "a pipe",
        _ => "something else",
    };
    Err(ImageError::NotAnImage {
        path: path.to_owned(),
        what,
    })
}

/// What the image is said to be, if it can be that; found out where nothing is said.
fn format(mut file: File, how: &Opening<'_>) -> Result<ImageFormat, ImageError> {
    let is_qcow2 = has(&mut file, SeekFrom::Start(0), &QCOW2_MAGIC);
    let refused = |why: &str| ImageError::Format {
        path: how.path.to_owned(),
        why: why.to_owned(),
    };
    match (how.format, is_qcow2) {
        (Some(ImageFormat::Qcow2), false) => Err(refused("is said to be qcow2, and is not")),
        (Some(format), _) => Ok(format),
        (None, true) => Ok(ImageFormat::Qcow2),
        (None, false) => {
            let mut others = OTHER_FORMATS.iter();
            match others.find(|(at, magic, _)| has(&mut file, *at, magic)) {
                Some((_, _, name)) => Err(refused(&format!("is a {name} image"))),
                None => Ok(ImageFormat::Raw),
            }
        }
    }
}

/// Whether these bytes are there. An image that is too short for them is told by its size.
fn has(file: &mut File, at: SeekFrom, magic: &[u8]) -> bool {
    let mut there = vec![0; magic.len()];
    file.seek(at).is_ok() && file.read_exact(&mut there).is_ok() && there == magic
}

/// Opens an image, and locks what is below it, unless somebody else has it still.
fn open_qcow2(how: &Opening<'_>) -> Result<(FormatAccess<Storage>, Vec<Lockable>), ImageError> {
    let failed = |source: io::Error| ImageError::Format {
        path: how.path.to_owned(),
        why: format!("cannot be used as qcow2: {source}"),
    };
    let options = StorageOpenOptions::new()
        .filename(how.path)
        .write(!how.readonly)
        .direct(how.direct);
    not_encrypted(how.path).map_err(failed)?;
    let storage = Storage::open(options).map_err(failed)?;
    let builder = Qcow2::<Storage>::builder(storage).write(!how.readonly);
    let locks = Arc::new(Mutex::new(Locks {
        mode: (!how.is_incoming).then_some(how.lock),
        taken: Vec::new(),
        refused: None,
    }));
    let gate = Below {
        allowed: how.backing_files,
        readonly: how.readonly,
        locks: Arc::clone(&locks),
        seen: vec![
            how.path
                .canonicalize()
                .unwrap_or_else(|_| how.path.to_owned()),
        ],
    };
    let opened = contained(|| builder.open(gate));
    let mut locks = locks.lock();
    if let Some(refused) = locks.refused.take() {
        return Err(refused.into());
    }
    let opened = opened.map_err(|error| match error.kind() {
        io::ErrorKind::PermissionDenied if !how.backing_files => ImageError::Backing {
            path: how.path.to_owned(),
        },
        _ => failed(error),
    })?;
    Ok((FormatAccess::new(opened), std::mem::take(&mut locks.taken)))
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

/// The library takes an encrypted image for one that is not, and its bytes for the disk's.
fn not_encrypted(path: &Path) -> io::Result<()> {
    /// `crypt_method` in the header (QEMU's docs/interop/qcow2.rst).
    const CRYPT_METHOD: usize = 32;
    let mut header = [0; CRYPT_METHOD + 4];
    match File::open(path)?.read_exact_at(&mut header, 0) {
        Ok(()) if header.starts_with(&QCOW2_MAGIC) && header[CRYPT_METHOD..] != [0; 4] => {
            let why = format!("{} is encrypted", path.display());
            Err(io::Error::new(io::ErrorKind::Unsupported, why))
        }
        // What is no header is told by whoever reads all of it.
        _ => Ok(()),
    }
}

/// Opens the images on which an image builds, if that is allowed, and follows no circle.
struct Below {
    allowed: bool,
    /// The one above is not written to, nor is what keeps its data.
    readonly: bool,
    locks: Arc<Mutex<Locks>>,
    seen: Vec<PathBuf>,
}

/// The locks of what is below an image.
struct Locks {
    /// How they are taken, if they are.
    mode: Option<LockMode>,
    taken: Vec<Lockable>,
    refused: Option<LockError>,
}

impl Locks {
    fn take(&mut self, path: &Path, readonly: bool) -> io::Result<()> {
        let Some(mode) = self.mode else {
            return Ok(());
        };
        let mut options = OpenOptions::new();
        let file = Lockable(options.read(true).write(!readonly).open(path)?);
        if let Err(refused) = lock::take(&file.0, path, readonly, mode) {
            let error = io::Error::other(refused.to_string());
            self.refused = Some(refused);
            return Err(error);
        }
        self.taken.push(file);
        Ok(())
    }
}

impl Below {
    fn not_seen(&self, path: &Path) -> io::Result<()> {
        if self.seen.iter().any(|seen| seen == path) {
            let why = format!("{} builds on itself", path.display());
            return Err(io::Error::new(io::ErrorKind::InvalidData, why));
        }
        Ok(())
    }

    fn pass(&self, path: Option<PathBuf>) -> io::Result<Self> {
        let denied = |why: String| io::Error::new(io::ErrorKind::InvalidData, why);
        if !self.allowed {
            let why = "it builds on another image";
            return Err(io::Error::new(io::ErrorKind::PermissionDenied, why));
        }
        let path = path.ok_or_else(|| denied("an image below it has no name".to_owned()))?;
        let path = path.canonicalize().unwrap_or(path);
        self.not_seen(&path)?;
        if self.seen.len() >= MAX_BACKING {
            return Err(denied(format!(
                "more than {MAX_BACKING} images are below it"
            )));
        }
        let mut seen = self.seen.clone();
        seen.push(path);
        Ok(Self {
            allowed: true,
            readonly: true,
            locks: Arc::clone(&self.locks),
            seen,
        })
    }
}

impl ImplicitOpenGate<Storage> for Below {
    fn open_format<F: FormatDriverBuilder<Storage>>(
        &mut self,
        builder: F,
    ) -> io::Result<FormatAccess<Storage>> {
        let path = builder.get_image_path();
        if let Some(path) = &path {
            not_encrypted(path)?;
        }
        let below = self.pass(path)?;
        Ok(FormatAccess::new(builder.open(below)?))
    }

    fn open_storage(&mut self, options: StorageOpenOptions) -> io::Result<Storage> {
        // The file of an image that was let pass, or an external data file: as dangerous.
        if !self.allowed {
            let why = "it keeps its data in another file";
            return Err(io::Error::new(io::ErrorKind::PermissionDenied, why));
        }
        let readonly = self.readonly || !options.get_writable();
        if let Some(path) = options.get_filename() {
            // Before it is locked: the one above it holds the lock.
            self.not_seen(&path.canonicalize().unwrap_or_else(|_| path.to_owned()))?;
            check_kind(path).map_err(|error| io::Error::other(error.to_string()))?;
            self.locks.lock().take(path, readonly)?;
        }
        Storage::open(options.write(!readonly))
    }
}
