//! Devices other than disks and consoles.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::defaults;
use crate::descriptors::Descriptors;
use crate::rate_limit::RateLimiterConfig;

fn net_queues() -> usize {
    2
}

fn net_queue_size() -> u16 {
    256
}

pub(crate) fn default_mask() -> String {
    "255.255.255.0".to_owned()
}

fn client() -> String {
    "Client".to_owned()
}

fn fs_queue_size() -> u16 {
    1024
}

/// A network interface.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct NetConfig {
    /// Tap interface of the host; created when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tap: Option<String>,
    /// Descriptors of the tap's queues, one for each queue pair, of a tap that another program opened. They
    /// come with the request over a unix socket (SCM_RIGHTS). The numbers in the body are ignored and shown
    /// as -1.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<Vec<i32>>)]
    pub fds: Option<Descriptors>,
    /// IPv4 or IPv6 address of the host on a tap that is created; none when empty or absent.
    #[serde(default)]
    pub ip: String,
    /// The netmask of `ip`. An IPv6 address has a prefix of 64 bits unless this is one of IPv6.
    #[serde(default = "default_mask")]
    pub mask: String,
    /// MAC address that the guest sees; generated when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mac: Option<String>,
    /// MAC address of the tap.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub host_mac: Option<String>,
    /// MTU in bytes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mtu: Option<u16>,
    /// Put it behind a virtual IOMMU.
    #[serde(default)]
    pub iommu: bool,
    /// Virtqueues, two for each queue pair. An odd number has one more, which is ignored: the queue for
    /// control is always there.
    #[serde(default = "net_queues")]
    pub num_queues: usize,
    /// Entries per virtqueue.
    #[serde(default = "net_queue_size")]
    pub queue_size: u16,
    /// Served by another process.
    #[serde(default)]
    pub vhost_user: bool,
    /// Socket of that process.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vhost_socket: Option<String>,
    /// `Client` or `Server`.
    #[serde(default = "client")]
    pub vhost_mode: String,
    /// Device id; generated when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub id: Option<String>,
    /// PCI segment to put it on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pci_segment: Option<u16>,
    /// PCI device number to give it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pci_device_id: Option<u8>,
    /// Rate limits of this interface.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rate_limiter_config: Option<RateLimiterConfig>,
    /// TCP segmentation offload.
    #[serde(default = "defaults::yes")]
    pub offload_tso: bool,
    /// UDP fragmentation offload.
    #[serde(default = "defaults::yes")]
    pub offload_ufo: bool,
    /// Checksum offload.
    #[serde(default = "defaults::yes")]
    pub offload_csum: bool,
}

/// A source of random numbers.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct RngConfig {
    /// Device id; generated when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub id: Option<String>,
    /// PCI segment to put it on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pci_segment: Option<u16>,
    /// PCI device number to give it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pci_device_id: Option<u8>,
    /// Put it behind a virtual IOMMU.
    #[serde(default)]
    pub iommu: bool,
    /// Host file that the random numbers are read from.
    pub src: String,
    /// Rate limits: bytes of random numbers, and requests of the guest. An extension of Whimbrel.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rate_limiter_config: Option<RateLimiterConfig>,
}

/// A virtio clock.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct RtcConfig {
    /// Device id; generated when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub id: Option<String>,
    /// PCI segment to put it on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pci_segment: Option<u16>,
    /// PCI device number to give it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pci_device_id: Option<u8>,
    /// Put it behind a virtual IOMMU.
    #[serde(default)]
    pub iommu: bool,
}

/// A memory balloon.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct BalloonConfig {
    /// Device id; generated when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub id: Option<String>,
    /// PCI segment to put it on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pci_segment: Option<u16>,
    /// PCI device number to give it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pci_device_id: Option<u8>,
    /// Put it behind a virtual IOMMU.
    #[serde(default)]
    pub iommu: bool,
    /// Size in bytes: memory that the balloon takes from the guest.
    pub size: u64,
    /// Deflate when the guest runs out of memory.
    #[serde(default)]
    pub deflate_on_oom: bool,
    /// Let the guest report free pages.
    #[serde(default)]
    pub free_page_reporting: bool,
}

