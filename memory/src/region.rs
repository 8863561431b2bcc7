//! Memory regions: the nodes of the tree.

use std::collections::HashMap;
use std::fmt;
use std::sync::Arc;

use vmm_sys_util::eventfd::EventFd;

use crate::error::TopologyError;
use crate::ram::RamBlock;
use crate::range::AddrRange;

/// The handler of a guest's accesses to a device region.
///
/// Called by any number of vCPU threads at once. An access has the width that the guest used: 1,
/// 2, 4 or 8 bytes, more for string instructions, and none is promised to be aligned; a device
/// decides what an odd one means. `offset` is within the region, and `offset + data.len()` is
/// not past its end.
pub trait DeviceOps: Send + Sync {
    /// Fills `data` with what the guest reads at `offset`.
    fn read(&self, offset: u64, data: &mut [u8]);
    /// Handles the guest's write of `data` at `offset`.
    fn write(&self, offset: u64, data: &[u8]);
}

/// Names a region of one topology. The id of a destroyed region is never used again.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RegionId {
    pub(crate) index: u32,
    pub(crate) generation: u32,
}

impl fmt::Debug for RegionId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "region {}.{}", self.index, self.generation)
    }
}

/// Some bytes of a RAM block.
#[derive(Clone)]
pub struct RamSlice {
    /// The block.
    pub block: Arc<RamBlock>,
    /// Offset in the block, in bytes.
    pub offset: u64,
}

impl PartialEq for RamSlice {
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.block, &other.block) && self.offset == other.offset
    }
}

impl fmt::Debug for RamSlice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}+{:#x}", self.block, self.offset)
    }
}

/// A doorbell: the hypervisor signals an event descriptor at a guest's write, without an exit to this
/// process (ioeventfd).
#[derive(Clone)]
pub struct IoEventFd {
    /// Offset in the region.
    pub offset: u64,
    /// Bytes that the write has: 1, 2, 4 or 8, or 0 for any.
    pub width: u8,
    /// The value that the write must have; any value if absent.
    pub datamatch: Option<u64>,
    /// The descriptor that is signalled.
    pub fd: Arc<EventFd>,
}

impl PartialEq for IoEventFd {
    fn eq(&self, other: &Self) -> bool {
        (self.offset, self.width, self.datamatch) == (other.offset, other.width, other.datamatch)
            && Arc::ptr_eq(&self.fd, &other.fd)
    }
}

impl fmt::Debug for IoEventFd {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "IoEventFd({:#x}/{}", self.offset, self.width)?;
        match self.datamatch {
            Some(value) => write!(f, " = {value:#x})"),
            None => f.write_str(")"),
        }
    }
}

/// The kind of a region.
#[derive(Clone)]
pub(crate) enum Kind {
    Container,
    Ram(RamSlice),
    Rom(RamSlice),
    Device(Arc<dyn DeviceOps>),
    Alias { target: RegionId, offset: u64 },
}

impl Kind {
    pub(crate) fn name(&self) -> &'static str {
        match self {
            Self::Container => "container",
            Self::Ram(_) => "ram",
            Self::Rom(_) => "rom",
            Self::Device(_) => "device",
            Self::Alias { .. } => "alias",
        }
    }
}

/// A region's place in its container.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Place {
    pub(crate) parent: RegionId,
    pub(crate) offset: u64,
    pub(crate) priority: i32,
    /// Order of insertion: of two regions with the same priority, the later one is in front.
    pub(crate) sequence: u64,
}

#[derive(Clone)]
pub(crate) struct Region {
    pub(crate) name: Arc<str>,
    pub(crate) owner: Arc<str>,
    pub(crate) kind: Kind,
    /// The last offset inside the region: its size less one.
    pub(crate) last: u64,
    pub(crate) enabled: bool,
    pub(crate) place: Option<Place>,
    /// A container's children, front to back.
    pub(crate) children: Vec<RegionId>,
    pub(crate) ioeventfds: Vec<IoEventFd>,
    /// How many aliases show it.
    pub(crate) aliases: u32,
}

