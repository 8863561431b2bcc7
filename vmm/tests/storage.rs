//! Guests move between pools that share no image: their disks are copied while they write.

#![expect(clippy::unwrap_used, reason = "a test that goes wrong panics")]

#[path = "storage/followers.rs"]
mod followers;
#[path = "storage/snapshots.rs"]
mod snapshots;

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command as Process;
use std::sync::Arc;
use std::time::{Duration, Instant};

use control::{Migration, Registry, Request, RequestError, SnapshotOf};
use guest::{Command, Line, Options, Workload, check_disk};
use serde_json::json;
use spec::{
    AwaitMigration, DiskStorage, MemoryMode, MigrationInfo, MigrationPhase, MirrorDisk,
    NewImageFormat, PayloadConfig, StartMigration, StorageMode, VmConfig, VmRemoveDevice,
    VmResizeDisk, VmSnapshotConfig,
};
use vmm::{Pool, PoolConfig};

const PATIENCE: Duration = Duration::from_secs(60);
/// Pages that the guest writes, at the start of its disk.
const DISK_PAGES: usize = 256;
const DISK_SIZE: u64 = 64 << 20;

fn qemu_img(arguments: &[&str]) {
    let run = Process::new("qemu-img").args(arguments).output().unwrap();
    let told = String::from_utf8_lossy(&run.stderr);
    assert!(run.status.success(), "{arguments:?}: {told}");
}

struct Stage {
    dir: tempfile::TempDir,
    here: Registry,
    there: Registry,
}

