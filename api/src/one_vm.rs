//! Cloud Hypervisor's face: one VM a socket. Paths, bodies, operation names and status codes follow its
//! contract; where the contract is silent, HTTP's own status code for the case applies.

use axum::extract::State;
use control::{Registry, Reply, Request, Verb, VmHandle};
use http::StatusCode;
use spec::{VmConfig, VmId, VmInfo, VmState};

use crate::answer::Answer;
use crate::claim::ClaimedVersion;
use crate::extract::Json;
use crate::problem::ApiError;
use crate::refusals::{
    Exists, Failed, NotCreated, NotJson, NotPossible, NotUnderstood, TooLong, TooSlow, Unsupported,
    not_created, of_one_vm,
};
use crate::routes::{Routes, routes};
use crate::tags::ONE_VM;

/// The VM of a socket, created or not.
#[derive(Clone)]
pub(crate) struct OneVm {
    pub(crate) registry: Registry,
    pub(crate) id: VmId,
    pub(crate) claim: ClaimedVersion,
}

impl OneVm {
    fn handle(&self) -> Result<VmHandle, ApiError> {
        self.registry
            .get(self.id.as_str())
            .map_err(|_| not_created())
    }

    /// Sends a request to the VM's driver, and waits for the reply.
    pub(crate) async fn ask(&self, request: Request) -> Result<Reply, ApiError> {
        let verb = request.verb();
        self.handle()?
            .ask(request)
            .await
            .map_err(|error| of_one_vm(verb, error))
    }
}

pub(crate) fn routes() -> Routes<OneVm> {
    Routes::default()
        .routes(routes!(create))
        .routes(routes!(delete))
        .routes(routes!(info))
}

/// Create the VM, without booting it.
#[utoipa::path(
    put, path = "/api/v1/vm.create", operation_id = "vmCreate", tag = ONE_VM, request_body = VmConfig,
    responses(
        (status = 204, description = "The VM is created."),
        NotUnderstood, TooSlow, Exists, TooLong, NotJson, NotPossible, Failed, Unsupported,
    ),
)]
async fn create(
    State(vm): State<OneVm>,
    Json(mut config): Json<VmConfig>,
) -> Result<StatusCode, ApiError> {
    config.cpus.fill_in_for_cloud_hypervisor();
    vm.registry.create(Some(vm.id), config)?;
    Ok(StatusCode::NO_CONTENT)
}

/// End the VM and delete its configuration. Succeeds also if the VM is not created.
#[utoipa::path(
    put, path = "/api/v1/vm.delete", operation_id = "vmDelete", tag = ONE_VM,
    responses((status = 204, description = "The VM is deleted."), Failed),
)]
async fn delete(State(vm): State<OneVm>) -> Result<StatusCode, ApiError> {
    if vm.handle().is_ok() {
        vm.registry
            .delete(vm.id.as_str())
            .await
            .map_err(|error| of_one_vm(Verb::Delete, error))?;
    }
    Ok(StatusCode::NO_CONTENT)
}

/// Return the VM's configuration and state.
///
/// As in Cloud Hypervisor, a VM whose guest has ended is `Created`: it can be booted again.
#[utoipa::path(
    get, path = "/api/v1/vm.info", operation_id = "vmInfo", tag = ONE_VM,
    responses((status = 200, description = "Configuration and state.", body = VmInfo), NotCreated, Failed),
)]
async fn info(State(vm): State<OneVm>) -> Result<Answer<VmInfo>, ApiError> {
    let mut info = vm.handle()?.info();
    // Cloud Hypervisor drops its machine when the guest ends (`vm_shutdown` in its vmm/src/lib.rs), and shows
    // a VM without a machine as `Created`.
    if info.state == VmState::Shutdown {
        info.state = VmState::Created;
    }
    Ok(Answer(info))
}
