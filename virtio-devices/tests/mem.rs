//! Memory devices: the test is the guest.

#![allow(clippy::unwrap_used, clippy::panic, reason = "tests")]

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use devices::event_loop::EventLoop;
use memory::{RamBlock, RamConfig};
use proptest::prelude::*;
use state::{Store, Writer};
use virtio_devices::mem::{MIN_BLOCK, Mem, MemConfig, MemHandle};
use virtio_devices::testing::{
    CONFIG_VECTOR, Heard, PATIENCE, TestBuffer, TestGuest, TestQueue, transport, workers,
};
use virtio_devices::{QueueState, Transport, VirtioDevice};

/// Guest address of the region.
const ADDR: u64 = 5 << 30;
/// Blocks of the region: more than a device changes in one turn.
const BLOCKS: u64 = 64;
const BLOCK: u64 = MIN_BLOCK;

const PLUG: u16 = 0;
const UNPLUG: u16 = 1;
const UNPLUG_ALL: u16 = 2;
const STATE: u16 = 3;

const ACK: u16 = 0;
const NACK: u16 = 1;
const ERROR: u16 = 3;

fn region(shared: bool) -> Arc<RamBlock> {
    let config = RamConfig {
        shared,
        hotplug: true,
        ..RamConfig::anonymous(BLOCKS * BLOCK)
    };
    Arc::new(RamBlock::new(&config).unwrap())
}

struct Machine {
    guest: TestGuest,
    device: Mem,
    handle: MemHandle,
    ram: Arc<RamBlock>,
    queue: TestQueue,
    request: u64,
    answer: u64,
    transport: Arc<Transport>,
    heard: Heard,
    changes: Arc<AtomicU64>,
    _event_loop: EventLoop,
}

impl Machine {
    fn new(requested: u64) -> Self {
        let (event_loop, workers) = workers();
        let ram = region(true);
        let changes = Arc::new(AtomicU64::new(0));
        let count = Arc::clone(&changes);
        let config = MemConfig {
            ram: Arc::clone(&ram),
            addr: ADDR,
            block_size: BLOCK,
            node: None,
            requested: requested * BLOCK,
        };
        let (device, handle) = Mem::new(config, workers, move || {
            count.fetch_add(1, Ordering::Relaxed);
        });
        let mut guest = TestGuest::new(1 << 20);
        let (transport, heard) = transport();
        let queue = TestQueue::new(&mut guest, 0, 16);
        let (request, answer) = (guest.alloc(24), guest.alloc(10));
        let mut machine = Self {
            guest,
            device,
            handle,
            ram,
            queue,
            request,
            answer,
            transport,
            heard,
            changes,
            _event_loop: event_loop,
        };
        machine.start(QueueState::default());
        machine
    }

    fn start(&mut self, state: QueueState) {
        self.device.activate(1 << 1, &self.transport).unwrap();
        let side = self.queue.device_side(&self.transport, state);
        self.device.start_queue(side).unwrap();
    }

    fn send(&mut self, kind: u16, addr: u64, blocks: u16) {
        let mut raw = [0xee; 24];
        raw[..2].copy_from_slice(&kind.to_le_bytes());
        raw[8..16].copy_from_slice(&addr.to_le_bytes());
        raw[16..18].copy_from_slice(&blocks.to_le_bytes());
        self.guest.write(self.request, &raw);
        self.guest.write(self.answer, &[0xff; 10]);
        self.queue.send(&[
            TestBuffer::new(self.request, 24, false),
            TestBuffer::new(self.answer, 10, true),
        ]);
    }

    fn answer(&mut self) -> (u16, u16) {
        assert_eq!(self.queue.wait_used().1, 10);
        let raw = self.guest.read(self.answer, 10);
        let number = |at: usize| u16::from_le_bytes([raw[at], raw[at + 1]]);
        (number(0), number(8))
    }

    fn ask(&mut self, kind: u16, addr: u64, blocks: u16) -> (u16, u16) {
        self.send(kind, addr, blocks);
        self.answer()
    }

    fn at(&mut self, kind: u16, first: u64, blocks: u16) -> u16 {
        self.ask(kind, ADDR + first * BLOCK, blocks).0
    }

