//! Disks, driven over their queues, with real images behind them.

// LONG: each kind of request, image and damage is a few lines, on one machine.

#![allow(clippy::unwrap_used, clippy::panic, reason = "tests")]

use std::fs::{self, File};
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use devices::event_loop::EventLoop;
use memory::{Fault, UserFaults};
use proptest::prelude::*;
use serde::{Deserialize, Serialize};
use state::{LoadError, Saved, Store, Writer};
use virtio_devices::block::{
    Block, BlockConfig, BlockHandle, ImageError, ImageFormat, LockMode, OnError,
};
use virtio_devices::rate_limiter::{BucketConfig, RateLimits};
use virtio_devices::testing::{
    Heard, PATIENCE, TestBuffer, TestGuest, TestQueue, transport, workers,
};
use virtio_devices::{QueueState, Transport, TransportEvent, VirtioDevice};

const MIB: usize = 1 << 20;
const FLUSH: u64 = 1 << 9;

const IN: u32 = 0;
const OUT: u32 = 1;
const SYNC: u32 = 4;
const GET_ID: u32 = 8;
const DISCARD: u32 = 11;
const WRITE_ZEROES: u32 = 13;

fn config(path: &Path) -> BlockConfig {
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
        serial: "whimbrel-test-disk-0".to_owned(),
        sparse: true,
        lock: LockMode::ByteRange,
        is_incoming: false,
        limits: RateLimits::default(),
        on_error: OnError::Report,
    }
}

/// A guest with one disk, which its driver uses.
struct Machine {
    guest: TestGuest,
    device: Block,
    handle: BlockHandle,
    queue: TestQueue,
    transport: Arc<Transport>,
    heard: Heard,
    data: u64,
    header: u64,
    status: u64,
    _event_loop: EventLoop,
}

