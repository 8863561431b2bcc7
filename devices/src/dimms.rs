//! Memory hotplug through ACPI (ACPI 6.5, 9.11 and 6.3): the registers by which the guest's AML finds
//! out which memory devices are plugged and where, which came, and by which the guest says how it
//! fared.
//!
//! | port | | |
//! |---|---|---|
//! | 16 n | read | guest address of the memory in slot n, 64 bits |
//! | 16 n + 8 | read | its bytes, 64 bits; 0: the slot is empty |
//! | [`EVENT`] | read | takes the next notification: slot in bits 0-15, code in bits 16-23; 0: none |
//! | [`STATUS`] | write | `_OST`: slot in bits 0-15, code in bits 16-23, status in bits 24-31 |
//!
//! The last two have 32 bits; accesses of another width do nothing. Slots are filled in order, from
//! the start of the region without gaps, and stay: no guest gives memory back through ACPI. So no
//! access of a guest changes what is plugged, only what its owner knows of it.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use memory::{AddrRange, DeviceOps};
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use state::{Load, LoadError, LoadScope, Save, SaveError, Saved, Scope};

/// Slots of a machine, as many as Cloud Hypervisor has.
pub const SLOTS: usize = 8;
/// Bytes in multiples of which memory is plugged: a memory section of Linux on x86.
pub const UNIT: u64 = 128 << 20;
/// Bytes of a slot's registers.
pub const SLOT_LEN: u64 = 16;
/// Offset of the register that takes the next notification.
pub const EVENT: u64 = SLOTS as u64 * SLOT_LEN;
/// Offset of the register for the arguments of `_OST`.
pub const STATUS: u64 = EVENT + 4;
/// Bytes of the registers.
pub const LEN: u64 = STATUS + 4;
/// Notification code: look whether the memory is there (ACPI 6.5, table 5.193).
pub const DEVICE_CHECK: u8 = 1;

/// `_OST` statuses (ACPI 6.5, tables 6.65 and 6.67).
const SUCCESS: u8 = 0;
const INSERTION_IN_PROGRESS: u8 = 0x80;

/// How far the guest is with the memory of a slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    /// The guest has not taken the notification.
    Inserted,
    /// The guest was notified and has not answered.
    Offered,
    /// The guest refused it.
    Refused,
    /// The guest has it.
    Accepted,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Slot {
    /// From the start of the region.
    offset: u64,
    len: u64,
    stage: Stage,
}

/// A guest's answer that it does not use memory that was plugged.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DimmRefusal {
    /// The slot.
    pub slot: u32,
    /// The status that the guest gave with `_OST`.
    pub status: u8,
}

/// Memory that cannot be plugged.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DimmError {
    /// The size.
    #[error("{0} bytes are not a positive multiple of {UNIT} bytes")]
    Unaligned(u64),
    /// The region.
    #[error("{wanted} bytes are more than the {left} bytes that are left for hotplugged memory")]
    NoRoom {
        /// The bytes that were to be plugged.
        wanted: u64,
        /// The bytes that can be plugged.
        left: u64,
    },
    /// The slots.
    #[error(
        "all {SLOTS} slots for hotplugged memory are used: after a reboot the memory takes one slot"
    )]
    NoSlot,
}

#[derive(Debug, Default)]
struct State {
    slots: Vec<Slot>,
    refusals: Vec<DimmRefusal>,
}

/// The registers. Interrupting the guest, so that it reads them, is the caller's.
pub struct DimmBlock {
    region: AddrRange,
    state: Mutex<State>,
    /// Bytes that the guest has accepted.
    accepted: Arc<AtomicU64>,
    changed: Box<dyn Fn() + Send + Sync>,
}

impl DimmBlock {
    /// Makes the registers of a machine with room for hotplugged memory in `region`, of which the
    /// guest has the first `boot` bytes from the start, in one slot. Calls `changed` when the guest
    /// has accepted or refused memory.
    ///
    /// # Errors
    /// `boot` is no multiple of [`UNIT`], or more than the region has.
    pub fn new(
        region: AddrRange,
        boot: u64,
        changed: impl Fn() + Send + Sync + 'static,
    ) -> Result<Self, DimmError> {
        let block = Self {
            region,
            state: Mutex::default(),
            accepted: Arc::default(),
            changed: Box::new(changed),
        };
        if boot > 0 {
            // In one slot, however the memory came: after a reboot the slots of before are free
            // again.
            block.plug(boot)?;
            // A guest finds this one when it boots, and answers no notification.
            let mut state = block.state.lock();
            state
                .slots
                .iter_mut()
                .for_each(|slot| slot.stage = Stage::Accepted);
            block.count(&state);
        }
        Ok(block)
    }

    /// The range of guest addresses in which memory is plugged.
    pub fn region(&self) -> AddrRange {
        self.region
    }

