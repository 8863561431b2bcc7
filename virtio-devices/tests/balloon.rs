//! Balloons: the test is the guest.

#![allow(clippy::unwrap_used, clippy::panic, reason = "tests")]

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

use devices::event_loop::EventLoop;
use state::{Store, Writer};
use virtio_devices::balloon::{Balloon, BalloonConfig, BalloonHandle};
use virtio_devices::testing::{
    CONFIG_VECTOR, Heard, PATIENCE, TestBuffer, TestGuest, TestQueue, transport, workers,
};
use virtio_devices::{QueueState, Transport, VirtioDevice};

const MIB: u64 = 1 << 20;
const STATS: u64 = 1 << 1;
const REPORTING: u64 = 1 << 5;

struct Machine {
    guest: TestGuest,
    device: Balloon,
    handle: BalloonHandle,
    queues: Vec<TestQueue>,
    transport: Arc<Transport>,
    heard: Heard,
    _event_loop: EventLoop,
}

fn machine(features: u64) -> Machine {
    let (event_loop, workers) = workers();
    let config = BalloonConfig {
        size: 2 * MIB,
        deflate_on_oom: true,
        free_page_reporting: true,
    };
    let (mut device, handle) = Balloon::new(&config, workers);
    assert_eq!(device.features(), 1 << 1 | 1 << 2 | 1 << 5);
    let mut guest = TestGuest::new(16 * MIB);
    let (transport, heard) = transport();
    let count = 2 + u16::from(features & STATS != 0) + u16::from(features & REPORTING != 0);
    let queues = (0..count)
        .map(|index| TestQueue::new(&mut guest, index, 64))
        .collect();
    device.activate(features, &transport).unwrap();
    let mut machine = Machine {
        guest,
        device,
        handle,
        queues,
        transport,
        heard,
        _event_loop: event_loop,
    };
    machine.start(&vec![QueueState::default(); count.into()]);
    machine
}

impl Machine {
    fn start(&mut self, states: &[QueueState]) {
        for (queue, state) in self.queues.iter().zip(states) {
            let side = queue.device_side(&self.transport, *state);
            self.device.start_queue(side).unwrap();
        }
    }

    /// Has the queue serve the numbers of these pages.
    fn name_pages(&mut self, queue: usize, pages: impl Iterator<Item = u32>) {
        let raw: Vec<u8> = pages.flat_map(u32::to_le_bytes).collect();
        let buffer = TestBuffer {
            addr: self.guest.put(&raw),
            len: u32::try_from(raw.len()).unwrap(),
            writable: false,
        };
        self.queues[queue].send(&[buffer]);
        self.queues[queue].wait_used();
    }

    fn counter(&self, name: &str) -> Option<u64> {
        let counters = self.device.counters().into_iter();
        counters
            .filter(|(key, _)| *key == name)
            .map(|(_, value)| value)
            .next()
    }

    fn config(&self) -> [u32; 2] {
        let mut raw = [0; 8];
        self.device.read_config(0, &mut raw);
        let word = |at: usize| u32::from_le_bytes(raw[at..at + 4].try_into().unwrap());
        [word(0), word(4)]
    }
}

#[test]
fn inflated_pages_return_to_host() {
    let mut machine = machine(STATS);
    assert_eq!(machine.config(), [512, 0]);
    machine.guest.write(4 * MIB, &vec![7; MIB as usize]);
    // From the last to the first, as Linux does, and one that is no RAM.
    let pages = (1024..1024 + 256_u32).rev().chain([0x00ff_ffff, u32::MAX]);
    machine.name_pages(0, pages);
    assert!(
        machine
            .guest
            .read(4 * MIB, MIB as usize)
            .iter()
            .all(|byte| *byte == 0)
    );
    assert_eq!(machine.counter("inflated_bytes"), Some(MIB));
    machine.device.write_config(4, &256_u32.to_le_bytes());
    let actual = machine.handle.actual().load(Ordering::Relaxed);
    assert_eq!((machine.config(), actual), ([512, 256], MIB));
    // It is RAM like any other when the guest takes it back.
    machine.name_pages(1, 1024..1025);
    machine.guest.write(4 * MIB, &[1, 2, 3]);
    assert_eq!(machine.guest.read(4 * MIB, 4), [1, 2, 3, 0]);

    machine.handle.resize(MIB);
    assert_eq!(
        (machine.config()[0], machine.heard.raised(CONFIG_VECTOR)),
        (256, 1)
    );
    machine.handle.resize(u64::MAX);
    assert_eq!(machine.config()[0], u32::MAX);
}