fn machine(config: &BlockConfig) -> Machine {
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

fn header(kind: u32, sector: u64) -> [u8; 16] {
    let mut header = [0; 16];
    header[..4].copy_from_slice(&kind.to_le_bytes());
    header[8..].copy_from_slice(&sector.to_le_bytes());
    header
}

impl Machine {
    fn start(&mut self, state: QueueState) {
        self.device.activate(FLUSH, &self.transport).unwrap();
        let queue = self.queue.device_side(&self.transport, state);
        self.device.start_queue(queue).unwrap();
    }

    fn save(&self) -> Vec<u8> {
        let mut writer = Writer::default();
        let mut scope = writer.scope("disk").unwrap();
        self.device.save(&mut scope).unwrap();
        writer.finish()
    }

    /// Stops the queue, forgets all, and loads.
    fn load(&mut self, saved: &[u8]) -> Result<(), LoadError> {
        self.device.stop_queue(0);
        self.device.reset();
        let mut store = Store::open(saved).unwrap();
        self.device.load(&mut store.scope("disk").unwrap())
    }

    /// Sends a request with this much data at `self.data`, and waits for its status.
    fn request(&mut self, kind: u32, sector: u64, len: u32, device_writes: bool) -> u8 {
        self.guest.write(self.header, &header(kind, sector));
        self.guest.write(self.status, &[0xff]);
        let buffer = |addr, len, writable| TestBuffer {
            addr,
            len,
            writable,
        };
        let mut chain = vec![buffer(self.header, 16, false)];
        if len > 0 {
            chain.push(buffer(self.data, len, device_writes));
        }
        chain.push(buffer(self.status, 1, true));
        let head = self.queue.send(&chain);
        assert_eq!(self.queue.wait_used().0, head);
        self.guest.read(self.status, 1)[0]
    }

    fn write(&mut self, sector: u64, data: &[u8]) -> u8 {
        self.guest.write(self.data, data);
        self.request(OUT, sector, u32::try_from(data.len()).unwrap(), false)
    }

    fn read(&mut self, sector: u64, len: usize) -> (u8, Vec<u8>) {
        self.guest.write(self.data, &vec![0xee; len]);
        let status = self.request(IN, sector, u32::try_from(len).unwrap(), true);
        (status, self.guest.read(self.data, len))
    }
}

fn pattern(seed: u8, len: usize) -> Vec<u8> {
    (0..len)
        .map(|i| (i / 512) as u8 ^ (i as u8) ^ seed)
        .collect()
}

fn raw(dir: &tempfile::TempDir, size: u64) -> PathBuf {
    let path = dir.path().join("disk.raw");
    File::create(&path).unwrap().set_len(size).unwrap();
    path
}

fn qemu_img(arguments: &[&str]) -> String {
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

#[test]
fn what_is_written_is_read_and_is_in_the_image() {
    let dir = tempfile::tempdir().unwrap();
    let path = raw(&dir, 4 << 20);
    for direct in [false, true] {
        let mut machine = machine(&BlockConfig {
            direct,
            ..config(&path)
        });
        let data = pattern(u8::from(direct), MIB);
        assert_eq!(machine.write(8, &data), 0, "direct: {direct}");
        assert_eq!(machine.request(SYNC, 0, 0, false), 0);
        assert_eq!(machine.read(8, MIB), (0, data.clone()));
        // What direct I/O does not take as it is: one sector, at an odd place.
        assert_eq!(machine.read(9, 512), (0, data[512..1024].to_vec()));
        assert_eq!(machine.write(9, &[7; 512]), 0);
        let state = machine.device.stop_queue(0).unwrap();
        assert_eq!((state.next_avail, state.next_used), (5, 5));
        drop(machine);
        let image = fs::read(&path).unwrap();
        assert_eq!(image[4096..4608], data[..512]);
        assert_eq!(image[4608..5120], [7; 512]);
        assert_eq!(image[5120..4096 + MIB], data[1024..]);
    }
}

/// However a guest asks, a queue that stops waits for no more than some tens of MiB: over the same
/// RAM requests could have gigabytes.
#[test]
fn what_a_stop_waits_for_is_bounded() {
    let dir = tempfile::tempdir().unwrap();
    let mut machine = machine(&config(&raw(&dir, 64 << 20)));
    assert_ne!(machine.device.features() & 1 << 1, 0);
    let mut config = [0; 8];
    machine.device.read_config(8, &mut config);
    let [size_max, seg_max] = [0, 4].map(|at| {
        let word: [u8; 4] = config[at..at + 4].try_into().unwrap();
        u32::from_le_bytes(word)
    });
    assert_eq!((size_max, seg_max), (512 << 10, 62));
    let buffer = |addr, len, writable| TestBuffer {
        addr,
        len,
        writable,
    };
    let (header_at, status) = (machine.header, machine.status);
    machine.guest.write(header_at, &header(IN, 0));
    let data = buffer(machine.data, MIB as u32, true);
    let mut read = |pieces: usize| {
        let mut chain = vec![buffer(header_at, 16, false)];
        chain.extend(vec![data; pieces]);
        chain.push(buffer(status, 1, true));
        machine.queue.send(&chain);
        machine.queue.wait_used();
        machine.guest.read(status, 1)[0]
    };
    assert_eq!((read(32), read(33)), (0, 1));

    // Of sixty-two of 32 MiB, those that are taken when the queue stops are done, and no others. Their
    // chains share descriptors.
    let piece = 1 << 20;
    for index in 0..34_u16 {
        let more = u16::from(index < 33);
        let (addr, len, flags) = match index {
            0 => (header_at, 16, more),
            33 => (status, 1, 2),
            _ => (machine.data, piece, 3),
        };
        machine
            .queue
            .set_descriptor(index, addr, len, flags, index + 1);
    }
    let first = QueueState {
        next_avail: 2,
        next_used: 2,
    };
    assert_eq!(machine.device.stop_queue(0), Some(first));
    (0..60).for_each(|_| machine.queue.offer(0));
    machine.start(first);
    machine.queue.wait_used();
    let state = machine.device.stop_queue(0).unwrap();
    assert_eq!(state.next_avail, state.next_used);
    assert!(state.next_avail < 62, "{state:?}");
}

#[test]
fn a_segment_is_no_longer_than_the_disk_says() {
    let dir = tempfile::tempdir().unwrap();
    let mut machine = machine(&config(&raw(&dir, 2 << 30)));
    for (sectors, expected) in [(1_u32 << 21, 0), ((1 << 21) + 1, 1)] {
        for kind in [DISCARD, WRITE_ZEROES] {
            let segment = [[0; 8], (u64::from(sectors)).to_le_bytes()].concat();
            machine.guest.write(machine.data, &segment);
            assert_eq!(machine.request(kind, 0, 16, false), expected, "{sectors}");
        }
    }
}

/// A disk of the host for as long as a test wants it.
struct Loop(PathBuf);

impl Loop {
    fn new(image: &Path, block: u32) -> Self {
        let mut losetup = Command::new("losetup");
        let run = losetup.args(["--find", "--show", "-b", &block.to_string()]);
        let run = run.arg(image).output().unwrap();
        let told = String::from_utf8_lossy(&run.stderr).into_owned();
        assert!(run.status.success(), "losetup: {told}");
        Self(String::from_utf8(run.stdout).unwrap().trim().into())
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let _ = Command::new("losetup").arg("-d").arg(&self.0).status();
    }
}

/// Wants `/dev/loop-control` and CAP_SYS_ADMIN.
#[test]
fn a_guest_sees_the_blocks_that_direct_io_takes() {
    let dir = tempfile::tempdir().unwrap();
    let image = raw(&dir, 4 << 20);
    let blocks = |machine: &Machine| {
        let mut raw = [0; 12];
        machine.device.read_config(20, &mut raw);
        let word = |at: usize| u32::from_le_bytes(raw[at..at + 4].try_into().unwrap());
        (
            word(0),
            raw[4],
            u16::from_le_bytes([raw[6], raw[7]]),
            word(8),
        )
    };
    for (block, expected) in [(4096, (4096, 0, 1, 1)), (512, (512, 0, 1, 1))] {
        let disk = Loop::new(&image, block);
        let direct = BlockConfig {
            direct: true,
            ..config(&disk.0)
        };
        let mut machine = machine(&direct);
        assert_eq!(blocks(&machine), expected);
        let sector = u64::from(block / 512);
        let data = pattern(block as u8, 3 * block as usize);
        assert_eq!(machine.write(sector, &data), 0);
        assert_eq!(machine.read(sector, data.len()), (0, data));
        // Less than a block, and between two.
        let bad = u8::from(block > 512);
        assert_eq!(machine.read(0, 512).0, bad);
        assert_eq!(machine.read(1, 4096).0, bad);
        machine.handle.resize(512 * 9).unwrap_err();
    }
    // The host's page cache takes anything.
    let disk = Loop::new(&image, 4096);
    let mut cached = machine(&config(&disk.0));
    assert_eq!(blocks(&cached), (512, 3, 8, 8));
    assert_eq!(cached.read(1, 512).0, 0);
    // A guest that was given this block size cannot continue with a larger one.
    cached.device.stop_queue(0);
    let saved = cached.save();
    drop(cached);
    let mut direct = machine(&BlockConfig {
        direct: true,
        ..config(&disk.0)
    });
    let refused = direct.load(&saved).unwrap_err().to_string();
    assert!(
        refused.contains("blocks of 512 bytes") && refused.contains("takes 4096"),
        "{refused}"
    );
    direct.load(&direct.save()).unwrap();
}

#[test]
fn each_kind_of_request_has_its_answer() {
    let dir = tempfile::tempdir().unwrap();
    let path = raw(&dir, 4 << 20);
    let mut machine = machine(&config(&path));
    machine.write(0, &pattern(1, MIB));
    assert_eq!(machine.request(GET_ID, 0, 20, true), 0);
    assert_eq!(
        machine.guest.read(machine.data, 20),
        b"whimbrel-test-disk-0"
    );
    let segment = |sector: u64, sectors: u32, flags: u32| {
        let mut raw = sector.to_le_bytes().to_vec();
        raw.extend(sectors.to_le_bytes());
        raw.extend(flags.to_le_bytes());
        raw
    };
    machine.guest.write(machine.data, &segment(8, 8, 0));
    assert_eq!(machine.request(WRITE_ZEROES, 0, 16, false), 0);
    machine.guest.write(machine.data, &segment(16, 8, 0));
    assert_eq!(machine.request(DISCARD, 0, 16, false), 0);
    let (status, data) = machine.read(0, 24 * 512);
    assert_eq!(status, 0);
    assert_eq!(data[..4096], pattern(1, 4096));
    assert_eq!(data[4096..], [0; 8192]);
    for (name, expected, kind, sector, len, device_writes) in [
        ("past the end", 1, IN, 8191, 1024, true),
        ("far past the end", 1, IN, u64::MAX, 512, true),
        ("no whole sectors", 1, IN, 0, 100, true),
        ("nothing to write", 1, OUT, 0, 0, false),
        ("too short for an id", 1, GET_ID, 0, 19, true),
        ("a segment cut short", 1, DISCARD, 0, 15, false),
        ("unknown", 2, 77, 0, 512, true),
    ] {
        assert_eq!(
            machine.request(kind, sector, len, device_writes),
            expected,
            "{name}"
        );
    }
    machine.guest.write(machine.data, &segment(8000, 4000, 0));
    assert_eq!(machine.request(DISCARD, 0, 16, false), 1, "past the end");
    machine.guest.write(machine.data, &segment(0, 8, 6));
    assert_eq!(
        machine.request(WRITE_ZEROES, 0, 16, false),
        2,
        "unknown flags"
    );
    // 5.2.6.2: no discard has the flag, which is known for zeroes only.
    machine.guest.write(machine.data, &segment(16, 8, 1));
    assert_eq!(machine.request(DISCARD, 0, 16, false), 2, "unmap");
    let counters = machine.device.counters();
    assert!(counters.contains(&("discards", 2)), "{counters:?}");
    assert!(machine.heard.events().is_empty());
}

#[test]
fn a_disk_that_is_not_sparse_keeps_its_blocks() {
    let dir = tempfile::tempdir().unwrap();
    let path = raw(&dir, 1 << 20);
    fs::write(&path, pattern(9, MIB)).unwrap();
    let mut machine = machine(&BlockConfig {
        sparse: false,
        ..config(&path)
    });
    assert_eq!(machine.device.features() & 1 << 13, 0);
    let segment = [[8, 0, 0, 0, 0, 0, 0, 0], [8, 0, 0, 0, 0, 0, 0, 0]].concat();
    machine.guest.write(machine.data, &segment);
    assert_eq!(machine.request(DISCARD, 0, 16, false), 2);
    assert_eq!(machine.read(0, MIB), (0, pattern(9, MIB)));
}

#[test]
fn a_read_only_disk_stays_as_it_is() {
    let dir = tempfile::tempdir().unwrap();
    let path = raw(&dir, 1 << 20);
    fs::write(&path, pattern(9, MIB)).unwrap();
    let mut machine = machine(&BlockConfig {
        readonly: true,
        ..config(&path)
    });
    assert_eq!(machine.write(0, &[0; 512]), 1);
    assert_eq!(machine.request(DISCARD, 0, 16, false), 1);
    assert_eq!(machine.read(0, MIB), (0, pattern(9, MIB)));
    assert_eq!(fs::read(&path).unwrap(), pattern(9, MIB));
}

#[test]
fn a_chain_without_room_for_a_status_breaks_the_rules() {
    let dir = tempfile::tempdir().unwrap();
    let mut machine = machine(&config(&raw(&dir, 1 << 20)));
    machine.guest.write(machine.header, &header(OUT, 0));
    machine.queue.send(&[TestBuffer {
        addr: machine.header,
        len: 16,
        writable: false,
    }]);
    let from = std::time::Instant::now();
    while machine.heard.events().is_empty() && from.elapsed() < Duration::from_secs(10) {
        std::thread::yield_now();
    }
    let events = format!("{:?}", machine.heard.events());
    assert!(events.contains("no room for a status"), "{events}");
    assert!(machine.device.stop_queue(0).is_some());
}

/// The pulse: under load the disk is stopped, saved, reset, loaded and started again and again.
#[test]
fn no_request_is_lost_or_doubled_by_a_pulse() {
    let dir = tempfile::tempdir().unwrap();
    let qcow2 = dir.path().join("disk.qcow2");
    qemu_img(&["create", "-q", "-f", "qcow2", qcow2.to_str().unwrap(), "8M"]);
    for path in [raw(&dir, 8 << 20), qcow2.clone()] {
        let mut machine = machine(&config(&path));
        let headers = machine.guest.alloc(16 * 16);
        let statuses = machine.guest.alloc(16);
        let mut seed = 0_u8;
        for round in 0..40 {
            // Sixteen writes of 16 KiB each, to places of their own.
            seed = seed.wrapping_add(1);
            let mut heads = Vec::new();
            for i in 0..16_u64 {
                let (header_at, status) = (headers + 16 * i, statuses + i);
                let data = machine.data + i * 16384;
                machine
                    .guest
                    .write(header_at, &header(OUT, (round % 4) * 512 + i * 32));
                machine.guest.write(data, &pattern(seed ^ i as u8, 16384));
                machine.guest.write(status, &[0xff]);
                let buffer = |addr, len, writable| TestBuffer {
                    addr,
                    len,
                    writable,
                };
                heads.push(machine.queue.send(&[
                    buffer(header_at, 16, false),
                    buffer(data, 16384, false),
                    buffer(status, 1, true),
                ]));
            }
            let state = machine.device.stop_queue(0).unwrap();
            assert_eq!(state.next_avail, state.next_used, "nothing is in flight");
            let mut writer = Writer::default();
            machine
                .device
                .save(&mut writer.scope("disk").unwrap())
                .unwrap();
            let bytes = writer.finish();
            machine.device.reset();
            let mut store = Store::open(&bytes).unwrap();
            let mut scope = store.scope("disk").unwrap();
            machine.device.load(&mut scope).unwrap();
            machine.start(state);
            machine.queue.kick.write(1).unwrap();
            let mut used: Vec<u16> = (0..16).map(|_| machine.queue.wait_used().0).collect();
            used.sort_unstable();
            heads.sort_unstable();
            assert_eq!(used, heads, "round {round}");
            assert_eq!(machine.guest.read(statuses, 16), [0; 16]);
            for i in 0..16_u64 {
                let (status, data) = machine.read((round % 4) * 512 + i * 32, 16384);
                assert_eq!(status, 0);
                assert!(data == pattern(seed ^ i as u8, 16384), "round {round}, {i}");
            }
        }
        assert_eq!(machine.queue.take_used(), None);
        machine.device.stop_queue(0);
    }
    qemu_img(&["check", "-q", qcow2.to_str().unwrap()]);
}

#[test]
fn a_qcow2_image_is_what_qemu_says_it_is() {
    let dir = tempfile::tempdir().unwrap();
    let base = dir.path().join("base.raw");
    fs::write(&base, pattern(3, 4 * MIB)).unwrap();
    let top = dir.path().join("top.qcow2");
    let (base_str, top_str) = (base.to_str().unwrap(), top.to_str().unwrap());
    qemu_img(&[
        "create", "-q", "-f", "qcow2", "-F", "raw", "-b", base_str, top_str,
    ]);
    let (_event_loop, workers) = workers();
    let refused = Block::new(&config(&top), workers).err().unwrap();
    assert!(matches!(refused, ImageError::Backing { .. }), "{refused}");

    let mut machine = machine(&BlockConfig {
        backing_files: true,
        ..config(&top)
    });
    assert_eq!(
        machine.read(100, 4096),
        (0, pattern(3, 4 * MIB)[51200..55296].to_vec())
    );
    assert_eq!(machine.write(100, &[0x55; 4096]), 0);
    assert_eq!(machine.request(SYNC, 0, 0, false), 0);
    machine.device.stop_queue(0);
    drop(machine);
    qemu_img(&["check", "-q", top_str]);
    let flat = dir.path().join("flat.raw");
    qemu_img(&["convert", "-O", "raw", top_str, flat.to_str().unwrap()]);
    let mut expected = pattern(3, 4 * MIB);
    expected[51200..55296].fill(0x55);
    assert!(fs::read(&flat).unwrap() == expected);
    assert!(
        fs::read(&base).unwrap() == pattern(3, 4 * MIB),
        "the base is untouched"
    );
}

fn refusal(config: &BlockConfig) -> String {
    let (_event_loop, workers) = workers();
    Block::new(config, workers)
        .err()
        .unwrap_or_else(|| panic!("{} is taken", config.path.display()))
        .to_string()
}

#[test]
fn what_is_no_disk_image_is_refused_by_name() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name);
    fs::write(path("odd"), [0; 1000]).unwrap();
    fs::write(path("empty"), []).unwrap();
    fs::write(path("truncated.qcow2"), b"QFI\xfb\0\0\0\x03").unwrap();
    let encrypted = path("encrypted.qcow2");
    let name = encrypted.to_str().unwrap();
    qemu_img(&["create", "-q", "-f", "qcow2", name, "1M"]);
    let mut bytes = fs::read(&encrypted).unwrap();
    bytes[35] = 1; // crypt_method: AES
    fs::write(&encrypted, bytes).unwrap();
    let unknown = path("unknown.qcow2");
    qemu_img(&[
        "create",
        "-q",
        "-f",
        "qcow2",
        unknown.to_str().unwrap(),
        "1M",
    ]);
    let mut bytes = fs::read(&unknown).unwrap();
    bytes[72] |= 0x80; // incompatible feature 63
    fs::write(&unknown, bytes).unwrap();
    let circle = path("circle.qcow2");
    let name = circle.to_str().unwrap();
    qemu_img(&["create", "-q", "-f", "qcow2", name, "1M"]);
    qemu_img(&[
        "rebase", "-q", "-u", "-f", "qcow2", "-F", "qcow2", "-b", name, name,
    ]);
    let made = Command::new("mkfifo").arg(path("pipe")).status().unwrap();
    assert!(made.success());
    for (name, expected) in [
        ("missing", "cannot be opened"),
        (".", "is a directory"),
        ("pipe", "is a FIFO"),
        ("odd", "no size of a disk"),
        ("empty", "no size of a disk"),
        ("truncated.qcow2", "cannot be used as qcow2"),
        ("encrypted.qcow2", "cannot be used as qcow2"),
        ("unknown.qcow2", "cannot be used as qcow2"),
        ("circle.qcow2", "builds on itself"),
    ] {
        let told = refusal(&BlockConfig {
            backing_files: true,
            ..config(&path(name))
        });
        assert!(told.contains(expected), "{name}: {told}");
        assert!(told.contains(name), "{name}: {told}");
    }
}

