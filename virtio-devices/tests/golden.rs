//! The bytes of each version of a section, which are read for ever. A section that changes gets a
//! new version and a new file; these stay. `UPDATE_GOLDEN=1` writes those that are missing.

#![allow(clippy::unwrap_used, reason = "tests")]

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use devices::pci::{BarMap, ConfigSpace, MsiMessage, MsiTarget};
use memory::{AddrRange, RamBlock, RamConfig, RegionId};
use state::{Save, Saved, Store, Writer};
use virtio_devices::balloon::{Balloon, BalloonConfig};
use virtio_devices::block::Block;
use virtio_devices::console::Console;
use virtio_devices::mem::{Mem, MemConfig};
use virtio_devices::rate_limiter::RateLimits;
use virtio_devices::rng::Rng;
use virtio_devices::testing::{TestGuest, disk_config, workers};
use virtio_devices::vsock::Vsock;
use virtio_devices::watchdog::{self, Watchdog};
use virtio_devices::{BAR_LEN, Slot, VirtioDevice, VirtioPci, Workers};

fn file(name: &str, version: u16) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("tests/golden/{name}.v{version}"))
}

/// The bytes of a released version.
fn golden(name: &str, version: u16, saved: &[u8]) -> Vec<u8> {
    let path = file(name, version);
    if !path.exists() && std::env::var_os("UPDATE_GOLDEN").is_some() {
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, saved).unwrap();
    }
    fs::read(&path).unwrap()
}

fn save(device: &dyn VirtioDevice) -> Vec<u8> {
    let mut writer = Writer::default();
    device.save(&mut writer.scope("device").unwrap()).unwrap();
    writer.finish()
}

fn load(device: &mut dyn VirtioDevice, saved: &[u8]) {
    let mut store = Store::open(saved).unwrap();
    device.load(&mut store.scope("device").unwrap()).unwrap();
    store.finish().unwrap();
}

/// Saves as it did, in this version, and loads what was saved then and before.
fn check(name: &str, version: u16, make: impl FnOnce(Workers) -> Box<dyn VirtioDevice>) {
    let (_event_loop, workers) = workers();
    let mut device = make(workers);
    let saved = save(&*device);
    let golden = golden(name, version, &saved);
    for earlier in 1..version {
        load(&mut *device, &fs::read(file(name, earlier)).unwrap());
        assert!(save(&*device) == golden, "{name} goes on from {earlier}");
    }
    load(&mut *device, &golden);
    assert!(save(&*device) == golden, "{name} goes on from it as it was");
    assert!(saved == golden, "{name} is saved as it was");
}

#[test]
fn device_state_is_stable() {
    check("rng", 1, |workers| {
        Box::new(Rng::new(Path::new("/dev/urandom"), RateLimits::default(), workers).unwrap())
    });
    check("console", 1, |workers| {
        let (device, _) = Console::new(Box::new(std::io::sink()), || {}, workers);
        Box::new(device)
    });
    check("balloon", 1, |workers| {
        let config = BalloonConfig {
            size: 3 << 20,
            deflate_on_oom: true,
            free_page_reporting: true,
        };
        Box::new(Balloon::new(&config, workers).0)
    });
    check("mem", 1, |workers| {
        let ram = RamConfig {
            hotplug: true,
            ..RamConfig::anonymous(32 << 20)
        };
        let ram = Arc::new(RamBlock::new(&ram).unwrap());
        ram.plug(4 << 20, 8 << 20).unwrap();
        let config = MemConfig {
            ram,
            addr: 5 << 30,
            block_size: 2 << 20,
            node: None,
            requested: 10 << 20,
        };
        Box::new(Mem::new(config, workers, || {}).0)
    });
    check("watchdog", 1, |workers| {
        let mut device = Watchdog::new(watchdog::TIMEOUT, || {}, workers);
        let mut writer = Writer::default();
        let mut scope = writer.scope("device").unwrap();
        scope.put(&Armed { armed: true }).unwrap();
        load(&mut device, &writer.finish());
        Box::new(device)
    });
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("vsock");
    check("vsock", 1, |workers| {
        Box::new(Vsock::new(42, &socket, workers).unwrap())
    });
    let disk = dir.path().join("disk");
    fs::File::create(&disk).unwrap().set_len(5 << 20).unwrap();
    check("block", 2, |workers| {
        Box::new(Block::new(&disk_config(&disk), workers).unwrap().0)
    });
}

/// An armed watchdog's state.
#[derive(serde::Serialize, serde::Deserialize)]
struct Armed {
    armed: bool,
}

impl Saved for Armed {
    const VERSION: u16 = 1;
}

struct Nothing;

impl MsiTarget for Nothing {
    fn route(&self, _: &[(u16, Option<MsiMessage>)]) {}
    fn raise(&self, _: u16) {}
    fn take_pending(&self, _: u16) -> bool {
        false
    }
}

impl BarMap for Nothing {
    fn place(&self, _: RegionId, _: Option<u64>) {}
}

#[test]
fn transport_state_is_stable() {
    let guest = TestGuest::new(1 << 20);
    let (_event_loop, workers) = workers();
    let space = guest.space();
    let mut topology = guest.topology.lock();
    let mut tx = topology.begin();
    let slot = Slot {
        tx: &mut tx,
        space: space.clone(),
        bar: AddrRange::new(0xc000_0000, BAR_LEN).unwrap(),
        map: Arc::new(Nothing),
        msi: Arc::new(Nothing),
        report: Box::new(|_| {}),
    };
    let rng = Rng::new(Path::new("/dev/urandom"), RateLimits::default(), workers).unwrap();
    let device = VirtioPci::new("_rng0", Box::new(rng), slot).unwrap();
    tx.commit().unwrap();
    device.pause();
    device.write(4, &[6, 0]);
    let save = || {
        let mut writer = Writer::default();
        device.save(&mut writer.scope("_rng0").unwrap()).unwrap();
        writer.finish()
    };
    let saved = save();
    let golden = golden("virtio-pci", 2, &saved);
    for earlier in [&fs::read(file("virtio-pci", 1)).unwrap(), &golden] {
        let mut store = Store::open(earlier).unwrap();
        let mut tx = topology.begin();
        device
            .load(&mut store.scope("_rng0").unwrap(), &mut tx)
            .unwrap();
        tx.commit().unwrap();
        store.finish().unwrap();
        assert!(save() == golden);
    }
    assert!(saved == golden);
}
