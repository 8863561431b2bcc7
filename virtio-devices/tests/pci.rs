//! A device behind the PCI transport, and a driver that finds its way from configuration space.

#![allow(clippy::unwrap_used, clippy::panic, reason = "tests")]

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use devices::event_loop::EventLoop;
use devices::pci::{BarMap, ConfigSpace, MsiMessage, MsiTarget, place_bar};
use memory::{AddrRange, RegionId, SpaceKind, Topology};
use parking_lot::Mutex;
use proptest::prelude::*;
use state::{LoadError, LoadScope, Save, SaveError, Scope, Store, Writer};
use virtio_devices::rate_limiter::RateLimits;
use virtio_devices::rng::Rng;
use virtio_devices::testing::{PATIENCE, TestBuffer, TestGuest, TestQueue, wait_idle, workers};
use virtio_devices::vsock::Vsock;
use virtio_devices::{
    BAR_LEN, DeviceError, DeviceId, Queue, QueueState, Slot, Transport, TransportEvent,
    VirtioDevice, VirtioPci, Workers,
};

const BAR: u64 = 0xc000_0000;
/// `VIRTIO_F_RING_RESET`, of the high half of the features.
const RING_RESET_HIGH: u32 = 1 << 8;

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
    event_loop: EventLoop,
}

fn machine() -> Machine {
    machine_with(|workers| {
        Box::new(Rng::new(Path::new("/dev/urandom"), RateLimits::default(), workers).unwrap())
    })
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
        report: Box::new(move |event| heard.lock().push(event)),
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
        event_loop,
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
        set(12, &(1_u32 | RING_RESET_HIGH).to_le_bytes());
        set(20, &[11]);
        assert_eq!(self.status(), 11, "features are accepted");
        self.enable(queue);
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

    /// Sets queue 0 up and enables it.
    fn enable(&self, queue: &TestQueue) {
        let common = self.structure(1);
        let set = |at: u64, data: &[u8]| self.write(common + at, data);
        set(22, &0_u16.to_le_bytes());
        set(24, &queue.rings.size.to_le_bytes());
        set(26, &1_u16.to_le_bytes());
        set(32, &queue.rings.descriptors.to_le_bytes());
        set(40, &queue.rings.available.to_le_bytes());
        set(48, &queue.rings.used.to_le_bytes());
        set(28, &1_u16.to_le_bytes());
    }

    fn kick(&self) {
        self.write(self.structure(2), &0_u32.to_le_bytes());
    }

    /// A buffer of the guest's for the device to fill.
    fn send(&mut self, queue: &mut TestQueue) -> u16 {
        let buffer = TestBuffer {
            addr: self.guest.alloc(8),
            len: 8,
            writable: true,
        };
        let head = queue.describe(&[buffer]);
        queue.offer(head);
        self.kick();
        head
    }

    fn save(&self) -> Vec<u8> {
        let mut writer = Writer::default();
        let mut scope = writer.scope("rng").unwrap();
        self.device.save(&mut scope).unwrap();
        writer.finish()
    }

    fn load(&self, saved: &[u8]) {
        let mut store = Store::open(saved).unwrap();
        let mut topology = self.topology.lock();
        let mut tx = topology.begin();
        let mut scope = store.scope("rng").unwrap();
        self.device.load(&mut scope, &mut tx).unwrap();
        tx.commit().unwrap();
        store.finish().unwrap();
    }
}

#[test]
fn driver_negotiates_and_is_served() {
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
        let saved = machine.save();
        machine.device.reset();
        machine.load(&saved);
        machine.device.resume();
    }
    assert_ne!(machine.guest.read(at, 64), [0; 64]);
    let counters = machine.device.counters();
    assert_eq!(counters, [("bytes", 5 * 64), ("requests", 5)]);
    assert_eq!(*machine.events.lock(), [TransportEvent::Activated]);
}

#[test]
fn broken_device_recovers_by_reset() {
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
    let head = machine.send(&mut queue);
    assert_eq!(queue.wait_used(), (head, 8));
}

/// The interrupt that tells the driver of `DEVICE_NEEDS_RESET` may be lost where the device was saved.
#[test]
fn config_interrupt_is_repeated_after_load() {
    let mut machine = machine();
    machine.device.write(4, &[6, 0]);
    let mut queue = TestQueue::new(&mut machine.guest, 0, 16);
    machine.drive(&queue);
    machine.write(machine.structure(1) + 16, &0_u16.to_le_bytes());
    machine.device.repeat_interrupts();
    assert_eq!(*machine.target.raised.lock(), [1], "nothing has changed");
    queue.set_descriptor(0, 1 << 50, 8, 2, 0);
    queue.offer(0);
    machine.kick();
    let from = std::time::Instant::now();
    while machine.target.raised.lock().len() < 2 && from.elapsed() < PATIENCE {
        std::thread::yield_now();
    }
    assert_eq!(*machine.target.raised.lock(), [1, 0]);
    machine.device.pause();
    let saved = machine.save();
    machine.device.reset();
    machine.load(&saved);
    machine.device.resume();
    machine.device.repeat_interrupts();
    assert_eq!(*machine.target.raised.lock(), [1, 0, 0]);
}

