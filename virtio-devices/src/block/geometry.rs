//! The blocks in which the host's storage is read and written.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileTypeExt;

use rustix::fs::{AtFlags, StatxFlags, ioctl_blkpbszget, ioctl_blksszget, statx};

use super::image::SECTOR;

/// Physical blocks of most disks, and the largest logical ones that every guest takes.
pub(super) const USUAL: u64 = 4096;

/// Sizes in bytes, powers of two.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Geometry {
    /// The smallest transfer.
    pub(super) logical: u64,
    /// The smallest one that the disk does not have to complete by reading.
    pub(super) physical: u64,
    /// Required alignment of buffers in direct I/O.
    pub(super) align: u64,
}

impl Geometry {
    /// The geometry of an image without restrictions, or without information from the host.
    pub(super) const ANY: Self = Self {
        logical: SECTOR,
        physical: USUAL,
        align: USUAL,
    };

    /// Returns the host's restrictions on direct I/O with a file or block device.
    ///
    /// # Errors
    /// The block size is one that guests do not support.
    pub(super) fn of(file: &File) -> io::Result<Self> {
        let asked = StatxFlags::DIOALIGN;
        let told = statx(file, c"", AtFlags::EMPTY_PATH, asked).ok();
        // A kernel before 6.1, or a file system that does not say, tells nothing.
        let told = told.filter(|told| told.stx_mask & asked.bits() != 0);
        let align = told.map_or(0, |told| told.stx_dio_mem_align.into());
        if file.metadata()?.file_type().is_block_device() {
            let (logical, physical) = (ioctl_blksszget(file)?, ioctl_blkpbszget(file)?);
            return Self::new(logical.into(), physical.into(), align);
        }
        let logical = told.map_or(0, |told| told.stx_dio_offset_align.into());
        Self::new(logical, USUAL, align)
    }

    fn new(logical: u64, physical: u64, align: u64) -> io::Result<Self> {
        let logical = logical.max(SECTOR);
        if !logical.is_power_of_two() || logical > USUAL {
            let why =
                format!("has a logical block size of {logical} bytes, which guests do not support");
            return Err(io::Error::new(io::ErrorKind::Unsupported, why));
        }
        let known = |size: u64| size.is_power_of_two().then_some(size);
        Ok(Self {
            logical,
            physical: known(physical).unwrap_or(USUAL).max(logical),
            align: known(align).unwrap_or(USUAL).max(logical),
        })
    }

    /// How many logical blocks a physical one has, as a power of two.
    pub(super) fn exponent(self) -> u8 {
        let exponent = (self.physical / self.logical).checked_ilog2();
        u8::try_from(exponent.unwrap_or(0)).unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn host_limits_fit_guest() {
        for (logical, physical, align, expected) in [
            (512, 512, 4, Some((512, 0, 512))),
            (512, 4096, 512, Some((512, 3, 512))),
            (4096, 4096, 512, Some((4096, 0, 4096))),
            (4096, 512, 4096, Some((4096, 0, 4096))),
            (512, 3000, 0, Some((512, 3, 4096))),
            (1, 1 << 16, 1, Some((512, 7, 512))),
            // It says nothing.
            (0, USUAL, 0, Some((512, 3, 4096))),
            (3000, 4096, 512, None),
            (1 << 16, 1 << 16, 512, None),
        ] {
            let made = Geometry::new(logical, physical, align);
            let made = made.map(|made| (made.logical, made.exponent(), made.align));
            assert_eq!(made.ok(), expected, "{logical}, {physical}, {align}");
        }
    }
}
