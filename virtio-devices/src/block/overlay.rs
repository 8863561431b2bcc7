//! Overlays: empty qcow2 images on top of an image that nothing writes any more.
//!
//! ```text
//!   create      the overlay exists, is empty and durable             the disk is what it was
//!   open        the machine is paused; the image is flushed and      the disk is what it was
//!               opened a second time, below the overlay
//!   switch      the overlay is the disk; the image is frozen: read-only, and locked so
//!   switch_back only while nothing was written to the overlay
//! ```

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use devices::host_file::lock::{self, Lockable};
use devices::host_file::{FileKind, LockError, LockMode, OpenError, Request};

use super::create::{Backing, create_file};
use super::format::ImageFormat;
use super::image::{Image, ImageError, contained};
use super::{BlockHandle, Shared};

/// An image below overlays, as it is known to its user.
#[derive(Clone, Debug)]
pub struct BaseImage {
    /// Its path. An overlay beside it needs a file, not a block device.
    pub path: PathBuf,
    /// Its format.
    pub format: ImageFormat,
    /// Allow it to build on other images.
    pub backing_files: bool,
    /// Directories below which it may name files, besides its own.
    pub image_dirs: Vec<PathBuf>,
    /// The locked part of it.
    pub lock: LockMode,
}

impl BaseImage {
    /// Creates an overlay of this image, which no one may be writing, at a path in its directory.
    ///
    /// # Errors
    /// The image is not usable, or is in use by one who writes. There is a file of that name, or the host
    /// cannot create one. Nothing is left.
    pub fn create_overlay(&self, overlay: &Path) -> Result<NeededOverlay, ImageError> {
        let base = Image::open(self.opening())?;
        let size = base.size().map_err(|error| failed(&self.path, error))?;
        create(&self.path, self.format, size, overlay)?;
        NeededOverlay::mark(overlay, self.lock)
    }
}

/// Keeps an overlay that was made from being removed as [unused](super::find_overlays), until its machine has
/// opened it.
#[derive(Debug)]
pub struct NeededOverlay {
    _mark: Option<Lockable>,
}

impl NeededOverlay {
    fn mark(overlay: &Path, mode: LockMode) -> Result<Self, ImageError> {
        // A lock of the whole file would find the mark in its way. Such an overlay may be removed in the
        // moment before it is opened: the operation fails then, and nothing is lost.
        if mode == LockMode::Full {
            return Ok(Self { _mark: None });
        }
        let marked = File::open(overlay).and_then(lock::mark_needed);
        let marked = marked.map_err(|error| failed(overlay, error))?;
        Ok(Self {
            _mark: Some(marked),
        })
    }
}

pub(super) fn failed(path: &Path, source: io::Error) -> ImageError {
    let path = path.to_owned();
    OpenError::Host { path, source }.into()
}

/// Creates an empty overlay.
fn create(base: &Path, format: ImageFormat, size: u64, overlay: &Path) -> Result<(), ImageError> {
    let name = backing_name(base, overlay)?;
    let backing = Backing { name, format };
    create_file(overlay, ImageFormat::Qcow2, size, Some(backing))
}

/// Names the base of an image in another directory.
pub(super) fn backing(base: &BaseImage) -> Result<Backing, ImageError> {
    let odd = |why: &str| ImageError::Format {
        path: base.path.clone(),
        why: why.to_owned(),
    };
    if !base.path.is_absolute() {
        return Err(odd("is not an absolute path"));
    }
    let name = base.path.to_str();
    let name = name.ok_or_else(|| odd("has no name in UTF-8, which a qcow2 overlay needs"))?;
    Ok(Backing {
        name: name.to_owned(),
        format: base.format,
    })
}

/// Returns the name of the base in the overlay: relative, so that both can be moved together.
fn backing_name(base: &Path, overlay: &Path) -> Result<String, ImageError> {
    let odd = |why: &str| ImageError::Format {
        path: base.to_owned(),
        why: why.to_owned(),
    };
    if base.parent() != overlay.parent() {
        return Err(odd("has its overlay in another directory"));
    }
    let name = base.file_name().and_then(|name| name.to_str());
    let name = name.ok_or_else(|| odd("has no name in UTF-8, which a qcow2 overlay needs"))?;
    // Without the prefix QEMU would take a name such as `nbd:x` for that of a protocol.
    Ok(format!("./{name}"))
}

