//! The progress of a migration as Cloud Hypervisor's face shows it.
//!
//! The names and the nesting are those of `vm.migration-progress` in the fork of Cloud Hypervisor
//! that libvirt's migration drives. A variant is an object with one member, so that generators of
//! clients find a name for each part.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::limits::PAGE;
use crate::migration::{MigrationInfo, MigrationPhase};

/// The progress of the VM's migration, or how the last one ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct MigrationProgress {
    /// Start of the migration, in milliseconds since 1970.
    pub timestamp_begin_ms: u64,
    /// Time of this report, or of the migration's end, in milliseconds since 1970.
    pub timestamp_snapshot_ms: u64,
    /// Milliseconds from the start until the report.
    pub timestamp_snapshot_relative_ms: u64,
    /// The stop to aim for, in milliseconds; 0 at the destination, which does not know it.
    pub downtime_configured_ms: u64,
    /// The stop that is predicted, in milliseconds; 0 before there is a prediction.
    pub downtime_estimated_ms: u64,
    /// The connection between source and destination.
    pub transportation_mode: MigrationTransport,
    /// Whether the migration is in progress, and how it ended otherwise.
    pub state: MigrationState,
    /// The copy of the VM's memory.
    pub memory_transmission_info: MemoryTransmissionInfo,
}

/// The connection of a migration: `"Local"`, or an object with the member `Tcp`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(untagged)]
pub enum MigrationTransport {
    /// A unix socket of one host.
    Local(LocalTransport),
    /// TCP.
    Tcp(TcpTransport),
}

/// A unix socket of one host.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub enum LocalTransport {
    /// The only value.
    Local,
}

/// TCP, as an object with one member.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "PascalCase")]
pub struct TcpTransport {
    /// The connections.
    pub tcp: TcpConnections,
}

/// The TCP connections of a migration.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct TcpConnections {
    /// Number of connections for memory.
    pub connections: u32,
    /// Whether they are encrypted.
    pub tls: bool,
}

/// The state of a migration. Exactly one member is there.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "PascalCase")]
pub struct MigrationState {
    /// The migration is in progress.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ongoing: Option<OngoingMigration>,
    /// The VM has moved.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub finished: Option<MigrationOver>,
    /// The migration was canceled; the guest stays at the source.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cancelled: Option<MigrationOver>,
    /// The migration failed; the guest stays at the source.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub failed: Option<FailedMigration>,
}

/// A migration that is in progress.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct OngoingMigration {
    /// The phase.
    pub phase: OngoingPhase,
    /// Share of time for which vCPUs are kept from running, in percent.
    pub vcpu_throttle_percent: u8,
}

/// The phase of a migration that is in progress.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub enum OngoingPhase {
    /// Source and destination are not connected yet.
    Starting,
    /// Both sides check whether the migration is possible.
    Started,
    /// Shared memory is handed over as descriptors. (Not reported by this version, which does this
    /// in the phase `Started`.)
    MemoryFds,
    /// Memory is copied while the guest runs at the source.
    MemoryPrecopy,
    /// The guest is paused, is handed over, or runs at the destination while pages follow.
    Completing,
}

/// The end of a migration, about which there is no more to say.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct MigrationOver {}

/// Why a migration failed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct FailedMigration {
    /// Description, for people.
    pub error_msg: String,
    /// Stable code, for programs.
    pub error_msg_debug: String,
}

/// The copy of a VM's memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct MemoryTransmissionInfo {
    /// Rounds started so far.
    pub memory_iteration: u64,
    /// Throughput in bytes per second.
    pub memory_transmission_bps: u64,
    /// Bytes of the guest's memory.
    pub memory_bytes_total: u64,
    /// Bytes sent.
    pub memory_bytes_transmitted: u64,
    /// Bytes of the current round that are not sent yet.
    pub memory_bytes_remaining_iteration: u64,
    /// Pages sent with their content.
    pub memory_pages_4k_transmitted: u64,
    /// Pages of the current round that are not sent yet.
    pub memory_pages_4k_remaining_iteration: u64,
    /// Pages sent as zero pages.
    pub memory_pages_constant_count: u64,
    /// Pages that the guest dirties per second.
    pub memory_dirty_rate_pps: u64,
}

