//! The stop: the guest is paused, and the rest of it goes to the destination.
//!
//! Each step costs downtime, so whatever can be done before or behind the stop is. Nothing here is
//! final: until the commit point any failure ends with the guest running at the source again, and the
//! destination, which may be ready by then, does nothing without a `Commit`.

use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::mpsc::{self, RecvTimeoutError, Sender};
use std::thread;
use std::time::{Duration, Instant};

use memory::DirtyPages;
use parking_lot::Mutex;

use super::precopy::Subject;
use super::{Contents, Engine, INLINE, disconnected, keepalive};
use crate::decision::Decision;
use crate::journal::Step;
use crate::link::Closer;
use crate::message::{Channel, ToDestination, ToSource};
use crate::policy::Left;
use crate::progress::{Phase, micros};
use crate::sender::{Pacer, Work, batches, count, on_all};
use crate::threads::in_span;
use crate::verify;
use crate::wire::WireError;
use crate::{ATTEMPTS, KEEPALIVES, MigrationError};

impl Engine<'_, '_> {
    /// Stops the guest and sends what is left of it. On return the destination is ready, and the
    /// journal says that the guest has been given away.
    pub(super) fn stop(&mut self, postcopy: bool) -> Result<(), MigrationError> {
        // The guest still runs. Each block written now is one less for `flush` in the stop. A slow
        // disk may need longer than `patience`.
        self.with_keepalive(|source| {
            source.pre_sync();
            Ok(())
        })?;
        // The last look at a cancel that costs the guest no pause.
        self.check()?;
        if postcopy {
            // A connection takes round trips, with TLS several.
            self.faults = Some(self.connect(Channel::Faults)?);
        }
        let limit = self.limit_stop(postcopy)?;
        self.sending.progress.enter(Phase::Stopped);
        let stopped = self.stop_and_copy(postcopy);
        let length = limit.limit;
        // Before the result of the stop: once the clock has expired, an error in `stopped` is only
        // the effect of the connections that the clock closed.
        if !limit.end() {
            let why = format!(
                "the destination was not ready after {} ms of the guest's stop, which is the \
                 limit (`stop_limit_ms`)",
                length.as_millis()
            );
            return Err(MigrationError::here("stop-too-long", why));
        }
        stopped?;
        // The commit point, in two steps. A cancel comes before the first or is refused. The second
        // makes the decision survive this process: from then on the guest runs here only if the
        // destination says that it never ran there. It is written before the message is sent: a
        // source that sent `Commit` and died without a trace of it would take the guest for its own.
        if !self.sending.decision.commit() {
            return Err(MigrationError::Canceled);
        }
        // If this fails, a cancel is refused already, but no `Commit` was sent: `stay` may still
        // take the guest back. The same holds for `hand_over` below.
        let given = self.sending.journal.record(Step::Commit);
        given.map_err(|error| MigrationError::here("journal", error))?;
        tracing::info!(
            migration = %self.sending.id,
            stopped_ms = self.stopped.map_or(0, |(since, _)| since.elapsed().as_millis() as u64),
            pages = self.downtime.pages,
            "migration: the destination is ready, handing the guest over"
        );
        // Behind the journal's line, and not before the destination is ready: a destination that is
        // lost until here costs the guest nothing, and its disks were never free for a third program.
        // In front of the commit message: the destination takes the locks as soon as it reads that.
        self.source.hand_over().map_err(MigrationError::Here)
    }

    /// Starts the clock of a stop.
    fn limit_stop(&self, postcopy: bool) -> Result<StopLimit, MigrationError> {
        let policy = self.sending.policy;
        let of_memory: u64 = if postcopy || self.is_given {
            0
        } else {
            self.blocks
                .iter()
                .map(|b| b.ram.dirty().count() as u64)
                .sum()
        };
        let left = Left {
            memory: of_memory,
            disks: self.dirty_of_disks(),
        };
        let memory = self.blocks.iter().map(|b| b.ram.len() as u64).sum();
        let predicted = self.measured.downtime(left);
        let limit = policy.stop_limit(predicted, memory);
        tracing::info!(
            migration = %self.sending.id,
            pages = left.count(),
            predicted_ms = predicted.as_millis() as u64,
            limit_ms = limit.as_millis() as u64,
            postcopy,
            "migration: stopping the guest"
        );
        let control = self.control.as_ref().ok_or_else(disconnected)?;
        let closer = control.stream.closer().map_err(WireError::from)?;
        let grace = policy.patience / ATTEMPTS;
        StopLimit::start(limit, grace, self.sending.decision.clone(), closer)
            .map_err(|error| MigrationError::here("host-refused", error))
    }

