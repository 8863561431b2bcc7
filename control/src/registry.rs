//! The VMs of a service, by name.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;

use parking_lot::Mutex;
use spec::{
    AwaitMigration, CpuCheck, CpuDescription, FindOverlays, ForkVm, HostCpu, HostLimits,
    MergeSnapshots, MigrationSide, MirrorDisk, OverlayInfo, RecordWorkingSet, RestoreConfig,
    StartMigration, VmConfig, VmCoredumpData, VmId, VmSnapshotConfig,
};
use tokio::sync::watch;

use crate::error::{Category, RequestError};
use crate::events::EventLog;
use crate::handle::VmHandle;
use crate::migrations::{Accepted, Migrate, Migration, Migrations, SnapshotOf, not_recording};
use crate::request::Request;

/// A factory of drivers.
pub trait Spawn: Send + Sync {
    /// Starts a driver for a VM that is created and not booted. The configuration is valid.
    ///
    /// # Errors
    /// Fails if the host has no room for another.
    fn spawn(
        &self,
        id: &VmId,
        config: Arc<VmConfig>,
        events: EventLog,
    ) -> Result<VmHandle, RequestError>;

    /// Returns the host's limits for a VM.
    fn host_limits(&self) -> HostLimits;

    /// Describes the host's CPU.
    fn host_cpu(&self) -> HostCpu;

    /// Finds out whether a guest with these CPUs could run here.
    ///
    /// # Errors
    /// Fails if the description is not possible.
    fn check_cpu(&self, guest: &CpuDescription) -> Result<CpuCheck, RequestError>;

    /// Returns the migration engine, if there is one.
    fn mover(&self) -> Option<&dyn Migrate> {
        None
    }
}

/// Maximum number of VMs of one service.
const MAX_VMS: usize = 4096;

/// The VMs of a service, by name.
#[derive(Clone)]
pub struct Registry(Arc<Shared>);

struct Shared {
    spawner: Box<dyn Spawn>,
    vms: Mutex<BTreeMap<VmId, VmHandle>>,
    events: EventLog,
    migrations: Migrations,
    /// Counts creations and deletions.
    changes: watch::Sender<u64>,
}

impl Registry {
    /// Returns an empty registry. `spawner` creates its drivers.
    pub fn new(spawner: impl Spawn + 'static) -> Self {
        let migrations = Migrations::default();
        for migration in spawner.mover().into_iter().flat_map(Migrate::history) {
            migrations.add(migration);
        }
        Self(Arc::new(Shared {
            spawner: Box::new(spawner),
            vms: Mutex::default(),
            events: EventLog::default(),
            migrations,
            changes: watch::Sender::new(0),
        }))
    }

    /// Creates a VM; its name is made up when none is given.
    ///
    /// # Errors
    /// Fails if the configuration is not possible, the name is taken, or there is no room.
    pub fn create(&self, id: Option<VmId>, mut config: VmConfig) -> Result<VmHandle, RequestError> {
        // A destination must not choose by its own default.
        config.cpus.nested = Some(config.cpus.is_nested());
        config
            .validate(&self.0.spawner.host_limits())
            .map_err(RequestError::invalid)?;
        let id = id.unwrap_or_else(VmId::unique);
        let mut vms = self.0.vms.lock();
        if vms.contains_key(&id) {
            let detail = format!("a VM {:?} exists already", id.as_str());
            return Err(RequestError::new(Category::Conflict, "vm-exists", detail));
        }
        if vms.len() >= MAX_VMS {
            let detail =
                format!("the service has {MAX_VMS} VMs, which is its limit; delete one first");
            return Err(RequestError::new(Category::Host, "too-many-vms", detail));
        }
        let handle = self
            .0
            .spawner
            .spawn(&id, Arc::new(config), self.0.events.clone())?;
        vms.insert(id.clone(), handle.clone());
        self.0.events.record(&id, "created", None);
        drop(vms);
        self.0.changes.send_modify(|count| *count += 1);
        Ok(handle)
    }

    /// Returns the VM of this name.
    ///
    /// # Errors
    /// Fails if there is none.
    pub fn get(&self, id: &str) -> Result<VmHandle, RequestError> {
        let found = id
            .parse::<VmId>()
            .ok()
            .and_then(|id| self.0.vms.lock().get(&id).cloned());
        found.ok_or_else(|| RequestError::no_such_vm(id))
    }

    /// All of them, by name.
    #[must_use]
    pub fn list(&self) -> Vec<VmHandle> {
        self.0.vms.lock().values().cloned().collect()
    }

    /// Ends a VM and forgets it. A VM whose driver is gone is forgotten too.
    ///
    /// # Errors
    /// Fails if there is no VM of this name, or its driver refuses.
    pub async fn delete(&self, id: &str) -> Result<(), RequestError> {
        let handle = self.get(id)?;
        match handle.ask(Request::Delete).await {
            Ok(_) => {}
            Err(gone) if gone == RequestError::driver_gone() => {}
            Err(refused) => return Err(refused),
        }
        self.forget(&handle, "deleted", None);
        Ok(())
    }

