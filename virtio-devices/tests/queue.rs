//! Queues, with a driver of ours at the other end that need not keep to the rules.

#![allow(clippy::unwrap_used, clippy::panic, reason = "tests")]

use std::sync::Arc;
use std::sync::mpsc;

use devices::event_loop::Interest;
use memory::{DeviceOps, RamBlock, RamConfig, RamSlice, SpaceKind};
use proptest::prelude::*;
use virtio_devices::testing::{
    PATIENCE, TestBuffer, TestGuest, TestQueue, transport, wait_idle, workers,
};
use virtio_devices::{
    Queue, QueueError, QueueSetup, QueueState, QueueTask, Rings, Running, TaskEvent, TaskFlow,
    TaskSources, TransportEvent,
};

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;

fn buffer(addr: u64, len: u32, writable: bool) -> TestBuffer {
    TestBuffer {
        addr,
        len,
        writable,
    }
}

#[test]
fn chain_spans_its_buffers() {
    let mut guest = TestGuest::new(1 << 20);
    let (transport, heard) = transport();
    let mut driver = TestQueue::new(&mut guest, 3, 8);
    let mut queue = driver.device_side(&transport, QueueState::default());
    assert!(queue.pop().unwrap().is_none());

    let (first, second) = (guest.put(b"hello, "), guest.put(b"guest"));
    let (third, fourth) = (guest.alloc(3), guest.alloc(9));
    let head = driver.send(&[
        buffer(first, 7, false),
        buffer(second, 5, false),
        buffer(third, 3, true),
        buffer(fourth, 9, true),
    ]);
    let chain = queue.pop().unwrap().unwrap();
    assert_eq!(
        (chain.head(), chain.readable_len(), chain.writable_len()),
        (head, 12, 12)
    );
    let mut text = [0; 8];
    chain.read(4, &mut text).unwrap();
    assert_eq!(&text, b"o, guest");
    chain.read(5, &mut text).unwrap_err();
    chain.write(1, b"answer").unwrap();
    assert_eq!(guest.read(third, 3), b"\0an");
    assert_eq!(guest.read(fourth, 9), b"swer\0\0\0\0\0");
    chain.write(12, b"").unwrap();
    chain.write(12, b"!").unwrap_err();

    queue.push(chain.head(), 7).unwrap();
    queue.notify().unwrap();
    assert_eq!(driver.take_used(), Some((head, 7)));
    assert_eq!(heard.raised(3), 1);
    assert_eq!(
        queue.state(),
        QueueState {
            next_avail: 1,
            next_used: 1
        }
    );
}

#[test]
fn device_writes_mark_pages_dirty() {
    let mut guest = TestGuest::new(1 << 20);
    let (transport, _) = transport();
    let mut driver = TestQueue::new(&mut guest, 0, 8);
    let mut queue = driver.device_side(&transport, QueueState::default());
    driver.send(&[buffer(0x40_000, 0x3000, true)]);
    let chain = queue.pop().unwrap().unwrap();
    guest.ram.dirty().set_enabled(true);
    chain.write(0, b"x").unwrap();
    chain.mark_written(0x1800, 0x1000).unwrap();
    for (page, dirty) in [
        (0x40_000, true),
        (0x41_000, true),
        (0x42_000, true),
        (0x43_000, false),
    ] {
        assert_eq!(guest.ram.dirty().is_dirty(page), dirty, "{page:#x}");
    }
}

#[test]
fn respects_interrupt_suppression() {
    let mut guest = TestGuest::new(1 << 20);
    let (transport, heard) = transport();
    let mut driver = TestQueue::new(&mut guest, 0, 8);
    let mut queue = driver.device_side(&transport, QueueState::default());
    guest.write(driver.rings.available, &1_u16.to_le_bytes());
    driver.send(&[buffer(0x4000, 1, true)]);
    let chain = queue.pop().unwrap().unwrap();
    queue.push(chain.head(), 0).unwrap();
    queue.notify().unwrap();
    assert_eq!(heard.raised(0), 0);
    guest.write(driver.rings.available, &0_u16.to_le_bytes());
    queue.notify().unwrap();
    assert_eq!(heard.raised(0), 0, "there is nothing new to tell");
    queue.push(chain.head(), 0).unwrap();
    queue.notify().unwrap();
    assert_eq!(heard.raised(0), 1);
}

