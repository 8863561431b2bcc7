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
//! Whatever fails before the switch leaves the disk as it was: nothing is ever written to its image.

use std::sync::Arc;
use std::time::{Duration, Instant};

use memory::DirtyPages;
use uuid::Uuid;

use crate::MigrationError;
use crate::decision::Decision;
use crate::disks::{Contents, DestinationDisk, IncomingDisk, SourceDisk};
use crate::message::Refusal;
use crate::pages::{Batch, PAGE, Run};
use crate::policy::{Left, Measured, Next, Policy, Situation};
use crate::progress::{Downtime, Phase, Progress, Round, micros};
use crate::sender::{Pacer, batches, count, per_second};
use crate::snapshot::conclude;

/// How often the throughput of a round is measured anew.
const SPEED_PERIOD: Duration = Duration::from_millis(250);

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
    let ended = run(mirroring, disk).map_err(|error| match error {
        // The end of a machine cancels its mirrors, and shows in errors of every kind.
        _ if mirroring.decision.is_canceled() => MigrationError::Canceled,
        error => error,
    });
    let told = ended.as_ref().err().map(MigrationError::refusal);
    disk.ended(told.as_ref().map_or(Ok(()), Err));
    conclude(mirroring.progress, ended)
}

fn run(mirroring: &Mirroring<'_>, disk: &mut dyn MirroredDisk) -> Result<(), MigrationError> {
    let Mirroring {
        progress, decision, ..
    } = *mirroring;
    progress.enter(Phase::Precopy);
    progress.update(|report| report.disk_bytes = mirroring.from.size);
    disk.start_tracking().map_err(MigrationError::Here)?;
    let mut copier = Copier {
        from: mirroring.from.clone(),
        to: Arc::new(IncomingDisk::new(mirroring.to.clone())),
        batch: Batch::default(),
        progress: progress.clone(),
        decision: decision.clone(),
    };
    let predicted = copier.rounds(mirroring)?;
    progress.update(|report| {
        report.phase = Phase::Stopped;
        report.predicted_downtime_us = Some(micros(predicted));
    });
    let finish = Box::new(move || copier.finish().map_err(|error| error.refusal()));
    let downtime = disk.switch(finish).map_err(MigrationError::Here)?;
    tracing::info!(
        mirror = %mirroring.id,
        stop_us = downtime.total_us,
        pages = downtime.pages,
        "mirror: the disk continues on its new image"
    );
    progress.update(|report| report.downtime = Some(downtime));
    Ok(())
}

/// Copies blocks from a disk to its new image.
struct Copier {
    from: SourceDisk,
    to: Arc<IncomingDisk>,
    batch: Batch,
    progress: Progress,
    decision: Decision,
}

impl Copier {
    /// Copies rounds until what the guest writes meanwhile fits into the stop. Returns the predicted stop.
    fn rounds(&mut self, mirroring: &Mirroring<'_>) -> Result<Duration, MigrationError> {
        let policy = mirroring.policy.for_disks(false);
        let begun = Instant::now();
        let cut = policy.cut(begun);
        let mut measured = Measured::default();
        let mut pending = self.from.dirty.take();
        let mut before = pending.count() as u64;
        for round in 1.. {
            let start = Instant::now();
            self.progress.update(|report| {
                report.rounds = round;
                report.disk_remaining_bytes = before * PAGE as u64;
            });
            let copied = self.copy(&pending, policy.max_bandwidth, cut)?;
            // Behind the round: what the guest wrote while the blocks were copied.
            pending = self.from.dirty.take();
            let dirty = pending.count() as u64;
            // The stop ends with a sync, which is short if there is little to write back.
            let syncing = Instant::now();
            self.to.sync().map_err(MigrationError::Here)?;
            let (synced, span) = (syncing.elapsed(), start.elapsed());
            let round_of = Left {
                memory: 0,
                disks: before,
            };
            measured.measure(round_of, copied, span);
            let predicted = measured.downtime_of_disks(dirty);
            let left = Left {
                memory: 0,
                disks: dirty,
            };
            let another = measured.another(left, span, synced);
            let shorter = measured.downtime_of_disks(another.leaves.disks);
            self.report_round(
                mirroring.id,
                Round {
                    round,
                    pages: before,
                    took_us: micros(span),
                    bytes_per_second: measured.disk_speed,
                    dirty_pages: dirty,
                    predicted_downtime_us: micros(predicted),
                    throttle_percent: 0,
                },
            );
            let situation = Situation {
                round,
                dirty,
                dirty_before: before,
                predicted,
                costs: another.costs,
                saves: predicted.saturating_sub(shorter),
                span,
                elapsed: begun.elapsed(),
                can_postcopy: false,
                throttle: 0,
            };
            before = dirty;
            match policy.next(&situation) {
                Next::Round { .. } => {}
                // `pending` was taken out of the bitmap, which the stop reads.
                Next::Stop => {
                    self.from.dirty.put_back(&pending);
                    return Ok(predicted);
                }
                Next::Postcopy | Next::GiveUp => {
                    return Err(does_not_converge(&policy, dirty, predicted));
                }
            }
        }
        Ok(Duration::ZERO)
    }