    /// Bytes that the guest has accepted: what is there to be read changes with it.
    pub fn accepted(&self) -> &Arc<AtomicU64> {
        &self.accepted
    }

    /// The memory of each slot that is not empty, as its offset in the region and its bytes.
    pub fn plugged(&self) -> Vec<(u64, u64)> {
        let state = self.state.lock();
        state
            .slots
            .iter()
            .map(|slot| (slot.offset, slot.len))
            .collect()
    }

    /// Bytes that are plugged, whether the guest uses them or not.
    pub fn plugged_len(&self) -> u64 {
        self.state.lock().len()
    }

    /// Returns where `len` more bytes would be plugged, as an offset in the region.
    ///
    /// # Errors
    /// They cannot be plugged.
    pub fn check(&self, len: u64) -> Result<u64, DimmError> {
        self.check_in(&self.state.lock(), len)
    }

    fn check_in(&self, state: &State, len: u64) -> Result<u64, DimmError> {
        // Linux onlines whole sections: the rest of a smaller device would be lost to it.
        if len == 0 || !len.is_multiple_of(UNIT) {
            return Err(DimmError::Unaligned(len));
        }
        let offset = state.len();
        // `len` is `None` for all 2^64 bytes, which no hotplug region has: 0 refuses that, too.
        let left = self.region.len().unwrap_or(0).saturating_sub(offset);
        if len > left {
            return Err(DimmError::NoRoom { wanted: len, left });
        }
        if state.slots.len() >= SLOTS {
            return Err(DimmError::NoSlot);
        }
        Ok(offset)
    }

    /// Fills the next slot with `len` bytes, which the memory map has by now.
    ///
    /// # Errors
    /// They cannot be plugged; then nothing has changed.
    pub fn plug(&self, len: u64) -> Result<(), DimmError> {
        let mut state = self.state.lock();
        let offset = self.check_in(&state, len)?;
        let stage = Stage::Inserted;
        // The check and the push are under one lock, so two requests cannot take the same place.
        state.slots.push(Slot { offset, len, stage });
        Ok(())
    }

    /// Has the guest be notified again of all memory that it has not accepted. Returns whether there
    /// is any.
    pub fn offer_again(&self) -> bool {
        let mut state = self.state.lock();
        let mut open = false;
        for slot in &mut state.slots {
            if slot.stage != Stage::Accepted {
                slot.stage = Stage::Inserted;
                open = true;
            }
        }
        open
    }

    /// Whether the guest has yet to answer for a slot.
    pub fn is_open(&self) -> bool {
        let state = self.state.lock();
        let mut stages = state.slots.iter().map(|slot| slot.stage);
        stages.any(|stage| matches!(stage, Stage::Inserted | Stage::Offered))
    }

    /// Takes the refusals of the guest since the last call, at most one for each notification.
    pub fn take_refusals(&self) -> Vec<DimmRefusal> {
        std::mem::take(&mut self.state.lock().refusals)
    }

    fn count(&self, state: &State) {
        let accepted = state.slots.iter();
        let accepted = accepted.filter(|slot| slot.stage == Stage::Accepted);
        self.accepted
            .store(accepted.map(|slot| slot.len).sum(), Ordering::Release);
    }
}

impl State {
    fn len(&self) -> u64 {
        self.slots.last().map_or(0, |slot| slot.offset + slot.len)
    }

    fn next_event(&mut self) -> u32 {
        let mut slots = (0_u32..).zip(&mut self.slots);
        let next = slots.find(|(_, slot)| slot.stage == Stage::Inserted);
        next.map_or(0, |(index, slot)| {
            // A notification is taken once. The guest answers it by `_OST`; a guest that crashes in
            // between stays at `Offered` until the owner offers the memory again.
            slot.stage = Stage::Offered;
            u32::from(DEVICE_CHECK) << 16 | index
        })
    }

    /// Returns whether the answer changes what the guest has.
    fn answer(&mut self, value: u32) -> bool {
        let [_, _, code, status] = value.to_le_bytes();
        let index = value & 0xffff;
        let slot = usize::try_from(index).ok();
        let slot = slot.and_then(|index| self.slots.get_mut(index));
        // Only to the last notification, which the guest has taken.
        let Some(slot) = slot.filter(|slot| slot.stage == Stage::Offered) else {
            return false;
        };
        match (code, status) {
            (DEVICE_CHECK, SUCCESS) => slot.stage = Stage::Accepted,
            (DEVICE_CHECK, INSERTION_IN_PROGRESS) => return false,
            (DEVICE_CHECK, status) => {
                slot.stage = Stage::Refused;
                // At most one for each notification, which the owner's request comes before.
                self.refusals.push(DimmRefusal {
                    slot: index,
                    status,
                });
            }
            _ => return false,
        }
        true
    }

