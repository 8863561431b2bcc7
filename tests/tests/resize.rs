//! An unmodified Debian system that gets vCPUs and memory, and gives back what it can, while it runs. Wants a complete
//! KVM, and the disks of `ci/debian-disk`: `ci/test e2e` runs it in the rig.

use std::time::{Duration, Instant};

use anyhow::{Result, bail, ensure};
use spec::{CpusConfig, HotplugMethod, MemoryConfig, MemoryMode, NumaConfig, VmConfig, VmResize};
use tests::{Face, Machine, RUNS, Service};

const MIB: u64 = 1 << 20;

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

/// Memory of two zones, and two NUMA nodes that have one each.
fn two_nodes() -> Result<(MemoryConfig, Vec<NumaConfig>)> {
    let memory = serde_json::json!({ "size": 0, "zones": [
        { "id": "near", "size": 256 * MIB, "host_numa_node": 0 },
        { "id": "far", "size": 128 * MIB },
    ]});
    let nodes = serde_json::json!([
        { "guest_numa_id": 0, "cpus": [0, 3], "memory_zones": ["near"],
          "distances": [{ "destination": 1, "distance": 27 }] },
        { "guest_numa_id": 1, "cpus": [1, 2], "memory_zones": ["far"],
          "distances": [{ "destination": 0, "distance": 33 }], "pci_segments": [0] },
    ]);
    Ok((
        serde_json::from_value(memory)?,
        serde_json::from_value(nodes)?,
    ))
}

/// Checks that the guest's kernel has the nodes of [`two_nodes`], with these vCPUs online.
async fn has_nodes(machine: &mut Machine, cpus: [&str; 2]) -> Result<()> {
    let seen = machine
        .run(
            "cd /sys/devices/system/node; cat node[0-9]*/cpulist node[0-9]*/distance; \
             cat node[0-9]*/meminfo | grep MemTotal; cat /sys/bus/pci/devices/*/numa_node | sort -u; cd",
        )
        .await?;
    let lines: Vec<_> = seen.lines().map(str::trim).collect();
    let [
        first,
        second,
        near,
        far,
        first_memory,
        second_memory,
        devices,
    ] = lines[..]
    else {
        bail!("these are not two nodes: {seen}");
    };
    ensure!([first, second] == cpus, "{seen}");
    ensure!([near, far] == ["10 27", "33 10"], "{seen}");
    ensure!(devices == "1", "PCI devices are in another node: {seen}");
    let kib = |line: &str| -> Result<u64> {
        let number = line.split_whitespace().nth(3);
        number.map_or_else(|| bail!("no MemTotal: {line}"), |kib| Ok(kib.parse()?))
    };
    // The kernel keeps some for itself.
    for (line, mib) in [(first_memory, 256), (second_memory, 128)] {
        let (has, most) = (kib(line)?, mib * 1024);
        ensure!(has <= most && has > most * 3 / 5, "{seen}");
    }
    Ok(())
}