/// Each breaks the rules in its own way.
#[test]
fn rejects_invalid_chains() {
    /// Index, address, length, flags and next of a descriptor.
    type Raw = (u16, u64, u32, u16, u16);
    let cases: [(&str, &[Raw]); 7] = [
        ("loop", &[(0, 0x4000, 8, NEXT, 1), (1, 0x4000, 8, NEXT, 0)]),
        ("index past the table", &[(0, 0x4000, 8, NEXT, 8)]),
        ("not RAM", &[(0, 1 << 40, 8, 0, 0)]),
        ("past the end of RAM", &[(0, (1 << 20) - 4, 8, 0, 0)]),
        ("address space's end", &[(0, u64::MAX - 3, 8, 0, 0)]),
        (
            "readable behind writable",
            &[(0, 0x4000, 8, NEXT | WRITE, 1), (1, 0x4000, 8, 0, 0)],
        ),
        (
            "over 4 GiB",
            &[(0, 0, u32::MAX, NEXT, 1), (1, 0, u32::MAX, 0, 0)],
        ),
    ];
    for (name, descriptors) in cases {
        let mut guest = TestGuest::new(1 << 20);
        let (transport, _) = transport();
        let mut driver = TestQueue::new(&mut guest, 0, 8);
        let mut queue = driver.device_side(&transport, QueueState::default());
        for (index, addr, len, flags, next) in descriptors {
            driver.set_descriptor(*index, *addr, *len, *flags, *next);
        }
        driver.offer(0);
        // So are those that are said to have been popped.
        for refused in [queue.again(0), queue.pop().map(Option::unwrap)] {
            let refused = refused.expect_err(name);
            assert!(
                matches!(refused, QueueError::Chain { head: 0, .. }),
                "{name}: {refused}"
            );
        }
    }
}

#[test]
fn rejects_nested_indirect_table() {
    let mut guest = TestGuest::new(1 << 20);
    let (transport, _) = transport();
    let mut driver = TestQueue::new(&mut guest, 0, 8);
    let mut queue = driver.device_side(&transport, QueueState::default());
    let entry = |addr: u64, len: u32, flags: u16, next: u16| {
        let mut raw = addr.to_le_bytes().to_vec();
        raw.extend(len.to_le_bytes());
        raw.extend(flags.to_le_bytes());
        raw.extend(next.to_le_bytes());
        raw
    };
    let mut table = entry(0x4000, 8, NEXT, 1);
    table.extend(entry(0x5000, 24, WRITE, 0));
    let good = guest.put(&table);
    driver.set_descriptor(0, good, 32, INDIRECT, 0);
    driver.offer(0);
    let chain = queue.pop().unwrap().unwrap();
    assert_eq!((chain.readable_len(), chain.writable_len()), (8, 24));
    let again = queue.again(0).unwrap();
    assert_eq!(again.head(), 0);
    assert_eq!((again.readable_len(), again.writable_len()), (8, 24));
    queue.again(8).unwrap_err();

    let nested = guest.put(&entry(good, 32, INDIRECT, 0));
    driver.set_descriptor(1, nested, 16, INDIRECT, 0);
    driver.offer(1);
    queue.again(1).unwrap_err();
    queue.pop().unwrap_err();
}

