//! Accepts connections and routes each of them by migration and channel.
//!
//! A peer is a stranger until it has made an offer that this host accepts, so everything before that
//! is bounded: the number of connections, the bytes that one may send, and the time that it may take.
//! Behind that, each channel of a migration in progress has one slot. A connection that fits no slot
//! is answered and closed at once: no queue of connections exists that a peer could fill.

use std::fs::File;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread::{self, Scope};
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};
use uuid::Uuid;

use super::slots::{Arrived, Slots, no_slot};
use super::{Fate, answer_ping, busy, refuse};
use crate::MigrationError;
use crate::link::{Accept, Closer, Stream};
use crate::message::{self, Channel, ControlChannel, Offer, Refusal, ToDestination, ToSource};
use crate::progress::{Phase, Progress};
use crate::threads::in_span;
use crate::wire::WireError;

/// How long a peer may take to say which connection this is, since it connected.
const HELLO_LIMIT: Duration = Duration::from_secs(5);
/// How long a source may take to send its offer, since it connected.
const OFFER_LIMIT: Duration = Duration::from_secs(20);
/// How long an offer may wait for an earlier one to be examined.
const QUEUE_LIMIT: Duration = Duration::from_secs(60);

/// Pending connections of one endpoint.
pub(super) const MAX_PENDING: usize = 64;
/// Connections that lose their places together. Their threads end side by side, so that a flood is
/// worked off faster than one at a time.
const EVICTED: usize = 8;
/// Pending connections of all endpoints that share a [`ConnectionLimit`].
const MAX_PENDING_IN_ALL: usize = 256;
/// Pending connections that an endpoint may have even if the others use up the limit of all.
const GUARANTEED: usize = 8;
/// Offers that wait for an earlier one to be examined.
const MAX_OFFERS: usize = 8;

/// The limit of pending connections that several waits for a guest share: descriptors belong to the
/// process, not to one endpoint.
#[derive(Debug, Default)]
pub struct ConnectionLimit(AtomicUsize);

/// An offer of a guest, from a source that waits for the answer.
pub(super) struct Offered {
    number: u64,
    pub(super) id: Uuid,
    pub(super) control: ControlChannel,
    pub(super) offer: Box<Offer>,
    pub(super) files: Vec<File>,
}

/// A connection that is not a channel of a migration yet.
struct Pending {
    number: u64,
    until: Instant,
    closer: Closer,
    stage: Stage,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Stage {
    Greeting,
    /// Its offer waits in the queue.
    Queued,
    /// Closed; its thread is about to notice.
    Closed,
}

#[derive(Default)]
struct Table {
    /// No more connections are accepted. Those that are pending may still bring an offer.
    is_over: bool,
    /// No more offers are taken.
    has_ended: bool,
    pending: Vec<Pending>,
    offers: Vec<Offered>,
    /// The migrations in progress, each with its own number.
    slots: Vec<Slots>,
}

impl Table {
    fn slots(&mut self, id: Uuid) -> Option<&mut Slots> {
        self.slots.iter_mut().find(|slots| slots.id == id)
    }

    /// Whether no offer may be made: as many migrations are in progress as may be at once.
    fn is_taken(&self, at_once: usize) -> bool {
        self.slots.iter().filter(|slots| !slots.lingers).count() >= at_once
    }
}

pub(super) struct Router<'a> {
    /// Knows the outcomes of earlier migrations.
    fate: &'a (dyn Fn(Uuid) -> Fate + Sync),
    /// Migrations that may be in progress at once.
    at_once: usize,
    progress: &'a Progress,
    limit: &'a ConnectionLimit,
    table: Mutex<Table>,
    changed: Condvar,
}

/// Frees the place of a connection when its thread ends, by a panic too.
struct Place<'a> {
    router: &'a Router<'a>,
    number: u64,
}

impl Drop for Place<'_> {
    fn drop(&mut self) {
        let mut table = self.router.table.lock();
        // The place of an offer in the queue is freed with the offer.
        let is_ours = |one: &Pending| one.number == self.number && one.stage != Stage::Queued;
        self.router.forget(&mut table, is_ours);
    }
}

impl<'a> Router<'a> {
    pub(super) fn new(
        fate: &'a (dyn Fn(Uuid) -> Fate + Sync),
        at_once: usize,
        progress: &'a Progress,
        limit: &'a ConnectionLimit,
    ) -> Self {
        Self {
            fate,
            at_once,
            progress,
            limit,
            table: Mutex::default(),
            changed: Condvar::new(),
        }
    }

