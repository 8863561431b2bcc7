//! PCI hotplug through ACPI (ACPI 6.5, 6.3): the registers by which the guest's AML finds out
//! which slots have a new device or should let go of theirs, and tells when it has. A bit each.
//!
//! | port | | |
//! |---|---|---|
//! | [`INSERTED`] | read | slots that got a device since the last read |
//! | [`WANTED_BACK`] | read | slots that were asked to let go since the last read |
//! | [`EJECT`] | write | slots that the guest has let go of |

use memory::DeviceOps;
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use state::{Load, LoadError, LoadScope, Save, SaveError, Saved, Scope};

/// Bytes of the registers.
pub const LEN: u64 = 12;
/// Offset of the register that lists slots with a new device.
pub const INSERTED: u64 = 0;
/// Offset of the register that lists slots whose devices the guest must eject.
pub const WANTED_BACK: u64 = 4;
/// Offset of the register to which the guest writes the slots that it ejects.
pub const EJECT: u64 = 8;

#[derive(Clone, Copy, Debug, Default)]
struct Slots {
    inserted: u32,
    wanted_back: u32,
}

/// The registers. Interrupting the guest, so that it reads them, is the caller's.
pub struct HotplugBlock {
    slots: Mutex<Slots>,
    ejected: Box<dyn Fn(u8) + Send + Sync>,
}

impl HotplugBlock {
    /// Calls `ejected` with each slot that the guest lets go of, whether it was asked to or not.
    pub fn new(ejected: impl Fn(u8) + Send + Sync + 'static) -> Self {
        Self {
            slots: Mutex::default(),
            ejected: Box::new(ejected),
        }
    }

    /// The slot, a device number from 1 to 31, has a new device.
    pub fn insert(&self, slot: u8) {
        self.slots.lock().inserted |= bit(slot);
    }

    /// The guest should let go of the device in the slot.
    pub fn want_back(&self, slot: u8) {
        self.slots.lock().wanted_back |= bit(slot);
    }
}

fn bit(slot: u8) -> u32 {
    // A slot past 31 sets no bit: the bus has 32 device numbers, and 0 is the host bridge.
    1_u32.checked_shl(slot.into()).unwrap_or(0)
}

impl DeviceOps for HotplugBlock {
    fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        // Reading takes the bits. A read of another width would take bits that it cannot return,
        // and the guest would miss a device.
        let Ok(data) = <&mut [u8; 4]>::try_from(data) else {
            return;
        };
        // AML reads the register in one access, so reading and clearing are one step under the
        // lock: a device that is plugged in between sets its bit for the next read.
        let mut slots = self.slots.lock();
        let register = match offset {
            INSERTED => &mut slots.inserted,
            WANTED_BACK => &mut slots.wanted_back,
            _ => return,
        };
        *data = std::mem::take(register).to_le_bytes();
    }

    fn write(&self, offset: u64, data: &[u8]) {
        if let (EJECT, Ok(slots)) = (offset, <[u8; 4]>::try_from(data)) {
            let slots = u32::from_le_bytes(slots);
            // Slot 0 is the host bridge, which never goes. The owner of the VM checks that it asked
            // for the others: a guest may write here at any time.
            (1..32)
                .filter(|slot| slots & bit(*slot) != 0)
                .for_each(|slot| (self.ejected)(slot));
        }
    }
}

/// Saved state, version 1. Frozen.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct V1 {
    inserted: u32,
    wanted_back: u32,
}

impl Saved for V1 {
    const VERSION: u16 = 1;
}

impl Save for HotplugBlock {
    fn save(&self, to: &mut Scope<'_>) -> Result<(), SaveError> {
        let Slots {
            inserted,
            wanted_back,
        } = *self.slots.lock();
        to.put(&V1 {
            inserted,
            wanted_back,
        })
    }
}

impl Load for &HotplugBlock {
    fn load(&mut self, from: &mut LoadScope<'_, '_>, _: &mut ()) -> Result<(), LoadError> {
        let V1 {
            inserted,
            wanted_back,
        } = from.take()?;
        *self.slots.lock() = Slots {
            inserted,
            wanted_back,
        };
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;

    fn read(block: &HotplugBlock, at: u64) -> u32 {
        let mut data = [0xff; 4];
        block.read(at, &mut data);
        u32::from_le_bytes(data)
    }

    #[test]
    fn change_is_signaled_once() {
        let seen = Arc::new(Mutex::new(Vec::new()));
        let to = Arc::clone(&seen);
        let block = HotplugBlock::new(move |slot| to.lock().push(slot));
        block.insert(3);
        block.insert(31);
        block.want_back(4);
        block.insert(77);
        assert_eq!(read(&block, INSERTED), 1 << 3 | 1 << 31);
        assert_eq!(read(&block, INSERTED), 0);
        assert_eq!(read(&block, WANTED_BACK), 1 << 4);
        assert_eq!(read(&block, WANTED_BACK), 0);
        for odd in [&[0xff][..], &[0xff; 8], &[]] {
            block.write(EJECT, odd);
        }
        block.write(INSERTED, &[0xff; 4]);
        assert!(seen.lock().is_empty());
        // Slot 0 is the host bridge's.
        block.write(EJECT, &0x8000_0011_u32.to_le_bytes());
        assert_eq!(*seen.lock(), [4, 31]);
    }

    #[test]
    fn unseen_changes_are_kept() {
        let block = HotplugBlock::new(|_| {});
        block.insert(1);
        block.want_back(2);
        let mut writer = state::Writer::default();
        block.save(&mut writer.scope("hotplug").unwrap()).unwrap();
        let bytes = writer.finish();
        let other = HotplugBlock::new(|_| {});
        let mut store = state::Store::open(&bytes).unwrap();
        (&other)
            .load(&mut store.scope("hotplug").unwrap(), &mut ())
            .unwrap();
        assert_eq!((read(&other, INSERTED), read(&other, WANTED_BACK)), (2, 4));
    }
}
