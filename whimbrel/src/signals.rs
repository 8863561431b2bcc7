//! Signals that end the program.

use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use tokio::signal::unix::{Signal, SignalKind, signal};

/// A signal this soon after another one belongs to it: `timeout` signals its child and then the child's
/// process group, which is the same process once more.
const ECHO: Duration = Duration::from_millis(300);

/// SIGINT, SIGTERM and SIGHUP: the first of them asks for an orderly end, and the second for an end at once.
pub(crate) struct Signals {
    interrupt: Signal,
    terminate: Signal,
    /// Absent where the program was started with SIGHUP ignored, as `nohup` does.
    hang_up: Option<Signal>,
    last: Option<(SignalKind, Instant)>,
}

impl Signals {
    /// Starts to listen. Must be called within a runtime.
    pub(crate) fn listen() -> Result<Self> {
        let listen = |kind| signal(kind).context("cannot listen for signals");
        Ok(Self {
            interrupt: listen(SignalKind::interrupt())?,
            terminate: listen(SignalKind::terminate())?,
            hang_up: match is_ignored(SignalKind::hangup()) {
                true => None,
                false => Some(listen(SignalKind::hangup())?),
            },
            last: None,
        })
    }

    /// Waits for the next signal; an echo of the last one does not count.
    pub(crate) async fn next(&mut self) {
        loop {
            let kind = self.any().await;
            let now = Instant::now();
            let is_echo = self
                .last
                .is_some_and(|(_, at)| now.duration_since(at) < ECHO);
            // Each echo moves the moment on: a burst counts as one signal, however long it is.
            self.last = Some((kind, now));
            if !is_echo {
                return;
            }
        }
    }

    async fn any(&mut self) -> SignalKind {
        let hang_up = async {
            match &mut self.hang_up {
                Some(signal) => signal.recv().await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            _ = self.interrupt.recv() => SignalKind::interrupt(),
            _ = self.terminate.recv() => SignalKind::terminate(),
            _ = hang_up => SignalKind::hangup(),
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
            let number = signals.last.map_or(0, |(kind, _)| kind.as_raw_value());
            tracing::warn!(signal = number, "second signal: ending at once");
            // A shell's exit status for a program that a signal ended.
            std::process::exit(128 + number);
        }
    }
}
