//! The driver's side of the rings, for tests and fuzz targets.
//!
//! [`TestGuest`] is a guest of RAM alone; [`TestQueue`] lays out a queue in it and makes chains
//! available as a driver does. The methods panic when a test asks for what cannot be.

#![allow(
    clippy::unwrap_used,
    clippy::missing_panics_doc,
    clippy::panic,
    clippy::expect_used,
    reason = "a test's helper fails the test"
)]

use std::path::Path;
use std::process::Command;
use std::sync::atomic::Ordering;
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

use devices::event_loop::{Actor, EventLoop, Flow, Sources};
use memory::{AddressSpace, RamBlock, RamConfig, RamSlice, SpaceKind, Topology};
use parking_lot::Mutex;
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::block::{BlockConfig, LockMode, OnError};
use crate::queue::{Queue, QueueSetup, QueueState, Rings};
use crate::rate_limiter::SharedLimiter;
use crate::transport::{Interrupts, Transport, TransportEvent};
use crate::worker::Workers;

/// How long a test waits for what must come.
pub const PATIENCE: Duration = Duration::from_secs(10);

/// A guest without CPUs.
pub struct TestGuest {
    /// Its map: one range of RAM from address 0 on.
    pub topology: Arc<Mutex<Topology>>,
    /// Its RAM.
    pub ram: Arc<RamBlock>,
    next: u64,
}

impl TestGuest {
    /// With this many bytes of RAM.
    #[must_use]
    pub fn new(size: u64) -> Self {
        let mut topology = Topology::new();
        let ram = Arc::new(RamBlock::new(&RamConfig::anonymous(size)).unwrap());
        let mut tx = topology.begin();
        let block = Arc::clone(&ram);
        let region = tx.ram("ram", RamSlice { block, offset: 0 }, size).unwrap();
        tx.map(SpaceKind::Memory, 0, region, 0).unwrap();
        tx.commit().unwrap();
        Self {
            topology: Arc::new(Mutex::new(topology)),
            ram,
            next: 0x1000,
        }
    }

    /// Its address space.
    #[must_use]
    pub fn space(&self) -> AddressSpace {
        self.topology.lock().space(SpaceKind::Memory)
    }

    /// Allocates `len` bytes and returns their address.
    pub fn alloc(&mut self, len: u64) -> u64 {
        let at = self.next;
        self.next = (at + len).next_multiple_of(16);
        assert!(self.next <= self.ram.len() as u64, "the test's RAM is full");
        at
    }

    /// Puts `data` somewhere.
    pub fn put(&mut self, data: &[u8]) -> u64 {
        let at = self.alloc(data.len() as u64);
        self.write(at, data);
        at
    }

    /// Writes at a guest address.
    pub fn write(&self, at: u64, data: &[u8]) {
        self.space()
            .view()
            .write_slice(data, GuestAddress(at))
            .unwrap();
    }

    /// Reads at a guest address.
    #[must_use]
    pub fn read(&self, at: u64, len: usize) -> Vec<u8> {
        let mut data = vec![0; len];
        self.space()
            .view()
            .read_slice(&mut data, GuestAddress(at))
            .unwrap();
        data
    }
}

/// Interrupts and events of a device.
#[derive(Clone, Debug, Default)]
pub struct Heard(Arc<Mutex<(Vec<u16>, Vec<TransportEvent>)>>);

impl Heard {
    /// How often each vector was raised: the vector of queue `i` is `i`.
    #[must_use]
    pub fn raised(&self, vector: u16) -> usize {
        self.0.lock().0.iter().filter(|v| **v == vector).count()
    }

    /// Returns the events that the owner received.
    #[must_use]
    pub fn events(&self) -> Vec<TransportEvent> {
        self.0.lock().1.clone()
    }
}

impl Interrupts for Heard {
    fn raise(&self, vector: u16) {
        self.0.lock().0.push(vector);
    }
}

