//! Address spaces: the published side of a topology, and guest accesses through it.

use std::fmt;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use arc_swap::{ArcSwap, Guard};
use vm_memory::GuestAddressSpace;

use crate::flat_view::{FlatRange, FlatView, Target};
use crate::region::{DeviceOps, RamSlice};

/// Which of a topology's two address spaces.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum SpaceKind {
    /// Physical memory: 64-bit addresses.
    Memory,
    /// x86 port I/O: 16-bit addresses.
    PortIo,
}

impl SpaceKind {
    /// Both.
    pub const ALL: [Self; 2] = [Self::Memory, Self::PortIo];

    pub(crate) fn index(self) -> usize {
        match self {
            Self::Memory => 0,
            Self::PortIo => 1,
        }
    }
}

impl fmt::Display for SpaceKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Memory => "memory",
            Self::PortIo => "I/O",
        })
    }
}

struct Published {
    view: ArcSwap<FlatView>,
    /// The view's, where one load finds it.
    generation: AtomicU64,
}

/// A reader of an address space: cheap to clone, usable from any thread, never blocked by a
/// commit and never blocking one.
#[derive(Clone)]
pub struct AddressSpace {
    published: Arc<Published>,
}

impl AddressSpace {
    pub(crate) fn new() -> Self {
        let view = ArcSwap::from_pointee(FlatView::empty());
        Self {
            published: Arc::new(Published {
                view,
                generation: AtomicU64::new(0),
            }),
        }
    }

    /// The view in force. Hold it for the length of one access or one request, not longer: as
    /// long as it is held, RAM that was taken from the guest meanwhile stays mapped.
    #[must_use]
    pub fn view(&self) -> Guard<Arc<FlatView>> {
        self.published.view.load()
    }

    /// The generation of the view in force.
    #[inline]
    #[must_use]
    pub fn generation(&self) -> u64 {
        self.published.generation.load(Ordering::Acquire)
    }

    pub(crate) fn publish(&self, view: Arc<FlatView>) {
        let generation = view.generation();
        // The view goes first, and Release orders the two stores: a reader that sees the new
        // generation also finds the new view. In the other order a reader would reload on the new
        // generation, and still get the old view. Between the stores readers keep the old view, as
        // if they had read before the commit.
        self.published.view.store(view);
        self.published
            .generation
            .store(generation, Ordering::Release);
    }
}

/// A reader that keeps the view it read last, for a thread that reads all the time: a lookup costs
/// one load more than in a map that never changes.
///
/// Between two reads it keeps mapped what that view shows: memory that was taken from the guest
/// goes with the next read.
#[derive(Clone, Debug)]
pub struct CachedView {
    space: AddressSpace,
    view: Arc<FlatView>,
}

impl CachedView {
    /// A reader of `space`.
    #[must_use]
    pub fn new(space: AddressSpace) -> Self {
        let view = space.memory();
        Self { space, view }
    }

    /// The view in force.
    #[inline]
    pub fn view(&mut self) -> &Arc<FlatView> {
        // The view may be newer than the generation while `publish` runs. That costs one more load
        // at the next call and does no harm.
        if self.view.generation() != self.space.generation() {
            self.view = self.space.memory();
        }
        &self.view
    }
}

impl fmt::Debug for AddressSpace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "AddressSpace(generation {})", self.generation())
    }
}

impl GuestAddressSpace for AddressSpace {
    type M = FlatView;
    type T = Arc<FlatView>;

    fn memory(&self) -> Arc<FlatView> {
        self.published.view.load_full()
    }
}

/// How an access of the guest ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// All of it was answered.
    Answered,
    /// Part of the range is unassigned, from this address on: reads return ones, writes are ignored.
    Unassigned(u64),
}