    fn config(&self) -> Vec<u64> {
        let mut raw = [0; 56];
        self.device.read_config(0, &mut raw);
        let words = raw.chunks(8);
        words
            .map(|word| u64::from_le_bytes(word.try_into().unwrap()))
            .collect()
    }

    fn byte(&self, block: u64) -> u8 {
        let mut byte = [1_u8];
        let slice = self.ram.slice((block * BLOCK) as usize, 1).unwrap();
        slice.copy_to(&mut byte[..]);
        byte[0]
    }

    fn set_byte(&self, block: u64, byte: u8) {
        let slice = self.ram.slice((block * BLOCK) as usize, 1).unwrap();
        slice.copy_from(&[byte]);
    }

    /// Bytes that the host has given for the region.
    fn taken(&self) -> u64 {
        use std::os::unix::fs::MetadataExt;
        self.ram.file().unwrap().metadata().unwrap().blocks() * 512
    }

    /// Moves the device's state to another device over the same memory, and back.
    fn save(&self) -> Vec<u8> {
        let mut writer = Writer::default();
        let mut scope = writer.scope("mem").unwrap();
        self.device.save(&mut scope).unwrap();
        writer.finish()
    }

    fn load(&mut self, saved: &[u8]) -> Result<(), state::LoadError> {
        let mut store = Store::open(saved).unwrap();
        self.device.load(&mut store.scope("mem").unwrap())
    }
}

#[test]
fn guest_plugs_what_is_requested() {
    let mut machine = Machine::new(0);
    assert_eq!(machine.device.features(), 1 << 1);
    let size = BLOCKS * BLOCK;
    assert_eq!(machine.config(), [BLOCK, 0, ADDR, size, size, 0, 0]);
    assert_eq!(machine.at(PLUG, 0, 1), NACK);
    machine.handle.resize(4 * BLOCK);
    assert_eq!(machine.heard.raised(CONFIG_VECTOR), 1);
    assert_eq!(machine.config()[5..], [0, 4 * BLOCK]);
    assert_eq!(machine.at(PLUG, 2, 3), ACK);
    assert_eq!(machine.at(PLUG, 8, 2), NACK, "that is more than requested");
    assert_eq!(machine.at(PLUG, 8, 1), ACK);
    assert_eq!(machine.config()[5..], [4 * BLOCK, 4 * BLOCK]);
    let plugged = machine.handle.plugged().load(Ordering::Relaxed);
    assert_eq!(
        (plugged, machine.handle.requested()),
        (4 * BLOCK, 4 * BLOCK)
    );
    assert_eq!(machine.changes.load(Ordering::Relaxed), 2);

    machine.set_byte(3, 7);
    machine.handle.resize(2 * BLOCK);
    assert_eq!(machine.at(UNPLUG, 3, 2), ACK);
    assert_eq!(machine.byte(3), 0, "it went back to the host");
    assert_eq!(machine.config()[5..], [2 * BLOCK, 2 * BLOCK]);
    // A reset of the device is not one of the machine.
    machine.device.stop_queue(0).unwrap();
    machine.device.reset();
    assert_eq!(machine.config()[5..], [2 * BLOCK, 2 * BLOCK]);
}