/// The vector of configuration changes in tests.
pub const CONFIG_VECTOR: u16 = 100;

/// A transport of which a test hears everything.
#[must_use]
pub fn transport() -> (Arc<Transport>, Heard) {
    let heard = Heard::default();
    let events = heard.clone();
    let transport = Transport::new(Box::new(heard.clone()), move |event| {
        events.0.lock().1.push(event);
    });
    transport.connect_for_test(CONFIG_VECTOR);
    (Arc::new(transport), heard)
}

/// Waits until the loop has done all that it was woken for so far.
pub fn wait_idle(event_loop: &EventLoop) {
    struct Mark(mpsc::Sender<()>);
    impl Actor for Mark {
        fn woken(&mut self, _: &mut Sources<'_>) -> Flow {
            let _ = self.0.send(());
            Flow::Leave
        }

        fn ready(&mut self, _: usize, _: &mut Sources<'_>) -> Flow {
            Flow::Leave
        }

        fn crashed(&mut self, _: &str) {}
    }
    // Twice: a loop asks the kernel for events first, and then does what it was asked directly.
    for _ in 0..2 {
        let (reached, wait) = mpsc::channel();
        event_loop.handle().adopt(|_| (Mark(reached), ()));
        wait.recv_timeout(PATIENCE).unwrap();
    }
}

/// One event loop of its own, and the way to it. The loop ends with the first value.
#[must_use]
pub fn workers() -> (EventLoop, Workers) {
    let event_loop = EventLoop::start("test").unwrap();
    let workers = Workers::new(vec![event_loop.handle().clone()]).unwrap();
    (event_loop, workers)
}

/// A buffer of a chain: guest address, length, and whether the device writes it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TestBuffer {
    /// Guest address.
    pub addr: u64,
    /// Bytes.
    pub len: u32,
    /// Whether the device writes it.
    pub writable: bool,
}

impl TestBuffer {
    /// Returns a buffer of `len` bytes at `addr`.
    #[must_use]
    pub fn new(addr: u64, len: u32, writable: bool) -> Self {
        Self {
            addr,
            len,
            writable,
        }
    }
}

/// Returns the configuration of a writable disk: one queue, no limits, errors reported to the guest.
#[must_use]
pub fn disk_config(path: &Path) -> BlockConfig {
    BlockConfig {
        path: path.to_owned(),
        readonly: false,
        direct: false,
        format: None,
        is_detected: false,
        backing_files: false,
        data_files: false,
        image_dirs: Vec::new(),
        queues: 1,
        queue_size: 64,
        serial: String::new(),
        sparse: true,
        lock: LockMode::ByteRange,
        is_incoming: false,
        limiter: SharedLimiter::default(),
        on_error: OnError::Report,
    }
}

/// Runs `qemu-img` and returns its output.
pub fn qemu_img(arguments: &[&str]) -> String {
    let run = Command::new("qemu-img").args(arguments).output();
    let run = run.expect("qemu-img, of the package qemu-utils");
    let text = String::from_utf8_lossy(&run.stdout).into_owned();
    let errors = String::from_utf8_lossy(&run.stderr);
    assert!(
        run.status.success(),
        "qemu-img {arguments:?}: {text}{errors}"
    );
    text
}

/// A queue as its driver sees it.
pub struct TestQueue {
    /// Which of its device's.
    pub index: u16,
    /// Addresses of the rings.
    pub rings: Rings,
    /// The descriptor that the driver kicks.
    pub kick: Arc<EventFd>,
    space: AddressSpace,
    next_descriptor: u16,
    available: u16,
    seen: u16,
}

impl TestQueue {
    /// Lays out a queue of `size` entries.
    pub fn new(guest: &mut TestGuest, index: u16, size: u16) -> Self {
        let entries = u64::from(size);
        let rings = Rings {
            size,
            descriptors: guest.alloc(16 * entries),
            available: guest.alloc(6 + 2 * entries),
            used: guest.alloc(6 + 8 * entries),
        };
        Self {
            index,
            rings,
            kick: Arc::new(EventFd::new(EFD_NONBLOCK).unwrap()),
            space: guest.space(),
            next_descriptor: 0,
            available: 0,
            seen: 0,
        }
    }

