//! Saving a machine, and loading it elsewhere.
//!
//! ```text
//!   Active (paused) ── save ──► sections ──► load ── Active (expecting) ── resume_after ──► running
//! ```
//!
//! A load changes the map in one transaction, whatever the number of devices and queues, and gives
//! KVM the interrupt routes once; rings are looked up when the devices resume, after the commit.
//!
//! A dry run saves and loads the same sections while the guest runs: each vCPU leaves the guest for
//! the moment that reading its state takes. Whatever the destination's host cannot take is refused
//! then, and not in the stop.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::mpsc::Receiver;
use std::time::{Duration, Instant};

use ::devices::tpm::{LoadedTpm, Tpm, TpmSnapshot};
use hypervisor::{
    ClockSample, MemSlots, NestedState, SaveClock, StateError, StoppedClock, Vcpu, VcpuState,
    VmState, core_notes,
};
use memory::{FlatRange, SpaceKind, Target};
use migration::snapshot::{Core, CoreRange};
use state::{Load as _, Save as _, Store, Writer};

use super::run_control::NotParked;
use super::{Active, GuestRam, PARK_PATIENCE};
use crate::arch::x86_64::generation;
use crate::failure::MoveError;

impl From<NotParked> for MoveError {
    fn from(late: NotParked) -> Self {
        Self::NotParked(late.to_string())
    }
}

/// How much is saved, or loaded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Extent {
    /// The state of a guest that runs, by which the destination finds out whether it can take it,
    /// and does most of the work.
    DryRun,
    /// Everything, of a paused guest.
    Whole,
}

/// The guest's clocks.
pub(crate) enum Clocks {
    /// They count.
    Running,
    /// The guest was paused here, when they had these values.
    Paused(ClockSample),
    /// They were loaded, and count from the next [`Active::resume`] on.
    Loaded {
        kvmclock_ns: Option<u64>,
        /// By the numbers of the vCPUs.
        vcpus: BTreeMap<u32, StoppedClock>,
        /// At this moment they had been stopped for so long, which they will count.
        since: Option<(Duration, Instant)>,
    },
}

impl Clocks {
    fn kvmclock_ns(&self) -> Option<u64> {
        match self {
            Self::Running => None,
            Self::Paused(sample) => sample.kvmclock_ns(),
            Self::Loaded { kvmclock_ns, .. } => *kvmclock_ns,
        }
    }

    /// The clock values that vCPU `index` is saved with, as a job for its thread.
    fn save_vcpu(
        &self,
        index: u32,
    ) -> impl FnOnce(&mut Vcpu) -> Result<SavedVcpu, StateError> + Send + use<> {
        let loaded = match self {
            Self::Loaded { vcpus, .. } => vcpus.get(&index).copied(),
            _ => None,
        };
        let sample = match self {
            Self::Paused(sample) => Some(*sample),
            _ => None,
        };
        move |vcpu: &mut Vcpu| {
            let clock = match (&loaded, &sample) {
                (Some(loaded), _) => SaveClock::Loaded(loaded),
                (None, Some(sample)) => SaveClock::At(sample),
                (None, None) => SaveClock::Now,
            };
            // First, for it is refused most often.
            let nested = vcpu.save_nested()?;
            Ok((vcpu.save(clock)?, nested))
        }
    }
}

type SavedVcpu = (VcpuState, Option<NestedState>);

impl Active {
    /// Returns the guest's memory, and the memslots that track writes to it.
    pub(crate) fn memory(&self) -> (GuestRam, Arc<MemSlots>) {
        (self.parts.ram.clone(), self.parts.vm.memslots())
    }

