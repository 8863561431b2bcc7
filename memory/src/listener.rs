//! Listeners: receivers of changes.
//!
//! A subscription is a [`ListenerHandle`]. Dropping it ends the subscription and waits until
//! no commit calls the listener any more. On the committing thread itself, where that wait
//! would be a deadlock, the drop returns at once and takes effect when the present commit ends. So
//! no listener is called after its handle was dropped, and callers need no grace period.

use std::sync::Arc;

use crate::change::ViewChange;
use crate::error::ListenerError;
use crate::sync::thread::{self, ThreadId};
use crate::sync::{Condvar, Mutex};

/// A receiver of commits: called once for each commit that changes an address space, on the committing
/// thread.
///
/// The views are arguments: a listener needs, and should have, no other way to look at the map
/// while it is changing. It may not wait for a thread that could be waiting to commit.
pub trait MemoryListener: Send + Sync {
    /// Checks whether the change can be made. Nothing has happened yet, and if any listener
    /// refuses, nothing will.
    ///
    /// # Errors
    /// A [`ListenerError`] that says what is not possible. The commit then fails with it.
    fn prepare(&self, change: &ViewChange) -> Result<(), ListenerError>;

    /// Makes the change. Readers see the new view already.
    ///
    /// # Errors
    /// Only for failures that `prepare` could not foresee. The topology refuses all changes from then on.
    fn apply(&self, change: &ViewChange) -> Result<(), ListenerError>;
}

struct State {
    listener: Option<Arc<dyn MemoryListener>>,
    closed: bool,
    /// The thread whose commit is calling the listener.
    committing: Option<ThreadId>,
}

/// One subscription, shared by its handle and the topology.
pub(crate) struct Subscription {
    state: Mutex<State>,
    left: Condvar,
}

impl Subscription {
    pub(crate) fn new(listener: Arc<dyn MemoryListener>) -> Arc<Self> {
        let state = State {
            listener: Some(listener),
            closed: false,
            committing: None,
        };
        Arc::new(Self {
            state: Mutex::new(state),
            left: Condvar::new(),
        })
    }

    /// Enters a commit: until the result is dropped, the handle's drop waits (except on this
    /// thread). `None` when the subscription has ended.
    pub(crate) fn enter(self: &Arc<Self>) -> Option<Entered> {
        let mut state = self.state.lock();
        let listener = state.listener.clone().filter(|_| !state.closed)?;
        // One slot is enough: a commit borrows the topology mutably, so a subscription is in one
        // commit at a time.
        state.committing = Some(thread::current().id());
        Some(Entered {
            listener: Some(listener),
            subscription: Arc::clone(self),
        })
    }

    pub(crate) fn is_closed(&self) -> bool {
        self.state.lock().closed
    }

    fn close(&self) {
        let mut state = self.state.lock();
        state.closed = true;
        // The callback itself dropped the handle. This thread would wait for its own commit to end,
        // which is a deadlock. `Entered::drop` completes the close instead.
        if state.committing == Some(thread::current().id()) {
            return;
        }
        // `closed` is set already and keeps later commits out, so this waits for one commit at
        // most.
        while state.committing.is_some() {
            self.left.wait(&mut state);
        }
        let listener = state.listener.take();
        drop(state);
        // Outside the lock: the listener's own drop may do anything.
        drop(listener);
    }
}

/// A listener that is taking part in a commit.
pub(crate) struct Entered {
    listener: Option<Arc<dyn MemoryListener>>,
    subscription: Arc<Subscription>,
}

impl Entered {
    pub(crate) fn listener(&self) -> Option<&dyn MemoryListener> {
        self.listener.as_deref()
    }
}

impl Drop for Entered {
    fn drop(&mut self) {
        // Before the waiting threads continue: from then on no call is possible.
        self.listener = None;
        let mut state = self.subscription.state.lock();
        state.committing = None;
        // If `close` ran on this thread, it left the listener here for us to drop. If it waits on
        // another thread, either side may take the listener: the lock makes sure that one does.
        let ended = if state.closed {
            state.listener.take()
        } else {
            None
        };
        self.subscription.left.notify_all();
        drop(state);
        // Outside the lock, as in `close`.
        drop(ended);
    }
}

/// A subscription to the changes of an address space; ends when dropped.
#[must_use = "dropping the handle ends the subscription"]
pub struct ListenerHandle {
    pub(crate) subscription: Arc<Subscription>,
}

impl Drop for ListenerHandle {
    fn drop(&mut self) {
        self.subscription.close();
    }
}

impl std::fmt::Debug for ListenerHandle {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("ListenerHandle")
    }
}

#[cfg(all(test, feature = "loom"))]
mod model {
    use loom::sync::atomic::{AtomicBool, Ordering};

    use super::*;
    use crate::flat_view::FlatView;

    struct Probe {
        gone: Arc<AtomicBool>,
    }

    impl MemoryListener for Probe {
        fn prepare(&self, _: &ViewChange) -> Result<(), ListenerError> {
            Ok(())
        }

        fn apply(&self, _: &ViewChange) -> Result<(), ListenerError> {
            assert!(
                !self.gone.load(Ordering::SeqCst),
                "called after its handle was dropped"
            );
            Ok(())
        }
    }

    #[test]
    fn no_callback_after_the_handle_is_dropped() {
        loom::model(|| {
            let gone = Arc::new(AtomicBool::new(false));
            let subscription = Subscription::new(Arc::new(Probe {
                gone: Arc::clone(&gone),
            }));
            let handle = ListenerHandle {
                subscription: Arc::clone(&subscription),
            };
            let committer = loom::thread::spawn(move || {
                let none = Arc::new(FlatView::empty());
                let change = ViewChange::between(Arc::clone(&none), none);
                for _ in 0..2 {
                    if let Some(entered) = subscription.enter() {
                        let listener = entered.listener().expect("it is there while a commit is");
                        listener.apply(&change).expect("it does not refuse");
                    }
                }
            });
            drop(handle);
            gone.store(true, Ordering::SeqCst);
            committer.join().expect("no assertion failed");
        });
    }

    #[test]
    fn drop_in_commit_does_not_deadlock() {
        loom::model(|| {
            let gone = Arc::new(AtomicBool::new(false));
            let subscription = Subscription::new(Arc::new(Probe { gone }));
            let handle = ListenerHandle {
                subscription: Arc::clone(&subscription),
            };
            let entered = subscription.enter();
            drop(handle);
            drop(entered);
            assert!(subscription.enter().is_none());
        });
    }
}