    /// Pauses the guest, sends its last pages and its state, and waits until the destination is ready.
    fn stop_and_copy(&mut self, postcopy: bool) -> Result<(), MigrationError> {
        let start = Instant::now();
        let stopped = self.source.stop().map_err(MigrationError::Here)?;
        // From here on `stay` has a guest to resume. Set before anything else can fail.
        self.stopped = Some((start, stopped));
        self.downtime.pause_us = micros(start.elapsed());
        if self.tracking {
            // The last harvest: no vCPU and no device writes any more.
            self.source.harvest().map_err(MigrationError::Here)?;
        }
        let mut round = self.sending.progress.report().rounds + 1;
        let state = if postcopy {
            self.save_for_postcopy(&mut round)?
        } else {
            self.copy_and_save(&mut round)?
        };
        let sending = Instant::now();
        let control = self.control.as_mut().ok_or_else(disconnected)?;
        let message = ToDestination::State {
            round,
            postcopy,
            paused: stopped.was_paused,
        };
        // Also if sending fails in the middle: the last bytes may have left all the same.
        let sent = control.send_with_state(&message, &state);
        self.state_sent = Some(Instant::now());
        sent?;
        // While the destination loads.
        self.source.flush().map_err(MigrationError::Here)?;
        // `Ready` means that all state is loaded. A commit without it could give away a guest that
        // the destination cannot load, and no copy would run.
        self.downtime.load_us = self.expect(|answer| match answer {
            ToSource::Ready { load_us } => Some(*load_us),
            _ => None,
        })?;
        self.downtime.transfer_us = micros(sending.elapsed());
        Ok(())
    }

    /// Postcopy: sends the rest of the disks, tells which pages of memory come after the guest, and saves
    /// the machine. From here on until
    /// all pages are there, a thread answers for those that the destination waits for: already loading
    /// the devices may need some.
    fn save_for_postcopy(&mut self, round: &mut u32) -> Result<Vec<u8>, MigrationError> {
        let saving = Instant::now();
        // The rest of the disks: no block of a disk may be missing once the guest runs there, since
        // a write to one would have no place to go.
        let disks = self.take_dirty(Subject::Disks);
        let of_disks = count(&disks);
        if !self.disks.is_empty() {
            self.send_pages(*round, &disks, None)?;
            *round += 1;
        }
        if self.verify {
            // Pages that are there already have to be right before the guest runs; those that come
            // later are compared as they arrive.
            let later: Vec<_> = self
                .blocks
                .iter()
                .map(|b| b.ram.dirty().snapshot())
                .collect();
            self.send_hashes(*round, &later)?;
            *round += 1;
        }
        let here = *round;
        self.sending.progress.update(|report| report.rounds = here);
        self.announce_missing(here)?;
        self.downtime.pages = of_disks;
        self.serve_faults()?;
        let state = self.source.save().map_err(MigrationError::Here)?;
        self.downtime.save_us = micros(saving.elapsed()).saturating_sub(self.downtime.verify_us);
        Ok(state)
    }

    /// Precopy: sends the last dirty pages, and saves the machine meanwhile.
    fn copy_and_save(&mut self, round: &mut u32) -> Result<Vec<u8>, MigrationError> {
        let saving = Instant::now();
        let pending = if self.is_given {
            Vec::new()
        } else {
            self.take_dirty(Subject::All)
        };
        self.downtime.pages = count(&pending);
        let state = if self.downtime.pages <= INLINE {
            // Too few for threads: those would cost more than they save.
            self.send_pages(*round, &pending, None)?;
            self.source.save().map_err(MigrationError::Here)?
        } else {
            self.send_and_save(*round, &pending)?
        };
        self.downtime.save_us = micros(saving.elapsed());
        if self.verify {
            // Behind saving, so that a write of the machine to its memory while it is saved is found,
            // too; and when all pages are in place there, so that they can be compared as hashes come.
            self.finish_round(*round)?;
            *round += 1;
            self.send_hashes(*round, &[])?;
        }
        Ok(state)
    }

