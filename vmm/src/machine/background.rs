//! Work that may block, away from the threads that VMs share.
//!
//! Unmapping a guest's RAM takes about 80 ms for each GiB, and a device that waits for hung storage
//! stops when the storage answers. Drivers hand such work to [`Background`]. A [`Machine`] does so
//! by itself: on whatever thread it is dropped, another takes it apart.

use std::ops::{Deref, DerefMut};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::Builder;
use std::time::{Duration, Instant};

use devices::event_loop::panic_message;
use parking_lot::{Condvar, Mutex};

use super::Active;

/// Idle threads that are kept for the next job. A process with one VM needs two at most: one takes
/// the old machine apart while the other builds the next.
///
/// A kept thread never ends while a client looks: libvirt lists the threads of the process after
/// `vm.boot` was answered and moves each into a cgroup. A listed thread that ended meanwhile fails
/// the start of its VM.
const IDLE_MAX: usize = 2;

type Job = Box<dyn FnOnce() + Send>;

/// Runs jobs on threads of their own: one that hangs holds up no other.
#[derive(Clone)]
pub(crate) struct Background {
    jobs: Sender<Job>,
    unfinished: Arc<(Mutex<usize>, Condvar)>,
}

impl Background {
    /// Starts the thread that hands out the jobs.
    ///
    /// # Errors
    /// Fails if the host cannot start a thread.
    pub(crate) fn start() -> std::io::Result<Self> {
        let (jobs, inbox) = channel::<Job>();
        let unfinished = Arc::default();
        Builder::new()
            .name("background".to_owned())
            .spawn(move || {
                let idle = IdleThreads::default();
                inbox.into_iter().for_each(|job| idle.run(job));
                idle.close();
            })?;
        Ok(Self { jobs, unfinished })
    }

    /// Runs a job on a thread of its own, with the caller's log span. Never blocks. Where the host
    /// gives no more threads, jobs run one after the other.
    pub(crate) fn run(&self, job: impl FnOnce() + Send + 'static) {
        let (span, counted) = (tracing::Span::current(), Unfinished::new(&self.unfinished));
        let job = Box::new(move || {
            let _counted = counted;
            let _entered = span.entered();
            if let Err(panic) = catch_unwind(AssertUnwindSafe(job)) {
                let message = panic_message(panic.as_ref());
                tracing::error!(message, "a background job panicked");
            }
        });
        // The thread lives as long as `self.jobs`.
        let _ = self.jobs.send(job);
    }

    /// Waits until all jobs are done, and returns whether they are.
    pub(crate) fn wait(&self, patience: Duration) -> bool {
        let (count, changed) = &*self.unfinished;
        let (mut count, deadline) = (count.lock(), Instant::now() + patience);
        while *count > 0 {
            if changed.wait_until(&mut count, deadline).timed_out() {
                return *count == 0;
            }
        }
        true
    }
}

/// The threads that wait for a job, each at the other end of a channel. `None` after [`Self::close`].
#[derive(Clone)]
struct IdleThreads(Arc<Mutex<Option<Vec<Sender<Job>>>>>);

impl Default for IdleThreads {
    fn default() -> Self {
        Self(Arc::new(Mutex::new(Some(Vec::new()))))
    }
}

impl IdleThreads {
    /// Gives the job to a thread that is idle, or to a new one.
    fn run(&self, job: Job) {
        let idle = self.0.lock().as_mut().and_then(Vec::pop);
        // A thread in the list waits for its job, so it receives this one.
        let unsent = match idle {
            Some(thread) => thread.send(job).err().map(|unsent| unsent.0),
            None => Some(job),
        };
        if let Some(job) = unsent {
            self.start(job);
        }
    }

    fn start(&self, job: Job) {
        let (slot, idle) = (Arc::new(Mutex::new(Some(job))), self.clone());
        // The job survives a spawn that fails, which would drop a closure that owns it.
        let take = Arc::clone(&slot);
        let run = move || {
            let mut next = take.lock().take();
            while let Some(job) = next.take() {
                job();
                next = idle.join().and_then(|inbox| inbox.recv().ok());
            }
        };
        if let Err(error) = Builder::new().name("vm-work".to_owned()).spawn(run) {
            tracing::warn!(%error, "cannot start a thread: background jobs run one after another");
            let job = slot.lock().take();
            job.into_iter().for_each(|job| job());
        }
    }

