//! Memslots: KVM's copy of where RAM is, kept in step with the flat view.
//!
//! One commit becomes one batch. What both maps show alike is not touched, also where the flat
//! view splits it differently: neighbours that continue each other in the same RAM block are one
//! slot. KVM can only remove and add, so a split, a merge and a move remove what was there. While
//! a batch removes anything, the [`Gate`] keeps the vCPUs out, and what they wrote to the slots
//! that go is taken to the RAM blocks' dirty bitmaps first.

use std::fmt;
use std::sync::Arc;

use kvm_bindings::{KVM_MEM_LOG_DIRTY_PAGES, KVM_MEM_READONLY, kvm_userspace_memory_region};
use kvm_ioctls::{VcpuFd, VmFd};
use memory::{
    AddrRange, FlatRange, FlatView, ListenerError, MemoryListener, PAGE_SIZE, RamSlice, Target,
    ViewChange,
};
use parking_lot::Mutex;

use crate::dirty::{Rings, Tracking, Written, clear_log};
use crate::gate::Gate;
use crate::kvm::{Capabilities, KvmError};

/// RAM that one slot shows the guest.
#[derive(Clone, Debug, PartialEq)]
struct Slot {
    range: AddrRange,
    slice: RamSlice,
    readonly: bool,
}

impl Slot {
    fn of(flat: &FlatRange, readonly_memory: bool) -> Option<Self> {
        match &flat.target {
            Target::Ram(slice) => Some(Self {
                range: flat.range,
                slice: slice.clone(),
                readonly: false,
            }),
            // Without read-only slots, ROM is emulated: slow, and right.
            Target::Rom(slice) if readonly_memory => Some(Self {
                range: flat.range,
                slice: slice.clone(),
                readonly: true,
            }),
            Target::Rom(_) | Target::Device(_) => None,
        }
    }

    fn is_continued_by(&self, next: &Self) -> bool {
        self.range.is_followed_by(next.range)
            && self.readonly == next.readonly
            && Arc::ptr_eq(&self.slice.block, &next.slice.block)
            && next.slice.offset.checked_sub(self.slice.offset) == self.range.len()
    }

    fn joined(&self, next: &Self) -> Option<Self> {
        let range = AddrRange::from_bounds(self.range.first(), next.range.last())?;
        Some(Self {
            range,
            ..self.clone()
        })
    }
}

/// The slots that show this view: as few as can be, ascending.
fn wanted(view: &FlatView, readonly_memory: bool) -> Vec<Slot> {
    let mut slots: Vec<Slot> = Vec::new();
    for next in view
        .ranges()
        .iter()
        .filter_map(|flat| Slot::of(flat, readonly_memory))
    {
        let joined = slots.last().filter(|last| last.is_continued_by(&next));
        match joined.and_then(|last| last.joined(&next)) {
            Some(joined) => {
                slots.pop();
                slots.push(joined);
            }
            None => slots.push(next),
        }
    }
    slots
}

/// The operations of a batch.
#[derive(Debug, PartialEq)]
struct Plan {
    /// Indices into the slots in force.
    remove: Vec<usize>,
    add: Vec<Slot>,
}

fn plan(in_force: &[Option<Slot>], wanted: &[Slot]) -> Plan {
    let mut numbers: Vec<(usize, &Slot)> = in_force
        .iter()
        .enumerate()
        .filter_map(|(number, slot)| Some((number, slot.as_ref()?)))
        .collect();
    // Slot numbers are reused, so their order is not the order of addresses. Both binary searches
    // below need lists sorted by range; `wanted` already is.
    numbers.sort_unstable_by_key(|(_, slot)| slot.range);
    let stays = |slot: &Slot| {
        wanted
            .binary_search_by_key(&slot.range, |w| w.range)
            .is_ok_and(|i| wanted[i] == *slot)
    };
    let is_there = |slot: &&Slot| {
        numbers
            .binary_search_by_key(&slot.range, |(_, there)| there.range)
            .is_ok_and(|i| numbers[i].1 == *slot)
    };
    let goes = numbers.iter().filter(|(_, slot)| !stays(slot));
    Plan {
        remove: goes.map(|(number, _)| *number).collect(),
        add: wanted.iter().filter(|w| !is_there(w)).cloned().collect(),
    }
}

/// Counters of memslot operations.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SlotStats {
    /// `KVM_SET_USER_MEMORY_REGION`s.
    pub ioctls: u64,
    /// Batches for which the gate was closed.
    pub gate_closings: u64,
    /// Ioctls that read or cleared dirty logs.
    pub dirty_ioctls: u64,
}

