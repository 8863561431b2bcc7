//! Base address registers (PCI Local Bus 3.0, 6.2.5.1), and where BARs can be.

use memory::{AddrRange, RegionId, SpaceKind, TopologyError, Transaction};

use super::registers::{BARS, COMMAND, COMMAND_MEMORY, Registers};

/// Behind RAM and the platform: a BAR that the guest moves in front of them stays hidden.
const PRIORITY: i32 = -1;
/// Bits 0 to 3 of a memory BAR: 64-bit addresses.
const MEMORY_64: u32 = 0b0100;
/// Bits 0 to 3 of a memory BAR: reads have no side effects.
const PREFETCHABLE: u32 = 0b1000;
const FLAGS: u64 = 0xf;

/// Moves the regions of BARs about in the guest's memory.
///
/// Called by the vCPU thread whose access moved the BAR, which holds the lock of that function's
/// registers and none other.
pub trait BarMap: Send + Sync {
    /// Maps the region at this guest address, or unmaps it. A region that cannot be mapped there is
    /// unmapped: a guest that asks for an impossible address harms only itself.
    fn place(&self, region: RegionId, at: Option<u64>);
}

/// Shows a BAR's region at a guest address, or nowhere, as part of a change of the map.
///
/// # Errors
/// Fails if there is no such region, or it reaches past the last address.
pub fn place_bar(
    tx: &mut Transaction<'_>,
    region: RegionId,
    at: Option<u64>,
) -> Result<(), TopologyError> {
    match tx.unplace(region) {
        // The region was hidden before: its BAR had no address, or decoding was off.
        Ok(()) | Err(TopologyError::NotPlaced(_)) => {}
        Err(error) => return Err(error),
    }
    match at {
        Some(at) => tx.map(SpaceKind::Memory, at, region, PRIORITY),
        None => Ok(()),
    }
}

/// A BAR that is wanted.
#[derive(Clone, Copy, Debug)]
pub struct BarRequest {
    /// Which of the six registers; a 64-bit one takes the next, too.
    pub index: u8,
    /// The region that the BAR maps.
    pub region: RegionId,
    /// Bytes: a power of two, at least 16.
    pub size: u64,
    /// The address after a reset.
    pub address: u64,
    /// Whether it can be above 4 GiB.
    pub wide: bool,
    /// Whether reads of it have no side effects.
    pub prefetchable: bool,
}

/// A BAR cannot be made.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BarError {
    /// There is no such register, or another BAR uses it.
    #[error("no register is free for BAR {0}")]
    Register(u8),
    /// The size is not one that a BAR can have.
    #[error(
        "the size of a BAR ({0} bytes) must be a power of two from 16 bytes to 2 GiB, or more if \
         it is 64-bit"
    )]
    Size(u64),
    /// No room in the window.
    #[error("the PCI window has no room for {0} bytes")]
    Full(u64),
}

/// One BAR.
#[derive(Clone, Copy, Debug)]
pub(super) struct Bar {
    index: u8,
    pub(super) region: RegionId,
    size: u64,
    wide: bool,
    /// The address at which the region is mapped.
    pub(super) shown: Option<u64>,
}

impl Bar {
    /// Sets the registers up so that a guest can size and move the BAR.
    pub(super) fn new(
        registers: &mut Registers,
        request: &BarRequest,
        others: &[Self],
    ) -> Result<Self, BarError> {
        let &BarRequest { index, size, .. } = request;
        if !size.is_power_of_two() || size < 16 || !request.wide && size > 1 << 31 {
            return Err(BarError::Size(size));
        }
        let bar = Self {
            index,
            region: request.region,
            size,
            wide: request.wide,
            shown: None,
        };
        // A 64-bit BAR takes two registers (PCI Local Bus 3.0, 6.2.5.1), so ranges are compared and
        // not indexes.
        let taken = others.iter().any(|other| {
            let (mine, theirs) = (bar.registers(), other.registers());
            mine.start < theirs.end && theirs.start < mine.end
        });
        if bar.registers().end > 6 || taken {
            return Err(BarError::Register(index));
        }
        let mut flags = 0;
        if request.wide {
            flags |= MEMORY_64;
        }
        if request.prefetchable {
            flags |= PREFETCHABLE;
        }
        // The guest sizes a BAR by writing ones: it reads zeros below `size`, since those bits are
        // not writable.
        let (value, mask) = (request.address | u64::from(flags), !(size - 1));
        let bytes = if request.wide { 8 } else { 4 };
        registers.set(bar.at(), &value.to_le_bytes()[..bytes]);
        registers.allow(bar.at(), &mask.to_le_bytes()[..bytes]);
        Ok(bar)
    }

