//! A VM: its configuration, its state, and its information in the API.

use std::collections::BTreeMap;
use std::fmt;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::console::{ConsoleConfig, DebugConsoleConfig, SerialConfig};
use crate::cpus::CpusConfig;
use crate::device::{
    BalloonConfig, DeviceConfig, FsConfig, GenericVhostUserConfig, NetConfig, PmemConfig,
    RngConfig, RtcConfig, TpmConfig, UserDeviceConfig, VdpaConfig, VsockConfig,
};
use crate::disk::DiskConfig;
use crate::memory::MemoryConfig;
use crate::platform::{
    LandlockConfig, NumaConfig, PayloadConfig, PciSegmentConfig, PlatformConfig,
};
use crate::rate_limit::RateLimitGroupConfig;

fn default_rng() -> RngConfig {
    RngConfig {
        id: None,
        pci_segment: None,
        pci_device_id: None,
        iommu: false,
        src: "/dev/urandom".to_owned(),
        rate_limiter_config: None,
    }
}

/// The configuration of a VM.
///
/// A field of Cloud Hypervisor's API that this version does not support is accepted only with its
/// default value; any other value is refused by name.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct VmConfig {
    /// vCPUs; one when absent.
    #[serde(default)]
    pub cpus: CpusConfig,
    /// Memory; 512 MiB when absent.
    #[serde(default)]
    pub memory: MemoryConfig,
    /// The payload to boot.
    pub payload: PayloadConfig,
    /// Limits that several disks share.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rate_limit_groups: Option<Vec<RateLimitGroupConfig>>,
    /// Disks.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub disks: Option<Vec<DiskConfig>>,
    /// Network interfaces.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub net: Option<Vec<NetConfig>>,
    /// A source of randomness.
    #[serde(default = "default_rng")]
    pub rng: RngConfig,
    /// A memory balloon.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub balloon: Option<BalloonConfig>,
    /// Shared file systems.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fs: Option<Vec<FsConfig>>,
    /// Devices that other processes serve.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub generic_vhost_user: Option<Vec<GenericVhostUserConfig>>,
    /// Persistent memory.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pmem: Option<Vec<PmemConfig>>,
    /// The serial port COM1; `Null` when absent.
    #[serde(default)]
    pub serial: SerialConfig,
    /// The virtio console; `Tty` when absent.
    #[serde(default)]
    pub console: ConsoleConfig,
    /// A port for the log of firmware.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub debug_console: Option<DebugConsoleConfig>,
    /// Devices of the host.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub devices: Option<Vec<DeviceConfig>>,
    /// Devices that other processes serve over vfio-user.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub user_devices: Option<Vec<UserDeviceConfig>>,
    /// vDPA devices.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vdpa: Option<Vec<VdpaConfig>>,
    /// A socket between guest and host.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vsock: Option<VsockConfig>,
    /// NUMA nodes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub numa: Option<Vec<NumaConfig>>,
    /// A virtual IOMMU.
    #[serde(default)]
    pub iommu: bool,
    /// A virtio watchdog, which resets the VM when its guest's driver stops to ping.
    #[serde(default)]
    pub watchdog: bool,
    /// A virtio clock.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rtc: Option<RtcConfig>,
    /// A device through which the guest reports a panic.
    #[serde(default)]
    pub pvpanic: bool,
    /// PCI segments.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pci_segments: Option<Vec<PciSegmentConfig>>,
    /// The platform's identity and extras.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub platform: Option<PlatformConfig>,
    /// A trusted platform module.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tpm: Option<TpmConfig>,
    /// Confine the VMM to the paths that the VM needs.
    #[serde(default)]
    pub landlock_enable: bool,
    /// Further paths that it may use.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub landlock_rules: Option<Vec<LandlockConfig>>,
}

impl VmConfig {
    /// Returns a configuration of this payload with defaults otherwise.
    #[must_use]
    pub fn with_payload(payload: PayloadConfig) -> Self {
        Self {
            cpus: CpusConfig::default(),
            memory: MemoryConfig::default(),
            payload,
            rate_limit_groups: None,
            disks: None,
            net: None,
            rng: default_rng(),
            balloon: None,
            fs: None,
            generic_vhost_user: None,
            pmem: None,
            serial: SerialConfig::default(),
            console: ConsoleConfig::default(),
            debug_console: None,
            devices: None,
            user_devices: None,
            vdpa: None,
            vsock: None,
            numa: None,
            iommu: false,
            watchdog: false,
            rtc: None,
            pvpanic: false,
            pci_segments: None,
            platform: None,
            tpm: None,
            landlock_enable: false,
            landlock_rules: None,
        }
    }
}