#[test]
fn wrong_requests_are_refused() {
    let mut machine = Machine::new(BLOCKS);
    assert_eq!(machine.at(PLUG, 4, 4), ACK);
    for (kind, addr, blocks) in [
        // Nothing, and nothing whole.
        (PLUG, ADDR, 0),
        (PLUG, ADDR + 1, 1),
        (UNPLUG, ADDR + 4 * BLOCK + 4096, 1),
        (STATE, ADDR + BLOCK / 2, 1),
        // Outside.
        (PLUG, ADDR - BLOCK, 1),
        (PLUG, ADDR - BLOCK, 2),
        (PLUG, ADDR + BLOCKS * BLOCK, 1),
        (PLUG, ADDR + (BLOCKS - 1) * BLOCK, 2),
        (PLUG, ADDR + 8 * BLOCK, u16::MAX),
        (UNPLUG, 0, 1),
        (STATE, u64::MAX - BLOCK + 1, 2),
        (STATE, ADDR, u16::MAX),
        // What is plugged already, or is not.
        (PLUG, ADDR + 7 * BLOCK, 1),
        (PLUG, ADDR + 3 * BLOCK, 2),
        (PLUG, ADDR + 7 * BLOCK, 2),
        (UNPLUG, ADDR + 3 * BLOCK, 2),
        (UNPLUG, ADDR + 7 * BLOCK, 2),
        (UNPLUG, ADDR, 1),
        // No requests.
        (4, ADDR, 1),
        (u16::MAX, ADDR, 1),
    ] {
        let answer = machine.ask(kind, addr, blocks).0;
        assert_eq!(answer, ERROR, "{kind} {addr:#x} {blocks}");
    }
    let counters = machine.device.counters();
    assert!(counters.contains(&("refused_requests", 20)), "{counters:?}");
    assert_eq!(machine.config()[5], 4 * BLOCK);
    assert!(machine.heard.events().is_empty());
}

#[test]
fn short_request_breaks_device() {
    for (readable, writable) in [(23, 10), (24, 9)] {
        let mut machine = Machine::new(BLOCKS);
        machine.guest.write(machine.request, &[0; 24]);
        let addr = ADDR.to_le_bytes();
        machine.guest.write(machine.request + 8, &addr);
        machine.guest.write(machine.request + 16, &[1]);
        machine.queue.send(&[
            TestBuffer::new(machine.request, readable, false),
            TestBuffer::new(machine.answer, writable, true),
        ]);
        let from = Instant::now();
        while machine.heard.events().is_empty() && from.elapsed() < PATIENCE {
            std::thread::yield_now();
        }
        let events = format!("{:?}", machine.heard.events());
        assert!(events.contains("too short"), "{events}");
        assert_eq!(machine.config()[5], 0, "nothing was done");
    }
}

/// A device that is stopped in the middle of a request finishes it.
#[test]
fn long_request_is_done_across_a_pause() {
    let mut machine = Machine::new(BLOCKS);
    for turn in 0..20 {
        machine.send(PLUG, ADDR, BLOCKS as u16);
        if turn % 2 == 0 {
            let state = machine.device.stop_queue(0).unwrap();
            machine.start(state);
        }
        assert_eq!(machine.answer().0, ACK);
        (0..BLOCKS).for_each(|block| machine.set_byte(block, 7));
        machine.send([UNPLUG, UNPLUG_ALL][turn % 2], ADDR, BLOCKS as u16);
        if turn % 3 == 0 {
            let state = machine.device.stop_queue(0).unwrap();
            machine.start(state);
        }
        assert_eq!(machine.answer().0, ACK);
        assert_eq!((machine.config()[5], machine.taken()), (0, 0));
    }
}

#[test]
fn state_of_another_region_is_refused() {
    let mut machine = Machine::new(3);
    assert_eq!(machine.at(PLUG, 1, 3), ACK);
    machine.device.stop_queue(0).unwrap();
    let saved = machine.save();
    let (_event_loop, workers) = workers();
    for (addr, block_size, wrong) in [
        (ADDR + BLOCK, BLOCK, true),
        (ADDR, 2 * BLOCK, true),
        (ADDR, BLOCK, false),
    ] {
        let config = MemConfig {
            ram: region(false),
            addr,
            block_size,
            node: None,
            requested: 0,
        };
        let ram = Arc::clone(&config.ram);
        let (mut other, handle) = Mem::new(config, workers.clone(), || {});
        let mut store = Store::open(&saved).unwrap();
        let loaded = other.load(&mut store.scope("mem").unwrap());
        assert_eq!(loaded.is_err(), wrong, "{loaded:?}");
        let there = if wrong { 0 } else { 3 * BLOCK };
        assert_eq!(ram.plugged_len() as u64, there);
        assert_eq!(handle.plugged().load(Ordering::Relaxed), there);
        assert_eq!(handle.requested(), there);
    }
}

