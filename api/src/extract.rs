//! From requests to types, with refusals that help.

use std::os::fd::OwnedFd;

use axum::body::Bytes;
use axum::extract::{FromRequest, FromRequestParts, Path, Request};
use control::RequestError;
use http::header::CONTENT_TYPE;
use http::request::Parts;
use http::{HeaderMap, StatusCode};
use http_body_util::{BodyExt as _, Collected};
use serde::de::DeserializeOwned;
use spec::{
    AwaitMigration, Descriptors, FieldProblem, NetConfig, ParseError, ReceiveMigrationData,
    RestoreConfig, RestoredNetConfig, VmId,
};

use crate::descriptors::Enclosed;
use crate::errors::Face;
use crate::problem::ApiError;

/// The body of a request, as JSON.
pub(crate) struct Json<T>(pub(crate) T);

impl<S: Send + Sync, T: DeserializeOwned> FromRequest<S> for Json<T> {
    type Rejection = ApiError;

    async fn from_request(request: Request, _state: &S) -> Result<Self, ApiError> {
        let (body, descriptors) = parsed(request).await?;
        if !descriptors.is_empty() {
            return Err(ApiError::new(
                StatusCode::BAD_REQUEST,
                "unexpected-descriptors",
                "the request accepts no descriptors: only a request that adds a network interface \
                 does, or one for a guest with interfaces (`net_fds`), for the queues of their taps",
            ));
        }
        Ok(Self(body))
    }
}

/// A network interface as JSON, with its tap if that came along.
pub(crate) struct JsonAndTap(pub(crate) NetConfig);

impl<S: Send + Sync> FromRequest<S> for JsonAndTap {
    type Rejection = ApiError;

    async fn from_request(request: Request, _state: &S) -> Result<Self, ApiError> {
        let (mut net, descriptors) = parsed::<NetConfig>(request).await?;
        // As in Cloud Hypervisor, numbers in the body say nothing beside them.
        if !descriptors.is_empty() {
            net.fds = Some(Descriptors::new(descriptors));
        }
        Ok(Self(net))
    }
}

/// A request for a guest, whose interfaces may get descriptors (`net_fds`).
pub(crate) trait TakesTaps {
    fn net_fds(&mut self) -> &mut [RestoredNetConfig];
}

macro_rules! takes_taps {
    ($($body:ty),*) => {
        $(
            impl TakesTaps for $body {
                fn net_fds(&mut self) -> &mut [RestoredNetConfig] {
                    self.net_fds.as_deref_mut().unwrap_or_default()
                }
            }
        )*
    };
}

takes_taps!(AwaitMigration, ReceiveMigrationData, RestoreConfig);

/// A request for a guest as JSON, with the taps of its interfaces if they came along.
pub(crate) struct JsonAndTaps<T>(pub(crate) T);

impl<S: Send + Sync, T: DeserializeOwned + TakesTaps> FromRequest<S> for JsonAndTaps<T> {
    type Rejection = ApiError;

    async fn from_request(request: Request, _state: &S) -> Result<Self, ApiError> {
        let (mut body, descriptors) = parsed::<T>(request).await?;
        let nets = body.net_fds();
        let wanted = nets.iter().map(|net| net.num_fds);
        let wanted = wanted.fold(0, usize::saturating_add);
        if wanted != descriptors.len() {
            let detail = format!(
                "`net_fds` asks for {wanted} descriptors (the sum of `num_fds`), and {} came with the \
                 request: send one for each queue pair over a unix socket (SCM_RIGHTS)",
                descriptors.len()
            );
            let code = "unexpected-descriptors";
            return Err(ApiError::new(StatusCode::BAD_REQUEST, code, detail));
        }
        let mut all = descriptors.into_iter();
        for net in nets {
            let its = all.by_ref().take(net.num_fds).collect();
            net.fds = Some(Descriptors::new(its));
        }
        Ok(Self(body))
    }
}

async fn parsed<T: DeserializeOwned>(request: Request) -> Result<(T, Vec<OwnedFd>), ApiError> {
    check_content_type(request.headers())?;
    let enclosed = request.extensions().get::<Enclosed>().cloned();
    let face = request.extensions().get::<Face>().copied();
    let body = bytes(request).await?;
    let descriptors = enclosed.map(|enclosed| enclosed.take());
    if body.is_empty() {
        return Err(ApiError::new(
            StatusCode::BAD_REQUEST,
            "missing-body",
            "the request has no body; send a JSON object, with its length in Content-Length",
        ));
    }
    let read = match face {
        Some(Face::CloudHypervisor) => spec::parse_compatible(&body),
        Some(Face::Service) | None => spec::parse(&body),
    };
    let body = read.map_err(|error| not_understood(&error))?;
    Ok((body, descriptors.unwrap_or_default()))
}

