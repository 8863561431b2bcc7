//! The destination: the side to which the guest moves.
//!
//! A migration passes through states that own what they need; each consumes the one before:
//!
//! ```text
//!   Offered ─► Preparing ─► Receiving ─► Ready ─► Deciding ─┬─► (runs here)
//!      ▲           │            │                    │      └─► Postcopy ─► (runs here)
//!      └───────────┘            ▼                    ▼
//!    any failure              (fails)             (fails)
//! ```
//!
//! Until a source has been answered `Prepared` it is a stranger, and whatever becomes of it leaves the
//! wait as it was. Behind that, a failure ends the wait, and both users learn the reason.

mod channels;
mod comparing;
mod deciding;
mod following;
mod incoming_disks;
pub(crate) mod postcopy;
mod preparing;
mod receiving;
mod router;
mod slots;
mod standing;

use std::cell::Cell;
use std::fs::File;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use memory::AwaitedBlocks;
use uuid::Uuid;

use self::preparing::{NotPrepared, Preparing};
use self::receiving::Receiving as Incoming;
use self::router::{Offered, Router};
use self::slots::Arrived;
use crate::decision::Decision;
use crate::disks::DestinationDisk;
use crate::journal::Journal;
use crate::link::{Accept, Stream};
use crate::message::{ControlChannel, Offer, Refusal, ToDestination, ToSource};
use crate::pages::Block;
use crate::progress::{Phase, Progress};
use crate::threads::in_span;
use crate::wire::WireError;
use crate::{LINGER, MigrationError};

pub use self::router::ConnectionLimit;
pub use self::standing::{Arriving, MOST_AT_ONCE, Party, Standing, receive_all};

/// Looks for a decision or a connection within one `patience`.
const POLLS: u32 = 100;

/// A machine to which a guest moves. It is paused until it is started.
pub trait Destination: Send {
    /// Its memory, in the order of [`Offer::blocks`].
    fn blocks(&self) -> Vec<Block>;

    /// The disks whose content arrives, in the order of [`Offer::disks`].
    fn disks(&self) -> Vec<DestinationDisk> {
        Vec::new()
    }

    /// Loads the device state of a running guest on trial.
    ///
    /// # Errors
    /// The state cannot be loaded.
    fn dry_run(&mut self, state: &[u8]) -> Result<(), Refusal>;

    /// Loads the saved state in one commit. In precopy, all memory is present.
    ///
    /// # Errors
    /// The state cannot be loaded.
    fn load(&mut self, state: &[u8]) -> Result<(), Refusal>;

    /// Has the guest's disks wait for blocks that come after it, in the order of [`Offer::disks`]; absent for a
    /// disk that has all. Called before [`load`](Self::load). From [`take_over`](Self::take_over) on the
    /// images of [`disks`](Self::disks) are written beside the guest. Until
    /// [`blocks_arrived`](Self::blocks_arrived) no other user may take the images for whole, whatever ends.
    ///
    /// # Errors
    /// The host refuses, or its disks cannot wait.
    fn await_blocks(&mut self, _: &[Option<Arc<AwaitedBlocks>>]) -> Result<(), Refusal> {
        let why = "the disks of this machine cannot wait for blocks";
        Err(Refusal::new("no-postcopy", why))
    }

    /// All blocks of the disks are in their images and durable. Not called where none came after the guest.
    /// Called again after a failure.
    ///
    /// # Errors
    /// The host refuses.
    fn blocks_arrived(&mut self) -> Result<(), Refusal> {
        Ok(())
    }

    /// Acquires the resources that only one machine may hold (image locks, socket paths). Called again
    /// after a failure, also one of [`start`](Self::start), when an operator decides again.
    ///
    /// # Errors
    /// Another process holds one of them.
    fn take_over(&mut self) -> Result<(), Refusal>;

    /// Resumes the guest, unless it stays paused. Its clocks have been stopped for `stopped_for`.
    /// Returns the time since which it runs: whatever is done later is not part of the stop.
    ///
    /// # Errors
    /// The guest cannot resume; says whether it may have run for a moment.
    fn start(&mut self, stopped_for: Duration, paused: bool) -> Result<Instant, StartFailure>;

