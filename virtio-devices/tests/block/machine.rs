//! A guest with one disk, and its driver.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use devices::event_loop::EventLoop;
use serde::{Deserialize, Serialize};
use state::{LoadError, Saved, Store, Writer};
use virtio_devices::block::{Block, BlockConfig, BlockHandle};
use virtio_devices::testing::{
    Heard, PATIENCE, TestBuffer, TestGuest, TestQueue, disk_config, transport, workers,
};
use virtio_devices::{QueueState, Transport, TransportEvent, VirtioDevice};
pub(crate) const MIB: usize = 1 << 20;
pub(crate) const FLUSH: u64 = 1 << 9;

pub(crate) const IN: u32 = 0;
pub(crate) const OUT: u32 = 1;
pub(crate) const SYNC: u32 = 4;
pub(crate) const GET_ID: u32 = 8;
pub(crate) const DISCARD: u32 = 11;
pub(crate) const WRITE_ZEROES: u32 = 13;

pub(crate) fn config(path: &Path) -> BlockConfig {
    BlockConfig {
        serial: "whimbrel-test-disk-0".to_owned(),
        ..disk_config(path)
    }
}

/// A guest with one disk, which its driver uses.
pub(crate) struct Machine {
    pub(crate) guest: TestGuest,
    pub(crate) device: Block,
    pub(crate) handle: BlockHandle,
    pub(crate) queue: TestQueue,
    pub(crate) transport: Arc<Transport>,
    pub(crate) heard: Heard,
    pub(crate) data: u64,
    pub(crate) header: u64,
    pub(crate) status: u64,
    _event_loop: EventLoop,
}

pub(crate) fn machine(config: &BlockConfig) -> Machine {
    let (event_loop, workers) = workers();
    let (device, handle) = Block::new(config, workers).unwrap();
    let mut guest = TestGuest::new(8 << 20);
    let queue = TestQueue::new(&mut guest, 0, 64);
    let (transport, heard) = transport();
    let data = 4 << 20;
    let (header, status) = (guest.alloc(16), guest.alloc(1));
    let mut machine = Machine {
        guest,
        device,
        handle,
        queue,
        transport,
        heard,
        data,
        header,
        status,
        _event_loop: event_loop,
    };
    machine.start(QueueState::default());
    machine
}

pub(crate) fn header(kind: u32, sector: u64) -> [u8; 16] {
    let mut header = [0; 16];
    header[..4].copy_from_slice(&kind.to_le_bytes());
    header[8..].copy_from_slice(&sector.to_le_bytes());
    header
}

impl Machine {
    pub(crate) fn start(&mut self, state: QueueState) {
        self.device.activate(FLUSH, &self.transport).unwrap();
        let queue = self.queue.device_side(&self.transport, state);
        self.device.start_queue(queue).unwrap();
    }

    pub(crate) fn save(&self) -> Vec<u8> {
        let mut writer = Writer::default();
        let mut scope = writer.scope("disk").unwrap();
        self.device.save(&mut scope).unwrap();
        writer.finish()
    }

    /// Stops the queue, forgets all, and loads.
    pub(crate) fn load(&mut self, saved: &[u8]) -> Result<(), LoadError> {
        self.device.stop_queue(0);
        self.device.reset();
        let mut store = Store::open(saved).unwrap();
        self.device.load(&mut store.scope("disk").unwrap())
    }

    /// Sends a request with this much data at `self.data`, and waits for its status.
    pub(crate) fn request(&mut self, kind: u32, sector: u64, len: u32, device_writes: bool) -> u8 {
        self.guest.write(self.header, &header(kind, sector));
        self.guest.write(self.status, &[0xff]);
        let buffer = TestBuffer::new;
        let mut chain = vec![buffer(self.header, 16, false)];
        if len > 0 {
            chain.push(buffer(self.data, len, device_writes));
        }
        chain.push(buffer(self.status, 1, true));
        let head = self.queue.send(&chain);
        assert_eq!(self.queue.wait_used().0, head);
        self.guest.read(self.status, 1)[0]
    }

