//! The sandbox as the layers below the program see it: a hook at the start of each thread that
//! handles data of a guest, and the system calls that this thread was refused.
//!
//! The program decides what the kernel allows a [`ThreadKind`], and by which means. A thread
//! enters its sandbox before it touches anything of a guest, and its owner looks at
//! [`Confinement::violation`] after each piece of work. So a violation ends the VM for which the
//! thread worked, and no other.

use std::fmt;
use std::io;

/// The work of a thread, which decides the system calls that it may make.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ThreadKind {
    /// Runs a guest, and answers its accesses.
    Vcpu,
    /// Serves the queues of devices.
    Devices,
    /// Runs the drivers of VMs, which open host resources and start all other threads. Threads
    /// inherit the rules of the thread that starts them: this kind has the rules of the process.
    Drivers,
}

/// A system call that the sandbox refused. The call failed with `EPERM`.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("thread `{thread}` made the system call {syscall}, which the sandbox refuses")]
pub struct Violation {
    /// The thread's name.
    pub thread: String,
    /// The name and number of the system call.
    pub syscall: String,
}

/// A means to confine threads.
pub trait Sandbox: fmt::Debug + Send + Sync {
    /// Confines the calling thread, for good.
    ///
    /// # Errors
    /// Fails if the kernel refuses. The thread must not do its work then.
    fn enter(&self, kind: ThreadKind) -> io::Result<()>;

    /// Takes the last system call that the calling thread was refused, if there is one.
    fn violation(&self) -> Option<Violation>;
}

/// The sandbox of this process, or none.
#[derive(Clone, Copy, Debug, Default)]
pub struct Confinement(Option<&'static dyn Sandbox>);

impl Confinement {
    /// Confines threads by these means.
    #[must_use]
    pub fn new(sandbox: &'static dyn Sandbox) -> Self {
        Self(Some(sandbox))
    }

    /// Confines the calling thread, for good.
    ///
    /// # Errors
    /// Fails if the kernel refuses. The thread must not do its work then.
    pub fn enter(&self, kind: ThreadKind) -> io::Result<()> {
        self.0.map_or(Ok(()), |sandbox| sandbox.enter(kind))
    }

    /// Takes the last system call that the calling thread was refused, if there is one.
    #[must_use]
    pub fn violation(&self) -> Option<Violation> {
        self.0.and_then(Sandbox::violation)
    }
}
