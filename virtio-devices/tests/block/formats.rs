//! Image formats, their detection, and the locks that QEMU's tools respect.

use std::fs;
use std::io::Read;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};

use virtio_devices::VirtioDevice;
use virtio_devices::block::{Block, BlockConfig, ImageError, ImageFormat, OnError};
use virtio_devices::testing::{qemu_img, workers};

use crate::machine::{MIB, SYNC, config, machine, pattern, raw};
use crate::refused::refusal;

#[test]
fn qcow2_matches_qemu() {
    let dir = tempfile::tempdir().unwrap();
    let base = dir.path().join("base.raw");
    fs::write(&base, pattern(3, 4 * MIB)).unwrap();
    let top = dir.path().join("top.qcow2");
    let (base_str, top_str) = (base.to_str().unwrap(), top.to_str().unwrap());
    qemu_img(&[
        "create", "-q", "-f", "qcow2", "-F", "raw", "-b", base_str, top_str,
    ]);
    let (_event_loop, workers) = workers();
    let refused = Block::new(&config(&top), workers).err().unwrap();
    assert!(matches!(refused, ImageError::Backing { .. }), "{refused}");

    let mut machine = machine(&BlockConfig {
        backing_files: true,
        ..config(&top)
    });
    assert_eq!(
        machine.read(100, 4096),
        (0, pattern(3, 4 * MIB)[51200..55296].to_vec())
    );
    assert_eq!(machine.write(100, &[0x55; 4096]), 0);
    assert_eq!(machine.request(SYNC, 0, 0, false), 0);
    machine.device.stop_queue(0);
    drop(machine);
    qemu_img(&["check", "-q", top_str]);
    let flat = dir.path().join("flat.raw");
    qemu_img(&["convert", "-O", "raw", top_str, flat.to_str().unwrap()]);
    let mut expected = pattern(3, 4 * MIB);
    expected[51200..55296].fill(0x55);
    assert!(fs::read(&flat).unwrap() == expected);
    assert!(
        fs::read(&base).unwrap() == pattern(3, 4 * MIB),
        "the base is untouched"
    );
}

#[test]
fn rejects_non_images_by_name() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name);
    fs::write(path("odd"), [0; 1000]).unwrap();
    fs::write(path("empty"), []).unwrap();
    fs::write(path("truncated.qcow2"), b"QFI\xfb\0\0\0\x03").unwrap();
    let encrypted = path("encrypted.qcow2");
    let name = encrypted.to_str().unwrap();
    qemu_img(&["create", "-q", "-f", "qcow2", name, "1M"]);
    let mut bytes = fs::read(&encrypted).unwrap();
    bytes[35] = 1; // crypt_method: AES
    fs::write(&encrypted, bytes).unwrap();
    let unknown = path("unknown.qcow2");
    qemu_img(&[
        "create",
        "-q",
        "-f",
        "qcow2",
        unknown.to_str().unwrap(),
        "1M",
    ]);
    let mut bytes = fs::read(&unknown).unwrap();
    bytes[72] |= 0x80; // incompatible feature 63
    fs::write(&unknown, bytes).unwrap();
    let circle = path("circle.qcow2");
    let name = circle.to_str().unwrap();
    qemu_img(&["create", "-q", "-f", "qcow2", name, "1M"]);
    qemu_img(&[
        "rebase", "-q", "-u", "-f", "qcow2", "-F", "qcow2", "-b", name, name,
    ]);
    let made = Command::new("mkfifo").arg(path("pipe")).status().unwrap();
    assert!(made.success());
    for (name, expected) in [
        ("missing", "cannot be opened"),
        (".", "is a directory"),
        ("pipe", "is a FIFO"),
        ("odd", "the size of a disk must be"),
        ("empty", "the size of a disk must be"),
        ("truncated.qcow2", "cannot be used as qcow2"),
        ("encrypted.qcow2", "cannot be used as qcow2"),
        ("unknown.qcow2", "cannot be used as qcow2"),
        ("circle.qcow2", "is its own backing file"),
    ] {
        let told = refusal(&BlockConfig {
            backing_files: true,
            ..config(&path(name))
        });
        assert!(told.contains(expected), "{name}: {told}");
        assert!(told.contains(name), "{name}: {told}");
    }
}

