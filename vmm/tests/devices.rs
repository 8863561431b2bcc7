//! The devices of a machine on `/dev/kvm`, as its owner sees them: the pocket guest runs and, but
//! where there are many, uses none of them.

#![expect(clippy::unwrap_used, reason = "a test that goes wrong panics")]

use std::collections::{BTreeMap, BTreeSet};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use control::{NewDevice, Registry, Reply, Request, RequestError, VmHandle};
use guest::{Command, Line, Options, Workload};
use spec::{
    DeviceNode, DeviceState, PayloadConfig, VmConfig, VmRemoveDevice, VmResize, VmResizeDisk,
    VmState,
};
use vmm::{Pool, PoolConfig};

struct Lab {
    dir: tempfile::TempDir,
    registry: Registry,
}

impl Lab {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("pocket"), guest::IMAGE).unwrap();
        let registry = Registry::new(Pool::start(&PoolConfig::default()).unwrap());
        Self { dir, registry }
    }

    fn path(&self, name: &str) -> String {
        self.dir.path().join(name).to_string_lossy().into_owned()
    }

    fn image(&self, name: &str, size: u64) -> String {
        let file = std::fs::File::create(self.path(name)).unwrap();
        file.set_len(size).unwrap();
        self.path(name)
    }

    fn config(&self) -> VmConfig {
        let mut config = VmConfig::with_payload(PayloadConfig {
            kernel: Some(self.path("pocket")),
            cmdline: Some(Options::default().to_string()),
            ..PayloadConfig::default()
        });
        config.memory.size = 64 << 20;
        config
    }

    fn create(&self, change: impl FnOnce(&mut VmConfig)) -> VmHandle {
        let mut config = self.config();
        change(&mut config);
        self.registry.create(None, config).unwrap()
    }
}

fn disk(path: &str, id: Option<&str>) -> NewDevice {
    let disk = serde_json::json!({ "path": path, "id": id });
    NewDevice::Disk(serde_json::from_value(disk).unwrap())
}

/// By descriptors, which are of this file.
fn net(path: &str) -> NewDevice {
    let mut net: spec::NetConfig = serde_json::from_str("{}").unwrap();
    let file = std::fs::File::open(path).unwrap();
    net.fds = Some(spec::Descriptors::new(vec![file.into()]));
    NewDevice::Net(Box::new(net))
}

fn vsock(socket: &str) -> NewDevice {
    let vsock = serde_json::json!({ "cid": 3, "socket": socket });
    NewDevice::Vsock(serde_json::from_value(vsock).unwrap())
}

async fn add(vm: &VmHandle, device: NewDevice) -> Result<Reply, RequestError> {
    vm.ask(Request::AddDevice(device)).await
}

async fn remove(vm: &VmHandle, id: &str) -> Result<Reply, RequestError> {
    let id = id.to_owned();
    vm.ask(Request::RemoveDevice(VmRemoveDevice { id })).await
}

async fn refused(asked: impl Future<Output = Result<Reply, RequestError>>) -> String {
    asked.await.unwrap_err().code
}

/// Mappings of the shared memory of guests in this process.
fn guests_memory() -> usize {
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    maps.matches("guest-ram").count()
}

#[tokio::test]
async fn added_disk_joins_a_group_that_exists() {
    let lab = Lab::new();
    let image = lab.image("disk.raw", 1 << 20);
    let vm = lab.create(|config| {
        let limit = serde_json::json!({ "ops": { "size": 1, "refill_time": 1 } });
        let groups = serde_json::json!([{ "id": "g", "rate_limiter_config": limit }]);
        config.rate_limit_groups = serde_json::from_value(groups).unwrap();
    });
    let of_group = |group: &str| {
        let disk = serde_json::json!({ "path": image, "rate_limit_group": group });
        NewDevice::Disk(serde_json::from_value(disk).unwrap())
    };
    vm.ask(Request::Boot).await.unwrap();
    let refused = add(&vm, of_group("h")).await.unwrap_err();
    let problems = refused.fields;
    assert_eq!(problems[0].pointer, "/rate_limit_group", "{problems:?}");
    add(&vm, of_group("g")).await.unwrap();
    vm.ask(Request::Delete).await.unwrap();
}

