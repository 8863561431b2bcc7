//! Bodies as clients send them, invalid bodies, and arbitrary bytes.

use proptest::prelude::*;
use serde_json::{Value, json};
use spec::{HostLimits, ParseError, VmConfig, options, parse};

const HOST: HostLimits = HostLimits {
    max_vcpus: 64,
    max_memory: 1 << 40,
    host_cpus: 64,
};

fn read(body: &Value) -> Result<VmConfig, ParseError> {
    parse(body.to_string().as_bytes())
}

/// Every device there is, as far as its fields are required.
fn every_device() -> Value {
    json!({
        "cpus": {"boot_vcpus": 2, "max_vcpus": 4, "affinity": [{"vcpu": 0, "host_cpus": [0, 1]}],
            "topology": {"threads_per_core": 1, "cores_per_die": 4, "dies_per_package": 1, "packages": 1}},
        "memory": {"size": 0, "zones": [{"id": "z", "size": 1 << 30}]},
        "payload": {"kernel": "/k", "cmdline": "console=ttyS0"},
        "disks": [{"path": "/d", "rate_limiter_config": {"bandwidth": {"size": 1, "refill_time": 1}}}],
        "net": [{"tap": "tap0", "mac": "12:34:56:78:9a:bc"}],
        "rng": {"src": "/dev/urandom"},
        "balloon": {"size": 0},
        "fs": [{"tag": "t", "socket": "/s", "num_queues": 1, "queue_size": 1024}],
        "pmem": [{"file": "/p"}],
        "serial": {"mode": "File", "file": "/log"},
        "console": {"mode": "Off"},
        "devices": [{"path": "/sys/d"}],
        "user_devices": [{"socket": "/u"}],
        "vdpa": [{"path": "/v", "num_queues": 1}],
        "vsock": {"cid": 3, "socket": "/vs"},
        "numa": [{
            "guest_numa_id": 0, "cpus": [0, 1, 2, 3], "memory_zones": ["z"],
            "distances": [{"destination": 0, "distance": 10}],
        }],
        "platform": {"num_pci_segments": 1},
        "tpm": {"socket": "/t"},
        "landlock_rules": [{"path": "/", "access": "r"}],
    })
}

/// JSON pointers to all objects in a value.
fn objects(value: &Value, at: &str, found: &mut Vec<String>) {
    match value {
        Value::Object(fields) => {
            found.push(at.to_owned());
            for (name, value) in fields {
                objects(value, &format!("{at}/{name}"), found);
            }
        }
        Value::Array(items) => {
            for (i, value) in items.iter().enumerate() {
                objects(value, &format!("{at}/{i}"), found);
            }
        }
        _ => {}
    }
}

#[test]
fn rejects_unknown_fields() {
    let mut pointers = Vec::new();
    objects(&every_device(), "", &mut pointers);
    assert!(pointers.len() > 20);
    for at in pointers {
        let mut body = every_device();
        body.pointer_mut(&at).unwrap()["zzz"] = json!(1);
        let expected = ParseError::UnknownField {
            pointer: at,
            field: "zzz".into(),
            suggestion: None,
        };
        assert_eq!(read(&body), Err(expected));
    }
}

#[test]
fn unsupported_devices_are_refused_by_name() {
    let config = read(&every_device()).unwrap();
    let problems = config.validate(&HOST).unwrap_err();
    let mut refused: Vec<_> = problems.iter().map(|p| p.pointer.as_str()).collect();
    refused.sort_unstable();
    let expected = [
        "/devices",
        "/fs",
        "/landlock_rules",
        "/pmem",
        "/user_devices",
        "/vdpa",
    ];
    assert_eq!(refused, expected);
    assert!(problems.iter().all(|p| p.code == spec::UNSUPPORTED));
}

