//! The queue for control (virtio 1.3, 5.1.6.5).

use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use devices::event_loop::Interest;
use virtio_bindings::virtio_net::{
    VIRTIO_NET_CTRL_ANNOUNCE, VIRTIO_NET_CTRL_ANNOUNCE_ACK, VIRTIO_NET_CTRL_GUEST_OFFLOADS,
    VIRTIO_NET_CTRL_GUEST_OFFLOADS_SET, VIRTIO_NET_CTRL_MQ, VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET,
    VIRTIO_NET_ERR, VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_ECN, VIRTIO_NET_F_GUEST_TSO4,
    VIRTIO_NET_F_GUEST_TSO6, VIRTIO_NET_OK,
};

use super::Shared;
use crate::limits::TURN_BYTES;
use crate::queue::{Budget, Chain, Queue, QueueError, QueueState, Served};
use crate::worker::{QueueTask, TaskEvent, TaskFlow, TaskSources};

/// Commands of one turn.
const CHAINS: usize = 16;

/// `TUN_F_*`: what the reader of a tap understands.
const TUN_F_CSUM: u32 = 0x01;
const TUN_F_TSO4: u32 = 0x02;
const TUN_F_TSO6: u32 = 0x04;
const TUN_F_TSO_ECN: u32 = 0x08;
pub(super) const ALL_OFFLOADS: u32 = TUN_F_CSUM | TUN_F_TSO4 | TUN_F_TSO6 | TUN_F_TSO_ECN;

/// Returns the offloads that a guest with these features accepts.
pub(super) fn offloads(features: u64) -> u32 {
    let pairs = [
        (VIRTIO_NET_F_GUEST_CSUM, TUN_F_CSUM),
        (VIRTIO_NET_F_GUEST_TSO4, TUN_F_TSO4),
        (VIRTIO_NET_F_GUEST_TSO6, TUN_F_TSO6),
        (VIRTIO_NET_F_GUEST_ECN, TUN_F_TSO_ECN),
    ];
    let has = |bit: u32| features & 1 << bit != 0;
    let wanted = pairs.into_iter().filter(|(bit, _)| has(*bit));
    let flags = wanted.fold(0, |all, (_, flag)| all | flag);
    // The kernel refuses segmentation offloads without TUN_F_CSUM.
    if flags & TUN_F_CSUM == 0 { 0 } else { flags }
}

/// Serves the queue for control.
pub(super) struct ControlQueue {
    queue: Queue,
    commands: Commands,
}

impl ControlQueue {
    pub(super) fn new(queue: Queue, shared: &Arc<Shared>) -> Self {
        let shared = Arc::clone(shared);
        Self {
            queue,
            commands: Commands { shared },
        }
    }

    pub(super) fn state(&self) -> QueueState {
        self.queue.state()
    }
}

/// The commands that the driver can give.
struct Commands {
    shared: Arc<Shared>,
}

/// The part of a turn's budget that a command takes which sets the tap: all of it. The command may be a
/// call of the host for every queue of the tap, and each call may wait for all CPUs of the host.
const SETS_TAP: u64 = TURN_BYTES;

