//! Migrations, as the service's own face shows them.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::service::VmId;

/// When memory is copied: before the guest moves, after it, or both.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum MemoryMode {
    /// All before the guest.
    #[default]
    Precopy,
    /// In some rounds before the guest, and the rest after it.
    Hybrid,
    /// All after it.
    Postcopy,
}

impl std::fmt::Display for MemoryMode {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Precopy => "precopy",
            Self::Hybrid => "hybrid",
            Self::Postcopy => "postcopy",
        })
    }
}

/// Action at the deadline of a migration that has not ended.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum AtDeadline {
    /// Cancel; the guest stays at the source.
    #[default]
    Cancel,
    /// The vCPUs are slowed down more and more, until it can be done.
    Throttle,
    /// The guest is moved, and its pages follow.
    Postcopy,
    /// The guest is stopped for as long as it takes.
    Stop,
}

fn default_max_downtime_ms() -> u64 {
    300
}

fn default_deadline_s() -> u64 {
    3600
}

/// A migration to begin.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct StartMigration {
    /// Address at which the other service listens: `unix:/a/socket` or `tcp:host:port`.
    pub destination: String,
    /// When memory moves.
    #[serde(default)]
    pub mode: MemoryMode,
    /// How long the guest may stand, in milliseconds.
    #[serde(default = "default_max_downtime_ms")]
    #[schema(minimum = 1)]
    pub max_downtime_ms: u64,
    /// How long it may take, in seconds.
    #[serde(default = "default_deadline_s")]
    #[schema(minimum = 1)]
    pub deadline_s: u64,
    /// Action at the deadline.
    #[serde(default)]
    pub at_deadline: AtDeadline,
    /// Connections for memory; chosen when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(minimum = 1, maximum = 16)]
    pub connections: Option<u16>,
    /// Bytes that may be sent in a second; as many as can be when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(minimum = 1)]
    pub max_bandwidth: Option<u64>,
    /// Have the destination compare a hash of every page with the source's before the guest runs there
    /// (in postcopy: as pages arrive). A page that differs fails the migration with the code
    /// `memory-differs-at`. Adds to the stop, beyond `max_downtime_ms`.
    #[serde(default)]
    pub verify: bool,
    /// How long the guest may be paused before the destination is ready, in milliseconds; then it
    /// resumes at the source. When absent, ten times the longer of `max_downtime_ms` and the stop that
    /// was predicted, and 10 seconds at least.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(minimum = 1)]
    pub stop_limit_ms: Option<u64>,
    /// To another process of this host, over a unix socket: it is given the memory itself where that is shared
    /// (`memory.shared`), and nothing is copied.
    #[serde(default)]
    pub local: bool,
    /// Encrypt with TLS, by the files of this directory: `ca-cert.pem`, `client-cert.pem`, `client-key.pem`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tls_dir: Option<String>,
    /// Send over TCP without TLS: whoever is on the way can read the guest's memory and change it. Refused
    /// otherwise, unless the service was started with `--migration-insecure`.
    #[serde(default)]
    pub insecure: bool,
}

impl StartMigration {
    /// To this place, and all else as it is by default.
    #[must_use]
    pub fn to(destination: impl Into<String>) -> Self {
        Self {
            destination: destination.into(),
            mode: MemoryMode::default(),
            max_downtime_ms: default_max_downtime_ms(),
            deadline_s: default_deadline_s(),
            at_deadline: AtDeadline::default(),
            connections: None,
            max_bandwidth: None,
            verify: false,
            stop_limit_ms: None,
            local: false,
            tls_dir: None,
            insecure: false,
        }
    }
}

/// A migration to wait for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct AwaitMigration {
    /// Address to listen at: `unix:/a/socket` or `tcp:host:port`; with port 0 the host chooses.
    pub listen: String,
    /// The name that the VM gets here; the one that it has at the source when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vm: Option<VmId>,
    /// Encrypt with TLS, by the files of this directory: `ca-cert.pem`, `server-cert.pem`, `server-key.pem`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tls_dir: Option<String>,
    /// End the wait at the first VM that this host refuses. When false, the refusal is shown as the
    /// migration's `error`, and the wait continues.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub once: bool,
    /// With TLS, the hosts that may send: names or addresses in their certificates, or `*` for each host whose
    /// certificate the CA signed. At least one; when absent, those of `--migration-peer`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tls_peers: Option<Vec<String>>,
    /// Listen on TCP without TLS: any host that can connect may send a VM. Refused otherwise, unless the service
    /// was started with `--migration-insecure`.
    #[serde(default)]
    pub insecure: bool,
    /// Directories and files, absolute, below which the VM may name files and sockets of this host. When absent, over
    /// TCP those of `--migration-allow`, and on a unix socket, to which only this user can connect, all of them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub allow: Option<Vec<String>>,
    /// Taps that the VM may use, by name; with a `*` at the end, all that begin so. `vmtap*` are those that are made
    /// for interfaces without a name. When absent, as for `allow`, those of `--migration-allow-tap`, or all.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub allow_taps: Option<Vec<String>>,
}

