//! Watchdog device of Cloud Hypervisor (virtio device type 35, which has no section in virtio 1.3).
//!
//! The device has one queue. The driver pings by a buffer of at least one byte, into which the device
//! writes a 1. The first ping arms the watchdog. If the next ping does not come in time, the watchdog
//! expires. A reset of the device by its driver disarms the watchdog.
//!
//! Time counts while the device serves its queue: neither a pause nor a migration makes a watchdog
//! expire.

mod saved;

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use devices::event_loop::Interest;
use state::{LoadError, LoadScope, SaveError, Scope};

use crate::device::{DeviceError, DeviceId, VirtioDevice};
use crate::queue::{Budget, Queue, QueueError, QueueState, Served};
use crate::transport::Transport;
use crate::worker::{QueueTask, Running, TaskEvent, TaskFlow, TaskSources, Workers};

/// Time after the last ping at which a watchdog of a machine expires: two intervals of the driver, which
/// pings every 15 s. Cloud Hypervisor, which looks every 15 s, resets a guest at the same time.
pub const TIMEOUT: Duration = Duration::from_secs(30);

const QUEUE_SIZE: u16 = 8;
/// Pings of one turn.
const CHAINS: usize = 8;
/// The answer to a ping.
const ALIVE: u8 = 1;

/// State that the device and its queue share.
struct Shared {
    timeout: Duration,
    /// The driver has pinged since it reset the device.
    is_armed: AtomicBool,
    pings: AtomicU64,
    expirations: AtomicU64,
    on_expiry: Box<dyn Fn() + Send + Sync>,
}

/// A watchdog.
pub struct Watchdog {
    shared: Arc<Shared>,
    workers: Workers,
    transport: Option<Arc<Transport>>,
    running: Option<Running<WatchTask>>,
}

impl Watchdog {
    /// Returns a watchdog that is not armed. It calls `on_expiry` when the driver has not pinged for
    /// `timeout`, and again after each further `timeout`, since the owner may have a reason to wait.
    #[must_use]
    pub fn new(
        timeout: Duration,
        on_expiry: impl Fn() + Send + Sync + 'static,
        workers: Workers,
    ) -> Self {
        Self {
            shared: Arc::new(Shared {
                timeout,
                is_armed: AtomicBool::new(false),
                pings: AtomicU64::new(0),
                expirations: AtomicU64::new(0),
                on_expiry: Box::new(on_expiry),
            }),
            workers,
            transport: None,
            running: None,
        }
    }
}

impl VirtioDevice for Watchdog {
    fn id(&self) -> DeviceId {
        DeviceId::WATCHDOG
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
        let task = WatchTask {
            queue,
            shared: Arc::clone(&self.shared),
            // A pause or migration stopped the queue. The guest could not ping meanwhile, so it
            // gets the whole time again.
            last_ping: Instant::now(),
        };
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
        self.shared.is_armed.store(false, Ordering::Release);
    }

    fn save(&self, to: &mut Scope<'_>) -> Result<(), SaveError> {
        to.put(&saved::V1 {
            armed: self.shared.is_armed.load(Ordering::Acquire),
        })
    }

    fn load(&mut self, from: &mut LoadScope<'_, '_>) -> Result<(), LoadError> {
        let saved::V1 { armed } = from.take()?;
        self.shared.is_armed.store(armed, Ordering::Release);
        Ok(())
    }

    fn counters(&self) -> Vec<(&'static str, u64)> {
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        vec![
            ("pings", get(&self.shared.pings)),
            ("expirations", get(&self.shared.expirations)),
        ]
    }
}

/// Answers pings, and waits for the next.
struct WatchTask {
    queue: Queue,
    shared: Arc<Shared>,
    /// The last ping, or the start of the queue if that was later.
    last_ping: Instant,
}

impl WatchTask {
    /// Answers what the driver sent by `now`.
    fn turn(&mut self, now: Instant) -> Result<TaskFlow, QueueError> {
        let Self {
            queue,
            shared,
            last_ping,
        } = self;
        queue.turn(Budget::new(CHAINS), |queue, chain| {
            chain.write(0, &[ALIVE])?;
            queue.push(chain.head(), 1)?;
            *last_ping = now;
            shared.pings.fetch_add(1, Ordering::Relaxed);
            shared.is_armed.store(true, Ordering::Release);
            Ok(Served::Bytes(1))
        })
    }

    /// Reports that the watchdog has expired, if it has. Returns when it will if no ping comes.
    fn check(&mut self, now: Instant) -> Option<Instant> {
        if !self.shared.is_armed.load(Ordering::Acquire) {
            return None;
        }
        if now.saturating_duration_since(self.last_ping) >= self.shared.timeout {
            // From now on, not from when it was due: an owner that was busy hears one expiry and
            // not one for each interval that it missed.
            self.last_ping = now;
            self.shared.expirations.fetch_add(1, Ordering::Relaxed);
            (self.shared.on_expiry)();
        }
        self.last_ping.checked_add(self.shared.timeout)
    }
}

impl QueueTask for WatchTask {
    fn watch(&mut self, sources: &mut TaskSources<'_, '_>) -> io::Result<()> {
        sources.watch(Arc::clone(self.queue.kick()), 0, Interest::Read)
    }

