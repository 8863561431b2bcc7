//! Calls of listeners: their content, their order, and their end.

#![expect(clippy::unwrap_used, reason = "a test that goes wrong panics")]

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Weak};
use std::thread;
use std::time::Duration;

use memory::{
    AddressSpace, CommitError, DeviceOps, ListenerError, ListenerHandle, MemoryListener, RamBlock,
    RamConfig, RamSlice, RegionId, RingWindow, SpaceKind, Topology, ViewChange, WindowError,
};
use parking_lot::Mutex;
use vm_memory::{Bytes, GuestAddress, GuestAddressSpace};

const SPACE: SpaceKind = SpaceKind::Memory;

struct Nobody;

impl DeviceOps for Nobody {
    fn read(&self, _: u64, _: &mut [u8]) {}
    fn write(&self, _: u64, _: &[u8]) {}
}

/// Records its calls, and answers as configured.
#[derive(Default)]
struct Notes {
    name: &'static str,
    seen: Arc<Mutex<Vec<String>>>,
    refuse: AtomicBool,
    fail: AtomicBool,
    drop_in_apply: Mutex<Option<ListenerHandle>>,
}

impl Notes {
    fn new(name: &'static str, seen: &Arc<Mutex<Vec<String>>>) -> Arc<Self> {
        Arc::new(Self {
            name,
            seen: Arc::clone(seen),
            ..Self::default()
        })
    }
}

impl MemoryListener for Notes {
    fn prepare(&self, _: &ViewChange) -> Result<(), ListenerError> {
        match self.refuse.load(Ordering::Relaxed) {
            true => Err(ListenerError::new("not today")),
            false => Ok(()),
        }
    }

    fn apply(&self, change: &ViewChange) -> Result<(), ListenerError> {
        let note = format!(
            "{} -{} +{}",
            self.name,
            change.removed.len(),
            change.added.len()
        );
        self.seen.lock().push(note);
        drop(self.drop_in_apply.lock().take());
        match self.fail.load(Ordering::Relaxed) {
            true => Err(ListenerError::new("broke")),
            false => Ok(()),
        }
    }
}

fn place_device(topology: &mut Topology, addr: u64) -> Result<RegionId, CommitError> {
    let mut tx = topology.begin();
    let id = tx.device("d", 0x10, Arc::new(Nobody)).unwrap();
    tx.map(SPACE, addr, id, 0).unwrap();
    tx.commit().map(|()| id)
}

#[test]
fn listeners_run_in_priority_order() {
    let seen = Arc::default();
    let mut topology = Topology::new();
    place_device(&mut topology, 0).unwrap();
    let _b = topology.register(SPACE, 5, Notes::new("b", &seen)).unwrap();
    let _a = topology
        .register(SPACE, -5, Notes::new("a", &seen))
        .unwrap();
    let _c = topology.register(SPACE, 5, Notes::new("c", &seen)).unwrap();
    assert_eq!(*seen.lock(), ["b -0 +1", "a -0 +1", "c -0 +1"]);
    seen.lock().clear();
    place_device(&mut topology, 0x100).unwrap();
    assert_eq!(*seen.lock(), ["a -0 +1", "b -0 +1", "c -0 +1"]);
}

#[test]
fn refusal_keeps_old_map() {
    let seen = Arc::default();
    let mut topology = Topology::new();
    let (first, second) = (Notes::new("first", &seen), Notes::new("second", &seen));
    let _first = topology
        .register(SPACE, 0, Arc::clone(&first) as _)
        .unwrap();
    let _second = topology
        .register(SPACE, 1, Arc::clone(&second) as _)
        .unwrap();
    second.refuse.store(true, Ordering::Relaxed);
    let refused = place_device(&mut topology, 0).unwrap_err();
    assert_eq!(refused.to_string(), "the change was refused: not today");
    assert!(seen.lock().is_empty() && topology.space(SPACE).view().ranges().is_empty());
    second.refuse.store(false, Ordering::Relaxed);
    place_device(&mut topology, 0).unwrap();
    assert_eq!(topology.space(SPACE).view().ranges().len(), 1);
}

#[test]
fn partial_failure_poisons_topology() {
    let mut topology = Topology::new();
    let notes = Notes::new("n", &Arc::default());
    let _handle = topology
        .register(SPACE, 0, Arc::clone(&notes) as _)
        .unwrap();
    notes.fail.store(true, Ordering::Relaxed);
    assert!(matches!(
        place_device(&mut topology, 0),
        Err(CommitError::Failed(_))
    ));
    notes.fail.store(false, Ordering::Relaxed);
    assert!(matches!(
        place_device(&mut topology, 0x100),
        Err(CommitError::Failed(_))
    ));
    assert_eq!(topology.failure(), Some("broke"));
}

#[test]
fn dropped_handle_ends_subscription() {
    let seen = Arc::default();
    let mut topology = Topology::new();
    let notes = Notes::new("n", &seen);
    let handle = topology
        .register(SPACE, 0, Arc::clone(&notes) as _)
        .unwrap();
    *notes.drop_in_apply.lock() = Some(handle);
    let alive = Arc::downgrade(&notes);
    drop(notes);
    place_device(&mut topology, 0).unwrap();
    assert_eq!(seen.lock().len(), 1);
    assert_eq!(
        alive.strong_count(),
        0,
        "the last owner of an ended subscription is gone"
    );
    place_device(&mut topology, 0x100).unwrap();
    assert_eq!(seen.lock().len(), 1);
}

/// Fails the test if it is called after its handle was dropped.
struct Fragile {
    owner: Weak<AtomicUsize>,
}

