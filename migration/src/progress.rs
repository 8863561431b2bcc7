//! How a migration is going: written by its engine, read by anybody, at any time.

use std::collections::VecDeque;
use std::fmt;
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use crate::message::Refusal;

/// The phase of a migration.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// The source looks for the destination, or the destination waits for a source.
    Connecting,
    /// Both sides check whether the migration is possible, and the destination builds the machine.
    Preparing,
    /// Memory is copied while the guest runs at the source.
    Precopy,
    /// The guest is paused: the rest of its memory and its devices are copied.
    Stopped,
    /// A live snapshot: the guest runs again, and its memory is copied as it was in the stop.
    Copying,
    /// The source has given the guest away, and waits to hear that it runs; or the destination is
    /// ready, and waits for the order.
    HandingOver,
    /// The guest runs at the destination, and pages follow.
    Postcopy,
    /// The connection was lost on the way; the guest waits where it needs a page that is not there.
    PostcopyPaused,
    /// The connection was lost during the hand-over. The migration continues when both sides are connected
    /// again, or when an operator resolves it.
    InDoubt,
    /// The guest has moved.
    Completed,
    /// Canceled; the guest stays at the source.
    Canceled,
    /// Failed; the guest stays at the source.
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
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Downtime {
    /// From the order to stop until the guest went on, in microseconds.
    pub total_us: u64,
    /// Pausing vCPUs and devices.
    pub pause_us: u64,
    /// Saving, while the last pages were sent.
    pub save_us: u64,
    /// Sending the last pages, and hearing that they and the devices were loaded.
    pub transfer_us: u64,
    /// Loading at the destination, a part of `transfer_us`.
    pub load_us: u64,
    /// From the decision until the guest resumed.
    pub hand_over_us: u64,
    /// Comparing memory in verify mode, in microseconds.
    pub verify_us: u64,
    /// Write-protecting memory for a live snapshot, in microseconds.
    pub protect_us: u64,
    /// Pages that were sent in the stop.
    pub pages: u64,
}

/// A round of pages that was copied while the guest ran, at the source.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Round {
    /// Its number, from 1 on.
    pub round: u32,
    /// Pages that it copied.
    pub pages: u64,
    /// Its duration in microseconds.
    pub took_us: u64,
    /// Throughput in bytes per second.
    pub bytes_per_second: u64,
    /// Pages that the guest wrote meanwhile.
    pub dirty_pages: u64,
    /// The stop in microseconds that was predicted behind it.
    pub predicted_downtime_us: u64,
    /// How much of the time the vCPUs were kept from running, in percent.
    pub throttle_percent: u8,
}

/// Rounds that a report keeps: the last ones.
const ROUNDS_KEPT: usize = 64;
/// Entries that a timeline keeps: each step but a round comes once or twice.
const TIMELINE_KEPT: usize = ROUNDS_KEPT + 32;

/// A step of a migration. They follow each other without gaps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Activity {
    /// The source connects, or the destination waits for a source.
    Connect,
    /// Both sides check the offer, and the destination builds the machine.
    Prepare,
    /// The source opens the RAM channels, and starts dirty tracking.
    Track,
    /// The device state is saved and loaded for a trial, and the round trip is measured.
    Trial,
    /// A round of pages is copied while the guest runs.
    Round,
    /// The source writes dirty disk caches back, and prepares the stop.
    Sync,
    /// The source pauses vCPUs and devices.
    Pause,
    /// The source sends the last pages and saves the machine.
    Save,
    /// The destination loads the machine.
    Load,
    /// The source gives the guest away, and the destination starts it.
    HandOver,
    /// Pages follow the guest.
    Pages,
    /// The rest is released.
    Release,
}

/// An entry of the timeline.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Span {
    /// The step.
    pub activity: Activity,
    /// Its beginning in microseconds since the migration began.
    pub at_us: u64,
    /// Its duration in microseconds, so far or until the next step began.
    pub took_us: u64,
}

