use std::fs::{self, File};
use std::path::Path;

use devices::event_loop::EventLoop;
use memory::{AwaitedBlocks, DeviceOps, DirtyBitmap, SpaceKind};

use super::super::Block;
use super::*;
use crate::Transport;
use crate::testing::{
    Heard, TestBuffer, TestGuest, TestQueue, disk_config, transport, wait_idle, workers,
};
use crate::worker::{Running, Workers};

/// A disk, and a guest that has a queue to it.
struct Stage {
    driver: TestQueue,
    transport: Arc<Transport>,
    heard: Heard,
    guest: TestGuest,
    device: Block,
    workers: Workers,
    _event_loop: EventLoop,
}

impl Stage {
    fn new(path: &Path, memory: u64, queue_size: u16) -> Self {
        let (event_loop, workers) = workers();
        let (device, _) = Block::new(&disk_config(path), workers.clone()).unwrap();
        let mut guest = TestGuest::new(memory);
        let (transport, heard) = transport();
        Self {
            driver: TestQueue::new(&mut guest, 0, queue_size),
            transport,
            heard,
            guest,
            device,
            workers,
            _event_loop: event_loop,
        }
    }

    /// The task of the queue, which has not started.
    fn task(&self, state: QueueState) -> BlockTask {
        let queue = self.driver.device_side(&self.transport, state);
        BlockTask::new(queue, &self.device.shared, true).unwrap()
    }
}

/// A kernel that takes no operations for a while, or not at all: each request is answered.
#[test]
fn requests_without_io_uring_complete() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk");
    fs::write(&path, [7; 4096]).unwrap();
    let mut stage = Stage::new(&path, 1 << 20, 16);
    let (header, at) = (stage.guest.put(&[0; 16]), stage.guest.alloc(513));
    let buffer = TestBuffer::new;
    let request = [buffer(header, 16, false), buffer(at, 513, true)];
    let file = Arc::new(File::open(&path).unwrap());
    let mut state = QueueState::default();
    for (name, comes_back, runs) in [
        ("it takes them later", true, true),
        ("it never does", false, true),
        ("it does not when the queue stops", false, false),
    ] {
        stage.guest.write(at, &[0xff; 513]);
        let mut task = stage.task(state);
        task.uring = Some(Uring::disabled(Arc::clone(&file), 16).unwrap());
        let head = stage.driver.send(&request);
        if runs {
            let running = Running::start(&stage.workers, &stage.transport, task);
            std::thread::sleep(RETRY * 3);
            assert_eq!(stage.driver.take_used(), None, "{name}");
            if comes_back {
                running.with(|task| task.uring.as_ref().unwrap().enable().unwrap());
            }
            assert_eq!(stage.driver.wait_used(), (head, 513), "{name}");
            state = running.stop().unwrap().finish().0;
        } else {
            task.take().unwrap();
            assert_eq!(stage.driver.take_used(), None, "{name}");
            state = task.finish().0;
            assert_eq!(stage.driver.take_used(), Some((head, 513)), "{name}");
        }
        assert_eq!(stage.guest.read(at, 512), [7; 512], "{name}");
        assert_eq!(stage.guest.read(at + 512, 1), [0], "{name}");
        assert_eq!(state.next_avail, state.next_used, "{name}");
    }
    assert!(stage.heard.events().is_empty());
}

