//! Offers of a peer that is not to be trusted, over the real listener: whatever is refused has left no
//! trace on the host.

#![expect(clippy::unwrap_used, reason = "a test that goes wrong panics")]

mod stray;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use control::Registry;
use memory::{RamBlock, RamConfig};
use migration::{
    Block, BlockInfo, Decision, Endpoint, NoJournal, Offer, Outcome, Policy, Progress, Refusal,
    Sending, Source, Stopped, Whereabouts, send,
};
use serde_json::{Value, json};
use spec::{AwaitMigration, StartMigration, VmConfig};
use vmm::{Pool, PoolConfig};

/// A source that makes an offer, and has no guest.
struct Peer {
    machine: Value,
    size: u64,
}

/// The CPUs of this host, as an offer has them.
fn cpuid() -> Vec<[u32; 7]> {
    let here = hypervisor::Kvm::open().unwrap().supported_cpuid().unwrap();
    let rows = here.as_slice().iter();
    rows.map(|e| [e.function, e.index, e.flags, e.eax, e.ebx, e.ecx, e.edx])
        .collect()
}

fn no_guest<T>() -> Result<T, Refusal> {
    Err(Refusal::new("no-guest", "the offer was accepted"))
}

impl Source for Peer {
    fn offer(&mut self) -> Result<Offer, Refusal> {
        Ok(Offer {
            vm: "guest".to_owned(),
            machine: self.machine.to_string().into_bytes().into(),
            blocks: vec![BlockInfo {
                name: "ram".to_owned(),
                size: self.size,
            }],
            connections: 1,
            postcopy: false,
            given: false,
            verify: false,
            disks: Vec::new(),
        })
    }

    fn blocks(&self) -> Vec<Block> {
        let ram = RamBlock::new(&RamConfig::anonymous(4096)).unwrap();
        vec![Block {
            name: "ram".to_owned(),
            ram: Arc::new(ram),
        }]
    }

    fn start_tracking(&mut self) -> Result<(), Refusal> {
        no_guest()
    }

    fn stop_tracking(&mut self) -> Result<(), Refusal> {
        no_guest()
    }

    fn harvest(&mut self) -> Result<(), Refusal> {
        no_guest()
    }

    fn throttle(&mut self, _: u8) {}

    fn dry_run(&mut self) -> Result<Vec<u8>, Refusal> {
        no_guest()
    }

    fn pre_sync(&mut self) {}

    fn stop(&mut self) -> Result<Stopped, Refusal> {
        no_guest()
    }

    fn save(&mut self) -> Result<Vec<u8>, Refusal> {
        no_guest()
    }

    fn flush(&mut self) -> Result<(), Refusal> {
        no_guest()
    }

    fn hand_over(&mut self) -> Result<(), Refusal> {
        no_guest()
    }

    fn show(&mut self, _: &Whereabouts) {}

    fn resume_copying(&mut self) -> Result<(), Refusal> {
        no_guest()
    }

    fn resume(&mut self) -> Result<(), Refusal> {
        no_guest()
    }

    fn gone(&mut self) {}

    fn ended(&mut self, _: &Outcome) {}
}

struct Host {
    dir: tempfile::TempDir,
    registry: Registry,
}