/// A device that is no bus master cannot reach guest memory (PCI Local Bus 3.0, 6.2.2). Requests
/// wait, as they do while the machine is paused.
#[test]
fn queues_wait_for_bus_mastering() {
    let mut machine = machine();
    machine.device.write(4, &[2, 0]);
    let mut queue = TestQueue::new(&mut machine.guest, 0, 16);
    machine.drive(&queue);
    let head = machine.send(&mut queue);
    wait_idle(&machine.event_loop);
    assert_eq!(queue.take_used(), None);
    machine.device.write(4, &[6, 0]);
    assert_eq!(queue.wait_used(), (head, 8));
    // Off, through a migration, and on again.
    machine.device.write(4, &[2, 0]);
    let head = machine.send(&mut queue);
    machine.device.pause();
    let saved = machine.save();
    machine.device.reset();
    machine.load(&saved);
    machine.device.resume();
    wait_idle(&machine.event_loop);
    assert_eq!(queue.take_used(), None);
    machine.device.write(4, &[6, 0]);
    assert_eq!(queue.wait_used(), (head, 8));
}

/// The first version of saved state is of a program that did not look at the bit. Its guests go
/// on, until they write the command register.
#[test]
fn old_guest_without_bus_mastering_is_served() {
    let mut machine = machine();
    // The same layout as that of the guest that was saved.
    let mut queue = TestQueue::new(&mut machine.guest, 0, 16);
    machine.load(include_bytes!("golden/virtio-pci-running.v1"));
    for _ in 0..2 {
        machine.device.resume();
        let head = machine.send(&mut queue);
        assert_eq!(queue.wait_used(), (head, 8));
        // Still so when it moves on.
        machine.device.pause();
        let saved = machine.save();
        machine.load(&saved);
    }
    machine.device.resume();
    machine.device.write(4, &[2, 0]);
    machine.send(&mut queue);
    wait_idle(&machine.event_loop);
    assert_eq!(queue.take_used(), None);
}

#[test]
fn broken_device_starts_no_queue() {
    let plain = Plain::default();
    let started = Arc::clone(&plain.started);
    let mut machine = machine_with(|_| Box::new(plain));
    machine.device.write(4, &[6, 0]);
    let queue = TestQueue::new(&mut machine.guest, 0, 16);
    machine.drive(&queue);
    assert_eq!(started.load(Ordering::Relaxed), 1);
    let common = machine.structure(1);
    let set = |at: u64, data: &[u8]| machine.write(common + at, data);
    // A queue that is moved while it is enabled.
    set(32, &0x8000_u64.to_le_bytes());
    assert_eq!(machine.status(), 15 | 0x40, "DEVICE_NEEDS_RESET");
    // The queue is reset alone and enabled again; then bus mastering and a pause come and go.
    set(58, &1_u16.to_le_bytes());
    machine.enable(&queue);
    machine.device.write(4, &[2, 0]);
    machine.device.write(4, &[6, 0]);
    machine.device.pause();
    machine.device.resume();
    // After a reset: ready before features were agreed upon, then ready as it should be.
    set(20, &[0]);
    set(20, &[4]);
    assert_eq!(machine.status() & 0x40, 0x40);
    set(8, &1_u32.to_le_bytes());
    set(12, &1_u32.to_le_bytes());
    machine.enable(&queue);
    set(20, &[11]);
    set(20, &[15]);
    assert_eq!(started.load(Ordering::Relaxed), 1);
    machine.drive(&queue);
    assert_eq!(started.load(Ordering::Relaxed), 2, "a reset helps");
}

/// A device of one 64-bit field, which changes without telling, and a queue that it does not serve.
#[derive(Default)]
struct Plain {
    config: Arc<AtomicU64>,
    started: Arc<AtomicU64>,
}

impl VirtioDevice for Plain {
    fn id(&self) -> DeviceId {
        DeviceId::BLOCK
    }

    fn features(&self) -> u64 {
        0
    }

    fn queue_sizes(&self) -> Vec<u16> {
        vec![16]
    }

    fn config_space(&self) -> Vec<u8> {
        self.config.load(Ordering::Relaxed).to_le_bytes().to_vec()
    }

    fn activate(&mut self, _: u64, _: &Arc<Transport>) -> Result<(), DeviceError> {
        Ok(())
    }

    fn start_queue(&mut self, _: Queue) -> Result<(), DeviceError> {
        self.started.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }

    fn stop_queue(&mut self, _: u16) -> Option<QueueState> {
        None
    }

    fn queue_state(&self, _: u16) -> Option<QueueState> {
        None
    }

    fn reset(&mut self) {}

    fn save(&self, _: &mut Scope<'_>) -> Result<(), SaveError> {
        Ok(())
    }

    fn load(&mut self, _: &mut LoadScope<'_, '_>) -> Result<(), LoadError> {
        Ok(())
    }

    fn counters(&self) -> Vec<(&'static str, u64)> {
        Vec::new()
    }
}

/// A driver that reads a field in two halves finds out that they are not of the same value (virtio
/// 1.3, 4.1.4.3.1), however little time has passed since the change.
#[test]
fn torn_read_of_config_space_changes_generation() {
    let plain = Plain::default();
    let value = Arc::clone(&plain.config);
    value.store(0x1111_1111_1111_1111, Ordering::Relaxed);
    let machine = machine_with(|_| Box::new(plain));
    machine.device.write(4, &[6, 0]);
    let generation = || machine.read(machine.structure(1) + 21, 1);
    let config = machine.structure(4);
    let before = generation();
    assert_eq!(machine.read(config, 8), [0x11; 8]);
    assert_eq!(generation(), before, "nothing has changed");
    assert_eq!(machine.read(config, 4), [0x11; 4]);
    value.store(0x2222_2222_2222_2222, Ordering::Relaxed);
    assert_eq!(machine.read(config + 4, 4), [0x22; 4]);
    let after = generation();
    assert_ne!(after, before);
    value.store(0x3333_3333_3333_3333, Ordering::Relaxed);
    assert_ne!(generation(), after);
}

#[test]
fn bar_is_accessible_by_config_space() {
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
fn removal_clears_memory_map() {
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
fn retired_device_releases_resources() {
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
