//! Every field of a VM's configuration has an effect, is refused by name, or is documented to have none.

#![recursion_limit = "256"]
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]

use std::collections::BTreeSet;

use serde_json::{Map, Value, json};
use spec::{HostLimits, VmConfig};
use utoipa::{PartialSchema as _, ToSchema as _};

/// Fields that do something.
const EFFECTIVE: &[&str] = &[
    "/cpus/boot_vcpus",
    "/cpus/topology/threads_per_core",
    "/cpus/topology/cores_per_die",
    "/cpus/topology/dies_per_package",
    "/cpus/topology/packages",
    "/cpus/max_phys_bits",
    "/cpus/affinity/0/vcpu",
    "/cpus/affinity/0/host_cpus",
    "/memory/size",
    "/memory/mergeable",
    "/memory/shared",
    "/memory/hugepages",
    "/memory/hugepage_size",
    "/memory/prefault",
    "/memory/reserve",
    "/memory/thp",
    "/payload/kernel",
    "/payload/cmdline",
    "/payload/initramfs",
    "/disks/0/path",
    "/disks/0/readonly",
    "/disks/0/direct",
    "/disks/0/num_queues",
    "/disks/0/queue_size",
    "/disks/0/rate_limiter_config/bandwidth/size",
    "/disks/0/rate_limiter_config/bandwidth/one_time_burst",
    "/disks/0/rate_limiter_config/bandwidth/refill_time",
    "/disks/0/rate_limiter_config/ops/size",
    "/disks/0/rate_limiter_config/ops/one_time_burst",
    "/disks/0/rate_limiter_config/ops/refill_time",
    "/disks/0/id",
    "/disks/0/serial",
    "/disks/0/backing_files",
    "/disks/0/data_files",
    "/disks/0/sparse",
    "/disks/0/image_type",
    "/disks/0/image_type_detected",
    "/disks/0/lock_granularity",
    "/disks/0/on_error",
    "/net/0/tap",
    "/net/0/ip",
    "/net/0/mask",
    "/net/0/mac",
    "/net/0/host_mac",
    "/net/0/mtu",
    "/net/0/num_queues",
    "/net/0/queue_size",
    "/net/0/id",
    "/net/0/rate_limiter_config/bandwidth/size",
    "/net/0/rate_limiter_config/bandwidth/one_time_burst",
    "/net/0/rate_limiter_config/bandwidth/refill_time",
    "/net/0/rate_limiter_config/ops/size",
    "/net/0/rate_limiter_config/ops/one_time_burst",
    "/net/0/rate_limiter_config/ops/refill_time",
    "/net/0/offload_tso",
    "/net/0/offload_csum",
    "/rng/id",
    "/rng/src",
    "/rng/rate_limiter_config/bandwidth/size",
    "/rng/rate_limiter_config/bandwidth/one_time_burst",
    "/rng/rate_limiter_config/bandwidth/refill_time",
    "/rng/rate_limiter_config/ops/size",
    "/rng/rate_limiter_config/ops/one_time_burst",
    "/rng/rate_limiter_config/ops/refill_time",
    "/balloon/id",
    "/balloon/size",
    "/balloon/deflate_on_oom",
    "/balloon/free_page_reporting",
    "/serial/mode",
    "/serial/file",
    "/serial/socket",
    "/console/id",
    "/console/mode",
    "/console/file",
    "/console/socket",
    "/vsock/id",
    "/vsock/cid",
    "/vsock/socket",
];

/// Fields that docs/api.md and docs/devices.md say have none, though they are accepted.
const TOLD: &[&str] = &[
    "/net/0/offload_ufo",
    // Room for what a resize will add; a resize is refused by name.
    "/cpus/max_vcpus",
    "/memory/hotplug_size",
    // Empty segments, and an identity that no table of the guest has.
    "/platform/num_pci_segments",
    "/platform/uuid",
    // Of a device that is refused.
    "/debug_console/file",
    "/debug_console/iobase",
];

