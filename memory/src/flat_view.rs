//! The flat view: the tree as the guest sees it, sorted by address.

use std::fmt;
use std::io;
use std::sync::Arc;

use vmm_sys_util::eventfd::EventFd;

use crate::guest_memory::RamRange;
use crate::range::AddrRange;
use crate::region::{DeviceOps, RamSlice, RegionId};
use crate::render::Rendered;

/// The target of a flat range. Slices and offsets belong to the range's first address.
#[derive(Clone)]
pub enum Target {
    /// RAM, from here on.
    Ram(RamSlice),
    /// Memory that the guest reads and cannot write, from here on.
    Rom(RamSlice),
    /// A device.
    Device(Arc<dyn DeviceOps>),
}

impl fmt::Debug for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Ram(slice) => write!(f, "Ram({slice:?})"),
            Self::Rom(slice) => write!(f, "Rom({slice:?})"),
            Self::Device(_) => f.write_str("Device"),
        }
    }
}

/// Addresses that one region answers without a gap.
#[derive(Clone, Debug)]
pub struct FlatRange {
    /// The addresses.
    pub range: AddrRange,
    /// The region that answers.
    pub region: RegionId,
    /// The offset in the region that is at the range's first address.
    pub offset: u64,
    /// The target of accesses.
    pub target: Target,
}

impl FlatRange {
    /// Returns whether `next` shows the same region and starts where this one ends, in addresses and
    /// offsets.
    pub(crate) fn is_continued_by(&self, next: &Self) -> bool {
        self.region == next.region
            && self.range.is_followed_by(next.range)
            && next.offset.checked_sub(self.offset) == self.range.len()
    }
}

/// Equal when the guest could not tell them apart: the same addresses of the same region, with
/// the same offset into it.
impl PartialEq for FlatRange {
    fn eq(&self, other: &Self) -> bool {
        let same_memory = match (&self.target, &other.target) {
            (Target::Ram(a), Target::Ram(b)) | (Target::Rom(a), Target::Rom(b)) => a == b,
            (Target::Device(a), Target::Device(b)) => Arc::ptr_eq(a, b),
            _ => false,
        };
        same_memory
            && (self.range, self.region, self.offset) == (other.range, other.region, other.offset)
    }
}

/// A doorbell at its place in the address space.
#[derive(Clone)]
pub struct FlatIoEventFd {
    /// The address.
    pub addr: u64,
    /// Bytes that the write has: 1, 2, 4 or 8, or 0 for any.
    pub width: u8,
    /// The value that the write must have; any value if absent.
    pub datamatch: Option<u64>,
    /// The descriptor that is signalled.
    pub fd: Arc<EventFd>,
}

impl FlatIoEventFd {
    pub(crate) fn key(&self) -> (u64, u8, Option<u64>, usize) {
        // The descriptor is part of the key: if only it changes, the listener must still register
        // the doorbell again. Its pointer is unique, for both views that are compared own their
        // descriptors.
        (
            self.addr,
            self.width,
            self.datamatch,
            Arc::as_ptr(&self.fd).addr(),
        )
    }
}

impl PartialEq for FlatIoEventFd {
    fn eq(&self, other: &Self) -> bool {
        self.key() == other.key()
    }
}

impl fmt::Debug for FlatIoEventFd {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "FlatIoEventFd({:#x}/{} {:?})",
            self.addr, self.width, self.datamatch
        )
    }
}

/// An address space at one moment: what was published by one commit. It never changes, and the
/// RAM that it shows stays mapped as long as it lives.
///
/// It is also what rust-vmm crates take as guest memory: see [`vm_memory::GuestMemoryBackend`],
/// through which only RAM is seen.
#[derive(Debug)]
pub struct FlatView {
    generation: u64,
    /// First addresses of `ranges`, apart from them so that a lookup touches few cache lines.
    firsts: Box<[u64]>,
    ranges: Box<[FlatRange]>,
    ioeventfds: Box<[FlatIoEventFd]>,
    /// First and last addresses of `ram`, apart from it as `firsts` are.
    ram_firsts: Box<[u64]>,
    ram_lasts: Box<[u64]>,
    ram: Box<[RamRange]>,
}

impl FlatView {
    pub(crate) fn empty() -> Self {
        Self::new(
            0,
            Rendered {
                ranges: Vec::new(),
                ioeventfds: Vec::new(),
            },
        )
    }

    pub(crate) fn new(generation: u64, rendered: Rendered) -> Self {
        let ranges = rendered.ranges.into_boxed_slice();
        let ram: Box<[_]> = ranges.iter().filter_map(RamRange::of).collect();
        Self {
            generation,
            firsts: ranges.iter().map(|flat| flat.range.first()).collect(),
            ram_firsts: ram.iter().map(RamRange::first).collect(),
            ram_lasts: ram.iter().map(RamRange::last).collect(),
            ranges,
            ioeventfds: rendered.ioeventfds.into_boxed_slice(),
            ram,
        }
    }

    /// Counts the commits that changed this address space.
    #[inline]
    #[must_use]
    pub fn generation(&self) -> u64 {
        self.generation
    }

    /// All ranges, ascending; addresses between them are unassigned.
    #[must_use]
    pub fn ranges(&self) -> &[FlatRange] {
        &self.ranges
    }

    /// All doorbells that show, ascending.
    #[must_use]
    pub fn ioeventfds(&self) -> &[FlatIoEventFd] {
        &self.ioeventfds
    }

    /// The range that holds `addr`, or `None` where it is unassigned.
    #[must_use]
    pub fn find(&self, addr: u64) -> Option<&FlatRange> {
        let range = self.ranges.get(last_not_above(&self.firsts, addr)?)?;
        (addr <= range.range.last()).then_some(range)
    }

    /// Gives the whole pages of RAM among `len` bytes from `addr` on back to the host, as
    /// [`RamBlock::discard`](crate::RamBlock::discard) does. What is not RAM is left alone.
    ///
    /// # Errors
    /// Fails if the host refuses.
    pub fn discard(&self, addr: u64, len: u64) -> io::Result<u64> {
        let Some(wanted) = AddrRange::new(addr, len) else {
            return Ok(0);
        };
        let mut freed = 0;
        // Each range rounds inwards to whole pages of its own block. A page that only partly
        // belongs to a range stays, because its other part may be in use.
        for ram in self.ram.iter().filter(|ram| ram.first() <= wanted.last()) {
            if let Some(part) = ram.range().intersection(wanted) {
                freed += ram.discard(part)?;
            }
        }
        Ok(freed)
    }

    pub(crate) fn index_after(&self, addr: u64) -> usize {
        last_not_above(&self.firsts, addr).map_or(0, |index| index + 1)
    }

    pub(crate) fn ram(&self) -> &[RamRange] {
        &self.ram
    }

    #[inline]
    pub(crate) fn find_ram(&self, addr: u64) -> Option<&RamRange> {
        let index = last_not_above(&self.ram_firsts, addr)?;
        match self.ram_lasts.get(index) {
            Some(last) if addr <= *last => self.ram.get(index),
            _ => None,
        }
    }
}

/// The index of the last of `firsts`, which ascend, that is not above `addr`.
#[inline]
fn last_not_above(firsts: &[u64], addr: u64) -> Option<usize> {
    firsts
        .partition_point(|first| *first <= addr)
        .checked_sub(1)
}
