//! Cloud Hypervisor's face: one VM a socket. Paths, bodies, operation names and status codes are its contract's;
//! where that is silent, the code is what HTTP has for the case.

use axum::extract::State;
use axum::response::{IntoResponse as _, Response};
use control::{NewDevice, Registry, Reply, Request, Verb, VmHandle};
use http::StatusCode;
use spec::{
    DiskConfig, MemoryMap, NetConfig, PciDeviceInfo, VmConfig, VmCounters, VmId, VmInfo,
    VmRemoveDevice, VmResize, VmResizeDisk, VsockConfig,
};
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use crate::answer::Answer;
use crate::document::ONE_VM;
use crate::extract::{Json, JsonAndTap};
use crate::problem::Refusal;
use crate::refusals::{
    Exists, Failed, NoSuchDevice, NoSuchDisk, NotAllowedNow, NotCreated, NotDone, NotJson,
    NotPossible, NotUnderstood, NotValid, Pending, TooLong, TooSlow, Unsupported, WrongState,
    not_created, of_one_vm,
};

/// The VM of a socket, created or not.
#[derive(Clone)]
pub(crate) struct OneVm {
    pub(crate) registry: Registry,
    pub(crate) id: VmId,
}

impl OneVm {
    fn handle(&self) -> Result<VmHandle, Refusal> {
        self.registry
            .get(self.id.as_str())
            .map_err(|_| not_created())
    }

    async fn ask(&self, request: Request) -> Result<Reply, Refusal> {
        let verb = request.verb();
        self.handle()?
            .ask(request)
            .await
            .map_err(|error| of_one_vm(verb, error))
    }

    async fn order(&self, request: Request) -> Result<StatusCode, Refusal> {
        self.ask(request).await.map(|_| StatusCode::NO_CONTENT)
    }

    async fn add(&self, device: NewDevice) -> Result<Response, Refusal> {
        Ok(added(self.ask(Request::AddDevice(device)).await?))
    }
}

pub(crate) fn routes() -> OpenApiRouter<OneVm> {
    OpenApiRouter::default()
        .routes(routes!(create))
        .routes(routes!(delete))
        .routes(routes!(boot))
        .routes(routes!(pause))
        .routes(routes!(resume))
        .routes(routes!(reboot))
        .routes(routes!(shut_down))
        .routes(routes!(power_button))
        .routes(routes!(nmi))
        .routes(routes!(info))
        .routes(routes!(counters))
        .routes(routes!(memory_map))
        .routes(routes!(resize))
        .routes(routes!(resize_disk))
        .routes(routes!(add_disk))
        .routes(routes!(add_net))
        .routes(routes!(add_vsock))
        .routes(routes!(remove_device))
}

/// Create the VM, without booting it.
#[utoipa::path(
    put, path = "/api/v1/vm.create", operation_id = "createVM", tag = ONE_VM, request_body = VmConfig,
    responses(
        (status = 204, description = "The VM is created."),
        NotUnderstood, TooSlow, Exists, TooLong, NotJson, NotPossible, Failed, Unsupported,
    ),
)]
async fn create(
    State(vm): State<OneVm>,
    Json(config): Json<VmConfig>,
) -> Result<StatusCode, Refusal> {
    vm.registry.create(Some(vm.id), config)?;
    Ok(StatusCode::NO_CONTENT)
}

/// End the VM and forget its configuration. Where there is none, that is so already.
#[utoipa::path(
    put, path = "/api/v1/vm.delete", operation_id = "deleteVM", tag = ONE_VM,
    responses((status = 204, description = "The VM is no more."), Failed),
)]
async fn delete(State(vm): State<OneVm>) -> Result<StatusCode, Refusal> {
    if vm.handle().is_ok() {
        vm.registry
            .delete(vm.id.as_str())
            .await
            .map_err(|error| of_one_vm(Verb::Delete, error))?;
    }
    Ok(StatusCode::NO_CONTENT)
}

/// Boot the VM.
#[utoipa::path(
    put, path = "/api/v1/vm.boot", operation_id = "bootVM", tag = ONE_VM,
    responses(
        (status = 204, description = "The guest runs."),
        NotCreated, WrongState, NotPossible, Failed, Unsupported,
    ),
)]
async fn boot(State(vm): State<OneVm>) -> Result<StatusCode, Refusal> {
    vm.order(Request::Boot).await
}

/// Let the guest stand still.
#[utoipa::path(
    put, path = "/api/v1/vm.pause", operation_id = "pauseVM", tag = ONE_VM,
    responses((status = 204, description = "The guest stands still."), NotCreated, NotAllowedNow, Failed),
)]
async fn pause(State(vm): State<OneVm>) -> Result<StatusCode, Refusal> {
    vm.order(Request::Pause).await
}

