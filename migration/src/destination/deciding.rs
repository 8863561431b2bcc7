//! The guest could run here; the source decides whether it does.
//!
//! From `Ready` on this side must not decide alone. The source may have written `Commit` and sent it
//! the moment before the connection broke, so that the machine here may be the only copy that will
//! ever run; or it may have given up, and the guest runs there. So a destination that loses its source
//! keeps the machine, paused, until the source is back or an operator says what to do.

use std::time::{Duration, Instant};

use super::following::Postcopy;
use super::receiving::Guest;
use super::slots::Arrived;
use super::{Ended, Failed, POLLS, Ran, StartFailure, answer_ping};
use crate::MigrationError;
use crate::decision::{Doubt, Question, Resolution};
use crate::journal::Step;
use crate::message::{ControlChannel, Refusal, ToDestination, ToSource};
use crate::progress::{Activity, Phase, micros};
use crate::wire::WireError;

/// A guest that has been loaded whole. The source has not heard of it yet.
pub(super) struct Ready<'a> {
    guest: Guest<'a>,
    control: ControlChannel,
    /// Since when the guest is paused, as this side knows it.
    since: Instant,
    /// Whether its owner had paused it.
    paused: bool,
    load_us: u64,
}

impl<'a> Ready<'a> {
    pub(super) fn new(
        guest: Guest<'a>,
        control: ControlChannel,
        since: Instant,
        paused: bool,
        load_us: u64,
    ) -> Self {
        Self {
            guest,
            control,
            since,
            paused,
            load_us,
        }
    }

    /// Answers `Ready`. Whether that arrived is known when the source decides.
    pub(super) fn announce(mut self) -> Deciding<'a> {
        let (session, load_us) = (self.guest.session, self.load_us);
        session.progress.enter_hand_over(self.since);
        session.progress.begin(Activity::HandOver);
        // Before `Ready` leaves: if the connection breaks behind it, the source asks over a new one
        // at once, and the router must not turn that away.
        session.router.allow_questions(session.id.get());
        let told = self.control.send(&ToSource::Ready { load_us });
        let mut deciding = Deciding {
            guest: self.guest,
            control: None,
            question: None,
            since: self.since,
            paused: self.paused,
        };
        match told {
            Ok(()) => deciding.connect(self.control),
            // A failed send does not prove that `Ready` did not arrive. The source may commit, so
            // this side may not discard the guest.
            Err(error) => deciding.enter_doubt(&error.into()),
        }
        deciding
    }
}

/// A guest of which the source, or an operator, decides whether it runs here.
pub(super) struct Deciding<'a> {
    guest: Guest<'a>,
    /// Absent while the source is lost.
    control: Option<ControlChannel>,
    /// Open from the first loss of the source on, also while a source that is back has not decided
    /// yet: one that comes and says nothing must not take the decision from the operator.
    question: Option<Question>,
    since: Instant,
    paused: bool,
}

/// The order to run the guest here.
struct Start {
    at: Instant,
    /// How long the guest was paused by then.
    stood_for: Duration,
    /// Whether its owner had paused it.
    paused: bool,
}

impl Start {
    fn now(stood_for: Duration, paused: bool) -> Self {
        Self {
            at: Instant::now(),
            stood_for,
            paused,
        }
    }
}

