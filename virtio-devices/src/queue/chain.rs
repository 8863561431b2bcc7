//! A request: the buffers that the driver made available together.

use std::sync::Arc;

use memory::{DirtySlice, FlatView, PAGE_SIZE, Pages};
use virtio_queue::DescriptorChain;
use virtio_queue::desc::split::Descriptor;
use vm_memory::bitmap::Bitmap;
use vm_memory::{Address, Bytes, GuestAddress, GuestMemoryBackend, VolatileSlice};

use super::{QueueError, QueueMemory};

/// A piece of guest memory, all of it RAM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Buffer {
    addr: u64,
    len: usize,
}

/// Iterates over the descriptors of a chain (virtio 1.3, 2.7.5). Ends early at a descriptor that is invalid.
struct Walk<'a> {
    memory: &'a QueueMemory,
    table: GuestAddress,
    entries: u16,
    next: Option<u16>,
    /// How many there can be: more are a loop.
    left: u16,
    is_indirect: bool,
}

impl Walk<'_> {
    /// Enters an indirect table. A chain has at most one, and it cannot be nested (virtio 1.3, 2.7.5.3.1).
    fn enter(&mut self, indirect: Descriptor) -> Option<()> {
        const LEN: u32 = size_of::<Descriptor>() as u32;
        if self.is_indirect || !indirect.len().is_multiple_of(LEN) {
            return None;
        }
        self.table = indirect.addr();
        self.entries = u16::try_from(indirect.len() / LEN).ok()?;
        // The table's own length bounds the walk now. `parse` bounds the chain by the queue's size.
        self.left = self.entries;
        self.next = Some(0);
        self.is_indirect = true;
        Some(())
    }

    fn read(&mut self) -> Option<Descriptor> {
        // Each read takes one of `left`, so a chain that points back into itself ends.
        let index = self.next.take().filter(|index| *index < self.entries)?;
        self.left = self.left.checked_sub(1)?;
        let offset = u64::from(index) * size_of::<Descriptor>() as u64;
        self.memory.read_obj(self.table.checked_add(offset)?).ok()
    }
}

impl Iterator for Walk<'_> {
    type Item = Descriptor;

    fn next(&mut self) -> Option<Descriptor> {
        let mut descriptor = self.read()?;
        if descriptor.refers_to_indirect_table() {
            self.enter(descriptor)?;
            descriptor = self.read()?;
            if descriptor.refers_to_indirect_table() {
                return None;
            }
        }
        self.next = descriptor.has_next().then(|| descriptor.next());
        Some(descriptor)
    }
}

/// A descriptor chain, checked: it is no longer than its queue, every buffer is in RAM, those that the device reads come before
/// those that it writes (virtio 1.3, 2.7.4.2), and the sum of their lengths is below 4 GiB.
///
/// It keeps the memory mapped that it names, whatever becomes of the guest's map meanwhile, so
/// that it may be given to the kernel for as long as an I/O takes.
#[derive(Debug)]
pub struct Chain {
    head: u16,
    view: Arc<FlatView>,
    readable: Vec<Buffer>,
    writable: Vec<Buffer>,
}

impl Chain {
    pub(super) fn new(
        chain: DescriptorChain<&QueueMemory>,
        entries: u16,
        view: &Arc<FlatView>,
    ) -> Result<Self, QueueError> {
        Self::parse(chain.head_index(), chain, entries, view)
    }

    /// Returns the chain that begins at `head` of a table with `entries` descriptors. The device popped it
    /// earlier: the available ring may no longer name it.
    pub(super) fn at(
        head: u16,
        table: GuestAddress,
        entries: u16,
        memory: &QueueMemory,
    ) -> Result<Self, QueueError> {
        let walk = Walk {
            memory,
            table,
            entries,
            next: Some(head),
            left: entries,
            is_indirect: false,
        };
        Self::parse(head, walk, entries, memory.view())
    }

