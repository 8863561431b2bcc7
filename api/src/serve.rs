//! Serving a router on a listener until asked to stop.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::extract::Request;
use axum::response::Response;
use hyper::server::conn::http1;
use hyper_util::rt::TokioIo;
use hyper_util::server::graceful::GracefulShutdown;
use hyper_util::service::TowerToHyperService;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};
use tokio::task::JoinSet;
use tower::ServiceExt as _;

use crate::activity::{Connected, Connections};
use crate::descriptors::Receiving;
use crate::limits::{
    ACCEPT_RETRY, CONNECTIONS_MAX, HEAD_BYTES_MAX, HEADER_READ_TIMEOUT, IDLE_TIMEOUT,
    SHUTDOWN_GRACE,
};
use crate::listen::Listener;
use crate::middleware::Via;
use crate::peer::Peer;

/// The wish that the service stop, which can be uttered once and heard by many.
///
/// ```
/// # tokio::runtime::Builder::new_current_thread().build().unwrap().block_on(async {
/// let shutdown = api::Shutdown::default();
/// let heard = shutdown.clone();
/// let waiting = tokio::spawn(async move { heard.requested().await });
/// shutdown.request();
/// waiting.await.unwrap();
/// # });
/// ```
#[derive(Clone, Debug)]
pub struct Shutdown {
    requested: watch::Sender<bool>,
}

impl Default for Shutdown {
    fn default() -> Self {
        Self {
            requested: watch::Sender::new(false),
        }
    }
}

impl Shutdown {
    /// Asks everything that waits on it to stop.
    pub fn request(&self) {
        self.requested.send_replace(true);
    }

    /// Whether it was asked.
    #[must_use]
    pub fn is_requested(&self) -> bool {
        *self.requested.borrow()
    }

    /// Waits until it is asked.
    pub async fn requested(&self) {
        let mut requested = self.requested.subscribe();
        // The sender lives in `self`, so this cannot fail.
        let _ = requested.wait_for(|requested| *requested).await;
    }
}

/// Bounds on what a client may take, apart from what the router itself limits.
#[derive(Clone, Copy, Debug)]
pub struct Bounds {
    /// Connections at a time.
    pub connections: usize,
    /// For the head of a request to arrive.
    pub header_read_timeout: Duration,
    /// For the next request of a client that has its answer. An idle connection is closed earlier when
    /// another client needs its place.
    pub idle_timeout: Duration,
    /// For requests under way to finish after a shutdown.
    pub shutdown_grace: Duration,
}

/// Those of [`limits`](crate::limits).
impl Default for Bounds {
    fn default() -> Self {
        Self {
            connections: CONNECTIONS_MAX,
            header_read_timeout: HEADER_READ_TIMEOUT,
            idle_timeout: IDLE_TIMEOUT,
            shutdown_grace: SHUTDOWN_GRACE,
        }
    }
}

/// Serves `router` on `listener` until `shutdown` is requested; then accepts no more, lets requests under way
/// finish for [`SHUTDOWN_GRACE`], and lets go of the listener.
pub async fn serve(listener: Listener, router: Router, shutdown: Shutdown) {
    serve_within(listener, router, shutdown, Bounds::default()).await;
}

