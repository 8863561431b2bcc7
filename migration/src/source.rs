//! The side from which the guest moves.

use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use memory::DirtyPages;
use parking_lot::Mutex;
use uuid::Uuid;

use crate::Trouble;
use crate::journal::{Journal, Step};
use crate::link::{Dial, Stream};
use crate::message::{self, Channel, Control, Hello, Offer, Refusal, ToDestination, ToSource};
use crate::pages::{BATCH, Batch, Block, PAGE, Run};
use crate::policy::{Mode, Next, Policy, Situation};
use crate::progress::{Downtime, Phase, Progress, Resolution, micros};
use crate::wire::{self, Kind, WireError};

/// How long the destination may take to make a machine.
const PREPARE_PATIENCE: Duration = Duration::from_secs(120);
/// Signs of life that are given within the patience that the other side has.
const SIGNS: u32 = 8;
/// The longest that one waits in one go to keep to a bandwidth.
const LONGEST_WAIT: Duration = Duration::from_millis(100);
/// As often as this, within the patience that one has with the other side, one tries to reach a
/// destination that may have the guest.
const ATTEMPTS: u32 = 30;
/// Rounds of pages so few that threads are not worth their while.
const INLINE: u64 = 2 * BATCH as u64;

/// A machine whose guest moves away. Nothing of it runs or stops but as it is told.
pub trait Source: Send {
    /// What is to move.
    ///
    /// # Errors
    /// When it cannot be moved; the text says why.
    fn offer(&mut self) -> Result<Offer, Refusal>;

    /// Its memory, in the order of [`Offer::blocks`].
    fn blocks(&self) -> Vec<Block>;

    /// Starts or ends the tracking of what is written to its memory. When it starts, all of it
    /// counts as written.
    ///
    /// # Errors
    /// When the host refuses, or the machine is gone.
    fn track(&mut self, on: bool) -> Result<(), Refusal>;

    /// Takes what was written to the blocks' dirty bitmaps.
    ///
    /// # Errors
    /// When the host refuses, or the machine is gone.
    fn harvest(&mut self) -> Result<(), Refusal>;

    /// Keeps vCPUs from running for so many percent of the time.
    fn throttle(&mut self, percent: u8);

    /// The devices as they are while the guest runs.
    ///
    /// # Errors
    /// When they cannot be saved, or the machine is gone.
    fn guess(&mut self) -> Result<Vec<u8>, Refusal>;

    /// Stops the guest. True if it stood already, by its owner's wish, and is to stand at the
    /// destination.
    ///
    /// # Errors
    /// When it does not stop, or the machine is gone; then it goes on.
    fn stop(&mut self) -> Result<bool, Refusal>;

    /// Saves the machine, which stands.
    ///
    /// # Errors
    /// When it cannot be saved.
    fn save(&mut self) -> Result<Vec<u8>, Refusal>;

    /// Lets go of what only one machine may have.
    ///
    /// # Errors
    /// When the host refuses what must be done before.
    fn hand_over(&mut self) -> Result<(), Refusal>;

    /// Undoes [`Source::stop`] and [`Source::hand_over`]: the guest stays.
    ///
    /// # Errors
    /// When somebody else has taken what it handed over.
    fn go_on(&mut self) -> Result<(), Refusal>;

    /// The guest is elsewhere: the machine is no more.
    fn gone(&mut self);
}

/// A migration, seen from the source.
pub struct Sending<'a> {
    /// Its name, in all that is said and written of it.
    pub id: Uuid,
    /// What to strive for.
    pub policy: &'a Policy,
    /// The way to the destination.
    pub dial: &'a dyn Dial,
    /// Where steps are written down.
    pub journal: &'a mut dyn Journal,
    /// Where it is told how it goes.
    pub progress: &'a Progress,
}

/// What became of the guest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// It runs at the destination.
    Moved,
    /// It runs on here, for this reason.
    Stayed(Refusal),
}

