//! A socket for each VM, on which Cloud Hypervisor's API is spoken.

use std::collections::BTreeMap;
use std::path::PathBuf;

use spec::VmId;
use tokio::sync::Mutex;
use tokio::task::JoinHandle;

use crate::listen::{ListenError, Listener};
use crate::serve::{Shutdown, serve};
use crate::service::Service;

/// The sockets of a service's VMs. Each lives as long as its VM.
#[derive(Debug)]
pub(crate) struct VmSockets {
    directory: PathBuf,
    open: Mutex<BTreeMap<VmId, Open>>,
}

#[derive(Debug)]
struct Open {
    shutdown: Shutdown,
    serving: JoinHandle<()>,
}

impl VmSockets {
    pub(crate) fn new(directory: PathBuf) -> Self {
        Self {
            directory,
            open: Mutex::default(),
        }
    }

    fn path(&self, id: &VmId) -> PathBuf {
        self.directory.join(format!("{id}.sock"))
    }

    /// Where this VM's socket is, if it is there.
    pub(crate) fn of(&self, id: &VmId) -> Option<String> {
        let path = self.path(id);
        path.exists().then(|| path.display().to_string())
    }

    /// Opens the socket of a VM that has just been created, and serves it until the VM or the service goes.
    pub(crate) async fn open(&self, service: &Service, id: &VmId) -> Result<(), ListenError> {
        // A VM of the same name that went a moment ago: its last requests may still be answered.
        let before = self.open.lock().await.remove(id);
        if let Some(before) = before {
            before.shutdown.request();
            // A task that panicked has let go of its socket too.
            let _ = before.serving.await;
        }
        let listener = Listener::unix(self.path(id))?;
        let shutdown = Shutdown::default();
        let router = service.vm_router(id, &shutdown);
        tokio::spawn(close_with_vm(service.clone(), id.clone(), shutdown.clone()));
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
            // A task that panicked has let go of its socket too.
            let _ = socket.serving.await;
        }
    }
}

/// Requests the socket's shutdown when the VM is no more, or the service stops.
async fn close_with_vm(service: Service, id: VmId, shutdown: Shutdown) {
    let mut changes = service.registry.changes();
    loop {
        changes.borrow_and_update();
        if service.registry.get(id.as_str()).is_err() {
            break;
        }
        tokio::select! {
            changed = changes.changed() => if changed.is_err() { break },
            () = service.shutdown.requested() => break,
            () = shutdown.requested() => break,
        }
    }
    shutdown.request();
}
