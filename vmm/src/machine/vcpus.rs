//! The vCPUs of a machine: those that are plugged, and those that were and may be plugged again.
//!
//! ```text
//!            make (KVM_CREATE_VCPU)            plug: a thread starts
//!   nothing ───────────────────────► spare ──────────────────────────► plugged
//!                                      ▲                                  │ the guest ejects it:
//!                                      │ its thread has ended,            │ its thread is to end
//!                                      │ its state is that after reset    ▼
//!                                      └────────────────────────────── dismissed
//! ```
//!
//! KVM creates a vCPU when it is first plugged, as most VMs have room for many that they never get.
//! It cannot destroy one: an ejected vCPU stays as a spare. Before it is plugged again, it gets the
//! state that a vCPU has after reset, so that nothing is left of what the guest did with it. Its
//! thread need not have ended by then, only by the time it is plugged again.

use std::collections::BTreeMap;
use std::sync::Arc;

use devices::cpus::CpuSet;
use devices::sandbox::Confinement;
use hypervisor::{ClockSample, ResetState, StoppedClock, Vcpu, Vm};
use memory::Topology;
use spec::{CpuAffinity, CpuProfile, CpuTopology, CpusConfig};

use super::core_sharing::CoreSharing;
use super::run_control::RunControl;
use super::vcpu::{HostShare, VcpuThread};
use crate::arch::x86_64::cpu::{self, CpuError};
use crate::arch::x86_64::cpu_model::CpuModel;
use crate::guest_event::Reporter;

/// How vCPUs of this machine are made, at any time.
pub(crate) struct Recipe {
    /// From this host, or from the host where the guest booted.
    model: CpuModel,
    /// The part of the MSR that the guest's profile shows; `None` without a profile.
    arch_capabilities: Option<u64>,
    topology: CpuTopology,
    phys_bits: u8,
    has_hyperv: bool,
    affinity: Vec<CpuAffinity>,
    cores: CoreSharing,
    confinement: Confinement,
    reporter: Reporter,
}

impl Recipe {
    pub(super) fn new(
        model: CpuModel,
        config: &CpusConfig,
        phys_bits: u8,
        cores: CoreSharing,
        confinement: Confinement,
        reporter: &Reporter,
    ) -> Self {
        let limited = config.profile != CpuProfile::Host;
        Self {
            arch_capabilities: model.visible_arch_capabilities().filter(|_| limited),
            model,
            topology: config.arrangement(),
            phys_bits,
            has_hyperv: config.kvm_hyperv,
            affinity: config.affinity.clone().unwrap_or_default(),
            cores,
            confinement,
            reporter: reporter.clone(),
        }
    }

    /// Makes a vCPU, with the state that it has after reset.
    fn make(&self, vm: &Vm, index: u32) -> Result<Vcpu, CpuError> {
        // The id at creation: KVM sets the local APIC's register by it, and CPUID and ACPI must
        // show the same.
        let apic_id = self.topology.apic_id(index);
        let apic_id = apic_id.ok_or(CpuError::NoApicId(index))?;
        let mut vcpu = vm.create_vcpu(index, apic_id)?;
        if self.has_hyperv {
            vcpu.enable_hyperv()?;
        }
        let cpuid = cpu::cpuid(&self.model.cpuid, &self.topology, apic_id, self.phys_bits)?;
        // KVM derives from CPUID which MSRs exist, so CPUID comes before them. It cannot change
        // after the first KVM_RUN.
        vcpu.set_cpuid(&cpuid)?;
        cpu::set_up(&vcpu, self.arch_capabilities)?;
        Ok(vcpu)
    }

    fn host_share(&self, index: u32) -> HostShare {
        let mut affinity = self.affinity.iter();
        let found = affinity.find(|affinity| affinity.vcpu == index);
        HostShare {
            cpus: found.map(|affinity| affinity.host_cpus.clone()),
            cores: self.cores.clone(),
        }
    }
}

/// A vCPU without a thread.
struct Spare {
    vcpu: Vcpu,
    /// The vCPU has the state that its guest left in it.
    is_used: bool,
}

/// How the TSCs of a machine's vCPUs count, for one that comes later.
pub(super) struct ClockToFollow {
    /// The TSC of vCPU 0.
    pub(super) clock: StoppedClock,
    /// The moment to which it belongs; `None` if the clocks were loaded and do not count yet.
    pub(super) at: Option<ClockSample>,
}

/// The vCPUs of a machine.
pub(crate) struct Vcpus {
    recipe: Recipe,
    pub(super) control: Arc<RunControl>,
    plugged: BTreeMap<u32, VcpuThread>,
    /// Ejected: their threads end, or have ended.
    dismissed: BTreeMap<u32, VcpuThread>,
    spare: BTreeMap<u32, Spare>,
    /// The state after reset, from the first vCPU that was made and is not the boot vCPU.
    reset: Option<ResetState>,
}

