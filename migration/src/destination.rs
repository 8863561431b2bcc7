//! The destination: the side to which the guest moves.

mod incoming;
mod pending;
mod postcopy;

use std::fs::File;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

use memory::DirtyBitmap;
use parking_lot::Mutex;
use uuid::Uuid;

use self::incoming::{Incoming, take_pages};
use self::pending::PendingConnections;
use self::postcopy::PostcopyReceiver;
use crate::decision::Decision;
use crate::journal::{Journal, Step};
use crate::link::{Accept, Closer, Stream};
use crate::message::{Channel, Control, Hello, Offer, Refusal, ToDestination, ToSource};
use crate::pages::Block;
use crate::policy::MAX_CONNECTIONS;
use crate::progress::{Phase, Progress};
use crate::wire::WireError;
use crate::{LINGER, MigrationError};

/// As often as this, within the patience that one has with the other side, one looks for a decision
/// or a connection.
const POLLS: u32 = 100;

/// A machine to which a guest moves. It stands until it is started.
pub trait Destination: Send {
    /// Its memory, in the order of [`Offer::blocks`].
    fn blocks(&self) -> Vec<Block>;

    /// Goes on from what a running guest's devices are, to see whether it can.
    ///
    /// # Errors
    /// When it cannot.
    fn dry_run(&mut self, state: &[u8]) -> Result<(), Refusal>;

    /// Goes on from what was saved, in one commit. All memory is there.
    ///
    /// # Errors
    /// When it cannot.
    fn load(&mut self, state: &[u8]) -> Result<(), Refusal>;

    /// Takes what only one machine may have.
    ///
    /// # Errors
    /// When somebody else has it.
    fn take_over(&mut self) -> Result<(), Refusal>;

    /// Resumes the guest, unless it stays paused. Its clocks have been stopped for `stopped_for`.
    /// Returns the time since which it runs: whatever is done later is not part of the stop.
    ///
    /// # Errors
    /// The guest cannot resume; then nothing of it has run.
    fn start(&mut self, stopped_for: Duration, paused: bool) -> Result<Instant, Refusal>;

    /// The guest does not come; or it runs here already, and the rest of it does not come: then it
    /// ends at once.
    fn discard(&mut self);
}

/// What became of an earlier migration, as far as it was written down.
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
    /// Makes one. `files` are the memory, block by block, where it is given.
    ///
    /// # Errors
    /// When it cannot be; the text is told to the users of both sides.
    fn prepare(
        &self,
        migration: Uuid,
        offer: &Offer,
        files: Vec<File>,
    ) -> Result<Box<dyn Destination>, Refusal>;

    /// Where the steps of a migration are written down.
    ///
    /// # Errors
    /// When the host refuses.
    fn journal(&self, migration: Uuid, vm: &str) -> std::io::Result<Box<dyn Journal>>;

    /// What was written down of an earlier one.
    fn fate(&self, migration: Uuid) -> Fate;
}

/// Waiting for a guest.
pub struct Receiving<'a> {
    /// Where connections come from.
    pub accept: &'a mut dyn Accept,
    /// Who makes the machine.
    pub host: &'a dyn Host,
    /// Where it is told how it goes.
    pub progress: &'a Progress,
    /// Carries cancel requests and resolutions.
    pub decision: &'a Decision,
    /// How long the source may be silent.
    pub patience: Duration,
    /// Called when it is certain whether the guest runs here, and [`receive`] does not return yet: a
    /// source that did not hear of it may ask.
    pub lingers: &'a (dyn Fn() + Sync),
}

