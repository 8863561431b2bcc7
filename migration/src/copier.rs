//! Copying disks into new images of this host while their guest writes: in rounds, and the last blocks
//! in a stop. Used by [mirrors](crate::mirror) and by snapshots that have copies of disks.

use std::time::{Duration, Instant};

use memory::DirtyPages;
use uuid::Uuid;

use crate::MigrationError;
use crate::decision::Decision;
use crate::disks::{Contents, DestinationDisk, IncomingDisk, SourceDisk};
use crate::pages::{Batch, PAGE, Run};
use crate::policy::{Left, Measured, Next, Policy, Situation};
use crate::progress::{Progress, Round, micros};
use crate::sender::{Pacer, batches, count, per_second};

/// How often the throughput of a round is measured anew.
const SPEED_PERIOD: Duration = Duration::from_millis(250);

/// Copies blocks of disks to their new images.
pub(crate) struct Copier {
    /// The operation, for log lines.
    id: Uuid,
    from: Vec<SourceDisk>,
    /// The images of the disks in [`from`](Self::from), at the same indices.
    to: Vec<IncomingDisk>,
    batch: Batch,
    measured: Measured,
    begun: Instant,
    /// Rounds so far.
    round: u32,
    progress: Progress,
    decision: Decision,
}

impl Copier {
    pub(crate) fn new(id: Uuid, progress: &Progress, decision: &Decision) -> Self {
        Self {
            id,
            from: Vec::new(),
            to: Vec::new(),
            batch: Batch::default(),
            measured: Measured::default(),
            begun: Instant::now(),
            round: 0,
            progress: progress.clone(),
            decision: decision.clone(),
        }
    }

    /// Adds a disk, and its image of zeros, which is as large.
    pub(crate) fn add(&mut self, from: SourceDisk, to: DestinationDisk) {
        self.progress
            .update(|report| report.disk_bytes += from.size);
        self.from.push(from);
        self.to.push(IncomingDisk::new(to));
    }

    /// Copies rounds until what the guest writes meanwhile fits into the stop. Returns the predicted stop.
    /// May be called again before the stop, for what was written since.
    pub(crate) fn rounds(&mut self, policy: &Policy) -> Result<Duration, MigrationError> {
        let policy = policy.for_disks(false);
        let cut = policy.cut(self.begun);
        let mut pending = self.take_dirty();
        let mut before = count(&pending);
        loop {
            let start = Instant::now();
            self.round = self.round.saturating_add(1);
            self.progress.update(|report| {
                report.rounds = self.round;
                report.disk_remaining_bytes = before * PAGE as u64;
            });
            let copied = self.copy(&pending, policy.max_bandwidth, cut)?;
            // Behind the round: what the guest wrote while the blocks were copied.
            pending = self.take_dirty();
            let dirty = count(&pending);
            // The stop writes into the host's cache, which takes little without waiting if little is in it.
            let syncing = Instant::now();
            self.sync()?;
            let (synced, span) = (syncing.elapsed(), start.elapsed());
            let round_of = Left {
                memory: 0,
                disks: before,
            };
            self.measured.measure(round_of, copied, span);
            let predicted = self.measured.downtime_of_disks(dirty);
            let left = Left {
                memory: 0,
                disks: dirty,
            };
            let another = self.measured.another(left, span, synced);
            let shorter = self.measured.downtime_of_disks(another.leaves.disks);
            self.report_round(Round {
                round: self.round,
                pages: before,
                took_us: micros(span),
                bytes_per_second: self.measured.disk_speed,
                dirty_pages: dirty,
                predicted_downtime_us: micros(predicted),
                throttle_percent: 0,
            });
            let situation = Situation {
                round: self.round,
                dirty,
                dirty_before: before,
                predicted,
                costs: another.costs,
                saves: predicted.saturating_sub(shorter),
                span,
                elapsed: self.begun.elapsed(),
                can_postcopy: false,
                throttle: 0,
            };
            before = dirty;
            match policy.next(&situation) {
                Next::Round { .. } => {}
                // `pending` was taken out of the bitmaps, which the stop reads.
                Next::Stop => {
                    for (disk, pending) in self.from.iter().zip(&pending) {
                        disk.dirty.put_back(pending);
                    }
                    return Ok(predicted);
                }
                Next::Postcopy | Next::GiveUp => {
                    return Err(does_not_converge(&policy, dirty, predicted));
                }
            }
        }
    }

