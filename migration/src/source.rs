//! The side from which the guest moves.

mod hand_over;
mod postcopy;

use std::fs::File;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

use memory::DirtyPages;
use parking_lot::Mutex;
use uuid::Uuid;

pub use self::hand_over::Untold;
use self::postcopy::Urgent;
use crate::journal::{Journal, Step};
use crate::link::{Dial, Stream};
use crate::message::{self, Channel, Control, Hello, Offer, Refusal, ToDestination, ToSource};
use crate::pages::{BATCH, Block, PAGE};
use crate::policy::{Measured, Mode, Next, Policy, Situation};
use crate::progress::{Downtime, Phase, Progress, micros};
use crate::sender::{Pacer, Ram, Work, batches, count, on_all, per_second, send_inline};
use crate::wire::WireError;
use crate::{SIGNS, Trouble};

/// How long the destination may take to make a machine.
const PREPARE_PATIENCE: Duration = Duration::from_secs(120);
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

    /// The guest will be stopped soon: does what would take long then, while it runs.
    fn settle(&mut self);

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

    /// It is not certain where the guest is: it stands until it is.
    fn doubt(&mut self);

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
    /// It runs on here.
    Stayed {
        /// For this reason.
        why: Refusal,
        /// Who is to be told so still.
        untold: Option<Untold>,
    },
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
        can_postcopy: false,
        is_given: false,
        urgent: None,
    };
    let outcome = match engine.until_commit() {
        Ok(()) => engine.after_commit(),
        Err(trouble) => engine.stay(trouble),
    };
    progress.update(|report| match &outcome {
        Outcome::Moved => report.phase = Phase::Completed,
        Outcome::Stayed { why, .. } => {
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
    /// The destination can take pages after the guest.
    can_postcopy: bool,
    /// The destination has the memory itself.
    is_given: bool,
    /// Who answers for pages that are waited for: pages follow the guest.
    urgent: Option<Urgent>,
}

/// A connection that has said what it is for.
fn reach(dial: &dyn Dial, patience: Duration, hello: &Hello) -> Result<Box<dyn Stream>, Trouble> {
    let dialed = dial.dial();
    let mut stream = dialed.map_err(|error| Trouble::here("unreachable", error))?;
    stream.set_patience(patience).map_err(WireError::from)?;
    message::say_hello(&mut *stream, hello)?;
    Ok(stream)
}

fn gone() -> Trouble {
    Trouble::Wire(WireError::Closed)
}

impl Engine<'_, '_> {
    fn connect(&self, channel: Channel) -> Result<Box<dyn Stream>, Trouble> {
        let sending = &self.sending;
        let hello = Hello::new(sending.id, channel);
        let stream = reach(sending.dial, sending.policy.patience, &hello)?;
        let closer = stream.closer().map_err(WireError::from)?;
        sending.progress.close_on_cancel(closer);
        Ok(stream)
    }

    fn say(&mut self, message: &ToDestination) -> Result<(), Trouble> {
        Ok(self.control.as_mut().ok_or_else(gone)?.say(message)?)
    }

    /// The answer of the destination.
    fn hear(&mut self) -> Result<ToSource, Trouble> {
        loop {
            match self.control.as_mut().ok_or_else(gone)?.hear()? {
                ToSource::Refused(why) => return Err(Trouble::There(why)),
                ToSource::Busy => self.check()?,
                other => return Ok(other),
            }
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

    /// Has the machine do what may take long while its guest runs; the destination hears that we live.
    fn patiently<R: Send>(
        &mut self,
        work: impl FnOnce(&mut dyn Source) -> Result<R, Refusal> + Send,
    ) -> Result<R, Trouble> {
        let every = self.sending.policy.patience / SIGNS;
        let (control, source) = (self.control.as_mut().ok_or_else(gone)?, &mut *self.source);
        thread::scope(|scope| {
            let (done, results) = mpsc::channel();
            let worker = move || {
                // The receiver waits for it, unless the destination is gone.
                let _ = done.send(work(source));
            };
            let started = thread::Builder::new().spawn_scoped(scope, worker);
            started.map_err(|error| Trouble::here("host-refused", error))?;
            loop {
                match results.recv_timeout(every) {
                    Ok(result) => return result.map_err(Trouble::Here),
                    Err(RecvTimeoutError::Timeout) => heartbeat(control)?,
                    Err(RecvTimeoutError::Disconnected) => return Err(gone()),
                }
            }
        })
    }

    /// All that leads to the point of no return.
    fn until_commit(&mut self) -> Result<(), Trouble> {
        self.check()?;
        self.prepare()?;
        if self.is_given {
            // The destination has it already.
            self.measure()?;
            return self.stop(false);
        }
        self.tracking = true;
        self.patiently(|source| {
            source.track(true)?;
            // All counts as written now, also in what is harvested first: which is not to be sent twice.
            source.harvest()
        })?;
        self.measure()?;
        let postcopy = match self.sending.policy.mode {
            Mode::Postcopy => true,
            Mode::Precopy | Mode::Hybrid => self.precopy()?,
        };
        if postcopy && !self.can_postcopy {
            let why = "the destination cannot take pages after the guest: it has no userfaultfd, or memory of huge pages";
            return Err(Trouble::here("no-postcopy", why));
        }
        self.stop(postcopy)
    }

    fn prepare(&mut self) -> Result<(), Trouble> {
        let stream = self.connect(Channel::Control)?;
        self.control = Some(Control::new(stream));
        self.expect(|answer| matches!(answer, ToSource::Welcome { version: 1 }).then_some(()))?;
        self.sending.progress.enter(Phase::Preparing);
        let mut offer = self.source.offer().map_err(Trouble::Here)?;
        let memory = self.blocks.iter().map(|block| block.ram.len() as u64).sum();
        let policy = self.sending.policy;
        let wanted = policy.connections(memory);
        offer.connections = wanted;
        offer.postcopy = policy.may_postcopy();
        let files = if policy.local { self.files() } else { None };
        self.is_given = files.is_some();
        offer.given = self.is_given;
        self.sending
            .progress
            .update(|report| report.memory_bytes = memory);
        self.patience(PREPARE_PATIENCE.max(policy.patience))?;
        self.say(&ToDestination::Prepare(Box::new(offer)))?;
        if let Some(files) = files {
            let control = self.control.as_ref().ok_or_else(gone)?;
            control.stream.give_files(&files).map_err(WireError::from)?;
        }
        let (connections, postcopy) = self.expect(|answer| match answer {
            ToSource::Prepared {
                connections,
                postcopy,
            } => Some((*connections, *postcopy)),
            _ => None,
        })?;
        self.can_postcopy = postcopy && policy.may_postcopy();
        self.patience(policy.patience)?;
        let prepared = self.sending.journal.record(Step::Prepare);
        prepared.map_err(|error| Trouble::here("journal", error))?;
        for index in 0..connections.clamp(1, wanted) {
            let stream = self.connect(Channel::Ram { index })?;
            self.rams.push(Ram::new(stream));
        }
        let count = self.rams.len() as u16;
        self.sending
            .progress
            .update(|report| report.connections = count);
        Ok(())
    }

    /// The files of all blocks, if they have some.
    fn files(&self) -> Option<Vec<File>> {
        let file = |block: &Block| block.ram.file()?.try_clone().ok();
        self.blocks.iter().map(file).collect()
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
        let guess = self.patiently(|source| source.guess())?;
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
            self.patiently(|source| source.harvest())?;
            pending = self.take_dirty();
            let dirty = count(&pending);
            let span = harvested.elapsed();
            harvested = Instant::now();
            if self.measured.downtime(0) > self.sending.policy.max_downtime {
                // No round would change that; but what was busy when it was measured may be no longer.
                self.measure()?;
            }
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
        let speed = per_second(sent, span).max(1 << 20);
        // What little there was, or the looking for zeros, says nothing of how fast much would be;
        // but it was as fast as that.
        let pages = count(pending) * PAGE as u64;
        if sent > 1 << 20 && sent > pages / 2 || speed > self.measured.per_second {
            self.measured.per_second = speed;
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
        let every = self.sending.policy.patience / SIGNS;
        let control = self.control.as_mut().ok_or_else(gone)?;
        // The destination hears from us while a round takes its time. Whoever sends to one that does not
        // answer does not hear of it by itself.
        let sign = || heartbeat(control).inspect_err(|_| progress.close_all());
        let sent = on_all(&mut self.rams, |ram| ram.send(&work), every, sign, || ());
        let (sent, ()) = sent.map_err(|trouble| match trouble {
            _ if progress.is_canceled() => Trouble::Canceled,
            trouble => trouble,
        })?;
        work.put_back();
        Ok(sent)
    }

    /// Stops the guest and sends what is left of it. On return the destination is ready, and the
    /// guest has been given away on paper.
    fn stop(&mut self, postcopy: bool) -> Result<(), Trouble> {
        self.patiently(|source| {
            source.settle();
            Ok(())
        })?;
        self.check()?;
        let progress = self.sending.progress.clone();
        progress.enter(Phase::Stopped);
        let start = Instant::now();
        let was_paused = self.source.stop().map_err(Trouble::Here)?;
        self.stopped = Some((start, was_paused));
        self.downtime.pause_us = micros(start.elapsed());
        if self.tracking {
            self.source.harvest().map_err(Trouble::Here)?;
        }
        let round = progress.report().rounds + 1;
        let saving = Instant::now();
        let pending = if postcopy || self.is_given {
            Vec::new()
        } else {
            self.take_dirty()
        };
        self.downtime.pages = count(&pending);
        let state = if postcopy {
            progress.update(|report| report.rounds = round);
            self.tell_missing(round)?;
            self.serve_faults()?;
            self.source.save().map_err(Trouble::Here)?
        } else if self.downtime.pages <= INLINE {
            self.send_pages(round, &pending, None)?;
            self.source.save().map_err(Trouble::Here)?
        } else {
            self.send_and_save(round, &pending)?
        };
        self.downtime.save_us = micros(saving.elapsed());
        let sending = Instant::now();
        let control = self.control.as_mut().ok_or_else(gone)?;
        let message = ToDestination::State {
            round,
            postcopy,
            paused: was_paused,
        };
        control.say_with_state(&message, &state)?;
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
        let every = self.sending.policy.patience / SIGNS;
        let (control, source) = (self.control.as_mut().ok_or_else(gone)?, &mut *self.source);
        let sign = || heartbeat(control);
        let save = || source.save();
        let (_, saved) = on_all(&mut self.rams, |ram| ram.send(&work), every, sign, save)?;
        saved.map_err(Trouble::Here)
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
