//! The cost of a migration for the guest, as tables.
//!
//!     cargo bench -p tests --bench migration [-- [--quick] [--only PART] [--svg FILE] [--peer PROGRAM]]
//!
//! FILE is an absolute path: cargo runs the program in the folder of its crate.
//!
//! The parts are `stops`, `devices`, `faults`, `curves` (drawn into `FILE`), `storage` and
//! `throughput`.
//!
//! The pocket guest writes to its memory at a given rate and moves between two services over loopback
//! TCP; it reports the longest gap that it saw. `PROGRAM` has Cloud Hypervisor's command line and
//! API, and is measured beside us through that; so is QEMU, if it is installed. `whimbrel` must have been
//! built in the same profile: `cargo build --release`.

mod curves;
mod devices;
mod faults;
mod peer;
mod qemu;
mod storage;
mod terminal;
mod throughput;
mod timeline;

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use clap::Parser;
use guest::{Line, Options};
use memory::{RamBlock, RamConfig};
use openapi::Client;
use spec::{
    AtDeadline, ConsoleMode, CpusConfig, MemoryMode, MigrationInfo, PayloadConfig, StartMigration,
    VmConfig, VmId,
};
use tests::{Face, Service, await_anyone, dirtier, options};

use crate::terminal::Terminal;
use crate::timeline::Steps;

const PATIENCE: Duration = Duration::from_secs(60);
const MIB: u64 = 1 << 20;
/// How long a guest writes before it moves, from its first line on.
const SETTLE: Duration = Duration::from_millis(500);

/// Names of what can be measured alone.
const PARTS: [&str; 6] = [
    "stops",
    "devices",
    "faults",
    "curves",
    "storage",
    "throughput",
];

/// Measures the cost of a migration for the guest.
#[derive(Parser)]
#[command(bin_name = "cargo bench -p tests --bench migration --")]
struct Arguments {
    /// Measures less.
    #[arg(long)]
    quick: bool,
    /// Measures this part alone.
    #[arg(long, value_name = "PART", value_parser = PARTS)]
    only: Option<String>,
    /// File in which the curves are drawn: an absolute path, as Cargo runs this program in the folder of its
    /// crate. Without it they are not.
    #[arg(long, value_name = "FILE")]
    svg: Option<PathBuf>,
    /// Program with Cloud Hypervisor's command line and API, to be measured beside `whimbrel`.
    #[arg(long, value_name = "PROGRAM")]
    peer: Option<PathBuf>,
    /// Address to which this process, which another of the benchmark started, sends back what it gets.
    #[arg(long, value_name = "ADDRESS", hide = true)]
    echo: Option<String>,
}

#[tokio::main]
async fn main() -> Result<()> {
    let arguments: Arguments = options();
    if let Some(address) = arguments.echo {
        return faults::echo(&address);
    }
    let Arguments {
        quick, peer, only, ..
    } = arguments;
    let times = if quick { 3 } else { 5 };
    let is_wanted = |part: &str| only.as_deref().is_none_or(|only| only == part);
    if is_wanted("stops") {
        stops(times, quick, peer.as_deref()).await?;
    }
    if is_wanted("devices") {
        devices::stops(times).await?;
    }
    if is_wanted("faults") {
        let (p50, p99) = faults::bare()?;
        println!(
            "\nA page that another thread of the process fills is there after (us): p50 {p50}, p99 {p99}."
        );
        let (p50, p99) = faults::ping_pong()?;
        println!(
            "A page that another process sends over TCP on request is there after (us): p50 {p50}, p99 {p99}."
        );
    }
    if let Some(svg) = arguments.svg.filter(|_| is_wanted("curves")) {
        curves::draw(peer.as_deref(), &svg).await?;
    }
    if is_wanted("storage") {
        storage::disks(times).await?;
    }
    if is_wanted("throughput") {
        throughput::pages(times).await?;
    }
    Ok(())
}

/// A guest, and how it is to move.
#[derive(Clone, Copy)]
struct Case {
    memory: u64,
    vcpus: u32,
    /// Pages that it writes in a second.
    rate: u64,
    mode: MemoryMode,
}

