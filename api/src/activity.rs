//! The state of each connection, by which slow and idle clients are let go.
//!
//! ```text
//!  opened ──► Head ── request ──► Busy ── answer is sent ──► Idle ── first byte ──► Head
//!              │                                              │
//!              └─ head limit: closed           idle limit, or room is needed: closed
//! ```
//!
//! A client may keep an idle connection for minutes, for instance while it waits for a guest to boot.
//! A client that has begun a request, or has not sent its first, has the short limit only.

use std::collections::HashMap;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use axum::body::{Body, Bytes, HttpBody};
use hyper::body::{Frame, SizeHint};
use parking_lot::Mutex;
use tokio::sync::{Notify, watch};
use tokio::time::Instant;

use crate::serve::Bounds;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// The head of a request is awaited or arriving.
    Head { since: Instant },
    /// A request is in progress, to the end of its answer.
    Busy,
    /// The last answer is sent, and nothing has come since.
    Idle { since: Instant },
    /// The connection was idle, and another one needs its place.
    Evicted,
}

/// One connection's state.
#[derive(Clone, Debug)]
pub(crate) struct Activity {
    state: watch::Sender<State>,
    became_idle: Arc<Notify>,
}

impl Activity {
    /// Bytes arrived.
    pub(crate) fn received(&self) {
        self.state.send_if_modified(|state| {
            let begins = matches!(state, State::Idle { .. });
            if begins {
                *state = State::Head {
                    since: Instant::now(),
                };
            }
            begins
        });
    }

    /// A request's head is complete.
    pub(crate) fn begin(&self) {
        self.state.send_replace(State::Busy);
    }

    /// Returns the answer's body, which ends the request when it is sent.
    pub(crate) fn until_sent(&self, body: Body) -> Body {
        Body::new(Answering {
            body,
            activity: self.clone(),
        })
    }

    fn end(&self) {
        self.state.send_replace(State::Idle {
            since: Instant::now(),
        });
        self.became_idle.notify_one();
    }

    /// Waits until the connection has to be closed.
    pub(crate) async fn expired(&self, bounds: Bounds) {
        let mut states = self.state.subscribe();
        loop {
            let deadline = match *states.borrow_and_update() {
                State::Head { since } => since.checked_add(bounds.header_read_timeout),
                State::Idle { since } => since.checked_add(bounds.idle_timeout),
                State::Busy => None,
                State::Evicted => return,
            };
            // The sender is in `self`, so `changed` cannot fail.
            match deadline {
                Some(deadline) => tokio::select! {
                    _ = states.changed() => {}
                    () = tokio::time::sleep_until(deadline) => return,
                },
                None => {
                    let _ = states.changed().await;
                }
            }
        }
    }
}

/// The body of an answer. Dropped when the last of it is handed to the socket.
struct Answering {
    body: Body,
    activity: Activity,
}

impl Drop for Answering {
    fn drop(&mut self) {
        self.activity.end();
    }
}

impl HttpBody for Answering {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        Pin::new(&mut self.body).poll_frame(cx)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

/// The connections of one listener.
#[derive(Clone, Debug, Default)]
pub(crate) struct Connections {
    open: Arc<Mutex<HashMap<u64, Activity>>>,
    became_idle: Arc<Notify>,
}

impl Connections {
    /// Adds a connection. `number` differs from that of every other open connection.
    pub(crate) fn add(&self, number: u64) -> Connected {
        let since = Instant::now();
        let activity = Activity {
            state: watch::Sender::new(State::Head { since }),
            became_idle: Arc::clone(&self.became_idle),
        };
        self.open.lock().insert(number, activity.clone());
        Connected {
            all: self.clone(),
            number,
            activity,
        }
    }

    /// Closes the connection that has been idle for the longest time, if one is idle and none is
    /// being closed already.
    pub(crate) fn close_longest_idle(&self) {
        let open = self.open.lock();
        // A notification may be older than the last eviction: one client needs one place only.
        let is_evicted = |activity: &Activity| *activity.state.borrow() == State::Evicted;
        if open.values().any(is_evicted) {
            return;
        }
        let idle = open
            .values()
            .filter_map(|activity| match *activity.state.borrow() {
                State::Idle { since } => Some((since, activity)),
                _ => None,
            });
        if let Some((_, activity)) = idle.min_by_key(|(since, _)| *since) {
            // A request may have begun since the look above: that one stays.
            activity.state.send_if_modified(|state| {
                let idle = matches!(state, State::Idle { .. });
                if idle {
                    *state = State::Evicted;
                }
                idle
            });
        }
    }

    /// Waits until a connection becomes idle that was not.
    pub(crate) async fn one_is_idle(&self) {
        self.became_idle.notified().await;
    }
}

/// An open connection's entry, which goes with it.
#[derive(Debug)]
pub(crate) struct Connected {
    all: Connections,
    number: u64,
    pub(crate) activity: Activity,
}

impl Drop for Connected {
    fn drop(&mut self) {
        self.all.open.lock().remove(&self.number);
    }
}
