//! Migrations, as the service's own face shows them.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::descriptors::RestoredNetConfig;
use crate::disk::MigratedBase;
use crate::service::VmId;
use crate::timeline::MigrationStep;

/// When memory is copied: before the guest moves, after it, or both.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum MemoryMode {
    /// All memory is copied before the guest moves, if the guest writes little enough. If rounds are predicted
    /// not to make the stop short enough by the deadline, the rest is copied after it, or, where the
    /// destination cannot do that, the vCPUs are slowed down.
    #[default]
    Auto,
    /// All memory is copied before the guest moves.
    Precopy,
    /// Some rounds are copied before the guest moves, and the rest after it.
    Hybrid,
    /// All memory is copied after the guest has moved.
    Postcopy,
}

impl std::fmt::Display for MemoryMode {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Auto => "auto",
            Self::Precopy => "precopy",
            Self::Hybrid => "hybrid",
            Self::Postcopy => "postcopy",
        })
    }
}

/// Action at the deadline of a migration that has not ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum AtDeadline {
    /// Cancel; the guest stays at the source.
    Cancel,
    /// Slow the vCPUs down more and more, until the stop is short enough.
    Throttle,
    /// Switch to postcopy: the guest moves, and its pages follow.
    Postcopy,
    /// Stop the guest for as long as the rest of its memory takes.
    Stop,
}

/// Whether the image of a disk moves with the VM.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum StorageMode {
    /// Both services have the image at the same path, as on shared storage.
    #[default]
    Shared,
    /// The content is copied into a new image, which the destination makes in its directory for that.
    Copy,
}

impl StorageMode {
    pub(crate) fn is_shared(&self) -> bool {
        *self == Self::Shared
    }
}

/// How one disk moves.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct DiskStorage {
    /// Id of the disk.
    pub id: String,
    /// How it moves.
    pub storage: StorageMode,
    /// With `copy`: name of the image in the destination's directory, 1 to 128 letters, digits, `-`, `_` and
    /// `.`, not starting with `.` or `-`. When absent: `VM-DISK.raw` or `VM-DISK.qcow2`, or with `-2` and so on
    /// behind `DISK` if there is such a file.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(min_length = 1, max_length = 128)]
    pub name: Option<String>,
}

impl DiskStorage {
    /// Maximum length of the name of an image.
    pub const NAME_LEN: usize = 128;

    /// Whether an image at a destination can have this name: one component of a path, and no hidden file.
    #[must_use]
    pub fn is_image_name(name: &str) -> bool {
        let is_plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte);
        let begins_well = name
            .bytes()
            .next()
            .is_some_and(|first| !b".-".contains(&first));
        begins_well && name.len() <= Self::NAME_LEN && name.bytes().all(is_plain)
    }
}

fn default_max_downtime_ms() -> u64 {
    300
}