    /// A guest that reads where a slot's memory is before it takes the notification has found the
    /// memory by itself, as Linux does when it boots. Linux then answers the notification with a
    /// failure, since the device is there already, and none is due.
    fn found(&mut self, index: usize) -> bool {
        let slot = self.slots.get_mut(index);
        let Some(slot) = slot.filter(|slot| slot.stage == Stage::Inserted) else {
            return false;
        };
        slot.stage = Stage::Accepted;
        true
    }
}

impl DeviceOps for DimmBlock {
    fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        let mut state = self.state.lock();
        if offset == EVENT {
            if let Ok(data) = <&mut [u8; 4]>::try_from(data) {
                *data = state.next_event().to_le_bytes();
            }
            return;
        }
        let slot = usize::try_from(offset / SLOT_LEN).unwrap_or(usize::MAX);
        let within = usize::try_from(offset % SLOT_LEN).unwrap_or(0);
        // An empty slot reads as zeros, which `_STA` takes for no device.
        let Some(Slot { offset, len, .. }) = state.slots.get(slot) else {
            return;
        };
        let mut registers = [0; SLOT_LEN as usize];
        // The sum is in the region: `check_in` accepted the slot.
        registers[..8].copy_from_slice(&(self.region.first() + offset).to_le_bytes());
        registers[8..].copy_from_slice(&len.to_le_bytes());
        // An access that crosses into the next slot sees zeros there.
        let registers = registers.get(within..).unwrap_or_default();
        data.iter_mut()
            .zip(registers)
            .for_each(|(to, from)| *to = *from);
        let is_change = within < 8 && state.found(slot);
        if is_change {
            self.count(&state);
            drop(state);
            (self.changed)();
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let Ok(value) = <[u8; 4]>::try_from(data).map(u32::from_le_bytes) else {
            return;
        };
        let mut state = self.state.lock();
        if offset != STATUS || !state.answer(value) {
            return;
        }
        self.count(&state);
        drop(state);
        (self.changed)();
    }
}

/// Saved state, version 1. Frozen.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct V1 {
    /// Guest address of the region.
    addr: u64,
    /// Bytes in each slot, in order.
    sizes: Vec<u64>,
    /// Plugged slots of which the guest was not notified yet.
    inserted: Vec<u32>,
    /// Slots of which the guest was notified and has not answered yet.
    offered: Vec<u32>,
    /// Slots whose memory the guest refused.
    refused: Vec<u32>,
}

impl Saved for V1 {
    const VERSION: u16 = 1;
}

impl Save for DimmBlock {
    fn save(&self, to: &mut Scope<'_>) -> Result<(), SaveError> {
        let state = self.state.lock();
        let list = |stage: Stage| {
            let slots = (0_u32..).zip(&state.slots);
            let of_stage = slots.filter(|(_, slot)| slot.stage == stage);
            of_stage.map(|(index, _)| index).collect()
        };
        to.put(&V1 {
            addr: self.region.first(),
            sizes: state.slots.iter().map(|slot| slot.len).collect(),
            inserted: list(Stage::Inserted),
            offered: list(Stage::Offered),
            refused: list(Stage::Refused),
        })
    }
}

impl Load for &DimmBlock {
    fn load(&mut self, from: &mut LoadScope<'_, '_>, _: &mut ()) -> Result<(), LoadError> {
        let saved: V1 = from.take()?;
        // The guest knows the memory by its address: at another one it would use what is not there.
        if saved.addr != self.region.first() {
            let (there, here) = (saved.addr, self.region.first());
            let why = format!("hotplugged memory at {there:#x}, which is at {here:#x} here");
            return Err(from.refuse(why));
        }
        let mut state = State::default();
        for len in saved.sizes {
            // The same checks as for a request: a file cannot plug more than the region has, nor
            // more slots than there are registers.
            let checked = self.check_in(&state, len);
            let offset = checked.map_err(|error| from.refuse(error.to_string()))?;
            let stage = Stage::Accepted;
            state.slots.push(Slot { offset, len, stage });
        }
        let lists = [
            (saved.inserted, Stage::Inserted),
            (saved.offered, Stage::Offered),
            (saved.refused, Stage::Refused),
        ];
        for (list, stage) in lists {
            for index in list {
                let slot = usize::try_from(index).ok();
                let slot = slot.and_then(|index| state.slots.get_mut(index));
                // Each slot is in one list at most.
                match slot.filter(|slot| slot.stage == Stage::Accepted) {
                    Some(slot) => slot.stage = stage,
                    None => {
                        let why = format!("slot {index} of hotplugged memory, empty or twice");
                        return Err(from.refuse(why));
                    }
                }
            }
        }
        self.count(&state);
        *self.state.lock() = state;
        Ok(())
    }
}

#[cfg(test)]
mod tests;