/// Waits for one guest, and takes it. Returns when it is certain whether it runs here.
///
/// # Errors
/// When it does not; why is also in the report.
pub fn receive(receiving: Receiving<'_>) -> Result<(), Refusal> {
    let Receiving {
        accept,
        host,
        progress,
        decision,
        patience,
        lingers,
    } = receiving;
    let (over, pending) = (AtomicBool::new(false), PendingConnections::default());
    thread::scope(|scope| {
        let (arrive, connections_in) = mpsc::channel();
        let (over, pending) = (&over, &pending);
        let tick = patience / POLLS;
        let accepting = move || pending.receive(scope, accept, tick, over, &arrive);
        let started = thread::Builder::new().spawn_scoped(scope, accepting);
        started.map_err(|error| Refusal::new("host-refused", error.to_string()))?;
        let mut session = Session {
            host,
            progress,
            decision,
            patience,
            connections_in: &connections_in,
        };
        let (outcome, pending_abort) = session.run();
        progress.update(|report| match &outcome {
            Ok(()) => report.phase = Phase::Completed,
            Err(why) => {
                report.phase = match why.code.as_str() {
                    "canceled" => Phase::Canceled,
                    _ => Phase::Failed,
                };
                report.error = Some(why.clone());
            }
        });
        decision.release_connections();
        if let Some((id, answer)) = pending_abort {
            lingers();
            session.linger(id, &answer);
        }
        over.store(true, Ordering::Release);
        outcome
    })
}

/// The memory to which pages come.
struct IncomingMemory {
    blocks: Vec<Block>,
    /// Pages that were written here, block by block: all others are zeros.
    touched: Vec<DirtyBitmap>,
    /// Pages that come after the guest, as far as was told.
    missing: Mutex<Vec<DirtyBitmap>>,
    /// Set from when the guest may go on without them.
    receiver: OnceLock<PostcopyReceiver>,
}

impl IncomingMemory {
    fn new(blocks: Vec<Block>) -> Self {
        let bitmaps = || -> Vec<DirtyBitmap> {
            let bitmaps = blocks.iter().map(|block| {
                let bitmap = DirtyBitmap::new(block.ram.len());
                bitmap.set_enabled(true);
                bitmap
            });
            bitmaps.collect()
        };
        Self {
            touched: bitmaps(),
            missing: Mutex::new(bitmaps()),
            receiver: OnceLock::new(),
            blocks,
        }
    }
}

/// A machine for the guest, and where its steps are written down.
type Prepared = (Box<dyn Destination>, Box<dyn Journal>);

/// Who connected, and what for.
struct Connection {
    hello: Hello,
    stream: Box<dyn Stream>,
}

fn refuse(stream: Box<dyn Stream>, why: Refusal) {
    // It learns it, or sees that the connection ends.
    let _ = Control::new(stream).send(&ToSource::Refused(why));
}

/// How a guest that runs here came.
enum Ended {
    /// The source knows.
    Heard,
    /// The source may not know yet, and is told so when it asks.
    Unheard(ToSource),
}

/// A channel's round has ended, or the channel has.
type RoundEnd = (u16, Result<u32, MigrationError>);

struct Session<'a> {
    host: &'a dyn Host,
    progress: &'a Progress,
    decision: &'a Decision,
    patience: Duration,
    connections_in: &'a Receiver<Connection>,
}

