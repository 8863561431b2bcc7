//! An unmodified Debian kernel as guest, driven over REST. Wants a complete KVM: `ci/test e2e`
//! runs it in the rig.

use std::env;
use std::time::Duration;

use anyhow::{Context as _, Result};
use spec::{
    ConsoleConfig, ConsoleMode, CpusConfig, PayloadConfig, SerialConfig, VmConfig, VmState,
};
use tests::{Face, Serial, Service};

/// Booting takes seconds on silicon, and a minute or two where the host is emulated.
const BOOTS: Duration = Duration::from_secs(300);

async fn boots_reboots_and_obeys_the_button(vcpus: u32) -> Result<()> {
    let guest = env::var("WHIMBREL_DEBIAN_GUEST")
        .context("WHIMBREL_DEBIAN_GUEST names the folder that ci/debian-guest made")?;
    let service = Service::start(Face::Many).await?;
    let serial = Serial::at(service.path("debian.serial"));
    let mut config = VmConfig::with_payload(PayloadConfig {
        kernel: Some(format!("{guest}/vmlinuz")),
        initramfs: Some(format!("{guest}/initramfs")),
        cmdline: Some("console=ttyS0 panic=-1".to_owned()),
        ..PayloadConfig::default()
    });
    config.cpus = CpusConfig::with_vcpus(vcpus);
    config.memory.size = 512 << 20;
    config.serial = SerialConfig {
        file: Some(serial.path().to_string_lossy().into_owned()),
        socket: None,
        mode: ConsoleMode::File,
    };
    config.console = ConsoleConfig::with_mode(ConsoleMode::Off);
    let vm = service.create("debian", config).await?;
    let client = service.client();

    client.vms_boot(&vm).await?;
    let up = format!("guest: up cpus={vcpus} ");
    serial.wait_for(&up, 1, BOOTS).await?;
    // The line after it: then this one is whole.
    let text = serial
        .wait_for("guest: waiting for the power button", 1, BOOTS)
        .await?;
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
    let text = serial.wait_for(&up, 2, BOOTS).await?;
    assert_eq!(text.matches("Linux version").count(), 2, "{text}");
    println!("{vcpus} vCPU: rebooted: it is up again");

    serial
        .wait_for("guest: waiting for the power button", 2, BOOTS)
        .await?;
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

#[tokio::test]
#[ignore = "wants a complete KVM: ci/test e2e runs it in the rig"]
async fn debian_boots_with_two_vcpus() -> Result<()> {
    boots_reboots_and_obeys_the_button(2).await
}
