//! The service's own face: many VMs, by name.

use axum::extract::State;
use axum::response::{IntoResponse as _, Response};
use control::{Reply, Request, VmHandle};
use http::header::LOCATION;
use http::{HeaderValue, StatusCode};
use spec::{CreateVm, VmConfig, VmId, VmInfo, VmSummary};

use crate::answer::Answer;
use crate::extract::{Json, Named, NewName};
use crate::problem::ApiError;
use crate::refusals::{
    Exists, Failed, NoSuchVm, NotJson, NotPossible, NotUnderstood, TooLong, TooSlow, Unsupported,
    WrongState,
};
use crate::routes::{Routes, routes};
use crate::service::Service;
use crate::tags::VMS;

pub(crate) fn routes() -> Routes<Service> {
    Routes::default()
        .routes(routes!(list, create))
        .routes(routes!(info, ensure, delete))
}

impl Service {
    /// Sends a request to the driver of the VM `id`, and waits for the reply.
    pub(crate) async fn ask(&self, id: &VmId, request: Request) -> Result<Reply, ApiError> {
        Ok(self.registry.get(id.as_str())?.ask(request).await?)
    }

    /// Creates a VM with all that belongs to it, or nothing.
    async fn create(&self, id: Option<VmId>, config: VmConfig) -> Result<Response, ApiError> {
        let vm = self.registry.create(id, config)?;
        if let Some(sockets) = &self.sockets
            && let Err(error) = sockets.open(vm.id()).await
        {
            self.registry.delete(vm.id().as_str()).await?;
            return Err(ApiError::new(
                StatusCode::INTERNAL_SERVER_ERROR,
                "vm-socket",
                format!("the VM's own socket could not be opened: {error}"),
            ));
        }
        Ok(created(self.summary(&vm)))
    }
}

fn created(summary: VmSummary) -> Response {
    let location = HeaderValue::try_from(format!("/api/v1/vms/{}", summary.id));
    let mut response = (StatusCode::CREATED, Answer(summary)).into_response();
    // A VM's name is made of characters that a header may hold.
    if let Ok(location) = location {
        response.headers_mut().insert(LOCATION, location);
    }
    response
}

/// List the VMs.
#[utoipa::path(
    get, path = "/api/v1/vms", operation_id = "listVms", tag = VMS,
    responses((status = 200, description = "All VMs, by name.", body = [VmSummary])),
)]
async fn list(State(service): State<Service>) -> Answer<Vec<VmSummary>> {
    Answer(
        service
            .registry
            .list()
            .iter()
            .map(|vm| service.summary(vm))
            .collect(),
    )
}

/// Create a VM, without booting it.
#[utoipa::path(
    post, path = "/api/v1/vms", operation_id = "createVm", tag = VMS, request_body = CreateVm,
    responses(
        (status = 201, description = "The VM is created.", body = VmSummary,
         headers(("Location" = String, description = "Its path."))),
        NotUnderstood, TooSlow, Exists, TooLong, NotJson, NotPossible, Failed, Unsupported,
    ),
)]
async fn create(
    State(service): State<Service>,
    Json(new): Json<CreateVm>,
) -> Result<Response, ApiError> {
    let created = service.create(new.id, new.config).await;
    created.map_err(|refused| refused.below("/config"))
}

/// Create a VM of this name unless it exists with this configuration.
///
/// Idempotent: a repeated request changes nothing.
#[utoipa::path(
    put, path = "/api/v1/vms/{id}", operation_id = "ensureVm", tag = VMS, request_body = VmConfig,
    params(("id" = VmId, Path, description = "The VM's name.")),
    responses(
        (status = 200, description = "The VM exists already.", body = VmSummary),
        (status = 201, description = "The VM is created.", body = VmSummary,
         headers(("Location" = String, description = "Its path."))),
        NotUnderstood, TooSlow, Exists, TooLong, NotJson, NotPossible, Failed, Unsupported,
    ),
)]
async fn ensure(
    State(service): State<Service>,
    NewName(id): NewName,
    Json(config): Json<VmConfig>,
) -> Result<Response, ApiError> {
    match service.registry.get(id.as_str()) {
        Ok(vm) if is_configured(&vm, &config) => Ok(Answer(service.summary(&vm)).into_response()),
        _ => service.create(Some(id), config).await,
    }
}

/// Whether the VM was created with `config`. What a driver has filled in since does not count.
fn is_configured(vm: &VmHandle, config: &VmConfig) -> bool {
    let plain = |config: &VmConfig| {
        let mut plain = config.clone();
        plain.name_devices();
        plain.cpus.nested = Some(config.cpus.is_nested());
        plain.forget_terminals();
        plain
    };
    let (mut is, mut wanted) = (plain(&vm.status().config), plain(config));
    let both = is
        .net
        .iter_mut()
        .flatten()
        .zip(wanted.net.iter_mut().flatten());
    for ((is, wanted), asked) in both.zip(config.net.iter().flatten()) {
        // The name of a tap that was made, and an address.
        if asked.tap.is_none() {
            is.tap = None;
        }
        if asked.mac.is_none() {
            (is.mac, wanted.mac) = (None, None);
        }
    }
    is == wanted
}

/// Return a VM's configuration and state.
#[utoipa::path(
    get, path = "/api/v1/vms/{id}", operation_id = "getVm", tag = VMS,
    params(("id" = VmId, Path, description = "The VM's name.")),
    responses((status = 200, description = "Configuration and state.", body = VmInfo), NoSuchVm, Failed),
)]
async fn info(
    State(service): State<Service>,
    Named(id): Named,
) -> Result<Answer<VmInfo>, ApiError> {
    Ok(Answer(service.registry.get(id.as_str())?.info()))
}

/// End a VM and delete its configuration.
#[utoipa::path(
    delete, path = "/api/v1/vms/{id}", operation_id = "deleteVm", tag = VMS,
    params(("id" = VmId, Path, description = "The VM's name.")),
    responses((status = 204, description = "The VM is deleted."), NoSuchVm, WrongState, Failed),
)]
async fn delete(State(service): State<Service>, Named(id): Named) -> Result<StatusCode, ApiError> {
    service.registry.delete(id.as_str()).await?;
    Ok(StatusCode::NO_CONTENT)
}
