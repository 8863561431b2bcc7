//! The root bus of a segment.

use std::collections::BTreeMap;
use std::ops::Bound;
use std::sync::Arc;

use memory::DeviceOps;
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use state::{Load, LoadError, LoadScope, Save, SaveError, Saved, Scope};

use super::registers::{HEADER_TYPE, MULTI_FUNCTION};
use super::{Bdf, ConfigSpace, ECAM_BUS_LEN, HOST_BRIDGE, Registers};

/// A function cannot be put on the bus.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BusError {
    /// Another one is there.
    #[error("address {0} already has a function")]
    Occupied(Bdf),
    /// The slot has no function 0, without which guests do not look for others (PCI 3.0, 3.2.2.3.4).
    #[error("a function at {0} needs function 0 of its slot")]
    NoFirst(Bdf),
    /// No device number is free.
    #[error("all 31 slots of the bus are taken")]
    Full,
}

/// Never changes: the host bridge.
struct Fixed(Registers);

impl ConfigSpace for Fixed {
    fn read(&self, at: usize, data: &mut [u8]) {
        self.0.read(at, data);
    }

    fn write(&self, _: usize, _: &[u8]) {}
}

/// The bus, and the address that was last written to the address port.
#[derive(Default)]
struct State {
    functions: BTreeMap<Bdf, Arc<dyn ConfigSpace>>,
    address: u32,
}

/// The root bus of a segment. Software reaches segment 0 through the ports, too.
pub struct Bus {
    segment: u16,
    state: Mutex<State>,
}

impl Bus {
    /// Returns the bus of this segment, with a host bridge as 00.0.
    #[must_use]
    pub fn new(segment: u16) -> Arc<Self> {
        let mut state = State::default();
        let bridge: Arc<dyn ConfigSpace> = Arc::new(Fixed(Registers::new(HOST_BRIDGE)));
        let at = Bdf::from_devfn(0).in_segment(segment);
        state.functions.insert(at, bridge);
        Arc::new(Self {
            segment,
            state: Mutex::new(state),
        })
    }

    /// The functions that are there.
    #[must_use]
    pub fn functions(&self) -> Vec<Bdf> {
        self.state.lock().functions.keys().copied().collect()
    }

    /// Puts a function on the bus: into a slot of its own, or behind function 0 of a slot that it
    /// shares.
    ///
    /// # Errors
    /// Fails if there is one at that place, or no function 0 of the slot.
    pub fn attach(&self, bdf: Bdf, function: Arc<dyn ConfigSpace>) -> Result<(), BusError> {
        let mut state = self.state.lock();
        if state.functions.contains_key(&bdf) {
            return Err(BusError::Occupied(bdf));
        }
        if bdf.function() != 0 && !state.functions.contains_key(&bdf.first()) {
            return Err(BusError::NoFirst(bdf));
        }
        state.functions.insert(bdf, function);
        Ok(())
    }

    /// Removes a function from the bus. Its configuration space reads as all ones from now on.
    pub fn detach(&self, bdf: Bdf) -> Option<Arc<dyn ConfigSpace>> {
        self.state.lock().functions.remove(&bdf)
    }

    /// The first device number of which no function is taken, as its function 0.
    ///
    /// # Errors
    /// Fails if all are taken.
    pub fn free_slot(&self) -> Result<Bdf, BusError> {
        let state = self.state.lock();
        let taken = |device| state.functions.keys().any(|bdf| bdf.device() == device);
        let device = (1..32).find(|device| !taken(*device));
        device
            .and_then(|device| Bdf::new(device, 0))
            .map(|at| at.in_segment(self.segment))
            .ok_or(BusError::Full)
    }

    /// Returns the device of this bus's ECAM window.
    pub fn ecam(self: &Arc<Self>) -> Arc<dyn DeviceOps> {
        Arc::new(Ecam(Arc::clone(self)))
    }

    /// Returns the device of the ports 0xcf8 to 0xcff.
    pub fn ports(self: &Arc<Self>) -> Arc<dyn DeviceOps> {
        Arc::new(Ports(Arc::clone(self)))
    }
}

/// A function that answers an access.
struct Answering {
    function: Arc<dyn ConfigSpace>,
    /// The function is function 0 of a slot that has others.
    is_first_of_several: bool,
}

impl State {
    /// Returns the function that answers, if any. A slot without function 0 is empty.
    fn answering(&self, bdf: Bdf) -> Option<Answering> {
        let function = self.functions.get(&bdf)?;
        // Function 0 may be unplugged before the others of its slot. A guest that still knows them
        // gets all ones, as from a card that was pulled.
        if bdf.function() != 0 && !self.functions.contains_key(&bdf.first()) {
            return None;
        }
        // The map is ordered by device and function, so the next entry is the slot's next function,
        // if it has one.
        let next = (Bound::Excluded(bdf), Bound::Unbounded);
        let next = self.functions.range(next).next();
        let is_of_several = next.is_some_and(|(next, _)| next.device() == bdf.device());
        Some(Answering {
            function: Arc::clone(function),
            is_first_of_several: bdf.function() == 0 && is_of_several,
        })
    }
}

