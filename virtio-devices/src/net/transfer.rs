//! The work on the queues of frames.

use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use devices::event_loop::Interest;

use super::Shared;
use super::tap::{HEADER_LEN, Tap};
use crate::queue::{Chain, Queue, QueueError, QueueState};
use crate::rate_limiter::{LentLimiter, SharedLimiter, Timer};
use crate::worker::{QueueTask, TaskEvent, TaskFlow, TaskSources};

/// Frames that are moved before others on the loop have their turn.
const BUDGET: usize = 64;
/// The largest frame, with its header: a segment that the guest or the host cuts up.
const MAX_FRAME: usize = HEADER_LEN + 65_550;
/// Where in the header the number of buffers is.
const NUM_BUFFERS: usize = 10;
/// Buffers of one frame: what the kernel takes in one call (`UIO_MAXIOV`).
const MAX_PIECES: usize = 1024;

const KICK: usize = 0;
const TAP: usize = 1;
const TIMER: usize = 2;

/// Keeps a rate, and says when to go on.
struct Pace {
    limiter: LentLimiter,
    timer: Timer,
}

impl Pace {
    fn new(limiter: &SharedLimiter) -> io::Result<Self> {
        Ok(Self {
            limiter: limiter.lend(),
            timer: Timer::new()?,
        })
    }

    /// Whether a frame may pass now; if not, the timer says when to ask again.
    fn pass(&mut self, bytes: usize) -> bool {
        match self.limiter.begin(bytes as u64) {
            Ok(()) => true,
            Err(wait) => match self.timer.set(wait) {
                Ok(()) => false,
                Err(error) => {
                    tracing::error!(%error, "a rate limit cannot be kept");
                    true
                }
            },
        }
    }
}

/// Frames to the guest.
pub(super) struct Receive {
    queue: Queue,
    tap: Arc<Tap>,
    shared: Arc<Shared>,
    /// The driver takes a frame in several buffers.
    mergeable: bool,
    pace: Pace,
    /// A frame that was read and waits for room, or for its turn. When the queue stops it is lost,
    /// as frames may be.
    frame: Vec<u8>,
    len: usize,
    passed: bool,
}

impl Receive {
    pub(super) fn new(
        queue: Queue,
        tap: Arc<Tap>,
        shared: &Arc<Shared>,
        mergeable: bool,
    ) -> io::Result<Self> {
        Ok(Self {
            queue,
            tap,
            pace: Pace::new(&shared.rx_limiter)?,
            shared: Arc::clone(shared),
            mergeable,
            frame: vec![0; MAX_FRAME],
            len: 0,
            passed: false,
        })
    }

    pub(super) fn state(&self) -> QueueState {
        self.queue.state()
    }

    /// Moves a frame; false when there is none, or no room for it.
    fn step(&mut self) -> Result<bool, QueueError> {
        if self.len == 0 {
            match self.tap.read(&mut self.frame) {
                Ok(Some(len)) if len >= HEADER_LEN => (self.len, self.passed) = (len, false),
                Ok(Some(_)) => return Ok(true),
                Ok(None) => return Ok(false),
                Err(error) => {
                    // The interface is down, or gone: the guest hears nothing from it.
                    tracing::debug!(%error, "a tap cannot be read");
                    return Ok(false);
                }
            }
        }
        if !self.passed {
            self.passed = self.pace.pass(self.len);
            if !self.passed {
                return Ok(false);
            }
        }
        if !self.deliver()? {
            return Ok(false);
        }
        let counters = &self.shared.counters;
        counters.rx_frames.fetch_add(1, Ordering::Relaxed);
        let bytes = self.len - HEADER_LEN;
        counters.rx_bytes.fetch_add(bytes as u64, Ordering::Relaxed);
        self.len = 0;
        Ok(true)
    }

    /// Gives the frame to the driver; false when it has not made enough room available.
    fn deliver(&mut self) -> Result<bool, QueueError> {
        let mut chains: Vec<Chain> = Vec::new();
        let mut room = 0;
        while room < self.len {
            let chain = match self.queue.pop()? {
                Some(chain) => chain,
                // Room that came meanwhile is told by no kick: look again.
                None if self.queue.enable_kicks()? => continue,
                None => {
                    chains.iter().for_each(|_| self.queue.unpop());
                    return Ok(false);
                }
            };
            room += chain.writable_len();
            let more = self.mergeable || chains.is_empty();
            chains.push(chain);
            if !more || chains.len() > usize::from(self.queue.size()) {
                break;
            }
            if !self.mergeable && room < self.len {
                // The driver said that its buffers are large enough.
                self.shared
                    .counters
                    .rx_drops
                    .fetch_add(1, Ordering::Relaxed);
                self.queue.unpop();
                return Ok(true);
            }
        }
        let count = u16::try_from(chains.len()).unwrap_or(u16::MAX);
        if let Some(field) = self.frame.get_mut(NUM_BUFFERS..HEADER_LEN) {
            field.copy_from_slice(&count.to_le_bytes());
        }
        let mut rest = self.frame.get(..self.len).unwrap_or_default();
        for chain in chains {
            let (piece, after) = rest.split_at(rest.len().min(chain.writable_len()));
            chain.write(0, piece)?;
            let len = u32::try_from(piece.len()).unwrap_or(u32::MAX);
            self.queue.push(chain.head(), len)?;
            rest = after;
        }
        Ok(true)
    }
}

