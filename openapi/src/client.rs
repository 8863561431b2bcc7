//! Requests and answers over HTTP/1.1, on connections that are reused.

use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use http::header::{ACCEPT, AUTHORIZATION, CONTENT_TYPE, HOST};
use http::{Request, Response, StatusCode};
use http_body_util::{BodyExt as _, Full, Limited};
use hyper::body::{Bytes, Incoming};
use hyper::client::conn::http1::{SendRequest, handshake};
use hyper_util::rt::TokioIo;
use serde::de::DeserializeOwned;
use spec::{ApiToken, Problem};
use tokio::net::{TcpStream, UnixStream};

use crate::error::ClientError;
use crate::operations::Operation;

/// The time limit of a call, from the connection to the end of the answer.
pub const DEFAULT_TIMEOUT: Duration = Duration::from_secs(60);

/// Maximum length of an answer, in bytes.
const ANSWER_LEN: usize = 64 << 20;

/// Maximum number of idle connections.
const IDLE: usize = 8;

/// How long a connection stays idle. A service closes idle connections, too, and one that is about to
/// close may take a request and not answer it.
const IDLE_TIME: Duration = Duration::from_secs(10);

/// Maximum number of characters of an unexpected answer in an error.
const EXCERPT: usize = 200;

/// The code of an error of Cloud Hypervisor, whose errors have none.
const FOREIGN: &str = "cloud-hypervisor";

type Connection = SendRequest<Full<Bytes>>;

#[derive(Clone, Debug)]
enum Place {
    Unix(PathBuf),
    Tcp(SocketAddr),
}

/// The service's socket when none is named: `whimbrel.sock` in `$XDG_RUNTIME_DIR`, or in `/run`.
#[must_use]
pub fn default_socket() -> PathBuf {
    let runtime = std::env::var_os("XDG_RUNTIME_DIR").filter(|dir| !dir.is_empty());
    runtime
        .map_or_else(|| PathBuf::from("/run"), PathBuf::from)
        .join("whimbrel.sock")
}

/// A client of a service. Cheap to clone; concurrent calls use a connection each.
///
/// Each operation of the [document](crate::DOCUMENT) has a method. Methods that begin with `vms_` name a VM and
/// are for the service's own socket; those that begin with `vm_` are Cloud Hypervisor's and for a socket that
/// serves one VM. Must be used within a tokio runtime.
#[derive(Clone, Debug)]
pub struct Client {
    place: Place,
    timeout: Duration,
    token: Option<Arc<ApiToken>>,
    waits: bool,
    /// Idle connections, and since when they are idle.
    idle: Arc<Mutex<Vec<(Instant, Connection)>>>,
}

impl Client {
    /// Returns a client of the service at a unix socket. It connects at the first call.
    pub fn unix(path: impl Into<PathBuf>) -> Self {
        Self::at(Place::Unix(path.into()))
    }

    /// Returns a client of the service at a TCP address. It connects at the first call.
    #[must_use]
    pub fn tcp(address: SocketAddr) -> Self {
        Self::at(Place::Tcp(address))
    }

    fn at(place: Place) -> Self {
        Self {
            place,
            timeout: DEFAULT_TIMEOUT,
            token: None,
            waits: false,
            idle: Arc::default(),
        }
    }

    /// Sets the time limit of a call.
    #[must_use]
    pub fn with_timeout(mut self, timeout: Duration) -> Self {
        self.timeout = timeout;
        self
    }

    /// Asks for answers when an operation is over (`Prefer: wait`, RFC 7240) where a service would answer
    /// when it has started. Sets the time limit of a call, too.
    #[must_use]
    pub fn waiting(mut self, timeout: Duration) -> Self {
        self.waits = true;
        self.with_timeout(timeout)
    }

    /// Shows this token with each request, which services ask for over TCP.
    #[must_use]
    pub fn with_token(mut self, token: ApiToken) -> Self {
        self.token = Some(Arc::new(token));
        self
    }

