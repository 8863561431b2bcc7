//! The destination's VM, as the migration engine sees it.

use std::fs::File;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use ::devices::tpm::LoadedTpm;
use control::{Accepted, Arrival, Registry, VmHandle};
use memory::AwaitedBlocks;
use migration::{
    Block, Destination, DestinationDisk, Fate, Host, Journal, Offer, Phase, Refusal, Side,
    StartFailure,
};
use spec::{Failure, VmConfig, VmId};
use uuid::Uuid;

use super::conflicts::helped;
use super::freeze::OwnOverlays;
use super::offer::{self, CheckedOffer};
use super::storage::{BaseReader, KnownBases, NewImages};
use super::taps::GivenTaps;
use super::trust::Allowed;
use super::{ActiveMigration, Journals};
use crate::arch::x86_64::generation;
use crate::descriptors;
use crate::devices::{MachineOrigin, MemoryOrigin, ResourceOwner};
use crate::driver::{Caller, Consoles, DestinationParts, Driver};
use crate::failure::{self, BuildError};
use crate::machine::{self, Built, GuestRam, Halter, Machine};
use crate::pool::{Callers, Pool};

/// Makes a VM for the guest that comes.
#[derive(Clone)]
pub(super) struct DestinationHost {
    host: Arc<machine::Host>,
    registry: Registry,
    callers: Callers,
    journals: Journals,
    known_bases: Arc<KnownBases>,
    moving: Arc<ActiveMigration>,
    /// The name that the VM gets here; the one that the offer has when absent.
    name: Option<VmId>,
    allowed: Allowed,
    taps: GivenTaps,
    origin: GuestOrigin,
    /// The guest stays paused when it has arrived, whatever its source says.
    stays_paused: bool,
    /// Gets the migration once its offer is accepted.
    accepted: Option<Accepted>,
}

/// The place from which a guest comes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum GuestOrigin {
    /// Another machine, which has the guest's locks and sockets until it hands them over.
    Migration,
    /// A snapshot. The machine that it was taken of may still run: nothing is taken from it.
    Snapshot {
        /// All memory is populated before the guest runs.
        prefault: bool,
    },
}

impl GuestOrigin {
    /// The event of a VM whose guest did not come.
    fn failure_event(self) -> &'static str {
        match self {
            Self::Migration => "arrival-failed",
            Self::Snapshot { .. } => "restore-failed",
        }
    }

    /// Has a refusal say at which side of a migration it was: a snapshot has one side only.
    fn refusal(self, why: Refusal) -> Refusal {
        match self {
            Self::Migration => {
                Refusal::new(why.code, format!("at the destination: {}", why.detail))
            }
            Self::Snapshot { .. } => why,
        }
    }

    /// How the guest came, once it is there.
    fn arrival(self) -> Arrival {
        match self {
            Self::Migration => Arrival::Migrated,
            Self::Snapshot { .. } => Arrival::Restored,
        }
    }

    fn owner(self) -> ResourceOwner {
        match self {
            Self::Migration => ResourceOwner::Source,
            Self::Snapshot { .. } => ResourceOwner::ThisMachine,
        }
    }

    /// The memory of the machine. `files` came with the guest: one for each block, or that of a
    /// snapshot.
    fn memory(self, files: Vec<File>) -> MemoryOrigin {
        let files: Vec<_> = files.into_iter().map(Arc::new).collect();
        match (files.first(), self) {
            (None, _) => MemoryOrigin::New,
            (Some(_), Self::Migration) => MemoryOrigin::Given(files),
            (Some(file), Self::Snapshot { prefault }) => MemoryOrigin::View {
                file: Arc::clone(file),
                prefault,
            },
        }
    }

    /// Opens the host's ends of the serial port and the console. Files keep their content.
    fn open_consoles(self, config: &VmConfig, to_itself: bool) -> Result<Consoles, BuildError> {
        match self {
            Self::Migration => Consoles::open_next(config, to_itself),
            Self::Snapshot { .. } => Consoles::open(config, to_itself),
        }
    }
}

/// Records why the VM `asked` did not come, unless an event of the VM that was made for it says so.
pub(super) fn record_failure(
    moving: &ActiveMigration,
    registry: &Registry,
    asked: &VmId,
    origin: GuestOrigin,
) {
    let report = moving.progress.report();
    if report.phase == Phase::Completed || moving.end_is_recorded.swap(true, Ordering::AcqRel) {
        return;
    }
    let detail = report.error.map(|error| error.detail);
    registry.record(asked, origin.failure_event(), detail);
}

