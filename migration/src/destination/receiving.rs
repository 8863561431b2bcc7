//! Memory and device state arrive; the guest runs at the source.

use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

use uuid::Uuid;

use super::channels::Channels;
use super::deciding::Ready;
use super::postcopy::PostcopyReceiver;
use super::slots::Arrived;
use super::{Destination, Failed, POLLS, Session, answer_ping};
use crate::journal::{Journal, Step};
use crate::message::{ControlChannel, Refusal, ToDestination, ToSource};
use crate::progress::{Activity, Phase, Report, micros};
use crate::threads::in_span;
use crate::wire::WireError;
use crate::{ATTEMPTS, KEEPALIVES, MigrationError, STALL};

/// A guest that is coming: its machine, its journal and its channels. Dropping it discards the
/// machine, unless [`Guest::keep`] was called.
pub(super) struct Guest<'a> {
    pub(super) session: &'a Session<'a>,
    pub(super) id: Uuid,
    pub(super) target: Box<dyn Destination>,
    pub(super) journal: Box<dyn Journal>,
    pub(super) channels: Channels,
    is_kept: bool,
}

impl<'a> Guest<'a> {
    pub(super) fn new(
        session: &'a Session<'a>,
        id: Uuid,
        target: Box<dyn Destination>,
        journal: Box<dyn Journal>,
        channels: Channels,
    ) -> Self {
        Self {
            session,
            id,
            target,
            journal,
            channels,
            is_kept: false,
        }
    }

    /// The guest is whole and runs here: nothing discards it any more.
    pub(super) fn keep(mut self) {
        self.is_kept = true;
    }

    /// The guest does not come: ends its machine before the source hears of it.
    pub(super) fn discard(&mut self) {
        // At most once: failures end the machine before they answer the source, and `drop` follows.
        if !std::mem::replace(&mut self.is_kept, true) {
            self.target.discard();
        }
    }

    /// Ends a guest that runs here and cannot get the rest of its memory.
    pub(super) fn fail(&mut self, why: &Refusal) {
        if !std::mem::replace(&mut self.is_kept, true) {
            self.target.fail(why);
        }
    }

    pub(super) fn record_aborted(&mut self) {
        if let Err(error) = self.journal.record(Step::Aborted) {
            // The step before, `Ready`, says as well that the guest never ran here.
            tracing::warn!(migration = %self.id, %error, "cannot write a journal");
        }
    }

    pub(super) fn postcopy(&self) -> Option<&PostcopyReceiver> {
        self.channels.memory.receiver.get()
    }
}

impl Drop for Guest<'_> {
    fn drop(&mut self) {
        // Before `channels` is dropped, which ends the wait for missing pages: no vCPU and no device
        // may run when zeros appear in their places.
        self.discard();
    }
}

/// A source that may send memory and state.
pub(super) struct Receiving<'a> {
    guest: Guest<'a>,
    control: ControlChannel,
    advance: Advance,
}

/// How far the guest has come, and until when more of it must come. Pings do not count: a source that
/// sends nothing else would hold the endpoint and the machine for as long as it likes.
struct Advance {
    /// Bytes and hashes of pages, and rounds.
    seen: (u64, u32),
    until: Instant,
}

impl Advance {
    /// Extends the source's time by `limit` if more of the guest has arrived.
    fn look(&mut self, report: &Report, limit: Duration) {
        let (pages, rounds) = (arrived(report), report.rounds);
        if pages > self.seen.0 || rounds > self.seen.1 {
            // The largest so far: numbers that go up and down again are no advance.
            self.seen = (pages.max(self.seen.0), rounds.max(self.seen.1));
            self.until = Instant::now() + limit;
        }
    }
}

/// A number that grows as pages, or hashes of them, arrive.
fn arrived(report: &Report) -> u64 {
    report.sent_bytes.saturating_add(report.verified_pages)
}

impl<'a> Receiving<'a> {
    pub(super) fn new(guest: Guest<'a>, control: ControlChannel) -> Self {
        let advance = Advance {
            seen: (0, 0),
            until: Instant::now() + guest.session.patience * STALL,
        };
        Self {
            guest,
            control,
            advance,
        }
    }

    /// Receives something on the control channel. Fails when no more of the guest came for too long.
    fn recv<T>(
        &mut self,
        recv: impl FnOnce(&mut ControlChannel) -> Result<T, WireError>,
    ) -> Result<T, MigrationError> {
        let session = self.guest.session;
        let limit = session.patience * STALL;
        self.advance.look(&session.progress.report(), limit);
        let until = self.advance.until;
        // The read timeout of the stream does not suffice: every byte restarts it. Only reading ends,
        // so that the source can still be sent the reason.
        let closer = self.control.stream.read_closer();
        let closer = closer.map_err(|error| MigrationError::Wire(error.into()))?;
        session
            .router
            .set_timer(session.id.get(), Some((until, closer)));
        let received = recv(&mut self.control);
        // What this side does with it is no time of the source's.
        session.router.set_timer(session.id.get(), None);
        self.advance.look(&session.progress.report(), limit);
        if self.advance.until <= Instant::now() {
            let why = format!(
                "the source sent no memory and no state of the guest for {} s",
                limit.as_secs()
            );
            return Err(MigrationError::here("source-stalled", why));
        }
        Ok(received?)
    }

