//! Requests of each kind, well-formed and not, and queues that stop and start.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use memory::{Fault, UserFaults};
use proptest::prelude::*;
use state::{Store, Writer};
use virtio_devices::block::BlockConfig;
use virtio_devices::rate_limiter::{BucketConfig, RateLimits, SharedLimiter};
use virtio_devices::testing::{TestBuffer, qemu_img};
use virtio_devices::{QueueState, TransportEvent, VirtioDevice};

use crate::machine::{
    DISCARD, GET_ID, IN, MIB, Machine, OUT, SYNC, WRITE_ZEROES, config, header, machine, pattern,
    raw,
};

#[test]
fn written_data_reaches_image() {
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
fn pause_has_bounded_work() {
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
    let buffer = TestBuffer::new;
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
    // Longer than what is moved at a time, too.
    assert_eq!((read(32), read(33)), (0, 0));

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
fn rejects_segment_over_limit() {
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
fn guest_sees_direct_io_block_size() {
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
        refused.contains("blocks of 512 bytes") && refused.contains("needs 4096"),
        "{refused}"
    );
    direct.load(&direct.save()).unwrap();
}

#[test]
fn answers_every_request_type() {
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
fn non_sparse_disk_keeps_blocks() {
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
fn read_only_disk_is_unchanged() {
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
fn chain_without_status_breaks_device() {
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
                let buffer = TestBuffer::new;
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

/// A guest that has moved may write what has not come yet; and if it never comes, the disk is to keep
/// what it has.
#[test]
fn lost_pages_are_not_written() {
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
    let buffer = TestBuffer::new;
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
fn resize_notifies_guest() {
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
        limiter: SharedLimiter::new(RateLimits {
            bandwidth: None,
            ops: Some(limit(refill_time)),
        }),
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
    let buffer = TestBuffer::new;
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

#[test]
fn disks_share_the_limit_of_a_group() {
    let dir = tempfile::tempdir().unwrap();
    let ops = BucketConfig {
        size: 5,
        one_time_burst: 0,
        refill_time: Duration::from_secs(10_000),
    };
    let limiter = SharedLimiter::new(RateLimits {
        bandwidth: None,
        ops: Some(ops),
    });
    let of_group = |name: &str| {
        let path = dir.path().join(name);
        fs::File::create(&path).unwrap().set_len(1 << 20).unwrap();
        machine(&BlockConfig {
            limiter: limiter.clone(),
            ..config(&path)
        })
    };
    let (mut one, mut other) = (of_group("one"), of_group("other"));
    for _ in 0..3 {
        assert_eq!(one.read(0, 512).0, 0);
    }
    for _ in 0..2 {
        assert_eq!(other.read(0, 512).0, 0);
    }
    // The five are spent, and neither of them has a sixth.
    for disk in [&mut one, &mut other] {
        disk.guest.write(disk.header, &header(SYNC, 0));
        let buffer = TestBuffer::new;
        disk.queue
            .send(&[buffer(disk.header, 16, false), buffer(disk.status, 1, true)]);
        std::thread::sleep(Duration::from_millis(20));
        let state = disk.device.stop_queue(0).unwrap();
        assert_eq!(state.next_avail, state.next_used);
    }
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
