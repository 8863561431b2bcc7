//! `wh-remote` as a user runs it: its output, its terminal, its exit code.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::process::{Child, Command, Output, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use guest::{After, Options, Workload};
use rustix::fs::{Mode, OFlags};
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{LocalModes, tcgetattr};
use spec::{ConsoleMode, SerialConfig, VmConfig};
use tests::{Face, Service, built};

const SOON: Duration = Duration::from_secs(30);

fn beating() -> Options {
    Options {
        heartbeat_ms: Some(20),
        ..Options::default()
    }
}

fn remote(service: &Service, arguments: &[&str]) -> Result<Command> {
    let mut command = Command::new(built("wh-remote")?);
    command.arg("--api-socket").arg(service.socket());
    command.args(arguments);
    Ok(command)
}

fn run(service: &Service, arguments: &[&str]) -> Result<Output> {
    Ok(remote(service, arguments)?.stdin(Stdio::null()).output()?)
}

fn stdout(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned()
}

fn written(service: &Service, config: &VmConfig) -> Result<String> {
    let path = service.path("vm.json");
    fs::write(&path, serde_json::to_vec(config)?)?;
    Ok(path.to_string_lossy().into_owned())
}

/// A terminal in which a program runs.
struct Terminal {
    child: Child,
    keys: File,
    side: File,
    output: Receiver<Vec<u8>>,
    seen: String,
}