/// Moves a guest. Returns when it is certain where it is.
pub fn send(mut sending: Sending<'_>, source: &mut dyn Source) -> Outcome {
    let progress = sending.progress.clone();
    let mut engine = Engine {
        blocks: source.blocks(),
        sending: &mut sending,
        source,
        control: None,
        rams: Vec::new(),
        tracking: false,
        stopped: None,
        measured: Measured::default(),
        downtime: Downtime::default(),
    };
    let outcome = match engine.until_commit() {
        Ok(()) => engine.after_commit(),
        Err(trouble) => engine.stay(trouble),
    };
    progress.update(|report| match &outcome {
        Outcome::Moved => report.phase = Phase::Completed,
        Outcome::Stayed(why) => {
            report.phase = if why.code == "canceled" {
                Phase::Canceled
            } else {
                Phase::Failed
            };
            report.error = Some(why.clone());
        }
    });
    outcome
}

/// A RAM channel.
struct Ram {
    stream: Box<dyn Stream>,
    batch: Batch,
}

/// What the stop will cost, as far as it is known.
#[derive(Clone, Copy, Default)]
struct Measured {
    /// There and back.
    round_trip: Duration,
    save: Duration,
    load: Duration,
    /// Bytes.
    per_second: u64,
}

impl Measured {
    /// A stop costs this beside what was measured: vCPUs leave the guest, and a thread wakes up at
    /// each step.
    const BASE: Duration = Duration::from_micros(400);

    fn downtime(&self, pages: u64) -> Duration {
        let bytes = pages * PAGE as u64;
        let transfer = bytes.saturating_mul(1_000_000) / self.per_second.max(1);
        let transfer = if pages == 0 { 0 } else { transfer };
        // State and answer, order.
        self.round_trip * 3 / 2
            + self.save.max(Duration::from_micros(transfer))
            + self.load
            + Self::BASE
    }
}

struct Engine<'a, 'b> {
    sending: &'a mut Sending<'b>,
    source: &'a mut dyn Source,
    blocks: Vec<Block>,
    control: Option<Control>,
    rams: Vec<Ram>,
    tracking: bool,
    /// Since when the guest stands, and whether it did before.
    stopped: Option<(Instant, bool)>,
    measured: Measured,
    downtime: Downtime,
}

fn gone() -> Trouble {
    Trouble::Wire(WireError::Closed)
}

impl Engine<'_, '_> {
    fn connect(&self, channel: Channel) -> Result<Box<dyn Stream>, Trouble> {
        let dialed = self.sending.dial.dial();
        let mut stream = dialed.map_err(|error| Trouble::here("unreachable", error))?;
        let prepare = || -> std::io::Result<()> {
            stream.set_patience(self.sending.policy.patience)?;
            self.sending.progress.close_on_cancel(stream.closer()?);
            Ok(())
        };
        prepare().map_err(|error| Trouble::Wire(error.into()))?;
        message::say_hello(&mut *stream, &Hello::new(self.sending.id, channel))?;
        Ok(stream)
    }

    fn say(&mut self, message: &ToDestination) -> Result<(), Trouble> {
        Ok(self.control.as_mut().ok_or_else(gone)?.say(message)?)
    }

    /// The answer of the destination.
    fn hear(&mut self) -> Result<ToSource, Trouble> {
        match self.control.as_mut().ok_or_else(gone)?.hear()? {
            ToSource::Refused(why) => Err(Trouble::There(why)),
            other => Ok(other),
        }
    }

    /// One answer and no other.
    fn expect<T>(&mut self, pick: impl FnOnce(&ToSource) -> Option<T>) -> Result<T, Trouble> {
        let answer = self.hear()?;
        pick(&answer).ok_or_else(|| {
            WireError::damaged(format!("{answer:?} is no answer to what was said")).into()
        })
    }

    fn check(&self) -> Result<(), Trouble> {
        if self.sending.progress.is_canceled() {
            Err(Trouble::Canceled)
        } else {
            Ok(())
        }
    }

    fn ping(&mut self) -> Result<Duration, Trouble> {
        let start = Instant::now();
        self.say(&ToDestination::Ping(0))?;
        self.expect(|answer| matches!(answer, ToSource::Pong(0)).then_some(()))?;
        Ok(start.elapsed())
    }

