//! The side to which the guest moves.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::thread;
use std::time::{Duration, Instant};

use memory::DirtyBitmap;
use uuid::Uuid;

use crate::Trouble;
use crate::journal::{Journal, Step};
use crate::link::{Accept, Closer, Stream};
use crate::message::{self, Channel, Control, Hello, Offer, Refusal, ToDestination, ToSource};
use crate::pages::{self, Block};
use crate::policy::MAX_CONNECTIONS;
use crate::progress::{Phase, Progress, Resolution, micros};
use crate::wire::{Kind, Reader, WireError};

/// How long who connects may take to say who it is.
const HELLO_PATIENCE: Duration = Duration::from_secs(5);
/// Connections that may be about to say it.
const STRANGERS: usize = 64;
/// As often as this, within the patience that one has with the other side, one looks for a decision
/// or a connection.
const LOOKS: u32 = 100;
/// A destination whose guest runs answers a source that did not hear of it for so many times the
/// patience that one has with the other side.
const LINGER: u32 = 6;

/// A machine to which a guest moves. It stands until it is started.
pub trait Target: Send {
    /// Its memory, in the order of [`Offer::blocks`].
    fn blocks(&self) -> Vec<Block>;

    /// Goes on from what a running guest's devices are, to see whether it can.
    ///
    /// # Errors
    /// When it cannot.
    fn guess(&mut self, state: &[u8]) -> Result<(), Refusal>;

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

    /// Lets the guest run, which stood for so long; or not yet, if it is to stay paused.
    ///
    /// # Errors
    /// When it cannot; then nothing of it has run.
    fn start(&mut self, stood_for: Duration, paused: bool) -> Result<(), Refusal>;

    /// The guest does not come.
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
    /// Makes one.
    ///
    /// # Errors
    /// When it cannot be; the text is told to the users of both sides.
    fn prepare(&self, migration: Uuid, offer: &Offer) -> Result<Box<dyn Target>, Refusal>;

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
    /// How long the source may be silent.
    pub patience: Duration,
    /// Called when the guest runs here, and [`receive`] does not return yet: a source that did not
    /// hear of it may ask.
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
        patience,
        lingers,
    } = receiving;
    let (over, strangers) = (AtomicBool::new(false), AtomicUsize::new(0));
    thread::scope(|scope| {
        let (arrive, arrivals) = mpsc::channel();
        let (over, strangers) = (&over, &strangers);
        scope.spawn(move || {
            while !over.load(Ordering::Acquire) {
                let stream = match accept.accept(patience / LOOKS) {
                    Ok(Some(stream)) => stream,
                    Ok(None) => continue,
                    Err(error) => {
                        tracing::warn!(%error, "no more connections can come");
                        return;
                    }
                };
                if strangers.fetch_add(1, Ordering::AcqRel) >= STRANGERS {
                    strangers.fetch_sub(1, Ordering::AcqRel);
                    continue;
                }
                let arrive = arrive.clone();
                scope.spawn(move || {
                    if let Some(arrival) = greet(stream) {
                        // The session may be over.
                        let _ = arrive.send(arrival);
                    }
                    strangers.fetch_sub(1, Ordering::AcqRel);
                });
            }
        });
        let mut session = Session {
            host,
            progress,
            patience,
            arrivals: &arrivals,
        };
        let outcome = session.run();
        progress.update(|report| match &outcome {
            Ok(_) => report.phase = Phase::Completed,
            Err(why) => {
                report.phase = match why.code.as_str() {
                    "canceled" => Phase::Canceled,
                    _ => Phase::Failed,
                };
                report.error = Some(why.clone());
            }
        });
        if let Ok(Ended::Unheard(id)) = &outcome {
            lingers();
            session.linger(*id);
        }
        over.store(true, Ordering::Release);
        outcome.map(|_| ())
    })
}

/// Who connected, and what for.
struct Arrival {
    hello: Hello,
    stream: Box<dyn Stream>,
}

fn greet(mut stream: Box<dyn Stream>) -> Option<Arrival> {
    stream.set_patience(HELLO_PATIENCE).ok()?;
    match message::hear_hello(&mut *stream) {
        Ok(hello) => Some(Arrival { hello, stream }),
        Err(error) => {
            tracing::info!(%error, "somebody connected who does not migrate a guest");
            None
        }
    }
}

fn turn_away(stream: Box<dyn Stream>, why: Refusal) {
    // It learns it, or sees that the connection ends.
    let _ = Control::new(stream).say(&ToSource::Refused(why));
}

/// How a guest that runs here came.
enum Ended {
    /// The source knows.
    Heard,
    /// The source may not know yet.
    Unheard(Uuid),
}

