//! Devices in the stop: they are loaded in it, with one commit of the memory map.

use anyhow::{Context as _, Result, ensure};
use guest::{Line, Options, Workload};
use serde_json::json;
use spec::{StartMigration, VmConfig};
use tests::{Face, Service};

use crate::terminal::Terminal;
use crate::{MIB, guest_config, median_of, ms, over, receive};

/// Maximum number of queue pairs of an interface.
const PAIRS: u16 = 15;
const DISK_QUEUES: u16 = 4;

/// Machines with few and many devices, all queues of which the guest has set up.
pub(crate) async fn stops(times: usize) -> Result<()> {
    println!("\nDevices in the stop of a guest with 256 MiB, in ms: medians of {times}.\n");
    println!(
        "| interfaces, each of {PAIRS} queue pairs | disks, each of {DISK_QUEUES} queues | queues in all | measured | of it pause | save | state there and ready | of that load | order |"
    );
    println!("|---|---|---|---|---|---|---|---|---|");
    for (nets, disks) in [(0, 0), (1, 1), (8, 16)] {
        let services = [
            Service::start(Face::Many).await?,
            Service::start(Face::Many).await?,
        ];
        let config = machine(&services[0], nets, disks)?;
        let vm = services[0].create("bench", config).await?;
        services[0].client().vms_boot(&vm).await?;
        let terminal = Terminal::of(services[0].client(), &vm).await?;
        let started = terminal.until(|line| matches!(line, Line::Queues { .. }))?;
        let Line::Queues { devices, queues } = started else {
            anyhow::bail!("it was waited for");
        };
        // Beside entropy.
        ensure!(devices == nets + disks + 1, "the guest started {devices}");
        let mut stops = [const { Vec::new() }; 6];
        for turn in 0..times {
            let (from, to) = (&services[turn % 2], &services[(turn + 1) % 2]);
            let waiting = receive(to.client()).await?;
            let what = StartMigration {
                insecure: true,
                ..StartMigration::to(waiting.endpoint.clone())
            };
            let begun = from.client().vms_migrate(&vm, &what).await?;
            let sent = over(from.client(), &begun).await?;
            over(to.client(), &waiting).await?;
            let stop = sent.downtime.context("a guest that moved was stopped")?;
            let parts = [
                stop.total_us,
                stop.pause_us,
                stop.save_us,
                stop.transfer_us,
                stop.load_us,
                stop.hand_over_us,
            ];
            stops
                .iter_mut()
                .zip(parts)
                .for_each(|(all, us)| all.push(us));
        }
        let parts = stops.map(|all| ms(median_of(all))).join(" | ");
        println!("| {nets} | {disks} | {queues} | {parts} |");
    }
    Ok(())
}

fn machine(service: &Service, nets: u64, disks: u64) -> Result<VmConfig> {
    let options = Options {
        workload: Workload::Queues,
        heartbeat_ms: Some(1000),
        ..Options::default()
    };
    let kernel = service.path("pocket.elf");
    std::fs::write(&kernel, guest::IMAGE)?;
    let mut config = guest_config(&options, 256 * MIB, 1, &kernel);
    let net = json!({ "num_queues": 2 * PAIRS, "queue_size": 256 });
    let nets = (0..nets).map(|_| serde_json::from_value(net.clone()));
    config.net = Some(nets.collect::<Result<_, _>>()?);
    let mut all = Vec::new();
    for index in 0..disks {
        let path = service.path(format!("disk{index}"));
        std::fs::File::create(&path)?.set_len(MIB)?;
        let disk = json!({ "path": path, "image_type": "Raw", "num_queues": DISK_QUEUES });
        all.push(serde_json::from_value(disk)?);
    }
    config.disks = Some(all);
    Ok(config)
}
