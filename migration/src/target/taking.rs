//! A guest that is coming: from when there is room for it, until it runs here or does not come.

use std::sync::mpsc::{Receiver, Sender};
use std::time::{Duration, Instant};

use memory::DirtyBitmap;
use uuid::Uuid;

use super::{
    Arrival, Ended, Failed, LOOKS, RoundEnd, Session, Target, answer_ping, busy, turn_away,
};
use crate::Trouble;
use crate::journal::{Journal, Step};
use crate::link::{Closer, Stream};
use crate::message::{Channel, Control, Refusal, ToDestination, ToSource};
use crate::pages::{self, Block};
use crate::progress::{Phase, Progress, Resolution, micros};
use crate::wire::{Kind, Reader, WireError};

/// A guest that is coming.
pub(super) struct Taking<'a, 'b> {
    pub(super) session: &'a Session<'a>,
    pub(super) id: Uuid,
    pub(super) control: Option<Control>,
    pub(super) target: &'a mut dyn Target,
    pub(super) journal: Box<dyn Journal>,
    pub(super) connections: u16,
    pub(super) ended: &'a Receiver<RoundEnd>,
    /// The last round that ended, by channel.
    pub(super) rounds: Vec<u32>,
    pub(super) open: Vec<bool>,
    pub(super) is_ready: bool,
    pub(super) closers: Vec<Closer>,
    pub(super) start_channel: &'b mut dyn FnMut(u16, Box<dyn Stream>),
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

    pub(super) fn run(&mut self) -> Result<Ended, Failed> {
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
            if let Some(mut control) = self.take_arrivals(tick)?
                && control.say(&ToSource::Waiting).is_ok()
            {
                self.control = Some(control);
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
pub(super) fn take_pages(
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
