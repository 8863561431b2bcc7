//! Flat views as rust-vmm's guest memory, so that its crates work on them as they are.

use std::sync::Arc;

use vm_memory::bitmap::{Bitmap, BitmapSlice, WithBitmapSlice};
use vm_memory::guest_memory::{Error as GuestMemoryError, Result as GuestMemoryResult};
use vm_memory::{
    GuestAddress, GuestMemoryBackend, GuestMemoryRegion, GuestMemoryRegionBytes, GuestUsize,
    MemoryRegionAddress, VolatileSlice,
};

use crate::dirty::DirtyBitmap;
use crate::flat_view::{FlatRange, FlatView, Target};
use crate::ram::{Pages, RamBlock};
use crate::range::AddrRange;
use crate::region::RamSlice;
use crate::window::WindowError;

/// The part of a block's dirty bitmap that belongs to a slice of it: what a write to the slice
/// marks.
#[derive(Clone, Copy, Debug)]
pub struct DirtySlice<'a> {
    bitmap: &'a DirtyBitmap,
    base: usize,
}

impl<'a> WithBitmapSlice<'a> for DirtySlice<'_> {
    type S = Self;
}

impl BitmapSlice for DirtySlice<'_> {}

impl Bitmap for DirtySlice<'_> {
    fn mark_dirty(&self, offset: usize, len: usize) {
        self.bitmap.mark(self.base.saturating_add(offset), len);
    }

    fn dirty_at(&self, offset: usize) -> bool {
        self.bitmap.is_dirty(self.base.saturating_add(offset))
    }

    fn slice_at(&self, offset: usize) -> Self {
        Self {
            bitmap: self.bitmap,
            base: self.base.saturating_add(offset),
        }
    }
}

impl<'a> WithBitmapSlice<'a> for DirtyBitmap {
    type S = DirtySlice<'a>;
}

impl Bitmap for DirtyBitmap {
    fn mark_dirty(&self, offset: usize, len: usize) {
        self.mark(offset, len);
    }

    fn dirty_at(&self, offset: usize) -> bool {
        self.is_dirty(offset)
    }

    fn slice_at(&self, offset: usize) -> DirtySlice<'_> {
        DirtySlice {
            bitmap: self,
            base: offset,
        }
    }
}

impl RamBlock {
    /// `len` bytes from `offset` on, for volatile access that marks what it writes; `None` where
    /// they are not all within the block.
    #[must_use]
    pub fn slice(&self, offset: usize, len: usize) -> Option<VolatileSlice<'_, DirtySlice<'_>>> {
        if offset.checked_add(len)? > self.len() {
            return None;
        }
        let bitmap = self.dirty().slice_at(offset);
        // SAFETY: within the mapping, as just checked, and the mapping lives as long as the
        // borrow of the block.
        Some(unsafe { VolatileSlice::with_bitmap(self.host_addr().add(offset), len, bitmap, None) })
    }
}

impl RamSlice {
    /// `len` bytes from `from_start` bytes behind the slice's start on, if the block has them.
    pub(crate) fn window(
        &self,
        from_start: u64,
        len: usize,
    ) -> Option<VolatileSlice<'_, DirtySlice<'_>>> {
        let offset = usize::try_from(self.offset.checked_add(from_start)?).ok()?;
        self.block.slice(offset, len)
    }
}

/// A flat range of RAM, as a region of [`vm_memory`].
#[derive(Debug)]
pub struct RamRange {
    range: AddrRange,
    slice: RamSlice,
}

impl RamRange {
    pub(crate) fn of(flat: &FlatRange) -> Option<Self> {
        match &flat.target {
            Target::Ram(slice) => Some(Self {
                range: flat.range,
                slice: slice.clone(),
            }),
            Target::Rom(_) | Target::Device(_) => None,
        }
    }

    pub(crate) fn range(&self) -> AddrRange {
        self.range
    }

    /// Gives the whole pages of a part of it back to the host.
    pub(crate) fn discard(&self, part: AddrRange) -> std::io::Result<u64> {
        let from_start = part.first() - self.range.first();
        let offset = usize::try_from(self.slice.offset.saturating_add(from_start));
        let len = part.len().and_then(|len| usize::try_from(len).ok());
        match (offset, len) {
            (Ok(offset), Some(len)) => self.slice.block.discard(offset, len),
            _ => Ok(0),
        }
    }

    /// Whether the pages of the block behind it are there.
    #[must_use]
    pub fn pages(&self) -> Pages {
        self.slice.block.pages()
    }

    /// Whether the address is in it.
    #[must_use]
    pub fn contains(&self, addr: u64) -> bool {
        self.first() <= addr && addr <= self.last()
    }

    pub(crate) fn first(&self) -> u64 {
        self.range.first()
    }

    pub(crate) fn last(&self) -> u64 {
        self.range.last()
    }
}

impl GuestMemoryRegion for RamRange {
    type B = DirtyBitmap;

    fn len(&self) -> GuestUsize {
        // A range of RAM is within a block, whose length a `usize` holds.
        self.range.len().unwrap_or(GuestUsize::MAX)
    }

    fn start_addr(&self) -> GuestAddress {
        GuestAddress(self.first())
    }

    fn bitmap(&self) -> DirtySlice<'_> {
        self.slice
            .block
            .dirty()
            .slice_at(usize::try_from(self.slice.offset).unwrap_or(usize::MAX))
    }

    fn get_host_address(&self, addr: MemoryRegionAddress) -> GuestMemoryResult<*mut u8> {
        self.get_slice(addr, 1)
            .map(|slice| slice.ptr_guard_mut().as_ptr())
    }

    fn get_slice(
        &self,
        offset: MemoryRegionAddress,
        count: usize,
    ) -> GuestMemoryResult<VolatileSlice<'_, DirtySlice<'_>>> {
        // Check against the range as well: the block may continue behind it with bytes that the
        // guest does not see at these addresses.
        let end = offset
            .0
            .checked_add(count as u64)
            .filter(|end| *end <= self.len());
        end.and_then(|_| self.slice.window(offset.0, count))
            .ok_or(GuestMemoryError::InvalidBackendAddress)
    }
}

impl GuestMemoryRegionBytes for RamRange {}

impl FlatView {
    /// `range` alone, which must be within one range of RAM.
    pub(crate) fn one_ram(&self, range: AddrRange) -> Result<RamRange, WindowError> {
        let refused = WindowError::NotRam(range);
        let whole = self
            .find_ram(range.first())
            .filter(|ram| range.last() <= ram.last());
        let whole = whole.ok_or(refused)?;
        let offset = range.first() - whole.first();
        let offset = whole.slice.offset.checked_add(offset).ok_or(refused)?;
        Ok(RamRange {
            range,
            slice: RamSlice {
                block: Arc::clone(&whole.slice.block),
                offset,
            },
        })
    }
}

/// Only RAM: what devices may read and write by DMA.
impl GuestMemoryBackend for FlatView {
    type R = RamRange;

    fn num_regions(&self) -> usize {
        self.ram().len()
    }

    #[inline]
    fn find_region(&self, addr: GuestAddress) -> Option<&RamRange> {
        self.find_ram(addr.0)
    }

    fn iter(&self) -> impl Iterator<Item = &RamRange> {
        self.ram().iter()
    }
}
