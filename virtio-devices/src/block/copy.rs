//! Copying disks to other hosts: what is in an image, what the guest writes meanwhile, and new images.

use std::fs::File;
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};

use memory::{DirtyBitmap, PageBuffer};
use parking_lot::RwLock;

use super::LockMode;
use super::access::DiskAccess;
use super::base::ImageVersion;
use super::create::create_file;
use super::extents::{extents, own_extents};
use super::format::ImageFormat;
use super::frozen::check_writable;
use super::image::{Image, ImageError, Kind, Opening, contained};
use super::overlay::{BaseImage, backing, failed};
use super::request::Op;

/// Records which blocks of an image are written, while a copy of it is made.
///
/// A range is marked when its operation has ended, and before the guest hears of it: an earlier mark
/// could be taken before the bytes are there, and the copy would lack them for ever. Operations that
/// fail are marked, too, since they may have written a part.
#[derive(Default)]
pub(super) struct Written(RwLock<Option<Arc<DirtyBitmap>>>);

impl Written {
    /// Marks in this bitmap from here on.
    pub(super) fn set(&self, bitmap: Arc<DirtyBitmap>) {
        *self.0.write() = Some(bitmap);
    }

    /// Ends marking in this bitmap. Another copy may have begun.
    pub(super) fn unset(&self, bitmap: &Arc<DirtyBitmap>) {
        self.0.write().take_if(|ours| Arc::ptr_eq(ours, bitmap));
    }

    /// Whether a copy is made.
    pub(super) fn is_set(&self) -> bool {
        self.0.read().is_some()
    }

    pub(super) fn mark(&self, offset: u64, len: u64) {
        if let Some(bitmap) = &*self.0.read() {
            let cut = |value: u64| usize::try_from(value).unwrap_or(usize::MAX);
            bitmap.mark(cut(offset), cut(len));
        }
    }

    pub(super) fn mark_op(&self, op: Op) {
        match op {
            Op::Write { offset, len } => self.mark(offset, len as u64),
            Op::Discard { offset, len } | Op::WriteZeroes { offset, len, .. } => {
                self.mark(offset, len);
            }
            Op::Read { .. } | Op::Flush => {}
        }
    }
}

impl DiskAccess {
    /// Prepares a copy. It has a map of all blocks: the caller checks the [size](Self::size) first, which a
    /// small image file can claim to be anything.
    ///
    /// # Errors
    /// The size of the image cannot be read, or the device is gone.
    pub fn content(&self) -> io::Result<DiskContent> {
        let (size, format, base, [allocated, own]) = self.with(|shared| {
            let image = shared.image();
            let size = image.size()?;
            let allocated = image.allocated().unwrap_or([size; 2]);
            Ok((size, image.format(), image.base(), allocated))
        })?;
        let bits = usize::try_from(size).unwrap_or(usize::MAX);
        Ok(DiskContent {
            access: self.clone(),
            size,
            format,
            allocated,
            own,
            base,
            above_base: AtomicBool::new(false),
            dirty: Arc::new(DirtyBitmap::new(bits)),
        })
    }
}

/// The content of a disk, for a copy that is made beside the guest.
pub struct DiskContent {
    access: DiskAccess,
    size: u64,
    format: ImageFormat,
    allocated: u64,
    own: u64,
    base: Option<BaseImage>,
    above_base: AtomicBool,
    dirty: Arc<DirtyBitmap>,
}