/// How a migration is going.
#[derive(Clone, Debug, PartialEq)]
pub struct Report {
    /// The phase.
    pub phase: Phase,
    /// Bytes of the guest's memory.
    pub memory_bytes: u64,
    /// Bytes of the disks that are copied, as the guest sees them.
    pub disk_bytes: u64,
    /// Bytes of disks in the current round that are not sent yet.
    pub disk_remaining_bytes: u64,
    /// Bytes that went over the RAM channels.
    pub sent_bytes: u64,
    /// Pages sent with their content.
    pub pages: u64,
    /// Pages sent as zero pages.
    pub zero_pages: u64,
    /// Pages of which hashes were sent (source) or compared (destination), in verify mode.
    pub verified_pages: u64,
    /// Pages of the current round that are not sent yet.
    pub remaining_pages: u64,
    /// Rounds started so far.
    pub rounds: u32,
    /// The last rounds that have ended, at most 64.
    pub history: VecDeque<Round>,
    /// The steps so far, the last of which may be in progress: at most 96. Where there were more, the
    /// oldest rounds are left out.
    pub timeline: VecDeque<Span>,
    /// Pages that the guest dirties per second.
    pub dirty_pages_per_second: u64,
    /// Throughput in bytes per second.
    pub bytes_per_second: u64,
    /// How much of the time the vCPUs are kept from running, in percent.
    pub throttle_percent: u8,
    /// RAM channels.
    pub connections: u16,
    /// Predicted stop in microseconds: as of now, or when the stop began.
    pub predicted_downtime_us: Option<u64>,
    /// Stops that were called off because they took too long.
    pub called_off: u32,
    /// Duration of the stop, once it has ended.
    pub downtime: Option<Downtime>,
    /// For how long it has been undecided where the guest runs, in microseconds: at the destination, since the
    /// guest's state came. Absent before the hand-over and after it.
    pub undecided_us: Option<u64>,
    /// Pages that the guest waited for: after the hand-over, or while a live snapshot was copied.
    pub faults: u64,
    /// Blocks of disks that requests of the guest waited for after the hand-over, at the destination. `faults`
    /// counts them, too.
    pub disk_faults: u64,
    /// How long it waited: the median, in microseconds.
    pub fault_p50_us: u64,
    /// How long it waited: 99 of 100 waited no longer, in microseconds.
    pub fault_p99_us: u64,
    /// Microseconds from the beginning until the restored guest ran.
    pub first_instruction_us: Option<u64>,
    /// Pages of the working set that a restore brings first, or that were recorded.
    pub working_set_pages: Option<u64>,
    /// Microseconds from the beginning until all pages of the working set were brought.
    pub working_set_us: Option<u64>,
    /// Microseconds since it began, or until it ended.
    pub elapsed_us: u64,
    /// Why the migration failed, was canceled or is in doubt.
    pub error: Option<Refusal>,
}

impl Report {
    /// Ends the last step now, which is at `elapsed_us`.
    fn end_step(&mut self) {
        if let Some(last) = self.timeline.back_mut() {
            last.took_us = self.elapsed_us.saturating_sub(last.at_us);
        }
    }

    fn begin_step(&mut self, activity: Activity) {
        self.end_step();
        if self.timeline.len() == TIMELINE_KEPT {
            // A migration can have any number of rounds.
            let is_round = |span: &Span| span.activity == Activity::Round;
            let oldest = self.timeline.iter().position(is_round);
            self.timeline.remove(oldest.unwrap_or(0));
        }
        self.timeline.push_back(Span {
            activity,
            at_us: self.elapsed_us,
            took_us: 0,
        });
    }
}

struct State {
    report: Report,
    begun: Instant,
    /// The beginning of the hand-over.
    undecided: Option<Instant>,
}

/// The report of a migration: written by its engine, read by anyone. Clones share it.
#[derive(Clone)]
pub struct Progress(Arc<Mutex<State>>);

impl Default for Progress {
    fn default() -> Self {
        let report = Report {
            phase: Phase::Connecting,
            memory_bytes: 0,
            disk_bytes: 0,
            disk_remaining_bytes: 0,
            sent_bytes: 0,
            pages: 0,
            zero_pages: 0,
            verified_pages: 0,
            remaining_pages: 0,
            rounds: 0,
            history: VecDeque::new(),
            timeline: VecDeque::new(),
            dirty_pages_per_second: 0,
            bytes_per_second: 0,
            throttle_percent: 0,
            connections: 0,
            predicted_downtime_us: None,
            called_off: 0,
            downtime: None,
            undecided_us: None,
            faults: 0,
            disk_faults: 0,
            fault_p50_us: 0,
            fault_p99_us: 0,
            first_instruction_us: None,
            working_set_pages: None,
            working_set_us: None,
            elapsed_us: 0,
            error: None,
        };
        let state = State {
            report,
            begun: Instant::now(),
            undecided: None,
        };
        Self(Arc::new(Mutex::new(state)))
    }
}

