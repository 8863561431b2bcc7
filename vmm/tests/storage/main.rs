//! Guests move between pools that share no image: their disks are copied while they write.

#![expect(clippy::unwrap_used, reason = "a test that goes wrong panics")]

mod bases;
mod followers;
mod mirrors;
mod snapshots;

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command as Process;
use std::sync::Arc;
use std::time::{Duration, Instant};

use control::{Migration, Registry, Request, RequestError, SnapshotOf};
use guest::{Command, DISK_PAGES, Line, Options, Workload, check_disk};
use serde_json::json;
use spec::{
    AwaitMigration, DiskStorage, MemoryMode, MigrationInfo, MigrationPhase, MirrorDisk,
    NewImageFormat, PayloadConfig, StartMigration, StorageMode, VmConfig, VmRemoveDevice,
    VmResizeDisk, VmSnapshotConfig,
};
use vmm::{Pool, PoolConfig};

const PATIENCE: Duration = Duration::from_secs(60);
const DISK_SIZE: u64 = 64 << 20;

fn qemu_img(arguments: &[&str]) {
    let run = Process::new("qemu-img").args(arguments).output().unwrap();
    let told = String::from_utf8_lossy(&run.stderr);
    assert!(run.status.success(), "{arguments:?}: {told}");
}

/// Tells whether `bytes` holds only `byte`. Compares all at once: a loop over a disk takes seconds where
/// tests are not optimised.
fn is_all(bytes: &[u8], byte: u8) -> bool {
    bytes == vec![byte; bytes.len()]
}

struct Stage {
    dir: tempfile::TempDir,
    here: Registry,
    there: Registry,
}

fn registry() -> Registry {
    registry_with(Vec::new())
}

fn registry_with(image_dirs: Vec<PathBuf>) -> Registry {
    let config = PoolConfig {
        image_dirs,
        ..PoolConfig::default()
    };
    Registry::new(Pool::start(&config).unwrap())
}

impl Stage {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("pocket"), guest::IMAGE).unwrap();
        fs::create_dir(dir.path().join("new")).unwrap();
        Self {
            dir,
            here: registry(),
            there: registry(),
        }
    }

    fn at(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn path(&self, name: &str) -> String {
        self.at(name).to_string_lossy().into_owned()
    }

    /// Images that the destination made.
    fn made(&self) -> Vec<String> {
        let entries = fs::read_dir(self.at("new")).unwrap();
        let mut names: Vec<_> = entries
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }

    /// Boots a guest that writes to a first disk of this format. A second one, qcow2, has content here and
    /// there.
    async fn boot(&self, format: &str) {
        let (disk, other) = (self.path("disk"), self.path("other"));
        qemu_img(&["create", "-q", "-f", format, &disk, "64M"]);
        qemu_img(&["create", "-q", "-f", "qcow2", &other, "1G"]);
        let writes = ["write -P 5 0 64k", "write -P 6 700M 1M", "write -z 1M 1M"];
        qemu_io(&other, &writes);
        let disks = json!([{ "path": disk }, { "path": other, "id": "other" }]);
        self.boot_on(disks).await;
    }

    /// Boots a guest that writes to the first of these disks.
    async fn boot_on(&self, disks: serde_json::Value) {
        let options = Options {
            workload: Workload::Io,
            ..Options::default()
        };
        let mut config = VmConfig::with_payload(PayloadConfig {
            kernel: Some(self.path("pocket")),
            cmdline: Some(options.to_string()),
            ..PayloadConfig::default()
        });
        config.memory.size = 64 << 20;
        let serial = json!({ "mode": "Socket", "socket": self.path("serial") });
        config.serial = serde_json::from_value(serial).unwrap();
        config.disks = serde_json::from_value(disks).unwrap();
        let name = Some("web".parse().unwrap());
        let vm = self.here.create(name, config).unwrap();
        vm.ask(Request::Boot).await.unwrap();
        self.wait_blocks(3 * DISK_PAGES as u64).await;
    }

    /// Waits until the guest has written so many more blocks; none was read back wrong.
    async fn wait_blocks(&self, more: u64) {
        self.wait_blocks_at("serial", more).await;
    }

    /// The same, of the guest whose serial port is this socket.
    async fn wait_blocks_at(&self, serial: &str, more: u64) {
        let path = self.at(serial);
        let waited = tokio::task::spawn_blocking(move || {
            let mut serial = BufReader::new(UnixStream::connect(path).unwrap());
            serial.get_ref().set_read_timeout(Some(PATIENCE)).unwrap();
            let (start, mut first) = (Instant::now(), None);
            loop {
                let (blocks, bad) = ask(&mut serial);
                assert_eq!(bad, 0, "blocks were read back wrong");
                if blocks >= *first.get_or_insert(blocks) + more {
                    return;
                }
                assert!(start.elapsed() < PATIENCE, "{blocks} blocks");
                std::thread::sleep(Duration::from_millis(5));
            }
        });
        waited.await.unwrap();
    }

    fn begin(&self, with: impl FnOnce(&mut StartMigration)) -> [Arc<dyn Migration>; 2] {
        self.begin_at(Some(self.path("new")), with)
    }

    fn begin_at(
        &self,
        storage: Option<String>,
        with: impl FnOnce(&mut StartMigration),
    ) -> [Arc<dyn Migration>; 2] {
        self.begin_between(storage, None, with)
    }

    /// Begins a migration. The VM may name paths below `allow` only, if there is a list.
    fn begin_between(
        &self,
        storage: Option<String>,
        allow: Option<Vec<String>>,
        with: impl FnOnce(&mut StartMigration),
    ) -> [Arc<dyn Migration>; 2] {
        let awaiting = AwaitMigration {
            once: true,
            storage,
            allow,
            ..AwaitMigration::at(format!("unix:{}", self.path("migration")))
        };
        let receive = self.there.receive_migration(&awaiting).unwrap();
        let mut what = StartMigration {
            storage: StorageMode::Copy,
            verify: true,
            ..StartMigration::to(receive.info().endpoint)
        };
        with(&mut what);
        let send = self.here.send_migration("web", &what).unwrap();
        [send, receive]
    }

    async fn runs_here(&self) {
        assert_eq!(self.made(), [""; 0]);
        assert!(self.there.list().is_empty());
        self.wait_blocks(2 * DISK_PAGES as u64).await;
    }
}

