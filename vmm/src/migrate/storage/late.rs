//! Disks of which blocks come after the guest, and the writing of blocks that come.

use std::io;
use std::path::Path;
use std::sync::{Arc, OnceLock};

use memory::AwaitedBlocks;
use migration::NewImage;
use virtio_devices::block::{CreatedImage, DiskAccess, IncompleteMark};

/// A disk of which blocks come after the guest.
pub(super) struct LateDisk {
    pub(super) mark: IncompleteMark,
    pub(super) device: DiskAccess,
}

impl LateDisk {
    /// Has the disk of the machine wait for the blocks, and marks its image.
    pub(super) fn new(
        image: &Path,
        blocks: Arc<AwaitedBlocks>,
        device: DiskAccess,
    ) -> io::Result<Self> {
        device.await_blocks(blocks)?;
        let mark = IncompleteMark::create(image)?;
        Ok(Self { mark, device })
    }
}

/// Writes blocks that come into the image of a disk.
pub(super) struct Writer {
    image: Arc<CreatedImage>,
    /// The machine's disk, once blocks are written beside the guest.
    device: Arc<OnceLock<DiskAccess>>,
}

impl Writer {
    pub(super) fn new(image: &Arc<CreatedImage>, device: &Arc<OnceLock<DiskAccess>>) -> Self {
        Self {
            image: Arc::clone(image),
            device: Arc::clone(device),
        }
    }

    /// Adds the path of the image to an error: its storage may be full.
    fn named(&self, error: &io::Error) -> io::Error {
        io::Error::new(
            error.kind(),
            format!("{}: {error}", self.image.path().display()),
        )
    }
}

impl NewImage for Writer {
    fn has_base(&self) -> bool {
        self.image.has_base()
    }

    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        let written = match self.device.get() {
            Some(device) => device.write_arrived(offset, data),
            None => self.image.write_at(offset, data),
        };
        written.map_err(|error| self.named(&error))
    }

    fn zero(&self, offset: u64, len: u64) -> io::Result<()> {
        let zeroed = match self.device.get() {
            Some(device) => device.zero_arrived(offset, len),
            None => self.image.zero(offset, len),
        };
        zeroed.map_err(|error| self.named(&error))
    }

    fn sync(&self) -> io::Result<()> {
        let synced = match self.device.get() {
            Some(device) => device.pre_sync(),
            None => self.image.sync(),
        };
        synced.map_err(|error| self.named(&error))
    }
}

#[cfg(test)]
mod tests {
    use virtio_devices::block::{ImageFormat, LockMode};

    use super::*;

    #[test]
    fn errors_name_the_image() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("image");
        let (format, lock) = (ImageFormat::Qcow2, LockMode::ByteRange);
        let image = CreatedImage::create(&path, format, 1 << 20, lock).unwrap();
        let writer = Writer::new(&Arc::new(image), &Arc::default());
        writer.write(0, &[1; 4096]).unwrap();
        let error = writer.write(1 << 40, &[1; 4096]).unwrap_err();
        assert!(
            error.to_string().starts_with(&path.display().to_string()),
            "{error}"
        );
        // By its kind, full storage has a code of its own.
        let full = writer.named(&io::ErrorKind::StorageFull.into());
        assert_eq!(full.kind(), io::ErrorKind::StorageFull);
    }
}
