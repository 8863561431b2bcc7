//! The requests that each state of a VM admits. Pure: no lock, no I/O.

use std::fmt;

use spec::VmState;

/// A kind of request.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[expect(missing_docs, reason = "the names are the API's")]
pub enum Verb {
    Boot,
    Pause,
    Resume,
    Reboot,
    Shutdown,
    Delete,
    PowerButton,
    Nmi,
    Counters,
    MemoryMap,
    Cpu,
    AddDevice,
    RemoveDevice,
    Resize,
    ResizeZone,
    ResizeDisk,
}

impl Verb {
    /// All of them.
    pub const ALL: [Self; 16] = [
        Self::Boot,
        Self::Pause,
        Self::Resume,
        Self::Reboot,
        Self::Shutdown,
        Self::Delete,
        Self::PowerButton,
        Self::Nmi,
        Self::Counters,
        Self::MemoryMap,
        Self::Cpu,
        Self::AddDevice,
        Self::RemoveDevice,
        Self::Resize,
        Self::ResizeZone,
        Self::ResizeDisk,
    ];

    /// Whether it changes the devices, vCPUs or memory of the machine.
    #[must_use]
    pub fn changes_machine(self) -> bool {
        matches!(
            self,
            Self::AddDevice
                | Self::RemoveDevice
                | Self::Resize
                | Self::ResizeZone
                | Self::ResizeDisk
        )
    }

    /// Returns the participle for "cannot be ...".
    fn participle(self) -> &'static str {
        match self {
            Self::Boot => "booted",
            Self::Pause => "paused",
            Self::Resume => "resumed",
            Self::Reboot => "rebooted",
            Self::Shutdown => "shut down",
            Self::Delete => "deleted",
            Self::PowerButton => "sent a press of the power button",
            Self::Nmi => "sent an NMI",
            Self::Counters => "asked for counters",
            Self::MemoryMap => "asked for its memory map",
            Self::Cpu => "asked for its CPUs",
            Self::AddDevice => "given a device",
            Self::RemoveDevice => "asked to remove a device",
            Self::Resize | Self::ResizeZone => "resized",
            Self::ResizeDisk => "given a new disk size",
        }
    }

    /// The states in which it may be asked.
    fn states(self) -> &'static [VmState] {
        use VmState::{BreakPoint, Created, Paused, Running, Shutdown};
        match self {
            Self::Boot => &[Created, Shutdown],
            Self::Pause | Self::PowerButton => &[Running],
            Self::Resume => &[Paused],
            Self::Reboot
            | Self::Shutdown
            | Self::Nmi
            | Self::MemoryMap
            | Self::Cpu
            | Self::ResizeDisk => &[Running, Paused],
            Self::AddDevice | Self::RemoveDevice | Self::Resize | Self::ResizeZone => {
                &[Created, Running, Paused, Shutdown]
            }
            Self::Delete | Self::Counters => &[Created, Running, Paused, Shutdown, BreakPoint],
        }
    }
}

/// A request that makes no sense now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Denied {
    /// The VM's state.
    pub state: VmState,
    /// The refused request.
    pub verb: Verb,
}

impl fmt::Display for Denied {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (state, verb) = (self.state, self.verb.participle());
        write!(f, "a VM that is {state} cannot be {verb}: it must be ")?;
        for (i, needed) in self.verb.states().iter().enumerate() {
            write!(f, "{}{needed}", if i == 0 { "" } else { " or " })?;
        }
        Ok(())
    }
}

impl std::error::Error for Denied {}

/// Whether `verb` may be asked of a VM in this state.
///
/// # Errors
/// Fails if the request makes no sense.
pub fn admit(state: VmState, verb: Verb) -> Result<(), Denied> {
    if verb.states().contains(&state) {
        Ok(())
    } else {
        Err(Denied { state, verb })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_verb_in_every_state() {
        use VmState::{Created, Paused, Running, Shutdown};
        // One row a verb: Created, Running, Paused, Shutdown.
        let table = [
            (Verb::Boot, [true, false, false, true]),
            (Verb::Pause, [false, true, false, false]),
            (Verb::Resume, [false, false, true, false]),
            (Verb::Reboot, [false, true, true, false]),
            (Verb::Shutdown, [false, true, true, false]),
            (Verb::Delete, [true, true, true, true]),
            (Verb::PowerButton, [false, true, false, false]),
            (Verb::Nmi, [false, true, true, false]),
            (Verb::Counters, [true, true, true, true]),
            (Verb::MemoryMap, [false, true, true, false]),
            (Verb::Cpu, [false, true, true, false]),
            (Verb::AddDevice, [true, true, true, true]),
            (Verb::RemoveDevice, [true, true, true, true]),
            (Verb::Resize, [true, true, true, true]),
            (Verb::ResizeZone, [true, true, true, true]),
            (Verb::ResizeDisk, [false, true, true, false]),
        ];
        assert_eq!(table.map(|(verb, _)| verb), Verb::ALL);
        for (verb, row) in table {
            for (state, expected) in [Created, Running, Paused, Shutdown].into_iter().zip(row) {
                assert_eq!(
                    admit(state, verb).is_ok(),
                    expected,
                    "{verb:?} when {state}"
                );
            }
        }
    }
}
