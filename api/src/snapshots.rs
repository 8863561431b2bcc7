//! Snapshots, VMs made from them, core dumps, and mirrors of disks.
//!
//! Each is shown as a migration whose other end is a folder or file: with progress, and to be canceled.

use std::sync::Arc;

use axum::extract::State;
use axum::response::Response;
use control::{Migration, RequestError, SnapshotOf};
use http::StatusCode;
use spec::{
    FindOverlays, ForkVm, MergeSnapshots, MigrationInfo, MirrorDisk, OverlayInfo, RecordWorkingSet,
    RestoreConfig, VmCoredumpData, VmId, VmSnapshotConfig,
};

use crate::answer::Answer;
use crate::extract::{Json, JsonAndTaps, Named, NamedDisk};
use crate::migrations::{begin, created, created_with_socket, wait};
use crate::one_vm::OneVm;
use crate::problem::ApiError;
use crate::refusals::{
    Exists, Failed, NoSuchSnapshot, NoSuchVm, NotAllowedNow, NotCreated, NotDone, NotJson,
    NotPossible, NotUnderstood, NotValid, TooLong, TooSlow, Unsupported, WrongState,
    of_one_vms_restore, of_one_vms_snapshot,
};
use crate::routes::{Routes, routes};
use crate::service::Service;
use crate::tags::{MIGRATIONS, ONE_VM};

pub(crate) fn routes() -> Routes<Service> {
    Routes::default()
        .routes(routes!(snapshot))
        .routes(routes!(merge))
        .routes(routes!(overlays))
        .routes(routes!(core_dump))
        .routes(routes!(mirror))
        .routes(routes!(restore))
        .routes(routes!(record))
        .routes(routes!(end_recording))
        .routes(routes!(fork))
}

pub(crate) fn one_vm_routes() -> Routes<OneVm> {
    Routes::default()
        .routes(routes!(snapshot_one))
        .routes(routes!(core_dump_one))
        .routes(routes!(restore_one))
}

/// Start to write a snapshot of a VM into a folder of the service's host.
///
/// The snapshot is complete when the migration that the answer shows is `Completed`. Deleting that
/// migration cancels the snapshot, and nothing is left of it. A paused VM stays paused. A running VM
/// stops for its device state only (`downtime`), and runs on while its memory is copied; `faults` counts
/// the pages that it waited for.
#[utoipa::path(
    post, path = "/api/v1/vms/{id}/snapshots", operation_id = "snapshotVm", tag = MIGRATIONS, request_body = VmSnapshotConfig,
    params(("id" = VmId, Path, description = "The VM's name.")),
    responses(
        (status = 201, description = "It has begun.", body = MigrationInfo,
         headers(("Location" = String, description = "Its path."))),
        NotUnderstood, NoSuchVm, TooSlow, WrongState, TooLong, NotJson, NotPossible, Failed, Unsupported,
    ),
)]
async fn snapshot(
    State(service): State<Service>,
    Named(id): Named,
    Json(body): Json<VmSnapshotConfig>,
) -> Result<Response, ApiError> {
    let registry = service.registry.clone();
    let take = move || registry.take_snapshot(id.as_str(), &body, SnapshotOf::PausedOrRunning);
    let begun = begin(take, ApiError::from).await?;
    Ok(created(begun.info()))
}

/// Start to write a snapshot that needs no base from a chain of increments.
///
/// The chain is read as for a restore, and each page is checked. It stays as it is. The new snapshot has an
/// identity of its own, and is complete when the migration that the answer shows is `Completed`. Deleting
/// that migration cancels it, and nothing is left of it. No VM is involved.
#[utoipa::path(
    post, path = "/api/v1/snapshots/merge", operation_id = "mergeSnapshots", tag = MIGRATIONS, request_body = MergeSnapshots,
    responses(
        (status = 201, description = "It has begun.", body = MigrationInfo,
         headers(("Location" = String, description = "Its path."))),
        NotUnderstood, TooSlow, TooLong, NotJson, NotPossible, Failed, Unsupported,
    ),
)]
async fn merge(
    State(service): State<Service>,
    Json(body): Json<MergeSnapshots>,
) -> Result<Response, ApiError> {
    let registry = service.registry.clone();
    let begun = begin(move || registry.merge_snapshots(&body), ApiError::from).await?;
    Ok(created(begun.info()))
}

