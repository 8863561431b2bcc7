//! The reset line of a PC's keyboard controller (i8042): `reboot=k` of Linux.

use memory::DeviceOps;

use crate::power::{PowerEvent, PowerEvents};

/// Pulse the reset line.
const RESET: u8 = 0xfe;

/// Port 0x64 of a keyboard controller without a keyboard: its status reads as nothing to do, and
/// of its commands only the reset is known.
pub struct KeyboardReset {
    events: Box<PowerEvents>,
}

impl KeyboardReset {
    /// Tells `events` of a reset.
    pub fn new(events: impl Fn(PowerEvent) + Send + Sync + 'static) -> Self {
        Self {
            events: Box::new(events),
        }
    }
}

impl DeviceOps for KeyboardReset {
    fn read(&self, _: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn write(&self, _: u64, data: &[u8]) {
        if data == [RESET] {
            (self.events)(PowerEvent::Reset);
        }
    }
}