impl AwaitMigration {
    /// At this place, and all else as it is by default.
    #[must_use]
    pub fn at(listen: impl Into<String>) -> Self {
        Self {
            listen: listen.into(),
            vm: None,
            tls_dir: None,
            once: false,
            tls_peers: None,
            insecure: false,
            allow: None,
            allow_taps: None,
        }
    }
}

/// The decision about a migration in doubt.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum MigrationOutcome {
    /// The guest resumes here.
    Run,
    /// The guest does not resume here; the VM is deleted.
    Discard,
}

/// A decision about a migration that is in doubt.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ResolveMigration {
    /// The decision for the guest at this side.
    pub outcome: MigrationOutcome,
}

/// A side of a migration.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum MigrationSide {
    /// The guest goes from here.
    Source,
    /// The guest comes here.
    Destination,
}

/// The phase of a migration.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum MigrationPhase {
    /// The source looks for the destination, or the destination waits for a source.
    Connecting,
    /// Both see whether it can be, and the destination makes room.
    Preparing,
    /// Memory is copied while the guest runs at the source.
    Precopy,
    /// The guest stands.
    Stopped,
    /// The guest is given away, and it is awaited that it runs there.
    HandingOver,
    /// The guest runs at the destination, and pages follow.
    Postcopy,
    /// Postcopy, with a lost connection.
    PostcopyPaused,
    /// The connection was lost during the hand-over. The migration continues when both sides are connected
    /// again, or when an operator resolves it.
    InDoubt,
    /// The guest has moved.
    Completed,
    /// Canceled; the guest stays at the source.
    Canceled,
    /// Failed; the guest stays at the source.
    Failed,
}

impl MigrationPhase {
    /// Whether nothing changes any more.
    #[must_use]
    pub fn is_over(self) -> bool {
        matches!(self, Self::Completed | Self::Canceled | Self::Failed)
    }
}

impl std::fmt::Display for MigrationPhase {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Connecting => "connecting",
            Self::Preparing => "preparing",
            Self::Precopy => "precopy",
            Self::Stopped => "stopped",
            Self::HandingOver => "handing-over",
            Self::Postcopy => "postcopy",
            Self::PostcopyPaused => "postcopy-paused",
            Self::InDoubt => "in-doubt",
            Self::Completed => "completed",
            Self::Canceled => "canceled",
            Self::Failed => "failed",
        })
    }
}

/// The stop of a guest, in parts; microseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct MigrationDowntime {
    /// From the order to stop until the guest went on.
    pub total_us: u64,
    /// Until vCPUs and devices stood.
    pub pause_us: u64,
    /// Sending the last pages, and saving beside it.
    pub save_us: u64,
    /// Sending what was saved, and hearing that it was loaded.
    pub transfer_us: u64,
    /// The part for loading at the destination.
    pub load_us: u64,
    /// From the decision until the guest went on.
    pub hand_over_us: u64,
    /// Comparing memory (`verify`).
    #[serde(default)]
    pub verify_us: u64,
    /// Pages that were sent in the stop.
    pub pages: u64,
}

/// Why a migration failed, was called off or is in doubt.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct MigrationError {
    /// Stable, for programs.
    pub code: String,
    /// For people.
    pub detail: String,
}

/// A migration, as one side sees it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct MigrationInfo {
    /// Its name at this side.
    pub id: String,
    /// Which side this is.
    pub side: MigrationSide,
    /// The VM; absent at a destination that does not know yet.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vm: Option<VmId>,
    /// Address of the destination's listener.
    pub endpoint: String,
    /// When it began, in milliseconds since 1970.
    pub started_ms: u64,
    /// Microseconds since then, or until it was over.
    pub elapsed_us: u64,
    /// The phase.
    pub phase: MigrationPhase,
    /// Bytes of the guest's memory.
    pub memory_bytes: u64,
    /// Bytes that went over the connections for memory.
    pub sent_bytes: u64,
    /// Pages that were sent with what is in them.
    pub pages: u64,
    /// Pages that were sent as zeros.
    pub zero_pages: u64,
    /// Pages of which hashes were sent (source) or compared (destination): `verify`.
    #[serde(default)]
    pub verified_pages: u64,
    /// Pages of the present round that are still to be sent.
    pub remaining_pages: u64,
    /// Rounds that were begun.
    pub rounds: u32,
    /// Pages that the guest writes in a second.
    pub dirty_pages_per_second: u64,
    /// Bytes that arrive in a second.
    pub bytes_per_second: u64,
    /// How much of the time vCPUs are kept from running, in percent.
    pub throttle_percent: u8,
    /// Connections for memory.
    pub connections: u16,
    /// How long this round will take, in microseconds, if nothing changes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub eta_us: Option<u64>,
    /// How long the stop would be, or was expected to be when it began, in microseconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub predicted_downtime_us: Option<u64>,
    /// How long it was.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub downtime: Option<MigrationDowntime>,
    /// Pages that the guest waited for after the hand-over.
    pub faults: u64,
    /// How long it waited, in microseconds: the median.
    pub fault_p50_us: u64,
    /// How long it waited, in microseconds: 99 of 100 waited no longer.
    pub fault_p99_us: u64,
    /// Why it failed, was called off or is in doubt.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<MigrationError>,
}