    /// All that leads to the point of no return.
    fn until_commit(&mut self) -> Result<(), Trouble> {
        self.check()?;
        self.prepare()?;
        self.source.track(true).map_err(Trouble::Here)?;
        self.tracking = true;
        self.measure()?;
        let postcopy = match self.sending.policy.mode {
            Mode::Postcopy => true,
            Mode::Precopy | Mode::Hybrid => self.precopy()?,
        };
        if postcopy {
            let why = "the destination does not take pages after the guest";
            return Err(Trouble::here("no-postcopy", why));
        }
        self.stop()
    }

    fn prepare(&mut self) -> Result<(), Trouble> {
        let stream = self.connect(Channel::Control)?;
        self.control = Some(Control::new(stream));
        self.expect(|answer| matches!(answer, ToSource::Welcome { version: 1 }).then_some(()))?;
        self.sending.progress.enter(Phase::Preparing);
        let mut offer = self.source.offer().map_err(Trouble::Here)?;
        let memory = self.blocks.iter().map(|block| block.ram.len() as u64).sum();
        let policy = self.sending.policy;
        offer.connections = policy.connections(memory);
        self.sending
            .progress
            .update(|report| report.memory_bytes = memory);
        self.patience(PREPARE_PATIENCE.max(policy.patience))?;
        self.say(&ToDestination::Prepare(Box::new(offer)))?;
        let connections = self.expect(|answer| match answer {
            ToSource::Prepared { connections, .. } => Some(*connections),
            _ => None,
        })?;
        self.patience(policy.patience)?;
        let prepared = self.sending.journal.record(Step::Prepare);
        prepared.map_err(|error| Trouble::here("journal", error))?;
        for index in 0..connections.clamp(1, policy.connections(memory)) {
            let stream = self.connect(Channel::Ram { index })?;
            self.rams.push(Ram {
                stream,
                batch: Batch::default(),
            });
        }
        let count = self.rams.len() as u16;
        self.sending
            .progress
            .update(|report| report.connections = count);
        Ok(())
    }

    fn patience(&self, patience: Duration) -> Result<(), Trouble> {
        let control = self.control.as_ref().ok_or_else(gone)?;
        let set = control.stream.set_patience(patience);
        set.map_err(|error| Trouble::Wire(error.into()))
    }

    /// What the stop will cost: the devices are loaded at the destination a first time.
    fn measure(&mut self) -> Result<(), Trouble> {
        let round_trips = [self.ping()?, self.ping()?, self.ping()?];
        self.measured.round_trip = round_trips.into_iter().min().unwrap_or_default();
        let start = Instant::now();
        let guess = self.source.guess().map_err(Trouble::Here)?;
        self.measured.save = start.elapsed();
        let control = self.control.as_mut().ok_or_else(gone)?;
        control.say_with_state(&ToDestination::Guess, &guess)?;
        let us = self.expect(|answer| match answer {
            ToSource::GuessLoaded { us } => Some(*us),
            _ => None,
        })?;
        self.measured.load = Duration::from_micros(us);
        Ok(())
    }

    /// Rounds until it is time to stop the guest. True if pages are to follow it.
    fn precopy(&mut self) -> Result<bool, Trouble> {
        let progress = self.sending.progress.clone();
        progress.enter(Phase::Precopy);
        let begun = Instant::now();
        let cut = self.sending.policy.cut(begun);
        let mut harvested = begun;
        let mut pending = self.take_dirty();
        let (mut before, mut throttle) = (count(&pending), 0);
        for round in 1.. {
            self.check()?;
            self.round(round, &pending, cut)?;
            self.source.harvest().map_err(Trouble::Here)?;
            pending = self.take_dirty();
            let dirty = count(&pending);
            let span = harvested.elapsed();
            harvested = Instant::now();
            let predicted = self.measured.downtime(dirty);
            progress.update(|report| {
                report.dirty_pages_per_second = per_second(dirty, span);
                report.predicted_downtime_us = Some(micros(predicted));
            });
            let situation = Situation {
                round,
                dirty,
                dirty_before: before,
                predicted,
                elapsed: begun.elapsed(),
                throttle,
            };
            before = dirty;
            match self.sending.policy.next(&situation) {
                Next::Round { throttle: wanted } => {
                    if wanted != throttle {
                        throttle = wanted;
                        self.source.throttle(throttle);
                        progress.update(|report| report.throttle_percent = throttle);
                    }
                }
                next @ (Next::Stop | Next::Postcopy) => {
                    self.put_back(&pending);
                    return Ok(next == Next::Postcopy);
                }
                Next::GiveUp => {
                    self.put_back(&pending);
                    let why = format!(
                        "the guest writes {dirty} pages while its memory is copied once: the stop would be {} ms, and may be {} ms",
                        predicted.as_millis(),
                        self.sending.policy.max_downtime.as_millis(),
                    );
                    return Err(Trouble::here("does-not-converge", why));
                }
            }
        }
        Ok(false)
    }

