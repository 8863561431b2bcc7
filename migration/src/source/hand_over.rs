//! The commit message and what follows it, and the way back before it.
//!
//! Before the commit point the source owns the guest, and every failure ends with the guest running
//! here ([`Engine::stay`]). Behind it the source cannot know by itself where the guest is: a lost
//! `Commit` and a lost answer look the same from here, and no timeout tells them apart. So the source
//! does not resume the guest on its own, however long the silence. It asks over new connections
//! until the destination states a fact (the guest runs there; or it never ran there and never will), or
//! until an operator decides, who can look at the other host. That costs availability in a rare case
//! and never a second copy, which would write to the same disks.

use std::time::{Duration, Instant};

use uuid::Uuid;

use super::{Engine, Outcome, Stopped, Whereabouts, dial_channel, disconnected, postcopy};
use crate::decision::{Doubt, Question, Resolution};
use crate::journal::Step;
use crate::link::Dial;
use crate::message::{Channel, ControlChannel, Hello, Refusal, ToDestination, ToSource};
use crate::progress::{Activity, Phase, micros};
use crate::threads::within;
use crate::wire::WireError;
use crate::{ATTEMPTS, LINGER, MigrationError};

/// A destination that may be ready for a guest that stays here, and has not heard that it stays. It
/// waits for a decision, so the source keeps trying for a while after the migration is over here.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PendingAbort {
    pub(super) id: Uuid,
    pub(super) why: Refusal,
    pub(super) patience: Duration,
}

impl PendingAbort {
    /// Sends the notice as soon as the destination can be reached, and gives up after six times
    /// `patience`: then the destination stays in doubt until its operator decides.
    /// Returns whether the destination has the notice.
    pub fn send(&self, dial: &dyn Dial) -> bool {
        let until = Instant::now() + self.patience * LINGER;
        loop {
            match self.try_send(dial) {
                Ok(()) => return true,
                Err(error) if Instant::now() > until => {
                    tracing::warn!(migration = %self.id, %error, "cannot tell the destination \
                                                                  that the guest stays at the \
                                                                  source");
                    return false;
                }
                Err(_) => std::thread::sleep(self.patience / ATTEMPTS),
            }
        }
    }

    fn try_send(&self, dial: &dyn Dial) -> Result<(), MigrationError> {
        let again = Hello::new(self.id, Channel::Again);
        let stream = dial_channel(dial, self.patience, &again)?;
        let closer = stream.closer().map_err(WireError::from)?;
        let mut control = ControlChannel::new(stream);
        let told = within(self.patience, &closer, || self.tell(&mut control));
        told.map_err(|error| MigrationError::here("host-refused", error))?
    }

    fn tell(&self, control: &mut ControlChannel) -> Result<(), MigrationError> {
        match control.recv()? {
            ToSource::Waiting => {
                control.send(&ToDestination::Abort(self.why.clone()))?;
                recv_abort_ack(control)
                    .then_some(())
                    .ok_or_else(disconnected)
            }
            // An operator resolved a doubt against the facts, and two copies run. Another attempt
            // cannot undo that: the log raises the alarm, and the notice counts as delivered.
            ToSource::Running { .. } => {
                tracing::error!(migration = %self.id, "a guest runs at both sides: an operator \
                                                       decided that it runs at its destination");
                Ok(())
            }
            // It knows, or will never run the guest.
            ToSource::NotHere(_) | ToSource::Ended | ToSource::Completed => Ok(()),
            ToSource::Refused(why) if why.code == "unknown-migration" => Ok(()),
            // Such as `out-of-order`: a destination that is still loading the guest. It will be ready,
            // and wait for this notice.
            ToSource::Refused(why) => Err(MigrationError::There(why)),
            other @ (ToSource::Pong(_)
            | ToSource::Welcome { .. }
            | ToSource::HasBases(_)
            | ToSource::Prepared { .. }
            | ToSource::Busy
            | ToSource::RoundDone(_)
            | ToSource::GuessLoaded { .. }
            | ToSource::Ready { .. }
            | ToSource::StillMissing { .. }) => {
                let why = format!("{other:?} is not an answer to a source that reconnects");
                Err(WireError::damaged(why).into())
            }
        }
    }
}

