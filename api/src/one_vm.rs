//! Cloud Hypervisor's face: one VM a socket. Paths, bodies, operation names and status codes are its contract's;
//! where that is silent, the code is what HTTP has for the case.

use axum::extract::State;
use control::{Registry, Reply, Verb, VmHandle};
use http::StatusCode;
use spec::{MemoryMap, VmConfig, VmCounters, VmId, VmInfo};
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use crate::answer::Answer;
use crate::document::ONE_VM;
use crate::extract::Json;
use crate::problem::Refusal;
use crate::refusals::{
    Exists, Failed, NotAllowedNow, NotCreated, NotJson, NotPossible, NotUnderstood, TooLong,
    TooSlow, Unsupported, WrongState, not_created, of_one_vm,
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

    async fn ask(&self, verb: Verb) -> Result<Reply, Refusal> {
        self.handle()?
            .ask(verb)
            .await
            .map_err(|error| of_one_vm(verb, error))
    }

    async fn order(&self, verb: Verb) -> Result<StatusCode, Refusal> {
        self.ask(verb).await.map(|_| StatusCode::NO_CONTENT)
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
    vm.order(Verb::Boot).await
}

/// Let the guest stand still.
#[utoipa::path(
    put, path = "/api/v1/vm.pause", operation_id = "pauseVM", tag = ONE_VM,
    responses((status = 204, description = "The guest stands still."), NotCreated, NotAllowedNow, Failed),
)]
async fn pause(State(vm): State<OneVm>) -> Result<StatusCode, Refusal> {
    vm.order(Verb::Pause).await
}

/// Let a paused guest go on.
#[utoipa::path(
    put, path = "/api/v1/vm.resume", operation_id = "resumeVM", tag = ONE_VM,
    responses((status = 204, description = "The guest runs."), NotCreated, NotAllowedNow, Failed),
)]
async fn resume(State(vm): State<OneVm>) -> Result<StatusCode, Refusal> {
    vm.order(Verb::Resume).await
}

/// Reset the guest, which starts anew.
#[utoipa::path(
    put, path = "/api/v1/vm.reboot", operation_id = "rebootVM", tag = ONE_VM,
    responses((status = 204, description = "The guest starts anew."), NotCreated, NotAllowedNow, Failed),
)]
async fn reboot(State(vm): State<OneVm>) -> Result<StatusCode, Refusal> {
    vm.order(Verb::Reboot).await
}

/// End the guest at once, as by pulling the plug. The VM can be booted again.
#[utoipa::path(
    put, path = "/api/v1/vm.shutdown", operation_id = "shutdownVM", tag = ONE_VM,
    responses((status = 204, description = "The guest has ended."), NotCreated, NotAllowedNow, Failed),
)]
async fn shut_down(State(vm): State<OneVm>) -> Result<StatusCode, Refusal> {
    vm.order(Verb::Shutdown).await
}

/// Press the power button. What follows is the guest's choice.
#[utoipa::path(
    put, path = "/api/v1/vm.power-button", operation_id = "power-buttonVM", tag = ONE_VM,
    responses((status = 204, description = "The button was pressed."), NotCreated, NotAllowedNow, Failed),
)]
async fn power_button(State(vm): State<OneVm>) -> Result<StatusCode, Refusal> {
    vm.order(Verb::PowerButton).await
}

/// Send a non-maskable interrupt to every vCPU.
#[utoipa::path(
    put, path = "/api/v1/vm.nmi", operation_id = "nmiVM", tag = ONE_VM,
    responses((status = 204, description = "The interrupt was sent."), NotCreated, WrongState, Failed),
)]
async fn nmi(State(vm): State<OneVm>) -> Result<StatusCode, Refusal> {
    vm.order(Verb::Nmi).await
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
    counters_of(vm.ask(Verb::Counters).await?)
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
    memory_map_of(vm.ask(Verb::MemoryMap).await?)
}

pub(crate) fn counters_of(reply: Reply) -> Result<Answer<VmCounters>, Refusal> {
    match reply {
        Reply::Counters(counters) => Ok(Answer(counters)),
        Reply::Done | Reply::MemoryMap(_) => Err(answered_beside_the_point()),
    }
}

pub(crate) fn memory_map_of(reply: Reply) -> Result<Answer<MemoryMap>, Refusal> {
    match reply {
        Reply::MemoryMap(map) => Ok(Answer(map)),
        Reply::Done | Reply::Counters(_) => Err(answered_beside_the_point()),
    }
}

fn answered_beside_the_point() -> Refusal {
    Refusal::new(
        StatusCode::INTERNAL_SERVER_ERROR,
        "internal-error",
        "the VM's driver answered something other than what it was asked",
    )
}