#[test]
fn an_image_has_one_writer_also_among_qemus_tools() {
    let dir = tempfile::tempdir().unwrap();
    let path = raw(&dir, 1 << 20);
    let mut first = machine(&config(&path));
    let told = refusal(&config(&path));
    let own = format!("process {}", std::process::id());
    assert!(
        told.contains("is in use by") && told.contains(&own),
        "{told}"
    );
    let readonly = BlockConfig {
        readonly: true,
        ..config(&path)
    };
    assert!(refusal(&readonly).contains("is in use by"));
    let write = |path: &Path| {
        let mut qemu_io = Command::new("qemu-io");
        qemu_io.args(["-f", "raw", "-c", "write 0 512"]).arg(path);
        let run = qemu_io.stdout(Stdio::null()).output();
        run.expect("qemu-io, of the package qemu-utils")
    };
    let run = write(&path);
    let told = String::from_utf8_lossy(&run.stderr);
    assert!(!run.status.success() && told.contains("lock"), "{told}");

    // Ownership moves, and comes back.
    first.device.flush().unwrap();
    assert!(!write(&path).status.success(), "a flush releases nothing");
    first.device.hand_over();
    let second = machine(&config(&path));
    assert!(first.device.take_over().is_err());
    drop(second);
    first.device.take_over().unwrap();
    drop(first);
    assert!(write(&path).status.success());
    // Readers share.
    let _one = machine(&readonly);
    let _two = machine(&readonly);
    assert!(!write(&path).status.success());
    // The other way round: QEMU has it.
    drop((_one, _two));
    let mut qemu_io = Command::new("qemu-io");
    let held = qemu_io.args(["-f", "raw"]).arg(&path);
    let mut held = held
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    // Its prompt comes when it has opened the image.
    let mut prompt = [0; 8];
    held.stdout
        .as_mut()
        .unwrap()
        .read_exact(&mut prompt)
        .unwrap();
    let told = refusal(&config(&path));
    let expected = format!("process {} (qemu-io)", held.id());
    assert!(told.contains(&expected), "{told}");
    drop(held.stdin.take());
    held.wait().unwrap();
}

