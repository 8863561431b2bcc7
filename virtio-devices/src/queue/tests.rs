//! Turns: what a guest can have a task do before others have theirs.

use super::*;
use crate::limits::{TURN_BYTES, TURN_DESCRIPTORS};
use crate::testing::{TestGuest, TestQueue, transport};

const SIZE: u16 = 256;
const INDIRECT: u16 = 4;

/// A guest that has made 64 chains available, each of a whole indirect table of empty buffers.
fn long_chains() -> (TestGuest, TestQueue, Queue) {
    let mut guest = TestGuest::new(1 << 20);
    let (transport, _) = transport();
    let mut driver = TestQueue::new(&mut guest, 0, SIZE);
    let mut table = Vec::new();
    for next in 1..=SIZE {
        table.extend(0x4000_u64.to_le_bytes());
        table.extend([0; 4]);
        table.extend(u16::from(next < SIZE).to_le_bytes());
        table.extend(next.to_le_bytes());
    }
    let at = guest.put(&table);
    for head in 0..64 {
        driver.set_descriptor(head, at, table.len() as u32, INDIRECT, 0);
        driver.offer(head);
    }
    let queue = driver.device_side(&transport, QueueState::default());
    (guest, driver, queue)
}

/// How many chains of so many bytes a turn serves, and what the task wants then.
fn turn(queue: &mut Queue, bytes: u64) -> (usize, TaskFlow) {
    let mut served = 0;
    let flow = queue.turn(Budget::new(64), |queue, chain| {
        served += 1;
        queue.push(chain.head(), 0)?;
        Ok(Served::Bytes(bytes))
    });
    (served, flow.unwrap())
}

#[test]
fn turn_is_bounded_in_descriptors() {
    let (_guest, _driver, mut queue) = long_chains();
    let most = TURN_DESCRIPTORS / usize::from(SIZE);
    assert_eq!(turn(&mut queue, 0), (most, TaskFlow::Again));
}

#[test]
fn turn_is_bounded_in_bytes() {
    let mut guest = TestGuest::new(1 << 20);
    let (transport, _) = transport();
    let mut driver = TestQueue::new(&mut guest, 0, SIZE);
    for head in 0..8 {
        driver.set_descriptor(head, 0x4000, 8, 2, 0);
        driver.offer(head);
    }
    let mut queue = driver.device_side(&transport, QueueState::default());
    assert_eq!(turn(&mut queue, TURN_BYTES / 3), (4, TaskFlow::Again));
    assert_eq!(turn(&mut queue, 0), (4, TaskFlow::Wait));
}

/// The task puts a chain back that it cannot serve yet, and waits for more than a kick.
#[test]
fn turn_ends_with_a_chain_that_has_to_wait() {
    let (_guest, _driver, mut queue) = long_chains();
    let flow = queue.turn(Budget::new(64), |_, _| Ok(Served::NotYet));
    assert_eq!(flow.unwrap(), TaskFlow::Wait);
    assert_eq!(queue.state(), QueueState::default());
}
