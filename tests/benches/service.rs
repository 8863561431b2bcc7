//! Cost and speed of a service, as tables.
//!
//!     cargo bench -p tests --bench service [-- --peer PROGRAM]
//!
//! `PROGRAM` has Cloud Hypervisor's command line and API; it is measured beside us where it can do the same. The
//! guest is the pocket guest. `whimbrel` must have been built in the same profile: `cargo build --release`.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use clap::Parser;
use guest::Options;
use openapi::Client;
use spec::{PayloadConfig, SerialConfig, VmConfig, VmState};
use tests::{Face, Program, Serial, Service, built, options, pss};

const BOOTS: usize = 15;
const VMS: u64 = 100;
const MEMORY: u64 = 32 << 20;

/// Measures a service: boots, its sandbox, many VMs, devices that are added, and requests.
#[derive(Parser)]
#[command(bin_name = "cargo bench -p tests --bench service --")]
struct Arguments {
    /// Program with Cloud Hypervisor's command line and API, to be measured beside `whimbrel` where it can do
    /// the same.
    #[arg(long, value_name = "PROGRAM")]
    peer: Option<PathBuf>,
}

#[tokio::main]
async fn main() -> Result<()> {
    let Arguments { peer } = options();
    boot(peer.as_deref()).await?;
    sandbox().await?;
    many().await?;
    hot_add(peer.as_deref()).await?;
    requests().await
}

fn config(kernel: &Path, serial: &Path) -> VmConfig {
    let mut config = VmConfig::with_payload(PayloadConfig {
        kernel: Some(kernel.to_string_lossy().into_owned()),
        cmdline: Some(Options::default().to_string()),
        ..PayloadConfig::default()
    });
    config.memory.size = MEMORY;
    config.memory.thp = false;
    config.serial = SerialConfig {
        mode: spec::ConsoleMode::File,
        ..SerialConfig::default()
    };
    config.serial.file = Some(serial.to_string_lossy().into_owned());
    config.console.mode = spec::ConsoleMode::Off;
    config
}

/// Any program with that API, with a VM that is not booted yet; and where its serial port goes.
async fn start(program: &Path, dir: &Path) -> Result<(Program, Client, PathBuf)> {
    let (kernel, log) = (dir.join("pocket"), dir.join("serial"));
    std::fs::write(&kernel, guest::IMAGE)?;
    let (process, client) = Program::start(program, dir).await?;
    client.vm_create(&config(&kernel, &log)).await?;
    Ok((process, client, log))
}

/// From the request to the guest's first line in a file, as a client sees it.
async fn boot_of(program: &Path, dir: &Path) -> Result<Duration> {
    let (_process, client, log) = start(program, dir).await?;
    let serial = Serial::at(log);
    let start = Instant::now();
    client.vm_boot().await?;
    while serial.text().is_empty() {
        if start.elapsed() > Duration::from_secs(10) {
            bail!("the guest says nothing");
        }
        tokio::task::yield_now().await;
    }
    Ok(start.elapsed())
}

fn median<T: Ord + Copy>(mut all: Vec<T>) -> Result<T> {
    all.sort();
    all.get(all.len() / 2)
        .copied()
        .context("nothing was measured")
}

async fn boot(peer: Option<&Path>) -> Result<()> {
    let service = Service::start(Face::Many).await?;
    let mut steps: [Vec<u64>; 4] = Default::default();
    for index in 0..BOOTS {
        let name = format!("boot{index}");
        let (mut vm, serial) = service.pocket(&name, Options::default())?;
        (vm.memory.size, vm.memory.thp) = (MEMORY, false);
        let id = service.create(&name, vm).await?;
        service.client().vms_boot(&id).await?;
        let start = Instant::now();
        while serial.text().is_empty() && start.elapsed() < Duration::from_secs(10) {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        let boot = service
            .client()
            .vms_info(&id)
            .await?
            .boot
            .context("a timeline")?;
        let all = [
            boot.built_us,
            boot.first_entry_us,
            boot.first_debug_port_us,
            boot.first_serial_us,
        ];
        for (step, us) in steps.iter_mut().zip(all) {
            step.extend(us);
        }
        service.client().vms_delete(&id).await?;
    }
    println!(
        "from the boot request, 1 vCPU, {} MiB, median of {BOOTS} (us)",
        MEMORY >> 20
    );
    for (name, step) in [
        "machine built",
        "guest entered",
        "first instruction",
        "first serial byte",
    ]
    .iter()
    .zip(steps)
    {
        println!("  {name:<28} {:>9}", median(step)?);
    }
    let us = built("whimbrel")?;
    println!("to the first line, as a client sees it, median of {BOOTS} (us)");
    for program in std::iter::once(us.as_path()).chain(peer) {
        let mut all = Vec::new();
        for _ in 0..BOOTS {
            let dir = tempfile::tempdir()?;
            all.push(boot_of(program, dir.path()).await?);
        }
        println!(
            "  {:<28} {:>9}",
            program.display().to_string(),
            median(all)?.as_micros()
        );
    }
    Ok(())
}

/// The cost of the sandbox: starts with and without, in turn, so that both meet the same host.
async fn sandbox() -> Result<()> {
    let modes = ["true", "false"];
    let mut all: [[Vec<u64>; 4]; 2] = Default::default();
    for _ in 0..BOOTS {
        for (mode, found) in modes.iter().zip(&mut all) {
            let seccomp = ["--seccomp".to_owned(), (*mode).to_owned()];
            let begun = Instant::now();
            let service = Service::start_with(&[], &seccomp).await?;
            let answered = begun.elapsed().as_micros().try_into()?;
            let (mut config, serial) = service.pocket("vm", Options::default())?;
            (config.memory.size, config.memory.thp) = (MEMORY, false);
            let id = service.create("vm", config).await?;
            let begun = Instant::now();
            service.client().vms_boot(&id).await?;
            while serial.text().is_empty() && begun.elapsed() < Duration::from_secs(10) {
                tokio::task::yield_now().await;
            }
            let booted = begun.elapsed().as_micros().try_into()?;
            service.client().vms_pause(&id).await?;
            let (pss, ram) = pss(service.pid(), MEMORY)?;
            let measured = [answered, booted, pss - ram, rss(service.pid())?];
            for (values, value) in found.iter_mut().zip(measured) {
                values.push(value);
            }
        }
    }
    println!("--seccomp true and false, one VM, median of {BOOTS} starts in turn");
    let [with, without] = all;
    for (name, (with, without)) in [
        "start to first answer (us)",
        "boot to first line (us)",
        "PSS beyond guest RAM (KiB)",
        "RSS (KiB)",
    ]
    .iter()
    .zip(with.into_iter().zip(without))
    {
        println!("  {name:<28} {:>9} {:>9}", median(with)?, median(without)?);
    }
    Ok(())
}

/// Kibibytes of a process that are in memory, shared ones whole.
fn rss(pid: u32) -> Result<u64> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let kib = line.and_then(|line| line.split_whitespace().next());
    Ok(kib.context("a status has VmRSS")?.parse()?)
}

