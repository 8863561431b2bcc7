//! Limits of bytes and operations a second: token buckets.
//!
//! A bucket holds up to `size` tokens and is filled from empty in `refill_time`. A request takes
//! its tokens when it begins. One that is larger than the bucket may begin when the bucket is
//! full, and the debt is paid before the next one.

use std::cell::Cell;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use devices::event_loop::Interest;
use parking_lot::Mutex;
use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create,
    timerfd_settime,
};

use crate::worker::TaskSources;

/// When one that stands behind another in a limiter's line looks again.
const BEHIND_ANOTHER: Duration = Duration::from_millis(1);

/// How long the first in a limiter's line may stay away after its wait is over. The queue of a device
/// that broke the rules stays away until its driver resets it, and other disks may share the limiter.
const PLACE_IS_KEPT: Duration = Duration::from_secs(1);

/// A task that has to wait longer looks in between.
const LONGEST_TIMER: Duration = Duration::from_secs(3600);

/// Makes a task's loop call it after a while.
#[derive(Debug)]
pub struct Timer(Arc<OwnedFd>);

impl Timer {
    /// One that is not set.
    ///
    /// # Errors
    /// Fails if the host has no descriptor left.
    pub fn new() -> io::Result<Self> {
        let flags = TimerfdFlags::NONBLOCK | TimerfdFlags::CLOEXEC;
        Ok(Self(Arc::new(timerfd_create(
            TimerfdClockId::Monotonic,
            flags,
        )?)))
    }

    /// Returns the timer that becomes readable when the limiter has tokens again.
    #[must_use]
    pub fn descriptor(&self) -> Arc<OwnedFd> {
        Arc::clone(&self.0)
    }

    /// Becomes ready after `wait`, once, and not before.
    ///
    /// # Errors
    /// Fails if the host refuses.
    pub fn set(&self, wait: Duration) -> io::Result<()> {
        // A timer of zero would never be ready.
        let wait = wait.clamp(Duration::from_nanos(1), LONGEST_TIMER);
        let value = Timespec {
            tv_sec: i64::try_from(wait.as_secs()).unwrap_or(i64::MAX),
            tv_nsec: i64::from(wait.subsec_nanos()),
        };
        let zero = Timespec {
            tv_sec: 0,
            tv_nsec: 0,
        };
        let once = Itimerspec {
            it_interval: zero,
            it_value: value,
        };
        timerfd_settime(&self.0, TimerfdTimerFlags::empty(), &once)?;
        Ok(())
    }

    /// Takes note that it was ready, if it was.
    pub fn clear(&self) {
        let _ = rustix::io::read(&self.0, &mut [0; 8]);
    }
}

/// One bucket, as the API describes it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BucketConfig {
    /// Tokens it holds.
    pub size: u64,
    /// Tokens beyond these that can be spent once.
    pub one_time_burst: u64,
    /// How long it takes to fill it from empty.
    pub refill_time: Duration,
}

/// Limits of a device, or of one direction of it; none of either where it is absent.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RateLimits {
    /// Bucket of bytes.
    pub bandwidth: Option<BucketConfig>,
    /// Bucket of operations.
    pub ops: Option<BucketConfig>,
}

#[derive(Clone, Debug)]
struct Bucket {
    config: BucketConfig,
    burst: u64,
    /// Negative while a debt is being paid.
    tokens: f64,
    at: Instant,
}

impl Bucket {
    fn new(config: BucketConfig, now: Instant) -> Self {
        Self {
            config,
            burst: config.one_time_burst,
            tokens: config.size as f64,
            at: now,
        }
    }

    fn rate(&self) -> f64 {
        self.config.size as f64 / self.config.refill_time.as_secs_f64().max(1e-9)
    }

    fn refill(&mut self, now: Instant) {
        let passed = now.saturating_duration_since(self.at).as_secs_f64();
        // Floating point keeps fractions of a token between calls that are microseconds apart;
        // whole numbers would round a slow limit down to nothing.
        self.tokens = (self.tokens + passed * self.rate()).min(self.config.size as f64);
        self.at = now;
    }

