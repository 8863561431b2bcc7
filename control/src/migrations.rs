//! The migrations of a service: those in progress, and the last ones that ended.

use std::collections::VecDeque;
use std::sync::Arc;

use parking_lot::Mutex;
use spec::{
    AwaitMigration, FindOverlays, ForkVm, MergeSnapshots, MigrationInfo, MigrationOutcome,
    MirrorDisk, OverlayInfo, RecordWorkingSet, RestoreConfig, StartMigration, VmCoredumpData, VmId,
    VmSnapshotConfig,
};
use tokio::sync::watch;

use crate::error::{Category, RequestError};
use crate::handle::VmHandle;
use crate::registry::Registry;

/// Maximum number of past migrations that are listed.
const KEPT: usize = 256;

/// A migration, as one side sees it.
pub trait Migration: Send + Sync {
    /// Returns a report of this moment; never waits.
    fn info(&self) -> MigrationInfo;

    /// Cancels it.
    ///
    /// # Errors
    /// Fails if the guest has been handed over, or the migration has ended.
    fn cancel(&self) -> Result<(), RequestError>;

    /// Resolves a migration in doubt, and waits until the engine has acted on that, some seconds at
    /// most. Not for threads that must not block.
    ///
    /// # Errors
    /// The migration is not in doubt; or the guest cannot run at this side now, because a disk is locked
    /// for instance: then the migration stays in doubt, and another decision can be made.
    fn resolve(&self, outcome: MigrationOutcome) -> Result<(), RequestError>;

    /// Ends the recording of a working set: the guest is ready.
    ///
    /// # Errors
    /// Nothing is recorded, or no longer.
    fn end_recording(&self) -> Result<(), RequestError> {
        Err(not_recording())
    }

    /// Becomes true when the migration has ended.
    fn over(&self) -> watch::Receiver<bool>;

    /// Becomes true when it is certain on which side the VM is. Pages of its memory may follow, if they
    /// come from a snapshot.
    fn settled(&self) -> watch::Receiver<bool> {
        self.over()
    }

    /// Returns the VMs that it brings to this service or takes from it.
    fn vms(&self) -> Vec<VmId> {
        self.info().vm.into_iter().collect()
    }
}

/// Returns the refusal of a request that needs a recording when there is none.
#[must_use]
pub fn not_recording() -> RequestError {
    let detail = "no working set is being recorded with this VM";
    RequestError::new(Category::Conflict, "not-recording", detail)
}

/// The guests of which a snapshot may be taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SnapshotOf {
    /// Only paused guests, as Cloud Hypervisor's contract demands.
    Paused,
    /// Running guests too: they stop only while their device state is saved.
    PausedOrRunning,
}

/// Called for each migration that a standing receiver has accepted, on the thread that receives it.
pub type Accepted = Arc<dyn Fn(Arc<dyn Migration>) + Send + Sync>;

/// Moves guests.
pub trait Migrate: Send + Sync {
    /// Returns the migrations of an earlier process of this service, from their journals.
    fn history(&self) -> Vec<Arc<dyn Migration>> {
        Vec::new()
    }

    /// Begins to move a guest away.
    ///
    /// # Errors
    /// Fails if the request makes no sense, or the VM cannot be moved now.
    fn send(
        &self,
        registry: &Registry,
        vm: &VmHandle,
        what: &StartMigration,
    ) -> Result<Arc<dyn Migration>, RequestError>;

    /// Starts to listen for an incoming migration.
    ///
    /// # Errors
    /// The request is not valid, or the endpoint cannot be used.
    fn receive(
        &self,
        registry: &Registry,
        what: &AwaitMigration,
    ) -> Result<Arc<dyn Migration>, RequestError>;

    /// Starts to listen for migrations, until the returned wait is canceled. It is settled once its
    /// endpoint is free.
    ///
    /// # Errors
    /// The request is not valid, or the endpoint cannot be used.
    fn accept(
        &self,
        registry: &Registry,
        what: &AwaitMigration,
        accepted: Accepted,
    ) -> Result<Arc<dyn Migration>, RequestError>;

