//! The host of the service, as far as it decides which guests can run there.

use axum::extract::State;
use axum::response::Response;
use control::Request;
use spec::{CpuCheck, CpuDescription, HostCpu, VmId};

use crate::answer::{self, Answer};
use crate::extract::{Json, Named};
use crate::problem::ApiError;
use crate::refusals::{BadBody, Failed, NoSuchVm, NotPossible, WrongState};
use crate::routes::{Routes, routes};
use crate::service::Service;
use crate::tags::{SERVICE, VMS};

pub(crate) fn routes() -> Routes<Service> {
    Routes::default()
        .routes(routes!(host_cpu))
        .routes(routes!(check_cpu))
        .routes(routes!(vm_cpu))
}

/// Return the CPU of the service's host.
///
/// The features that guests can see, and for each CPU profile what the host lacks of it. The best profile
/// that several hosts can run is the one with most features of which none of them lacks any.
#[utoipa::path(
    get, path = "/api/v1/host/cpu", operation_id = "getHostCpu", tag = SERVICE,
    responses((status = 200, description = "The CPU.", body = HostCpu), Failed),
)]
async fn host_cpu(State(service): State<Service>) -> Answer<HostCpu> {
    Answer(service.registry.host_cpu())
}

/// Check whether a guest with these CPUs could run on the service's host.
///
/// The body is what the guest's own service returns for `GET /api/v1/vms/{id}/cpu`. Nothing is changed. A
/// migration checks the same before it begins.
#[utoipa::path(
    post, path = "/api/v1/host/cpu/check", operation_id = "checkCpu", tag = SERVICE,
    request_body = CpuDescription,
    responses(
        (status = 200, description = "What the host lacks.", body = CpuCheck),
        BadBody, NotPossible, Failed,
    ),
)]
async fn check_cpu(
    State(service): State<Service>,
    Json(guest): Json<CpuDescription>,
) -> Result<Answer<CpuCheck>, ApiError> {
    Ok(Answer(service.registry.check_cpu(&guest)?))
}

/// Return what a guest sees of its CPUs.
///
/// To be checked against the host where it is to move.
#[utoipa::path(
    get, path = "/api/v1/vms/{id}/cpu", operation_id = "getVmCpu", tag = VMS,
    params(("id" = VmId, Path, description = "The VM's name.")),
    responses(
        (status = 200, description = "The CPU of the guest.", body = CpuDescription),
        NoSuchVm, WrongState, Failed,
    ),
)]
async fn vm_cpu(State(service): State<Service>, Named(id): Named) -> Result<Response, ApiError> {
    Ok(answer::reply(service.ask(&id, Request::Cpu).await?))
}