    fn take_dirty(&self) -> Vec<DirtyPages> {
        self.from.iter().map(|disk| disk.dirty.take()).collect()
    }

    fn report_round(&self, round: Round) {
        tracing::info!(
            operation = %self.id,
            round = round.round,
            pages = round.pages,
            bytes_per_second = round.bytes_per_second,
            dirty_pages = round.dirty_pages,
            predicted_us = round.predicted_downtime_us,
            "disks: a round was copied"
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
        pending: &[DirtyPages],
        limit: Option<u64>,
        cut: Option<Instant>,
    ) -> Result<u64, MigrationError> {
        let pacer = Pacer::new(limit);
        let is_cut = || cut.is_some_and(|cut| Instant::now() >= cut);
        let (mut copied, mut measured) = (0, (Instant::now(), 0));
        for run in batches(pending, limit).flatten() {
            if self.decision.is_canceled() {
                return Err(MigrationError::Canceled);
            }
            if is_cut() {
                self.mark(run);
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

    /// Leaves blocks for a later round.
    fn mark(&self, run: Run) {
        let first = usize::try_from(run.first).unwrap_or(usize::MAX);
        if let Some(disk) = self.from.get(run.block as usize) {
            disk.dirty
                .mark(first.saturating_mul(PAGE), run.pages as usize * PAGE);
        }
    }

    fn copy_run(&mut self, run: Run) -> Result<u64, MigrationError> {
        let contents = Contents {
            blocks: &[],
            disks: &self.from,
        };
        let sorted = self
            .batch
            .sort(&[run], |run, data| contents.read(run, data))?;
        if let Some(image) = self.to.get(run.block as usize) {
            image.write(sorted).map_err(MigrationError::Here)?;
        }
        let (full, all) = (sorted.data.len() as u64, u64::from(run.pages) * PAGE as u64);
        self.progress.update(|report| {
            report.sent_bytes += full;
            report.disk_remaining_bytes = report.disk_remaining_bytes.saturating_sub(all);
        });
        Ok(full)
    }

    /// Copies the last blocks, while the disks do not change. Returns their number.
    pub(crate) fn last(&mut self) -> Result<u64, MigrationError> {
        let (pages, _) = self.last_until(None)?;
        Ok(pages)
    }

    /// Copies the last blocks, while the disks do not change, until the time `cut`. Returns their number, and
    /// whether all are copied: the others are marked again.
    pub(crate) fn last_until(
        &mut self,
        cut: Option<Instant>,
    ) -> Result<(u64, bool), MigrationError> {
        let last = self.take_dirty();
        let pages = count(&last);
        self.progress
            .update(|report| report.disk_remaining_bytes = pages * PAGE as u64);
        // Without a limit: there is little, and the guest waits.
        self.copy(&last, None, cut)?;
        let left = self.from.iter().any(|disk| disk.dirty.count() > 0);
        Ok((pages, !left))
    }

    /// Makes durable what was copied.
    pub(crate) fn sync(&self) -> Result<(), MigrationError> {
        let synced = self.to.iter().try_for_each(IncomingDisk::sync);
        synced.map_err(MigrationError::Here)
    }
}

fn does_not_converge(policy: &Policy, dirty: u64, predicted: Duration) -> MigrationError {
    let why = format!(
        "{dirty} blocks of 4 KiB are left, which were not copied in time or which the guest wrote \
         again: the stop would take {} ms, and the limit is {} ms (`max_downtime_ms`)",
        predicted.as_millis(),
        policy.max_downtime.as_millis(),
    );
    MigrationError::here("does-not-converge", why)
}