/// List the overlays beside an image of the service's host, and remove those that nothing uses if `remove` is set.
///
/// Overlays are made for snapshots and forks with frozen disks, and stay when their VM is deleted. One that a VM
/// of any service has open or a VM of this service names, that another image in the directory is on top of, or
/// that a snapshot names is kept: `reason` names the user. What is removed is logged.
#[utoipa::path(
    post, path = "/api/v1/overlays", operation_id = "findOverlays", tag = MIGRATIONS, request_body = FindOverlays,
    responses(
        (status = 200, description = "The overlays.", body = [OverlayInfo]),
        NotUnderstood, TooSlow, TooLong, NotJson, NotPossible, Failed, Unsupported,
    ),
)]
async fn overlays(
    State(service): State<Service>,
    Json(body): Json<FindOverlays>,
) -> Result<Answer<Vec<OverlayInfo>>, ApiError> {
    let registry = service.registry.clone();
    let found = tokio::task::spawn_blocking(move || registry.overlays(&body)).await;
    let failed = |_| {
        let why = "the service failed to look at the overlays";
        ApiError::new(StatusCode::INTERNAL_SERVER_ERROR, "internal", why)
    };
    Ok(Answer(found.map_err(failed)??))
}

/// Start to write a core dump of a paused VM into a file of the service's host.
///
/// The dump is an ELF file with the guest's RAM at its physical addresses and the registers of its vCPUs, which
/// `crash` and `gdb` read. It is complete when the migration that the answer shows is `Completed`. Deleting
/// that migration cancels the dump, and nothing is left of it. The VM stays paused. A file that exists is not
/// replaced.
#[utoipa::path(
    post, path = "/api/v1/vms/{id}/core-dumps", operation_id = "dumpVm", tag = MIGRATIONS, request_body = VmCoredumpData,
    params(("id" = VmId, Path, description = "The VM's name.")),
    responses(
        (status = 201, description = "It has begun.", body = MigrationInfo,
         headers(("Location" = String, description = "Its path."))),
        NotUnderstood, NoSuchVm, TooSlow, WrongState, TooLong, NotJson, NotPossible, Failed, Unsupported,
    ),
)]
async fn core_dump(
    State(service): State<Service>,
    Named(id): Named,
    Json(body): Json<VmCoredumpData>,
) -> Result<Response, ApiError> {
    let registry = service.registry.clone();
    let dump = move || registry.core_dump(id.as_str(), &body);
    let begun = begin(dump, ApiError::from).await?;
    Ok(created(begun.info()))
}

/// Start to copy a disk of a VM into a new image, on which the disk then continues.
///
/// The guest runs and writes meanwhile. When what it writes fits into `max_downtime_ms`, the disk's requests
/// wait for the last blocks, and the disk continues on the new image, whose path the VM's configuration has
/// from then on: the migration that the answer shows is `Completed`. The old image is closed and stays.
/// Deleting that migration before the switch cancels the mirror: the disk stays as it is, and the new image
/// is removed. A reboot or the end of the guest does the same.
#[utoipa::path(
    post, path = "/api/v1/vms/{id}/disks/{disk}/mirror", operation_id = "mirrorDisk", tag = MIGRATIONS, request_body = MirrorDisk,
    params(
        ("id" = VmId, Path, description = "The VM's name."),
        ("disk" = String, Path, description = "The disk's id."),
    ),
    responses(
        (status = 201, description = "It has begun.", body = MigrationInfo,
         headers(("Location" = String, description = "Its path."))),
        NotUnderstood, NoSuchVm, TooSlow, WrongState, TooLong, NotJson, NotPossible, Failed, Unsupported,
    ),
)]
async fn mirror(
    State(service): State<Service>,
    NamedDisk(id, disk): NamedDisk,
    Json(body): Json<MirrorDisk>,
) -> Result<Response, ApiError> {
    let registry = service.registry.clone();
    let mirror = move || registry.mirror_disk(id.as_str(), &disk, &body);
    let begun = begin(mirror, ApiError::from).await?;
    Ok(created(begun.info()))
}