fn yes() -> bool {
    true
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
    /// When memory is copied.
    #[serde(default)]
    pub mode: MemoryMode,
    /// How long the guest may be stopped, in milliseconds.
    #[serde(default = "default_max_downtime_ms")]
    #[schema(minimum = 1)]
    pub max_downtime_ms: u64,
    /// Time limit of the migration, in seconds.
    #[serde(default = "default_deadline_s")]
    #[schema(minimum = 1)]
    pub deadline_s: u64,
    /// Action at the deadline. In mode `auto` it is done as soon as the deadline cannot be kept, but `cancel`,
    /// which waits for the deadline. When absent: `postcopy` in mode `auto` (`throttle` if the destination cannot
    /// do that), `cancel` in the others.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub at_deadline: Option<AtDeadline>,
    /// Number of connections for memory; chosen by the service when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(minimum = 1, maximum = 16)]
    pub connections: Option<u16>,
    /// Bandwidth limit in bytes per second; unlimited when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(minimum = 1)]
    pub max_bandwidth: Option<u64>,
    /// Whether the guest runs at the destination as soon as it is there. If false, it stays paused there
    /// until it is resumed, also while pages follow it (postcopy).
    #[serde(default = "yes")]
    pub resume: bool,
    /// Have the destination compare a hash of every page with the source's before the guest runs there
    /// (in postcopy: as pages arrive). A page that differs fails the migration with the code
    /// `memory-differs-at`. Adds to the stop, beyond `max_downtime_ms`.
    #[serde(default)]
    pub verify: bool,
    /// How long the guest may be paused before the destination is ready, in milliseconds; then it
    /// resumes at the source. When absent, ten times the longer of `max_downtime_ms` and the
    /// predicted stop, but at least 10 seconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(minimum = 1)]
    pub stop_limit_ms: Option<u64>,
    /// For how long the guest stays paused after its state was sent, in milliseconds, if the destination
    /// is lost before it answers and cannot be told that the guest stays; then the guest resumes at the
    /// source. A cancel ends the wait. For clusters: a source that is fenced in this time has not run the
    /// guest since. When absent, the guest resumes as soon as the destination is lost.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(minimum = 1)]
    pub hold_ms: Option<u64>,
    /// How disks move. With `copy` the destination makes new images, raw or qcow2 as here, in the
    /// directory that its operator named (`--migration-storage`). In postcopy, blocks of disks follow the
    /// guest as pages of its memory do. The images here stay.
    #[serde(default)]
    pub storage: StorageMode,
    /// Disks that move in another way than `storage` says.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub disks: Option<Vec<DiskStorage>>,
    /// The destination is another process on this host, reached over a unix socket. Memory that is
    /// shared (`memory.shared`) is handed over by descriptor, and nothing is copied.
    #[serde(default)]
    pub local: bool,
    /// Encrypt with TLS, using the files in this directory: `ca-cert.pem`, `client-cert.pem`,
    /// `client-key.pem`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tls_dir: Option<String>,
    /// Send over TCP without TLS: anyone on the network path can read and change the guest's
    /// memory. Without this field, the service refuses TCP without TLS unless it was started with
    /// `--migration-insecure`.
    #[serde(default)]
    pub insecure: bool,
}

impl StartMigration {
    /// The action at the deadline.
    #[must_use]
    pub fn at_deadline(&self) -> AtDeadline {
        self.at_deadline.unwrap_or(match self.mode {
            MemoryMode::Auto => AtDeadline::Postcopy,
            MemoryMode::Precopy | MemoryMode::Hybrid | MemoryMode::Postcopy => AtDeadline::Cancel,
        })
    }