/// Whether the destination says that it will not run the guest.
fn recv_abort_ack(control: &mut ControlChannel) -> bool {
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
    /// Keeps the guest here: resumes it if it was stopped, and then tells the destination. In this order,
    /// because the guest waits; the destination does nothing without a `Commit`.
    pub(super) fn stay(&mut self, error: MigrationError) -> Outcome {
        // A broken connection is often the effect of a refusal: the destination sends the reason
        // and closes. After a cancel there is nothing to read, because the cancel ended reading.
        let error = match error {
            MigrationError::Wire(error) if !self.sending.decision.is_canceled() => self
                .last_words()
                .map_or(MigrationError::Wire(error), MigrationError::There),
            other => other,
        };
        // Taken before a cancel replaces the error: a destination that refused needs no `Abort`.
        let is_theirs = matches!(error, MigrationError::There(_));
        // A cancel shows in many ways: connections that it closed, or a machine that is gone because
        // a request that ends it came with the cancel.
        let error = self.sending.decision.ended().unwrap_or(error);
        // Ended before the guest resumes here: then its pages change, and the destination must get
        // no more of them.
        if let Some(fault_server) = self.fault_server.take() {
            fault_server.cut();
        }
        let mut why = error.refusal();
        tracing::warn!(migration = %self.sending.id, %why, "a guest stays at the source");
        self.sending.progress.begin(Activity::Release);
        let knows = is_theirs || self.hold(&why);
        if self.stopped.is_some()
            && let Err(error) = self.take_back()
        {
            // Both reasons go to the user: why the migration ended, and why the guest does not run.
            why.detail = format!("{}; and the guest cannot resume: {error}", why.detail);
        }
        self.source.throttle(0);
        if self.tracking
            && let Err(error) = self.source.stop_tracking()
        {
            tracing::warn!(%error, "cannot stop tracking dirty pages");
        }
        let knows = knows || self.abort(&why);
        // The guest stays whatever the journal says. Without this line a restart finds the
        // migration undecided.
        if let Err(error) = self.sending.journal.record(Step::Aborted) {
            tracing::warn!(%error, "cannot write a journal");
        }
        // A destination that was sent the state may be ready and wait for the decision.
        let pending_abort = (!knows && self.stopped.is_some()).then(|| PendingAbort {
            id: self.sending.id,
            why: why.clone(),
            patience: self.sending.policy.patience,
        });
        Outcome::Stayed { why, pending_abort }
    }

    /// Keeps the guest paused for the time that the policy promises ([`Policy::hold`]), or until the
    /// destination knows that the guest stays here. Returns whether it knows.
    ///
    /// The destination may have a complete copy, which a cluster runs if it fences this host. The
    /// promise tells for how long that copy cannot be older than the guest's disks.
    ///
    /// [`Policy::hold`]: crate::Policy::hold
    fn hold(&mut self, why: &Refusal) -> bool {
        let policy = self.sending.policy;
        let (Some(hold), Some(sent)) = (policy.hold, self.state_sent) else {
            return false;
        };
        if self.abort(why) {
            return true;
        }
        // A destination that still reads the old connection sees its end, and accepts a new one.
        self.control = None;
        let wait = policy.patience / ATTEMPTS;
        let notice = PendingAbort {
            id: self.sending.id,
            why: why.clone(),
            patience: wait,
        };
        // A cancel ends the wait: whoever sends it knows that the destination is off.
        while sent.elapsed() < hold && !self.sending.decision.is_canceled() {
            if notice.try_send(self.sending.dial).is_ok() {
                return true;
            }
            std::thread::sleep(wait);
        }
        false
    }

    /// Resumes the guest. The destination may hold what was released for a moment longer.
    fn take_back(&mut self) -> Result<(), Refusal> {
        let patience = self.sending.policy.patience;
        let until = Instant::now() + patience;
        loop {
            match self.source.resume() {
                // `machine-gone` is final. Any other error may be a lock that the destination is
                // about to release.
                Err(why) if why.code != "machine-gone" && Instant::now() < until => {
                    std::thread::sleep(patience / ATTEMPTS);
                }
                done => return done,
            }
        }
    }

    /// Sends `Abort`: the guest stays here. Returns whether it is certain that the destination knows.
    fn abort(&mut self, why: &Refusal) -> bool {
        let Some(control) = &mut self.control else {
            return false;
        };
        let Ok(closer) = control.stream.closer() else {
            return false;
        };
        // Before the stop the destination cannot be ready, so no answer is needed. Behind it the
        // wait is short: `PendingAbort` continues it without holding up the result.
        let is_awaited = self.stopped.is_some();
        let tell = || {
            let told = control.send(&ToDestination::Abort(why.clone()));
            told.is_ok() && is_awaited && recv_abort_ack(control)
        };
        let limit = self.sending.policy.patience / ATTEMPTS;
        within(limit, &closer, tell).unwrap_or(false)
    }

    /// Why the destination closed its connections, if it said so. The guest may be paused meanwhile: the
    /// destination has a short time for it, whatever it sends.
    fn last_words(&mut self) -> Option<Refusal> {
        let control = self.control.as_mut()?;
        // Only reading ends, so that this side can still say that the guest stays.
        let closer = control.stream.read_closer().ok()?;
        let listen = || loop {
            match control.recv().ok()? {
                ToSource::Refused(why) => return Some(why),
                // Answers to what was said before.
                ToSource::Pong(_) | ToSource::RoundDone(_) | ToSource::Busy => {}
                _ => return None,
            }
        };
        let limit = self.sending.policy.patience / ATTEMPTS;
        within(limit, &closer, listen).ok()?
    }

    /// Sends the commit message, and returns when it is certain that the guest runs there, or that it
    /// never did and never will.
    pub(super) fn after_commit(&mut self) -> Outcome {
        let progress = self.sending.progress.clone();
        progress.enter(Phase::HandingOver);
        // From here on the guest resumes only on a fact or an order, and then at once.
        self.state_sent = None;
        let order = Instant::now();
        // Always present here. A panic instead of the fallback would leave a guest that is given
        // away and that no `Commit` starts.
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
                    self.record_downtime(since, order, us, told_us);
                    // The destination need not linger for a source that asks again.
                    let told = self.send(&ToDestination::Complete);
                    if self.fault_server.is_some() {
                        // This question admits `Run`, which is wrong from now on. Its drop also
                        // clears the doubt, so it must come before the postcopy question opens.
                        drop(question);
                        // Without a control channel `push` fails at once, and the loop behind it
                        // reconnects.
                        if told.is_err() {
                            self.control = None;
                        }
                        return self.followed();
                    }
                    return self.moved();
                }
                // The guest may have run there, and has ended. The copy here is stale and never
                // runs. In postcopy a part of the guest never came.
                Ok(ToSource::Ended) if self.fault_server.is_some() => {
                    return self.lost(postcopy::lost());
                }
                Ok(ToSource::Ended) => return self.moved(),
                // The guest runs there, the answer was lost, and it waits for pages.
                Ok(ToSource::StillMissing { .. } | ToSource::Prepared { .. })
                    if self.fault_server.is_some() =>
                {
                    self.control = None;
                    drop(question);
                    return self.followed();
                }
                // The only answer that gives the guest back: it never ran there and never will.
                Ok(ToSource::NotHere(why)) => return self.stay(MigrationError::There(why)),
                // Anything else states nothing about the guest: stay in doubt, and ask again.
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
                    let why = "an operator decided that the guest runs at the source";
                    return self.stay(MigrationError::here("resolved", why));
                }
                Some(Resolution::Discard) => return self.moved(),
                None => answer = self.retry_commit(stopped),
            }
        }
    }

    /// Computes the length of the stop, which began at `since`, from the answer to the `Commit` that was
    /// first sent at `order`. The guest ran `us` microseconds after the destination had received
    /// `Commit`, and the answer was sent after `told_us`.
    fn record_downtime(&mut self, since: Instant, order: Instant, us: u64, told_us: u64) {
        // Clocks of two hosts are never compared. `us` and `told_us` are spans of the destination's
        // clock, `handing` is one of ours.
        let (all, handing) = (since.elapsed(), order.elapsed());
        // The time after the guest's start, and the answer's way back, are no part of the stop.
        let told = Duration::from_micros(told_us);
        let behind = Duration::from_micros(told_us.saturating_sub(us));
        let no_part = behind + handing.saturating_sub(told) / 2;
        self.downtime.hand_over_us = micros(handing.saturating_sub(no_part));
        self.downtime.total_us = micros(all.saturating_sub(no_part));
        let downtime = self.downtime;
        self.sending
            .progress
            .update(|report| report.downtime = Some(downtime));
    }

    fn enter_doubt(&mut self, error: &MigrationError) {
        // A destination that still reads the old connection sees its end, and accepts a new one.
        self.control = None;
        if self.sending.progress.report().phase != Phase::InDoubt {
            self.source.show(&Whereabouts::Unknown);
        }
        self.sending.progress.update(|report| {
            report.phase = Phase::InDoubt;
            report.error = Some(error.refusal());
        });
    }

    fn send_commit(&mut self, stopped: Stopped) -> Result<ToSource, MigrationError> {
        // Read for each attempt: the destination advances the guest's clocks by this span, and a
        // `Commit` that is repeated late has a longer one.
        let stopped_for = stopped.clocks_at.elapsed().as_nanos();
        self.send(&ToDestination::Commit {
            stood_for_ns: u64::try_from(stopped_for).unwrap_or(u64::MAX),
            paused: stopped.stays_paused(self.sending.policy),
        })?;
        self.recv_in_time()
    }

    /// Asks over a new connection. The destination answers with what became of the guest, or
    /// `Waiting`: then it never read the first `Commit`, and gets another.
    fn retry_commit(&mut self, stopped: Stopped) -> Result<ToSource, MigrationError> {
        let stream = self.connect(Channel::Again)?;
        self.control = Some(ControlChannel::new(stream));
        match self.recv_in_time()? {
            ToSource::Waiting => self.send_commit(stopped),
            // A destination that does not know this migration states nothing about the guest: it may have
            // lost its journal, or be another service at the same address.
            ToSource::Refused(why) => Err(MigrationError::There(why)),
            other => Ok(other),
        }
    }

    /// The guest runs at the destination: sends all of it that is still here.
    fn followed(&mut self) -> Outcome {
        match self.follow_with_pages() {
            Ok(()) => self.moved(),
            Err(why) => self.lost(why),
        }
    }

    fn lost(&mut self, why: Refusal) -> Outcome {
        tracing::warn!(migration = %self.sending.id, %why, "a guest is lost");
        self.moved();
        Outcome::Lost(why)
    }

    fn moved(&mut self) -> Outcome {
        self.sending.progress.begin(Activity::Release);
        // A failure changes nothing for the guest. A restart finds the migration in doubt.
        if let Err(error) = self.sending.journal.record(Step::Running) {
            tracing::warn!(%error, "cannot write a journal");
        }
        self.source.gone();
        Outcome::Moved
    }
}