impl From<&MigrationInfo> for MigrationProgress {
    fn from(info: &MigrationInfo) -> Self {
        let elapsed_ms = info.elapsed_us / 1000;
        let transport = match info.endpoint.starts_with("tcp:") {
            true => MigrationTransport::Tcp(TcpTransport {
                tcp: TcpConnections {
                    // Chosen when the sides are connected: clients expect one at least.
                    connections: info.connections.max(1).into(),
                    tls: info.tls,
                },
            }),
            false => MigrationTransport::Local(LocalTransport::Local),
        };
        Self {
            timestamp_begin_ms: info.started_ms,
            timestamp_snapshot_ms: info.started_ms.saturating_add(elapsed_ms),
            timestamp_snapshot_relative_ms: elapsed_ms,
            downtime_configured_ms: info.max_downtime_ms.unwrap_or(0),
            downtime_estimated_ms: info.predicted_downtime_us.unwrap_or(0) / 1000,
            transportation_mode: transport,
            state: state(info),
            memory_transmission_info: MemoryTransmissionInfo {
                memory_iteration: info.rounds.into(),
                memory_transmission_bps: info.bytes_per_second,
                memory_bytes_total: info.memory_bytes,
                memory_bytes_transmitted: info.sent_bytes,
                memory_bytes_remaining_iteration: info.remaining_pages.saturating_mul(PAGE),
                memory_pages_4k_transmitted: info.pages,
                memory_pages_4k_remaining_iteration: info.remaining_pages,
                memory_pages_constant_count: info.zero_pages,
                memory_dirty_rate_pps: info.dirty_pages_per_second,
            },
        }
    }
}

fn state(info: &MigrationInfo) -> MigrationState {
    let ongoing = |phase| MigrationState {
        ongoing: Some(OngoingMigration {
            phase,
            vcpu_throttle_percent: info.throttle_percent,
        }),
        ..MigrationState::default()
    };
    match info.phase {
        MigrationPhase::Connecting => ongoing(OngoingPhase::Starting),
        MigrationPhase::Preparing => ongoing(OngoingPhase::Started),
        MigrationPhase::Precopy => ongoing(OngoingPhase::MemoryPrecopy),
        MigrationPhase::Stopped
        | MigrationPhase::Copying
        | MigrationPhase::HandingOver
        | MigrationPhase::Postcopy
        | MigrationPhase::PostcopyPaused
        | MigrationPhase::InDoubt => ongoing(OngoingPhase::Completing),
        MigrationPhase::Completed => MigrationState {
            finished: Some(MigrationOver {}),
            ..MigrationState::default()
        },
        MigrationPhase::Canceled => MigrationState {
            cancelled: Some(MigrationOver {}),
            ..MigrationState::default()
        },
        MigrationPhase::Failed => {
            let error = info.error.as_ref();
            MigrationState {
                failed: Some(FailedMigration {
                    error_msg: error
                        .map_or("the migration failed", |error| &error.detail)
                        .into(),
                    error_msg_debug: error.map_or("failed", |error| &error.code).into(),
                }),
                ..MigrationState::default()
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn progress(phase: &str, endpoint: &str) -> Value {
        let info = json!({
            "id": "m", "side": "source", "endpoint": endpoint, "started_ms": 1000, "elapsed_us": 2500,
            "phase": phase, "memory_bytes": 8192, "sent_bytes": 4096, "pages": 1, "zero_pages": 3,
            "remaining_pages": 2, "rounds": 4, "dirty_pages_per_second": 5, "bytes_per_second": 6,
            "throttle_percent": 7, "connections": 2, "predicted_downtime_us": 9000, "faults": 0,
            "fault_p50_us": 0, "fault_p99_us": 0, "max_downtime_ms": 300, "tls": true,
            "error": { "code": "source-lost", "detail": "the source is gone" },
        });
        let info: MigrationInfo = serde_json::from_value(info).unwrap();
        serde_json::to_value(MigrationProgress::from(&info)).unwrap()
    }

    #[test]
    fn progress_has_the_form_that_libvirt_reads() {
        let expected = json!({
            "timestamp_begin_ms": 1000, "timestamp_snapshot_ms": 1002,
            "timestamp_snapshot_relative_ms": 2, "downtime_configured_ms": 300,
            "downtime_estimated_ms": 9,
            "transportation_mode": { "Tcp": { "connections": 2, "tls": true } },
            "state": { "Ongoing": { "phase": "MemoryPrecopy", "vcpu_throttle_percent": 7 } },
            "memory_transmission_info": {
                "memory_iteration": 4, "memory_transmission_bps": 6, "memory_bytes_total": 8192,
                "memory_bytes_transmitted": 4096, "memory_bytes_remaining_iteration": 8192,
                "memory_pages_4k_transmitted": 1, "memory_pages_4k_remaining_iteration": 2,
                "memory_pages_constant_count": 3, "memory_dirty_rate_pps": 5,
            },
        });
        assert_eq!(progress("precopy", "tcp:h:1"), expected);
    }

    #[test]
    fn each_end_has_its_own_state() {
        let state = |phase| progress(phase, "unix:/m")["state"].clone();
        assert_eq!(state("completed"), json!({ "Finished": {} }));
        assert_eq!(state("canceled"), json!({ "Cancelled": {} }));
        let why = json!({ "error_msg": "the source is gone", "error_msg_debug": "source-lost" });
        assert_eq!(state("failed"), json!({ "Failed": why }));
        assert_eq!(state("in-doubt")["Ongoing"]["phase"], "Completing");
        assert_eq!(
            progress("failed", "unix:/m")["transportation_mode"],
            "Local"
        );
    }
}
