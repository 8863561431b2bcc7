//! `whimbrel serve`: many VMs.

use std::fs::{self, DirBuilder, File, Permissions};
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result, bail};
use api::{ClaimedVersion, Listener, Service, serve};
use control::Registry;
use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;
use rustix::process::geteuid;
use spec::VmmPingResponse;
use vmm::{Confinement, Pool, PoolConfig};

use crate::args::{ServeArguments, check_directories};
use crate::sandbox::Rule;
use crate::signals::{Signals, unless_interrupted};

/// The description of this program in `vmm.ping`.
pub(crate) fn about() -> VmmPingResponse {
    let version = env!("CARGO_PKG_VERSION");
    VmmPingResponse {
        build_version: format!("v{version}"),
        version: version.to_owned(),
        pid: std::process::id().into(),
        features: vec!["kvm".to_owned()],
    }
}

/// A directory beside the socket, named as it is but for the ending, and so that it is another.
fn beside(socket: &Path) -> PathBuf {
    match socket.extension() {
        Some(_) => socket.with_extension(""),
        None => socket.with_extension("d"),
    }
}

/// Makes a directory that only its owner may enter, if there is none.
fn make_private(path: &Path) -> Result<()> {
    DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(path)
        .with_context(|| format!("cannot create the directory {}", path.display()))
}

/// The state directory of a service, which no other service uses meanwhile. The lock ends with the process,
/// however it ends.
struct StateDirectory {
    path: PathBuf,
    _locked: File,
}

impl StateDirectory {
    /// Opens and locks the directory, and makes it where there is none.
    ///
    /// An existing one is the operator's: its mode is not changed, and it is refused if other users could
    /// replace what is in it.
    fn lock(path: PathBuf) -> Result<Self> {
        make_private(&path)?;
        let shown = path.display();
        let file = File::open(&path).with_context(|| format!("cannot open {shown}"))?;
        let found = file
            .metadata()
            .with_context(|| format!("cannot read the mode of {shown}"))?;
        let (mode, owner, user) = (found.mode() & 0o7777, found.uid(), geteuid().as_raw());
        if owner != user {
            bail!(
                "the state directory {shown} belongs to user {owner}, and this is user {user}: choose \
                 another with --state-dir"
            );
        }
        if mode & 0o022 != 0 {
            bail!(
                "other users may write to the state directory {shown} (mode {mode:04o}): `chmod 700 \
                 {shown}`, or choose another with --state-dir"
            );
        }
        match flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {}
            Err(Errno::WOULDBLOCK) => bail!(
                "another service uses the state directory {shown}: choose another with --state-dir"
            ),
            Err(error) => {
                return Err(error)
                    .with_context(|| format!("cannot lock the state directory {shown}"));
            }
        }
        Ok(Self {
            path,
            _locked: file,
        })
    }

    /// Returns a directory inside that only this user may enter. One that exists is the service's own, and
    /// gets that mode.
    fn private(&self, name: &str) -> Result<PathBuf> {
        let path = self.path.join(name);
        make_private(&path)?;
        let failed = || format!("cannot make the directory {} private", path.display());
        let found = path.symlink_metadata().with_context(failed)?;
        // A link would have the mode of another directory changed.
        if !found.is_dir() || found.uid() != geteuid().as_raw() {
            bail!(
                "{} is not a directory of this user: remove it",
                path.display()
            );
        }
        if found.mode() & 0o077 != 0 {
            fs::set_permissions(&path, Permissions::from_mode(0o700)).with_context(failed)?;
        }
        Ok(path)
    }
}

/// Returns a runtime for the service's own threads, beside the main thread. They only pass messages: two
/// are enough for many VMs, and one is for one VM.
pub(crate) fn runtime(threads: usize) -> Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(threads)
        .enable_all()
        .build()
        .context("cannot start the service's threads")
}

/// The service's socket, and the directory of its files.
fn places(arguments: &ServeArguments) -> (PathBuf, PathBuf) {
    let socket = arguments.socket.clone();
    let socket = socket.unwrap_or_else(openapi::default_socket);
    let state = arguments.state_dir.clone();
    let state = state.unwrap_or_else(|| beside(&socket));
    (socket, state)
}

/// The rules by which the service finds its own files. Makes the directory of its files.
pub(crate) fn files(arguments: &ServeArguments) -> Result<Vec<Rule>> {
    let (socket, state) = places(arguments);
    make_private(&state)?;
    let mut rules = vec![Rule::maker_of(&socket), Rule::folder(&state)];
    rules.extend(arguments.api_token_file.as_deref().map(Rule::reading));
    rules.extend(arguments.accept.rules());
    Ok(rules)
}

pub(crate) fn run(
    arguments: &ServeArguments,
    claim: ClaimedVersion,
    confinement: Confinement,
) -> Result<ExitCode> {
    let (socket, state) = places(arguments);
    // Before anything is made: a token or a directory that cannot be used ends the program.
    check_directories("--image-dir", &arguments.image_dir)?;
    arguments.accept.check()?;
    let tcp = arguments.tcp_access()?;
    let trust = arguments.migration.trust()?;
    let pool = Pool::start(&PoolConfig {
        threads: arguments.threads.map(usize::from),
        terminal: false,
        image_dirs: arguments.image_dir.clone(),
        confinement,
    })?;
    let runtime = runtime(2)?;
    runtime.block_on(async {
        // Before the socket exists: a supervisor that sees it may signal at once, and the default
        // action would end the process without an orderly stop.
        let mut signals = Signals::listen()?;
        // First: a service that is started by mistake, beside one that runs, fails at one of these, before
        // it removes what a killed service would have left: images, journals, sockets of VMs.
        let mut listeners = vec![Listener::unix(&socket)?];
        if let Some((address, access)) = tcp {
            listeners.push(Listener::tcp(address, access).await?);
        }
        let state = StateDirectory::lock(state)?;
        let pool = pool
            .with_journals(state.private("migrations")?)
            .with_migration_trust(trust);
        let registry = Registry::new(pool);
        let service = Service::new(registry.clone(), about()).claiming(claim);
        let service = service.with_vm_sockets(state.private("vms")?);
        // Before the first client is served: a service that answers accepts VMs, too.
        let receiver = arguments.accept.start(&service)?;
        for listener in &listeners {
            eprintln!("whimbrel: API at {}", listener.place());
        }
        let shutdown = service.shutdown().clone();
        let serving: Vec<_> = listeners
            .into_iter()
            .map(|listener| tokio::spawn(serve(listener, service.router(), shutdown.clone())))
            .collect();
        tokio::select! {
            () = signals.next() => {}
            () = shutdown.requested() => {}
        }
        shutdown.request();
        unless_interrupted(&mut signals, async {
            if let Some(receiver) = receiver {
                // First: no guest comes that the next step would miss.
                receiver.stop().await;
            }
            registry.delete_all().await;
            service.close().await;
            for task in serving {
                if task.await.is_err() {
                    tracing::error!("a listener's task panicked");
                }
            }
        })
        .await;
        Ok(ExitCode::SUCCESS)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn state_directory_differs_from_socket() {
        assert_eq!(
            beside(Path::new("/run/whimbrel.sock")),
            Path::new("/run/whimbrel")
        );
        assert_eq!(
            beside(Path::new("/run/whimbrel")),
            Path::new("/run/whimbrel.d")
        );
    }
}
