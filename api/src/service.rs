//! What the faces share.

use std::path::PathBuf;
use std::sync::Arc;

use axum::Router;
use control::{Registry, VmHandle};
use spec::{VmId, VmSummary, VmmPingResponse};

use crate::document::{self, assemble};
use crate::metrics::Requests;
use crate::one_vm::OneVm;
use crate::serve::Shutdown;
use crate::sockets::VmSockets;
use crate::vmm::{Scope, Vmm};

/// A service: its VMs, and what it says about itself. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Service {
    pub(crate) registry: Registry,
    pub(crate) about: Arc<VmmPingResponse>,
    pub(crate) shutdown: Shutdown,
    pub(crate) sockets: Option<Arc<VmSockets>>,
    pub(crate) requests: Requests,
}

impl Service {
    /// A service of these VMs that answers a ping with `about`.
    #[must_use]
    pub fn new(registry: Registry, about: VmmPingResponse) -> Self {
        Self {
            registry,
            about: Arc::new(about),
            shutdown: Shutdown::default(),
            sockets: None,
            requests: Requests::default(),
        }
    }

    /// Also gives each VM that is created through [`router`](Self::router) a socket `<id>.sock` of its own in
    /// `directory`, on which Cloud Hypervisor's API is spoken.
    #[must_use]
    pub fn with_vm_sockets(mut self, directory: impl Into<PathBuf>) -> Self {
        self.sockets = Some(Arc::new(VmSockets::new(directory.into())));
        self
    }

    /// Requested when a client asks the service to stop; whoever wants it to stop requests it too. VMs that are
    /// still there are the program's to end.
    #[must_use]
    pub fn shutdown(&self) -> &Shutdown {
        &self.shutdown
    }

    /// Requests the shutdown, and waits until the sockets of VMs are closed and their files gone.
    pub async fn close(&self) {
        self.shutdown.request();
        if let Some(sockets) = &self.sockets {
            sockets.close().await;
        }
    }

    /// The VMs.
    #[must_use]
    pub fn registry(&self) -> &Registry {
        &self.registry
    }

    /// The service's own face. To be served by [`serve`](crate::serve), which tells it what a request came
    /// over: over TCP, requests that a web page makes a browser send are refused.
    pub fn router(&self) -> Router {
        let vmm = Vmm {
            about: Arc::clone(&self.about),
            registry: self.registry.clone(),
            scope: Scope::All,
            shutdown: self.shutdown.clone(),
        };
        assemble(
            document::service_face(self.clone(), vmm),
            self.requests.clone(),
        )
    }

    /// Cloud Hypervisor's face of the VM `id`, whether it is created yet or not. `shutdown` is requested when a
    /// client asks this VMM to end; for a program that is nothing else, that is
    /// [`shutdown`](Self::shutdown).
    pub fn vm_router(&self, id: &VmId, shutdown: &Shutdown) -> Router {
        let vmm = Vmm {
            about: Arc::clone(&self.about),
            registry: self.registry.clone(),
            scope: Scope::One(id.clone()),
            shutdown: shutdown.clone(),
        };
        let vm = OneVm {
            registry: self.registry.clone(),
            id: id.clone(),
        };
        assemble(document::vm_face(vm, vmm), self.requests.clone())
    }

    pub(crate) fn summary(&self, vm: &VmHandle) -> VmSummary {
        let status = vm.status();
        VmSummary {
            id: vm.id().clone(),
            state: status.state,
            vcpus: status.config.cpus.boot_vcpus,
            memory: status.config.memory.size,
            api_socket: self
                .sockets
                .as_ref()
                .and_then(|sockets| sockets.of(vm.id())),
        }
    }
}
