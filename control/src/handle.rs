//! The two ends of a VM: the handle that asks, and the inbox that the driver empties.

use std::collections::VecDeque;
use std::fmt;
use std::sync::{Arc, Weak};

use parking_lot::Mutex;
use spec::{CpuDescription, MemoryMap, PciDeviceInfo, VmConfig, VmCounters, VmId, VmInfo};
use tokio::sync::{oneshot, watch};

use crate::error::RequestError;
use crate::events::EventLog;
use crate::limits::{ENDINGS_WAITING_MAX, REQUESTS_WAITING_MAX};
use crate::request::Request;
use crate::status::{StatusPublisher, VmStatus};

/// A driver's answer.
#[derive(Clone, Debug, PartialEq)]
pub enum Reply {
    /// The request was carried out.
    Done,
    /// Counters of each device.
    Counters(VmCounters),
    /// The address spaces.
    MemoryMap(MemoryMap),
    /// CPU features that the guest sees.
    Cpu(Box<CpuDescription>),
    /// A device that was added to a running guest, and where it is.
    Added(PciDeviceInfo),
}

/// A request, and the way back.
#[derive(Debug)]
pub struct Ask {
    /// The request.
    pub request: Request,
    reply: oneshot::Sender<Result<Reply, RequestError>>,
}

impl Ask {
    /// Answers. A client that is gone changes nothing.
    pub fn answer(self, answer: Result<Reply, RequestError>) {
        let _ = self.reply.send(answer);
    }
}

/// Reports of a machine to its driver, merged until the driver reads them.
///
/// A guest decides how often its machine reports something. So reports are not queued: each is
/// merged into flags, bitmasks and counters, whose size does not depend on how often the guest
/// caused one.
pub trait Latch: Default + Send + 'static {
    /// One report.
    type Report: Send;

    /// Merges one more report into those that the driver has not taken yet.
    fn merge(&mut self, report: Self::Report);
}

/// For drivers of which nothing reports.
impl Latch for () {
    type Report = ();

    fn merge(&mut self, (): ()) {}
}

/// A message in a driver's inbox.
#[derive(Debug)]
pub enum Message<L, E> {
    /// All that the machine has reported since the last time.
    Reports(L),
    /// An answer of the driver's own helpers.
    Event(E),
    /// A request.
    Ask(Ask),
    /// The last handle was dropped.
    Abandoned,
}