    /// Returns a function that halts the guest at once and marks memory that it waits for as lost. Any
    /// thread may call it, also one that the driver of the VM waits for.
    fn halter(&self) -> Box<dyn Fn() + Send + Sync> {
        let ram: Vec<_> = self.blocks().into_iter().map(|block| block.ram).collect();
        Box::new(move || ram.iter().for_each(|ram| ram.lose_awaited()))
    }

    /// Ends a guest that was started here, because memory that it needs cannot be read. No thread of the
    /// guest sees zeros in its place, and the VM shows the reason where the implementation keeps it.
    fn fail(&mut self, why: &Refusal) {
        tracing::error!(%why, "a guest lost memory and is ended");
        self.discard();
    }

    /// The guest does not come; or it runs here already, and the rest of it does not come: then it
    /// ends at once.
    fn discard(&mut self);
}

/// Why a guest was not started.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum StartFailure {
    /// No instruction of it ran: the source can let it run.
    #[error(transparent)]
    NeverRan(Refusal),
    /// The guest may have run, and is lost. The source must not resume it: it would run twice from the same
    /// point.
    #[error("the guest was lost at its start: {0}")]
    MayHaveRun(Refusal),
}

/// The outcome of an earlier migration, according to its journal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fate {
    /// Nothing is known of it.
    Unknown,
    /// Its guest never ran here, and will not.
    NeverRan,
    /// Its guest ran here.
    Ran,
}

/// Makes machines for guests that come.
pub trait Host: Send + Sync {
    /// Builds a machine. In a local migration `files` are its memory, one for each block; at a restore
    /// they are one file, once for each block, of which the blocks are private views, one after another.
    ///
    /// # Errors
    /// The machine cannot be built. The users of both sides see the text.
    fn prepare(
        &self,
        migration: Uuid,
        offer: &Offer,
        files: Vec<File>,
    ) -> Result<Box<dyn Destination>, Refusal>;

    /// Creates the journal of a migration.
    ///
    /// # Errors
    /// The file cannot be created.
    fn journal(&self, migration: Uuid, vm: &str) -> std::io::Result<Box<dyn Journal>>;

    /// Returns the outcome of an earlier migration.
    fn fate(&self, migration: Uuid) -> Fate;
}

/// Parameters of an incoming migration.
pub struct Receiving<'a> {
    /// The source of connections.
    pub accept: &'a mut dyn Accept,
    /// Limits pending connections of all endpoints of the process.
    pub limit: &'a ConnectionLimit,
    /// Makes the machine.
    pub host: &'a dyn Host,
    /// Receives the progress report.
    pub progress: &'a Progress,
    /// Carries cancel requests and resolutions.
    pub decision: &'a Decision,
    /// How long the source may be silent.
    pub patience: Duration,
    /// Ends the wait at the first offer that the host refuses.
    pub once: bool,
    /// Called when it is certain whether the guest runs here, and [`receive`] does not return yet: a
    /// source that did not hear of it may ask.
    pub lingers: &'a (dyn Fn() + Sync),
}

/// Waits for one guest, and takes it. Returns when it is certain whether it runs here.
///
/// # Errors
/// The guest does not run here; the reason is also in the report.
pub fn receive(receiving: Receiving<'_>) -> Result<(), Refusal> {
    let Receiving {
        accept,
        limit,
        host,
        progress,
        decision,
        patience,
        once,
        lingers,
    } = receiving;
    let fate = |id| host.fate(id);
    let router = Router::new(&fate, 1, progress, limit);
    thread::scope(|scope| {
        let router = &router;
        let tick = patience / POLLS;
        let accepting = move || {
            router.accept(scope, accept, tick);
            router.keep_time_to_the_end(tick);
        };
        let started = thread::Builder::new().spawn_scoped(scope, in_span(accepting));
        started.map_err(|error| Refusal::new("host-refused", error.to_string()))?;
        let session = Session {
            router,
            host,
            progress,
            decision,
            patience,
            once,
            shares_router: false,
            id: Cell::new(Uuid::nil()),
            ran: Cell::new(Ran::No),
        };
        let _ended = EndOfSession(&session);
        let outcome = session.conclude(session.run(), lingers);
        router.end();
        outcome
    })
}

fn refuse(stream: Box<dyn Stream>, why: Refusal) {
    // It learns it, or sees that the connection ends.
    let _ = ControlChannel::new(stream).send(&ToSource::Refused(why));
}

