//! The point of no return, and what is behind it.

use std::time::{Duration, Instant};

use uuid::Uuid;

use super::{Engine, Outcome, Stopped, dial_channel, disconnected};
use crate::decision::{Doubt, Question, Resolution};
use crate::journal::Step;
use crate::link::Dial;
use crate::message::{Channel, Control, Hello, Refusal, ToDestination, ToSource};
use crate::progress::{Phase, micros};
use crate::wire::WireError;
use crate::{ATTEMPTS, LINGER, MigrationError};

/// A destination that may be ready for a guest that stays, and was not told so.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PendingAbort {
    id: Uuid,
    why: Refusal,
    patience: Duration,
}

impl PendingAbort {
    /// Tells it, as soon as it can be reached, and gives up after a while: then it stands in doubt until
    /// somebody decides. Whether it was told.
    pub fn send(&self, dial: &dyn Dial) -> bool {
        let until = Instant::now() + self.patience * LINGER;
        loop {
            match self.try_send(dial) {
                Ok(()) => return true,
                Err(error) if Instant::now() > until => {
                    tracing::warn!(migration = %self.id, %error, "the destination was not told that its guest stays");
                    return false;
                }
                Err(_) => std::thread::sleep(self.patience / ATTEMPTS),
            }
        }
    }

    fn try_send(&self, dial: &dyn Dial) -> Result<(), MigrationError> {
        let again = Hello::new(self.id, Channel::Again);
        let mut control = Control::new(dial_channel(dial, self.patience, &again)?);
        match control.recv()? {
            ToSource::Waiting => {
                control.send(&ToDestination::Abort(self.why.clone()))?;
                recv_abort_ack(&mut control)
                    .then_some(())
                    .ok_or_else(disconnected)
            }
            ToSource::Running { .. } => {
                tracing::error!(migration = %self.id, "somebody decided that a guest runs at its destination, and it runs here, too");
                Ok(())
            }
            // It knows, or knows nothing of it any more.
            _ => Ok(()),
        }
    }
}

/// Whether the destination says that it will not run the guest.
fn recv_abort_ack(control: &mut Control) -> bool {
    loop {
        match control.recv() {
            Ok(ToSource::NotHere(_) | ToSource::Refused(_)) => return true,
            // Answers to what was said before.
            Ok(_) => {}
            Err(_) => return false,
        }
    }
}

impl Engine<'_, '_> {
    /// The guest stays: it goes on if it was stopped, and the destination hears of it.
    pub(super) fn stay(&mut self, error: MigrationError) -> Outcome {
        let error = match error {
            // Of the many ways in which it shows that connections were closed.
            MigrationError::Wire(_) if self.sending.decision.is_canceled() => {
                MigrationError::Canceled
            }
            MigrationError::Wire(error) => self
                .last_words()
                .map_or(MigrationError::Wire(error), MigrationError::There),
            other => other,
        };
        if let Some(fault_server) = self.fault_server.take() {
            drop(fault_server.end());
        }
        let is_theirs = matches!(error, MigrationError::There(_));
        let mut why = error.refusal();
        tracing::warn!(migration = %self.sending.id, %why, "a guest stays where it is");
        if self.stopped.is_some()
            && let Err(error) = self.take_back()
        {
            why.detail = format!("{}; and the guest cannot go on: {error}", why.detail);
        }
        self.source.throttle(0);
        if self.tracking
            && let Err(error) = self.source.stop_tracking()
        {
            tracing::warn!(%error, "dirty pages are still being tracked");
        }
        let knows = is_theirs || self.abort(&why);
        if let Err(error) = self.sending.journal.record(Step::Aborted) {
            tracing::warn!(%error, "a journal cannot be written");
        }
        // One that did not hear it, and may be ready, waits for us.
        let pending_abort = (!knows && self.stopped.is_some()).then(|| PendingAbort {
            id: self.sending.id,
            why: why.clone(),
            patience: self.sending.policy.patience,
        });
        Outcome::Stayed { why, pending_abort }
    }

    /// What was handed over may be held for a moment by who was to have it.
    fn take_back(&mut self) -> Result<(), Refusal> {
        let patience = self.sending.policy.patience;
        let until = Instant::now() + patience;
        loop {
            match self.source.resume() {
                Err(why) if why.code != "machine-gone" && Instant::now() < until => {
                    std::thread::sleep(patience / ATTEMPTS);
                }
                done => return done,
            }
        }
    }

    /// Tells the destination that the guest stays. Whether it is certain that it knows.
    fn abort(&mut self, why: &Refusal) -> bool {
        let patience = self.sending.policy.patience / ATTEMPTS;
        let Some(control) = &mut self.control else {
            return false;
        };
        control.send(&ToDestination::Abort(why.clone())).is_ok()
            && self.stopped.is_some()
            && control.stream.set_patience(patience).is_ok()
            && recv_abort_ack(control)
    }