fn registry() -> Registry {
    Registry::new(Pool::start(&PoolConfig::default()).unwrap())
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
        for write in writes {
            let run = Process::new("qemu-io").args(["-c", write, &other]).output();
            assert!(run.unwrap().status.success());
        }
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
        let disks = json!([{ "path": disk }, { "path": other, "id": "other" }]);
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
        let awaiting = AwaitMigration {
            once: true,
            storage,
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
        assert!(disk[DISK_PAGES * 4096..].iter().all(|byte| *byte == 0));
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
        for side in &both {
            assert_ne!(over(side).await.phase, MigrationPhase::Completed);
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

impl Stage {
    fn mirror(
        &self,
        name: &str,
        with: impl FnOnce(&mut MirrorDisk),
    ) -> Result<Arc<dyn Migration>, RequestError> {
        let mut what = MirrorDisk::at(self.path(&format!("new/{name}")));
        with(&mut what);
        self.here.mirror_disk("web", "_disk0", &what)
    }

    /// Begins one that takes minutes, and waits until it has copied something.
    async fn slow_mirror(&self, name: &str) -> Arc<dyn Migration> {
        let mirror = self.mirror(name, |what| what.max_bandwidth = Some(64 << 10));
        let mirror = mirror.unwrap();
        let start = Instant::now();
        while mirror.info().sent_bytes == 0 {
            assert!(start.elapsed() < PATIENCE, "{:?}", mirror.info());
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
        let [partial, marker] = ["partial", "partial.incoming"].map(|end| format!("{name}.{end}"));
        assert_eq!(self.made(), [partial, marker]);
        mirror
    }

    fn events(&self, named: &str) -> Vec<String> {
        let (events, _) = self.here.events().after(0, None);
        let of = events.into_iter().filter(|event| event.event == named);
        of.map(|event| event.detail.unwrap_or_default()).collect()
    }
}

fn can_write(image: &str, format: &str) -> bool {
    let run = Process::new("qemu-io")
        .args(["-f", format, "-c", "write 60M 512", image])
        .output();
    run.unwrap().status.success()
}

/// The guest writes while its disk is copied, and goes on at the new image: no block is lost.
#[tokio::test]
async fn disk_continues_on_its_mirror_while_the_guest_writes() {
    let [raw, qcow2] = [
        ("raw", NewImageFormat::Raw),
        ("qcow2", NewImageFormat::Qcow2),
    ];
    for [from, to] in [[raw, qcow2], [qcow2, raw]] {
        let stage = Stage::new();
        stage.boot(from.0).await;
        // Fast enough for the guest, and slow enough for some of its rounds.
        let mirror = stage.mirror("mirror", |what| {
            (what.format, what.max_bandwidth) = (Some(to.1), Some(32 << 20));
        });
        let mirror = mirror.unwrap();
        let info = over(&mirror).await;
        assert_eq!(info.phase, MigrationPhase::Completed, "{info:?}");
        println!(
            "{} to {}: {:?}, {} rounds",
            from.0, to.0, info.downtime, info.rounds
        );
        assert_eq!(info.disk.as_deref(), Some("_disk0"));
        assert_eq!((info.disk_bytes, info.disk_remaining_bytes), (DISK_SIZE, 0));
        assert_eq!(stage.made(), ["mirror"]);
        let vm = stage.here.get("web").unwrap();
        let new = stage.path("new/mirror");
        let named = || vm.info().config.disks.as_ref().unwrap()[0].clone();
        assert_eq!(named().path.as_ref(), Some(&new));
        assert_eq!(stage.events("disk-mirrored"), [format!("_disk0 to {new}")]);
        // The old image is closed, and has what the disk had.
        let old = stage.path("disk");
        let flat = stage.path("flat");
        qemu_img(&["convert", "-f", from.0, "-O", "raw", &old, &flat]);
        check_disk(&fs::read(&flat).unwrap(), DISK_PAGES).unwrap();
        stage.wait_blocks(3 * DISK_PAGES as u64).await;
        let first = fs::read(&flat).unwrap();
        qemu_img(&["convert", "-f", from.0, "-O", "raw", &old, &flat]);
        assert!(fs::read(&flat).unwrap() == first, "nothing writes to it");
        assert!(can_write(&old, from.0) && !can_write(&new, to.0));
        // The next machine has the new image.
        vm.ask(Request::Reboot).await.unwrap();
        stage.wait_blocks(2 * DISK_PAGES as u64).await;
        vm.ask(Request::Shutdown).await.unwrap();
        qemu_img(&["convert", "-f", to.0, "-O", "raw", &new, &flat]);
        let disk = fs::read(&flat).unwrap();
        assert_eq!(disk.len() as u64, DISK_SIZE);
        check_disk(&disk, DISK_PAGES).unwrap();
        assert!(disk[DISK_PAGES * 4096..].iter().all(|byte| *byte == 0));
        assert!(blocks_of(Path::new(&new)) < 8 << 20, "it is sparse");
        assert!(can_write(&new, to.0));
    }
}

/// A mirror that is called off, by a client or by the end of its machine, leaves the disk as it was and no
/// image.
#[tokio::test]
async fn mirror_that_ends_early_leaves_the_disk() {
    let stage = Stage::new();
    stage.boot("qcow2").await;
    let vm = stage.here.get("web").unwrap();
    let canceled = |info: &MigrationInfo| info.phase == MigrationPhase::Canceled;
    let mirror = stage.slow_mirror("mirror").await;
    mirror.cancel().unwrap();
    assert!(canceled(&over(&mirror).await));
    stage.runs_here().await;
    let mirror = stage.slow_mirror("mirror").await;
    let mut serial = UnixStream::connect(stage.at("serial")).unwrap();
    writeln!(serial, "{}", Command::Reset).unwrap();
    drop(serial);
    assert!(canceled(&over(&mirror).await));
    stage.runs_here().await;
    for request in [Request::Shutdown, Request::Delete] {
        let mirror = stage.slow_mirror("mirror").await;
        let deleted = request == Request::Delete;
        match deleted {
            true => stage.here.delete("web").await.unwrap(),
            false => drop(vm.ask(request).await.unwrap()),
        }
        assert!(canceled(&over(&mirror).await));
        assert_eq!(stage.made(), [""; 0]);
        if !deleted {
            vm.ask(Request::Boot).await.unwrap();
            stage.wait_blocks(2 * DISK_PAGES as u64).await;
        }
    }
    // A VM that is deleted has no further events.
    let [begun, failed] =
        ["disk-mirroring", "disk-mirror-failed"].map(|event| stage.events(event).len());
    assert_eq!((begun, failed), (4, 3));
    qemu_img(&["check", "-q", &stage.path("disk")]);
}

/// A mirror and what else concerns its disk exclude each other, by name.
#[tokio::test]
async fn mirror_excludes_other_uses_of_its_disk() {
    let stage = Stage::new();
    stage.boot("raw").await;
    let vm = stage.here.get("web").unwrap();
    let code = |refused: Result<_, RequestError>| match refused {
        Ok::<Arc<dyn Migration>, _>(_) => "begun".to_owned(),
        Err(error) => error.code,
    };
    // What is there stays.
    for (there, name) in [("mirror", "mirror"), ("mirror.partial", "mirror")] {
        let there = stage.at(&format!("new/{there}"));
        fs::write(&there, "mine").unwrap();
        assert_eq!(code(stage.mirror(name, |_| {})), "image-exists");
        assert_eq!(fs::read(&there).unwrap(), b"mine");
        fs::remove_file(there).unwrap();
    }
    // Also beside the marker of a service that ran before the host was started.
    let [partial, marker] = ["mirror.partial", "mirror.partial.incoming"]
        .map(|name| stage.at(&format!("new/{name}")));
    let boot = fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap();
    let mark = |boot: &str| {
        fs::write(&partial, "of a killed service").unwrap();
        let title = "whimbrel: the guest of this image has not come; boot ";
        fs::write(&marker, format!("{title}{boot}\n")).unwrap();
    };
    mark("another");
    assert_eq!(code(stage.mirror("mirror", |_| {})), "image-exists");
    assert!(partial.exists() && marker.exists());
    // What a service left that was killed in this boot of the host is replaced.
    mark(boot.trim());
    stage.slow_mirror("mirror").await.cancel().unwrap();
    let start = Instant::now();
    while !stage.made().is_empty() {
        assert!(start.elapsed() < PATIENCE, "{:?}", stage.made());
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
    let elsewhere = stage.mirror("none/mirror", |_| {});
    assert_eq!(code(elsewhere), "storage-unusable");
    for path in ["relative", "/", "/tmp/"] {
        let refused = stage.mirror("", |what| what.path = path.to_owned());
        assert_eq!(code(refused), "invalid-configuration", "{path}");
    }
    let other = MirrorDisk::at(stage.path("new/mirror"));
    let none = stage.here.mirror_disk("web", "none", &other);
    assert_eq!(code(none), "no-such-disk");

    let mirror = stage.slow_mirror("mirror").await;
    assert_eq!(code(stage.mirror("second", |_| {})), "disk-mirroring");
    let id = || "_disk0".to_owned();
    let removal = Request::RemoveDevice(VmRemoveDevice { id: id() });
    let resize = Request::ResizeDisk(VmResizeDisk {
        id: id(),
        desired_size: 1 << 30,
    });
    for request in [removal, resize] {
        let refused = vm.ask(request).await.unwrap_err();
        assert_eq!(refused.code, "disk-mirroring");
        assert!(refused.detail.contains(&mirror.info().id), "{refused}");
    }
    let snapshot = VmSnapshotConfig::to(format!("file://{}", stage.path("snapshot")));
    let snapshot = || {
        let of = SnapshotOf::PausedOrRunning;
        stage.here.take_snapshot("web", &snapshot, of)
    };
    assert_eq!(code(snapshot()), "disk-mirroring");
    let what = StartMigration::to(format!("unix:{}", stage.path("migration")));
    let send = || stage.here.send_migration("web", &what);
    assert_eq!(code(send()), "disk-mirroring");
    // Another disk is another matter, also while the guest is paused.
    vm.ask(Request::Pause).await.unwrap();
    let beside = stage
        .here
        .mirror_disk("web", "other", &MirrorDisk::at(stage.path("other-2")));
    let info = over(&beside.unwrap()).await;
    assert_eq!(info.phase, MigrationPhase::Completed, "{info:?}");
    vm.ask(Request::Resume).await.unwrap();
    mirror.cancel().unwrap();
    over(&mirror).await;
    stage.runs_here().await;

    // And the reverse.
    let both = stage.begin(|what| what.max_bandwidth = Some(64 << 10));
    assert_eq!(code(stage.mirror("mirror", |_| {})), "vm-migrating");
    both[0].cancel().unwrap();
    over(&both[0]).await;
    // It may not have heard of its source yet, and would wait for another.
    let _ = both[1].cancel();
    over(&both[1]).await;
    vm.ask(Request::Shutdown).await.unwrap();
    assert_eq!(code(stage.mirror("mirror", |_| {})), "wrong-state");
    qemu_img(&[
        "compare",
        "-q",
        &stage.path("other"),
        &stage.path("other-2"),
    ]);
    check_disk(&fs::read(stage.at("disk")).unwrap(), DISK_PAGES).unwrap();
}
