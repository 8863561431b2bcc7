//! Operations on the service itself, the same on both faces.

use std::sync::Arc;

use axum::extract::State;
use control::Registry;
use http::StatusCode;
use spec::{VmId, VmmPingResponse};

use crate::answer::Answer;
use crate::problem::ApiError;
use crate::refusals::Failed;
use crate::routes::{Routes, routes};
use crate::serve::Shutdown;
use crate::tags::SERVICE;

/// The part of the service that a socket's client can ping and shut down.
#[derive(Clone)]
pub(crate) struct Vmm {
    pub(crate) about: Arc<VmmPingResponse>,
    pub(crate) registry: Registry,
    pub(crate) scope: Scope,
    pub(crate) shutdown: Shutdown,
}

/// The VMs that end with it.
#[derive(Clone)]
pub(crate) enum Scope {
    All,
    One(VmId),
}

pub(crate) fn routes() -> Routes<Vmm> {
    Routes::default()
        .routes(routes!(ping))
        .routes(routes!(shut_down))
}

/// Check that the service is running, and return its version.
#[utoipa::path(
    get, path = "/api/v1/vmm.ping", operation_id = "ping", tag = SERVICE,
    responses((status = 200, description = "Version and process of the service.", body = VmmPingResponse)),
)]
async fn ping(State(vmm): State<Vmm>) -> Answer<VmmPingResponse> {
    Answer(VmmPingResponse::clone(&vmm.about))
}

/// End the VMM.
///
/// On the service's socket, this ends every VM and then the service. On one VM's socket, this ends
/// that VM and then closes the socket; a program that serves only this VM ends too.
#[utoipa::path(
    put, path = "/api/v1/vmm.shutdown", operation_id = "shutdownService", tag = SERVICE,
    responses((status = 204, description = "The VMs have ended, and the service ends next."), Failed),
)]
async fn shut_down(State(vmm): State<Vmm>) -> Result<StatusCode, ApiError> {
    match &vmm.scope {
        Scope::All => vmm.registry.delete_all().await,
        Scope::One(id) => {
            if vmm.registry.get(id.as_str()).is_ok() {
                vmm.registry.delete(id.as_str()).await?;
            }
        }
    }
    vmm.shutdown.request();
    Ok(StatusCode::NO_CONTENT)
}
