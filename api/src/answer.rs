//! Bodies of answers, and the answers that commands on both faces share.

use axum::response::{IntoResponse, Response};
use control::Reply;
use http::header::CONTENT_TYPE;
use http::{HeaderValue, StatusCode};
use serde::Serialize;
use spec::PciDeviceInfo;

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

/// Answers 204: the command was done.
pub(crate) fn done(_: Reply) -> Result<Response, ApiError> {
    Ok(StatusCode::NO_CONTENT.into_response())
}

/// Answers 200 with the device's address if a running guest got it, and 204 if the VM gets it at its
/// next boot.
pub(crate) fn added(reply: Reply) -> Result<Response, ApiError> {
    match reply {
        Reply::Added(device) => Ok(Answer::<PciDeviceInfo>(device).into_response()),
        Reply::Done => done(reply),
        Reply::Counters(_) | Reply::MemoryMap(_) | Reply::Cpu(_) => Err(unexpected_reply()),
    }
}

/// Answers 200 with the counters of the VM's devices.
pub(crate) fn counters(reply: Reply) -> Result<Response, ApiError> {
    match reply {
        Reply::Counters(counters) => Ok(Answer(counters).into_response()),
        Reply::Done | Reply::Added(_) | Reply::MemoryMap(_) | Reply::Cpu(_) => {
            Err(unexpected_reply())
        }
    }
}

/// Answers 200 with the VM's address spaces.
pub(crate) fn memory_map(reply: Reply) -> Result<Response, ApiError> {
    match reply {
        Reply::MemoryMap(map) => Ok(Answer(map).into_response()),
        Reply::Done | Reply::Added(_) | Reply::Counters(_) | Reply::Cpu(_) => {
            Err(unexpected_reply())
        }
    }
}

/// Answers 200 with what the guest sees of its CPUs.
pub(crate) fn cpu(reply: Reply) -> Result<Response, ApiError> {
    match reply {
        Reply::Cpu(cpu) => Ok(Answer(*cpu).into_response()),
        Reply::Done | Reply::Added(_) | Reply::Counters(_) | Reply::MemoryMap(_) => {
            Err(unexpected_reply())
        }
    }
}

fn unexpected_reply() -> ApiError {
    ApiError::new(
        StatusCode::INTERNAL_SERVER_ERROR,
        "internal-error",
        "the VM's driver sent a reply that does not belong to the request",
    )
}