    fn registers(&self) -> std::ops::Range<u8> {
        self.index..self.index.saturating_add(if self.wide { 2 } else { 1 })
    }

    fn at(&self) -> usize {
        BARS + 4 * usize::from(self.index)
    }

    /// Returns the address that the registers ask for: none unless memory decoding is on. Zero means that
    /// the address was never set.
    pub(super) fn wanted(&self, registers: &Registers) -> Option<u64> {
        if registers.get_u16(COMMAND) & COMMAND_MEMORY == 0 {
            return None;
        }
        let low = u64::from(registers.get_u32(self.at()));
        let high = match self.wide {
            true => u64::from(registers.get_u32(self.at() + 4)),
            false => 0,
        };
        let address = (high << 32 | low) & !FLAGS;
        // A guest that sizes a BAR with decoding on asks, for a moment, for the end of the address
        // space. Zero and ranges that wrap stay unmapped.
        let range = AddrRange::new(address, self.size);
        (address != 0 && range.is_some()).then_some(address)
    }
}

/// Hands out addresses in a PCI window.
#[derive(Clone, Debug)]
pub struct BarAllocator {
    window: AddrRange,
    /// Ascending.
    taken: Vec<AddrRange>,
}

impl BarAllocator {
    /// All of `window` is free.
    #[must_use]
    pub fn new(window: AddrRange) -> Self {
        Self {
            window,
            taken: Vec::new(),
        }
    }

    /// The lowest free place for a BAR of `size` bytes, a power of two, aligned to its size.
    ///
    /// # Errors
    /// Fails if `size` is invalid or there is no such place.
    pub fn allocate(&mut self, size: u64) -> Result<AddrRange, BarError> {
        if !size.is_power_of_two() {
            return Err(BarError::Size(size));
        }
        let mut from = Some(self.window.first());
        let mut ends = self.taken.iter();
        loop {
            let start = from.and_then(|from| from.checked_next_multiple_of(size));
            let range = start.and_then(|start| AddrRange::new(start, size));
            let range = range.filter(|range| self.window.covers(*range));
            let range = range.ok_or(BarError::Full(size))?;
            // The next one that is in the way, if there is one.
            match ends.find(|taken| taken.intersection(range).is_some()) {
                Some(taken) => from = taken.last().checked_add(1),
                None => {
                    let at = self.taken.partition_point(|taken| *taken < range);
                    self.taken.insert(at, range);
                    return Ok(range);
                }
            }
        }
    }

    /// Frees a range that was allocated.
    pub fn free(&mut self, range: AddrRange) {
        self.taken.retain(|taken| *taken != range);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn allocations_are_aligned_and_disjoint(
            steps in prop::collection::vec((any::<bool>(), 4_u32..20, any::<prop::sample::Index>()), 1..80)
        ) {
            let window = AddrRange::new(0x12_3000, 1 << 20).unwrap();
            let mut allocator = BarAllocator::new(window);
            let mut held: Vec<AddrRange> = Vec::new();
            for (take, bits, which) in steps {
                if take || held.is_empty() {
                    match allocator.allocate(1 << bits) {
                        Ok(range) => {
                            prop_assert_eq!(range.first() % (1 << bits), 0);
                            prop_assert_eq!(range.len(), Some(1 << bits));
                            prop_assert!(window.covers(range));
                            prop_assert!(held.iter().all(|other| other.intersection(range).is_none()));
                            held.push(range);
                        }
                        Err(error) => {
                            prop_assert_eq!(error, BarError::Full(1 << bits));
                            let free = |start| {
                                let range = AddrRange::new(start, 1 << bits).unwrap();
                                window.covers(range) && held.iter().all(|other| other.intersection(range).is_none())
                            };
                            prop_assert!(!(0_u64..0x30_0000).step_by(1 << bits).any(free));
                        }
                    }
                } else {
                    allocator.free(held.swap_remove(which.index(held.len())));
                }
            }
        }
    }
}
