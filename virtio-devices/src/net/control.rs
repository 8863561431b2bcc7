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
use crate::queue::{Budget, Chain, Queue, QueueError, QueueState, Served};
use crate::worker::{QueueTask, TaskEvent, TaskFlow, TaskSources};

/// Commands of one turn: each may be a call of the host for every queue of the tap.
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

impl Commands {
    fn obey(&self, chain: &Chain) -> Result<bool, QueueError> {
        let mut head = [0; 2];
        chain.read(0, &mut head)?;
        let [class, command] = head.map(u32::from);
        Ok(match (class, command) {
            (VIRTIO_NET_CTRL_ANNOUNCE, VIRTIO_NET_CTRL_ANNOUNCE_ACK) => {
                self.shared.announce.store(false, Ordering::Release);
                true
            }
            (VIRTIO_NET_CTRL_MQ, VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET) => {
                let mut pairs = [0; 2];
                chain.read(2, &mut pairs)?;
                let pairs = u16::from_le_bytes(pairs);
                let there = pairs > 0 && usize::from(pairs) <= self.shared.taps.len();
                if there {
                    self.shared.set_pairs(pairs);
                }
                there
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
                negotiated && self.shared.set_offloads(offloads(wanted))
            }
            _ => false,
        })
    }
}

impl QueueTask for ControlQueue {
    fn watch(&mut self, sources: &mut TaskSources<'_, '_>) -> io::Result<()> {
        sources.watch(Arc::clone(self.queue.kick()), 0, Interest::Read)
    }

    fn call(&mut self, _: TaskEvent, _: &mut TaskSources<'_, '_>) -> Result<TaskFlow, QueueError> {
        let Self { queue, commands } = self;
        queue.turn(Budget::new(CHAINS), |queue, chain| {
            let answer = match commands.obey(&chain)? {
                true => VIRTIO_NET_OK,
                false => VIRTIO_NET_ERR,
            };
            // `ack` is the first byte that the device writes (5.1.6.5). Behind it a driver may have room
            // for a result, which no command here has.
            chain.write(0, &[answer as u8])?;
            queue.push(chain.head(), 1)?;
            Ok(Served::Bytes(0))
        })
    }
}
