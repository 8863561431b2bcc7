//! Disks.

use std::fmt;

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

/// The format of an image that is made.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum NewImageFormat {
    /// The disk's bytes, one after the other. The file is sparse.
    Raw,
    /// QEMU's copy-on-write format.
    Qcow2,
}

fn default_max_downtime_ms() -> u64 {
    300
}

fn default_deadline_s() -> u64 {
    3600
}

/// A mirror of a disk to begin.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct MirrorDisk {
    /// Absolute path of the new image on the service's host. Nothing may be there, nor at this path with
    /// `.partial` added, which is the name of the image until the disk continues on it.
    pub path: String,
    /// Format of the new image; that of the disk's image when absent. The new image builds on no other.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub format: Option<NewImageFormat>,
    /// Bandwidth limit in bytes per second; unlimited when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(minimum = 1)]
    pub max_bandwidth: Option<u64>,
    /// How long the requests of the disk may wait for the switch, in milliseconds. The guest runs meanwhile.
    #[serde(default = "default_max_downtime_ms")]
    #[schema(minimum = 1)]
    pub max_downtime_ms: u64,
    /// Time limit in seconds, until which the guest must write slowly enough for the switch.
    #[serde(default = "default_deadline_s")]
    #[schema(minimum = 1)]
    pub deadline_s: u64,
}

impl MirrorDisk {
    /// A mirror at `path`, with default values for all other fields.
    #[must_use]
    pub fn at(path: impl Into<String>) -> Self {
        Self {
            path: path.into(),
            format: None,
            max_bandwidth: None,
            max_downtime_ms: default_max_downtime_ms(),
            deadline_s: default_deadline_s(),
        }
    }
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

/// The base image of a disk that is copied by a migration.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct MigratedBase {
    /// Name of the disk.
    pub disk: String,
    /// Name of the base image's file at the source.
    pub base: String,
    /// The destination has a base with the same content: only what is above it is copied. Otherwise the new
    /// image has the content of both.
    pub is_left_out: bool,
    /// The reason, or how far the base is read.
    pub detail: String,
}

impl fmt::Display for MigratedBase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let how = match self.is_left_out {
            true => "not copied",
            false => "copied",
        };
        let Self {
            disk, base, detail, ..
        } = self;
        write!(f, "{base} of disk {disk}: {how}, {detail}")
    }
}