    /// Accepts connections until [`Router::end`]; each is read on a thread of its own until it is
    /// known where it belongs.
    pub(super) fn accept<'scope>(
        &'scope self,
        scope: &'scope Scope<'scope, '_>,
        accept: &mut dyn Accept,
        tick: Duration,
    ) {
        for number in 0.. {
            if !self.keep_time() {
                break;
            }
            let stream = match accept.accept(tick) {
                Ok(Some(stream)) => stream,
                Ok(None) => continue,
                Err(error) if is_passing(&error) => {
                    tracing::warn!(%error, "cannot accept a connection now");
                    // The connection stays in the backlog, so the next `accept` would fail at once,
                    // too.
                    thread::sleep(tick);
                    continue;
                }
                Err(error) => {
                    tracing::warn!(%error, "cannot accept any more connections");
                    break;
                }
            };
            if !self.admit(number, &*stream, tick) {
                continue;
            }
            let place = Place {
                router: self,
                number,
            };
            let greeting = move || {
                // Move the whole value: a closure captures only the fields that it names, and `Drop` would
                // run early.
                let place = place;
                let router = place.router;
                let greeted = catch_unwind(AssertUnwindSafe(|| router.greet(number, stream)));
                // A panic over what a stranger sent ends that connection, and has been logged.
                if let Ok(Err(why)) = greeted {
                    router.report_stranger(&why);
                }
            };
            // On failure the closure is dropped with its `Place`, which frees the slot.
            if let Err(error) = thread::Builder::new().spawn_scoped(scope, in_span(greeting)) {
                tracing::warn!(%error, "cannot serve a connection now");
            }
        }
        self.table.lock().is_over = true;
        self.changed.notify_all();
    }

    /// Closes what takes too long, until the last migration in progress has ended: also when no connection
    /// can be accepted any more, or the wait for guests was called off.
    pub(super) fn keep_time_to_the_end(&self, tick: Duration) {
        loop {
            self.keep_time();
            let mut table = self.table.lock();
            if table.has_ended && table.slots.is_empty() {
                return;
            }
            self.changed.wait_for(&mut table, tick);
        }
    }

    /// Closes what has taken too long. False once no more connections are accepted.
    fn keep_time(&self) -> bool {
        let now = Instant::now();
        let mut table = self.table.lock();
        for late in table.pending.iter_mut().filter(|one| one.until < now) {
            late.closer.close();
            // A queued offer has no thread that could notice the close. Its place is freed below.
            if late.stage == Stage::Greeting {
                late.stage = Stage::Closed;
            }
        }
        let is_late = |one: &Pending| one.stage == Stage::Queued && one.until < now;
        self.forget(&mut table, is_late);
        for slots in &mut table.slots {
            if let Some((_, closer)) = slots.timer.take_if(|(until, _)| *until < now) {
                closer.close();
            }
        }
        !table.is_over
    }

    /// Finds a place for a connection. When all are taken, those that have been silent for longest lose
    /// theirs: a source says at once what it wants.
    fn admit(&self, number: u64, stream: &dyn Stream, tick: Duration) -> bool {
        let Ok(closer) = stream.closer() else {
            return false;
        };
        let mut table = self.table.lock();
        loop {
            let ours = table.pending.len();
            // Other endpoints count under their own locks, so two can pass this check at once. The
            // limit of all may be exceeded by a few.
            let all = self.limit.0.load(Ordering::Acquire);
            let is_full = ours >= MAX_PENDING || (ours >= GUARANTEED && all >= MAX_PENDING_IN_ALL);
            if table.is_over {
                return false;
            }
            if !is_full {
                break;
            }
            // Their descriptors are gone before other connections get their places: so the bound is
            // one of descriptors, however fast connections come.
            if table.pending.iter().all(|one| one.stage != Stage::Closed) {
                let greeting = table.pending.iter_mut();
                let greeting = greeting.filter(|one| one.stage == Stage::Greeting);
                let mut evicted = 0;
                // The oldest are in front.
                for oldest in greeting.take(EVICTED) {
                    oldest.stage = Stage::Closed;
                    oldest.closer.close();
                    evicted += 1;
                }
                // Queued offers hold all places. They come from sources, and a newcomer may be
                // anything.
                if evicted == 0 {
                    return false;
                }
            }
            // This releases the lock, which the evicted threads need to free their places.
            self.changed.wait_for(&mut table, tick);
        }
        self.limit.0.fetch_add(1, Ordering::AcqRel);
        table.pending.push(Pending {
            number,
            until: Instant::now() + HELLO_LIMIT,
            closer,
            stage: Stage::Greeting,
        });
        true
    }

    /// Frees places, and drops the offers that hold them.
    fn forget(&self, table: &mut Table, which: impl Fn(&Pending) -> bool) {
        let before = table.pending.len();
        table.pending.retain(|one| !which(one));
        self.limit
            .0
            .fetch_sub(before - table.pending.len(), Ordering::AcqRel);
        let (pending, offers) = (&table.pending, &mut table.offers);
        offers.retain(|offered| pending.iter().any(|one| one.number == offered.number));
        self.changed.notify_all();
    }

    /// Logs and reports why a stranger came to nothing, while a source is awaited.
    fn report_stranger(&self, error: &MigrationError) {
        // At debug level: a port scanner does not fill the log. The report has the last one.
        tracing::debug!(%error, "a connection ended without an offer");
        self.progress.update(|report| {
            if report.phase == Phase::Connecting {
                report.error = Some(error.refusal());
            }
        });
    }

    fn greet(&self, number: u64, mut stream: Box<dyn Stream>) -> Result<(), MigrationError> {
        // This limits a single read. A peer that sends one byte at a time passes it, and
        // `keep_time` ends that one.
        let set = stream.set_patience(HELLO_LIMIT);
        set.map_err(WireError::from)?;
        let hello = message::recv_hello(&mut *stream)?;
        let version = match hello.version() {
            Ok(version) => version,
            Err(why) => {
                refuse(stream, why.clone());
                return Err(MigrationError::Here(why));
            }
        };
        match hello.channel {
            Channel::Control => self.recv_offer(number, hello.migration, version, stream),
            channel => {
                self.route(hello.migration, channel, stream);
                Ok(())
            }
        }
    }

    /// Reads the offer of a source, and queues it.
    fn recv_offer(
        &self,
        number: u64,
        id: Uuid,
        version: u32,
        stream: Box<dyn Stream>,
    ) -> Result<(), MigrationError> {
        if self.table.lock().is_taken(self.at_once) {
            refuse(stream, busy());
            return Ok(());
        }
        self.allow(number, OFFER_LIMIT);
        stream.set_patience(OFFER_LIMIT).map_err(WireError::from)?;
        let mut control = ControlChannel::new(stream);
        control.send(&ToSource::Welcome { version })?;
        let offer = loop {
            match control.recv()? {
                ToDestination::Prepare(offer) => break offer,
                other => answer_ping(&mut control, &other)?,
            }
        };
        let files = if offer.given {
            let received = control.stream.recv_files(offer.blocks.len());
            received.map_err(WireError::from)?
        } else {
            Vec::new()
        };
        let offered = Offered {
            number,
            id,
            control,
            offer,
            files,
        };
        if let Some(rejected) = self.queue(offered) {
            refuse(rejected.control.stream, busy());
        }
        Ok(())
    }

    fn allow(&self, number: u64, limit: Duration) {
        let mut table = self.table.lock();
        let pending = table.pending.iter_mut().find(|one| one.number == number);
        if let Some(pending) = pending {
            pending.until = Instant::now() + limit;
        }
    }

    /// Queues an offer, or gives it back.
    fn queue(&self, offered: Offered) -> Option<Offered> {
        let mut table = self.table.lock();
        if table.is_taken(self.at_once) || table.offers.len() >= MAX_OFFERS {
            return Some(offered);
        }
        // `keep_time` or `admit` may have closed the connection while its thread read the offer.
        let mut pending = table.pending.iter_mut();
        let own = pending.find(|one| one.number == offered.number && one.stage == Stage::Greeting);
        let Some(own) = own else {
            return Some(offered);
        };
        own.stage = Stage::Queued;
        own.until = Instant::now() + QUEUE_LIMIT;
        table.offers.push(offered);
        self.changed.notify_all();
        None
    }

    /// Puts a connection into its slot, or answers it.
    fn route(&self, id: Uuid, channel: Channel, stream: Box<dyn Stream>) {
        let mut table = self.table.lock();
        let rejected = match table.slots(id) {
            Some(slots) => slots.put(channel, stream).err(),
            None => {
                // An answer can block on a peer that does not read. It must not hold the lock that
                // `accept` and all other connections need.
                drop(table);
                match channel {
                    Channel::Again => self.answer_query(id, stream),
                    _ => refuse(stream, no_slot(channel)),
                }
                return;
            }
        };
        self.changed.notify_all();
        drop(table);
        if let Some(stream) = rejected {
            refuse(stream, no_slot(channel));
        }
    }

    /// Answers a source that asks about an earlier migration.
    fn answer_query(&self, id: Uuid, stream: Box<dyn Stream>) {
        let answer = match (self.fate)(id) {
            Fate::Ran => ToSource::Ended,
            Fate::NeverRan => ToSource::NotHere(Refusal::new(
                "never-ran",
                "the destination lost the guest before it ran",
            )),
            // No guess: `NotHere` would let the source resume a guest that may have run here.
            Fate::Unknown => ToSource::Refused(Refusal::new(
                "unknown-migration",
                format!("the destination does not know the outcome of migration {id}"),
            )),
        };
        // A source that does not hear it asks again.
        let _ = ControlChannel::new(stream).send(&answer);
    }

    /// Waits for an offer. `None` if none came in time.
    ///
    /// # Errors
    /// No connection can come any more.
    pub(super) fn next_offer(&self, patience: Duration) -> Result<Option<Offered>, Refusal> {
        let mut table = self.table.lock();
        let none_can_come = |table: &Table| table.is_over && table.pending.is_empty();
        if table.offers.is_empty() && !none_can_come(&table) {
            self.changed.wait_for(&mut table, patience);
        }
        if table.offers.is_empty() {
            let over = Refusal::new("connection-lost", "no connection can be accepted");
            return if none_can_come(&table) {
                Err(over)
            } else {
                Ok(None)
            };
        }
        let offered = table.offers.remove(0);
        self.forget(&mut table, |one| one.number == offered.number);
        Ok(Some(offered))
    }

    /// Whether an offer waits to be examined.
    pub(super) fn has_offers(&self) -> bool {
        !self.table.lock().offers.is_empty()
    }

    /// Opens the slots of a migration. Offers that wait are refused when it takes the last place.
    ///
    /// # Errors
    /// All places are taken, or a migration with this number is in progress: the number comes from
    /// the source.
    pub(super) fn open(&self, id: Uuid, rams: u16) -> Result<(), Refusal> {
        let mut table = self.table.lock();
        if table.slots(id).is_some() || table.is_taken(self.at_once) {
            return Err(busy());
        }
        table.slots.push(Slots::new(id, rams));
        if !table.is_taken(self.at_once) {
            return Ok(());
        }
        // Taken out before `forget`, which would drop them without an answer.
        let offers = std::mem::take(&mut table.offers);
        self.forget(&mut table, |one| one.stage == Stage::Queued);
        drop(table);
        for offered in offers {
            refuse(offered.control.stream, busy());
        }
        Ok(())
    }

    /// Closes the slots of a migration: another may take its place.
    pub(super) fn close(&self, id: Uuid) {
        self.table.lock().slots.retain(|slots| slots.id != id);
        self.changed.notify_all();
    }

    /// Lets another migration take the place of one whose outcome is known.
    pub(super) fn linger(&self, id: Uuid) {
        if let Some(slots) = self.table.lock().slots(id) {
            slots.lingers = true;
        }
    }

    /// Lets the source ask how its migration stands.
    pub(super) fn allow_questions(&self, id: Uuid) {
        if let Some(slots) = self.table.lock().slots(id) {
            slots.may_ask = true;
        }
    }

    /// Makes room for new RAM and faults channels, in place of those that were lost.
    pub(super) fn reopen(&self, id: Uuid) {
        if let Some(slots) = self.table.lock().slots(id) {
            slots.reopen();
        }
    }

    /// Waits for a connection of a migration in progress.
    pub(super) fn next(&self, id: Uuid, patience: Duration) -> Option<Arrived> {
        let deadline = Instant::now() + patience;
        let mut table = self.table.lock();
        loop {
            let found = table.slots(id).and_then(Slots::take);
            if found.is_some() || self.changed.wait_until(&mut table, deadline).timed_out() {
                return found;
            }
        }
    }

    /// Closes a connection of a migration at a time, in place of the one before.
    pub(super) fn set_timer(&self, id: Uuid, timer: Option<(Instant, Closer)>) {
        if let Some(slots) = self.table.lock().slots(id) {
            slots.timer = timer;
        }
    }

    /// Accepts no more connections, and closes those that are pending.
    pub(super) fn end(&self) {
        let mut table = self.table.lock();
        (table.is_over, table.has_ended) = (true, true);
        // The threads of these connections end on the closed sockets, and the scope in `receive`
        // can join them.
        for pending in &mut table.pending {
            pending.closer.close();
        }
        self.forget(&mut table, |one| one.stage == Stage::Queued);
    }
}

/// Whether another connection may be accepted later, when others have ended.
fn is_passing(error: &io::Error) -> bool {
    use rustix::io::Errno;
    let passing = [Errno::MFILE, Errno::NFILE, Errno::NOBUFS, Errno::NOMEM];
    passing
        .iter()
        .any(|errno| error.raw_os_error() == Some(errno.raw_os_error()))
}
