//! A PCI function as its driver sees it: sizing, moving, masking.

#![allow(clippy::unwrap_used, reason = "tests")]

use std::sync::Arc;

use devices::pci::{
    BarMap, BarRequest, ConfigSpace, Endpoint, EndpointBuilder, Identity, MsiMessage, MsiTarget,
    place_bar,
};
use memory::{Access, DeviceOps, RegionId, SpaceKind, Topology};
use parking_lot::Mutex;
use state::{Save, Store, Writer};

const IDENTITY: Identity = Identity {
    vendor: 0x1af4,
    device: 0x1042,
    revision: 1,
    class: 0x01_80_00,
    subsystem: (0x1af4, 7),
};
const FIRST: u64 = 0x80_0000_0000;
const SIZE: u64 = 0x4000;

/// Answers with its own byte everywhere.
struct Byte(u8);

impl DeviceOps for Byte {
    fn read(&self, _: u64, data: &mut [u8]) {
        data.fill(self.0);
    }
    fn write(&self, _: u64, _: &[u8]) {}
}

struct Map(Arc<Mutex<Topology>>);

impl BarMap for Map {
    fn place(&self, region: RegionId, at: Option<u64>) {
        let mut topology = self.0.lock();
        let mut tx = topology.begin();
        place_bar(&mut tx, region, at).unwrap();
        tx.commit().unwrap();
    }
}

/// Keeps the contract as KVM does: a vector without a message remembers that it was raised.
#[derive(Default)]
struct Target(Mutex<Vectors>);

#[derive(Default)]
struct Vectors {
    routes: [Option<MsiMessage>; 3],
    pending: [bool; 3],
    raised: Vec<u16>,
}

impl MsiTarget for Target {
    fn route(&self, changes: &[(u16, Option<MsiMessage>)]) {
        let mut vectors = self.0.lock();
        for (vector, message) in changes {
            let at = usize::from(*vector);
            vectors.routes[at] = *message;
            if message.is_some() && std::mem::take(&mut vectors.pending[at]) {
                vectors.raised.push(*vector);
            }
        }
    }

    fn raise(&self, vector: u16) {
        let mut vectors = self.0.lock();
        match vectors.routes[usize::from(vector)] {
            Some(_) => vectors.raised.push(vector),
            None => vectors.pending[usize::from(vector)] = true,
        }
    }

    fn take_pending(&self, vector: u16) -> bool {
        std::mem::take(&mut self.0.lock().pending[usize::from(vector)])
    }
}

impl Target {
    fn raised(&self) -> Vec<u16> {
        self.0.lock().raised.clone()
    }
}

struct Machine {
    topology: Arc<Mutex<Topology>>,
    target: Arc<Target>,
    endpoint: Endpoint,
}

fn machine() -> Machine {
    let topology = Arc::new(Mutex::new(Topology::new()));
    let target = Arc::new(Target::default());
    let region = {
        let mut topology = topology.lock();
        let mut tx = topology.begin();
        let region = tx.device("bar", SIZE, Arc::new(Byte(0x5a))).unwrap();
        tx.commit().unwrap();
        region
    };
    let mut builder = EndpointBuilder::new(IDENTITY);
    builder
        .bar(&BarRequest {
            index: 0,
            region,
            size: SIZE,
            address: FIRST,
            wide: true,
            prefetchable: false,
        })
        .unwrap();
    let vendor = builder.capability(9, &[0xaa, 0xbb], &[0x0f, 0]).unwrap();
    assert_eq!(vendor, 0x40);
    let messages = Arc::clone(&target) as Arc<dyn MsiTarget>;
    builder.msix(3, 0, (0x1000, 0x2000), messages).unwrap();
    let endpoint = builder.build(Arc::new(Map(Arc::clone(&topology))));
    Machine {
        topology,
        target,
        endpoint,
    }
}