    fn take_dirty(&self) -> Vec<DirtyPages> {
        let blocks = self.blocks.iter();
        blocks.map(|block| block.ram.dirty().take()).collect()
    }

    fn put_back(&self, pages: &[DirtyPages]) {
        for (block, pages) in self.blocks.iter().zip(pages) {
            block.ram.dirty().put_back(pages);
        }
    }

    /// Sends pages, and waits until they are in the destination's memory. What was not sent when the
    /// round was `cut` short is dirty still.
    fn round(
        &mut self,
        round: u32,
        pending: &[DirtyPages],
        cut: Option<Instant>,
    ) -> Result<(), Trouble> {
        let start = Instant::now();
        let sent = self.send_pages(round, pending, cut)?;
        self.say(&ToDestination::Round(round))?;
        self.expect(|answer| (*answer == ToSource::RoundDone(round)).then_some(()))?;
        let span = start.elapsed();
        // What little there was says nothing of how fast much would be.
        if sent > 1 << 20 || self.measured.per_second == 0 {
            self.measured.per_second = per_second(sent, span).max(1 << 20);
            let speed = self.measured.per_second;
            self.sending
                .progress
                .update(|report| report.bytes_per_second = speed);
        }
        Ok(())
    }

    /// Sends pages over all channels, and the end of the round over each. Gives the bytes.
    fn send_pages(
        &mut self,
        round: u32,
        pending: &[DirtyPages],
        cut: Option<Instant>,
    ) -> Result<u64, Trouble> {
        let pages = count(pending);
        let progress = self.sending.progress.clone();
        progress.update(|report| {
            report.rounds = round;
            report.remaining_pages = pages;
        });
        let batches = batches(pending);
        let pacer = Pacer::new(self.sending.policy.max_bandwidth);
        if pages <= INLINE {
            return send_inline(
                &mut self.rams,
                &self.blocks,
                batches,
                &pacer,
                round,
                &progress,
            );
        }
        let work = Work {
            blocks: &self.blocks,
            batches: Mutex::new(batches),
            pacer,
            cut,
            round,
            progress: progress.clone(),
        };
        let work = &work;
        let heartbeat_every = self.sending.policy.patience / SIGNS;
        let rams = &mut self.rams;
        let control = self.control.as_mut().ok_or_else(gone)?;
        let sent = thread::scope(|scope| {
            let (done, ended) = mpsc::channel();
            let count = rams.len();
            for ram in rams {
                let done = done.clone();
                scope.spawn(move || {
                    let sent = ram.send(work);
                    // The receiver waits for all of us.
                    let _ = done.send(sent);
                });
            }
            let (mut sent, mut trouble) = (0, None);
            let mut running = count;
            while running > 0 {
                match ended.recv_timeout(heartbeat_every) {
                    Ok(Ok(bytes)) => (sent, running) = (sent + bytes, running - 1),
                    Ok(Err(error)) => {
                        trouble.get_or_insert(error);
                        running -= 1;
                    }
                    // The destination hears from us while a round takes its time.
                    Err(_) if trouble.is_none() => {
                        if let Err(error) = heartbeat(control) {
                            trouble = Some(error);
                            progress.forget_connections();
                        }
                    }
                    Err(_) => {}
                }
            }
            match trouble {
                Some(_) if progress.is_canceled() => Err(Trouble::Canceled),
                Some(trouble) => Err(trouble),
                None => Ok(sent),
            }
        })?;
        work.put_back();
        Ok(sent)
    }