/// A channel's round has ended, or the channel has.
type RoundEnd = (u16, Result<u32, Trouble>);

struct Session<'a> {
    host: &'a dyn Host,
    progress: &'a Progress,
    patience: Duration,
    arrivals: &'a Receiver<Arrival>,
}

impl Session<'_> {
    fn run(&mut self) -> Result<Ended, Refusal> {
        loop {
            let Arrival { hello, stream } = self.first()?;
            match self.migrate(hello.migration, stream) {
                // It could not be prepared: the source was told why. Another may come.
                Err(Failed::Refused(why)) => {
                    self.progress.forget_connections();
                    tracing::info!(%why, "a guest was refused");
                    return Err(why);
                }
                Err(Failed::Trouble(trouble)) => {
                    let canceled = self.progress.is_canceled();
                    let trouble = match trouble {
                        Trouble::Wire(_) if canceled => Trouble::Canceled,
                        other => other,
                    };
                    return Err(trouble.refusal());
                }
                Ok(ended) => return Ok(ended),
            }
        }
    }

    /// The first control connection.
    fn first(&self) -> Result<Arrival, Refusal> {
        loop {
            if self.progress.is_canceled() {
                return Err(Trouble::Canceled.refusal());
            }
            let arrival = match self.arrivals.recv_timeout(self.patience / LOOKS) {
                Ok(arrival) => arrival,
                Err(RecvTimeoutError::Timeout) => continue,
                Err(RecvTimeoutError::Disconnected) => {
                    return Err(Refusal::new("connection-lost", "no connection can come"));
                }
            };
            match (arrival.hello.version(), arrival.hello.channel) {
                (Err(why), _) => turn_away(arrival.stream, why),
                (Ok(_), Channel::Control) => return Ok(arrival),
                (Ok(_), Channel::Again) => self.tell_fate(arrival),
                (Ok(_), _) => {
                    let why = "pages without a migration";
                    turn_away(arrival.stream, Refusal::new("out-of-order", why));
                }
            }
        }
    }

    /// Answers who asks for an earlier migration.
    fn tell_fate(&self, arrival: Arrival) {
        let why = || Refusal::new("never-ran", "the destination lost the guest before it ran");
        let answer = match self.host.fate(arrival.hello.migration) {
            Fate::Ran => ToSource::Ended,
            Fate::NeverRan => ToSource::NotHere(why()),
            Fate::Unknown => ToSource::Refused(Refusal::new(
                "unknown-migration",
                "the destination knows nothing of this migration",
            )),
        };
        let _ = Control::new(arrival.stream).say(&answer);
    }

    fn migrate(&mut self, id: Uuid, stream: Box<dyn Stream>) -> Result<Ended, Failed> {
        let mut control = self.adopt(stream).map_err(Failed::Trouble)?;
        control.say(&ToSource::Welcome { version: 1 })?;
        self.progress.enter(Phase::Preparing);
        let offer = loop {
            match control.hear()? {
                ToDestination::Prepare(offer) => break offer,
                other => answer_ping(&mut control, &other)?,
            }
        };
        let prepared = self.prepare(id, &offer);
        let (mut target, journal) = match prepared {
            Ok(prepared) => prepared,
            Err(why) => {
                control.say(&ToSource::Refused(why.clone()))?;
                return Err(Failed::Refused(why));
            }
        };
        let blocks = target.blocks();
        let touched: Vec<_> = blocks
            .iter()
            .map(|block| {
                let touched = DirtyBitmap::new(block.ram.len());
                touched.set_enabled(true);
                touched
            })
            .collect();
        let connections = offer.connections.clamp(1, MAX_CONNECTIONS);
        let memory = blocks.iter().map(|block| block.ram.len() as u64).sum();
        self.progress.update(|report| {
            report.memory_bytes = memory;
            report.connections = connections;
        });
        let outcome = thread::scope(|scope| {
            let (ends, ended) = mpsc::channel();
            let mut taking = Taking {
                session: self,
                id,
                control: Some(control),
                target: &mut *target,
                journal,
                connections,
                ended: &ended,
                rounds: vec![0; connections.into()],
                open: vec![false; connections.into()],
                is_ready: false,
                closers: Vec::new(),
                start_channel: &mut |index, stream: Box<dyn Stream>| {
                    let (ends, blocks, touched, progress) =
                        (ends.clone(), &blocks, &touched, self.progress.clone());
                    scope.spawn(move || {
                        take_pages(index, stream, blocks, touched, &ends, &progress)
                    });
                },
            };
            let outcome = taking.run();
            // The channels' threads end with their connections.
            taking.closers.iter().for_each(Closer::close);
            outcome
        });
        if let Err(Failed::Trouble(trouble)) = &outcome {
            tracing::info!(migration = %id, %trouble, "a guest does not come");
        }
        if outcome.is_err() {
            target.discard();
        }
        outcome
    }

    fn adopt(&self, stream: Box<dyn Stream>) -> Result<Control, Trouble> {
        let adopted = stream
            .set_patience(self.patience)
            .and_then(|()| stream.closer());
        let closer = adopted.map_err(|error| Trouble::Wire(error.into()))?;
        self.progress.close_on_cancel(closer);
        Ok(Control::new(stream))
    }

    fn prepare(
        &self,
        id: Uuid,
        offer: &Offer,
    ) -> Result<(Box<dyn Target>, Box<dyn Journal>), Refusal> {
        let journal = |error: std::io::Error| {
            Refusal::new("journal", format!("the journal cannot be written: {error}"))
        };
        let target = self.host.prepare(id, offer)?;
        let agreed = |target: &dyn Target| -> Result<Box<dyn Journal>, Refusal> {
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

    /// Answers a source that did not hear that its guest runs here.
    fn linger(&self, id: Uuid) {
        let until = Instant::now() + self.patience * LINGER;
        while Instant::now() < until {
            let Ok(arrival) = self.arrivals.recv_timeout(self.patience / LOOKS) else {
                continue;
            };
            if arrival.hello.migration != id || arrival.hello.channel != Channel::Again {
                turn_away(arrival.stream, busy());
                continue;
            }
            let mut control = Control::new(arrival.stream);
            let told = control.say(&ToSource::Running { us: 0 });
            if told.is_ok() && matches!(control.hear(), Ok(ToDestination::Complete)) {
                return;
            }
        }
    }
}

fn busy() -> Refusal {
    Refusal::new("busy", "the destination takes another guest")
}

/// Answers a sign of life; anything else cannot be here.
fn answer_ping(control: &mut Control, message: &ToDestination) -> Result<(), Trouble> {
    match message {
        ToDestination::Ping(number) => Ok(control.say(&ToSource::Pong(*number))?),
        ToDestination::Abort(why) => Err(Trouble::There(why.clone())),
        other => Err(WireError::damaged(format!("{other:?} cannot be here")).into()),
    }
}

enum Failed {
    /// Before anything moved; the source was told.
    Refused(Refusal),
    Trouble(Trouble),
}

impl From<Trouble> for Failed {
    fn from(trouble: Trouble) -> Self {
        Self::Trouble(trouble)
    }
}

impl From<WireError> for Failed {
    fn from(error: WireError) -> Self {
        Self::Trouble(error.into())
    }
}

impl From<Refusal> for Failed {
    fn from(why: Refusal) -> Self {
        Self::Trouble(Trouble::Here(why))
    }
}

/// A guest that is coming.
struct Taking<'a, 'b> {
    session: &'a Session<'a>,
    id: Uuid,
    control: Option<Control>,
    target: &'a mut dyn Target,
    journal: Box<dyn Journal>,
    connections: u16,
    ended: &'a Receiver<RoundEnd>,
    /// The last round that ended, by channel.
    rounds: Vec<u32>,
    open: Vec<bool>,
    is_ready: bool,
    closers: Vec<Closer>,
    start_channel: &'b mut dyn FnMut(u16, Box<dyn Stream>),
}

impl Taking<'_, '_> {
    fn control(&mut self) -> Result<&mut Control, Trouble> {
        self.control
            .as_mut()
            .ok_or(Trouble::Wire(WireError::Closed))
    }

    fn say(&mut self, message: &ToSource) -> Result<(), Trouble> {
        Ok(self.control()?.say(message)?)
    }

    fn run(&mut self) -> Result<Ended, Failed> {
        let connections = self.connections;
        self.say(&ToSource::Prepared {
            connections,
            postcopy: false,
        })?;
        self.session.progress.enter(Phase::Precopy);
        let outcome = self.until_ready();
        if let Err(Failed::Trouble(trouble)) = &outcome {
            let why = match trouble {
                Trouble::Here(why) => why.clone(),
                other => other.refusal(),
            };
            // So that both sides know. A source that does not hear it sees that the connection ends.
            let _ = self.say(&ToSource::Refused(why));
            self.aborted();
        }
        outcome?;
        self.until_decided()
    }

    fn aborted(&mut self) {
        if let Err(error) = self.journal.record(Step::Aborted) {
            tracing::warn!(%error, "a journal cannot be written");
        }
    }

    fn hear(&mut self) -> Result<ToDestination, Trouble> {
        Ok(self.control()?.hear()?)
    }

    /// Waits until all RAM channels are there, which the source makes next.
    fn wait_channels(&mut self) -> Result<(), Trouble> {
        let deadline = Instant::now() + self.session.patience;
        while !self.open.iter().all(|open| *open) {
            self.take_arrivals(self.session.patience / LOOKS)?;
            if self.session.progress.is_canceled() {
                return Err(Trouble::Canceled);
            }
            if Instant::now() > deadline {
                return Err(WireError::Silent.into());
            }
        }
        Ok(())
    }

    /// Memory and devices; on return the guest can go on.
    fn until_ready(&mut self) -> Result<(), Failed> {
        self.wait_channels()?;
        loop {
            match self.hear()? {
                ToDestination::Round(round) => {
                    self.wait_round(round)?;
                    self.session.progress.update(|report| report.rounds = round);
                    self.say(&ToSource::RoundDone(round))?;
                }
                ToDestination::Guess => {
                    let state = self.control()?.hear_state().map_err(Trouble::from)?;
                    let start = Instant::now();
                    self.target.guess(&state)?;
                    let us = micros(start.elapsed());
                    self.say(&ToSource::GuessLoaded { us })?;
                }
                ToDestination::State { round } => {
                    self.session.progress.enter(Phase::Stopped);
                    let state = self.control()?.hear_state().map_err(Trouble::from)?;
                    self.wait_round(round)?;
                    let start = Instant::now();
                    self.target.load(&state)?;
                    let load_us = micros(start.elapsed());
                    let written = self.journal.record(Step::Ready);
                    written.map_err(|error| Trouble::here("journal", error))?;
                    self.is_ready = true;
                    self.session.progress.enter(Phase::HandingOver);
                    // Whether it arrives is known when the order comes.
                    if let Err(trouble) = self.say(&ToSource::Ready { load_us }) {
                        self.doubt(&trouble);
                    }
                    return Ok(());
                }
                other => answer_ping(self.control()?, &other)?,
            }
        }
    }

    /// Waits until each RAM channel has ended this round.
    fn wait_round(&mut self, round: u32) -> Result<(), Trouble> {
        let deadline = Instant::now() + self.session.patience;
        loop {
            self.take_arrivals(Duration::ZERO)?;
            if self.open.iter().all(|open| *open) && self.rounds.iter().all(|ended| *ended >= round)
            {
                return Ok(());
            }
            let tick = self.session.patience / LOOKS;
            let all_open = self.open.iter().all(|open| *open);
            match self
                .ended
                .recv_timeout(if all_open { tick } else { tick / 50 })
            {
                Ok((index, Ok(ended))) => {
                    if let Some(last) = self.rounds.get_mut(usize::from(index)) {
                        *last = ended;
                    }
                }
                Ok((_, Err(trouble))) => return Err(trouble),
                Err(_) if self.session.progress.is_canceled() => return Err(Trouble::Canceled),
                Err(_) if Instant::now() > deadline => return Err(WireError::Silent.into()),
                Err(_) => {}
            }
        }
    }

    /// Connections that came meanwhile. Gives one that asks how it stands.
    fn take_arrivals(&mut self, patience: Duration) -> Result<Option<Control>, Trouble> {
        let mut wait = patience;
        while let Ok(arrival) = self.session.arrivals.recv_timeout(wait) {
            wait = Duration::ZERO;
            let Arrival { hello, stream } = arrival;
            if hello.migration != self.id {
                match hello.channel {
                    Channel::Again => self.session.tell_fate(Arrival { hello, stream }),
                    _ => turn_away(stream, busy()),
                }
                continue;
            }
            match hello.channel {
                Channel::Ram { index } => {
                    let Some(open) = self.open.get_mut(usize::from(index)).filter(|open| !**open)
                    else {
                        turn_away(stream, Refusal::new("out-of-order", "a channel too many"));
                        continue;
                    };
                    *open = true;
                    let prepared = stream
                        .set_patience(RAM_PATIENCE)
                        .and_then(|()| Ok((stream.closer()?, stream.closer()?)));
                    let (ours, other) = prepared.map_err(|error| Trouble::Wire(error.into()))?;
                    self.closers.push(ours);
                    self.session.progress.close_on_cancel(other);
                    (self.start_channel)(index, stream);
                }
                Channel::Again if self.is_ready => {
                    return Ok(Some(self.session.adopt(stream)?));
                }
                Channel::Again | Channel::Control | Channel::Faults => {
                    turn_away(stream, Refusal::new("out-of-order", "it cannot be now"));
                }
            }
        }
        Ok(None)
    }

    fn doubt(&mut self, trouble: &Trouble) {
        self.control = None;
        self.session.progress.update(|report| {
            report.phase = Phase::InDoubt;
            report.error = Some(trouble.refusal());
        });
    }

    /// The guest can go on, and the source decides whether it does. Who lost the source waits for it,
    /// or for somebody to decide: nothing else is certain.
    fn until_decided(&mut self) -> Result<Ended, Failed> {
        let tick = self.session.patience / LOOKS;
        loop {
            if self.control.is_some() {
                match self.hear() {
                    Ok(ToDestination::Commit {
                        stood_for_ns,
                        paused,
                    }) => {
                        return self.start(Duration::from_nanos(stood_for_ns), paused);
                    }
                    Ok(ToDestination::Abort(why)) => {
                        self.aborted();
                        return Err(Failed::Trouble(Trouble::There(why)));
                    }
                    Ok(other) => {
                        let answered = answer_ping(self.control()?, &other);
                        if let Err(trouble) = answered {
                            self.doubt(&trouble);
                        }
                    }
                    Err(trouble) => self.doubt(&trouble),
                }
                continue;
            }
            match self.session.progress.wait_resolution(tick) {
                Some(Resolution::Run) => {
                    return self.start(Duration::ZERO, false);
                }
                Some(Resolution::Discard) => {
                    self.aborted();
                    let why = "somebody decided that the guest does not go on here";
                    return Err(Failed::Trouble(Trouble::here("resolved", why)));
                }
                None => {}
            }
            if let Some(mut control) = self.take_arrivals(tick)? {
                if control.say(&ToSource::Waiting).is_ok() {
                    self.control = Some(control);
                }
            }
        }
    }

    /// The order came. From when it is written down on, the guest runs here and nowhere else.
    fn start(&mut self, stood_for: Duration, paused: bool) -> Result<Ended, Failed> {
        let start = Instant::now();
        let started = self.take_over_and_start(stood_for, paused, start);
        match started {
            Ok(()) => {
                let us = micros(start.elapsed());
                let told = self.say(&ToSource::Running { us });
                let heard = told.is_ok() && matches!(self.hear(), Ok(ToDestination::Complete));
                Ok(if heard {
                    Ended::Heard
                } else {
                    Ended::Unheard(self.id)
                })
            }
            Err(why) => {
                self.aborted();
                // It asks again if it does not hear it.
                let _ = self.say(&ToSource::NotHere(why.clone()));
                Err(Failed::Trouble(Trouble::Here(why)))
            }
        }
    }

    fn take_over_and_start(
        &mut self,
        stood_for: Duration,
        paused: bool,
        since: Instant,
    ) -> Result<(), Refusal> {
        self.target.take_over()?;
        let written = self.journal.record(Step::Running);
        written.map_err(|error| Refusal::new("journal", error.to_string()))?;
        self.target.start(stood_for + since.elapsed(), paused)
    }
}

/// How long a RAM channel may be silent: the control channel tells whether the source lives.
const RAM_PATIENCE: Duration = Duration::from_secs(3600);

/// Takes pages until the channel ends.
fn take_pages(
    index: u16,
    mut stream: Box<dyn Stream>,
    blocks: &[Block],
    touched: &[DirtyBitmap],
    ends: &Sender<RoundEnd>,
    progress: &Progress,
) {
    let mut reader = Reader::default();
    let mut take = || -> Result<Option<u32>, WireError> {
        let allowed = [Kind::Pages, Kind::Zeros, Kind::End];
        let (kind, body) = reader.read(&mut *stream, &allowed)?;
        if kind == Kind::End {
            let round = <[u8; 4]>::try_from(body);
            let round =
                round.map_err(|_| WireError::damaged("the end of a round has no number"))?;
            return Ok(Some(u32::from_le_bytes(round)));
        }
        let decoded = pages::decode(body, blocks, kind == Kind::Pages)?;
        decoded.apply(blocks, touched);
        let (count, bytes) = (decoded.count(), body.len() as u64);
        progress.update(|report| {
            report.sent_bytes += bytes;
            match kind {
                Kind::Zeros => report.zero_pages += count,
                _ => report.pages += count,
            }
        });
        Ok(None)
    };
    loop {
        match take() {
            Ok(None) => {}
            Ok(Some(round)) => {
                if ends.send((index, Ok(round))).is_err() {
                    return;
                }
            }
            Err(error) => {
                let _ = ends.send((index, Err(error.into())));
                return;
            }
        }
    }
}
