//! The two ends of a VM: the handle that asks, and the inbox that the driver empties.

use std::collections::VecDeque;
use std::fmt;
use std::sync::{Arc, Weak};

use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use spec::{MemoryMap, PciDeviceInfo, VmConfig, VmCounters, VmId, VmInfo};
use tokio::sync::{oneshot, watch};

use crate::error::RequestError;
use crate::events::EventLog;
use crate::request::Request;
use crate::status::{StatusPublisher, VmStatus};

/// What it answers.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum Reply {
    /// It was done.
    Done,
    /// Counters of each device.
    Counters(VmCounters),
    /// The address spaces.
    MemoryMap(MemoryMap),
    /// A device that was added to a running guest, and where it is.
    Added(PciDeviceInfo),
}

/// A request, and the way back.
#[derive(Debug)]
pub struct Ask {
    /// What is asked.
    pub request: Request,
    reply: oneshot::Sender<Result<Reply, RequestError>>,
}

impl Ask {
    /// Answers. Whoever asked may have gone, which changes nothing.
    pub fn answer(self, answer: Result<Reply, RequestError>) {
        let _ = self.reply.send(answer);
    }
}

/// What a driver finds in its inbox.
#[derive(Debug)]
pub enum Message<E> {
    /// Something that the guest did.
    Event(E),
    /// Something that is asked.
    Ask(Ask),
    /// Nobody holds a handle any more.
    Abandoned,
}

struct Queue<E> {
    events: VecDeque<E>,
    asks: VecDeque<Ask>,
    /// The driver has gone; nothing is taken any more.
    closed: bool,
    abandoned: bool,
}

struct Shared<E> {
    queue: Mutex<Queue<E>>,
    wake: Box<dyn Fn() + Send + Sync>,
}

/// The driver's end: guest events first, then requests in their order.
pub struct Inbox<E>(Arc<Shared<E>>);

impl<E> Inbox<E> {
    /// The next message, if there is one. `wake` was called for it.
    #[must_use]
    #[expect(
        clippy::should_implement_trait,
        reason = "it has more to give after a `None`"
    )]
    pub fn next(&mut self) -> Option<Message<E>> {
        let mut queue = self.0.queue.lock();
        if let Some(event) = queue.events.pop_front() {
            return Some(Message::Event(event));
        }
        if let Some(ask) = queue.asks.pop_front() {
            return Some(Message::Ask(ask));
        }
        std::mem::take(&mut queue.abandoned).then_some(Message::Abandoned)
    }
}

impl<E> Drop for Inbox<E> {
    fn drop(&mut self) {
        let mut queue = self.0.queue.lock();
        queue.closed = true;
        // Their askers learn that nobody will answer.
        let (asks, events) = (
            std::mem::take(&mut queue.asks),
            std::mem::take(&mut queue.events),
        );
        drop(queue);
        drop((asks, events));
    }
}

/// Tells a driver what its guest did.
pub struct EventSender<E>(Weak<Shared<E>>);

impl<E> Clone for EventSender<E> {
    fn clone(&self) -> Self {
        Self(Weak::clone(&self.0))
    }
}

impl<E> EventSender<E> {
    /// Whether there still is an inbox.
    #[must_use]
    pub fn is_open(&self) -> bool {
        let shared = self.0.upgrade();
        shared.is_some_and(|shared| !shared.queue.lock().closed)
    }

    /// Puts an event in the inbox, if there still is one.
    pub fn send(&self, event: E) {
        let Some(shared) = self.0.upgrade() else {
            return;
        };
        let mut queue = shared.queue.lock();
        if queue.closed {
            return;
        }
        queue.events.push_back(event);
        drop(queue);
        (shared.wake)();
    }
}

/// What a handle needs of a [`Shared`], whatever its events are.
trait Asks: Send + Sync {
    fn ask(&self, ask: Ask);
    fn abandon(&self);
}

impl<E: Send> Asks for Shared<E> {
    fn ask(&self, ask: Ask) {
        let mut queue = self.queue.lock();
        if queue.closed {
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
pub fn connect<E: Send + 'static>(
    id: &VmId,
    config: Arc<VmConfig>,
    events: EventLog,
    wake: impl Fn() + Send + Sync + 'static,
) -> (VmHandle, Inbox<E>, EventSender<E>, StatusPublisher) {
    let queue = Queue {
        events: VecDeque::new(),
        asks: VecDeque::new(),
        closed: false,
        abandoned: false,
    };
    let shared = Arc::new(Shared {
        queue: Mutex::new(queue),
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
        Inbox(shared),
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

    /// What the driver last published; never waits.
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
    /// When it makes no sense now, cannot be done, or the driver is gone.
    pub async fn ask(&self, request: Request) -> Result<Reply, RequestError> {
        self.ask_now(request).await
    }

    /// Asks the driver at once, and gives what its answer will be. The answer need not be waited
    /// for: what was asked is done all the same.
    ///
    /// # Errors
    /// As [`VmHandle::ask`].
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
