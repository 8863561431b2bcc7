//! Queue tasks, and the event loops that run them.

use std::collections::HashMap;
use std::fmt;
use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

use devices::event_loop::{Actor, Flow, Interest, LoopHandle, Sources, Waker};
use devices::sandbox::Violation;
use parking_lot::Mutex;

use crate::queue::QueueError;
use crate::transport::Transport;

/// The event loops among which tasks are spread.
#[derive(Clone)]
pub struct Workers {
    shared: Arc<(Vec<LoopHandle>, AtomicUsize)>,
}

impl Workers {
    /// Returns workers that spread tasks among these loops; `None` without loops.
    #[must_use]
    pub fn new(loops: Vec<LoopHandle>) -> Option<Self> {
        (!loops.is_empty()).then(|| Self {
            shared: Arc::new((loops, AtomicUsize::new(0))),
        })
    }

    /// How many loops there are.
    #[must_use]
    pub fn count(&self) -> usize {
        self.shared.0.len()
    }

    /// One loop after the other.
    fn next(&self) -> &LoopHandle {
        let (loops, next) = &*self.shared;
        // `new` refuses an empty list. The counter only spreads the load, so no ordering is needed.
        &loops[next.fetch_add(1, Ordering::Relaxed) % loops.len()]
    }
}

impl fmt::Debug for Workers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Workers({})", self.count())
    }
}

/// Why a task is called.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TaskEvent {
    /// The first call. The queue may hold chains already, without a kick.
    Started,
    /// The descriptor with this key is ready (edge triggered: continue until it would block).
    Ready(usize),
    /// The task asked for it with [`TaskFlow::Again`], its timer expired, or [`Running::wake`] was
    /// used.
    Again,
}

/// A task's next step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TaskFlow {
    /// To hear of what it watches.
    Wait,
    /// There is more to do. It is called again when the others on its loop have had their turn:
    /// no guest may keep a loop to itself.
    Again,
}

/// Serves one queue or several.
pub trait QueueTask: Send + 'static {
    /// Begins to watch the descriptors that signal work. Called before the other methods.
    ///
    /// # Errors
    /// Fails if the host cannot watch something; the device then needs a reset.
    fn watch(&mut self, sources: &mut TaskSources<'_, '_>) -> io::Result<()>;

    /// Does what there is to do, for some tens of requests at most.
    ///
    /// # Errors
    /// Fails if the guest broke the rules: the device needs a reset and the task is called no more.
    fn call(
        &mut self,
        event: TaskEvent,
        sources: &mut TaskSources<'_, '_>,
    ) -> Result<TaskFlow, QueueError>;
}

/// Owners of the watched descriptors, by key.
type Watched = HashMap<usize, Box<dyn AsRawFd + Send>>;

/// A task's access to its loop: watching descriptors.
pub struct TaskSources<'a, 'b> {
    sources: &'a mut Sources<'b>,
    watched: &'a mut Watched,
}

impl TaskSources<'_, '_> {
    /// Watches a descriptor, in place of what was watched as `key` before. What holds it open
    /// (a shared one, or a duplicate) is kept for as long: the number of a descriptor that is
    /// closed may come to mean another while it is still being watched.
    ///
    /// # Errors
    /// Fails if the host cannot watch it, as it is with a regular file.
    pub fn watch<F>(&mut self, fd: F, key: usize, interest: Interest) -> io::Result<()>
    where
        F: AsRawFd + Send + 'static,
    {
        self.forget(key);
        // The owner is kept only if the kernel took the descriptor: a failed watch leaves nothing
        // behind.
        self.sources.watch(fd.as_raw_fd(), key, interest)?;
        self.watched.insert(key, Box::new(fd));
        Ok(())
    }

    /// Sets the task's only timer: it is called with [`TaskEvent::Again`] at `when` or soon after.
    pub fn wake_at(&mut self, when: Option<Instant>) {
        self.sources.wake_at(when);
    }

    /// Ends the watch, if there is one.
    pub fn forget(&mut self, key: usize) {
        if let Some(own) = self.watched.remove(&key) {
            self.sources.forget(own.as_raw_fd());
        }
    }
}

