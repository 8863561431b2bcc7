//! A device behind the PCI transport, and a driver that finds its way from configuration space.

#![allow(clippy::unwrap_used, clippy::panic, reason = "tests")]

use std::path::Path;
use std::sync::Arc;

use devices::pci::{BarMap, ConfigSpace, MsiMessage, MsiTarget, place_bar};
use memory::{AddrRange, RegionId, SpaceKind, Topology};
use parking_lot::Mutex;
use proptest::prelude::*;
use state::{Save, Store, Writer};
use virtio_devices::rng::Rng;
use virtio_devices::testing::{PATIENCE, TestBuffer, TestGuest, TestQueue, workers};
use virtio_devices::vsock::Vsock;
use virtio_devices::{BAR_LEN, Slot, TransportEvent, VirtioDevice, VirtioPci, Workers};

const BAR: u64 = 0xc000_0000;

#[derive(Default)]
struct Target {
    raised: Mutex<Vec<u16>>,
}

impl MsiTarget for Target {
    fn route(&self, _: &[(u16, Option<MsiMessage>)]) {}

    fn raise(&self, vector: u16) {
        self.raised.lock().push(vector);
    }

    fn take_pending(&self, _: u16) -> bool {
        false
    }
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

/// A machine with one device, and what a driver knows.
struct Machine {
    guest: TestGuest,
    topology: Arc<Mutex<Topology>>,
    target: Arc<Target>,
    events: Arc<Mutex<Vec<TransportEvent>>>,
    device: Arc<VirtioPci>,
    _event_loop: devices::event_loop::EventLoop,
}

fn machine() -> Machine {
    machine_with(|workers| Box::new(Rng::new(Path::new("/dev/urandom"), workers).unwrap()))
}

fn machine_with(device: impl FnOnce(Workers) -> Box<dyn VirtioDevice>) -> Machine {
    let guest = TestGuest::new(1 << 20);
    let space = guest.space();
    let (event_loop, workers) = workers();
    let target = Arc::new(Target::default());
    let events = Arc::new(Mutex::new(Vec::new()));
    let heard = Arc::clone(&events);
    let shared = Arc::clone(&guest.topology);
    let mut topology = shared.lock();
    let mut tx = topology.begin();
    let slot = Slot {
        tx: &mut tx,
        space,
        bar: AddrRange::new(BAR, BAR_LEN).unwrap(),
        map: Arc::new(Map(Arc::clone(&shared))),
        msi: Arc::clone(&target) as Arc<dyn MsiTarget>,
        tell: Box::new(move |event| heard.lock().push(event)),
    };
    let device = VirtioPci::new("_rng0", device(workers), slot).unwrap();
    tx.commit().unwrap();
    drop(topology);
    Machine {
        guest,
        topology: shared,
        target,
        events,
        device,
        _event_loop: event_loop,
    }
}

impl Machine {
    fn config(&self, at: usize) -> u32 {
        let mut data = [0; 4];
        self.device.read(at, &mut data);
        u32::from_le_bytes(data)
    }

    /// Offset of the structure of this kind, by the list of capabilities.
    fn structure(&self, kind: u8) -> u64 {
        let mut at = (self.config(0x34) & 0xff) as usize;
        while at != 0 {
            let head = self.config(at).to_le_bytes();
            if head[0] == 9 && head[3] == kind {
                return self.config(at + 8).into();
            }
            at = head[1].into();
        }
        panic!("there is no structure {kind}");
    }

    fn write(&self, at: u64, data: &[u8]) {
        let space = self.topology.lock().space(SpaceKind::Memory);
        space.view().write(BAR + at, data);
    }

    fn read(&self, at: u64, len: usize) -> Vec<u8> {
        let space = self.topology.lock().space(SpaceKind::Memory);
        let mut data = vec![0; len];
        space.view().read(BAR + at, &mut data);
        data
    }

    fn status(&self) -> u8 {
        self.read(self.structure(1) + 20, 1)[0]
    }

