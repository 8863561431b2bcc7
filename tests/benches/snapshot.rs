//! Snapshots, restores and forks of the pocket guest, as tables.
//!
//!     cargo build --release && cargo bench -p tests --bench snapshot [-- [--quick] [PART...]]
//!
//! A part is `restores`, `ready`, `stops` or `forks`; without one, all are run.
//!
//! The guest has written every page of its memory that it can. "First instruction" is the time from the
//! request until the guest's next heartbeat is in the file of its serial port: it writes one each
//! millisecond. Forks write one each second, the first at once. The page cache holds the snapshot
//! (warm). The stop of a snapshot is the longest gap that the guest saw in its TSC, as in the benchmark
//! of migrations. "Ready" is the time until the guest has checked 64 MiB of its memory and says so on its
//! serial port.

#[path = "migration/terminal.rs"]
mod terminal;

use std::fs::{self, File};
use std::io::{self, Read as _};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use clap::Parser;
use guest::{Line, Options, Workload};
use spec::{
    ConsoleMode, ForkVm, MemoryRestoreMode, MigrationInfo, MigrationPhase, RestoreConfig,
    SerialConfig, VmId,
};
use terminal::Terminal;
use tests::{Face, Serial, Service, dirtier, options};

const MIB: u64 = 1 << 20;
/// Rare enough that a hundred guests that print do not fill the CPUs, on which the others are made: a
/// line costs more than 0.5 ms, an exit for each byte.
const FORK_HEARTBEAT_MS: u32 = 1000;
const PATIENCE: Duration = Duration::from_secs(120);
const PARTS: [&str; 4] = ["restores", "ready", "stops", "forks"];

/// Measures snapshots, restores and forks.
#[derive(Parser)]
#[command(bin_name = "cargo bench -p tests --bench snapshot --")]
struct Arguments {
    /// Measures less.
    #[arg(long)]
    quick: bool,
    /// Parts to be measured: all by default.
    #[arg(value_name = "PART", value_parser = PARTS)]
    parts: Vec<String>,
}

#[tokio::main]
async fn main() -> Result<()> {
    let Arguments { quick, parts } = options();
    let is_asked = |part: &str| parts.is_empty() || parts.iter().any(|asked| asked == part);
    let rounds = if quick { 3 } else { 7 };
    if is_asked("restores") {
        let sizes: &[u64] = if quick { &[256] } else { &[256, 2048] };
        for size in sizes {
            restores(size * MIB, rounds).await?;
        }
    }
    if is_asked("ready") {
        ready(rounds).await?;
    }
    if is_asked("stops") {
        stops(if quick { &[256] } else { &[256, 2048, 8192] }, rounds).await?;
    }
    if is_asked("forks") {
        let counts: &[u32] = if quick { &[20] } else { &[20, 100] };
        for count in counts {
            forks(*count).await?;
        }
    }
    Ok(())
}