    /// Makes the calling thread one of those that wait, unless there are enough.
    fn join(&self) -> Option<Receiver<Job>> {
        let mut idle = self.0.lock();
        // `None` after `close`: the thread ends, and with it the last reference to the list.
        let idle = idle.as_mut().filter(|idle| idle.len() < IDLE_MAX)?;
        let (jobs, inbox) = channel();
        idle.push(jobs);
        Some(inbox)
    }

    /// Ends the threads that wait, and those that work when they are done.
    fn close(&self) {
        *self.0.lock() = None;
    }
}

/// Counts a job until it is done, or dropped.
struct Unfinished(Arc<(Mutex<usize>, Condvar)>);

impl Unfinished {
    fn new(of: &Arc<(Mutex<usize>, Condvar)>) -> Self {
        *of.0.lock() += 1;
        Self(Arc::clone(of))
    }
}

impl Drop for Unfinished {
    fn drop(&mut self) {
        let (count, changed) = &*self.0;
        *count.lock() -= 1;
        changed.notify_all();
    }
}

/// An active machine that does not block the thread that drops it.
pub(crate) struct Machine {
    active: Option<Box<Active>>,
    background: Background,
}

impl Machine {
    pub(crate) fn new(active: Active, background: &Background) -> Self {
        Self {
            active: Some(Box::new(active)),
            background: background.clone(),
        }
    }

    /// Stops the guest at once, and has the machine taken apart. `gone` is called, on another
    /// thread, when all that the machine had is given back.
    pub(crate) fn end(mut self, gone: impl FnOnce() + Send + 'static) {
        self.take_apart(gone);
    }

    fn take_apart(&mut self, gone: impl FnOnce() + Send + 'static) {
        let Some(active) = self.active.take() else {
            return;
        };
        // Here, and not on the other thread: from the return on the guest executes nothing, even if
        // the host gives no thread for a while.
        active.halter().halt();
        self.background.run(move || {
            drop(active);
            gone();
        });
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        self.take_apart(|| {});
    }
}

/// Nothing but the end takes the machine out.
const TAKEN: &str = "a machine is there until its end";

impl Deref for Machine {
    type Target = Active;

    #[expect(
        clippy::expect_used,
        reason = "only `end` and `drop` take it, and own `self`"
    )]
    fn deref(&self) -> &Active {
        self.active.as_deref().expect(TAKEN)
    }
}

impl DerefMut for Machine {
    #[expect(
        clippy::expect_used,
        reason = "only `end` and `drop` take it, and own `self`"
    )]
    fn deref_mut(&mut self) -> &mut Active {
        self.active.as_deref_mut().expect(TAKEN)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PATIENCE: Duration = Duration::from_secs(10);

    #[test]
    fn hung_job_delays_no_other() {
        let background = Background::start().unwrap();
        let (go, held) = channel::<()>();
        background.run(move || {
            // Until the test lets it go.
            let _ = held.recv();
        });
        background.run(|| panic!("as a test has it"));
        let (done, heard) = channel();
        background.run(move || done.send(()).unwrap());
        heard.recv_timeout(PATIENCE).unwrap();
        assert!(!background.wait(Duration::from_millis(1)), "one hangs");
        drop(go);
        assert!(background.wait(PATIENCE));
    }

    /// Runs a job, waits for its end, and returns its thread.
    fn thread_of_a_job(idle: &IdleThreads) -> std::thread::ThreadId {
        let (done, heard) = channel();
        idle.run(Box::new(move || {
            done.send(std::thread::current().id()).unwrap();
        }));
        let thread = heard.recv_timeout(PATIENCE).unwrap();
        let deadline = Instant::now() + PATIENCE;
        while idle.0.lock().as_ref().unwrap().is_empty() {
            assert!(Instant::now() < deadline, "the thread did not stay");
            std::thread::yield_now();
        }
        thread
    }

    #[test]
    fn thread_stays_after_its_job_and_takes_the_next() {
        let idle = IdleThreads::default();
        let first = thread_of_a_job(&idle);
        assert_eq!(thread_of_a_job(&idle), first);
    }

    #[test]
    fn idle_threads_are_few_and_end_when_closed() {
        let idle = IdleThreads::default();
        let waiting: Vec<_> = (0..IDLE_MAX).filter_map(|_| idle.join()).collect();
        assert_eq!(waiting.len(), IDLE_MAX);
        assert!(idle.join().is_none());
        idle.close();
        assert!(waiting.iter().all(|inbox| inbox.recv().is_err()));
        assert!(idle.join().is_none());
    }
}
