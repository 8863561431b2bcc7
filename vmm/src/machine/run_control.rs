//! Telling vCPU threads to run, to park or to end, and knowing when they have.
//!
//! One [`RunControl`] a machine. The driver sets what it *wants* and kicks; a vCPU thread looks at
//! [`RunControl::wanted`] after each exit (one atomic load) and, unless that is [`Want::Run`],
//! goes to [`RunControl::park`].
//!
//! ```text
//!            want Run                     want Run
//!   parked ───────────► running ──► ... ◄─────────── parked
//!     ▲                    │ exit or kick               │ want End
//!     └────── want Park ───┘                            ▼
//!                                                     ended
//! ```
//!
//! vCPUs come and go with CPU hotplug: [`RunControl::enroll`] adds a thread, and a [`Dismissal`] ends one
//! while the others run.
//!
//! No wake-up is lost: the wish is stored before the kick, and the kick makes the next or the
//! present `KVM_RUN` return.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use hypervisor::Kicker;
use parking_lot::{Condvar, Mutex, MutexGuard};

/// The driver's wish for the vCPU threads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Want {
    /// Be out of `KVM_RUN` and wait.
    Park = 0,
    /// Run the guest.
    Run = 1,
    /// Return from the thread.
    End = 2,
}

/// Ends one vCPU's thread, whatever is wanted of the others.
#[derive(Clone, Default)]
pub(crate) struct Dismissal(Arc<AtomicBool>);

/// Shared between the driver and the vCPU threads of one machine.
pub(crate) struct RunControl {
    want: AtomicU8,
    running: Mutex<usize>,
    /// The ways to get the vCPUs out of the guest, by their numbers.
    kickers: Mutex<BTreeMap<u32, Kicker>>,
    /// Counts the calls of [`Self::nudge`].
    nudges: AtomicU64,
    /// vCPUs that are interrupted wait until then.
    throttled: Mutex<Option<Instant>>,
    changed: Condvar,
}

/// vCPU threads that did not leave the guest in time.
#[derive(Debug, thiserror::Error)]
#[error("{still_running} of the vCPU threads did not leave the guest within {} ms", waited.as_millis())]
pub(crate) struct NotParked {
    pub(crate) still_running: usize,
    pub(crate) waited: Duration,
}

impl RunControl {
    /// For threads that are still to [enroll](Self::enroll).
    pub(crate) fn new() -> Self {
        Self {
            want: AtomicU8::new(Want::Park as u8),
            running: Mutex::new(0),
            kickers: Mutex::default(),
            nudges: AtomicU64::new(0),
            throttled: Mutex::new(None),
            changed: Condvar::new(),
        }
    }

    /// Adds the thread of a vCPU, before it starts: it counts as running until it calls
    /// [`Self::park`].
    pub(crate) fn enroll(&self, vcpu: u32, kicker: Kicker) {
        // Counted before the thread exists: a pause that comes first waits for it. Its own count
        // could come after that pause had found none running.
        *self.running.lock() += 1;
        self.kickers.lock().insert(vcpu, kicker);
    }

    /// Takes back [`Self::enroll`], of a thread that did not start.
    pub(crate) fn withdraw(&self, vcpu: u32) {
        *self.running.lock() -= 1;
        self.kickers.lock().remove(&vcpu);
        self.changed.notify_all();
    }

    /// Gets all vCPUs out of the guest, to see what is wanted.
    pub(crate) fn kick(&self) {
        self.kickers.lock().values().for_each(Kicker::kick);
    }

    /// Has the thread of one vCPU end, which does not run the guest again.
    pub(crate) fn dismiss(&self, vcpu: u32, dismissal: &Dismissal) {
        dismissal.0.store(true, Ordering::Release);
        self.nudge();
        if let Some(kicker) = self.kickers.lock().remove(&vcpu) {
            kicker.kick();
        }
    }

    /// Returns what is wanted of a thread: that of all, unless it was dismissed.
    pub(crate) fn wanted_of(&self, thread: &Dismissal) -> Want {
        match thread.0.load(Ordering::Acquire) {
            true => Want::End,
            false => self.wanted(),
        }
    }

    /// Returns the driver's present wish.
    pub(crate) fn wanted(&self) -> Want {
        match self.want.load(Ordering::Acquire) {
            0 => Want::Park,
            1 => Want::Run,
            _ => Want::End,
        }
    }

