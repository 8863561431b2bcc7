//! The work on one queue of a disk.

mod parked;

use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use self::parked::Parked;
use super::format::RefusedWrite;
use super::geometry::Geometry;
use super::image::Image;
use super::request::{ID_LEN, Limits, Op, Request, Status, What};
use super::threads::Threads;
use super::uring::Uring;
use super::{Kind, OnError, Shared};
use crate::queue::{Budget, Chain, Queue, QueueError, QueueState};
use crate::rate_limiter::Gate;
use crate::worker::{QueueTask, TaskEvent, TaskFlow, TaskSources};
use devices::event_loop::Interest;

/// Requests of one turn.
const CHAINS: usize = 64;

/// The [load](Request::load) of requests in flight at which no more are taken, in bytes: a queue that
/// stops waits for them.
pub(super) const MAX_IN_FLIGHT: u64 = 64 << 20;
/// Maps of the guest's memory that requests in flight may keep, where the guest changes its map.
const MAX_VIEWS: usize = 8;
/// When the kernel is asked again after it took no operations, and how often before threads do them.
const RETRY: Duration = Duration::from_millis(10);
const MOST_FAILURES: u32 = 100;

const KICK: usize = 0;
const URING: usize = 1;
const THREADS: usize = 2;
const TIMER: usize = 3;
const AWAITED: usize = 4;

pub(super) struct BlockTask {
    queue: Queue,
    /// The io_uring, if the image is raw and the host has one.
    uring: Option<Uring>,
    /// How often, one after the other, the kernel would not take operations.
    failures: u32,
    /// The load of requests in flight.
    in_flight: u64,
    /// Maps that requests have come with since there was nothing in flight, each counted once while the
    /// guest does not change its map, and the generation of the last.
    views: (usize, u64),
    /// Made when it is first needed.
    threads: Option<Threads>,
    gate: Gate,
    /// When the kernel is asked again whether it takes operations.
    retry: Option<Instant>,
    /// Waiting for the rate limit. It was popped last, so that it can be put back.
    waiting: Option<Request>,
    /// Heads of chains that failed before the queue was started, and come before all others.
    again: VecDeque<u16>,
    /// By their turns, the heads of those that have failed since. While there is one nothing more is
    /// begun: the machine is about to stand.
    kept: BTreeMap<u64, u16>,
    /// Requests that wait for blocks which are still at the source of a migration; `None` for a disk that
    /// had all of them when the queue was started.
    parked: Option<Parked>,
    /// Requests that were begun.
    turn: u64,
    /// The queue stops: no further part of a request is begun.
    is_stopping: bool,
    /// Writes are durable when they complete: the driver cannot flush, or chose write-through.
    writethrough: bool,
    /// Behind what is in flight: the image is locked for as long.
    image: Arc<Image>,
    shared: Arc<Shared>,
}

impl BlockTask {
    pub(super) fn new(queue: Queue, shared: &Arc<Shared>, flushes: bool) -> io::Result<Self> {
        Ok(Self {
            queue,
            uring: None,
            failures: 0,
            in_flight: 0,
            views: (0, 0),
            threads: None,
            gate: Gate::new(&shared.limiter)?,
            retry: None,
            waiting: None,
            again: VecDeque::new(),
            kept: BTreeMap::new(),
            parked: shared.awaited().map(Parked::new).transpose()?,
            turn: 0,
            is_stopping: false,
            writethrough: !flushes,
            image: shared.image(),
            shared: Arc::clone(shared),
        })
    }

    /// Begins with these chains, which were popped before the queue was started.
    pub(super) fn try_again(&mut self, heads: Vec<u16>) {
        self.again = heads.into();
    }

    /// Returns the heads of chains to try again, in order.
    pub(super) fn kept(&self) -> Vec<u16> {
        self.kept.values().chain(&self.again).copied().collect()
    }

    pub(super) fn state(&self) -> QueueState {
        let mut state = self.queue.state();
        if self.waiting.is_some() {
            state.next_avail = state.next_avail.wrapping_sub(1);
        }
        state
    }

