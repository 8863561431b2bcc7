//! PCI: configuration space, BARs and MSI-X (PCI Local Bus 3.0; PCI Express 5.0).
//!
//! - [`Registers`] is a register file: 4 KiB, of which the guest may write the bits that say so.
//! - [`Endpoint`] is a function of type 0: registers, capabilities, memory BARs that the guest
//!   moves about, and [`Msix`].
//! - [`Bus`] holds what has a [`ConfigSpace`], and answers both ways in which a PC's software
//!   reaches it: the memory window of PCI Express (ECAM), and the address and data ports.

mod bar;
mod bus;
mod endpoint;
mod msix;
mod registers;
mod saved;

use std::fmt;

pub use self::bar::{BarAllocator, BarError, BarMap, BarRequest, place_bar};
pub use self::bus::{Bus, BusError};
pub use self::endpoint::{Endpoint, EndpointBuilder};
pub use self::msix::{MsiMessage, MsiTarget, Msix, MsixPba, MsixTable};
pub use self::registers::Registers;

/// Bytes of a function's configuration space.
pub const CONFIG_LEN: usize = 4096;
/// Bytes of one bus in the ECAM window.
pub const ECAM_BUS_LEN: u64 = 1 << 20;

/// A function's configuration space. Accesses have any width at any offset.
pub trait ConfigSpace: Send + Sync {
    /// Fills `data` with the registers from `at` on; past the end, with ones.
    fn read(&self, at: usize, data: &mut [u8]);
    /// Handles the guest's write of `data` at `at`.
    fn write(&self, at: usize, data: &[u8]);
}

/// A PCI address: segment, and device and function number on the only bus of that segment.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Bdf {
    segment: u16,
    device: u8,
    function: u8,
}

impl Bdf {
    /// An address in segment 0. `None` for a device past 31 or a function past 7.
    #[must_use]
    pub const fn new(device: u8, function: u8) -> Option<Self> {
        if device < 32 && function < 8 {
            Some(Self {
                segment: 0,
                device,
                function,
            })
        } else {
            None
        }
    }

    /// An address in segment 0 from both numbers in a byte, as PCI writes them: the device number above
    /// the three bits of the function number.
    #[must_use]
    pub const fn from_devfn(devfn: u8) -> Self {
        Self {
            segment: 0,
            device: devfn >> 3,
            function: devfn & 7,
        }
    }

    /// Both in a byte.
    #[must_use]
    pub const fn devfn(self) -> u8 {
        self.device << 3 | self.function
    }

    /// Function 0 of the same slot.
    #[must_use]
    pub const fn first(self) -> Self {
        Self {
            function: 0,
            ..self
        }
    }

    /// The same device and function number in another segment.
    #[must_use]
    pub const fn in_segment(self, segment: u16) -> Self {
        Self { segment, ..self }
    }

    /// The segment.
    #[must_use]
    pub const fn segment(self) -> u16 {
        self.segment
    }

    /// The device number, 0 to 31.
    #[must_use]
    pub const fn device(self) -> u8 {
        self.device
    }

    /// The function number, 0 to 7.
    #[must_use]
    pub const fn function(self) -> u8 {
        self.function
    }
}

/// `0000:00:1f.7`: segment, bus, device and function.
impl fmt::Display for Bdf {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            segment,
            device,
            function,
        } = self;
        write!(f, "{segment:04x}:00:{device:02x}.{function}")
    }
}

impl fmt::Debug for Bdf {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// The identity of a function.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Identity {
    /// Vendor id.
    pub vendor: u16,
    /// Device id.
    pub device: u16,
    /// Revision id.
    pub revision: u8,
    /// Class, subclass and programming interface, from high to low.
    pub class: u32,
    /// Subsystem vendor id and subsystem id.
    pub subsystem: (u16, u16),
}

/// The host bridge, without which a guest does not believe in the bus.
pub const HOST_BRIDGE: Identity = Identity {
    vendor: 0x8086,
    device: 0x0d57,
    revision: 0,
    class: 0x06_00_00,
    subsystem: (0, 0),
};
