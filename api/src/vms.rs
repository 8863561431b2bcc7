//! The service's own face: many VMs, by name.

use axum::extract::State;
use axum::response::{IntoResponse as _, Response};
use control::{NewDevice, Reply, Request, VmHandle};
use http::header::LOCATION;
use http::{HeaderValue, StatusCode};
use spec::{
    ConsoleMode, CreateVm, DiskConfig, MemoryMap, NetConfig, PciDeviceInfo, VmConfig, VmCounters,
    VmId, VmInfo, VmRemoveDevice, VmResize, VmResizeDisk, VmSummary, VsockConfig,
};
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use crate::answer::Answer;
use crate::document::VMS;
use crate::extract::{Json, JsonAndTap, Named};
use crate::one_vm::{added, counters_of, memory_map_of};
use crate::problem::Refusal;
use crate::refusals::{
    Exists, Failed, NoSuchVm, NotJson, NotPossible, NotUnderstood, TooLong, TooSlow, Unsupported,
    WrongState,
};
use crate::service::Service;

pub(crate) fn routes() -> OpenApiRouter<Service> {
    OpenApiRouter::default()
        .routes(routes!(list, create))
        .routes(routes!(info, ensure, delete))
        .routes(routes!(boot))
        .routes(routes!(pause))
        .routes(routes!(resume))
        .routes(routes!(reboot))
        .routes(routes!(shut_down))
        .routes(routes!(power_button))
        .routes(routes!(nmi))
        .routes(routes!(counters))
        .routes(routes!(memory_map))
        .routes(routes!(resize))
        .routes(routes!(resize_disk))
        .routes(routes!(add_disk))
        .routes(routes!(add_net))
        .routes(routes!(add_vsock))
        .routes(routes!(remove_device))
}

impl Service {
    async fn order(&self, id: &VmId, request: Request) -> Result<StatusCode, Refusal> {
        self.registry.get(id.as_str())?.ask(request).await?;
        Ok(StatusCode::NO_CONTENT)
    }

    async fn ask(&self, id: &VmId, request: Request) -> Result<Reply, Refusal> {
        Ok(self.registry.get(id.as_str())?.ask(request).await?)
    }

    /// Creates a VM with all that belongs to it, or nothing.
    async fn create(&self, id: Option<VmId>, config: VmConfig) -> Result<Response, Refusal> {
        let vm = self.registry.create(id, config)?;
        if let Some(sockets) = &self.sockets
            && let Err(error) = sockets.open(self, vm.id()).await
        {
            self.registry.delete(vm.id().as_str()).await?;
            return Err(Refusal::new(
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
    get, path = "/api/v1/vms", operation_id = "vmsList", tag = VMS,
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
    post, path = "/api/v1/vms", operation_id = "vmsCreate", tag = VMS, request_body = CreateVm,
    responses(
        (status = 201, description = "The VM is created.", body = VmSummary,
         headers(("Location" = String, description = "Its path."))),
        NotUnderstood, TooSlow, Exists, TooLong, NotJson, NotPossible, Failed, Unsupported,
    ),
)]
async fn create(
    State(service): State<Service>,
    Json(new): Json<CreateVm>,
) -> Result<Response, Refusal> {
    service.create(new.id, new.config).await
}

/// See to it that there is a VM of this name with this configuration.
///
/// May be repeated: where there is one already, nothing happens.
#[utoipa::path(
    put, path = "/api/v1/vms/{id}", operation_id = "vmsEnsure", tag = VMS, request_body = VmConfig,
    params(("id" = VmId, Path, description = "The VM's name.")),
    responses(
        (status = 200, description = "There is such a VM already.", body = VmSummary),
        (status = 201, description = "The VM is created.", body = VmSummary,
         headers(("Location" = String, description = "Its path."))),
        NotUnderstood, TooSlow, Exists, TooLong, NotJson, NotPossible, Failed, Unsupported,
    ),
)]
async fn ensure(
    State(service): State<Service>,
    Named(id): Named,
    Json(config): Json<VmConfig>,
) -> Result<Response, Refusal> {
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
        if plain.serial.mode == ConsoleMode::Pty {
            plain.serial.file = None;
        }
        if plain.console.mode == ConsoleMode::Pty {
            plain.console.file = None;
        }
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

/// Tell a VM's configuration and state.
#[utoipa::path(
    get, path = "/api/v1/vms/{id}", operation_id = "vmsInfo", tag = VMS,
    params(("id" = VmId, Path, description = "The VM's name.")),
    responses((status = 200, description = "Configuration and state.", body = VmInfo), NoSuchVm, Failed),
)]
async fn info(State(service): State<Service>, Named(id): Named) -> Result<Answer<VmInfo>, Refusal> {
    Ok(Answer(service.registry.get(id.as_str())?.info()))
}