impl Terminal {
    fn start(mut command: Command) -> Result<Self> {
        let master = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY)?;
        grantpt(&master)?;
        unlockpt(&master)?;
        let path = ptsname(&master, Vec::new())?;
        let flags = OFlags::RDWR | OFlags::NOCTTY;
        let side = File::from(rustix::fs::open(&path, flags, Mode::empty())?);
        let child = command
            .stdin(side.try_clone()?)
            .stdout(side.try_clone()?)
            .stderr(side.try_clone()?)
            .spawn()?;
        let keys = File::from(master);
        let mut reader = keys.try_clone()?;
        let (sender, output) = channel();
        std::thread::spawn(move || {
            let mut buffer = [0; 4096];
            while let Ok(len @ 1..) = reader.read(&mut buffer) {
                if sender.send(buffer[..len].to_vec()).is_err() {
                    return;
                }
            }
        });
        Ok(Self {
            child,
            keys,
            side,
            output,
            seen: String::new(),
        })
    }

    fn shows(&mut self, text: &str) -> Result<()> {
        let end = Instant::now() + SOON;
        while !self.seen.contains(text) {
            let left = end.saturating_duration_since(Instant::now());
            let part = self.output.recv_timeout(left);
            let part = part.with_context(|| format!("no `{text}` in:\n{}", self.seen))?;
            self.seen.push_str(&String::from_utf8_lossy(&part));
        }
        Ok(())
    }

    fn is_raw(&self) -> Result<bool> {
        Ok(!tcgetattr(&self.side)?
            .local_modes
            .contains(LocalModes::ICANON))
    }

    fn ends_well(&mut self) -> Result<()> {
        let end = Instant::now() + SOON;
        loop {
            if let Some(status) = self.child.try_wait()? {
                ensure!(status.success(), "{status}:\n{}", self.seen);
                return Ok(());
            }
            if Instant::now() > end {
                bail!("the program has not ended:\n{}", self.seen);
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Connects to the guest's console by the program, and leaves it again.
async fn console_of(mode: SerialConfig) -> Result<()> {
    let service = Service::start(Face::Many).await?;
    let (mut config, _) = service.pocket("vm", beating())?;
    config.serial = mode;
    let vm = service.create("vm", config).await?;
    service.client().vms_boot(&vm).await?;
    let mut terminal = Terminal::start(remote(&service, &["--vm", "vm", "console"])?)?;
    terminal.shows("Ctrl-A x leaves")?;
    terminal.shows("pocket: heartbeat")?;
    ensure!(terminal.is_raw()?, "the guest gets each key");
    terminal.keys.write_all(b"\x01x")?;
    terminal.ends_well()?;
    ensure!(!terminal.is_raw()?, "the terminal is as it was before");
    Ok(())
}

#[tokio::test]
async fn console_connects_to_a_socket_and_leaves_by_escape() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let socket = dir.path().join("serial.sock");
    console_of(SerialConfig {
        socket: Some(socket.to_string_lossy().into_owned()),
        ..SerialConfig::with_mode(ConsoleMode::Socket)
    })
    .await
}

#[tokio::test]
async fn console_connects_to_a_pty_and_leaves_by_escape() -> Result<()> {
    console_of(SerialConfig::with_mode(ConsoleMode::Pty)).await
}

#[tokio::test]
async fn start_creates_and_boots_and_logs_shows_the_output() -> Result<()> {
    let service = Service::start(Face::Many).await?;
    let (config, serial) = service.pocket("vm", beating())?;
    let path = written(&service, &config)?;
    let started = run(&service, &["--vm", "web", "start", &path])?;
    ensure!(started.status.success(), "{started:?}");
    serial.wait_for("pocket: heartbeat", 1, SOON).await?;

    let log = stdout(&run(&service, &["--vm", "web", "logs"])?);
    ensure!(log.contains("pocket: hello"), "{log}");
    // Each is one line; a later one comes while the program runs.
    let mut follow = Terminal::start(remote(&service, &["--vm", "web", "logs", "-f"])?)?;
    let seen = log.matches("pocket: heartbeat").count();
    let later = format!("heartbeat count={}", seen + 20);
    follow.shows(&later)?;
    Ok(())
}

/// `whimbrel run FILE` takes the file that `create` takes, and ends with its guest.
#[tokio::test]
async fn run_takes_a_configuration_file() -> Result<()> {
    let service = Service::start(Face::Many).await?;
    let options = Options {
        workload: Workload::SelfTest,
        then: After::PowerOff,
        ..Options::default()
    };
    let (config, serial) = service.pocket("vm", options)?;
    let path = written(&service, &config)?;
    let run = Command::new(built("whimbrel")?)
        .args(["run", &path])
        .output()?;
    ensure!(run.status.success(), "{run:?}");
    ensure!(serial.text().contains("pocket: hello"), "{}", serial.text());

    let twice = ["run", &path, "--cpus", "2"];
    let refused = Command::new(built("whimbrel")?).args(twice).output()?;
    let text = String::from_utf8_lossy(&refused.stderr).into_owned();
    ensure!(
        !refused.status.success() && text.contains("exclude each other"),
        "{text}"
    );
    Ok(())
}

/// Ctrl-A x ends the VM and gives the terminal back; before that, keys reach the guest.
#[tokio::test]
async fn run_on_a_terminal_is_left_by_escape() -> Result<()> {
    let service = Service::start(Face::Many).await?;
    let (mut config, _) = service.pocket("vm", beating())?;
    config.serial = SerialConfig::with_mode(ConsoleMode::Tty);
    let path = written(&service, &config)?;
    let mut command = Command::new(built("whimbrel")?);
    command.args(["run", &path]);
    let mut terminal = Terminal::start(command)?;
    terminal.shows("Ctrl-A x ends the VM")?;
    terminal.shows("pocket: heartbeat")?;
    ensure!(terminal.is_raw()?, "the guest gets each key");
    terminal.keys.write_all(b"ping\n")?;
    terminal.shows("pocket: alive")?;
    terminal.keys.write_all(b"\x01x")?;
    terminal.ends_well()?;
    ensure!(!terminal.is_raw()?, "the terminal is as it was before");
    Ok(())
}

#[tokio::test]
async fn start_leaves_nothing_when_the_boot_fails() -> Result<()> {
    let service = Service::start(Face::Many).await?;
    let (mut config, _) = service.pocket("vm", beating())?;
    config.payload.kernel = Some("/nowhere/vmlinux".to_owned());
    let path = written(&service, &config)?;
    let refused = run(&service, &["--vm", "web", "start", &path])?;
    ensure!(!refused.status.success());
    let text = String::from_utf8_lossy(&refused.stderr).into_owned();
    ensure!(text.contains("/nowhere/vmlinux"), "{text}");
    ensure!(service.client().vms_list().await?.is_empty());
    Ok(())
}

/// Tables also go into pipes; `--json`, and the name `ch-remote`, give JSON.
#[tokio::test]
async fn output_is_text_unless_json_is_asked_for() -> Result<()> {
    let service = Service::start(Face::Many).await?;
    let (config, _) = service.pocket("vm", beating())?;
    service.create("vm", config).await?;
    let table = stdout(&run(&service, &["ls"])?);
    ensure!(table.contains("vm") && table.contains("Created"), "{table}");
    let info = stdout(&run(&service, &["--vm", "vm", "info"])?);
    ensure!(info.trim_start().starts_with("state"), "{info}");
    let json = stdout(&run(&service, &["ls", "--json"])?);
    serde_json::from_str::<serde_json::Value>(&json).context(json)?;

    let link = service.path("ch-remote");
    std::os::unix::fs::symlink(built("wh-remote")?, &link)?;
    let json = Command::new(&link)
        .arg("--api-socket")
        .arg(service.socket())
        .args(["--vm", "vm", "info"])
        .output()?;
    let json = stdout(&json);
    serde_json::from_str::<serde_json::Value>(&json).context(json)?;
    Ok(())
}

/// The sequence of Cloud Hypervisor's documentation, under the name of its client.
#[tokio::test]
async fn ch_remote_saves_and_restores() -> Result<()> {
    let service = Service::start(Face::One).await?;
    let link = service.path("ch-remote");
    std::os::unix::fs::symlink(built("wh-remote")?, &link)?;
    let run = |arguments: &[&str]| -> Result<String> {
        let mut command = Command::new(&link);
        command.arg("--api-socket").arg(service.socket());
        let output = command.args(arguments).stdin(Stdio::null()).output()?;
        let error = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "{arguments:?}: {error}");
        Ok(stdout(&output))
    };
    let (config, serial) = service.pocket("vm", beating())?;
    run(&["create", &written(&service, &config)?])?;
    run(&["boot"])?;
    serial.wait_for("heartbeat", 1, SOON).await?;
    let dir = service.path("snapshot");
    fs::create_dir(&dir)?;
    let url = format!("file://{}", dir.display());
    let refused = run(&["snapshot", &url]);
    ensure!(refused.is_err(), "a VM that runs is not saved");
    run(&["pause"])?;
    run(&["snapshot", &url])?;
    run(&["delete"])?;
    run(&["restore", &format!("source_url={url}")])?;
    let info: serde_json::Value = serde_json::from_str(&run(&["info"])?)?;
    ensure!(info["state"] == "Paused", "{info}");
    let beats = || serial.text().matches("heartbeat").count();
    let before = beats();
    run(&["resume"])?;
    // The file has what the guest printed before.
    ensure!(before > 0);
    serial.wait_for("heartbeat", before + 1, SOON).await?;
    Ok(())
}

/// The demonstration checks what it shows, and ends with forks of its guest.
#[test]
fn demo_ends_with_forks() -> Result<()> {
    let output = Command::new(built("whimbrel")?)
        .arg("demo")
        .stdin(Stdio::null())
        .output()?;
    let text = stdout(&output);
    ensure!(output.status.success(), "{text}");
    let forks = text
        .lines()
        .find(|line| line.contains("10 forks run after"));
    // The least, the median and the most of all forks.
    let spread = |what: &str| {
        let line = text.lines().find_map(|line| line.split_once(what));
        let figures = line
            .map_or("", |(_, figures)| figures)
            .split(|c: char| !c.is_ascii_digit());
        let figures: Vec<u64> = figures.filter_map(|figure| figure.parse().ok()).collect();
        matches!(figures[..], [min, max, median, ..] if min <= median && median <= max && max > 0)
    };
    ensure!(forks.is_some(), "{text}");
    ensure!(
        spread("all have answered, after ") && spread("each takes "),
        "{text}"
    );
    ensure!(text.contains("every check passed"), "{text}");
    Ok(())
}

/// An error of a VM on the command line is printed once, and not logged as well.
#[test]
fn run_prints_an_error_once() -> Result<()> {
    let output = Command::new(built("whimbrel")?)
        .args(["run", "--kernel", "/nowhere/vmlinux"])
        .output()?;
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    ensure!(!output.status.success(), "{text}");
    ensure!(text.matches("/nowhere/vmlinux").count() == 1, "{text}");
    Ok(())
}

/// Consumers look for the version by the name under which they start a program.
#[test]
fn version_is_that_of_the_name_of_the_program() -> Result<()> {
    let dir = tempfile::tempdir()?;
    for (program, name) in [("wh-remote", "ch-remote"), ("whimbrel", "cloud-hypervisor")] {
        let link = dir.path().join(name);
        std::os::unix::fs::symlink(built(program)?, &link)?;
        let output = Command::new(&link).arg("--version").output()?;
        let first = stdout(&output);
        let first = first.lines().next().unwrap_or_default();
        ensure!(first == format!("{name} v54.0.0"), "{first}");
        let own = stdout(&Command::new(built(program)?).arg("--version").output()?);
        ensure!(own.starts_with(&format!("{program} 0.")), "{own}");
    }
    Ok(())
}

/// A tap is made if there is none of its name, which may be mistyped. Making one needs the right to.
#[tokio::test]
async fn new_tap_of_a_given_name_is_logged() -> Result<()> {
    let service = Service::start(Face::Many).await?;
    let (mut config, _) = service.pocket("vm", beating())?;
    let net = |tap: &str| serde_json::from_str(tap).map(|net| Some(vec![net]));
    config.net = net(r#"{"tap": "wbmistyped"}"#)?;
    let vm = service.create("vm", config.clone()).await?;
    service.client().vms_boot(&vm).await?;
    let warnings = || service.log().matches("a new tap is made").count();
    ensure!(warnings() == 1 && service.log().contains("wbmistyped"));
    // One that is there, and one that no name was given for.
    service.client().vms_delete(&vm).await?;
    config.net = net("{}")?;
    let vm = service.create("vm", config).await?;
    service.client().vms_boot(&vm).await?;
    ensure!(warnings() == 1, "{}", service.log());
    let info = service.client().vms_info(&vm).await?;
    let net = info.config.net.into_iter().flatten().next();
    ensure!(net.as_ref().is_some_and(|net| net.ip.is_empty()), "{net:?}");
    Ok(())
}

#[tokio::test]
async fn console_refuses_a_file_and_logs_refuses_a_socket() -> Result<()> {
    let service = Service::start(Face::Many).await?;
    let (config, _) = service.pocket("vm", beating())?;
    service.create("vm", config).await?;
    let refused = run(&service, &["--vm", "vm", "console"])?;
    let text = String::from_utf8_lossy(&refused.stderr).into_owned();
    ensure!(
        text.contains("serial.mode is File") && text.contains("`logs`"),
        "{text}"
    );
    let refused = run(&service, &["--vm", "vm", "logs", "--port", "console"])?;
    let text = String::from_utf8_lossy(&refused.stderr).into_owned();
    ensure!(text.contains("console.mode is Off"), "{text}");
    Ok(())
}

/// A reader that ends early is no error, and no panic: `wh-remote completions bash | head -1`.
#[test]
fn completions_end_quietly_when_the_reader_is_gone() -> Result<()> {
    for program in ["wh-remote", "whimbrel"] {
        let mut child = Command::new(built(program)?)
            .args(["completions", "bash"])
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()?;
        drop(child.stdout.take());
        let output = child.wait_with_output()?;
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        ensure!(
            output.status.success() && text.is_empty(),
            "{program}: {text}"
        );
    }
    Ok(())
}