    /// How long until this many tokens can be taken.
    fn wait(&self, want: u64) -> Duration {
        // A request larger than the bucket waits for a full one, not for tokens that it can never
        // hold.
        let want = want.saturating_sub(self.burst).min(self.config.size) as f64;
        let missing = want - self.tokens;
        if missing <= 0.0 {
            return Duration::ZERO;
        }
        Duration::try_from_secs_f64(missing / self.rate()).unwrap_or(Duration::MAX)
    }

    fn take(&mut self, want: u64) {
        let from_burst = want.min(self.burst);
        // Spent once and never refilled, as Cloud Hypervisor's `one_time_burst`.
        self.burst -= from_burst;
        self.tokens -= (want - from_burst) as f64;
    }
}

/// Keeps to [`RateLimits`].
#[derive(Clone, Debug)]
pub struct RateLimiter {
    bandwidth: Option<Bucket>,
    ops: Option<Bucket>,
}

impl RateLimiter {
    /// With full buckets. A bucket of no size limits nothing.
    #[must_use]
    pub fn new(limits: RateLimits, now: Instant) -> Self {
        let bucket = |config: Option<BucketConfig>| {
            let config = config.filter(|config| config.size > 0);
            config.map(|config| Bucket::new(config, now))
        };
        Self {
            bandwidth: bucket(limits.bandwidth),
            ops: bucket(limits.ops),
        }
    }

    /// Whether there is a limit at all.
    #[must_use]
    pub fn is_limiting(&self) -> bool {
        self.bandwidth.is_some() || self.ops.is_some()
    }

    /// Takes the tokens of an operation of `bytes`, or says how long it has to wait.
    ///
    /// # Errors
    /// The time after which to try again.
    pub fn begin(&mut self, bytes: u64, now: Instant) -> Result<(), Duration> {
        let mut buckets = [(&mut self.bandwidth, bytes), (&mut self.ops, 1)];
        let mut wait = Duration::ZERO;
        for (bucket, want) in &mut buckets {
            if let Some(bucket) = bucket {
                bucket.refill(now);
                wait = wait.max(bucket.wait(*want));
            }
        }
        // Both buckets are asked before either is charged: a request that waits for bytes must not
        // lose its operation meanwhile.
        if !wait.is_zero() {
            return Err(wait);
        }
        for (bucket, want) in buckets {
            if let Some(bucket) = bucket {
                bucket.take(want);
            }
        }
        Ok(())
    }
}

/// A limiter that the queues of one or several devices share. It belongs to the device and not to the
/// queues: a guest that resets a queue does not get full buckets by that.
#[derive(Clone, Debug, Default)]
pub struct SharedLimiter(Option<Arc<Mutex<Line>>>);

/// The tasks that wait for a limiter.
#[derive(Debug)]
struct Line {
    limiter: RateLimiter,
    /// Borrowers so far.
    borrowers: u64,
    first: Option<First>,
}

/// The borrower that waits first. Others do not pass it: a request that wants a full bucket would
/// never find one.
#[derive(Clone, Copy, Debug)]
struct First {
    id: u64,
    /// When it loses its place, unless it comes before.
    until: Instant,
}

impl Line {
    fn begin(&mut self, id: u64, bytes: u64, now: Instant) -> Result<(), Duration> {
        let is_behind = |first: First| first.id != id && now < first.until;
        // Without tokens: the bucket fills for the first in line, and this one looks again in a
        // millisecond.
        if self.first.is_some_and(is_behind) {
            return Err(BEHIND_ANOTHER);
        }
        let begun = self.limiter.begin(bytes, now);
        self.first = begun.err().map(|wait| First {
            id,
            until: now
                .checked_add(wait.saturating_add(PLACE_IS_KEPT))
                // So long a wait has no end; the borrower still comes every hour.
                .unwrap_or(now + LONGEST_TIMER + PLACE_IS_KEPT),
        });
        begun
    }
}

impl SharedLimiter {
    /// With full buckets.
    #[must_use]
    pub fn new(limits: RateLimits) -> Self {
        let limiter = RateLimiter::new(limits, Instant::now());
        Self(limiter.is_limiting().then(|| {
            Arc::new(Mutex::new(Line {
                limiter,
                borrowers: 0,
                first: None,
            }))
        }))
    }