/// A table may have more entries than the queue (virtio 1.3, 2.7.5.3.1), but not in one chain.
#[test]
fn chain_longer_than_its_queue_is_refused() {
    for (len, fits) in [(8_u16, true), (9, false), (4096, false)] {
        let mut guest = TestGuest::new(1 << 20);
        let (transport, _) = transport();
        let mut driver = TestQueue::new(&mut guest, 0, 8);
        let mut queue = driver.device_side(&transport, QueueState::default());
        let mut table = Vec::new();
        for next in 1..=len {
            table.extend(0x4000_u64.to_le_bytes());
            table.extend(0_u32.to_le_bytes());
            table.extend((if next < len { NEXT } else { 0 }).to_le_bytes());
            table.extend(next.to_le_bytes());
        }
        let at = guest.put(&table);
        driver.set_descriptor(0, at, u32::from(len) * 16, INDIRECT, 0);
        driver.offer(0);
        for chain in [queue.again(0), queue.pop().map(Option::unwrap)] {
            match chain {
                Ok(chain) => assert_eq!((fits, chain.descriptors()), (true, usize::from(len))),
                Err(refused) => {
                    assert!(!fits, "{len}: {refused}");
                    assert!(refused.to_string().contains("longer than"), "{refused}");
                }
            }
        }
    }
}

/// A driver that takes back what it made available: without an end, "there is more" would have the
/// task called for ever.
#[test]
fn retracted_index_breaks_the_queue() {
    let mut guest = TestGuest::new(1 << 20);
    let (transport, _) = transport();
    let mut driver = TestQueue::new(&mut guest, 0, 8);
    let mut queue = driver.device_side(&transport, QueueState::default());
    driver.send(&[buffer(0x4000, 1, true)]);
    queue.pop().unwrap().unwrap();
    assert!(!queue.enable_kicks().unwrap());
    guest.write(driver.rings.available + 2, &0_u16.to_le_bytes());
    let refused = queue.enable_kicks().unwrap_err();
    assert!(matches!(refused, QueueError::Available { queue: 0, .. }));
}

#[test]
fn popped_chain_is_found_again() {
    let mut guest = TestGuest::new(1 << 20);
    let (transport, _) = transport();
    let mut driver = TestQueue::new(&mut guest, 0, 4);
    let mut queue = driver.device_side(&transport, QueueState::default());
    let text = guest.put(b"first");
    let first = driver.send(&[buffer(text, 5, false)]);
    assert_eq!(queue.pop().unwrap().unwrap().head(), first);
    let other = driver.describe(&[buffer(text, 1, false)]);
    for _ in 0..4 {
        driver.offer(other);
        assert_eq!(queue.pop().unwrap().unwrap().head(), other);
    }
    let mut queue = driver.device_side(&transport, queue.state());
    let chain = queue.again(first).unwrap();
    let mut read = [0; 5];
    chain.read(0, &mut read).unwrap();
    assert_eq!((chain.head(), &read), (first, b"first"));
    assert!(queue.pop().unwrap().is_none());
}

#[test]
fn too_many_available_chains_are_refused() {
    let mut guest = TestGuest::new(1 << 20);
    let (transport, _) = transport();
    let driver = TestQueue::new(&mut guest, 0, 8);
    let mut queue = driver.device_side(&transport, QueueState::default());
    guest.write(driver.rings.available + 2, &9_u16.to_le_bytes());
    let refused = queue.pop().unwrap_err();
    assert!(
        matches!(refused, QueueError::Available { queue: 0, .. }),
        "{refused}"
    );
}

#[test]
fn rejects_invalid_rings() {
    let mut guest = TestGuest::new(1 << 20);
    let (transport, _) = transport();
    let good = TestQueue::new(&mut guest, 0, 8).rings;
    let cases = [
        ("size 0", Rings { size: 0, ..good }),
        ("size 6", Rings { size: 6, ..good }),
        ("size 8192", Rings { size: 8192, ..good }),
        (
            "descriptors outside",
            Rings {
                descriptors: 1 << 40,
                ..good
            },
        ),
        (
            "descriptors across the end",
            Rings {
                descriptors: (1 << 20) - 16,
                ..good
            },
        ),
        (
            "available wraps",
            Rings {
                available: u64::MAX - 1,
                ..good
            },
        ),
        (
            "descriptors unaligned",
            Rings {
                descriptors: good.descriptors + 8,
                ..good
            },
        ),
        (
            "available unaligned",
            Rings {
                available: good.available + 1,
                ..good
            },
        ),
        (
            "used unaligned",
            Rings {
                used: good.used + 2,
                ..good
            },
        ),
    ];
    let kick = TestQueue::new(&mut guest, 0, 8).kick;
    for (name, rings) in cases {
        let setup = QueueSetup {
            index: 0,
            rings,
            state: QueueState::default(),
            event_idx: true,
            space: guest.space(),
            kick: Arc::clone(&kick),
            transport: Arc::clone(&transport),
        };
        assert!(Queue::new(setup).is_err(), "{name}");
    }
}