    /// Says what is wanted from now on. [`Want::End`] is final. The caller kicks the vCPUs next,
    /// where it wants them out.
    pub(crate) fn want(&self, want: Want) {
        // Under the lock of the condition variable: a thread between its check and its wait would
        // miss the notification.
        let _running = self.running.lock();
        // The end may come from any thread. A driver that resumes at the same moment must not undo
        // it.
        if self.wanted() != Want::End {
            self.want.store(want as u8, Ordering::Release);
        }
        self.changed.notify_all();
    }

    /// Has vCPUs that are interrupted wait until then, before they run again.
    pub(crate) fn throttle_until(&self, then: Instant) {
        *self.throttled.lock() = Some(then);
    }

    /// Called by an interrupted vCPU thread: waits for its share of throttling, or until the wish is no
    /// longer to run.
    pub(crate) fn rest_if_throttled(&self) {
        // The guard is dropped here: `throttle_until` must not wait while a vCPU rests.
        let Some(until) = *self.throttled.lock() else {
            return;
        };
        let mut running = self.running.lock();
        while self.wanted() == Want::Run
            && !self.changed.wait_until(&mut running, until).timed_out()
        {}
    }

    /// Has parked threads look for work.
    pub(crate) fn nudge(&self) {
        let _running = self.running.lock();
        self.nudges.fetch_add(1, Ordering::Relaxed);
        self.changed.notify_all();
    }

    /// Called by a vCPU thread that is out of the guest: counts it as parked until the driver
    /// wants it to run (then it counts as running again) or to end. While it is parked it does
    /// `work`, at first and after each nudge.
    pub(crate) fn park(&self, thread: &Dismissal, work: impl FnMut()) -> Want {
        self.rest(thread, work, |want| want != Want::Park)
    }

    /// Called by a vCPU thread whose guest cannot continue: counts it as parked and waits for the
    /// end.
    pub(crate) fn park_for_good(&self, thread: &Dismissal, work: impl FnMut()) {
        self.rest(thread, work, |want| want == Want::End);
    }

    fn rest(
        &self,
        thread: &Dismissal,
        mut work: impl FnMut(),
        is_over: impl Fn(Want) -> bool,
    ) -> Want {
        let mut running = self.running.lock();
        // Parked is announced before the work: a job may take long, and the vCPU is out of the guest.
        *running -= 1;
        self.changed.notify_all();
        loop {
            // Read under the lock, before the work: a nudge that comes during the work differs and
            // repeats it.
            let nudges = self.nudges.load(Ordering::Relaxed);
            // Without the lock: a job reads vCPU state by slow system calls, and other vCPUs park
            // meanwhile.
            MutexGuard::unlocked(&mut running, &mut work);
            self.changed.wait_while(&mut running, |_| {
                !is_over(self.wanted_of(thread)) && self.nudges.load(Ordering::Relaxed) == nudges
            });
            let want = self.wanted_of(thread);
            if is_over(want) {
                // Counted here and not by the thread later: a pause that follows at once must wait
                // for this vCPU.
                if want == Want::Run {
                    *running += 1;
                }
                return want;
            }
        }
    }

    /// Waits as [`Self::wait_parked`] does, but after `patience` only warns, and fails after `limit`. On a
    /// host without idle CPUs a vCPU thread leaves the guest when the scheduler next runs it, which may
    /// take long and is no error.
    pub(crate) fn wait_parked_longer(
        &self,
        patience: Duration,
        limit: Duration,
    ) -> Result<(), NotParked> {
        let Err(late) = self.wait_parked(patience) else {
            return Ok(());
        };
        tracing::warn!(limit_s = limit.as_secs(), "{late}: waiting on");
        self.wait_parked(limit.saturating_sub(patience))
            .map_err(|still| NotParked {
                waited: patience + still.waited,
                ..still
            })
    }