    /// Saves the machine, but for its RAM. For [`Extent::Whole`] it is paused. The caller has read the
    /// state of the TPM, if there is one, for which it had to wait.
    pub(crate) fn save(
        &self,
        extent: Extent,
        tpm: Option<&TpmSnapshot>,
    ) -> Result<Vec<u8>, MoveError> {
        let mut writer = Writer::default();
        // In a dry run the guest may eject a vCPU at any time. What is saved belongs to this moment.
        let cpus = self.parts.cpus.snapshot();
        let vcpus = self.on_vcpus(|index| self.clocks.save_vcpu(index));
        if extent == Extent::Whole {
            // At the same time as the vCPUs.
            let vm = self.parts.vm.save(self.clocks.kvmclock_ns())?;
            writer.scope("vm")?.put(&vm)?;
        }
        let present = |(index, _): &(u32, _)| cpus.present().contains(*index);
        for (index, state) in vcpus.into_iter().filter(present) {
            // A vCPU whose guest runs may be in a device that blocks, which is no reason to wait
            // for longer than a pause would.
            let (state, nested) = state
                .recv_timeout(PARK_PATIENCE)
                .map_err(|_| MoveError::VcpuGone)??;
            let mut scope = writer.scope(&format!("vcpus/{index}"))?;
            scope.put(&state)?;
            if let Some(nested) = nested {
                scope.child("nested")?.put(&nested)?;
            }
        }
        if let Some(serial) = &self.parts.serial {
            serial.save(&mut writer.scope("serial")?)?;
        }
        self.parts.power.save(&mut writer.scope("power")?)?;
        self.parts.hotplug.save(&mut writer.scope("hotplug")?)?;
        self.parts.clocks.save(&mut writer)?;
        // Versions that know nothing of vCPU hotplug can load a guest that did not use it.
        if cpus.is_changed() {
            cpus.save(&mut writer.scope("cpus")?)?;
        }
        if let Some(dimms) = self.dimms() {
            dimms.save(&mut writer.scope("dimms")?)?;
        }
        if let Some(tpm) = tpm {
            tpm.save(&mut writer.scope("tpm")?)?;
        }
        self.parts.devices.save(&mut writer)?;
        Ok(writer.finish())
    }

    /// Returns the registers of all vCPUs, and the RAM by its guest physical addresses. The machine is
    /// paused.
    pub(crate) fn core(&self) -> Result<Core, MoveError> {
        let mut vcpus = Vec::new();
        for (index, registers) in self.on_vcpus(|_| |vcpu: &mut Vcpu| vcpu.core_registers()) {
            let registers = registers.recv_timeout(PARK_PATIENCE);
            vcpus.push((index, registers.map_err(|_| MoveError::VcpuGone)??));
        }
        let space = self.parts.topology.lock().space(SpaceKind::Memory);
        let view = space.view();
        let range = |flat: &FlatRange| {
            // Devices have no content to dump, and a read of their registers could change them.
            let (Target::Ram(slice) | Target::Rom(slice)) = &flat.target else {
                return None;
            };
            Some(CoreRange {
                addr: flat.range.first(),
                ram: Arc::clone(&slice.block),
                offset: usize::try_from(slice.offset).ok()?,
                len: usize::try_from(flat.range.len()?).ok()?,
            })
        };
        Ok(Core {
            notes: core_notes(&vcpus),
            ranges: view.ranges().iter().filter_map(range).collect(),
        })
    }

    /// Loads what was saved. The guest does not run until [`Active::resume_after`]. May be called
    /// again: a later load replaces all of an earlier one. Returns the state of the TPM, if there is
    /// one, which the caller installs, since it has to wait for that.
    pub(crate) fn load(
        &mut self,
        saved: &[u8],
        extent: Extent,
    ) -> Result<Option<LoadedTpm>, MoveError> {
        let mut store = Store::open(saved)?;
        let load_tpm = |tpm: Arc<Tpm>| Ok::<_, MoveError>(tpm.load(&mut store.scope("tpm")?)?);
        let tpm = self.tpm().map(load_tpm).transpose()?;
        match extent {
            Extent::DryRun => {
                self.load_cpus(&mut store)?;
                let vcpus = self.dry_run_vcpus(&mut store)?;
                self.load_devices(&mut store)?;
                // Left-over sections belong to devices that this machine lacks: the guest would
                // lose them. All threads have their jobs by now, so the answers come after the
                // cheap checks.
                store.finish()?;
                for (_, vcpu) in &vcpus {
                    answer(vcpu)??;
                }
            }
            Extent::Whole => {
                // Before the vCPUs: a local APIC depends on the interrupt controllers.
                let vm: VmState = store.scope("vm")?.take()?;
                let kvmclock_ns = self.parts.vm.load(&vm)?;
                self.load_cpus(&mut store)?;
                let vcpus = self.load_vcpus(&mut store)?;
                // At the same time as the vCPUs.
                self.load_devices(&mut store)?;
                store.finish()?;
                let clocks = vcpus
                    .iter()
                    .map(|(index, vcpu)| Ok::<_, MoveError>((*index, answer(vcpu)??)));
                self.clocks = Clocks::Loaded {
                    kvmclock_ns,
                    vcpus: clocks.collect::<Result<_, _>>()?,
                    since: None,
                };
            }
        }
        Ok(tpm)
    }