impl Session<'_> {
    /// What became of it, and what a source is told that does not know it.
    fn run(&mut self) -> (Result<(), Refusal>, Option<(Uuid, ToSource)>) {
        let Connection { hello, stream } = match self.first() {
            Ok(connection) => connection,
            Err(why) => return (Err(why), None),
        };
        let id = hello.migration;
        match self.migrate(id, stream) {
            Ok(Ended::Heard) => (Ok(()), None),
            Ok(Ended::Unheard(answer)) => (Ok(()), Some((id, answer))),
            // The source was told the same.
            Err(Failed::Refused(why)) => (Err(why), None),
            Err(Failed::Unheard(why, answer)) => (Err(why), Some((id, answer))),
            Err(Failed::MigrationError(MigrationError::Wire(_))) if self.decision.is_canceled() => {
                (Err(MigrationError::Canceled.refusal()), None)
            }
            Err(Failed::MigrationError(error)) => (Err(error.refusal()), None),
        }
    }

    /// The first control connection.
    fn first(&self) -> Result<Connection, Refusal> {
        loop {
            if self.decision.is_canceled() {
                return Err(MigrationError::Canceled.refusal());
            }
            let connection = match self.connections_in.recv_timeout(self.patience / POLLS) {
                Ok(connection) => connection,
                Err(RecvTimeoutError::Timeout) => continue,
                Err(RecvTimeoutError::Disconnected) => {
                    return Err(Refusal::new("connection-lost", "no connection can come"));
                }
            };
            match (connection.hello.version(), connection.hello.channel) {
                (Err(why), _) => refuse(connection.stream, why),
                (Ok(_), Channel::Control) => return Ok(connection),
                (Ok(_), Channel::Again) => self.answer_query(connection),
                (Ok(_), _) => {
                    let why = "pages without a migration";
                    refuse(connection.stream, Refusal::new("out-of-order", why));
                }
            }
        }
    }

    /// Answers who asks for an earlier migration.
    fn answer_query(&self, connection: Connection) {
        let why = || Refusal::new("never-ran", "the destination lost the guest before it ran");
        let answer = match self.host.fate(connection.hello.migration) {
            Fate::Ran => ToSource::Ended,
            Fate::NeverRan => ToSource::NotHere(why()),
            Fate::Unknown => ToSource::Refused(Refusal::new(
                "unknown-migration",
                "the destination knows nothing of this migration",
            )),
        };
        let _ = Control::new(connection.stream).send(&answer);
    }

    fn migrate(&mut self, id: Uuid, stream: Box<dyn Stream>) -> Result<Ended, Failed> {
        let mut control = self.adopt(stream).map_err(Failed::MigrationError)?;
        control.send(&ToSource::Welcome { version: 1 })?;
        self.progress.enter(Phase::Preparing);
        let offer = loop {
            match control.recv()? {
                ToDestination::Prepare(offer) => break offer,
                other => answer_ping(&mut control, &other)?,
            }
        };
        let files = if offer.given {
            let taken = control.stream.recv_files(offer.blocks.len());
            taken.map_err(WireError::from)?
        } else {
            Vec::new()
        };
        let prepared = self.prepare(id, &offer, files);
        let (mut target, journal) = match prepared {
            Ok(prepared) => prepared,
            Err(why) => {
                control.send(&ToSource::Refused(why.clone()))?;
                return Err(Failed::Refused(why));
            }
        };
        let blocks = target.blocks();
        let memory_here = IncomingMemory::new(blocks);
        let connections = offer.connections.clamp(1, MAX_CONNECTIONS);
        let sizes = memory_here
            .blocks
            .iter()
            .map(|block| block.ram.len() as u64);
        let memory = sizes.sum();
        self.progress.update(|report| {
            report.memory_bytes = memory;
            report.connections = connections;
        });
        let outcome = thread::scope(|scope| {
            let (ends, ended) = mpsc::channel();
            let mut incoming = Incoming {
                session: self,
                id,
                control: Some(control),
                target: &mut *target,
                journal,
                connections,
                ended: &ended,
                rounds: vec![0; connections.into()],
                open: vec![false; connections.into()],
                ready: None,
                again: None,
                memory: &memory_here,
                faults: None,
                question: None,
                start_watch: &mut || {
                    let watch = || {
                        if let Some(receiver) = memory_here.receiver.get() {
                            receiver.watch(self.progress);
                        }
                    };
                    let started = thread::Builder::new().spawn_scoped(scope, watch);
                    started.map(|_| ())
                },
                closers: Vec::new(),
                start_channel: &mut |index, stream: Box<dyn Stream>| {
                    let (ends, memory, progress) =
                        (ends.clone(), &memory_here, self.progress.clone());
                    let take = move || take_pages(index, stream, memory, &ends, &progress);
                    let started = thread::Builder::new().spawn_scoped(scope, take);
                    started.map(|_| ())
                },
            };
            let outcome = incoming.run();
            if outcome.is_err() {
                // Before anybody finds zeros where pages are missing.
                incoming.target.discard();
            }
            // The channels' threads end with their connections.
            incoming.closers.iter().for_each(Closer::close);
            // Nobody is to wait for a page that does not come.
            if let Some(receiver) = memory_here.receiver.get() {
                receiver.end(self.progress);
            }
            outcome
        });
        if let Err(Failed::MigrationError(error)) = &outcome {
            tracing::warn!(migration = %id, %error, "a guest does not come");
        }
        outcome
    }

    fn adopt(&self, stream: Box<dyn Stream>) -> Result<Control, MigrationError> {
        let adopted = stream
            .set_patience(self.patience)
            .and_then(|()| stream.closer());
        let closer = adopted.map_err(|error| MigrationError::Wire(error.into()))?;
        self.decision.close_on_cancel(closer);
        Ok(Control::new(stream))
    }

    fn prepare(&self, id: Uuid, offer: &Offer, files: Vec<File>) -> Result<Prepared, Refusal> {
        let journal = |error: std::io::Error| {
            Refusal::new("journal", format!("the journal cannot be written: {error}"))
        };
        let target = self.host.prepare(id, offer, files)?;
        let agreed = |target: &dyn Destination| -> Result<Box<dyn Journal>, Refusal> {
            let blocks = target.blocks();
            let here: Vec<_> = blocks
                .iter()
                .map(|block| (block.name.clone(), block.ram.len() as u64))
                .collect();
            let there: Vec<_> = offer
                .blocks
                .iter()
                .map(|block| (block.name.clone(), block.size))
                .collect();
            if here != there {
                let detail =
                    format!("the guest's memory is {there:?} at the source, and {here:?} here");
                return Err(Refusal::new("memory-differs", detail));
            }
            let mut written = self.host.journal(id, &offer.vm).map_err(journal)?;
            written.record(Step::Prepare).map_err(journal)?;
            Ok(written)
        };
        let mut target = target;
        match agreed(&*target) {
            Ok(journal) => Ok((target, journal)),
            Err(why) => {
                target.discard();
                Err(why)
            }
        }
    }

    /// Answers a source that did not hear that its guest runs here, or that all of it is here.
    fn linger(&self, id: Uuid, answer: &ToSource) {
        let until = Instant::now() + self.patience * LINGER;
        while Instant::now() < until {
            let Ok(connection) = self.connections_in.recv_timeout(self.patience / POLLS) else {
                continue;
            };
            if connection.hello.migration != id || connection.hello.channel != Channel::Again {
                refuse(connection.stream, busy());
                continue;
            }
            let mut control = Control::new(connection.stream);
            let told = control.send(answer);
            let knows = |heard: Result<ToDestination, WireError>| match heard {
                Ok(ToDestination::Complete) => true,
                // It says nothing more.
                Err(WireError::Closed) => matches!(answer, ToSource::NotHere(_)),
                _ => false,
            };
            if told.is_ok() && knows(control.recv()) {
                return;
            }
        }
    }
}

fn busy() -> Refusal {
    Refusal::new("busy", "the destination takes another guest")
}

/// Answers a sign of life; anything else cannot be here.
fn answer_ping(control: &mut Control, message: &ToDestination) -> Result<(), MigrationError> {
    match message {
        ToDestination::Ping(number) => Ok(control.send(&ToSource::Pong(*number))?),
        ToDestination::Abort(why) => Err(MigrationError::There(why.clone())),
        other => Err(WireError::damaged(format!("{other:?} cannot be here")).into()),
    }
}

enum Failed {
    /// Before anything moved; the source was told.
    Refused(Refusal),
    /// When the order had come; the source may not know it yet, and is told so when it asks.
    Unheard(Refusal, ToSource),
    MigrationError(MigrationError),
}

impl From<MigrationError> for Failed {
    fn from(error: MigrationError) -> Self {
        Self::MigrationError(error)
    }
}

impl From<WireError> for Failed {
    fn from(error: WireError) -> Self {
        Self::MigrationError(error.into())
    }
}

impl From<Refusal> for Failed {
    fn from(why: Refusal) -> Self {
        Self::MigrationError(MigrationError::Here(why))
    }
}