/// How a guest that runs here came.
enum Ended {
    /// The source knows.
    Heard,
    /// The source may not know yet, and gets this answer when it asks.
    Unheard(ToSource),
}

/// Whether the guest has run here.
#[derive(Clone, Copy)]
enum Ran {
    No,
    /// The journal says that the guest runs, and it is not known yet whether it does.
    MayHave,
    Yes,
}

/// Parts that all states of a wait share.
struct Session<'a> {
    router: &'a Router<'a>,
    host: &'a dyn Host,
    progress: &'a Progress,
    decision: &'a Decision,
    patience: Duration,
    once: bool,
    /// Other migrations come over the same listener: a source that missed the outcome may take no
    /// place from them.
    shares_router: bool,
    /// The number of the migration in progress, by which the router knows its channels.
    id: Cell<Uuid>,
    /// For the answer to the source if the engine panics.
    ran: Cell<Ran>,
}

/// Closes the slots of a session's migration when it is dropped, after a panic too: another may take its place,
/// and the router ends with the last one.
struct EndOfSession<'a, 'b>(&'b Session<'a>);

impl Drop for EndOfSession<'_, '_> {
    fn drop(&mut self) {
        // Nil if no offer was accepted: the slots of this number are another migration's then.
        self.0.router.close(self.0.id.get());
    }
}