#[derive(Default)]
struct State {
    /// By slot number.
    slots: Vec<Option<Slot>>,
    /// Numbers of slots that went.
    free: Vec<usize>,
    log_dirty: bool,
    stats: SlotStats,
}

/// The memory listener that keeps a VM's memslots.
pub struct MemSlots {
    vm: Arc<VmFd>,
    gate: Arc<Gate>,
    capabilities: Capabilities,
    tracking: Tracking,
    state: Mutex<State>,
    /// Leaves the gate open, to show what it is for.
    #[cfg(test)]
    ungated: std::sync::atomic::AtomicBool,
}

impl MemSlots {
    pub(crate) fn new(
        vm: Arc<VmFd>,
        gate: Arc<Gate>,
        capabilities: Capabilities,
        tracking: Tracking,
    ) -> Self {
        Self {
            vm,
            gate,
            capabilities,
            tracking,
            state: Mutex::new(State::default()),
            #[cfg(test)]
            ungated: std::sync::atomic::AtomicBool::new(false),
        }
    }

    /// Returns the counters.
    pub fn stats(&self) -> SlotStats {
        self.state.lock().stats
    }

    /// Starts or stops the tracking of what the guest writes. When it starts, every page counts as
    /// written; from then on what is written arrives in the RAM blocks' dirty bitmaps by
    /// [`MemSlots::harvest`], and by itself when a slot goes. Stopping harvests once more.
    ///
    /// # Errors
    /// Fails if KVM refuses; then tracking is as it was before.
    pub fn track_dirty(&self, on: bool) -> Result<(), KvmError> {
        // Take the bits while KVM still has them: without KVM_MEM_LOG_DIRTY_PAGES it frees the
        // bitmap. `harvest` takes the lock itself, so this happens before we take it.
        if !on {
            self.harvest()?;
        }
        let mut state = self.state.lock();
        if state.log_dirty == on {
            if on {
                let slots = state.slots.iter().flatten();
                slots.for_each(|slot| slot.slice.block.dirty().mark_all());
            }
            return Ok(());
        }
        let switched = self.switch(&mut state, on);
        if switched.is_err() {
            // Those that were switched go back; the one that refused never was.
            let _ = self.switch(&mut state, !on);
        }
        switched
    }

    fn switch(&self, state: &mut State, on: bool) -> Result<(), KvmError> {
        // `set` derives the flags from this field, so it changes before the first slot does.
        state.log_dirty = on;
        for number in 0..state.slots.len() {
            let Some(slot) = state.slots[number].clone() else {
                continue;
            };
            let dirty = slot.slice.block.dirty();
            // A bitmap that is off ignores marks. So switch it on before KVM starts to log, and off
            // only after KVM has stopped.
            if on && !dirty.is_enabled() {
                dirty.set_enabled(true);
                dirty.mark_all();
            }
            self.set(state, number, Some(&slot), slot.range)?;
            if !on {
                dirty.set_enabled(false);
            }
        }
        Ok(())
    }

    /// Moves the dirty bits since the last harvest from KVM to the RAM blocks' dirty bitmaps. A page
    /// whose bit is set there may have been written again by the time it is read; then the next
    /// harvest has it once more.
    ///
    /// # Errors
    /// Fails if KVM refuses.
    pub fn harvest(&self) -> Result<(), KvmError> {
        // A commit may add slots while the loop below releases the lock. The next harvest covers
        // those; a slot that goes is harvested by the batch that removes it.
        let count = self.state.lock().slots.len();
        match &self.tracking {
            Tracking::Ring(rings) => {
                let mut state = self.state.lock();
                self.harvest_rings(&mut state, rings)
            }
            // One slot after the other, so that a commit need not wait for all of them.
            Tracking::Log { .. } => (0..count).try_for_each(|number| {
                let mut state = self.state.lock();
                if state.log_dirty
                    && let Some(Some(slot)) = state.slots.get(number).cloned()
                {
                    self.harvest_log(&mut state, number, &slot)?;
                }
                Ok(())
            }),
        }
    }

    /// A vCPU's ring is full.
    pub(crate) fn empty_rings(&self) -> Result<(), KvmError> {
        match &self.tracking {
            Tracking::Ring(rings) => self.harvest_rings(&mut self.state.lock(), rings),
            Tracking::Log { .. } => Ok(()),
        }
    }

