//! One VM: `whimbrel run`, and the command line of Cloud Hypervisor.
//!
//! The program ends when the guest powers off, fails, or a client of the API asks for it. It
//! stays when a client shuts the VM down, which may boot it again, and with `--no-shutdown` also when
//! the guest powers off.

use std::io::{self, IsTerminal as _};
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;

use anyhow::{Context, Result, bail};
use api::{ClaimedVersion, Service, serve};
use control::{Registry, Request, VmHandle};
use spec::{ConsoleMode, RestoreConfig, VmConfig, VmId, VmState};
use tokio::sync::Notify;
use vmm::{Confinement, Pool, PoolConfig, snapshot_config};

use crate::args::{VmArguments, check_directories};
use crate::event_monitor::EventMonitor;
use crate::inherited::ApiSocket;
use crate::sandbox::{Rule, of_vm};
use crate::serve::{about, runtime};
use crate::signals::{Signals, unless_interrupted};

/// The user of the program.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum User {
    /// A person who typed `whimbrel run`.
    Person,
    /// A program for Cloud Hypervisor, whose guests get every key.
    Program,
}

/// Returns the Landlock rules for the files of the VM on the command line, and of its API.
pub(crate) fn files(arguments: &VmArguments, config: Option<&VmConfig>) -> Result<Vec<Rule>> {
    let mut rules = config.map(of_vm).unwrap_or_default();
    if let Some(ApiSocket::Path(path)) = arguments.api_socket()? {
        rules.push(Rule::maker_of(&path));
    }
    let monitor = arguments.event_monitor.as_deref();
    if let Some(path) = monitor.and_then(|text| text.strip_prefix("path=")) {
        rules.push(Rule::maker_of(path.as_ref()));
    }
    if let Some(snapshot) = arguments.snapshot()? {
        let source = &snapshot.source_url;
        let config = snapshot_config(source).with_context(|| format!("--restore {source}"))?;
        rules.extend(of_vm(&config));
        let dir = Path::new(source.strip_prefix("file://").unwrap_or(source));
        // Beside each copy of a disk in the folder the VM gets an overlay.
        let mut disks = config.disks.iter().flatten();
        let has_copies = disks.any(|disk| {
            disk.path
                .as_ref()
                .is_some_and(|at| Path::new(at).starts_with(dir))
        });
        rules.push(match has_copies {
            true => Rule::folder(dir),
            false => Rule::reading(dir),
        });
    }
    Ok(rules)
}

/// Runs `config`, or waits for a VM over the API where that is absent.
pub(crate) fn run(
    arguments: &VmArguments,
    config: Option<VmConfig>,
    claim: ClaimedVersion,
    confinement: Confinement,
    user: User,
) -> Result<ExitCode> {
    let left = leaving(user, config.as_ref());
    let socket = arguments.api_socket()?;
    let snapshot = arguments.snapshot()?;
    if snapshot.is_some() && config.is_some() {
        bail!("--restore and a configuration exclude each other");
    }
    if socket.is_none() && config.is_none() && snapshot.is_none() {
        bail!(
            "nothing to do: use --kernel to boot a VM, --api-socket to create one over REST, \
             `whimbrel serve` for many VMs, or `whimbrel demo` for a demonstration"
        );
    }
    check_directories("--image-dir", &arguments.image_dir)?;
    let trust = arguments.migration.trust()?;
    // First: a reader of the FIFO waits until it is open, also for a program that cannot start.
    let monitor = arguments.event_monitor.as_deref();
    let mut monitor = monitor.map(EventMonitor::start).transpose()?;
    let pool = Pool::start(&PoolConfig {
        threads: Some(1),
        terminal: true,
        image_dirs: arguments.image_dir.clone(),
        confinement,
    })?;
    runtime(1)?.block_on(async {
        let mut signals = Signals::listen()?;
        // First: a program that is started by mistake fails here, before it removes what a killed one
        // would have left.
        let listener = socket.map(ApiSocket::listen).transpose()?;
        let registry = Registry::new(pool.with_migration_trust(trust));
        let id: VmId = "vm".parse()?;
        let service = Service::new(registry.clone(), about()).claiming(claim);
        let shutdown = service.shutdown().clone();
        let serving = match listener {
            None => None,
            Some(listener) => {
                eprintln!("whimbrel: API at {}", listener.place());
                let router = service.vm_router(&id, &shutdown);
                Some(tokio::spawn(serve(listener, router, shutdown.clone())))
            }
        };
        let guest = async {
            if let Some(config) = config {
                let vm = registry
                    .create(Some(id.clone()), config)
                    .map_err(|error| explained(&error))?;
                vm.ask(Request::Boot)
                    .await
                    .map_err(|error| explained(&error))?;
            }
            if let Some(snapshot) = snapshot {
                restore(&registry, id, snapshot).await?;
            }
            if arguments.no_shutdown {
                return std::future::pending().await;
            }
            Ok(guest_ends(&registry).await)
        };
        let reports = async {
            match &mut monitor {
                Some(monitor) => monitor.follow(registry.events()).await,
                None => std::future::pending().await,
            }
        };
        let ended: Result<Option<spec::Failure>> = tokio::select! {
            () = signals.next() => Ok(None),
            () = shutdown.requested() => Ok(None),
            () = left.notified() => Ok(None),
            ended = guest => ended,
            never = reports => match never {},
        };
        shutdown.request();
        unless_interrupted(&mut signals, async {
            registry.delete_all().await;
            if let Some(task) = serving {
                // A panic is in the log already.
                let _ = task.await;
            }
        })
        .await;
        if let Some(monitor) = monitor {
            // After the VMs: their last events belong before the end of the program.
            monitor.finish(registry.events());
        }
        match ended? {
            None => Ok(ExitCode::SUCCESS),
            Some(failure) => bail!("the guest failed: {} ({})", failure.detail, failure.code),
        }
    })
}

