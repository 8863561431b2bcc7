//! The memory of the pocket guest grows and shrinks on `/dev/kvm`: the guest drives the virtio-mem
//! device, writes to each block that it plugs, and checks each that it unplugs.

#![expect(clippy::unwrap_used, reason = "a test that goes wrong panics")]

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use control::{Registry, Reply, Request, RequestError, VmHandle};
use guest::{Command, Line, Options, Workload};
use spec::{
    AwaitMigration, HotplugMethod, MemoryMode, MigrationPhase, PayloadConfig, StartMigration,
    VmConfig, VmResize, VmResizeZone,
};
use vmm::{Pool, PoolConfig};

const PATIENCE: Duration = Duration::from_secs(60);
const MIB: u64 = 1 << 20;
/// Memory with which the guest boots.
const BOOT: u64 = 64 * MIB;
/// Memory that can be added.
const ROOM: u64 = 1024 * MIB;

struct Stage {
    dir: tempfile::TempDir,
    here: Registry,
    there: Registry,
}

impl Stage {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("pocket"), guest::IMAGE).unwrap();
        let registry = || Registry::new(Pool::start(&PoolConfig::default()).unwrap());
        Self {
            dir,
            here: registry(),
            there: registry(),
        }
    }

    fn path(&self, name: &str) -> String {
        self.dir.path().join(name).to_string_lossy().into_owned()
    }

    fn config(&self, workload: Workload) -> VmConfig {
        let options = Options {
            workload,
            ..Options::default()
        };
        let mut config = VmConfig::with_payload(PayloadConfig {
            kernel: Some(self.path("pocket")),
            cmdline: Some(options.to_string()),
            ..PayloadConfig::default()
        });
        config.memory.size = BOOT;
        config.memory.hotplug_method = HotplugMethod::VirtioMem;
        config.memory.hotplug_size = Some(ROOM);
        let serial = serde_json::json!({ "mode": "Socket", "socket": self.path("serial") });
        config.serial = serde_json::from_value(serial).unwrap();
        config
    }

    async fn boot(&self, config: VmConfig) -> VmHandle {
        let vm = self.here.create(Some("pocket".parse().unwrap()), config);
        let vm = vm.unwrap();
        vm.ask(Request::Boot).await.unwrap();
        vm
    }

    /// Returns how many pages the guest found to be wrong.
    fn bad(&self) -> u64 {
        let start = Instant::now();
        let stream = loop {
            match UnixStream::connect(Path::new(&self.path("serial"))) {
                Ok(stream) => break stream,
                Err(error) => assert!(start.elapsed() < PATIENCE, "{error}"),
            }
            std::thread::sleep(Duration::from_millis(2));
        };
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        let mut serial = BufReader::new(stream);
        let asked = serial.get_mut();
        asked
            .write_all(format!("{}\n", Command::Io).as_bytes())
            .unwrap();
        let mut text = String::new();
        loop {
            text.clear();
            assert!(serial.read_line(&mut text).unwrap() > 0);
            if let Some(Line::Io { bad, .. }) = Line::parse(&text) {
                return bad;
            }
        }
    }
}

/// The first zone of a VM with two. The second has the rest of [`BOOT`], and can grow.
const FIRST: u64 = 16 * MIB;

/// Divides the memory into zones, each in a NUMA node of its own.
fn into_zones(config: &mut VmConfig) {
    let shared = config.memory.shared;
    let memory = serde_json::json!({
        "size": 0, "hotplug_method": "VirtioMem", "zones": [
            { "id": "first", "size": FIRST, "shared": shared, "host_numa_node": 0 },
            { "id": "rest", "size": BOOT - FIRST, "shared": shared, "hotplug_size": ROOM },
        ],
    });
    config.memory = serde_json::from_value(memory).unwrap();
    let nodes = serde_json::json!([
        { "guest_numa_id": 0, "memory_zones": ["first"], "cpus": [0] },
        { "guest_numa_id": 1, "memory_zones": ["rest"] },
    ]);
    config.numa = serde_json::from_value(nodes).unwrap();
}

