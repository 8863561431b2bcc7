//! The state that all handlers of a service share.

use std::sync::Arc;

use control::{Registry, VmHandle};
use spec::{VmSummary, VmmPingResponse};

use crate::request_counts::Requests;
use crate::serve::Shutdown;
use crate::sockets::VmSockets;

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

    /// Returns the shutdown switch. Clients request it through the API, and the program may, too. The
    /// program ends the VMs that are left.
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
