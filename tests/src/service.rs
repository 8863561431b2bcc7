//! A program that runs for one test.

use std::env;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use guest::Options;
use openapi::Client;
use rustix::process::{Pid, Signal, kill_process};
use spec::{
    ConsoleConfig, ConsoleMode, CreateVm, MigrationInfo, PayloadConfig, SerialConfig, VmConfig,
    VmId, VmInfo, VmState,
};
use tempfile::TempDir;

use crate::Serial;

/// How long a service may take to answer its first ping, also where all is emulated.
const STARTS: Duration = Duration::from_secs(60);

/// How long a state may take to come.
const CHANGES: Duration = Duration::from_secs(60);

/// In the log line of a system call that the sandbox refused.
const REFUSED: &str = "the sandbox refused a system call";

/// The API that a program serves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Face {
    /// `whimbrel serve`: many VMs.
    Many,
    /// `whimbrel --api-socket`: one VM, as Cloud Hypervisor does.
    One,
}

/// How the program is started.
#[derive(Clone, Debug)]
struct Launch {
    face: Face,
    /// The command that becomes the program: the child's process id is the program's.
    wrapper: Vec<&'static str>,
    /// More of the command line.
    arguments: Vec<String>,
    /// Standard output is a pipe that only [`Service::take_output`] reads.
    is_piped: bool,
}

impl Launch {
    fn new(face: Face, wrapper: &[&'static str]) -> Self {
        Self {
            face,
            wrapper: wrapper.to_vec(),
            arguments: Vec::new(),
            is_piped: false,
        }
    }
}

/// A program that serves on a socket. Killed when dropped, by its process id and no other way.
#[derive(Debug)]
pub struct Service {
    child: Child,
    launch: Launch,
    dir: TempDir,
    client: Client,
}

impl Service {
    /// Starts one in a new folder, and waits until it answers.
    ///
    /// # Errors
    /// When the program is not built, or does not answer; says what it logged.
    pub async fn start(face: Face) -> Result<Self> {
        Self::launch(Launch::new(face, &[])).await
    }

    /// Starts one for many VMs as a session leader without a terminal, as systemd does.
    ///
    /// # Errors
    /// The same as those of [`start`](Self::start).
    pub async fn start_in_session() -> Result<Self> {
        Self::launch(Launch::new(Face::Many, &["setsid"])).await
    }

    /// Starts one for many VMs whose standard output is a pipe that nobody reads.
    ///
    /// # Errors
    /// The same as those of [`start`](Self::start).
    pub async fn start_unread() -> Result<Self> {
        Self::launch(Launch {
            is_piped: true,
            ..Launch::new(Face::Many, &[])
        })
        .await
    }

