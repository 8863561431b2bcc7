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
}

impl NewImage for Writer {
    fn has_base(&self) -> bool {
        self.image.has_base()
    }

    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        match self.device.get() {
            Some(device) => device.write_arrived(offset, data),
            None => self.image.write_at(offset, data),
        }
    }

    fn zero(&self, offset: u64, len: u64) -> io::Result<()> {
        match self.device.get() {
            Some(device) => device.zero_arrived(offset, len),
            None => self.image.zero(offset, len),
        }
    }

    fn sync(&self) -> io::Result<()> {
        match self.device.get() {
            Some(device) => device.pre_sync(),
            None => self.image.sync(),
        }
    }
}
