//! PCI configuration space (PCI Local Bus 3.0, chapter 6; PCI Express 5.0, 7.2).
//!
//! A [`Function`] is a register file: 4 KiB, of which the guest may write the bits that say so. A
//! [`Bus`] holds functions and answers both ways in which a PC's software reaches them: the memory
//! window of PCI Express (ECAM), and the address and data ports.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;

use memory::DeviceOps;
use parking_lot::Mutex;

/// Bytes of a function's configuration space.
pub const CONFIG_LEN: usize = 4096;
/// Bytes of one bus in the ECAM window.
pub const ECAM_BUS_LEN: u64 = 1 << 20;

const VENDOR: usize = 0x00;
const DEVICE: usize = 0x02;
const COMMAND: usize = 0x04;
const REVISION: usize = 0x08;
const CLASS: usize = 0x09;
const INTERRUPT_LINE: usize = 0x3c;

/// Where a function is: device and function number on the only bus.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Bdf {
    device: u8,
    function: u8,
}

impl Bdf {
    /// `None` for a device past 31 or a function past 7.
    #[must_use]
    pub const fn new(device: u8, function: u8) -> Option<Self> {
        if device < 32 && function < 8 {
            Some(Self { device, function })
        } else {
            None
        }
    }
}

/// `0000:00:1f.7`: segment, bus, device and function.
impl fmt::Display for Bdf {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "0000:00:{:02x}.{}", self.device, self.function)
    }
}

impl fmt::Debug for Bdf {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// What a function is.
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
}

/// A function's register file: what reads give, and which bits writes change.
#[derive(Clone)]
pub struct Function {
    bytes: Box<[u8; CONFIG_LEN]>,
    writable: Box<[u8; CONFIG_LEN]>,
}

impl Function {
    /// A function of type 0 without BARs and capabilities. The guest may set the command
    /// register's bits and the interrupt line.
    #[must_use]
    pub fn new(identity: Identity) -> Self {
        let mut function = Self {
            bytes: Box::new([0; CONFIG_LEN]),
            writable: Box::new([0; CONFIG_LEN]),
        };
        function.set(VENDOR, &identity.vendor.to_le_bytes());
        function.set(DEVICE, &identity.device.to_le_bytes());
        function.set(REVISION, &[identity.revision]);
        function.set(CLASS, &identity.class.to_le_bytes()[..3]);
        // I/O space, memory space, bus master, interrupt disable.
        function.allow(COMMAND, &0x0407_u16.to_le_bytes());
        function.allow(INTERRUPT_LINE, &[0xff]);
        function
    }

    fn set(&mut self, at: usize, value: &[u8]) {
        if let Some(bytes) = self.bytes.get_mut(at..at + value.len()) {
            bytes.copy_from_slice(value);
        }
    }

    fn allow(&mut self, at: usize, mask: &[u8]) {
        if let Some(bytes) = self.writable.get_mut(at..at + mask.len()) {
            bytes.copy_from_slice(mask);
        }
    }

    /// Fills `data` with the registers from `at` on; past the end, with ones.
    pub fn read(&self, at: usize, data: &mut [u8]) {
        for (i, byte) in data.iter_mut().enumerate() {
            *byte = at
                .checked_add(i)
                .and_then(|at| self.bytes.get(at))
                .copied()
                .unwrap_or(0xff);
        }
    }

    /// Changes the bits that may be changed.
    pub fn write(&mut self, at: usize, data: &[u8]) {
        for (i, value) in data.iter().enumerate() {
            let Some(at) = at.checked_add(i).filter(|at| *at < CONFIG_LEN) else {
                return;
            };
            let mask = self.writable[at];
            self.bytes[at] = self.bytes[at] & !mask | value & mask;
        }
    }
}

/// The host bridge, without which a guest does not believe in the bus.
pub const HOST_BRIDGE: Identity = Identity {
    vendor: 0x8086,
    device: 0x0d57,
    revision: 0,
    class: 0x06_00_00,
};

/// The bus, and the address that was last written to the address port.
#[derive(Default)]
struct State {
    functions: BTreeMap<Bdf, Function>,
    address: u32,
}

/// The root bus.
#[derive(Default)]
pub struct Bus {
    state: Mutex<State>,
}

impl Bus {
    /// With a host bridge as 00.0.
    #[must_use]
    pub fn new() -> Arc<Self> {
        let bus = Self::default();
        bus.state.lock().functions.insert(
            Bdf {
                device: 0,
                function: 0,
            },
            Function::new(HOST_BRIDGE),
        );
        Arc::new(bus)
    }

    /// The functions that are there.
    #[must_use]
    pub fn functions(&self) -> Vec<Bdf> {
        self.state.lock().functions.keys().copied().collect()
    }

    /// What answers in the ECAM window of this bus.
    pub fn ecam(self: &Arc<Self>) -> Arc<dyn DeviceOps> {
        Arc::new(Ecam(Arc::clone(self)))
    }