    /// Prepares for a new vCPU.
    pub(crate) fn add_vcpu(&self, vcpu: &VcpuFd) -> Result<(), KvmError> {
        match &self.tracking {
            Tracking::Ring(rings) => rings.add(vcpu),
            Tracking::Log { .. } => Ok(()),
        }
    }

    /// Marks the pages of all ring entries. Slots change only under the lock, and rings are emptied
    /// before a slot is removed, so the slot numbers in the entries are those in force.
    fn harvest_rings(&self, state: &mut State, rings: &Rings) -> Result<(), KvmError> {
        let written = rings.take()?;
        state.stats.dirty_ioctls += u64::from(!written.is_empty());
        for Written { slot, page } in written {
            let slot = usize::try_from(slot)
                .ok()
                .and_then(|slot| state.slots.get(slot));
            let Some(Some(Slot { slice, .. })) = slot else {
                continue;
            };
            let page = page.saturating_add(slice.offset / PAGE_SIZE);
            let offset = page.saturating_mul(PAGE_SIZE);
            if let Ok(offset) = usize::try_from(offset) {
                slice.block.dirty().mark(offset, 1);
            }
        }
        Ok(())
    }

    fn harvest_log(&self, state: &mut State, number: usize, slot: &Slot) -> Result<(), KvmError> {
        if slot.readonly {
            // The guest writes nothing to it, so KVM keeps no log.
            return Ok(());
        }
        let attempt = || format!("read the dirty log of {}", slot.range);
        let len = usize::try_from(slot.range.len().unwrap_or(0)).unwrap_or(0);
        let number = u32::try_from(number).unwrap_or(u32::MAX);
        state.stats.dirty_ioctls += 1;
        let bits = self.vm.get_dirty_log(number, len);
        let mut bits = bits.map_err(KvmError::new(attempt()))?;
        let first = usize::try_from(slot.slice.offset / PAGE_SIZE).unwrap_or(usize::MAX);
        // Merge before the clear: KVM forgets the bits as it clears them, and an error in the
        // middle of a clear must not lose any.
        slot.slice.block.dirty().merge(first, &bits);
        // Clear before the caller copies the pages. A write between the two ioctls hits a page
        // whose bit we already have, and the copy contains it. A write after the clear faults and
        // sets the bit again. If the copy came before the clear, a write between them would be
        // lost.
        if matches!(self.tracking, Tracking::Log { manual: true, .. }) {
            state.stats.dirty_ioctls += 1;
            let pages = len / PAGE_SIZE as usize;
            clear_log(&self.vm, number, pages, &mut bits).map_err(KvmError::new(attempt()))?;
        }
        Ok(())
    }

    /// Clears the log of a new slot. KVM starts it with all bits set; while the gate is closed, and with
    /// all earlier writes in the RAM block's bitmap, those bits would only repeat pages.
    fn begin_log(&self, number: usize, slot: &Slot) -> Result<(), KvmError> {
        let all_set = matches!(
            self.tracking,
            Tracking::Log {
                initially_set: true,
                ..
            }
        );
        if !all_set || slot.readonly {
            return Ok(());
        }
        let len = usize::try_from(slot.range.len().unwrap_or(0)).unwrap_or(0);
        let pages = len / PAGE_SIZE as usize;
        let number = u32::try_from(number).unwrap_or(u32::MAX);
        // KVM only acts on bits that are set in its own log, so the bits past the last page of the
        // slot do no harm.
        clear_log(&self.vm, number, pages, &mut vec![!0; pages.div_ceil(64)]).map_err(
            KvmError::new(format!("start the dirty log of {}", slot.range)),
        )
    }

    /// Sets or, with `None`, removes the slot of this number.
    fn set(
        &self,
        state: &mut State,
        number: usize,
        slot: Option<&Slot>,
        range: AddrRange,
    ) -> Result<(), KvmError> {
        let mut region = kvm_userspace_memory_region {
            slot: u32::try_from(number).unwrap_or(u32::MAX),
            guest_phys_addr: range.first(),
            ..Default::default()
        };
        if let Some(slot) = slot {
            let offset = usize::try_from(slot.slice.offset).unwrap_or(usize::MAX);
            region.userspace_addr =
                slot.slice.block.host_addr().addr().saturating_add(offset) as u64;
            region.memory_size = range.len().unwrap_or(0);
            region.flags = if slot.readonly { KVM_MEM_READONLY } else { 0 }
                | if state.log_dirty && !slot.readonly {
                    KVM_MEM_LOG_DIRTY_PAGES
                } else {
                    0
                };
        }
        state.stats.ioctls += 1;
        // SAFETY: the slice is within its block (topologies check that), whose mapping lives as
        // long as `state.slots` owns the block, and the slot is removed before that ends.
        unsafe { self.vm.set_user_memory_region(region) }.map_err(KvmError::new(format!(
            "{} the memslot for {range}",
            if slot.is_some() { "set" } else { "remove" }
        )))
    }