    /// Returns the service's address for a message.
    #[must_use]
    pub fn place(&self) -> String {
        match &self.place {
            Place::Unix(path) => path.display().to_string(),
            Place::Tcp(address) => format!("http://{address}"),
        }
    }

    /// Sends a request and reads the whole answer, which must be the JSON of a `T` or, for `()`, nothing.
    pub(crate) async fn call<T: DeserializeOwned>(
        &self,
        operation: &'static Operation,
        target: String,
        body: Option<serde_json::Result<Vec<u8>>>,
    ) -> Result<T, ClientError> {
        let (status, bytes) = self.exchange(operation, target, body).await?;
        let json = if bytes.is_empty() {
            b"null"
        } else {
            &bytes[..]
        };
        spec::parse_response(json).map_err(|_| self.not_understood(operation, status, &bytes))
    }

    /// Sends a request and reads the whole answer, unless it is a refusal.
    pub(crate) async fn exchange(
        &self,
        operation: &'static Operation,
        target: String,
        body: Option<serde_json::Result<Vec<u8>>>,
    ) -> Result<(StatusCode, Bytes), ClientError> {
        let request = self.request(operation, &target, body)?;
        let exchange = async {
            let (response, connection) = self.send(operation, request).await?;
            let answer = self.read(operation, response).await?;
            self.keep(connection);
            Ok(answer)
        };
        let (status, bytes) = match tokio::time::timeout(self.timeout, exchange).await {
            Ok(answer) => answer?,
            Err(_) => return Err(self.too_late(operation)),
        };
        if status.is_success() {
            return Ok((status, bytes));
        }
        Err(self.refused(operation, status, &bytes))
    }

    fn request(
        &self,
        operation: &'static Operation,
        target: &str,
        body: Option<serde_json::Result<Vec<u8>>>,
    ) -> Result<Request<Full<Bytes>>, ClientError> {
        let unsendable = |reason: String| ClientError::Unsendable {
            operation: operation.id,
            reason,
        };
        let host = match &self.place {
            Place::Unix(_) => "localhost".to_owned(),
            Place::Tcp(address) => address.to_string(),
        };
        let mut request = Request::builder()
            .method(operation.method)
            .uri(target)
            .header(HOST, host)
            .header(ACCEPT, operation.accept());
        if self.waits {
            request = request.header("prefer", format!("wait={}", self.timeout.as_secs()));
        }
        if let Some(token) = &self.token {
            request = request.header(AUTHORIZATION, format!("Bearer {}", token.as_str()));
        }
        let body = match body {
            None => Full::default(),
            Some(body) => {
                request = request.header(CONTENT_TYPE, "application/json");
                Full::from(body.map_err(|error| unsendable(error.to_string()))?)
            }
        };
        request
            .body(body)
            .map_err(|error| unsendable(error.to_string()))
    }

    /// Sends a request on an idle connection, or on a new one.
    pub(crate) async fn send(
        &self,
        operation: &'static Operation,
        mut request: Request<Full<Bytes>>,
    ) -> Result<(Response<Incoming>, Connection), ClientError> {
        let broken = |source| ClientError::Broken {
            place: self.place(),
            operation: operation.id,
            source,
        };
        while let Some(mut kept) = self.kept() {
            match kept.try_send_request(request).await {
                Ok(response) => return Ok((response, kept)),
                // The service closed the idle connection and has not seen the request: send it again.
                Err(mut error) => match error.take_message() {
                    Some(unsent) => request = unsent,
                    None => return Err(broken(error.into_error())),
                },
            }
        }
        let mut new = self.connect(operation).await?;
        let response = new.send_request(request).await.map_err(broken)?;
        Ok((response, new))
    }

