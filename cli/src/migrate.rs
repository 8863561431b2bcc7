//! Starts migrations, follows them with a progress bar, and prints a summary.

use std::io::{IsTerminal, stderr};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use clap::{Args, ValueEnum};
use indicatif::{ProgressBar, ProgressStyle};
use openapi::{Client, ClientError};
use spec::{
    AtDeadline, AwaitMigration, DiskStorage, MemoryMode, MigrationInfo, MigrationOutcome,
    MigrationPhase, SendMigrationData, StartMigration, StorageMode, VmId,
};

use tokio::signal::unix::{SignalKind, signal};

use crate::args::{bandwidth, positive};
use crate::print::Printer;
use crate::summary::{curve, ms, summary};

/// Interval between two requests for the state.
const TICK: Duration = Duration::from_millis(100);

#[derive(Clone, Copy, Debug, ValueEnum)]
pub(crate) enum Mode {
    /// Precopy if the guest writes little enough to be moved by the deadline; if not, copy the rest after the
    /// guest moves.
    Auto,
    /// Copy all memory before the guest moves.
    Precopy,
    /// Copy some rounds before the guest moves, and the rest after it.
    Hybrid,
    /// Copy all memory after the guest has moved.
    Postcopy,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
pub(crate) enum Deadline {
    /// Cancel; the guest stays at the source.
    Cancel,
    /// Slow the vCPUs down more and more, until the stop is short enough.
    Throttle,
    /// Switch to postcopy: the guest moves, and its pages follow.
    Postcopy,
    /// Stop the guest for as long as the rest of its memory takes.
    Stop,
}

/// How the images of disks move.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub(crate) enum Storage {
    /// Both services have the image at the same path.
    Shared,
    /// The content is copied into a new image at the destination.
    Copy,
}

impl From<Storage> for StorageMode {
    fn from(storage: Storage) -> Self {
        match storage {
            Storage::Shared => Self::Shared,
            Storage::Copy => Self::Copy,
        }
    }
}

fn disk_storage(text: &str) -> Result<DiskStorage> {
    let Some((id, how)) = text.rsplit_once('=') else {
        bail!("`{text}` is not ID=shared, ID=copy or ID=copy:NAME");
    };
    let (storage, name) = match how
        .split_once(':')
        .map_or((how, None), |(how, name)| (how, Some(name)))
    {
        ("shared", None) => (StorageMode::Shared, None),
        ("copy", name) => (StorageMode::Copy, name.map(str::to_owned)),
        _ => bail!("`{how}` is neither shared nor copy nor copy:NAME"),
    };
    Ok(DiskStorage {
        id: id.to_owned(),
        storage,
        name,
    })
}

/// How a migration in doubt is resolved at one side.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub(crate) enum Outcome {
    /// The guest runs at this side.
    Run,
    /// The guest does not run at this side, and the VM is deleted.
    Discard,
}

impl From<Outcome> for MigrationOutcome {
    fn from(outcome: Outcome) -> Self {
        match outcome {
            Outcome::Run => Self::Run,
            Outcome::Discard => Self::Discard,
        }
    }
}

