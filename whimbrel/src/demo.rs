//! `whimbrel demo`: a guest that boots, stands still, goes on and checks its memory, over REST.
//!
//! The service runs in this process, and all that is done to it is done by a client through its
//! socket.

use std::fs::{File, OpenOptions};
use std::io::{self, BufRead, BufReader, IsTerminal, Write};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use api::{Listener, Service, serve};
use control::Registry;
use guest::{After, Command, Line, Options, Order, Workload};
use openapi::Client;
use spec::{
    ConsoleMode, CpusConfig, CreateVm, MemoryConfig, PayloadConfig, VmConfig, VmId, VmState,
};
use tokio::sync::mpsc::{UnboundedReceiver, unbounded_channel};
use vmm::{Pool, PoolConfig};

use crate::serve::{about, runtime};
use crate::signals::Signals;

const PATIENCE: Duration = Duration::from_secs(20);
const VCPUS: u32 = 2;
const MEMORY: u64 = 128 << 20;
const REGION_MIB: u64 = 32;

pub(crate) fn run() -> Result<ExitCode> {
    let pool = Pool::start(&PoolConfig::default())?;
    runtime()?.block_on(async {
        let directory = tempfile::tempdir().context("cannot make a temporary directory")?;
        let socket = directory.path().join("whimbrel.sock");
        let registry = Registry::new(pool);
        let service = Service::new(registry.clone(), about());
        let shutdown = service.shutdown().clone();
        let listener = Listener::unix(&socket)?;
        let serving = tokio::spawn(serve(listener, service.router(), shutdown.clone()));
        let kernel = directory.path().join("pocket-guest");
        std::fs::write(&kernel, guest::IMAGE).context("cannot write the guest's kernel")?;

        let mut demo = Demo {
            client: Client::unix(&socket),
            paint: Paint::new(),
            start: Instant::now(),
        };
        demo.say(&format!("a service, with its API at {}", socket.display()));
        let mut signals = Signals::listen()?;
        let kernel = kernel.to_string_lossy();
        let shown = tokio::select! {
            shown = demo.show(&kernel) => shown,
            () = signals.next() => Err(anyhow::anyhow!("interrupted")),
        };
        shutdown.request();
        registry.delete_all().await;
        serving.await.context("the service failed")?;
        shown?;
        demo.say("the service has ended: all held");
        Ok(ExitCode::SUCCESS)
    })
}

struct Demo {
    client: Client,
    paint: Paint,
    start: Instant,
}

impl Demo {
    async fn show(&mut self, kernel: &str) -> Result<()> {
        let id: VmId = "demo".parse()?;
        self.request("POST /api/v1/vms");
        self.client
            .vms_create(&CreateVm {
                id: Some(id.clone()),
                config: config(kernel),
            })
            .await?;
        self.say(&format!(
            "created: {VCPUS} vCPUs, {} MiB of memory",
            MEMORY >> 20
        ));

        self.request("PUT /api/v1/vms/demo/boot");
        self.client.vms_boot(&id).await?;
        let mut console = Console::open(&self.client, &id).await?;
        self.until(&mut console, |line| matches!(line, Line::Ready { .. }))
            .await?;
        self.timeline(&id).await?;
        self.until(&mut console, |line| {
            matches!(line, Line::Heartbeat { count: 3, .. })
        })
        .await?;

        self.pause(&id, &mut console).await?;

        self.say("the guest is asked to check every page that it wrote");
        console.send(Command::Verify)?;
        let verified = self
            .until(&mut console, |line| matches!(line, Line::Verified { .. }))
            .await?;
        let Line::Verified { pages, bad, .. } = verified else {
            bail!("no answer")
        };
        ensure!(
            pages > 0 && bad == 0,
            "{bad} of {pages} pages are not as they were written"
        );
        self.say(&format!("{pages} pages are as they were written"));

        self.request("PUT /api/v1/vms/demo/shutdown");
        self.client.vms_shutdown(&id).await?;
        let state = self.client.vms_info(&id).await?.state;
        ensure!(
            state == VmState::Shutdown,
            "the VM is {state} after a shutdown"
        );
        self.request("DELETE /api/v1/vms/demo");
        self.client.vms_delete(&id).await?;
        Ok(())
    }

    async fn pause(&mut self, id: &VmId, console: &mut Console) -> Result<()> {
        self.request("PUT /api/v1/vms/demo/pause");
        self.client.vms_pause(id).await?;
        // What the guest had written before.
        while console.within(Duration::from_millis(50)).await.is_some() {}
        let still = console.within(Duration::from_millis(400)).await;
        ensure!(still.is_none(), "a paused guest wrote {still:?}");
        self.say("paused: no heartbeat in 400 ms");
        self.request("PUT /api/v1/vms/demo/resume");
        self.client.vms_resume(id).await?;
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
            .client
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
        self.say("from the boot request:");
        for (what, us) in steps {
            let us = us.with_context(|| format!("there is no time for: {what}"))?;
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
                .context("the guest does not say what it should")?;
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

/// What is shown may have no reader any more; the demonstration goes on, and its status tells.
fn show_line(text: &str) {
    let _ = writeln!(io::stdout(), "{text}");
}

fn config(kernel: &str) -> VmConfig {
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
    config.serial.mode = ConsoleMode::Pty;
    config
}

/// The guest's console, a pseudo terminal.
struct Console {
    terminal: File,
    lines: UnboundedReceiver<String>,
}

impl Console {
    async fn open(client: &Client, id: &VmId) -> Result<Self> {
        let path = client.vms_info(id).await?.config.serial.file;
        let path = path.context("the VM's pseudo terminal has no path")?;
        let terminal = OpenOptions::new().read(true).write(true).open(&path);
        let terminal = terminal.with_context(|| format!("cannot open the console {path}"))?;
        let reader = BufReader::new(terminal.try_clone()?);
        let (sender, lines) = unbounded_channel();
        // It ends with the terminal, which goes with the VM.
        std::thread::spawn(move || {
            for line in reader.lines().map_while(Result::ok) {
                if sender.send(line.trim_end().to_owned()).is_err() {
                    return;
                }
            }
        });
        Ok(Self { terminal, lines })
    }

    async fn within(&mut self, patience: Duration) -> Option<String> {
        tokio::time::timeout(patience, self.lines.recv())
            .await
            .ok()
            .flatten()
    }

    fn send(&mut self, command: Command) -> Result<()> {
        writeln!(self.terminal, "{command}").context("the console takes no input")
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
