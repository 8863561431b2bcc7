//! Rendering: computes from the tree which region answers at each address.
//!
//! The tree is painted from the front to the back, and the first painter of an address keeps it.
//! Each region is clipped to its container's extent and to the window of the alias through which
//! it is seen.

use std::collections::BTreeMap;
use std::sync::Arc;

use crate::error::CommitError;
use crate::flat_view::{FlatIoEventFd, FlatRange, Target};
use crate::limits;
use crate::range::AddrRange;
use crate::region::{Arena, Kind, RamSlice, Region, RegionId};

pub(crate) struct Rendered {
    pub(crate) ranges: Vec<FlatRange>,
    pub(crate) ioeventfds: Vec<FlatIoEventFd>,
}

/// Paints the tree below `root`, whose offset 0 is at address 0.
pub(crate) fn render(arena: &Arena, root: RegionId) -> Result<Rendered, CommitError> {
    let mut canvas = Canvas {
        arena,
        painted: BTreeMap::new(),
        ioeventfds: Vec::new(),
        visits: 0,
    };
    canvas.paint(root, 0, AddrRange::ALL, 0)?;
    let mut ioeventfds = canvas.ioeventfds;
    // `ViewChange` compares doorbells in one merge by this key. In the order of the tree walk, a
    // doorbell that did not change could count as removed and added.
    ioeventfds.sort_by_key(FlatIoEventFd::key);
    Ok(Rendered {
        // Two aliases side by side can show neighbouring parts of one region. As one range they
        // need one memslot, and a lookup or a `RingWindow` may cross the seam.
        ranges: merged(canvas.painted.into_values()),
        ioeventfds,
    })
}

/// Neighbours that one region shows without a seam become one range again.
fn merged(ranges: impl Iterator<Item = FlatRange>) -> Vec<FlatRange> {
    let mut out: Vec<FlatRange> = Vec::with_capacity(ranges.size_hint().0);
    for next in ranges {
        match out.last_mut() {
            Some(previous) if previous.is_continued_by(&next) => {
                previous.range = previous.range.joined(next.range);
            }
            _ => out.push(next),
        }
    }
    out
}

struct Canvas<'a> {
    arena: &'a Arena,
    /// By first address.
    painted: BTreeMap<u64, FlatRange>,
    ioeventfds: Vec<FlatIoEventFd>,
    visits: usize,
}

