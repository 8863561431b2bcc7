//! Disks on bases move between hosts that have the same base, or have not.

use super::*;

impl Stage {
    /// Boots a guest on two overlays of one base, which has content, and which the overlays hide here and
    /// there.
    async fn boot_on_base(&self) {
        let [base, disk, other] = ["golden", "disk", "other"].map(|name| self.path(name));
        qemu_img(&["create", "-q", "-f", "qcow2", &base, "64M"]);
        qemu_io(&base, &["write -P 9 8M 24M", "write -P 8 60M 4M"]);
        for overlay in [&disk, &other] {
            let on = ["-b", &base, "-F", "qcow2", overlay];
            let create = ["create", "-q", "-f", "qcow2"];
            qemu_img(&[&create[..], &on].concat());
            // The last of them is a part of a cluster.
            let writes = [
                "write -P 3 40M 64k",
                "write -z 20M 1M",
                "write -z 25165824 8k",
            ];
            qemu_io(overlay, &writes);
        }
        let named = |path: String, id: &str| json!({ "path": path, "id": id, "image_type": "Qcow2", "backing_files": true });
        let disks = json!([named(disk, "root"), named(other, "other")]);
        self.boot_on(disks).await;
    }
}

/// A base that the destination has, too, is not copied: the new image builds on that. One with other content,
/// or that the peer may not name, is another.
#[tokio::test]
async fn base_that_both_hosts_have_is_not_copied() {
    for there in ["same", "other", "forbidden", "busy", "none"] {
        let mut stage = Stage::new();
        let bases = stage.at("bases");
        fs::create_dir(&bases).unwrap();
        stage.there = registry_with(vec![bases.clone()]);
        stage.boot_on_base().await;
        let base = stage.path("bases/golden");
        if there != "none" {
            // As another file would be: not by its clusters.
            let from = stage.path("golden");
            qemu_img(&["convert", "-f", "qcow2", "-O", "qcow2", "-c", &from, &base]);
        }
        if there == "other" {
            qemu_io(&base, &["write -P 8 30M 512"]);
        }
        // Another program may write to it.
        let mut writer = (there == "busy").then(|| {
            let mut open = Process::new("qemu-io");
            let open = open.arg(&base).stdin(std::process::Stdio::piped());
            let open = open.stdout(std::process::Stdio::piped());
            let mut open = open.spawn().unwrap();
            // It has opened the image when it answers.
            writeln!(open.stdin.as_mut().unwrap(), "length").unwrap();
            let mut answer = String::new();
            let mut output = BufReader::new(open.stdout.as_mut().unwrap());
            output.read_line(&mut answer).unwrap();
            open
        });
        let allow =
            (there == "forbidden").then(|| vec![stage.path("pocket"), stage.path("serial")]);
        let both = stage.begin_between(Some(stage.path("new")), allow, |_| {});
        for side in &both {
            let info = over(side).await;
            assert_eq!(info.phase, MigrationPhase::Completed, "{there}: {info:?}");
            assert_eq!(info.bases.len(), 2, "{there}: {info:?}");
            for note in &info.bases {
                let both = both.each_ref().map(|side| side.info().bases);
                assert_eq!(note.is_left_out, there == "same", "{there}: {both:?}");
                assert_eq!(note.base, "golden");
            }
        }
        let detail = both[1].info().bases[0].detail.clone();
        let why = match there {
            "same" => "has this content",
            "other" => "has other content",
            "busy" => "is in use by process",
            "forbidden" => "is not below a folder that this peer may use",
            _ => "there is no \"golden\"",
        };
        assert!(detail.contains(why), "{there}: {detail}");
        if let Some(writer) = &mut writer {
            assert!(detail.contains(&writer.id().to_string()), "{detail}");
            drop(writer.stdin.take());
            writer.wait().unwrap();
        }
        // Twice 28 MiB, unless they are left out.
        let sent = both[0].info().sent_bytes;
        assert_eq!(sent < 40 << 20, there == "same", "{there}: {sent} bytes");
        let new = stage.path("new/web-root.qcow2");
        stage.wait_blocks(2 * DISK_PAGES as u64).await;
        let vm = stage.there.get("web").unwrap();
        let disks = vm.info().config.disks.unwrap();
        assert!(
            disks
                .iter()
                .all(|disk| disk.backing_files == (there == "same"))
        );
        // The next machine finds the base, too.
        vm.ask(Request::Reboot).await.unwrap();
        stage.wait_blocks(2 * DISK_PAGES as u64).await;
        vm.ask(Request::Shutdown).await.unwrap();
        let other = stage.path("new/web-other.qcow2");
        qemu_img(&["compare", "-q", &stage.path("other"), &other]);
        qemu_img(&["check", "-q", &new]);
        let flat = stage.path("flat");
        qemu_img(&["convert", "-f", "qcow2", "-O", "raw", &new, &flat]);
        let disk = fs::read(&flat).unwrap();
        check_disk(&disk, DISK_PAGES).unwrap();
        let reads = |from: usize, len: usize, byte: u8| {
            assert!(is_all(&disk[from..from + len], byte), "{there}: {from}");
        };
        reads(8 << 20, 12 << 20, 9);
        reads(20 << 20, 1 << 20, 0);
        reads(24 << 20, 8 << 10, 0);
        reads((24 << 20) + (8 << 10), (8 << 20) - (8 << 10), 9);
        reads(40 << 20, 64 << 10, 3);
        reads(60 << 20, 4 << 20, 8);
        let info = Process::new("qemu-img")
            .args(["info", "--output=json", &new])
            .output();
        let info: serde_json::Value = serde_json::from_slice(&info.unwrap().stdout).unwrap();
        let named = [&info["backing-filename"], &info["backing-filename-format"]];
        match there {
            "same" => assert_eq!(named, [&json!(base), &json!("qcow2")]),
            _ => assert_eq!(named, [&json!(null); 2]),
        }
    }
}

