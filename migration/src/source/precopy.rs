//! Rounds of dirty pages while the guest runs: of disks alone, and of all.

use std::time::{Duration, Instant};

use memory::DirtyPages;
use parking_lot::Mutex;

use super::stop::StopKind;
use super::{Contents, Engine, INLINE, disconnected, keepalive};
use crate::message::{ToDestination, ToSource};
use crate::pages::PAGE;
use crate::policy::{Left, Mode, Next, Policy, Situation};
use crate::progress::{Activity, Phase, Round, micros};
use crate::sender::{Pacer, Work, batches, count, on_all, per_second, send_inline};
use crate::{KEEPALIVES, MigrationError};

/// The content that a round copies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Subject {
    /// Memory and disks.
    All,
    Disks,
}

/// Predictions by which the policy chooses the step after a round.
struct Outlook {
    /// The length of a stop now.
    predicted: Duration,
    /// How long another round would take.
    costs: Duration,
    /// By how much another round would shorten the stop.
    saves: Duration,
}

impl Engine<'_, '_> {
    /// Runs precopy rounds until the policy stops the guest.
    pub(super) fn precopy(&mut self) -> Result<StopKind, MigrationError> {
        let policy = self.sending.policy.clone();
        self.rounds(Subject::All, &policy)
    }

    /// Copies disks until what the guest writes to them meanwhile fits into the stop, or the policy has
    /// the rest follow the guest. Where blocks cannot follow, a guest that writes faster than that is
    /// slowed down at the deadline, or whatever else the policy says.
    pub(super) fn copy_disks(&mut self) -> Result<(), MigrationError> {
        let (policy, follow) = (self.sending.policy, self.disks_can_follow());
        if self.disks.is_empty() || follow && policy.mode == Mode::Postcopy {
            return Ok(());
        }
        let policy = policy.for_disks(follow);
        self.rounds(Subject::Disks, &policy).map(|_| ())
    }

    fn rounds(&mut self, subject: Subject, policy: &Policy) -> Result<StopKind, MigrationError> {
        let progress = self.sending.progress.clone();
        progress.enter(Phase::Precopy);
        let begun = self.begun;
        let cut = policy.cut(begun);
        let mut harvested = Instant::now();
        let mut pending = self.take_dirty(subject);
        let (mut before, mut throttle) = (count(&pending), self.throttle);
        let earlier = progress.report().rounds;
        for judged in 1.. {
            self.check()?;
            let round = earlier + judged;
            progress.begin(Activity::Round);
            self.round(round, &pending, cut)?;
            // Behind the round: the prediction needs what the guest wrote while the pages were
            // sent. With an earlier harvest the stop would look shorter than it is.
            let harvesting = Instant::now();
            if subject == Subject::All {
                self.with_keepalive(|source| source.harvest())?;
            }
            pending = self.take_dirty(subject);
            // Beside its pages, a round costs this and an answer.
            let fixed = harvesting.elapsed() + self.measured.round_trip;
            let dirty = count(&pending);
            let span = harvested.elapsed();
            harvested = Instant::now();
            let least = self.measured.downtime(Left::default());
            if subject == Subject::All && least > policy.max_downtime {
                // No round would change that; but what was busy when it was measured may be no longer.
                self.measure()?;
            }
            let outlook = self.outlook(subject, &pending, span, fixed);
            let predicted = outlook.predicted;
            let speed = match subject {
                Subject::All => self.measured.memory_speed,
                Subject::Disks => self.measured.disk_speed,
            };
            let record = Round {
                round,
                pages: before,
                took_us: micros(span),
                bytes_per_second: speed,
                dirty_pages: dirty,
                predicted_downtime_us: micros(predicted),
                throttle_percent: throttle,
            };
            self.report_round(subject, record, per_second(dirty, span));
            let situation = Situation {
                round: judged,
                dirty,
                dirty_before: before,
                predicted,
                costs: outlook.costs,
                saves: outlook.saves,
                span,
                elapsed: begun.elapsed(),
                can_postcopy: self.can_postcopy,
                throttle,
            };
            before = dirty;
            match policy.next(&situation) {
                Next::Round { throttle: wanted } => {
                    if wanted != throttle {
                        (throttle, self.throttle) = (wanted, wanted);
                        self.source.throttle(throttle);
                        progress.update(|report| report.throttle_percent = throttle);
                    }
                }
                // `pending` was taken out of the bitmaps, and the stop reads those. Without putting
                // it back, the destination would keep old content of these pages.
                next @ (Next::Stop | Next::Postcopy) => {
                    self.put_back(&pending);
                    return Ok(match next {
                        Next::Postcopy => StopKind::Postcopy,
                        _ if predicted <= policy.max_downtime => StopKind::Promised,
                        _ => StopKind::Final,
                    });
                }
                Next::GiveUp => {
                    self.put_back(&pending);
                    return Err(self.does_not_converge(subject, dirty, predicted));
                }
            }
        }
        Ok(StopKind::Final)
    }