    /// Lends it to a queue.
    #[must_use]
    pub fn lend(&self) -> LentLimiter {
        let id = self.0.as_ref().map_or(0, |line| {
            let mut line = line.lock();
            line.borrowers = line.borrowers.wrapping_add(1);
            line.borrowers
        });
        LentLimiter {
            line: self.0.clone(),
            id,
        }
    }
}

/// A [`SharedLimiter`], as one queue has it.
#[derive(Debug)]
pub struct LentLimiter {
    line: Option<Arc<Mutex<Line>>>,
    id: u64,
}

impl LentLimiter {
    /// Takes the tokens of an operation of `bytes`, or says how long it has to wait.
    ///
    /// # Errors
    /// The time after which to try again.
    pub fn begin(&self, bytes: u64) -> Result<(), Duration> {
        let Some(line) = &self.line else {
            return Ok(());
        };
        line.lock().begin(self.id, bytes, Instant::now())
    }
}

impl Drop for LentLimiter {
    fn drop(&mut self) {
        if let Some(line) = &self.line {
            // A queue that stops gives up its place at once, and others need not wait until it
            // expires.
            line.lock().first.take_if(|first| first.id == self.id);
        }
    }
}

/// A limiter as a task has it: the request at the front passes when it may, and the timer calls the
/// task again if it may not yet.
#[derive(Debug)]
pub struct Gate {
    limiter: LentLimiter,
    /// Absent where nothing is limited: a machine with hundreds of queues starts and stops sooner.
    timer: Option<Timer>,
    /// The timer was set and not cleared since.
    is_set: Cell<bool>,
    /// The request at the front has its tokens.
    is_open: bool,
}

impl Gate {
    /// Keeps to a device's limits, if it has some.
    ///
    /// # Errors
    /// Fails if the host cannot create a timer.
    pub fn new(limiter: &SharedLimiter) -> io::Result<Self> {
        Ok(Self {
            limiter: limiter.lend(),
            timer: limiter.0.is_some().then(Timer::new).transpose()?,
            is_set: Cell::new(false),
            is_open: false,
        })
    }

    /// Watches the descriptor that becomes ready when a request that had to wait may pass.
    ///
    /// # Errors
    /// When the host cannot watch it.
    pub fn watch(&self, sources: &mut TaskSources<'_, '_>, key: usize) -> io::Result<()> {
        match &self.timer {
            Some(timer) => sources.watch(timer.descriptor(), key, Interest::Read),
            None => Ok(()),
        }
    }

    /// Clears the descriptor.
    pub fn clear(&self) {
        // Most turns of a task waited for no limit, and need no system call for it.
        if let Some(timer) = &self.timer
            && self.is_set.take()
        {
            timer.clear();
        }
    }

    /// Returns whether the request at the front, which moves `bytes` bytes, may pass now. Its tokens are
    /// taken once, however often this is called, until [`Gate::close`].
    pub fn pass(&mut self, bytes: u64) -> bool {
        if !self.is_open {
            self.is_open = match self.limiter.begin(bytes) {
                Ok(()) => true,
                // A limit is then not kept: a queue that waited would wait for good.
                Err(wait) => self.wait(wait).is_err(),
            };
        }
        self.is_open
    }

    fn wait(&self, span: Duration) -> io::Result<()> {
        let timer = self.timer.as_ref().ok_or(io::ErrorKind::Unsupported)?;
        self.is_set.set(true);
        timer.set(span).inspect_err(|error| {
            tracing::error!(%error, "cannot set a device's timer");
        })
    }

