//! `whimbrel demo`: a guest that boots, is paused and resumed, and migrates between two services while
//! it writes to its memory, over REST; it checks its memory after each move. At the end it is forked.
//!
//! Both services run in this process, and all that is done to them is done by clients through their
//! sockets.

use std::io::{self, BufRead, BufReader, IsTerminal, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use api::{Listener, Service, Shutdown, serve};
use control::Registry;
use guest::{After, Command, Line, Options, Order, Workload};
use indicatif::{ProgressBar, ProgressStyle};
use openapi::Client;
use spec::{
    AwaitMigration, ConsoleMode, CpusConfig, CreateVm, ForkVm, MemoryConfig, MemoryMode,
    MigrationInfo, MigrationPhase, Overrides, PayloadConfig, SerialConfig, StartMigration,
    VmConfig, VmId, VmState,
};
use tokio::sync::mpsc::{UnboundedReceiver, unbounded_channel};
use tokio::task::{JoinHandle, JoinSet};
use vmm::{Confinement, Pool, PoolConfig};

use crate::serve::{about, runtime};
use crate::signals::Signals;

const PATIENCE: Duration = Duration::from_secs(20);
const VCPUS: u32 = 2;
const MEMORY: u64 = 128 << 20;
const REGION_MIB: u64 = 32;
const FORKS: u32 = 10;
/// There and back: memory before the guest, and after it.
const MOVES: [MemoryMode; 2] = [MemoryMode::Precopy, MemoryMode::Postcopy];

pub(crate) fn run(confinement: Confinement) -> Result<ExitCode> {
    runtime(2)?.block_on(async {
        let directory = tempfile::tempdir().context("cannot make a temporary directory")?;
        let directory = directory.path();
        let start = |name| One::start(directory, name, confinement);
        let services = [start("a")?, start("b")?];
        let kernel = directory.join("pocket-guest");
        std::fs::write(&kernel, guest::IMAGE).context("cannot write the guest's kernel")?;

        let mut demo = Demo {
            clients: services.each_ref().map(|one| Client::unix(&one.socket)),
            here: 0,
            console: directory.join("console"),
            directory: directory.to_string_lossy().into_owned(),
            paint: Paint::new(),
            start: Instant::now(),
        };
        for one in &services {
            demo.say(&format!(
                "a service, with its API at {}",
                one.socket.display()
            ));
        }
        let mut signals = Signals::listen()?;
        let kernel = kernel.to_string_lossy();
        let shown = tokio::select! {
            shown = demo.show(&kernel) => shown,
            () = signals.next() => Err(anyhow::anyhow!("interrupted")),
        };
        // Also after a failure: each service ends its VMs and removes its sockets.
        for one in services {
            one.end().await?;
        }
        shown?;
        demo.say("both services have ended: every check passed");
        Ok(ExitCode::SUCCESS)
    })
}

/// A service of this process.
struct One {
    socket: PathBuf,
    registry: Registry,
    shutdown: Shutdown,
    serving: JoinHandle<()>,
}

impl One {
    fn start(directory: &Path, name: &str, confinement: Confinement) -> Result<Self> {
        let pool = Pool::start(&PoolConfig {
            confinement,
            ..PoolConfig::default()
        })?;
        let socket = directory.join(format!("{name}.sock"));
        let registry = Registry::new(pool.with_journals(directory.join(name)));
        let service = Service::new(registry.clone(), about());
        let shutdown = service.shutdown().clone();
        let listener = Listener::unix(&socket)?;
        let serving = tokio::spawn(serve(listener, service.router(), shutdown.clone()));
        Ok(Self {
            socket,
            registry,
            shutdown,
            serving,
        })
    }

    async fn end(self) -> Result<()> {
        self.shutdown.request();
        self.registry.delete_all().await;
        self.serving.await.context("a service failed")
    }
}

struct Demo {
    clients: [Client; 2],
    /// The service that runs the guest.
    here: usize,
    console: PathBuf,
    /// The folder of all of the demo's files.
    directory: String,
    paint: Paint,
    start: Instant,
}

impl Demo {
    async fn show(&mut self, kernel: &str) -> Result<()> {
        let id: VmId = "demo".parse()?;
        self.request("POST /api/v1/vms");
        self.client()
            .vms_create(&CreateVm {
                id: Some(id.clone()),
                config: config(kernel, &self.console)?,
            })
            .await?;
        self.say(&format!(
            "created: {VCPUS} vCPUs, {} MiB of memory",
            MEMORY >> 20
        ));

        self.request("PUT /api/v1/vms/demo/boot");
        self.client().vms_boot(&id).await?;
        let mut console = Console::open(&self.console).await?;
        // It may have said that it is ready before anybody listened.
        self.until(&mut console, |line| {
            matches!(line, Line::Ready { .. } | Line::Heartbeat { .. })
        })
        .await?;
        self.timeline(&id).await?;
        self.until(&mut console, |line| {
            matches!(line, Line::Heartbeat { count: 3, .. })
        })
        .await?;

        self.pause(&id, &mut console).await?;

        for mode in MOVES {
            console = self.migrate(&id, mode, console).await?;
        }
        drop(console);
        self.fork(&id).await?;

        self.request("PUT /api/v1/vms/demo/shutdown");
        self.client().vms_shutdown(&id).await?;
        let state = self.client().vms_info(&id).await?.state;
        ensure!(
            state == VmState::Shutdown,
            "the VM is {state} after a shutdown"
        );
        self.request("DELETE /api/v1/vms/demo");
        self.client().vms_delete(&id).await?;
        Ok(())
    }

    /// Makes forks of the guest, which run beside each other from the same moment on.
    async fn fork(&self, id: &VmId) -> Result<()> {
        self.request("PUT /api/v1/vms/demo/pause");
        self.client().vms_pause(id).await?;
        self.request("POST /api/v1/vms/demo/forks");
        let port = |n: &str| format!("{}/fork-{n}", self.directory);
        let serial = SerialConfig {
            socket: Some(port("{n}")),
            ..SerialConfig::with_mode(ConsoleMode::Socket)
        };
        let what = ForkVm {
            count: FORKS,
            name: Some("fork".parse()?),
            resume: true,
            overrides: Overrides {
                serial: Some(serial),
                ..Overrides::default()
            },
            ..ForkVm::default()
        };
        let asked = Instant::now();
        let begun = self.client().vms_fork(id, &what).await?;
        let made = self.follow(&begun).await?;
        let ms = made.elapsed_us / 1000;
        self.say(&format!(
            "{FORKS} forks run after {ms} ms, from one copy of the guest"
        ));
        let mut answers = JoinSet::new();
        for n in 1..=FORKS {
            let port = port(&n.to_string());
            answers.spawn(async move {
                let mut console = Console::open(Path::new(&port)).await?;
                let line = console.within(PATIENCE).await;
                ensure!(line.is_some(), "fork {n} does not run");
                anyhow::Ok(asked.elapsed().as_millis())
            });
        }
        let mut times = Vec::new();
        while let Some(answer) = answers.join_next().await {
            times.push(answer??);
        }
        let memory = memory_of_forks()?;
        ensure!(
            memory.len() == FORKS as usize,
            "{} forks are mapped",
            memory.len()
        );
        self.say(&format!("all have answered, after {} ms", spread(times)));
        self.say(&format!(
            "each takes {} KiB of {} MiB of memory",
            spread(memory),
            MEMORY >> 20
        ));
        for n in 1..=FORKS {
            self.client()
                .vms_delete(&format!("fork-{n}").parse()?)
                .await?;
        }
        Ok(())
    }

    /// The service at which the guest is.
    fn client(&self) -> &Client {
        &self.clients[self.here]
    }

    /// Moves the guest to the other service, over loopback, and has it check its memory there.
    async fn migrate(
        &mut self,
        id: &VmId,
        mode: MemoryMode,
        mut before: Console,
    ) -> Result<Console> {
        before.send(Command::Report)?;
        self.until(&mut before, |line| matches!(line, Line::Report { .. }))
            .await?;
        let (from, to) = (self.here, 1 - self.here);
        self.request("POST /api/v1/migrations        (to the destination service)");
        // Both ends are this program's: a peer may name the demo's own files.
        let waiting = AwaitMigration {
            insecure: true,
            allow: Some(vec![self.directory.clone()]),
            ..AwaitMigration::at("tcp:127.0.0.1:0")
        };
        // The destination listens before the source connects, and names the port that the host
        // chose.
        let waiting = self.clients[to].migrations_receive(&waiting).await?;
        self.request(&format!("POST /api/v1/vms/demo/migrations  ({mode})"));
        let what = StartMigration {
            mode,
            max_downtime_ms: 10,
            insecure: true,
            ..StartMigration::to(waiting.endpoint)
        };
        let begun = self.clients[from].vms_migrate(id, &what).await?;
        let moved = self.follow(&begun).await?;
        self.here = to;
        let stop = moved
            .downtime
            .context("the completed migration reports no downtime")?;
        let predicted = moved
            .predicted_downtime_us
            .map(|us| format!(" ({:.1} ms predicted)", ms(us)));
        self.say(&format!(
            "moved: {} pages and {} zero pages, {} MiB; stopped for {:.1} ms{}",
            moved.pages,
            moved.zero_pages,
            moved.sent_bytes >> 20,
            ms(stop.total_us),
            predicted.unwrap_or_default(),
        ));
        if mode == MemoryMode::Postcopy {
            let name: VmId = waiting.id.parse()?;
            let there = self.clients[to].migrations_info(&name).await?;
            self.say(&format!(
                "the guest resumed before its memory had arrived, and waited for {} pages (median \
                 {:.2} ms)",
                there.faults,
                ms(there.fault_p50_us),
            ));
        }
        // What it said while it moved went to the service that it left.
        let mut console = Console::open(&self.console).await?;
        self.until(&mut console, |line| matches!(line, Line::Heartbeat { .. }))
            .await?;
        console.send(Command::Report)?;
        let report = self
            .until(&mut console, |line| matches!(line, Line::Report { .. }))
            .await?;
        if let Line::Report { gap_us, .. } = report {
            self.say(&format!("the guest saw a gap of {:.1} ms", ms(gap_us)));
        }
        self.say("the guest checks every page that it wrote");
        console.send(Command::Verify)?;
        let verified = self
            .until(&mut console, |line| matches!(line, Line::Verified { .. }))
            .await?;
        let Line::Verified { pages, bad, .. } = verified else {
            bail!("no answer")
        };
        ensure!(
            pages > 0 && bad == 0,
            "{bad} of {pages} pages differ from what the guest wrote"
        );
        self.say(&format!("{pages} pages are unchanged"));
        Ok(console)
    }

    /// Waits until a migration is over, with a progress bar on a terminal.
    async fn follow(&self, begun: &MigrationInfo) -> Result<MigrationInfo> {
        let bar = if io::stderr().is_terminal() {
            ProgressBar::new(MEMORY)
        } else {
            ProgressBar::hidden()
        };
        let style = "{prefix:>14} [{bar:32}] {bytes}/{total_bytes} {msg}";
        bar.set_style(ProgressStyle::with_template(style)?.progress_chars("=> "));
        let name: VmId = begun.id.parse()?;
        let deadline = Instant::now() + PATIENCE;
        loop {
            let info = self.client().migrations_info(&name).await?;
            bar.set_position(
                info.memory_bytes
                    .saturating_sub(info.remaining_pages * spec::limits::PAGE),
            );
            bar.set_prefix(info.phase.to_string());
            bar.set_message(format!(
                "round {}, {} dirty pages/s",
                info.rounds, info.dirty_pages_per_second
            ));
            if info.phase.is_over() {
                bar.finish_and_clear();
                ensure!(
                    info.phase == MigrationPhase::Completed,
                    "the migration is {}: {:?}",
                    info.phase,
                    info.error
                );
                return Ok(info);
            }
            ensure!(
                Instant::now() < deadline,
                "the migration has not ended in time: {info:?}"
            );
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    async fn pause(&mut self, id: &VmId, console: &mut Console) -> Result<()> {
        self.request("PUT /api/v1/vms/demo/pause");
        self.client().vms_pause(id).await?;
        // What the guest had written before.
        while console.within(Duration::from_millis(50)).await.is_some() {}
        let still = console.within(Duration::from_millis(400)).await;
        ensure!(still.is_none(), "a paused guest wrote {still:?}");
        self.say("paused: no heartbeat in 400 ms");
        self.request("PUT /api/v1/vms/demo/resume");
        self.client().vms_resume(id).await?;
        self.until(console, |line| matches!(line, Line::Heartbeat { .. }))
            .await?;
        console.send(Command::Report)?;
        let report = self
            .until(console, |line| matches!(line, Line::Report { .. }))
            .await?;
        if let Line::Report { gap_us, .. } = report {
            self.say(&format!(
                "resumed: the guest saw a stop of {} ms",
                gap_us / 1000
            ));
        }
        Ok(())
    }

    async fn timeline(&self, id: &VmId) -> Result<()> {
        self.request("GET /api/v1/vms/demo");
        let boot = self
            .client()
            .vms_info(id)
            .await?
            .boot
            .context("a VM that booted has no timeline")?;
        let steps = [
            ("machine built, kernel loaded", boot.built_us),
            ("guest entered", boot.first_entry_us),
            ("first instruction seen", boot.first_debug_port_us),
            ("first byte on the console", boot.first_serial_us),
        ];
        self.say("since the boot request:");
        for (what, us) in steps {
            let us = us.with_context(|| format!("the timeline has no time for: {what}"))?;
            let ms = f64::from(u32::try_from(us)?) / 1000.0;
            show_line(&format!("             {ms:>9.3} ms  {what}"));
        }
        Ok(())
    }

    /// Shows the guest's lines up to the one that is waited for.
    async fn until(&self, console: &mut Console, wanted: impl Fn(&Line) -> bool) -> Result<Line> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let text = console
                .within(left)
                .await
                .context("the guest did not print the expected line in time")?;
            show_line(&format!("             {}", self.paint.guest(&text)));
            match Line::parse(&text) {
                Some(line) if wanted(&line) => return Ok(line),
                Some(Line::Fault { .. } | Line::Panic { .. }) => bail!("the guest failed: {text}"),
                _ => {}
            }
        }
    }

    fn request(&self, request: &str) {
        show_line(&format!(
            "{}  {}",
            self.clock(),
            self.paint.request(request)
        ));
    }

    fn say(&self, text: &str) {
        show_line(&format!("{}  {text}", self.clock()));
    }

    fn clock(&self) -> String {
        format!("{:>8.1} ms", self.start.elapsed().as_secs_f64() * 1000.0)
    }
}

/// The least, the median and the most of some figures.
fn spread<T: Ord + std::fmt::Display>(mut all: Vec<T>) -> String {
    all.sort_unstable();
    match (all.first(), all.get(all.len() / 2), all.last()) {
        (Some(min), Some(median), Some(max)) => format!("{min} to {max} (median {median})"),
        _ => "no".to_owned(),
    }
}

/// Returns the KiB of memory that each fork takes: of what they share, each has its part.
fn memory_of_forks() -> Result<Vec<u64>> {
    // Both services are in this process.
    let maps = std::fs::read_to_string("/proc/self/smaps").context("cannot read the memory map")?;
    let (mut forks, mut counts) = (Vec::new(), false);
    for line in maps.lines() {
        match line.strip_prefix("Pss:") {
            Some(kib) if counts => {
                let kib = kib.trim().trim_end_matches(" kB").parse().unwrap_or(0);
                if let Some(fork) = forks.last_mut() {
                    *fork += kib;
                }
            }
            Some(_) => {}
            // A line of the mapping itself. That of the first part of a fork's memory has the offset 0.
            None if line.contains('-') => {
                counts = line.contains("memfd:forks");
                let offset = line.split_whitespace().nth(2).unwrap_or("");
                if counts && offset.bytes().all(|digit| digit == b'0') {
                    forks.push(0);
                }
            }
            None => {}
        }
    }
    Ok(forks)
}

/// Prints a line. A closed pipe is ignored: the demonstration continues, and its exit status tells the
/// result.
fn show_line(text: &str) {
    let _ = writeln!(io::stdout(), "{text}");
}

/// Milliseconds, of microseconds.
fn ms(us: u64) -> f64 {
    f64::from(u32::try_from(us).unwrap_or(u32::MAX)) / 1000.0
}

fn config(kernel: &str, console: &Path) -> Result<VmConfig> {
    let workload = Workload::Dirty {
        region_mib: Some(REGION_MIB),
        rate: Some(2000),
        order: Order::Linear,
    };
    let options = Options {
        workload,
        heartbeat_ms: Some(100),
        then: After::Stay,
        ..Options::default()
    };
    let mut config = VmConfig::with_payload(PayloadConfig {
        kernel: Some(kernel.to_owned()),
        cmdline: Some(options.to_string()),
        ..PayloadConfig::default()
    });
    config.cpus = CpusConfig::with_vcpus(VCPUS);
    config.memory = MemoryConfig::with_size(MEMORY);
    config.serial.mode = ConsoleMode::Socket;
    config.serial.socket = Some(console.to_string_lossy().into_owned());
    Ok(config)
}

/// The guest's console, a socket whose path goes with it from service to service.
struct Console {
    socket: UnixStream,
    lines: UnboundedReceiver<String>,
}

impl Console {
    async fn open(path: &Path) -> Result<Self> {
        let socket = UnixStream::connect(path)
            .with_context(|| format!("cannot open the console {}", path.display()))?;
        let reader = BufReader::new(socket.try_clone()?);
        let (sender, lines) = unbounded_channel();
        // It ends with the socket, which goes with the VM. The guest may be in the middle of a line when
        // the console is opened.
        std::thread::spawn(move || {
            let lines = reader.lines().map_while(Result::ok);
            for line in lines.skip_while(|line| !line.starts_with("pocket:")) {
                if sender.send(line.trim_end().to_owned()).is_err() {
                    return;
                }
            }
        });
        Ok(Self { socket, lines })
    }

    async fn within(&mut self, patience: Duration) -> Option<String> {
        tokio::time::timeout(patience, self.lines.recv())
            .await
            .ok()
            .flatten()
    }

    fn send(&mut self, command: Command) -> Result<()> {
        writeln!(self.socket, "{command}").context("the console accepts no input")
    }
}

/// Colours, on a terminal.
struct Paint {
    on: bool,
}

impl Paint {
    fn new() -> Self {
        Self {
            on: io::stdout().is_terminal() && std::env::var_os("NO_COLOR").is_none(),
        }
    }

    fn guest(&self, text: &str) -> String {
        self.wrap("32", text)
    }

    fn request(&self, text: &str) -> String {
        self.wrap("1;36", text)
    }

    fn wrap(&self, code: &str, text: &str) -> String {
        if self.on {
            format!("\x1b[{code}m{text}\x1b[0m")
        } else {
            text.to_owned()
        }
    }
}