impl Host {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        for folder in ["in", "out"] {
            std::fs::create_dir(dir.path().join(folder)).unwrap();
        }
        std::fs::write(dir.path().join("in/kernel"), guest::IMAGE).unwrap();
        std::fs::write(dir.path().join("out/precious"), "precious").unwrap();
        let made = std::process::Command::new("mkfifo")
            .arg(dir.path().join("in/fifo"))
            .status();
        assert!(made.unwrap().success());
        Self {
            dir,
            registry: Registry::new(Pool::start(&PoolConfig::default()).unwrap()),
        }
    }

    fn path(&self, name: &str) -> String {
        self.dir.path().join(name).to_string_lossy().into_owned()
    }

    /// All files, with what is in them.
    fn files(&self) -> BTreeMap<PathBuf, Vec<u8>> {
        let mut all = BTreeMap::new();
        for folder in ["in", "out"] {
            for entry in std::fs::read_dir(self.dir.path().join(folder)).unwrap() {
                let entry = entry.unwrap();
                let content = match entry.file_type().unwrap().is_file() {
                    true => std::fs::read(entry.path()).unwrap(),
                    false => Vec::new(),
                };
                all.insert(entry.path(), content);
            }
        }
        all
    }

    /// Makes an offer, and returns the code of its refusal.
    fn offer(&self, config: Value, size: u64, change: impl FnOnce(&mut Value)) -> String {
        let waiting = AwaitMigration {
            insecure: true,
            allow: Some(vec![self.path("in")]),
            ..AwaitMigration::at("tcp:127.0.0.1:0")
        };
        let receive = self.registry.receive_migration(&waiting).unwrap();
        let mut config: VmConfig = serde_json::from_value(config).unwrap();
        config.name_devices();
        let places: BTreeMap<_, _> = (1_u8..)
            .zip(config.device_names())
            .map(|(slot, id)| (id, slot << 3))
            .collect();
        let mut machine =
            json!({ "version": 1, "config": config, "places": places, "cpuid": cpuid() });
        change(&mut machine);
        let mut peer = Peer { machine, size };
        let dial: Endpoint = receive.info().endpoint.parse().unwrap();
        let sending = Sending {
            id: uuid::Uuid::new_v4(),
            policy: &Policy::default(),
            dial: &dial,
            journal: &mut NoJournal,
            progress: &Progress::default(),
            decision: &Decision::default(),
        };
        // The peer is another host: what it logs is not this service's.
        let elsewhere = tracing::error_span!("vm", id = "peer");
        let outcome = elsewhere.in_scope(|| send(sending, &mut peer));
        let _ = receive.cancel();
        let Outcome::Stayed { why, .. } = outcome else {
            unreachable!("{outcome:?}");
        };
        println!("{why}");
        why.code
    }
}

const SIZE: u64 = 64 << 20;