/// Boots a guest, and waits until it has written its memory, if it is to.
async fn boot(
    at: &Service,
    memory: u64,
    workload: Workload,
    heartbeat_ms: u32,
) -> Result<(VmId, Serial)> {
    let options = Options {
        workload,
        heartbeat_ms: Some(heartbeat_ms),
        ..Options::default()
    };
    let (mut config, serial) = at.pocket("guest", options)?;
    config.memory.size = memory;
    let vm = at.create("guest", config).await?;
    at.client().vms_boot(&vm).await?;
    let begun = Instant::now();
    let is_ready = |line: &Line| match workload {
        Workload::Touch => matches!(line, Line::Verified { .. }),
        _ => matches!(line, Line::Heartbeat { .. }),
    };
    while !serial.lines().iter().any(is_ready) {
        ensure!(begun.elapsed() < PATIENCE, "the guest is not ready");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    Ok((vm, serial))
}

async fn over(at: &Service, begun: &MigrationInfo) -> Result<MigrationInfo> {
    let id: VmId = begun.id.parse()?;
    let over = at.until(&id, PATIENCE, |info| info.phase.is_over()).await?;
    ensure!(over.phase == MigrationPhase::Completed, "{over:?}");
    Ok(over)
}

fn median(mut all: Vec<Duration>) -> Result<Duration> {
    all.sort();
    let middle = all.get(all.len() / 2);
    middle.copied().context("nothing was measured")
}

fn ms(time: Duration) -> f64 {
    time.as_secs_f64() * 1000.0
}

/// Reads a file to its end, and throws it away.
fn read_through(path: &Path) -> io::Result<u64> {
    let (mut file, mut buffer, mut all) = (File::open(path)?, vec![0; 1 << 20], 0);
    loop {
        match file.read(&mut buffer)? {
            0 => return Ok(all),
            read => all += read as u64,
        }
    }
}

async fn restores(memory: u64, rounds: usize) -> Result<()> {
    let service = Service::start(Face::Many).await?;
    let (vm, serial) = boot(&service, memory, Workload::Touch, 1).await?;
    let client = service.client();
    client.vms_pause(&vm).await?;
    let dir = service.path("snapshot");
    let to = tests::snapshots::to(&dir);
    let taken = over(&service, &client.vms_snapshot(&vm, &to).await?).await?;
    client.vms_delete(&vm).await?;
    let file = dir.join("memory.bin");
    let copy = service.path("copy");
    let begun = Instant::now();
    fs::copy(&file, &copy)?;
    File::open(&copy)?.sync_all()?;
    let copied = begun.elapsed();
    fs::remove_file(&copy)?;
    let bytes = taken.pages * 4096;
    let rate = |time: Duration| bytes as f64 / MIB as f64 / time.as_secs_f64();
    println!(
        "{} MiB, of which the guest has written {}",
        memory / MIB,
        bytes / MIB
    );
    let snapshot = Duration::from_micros(taken.elapsed_us);
    println!(
        "  snapshot {:>8.1} ms, {:.0} MiB/s; cp and sync of memory.bin {:.1} ms, {:.0} MiB/s; ratio {:.2}",
        ms(snapshot),
        rate(snapshot),
        ms(copied),
        rate(copied),
        copied.as_secs_f64() / snapshot.as_secs_f64()
    );
    println!(
        "  mode      first instruction   answered by then or complete   PSS (MiB)   medians of {rounds}"
    );
    for mode in [
        MemoryRestoreMode::Copy,
        MemoryRestoreMode::OnDemand,
        MemoryRestoreMode::Map,
    ] {
        let (mut first, mut whole, mut resident) = (Vec::new(), Vec::new(), Vec::new());
        for _ in 0..rounds {
            read_through(&file)?;
            let what = RestoreConfig {
                memory_restore_mode: mode,
                ..tests::snapshots::from(&dir, true)
            };
            let before = fs::metadata(serial.path())?.len();
            let begun = Instant::now();
            let restoring = client.vms_restore(&vm, &what).await?;
            while fs::metadata(serial.path())?.len() == before {
                if begun.elapsed() > PATIENCE {
                    bail!("the guest does not run");
                }
                tokio::task::yield_now().await;
            }
            first.push(begun.elapsed());
            resident.push(pss(service.pid(), &Owner::Size(memory))?);
            over(&service, &restoring).await?;
            whole.push(begun.elapsed());
            client.vms_delete(&vm).await?;
        }
        resident.sort_unstable();
        let (first, whole) = (median(first)?, median(whole)?);
        println!(
            "  {:<9} {:>10.1} ms {:>25.1} ms ({:.0} MiB/s) {:>10}",
            format!("{mode:?}"),
            ms(first),
            ms(whole),
            rate(whole),
            resident.get(rounds / 2).unwrap_or(&0) >> 10
        );
    }
    let mut plain = Vec::new();
    for _ in 0..rounds {
        let begun = Instant::now();
        fs::copy(&file, &copy)?;
        plain.push(begun.elapsed());
        fs::remove_file(&copy)?;
    }
    let plain = median(plain)?;
    println!(
        "  cp of memory.bin {:.1} ms, {:.0} MiB/s",
        ms(plain),
        rate(plain)
    );
    Ok(())
}

/// Restores with and without a recorded working set, from a file that the page cache holds and from
/// one that it does not.
async fn ready(rounds: usize) -> Result<()> {
    const REGION_MIB: u64 = 64;
    let service = Service::start(Face::Many).await?;
    // Enough to write all of the region soon.
    let (vm, port) = dirtier::boot_writing(&service, Some(256 * MIB), REGION_MIB, 20_000).await?;
    tokio::time::sleep(Duration::from_secs(3)).await;
    let client = service.client();
    let mut running = Vec::new();
    for _ in 0..rounds {
        running.push(dirtier::check(&port).await?);
    }
    client.vms_pause(&vm).await?;
    let dir = service.path("snapshot");
    over(
        &service,
        &client
            .vms_snapshot(&vm, &tests::snapshots::to(&dir))
            .await?,
    )
    .await?;
    client.vms_delete(&vm).await?;

    let what = spec::RecordWorkingSet {
        source_url: format!("file://{}", dir.display()),
        limit_s: 600,
        overrides: None,
    };
    let recording = client.vms_record(&vm, &what).await?;
    answers(&port).await?;
    client.vms_stop_recording(&vm).await?;
    let recorded = over(&service, &recording).await?;
    client.vms_delete(&vm).await?;
    let pages = recorded.working_set_pages.unwrap_or(0);
    println!(
        "256 MiB, a working set of {pages} pages; a guest that was never stopped checks them in {:.1} ms",
        ms(median(running)?)
    );
    println!(
        "  mode      page cache   recorded set   first instruction   set resident      ready   of it check   faults   medians of {rounds}"
    );
    let (file, aside) = (dir.join("working-set.json"), dir.join("aside"));
    for mode in [MemoryRestoreMode::OnDemand, MemoryRestoreMode::Map] {
        for cache in [Cache::Warm, Cache::Cold] {
            for is_used in [false, true] {
                if !is_used {
                    fs::rename(&file, &aside)?;
                }
                let came = restored_until_ready(&service, &vm, &port, (&dir, mode, cache), rounds);
                let row = came.await?;
                if !is_used {
                    fs::rename(&aside, &file)?;
                }
                println!(
                    "  {:<9} {:<10?} {:>14} {row}",
                    format!("{mode:?}"),
                    cache,
                    if is_used { "yes" } else { "no" },
                );
            }
        }
    }
    Ok(())
}

/// Whether the host has the memory's file in its page cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Cache {
    Warm,
    Cold,
}

