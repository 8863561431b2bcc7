//! EDK2's firmware boots an unmodified Debian from a disk with an EFI system partition. Wants a
//! complete KVM, the disks of `ci/debian-disk` and the firmware of `ci/firmware`: `ci/test firmware`
//! runs it in the rig.

#![allow(clippy::unwrap_used, reason = "tests")]

use std::env;

use anyhow::{Context as _, Result, ensure};
use spec::{MemoryMode, PayloadConfig};
use tests::{Machine, Network, Service};

/// The third disk of the rig.
const DISK: &str = r#"{"path":"/dev/vdc","image_type":"Raw"}"#;

const UUID: &str = "00112233-4455-6677-8899-aabbccddeeff";

/// The guest was started by its firmware, from its own disk.
async fn has_booted_by_firmware(machine: &mut Machine) -> Result<()> {
    let command = "cat /proc/cmdline; ls -d /sys/firmware/efi; findmnt -n -o SOURCE /";
    let printed = machine.run(command).await?;
    for expected in ["root=/dev/vda2", "/sys/firmware/efi", "\n/dev/vda2"] {
        ensure!(printed.contains(expected), "{printed}, not {expected}");
    }
    Ok(())
}

#[tokio::test]
#[ignore = "wants a complete KVM: ci/test firmware runs it in the rig"]
async fn debian_boots_by_itself_from_an_efi_partition() -> Result<()> {
    let firmware = env::var("WHIMBREL_FIRMWARE")
        .context("WHIMBREL_FIRMWARE names the file that ci/firmware made")?;
    let network = Network::with_hosts(&["north", "south"])?;
    let service = Service::start_on("north").await?;
    let mut machine = Machine::boot(service, DISK, |_, config| {
        config.payload = PayloadConfig {
            firmware: Some(firmware),
            ..PayloadConfig::default()
        };
        config.memory.size = 512 << 20;
        let identity = serde_json::json!({
            "system_product_name": "Road Runner", "system_serial_number": "SN-0815",
            "system_uuid": UUID, "chassis_asset_tag": "tag 99", "oem_strings": ["first=1", "second"],
        });
        config.platform = Some(serde_json::from_value(identity).unwrap());
    })
    .await?;
    has_booted_by_firmware(&mut machine).await?;
    println!("the guest has booted from its disk");
    let tables = machine.run("dmidecode").await?;
    for line in [
        "Product Name: Road Runner",
        "Serial Number: SN-0815",
        &format!("UUID: {UUID}"),
        "Asset Tag: tag 99",
        "String 2: second",
    ] {
        ensure!(tables.contains(line), "{tables}, not {line}");
    }
    println!("the guest has its identity");

    // Its firmware's services go with it.
    let there = Service::start_on("south").await?;
    let address = network.address("south")?;
    let (left, info) = machine
        .move_to(there, &address, MemoryMode::Precopy)
        .await?;
    println!("the guest has moved: {:?}", info.phase);
    machine.reboot().await?;
    has_booted_by_firmware(&mut machine).await?;
    println!("the guest has rebooted through its firmware");
    machine.power_off().await?;
    println!("the guest has powered off");
    drop(left);
    Ok(())
}