#[test]
fn guest_reports_statistics() {
    let mut machine = machine(STATS);
    let told = |machine: &mut Machine, free: u64| {
        let mut raw = Vec::new();
        for (tag, value) in [(4_u16, free), (5, 16 * MIB), (77, 1)] {
            raw.extend(tag.to_le_bytes());
            raw.extend(value.to_le_bytes());
        }
        let addr = machine.guest.put(&raw);
        TestBuffer {
            addr,
            len: u32::try_from(raw.len()).unwrap(),
            writable: false,
        }
    };
    let buffer = told(&mut machine, 5 * MIB);
    machine.queues[2].send(&[buffer]);
    while machine.counter("guest_free_bytes").is_none() {
        std::thread::yield_now();
    }
    assert_eq!(machine.counter("guest_total_bytes"), Some(16 * MIB));
    // It was asked again by that, across a pause, and gets its buffer back.
    let states: Vec<_> = (0..3)
        .map(|index| machine.device.stop_queue(index).unwrap())
        .collect();
    machine.start(&states);
    machine.device.counters();
    machine.queues[2].wait_used();
    let buffer = told(&mut machine, 3 * MIB);
    machine.queues[2].send(&[buffer]);
    while machine.counter("guest_free_bytes") != Some(3 * MIB) {
        std::thread::yield_now();
    }
}

#[test]
fn reported_free_pages_return_to_host() {
    // Without the queue for statistics, this one is the third.
    let mut machine = machine(REPORTING);
    machine.guest.write(4 * MIB, &vec![7; 3 * MIB as usize]);
    let free = [4 * MIB, 6 * MIB].map(|addr| TestBuffer {
        addr,
        len: u32::try_from(MIB).unwrap(),
        writable: true,
    });
    machine.queues[2].send(&free);
    machine.queues[2].wait_used();
    assert_eq!(machine.counter("reported_bytes"), Some(2 * MIB));
    let seen = machine.guest.read(4 * MIB, 3 * MIB as usize);
    assert_eq!(seen.iter().filter(|byte| **byte == 7).count() as u64, MIB);
}

#[test]
fn balloon_state_is_restored() {
    let mut machine = machine(STATS);
    machine.handle.resize(3 * MIB);
    machine.device.write_config(4, &99_u32.to_le_bytes());
    for index in 0..3 {
        machine.device.stop_queue(index).unwrap();
    }
    let mut writer = Writer::default();
    machine
        .device
        .save(&mut writer.scope("balloon").unwrap())
        .unwrap();
    let bytes = writer.finish();
    machine.device.reset();
    assert_eq!(machine.config(), [768, 0]);
    let mut store = Store::open(&bytes).unwrap();
    machine
        .device
        .load(&mut store.scope("balloon").unwrap())
        .unwrap();
    assert_eq!(machine.config(), [768, 99]);
}

#[test]
fn oversized_page_list_breaks_device() {
    let mut machine = machine(STATS);
    machine.guest.write(4 * MIB, &[7; 2]);
    machine.name_pages(0, 1024..2048);
    assert_eq!(machine.guest.read(4 * MIB, 2), [0; 2]);
    let raw: Vec<u8> = (1024..2049_u32).flat_map(u32::to_le_bytes).collect();
    let buffer = TestBuffer {
        addr: machine.guest.put(&raw),
        len: 4100,
        writable: false,
    };
    machine.queues[0].send(&[buffer]);
    let from = Instant::now();
    while machine.heard.events().is_empty() && from.elapsed() < PATIENCE {
        std::thread::yield_now();
    }
    let events = format!("{:?}", machine.heard.events());
    assert!(events.contains("more pages"), "{events}");
}
