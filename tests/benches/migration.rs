//! What a migration costs the guest, as tables.
//!
//!     cargo bench -p tests --bench migration [-- [--quick] [--peer PROGRAM]]
//!
//! The pocket guest writes to its memory at a given rate and moves between two services over loopback
//! TCP; it tells itself the longest gap that it saw. `PROGRAM` has Cloud Hypervisor's command line and
//! API, and is measured beside us through that. `whimbrel` must have been built in the same profile:
//! `cargo build --release`.

use std::fs::{File, OpenOptions};
use std::io::{BufRead, BufReader, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use guest::{Line, Options, Order, Workload};
use openapi::Client;
use spec::{
    AtDeadline, AwaitMigration, ConsoleMode, CpusConfig, MemoryMode, MigrationInfo, PayloadConfig,
    ReceiveMigrationData, SendMigrationData, StartMigration, VmConfig, VmId,
};
use tempfile::TempDir;
use tests::{Face, Service};

const PATIENCE: Duration = Duration::from_secs(60);
const MIB: u64 = 1 << 20;

#[tokio::main]
async fn main() -> Result<()> {
    let (mut quick, mut peer) = (false, None);
    let mut arguments = std::env::args().skip(1);
    while let Some(argument) = arguments.next() {
        match argument.as_str() {
            "--bench" => {}
            "--quick" => quick = true,
            "--peer" => peer = Some(PathBuf::from(arguments.next().context("--peer PROGRAM")?)),
            other => bail!("unknown argument {other}: there are --quick and --peer PROGRAM"),
        }
    }
    let times = if quick { 3 } else { 5 };
    stops(times, quick, peer.as_deref()).await?;
    throughput(times).await
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

/// What one move came to.
#[derive(Clone, Copy, Default)]
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
}

fn config(case: Case, kernel: &Path) -> VmConfig {
    let workload = match case.rate {
        0 => Workload::Idle,
        rate => Workload::Dirty {
            region_mib: Some(128),
            rate: Some(rate),
            order: Order::Scattered,
        },
    };
    let options = Options {
        workload,
        heartbeat_ms: Some(1000),
        ..Options::default()
    };
    let mut config = VmConfig::with_payload(PayloadConfig {
        kernel: Some(kernel.to_string_lossy().into_owned()),
        cmdline: Some(options.to_string()),
        ..PayloadConfig::default()
    });
    config.cpus = CpusConfig::with_vcpus(case.vcpus);
    config.memory.size = case.memory;
    config.serial.mode = ConsoleMode::Pty;
    config.console.mode = ConsoleMode::Off;
    config
}

/// A guest's pseudo terminal.
struct Terminal {
    terminal: File,
    lines: Receiver<String>,
}

impl Terminal {
    fn open(path: &str) -> Result<Self> {
        let terminal = OpenOptions::new().read(true).write(true).open(path)?;
        let reader = BufReader::new(terminal.try_clone()?);
        let (sender, lines) = channel();
        // It ends with the terminal.
        thread::spawn(move || {
            let mut lines = reader.lines().map_while(std::io::Result::ok);
            lines.try_for_each(|line| sender.send(line))
        });
        Ok(Self { terminal, lines })
    }

    async fn of(client: &Client, vm: &VmId) -> Result<Self> {
        let port = client.vms_info(vm).await?.config.serial.file;
        Self::open(&port.context("no terminal")?)
    }

    fn until(&self, wanted: impl Fn(&Line) -> bool) -> Result<Line> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let text = self
                .lines
                .recv_timeout(left)
                .context("the guest is silent")?;
            match Line::parse(&text) {
                Some(line) if wanted(&line) => return Ok(line),
                _ => {}
            }
        }
    }

    /// The longest gap since it was asked the last time.
    fn gap(&mut self) -> Result<u64> {
        writeln!(self.terminal, "{}", guest::Command::Report)?;
        match self.until(|line| matches!(line, Line::Report { .. }))? {
            Line::Report { gap_us, .. } => Ok(gap_us),
            _ => bail!("it was waited for"),
        }
    }
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
    let listen = "tcp:127.0.0.1:0".to_owned();
    Ok(at.migrations_receive(&AwaitMigration::at(listen)).await?)
}