/// A message in the inbox, before it is taken.
#[derive(Debug)]
pub enum Peek<'a, E> {
    /// The merged reports of the machine.
    Reports,
    /// An event.
    Event(&'a E),
    /// A request.
    Ask(&'a Request),
}

struct Queue<L, E> {
    reports: Option<L>,
    /// From threads of the VM's own, each of which sends one and ends, or waits for its answer.
    events: VecDeque<E>,
    asks: VecDeque<Ask>,
    /// The driver has gone; nothing is taken any more.
    closed: bool,
    abandoned: bool,
}

impl<L, E> Default for Queue<L, E> {
    fn default() -> Self {
        Self {
            reports: None,
            events: VecDeque::new(),
            asks: VecDeque::new(),
            closed: false,
            abandoned: false,
        }
    }
}

struct Shared<L, E> {
    queue: Mutex<Queue<L, E>>,
    wake: Box<dyn Fn() + Send + Sync>,
}

/// The driver's end. The kinds of message take turns, so that none keeps another waiting.
pub struct Inbox<L, E> {
    shared: Arc<Shared<L, E>>,
    /// The kind whose turn is next.
    turn: usize,
}

/// Kinds of message that take turns.
const KINDS: usize = 4;

impl<L, E> Inbox<L, E> {
    /// Returns the next message that is `wanted` now, if there is one. Others keep their order and
    /// stay in the inbox, and later ones may pass them.
    #[must_use]
    pub fn next(&mut self, wanted: impl Fn(Peek<'_, E>) -> bool) -> Option<Message<L, E>> {
        let mut queue = self.shared.queue.lock();
        for _ in 0..KINDS {
            let kind = self.turn;
            self.turn = (self.turn + 1) % KINDS;
            let message = match kind {
                0 => {
                    let mut events = queue.events.iter();
                    let at = events.position(|event| wanted(Peek::Event(event)));
                    at.and_then(|at| queue.events.remove(at))
                        .map(Message::Event)
                }
                1 if !wanted(Peek::Reports) => None,
                1 => queue.reports.take().map(Message::Reports),
                2 => {
                    let mut asks = queue.asks.iter();
                    let at = asks.position(|ask| wanted(Peek::Ask(&ask.request)));
                    at.and_then(|at| queue.asks.remove(at)).map(Message::Ask)
                }
                _ => std::mem::take(&mut queue.abandoned).then_some(Message::Abandoned),
            };
            if message.is_some() {
                return message;
            }
        }
        None
    }
}

impl<L, E> Drop for Inbox<L, E> {
    fn drop(&mut self) {
        let mut queue = self.shared.queue.lock();
        let left = std::mem::take(&mut *queue);
        queue.closed = true;
        drop(queue);
        // Who asked learns that no answer will come. Without the lock: what is dropped may send.
        drop(left);
    }
}

/// Sends what a machine reports, and what the driver's own helpers answer.
pub struct EventSender<L, E>(Weak<Shared<L, E>>);

impl<L, E> Clone for EventSender<L, E> {
    fn clone(&self) -> Self {
        Self(Weak::clone(&self.0))
    }
}

impl<L: Latch, E> EventSender<L, E> {
    /// Whether there still is an inbox.
    #[must_use]
    pub fn is_open(&self) -> bool {
        let shared = self.0.upgrade();
        shared.is_some_and(|shared| !shared.queue.lock().closed)
    }

    /// Merges a report into those that the driver has not seen yet.
    pub fn report(&self, report: L::Report) {
        self.put(|queue| queue.reports.get_or_insert_default().merge(report));
    }

    /// Puts an event of the driver's own in the inbox, if there still is one. A guest must not be
    /// able to cause one: events are queued.
    pub fn send(&self, event: E) {
        self.put(|queue| queue.events.push_back(event));
    }

    fn put(&self, put: impl FnOnce(&mut Queue<L, E>)) {
        let Some(shared) = self.0.upgrade() else {
            return;
        };
        let mut queue = shared.queue.lock();
        if queue.closed {
            return;
        }
        put(&mut queue);
        drop(queue);
        (shared.wake)();
    }
}

/// A handle's view of a [`Shared`], independent of its event type.
trait Asks: Send + Sync {
    fn ask(&self, ask: Ask);
    fn abandon(&self);
}

impl<L: Send, E: Send> Asks for Shared<L, E> {
    fn ask(&self, ask: Ask) {
        let mut queue = self.queue.lock();
        if queue.closed {
            return;
        }
        // There is room left for requests that end the VM, whatever else clients asked for.
        let max = match ask.request {
            Request::Delete | Request::Shutdown => ENDINGS_WAITING_MAX,
            _ => REQUESTS_WAITING_MAX,
        };
        let waiting = queue.asks.len();
        if waiting >= max {
            drop(queue);
            ask.answer(Err(RequestError::too_many_waiting(waiting)));
            return;
        }
        queue.asks.push_back(ask);
        drop(queue);
        (self.wake)();
    }

    fn abandon(&self) {
        self.queue.lock().abandoned = true;
        (self.wake)();
    }
}

/// The last handle that goes says so.
struct Line(Arc<dyn Asks>);

impl Drop for Line {
    fn drop(&mut self) {
        self.0.abandon();
    }
}

/// A VM, for everybody but its driver. Cheap to clone. When the last one is dropped, the driver
/// ends the VM.
#[derive(Clone)]
pub struct VmHandle {
    id: VmId,
    line: Arc<Line>,
    status: watch::Receiver<VmStatus>,
}

/// Makes both ends of a VM that is created and not booted. `wake` is called after each message,
/// from any thread; it should make the driver look into its inbox.
pub fn connect<L: Latch, E: Send + 'static>(
    id: &VmId,
    config: Arc<VmConfig>,
    events: EventLog,
    wake: impl Fn() + Send + Sync + 'static,
) -> (VmHandle, Inbox<L, E>, EventSender<L, E>, StatusPublisher) {
    let shared = Arc::new(Shared {
        queue: Mutex::default(),
        wake: Box::new(wake),
    });
    let (status, watched) = watch::channel(VmStatus::created(config));
    let line: Arc<dyn Asks> = Arc::clone(&shared) as _;
    let handle = VmHandle {
        id: id.clone(),
        line: Arc::new(Line(line)),
        status: watched,
    };
    let sender = EventSender(Arc::downgrade(&shared));
    (
        handle,
        Inbox { shared, turn: 0 },
        sender,
        StatusPublisher {
            id: id.clone(),
            status,
            events,
        },
    )
}

impl VmHandle {
    /// The VM's name.
    #[must_use]
    pub fn id(&self) -> &VmId {
        &self.id
    }

    /// Returns true if both are handles of one VM, and not of two that had the name one after the other.
    #[must_use]
    pub fn is_same(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.line, &other.line)
    }

    /// Returns the status that the driver published last. Never waits.
    #[must_use]
    pub fn status(&self) -> VmStatus {
        self.status.borrow().clone()
    }

    /// The same in the form of the API; never waits.
    #[must_use]
    pub fn info(&self) -> VmInfo {
        self.status.borrow().info()
    }

    /// Follows what the driver publishes.
    #[must_use]
    pub fn watch(&self) -> watch::Receiver<VmStatus> {
        self.status.clone()
    }

    /// Asks the driver, and waits for its answer.
    ///
    /// # Errors
    /// Fails if it makes no sense now, cannot be done, or the driver is gone.
    pub async fn ask(&self, request: Request) -> Result<Reply, RequestError> {
        self.ask_now(request).await
    }

    /// Asks the driver at once, and gives what its answer will be. The answer need not be waited
    /// for: what was asked is done all the same.
    ///
    /// # Errors
    /// The same as those of [`VmHandle::ask`].
    pub fn ask_now(
        &self,
        request: Request,
    ) -> impl Future<Output = Result<Reply, RequestError>> + Send + use<> {
        let (reply, answer) = oneshot::channel();
        self.line.0.ask(Ask { request, reply });
        async move {
            answer
                .await
                .unwrap_or_else(|_| Err(RequestError::driver_gone()))
        }
    }
}

