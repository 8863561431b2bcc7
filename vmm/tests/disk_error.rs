//! A disk of the pocket guest at whose requests the host fails, and a VM that is paused for it. Wants
//! CAP_SYS_ADMIN, for a file system that is full.

#![expect(clippy::unwrap_used, reason = "a test that goes wrong panics")]

use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::Command;
use std::time::{Duration, Instant};

use control::{Registry, Request, VmHandle};
use guest::{Line, Options, Workload};
use spec::{
    AwaitMigration, MemoryMode, MigrationPhase, PayloadConfig, StartMigration, VmConfig,
    VmRemoveDevice, VmState,
};
use vmm::{Pool, PoolConfig};

const PATIENCE: Duration = Duration::from_secs(30);
const DISK: u64 = 1 << 20;
/// Bytes a second, of a guest whose pages are empty but for a few.
const SLOWLY: u64 = 1 << 20;

/// Files of a VM, with its disk on a file system of its own that has less room than the disk.
struct Lab {
    dir: tempfile::TempDir,
    registry: Registry,
}

fn registry() -> Registry {
    Registry::new(Pool::start(&PoolConfig::default()).unwrap())
}

impl Lab {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("pocket"), guest::IMAGE).unwrap();
        let small = dir.path().join("small");
        std::fs::create_dir(&small).unwrap();
        let mut mount = Command::new("mount");
        let run = mount.args(["-t", "tmpfs", "-o", "size=2m", "whimbrel-test"]);
        let run = run.arg(&small).output().unwrap();
        let told = String::from_utf8_lossy(&run.stderr).into_owned();
        assert!(run.status.success(), "mount: {told}");
        let lab = Self {
            dir,
            registry: registry(),
        };
        let disk = File::create(lab.path("small/disk")).unwrap();
        disk.set_len(DISK).unwrap();
        lab
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Leaves no room.
    fn fill(&self) {
        let mut file = File::create(self.path("small/filler")).unwrap();
        while file.write_all(&[1; 4096]).is_ok() {}
    }

    fn make_room(&self) {
        std::fs::remove_file(self.path("small/filler")).unwrap();
    }

    fn create(&self) -> VmHandle {
        let options = Options {
            workload: Workload::Io,
            ..Options::default()
        };
        let mut config = VmConfig::with_payload(PayloadConfig {
            kernel: Some(self.path("pocket").to_string_lossy().into_owned()),
            cmdline: Some(options.to_string()),
            ..PayloadConfig::default()
        });
        config.memory.size = 64 << 20;
        let serial = serde_json::json!({ "mode": "Socket", "socket": self.path("serial") });
        config.serial = serde_json::from_value(serial).unwrap();
        let disks = serde_json::json!([{
            "id": "data", "path": self.path("small/disk"), "image_type": "Raw", "on_error": "Pause",
        }]);
        config.disks = Some(serde_json::from_value(disks).unwrap());
        self.registry.create(None, config).unwrap()
    }

    /// Returns the disk errors among the events.
    fn errors(&self) -> Vec<String> {
        let (events, _) = self.registry.events().after(0, None);
        let errors = events
            .into_iter()
            .filter(|event| event.event == "disk-error");
        errors.filter_map(|event| event.detail).collect()
    }

    /// Waits until the VM has been paused so often for its disk.
    async fn wait_paused(&self, vm: &VmHandle, times: usize) {
        let start = Instant::now();
        while self.errors().len() < times || vm.status().state != VmState::Paused {
            let state = vm.status().state;
            assert!(start.elapsed() < PATIENCE, "{state:?}, {:?}", self.errors());
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
        let errors = self.errors();
        assert_eq!(errors.len(), times, "{errors:?}");
        let last = errors.last().unwrap();
        assert!(
            last.starts_with("data: to write 4096 bytes at ") && last.contains("No space left"),
            "{last}"
        );
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        let small = self.path("small");
        let _ = Command::new("umount").arg("-l").arg(small).status();
    }
}

/// How many pages the guest has written and read, and what went wrong.
fn ask(serial: &mut BufReader<UnixStream>) -> (u64, u64) {
    let request = format!("{}\n", guest::Command::Io);
    serial.get_mut().write_all(request.as_bytes()).unwrap();
    let mut text = String::new();
    loop {
        text.clear();
        assert!(serial.read_line(&mut text).unwrap() > 0);
        if let Some(Line::Io { blocks, bad, .. }) = Line::parse(&text) {
            return (blocks, bad);
        }
    }
}