impl Progress {
    /// How it is going at this moment.
    #[must_use]
    pub fn report(&self) -> Report {
        let state = self.0.lock();
        let mut report = state.report.clone();
        if !report.phase.is_over() {
            report.elapsed_us = micros(state.begun.elapsed());
            report.end_step();
        }
        report.undecided_us = state.undecided.map(|since| micros(since.elapsed()));
        report
    }

    pub(crate) fn update(&self, change: impl FnOnce(&mut Report)) {
        let mut state = self.0.lock();
        let before = state.report.phase;
        change(&mut state.report);
        state.undecided = match state.report.phase {
            Phase::HandingOver | Phase::InDoubt => state.undecided.or_else(|| Some(Instant::now())),
            _ => None,
        };
        // Freeze the time once: the report may be read long after the end.
        if state.report.phase != before && state.report.phase.is_over() {
            state.report.elapsed_us = micros(state.begun.elapsed());
            state.report.end_step();
        }
    }

    /// Begins a step, which ends the one before.
    pub(crate) fn begin(&self, activity: Activity) {
        let mut state = self.0.lock();
        if state.report.phase.is_over() {
            return;
        }
        state.report.elapsed_us = micros(state.begun.elapsed());
        state.report.begin_step(activity);
    }

    /// Adds a round that has ended.
    pub(crate) fn add_round(&self, round: Round) {
        self.update(|report| {
            if report.history.len() == ROUNDS_KEPT {
                report.history.pop_front();
            }
            report.history.push_back(round);
        });
    }

    /// Returns the time since the beginning in microseconds.
    pub(crate) fn elapsed_us(&self) -> u64 {
        micros(self.0.lock().begun.elapsed())
    }

    pub(crate) fn enter(&self, phase: Phase) {
        self.update(|report| report.phase = phase);
    }

    /// Enters the hand-over, which has been undecided since an earlier moment.
    pub(crate) fn enter_hand_over(&self, undecided: Instant) {
        let mut state = self.0.lock();
        state.undecided = Some(undecided);
        state.report.phase = Phase::HandingOver;
    }
}

impl fmt::Debug for Progress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Progress({:?})", self.0.lock().report.phase)
    }
}

/// Whole microseconds.
pub(crate) fn micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn undecided_time_runs_through_the_hand_over_only() {
        let progress = Progress::default();
        progress.enter(Phase::Stopped);
        assert_eq!(progress.report().undecided_us, None);
        let earlier = Instant::now();
        std::thread::sleep(Duration::from_millis(2));
        progress.enter_hand_over(earlier);
        assert!(progress.report().undecided_us >= Some(2000));
        let first = progress.report().undecided_us;
        std::thread::sleep(Duration::from_millis(2));
        progress.enter(Phase::InDoubt);
        let second = progress.report().undecided_us;
        assert!(second >= first.map(|us| us + 2000), "{first:?} {second:?}");
        progress.enter(Phase::Completed);
        assert_eq!(progress.report().undecided_us, None);
    }

    #[test]
    fn timeline_has_no_gaps_and_a_limit() {
        let progress = Progress::default();
        progress.begin(Activity::Connect);
        std::thread::sleep(Duration::from_millis(2));
        progress.begin(Activity::Prepare);
        for _ in 0..2 * TIMELINE_KEPT {
            progress.begin(Activity::Round);
        }
        progress.begin(Activity::HandOver);
        std::thread::sleep(Duration::from_millis(2));
        let running = progress.report();
        let last = running.timeline.back().unwrap();
        assert_eq!(last.at_us + last.took_us, running.elapsed_us);
        progress.enter(Phase::Completed);
        // Behind the end nothing changes.
        progress.begin(Activity::Release);
        let report = progress.report();
        assert_eq!(report.timeline.len(), TIMELINE_KEPT);
        let spans: Vec<_> = report.timeline.iter().collect();
        let kept = |index: usize| spans[index].activity;
        assert_eq!((kept(0), kept(1)), (Activity::Connect, Activity::Prepare));
        assert!(spans[0].took_us >= 2000, "{:?}", spans[0]);
        let (rounds, last) = spans[2..].split_at(spans.len() - 3);
        for pair in rounds.windows(2) {
            assert_eq!(pair[0].at_us + pair[0].took_us, pair[1].at_us);
        }
        assert_eq!(last[0].activity, Activity::HandOver);
        assert_eq!(last[0].at_us + last[0].took_us, report.elapsed_us);
    }
}