#[derive(Debug, Args)]
pub(crate) struct MigrateArguments {
    /// Address at which the other service waits: unix:PATH or tcp:HOST:PORT.
    #[arg(value_name = "URL")]
    destination: String,
    /// When memory is copied.
    #[arg(long, value_enum, default_value = "auto")]
    mode: Mode,
    /// How long the guest may be stopped.
    #[arg(long, value_name = "MS", default_value_t = 300, value_parser = positive())]
    max_downtime_ms: u64,
    /// Time limit of the migration.
    #[arg(long, value_name = "S", default_value_t = 3600, value_parser = positive())]
    deadline_s: u64,
    /// Action at the deadline; in mode auto, as soon as it cannot be kept. [default: postcopy in mode auto, cancel
    /// in the others]
    #[arg(long, value_enum)]
    at_deadline: Option<Deadline>,
    /// Number of connections for memory. [default: chosen by the service]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=16))]
    connections: Option<u16>,
    /// Bandwidth limit in bytes per second. [default: unlimited]
    #[arg(long, value_name = "SIZE", value_parser = bandwidth)]
    max_bandwidth: Option<u64>,
    /// Keep the guest paused at the destination until it is resumed there.
    #[arg(long)]
    paused: bool,
    /// Compare all memory before the guest runs at the destination; a page that differs fails the
    /// migration.
    #[arg(long)]
    verify: bool,
    /// How long the guest may be paused before it resumes here. [default: ten times the longer of
    /// --max-downtime-ms and the predicted stop, at least 10000]
    #[arg(long, value_name = "MS", value_parser = positive())]
    stop_limit_ms: Option<u64>,
    /// For how long the guest stays paused if the destination is lost after the guest's state was sent, and cannot
    /// be told that the guest stays. For clusters that fence a host in less time. [default: not at all]
    #[arg(long, value_name = "MS", value_parser = positive())]
    hold_ms: Option<u64>,
    /// How disks move: both services have their images at the same paths, or their content is copied
    /// into new images in the destination's --migration-storage.
    #[arg(long, value_enum, default_value = "shared")]
    storage: Storage,
    /// How one disk moves, if not as --storage says: ID=shared, ID=copy, or ID=copy:NAME, which names the file of
    /// the image in the destination's directory. Can be repeated.
    #[arg(long, value_name = "ID=HOW", value_parser = disk_storage)]
    disk_storage: Vec<DiskStorage>,
    /// The other service is on this host: hand shared memory over by descriptor instead of copying
    /// it.
    #[arg(long)]
    local: bool,
    /// Encrypt with TLS, using ca-cert.pem, client-cert.pem and client-key.pem in this directory of
    /// the service's host.
    #[arg(long, value_name = "DIR")]
    tls_dir: Option<String>,
    /// Send over TCP without TLS: anyone on the network path can read and change the guest's
    /// memory.
    #[arg(long, conflicts_with = "tls_dir")]
    insecure: bool,
    /// Start the migration, print its name, and do not wait.
    #[arg(long)]
    detach: bool,
}

impl MigrateArguments {
    fn body(&self) -> StartMigration {
        StartMigration {
            destination: self.destination.clone(),
            mode: match self.mode {
                Mode::Auto => MemoryMode::Auto,
                Mode::Precopy => MemoryMode::Precopy,
                Mode::Hybrid => MemoryMode::Hybrid,
                Mode::Postcopy => MemoryMode::Postcopy,
            },
            max_downtime_ms: self.max_downtime_ms,
            deadline_s: self.deadline_s,
            at_deadline: self.at_deadline.map(|action| match action {
                Deadline::Cancel => AtDeadline::Cancel,
                Deadline::Throttle => AtDeadline::Throttle,
                Deadline::Postcopy => AtDeadline::Postcopy,
                Deadline::Stop => AtDeadline::Stop,
            }),
            connections: self.connections,
            max_bandwidth: self.max_bandwidth,
            resume: !self.paused,
            verify: self.verify,
            stop_limit_ms: self.stop_limit_ms,
            hold_ms: self.hold_ms,
            storage: self.storage.into(),
            disks: (!self.disk_storage.is_empty()).then(|| self.disk_storage.clone()),
            local: self.local,
            tls_dir: self.tls_dir.clone(),
            insecure: self.insecure,
        }
    }
}

