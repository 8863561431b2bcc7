//! A guest that is coming: from when there is room for it, until it runs here or does not come.

use std::sync::mpsc::{Receiver, Sender};
use std::time::{Duration, Instant};

use memory::UserFaults;
use uuid::Uuid;

use super::postcopy::PostcopyReceiver;
use super::{
    Connection, Destination, Ended, Failed, IncomingMemory, POLLS, RoundEnd, Session, answer_ping,
    busy, refuse,
};
use crate::decision::{Doubt, Question, Resolution};
use crate::journal::{Journal, Step};
use crate::link::{Closer, Stream};
use crate::message::{Channel, Control, Refusal, ToDestination, ToSource};
use crate::pages::{self, Content};
use crate::progress::{Phase, Progress, micros};
use crate::wire::{Kind, Reader, WireError};
use crate::{KEEPALIVES, MigrationError, PAGES_PATIENCE};

/// A guest that is coming.
pub(super) struct Incoming<'a, 'b> {
    pub(super) session: &'a Session<'a>,
    pub(super) id: Uuid,
    pub(super) control: Option<Control>,
    pub(super) target: &'a mut dyn Destination,
    pub(super) journal: Box<dyn Journal>,
    pub(super) connections: u16,
    pub(super) ended: &'a Receiver<RoundEnd>,
    /// The last round that ended, by channel.
    pub(super) rounds: Vec<u32>,
    pub(super) open: Vec<bool>,
    /// Since when the guest could go on here, and whether it is to stay paused.
    pub(super) ready: Option<(Instant, bool)>,
    /// A source that asks again, and was not answered yet.
    pub(super) again: Option<Control>,
    pub(super) memory: &'a IncomingMemory,
    /// Where pages are asked for that come after the guest.
    pub(super) faults: Option<Box<dyn Stream>>,
    /// Open while no source is connected that could decide.
    pub(super) question: Option<Question>,
    pub(super) start_watch: &'b mut dyn FnMut() -> std::io::Result<()>,
    pub(super) closers: Vec<Closer>,
    pub(super) start_channel: &'b mut dyn FnMut(u16, Box<dyn Stream>) -> std::io::Result<()>,
}

impl Incoming<'_, '_> {
    fn control(&mut self) -> Result<&mut Control, MigrationError> {
        self.control
            .as_mut()
            .ok_or(MigrationError::Wire(WireError::Closed))
    }

    fn send(&mut self, message: &ToSource) -> Result<(), MigrationError> {
        Ok(self.control()?.send(message)?)
    }