    async fn connect(&self, operation: &'static Operation) -> Result<Connection, ClientError> {
        let connected = match &self.place {
            Place::Unix(path) => match UnixStream::connect(path).await {
                Ok(stream) => handshake(TokioIo::new(stream))
                    .await
                    .map(|(sender, connection)| {
                        tokio::spawn(connection);
                        sender
                    }),
                Err(error) => return Err(self.unreachable(error)),
            },
            Place::Tcp(address) => match TcpStream::connect(address).await {
                Ok(stream) => handshake(TokioIo::new(stream))
                    .await
                    .map(|(sender, connection)| {
                        tokio::spawn(connection);
                        sender
                    }),
                Err(error) => return Err(self.unreachable(error)),
            },
        };
        connected.map_err(|source| ClientError::Broken {
            place: self.place(),
            operation: operation.id,
            source,
        })
    }

    async fn read(
        &self,
        operation: &'static Operation,
        response: Response<Incoming>,
    ) -> Result<(StatusCode, Bytes), ClientError> {
        let status = response.status();
        match Limited::new(response.into_body(), ANSWER_LEN)
            .collect()
            .await
        {
            Ok(body) => Ok((status, body.to_bytes())),
            Err(error) => Err(match error.downcast::<hyper::Error>() {
                Ok(source) => ClientError::Broken {
                    place: self.place(),
                    operation: operation.id,
                    source: *source,
                },
                Err(too_long) => {
                    self.not_understood(operation, status, too_long.to_string().as_bytes())
                }
            }),
        }
    }

    fn kept(&self) -> Option<Connection> {
        let mut idle = self.idle.lock().unwrap_or_else(PoisonError::into_inner);
        idle.retain(|(since, _)| since.elapsed() < IDLE_TIME);
        idle.pop().map(|(_, kept)| kept)
    }

    fn keep(&self, connection: Connection) {
        let mut idle = self.idle.lock().unwrap_or_else(PoisonError::into_inner);
        idle.retain(|(_, kept)| !kept.is_closed());
        if idle.len() < IDLE && !connection.is_closed() {
            idle.push((Instant::now(), connection));
        }
    }

    fn unreachable(&self, source: io::Error) -> ClientError {
        let place = self.place();
        if source.kind() == io::ErrorKind::PermissionDenied {
            ClientError::Forbidden { place }
        } else {
            ClientError::NoService { place, source }
        }
    }

    pub(crate) fn too_late(&self, operation: &'static Operation) -> ClientError {
        ClientError::Timeout {
            place: self.place(),
            operation: operation.id,
            after: self.timeout,
        }
    }

    pub(crate) fn refused(
        &self,
        operation: &'static Operation,
        status: StatusCode,
        body: &[u8],
    ) -> ClientError {
        if let Ok(problem) = serde_json::from_slice::<Problem>(body) {
            return ClientError::Problem(Box::new(problem));
        }
        // Cloud Hypervisor itself answers with its causes, outermost first, and no code.
        match serde_json::from_slice::<Vec<String>>(body) {
            Ok(causes) if !causes.is_empty() => {
                let title = status.canonical_reason().unwrap_or("Error");
                let detail = causes.join(": ");
                let problem = Problem::new(status.as_u16(), title, FOREIGN, detail);
                ClientError::Problem(Box::new(problem))
            }
            _ => self.not_understood(operation, status, body),
        }
    }

    pub(crate) fn not_understood(
        &self,
        operation: &'static Operation,
        status: StatusCode,
        body: &[u8],
    ) -> ClientError {
        let body = String::from_utf8_lossy(body)
            .chars()
            .take(EXCERPT)
            .collect();
        ClientError::NotUnderstood {
            place: self.place(),
            operation: operation.id,
            status,
            body,
        }
    }

    /// Sends a request whose answer is a stream, and waits for the head of the answer.
    pub(crate) async fn open(
        &self,
        operation: &'static Operation,
        target: &str,
    ) -> Result<(Incoming, Connection), ClientError> {
        let request = self.request(operation, target, None)?;
        let opening = async {
            let (response, connection) = self.send(operation, request).await?;
            if response.status().is_success() {
                return Ok((response.into_body(), connection));
            }
            let (status, body) = self.read(operation, response).await?;
            Err(self.refused(operation, status, &body))
        };
        match tokio::time::timeout(self.timeout, opening).await {
            Ok(opened) => opened,
            Err(_) => Err(self.too_late(operation)),
        }
    }
}
