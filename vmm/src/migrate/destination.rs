//! The destination's VM, as the migration engine sees it.

use std::fs::File;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use control::Registry;
use devices::host_file::{FileKind, Request};
use memory::RamBlock;
use migration::{
    Block, Destination, Fate, FileJournal, Host, Journal, Offer, Refusal, Side, StartFailure, Step,
};
use spec::{VmConfig, VmId};
use uuid::Uuid;

use super::{ActiveMigration, Journals, MachineOffer, OFFER_VERSION, RAM, cpuid};
use crate::arch::x86_64::features;
use crate::devices::{MachineOrigin, ResourceOwner, slots};
use crate::driver::{Arrival, Caller, Consoles, Driver};
use crate::failure::{self, BuildError};
use crate::machine::{Built, Halter, Machine};
use crate::paths;
use crate::pool::Callers;

/// Makes a VM for the guest that comes.
pub(super) struct DestinationHost {
    registry: Registry,
    callers: Callers,
    journals: Journals,
    moving: Arc<ActiveMigration>,
    /// The name that the VM gets here; the one that it has at the source when absent.
    name: Option<VmId>,
}

impl DestinationHost {
    pub(super) fn new(
        registry: Registry,
        callers: Callers,
        journals: Journals,
        moving: Arc<ActiveMigration>,
    ) -> Self {
        let name = moving.vm.lock().clone();
        Self {
            registry,
            callers,
            journals,
            moving,
            name,
        }
    }

    fn create(&self, vm: &VmId, config: VmConfig) -> Result<Caller, Refusal> {
        let created = self.registry.create(Some(vm.clone()), config);
        created.map_err(|error| {
            let mut detail = error.detail;
            for field in &error.fields {
                detail = format!("{detail}; {}: {}", field.pointer, field.detail);
            }
            Refusal::new(error.code, detail)
        })?;
        let gone = || Refusal::new("machine-gone", "the VM is gone");
        self.callers.get(vm).ok_or_else(gone)
    }
}

/// What the guest would need to start anew is there.
fn payload_is_there(config: &VmConfig) -> Result<(), Refusal> {
    let payload = &config.payload;
    let files = [
        ("kernel", &payload.kernel),
        ("firmware", &payload.firmware),
        ("initramfs", &payload.initramfs),
    ];
    for (what, path) in files {
        if let Some(path) = path
            && let Err(error) = Request::read(Path::new(path), &[FileKind::Regular]).open()
        {
            let detail = format!(
                "the guest's {what} {path} cannot be opened at the destination, so that it could not be rebooted: {error}"
            );
            return Err(Refusal::new("payload-missing", detail));
        }
    }
    Ok(())
}

/// The host has room for the guest's memory. Huge pages are reserved when the machine is made.
fn memory_is_there(config: &VmConfig) -> Result<(), Refusal> {
    if config.memory.hugepages {
        return Ok(());
    }
    let told = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    // KiB.
    let field = |name: &str| -> Option<u64> {
        let line = told.lines().find_map(|line| line.strip_prefix(name))?;
        line.split_whitespace().next()?.parse().ok()
    };
    // A host that does not tell is not in the way.
    let Some(available) = field("MemAvailable:") else {
        return Ok(());
    };
    let available = available.saturating_add(field("SwapFree:").unwrap_or(0)) << 10;
    if config.memory.size > available {
        let detail = format!(
            "the guest has {} MiB of memory, and the destination has {} MiB to give",
            config.memory.size >> 20,
            available >> 20
        );
        return Err(Refusal::new("memory-short", detail));
    }
    Ok(())
}

impl Host for DestinationHost {
    fn prepare(
        &self,
        _: Uuid,
        offer: &Offer,
        files: Vec<File>,
    ) -> Result<Box<dyn Destination>, Refusal> {
        let unreadable = |why: String| Refusal::new("offer-unreadable", why);
        let machine: MachineOffer = serde_json::from_slice(&offer.machine).map_err(|error| {
            unreadable(format!("the offer of a machine cannot be read: {error}"))
        })?;
        if machine.version != OFFER_VERSION {
            return Err(unreadable(
                "the offer of a machine is of another version".to_owned(),
            ));
        }
        let wanted = cpuid(&machine.cpuid)
            .ok_or_else(|| unreadable("the CPUs have too many CPUID leaves".to_owned()))?;
        let on_bus = slots::from_offer(&machine.config, &machine.places)
            .map_err(|error| unreadable(error.to_string()))?;
        payload_is_there(&machine.config)?;
        if !offer.given {
            memory_is_there(&machine.config)?;
        }
        // Not the name in the report: that may be of an offer that came before, and to nothing.
        let vm = match self.name.clone() {
            Some(vm) => vm,
            None => offer
                .vm
                .parse::<VmId>()
                .map_err(|error| unreadable(error.to_string()))?,
        };
        let size = machine.config.memory.size;
        if offer.blocks.len() != 1 || offer.blocks.iter().any(|block| block.size != size) {
            let why = "the memory is not what the configuration says";
            return Err(unreadable(why.to_owned()));
        }
        let caller = self.create(&vm, machine.config)?;
        let give_up = |why: Refusal| {
            self.registry
                .forget(&vm, "migration-failed", Some(why.detail.clone()));
            why
        };
        let (decision, progress) = (self.moving.decision.clone(), self.moving.progress.clone());
        let arrival = caller
            .attempt(move |driver| driver.expect(&decision, &progress))
            .map_err(give_up)?;
        let origin = MachineOrigin {
            cpuid: Some(wanted),
            on_bus,
            owner: ResourceOwner::Source,
            may_wait: offer.postcopy,
            memory: files.into_iter().next().map(Arc::new),
        };
        let built = DestinationVm::build(&self.registry, vm.clone(), arrival, &origin);
        let target = built.map_err(give_up)?;
        *self.moving.vm.lock() = Some(vm);
        Ok(Box::new(target))
    }