/// One VM in two services of ours, moved to and fro.
async fn ours(case: Case, times: usize) -> Result<Vec<Seen>> {
    let services = [
        Service::start(Face::Many).await?,
        Service::start(Face::Many).await?,
    ];
    let kernel = services[0].path("pocket.elf");
    std::fs::write(&kernel, guest::IMAGE)?;
    let vm = services[0].create("bench", config(case, &kernel)).await?;
    services[0].client().vms_boot(&vm).await?;
    let mut all = Vec::new();
    // One reader a terminal: two would take lines from each other.
    let mut terminal = Terminal::of(services[0].client(), &vm).await?;
    for turn in 0..times {
        let (from, to) = (
            services[turn % 2].client(),
            services[(turn + 1) % 2].client(),
        );
        terminal.until(|line| matches!(line, Line::Heartbeat { .. }))?;
        // So that what it writes is written everywhere.
        tokio::time::sleep(Duration::from_millis(500)).await;
        terminal.gap()?;
        let waiting = receive(to).await?;
        let what = StartMigration {
            mode: case.mode,
            max_downtime_ms: 20,
            deadline_s: 20,
            at_deadline: AtDeadline::Stop,
            ..StartMigration::to(waiting.endpoint.clone())
        };
        let begun = from.vms_migrate(&vm, &what).await?;
        let sent = over(from, &begun).await?;
        let received = over(to, &waiting).await?;
        terminal = Terminal::of(to, &vm).await?;
        let stop = sent.downtime.unwrap_or_default();
        all.push(Seen {
            gap: terminal.gap()?,
            stop: stop.total_us,
            predicted: sent.predicted_downtime_us.unwrap_or(0),
            load: stop.load_us,
            total: sent.elapsed_us,
            fault_p50: received.fault_p50_us,
            fault_p99: received.fault_p99_us,
        });
    }
    Ok(all)
}

/// A program that serves one VM. It ends with what it was started for.
struct Peer {
    child: Child,
    client: Client,
}

