//! Getting a vCPU out of the guest.
//!
//! A kick is a wish (`pending`) and a signal. If the thread is in `KVM_RUN`, the signal ends it;
//! if it is on its way there, the signal's handler sets `immediate_exit` in the vCPU's `kvm_run`
//! page, and `KVM_RUN` returns at once. The kicking thread needs no access to that page.

use std::cell::Cell;
use std::ptr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicU8, Ordering};

use vmm_sys_util::signal::{SIGRTMIN, register_signal_handler};

use crate::kvm::KvmError;

thread_local! {
    /// `immediate_exit` of the vCPU that this thread runs.
    static IMMEDIATE_EXIT: Cell<*const AtomicU8> = const { Cell::new(ptr::null()) };
    /// This thread's number.
    static THREAD: Cell<i32> = Cell::new(gettid());
}

fn gettid() -> i32 {
    // SAFETY: no memory is involved.
    i32::try_from(unsafe { libc::syscall(libc::SYS_gettid) }).unwrap_or(0)
}

extern "C" fn on_kick(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {
    // Where the thread is ending, its vCPU will not run again.
    // A signal handler may not allocate or lock. This thread-local has a `const` initialiser and no
    // destructor, so access runs no code of its own. `THREAD` is initialised lazily, so the handler
    // must not touch it.
    let _ = IMMEDIATE_EXIT.try_with(|byte| {
        // SAFETY: null, or set by `Running::new` to a byte that outlives it, on this thread.
        if let Some(byte) = unsafe { byte.get().as_ref() } {
            // Relaxed is enough: this thread makes the KVM_RUN that reads the byte.
            byte.store(1, Ordering::Relaxed);
        }
    });
}

/// Makes kicks possible in this process.
pub(crate) fn install_handler() -> Result<(), KvmError> {
    register_signal_handler(SIGRTMIN(), on_kick).map_err(|errno| {
        KvmError::other(
            "interrupt vCPUs",
            std::io::Error::from_raw_os_error(errno.errno()),
        )
    })
}

#[derive(Debug, Default)]
struct Shared {
    pending: AtomicBool,
    /// The thread that runs the vCPU; 0 before the first run.
    thread: AtomicI32,
}

/// Interrupts one vCPU, from any thread.
#[derive(Clone, Debug, Default)]
pub struct Kicker(Arc<Shared>);

impl Kicker {
    /// Makes the vCPU's present or next [`run`](crate::Vcpu::run) return
    /// [`Exit::Interrupted`](crate::Exit::Interrupted).
    pub fn kick(&self) {
        // `pending` before the signal. A vCPU that checks `pending` too early to see it has already
        // published its `immediate_exit`, so the signal takes effect. If the signal came first, it
        // could hit the thread before it publishes the byte, and the kick would be lost.
        self.0.pending.store(true, Ordering::SeqCst);
        let thread = self.0.thread.load(Ordering::SeqCst);
        if thread != 0 {
            // SAFETY: no memory is involved. A thread that has ended is not found, and one that
            // got its number in place of it finds no vCPU to interrupt.
            unsafe { libc::syscall(libc::SYS_tgkill, libc::getpid(), thread, SIGRTMIN()) };
        }
    }

    /// Takes the pending kick, if there is one.
    pub(crate) fn take(&self) -> bool {
        self.0.pending.load(Ordering::SeqCst) && self.0.pending.swap(false, Ordering::SeqCst)
    }

    /// Says which thread runs the vCPU from now on: this one.
    pub(crate) fn adopt(&self) {
        let thread = THREAD.get();
        // The store must precede `take` in the order of all SeqCst accesses: a kick that this run
        // does not find in `pending` then finds the thread. Most runs stay on one thread and skip
        // it.
        if self.0.thread.load(Ordering::Relaxed) != thread {
            self.0.thread.store(thread, Ordering::SeqCst);
        }
    }
}

/// While it lives, kicks of this thread find the byte.
pub(crate) struct Running;

impl Running {
    /// # Safety
    /// The byte stays valid until the result is dropped, on this thread.
    pub(crate) unsafe fn new(immediate_exit: *const AtomicU8) -> Self {
        IMMEDIATE_EXIT.set(immediate_exit);
        Self
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        IMMEDIATE_EXIT.set(ptr::null());
    }
}
