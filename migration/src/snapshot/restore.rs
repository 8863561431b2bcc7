//! Restoring: a guest that comes from a folder.

use std::time::Duration;

use uuid::Uuid;

use super::read::{RestoreError, Snapshot};
use super::{conclude, on_demand};
use crate::MigrationError;
use crate::decision::Decision;
use crate::destination::{Destination, Host, StartFailure};
use crate::message::{Offer, Refusal};
use crate::progress::{Phase, Progress};

/// How a guest gets its memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Memory {
    /// All of it is copied before the guest runs.
    Copy,
    /// Pages are read when the guest touches them, and the others meanwhile.
    OnDemand,
    /// The memory is a private view of the file: pages that the guest does not write are those of the
    /// host's page cache.
    Map,
}

/// Parameters of a restore.
pub struct Restoring<'a> {
    /// Identifies the operation.
    pub id: Uuid,
    /// The snapshot.
    pub snapshot: &'a Snapshot,
    /// The offer of its machine, with what is to be different from the machine that was saved.
    pub offer: Offer,
    /// How the guest gets its memory.
    pub memory: Memory,
    /// Checks all of the memory before the guest runs, where the mode would not.
    pub verify: bool,
    /// Makes the machine.
    pub host: &'a dyn Host,
    /// Whether the guest runs afterwards. If not, it is paused.
    pub resume: bool,
    /// Called when the VM is there, if pages of its memory are still missing.
    pub arrived: &'a (dyn Fn() + Sync),
    /// Receives the progress report.
    pub progress: &'a Progress,
    /// Carries the cancel request.
    pub decision: &'a Decision,
}

/// Makes a machine, loads the snapshot into it, and resumes the guest if that is wanted.
///
/// # Errors
/// The machine cannot be made, the snapshot is damaged, or restoring was canceled. The report says the
/// same, and the machine is gone. A guest that ran already when a page of its memory could not be read has
/// [failed](Destination::fail).
pub fn restore(restoring: &Restoring<'_>) -> Result<(), Refusal> {
    restoring.progress.enter(Phase::Preparing);
    conclude(restoring.progress, restore_memory(restoring))
}

fn restore_memory(restoring: &Restoring<'_>) -> Result<(), MigrationError> {
    let Restoring {
        snapshot,
        progress,
        decision,
        ..
    } = restoring;
    let mut offer = restoring.offer.clone();
    let mut files = Vec::new();
    match restoring.memory {
        Memory::Copy => {}
        Memory::OnDemand => offer.postcopy = true,
        Memory::Map => {
            if restoring.verify {
                // Before there is a machine: nothing else would notice a damaged page.
                snapshot.verify(progress, decision).map_err(failed)?;
            }
            offer.given = true;
            for _ in &offer.blocks {
                files.push(snapshot.memory().map_err(failed)?);
            }
        }
    }
    let prepared = restoring.host.prepare(restoring.id, &offer, files);
    let mut machine = prepared.map_err(MigrationError::Here)?;
    progress.enter(Phase::Stopped);
    let result = match restoring.memory {
        Memory::OnDemand => return on_demand::restore(restoring, &mut *machine),
        Memory::Copy => snapshot
            .fill(&machine.blocks(), progress, decision)
            .map_err(failed),
        Memory::Map => snapshot.check_blocks(&machine.blocks()).map_err(failed),
    };
    let started = result
        .and_then(|()| load(restoring, &mut *machine))
        .and_then(|()| start(restoring, &mut *machine));
    started.inspect_err(|_| machine.discard())
}

pub(super) fn failed(error: RestoreError) -> MigrationError {
    match error {
        RestoreError::Canceled => MigrationError::Canceled,
        other => MigrationError::Here(other.refusal()),
    }
}

/// Loads the state of vCPUs and devices into a machine that has its memory.
pub(super) fn load(
    restoring: &Restoring<'_>,
    machine: &mut dyn Destination,
) -> Result<(), MigrationError> {
    machine
        .load(restoring.snapshot.state())
        .and_then(|()| machine.take_over())
        .map_err(MigrationError::Here)
}

pub(super) fn start(
    restoring: &Restoring<'_>,
    machine: &mut dyn Destination,
) -> Result<(), MigrationError> {
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