/// Nothing is accepted and then ignored: a switch that this version does not know how to turn is
/// refused when it is not as it would be by itself.
#[test]
fn every_switch_has_an_effect_or_is_refused() {
    let heeded = [
        "/cpus/kvm_hyperv",
        "/memory/hugepages",
        "/memory/mergeable",
        "/memory/prefault",
        "/memory/reserve",
        "/memory/shared",
        "/memory/thp",
        "/pvpanic",
        "/watchdog",
    ];
    let config = read(&json!({"payload": {"kernel": "/k"}, "platform": {}})).unwrap();
    let whole = serde_json::to_value(&config).unwrap();
    let mut parents = Vec::new();
    objects(&whole, "", &mut parents);
    let mut switches = 0;
    for parent in parents {
        for (name, value) in whole.pointer(&parent).unwrap().as_object().unwrap() {
            let Value::Bool(default) = value else {
                continue;
            };
            switches += 1;
            let pointer = format!("{parent}/{name}");
            let mut body = whole.clone();
            *body.pointer_mut(&pointer).unwrap() = json!(!default);
            let refused = read(&body)
                .unwrap()
                .validate(&HOST)
                .err()
                .unwrap_or_default();
            let refused: Vec<_> = refused.into_iter().map(|p| (p.pointer, p.code)).collect();
            if heeded.contains(&pointer.as_str()) {
                assert_eq!(refused, [], "{pointer}");
            } else {
                assert_eq!(refused, [(pointer, spec::UNSUPPORTED.to_owned())]);
            }
        }
    }
    assert!(switches > heeded.len());
}

#[test]
fn config_survives_round_trip() {
    let config = read(&every_device()).unwrap();
    let again = serde_json::to_vec(&config).unwrap();
    assert_eq!(parse::<VmConfig>(&again), Ok(config));
}

fn any_vm() -> impl Strategy<Value = Value> {
    let bytes = prop_oneof![Just(0u64), Just(1 << 30), any::<u64>()];
    let cpus = prop_oneof![0u32..4, any::<u32>()];
    let mode = prop::sample::select(vec!["Off", "Pty", "Tty", "File", "Socket", "Null"]);
    let part = || prop_oneof![0u16..3, any::<u16>()];
    (cpus.clone(), cpus, bytes.clone(), any::<bool>(), prop::option::of(bytes), mode, ".{0,8}", [part(), part(), part(), part()])
        .prop_map(|(boot, max, size, huge, page, mode, cmdline, [threads, cores, dies, packages])| {
            let mut body = json!({
                "cpus": {"boot_vcpus": boot, "max_vcpus": max, "topology": {"threads_per_core": threads,
                    "cores_per_die": cores, "dies_per_package": dies, "packages": packages}},
                "memory": {"size": size, "hugepages": huge},
                "payload": {"kernel": "/k", "cmdline": cmdline},
                "serial": {"mode": mode},
            });
            if let Some(page) = page {
                body["memory"]["hugepage_size"] = json!(page);
            }
            body
        })
}

proptest! {
    #[test]
    fn parsed_config_can_be_written_and_validated(body in any_vm()) {
        let config = read(&body).unwrap();
        let written = serde_json::to_vec(&config).unwrap();
        prop_assert_eq!(&parse::<VmConfig>(&written).unwrap(), &config);
        match config.validate(&HOST) {
            Ok(()) => prop_assert!(config.cpus.boot_vcpus > 0 && config.memory.boot_size() > 0),
            Err(problems) => {
                prop_assert!(!problems.is_empty());
                for problem in problems {
                    prop_assert!(problem.pointer.starts_with('/'), "{:?}", problem);
                }
            }
        }
    }

    #[test]
    fn no_body_makes_it_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        let _ = parse::<VmConfig>(&bytes);
    }

    #[test]
    fn no_option_makes_it_panic(text in "(size|boot|affinity|topology|file|path|.{0,4})?[=,@:\\[\\]\"KMG0-9a-z-]{0,24}|.{0,40}") {
        let _ = options::cpus(&text);
        let _ = options::memory(&text);
        let _ = options::serial(&text);
        let _ = options::console(&text);
        let _ = options::size(&text);
        let _ = options::DISK.read::<spec::DiskConfig>(&text);
    }

    #[test]
    fn parses_sizes(number in 0u64..1 << 20, unit in 0usize..5) {
        let text = format!("{number}{}", ["", "K", "M", "G", "T"][unit]);
        prop_assert_eq!(options::size(&text), Some(number << (10 * unit)));
    }
}
