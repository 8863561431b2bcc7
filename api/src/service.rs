//! The state that all handlers of a service share.

use std::sync::Arc;

use control::{Migration, Registry, RequestError, VmHandle};
use spec::{AwaitMigration, VmSummary, VmmPingResponse};

use crate::claim::ClaimedVersion;
use crate::migrations::give_socket;
use crate::request_counts::Requests;
use crate::serve::Shutdown;
use crate::sockets::VmSockets;

/// A service: its VMs, and what it says about itself. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Service {
    pub(crate) registry: Registry,
    pub(crate) about: Arc<VmmPingResponse>,
    /// Answer to a ping of Cloud Hypervisor's face.
    pub(crate) about_vm: Arc<VmmPingResponse>,
    pub(crate) claim: ClaimedVersion,
    pub(crate) shutdown: Shutdown,
    pub(crate) sockets: Option<Arc<VmSockets>>,
    pub(crate) requests: Requests,
}

impl Service {
    /// A service of these VMs that answers a ping with `about`.
    #[must_use]
    pub fn new(registry: Registry, about: VmmPingResponse) -> Self {
        let about = Arc::new(about);
        Self {
            registry,
            about_vm: Arc::clone(&about),
            about,
            claim: ClaimedVersion::default(),
            shutdown: Shutdown::default(),
            sockets: None,
            requests: Requests::default(),
        }
    }

    /// Has the sockets that speak Cloud Hypervisor's API claim to be this version of it: their pings
    /// answer it, and `vm.send-migration` answers when that version did. To be called before
    /// [`with_vm_sockets`](Self::with_vm_sockets).
    #[must_use]
    pub fn claiming(mut self, version: ClaimedVersion) -> Self {
        self.claim = version;
        self.about_vm = Arc::new(VmmPingResponse {
            version: version.to_string(),
            // With the program's own version: the reader of a build version wants to know what runs.
            build_version: format!("v{version}-whimbrel-{}", self.about.version),
            ..VmmPingResponse::clone(&self.about)
        });
        self
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

    /// Accepts VMs from other services until the returned wait is canceled. It is settled once its
    /// endpoint is free. To be called on the runtime of the service.
    ///
    /// # Errors
    /// The trust in peers is not said, or the endpoint cannot be used.
    pub fn accept_migrations(
        &self,
        what: &AwaitMigration,
    ) -> Result<Arc<dyn Migration>, RequestError> {
        let (service, runtime) = (self.clone(), tokio::runtime::Handle::current());
        let accepted = Arc::new(move |migration| {
            runtime.spawn(give_socket(service.clone(), migration));
        });
        self.registry.accept_migrations(what, accepted)
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
            memory: status.config.memory.boot_size(),
            api_socket: self
                .sockets
                .as_ref()
                .and_then(|sockets| sockets.of(vm.id())),
        }
    }
}