    /// Loads which vCPUs are plugged, and has exactly those: the set may differ from the configuration
    /// while the guest is asked to eject some, and from that of the dry run when it has.
    fn load_cpus(&mut self, store: &mut Store<'_>) -> Result<(), MoveError> {
        (&*self.parts.cpus).load(&mut store.scope("cpus")?, &mut ())?;
        self.vcpus.dismiss_all_but(&self.parts.cpus.present());
        Ok(self.start_plugged()?)
    }

    /// Gives each vCPU the state that its guest had a moment ago. Sources before this version send
    /// none.
    fn dry_run_vcpus(
        &self,
        store: &mut Store<'_>,
    ) -> Result<OfVcpus<Result<(), StateError>>, MoveError> {
        let mut states = Vec::new();
        for (index, _) in self.vcpus.plugged() {
            let mut scope = store.scope(&format!("vcpus/{index}"))?;
            states.push(scope.take_if_there::<VcpuState>()?);
            // KVM could not load it yet: it belongs to the whole state of a vCPU.
            scope.child("nested")?.take_if_there::<NestedState>()?;
        }
        let mut states = states.into_iter();
        Ok(self.on_vcpus(|_| {
            let state = states.next().flatten();
            move |vcpu: &mut Vcpu| state.map_or(Ok(()), |state| vcpu.dry_run(&state))
        }))
    }

    fn load_vcpus(
        &self,
        store: &mut Store<'_>,
    ) -> Result<OfVcpus<Result<StoppedClock, StateError>>, MoveError> {
        let mut states = Vec::new();
        // All states are decoded before any is loaded: bad state is refused while the vCPUs are
        // still as they were.
        for (index, _) in self.vcpus.plugged() {
            let mut scope = store.scope(&format!("vcpus/{index}"))?;
            let state: VcpuState = scope.take()?;
            let nested: Option<NestedState> = scope.child("nested")?.take_if_there()?;
            states.push((state, nested));
        }
        let mut states = states.into_iter();
        Ok(self.on_vcpus(|_| {
            let state = states.next();
            move |vcpu: &mut Vcpu| match state {
                Some((state, nested)) => vcpu.load(&state, nested.as_ref()),
                None => Err(StateError::Chips),
            }
        }))
    }

    fn load_devices(&mut self, store: &mut Store<'_>) -> Result<(), MoveError> {
        if let Some(serial) = &self.parts.serial {
            (&**serial).load(&mut store.scope("serial")?, &mut ())?;
        }
        (&*self.parts.power).load(&mut store.scope("power")?, &mut ())?;
        (&*self.parts.hotplug).load(&mut store.scope("hotplug")?, &mut ())?;
        self.parts.clocks.load(store)?;
        if let Some(mut dimms) = self.dimms() {
            dimms.load(&mut store.scope("dimms")?, &mut ())?;
        }
        self.load_memory_map()?;
        // Each unmasked vector changes KVM's routing table. Held back, all changes are one ioctl,
        // which on the host costs a grace period.
        let held = self.parts.vm.irq_routes().hold();
        let devices = &mut self.parts.devices;
        let mut topology = self.parts.topology.lock();
        topology.transaction(|tx| -> Result<(), MoveError> { Ok(devices.load(store, tx)?) })?;
        drop(topology);
        Ok(held.finish()?)
    }