    /// Negotiates, sets queue 0 up, and is ready. Vector 1 is the queue's.
    fn drive(&self, queue: &TestQueue) {
        let common = self.structure(1);
        let set = |at: u64, data: &[u8]| self.write(common + at, data);
        set(20, &[0]);
        set(20, &[1]);
        set(20, &[3]);
        set(8, &1_u32.to_le_bytes());
        set(12, &1_u32.to_le_bytes());
        set(20, &[11]);
        assert_eq!(self.status(), 11, "features are accepted");
        set(22, &0_u16.to_le_bytes());
        set(24, &queue.rings.size.to_le_bytes());
        set(26, &1_u16.to_le_bytes());
        set(32, &queue.rings.descriptors.to_le_bytes());
        set(40, &queue.rings.available.to_le_bytes());
        set(48, &queue.rings.used.to_le_bytes());
        set(28, &1_u16.to_le_bytes());
        let table = 0x4000;
        self.write(table + 16, &0xfee0_0000_u64.to_le_bytes());
        self.write(table + 24, &0x31_u32.to_le_bytes());
        self.write(table + 28, &0_u32.to_le_bytes());
        // MSI-X is the last capability.
        let mut at = (self.config(0x34) & 0xff) as usize;
        while self.config(at) & 0xff != 0x11 {
            at = (self.config(at) >> 8 & 0xff) as usize;
        }
        self.device.write(at + 2, &0x8000_u16.to_le_bytes());
        set(20, &[15]);
    }