#[tokio::test]
#[ignore = "wants a complete KVM: ci/test e2e runs it in the rig"]
async fn debian_gets_vcpus_and_gives_them_back_between_moves() -> Result<()> {
    let disk = r#"{"path":"/dev/vda","image_type":"Raw"}"#;
    let service = Service::start(Face::Many).await?;
    let (memory, nodes) = two_nodes()?;
    let mut machine = Machine::boot(service, disk, |_: &Service, config: &mut VmConfig| {
        config.cpus = CpusConfig::with_vcpus(4);
        config.cpus.boot_vcpus = 2;
        (config.memory, config.numa) = (memory, Some(nodes));
    })
    .await?;
    sees(&mut machine, 2).await?;
    has_nodes(&mut machine, ["0", "1"]).await?;
    let mut left = Vec::new();
    // The second time the vCPUs are those that were ejected, or were made at the destination.
    for (round, mode) in [MemoryMode::Precopy, MemoryMode::Hybrid]
        .into_iter()
        .enumerate()
    {
        resize(&machine, 4).await?;
        sees(&mut machine, 4).await?;
        has_nodes(&mut machine, ["0,3", "1-2"]).await?;
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

const BOOT: u64 = 384 * MIB;
/// Brings all memory online, for pages that can be moved away again.
const ONLINE: &str = "{ for s in /sys/devices/system/memory/memory*/state; do echo online_movable >$s; \
                      done; } 2>/dev/null; true";

/// Has a machine resized to so much memory and so many vCPUs, and waits until its guest has done it.
async fn resize_both(machine: &mut Machine, ram: u64, vcpus: u32) -> Result<()> {
    let sizes = VmResize {
        desired_ram: Some(ram),
        desired_vcpus: Some(vcpus),
        ..VmResize::default()
    };
    machine.client().vms_resize(&machine.vm, &sizes).await?;
    let start = Instant::now();
    loop {
        // A distribution's udev rules have it brought online.
        machine.run(ONLINE).await?;
        let info = machine.client().vms_info(&machine.vm).await?;
        match (&info.pending_resizes[..], info.memory_actual_size) {
            ([], actual) if actual == ram => return Ok(()),
            ([], actual) => bail!("the guest stays at {actual} bytes"),
            (pending, _) if start.elapsed() > RUNS => bail!("still pending: {pending:?}"),
            _ => tokio::time::sleep(Duration::from_millis(50)).await,
        }
    }
}

/// KiB that the guest's kernel manages.
async fn mem_total(machine: &mut Machine) -> Result<u64> {
    let line = machine.run("grep MemTotal /proc/meminfo").await?;
    let number = line.split_whitespace().nth(1);
    number.map_or_else(|| bail!("no MemTotal: {line}"), |kib| Ok(kib.parse()?))
}

/// Waits until the guest's kernel manages `more` KiB than `base`.
async fn has(machine: &mut Machine, base: u64, more: u64) -> Result<()> {
    let start = Instant::now();
    loop {
        machine.run(ONLINE).await?;
        let total = mem_total(machine).await?;
        if total == base + more {
            return Ok(());
        }
        if start.elapsed() > RUNS {
            let log = machine.run("dmesg | tail -20; lsmem").await?;
            bail!("MemTotal is {total} KiB and was {base} KiB, {more} KiB were added: {log}");
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

/// The guest's memory grows between two moves, and what it writes there moves with it.
#[tokio::test]
#[ignore = "wants a complete KVM: ci/test e2e runs it in the rig"]
async fn debian_gets_memory_by_acpi_between_moves() -> Result<()> {
    let disk = r#"{"path":"/dev/vda","image_type":"Raw"}"#;
    let service = Service::start(Face::Many).await?;
    let mut machine = Machine::boot(service, disk, |_: &Service, config: &mut VmConfig| {
        config.memory.size = BOOT;
        config.memory.hotplug_method = HotplugMethod::Acpi;
        config.memory.hotplug_size = Some(512 * MIB);
        config.cpus = CpusConfig::with_vcpus(2);
        config.cpus.boot_vcpus = 1;
    })
    .await?;
    let base = mem_total(&mut machine).await?;
    let mut left = Vec::new();
    let mut sums = String::new();
    for (round, mode) in [MemoryMode::Precopy, MemoryMode::Hybrid]
        .into_iter()
        .enumerate()
    {
        let more = (round as u64 + 1) * 128 * MIB;
        resize_both(&mut machine, BOOT + more, 2).await?;
        has(&mut machine, base, more >> 10).await?;
        // The kernel takes the highest addresses first: those that were added.
        let write = format!("head -c 16M /dev/urandom >/dev/shm/{round}; md5sum /dev/shm/*");
        sums = machine.run(&write).await?;
        println!("round {round}: {more} more bytes");
        let there = Service::start(Face::Many).await?;
        let (before, _) = machine.move_to(there, "127.0.0.1", mode).await?;
        left.push(before);
        has(&mut machine, base, more >> 10).await?;
        let moved = machine.run("md5sum /dev/shm/*").await?;
        ensure!(moved == sums, "{moved} was {sums}");
    }
    ensure!(sums.contains("/dev/shm/1"), "{sums}");
    let log = machine.run("dmesg | grep -i 'memory hotplug\\|acpi.*fail' || true");
    println!("the guest's kernel says: {:?}", log.await?);
    machine.power_off().await
}

/// Linux's driver of virtio-mem plugs memory, keeps what is in it over a move, and gives it back.
#[tokio::test]
#[ignore = "wants a complete KVM: ci/test e2e runs it in the rig"]
async fn debian_gets_memory_by_virtio_mem_and_gives_it_back() -> Result<()> {
    let disk = r#"{"path":"/dev/vda","image_type":"Raw"}"#;
    let service = Service::start(Face::Many).await?;
    let mut machine = Machine::boot(service, disk, |_: &Service, config: &mut VmConfig| {
        config.memory.size = BOOT;
        config.memory.hotplug_method = HotplugMethod::VirtioMem;
        config.memory.hotplug_size = Some(512 * MIB);
        config.cpus = CpusConfig::with_vcpus(1);
    })
    .await?;
    let base = mem_total(&mut machine).await?;
    resize_both(&mut machine, BOOT + 256 * MIB, 1).await?;
    has(&mut machine, base, 256 << 10).await?;
    let sum = machine
        .run("head -c 32M /dev/urandom >/dev/shm/file; md5sum /dev/shm/file")
        .await?;
    let there = Service::start(Face::Many).await?;
    let (_before, _) = machine
        .move_to(there, "127.0.0.1", MemoryMode::Hybrid)
        .await?;
    has(&mut machine, base, 256 << 10).await?;
    // The driver moves pages away from the blocks that it unplugs.
    for more in [64, 0] {
        resize_both(&mut machine, BOOT + more * MIB, 1).await?;
        has(&mut machine, base, more << 10).await?;
        let moved = machine.run("md5sum /dev/shm/file").await?;
        ensure!(moved == sum, "{moved} was {sum}");
    }
    let log = machine.run("dmesg | grep -i virtio_mem || true").await?;
    println!("the guest's kernel says: {log:?}");
    machine.power_off().await
}