/// An overlay to create for a disk.
#[derive(Clone, Debug)]
pub struct PlannedOverlay {
    /// Its path.
    pub path: PathBuf,
    base: PathBuf,
    /// The image right below that.
    below: Option<BaseImage>,
    format: ImageFormat,
    size: u64,
    lock: LockMode,
}

impl PlannedOverlay {
    /// Creates the overlay, which is empty. The disk stays as it is.
    ///
    /// # Errors
    /// There is a file of that name, or the host cannot create one. Nothing is left.
    pub fn create(&self) -> Result<NeededOverlay, ImageError> {
        create(&self.base, self.format, self.size, &self.path)?;
        NeededOverlay::mark(&self.path, self.lock)
    }

    /// Returns the real paths of the images that must not change below the overlay: the one that the disk has
    /// now, and those below it in the same folder.
    #[must_use]
    pub fn frozen_images(&self) -> Vec<PathBuf> {
        let below = self.below.iter().flat_map(BaseImage::in_folder);
        let below = below.filter(|path| path.parent() == self.base.parent());
        std::iter::once(self.base.clone()).chain(below).collect()
    }
}

/// An overlay that was opened on top of a disk's image, and can take its place. As a [`BlockHandle`], it
/// must not outlive the machine.
pub struct Overlay {
    shared: Arc<Shared>,
    base: Arc<Image>,
    overlay: Image,
}

impl BlockHandle {
    /// Returns the overlay of the disk's image with this end of its name, beside the image.
    ///
    /// # Errors
    /// The image is a block device, or its size cannot be read.
    pub fn plan_overlay(&self, suffix: &str) -> Result<PlannedOverlay, ImageError> {
        let image = self.shared.image();
        let (base, path) = beside(image.path(), suffix)?;
        let size = image.size().map_err(|error| failed(&base, error))?;
        Ok(PlannedOverlay {
            path,
            base,
            below: image.base(),
            format: image.format(),
            size,
            lock: image.lock_mode(),
        })
    }

    /// Makes durable what the guest wrote, and opens an overlay that was made for the disk. The machine is
    /// paused. The disk stays as it is until [`Overlay::switch`].
    ///
    /// # Errors
    /// The image cannot be flushed, or the overlay cannot be opened or locked.
    pub fn open_overlay(&self, overlay: &Path) -> Result<Overlay, ImageError> {
        let base = self.shared.image();
        // The overlay reads the image's tables from the file.
        contained(|| base.flush()).map_err(|error| failed(base.path(), error))?;
        let overlay = base.open_overlay(overlay)?;
        Ok(Overlay {
            shared: Arc::clone(&self.shared),
            base,
            overlay,
        })
    }

    /// Returns the disk to its image. The machine is paused, and the guest has not run since
    /// [`Overlay::switch`].
    ///
    /// # Errors
    /// Another user reads the image by now. The disk stays on the overlay.
    pub fn switch_back(&self) -> Result<(), LockError> {
        let mut base = self.shared.base.lock();
        if let Some(image) = &*base {
            image.lock_again()?;
            self.shared.set_image(Arc::clone(image));
        }
        *base = None;
        Ok(())
    }

    /// Ends the possibility to [switch back](BlockHandle::switch_back).
    pub fn keep_overlay(&self) {
        *self.shared.base.lock() = None;
    }
}

impl Overlay {
    /// Has the disk continue on the overlay. The machine is paused.
    ///
    /// # Errors
    /// The host cannot lock the image as one that is only read. The disk stays as it is.
    pub fn switch(self) -> Result<(), ImageError> {
        self.overlay.inherit_locks(&self.base)?;
        *self.shared.base.lock() = Some(self.base);
        self.shared.set_image(Arc::new(self.overlay));
        Ok(())
    }
}