    fn journal(&self, migration: Uuid, vm: &str) -> std::io::Result<Box<dyn Journal>> {
        self.journals.open(migration, Side::Destination, vm)
    }

    fn fate(&self, migration: Uuid) -> Fate {
        // A migration that is in progress, at another endpoint of this service, has no outcome yet: its
        // last step is no answer. Looked at first, because a session may end at any time.
        if self.journals.is_in_use(migration, Side::Destination) {
            return Fate::Unknown;
        }
        let Ok(listed) = self.journals.list() else {
            return Fate::Unknown;
        };
        let found = listed
            .into_iter()
            .find(|(id, side, _)| (*id, *side) == (migration, Side::Destination));
        match found {
            None => Fate::Unknown,
            // It may have been about to run, and could not.
            Some((_, _, steps)) if steps.last().is_some_and(|last| last.step == Step::Running) => {
                Fate::Ran
            }
            // What was written last may not have reached the disk.
            Some((_, _, steps)) if FileJournal::is_of_an_earlier_boot(&steps) => Fate::Unknown,
            Some(_) => Fate::NeverRan,
        }
    }
}

struct DestinationVm {
    registry: Registry,
    vm: VmId,
    caller: Caller,
    ram: Arc<RamBlock>,
    halter: Halter,
    stage: Stage,
}

/// How far the guest is.
enum Stage {
    Coming,
    Arrived,
    /// The VM is no more.
    Gone,
}

impl DestinationVm {
    fn build(
        registry: &Registry,
        vm: VmId,
        arrival: Arrival,
        origin: &MachineOrigin,
    ) -> Result<Self, Refusal> {
        let Arrival {
            caller,
            host,
            config,
            reporter,
        } = arrival;
        let wanted = origin.cpuid.as_ref();
        let lacking = wanted.map(|wanted| features::lacking(&host.cpuid, wanted));
        if let Some(lacking) = lacking.filter(|lacking| !lacking.is_empty()) {
            let detail = format!(
                "the CPUs of the destination lack what the guest uses: {}",
                lacking.join(", ")
            );
            return Err(Refusal::new("cpu-lacks-features", detail));
        }
        let build = || -> Result<_, BuildError> {
            paths::check(&config)?;
            let consoles = Consoles::open_next(&config, host.terminal)?;
            let built = Built::new(&host, &config, consoles.outputs(), origin, &reporter)?;
            Ok((built.expect_guest(&config, &reporter)?, consoles))
        };
        let (active, consoles) = build().map_err(|error| {
            let told = failure::told(&error);
            Refusal::new(told.code, format!("at the destination: {}", told.detail))
        })?;
        let (ram, _) = active.memory();
        let halter = active.halter();
        let machine = Machine::new(active, &host.background);
        caller.call(move |driver, _| driver.provide(machine, consoles))?;
        Ok(Self {
            registry: registry.clone(),
            vm,
            caller,
            ram,
            halter,
            stage: Stage::Coming,
        })
    }
}

impl Destination for DestinationVm {
    fn blocks(&self) -> Vec<Block> {
        vec![Block {
            name: RAM.to_owned(),
            ram: Arc::clone(&self.ram),
        }]
    }

    fn dry_run(&mut self, state: &[u8]) -> Result<(), Refusal> {
        let state = state.to_vec();
        self.caller
            .attempt(move |driver| driver.load_dry_run(&state))
    }

    fn load(&mut self, state: &[u8]) -> Result<(), Refusal> {
        let state = state.to_vec();
        self.caller.attempt(move |driver| driver.load_whole(&state))
    }

    fn take_over(&mut self) -> Result<(), Refusal> {
        self.caller.attempt(Driver::take_over)
    }

    fn start(&mut self, stopped_for: Duration, paused: bool) -> Result<Instant, StartFailure> {
        let as_of = Instant::now();
        // If the driver panics, no answer comes: this says whether the guest may have run by then.
        let resuming = Arc::new(AtomicBool::new(false));
        let mark = Arc::clone(&resuming);
        let arrived = self
            .caller
            .call(move |driver, sources| driver.arrive(stopped_for, as_of, paused, &mark, sources));
        match arrived.and_then(|arrived| arrived) {
            Ok(runs) => {
                self.stage = Stage::Arrived;
                Ok(runs)
            }
            Err(why) if resuming.load(Ordering::Acquire) => Err(StartFailure::MayHaveRun(why)),
            Err(why) => Err(StartFailure::NeverRan(why)),
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
                vm = self.vm.as_str(),
                "the machine of a guest that did not come was gone already"
            ),
        }
        self.registry.forget(&self.vm, "migration-failed", None);
    }
}