/// The guest is notified of devices in segment 0 only, and a segment must exist.
#[tokio::test]
async fn other_segments_change_while_the_vm_is_off() {
    let lab = Lab::new();
    let image = lab.image("disk.raw", 1 << 20);
    let vm = lab.create(|config| {
        config.platform = serde_json::from_str(r#"{"num_pci_segments":2}"#).unwrap();
    });
    let disk = |segment: u16| {
        let disk = serde_json::json!({ "path": image, "id": "disk", "pci_segment": segment });
        NewDevice::Disk(serde_json::from_value(disk).unwrap())
    };
    let absent = add(&vm, disk(2)).await.unwrap_err();
    assert_eq!(absent.fields[0].pointer, "/pci_segment", "{absent:?}");
    add(&vm, disk(1)).await.unwrap();
    vm.ask(Request::Boot).await.unwrap();
    let at = vm.status().devices["disk"].pci_bdf.clone();
    assert_eq!(at.as_deref(), Some("0001:00:01.0"));
    let fixed = "segment-not-hotpluggable";
    assert_eq!(refused(add(&vm, disk(1))).await, fixed);
    assert_eq!(refused(remove(&vm, "disk")).await, fixed);
    vm.ask(Request::Shutdown).await.unwrap();
    remove(&vm, "disk").await.unwrap();
    vm.ask(Request::Boot).await.unwrap();
    assert!(!vm.status().devices.contains_key("disk"));
    vm.ask(Request::Delete).await.unwrap();
}

#[tokio::test]
async fn devices_are_added_and_removed() {
    let lab = Lab::new();
    let (first, second) = (
        lab.image("first.raw", 1 << 20),
        lab.image("second.raw", 1 << 20),
    );
    let socket = lab.path("vsock");
    let vm = lab.create(|config| {
        config.memory.shared = true;
        config.disks = serde_json::from_value(serde_json::json!([{ "path": first }])).unwrap();
        config.balloon = serde_json::from_str(r#"{"size":0}"#).unwrap();
    });
    // Before it boots, what is added is a part of what will be built.
    assert_eq!(add(&vm, vsock(&socket)).await.unwrap(), Reply::Done);
    assert_eq!(refused(add(&vm, vsock(&socket))).await, "vsock-exists");
    for _ in 0..3 {
        vm.ask(Request::Boot).await.unwrap();
        assert_eq!(guests_memory(), 1);
        let devices = vm.status().devices;
        let names: Vec<_> = devices.keys().map(String::as_str).collect();
        let all = ["__balloon", "__console", "__rng", "_disk0", "_vsock0"];
        assert_eq!(names, all);
        assert!(std::path::Path::new(&socket).exists());

        let Reply::Added(added) = add(&vm, disk(&second, None)).await.unwrap() else {
            unreachable!("a running guest is given devices");
        };
        assert_eq!(added.id, "_disk1");
        assert_eq!(vm.status().devices["_disk1"].pci_bdf, Some(added.bdf));
        assert_eq!(vm.status().config.disks.as_ref().unwrap().len(), 2);
        vm.ask(Request::Pause).await.unwrap();
        vm.ask(Request::Resume).await.unwrap();
        // The guest does not listen: the device stays, and is not there at the next boot.
        remove(&vm, "_disk1").await.unwrap();
        assert_eq!(vm.status().devices["_disk1"].state, DeviceState::Leaving);
        assert_eq!(vm.status().config.disks.as_ref().unwrap().len(), 1);
        assert_eq!(
            refused(add(&vm, disk(&second, Some("_disk1")))).await,
            "device-exists"
        );
        vm.ask(Request::Shutdown).await.unwrap();
        assert_eq!(guests_memory(), 0, "nothing holds a machine that has ended");
        assert!(vm.status().devices.is_empty());
        assert!(!std::path::Path::new(&socket).exists());
    }

    vm.ask(Request::Boot).await.unwrap();
    vm.ask(Request::Reboot).await.unwrap();
    assert_eq!((vm.status().state, guests_memory()), (VmState::Running, 1));
    let events = lab.registry.events().after(0, None).0;
    let count = |name: &str| events.iter().filter(|event| event.event == name).count();
    assert_eq!(
        (count("device-added"), count("device-removal-requested")),
        (3, 3)
    );

    // What cannot be leaves everything as it is.
    let other = lab.create(|_| {});
    other.ask(Request::Boot).await.unwrap();
    assert_eq!(
        refused(add(&other, disk(&first, None))).await,
        "disk-in-use"
    );
    assert_eq!(
        refused(add(&other, disk(&lab.path("none"), None))).await,
        "disk-unusable"
    );
    let dir = lab.dir.path().to_string_lossy().into_owned();
    assert_eq!(
        refused(add(&other, disk(&dir, None))).await,
        "disk-unusable"
    );
    assert_eq!(
        refused(add(&other, disk(&second, Some("__rng")))).await,
        "invalid-configuration"
    );
    assert_eq!(refused(add(&other, vsock(&socket))).await, "vsock-unusable");
    assert_eq!(refused(remove(&other, "none")).await, "no-such-device");
    assert_eq!(refused(remove(&other, "__rng")).await, "device-fixed");
    // For descriptors that are of no tap none is made in their place.
    let unusable = add(&other, net("/dev/null")).await.unwrap_err();
    assert_eq!(unusable.code, "tap-unusable");
    assert!(unusable.detail.contains("descriptor"), "{unusable}");
    assert_eq!(other.status().config.net, None);
    assert_eq!(other.status().devices.len(), 2);
    // All slots of the bus.
    let mut added = 0;
    let full = loop {
        let path = lab.image(&format!("{added}.raw"), 512);
        match add(&other, disk(&path, None)).await {
            Ok(_) => added += 1,
            Err(error) => break error,
        }
    };
    assert_eq!((added, full.code.as_str()), (29, "no-free-slot"));
    assert_eq!(other.status().devices.len(), 31);
    assert_eq!(other.status().state, VmState::Running);
}

/// The devices that a guest finds on its bus, of which it drives a disk and the source of entropy.
fn found_by_guest(serial: &UnixStream) -> u64 {
    let patience = Duration::from_secs(30);
    serial.set_read_timeout(Some(patience)).unwrap();
    let mut lines = BufReader::new(serial);
    let start = Instant::now();
    loop {
        let mut serial = serial;
        let asked = format!("{}\n", Command::Io);
        serial.write_all(asked.as_bytes()).unwrap();
        let (devices, is_going) = loop {
            let mut text = String::new();
            assert!(lines.read_line(&mut text).unwrap() > 0);
            if let Some(Line::Io {
                devices,
                random,
                blocks,
                bad,
                ..
            }) = Line::parse(&text)
            {
                assert_eq!(bad, 0, "{text}");
                break (devices, random > 1000 && blocks > 10);
            }
        };
        if is_going {
            return devices;
        }
        assert!(start.elapsed() < patience, "{devices} were found");
        std::thread::sleep(Duration::from_millis(2));
    }
}

fn places(vm: &VmHandle) -> BTreeMap<String, String> {
    let devices = vm.status().devices.into_values();
    let place = |device: DeviceNode| (device.id, device.pci_bdf.unwrap());
    devices.map(place).collect()
}

#[tokio::test]
async fn maximum_devices_share_slots() {
    let lab = Lab::new();
    let disks = |count: usize| -> Vec<spec::DiskConfig> {
        let path = |i| lab.image(&format!("{i}.raw"), 1 << 20);
        let disk = |i| serde_json::from_value(serde_json::json!({ "path": path(i) })).unwrap();
        (0..count).map(disk).collect()
    };
    let with = |count: usize| {
        let serial = serde_json::json!({ "mode": "Socket", "socket": lab.path("serial") });
        let options = Options {
            workload: Workload::Io,
            ..Options::default()
        };
        let mut config = lab.config();
        config.payload.cmdline = Some(options.to_string());
        config.serial = serde_json::from_value(serial).unwrap();
        config.disks = Some(disks(count));
        config
    };
    let refusal = lab.registry.create(None, with(63)).err().unwrap();
    assert_eq!(refusal.code, "invalid-configuration");
    let detail = &refusal.fields[0].detail;
    assert!(
        detail.starts_with("65 devices are more than a VM can have, 64"),
        "{detail}"
    );

    let vm = lab.registry.create(None, with(62)).unwrap();
    let next = || disk(&lab.image("next.raw", 1 << 20), None);
    assert_eq!(refused(add(&vm, next())).await, "too-many-devices");
    vm.ask(Request::Boot).await.unwrap();
    let serial = UnixStream::connect(lab.path("serial")).unwrap();
    assert_eq!(found_by_guest(&serial), 64);
    let first = places(&vm);
    assert_eq!(first.values().collect::<BTreeSet<_>>().len(), 64);
    for (id, place) in [
        ("_disk0", "0000:00:01.0"),
        ("_disk20", "0000:00:15.0"),
        ("_disk21", "0000:00:16.0"),
        ("_disk28", "0000:00:16.7"),
        ("__console", "0000:00:1b.1"),
        ("__rng", "0000:00:1b.2"),
    ] {
        assert_eq!(first[id], place, "{id}");
    }

    // One that shares its slot stays, with all that is said of it.
    let before = vm.status();
    for id in ["_disk21", "_disk28", "_disk61"] {
        let refusal = remove(&vm, id).await.unwrap_err();
        assert_eq!(refusal.code, "device-shares-slot");
        assert!(refusal.detail.contains(&first[id]), "{refusal}");
    }
    assert_eq!(vm.status().config, before.config);
    assert_eq!(vm.status().devices, before.devices);
    assert_eq!(refused(add(&vm, next())).await, "too-many-devices");

    // What comes later has a slot of its own, of which there are four.
    for id in ["_disk1", "_disk2", "_disk3", "_disk4", "_disk5"] {
        remove(&vm, id).await.unwrap();
    }
    for slot in 0x1c..0x20 {
        let image = lab.image(&format!("slot{slot}.raw"), 512);
        let id = format!("new{slot}");
        let Reply::Added(added) = add(&vm, disk(&image, Some(&id))).await.unwrap() else {
            unreachable!("a running guest is given devices");
        };
        assert_eq!(added.bdf, format!("0000:00:{slot:02x}.0"));
    }
    assert_eq!(refused(add(&vm, next())).await, "no-free-slot");

    // A reset takes away what was to go, and leaves everything else where it is.
    let mut expected = places(&vm);
    expected
        .retain(|id, _| !["_disk1", "_disk2", "_disk3", "_disk4", "_disk5"].contains(&id.as_str()));
    vm.ask(Request::Reboot).await.unwrap();
    assert_eq!(places(&vm), expected);
    assert_eq!(found_by_guest(&serial), 63);
    let Reply::Added(added) = add(&vm, next()).await.unwrap() else {
        unreachable!("a running guest is given devices");
    };
    assert_eq!(added.bdf, "0000:00:02.0");

    // One that is off can do without any.
    vm.ask(Request::Shutdown).await.unwrap();
    remove(&vm, "_disk21").await.unwrap();
    vm.ask(Request::Boot).await.unwrap();
    assert_eq!(vm.status().devices.len(), 63);
}

/// Each vCPU's thread has run by the time the guest does.
#[tokio::test]
async fn counters_have_the_times_of_vcpus() {
    let lab = Lab::new();
    let vm = lab.create(|config| {
        (config.cpus.boot_vcpus, config.cpus.max_vcpus) = (2, 2);
    });
    vm.ask(Request::Boot).await.unwrap();
    let begun = std::time::Instant::now();
    loop {
        let Reply::Counters(counters) = vm.ask(Request::Counters).await.unwrap() else {
            unreachable!("counters are asked for");
        };
        let ran = |vcpu: &str| counters[vcpu]["run_ns"];
        assert!(counters["vcpu1"].contains_key("wait_ns"), "{counters:?}");
        if ran("vcpu0") > 0 {
            return;
        }
        assert!(begun.elapsed().as_secs() < 30, "{counters:?}");
        tokio::time::sleep(std::time::Duration::from_millis(5)).await;
    }
}

#[tokio::test]
async fn resize_accepts_only_valid_sizes() {
    let lab = Lab::new();
    let image = lab.image("disk.raw", 1 << 20);
    let vm = lab.create(|config| {
        config.disks = serde_json::from_value(serde_json::json!([{ "path": image }])).unwrap();
        config.balloon = serde_json::from_str(r#"{"size":4096,"id":"air"}"#).unwrap();
    });
    let resize = |size: VmResize| vm.ask(Request::Resize(size));
    let balloon = |bytes| VmResize {
        desired_balloon: Some(bytes),
        ..VmResize::default()
    };
    resize(balloon(1 << 20)).await.unwrap();
    vm.ask(Request::Boot).await.unwrap();
    resize(balloon(2 << 20)).await.unwrap();
    assert_eq!(vm.status().config.balloon.as_ref().unwrap().size, 2 << 20);
    let Reply::Counters(counters) = vm.ask(Request::Counters).await.unwrap() else {
        unreachable!("counters are asked for");
    };
    assert_eq!(counters["air"]["wanted_bytes"], 2 << 20);
    assert_eq!(
        refused(resize(balloon(65 << 20))).await,
        "balloon-too-large"
    );
    let vcpus = VmResize {
        desired_vcpus: Some(2),
        ..VmResize::default()
    };
    assert_eq!(refused(resize(vcpus)).await, "vcpus-out-of-range");
    let memory = VmResize {
        desired_ram: Some(128 << 20),
        ..VmResize::default()
    };
    assert_eq!(refused(resize(memory)).await, "unsupported-resize");
    let same = VmResize {
        desired_vcpus: Some(1),
        desired_ram: Some(64 << 20),
        ..VmResize::default()
    };
    resize(same).await.unwrap();

    let disk = |id: &str, desired_size| {
        let id = id.to_owned();
        vm.ask(Request::ResizeDisk(VmResizeDisk { id, desired_size }))
    };
    disk("_disk0", 2 << 20).await.unwrap();
    assert_eq!(std::fs::metadata(&image).unwrap().len(), 2 << 20);
    assert_eq!(refused(disk("_disk0", 1000)).await, "disk-size");
    assert_eq!(refused(disk("air", 1 << 20)).await, "not-a-disk");
    assert_eq!(refused(disk("none", 1 << 20)).await, "no-such-device");
}