/// EDK2's driver reads a file of any length by one request. A queue that stops waits for the part
/// in flight, and repeats the request when it starts again.
#[test]
fn long_requests_are_moved_in_parts() {
    const LEN: usize = (72 << 20) + 512;
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk");
    let data: Vec<u8> = (0..LEN).map(|at| (at / 512 % 251) as u8).collect();
    fs::write(&path, &data).unwrap();
    let mut stage = Stage::new(&path, 80 << 20, 16);
    let (header, room, status) = (
        stage.guest.put(&[0; 16]),
        stage.guest.alloc(LEN as u64),
        stage.guest.alloc(1),
    );
    let buffer = TestBuffer::new;
    let file = File::options().read(true).write(true).open(&path).unwrap();
    let file = Arc::new(file);
    let mut state = QueueState::default();
    for (kind, is_read) in [(0_u8, true), (1, false)] {
        stage.guest.write(header, &[kind]);
        let data_at = buffer(room, LEN as u32, is_read);
        let head =
            stage
                .driver
                .send(&[buffer(header, 16, false), data_at, buffer(status, 1, true)]);
        let mut task = stage.task(state);
        task.uring = Some(Uring::disabled(Arc::clone(&file), 16).unwrap());
        task.take().unwrap();
        let load = (32 << 20)..(33 << 20);
        assert!(load.contains(&task.in_flight), "{}", task.in_flight);
        task.uring.as_ref().unwrap().enable().unwrap();
        let (stopped, kept) = task.finish();
        assert_eq!((stage.driver.take_used(), &kept), (None, &vec![head]));

        let mut task = stage.task(stopped);
        task.try_again(kept);
        let running = Running::start(&stage.workers, &stage.transport, task);
        let used = if is_read { LEN as u32 + 1 } else { 1 };
        assert_eq!(stage.driver.wait_used(), (head, used));
        state = running.stop().unwrap().finish().0;
        assert_eq!(stage.guest.read(status, 1), [0]);
        if is_read {
            assert!(stage.guest.read(room, LEN) == data);
            // What is written next differs everywhere.
            let other: Vec<u8> = data.iter().map(|byte| !byte).collect();
            stage.guest.write(room, &other);
        }
    }
    let written = fs::read(&path).unwrap();
    assert!(written.iter().zip(&data).all(|(now, then)| *now == !then));
    assert_eq!(
        stage
            .device
            .shared
            .counters
            .read_ops
            .load(Ordering::Relaxed),
        1
    );
    assert!(stage.heard.events().is_empty());
}

/// A queue that stops waits for all that is in flight: of discards of 1 GiB that is one.
#[test]
fn discards_have_a_weight() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk");
    File::create(&path).unwrap().set_len(2 << 30).unwrap();
    let mut stage = Stage::new(&path, 1 << 20, 16);
    let mut request = vec![11, 0, 0, 0];
    request.extend([0; 12 + 8]);
    request.extend((1_u32 << 21).to_le_bytes());
    request.extend([0; 4]);
    let (header, status) = (stage.guest.put(&request), stage.guest.alloc(1));
    let buffer = TestBuffer::new;
    for _ in 0..8 {
        let head = stage
            .driver
            .describe(&[buffer(header, 32, false), buffer(status, 1, true)]);
        stage.driver.offer(head);
    }
    let mut task = stage.task(QueueState::default());
    let file = File::options().write(true).open(&path).unwrap();
    task.uring = Some(Uring::disabled(Arc::new(file), 16).unwrap());
    task.take().unwrap();
    assert_eq!(task.uring.as_ref().unwrap().in_flight(), 1);
    task.uring.as_ref().unwrap().enable().unwrap();
    assert_eq!(task.finish().0.next_used, 1);
}

