//! Core dumps of paused VMs.

use std::sync::Arc;

use control::{Migration, RequestError, VmHandle};
use migration::snapshot::{CoreDump, write_core};
use spec::{MigrationSide, VmCoredumpData};

use super::source::SourceVm;
use super::{ActiveMigration, snapshot, start};
use crate::driver::{Driver, Purpose};
use crate::pool::Pool;

/// Starts to write the memory and registers of a paused VM to a file.
pub(super) fn begin(
    pool: &Pool,
    vm: &VmHandle,
    what: &VmCoredumpData,
) -> Result<Arc<dyn Migration>, RequestError> {
    let path = snapshot::path("destination_url", &what.destination_url)?;
    let id = vm.id().clone();
    let dumping = Arc::new(ActiveMigration::new(
        MigrationSide::Source,
        Some(id.clone()),
        what.destination_url.clone(),
    ));
    let caller = pool.caller(&id).ok_or_else(RequestError::driver_gone)?;
    let (decision, progress) = (dumping.decision.clone(), dumping.progress.clone());
    let parts = caller
        .call(move |driver, _| driver.depart(Purpose::CoreDump, &decision, &progress))
        .map_err(|_| RequestError::driver_gone())??;
    let ours = Arc::clone(&dumping);
    let span = tracing::info_span!("vm", id = id.as_str());
    start("core-dump", span, &dumping, move || {
        tracing::info!(dump = %ours.id, file = ours.endpoint, "core dump: begins");
        let caller = parts.caller.clone();
        let source = SourceVm::new(id, parts);
        let ending = source.ending();
        let dump = CoreDump {
            id: ours.id,
            path: &path,
            end: &|outcome| match outcome {
                Ok(()) => ending.end("core-dumped", ours.endpoint.clone()),
                Err(why) => ending.end("core-dump-failed", why.detail.clone()),
            },
            progress: &ours.progress,
            decision: &ours.decision,
        };
        // The report has the failure, if it failed.
        let _ = write_core(&dump, || caller.attempt(Driver::core));
        ours.log_end();
    })?;
    Ok(dumping)
}
