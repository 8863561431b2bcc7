//! Restoring: a guest that comes from a folder.

use std::time::Duration;

use uuid::Uuid;

use super::conclude;
use super::read::{RestoreError, Snapshot};
use crate::MigrationError;
use crate::decision::Decision;
use crate::destination::{Destination, Host, StartFailure};
use crate::message::Refusal;
use crate::progress::{Phase, Progress};

/// Parameters of a restore.
pub struct Restoring<'a> {
    /// Identifies the operation.
    pub id: Uuid,
    /// The snapshot.
    pub snapshot: &'a Snapshot,
    /// Makes the machine.
    pub host: &'a dyn Host,
    /// Whether the guest runs afterwards. If not, it is paused.
    pub resume: bool,
    /// Receives the progress report.
    pub progress: &'a Progress,
    /// Carries the cancel request.
    pub decision: &'a Decision,
}

/// Makes a machine, loads the snapshot into it, and resumes the guest if that is wanted.
///
/// # Errors
/// The machine cannot be made, the snapshot is damaged, or restoring was canceled. The report says the
/// same, and the machine is gone.
pub fn restore(restoring: &Restoring<'_>) -> Result<(), Refusal> {
    let progress = restoring.progress;
    progress.enter(Phase::Preparing);
    let offer = restoring.snapshot.offer();
    let prepared = restoring.host.prepare(restoring.id, &offer, Vec::new());
    let restored = prepared
        .map_err(MigrationError::Here)
        .and_then(|mut machine| {
            let loaded = load(restoring, &mut *machine);
            if loaded.is_err() {
                machine.discard();
            }
            loaded
        });
    conclude(progress, restored)
}

fn load(restoring: &Restoring<'_>, machine: &mut dyn Destination) -> Result<(), MigrationError> {
    let blocks = machine.blocks();
    let filled = restoring
        .snapshot
        .fill(&blocks, restoring.progress, restoring.decision);
    filled.map_err(|error| match error {
        RestoreError::Canceled => MigrationError::Canceled,
        other => MigrationError::Here(other.refusal()),
    })?;
    machine
        .load(restoring.snapshot.state())
        .and_then(|()| machine.take_over())
        .map_err(MigrationError::Here)?;
    // From here on a cancel comes too late: the guest may run.
    if !restoring.decision.commit() {
        return Err(MigrationError::Canceled);
    }
    restoring.progress.enter(Phase::HandingOver);
    // The guest's clocks continue from where they stopped: a jump by the age of the snapshot would look
    // like a hang to the guest's watchdogs.
    let started = machine.start(Duration::ZERO, !restoring.resume);
    started.map(|_| ()).map_err(|failure| match failure {
        StartFailure::NeverRan(why) | StartFailure::MayHaveRun(why) => MigrationError::Here(why),
    })
}