/// Let a paused guest go on.
#[utoipa::path(
    put, path = "/api/v1/vm.resume", operation_id = "resumeVM", tag = ONE_VM,
    responses((status = 204, description = "The guest runs."), NotCreated, NotAllowedNow, Failed),
)]
async fn resume(State(vm): State<OneVm>) -> Result<StatusCode, Refusal> {
    vm.order(Request::Resume).await
}

/// Reset the guest, which starts anew.
#[utoipa::path(
    put, path = "/api/v1/vm.reboot", operation_id = "rebootVM", tag = ONE_VM,
    responses((status = 204, description = "The guest starts anew."), NotCreated, NotAllowedNow, Failed),
)]
async fn reboot(State(vm): State<OneVm>) -> Result<StatusCode, Refusal> {
    vm.order(Request::Reboot).await
}

/// End the guest at once, as by pulling the plug. The VM can be booted again.
#[utoipa::path(
    put, path = "/api/v1/vm.shutdown", operation_id = "shutdownVM", tag = ONE_VM,
    responses((status = 204, description = "The guest has ended."), NotCreated, NotAllowedNow, Failed),
)]
async fn shut_down(State(vm): State<OneVm>) -> Result<StatusCode, Refusal> {
    vm.order(Request::Shutdown).await
}

/// Press the power button. What follows is the guest's choice.
#[utoipa::path(
    put, path = "/api/v1/vm.power-button", operation_id = "power-buttonVM", tag = ONE_VM,
    responses((status = 204, description = "The button was pressed."), NotCreated, NotAllowedNow, Failed),
)]
async fn power_button(State(vm): State<OneVm>) -> Result<StatusCode, Refusal> {
    vm.order(Request::PowerButton).await
}

/// Send a non-maskable interrupt to every vCPU.
#[utoipa::path(
    put, path = "/api/v1/vm.nmi", operation_id = "nmiVM", tag = ONE_VM,
    responses((status = 204, description = "The interrupt was sent."), NotCreated, WrongState, Failed),
)]
async fn nmi(State(vm): State<OneVm>) -> Result<StatusCode, Refusal> {
    vm.order(Request::Nmi).await
}

/// Tell the VM's configuration and state.
#[utoipa::path(
    get, path = "/api/v1/vm.info", operation_id = "infoVM", tag = ONE_VM,
    responses((status = 200, description = "Configuration and state.", body = VmInfo), NotCreated, Failed),
)]
async fn info(State(vm): State<OneVm>) -> Result<Answer<VmInfo>, Refusal> {
    vm.handle().map(|handle| Answer(handle.info()))
}

/// Tell the counters of the VM's devices.
#[utoipa::path(
    get, path = "/api/v1/vm.counters", operation_id = "countersVM", tag = ONE_VM,
    responses(
        (status = 200, description = "Counters, by device and name.", body = ref("#/components/schemas/VmCounters")),
        NotCreated, WrongState, Failed,
    ),
)]
async fn counters(State(vm): State<OneVm>) -> Result<Answer<VmCounters>, Refusal> {
    counters_of(vm.ask(Request::Counters).await?)
}

/// Tell the VM's address spaces: the tree of regions, and what the guest sees of it.
///
/// Not in Cloud Hypervisor's contract.
#[utoipa::path(
    get, path = "/api/v1/vm.memory-map", operation_id = "memoryMapVM", tag = ONE_VM,
    responses(
        (status = 200, description = "Memory and port I/O.", body = MemoryMap),
        NotCreated, WrongState, Failed,
    ),
)]
async fn memory_map(State(vm): State<OneVm>) -> Result<Answer<MemoryMap>, Refusal> {
    memory_map_of(vm.ask(Request::MemoryMap).await?)
}

/// Ask the guest for memory through its balloon, or give it back.
///
/// vCPUs and memory cannot be changed in this version: only what the VM has is accepted.
#[utoipa::path(
    put, path = "/api/v1/vm.resize", operation_id = "resizeVM", tag = ONE_VM, request_body = VmResize,
    responses(
        (status = 204, description = "The guest was asked."),
        NotUnderstood, NotCreated, TooSlow, WrongState, TooLong, NotJson, NotPossible, Pending, Failed, Unsupported,
    ),
)]
async fn resize(
    State(vm): State<OneVm>,
    Json(sizes): Json<VmResize>,
) -> Result<StatusCode, Refusal> {
    vm.order(Request::Resize(sizes)).await
}