impl Peer {
    async fn start(program: &Path, dir: &Path, name: &str) -> Result<Self> {
        let socket = dir.join(name);
        let child = Command::new(program)
            .arg("--api-socket")
            .arg(&socket)
            .stderr(Stdio::null())
            .spawn()?;
        let client = Client::unix(&socket).with_timeout(PATIENCE);
        let peer = Self { child, client };
        let start = Instant::now();
        while peer.client.ping().await.is_err() {
            ensure!(
                start.elapsed() < PATIENCE,
                "{} does not answer",
                program.display()
            );
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
        Ok(peer)
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The gap that a guest of another program sees.
async fn theirs(program: &Path, case: Case, times: usize) -> Result<Vec<Seen>> {
    let mut all = Vec::new();
    for _ in 0..times {
        let dir = TempDir::with_prefix("whimbrel-peer.")?;
        let kernel = dir.path().join("pocket");
        std::fs::write(&kernel, guest::IMAGE)?;
        let from = Peer::start(program, dir.path(), "from").await?;
        let to = Peer::start(program, dir.path(), "to").await?;
        from.client.vm_create(&config(case, &kernel)).await?;
        from.client.vm_boot().await?;
        let port = from
            .client
            .vm_info()
            .await?
            .config
            .serial
            .file
            .context("no terminal")?;
        let mut terminal = Terminal::open(&port)?;
        terminal.until(|line| matches!(line, Line::Heartbeat { .. }))?;
        tokio::time::sleep(Duration::from_millis(500)).await;
        terminal.gap()?;
        // A port of our own, which the kernel has just given away.
        let port = std::net::TcpListener::bind("127.0.0.1:0")?
            .local_addr()?
            .port();
        let url = format!("tcp:127.0.0.1:{port}");
        let mode = match case.mode {
            MemoryMode::Postcopy => "Postcopy",
            _ => "Precopy",
        };
        let body = serde_json::json!({ "receiver_url": url, "memory_mode": mode });
        let body: ReceiveMigrationData = serde_json::from_value(body)?;
        let start = Instant::now();
        let receiving = to.client.vm_receive_migration(&body);
        let sending = async {
            tokio::time::sleep(Duration::from_millis(200)).await;
            let body = serde_json::json!({
                "destination_url": url, "downtime_ms": 20, "timeout_s": 20, "timeout_strategy": "Ignore",
                "memory_mode": mode,
            });
            let body: SendMigrationData = serde_json::from_value(body)?;
            Ok(from.client.vm_send_migration(&body).await?)
        };
        let (received, sent): (_, Result<()>) = tokio::join!(receiving, sending);
        received?;
        sent?;
        let port = to
            .client
            .vm_info()
            .await?
            .config
            .serial
            .file
            .context("no terminal")?;
        all.push(Seen {
            gap: Terminal::open(&port)?.gap()?,
            total: u64::try_from(start.elapsed().as_micros())?,
            ..Seen::default()
        });
    }
    Ok(all)
}

fn median(all: &[Seen], pick: impl Fn(&Seen) -> u64) -> u64 {
    let mut values: Vec<u64> = all.iter().map(pick).collect();
    values.sort_unstable();
    values.get(values.len() / 2).copied().unwrap_or(0)
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
    println!(
        "| memory | vCPUs | pages/s | mode | guest saw | measured | predicted | of it load | all of it | faults p50, p99 (us) | peer: guest saw |"
    );
    println!("|---|---|---|---|---|---|---|---|---|---|---|");
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
    for case in cases {
        let seen = ours(case, times).await?;
        let theirs = match peer {
            None => "-".to_owned(),
            Some(program) => match theirs(program, case, times).await {
                Ok(seen) => ms(median(&seen, |seen| seen.gap)),
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
            "| {} MiB | {} | {} | {} | {} | {} | {} | {} | {} | {faults} | {theirs} |",
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
    }
    Ok(())
}

/// Memory with something in every page, over one connection and more, beside a plain copy over as many.
async fn throughput(times: usize) -> Result<()> {
    const MEMORY: u64 = 1024 * MIB;
    println!(
        "\nThroughput over loopback TCP, in MiB/s: medians of {times}, 1 GiB without a page of zeros.\n"
    );
    println!("| connections | pages | plain copy over as many sockets | ratio |");
    println!("|---|---|---|---|");
    for connections in [1, 2, 4] {
        let (mut moved, mut plain) = (Vec::new(), Vec::new());
        let services = [
            Service::start(Face::Many).await?,
            Service::start(Face::Many).await?,
        ];
        let options = Options {
            workload: Workload::Touch,
            heartbeat_ms: Some(1000),
            then: guest::After::Stay,
            ..Options::default()
        };
        let kernel = services[0].path("pocket.elf");
        std::fs::write(&kernel, guest::IMAGE)?;
        let mut vm_config = VmConfig::with_payload(PayloadConfig {
            kernel: Some(kernel.to_string_lossy().into_owned()),
            cmdline: Some(options.to_string()),
            ..PayloadConfig::default()
        });
        vm_config.memory.size = MEMORY;
        vm_config.serial.mode = ConsoleMode::Pty;
        vm_config.console.mode = ConsoleMode::Off;
        let vm = services[0].create("bench", vm_config).await?;
        services[0].client().vms_boot(&vm).await?;
        let port = services[0].client().vms_info(&vm).await?.config.serial.file;
        let terminal = Terminal::open(&port.context("no terminal")?)?;
        terminal.until(|line| matches!(line, Line::Touched { .. }))?;
        for turn in 0..times {
            let (from, to) = (
                services[turn % 2].client(),
                services[(turn + 1) % 2].client(),
            );
            let waiting = receive(to).await?;
            let what = StartMigration {
                connections: Some(connections),
                ..StartMigration::to(waiting.endpoint)
            };
            let sent = over(from, &from.vms_migrate(&vm, &what).await?).await?;
            moved.push(Seen {
                total: sent.sent_bytes * 1_000_000 / sent.elapsed_us.max(1) / MIB,
                ..Seen::default()
            });
            plain.push(Seen {
                total: copy(connections, MEMORY)? / MIB,
                ..Seen::default()
            });
        }
        let (moved, plain) = (
            median(&moved, |seen| seen.total),
            median(&plain, |seen| seen.total),
        );
        let ratio = u32::try_from(moved * 100 / plain.max(1))?;
        println!(
            "| {connections} | {moved} | {plain} | {:.2} |",
            f64::from(ratio) / 100.0
        );
    }
    Ok(())
}

/// Bytes in a second from memory to memory over so many sockets, in pieces as long as ours.
fn copy(connections: u16, bytes: u64) -> Result<u64> {
    const PIECE: usize = 256 << 10;
    let listener = std::net::TcpListener::bind("127.0.0.1:0")?;
    let address = listener.local_addr()?;
    let share = usize::try_from(bytes / u64::from(connections))?;
    let start = Instant::now();
    let threads: Vec<_> = (0..connections)
        .map(|_| -> Result<_> {
            let mut near = std::net::TcpStream::connect(address)?;
            let (mut far, _) = listener.accept()?;
            let writer = thread::spawn(move || -> Result<()> {
                let memory = vec![7_u8; share];
                memory
                    .chunks(PIECE)
                    .try_for_each(|piece| near.write_all(piece))?;
                Ok(())
            });
            let reader = thread::spawn(move || -> Result<()> {
                let mut memory = vec![0_u8; share];
                std::io::Read::read_exact(&mut far, &mut memory)?;
                ensure!(memory.last() == Some(&7));
                Ok(())
            });
            Ok([writer, reader])
        })
        .collect::<Result<_>>()?;
    for thread in threads.into_iter().flatten() {
        thread
            .join()
            .map_err(|_| anyhow::anyhow!("a copy failed"))??;
    }
    let us = u64::try_from(start.elapsed().as_micros())?.max(1);
    Ok(bytes.saturating_mul(1_000_000) / us)
}
