//! Bodies of requests about a VM that exists.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::descriptors::RestoredNetConfig;
use crate::migration::StorageMode;
use crate::overrides::Overrides;

/// New sizes.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct VmResize {
    /// vCPUs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(minimum = 1)]
    pub desired_vcpus: Option<u32>,
    /// Bytes of memory.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub desired_ram: Option<u64>,
    /// Bytes in the balloon.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub desired_balloon: Option<u64>,
}

/// A new size of a disk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct VmResizeDisk {
    /// The disk.
    pub id: String,
    /// Bytes.
    pub desired_size: u64,
}

/// A new size of a memory zone.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct VmResizeZone {
    /// The zone.
    pub id: String,
    /// Bytes.
    pub desired_ram: u64,
}

/// A device to remove.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct VmRemoveDevice {
    /// The device.
    pub id: String,
}

/// The disks of a VM of which a snapshot is taken, or which is forked.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub enum SnapshotDisks {
    /// They are left as they are: the snapshot names their images, to which the VM goes on writing.
    #[default]
    None,
    /// The image of each disk that can be written is frozen at the moment of the snapshot, and the VM
    /// continues on a new qcow2 overlay beside it. Each VM that is made from the snapshot gets an overlay
    /// of its own.
    Overlay,
    /// The content of each disk that can be written becomes a part of the snapshot, as it is at the moment of
    /// the snapshot. The VM keeps its images. Each VM that is made from the snapshot gets an overlay of its own.
    Copy,
}

impl SnapshotDisks {
    pub(crate) fn is_none(&self) -> bool {
        *self == Self::None
    }
}

/// The folder for a snapshot.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct VmSnapshotConfig {
    /// `file:///PATH`: a folder of the host, which is made if it does not exist, and holds no snapshot.
    pub destination_url: String,
    /// `file:///PATH`: a snapshot of this VM. Pages that are the same there are not written. An addition to
    /// Cloud Hypervisor's contract.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub base_url: Option<String>,
    /// Treatment of the VM's disks. An addition to Cloud Hypervisor's contract.
    #[serde(default, skip_serializing_if = "SnapshotDisks::is_none")]
    pub disks: SnapshotDisks,
    /// With `disks` set to `Copy`, of a running VM: how long the last blocks of its disks may take in the
    /// stop, in milliseconds; 300 when absent. An addition to Cloud Hypervisor's contract.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(minimum = 1)]
    pub max_downtime_ms: Option<u64>,
    /// With `disks` set to `Copy`, of a running VM: seconds until which the guest must write to its disks
    /// slowly enough for that; 3600 when absent. An addition to Cloud Hypervisor's contract.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(minimum = 1)]
    pub deadline_s: Option<u64>,
    /// With `disks` set to `Copy`, of a running VM: bytes of its disks that may be copied in a second, but in
    /// the stop; unlimited when absent. An addition to Cloud Hypervisor's contract.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(minimum = 1)]
    pub max_bandwidth: Option<u64>,
}

impl VmSnapshotConfig {
    /// A snapshot in the folder at `destination_url`, with default values for all other fields.
    #[must_use]
    pub fn to(destination_url: impl Into<String>) -> Self {
        Self {
            destination_url: destination_url.into(),
            base_url: None,
            disks: SnapshotDisks::None,
            max_downtime_ms: None,
            deadline_s: None,
            max_bandwidth: None,
        }
    }
}

/// A chain of increments to merge into one snapshot.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct MergeSnapshots {
    /// `file:///PATH`: the increment, whose bases are found as for a restore.
    pub source_url: String,
    /// `file:///PATH`: a folder of the host, which is made if it does not exist, and holds no snapshot.
    pub destination_url: String,
}

fn default_limit_s() -> u32 {
    60
}

/// A snapshot whose working set is recorded.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct RecordWorkingSet {
    /// `file:///PATH`: the folder of the snapshot, in which the record is written.
    pub source_url: String,
    /// Seconds from the guest's start after which the recording ends by itself.
    #[serde(default = "default_limit_s")]
    #[schema(minimum = 1, maximum = 3600)]
    pub limit_s: u32,
    /// Differences from the VM that was saved.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub overrides: Option<Overrides>,
}

/// Destination of a core dump.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct VmCoredumpData {
    /// `file:///a/file`, which must not exist. Its folder exists.
    pub destination_url: String,
}

/// A vfio-user device to add.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct VmAddUserDevice {
    /// Socket of the process that serves it.
    pub socket: String,
    /// PCI segment to put it on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pci_segment: Option<u16>,
    /// PCI device number to give it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pci_device_id: Option<u8>,
}