/// Blocks that were written and read back, and wrong ones.
fn ask(serial: &mut BufReader<UnixStream>) -> (u64, u64) {
    writeln!(serial.get_mut(), "{}", Command::Io).unwrap();
    let mut text = String::new();
    loop {
        text.clear();
        assert!(serial.read_line(&mut text).unwrap() > 0);
        if let Some(Line::Io { blocks, bad, .. }) = Line::parse(&text) {
            return (blocks, bad);
        }
    }
}

async fn over(side: &Arc<dyn Migration>) -> MigrationInfo {
    let mut over = side.over();
    let waited = tokio::time::timeout(PATIENCE, over.wait_for(|over| *over)).await;
    waited.unwrap().unwrap();
    side.info()
}

/// The requests that change the first disk.
fn changes_of_disk() -> [Request; 2] {
    let id = || "_disk0".to_owned();
    let resize = VmResizeDisk {
        id: id(),
        desired_size: 1 << 30,
    };
    [
        Request::RemoveDevice(VmRemoveDevice { id: id() }),
        Request::ResizeDisk(resize),
    ]
}

fn blocks_of(path: &Path) -> u64 {
    use std::os::unix::fs::MetadataExt;
    path.metadata().unwrap().blocks() * 512
}

#[tokio::test]
async fn disks_move_while_the_guest_writes() {
    let runs = [
        ("raw", MemoryMode::Precopy),
        ("qcow2", MemoryMode::Precopy),
        ("raw", MemoryMode::Postcopy),
        ("qcow2", MemoryMode::Postcopy),
        ("qcow2", MemoryMode::Auto),
    ];
    for (format, mode) in runs {
        let stage = Stage::new();
        stage.boot(format).await;
        let both = stage.begin(|what| what.mode = mode);
        for side in &both {
            let info = over(side).await;
            assert_eq!(info.phase, MigrationPhase::Completed, "{info:?}");
            assert_eq!(info.disk_bytes, DISK_SIZE + (1 << 30));
            assert_eq!(info.disk_remaining_bytes, 0);
        }
        let sent = both[0].info();
        println!(
            "{format}, {mode}: {:?}, {} rounds",
            sent.downtime, sent.rounds
        );
        // It writes to the new image, and to nothing else.
        let first = stage.made()[0].clone();
        assert_eq!(first, format!("web-_disk0.{format}"));
        assert_eq!(stage.made()[1], "web-other.qcow2");
        let before = fs::read(stage.at("disk")).unwrap();
        stage.wait_blocks(3 * DISK_PAGES as u64).await;
        assert!(
            fs::read(stage.at("disk")).unwrap() == before,
            "the source's image stays"
        );
        let vm = stage.there.get("web").unwrap();
        vm.ask(Request::Pause).await.unwrap();
        let (flat, from) = (stage.path("flat"), stage.path(&format!("new/{first}")));
        // Written back by the guest's machine, which has the lock.
        let config = vm.info().config;
        assert_eq!(config.disks.as_ref().unwrap()[0].path.as_ref(), Some(&from));
        vm.ask(Request::Shutdown).await.unwrap();
        qemu_img(&["convert", "-f", format, "-O", "raw", &from, &flat]);
        let disk = fs::read(&flat).unwrap();
        assert_eq!(disk.len() as u64, DISK_SIZE);
        check_disk(&disk, DISK_PAGES).unwrap();
        assert!(is_all(&disk[DISK_PAGES * 4096..], 0));
        let other = stage.path("new/web-other.qcow2");
        qemu_img(&["compare", "-q", &stage.path("other"), &other]);
        for image in stage.made() {
            let taken = blocks_of(&stage.at("new").join(&image));
            assert!(taken < 8 << 20, "{image} takes {taken} bytes");
        }
        if format == "qcow2" {
            qemu_img(&["check", "-q", &from]);
        }
        qemu_img(&["check", "-q", &other]);
    }
}