    /// Removes a VM and records `event`. Its driver ends when the last handle is dropped. Does nothing if
    /// the VM is gone, also if another has its name by now.
    pub fn forget(&self, vm: &VmHandle, event: &str, detail: Option<String>) {
        let mut vms = self.0.vms.lock();
        if !vms.get(vm.id()).is_some_and(|there| there.is_same(vm)) {
            return;
        }
        let forgotten = vms.remove(vm.id());
        // Under the lock: behind it another VM of the name may have a history.
        self.0.events.record_last(vm.id(), event, detail);
        drop(vms);
        drop(forgotten);
        self.0.changes.send_modify(|count| *count += 1);
    }

    /// Records an event of a VM that may not exist: one that is awaited, or was not made.
    pub fn record(&self, id: &VmId, event: &str, detail: Option<String>) {
        let vms = self.0.vms.lock();
        if vms.contains_key(id) {
            self.0.events.record(id, event, detail);
        } else {
            // A history of its own would stay for ever.
            self.0.events.record_last(id, event, detail);
        }
    }

    fn mover(&self) -> Result<&dyn Migrate, RequestError> {
        self.0.spawner.mover().ok_or_else(|| {
            let detail = "these VMs cannot be moved";
            RequestError::new(Category::Unsupported, "not-supported", detail)
        })
    }

    /// Begins to move a guest to another service.
    ///
    /// # Errors
    /// Fails if there is no VM of this name, it makes no sense, or it cannot be moved now.
    pub fn send_migration(
        &self,
        id: &str,
        what: &StartMigration,
    ) -> Result<Arc<dyn Migration>, RequestError> {
        let vm = self.get(id)?;
        let migration = self.mover()?.send(self, &vm, what)?;
        Ok(self.0.migrations.add(migration))
    }

    /// Starts to write a snapshot of a VM.
    ///
    /// # Errors
    /// There is no VM of this name, its state is not one of `of`, or the request is not valid.
    pub fn take_snapshot(
        &self,
        id: &str,
        what: &VmSnapshotConfig,
        of: SnapshotOf,
    ) -> Result<Arc<dyn Migration>, RequestError> {
        let vm = self.get(id)?;
        let snapshot = self.mover()?.snapshot(&vm, what, of)?;
        Ok(self.0.migrations.add(snapshot))
    }

    /// Starts to write a snapshot that needs no base from a chain of increments.
    ///
    /// # Errors
    /// The request is not valid, or the chain cannot be read.
    pub fn merge_snapshots(
        &self,
        what: &MergeSnapshots,
    ) -> Result<Arc<dyn Migration>, RequestError> {
        let merging = self.mover()?.merge(what)?;
        Ok(self.0.migrations.add(merging))
    }

    /// Lists the overlays beside an image, and removes those that nothing uses if that is asked for. Waits for
    /// the disk.
    ///
    /// # Errors
    /// The request is not valid, or the images in the directory cannot be read.
    pub fn overlays(&self, what: &FindOverlays) -> Result<Vec<OverlayInfo>, RequestError> {
        self.mover()?.overlays(self, what)
    }

    /// Starts to write a core dump of a paused VM.
    ///
    /// # Errors
    /// There is no VM of this name, it is not paused, or the request is not valid.
    pub fn core_dump(
        &self,
        id: &str,
        what: &VmCoredumpData,
    ) -> Result<Arc<dyn Migration>, RequestError> {
        let dump = self.mover()?.core_dump(&self.get(id)?, what)?;
        Ok(self.0.migrations.add(dump))
    }

    /// Starts to copy a disk of a VM into a new image, on which the disk then continues.
    ///
    /// # Errors
    /// There is no VM of this name, or disk of it, or guest, or the request is not valid.
    pub fn mirror_disk(
        &self,
        id: &str,
        disk: &str,
        what: &MirrorDisk,
    ) -> Result<Arc<dyn Migration>, RequestError> {
        let mirror = self.mover()?.mirror(&self.get(id)?, disk, what)?;
        Ok(self.0.migrations.add(mirror))
    }

    /// Starts to make a VM from a snapshot.
    ///
    /// # Errors
    /// There is a VM of this name, the request is not valid, or the snapshot cannot be read.
    pub fn restore(
        &self,
        vm: &VmId,
        what: &RestoreConfig,
    ) -> Result<Arc<dyn Migration>, RequestError> {
        let restore = self.mover()?.restore(self, vm, what)?;
        Ok(self.0.migrations.add(restore))
    }

    /// Starts to make a VM from a snapshot, and to record the pages that it touches.
    ///
    /// # Errors
    /// The same as those of [`Registry::restore`].
    pub fn record_working_set(
        &self,
        vm: &VmId,
        what: &RecordWorkingSet,
    ) -> Result<Arc<dyn Migration>, RequestError> {
        let recording = self.mover()?.record(self, vm, what)?;
        Ok(self.0.migrations.add(recording))
    }

