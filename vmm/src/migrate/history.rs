//! Migrations of an earlier process, as read from their journals. They can only be listed: their
//! guests ended with that process, or run elsewhere.

use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use control::{Category, Migration, RequestError};
use migration::{Entry, Side, Step};
use spec::{MigrationError, MigrationInfo, MigrationOutcome, MigrationPhase, MigrationSide, VmId};
use tokio::sync::watch;
use uuid::Uuid;

use super::journals::Journals;

/// How long journals are kept: no peer asks after that.
const KEPT: Duration = Duration::from_secs(7 * 24 * 3600);

struct PastMigration {
    info: MigrationInfo,
    over: watch::Sender<bool>,
}

/// Returns the migrations that the journals describe. Removes journals that are too old.
pub(super) fn all(journals: &Journals) -> Vec<Arc<dyn Migration>> {
    let listed = journals.list().unwrap_or_else(|error| {
        tracing::warn!(%error, "cannot read the journals of migrations");
        Vec::new()
    });
    let now = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    let mut recalled: Vec<Arc<dyn Migration>> = Vec::new();
    for (id, side, steps) in listed {
        let Some(last) = steps.last() else { continue };
        if now.saturating_sub(Duration::from_millis(last.time_ms)) > KEPT {
            journals.forget(id, side);
            continue;
        }
        recalled.push(Arc::new(PastMigration {
            info: info(id, side, &steps, last),
            over: watch::Sender::new(true),
        }));
    }
    recalled
}

fn info(id: Uuid, side: Side, steps: &[Entry], last: &Entry) -> MigrationInfo {
    let started = steps.first().map_or(last.time_ms, |first| first.time_ms);
    let (phase, code, detail) = match (side, last.step) {
        (Side::Source, Step::Commit) => (
            MigrationPhase::Failed,
            "service-ended",
            "the service ended after the guest was handed over and before the destination \
             confirmed that it runs: look at the destination",
        ),
        (Side::Destination, Step::Running) => (
            MigrationPhase::Completed,
            "service-ended",
            "the guest ran here, and ended with the service",
        ),
        (_, Step::Running) => (MigrationPhase::Completed, "moved", "the guest moved"),
        (Side::Destination, Step::Ready) => (
            MigrationPhase::Failed,
            "service-ended",
            "the service ended before the commit message arrived: the guest never ran here",
        ),
        (_, Step::Aborted) => (
            MigrationPhase::Failed,
            "aborted",
            "the guest stayed at the source",
        ),
        _ => (
            MigrationPhase::Failed,
            "service-ended",
            "the service ended before the guest was handed over",
        ),
    };
    MigrationInfo {
        id: id.to_string(),
        side: match side {
            Side::Source => MigrationSide::Source,
            Side::Destination => MigrationSide::Destination,
        },
        vm: last.vm.parse::<VmId>().ok(),
        disk: None,
        bases: Vec::new(),
        endpoint: String::new(),
        started_ms: started,
        elapsed_us: last.time_ms.saturating_sub(started).saturating_mul(1000),
        phase,
        memory_bytes: 0,
        disk_bytes: 0,
        disk_remaining_bytes: 0,
        sent_bytes: 0,
        pages: 0,
        zero_pages: 0,
        verified_pages: 0,
        remaining_pages: 0,
        rounds: 0,
        history: Vec::new(),
        timeline: Vec::new(),
        dirty_pages_per_second: 0,
        bytes_per_second: 0,
        throttle_percent: 0,
        connections: 0,
        tls: false,
        max_downtime_ms: None,
        eta_us: None,
        predicted_downtime_us: None,
        called_off: 0,
        downtime: None,
        undecided_us: None,
        faults: 0,
        disk_faults: 0,
        fault_p50_us: 0,
        fault_p99_us: 0,
        first_instruction_us: None,
        working_set_pages: None,
        working_set_us: None,
        error: Some(MigrationError {
            code: code.to_owned(),
            detail: detail.to_owned(),
        }),
    }
}

fn is_over() -> RequestError {
    let detail = "the migration is over: it belongs to an earlier process";
    RequestError::new(Category::Conflict, "migration-over", detail)
}

impl Migration for PastMigration {
    fn info(&self) -> MigrationInfo {
        self.info.clone()
    }

    fn cancel(&self) -> Result<(), RequestError> {
        Err(is_over())
    }

    fn resolve(&self, _: MigrationOutcome) -> Result<(), RequestError> {
        Err(is_over())
    }

    fn over(&self) -> watch::Receiver<bool> {
        self.over.subscribe()
    }
}