/// Like [`serve`], with other limits.
pub async fn serve_within(listener: Listener, router: Router, shutdown: Shutdown, bounds: Bounds) {
    let room = Arc::new(Semaphore::new(bounds.connections));
    let open = Connections::default();
    let mut number = 0_u64;
    let graceful = GracefulShutdown::new();
    let mut connections = JoinSet::new();
    let via = match &listener {
        Listener::Unix(_) => Via::Unix,
        Listener::Tcp(socket) => Via::Tcp(socket.access.clone()),
    };
    let place = listener.place();
    tracing::info!(%place, "serving the API");
    loop {
        let accepted = tokio::select! {
            () = shutdown.requested() => break,
            accepted = accept(&listener, &room, &open) => accepted,
        };
        // Not a branch above: it would drop a client that is accepted and waits for a place.
        while connections.try_join_next().is_some() {}
        match accepted {
            Ok((peer, permit)) => {
                number = number.wrapping_add(1);
                let entry = open.add(number);
                let connection = connection(peer, via.clone(), &router, &graceful, bounds, entry);
                connections.spawn(hold(permit, connection));
            }
            Err(error) => {
                // Out of file descriptors or memory: it passes when a connection ends. A client that gave up
                // before it was accepted costs one pause.
                tracing::warn!(%place, %error, "cannot accept a connection");
                tokio::time::sleep(ACCEPT_RETRY).await;
            }
        }
    }
    if tokio::time::timeout(bounds.shutdown_grace, graceful.shutdown())
        .await
        .is_err()
    {
        tracing::warn!(%place, connections = connections.len(), "requests did not finish in time");
    }
    connections.shutdown().await;
    drop(listener);
    tracing::info!(%place, "no longer serving the API");
}

/// Returns the next connection, once there is room for it.
///
/// The client is accepted first, so that no idle connection is closed before another one needs its
/// place. One connection more than the limit is therefore open for a short time.
async fn accept(
    listener: &Listener,
    room: &Arc<Semaphore>,
    open: &Connections,
) -> io::Result<(Peer, OwnedSemaphorePermit)> {
    let peer = match listener {
        Listener::Unix(socket) => Peer::Unix(Arc::new(socket.accept().await?)),
        Listener::Tcp(socket) => {
            let (stream, _) = socket.listener.accept().await?;
            // Answers are small, and each is waited for. Without it they come later, no more.
            if let Err(error) = stream.set_nodelay(true) {
                tracing::debug!(%error, "cannot turn Nagle's algorithm off");
            }
            Peer::Tcp(Arc::new(stream))
        }
    };
    if let Ok(permit) = room.clone().try_acquire_owned() {
        return Ok((peer, permit));
    }
    loop {
        open.close_longest_idle();
        tokio::select! {
            permit = room.clone().acquire_owned() => {
                return Ok((peer, permit.map_err(io::Error::other)?));
            }
            // All were busy, and one of them is not any more.
            () = open.one_is_idle() => {}
        }
    }
}

async fn hold(permit: OwnedSemaphorePermit, connection: impl Future<Output = ()>) {
    connection.await;
    drop(permit);
}

/// Serves one connection to its end, or to the end of its request once a shutdown is under way. Each
/// request carries the transport that it came over, the descriptors that came along, and its client.
fn connection(
    peer: Peer,
    via: Via,
    router: &Router,
    graceful: &GracefulShutdown,
    bounds: Bounds,
    entry: Connected,
) -> impl Future<Output = ()> + Send + 'static {
    let stream = Receiving::new(peer.clone(), entry.activity.clone());
    let arrived = stream.arrived();
    let (begins, answers) = (entry.activity.clone(), entry.activity.clone());
    let service = router
        .clone()
        .map_request(move |request: Request<_>| {
            begins.begin();
            let mut request = request.map(axum::body::Body::new);
            request.extensions_mut().insert(via.clone());
            request.extensions_mut().insert(arrived.enclose());
            request.extensions_mut().insert(peer.clone());
            request
        })
        .map_response(move |response: Response| response.map(|body| answers.until_sent(body)));
    let connection = http1::Builder::new()
        .max_header_size(HEAD_BYTES_MAX)
        // Some clients end their side once the request is sent, and still want the answer.
        .half_close(true)
        // Some clients look for `Content-Length` in just this spelling.
        .title_case_headers(true)
        .serve_connection(TokioIo::new(stream), TowerToHyperService::new(service));
    let connection = graceful.watch(connection);
    async move {
        tokio::select! {
            served = connection => {
                if let Err(error) = served {
                    tracing::debug!(%error, "a connection ended early");
                }
            }
            () = entry.activity.expired(bounds) => {
                tracing::debug!("closed a connection whose client was silent");
            }
        }
    }
}