    /// A migration to `destination`, with default values for all other fields.
    #[must_use]
    pub fn to(destination: impl Into<String>) -> Self {
        Self {
            destination: destination.into(),
            mode: MemoryMode::default(),
            max_downtime_ms: default_max_downtime_ms(),
            deadline_s: default_deadline_s(),
            at_deadline: None,
            connections: None,
            max_bandwidth: None,
            resume: true,
            verify: false,
            stop_limit_ms: None,
            hold_ms: None,
            storage: StorageMode::default(),
            disks: None,
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
    /// Name of the VM at this host; its name at the source when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vm: Option<VmId>,
    /// Encrypt with TLS, using the files in this directory: `ca-cert.pem`, `server-cert.pem`,
    /// `server-key.pem`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tls_dir: Option<String>,
    /// Whether the guest runs here as soon as it is here, if the source wants that too. If false, it stays
    /// paused until it is resumed, also while pages follow it (postcopy).
    #[serde(default = "yes")]
    pub resume: bool,
    /// End the wait at the first VM that this host refuses. When false, the refusal is shown as the
    /// migration's `error`, and the wait continues.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub once: bool,
    /// With TLS, the hosts that may send: names or addresses in their certificates, or `*` for
    /// every host whose certificate the CA signed. At least one; when absent, those of
    /// `--migration-peer`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tls_peers: Option<Vec<String>>,
    /// Listen on TCP without TLS: any host that can connect may send a VM. Without this field, the
    /// service refuses TCP without TLS unless it was started with `--migration-insecure`.
    #[serde(default)]
    pub insecure: bool,
    /// Absolute paths of directories and files: the VM may name only files and sockets of this host
    /// that are below one of them. When absent: over TCP the paths of `--migration-allow`; on a
    /// unix socket, to which only this user can connect, all paths.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub allow: Option<Vec<String>>,
    /// Names of taps that the VM may use; a `*` at the end matches any rest of the name. `vmtap*`
    /// are the taps that the service creates for interfaces without `tap`. When absent: over TCP
    /// the taps of `--migration-allow-tap`; on a unix socket all taps.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub allow_taps: Option<Vec<String>>,
    /// Absolute path of the directory in which images of disks are made that come with the VM. When
    /// absent: that of `--migration-storage`; if there is none, such a VM is refused.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub storage: Option<String>,
    /// Descriptors for interfaces whose taps were passed as descriptors, or for others in place of their taps.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub net_fds: Option<Vec<RestoredNetConfig>>,
}

impl AwaitMigration {
    /// A wait at `listen`, with default values for all other fields.
    #[must_use]
    pub fn at(listen: impl Into<String>) -> Self {
        Self {
            listen: listen.into(),
            vm: None,
            tls_dir: None,
            resume: true,
            once: false,
            tls_peers: None,
            insecure: false,
            allow: None,
            allow_taps: None,
            storage: None,
            net_fds: None,
        }
    }
}

/// The decision about a migration in doubt.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum MigrationOutcome {
    /// The guest runs at this side.
    Run,
    /// The guest does not run at this side, and the VM is deleted.
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
    /// The side that the guest leaves.
    Source,
    /// The side that the guest moves to.
    Destination,
}

/// The phase of a migration.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum MigrationPhase {
    /// The source looks for the destination, or the destination waits for a source.
    Connecting,
    /// Both sides check whether the migration is possible, and the destination builds the machine.
    Preparing,
    /// Memory is copied while the guest runs at the source.
    Precopy,
    /// The guest is paused.
    Stopped,
    /// A live snapshot: the guest runs again, and its memory is copied as it was in the stop.
    Copying,
    /// The guest was handed over, and the source waits until it runs at the destination.
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
            Self::Copying => "copying",
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

/// Duration of a guest's stop and of its parts, in microseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct MigrationDowntime {
    /// From the request to stop until the guest resumed.
    pub total_us: u64,
    /// Pausing vCPUs and devices.
    pub pause_us: u64,
    /// Sending the last pages, and saving device state at the same time.
    pub save_us: u64,
    /// Sending the saved state, until the destination reports that it is loaded.
    pub transfer_us: u64,
    /// Loading at the destination, a part of `transfer_us`.
    pub load_us: u64,
    /// From the decision until the guest resumed.
    pub hand_over_us: u64,
    /// Comparing memory, with `verify`.
    #[serde(default)]
    pub verify_us: u64,
    /// Write-protecting memory, for a live snapshot.
    #[serde(default)]
    pub protect_us: u64,
    /// Pages that were sent in the stop, blocks of 4 KiB of copied disks among them.
    pub pages: u64,
}

/// Why a migration failed, was canceled or is in doubt.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct MigrationError {
    /// Stable code, for programs.
    pub code: String,
    /// Description, for people.
    pub detail: String,
}

