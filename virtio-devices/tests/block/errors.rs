//! Requests that the host cannot serve now: kept, saved, and served when it can.

use std::fs::{self, File};
use std::io::Write;
use std::path::PathBuf;
use std::process::Command;
use std::time::{Duration, Instant};

use virtio_devices::block::{Block, BlockConfig, OnError};
use virtio_devices::testing::{PATIENCE, qemu_img};
use virtio_devices::{QueueState, VirtioDevice};

use crate::machine::{IN, Machine, OUT, SavedDisk, config, machine, pattern, raw};

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
fn full_disk_requests_are_retried() {
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
fn kept_requests_stay_ordered() {
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
fn duplicate_chain_is_kept_once() {
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
fn errors_reach_guest_by_default() {
    let dir = tempfile::tempdir().unwrap();
    let path = raw(&dir, 4 << 20);
    let mut machine = machine(&config(&path));
    File::create(&path).unwrap();
    assert_eq!(machine.read(0, 512).0, 1);
    assert!(machine.heard.events().is_empty());
    assert!(machine.device.counters().contains(&("errors", 1)));
}

#[test]
fn rejects_invalid_kept_requests() {
    let dir = tempfile::tempdir().unwrap();
    let mut machine = machine(&config(&raw(&dir, 4 << 20)));
    let good = SavedDisk::of(&machine.save());
    assert_eq!(good.kept, [Vec::<u16>::new()]);
    for (kept, expected) in [
        (vec![vec![], vec![]], "2 queues have requests to retry"),
        (vec![vec![63, 64]], "the chain to retry at 64"),
        (
            vec![vec![3, 7, 3]],
            "the chain to retry at 3 is listed twice",
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