impl Machine {
    fn read(&self, at: usize) -> u32 {
        let mut data = [0; 4];
        self.endpoint.read(at, &mut data);
        u32::from_le_bytes(data)
    }

    fn answers(&self, at: u64) -> bool {
        let space = self.topology.lock().space(SpaceKind::Memory);
        let mut data = [0];
        space.view().read(at, &mut data) == Access::Answered && data == [0x5a]
    }

    fn entry(&self, vector: u64, message: MsiMessage, masked: bool) {
        let table = self.endpoint.msix().unwrap().table();
        table.write(16 * vector, &message.address.to_le_bytes());
        table.write(16 * vector + 8, &message.data.to_le_bytes());
        table.write(16 * vector + 12, &u32::from(masked).to_le_bytes());
    }
}

const MESSAGE: MsiMessage = MsiMessage {
    address: 0xfee0_1000,
    data: 0x41,
};

#[test]
fn capabilities_form_a_list() {
    let machine = machine();
    assert_eq!(machine.read(0), 0x1042_1af4);
    assert_eq!(machine.read(4) >> 16 & 0x10, 0x10);
    assert_eq!(machine.read(0x34), 0x40);
    assert_eq!(machine.read(0x40), 0xbbaa_4409);
    machine.endpoint.write(0x40, &[0; 4]);
    assert_eq!(machine.read(0x40), 0xbba0_4409);
    assert_eq!(machine.read(0x44), 0x0002_0011);
    assert_eq!((machine.read(0x48), machine.read(0x4c)), (0x1000, 0x2000));
}

#[test]
fn a_bar_is_sized_shown_and_moved() {
    let machine = machine();
    assert!(!machine.answers(FIRST), "not decoded yet");
    machine.endpoint.write(0x10, &[0xff; 4]);
    machine.endpoint.write(0x14, &[0xff; 4]);
    let sized = (machine.read(0x10), machine.read(0x14));
    assert_eq!(sized, (0xffff_c004, 0xffff_ffff));
    machine.endpoint.write(0x10, &0x8000_0000_u32.to_le_bytes());
    machine.endpoint.write(0x14, &0_u32.to_le_bytes());
    machine.endpoint.write(4, &[2]);
    assert!(machine.answers(0x8000_0000) && machine.answers(0x8000_3fff));
    assert!(!machine.answers(0x8000_4000));
    // Moved while it is decoded, one half after the other.
    machine.endpoint.write(0x14, &1_u32.to_le_bytes());
    assert!(machine.answers(0x1_8000_0000) && !machine.answers(0x8000_0000));
    machine.endpoint.write(0x10, &[0xff; 4]);
    machine.endpoint.write(0x14, &[0xff; 4]);
    assert!(
        machine.answers(u64::MAX),
        "the last bytes are addresses, too"
    );
    machine.endpoint.write(4, &[0]);
    assert!(!machine.answers(u64::MAX));
    machine.endpoint.write(0x10, &[0; 8]);
    machine.endpoint.write(4, &[2]);
    assert!(!machine.answers(0), "an address that nobody has set");
    machine.endpoint.reset();
    assert_eq!(machine.read(0x10), 4);
    assert_eq!(machine.read(0x14), 0x80);
}

#[test]
fn masked_vector_stays_pending() {
    let machine = machine();
    machine.endpoint.write(4, &[6]);
    let msix = machine.endpoint.msix().unwrap();
    machine.entry(1, MESSAGE, false);
    msix.raise(1);
    assert!(machine.target.raised().is_empty(), "MSI-X is off");
    machine.endpoint.write(0x46, &0x8000_u16.to_le_bytes());
    assert_eq!(machine.target.raised(), [1], "it was pending");
    assert_eq!(machine.target.0.lock().routes[1], Some(MESSAGE));
    msix.raise(1);
    assert_eq!(machine.target.raised(), [1, 1]);
    // Masked alone, then all together.
    machine.entry(1, MESSAGE, true);
    msix.raise(1);
    let mut pending = [0; 8];
    msix.pba().read(0, &mut pending);
    assert_eq!(pending, [2, 0, 0, 0, 0, 0, 0, 0]);
    machine.endpoint.write(0x46, &0xc000_u16.to_le_bytes());
    machine.entry(1, MESSAGE, false);
    assert_eq!(machine.target.raised().len(), 2);
    machine.endpoint.write(0x46, &0x8000_u16.to_le_bytes());
    assert_eq!(machine.target.raised(), [1, 1, 1]);
    msix.raise(3); // there are three
    msix.raise(u16::MAX);
}