impl Session<'_> {
    /// Returns the outcome, and the answer to a source that may not know it.
    fn run(&self) -> (Result<(), Refusal>, Option<ToSource>) {
        let incoming = match self.wait() {
            Ok(incoming) => incoming,
            Err(why) => return (Err(why), None),
        };
        self.take(incoming)
    }

    /// Receives the guest, now that its machine exists.
    fn take(&self, incoming: Incoming<'_>) -> (Result<(), Refusal>, Option<ToSource>) {
        let moving = || incoming.run()?.announce().run();
        // A panic must not leave the source to guess: it holds the guest paused until it knows whether
        // the guest ran here. Unwinding has discarded the machine.
        let moved = catch_unwind(AssertUnwindSafe(moving)).unwrap_or_else(|_| {
            let why = Refusal::new("internal", "the migration engine panicked");
            let answer = match self.ran.get() {
                Ran::No => ToSource::NotHere(why.clone()),
                Ran::MayHave | Ran::Yes => ToSource::Ended,
            };
            Err(Failed::Unheard(why, answer))
        });
        // What closes a connection also keeps its descriptor open.
        self.router.set_timer(self.id.get(), None);
        match moved {
            Ok(Ended::Heard) => (Ok(()), None),
            Ok(Ended::Unheard(answer)) => (Ok(()), Some(answer)),
            Err(Failed::Unheard(why, answer)) => (Err(why), Some(answer)),
            Err(Failed::Error(error)) => {
                let error = match error {
                    // One of the ways in which it shows that connections were closed.
                    MigrationError::Wire(_) if self.decision.is_canceled() => {
                        MigrationError::Canceled
                    }
                    error => error,
                };
                tracing::warn!(%error, "an incoming migration failed");
                (Err(error.refusal()), None)
            }
        }
    }

    /// Reports the outcome, and answers a source that may not know it.
    fn conclude(
        &self,
        (outcome, unheard): (Result<(), Refusal>, Option<ToSource>),
        lingers: &(dyn Fn() + Sync),
    ) -> Result<(), Refusal> {
        // The report gets the outcome before this side lingers: an operator must not wait for a
        // source that may never ask.
        self.progress.update(|report| match &outcome {
            Ok(()) => report.phase = Phase::Completed,
            Err(why) => {
                report.phase = match why.code.as_str() {
                    "canceled" => Phase::Canceled,
                    _ => Phase::Failed,
                };
                report.error = Some(why.clone());
            }
        });
        self.decision.release_connections();
        if let Some(answer) = unheard {
            lingers();
            self.linger(&answer);
        }
        outcome
    }

    /// Waits for a source whose offer this host accepts.
    ///
    /// A source that fails before the answer `Prepared` does not end the wait, because it may be a stranger.
    /// If the right source was refused, for instance because a disk is missing or the CPU lacks a feature,
    /// its user can fix that and try again without a new `receive` at the destination.
    fn wait(&self) -> Result<Incoming<'_>, Refusal> {
        loop {
            if self.decision.is_canceled() {
                return Err(MigrationError::Canceled.refusal());
            }
            let Some(offered) = self.router.next_offer(self.patience / POLLS)? else {
                continue;
            };
            let id = offered.id;
            let failed = match self.prepare(offered) {
                Ok(incoming) => return Ok(incoming),
                Err(failed) => failed,
            };
            let why = failed.refusal();
            if self.once && matches!(failed, NotPrepared::Refused(_)) {
                return Err(why);
            }
            tracing::warn!(migration = %id, %why, "an offer was refused; waiting for another");
            self.decision.release_connections();
            self.progress.update(|report| {
                report.phase = Phase::Connecting;
                report.error = Some(why);
            });
        }
    }

    /// Makes the machine for an offer, and answers its source.
    fn prepare(&self, offered: Offered) -> Result<Incoming<'_>, NotPrepared> {
        let prepared = catch_unwind(AssertUnwindSafe(|| Preparing::new(self, offered).prepare()));
        prepared.unwrap_or_else(|_| {
            self.router.close(self.id.get());
            let why = "the destination panicked while it checked an offer";
            Err(NotPrepared::Failed(MigrationError::here("internal", why)))
        })
    }

    /// Receives one message, all of it within one `patience`. The read timeout of the stream does not suffice:
    /// every byte restarts it.
    fn recv(&self, control: &mut ControlChannel) -> Result<ToDestination, WireError> {
        self.recv_until(control, Instant::now() + self.patience)
    }

    /// Receives one message, all of it by this time, and within one `patience`.
    fn recv_until(
        &self,
        control: &mut ControlChannel,
        until: Instant,
    ) -> Result<ToDestination, WireError> {
        let until = until.min(Instant::now() + self.patience);
        // Only reading ends, so that the source can still be sent the reason.
        let closer = control.stream.read_closer()?;
        self.router.set_timer(self.id.get(), Some((until, closer)));
        let received = control.recv();
        // What this side does with it is no time of the source's.
        self.router.set_timer(self.id.get(), None);
        match received {
            Err(_) if until <= Instant::now() => Err(WireError::Silent),
            received => received,
        }
    }

    /// Answers a source that did not hear that its guest runs here, or that all of it is here.
    fn linger(&self, answer: &ToSource) {
        let until = Instant::now() + self.patience * LINGER;
        self.router.allow_questions(self.id.get());
        if self.shares_router {
            self.router.linger(self.id.get());
        }
        // A source of another guest comes first: the one that lingers is answered from the journal.
        let is_relieved =
            || self.decision.is_relieved() || (self.shares_router && self.router.has_offers());
        while Instant::now() < until && !is_relieved() {
            let next = self.router.next(self.id.get(), self.patience / POLLS);
            let Some(Arrived::Again(stream)) = next else {
                continue;
            };
            if stream.set_patience(self.patience).is_err() {
                continue;
            }
            let mut control = ControlChannel::new(stream);
            let told = control.send(answer);
            let knows = |heard: Result<ToDestination, WireError>| match heard {
                Ok(ToDestination::Complete) => true,
                // To these it says nothing more.
                Err(WireError::Closed) => {
                    matches!(answer, ToSource::NotHere(_) | ToSource::Ended)
                }
                _ => false,
            };
            if told.is_ok() && knows(self.recv_until(&mut control, until)) {
                return;
            }
        }
    }
}

fn busy() -> Refusal {
    Refusal::new(
        "busy",
        "the destination accepted the offer of another source",
    )
}

/// Answers a ping; no other message may come here.
fn answer_ping(
    control: &mut ControlChannel,
    message: &ToDestination,
) -> Result<(), MigrationError> {
    match message {
        ToDestination::Ping(number) => Ok(control.send(&ToSource::Pong(*number))?),
        ToDestination::Abort(why) => Err(MigrationError::There(why.clone())),
        other => Err(WireError::damaged(format!("unexpected message {other:?}")).into()),
    }
}

enum Failed {
    /// The source knows, or sees that the connection ends; it lets its guest run on.
    Error(MigrationError),
    /// The source may wait for this answer.
    Unheard(Refusal, ToSource),
}

impl From<MigrationError> for Failed {
    fn from(error: MigrationError) -> Self {
        Self::Error(error)
    }
}