impl fmt::Debug for VmHandle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "VmHandle({})", self.id)
    }
}

#[cfg(test)]
mod tests {
    use spec::PayloadConfig;

    use super::*;

    /// Counts reports, as a bounded latch may.
    #[derive(Default)]
    struct Count(usize);

    impl Latch for Count {
        type Report = ();

        fn merge(&mut self, (): ()) {
            self.0 += 1;
        }
    }

    type Ends = (VmHandle, Inbox<Count, u32>, EventSender<Count, u32>);

    fn ends() -> Ends {
        let config = VmConfig::with_payload(PayloadConfig::default());
        let id = VmId::unique();
        let ends = connect(&id, Arc::new(config), EventLog::default(), || {});
        (ends.0, ends.1, ends.2)
    }

    #[test]
    fn reports_and_events_do_not_starve_requests() {
        let (vm, mut inbox, sender) = ends();
        drop(vm.ask_now(Request::Delete));
        let mut reported = 0;
        // A guest that reports without end, and a helper that sends without end.
        for turn in 0.. {
            sender.report(());
            sender.send(turn);
            match inbox.next(|_| true) {
                Some(Message::Ask(ask)) => {
                    assert_eq!(ask.request, Request::Delete);
                    break;
                }
                Some(Message::Reports(Count(count))) => reported += count,
                _ => {}
            }
            assert!(turn < 4, "the request waits behind {reported} reports");
        }
    }

    #[test]
    fn reports_are_merged() {
        let (_vm, mut inbox, sender) = ends();
        (0..100_000).for_each(|_| sender.report(()));
        let merged = inbox.next(|_| true);
        assert!(matches!(merged, Some(Message::Reports(Count(100_000)))));
        assert!(inbox.next(|_| true).is_none());
    }

    #[test]
    fn skips_requests_not_allowed_yet() {
        let (vm, mut inbox, _sender) = ends();
        drop((vm.ask_now(Request::Pause), vm.ask_now(Request::Delete)));
        let deletes = |peek: Peek<'_, u32>| matches!(peek, Peek::Ask(Request::Delete));
        let asked = inbox.next(deletes);
        assert!(matches!(asked, Some(Message::Ask(ask)) if ask.request == Request::Delete));
        assert!(inbox.next(deletes).is_none());
        let asked = inbox.next(|_| true);
        assert!(matches!(asked, Some(Message::Ask(ask)) if ask.request == Request::Pause));
    }

    #[tokio::test]
    async fn request_queue_is_bounded() {
        let (vm, mut inbox, _sender) = ends();
        let waiting: Vec<_> = (0..REQUESTS_WAITING_MAX)
            .map(|_| vm.ask_now(Request::Counters))
            .collect();
        let refused = vm.ask(Request::Counters).await.unwrap_err();
        assert_eq!(refused.code, "too-many-requests");
        let deleted = vm.ask_now(Request::Delete);
        let Some(Message::Ask(ask)) = inbox.next(|peek| matches!(peek, Peek::Ask(Request::Delete)))
        else {
            panic!("no request to delete the VM");
        };
        ask.answer(Ok(Reply::Done));
        assert_eq!(deleted.await, Ok(Reply::Done));
        drop((inbox, waiting));
    }
}
