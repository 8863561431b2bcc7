//! A device behind the PCI transport, for targets that are its driver.

use std::sync::Arc;

use devices::event_loop::EventLoop;
use devices::pci::{BarMap, MsiMessage, MsiTarget, place_bar};
use memory::{AddrRange, AddressSpace, RegionId, Topology};
use parking_lot::Mutex;
use state::{Save, Store, Writer};
use virtio_devices::rate_limiter::RateLimits;
use virtio_devices::rng::Rng;
use virtio_devices::testing::{TestGuest, workers};
use virtio_devices::{BAR_LEN, Slot, TransportEvent, VirtioPci};

/// The BAR's first address.
pub const BAR: u64 = 0xc000_0000;

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

/// An entropy device on the bus of a guest of 1 MiB.
pub struct PciMachine {
    /// The device, whose configuration space the driver reads and writes.
    pub device: Arc<VirtioPci>,
    /// The address space in which the driver finds the BAR, if it is shown.
    pub space: AddressSpace,
    /// The guest's memory.
    pub guest: TestGuest,
    topology: Arc<Mutex<Topology>>,
    events: Arc<Mutex<Vec<TransportEvent>>>,
    _event_loop: EventLoop,
}

impl PciMachine {
    /// Builds the machine, as after power-on.
    pub fn new() -> Self {
        let guest = TestGuest::new(1 << 20);
        let (event_loop, workers) = workers();
        let space = guest.space();
        let topology = Arc::clone(&guest.topology);
        let events = Arc::new(Mutex::new(Vec::new()));
        let heard = Arc::clone(&events);
        let device = {
            let mut locked = topology.lock();
            let mut tx = locked.begin();
            let slot = Slot {
                tx: &mut tx,
                space: space.clone(),
                bar: AddrRange::new(BAR, BAR_LEN).expect("a range"),
                map: Arc::new(Map(Arc::clone(&topology))),
                msi: Arc::new(Quiet),
                report: Box::new(move |event| heard.lock().push(event)),
            };
            let rng = Rng::new("/dev/urandom".as_ref(), RateLimits::default(), workers)
                .expect("a source of entropy");
            let device = VirtioPci::new("_rng0", Box::new(rng), slot).expect("a device");
            tx.commit().expect("a map that can be");
            device
        };
        Self {
            device,
            space,
            guest,
            topology,
            events,
            _event_loop: event_loop,
        }
    }

    /// Whatever the device has come to can be saved and loaded. It stays paused.
    pub fn move_on(&self) {
        self.device.pause();
        let mut writer = Writer::default();
        let mut scope = writer.scope("rng").expect("a section");
        self.device.save(&mut scope).expect("saved state");
        let saved = writer.finish();
        self.device.reset();
        let mut store = Store::open(&saved).expect("what was saved");
        let mut topology = self.topology.lock();
        let mut tx = topology.begin();
        let mut scope = store.scope("rng").expect("a section");
        self.device
            .load(&mut scope, &mut tx)
            .expect("what was saved");
        tx.commit().expect("a map that can be");
    }

    /// Ends with the device saved and loaded; a panic of its task ends the process.
    pub fn finish(self) {
        self.move_on();
        let failed = |event: &TransportEvent| matches!(event, TransportEvent::NeedsReset(why) if why.contains("the device failed"));
        assert!(
            !self.events.lock().iter().any(failed),
            "the device panicked"
        );
    }
}

impl Default for PciMachine {
    fn default() -> Self {
        Self::new()
    }
}
