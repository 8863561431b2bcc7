//! A socket for each VM, on which Cloud Hypervisor's API is spoken.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::{fmt, fs, io};

use axum::Router;
use control::Registry;
use spec::VmId;
use tokio::sync::Mutex;
use tokio::task::JoinHandle;

use crate::listen::{ListenError, Listener};
use crate::serve::{Shutdown, serve};

/// Makes the router of one VM's socket. The [`Shutdown`] is that socket's.
pub(crate) type MakeRouter = Box<dyn Fn(&VmId, &Shutdown) -> Router + Send + Sync>;

/// The sockets of a service's VMs. Each lives as long as its VM.
pub(crate) struct VmSockets {
    directory: PathBuf,
    registry: Registry,
    /// Requested when the service stops.
    service: Shutdown,
    router: MakeRouter,
    open: Mutex<BTreeMap<VmId, Open>>,
}

#[derive(Debug)]
struct Open {
    shutdown: Shutdown,
    serving: JoinHandle<()>,
}

impl VmSockets {
    pub(crate) fn new(
        directory: PathBuf,
        registry: Registry,
        service: Shutdown,
        router: MakeRouter,
    ) -> Self {
        if let Err(error) = remove_abandoned(&directory) {
            let directory = directory.display();
            tracing::warn!(%directory, %error, "cannot look for sockets of VMs that are gone");
        }
        Self {
            directory,
            registry,
            service,
            router,
            open: Mutex::default(),
        }
    }

    fn path(&self, id: &VmId) -> PathBuf {
        self.directory.join(format!("{id}.sock"))
    }

    /// Returns the path of this VM's socket, if it exists.
    pub(crate) fn of(&self, id: &VmId) -> Option<String> {
        let path = self.path(id);
        path.exists().then(|| path.display().to_string())
    }

    /// Opens the socket of a VM that has just been created, and serves it until the VM or the service
    /// ends.
    pub(crate) async fn open(&self, id: &VmId) -> Result<(), ListenError> {
        // A VM of the same name may have ended a moment ago, with its last requests still open.
        let before = self.open.lock().await.remove(id);
        if let Some(before) = before {
            before.shutdown.request();
            // A task that panicked has closed its socket too.
            let _ = before.serving.await;
        }
        let listener = Listener::unix(self.path(id))?;
        let shutdown = Shutdown::default();
        let router = (self.router)(id, &shutdown);
        let (registry, service) = (self.registry.clone(), self.service.clone());
        tokio::spawn(close_with_vm(
            registry,
            service,
            id.clone(),
            shutdown.clone(),
        ));
        let serving = tokio::spawn(serve(listener, router, shutdown.clone()));
        let mut open = self.open.lock().await;
        open.retain(|_, socket| !socket.serving.is_finished());
        open.insert(id.clone(), Open { shutdown, serving });
        Ok(())
    }

    /// Closes all of them, and waits until their files are gone.
    pub(crate) async fn close(&self) {
        let open = std::mem::take(&mut *self.open.lock().await);
        for socket in open.values() {
            socket.shutdown.request();
        }
        for socket in open.into_values() {
            // A task that panicked has closed its socket too.
            let _ = socket.serving.await;
        }
    }
}

impl fmt::Debug for VmSockets {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("VmSockets")
            .field("directory", &self.directory)
            .finish_non_exhaustive()
    }
}

/// Removes the sockets that a killed process left in a directory: its VMs ended with it. Sockets that a
/// program listens on stay, and so do files that are not named like a VM's socket.
fn remove_abandoned(directory: &Path) -> io::Result<()> {
    for file in fs::read_dir(directory)? {
        let name = file?.file_name();
        let name = name.to_string_lossy();
        // The lock file may be all that is left.
        let socket = name.strip_suffix(".lock").unwrap_or(&name);
        let id = socket.strip_suffix(".sock").map(str::parse::<VmId>);
        if !matches!(id, Some(Ok(_))) {
            continue;
        }
        if let Err(error) = sockets::remove_abandoned(&directory.join(socket)) {
            tracing::warn!(%error, "a file among the sockets of VMs stays");
        }
    }
    Ok(())
}

/// Requests the socket's shutdown when the VM has been deleted, or the service stops.
async fn close_with_vm(registry: Registry, service: Shutdown, id: VmId, shutdown: Shutdown) {
    let mut changes = registry.changes();
    loop {
        changes.borrow_and_update();
        if registry.get(id.as_str()).is_err() {
            break;
        }
        tokio::select! {
            changed = changes.changed() => if changed.is_err() { break },
            () = service.requested() => break,
            () = shutdown.requested() => break,
        }
    }
    shutdown.request();
}