    /// Waits for requests in flight and puts back those that wait. Returns the queue's state and the chains
    /// to try again, among them those of which only a part was moved.
    pub(super) fn finish(mut self) -> (QueueState, Vec<u16>) {
        self.is_stopping = true;
        if self.waiting.take().is_some() {
            self.queue.unpop();
        }
        // Not waited for: their blocks may be long in coming.
        let parked = self.parked.take().map(Parked::end).unwrap_or_default();
        let kept = parked.iter().try_for_each(|request| self.keep(request));
        if let Err(error) = kept.and_then(|()| self.drain()) {
            // The rings are gone, so completions cannot be reported.
            self.queue.broken(&error);
        }
        (self.queue.state(), self.kept())
    }

    fn drain(&mut self) -> Result<(), QueueError> {
        while let Some(uring) = self.uring.as_mut().filter(|uring| uring.in_flight() > 0) {
            match uring.wait() {
                Ok(()) => self.failures = 0,
                Err(error) => {
                    self.not_taken(&error)?;
                    std::thread::sleep(RETRY);
                }
            }
            self.collect_uring()?;
        }
        while let Some((request, result)) = self.threads.as_mut().and_then(Threads::wait) {
            self.complete(request, result)?;
        }
        self.queue.notify()
    }

    /// Takes requests; true when there may be more.
    fn take(&mut self) -> Result<bool, QueueError> {
        let mut budget = Budget::new(CHAINS);
        while !budget.is_spent() {
            if !self.has_room() || !self.kept.is_empty() {
                // Whatever is done next comes back here, or the queue is started again.
                return Ok(false);
            }
            if let Some(head) = self.again.pop_front() {
                // It has been limited already.
                let chain = self.queue.again(head)?;
                budget.spend_chain(chain.descriptors());
                let request = self.parse(chain)?;
                budget.spend_bytes(request.weight());
                self.begin(request)?;
                continue;
            }
            let request = match self.waiting.take() {
                Some(request) => request,
                None => match self.queue.pop()? {
                    Some(chain) => {
                        budget.spend_chain(chain.descriptors());
                        self.parse(chain)?
                    }
                    None => return self.queue.enable_kicks(),
                },
            };
            if !self.gate.pass(request.charge()) {
                self.waiting = Some(request);
                return Ok(false);
            }
            self.gate.close();
            budget.spend_bytes(request.weight());
            self.begin(request)?;
        }
        Ok(true)
    }

    fn has_room(&self) -> bool {
        let busy =
            |room: bool, in_flight: usize| !room || in_flight >= usize::from(self.queue.size());
        let uring = self.uring.as_ref();
        let threads = self.threads.as_ref();
        let parked = self.parked.as_ref();
        self.in_flight < MAX_IN_FLIGHT
            && (self.views.0 < MAX_VIEWS || self.is_idle())
            && parked.is_none_or(|parked| parked.has_room(self.queue.size()))
            && !uring.is_some_and(|u| busy(u.has_room(), u.in_flight()))
            && !threads.is_some_and(|t| busy(t.has_room(), t.in_flight()))
    }

    /// Whether no request is in flight or waits for blocks.
    fn is_idle(&self) -> bool {
        self.uring.as_ref().is_none_or(|u| u.in_flight() == 0)
            && self.threads.as_ref().is_none_or(|t| t.in_flight() == 0)
            && self.parked.as_ref().is_none_or(Parked::is_empty)
    }

    /// Counts the map that a request keeps, which is about to be in flight.
    fn note_view(&mut self, chain: &Chain) {
        let generation = chain.memory().generation();
        let (others, last) = self.views;
        if self.is_idle() {
            self.views = (1, generation);
        } else if last != generation {
            self.views = (others + 1, generation);
        }
    }

