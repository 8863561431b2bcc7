//! Every field of a VM's configuration has an effect, is refused by name, or is documented to have none.

#![recursion_limit = "256"]
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]

#[path = "effects/requests.rs"]
mod requests;

use std::collections::BTreeSet;

use serde_json::{Map, Value, json};
use spec::{FieldProblem, HostLimits, VmConfig};
use utoipa::{PartialSchema as _, ToSchema as _};

/// Fields that do something.
const EFFECTIVE: &[&str] = &[
    "/cpus/boot_vcpus",
    "/cpus/nested",
    "/cpus/profile",
    "/cpus/kvm_hyperv",
    "/cpus/core_scheduling",
    "/cpus/max_vcpus",
    "/cpus/topology/threads_per_core",
    "/cpus/topology/cores_per_die",
    "/cpus/topology/dies_per_package",
    "/cpus/topology/packages",
    "/cpus/max_phys_bits",
    "/cpus/affinity/0/vcpu",
    "/cpus/affinity/0/host_cpus",
    "/memory/size",
    "/memory/hotplug_method",
    "/memory/hotplug_size",
    "/memory/hotplugged_size",
    "/memory/mergeable",
    "/memory/shared",
    "/memory/hugepages",
    "/memory/hugepage_size",
    "/memory/prefault",
    "/memory/reserve",
    "/memory/thp",
    "/memory/zones/0/id",
    "/memory/zones/0/size",
    "/memory/zones/0/mergeable",
    "/memory/zones/0/shared",
    "/memory/zones/0/hugepages",
    "/memory/zones/0/hugepage_size",
    "/memory/zones/0/host_numa_node",
    "/memory/zones/0/hotplug_size",
    "/memory/zones/0/hotplugged_size",
    "/memory/zones/0/prefault",
    "/memory/zones/0/reserve",
    "/numa/0/guest_numa_id",
    "/numa/0/cpus",
    "/numa/0/distances/0/destination",
    "/numa/0/distances/0/distance",
    "/numa/0/memory_zones",
    "/numa/0/pci_segments",
    "/payload/firmware",
    "/payload/kernel",
    "/payload/cmdline",
    "/payload/initramfs",
    "/rate_limit_groups/0/id",
    "/rate_limit_groups/0/rate_limiter_config/bandwidth/size",
    "/rate_limit_groups/0/rate_limiter_config/bandwidth/one_time_burst",
    "/rate_limit_groups/0/rate_limiter_config/bandwidth/refill_time",
    "/rate_limit_groups/0/rate_limiter_config/ops/size",
    "/rate_limit_groups/0/rate_limiter_config/ops/one_time_burst",
    "/rate_limit_groups/0/rate_limiter_config/ops/refill_time",
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
    "/disks/0/rate_limit_group",
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
    "/debug_console/file",
    "/debug_console/iobase",
    "/debug_console/mode",
    "/platform/system_serial_number",
    "/platform/serial_number",
    "/platform/system_uuid",
    "/platform/uuid",
    "/platform/oem_strings",
    "/platform/system_manufacturer",
    "/platform/system_product_name",
    "/platform/system_version",
    "/platform/system_family",
    "/platform/system_sku_number",
    "/platform/chassis_asset_tag",
    "/platform/num_pci_segments",
    "/pci_segments/0/pci_segment",
    "/pci_segments/0/mmio32_aperture_weight",
    "/pci_segments/0/mmio64_aperture_weight",
    "/disks/0/pci_segment",
    "/net/0/pci_segment",
    "/rng/pci_segment",
    "/balloon/pci_segment",
    "/console/pci_segment",
    "/vsock/pci_segment",
    "/pvpanic",
    "/tpm/socket",
    "/watchdog",
    "/disks/0/pci_device_id",
    "/net/0/pci_device_id",
    "/rng/pci_device_id",
    "/balloon/pci_device_id",
    "/console/pci_device_id",
    "/vsock/pci_device_id",
    "/vsock/id",
    "/vsock/cid",
    "/vsock/socket",
];

/// Fields that have their effect with some values of another field only.
const LIMITED: &[(&str, &str)] = &[];

/// Fields that are accepted and have no effect, with the reason.
const TOLD: &[(&str, &str)] = &[(
    "/net/0/offload_ufo",
    "Linux has removed UDP fragmentation offload",
)];

