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
use crate::policy::{AfterCallOff, Left, Mode};
use crate::progress::{Activity, Downtime, Phase, micros};
use crate::sender::{Pacer, Work, batches, count, on_all};
use crate::threads::in_span;
use crate::verify;
use crate::wire::WireError;
use crate::{ATTEMPTS, KEEPALIVES, MigrationError};

/// How a guest is stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum StopKind {
    /// The stop was predicted to keep to `max_downtime`, and is called off if it does not.
    Promised,
    /// The stop takes as long as it takes, up to [`Policy::stop_limit`](crate::Policy::stop_limit).
    Final,
    /// Pages follow the guest.
    Postcopy,
}

/// How a stop ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum StopEnd {
    /// The destination is ready, and the journal says that the guest has been given away.
    Committed,
    /// The guest runs here again, and the migration continues: the stop took too long.
    CalledOff,
}

impl Engine<'_, '_> {
    /// Copies memory, and stops the guest, until a stop is as short as it was promised to be, or the policy
    /// accepts a longer one.
    pub(super) fn copy_and_stop(&mut self) -> Result<(), MigrationError> {
        let mut kind = match self.sending.policy.mode {
            Mode::Postcopy => StopKind::Postcopy,
            Mode::Precopy | Mode::Hybrid | Mode::Auto => self.precopy()?,
        };
        let mut called_off = 0;
        while self.stop_as(kind)? == StopEnd::CalledOff {
            called_off += 1;
            let progress = self.sending.progress;
            progress.update(|report| report.called_off = called_off);
            let policy = self.sending.policy;
            kind = match policy.after_call_off(called_off, self.can_postcopy) {
                AfterCallOff::Retry => self.precopy()?,
                AfterCallOff::Accept => match self.precopy()? {
                    StopKind::Promised => StopKind::Final,
                    other => other,
                },
                AfterCallOff::Postcopy => StopKind::Postcopy,
                AfterCallOff::GiveUp => {
                    let why = format!(
                        "{called_off} stops of the guest were called off because each took longer \
                         than {} ms: the limit is {} ms (`max_downtime_ms`)",
                        policy.promise().as_millis(),
                        policy.max_downtime.as_millis()
                    );
                    return Err(MigrationError::here("stop-too-long", why));
                }
            };
        }
        Ok(())
    }

    /// Stops the guest, unless pages would have to follow it and cannot.
    fn stop_as(&mut self, kind: StopKind) -> Result<StopEnd, MigrationError> {
        if kind == StopKind::Postcopy {
            // The guest still runs here, so this failure costs it no pause.
            if !self.can_postcopy {
                let why = "the destination does not support postcopy: it has no userfaultfd, or \
                           the guest's memory has huge pages";
                return Err(MigrationError::here("no-postcopy", why));
            }
            if self.sending.policy.mode != Mode::Postcopy && !self.disks_can_follow() {
                // What is left of the disks is sent in the stop.
                self.copy_disks()?;
            }
        }
        self.stop(kind)
    }