/// Requests whose sectors are spread over thousands of descriptors, for which the host keeps memory.
#[test]
fn descriptors_in_flight_are_bounded() {
    const SIZE: u16 = 1024;
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk");
    fs::write(&path, [7; 4096]).unwrap();
    let mut stage = Stage::new(&path, 1 << 20, SIZE);
    let (header, room) = (stage.guest.put(&[0; 16]), stage.guest.alloc(513));
    // A header, a sector and a status; between them buffers of nothing.
    let mut table = Vec::new();
    for next in 1..=SIZE {
        let (addr, len, flags) = match next {
            1 => (header, 16_u32, 1_u16),
            2 => (room, 512, 3),
            SIZE => (room + 512, 1, 2),
            _ => (room, 0, 3),
        };
        table.extend(addr.to_le_bytes());
        table.extend(len.to_le_bytes());
        table.extend(flags.to_le_bytes());
        table.extend(next.to_le_bytes());
    }
    let at = stage.guest.put(&table);
    for head in 0..SIZE {
        stage
            .driver
            .set_descriptor(head, at, table.len() as u32, 4, 0);
        stage.driver.offer(head);
    }
    let mut task = stage.task(QueueState::default());
    let file = Arc::new(File::open(&path).unwrap());
    task.uring = Some(Uring::disabled(file, SIZE).unwrap());
    while task.take().unwrap() {}
    let in_flight = task.uring.as_ref().unwrap().in_flight();
    assert!((1..=64).contains(&in_flight), "{in_flight}");
    task.uring.as_ref().unwrap().enable().unwrap();
    assert_eq!(usize::from(task.finish().0.next_used), in_flight);
}

/// A guest that moves a BAR between any two requests has each of them keep a map of its own.
#[test]
fn maps_in_flight_are_bounded() {
    const SIZE: u16 = 64;
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk");
    fs::write(&path, [7; 4096]).unwrap();
    let mut stage = Stage::new(&path, 1 << 20, SIZE);
    let (header, room) = (stage.guest.put(&[0; 16]), stage.guest.alloc(513));
    let table = [
        TestBuffer::new(header, 16, false),
        TestBuffer::new(room, 513, true),
    ];
    let topology = Arc::clone(&stage.guest.topology);
    let mut topology = topology.lock();
    let mut tx = topology.begin();
    let bar = tx.container("bar", 0x1000).unwrap();
    let device_in_it = tx.device("registers", 0x1000, Arc::new(Registers)).unwrap();
    tx.place(device_in_it, bar, 0, 0).unwrap();
    tx.map(SpaceKind::Memory, 1 << 32, bar, 0).unwrap();
    tx.commit().unwrap();
    let mut task = stage.task(QueueState::default());
    let file = Arc::new(File::open(&path).unwrap());
    task.uring = Some(Uring::disabled(file, SIZE).unwrap());
    let in_flight = |task: &BlockTask| task.uring.as_ref().unwrap().in_flight();
    for step in 0..u64::from(SIZE / 2) {
        let mut tx = topology.begin();
        tx.unplace(bar).unwrap();
        let at = (1 << 32) + step * 0x1000;
        tx.map(SpaceKind::Memory, at, bar, 0).unwrap();
        tx.commit().unwrap();
        stage.driver.send(&table);
        task.take().unwrap();
    }
    assert_eq!(in_flight(&task), MAX_VIEWS);
    // The others follow when these are done, of which all see the same map.
    task.uring.as_ref().unwrap().enable().unwrap();
    while in_flight(&task) > 0 {
        task.uring.as_mut().unwrap().wait().unwrap();
        task.collect().unwrap();
    }
    task.take().unwrap();
    assert_eq!(in_flight(&task), usize::from(SIZE / 2) - MAX_VIEWS);
    assert_eq!(task.finish().0.next_used, SIZE / 2);
}

struct Registers;

impl DeviceOps for Registers {
    fn read(&self, _: u64, _: &mut [u8]) {}
    fn write(&self, _: u64, _: &[u8]) {}
}