    /// Stops the guest and sends what is left of it. On return the destination is ready, and the
    /// guest has been given away on paper.
    fn stop(&mut self) -> Result<(), Trouble> {
        self.check()?;
        let progress = self.sending.progress.clone();
        progress.enter(Phase::Stopped);
        let start = Instant::now();
        let was_paused = self.source.stop().map_err(Trouble::Here)?;
        self.stopped = Some((start, was_paused));
        self.downtime.pause_us = micros(start.elapsed());
        self.source.harvest().map_err(Trouble::Here)?;
        let pending = self.take_dirty();
        self.downtime.pages = count(&pending);
        let round = progress.report().rounds + 1;
        let saving = Instant::now();
        let state = if self.downtime.pages <= INLINE {
            self.send_pages(round, &pending, None)?;
            self.source.save().map_err(Trouble::Here)?
        } else {
            self.send_and_save(round, &pending)?
        };
        self.downtime.save_us = micros(saving.elapsed());
        let sending = Instant::now();
        let control = self.control.as_mut().ok_or_else(gone)?;
        control.say_with_state(&ToDestination::State { round }, &state)?;
        // While the destination loads.
        self.source.hand_over().map_err(Trouble::Here)?;
        self.downtime.load_us = self.expect(|answer| match answer {
            ToSource::Ready { load_us } => Some(*load_us),
            _ => None,
        })?;
        self.downtime.transfer_us = micros(sending.elapsed());
        if !progress.commit() {
            return Err(Trouble::Canceled);
        }
        let given = self.sending.journal.record(Step::Commit);
        given.map_err(|error| Trouble::here("journal", error))
    }

    /// Many pages: they go while the machine is saved.
    fn send_and_save(&mut self, round: u32, pending: &[DirtyPages]) -> Result<Vec<u8>, Trouble> {
        let work = Work {
            blocks: &self.blocks,
            batches: Mutex::new(batches(pending)),
            pacer: Pacer::new(self.sending.policy.max_bandwidth),
            cut: None,
            round,
            progress: self.sending.progress.clone(),
        };
        let (work, rams, source) = (&work, &mut self.rams, &mut *self.source);
        let (sent, saved) = thread::scope(|scope| {
            let senders: Vec<_> = rams
                .iter_mut()
                .map(|ram| scope.spawn(move || ram.send(work)))
                .collect();
            let saved = source.save();
            let sent: Result<Vec<u64>, Trouble> = senders
                .into_iter()
                .map(|sender| sender.join().unwrap_or_else(|_| Err(gone())))
                .collect();
            (sent, saved)
        });
        sent?;
        saved.map_err(Trouble::Here)
    }

    /// The guest stays: it goes on if it was stopped, and the destination hears of it.
    fn stay(&mut self, trouble: Trouble) -> Outcome {
        let trouble = match trouble {
            // Of the many ways in which it shows that connections were closed.
            Trouble::Wire(_) if self.sending.progress.is_canceled() => Trouble::Canceled,
            other => other,
        };
        let mut why = trouble.refusal();
        tracing::info!(migration = %self.sending.id, %why, "a guest stays where it is");
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
    fn after_commit(&mut self) -> Outcome {
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
                    let _ = self.say(&ToDestination::Complete);
                    return self.moved();
                }
                Ok(ToSource::Ended) => return self.moved(),
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

fn heartbeat(control: &mut Control) -> Result<(), Trouble> {
    control.say(&ToDestination::Ping(1))?;
    match control.hear()? {
        ToSource::Pong(1) => Ok(()),
        ToSource::Refused(why) => Err(Trouble::There(why)),
        other => Err(WireError::damaged(format!("{other:?} is no sign of life")).into()),
    }
}

fn count(pages: &[DirtyPages]) -> u64 {
    pages.iter().map(|pages| pages.count() as u64).sum()
}

fn per_second(count: u64, span: Duration) -> u64 {
    let us = span.as_micros().max(1);
    u64::try_from(u128::from(count) * 1_000_000 / us).unwrap_or(u64::MAX)
}

/// Pages in runs of a batch at most.
fn batches(pending: &[DirtyPages]) -> impl Iterator<Item = Run> + Send + '_ {
    (0_u32..).zip(pending).flat_map(|(block, pages)| {
        pages.runs().flat_map(move |(first, pages)| {
            (0..pages).step_by(BATCH).map(move |at| Run {
                block,
                first: (first + at) as u64,
                // A batch has few.
                pages: BATCH.min(pages - at) as u32,
            })
        })
    })
}

/// A round that several channels share.
struct Work<'a, I> {
    blocks: &'a [Block],
    batches: Mutex<I>,
    pacer: Pacer,
    /// It ends then, whatever is left.
    cut: Option<Instant>,
    round: u32,
    progress: Progress,
}

