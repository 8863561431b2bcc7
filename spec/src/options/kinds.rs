//! The keys of each option whose value is a configuration type.

use super::{Form, Key, OptionKind};

pub(super) const PCI: &[Key] = &[
    ("iommu", "iommu", Form::Switch),
    ("id", "id", Form::Text),
    ("pci_segment", "pci_segment", Form::Number),
    ("pci_device_id", "pci_device_id", Form::Number),
];

/// A field of a field of a field.
const LIMITS: &[Key] = &[
    ("bw_size", "rate_limiter_config/bandwidth/size", Form::Size),
    (
        "bw_one_time_burst",
        "rate_limiter_config/bandwidth/one_time_burst",
        Form::Size,
    ),
    (
        "bw_refill_time",
        "rate_limiter_config/bandwidth/refill_time",
        Form::Number,
    ),
    ("ops_size", "rate_limiter_config/ops/size", Form::Number),
    (
        "ops_one_time_burst",
        "rate_limiter_config/ops/one_time_burst",
        Form::Number,
    ),
    (
        "ops_refill_time",
        "rate_limiter_config/ops/refill_time",
        Form::Number,
    ),
];

/// `--disk`.
pub const DISK: OptionKind = OptionKind {
    name: "--disk",
    keys: &[
        ("path", "path", Form::Text),
        ("readonly", "readonly", Form::Switch),
        ("direct", "direct", Form::Switch),
        ("num_queues", "num_queues", Form::Number),
        ("queue_size", "queue_size", Form::Number),
        ("vhost_user", "vhost_user", Form::Switch),
        ("socket", "vhost_socket", Form::Text),
        ("serial", "serial", Form::Text),
        ("rate_limit_group", "rate_limit_group", Form::Text),
        ("backing_files", "backing_files", Form::Switch),
        ("data_files", "data_files", Form::Switch),
        ("sparse", "sparse", Form::Switch),
        ("image_type", "image_type", Form::Word),
        ("lock_granularity", "lock_granularity", Form::Word),
        ("on_error", "on_error", Form::Word),
        ("queue_affinity", "queue_affinity", Form::Affinity),
    ],
    also: &[LIMITS, PCI],
};

/// `--rate-limit-group`.
pub const RATE_LIMIT_GROUP: OptionKind = OptionKind {
    name: "--rate-limit-group",
    keys: &[("id", "id", Form::Text)],
    also: &[LIMITS],
};

/// `--net`.
pub const NET: OptionKind = OptionKind {
    name: "--net",
    keys: &[
        ("tap", "tap", Form::Text),
        ("ip", "ip", Form::Text),
        ("mask", "mask", Form::Text),
        ("mac", "mac", Form::Text),
        ("host_mac", "host_mac", Form::Text),
        ("mtu", "mtu", Form::Number),
        ("num_queues", "num_queues", Form::Number),
        ("queue_size", "queue_size", Form::Number),
        ("vhost_user", "vhost_user", Form::Switch),
        ("socket", "vhost_socket", Form::Text),
        ("vhost_mode", "vhost_mode", Form::Text),
        ("offload_tso", "offload_tso", Form::Switch),
        ("offload_ufo", "offload_ufo", Form::Switch),
        ("offload_csum", "offload_csum", Form::Switch),
    ],
    also: &[LIMITS, PCI],
};

/// `--memory-zone`.
pub const MEMORY_ZONE: OptionKind = OptionKind {
    name: "--memory-zone",
    keys: &[
        ("id", "id", Form::Text),
        ("size", "size", Form::Size),
        ("file", "file", Form::Text),
        ("mergeable", "mergeable", Form::Switch),
        ("shared", "shared", Form::Switch),
        ("hugepages", "hugepages", Form::Switch),
        ("hugepage_size", "hugepage_size", Form::Size),
        ("host_numa_node", "host_numa_node", Form::Number),
        ("hotplug_size", "hotplug_size", Form::Size),
        ("hotplugged_size", "hotplugged_size", Form::Size),
        ("prefault", "prefault", Form::Switch),
        ("reserve", "reserve", Form::Switch),
    ],
    also: &[],
};

/// `--numa`.
pub const NUMA: OptionKind = OptionKind {
    name: "--numa",
    keys: &[
        ("guest_numa_id", "guest_numa_id", Form::Number),
        ("cpus", "cpus", Form::Numbers),
        ("distances", "distances", Form::Distances),
        ("memory_zones", "memory_zones", Form::Texts),
        ("pci_segments", "pci_segments", Form::Numbers),
        ("device_id", "device_id", Form::Text),
    ],
    also: &[],
};

/// `--platform`.
pub const PLATFORM: OptionKind = OptionKind {
    name: "--platform",
    keys: &[
        ("num_pci_segments", "num_pci_segments", Form::Number),
        ("iommu_segments", "iommu_segments", Form::Numbers),
        (
            "iommu_address_width",
            "iommu_address_width_bits",
            Form::Number,
        ),
        ("system_serial_number", "system_serial_number", Form::Text),
        ("serial_number", "serial_number", Form::Text),
        ("system_uuid", "system_uuid", Form::Text),
        ("uuid", "uuid", Form::Text),
        ("oem_strings", "oem_strings", Form::Texts),
        ("system_manufacturer", "system_manufacturer", Form::Text),
        ("system_product_name", "system_product_name", Form::Text),
        ("system_version", "system_version", Form::Text),
        ("system_family", "system_family", Form::Text),
        ("system_sku_number", "system_sku_number", Form::Text),
        ("chassis_asset_tag", "chassis_asset_tag", Form::Text),
        ("tdx", "tdx", Form::Switch),
        ("sev_snp", "sev_snp", Form::Switch),
        ("iommufd", "iommufd", Form::Switch),
        ("vfio_p2p_dma", "vfio_p2p_dma", Form::Switch),
    ],
    also: &[],
};