async fn resize_zone(vm: &VmHandle, id: &str, ram: u64) -> Result<(), RequestError> {
    let zone = VmResizeZone {
        id: id.to_owned(),
        desired_ram: ram,
    };
    vm.ask(Request::ResizeZone(zone)).await.map(|_| ())
}

/// Resizes all memory, also that of a VM with zones.
async fn resize_any(vm: &VmHandle, ram: u64) {
    let resized = match vm.status().config.memory.has_zones() {
        true => resize_zone(vm, "rest", ram - FIRST).await,
        false => resize(vm, ram).await,
    };
    resized.unwrap();
}

async fn resize(vm: &VmHandle, ram: u64) -> Result<(), RequestError> {
    let sizes = VmResize {
        desired_ram: Some(ram),
        ..VmResize::default()
    };
    vm.ask(Request::Resize(sizes)).await.map(|_| ())
}

/// Waits until the guest has so much memory, and no resize is pending.
async fn wait_for(vm: &VmHandle, ram: u64) {
    let start = Instant::now();
    loop {
        let info = vm.status().info();
        if info.memory_actual_size == ram && info.pending_resizes.is_empty() {
            return;
        }
        assert!(
            start.elapsed() < PATIENCE,
            "{} bytes, {:?}",
            info.memory_actual_size,
            info.pending_resizes
        );
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

#[tokio::test]
async fn guest_gets_memory_and_gives_it_back() {
    let stage = Stage::new();
    let mut config = stage.config(Workload::Io);
    config.memory.hotplugged_size = Some(32 * MIB);
    let vm = stage.boot(config).await;
    wait_for(&vm, BOOT + 32 * MIB).await;
    for ram in [BOOT + 200 * MIB, BOOT + 2 * MIB, BOOT, BOOT + 64 * MIB] {
        resize(&vm, ram).await.unwrap();
        wait_for(&vm, ram).await;
        let hotplugged = vm.status().info().config.memory.hotplugged_size;
        assert_eq!(hotplugged.unwrap_or(0), ram - BOOT);
    }
    // As it is.
    resize(&vm, BOOT + 64 * MIB).await.unwrap();
    for (ram, code, number) in [
        (BOOT - MIB, "memory-too-small", BOOT),
        (BOOT + ROOM + 2 * MIB, "memory-too-large", BOOT + ROOM),
        (BOOT + MIB, "memory-unaligned", 2 * MIB),
        (u64::MAX, "memory-too-large", BOOT + ROOM),
    ] {
        let refused = resize(&vm, ram).await.unwrap_err();
        assert_eq!(refused.code, code);
        let detail = &refused.detail;
        let names = detail.contains(&ram.to_string()) && detail.contains(&number.to_string());
        assert!(names, "{detail}");
    }
    wait_for(&vm, BOOT + 64 * MIB).await;
    // The next machine begins with as much.
    vm.ask(Request::Reboot).await.unwrap();
    wait_for(&vm, BOOT + 64 * MIB).await;
    assert_eq!(stage.bad(), 0);
    // A VM without a machine boots with what was asked for last.
    vm.ask(Request::Shutdown).await.unwrap();
    resize(&vm, BOOT).await.unwrap();
    assert_eq!(vm.status().info().config.memory.hotplugged_size, None);
}

/// A guest that does not answer keeps what it has, and the resize stays pending.
#[tokio::test]
async fn second_resize_waits_for_the_first() {
    let stage = Stage::new();
    let vm = stage.boot(stage.config(Workload::Idle)).await;
    resize(&vm, BOOT + 64 * MIB).await.unwrap();
    let refused = resize(&vm, BOOT + 128 * MIB).await.unwrap_err();
    assert_eq!(refused.code, "resize-pending");
    let [pending] = &vm.status().info().pending_resizes[..] else {
        unreachable!("{:?}", vm.status().info().pending_resizes);
    };
    assert_eq!((pending.to, pending.actual), (BOOT + 64 * MIB, BOOT));
    vm.ask(Request::Shutdown).await.unwrap();
}

#[tokio::test]
async fn plugged_memory_moves_and_unplugged_does_not() {
    for (mode, local, zones) in [
        (MemoryMode::Precopy, false, false),
        (MemoryMode::Precopy, false, true),
        (MemoryMode::Postcopy, false, true),
        (MemoryMode::Precopy, true, false),
        (MemoryMode::Precopy, true, true),
    ] {
        let stage = Stage::new();
        let mut config = stage.config(Workload::Io);
        config.memory.shared = local;
        if zones {
            into_zones(&mut config);
        }
        let vm = stage.boot(config).await;
        resize_any(&vm, BOOT + 100 * MIB).await;
        wait_for(&vm, BOOT + 100 * MIB).await;
        resize_any(&vm, BOOT + 50 * MIB).await;
        wait_for(&vm, BOOT + 50 * MIB).await;
        let listen = format!("unix:{}", stage.path("migration"));
        let awaiting = AwaitMigration {
            once: true,
            ..AwaitMigration::at(listen)
        };
        let receive = stage.there.receive_migration(&awaiting).unwrap();
        let mut what = StartMigration::to(receive.info().endpoint);
        what.mode = mode;
        what.local = local;
        what.verify = !local;
        let send = stage.here.send_migration("pocket", &what).unwrap();
        for side in [&send, &receive] {
            let mut over = side.over();
            let waited = tokio::time::timeout(PATIENCE, over.wait_for(|over| *over)).await;
            waited.unwrap().unwrap();
            assert_eq!(
                side.info().phase,
                MigrationPhase::Completed,
                "{:?}",
                side.info()
            );
        }
        let sent = send.info();
        // A page of the guest's 82 MiB and what its kernel has, and not 1 GiB.
        assert!(
            sent.pages + sent.zero_pages < (BOOT + 150 * MIB) / 4096 * 2,
            "{sent:?}"
        );
        let vm = stage.there.get("pocket").unwrap();
        wait_for(&vm, BOOT + 50 * MIB).await;
        resize_any(&vm, BOOT + 120 * MIB).await;
        wait_for(&vm, BOOT + 120 * MIB).await;
        // The guest checks each block as it unplugs it.
        resize_any(&vm, BOOT).await;
        wait_for(&vm, BOOT).await;
        assert_eq!(stage.bad(), 0, "{mode:?}, zones: {zones}");
        vm.ask(Request::Shutdown).await.unwrap();
    }
}

/// A zone grows by itself, and nothing else does.
#[tokio::test]
async fn zones_are_resized_one_by_one() {
    let stage = Stage::new();
    let mut config = stage.config(Workload::Io);
    into_zones(&mut config);
    let vm = stage.boot(config).await;
    resize_zone(&vm, "rest", BOOT - FIRST + 64 * MIB)
        .await
        .unwrap();
    wait_for(&vm, BOOT + 64 * MIB).await;
    let plugged = || {
        let memory = &vm.status().config.memory;
        let zones = memory.all_zones().into_iter();
        zones
            .map(|zone| zone.hotplugged() / MIB)
            .collect::<Vec<_>>()
    };
    assert_eq!(plugged(), [0, 64]);
    // As they are.
    resize_zone(&vm, "first", FIRST).await.unwrap();
    resize_zone(&vm, "rest", BOOT - FIRST + 64 * MIB)
        .await
        .unwrap();
    for (zone, ram, code, names) in [
        ("first", FIRST + 2 * MIB, "unsupported-resize", "first"),
        (
            "rest",
            BOOT - FIRST - 2 * MIB,
            "memory-too-small",
            "50331648",
        ),
        ("rest", u64::MAX, "memory-too-large", "1124073472"),
        ("rest", BOOT - FIRST + MIB, "memory-unaligned", "2097152"),
        ("second", BOOT, "no-such-zone", "first, rest"),
    ] {
        let refused = resize_zone(&vm, zone, ram).await.unwrap_err();
        assert_eq!(refused.code, code);
        assert!(refused.detail.contains(names), "{}", refused.detail);
    }
    let refused = resize(&vm, BOOT).await.unwrap_err();
    assert_eq!(refused.code, "unsupported-resize");
    assert!(
        refused.detail.contains("vm.resize-zone"),
        "{}",
        refused.detail
    );
    // The next machine begins with as much.
    vm.ask(Request::Reboot).await.unwrap();
    wait_for(&vm, BOOT + 64 * MIB).await;
    assert_eq!(stage.bad(), 0);
    vm.ask(Request::Shutdown).await.unwrap();
    resize_zone(&vm, "rest", BOOT - FIRST).await.unwrap();
    assert_eq!(plugged(), [0, 0]);
}

#[tokio::test]
async fn zone_of_a_node_that_does_not_exist_is_named() {
    let stage = Stage::new();
    let mut config = stage.config(Workload::Idle);
    into_zones(&mut config);
    config.memory.zones.as_mut().unwrap()[0].host_numa_node = Some(777);
    let vm = stage.here.create(Some("pocket".parse().unwrap()), config);
    let refused = vm.unwrap().ask(Request::Boot).await.unwrap_err();
    assert_eq!(refused.code, "no-such-numa-node");
    let expected = "memory zone `first`: the host has no NUMA node 777";
    assert!(refused.detail.contains(expected), "{}", refused.detail);
}

/// The bytes that the memory map has of added memory.
async fn mapped(vm: &VmHandle) -> Vec<(u64, u64)> {
    let Ok(Reply::MemoryMap(map)) = vm.ask(Request::MemoryMap).await else {
        unreachable!("there is a map");
    };
    let ranges = map.spaces.iter().flat_map(|space| &space.flat);
    let added = ranges.filter(|range| range.name == "hotplugged ram");
    added.map(|range| (range.first, range.last)).collect()
}

/// Memory that was added through ACPI arrives in its slots, with the requests that the guest has yet to
/// answer.
#[tokio::test]
async fn memory_added_by_acpi_moves() {
    for (mode, local) in [
        (MemoryMode::Precopy, false),
        (MemoryMode::Postcopy, false),
        (MemoryMode::Precopy, true),
    ] {
        let stage = Stage::new();
        let mut config = stage.config(Workload::Idle);
        config.memory.hotplug_method = HotplugMethod::Acpi;
        config.memory.hotplugged_size = Some(128 * MIB);
        config.memory.shared = local;
        let vm = stage.boot(config).await;
        wait_for(&vm, BOOT + 128 * MIB).await;
        resize(&vm, BOOT + 384 * MIB).await.unwrap();
        let before = mapped(&vm).await;
        let listen = format!("unix:{}", stage.path("migration"));
        let awaiting = AwaitMigration {
            once: true,
            ..AwaitMigration::at(listen)
        };
        let receive = stage.there.receive_migration(&awaiting).unwrap();
        let mut what = StartMigration::to(receive.info().endpoint);
        what.mode = mode;
        what.local = local;
        what.verify = !local;
        let send = stage.here.send_migration("pocket", &what).unwrap();
        for side in [&send, &receive] {
            let mut over = side.over();
            let waited = tokio::time::timeout(PATIENCE, over.wait_for(|over| *over)).await;
            waited.unwrap().unwrap();
            let info = side.info();
            assert_eq!(info.phase, MigrationPhase::Completed, "{info:?}");
        }
        let vm = stage.there.get("pocket").unwrap();
        assert_eq!(mapped(&vm).await, before);
        let info = vm.status().info();
        assert_eq!(info.memory_actual_size, BOOT + 128 * MIB);
        let [pending] = &info.pending_resizes[..] else {
            unreachable!("{:?}", info.pending_resizes);
        };
        assert_eq!(pending.to, BOOT + 384 * MIB);
        // Found by the guest that boots.
        vm.ask(Request::Reboot).await.unwrap();
        wait_for(&vm, BOOT + 384 * MIB).await;
        vm.ask(Request::Shutdown).await.unwrap();
    }
}