impl Deciding<'_> {
    pub(super) fn run(mut self) -> Result<Ended, Failed> {
        let tick = self.guest.session.patience / POLLS;
        loop {
            let Some(control) = &mut self.control else {
                let decided = self.question.as_ref().and_then(|open| open.wait(tick));
                match decided {
                    Some(Resolution::Discard) => return self.discarded(),
                    Some(Resolution::Run) => {
                        let start = Start::now(self.since.elapsed(), self.paused);
                        match self.take_over_and_start(&start) {
                            Err(StartFailure::NeverRan(why)) => self.stay_in_doubt(why),
                            ran => return self.started(&start, ran),
                        }
                    }
                    None => self.reconnect(),
                }
                continue;
            };
            match control.recv() {
                Ok(ToDestination::Commit {
                    stood_for_ns,
                    paused,
                }) => {
                    // An operator was promised that the guest does not run here.
                    // `Run` needs no case of its own: the source demands the same.
                    if self.withdraw() == Some(Resolution::Discard) {
                        return self.discarded();
                    }
                    let start = Start::now(Duration::from_nanos(stood_for_ns), paused);
                    let ran = self.take_over_and_start(&start);
                    return self.started(&start, ran);
                }
                Ok(ToDestination::Abort(why)) => return self.aborted(why),
                Ok(other) => {
                    // Even a protocol violation only ends the connection. The source may have
                    // committed before, so the guest has to stay available.
                    if let Err(error) = answer_ping(control, &other) {
                        self.enter_doubt(&error);
                    }
                }
                Err(error) => self.enter_doubt(&error.into()),
            }
        }
    }

    /// Gives a source the time of one `patience` to decide, whatever it sends meanwhile: past the
    /// commit point nothing else limits how long it can hold the guest paused.
    fn connect(&mut self, control: ControlChannel) {
        let session = self.guest.session;
        // The read timeout of the stream does not suffice: every ping restarts it.
        let until = Instant::now() + session.patience;
        match control.stream.closer() {
            Ok(closer) => session
                .router
                .set_timer(session.id.get(), Some((until, closer))),
            Err(error) => tracing::warn!(%error, "cannot limit the time of a connection"),
        }
        self.control = Some(control);
    }

    fn enter_doubt(&mut self, error: &MigrationError) {
        let session = self.guest.session;
        self.control = None;
        // The timer holds a duplicate of the descriptor. Until it is gone, the lost connection
        // stays half open and the source may not see its end.
        session.router.set_timer(session.id.get(), None);
        // Before the report shows the doubt: an operator who sees it can resolve it.
        self.question
            .get_or_insert_with(|| session.decision.ask(Doubt::HandOver));
        session.progress.update(|report| {
            report.phase = Phase::InDoubt;
            report.error = Some(error.refusal());
        });
    }

    /// The guest cannot run here now, though the operator decided so: a disk may be locked by another
    /// process. The source is lost, so the copy here may be the only one. It is kept, and the operator
    /// can remove the obstacle and decide again.
    fn stay_in_doubt(&mut self, why: Refusal) {
        let session = self.guest.session;
        tracing::warn!(migration = %self.guest.id, %why, "a guest in doubt cannot run here");
        if matches!(session.ran.replace(Ran::No), Ran::MayHave) {
            // The journal says `Running`. Not one instruction ran, so a restarted host may still say
            // that it never did.
            if let Err(error) = self.guest.journal.record(Step::Ready) {
                tracing::warn!(migration = %self.guest.id, %error, "a journal cannot be written");
            }
        }
        session.progress.update(|report| {
            report.phase = Phase::InDoubt;
            report.error = Some(why.clone());
        });
        // Behind the report: an operator who gets the error finds it there, too.
        if let Some(question) = &self.question {
            question.refuse(why);
        }
    }

    /// Answers a source that is back. Any failure here is that connection's: the guest is kept.
    fn reconnect(&mut self) {
        let session = self.guest.session;
        while let Some(arrived) = session.router.next(session.id.get(), Duration::ZERO) {
            // Late channels of rounds that are over are dropped, which closes them.
            let Arrived::Again(stream) = arrived else {
                continue;
            };
            let answered = session.adopt(stream).and_then(|mut control| {
                control.send(&ToSource::Waiting)?;
                Ok(control)
            });
            match answered {
                Ok(control) => return self.connect(control),
                Err(error) => tracing::info!(%error, "a source reconnected and was lost again"),
            }
        }
    }

    fn withdraw(&mut self) -> Option<Resolution> {
        self.question.take().and_then(Question::withdraw)
    }

    /// The guest stays at the source. That is a fact, which an operator's decision does not change: the
    /// source may be running it already.
    fn aborted(mut self, why: Refusal) -> Result<Ended, Failed> {
        self.question = None;
        // The source resumes the guest when it hears `NotHere`. So the journal and the machine come
        // first: neither may claim the guest after that.
        self.guest.record_aborted();
        self.guest.discard();
        let answer = ToSource::NotHere(why.clone());
        match self.send(&answer) {
            Ok(()) => Err(MigrationError::There(why).into()),
            // Its question "how does it stand" is answered from the journal.
            Err(_) => Err(Failed::Unheard(why, answer)),
        }
    }

    /// An operator decided that the guest does not run here.
    fn discarded(mut self) -> Result<Ended, Failed> {
        self.question = None;
        let detail = "an operator decided that the guest does not run at the destination";
        let why = Refusal::new("resolved", detail);
        self.guest.record_aborted();
        self.guest.discard();
        // The source holds the guest paused until it hears this.
        let answer = ToSource::NotHere(why.clone());
        match self.send(&answer) {
            Ok(()) => Err(MigrationError::Here(why).into()),
            Err(_) => Err(Failed::Unheard(why, answer)),
        }
    }

    fn send(&mut self, answer: &ToSource) -> Result<(), MigrationError> {
        let control = self.control.as_mut();
        let control = control.ok_or(MigrationError::Wire(WireError::Closed))?;
        Ok(control.send(answer)?)
    }

    /// The guest is this side's, by `Commit` or by an operator's decision.
    ///
    /// The source has written down that it gave the guest away, and resumes it only if this side says
    /// that it never ran here. So the journal gets `Running` *before* the first instruction: a crash in
    /// between loses the guest, and the other order could make two of it. Whatever fails before that
    /// entry is answered with `NotHere`, and the source takes the guest back. What fails behind it, at
    /// a point where the guest may have run, is answered with `Ended`: it may have written to its
    /// disks, so that the copy at the source must never run again.
    fn started(
        mut self,
        start: &Start,
        ran: Result<Instant, StartFailure>,
    ) -> Result<Ended, Failed> {
        let session = self.guest.session;
        let Start {
            at,
            stood_for,
            paused,
        } = *start;
        self.question = None;
        match ran {
            Ok(runs) => {
                session.ran.set(Ran::Yes);
                let us = micros(runs.saturating_duration_since(at));
                let told_us = micros(at.elapsed());
                tracing::info!(
                    migration = %self.guest.id,
                    stop_us = micros(stood_for).saturating_add(us),
                    paused,
                    "migration: the guest runs here"
                );
                let told = self.send(&ToSource::Running { us, told_us });
                let heard = told.is_ok() && self.heard_complete();
                let Self { guest, control, .. } = self;
                if guest.postcopy().is_some() {
                    // A source that did not confirm counts as lost. Postcopy then begins with a new
                    // connection, over which this side lists the pages that are missing.
                    return Postcopy::new(guest, control.filter(|_| heard)).run();
                }
                guest.keep();
                Ok(match heard {
                    true => Ended::Heard,
                    false => Ended::Unheard(ToSource::Running { us: 0, told_us: 0 }),
                })
            }
            Err(StartFailure::NeverRan(why)) => {
                // `take_over_and_start` may have set `MayHave`. The machine says that no
                // instruction ran, so a panic from here on must answer `NotHere` again.
                session.ran.set(Ran::No);
                self.guest.record_aborted();
                // Before the source hears of it, and takes back what it handed over.
                self.guest.discard();
                let answer = ToSource::NotHere(why.clone());
                match self.send(&answer) {
                    Ok(()) => Err(MigrationError::Here(why).into()),
                    Err(_) => Err(Failed::Unheard(why, answer)),
                }
            }
            Err(StartFailure::MayHaveRun(why)) => {
                // No `record_aborted` here. `Running` must stay the last step, or a restarted host
                // would let the source resume a guest that has written to its disks.
                tracing::error!(migration = %self.guest.id, %why, "a guest was lost at its start");
                self.guest.discard();
                match self.send(&ToSource::Ended) {
                    Ok(()) => Err(MigrationError::Here(why).into()),
                    Err(_) => Err(Failed::Unheard(why, ToSource::Ended)),
                }
            }
        }
    }

    /// Whether the source heard the last answer.
    fn heard_complete(&mut self) -> bool {
        let session = self.guest.session;
        let control = self.control.as_mut();
        control.is_some_and(|control| matches!(session.recv(control), Ok(ToDestination::Complete)))
    }

    fn take_over_and_start(&mut self, start: &Start) -> Result<Instant, StartFailure> {
        let guest = &mut self.guest;
        guest.session.router.set_timer(guest.id, None);
        // Before the journal says `Running`: a lock that another process holds is the likely
        // failure, and at this point the source can still take the guest back.
        guest.target.take_over().map_err(StartFailure::NeverRan)?;
        // From here on a missing page is waited for without a limit. If one was given up before, a
        // device has read zeros in its place: then the guest must not start.
        if let Some(receiver) = guest.postcopy()
            && !receiver.start()
        {
            let why = receiver.failure().unwrap_or_else(|| {
                let why = "pages that the guest needs did not arrive";
                Refusal::new("connection-lost", why)
            });
            return Err(StartFailure::NeverRan(why));
        }
        // A panic from here on is answered as if the guest had run.
        guest.session.ran.set(Ran::MayHave);
        let written = match guest.postcopy() {
            Some(_) => guest.journal.record_incomplete(),
            None => guest.journal.record(Step::Running),
        };
        written
            .map_err(|error| StartFailure::NeverRan(Refusal::new("journal", error.to_string())))?;
        // Behind the take-over, which opens the images for the guest, and before the guest asks for blocks.
        guest.channels.memory.disks.follow();
        guest
            .target
            .start(start.stood_for + start.at.elapsed(), start.paused)
    }
}