    fn call(
        &mut self,
        _: TaskEvent,
        sources: &mut TaskSources<'_, '_>,
    ) -> Result<TaskFlow, QueueError> {
        let now = Instant::now();
        // Pings first: a thread that was late to look must not blame the guest.
        let flow = self.turn(now)?;
        sources.wake_at(self.check(now));
        Ok(flow)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{TestBuffer, TestGuest, TestQueue, transport};

    struct Lab {
        guest: TestGuest,
        driver: TestQueue,
        task: WatchTask,
        expired: Arc<AtomicU64>,
        start: Instant,
    }

    fn lab() -> Lab {
        let (_event_loop, workers) = crate::testing::workers();
        let mut guest = TestGuest::new(1 << 20);
        let (transport, _) = transport();
        let driver = TestQueue::new(&mut guest, 0, QUEUE_SIZE);
        let expired = Arc::new(AtomicU64::new(0));
        let counter = Arc::clone(&expired);
        let on_expiry = move || {
            counter.fetch_add(1, Ordering::Relaxed);
        };
        let device = Watchdog::new(TIMEOUT, on_expiry, workers);
        let start = Instant::now();
        let task = WatchTask {
            queue: driver.device_side(&transport, QueueState::default()),
            shared: Arc::clone(&device.shared),
            last_ping: start,
        };
        Lab {
            guest,
            driver,
            task,
            expired,
            start,
        }
    }

    impl Lab {
        /// Does what the task does `seconds` after its start. Returns the next deadline in seconds.
        fn at(&mut self, seconds: u64) -> Option<u64> {
            let now = self.start + Duration::from_secs(seconds);
            self.task.turn(now).unwrap();
            let deadline = self.task.check(now)?;
            Some(deadline.duration_since(self.start).as_secs())
        }

        fn ping(&mut self) {
            let addr = self.guest.put(&[0; 4]);
            self.driver.send(&[TestBuffer::new(addr, 4, true)]);
        }

        fn expired(&self) -> u64 {
            self.expired.load(Ordering::Relaxed)
        }
    }

    #[test]
    fn expires_only_without_pings() {
        let mut lab = lab();
        assert_eq!(lab.at(1000), None, "not armed");
        lab.ping();
        assert_eq!(lab.at(1001), Some(1031));
        let (_, written) = lab.driver.take_used().unwrap();
        assert_eq!(written, 1);
        assert_eq!(lab.at(1030), Some(1031));
        assert_eq!(lab.expired(), 0);
        // The ping is in the ring when the thread comes late.
        lab.ping();
        assert_eq!(lab.at(1050), Some(1080));
        assert_eq!(lab.expired(), 0);
        assert_eq!(lab.at(1080), Some(1110));
        assert_eq!(lab.expired(), 1);
        assert_eq!(lab.at(1109), Some(1110));
        assert_eq!(lab.at(1110), Some(1140));
        assert_eq!(lab.expired(), 2, "once for each timeout");
    }

    #[test]
    fn ping_writes_one_byte_and_no_more() {
        let mut lab = lab();
        let addr = lab.guest.put(&[7; 4]);
        lab.driver.send(&[TestBuffer::new(addr, 4, true)]);
        lab.at(0);
        assert_eq!(lab.guest.read(addr, 4), [ALIVE, 7, 7, 7]);
    }

    #[test]
    fn buffer_without_room_breaks_the_rules() {
        for (len, writable) in [(4, false), (0, true)] {
            let mut lab = lab();
            let addr = lab.guest.put(&[0; 4]);
            lab.driver.send(&[TestBuffer::new(addr, len, writable)]);
            assert!(lab.task.turn(lab.start).is_err(), "{len} {writable}");
            assert!(!lab.task.shared.is_armed.load(Ordering::Acquire));
        }
    }

    /// An armed watchdog expires on its loop without further calls, also after a load, and not after a
    /// reset of the device.
    #[test]
    fn armed_watchdog_expires_after_a_move() {
        const SHORT: Duration = Duration::from_millis(20);
        let (event_loop, workers) = crate::testing::workers();
        let mut guest = TestGuest::new(1 << 20);
        let (transport, _) = transport();
        let mut driver = TestQueue::new(&mut guest, 0, QUEUE_SIZE);
        let make = || {
            let (report, reported) = std::sync::mpsc::channel();
            let report = parking_lot::Mutex::new(report);
            let on_expiry = move || {
                // The test may have stopped to listen.
                let _ = report.lock().send(());
            };
            (Watchdog::new(SHORT, on_expiry, workers.clone()), reported)
        };
        let (mut source, reported) = make();
        source.activate(0, &transport).unwrap();
        let queue = driver.device_side(&transport, QueueState::default());
        source.start_queue(queue).unwrap();
        let addr = guest.put(&[0]);
        driver.send(&[TestBuffer::new(addr, 1, true)]);
        driver.wait_used();
        reported.recv_timeout(crate::testing::PATIENCE).unwrap();
        let state = source.stop_queue(0).unwrap();

        let mut writer = state::Writer::default();
        source.save(&mut writer.scope("device").unwrap()).unwrap();
        let saved = writer.finish();
        let (mut destination, reported) = make();
        let mut store = state::Store::open(&saved).unwrap();
        destination
            .load(&mut store.scope("device").unwrap())
            .unwrap();
        destination.activate(0, &transport).unwrap();
        let queue = driver.device_side(&transport, state);
        destination.start_queue(queue).unwrap();
        reported.recv_timeout(crate::testing::PATIENCE).unwrap();

        destination.stop_queue(0).unwrap();
        destination.reset();
        destination.activate(0, &transport).unwrap();
        let queue = driver.device_side(&transport, state);
        destination.start_queue(queue).unwrap();
        crate::testing::wait_idle(&event_loop);
        let deadline = destination.running.as_ref().unwrap();
        let deadline = deadline.with(|task| task.check(Instant::now() + TIMEOUT));
        assert_eq!(deadline, Some(None), "a reset disarms");
    }
}
