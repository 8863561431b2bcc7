//! Power management of a hardware-reduced ACPI platform (ACPI 6.5, 4.8.3.7 and 5.6.9): a sleep
//! control and a sleep status register, a reset register, and the register in which a generic
//! event device finds out what happened.
//!
//! | port | | |
//! |---|---|---|
//! | [`SLEEP_CONTROL`] | write | the sleep type in bits 2 to 4, bit 5 starts it |
//! | [`SLEEP_STATUS`] | read | 0: nothing woke the guest, for it does not sleep |
//! | [`RESET`] | write | [`RESET_VALUE`] resets |
//! | [`EVENTS`] | read | what happened since the last read, a bit each |

use memory::DeviceOps;
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use state::{Load, LoadError, LoadScope, Save, SaveError, Saved, Scope};

use crate::interrupt::InterruptLine;

/// Registers of the block.
pub const LEN: u64 = 8;
/// The sleep control register's place in the block.
pub const SLEEP_CONTROL: u64 = 0;
/// The sleep status register's.
pub const SLEEP_STATUS: u64 = 1;
/// The reset register's.
pub const RESET: u64 = 2;
/// The event register's.
pub const EVENTS: u64 = 4;
/// The value that resets the machine when it is written to the reset register.
pub const RESET_VALUE: u8 = 1;
/// Starts the sleep whose type is written with it.
pub const SLEEP_ENABLE: u8 = 1 << 5;
/// The sleep type of S5, soft off, as `_S5` in the DSDT tells the guest.
pub const S5: u8 = 5;
/// The power button was pressed.
pub const POWER_BUTTON: u8 = 1 << 0;

/// Devices came, or should go: the registers of [`hotplug`](crate::hotplug) say which.
pub const PCI_HOTPLUG: u8 = 1 << 1;
/// vCPUs came, or should go: the registers of [`cpus`](crate::cpus) say which.
pub const CPU_HOTPLUG: u8 = 1 << 2;

/// The guest is another copy of the guest that was saved: its VM generation ID has changed.
pub const GENERATION: u8 = 1 << 3;

/// The guest's clocks were disturbed: its VMClock has changed.
pub const CLOCK: u8 = 1 << 4;

/// Memory was plugged: the registers of [`dimms`](crate::dimms) say which.
pub const MEMORY_HOTPLUG: u8 = 1 << 5;

/// A guest's request for its machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PowerEvent {
    /// Start anew.
    Reset,
    /// Be switched off.
    PowerOff,
}

/// The receiver of power events.
pub type PowerEvents = dyn Fn(PowerEvent) + Send + Sync;

/// The registers.
pub struct PowerBlock {
    line: InterruptLine,
    happened: Mutex<u8>,
    events: Box<PowerEvents>,
}

impl PowerBlock {
    /// Raises `line` for generic events, and tells `events` what the guest wants.
    pub fn new(line: InterruptLine, events: impl Fn(PowerEvent) + Send + Sync + 'static) -> Self {
        Self {
            line,
            happened: Mutex::new(0),
            events: Box::new(events),
        }
    }

    /// Presses the power button. What comes of it is the guest's business.
    pub fn press_power_button(&self) {
        self.raise(POWER_BUTTON);
    }

    /// Has the guest look at the hotplug registers.
    pub fn announce_hotplug(&self) {
        self.raise(PCI_HOTPLUG);
    }

    /// Has the guest look at the registers for vCPUs.
    pub fn announce_cpus(&self) {
        self.raise(CPU_HOTPLUG);
    }

    /// Has the guest look at the registers for hotplugged memory.
    pub fn announce_memory(&self) {
        self.raise(MEMORY_HOTPLUG);
    }

    /// Has the guest look at its VM generation ID and its VMClock.
    pub fn announce_generation(&self) {
        self.raise(GENERATION | CLOCK);
    }

    /// Has the guest look at its VMClock.
    pub fn announce_clock(&self) {
        self.raise(CLOCK);
    }

    /// Raises the interrupt again if an event was not read yet, for a guest that was loaded.
    pub fn repeat_interrupt(&self) {
        if *self.happened.lock() != 0 {
            self.line.raise();
        }
    }