/// All fields, each at a value that is not its default.
fn full() -> Value {
    let limits = json!({
        "bandwidth": {"size": 1, "one_time_burst": 2, "refill_time": 3},
        "ops": {"size": 1, "one_time_burst": 2, "refill_time": 3},
    });
    let zone = json!({
        "id": "z", "size": 4096, "file": "/f", "mergeable": true, "shared": true, "hugepages": true,
        "hugepage_size": 4096, "host_numa_node": 1, "hotplug_size": 1, "hotplugged_size": 1,
        "prefault": true, "reserve": true,
    });
    json!({
        "cpus": {
            "boot_vcpus": 2, "max_vcpus": 4, "kvm_hyperv": true, "max_phys_bits": 40, "nested": false,
            "topology": {"threads_per_core": 1, "cores_per_die": 2, "dies_per_package": 2, "packages": 1},
            "affinity": [{"vcpu": 1, "host_cpus": [1]}], "features": {"amx": true},
            "core_scheduling": "Vcpu",
        },
        "memory": {
            "size": 1 << 30, "hotplug_size": 1, "hotplugged_size": 1, "mergeable": true,
            "hotplug_method": "VirtioMem", "shared": true, "hugepages": true,
            "hugepage_size": 2 << 20, "prefault": true, "reserve": true, "thp": false, "zones": [zone],
        },
        "payload": {
            "firmware": "/f", "kernel": "/k", "cmdline": "x", "initramfs": "/i", "igvm": "/g",
            "host_data": "d",
        },
        "rate_limit_groups": [{"id": "g", "rate_limiter_config": limits}],
        "disks": [{
            "path": "/d", "readonly": true, "direct": true, "iommu": true, "num_queues": 2,
            "queue_size": 64, "vhost_user": true, "vhost_socket": "/s", "rate_limiter_config": limits,
            "pci_segment": 1, "pci_device_id": 3, "id": "d", "serial": "s", "rate_limit_group": "g",
            "queue_affinity": [{"queue_index": 0, "host_cpus": [1]}], "backing_files": true,
            "data_files": true, "image_type_detected": true, "sparse": false, "image_type": "Qcow2", "lock_granularity": "Full",
            "on_error": "Pause",
        }],
        "net": [{
            "tap": "t", "fds": [3, 4], "ip": "10.0.0.1", "mask": "255.0.0.0", "mac": "52:54:00:00:00:01",
            "host_mac": "52:54:00:00:00:02", "mtu": 9000, "iommu": true, "num_queues": 4,
            "queue_size": 64, "vhost_user": true, "vhost_socket": "/s", "vhost_mode": "Server",
            "id": "n", "pci_segment": 1, "pci_device_id": 3, "rate_limiter_config": limits,
            "offload_tso": false, "offload_ufo": false, "offload_csum": false,
        }],
        "rng": {
            "id": "r", "pci_segment": 1, "pci_device_id": 3, "iommu": true, "src": "/dev/random",
            "rate_limiter_config": limits,
        },
        "balloon": {
            "id": "b", "pci_segment": 1, "pci_device_id": 3, "iommu": true, "size": 4096,
            "deflate_on_oom": true, "free_page_reporting": true,
        },
        "fs": [{
            "tag": "t", "socket": "/s", "num_queues": 2, "queue_size": 64, "pci_segment": 1,
            "pci_device_id": 3, "id": "f",
        }],
        "generic_vhost_user": [{
            "socket": "/s", "queue_sizes": [64], "pci_segment": 1, "pci_device_id": 3, "id": "g",
            "device_type": 1,
        }],
        "pmem": [{
            "file": "/f", "size": 1, "iommu": true, "discard_writes": true, "pci_segment": 1,
            "pci_device_id": 3, "id": "p",
        }],
        "serial": {"file": "/f", "socket": "/s", "mode": "File"},
        "console": {
            "file": "/f", "socket": "/s", "mode": "Socket", "iommu": true, "id": "c", "pci_segment": 1,
            "pci_device_id": 3,
        },
        "debug_console": {"file": "/f", "mode": "File", "iobase": 1},
        "devices": [{
            "path": "/d", "iommu": true, "pci_segment": 1, "pci_device_id": 3, "id": "v",
            "x_nv_gpudirect_clique": 1, "x_exclude_mmap_bars": [1],
        }],
        "user_devices": [{"socket": "/s", "id": "u", "pci_segment": 1, "pci_device_id": 3}],
        "vdpa": [{
            "path": "/v", "num_queues": 2, "iommu": true, "pci_segment": 1, "pci_device_id": 3, "id": "w",
        }],
        "vsock": {
            "cid": 3, "socket": "/s", "iommu": true, "pci_segment": 1, "pci_device_id": 3, "id": "s",
        },
        "numa": [{
            "guest_numa_id": 1, "cpus": [1], "distances": [{"destination": 1, "distance": 20}],
            "memory_zones": ["z"], "pci_segments": [1], "device_id": "x",
        }],
        "iommu": true, "watchdog": true,
        "rtc": {"id": "t", "pci_segment": 1, "pci_device_id": 3, "iommu": true},
        "pvpanic": true,
        "pci_segments": [{"pci_segment": 1, "mmio32_aperture_weight": 2, "mmio64_aperture_weight": 2}],
        "platform": {
            "num_pci_segments": 2, "iommu_segments": [1], "iommu_address_width_bits": 48,
            "system_serial_number": "s", "serial_number": "s", "system_uuid": "u", "uuid": "u",
            "oem_strings": ["o"], "system_manufacturer": "m", "system_product_name": "p",
            "system_version": "v", "system_family": "f", "system_sku_number": "k",
            "chassis_asset_tag": "c", "tdx": true, "sev_snp": true, "iommufd": true,
            "vfio_p2p_dma": false,
        },
        "tpm": {"socket": "/s"},
        "landlock_enable": true, "landlock_rules": [{"path": "/p", "access": "r"}],
    })
}

