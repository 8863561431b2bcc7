//! Entropy device (virtio 1.3, 5.4): fills the guest's buffers from a file of the host.

mod saved;

use std::fs::File;
use std::io::{self, Read};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use devices::event_loop::Interest;
use devices::host_file::{FileKind, OpenError, Request};
use state::{LoadError, LoadScope, SaveError, Scope};

use crate::device::{DeviceError, DeviceId, VirtioDevice};
use crate::queue::{Budget, Chain, Queue, QueueError, QueueState, Served};
use crate::rate_limiter::{Gate, RateLimits, SharedLimiter};
use crate::transport::Transport;
use crate::worker::{QueueTask, Running, TaskEvent, TaskFlow, TaskSources, Workers};

const QUEUE_SIZE: u16 = 256;
/// Requests of one turn.
const CHAINS: usize = 16;
/// Bytes that one request is given at most: a driver asks again for what it still wants. Linux asks
/// for 64 bytes, or a page at boot.
const MOST: usize = 16 << 10;
/// Bytes of a turn's budget that a byte of entropy costs.
const COST: u64 = 16;

/// After this time a source that had nothing is asked again.
const RETRY: Duration = Duration::from_millis(100);

const KICK: usize = 0;
const TIMER: usize = 1;

/// The source of entropy cannot be opened.
#[derive(Debug, thiserror::Error)]
#[error("the source of random numbers cannot be used: {0}")]
pub struct RngError(#[from] OpenError);

/// An entropy device.
pub struct Rng {
    source: Arc<File>,
    workers: Workers,
    transport: Option<Arc<Transport>>,
    running: Option<Running<FillTask>>,
    limiter: SharedLimiter,
    counters: Arc<Counters>,
}

#[derive(Default)]
struct Counters {
    bytes: AtomicU64,
    requests: AtomicU64,
}

impl Rng {
    /// Returns a device that gives random numbers from the file `source`, usually `/dev/urandom`. It does
    /// not wait for a hardware generator that has none left: other devices share the thread. `limits`
    /// count bytes of entropy, and requests.
    ///
    /// # Errors
    /// Fails if the file cannot be opened, or is neither a regular file nor one of the host's sources of
    /// random numbers.
    pub fn new(source: &Path, limits: RateLimits, workers: Workers) -> Result<Self, RngError> {
        let opened = Request::read(source, &[FileKind::Regular, FileKind::Random]).open()?;
        Ok(Self {
            source: Arc::new(opened),
            workers,
            transport: None,
            running: None,
            limiter: SharedLimiter::new(limits),
            counters: Arc::default(),
        })
    }
}

impl VirtioDevice for Rng {
    fn id(&self) -> DeviceId {
        DeviceId::RNG
    }

    fn features(&self) -> u64 {
        0
    }

    fn queue_sizes(&self) -> Vec<u16> {
        vec![QUEUE_SIZE]
    }

    fn config_space(&self) -> Vec<u8> {
        Vec::new()
    }

    fn activate(&mut self, _: u64, transport: &Arc<Transport>) -> Result<(), DeviceError> {
        self.transport = Some(Arc::clone(transport));
        Ok(())
    }

    fn start_queue(&mut self, queue: Queue) -> Result<(), DeviceError> {
        let index = queue.index();
        let transport = self.transport.as_ref().filter(|_| index == 0);
        let transport = transport.ok_or(DeviceError::NoSuchQueue(index))?;
        let gate =
            Gate::new(&self.limiter).map_err(DeviceError::host("create the timer of the queue"))?;
        let fill = Fill {
            source: Arc::clone(&self.source),
            gate,
            buffer: vec![0; MOST],
            is_dry: false,
            counters: Arc::clone(&self.counters),
        };
        let task = FillTask { queue, fill };
        self.running = Some(Running::start(&self.workers, transport, task));
        Ok(())
    }

    fn stop_queue(&mut self, _: u16) -> Option<QueueState> {
        let stopped = self.running.take()?.stop()?;
        Some(stopped.queue.state())
    }

    fn queue_state(&self, _: u16) -> Option<QueueState> {
        self.running.as_ref()?.with(|task| task.queue.state())
    }

    fn reset(&mut self) {
        self.transport = None;
    }

    fn save(&self, to: &mut Scope<'_>) -> Result<(), SaveError> {
        to.put(&saved::V1 {})
    }

    fn load(&mut self, from: &mut LoadScope<'_, '_>) -> Result<(), LoadError> {
        let saved::V1 {} = from.take()?;
        Ok(())
    }

    fn counters(&self) -> Vec<(&'static str, u64)> {
        vec![
            ("bytes", self.counters.bytes.load(Ordering::Relaxed)),
            ("requests", self.counters.requests.load(Ordering::Relaxed)),
        ]
    }
}

/// The source that the task fills buffers from.
struct Fill {
    source: Arc<File>,
    gate: Gate,
    buffer: Vec<u8>,
    /// The last read gave nothing.
    is_dry: bool,
    counters: Arc<Counters>,
}

/// Fills what the driver makes available.
struct FillTask {
    queue: Queue,
    fill: Fill,
}

impl Fill {
    /// Fills a buffer of the driver's. Returns how many bytes it got, or `None` if the request has to wait:
    /// the rate limit does not allow it yet, or the source has nothing. A request gets at least one byte
    /// (5.4.6.1).
    fn fill(&mut self, chain: &Chain) -> Result<Option<u32>, QueueError> {
        // A guest may offer 4 GiB: 5.4.6 lets the device fill less than all.
        let wanted = chain.writable_len().min(MOST);
        // Before the read, which takes numbers from the source for good. A source that then gives fewer has
        // cost the tokens of all that was wanted.
        if !self.gate.pass(wanted as u64) {
            return Ok(None);
        }
        let buffer = self.buffer.get_mut(..wanted).unwrap_or_default();
        let read = (&*self.source).read(buffer);
        let got = *read.as_ref().unwrap_or(&0);
        if got == 0 && wanted > 0 {
            self.note_dry(&read);
            // The gate stays open: the tokens of this request are taken.
            return Ok(None);
        }
        self.is_dry = false;
        self.gate.close();
        chain.write(0, buffer.get(..got).unwrap_or_default())?;
        let bytes = u32::try_from(got).unwrap_or(u32::MAX);
        self.counters
            .bytes
            .fetch_add(bytes.into(), Ordering::Relaxed);
        self.counters.requests.fetch_add(1, Ordering::Relaxed);
        Ok(Some(bytes))
    }

    /// Logs once why the guest's requests wait.
    fn note_dry(&mut self, read: &io::Result<usize>) {
        if std::mem::replace(&mut self.is_dry, true) {
            return;
        }
        match read {
            // A hardware generator has none for now.
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => tracing::warn!(%error, "cannot read the source of random numbers"),
            Ok(_) => {
                tracing::warn!("the file of random numbers has ended: the guest waits for more");
            }
        }
    }
}

impl QueueTask for FillTask {
    fn watch(&mut self, sources: &mut TaskSources<'_, '_>) -> io::Result<()> {
        sources.watch(Arc::clone(self.queue.kick()), KICK, Interest::Read)?;
        self.fill.gate.watch(sources, TIMER)
    }

    fn call(
        &mut self,
        _: TaskEvent,
        sources: &mut TaskSources<'_, '_>,
    ) -> Result<TaskFlow, QueueError> {
        let flow = self.turn()?;
        let retry = self.fill.is_dry.then(|| Instant::now() + RETRY);
        sources.wake_at(retry);
        Ok(flow)
    }
}

impl FillTask {
    fn turn(&mut self) -> Result<TaskFlow, QueueError> {
        let Self { queue, fill } = self;
        fill.gate.clear();
        queue.turn(Budget::new(CHAINS), |queue, chain| {
            let Some(written) = fill.fill(&chain)? else {
                // The timer calls the task when there are tokens again.
                return Ok(Served::NotYet);
            };
            queue.push(chain.head(), written)?;
            // Random numbers cost far more than copies: the generator of Linux makes some 300 MB/s.
            Ok(Served::Bytes(u64::from(written) * COST))
        })
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use devices::event_loop::EventLoop;

    use super::*;
    use crate::limits::TURN_BYTES;
    use crate::rate_limiter::BucketConfig;
    use crate::testing::{TestBuffer, TestGuest, TestQueue, transport, wait_idle, workers};

    /// A guest that wants megabytes at once has the generator for a fraction of a millisecond.
    #[test]
    fn entropy_has_a_budget() {
        let mut guest = TestGuest::new(4 << 20);
        let (transport, _) = transport();
        let mut driver = TestQueue::new(&mut guest, 0, 64);
        let addr = guest.alloc(1 << 20);
        for _ in 0..64 {
            driver.send(&[TestBuffer {
                addr,
                len: 1 << 20,
                writable: true,
            }]);
        }
        let counters = Arc::<Counters>::default();
        let mut task = FillTask {
            queue: driver.device_side(&transport, QueueState::default()),
            fill: Fill {
                source: Arc::new(File::open("/dev/urandom").unwrap()),
                gate: Gate::new(&SharedLimiter::new(RateLimits::default())).unwrap(),
                buffer: vec![0; MOST],
                is_dry: false,
                counters: Arc::clone(&counters),
            },
        };
        assert_eq!(task.turn().unwrap(), TaskFlow::Again);
        let bytes = counters.bytes.load(Ordering::Relaxed);
        assert!((1..=TURN_BYTES / COST).contains(&bytes), "{bytes}");
        assert_eq!(driver.take_used(), Some((0, MOST as u32)));
    }

    fn limited(bandwidth: Option<BucketConfig>, ops: Option<BucketConfig>) -> (EventLoop, Rng) {
        let (event_loop, workers) = workers();
        let limits = RateLimits { bandwidth, ops };
        let device = Rng::new(Path::new("/dev/urandom"), limits, workers).unwrap();
        (event_loop, device)
    }

    /// The limit is the device's: a guest that resets the device does not fill the bucket.
    #[test]
    fn rate_limit_holds_across_reset() {
        let bucket = BucketConfig {
            size: 1000,
            one_time_burst: 0,
            refill_time: Duration::from_secs(1_000_000),
        };
        let (event_loop, mut device) = limited(Some(bucket), None);
        let mut guest = TestGuest::new(1 << 20);
        let (transport, _) = transport();
        let mut driver = TestQueue::new(&mut guest, 0, 16);
        let addr = guest.alloc(400);
        let mut state = QueueState::default();
        for served in [2, 0] {
            device.activate(0, &transport).unwrap();
            let queue = driver.device_side(&transport, state);
            device.start_queue(queue).unwrap();
            for _ in 0..3 {
                driver.send(&[TestBuffer::new(addr, 400, true)]);
            }
            for _ in 0..served {
                assert_eq!(driver.wait_used().1, 400);
            }
            wait_idle(&event_loop);
            // The requests beyond the limit stay in the ring.
            state = device.stop_queue(0).unwrap();
            assert_eq!((state.next_avail, state.next_used), (2, 2));
            assert_eq!(driver.take_used(), None);
            device.reset();
        }
    }

    /// A guest with room for 64 bytes at an address, and the driver's side of the device's queue, which runs.
    fn started(device: &mut Rng) -> (TestGuest, TestQueue, u64) {
        let mut guest = TestGuest::new(1 << 20);
        let (transport, _) = transport();
        let driver = TestQueue::new(&mut guest, 0, 16);
        let addr = guest.alloc(64);
        device.activate(0, &transport).unwrap();
        let queue = driver.device_side(&transport, QueueState::default());
        device.start_queue(queue).unwrap();
        (guest, driver, addr)
    }

    /// A request that waits for tokens is served when there are some, without another kick.
    #[test]
    fn limited_request_is_served_later() {
        let bucket = BucketConfig {
            size: 1,
            one_time_burst: 0,
            refill_time: Duration::from_millis(20),
        };
        let (_event_loop, mut device) = limited(None, Some(bucket));
        let (_guest, mut driver, addr) = started(&mut device);
        let start = Instant::now();
        for _ in 0..4 {
            driver.send(&[TestBuffer::new(addr, 64, true)]);
        }
        for _ in 0..4 {
            assert_eq!(driver.wait_used().1, 64);
        }
        // The bucket has one token at first, and three more in 60 ms; the bucket may fill from the moment
        // in which the device was made.
        assert!(
            start.elapsed() >= Duration::from_millis(40),
            "{:?}",
            start.elapsed()
        );
    }

    /// A request gets at least one byte (5.4.6.1): where the source has none, it waits until there are some.
    #[test]
    fn empty_source_keeps_request_waiting() {
        let (event_loop, workers) = workers();
        let mut source = tempfile::NamedTempFile::new().unwrap();
        source.write_all(b"abc").unwrap();
        let mut device = Rng::new(source.path(), RateLimits::default(), workers).unwrap();
        let (_guest, mut driver, addr) = started(&mut device);
        for _ in 0..3 {
            driver.send(&[TestBuffer::new(addr, 2, true)]);
        }
        assert_eq!([driver.wait_used().1, driver.wait_used().1], [2, 1]);
        wait_idle(&event_loop);
        assert_eq!(driver.take_used(), None);
        // Without another kick.
        source.write_all(b"d").unwrap();
        assert_eq!(driver.wait_used().1, 1);
        let state = device.stop_queue(0).unwrap();
        assert_eq!((state.next_avail, state.next_used), (3, 3));
    }

    #[test]
    fn source_is_a_file_or_device() {
        let (_event_loop, workers) = workers();
        for source in ["/dev/urandom", "/proc/self/cmdline"] {
            Rng::new(Path::new(source), RateLimits::default(), workers.clone()).unwrap();
        }
        for source in ["/dev/null", "/dev/tty", "/tmp"] {
            let refused = Rng::new(Path::new(source), RateLimits::default(), workers.clone());
            let refused = refused.err().unwrap();
            let refused = refused.to_string();
            assert!(
                refused.contains(source)
                    && refused.contains("it must be a regular file or a source of"),
                "{refused}"
            );
        }
    }
}