impl QueueTask for Receive {
    fn watch(&mut self, sources: &mut TaskSources<'_, '_>) -> io::Result<()> {
        sources.watch(Arc::clone(self.queue.kick()), KICK, Interest::Read)?;
        sources.watch(self.pace.timer.descriptor(), TIMER, Interest::Read)?;
        // A duplicate: the sender watches the same interface.
        sources.watch(self.tap.try_clone()?, TAP, Interest::Read)
    }

    fn call(&mut self, _: TaskEvent, _: &mut TaskSources<'_, '_>) -> Result<TaskFlow, QueueError> {
        let _ = self.queue.kick().read();
        self.pace.timer.clear();
        for _ in 0..BUDGET {
            if !self.step()? {
                self.queue.notify()?;
                return Ok(TaskFlow::Wait);
            }
        }
        self.queue.notify()?;
        Ok(TaskFlow::Again)
    }
}

/// Frames from the guest.
pub(super) struct Send {
    queue: Queue,
    tap: Arc<Tap>,
    shared: Arc<Shared>,
    pace: Pace,
    /// The frame at the front has its turn.
    passed: bool,
}

/// What became of one step.
enum Step {
    Sent,
    Idle,
    Waits,
}

impl Send {
    pub(super) fn new(queue: Queue, tap: Arc<Tap>, shared: &Arc<Shared>) -> io::Result<Self> {
        Ok(Self {
            queue,
            tap,
            pace: Pace::new(&shared.tx_limiter)?,
            shared: Arc::clone(shared),
            passed: false,
        })
    }

    pub(super) fn state(&self) -> QueueState {
        self.queue.state()
    }

    fn step(&mut self) -> Result<Step, QueueError> {
        let Some(chain) = self.queue.pop()? else {
            return Ok(Step::Idle);
        };
        let len = chain.readable_len();
        let counters = &self.shared.counters;
        let pieces = chain.readable(0, len)?;
        if !(HEADER_LEN..=MAX_FRAME).contains(&len) || pieces.len() > MAX_PIECES {
            counters.tx_drops.fetch_add(1, Ordering::Relaxed);
            self.queue.push(chain.head(), 0)?;
            return Ok(Step::Sent);
        }
        if !self.passed {
            self.passed = self.pace.pass(len);
        }
        if !self.passed {
            self.queue.unpop();
            return Ok(Step::Waits);
        }
        match self.tap.write(&pieces) {
            Ok(true) => {
                counters.tx_frames.fetch_add(1, Ordering::Relaxed);
                let bytes = (len - HEADER_LEN) as u64;
                counters.tx_bytes.fetch_add(bytes, Ordering::Relaxed);
            }
            Ok(false) => {
                self.queue.unpop();
                return Ok(Step::Waits);
            }
            Err(error) => {
                // A header that makes no sense to the host, or an interface that is down.
                tracing::debug!(%error, "a frame cannot be sent");
                counters.tx_drops.fetch_add(1, Ordering::Relaxed);
            }
        }
        self.passed = false;
        self.queue.push(chain.head(), 0)?;
        Ok(Step::Sent)
    }
}

impl QueueTask for Send {
    fn watch(&mut self, sources: &mut TaskSources<'_, '_>) -> io::Result<()> {
        sources.watch(Arc::clone(self.queue.kick()), KICK, Interest::Read)?;
        sources.watch(self.pace.timer.descriptor(), TIMER, Interest::Read)?;
        sources.watch(self.tap.try_clone()?, TAP, Interest::Write)
    }

    fn call(&mut self, _: TaskEvent, _: &mut TaskSources<'_, '_>) -> Result<TaskFlow, QueueError> {
        let _ = self.queue.kick().read();
        self.pace.timer.clear();
        for _ in 0..BUDGET {
            match self.step()? {
                Step::Sent => {}
                Step::Waits => {
                    self.queue.notify()?;
                    return Ok(TaskFlow::Wait);
                }
                Step::Idle => {
                    self.queue.notify()?;
                    return Ok(match self.queue.enable_kicks()? {
                        true => TaskFlow::Again,
                        false => TaskFlow::Wait,
                    });
                }
            }
        }
        self.queue.notify()?;
        Ok(TaskFlow::Again)
    }
}