impl DestinationHost {
    pub(super) fn new(
        pool: &Pool,
        registry: Registry,
        moving: Arc<ActiveMigration>,
        allowed: Allowed,
        origin: GuestOrigin,
    ) -> Self {
        let name = match origin {
            GuestOrigin::Migration => moving.vm.lock().clone(),
            // Each offer has the name of its VM.
            GuestOrigin::Snapshot { .. } => None,
        };
        Self {
            host: Arc::clone(pool.host()),
            registry,
            callers: pool.callers().clone(),
            journals: pool.journals().clone(),
            known_bases: Arc::clone(pool.known_bases()),
            moving,
            name,
            allowed,
            taps: GivenTaps::default(),
            origin,
            stays_paused: false,
            accepted: None,
        }
    }

    /// Keeps the guest paused when it has arrived, unless it should `resume`.
    pub(super) fn resuming(mut self, resume: bool) -> Self {
        self.stays_paused = !resume;
        self
    }

    /// Gives interfaces of the guest these taps.
    pub(super) fn with_taps(mut self, taps: GivenTaps) -> Self {
        self.taps = taps;
        self
    }

    /// Shows the migration to `accepted` once its offer is accepted, and not before.
    pub(super) fn listed_by(mut self, accepted: Accepted) -> Self {
        self.accepted = Some(accepted);
        self
    }

    /// Returns the same host for another migration.
    pub(super) fn of(&self, moving: Arc<ActiveMigration>) -> Self {
        Self {
            moving,
            ..self.clone()
        }
    }

    fn create(&self, vm: &VmId, config: VmConfig) -> Result<(VmHandle, Caller), Refusal> {
        let created = self.registry.create(Some(vm.clone()), config);
        let created = created.map_err(offer::refusal)?;
        let gone = || Refusal::new("machine-gone", "the VM no longer exists");
        Ok((created, self.callers.get(vm).ok_or_else(gone)?))
    }

    /// Builds the machine, and gives it to the VM's driver.
    fn build(
        &self,
        vm: VmHandle,
        parts: DestinationParts,
        config: &VmConfig,
        origin: &MachineOrigin,
        images: NewImages,
    ) -> Result<DestinationVm, Refusal> {
        let DestinationParts {
            caller,
            host,
            reporter,
        } = parts;
        let build = || -> Result<_, BuildError> {
            let mut needed = descriptors::of_machine(config, origin.may_wait)
                .saturating_add(descriptors::of_new_images(images.count()));
            if origin.may_wait && images.count() > 0 {
                needed = needed.saturating_add(descriptors::of_late_blocks(config));
            }
            let reserved = host.descriptors.reserve(needed, None)?;
            let consoles = self.origin.open_consoles(config, host.terminal)?;
            let consoles = consoles.keep_reserved(&reserved);
            let outputs = consoles.outputs();
            let built = Built::new(&host, config, outputs, origin, &reporter, reserved)?;
            Ok((built.expect_guest()?, consoles))
        };
        let (active, consoles) = build().map_err(|error| {
            let told = failure::told(&error);
            let why = self.origin.refusal(Refusal::new(told.code, told.detail));
            match self.origin {
                // A peer learns nothing of other VMs, and its guest has what it has.
                GuestOrigin::Migration => why,
                GuestOrigin::Snapshot { .. } => helped(why, &self.registry, vm.id(), config),
            }
        })?;
        let (ram, _) = active.memory();
        let halter = Arc::new(active.halter());
        let machine = Machine::new(active, &host.background);
        caller.call(move |driver, _| driver.provide(machine, consoles))?;
        Ok(DestinationVm {
            registry: self.registry.clone(),
            vm,
            caller,
            ram,
            halter,
            stage: Stage::Coming,
            images,
            origin: self.origin,
            stays_paused: self.stays_paused,
            moving: Arc::clone(&self.moving),
            overlays: OwnOverlays::default(),
        })
    }
}