/// Both hosts have all of a chain but its top, in other shapes.
#[tokio::test]
async fn chain_that_both_hosts_have_is_not_copied() {
    let mut stage = Stage::new();
    let bases = stage.at("bases");
    fs::create_dir(&bases).unwrap();
    stage.there = registry_with(vec![bases.clone()]);
    let [root, mid, disk] = ["golden", "mid", "disk"].map(|name| stage.path(name));
    let on = |base: &str, image: &str| {
        qemu_img(&[
            "create", "-q", "-f", "qcow2", "-b", base, "-F", "qcow2", image,
        ]);
    };
    qemu_img(&["create", "-q", "-f", "qcow2", &root, "64M"]);
    qemu_io(&root, &["write -P 9 8M 24M"]);
    on(&root, &mid);
    qemu_io(&mid, &["write -P 7 30M 8M", "write -z 10M 1M"]);
    on(&mid, &disk);
    qemu_io(&disk, &["write -P 3 40M 64k", "write -z 31M 64k"]);
    // There the lower image has more, and the upper one hides that.
    let [there, above] = ["bases/lower", "bases/mid"].map(|name| stage.path(name));
    qemu_img(&["create", "-q", "-f", "qcow2", &there, "64M"]);
    qemu_io(&there, &["write -P 9 8M 22M", "write -P 5 50M 1M"]);
    on("lower", &above);
    let writes = ["write -P 7 30M 8M", "write -z 10M 1M", "write -z 50M 1M"];
    qemu_io(&above, &writes);
    let disks =
        json!([{ "path": disk, "id": "root", "image_type": "Qcow2", "backing_files": true }]);
    stage.boot_on(disks).await;
    let both = stage.begin(|_| {});
    for side in &both {
        let info = over(side).await;
        assert_eq!(info.phase, MigrationPhase::Completed, "{info:?}");
        assert!(info.bases[0].is_left_out, "{info:?}");
    }
    stage.wait_blocks(2 * DISK_PAGES as u64).await;
    let vm = stage.there.get("web").unwrap();
    // The next machine finds the chain, too.
    vm.ask(Request::Reboot).await.unwrap();
    stage.wait_blocks(2 * DISK_PAGES as u64).await;
    vm.ask(Request::Shutdown).await.unwrap();
    let (new, flat) = (stage.path("new/web-root.qcow2"), stage.path("flat"));
    qemu_img(&["convert", "-f", "qcow2", "-O", "raw", &new, &flat]);
    let moved = fs::read(&flat).unwrap();
    check_disk(&moved, DISK_PAGES).unwrap();
    qemu_img(&["convert", "-f", "qcow2", "-O", "raw", &disk, &flat]);
    let left = fs::read(&flat).unwrap();
    let own = DISK_PAGES * 4096;
    assert!(moved[own..] == left[own..]);
}