    fn parse(&self, chain: Chain) -> Result<Request, QueueError> {
        let limits = Limits {
            capacity: self.shared.capacity.load(Ordering::Acquire),
            readonly: self.image.readonly,
            block: self.image.geometry.logical,
            sparse: self.shared.sparse,
        };
        Request::parse(chain, limits)
    }

    fn begin(&mut self, mut request: Request) -> Result<(), QueueError> {
        self.turn = self.turn.wrapping_add(1);
        request.turn = self.turn;
        self.note_view(&request.chain);
        match request.what {
            What::Refused(status) => self.answer(&request, status, 0),
            What::Id => {
                let mut id = [0; ID_LEN];
                let given = self.shared.serial.as_bytes();
                id.iter_mut().zip(given).for_each(|(to, from)| *to = *from);
                request.chain.write(0, &id)?;
                self.answer(&request, Status::Ok, ID_LEN)
            }
            What::Io(op) => self.start(request, op),
        }
    }

    /// Whether what is written must be on the disk when the driver hears of it.
    fn is_durable(&self) -> bool {
        self.writethrough || !self.shared.writeback.load(Ordering::Acquire)
    }

    /// Starts the next part of an operation.
    fn start(&mut self, request: Request, whole: Op) -> Result<(), QueueError> {
        let op = whole.part(request.done);
        if let Op::Write { len, .. } = op {
            request.chain.wait_readable(request.data_to_write(), len)?;
        }
        // Behind that wait: an operation that has a claim must not depend on a page of memory that comes
        // behind a block of this disk.
        let request = match &mut self.parked {
            Some(parked) => match parked.admit(request, op) {
                Some(request) => request,
                None => return Ok(()),
            },
            None => request,
        };
        let durable = self.is_durable();
        let image = &self.image;
        let aligned = !image.is_direct() || is_aligned(&request, op, image.geometry)?;
        let capacity = self.shared.capacity.load(Ordering::Acquire);
        let is_watched = match op {
            Op::Write { offset, len } => image.is_watched(offset, len, capacity),
            _ => false,
        };
        let load = request.load(op);
        let mut request = request;
        if let Some(uring) = self.uring.as_mut().filter(|_| aligned && !is_watched) {
            match uring.push(request, op, durable) {
                Ok(()) => {
                    self.in_flight += load;
                    return Ok(());
                }
                Err(back) => request = back,
            }
        }
        self.start_on_threads(request, op)
    }

    fn start_on_threads(&mut self, request: Request, op: Op) -> Result<(), QueueError> {
        let durable = self.is_durable();
        if self.threads.is_none() {
            match Threads::new(&self.image, self.queue.size()) {
                Ok(threads) => self.threads = Some(threads),
                Err(error) => {
                    tracing::error!(%error, "cannot start a disk's threads");
                    return self.failed(&request, op, &error);
                }
            }
        }
        let load = request.load(op);
        let threads = self.threads.as_mut();
        match threads.map(|threads| threads.push(request, op, durable)) {
            Some(Err(back)) => self.failed(&back, op, &io::ErrorKind::BrokenPipe.into()),
            _ => {
                self.in_flight += load;
                Ok(())
            }
        }
    }

    /// Starts requests whose blocks have come.
    fn start_parked(&mut self) -> Result<(), QueueError> {
        let ready = self.parked.as_mut().map(Parked::take_ready);
        for request in ready.unwrap_or_default() {
            match request.what {
                // The machine is about to stand.
                _ if !self.kept.is_empty() => self.keep(&request)?,
                What::Io(whole) => self.start(request, whole)?,
                What::Id | What::Refused(_) => self.answer(&request, Status::IoError, 0)?,
            }
        }
        Ok(())
    }

    /// Gives the kernel what was begun.
    fn submit(&mut self) -> Result<(), QueueError> {
        let Some(uring) = &mut self.uring else {
            return Ok(());
        };
        match uring.submit() {
            Ok(()) => self.failures = 0,
            Err(error) => {
                self.not_taken(&error)?;
                self.retry = Some(Instant::now() + RETRY);
            }
        }
        Ok(())
    }

