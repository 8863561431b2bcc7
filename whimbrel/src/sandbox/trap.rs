//! The handler of a thread whose system call a filter traps.
//!
//! The kernel does not run the call and raises SIGSYS in the thread. The handler lets the call fail
//! with `EPERM`, notes it for the thread, and reports it to the thread `sandbox`, which logs. It
//! does not kill the thread, as `SECCOMP_RET_KILL_THREAD` would: a thread that disappears with locks
//! in its hands takes other VMs with it. The thread's owner sees the note when the work at hand
//! returns, and ends the VM.
//!
//! ```text
//!   system call ─► filter ─► SIGSYS ─► handler ─┬─► EPERM, and a note ─► owner ends the VM
//!                                               └─► pipe ─► thread `sandbox` ─► log
//! ```
//!
//! The handler interrupts the thread at a system call instruction, perhaps inside the allocator. It
//! therefore takes no lock, does not allocate, and makes only system calls that every filter allows:
//! a second violation would find SIGSYS blocked, and end the process. That is also how a thread ends
//! the process which blocks SIGSYS before it violates a filter: the kernel knows no other way then.

#![allow(
    unsafe_code,
    reason = "a signal handler changes the registers of the thread that it interrupts"
)]

use std::cell::Cell;
use std::collections::HashMap;
use std::io::{self, PipeReader, Read};
use std::os::fd::IntoRawFd;
use std::sync::atomic::{AtomicI32, AtomicU64, Ordering};

use anyhow::{Context, Result};

/// `si_code` of a SIGSYS that seccomp raised (`asm-generic/siginfo.h`).
const SYS_SECCOMP: i32 = 1;
const NOTHING: i64 = -1;

thread_local! {
    // Without a destructor and a lazy value: the handler's access is that to a plain variable.
    static REFUSED: Cell<i64> = const { Cell::new(NOTHING) };
}

/// The writing end of the pipe to the thread that logs; open until the process ends.
static REPORTS: AtomicI32 = AtomicI32::new(-1);
/// Reports for which the pipe had no room.
static LOST: AtomicU64 = AtomicU64::new(0);

/// Takes the number of the last system call that the calling thread was refused.
pub(super) fn take() -> Option<i64> {
    let refused = REFUSED.replace(NOTHING);
    (refused != NOTHING).then_some(refused)
}

/// Installs the handler, and starts the thread that logs.
pub(super) fn install() -> Result<()> {
    let (reader, writer) = io::pipe().context("cannot make a pipe for the sandbox's reports")?;
    // A full pipe must not block the handler.
    rustix::io::ioctl_fionbio(&writer, true).context("cannot set up the sandbox's pipe")?;
    std::thread::Builder::new()
        .name("sandbox".to_owned())
        .spawn(move || log(reader))
        .context("cannot start the sandbox's thread")?;
    REPORTS.store(writer.into_raw_fd(), Ordering::Release);
    // SAFETY: all zeros are a valid `sigaction`: no flags, and an empty mask.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    action.sa_sigaction = on_trap as *const () as usize;
    action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
    // SAFETY: `action` is initialised, and its handler is safe to run in any thread at any time.
    let refused = unsafe { libc::sigaction(libc::SIGSYS, &raw const action, std::ptr::null_mut()) };
    if refused != 0 {
        return Err(io::Error::last_os_error()).context("cannot handle SIGSYS");
    }
    Ok(())
}

/// A report, as it goes through the pipe: whole, because it is shorter than `PIPE_BUF`.
#[repr(C)]
struct Report {
    call: i64,
    thread: i64,
    /// The second argument: the request of an `ioctl`, for example.
    argument: i64,
    /// Ends with a zero.
    name: [u8; 16],
}

const REPORT_LEN: usize = size_of::<Report>();

extern "C" fn on_trap(_: libc::c_int, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    // SAFETY: the kernel passes a valid `siginfo_t` and, with SA_SIGINFO, the `ucontext_t` from which
    // it will restore the thread. Nothing else has a reference to them.
    let (info, context) = unsafe { (&*info, &mut *context.cast::<libc::ucontext_t>()) };
    if info.si_code != SYS_SECCOMP {
        // Sent by a process: no call of ours was refused.
        return;
    }
    // The kernel has put the thread back to before the call: RAX is the call's number. The handler
    // returns behind the call, for which RAX is the result.
    let registers = &mut context.uc_mcontext.gregs;
    let argument = registers[libc::REG_RSI as usize];
    let result = &mut registers[libc::REG_RAX as usize];
    let call = std::mem::replace(result, -i64::from(libc::EPERM));
    // Only the last: the owner ends the VM at the first note anyway.
    REFUSED.set(call);

    // SAFETY: it points to this thread's `errno`, which the interrupted code may be about to read.
    let errno = unsafe { libc::__errno_location() };
    // SAFETY: as above.
    let kept = unsafe { *errno };
    let mut report = Report {
        call,
        // SAFETY: the call has no arguments.
        thread: unsafe { libc::syscall(libc::SYS_gettid) },
        argument,
        name: [0; 16],
    };
    // SAFETY: the kernel writes at most 16 bytes, to an array that has them.
    unsafe { libc::prctl(libc::PR_GET_NAME, report.name.as_mut_ptr()) };
    let pipe = REPORTS.load(Ordering::Acquire);
    // SAFETY: the report has `REPORT_LEN` initialised bytes: its fields leave no padding.
    let written = unsafe { libc::write(pipe, (&raw const report).cast(), REPORT_LEN) };
    if written < 0 {
        LOST.fetch_add(1, Ordering::Relaxed);
    }
    // SAFETY: as above.
    unsafe { *errno = kept };
}

/// Logs what comes through the pipe. A call that a thread repeats is logged at its first, second,
/// fourth, eighth time and so on: it must not drown what others have to say.
fn log(mut reports: PipeReader) {
    // As many entries as there are system calls, at most.
    let mut counts: HashMap<i64, u64> = HashMap::new();
    let mut bytes = [0; REPORT_LEN];
    while reports.read_exact(&mut bytes).is_ok() {
        let (numbers, name) = bytes.split_at(24);
        let number = |at: usize| {
            let bytes = numbers
                .get(at..at + 8)
                .and_then(|bytes| bytes.try_into().ok());
            bytes.map_or(NOTHING, i64::from_ne_bytes)
        };
        let (call, tid, argument) = (number(0), number(8), number(16));
        // Text, because numbers are logged in decimal, and requests are known in hexadecimal.
        let argument = format!("{argument:#x}");
        let name = String::from_utf8_lossy(name);
        let thread = name.trim_end_matches('\0');
        let count = counts.entry(call).or_default();
        *count += 1;
        if count.is_power_of_two() {
            let (syscall, lost) = (super::call_name(call), LOST.swap(0, Ordering::Relaxed));
            tracing::error!(
                argument,
                thread,
                tid,
                syscall,
                count,
                lost,
                "the sandbox refused a system call"
            );
        }
    }
}
