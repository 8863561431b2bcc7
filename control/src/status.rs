//! The status that a driver publishes of its VM.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use spec::{
    BootTimeline, DeviceNode, DeviceTree, Failure, PendingResize, VmConfig, VmId, VmInfo, VmState,
};
use tokio::sync::watch;

use crate::events::EventLog;

/// The way on which a guest came that did not boot here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Arrival {
    /// A migration from another service.
    Migrated,
    /// A snapshot.
    Restored,
}

/// A VM as its driver last published it.
#[derive(Clone, Debug)]
pub struct VmStatus {
    /// Counts the changes.
    pub generation: u64,
    /// The VM's state.
    pub state: VmState,
    /// Its configuration; a pseudo terminal's path is filled in.
    pub config: Arc<VmConfig>,
    /// Its devices, while it is on.
    pub devices: BTreeMap<String, DeviceNode>,
    /// Bytes that the guest has given back through a balloon, as it goes.
    pub balloon: Option<Arc<AtomicU64>>,
    /// Bytes of memory that were added to what the guest booted with, as they come and go: a counter
    /// for each zone of memory that can grow.
    pub hotplugged: Vec<Arc<AtomicU64>>,
    /// vCPUs that are plugged, while it is on.
    pub vcpus: Option<u32>,
    /// Resizes that the guest has not completed yet.
    pub resizes: Vec<PendingResize>,
    /// Why the guest ended, when it was not asked to.
    pub failure: Option<Failure>,
    /// How long the last boot took.
    pub boot: Option<BootTimeline>,
    /// Guest resets since it was booted, by itself or by request.
    pub reboots: u64,
    /// The guest ended by itself, and was not ended by a request.
    pub by_guest: bool,
    /// Origin of a guest that did not boot here.
    pub arrival: Option<Arrival>,
    /// The driver is gone; nothing will change any more.
    pub ended: bool,
}

impl VmStatus {
    pub(crate) fn created(config: Arc<VmConfig>) -> Self {
        Self {
            generation: 0,
            state: VmState::Created,
            config,
            devices: BTreeMap::new(),
            balloon: None,
            hotplugged: Vec::new(),
            vcpus: None,
            resizes: Vec::new(),
            failure: None,
            boot: None,
            reboots: 0,
            by_guest: false,
            arrival: None,
            ended: false,
        }
    }

    /// Returns the bytes of memory that the guest has now: what it booted with and what was plugged, less what
    /// it gave back.
    #[must_use]
    pub fn memory_actual_size(&self) -> u64 {
        let load = |bytes: &Arc<AtomicU64>| bytes.load(Ordering::Relaxed);
        let boot = self.config.memory.boot_size();
        let all = self
            .hotplugged
            .iter()
            .map(load)
            .fold(boot, u64::saturating_add);
        all.saturating_sub(self.balloon.as_ref().map_or(0, load))
    }

    /// In the form of the API.
    #[must_use]
    pub fn info(&self) -> VmInfo {
        VmInfo {
            config: VmConfig::clone(&self.config),
            state: self.state,
            memory_actual_size: self.memory_actual_size(),
            vcpus_actual_count: self.vcpus,
            pending_resizes: self.resizes.clone(),
            device_tree: (!self.devices.is_empty()).then(|| DeviceTree(self.devices.clone())),
            failure: self.failure.clone(),
            boot: self.boot,
        }
    }
}

/// The driver's end of a [`VmStatus`]. Dropping it says that the driver is gone.
#[derive(Debug)]
pub struct StatusPublisher {
    pub(crate) id: VmId,
    pub(crate) status: watch::Sender<VmStatus>,
    pub(crate) events: EventLog,
}

impl StatusPublisher {
    /// Returns the published status.
    #[must_use]
    pub fn current(&self) -> VmStatus {
        self.status.borrow().clone()
    }

    /// Records an event of the VM that does not change its status.
    pub fn record(&self, event: &str, detail: Option<String>) {
        self.events.record(&self.id, event, detail);
    }

    /// Changes what is published, and records what that means as an event.
    pub fn update(&self, change: impl FnOnce(&mut VmStatus)) {
        let mut happened = None;
        self.status.send_modify(|status| {
            let before = (status.state, status.reboots);
            change(status);
            status.generation += 1;
            happened = event(before, status);
        });
        if let Some((event, detail)) = happened {
            self.events.record(&self.id, event, detail);
        }
    }
}

fn event(before: (VmState, u64), now: &VmStatus) -> Option<(&'static str, Option<String>)> {
    match (before.0, now.state) {
        (_, VmState::Shutdown) if before.0 != VmState::Shutdown => match &now.failure {
            Some(failure) => Some(("failed", Some(failure.detail.clone()))),
            None => Some(("shutdown", None)),
        },
        (VmState::Running, VmState::Paused) => Some(("paused", None)),
        (VmState::Paused, VmState::Running) if before.1 == now.reboots => Some(("resumed", None)),
        (VmState::Created, VmState::Running | VmState::Paused) => match now.arrival {
            Some(Arrival::Migrated) => Some(("arrived", None)),
            Some(Arrival::Restored) => Some(("restored", None)),
            None if now.state == VmState::Running => Some(("booted", None)),
            None => None,
        },
        (VmState::Shutdown, VmState::Running) => Some(("booted", None)),
        _ if before.1 != now.reboots => Some(("rebooted", None)),
        _ => None,
    }
}

impl Drop for StatusPublisher {
    fn drop(&mut self) {
        self.status.send_modify(|status| {
            status.generation += 1;
            status.ended = true;
        });
        // A VM that was forgotten may have ended later than that.
        self.events.retire(&self.id);
    }
}