/// The pointers of all fields that a schema describes, of a list's items as of the first.
fn fields(schema: &Value, all: &Map<String, Value>, at: &str, found: &mut BTreeSet<String>) {
    if let Some(reference) = schema["$ref"].as_str() {
        let name = reference.rsplit('/').next().unwrap();
        return fields(&all[name], all, at, found);
    }
    if let Some(properties) = schema["properties"].as_object() {
        for (name, property) in properties {
            fields(property, all, &format!("{at}/{name}"), found);
        }
        return;
    }
    let parts = schema["oneOf"].as_array().into_iter().flatten();
    if let Some(part) = parts.clone().find(|part| part["$ref"].is_string()) {
        return fields(part, all, at, found);
    }
    if schema["items"]["$ref"].is_string() {
        return fields(&schema["items"], all, &format!("{at}/0"), found);
    }
    found.insert(at.to_owned());
}

#[test]
fn every_field_has_an_effect() {
    let mut named = Vec::new();
    VmConfig::schemas(&mut named);
    let all = named
        .into_iter()
        .map(|(name, schema)| (name, serde_json::to_value(schema).unwrap()))
        .collect();
    let whole = serde_json::to_value(VmConfig::schema()).unwrap();
    let mut described = BTreeSet::new();
    fields(&whole, &all, "", &mut described);
    assert!(described.len() > 150, "{}", described.len());

    let body = full();
    for field in &described {
        assert!(body.pointer(field).is_some(), "{field} is not tried");
    }
    let config: VmConfig = spec::parse(body.to_string().as_bytes()).unwrap();
    let host = HostLimits {
        max_vcpus: 8,
        max_memory: 1 << 40,
        host_cpus: 64,
    };
    let problems = config.validate(&host).unwrap_err();
    for problem in &problems {
        assert_eq!(problem.code, spec::UNSUPPORTED, "{problem:?}");
    }
    let is_refused = |field: &str| {
        let mut above = problems.iter().map(|problem| problem.pointer.as_str());
        above.any(|above| field == above || field.starts_with(&format!("{above}/")))
    };
    for field in &described {
        let known = [EFFECTIVE, TOLD].concat().contains(&field.as_str());
        match (known, is_refused(field)) {
            (true, false) | (false, true) => {}
            (true, true) => panic!("{field} is said to be taken, and is refused"),
            (false, false) => panic!("{field} is taken, and does nothing"),
        }
    }
}