    /// Ends the recording of a working set with a VM, which is ready.
    ///
    /// # Errors
    /// There is no VM of this name, or nothing is recorded with it.
    pub fn end_recording(&self, id: &str) -> Result<(), RequestError> {
        let vm = self.get(id)?;
        let of_vm = |one: &Arc<dyn Migration>| one.info().vm.as_ref() == Some(vm.id());
        // The VM's latest: nothing else happens to it while it is recorded.
        let latest = self.migrations().into_iter().rev().find(of_vm);
        latest.ok_or_else(not_recording)?.end_recording()
    }

    /// Starts to make VMs from a VM, paused or running.
    ///
    /// # Errors
    /// There is no VM of this name, it has no guest, the request is not valid, or a VM has such a name.
    pub fn fork(&self, id: &str, what: &ForkVm) -> Result<Arc<dyn Migration>, RequestError> {
        let vm = self.get(id)?;
        let forking = self.mover()?.fork(self, &vm, what)?;
        Ok(self.0.migrations.add(forking))
    }

    /// Starts to listen for an incoming migration.
    ///
    /// # Errors
    /// The request is not valid, or the endpoint cannot be used.
    pub fn receive_migration(
        &self,
        what: &AwaitMigration,
    ) -> Result<Arc<dyn Migration>, RequestError> {
        let migration = self.mover()?.receive(self, what)?;
        Ok(self.0.migrations.add(migration))
    }

    /// Starts to listen for migrations, until the returned wait is canceled. Each one that is accepted
    /// is listed, and given to `accepted`; the wait itself is not listed.
    ///
    /// # Errors
    /// The request is not valid, or the endpoint cannot be used.
    pub fn accept_migrations(
        &self,
        what: &AwaitMigration,
        accepted: Accepted,
    ) -> Result<Arc<dyn Migration>, RequestError> {
        let registry = self.clone();
        let listed: Accepted = Arc::new(move |migration| {
            accepted(registry.0.migrations.add(migration));
        });
        self.mover()?.accept(self, what, listed)
    }

    /// Returns the migrations in progress and the last ones that ended, oldest first.
    #[must_use]
    pub fn migrations(&self) -> Vec<Arc<dyn Migration>> {
        self.0.migrations.list()
    }

    /// The newest migration of this VM between services, in either direction. A VM that has moved away
    /// no longer exists, and its migration is still found.
    #[must_use]
    pub fn latest_migration(&self, vm: &VmId) -> Option<Arc<dyn Migration>> {
        let is_of_vm = |migration: &Arc<dyn Migration>| {
            let info = migration.info();
            info.is_between_services() && info.vm.as_ref() == Some(vm)
        };
        self.migrations().into_iter().rev().find(is_of_vm)
    }

    /// Returns the migration with this id.
    ///
    /// # Errors
    /// Fails if there is none.
    pub fn migration(&self, id: &str) -> Result<Arc<dyn Migration>, RequestError> {
        self.0.migrations.get(id)
    }

    /// Returns the log of events.
    #[must_use]
    pub fn events(&self) -> &EventLog {
        &self.0.events
    }

    /// Follows creations and deletions: a count of both.
    #[must_use]
    pub fn changes(&self) -> watch::Receiver<u64> {
        self.0.changes.subscribe()
    }

    /// Returns the host's limits for a VM.
    #[must_use]
    pub fn host_limits(&self) -> HostLimits {
        self.0.spawner.host_limits()
    }

    /// Describes the host's CPU.
    #[must_use]
    pub fn host_cpu(&self) -> HostCpu {
        self.0.spawner.host_cpu()
    }

    /// Finds out whether a guest with these CPUs could run here.
    ///
    /// # Errors
    /// Fails if the description is not possible.
    pub fn check_cpu(&self, guest: &CpuDescription) -> Result<CpuCheck, RequestError> {
        self.0.spawner.check_cpu(guest)
    }

    /// Calls off all migrations, or waits for those that cannot be any more, and ends all VMs. Each driver is asked first and then waited for, so they end side by side.
    pub async fn delete_all(&self) {
        for migration in self.migrations() {
            let is_leaving = migration.info().side == MigrationSide::Source;
            if migration.cancel().is_err() && is_leaving && !*migration.over().borrow() {
                // The guest is given away, and may wait for memory that we have.
                tracing::info!("waiting for the rest of a guest's memory");
                let _ = migration.over().wait_for(|over| *over).await;
            }
        }
        let mut ending: Vec<_> = self
            .list()
            .into_iter()
            .map(|vm| (vm.ask_now(Request::Delete), vm))
            .collect();
        for (answer, vm) in ending.drain(..) {
            if let Err(error) = answer.await {
                tracing::warn!(vm = %vm.id(), %error, "a VM did not end cleanly");
            }
            self.forget(&vm, "deleted", None);
        }
    }
}

impl fmt::Debug for Registry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set().entries(self.0.vms.lock().keys()).finish()
    }
}
