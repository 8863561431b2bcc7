//! The cost of a disk between its queues and the host, as a table. This program is the driver, so no
//! exit of a guest is included.
//!
//!     cargo bench -p virtio-devices --bench io
//!
//! Beside each row the same I/O without a device: `pread` and `pwrite` by one thread.

#![allow(
    clippy::unwrap_used,
    missing_docs,
    reason = "a benchmark that fails, fails"
)]

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

use devices::event_loop::EventLoop;
use virtio_devices::block::{Block, BlockConfig};
use virtio_devices::testing::{TestBuffer, TestGuest, TestQueue, disk_config, transport};
use virtio_devices::{QueueState, VirtioDevice, Workers};

const MIB: u64 = 1 << 20;
const DISK: u64 = 256 * MIB;
const SPAN: Duration = Duration::from_millis(500);
const TIMES: usize = 5;

fn main() {
    let dir = tempfile::tempdir_in("/var/tmp").unwrap();
    let (raw, qcow2) = (dir.path().join("raw"), dir.path().join("qcow2"));
    let file = File::create(&raw).unwrap();
    let piece = vec![7_u8; MIB as usize];
    (0..DISK / MIB).for_each(|at| file.write_all_at(&piece, at * MIB).unwrap());
    file.sync_all().unwrap();
    let made = Command::new("qemu-img")
        .args(["convert", "-q", "-O", "qcow2"])
        .args([&raw, &qcow2])
        .status();
    assert!(made.unwrap().success());

    println!("\nDisks in the host's page cache: medians of {TIMES}.\n");
    println!(
        "| image | queues | depth | what | operations/s | MiB/s | CPU us an operation | without a device | ratio |"
    );
    println!("|---|---|---|---|---|---|---|---|---|");
    for (image, path) in [("raw", &raw), ("qcow2", &qcow2)] {
        for (queues, depth, size, write) in [
            (1, 1, 4096, false),
            (1, 1, 4096, true),
            (1, 32, 4096, false),
            (1, 32, 4096, true),
            (4, 32, 4096, false),
            (1, 8, 1 << 20, false),
            (1, 8, 1 << 20, true),
        ] {
            let load = Load { depth, size, write };
            let mut measured: Vec<_> = (0..TIMES).map(|_| device(path, queues, load)).collect();
            measured.sort_by(|a, b| a.0.total_cmp(&b.0));
            let (rate, cpu) = measured[TIMES / 2];
            let mut plain: Vec<_> = (0..TIMES).map(|_| host(&raw, load)).collect();
            plain.sort_by(f64::total_cmp);
            let plain = plain[TIMES / 2];
            println!(
                "| {image} | {queues} | {depth} | {} {} | {rate:.0} | {:.0} | {cpu:.1} | {plain:.0} | {:.2} |",
                if size == 4096 {
                    "4 KiB random"
                } else {
                    "1 MiB in order"
                },
                if write { "write" } else { "read" },
                rate * f64::from(size) / MIB as f64,
                rate / plain,
            );
        }
    }
}

#[derive(Clone, Copy)]
struct Load {
    depth: u16,
    size: u32,
    write: bool,
}

impl Load {
    /// Returns the offset of the operation of this number.
    fn offset(self, number: u64) -> u64 {
        let places = DISK / u64::from(self.size);
        let place = match self.size {
            4096 => number.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 20,
            _ => number,
        };
        place % places * u64::from(self.size)
    }
}

/// CPU time of this process, which the kernel counts in hundredths of a second.
fn cpu() -> Duration {
    let stat = fs::read_to_string("/proc/self/stat").unwrap();
    let fields: Vec<_> = stat
        .rsplit(')')
        .next()
        .unwrap()
        .split_whitespace()
        .collect();
    let ticks: u64 = fields[11..13]
        .iter()
        .map(|ticks| ticks.parse::<u64>().unwrap())
        .sum();
    Duration::from_millis(ticks * 10)
}