impl Vcpus {
    /// Makes the first `count` vCPUs. None has a thread.
    pub(super) fn make(
        recipe: Recipe,
        control: Arc<RunControl>,
        vm: &Vm,
        count: u32,
    ) -> Result<Self, CpuError> {
        let mut vcpus = Self {
            recipe,
            control,
            plugged: BTreeMap::new(),
            dismissed: BTreeMap::new(),
            spare: BTreeMap::new(),
            reset: None,
        };
        for index in 0..count {
            vcpus.make_one(vm, index)?;
        }
        Ok(vcpus)
    }

    /// Makes a vCPU that was never plugged.
    fn make_one(&mut self, vm: &Vm, index: u32) -> Result<(), CpuError> {
        let vcpu = self.recipe.make(vm, index)?;
        // vCPU 0 is the boot processor, and runnable after reset. All others wait for INIT and SIPI
        // (Intel SDM volume 3A, "Multiple-Processor Initialization"): their state fits any of them.
        if index > 0 && self.reset.is_none() {
            self.reset = Some(vcpu.reset_state()?);
        }
        let is_used = false;
        self.spare.insert(index, Spare { vcpu, is_used });
        Ok(())
    }

    /// The CPU that the guest sees.
    pub(crate) fn model(&self) -> &CpuModel {
        &self.recipe.model
    }

    /// The vCPU 0 of a machine that is to boot.
    pub(super) fn boot_vcpu(&self) -> Option<&Vcpu> {
        self.spare.get(&0).map(|spare| &spare.vcpu)
    }

    /// Starts threads for these vCPUs, which park; those that have one keep it. After an error some
    /// may have been started. Waits for the threads of those that were ejected a moment ago.
    pub(super) fn plug(
        &mut self,
        vm: &Vm,
        topology: &Topology,
        wanted: impl Iterator<Item = u32>,
        follow: Option<&ClockToFollow>,
    ) -> Result<(), CpuError> {
        for index in wanted {
            if self.plugged.contains_key(&index) {
                continue;
            }
            if let Some(thread) = self.dismissed.remove(&index) {
                // The thread was dismissed and kicked: this takes the time of one exit.
                let vcpu = thread.join().ok_or(CpuError::ThreadFailed(index))?;
                let is_used = true;
                self.spare.insert(index, Spare { vcpu, is_used });
            }
            if !self.spare.contains_key(&index) {
                self.make_one(vm, index)?;
            }
            if let Some(spare) = self.spare.get_mut(&index) {
                // While the vCPU is still in the list: after an error it is not lost, and may be
                // tried again.
                spare.prepare(self.reset.as_ref(), follow)?;
            }
            if let Some(spare) = self.spare.remove(&index) {
                self.start(spare.vcpu, topology)?;
            }
        }
        Ok(())
    }

    fn start(&mut self, vcpu: Vcpu, topology: &Topology) -> Result<(), CpuError> {
        let (index, recipe) = (vcpu.index(), &self.recipe);
        let started = VcpuThread::start(
            vcpu,
            topology,
            &self.control,
            recipe.reporter.clone(),
            recipe.host_share(index),
            recipe.confinement,
        );
        match started {
            Ok(thread) => {
                self.plugged.insert(index, thread);
                Ok(())
            }
            Err((vcpu, error)) => {
                let is_used = false;
                let spare = vcpu.map(|vcpu| (index, Spare { vcpu, is_used }));
                self.spare.extend(spare);
                Err(CpuError::Thread(error))
            }
        }
    }

    /// Has the threads of plugged vCPUs end that are not in `present`. Does not wait for them.
    pub(super) fn dismiss_all_but(&mut self, present: &CpuSet) {
        let plugged = std::mem::take(&mut self.plugged);
        let (stay, go) = plugged
            .into_iter()
            .partition(|(index, _)| present.contains(*index));
        self.plugged = stay;
        let go: BTreeMap<u32, VcpuThread> = go;
        // A guest that ejects a vCPU has taken it offline: what it would still execute does not count.
        go.values().for_each(|thread| thread.dismiss(&self.control));
        self.dismissed.extend(go);
    }

    /// The plugged vCPUs.
    pub(crate) fn plugged(&self) -> impl Iterator<Item = (u32, &VcpuThread)> {
        self.plugged.iter().map(|(index, vcpu)| (*index, vcpu))
    }

    /// Waits for the ends of all threads, which must be wanted.
    pub(super) fn join(&mut self) {
        let (plugged, dismissed) = (
            std::mem::take(&mut self.plugged),
            std::mem::take(&mut self.dismissed),
        );
        for thread in plugged.into_values().chain(dismissed.into_values()) {
            drop(thread.join());
        }
    }
}

impl Spare {
    /// Makes the vCPU ready for its first instruction.
    fn prepare(
        &mut self,
        reset: Option<&ResetState>,
        follow: Option<&ClockToFollow>,
    ) -> Result<(), CpuError> {
        if self.is_used
            && let Some(reset) = reset
        {
            self.vcpu.reset(reset)?;
            self.is_used = false;
        }
        if let Some(ClockToFollow { clock, at }) = follow {
            self.vcpu.follow_clock(clock, at.as_ref())?;
        }
        Ok(())
    }
}
