//! Blocks of disks that follow the guest.

use super::*;

/// The guest uses its disk while blocks of it follow slowly. Its reset waits for them, as do requests that need
/// whole disks.
#[tokio::test]
async fn blocks_follow_a_guest_that_writes() {
    for (format, resets) in [("raw", true), ("qcow2", false)] {
        let stage = Stage::new();
        stage.boot(format).await;
        let both = stage.begin(|what| {
            what.mode = MemoryMode::Postcopy;
            what.max_bandwidth = Some(320 << 10);
        });
        let start = Instant::now();
        while both[1].info().phase != MigrationPhase::Postcopy {
            assert!(start.elapsed() < PATIENCE, "{:?}", both[1].info());
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
        stage.wait_blocks(2 * DISK_PAGES as u64).await;
        let info = both[1].info();
        assert_eq!(info.phase, MigrationPhase::Postcopy, "{info:?}");
        assert!(
            info.disk_remaining_bytes > 0 && info.disk_faults > 0,
            "{info:?}"
        );
        let names = [format!("web-_disk0.{format}"), "web-other.qcow2".to_owned()];
        let [mark, other_mark] = names.clone().map(|name| format!("{name}.incomplete"));
        let [image, other] = names;
        assert_eq!(stage.made(), [&*image, &*mark, &*other, &*other_mark]);
        let vm = stage.there.get("web").unwrap();
        let requests = [
            Request::Shutdown,
            Request::Reboot,
            Request::Pause,
            Request::ResizeDisk(VmResizeDisk {
                id: "_disk0".to_owned(),
                desired_size: DISK_SIZE * 2,
            }),
        ];
        for request in requests {
            let refused = vm.ask(request).await.unwrap_err();
            assert_eq!(refused.code, "pages-arriving", "{refused:?}");
        }
        // The source's image is nobody else's until all blocks have gone.
        assert!(!can_write(&stage.path("disk"), format));
        if resets {
            let mut serial = UnixStream::connect(stage.at("serial")).unwrap();
            writeln!(serial, "{}", Command::Reset).unwrap();
        }
        for side in &both {
            let info = over(side).await;
            assert_eq!(info.phase, MigrationPhase::Completed, "{info:?}");
            assert_eq!(info.disk_remaining_bytes, 0);
        }
        assert_eq!(stage.made(), [&*image, &*other]);
        stage.wait_blocks(2 * DISK_PAGES as u64).await;
        let events = stage.there.events().after(0, None).0;
        let is_deferred = events.iter().any(|event| event.event == "end-deferred");
        assert_eq!(is_deferred, resets);
        vm.ask(Request::Shutdown).await.unwrap();
        let (flat, from) = (stage.path("flat"), stage.path(&format!("new/{image}")));
        qemu_img(&["convert", "-f", format, "-O", "raw", &from, &flat]);
        check_disk(&fs::read(&flat).unwrap(), DISK_PAGES).unwrap();
        let other = stage.path("new/web-other.qcow2");
        qemu_img(&["compare", "-q", &stage.path("other"), &other]);
        qemu_img(&["check", "-q", &other]);
    }
}
