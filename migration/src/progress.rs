//! How a migration is going: written by its engine, read by anybody, at any time.

use std::fmt;
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};
use serde::{Deserialize, Serialize};

use crate::link::Closer;
use crate::message::Refusal;

/// Where a migration is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Phase {
    /// The source looks for the destination, or the destination waits for a source.
    Connecting,
    /// Both see whether it can be, and the destination makes room.
    Preparing,
    /// Memory is copied while the guest runs at the source.
    Precopy,
    /// The guest stands: the rest of its memory and its devices are copied.
    Stopped,
    /// The source has given the guest away, and waits to hear that it runs; or the destination is
    /// ready, and waits for the order.
    HandingOver,
    /// The guest runs at the destination, and pages follow.
    Postcopy,
    /// The connection was lost on the way; the guest waits where it needs a page that is not there.
    PostcopyPaused,
    /// The connection was lost at the moment of the hand-over: it goes on when both sides meet
    /// again, or somebody decides.
    InDoubt,
    /// The guest has moved.
    Completed,
    /// It was called off; the guest stays where it was.
    Canceled,
    /// It failed; the guest stays where it was.
    Failed,
}

impl Phase {
    /// Whether nothing changes any more.
    #[must_use]
    pub fn is_over(self) -> bool {
        matches!(self, Self::Completed | Self::Canceled | Self::Failed)
    }
}

/// The stop, in parts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Downtime {
    /// From the order to stop until the guest went on, in microseconds.
    pub total_us: u64,
    /// Until vCPUs and devices stood.
    pub pause_us: u64,
    /// Saving, while the last pages were sent.
    pub save_us: u64,
    /// Sending the last pages, and hearing that they and the devices were loaded.
    pub transfer_us: u64,
    /// Of that, loading at the destination.
    pub load_us: u64,
    /// From the decision until the guest went on.
    pub hand_over_us: u64,
    /// Pages that were sent in the stop.
    pub pages: u64,
}

/// How a migration is going.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// Where it is.
    pub phase: Phase,
    /// Bytes of the guest's memory.
    pub memory_bytes: u64,
    /// Bytes that went over the RAM channels.
    pub sent_bytes: u64,
    /// Pages that were sent with what is in them.
    pub pages: u64,
    /// Pages that were sent as zeros.
    pub zero_pages: u64,
    /// Pages of the present round that are still to be sent.
    pub remaining_pages: u64,
    /// Rounds that were begun.
    pub rounds: u32,
    /// Pages that the guest writes in a second.
    pub dirty_pages_per_second: u64,
    /// Bytes that arrive in a second.
    pub bytes_per_second: u64,
    /// How much of the time the vCPUs are kept from running, in percent.
    pub throttle_percent: u8,
    /// RAM channels.
    pub connections: u16,
    /// How long the stop would be, or was expected to be when it began, in microseconds.
    pub predicted_downtime_us: Option<u64>,
    /// How long it was.
    pub downtime: Option<Downtime>,
    /// Pages that the guest waited for after the hand-over.
    pub faults: u64,
    /// How long it waited: the median, in microseconds.
    pub fault_p50_us: u64,
    /// How long it waited: 99 of 100 waited no longer, in microseconds.
    pub fault_p99_us: u64,
    /// Microseconds since it began, or until it ended.
    pub elapsed_us: u64,
    /// Why it failed, was called off or is in doubt.
    pub error: Option<Refusal>,
}

/// What somebody decides of a migration that is in doubt.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Resolution {
    /// The guest goes on here.
    Run,
    /// It does not, and is forgotten here.
    Discard,
}

/// It is too late: the guest has been given away.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the guest has been handed over; the migration can no longer be called off")]
pub struct TooLate;

struct State {
    report: Report,
    begun: Instant,
    committed: bool,
    canceled: bool,
    resolution: Option<Resolution>,
    closers: Vec<Closer>,
}

/// Shared by a migration's engine and those who watch it.
#[derive(Clone)]
pub struct Progress(Arc<(Mutex<State>, Condvar)>);