    /// Waits until every thread is parked or has ended.
    pub(crate) fn wait_parked(&self, patience: Duration) -> Result<(), NotParked> {
        let start = Instant::now();
        let mut running = self.running.lock();
        while *running > 0 {
            if self
                .changed
                .wait_until(&mut running, start + patience)
                .timed_out()
                && *running > 0
            {
                return Err(NotParked {
                    still_running: *running,
                    waited: start.elapsed(),
                });
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::AtomicU64;
    use std::thread;

    use super::*;

    const PATIENCE: Duration = Duration::from_secs(10);

    fn control_of(threads: u32) -> Arc<RunControl> {
        let control = RunControl::new();
        (0..threads).for_each(|vcpu| control.enroll(vcpu, Kicker::default()));
        Arc::new(control)
    }

    fn spinner(control: &Arc<RunControl>, work: &Arc<AtomicU64>) -> thread::JoinHandle<()> {
        let (control, work) = (Arc::clone(control), Arc::clone(work));
        thread::spawn(move || {
            while control.park(&Dismissal::default(), || {}) == Want::Run {
                while control.wanted() == Want::Run {
                    work.fetch_add(1, Ordering::Relaxed);
                    thread::yield_now();
                }
            }
        })
    }

    #[test]
    fn parked_vcpus_do_not_run() {
        let (control, work) = (control_of(3), Arc::new(AtomicU64::new(0)));
        let threads: Vec<_> = (0..3).map(|_| spinner(&control, &work)).collect();
        for _ in 0..200 {
            control.wait_parked(PATIENCE).unwrap();
            let before = work.load(Ordering::Relaxed);
            thread::yield_now();
            assert_eq!(work.load(Ordering::Relaxed), before);
            control.want(Want::Run);
            while work.load(Ordering::Relaxed) == before {
                thread::yield_now();
            }
            control.want(Want::Park);
        }
        control.want(Want::End);
        for thread in threads {
            thread.join().unwrap();
        }
        control.want(Want::Run);
        assert_eq!(control.wanted(), Want::End);
    }

    #[test]
    fn parked_vcpu_runs_nudged_work() {
        let control = control_of(1);
        let (orders, inbox) = std::sync::mpsc::channel::<u64>();
        let (done, answers) = std::sync::mpsc::channel();
        let shared = Arc::clone(&control);
        let thread = thread::spawn(move || {
            let work = || inbox.try_iter().for_each(|order| done.send(order).unwrap());
            shared.park(&Dismissal::default(), work)
        });
        for order in 0..1000 {
            orders.send(order).unwrap();
            control.nudge();
            assert_eq!(answers.recv_timeout(PATIENCE).unwrap(), order);
        }
        control.want(Want::End);
        assert_eq!(thread.join().unwrap(), Want::End);
    }

    #[test]
    fn names_threads_that_do_not_stop() {
        let control = control_of(2);
        let late = control.wait_parked(Duration::from_millis(1)).unwrap_err();
        assert_eq!(late.still_running, 2);
        let (patience, limit) = (Duration::from_millis(1), Duration::from_millis(3));
        let late = control.wait_parked_longer(patience, limit).unwrap_err();
        assert!(late.still_running == 2 && late.waited >= limit);
    }

    #[test]
    fn starved_thread_is_waited_for_beyond_the_warning() {
        let control = control_of(1);
        let starved = Arc::clone(&control);
        let thread = thread::spawn(move || {
            thread::sleep(Duration::from_millis(50));
            starved.park(&Dismissal::default(), || {})
        });
        control
            .wait_parked_longer(Duration::from_millis(1), PATIENCE)
            .unwrap();
        control.want(Want::End);
        assert_eq!(thread.join().unwrap(), Want::End);
    }

    #[test]
    fn dismissed_vcpu_ends_while_others_run() {
        for before in [Want::Park, Want::Run] {
            let (control, work) = (control_of(2), Arc::new(AtomicU64::new(0)));
            let other = spinner(&control, &work);
            let dismissal = Dismissal::default();
            let (shared, thread) = (Arc::clone(&control), dismissal.clone());
            let dismissed = thread::spawn(move || {
                while shared.park(&thread, || {}) == Want::Run {
                    while shared.wanted_of(&thread) == Want::Run {
                        thread::yield_now();
                    }
                }
            });
            control.want(before);
            control.dismiss(1, &dismissal);
            dismissed.join().unwrap();
            // One that is gone does not count, however often the others run.
            control.want(Want::Run);
            control.want(Want::Park);
            control.wait_parked(PATIENCE).unwrap();
            control.want(Want::End);
            other.join().unwrap();
        }
    }
}
