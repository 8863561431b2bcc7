//! Cost of one VM in a process of its own (`whimbrel --api-socket`), as a table.
//!
//!     cargo bench -p tests --bench one_vm [-- --peer PROGRAM]
//!
//! `PROGRAM` has Cloud Hypervisor's command line and API, and is measured beside us. The kernel is an ELF
//! file of 20 MiB that halts at its entry. `whimbrel` must have been built in the same profile:
//! `cargo build --release`.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::Result;
use clap::Parser;
use openapi::Client;
use spec::{ConsoleMode, PayloadConfig, VmConfig};
use tests::{Mapped, Program, beyond_ram, built, options};

const ROUNDS: usize = 11;
const MEMORY: u64 = 128 << 20;
const KERNEL: usize = 20 << 20;
const REQUESTS: usize = 5_000;
/// Processes at once, which share the pages of their program's file.
const MANY: usize = 10;

/// Time after which a service has given back what it needed for a boot: that is no cost of the VM.
const SETTLES: Duration = Duration::from_millis(300);

/// Cost of one process.
struct Cost {
    boot: Duration,
    /// Beyond guest RAM, before the boot and after it.
    mapped: [Mapped; 2],
    threads: usize,
    requests_per_s: u64,
}

/// Measures a VM in a process of its own.
#[derive(Parser)]
#[command(bin_name = "cargo bench -p tests --bench one_vm --")]
struct Arguments {
    /// Program with Cloud Hypervisor's command line and API, to be measured beside `whimbrel`.
    #[arg(long, value_name = "PROGRAM")]
    peer: Option<PathBuf>,
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<()> {
    let Arguments { peer } = options();
    println!(
        "one VM a process, 1 vCPU, {} MiB, kernel of {} MiB, medians of {ROUNDS}",
        MEMORY >> 20,
        KERNEL >> 20
    );
    for program in std::iter::once(built("whimbrel")?).chain(peer) {
        let mut all = Vec::new();
        for _ in 0..ROUNDS {
            all.push(cost(&program).await?);
        }
        println!("  {}", program.display());
        let row = |name: &str, value: f64| println!("    {name:<36} {value:>9.1}");
        row(
            "vm.boot (ms)",
            median(&all, |cost| cost.boot.as_micros() as u64) / 1000.0,
        );
        row(
            "PSS beyond RAM, before the boot (MiB)",
            median(&all, |cost| cost.mapped[0].pss) / 1024.0,
        );
        row(
            "PSS beyond RAM, after it (MiB)",
            median(&all, |cost| cost.mapped[1].pss) / 1024.0,
        );
        row(
            "of that, pages of no file (MiB)",
            median(&all, |cost| cost.mapped[1].own) / 1024.0,
        );
        row(
            &format!("PSS beyond RAM, each of {MANY} (MiB)"),
            many(&program).await? as f64 / 1024.0,
        );
        row("threads", median(&all, |cost| cost.threads as u64));
        row(
            "vm.info, one connection (1/s)",
            median(&all, |cost| cost.requests_per_s),
        );
    }
    Ok(())
}

fn median(all: &[Cost], value: impl Fn(&Cost) -> u64) -> f64 {
    let mut values: Vec<_> = all.iter().map(value).collect();
    values.sort_unstable();
    values
        .get(values.len() / 2)
        .map_or(0.0, |value| *value as f64)
}

/// Returns the KiB of PSS of each of many processes beyond guest RAM, with a running VM each.
async fn many(program: &Path) -> Result<u64> {
    let mut all = Vec::new();
    for _ in 0..MANY {
        let dir = tempfile::tempdir()?;
        let (process, client) = with_vm(program, dir.path()).await?;
        client.vm_boot().await?;
        all.push((process, dir));
    }
    tokio::time::sleep(SETTLES).await;
    let mut pss = 0;
    for (process, _) in &all {
        pss += beyond_ram(process.pid(), MEMORY)?.pss;
    }
    Ok(pss / MANY as u64)
}

/// Starts a program and creates a VM in it.
async fn with_vm(program: &Path, dir: &Path) -> Result<(Program, Client)> {
    let kernel = dir.join("kernel");
    std::fs::write(&kernel, elf())?;
    let (process, client) = Program::start(program, dir).await?;
    client.vm_create(&config(&kernel)).await?;
    Ok((process, client))
}

async fn cost(program: &Path) -> Result<Cost> {
    let dir = tempfile::tempdir()?;
    let (process, client) = with_vm(program, dir.path()).await?;
    let before = beyond_ram(process.pid(), MEMORY)?;
    let start = Instant::now();
    client.vm_boot().await?;
    let boot = start.elapsed();
    tokio::time::sleep(SETTLES).await;
    let after = beyond_ram(process.pid(), MEMORY)?;
    let threads = std::fs::read_dir(format!("/proc/{}/task", process.pid()))?.count();
    let start = Instant::now();
    for _ in 0..REQUESTS {
        client.vm_info().await?;
    }
    let requests_per_s = REQUESTS as f64 / start.elapsed().as_secs_f64();
    Ok(Cost {
        boot,
        mapped: [before, after],
        threads,
        requests_per_s: requests_per_s as u64,
    })
}

fn config(kernel: &Path) -> VmConfig {
    let mut config = VmConfig::with_payload(PayloadConfig {
        kernel: Some(kernel.to_string_lossy().into_owned()),
        cmdline: Some(String::new()),
        ..PayloadConfig::default()
    });
    config.memory.size = MEMORY;
    config.serial.mode = ConsoleMode::Null;
    config.console.mode = ConsoleMode::Off;
    config
}

/// Makes a kernel with one segment at 2 MiB, and a PVH note, by which it is entered.
fn elf() -> Vec<u8> {
    const ADDRESS: u64 = 2 << 20;
    const NOTE: usize = 0x180;
    const SEGMENT: usize = 0x1000;
    let mut file = vec![0x90; SEGMENT + KERNEL];
    file[..SEGMENT].fill(0);
    let mut put = |at: usize, bytes: &[u8]| file[at..at + bytes.len()].copy_from_slice(bytes);
    put(0, b"\x7fELF\x02\x01\x01");
    put(16, &2_u16.to_le_bytes()); // an executable
    put(18, &62_u16.to_le_bytes()); // x86-64
    put(20, &1_u32.to_le_bytes());
    put(24, &ADDRESS.to_le_bytes());
    put(32, &64_u64.to_le_bytes());
    put(52, &64_u16.to_le_bytes());
    put(54, &56_u16.to_le_bytes());
    put(56, &2_u16.to_le_bytes());
    let (segment, note, len) = (SEGMENT as u64, NOTE as u64, KERNEL as u64);
    // Kind and flags, offset, virtual and physical address, size in the file and in memory.
    let load = [1 | 7 << 32, segment, ADDRESS, ADDRESS, len, len, 0x1000];
    let notes = [4 | 4 << 32, note, 0, 0, 20, 20, 4];
    for (at, fields) in [(64, load), (120, notes)] {
        for (at, field) in (at..).step_by(8).zip(fields) {
            put(at, &u64::to_le_bytes(field));
        }
    }
    for (at, word) in (NOTE..).step_by(4).zip([4_u32, 4, 18]) {
        put(at, &word.to_le_bytes());
    }
    put(NOTE + 12, b"Xen\0");
    put(
        NOTE + 16,
        &u32::try_from(ADDRESS).unwrap_or_default().to_le_bytes(),
    );
    // cli; hlt; jump back to the hlt.
    put(SEGMENT, &[0xfa, 0xf4, 0xeb, 0xfd]);
    file
}