impl Host for DestinationHost {
    fn prepare(
        &self,
        id: Uuid,
        offer: &Offer,
        files: Vec<File>,
    ) -> Result<Box<dyn Destination>, Refusal> {
        let CheckedOffer {
            vm,
            mut config,
            mut resolved,
            cpu,
            on_bus,
            mut images,
            frozen,
        } = offer::check(
            offer,
            // Not the name in the report: that may be of an offer that came before, and to nothing.
            self.name.clone(),
            &self.registry,
            &self.host,
            &self.allowed,
            &self.taps,
        )
        .map_err(|why| self.origin.refusal(why))?;
        if self.origin == GuestOrigin::Migration && !frozen.is_empty() {
            let why = "a guest that moves has no frozen disks";
            return Err(Refusal::new("offer-unreadable", why));
        }
        // Last of the checks: it may read a base for the first time.
        let bases = BaseReader {
            known: &self.known_bases,
            decision: &self.moving.decision,
            notes: &self.moving.bases,
        };
        let configs = [&mut config, &mut resolved];
        bases.find_all(&mut images, &self.host.image_dirs, &self.allowed, configs)?;
        // Dropped, and removed, unless the guest starts.
        let overlays = OwnOverlays::make(
            &frozen,
            &format!("{vm}-{id}"),
            &self.host.image_dirs,
            &mut config,
            &mut resolved,
        )?;
        let (vm, caller) = self.create(&vm, config)?;
        self.moving.end_is_recorded.store(false, Ordering::Release);
        let give_up = |why: Refusal| {
            self.registry
                .forget(&vm, self.origin.failure_event(), Some(why.detail.clone()));
            self.moving.end_is_recorded.store(true, Ordering::Release);
            why
        };
        // Everything is checked: the first side effect on this host.
        let images = NewImages::create(&images).map_err(give_up)?;
        let (decision, progress) = (self.moving.decision.clone(), self.moving.progress.clone());
        let parts = caller
            .attempt(move |driver| driver.expect(&decision, &progress))
            .map_err(give_up)?;
        let origin = MachineOrigin {
            cpu: Some(cpu),
            on_bus,
            owner: self.origin.owner(),
            may_wait: offer.postcopy,
            memory: self.origin.memory(files),
            tpm: None,
        };
        if let GuestOrigin::Snapshot { prefault } = self.origin {
            // For this machine only: the next one, after a reboot, is as configured.
            resolved.memory.set_prefault(prefault);
        }
        let built = self.build(vm.clone(), parts, &resolved, &origin, images);
        let mut target = built.map_err(give_up)?;
        target.overlays = overlays;
        if self.origin == GuestOrigin::Migration {
            *self.moving.vm.lock() = Some(vm.id().clone());
        }
        if let Some(accepted) = &self.accepted {
            accepted(Arc::clone(&self.moving) as _);
        }
        Ok(Box::new(target))
    }

    fn journal(&self, migration: Uuid, vm: &str) -> std::io::Result<Box<dyn Journal>> {
        let endpoint = &self.moving.endpoint;
        self.journals
            .open(migration, Side::Destination, vm, endpoint)
    }

    fn fate(&self, migration: Uuid) -> Fate {
        self.journals.fate(migration)
    }
}

struct DestinationVm {
    registry: Registry,
    vm: VmHandle,
    caller: Caller,
    ram: GuestRam,
    halter: Arc<Halter>,
    stage: Stage,
    /// The images that were made for the guest's disks.
    images: NewImages,
    origin: GuestOrigin,
    stays_paused: bool,
    moving: Arc<ActiveMigration>,
    overlays: OwnOverlays,
}

/// How far the guest is.
enum Stage {
    Coming,
    Arrived,
    /// The VM is no more.
    Gone,
}

/// Gives the TPM its state, on this thread: the driver's must not wait for the emulator.
fn install(tpm: Option<LoadedTpm>, origin: GuestOrigin) -> Result<(), Refusal> {
    let installed = tpm.map_or(Ok(()), LoadedTpm::install);
    installed.map_err(|error| origin.refusal(Refusal::new("tpm-unusable", error.to_string())))
}

impl Destination for DestinationVm {
    fn blocks(&self) -> Vec<Block> {
        self.ram.blocks()
    }

    fn disks(&self) -> Vec<DestinationDisk> {
        self.images.for_engine()
    }

    fn dry_run(&mut self, state: &[u8]) -> Result<(), Refusal> {
        let state = state.to_vec();
        let loaded = self
            .caller
            .attempt(move |driver| driver.load_dry_run(&state));
        install(loaded?, self.origin)
    }