    /// What answers at the ports 0xcf8 to 0xcff.
    pub fn ports(self: &Arc<Self>) -> Arc<dyn DeviceOps> {
        Arc::new(Ports(Arc::clone(self)))
    }
}

impl State {
    fn read(&self, bdf: Option<Bdf>, at: usize, data: &mut [u8]) {
        match bdf.and_then(|bdf| self.functions.get(&bdf)) {
            Some(function) => function.read(at, data),
            // Nobody there: the bus floats.
            None => data.fill(0xff),
        }
    }

    fn write(&mut self, bdf: Option<Bdf>, at: usize, data: &[u8]) {
        if let Some(function) = bdf.and_then(|bdf| self.functions.get_mut(&bdf)) {
            function.write(at, data);
        }
    }
}

struct Ecam(Arc<Bus>);

/// PCI Express 5.0, 7.2.2: bits 15 to 19 are the device, 12 to 14 the function.
fn ecam_target(offset: u64) -> (Option<Bdf>, usize) {
    let device = u8::try_from(offset >> 15 & 0xff).unwrap_or(u8::MAX);
    let function = (offset >> 12 & 7) as u8;
    let bdf = (offset < ECAM_BUS_LEN)
        .then(|| Bdf::new(device, function))
        .flatten();
    (bdf, (offset & 0xfff) as usize)
}

impl DeviceOps for Ecam {
    fn read(&self, offset: u64, data: &mut [u8]) {
        let (bdf, at) = ecam_target(offset);
        self.0.state.lock().read(bdf, at, data);
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let (bdf, at) = ecam_target(offset);
        self.0.state.lock().write(bdf, at, data);
    }
}

struct Ports(Arc<Bus>);

/// Bit 31 of the address register.
const ENABLE: u32 = 1 << 31;

/// PCI Local Bus 3.0, 3.2.2.3.2. Only bus 0 is there.
fn port_target(address: u32, byte: u64) -> (Option<Bdf>, usize) {
    let [register, devfn, bus, _] = address.to_le_bytes();
    let there = address & ENABLE != 0 && bus == 0;
    let bdf = there.then(|| Bdf::new(devfn >> 3, devfn & 7)).flatten();
    (bdf, usize::from(register & 0xfc) + (byte & 3) as usize)
}

impl DeviceOps for Ports {
    fn read(&self, offset: u64, data: &mut [u8]) {
        let state = self.0.state.lock();
        match offset.checked_sub(4) {
            Some(byte) => {
                let (bdf, at) = port_target(state.address, byte);
                state.read(bdf, at, data);
            }
            None if offset == 0 && data.len() == 4 => {
                data.copy_from_slice(&state.address.to_le_bytes());
            }
            None => data.fill(0xff),
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let mut state = self.0.state.lock();
        match (offset.checked_sub(4), <[u8; 4]>::try_from(data)) {
            (Some(byte), _) => {
                let (bdf, at) = port_target(state.address, byte);
                state.write(bdf, at, data);
            }
            (None, Ok(address)) if offset == 0 => state.address = u32::from_le_bytes(address),
            (None, _) => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn read_u32(ops: &dyn DeviceOps, offset: u64) -> u32 {
        let mut data = [0; 4];
        ops.read(offset, &mut data);
        u32::from_le_bytes(data)
    }

    #[test]
    fn both_ways_find_the_host_bridge_and_nobody_else() {
        let bus = Bus::new();
        let (ecam, ports) = (bus.ecam(), bus.ports());
        assert_eq!(read_u32(&*ecam, 0), 0x0d57_8086);
        assert_eq!(read_u32(&*ecam, 1 << 15), u32::MAX);
        ports.write(0, &ENABLE.to_le_bytes());
        assert_eq!(read_u32(&*ports, 4), 0x0d57_8086);
        ports.write(0, &(ENABLE | 0x08).to_le_bytes());
        assert_eq!(read_u32(&*ports, 4), 0x0600_0000);
        ports.write(0, &(ENABLE | 1 << 16).to_le_bytes());
        assert_eq!(read_u32(&*ports, 4), u32::MAX, "bus 1 is not there");
    }

    proptest! {
        #[test]
        fn a_guest_changes_only_what_it_may(
            writes in prop::collection::vec((any::<bool>(), 0_u64..1 << 21, prop::collection::vec(any::<u8>(), 0..9)), 0..64)
        ) {
            let bus = Bus::new();
            let (ecam, ports) = (bus.ecam(), bus.ports());
            for (by_port, offset, data) in writes {
                let (ops, offset) = if by_port { (&ports, offset % 8) } else { (&ecam, offset) };
                ops.write(offset, &data);
                let mut back = data.clone();
                ops.read(offset, &mut back);
            }
            let fresh = Function::new(HOST_BRIDGE);
            let (mut before, mut after) = ([0; CONFIG_LEN], [0; CONFIG_LEN]);
            fresh.read(0, &mut before);
            ecam.read(0, &mut after);
            for at in 0..CONFIG_LEN {
                prop_assert_eq!(before[at] & !fresh.writable[at], after[at] & !fresh.writable[at]);
            }
        }
    }
}
