//! Address spaces: the published side of a topology, and guest accesses through it.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use arc_swap::{ArcSwap, Guard};
use vm_memory::GuestAddressSpace;

use crate::flat_view::{FlatRange, FlatView, Target};
use crate::region::RamSlice;

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

/// Accesses of a guest's CPU, at any address and of any width. One that crosses from a range to
/// the next is split there.
impl FlatView {
    /// Fills `data` with what the guest reads at `addr`.
    pub fn read(&self, addr: u64, data: &mut [u8]) -> Access {
        let mut result = Access::Answered;
        self.split(addr, data.len(), |at, answering, from, len| {
            let Some(part) = data.get_mut(from..from + len) else {
                return;
            };
            match answering {
                Some((
                    FlatRange {
                        target: Target::Device(ops),
                        ..
                    },
                    offset,
                )) => {
                    ops.read(offset, part);
                }
                Some((
                    flat @ FlatRange {
                        target: Target::Ram(ram) | Target::Rom(ram),
                        ..
                    },
                    offset,
                )) => {
                    // `offset` counts from the start of the region, `ram` from the start of the
                    // range.
                    ram.read(offset - flat.offset, part);
                }
                None => {
                    part.fill(0xff);
                    result = first_gap(result, at);
                }
            }
        });
        result
    }

    /// Takes `data`, which the guest writes at `addr`.
    pub fn write(&self, addr: u64, data: &[u8]) -> Access {
        let mut result = Access::Answered;
        self.split(addr, data.len(), |at, answering, from, len| {
            let Some(part) = data.get(from..from + len) else {
                return;
            };
            match answering {
                Some((
                    FlatRange {
                        target: Target::Device(ops),
                        ..
                    },
                    offset,
                )) => {
                    ops.write(offset, part);
                }
                Some((
                    flat @ FlatRange {
                        target: Target::Ram(ram),
                        ..
                    },
                    offset,
                )) => {
                    ram.write(offset - flat.offset, part);
                }
                // As on hardware: the write is lost without an error.
                Some((
                    FlatRange {
                        target: Target::Rom(_),
                        ..
                    },
                    _,
                )) => {}
                None => result = first_gap(result, at),
            }
        });
        result
    }

    /// Calls `part` with each piece of an access that one range answers, or none: the piece's
    /// address, the range with the offset in its region, and where in the data, how long.
    fn split(
        &self,
        addr: u64,
        len: usize,
        mut part: impl FnMut(u64, Option<(&FlatRange, u64)>, usize, usize),
    ) {
        let mut done = 0;
        while done < len {
            // Past the last address the bus has no more lines: the address wraps to 0.
            let at = addr.wrapping_add(done as u64);
            let (answering, last) = match self.find(at) {
                Some(flat) => (
                    Some((flat, flat.offset + (at - flat.range.first()))),
                    flat.range.last(),
                ),
                // A gap ends where the next range starts. That range starts above `at`, so its
                // first address is not 0.
                None => (
                    None,
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
            part(at, answering, done, here);
            done += here;
        }
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
