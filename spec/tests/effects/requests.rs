//! The part of the page about the bodies of requests.

use std::collections::BTreeSet;

use serde_json::Value;
use spec::FieldProblem;

use super::{EFFECTIVE, dotted, fields, full, judged, refusal, without_effect};

/// Fields of requests that have their effect, by endpoint.
const EFFECTIVE_REQUESTS: &[(&str, &[&str])] = &[
    ("vm.coredump", &["/destination_url"]),
    (
        "vm.receive-migration",
        &[
            "/receiver_url",
            "/tls_dir",
            "/net_fds/0/id",
            "/net_fds/0/num_fds",
        ],
    ),
    ("vm.remove-device", &["/id"]),
    ("vm.resize", &["/desired_balloon", "/desired_vcpus"]),
    ("vm.resize-disk", &["/id", "/desired_size"]),
    ("vm.resize-zone", &["/id"]),
    (
        "vm.restore",
        &[
            "/source_url",
            "/prefault",
            "/memory_restore_mode",
            "/resume",
            "/zone_updates/0/id",
            "/zone_updates/0/host_numa_node",
            "/net_fds/0/id",
            "/net_fds/0/num_fds",
            "/verify",
            "/overrides/disks/0/id",
            "/overrides/disks/0/path",
            "/overrides/disks/0/image_type",
            "/overrides/disks/0/backing_files",
            "/overrides/net/0/id",
            "/overrides/net/0/tap",
            "/overrides/net/0/mac",
            "/overrides/vsock/cid",
            "/overrides/vsock/socket",
            "/overrides/serial/mode",
            "/overrides/serial/file",
            "/overrides/serial/socket",
            "/overrides/console/mode",
            "/overrides/console/file",
            "/overrides/console/socket",
            "/overrides/debug_console/mode",
            "/overrides/debug_console/file",
            "/overrides/debug_console/iobase",
            "/overrides/tpm/socket",
        ],
    ),
    (
        "vm.send-migration",
        &[
            "/destination_url",
            "/local",
            "/downtime_ms",
            "/timeout_s",
            "/timeout_strategy",
            "/connections",
            "/tls_dir",
            "/memory_mode",
            "/storage",
        ],
    ),
    ("vm.snapshot", &["/base_url", "/destination_url", "/disks"]),
];

const NUMBERS_IGNORED: &str =
    "supported: the descriptors come with the request (`SCM_RIGHTS`), and the numbers are ignored";

/// Fields of requests with another state. Those that are refused by their value are marked in
/// `tests/consumers`, too, which fails when they are not refused any more.
const TOLD_REQUESTS: &[(&str, &str, &str)] = &[
    ("vm.add-net", "/fds", NUMBERS_IGNORED),
    ("vm.receive-migration", "/net_fds/0/fds", NUMBERS_IGNORED),
    ("vm.restore", "/net_fds/0/fds", NUMBERS_IGNORED),
    (
        "vm.receive-migration",
        "/memory_mode",
        "accepted without effect: the source chooses, and the destination does either",
    ),
    (
        "vm.resize",
        "/desired_ram",
        "supported with `memory.hotplug_size`; with `Acpi` a smaller size has its effect at the next boot",
    ),
    (
        "vm.resize-zone",
        "/desired_ram",
        "supported with `memory.zones.hotplug_size` and the method `VirtioMem`",
    ),
    (
        "vm.restore",
        "/count",
        "refused on the socket of one VM: a service's own face makes several VMs of a snapshot",
    ),
    (
        "vm.snapshot",
        "/max_downtime_ms",
        "accepted without effect with `disks` set to `Copy`, else refused: the VM is paused",
    ),
    (
        "vm.snapshot",
        "/deadline_s",
        "accepted without effect with `disks` set to `Copy`, else refused: the VM is paused",
    ),
    (
        "vm.snapshot",
        "/max_bandwidth",
        "accepted without effect with `disks` set to `Copy`, else refused: the VM is paused",
    ),
];

