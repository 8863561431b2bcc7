//! Reading the bodies of requests.
//!
//! Each body is read to its end before its request is handled, also where the request takes none. A
//! client that still writes when its connection is closed gets a broken pipe in place of the answer.

use axum::body::{Body, Bytes, HttpBody as _};
use axum::extract::Request;
use http::header::{CONTENT_LENGTH, EXPECT};
use http::{HeaderMap, StatusCode};
use http_body_util::{BodyExt as _, LengthLimitError, Limited};
use spec::limits::BODY_LEN;

use crate::limits::{BODY_READ_TIMEOUT, DISCARDED_BYTES_MAX};
use crate::problem::ApiError;

/// Returns the request with all of its body in memory.
///
/// # Errors
/// The body is too long, too slow, or incomplete. A body that is too long has been discarded up to
/// its end, if that is near.
pub(crate) async fn read(request: Request) -> Result<Request, ApiError> {
    if request.body().is_end_stream() {
        return Ok(request);
    }
    let (parts, body) = request.into_parts();
    if announced(&parts.headers).is_some_and(|length| length > BODY_LEN as u64) {
        discard(&parts.headers, body).await;
        return Err(too_long());
    }
    let mut body = body;
    let whole = Limited::new(&mut body, BODY_LEN).collect();
    match tokio::time::timeout(BODY_READ_TIMEOUT, whole).await {
        Ok(Ok(whole)) => {
            let whole: Bytes = whole.to_bytes();
            Ok(Request::from_parts(parts, Body::from(whole)))
        }
        Ok(Err(error)) if error.is::<LengthLimitError>() => {
            discard(&parts.headers, body).await;
            Err(too_long())
        }
        Ok(Err(error)) => Err(ApiError::new(
            StatusCode::BAD_REQUEST,
            "incomplete-body",
            format!("the body did not arrive completely: {error}"),
        )),
        Err(_) => Err(ApiError::new(
            StatusCode::REQUEST_TIMEOUT,
            "body-timeout",
            format!(
                "the body did not arrive within {} s",
                BODY_READ_TIMEOUT.as_secs()
            ),
        )),
    }
}

/// Reads and drops a body whose request is refused, so that its sender can read the answer.
///
/// A client that waits for `100 Continue` has sent none of its body and reads the answer at once.
pub(crate) async fn discard(headers: &HeaderMap, mut body: Body) {
    let too_much = announced(headers).is_some_and(|length| length > DISCARDED_BYTES_MAX);
    if too_much || headers.contains_key(EXPECT) {
        return;
    }
    let to_the_end = async {
        let mut left = DISCARDED_BYTES_MAX;
        while let Some(Ok(frame)) = body.frame().await {
            let bytes = frame.data_ref().map_or(0, Bytes::len);
            let Some(rest) = left.checked_sub(bytes as u64) else {
                return;
            };
            left = rest;
        }
    };
    if tokio::time::timeout(BODY_READ_TIMEOUT, to_the_end)
        .await
        .is_err()
    {
        tracing::debug!("the body of a refused request did not end in time");
    }
}

fn announced(headers: &HeaderMap) -> Option<u64> {
    headers.get(CONTENT_LENGTH)?.to_str().ok()?.parse().ok()
}

fn too_long() -> ApiError {
    ApiError::new(
        StatusCode::PAYLOAD_TOO_LARGE,
        "body-too-large",
        format!("the body is longer than the limit, {BODY_LEN} bytes"),
    )
}
