//! Threads of a migration.

use std::io;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::Duration;

use crate::link::Closer;

/// Returns `work` inside the log span of the caller, for a thread that is to do it. The service limits
/// its log by span, so a line without one would count against everybody's limit.
pub(crate) fn in_span<R>(work: impl FnOnce() -> R) -> impl FnOnce() -> R {
    let span = tracing::Span::current();
    move || span.in_scope(work)
}

/// Talks to the other side, and has `closer` end that after `limit`. The patience of a stream does not suffice: each
/// byte restarts it.
///
/// # Errors
/// The host has no thread for the clock.
pub(crate) fn within<R>(
    limit: Duration,
    closer: &Closer,
    talk: impl FnOnce() -> R,
) -> io::Result<R> {
    thread::scope(|scope| {
        let (talking, ended) = mpsc::channel::<()>();
        let clock = move || {
            if ended.recv_timeout(limit) == Err(RecvTimeoutError::Timeout) {
                closer.close();
            }
        };
        thread::Builder::new().spawn_scoped(scope, clock)?;
        let talked = talk();
        drop(talking);
        Ok(talked)
    })
}

/// Lets threads of the guest run before this one, for bulk work beside a guest that waits for pages. KVM
/// brings such a page on a thread of the kernel that is bound to one CPU, where this thread would keep it
/// from running for some milliseconds. This thread still gets a tenth of a CPU that is busy.
pub(crate) fn give_way() {
    /// On a scale from -20 to 19, 0 being that of the guest's threads.
    const NICE: i32 = 10;
    // For this thread alone: Linux has a priority for each. It can always be lowered.
    let _ = rustix::process::setpriority_process(None, NICE);
}