#[test]
fn image_lock_excludes_qemu_tools() {
    let dir = tempfile::tempdir().unwrap();
    let path = raw(&dir, 1 << 20);
    let mut first = machine(&config(&path));
    let told = refusal(&config(&path));
    let own = format!("process {}", std::process::id());
    assert!(
        told.contains("is in use by") && told.contains(&own),
        "{told}"
    );
    let readonly = BlockConfig {
        readonly: true,
        ..config(&path)
    };
    assert!(refusal(&readonly).contains("is in use by"));
    let write = |path: &Path| {
        let mut qemu_io = Command::new("qemu-io");
        qemu_io.args(["-f", "raw", "-c", "write 0 512"]).arg(path);
        let run = qemu_io.stdout(Stdio::null()).output();
        run.expect("qemu-io, of the package qemu-utils")
    };
    let run = write(&path);
    let told = String::from_utf8_lossy(&run.stderr);
    assert!(!run.status.success() && told.contains("lock"), "{told}");

    // Ownership moves, and comes back.
    first.device.flush().unwrap();
    assert!(!write(&path).status.success(), "a flush releases nothing");
    first.device.hand_over();
    let second = machine(&config(&path));
    assert!(first.device.take_over().is_err());
    drop(second);
    first.device.take_over().unwrap();
    drop(first);
    assert!(write(&path).status.success());
    // Readers share.
    let _one = machine(&readonly);
    let _two = machine(&readonly);
    assert!(!write(&path).status.success());
    // The other way round: QEMU has it.
    drop((_one, _two));
    let mut qemu_io = Command::new("qemu-io");
    let held = qemu_io.args(["-f", "raw"]).arg(&path);
    let mut held = held
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    // Its prompt comes when it has opened the image.
    let mut prompt = [0; 8];
    held.stdout
        .as_mut()
        .unwrap()
        .read_exact(&mut prompt)
        .unwrap();
    let told = refusal(&config(&path));
    let expected = format!("process {} (qemu-io)", held.id());
    assert!(told.contains(&expected), "{told}");
    drop(held.stdin.take());
    held.wait().unwrap();
}

/// Programs that are started meanwhile have the image open, for a moment.
#[test]
fn dropped_disk_releases_lock() {
    let dir = tempfile::tempdir().unwrap();
    let path = raw(&dir, 1 << 20);
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !done.load(Ordering::Relaxed) {
                assert!(Command::new("true").status().unwrap().success());
            }
        });
        let taken = (0..300).try_for_each(|_| {
            let (_event_loop, workers) = workers();
            Block::new(&config(&path), workers).map(drop)
        });
        done.store(true, Ordering::Relaxed);
        taken.unwrap();
    });
}

/// Backing files in use are locked against QEMU's tools and against us.
#[test]
fn backing_files_are_locked() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
    let (base, middle, top) = (path("base.raw"), path("middle.qcow2"), path("top.qcow2"));
    let (other, data) = (path("other.qcow2"), path("data.raw"));
    fs::write(&base, pattern(3, MIB)).unwrap();
    let create = |format, below: &str, image: &str| {
        let on = ["-F", format, "-b", below, image];
        qemu_img(&[&["create", "-q", "-f", "qcow2"][..], &on].concat());
    };
    create("raw", &base, &middle);
    create("qcow2", &middle, &top);
    create("qcow2", &middle, &other);
    let on = |image: &str| BlockConfig {
        backing_files: true,
        ..config(Path::new(image))
    };
    let writes = |image: &str, format: &str| {
        let mut qemu_io = Command::new("qemu-io");
        qemu_io.args(["-f", format, "-c", "write 0 512", image]);
        let run = qemu_io.stdout(Stdio::null()).stderr(Stdio::null()).status();
        run.expect("qemu-io, of the package qemu-utils").success()
    };
    let mut first = machine(&on(&top));
    let second = machine(&on(&other));
    assert!(!writes(&base, "raw") && !writes(&middle, "qcow2"));
    assert!(refusal(&config(Path::new(&base))).contains("is in use by"));
    drop(second);
    // The locks go with the guest, and come back with it.
    first.device.flush().unwrap();
    assert!(!writes(&base, "raw"));
    first.device.hand_over();
    assert!(writes(&base, "raw"));
    let waits = BlockConfig {
        is_incoming: true,
        ..on(&other)
    };
    let mut incoming = machine(&waits);
    assert!(writes(&base, "raw"));
    incoming.device.take_over().unwrap();
    assert!(!writes(&base, "raw"));
    drop(incoming);
    let writer = machine(&config(Path::new(&base)));
    let told = refusal(&on(&top));
    assert!(
        told.contains(&base) && told.contains("is in use by"),
        "{told}"
    );
    assert!(first.device.take_over().is_err());
    drop(writer);
    assert!(writes(&top, "qcow2"), "nothing is kept of it");
    first.device.take_over().unwrap();
    assert!(!writes(&base, "raw"));
    drop(first);

    // Nor to a file that keeps an image's data.
    let with_data = path("with_data.qcow2");
    let file = format!("data_file={data}");
    qemu_img(&["create", "-q", "-f", "qcow2", "-o", &file, &with_data, "1M"]);
    let machine = machine(&BlockConfig {
        readonly: true,
        data_files: true,
        ..config(Path::new(&with_data))
    });
    assert!(!writes(&data, "raw"));
    drop(machine);
    assert!(writes(&data, "raw"));
}