    /// Receives memory and device state until the guest could run here.
    pub(super) fn run(mut self) -> Result<Ready<'a>, Failed> {
        match self.until_loaded() {
            Ok((since, paused, load_us)) => {
                let Self { guest, control, .. } = self;
                Ok(Ready::new(guest, control, since, paused, load_us))
            }
            Err(error) => {
                let error = self.explain(error);
                let why = match &error {
                    MigrationError::Here(why) => why.clone(),
                    other => other.refusal(),
                };
                // So that both users see the reason. A source that does not hear it sees that the
                // connection ends, and lets its guest run on: the commit point has not come.
                let _ = self.control.send(&ToSource::Refused(why));
                self.guest.record_aborted();
                Err(error.into())
            }
        }
    }

    /// Finds the reason why connections ended: a cancel here, or what the source says of it.
    fn explain(&mut self, error: MigrationError) -> MigrationError {
        match error {
            // First, because a cancel closes connections: any error below may be its consequence.
            _ if self.guest.session.decision.is_canceled() => MigrationError::Canceled,
            // That ended the wait for the source, which does not know it yet.
            MigrationError::Wire(_) if let Err(failed) = self.guest.check_disks() => failed,
            MigrationError::Wire(error) => match self.last_words() {
                Some(why) => MigrationError::There(why),
                None => MigrationError::Wire(error),
            },
            other => other,
        }
    }

    /// Returns why the source ended the migration, if it says so: one that closes its channels for
    /// pages sends an `Abort` right behind that.
    fn last_words(&mut self) -> Option<Refusal> {
        let session = self.guest.session;
        // The migration has failed already. A source must not delay the report by a whole `patience`
        // more, whatever it sends.
        let until = Instant::now() + session.patience / ATTEMPTS;
        loop {
            match session.recv_until(&mut self.control, until).ok()? {
                ToDestination::Abort(why) => return Some(why),
                // Sent before.
                ToDestination::Ping(_) | ToDestination::Round(_) => {}
                _ => return None,
            }
        }
    }

    /// Returns since when the guest is paused at the source, whether its owner had paused it, and how
    /// long the load took.
    fn until_loaded(&mut self) -> Result<(Instant, bool, u64), MigrationError> {
        let disks = &self.guest.channels.memory.disks;
        if !disks.are_none() {
            let closer = self.control.stream.read_closer();
            disks.fail_by(closer.map_err(|error| MigrationError::Wire(error.into()))?);
        }
        self.wait_channels()?;
        loop {
            match self.recv(ControlChannel::recv)? {
                ToDestination::Round(round) => {
                    self.guest.wait_round(round, &mut self.control)?;
                    // Each round for itself, so that little is left to write in the stop.
                    let took = self.guest.sync_disks(&mut self.control)?;
                    // Time of this side, not of the source.
                    self.advance.until += took;
                    let progress = self.guest.session.progress;
                    progress.update(|report| report.rounds = round);
                    progress.begin(Activity::Round);
                    let report = progress.report();
                    tracing::info!(
                        migration = %self.guest.id,
                        round,
                        pages = report.pages,
                        zero_pages = report.zero_pages,
                        bytes = report.sent_bytes,
                        "migration: a round arrived"
                    );
                    // The source sends nothing of the next round before this answer. A page may
                    // then come over another channel, where no older copy can arrive behind it.
                    self.control.send(&ToSource::RoundDone(round))?;
                }
                ToDestination::Guess => {
                    let state = self.recv(ControlChannel::recv_state)?;
                    self.guest.session.progress.begin(Activity::Trial);
                    let start = Instant::now();
                    // The guest still runs at the source. A state that this host cannot load should
                    // fail here, where it costs no downtime.
                    let loaded = self.guest.target.dry_run(&state);
                    loaded.map_err(MigrationError::Here)?;
                    // Time of this side. Loading is no advance: a source can ask for it for ever.
                    self.advance.until += start.elapsed();
                    let us = micros(start.elapsed());
                    self.guest.session.progress.begin(Activity::Round);
                    self.control.send(&ToSource::GuessLoaded { us })?;
                }
                ToDestination::State {
                    round,
                    postcopy,
                    paused,
                } => return self.load(round, postcopy, paused),
                other => answer_ping(&mut self.control, &other)?,
            }
        }
    }

    fn load(
        &mut self,
        round: u32,
        postcopy: bool,
        paused: bool,
    ) -> Result<(Instant, bool, u64), MigrationError> {
        let session = self.guest.session;
        // `Commit` brings the time that the source measured. This one is for an operator who
        // decides while the source is lost.
        let since = Instant::now();
        session.progress.enter(Phase::Stopped);
        session.progress.begin(Activity::Save);
        let state = self.recv(ControlChannel::recv_state)?;
        // Devices read guest memory in `load`, so the last round has to be complete. Also no RAM
        // thread may write to memory plainly once `expect_postcopy` registers it with userfaultfd.
        self.guest.wait_round(round, &mut self.control)?;
        self.guest.channels.memory.check_all_compared()?;
        // The source may give the guest away as soon as this side is ready: then its disks must
        // survive this host.
        let disks = &self.guest.channels.memory.disks;
        disks.end();
        let awaited = disks.expect();
        if awaited.is_some() && !postcopy {
            let why = "blocks of disks follow a guest only where pages of its memory may, too";
            return Err(WireError::damaged(why).into());
        }
        self.guest.sync_disks(&mut self.control)?;
        session.progress.begin(Activity::Load);
        let start = Instant::now();
        if let Some(awaited) = awaited {
            // Before the devices are loaded: no queue of a disk may start without it.
            let expected = self.guest.target.await_blocks(&awaited);
            expected.map_err(MigrationError::Here)?;
            self.guest.channels.memory.disks.report(session.progress);
        }
        if postcopy {
            self.expect_postcopy()?;
        }
        let loaded = self.guest.target.load(&state);
        // First: the memory of such a guest is lost, of which a load may complain.
        if let Some(why) = self.guest.postcopy().and_then(PostcopyReceiver::failure) {
            return Err(MigrationError::Here(why));
        }
        loaded.map_err(MigrationError::Here)?;
        // The devices read guest memory while they were loaded. Where a page that they touched did not
        // come, they read zeros, and what was loaded is worth nothing.
        if self.guest.postcopy().is_some_and(|one| !one.is_whole()) {
            return Err(WireError::Closed.into());
        }
        let load_us = micros(start.elapsed());
        // The commit point of this side. Before it, a cancel here is as good as one at the source. From
        // here on the source alone decides: it may have sent `Commit` as soon as it can have heard
        // `Ready`, so that a destination that changed its mind could end the only copy.
        if !session.decision.commit() {
            return Err(MigrationError::Canceled);
        }
        // On disk before `Ready` is sent: the source may commit as soon as it hears that.
        let written = self.guest.journal.record(Step::Ready);
        written.map_err(|error| MigrationError::here("journal", error))?;
        tracing::info!(
            migration = %self.guest.id,
            load_us,
            postcopy,
            "migration: the guest can run here, the source decides"
        );
        Ok((since, paused, load_us))
    }

    /// Waits until all RAM channels are there, which the source makes next.
    fn wait_channels(&mut self) -> Result<(), MigrationError> {
        self.guest.wait_channels().and_then(|again| match again {
            // A source asks only once this side was ready.
            Some(_) => Err(WireError::damaged(
                "unexpected reconnect of a source: the destination was not ready yet",
            )
            .into()),
            None => Ok(()),
        })
    }

    /// Prepares the memory for a guest that runs here before all its pages are there.
    ///
    /// The order matters. The pages that the source announced as missing are discarded, whatever an
    /// earlier round brought: the guest has written them since. The faults of the memory are watched
    /// before the devices are loaded, because the load itself reads guest memory (queues, tables) and
    /// must get the pages from the source, not zeros. For that the faults channel has to be connected:
    /// this side asks over it from the first access on.
    fn expect_postcopy(&mut self) -> Result<(), MigrationError> {
        let guest = &mut self.guest;
        let patience = guest.session.patience;
        let deadline = Instant::now() + patience;
        let ask = loop {
            if let Some(ask) = guest.channels.take_faults() {
                break ask;
            }
            guest.take_arrivals(patience / POLLS)?;
            if guest.session.decision.is_canceled() {
                return Err(MigrationError::Canceled);
            }
            if Instant::now() > deadline {
                return Err(WireError::Silent.into());
            }
        };
        let memory = &guest.channels.memory;
        let missing = std::mem::take(&mut *memory.missing.lock());
        let halt = guest.target.halter();
        let receiver = PostcopyReceiver::new(&memory.blocks, missing, ask, patience, halt)
            .map_err(|error| MigrationError::here("no-postcopy", error))?;
        // From here on the RAM threads fill pages through userfaultfd. The watch thread may start
        // later: until it reads, faults queue in the descriptor.
        if memory.receiver.set(receiver).is_ok() {
            guest.channels.watch_faults()?;
            if guest.channels.memory.disks.left() > 0 {
                guest.channels.ask_for_blocks()?;
            }
        }
        Ok(())
    }
}