/// Rings follow a commit that moves their RAM; a commit that removes it breaks the queue.
#[test]
fn a_queue_follows_the_map() {
    let mut guest = TestGuest::new(1 << 20);
    let (transport, _) = transport();
    let mut driver = TestQueue::new(&mut guest, 0, 8);
    let mut queue = driver.device_side(&transport, QueueState::default());
    let other = Arc::new(RamBlock::new(&RamConfig::anonymous(1 << 20)).unwrap());
    let mut topology = guest.topology.lock();
    let mut tx = topology.begin();
    let block = Arc::clone(&other);
    let region = tx
        .ram("other", RamSlice { block, offset: 0 }, 1 << 20)
        .unwrap();
    tx.map(SpaceKind::Memory, 0, region, 1).unwrap();
    tx.commit().unwrap();
    drop(topology);
    // The same addresses are other memory now, and the driver offers a chain there.
    driver.send(&[buffer(0x4000, 1, true)]);
    let chain = queue.pop().unwrap().unwrap();
    chain.write(0, b"n").unwrap();
    assert_eq!(guest.read(0x4000, 1), b"n");

    // The rings are device registers now: no place for rings.
    struct Registers;
    impl DeviceOps for Registers {
        fn read(&self, _: u64, _: &mut [u8]) {}
        fn write(&self, _: u64, _: &[u8]) {}
    }
    let mut topology = guest.topology.lock();
    let mut tx = topology.begin();
    let registers = tx
        .device("registers", 1 << 20, Arc::new(Registers))
        .unwrap();
    tx.map(SpaceKind::Memory, 0, registers, 2).unwrap();
    tx.commit().unwrap();
    drop(topology);
    let refused = queue.pop().unwrap_err();
    assert!(matches!(refused, QueueError::Rings { queue: 0, .. }));
    assert!(queue.push(0, 1).is_err());
    // What was popped before keeps its memory.
    chain.write(0, b"m").unwrap();
}

/// Uses each chain as it comes, and writes into it how often it was called.
struct Stamp {
    queue: Queue,
    calls: mpsc::Sender<TaskEvent>,
}

impl QueueTask for Stamp {
    fn watch(&mut self, sources: &mut TaskSources<'_, '_>) -> std::io::Result<()> {
        sources.watch(Arc::clone(self.queue.kick()), 1, Interest::Read)
    }

    fn call(
        &mut self,
        event: TaskEvent,
        _: &mut TaskSources<'_, '_>,
    ) -> Result<TaskFlow, QueueError> {
        let _ = self.calls.send(event);
        let _ = self.queue.kick().read();
        // One at a time, so that the loop must come back.
        let Some(chain) = self.queue.pop()? else {
            return Ok(TaskFlow::Wait);
        };
        chain.write(0, b"stamp")?;
        self.queue.push(chain.head(), 5)?;
        self.queue.notify()?;
        Ok(TaskFlow::Again)
    }
}

#[test]
fn task_resumes_where_it_stopped() {
    let mut guest = TestGuest::new(1 << 20);
    let (transport, _) = transport();
    let (_event_loop, workers) = workers();
    let mut driver = TestQueue::new(&mut guest, 0, 64);
    let mut state = QueueState::default();
    for round in 0..50 {
        // Some chains come while the queue is stopped, some while it runs.
        for _ in 0..3 {
            let head = driver.describe(&[buffer(0x4000, 8, true)]);
            driver.offer(head);
        }
        let (calls, _heard) = mpsc::channel();
        let queue = driver.device_side(&transport, state);
        let running = Running::start(&workers, &transport, Stamp { queue, calls });
        for _ in 0..5 {
            driver.send(&[buffer(0x4000, 8, true)]);
        }
        for _ in 0..8 {
            assert_eq!(driver.wait_used().1, 5, "round {round}");
        }
        let stopped = running.stop().unwrap();
        state = stopped.queue.state();
        drop(stopped);
        driver.kick.write(1).unwrap();
        assert_eq!(driver.take_used(), None);
    }
}

