//! The work on the queues of frames.

use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use devices::event_loop::Interest;

use super::Shared;
use super::tap::{HEADER_LEN, Tap};
use crate::limits::{MAX_PIECES, TURN_DESCRIPTORS};
use crate::queue::{Budget, Chain, Queue, QueueError, QueueState, Served};
use crate::rate_limiter::Gate;
use crate::worker::{QueueTask, TaskEvent, TaskFlow, TaskSources};

/// Frames of one turn.
const CHAINS: usize = 64;
/// The largest frame, with its header: a segment that the guest or the host cuts up.
const MAX_FRAME: usize = HEADER_LEN + 65_550;
/// Offsets of the flags and of the number of buffers in the header.
const FLAGS: usize = 0;
const NUM_BUFFERS: usize = 10;

const KICK: usize = 0;
const TAP: usize = 1;
const TIMER: usize = 2;

/// Frames to the guest.
pub(super) struct Receive {
    queue: Queue,
    tap: Arc<Tap>,
    shared: Arc<Shared>,
    /// The features that the driver negotiated for frames.
    takes: Takes,
    gate: Gate,
    /// A frame that was read and waits for room, or for its turn. When the queue stops it is lost,
    /// as frames may be.
    frame: Vec<u8>,
    len: usize,
}

/// Features of frames that the driver negotiated.
#[derive(Clone, Copy, Debug)]
pub(super) struct Takes {
    /// A frame may be in several buffers.
    pub(super) mergeable: bool,
    /// A frame may have a checksum that the host has checked, or left out.
    pub(super) checksums: bool,
}

impl Receive {
    pub(super) fn new(
        queue: Queue,
        tap: Arc<Tap>,
        shared: &Arc<Shared>,
        takes: Takes,
    ) -> io::Result<Self> {
        Ok(Self {
            queue,
            tap,
            gate: Gate::new(&shared.rx_limiter)?,
            shared: Arc::clone(shared),
            takes,
            frame: vec![0; MAX_FRAME],
            len: 0,
        })
    }

    pub(super) fn state(&self) -> QueueState {
        self.queue.state()
    }

    /// Moves a frame; false when there is none, or no room for it.
    fn step(&mut self, budget: &mut Budget) -> Result<bool, QueueError> {
        if self.len == 0 {
            match self.tap.read(&mut self.frame) {
                Ok(Some(len)) if len >= HEADER_LEN => self.len = len,
                Ok(Some(_)) => {
                    budget.spend_chain(0);
                    return Ok(true);
                }
                Ok(None) => return Ok(false),
                Err(error) => {
                    // The interface is down, or gone: the guest hears nothing from it.
                    tracing::debug!(%error, "cannot read from a tap");
                    return Ok(false);
                }
            }
        }
        // The limit comes first: a frame that waits for tokens takes none of the driver's buffers.
        if !self.gate.pass(self.len as u64) || !self.deliver(budget)? {
            return Ok(false);
        }
        budget.spend_bytes(self.len as u64);
        self.gate.close();
        self.len = 0;
        Ok(true)
    }

    /// Chains for the frame, of no more than about [`TURN_DESCRIPTORS`] descriptors; `None` when the driver
    /// has not made enough of them available.
    fn room(&mut self, budget: &mut Budget) -> Result<Option<Vec<Chain>>, QueueError> {
        let mut chains: Vec<Chain> = Vec::new();
        let (mut room, mut descriptors) = (0, 0);
        while room < self.len {
            let Some(chain) = self.queue.pop()? else {
                chains.iter().for_each(|_| self.queue.unpop());
                return Ok(None);
            };
            budget.spend_chain(chain.descriptors());
            room += chain.writable_len();
            descriptors += chain.descriptors();
            chains.push(chain);
            // A driver with the smallest buffers that make sense, of 1,526 bytes, needs 43 for the largest
            // frame. Those of a hostile guest may have no room at all.
            if !self.takes.mergeable || descriptors >= TURN_DESCRIPTORS {
                break;
            }
        }
        Ok(Some(chains))
    }