/// Until the guest has written and read its disk twice.
async fn goes_on(lab: &Lab) {
    let serial = UnixStream::connect(lab.path("serial")).unwrap();
    serial.set_read_timeout(Some(PATIENCE)).unwrap();
    let mut serial = BufReader::new(serial);
    let start = Instant::now();
    loop {
        let (blocks, bad) = ask(&mut serial);
        assert_eq!(bad, 0, "after {blocks} blocks");
        if blocks > 2 * (DISK >> 12) {
            break;
        }
        assert!(start.elapsed() < PATIENCE, "{blocks} blocks");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

#[tokio::test]
async fn full_disk_pauses_vm() {
    let lab = Lab::new();
    lab.fill();
    let vm = lab.create();
    vm.ask(Request::Boot).await.unwrap();
    lab.wait_paused(&vm, 1).await;
    // The file system is still full.
    for times in 2..5 {
        vm.ask(Request::Resume).await.unwrap();
        lab.wait_paused(&vm, times).await;
    }
    lab.make_room();
    vm.ask(Request::Resume).await.unwrap();
    goes_on(&lab).await;
    assert_eq!(vm.status().state, VmState::Running);
    assert_eq!(lab.errors().len(), 4);
    vm.ask(Request::Delete).await.unwrap();
}

/// A VM that is paused for its disk ends as any other, and so does its machine.
#[tokio::test]
async fn vm_paused_for_disk_can_reset() {
    let lab = Lab::new();
    lab.fill();
    let vm = lab.create();
    vm.ask(Request::Boot).await.unwrap();
    lab.wait_paused(&vm, 1).await;
    let id = "data".to_owned();
    vm.ask(Request::RemoveDevice(VmRemoveDevice { id }))
        .await
        .unwrap();
    // The pocket guest does not let go of it, but it is not there at the next boot.
    vm.ask(Request::Resume).await.unwrap();
    lab.wait_paused(&vm, 2).await;
    vm.ask(Request::Reboot).await.unwrap();
    assert_eq!(vm.status().state, VmState::Running);
    vm.ask(Request::Delete).await.unwrap();
    for end in [Request::Shutdown, Request::Delete] {
        let before = lab.errors().len();
        let vm = lab.create();
        vm.ask(Request::Boot).await.unwrap();
        lab.wait_paused(&vm, before + 1).await;
        vm.ask(end).await.unwrap();
    }
}

/// In postcopy the disk fails again while the guest's memory is still arriving.
#[tokio::test]
async fn kept_requests_migrate() {
    for mode in [MemoryMode::Precopy, MemoryMode::Postcopy] {
        let mut lab = Lab::new();
        lab.fill();
        let vm = lab.create();
        let id = vm.id().clone();
        vm.ask(Request::Boot).await.unwrap();
        lab.wait_paused(&vm, 1).await;
        let there = registry();
        let listen = format!("unix:{}", lab.path("migration").display());
        let receive = there.receive_migration(&AwaitMigration::at(listen));
        let receive = receive.unwrap();
        let mut to = StartMigration::to(receive.info().endpoint);
        to.mode = mode;
        if mode == MemoryMode::Postcopy {
            to.max_bandwidth = Some(SLOWLY);
        }
        let send = lab.registry.send_migration(id.as_str(), &to).unwrap();
        let start = Instant::now();
        let arrived = loop {
            if let Ok(vm) = there.get(id.as_str())
                && vm.status().arrival.is_some()
            {
                break vm;
            }
            assert!(start.elapsed() < PATIENCE, "{:?}", send.info());
            tokio::time::sleep(Duration::from_millis(1)).await;
        };
        assert_eq!(arrived.status().state, VmState::Paused);
        arrived.ask(Request::Resume).await.unwrap();
        for side in [send, receive] {
            let mut over = side.over();
            let waited = tokio::time::timeout(PATIENCE, over.wait_for(|over| *over)).await;
            waited.unwrap().unwrap();
            let told = side.info();
            assert_eq!(told.phase, MigrationPhase::Completed, "{told:?}");
        }
        lab.registry = there;
        lab.wait_paused(&arrived, 1).await;
        lab.make_room();
        arrived.ask(Request::Resume).await.unwrap();
        goes_on(&lab).await;
        assert_eq!(lab.errors().len(), 1);
    }
}