/// The part of the map that answers a piece of an access.
enum Piece<'a> {
    /// A device, and the offset in its region.
    Device(&'a dyn DeviceOps, u64),
    /// RAM, and the offset from the slice's start.
    Ram(&'a RamSlice, u64),
    /// Read-only memory, and the offset from the slice's start.
    Rom(&'a RamSlice, u64),
    /// Nothing is assigned there.
    Unassigned,
}

/// Accesses of a guest's CPU, at any address and of any width. An access that crosses from one range to
/// the next is split there.
impl FlatView {
    /// Fills `data` with what the guest reads at `addr`.
    pub fn read(&self, addr: u64, data: &mut [u8]) -> Access {
        let mut result = Access::Answered;
        self.split(addr, data.len(), |at, piece, bytes| {
            let Some(part) = data.get_mut(bytes) else {
                return;
            };
            match piece {
                Piece::Device(ops, offset) => ops.read(offset, part),
                Piece::Ram(ram, offset) | Piece::Rom(ram, offset) => ram.read(offset, part),
                Piece::Unassigned => {
                    part.fill(0xff);
                    result = first_gap(result, at);
                }
            }
        });
        result
    }

    /// Handles the guest's write of `data` at `addr`.
    pub fn write(&self, addr: u64, data: &[u8]) -> Access {
        let mut result = Access::Answered;
        self.split(addr, data.len(), |at, piece, bytes| {
            let Some(part) = data.get(bytes) else {
                return;
            };
            match piece {
                Piece::Device(ops, offset) => ops.write(offset, part),
                Piece::Ram(ram, offset) => ram.write(offset, part),
                // As on hardware: the write is lost without an error.
                Piece::Rom(..) => {}
                Piece::Unassigned => result = first_gap(result, at),
            }
        });
        result
    }

    /// Calls `part` for each piece of an access: with its address, what answers it, and its bytes in the
    /// access's data.
    fn split(&self, addr: u64, len: usize, mut part: impl FnMut(u64, Piece<'_>, Range<usize>)) {
        let mut done = 0;
        while done < len {
            // Past the last address the bus has no more lines: the address wraps to 0.
            let at = addr.wrapping_add(done as u64);
            let (piece, last) = match self.find(at) {
                Some(flat) => (piece_of(flat, at), flat.range.last()),
                // A gap ends where the next range starts. That range starts above `at`, so its
                // first address is not 0.
                None => (
                    Piece::Unassigned,
                    self.ranges()
                        .get(self.index_after(at))
                        .map_or(u64::MAX, |n| n.range.first() - 1),
                ),
            };
            // `last - at + 1` can be 2^64, which no integer here holds: saturate before the
            // addition overflows.
            let room = usize::try_from(last - at)
                .unwrap_or(usize::MAX)
                .saturating_add(1);
            let here = room.min(len - done);
            part(at, piece, done..done + here);
            done += here;
        }
    }
}

/// Returns what answers at an address within a range.
fn piece_of(flat: &FlatRange, at: u64) -> Piece<'_> {
    let from_first = at - flat.range.first();
    match &flat.target {
        // Devices count from the start of their region, of which the range may show a part.
        Target::Device(ops) => Piece::Device(&**ops, flat.offset + from_first),
        // The slice of a range begins at the range's first address.
        Target::Ram(ram) => Piece::Ram(ram, from_first),
        Target::Rom(ram) => Piece::Rom(ram, from_first),
    }
}

fn first_gap(so_far: Access, at: u64) -> Access {
    match so_far {
        Access::Answered => Access::Unassigned(at),
        gap @ Access::Unassigned(_) => gap,
    }
}

impl RamSlice {
    fn read(&self, from_start: u64, data: &mut [u8]) {
        match self.window(from_start, data.len()) {
            Some(slice) => {
                slice.copy_to(data);
            }
            None => data.fill(0xff),
        }
    }

    fn write(&self, from_start: u64, data: &[u8]) {
        if let Some(slice) = self.window(from_start, data.len()) {
            slice.copy_from(data);
        }
    }
}