#[test]
fn task_of_broken_queue_ends() {
    let mut guest = TestGuest::new(1 << 20);
    let (transport, heard) = transport();
    let (_event_loop, workers) = workers();
    let mut driver = TestQueue::new(&mut guest, 0, 8);
    let (calls, called) = mpsc::channel();
    let queue = driver.device_side(&transport, QueueState::default());
    let running = Running::start(&workers, &transport, Stamp { queue, calls });
    assert_eq!(called.recv_timeout(PATIENCE).unwrap(), TaskEvent::Started);
    // Found by the call that tells of its start, if it comes as that one begins, or by the next.
    driver.send(&[buffer(0x4000, 2, true)]); // too short for the stamp
    let from = std::time::Instant::now();
    while heard.events().is_empty() && from.elapsed() < PATIENCE {
        std::thread::yield_now();
    }
    let [TransportEvent::NeedsReset(why)] = &heard.events()[..] else {
        panic!("{:?}", heard.events());
    };
    assert!(why.contains("too short"), "{why}");
    assert_eq!(heard.raised(virtio_devices::testing::CONFIG_VECTOR), 1);
    // It is called no more, and can still be taken.
    driver.send(&[buffer(0x4000, 8, true)]);
    running.wake();
    assert!(running.stop().is_some());
    assert_eq!(driver.take_used(), None);
}

/// One queue of a device breaks the rules; the other has work all the time.
#[test]
fn broken_device_serves_no_other_queue() {
    let mut guest = TestGuest::new(1 << 20);
    let (transport, heard) = transport();
    let (event_loop, workers) = workers();
    let mut drivers = [0, 1].map(|index| TestQueue::new(&mut guest, index, 8));
    let (calls, _called) = mpsc::channel();
    let _running = [0, 1].map(|index| {
        let queue = drivers[index].device_side(&transport, QueueState::default());
        let calls = calls.clone();
        Running::start(&workers, &transport, Stamp { queue, calls })
    });
    drivers[1].send(&[buffer(0x4000, 8, true)]);
    assert_eq!(drivers[1].wait_used().1, 5);
    drivers[0].send(&[buffer(0x4000, 2, true)]); // too short for the stamp
    let from = std::time::Instant::now();
    while heard.events().is_empty() && from.elapsed() < PATIENCE {
        std::thread::yield_now();
    }
    assert!(matches!(
        &heard.events()[..],
        [TransportEvent::NeedsReset(_)]
    ));
    drivers[1].send(&[buffer(0x4000, 8, true)]);
    wait_idle(&event_loop);
    assert_eq!(drivers[1].take_used(), None);
}

proptest! {
    /// Whatever is in the rings: an answer or an error, and no access outside RAM.
    #[test]
    fn any_rings_are_answered(
        descriptors in prop::collection::vec((any::<u16>(), 0_u64..1 << 21, 0_u32..1 << 20, 0_u16..8, 0_u16..10), 1..16),
        available in prop::collection::vec(0_u16..10, 1..12),
    ) {
        let mut guest = TestGuest::new(1 << 20);
        let (transport, _) = transport();
        let mut driver = TestQueue::new(&mut guest, 0, 8);
        let mut queue = driver.device_side(&transport, QueueState::default());
        for (index, addr, len, flags, next) in descriptors {
            driver.set_descriptor(index % 8, addr, len, flags, next);
        }
        for head in available {
            driver.offer(head);
            if let Ok(Some(chain)) = queue.pop() {
                prop_assert!(chain.readable_len() + chain.writable_len() <= u32::MAX as usize);
                let mut data = vec![0; chain.readable_len().min(4096)];
                chain.read(0, &mut data).unwrap();
                let _ = queue.push(chain.head(), 0);
            }
        }
    }
}