#[derive(Debug, Args)]
pub(crate) struct ReceiveArguments {
    /// Address to listen at: unix:PATH or tcp:HOST:PORT.
    #[arg(value_name = "URL")]
    listen: String,
    /// Encrypt with TLS, using ca-cert.pem, server-cert.pem and server-key.pem in this directory of
    /// the service's host.
    #[arg(long, value_name = "DIR")]
    tls_dir: Option<String>,
    /// Keep the guest paused when it has arrived, until it is resumed.
    #[arg(long)]
    paused: bool,
    /// End the wait at the first VM that the service refuses, instead of waiting for another.
    #[arg(long)]
    once: bool,
    /// With TLS, a host that may send: a name or address in its certificate, or * for every host
    /// whose certificate the CA signed. Can be repeated. [default: the service's --migration-peer]
    #[arg(long, value_name = "NAME", requires = "tls_dir")]
    tls_peer: Option<Vec<String>>,
    /// Listen on TCP without TLS: any host that can connect may send a VM.
    #[arg(long, conflicts_with = "tls_dir")]
    insecure: bool,
    /// Directory or file of the service's host that the VM may use. Can be repeated. [default: the
    /// service's --migration-allow; on a unix socket all]
    #[arg(long, value_name = "PATH")]
    allow: Option<Vec<String>>,
    /// Tap of the service's host that the VM may use; a * at the end matches any rest of the name.
    /// Can be repeated. [default: the service's --migration-allow-tap; on a unix socket all]
    #[arg(long, value_name = "NAME")]
    allow_tap: Option<Vec<String>>,
    /// Directory of the service's host in which images are made for disks that come with the VM.
    /// [default: the service's --migration-storage; without one, such a VM is refused]
    #[arg(long, value_name = "DIR")]
    storage: Option<String>,
    /// Wait in the background: print the migration's name and endpoint.
    #[arg(long)]
    detach: bool,
}

/// Moves a VM to another service, and waits until it has arrived.
pub(crate) async fn migrate(
    client: &Client,
    vm: Option<&VmId>,
    arguments: &MigrateArguments,
    printer: Printer,
) -> Result<()> {
    let vm = vm.context(
        "--vm is missing: name the VM to move (a socket that serves one VM has send-migration)",
    )?;
    let body = arguments.body();
    let begins = client.vms_migrate(vm, &body);
    if arguments.detach {
        return printer.show(&begins.await?, |info| info.id.clone());
    }
    follow(client, begins, printer).await
}

/// Waits for a VM.
pub(crate) async fn receive(
    client: &Client,
    vm: Option<&VmId>,
    arguments: &ReceiveArguments,
    printer: Printer,
) -> Result<()> {
    let body = AwaitMigration {
        listen: arguments.listen.clone(),
        vm: vm.cloned(),
        tls_dir: arguments.tls_dir.clone(),
        resume: !arguments.paused,
        once: arguments.once,
        tls_peers: arguments.tls_peer.clone(),
        insecure: arguments.insecure,
        allow: arguments.allow.clone(),
        allow_taps: arguments.allow_tap.clone(),
        storage: arguments.storage.clone(),
        net_fds: None,
    };
    let begins = client.migrations_receive(&body);
    if arguments.detach {
        return printer.show(&begins.await?, |info| {
            format!("{} at {}", info.id, info.endpoint)
        });
    }
    follow(client, begins, printer).await
}

/// Begins a migration, and waits until it is over. Ctrl-C cancels.
pub(crate) async fn follow(
    client: &Client,
    begins: impl Future<Output = Result<MigrationInfo, ClientError>>,
    printer: Printer,
) -> Result<()> {
    // Before it begins: from then on Ctrl-C must cancel it, and not just end this program.
    let mut interrupts = signal(SignalKind::interrupt())?;
    tokio::pin!(begins);
    let mut is_called_off = false;
    let begun = loop {
        tokio::select! {
            begun = &mut begins => break begun?,
            _ = interrupts.recv() => match is_called_off {
                false => is_called_off = true,
                true => bail!("interrupted before the service has answered"),
            }
        }
    };
    let id: VmId = begun.id.parse()?;
    let bar = bar(begun.memory_bytes.saturating_add(begun.disk_bytes));
    let mut info = begun;
    while !info.phase.is_over() {
        if std::mem::take(&mut is_called_off) {
            bar.set_message("canceling");
            // A refused cancel means that the hand-over has begun: keep following.
            if let Err(error) = client.migrations_cancel(&id).await {
                bar.suspend(|| eprintln!("wh-remote: {error}"));
            }
        }
        tokio::select! {
            () = tokio::time::sleep(TICK) => {}
            _ = interrupts.recv() => is_called_off = true,
        }
        info = client.migrations_info(&id).await?;
        show(&bar, &info);
    }
    bar.finish_and_clear();
    printer.show(&info, summary)?;
    match (info.phase, info.error) {
        (MigrationPhase::Completed, _) => Ok(()),
        // Snapshots, forks and mirrors are followed here, too.
        (phase, Some(error)) => bail!("{phase}: {} ({})", error.detail, error.code),
        (phase, None) => bail!("{phase}"),
    }
}