impl<I: Iterator<Item = Run>> Work<'_, I> {
    /// What was not sent is dirty still.
    fn put_back(&self) {
        for run in self.batches.lock().by_ref() {
            if let Some(block) = self.blocks.get(run.block as usize) {
                // Within the block.
                let first = run.first as usize;
                block
                    .ram
                    .dirty()
                    .mark(first * PAGE, run.pages as usize * PAGE);
            }
        }
    }
}

/// Few pages, over the first channel, on this thread.
fn send_inline(
    rams: &mut [Ram],
    blocks: &[Block],
    batches: impl Iterator<Item = Run>,
    pacer: &Pacer,
    round: u32,
    progress: &Progress,
) -> Result<u64, Trouble> {
    let mut sent = 0;
    if let Some(first) = rams.first_mut() {
        for run in batches {
            sent += first.send_batch(blocks, run, progress)?;
            pacer.wait(sent);
        }
    }
    for ram in rams {
        ram.end(round)?;
    }
    Ok(sent)
}

impl Ram {
    /// Sends batches as long as there are some, and the end of the round.
    fn send(&mut self, work: &Work<'_, impl Iterator<Item = Run>>) -> Result<u64, Trouble> {
        let mut sent = 0;
        while work.cut.is_none_or(|cut| Instant::now() < cut) {
            let next = work.batches.lock().next();
            let Some(run) = next else { break };
            if work.progress.is_canceled() {
                return Err(Trouble::Canceled);
            }
            let bytes = self.send_batch(work.blocks, run, &work.progress)?;
            sent += bytes;
            work.pacer.wait(bytes);
        }
        self.end(work.round)?;
        Ok(sent)
    }

    fn end(&mut self, round: u32) -> Result<(), Trouble> {
        Ok(wire::write(
            &mut *self.stream,
            Kind::End,
            &[&round.to_le_bytes()],
        )?)
    }

    fn send_batch(
        &mut self,
        blocks: &[Block],
        run: Run,
        progress: &Progress,
    ) -> Result<u64, Trouble> {
        let Some(block) = blocks.get(run.block as usize) else {
            return Ok(0);
        };
        let batch = self.batch.fill(block, run);
        let mut sent = 0;
        if let Some((head, data)) = &batch.pages {
            wire::write(&mut *self.stream, Kind::Pages, &[head, data])?;
            sent += (wire::HEADER_LEN + head.len() + data.len()) as u64;
        }
        if let Some(head) = &batch.zeros {
            wire::write(&mut *self.stream, Kind::Zeros, &[head])?;
            sent += (wire::HEADER_LEN + head.len()) as u64;
        }
        let (full, zero) = (batch.full_pages, batch.zero_pages);
        progress.update(|report| {
            report.sent_bytes += sent;
            report.pages += full;
            report.zero_pages += zero;
            report.remaining_pages = report.remaining_pages.saturating_sub(full + zero);
        });
        Ok(sent)
    }
}

/// Keeps to a bandwidth, all channels together.
struct Pacer {
    limit: Option<u64>,
    begun: Instant,
    sent: std::sync::atomic::AtomicU64,
}

impl Pacer {
    fn new(limit: Option<u64>) -> Self {
        Self {
            limit,
            begun: Instant::now(),
            sent: std::sync::atomic::AtomicU64::new(0),
        }
    }

    /// So many bytes more were sent: waits until they may have been.
    fn wait(&self, bytes: u64) {
        let Some(limit) = self.limit else { return };
        let before = self
            .sent
            .fetch_add(bytes, std::sync::atomic::Ordering::Relaxed);
        let due = Duration::from_micros((before + bytes).saturating_mul(1_000_000) / limit.max(1));
        let ahead = due.saturating_sub(self.begun.elapsed());
        if ahead > Duration::from_millis(1) {
            thread::sleep(ahead.min(LONGEST_WAIT));
        }
    }
}