    /// Starts one for many VMs behind a command that becomes it, such as `prlimit`, with more arguments.
    ///
    /// # Errors
    /// The same as those of [`start`](Self::start).
    pub async fn start_with(wrapper: &[&'static str], arguments: &[String]) -> Result<Self> {
        let mut launch = Launch::new(Face::Many, wrapper);
        launch.arguments.extend_from_slice(arguments);
        Self::launch(launch).await
    }

    /// Starts one for many VMs on a host of a [`Network`](crate::Network).
    ///
    /// # Errors
    /// The same as those of [`start`](Self::start), and when there is no such host.
    pub async fn start_on(host: &'static str) -> Result<Self> {
        let wrapper = ["ip", "netns", "exec", host];
        Self::launch(Launch::new(Face::Many, &wrapper)).await
    }

    async fn launch(launch: Launch) -> Result<Self> {
        let dir = TempDir::with_prefix("whimbrel-test.")?;
        let child = spawn(&launch, dir.path())?;
        let client = Client::unix(dir.path().join("api.sock"));
        let mut service = Self {
            child,
            launch,
            dir,
            client,
        };
        service.answers().await?;
        Ok(service)
    }

    /// Starts the program anew, in the same folder and on the same socket, after it has ended.
    ///
    /// # Errors
    /// The same as those of [`start`](Self::start).
    pub async fn start_again(&mut self) -> Result<()> {
        self.child = spawn(&self.launch, self.dir.path())?;
        self.answers().await
    }

    async fn answers(&mut self) -> Result<()> {
        let start = Instant::now();
        loop {
            let Err(error) = self.client.ping().await else {
                return Ok(());
            };
            if let Some(status) = self.child.try_wait()? {
                bail!("whimbrel ended ({status}):\n{}", self.log());
            }
            if start.elapsed() > STARTS {
                bail!("whimbrel does not answer: {error}\n{}", self.log());
            }
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    }

    /// A client of it.
    #[must_use]
    pub fn client(&self) -> &Client {
        &self.client
    }

    /// Returns the API that the program serves.
    #[must_use]
    pub fn face(&self) -> Face {
        self.launch.face
    }

    /// Its socket.
    #[must_use]
    pub fn socket(&self) -> PathBuf {
        self.path("api.sock")
    }

    /// A path in its folder.
    pub fn path(&self, name: impl AsRef<Path>) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Its process.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Takes the pipe that is standard output, of a service that was started so.
    pub fn take_output(&mut self) -> Option<ChildStdout> {
        self.child.stdout.take()
    }

    /// Counts the descriptors that the process has open.
    ///
    /// # Errors
    /// When it has ended.
    pub fn descriptors(&self) -> Result<usize> {
        Ok(fs::read_dir(format!("/proc/{}/fd", self.pid()))?.count())
    }

    /// Returns the log so far.
    #[must_use]
    pub fn log(&self) -> String {
        fs::read_to_string(self.path("log")).unwrap_or_default()
    }

    /// Its threads: the name, the state and where in the host's kernel each waits.
    #[must_use]
    pub fn threads(&self) -> String {
        let tasks = fs::read_dir(format!("/proc/{}/task", self.pid()));
        let line = |task: PathBuf| {
            let read = |name| fs::read_to_string(task.join(name)).unwrap_or_default();
            let stat = read("stat");
            // The state is behind the name, which may hold anything but ends with the last parenthesis.
            let state = stat.rsplit(')').next().unwrap_or_default().trim();
            let state = state.split(' ').next().unwrap_or_default().to_owned();
            let (name, place) = (read("comm"), read("wchan"));
            format!("  {} {state} {place}\n", name.trim())
        };
        tasks
            .into_iter()
            .flatten()
            .flatten()
            .map(|task| line(task.path()))
            .collect()
    }

    /// Sends it a signal.
    ///
    /// # Errors
    /// When it has ended.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        let pid = i32::try_from(self.child.id())
            .ok()
            .and_then(Pid::from_raw)
            .context("a child has a process id")?;
        Ok(kill_process(pid, signal)?)
    }

    /// Waits until it has ended.
    ///
    /// # Errors
    /// When it does not end within `limit`; says what it logged.
    pub async fn ended(&mut self, limit: Duration) -> Result<ExitStatus> {
        let start = Instant::now();
        loop {
            if let Some(status) = self.child.try_wait()? {
                return Ok(status);
            }
            if start.elapsed() > limit {
                bail!("whimbrel has not ended within {limit:?}:\n{}", self.log());
            }
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    }

    /// A configuration of the pocket guest, with its serial port on a file named for it.
    ///
    /// # Errors
    /// When the kernel cannot be written to the service's folder.
    pub fn pocket(&self, name: &str, options: Options) -> Result<(VmConfig, Serial)> {
        let kernel = self.path("pocket.elf");
        if !kernel.exists() {
            fs::write(&kernel, guest::IMAGE)?;
        }
        let payload = PayloadConfig {
            kernel: Some(text(&kernel)),
            cmdline: Some(options.to_string()),
            ..PayloadConfig::default()
        };
        let serial = Serial::at(self.path(format!("{name}.serial")));
        Ok((
            with_serial(VmConfig::with_payload(payload), &serial),
            serial,
        ))
    }

    /// Creates a VM of a [service for many](Face::Many).
    ///
    /// # Errors
    /// When the service refuses.
    pub async fn create(&self, name: &str, config: VmConfig) -> Result<VmId> {
        let id: VmId = name.parse()?;
        let new = CreateVm {
            id: Some(id.clone()),
            config,
        };
        self.client.vms_create(&new).await?;
        Ok(id)
    }

    /// Creates and boots the pocket guest in a [service for many](Face::Many).
    ///
    /// # Errors
    /// When the service refuses.
    pub async fn boot_pocket(&self, name: &str, options: Options) -> Result<(VmId, Serial)> {
        let (config, serial) = self.pocket(name, options)?;
        let id = self.create(name, config).await?;
        self.client.vms_boot(&id).await?;
        Ok((id, serial))
    }

    /// Waits until a VM is in a state.
    ///
    /// # Errors
    /// When that does not come.
    pub async fn reaches(&self, id: &VmId, state: VmState) -> Result<VmInfo> {
        self.reaches_within(id, state, CHANGES).await
    }

    /// Waits so long until a VM is in a state: a whole system may take minutes in the emulated host.
    ///
    /// # Errors
    /// When that does not come.
    pub async fn reaches_within(
        &self,
        id: &VmId,
        state: VmState,
        patience: Duration,
    ) -> Result<VmInfo> {
        let start = Instant::now();
        loop {
            let info = self.client.vms_info(id).await?;
            if info.state == state {
                return Ok(info);
            }
            if start.elapsed() > patience {
                bail!("{id:?} is {} and not {state}:\n{}", info.state, self.log());
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    /// Waits until the guest of a VM has printed `needle` so many times, and returns all that it printed.
    ///
    /// # Errors
    /// When that does not come within `limit`, and as soon as the guest fails; says why.
    pub async fn prints(
        &self,
        id: &VmId,
        serial: &Serial,
        needle: &str,
        times: usize,
        limit: Duration,
    ) -> Result<String> {
        let failed = async {
            loop {
                if let Some(failure) = self.client.vms_info(id).await?.failure {
                    bail!("{id:?}: {failure:?}; it printed:\n{}", serial.text());
                }
                tokio::time::sleep(Duration::from_millis(250)).await;
            }
        };
        tokio::select! {
            text = serial.wait_for(needle, times, limit) => text,
            failed = failed => failed,
        }
    }

    /// Waits until a migration is as it is wanted.
    ///
    /// # Errors
    /// When it does not come to that within `limit`; says what it came to.
    pub async fn until(
        &self,
        migration: &VmId,
        limit: Duration,
        wanted: impl Fn(&MigrationInfo) -> bool,
    ) -> Result<MigrationInfo> {
        let start = Instant::now();
        loop {
            let info = self.client.migrations_info(migration).await?;
            if wanted(&info) {
                return Ok(info);
            }
            if start.elapsed() > limit {
                bail!("{info:#?}\n{}", self.log());
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        // It may have ended by itself: then there is nothing to kill and its status is known.
        let _ = self.child.kill();
        let _ = self.child.wait();
        // In the sandbox each test is also one of it: nothing that a test does needs a system call that
        // the program's lists lack.
        let log = self.log();
        let refused = log.lines().find(|line| line.contains(REFUSED));
        assert!(refused.is_none() || std::thread::panicking(), "{refused:?}");
    }
}

/// The configuration, with the serial port on a file.
fn with_serial(mut config: VmConfig, serial: &Serial) -> VmConfig {
    config.serial = SerialConfig {
        file: Some(text(serial.path())),
        socket: None,
        mode: ConsoleMode::File,
    };
    config.console = ConsoleConfig::with_mode(ConsoleMode::Off);
    config
}

fn text(path: &Path) -> String {
    path.to_string_lossy().into_owned()
}

fn spawn(launch: &Launch, dir: &Path) -> Result<Child> {
    let program = match env::var_os("WHIMBREL") {
        Some(named) => named.into(),
        None => built("whimbrel")?,
    };
    let log = File::options()
        .create(true)
        .append(true)
        .open(dir.join("log"))?;
    let mut command = match &launch.wrapper[..] {
        [first, others @ ..] => {
            let mut command = Command::new(first);
            command.args(others).arg(&program);
            command
        }
        [] => Command::new(&program),
    };
    let socket = dir.join("api.sock");
    match launch.face {
        Face::Many => command.arg("serve").arg("--socket").arg(socket),
        Face::One => command.arg("--api-socket").arg(socket),
    };
    command.args(&launch.arguments);
    match launch.is_piped {
        true => command.stdout(Stdio::piped()),
        false => command.stdout(log.try_clone()?),
    };
    command
        .stdin(Stdio::null())
        .stderr(log)
        .spawn()
        .with_context(|| format!("start {}", program.display()))
}

/// Returns the path of a program of ours: `target/PROFILE/NAME` for a test in `target/PROFILE/deps`.
///
/// # Errors
/// When it is not built.
pub fn built(name: &str) -> Result<PathBuf> {
    let test = env::current_exe()?;
    let program = test
        .parent()
        .and_then(Path::parent)
        .context("a test is in a folder of target")?
        .join(name);
    if !program.exists() {
        bail!(
            "{} is not built: run `cargo build` first",
            program.display()
        );
    }
    Ok(program)
}

/// Waits at a TCP port for a VM of any peer, which may name all files and taps: both ends are ours.
#[must_use]
pub fn await_anyone(listen: impl Into<String>) -> spec::AwaitMigration {
    spec::AwaitMigration {
        insecure: true,
        allow: Some(vec!["/".to_owned()]),
        allow_taps: Some(vec!["*".to_owned()]),
        ..spec::AwaitMigration::at(listen)
    }
}
