//! Handling that all requests share.

use axum::extract::{Request, State};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use http::header::{ALLOW, AUTHORIZATION, CONTENT_TYPE, HOST, HeaderName, ORIGIN};
use http::uri::Authority;
use http::{HeaderMap, HeaderValue, StatusCode};
use tracing::Instrument as _;

use crate::access::TcpAccess;
use crate::body;
use crate::errors::{Face, as_strings, show_states, wants_problems};
use crate::limits::REQUEST_ID_BYTES_MAX;
use crate::problem::ApiError;
use crate::request_counts::Requests;

const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");

/// The transport of a request.
#[derive(Clone, Debug)]
pub(crate) enum Via {
    /// A unix socket, which only its owner can open.
    Unix,
    /// TCP on loopback, which every program of the host can open, browsers too.
    Tcp(TcpAccess),
}

/// Runs a request in a task of its own, under a name that its logs and its answer carry.
///
/// A panic ends that task alone, and a client that hangs up does not leave a command half way.
///
/// The body is read first, so that a request is answered only when its client has sent all of it.
pub(crate) async fn envelope(
    State((face, requests)): State<(Face, Requests)>,
    mut request: Request,
    next: Next,
) -> Response {
    request.extensions_mut().insert(face);
    let strings = face == Face::CloudHypervisor && !wants_problems(request.headers());
    let id = request_id(request.headers());
    let method = request.method().clone();
    let path = request.uri().path().to_owned();
    let span = tracing::info_span!("request", id = id.to_str().unwrap_or_default(), %method, path);
    let mut response = match admit(request).await {
        Err(refusal) => refusal.into_response(),
        Ok(request) => match tokio::spawn(next.run(request).instrument(span.clone())).await {
            Ok(response) => response,
            Err(error) => failed(&error).into_response(),
        },
    };
    // The router refuses a method with the list of those that would do, and no body.
    if response.status() == StatusCode::METHOD_NOT_ALLOWED
        && !response.headers().contains_key(CONTENT_TYPE)
        && let Some(allow) = response.headers_mut().remove(ALLOW)
    {
        response = ApiError::method_not_allowed(&method, &path, allow).into_response();
    }
    if face == Face::CloudHypervisor {
        show_states(&mut response);
    }
    if strings {
        as_strings(&mut response, &path);
    }
    response.headers_mut().insert(REQUEST_ID, id);
    requests.count(response.status());
    span.in_scope(|| tracing::debug!(status = response.status().as_u16(), "answered"));
    response
}

fn failed(error: &tokio::task::JoinError) -> ApiError {
    tracing::error!(%error, "a request failed inside the service");
    ApiError::internal()
}

/// The client's own, if it is fit for a log; else a new one.
fn request_id(headers: &HeaderMap) -> HeaderValue {
    headers
        .get(REQUEST_ID)
        .filter(|id| !id.is_empty() && id.len() <= REQUEST_ID_BYTES_MAX)
        .filter(|id| id.as_bytes().iter().all(u8::is_ascii_graphic))
        .cloned()
        .or_else(|| HeaderValue::try_from(uuid::Uuid::new_v4().simple().to_string()).ok())
        .unwrap_or(HeaderValue::from_static("none"))
}

/// Returns a request that may be handled, with its whole body.
async fn admit(request: Request) -> Result<Request, ApiError> {
    if let Err(refusal) = guard(&request) {
        let (parts, body) = request.into_parts();
        body::discard(&parts.headers, body).await;
        return Err(refusal);
    }
    body::read(request).await
}

/// Refuses requests over TCP that come from a web page, or from a program without the token.
///
/// Runs before the router, so that it covers every path: also the document, and paths that are not
/// there, which would otherwise show what a service this is.
fn guard(request: &Request) -> Result<(), ApiError> {
    let Some(Via::Tcp(access)) = request.extensions().get() else {
        return Ok(());
    };
    refuse_web_pages(request.headers())?;
    access.check(request.headers().get(AUTHORIZATION))
}