fn can_write(image: &str, format: &str) -> bool {
    let run = Process::new("qemu-io")
        .args(["-f", format, "-c", "write 60M 512", image])
        .output();
    run.unwrap().status.success()
}

fn qemu_io(image: &str, commands: &[&str]) {
    for command in commands {
        let run = Process::new("qemu-io")
            .args(["-c", command, image])
            .output();
        assert!(run.unwrap().status.success(), "{command}");
    }
}

/// An image that a VM left is not written over, nor written to, when the VM comes back.
#[tokio::test]
async fn vm_moves_away_and_back() {
    let mut stage = Stage::new();
    stage.boot("raw").await;
    fs::create_dir(stage.at("back")).unwrap();
    let moves = [
        ("new", "web-_disk0.raw"),
        ("back", "web-_disk0.raw"),
        ("new", "web-_disk0-2.raw"),
    ];
    let mut left = stage.at("disk");
    for (storage, image) in moves {
        let both = stage.begin_at(Some(stage.path(storage)), |_| {});
        for side in &both {
            let info = over(side).await;
            assert_eq!(info.phase, MigrationPhase::Completed, "{info:?}");
        }
        std::mem::swap(&mut stage.here, &mut stage.there);
        let vm = stage.here.get("web").unwrap();
        let named = vm.info().config.disks.as_ref().unwrap()[0].path.clone();
        let now = stage.at(&format!("{storage}/{image}"));
        assert_eq!(named.as_deref(), now.to_str());
        let before = fs::read(&left).unwrap();
        stage.wait_blocks(2 * DISK_PAGES as u64).await;
        assert!(fs::read(&left).unwrap() == before, "{}", left.display());
        check_disk(&before, DISK_PAGES).unwrap();
        left = now;
    }
    let vm = stage.here.get("web").unwrap();
    vm.ask(Request::Shutdown).await.unwrap();
    check_disk(&fs::read(&left).unwrap(), DISK_PAGES).unwrap();
    let (first, last) = (stage.path("other"), stage.path("new/web-other-2.qcow2"));
    qemu_img(&["compare", "-q", &first, &last]);
}

