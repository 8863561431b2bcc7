//! Disks continue on new images, while their guest writes.

use super::*;

impl Stage {
    pub(super) fn mirror(
        &self,
        name: &str,
        with: impl FnOnce(&mut MirrorDisk),
    ) -> Result<Arc<dyn Migration>, RequestError> {
        let mut what = MirrorDisk::at(self.path(&format!("new/{name}")));
        with(&mut what);
        self.here.mirror_disk("web", "_disk0", &what)
    }

    /// Begins one that takes minutes, and waits until it has copied something.
    pub(super) async fn slow_mirror(&self, name: &str) -> Arc<dyn Migration> {
        let mirror = self.mirror(name, |what| what.max_bandwidth = Some(16 << 10));
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

    pub(super) fn events(&self, named: &str) -> Vec<String> {
        let (events, _) = self.here.events().after(0, None);
        let of = events.into_iter().filter(|event| event.event == named);
        of.map(|event| event.detail.unwrap_or_default()).collect()
    }
}

/// The formats of an image and of its mirror, each by its name and as a request has it.
fn both_ways() -> [[(&'static str, NewImageFormat); 2]; 2] {
    let [raw, qcow2] = [
        ("raw", NewImageFormat::Raw),
        ("qcow2", NewImageFormat::Qcow2),
    ];
    [[raw, qcow2], [qcow2, raw]]
}

/// The guest writes while its disk is copied, and continues on the new image: no block is lost.
#[tokio::test]
async fn disk_continues_on_its_mirror_while_the_guest_writes() {
    for [from, to] in both_ways() {
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
        assert!(is_all(&disk[DISK_PAGES * 4096..], 0));
        assert!(blocks_of(Path::new(&new)) < 8 << 20, "it is sparse");
        assert!(can_write(&new, to.0));
    }
}

/// A mirror that no client canceled says why it ended.
fn assert_ended_with_guest(info: &MigrationInfo) {
    assert_eq!(info.phase, MigrationPhase::Failed, "{info:?}");
    let error = info.error.as_ref().unwrap();
    assert_eq!(error.code, "guest-ended");
    assert!(error.detail.contains("keeps its image"), "{error:?}");
}

/// A mirror that is called off, by a client or by the end of its machine, leaves the disk as it was and no
/// image.
#[tokio::test]
async fn mirror_that_ends_early_leaves_the_disk() {
    let stage = Stage::new();
    stage.boot("qcow2").await;
    let vm = stage.here.get("web").unwrap();
    let mirror = stage.slow_mirror("mirror").await;
    mirror.cancel().unwrap();
    assert_eq!(over(&mirror).await.phase, MigrationPhase::Canceled);
    stage.runs_here().await;
    for request in [Request::Shutdown, Request::Delete] {
        let mirror = stage.slow_mirror("mirror").await;
        let deleted = request == Request::Delete;
        match deleted {
            true => stage.here.delete("web").await.unwrap(),
            false => drop(vm.ask(request).await.unwrap()),
        }
        assert_ended_with_guest(&over(&mirror).await);
        assert_eq!(stage.made(), [""; 0]);
        if !deleted {
            vm.ask(Request::Boot).await.unwrap();
            stage.wait_blocks(2 * DISK_PAGES as u64).await;
        }
    }
    // A VM that is deleted has no further events.
    let [begun, failed] =
        ["disk-mirroring", "disk-mirror-failed"].map(|event| stage.events(event).len());
    assert_eq!((begun, failed), (3, 2));
    qemu_img(&["check", "-q", &stage.path("disk")]);
}

/// A mirror continues while its guest is reset, and has what the guest wrote before and after.
#[tokio::test]
async fn mirror_goes_on_over_resets_of_its_guest() {
    for [from, to] in both_ways() {
        let stage = Stage::new();
        stage.boot(from.0).await;
        let vm = stage.here.get("web").unwrap();
        // The first round takes some seconds.
        let mirror = stage.mirror("mirror", |what| {
            (what.format, what.max_bandwidth) = (Some(to.1), Some(32 << 10));
            what.max_downtime_ms = 60_000;
        });
        let mirror = mirror.unwrap();
        while mirror.info().sent_bytes == 0 {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        let mut serial = UnixStream::connect(stage.at("serial")).unwrap();
        writeln!(serial, "{}", Command::Reset).unwrap();
        drop(serial);
        let start = Instant::now();
        while vm.status().reboots == 0 {
            assert!(start.elapsed() < PATIENCE, "{:?}", vm.status());
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
        vm.ask(Request::Reboot).await.unwrap();
        stage.wait_blocks(16).await;
        vm.ask(Request::Pause).await.unwrap();
        assert!(!mirror.info().phase.is_over(), "{:?}", mirror.info());
        let info = over(&mirror).await;
        assert_eq!(info.phase, MigrationPhase::Completed, "{info:?}");
        assert_eq!(stage.made(), ["mirror"]);
        let (old, new) = (stage.path("disk"), stage.path("new/mirror"));
        qemu_img(&["compare", "-U", "-f", from.0, "-F", to.0, &old, &new]);
        vm.ask(Request::Resume).await.unwrap();
        stage.wait_blocks(3 * DISK_PAGES as u64).await;
        vm.ask(Request::Shutdown).await.unwrap();
        let flat = stage.path("flat");
        qemu_img(&["convert", "-f", to.0, "-O", "raw", &new, &flat]);
        check_disk(&fs::read(&flat).unwrap(), DISK_PAGES).unwrap();
    }
}

/// A mirror that waits for the next machine ends when there is none.
#[tokio::test]
async fn mirror_ends_with_a_guest_that_cannot_be_reset() {
    let stage = Stage::new();
    stage.boot("raw").await;
    let vm = stage.here.get("web").unwrap();
    let mirror = stage.slow_mirror("mirror").await;
    fs::remove_file(stage.at("pocket")).unwrap();
    assert!(vm.ask(Request::Reboot).await.is_err());
    assert_ended_with_guest(&over(&mirror).await);
    assert_eq!(stage.made(), [""; 0]);
    check_disk(&fs::read(stage.at("disk")).unwrap(), DISK_PAGES).unwrap();
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
    let [partial, marker] =
        ["mirror.partial", "mirror.partial.incoming"].map(|name| stage.at(&format!("new/{name}")));
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
    for request in changes_of_disk() {
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
    // The path of its new image is taken, too, whoever asks.
    let same = MirrorDisk::at(stage.path("new/../new/mirror"));
    let same = stage.here.mirror_disk("web", "other", &same).err().unwrap();
    assert_eq!(same.code, "image-exists");
    let named = format!("disk `_disk0` of VM web (migration {})", mirror.info().id);
    assert!(same.detail.contains(&named), "{same}");
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
    let both = stage.begin(|what| what.max_bandwidth = Some(16 << 10));
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

/// The header of a small image can claim any size. A copy has a map of all blocks, which must not take the
/// service's memory.
#[tokio::test]
async fn disk_that_is_too_large_to_copy_is_refused() {
    let stage = Stage::new();
    let (disk, huge) = (stage.path("disk"), stage.path("huge"));
    qemu_img(&["create", "-q", "-f", "raw", &disk, "64M"]);
    let large_clusters = ["create", "-q", "-f", "qcow2", "-o", "cluster_size=2M"];
    qemu_img(&[&large_clusters[..], &[&huge, "1E"]].concat());
    let disks = json!([{ "path": disk }, { "path": huge, "id": "huge" }]);
    stage.boot_on(disks).await;
    let what = MirrorDisk::at(stage.path("new/mirror"));
    let refused = stage.here.mirror_disk("web", "huge", &what).err().unwrap();
    assert_eq!(refused.code, "disks-too-large");
    assert!(stage.made().is_empty());
    let both = stage.begin(|_| {});
    let info = over(&both[0]).await;
    assert_eq!(info.error.unwrap().code, "disks-too-large");
    // It may not have heard of its source yet, and would wait for another.
    let _ = both[1].cancel();
    over(&both[1]).await;
    stage.runs_here().await;
}