    /// Many pages: they go while the machine is saved.
    fn send_and_save(
        &mut self,
        round: u32,
        pending: &[DirtyPages],
    ) -> Result<Vec<u8>, MigrationError> {
        let work = Work {
            contents: Contents {
                blocks: &self.blocks,
                disks: &self.disks,
            },
            batches: Mutex::new(batches(pending, self.sending.policy.max_bandwidth)),
            pacer: Pacer::new(self.sending.policy.max_bandwidth),
            // No cut: every page must be there before the state.
            cut: None,
            round,
            progress: self.sending.progress.clone(),
            decision: self.sending.decision.clone(),
        };
        let every = self.sending.policy.patience / KEEPALIVES;
        let (control, source) = (
            self.control.as_mut().ok_or_else(disconnected)?,
            &mut *self.source,
        );
        let sign = || keepalive(control);
        let save = || source.save();
        let (_, saved) = on_all(&mut self.rams, |ram| ram.send(&work), every, sign, save)?;
        saved.map_err(MigrationError::Here)
    }

    /// Sends hashes of all pages but those that come `later`, over all channels in parallel.
    fn send_hashes(&mut self, round: u32, later: &[DirtyPages]) -> Result<(), MigrationError> {
        let start = Instant::now();
        let runs = Mutex::new(verify::all_but(&self.blocks, later).into_iter());
        let progress = self.sending.progress.clone();
        progress.update(|report| report.rounds = round);
        let every = self.sending.policy.patience / KEEPALIVES;
        let control = self.control.as_mut().ok_or_else(disconnected)?;
        let (blocks, rams) = (&self.blocks, &mut self.rams);
        let hash =
            |ram: &mut crate::sender::Ram| ram.send_all_hashes(blocks, &runs, round, &progress);
        on_all(rams, hash, every, || keepalive(control), || ())?;
        self.downtime.verify_us = micros(start.elapsed());
        Ok(())
    }
}

const RUNNING: u8 = 0;
const EXPIRED: u8 = 1;
const ENDED: u8 = 2;

/// Ends a stop that takes too long, whatever the engine waits for: a destination that answers `Busy`
/// for ever, or takes a byte now and then, would otherwise hold the guest for as long as it likes.
struct StopLimit {
    limit: Duration,
    /// [`RUNNING`], then [`EXPIRED`] or [`ENDED`], whichever comes first: the two sides of a race
    /// between the clock and the commit point.
    state: Arc<AtomicU8>,
    /// The clock ends when this is dropped.
    _running: Sender<()>,
}

impl StopLimit {
    /// Starts the clock. When it expires it closes the connections for pages, and reading from the
    /// control channel; after the `grace` in which the engine may say why, all of it by `control`.
    fn start(
        limit: Duration,
        grace: Duration,
        decision: Decision,
        control: Closer,
    ) -> std::io::Result<Self> {
        let state = Arc::new(AtomicU8::new(RUNNING));
        let (running, ended) = mpsc::channel::<()>();
        let clock = Arc::clone(&state);
        let watch = move || {
            // The engine sends nothing: any result but a timeout means that it dropped its end.
            if ended.recv_timeout(limit) != Err(RecvTimeoutError::Timeout) {
                return;
            }
            let turn =
                |to| clock.compare_exchange(RUNNING, to, Ordering::AcqRel, Ordering::Acquire);
            // The engine may pass `end` at this moment. Only the side that wins the exchange acts:
            // to close connections behind the commit point would turn a hand-over into a doubt.
            if turn(EXPIRED).is_err() {
                return;
            }
            decision.close_all();
            // The control channel can still write, so the engine can send `Abort` with the reason.
            // A destination that does not read would block that write: the second limit ends it.
            if ended.recv_timeout(grace) == Err(RecvTimeoutError::Timeout) {
                control.close();
            }
        };
        thread::Builder::new()
            .name("migrate-stop".to_owned())
            .spawn(in_span(watch))?;
        Ok(Self {
            limit,
            state,
            _running: running,
        })
    }

    /// Stops the clock. Returns false if it had expired.
    fn end(self) -> bool {
        let ended =
            self.state
                .compare_exchange(RUNNING, ENDED, Ordering::AcqRel, Ordering::Acquire);
        ended.is_ok()
    }
}
