//! The side from which the guest moves.

mod agree;
mod fault_server;
mod hand_over;
mod postcopy;
mod precopy;
mod stop;
#[cfg(test)]
mod tests;
mod watch;

use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

use uuid::Uuid;

use self::fault_server::FaultServer;
pub use self::hand_over::PendingAbort;
use self::stop::StopKind;
use crate::decision::Decision;
use crate::disks::{self, Contents, SourceDisk};
use crate::journal::Journal;
use crate::link::{Dial, Stream};
use crate::message::{
    self, Channel, ControlChannel, Hello, Offer, Refusal, ToDestination, ToSource,
};
use crate::pages::{BATCH, Block};
use crate::policy::{Measured, Policy};
use crate::progress::{Activity, Downtime, Phase, Progress};
use crate::sender::Ram;
use crate::threads::{in_span, within};
use crate::wire::WireError;
use crate::{KEEPALIVES, MigrationError};

/// Rounds of pages so few that threads are not worth their while.
const INLINE: u64 = 2 * BATCH as u64;

/// The machine whose guest moves away. The engine drives it: the VM starts and stops only through
/// these methods.
pub trait Source: Send {
    /// Describes the VM for the destination.
    ///
    /// # Errors
    /// The VM cannot be migrated; the text says why.
    fn offer(&mut self) -> Result<Offer, Refusal>;

    /// Returns the VM's RAM blocks, in the order of [`Offer::blocks`].
    fn blocks(&self) -> Vec<Block>;

    /// Returns the disks that are copied, in the order of [`Offer::disks`].
    fn disks(&self) -> Vec<SourceDisk> {
        Vec::new()
    }

    /// The destination can say which bases of disks it has: the offer may name them. Called before
    /// [`Source::offer`].
    fn may_offer_bases(&mut self) {}

    /// The destination has bases of these disks. Called before [`Source::start_tracking`], which then marks
    /// only those pages of the disks that are not as in the base.
    ///
    /// # Errors
    /// No base of one of them was offered.
    fn leave_out_bases(&mut self, disks: &[String]) -> Result<(), Refusal> {
        let why = format!("the destination has bases of {disks:?}, and none was offered");
        Err(Refusal::new("bases-unexpected", why))
    }

    /// Starts dirty tracking. At the start all pages of memory count as dirty, and those pages of disks
    /// that may have content.
    ///
    /// # Errors
    /// The host refuses, or the machine is gone.
    fn start_tracking(&mut self) -> Result<(), Refusal>;

    /// Ends dirty tracking.
    ///
    /// # Errors
    /// The host refuses, or the machine is gone.
    fn stop_tracking(&mut self) -> Result<(), Refusal>;

    /// Collects dirty pages from the host into the blocks' dirty bitmaps.
    ///
    /// # Errors
    /// The host refuses, or the machine is gone.
    fn harvest(&mut self) -> Result<(), Refusal>;

    /// Keeps the vCPUs out of the guest for `percent` (0 to 99) of the time.
    fn throttle(&mut self, percent: u8);

    /// Saves the device state while the guest runs, for a trial load at the destination.
    ///
    /// # Errors
    /// The state cannot be saved, or the machine is gone.
    fn dry_run(&mut self) -> Result<Vec<u8>, Refusal>;

    /// Prepares for a stop that is near: writes dirty disk caches back while the guest runs.
    fn pre_sync(&mut self);

    /// Pauses the guest.
    ///
    /// # Errors
    /// The vCPUs do not stop in time, or the machine is gone. The guest then continues.
    fn stop(&mut self) -> Result<Stopped, Refusal>;

    /// Saves vCPU and device state. The guest is paused.
    ///
    /// # Errors
    /// The state cannot be saved.
    fn save(&mut self) -> Result<Vec<u8>, Refusal>;

    /// Makes durable all that the guest wrote to its disks. The guest is paused and saved; its
    /// resources stay here.
    ///
    /// # Errors
    /// The host cannot write.
    fn flush(&mut self) -> Result<(), Refusal>;

    /// Releases the resources that only one machine may hold (image locks). Called behind the journal's
    /// [`Step::Commit`](crate::Step::Commit) and before `Commit` is sent: until then no other program can take them, however
    /// long the destination stays silent.
    ///
    /// # Errors
    /// The machine is gone.
    fn hand_over(&mut self) -> Result<(), Refusal>;

    /// Shows where the guest is while this side keeps a VM that it gave away.
    fn show(&mut self, guest: &Whereabouts);

    /// Undoes [`Source::stop`]: the guest resumes, if it ran before, and the migration continues.
    ///
    /// # Errors
    /// The vCPUs do not start, or the machine is gone.
    fn resume_copying(&mut self) -> Result<(), Refusal>;

