//! Snapshots of a VM, and VMs made from snapshots: migrations whose other end is a folder.

use std::path::PathBuf;
use std::sync::Arc;

use control::{Category, Migration, Registry, RequestError, VmHandle};
use migration::snapshot::{Memory, Restoring, Saved, Snapshot, Writing, restore, write};
use migration::{Refusal, Source as _};
use spec::{
    FieldProblem, MemoryRestoreMode, MigrationSide, RefusedField, RestoreConfig, VmConfig, VmId,
    VmSnapshotConfig,
};

use super::destination::{DestinationHost, GuestOrigin, record_failure};
use super::source::SourceVm;
use super::trust::Allowed;
use super::{ActiveMigration, offer, start};
use crate::driver::Purpose;
use crate::pool::Pool;

/// Returns the folder that a URL names.
fn folder(field: &str, url: &str) -> Result<PathBuf, RequestError> {
    let path = url.strip_prefix("file://").map(PathBuf::from);
    path.filter(|path| path.is_absolute()).ok_or_else(|| {
        RequestError::invalid(vec![FieldProblem {
            pointer: format!("/{field}"),
            code: "invalid".to_owned(),
            detail: format!("{url:?} is not of the form file:///absolute/path"),
        }])
    })
}

/// Returns the configuration in the snapshot at a `file://` URL. The snapshot's files are checked, the
/// values of the configuration are not.
///
/// # Errors
/// The URL names no folder, or the folder holds no snapshot that this version reads.
pub fn snapshot_config(url: &str) -> Result<VmConfig, RequestError> {
    let dir = folder("source_url", url)?;
    let snapshot = Snapshot::open(&dir).map_err(|error| unusable(error.refusal()))?;
    let machine = offer::machine(&snapshot.offer()).map_err(unusable)?;
    Ok(machine.config)
}

fn unusable(why: Refusal) -> RequestError {
    RequestError::new(Category::Unprocessable, &why.code, why.detail)
}

/// Starts to write a snapshot of a paused VM.
pub(super) fn take(
    pool: &Pool,
    vm: &VmHandle,
    what: &VmSnapshotConfig,
) -> Result<Arc<dyn Migration>, RequestError> {
    let dir = folder("destination_url", &what.destination_url)?;
    let id = vm.id().clone();
    let taking = Arc::new(ActiveMigration::new(
        MigrationSide::Source,
        Some(id.clone()),
        what.destination_url.clone(),
    ));
    let caller = pool.caller(&id).ok_or_else(RequestError::driver_gone)?;
    let (decision, progress) = (taking.decision.clone(), taking.progress.clone());
    let parts = caller
        .call(move |driver, _| driver.depart(Purpose::Snapshot, &decision, &progress))
        .map_err(|_| RequestError::driver_gone())??;
    let ours = Arc::clone(&taking);
    let span = tracing::info_span!("vm", id = id.as_str());
    start("snapshot", span, move || {
        tracing::info!(
            snapshot = %ours.id, vm = id.as_str(), folder = ours.endpoint, memory_bytes = parts.ram.plugged_len(),
            "snapshot: begins"
        );
        let mut source = SourceVm::new(id, parts);
        let writing = Writing {
            id: ours.id,
            dir: &dir,
            progress: &ours.progress,
            decision: &ours.decision,
        };
        let written = write(&writing, || {
            let offer = source.offer()?;
            // The snapshot includes the disks as they are: all that the guest wrote is on them.
            source.flush()?;
            Ok(Saved {
                offer,
                state: source.save()?,
                blocks: source.blocks(),
            })
        });
        match written {
            Ok(()) => source.end("snapshotted", ours.endpoint.clone()),
            Err(why) => source.end("snapshot-failed", why.detail),
        }
        ours.log_end();
        ours.end();
    })?;
    Ok(taking)
}

/// Starts to make a VM from a snapshot.
pub(super) fn begin_restore(
    pool: &Pool,
    registry: &Registry,
    vm: &VmId,
    what: &RestoreConfig,
) -> Result<Arc<dyn Migration>, RequestError> {
    let refuse = |what: &str| {
        let detail = format!("this version cannot {what}");
        Err(RequestError::new(
            Category::Unsupported,
            "not-supported",
            detail,
        ))
    };
    if what.prefault && what.memory_restore_mode == MemoryRestoreMode::OnDemand {
        return refuse("populate memory (`prefault`) that is restored OnDemand");
    }
    if let Some(refused) = RefusedField::first_of("vm.restore", what) {
        return refuse(refused.what);
    }
    let dir = folder("source_url", &what.source_url)?;
    if registry.get(vm.as_str()).is_ok() {
        let detail = format!("there is a VM {:?} already", vm.as_str());
        return Err(RequestError::new(Category::Conflict, "vm-exists", detail));
    }
    let snapshot = Snapshot::open(&dir).map_err(|error| unusable(error.refusal()))?;
    let restoring = Arc::new(ActiveMigration::new(
        MigrationSide::Destination,
        Some(vm.clone()),
        what.source_url.clone(),
    ));
    // Whoever asks may create a VM with any configuration, so the snapshot's may be any too.
    let ours = Arc::clone(&restoring);
    let origin = GuestOrigin::Snapshot {
        prefault: what.prefault,
    };
    let host = DestinationHost::new(
        pool,
        registry.clone(),
        Arc::clone(&restoring),
        Allowed::all(),
        origin,
    );
    let (id, registry, what) = (vm.clone(), registry.clone(), what.clone());
    let span = tracing::info_span!("vm", id = vm.as_str());
    start("restore", span, move || {
        let manifest = snapshot.manifest();
        tracing::info!(
            restore = %ours.id, snapshot = %manifest.id, folder = ours.endpoint, from = manifest.vm,
            created_ms = manifest.created_ms, "restore: begins"
        );
        registry.record(&id, "restoring", Some(format!("from {}", ours.endpoint)));
        // The report has the failure, if it failed.
        let _ = restore(&Restoring {
            id: ours.id,
            snapshot: &snapshot,
            offer: snapshot.offer(),
            memory: match what.memory_restore_mode {
                MemoryRestoreMode::Copy => Memory::Copy,
                MemoryRestoreMode::OnDemand => Memory::OnDemand,
                MemoryRestoreMode::Map => Memory::Map,
            },
            verify: what.verify,
            host: &host,
            resume: what.resume,
            arrived: &|| {
                ours.settled.send_replace(true);
            },
            progress: &ours.progress,
            decision: &ours.decision,
        });
        record_failure(&ours, &registry, &id, origin);
        ours.log_end();
        ours.end();
    })?;
    Ok(restoring)
}