/// Returns the real path of an image, and that of an overlay beside it. An overlay of an overlay is named
/// after the first image: the end of its name is replaced.
///
/// # Errors
/// The image is no file, or has no name that can be extended.
pub fn beside(base: &Path, suffix: &str) -> Result<(PathBuf, PathBuf), ImageError> {
    let real = base.canonicalize().map_err(|error| failed(base, error))?;
    // Without waiting, as any path of a configuration is opened; a block device has no directory of images.
    Request::read(&real, &[FileKind::Regular]).open()?;
    let name = real.file_name().and_then(|name| name.to_str());
    let name = name.ok_or_else(|| ImageError::Format {
        path: real.clone(),
        why: "has no name in UTF-8, which a qcow2 overlay needs".to_owned(),
    })?;
    let (stem, _) = name.split_once(OVERLAY_MARK).unwrap_or((name, ""));
    let overlay = real.with_file_name(format!("{stem}{OVERLAY_MARK}{suffix}.qcow2"));
    Ok((real, overlay))
}

/// Begins the end of an overlay's name.
pub(super) const OVERLAY_MARK: &str = ".overlay-";

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::unix::fs::FileExt as _;

    use super::super::image::Opening;
    use super::*;

    #[test]
    fn overlays_of_overlays_are_named_after_the_first_image() {
        let dir = tempfile::tempdir().unwrap();
        let dir = dir.path().canonicalize().unwrap();
        let base = dir.join("web.raw");
        File::create(&base).unwrap();
        let (real, one) = beside(&base, "1").unwrap();
        assert_eq!((&real, &one), (&base, &dir.join("web.raw.overlay-1.qcow2")));
        File::create(&one).unwrap();
        let (_, two) = beside(&one, "2").unwrap();
        assert_eq!(two, dir.join("web.raw.overlay-2.qcow2"));
        // Beside the file, not beside a link to it.
        let other = tempfile::tempdir().unwrap();
        let link = other.path().join("link");
        std::os::unix::fs::symlink(&base, &link).unwrap();
        assert_eq!(beside(&link, "1").unwrap().1, one);
        assert!(beside(Path::new("/dev/null"), "1").is_err());
    }

    #[test]
    fn overlay_shows_its_base_and_keeps_it() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().canonicalize().unwrap().join("base");
        let file = File::create(&path).unwrap();
        file.set_len(3 << 20).unwrap();
        file.write_all_at(&[7; 512], 1 << 20).unwrap();
        let base = BaseImage {
            path: path.clone(),
            format: ImageFormat::Raw,
            backing_files: false,
            image_dirs: Vec::new(),
            lock: LockMode::ByteRange,
        };
        let (_, overlay) = beside(&path, "x").unwrap();
        base.create_overlay(&overlay).unwrap();
        // Nothing that exists is replaced.
        assert!(base.create_overlay(&overlay).is_err());
        assert!(overlay.exists());
        let opening = Opening {
            path: overlay,
            readonly: false,
            direct: false,
            format: Some(ImageFormat::Qcow2),
            is_detected: false,
            backing_files: true,
            data_files: false,
            directories: Vec::new(),
            lock: LockMode::ByteRange,
            is_incoming: false,
        };
        let image = Image::open(opening).unwrap();
        assert_eq!(image.size().unwrap(), 3 << 20);
        let mut sector = [0; 512];
        image.read_at(&mut sector, 1 << 20).unwrap();
        assert_eq!(sector, [7; 512]);
        image.write_at(&[9; 512], 1 << 20).unwrap();
        image.flush().unwrap();
        image.read_at(&mut sector, 1 << 20).unwrap();
        assert_eq!(sector, [9; 512]);
        file.sync_all().unwrap();
        File::open(&path)
            .unwrap()
            .read_exact_at(&mut sector, 1 << 20)
            .unwrap();
        assert_eq!(sector, [7; 512]);
        // A second one of the same base, while the first is in use.
        let (_, second) = beside(&path, "y").unwrap();
        base.create_overlay(&second).unwrap();
    }
}