/// The result of one move.
#[derive(Clone, Default)]
struct Seen {
    /// The gap that the guest saw, in microseconds.
    gap: u64,
    /// The stop as measured, and as predicted.
    stop: u64,
    predicted: u64,
    load: u64,
    total: u64,
    fault_p50: u64,
    fault_p99: u64,
    /// Until the guest ran at the destination, and all had been sent.
    runs_there: u64,
    steps: Steps,
}

fn config(case: Case, kernel: &Path) -> VmConfig {
    guest_config(
        &dirtier::options(128, case.rate, 1000),
        case.memory,
        case.vcpus,
        kernel,
    )
}

fn guest_config(options: &Options, memory: u64, vcpus: u32, kernel: &Path) -> VmConfig {
    let mut config = VmConfig::with_payload(PayloadConfig {
        kernel: Some(kernel.to_string_lossy().into_owned()),
        cmdline: Some(options.to_string()),
        ..PayloadConfig::default()
    });
    config.cpus = CpusConfig::with_vcpus(vcpus);
    config.memory.size = memory;
    config.serial.mode = ConsoleMode::Pty;
    config.console.mode = ConsoleMode::Off;
    config
}

async fn over(client: &Client, begun: &MigrationInfo) -> Result<MigrationInfo> {
    let (id, start): (VmId, _) = (begun.id.parse()?, Instant::now());
    loop {
        let info = client.migrations_info(&id).await?;
        if info.phase.is_over() {
            ensure!(info.error.is_none(), "{info:?}");
            return Ok(info);
        }
        ensure!(start.elapsed() < PATIENCE, "{info:?}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

async fn receive(at: &Client) -> Result<MigrationInfo> {
    Ok(at
        .migrations_receive(&await_anyone("tcp:127.0.0.1:0"))
        .await?)
}

/// Memory that the kernel has found, to be given back right before a guest moves. In a virtual machine whose
/// own host takes back what is free, a page that was free for a second costs a hundred times as much as one
/// that was not, and the move would measure that. It is found before the guest starts, which would write
/// more pages meanwhile.
fn warm_memory() -> Result<RamBlock> {
    Ok(RamBlock::new(&RamConfig {
        prefault: true,
        ..RamConfig::anonymous(512 * MIB)
    })?)
}

/// One move of a new VM between two services of ours, so many times. New each time, as it is with QEMU: a
/// guest that runs for longer has more memory to copy.
async fn ours(case: Case, times: usize) -> Result<Vec<Seen>> {
    let mut all = Vec::new();
    for _ in 0..times {
        all.push(one(case).await?);
    }
    Ok(all)
}

/// Starts two services, and boots a guest in the first, which then has run for [`SETTLE`].
async fn booted(case: Case) -> Result<([Service; 2], VmId, Terminal)> {
    let services = [
        Service::start(Face::Many).await?,
        Service::start(Face::Many).await?,
    ];
    let [from, _] = &services;
    let kernel = from.path("pocket.elf");
    std::fs::write(&kernel, guest::IMAGE)?;
    let vm = from.create("bench", config(case, &kernel)).await?;
    from.client().vms_boot(&vm).await?;
    let terminal = Terminal::of(from.client(), &vm).await?;
    terminal.until(|line| matches!(line, Line::Heartbeat { .. }))?;
    tokio::time::sleep(SETTLE).await;
    Ok((services, vm, terminal))
}

async fn one(case: Case) -> Result<Seen> {
    let warm = warm_memory()?;
    let ([from, to], vm, mut terminal) = booted(case).await?;
    let (from, to) = (from.client(), to.client());
    terminal.gap()?;
    let waiting = receive(to).await?;
    let what = StartMigration {
        mode: case.mode,
        max_downtime_ms: 20,
        deadline_s: 20,
        at_deadline: Some(AtDeadline::Stop),
        insecure: true,
        ..StartMigration::to(waiting.endpoint.clone())
    };
    drop(warm);
    let begun = from.vms_migrate(&vm, &what).await?;
    let sent = over(from, &begun).await?;
    let received = over(to, &waiting).await?;
    // A second reader of a terminal would take lines from this one.
    drop(terminal);
    let gap = Terminal::of(to, &vm).await?.gap()?;
    let stop = sent.downtime.unwrap_or_default();
    Ok(Seen {
        gap,
        stop: stop.total_us,
        predicted: sent.predicted_downtime_us.unwrap_or(0),
        load: stop.load_us,
        total: sent.elapsed_us,
        fault_p50: received.fault_p50_us,
        fault_p99: received.fault_p99_us,
        runs_there: sent.elapsed_us,
        steps: Steps::of(&sent.timeline),
    })
}

fn median_of(mut values: Vec<u64>) -> u64 {
    values.sort_unstable();
    values.get(values.len() / 2).copied().unwrap_or(0)
}

fn median(all: &[Seen], pick: impl Fn(&Seen) -> u64) -> u64 {
    median_of(all.iter().map(pick).collect())
}

/// Milliseconds, of microseconds.
fn ms(us: u64) -> String {
    format!(
        "{:.1}",
        f64::from(u32::try_from(us).unwrap_or(u32::MAX)) / 1000.0
    )
}

async fn stops(times: usize, quick: bool, peer: Option<&Path>) -> Result<()> {
    println!("\nThe stop, in ms: medians of {times}. The guest writes pages of 128 MiB.\n");
    let qemu = qemu::version();
    if let Some(qemu) = &qemu {
        println!("Beside us: {qemu}.\n");
    }
    println!(
        "| memory | vCPUs | pages/s | mode | guest saw | measured | predicted | of it load | all of it | faults p50, p99 (us) | peer: guest saw | QEMU: guest saw, measured, all sent, guest runs there |"
    );
    println!("|---|---|---|---|---|---|---|---|---|---|---|---|");
    let case = |memory, vcpus, rate, mode| Case {
        memory: memory * MIB,
        vcpus,
        rate,
        mode,
    };
    let (pre, hybrid, post) = (
        MemoryMode::Precopy,
        MemoryMode::Hybrid,
        MemoryMode::Postcopy,
    );
    let mut cases = vec![
        case(256, 1, 0, pre),
        case(256, 1, 1_000, pre),
        case(256, 1, 10_000, pre),
        case(256, 1, 50_000, pre),
        case(256, 2, 10_000, pre),
        case(256, 1, 10_000, hybrid),
        case(256, 1, 10_000, post),
        case(2048, 1, 0, pre),
        case(2048, 1, 10_000, post),
    ];
    if !quick {
        cases.extend([
            case(256, 1, 50_000, hybrid),
            case(256, 1, 50_000, post),
            case(2048, 2, 10_000, pre),
            case(8192, 1, 0, pre),
            case(8192, 1, 0, post),
        ]);
    }
    let mut steps = Vec::new();
    for case in cases {
        let seen = ours(case, times).await?;
        let theirs = match peer {
            None => "-".to_owned(),
            Some(program) => match peer::moves(program, case, times).await {
                Ok(seen) => ms(median(&seen, |seen| seen.gap)),
                Err(error) => format!("{error:#}"),
            },
        };
        let qemus = match &qemu {
            None => "-".to_owned(),
            Some(_) => match tokio::task::spawn_blocking(move || qemu::moves(case, times)).await? {
                Ok(seen) => format!(
                    "{}, {}, {}, {}",
                    ms(median(&seen, |seen| seen.gap)),
                    ms(median(&seen, |seen| seen.stop)),
                    ms(median(&seen, |seen| seen.total)),
                    ms(median(&seen, |seen| seen.runs_there))
                ),
                Err(error) => format!("{error:#}"),
            },
        };
        let faults = match case.mode {
            MemoryMode::Precopy => "-".to_owned(),
            _ => format!(
                "{}, {}",
                median(&seen, |seen| seen.fault_p50),
                median(&seen, |seen| seen.fault_p99)
            ),
        };
        println!(
            "| {} MiB | {} | {} | {} | {} | {} | {} | {} | {} | {faults} | {theirs} | {qemus} |",
            case.memory / MIB,
            case.vcpus,
            case.rate,
            case.mode,
            ms(median(&seen, |seen| seen.gap)),
            ms(median(&seen, |seen| seen.stop)),
            ms(median(&seen, |seen| seen.predicted)),
            ms(median(&seen, |seen| seen.load)),
            ms(median(&seen, |seen| seen.total)),
        );
        steps.push((case, seen.into_iter().map(|seen| seen.steps).collect()));
    }
    timeline::print(&steps);
    Ok(())
}