/// A disk can stay where it is, while others are copied.
#[tokio::test]
async fn disks_are_chosen_by_name() {
    let stage = Stage::new();
    stage.boot("raw").await;
    let both = stage.begin(|what| {
        what.storage = StorageMode::Shared;
        what.disks = Some(vec![DiskStorage {
            id: "other".to_owned(),
            storage: StorageMode::Copy,
            name: Some("data.img".to_owned()),
        }]);
    });
    for side in &both {
        let info = over(side).await;
        assert_eq!(info.phase, MigrationPhase::Completed, "{info:?}");
        assert_eq!(info.disk_bytes, 1 << 30);
    }
    assert_eq!(stage.made(), ["data.img"]);
    let vm = stage.there.get("web").unwrap();
    let disks = vm.info().config.disks.unwrap();
    assert_eq!(disks[1].path, Some(stage.path("new/data.img")));
    assert_eq!(disks[0].path, Some(stage.path("disk")));
    stage.wait_blocks(2 * DISK_PAGES as u64).await;
    vm.ask(Request::Shutdown).await.unwrap();
    check_disk(&fs::read(stage.at("disk")).unwrap(), DISK_PAGES).unwrap();
}

/// The next machine has the image, though the last one's was being copied.
#[tokio::test]
async fn guest_is_reset_while_its_disks_are_copied() {
    for (format, by_guest) in [("raw", true), ("qcow2", false)] {
        let stage = Stage::new();
        stage.boot(format).await;
        let both = stage.begin(|what| what.max_bandwidth = Some(8 << 20));
        let start = Instant::now();
        while both[1].info().sent_bytes == 0 {
            assert!(start.elapsed() < PATIENCE, "{:?}", both[0].info());
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
        let vm = stage.here.get("web").unwrap();
        if by_guest {
            let mut serial = UnixStream::connect(stage.at("serial")).unwrap();
            writeln!(serial, "{}", Command::Reset).unwrap();
        } else {
            vm.ask(Request::Reboot).await.unwrap();
        }
        let code = if by_guest { "guest-reset" } else { "canceled" };
        for side in &both {
            let info = over(side).await;
            let is_failed = info.phase == MigrationPhase::Failed;
            assert_eq!(
                (is_failed, info.error.unwrap().code.as_str()),
                (by_guest, code)
            );
        }
        stage.runs_here().await;
        assert_eq!(vm.status().failure, None);
        vm.ask(Request::Shutdown).await.unwrap();
    }
}

#[tokio::test]
async fn a_move_that_fails_leaves_no_image_and_the_guest_on_its_own() {
    let stage = Stage::new();
    stage.boot("qcow2").await;
    // No directory for images, and one that has the name already.
    let both = stage.begin_at(None, |_| {});
    for side in &both {
        let info = over(side).await;
        assert_eq!(info.phase, MigrationPhase::Failed);
        assert_eq!(info.error.unwrap().code, "no-storage");
    }
    stage.runs_here().await;
    let taken = stage.at("new/taken");
    fs::write(&taken, "mine").unwrap();
    let both = stage.begin(|what| {
        what.disks = Some(vec![DiskStorage {
            id: "other".to_owned(),
            storage: StorageMode::Copy,
            name: Some("taken".to_owned()),
        }]);
    });
    for side in &both {
        assert_eq!(over(side).await.error.unwrap().code, "image-exists");
    }
    assert_eq!(stage.made(), ["taken"]);
    assert_eq!(fs::read(&taken).unwrap(), b"mine");
    fs::remove_file(&taken).unwrap();
    stage.runs_here().await;
    // Called off while disks are copied, at either side.
    for canceled in 0..2 {
        let both = stage.begin(|what| what.max_bandwidth = Some(1 << 20));
        let start = Instant::now();
        while both[1].info().sent_bytes == 0 {
            assert!(start.elapsed() < PATIENCE, "{:?}", both[0].info());
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
        // Two images and their markers.
        assert_eq!(stage.made().len(), 4);
        assert!(both[0].info().disk_remaining_bytes > 0);
        both[canceled].cancel().unwrap();
        for side in &both {
            assert_eq!(over(side).await.phase, MigrationPhase::Canceled);
        }
        stage.runs_here().await;
    }
    // What it wrote meanwhile is whole.
    let vm = stage.here.get("web").unwrap();
    vm.ask(Request::Shutdown).await.unwrap();
    qemu_img(&["check", "-q", &stage.path("disk")]);
    let flat = stage.path("flat");
    qemu_img(&[
        "convert",
        "-f",
        "qcow2",
        "-O",
        "raw",
        &stage.path("disk"),
        &flat,
    ]);
    check_disk(&fs::read(flat).unwrap(), DISK_PAGES).unwrap();
}