    pub(crate) fn write(&mut self, sector: u64, data: &[u8]) -> u8 {
        self.guest.write(self.data, data);
        self.request(OUT, sector, u32::try_from(data.len()).unwrap(), false)
    }

    pub(crate) fn read(&mut self, sector: u64, len: usize) -> (u8, Vec<u8>) {
        self.guest.write(self.data, &vec![0xee; len]);
        let status = self.request(IN, sector, u32::try_from(len).unwrap(), true);
        (status, self.guest.read(self.data, len))
    }
}

pub(crate) fn pattern(seed: u8, len: usize) -> Vec<u8> {
    (0..len)
        .map(|i| (i / 512) as u8 ^ (i as u8) ^ seed)
        .collect()
}

pub(crate) fn raw(dir: &tempfile::TempDir, size: u64) -> PathBuf {
    let path = dir.path().join("disk.raw");
    File::create(&path).unwrap().set_len(size).unwrap();
    path
}

/// Saved state of a disk, for tests that write it themselves.
#[derive(Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct SavedDisk {
    pub(crate) capacity: u64,
    pub(crate) writeback: bool,
    pub(crate) block: Option<u64>,
    pub(crate) kept: Vec<Vec<u16>>,
}

impl Saved for SavedDisk {
    const VERSION: u16 = 2;
}

impl SavedDisk {
    pub(crate) fn of(bytes: &[u8]) -> Self {
        let mut store = Store::open(bytes).unwrap();
        store.scope("disk").unwrap().take().unwrap()
    }

    pub(crate) fn bytes(&self) -> Vec<u8> {
        let mut writer = Writer::default();
        writer.scope("disk").unwrap().put(self).unwrap();
        writer.finish()
    }
}

impl Machine {
    /// Makes so many requests of 16 KiB available together, each with memory of its own, and kicks.
    /// Gives their heads; the statuses are from `self.status` on.
    pub(crate) fn send_together(&mut self, kind: u32, count: u64) -> Vec<u16> {
        self.status = self.guest.alloc(count);
        let mut heads = Vec::new();
        for i in 0..count {
            let header_at = self.guest.put(&header(kind, i * 32));
            self.guest.write(self.status + i, &[0xff]);
            let buffer = TestBuffer::new;
            let head = self.queue.describe(&[
                buffer(header_at, 16, false),
                buffer(self.data + i * 16384, 16384, kind == IN),
                buffer(self.status + i, 1, true),
            ]);
            self.queue.offer(head);
            heads.push(head);
        }
        self.queue.kick.write(1).unwrap();
        heads
    }

    /// Waits until the owner has received `times` stall events, and no other event. Returns the last
    /// reason.
    pub(crate) fn wait_stalled(&self, times: usize) -> String {
        let from = Instant::now();
        while self.heard.events().len() < times {
            assert!(from.elapsed() < PATIENCE, "{:?}", self.heard.events());
            std::thread::sleep(Duration::from_millis(1));
        }
        let events = self.heard.events();
        assert_eq!(events.len(), times, "{events:?}");
        match events.last() {
            Some(TransportEvent::Stalled(why)) => why.clone(),
            other => panic!("{other:?}"),
        }
    }

    /// The pulse: the queue stops, and the device is saved, reset and loaded.
    pub(crate) fn pulse(&mut self) -> QueueState {
        let state = self.device.stop_queue(0).unwrap();
        let saved = self.save();
        self.load(&saved).unwrap();
        assert_eq!(self.save(), saved);
        state
    }

    pub(crate) fn wait_all_used(&mut self, mut heads: Vec<u16>) {
        let mut used: Vec<u16> = heads.iter().map(|_| self.queue.wait_used().0).collect();
        used.sort_unstable();
        heads.sort_unstable();
        assert_eq!(used, heads);
        let statuses = self.guest.read(self.status, heads.len());
        assert!(statuses.iter().all(|status| *status == 0), "{statuses:?}");
        assert_eq!(self.queue.take_used(), None);
    }
}