/// Start to make a VM of this name from a snapshot, or several of which this is the start of the names.
///
/// The VM is there when the migration that the answer shows is `Completed`: paused, or running if `resume`
/// is set. A snapshot that cannot be restored leaves no VM.
#[utoipa::path(
    post, path = "/api/v1/vms/{id}/restore", operation_id = "restoreVm", tag = MIGRATIONS, request_body = RestoreConfig,
    params(("id" = VmId, Path, description = "The new VM's name.")),
    responses(
        (status = 201, description = "It has begun.", body = MigrationInfo,
         headers(("Location" = String, description = "Its path."))),
        NotUnderstood, TooSlow, Exists, TooLong, NotJson, NotPossible, Failed, Unsupported,
    ),
)]
async fn restore(
    State(service): State<Service>,
    Named(id): Named,
    JsonAndTaps(body): JsonAndTaps<RestoreConfig>,
) -> Result<Response, ApiError> {
    let registry = service.registry.clone();
    let begun = begin(move || registry.restore(&id, &body), ApiError::from).await?;
    Ok(created_with_socket(service, begun))
}

/// Start to make a VM of this name from a snapshot, and to record the working set of its guest.
///
/// The guest runs as with the mode `OnDemand`, but pages are read only when they are touched. The order of
/// their first touches is written beside the snapshot when the recording is stopped, or after `limit_s`.
/// Later restores with `OnDemand` and `Map` bring these pages first. The migration that the answer shows
/// is `Completed` when the record is written and the VM has all of its memory: the VM stays. Deleting the
/// migration ends the recording without a record.
#[utoipa::path(
    post, path = "/api/v1/vms/{id}/recording", operation_id = "recordWorkingSet", tag = MIGRATIONS, request_body = RecordWorkingSet,
    params(("id" = VmId, Path, description = "The new VM's name.")),
    responses(
        (status = 201, description = "It has begun.", body = MigrationInfo,
         headers(("Location" = String, description = "Its path."))),
        NotUnderstood, TooSlow, Exists, TooLong, NotJson, NotPossible, Failed, Unsupported,
    ),
)]
async fn record(
    State(service): State<Service>,
    Named(id): Named,
    Json(body): Json<RecordWorkingSet>,
) -> Result<Response, ApiError> {
    let registry = service.registry.clone();
    let record = move || registry.record_working_set(&id, &body);
    let begun = begin(record, ApiError::from).await?;
    Ok(created_with_socket(service, begun))
}

/// Stop recording the working set of a VM: its guest is ready. The record is written then.
#[utoipa::path(
    put, path = "/api/v1/vms/{id}/recording/stop", operation_id = "stopRecording", tag = MIGRATIONS,
    params(("id" = VmId, Path, description = "The VM's name.")),
    responses(
        (status = 204, description = "No further page is recorded."),
        NotUnderstood, NoSuchVm, WrongState,
    ),
)]
async fn end_recording(
    State(service): State<Service>,
    Named(id): Named,
) -> Result<StatusCode, ApiError> {
    service.registry.end_recording(id.as_str())?;
    Ok(StatusCode::NO_CONTENT)
}