    /// The kernel took no operations: it is short of something, or has no io_uring for us any more.
    fn not_taken(&mut self, error: &io::Error) -> Result<(), QueueError> {
        self.failures = self.failures.saturating_add(1);
        if self.failures < MOST_FAILURES {
            tracing::debug!(%error, "io_uring accepts no more requests for now");
            return Ok(());
        }
        tracing::warn!(%error, "io_uring accepts no requests; a disk's queue is served by threads");
        self.leave_uring()
    }

    /// Has threads do what the kernel did not take, and all that comes.
    fn leave_uring(&mut self) -> Result<(), QueueError> {
        for request in self.uring.as_mut().map(Uring::give_up).unwrap_or_default() {
            match request.what {
                What::Io(whole) => {
                    let op = whole.part(request.done);
                    self.in_flight = self.in_flight.saturating_sub(request.load(op));
                    self.start_on_threads(request, op)?;
                }
                _ => self.answer(&request, Status::IoError, 0)?,
            }
        }
        Ok(())
    }

    fn collect_uring(&mut self) -> Result<(), QueueError> {
        while let Some((request, result)) = self.uring.as_mut().and_then(Uring::next_done) {
            self.complete(request, result)?;
        }
        Ok(())
    }

    fn collect(&mut self) -> Result<(), QueueError> {
        self.collect_uring()?;
        while let Some((request, result)) = self.threads.as_mut().and_then(Threads::next_done) {
            self.complete(request, result)?;
        }
        Ok(())
    }

    /// An operation, or a part of it, is done.
    fn complete(
        &mut self,
        mut request: Request,
        result: io::Result<usize>,
    ) -> Result<(), QueueError> {
        let What::Io(whole) = request.what else {
            return self.answer(&request, Status::IoError, 0);
        };
        let op = whole.part(request.done);
        self.in_flight = self.in_flight.saturating_sub(request.load(op));
        match result {
            Ok(done) if done as u64 >= op.bytes() => {
                if let Op::Read { len, .. } = op {
                    request.chain.mark_written(request.room_to_read(), len)?;
                }
                if let Some(claim) = request.claim.take() {
                    // The guest wrote its blocks: what comes from the source for them is old.
                    drop(claim.done());
                }
                // Of a transfer, bytes in memory: they are a usize.
                request.done += op.bytes() as usize;
                if (request.done as u64) < whole.bytes() {
                    return self.continue_with(request, whole);
                }
                self.shared.counters.count(whole);
                let read = match whole {
                    Op::Read { len, .. } => len,
                    _ => 0,
                };
                self.answer(&request, Status::Ok, read)
            }
            // The kernel moved a part of it: the rest, and the reason, are the threads' to find.
            Ok(done) if done > 0 => self.start_on_threads(request, op),
            Ok(_) => self.failed(&request, op, &io::ErrorKind::UnexpectedEof.into()),
            Err(error) => self.failed(&request, op, &error),
        }
    }

    /// Starts the next part of a request; when the queue stops, keeps the request in order to repeat
    /// it when the queue starts again. The driver has not heard of it, so repeating is harmless.
    fn continue_with(&mut self, request: Request, whole: Op) -> Result<(), QueueError> {
        if self.is_stopping {
            return self.keep(&request);
        }
        self.start(request, whole)?;
        self.submit()
    }

    /// Keeps a request in order to repeat it.
    fn keep(&mut self, request: &Request) -> Result<(), QueueError> {
        let head = request.chain.head();
        // It is known by its head alone, to which only one can be.
        let mut known = self.kept.values().chain(&self.again);
        if known.any(|kept| *kept == head) {
            let why = "was made available twice";
            return Err(QueueError::Chain { head, why });
        }
        self.kept.insert(request.turn, head);
        Ok(())
    }

