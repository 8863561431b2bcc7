//! Events of VMs, as server-sent events (HTML standard, 9.2).

use std::collections::VecDeque;
use std::convert::Infallible;
use std::time::Duration;

use axum::Extension;
use axum::extract::{Query, State};
use axum::response::Sse;
use axum::response::sse;
use control::{EventLog, Missed};
use futures_util::Stream;
use futures_util::stream::unfold;
use http::{HeaderMap, StatusCode};
use serde::Deserialize;
use spec::{Event, VmId};
use utoipa::IntoParams;

use crate::peer::Peer;
use crate::problem::ApiError;
use crate::refusals::BadQuery;
use crate::routes::{Routes, routes};
use crate::serve::Shutdown;
use crate::service::Service;
use crate::tags::SERVICE;

/// A comment line so often, so that both ends notice a connection that is gone.
const KEEP_ALIVE: Duration = Duration::from_secs(15);

pub(crate) fn routes() -> Routes<Service> {
    Routes::default().routes(routes!(events))
}

/// The first event, and a filter by VM.
#[derive(Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
struct Which {
    /// Start after the event with this sequence number; 0 starts with the oldest event that is
    /// kept. A `Last-Event-ID` header has the same meaning and precedence. Without either, the
    /// stream starts with the next event.
    after: Option<u64>,
    /// Only events of this VM.
    vm: Option<VmId>,
}

/// Stream the events of the VMs.
///
/// A stream of server-sent events: `id` is the sequence number, `event` the kind, `data` an `Event`
/// as JSON. The service keeps the last 128 events of each VM, and the last 1024 events of deleted
/// VMs. A client that reconnects with the last `id` that it saw gets all later events that are
/// kept; if some are gone, the stream starts with an event `missed`, whose `data.oldest` is the
/// number of the oldest event that is kept, and `data.count` the number of events that are gone (an
/// upper bound in the stream of one VM). The numbers restart at 1 with the service: a client with a
/// higher number gets the events from the oldest on.
#[utoipa::path(
    get, path = "/api/v1/events", operation_id = "followEvents", tag = SERVICE,
    params(
        Which,
        ("Last-Event-ID" = Option<u64>, Header, description = "Start after this event."),
    ),
    responses(
        (status = 200, description = "Events, until the client or the service closes the stream.",
         body = Event, content_type = "text/event-stream"),
        BadQuery,
    ),
)]
async fn events(
    State(service): State<Service>,
    peer: Option<Extension<Peer>>,
    headers: HeaderMap,
    which: Result<Query<Which>, axum::extract::rejection::QueryRejection>,
) -> Result<Sse<impl Stream<Item = Result<sse::Event, Infallible>>>, ApiError> {
    let Query(which) = which.map_err(|error| bad(error.body_text()))?;
    let log = service.registry.events().clone();
    let after = match headers.get("last-event-id") {
        None => which.after.unwrap_or_else(|| log.last()),
        Some(id) => id
            .to_str()
            .ok()
            .and_then(|id| id.trim().parse().ok())
            .ok_or_else(|| bad("Last-Event-ID is not a sequence number".to_owned()))?,
    };
    // Ahead of us: the client speaks of the events of a service before this one.
    let after = if after > log.last() { 0 } else { after };
    let follower = Follower {
        log,
        after,
        vm: which.vm,
        shutdown: service.shutdown.clone(),
        ready: VecDeque::new(),
        client: peer.map_or(Client::Unknown, |Extension(peer)| Client::There(peer)),
    };
    let stream = unfold(follower, Follower::next);
    Ok(Sse::new(stream).keep_alive(sse::KeepAlive::new().interval(KEEP_ALIVE)))
}

fn bad(detail: String) -> ApiError {
    ApiError::new(StatusCode::BAD_REQUEST, "bad-query", detail)
}

/// A client that follows, and how far it is.
struct Follower {
    log: EventLog,
    after: u64,
    vm: Option<VmId>,
    shutdown: Shutdown,
    ready: VecDeque<sse::Event>,
    client: Client,
}

/// The client of a stream.
enum Client {
    /// The client may still send something.
    There(Peer),
    /// The client sends nothing any more: it waits for events, or is gone.
    Listening(Peer),
    /// The request came over no connection of [`serve`](crate::serve).
    Unknown,
}

impl Client {
    /// Waits until the client does what brings it to the next state.
    async fn moves(&self) {
        match self {
            Self::There(peer) => peer.sent_all().await,
            Self::Listening(peer) => peer.gone().await,
            Self::Unknown => std::future::pending().await,
        }
    }
}

impl Follower {
    async fn next(mut self) -> Option<(Result<sse::Event, Infallible>, Self)> {
        loop {
            if let Some(event) = self.ready.pop_front() {
                return Some((Ok(event), self));
            }
            tokio::select! {
                () = self.log.wait_after(self.after) => self.take(),
                () = self.shutdown.requested() => return None,
                () = self.client.moves() => match self.client {
                    Client::There(peer) => {
                        // A TCP client that is gone answers the next bytes with a reset.
                        self.ready.push_back(sse::Event::default().comment(""));
                        self.client = Client::Listening(peer);
                    }
                    // Its slot is free as soon as the stream ends.
                    Client::Listening(_) | Client::Unknown => return None,
                },
            }
        }
    }

    fn take(&mut self) {
        // Before the events are looked at: what comes meanwhile is looked at next.
        let last = self.log.last();
        let (events, missed) = self.log.after(self.after, self.vm.as_ref());
        if let Some(Missed { oldest, count }) = missed {
            let data = format!("{{\"oldest\":{oldest},\"count\":{count}}}");
            self.ready
                .push_back(sse::Event::default().event("missed").data(data));
        }
        self.after = last.max(events.last().map_or(0, |event| event.sequence));
        for event in events {
            if let Ok(data) = crate::json::ascii_json(&event) {
                let told = sse::Event::default().id(event.sequence.to_string());
                self.ready.push_back(told.event(&event.event).data(data));
            }
        }
    }
}
