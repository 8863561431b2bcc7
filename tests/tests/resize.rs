//! An unmodified Debian system that gets vCPUs and gives them back while it runs. Wants a complete
//! KVM, and the disks of `ci/debian-disk`: `ci/test e2e` runs it in the rig.

use std::time::{Duration, Instant};

use anyhow::{Result, bail, ensure};
use spec::{CpusConfig, MemoryMode, VmConfig, VmResize};
use tests::{Face, Machine, RUNS, Service};

/// Has a machine resized, and waits until its guest has done it.
async fn resize(machine: &Machine, vcpus: u32) -> Result<()> {
    let sizes = VmResize {
        desired_vcpus: Some(vcpus),
        ..VmResize::default()
    };
    let (client, vm, start) = (machine.client(), &machine.vm, Instant::now());
    client.vms_resize(vm, &sizes).await?;
    loop {
        let info = client.vms_info(vm).await?;
        match (&info.pending_resizes[..], info.vcpus_actual_count) {
            ([], Some(actual)) if actual == vcpus => return Ok(()),
            ([], actual) => bail!("the guest stays at {actual:?} vCPUs"),
            (pending, _) if start.elapsed() > RUNS => bail!("still pending: {pending:?}"),
            _ => tokio::time::sleep(Duration::from_millis(50)).await,
        }
    }
}

/// Waits until the guest has so many vCPUs online: it starts those that are plugged by itself, or with
/// this command's help, as a distribution's udev rules have it.
async fn sees(machine: &mut Machine, vcpus: u32) -> Result<()> {
    let online = format!(
        "for i in $(seq 300); do for c in /sys/devices/system/cpu/cpu[1-9]*/online; do \
         [ \"$(cat $c)\" = 1 ] || echo 1 >$c; done 2>/dev/null; \
         [ \"$(nproc)\" = {vcpus} ] && break; sleep 0.1; done; nproc; \
         ls -d /sys/devices/system/cpu/cpu[0-9]* | wc -l"
    );
    let seen = machine.run(&online).await?;
    let wanted = format!("{vcpus}\n{vcpus}");
    if seen.replace('\r', "") != wanted {
        let log = machine
            .run("dmesg | tail -20; cat /sys/devices/system/cpu/{present,possible,online}")
            .await?;
        bail!("wanted {wanted:?}, seen {seen:?}: {log}");
    }
    Ok(())
}

#[tokio::test]
#[ignore = "wants a complete KVM: ci/test e2e runs it in the rig"]
async fn debian_gets_vcpus_and_gives_them_back_between_moves() -> Result<()> {
    let disk = r#"{"path":"/dev/vda","image_type":"Raw"}"#;
    let service = Service::start(Face::Many).await?;
    let mut machine = Machine::boot(service, disk, |_: &Service, config: &mut VmConfig| {
        config.memory.size = 384 << 20;
        config.cpus = CpusConfig::with_vcpus(4);
        config.cpus.boot_vcpus = 2;
    })
    .await?;
    sees(&mut machine, 2).await?;
    let mut left = Vec::new();
    // The second time the vCPUs are those that were ejected, or were made at the destination.
    for (round, mode) in [MemoryMode::Precopy, MemoryMode::Hybrid]
        .into_iter()
        .enumerate()
    {
        resize(&machine, 4).await?;
        sees(&mut machine, 4).await?;
        println!("round {round}: 4 vCPUs");
        let there = Service::start(Face::Many).await?;
        let (before, _) = machine.move_to(there, "127.0.0.1", mode).await?;
        left.push(before);
        sees(&mut machine, 4).await?;
        resize(&machine, 2).await?;
        sees(&mut machine, 2).await?;
        println!("round {round}: moved with 4 vCPUs, and back to 2");
        let there = Service::start(Face::Many).await?;
        let (before, _) = machine.move_to(there, "127.0.0.1", mode).await?;
        left.push(before);
        sees(&mut machine, 2).await?;
    }
    let log = machine
        .run("dmesg | grep -i 'tsc.*unstable\\|tsc.*warp\\|eject incomplete\\|cpu.*failed' || true")
        .await?;
    ensure!(!log.to_lowercase().contains("eject incomplete"), "{log}");
    println!("the guest's kernel says: {log:?}");
    machine.power_off().await
}
