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
use kvm_ioctls::VmFd;
use memory::{
    AddrRange, FlatRange, FlatView, MemoryListener, PAGE_SIZE, RamSlice, Refusal, Target,
    ViewChange,
};
use parking_lot::Mutex;

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

/// What a batch does.
#[derive(Debug, PartialEq)]
struct Plan {
    /// Indices into the slots in force.
    remove: Vec<usize>,
    add: Vec<Slot>,
}

fn plan(in_force: &[Option<Slot>], wanted: &[Slot]) -> Plan {
    let stays = |slot: &Slot| {
        wanted
            .binary_search_by_key(&slot.range, |w| w.range)
            .is_ok_and(|i| wanted[i] == *slot)
    };
    let remove = (0..in_force.len())
        .filter(|&i| in_force[i].as_ref().is_some_and(|slot| !stays(slot)))
        .collect();
    let add = wanted
        .iter()
        .filter(|w| !in_force.iter().flatten().any(|slot| slot == *w))
        .cloned();
    Plan {
        remove,
        add: add.collect(),
    }
}

/// What the slots cost so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SlotStats {
    /// `KVM_SET_USER_MEMORY_REGION`s.
    pub ioctls: u64,
    /// Batches for which the gate was closed.
    pub gate_closings: u64,
}

#[derive(Default)]
struct State {
    /// By slot number.
    slots: Vec<Option<Slot>>,
    log_dirty: bool,
    stats: SlotStats,
}

/// The memory listener that keeps a VM's memslots.
pub struct MemSlots {
    vm: Arc<VmFd>,
    gate: Arc<Gate>,
    capabilities: Capabilities,
    state: Mutex<State>,
    /// Leaves the gate open, to show what it is for.
    #[cfg(test)]
    ungated: std::sync::atomic::AtomicBool,
}

impl MemSlots {
    pub(crate) fn new(vm: Arc<VmFd>, gate: Arc<Gate>, capabilities: Capabilities) -> Self {
        Self {
            vm,
            gate,
            capabilities,
            state: Mutex::new(State::default()),
            #[cfg(test)]
            ungated: std::sync::atomic::AtomicBool::new(false),
        }
    }

    /// What the slots cost so far.
    pub fn stats(&self) -> SlotStats {
        self.state.lock().stats
    }

    /// Starts or stops the logging of what the guest writes. The bits arrive in the RAM blocks'
    /// dirty bitmaps by [`MemSlots::harvest`], and by themselves when a slot goes.
    ///
    /// # Errors
    /// When KVM refuses for a slot; those before it are switched.
    pub fn log_dirty(&self, on: bool) -> Result<(), KvmError> {
        let mut state = self.state.lock();
        state.log_dirty = on;
        for number in 0..state.slots.len() {
            if let Some(slot) = state.slots[number].clone() {
                slot.slice.block.dirty().set_enabled(on);
                self.set(&mut state, number, Some(&slot), slot.range)?;
            }
        }
        Ok(())
    }

    /// Takes what the guest wrote since the last time to the RAM blocks' dirty bitmaps.
    ///
    /// # Errors
    /// When KVM does not tell.
    pub fn harvest(&self) -> Result<(), KvmError> {
        let state = self.state.lock();
        let logged = || state.slots.iter().enumerate().filter(|_| state.log_dirty);
        for (number, slot) in logged() {
            if let Some(slot) = slot {
                self.harvest_slot(number, slot)?;
            }
        }
        Ok(())
    }

    fn harvest_slot(&self, number: usize, slot: &Slot) -> Result<(), KvmError> {
        if slot.readonly {
            // The guest writes nothing to it, so KVM keeps no log.
            return Ok(());
        }
        let len = usize::try_from(slot.range.len().unwrap_or(0)).unwrap_or(0);
        let number = u32::try_from(number).unwrap_or(u32::MAX);
        let bits = self
            .vm
            .get_dirty_log(number, len)
            .map_err(KvmError::new(format!(
                "tell what was written at {}",
                slot.range
            )))?;
        let first = usize::try_from(slot.slice.offset / PAGE_SIZE).unwrap_or(usize::MAX);
        slot.slice.block.dirty().merge(first, &bits);
        Ok(())
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
        let gated = !plan.remove.is_empty();
        #[cfg(test)]
        let gated = gated && !self.ungated.load(std::sync::atomic::Ordering::Relaxed);
        let closed = gated.then(|| self.gate.close());
        state.stats.gate_closings += u64::from(closed.is_some());
        for number in plan.remove {
            let Some(slot) = state.slots.get(number).cloned().flatten() else {
                continue;
            };
            if state.log_dirty {
                self.harvest_slot(number, &slot)?;
            }
            self.set(state, number, None, slot.range)?;
            // Not before KVM has let go of it: as long as the guest can reach the memory, we own it.
            state.slots[number] = None;
        }
        for slot in plan.add {
            let number = match state.slots.iter().position(Option::is_none) {
                Some(free) => free,
                None => {
                    state.slots.push(None);
                    state.slots.len() - 1
                }
            };
            if state.log_dirty {
                slot.slice.block.dirty().set_enabled(true);
            }
            self.set(state, number, Some(&slot), slot.range)?;
            state.slots[number] = Some(slot);
        }
        Ok(())
    }
}

impl MemoryListener for MemSlots {
    fn prepare(&self, change: &ViewChange) -> Result<(), Refusal> {
        let slots = wanted(&change.new, self.capabilities.readonly_memory);
        for slot in &slots {
            let parts = [
                slot.range.first(),
                slot.range.len().unwrap_or(1),
                slot.slice.offset,
            ];
            if parts.iter().any(|part| !part.is_multiple_of(PAGE_SIZE)) {
                return Err(Refusal::at(
                    slot.range,
                    "RAM must start and end at page boundaries",
                ));
            }
        }
        if slots.len() > self.capabilities.max_memslots {
            let (needed, most) = (slots.len(), self.capabilities.max_memslots);
            return Err(Refusal::new(format!(
                "the map needs {needed} memslots, and KVM has {most}"
            )));
        }
        Ok(())
    }

    fn apply(&self, change: &ViewChange) -> Result<(), Refusal> {
        let mut state = self.state.lock();
        let plan = plan(
            &state.slots,
            &wanted(&change.new, self.capabilities.readonly_memory),
        );
        self.apply_plan(&mut state, plan)
            .map_err(|error| Refusal::new(error.to_string()))
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
