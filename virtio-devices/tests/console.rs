//! Consoles: the test is the guest.

#![allow(clippy::unwrap_used, reason = "tests")]

use std::io::{self, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

use devices::ConsoleInput;
use parking_lot::Mutex;
use state::{Store, Writer};
use virtio_devices::console::Console;
use virtio_devices::testing::{PATIENCE, TestBuffer, TestGuest, TestQueue, transport, workers};
use virtio_devices::{QueueState, VirtioDevice};

#[derive(Clone, Default)]
struct Paper(Arc<Mutex<Vec<u8>>>);

impl Write for Paper {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().extend(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn buffer(addr: u64, len: u32, writable: bool) -> TestBuffer {
    TestBuffer {
        addr,
        len,
        writable,
    }
}

#[test]
fn console_transfers_both_ways() {
    let (_event_loop, workers) = workers();
    let (paper, rooms) = (Paper::default(), Arc::new(AtomicUsize::new(0)));
    let told = Arc::clone(&rooms);
    let (mut device, handle) = Console::new(
        Box::new(paper.clone()),
        move || {
            told.fetch_add(1, Ordering::SeqCst);
        },
        workers,
    );
    let mut guest = TestGuest::new(1 << 20);
    let (transport, heard) = transport();
    let mut queues = [0, 1].map(|index| TestQueue::new(&mut guest, index, 16));
    // The guest has no buffers yet: input stays with its source.
    assert_eq!((handle.room(), handle.receive(b"early ")), (0, 0));
    device.activate(0, &transport).unwrap();
    for queue in &queues {
        let side = queue.device_side(&transport, QueueState::default());
        device.start_queue(side).unwrap();
    }
    assert_eq!(rooms.load(Ordering::SeqCst), 1, "its driver is ready");
    assert_eq!(handle.receive(b"early "), 6);
    let at = guest.alloc(64);
    queues[0].send(&[buffer(at, 64, true)]);
    assert_eq!(queues[0].wait_used().1, 6);
    assert_eq!(guest.read(at, 6), b"early ");
    let from = Instant::now();
    while rooms.load(Ordering::SeqCst) == 1 {
        assert!(from.elapsed() < PATIENCE);
    }
    // Two buffers for what is longer than one.
    queues[0].send(&[buffer(at, 4, true)]);
    assert_eq!(handle.receive(b"bird"), 4);
    queues[0].wait_used();
    assert_eq!(guest.read(at, 4), b"bird");

    let (first, second) = (guest.put(b"from "), guest.put(&[b'x'; 10_000]));
    queues[1].send(&[buffer(first, 5, false), buffer(second, 10_000, false)]);
    queues[1].wait_used();
    let seen = paper.0.lock().clone();
    assert_eq!((seen.len(), &seen[..6]), (10_005, &b"from x"[..]));

    // What is not read is taken along, and no more is taken than there is room for.
    let room = handle.room();
    assert_eq!(handle.receive(&vec![b'y'; room + 10]), room);
    assert_eq!(handle.room(), 0);
    let states = [0, 1].map(|index| device.stop_queue(index).unwrap());
    let mut writer = Writer::default();
    device.save(&mut writer.scope("console").unwrap()).unwrap();
    let bytes = writer.finish();
    device.reset();
    assert_eq!(handle.room(), 0);
    let mut store = Store::open(&bytes).unwrap();
    device.load(&mut store.scope("console").unwrap()).unwrap();
    assert_eq!(handle.room(), 0);
    device.activate(0, &transport).unwrap();
    for (queue, state) in queues.iter().zip(states) {
        device
            .start_queue(queue.device_side(&transport, state))
            .unwrap();
    }
    queues[0].send(&[buffer(at, 64, true)]);
    assert_eq!(queues[0].wait_used().1, 64);
    assert_eq!(guest.read(at, 64), [b'y'; 64]);
    assert!(heard.events().is_empty());
}

/// One request over the same RAM again and again, of which each turn takes a part: others have their
/// turn in between, and a stop in the middle of it neither loses nor repeats a byte of the next.
#[test]
fn huge_request_is_split() {
    let (event_loop, workers) = workers();
    let paper = Paper::default();
    let (mut device, handle) = Console::new(Box::new(paper.clone()), || {}, workers);
    let mut guest = TestGuest::new(4 << 20);
    let (transport, heard) = transport();
    let mut queues = [0, 1].map(|index| TestQueue::new(&mut guest, index, 256));
    device.activate(0, &transport).unwrap();
    for queue in &queues {
        let side = queue.device_side(&transport, QueueState::default());
        device.start_queue(side).unwrap();
    }
    let data = guest.put(&[b'x'; 1 << 20]);
    let (at, last) = (guest.alloc(16), guest.put(b"end"));
    let endless = queues[1].send(&[buffer(data, 1 << 20, false); 250]);
    let end = queues[1].send(&[buffer(last, 3, false)]);
    // Another task on the loop: the other queue.
    queues[0].send(&[buffer(at, 16, true)]);
    assert_eq!(handle.receive(b"typed"), 5);
    assert_eq!(queues[0].wait_used().1, 5);
    assert!(paper.0.lock().len() < 250 << 20, "nobody else had a turn");
    assert_eq!(queues[1].take_used(), None);

    let state = device.stop_queue(1).unwrap();
    assert_eq!((state.next_avail, state.next_used), (1, 1), "it is done");
    assert_eq!(queues[1].take_used(), Some((endless, 0)));
    let seen = paper.0.lock().len() as u64;
    let count = |device: &Console, name| {
        let counters = device.counters().into_iter();
        counters
            .filter(|(n, _)| *n == name)
            .map(|(_, v)| v)
            .sum::<u64>()
    };
    assert_eq!(count(&device, "bytes_out"), seen);
    assert_eq!(seen + count(&device, "bytes_lost"), 250 << 20);
    let side = queues[1].device_side(&transport, state);
    device.start_queue(side).unwrap();
    assert_eq!(queues[1].wait_used(), (end, 0));
    assert!(paper.0.lock().ends_with(b"xend"));
    assert!(heard.events().is_empty());
    drop((device, event_loop));
}

#[test]
fn empty_buffers_do_not_block_loop() {
    let (_event_loop, workers) = workers();
    let (mut device, handle) = Console::new(Box::new(io::sink()), || {}, workers);
    let mut guest = TestGuest::new(1 << 20);
    let (transport, _heard) = transport();
    let mut queue = TestQueue::new(&mut guest, 0, 256);
    device.activate(0, &transport).unwrap();
    let side = queue.device_side(&transport, QueueState::default());
    device.start_queue(side).unwrap();
    let at = guest.alloc(16);
    for _ in 0..100 {
        queue.send(&[buffer(at, 0, true)]);
    }
    queue.send(&[buffer(at, 16, true)]);
    assert_eq!(handle.receive(b"typed"), 5);
    for _ in 0..100 {
        assert_eq!(queue.wait_used().1, 0);
    }
    assert_eq!(queue.wait_used().1, 5);
}