/// All fields, each at a value that is not its default.
fn full() -> Value {
    let limits = json!({
        "bandwidth": {"size": 1, "one_time_burst": 2, "refill_time": 3},
        "ops": {"size": 1, "one_time_burst": 2, "refill_time": 3},
    });
    let zone = json!({
        "id": "z", "size": 1 << 30, "file": "/f", "mergeable": true, "shared": true, "hugepages": true,
        "hugepage_size": 2 << 20, "host_numa_node": 1, "hotplug_size": 1 << 27, "hotplugged_size": 1 << 27,
        "prefault": true, "reserve": true,
    });
    json!({
        "cpus": {
            "boot_vcpus": 2, "max_vcpus": 4, "kvm_hyperv": true, "max_phys_bits": 40, "nested": true,
            "profile": "Haswell",
            "topology": {"threads_per_core": 1, "cores_per_die": 2, "dies_per_package": 2, "packages": 1},
            "affinity": [{"vcpu": 1, "host_cpus": [1]}], "features": {"amx": true},
            "core_scheduling": "Vcpu",
        },
        "memory": {
            "size": 1 << 30, "hotplug_size": 1 << 27, "hotplugged_size": 1 << 27, "mergeable": true,
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
            "pci_segment": 1, "pci_device_id": 4, "id": "d", "serial": "s", "rate_limit_group": "g",
            "queue_affinity": [{"queue_index": 0, "host_cpus": [1]}], "backing_files": true,
            "data_files": true, "image_type_detected": true, "sparse": false, "image_type": "Qcow2", "lock_granularity": "Full",
            "on_error": "Pause",
        }],
        "net": [{
            "tap": "t", "fds": [3, 4], "ip": "10.0.0.1", "mask": "255.0.0.0", "mac": "52:54:00:00:00:01",
            "host_mac": "52:54:00:00:00:02", "mtu": 9000, "iommu": true, "num_queues": 4,
            "queue_size": 64, "vhost_user": true, "vhost_socket": "/s", "vhost_mode": "Server",
            "id": "n", "pci_segment": 1, "pci_device_id": 5, "rate_limiter_config": limits,
            "offload_tso": false, "offload_ufo": false, "offload_csum": false,
        }],
        "rng": {
            "id": "r", "pci_segment": 1, "pci_device_id": 6, "iommu": true, "src": "/dev/random",
            "rate_limiter_config": limits,
        },
        "balloon": {
            "id": "b", "pci_segment": 1, "pci_device_id": 7, "iommu": true, "size": 4096,
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
            "pci_device_id": 8,
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
            "cid": 3, "socket": "/s", "iommu": true, "pci_segment": 1, "pci_device_id": 9, "id": "s",
        },
        "numa": [{
            "guest_numa_id": 1, "cpus": [0, 1, 2, 3], "distances": [{"destination": 1, "distance": 10}],
            "memory_zones": ["z"], "pci_segments": [1], "device_id": "x",
        }],
        "iommu": true, "watchdog": true,
        "rtc": {"id": "t", "pci_segment": 1, "pci_device_id": 3, "iommu": true},
        "pvpanic": true,
        "pci_segments": [{"pci_segment": 1, "mmio32_aperture_weight": 2, "mmio64_aperture_weight": 2}],
        "platform": {
            "num_pci_segments": 2, "iommu_segments": [1], "iommu_address_width_bits": 48,
            "system_serial_number": "s", "serial_number": "s", "system_uuid": "00112233-4455-6677-8899-aabbccddeeff",
            "uuid": "00112233-4455-6677-8899-aabbccddeeff",
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

/// All fields by their JSON pointer, and the problems of a configuration that has each of them.
fn judged() -> (BTreeSet<String>, Vec<FieldProblem>) {
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
    let host = HostLimits {
        max_vcpus: 8,
        max_memory: 1 << 40,
        host_cpus: 64,
    };
    let found = |body: &Value| {
        let config: VmConfig = spec::parse(body.to_string().as_bytes()).unwrap();
        config.validate(&host).unwrap_err()
    };
    // Memory has zones or fields of its own.
    let (mut zones, mut whole) = (body.clone(), body);
    let zone = zones["memory"]["zones"].take();
    zones["memory"] =
        json!({"size": 0, "hotplug_method": "VirtioMem", "thp": false, "zones": zone});
    whole["memory"]["zones"] = json!([]);
    whole["numa"] = json!([]);
    let mut problems = found(&whole);
    let more = found(&zones).into_iter();
    let more = more.filter(|problem| !problems.contains(problem));
    problems.extend(more.collect::<Vec<_>>());
    // These exclude another field that is tried, too.
    let exclusive = ["/payload/firmware", "/disks/0/rate_limit_group"];
    problems.retain(|problem| !exclusive.contains(&problem.pointer.as_str()));
    for problem in &problems {
        assert_eq!(problem.code, spec::UNSUPPORTED, "{problem:?}");
    }
    (described, problems)
}

fn refusal<'a>(problems: &'a [FieldProblem], field: &str) -> Option<&'a FieldProblem> {
    problems.iter().find(|problem| {
        let above = &problem.pointer;
        field == above || field.starts_with(&format!("{above}/"))
    })
}

/// Returns the state of a field that has its effect, perhaps only beside a value of another.
fn supported(field: &str) -> String {
    let limit = LIMITED.iter().find(|(limited, _)| *limited == field);
    limit.map_or("supported".to_owned(), |(_, limit)| {
        format!("supported {limit}")
    })
}

fn without_effect(field: &str) -> Option<&'static str> {
    let told = TOLD.iter().find(|(told, _)| *told == field);
    told.map(|(_, reason)| *reason)
}