/// `--pci-segment`.
pub const PCI_SEGMENT: OptionKind = OptionKind {
    name: "--pci-segment",
    keys: &[
        ("pci_segment", "pci_segment", Form::Number),
        (
            "mmio32_aperture_weight",
            "mmio32_aperture_weight",
            Form::Number,
        ),
        (
            "mmio64_aperture_weight",
            "mmio64_aperture_weight",
            Form::Number,
        ),
    ],
    also: &[],
};

/// `--rng`.
pub const RNG: OptionKind = OptionKind {
    name: "--rng",
    keys: &[("src", "src", Form::Text)],
    also: &[LIMITS, PCI],
};

/// `--balloon`.
pub const BALLOON: OptionKind = OptionKind {
    name: "--balloon",
    keys: &[
        ("size", "size", Form::Size),
        ("deflate_on_oom", "deflate_on_oom", Form::Switch),
        ("free_page_reporting", "free_page_reporting", Form::Switch),
    ],
    also: &[PCI],
};

/// `--tpm`.
pub const TPM: OptionKind = OptionKind {
    name: "--tpm",
    keys: &[("socket", "socket", Form::Text)],
    also: &[],
};

/// `--vsock`.
pub const VSOCK: OptionKind = OptionKind {
    name: "--vsock",
    keys: &[
        ("cid", "cid", Form::Number),
        ("socket", "socket", Form::Text),
    ],
    also: &[PCI],
};

/// `--fs`.
pub const FS: OptionKind = OptionKind {
    name: "--fs",
    keys: &[
        ("tag", "tag", Form::Text),
        ("socket", "socket", Form::Text),
        ("num_queues", "num_queues", Form::Number),
        ("queue_size", "queue_size", Form::Number),
    ],
    also: &[PCI],
};

/// `--pmem`.
pub const PMEM: OptionKind = OptionKind {
    name: "--pmem",
    keys: &[
        ("file", "file", Form::Text),
        ("size", "size", Form::Size),
        ("discard_writes", "discard_writes", Form::Switch),
    ],
    also: &[PCI],
};

/// A device of the host.
pub const DEVICE: OptionKind = OptionKind {
    name: "device",
    keys: &[("path", "path", Form::Text)],
    also: &[PCI],
};

/// A device that another process serves over vfio-user.
pub const USER_DEVICE: OptionKind = OptionKind {
    name: "user-device",
    keys: &[("socket", "socket", Form::Text)],
    also: &[],
};

/// A vDPA device.
pub const VDPA: OptionKind = OptionKind {
    name: "vdpa",
    keys: &[
        ("path", "path", Form::Text),
        ("num_queues", "num_queues", Form::Number),
    ],
    also: &[PCI],
};

/// `restore`: the snapshot.
pub const RESTORE: OptionKind = OptionKind {
    name: "restore",
    keys: &[
        ("source_url", "source_url", Form::Text),
        ("prefault", "prefault", Form::Switch),
        ("memory_restore_mode", "memory_restore_mode", Form::Word),
        ("resume", "resume", Form::Switch),
        ("verify", "verify", Form::Switch),
        ("count", "count", Form::Number),
    ],
    also: &[],
};

/// `mirror-disk`: the new image.
pub const MIRROR: OptionKind = OptionKind {
    name: "--to",
    keys: &[
        ("path", "path", Form::Text),
        ("format", "format", Form::Text),
        ("max_bandwidth", "max_bandwidth", Form::Size),
        ("max_downtime_ms", "max_downtime_ms", Form::Number),
        ("deadline_s", "deadline_s", Form::Number),
    ],
    also: &[],
};

/// `send-migration`: the destination.
pub const SEND_MIGRATION: OptionKind = OptionKind {
    name: "send-migration",
    keys: &[
        ("destination_url", "destination_url", Form::Text),
        ("local", "local", Form::Switch),
        ("downtime_ms", "downtime_ms", Form::Number),
        ("timeout_s", "timeout_s", Form::Number),
        ("timeout_strategy", "timeout_strategy", Form::Word),
        ("connections", "connections", Form::Number),
        ("tls_dir", "tls_dir", Form::Text),
        ("memory_mode", "memory_mode", Form::Word),
        ("storage", "storage", Form::Text),
    ],
    also: &[],
};

/// `receive-migration`: the listener.
pub const RECEIVE_MIGRATION: OptionKind = OptionKind {
    name: "receive-migration",
    keys: &[
        ("receiver_url", "receiver_url", Form::Text),
        ("tls_dir", "tls_dir", Form::Text),
        ("memory_mode", "memory_mode", Form::Word),
    ],
    also: &[],
};