impl Guest<'_> {
    /// Waits until all RAM channels are there. Returns the connection of a source that asks instead:
    /// it has given these channels up.
    pub(super) fn wait_channels(&mut self) -> Result<Option<ControlChannel>, MigrationError> {
        let patience = self.session.patience;
        // One limit for all channels together: a source must not extend it by one channel at a
        // time.
        let deadline = Instant::now() + patience;
        while !self.channels.are_connected() {
            let again = self.take_arrivals(patience / POLLS)?;
            if again.is_some() {
                return Ok(again);
            }
            if self.session.decision.is_canceled() {
                return Err(MigrationError::Canceled);
            }
            if Instant::now() > deadline {
                return Err(WireError::Silent.into());
            }
        }
        Ok(None)
    }

    /// Serves connections that have arrived. Returns that of a source that asks how its migration stands.
    pub(super) fn take_arrivals(
        &mut self,
        patience: std::time::Duration,
    ) -> Result<Option<ControlChannel>, MigrationError> {
        let mut wait = patience;
        while let Some(arrived) = self.session.router.next(self.session.id.get(), wait) {
            // Only the first wait blocks. A flow of connections must not keep the caller from its
            // deadline.
            wait = std::time::Duration::ZERO;
            match arrived {
                Arrived::Ram(index, stream) => {
                    let closer = self.channels.start(index, stream)?;
                    self.session.decision.close_on_cancel(closer);
                }
                Arrived::Faults(stream) => {
                    self.channels.set_faults(stream, self.session.patience);
                }
                Arrived::Again(stream) => return Ok(Some(self.session.adopt(stream)?)),
            }
        }
        Ok(None)
    }

    /// Fails if the storage of a disk did.
    fn check_disks(&self) -> Result<(), MigrationError> {
        let failure = self.channels.memory.disks.failure();
        failure.map_or(Ok(()), |why| Err(MigrationError::Here(why)))
    }

    /// Makes durable all that arrived of disks. Storage may take longer than the source's patience:
    /// meanwhile the source hears that this side lives. Returns how long it took.
    pub(super) fn sync_disks(
        &self,
        control: &mut ControlChannel,
    ) -> Result<Duration, MigrationError> {
        let every = self.session.patience / KEEPALIVES;
        let disks = &self.channels.memory.disks;
        if disks.are_none() {
            return Ok(Duration::ZERO);
        }
        thread::scope(|scope| {
            let (done, results) = mpsc::channel();
            let sync = move || {
                // The receiver waits, unless the source is gone.
                let _ = done.send(disks.sync());
            };
            let started = thread::Builder::new().spawn_scoped(scope, in_span(sync));
            started.map_err(|error| MigrationError::here("host-refused", error))?;
            loop {
                match results.recv_timeout(every) {
                    Ok(synced) => return synced.map_err(MigrationError::Here),
                    Err(RecvTimeoutError::Timeout) => control.send(&ToSource::Busy)?,
                    Err(RecvTimeoutError::Disconnected) => {
                        let why = "a thread that syncs disks panicked";
                        return Err(MigrationError::here("internal", why));
                    }
                }
            }
        })
    }

    /// Waits until each RAM channel has ended this round. A slow network that holds much in flight may
    /// take long: as long as pages come, the source hears that they do.
    pub(super) fn wait_round(
        &mut self,
        round: u32,
        control: &mut ControlChannel,
    ) -> Result<(), MigrationError> {
        let patience = self.session.patience;
        let arrived = || arrived(&self.session.progress.report());
        let (mut last, mut since, mut told) = (arrived(), Instant::now(), Instant::now());
        while !self.channels.wait_end(round, patience / POLLS)? {
            if self.session.decision.is_canceled() {
                return Err(MigrationError::Canceled);
            }
            if self.postcopy().is_some_and(PostcopyReceiver::is_lost) {
                // The VM was ended here, and needs none of what the source goes on to send.
                return Err(WireError::Closed.into());
            }
            self.check_disks()?;
            let now = arrived();
            if now != last {
                (last, since) = (now, Instant::now());
            }
            // RAM channels have a read timeout of an hour, so this is where a stalled one is
            // noticed.
            if since.elapsed() > patience {
                return Err(WireError::Silent.into());
            }
            // Pings are not answered during this wait. Without a sign of life the source would give
            // up after its own `patience`.
            if told.elapsed() > patience / KEEPALIVES {
                told = Instant::now();
                control.send(&ToSource::Busy)?;
            }
        }
        self.check_disks()?;
        let memory = &self.channels.memory;
        let checked = memory.findings.check(&memory.blocks);
        checked.map_err(MigrationError::Here)
    }
}