/// Restores a guest from a folder until it has checked its memory. Returns the row's figures.
async fn restored_until_ready(
    service: &Service,
    vm: &VmId,
    port: &Path,
    (dir, mode, cache): (&Path, MemoryRestoreMode, Cache),
    rounds: usize,
) -> Result<String> {
    let client = service.client();
    let (mut first, mut set, mut ready, mut check) = (vec![], vec![], vec![], vec![]);
    let mut faults = Vec::new();
    for _ in 0..rounds {
        let memory = dir.join("memory.bin");
        match cache {
            Cache::Warm => drop(read_through(&memory)?),
            // The snapshot is synced: no page is dirty, and all can be dropped.
            Cache::Cold => {
                rustix::fs::fadvise(File::open(&memory)?, 0, None, rustix::fs::Advice::DontNeed)?;
            }
        }
        let what = RestoreConfig {
            memory_restore_mode: mode,
            ..tests::snapshots::from(dir, true)
        };
        let begun = Instant::now();
        let restoring = client.vms_restore(vm, &what).await?;
        check.push(answers(port).await?);
        ready.push(begun.elapsed());
        let came = over(service, &restoring).await?;
        first.extend(came.first_instruction_us.map(Duration::from_micros));
        set.extend(came.working_set_us.map(Duration::from_micros));
        faults.push(came.faults);
        client.vms_delete(vm).await?;
    }
    faults.sort_unstable();
    Ok(format!(
        "{:>16.1} ms {:>11.1} ms {:>7.1} ms {:>10.1} ms {:>8}",
        ms(median(first)?),
        ms(median(set).unwrap_or_default()),
        ms(median(ready)?),
        ms(median(check)?),
        faults.get(rounds / 2).unwrap_or(&0)
    ))
}

