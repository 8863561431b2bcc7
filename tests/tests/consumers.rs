//! A client that others generated from Cloud Hypervisor's document drives the life of a VM.

use std::fs::File;
use std::time::Duration;

use anyhow::{Result, ensure};
use cloud_hypervisor_client::apis::{DefaultApi as _, Error};
use cloud_hypervisor_client::models::{
    ConsoleConfig, ConsoleMode, DiskConfig, PayloadConfig, SerialConfig, VmConfig, VmRemoveDevice,
    VmState,
};
use cloud_hypervisor_client::socket_based_api_client;
use guest::Options;
use tests::{Face, Serial, Service};

const SOON: Duration = Duration::from_secs(30);

#[tokio::test]
async fn cloud_hypervisor_client_drives_the_life_of_a_vm() -> Result<()> {
    let service = Service::start(Face::One).await?;
    let client = socket_based_api_client(service.socket());
    client.vmm_ping_get().await?;

    let (kernel, serial) = (service.path("pocket.elf"), service.path("serial"));
    std::fs::write(&kernel, guest::IMAGE)?;
    let beating = Options {
        heartbeat_ms: Some(20),
        ..Options::default()
    };
    let mut config = VmConfig::new(PayloadConfig {
        kernel: Some(kernel.display().to_string()),
        cmdline: Some(beating.to_string()),
        ..PayloadConfig::new()
    });
    config.serial = Some(SerialConfig {
        file: Some(serial.display().to_string()),
        ..SerialConfig::new(ConsoleMode::File)
    });
    config.console = Some(ConsoleConfig::new(ConsoleMode::Off));
    client.create_vm(config).await?;
    let info = client.vm_info_get().await?;
    ensure!(info.state == VmState::Created, "{:?}", info.state);

    client.boot_vm().await?;
    let serial = Serial::at(serial);
    serial.wait_for("pocket: heartbeat", 1, SOON).await?;
    client.pause_vm().await?;
    let info = client.vm_info_get().await?;
    ensure!(info.state == VmState::Paused, "{:?}", info.state);
    client.resume_vm().await?;

    let disk = service.path("disk");
    File::create(&disk)?.set_len(1 << 20)?;
    let added = DiskConfig {
        path: Some(disk.display().to_string()),
        id: Some("extra".to_owned()),
        ..DiskConfig::new()
    };
    let added = client.vm_add_disk_put(added).await?;
    ensure!(added.id == "extra", "{added:?}");
    let removed = VmRemoveDevice {
        id: Some("extra".to_owned()),
    };
    client.vm_remove_device_put(removed).await?;

    client.reboot_vm().await?;
    serial.wait_for("pocket: hello", 2, SOON).await?;
    client.shutdown_vm().await?;
    client.delete_vm().await?;
    // A refusal is an answer that the client parses: a status and a body.
    let refused = client.boot_vm().await.err();
    ensure!(matches!(refused, Some(Error::Api(_))), "{refused:?}");
    Ok(client.shutdown_vmm().await?)
}