    /// Predicts the stop with these pages left, and what another round would change. A round costs
    /// `fixed` beside its pages.
    fn outlook(
        &self,
        subject: Subject,
        pending: &[DirtyPages],
        span: Duration,
        fixed: Duration,
    ) -> Outlook {
        let downtime = |left: Left| match subject {
            Subject::All => self.measured.downtime(left),
            // Only what the disks add: their rounds cannot shorten the rest of the stop, and in
            // postcopy no part of the stop depends on them.
            Subject::Disks => self.measured.downtime_of_disks(left.disks),
        };
        let left = self.left(pending);
        let another = self.measured.another(left, span, fixed);
        let predicted = downtime(left);
        Outlook {
            predicted,
            costs: another.costs,
            saves: predicted.saturating_sub(downtime(another.leaves)),
        }
    }

    fn does_not_converge(
        &self,
        subject: Subject,
        dirty: u64,
        predicted: Duration,
    ) -> MigrationError {
        let of = match subject {
            Subject::All if self.disks.is_empty() => "pages",
            Subject::All => "pages of memory and disks",
            Subject::Disks => "blocks of 4 KiB of its disks",
        };
        let why = format!(
            "{dirty} {of} are left, which were not sent in time or which the guest wrote again: the \
             stop would be {} ms, and the limit is {} ms (`max_downtime_ms`)",
            predicted.as_millis(),
            self.sending.policy.max_downtime.as_millis(),
        );
        MigrationError::here("does-not-converge", why)
    }

    fn report_round(&self, subject: Subject, round: Round, dirty_pages_per_second: u64) {
        let progress = &self.sending.progress;
        progress.update(|report| {
            report.dirty_pages_per_second = dirty_pages_per_second;
            if subject == Subject::All {
                report.predicted_downtime_us = Some(round.predicted_downtime_us);
            }
        });
        tracing::info!(
            migration = %self.sending.id,
            round = round.round,
            pages = round.pages,
            bytes_per_second = round.bytes_per_second,
            dirty_pages = round.dirty_pages,
            dirty_pages_per_second,
            predicted_ms = round.predicted_downtime_us / 1000,
            throttle_percent = round.throttle_percent,
            ?subject,
            "migration: a round was copied"
        );
        progress.add_round(round);
    }

    /// Takes the marks of dirty pages: a list for each block, and behind those one for each disk.
    pub(super) fn take_dirty(&self, subject: Subject) -> Vec<DirtyPages> {
        let memory = self.blocks.iter().map(|block| match subject {
            Subject::All => block.ram.dirty().take(),
            Subject::Disks => DirtyPages::default(),
        });
        let disks = self.disks.iter().map(|disk| disk.dirty.take());
        memory.chain(disks).collect()
    }

    fn put_back(&self, pages: &[DirtyPages]) {
        let memory = self.blocks.iter().map(|block| block.ram.dirty());
        let disks = self.disks.iter().map(|disk| &*disk.dirty);
        for (bitmap, pages) in memory.chain(disks).zip(pages) {
            bitmap.put_back(pages);
        }
    }