impl Commands {
    /// Does what a command asks for. Returns whether it was done, and what it costs of a turn's budget.
    fn obey(&self, chain: &Chain) -> Result<(bool, u64), QueueError> {
        let mut head = [0; 2];
        chain.read(0, &mut head)?;
        let [class, command] = head.map(u32::from);
        Ok(match (class, command) {
            (VIRTIO_NET_CTRL_ANNOUNCE, VIRTIO_NET_CTRL_ANNOUNCE_ACK) => {
                self.shared.announce.store(false, Ordering::Release);
                (true, 0)
            }
            (VIRTIO_NET_CTRL_MQ, VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET) => {
                let mut pairs = [0; 2];
                chain.read(2, &mut pairs)?;
                let pairs = u16::from_le_bytes(pairs);
                let there = pairs > 0 && usize::from(pairs) <= self.shared.taps.len();
                if there {
                    self.shared.set_pairs(pairs);
                }
                (there, SETS_TAP)
            }
            (VIRTIO_NET_CTRL_GUEST_OFFLOADS, VIRTIO_NET_CTRL_GUEST_OFFLOADS_SET) => {
                let mut wanted = [0; 8];
                chain.read(2, &mut wanted)?;
                let wanted = u64::from_le_bytes(wanted);
                let driver = self.shared.driver.lock();
                let negotiated = driver
                    .as_ref()
                    .is_some_and(|(_, features)| wanted & !features == 0);
                // `set_offloads` calls the host: the lock, which announcements need,
                // is not held meanwhile.
                drop(driver);
                let set = negotiated && self.shared.set_offloads(offloads(wanted));
                (set, SETS_TAP)
            }
            _ => (false, 0),
        })
    }
}

impl QueueTask for ControlQueue {
    fn watch(&mut self, sources: &mut TaskSources<'_, '_>) -> io::Result<()> {
        sources.watch(Arc::clone(self.queue.kick()), 0, Interest::Read)
    }

    fn call(&mut self, _: TaskEvent, _: &mut TaskSources<'_, '_>) -> Result<TaskFlow, QueueError> {
        self.turn()
    }
}

impl ControlQueue {
    fn turn(&mut self) -> Result<TaskFlow, QueueError> {
        let Self { queue, commands } = self;
        queue.turn(Budget::new(CHAINS), |queue, chain| {
            let (done, cost) = commands.obey(&chain)?;
            let answer = match done {
                true => VIRTIO_NET_OK,
                false => VIRTIO_NET_ERR,
            };
            // `ack` is the first byte that the device writes (5.1.6.5). Behind it a driver may have room
            // for a result, which no command here has.
            chain.write(0, &[answer as u8])?;
            queue.push(chain.head(), 1)?;
            Ok(Served::Bytes(cost))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::super::tap::Tap;
    use super::*;
    use crate::rate_limiter::RateLimits;
    use crate::testing::{TestBuffer, TestGuest, TestQueue, transport};

    /// Wants `/dev/net/tun` and CAP_NET_ADMIN.
    #[test]
    fn command_that_sets_the_tap_is_a_turn() {
        let taps = Tap::open("wbctrl%d", 2).unwrap();
        let shared = Arc::new(Shared::new(taps, [0; 6], RateLimits::default()));
        let mut guest = TestGuest::new(1 << 20);
        let (transport, _) = transport();
        let mut driver = TestQueue::new(&mut guest, 0, 16);
        let ack = guest.alloc(1);
        let set_pairs = [VIRTIO_NET_CTRL_MQ, VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET].map(|n| n as u8);
        let mut send = |driver: &mut TestQueue, command: &[u8]| {
            let at = guest.put(command);
            let len = command.len() as u32;
            driver.send(&[
                TestBuffer::new(at, len, false),
                TestBuffer::new(ack, 1, true),
            ]);
        };
        for pairs in [2, 1, 2] {
            send(&mut driver, &[set_pairs[0], set_pairs[1], pairs, 0]);
        }
        // Unknown commands cost nothing.
        (0..3).for_each(|_| send(&mut driver, &[0xff, 0]));
        let queue = driver.device_side(&transport, QueueState::default());
        let mut task = ControlQueue::new(queue, &shared);
        for (answered, flow) in [
            (1, TaskFlow::Again),
            (1, TaskFlow::Again),
            (1, TaskFlow::Again),
            (3, TaskFlow::Wait),
        ] {
            assert_eq!(task.turn().unwrap(), flow);
            for _ in 0..answered {
                assert!(driver.take_used().is_some());
            }
            assert_eq!(driver.take_used(), None);
        }
        assert_eq!(shared.pairs.load(Ordering::Relaxed), 2);
    }
}
