//! Snapshots and restores, as the tests ask for them. All panic where the service does not do as asked.

#![allow(
    clippy::unwrap_used,
    clippy::missing_panics_doc,
    reason = "for tests only"
)]

use std::path::Path;
use std::time::Duration;

use openapi::ClientError;
use spec::{MigrationInfo, RestoreConfig, VmId, VmSnapshotConfig};

use crate::Service;

/// Limit of an operation that copies all memory, also where the host is emulated.
const PATIENCE: Duration = Duration::from_secs(300);

/// The request for a snapshot into this folder.
pub fn to(dir: &Path) -> VmSnapshotConfig {
    VmSnapshotConfig::to(format!("file://{}", dir.display()))
}

/// The request for a VM from this folder.
pub fn from(dir: &Path, resume: bool) -> RestoreConfig {
    let body = serde_json::json!({
        "source_url": format!("file://{}", dir.display()), "resume": resume,
    });
    serde_json::from_value(body).unwrap()
}

/// Waits until an operation is over.
pub async fn over(at: &Service, begun: &MigrationInfo) -> MigrationInfo {
    let id: VmId = begun.id.parse().unwrap();
    let over = at.until(&id, PATIENCE, |info| info.phase.is_over()).await;
    over.unwrap()
}

/// Writes a snapshot, and waits for its end.
pub async fn snapshot(at: &Service, vm: &VmId, dir: &Path) -> MigrationInfo {
    let begun = at.client().vms_snapshot(vm, &to(dir)).await.unwrap();
    over(at, &begun).await
}

/// Makes a VM from a snapshot, and waits for its end.
pub async fn restore(at: &Service, vm: &VmId, dir: &Path, resume: bool) -> MigrationInfo {
    let begun = at.client().vms_restore(vm, &from(dir, resume)).await;
    over(at, &begun.unwrap()).await
}

/// Checks that a request was refused, with this status and code.
#[track_caller]
pub fn refused<T: std::fmt::Debug>(result: Result<T, ClientError>, status: u16, code: &str) {
    let Err(ClientError::Problem(problem)) = result else {
        unreachable!("{result:?}");
    };
    assert_eq!(
        (problem.status, problem.code.as_str()),
        (status, code),
        "{problem:?}"
    );
}