impl DiskContent {
    /// Bytes that the guest sees.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.size
    }

    /// The format of the image.
    #[must_use]
    pub fn format(&self) -> ImageFormat {
        self.format
    }

    /// The blocks to copy, in units of 4 KiB.
    #[must_use]
    pub fn dirty(&self) -> &Arc<DirtyBitmap> {
        &self.dirty
    }

    /// About how many bytes of the disk have content: what the files of the image take on the host.
    #[must_use]
    pub fn allocated(&self) -> u64 {
        self.allocated
    }

    /// The part of [`Self::allocated`] that the image's own file takes, without those below it.
    #[must_use]
    pub fn allocated_above_base(&self) -> u64 {
        self.own
    }

    /// The image right below this one.
    #[must_use]
    pub fn base(&self) -> Option<&BaseImage> {
        self.base.as_ref()
    }

    /// Leaves out of the copy what is in the base only: the new image builds on one with the same content.
    /// Called before [`Self::start`].
    pub fn leave_out_base(&self) {
        self.above_base.store(true, Ordering::Release);
    }

    /// Starts to record what the guest writes, and marks all blocks that may have content.
    ///
    /// # Errors
    /// The image cannot be read.
    pub fn start(&self) -> io::Result<()> {
        self.dirty.set_enabled(true);
        let mark = |offset: u64, len: u64| {
            let cut = |value: u64| usize::try_from(value).unwrap_or(usize::MAX);
            self.dirty.mark(cut(offset), cut(len));
        };
        // From here on, so that a reset at any moment has the next machine's disk tracked.
        self.access.track(&self.dirty, self.size);
        self.access.with(|shared| {
            // In this order: a block that is allocated behind the scan is marked by its write.
            shared.image().written.set(Arc::clone(&self.dirty));
            let image = shared.image();
            match (&image.kind, self.above_base.load(Ordering::Acquire)) {
                (Kind::Qcow2(qcow2), true) => own_extents(&qcow2.read(), self.size, mark),
                _ => extents(&image, self.size, mark),
            }
        })
    }

    /// Ends recording.
    pub fn stop(&self) {
        self.access.end_tracking(&self.dirty);
    }

    /// Reads from `offset` on, within the disk.
    ///
    /// # Errors
    /// The image cannot be read.
    pub fn read_at(&self, offset: u64, data: &mut [u8]) -> io::Result<()> {
        self.access.with(|shared| {
            let image = shared.image();
            if !image.is_direct() {
                return image.read_at(data, offset);
            }
            let mut aligned = PageBuffer::new(data.len());
            image.read_at(&mut aligned, offset)?;
            data.copy_from_slice(&aligned);
            Ok(())
        })
    }
}

impl Drop for DiskContent {
    fn drop(&mut self) {
        self.stop();
    }
}

impl Image {
    /// Bytes that all files of the image take on the host, and bytes of its own file; `None` for a block
    /// device.
    fn allocated(&self) -> Option<[u64; 2]> {
        let of = |file: &File| -> Option<u64> {
            let metadata = file.metadata().ok()?;
            let is_device = metadata.file_type().is_block_device();
            (!is_device).then(|| metadata.blocks().saturating_mul(512))
        };
        let own = of(self.file())?;
        let named: Option<Vec<u64>> = self.named_files(of).into_iter().collect();
        let all = named?.into_iter().fold(own, u64::saturating_add);
        Some([all, own])
    }
}

/// A new image of zeros, locked until [`CreatedImage::release`].
pub struct CreatedImage {
    path: PathBuf,
    /// The name that it got when a disk continued on it.
    renamed: OnceLock<PathBuf>,
    image: Image,
    /// The files below it, which must stay as they are.
    below: ImageVersion,
}

impl CreatedImage {
    /// Creates an image at a path at which there is nothing, with mode 0600.
    ///
    /// # Errors
    /// There is something at the path, the size is none of a disk, or the host refuses. Nothing is left.
    pub fn create(
        path: &Path,
        format: ImageFormat,
        size: u64,
        lock: LockMode,
    ) -> Result<Self, ImageError> {
        check_writable(path)?;
        create_file(path, format, size, None)?;
        Self::open_created(path, format, lock, None)
    }

    /// Creates a qcow2 image that has the content of its base, by the base's absolute path and format. The
    /// base is locked for reading. [`Self::sync`] fails once a file of the base has changed.
    ///
    /// # Errors
    /// As for [`Self::create`]; or the base is not usable, or is in use by one who writes.
    pub fn create_on(
        base: &BaseImage,
        path: &Path,
        size: u64,
        lock: LockMode,
    ) -> Result<Self, ImageError> {
        check_writable(path)?;
        create_file(path, ImageFormat::Qcow2, size, Some(backing(base)?))?;
        Self::open_created(path, ImageFormat::Qcow2, lock, Some(base))
    }