/// Programs that are started meanwhile have the image open, for a moment.
#[test]
fn a_disk_that_is_gone_is_free_at_once() {
    let dir = tempfile::tempdir().unwrap();
    let path = raw(&dir, 1 << 20);
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !done.load(Ordering::Relaxed) {
                assert!(Command::new("true").status().unwrap().success());
            }
        });
        let taken = (0..300).try_for_each(|_| {
            let (_event_loop, workers) = workers();
            Block::new(&config(&path), workers).map(drop)
        });
        done.store(true, Ordering::Relaxed);
        taken.unwrap();
    });
}

/// Backing files in use are locked against QEMU's tools and against us.
#[test]
fn what_is_below_an_image_is_locked_for_all_who_read_it() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
    let (base, middle, top) = (path("base.raw"), path("middle.qcow2"), path("top.qcow2"));
    let (other, data) = (path("other.qcow2"), path("data.raw"));
    fs::write(&base, pattern(3, MIB)).unwrap();
    let create = |format, below: &str, image: &str| {
        let on = ["-F", format, "-b", below, image];
        qemu_img(&[&["create", "-q", "-f", "qcow2"][..], &on].concat());
    };
    create("raw", &base, &middle);
    create("qcow2", &middle, &top);
    create("qcow2", &middle, &other);
    let on = |image: &str| BlockConfig {
        backing_files: true,
        ..config(Path::new(image))
    };
    let writes = |image: &str, format: &str| {
        let mut qemu_io = Command::new("qemu-io");
        qemu_io.args(["-f", format, "-c", "write 0 512", image]);
        let run = qemu_io.stdout(Stdio::null()).stderr(Stdio::null()).status();
        run.expect("qemu-io, of the package qemu-utils").success()
    };
    let mut first = machine(&on(&top));
    let second = machine(&on(&other));
    assert!(!writes(&base, "raw") && !writes(&middle, "qcow2"));
    assert!(refusal(&config(Path::new(&base))).contains("is in use by"));
    drop(second);
    // The locks go with the guest, and come back with it.
    first.device.flush().unwrap();
    assert!(!writes(&base, "raw"));
    first.device.hand_over();
    assert!(writes(&base, "raw"));
    let waits = BlockConfig {
        is_incoming: true,
        ..on(&other)
    };
    let mut incoming = machine(&waits);
    assert!(writes(&base, "raw"));
    incoming.device.take_over().unwrap();
    assert!(!writes(&base, "raw"));
    drop(incoming);
    let writer = machine(&config(Path::new(&base)));
    let told = refusal(&on(&top));
    assert!(
        told.contains(&base) && told.contains("is in use by"),
        "{told}"
    );
    assert!(first.device.take_over().is_err());
    drop(writer);
    assert!(writes(&top, "qcow2"), "nothing is kept of it");
    first.device.take_over().unwrap();
    assert!(!writes(&base, "raw"));
    drop(first);

    // Nor to a file that keeps an image's data.
    let with_data = path("with_data.qcow2");
    let file = format!("data_file={data}");
    qemu_img(&["create", "-q", "-f", "qcow2", "-o", &file, &with_data, "1M"]);
    let machine = machine(&BlockConfig {
        readonly: true,
        data_files: true,
        ..config(Path::new(&with_data))
    });
    assert!(!writes(&data, "raw"));
    drop(machine);
    assert!(writes(&data, "raw"));
}

