//! The point of no return, and what is behind it.

use std::time::{Duration, Instant};

use super::{Engine, Outcome, gone};
use crate::Trouble;
use crate::journal::Step;
use crate::message::{self, Channel, Control, Hello, Refusal, ToDestination, ToSource};
use crate::progress::{Phase, Resolution, micros};
use crate::wire::WireError;

/// As often as this, within the patience that one has with the other side, one tries to reach a
/// destination that may have the guest.
const ATTEMPTS: u32 = 30;

impl Engine<'_, '_> {
    /// The guest stays: it goes on if it was stopped, and the destination hears of it.
    pub(super) fn stay(&mut self, trouble: Trouble) -> Outcome {
        let trouble = match trouble {
            // Of the many ways in which it shows that connections were closed.
            Trouble::Wire(_) if self.sending.progress.is_canceled() => Trouble::Canceled,
            Trouble::Wire(error) => self
                .last_words()
                .map_or(Trouble::Wire(error), Trouble::There),
            other => other,
        };
        if let Some(urgent) = self.urgent.take() {
            drop(urgent.end());
        }
        let mut why = trouble.refusal();
        tracing::warn!(migration = %self.sending.id, %why, "a guest stays where it is");
        if self.stopped.is_some()
            && let Err(error) = self.source.go_on()
        {
            why.detail = format!("{}; and the guest cannot go on: {error}", why.detail);
        }
        self.source.throttle(0);
        if self.tracking
            && let Err(error) = self.source.track(false)
        {
            tracing::warn!(%error, "dirty pages are still being tracked");
        }
        // Best effort: a destination that does not hear it asks, or is told when it meets us again.
        let abort = ToDestination::Abort(why.clone());
        if let Some(control) = &mut self.control
            && control.say(&abort).is_err()
            && self.stopped.is_some()
        {
            self.tell_again(&abort);
        }
        if let Err(error) = self.sending.journal.record(Step::Aborted) {
            tracing::warn!(%error, "a journal cannot be written");
        }
        Outcome::Stayed(why)
    }

    /// Why the destination closed its connections, if it said so.
    fn last_words(&mut self) -> Option<Refusal> {
        let patience = self.sending.policy.patience / ATTEMPTS;
        let control = self.control.as_mut()?;
        control.stream.set_patience(patience).ok()?;
        loop {
            match control.hear().ok()? {
                ToSource::Refused(why) => return Some(why),
                // Answers to what was said before.
                ToSource::Pong(_) | ToSource::RoundDone(_) | ToSource::Busy => {}
                _ => return None,
            }
        }
    }

    /// Tells a destination that may be waiting for an order, over a new connection.
    fn tell_again(&self, what: &ToDestination) {
        let tell = || -> Result<(), Trouble> {
            let dialed = self.sending.dial.dial();
            let mut stream = dialed.map_err(|error| Trouble::here("unreachable", error))?;
            let patience = stream.set_patience(self.sending.policy.patience / 4);
            patience.map_err(|error| Trouble::Wire(error.into()))?;
            message::say_hello(&mut *stream, &Hello::new(self.sending.id, Channel::Again))?;
            let mut control = Control::new(stream);
            if control.hear::<ToSource>()? == ToSource::Waiting {
                control.say(what)?;
            }
            Ok(())
        };
        if let Err(trouble) = tell() {
            tracing::info!(%trouble, "the destination was not told");
        }
    }

    /// The guest is given away: this ends when it is certain that it runs there, or that it never
    /// did and never will.
    pub(super) fn after_commit(&mut self) -> Outcome {
        let progress = self.sending.progress.clone();
        progress.enter(Phase::HandingOver);
        let (since, paused) = self.stopped.unwrap_or((Instant::now(), false));
        let order = Instant::now();
        let mut answer = self.order(since, paused);
        loop {
            match answer {
                Ok(ToSource::Running { us }) => {
                    let there = Duration::from_micros(us);
                    let (all, handing) = (since.elapsed(), order.elapsed());
                    // The answer's way back is no longer part of the stop.
                    let back = handing.saturating_sub(there) / 2;
                    self.downtime.hand_over_us = micros(handing.saturating_sub(back));
                    self.downtime.total_us = micros(all.saturating_sub(back));
                    let downtime = self.downtime;
                    progress.update(|report| report.downtime = Some(downtime));
                    // So that it need not wait for us to ask again.
                    let told = self.say(&ToDestination::Complete);
                    if self.urgent.is_some() {
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
                    if self.urgent.is_some() =>
                {
                    self.control = None;
                    self.follow_with_pages();
                    return self.moved();
                }
                Ok(ToSource::NotHere(why)) => return self.stay(Trouble::There(why)),
                Ok(other) => {
                    let why = WireError::damaged(format!("{other:?} is no answer to an order"));
                    self.doubt(&why.into());
                }
                Err(trouble) => self.doubt(&trouble),
            }
            match progress.wait_resolution(self.sending.policy.patience / ATTEMPTS) {
                Some(Resolution::Run) => {
                    let why = "somebody decided that the guest goes on here";
                    return self.stay(Trouble::here("resolved", why));
                }
                Some(Resolution::Discard) => return self.moved(),
                None => answer = self.order_again(since, paused),
            }
        }
    }

    fn doubt(&mut self, trouble: &Trouble) {
        self.control = None;
        self.sending.progress.update(|report| {
            report.phase = Phase::InDoubt;
            report.error = Some(trouble.refusal());
        });
    }

    fn order(&mut self, since: Instant, paused: bool) -> Result<ToSource, Trouble> {
        let stood = u64::try_from(since.elapsed().as_nanos()).unwrap_or(u64::MAX);
        self.say(&ToDestination::Commit {
            stood_for_ns: stood,
            paused,
        })?;
        Ok(self.control.as_mut().ok_or_else(gone)?.hear()?)
    }

    /// Over a new connection.
    fn order_again(&mut self, since: Instant, paused: bool) -> Result<ToSource, Trouble> {
        let stream = self.connect(Channel::Again)?;
        self.control = Some(Control::new(stream));
        match self.control.as_mut().ok_or_else(gone)?.hear()? {
            ToSource::Waiting => self.order(since, paused),
            // It does not know of this migration. That is no answer.
            ToSource::Refused(why) => Err(Trouble::There(why)),
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