#[test]
fn refused_offer_leaves_no_trace() {
    stray::watch();
    let host = Host::new();
    let before = host.files();
    // All of it is allowed and possible, but for what a case changes; the console's file is new.
    let config = |changes: Value| {
        let mut config = json!({
            "payload": { "kernel": host.path("in/kernel") },
            "memory": { "size": SIZE },
            "serial": { "mode": "File", "file": host.path("in/log") },
            "vsock": { "cid": 3, "socket": host.path("in/vsock") },
        });
        for (field, value) in changes.as_object().unwrap() {
            config[field] = value.clone();
        }
        config
    };
    let serial = |name: &str| json!({ "mode": "File", "file": host.path(name) });
    let disk = |name: &str| json!([{ "path": host.path(name) }]);
    let nothing = |_: &mut Value| {};
    let features = |machine: &mut Value| {
        for row in machine["cpuid"].as_array_mut().unwrap() {
            if row[0] == 1 {
                // Every feature of leaf 1.
                (row[5], row[6]) = (u32::MAX.into(), u32::MAX.into());
            }
        }
    };
    // Only a snapshot has frozen disks, of which a machine gets overlays.
    let frozen = |machine: &mut Value| machine["frozen"] = json!(["disk"]);
    type Change<'a> = &'a dyn Fn(&mut Value);
    let cases: [(&str, Value, u64, Change<'_>); 14] = [
        (
            "path-not-allowed",
            json!({ "serial": serial("out/new") }),
            SIZE,
            &nothing,
        ),
        (
            "path-not-allowed",
            json!({ "serial": serial("out/precious") }),
            SIZE,
            &nothing,
        ),
        (
            "path-not-allowed",
            json!({ "disks": disk("out/precious") }),
            SIZE,
            &nothing,
        ),
        (
            "path-not-allowed",
            json!({ "rng": { "src": host.path("out/precious") } }),
            SIZE,
            &nothing,
        ),
        (
            "path-unusable",
            json!({ "disks": disk("in/none") }),
            SIZE,
            &nothing,
        ),
        (
            "path-unusable",
            json!({ "disks": disk("in/fifo") }),
            SIZE,
            &nothing,
        ),
        (
            "payload-missing",
            json!({ "payload": { "kernel": host.path("in/fifo") } }),
            SIZE,
            &nothing,
        ),
        (
            "tap-not-allowed",
            json!({ "net": [{ "tap": "tap0" }] }),
            SIZE,
            &nothing,
        ),
        ("cpu-lacks-features", json!({}), SIZE, &features),
        (
            "memory-short",
            json!({ "memory": { "size": 1_u64 << 39 } }),
            1 << 39,
            &nothing,
        ),
        (
            "unsupported-configuration",
            json!({ "iommu": true }),
            SIZE,
            &nothing,
        ),
        (
            "path-not-allowed",
            json!({ "tpm": { "socket": "/tpm" } }),
            SIZE,
            &nothing,
        ),
        ("offer-unreadable", json!({}), SIZE / 2, &nothing),
        ("offer-unreadable", json!({}), SIZE, &frozen),
    ];
    for (code, changes, size, change) in cases {
        let start = Instant::now();
        let told = host.offer(config(changes.clone()), size, change);
        assert_eq!(told, code, "{changes}");
        assert!(host.files() == before, "{code}: {:?}", host.files().keys());
        assert!(host.registry.list().is_empty(), "{code}");
        // A FIFO has no other end, and the service does not wait for one.
        assert!(start.elapsed() < Duration::from_secs(20), "{code}");
    }
    // Without any of this, the same offer is accepted: it fails where there is no guest.
    assert_eq!(host.offer(config(json!({})), SIZE, nothing), "no-guest");
    assert!(Path::new(&host.path("in/log")).exists());
    // A version without memory hotplug by ACPI has no block for the room that the configuration names.
    // The VM of the offer that was accepted goes in its own time, so these are for other hosts.
    for (code, memory) in [
        ("no-guest", json!({ "hotplug_size": 1_u64 << 30 })),
        (
            "offer-unreadable",
            json!({ "hotplug_size": 1_u64 << 30, "hotplugged_size": 128 << 20 }),
        ),
        (
            "offer-unreadable",
            json!({ "hotplug_size": 1_u64 << 30, "hotplug_method": "VirtioMem" }),
        ),
    ] {
        let host = Host::new();
        let mut config =
            json!({ "payload": { "kernel": host.path("in/kernel") }, "memory": memory });
        config["memory"]["size"] = SIZE.into();
        assert_eq!(host.offer(config, SIZE, nothing), code, "{memory}");
    }
    // Each line of the log that a peer caused is limited for its migration alone.
    assert_eq!(stray::lines(), Vec::<String>::new());
}

#[test]
fn plaintext_tcp_needs_both_ends() {
    let host = Host::new();
    let refused = |result: Option<control::RequestError>| result.unwrap().code;
    let plain = AwaitMigration::at("tcp:127.0.0.1:0");
    let code = refused(host.registry.receive_migration(&plain).err());
    assert_eq!(code, "plaintext-refused");
    let config = json!({ "payload": { "kernel": host.path("in/kernel") } });
    let config = serde_json::from_value(config).unwrap();
    let id = "guest".parse().unwrap();
    host.registry.create(Some(id), config).unwrap();
    let to = StartMigration::to("tcp:127.0.0.1:1");
    let code = refused(host.registry.send_migration("guest", &to).err());
    assert_eq!(code, "plaintext-refused");
    // With it, the next thing is asked: the VM does not run.
    let to = StartMigration {
        insecure: true,
        ..to
    };
    let code = refused(host.registry.send_migration("guest", &to).err());
    assert_eq!(code, "wrong-state");
}
