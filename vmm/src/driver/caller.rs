//! Calls into a driver from other threads.
//!
//! The migration engine has threads of its own. What it needs of a machine it sends to the driver as a
//! closure, with the number of the machine in force: after a reset or an end of the guest the closure
//! is dropped, and the caller gets `machine-gone`.

use std::fmt;
use std::sync::mpsc;

use ::devices::event_loop::Sources;
use migration::Refusal;

use super::{Driver, DriverEvent, Events};

/// The machine number of calls that are for any machine.
pub(super) const ANY_MACHINE: u64 = u64::MAX;

/// A closure that the driver runs on its own thread.
pub(crate) struct Call(Job);

type Job = Box<dyn FnOnce(&mut Driver, &mut Sources<'_>) + Send>;

impl Call {
    pub(super) fn answer(self, driver: &mut Driver, sources: &mut Sources<'_>) {
        (self.0)(driver, sources);
    }
}

impl fmt::Debug for Call {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Call")
    }
}

/// Calls a driver from the migration engine's threads.
#[derive(Clone)]
pub(crate) struct Caller {
    /// The number of the machine. Calls fail once that machine was replaced or has ended.
    pub(super) machine: u64,
    pub(super) to: Events,
}

impl Caller {
    pub(crate) fn new(to: Events) -> Self {
        Self {
            machine: ANY_MACHINE,
            to,
        }
    }

    /// Returns a caller that is not bound to a machine.
    pub(crate) fn for_any_machine(&self) -> Self {
        Self::new(self.to.clone())
    }

    /// Returns whether the driver exists.
    pub(crate) fn is_there(&self) -> bool {
        self.to.is_open()
    }

    /// Runs `f` on the driver's thread, and waits for its result.
    pub(crate) fn call<R: Send + 'static>(
        &self,
        f: impl FnOnce(&mut Driver, &mut Sources<'_>) -> R + Send + 'static,
    ) -> Result<R, Refusal> {
        let (answer, answers) = mpsc::channel();
        // The driver drops the closure, and with it `answer`, when the number is out of date or the
        // driver ends. So `recv` below returns in each case. It waits while the stage is `Busy`:
        // the driver's own thread must not call this, or it would wait for itself.
        self.send(move |driver, sources| {
            // The caller may have gone.
            let _ = answer.send(f(driver, sources));
        });
        let gone = |_| Refusal::new("machine-gone", "the guest was reset or has ended");
        answers.recv().map_err(gone)
    }

    /// Runs `f` on the driver's thread, and does not wait for that.
    pub(super) fn send(&self, f: impl FnOnce(&mut Driver, &mut Sources<'_>) + Send + 'static) {
        let call = Call(Box::new(f));
        self.to.send((self.machine, DriverEvent::Call(call)));
    }

    /// Like [`Caller::attempt`], for work on another thread: `f` passes the sender on.
    pub(crate) fn attempt_later<R: Send + 'static>(
        &self,
        f: impl FnOnce(&mut Driver, mpsc::Sender<Result<R, Refusal>>) + Send + 'static,
    ) -> Result<R, Refusal> {
        let (answer, answers) = mpsc::channel();
        self.call(move |driver, _| f(driver, answer))?;
        let gone = |_| Refusal::new("machine-gone", "the guest was reset or has ended");
        answers.recv().map_err(gone)?
    }

    /// Like [`Caller::call`], for a fallible function.
    pub(crate) fn attempt<R: Send + 'static>(
        &self,
        f: impl FnOnce(&mut Driver) -> Result<R, Refusal> + Send + 'static,
    ) -> Result<R, Refusal> {
        self.call(move |driver, _| f(driver))?
    }
}