/// Operations a second, and microseconds of CPU time each, through a device.
fn device(path: &Path, queues: u16, load: Load) -> (f64, f64) {
    let loops: Vec<_> = (0..2).map(|_| EventLoop::start("bench").unwrap()).collect();
    let workers = Workers::new(loops.iter().map(|one| one.handle().clone()).collect()).unwrap();
    let config = BlockConfig {
        queues,
        queue_size: 128,
        ..disk_config(path)
    };
    let (mut disk, _) = Block::new(&config, workers).unwrap();
    let mut guest = TestGuest::new(64 * MIB);
    let (transport, _) = transport();
    disk.activate(disk.features(), &transport).unwrap();
    let mut drivers: Vec<_> = (0..queues)
        .map(|index| Driver::new(&mut guest, index, queues, load))
        .collect();
    for driver in &drivers {
        let side = driver
            .queue
            .device_side(&Arc::clone(&transport), QueueState::default());
        disk.start_queue(side).unwrap();
    }
    let (start, before, mut done) = (Instant::now(), cpu(), 0_u64);
    drivers.iter_mut().for_each(|driver| driver.fill(&guest));
    while start.elapsed() < SPAN {
        for driver in &mut drivers {
            done += driver.turn(&guest);
        }
        std::thread::yield_now();
    }
    let (span, used) = (start.elapsed(), cpu() - before);
    for index in 0..queues {
        disk.stop_queue(index);
    }
    let rate = done as f64 / span.as_secs_f64();
    (rate, used.as_secs_f64() * 1e6 / done.max(1) as f64)
}

/// A queue's driver that keeps it filled.
struct Driver {
    queue: TestQueue,
    load: Load,
    /// Addresses of header, data and status of each slot.
    places: Vec<(u64, u64, u64)>,
    /// The slot of each chain, by its head.
    slots: Vec<usize>,
    next: u64,
    step: u64,
}

impl Driver {
    fn new(guest: &mut TestGuest, index: u16, queues: u16, load: Load) -> Self {
        let queue = TestQueue::new(guest, index, 128);
        let mut place = || {
            (
                guest.alloc(16),
                guest.alloc(u64::from(load.size)),
                guest.alloc(1),
            )
        };
        let places = (0..load.depth).map(|_| place()).collect();
        Self {
            queue,
            load,
            places,
            slots: vec![0; 128],
            next: index.into(),
            step: queues.into(),
        }
    }

    fn ask(&mut self, guest: &TestGuest, slot: usize) {
        let (header, data, status) = self.places[slot];
        let mut raw = [0; 16];
        raw[0] = self.load.write.into();
        raw[8..].copy_from_slice(&(self.load.offset(self.next) / 512).to_le_bytes());
        self.next += self.step;
        guest.write(header, &raw);
        let buffer = TestBuffer::new;
        let chain = [
            buffer(header, 16, false),
            buffer(data, self.load.size, !self.load.write),
            buffer(status, 1, true),
        ];
        let head = self.queue.describe(&chain);
        self.slots[usize::from(head)] = slot;
        self.queue.offer(head);
    }

    fn fill(&mut self, guest: &TestGuest) {
        (0..self.places.len()).for_each(|slot| self.ask(guest, slot));
        self.queue.kick.write(1).unwrap();
    }

    /// Asks again for each that is done.
    fn turn(&mut self, guest: &TestGuest) -> u64 {
        let mut done = 0;
        while let Some((head, _)) = self.queue.take_used() {
            done += 1;
            self.ask(guest, self.slots[usize::from(head)]);
        }
        if done > 0 {
            self.queue.kick.write(1).unwrap();
        }
        done
    }
}

/// Operations a second without a device.
fn host(path: &Path, load: Load) -> f64 {
    let file = File::options().read(true).write(true).open(path).unwrap();
    let mut data = vec![1; load.size as usize];
    let (start, mut done) = (Instant::now(), 0_u64);
    while start.elapsed() < SPAN {
        let offset = load.offset(done);
        if load.write {
            file.write_all_at(&data, offset).unwrap();
        } else {
            file.read_exact_at(&mut data, offset).unwrap();
        }
        done += 1;
    }
    done as f64 / start.elapsed().as_secs_f64()
}