impl Canvas<'_> {
    /// Paints a region, whose offset 0 is at `base`, where `clip` and nothing in front shows it.
    ///
    /// `base` has more than 64 bits and a sign: an alias shows its target's middle at its own
    /// start, so the target's offset 0 may lie before the first address.
    fn paint(
        &mut self,
        id: RegionId,
        base: i128,
        clip: AddrRange,
        depth: usize,
    ) -> Result<(), CommitError> {
        // Count before the early returns below: a hidden or clipped region paints nothing, but its
        // visit costs time as well.
        self.visits += 1;
        if self.visits > limits::VISITS {
            return Err(CommitError::Render("its aliases make it too large"));
        }
        if depth > limits::DEPTH {
            return Err(CommitError::Render("it is nested too deeply"));
        }
        let Ok(region) = self.arena.get(id) else {
            return Ok(());
        };
        let Some(seen) = visible(region, base, clip).filter(|_| region.enabled) else {
            return Ok(());
        };
        match &region.kind {
            Kind::Container => {
                // The children are front to back. Each subtree paints all of its ranges before the
                // next sibling starts. That keeps priorities local to their container, as in QEMU.
                for &child in &region.children {
                    if let Ok(Region {
                        place: Some(place), ..
                    }) = self.arena.get(child)
                    {
                        self.paint(child, base + i128::from(place.offset), seen, depth + 1)?;
                    }
                }
            }
            Kind::Alias { target, offset } => {
                // The target's byte `offset` must land on `base`, so that its offset 0 lies before
                // `base`. Where the target is placed itself plays no role: an alias shows it
                // independently.
                self.paint(*target, base - i128::from(*offset), seen, depth + 1)?;
            }
            Kind::Ram(slice) => self.fill(id, base, seen, |at| Target::Ram(moved(slice, at))),
            Kind::Rom(slice) => self.fill(id, base, seen, |at| Target::Rom(moved(slice, at))),
            Kind::Device(ops) => {
                self.fill(id, base, seen, |_| Target::Device(Arc::clone(ops)));
            }
        }
        Ok(())
    }

    /// Paints a leaf where `seen` is still free.
    fn fill(
        &mut self,
        region: RegionId,
        base: i128,
        seen: AddrRange,
        target: impl Fn(u64) -> Target,
    ) {
        for range in self.free_parts(seen) {
            let offset = offset_of(range.first(), base);
            let flat = FlatRange {
                range,
                region,
                offset,
                target: target(offset),
            };
            self.add_ioeventfds(&flat);
            self.painted.insert(range.first(), flat);
        }
    }

    /// A doorbell counts where all of it shows.
    fn add_ioeventfds(&mut self, flat: &FlatRange) {
        let Ok(region) = self.arena.get(flat.region) else {
            return;
        };
        for doorbell in &region.ioeventfds {
            let Some(from_start) = doorbell.offset.checked_sub(flat.offset) else {
                continue;
            };
            let Some(addr) = flat.range.first().checked_add(from_start) else {
                continue;
            };
            // Width 0 matches writes of every width at this one address.
            let Some(bytes) = AddrRange::new(addr, u64::from(doorbell.width.max(1))) else {
                continue;
            };
            // KVM matches a doorbell by its address and never asks which region is in front. If a
            // region in front hides part of the doorbell, KVM would take writes that belong to that
            // region.
            if flat.range.covers(bytes) {
                self.ioeventfds.push(FlatIoEventFd {
                    addr,
                    width: doorbell.width,
                    datamatch: doorbell.datamatch,
                    fd: Arc::clone(&doorbell.fd),
                });
            }
        }
    }

    fn free_parts(&self, wanted: AddrRange) -> Vec<AddrRange> {
        // Painted ranges never overlap. So of the ranges that start before `wanted`, only the last
        // one can reach into it.
        let before = self.painted.range(..wanted.first()).next_back();
        let inside = self.painted.range(wanted.first()..=wanted.last());
        let mut free = Vec::new();
        let mut next = Some(wanted.first());
        for taken in before.into_iter().chain(inside).map(|(_, flat)| flat.range) {
            let Some(from) = next else { break };
            if let Some(gap) = taken
                .first()
                .checked_sub(1)
                .and_then(|last| AddrRange::from_bounds(from, last))
            {
                free.push(gap);
            }
            // `before` may end ahead of `wanted`: `max` keeps the cursor from moving back. `None`
            // means that the last 64-bit address is taken and nothing can be free behind it.
            next = taken.last().checked_add(1).map(|end| end.max(from));
        }
        free.extend(next.and_then(|from| AddrRange::from_bounds(from, wanted.last())));
        free
    }
}

/// The addresses at which a region based at `base` is seen through `clip`.
fn visible(region: &Region, base: i128, clip: AddrRange) -> Option<AddrRange> {
    // At most `DEPTH` offsets of 64 bits add up to `base`, so `i128` cannot overflow. The
    // conversions fail for a region that lies wholly past the last address or before address 0.
    let first = u64::try_from(base.max(0)).ok()?;
    let last = base + i128::from(region.last);
    let last = u64::try_from(last.min(i128::from(u64::MAX))).ok()?;
    AddrRange::from_bounds(first, last)?.intersection(clip)
}

/// The offset, in a region based at `base`, that is at `addr`, which the region covers.
fn offset_of(addr: u64, base: i128) -> u64 {
    u64::try_from(i128::from(addr) - base).unwrap_or(u64::MAX)
}

fn moved(slice: &RamSlice, by: u64) -> RamSlice {
    RamSlice {
        block: Arc::clone(&slice.block),
        offset: slice.offset.saturating_add(by),
    }
}
