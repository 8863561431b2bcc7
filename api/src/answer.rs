//! Bodies of answers, and the answers that commands on both faces share.

use axum::response::{IntoResponse, Response};
use control::Reply;
use http::header::CONTENT_TYPE;
use http::{HeaderValue, StatusCode};
use serde::Serialize;

use crate::json::ascii_json;
use crate::problem::ApiError;

/// A value to answer with, as JSON.
pub(crate) struct Answer<T>(pub(crate) T);

impl<T: Serialize> IntoResponse for Answer<T> {
    fn into_response(self) -> Response {
        match ascii_json(&self.0) {
            Ok(body) => {
                let content_type = HeaderValue::from_static("application/json");
                ([(CONTENT_TYPE, content_type)], body).into_response()
            }
            Err(error) => ApiError::new(
                StatusCode::INTERNAL_SERVER_ERROR,
                "internal-error",
                format!("the answer could not be written as JSON: {error}"),
            )
            .into_response(),
        }
    }
}

/// Answers with the reply of a VM's driver: 200 with the value that it carries, 204 without one.
pub(crate) fn reply(reply: Reply) -> Response {
    match reply {
        Reply::Done => StatusCode::NO_CONTENT.into_response(),
        Reply::Added(device) => Answer(device).into_response(),
        Reply::Counters(counters) => Answer(counters).into_response(),
        Reply::MemoryMap(map) => Answer(map).into_response(),
        Reply::Cpu(cpu) => Answer(cpu).into_response(),
    }
}
