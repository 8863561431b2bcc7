//! The root bus.

use std::collections::BTreeMap;
use std::sync::Arc;

use memory::DeviceOps;
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use state::{Load, LoadError, LoadScope, Save, SaveError, Saved, Scope};

use super::{Bdf, ConfigSpace, ECAM_BUS_LEN, HOST_BRIDGE, Registers};

/// A function cannot be put on the bus.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BusError {
    /// Another one is there.
    #[error("there is a function at {0} already")]
    Occupied(Bdf),
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
            Arc::new(Fixed(Registers::new(HOST_BRIDGE))),
        );
        Arc::new(bus)
    }

    /// The functions that are there.
    #[must_use]
    pub fn functions(&self) -> Vec<Bdf> {
        self.state.lock().functions.keys().copied().collect()
    }

    /// Puts a function on the bus.
    ///
    /// # Errors
    /// When there is one at that place.
    pub fn attach(&self, bdf: Bdf, function: Arc<dyn ConfigSpace>) -> Result<(), BusError> {
        let mut state = self.state.lock();
        if state.functions.contains_key(&bdf) {
            return Err(BusError::Occupied(bdf));
        }
        state.functions.insert(bdf, function);
        Ok(())
    }

    /// Takes a function off the bus; from now on nobody answers for it.
    pub fn detach(&self, bdf: Bdf) -> Option<Arc<dyn ConfigSpace>> {
        self.state.lock().functions.remove(&bdf)
    }

    /// The first device number of which no function is taken, as its function 0.
    ///
    /// # Errors
    /// When all are taken.
    pub fn free_slot(&self) -> Result<Bdf, BusError> {
        let state = self.state.lock();
        let taken = |device| state.functions.keys().any(|bdf| bdf.device() == device);
        let device = (1..32).find(|device| !taken(*device));
        device
            .and_then(|device| Bdf::new(device, 0))
            .ok_or(BusError::Full)
    }

    /// Whether there is nothing at any function of a slot.
    #[must_use]
    pub fn is_free(&self, slot: Bdf) -> bool {
        let state = self.state.lock();
        let there = |bdf: &Bdf| bdf.device() == slot.device();
        !state.functions.keys().any(there)
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

impl Bus {
    /// The function that answers. The bus is not locked while it does: an access may move a BAR.
    fn function(&self, bdf: Option<Bdf>) -> Option<Arc<dyn ConfigSpace>> {
        self.state.lock().functions.get(&bdf?).cloned()
    }

    fn read(&self, bdf: Option<Bdf>, at: usize, data: &mut [u8]) {
        match self.function(bdf) {
            Some(function) => function.read(at, data),
            // Nobody there: the bus floats.
            None => data.fill(0xff),
        }
    }

    fn write(&self, bdf: Option<Bdf>, at: usize, data: &[u8]) {
        if let Some(function) = self.function(bdf) {
            function.write(at, data);
        }
    }
}

/// What is saved of the bus itself: frozen.
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

    use super::super::CONFIG_LEN;
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
        fn no_access_changes_the_host_bridge(
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
            let (mut before, mut after) = ([0; CONFIG_LEN], [0; CONFIG_LEN]);
            Registers::new(HOST_BRIDGE).read(0, &mut before);
            ecam.read(0, &mut after);
            prop_assert_eq!(before, after);
        }
    }
}