    /// Starts to write a snapshot of a VM.
    ///
    /// # Errors
    /// The request is not valid, or the VM's state is not one of `of`.
    fn snapshot(
        &self,
        vm: &VmHandle,
        what: &VmSnapshotConfig,
        of: SnapshotOf,
    ) -> Result<Arc<dyn Migration>, RequestError>;

    /// Starts to write a snapshot that needs no base from a chain of increments.
    ///
    /// # Errors
    /// The request is not valid, or the chain cannot be read.
    fn merge(&self, what: &MergeSnapshots) -> Result<Arc<dyn Migration>, RequestError>;

    /// Lists the overlays beside an image, and removes those that nothing uses if that is asked for.
    ///
    /// # Errors
    /// The request is not valid, or the images in the directory cannot be read.
    fn overlays(
        &self,
        registry: &Registry,
        what: &FindOverlays,
    ) -> Result<Vec<OverlayInfo>, RequestError>;

    /// Starts to write a core dump of a VM.
    ///
    /// # Errors
    /// The request is not valid, or the VM is not paused.
    fn core_dump(
        &self,
        vm: &VmHandle,
        what: &VmCoredumpData,
    ) -> Result<Arc<dyn Migration>, RequestError>;

    /// Starts to copy a disk of a VM into a new image, on which the disk then continues.
    ///
    /// # Errors
    /// The request is not valid, the VM has no such disk or no guest, or the disk is in use otherwise.
    fn mirror(
        &self,
        vm: &VmHandle,
        disk: &str,
        what: &MirrorDisk,
    ) -> Result<Arc<dyn Migration>, RequestError>;

    /// Starts to make a VM from a snapshot.
    ///
    /// # Errors
    /// The request is not valid, the VM exists, or the snapshot cannot be read.
    fn restore(
        &self,
        registry: &Registry,
        vm: &VmId,
        what: &RestoreConfig,
    ) -> Result<Arc<dyn Migration>, RequestError>;

    /// Starts to make a VM from a snapshot, and to record the pages that it touches.
    ///
    /// # Errors
    /// The same as those of [`Migrate::restore`].
    fn record(
        &self,
        registry: &Registry,
        vm: &VmId,
        what: &RecordWorkingSet,
    ) -> Result<Arc<dyn Migration>, RequestError>;

    /// Starts to make VMs from a VM, paused or running.
    ///
    /// # Errors
    /// The request is not valid, the VM has no guest, or a VM of such a name exists.
    fn fork(
        &self,
        registry: &Registry,
        vm: &VmHandle,
        what: &ForkVm,
    ) -> Result<Arc<dyn Migration>, RequestError>;
}

/// The migrations of a service.
#[derive(Default)]
pub(crate) struct Migrations {
    all: Mutex<VecDeque<Arc<dyn Migration>>>,
}

impl Migrations {
    pub(crate) fn add(&self, migration: Arc<dyn Migration>) -> Arc<dyn Migration> {
        let mut all = self.all.lock();
        if all.len() >= KEPT
            && let Some(oldest) = all.iter().position(|one| *one.over().borrow())
        {
            all.remove(oldest);
        }
        all.push_back(Arc::clone(&migration));
        migration
    }

    pub(crate) fn list(&self) -> Vec<Arc<dyn Migration>> {
        self.all.lock().iter().cloned().collect()
    }

    pub(crate) fn get(&self, id: &str) -> Result<Arc<dyn Migration>, RequestError> {
        let all = self.all.lock();
        let found = all.iter().find(|one| one.info().id == id).cloned();
        found.ok_or_else(|| {
            let detail = format!("no migration has the name {id:?}");
            RequestError::new(Category::NotFound, "no-such-migration", detail)
        })
    }
}
