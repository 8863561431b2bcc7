//! A Debian system with a raw and a qcow2 disk moves between services that share no image, while it
//! writes to both; before that one of its disks is mirrored. Wants a complete KVM, and the disks of `ci/debian-disk`: `ci/test e2e` runs it in the
//! rig.

#![allow(clippy::unwrap_used, reason = "tests")]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use spec::{
    AtDeadline, CpusConfig, MemoryMode, MigrationPhase, MirrorDisk, StartMigration, StorageMode,
    VmConfig, VmId,
};
use tests::{Face, Machine, Service};

const MIB: u64 = 1 << 20;

fn qemu_img(arguments: &[&str]) -> Result<()> {
    let run = Command::new("qemu-img").args(arguments).output()?;
    let told = String::from_utf8_lossy(&run.stdout).into_owned();
    let error = String::from_utf8_lossy(&run.stderr);
    ensure!(run.status.success(), "{arguments:?}: {told}{error}");
    Ok(())
}

/// A service that takes disks, and the directory for their images.
async fn destination(name: &str) -> Result<(Service, PathBuf)> {
    let images = PathBuf::from(format!("/tmp/images-{name}"));
    fs::create_dir_all(&images)?;
    let options = [
        "--migration-storage".to_owned(),
        images.to_string_lossy().into_owned(),
    ];
    Ok((Service::start_with(&[], &options).await?, images))
}

fn images(at: &Path) -> [PathBuf; 2] {
    ["debian-_disk0.qcow2", "debian-data.raw"].map(|name| at.join(name))
}

/// Has the guest write to both disks, file by file, until it is stopped, and note the sums.
const WRITE: &str = "rm -f /tmp/stop /tmp/sums /tmp/written /root/file.* /mnt/file.*; \
     ( (i=0; while [ ! -e /tmp/stop ]; do i=$((i + 1)); for to in /root/file /mnt/file; do \
     head -c 40000 /dev/urandom >$to.$i; sha256sum $to.$i >>/tmp/sums; done; \
     [ $((i % 10)) = 0 ] && sync; sleep 1; done; touch /tmp/written) >/dev/null 2>&1 & )";

/// Stops that, and has the guest read all files from its disks.
const CHECK: &str = "touch /tmp/stop; \
     for i in $(seq 300); do [ -e /tmp/written ] && break; sleep 0.2; done; \
     sync; echo 3 >/proc/sys/vm/drop_caches; \
     sha256sum -c --quiet /tmp/sums && wc -l </tmp/sums";

async fn check(machine: &mut Machine) -> Result<()> {
    let files = machine.run(CHECK).await?;
    ensure!(files.parse::<u32>()? >= 2, "{files}");
    let errors = "dmesg | grep -ciE 'i/o error|ext4.*error' || true";
    let errors = machine.run(errors).await?;
    ensure!(errors == "0", "{errors} errors of disks");
    println!("{files} files are whole");
    Ok(())
}

/// Has the second disk continue on another image, while the guest writes to it.
async fn mirror(machine: &Machine, path: &str) -> Result<()> {
    let (client, what) = (machine.client(), MirrorDisk::at(path));
    let mut info = client.vms_mirror_disk(&machine.vm, "data", &what).await?;
    let id: VmId = info.id.parse()?;
    while !info.phase.is_over() {
        tokio::time::sleep(Duration::from_millis(50)).await;
        info = client.migrations_info(&id).await?;
    }
    ensure!(info.phase == MigrationPhase::Completed, "{info:?}");
    println!(
        "mirror: {} ms, {} MiB in {} rounds, {:?}",
        info.elapsed_us / 1000,
        info.sent_bytes / MIB,
        info.rounds,
        info.downtime
    );
    Ok(())
}

#[tokio::test]
#[ignore = "wants a complete KVM: ci/test e2e runs it in the rig"]
async fn debian_moves_with_its_disks_while_it_writes() -> Result<()> {
    let service = Service::start(Face::Many).await?;
    let [data, mirrored] =
        ["data.raw", "mirrored.raw"].map(|name| service.path(name).to_string_lossy().into_owned());
    qemu_img(&["create", "-q", "-f", "raw", &data, "128M"])?;
    let root = r#"{"path":"/dev/vdb","image_type":"Qcow2"}"#;
    let mut machine = Machine::boot(service, root, |_, config: &mut VmConfig| {
        config.memory.size = 384 * MIB;
        // The emulated host has one CPU, which the guest shares with both services and this test.
        config.cpus = CpusConfig::with_vcpus(1);
        let disk = format!(r#"{{"path":"{data}","id":"data","image_type":"Raw"}}"#);
        let disk = serde_json::from_str(&disk).unwrap();
        config.disks.get_or_insert_default().push(disk);
    })
    .await?;
    machine
        .run("mkfs.ext4 -q /dev/vdb && mount /dev/vdb /mnt")
        .await?;
    machine.run(WRITE).await?;
    mirror(&machine, &mirrored).await?;
    let mut left = Vec::new();
    let mut last: Option<PathBuf> = None;
    for (name, mode, is_paused) in [
        ("b", MemoryMode::Precopy, false),
        ("c", MemoryMode::Postcopy, false),
        ("d", MemoryMode::Precopy, true),
    ] {
        // The first move is behind the mirror: what the guest wrote during both is checked.
        if last.is_some() {
            machine.run(WRITE).await?;
        }
        if is_paused {
            check(&mut machine).await?;
            machine.client().vms_pause(&machine.vm).await?;
        }
        let (there, at) = destination(name).await?;
        let what = StartMigration {
            mode,
            storage: StorageMode::Copy,
            max_downtime_ms: 3000,
            // Where all is emulated a guest may write as fast as its memory can be copied.
            deadline_s: 100,
            at_deadline: Some(AtDeadline::Stop),
            stop_limit_ms: Some(180_000),
            verify: true,
            ..StartMigration::to("")
        };
        let info = machine.migrate_as(&there, "127.0.0.1", what).await?;
        ensure!(
            info.phase == MigrationPhase::Completed,
            "{info:?}\n{}",
            there.log()
        );
        ensure!(info.disk_bytes == (1024 + 128) * MIB, "{info:?}");
        println!(
            "{mode} to {name}: {} ms, {} MiB sent in {} rounds, {:?}",
            info.elapsed_us / 1000,
            info.sent_bytes / MIB,
            info.rounds,
            info.downtime
        );
        if let (true, Some(before)) = (is_paused, &last) {
            // Nothing was written since the copy began: the images are the same.
            let formats = ["qcow2", "raw"];
            for ((before, now), format) in images(before).iter().zip(images(&at)).zip(formats) {
                let (before, now) = (
                    before.to_str().context("UTF-8")?,
                    now.to_str().context("UTF-8")?,
                );
                qemu_img(&[
                    "compare", "-q", "-U", "-f", format, "-F", format, before, now,
                ])?;
                println!("{before} and {now} are the same");
            }
        }
        left.push(machine.arrive(there).await?);
        check(&mut machine).await?;
        if let Some(before) = last.replace(at) {
            fs::remove_dir_all(before)?;
        }
    }
    machine.power_off().await?;
    let [qcow2, _] = images(&last.context("it moved")?);
    qemu_img(&[
        "check",
        "-q",
        "-f",
        "qcow2",
        qcow2.to_str().context("UTF-8")?,
    ])
}
