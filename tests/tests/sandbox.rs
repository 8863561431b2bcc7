//! The sandbox of a service, seen from outside. All other tests run in it as well, because it is on by
//! default: a system call that it refuses is in the service's log, and fails the test ([`Service`]'s
//! `drop`).

use std::fs::{self, File};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result};
use guest::{Line, Options, Workload};
use openapi::Client;
use spec::{DiskConfig, LandlockConfig, MigrationPhase, MirrorDisk, VmConfig, VmState};
use tempfile::TempDir;
use tests::{Face, Service, built};

const SOON: Duration = Duration::from_secs(30);

/// A field of a thread's `status`, which is a number.
fn field(task: &Path, name: &str, radix: u32) -> Result<u64> {
    let status = fs::read_to_string(task.join("status"))?;
    let value = status.lines().find_map(|line| line.strip_prefix(name));
    let value = value.context("the status has no such field")?.trim();
    Ok(u64::from_str_radix(
        value.trim_start_matches(':').trim(),
        radix,
    )?)
}

/// Devices of every kind, of which the guest starts all queues. Wants `/dev/net/tun` and CAP_NET_ADMIN.
#[tokio::test]
async fn every_device_works_in_the_sandbox() -> Result<()> {
    let service = Service::start(Face::Many).await?;
    let disk = service.path("disk");
    File::create(&disk)?.set_len(1 << 20)?;
    let body = format!(
        r#"{{"payload": {{}}, "disks": [{{"path": "{}", "image_type": "Raw", "num_queues": 2}}],
            "net": [{{"ip": "10.214.9.1", "mask": "255.255.255.0"}}], "balloon": {{"size": 0}},
            "console": {{"mode": "Pty"}}, "vsock": {{"cid": 3, "socket": "{}"}}}}"#,
        disk.display(),
        service.path("vsock").display()
    );
    let devices: VmConfig = spec::parse(body.as_bytes())?;
    let options = Options {
        workload: Workload::Queues,
        ..Options::default()
    };
    let (pocket, serial) = service.pocket("vm", options)?;
    let config = VmConfig {
        payload: pocket.payload,
        memory: pocket.memory,
        serial: pocket.serial,
        ..devices
    };
    let vm = service.create("vm", config).await?;
    service.client().vms_boot(&vm).await?;
    let started = |line: &Line| matches!(line, Line::Queues { .. });
    serial.wait_for_line("its queues", SOON, started).await?;
    service.client().vms_reboot(&vm).await?;
    service.reaches(&vm, VmState::Running).await?;
    service.client().vms_delete(&vm).await?;
    Ok(())
}

#[tokio::test]
async fn threads_of_guests_are_confined_further() -> Result<()> {
    let service = Service::start(Face::Many).await?;
    let (vm, _) = service.boot_pocket("vm", Options::default()).await?;
    service.reaches(&vm, VmState::Running).await?;
    let mut guests = 0;
    for task in fs::read_dir(format!("/proc/{}/task", service.pid()))? {
        let task = task?.path();
        let name = fs::read_to_string(task.join("comm"))?;
        // KVM's own workers run kernel code only; they copy the filters of whichever thread started
        // them, which differs between kernels.
        if name.starts_with("kvm-") {
            continue;
        }
        let is_vcpu = name.starts_with("vcpu");
        let is_guests = is_vcpu || name.starts_with("pool-");
        guests += usize::from(is_guests);
        assert_eq!(field(&task, "NoNewPrivs", 10)?, 1, "{name}");
        // In mode 2 a filter decides.
        assert_eq!(field(&task, "Seccomp:", 10)?, 2, "{name}");
        let filters = field(&task, "Seccomp_filters", 10)?;
        assert_eq!(filters, if is_guests { 3 } else { 2 }, "{name}");
        let rights = field(&task, "CapEff", 16)?;
        assert!(!is_vcpu || rights == 0, "{name}: {rights:#x}");
        // CAP_SYS_MODULE and CAP_SYS_ADMIN.
        assert_eq!(rights & (1 << 16 | 1 << 21), 0, "{name}: {rights:#x}");
    }
    assert!(guests >= 2, "a vCPU and a loop of devices");
    Ok(())
}

/// A disk of a new file in a folder.
fn disk_in(folder: &TempDir) -> Result<DiskConfig> {
    let path = folder.path().join("disk");
    File::create(&path)?.set_len(1 << 20)?;
    let disk = serde_json::json!({ "path": path, "image_type": "Raw" });
    Ok(serde_json::from_value(disk)?)
}

#[tokio::test]
async fn landlock_in_the_file_of_a_vm_restricts_the_process() -> Result<()> {
    // Its folder has the files of the VM.
    let service = Service::start(Face::Many).await?;
    let (mut config, serial) = service.pocket("vm", Options::default())?;
    let (named, other) = (TempDir::new()?, TempDir::new()?);
    config.landlock_enable = true;
    config.landlock_rules = Some(vec![LandlockConfig {
        path: named.path().to_string_lossy().into_owned(),
        access: "rw".to_owned(),
    }]);
    let (file, socket) = (service.path("vm.json"), service.path("one.sock"));
    fs::write(&file, serde_json::to_vec(&config)?)?;
    let mut program = Command::new(built("whimbrel")?)
        .args(["run", "--api-socket"])
        .args([&socket, &file])
        .stdin(Stdio::null())
        .spawn()?;
    let client = Client::unix(&socket);
    let started = serial
        .wait_for_line("its first line", SOON, |_| true)
        .await
        .is_ok();
    let allowed = client.vm_add_disk(&disk_in(&named)?).await;
    let denied = client.vm_add_disk(&disk_in(&other)?).await;
    let ended = client.shut_service_down().await;
    if ended.is_err() {
        program.kill()?;
    }
    assert!(program.wait()?.success() && started);
    assert!(allowed.is_ok(), "{allowed:?}");
    let denied = format!("{:?}", denied.unwrap_err());
    assert!(denied.contains("Permission denied"), "{denied}");
    Ok(())
}

/// A mirror makes its image where a rule allows that, and nowhere else.
#[tokio::test]
async fn landlock_decides_where_disks_are_mirrored() -> Result<()> {
    let (named, other) = (TempDir::new()?, TempDir::new_in("/var/tmp")?);
    let rule = format!("path={},access=rw", std::env::temp_dir().display());
    let arguments = ["--landlock", "--landlock-rules", &rule].map(str::to_owned);
    let service = Service::start_with(&[], &arguments).await?;
    let (mut config, _serial) = service.pocket("vm", Options::default())?;
    config.disks = Some(vec![disk_in(&named)?]);
    let vm = service.create("vm", config).await?;
    let client = service.client();
    client.vms_boot(&vm).await?;
    let to = |folder: &TempDir| MirrorDisk::at(folder.path().join("new").to_string_lossy());
    let denied = client.vms_mirror_disk(&vm, "_disk0", &to(&other)).await;
    let denied = format!("{:?}", denied.unwrap_err());
    assert!(denied.contains("Permission denied"), "{denied}");
    let other_path = other.path().to_string_lossy();
    assert!(denied.contains(&*other_path), "{denied}");
    let begun = client.vms_mirror_disk(&vm, "_disk0", &to(&named)).await?;
    let id = begun.id.parse()?;
    let ended = service
        .until(&id, SOON, |info| info.phase.is_over())
        .await?;
    assert_eq!(ended.phase, MigrationPhase::Completed, "{ended:?}");
    assert!(named.path().join("new").exists() && !other.path().join("new").exists());
    Ok(())
}