    fn parse(
        head: u16,
        chain: impl Iterator<Item = Descriptor>,
        entries: u16,
        view: &Arc<FlatView>,
    ) -> Result<Self, QueueError> {
        let broken = |why| QueueError::Chain { head, why };
        let mut parsed = Self {
            head,
            view: Arc::clone(view),
            readable: Vec::new(),
            writable: Vec::new(),
        };
        let mut complete = false;
        let mut bytes = 0_u32;
        for descriptor in chain {
            // 2.7.5.3.1 forbids longer chains, also in indirect tables. The check bounds the memory
            // that one request of a guest can take here.
            if parsed.descriptors() == usize::from(entries) {
                return Err(broken("is longer than its queue"));
            }
            let buffer = Buffer {
                addr: descriptor.addr().0,
                len: usize::try_from(descriptor.len()).map_err(|_| broken("is too long"))?,
            };
            // The used ring returns a length of 32 bits (2.7.8).
            bytes = bytes
                .checked_add(descriptor.len())
                .ok_or_else(|| broken("is too long"))?;
            // Against the view that the chain keeps: a later commit of the map cannot take the
            // memory from under an I/O in flight.
            if !view.check_range(descriptor.addr(), buffer.len) {
                return Err(broken("has a buffer that is not RAM"));
            }
            if descriptor.is_write_only() {
                parsed.writable.push(buffer);
            } else if parsed.writable.is_empty() {
                parsed.readable.push(buffer);
            } else {
                return Err(broken("has a readable buffer behind a writable one"));
            }
            complete = !descriptor.has_next();
        }
        // The iterator ends early at a loop, an index past the table, an indirect
        // table within another, or more than 4 GiB.
        if complete {
            Ok(parsed)
        } else {
            Err(broken(
                "is a loop, leaves its table, nests indirect tables or exceeds 4 GiB",
            ))
        }
    }

    /// The index of its first descriptor, by which the driver knows it.
    #[must_use]
    pub fn head(&self) -> u16 {
        self.head
    }

    /// How many descriptors it has, at most as many as its queue has entries.
    #[must_use]
    pub fn descriptors(&self) -> usize {
        self.readable.len() + self.writable.len()
    }

    /// Bytes that the device may read.
    #[must_use]
    pub fn readable_len(&self) -> usize {
        self.readable.iter().map(|buffer| buffer.len).sum()
    }

    /// Bytes that the device may write.
    #[must_use]
    pub fn writable_len(&self) -> usize {
        self.writable.iter().map(|buffer| buffer.len).sum()
    }

    /// The memory that it is in.
    pub(crate) fn memory(&self) -> &FlatView {
        &self.view
    }

    /// Guest addresses and lengths of what the device may write.
    pub(crate) fn writable_ranges(&self) -> impl Iterator<Item = (u64, usize)> {
        self.writable.iter().map(|buffer| (buffer.addr, buffer.len))
    }

    /// Fills `data` from what the driver wrote, `offset` bytes into it.
    ///
    /// # Errors
    /// Fails if the driver's buffers are shorter.
    pub fn read(&self, offset: usize, data: &mut [u8]) -> Result<(), QueueError> {
        let mut done = 0;
        for slice in self.readable(offset, data.len())? {
            done += slice.copy_to(data.get_mut(done..).unwrap_or_default());
        }
        // Behind the copy, which may have found that the host has lost a page.
        self.check_not_lost()
    }

    /// Puts `data` where the driver reads, `offset` bytes into it.
    ///
    /// # Errors
    /// Fails if the driver's buffers are shorter.
    pub fn write(&self, offset: usize, data: &[u8]) -> Result<(), QueueError> {
        let mut done = 0;
        for slice in self.writable(offset, data.len())? {
            let part = data.get(done..).unwrap_or_default();
            let part = part.get(..slice.len()).unwrap_or(part);
            slice.copy_from(part);
            done += part.len();
        }
        Ok(())
    }