async fn many() -> Result<()> {
    let service = Service::start(Face::Many).await?;
    let client = service.client();
    let before = pss(service.pid(), MEMORY)?;
    let mut ids = Vec::new();
    let start = Instant::now();
    for index in 0..VMS {
        let (mut config, _) = service.pocket(&format!("vm{index}"), Options::default())?;
        (config.memory.size, config.memory.thp) = (MEMORY, false);
        let id = service.create(&format!("vm{index}"), config).await?;
        client.vms_boot(&id).await?;
        client.vms_pause(&id).await?;
        ids.push(id);
    }
    let took = start.elapsed();
    let after = pss(service.pid(), MEMORY)?;
    let own = (after.0 - after.1).saturating_sub(before.0 - before.1);
    println!("{VMS} paused VMs in one service");
    println!(
        "  {:<28} {:>9.1}",
        "PSS of each beyond RAM (KiB)",
        own as f64 / VMS as f64
    );
    println!(
        "  {:<28} {:>9.1}",
        "create, boot, pause (ms)",
        took.as_secs_f64() * 1000.0 / VMS as f64
    );
    for id in &ids {
        client.vms_resume(id).await?;
        if client.vms_info(id).await?.state != VmState::Running {
            bail!("{id} does not run");
        }
    }
    println!("  all resumed, all answer");
    Ok(())
}

/// Disks that are added to a running VM: how long an answer takes, and what each costs.
async fn hot_add(peer: Option<&Path>) -> Result<()> {
    const ADDED: u32 = 24;
    let us = built("whimbrel")?;
    println!("{ADDED} raw disks added to a running VM");
    for program in std::iter::once(us.as_path()).chain(peer) {
        let dir = tempfile::tempdir()?;
        let (process, client, log) = start(program, dir.path()).await?;
        client.vm_boot().await?;
        let (serial, begun) = (Serial::at(log), Instant::now());
        while serial.text().is_empty() && begun.elapsed() < Duration::from_secs(10) {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        let before = pss(process.pid(), MEMORY)?;
        let mut all = Vec::new();
        for index in 0..ADDED {
            let image = dir.path().join(format!("disk{index}"));
            std::fs::File::create(&image)?.set_len(64 << 20)?;
            let disk = serde_json::json!({ "path": image, "image_type": "Raw" });
            let disk = serde_json::from_value(disk)?;
            let start = Instant::now();
            client.vm_add_disk(&disk).await?;
            all.push(start.elapsed());
        }
        let after = pss(process.pid(), MEMORY)?;
        let own = (after.0 - after.1).saturating_sub(before.0 - before.1);
        println!(
            "  {}: answer {} us, PSS of each {:.1} KiB",
            program.display(),
            median(all)?.as_micros(),
            own as f64 / f64::from(ADDED)
        );
    }
    Ok(())
}

async fn requests() -> Result<()> {
    const EACH: usize = 4_000;
    let service = Service::start(Face::Many).await?;
    let (vm, _) = service.boot_pocket("vm", Options::default()).await?;
    println!("info of a VM over the unix socket, keep-alive");
    for connections in [1, 8] {
        let start = Instant::now();
        let tasks: Vec<_> = (0..connections)
            .map(|_| {
                let (client, vm) = (service.client().clone(), vm.clone());
                tokio::spawn(async move {
                    let mut all = Vec::with_capacity(EACH);
                    for _ in 0..EACH {
                        let start = Instant::now();
                        client.vms_info(&vm).await?;
                        all.push(start.elapsed());
                    }
                    Ok::<_, anyhow::Error>(all)
                })
            })
            .collect();
        let mut all = Vec::new();
        for task in tasks {
            all.extend(task.await??);
        }
        let rate = all.len() as f64 / start.elapsed().as_secs_f64();
        all.sort();
        let at = |part: usize| {
            all.get(all.len() * part / 100)
                .map_or(0, Duration::as_micros)
        };
        println!(
            "  {connections} connections: {rate:>8.0} requests/s, p50 {} us, p99 {} us",
            at(50),
            at(99)
        );
    }
    Ok(())
}