/// Waits until a guest that is being restored has checked its memory, and returns how long the check
/// took. The guest's port is there with its VM.
async fn answers(port: &Path) -> Result<Duration> {
    let begun = Instant::now();
    loop {
        match dirtier::check(port).await {
            Ok(took) => return Ok(took),
            Err(error) => ensure!(
                begun.elapsed() < PATIENCE,
                "the guest is not ready: {error}"
            ),
        }
    }
}

/// How a snapshot is taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    /// The VM is paused, saved as a whole, and resumed.
    Paused,
    /// The VM runs.
    Live,
    /// The VM runs, and only pages that differ from those of the first snapshot are written.
    Increment,
}

async fn stops(sizes: &[u64], rounds: usize) -> Result<()> {
    println!(
        "  memory   pages/s  snapshot    guest saw (ms)  measured (ms)  all of it (ms)  written (MiB)   \
         medians of {rounds}"
    );
    for size in sizes {
        for rate in [0, 50_000] {
            stops_of(size * MIB, rate, rounds).await?;
        }
    }
    Ok(())
}

/// Takes snapshots of each kind of a guest that writes to so many pages a second.
async fn stops_of(memory: u64, rate: u64, rounds: usize) -> Result<()> {
    let service = Service::start(Face::Many).await?;
    let (mut config, _) = service.pocket("guest", dirtier::options(128, rate, 1000))?;
    config.memory.size = memory;
    config.serial = SerialConfig {
        file: None,
        socket: None,
        mode: ConsoleMode::Pty,
    };
    let vm = service.create("guest", config).await?;
    let client = service.client();
    client.vms_boot(&vm).await?;
    let mut terminal = Terminal::of(client, &vm).await?;
    let dir = service.path("snapshot");
    let base = service.path("base");
    over(
        &service,
        &client
            .vms_snapshot(&vm, &tests::snapshots::to(&base))
            .await?,
    )
    .await?;
    for kind in [Kind::Paused, Kind::Live, Kind::Increment] {
        let (mut gaps, mut measured, mut whole) = (Vec::new(), Vec::new(), Vec::new());
        let mut written = 0;
        for _ in 0..rounds {
            terminal.until(|line| matches!(line, Line::Heartbeat { .. }))?;
            // So that what the guest writes is written everywhere.
            tokio::time::sleep(Duration::from_millis(500)).await;
            // Resets the guest's longest gap.
            terminal.gap()?;
            let what = spec::VmSnapshotConfig {
                base_url: (kind == Kind::Increment).then(|| format!("file://{}", base.display())),
                ..tests::snapshots::to(&dir)
            };
            let begun = Instant::now();
            if kind == Kind::Paused {
                client.vms_pause(&vm).await?;
            }
            let taken = over(&service, &client.vms_snapshot(&vm, &what).await?).await?;
            if kind == Kind::Paused {
                client.vms_resume(&vm).await?;
            }
            let took = begun.elapsed();
            whole.push(took);
            gaps.push(Duration::from_micros(terminal.gap()?));
            measured.push(match (kind, taken.downtime) {
                // From the pause to the resume.
                (Kind::Paused, _) => took,
                (_, Some(stop)) => Duration::from_micros(stop.total_us),
                (_, None) => bail!("the report has no stop: {taken:?}"),
            });
            written = taken.pages * 4096 / MIB;
            fs::remove_dir_all(&dir)?;
        }
        println!(
            "  {:>6} {:>9}  {:<9} {:>16.1} {:>14.1} {:>15.1} {:>14}",
            memory / MIB,
            rate,
            format!("{kind:?}"),
            ms(median(gaps)?),
            ms(median(measured)?),
            ms(median(whole)?),
            written
        );
    }
    Ok(())
}