impl MemoryListener for Fragile {
    fn prepare(&self, _: &ViewChange) -> Result<(), ListenerError> {
        Ok(())
    }

    fn apply(&self, _: &ViewChange) -> Result<(), ListenerError> {
        // The sleep makes it likely that the handle is dropped while the call runs.
        thread::sleep(Duration::from_micros(20));
        self.owner
            .upgrade()
            .expect("called after the handle was dropped")
            .fetch_add(1, Ordering::Relaxed);
        Ok(())
    }
}

#[test]
fn dropping_a_handle_waits_for_the_callback() {
    let topology = Arc::new(Mutex::new(Topology::new()));
    let region = place_device(&mut topology.lock(), 0).unwrap();
    let done = Arc::new(AtomicBool::new(false));
    let committer = thread::spawn({
        let (topology, done) = (Arc::clone(&topology), Arc::clone(&done));
        move || {
            for step in 0.. {
                let mut topology = topology.lock();
                let mut tx = topology.begin();
                tx.unplace(region).unwrap();
                tx.map(SPACE, (step % 16) * 0x100 + 0x1000, region, 0)
                    .unwrap();
                tx.commit().unwrap();
                drop(topology);
                if done.load(Ordering::Relaxed) {
                    return;
                }
                thread::yield_now();
            }
        }
    });
    for _ in 0..2_000 {
        let owner = Arc::new(AtomicUsize::new(0));
        let listener = Arc::new(Fragile {
            owner: Arc::downgrade(&owner),
        });
        let handle = topology.lock().register(SPACE, 0, listener).unwrap();
        thread::yield_now();
        drop(handle);
        drop(owner);
    }
    done.store(true, Ordering::Relaxed);
    committer.join().unwrap();
}

#[test]
fn ram_is_unmapped_after_last_reader() {
    let mut topology = Topology::new();
    let block = Arc::new(RamBlock::new(&RamConfig::anonymous(0x1000)).unwrap());
    let alive = Arc::downgrade(&block);
    let ram = {
        let mut tx = topology.begin();
        let ram = tx
            .ram("ram", RamSlice { block, offset: 0 }, 0x1000)
            .unwrap();
        tx.map(SPACE, 0, ram, 0).unwrap();
        tx.commit().unwrap();
        ram
    };
    let reader = topology.space(SPACE).memory();
    let mut tx = topology.begin();
    tx.unplace(ram).unwrap();
    tx.destroy(ram).unwrap();
    tx.commit().unwrap();
    assert!(topology.space(SPACE).view().find(0).is_none());
    // The guest has lost the RAM, but this reader's view still owns the block: the write must hit
    // mapped memory.
    reader.write_obj(0x1234_u16, GuestAddress(0)).unwrap();
    assert_eq!(alive.strong_count(), 2, "the view's range and its RAM");
    drop(reader);
    assert_eq!(alive.strong_count(), 0);
}

/// A device that reads the space in which it is.
struct Reader(#[expect(dead_code, reason = "it is held")] AddressSpace);

impl DeviceOps for Reader {
    fn read(&self, _: u64, _: &mut [u8]) {}
    fn write(&self, _: u64, _: &[u8]) {}
}

#[test]
fn dropped_map_releases_devices() {
    let mut topology = Topology::new();
    let device = Arc::new(Reader(topology.space(SpaceKind::Memory)));
    let watched = Arc::downgrade(&device);
    let mut tx = topology.begin();
    let region = tx.device("reader", 0x1000, device).unwrap();
    tx.map(SpaceKind::Memory, 0, region, 0).unwrap();
    tx.commit().unwrap();
    let space = topology.space(SpaceKind::Memory);
    let generation = space.generation();
    assert!(watched.upgrade().is_some());
    drop(topology);
    assert!(watched.upgrade().is_none());
    assert!(space.view().ranges().is_empty() && space.generation() > generation);
}

#[test]
fn window_follows_map_and_marks_dirty() {
    let mut topology = Topology::new();
    let block = Arc::new(RamBlock::new(&RamConfig::anonymous(0x4000)).unwrap());
    let mut tx = topology.begin();
    let ram = tx
        .ram(
            "ram",
            RamSlice {
                block: Arc::clone(&block),
                offset: 0,
            },
            0x4000,
        )
        .unwrap();
    tx.map(SPACE, 0x10000, ram, 0).unwrap();
    tx.commit().unwrap();
    let space = topology.space(SPACE);
    let mut window = RingWindow::new(&space, 0x12000, 0x100).unwrap();
    block.dirty().set_enabled(true);
    window
        .slice(&space)
        .unwrap()
        .write_obj(0xabcd_u16, 0x10)
        .unwrap();
    assert!(block.dirty().is_dirty(0x2010) && block.dirty().count() == 1);

    let mut tx = topology.begin();
    tx.unplace(ram).unwrap();
    tx.map(SPACE, 0x20000, ram, 0).unwrap();
    tx.commit().unwrap();
    assert!(matches!(window.slice(&space), Err(WindowError::NotRam(_))));
    let mut tx = topology.begin();
    tx.unplace(ram).unwrap();
    tx.map(SPACE, 0x11000, ram, 0).unwrap();
    tx.commit().unwrap();
    assert_eq!(
        window.slice(&space).unwrap().read_obj::<u16>(0x10).unwrap(),
        0
    );
    window.slice(&space).unwrap().write_obj(1_u8, 0).unwrap();
    assert!(block.dirty().is_dirty(0x1000));

    for (addr, len) in [(0x14000, 0x1001), (0x10000, 1), (0x11000, 0), (u64::MAX, 2)] {
        assert!(
            RingWindow::new(&space, addr, len).is_err(),
            "{len:#x} bytes at {addr:#x}"
        );
    }
}