/// A guest must not choose what the next detection of its disk's format finds, and which files of the
/// host an image names.
#[test]
fn a_disk_that_was_detected_as_raw_stays_raw() {
    let dir = tempfile::tempdir().unwrap();
    let path = raw(&dir, MIB as u64);
    let mut qcow2 = vec![0; 2 * 512];
    qcow2[..4].copy_from_slice(b"QFI\xfb");
    let mut vdi = vec![0; 512];
    vdi[0x40..0x44].copy_from_slice(&0xbeda_107f_u32.to_le_bytes());
    let mut footer = vec![0; 3 * 512];
    footer[1024..][..8].copy_from_slice(b"conectix");
    let last = MIB as u64 / 512 - 3;
    let other_formats = [(0, &qcow2), (0, &vdi), (last, &footer)];
    let detected = config(&path);
    // Also a boot later, with what was found out at the first one.
    let recorded = BlockConfig {
        format: Some(ImageFormat::Raw),
        is_detected: true,
        on_error: OnError::Pause,
        ..config(&path)
    };
    for config in [detected, recorded] {
        let mut machine = machine(&config);
        assert_eq!(machine.handle.format(), ImageFormat::Raw);
        for (sector, data) in other_formats {
            assert_eq!(machine.write(sector, data), 1, "an I/O error");
        }
        assert_eq!(machine.write(0, &[0x55; 4096]), 0);
        assert_eq!(machine.write(last, &[0x55; 1536]), 0);
        // Elsewhere the same bytes tell nothing.
        assert_eq!(machine.write(1, &qcow2), 0);
        assert!(machine.heard.events().is_empty());
        machine.device.stop_queue(0);
    }
    assert!(fs::read(&path).unwrap().starts_with(&[0x55; 512]));
    // An operator who says that the disk is raw takes the guest's bytes as they are.
    let said = BlockConfig {
        format: Some(ImageFormat::Raw),
        ..config(&path)
    };
    let mut machine = machine(&said);
    for (sector, data) in other_formats {
        assert_eq!(machine.write(sector, data), 0);
    }
    drop(machine);
    assert!(fs::read(&path).unwrap()[..512] == vdi[..]);
}

/// A header extension that reaches past the header: the library's parser panics at it.
#[test]
fn a_damaged_image_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("damaged");
    let made = Command::new("qemu-img")
        .args(["create", "-q", "-f", "qcow2", "-o", "cluster_size=512"])
        .args([&path, Path::new("64K")])
        .status();
    assert!(made.unwrap().success());
    let mut image = fs::read(&path).unwrap();
    // The first extension (docs/interop/qcow2.rst): the table of features' names, an entry of one byte.
    let at = u32::from_be_bytes(image[100..104].try_into().unwrap()) as usize;
    image[at..at + 4].copy_from_slice(&0x6803_f857_u32.to_be_bytes());
    image[at + 4..at + 8].copy_from_slice(&1_u32.to_be_bytes());
    fs::write(&path, image).unwrap();
    let (_event_loop, workers) = workers();
    let refused = Block::new(&config(&path), workers).err().unwrap();
    assert!(refused.to_string().contains("damaged"), "{refused}");
}