/// A function that is no bus master cannot write to memory, and a message is a write.
#[test]
fn no_message_without_bus_mastering() {
    let machine = machine();
    let msix = machine.endpoint.msix().unwrap();
    machine.entry(1, MESSAGE, false);
    machine.endpoint.write(0x46, &0x8000_u16.to_le_bytes());
    msix.raise(1);
    assert!(!machine.endpoint.is_bus_master() && machine.target.raised().is_empty());
    machine.endpoint.write(4, &[6]);
    assert!(machine.endpoint.is_bus_master());
    assert_eq!(machine.target.raised(), [1], "it was pending");
    machine.endpoint.write(4, &[2]);
    msix.raise(1);
    assert_eq!(machine.target.raised(), [1]);
    // A guest of a version that did not honour the bit.
    machine.endpoint.assume_bus_master();
    assert_eq!(machine.target.raised(), [1, 1]);
    machine.endpoint.write(0x3c, &[7]);
    assert!(machine.endpoint.is_bus_master());
    machine.endpoint.write(4, &[2]);
    assert!(!machine.endpoint.is_bus_master());
}

#[test]
fn saved_state_loads_elsewhere() {
    let source = machine();
    source.endpoint.write(0x10, &0x9000_0000_u32.to_le_bytes());
    source.endpoint.write(0x14, &0_u32.to_le_bytes());
    source.endpoint.write(4, &[6]);
    source.entry(0, MESSAGE, false);
    source.endpoint.write(0x46, &0x8000_u16.to_le_bytes());
    source.endpoint.msix().unwrap().raise(2);
    let mut writer = Writer::default();
    let mut scope = writer.scope("pci").unwrap();
    source.endpoint.save(&mut scope).unwrap();
    let bytes = writer.finish();

    let target = machine();
    let mut store = Store::open(&bytes).unwrap();
    {
        let mut topology = target.topology.lock();
        let mut tx = topology.begin();
        let mut scope = store.scope("pci").unwrap();
        target.endpoint.load(&mut scope, &mut tx).unwrap();
        tx.commit().unwrap();
    }
    store.finish().unwrap();
    assert!(target.answers(0x9000_0000));
    target.endpoint.msix().unwrap().raise(0);
    assert_eq!(target.target.raised(), [0]);
    target.entry(2, MESSAGE, false);
    assert_eq!(target.target.raised(), [0, 2]);
    for at in (0..256).step_by(4) {
        assert_eq!(source.read(at), target.read(at), "register {at:#x}");
    }
}

#[test]
fn another_functions_state_is_refused() {
    let source = machine();
    let mut writer = Writer::default();
    let mut scope = writer.scope("pci").unwrap();
    source.endpoint.save(&mut scope).unwrap();
    let bytes = writer.finish();
    let topology = Arc::new(Mutex::new(Topology::new()));
    let other = EndpointBuilder::new(Identity {
        device: 0x1041,
        ..IDENTITY
    });
    let other = other.build(Arc::new(Map(Arc::clone(&topology))));
    let mut store = Store::open(&bytes).unwrap();
    let mut topology = topology.lock();
    let mut scope = store.scope("pci").unwrap();
    let refused = other.load(&mut scope, &mut topology.begin()).unwrap_err();
    assert!(
        refused.to_string().contains("another function"),
        "{refused}"
    );
}