impl Bus {
    /// The function that answers. The bus is not locked while it does: an access may move a BAR.
    fn answering(&self, bdf: Option<Bdf>) -> Option<Answering> {
        self.state.lock().answering(bdf?.in_segment(self.segment))
    }

    fn read(&self, bdf: Option<Bdf>, at: usize, data: &mut [u8]) {
        let Some(answering) = self.answering(bdf) else {
            // No function answers: the bus floats.
            data.fill(0xff);
            return;
        };
        answering.function.read(at, data);
        if answering.is_first_of_several {
            // PCI Local Bus 3.0, 6.2.1. Where functions are is the bus's to know, and no part of
            // what they save.
            let header_type = HEADER_TYPE.checked_sub(at);
            if let Some(byte) = header_type.and_then(|byte| data.get_mut(byte)) {
                *byte |= MULTI_FUNCTION;
            }
        }
    }

    fn write(&self, bdf: Option<Bdf>, at: usize, data: &[u8]) {
        if let Some(answering) = self.answering(bdf) {
            answering.function.write(at, data);
        }
    }
}

/// Saved state of the bus itself, version 1. Frozen.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct V1 {
    address: u32,
}

impl Saved for V1 {
    const VERSION: u16 = 1;
}

impl Save for Bus {
    fn save(&self, to: &mut Scope<'_>) -> Result<(), SaveError> {
        let address = self.state.lock().address;
        to.put(&V1 { address })
    }
}

impl Load for &Bus {
    fn load(&mut self, from: &mut LoadScope<'_, '_>, _: &mut ()) -> Result<(), LoadError> {
        let V1 { address } = from.take()?;
        self.state.lock().address = address;
        Ok(())
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
        self.0.read(bdf, at, data);
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let (bdf, at) = ecam_target(offset);
        self.0.write(bdf, at, data);
    }
}

struct Ports(Arc<Bus>);

/// Bit 31 of the address register.
const ENABLE: u32 = 1 << 31;

/// PCI Local Bus 3.0, 3.2.2.3.2. Only bus 0 is there.
fn port_target(address: u32, byte: u64) -> (Option<Bdf>, usize) {
    let [register, devfn, bus, _] = address.to_le_bytes();
    // With bit 31 clear the ports 0xcfc to 0xcff are ordinary I/O, which nothing answers.
    let there = address & ENABLE != 0 && bus == 0;
    let bdf = there.then(|| Bdf::new(devfn >> 3, devfn & 7)).flatten();
    (bdf, usize::from(register & 0xfc) + (byte & 3) as usize)
}