    fn report_round(&self, id: Uuid, round: Round) {
        tracing::info!(
            mirror = %id,
            disk = self.from.name,
            round = round.round,
            pages = round.pages,
            bytes_per_second = round.bytes_per_second,
            dirty_pages = round.dirty_pages,
            predicted_us = round.predicted_downtime_us,
            "mirror: a round was copied"
        );
        let span = Duration::from_micros(round.took_us);
        self.progress.update(|report| {
            report.dirty_pages_per_second = per_second(round.dirty_pages, span);
            report.bytes_per_second = round.bytes_per_second;
            report.predicted_downtime_us = Some(round.predicted_downtime_us);
        });
        self.progress.add_round(round);
    }

    /// Copies these blocks, and returns the bytes of those that are not zeros. At the time `cut` the rest is
    /// marked again.
    fn copy(
        &mut self,
        pending: &DirtyPages,
        limit: Option<u64>,
        cut: Option<Instant>,
    ) -> Result<u64, MigrationError> {
        let pacer = Pacer::new(limit);
        let is_cut = || cut.is_some_and(|cut| Instant::now() >= cut);
        let (mut copied, mut measured) = (0, (Instant::now(), 0));
        for run in batches(std::slice::from_ref(pending), limit) {
            if self.decision.is_canceled() {
                return Err(MigrationError::Canceled);
            }
            if is_cut() {
                let first = usize::try_from(run.first).unwrap_or(usize::MAX);
                let pages = run.pages as usize;
                self.from
                    .dirty
                    .mark(first.saturating_mul(PAGE), pages * PAGE);
                continue;
            }
            let bytes = self.copy_run(run)?;
            copied += bytes;
            let (since, then) = measured;
            if since.elapsed() >= SPEED_PERIOD {
                let speed = per_second(copied - then, since.elapsed());
                self.progress
                    .update(|report| report.bytes_per_second = speed);
                measured = (Instant::now(), copied);
            }
            pacer.wait(bytes, || is_cut() || self.decision.is_canceled());
        }
        Ok(copied)
    }

    fn copy_run(&mut self, run: Run) -> Result<u64, MigrationError> {
        let contents = Contents {
            blocks: &[],
            disks: std::slice::from_ref(&self.from),
        };
        let sorted = self.batch.sort(run, |data| contents.read(run, data))?;
        self.to.write(sorted).map_err(MigrationError::Here)?;
        let (full, all) = (sorted.data.len() as u64, u64::from(run.pages) * PAGE as u64);
        self.progress.update(|report| {
            report.sent_bytes += full;
            report.disk_remaining_bytes = report.disk_remaining_bytes.saturating_sub(all);
        });
        Ok(full)
    }

    /// Copies the last blocks, while no queue of the disk is served. From the end of this on, the
    /// mirror cannot be canceled.
    fn finish(mut self) -> Result<Downtime, MigrationError> {
        let start = Instant::now();
        let last = self.from.dirty.take();
        let pages = count(std::slice::from_ref(&last));
        self.progress
            .update(|report| report.disk_remaining_bytes = pages * PAGE as u64);
        // Without a limit: there is little, and the guest waits.
        self.copy(&last, None, None)?;
        self.to.sync().map_err(MigrationError::Here)?;
        if !self.decision.commit() {
            return Err(MigrationError::Canceled);
        }
        Ok(Downtime {
            transfer_us: micros(start.elapsed()),
            pages,
            ..Downtime::default()
        })
    }
}

fn does_not_converge(policy: &Policy, dirty: u64, predicted: Duration) -> MigrationError {
    let why = format!(
        "the guest writes {dirty} blocks of 4 KiB to the disk during one round: the disk would stand \
         still for {} ms, and the limit is {} ms (`max_downtime_ms`)",
        predicted.as_millis(),
        policy.max_downtime.as_millis(),
    );
    MigrationError::here("does-not-converge", why)
}
