//! Decisions that come from outside the engine: cancel, and how to resolve a doubt.
//!
//! The [report](crate::Progress) says how a migration is going. A [`Decision`] says what the operator
//! wants. It also orders the operator's requests against the engine's steps: a cancel that comes
//! after the commit point is refused, and a resolution counts only while the engine asks for one.

use std::fmt;
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};

use crate::MigrationError;
use crate::link::Closer;
use crate::message::Refusal;

/// An operator's decision about a guest whose migration is in doubt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Resolution {
    /// The guest runs at this side.
    Run,
    /// The guest does not run at this side, which forgets the VM.
    Discard,
}

/// A cancel that came after the commit point.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the guest was handed over, and the migration can no longer be canceled")]
pub struct TooLate;

/// Something that only an operator can decide while the sides cannot reach each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Doubt {
    /// The connection was lost in the hand-over: the guest is whole at this side.
    HandOver,
    /// The connection was lost in postcopy: half of the memory is at the other side, so that the
    /// guest can be discarded and nothing else.
    Postcopy,
}

impl Doubt {
    fn admits(self, resolution: Resolution) -> bool {
        self == Self::HandOver || resolution == Resolution::Discard
    }
}

/// How far the migration can still be stopped.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Course {
    #[default]
    Open,
    Canceled,
    /// Past the commit point.
    Committed,
}

#[derive(Default)]
struct State {
    course: Course,
    /// Why it was canceled, if no operator asked for that.
    interrupted: Option<Refusal>,
    /// Connections to close at a cancel, which wakes the threads that read or write them.
    closers: Vec<Closer>,
    doubt: Option<Doubt>,
    resolution: Option<Resolution>,
    /// The engine acts on the resolution.
    is_acted_on: bool,
    /// Why the last resolution had no effect.
    refused: Option<Refusal>,
    relieved: bool,
}

/// Cancel switch, commit point and resolution of one migration. Clones share them.
#[derive(Clone, Default)]
pub struct Decision(Arc<(Mutex<State>, Condvar)>);

impl Decision {
    /// Cancels the migration: the engine ends it at its next step, and the guest stays at the source.
    ///
    /// # Errors
    /// The commit point has passed.
    pub fn cancel(&self) -> Result<(), TooLate> {
        self.end(None)
    }

    /// Ends the migration as a cancel does, but as failed with this reason: what it copies is gone.
    ///
    /// # Errors
    /// The commit point has passed.
    pub fn interrupt(&self, why: Refusal) -> Result<(), TooLate> {
        self.end(Some(why))
    }

    fn end(&self, why: Option<Refusal>) -> Result<(), TooLate> {
        let mut state = self.0.0.lock();
        if state.course == Course::Committed {
            return Err(TooLate);
        }
        if state.course == Course::Open {
            // Of several reasons the first counts.
            state.interrupted = why;
        }
        // Under the lock, with the closers: a connection that registers meanwhile is closed either
        // here or by `close_on_cancel`. `shutdown` does not block.
        state.course = Course::Canceled;
        state.closers.iter().for_each(Closer::close);
        self.0.1.notify_all();
        Ok(())
    }

    /// Decides where the guest runs. Returns false, and changes nothing, unless the engine waits for
    /// this decision.
    #[must_use]
    pub fn resolve(&self, resolution: Resolution) -> bool {
        let mut state = self.0.0.lock();
        if !state.doubt.is_some_and(|doubt| doubt.admits(resolution)) {
            return false;
        }
        state.resolution = Some(resolution);
        (state.is_acted_on, state.refused) = (false, None);
        self.0.1.notify_all();
        true
    }

    /// Waits up to `patience` until the engine has acted on the resolution that was accepted.
    ///
    /// # Errors
    /// The resolution had no effect: the guest cannot run here now, and the migration stays in doubt; or
    /// the other side decided first.
    pub fn outcome(&self, patience: Duration) -> Result<(), Refusal> {
        let deadline = Instant::now() + patience;
        let mut state = self.0.0.lock();
        while state.resolution.is_some() {
            if self.0.1.wait_until(&mut state, deadline).timed_out() {
                // Accepted still: the engine acts on it when its present step is done.
                return Ok(());
            }
        }
        state.refused.clone().map_or(Ok(()), Err)
    }

