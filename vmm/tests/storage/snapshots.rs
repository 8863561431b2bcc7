//! Snapshots with copies of the disks that the guest writes.

use spec::{ForkVm, MemoryRestoreMode, RestoreConfig, SnapshotDisks, VmId};

use super::*;

impl Stage {
    fn snapshot_with(
        &self,
        name: &str,
        with: impl FnOnce(&mut VmSnapshotConfig),
    ) -> Result<Arc<dyn Migration>, RequestError> {
        let mut what = VmSnapshotConfig {
            disks: SnapshotDisks::Copy,
            ..VmSnapshotConfig::to(format!("file://{}", self.path(name)))
        };
        with(&mut what);
        let of = SnapshotOf::PausedOrRunning;
        self.here.take_snapshot("web", &what, of)
    }

    /// Begins a snapshot that takes minutes, and waits until it has copied something.
    async fn slow_snapshot(&self, name: &str) -> Arc<dyn Migration> {
        let snapshot = self.snapshot_with(name, |what| what.max_bandwidth = Some(16 << 10));
        let snapshot = snapshot.unwrap();
        let start = Instant::now();
        while snapshot.info().sent_bytes == 0 {
            assert!(start.elapsed() < PATIENCE, "{:?}", snapshot.info());
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
        snapshot
    }

    /// Restores a guest beside the first, and waits until it has written its disk once more.
    async fn restores(&self, name: &str, vm: &str, mode: MemoryRestoreMode) {
        let serial = self.path(&format!("{vm}.serial"));
        let overrides = json!({ "serial": { "mode": "Socket", "socket": serial } });
        let what = RestoreConfig {
            source_url: format!("file://{}", self.path(name)),
            prefault: false,
            memory_restore_mode: mode,
            resume: true,
            zone_updates: None,
            net_fds: None,
            verify: mode == MemoryRestoreMode::Map,
            overrides: Some(serde_json::from_value(overrides).unwrap()),
            count: None,
        };
        let vm: VmId = vm.parse().unwrap();
        let info = over(&self.there.restore(&vm, &what).unwrap()).await;
        assert_eq!(info.phase, MigrationPhase::Completed, "{info:?}");
        self.wait_blocks_at(&format!("{vm}.serial"), 2 * DISK_PAGES as u64)
            .await;
    }
}

/// The guest writes to its disk, and each block to be of the moment of its memory. One snapshot is restored
/// in each mode, while nothing writes to its copies.
#[tokio::test]
async fn copied_disks_are_restored_in_each_mode() {
    for (format, is_paused) in [("raw", true), ("qcow2", false)] {
        let stage = Stage::new();
        stage.boot(format).await;
        let vm = stage.here.get("web").unwrap();
        let before = vm.info().config;
        if is_paused {
            vm.ask(Request::Pause).await.unwrap();
        }
        let info = over(&stage.snapshot_with("s", |_| {}).unwrap()).await;
        assert_eq!(info.phase, MigrationPhase::Completed, "{info:?}");
        assert_eq!(info.disk_bytes, DISK_SIZE + (1 << 30));
        assert_eq!((info.disk_remaining_bytes, info.remaining_pages), (0, 0));
        if is_paused {
            vm.ask(Request::Resume).await.unwrap();
        } else {
            println!("{format}: {:?}, {} rounds", info.downtime, info.rounds);
        }
        assert_eq!(vm.info().config, before, "the VM has its images");
        stage.wait_blocks(2 * DISK_PAGES as u64).await;

        let copies = ["s/disk-0.raw", "s/disk-1.raw"].map(|name| stage.at(name));
        let disk = fs::read(&copies[0]).unwrap();
        assert_eq!(disk.len() as u64, DISK_SIZE);
        check_disk(&disk, DISK_PAGES).unwrap();
        assert!(is_all(&disk[DISK_PAGES * 4096..], 0));
        let (other, copy) = (stage.path("other"), stage.path("s/disk-1.raw"));
        vm.ask(Request::Shutdown).await.unwrap();
        qemu_img(&["compare", "-q", "-F", "raw", &other, &copy]);
        for copy in &copies {
            let taken = blocks_of(copy);
            assert!(taken < 8 << 20, "{} takes {taken} bytes", copy.display());
        }
        // Whatever becomes of the images of the VM.
        for name in ["disk", "other"] {
            fs::remove_file(stage.at(name)).unwrap();
        }
        for (vm, mode) in [
            ("copy", MemoryRestoreMode::Copy),
            ("ondemand", MemoryRestoreMode::OnDemand),
            ("map", MemoryRestoreMode::Map),
        ] {
            stage.restores("s", vm, mode).await;
            let disks = stage.there.get(vm).unwrap().info().config.disks.unwrap();
            let path = disks[0].path.clone().unwrap();
            let start = stage.path(&format!("s/disk-0.raw.overlay-{vm}-"));
            assert!(path.starts_with(&start), "{path}");
        }
        assert!(fs::read(&copies[0]).unwrap() == disk, "nothing wrote to it");
    }
}

#[tokio::test]
async fn canceled_and_overtaken_copies_leave_nothing() {
    let stage = Stage::new();
    stage.boot("qcow2").await;
    let vm = stage.here.get("web").unwrap();
    let canceled = stage.slow_snapshot("s").await;
    canceled.cancel().unwrap();
    assert_eq!(over(&canceled).await.phase, MigrationPhase::Canceled);
    assert!(!stage.at("s").exists());
    stage.runs_here().await;
    // The guest writes faster than its disk is copied.
    let late = stage.snapshot_with("s", |what| {
        what.max_bandwidth = Some(16 << 10);
        what.deadline_s = Some(1);
    });
    let info = over(&late.unwrap()).await;
    assert_eq!(info.error.unwrap().code, "does-not-converge");
    assert!(!stage.at("s").exists());
    stage.runs_here().await;
    // The next machine has the images, though they were being copied.
    let snapshot = stage.slow_snapshot("s").await;
    let mut serial = UnixStream::connect(stage.at("serial")).unwrap();
    writeln!(serial, "{}", Command::Reset).unwrap();
    drop(serial);
    let info = over(&snapshot).await;
    assert_eq!(info.phase, MigrationPhase::Failed, "{info:?}");
    assert_eq!(info.error.unwrap().code, "guest-reset");
    assert!(!stage.at("s").exists());
    stage.runs_here().await;
    for request in [Request::Reboot, Request::Shutdown] {
        let snapshot = stage.slow_snapshot("s").await;
        vm.ask(request).await.unwrap();
        assert_ne!(over(&snapshot).await.phase, MigrationPhase::Completed);
        assert!(!stage.at("s").exists());
    }
    vm.ask(Request::Boot).await.unwrap();
    stage.runs_here().await;
}

/// One operation at a time reads the blocks that the guest writes.
#[tokio::test]
async fn copies_of_disks_exclude_what_they_must() {
    let stage = Stage::new();
    stage.boot("raw").await;
    let vm = stage.here.get("web").unwrap();
    let copied = |outcome: Result<Arc<dyn Migration>, RequestError>| outcome.err().unwrap();
    for (field, zero) in [
        ("max_downtime_ms", true),
        ("deadline_s", false),
        ("max_bandwidth", true),
    ] {
        let refused = copied(stage.snapshot_with("s", |what| {
            let value = Some(if zero { 0 } else { 1 });
            match field {
                "max_downtime_ms" => what.max_downtime_ms = value,
                "deadline_s" => what.deadline_s = value,
                _ => what.max_bandwidth = value,
            }
            if !zero {
                what.disks = SnapshotDisks::Overlay;
            }
        }));
        assert_eq!(refused.code, "invalid-configuration");
        assert!(refused.fields[0].detail.contains(field), "{refused:?}");
    }
    let fork = ForkVm {
        disks: SnapshotDisks::Copy,
        ..ForkVm::default()
    };
    assert_eq!(copied(stage.here.fork("web", &fork)).code, "not-supported");

    let snapshot = stage.slow_snapshot("s").await;
    let what = StartMigration::to(format!("unix:{}", stage.path("migration")));
    let refused = [
        stage.here.send_migration("web", &what),
        stage.mirror("mirror", |_| {}),
        stage.snapshot_with("second", |_| {}),
    ];
    for refused in refused {
        let refused = copied(refused);
        assert_eq!(refused.code, "vm-migrating");
        assert!(
            refused.detail.contains("a snapshot of the VM"),
            "{refused:?}"
        );
    }
    for request in changes_of_disk() {
        let refused = vm.ask(request).await.unwrap_err();
        assert_eq!(refused.code, "vm-migrating", "{refused:?}");
        assert!(
            refused.detail.contains("a snapshot of the VM"),
            "{refused:?}"
        );
    }
    snapshot.cancel().unwrap();
    over(&snapshot).await;

    // And the reverse.
    let mirror = stage.slow_mirror("mirror").await;
    assert_eq!(
        copied(stage.snapshot_with("s", |_| {})).code,
        "disk-mirroring"
    );
    mirror.cancel().unwrap();
    over(&mirror).await;
    let both = stage.begin(|what| what.max_bandwidth = Some(16 << 10));
    assert_eq!(
        copied(stage.snapshot_with("s", |_| {})).code,
        "vm-migrating"
    );
    both[0].cancel().unwrap();
    over(&both[0]).await;
    let _ = both[1].cancel();
    over(&both[1]).await;
    assert!(!stage.at("s").exists());
    stage.runs_here().await;
}

/// A copy that differs from its hash, or lies outside of the folder, is refused before there is a VM.
#[tokio::test]
async fn damaged_copies_are_refused() {
    use std::os::unix::fs::FileExt as _;
    let stage = Stage::new();
    stage.boot("raw").await;
    let info = over(&stage.snapshot_with("s", |_| {}).unwrap()).await;
    assert_eq!(info.phase, MigrationPhase::Completed, "{info:?}");
    let what = |mode, verify| RestoreConfig {
        source_url: format!("file://{}", stage.path("s")),
        prefault: false,
        memory_restore_mode: mode,
        resume: true,
        zone_updates: None,
        net_fds: None,
        verify,
        overrides: None,
        count: None,
    };
    let other: VmId = "other".parse().unwrap();
    // Of a disk that the VM has not.
    let manifest = stage.at("s/manifest.json");
    let text = fs::read_to_string(&manifest).unwrap();
    fs::write(&manifest, text.replace("_disk0", "elsewhere")).unwrap();
    let map = what(MemoryRestoreMode::Map, false);
    let refused = stage.there.restore(&other, &map).err().unwrap();
    assert_eq!(refused.code, "snapshot-damaged", "{refused:?}");
    assert!(refused.detail.contains("elsewhere"), "{refused:?}");
    fs::write(&manifest, text).unwrap();
    let copy = stage.at("s/disk-0.raw");
    let file = fs::File::options().write(true).open(&copy).unwrap();
    file.write_all_at(&[1], DISK_SIZE - 1).unwrap();
    for (mode, verify) in [
        (MemoryRestoreMode::Copy, false),
        (MemoryRestoreMode::OnDemand, true),
        (MemoryRestoreMode::Map, true),
    ] {
        let refused = over(&stage.there.restore(&other, &what(mode, verify)).unwrap()).await;
        let why = refused.error.unwrap();
        assert_eq!(why.code, "snapshot-damaged", "{why:?}");
        assert!(why.detail.contains("disk-0.raw"), "{why:?}");
    }
    // Found when the snapshot is opened: a file of another length, and a link.
    file.set_len(512).unwrap();
    let refused = stage.there.restore(&other, &map).err().unwrap();
    assert_eq!(refused.code, "snapshot-damaged", "{refused:?}");
    fs::rename(&copy, stage.at("elsewhere")).unwrap();
    std::os::unix::fs::symlink(stage.at("elsewhere"), &copy).unwrap();
    let refused = stage.there.restore(&other, &map).err().unwrap();
    assert_eq!(refused.code, "snapshot-unreadable", "{refused:?}");
    assert!(stage.there.list().is_empty());
    let made = fs::read_dir(stage.at("s")).unwrap().count();
    assert_eq!(made, 7, "no overlay is left");
}