#[test]
fn every_field_has_an_effect() {
    let (described, problems) = judged();
    for field in &described {
        let known = EFFECTIVE.contains(&field.as_str()) || without_effect(field).is_some();
        match (known, refusal(&problems, field).is_some()) {
            (true, false) | (false, true) => {}
            (true, true) => panic!("{field} is said to be taken, and is refused"),
            (false, false) => panic!("{field} is taken, and does nothing"),
        }
    }
}

/// The name of a field as in a message: `disks.path`.
fn dotted(pointer: &str) -> String {
    pointer
        .trim_start_matches('/')
        .replace("/0", "")
        .replace('/', ".")
}

/// The page of docs/compatibility.md, from the tables above, those of the crate, and the document.
fn page() -> String {
    let mut page = String::from(PAGE);
    let document: Value = serde_json::from_str(include_str!("../../openapi/openapi.json")).unwrap();
    page += "\n## Endpoints\n\n| endpoint | this version |\n|---|---|\n";
    for (path, item) in document["paths"].as_object().unwrap() {
        for (method, operation) in item.as_object().unwrap() {
            // The service's own face has paths below /vms, and these two are on both.
            let Some(name) = path
                .strip_prefix("/api/v1/vm")
                .filter(|rest| rest.starts_with('.') || rest.starts_with("m."))
            else {
                continue;
            };
            let summary = operation["summary"].as_str().unwrap();
            let mut answers = operation["responses"].as_object().unwrap().keys();
            let state = if answers.any(|status| status.starts_with('2')) {
                format!("supported: {summary}")
            } else {
                format!("refused (501). {summary}")
            };
            page += &format!("| `{} vm{name}` | {state} |\n", method.to_uppercase());
        }
    }
    let (described, problems) = judged();
    page += &requests::section(&document, &problems);
    page += "\n## Fields of the configuration\n\n| field | this version |\n|---|---|\n";
    let mut shown = BTreeSet::new();
    for field in &described {
        let (name, state) = if let Some(problem) = refusal(&problems, field) {
            let detail = problem.detail.replace('|', "\\|");
            (dotted(&problem.pointer), format!("refused: {detail}"))
        } else if let Some(reason) = without_effect(field) {
            (dotted(field), format!("accepted without effect: {reason}"))
        } else {
            (dotted(field), supported(field))
        };
        // An object that is refused stands for all of its fields.
        if shown.insert(name.clone()) {
            page += &format!("| `{name}` | {state} |\n");
        }
    }
    page += "\n## Fields that are not in the contract\n\n\
             Cloud Hypervisor's face accepts these at an empty value (`null`, `false`, `0`, `\"\"`, `[]`) or\n\
             the default named here, and refuses them by name otherwise. Other unknown fields are treated\n\
             alike. The service's own face refuses unknown fields.\n\n\
             | field | also accepted | reason |\n|---|---|---|\n";
    for field in spec::FOREIGN_FIELDS {
        let name = match field.of {
            "VM" => field.name.to_owned(),
            of => format!("{of}.{}", field.name),
        };
        let default = field
            .default
            .map_or_else(String::new, |json| format!("`{json}`"));
        page += &format!("| `{name}` | {default} | {} |\n", field.reason);
    }
    page + STATES + THREADS
}

const STATES: &str = "
## States of a VM

`vm.info` shows `Created` also when the guest has ended, by `vm.shutdown` or by itself, as Cloud
Hypervisor does: the VM can be booted again. The service's own API shows `Shutdown`.
";

const THREADS: &str = "
## Names of threads

The threads of vCPUs are called `vcpu0`, `vcpu1` and so on, as in Cloud Hypervisor. Its threads of
queues (`_disk0_q0`, `_net1_qp0`) have no counterpart: the queues of all devices share a few
threads, so a name of one queue would be wrong. libvirt lists threads with the prefixes `_disk`,
`_net` and `_rng` as I/O threads. The list is empty here, which libvirt accepts; it counts these
threads as the emulator's.
";

const PAGE: &str = "# Compatibility with Cloud Hypervisor's API

This page lists each endpoint and field of Cloud Hypervisor's API (v54) and each option of its
command line, and whether this version supports it, refuses it, or accepts it without effect. It is
generated from the tables that the code uses. These commands renew it:

    UPDATE_COMPATIBILITY=1 cargo test -p spec --test effects
    UPDATE_COMPATIBILITY=1 cargo test -p whimbrel compatibility
";

#[test]
fn the_page_of_compatibility_is_current() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/compatibility.md");
    let page = page();
    // The program's own tests make the last part, of its table of options.
    let there = std::fs::read_to_string(path).unwrap_or_default();
    let (there, options) = match there.find("\n## Options") {
        Some(end) => there.split_at(end),
        None => (&*there, ""),
    };
    if std::env::var_os("UPDATE_COMPATIBILITY").is_some() {
        std::fs::write(path, format!("{page}{options}")).unwrap();
        return;
    }
    assert!(
        there == page,
        "docs/compatibility.md is not what the tables say; renew it by \
         UPDATE_COMPATIBILITY=1 cargo test -p spec --test effects"
    );
}
