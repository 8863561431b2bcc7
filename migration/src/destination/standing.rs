//! A listener that stays: it receives one guest after another, and several at a time.
//!
//! All migrations share one [`Router`], which knows the channels of each by the migration's number.
//! A thread takes offers as they come and gives each a session of its own. So everything that bounds
//! a stranger at a one-shot receiver bounds it here, and a stranger holds up nobody.

use std::cell::Cell;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::thread::{self, Scope};
use std::time::Duration;

use parking_lot::{Condvar, Mutex};
use uuid::Uuid;

use super::router::{Offered, Router};
use super::{ConnectionLimit, EndOfSession, Fate, Host, POLLS, Ran, Session};
use crate::decision::Decision;
use crate::link::Accept;
use crate::message::Refusal;
use crate::progress::{Phase, Progress};
use crate::threads::in_span;

/// Migrations that one standing receiver has in progress at once. Each may cost 18 threads and as many
/// descriptors; those of guests in doubt count.
pub const MOST_AT_ONCE: usize = 8;

/// Parameters of a wait that does not end with the first guest.
pub struct Standing<'a> {
    /// The source of connections. Dropped as soon as no more are accepted.
    pub accept: Box<dyn Accept>,
    /// Limits pending connections of all endpoints of the process.
    pub limit: &'a ConnectionLimit,
    /// Knows the outcomes of earlier migrations.
    pub fate: &'a (dyn Fn(Uuid) -> Fate + Sync),
    /// Called for each offer, on a thread of its own.
    pub arrives: &'a (dyn Fn(Arriving<'_>) + Sync),
    /// Receives the reason why the last stranger came to nothing.
    pub progress: &'a Progress,
    /// A cancel ends the wait, and none of the migrations in progress.
    pub decision: &'a Decision,
    /// How long a source may be silent.
    pub patience: Duration,
}

/// An offer that nobody has examined.
pub struct Arriving<'a> {
    router: &'a Router<'a>,
    offered: Offered,
    patience: Duration,
}

/// The side of one migration that receives a guest.
#[derive(Clone, Copy)]
pub struct Party<'a> {
    /// Makes the machine.
    pub host: &'a dyn Host,
    /// Receives the progress report.
    pub progress: &'a Progress,
    /// Carries cancel requests and resolutions.
    pub decision: &'a Decision,
    /// The same as in [`Receiving`](super::Receiving::lingers).
    pub lingers: &'a (dyn Fn() + Sync),
}

impl Arriving<'_> {
    /// Examines the offer, and receives the guest if the host accepts it. Returns when it is certain
    /// whether the guest runs here.
    ///
    /// # Errors
    /// The guest does not run here; the reason is also in the report.
    pub fn receive(self, party: Party<'_>) -> Result<(), Refusal> {
        let session = Session {
            router: self.router,
            host: party.host,
            progress: party.progress,
            decision: party.decision,
            patience: self.patience,
            once: true,
            shares_router: true,
            id: Cell::new(Uuid::nil()),
            ran: Cell::new(Ran::No),
        };
        let _ended = EndOfSession(&session);
        let migration = self.offered.id;
        let moved = match session.prepare(self.offered) {
            Ok(incoming) => session.take(incoming),
            Err(failed) => {
                let why = failed.refusal();
                tracing::warn!(%migration, %why, "an offer was refused");
                (Err(why), None)
            }
        };
        session.conclude(moved, party.lingers)
    }
}

/// The number of sessions in progress.
#[derive(Default)]
struct Sessions {
    count: Mutex<usize>,
    ended: Condvar,
}

/// One of the sessions; gives its place back when it is dropped, after a panic too.
struct Seat<'a>(&'a Sessions);

impl Sessions {
    /// Takes a place. `None` if none became free in time.
    fn seat(&self, patience: Duration) -> Option<Seat<'_>> {
        let mut count = self.count.lock();
        if *count >= MOST_AT_ONCE {
            self.ended.wait_for(&mut count, patience);
        }
        if *count >= MOST_AT_ONCE {
            return None;
        }
        *count += 1;
        Some(Seat(self))
    }
}

impl Drop for Seat<'_> {
    fn drop(&mut self) {
        *self.0.count.lock() -= 1;
        self.0.ended.notify_all();
    }
}

/// Receives guests until `decision` is canceled. Returns when the last migration in progress has
/// ended, which may be long after: one may be in doubt.
///
/// # Errors
/// The wait ended by itself: no connection can be accepted any more, or no thread be started.
pub fn receive_all(standing: Standing<'_>) -> Result<(), Refusal> {
    let Standing {
        mut accept,
        limit,
        fate,
        arrives,
        progress,
        decision,
        patience,
    } = standing;
    let router = Router::new(fate, MOST_AT_ONCE, progress, limit);
    let sessions = Sessions::default();
    thread::scope(|scope| {
        let router = &router;
        let tick = patience / POLLS;
        let accepting = move || {
            router.accept(scope, &mut *accept, tick);
            drop(accept);
            router.keep_time_to_the_end(tick);
        };
        let started = thread::Builder::new().spawn_scoped(scope, in_span(accepting));
        started.map_err(|error| Refusal::new("host-refused", error.to_string()))?;
        let wait = Wait {
            router,
            sessions: &sessions,
            arrives,
            patience,
        };
        let ended = wait.run(scope, decision, tick);
        router.end();
        progress.update(|report| match &ended {
            Ok(()) => report.phase = Phase::Canceled,
            Err(why) => {
                report.phase = Phase::Failed;
                report.error = Some(why.clone());
            }
        });
        ended
    })
}

/// The thread that takes offers.
struct Wait<'a> {
    router: &'a Router<'a>,
    sessions: &'a Sessions,
    arrives: &'a (dyn Fn(Arriving<'_>) + Sync),
    patience: Duration,
}

impl<'a> Wait<'a> {
    fn run<'scope>(
        self,
        scope: &'scope Scope<'scope, '_>,
        decision: &Decision,
        tick: Duration,
    ) -> Result<(), Refusal>
    where
        'a: 'scope,
    {
        while !decision.is_canceled() {
            // Before the offer leaves the queue, where its time is limited.
            let Some(seat) = self.sessions.seat(tick) else {
                continue;
            };
            let Some(offered) = self.router.next_offer(tick)? else {
                continue;
            };
            let arriving = Arriving {
                router: self.router,
                offered,
                patience: self.patience,
            };
            let arrives = self.arrives;
            let session = move || {
                // The whole of it, so that the place is free when this thread ends.
                let _seat = seat;
                // The scope would take the panic of one session for its own.
                if catch_unwind(AssertUnwindSafe(|| arrives(arriving))).is_err() {
                    tracing::error!("a thread that received a guest panicked");
                }
            };
            let builder = thread::Builder::new().name("migrate-in".to_owned());
            // On failure the closure is dropped with the offer, whose source sees the end.
            if let Err(error) = builder.spawn_scoped(scope, in_span(session)) {
                tracing::warn!(%error, "cannot receive a guest now");
            }
        }
        Ok(())
    }
}