/// A guest must not choose what the next detection of its disk's format finds, and which files of the
/// host an image names.
#[test]
fn a_disk_that_was_detected_as_raw_stays_raw() {
    let dir = tempfile::tempdir().unwrap();
    let path = raw(&dir, MIB as u64);
    let mut qcow2 = vec![0; 2 * 512];
    qcow2[..4].copy_from_slice(b"QFI\xfb");
    let mut vdi = vec![0; 512];
    vdi[0x40..0x44].copy_from_slice(&0xbeda_107f_u32.to_le_bytes());
    let mut footer = vec![0; 3 * 512];
    footer[1024..][..8].copy_from_slice(b"conectix");
    let last = MIB as u64 / 512 - 3;
    let other_formats = [(0, &qcow2), (0, &vdi), (last, &footer)];
    let detected = config(&path);
    // Also a boot later, with what was found out at the first one.
    let recorded = BlockConfig {
        format: Some(ImageFormat::Raw),
        is_detected: true,
        on_error: OnError::Pause,
        ..config(&path)
    };
    for config in [detected, recorded] {
        let mut machine = machine(&config);
        assert_eq!(machine.handle.format(), ImageFormat::Raw);
        for (sector, data) in other_formats {
            assert_eq!(machine.write(sector, data), 1, "an I/O error");
        }
        assert_eq!(machine.write(0, &[0x55; 4096]), 0);
        assert_eq!(machine.write(last, &[0x55; 1536]), 0);
        // Elsewhere the same bytes tell nothing.
        assert_eq!(machine.write(1, &qcow2), 0);
        assert!(machine.heard.events().is_empty());
        machine.device.stop_queue(0);
    }
    assert!(fs::read(&path).unwrap().starts_with(&[0x55; 512]));
    // An operator who says that the disk is raw takes the guest's bytes as they are.
    let said = BlockConfig {
        format: Some(ImageFormat::Raw),
        ..config(&path)
    };
    let mut machine = machine(&said);
    for (sector, data) in other_formats {
        assert_eq!(machine.write(sector, data), 0);
    }
    drop(machine);
    assert!(fs::read(&path).unwrap()[..512] == vdi[..]);
}

