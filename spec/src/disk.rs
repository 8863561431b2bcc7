//! Disks.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::defaults;
use crate::rate_limit::RateLimiterConfig;

/// Host CPUs that serve a queue.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct VirtQueueAffinity {
    /// The queue.
    pub queue_index: u16,
    /// Host CPU numbers.
    pub host_cpus: Vec<usize>,
}

/// The format of a disk image.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[expect(missing_docs, reason = "the names of the formats say it")]
pub enum ImageType {
    FixedVhd,
    Qcow2,
    Raw,
    Vhdx,
    Unknown,
}

/// The part of an image that is locked while it is in use.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub enum LockGranularity {
    /// The bytes that QEMU's tools lock too.
    #[default]
    ByteRange,
    /// The whole file.
    Full,
}

/// The handling of a request on which the host fails, for instance because a file system is full.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub enum OnError {
    /// The guest gets an I/O error.
    #[default]
    #[serde(alias = "report")]
    Report,
    /// The request is kept and the VM paused. It is tried again when the VM is resumed.
    #[serde(alias = "pause")]
    Pause,
}

impl OnError {
    fn is_report(&self) -> bool {
        *self == Self::Report
    }
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde wants a reference")]
fn is_false(value: &bool) -> bool {
    !value
}

fn disk_queue_size() -> u16 {
    128
}

/// A disk.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct DiskConfig {
    /// Path of the image or block device.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub path: Option<String>,
    /// Refuse writes.
    #[serde(default)]
    pub readonly: bool,
    /// Bypass the page cache of the host.
    #[serde(default)]
    pub direct: bool,
    /// Put it behind a virtual IOMMU.
    #[serde(default)]
    pub iommu: bool,
    /// Number of virtqueues.
    #[serde(default = "defaults::one_queue")]
    pub num_queues: usize,
    /// Entries per virtqueue.
    #[serde(default = "disk_queue_size")]
    pub queue_size: u16,
    /// Served by another process.
    #[serde(default)]
    pub vhost_user: bool,
    /// Socket of that process.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vhost_socket: Option<String>,
    /// Rate limits of this disk.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rate_limiter_config: Option<RateLimiterConfig>,
    /// PCI segment to put it on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pci_segment: Option<u16>,
    /// PCI device number to give it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pci_device_id: Option<u8>,
    /// Device id; generated when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub id: Option<String>,
    /// Serial number that the guest sees.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub serial: Option<String>,
    /// Name of a group of disks with a shared rate limit.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rate_limit_group: Option<String>,
    /// Host CPUs that serve its queues.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub queue_affinity: Option<Vec<VirtQueueAffinity>>,
    /// Allow an image that builds on others, which are opened read-only, below the image's own
    /// directory or those of the service's `--image-dir`. Needs `image_type`.
    #[serde(default)]
    pub backing_files: bool,
    /// Allow a qcow2 image that keeps its data in another file, as `backing_files` allows others. The
    /// file is opened read-only, so that the disk must be `readonly`. Needs `image_type`.
    #[serde(default, skip_serializing_if = "is_false")]
    pub data_files: bool,
    /// Give discarded blocks back to the host.
    #[serde(default = "defaults::yes")]
    pub sparse: bool,
    /// Format. When absent, the service detects it as it first opens the image, and records it here.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub image_type: Option<ImageType>,
    /// The service detected `image_type`. If it detected raw, a write that would turn the image
    /// into one of another format fails with an I/O error.
    #[serde(default, skip_serializing_if = "is_false")]
    pub image_type_detected: bool,
    /// The part of the image that is locked while in use.
    #[serde(default)]
    pub lock_granularity: LockGranularity,
    /// The handling of requests on which the host fails.
    #[serde(default, skip_serializing_if = "OnError::is_report")]
    pub on_error: OnError,
}