/// End a VM and forget it.
#[utoipa::path(
    delete, path = "/api/v1/vms/{id}", operation_id = "vmsDelete", tag = VMS,
    params(("id" = VmId, Path, description = "The VM's name.")),
    responses((status = 204, description = "The VM is no more."), NoSuchVm, WrongState, Failed),
)]
async fn delete(State(service): State<Service>, Named(id): Named) -> Result<StatusCode, Refusal> {
    service.registry.delete(id.as_str()).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// Boot a VM.
#[utoipa::path(
    put, path = "/api/v1/vms/{id}/boot", operation_id = "vmsBoot", tag = VMS,
    params(("id" = VmId, Path, description = "The VM's name.")),
    responses(
        (status = 204, description = "The guest runs."),
        NoSuchVm, WrongState, NotPossible, Failed, Unsupported,
    ),
)]
async fn boot(State(service): State<Service>, Named(id): Named) -> Result<StatusCode, Refusal> {
    service.order(&id, Request::Boot).await
}

/// Let a guest stand still.
#[utoipa::path(
    put, path = "/api/v1/vms/{id}/pause", operation_id = "vmsPause", tag = VMS,
    params(("id" = VmId, Path, description = "The VM's name.")),
    responses((status = 204, description = "The guest stands still."), NoSuchVm, WrongState, Failed),
)]
async fn pause(State(service): State<Service>, Named(id): Named) -> Result<StatusCode, Refusal> {
    service.order(&id, Request::Pause).await
}

/// Let a paused guest go on.
#[utoipa::path(
    put, path = "/api/v1/vms/{id}/resume", operation_id = "vmsResume", tag = VMS,
    params(("id" = VmId, Path, description = "The VM's name.")),
    responses((status = 204, description = "The guest runs."), NoSuchVm, WrongState, Failed),
)]
async fn resume(State(service): State<Service>, Named(id): Named) -> Result<StatusCode, Refusal> {
    service.order(&id, Request::Resume).await
}

/// Reset a guest, which starts anew.
#[utoipa::path(
    put, path = "/api/v1/vms/{id}/reboot", operation_id = "vmsReboot", tag = VMS,
    params(("id" = VmId, Path, description = "The VM's name.")),
    responses((status = 204, description = "The guest starts anew."), NoSuchVm, WrongState, Failed),
)]
async fn reboot(State(service): State<Service>, Named(id): Named) -> Result<StatusCode, Refusal> {
    service.order(&id, Request::Reboot).await
}

/// End a guest at once, as by pulling the plug. The VM can be booted again.
#[utoipa::path(
    put, path = "/api/v1/vms/{id}/shutdown", operation_id = "vmsShutdown", tag = VMS,
    params(("id" = VmId, Path, description = "The VM's name.")),
    responses((status = 204, description = "The guest has ended."), NoSuchVm, WrongState, Failed),
)]
async fn shut_down(
    State(service): State<Service>,
    Named(id): Named,
) -> Result<StatusCode, Refusal> {
    service.order(&id, Request::Shutdown).await
}

/// Press the power button. What follows is the guest's choice.
#[utoipa::path(
    put, path = "/api/v1/vms/{id}/power-button", operation_id = "vmsPowerButton", tag = VMS,
    params(("id" = VmId, Path, description = "The VM's name.")),
    responses((status = 204, description = "The button was pressed."), NoSuchVm, WrongState, Failed),
)]
async fn power_button(
    State(service): State<Service>,
    Named(id): Named,
) -> Result<StatusCode, Refusal> {
    service.order(&id, Request::PowerButton).await
}

/// Send a non-maskable interrupt to every vCPU.
#[utoipa::path(
    put, path = "/api/v1/vms/{id}/nmi", operation_id = "vmsNmi", tag = VMS,
    params(("id" = VmId, Path, description = "The VM's name.")),
    responses((status = 204, description = "The interrupt was sent."), NoSuchVm, WrongState, Failed),
)]
async fn nmi(State(service): State<Service>, Named(id): Named) -> Result<StatusCode, Refusal> {
    service.order(&id, Request::Nmi).await
}

/// Tell the counters of a VM's devices.
#[utoipa::path(
    get, path = "/api/v1/vms/{id}/counters", operation_id = "vmsCounters", tag = VMS,
    params(("id" = VmId, Path, description = "The VM's name.")),
    responses(
        (status = 200, description = "Counters, by device and name.", body = ref("#/components/schemas/VmCounters")),
        NoSuchVm, WrongState, Failed,
    ),
)]
async fn counters(
    State(service): State<Service>,
    Named(id): Named,
) -> Result<Answer<VmCounters>, Refusal> {
    counters_of(service.ask(&id, Request::Counters).await?)
}

/// Tell a VM's address spaces: the tree of regions, and what the guest sees of it.
#[utoipa::path(
    get, path = "/api/v1/vms/{id}/memory-map", operation_id = "vmsMemoryMap", tag = VMS,
    params(("id" = VmId, Path, description = "The VM's name.")),
    responses(
        (status = 200, description = "Memory and port I/O.", body = MemoryMap),
        NoSuchVm, WrongState, Failed,
    ),
)]
async fn memory_map(
    State(service): State<Service>,
    Named(id): Named,
) -> Result<Answer<MemoryMap>, Refusal> {
    memory_map_of(service.ask(&id, Request::MemoryMap).await?)
}

