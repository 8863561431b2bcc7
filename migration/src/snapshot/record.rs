//! Recording the working set: the guest runs on demand, and no page is read that it does not touch.
//!
//! The order of its faults is that of its first touches. A page of zeros has no content in the file, so
//! that it is neither recorded nor brought.

use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};

use super::read::Snapshot;
use super::working_set::WorkingSet;
use crate::MigrationError;

/// From one look whether the machine is still there to the next.
const LOOK: Duration = Duration::from_millis(50);

/// How far a recording has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    /// The guest's touches are recorded, or its machine is being made.
    Recording,
    /// The guest is ready: the record is complete.
    Ready,
    /// The record is not wanted.
    Canceled,
    /// The record was written or dropped.
    Over,
}

struct State {
    stage: Stage,
    set: WorkingSet,
    /// Pages for which the record has no room.
    omitted: u64,
}

/// A recording: its owner ends it, the restore writes it. Clones share it.
#[derive(Clone)]
pub struct Recorder {
    state: Arc<(Mutex<State>, Condvar)>,
    limit: Duration,
}

impl Recorder {
    /// A recording that ends by itself after `limit`, counted from the guest's start.
    #[must_use]
    pub fn new(limit: Duration) -> Self {
        let state = State {
            stage: Stage::Recording,
            set: WorkingSet::default(),
            omitted: 0,
        };
        Self {
            state: Arc::new((Mutex::new(state), Condvar::new())),
            limit,
        }
    }

    /// Ends the recording: the guest has touched what it needs. False if it has ended before.
    #[must_use]
    pub fn ready(&self) -> bool {
        self.turn(Stage::Ready)
    }

    /// Ends the recording without a record. False if it has ended before.
    #[must_use]
    pub fn cancel(&self) -> bool {
        self.turn(Stage::Canceled)
    }

    fn turn(&self, to: Stage) -> bool {
        let (state, changed) = &*self.state;
        let mut state = state.lock();
        let is_recording = state.stage == Stage::Recording;
        if is_recording {
            state.stage = to;
            changed.notify_all();
        }
        is_recording
    }

    /// Adds a page that was touched: its number in all of the memory.
    pub(super) fn add(&self, page: u64) {
        let mut state = self.state.0.lock();
        if state.stage == Stage::Recording && !state.set.add(page) {
            state.omitted += 1;
        }
    }

    /// Waits for the end of the recording, and writes the record beside the snapshot. Returns its pages.
    /// `has_ended` tells whether the machine is gone.
    pub(super) fn finish(
        &self,
        snapshot: &Snapshot,
        has_ended: impl Fn() -> bool,
    ) -> Result<u64, MigrationError> {
        let (state, changed) = &*self.state;
        let deadline = Instant::now() + self.limit;
        let mut state = state.lock();
        while state.stage == Stage::Recording && Instant::now() < deadline {
            if has_ended() {
                state.stage = Stage::Over;
                let why = "the VM ended before its working set was recorded";
                return Err(MigrationError::here("recording-ended", why));
            }
            changed.wait_for(&mut state, LOOK);
        }
        let is_late = state.stage == Stage::Recording;
        let was = std::mem::replace(&mut state.stage, Stage::Over);
        let (set, omitted) = (std::mem::take(&mut state.set), state.omitted);
        // Writing takes time, and the thread that brings pages needs the lock.
        drop(state);
        if was == Stage::Canceled {
            return Err(MigrationError::Canceled);
        }
        set.save(snapshot.dir(), snapshot.manifest().id)?;
        let (pages, limit) = (set.pages(), self.limit);
        tracing::info!(
            pages,
            omitted,
            is_late,
            ?limit,
            "the working set was recorded"
        );
        Ok(pages)
    }
}