/// A guest that has moved may write what has not come yet; and if it never comes, the disk is to keep
/// what it has.
#[test]
fn pages_that_are_lost_do_not_get_to_the_disk() {
    let dir = tempfile::tempdir().unwrap();
    let path = raw(&dir, MIB as u64);
    fs::write(&path, pattern(7, MIB)).unwrap();
    let mut machine = machine(&config(&path));
    let data = usize::try_from(machine.data).unwrap();
    let ram = Arc::clone(&machine.guest.ram);
    machine.guest.write(machine.header, &header(OUT, 8));
    machine.guest.write(machine.data, &pattern(8, 8192));
    ram.discard(data + 4096, 4096).unwrap();
    let faults = UserFaults::new(vec![Arc::clone(&ram)]).unwrap();
    let buffer = |addr, len, writable| TestBuffer {
        addr,
        len,
        writable,
    };
    machine.queue.send(&[
        buffer(machine.header, 16, false),
        buffer(machine.data, 8192, false),
        buffer(machine.status, 1, true),
    ]);
    let awaited = faults.wait(Duration::from_secs(10)).unwrap();
    assert_eq!(awaited, [Fault::Missing(0, data / 4096 + 1)]);
    ram.lose_awaited();
    faults.end().unwrap();
    let start = std::time::Instant::now();
    while machine.heard.events().is_empty() && start.elapsed() < Duration::from_secs(10) {
        std::thread::yield_now();
    }
    let [TransportEvent::NeedsReset(why)] = &machine.heard.events()[..] else {
        panic!("{:?}", machine.heard.events());
    };
    assert!(why.contains("is lost"), "{why}");
    assert_eq!(machine.queue.take_used(), None);
    assert_eq!(fs::read(&path).unwrap(), pattern(7, MIB));
}

#[test]
fn a_disk_grows_and_its_guest_is_told() {
    let dir = tempfile::tempdir().unwrap();
    let path = raw(&dir, 1 << 20);
    let mut machine = machine(&config(&path));
    let capacity = |machine: &Machine| {
        let mut data = [0; 8];
        machine.device.read_config(0, &mut data);
        u64::from_le_bytes(data)
    };
    assert_eq!(capacity(&machine), 2048);
    assert_eq!(machine.read(2048, 512).0, 1);
    machine.handle.resize(2 << 20).unwrap();
    assert_eq!(capacity(&machine), 4096);
    assert_eq!(
        machine.heard.raised(virtio_devices::testing::CONFIG_VECTOR),
        1
    );
    assert_eq!(machine.read(2048, 512).0, 0);
    machine.handle.resize(1000).unwrap_err();
    machine.handle.resize(0).unwrap_err();
}

#[test]
fn a_rate_limit_is_kept_and_a_stop_does_not_wait_for_it() {
    let dir = tempfile::tempdir().unwrap();
    let path = raw(&dir, 1 << 20);
    let limit = |refill_time| BucketConfig {
        size: 10,
        one_time_burst: 0,
        refill_time,
    };
    let limited = |refill_time| BlockConfig {
        limits: RateLimits {
            bandwidth: None,
            ops: Some(limit(refill_time)),
        },
        ..config(&path)
    };
    let mut quick = machine(&limited(Duration::from_millis(100)));
    let from = std::time::Instant::now();
    for _ in 0..25 {
        assert_eq!(quick.read(0, 512).0, 0);
    }
    assert!(
        from.elapsed() >= Duration::from_millis(140),
        "{:?}",
        from.elapsed()
    );
    quick.device.stop_queue(0);
    drop(quick);

    let mut slow = machine(&limited(Duration::from_secs(10_000)));
    for _ in 0..10 {
        assert_eq!(slow.read(0, 512).0, 0);
    }
    slow.guest.write(slow.header, &header(SYNC, 0));
    let buffer = |addr, len, writable| TestBuffer {
        addr,
        len,
        writable,
    };
    slow.queue
        .send(&[buffer(slow.header, 16, false), buffer(slow.status, 1, true)]);
    std::thread::sleep(Duration::from_millis(20));
    let state = slow.device.stop_queue(0).unwrap();
    assert_eq!(
        (state.next_avail, state.next_used),
        (10, 10),
        "it was put back"
    );
    // Who starts the queue anew, or resets the disk, has no more than before.
    slow.device.reset();
    slow.start(state);
    std::thread::sleep(Duration::from_millis(20));
    assert_eq!(slow.queue.take_used(), None);
    let state = slow.device.stop_queue(0).unwrap();
    assert_eq!((state.next_avail, state.next_used), (10, 10));
}

/// A header extension that reaches past the header, of which the library's parser panics.
/// What is saved of a disk, for tests that write it themselves.
#[derive(Debug, PartialEq, Serialize, Deserialize)]
struct SavedDisk {
    capacity: u64,
    writeback: bool,
    block: Option<u64>,
    kept: Vec<Vec<u16>>,
}

impl Saved for SavedDisk {
    const VERSION: u16 = 2;
}

impl SavedDisk {
    fn of(bytes: &[u8]) -> Self {
        let mut store = Store::open(bytes).unwrap();
        store.scope("disk").unwrap().take().unwrap()
    }