    /// Ends the time in which a destination keeps answering its source after the migration: [`receive`]
    /// returns, and its endpoint is free. A source that missed the outcome is answered from the journal
    /// ([`Host::fate`]) by the next session at that endpoint. Has no effect before the end.
    ///
    /// [`receive`]: crate::receive
    /// [`Host::fate`]: crate::Host::fate
    pub fn relieve(&self) {
        // No wake-up: a destination that lingers polls this.
        self.0.0.lock().relieved = true;
    }

    pub(crate) fn is_relieved(&self) -> bool {
        self.0.0.lock().relieved
    }

    /// Whether an operator has canceled it.
    #[must_use]
    pub fn is_canceled(&self) -> bool {
        self.0.0.lock().course == Course::Canceled
    }

    /// Returns the error of a migration that was canceled or interrupted. It shows in errors of every kind.
    pub(crate) fn ended(&self) -> Option<MigrationError> {
        let state = self.0.0.lock();
        let why = || match &state.interrupted {
            Some(why) => MigrationError::Here(why.clone()),
            None => MigrationError::Canceled,
        };
        (state.course == Course::Canceled).then(why)
    }

    /// Passes the commit point, unless the migration was canceled before: then returns false.
    pub(crate) fn commit(&self) -> bool {
        let mut state = self.0.0.lock();
        if state.course == Course::Canceled {
            return false;
        }
        state.course = Course::Committed;
        // No cancel closes connections any more.
        state.closers.clear();
        true
    }

    /// Closes all connections of the migration: a thread that sends over one stops waiting.
    pub(crate) fn close_all(&self) {
        self.0.0.lock().closers.iter().for_each(Closer::close);
    }

    /// Closes a connection when the migration is canceled, or at once if it was.
    pub(crate) fn close_on_cancel(&self, closer: Closer) {
        let mut state = self.0.0.lock();
        match state.course {
            Course::Open => state.closers.push(closer),
            Course::Canceled => closer.close(),
            Course::Committed => {}
        }
    }

    /// Forgets the connections that a cancel would close: they have ended.
    pub(crate) fn release_connections(&self) {
        self.0.0.lock().closers.clear();
    }

    /// Asks the operator to resolve a doubt, until the returned question is dropped.
    pub(crate) fn ask(&self, doubt: Doubt) -> Question {
        self.0.0.lock().doubt = Some(doubt);
        Question(self.clone())
    }
}

impl fmt::Debug for Decision {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Decision({:?})", self.0.0.lock().course)
    }
}

/// A doubt that waits for the operator. Dropping it withdraws the question, so that an answer to one
/// doubt never decides another.
pub(crate) struct Question(Decision);

impl Question {
    /// Waits up to `patience` for the operator's decision.
    pub(crate) fn wait(&self, patience: Duration) -> Option<Resolution> {
        let deadline = Instant::now() + patience;
        let (state, changed) = &*self.0.0;
        let mut state = state.lock();
        while state.resolution.is_none() {
            if changed.wait_until(&mut state, deadline).timed_out() {
                break;
            }
        }
        state.is_acted_on = state.resolution.is_some();
        // Left in place: the caller may wait again, and `withdraw` has to find it.
        state.resolution
    }

    /// Gives the decision back, which cannot be carried out. The question stays open for another.
    pub(crate) fn refuse(&self, why: Refusal) {
        let (state, changed) = &*self.0.0;
        let mut state = state.lock();
        (state.resolution, state.refused) = (None, Some(why));
        changed.notify_all();
    }