    /// Undoes [`Source::stop`] and [`Source::hand_over`]: the guest stays here and resumes.
    ///
    /// # Errors
    /// Another process has taken a resource that was released.
    fn resume(&mut self) -> Result<(), Refusal>;

    /// Ends the machine: the guest runs at the destination.
    fn gone(&mut self);

    /// Frees the VM, or its name, for other requests. Called once, before the report shows the end: a
    /// client that sees the end may send its next request at once.
    fn ended(&mut self, outcome: &Outcome);
}

/// A guest that was paused.
#[derive(Clone, Copy, Debug)]
pub struct Stopped {
    /// Its owner had paused it before: it stays paused at the destination.
    pub was_paused: bool,
    /// When its clocks were read. The destination adds the time since then, and no more: a value
    /// that is read after the stop began contains a part of the stop already.
    pub clocks_at: Instant,
}

impl Stopped {
    /// Whether the guest does not run when it has arrived.
    fn stays_paused(self, policy: &Policy) -> bool {
        self.was_paused || !policy.resume
    }
}

/// The place of a guest after the commit, as far as the source knows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Whereabouts {
    /// The destination has not said yet whether the guest runs there.
    Unknown,
    /// The guest runs at the destination, and pages of it are still here.
    AtDestination,
    /// The guest ran at the destination, which cannot be reached: it waits there for the pages that
    /// are still here, or it is lost with that side.
    OutOfReach(Refusal),
}

/// Parameters of an outgoing migration.
pub struct Sending<'a> {
    /// Identifies the migration in messages, journals and logs.
    pub id: Uuid,
    /// Limits and modes.
    pub policy: &'a Policy,
    /// Connects to the destination.
    pub dial: &'a dyn Dial,
    /// Records the steps of the hand-over.
    pub journal: &'a mut dyn Journal,
    /// Receives the progress report.
    pub progress: &'a Progress,
    /// Carries cancel requests and resolutions.
    pub decision: &'a Decision,
}

/// The result of an outgoing migration.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The guest runs at the destination, or has ended there as guests do.
    Moved,
    /// The guest ran at the destination and ended there before all of it had come. The copy here is old
    /// and never runs.
    Lost(Refusal),
    /// The guest continues here.
    Stayed {
        /// The reason.
        why: Refusal,
        /// A notice that the destination has not received yet.
        pending_abort: Option<PendingAbort>,
    },
}

/// Migrates a guest. Returns once it is certain at which side the guest runs.
pub fn send(mut sending: Sending<'_>, source: &mut dyn Source) -> Outcome {
    let progress = sending.progress.clone();
    let mut engine = Engine {
        blocks: source.blocks(),
        disks: source.disks(),
        sending: &mut sending,
        source,
        control: None,
        rams: Vec::new(),
        tracking: false,
        stopped: None,
        state_sent: None,
        measured: Measured::default(),
        downtime: Downtime::default(),
        version: 0,
        can_postcopy: false,
        is_given: false,
        verify: false,
        faults: None,
        fault_server: None,
        begun: Instant::now(),
        throttle: 0,
    };
    // An error here means that no `Commit` was sent: the guest is still this side's. Behind
    // `Commit` only the destination or an operator can say where it runs.
    let ended = catch_unwind(AssertUnwindSafe(|| {
        let outcome = match engine.until_commit_or_panic() {
            Ok(()) => engine.after_commit(),
            Err(error) => engine.stay(error),
        };
        engine.source.ended(&outcome);
        outcome
    }));
    let outcome = ended.unwrap_or_else(|panic| {
        // Where the guest runs is not known here. The report must not show for ever that it moves.
        progress.update(|report| {
            report.phase = Phase::Failed;
            report.error = Some(panicked().refusal());
        });
        sending.decision.release_connections();
        resume_unwind(panic)
    });
    progress.update(|report| match &outcome {
        Outcome::Moved => report.phase = Phase::Completed,
        Outcome::Lost(why) => {
            report.phase = Phase::Failed;
            report.error = Some(why.clone());
        }
        Outcome::Stayed { why, .. } => {
            report.phase = if why.code == "canceled" {
                Phase::Canceled
            } else {
                Phase::Failed
            };
            report.error = Some(why.clone());
        }
    });
    // Each closer holds a duplicate of its socket's descriptor. While one lives, the connection
    // stays open, and the destination does not see its end.
    sending.decision.release_connections();
    outcome
}