/// A task that has been started, seen by its device.
pub struct Running<T: QueueTask> {
    slot: Arc<Mutex<Option<T>>>,
    waker: Waker,
}

impl<T: QueueTask> Running<T> {
    /// Starts `task` on one of the loops.
    pub fn start(workers: &Workers, transport: &Arc<Transport>, task: T) -> Self {
        let slot = Arc::new(Mutex::new(Some(task)));
        workers.next().adopt(|waker| {
            let actor = TaskActor {
                slot: Arc::clone(&slot),
                transport: Arc::clone(transport),
                waker: waker.clone(),
                stage: Stage::New,
                watched: HashMap::new(),
            };
            (actor, Self { slot, waker })
        })
    }

    /// Takes the task from its loop. If it is being called on another thread this waits for the
    /// end of that call.
    #[must_use]
    pub fn stop(self) -> Option<T> {
        // The lock is held for the whole of a call, so on return the task runs nowhere, and its
        // queue and chains belong to the caller.
        self.slot.lock().take()
        // Dropping `self` tells the loop.
    }

    /// Looks at the task, or changes it, between two of its calls.
    pub fn with<R>(&self, f: impl FnOnce(&mut T) -> R) -> Option<R> {
        self.slot.lock().as_mut().map(f)
    }

    /// Has the task called with [`TaskEvent::Again`].
    pub fn wake(&self) {
        self.waker.wake();
    }
}

impl<T: QueueTask> Drop for Running<T> {
    fn drop(&mut self) {
        // Without a lock: a task may be what drops its own device, when it lets go of the last
        // view of a map that is gone. It then ends with its call.
        self.waker.dismiss();
    }
}

impl<T: QueueTask> fmt::Debug for Running<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Running")
    }
}

enum Stage {
    New,
    Started,
    /// The task has ended; its owner may still take it.
    Ended,
}

/// A task, seen by its loop.
struct TaskActor<T> {
    slot: Arc<Mutex<Option<T>>>,
    transport: Arc<Transport>,
    waker: Waker,
    stage: Stage,
    watched: Watched,
}

impl<T: QueueTask> TaskActor<T> {
    fn call(&mut self, event: TaskEvent, sources: &mut Sources<'_>) -> Flow {
        let mut slot = self.slot.lock();
        let Some(task) = slot.as_mut() else {
            return Flow::Leave;
        };
        if self.transport.is_broken() {
            // A queue beside this one broke the rules: nothing of the device is served until its
            // driver resets it, which stops this task.
            self.stage = Stage::Ended;
        }
        let mut own = TaskSources {
            sources,
            watched: &mut self.watched,
        };
        let outcome = match self.stage {
            Stage::Ended => return Flow::Stay,
            Stage::New => {
                self.stage = Stage::Started;
                match task.watch(&mut own) {
                    Ok(()) => task.call(TaskEvent::Started, &mut own),
                    Err(error) => {
                        self.stage = Stage::Ended;
                        let why = format!("cannot wait for events: {error}");
                        self.transport.needs_reset(&why);
                        return Flow::Stay;
                    }
                }
            }
            Stage::Started => task.call(event, &mut own),
        };
        match outcome {
            Ok(TaskFlow::Wait) => {}
            // By the loop's queue of commands, behind all events and wakes that are there now.
            Ok(TaskFlow::Again) => self.waker.wake(),
            Err(error) => {
                self.stage = Stage::Ended;
                // The task stays in its slot: the reset of the driver takes it, and frees its
                // chains.
                self.transport.needs_reset(&error.to_string());
            }
        }
        Flow::Stay
    }
}

impl<T: QueueTask> Actor for TaskActor<T> {
    fn woken(&mut self, sources: &mut Sources<'_>) -> Flow {
        self.call(TaskEvent::Again, sources)
    }

    fn ready(&mut self, key: usize, sources: &mut Sources<'_>) -> Flow {
        self.call(TaskEvent::Ready(key), sources)
    }

    fn crashed(&mut self, message: &str) {
        self.transport
            .needs_reset(&format!("the device failed: {message}"));
    }

    fn violated(&mut self, violation: &Violation) {
        self.transport.violated(violation);
    }
}
