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

/// Returns the migrations that the journals describe, oldest first. Removes journals that are too old.
pub(super) fn all(journals: &Journals) -> Vec<Arc<dyn Migration>> {
    let listed = journals.list().unwrap_or_else(|error| {
        tracing::warn!(%error, "cannot read the journals of migrations");
        Vec::new()
    });
    let now = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    let mut recalled = Vec::new();
    for (id, side, steps) in listed {
        let Some(last) = steps.last() else { continue };
        if now.saturating_sub(Duration::from_millis(last.time_ms)) > KEPT {
            journals.forget(id, side);
            continue;
        }
        recalled.push(info(id, side, &steps, last));
    }
    // A directory has no order of its own. The number makes the order the same each time.
    recalled.sort_by(|one, other| (one.started_ms, &one.id).cmp(&(other.started_ms, &other.id)));
    let past = |info| {
        Arc::new(PastMigration {
            info,
            over: watch::Sender::new(true),
        }) as Arc<dyn Migration>
    };
    recalled.into_iter().map(past).collect()
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
        (Side::Destination, Step::Running) if last.incomplete => (
            MigrationPhase::Failed,
            "service-ended",
            "the service ended while the guest ran here without all of its memory and disks: what had not \
             come is lost, and an image with missing blocks is marked by `IMAGE.incomplete`",
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
        endpoint: steps
            .first()
            .map(|first| first.endpoint.clone())
            .unwrap_or_default(),
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

#[cfg(test)]
mod tests {
    use super::*;

    /// A guest that ran without all of its pages is lost; older versions did not record whether it did.
    #[test]
    fn guest_with_missing_pages_is_lost_with_its_service() {
        let dir = tempfile::tempdir().unwrap();
        let journals = Journals::new(dir.path().to_owned());
        for (is_whole, phase) in [
            (false, MigrationPhase::Failed),
            (true, MigrationPhase::Completed),
        ] {
            let id = Uuid::new_v4();
            let mut journal = journals.open(id, Side::Destination, "vm", "").unwrap();
            journal.record(Step::Prepare).unwrap();
            journal.record_incomplete().unwrap();
            if is_whole {
                journal.record(Step::Running).unwrap();
            }
            drop(journal);
            let listed = all(&journals);
            let mut infos = listed.iter().map(|past| past.info());
            let info = infos.find(|info| info.id == id.to_string()).unwrap();
            assert_eq!(info.phase, phase);
            let error = info.error.unwrap();
            assert_eq!(error.code, "service-ended");
            assert_eq!(error.detail.contains("had not come"), !is_whole);
            // Whatever was missing: the source must not resume its copy.
            assert_eq!(journals.fate(id), migration::Fate::Ran);
        }
    }

    /// A directory has no order of its own; journals of older versions have no endpoints.
    #[test]
    fn past_migrations_are_in_order_and_have_endpoints() {
        let dir = tempfile::tempdir().unwrap();
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
        let now = u64::try_from(now.as_millis()).unwrap();
        let endpoint = |turn: u64| match turn {
            0 => String::new(),
            turn => format!("unix:/run/{turn}"),
        };
        for turn in 0..20 {
            let side = ["source", "destination"][usize::from(turn % 2 == 0)];
            let line = |step: &str, time_ms: u64| serde_json::json!({ "step": step, "time_ms": time_ms, "vm": "vm", "boot": "b" });
            let mut first = line("prepare", now + turn);
            if turn > 0 {
                first["endpoint"] = endpoint(turn).into();
            }
            // The oldest ends last.
            let last = line("aborted", now + 100 - turn);
            let name = format!("{}.{side}.journal", Uuid::new_v4());
            std::fs::write(dir.path().join(name), format!("{first}\n{last}\n")).unwrap();
        }
        let listed = all(&Journals::new(dir.path().to_owned()));
        let listed: Vec<_> = listed.iter().map(|past| past.info().endpoint).collect();
        assert_eq!(listed, (0..20).map(endpoint).collect::<Vec<_>>());
    }
}
