//! `whimbrel serve`: many VMs.

use std::fs::DirBuilder;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result};
use api::{ClaimedVersion, Listener, Service, serve};
use control::Registry;
use spec::VmmPingResponse;
use vmm::{Confinement, Pool, PoolConfig};

use crate::args::ServeArguments;
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

/// A directory that only its owner may look into.
fn private_directory(path: &Path) -> Result<()> {
    DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(path)
        .with_context(|| format!("cannot create the directory {}", path.display()))
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
    private_directory(&state)?;
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
    // Before anything is made: a token that cannot be used ends the program.
    let tcp = arguments.tcp_access()?;
    let pool = Pool::start(&PoolConfig {
        threads: arguments.threads,
        terminal: false,
        image_dirs: arguments.image_dir.clone(),
        confinement,
    })?
    .with_journals(state.join("migrations"))
    .with_migration_trust(arguments.migration.trust()?);
    let runtime = runtime(2)?;
    runtime.block_on(async {
        // Before the socket exists: a supervisor that sees it may signal at once, and the default
        // action would end the process without an orderly stop.
        let mut signals = Signals::listen()?;
        // First: a second service at this socket fails here, before it touches the sockets of VMs.
        let mut listeners = vec![Listener::unix(&socket)?];
        if let Some((address, access)) = tcp {
            listeners.push(Listener::tcp(address, access).await?);
        }
        let vms = state.join("vms");
        private_directory(&vms)?;
        let registry = Registry::new(pool);
        let service = Service::new(registry.clone(), about()).claiming(claim);
        let service = service.with_vm_sockets(vms);
        for listener in &listeners {
            eprintln!("whimbrel: API at {}", listener.place());
        }
        // Before the first client is served: a service that answers accepts VMs, too.
        let receiver = arguments.accept.start(&service)?;
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