    /// Withdraws the question. Returns the decision if one was accepted before: the operator was
    /// promised that it counts.
    pub(crate) fn withdraw(self) -> Option<Resolution> {
        let mut state = self.0.0.0.lock();
        state.doubt = None;
        self.0.0.1.notify_all();
        // The guard is dropped before `self`, whose `Drop` locks again.
        state.resolution.take()
    }
}

impl Drop for Question {
    fn drop(&mut self) {
        let (state, changed) = &*self.0.0;
        let mut state = state.lock();
        if state.resolution.is_some() && !state.is_acted_on {
            let why = "the other side decided before this decision was acted on";
            state.refused = Some(Refusal::new("migration-not-in-doubt", why));
        }
        (state.doubt, state.resolution) = (None, None);
        changed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cancel_and_commit_exclude_each_other() {
        let decision = Decision::default();
        assert!(decision.commit());
        assert_eq!(decision.cancel(), Err(TooLate));
        let decision = Decision::default();
        assert_eq!(decision.cancel(), Ok(()));
        assert!(!decision.commit() && decision.is_canceled());
    }

    #[test]
    fn first_reason_of_an_end_counts() {
        let reset = Refusal::new("guest-reset", "the guest was reset");
        let code = |decision: &Decision| decision.ended().map(|error| error.refusal().code);
        let decision = Decision::default();
        assert_eq!(code(&decision), None);
        decision.interrupt(reset.clone()).unwrap();
        decision.cancel().unwrap();
        assert!(decision.is_canceled() && !decision.commit());
        assert_eq!(code(&decision).as_deref(), Some("guest-reset"));
        let decision = Decision::default();
        decision.cancel().unwrap();
        decision.interrupt(reset.clone()).unwrap();
        assert_eq!(code(&decision).as_deref(), Some("canceled"));
        let decision = Decision::default();
        assert!(decision.commit());
        assert_eq!(decision.interrupt(reset), Err(TooLate));
        assert_eq!(code(&decision), None);
    }

    #[test]
    fn resolution_needs_a_doubt() {
        let decision = Decision::default();
        assert!(!decision.resolve(Resolution::Run), "there is no doubt");
        let question = decision.ask(Doubt::HandOver);
        assert_eq!(question.wait(Duration::ZERO), None);
        assert!(decision.resolve(Resolution::Run));
        assert_eq!(question.wait(Duration::ZERO), Some(Resolution::Run));
        drop(question);
        assert!(!decision.resolve(Resolution::Discard));
        let question = decision.ask(Doubt::Postcopy);
        assert!(
            !decision.resolve(Resolution::Run),
            "half of it is elsewhere"
        );
        assert_eq!(question.wait(Duration::ZERO), None, "of an earlier doubt");
        assert!(decision.resolve(Resolution::Discard));
        assert_eq!(question.withdraw(), Some(Resolution::Discard));
        assert!(!decision.resolve(Resolution::Discard));
    }

    #[test]
    fn outcome_says_whether_a_resolution_had_an_effect() {
        let decision = Decision::default();
        let (run, soon) = (Resolution::Run, Duration::ZERO);
        let question = decision.ask(Doubt::HandOver);
        assert!(decision.resolve(run));
        assert_eq!(decision.outcome(soon), Ok(()), "not known yet");
        assert_eq!(question.wait(soon), Some(run));
        let locked = Refusal::new("cannot-be-taken-over", "a disk is locked");
        question.refuse(locked.clone());
        assert_eq!(decision.outcome(soon), Err(locked));
        assert_eq!(question.wait(soon), None, "it was given back");
        // Another try, which the engine carries out.
        assert!(decision.resolve(run));
        assert_eq!(question.wait(soon), Some(run));
        drop(question);
        assert_eq!(decision.outcome(soon), Ok(()));
        // One that the engine never saw.
        let question = decision.ask(Doubt::HandOver);
        assert!(decision.resolve(run));
        drop(question);
        let refused = decision.outcome(soon).unwrap_err();
        assert_eq!(refused.code, "migration-not-in-doubt");
    }
}