/// Start to make VMs from a VM.
///
/// They are called `NAME-1`, `NAME-2` and so on, and begin where the VM is. All of their memory is mapped
/// from one copy of the VM's: pages that they do not write are shared. The VMs are there when the migration
/// that the answer shows is `Completed`; if one cannot be made, none is. A paused VM stays paused, and can
/// be resumed as soon as its memory is copied. A running VM stops for its device state only; it must not
/// have a disk that it can write (`disk-written`).
#[utoipa::path(
    post, path = "/api/v1/vms/{id}/forks", operation_id = "forkVm", tag = MIGRATIONS, request_body = ForkVm,
    params(("id" = VmId, Path, description = "The VM's name.")),
    responses(
        (status = 201, description = "It has begun.", body = MigrationInfo,
         headers(("Location" = String, description = "Its path."))),
        NotUnderstood, NoSuchVm, TooSlow, WrongState, TooLong, NotJson, NotPossible, Failed, Unsupported,
    ),
)]
async fn fork(
    State(service): State<Service>,
    Named(id): Named,
    Json(body): Json<ForkVm>,
) -> Result<Response, ApiError> {
    let registry = service.registry.clone();
    let fork = move || registry.fork(id.as_str(), &body);
    let begun = begin(fork, ApiError::from).await?;
    Ok(created_with_socket(service, begun))
}

/// Write a snapshot of the paused VM into a folder. The answer comes when it is complete.
#[utoipa::path(
    put, path = "/api/v1/vm.snapshot", operation_id = "vmSnapshot", tag = ONE_VM, request_body = VmSnapshotConfig,
    responses(
        (status = 204, description = "The snapshot is complete."),
        NotUnderstood, NotCreated, NotAllowedNow, TooSlow, TooLong, NotJson, NotDone, Unsupported,
    ),
)]
async fn snapshot_one(
    State(vm): State<OneVm>,
    Json(body): Json<VmSnapshotConfig>,
) -> Result<StatusCode, ApiError> {
    let (registry, id) = (vm.registry.clone(), vm.id.clone());
    wait_for(
        move || registry.take_snapshot(id.as_str(), &body, SnapshotOf::Paused),
        of_one_vms_snapshot,
    )
    .await
}

/// Write a core dump of the paused VM into a file, which must not exist. The answer comes when it is complete.
#[utoipa::path(
    put, path = "/api/v1/vm.coredump", operation_id = "vmCoredump", tag = ONE_VM, request_body = VmCoredumpData,
    responses(
        (status = 204, description = "The core dump is complete."),
        NotUnderstood, NotCreated, NotAllowedNow, TooSlow, TooLong, NotJson, NotDone, Unsupported,
    ),
)]
async fn core_dump_one(
    State(vm): State<OneVm>,
    Json(body): Json<VmCoredumpData>,
) -> Result<StatusCode, ApiError> {
    let (registry, id) = (vm.registry.clone(), vm.id.clone());
    wait_for(
        move || registry.core_dump(id.as_str(), &body),
        of_one_vms_snapshot,
    )
    .await
}

/// Make the VM from a snapshot. The answer comes when it is paused, or runs if `resume` is set.
#[utoipa::path(
    put, path = "/api/v1/vm.restore", operation_id = "vmRestore", tag = ONE_VM, request_body = RestoreConfig,
    responses(
        (status = 204, description = "The VM is restored."),
        NotValid, NoSuchSnapshot, TooSlow, Exists, TooLong, NotJson, NotDone, Unsupported,
    ),
)]
async fn restore_one(
    State(vm): State<OneVm>,
    JsonAndTaps(body): JsonAndTaps<RestoreConfig>,
) -> Result<StatusCode, ApiError> {
    if body.count.is_some() {
        return Err(ApiError::not_implemented(
            "make several VMs (`count`) on the socket of one",
        ));
    }
    let (registry, id) = (vm.registry.clone(), vm.id.clone());
    wait_for(move || registry.restore(&id, &body), of_one_vms_restore).await
}

async fn wait_for(
    operation: impl FnOnce() -> Result<Arc<dyn Migration>, RequestError> + Send + 'static,
    refuse: fn(RequestError) -> ApiError,
) -> Result<StatusCode, ApiError> {
    let begun = begin(operation, refuse).await?;
    wait(&*begun).await
}
