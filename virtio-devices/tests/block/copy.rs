//! A disk is copied into a new image while its guest writes.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use virtio_devices::VirtioDevice;
use virtio_devices::block::{BlockConfig, CreatedImage, DiskContent, ImageFormat, LockMode};
use virtio_devices::testing::qemu_img;

use crate::machine::{DISCARD, Machine, SYNC, WRITE_ZEROES, config, machine, pattern};
use crate::overlay::{paused, writes};
use crate::refused::refusal;

const SIZE: u64 = 8 << 20;

/// Copies all blocks that are dirty.
fn copy(from: &DiskContent, to: &CreatedImage) {
    for (first, pages) in from.dirty().take().runs() {
        for page in first..first + pages {
            let offset = page as u64 * 4096;
            let mut block = vec![0; 4096.min(SIZE - offset) as usize];
            from.read_at(offset, &mut block).unwrap();
            to.write_at(offset, &block).unwrap();
        }
    }
}

/// Sends a request about a range, without data to move.
fn range(machine: &mut Machine, kind: u32, sector: u64, sectors: u32) -> u8 {
    let mut segment = sector.to_le_bytes().to_vec();
    segment.extend(sectors.to_le_bytes());
    segment.extend([0; 4]);
    machine.guest.write(machine.data, &segment);
    machine.request(kind, 0, 16, false)
}

fn check(format: &str, create: &[&str], is_direct: bool) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk");
    let name = path.to_str().unwrap();
    qemu_img(&[&["create", "-q", "-f", format][..], create, &[name, "8M"]].concat());
    let mut wanted = config(&path);
    wanted.direct = is_direct;
    let mut machine = machine(&wanted);
    assert_eq!(machine.write(0, &pattern(1, 65536)), 0);
    assert_eq!(machine.write(8192, &pattern(2, 4096)), 0);
    let content = machine.handle.access().content().unwrap();
    content.start().unwrap();
    let there = dir.path().join("copy");
    let image_format = match format {
        "raw" => ImageFormat::Raw,
        _ => ImageFormat::Qcow2,
    };
    assert_eq!(content.format(), image_format);
    let made = CreatedImage::create(&there, image_format, SIZE, LockMode::ByteRange).unwrap();
    let first = content.dirty().count();
    assert!(
        (17..2048 / 2).contains(&first),
        "extents, not the disk: {first}"
    );
    copy(&content, &made);
    assert_eq!(content.dirty().count(), 0);
    // Each kind of change makes its blocks dirty, and no others.
    assert_eq!(machine.write(4096, &pattern(3, 8192)), 0);
    assert_eq!(content.dirty().count(), 2);
    assert_eq!(range(&mut machine, DISCARD, 0, 8), 0);
    assert_eq!(content.dirty().count(), 3);
    assert_eq!(range(&mut machine, WRITE_ZEROES, 8192, 9), 0);
    assert_eq!(content.dirty().count(), 5);
    assert_eq!(machine.read(4096, 8192), (0, pattern(3, 8192)));
    assert_eq!(content.dirty().count(), 5);
    copy(&content, &made);
    made.sync().unwrap();
    drop(content);
    assert_eq!(machine.write(0, &pattern(9, 512)), 0);
    machine.device.stop_queue(0);
    drop((machine, made));
    compare(&path, &there, format);
}

/// The images differ in the sector that was written when the copy had ended, and nowhere else.
fn compare(one: &Path, other: &Path, format: &str) {
    let raw = |path: &Path| {
        let to = path.with_extension("flat");
        let (from, to_name) = (path.to_str().unwrap(), to.to_str().unwrap());
        qemu_img(&["convert", "-f", format, "-O", "raw", from, to_name]);
        if format == "qcow2" {
            qemu_img(&["check", "-q", "-f", "qcow2", from]);
        }
        std::fs::read(to).unwrap()
    };
    let (one, other) = (raw(one), raw(other));
    assert!(one[512..] == other[512..]);
    assert!(one[..512] == pattern(9, 512) && one[..512] != other[..512]);
}

/// A machine that is reset opens the image anew, though a copy of the old machine's has not ended.
#[test]
fn copy_does_not_keep_an_image_from_the_next_machine() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk");
    qemu_img(&["create", "-q", "-f", "qcow2", path.to_str().unwrap(), "8M"]);
    let old = machine(&config(&path));
    let content = Arc::new(old.handle.access().content().unwrap());
    content.start().unwrap();
    let reads = |content: &DiskContent| content.read_at(0, &mut [0; 65536]);
    let (copied, begun) = (Arc::clone(&content), Arc::new(AtomicBool::new(false)));
    let begins = Arc::clone(&begun);
    let copying = thread::spawn(move || {
        while reads(&copied).is_ok() {
            begins.store(true, Ordering::SeqCst);
        }
    });
    while !begun.load(Ordering::SeqCst) {
        thread::yield_now();
    }
    drop(old);
    let mut new = machine(&config(&path));
    copying.join().unwrap();
    assert!(reads(&content).is_err() && content.start().is_err());
    assert_eq!(new.write(0, &pattern(1, 4096)), 0);
    drop(content);
}