    /// The device's side of it, without `EVENT_IDX`.
    #[must_use]
    pub fn device_side(&self, transport: &Arc<Transport>, state: QueueState) -> Queue {
        Queue::new(QueueSetup {
            index: self.index,
            rings: self.rings,
            state,
            event_idx: false,
            space: self.space.clone(),
            kick: Arc::clone(&self.kick),
            transport: Arc::clone(transport),
        })
        .unwrap()
    }

    /// Writes one descriptor as it is given.
    pub fn set_descriptor(&self, index: u16, addr: u64, len: u32, flags: u16, next: u16) {
        let mut raw = [0; 16];
        raw[..8].copy_from_slice(&addr.to_le_bytes());
        raw[8..12].copy_from_slice(&len.to_le_bytes());
        raw[12..14].copy_from_slice(&flags.to_le_bytes());
        raw[14..].copy_from_slice(&next.to_le_bytes());
        let at = self.rings.descriptors + 16 * u64::from(index);
        self.space
            .view()
            .write_slice(&raw, GuestAddress(at))
            .unwrap();
    }

    /// Writes the descriptors of a chain, one after the other round the table, and gives the
    /// index of the first.
    pub fn describe(&mut self, buffers: &[TestBuffer]) -> u16 {
        let size = self.rings.size;
        assert!(!buffers.is_empty() && buffers.len() <= usize::from(size));
        let head = self.next_descriptor;
        for (i, buffer) in buffers.iter().enumerate() {
            let index = self.next_descriptor;
            self.next_descriptor = (index + 1) % size;
            let more = i + 1 < buffers.len();
            let flags = u16::from(more) | u16::from(buffer.writable) << 1;
            self.set_descriptor(index, buffer.addr, buffer.len, flags, self.next_descriptor);
        }
        head
    }

    /// Makes the chain that begins at `head` available, without a kick.
    pub fn offer(&mut self, head: u16) {
        let slot = u64::from(self.available % self.rings.size);
        let view = self.space.view();
        let at = self.rings.available + 4 + 2 * slot;
        view.write_obj(head, GuestAddress(at)).unwrap();
        self.available = self.available.wrapping_add(1);
        view.store(
            self.available,
            GuestAddress(self.rings.available + 2),
            Ordering::Release,
        )
        .unwrap();
    }

    /// Makes a chain available and kicks.
    pub fn send(&mut self, buffers: &[TestBuffer]) -> u16 {
        let head = self.describe(buffers);
        self.offer(head);
        self.kick.write(1).unwrap();
        head
    }

    /// The next chain that the device has used, if there is one: its head and the bytes written.
    pub fn take_used(&mut self) -> Option<(u16, u32)> {
        let view = self.space.view();
        let index: u16 = view
            .load(GuestAddress(self.rings.used + 2), Ordering::Acquire)
            .unwrap();
        if index == self.seen {
            return None;
        }
        let slot = u64::from(self.seen % self.rings.size);
        let raw: [u8; 8] = view
            .read_obj(GuestAddress(self.rings.used + 4 + 8 * slot))
            .unwrap();
        self.seen = self.seen.wrapping_add(1);
        let id = u16::from_le_bytes([raw[0], raw[1]]);
        Some((id, u32::from_le_bytes([raw[4], raw[5], raw[6], raw[7]])))
    }

    /// Waits for the next chain that the device uses.
    pub fn wait_used(&mut self) -> (u16, u32) {
        let from = Instant::now();
        loop {
            if let Some(used) = self.take_used() {
                return used;
            }
            assert!(from.elapsed() < PATIENCE, "no chain was used");
            std::thread::sleep(Duration::from_micros(200));
        }
    }
}