/// The state of a VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
pub enum VmState {
    /// Configured, never booted.
    Created,
    /// The guest runs.
    Running,
    /// The guest has ended; the VM can be booted again.
    Shutdown,
    /// The guest is paused.
    Paused,
    /// A debugger holds the guest. (Not reached by this version.)
    BreakPoint,
}

impl fmt::Display for VmState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self, f)
    }
}

/// Why a guest failed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Failure {
    /// Stable code, for programs: `triple-fault`, `emulation-failure`, ...
    pub code: String,
    /// Description, for people: what happened, and where in the guest.
    pub detail: String,
    /// The vCPU on which it happened, if any.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vcpu: Option<u32>,
}

/// Steps of the last boot, in microseconds since the request. A step that has not happened yet is
/// absent.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct BootTimeline {
    /// The machine was built and its payload loaded.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub built_us: Option<u64>,
    /// The guest's first instruction: the first entry into the guest.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub first_entry_us: Option<u64>,
    /// The first byte that the guest wrote to port 0x80, where firmware reports its progress.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub first_debug_port_us: Option<u64>,
    /// The first byte on the serial port.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub first_serial_us: Option<u64>,
}

/// A device and its address.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct DeviceNode {
    /// Its name.
    pub id: String,
    /// Addresses and interrupts that it has.
    pub resources: Vec<serde_json::Value>,
    /// Devices in it.
    pub children: Vec<String>,
    /// Its PCI address.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pci_bdf: Option<String>,
    /// `Leaving` from the request to remove the device until the guest has ejected it.
    #[serde(default, skip_serializing_if = "DeviceState::is_present")]
    pub state: DeviceState,
}

/// The devices of a VM, by name.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(transparent)]
pub struct DeviceTree(pub BTreeMap<String, DeviceNode>);

/// Whether a device is present or being removed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub enum DeviceState {
    /// The device is present.
    #[default]
    Present,
    /// The guest was asked to eject the device.
    Leaving,
}

impl DeviceState {
    fn is_present(&self) -> bool {
        *self == Self::Present
    }
}

/// A resource of a VM of which the guest has to accept or give up a part when it is resized.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, ToSchema,
)]
#[serde(rename_all = "kebab-case")]
pub enum ResizeResource {
    /// vCPUs, counted.
    Vcpus,
    /// Memory, in bytes.
    Memory,
}

impl fmt::Display for ResizeResource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Vcpus => "vcpus",
            Self::Memory => "memory",
        })
    }
}

/// A resize that the guest has not completed yet.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct PendingResize {
    /// The resource.
    pub resource: ResizeResource,
    /// The memory zone, of a VM whose memory has zones.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub zone: Option<String>,
    /// Its amount when the resize was requested.
    pub from: u64,
    /// The requested amount.
    pub to: u64,
    /// The amount that the guest has now.
    pub actual: u64,
}

/// Information about a VM.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct VmInfo {
    /// Its configuration; a pseudo terminal's path is filled in.
    pub config: VmConfig,
    /// The VM's state.
    pub state: VmState,
    /// Memory of the guest, in bytes.
    pub memory_actual_size: u64,
    /// vCPUs that are plugged, while the VM is on. While the guest is asked to eject some, these are more
    /// than `config.cpus.boot_vcpus`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vcpus_actual_count: Option<u32>,
    /// Resizes that the guest has not completed yet, at most one of each resource and memory zone.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub pending_resizes: Vec<PendingResize>,
    /// Its devices.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub device_tree: Option<DeviceTree>,
    /// Why the guest failed, if it did.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub failure: Option<Failure>,
    /// Steps of the last boot.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub boot: Option<BootTimeline>,
}

/// Counters of each device, by name.
pub type VmCounters = BTreeMap<String, BTreeMap<String, u64>>;

/// The PCI address of a device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct PciDeviceInfo {
    /// Its name.
    pub id: String,
    /// Its PCI address.
    pub bdf: String,
}

/// Version and process of the service.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct VmmPingResponse {
    /// The version, with the commit that it was built from, if known.
    #[serde(default)]
    pub build_version: String,
    /// The version.
    pub version: String,
    /// The process id.
    #[serde(default)]
    pub pid: i64,
    /// Build features.
    #[serde(default)]
    pub features: Vec<String>,
}