impl Region {
    /// Its own offsets, from 0 on.
    pub(crate) fn extent(&self) -> AddrRange {
        AddrRange::from_bounds(0, self.last).unwrap_or(AddrRange::ALL)
    }
}

#[derive(Clone)]
struct Slot {
    generation: u32,
    region: Option<Region>,
}

/// Owns the regions of a topology, and remembers what they were while a transaction is open.
#[derive(Default)]
pub(crate) struct Arena {
    slots: Vec<Slot>,
    free: Vec<u32>,
    /// Slots as they were when the open transaction first touched them.
    undo: HashMap<u32, Slot>,
}

impl Arena {
    pub(crate) fn get(&self, id: RegionId) -> Result<&Region, TopologyError> {
        self.slots
            .get(id.index as usize)
            .filter(|slot| slot.generation == id.generation)
            .and_then(|slot| slot.region.as_ref())
            .ok_or(TopologyError::NoSuchRegion(id))
    }

    pub(crate) fn get_mut(&mut self, id: RegionId) -> Result<&mut Region, TopologyError> {
        self.get(id)?;
        self.remember(id.index);
        self.slots
            .get_mut(id.index as usize)
            .and_then(|slot| slot.region.as_mut())
            .ok_or(TopologyError::NoSuchRegion(id))
    }

    pub(crate) fn insert(&mut self, region: Region) -> Result<RegionId, TopologyError> {
        let index = match self.free.last() {
            Some(&index) => index,
            None => {
                let index = u32::try_from(self.slots.len()).map_err(|_| TopologyError::TooMany)?;
                self.slots.push(Slot {
                    generation: 0,
                    region: None,
                });
                self.free.push(index);
                index
            }
        };
        // Save the slot before it leaves the free list and gets its region: an undo must find it
        // empty.
        self.remember(index);
        self.free.pop();
        let slot = &mut self.slots[index as usize];
        slot.region = Some(region);
        Ok(RegionId {
            index,
            generation: slot.generation,
        })
    }

    pub(crate) fn remove(&mut self, id: RegionId) -> Result<(), TopologyError> {
        self.get(id)?;
        self.remember(id.index);
        let slot = &mut self.slots[id.index as usize];
        slot.region = None;
        // After 2^32 regions in one slot its ids would repeat: such a slot is not used again.
        if let Some(next) = slot.generation.checked_add(1) {
            slot.generation = next;
            self.free.push(id.index);
        }
        Ok(())
    }

    fn remember(&mut self, index: u32) {
        self.undo
            .entry(index)
            .or_insert_with(|| self.slots[index as usize].clone());
    }

    /// The regions that the open transaction has edited.
    pub(crate) fn touched(&self) -> impl Iterator<Item = RegionId> {
        // A destroyed region is left out. If it was visible, `unplace` edited its container, and
        // that one is listed.
        self.undo.keys().filter_map(|&index| {
            let slot = &self.slots[index as usize];
            slot.region.as_ref().map(|_| RegionId {
                index,
                generation: slot.generation,
            })
        })
    }

    /// Drops the undo log: the transaction's changes stay.
    pub(crate) fn keep(&mut self) {
        self.undo.clear();
    }

    /// Puts everything back as it was when the transaction was opened.
    pub(crate) fn undo(&mut self) {
        // This restores the generations, too. An id that only the undone transaction has seen may
        // thus come up again, which is safe: no view was published with it.
        let undo = std::mem::take(&mut self.undo);
        for (index, slot) in undo {
            self.slots[index as usize] = slot;
        }
        // The undo log holds slots only, so the free list is computed anew. Slots that the
        // transaction added remain, as free ones.
        self.free = (0..)
            .zip(&self.slots)
            .filter(|(_, slot)| slot.region.is_none() && slot.generation < u32::MAX)
            .map(|(index, _)| index)
            .collect();
    }
}
