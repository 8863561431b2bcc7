//! A device's registers: configuration space and BAR, any width at any offset.

#![no_main]

use std::sync::Arc;

use arbitrary::Unstructured;
use devices::pci::{BarMap, ConfigSpace, MsiMessage, MsiTarget, place_bar};
use libfuzzer_sys::fuzz_target;
use memory::{AddrRange, RegionId, Topology};
use parking_lot::Mutex;
use state::{Save, Store, Writer};
use virtio_devices::rng::Rng;
use virtio_devices::testing::{TestGuest, workers};
use virtio_devices::{BAR_LEN, Slot, VirtioPci};

const BAR: u64 = 0xc000_0000;

struct Quiet;

impl MsiTarget for Quiet {
    fn route(&self, _: &[(u16, Option<MsiMessage>)]) {}
    fn raise(&self, _: u16) {}
    fn take_pending(&self, _: u16) -> bool {
        false
    }
}

struct Map(Arc<Mutex<Topology>>);

impl BarMap for Map {
    fn place(&self, region: RegionId, at: Option<u64>) {
        let mut topology = self.0.lock();
        let mut tx = topology.begin();
        if place_bar(&mut tx, region, at).is_ok() {
            tx.commit().expect("a map that can be");
        }
    }
}

fuzz_target!(|input: &[u8]| {
    let guest = TestGuest::new(1 << 20);
    let (_event_loop, workers) = workers();
    let space = guest.space();
    let shared = Arc::clone(&guest.topology);
    let device = {
        let mut topology = shared.lock();
        let mut tx = topology.begin();
        let slot = Slot {
            tx: &mut tx,
            space: space.clone(),
            bar: AddrRange::new(BAR, BAR_LEN).expect("a range"),
            map: Arc::new(Map(Arc::clone(&shared))),
            msi: Arc::new(Quiet),
            tell: Box::new(|_| {}),
        };
        let rng = Rng::new("/dev/urandom".as_ref(), workers).expect("a source of entropy");
        let device = VirtioPci::new("_rng0", Box::new(rng), slot).expect("a device");
        tx.commit().expect("a map that can be");
        device
    };
    device.write(4, &[6, 0]);
    let mut bytes = Unstructured::new(input);
    while let (Ok(kind), Ok(at), Ok(mut data), Ok(len)) = (
        bytes.int_in_range(0_u8..=5),
        bytes.int_in_range(0..=BAR_LEN + 8),
        bytes.arbitrary::<[u8; 8]>(),
        bytes.int_in_range(1_usize..=8),
    ) {
        let data = &mut data[..len];
        // Of the BAR, mostly the registers that do something.
        let register = if kind & 1 == 0 { at & 0x703f } else { at };
        match kind {
            0 | 1 => drop(space.view().write(BAR + register, data)),
            2 => drop(space.view().read(BAR + register, data)),
            3 => device.write(at as usize & 0x3ff, data),
            4 => device.read(at as usize & 0x3ff, data),
            _ => {
                device.pause();
                device.resume();
            }
        }
        if bytes.is_empty() {
            break;
        }
    }
    // What it has come to can be saved and loaded.
    device.pause();
    let mut writer = Writer::default();
    let mut scope = writer.scope("rng").expect("a section");
    device.save(&mut scope).expect("saved state");
    let saved = writer.finish();
    device.reset();
    let mut store = Store::open(&saved).expect("what was saved");
    let mut topology = shared.lock();
    let mut tx = topology.begin();
    let mut scope = store.scope("rng").expect("a section");
    device.load(&mut scope, &mut tx).expect("what was saved");
    tx.commit().expect("a map that can be");
});