    /// Starts the clocks again. At the moment `as_of`, the guest had been stopped for
    /// `stopped_for`, which a loaded guest's clocks count as time that passed. A guest that was
    /// paused here finds its kvmclock as it left it.
    pub(super) fn start_clocks(
        &mut self,
        stopped_for: Duration,
        as_of: Instant,
    ) -> Result<(), MoveError> {
        match &self.clocks {
            Clocks::Running => {}
            Clocks::Paused(sample) => {
                if let Some(ns) = sample.kvmclock_ns() {
                    self.parts.vm.set_kvmclock(ns)?;
                }
            }
            Clocks::Loaded {
                kvmclock_ns,
                vcpus,
                since,
            } => {
                // A restored guest's clocks count since its snapshot, though it may be resumed late.
                let (stopped_for, as_of) = since.unwrap_or((stopped_for, as_of));
                // One sample for all clocks, so that they agree with each other.
                let now = self.parts.vm.sample_clocks();
                let since = now.taken_at().saturating_duration_since(as_of);
                let stopped_for = stopped_for.saturating_add(since);
                let started = self.on_vcpus(|index| {
                    let clock = vcpus.get(&index).copied();
                    move |vcpu: &mut Vcpu| match clock {
                        Some(clock) => vcpu.start_clock(&clock, &now, stopped_for),
                        None => Ok(()),
                    }
                });
                for (_, started) in &started {
                    answer(started)??;
                }
                // After the TSCs, which KVM derives kvmclock from.
                if let Some(ns) = kvmclock_ns {
                    let passed = stopped_for + now.taken_at().elapsed();
                    let passed = u64::try_from(passed.as_nanos()).unwrap_or(u64::MAX);
                    self.parts.vm.set_kvmclock(ns.saturating_add(passed))?;
                }
            }
        }
        self.clocks = Clocks::Running;
        Ok(())
    }

    /// Tells the guest, when it runs again, that its clocks were disturbed.
    pub(crate) fn disrupt_clocks(&self) {
        // The page before the interrupt that has the guest read it.
        generation::disrupt(self.parts.ram.boot());
        self.parts.power.announce_clock();
    }

    /// Tells a restored guest, when it runs, that it is another copy of itself. At the moment `as_of` it
    /// had been stopped for `stopped_for`, which its clocks count.
    pub(crate) fn announce_generation(&mut self, stopped_for: Duration, as_of: Instant) {
        self.parts.power.announce_generation();
        if let Clocks::Loaded { since, .. } = &mut self.clocks {
            *since = Some((stopped_for, as_of));
        }
    }

    /// Fails if the host has lost memory of the guest: in its place are zeros, with which the guest must
    /// not continue anywhere.
    pub(crate) fn check_memory(&self) -> Result<(), MoveError> {
        match self.parts.ram.first_lost() {
            None => Ok(()),
            Some(offset) => Err(MoveError::MemoryLost(offset)),
        }
    }

    /// Makes durable all that the guest wrote to its disks. The machine is paused.
    pub(crate) fn flush(&self) -> Result<(), MoveError> {
        self.check_memory()?;
        Ok(self.parts.devices.flush()?)
    }

    /// Releases what only one machine may have. The machine is paused and flushed.
    /// Devices named in `kept` keep theirs.
    pub(crate) fn hand_over(&self, kept: &[String]) {
        self.parts.devices.hand_over(kept);
    }

    /// Takes what only one machine may have. It is paused.
    pub(crate) fn take_over(&self) -> Result<(), MoveError> {
        Ok(self.parts.devices.take_over()?)
    }

    /// Has a job done on the thread of vCPU 0.
    pub(super) fn on_first_vcpu<R: Send + 'static>(
        &self,
        job: impl FnOnce(&mut Vcpu) -> R + Send + 'static,
    ) -> Result<Receiver<R>, MoveError> {
        let (_, first) = self.vcpus.plugged().next().ok_or(MoveError::VcpuGone)?;
        let answer = first.ask(job);
        self.vcpus.control.nudge();
        first.kick();
        Ok(answer)
    }

    /// Has a job done on each vCPU's own thread, in parallel. A vCPU that runs leaves the guest
    /// for it.
    fn on_vcpus<R, J>(&self, mut job: impl FnMut(u32) -> J) -> OfVcpus<R>
    where
        R: Send + 'static,
        J: FnOnce(&mut Vcpu) -> R + Send + 'static,
    {
        let vcpus = self.vcpus.plugged();
        let asked = vcpus.map(|(index, vcpu)| (index, vcpu.ask(job(index))));
        let asked = asked.collect();
        self.vcpus.control.nudge();
        self.vcpus.control.kick();
        asked
    }
}

/// The answers of vCPU threads, with the numbers of the vCPUs.
type OfVcpus<R> = Vec<(u32, Receiver<R>)>;

fn answer<R>(from: &Receiver<R>) -> Result<R, MoveError> {
    from.recv().map_err(|_| MoveError::VcpuGone)
}