/// The mappings that count.
enum Owner {
    /// Those of this size in bytes.
    Size(u64),
    /// Those of the copy from which forks are mapped.
    Forks,
}

/// Returns the kibibytes that a process has in such mappings, shared ones by their share.
fn pss(pid: u32, owner: &Owner) -> Result<u64> {
    let maps = fs::read_to_string(format!("/proc/{pid}/smaps"))?;
    let (mut all, mut counts) = (0, false);
    for line in maps.lines() {
        let mut words = line.split_whitespace();
        let name = words.next().unwrap_or("");
        let value = words.next().and_then(|value| value.parse::<u64>().ok());
        match (name, value) {
            ("Size:", Some(kib)) => {
                if let Owner::Size(size) = owner {
                    counts = kib == size >> 10;
                }
            }
            ("Pss:", Some(kib)) if counts => all += kib,
            _ if !name.ends_with(':') => {
                counts = matches!(owner, Owner::Forks) && line.contains("/memfd:forks");
            }
            _ => {}
        }
    }
    Ok(all)
}

/// Kibibytes of a process as a whole.
fn pss_of_all(pid: u32) -> Result<u64> {
    let text = fs::read_to_string(format!("/proc/{pid}/smaps_rollup"))?;
    let line = text.lines().find_map(|line| line.strip_prefix("Pss:"));
    let value = line.and_then(|line| line.split_whitespace().next());
    Ok(value.context("no Pss")?.parse()?)
}

async fn forks(count: u32) -> Result<()> {
    let service = Service::start(Face::Many).await?;
    let (vm, _) = boot(&service, 256 * MIB, Workload::Idle, FORK_HEARTBEAT_MS).await?;
    let client = service.client();
    client.vms_pause(&vm).await?;
    // The pause counts as time that passed, so that a fork's next heartbeat is due at once.
    tokio::time::sleep(Duration::from_millis(u64::from(FORK_HEARTBEAT_MS) + 100)).await;
    let port = |n: &str| -> PathBuf { service.path(format!("fork-{n}")) };
    let serial = serde_json::json!({ "mode": "File", "file": port("{n}") });
    let what = ForkVm {
        count,
        name: Some("fork".parse()?),
        resume: true,
        overrides: spec::Overrides {
            serial: serde_json::from_value(serial)?,
            ..spec::Overrides::default()
        },
        ..ForkVm::default()
    };
    let before = pss_of_all(service.pid())?;
    let begun = Instant::now();
    let made = over(&service, &client.vms_fork(&vm, &what).await?).await?;
    let took = Duration::from_micros(made.elapsed_us);
    for n in 1..=count {
        let port = port(&n.to_string());
        while fs::metadata(&port).map_or(0, |metadata| metadata.len()) == 0 {
            ensure!(begun.elapsed() < PATIENCE, "fork {n} does not run");
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }
    let all_run = begun.elapsed();
    let memory = pss(service.pid(), &Owner::Forks)?;
    let whole = pss_of_all(service.pid())?.saturating_sub(before);
    println!(
        "{count} forks of an idle guest of 256 MiB: made in {:.0} ms, all run after {:.0} ms; PSS of each: \
         memory {} KiB, with its machine {} KiB",
        ms(took),
        ms(all_run),
        memory / u64::from(count),
        whole / u64::from(count)
    );
    Ok(())
}