    /// The request at the front has gone through: the next one needs tokens of its own.
    pub fn close(&mut self) {
        self.is_open = false;
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn limits(size: u64, burst: u64) -> RateLimits {
        RateLimits {
            bandwidth: Some(BucketConfig {
                size,
                one_time_burst: burst,
                refill_time: Duration::from_secs(1),
            }),
            ops: None,
        }
    }

    #[test]
    fn burst_is_spent_once() {
        let start = Instant::now();
        let mut limiter = RateLimiter::new(limits(100, 50), start);
        limiter.begin(150, start).unwrap();
        let wait = limiter.begin(50, start).unwrap_err();
        assert!((wait.as_secs_f64() - 0.5).abs() < 0.01, "{wait:?}");
        limiter.begin(50, start + wait).unwrap();
        let later = start + Duration::from_secs(60);
        limiter.begin(1000, later).unwrap();
        let wait = limiter.begin(1, later).unwrap_err();
        assert!((wait.as_secs_f64() - 9.01).abs() < 0.01, "{wait:?}");
    }

    #[test]
    fn no_limit_never_waits() {
        let now = Instant::now();
        let mut limiter = RateLimiter::new(limits(0, 0), now);
        assert!(!limiter.is_limiting());
        limiter.begin(u64::MAX, now).unwrap();
    }

    #[test]
    fn queues_share_a_limit() {
        let slow = RateLimits {
            ops: Some(BucketConfig {
                size: 3,
                one_time_burst: 1,
                refill_time: Duration::from_secs(10_000),
            }),
            bandwidth: None,
        };
        let shared = SharedLimiter::new(slow);
        let (one, other) = (shared.lend(), shared.lend());
        for queue in [&one, &other, &one] {
            queue.begin(1).unwrap();
        }
        drop(one);
        let again = shared.lend();
        again.begin(1).unwrap();
        assert!(again.begin(1).unwrap_err() > BEHIND_ANOTHER);
        // It stands behind, until the first one goes.
        assert_eq!(other.begin(1), Err(BEHIND_ANOTHER));
        drop(again);
        assert!(other.begin(1).unwrap_err() > BEHIND_ANOTHER);
        let unlimited = SharedLimiter::new(RateLimits::default()).lend();
        unlimited.begin(u64::MAX).unwrap();
    }

    #[test]
    fn borrower_that_stays_away_loses_its_place() {
        let shared = SharedLimiter::new(limits(10, 0));
        let line = shared.0.as_ref().unwrap();
        let (now, mut line) = (Instant::now(), line.lock());
        line.begin(1, 10, now).unwrap();
        let wait = line.begin(1, 10, now).unwrap_err();
        // It has its place while its wait lasts, and for a while more.
        let late = now + wait + PLACE_IS_KEPT / 2;
        assert_eq!(line.begin(2, 1, late), Err(BEHIND_ANOTHER));
        assert_eq!(line.begin(2, 1, now + wait + PLACE_IS_KEPT), Ok(()));
        assert!(line.first.is_none());
        // A wait without an end is none of a place.
        line.limiter = RateLimiter::new(
            RateLimits {
                bandwidth: Some(BucketConfig {
                    size: 1,
                    one_time_burst: 0,
                    refill_time: Duration::MAX,
                }),
                ops: None,
            },
            now,
        );
        line.begin(1, 1, now).unwrap();
        line.begin(1, 1, now).unwrap_err();
        assert_eq!(line.begin(2, 1, now), Err(BEHIND_ANOTHER));
    }

    #[test]
    fn large_request_is_not_starved() {
        let shared = SharedLimiter::new(RateLimits {
            bandwidth: Some(BucketConfig {
                size: 1000,
                one_time_burst: 0,
                refill_time: Duration::from_millis(50),
            }),
            ops: None,
        });
        let (large, small) = (shared.lend(), shared.lend());
        small.begin(500).unwrap();
        let from = Instant::now();
        while large.begin(2000).is_err() {
            assert!(from.elapsed() < Duration::from_secs(10), "it never passes");
            while small.begin(1).is_ok() {}
        }
    }

    proptest! {
        #[test]
        fn average_rate_stays_below_limit(requests in prop::collection::vec(1_u64..500, 1..200)) {
            let start = Instant::now();
            let mut now = start;
            let mut limiter = RateLimiter::new(limits(1000, 0), start);
            let mut passed = 0;
            for bytes in requests {
                while let Err(wait) = limiter.begin(bytes, now) {
                    now += wait + Duration::from_nanos(1);
                }
                passed += bytes;
                let allowed = 1000.0 * (1.0 + (now - start).as_secs_f64());
                prop_assert!(passed as f64 <= allowed + 1.0, "{passed} in {:?}", now - start);
            }
        }
    }
}