/// Requests for blocks that are still at the source of a migration wait, and others do not. A write of whole
/// blocks does not wait, and what comes for its blocks is dropped. A queue that stops keeps what waits.
#[test]
fn requests_wait_for_missing_blocks() {
    const PAGE: usize = 4096;
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk");
    fs::write(&path, [1; 8 * PAGE]).unwrap();
    let (event_loop, workers) = workers();
    let (device, handle) = Block::new(&disk_config(&path), workers.clone()).unwrap();
    let missing = DirtyBitmap::new(8 * PAGE);
    missing.merge(0, &[0b1111_0000]);
    let blocks = AwaitedBlocks::new(8 * PAGE as u64, missing, || {});
    handle.access().await_blocks(Arc::clone(&blocks)).unwrap();
    let mut guest = TestGuest::new(1 << 20);
    let (transport, heard) = transport();
    let mut driver = TestQueue::new(&mut guest, 0, 16);
    let buffer = TestBuffer::new;
    let room = guest.alloc(2 * PAGE as u64 + 1);
    let other = guest.alloc(PAGE as u64 + 1);
    let data = guest.put(&[7; PAGE]);
    let status = room + 2 * PAGE as u64;
    let mut header = |kind: u32, sector: u64| {
        let mut header = kind.to_le_bytes().to_vec();
        header.extend([0; 4]);
        header.extend(sector.to_le_bytes());
        guest.put(&header)
    };
    let (read_present, read_missing) = (header(0, 16), header(0, 24));
    let (write_whole, write_part) = (header(1, 48), header(1, 57));
    let answer = |at| buffer(at, 1, true);
    let queue = driver.device_side(&transport, QueueState::default());
    let task = BlockTask::new(queue, &device.shared, true).unwrap();
    let running = Running::start(&workers, &transport, task);
    // Pages 3 and 4, of which the second is missing; a part of page 7; then page 2, and all of page 6.
    let waits = driver.send(&[
        buffer(read_missing, 16, false),
        buffer(room, 2 * PAGE as u32, true),
        answer(status),
    ]);
    let part = write_from(&mut driver, write_part, data, 512, status);
    let free = driver.send(&[
        buffer(read_present, 16, false),
        buffer(other, PAGE as u32, true),
        answer(other + PAGE as u64),
    ]);
    assert_eq!(driver.wait_used().0, free);
    let whole = write_from(&mut driver, write_whole, data, PAGE as u32, status);
    assert_eq!(driver.wait_used().0, whole);
    wait_idle(&event_loop);
    assert_eq!((driver.take_used(), blocks.left()), (None, 3));
    assert_eq!(blocks.take_requests(), [4, 7]);
    // The queue stops and starts: nothing is lost.
    let (state, kept) = running.stop().unwrap().finish();
    assert_eq!(kept, [waits, part]);
    let queue = driver.device_side(&transport, state);
    let mut task = BlockTask::new(queue, &device.shared, true).unwrap();
    task.try_again(kept);
    let running = Running::start(&workers, &transport, task);
    wait_idle(&event_loop);
    assert_eq!(driver.take_used(), None);
    let access = handle.access();
    for (page, byte) in [(6, 5), (4, 4), (7, 3)] {
        for claim in blocks.begin_fill(page, 1) {
            access
                .write_arrived((page * PAGE) as u64, &[byte; PAGE])
                .unwrap();
            drop(claim.done());
        }
    }
    let mut used = [driver.wait_used().0, driver.wait_used().0];
    used.sort_unstable();
    assert_eq!(used, [waits, part]);
    let read = guest.read(room, 2 * PAGE);
    assert!(read[..PAGE] == [1; PAGE] && read[PAGE..] == [4; PAGE]);
    drop(running.stop().unwrap().finish());
    let written = fs::read(&path).unwrap();
    let page = |page: usize| &written[page * PAGE..(page + 1) * PAGE];
    assert!(page(6) == [7; PAGE], "what the guest wrote stays");
    assert!(page(7)[..512] == [3; 512] && page(7)[512..1024] == [7; 512]);
    assert!(page(7)[1024..] == [3; PAGE - 1024]);
    // Page 5 is missing still.
    assert_eq!(blocks.left(), 1);
    assert!(heard.events().is_empty());
}

fn write_from(driver: &mut TestQueue, header: u64, data: u64, len: u32, status: u64) -> u16 {
    driver.send(&[
        TestBuffer::new(header, 16, false),
        TestBuffer::new(data, len, false),
        TestBuffer::new(status, 1, true),
    ])
}
