//! The two ways to reset a PC besides ACPI: the reset line of its keyboard controller (i8042,
//! `reboot=k` of Linux) and the reset control register of its chipset (port 0xcf9, `reboot=p`).

use std::sync::Arc;

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
        // Firmware and kernels also send commands for a keyboard and a mouse here. Only an exact
        // byte resets: a wider write is no access that a driver of this controller makes.
        if data == [RESET] {
            (self.events)(PowerEvent::Reset);
        }
    }
}

/// The ports of PCI configuration, with the chipset's reset control register among them: a byte at
/// port 0xcf9, where wider accesses belong to PCI's address register.
pub struct ResetControl {
    pci: Arc<dyn DeviceOps>,
    events: Box<PowerEvents>,
}

impl ResetControl {
    /// Place of the register after port 0xcf8.
    const OFFSET: u64 = 1;
    /// Resets the CPUs. Bit 1, written before it, chooses between kinds of reset that are one here.
    const RESET_CPU: u8 = 1 << 2;

    /// Passes accesses on to `pci`, and tells `events` of a reset.
    pub fn new(
        pci: Arc<dyn DeviceOps>,
        events: impl Fn(PowerEvent) + Send + Sync + 'static,
    ) -> Self {
        Self {
            pci,
            events: Box::new(events),
        }
    }
}

impl DeviceOps for ResetControl {
    fn read(&self, offset: u64, data: &mut [u8]) {
        if offset == Self::OFFSET && data.len() == 1 {
            data.fill(0);
        } else {
            self.pci.read(offset, data);
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        match data {
            [value] if offset == Self::OFFSET => {
                if value & Self::RESET_CPU != 0 {
                    (self.events)(PowerEvent::Reset);
                }
            }
            _ => self.pci.write(offset, data),
        }
    }
}

#[cfg(test)]
mod tests {
    use parking_lot::Mutex;

    use super::*;

    /// Accesses that reached PCI: offset and width.
    #[derive(Default)]
    struct Pci(Mutex<Vec<(u64, usize)>>);

    impl DeviceOps for Pci {
        fn read(&self, offset: u64, data: &mut [u8]) {
            self.0.lock().push((offset, data.len()));
        }

        fn write(&self, offset: u64, data: &[u8]) {
            self.0.lock().push((offset, data.len()));
        }
    }

    #[test]
    fn a_byte_resets_and_wider_accesses_are_pci() {
        let (pci, seen) = (Arc::new(Pci::default()), Arc::new(Mutex::new(0)));
        let count = Arc::clone(&seen);
        let control = ResetControl::new(Arc::clone(&pci) as _, move |event| {
            assert_eq!(event, PowerEvent::Reset);
            *count.lock() += 1;
        });
        // Linux reads the register, sets the kind of reset, and resets.
        let mut value = [0xff];
        control.read(1, &mut value);
        assert_eq!(value, [0]);
        control.write(1, &[2]);
        assert_eq!(*seen.lock(), 0);
        control.write(1, &[6]);
        assert_eq!(*seen.lock(), 1);

        control.write(0, &[0, 6, 0, 0x80]);
        control.write(0, &[6]);
        control.write(1, &[6, 6]);
        control.read(4, &mut [0; 4]);
        assert_eq!(*pci.0.lock(), [(0, 4), (0, 1), (1, 2), (4, 4)]);
        assert_eq!(*seen.lock(), 1);
    }

    #[test]
    fn the_keyboard_controller_knows_one_command() {
        let seen = Arc::new(Mutex::new(0));
        let count = Arc::clone(&seen);
        let keyboard = KeyboardReset::new(move |_| *count.lock() += 1);
        for command in [&[0xd1][..], &[0xfe, 0xfe], &[]] {
            keyboard.write(0, command);
        }
        assert_eq!(*seen.lock(), 0);
        keyboard.write(0, &[RESET]);
        assert_eq!(*seen.lock(), 1);
    }
}