/// Ask a guest for memory through its balloon, or give it back.
#[utoipa::path(
    put, path = "/api/v1/vms/{id}/resize", operation_id = "vmsResize", tag = VMS, request_body = VmResize,
    params(("id" = VmId, Path, description = "The VM's name.")),
    responses(
        (status = 204, description = "The guest was asked."),
        NotUnderstood, NoSuchVm, TooSlow, WrongState, TooLong, NotJson, NotPossible, Failed, Unsupported,
    ),
)]
async fn resize(
    State(service): State<Service>,
    Named(id): Named,
    Json(body): Json<VmResize>,
) -> Result<StatusCode, Refusal> {
    service.order(&id, Request::Resize(body)).await
}

/// Give a disk another size.
#[utoipa::path(
    put, path = "/api/v1/vms/{id}/resize-disk", operation_id = "vmsResizeDisk", tag = VMS, request_body = VmResizeDisk,
    params(("id" = VmId, Path, description = "The VM's name.")),
    responses(
        (status = 204, description = "The disk has its new size, and the guest was told."),
        NotUnderstood, NoSuchVm, TooSlow, WrongState, TooLong, NotJson, NotPossible, Failed, Unsupported,
    ),
)]
async fn resize_disk(
    State(service): State<Service>,
    Named(id): Named,
    Json(body): Json<VmResizeDisk>,
) -> Result<StatusCode, Refusal> {
    service.order(&id, Request::ResizeDisk(body)).await
}

/// Give a VM a disk.
#[utoipa::path(
    put, path = "/api/v1/vms/{id}/add-disk", operation_id = "vmsAddDisk", tag = VMS, request_body = DiskConfig,
    params(("id" = VmId, Path, description = "The VM's name.")),
    responses(
        (status = 200, description = "The running guest has it.", body = PciDeviceInfo),
        (status = 204, description = "It will be there at the next boot."),
        NotUnderstood, NoSuchVm, TooSlow, WrongState, TooLong, NotJson, NotPossible, Failed, Unsupported,
    ),
)]
async fn add_disk(
    State(service): State<Service>,
    Named(id): Named,
    Json(body): Json<DiskConfig>,
) -> Result<Response, Refusal> {
    Ok(added(
        service
            .ask(&id, Request::AddDevice(NewDevice::Disk(Box::new(body))))
            .await?,
    ))
}

/// Give a VM a network interface.
///
/// Over a unix socket descriptors may come along with the request (`SCM_RIGHTS`): those of its tap's queues, one a
/// pair.
#[utoipa::path(
    put, path = "/api/v1/vms/{id}/add-net", operation_id = "vmsAddNet", tag = VMS, request_body = NetConfig,
    params(("id" = VmId, Path, description = "The VM's name.")),
    responses(
        (status = 200, description = "The running guest has it.", body = PciDeviceInfo),
        (status = 204, description = "It will be there at the next boot."),
        NotUnderstood, NoSuchVm, TooSlow, WrongState, TooLong, NotJson, NotPossible, Failed, Unsupported,
    ),
)]
async fn add_net(
    State(service): State<Service>,
    Named(id): Named,
    JsonAndTap(body): JsonAndTap,
) -> Result<Response, Refusal> {
    Ok(added(
        service
            .ask(&id, Request::AddDevice(NewDevice::Net(Box::new(body))))
            .await?,
    ))
}

/// Give a VM a socket between guest and host.
#[utoipa::path(
    put, path = "/api/v1/vms/{id}/add-vsock", operation_id = "vmsAddVsock", tag = VMS, request_body = VsockConfig,
    params(("id" = VmId, Path, description = "The VM's name.")),
    responses(
        (status = 200, description = "The running guest has it.", body = PciDeviceInfo),
        (status = 204, description = "It will be there at the next boot."),
        NotUnderstood, NoSuchVm, TooSlow, WrongState, TooLong, NotJson, NotPossible, Failed, Unsupported,
    ),
)]
async fn add_vsock(
    State(service): State<Service>,
    Named(id): Named,
    Json(body): Json<VsockConfig>,
) -> Result<Response, Refusal> {
    Ok(added(
        service
            .ask(&id, Request::AddDevice(NewDevice::Vsock(body)))
            .await?,
    ))
}

/// Ask a guest to let go of a device; the event `device-removed` tells when it has.
#[utoipa::path(
    put, path = "/api/v1/vms/{id}/remove-device", operation_id = "vmsRemoveDevice", tag = VMS, request_body = VmRemoveDevice,
    params(("id" = VmId, Path, description = "The VM's name.")),
    responses(
        (status = 204, description = "The guest was asked."),
        NotUnderstood, NoSuchVm, TooSlow, WrongState, TooLong, NotJson, NotPossible, Failed, Unsupported,
    ),
)]
async fn remove_device(
    State(service): State<Service>,
    Named(id): Named,
    Json(body): Json<VmRemoveDevice>,
) -> Result<StatusCode, Refusal> {
    service.order(&id, Request::RemoveDevice(body)).await
}
