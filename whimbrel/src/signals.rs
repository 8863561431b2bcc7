//! Signals that end the program.

use anyhow::{Context, Result};
use tokio::signal::unix::{Signal, SignalKind, signal};

/// SIGINT and SIGTERM, the first of which asks to end in order, and the second to end at once.
pub(crate) struct Signals {
    interrupt: Signal,
    terminate: Signal,
}

impl Signals {
    /// From now on they are heard. Must be called within a runtime.
    pub(crate) fn listen() -> Result<Self> {
        let listen = |kind| signal(kind).context("cannot listen for signals");
        Ok(Self {
            interrupt: listen(SignalKind::interrupt())?,
            terminate: listen(SignalKind::terminate())?,
        })
    }

    /// Waits for the next one.
    pub(crate) async fn next(&mut self) {
        tokio::select! {
            _ = self.interrupt.recv() => {}
            _ = self.terminate.recv() => {}
        }
    }
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