struct Engine<'a, 'b> {
    sending: &'a mut Sending<'b>,
    source: &'a mut dyn Source,
    blocks: Vec<Block>,
    /// The disks that are copied.
    disks: Vec<SourceDisk>,
    control: Option<ControlChannel>,
    rams: Vec<Ram>,
    tracking: bool,
    /// When the stop began, and the guest that is stopped.
    stopped: Option<(Instant, Stopped)>,
    /// When the state was sent: the destination may be ready since then. `None` again with `Commit`.
    state_sent: Option<Instant>,
    measured: Measured,
    downtime: Downtime,
    /// The version of the protocol that both sides speak.
    version: u32,
    /// The destination supports postcopy.
    can_postcopy: bool,
    /// The destination has the memory's file descriptors (local migration without a copy).
    is_given: bool,
    /// The destination compares hashes of all pages.
    verify: bool,
    /// The faults channel; set from before the stop until its server has it.
    faults: Option<Box<dyn Stream>>,
    /// Serves page faults of the destination; set from when postcopy starts.
    fault_server: Option<FaultServer>,
    /// When the copy began: the deadline counts from here.
    begun: Instant,
    /// How much of the time the vCPUs are kept from running, in percent.
    throttle: u8,
}

/// Opens a connection and sends its `Hello`.
fn dial_channel(
    dial: &dyn Dial,
    patience: Duration,
    hello: &Hello,
) -> Result<Box<dyn Stream>, MigrationError> {
    let dialed = dial.dial();
    let mut stream = dialed.map_err(|error| MigrationError::here("unreachable", error))?;
    stream.set_patience(patience).map_err(WireError::from)?;
    let closer = stream.closer().map_err(WireError::from)?;
    // With TLS the first write waits for the other side, which may answer byte by byte.
    let greet = || message::send_hello(&mut *stream, hello);
    within(patience, &closer, greet)
        .map_err(|error| MigrationError::here("host-refused", error))??;
    Ok(stream)
}

fn disconnected() -> MigrationError {
    MigrationError::Wire(WireError::Closed)
}

fn panicked() -> MigrationError {
    MigrationError::here("internal", "the migration engine panicked")
}

impl Engine<'_, '_> {
    /// Everything before the commit point; a panic is a failure like any other, as no `Commit` was sent.
    fn until_commit_or_panic(&mut self) -> Result<(), MigrationError> {
        catch_unwind(AssertUnwindSafe(|| self.until_commit())).unwrap_or_else(|_| Err(panicked()))
    }

    fn connect(&self, channel: Channel) -> Result<Box<dyn Stream>, MigrationError> {
        let sending = &self.sending;
        let hello = Hello::new(sending.id, channel);
        let stream = dial_channel(sending.dial, sending.policy.patience, &hello)?;
        // A cancel unblocks whatever waits for the destination. The control channel can still carry
        // the reason: without it, the destination would see a lost connection.
        let closer = match channel {
            Channel::Control | Channel::Again => stream.read_closer(),
            Channel::Ram { .. } | Channel::Faults => stream.closer(),
        };
        let closer = closer.map_err(WireError::from)?;
        sending.decision.close_on_cancel(closer);
        Ok(stream)
    }

    fn send(&mut self, message: &ToDestination) -> Result<(), MigrationError> {
        Ok(self
            .control
            .as_mut()
            .ok_or_else(disconnected)?
            .send(message)?)
    }

    /// Receives one message, all of it within one `patience`.
    fn recv_in_time(&mut self) -> Result<ToSource, MigrationError> {
        let patience = self.sending.policy.patience;
        let control = self.control.as_mut().ok_or_else(disconnected)?;
        let closer = control.stream.closer().map_err(WireError::from)?;
        let received = within(patience, &closer, || control.recv());
        Ok(received.map_err(|error| MigrationError::here("host-refused", error))??)
    }

    /// Receives the destination's next answer; skips `Busy`.
    fn recv(&mut self) -> Result<ToSource, MigrationError> {
        loop {
            match self.control.as_mut().ok_or_else(disconnected)?.recv()? {
                ToSource::Refused(why) => return Err(MigrationError::There(why)),
                ToSource::Busy => self.check()?,
                other => return Ok(other),
            }
        }
    }

    /// Receives one answer, which `pick` must accept.
    fn expect<T>(
        &mut self,
        pick: impl FnOnce(&ToSource) -> Option<T>,
    ) -> Result<T, MigrationError> {
        let answer = self.recv()?;
        pick(&answer).ok_or_else(|| {
            WireError::damaged(format!("{answer:?} is not the expected answer")).into()
        })
    }

    fn check(&self) -> Result<(), MigrationError> {
        if self.sending.decision.is_canceled() {
            Err(MigrationError::Canceled)
        } else {
            Ok(())
        }
    }

    fn ping(&mut self) -> Result<Duration, MigrationError> {
        let start = Instant::now();
        self.send(&ToDestination::Ping(0))?;
        self.expect(|answer| matches!(answer, ToSource::Pong(0)).then_some(()))?;
        Ok(start.elapsed())
    }