    /// Why the destination closed its connections, if it said so.
    fn last_words(&mut self) -> Option<Refusal> {
        let patience = self.sending.policy.patience / ATTEMPTS;
        let control = self.control.as_mut()?;
        control.stream.set_patience(patience).ok()?;
        loop {
            match control.recv().ok()? {
                ToSource::Refused(why) => return Some(why),
                // Answers to what was said before.
                ToSource::Pong(_) | ToSource::RoundDone(_) | ToSource::Busy => {}
                _ => return None,
            }
        }
    }

    /// The guest is given away: this ends when it is certain that it runs there, or that it never
    /// did and never will.
    pub(super) fn after_commit(&mut self) -> Outcome {
        let progress = self.sending.progress.clone();
        progress.enter(Phase::HandingOver);
        let order = Instant::now();
        let (since, stopped) = self.stopped.unwrap_or((
            order,
            Stopped {
                was_paused: false,
                clocks_at: order,
            },
        ));
        let mut answer = self.send_commit(stopped);
        // Open from the first loss of the destination until an answer settles where the guest runs.
        let mut question: Option<Question> = None;
        loop {
            let error = match answer {
                Ok(ToSource::Running { us, told_us }) => {
                    let (all, handing) = (since.elapsed(), order.elapsed());
                    // What came behind the guest, and the answer's way back, are no part of the stop.
                    let told = Duration::from_micros(told_us);
                    let behind = Duration::from_micros(told_us.saturating_sub(us));
                    let no_part = behind + handing.saturating_sub(told) / 2;
                    self.downtime.hand_over_us = micros(handing.saturating_sub(no_part));
                    self.downtime.total_us = micros(all.saturating_sub(no_part));
                    let downtime = self.downtime;
                    progress.update(|report| report.downtime = Some(downtime));
                    // So that it need not wait for us to ask again.
                    let told = self.send(&ToDestination::Complete);
                    if self.fault_server.is_some() {
                        drop(question);
                        if told.is_err() {
                            self.control = None;
                        }
                        self.follow_with_pages();
                    }
                    return self.moved();
                }
                Ok(ToSource::Ended) => return self.moved(),
                // It runs there, we did not hear of it, and it waits for pages.
                Ok(ToSource::StillMissing { .. } | ToSource::Prepared { .. })
                    if self.fault_server.is_some() =>
                {
                    self.control = None;
                    drop(question);
                    self.follow_with_pages();
                    return self.moved();
                }
                Ok(ToSource::NotHere(why)) => return self.stay(MigrationError::There(why)),
                Ok(other) => {
                    let why = WireError::damaged(format!("{other:?} is not an answer to Commit"));
                    why.into()
                }
                Err(error) => error,
            };
            // Before the report shows the doubt: an operator who sees it can resolve it.
            let open = question.get_or_insert_with(|| self.sending.decision.ask(Doubt::HandOver));
            let wait = self.sending.policy.patience / ATTEMPTS;
            self.enter_doubt(&error);
            match open.wait(wait) {
                Some(Resolution::Run) => {
                    let why = "somebody decided that the guest goes on here";
                    return self.stay(MigrationError::here("resolved", why));
                }
                Some(Resolution::Discard) => return self.moved(),
                None => answer = self.retry_commit(stopped),
            }
        }
    }

    fn enter_doubt(&mut self, error: &MigrationError) {
        self.control = None;
        if self.sending.progress.report().phase != Phase::InDoubt {
            self.source.doubt();
        }
        self.sending.progress.update(|report| {
            report.phase = Phase::InDoubt;
            report.error = Some(error.refusal());
        });
    }

    fn send_commit(&mut self, stopped: Stopped) -> Result<ToSource, MigrationError> {
        let stopped_for = stopped.clocks_at.elapsed().as_nanos();
        self.send(&ToDestination::Commit {
            stood_for_ns: u64::try_from(stopped_for).unwrap_or(u64::MAX),
            paused: stopped.was_paused,
        })?;
        Ok(self.control.as_mut().ok_or_else(disconnected)?.recv()?)
    }

    /// Over a new connection.
    fn retry_commit(&mut self, stopped: Stopped) -> Result<ToSource, MigrationError> {
        let stream = self.connect(Channel::Again)?;
        self.control = Some(Control::new(stream));
        match self.control.as_mut().ok_or_else(disconnected)?.recv()? {
            ToSource::Waiting => self.send_commit(stopped),
            // It does not know of this migration. That is no answer.
            ToSource::Refused(why) => Err(MigrationError::There(why)),
            other => Ok(other),
        }
    }

    fn moved(&mut self) -> Outcome {
        if let Err(error) = self.sending.journal.record(Step::Running) {
            tracing::warn!(%error, "a journal cannot be written");
        }
        self.source.gone();
        Outcome::Moved
    }
}