    /// `len` bytes of what the driver wrote, `offset` bytes into it, where they are.
    ///
    /// # Errors
    /// Fails if the driver's buffers are shorter.
    pub fn readable(
        &self,
        offset: usize,
        len: usize,
    ) -> Result<Vec<VolatileSlice<'_, DirtySlice<'_>>>, QueueError> {
        self.slices(&self.readable, offset, len)
    }

    /// Returns `len` bytes of the device-writable part, from `offset`. A caller that writes other than
    /// through the slices' methods must call [`Chain::mark_written`].
    ///
    /// # Errors
    /// The buffers are shorter.
    pub fn writable(
        &self,
        offset: usize,
        len: usize,
    ) -> Result<Vec<VolatileSlice<'_, DirtySlice<'_>>>, QueueError> {
        self.slices(&self.writable, offset, len)
    }

    /// Waits until `len` bytes of the device-readable part, from `offset`, are present. In postcopy, pages
    /// arrive after the guest resumed. Call this before the bytes go to a place that outlives the machine,
    /// such as a disk.
    ///
    /// # Errors
    /// The pages are lost, or the buffers are shorter.
    pub fn wait_readable(&self, offset: usize, len: usize) -> Result<(), QueueError> {
        let mut ram = GuestMemoryBackend::iter(&*self.view);
        // Looking at the blocks costs little; touching each page of each request would not.
        if ram.any(|ram| ram.pages() == Pages::Awaited) {
            for slice in self.readable(offset, len)? {
                for at in (0..slice.len())
                    .step_by(PAGE_SIZE as usize)
                    .chain([slice.len() - 1])
                {
                    // Within the slice. Reading one byte has the page fetched.
                    let _ = slice.read_obj::<u8>(at);
                }
            }
        }
        self.check_not_lost()
    }

    /// The content of lost memory is not what the driver wrote, and must not leave the machine.
    fn check_not_lost(&self) -> Result<(), QueueError> {
        let mut ram = GuestMemoryBackend::iter(&*self.view);
        match ram.any(|ram| ram.pages() == Pages::Lost) {
            true => Err(QueueError::Lost { head: self.head }),
            false => Ok(()),
        }
    }

    /// The kernel has written these bytes of where the driver reads: their pages are dirty.
    ///
    /// # Errors
    /// Fails if the driver's buffers are shorter.
    pub fn mark_written(&self, offset: usize, len: usize) -> Result<(), QueueError> {
        for slice in self.writable(offset, len)? {
            // The kernel wrote through a pointer that the dirty bitmap does not see: a live
            // migration would miss these pages.
            slice.bitmap().mark_dirty(0, slice.len());
        }
        Ok(())
    }

    fn slices(
        &self,
        buffers: &[Buffer],
        mut offset: usize,
        len: usize,
    ) -> Result<Vec<VolatileSlice<'_, DirtySlice<'_>>>, QueueError> {
        let mut left = len;
        let mut slices = Vec::with_capacity(buffers.len());
        for buffer in buffers {
            if left == 0 {
                break;
            }
            let Some(there) = buffer.len.checked_sub(offset).filter(|there| *there > 0) else {
                offset = offset.saturating_sub(buffer.len);
                continue;
            };
            let take = there.min(left);
            // Within the buffer, whose addresses were checked.
            let addr = GuestAddress(buffer.addr.wrapping_add(offset as u64));
            for slice in GuestMemoryBackend::get_slices(&*self.view, addr, take) {
                slices.push(slice.map_err(|_| QueueError::Chain {
                    head: self.head,
                    why: "has a buffer that is not RAM",
                })?);
            }
            (offset, left) = (0, left - take);
        }
        if left == 0 {
            Ok(slices)
        } else {
            Err(QueueError::Chain {
                head: self.head,
                why: "is too short for its request",
            })
        }
    }
}