    fn open_created(
        path: &Path,
        format: ImageFormat,
        lock: LockMode,
        base: Option<&BaseImage>,
    ) -> Result<Self, ImageError> {
        let opened = Image::open(Opening {
            path: path.to_owned(),
            readonly: false,
            direct: false,
            format: Some(format),
            is_detected: false,
            backing_files: base.is_some(),
            data_files: false,
            directories: base.map_or_else(Vec::new, |base| base.image_dirs.clone()),
            lock,
            is_incoming: false,
        });
        let versioned = opened.and_then(|image| {
            let below = ImageVersion::below(&image).map_err(|error| failed(path, error))?;
            Ok((image, below))
        });
        match versioned {
            Ok((image, below)) => Ok(Self {
                path: path.to_owned(),
                renamed: OnceLock::new(),
                image,
                below,
            }),
            Err(error) => {
                let _ = std::fs::remove_file(path);
                Err(error)
            }
        }
    }

    /// Whether it was made on a base.
    #[must_use]
    pub fn has_base(&self) -> bool {
        !self.below.is_empty()
    }

    /// Whether it was made on a base, which is in this version.
    #[must_use]
    pub fn is_on(&self, version: &ImageVersion) -> bool {
        self.below == *version
    }

    /// The path of the image.
    #[must_use]
    pub fn path(&self) -> &Path {
        self.renamed.get().unwrap_or(&self.path)
    }

    /// Notes that its file has another name.
    pub(super) fn renamed(&self, path: &Path) {
        self.renamed.get_or_init(|| path.to_owned());
    }

    /// The format of the image.
    pub(super) fn format(&self) -> ImageFormat {
        self.image.format()
    }

    /// Writes from `offset` on, within the disk.
    ///
    /// # Errors
    /// The host cannot write.
    pub fn write_at(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        contained(|| self.image.write_at(data, offset))
    }

    /// Makes a range zeros, and gives its space back where the host can.
    ///
    /// # Errors
    /// The host cannot write.
    pub fn zero(&self, offset: u64, len: u64) -> io::Result<()> {
        match contained(|| self.image.write_zeroes(offset, len, true)) {
            // A file system that punches no holes.
            Err(error) if error.kind() == io::ErrorKind::Unsupported => {
                let len = usize::try_from(len).unwrap_or(usize::MAX);
                self.write_at(offset, &vec![0; len])
            }
            done => done,
        }
    }

    /// Makes durable all that was written.
    ///
    /// # Errors
    /// The host cannot write, or a file of the base has changed.
    pub fn sync(&self) -> io::Result<()> {
        contained(|| self.image.flush())?;
        if ImageVersion::below(&self.image)? == self.below {
            return Ok(());
        }
        let path = self.path().display();
        Err(io::Error::other(format!("the base of {path} was changed")))
    }

    /// Lets another user of the image take its lock. Nothing is written from here on.
    pub fn release(&self) {
        self.image.hand_over();
    }