/// A shared file system (virtio-fs).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct FsConfig {
    /// Name to mount it by.
    pub tag: String,
    /// Control socket of `swtpm`.
    pub socket: String,
    /// Number of virtqueues.
    #[serde(default = "defaults::one_queue")]
    pub num_queues: usize,
    /// Entries per virtqueue.
    #[serde(default = "fs_queue_size")]
    pub queue_size: u16,
    /// PCI segment to put it on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pci_segment: Option<u16>,
    /// PCI device number to give it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pci_device_id: Option<u8>,
    /// Device id; generated when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub id: Option<String>,
}

/// A device of any type that another process serves.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct GenericVhostUserConfig {
    /// Socket of that process.
    pub socket: String,
    /// Entries of each virtqueue.
    pub queue_sizes: Vec<u16>,
    /// PCI segment to put it on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pci_segment: Option<u16>,
    /// PCI device number to give it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pci_device_id: Option<u8>,
    /// Device id; generated when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub id: Option<String>,
    /// The virtio device type.
    pub device_type: u32,
}

/// Persistent memory.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct PmemConfig {
    /// File behind it.
    pub file: String,
    /// Bytes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub size: Option<u64>,
    /// Put it behind a virtual IOMMU.
    #[serde(default)]
    pub iommu: bool,
    /// Discard what the guest writes.
    #[serde(default)]
    pub discard_writes: bool,
    /// PCI segment to put it on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pci_segment: Option<u16>,
    /// PCI device number to give it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pci_device_id: Option<u8>,
    /// Device id; generated when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub id: Option<String>,
}

/// A device of the host (VFIO).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct DeviceConfig {
    /// Its path in sysfs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub path: Option<String>,
    /// Put it behind a virtual IOMMU.
    #[serde(default)]
    pub iommu: bool,
    /// PCI segment to put it on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pci_segment: Option<u16>,
    /// PCI device number to give it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pci_device_id: Option<u8>,
    /// Device id; generated when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub id: Option<String>,
    /// Its GPUDirect clique.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub x_nv_gpudirect_clique: Option<u8>,
    /// BARs not to map.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub x_exclude_mmap_bars: Option<Vec<u64>>,
}

/// A device that another process serves (vfio-user).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct UserDeviceConfig {
    /// Socket of that process.
    pub socket: String,
    /// Device id; generated when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub id: Option<String>,
    /// PCI segment to put it on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pci_segment: Option<u16>,
    /// PCI device number to give it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pci_device_id: Option<u8>,
}

/// A trusted platform module (TPM 2.0), which `swtpm` emulates. Its state moves with the VM.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct TpmConfig {
    /// Control socket of `swtpm`. At the destination of a move, another swtpm listens there.
    pub socket: String,
}

/// A vDPA device.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct VdpaConfig {
    /// Its path on the host.
    pub path: String,
    /// Number of virtqueues.
    pub num_queues: usize,
    /// Put it behind a virtual IOMMU.
    #[serde(default)]
    pub iommu: bool,
    /// PCI segment to put it on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pci_segment: Option<u16>,
    /// PCI device number to give it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pci_device_id: Option<u8>,
    /// Device id; generated when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub id: Option<String>,
}

/// A socket between guest and host.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct VsockConfig {
    /// The guest's CID, 3 to 4294967294.
    pub cid: u64,
    /// Unix socket on the host through which programs reach the guest.
    pub socket: String,
    /// Put it behind a virtual IOMMU.
    #[serde(default)]
    pub iommu: bool,
    /// PCI segment to put it on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pci_segment: Option<u16>,
    /// PCI device number to give it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pci_device_id: Option<u8>,
    /// Device id; generated when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub id: Option<String>,
}