/// Sends the VM of a socket that serves one VM, and waits until it has moved. Ctrl-C cancels.
///
/// A Cloud Hypervisor from version 53 on answers at once, and has no progress to show.
pub(crate) async fn send(
    client: &Client,
    patient: &Client,
    body: &SendMigrationData,
) -> Result<()> {
    let bar = bar(0);
    let moved = patient.vm_send_migration(body);
    tokio::pin!(moved);
    let moved = loop {
        tokio::select! {
            moved = &mut moved => break moved,
            () = tokio::time::sleep(TICK) => {}
            interrupted = tokio::signal::ctrl_c() => {
                interrupted?;
                bar.set_message("canceling");
                if let Err(error) = client.vm_cancel_migration().await {
                    bar.suspend(|| eprintln!("wh-remote: {error}"));
                }
            }
        }
        // Only for show: the answer says how the migration ended.
        if let Ok(progress) = client.vm_migration_progress().await {
            let memory = progress.memory_transmission_info;
            let done = memory
                .memory_bytes_total
                .saturating_sub(memory.memory_bytes_remaining_iteration);
            draw_as(&bar, memory.memory_bytes_total > 0);
            bar.set_length(memory.memory_bytes_total.max(1));
            bar.set_position(done);
            bar.set_prefix("sending");
        }
    };
    bar.finish_and_clear();
    Ok(moved?)
}

fn bar(total: u64) -> ProgressBar {
    if !stderr().is_terminal() {
        return ProgressBar::hidden();
    }
    let bar = ProgressBar::new(total.max(1));
    draw_as(&bar, total > 0);
    bar
}

/// Draws the bar itself only when the size of the memory is known, which a destination learns when a
/// source connects.
fn draw_as(bar: &ProgressBar, is_sized: bool) {
    let style = match is_sized {
        true => "{prefix:>12} [{bar:32}] {bytes}/{total_bytes} {msg}",
        false => "{prefix:>12} {msg}",
    };
    if let Ok(style) = ProgressStyle::with_template(style) {
        bar.set_style(style.progress_chars("=> "));
    }
}

fn show(bar: &ProgressBar, info: &MigrationInfo) {
    let total = info.memory_bytes.saturating_add(info.disk_bytes);
    if total == 0 {
        bar.set_prefix(info.phase.to_string());
        bar.set_message(format!("at {}", info.endpoint));
        return;
    }
    draw_as(bar, true);
    let left = info.remaining_pages.saturating_mul(spec::limits::PAGE);
    bar.set_length(total.max(1));
    bar.set_position(total.saturating_sub(left.saturating_add(info.disk_remaining_bytes)));
    bar.set_prefix(info.phase.to_string());
    let mut message = format!("round {}", info.rounds);
    if info.disk_remaining_bytes > 0 {
        let left = info.disk_remaining_bytes.div_ceil(1 << 20);
        message.push_str(&format!(", {left} MiB of disks left"));
    }
    if info.history.len() > 1 {
        message.push_str(&format!(" {}", curve(&info.history)));
    }
    if info.bytes_per_second > 0 {
        message.push_str(&format!(", {} MiB/s", info.bytes_per_second >> 20));
    }
    if info.dirty_pages_per_second > 0 {
        message.push_str(&format!(", {} dirty pages/s", info.dirty_pages_per_second));
    }
    if let Some(us) = info.predicted_downtime_us {
        message.push_str(&format!(", stop of {}", ms(us)));
    }
    if info.throttle_percent > 0 {
        message.push_str(&format!(
            ", vCPUs slowed down by {} %",
            info.throttle_percent
        ));
    }
    bar.set_message(message);
}
