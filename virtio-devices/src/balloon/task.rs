//! The work on a balloon's queues.

use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use devices::event_loop::Interest;

use super::{PAGE_SHIFT, Shared};
use crate::limits::TURN_BYTES;
use crate::queue::{Budget, Chain, Queue, QueueError, QueueState, Served};
use crate::worker::{QueueTask, TaskEvent, TaskFlow, TaskSources};

/// Requests of one turn.
const CHAINS: usize = 8;
/// Bytes of a turn's budget that a page or range costs that is given back: 1024 of them are a
/// turn. Linux's requests name 256 pages.
const COST: u64 = TURN_BYTES / 1024;
/// Bytes that are given back for the cost of one that is moved: the host frees 32 MiB in about a
/// millisecond.
const FREED_RATIO: u64 = 32;
const PAGE: u64 = 1 << PAGE_SHIFT;
/// Bytes of the list of a request: Linux's have 1 KiB.
const MAX_LIST: usize = 4 << 10;
/// Bytes of a statistic: a tag and a value (5.5.6.3).
const STATISTIC: usize = 10;
/// Bytes of one report that are given back; the rest stays with the guest. Linux reports 128 MiB at most:
/// 32 ranges of 4 MiB.
const MAX_REPORT: usize = 256 << 20;
/// Statistics that one request tells at most.
const MAX_STATISTICS: usize = 64;

/// The role of a queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Role {
    Inflate,
    Deflate,
    Statistics,
    Reporting,
}

/// Serves one queue.
pub(super) struct BalloonTask {
    queue: Queue,
    work: Work,
}

/// The work that the chains of the queue ask for.
struct Work {
    role: Role,
    shared: Arc<Shared>,
    /// The driver's request for statistics, kept until they are wanted (5.5.6.3.1).
    kept: Option<Chain>,
    wanted: bool,
}

impl BalloonTask {
    pub(super) fn new(queue: Queue, role: Role, shared: &Arc<Shared>) -> Self {
        let work = Work {
            role,
            shared: Arc::clone(shared),
            kept: None,
            wanted: false,
        };
        Self { queue, work }
    }

    /// Returns the queue's state. A request that is kept counts as not taken, so the next task takes it
    /// again.
    pub(super) fn finish(mut self) -> QueueState {
        if self.work.kept.take().is_some() {
            self.queue.unpop();
        }
        self.queue.state()
    }

    pub(super) fn state(&self) -> QueueState {
        let mut state = self.queue.state();
        if self.work.kept.is_some() {
            state.next_avail = state.next_avail.wrapping_sub(1);
        }
        state
    }

    /// Notes that the guest should tell its statistics anew; true if it can be asked.
    pub(super) fn asks_again(&mut self) -> bool {
        self.work.wanted = self.work.role == Role::Statistics;
        self.work.wanted
    }
}

impl Work {
    /// Does what the chain asks for, and returns the one that the driver gets back: this one, or of
    /// two requests for statistics the earlier one.
    fn serve(&mut self, chain: Chain) -> Result<Option<Chain>, QueueError> {
        match self.role {
            Role::Inflate => self.inflate(&chain)?,
            // What comes back is touched, and there again.
            Role::Deflate => {}
            Role::Reporting => self.report(&chain),
            Role::Statistics => {
                self.note(&chain)?;
                // The driver sends a buffer with its statistics at once and waits (5.5.6.3.1): the
                // device keeps it, and asks for new ones by giving it back.
                return Ok(self.kept.replace(chain));
            }
        }
        Ok(Some(chain))
    }

    /// Gives the pages that the driver names back to the host, in runs as long as they are.
    fn inflate(&self, chain: &Chain) -> Result<(), QueueError> {
        let whole = chain.readable_len();
        // The list is copied once, so that the guest cannot change an entry between its check and
        // its use; the limit bounds the copy.
        if whole > MAX_LIST {
            return Err(QueueError::Chain {
                head: chain.head(),
                why: "names more pages than a balloon accepts in one request",
            });
        }
        let mut raw = vec![0; whole];
        chain.read(0, &mut raw)?;
        let mut run: Option<(u64, u64)> = None;
        for entry in raw.chunks_exact(4) {
            let addr = number(entry) << PAGE_SHIFT;
            run = Some(match run {
                Some((first, len)) if first + len == addr => (first, len + PAGE),
                // Linux names them from the last to the first.
                Some((first, len)) if addr + PAGE == first => (addr, len + PAGE),
                Some((first, len)) => {
                    self.give_back(chain, first, len);
                    (addr, PAGE)
                }
                None => (addr, PAGE),
            });
        }
        if let Some((first, len)) = run {
            self.give_back(chain, first, len);
        }
        Ok(())
    }