    /// Stops the guest and sends what is left of it.
    pub(super) fn stop(&mut self, kind: StopKind) -> Result<StopEnd, MigrationError> {
        let postcopy = kind == StopKind::Postcopy;
        self.sending.progress.begin(Activity::Sync);
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
        let stopped = self.stop_and_copy(kind);
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
        if stopped? == StopEnd::CalledOff {
            return Ok(StopEnd::CalledOff);
        }
        self.sending.progress.begin(Activity::HandOver);
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
        self.source.hand_over().map_err(MigrationError::Here)?;
        Ok(StopEnd::Committed)
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
            disks: if postcopy && self.disks_can_follow() {
                0
            } else {
                self.dirty_of_disks()
            },
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
    fn stop_and_copy(&mut self, kind: StopKind) -> Result<StopEnd, MigrationError> {
        let postcopy = kind == StopKind::Postcopy;
        self.sending.progress.begin(Activity::Pause);
        let start = Instant::now();
        let stopped = self.source.stop().map_err(MigrationError::Here)?;
        // From here on `stay` has a guest to resume. Set before anything else can fail.
        self.stopped = Some((start, stopped));
        self.downtime.pause_us = micros(start.elapsed());
        self.sending.progress.begin(Activity::Save);
        if self.tracking {
            // The last harvest: no vCPU and no device writes any more.
            self.source.harvest().map_err(MigrationError::Here)?;
        }
        let mut round = self.sending.progress.report().rounds + 1;
        let until = (kind == StopKind::Promised).then(|| start + self.sending.policy.promise());
        let state = if postcopy {
            self.save_for_postcopy(&mut round)?
        } else {
            let state = self.copy_and_save(round, until)?;
            if until.is_some_and(|until| self.is_late(until)) {
                self.call_off(start, round)?;
                return Ok(StopEnd::CalledOff);
            }
            self.verify_copy(&mut round)?;
            state
        };
        self.sending.progress.begin(Activity::Load);
        let sending = Instant::now();
        let control = self.control.as_mut().ok_or_else(disconnected)?;
        let message = ToDestination::State {
            round,
            postcopy,
            paused: stopped.stays_paused(self.sending.policy),
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
        Ok(StopEnd::Committed)
    }

    /// Whether the rest of the stop would end behind `until`.
    fn is_late(&self, until: Instant) -> bool {
        let rest = self.measured.load + self.measured.round_trip * 3 / 2;
        Instant::now() + rest > until
    }

    /// Resumes the guest, of which the destination has nothing but pages: they are a round like any
    /// other, behind which more follow.
    fn call_off(&mut self, since: Instant, round: u32) -> Result<(), MigrationError> {
        self.source.resume_copying().map_err(MigrationError::Here)?;
        self.stopped = None;
        tracing::warn!(
            migration = %self.sending.id,
            stopped_ms = since.elapsed().as_millis() as u64,
            pages = self.downtime.pages,
            "migration: the stop takes too long, the guest resumes at the source"
        );
        self.downtime = Downtime::default();
        let progress = self.sending.progress.clone();
        progress.begin(Activity::Round);
        progress.update(|report| {
            report.phase = Phase::Precopy;
            report.rounds = round;
        });
        // Behind the resume: a slow network is the likely reason, and much may be on the way.
        self.finish_round(round)
    }

    /// Postcopy: tells which pages of memory and disks come after the guest, and saves the machine. From
    /// here on until all pages are there, a thread answers for those that the destination waits for:
    /// already loading the devices may need some.
    fn save_for_postcopy(&mut self, round: &mut u32) -> Result<Vec<u8>, MigrationError> {
        let saving = Instant::now();
        let mut of_disks = 0;
        if !self.disks.is_empty() && !self.disks_can_follow() {
            // An older destination has no place for blocks that come later.
            let disks = self.take_dirty(Subject::Disks);
            of_disks = count(&disks);
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

    /// Precopy: sends the last dirty pages, and saves the machine meanwhile. Pages that were not sent
    /// `until` then are dirty still.
    fn copy_and_save(
        &mut self,
        round: u32,
        until: Option<Instant>,
    ) -> Result<Vec<u8>, MigrationError> {
        let saving = Instant::now();
        let pending = if self.is_given {
            Vec::new()
        } else {
            self.take_dirty(Subject::All)
        };
        self.downtime.pages = count(&pending);
        let state = if self.downtime.pages <= INLINE {
            // Too few for threads: those would cost more than they save.
            self.send_pages(round, &pending, until)?;
            self.source.save().map_err(MigrationError::Here)?
        } else {
            self.send_and_save(round, &pending, until)?
        };
        self.downtime.save_us = micros(saving.elapsed());
        Ok(state)
    }

    /// Precopy in verify mode: has the destination compare all memory.
    fn verify_copy(&mut self, round: &mut u32) -> Result<(), MigrationError> {
        if self.verify {
            // Behind saving, so that a write of the machine to its memory while it is saved is found,
            // too; and when all pages are in place there, so that they can be compared as hashes come.
            self.finish_round(*round)?;
            *round += 1;
            self.send_hashes(*round, &[])?;
        }
        Ok(())
    }

    /// Many pages: they go while the machine is saved.
    fn send_and_save(
        &mut self,
        round: u32,
        pending: &[DirtyPages],
        until: Option<Instant>,
    ) -> Result<Vec<u8>, MigrationError> {
        let work = Work {
            contents: Contents {
                blocks: &self.blocks,
                disks: &self.disks,
            },
            batches: Mutex::new(batches(pending, self.sending.policy.max_bandwidth)),
            pacer: Pacer::new(self.sending.policy.max_bandwidth),
            // Behind a cut the stop is called off: every page must be there before the state.
            cut: until,
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
        work.put_back();
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
