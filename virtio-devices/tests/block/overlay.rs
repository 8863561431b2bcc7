//! Disks that continue on an overlay, while their image is frozen.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use virtio_devices::VirtioDevice;
use virtio_devices::block::{BaseImage, BlockConfig, ImageFormat, LockMode};
use virtio_devices::testing::qemu_img;

use crate::machine::{MIB, Machine, SYNC, config, machine, pattern};
use crate::refused::refusal;

const OLD: [u8; 4096] = [0x55; 4096];
const NEW: [u8; 4096] = [0x66; 4096];

pub(crate) fn writes(image: &Path, format: &str) -> bool {
    let mut qemu_io = Command::new("qemu-io");
    qemu_io.args(["-f", format, "-c", "write 0 512"]).arg(image);
    let run = qemu_io.stdout(Stdio::null()).stderr(Stdio::null()).status();
    run.expect("qemu-io, of the package qemu-utils").success()
}

/// Creates an overlay of the disk.
fn planned(machine: &Machine, suffix: &str) -> PathBuf {
    let planned = machine.handle.plan_overlay(suffix).unwrap();
    planned.create().unwrap();
    planned.path
}

/// Stops the queue, does something to the disk, and starts the queue again.
pub(crate) fn paused<T>(machine: &mut Machine, act: impl FnOnce(&Machine) -> T) -> T {
    let state = machine.device.stop_queue(0).unwrap();
    let done = act(machine);
    let queue = machine.queue.device_side(&machine.transport, state);
    machine.device.start_queue(queue).unwrap();
    done
}

/// The guest writes on, to the overlay; the image keeps what it held at the switch, and nobody else can
/// write to it. Each further overlay does the same. A second disk begins with the frozen image.
#[test]
fn guest_continues_on_overlays() {
    for (name, format) in [("raw", ImageFormat::Raw), ("qcow2", ImageFormat::Qcow2)] {
        let dir = tempfile::tempdir().unwrap();
        let base = dir.path().canonicalize().unwrap().join("disk");
        let base_str = base.to_str().unwrap();
        qemu_img(&["create", "-q", "-f", name, base_str, "4M"]);
        let mut machine = machine(&BlockConfig {
            format: Some(format),
            ..config(&base)
        });
        assert_eq!(machine.write(0, &pattern(1, 2 * MIB)), 0);
        assert_eq!(machine.write(100, &OLD), 0);
        let one = planned(&machine, "1");
        let again = machine.handle.plan_overlay("1").unwrap();
        assert!(again.create().is_err(), "it is there");
        paused(&mut machine, |machine| {
            let overlay = machine.handle.open_overlay(&one).unwrap();
            assert!(!writes(&base, name));
            overlay.switch().unwrap();
            machine.handle.keep_overlay();
        });
        let expected = {
            let mut all = pattern(1, 4 * MIB);
            all[2 * MIB..].fill(0);
            all[51200..55296].copy_from_slice(&OLD);
            all
        };
        let flat = dir.path().join("flat");
        let content = |image: &Path| {
            let (image, flat) = (image.to_str().unwrap(), flat.to_str().unwrap());
            qemu_img(&["convert", "-U", "-O", "raw", image, flat]);
            fs::read(flat).unwrap()
        };
        assert_eq!(machine.read(100, 4096), (0, OLD.to_vec()));
        assert_eq!(machine.write(100, &NEW), 0);
        assert_eq!(machine.request(SYNC, 0, 0, false), 0);
        assert_eq!(machine.read(100, 4096), (0, NEW.to_vec()));
        assert_eq!(machine.read(108, 4096).1, expected[55296..59392]);
        assert_eq!(machine.handle.format(), ImageFormat::Qcow2);
        assert!(content(&base) == expected, "{name}: the image is frozen");
        assert!(!writes(&base, name), "and locked");
        assert!(refusal(&config(&base)).contains("is in use by"));

        let two = planned(&machine, "2");
        paused(&mut machine, |machine| {
            machine.handle.open_overlay(&two).unwrap().switch().unwrap();
        });
        assert_eq!(machine.write(200, &NEW), 0);
        assert_eq!(machine.request(SYNC, 0, 0, false), 0);
        // Another guest begins with the frozen image, and has an overlay of its own.
        let other = BaseImage {
            path: base.clone(),
            format,
            backing_files: false,
            image_dirs: Vec::new(),
            lock: LockMode::ByteRange,
        };
        let third = dir.path().canonicalize().unwrap().join("third");
        other.create_overlay(&third).unwrap();
        let mut second = super::machine::machine(&BlockConfig {
            format: Some(ImageFormat::Qcow2),
            backing_files: true,
            ..config(&third)
        });
        assert_eq!(second.read(100, 4096), (0, OLD.to_vec()));
        drop((machine, second));
        let mut now = expected.clone();
        now[51200..55296].copy_from_slice(&NEW);
        assert!(content(&one) == now);
        now[102_400..106_496].copy_from_slice(&NEW);
        assert!(content(&two) == now);
        for image in [&one, &two, &third] {
            qemu_img(&["check", "-q", image.to_str().unwrap()]);
        }
        let third = third.to_str().unwrap();
        qemu_img(&["compare", "-q", "-f", name, "-F", "qcow2", base_str, third]);
        assert!(writes(&base, name), "the locks end with the disks");
    }
}

/// A switch that is undone before the guest runs leaves the disk as it was.
#[test]
fn disk_returns_to_its_image() {
    for lock in [LockMode::ByteRange, LockMode::Full] {
        let dir = tempfile::tempdir().unwrap();
        let base = dir.path().canonicalize().unwrap().join("disk");
        fs::write(&base, pattern(1, MIB)).unwrap();
        let mut machine = machine(&BlockConfig {
            lock,
            ..config(&base)
        });
        let path = planned(&machine, "1");
        paused(&mut machine, |machine| {
            let overlay = machine.handle.open_overlay(&path).unwrap();
            overlay.switch().unwrap();
            machine.handle.switch_back().unwrap();
        });
        assert_eq!(machine.write(100, &NEW), 0);
        assert_eq!(machine.request(SYNC, 0, 0, false), 0);
        assert_eq!(fs::read(&base).unwrap()[51200..55296], NEW);
        let readonly = BlockConfig {
            readonly: true,
            lock,
            ..config(&base)
        };
        assert!(refusal(&readonly).contains("is in use by"));
        drop(machine);
        assert!(writes(&base, "raw"));
    }
}