/// Give a disk another size.
#[utoipa::path(
    put, path = "/api/v1/vm.resize-disk", operation_id = "resizeDiskVM", tag = ONE_VM, request_body = VmResizeDisk,
    responses(
        (status = 204, description = "The disk has its new size, and the guest was told."),
        NotUnderstood, NoSuchDisk, TooSlow, WrongState, TooLong, NotJson, NotDone,
    ),
)]
async fn resize_disk(
    State(vm): State<OneVm>,
    Json(disk): Json<VmResizeDisk>,
) -> Result<StatusCode, Refusal> {
    vm.order(Request::ResizeDisk(disk)).await
}

/// Give the VM a disk.
#[utoipa::path(
    put, path = "/api/v1/vm.add-disk", operation_id = "addDiskVM", tag = ONE_VM, request_body = DiskConfig,
    responses(
        (status = 200, description = "The running guest has it.", body = PciDeviceInfo),
        (status = 204, description = "It will be there at the next boot."),
        NotValid, NotCreated, TooSlow, WrongState, TooLong, NotJson, NotDone, Unsupported,
    ),
)]
async fn add_disk(
    State(vm): State<OneVm>,
    Json(disk): Json<DiskConfig>,
) -> Result<Response, Refusal> {
    vm.add(NewDevice::Disk(Box::new(disk))).await
}

/// Give the VM a network interface.
///
/// Over a unix socket descriptors may come along with the request (`SCM_RIGHTS`): those of its tap's queues, one a
/// pair.
#[utoipa::path(
    put, path = "/api/v1/vm.add-net", operation_id = "addNetVM", tag = ONE_VM, request_body = NetConfig,
    responses(
        (status = 200, description = "The running guest has it.", body = PciDeviceInfo),
        (status = 204, description = "It will be there at the next boot."),
        NotValid, NotCreated, TooSlow, WrongState, TooLong, NotJson, NotDone, Unsupported,
    ),
)]
async fn add_net(
    State(vm): State<OneVm>,
    JsonAndTap(net): JsonAndTap,
) -> Result<Response, Refusal> {
    vm.add(NewDevice::Net(Box::new(net))).await
}

/// Give the VM a socket between guest and host.
#[utoipa::path(
    put, path = "/api/v1/vm.add-vsock", operation_id = "addVsockVM", tag = ONE_VM, request_body = VsockConfig,
    responses(
        (status = 200, description = "The running guest has it.", body = PciDeviceInfo),
        (status = 204, description = "It will be there at the next boot."),
        NotValid, NotCreated, TooSlow, WrongState, TooLong, NotJson, NotDone, Unsupported,
    ),
)]
async fn add_vsock(
    State(vm): State<OneVm>,
    Json(vsock): Json<VsockConfig>,
) -> Result<Response, Refusal> {
    vm.add(NewDevice::Vsock(vsock)).await
}

/// Ask the guest to let go of a device; when it has, the device is gone.
///
/// The event `device-removed` tells when, and `device_tree` of the VM's information until then that it is
/// leaving. It is not there at the next boot, whatever the guest does.
#[utoipa::path(
    put, path = "/api/v1/vm.remove-device", operation_id = "removeDeviceVM", tag = ONE_VM,
    request_body = VmRemoveDevice,
    responses(
        (status = 204, description = "The guest was asked."),
        NotUnderstood, NoSuchDevice, TooSlow, WrongState, TooLong, NotJson, NotPossible, Failed,
    ),
)]
async fn remove_device(
    State(vm): State<OneVm>,
    Json(device): Json<VmRemoveDevice>,
) -> Result<StatusCode, Refusal> {
    vm.order(Request::RemoveDevice(device)).await
}

/// 200 for what a running guest was given, and 204 for what it will find at its next boot.
pub(crate) fn added(reply: Reply) -> Response {
    match reply {
        Reply::Added(device) => Answer::<PciDeviceInfo>(device).into_response(),
        _ => StatusCode::NO_CONTENT.into_response(),
    }
}

pub(crate) fn counters_of(reply: Reply) -> Result<Answer<VmCounters>, Refusal> {
    match reply {
        Reply::Counters(counters) => Ok(Answer(counters)),
        _ => Err(answered_beside_the_point()),
    }
}

pub(crate) fn memory_map_of(reply: Reply) -> Result<Answer<MemoryMap>, Refusal> {
    match reply {
        Reply::MemoryMap(map) => Ok(Answer(map)),
        _ => Err(answered_beside_the_point()),
    }
}

fn answered_beside_the_point() -> Refusal {
    Refusal::new(
        StatusCode::INTERNAL_SERVER_ERROR,
        "internal-error",
        "the VM's driver answered something other than what it was asked",
    )
}