    /// Runs `work` on the machine in a thread, and sends keepalives until it is done.
    fn with_keepalive<R: Send>(
        &mut self,
        work: impl FnOnce(&mut dyn Source) -> Result<R, Refusal> + Send,
    ) -> Result<R, MigrationError> {
        let every = self.sending.policy.patience / KEEPALIVES;
        let (control, source) = (
            self.control.as_mut().ok_or_else(disconnected)?,
            &mut *self.source,
        );
        // The work may take longer than `patience`, and silence counts as a lost connection. Every
        // return below joins the worker, so the engine never uses the machine beside it. The price:
        // a lost connection ends the migration only when the work is done.
        thread::scope(|scope| {
            let (done, results) = mpsc::channel();
            let worker = move || {
                // The receiver waits for it, unless the destination is gone.
                let _ = done.send(work(source));
            };
            let started = thread::Builder::new().spawn_scoped(scope, in_span(worker));
            started.map_err(|error| MigrationError::here("host-refused", error))?;
            loop {
                match results.recv_timeout(every) {
                    Ok(result) => return result.map_err(MigrationError::Here),
                    Err(RecvTimeoutError::Timeout) => keepalive(control)?,
                    // Only a panic drops the sender unused. The scope raises it again at its end.
                    Err(RecvTimeoutError::Disconnected) => return Err(disconnected()),
                }
            }
        })
    }

    /// Everything before the commit point.
    fn until_commit(&mut self) -> Result<(), MigrationError> {
        self.check()?;
        self.prepare()?;
        let progress = self.sending.progress.clone();
        if self.is_given {
            // The destination has the memory itself: no rounds.
            progress.begin(Activity::Trial);
            self.measure()?;
            return self.stop(StopKind::Final).map(|_| ());
        }
        progress.begin(Activity::Track);
        // Set first: if tracking starts only in part, `stay` still has to end it.
        self.tracking = true;
        self.with_keepalive(|source| {
            source.start_tracking()?;
            // The first harvest reports all pages as dirty again. Take it now, so that the first
            // round does not send them twice.
            source.harvest()
        })?;
        self.forget_unpopulated();
        progress.begin(Activity::Trial);
        self.measure()?;
        self.begun = Instant::now();
        // Disks first: they are larger than memory, of which the guest would write the most again
        // meanwhile.
        self.copy_disks()?;
        self.copy_and_stop()
    }

    /// Takes the marks of pages for which the host has no memory: they are zeros, as all memory of a
    /// new machine is at the destination.
    ///
    /// Not in a later round. A page that the guest gave back since then is without memory too, and the
    /// destination has its old content.
    fn forget_unpopulated(&self) {
        for block in &self.blocks {
            // In this order: a page that a device or the guest writes from here on is marked again,
            // and what was written before has memory.
            let mut pages = block.ram.dirty().take();
            block.ram.remove_unpopulated(&mut pages);
            block.ram.dirty().put_back(&pages);
        }
    }

    /// Whether blocks of disks may come after the guest, where pages of its memory do.
    fn disks_can_follow(&self) -> bool {
        self.can_postcopy && self.version >= disks::FOLLOW_VERSION
    }

    /// The content that is sent in pages.
    fn contents(&self) -> Contents<'_> {
        Contents {
            blocks: &self.blocks,
            disks: &self.disks,
        }
    }

    fn patience(&self, patience: Duration) -> Result<(), MigrationError> {
        let control = self.control.as_ref().ok_or_else(disconnected)?;
        let set = control.stream.set_patience(patience);
        set.map_err(|error| MigrationError::Wire(error.into()))
    }

    /// Measures the parts of the stop: round trip, and a trial save and load of the devices.
    fn measure(&mut self) -> Result<(), MigrationError> {
        // The least of three: a busy CPU only ever adds to a round trip.
        let round_trips = [self.ping()?, self.ping()?, self.ping()?];
        self.measured.round_trip = round_trips.into_iter().min().unwrap_or_default();
        let start = Instant::now();
        let state = self.with_keepalive(|source| source.dry_run())?;
        self.measured.save = start.elapsed();
        let control = self.control.as_mut().ok_or_else(disconnected)?;
        control.send_with_state(&ToDestination::Guess, &state)?;
        let us = self.expect(|answer| match answer {
            ToSource::GuessLoaded { us } => Some(*us),
            _ => None,
        })?;
        self.measured.load = Duration::from_micros(us);
        Ok(())
    }
}

fn keepalive(control: &mut ControlChannel) -> Result<(), MigrationError> {
    control.send(&ToDestination::Ping(1))?;
    // No other request is open when this runs, so only `Pong` is in order, not even `Busy`.
    match control.recv()? {
        ToSource::Pong(1) => Ok(()),
        ToSource::Refused(why) => Err(MigrationError::There(why)),
        other => Err(WireError::damaged(format!("{other:?} is not a keepalive answer")).into()),
    }
}