impl DeviceOps for Ports {
    fn read(&self, offset: u64, data: &mut [u8]) {
        let address = self.0.state.lock().address;
        match offset.checked_sub(4) {
            Some(byte) => {
                let (bdf, at) = port_target(address, byte);
                self.0.read(bdf, at, data);
            }
            None if offset == 0 && data.len() == 4 => {
                data.copy_from_slice(&address.to_le_bytes());
            }
            None => data.fill(0xff),
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        // 3.2.2.3.2: only a 32-bit write to 0xcf8 sets the address. Others pass through to ports
        // such as 0xcf9.
        match (offset.checked_sub(4), <[u8; 4]>::try_from(data)) {
            (Some(byte), _) => {
                let address = self.0.state.lock().address;
                let (bdf, at) = port_target(address, byte);
                self.0.write(bdf, at, data);
            }
            (None, Ok(address)) if offset == 0 => {
                self.0.state.lock().address = u32::from_le_bytes(address);
            }
            (None, _) => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::{CONFIG_LEN, Identity};
    use super::*;

    fn read_u32(ops: &dyn DeviceOps, offset: u64) -> u32 {
        let mut data = [0; 4];
        ops.read(offset, &mut data);
        u32::from_le_bytes(data)
    }

    #[test]
    fn both_config_paths_find_host_bridge() {
        let bus = Bus::new(0);
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

    fn at(device: u8, function: u8) -> Bdf {
        Bdf::new(device, function).unwrap()
    }

    /// A function with this device ID.
    fn function(id: u16) -> Arc<dyn ConfigSpace> {
        Arc::new(Fixed(Registers::new(Identity {
            device: id,
            ..HOST_BRIDGE
        })))
    }

    /// The first register of a function, both ways.
    fn ids(bus: &Arc<Bus>, bdf: Bdf) -> [u32; 2] {
        let devfn = u32::from(bdf.devfn());
        let (ecam, ports) = (bus.ecam(), bus.ports());
        ports.write(0, &(ENABLE | devfn << 8).to_le_bytes());
        [
            read_u32(&*ecam, u64::from(devfn) << 12),
            read_u32(&*ports, 4),
        ]
    }

    #[test]
    fn absent_functions_read_as_ones() {
        let bus = Bus::new(0);
        assert_eq!(
            bus.attach(at(3, 1), function(1)),
            Err(BusError::NoFirst(at(3, 1)))
        );
        for (bdf, id) in [
            (at(3, 0), 30),
            (at(3, 2), 32),
            (at(3, 7), 37),
            (at(5, 0), 50),
        ] {
            bus.attach(bdf, function(id)).unwrap();
        }
        assert_eq!(
            bus.attach(at(3, 2), function(1)),
            Err(BusError::Occupied(at(3, 2)))
        );
        assert_eq!(bus.free_slot(), Ok(at(1, 0)));
        for device in 1..32 {
            for number in 0..8 {
                let id = match (device, number) {
                    (3, 0 | 2 | 7) | (5, 0) => 10 * u32::from(device) + u32::from(number),
                    _ => u32::from(u16::MAX),
                };
                let seen = if id == 0xffff {
                    u32::MAX
                } else {
                    id << 16 | 0x8086
                };
                let bdf = at(device, number);
                assert_eq!(ids(&bus, bdf), [seen; 2], "{bdf}");
            }
        }
        // What is behind function 0 is there no more without it.
        let first = bus.detach(at(3, 0)).unwrap();
        assert_eq!(ids(&bus, at(3, 2)), [u32::MAX; 2]);
        bus.ecam()
            .write(u64::from(at(3, 2).devfn()) << 12 | 4, &[7, 0]);
        bus.attach(at(3, 0), first).unwrap();
        assert_eq!(ids(&bus, at(3, 2)), [32 << 16 | 0x8086; 2]);
    }

    #[test]
    fn bus_of_another_segment_answers_in_its_window() {
        let bus = Bus::new(7);
        let place = bus.free_slot().unwrap();
        assert_eq!(place.to_string(), "0007:00:01.0");
        bus.attach(place, function(9)).unwrap();
        let ecam = bus.ecam();
        assert_eq!(read_u32(&*ecam, 0), 0x0d57_8086);
        assert_eq!(read_u32(&*ecam, 1 << 15), 9 << 16 | 0x8086);
        assert_eq!(bus.free_slot().unwrap().device(), 2);
    }

    #[test]
    fn function_0_shows_multifunction_bit() {
        let bus = Bus::new(0);
        for bdf in [at(3, 0), at(3, 1), at(4, 0)] {
            bus.attach(bdf, function(1)).unwrap();
        }
        let ecam = bus.ecam();
        let header_type = |bdf: Bdf, from: u64, len: u64| {
            let mut data = vec![0; len as usize];
            ecam.read((u64::from(bdf.devfn()) << 12) + from, &mut data);
            data[(0x0e - from) as usize]
        };
        for (from, len) in [
            (0x0e, 1),
            (0x0e, 2),
            (0x0d, 2),
            (0x0c, 4),
            (0x08, 8),
            (0, 64),
        ] {
            let seen =
                [at(3, 0), at(3, 1), at(4, 0), at(0, 0)].map(|bdf| header_type(bdf, from, len));
            assert_eq!(seen, [0x80, 0, 0, 0], "{len} bytes from {from:#x}");
        }
        // Its neighbours are as they were.
        for (from, len) in [(0x0c, 2), (0x0f, 1), (0x10, 4)] {
            let mut data = vec![0; len];
            ecam.read((u64::from(at(3, 0).devfn()) << 12) + from, &mut data);
            assert!(data.iter().all(|byte| *byte == 0), "{from:#x}");
        }
        bus.detach(at(3, 1));
        assert_eq!(header_type(at(3, 0), 0x0e, 1), 0);
    }

    proptest! {
        #[test]
        fn no_access_changes_the_host_bridge(
            writes in prop::collection::vec((any::<bool>(), 0_u64..1 << 21, prop::collection::vec(any::<u8>(), 0..9)), 0..64)
        ) {
            let bus = Bus::new(0);
            let (ecam, ports) = (bus.ecam(), bus.ports());
            for (by_port, offset, data) in writes {
                let (ops, offset) = if by_port { (&ports, offset % 8) } else { (&ecam, offset) };
                ops.write(offset, &data);
                let mut back = data.clone();
                ops.read(offset, &mut back);
            }
            let (mut before, mut after) = ([0; CONFIG_LEN], [0; CONFIG_LEN]);
            Registers::new(HOST_BRIDGE).read(0, &mut before);
            ecam.read(0, &mut after);
            prop_assert_eq!(before, after);
        }
    }
}