impl Default for Progress {
    fn default() -> Self {
        let report = Report {
            phase: Phase::Connecting,
            memory_bytes: 0,
            sent_bytes: 0,
            pages: 0,
            zero_pages: 0,
            remaining_pages: 0,
            rounds: 0,
            dirty_pages_per_second: 0,
            bytes_per_second: 0,
            throttle_percent: 0,
            connections: 0,
            predicted_downtime_us: None,
            downtime: None,
            faults: 0,
            fault_p50_us: 0,
            fault_p99_us: 0,
            elapsed_us: 0,
            error: None,
        };
        let state = State {
            report,
            begun: Instant::now(),
            committed: false,
            canceled: false,
            resolution: None,
            closers: Vec::new(),
        };
        Self(Arc::new((Mutex::new(state), Condvar::new())))
    }
}

impl Progress {
    /// How it is going at this moment.
    #[must_use]
    pub fn report(&self) -> Report {
        let state = self.0.0.lock();
        let mut report = state.report.clone();
        if !report.phase.is_over() {
            report.elapsed_us = micros(state.begun.elapsed());
        }
        report
    }

    /// Calls it off: the engine ends it at its next step, and the guest stays where it was.
    ///
    /// # Errors
    /// When the guest has been given away already.
    pub fn cancel(&self) -> Result<(), TooLate> {
        let mut state = self.0.0.lock();
        if state.committed {
            return Err(TooLate);
        }
        state.canceled = true;
        state.closers.iter().for_each(Closer::close);
        self.0.1.notify_all();
        Ok(())
    }

    /// Decides what becomes of the guest where it is in doubt. False if it is not.
    #[must_use]
    pub fn resolve(&self, resolution: Resolution) -> bool {
        let mut state = self.0.0.lock();
        let may_be = match state.report.phase {
            Phase::InDoubt => true,
            // Half of its memory is elsewhere.
            Phase::PostcopyPaused => resolution == Resolution::Discard,
            _ => false,
        };
        if !may_be {
            return false;
        }
        state.resolution = Some(resolution);
        self.0.1.notify_all();
        true
    }

    /// Waits until it is over, for so long at most.
    #[must_use]
    pub fn wait_over(&self, patience: Duration) -> Report {
        let deadline = Instant::now() + patience;
        let mut state = self.0.0.lock();
        while !state.report.phase.is_over() {
            if self.0.1.wait_until(&mut state, deadline).timed_out() {
                break;
            }
        }
        drop(state);
        self.report()
    }

    pub(crate) fn update(&self, change: impl FnOnce(&mut Report)) {
        let mut state = self.0.0.lock();
        let before = state.report.phase;
        change(&mut state.report);
        if state.report.phase != before {
            // What was decided of one doubt decides nothing of another.
            state.resolution = None;
            if state.report.phase.is_over() {
                state.report.elapsed_us = micros(state.begun.elapsed());
                state.closers.clear();
            }
            self.0.1.notify_all();
        }
    }

    pub(crate) fn enter(&self, phase: Phase) {
        self.update(|report| report.phase = phase);
    }

    pub(crate) fn is_canceled(&self) -> bool {
        self.0.0.lock().canceled
    }

    /// The point of no return. False if it was called off before.
    pub(crate) fn commit(&self) -> bool {
        let mut state = self.0.0.lock();
        if state.canceled {
            return false;
        }
        state.committed = true;
        // There is nothing to be closed any more.
        state.closers.clear();
        true
    }

    /// Ends all connections: who sends over one of them does not wait any longer.
    pub(crate) fn close_all(&self) {
        self.0.0.lock().closers.iter().for_each(Closer::close);
    }

    /// Has this closed when the migration is called off, or at once if it was.
    pub(crate) fn close_on_cancel(&self, closer: Closer) {
        let mut state = self.0.0.lock();
        if state.canceled {
            closer.close();
        }
        if !state.committed {
            state.closers.push(closer);
        }
    }

    /// What was decided, when something was within this time.
    pub(crate) fn wait_resolution(&self, patience: Duration) -> Option<Resolution> {
        let mut state = self.0.0.lock();
        if state.resolution.is_none() {
            self.0.1.wait_for(&mut state, patience);
        }
        state.resolution.take()
    }
}

impl fmt::Debug for Progress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Progress({:?})", self.0.0.lock().report.phase)
    }
}

/// Whole microseconds.
pub(crate) fn micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}