/// A copy of a disk whose machine is reset has what the guest wrote before, around and after the reset, and
/// copies no block twice that did not change.
#[test]
fn copy_follows_its_disk_over_a_reset() {
    for (format, image_format) in FORMATS {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk");
        let name = path.to_str().unwrap();
        qemu_img(&["create", "-q", "-f", format, name, "8M"]);
        let mut old = machine(&config(&path));
        assert_eq!(old.write(0, &pattern(1, 65536)), 0);
        let access = old.handle.access();
        let content = Arc::new(access.content().unwrap());
        content.start().unwrap();
        let there = dir.path().join("copy");
        let made = CreatedImage::create(&there, image_format, SIZE, LockMode::ByteRange).unwrap();
        copy(&content, &made);
        assert_eq!(old.write(8192, &pattern(2, 4096)), 0);
        access.await_reset();
        drop(old);
        let reader = Arc::clone(&content);
        let waits = thread::spawn(move || {
            let mut block = [0; 4096];
            reader.read_at(4 << 20, &mut block).map(|()| block)
        });
        let mut new = machine(&config(&path));
        access.follow(&new.handle).unwrap();
        assert!(waits.join().unwrap().unwrap() == pattern(2, 4096)[..]);
        assert_eq!(content.dirty().count(), 1, "{format}");
        assert_eq!(new.write(4096, &pattern(3, 8192)), 0);
        assert_eq!(content.dirty().count(), 3, "{format}");
        copy(&content, &made);
        made.sync().unwrap();
        drop(content);
        assert_eq!(new.write(0, &pattern(9, 512)), 0);
        new.device.stop_queue(0);
        drop((new, made));
        compare(&path, &there, format);
    }
}

/// The copy has what another program writes to the image while no machine has it.
#[test]
fn copy_notices_a_change_during_a_reset() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk");
    qemu_img(&["create", "-q", "-f", "raw", path.to_str().unwrap(), "8M"]);
    let begin = || {
        let machine = machine(&config(&path));
        let access = machine.handle.access();
        let content = access.content().unwrap();
        content.start().unwrap();
        let _ = content.dirty().take();
        access.await_reset();
        (access, content)
    };
    let image = || std::fs::OpenOptions::new().write(true).open(&path).unwrap();
    let (access, content) = begin();
    std::os::unix::fs::FileExt::write_all_at(&image(), &[7; 512], 1 << 20).unwrap();
    // As a clock of the host that stands still would hide it.
    let later = std::time::SystemTime::now() + std::time::Duration::from_secs(9);
    image().set_modified(later).unwrap();
    let next = machine(&config(&path));
    access.follow(&next.handle).unwrap();
    assert_eq!(content.dirty().count() as u64, SIZE / 4096);
    drop((next, content));

    let (access, content) = begin();
    image().set_len(16 << 20).unwrap();
    let next = machine(&config(&path));
    let error = access.follow(&next.handle).unwrap_err();
    assert!(
        error.to_string().contains("8388608 bytes before"),
        "{error}"
    );
    access.end();
    assert!(content.read_at(0, &mut [0; 512]).is_err());
}

#[test]
fn copy_of_a_raw_disk_has_all_that_its_guest_wrote() {
    check("raw", &[], false);
}

#[test]
fn copy_by_direct_io_has_all_that_its_guest_wrote() {
    check("raw", &[], true);
}

#[test]
fn copy_of_a_qcow2_disk_has_all_that_its_guest_wrote() {
    check("qcow2", &["-o", "cluster_size=4096"], false);
}

const FORMATS: [(&str, ImageFormat); 2] =
    [("raw", ImageFormat::Raw), ("qcow2", ImageFormat::Qcow2)];