/// How the memory of a snapshot is restored.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub enum MemoryRestoreMode {
    /// All of it before the guest runs.
    #[default]
    Copy,
    /// Page by page, when the guest touches it, and the rest meanwhile.
    // The command line of Cloud Hypervisor has `ondemand`.
    #[serde(alias = "Ondemand")]
    OnDemand,
    /// A private view of the file: VMs of one snapshot share the pages that they do not write, and
    /// nothing is read before it is touched. An extension of Whimbrel.
    // Kata's runtime-rs has `CopyOnWrite`.
    #[serde(alias = "CopyOnWrite")]
    Map,
}

/// A memory zone's new location.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct VmMemoryZoneUpdateData {
    /// The zone.
    #[schema(min_length = 1)]
    pub id: String,
    /// NUMA node of the host.
    pub host_numa_node: u32,
}

/// The snapshot to restore, with options.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct RestoreConfig {
    /// `file:///a/directory`.
    pub source_url: String,
    /// Populate memory first. Not with `OnDemand`.
    #[serde(default)]
    pub prefault: bool,
    /// How the memory is restored.
    #[serde(default)]
    pub memory_restore_mode: MemoryRestoreMode,
    /// Resume the guest after the restore.
    #[serde(default)]
    pub resume: bool,
    /// New locations of memory zones.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub zone_updates: Option<Vec<VmMemoryZoneUpdateData>>,
    /// Descriptors for interfaces whose taps were passed as descriptors, or for others in place of their taps.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub net_fds: Option<Vec<RestoredNetConfig>>,
    /// Check all memory and the copies of disks against their hashes before the guest runs. `Copy` and
    /// `OnDemand` check each page as they read it, and `Copy` the disks; without this, `Map` checks nothing and
    /// `OnDemand` no disk. An extension of Whimbrel.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub verify: bool,
    /// Differences from the VM that was saved. An extension of Whimbrel.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub overrides: Option<Overrides>,
    /// Number of VMs to make, 1 to 1024. They are called `NAME-1`, `NAME-2` and so on. An extension of
    /// Whimbrel, for services with many VMs. Not with `OnDemand`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub count: Option<u32>,
}

/// When memory is copied.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub enum MigrationMode {
    /// Before the guest moves.
    #[default]
    Precopy,
    /// After the guest has moved, when the guest touches it.
    Postcopy,
}

/// Action when a migration takes too long.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub enum TimeoutStrategy {
    /// Cancel; the VM continues at the source.
    #[default]
    Cancel,
    /// Complete the migration with any downtime.
    Ignore,
}

/// The listener of an incoming migration.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ReceiveMigrationData {
    /// `unix:/a/socket` or `tcp:host:port`.
    pub receiver_url: String,
    /// Directory with certificates and key for TLS.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tls_dir: Option<String>,
    /// When memory is copied.
    #[serde(default)]
    pub memory_mode: MigrationMode,
    /// New locations of memory zones.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub zone_updates: Option<Vec<VmMemoryZoneUpdateData>>,
    /// Descriptors for interfaces whose taps were passed as descriptors, or for others in place of their taps.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub net_fds: Option<Vec<RestoredNetConfig>>,
}

fn default_downtime_ms() -> u64 {
    300
}

fn default_timeout_s() -> u64 {
    3600
}

fn one() -> u32 {
    1
}

/// The destination of a migration, and its policy.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct SendMigrationData {
    /// `unix:/a/socket` or `tcp:host:port`.
    pub destination_url: String,
    /// The destination is another process on this host, and receives shared memory by descriptor.
    #[serde(default)]
    pub local: bool,
    /// The stop to aim for, in milliseconds.
    #[serde(default = "default_downtime_ms")]
    #[schema(minimum = 1)]
    pub downtime_ms: u64,
    /// Time limit of the migration, in seconds.
    #[serde(default = "default_timeout_s")]
    #[schema(minimum = 1)]
    pub timeout_s: u64,
    /// Action at the deadline.
    #[serde(default)]
    pub timeout_strategy: TimeoutStrategy,
    /// Number of connections for memory.
    #[serde(default = "one")]
    #[schema(minimum = 1, maximum = 128)]
    pub connections: u32,
    /// Directory with certificates and key for TLS.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tls_dir: Option<String>,
    /// When memory is copied.
    #[serde(default)]
    pub memory_mode: MigrationMode,
    /// How disks move. Not a field of Cloud Hypervisor, whose disks are always on shared storage. With `copy`
    /// the destination makes new images in the directory that its operator named (`--migration-storage`).
    #[serde(default, skip_serializing_if = "StorageMode::is_shared")]
    pub storage: StorageMode,
}
