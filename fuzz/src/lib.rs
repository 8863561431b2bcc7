//! Shared parts of the fuzz targets: a guest without CPUs whose driver does what the bytes say.

pub mod pci;

use std::path::Path;
use std::sync::Arc;

use arbitrary::{Result, Unstructured};
use devices::event_loop::EventLoop;
use virtio_devices::block::BlockConfig;
use virtio_devices::testing::{
    self, Heard, TestBuffer, TestGuest, TestQueue, transport, wait_idle, workers,
};
use virtio_devices::{QueueState, Transport, TransportEvent, VirtioDevice, Workers};

/// Entries of each queue.
const SIZE: u16 = 16;
/// Start of the data in the driver's buffers.
const DATA: u64 = 0x10_0000;
/// Bytes of RAM.
pub const RAM: u64 = 4 << 20;

/// A device and its guest.
pub struct Machine {
    guest: TestGuest,
    device: Box<dyn VirtioDevice>,
    queues: Vec<TestQueue>,
    transport: Arc<Transport>,
    heard: Heard,
    event_loop: EventLoop,
}

impl Machine {
    /// With the device that `make` makes.
    pub fn new(make: impl FnOnce(Workers) -> Box<dyn VirtioDevice>) -> Self {
        let (event_loop, workers) = workers();
        let device = make(workers);
        let mut guest = TestGuest::new(RAM);
        let queues = (0..).take(device.queue_sizes().len());
        let queues = queues
            .map(|index| TestQueue::new(&mut guest, index, SIZE))
            .collect();
        let (transport, heard) = transport();
        Self {
            guest,
            device,
            queues,
            transport,
            heard,
            event_loop,
        }
    }

    /// A driver's life, as the bytes have it: chains are there when the queues start, and more come
    /// with kicks. A panic of the device ends the process; an endless loop is the fuzzer's to see.
    pub fn run(&mut self, input: &[u8]) {
        // An input that is too short leaves out what it does not tell.
        let _ = self.play(&mut Unstructured::new(input));
        for index in (0..).take(self.queues.len()) {
            self.device.stop_queue(index);
        }
        self.device.reset();
        let failed = |event: &TransportEvent| matches!(event, TransportEvent::NeedsReset(why) if why.contains("the device failed"));
        assert!(
            !self.heard.events().iter().any(failed),
            "the device panicked"
        );
        (self.transport, self.heard) = transport();
    }

    fn play(&mut self, bytes: &mut Unstructured<'_>) -> Result<()> {
        let features = self.device.features() & bytes.arbitrary::<u64>()?;
        for index in 0..self.queues.len() {
            self.lay_out(index, bytes)?;
        }
        let data: Vec<u8> = bytes.arbitrary()?;
        self.guest.write(DATA, data.get(..0x1000).unwrap_or(&data));
        if self.device.activate(features, &self.transport).is_err() {
            return Ok(());
        }
        for queue in &self.queues {
            let side = queue.device_side(&self.transport, QueueState::default());
            // A queue that was not negotiated is refused.
            let _ = self.device.start_queue(side);
        }
        wait_idle(&self.event_loop);
        for _ in 0..bytes.int_in_range(0..=3)? {
            let offset = bytes.int_in_range(0..=80)?;
            let data: [u8; 8] = bytes.arbitrary()?;
            let len = bytes.int_in_range(1..=8)?;
            self.device.write_config(offset, &data[..len]);
            self.device.read_config(offset, &mut [0; 8][..len]);
            let index = bytes.int_in_range(0..=self.queues.len() - 1)?;
            self.lay_out(index, bytes)?;
            let _ = self.queues[index].kick.write(1);
            wait_idle(&self.event_loop);
        }
        Ok(())
    }

    /// Writes descriptors and makes some of them available, sound or not.
    fn lay_out(&mut self, index: usize, bytes: &mut Unstructured<'_>) -> Result<()> {
        let queue = &mut self.queues[index];
        for at in 0..bytes.int_in_range(0..=SIZE)? {
            let addr = match bytes.int_in_range(0_u8..=15)? {
                0 => bytes.arbitrary()?,
                1 => bytes.int_in_range(0..=RAM)?,
                _ => DATA + u64::from(bytes.arbitrary::<u16>()? & 0xfff),
            };
            let len = match bytes.int_in_range(0_u8..=15)? {
                0 => bytes.arbitrary()?,
                1..=5 => bytes.int_in_range(0..=64)?,
                _ => bytes.int_in_range(0..=0x3000)?,
            };
            // Mostly chains that go on with the next descriptor.
            let (flags, next) = match bytes.int_in_range(0_u8..=7)? {
                0 => bytes.arbitrary()?,
                kind => (u16::from(kind & 3), (at + 1) % SIZE),
            };
            queue.set_descriptor(at, addr, len, flags, next);
        }
        for _ in 0..bytes.int_in_range(0..=4)? {
            queue.offer(bytes.int_in_range(0..=SIZE)?);
        }
        Ok(())
    }
}

impl Machine {
    /// Reads a page at each of these sectors; whether the disk can is its own affair.
    pub fn read_disk(&mut self, sectors: &[u64]) {
        let _ = self.device.activate(0, &self.transport);
        let side = self.queues[0].device_side(&self.transport, QueueState::default());
        if self.device.start_queue(side).is_err() {
            return;
        }
        for sector in sectors {
            let mut header = [0; 16];
            header[8..].copy_from_slice(&sector.to_le_bytes());
            self.guest.write(DATA, &header);
            let buffer = TestBuffer::new;
            let chain = [
                buffer(DATA, 16, false),
                buffer(DATA + 0x1000, 4096, true),
                buffer(DATA + 16, 1, true),
            ];
            self.queues[0].send(&chain);
            self.queues[0].wait_used();
        }
        self.device.stop_queue(0);
    }
}

/// A disk of one queue.
pub fn disk_config(path: &Path) -> BlockConfig {
    BlockConfig {
        queue_size: SIZE,
        ..testing::disk_config(path)
    }
}