    /// Gives the frame to the driver, or drops it if the driver's buffers are too short; false when
    /// the driver has not made enough room available.
    fn deliver(&mut self, budget: &mut Budget) -> Result<bool, QueueError> {
        let chains = match self.room(budget)? {
            Some(chains) => chains,
            // Room that came meanwhile causes no kick: look once more. Only once, as a driver that
            // makes room and takes it back all the time would keep the loop here.
            None if self.queue.enable_kicks()? => match self.room(budget)? {
                Some(chains) => chains,
                None => return Ok(false),
            },
            None => return Ok(false),
        };
        let counters = &self.shared.counters;
        let room: usize = chains.iter().map(Chain::writable_len).sum();
        if room < self.len {
            // The driver said that its buffers are large enough (5.1.6.3.1).
            counters.rx_drops.fetch_add(1, Ordering::Relaxed);
            chains.iter().for_each(|_| self.queue.unpop());
            return Ok(true);
        }
        let count = u16::try_from(chains.len()).unwrap_or(u16::MAX);
        if let Some(field) = self.frame.get_mut(NUM_BUFFERS..HEADER_LEN) {
            field.copy_from_slice(&count.to_le_bytes());
        }
        if let (false, Some(flags)) = (self.takes.checksums, self.frame.get_mut(FLAGS)) {
            // The tap says that a checksum is known to be right (`DATA_VALID`). A driver that did
            // not negotiate that gets no flags (virtio 1.3, 5.1.6.4.1).
            *flags = 0;
        }
        let mut rest = self.frame.get(..self.len).unwrap_or_default();
        for chain in chains {
            // All chains but the last are filled to their ends: the driver finds the parts of the
            // frame by `num_buffers` alone.
            let (piece, after) = rest.split_at(rest.len().min(chain.writable_len()));
            chain.write(0, piece)?;
            let len = u32::try_from(piece.len()).unwrap_or(u32::MAX);
            self.queue.push(chain.head(), len)?;
            rest = after;
        }
        counters.rx_frames.fetch_add(1, Ordering::Relaxed);
        let bytes = (self.len - HEADER_LEN) as u64;
        counters.rx_bytes.fetch_add(bytes, Ordering::Relaxed);
        Ok(true)
    }
}

impl QueueTask for Receive {
    fn watch(&mut self, sources: &mut TaskSources<'_, '_>) -> io::Result<()> {
        sources.watch(Arc::clone(self.queue.kick()), KICK, Interest::Read)?;
        self.gate.watch(sources, TIMER)?;
        sources.watch(Arc::clone(&self.tap), TAP, Interest::Read)
    }

    fn call(&mut self, _: TaskEvent, _: &mut TaskSources<'_, '_>) -> Result<TaskFlow, QueueError> {
        let _ = self.queue.kick().read();
        self.gate.clear();
        let mut budget = Budget::new(CHAINS);
        let mut flow = TaskFlow::Again;
        while !budget.is_spent() {
            if !self.step(&mut budget)? {
                flow = TaskFlow::Wait;
                break;
            }
        }
        // One interrupt for all frames of the turn.
        self.queue.notify()?;
        Ok(flow)
    }
}

/// Frames from the guest.
pub(super) struct Send {
    queue: Queue,
    out: Out,
}

/// The way of frames from the guest to the tap.
struct Out {
    tap: Arc<Tap>,
    shared: Arc<Shared>,
    gate: Gate,
}

impl Send {
    pub(super) fn new(queue: Queue, tap: Arc<Tap>, shared: &Arc<Shared>) -> io::Result<Self> {
        let gate = Gate::new(&shared.tx_limiter)?;
        let shared = Arc::clone(shared);
        Ok(Self {
            queue,
            out: Out { tap, shared, gate },
        })
    }

    pub(super) fn state(&self) -> QueueState {
        self.queue.state()
    }
}

impl Out {
    /// Sends a frame; `None` when the tap has no room, or the rate limit does not allow it yet.
    fn send(&mut self, chain: &Chain) -> Result<Option<u64>, QueueError> {
        let len = chain.readable_len();
        let counters = &self.shared.counters;
        // The host reads guest memory itself. The guest may change it meanwhile, which harms only
        // its own frame.
        let pieces = chain.readable(0, len)?;
        // The guest chose both. A tap would refuse such a frame, or the call; dropping it here
        // costs no call.
        if !(HEADER_LEN..=MAX_FRAME).contains(&len) || pieces.len() > MAX_PIECES {
            counters.tx_drops.fetch_add(1, Ordering::Relaxed);
            return Ok(Some(0));
        }
        if !self.gate.pass(len as u64) {
            return Ok(None);
        }
        match self.tap.write(&pieces) {
            Ok(true) => {
                counters.tx_frames.fetch_add(1, Ordering::Relaxed);
                let bytes = (len - HEADER_LEN) as u64;
                counters.tx_bytes.fetch_add(bytes, Ordering::Relaxed);
            }
            Ok(false) => return Ok(None),
            Err(error) => {
                // A header that makes no sense to the host, or an interface that is down.
                tracing::debug!(%error, "cannot send a frame");
                counters.tx_drops.fetch_add(1, Ordering::Relaxed);
            }
        }
        self.gate.close();
        Ok(Some(len as u64))
    }
}