/// Clients of Cloud Hypervisor's API send no type at all, and `curl --data` sends that of a form: a type is
/// refused only when it is certainly something else.
fn check_content_type(headers: &HeaderMap) -> Result<(), ApiError> {
    const TAKEN: &[&str] = &[
        "application/json",
        "application/x-www-form-urlencoded",
        "application/octet-stream",
        "text/plain",
    ];
    let Some(sent) = headers.get(CONTENT_TYPE) else {
        return Ok(());
    };
    let sent = sent.to_str().unwrap_or_default();
    let essence = sent
        .split(';')
        .next()
        .unwrap_or_default()
        .trim()
        .to_ascii_lowercase();
    if essence.is_empty() || TAKEN.contains(&essence.as_str()) || essence.ends_with("+json") {
        return Ok(());
    }
    Err(ApiError::new(
        StatusCode::UNSUPPORTED_MEDIA_TYPE,
        "unsupported-media-type",
        format!("the Content-Type is {sent}; send JSON (Content-Type: application/json, or none)"),
    ))
}

/// Returns the body, which [`body::read`](crate::body::read) has read before the router.
async fn bytes(request: Request) -> Result<Bytes, ApiError> {
    let body = request.into_body().collect().await;
    body.map(Collected::to_bytes).map_err(|error| {
        ApiError::new(
            StatusCode::BAD_REQUEST,
            "incomplete-body",
            format!("the body did not arrive completely: {error}"),
        )
    })
}

/// A body that is no JSON, or not the JSON that was asked for.
fn not_understood(error: &ParseError) -> ApiError {
    let fields = match error {
        ParseError::Malformed { .. } => Vec::new(),
        ParseError::UnknownField { .. } | ParseError::Invalid { .. } => vec![FieldProblem {
            pointer: error.pointer().to_owned(),
            code: error.code().to_owned(),
            detail: error.to_string(),
        }],
    };
    ApiError::with_fields(
        StatusCode::BAD_REQUEST,
        error.code(),
        error.to_string(),
        fields,
    )
}

/// The VM that a path names.
pub(crate) struct Named(pub(crate) VmId);

impl<S: Send + Sync> FromRequestParts<S> for Named {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, ApiError> {
        // What cannot be a name is the name of nothing.
        match Path::<String>::from_request_parts(parts, state).await {
            Ok(Path(name)) => match name.parse() {
                Ok(id) => Ok(Self(id)),
                Err(_) => Err(RequestError::no_such_vm(&excerpt(&name)).into()),
            },
            Err(_) => Err(RequestError::no_such_vm(&excerpt(parts.uri.path())).into()),
        }
    }
}

/// The VM and its disk that a path names.
pub(crate) struct NamedDisk(pub(crate) VmId, pub(crate) String);

impl<S: Send + Sync> FromRequestParts<S> for NamedDisk {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, ApiError> {
        let no_such_vm = |name: &str| RequestError::no_such_vm(&excerpt(name));
        let named = Path::<(String, String)>::from_request_parts(parts, state).await;
        let Path((vm, disk)) = named.map_err(|_| no_such_vm(parts.uri.path()))?;
        let vm = vm.parse().map_err(|_| no_such_vm(&vm))?;
        Ok(Self(vm, excerpt(&disk)))
    }
}

/// The name that a path gives to a VM that may not exist yet.
pub(crate) struct NewName(pub(crate) VmId);

impl<S: Send + Sync> FromRequestParts<S> for NewName {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, ApiError> {
        let path = Path::<String>::from_request_parts(parts, state).await;
        let name = path.map_or_else(|_| parts.uri.path().to_owned(), |Path(name)| name);
        let id = name.parse().map_err(|error: spec::InvalidVmId| {
            let detail = format!("a VM cannot have the name {:?}: {error}", excerpt(&name));
            ApiError::new(StatusCode::UNPROCESSABLE_ENTITY, "invalid-name", detail)
        })?;
        Ok(Self(id))
    }
}

/// Returns the start of a client's text, for an error message.
fn excerpt(text: &str) -> String {
    text.chars().take(spec::limits::VM_ID_LEN).collect()
}