    fn failed(&mut self, request: &Request, op: Op, error: &io::Error) -> Result<(), QueueError> {
        // Hosts and file systems differ in what they can give back or zero.
        let cannot = matches!(op, Op::Discard { .. } | Op::WriteZeroes { .. })
            && matches!(
                error.kind(),
                io::ErrorKind::Unsupported | io::ErrorKind::InvalidInput
            );
        if cannot {
            return self.answer(request, Status::Unsupported, 0);
        }
        self.shared.counters.errors.fetch_add(1, Ordering::Relaxed);
        tracing::warn!(?op, %error, "a disk operation failed");
        // The host did not fail: trying such a write again would not help.
        let is_refused = RefusedWrite::is_cause_of(error);
        if self.shared.on_error == OnError::Pause && !is_refused {
            self.keep(request)?;
            self.shared.stalled(&format!("{op}: {error}"));
            return Ok(());
        }
        self.answer(request, Status::IoError, 0)
    }

    fn answer(&mut self, request: &Request, status: Status, data: usize) -> Result<(), QueueError> {
        let written = request.finish(status, data)?;
        self.queue.push(request.chain.head(), written)
    }
}

/// Whether direct I/O takes the guest's buffers as they are: what it asks of addresses also of
/// lengths, since one buffer follows the other.
fn is_aligned(request: &Request, op: Op, geometry: Geometry) -> Result<bool, QueueError> {
    let slices = match op {
        Op::Read { len, .. } => request.chain.writable(request.room_to_read(), len)?,
        Op::Write { len, .. } => request.chain.readable(request.data_to_write(), len)?,
        _ => return Ok(true),
    };
    let aligned = |at: usize| (at as u64).is_multiple_of(geometry.align);
    let pieces = slices
        .iter()
        .all(|slice| aligned(slice.ptr_guard().as_ptr().addr()) && aligned(slice.len()));
    let offset = match op {
        Op::Read { offset, .. } | Op::Write { offset, .. } => offset,
        _ => 0,
    };
    Ok(pieces && offset.is_multiple_of(geometry.logical))
}

impl QueueTask for BlockTask {
    fn watch(&mut self, sources: &mut TaskSources<'_, '_>) -> io::Result<()> {
        sources.watch(Arc::clone(self.queue.kick()), KICK, Interest::Read)?;
        // Here and not when the queue starts: that is in the stop of a guest that moves.
        if let (None, Kind::Raw(file)) = (&self.uring, &self.image.kind) {
            let file = Arc::new(file.try_clone()?);
            let written = &self.image.written;
            self.uring = Uring::new(&self.shared.rings(), file, written, self.queue.size());
        }
        if let Some(uring) = &self.uring {
            sources.watch(Arc::clone(uring.done()), URING, Interest::Read)?;
        }
        if let Some(parked) = &self.parked {
            sources.watch(parked.event(), AWAITED, Interest::Read)?;
        }
        self.gate.watch(sources, TIMER)
    }

    fn call(
        &mut self,
        _: TaskEvent,
        sources: &mut TaskSources<'_, '_>,
    ) -> Result<TaskFlow, QueueError> {
        let had_threads = self.threads.is_some();
        // Whatever woke us: all that can be done is done, and counters of events start anew.
        let _ = self.queue.kick().read();
        if let Some(uring) = &self.uring {
            let _ = uring.done().read();
        }
        if let Some(threads) = &self.threads {
            let _ = threads.done().read();
        }
        self.gate.clear();
        self.collect()?;
        self.start_parked()?;
        let more = self.take()?;
        self.submit()?;
        if let Some(retry) = self.retry.take() {
            sources.wake_at(Some(retry));
        }
        if let (false, Some(threads)) = (had_threads, &self.threads) {
            let watched = sources.watch(Arc::clone(threads.done()), THREADS, Interest::Read);
            if let Err(error) = watched {
                tracing::error!(%error, "cannot read the results of a disk's threads");
            }
        }
        self.queue.notify()?;
        Ok(if more {
            TaskFlow::Again
        } else {
            TaskFlow::Wait
        })
    }
}

#[cfg(test)]
mod tests;
