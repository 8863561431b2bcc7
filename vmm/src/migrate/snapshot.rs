//! Snapshots of a VM: migrations whose other end is a folder.

use std::path::PathBuf;
use std::sync::Arc;

use control::{Category, Migration, RequestError, VmHandle};
use migration::snapshot::{Saved, Snapshot, Writing, write};
use migration::{Refusal, Source as _};
use spec::{FieldProblem, MigrationSide, VmConfig, VmSnapshotConfig};

use super::source::SourceVm;
use super::{ActiveMigration, offer, start};
use crate::driver::Purpose;
use crate::pool::Pool;

/// Returns the folder that a URL names.
pub(super) fn folder(field: &str, url: &str) -> Result<PathBuf, RequestError> {
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

pub(super) fn unusable(why: Refusal) -> RequestError {
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