    /// Takes the lock back from a user who has released it.
    ///
    /// # Errors
    /// Another user has the image, or one that it is on, by now.
    pub fn take_back(&self) -> Result<(), ImageError> {
        self.image.take_over()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const SIZE: u64 = 1 << 20;

    #[test]
    fn created_images_are_sparse_exclusive_and_locked() {
        let dir = tempfile::tempdir().unwrap();
        for (name, format) in [("raw", ImageFormat::Raw), ("qcow2", ImageFormat::Qcow2)] {
            let path = dir.path().join(name);
            let make = || CreatedImage::create(&path, format, SIZE, LockMode::ByteRange);
            let made = make().unwrap();
            assert!(make().is_err(), "the path is taken");
            assert_eq!(made.image.size().unwrap(), SIZE);
            made.write_at(4096, &[7; 4096]).unwrap();
            made.write_at(SIZE - 512, &[8; 512]).unwrap();
            made.zero(4096, 4096).unwrap();
            made.sync().unwrap();
            let again = |is_incoming| {
                Image::open(Opening {
                    format: Some(format),
                    is_incoming,
                    ..made.image.how().clone()
                })
            };
            assert!(matches!(again(false), Err(ImageError::Lock(_))));
            let device = again(true).unwrap();
            made.release();
            device.take_over().unwrap();
            let mut all = vec![1; SIZE as usize];
            device.read_at(&mut all, 0).unwrap();
            let (zeros, end) = all.split_at(all.len() - 512);
            assert!(zeros.iter().all(|byte| *byte == 0) && end == [8; 512]);
            let mode = path.metadata().unwrap().mode() & 0o777;
            assert_eq!(mode, 0o600);
            assert!(device.allocated().unwrap()[0] < SIZE);
        }
        // A link is no place for a new image, wherever it leads.
        let link = dir.path().join("link");
        std::os::unix::fs::symlink(dir.path().join("elsewhere"), &link).unwrap();
        assert!(CreatedImage::create(&link, ImageFormat::Raw, SIZE, LockMode::Full).is_err());
        assert!(!dir.path().join("elsewhere").exists());
        // One that is no disk leaves nothing.
        let odd = dir.path().join("odd");
        assert!(CreatedImage::create(&odd, ImageFormat::Raw, 513, LockMode::Full).is_err());
        assert!(!odd.exists());
    }

    #[derive(Clone, Copy, Debug)]
    enum Step {
        Write(u64, u64),
        Discard(u64, u64),
        Zero(u64, u64),
    }

    fn step() -> impl Strategy<Value = Step> {
        let sector = 0..SIZE / 512 - 64;
        (0..3, sector, 1_u64..64).prop_map(|(kind, sector, count)| {
            let (offset, len) = (sector * 512, count * 512);
            match kind {
                0 => Step::Write(offset, len),
                1 => Step::Discard(offset, len),
                _ => Step::Zero(offset, len),
            }
        })
    }

    fn opened(path: &Path, format: ImageFormat) -> Image {
        let made = CreatedImage::create(path, format, SIZE, LockMode::ByteRange).unwrap();
        made.image
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(40))]

        /// A copy of the extents and then of the dirty blocks is the disk, and each block whose content
        /// changed is dirty.
        #[test]
        fn extents_and_marks_agree_with_a_naive_model(
            is_qcow2 in any::<bool>(),
            before in prop::collection::vec(step(), 0..12),
            after in prop::collection::vec(step(), 0..12),
        ) {
            let dir = tempfile::tempdir().unwrap();
            let format = if is_qcow2 { ImageFormat::Qcow2 } else { ImageFormat::Raw };
            let image = opened(&dir.path().join("disk"), format);
            let read = || {
                let mut all = vec![0; SIZE as usize];
                image.read_at(&mut all, 0).unwrap();
                all
            };
            let act = |step: &Step, byte: u8| match *step {
                Step::Write(offset, len) => image.write_at(&vec![byte; len as usize], offset),
                Step::Discard(offset, len) => image.discard(offset, len),
                Step::Zero(offset, len) => image.write_zeroes(offset, len, false),
            };
            for step in &before {
                act(step, 1).unwrap();
            }
            let mut mapped = vec![false; (SIZE / 512) as usize];
            extents(&image, SIZE, |offset, len| {
                let range = (offset / 512) as usize..((offset + len) / 512) as usize;
                mapped[range].fill(true);
            })
            .unwrap();
            let then = read();
            for (sector, is_mapped) in then.chunks(512).zip(&mapped) {
                prop_assert!(*is_mapped || sector.iter().all(|byte| *byte == 0));
            }
            let bitmap = Arc::new(DirtyBitmap::new(SIZE as usize));
            bitmap.set_enabled(true);
            image.written.set(Arc::clone(&bitmap));
            for step in &after {
                act(step, 2).unwrap();
            }
            let mut copy = then;
            let now = read();
            for (first, pages) in bitmap.take().runs() {
                let range = first * 4096..(first + pages) * 4096;
                copy[range.clone()].copy_from_slice(&now[range]);
            }
            prop_assert!(copy == now);
        }
    }
}