    fn bytes(&self) -> Vec<u8> {
        let mut writer = Writer::default();
        writer.scope("disk").unwrap().put(self).unwrap();
        writer.finish()
    }
}

impl Machine {
    /// Makes so many requests of 16 KiB available together, each with memory of its own, and kicks.
    /// Gives their heads; the statuses are from `self.status` on.
    fn send_together(&mut self, kind: u32, count: u64) -> Vec<u16> {
        self.status = self.guest.alloc(count);
        let mut heads = Vec::new();
        for i in 0..count {
            let header_at = self.guest.put(&header(kind, i * 32));
            self.guest.write(self.status + i, &[0xff]);
            let buffer = |addr, len, writable| TestBuffer {
                addr,
                len,
                writable,
            };
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
    fn wait_stalled(&self, times: usize) -> String {
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
    fn pulse(&mut self) -> QueueState {
        let state = self.device.stop_queue(0).unwrap();
        let saved = self.save();
        self.load(&saved).unwrap();
        assert_eq!(self.save(), saved);
        state
    }

    fn wait_all_used(&mut self, mut heads: Vec<u16>) {
        let mut used: Vec<u16> = heads.iter().map(|_| self.queue.wait_used().0).collect();
        used.sort_unstable();
        heads.sort_unstable();
        assert_eq!(used, heads);
        let statuses = self.guest.read(self.status, heads.len());
        assert!(statuses.iter().all(|status| *status == 0), "{statuses:?}");
        assert_eq!(self.queue.take_used(), None);
    }
}

/// A file system of 1 MiB for as long as a test wants it.
struct SmallDisk(tempfile::TempDir);

impl SmallDisk {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let mut mount = Command::new("mount");
        let run = mount.args(["-t", "tmpfs", "-o", "size=1m", "whimbrel-test"]);
        let run = run.arg(dir.path()).output().unwrap();
        let told = String::from_utf8_lossy(&run.stderr).into_owned();
        assert!(run.status.success(), "mount: {told}");
        Self(dir)
    }

    fn filler(&self) -> PathBuf {
        self.0.path().join("filler")
    }

    /// Leaves no room.
    fn fill(&self) {
        let mut file = File::create(self.filler()).unwrap();
        while file.write_all(&[1; 4096]).is_ok() {}
    }

    fn make_room(&self) {
        fs::remove_file(self.filler()).unwrap();
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(self.0.path()).status();
    }
}

/// Wants CAP_SYS_ADMIN.
#[test]
fn what_finds_no_room_is_kept_and_is_written_when_there_is_some() {
    for format in ["raw", "qcow2"] {
        let host = SmallDisk::new();
        let path = host.0.path().join("disk");
        qemu_img(&["create", "-q", "-f", format, path.to_str().unwrap(), "4M"]);
        let mut machine = machine(&BlockConfig {
            on_error: OnError::Pause,
            ..config(&path)
        });
        let data = pattern(3, 5 * 16384);
        machine.guest.write(machine.data, &data);
        host.fill();
        let heads = machine.send_together(OUT, 5);
        let why = machine.wait_stalled(1);
        assert!(
            why.contains("to write") && why.contains("No space"),
            "{why}"
        );
        // Whatever happens meanwhile, it waits.
        for times in 2..4 {
            let state = machine.pulse();
            machine.start(state);
            machine.wait_stalled(times);
        }
        let state = machine.pulse();
        assert_eq!(machine.queue.take_used(), None, "{format}");
        assert_eq!(machine.guest.read(machine.status, 5), [0xff; 5]);
        host.make_room();
        machine.start(state);
        machine.wait_all_used(heads);
        machine.wait_stalled(3);
        for i in 0..5_usize {
            let read = machine.read(i as u64 * 32, 16384);
            assert!(read == (0, data[i * 16384..][..16384].to_vec()), "{format}");
        }
        // A fault of the request itself is an error for the guest.
        assert_eq!(machine.read(4 << 11, 512).0, 1);
        let count = machine.device.counters();
        assert!(count.contains(&("write_ops", 5)), "{count:?}");
        let state = machine.device.stop_queue(0).unwrap();
        assert_eq!(state.next_avail, state.next_used);
    }
}

#[test]
fn kept_requests_keep_their_order_until_the_driver_forgets_them() {
    let dir = tempfile::tempdir().unwrap();
    let path = raw(&dir, 4 << 20);
    let truncate = |len| {
        let file = File::options().write(true).open(&path).unwrap();
        file.set_len(len).unwrap();
    };
    let pauses = BlockConfig {
        on_error: OnError::Pause,
        ..config(&path)
    };
    let kept = |machine: &Machine| SavedDisk::of(&machine.save()).kept;
    let mut machine = machine(&pauses);
    truncate(0);
    // All of them are there when the queue starts.
    let state = machine.device.stop_queue(0).unwrap();
    let heads = machine.send_together(IN, 8);
    machine.start(state);
    machine.wait_stalled(1);
    // What comes behind is not taken, until the disk has been started again.
    let more = machine.send_together(IN, 1);
    let mut all = heads.clone();
    for times in 2..6 {
        let state = machine.pulse();
        assert_eq!(usize::from(state.next_avail), all.len());
        assert_eq!(kept(&machine), [&all[..]]);
        machine.start(state);
        machine.wait_stalled(times);
        all = [&heads[..], &more[..]].concat();
    }
    // It grows: the first of them can be read, and the others are kept.
    let state = machine.pulse();
    truncate(4 * 16384);
    machine.start(state);
    machine.wait_stalled(6);
    let mut used: Vec<u16> = (0..5).map(|_| machine.queue.wait_used().0).collect();
    used.sort_unstable();
    assert_eq!(used, [&heads[..4], &more[..]].concat());
    let state = machine.pulse();
    assert_eq!(kept(&machine), [&heads[4..]]);
    truncate(4 << 20);
    machine.start(state);
    let mut used: Vec<u16> = (0..4).map(|_| machine.queue.wait_used().0).collect();
    used.sort_unstable();
    assert_eq!(used, heads[4..]);
    assert_eq!(kept(&machine), [Vec::<u16>::new()]);

    // A driver that forgets its queue, or its device, has them forgotten.
    type Forget = fn(&mut Block);
    let forgets: [Forget; 2] = [
        |device| device.reset_queue(0),
        |device| {
            device.stop_queue(0);
            device.reset();
        },
    ];
    for (forget, times) in forgets.into_iter().zip(7..) {
        truncate(0);
        let [head] = machine.send_together(IN, 1)[..] else {
            panic!("it sends one");
        };
        machine.wait_stalled(times);
        assert_eq!(kept(&machine), [[head]]);
        let state = machine.device.queue_state(0).unwrap();
        forget(&mut machine.device);
        assert_eq!(kept(&machine), [Vec::<u16>::new()]);
        truncate(4 << 20);
        machine.start(state);
        assert_eq!(machine.read(0, 512).0, 0);
    }
    // Nor does a disk wait for them when it goes.
    truncate(0);
    machine.send_together(IN, 3);
    machine.wait_stalled(9);
}

#[test]
fn a_chain_that_is_available_twice_is_not_kept_twice() {
    let dir = tempfile::tempdir().unwrap();
    let path = raw(&dir, 4 << 20);
    let mut machine = machine(&BlockConfig {
        on_error: OnError::Pause,
        ..config(&path)
    });
    File::create(&path).unwrap();
    let state = machine.device.stop_queue(0).unwrap();
    let [head] = machine.send_together(IN, 1)[..] else {
        panic!("it sends one");
    };
    machine.queue.offer(head);
    machine.start(state);
    let from = Instant::now();
    while machine.heard.events().len() < 2 && from.elapsed() < PATIENCE {
        std::thread::sleep(Duration::from_millis(1));
    }
    let events = format!("{:?}", machine.heard.events());
    assert!(events.contains("was made available twice"), "{events}");
    machine.device.stop_queue(0).unwrap();
    assert_eq!(SavedDisk::of(&machine.save()).kept, [[head]]);
}

#[test]
fn an_error_is_told_where_nothing_else_is_said() {
    let dir = tempfile::tempdir().unwrap();
    let path = raw(&dir, 4 << 20);
    let mut machine = machine(&config(&path));
    File::create(&path).unwrap();
    assert_eq!(machine.read(0, 512).0, 1);
    assert!(machine.heard.events().is_empty());
    assert!(machine.device.counters().contains(&("errors", 1)));
}

#[test]
fn kept_requests_that_cannot_be_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let mut machine = machine(&config(&raw(&dir, 4 << 20)));
    let good = SavedDisk::of(&machine.save());
    assert_eq!(good.kept, [Vec::<u16>::new()]);
    for (kept, expected) in [
        (vec![vec![], vec![]], "requests of 2 queues"),
        (vec![vec![63, 64]], "the chain at 64"),
        (
            vec![vec![3, 7, 3]],
            "the chain at 3 is to be tried again twice",
        ),
    ] {
        let bad = SavedDisk { kept, ..good };
        let refused = machine.load(&bad.bytes()).unwrap_err().to_string();
        assert!(refused.contains(expected), "{refused}");
    }
    // It may be, and there is no chain.
    machine.queue.set_descriptor(5, 1 << 40, 16, 0, 0);
    let bad = SavedDisk {
        kept: vec![vec![5]],
        ..good
    };
    machine.load(&bad.bytes()).unwrap();
    machine.start(QueueState::default());
    let from = Instant::now();
    while machine.heard.events().is_empty() && from.elapsed() < PATIENCE {
        std::thread::sleep(Duration::from_millis(1));
    }
    let events = format!("{:?}", machine.heard.events());
    assert!(
        events.contains("the descriptor chain at 5 has a buffer that is not RAM"),
        "{events}"
    );
}

#[test]
fn a_damaged_image_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("damaged");
    let made = Command::new("qemu-img")
        .args(["create", "-q", "-f", "qcow2", "-o", "cluster_size=512"])
        .args([&path, Path::new("64K")])
        .status();
    assert!(made.unwrap().success());
    let mut image = fs::read(&path).unwrap();
    // The first extension (docs/interop/qcow2.rst): the table of features' names, an entry of one byte.
    let at = u32::from_be_bytes(image[100..104].try_into().unwrap()) as usize;
    image[at..at + 4].copy_from_slice(&0x6803_f857_u32.to_be_bytes());
    image[at + 4..at + 8].copy_from_slice(&1_u32.to_be_bytes());
    fs::write(&path, image).unwrap();
    let (_event_loop, workers) = workers();
    let refused = Block::new(&config(&path), workers).err().unwrap();
    assert!(refused.to_string().contains("damaged"), "{refused}");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]
    /// Whatever a driver sends, the disk answers or says that it needs a reset, and stops.
    #[test]
    fn any_chain_is_answered(
        headers in prop::collection::vec(prop::collection::vec(any::<u8>(), 16), 1..6),
        chains in prop::collection::vec(
            prop::collection::vec((0_u64..0x90_0000, prop_oneof![0_u32..64, 500_u32..5000, any::<u32>()], any::<bool>()), 1..6),
            1..20,
        )
    ) {
        let dir = tempfile::tempdir().unwrap();
        let mut machine = machine(&config(&raw(&dir, 1 << 20)));
        for (i, chain) in chains.iter().enumerate() {
            let mut raw = headers[i % headers.len()].clone();
            raw[0] %= 16;
            raw[1..4].fill(0);
            raw[10..].fill(0);
            machine.guest.write(machine.header, &raw);
            let mut buffers = vec![TestBuffer { addr: machine.header, len: 16, writable: false }];
            buffers.extend(chain.iter().map(|&(addr, len, writable)| TestBuffer { addr, len, writable }));
            machine.queue.send(&buffers);
        }
        let state = machine.device.stop_queue(0);
        prop_assert!(state.is_some());
    }
}