/// A web page can make a browser send requests to loopback addresses, also under a name of its own that it lets
/// resolve to 127.0.0.1. The browser says so, in `Origin` or `Host`.
fn refuse_web_pages(headers: &HeaderMap) -> Result<(), ApiError> {
    let host = authority(headers.get(HOST)).filter(|host| is_loopback(host.host()));
    let Some(host) = host else {
        return Err(ApiError::new(
            StatusCode::MISDIRECTED_REQUEST,
            "foreign-host",
            "the request's Host is not this host's loopback address; use http://127.0.0.1 or http://localhost",
        ));
    };
    match headers.get(ORIGIN) {
        None => Ok(()),
        Some(origin) if origin.as_bytes() == format!("http://{host}").as_bytes() => Ok(()),
        Some(_) => Err(ApiError::new(
            StatusCode::FORBIDDEN,
            "foreign-origin",
            "the request comes from a web page that is not the service's own",
        )),
    }
}

fn authority(host: Option<&HeaderValue>) -> Option<Authority> {
    host?.to_str().ok()?.parse().ok()
}

fn is_loopback(host: &str) -> bool {
    let bare = host.trim_start_matches('[').trim_end_matches(']');
    bare.eq_ignore_ascii_case("localhost")
        || bare
            .parse::<std::net::IpAddr>()
            .is_ok_and(|address| address.is_loopback())
}

#[cfg(test)]
mod tests {
    use super::*;
    use axum::body::Body;

    fn tcp() -> Via {
        Via::Tcp(TcpAccess::AnyLocalUser)
    }

    fn sent(via: &Via, host: &str, origin: Option<&str>) -> Result<(), StatusCode> {
        let mut request = Request::builder().header(HOST, host);
        if let Some(origin) = origin {
            request = request.header(ORIGIN, origin);
        }
        let mut request = request.body(Body::empty()).unwrap();
        request.extensions_mut().insert(via.clone());
        guard(&request).map_err(|refusal| refusal.status())
    }

    #[test]
    fn web_pages_cannot_drive_the_service() {
        let (misdirected, forbidden) = (StatusCode::MISDIRECTED_REQUEST, StatusCode::FORBIDDEN);
        let table = [
            (tcp(), "127.0.0.1:8080", None, Ok(())),
            (tcp(), "localhost:8080", None, Ok(())),
            (tcp(), "[::1]:8080", None, Ok(())),
            (
                tcp(),
                "127.0.0.1:8080",
                Some("http://127.0.0.1:8080"),
                Ok(()),
            ),
            (
                tcp(),
                "127.0.0.1:8080",
                Some("http://127.0.0.1:3000"),
                Err(forbidden),
            ),
            (
                tcp(),
                "127.0.0.1:8080",
                Some("https://evil.example"),
                Err(forbidden),
            ),
            (tcp(), "127.0.0.1:8080", Some("null"), Err(forbidden)),
            (
                tcp(),
                "evil.example:8080",
                Some("http://evil.example:8080"),
                Err(misdirected),
            ),
            (tcp(), "", None, Err(misdirected)),
            (Via::Unix, "anything", None, Ok(())),
        ];
        for (via, host, origin, expected) in table {
            assert_eq!(
                sent(&via, host, origin),
                expected,
                "{via:?} {host} {origin:?}"
            );
        }
    }

    #[test]
    fn keeps_only_valid_request_ids() {
        let with = |value: &[u8]| {
            let mut headers = HeaderMap::new();
            headers.insert(REQUEST_ID, HeaderValue::from_bytes(value).unwrap());
            request_id(&headers)
        };
        assert_eq!(with(b"trace-17"), "trace-17");
        for unfit in [&b"two words"[..], &[0xfc], b"", &[b'x'; 129]] {
            assert_ne!(with(unfit).as_bytes(), unfit);
        }
        assert_ne!(request_id(&HeaderMap::new()), request_id(&HeaderMap::new()));
    }
}