    fn apply_plan(&self, state: &mut State, plan: Plan) -> Result<(), KvmError> {
        // A batch that only adds needs no gate: the guest sees more memory and never a hole.
        let gated = !plan.remove.is_empty();
        #[cfg(test)]
        let gated = gated && !self.ungated.load(std::sync::atomic::Ordering::Relaxed);
        let closed = gated.then(|| self.gate.close());
        state.stats.gate_closings += u64::from(closed.is_some());
        // Entries name slots by number. After this batch a number may belong to another RAM block,
        // and an old entry would mark the wrong page. With the gate closed no vCPU adds entries
        // after this harvest.
        if let (Tracking::Ring(rings), true, true) =
            (&self.tracking, state.log_dirty, !plan.remove.is_empty())
        {
            self.harvest_rings(state, rings)?;
        }
        // All removals come before all additions: KVM refuses a slot that overlaps an existing one
        // with EEXIST, and it cannot change the size of a slot or its host address.
        for number in plan.remove {
            let Some(slot) = state.slots.get(number).cloned().flatten() else {
                continue;
            };
            // KVM frees the log together with the slot. The vCPUs are out, so nothing is written
            // between this harvest and the removal.
            if state.log_dirty && matches!(self.tracking, Tracking::Log { .. }) {
                self.harvest_log(state, number, &slot)?;
            }
            self.set(state, number, None, slot.range)?;
            // Not before KVM has let go of it: as long as the guest can reach the memory, we own it.
            state.slots[number] = None;
            state.free.push(number);
        }
        for slot in plan.add {
            let number = state.free.pop().unwrap_or(state.slots.len());
            if number == state.slots.len() {
                state.slots.push(None);
            }
            let dirty = slot.slice.block.dirty();
            if state.log_dirty && !dirty.is_enabled() {
                // Memory that no harvest has covered yet.
                dirty.set_enabled(true);
                dirty.mark_all();
            }
            if let Err(error) = self.set(state, number, Some(&slot), slot.range) {
                state.free.push(number);
                return Err(error);
            }
            // At once, before anything else can fail: from here on the guest can reach the memory,
            // so the slot must own its RAM block.
            state.slots[number] = Some(slot.clone());
            // Only while the gate is closed. If it is open, the guest may write between the two
            // ioctls, and the clear would drop that bit. Then the bits stay set: the next harvest
            // reports more pages than were written, which costs time but loses nothing.
            if state.log_dirty && closed.is_some() {
                self.begin_log(number, &slot)?;
            }
        }
        Ok(())
    }
}

impl MemoryListener for MemSlots {
    fn prepare(&self, change: &ViewChange) -> Result<(), ListenerError> {
        // KVM would refuse these slots too, but only in `apply`, where earlier slots of the batch
        // may already be gone. A refusal here leaves the map as it was.
        let slots = wanted(&change.new, self.capabilities.readonly_memory);
        for slot in &slots {
            let parts = [
                slot.range.first(),
                slot.range.len().unwrap_or(1),
                slot.slice.offset,
            ];
            if parts.iter().any(|part| !part.is_multiple_of(PAGE_SIZE)) {
                return Err(ListenerError::at(
                    slot.range,
                    "RAM must start and end at page boundaries",
                ));
            }
        }
        if slots.len() > self.capabilities.max_memslots {
            let (needed, most) = (slots.len(), self.capabilities.max_memslots);
            return Err(ListenerError::new(format!(
                "the memory map needs {needed} memslots, and KVM supports {most}"
            )));
        }
        Ok(())
    }

    fn apply(&self, change: &ViewChange) -> Result<(), ListenerError> {
        let mut state = self.state.lock();
        let plan = plan(
            &state.slots,
            &wanted(&change.new, self.capabilities.readonly_memory),
        );
        self.apply_plan(&mut state, plan)
            .map_err(|error| ListenerError::new(error.to_string()))
    }
}

impl fmt::Debug for MemSlots {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list()
            .entries(self.state.lock().slots.iter().flatten())
            .finish()
    }
}

#[cfg(test)]
mod tests;