/// Has the escape key looked for at a person's terminal, if the guest has that, and says so. Returns what
/// is notified when the person leaves.
fn leaving(user: User, config: Option<&VmConfig>) -> Arc<Notify> {
    let left = Arc::new(Notify::new());
    let has_terminal = config.is_some_and(|config| {
        config.serial.mode == ConsoleMode::Tty || config.console.mode == ConsoleMode::Tty
    });
    if user == User::Person && has_terminal && io::stdin().is_terminal() {
        eprintln!("whimbrel: Ctrl-A x ends the VM, Ctrl-A a sends Ctrl-A");
        let notify = Arc::clone(&left);
        vmm::on_terminal_escape(move || notify.notify_one());
    }
    left
}

/// Makes the VM from a snapshot, and waits until it is there.
async fn restore(registry: &Registry, id: VmId, snapshot: RestoreConfig) -> Result<()> {
    let registry = registry.clone();
    // Reads files.
    let begun = tokio::task::spawn_blocking(move || registry.restore(&id, &snapshot));
    let restore = begun.await?.map_err(|error| explained(&error))?;
    // Held by us, so it does not go.
    let _ = restore.settled().wait_for(|settled| *settled).await;
    match restore.info().error {
        None => Ok(()),
        Some(error) => bail!("{} ({})", error.detail, error.code),
    }
}

fn explained(error: &control::RequestError) -> anyhow::Error {
    let fields = error.fields.iter().filter(|_| error.fields.len() > 1);
    let list: String = fields
        .map(|field| format!("\n  {}: {}", field.pointer, field.detail))
        .collect();
    anyhow::anyhow!("{error}{list}")
}

/// Waits until the guest ends by itself, however often the VM is deleted and created meanwhile.
async fn guest_ends(registry: &Registry) -> Option<spec::Failure> {
    let mut changes = registry.changes();
    loop {
        // Marks the present state as seen before the list is read: a VM that comes in between wakes
        // the select.
        changes.borrow_and_update();
        let vm = registry.list().into_iter().next();
        tokio::select! {
            ended = watch(vm) => return ended,
            // The registry is there: it is borrowed.
            _ = changes.changed() => {}
        }
    }
}

async fn watch(vm: Option<VmHandle>) -> Option<spec::Failure> {
    let Some(vm) = vm else {
        return std::future::pending().await;
    };
    let mut status = vm.watch();
    // A shutdown by a client does not end the program, since the client may boot the VM again.
    let over = |status: &control::VmStatus| status.state == VmState::Shutdown && status.by_guest;
    match status.wait_for(over).await {
        Ok(status) => status.failure.clone(),
        Err(_) => std::future::pending().await,
    }
}