    fn load(&mut self, state: &[u8]) -> Result<(), Refusal> {
        let state = state.to_vec();
        let loaded = self.caller.attempt(move |driver| driver.load_whole(&state));
        install(loaded?, self.origin)
    }

    fn await_blocks(&mut self, disks: &[Option<Arc<AwaitedBlocks>>]) -> Result<(), Refusal> {
        let devices = self.caller.attempt(Driver::await_blocks)?;
        self.images.await_blocks(disks, &devices)
    }

    fn blocks_arrived(&mut self) -> Result<(), Refusal> {
        self.images.blocks_arrived()?;
        // The machine may have ended: then nothing waits for this.
        let _ = self.caller.call(Driver::blocks_arrived);
        Ok(())
    }

    fn take_over(&mut self) -> Result<(), Refusal> {
        self.images.unmark()?;
        // The disks' devices lock the same files.
        self.images.release();
        let taken = self.caller.attempt(Driver::take_over);
        if taken.is_err() {
            // The driver has released whatever it took.
            self.images.take_back();
        }
        taken
    }

    fn start(&mut self, stopped_for: Duration, paused: bool) -> Result<Instant, StartFailure> {
        let as_of = Instant::now();
        let paused = paused || self.stays_paused;
        // If the driver panics, no answer comes: this says whether the guest may have run by then.
        let resuming = Arc::new(AtomicBool::new(false));
        let (mark, arrival) = (Arc::clone(&resuming), self.origin.arrival());
        let is_copy = matches!(self.origin, GuestOrigin::Snapshot { .. });
        if is_copy {
            // On this thread, which may wait for the page: it may be read on demand.
            generation::renew(self.ram.boot());
        }
        let arrived = self.caller.call(move |driver, sources| {
            if is_copy {
                driver.announce_generation(stopped_for, as_of)?;
            }
            driver.arrive(stopped_for, as_of, paused, arrival, &mark, sources)
        });
        match arrived.and_then(|arrived| arrived) {
            Ok(runs) => {
                self.images.keep();
                self.stage = Stage::Arrived;
                self.overlays.keep();
                Ok(runs)
            }
            Err(why) if resuming.load(Ordering::Acquire) => {
                // It may have written to them.
                self.images.keep();
                Err(StartFailure::MayHaveRun(why))
            }
            Err(why) => Err(StartFailure::NeverRan(why)),
        }
    }

    fn halter(&self) -> Box<dyn Fn() + Send + Sync> {
        let (halter, ram) = (Arc::clone(&self.halter), self.ram.clone());
        Box::new(move || {
            // In this order: a vCPU that is let go from a missing page would run on zeros.
            halter.halt();
            ram.lose_awaited();
        })
    }

    fn fail(&mut self, why: &Refusal) {
        (self.halter())();
        // The VM stays, and shows the reason.
        self.stage = Stage::Gone;
        let failure = Failure {
            code: why.code.clone(),
            detail: why.detail.clone(),
            vcpu: None,
        };
        let ended = self
            .caller
            .call(move |driver, sources| driver.fail_guest(failure, sources));
        if ended.is_err() {
            tracing::debug!(vm = %self.vm.id(), "the machine had ended already");
        }
    }

    fn discard(&mut self) {
        let gone = match std::mem::replace(&mut self.stage, Stage::Gone) {
            Stage::Coming => self.caller.call(Driver::give_up_expecting),
            Stage::Arrived => {
                // The driver may be waiting for a device that waits for a page: which is lost, as the
                // guest is, which must not see what is there in its place.
                self.halter.halt();
                self.ram.lose_awaited();
                self.caller.call(Driver::left)
            }
            Stage::Gone => return,
        };
        match gone {
            // Another migration may come at once, for the same disks and sockets.
            Ok(gone) => gone.wait(),
            Err(_) => tracing::debug!(
                vm = %self.vm.id(),
                "the machine of a guest that did not arrive had ended already"
            ),
        }
        // Behind the machine, which had them open. Those of a guest that ran are kept.
        drop(std::mem::take(&mut self.images));
        self.registry
            .forget(&self.vm, self.origin.failure_event(), None);
        self.moving.end_is_recorded.store(true, Ordering::Release);
    }
}
