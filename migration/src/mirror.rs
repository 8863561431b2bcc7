//! Mirrors: the content of a disk is copied into a new image while the guest writes, and the disk
//! continues there. The rounds are those of a [copied disk](crate::disks), without a peer.
//!
//! ```text
//!   start     writes are tracked from here on               the disk is what it was
//!   rounds    what has content, then what the guest wrote   the disk is what it was
//!   switch    the disk's queues stand still for a moment:   the guest runs, and its requests wait
//!             the last blocks, a sync, the switch           the disk is the new image
//! ```
//!
//! A reset of the guest in between takes the disk to the next machine, and the copy goes on there.
//!
//! Whatever fails before the switch leaves the disk as it was: nothing is ever written to its image.

use std::time::Instant;

use uuid::Uuid;

use crate::MigrationError;
use crate::copier::Copier;
use crate::decision::Decision;
use crate::disks::{DestinationDisk, SourceDisk};
use crate::message::Refusal;
use crate::policy::Policy;
use crate::progress::{Downtime, Phase, Progress, micros};
use crate::snapshot::conclude;

/// The copying of the last blocks, which the caller of a [`MirroredDisk`] passes to it. Returns the
/// parts of the stop that it took.
pub type Finish = Box<dyn FnOnce() -> Result<Downtime, Refusal> + Send>;

/// A disk of a guest that runs, and the image that takes the place of its own.
pub trait MirroredDisk {
    /// Starts to mark the blocks that the guest writes, and marks all that may have content.
    ///
    /// # Errors
    /// The image cannot be read, or the machine is gone.
    fn start_tracking(&mut self) -> Result<(), Refusal>;

    /// Stops the disk's queues, calls `finish`, has the disk continue on the new image, and starts the
    /// queues again. If one of these fails, the disk continues on the image that it had.
    ///
    /// # Errors
    /// Those of `finish`; the disk cannot be switched, or the machine is gone.
    fn switch(&mut self, finish: Finish) -> Result<Downtime, Refusal>;

    /// Called with the outcome, before the report shows it: a client that sees it can have the disk at
    /// once.
    fn ended(&mut self, outcome: Result<(), &Refusal>);
}

/// Parameters of a mirror.
pub struct Mirroring<'a> {
    /// Identifies the mirror, in log lines.
    pub id: Uuid,
    /// The disk.
    pub from: SourceDisk,
    /// The new image, of zeros, which is as large as the disk.
    pub to: DestinationDisk,
    /// `max_downtime`, `deadline` and `max_bandwidth` apply.
    pub policy: &'a Policy,
    /// Receives the progress report.
    pub progress: &'a Progress,
    /// Carries the cancel request.
    pub decision: &'a Decision,
}

/// Copies a disk into a new image, and has it continue there.
///
/// # Errors
/// The disk stays as it was: either side's storage fails, the guest writes faster than that is copied
/// until the deadline, the machine ends, or the operator cancels.
pub fn mirror(mirroring: &Mirroring<'_>, disk: &mut dyn MirroredDisk) -> Result<(), Refusal> {
    // The end of a machine cancels its mirrors, and shows in errors of every kind.
    let ended = run(mirroring, disk).map_err(|error| mirroring.decision.ended().unwrap_or(error));
    let told = ended.as_ref().err().map(MigrationError::refusal);
    disk.ended(told.as_ref().map_or(Ok(()), Err));
    conclude(mirroring.progress, ended)
}

fn run(mirroring: &Mirroring<'_>, disk: &mut dyn MirroredDisk) -> Result<(), MigrationError> {
    let Mirroring {
        progress, decision, ..
    } = *mirroring;
    progress.enter(Phase::Precopy);
    let mut copier = Copier::new(mirroring.id, progress, decision);
    copier.add(mirroring.from.clone(), mirroring.to.clone());
    disk.start_tracking().map_err(MigrationError::Here)?;
    let predicted = copier.rounds(mirroring.policy)?;
    progress.update(|report| {
        report.phase = Phase::Stopped;
        report.predicted_downtime_us = Some(micros(predicted));
    });
    let decision = decision.clone();
    let finish = move || finish(&mut copier, &decision).map_err(|error| error.refusal());
    let downtime = disk
        .switch(Box::new(finish))
        .map_err(MigrationError::Here)?;
    tracing::info!(
        mirror = %mirroring.id,
        stop_us = downtime.total_us,
        pages = downtime.pages,
        "mirror: the disk continues on its new image"
    );
    progress.update(|report| report.downtime = Some(downtime));
    Ok(())
}

/// Copies the last blocks, while no queue of the disk is served. From the end of this on, the
/// mirror cannot be canceled.
fn finish(copier: &mut Copier, decision: &Decision) -> Result<Downtime, MigrationError> {
    let start = Instant::now();
    let pages = copier.last()?;
    copier.sync()?;
    if !decision.commit() {
        return Err(MigrationError::Canceled);
    }
    Ok(Downtime {
        transfer_us: micros(start.elapsed()),
        pages,
        ..Downtime::default()
    })
}