    fn kick(&self) {
        self.write(self.structure(2), &0_u32.to_le_bytes());
    }
}

#[test]
fn a_driver_finds_negotiates_and_is_served() {
    let mut machine = machine();
    assert_eq!(machine.config(0), 0x1044_1af4);
    machine.device.write(4, &[6, 0]);
    let mut queue = TestQueue::new(&mut machine.guest, 0, 16);
    machine.drive(&queue);
    assert_eq!(machine.status(), 15);
    let at = machine.guest.alloc(64);
    for round in 1..=5 {
        let buffer = TestBuffer {
            addr: at,
            len: 64,
            writable: true,
        };
        let head = queue.describe(&[buffer]);
        queue.offer(head);
        machine.kick();
        assert_eq!(queue.wait_used(), (head, 64));
        let from = std::time::Instant::now();
        while machine.target.raised.lock().len() < round && from.elapsed() < PATIENCE {
            std::thread::yield_now();
        }
        assert_eq!(*machine.target.raised.lock(), vec![1; round]);
        // Paused, saved, forgotten, loaded: the driver does not notice.
        machine.device.pause();
        let mut writer = Writer::default();
        let mut scope = writer.scope("rng").unwrap();
        machine.device.save(&mut scope).unwrap();
        let bytes = writer.finish();
        machine.device.reset();
        let mut store = Store::open(&bytes).unwrap();
        {
            let mut topology = machine.topology.lock();
            let mut tx = topology.begin();
            let mut scope = store.scope("rng").unwrap();
            machine.device.load(&mut scope, &mut tx).unwrap();
            tx.commit().unwrap();
        }
        store.finish().unwrap();
        machine.device.resume();
    }
    assert_ne!(machine.guest.read(at, 64), [0; 64]);
    let counters = machine.device.counters();
    assert_eq!(counters, [("bytes", 5 * 64), ("requests", 5)]);
    assert_eq!(*machine.events.lock(), [TransportEvent::Activated]);
}

#[test]
fn a_guest_that_breaks_the_rules_stops_its_device_and_can_start_again() {
    let mut machine = machine();
    machine.device.write(4, &[6, 0]);
    let mut queue = TestQueue::new(&mut machine.guest, 0, 16);
    machine.drive(&queue);
    queue.set_descriptor(0, 1 << 50, 8, 2, 0);
    queue.offer(0);
    machine.kick();
    let from = std::time::Instant::now();
    while machine.status() & 0x40 == 0 && from.elapsed() < PATIENCE {
        std::thread::yield_now();
    }
    assert_eq!(machine.status(), 15 | 0x40, "DEVICE_NEEDS_RESET");
    assert!(matches!(&machine.events.lock()[..],
        [TransportEvent::Activated, TransportEvent::NeedsReset(why)] if why.contains("not RAM")));
    let mut queue = TestQueue::new(&mut machine.guest, 0, 16);
    machine.drive(&queue);
    let at = machine.guest.alloc(8);
    let buffer = TestBuffer {
        addr: at,
        len: 8,
        writable: true,
    };
    let head = queue.describe(&[buffer]);
    queue.offer(head);
    machine.kick();
    assert_eq!(queue.wait_used(), (head, 8));
}

#[test]
fn the_bar_is_within_reach_of_configuration_space() {
    let machine = machine();
    let mut at = (machine.config(0x34) & 0xff) as usize;
    while machine.config(at).to_le_bytes()[3] != 5 || machine.config(at) & 0xff != 9 {
        at = (machine.config(at) >> 8 & 0xff) as usize;
    }
    // num_queues of common configuration, with memory decoding off.
    machine.device.write(at + 8, &18_u32.to_le_bytes());
    machine.device.write(at + 12, &2_u32.to_le_bytes());
    assert_eq!(machine.config(at + 16) & 0xffff, 1);
    machine.device.write(at + 8, &20_u32.to_le_bytes());
    machine.device.write(at + 12, &1_u32.to_le_bytes());
    machine.device.write(at + 16, &[1, 0, 0, 0]);
    assert_eq!(machine.config(at + 16) & 0xff, 1);
}

#[test]
fn what_is_removed_leaves_nothing_in_the_map() {
    let machine = machine();
    machine.device.write(4, &[6, 0]);
    let space = machine.topology.lock().space(SpaceKind::Memory);
    assert!(space.view().find(BAR).is_some());
    let retired = Arc::clone(&machine.device).retire();
    let mut topology = machine.topology.lock();
    let mut tx = topology.begin();
    retired.remove(&mut tx).unwrap();
    tx.commit().unwrap();
    assert!(space.view().find(BAR).is_none());
    let tree = topology.tree(SpaceKind::Memory).unwrap();
    assert_eq!(tree.children.len(), 1, "the RAM");
}

/// Readers of the map may still have it as it was, with the device's registers.
#[test]
fn what_a_device_holds_is_given_back_when_it_is_retired() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("vsock");
    let machine = machine_with(|workers| Box::new(Vsock::new(3, &socket, workers).unwrap()));
    machine.device.write(4, &[6, 0]);
    let view = vm_memory::GuestAddressSpace::memory(&machine.guest.space());
    assert!(socket.exists());
    drop(Arc::clone(&machine.device).retire());
    assert!(!socket.exists());
    let mut data = [0xff; 8];
    view.read(BAR + 0x2000, &mut data);
    assert_eq!(data, [0; 8], "there is no address of a guest any more");
    for status in [0, 1, 3, 11, 15] {
        view.write(BAR + 0x14, &[status]);
    }
    let events = machine.events.lock();
    assert!(!events.contains(&TransportEvent::Activated), "{events:?}");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    /// Whatever a guest does to configuration space and the BAR, the device answers.
    #[test]
    fn any_access_is_answered(
        accesses in prop::collection::vec(
            (any::<bool>(), any::<bool>(), 0_usize..0x400, 0_u64..BAR_LEN, prop::collection::vec(any::<u8>(), 1..9)),
            0..200,
        )
    ) {
        let machine = machine();
        machine.device.write(4, &[6, 0]);
        for (config, write, low, high, mut data) in accesses {
            match (config, write) {
                // Its BAR stays, so that the accesses meet it.
                (true, true) if !(4..0x28).contains(&low) => machine.device.write(low, &data),
                (true, _) => machine.device.read(low, &mut data),
                (false, true) => machine.write(high, &data),
                (false, false) => drop(machine.read(high, data.len())),
            }
        }
        machine.device.pause();
        let mut writer = Writer::default();
        machine.device.save(&mut writer.scope("rng").unwrap()).unwrap();
    }
}