    fn give_back(&self, chain: &Chain, addr: u64, len: u64) {
        // `discard` takes RAM of this guest alone and ignores the rest: the guest chose the
        // address.
        match chain.memory().discard(addr, len) {
            Ok(freed) => drop(
                self.shared
                    .inflated_bytes
                    .fetch_add(freed, Ordering::Relaxed),
            ),
            // It stays with the guest, which does not use it.
            Err(error) => tracing::debug!(addr, len, %error, "cannot return memory to the host"),
        }
    }

    fn report(&self, chain: &Chain) {
        // The ranges are RAM, as `Chain` has checked. Their content may go: the guest reported it
        // as unused.
        let mut left = MAX_REPORT;
        for (addr, len) in chain.writable_ranges() {
            let len = len.min(left);
            left -= len;
            match chain.memory().discard(addr, len as u64) {
                Ok(freed) => drop(
                    self.shared
                        .reported_bytes
                        .fetch_add(freed, Ordering::Relaxed),
                ),
                Err(error) => {
                    tracing::debug!(addr, len, %error, "cannot return memory to the host");
                }
            }
        }
    }

    fn note(&self, chain: &Chain) -> Result<(), QueueError> {
        let mut raw = vec![0; chain.readable_len().min(STATISTIC * MAX_STATISTICS)];
        chain.read(0, &mut raw)?;
        let mut statistics = self.shared.statistics.lock();
        for entry in raw.chunks_exact(STATISTIC) {
            let (tag, value) = entry.split_at(2);
            if let Some(name) = name(number(tag)) {
                statistics.insert(name, number(value));
            }
        }
        Ok(())
    }
}

/// Decodes up to eight little-endian bytes.
fn number(bytes: &[u8]) -> u64 {
    let bytes = bytes.iter().rev();
    bytes.fold(0, |number, byte| number << 8 | u64::from(*byte))
}

/// `VIRTIO_BALLOON_S_*`.
fn name(tag: u64) -> Option<&'static str> {
    const NAMES: [&str; 10] = [
        "guest_swapped_in_bytes",
        "guest_swapped_out_bytes",
        "guest_major_faults",
        "guest_minor_faults",
        "guest_free_bytes",
        "guest_total_bytes",
        "guest_available_bytes",
        "guest_caches_bytes",
        "guest_hugetlb_allocations",
        "guest_hugetlb_failures",
    ];
    NAMES.get(usize::try_from(tag).ok()?).copied()
}

impl QueueTask for BalloonTask {
    fn watch(&mut self, sources: &mut TaskSources<'_, '_>) -> io::Result<()> {
        sources.watch(Arc::clone(self.queue.kick()), 0, Interest::Read)
    }

    fn call(&mut self, _: TaskEvent, _: &mut TaskSources<'_, '_>) -> Result<TaskFlow, QueueError> {
        self.turn()
    }
}

impl BalloonTask {
    fn turn(&mut self) -> Result<TaskFlow, QueueError> {
        let Self { queue, work } = self;
        if let Some(chain) = work.kept.take_if(|_| work.wanted) {
            work.wanted = false;
            queue.push(chain.head(), 0)?;
        }
        queue.turn(Budget::new(CHAINS), |queue, chain| {
            // A page or a range may be a call of the host each.
            let cost = match work.role {
                Role::Inflate => chain.readable_len() as u64 / 4 * COST,
                Role::Reporting => {
                    chain.descriptors() as u64 * COST + chain.writable_len() as u64 / FREED_RATIO
                }
                Role::Deflate | Role::Statistics => 0,
            };
            if let Some(done) = work.serve(chain)? {
                queue.push(done.head(), 0)?;
            }
            Ok(Served::Bytes(cost))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{TestBuffer, TestGuest, TestQueue, transport};

    /// The host frees memory at some gigabytes a second, and others wait meanwhile.
    #[test]
    fn reports_of_gigabytes_have_a_budget() {
        const LEN: u32 = 512 << 20;
        let mut guest = TestGuest::new(1 << 30);
        let (transport, _) = transport();
        let mut driver = TestQueue::new(&mut guest, 0, 8);
        for _ in 0..2 {
            driver.send(&[TestBuffer::new(256 << 20, LEN, true)]);
        }
        let queue = driver.device_side(&transport, QueueState::default());
        let shared = Arc::<Shared>::default();
        let mut task = BalloonTask::new(queue, Role::Reporting, &shared);
        for turn in 1..=2 {
            assert_eq!(task.turn().unwrap(), TaskFlow::Again);
            assert!(driver.take_used().is_some());
            assert_eq!(driver.take_used(), None);
            let reported = shared.reported_bytes.load(Ordering::Relaxed);
            assert_eq!(reported, turn * MAX_REPORT as u64);
        }
    }
}