/// A migration, as one side sees it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct MigrationInfo {
    /// Name of the migration at this side.
    pub id: String,
    /// The side that reports.
    pub side: MigrationSide,
    /// The VM; absent at a destination that has not received an offer yet.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vm: Option<VmId>,
    /// The disk, of a mirror of one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub disk: Option<String>,
    /// Use that was made of the base images of copied disks.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub bases: Vec<MigratedBase>,
    /// Address of the destination's listener; `file://PATH` of a snapshot, core dump or mirror.
    pub endpoint: String,
    /// Start time, in milliseconds since 1970.
    pub started_ms: u64,
    /// Duration so far, or until the end, in microseconds.
    pub elapsed_us: u64,
    /// The phase.
    pub phase: MigrationPhase,
    /// Bytes of the guest's memory.
    pub memory_bytes: u64,
    /// Bytes of the disks that are copied, as the guest sees them.
    #[serde(default)]
    pub disk_bytes: u64,
    /// Bytes of disks in the current round that are not sent yet; in postcopy, at both sides, those that
    /// the destination does not have yet.
    #[serde(default)]
    pub disk_remaining_bytes: u64,
    /// Bytes sent over the connections for memory and disks.
    pub sent_bytes: u64,
    /// Pages sent with their content.
    pub pages: u64,
    /// Pages sent as zero pages.
    pub zero_pages: u64,
    /// With `verify`: pages whose hashes were sent (source) or compared (destination).
    #[serde(default)]
    pub verified_pages: u64,
    /// Pages of memory in the current round that are not sent yet.
    pub remaining_pages: u64,
    /// Rounds started so far.
    pub rounds: u32,
    /// The last rounds that have ended, at most 64; empty at the destination.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schema(max_items = 64)]
    pub history: Vec<MigrationRound>,
    /// The steps so far, one behind the other without gaps, the last of which may be in progress. At
    /// most 96: where there were more, the oldest rounds are left out.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schema(max_items = 96)]
    pub timeline: Vec<MigrationStep>,
    /// Pages that the guest dirties per second.
    pub dirty_pages_per_second: u64,
    /// Throughput in bytes per second.
    pub bytes_per_second: u64,
    /// Share of time for which vCPUs are kept from running, in percent.
    pub throttle_percent: u8,
    /// Number of connections for memory.
    pub connections: u16,
    /// Whether the connections are encrypted (`tls_dir`).
    #[serde(default)]
    pub tls: bool,
    /// How long the guest may be stopped, in milliseconds; absent at the destination.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_downtime_ms: Option<u64>,
    /// Estimated time until the end of this round, in microseconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub eta_us: Option<u64>,
    /// Predicted stop in microseconds: as of now, or when the stop began.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub predicted_downtime_us: Option<u64>,
    /// Stops that were called off because they took longer than three times `max_downtime_ms`, and 50 ms
    /// at least.
    #[serde(default)]
    pub called_off: u32,
    /// Duration of the stop, once it has ended.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub downtime: Option<MigrationDowntime>,
    /// In the phases `handing-over` and `in-doubt`: for how long it has been undecided where the guest runs, in
    /// microseconds. At the destination, since the guest's state came.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub undecided_us: Option<u64>,
    /// Pages that the guest waited for: after the hand-over, or while a live snapshot was copied.
    pub faults: u64,
    /// Blocks of disks that requests of the guest waited for after the hand-over, at the destination; `faults`
    /// counts them, too.
    #[serde(default)]
    pub disk_faults: u64,
    /// Median wait for such a page, in microseconds.
    pub fault_p50_us: u64,
    /// 99th percentile of the wait for such a page, in microseconds.
    pub fault_p99_us: u64,
    /// Microseconds from the request until the guest ran, for a restore with `resume`. Of several VMs, the
    /// last that did.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub first_instruction_us: Option<u64>,
    /// Pages of the snapshot's working set, which a restore brings first, or which were recorded.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub working_set_pages: Option<u64>,
    /// Microseconds from the request until the working set was brought, for a restore. Of several VMs,
    /// the last so far.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub working_set_us: Option<u64>,
    /// Why the migration failed, was canceled or is in doubt.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<MigrationError>,
}

/// A round of pages that was copied while the guest ran.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct MigrationRound {
    /// Its number, from 1 on.
    pub round: u32,
    /// Pages that it copied; blocks of 4 KiB of copied disks count as pages.
    pub pages: u64,
    /// Its duration in microseconds.
    pub took_us: u64,
    /// Throughput in bytes per second.
    pub bytes_per_second: u64,
    /// Pages that the guest wrote meanwhile, which were left to copy behind it.
    pub dirty_pages: u64,
    /// The stop in microseconds that was predicted behind it.
    pub predicted_downtime_us: u64,
    /// Share of time for which vCPUs were kept from running, in percent.
    pub throttle_percent: u8,
}

impl MigrationInfo {
    /// Whether a guest moves between services. Otherwise the other end is a file or folder of this host.
    #[must_use]
    pub fn is_between_services(&self) -> bool {
        !self.endpoint.starts_with("file:")
    }
}