    pub(super) fn run(&mut self) -> Result<Ended, Failed> {
        let connections = self.connections;
        self.send(&ToSource::Prepared {
            connections,
            postcopy: UserFaults::is_possible(),
        })?;
        self.session.progress.enter(Phase::Precopy);
        let outcome = self.until_ready();
        if let Err(Failed::MigrationError(error)) = &outcome {
            let why = match error {
                MigrationError::Here(why) => why.clone(),
                other => other.refusal(),
            };
            // So that both sides know. A source that does not hear it sees that the connection ends.
            let _ = self.send(&ToSource::Refused(why));
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

    fn recv(&mut self) -> Result<ToDestination, MigrationError> {
        Ok(self.control()?.recv()?)
    }

    /// Waits until all RAM channels are there, which the source makes next.
    fn wait_channels(&mut self) -> Result<(), MigrationError> {
        let deadline = Instant::now() + self.session.patience;
        while !self.open.iter().all(|open| *open) {
            self.again = self.take_arrivals(self.session.patience / POLLS)?;
            if self.again.is_some() {
                // It has given these up.
                return Err(WireError::Closed.into());
            }
            if self.session.decision.is_canceled() {
                return Err(MigrationError::Canceled);
            }
            if Instant::now() > deadline {
                return Err(WireError::Silent.into());
            }
        }
        Ok(())
    }

    /// Whether the source heard what it was told last.
    fn recv_complete(&mut self) -> bool {
        matches!(self.recv(), Ok(ToDestination::Complete))
    }

    /// Memory and devices; on return the guest can go on.
    fn until_ready(&mut self) -> Result<(), Failed> {
        self.wait_channels()?;
        loop {
            match self.recv()? {
                ToDestination::Round(round) => {
                    self.wait_round(round)?;
                    self.session.progress.update(|report| report.rounds = round);
                    self.send(&ToSource::RoundDone(round))?;
                }
                ToDestination::Guess => {
                    let state = self.control()?.recv_state().map_err(MigrationError::from)?;
                    let start = Instant::now();
                    self.target.dry_run(&state)?;
                    let us = micros(start.elapsed());
                    self.send(&ToSource::GuessLoaded { us })?;
                }
                ToDestination::State {
                    round,
                    postcopy,
                    paused,
                } => {
                    let since = Instant::now();
                    self.session.progress.enter(Phase::Stopped);
                    let state = self.control()?.recv_state().map_err(MigrationError::from)?;
                    self.wait_round(round)?;
                    let start = Instant::now();
                    if postcopy {
                        self.expect_postcopy()?;
                    }
                    self.target.load(&state)?;
                    self.check_postcopy()?;
                    let load_us = micros(start.elapsed());
                    // From here on it is the source's to decide, or somebody's who resolves it.
                    if !self.session.decision.commit() {
                        return Err(MigrationError::Canceled.into());
                    }
                    let written = self.journal.record(Step::Ready);
                    written.map_err(|error| MigrationError::here("journal", error))?;
                    self.ready = Some((since, paused));
                    self.session.progress.enter(Phase::HandingOver);
                    // Whether it arrives is known when the order comes.
                    if let Err(error) = self.send(&ToSource::Ready { load_us }) {
                        self.enter_doubt(&error);
                    }
                    return Ok(());
                }
                other => answer_ping(self.control()?, &other)?,
            }
        }
    }

    /// Waits until each RAM channel has ended this round. A way that is slow and holds much may take
    /// long: as long as pages come, the source hears that they do.
    fn wait_round(&mut self, round: u32) -> Result<(), MigrationError> {
        let patience = self.session.patience;
        let arrived = || self.session.progress.report().sent_bytes;
        let (mut last, mut since, mut told) = (arrived(), Instant::now(), Instant::now());
        loop {
            if self.rounds.iter().all(|ended| *ended >= round) {
                return Ok(());
            }
            match self.ended.recv_timeout(patience / POLLS) {
                Ok((index, Ok(ended))) => {
                    if let Some(last) = self.rounds.get_mut(usize::from(index)) {
                        *last = ended;
                    }
                }
                Ok((_, Err(error))) => return Err(error),
                Err(_) if self.session.decision.is_canceled() => {
                    return Err(MigrationError::Canceled);
                }
                Err(_) => {}
            }
            let now = arrived();
            if now != last {
                (last, since) = (now, Instant::now());
            }
            if since.elapsed() > patience {
                return Err(WireError::Silent.into());
            }
            if told.elapsed() > patience / KEEPALIVES {
                told = Instant::now();
                self.send(&ToSource::Busy)?;
            }
        }
    }

    /// Connections that came meanwhile. Gives one that asks how it stands.
    fn take_arrivals(&mut self, patience: Duration) -> Result<Option<Control>, MigrationError> {
        let mut wait = patience;
        while let Ok(connection) = self.session.connections_in.recv_timeout(wait) {
            wait = Duration::ZERO;
            let Connection { hello, stream } = connection;
            if hello.migration != self.id {
                match hello.channel {
                    Channel::Again => self.session.answer_query(Connection { hello, stream }),
                    _ => refuse(stream, busy()),
                }
                continue;
            }
            match hello.channel {
                Channel::Ram { index } => {
                    let Some(open) = self.open.get_mut(usize::from(index)).filter(|open| !**open)
                    else {
                        refuse(stream, Refusal::new("out-of-order", "a channel too many"));
                        continue;
                    };
                    *open = true;
                    let prepared = stream
                        .set_patience(PAGES_PATIENCE)
                        .and_then(|()| Ok((stream.closer()?, stream.closer()?)));
                    let (ours, other) =
                        prepared.map_err(|error| MigrationError::Wire(error.into()))?;
                    self.closers.push(ours);
                    self.session.decision.close_on_cancel(other);
                    let started = (self.start_channel)(index, stream);
                    started.map_err(|error| MigrationError::here("host-refused", error))?;
                }
                Channel::Faults if self.faults.is_none() => {
                    let prepared = stream.set_patience(self.session.patience);
                    prepared.and_then(|()| stream.closer()).map_or_else(
                        |error| tracing::info!(%error, "a channel ended at once"),
                        |closer| self.closers.push(closer),
                    );
                    self.faults = Some(stream);
                }
                Channel::Again if self.ready.is_some() => {
                    return Ok(Some(self.session.adopt(stream)?));
                }
                Channel::Again | Channel::Control | Channel::Faults => {
                    refuse(stream, Refusal::new("out-of-order", "it cannot be now"));
                }
            }
        }
        Ok(None)
    }

    fn enter_doubt(&mut self, error: &MigrationError) {
        self.control = None;
        // Before the report shows the doubt: an operator who sees it can resolve it.
        let decision = self.session.decision;
        self.question
            .get_or_insert_with(|| decision.ask(Doubt::HandOver));
        self.session.progress.update(|report| {
            report.phase = Phase::InDoubt;
            report.error = Some(error.refusal());
        });
    }

    /// The guest can go on, and the source decides whether it does. Who lost the source waits for it,
    /// or for somebody to decide: nothing else is certain.
    fn until_decided(&mut self) -> Result<Ended, Failed> {
        let tick = self.session.patience / POLLS;
        loop {
            if self.control.is_some() {
                match self.recv() {
                    Ok(ToDestination::Commit {
                        stood_for_ns,
                        paused,
                    }) => {
                        return self.start(Duration::from_nanos(stood_for_ns), paused);
                    }
                    Ok(ToDestination::Abort(why)) => {
                        self.aborted();
                        // A source that does not hear it asks again.
                        let _ = self.send(&ToSource::NotHere(why.clone()));
                        return Err(Failed::MigrationError(MigrationError::There(why)));
                    }
                    Ok(other) => {
                        let answered = answer_ping(self.control()?, &other);
                        if let Err(error) = answered {
                            self.enter_doubt(&error);
                        }
                    }
                    Err(error) => self.enter_doubt(&error),
                }
                continue;
            }
            let decided = self.question.as_ref().and_then(|open| open.wait(tick));
            match decided {
                Some(Resolution::Run) => {
                    let (since, paused) = self.ready.unwrap_or((Instant::now(), false));
                    return self.start(since.elapsed(), paused);
                }
                Some(Resolution::Discard) => {
                    self.aborted();
                    let why = "somebody decided that the guest does not go on here";
                    return Err(Failed::MigrationError(MigrationError::here(
                        "resolved", why,
                    )));
                }
                None => {}
            }
            if let Some(mut control) = self.take_arrivals(tick)?
                && control.send(&ToSource::Waiting).is_ok()
            {
                self.control = Some(control);
            }
        }
    }

    /// The guest goes on before all its pages are there: who touches one that is missing waits.
    fn expect_postcopy(&mut self) -> Result<(), MigrationError> {
        let deadline = Instant::now() + self.session.patience;
        let ask = loop {
            if let Some(ask) = self.faults.take() {
                break ask;
            }
            self.take_arrivals(self.session.patience / POLLS)?;
            if Instant::now() > deadline {
                return Err(WireError::Silent.into());
            }
        };
        let missing = std::mem::take(&mut *self.memory.missing.lock());
        let patience = self.session.patience;
        let receiver = PostcopyReceiver::new(&self.memory.blocks, missing, ask, patience)
            .map_err(|error| MigrationError::here("no-postcopy", error))?;
        if self.memory.receiver.set(receiver).is_ok() {
            let started = (self.start_watch)();
            started.map_err(|error| MigrationError::here("host-refused", error))?;
        }
        Ok(())
    }

    /// What was loaded is nothing where pages did not come that it needed.
    fn check_postcopy(&self) -> Result<(), MigrationError> {
        match self.memory.receiver.get() {
            Some(receiver) if !receiver.is_whole() => Err(WireError::Closed.into()),
            _ => Ok(()),
        }
    }

    /// Takes the pages that come after the guest. A connection that is lost is awaited again, for as
    /// long as it takes: the guest waits only where it needs what is not there. Returns whether the
    /// source heard that no more are needed.
    fn receive_missing(
        &mut self,
        receiver: &PostcopyReceiver,
        mut connected: bool,
    ) -> Result<bool, Failed> {
        let progress = self.session.progress;
        progress.enter(Phase::Postcopy);
        loop {
            let taken = if connected {
                self.until_pages_are_there(receiver)
            } else {
                Err(WireError::Closed.into())
            };
            let error = match taken {
                Ok(()) => {
                    receiver.end(progress);
                    progress.update(|report| report.error = None);
                    let told = self.send(&ToSource::Completed);
                    return Ok(told.is_ok() && self.recv_complete());
                }
                Err(error) => error,
            };
            tracing::warn!(migration = %self.id, %error, left = receiver.left(), "pages of a guest do not come");
            receiver.disconnect();
            let decision = self.session.decision;
            self.question
                .get_or_insert_with(|| decision.ask(Doubt::Postcopy));
            self.closers.drain(..).for_each(|closer| closer.close());
            self.control = None;
            progress.update(|report| {
                report.phase = Phase::PostcopyPaused;
                report.error = Some(error.refusal());
            });
            if receiver.is_lost() {
                return Ok(false);
            }
            connected = self.reconnect(receiver)?;
        }
    }

    fn until_pages_are_there(&mut self, receiver: &PostcopyReceiver) -> Result<(), MigrationError> {
        loop {
            match self.recv()? {
                ToDestination::PagesSent { round } => {
                    self.wait_round(round)?;
                    return match receiver.left() {
                        _ if receiver.is_lost() => Ok(()),
                        0 => Ok(()),
                        left => {
                            let why = format!("{left} pages were not sent");
                            Err(WireError::damaged(why).into())
                        }
                    };
                }
                ToDestination::Complete => {}
                other => answer_ping(self.control()?, &other)?,
            }
        }
    }

    /// Waits for the source, and tells it what is missing. False if it went again.
    fn reconnect(&mut self, receiver: &PostcopyReceiver) -> Result<bool, Failed> {
        let tick = self.session.patience / POLLS;
        let mut control = loop {
            if let Some(control) = self.again.take() {
                break control;
            }
            let decided = self.question.as_ref().and_then(|open| open.wait(tick));
            if decided == Some(Resolution::Discard) {
                let why = "somebody decided that the guest does not go on here";
                return Err(Failed::MigrationError(MigrationError::here(
                    "resolved", why,
                )));
            }
            if receiver.is_lost() {
                return Ok(false);
            }
            // A connection that ends as it comes is none.
            if let Ok(Some(control)) = self.take_arrivals(tick) {
                break control;
            }
        };
        // What ended with the channels that there were is of no interest.
        while self.ended.try_recv().is_ok() {}
        self.open.fill(false);
        self.rounds.fill(0);
        self.faults = None;
        let told = receiver
            .still_missing()
            .into_iter()
            .map(|(block, first, bits)| ToSource::StillMissing { block, first, bits })
            .chain([ToSource::Prepared {
                connections: self.connections,
                postcopy: true,
            }])
            .try_for_each(|message| control.send(&message));
        self.control = Some(control);
        if told.is_err() || self.wait_channels().is_err() {
            return Ok(false);
        }
        let deadline = Instant::now() + self.session.patience;
        while self.faults.is_none() && Instant::now() < deadline {
            match self.take_arrivals(tick) {
                Ok(None) => {}
                Ok(again) => {
                    self.again = again;
                    return Ok(false);
                }
                Err(_) => return Ok(false),
            }
        }
        let Some(ask) = self.faults.take() else {
            return Ok(false);
        };
        receiver.connect(ask);
        self.question = None;
        self.session.progress.enter(Phase::Postcopy);
        Ok(true)
    }

    /// The order came. From when it is written down on, the guest runs here and nowhere else.
    fn start(&mut self, stood_for: Duration, paused: bool) -> Result<Ended, Failed> {
        let start = Instant::now();
        self.question = None;
        let started = self.take_over_and_start(stood_for, paused, start);
        match started {
            Ok(runs) => {
                let us = micros(runs.saturating_duration_since(start));
                let told_us = micros(start.elapsed());
                let told = self.send(&ToSource::Running { us, told_us });
                let mut heard = told.is_ok() && self.recv_complete();
                // What a source is told that asks again.
                let mut answer = ToSource::Running { us: 0, told_us: 0 };
                if let Some(receiver) = self.memory.receiver.get() {
                    heard = self.receive_missing(receiver, heard)?;
                    answer = ToSource::Completed;
                }
                Ok(if heard {
                    Ended::Heard
                } else {
                    Ended::Unheard(answer)
                })
            }
            Err(why) => {
                self.aborted();
                // Before the source hears of it, and takes back what it handed over.
                self.target.discard();
                let answer = ToSource::NotHere(why.clone());
                if self.send(&answer).is_err() {
                    return Err(Failed::Unheard(why, answer));
                }
                Err(Failed::MigrationError(MigrationError::Here(why)))
            }
        }
    }

    fn take_over_and_start(
        &mut self,
        stood_for: Duration,
        paused: bool,
        since: Instant,
    ) -> Result<Instant, Refusal> {
        self.target.take_over()?;
        if let Some(receiver) = self.memory.receiver.get()
            && !receiver.start()
        {
            return Err(Refusal::new(
                "connection-lost",
                "pages did not come that were needed",
            ));
        }
        let written = self.journal.record(Step::Running);
        written.map_err(|error| Refusal::new("journal", error.to_string()))?;
        self.target.start(stood_for + since.elapsed(), paused)
    }
}

/// Takes pages until the channel ends.
pub(super) fn take_pages(
    index: u16,
    mut stream: Box<dyn Stream>,
    memory: &IncomingMemory,
    ends: &Sender<RoundEnd>,
    progress: &Progress,
) {
    let mut reader = Reader::default();
    let mut take = || -> Result<Option<u32>, WireError> {
        let allowed = [Kind::Pages, Kind::Zeros, Kind::Missing, Kind::End];
        let (kind, body) = reader.read(&mut *stream, &allowed)?;
        if kind == Kind::End {
            let round = <[u8; 4]>::try_from(body);
            let round =
                round.map_err(|_| WireError::damaged("the end of a round has no number"))?;
            return Ok(Some(u32::from_le_bytes(round)));
        }
        let content = match kind {
            Kind::Pages => Content::Data,
            Kind::Missing => Content::Later,
            _ => Content::Zeros,
        };
        let decoded = pages::decode(body, &memory.blocks, content)?;
        match (content, memory.receiver.get()) {
            (Content::Later, None) => {
                decoded.mark(&memory.missing.lock());
                return Ok(None);
            }
            (Content::Later, Some(_)) => {
                return Err(WireError::damaged("pages are told missing that were not"));
            }
            (_, Some(receiver)) => receiver.fill(&decoded)?,
            (_, None) => decoded.apply(&memory.blocks, &memory.touched),
        }
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
                if let Some(receiver) = memory.receiver.get() {
                    receiver.give_up();
                }
                let _ = ends.send((index, Err(error.into())));
                return;
            }
        }
    }
}