    /// Dirty pages of disks that no round has taken.
    pub(super) fn dirty_of_disks(&self) -> u64 {
        let disks = self.disks.iter();
        disks.map(|disk| disk.dirty.count() as u64).sum()
    }

    /// How many of these pages are of memory, and how many of disks.
    fn left(&self, pages: &[DirtyPages]) -> Left {
        let (memory, disks) = pages
            .split_at_checked(self.blocks.len())
            .unwrap_or_default();
        Left {
            memory: count(memory),
            disks: count(disks),
        }
    }

    /// Shows what a round is about to send.
    fn show_pending(&self, round: u32, pending: &[DirtyPages]) {
        let Left { memory, disks } = self.left(pending);
        // While disks are copied, memory waits.
        let waiting = match self.disks.is_empty() {
            true => 0,
            false => self
                .blocks
                .iter()
                .map(|b| b.ram.dirty().count() as u64)
                .sum(),
        };
        self.sending.progress.update(|report| {
            report.rounds = round;
            report.remaining_pages = memory.saturating_add(waiting);
            report.disk_remaining_bytes = disks * PAGE as u64;
        });
    }

    /// Sends pages, and waits until they are in the destination's memory. What was not sent when the
    /// round was `cut` short is dirty still.
    fn round(
        &mut self,
        round: u32,
        pending: &[DirtyPages],
        cut: Option<Instant>,
    ) -> Result<(), MigrationError> {
        let start = Instant::now();
        let sent = self.send_pages(round, pending, cut)?;
        self.finish_round(round)?;
        let left = self.left(pending);
        if let Some(speed) = self.measured.measure(left, sent, start.elapsed()) {
            self.sending
                .progress
                .update(|report| report.bytes_per_second = speed);
        }
        Ok(())
    }

    /// Waits until all pages of a round are in the destination's memory.
    pub(super) fn finish_round(&mut self, round: u32) -> Result<(), MigrationError> {
        self.send(&ToDestination::Round(round))?;
        self.expect(|answer| (*answer == ToSource::RoundDone(round)).then_some(()))
    }

    /// Sends pages over all channels, and the end of the round over each. Returns the bytes that were sent.
    pub(super) fn send_pages(
        &mut self,
        round: u32,
        pending: &[DirtyPages],
        cut: Option<Instant>,
    ) -> Result<u64, MigrationError> {
        let pages = count(pending);
        let progress = self.sending.progress.clone();
        self.show_pending(round, pending);
        let contents = Contents {
            blocks: &self.blocks,
            disks: &self.disks,
        };
        let limit = self.sending.policy.max_bandwidth;
        let (batches, pacer) = (batches(pending, limit), Pacer::new(limit));
        let every = self.sending.policy.patience / KEEPALIVES;
        // Not what takes so long that the destination needs keepalives meanwhile.
        if pages <= INLINE && pacer.has_room(pages * PAGE as u64, every) {
            return send_inline(&mut self.rams, contents, batches, &pacer, round, &progress);
        }
        let work = Work {
            contents,
            batches: Mutex::new(batches),
            pacer,
            cut,
            round,
            progress,
            decision: self.sending.decision.clone(),
        };
        let control = self.control.as_mut().ok_or_else(disconnected)?;
        // Keepalives during a long round. A RAM channel that writes to a dead peer would not notice by itself,
        // so a failed keepalive closes all connections.
        let sign = || keepalive(control).inspect_err(|_| work.decision.close_all());
        let sent = on_all(&mut self.rams, |ram| ram.send(&work), every, sign, || ());
        let (sent, ()) = sent.map_err(|error| match error {
            _ if work.decision.is_canceled() => MigrationError::Canceled,
            error => error,
        })?;
        // A round that was cut short leaves batches. They have to be dirty again, or no later round
        // would send them.
        work.put_back();
        Ok(sent)
    }
}