/// Requests whose body is a part of the configuration, with the pointer of that.
const ADDED: &[(&str, &str)] = &[
    ("vm.add-disk", "/disks/0"),
    ("vm.add-net", "/net/0"),
    ("vm.add-vsock", "/vsock"),
];

/// The state of a field of a request.
fn request_state(endpoint: &str, field: &str, problems: &[FieldProblem]) -> String {
    let mut told = TOLD_REQUESTS.iter();
    if let Some((.., state)) = told.find(|(of, name, _)| (*of, *name) == (endpoint, field)) {
        return (*state).to_owned();
    }
    if let Some((_, part)) = ADDED.iter().find(|(of, _)| *of == endpoint) {
        let whole = format!("{part}{field}");
        if refusal(problems, &whole).is_some() {
            return format!("refused: this version does not support `{}`", dotted(field));
        }
        if let Some(reason) = without_effect(&whole) {
            return format!("accepted without effect: {reason}");
        }
        assert!(EFFECTIVE.contains(&whole.as_str()), "{whole}");
        return "supported".to_owned();
    }
    let mut refused = spec::REFUSED_FIELDS.iter();
    let is_this = |refused: &&spec::RefusedField| {
        refused.endpoint == endpoint && field.trim_start_matches('/').starts_with(refused.name)
    };
    if let Some(refused) = refused.find(is_this) {
        return format!("refused: this version cannot {}", refused.what);
    }
    let mut effective = EFFECTIVE_REQUESTS.iter();
    let is_known = effective.any(|(of, names)| *of == endpoint && names.contains(&field));
    assert!(is_known, "the state of {endpoint} {field} is unknown");
    "supported".to_owned()
}

/// The section about the bodies of requests. An endpoint that is refused is no part of it.
pub(super) fn section(document: &Value, problems: &[FieldProblem]) -> String {
    let mut section = String::from(
        "\n## Fields of requests\n\n\
         The body of `vm.create` is the configuration, below. Endpoints that are refused do not read\n\
         theirs.\n\n| endpoint | field | this version |\n|---|---|---|\n",
    );
    let schemas = document["components"]["schemas"].as_object().unwrap();
    for (path, item) in document["paths"].as_object().unwrap() {
        let operation = &item["put"];
        let body = &operation["requestBody"]["content"]["application/json"]["schema"];
        let Some(endpoint) = path
            .strip_prefix("/api/v1/")
            .filter(|name| name.starts_with("vm.") && *name != "vm.create" && body.is_object())
        else {
            continue;
        };
        let mut answers = operation["responses"].as_object().unwrap().keys();
        if !answers.any(|status| status.starts_with('2')) {
            continue;
        }
        let mut found = BTreeSet::new();
        fields(body, schemas, "", &mut found);
        let mut shown = BTreeSet::new();
        for field in &found {
            let state = request_state(endpoint, field, problems);
            // A list that is refused stands for the fields of its items.
            let name = match state.starts_with("refused") {
                true => dotted(field).split('.').next().unwrap().to_owned(),
                false => dotted(field),
            };
            if shown.insert(name.clone()) {
                section += &format!("| `{endpoint}` | `{name}` | {state} |\n");
            }
        }
    }
    section
}

/// A device that is added has the problems of one in the configuration.
#[test]
fn added_devices_are_judged_as_configured_ones() {
    let (_, problems) = judged();
    for (endpoint, part) in ADDED {
        let body = full().pointer(part).unwrap().to_string();
        let alone = match *endpoint {
            "vm.add-disk" => spec::parse::<spec::DiskConfig>(body.as_bytes())
                .unwrap()
                .problems(),
            "vm.add-net" => spec::parse::<spec::NetConfig>(body.as_bytes())
                .unwrap()
                .problems(),
            _ => spec::parse::<spec::VsockConfig>(body.as_bytes())
                .unwrap()
                .problems(),
        };
        let alone: Vec<_> = alone
            .iter()
            .map(|problem| problem.pointer.as_str())
            .collect();
        let within = problems
            .iter()
            .filter_map(|problem| problem.pointer.strip_prefix(part));
        assert_eq!(alone, within.collect::<Vec<_>>(), "{endpoint}");
    }
}