    fn raise(&self, event: u8) {
        // The bit is set before the interrupt: a guest that is quick finds it. The other order
        // could raise an interrupt whose handler finds nothing, and leave the bit without an
        // interrupt.
        *self.happened.lock() |= event;
        self.line.raise();
    }
}

impl DeviceOps for PowerBlock {
    fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        if offset == EVENTS
            && let Some(first) = data.first_mut()
        {
            // ACPI methods cannot clear single bits here without a race against a new event, so the
            // read itself takes all of them. A guest that loses what it has read loses only its own
            // events.
            *first = std::mem::take(&mut *self.happened.lock());
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        match (offset, data.first()) {
            // Only S5 is in the DSDT. A guest that starts any other sleep would never be woken, so
            // it is ignored.
            (SLEEP_CONTROL, Some(value))
                if *value & (SLEEP_ENABLE | 7 << 2) == SLEEP_ENABLE | S5 << 2 =>
            {
                (self.events)(PowerEvent::PowerOff);
            }
            (RESET, Some(&RESET_VALUE)) => (self.events)(PowerEvent::Reset),
            _ => {}
        }
    }
}

/// Saved state, version 1. Frozen.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct V1 {
    happened: u8,
}

impl Saved for V1 {
    const VERSION: u16 = 1;
}

impl Save for PowerBlock {
    fn save(&self, to: &mut Scope<'_>) -> Result<(), SaveError> {
        let happened = *self.happened.lock();
        to.put(&V1 { happened })
    }
}

impl Load for &PowerBlock {
    fn load(&mut self, from: &mut LoadScope<'_, '_>, _: &mut ()) -> Result<(), LoadError> {
        let V1 { happened } = from.take()?;
        *self.happened.lock() = happened;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;

    #[test]
    fn only_defined_registers_act() {
        let seen = Arc::new(Mutex::new(Vec::new()));
        let (line, to) = (InterruptLine::new().unwrap(), Arc::clone(&seen));
        let block = PowerBlock::new(line.clone(), move |event| to.lock().push(event));
        for (offset, value) in [
            (SLEEP_CONTROL, S5 << 2),
            (SLEEP_CONTROL, SLEEP_ENABLE),
            (RESET, 6),
            (7, 1),
        ] {
            block.write(offset, &[value]);
        }
        assert!(seen.lock().is_empty());
        block.write(SLEEP_CONTROL, &[SLEEP_ENABLE | S5 << 2]);
        block.write(RESET, &[RESET_VALUE]);
        assert_eq!(*seen.lock(), [PowerEvent::PowerOff, PowerEvent::Reset]);

        block.announce_clock();
        block.announce_generation();
        let mut both = [0];
        block.read(EVENTS, &mut both);
        assert_eq!(both, [GENERATION | CLOCK]);
        assert_eq!(line.event_fd().read().unwrap(), 2);

        block.press_power_button();
        assert_eq!(line.event_fd().read().unwrap(), 1);
        let mut happened = [0xff];
        block.read(EVENTS, &mut happened);
        assert_eq!(happened, [POWER_BUTTON]);
        block.read(EVENTS, &mut happened);
        assert_eq!(happened, [0], "reading takes it");

        block.announce_hotplug();
        let mut writer = state::Writer::default();
        block.save(&mut writer.scope("power").unwrap()).unwrap();
        let bytes = writer.finish();
        let other = PowerBlock::new(line, |_| {});
        let mut store = state::Store::open(&bytes).unwrap();
        (&other)
            .load(&mut store.scope("power").unwrap(), &mut ())
            .unwrap();
        let line = &other.line;
        line.event_fd().read().unwrap();
        other.repeat_interrupt();
        assert_eq!(
            line.event_fd().read().unwrap(),
            1,
            "the interrupt is raised again"
        );
        other.read(EVENTS, &mut happened);
        assert_eq!(
            happened,
            [PCI_HOTPLUG],
            "an event that was not read is kept"
        );
        other.repeat_interrupt();
        assert!(line.event_fd().read().is_err(), "nothing is pending");
    }
}