#[derive(Clone, Debug)]
enum Step {
    Request(u16, u64, u16),
    Resize(u64),
    Write(u64, u8),
    /// Stop, save, load the state of an earlier moment and then this one, start.
    Move,
}

fn step() -> impl Strategy<Value = Step> {
    let request = (0_u16..5, 0..BLOCKS + 2, prop_oneof![0_u16..6, 0..70_u16]);
    prop_oneof![
        6 => request.prop_map(|(kind, first, blocks)| Step::Request(kind, first, blocks)),
        2 => (0..=BLOCKS).prop_map(Step::Resize),
        3 => (0..BLOCKS, 1_u8..).prop_map(|(block, byte)| Step::Write(block, byte)),
        1 => Just(Step::Move),
    ]
}

/// A region in the simplest form: the byte at the start of each block that is plugged.
struct Model {
    blocks: Vec<Option<u8>>,
    requested: u64,
}

impl Model {
    fn plugged(&self) -> u64 {
        self.blocks.iter().flatten().count() as u64
    }

    fn ask(&mut self, kind: u16, first: u64, count: u16) -> (u16, u16) {
        if kind == UNPLUG_ALL {
            self.blocks.fill(None);
            return (ACK, 0);
        }
        let plugged = self.plugged();
        let named = first as usize..first as usize + usize::from(count);
        let Some(blocks) = self
            .blocks
            .get_mut(named)
            .filter(|blocks| !blocks.is_empty())
        else {
            return (ERROR, 0);
        };
        let there = blocks.iter().flatten().count();
        let all = blocks.len();
        match kind {
            PLUG if there > 0 => (ERROR, 0),
            PLUG if plugged + all as u64 > self.requested => (NACK, 0),
            PLUG => {
                blocks.fill(Some(0));
                (ACK, 0)
            }
            UNPLUG if there < all => (ERROR, 0),
            UNPLUG => {
                blocks.fill(None);
                (ACK, 0)
            }
            STATE if there == all => (ACK, 0),
            STATE if there == 0 => (ACK, 1),
            STATE => (ACK, 2),
            _ => (ERROR, 0),
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]
    #[test]
    fn device_does_what_the_model_does(steps in prop::collection::vec(step(), 1..60)) {
        let mut machine = Machine::new(0);
        let mut model = Model { blocks: vec![None; BLOCKS as usize], requested: 0 };
        let mut earlier = machine.save();
        for step in steps {
            match step {
                Step::Request(kind, first, count) => {
                    let answer = machine.ask(kind, ADDR + first * BLOCK, count);
                    prop_assert_eq!(answer, model.ask(kind, first, count), "{:?}", (kind, first, count));
                }
                Step::Resize(blocks) => {
                    machine.handle.resize(blocks * BLOCK);
                    model.requested = blocks;
                }
                Step::Write(block, byte) => {
                    if let Some(there) = &mut model.blocks[block as usize] {
                        machine.set_byte(block, byte);
                        *there = byte;
                    }
                }
                Step::Move => {
                    let state = machine.device.stop_queue(0).unwrap();
                    let now = machine.save();
                    let other = Arc::clone(&machine.ram);
                    // A destination's trial load, and what came of it.
                    machine.load(&earlier).unwrap();
                    machine.load(&now).unwrap();
                    for (block, byte) in (0_u64..).zip(&model.blocks) {
                        // Memory is not in the state: what the loads unplugged arrives again.
                        byte.iter().for_each(|byte| machine.set_byte(block, *byte));
                    }
                    prop_assert_eq!(other.plugged_len() as u64, model.plugged() * BLOCK);
                    machine.start(state);
                    earlier = now;
                }
            }
            let config = machine.config();
            prop_assert_eq!(&config[5..], [model.plugged() * BLOCK, model.requested * BLOCK]);
        }
        for (block, byte) in (0_u64..).zip(&model.blocks) {
            // To read what is unplugged would take memory of the host.
            if let Some(byte) = byte {
                prop_assert_eq!(machine.byte(block), *byte, "block {}", block);
            }
        }
        machine.at(UNPLUG_ALL, 0, 0);
        prop_assert_eq!(machine.taken(), 0, "all went back to the host");
    }
}
