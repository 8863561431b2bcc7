//! A service of fake drivers, and ways to talk to it.

#![allow(
    dead_code,
    unreachable_pub,
    reason = "each test program uses its own part of this"
)]
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]

use std::sync::LazyLock;
use std::time::Duration;

use api::{Bounds, Listener, Service, serve_within};
use axum::Router;
use axum::body::Body;
use control::Registry;
use control::fake::Fake;
use http::{HeaderMap, Request, StatusCode};
use http_body_util::BodyExt as _;
use serde_json::Value;
use spec::{VmId, VmmPingResponse};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::UnixStream;
use tower::ServiceExt as _;

/// The least that makes a VM.
pub const CONFIG: &str = r#"{"payload": {"kernel": "/boot/vmlinux"}}"#;

pub fn service(fake: Fake) -> Service {
    let about = VmmPingResponse {
        build_version: "v1.2.3-4-gabcdef".to_owned(),
        version: "1.2.3".to_owned(),
        pid: 42,
        features: vec!["kvm".to_owned()],
    };
    Service::new(Registry::new(fake), about)
}

/// Cloud Hypervisor's face of one VM.
pub fn one_vm(service: &Service) -> Router {
    service.vm_router(&"vm".parse::<VmId>().unwrap(), service.shutdown())
}

#[derive(Debug)]
pub struct Answer {
    pub status: StatusCode,
    pub headers: HeaderMap,
    pub text: String,
}

impl Answer {
    pub fn header(&self, name: &str) -> &str {
        self.headers
            .get(name)
            .map_or("", |value| value.to_str().unwrap())
    }

    pub fn json(&self) -> Value {
        serde_json::from_str(&self.text).unwrap_or_else(|error| panic!("{error} in {self:?}"))
    }

    /// Returns the code of a problem; checks the members that every problem has.
    pub fn code(&self) -> String {
        assert_eq!(
            self.header("content-type"),
            "application/problem+json",
            "{self:?}"
        );
        let problem: spec::Problem = serde_json::from_str(&self.text).unwrap();
        assert_eq!(problem.status, self.status.as_u16());
        assert_eq!(Some(problem.title.as_str()), self.status.canonical_reason());
        assert!(problem.detail.len() > 10, "{problem:?}");
        problem.code
    }
}

/// Sends a request past all sockets, and checks that the document knows of such an answer.
pub async fn send(router: &Router, mut request: Request<Body>) -> Answer {
    // Both faces have the same codes then.
    let accept = http::HeaderValue::from_static("application/json, application/problem+json");
    request.headers_mut().entry("accept").or_insert(accept);
    let (method, path) = (
        request.method().as_str().to_lowercase(),
        request.uri().path().to_owned(),
    );
    let response = router.clone().oneshot(request).await.unwrap();
    let (parts, body) = response.into_parts();
    let bytes = body.collect().await.unwrap().to_bytes();
    let text = String::from_utf8(bytes.into()).unwrap();
    // The other face has the path.
    if let Some(answers) = described(&method, &path).filter(|_| !text.contains("no-such-path")) {
        let status = parts.status.as_str().to_owned();
        assert!(
            answers.contains(&status),
            "{method} {path} is not said to answer {status}"
        );
    }
    Answer {
        status: parts.status,
        headers: parts.headers,
        text,
    }
}

/// The statuses that an operation is said to have; nothing if there is no such operation.
fn described(method: &str, path: &str) -> Option<Vec<String>> {
    static DOCUMENT: LazyLock<Value> =
        LazyLock::new(|| serde_json::to_value(api::document()).unwrap());
    let fits = |template: &str| {
        let (given, template) = (path.split('/'), template.split('/'));
        given.clone().count() == template.clone().count()
            && given
                .zip(template)
                .all(|(given, part)| part == "{id}" || part == given)
    };
    let mut paths = DOCUMENT["paths"].as_object().unwrap().iter();
    let (_, operations) = paths.find(|(template, _)| fits(template))?;
    let answers = operations.get(method)?["responses"].as_object().unwrap();
    Some(answers.keys().cloned().collect())
}

/// The same from the beginning of a request line, `PUT /api/v1/vm.boot`, and a body, which may be empty.
pub async fn call(router: &Router, line: &str, body: &str) -> Answer {
    let (method, path) = line.split_once(' ').unwrap();
    let request = Request::builder().method(method).uri(path);
    send(router, request.body(Body::from(body.to_owned())).unwrap()).await
}

pub async fn expect(router: &Router, line: &str, body: &str, status: u16) -> Answer {
    let answer = call(router, line, body).await;
    assert_eq!(answer.status.as_u16(), status, "{line}: {answer:?}");
    answer
}

/// A served socket in a directory that goes with it.
pub struct Served {
    pub directory: tempfile::TempDir,
    pub service: Service,
    pub serving: tokio::task::JoinHandle<()>,
}

impl Served {
    pub fn path(&self) -> std::path::PathBuf {
        self.directory.path().join("api.sock")
    }

    pub fn start(service: &Service, router: Router, bounds: Bounds) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let listener = Listener::unix(directory.path().join("api.sock")).unwrap();
        let serving = tokio::spawn(serve_within(
            listener,
            router,
            service.shutdown().clone(),
            bounds,
        ));
        Self {
            directory,
            service: service.clone(),
            serving,
        }
    }

    pub async fn connect(&self) -> UnixStream {
        UnixStream::connect(self.path()).await.unwrap()
    }

    /// Writes these bytes on a new connection and reads what comes until the service ends it or is silent.
    pub async fn exchange(&self, bytes: &str) -> String {
        let mut stream = self.connect().await;
        stream.write_all(bytes.as_bytes()).await.unwrap();
        read_for(&mut stream, Duration::from_millis(300)).await
    }
}

/// Reads until the other side ends or is silent for so long.
pub async fn read_for(stream: &mut UnixStream, silence: Duration) -> String {
    let mut read = Vec::new();
    let mut piece = [0; 4096];
    while let Ok(Ok(length)) = tokio::time::timeout(silence, stream.read(&mut piece)).await {
        if length == 0 {
            break;
        }
        read.extend_from_slice(&piece[..length]);
    }
    String::from_utf8(read).unwrap()
}