impl QueueTask for Send {
    fn watch(&mut self, sources: &mut TaskSources<'_, '_>) -> io::Result<()> {
        sources.watch(Arc::clone(self.queue.kick()), KICK, Interest::Read)?;
        self.out.gate.watch(sources, TIMER)?;
        // The receiver of the pair may be on the same loop, and watches the other descriptor.
        sources.watch(self.out.tap.twin(), TAP, Interest::Write)
    }

    fn call(&mut self, _: TaskEvent, _: &mut TaskSources<'_, '_>) -> Result<TaskFlow, QueueError> {
        let Self { queue, out } = self;
        out.gate.clear();
        queue.turn(Budget::new(CHAINS), |queue, chain| {
            match out.send(&chain)? {
                Some(bytes) => {
                    queue.push(chain.head(), 0)?;
                    Ok(Served::Bytes(bytes))
                }
                // The timer or the tap wakes the task when it can continue.
                None => Ok(Served::NotYet),
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rate_limiter::RateLimits;
    use crate::testing::{TestBuffer, TestGuest, TestQueue, transport};

    const DATA_VALID: u8 = 2;
    const INDIRECT: u16 = 4;
    const WRITE: u16 = 2;

    /// A receive queue that holds a frame of 72 bytes. Wants `/dev/net/tun` and CAP_NET_ADMIN.
    fn receive(queue: Queue, checksums: bool) -> Receive {
        let taps = Tap::open("wbtest%d", 1).unwrap();
        let shared = Arc::new(Shared::new(taps, [0; 6], RateLimits::default()));
        let takes = Takes {
            mergeable: true,
            checksums,
        };
        let mut task = Receive::new(queue, Arc::clone(&shared.taps[0]), &shared, takes).unwrap();
        task.len = HEADER_LEN + 60;
        task
    }

    #[test]
    fn frame_flags_need_negotiation() {
        for (checksums, seen) in [(true, DATA_VALID), (false, 0)] {
            let mut guest = TestGuest::new(1 << 20);
            let (transport, _) = transport();
            let mut driver = TestQueue::new(&mut guest, 0, 8);
            let at = guest.alloc(128);
            driver.send(&[TestBuffer::new(at, 128, true)]);
            let queue = driver.device_side(&transport, QueueState::default());
            let mut task = receive(queue, checksums);
            // The tap gives this header to a packet that the host has checked.
            task.frame[FLAGS] = DATA_VALID;
            assert!(task.deliver(&mut Budget::new(1)).unwrap());
            assert_eq!(guest.read(at, 1), [seen]);
        }
    }

    /// A guest that makes room of nothing available has each frame dropped, and takes no more memory or
    /// time than a turn has.
    #[test]
    fn buffers_without_room_are_bounded() {
        const SIZE: u16 = 256;
        let mut guest = TestGuest::new(1 << 20);
        let (transport, _) = transport();
        let mut driver = TestQueue::new(&mut guest, 0, SIZE);
        let mut table = Vec::new();
        for next in 1..=SIZE {
            table.extend([0; 12]);
            table.extend((WRITE | u16::from(next < SIZE)).to_le_bytes());
            table.extend(next.to_le_bytes());
        }
        let at = guest.put(&table);
        for head in 0..SIZE {
            driver.set_descriptor(head, at, table.len() as u32, INDIRECT, 0);
            driver.offer(head);
        }
        let queue = driver.device_side(&transport, QueueState::default());
        let mut task = receive(queue, true);
        let chains = task.room(&mut Budget::new(CHAINS)).unwrap().unwrap();
        let descriptors: usize = chains.iter().map(Chain::descriptors).sum();
        let most = TURN_DESCRIPTORS + usize::from(SIZE);
        assert!(descriptors <= most, "{descriptors}");
        chains.iter().for_each(|_| task.queue.unpop());
        assert!(task.deliver(&mut Budget::new(CHAINS)).unwrap());
        let drops = &task.shared.counters.rx_drops;
        assert_eq!(drops.load(Ordering::Relaxed), 1);
        assert_eq!(task.state(), QueueState::default(), "the buffers stay");
    }
}
