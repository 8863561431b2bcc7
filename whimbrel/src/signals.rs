//! Signals that end the program.

use anyhow::{Context, Result};
use tokio::signal::unix::{Signal, SignalKind, signal};

/// SIGINT, SIGTERM and SIGHUP: the first of them asks to end in order, and the second to end at once.
pub(crate) struct Signals {
    interrupt: Signal,
    terminate: Signal,
    /// Absent where the program was started with SIGHUP ignored, as `nohup` does.
    hang_up: Option<Signal>,
}

impl Signals {
    /// From now on they are heard. Must be called within a runtime.
    pub(crate) fn listen() -> Result<Self> {
        let listen = |kind| signal(kind).context("cannot listen for signals");
        Ok(Self {
            interrupt: listen(SignalKind::interrupt())?,
            terminate: listen(SignalKind::terminate())?,
            hang_up: match is_ignored(SignalKind::hangup()) {
                true => None,
                false => Some(listen(SignalKind::hangup())?),
            },
        })
    }

    /// Waits for the next one.
    pub(crate) async fn next(&mut self) {
        let hang_up = async {
            match &mut self.hang_up {
                Some(signal) => signal.recv().await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            _ = self.interrupt.recv() => {}
            _ = self.terminate.recv() => {}
            _ = hang_up => {}
        }
    }
}

/// Whether this process ignores a signal (proc(5), `SigIgn`: a mask in hexadecimal).
fn is_ignored(signal: SignalKind) -> bool {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    let mask = mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok());
    let bit = u32::try_from(signal.as_raw_value() - 1).unwrap_or(u32::MAX);
    mask.unwrap_or(0)
        .checked_shr(bit)
        .is_some_and(|rest| rest & 1 != 0)
}

/// Waits for `work`, unless a signal comes first, which ends the program as that signal would.
pub(crate) async fn unless_interrupted(signals: &mut Signals, work: impl Future<Output = ()>) {
    tokio::select! {
        () = work => {}
        () = signals.next() => {
            tracing::warn!("ending at once");
            // 128 and the number of SIGINT, as shells have it.
            std::process::exit(130);
        }
    }
}