/// A disk continues on one new image after the other, of each format, and the image that it leaves is
/// whole and free.
#[test]
fn disk_continues_on_new_images() {
    let [raw, qcow2] = FORMATS;
    for (first, is_direct) in [(raw, false), (raw, true), (qcow2, false)] {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        let mut old = (at("disk"), first.0);
        qemu_img(&["create", "-q", "-f", first.0, old.0.to_str().unwrap(), "8M"]);
        let mut machine = machine(&BlockConfig {
            direct: is_direct,
            ..config(&old.0)
        });
        assert_eq!(machine.write(0, &pattern(1, 65536)), 0);
        for (turn, (name, format)) in [qcow2, raw, raw, qcow2].into_iter().enumerate() {
            let (part, new) = (at(&format!("{turn}.partial")), at(&format!("{turn}")));
            let content = machine.handle.access().content().unwrap();
            content.start().unwrap();
            let made = CreatedImage::create(&part, format, SIZE, LockMode::ByteRange).unwrap();
            copy(&content, &made);
            let sector = 4096 + 8 * turn as u64;
            assert_eq!(machine.write(sector, &pattern(turn as u8, 4096)), 0);
            machine.handle.access().pre_sync().unwrap();
            paused(&mut machine, |machine| {
                copy(&content, &made);
                machine.handle.switch_to(&made, &new, false).unwrap();
            });
            drop((content, made));
            assert!(new.exists() && !part.exists());
            assert_eq!(machine.handle.format(), format);
            assert_eq!(machine.read(sector, 4096), (0, pattern(turn as u8, 4096)));
            assert_eq!(machine.read(0, 65536), (0, pattern(1, 65536)));
            // Written to the new image only.
            assert_eq!(machine.write(12288, &pattern(turn as u8 + 9, 512)), 0);
            assert_eq!(machine.request(SYNC, 0, 0, false), 0);
            assert!(writes(&old.0, old.1), "the old image is free");
            assert!(!writes(&new, name), "and the new one is locked");
            assert!(refusal(&config(&new)).contains("is in use by"));
            let flat = at("flat");
            let (from, to) = (old.0.to_str().unwrap(), flat.to_str().unwrap());
            qemu_img(&["convert", "-f", old.1, "-O", "raw", from, to]);
            let before = std::fs::read(&flat).unwrap();
            assert!(before[sector as usize * 512..][..4096] == pattern(turn as u8, 4096));
            assert!(before[12288 * 512..][..512] != pattern(turn as u8 + 9, 512));
            if old.1 == "qcow2" {
                qemu_img(&["check", "-q", "-f", "qcow2", from]);
            }
            old = (new, name);
        }
        drop(machine);
        assert!(writes(&old.0, old.1));
        qemu_img(&["check", "-q", "-f", "qcow2", old.0.to_str().unwrap()]);
    }
}

/// A switch that is refused leaves the disk as it was, and the name as it was.
#[test]
fn switch_that_is_refused_changes_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    std::fs::write(at("disk"), pattern(1, SIZE as usize)).unwrap();
    let mut machine = machine(&config(&at("disk")));
    let create = |name: &str, size| {
        CreatedImage::create(&at(name), ImageFormat::Raw, size, LockMode::ByteRange).unwrap()
    };
    let [other_size, taken] = [create("small", SIZE - 512), create("partial", SIZE)];
    std::fs::write(at("there"), "mine").unwrap();
    paused(&mut machine, |machine| {
        let refused = |made: &CreatedImage, name: &str| {
            let refused = machine.handle.switch_to(made, &at(name), false);
            refused.unwrap_err().to_string()
        };
        let error = refused(&other_size, "new");
        assert!(
            error.ends_with("has 8388096 bytes, and the disk 8388608"),
            "{error}"
        );
        let error = refused(&taken, "there");
        assert!(error.contains("exists"), "{error}");
    });
    assert!(!at("new").exists());
    assert_eq!(std::fs::read(at("there")).unwrap(), b"mine");
    assert_eq!(machine.write(0, &pattern(7, 512)), 0);
    assert!(std::fs::read(at("disk")).unwrap()[..512] == pattern(7, 512));
    assert!(!writes(&at("disk"), "raw"), "the lock stays");
}

/// A disk that the guest cannot write is one on its new image, too.
#[test]
fn readonly_disk_stays_readonly() {
    for (name, format) in FORMATS {
        let dir = tempfile::tempdir().unwrap();
        let (path, new) = (dir.path().join("disk"), dir.path().join("new"));
        std::fs::write(&path, pattern(1, SIZE as usize)).unwrap();
        let mut machine = machine(&BlockConfig {
            readonly: true,
            ..config(&path)
        });
        let content = machine.handle.access().content().unwrap();
        content.start().unwrap();
        let part = dir.path().join("part");
        let made = CreatedImage::create(&part, format, SIZE, LockMode::ByteRange).unwrap();
        copy(&content, &made);
        paused(&mut machine, |machine| {
            machine.handle.switch_to(&made, &new, false).unwrap();
        });
        assert_eq!(machine.read(0, 4096), (0, pattern(1, 4096)));
        assert_ne!(machine.write(0, &pattern(7, 512)), 0);
        // Other readers are welcome, and those who write are not.
        drop(super::machine::machine(&BlockConfig {
            readonly: true,
            format: Some(format),
            ..config(&new)
        }));
        assert!(!writes(&new, name));
    }
}
