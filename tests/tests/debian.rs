//! An unmodified Debian kernel as guest, driven over REST. Wants a complete KVM: `ci/test e2e`
//! runs it in the rig.

use std::fs::File;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use serde_json::json;
use spec::{
    CpusConfig, DiskConfig, MemoryRestoreMode, MigrationPhase, RestoreConfig, VmConfig,
    VmRemoveDevice, VmState,
};
use tests::debian::BUTTON;
use tests::{Face, Serial, Service, debian, snapshots};

/// Booting takes seconds on silicon, and a minute or two where the host is emulated.
const BOOTS: Duration = Duration::from_secs(300);

/// Debian, with its serial port in a file of the service.
fn debian(service: &Service, vcpus: u32) -> Result<(VmConfig, Serial)> {
    let serial = Serial::at(service.path("debian.serial"));
    let config = debian::config(CpusConfig::with_vcpus(vcpus), 512 << 20, &serial)?;
    Ok((config, serial))
}

async fn boots_reboots_and_obeys_the_button(vcpus: u32) -> Result<()> {
    let service = Service::start(Face::Many).await?;
    let (config, serial) = debian(&service, vcpus)?;
    let vm = service.create("debian", config).await?;
    let client = service.client();

    client.vms_boot(&vm).await?;
    let up = format!("guest: up cpus={vcpus} ");
    service.prints(&vm, &serial, &up, 1, BOOTS).await?;
    // The line after it: then this one is whole.
    let text = service.prints(&vm, &serial, BUTTON, 1, BOOTS).await?;
    for line in text
        .lines()
        .filter(|line| line.contains("Linux version") || line.contains("guest: up"))
    {
        println!("{vcpus} vCPU: {}", line.trim_end());
    }
    assert!(
        text.lines()
            .any(|line| line.contains("Linux version") && line.contains("Debian")),
        "{text}"
    );

    let map = client.vms_memory_map(&vm).await?;
    if vcpus == 1 {
        println!("{map}");
    }
    let flat = map.to_string();
    assert!(
        flat.contains("ram below 4G") && flat.contains("msix-table"),
        "{flat}"
    );

    client.vms_reboot(&vm).await?;
    let text = service.prints(&vm, &serial, &up, 2, BOOTS).await?;
    assert_eq!(text.matches("Linux version").count(), 2, "{text}");
    println!("{vcpus} vCPU: rebooted: it is up again");

    service.prints(&vm, &serial, BUTTON, 2, BOOTS).await?;
    client.vms_power_button(&vm).await?;
    let info = service.reaches(&vm, VmState::Shutdown).await?;
    assert_eq!(info.failure, None);
    let text = serial.text();
    assert!(text.contains("guest: power button"), "{text}");
    println!("{vcpus} vCPU: the guest saw the power button, and powered off");
    Ok(())
}

#[tokio::test]
#[ignore = "wants a complete KVM: ci/test e2e runs it in the rig"]
async fn debian_boots_with_one_vcpu() -> Result<()> {
    boots_reboots_and_obeys_the_button(1).await
}

/// A live snapshot of a running system, and the system from it in each way of giving it its memory. Debian's cloud kernel has no driver for the generation ID, so the
/// tests with the pocket guest show that one.
#[tokio::test]
#[ignore = "wants a complete KVM: ci/test e2e runs it in the rig"]
async fn debian_comes_back_from_a_live_snapshot() -> Result<()> {
    let service = Service::start(Face::Many).await?;
    let (mut config, serial) = debian(&service, 1)?;
    // The rig's kernel can protect shared memory only.
    config.memory.shared = true;
    let vm = service.create("debian", config).await?;
    let client = service.client();
    client.vms_boot(&vm).await?;
    service.prints(&vm, &serial, BUTTON, 1, BOOTS).await?;
    let dir = service.path("snapshot");
    let taken = snapshots::snapshot(&service, &vm, &dir).await;
    assert_eq!(taken.phase, MigrationPhase::Completed, "{taken:?}");
    client.vms_delete(&vm).await?;
    println!("stop {:?}", taken.downtime);
    for mode in [
        MemoryRestoreMode::Copy,
        MemoryRestoreMode::OnDemand,
        MemoryRestoreMode::Map,
    ] {
        let before = serial.text().matches("guest: power button").count();
        let what = RestoreConfig {
            memory_restore_mode: mode,
            ..snapshots::from(&dir, true)
        };
        let begun = client.vms_restore(&vm, &what).await?;
        let came = snapshots::over(&service, &begun).await;
        assert_eq!(came.phase, MigrationPhase::Completed, "{mode:?}: {came:?}");
        client.vms_power_button(&vm).await?;
        let info = service.reaches(&vm, VmState::Shutdown).await?;
        assert_eq!(info.failure, None, "{mode:?}");
        let text = serial.text();
        let pressed = text.matches("guest: power button").count();
        assert_eq!(pressed, before + 1, "{mode:?}: {text}");
        client.vms_delete(&vm).await?;
        println!("{mode:?}: the guest runs, and obeys its power button");
    }
    Ok(())
}

#[tokio::test]
#[ignore = "wants a complete KVM: ci/test e2e runs it in the rig"]
async fn debian_boots_with_two_vcpus() -> Result<()> {
    boots_reboots_and_obeys_the_button(2).await
}

/// The maximum number of devices: a kernel finds those that share slots, and ejects one that has its own.
#[tokio::test]
#[ignore = "wants a complete KVM: ci/test e2e runs it in the rig"]
async fn debian_finds_64_devices() -> Result<()> {
    const DISKS: usize = 63;
    const USED: &str = "512-byte logical blocks";
    let service = Service::start(Face::Many).await?;
    let (mut config, serial) = debian(&service, 1)?;
    let disk = |i| -> Result<DiskConfig> {
        let path = service.path(format!("{i}.raw"));
        File::create(&path)?.set_len(1 << 20)?;
        Ok(serde_json::from_value(
            json!({ "path": path, "id": format!("disk{i}") }),
        )?)
    };
    config.disks = Some((0..DISKS).map(disk).collect::<Result<_>>()?);
    let vm = service.create("debian", config).await?;
    let client = service.client();
    client.vms_boot(&vm).await?;
    service.prints(&vm, &serial, USED, DISKS, BOOTS).await?;
    service.prints(&vm, &serial, BUTTON, 1, BOOTS).await?;

    let remove = |id: &str| VmRemoveDevice { id: id.to_owned() };
    let shared = client.vms_remove_device(&vm, &remove("disk62")).await;
    assert_eq!(shared.unwrap_err().code(), Some("device-shares-slot"));
    client.vms_remove_device(&vm, &remove("disk1")).await?;
    let start = Instant::now();
    loop {
        let tree = client
            .vms_info(&vm)
            .await?
            .device_tree
            .unwrap_or_default()
            .0;
        if !tree.contains_key("disk1") {
            assert_eq!(tree.len(), 63);
            break;
        }
        assert!(start.elapsed() < BOOTS, "{}", serial.text());
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    let added = client.vms_add_disk(&vm, &disk(DISKS)?).await?;
    let added = added.context("a device of a running guest")?;
    service.prints(&vm, &serial, USED, DISKS + 1, BOOTS).await?;
    println!(
        "64 devices: all found, one removed, another added at {}",
        added.bdf
    );
    Ok(())
}
