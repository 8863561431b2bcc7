//! A virtual machine, as KVM has it.

use std::sync::Arc;
use std::time::{Duration, Instant};

use kvm_bindings::{KVM_CLOCK_HOST_TSC, KVM_PIT_SPEAKER_DUMMY, kvm_clock_data, kvm_pit_config};
use kvm_ioctls::VmFd;
use memory::SpaceKind;

use crate::clock::{ClockSample, host_tsc};
use crate::dirty::{DirtyBackend, Tracking};
use crate::gate::Gate;
use crate::ioevent::IoEventFds;
use crate::irq::IrqRoutes;
use crate::kick;
use crate::kvm::{Capabilities, KvmError};
use crate::slots::MemSlots;
use crate::vcpu::Vcpu;

/// Four pages that KVM needs on some Intel CPUs, in the guest's addresses where firmware would
/// be: page tables for real mode, and three for a TSS.
const IDENTITY_MAP: u64 = 0xfffb_c000;
const TSS: usize = 0xfffb_d000;

/// A VM with its in-kernel interrupt controllers and timer.
#[derive(Debug)]
pub struct Vm {
    fd: Arc<VmFd>,
    gate: Arc<Gate>,
    slots: Arc<MemSlots>,
    routes: IrqRoutes,
    msr_indices: Arc<[u32]>,
}

impl Vm {
    pub(crate) fn new(
        fd: VmFd,
        msr_indices: Arc<[u32]>,
        capabilities: Capabilities,
        dirty: DirtyBackend,
    ) -> Result<Self, KvmError> {
        kick::install_handler()?;
        // KVM accepts the identity map, the interrupt controllers and the ring size only while the
        // VM has no vCPUs, so all of them are set up here and not on demand.
        fd.set_identity_map_address(IDENTITY_MAP)
            .map_err(KvmError::new("place its identity map"))?;
        fd.set_tss_address(TSS)
            .map_err(KvmError::new("place its TSS"))?;
        fd.create_irq_chip()
            .map_err(KvmError::new("create the interrupt controllers"))?;
        let pit = kvm_pit_config {
            flags: KVM_PIT_SPEAKER_DUMMY,
            ..Default::default()
        };
        fd.create_pit2(pit)
            .map_err(KvmError::new("create the interval timer"))?;
        let (fd, gate) = (Arc::new(fd), Arc::new(Gate::default()));
        let tracking = Tracking::enable(&fd, dirty, &capabilities)?;
        let slots = Arc::new(MemSlots::new(
            Arc::clone(&fd),
            Arc::clone(&gate),
            capabilities,
            tracking,
        ));
        // After the controllers: KVM refuses routes without them.
        let routes = IrqRoutes::new(Arc::clone(&fd))?;
        Ok(Self {
            fd,
            gate,
            slots,
            routes,
            msr_indices,
        })
    }

    pub(crate) fn fd(&self) -> &VmFd {
        &self.fd
    }

    /// The listener that gives the guest its RAM.
    #[must_use]
    pub fn memslots(&self) -> Arc<MemSlots> {
        Arc::clone(&self.slots)
    }

    /// The listener for the doorbells of one space.
    #[must_use]
    pub fn ioeventfds(&self, space: SpaceKind) -> Arc<IoEventFds> {
        Arc::new(IoEventFds::new(Arc::clone(&self.fd), space))
    }

    /// The VM's interrupt routes, all pins of the I/O APIC at first.
    #[must_use]
    pub fn irq_routes(&self) -> &IrqRoutes {
        &self.routes
    }

    /// Returns the gate that keeps vCPUs out of the guest.
    #[must_use]
    pub fn gate(&self) -> &Arc<Gate> {
        &self.gate
    }

    /// Creates the vCPU with this number among the VM's vCPUs. Its APIC id, by which interrupts
    /// reach it, depends on the CPU topology.
    ///
    /// # Errors
    /// Fails if KVM refuses, as it does for an APIC id that is taken or too high.
    pub fn create_vcpu(&self, index: u32, apic_id: u32) -> Result<Vcpu, KvmError> {
        // KVM takes the vCPU id as the initial APIC id, so the ioctl gets the APIC id and not the
        // index.
        let fd = self
            .fd
            .create_vcpu(apic_id.into())
            .map_err(KvmError::new(format!(
                "create vCPU {index} (APIC id {apic_id})"
            )))?;
        self.slots.add_vcpu(&fd)?;
        Ok(Vcpu::new(
            fd,
            (index, apic_id),
            Arc::clone(&self.gate),
            Arc::clone(&self.slots),
            Arc::clone(&self.msr_indices),
        ))
    }

    /// Reads the guest's and the host's clocks in one moment.
    #[must_use]
    pub fn sample_clocks(&self) -> ClockSample {
        // A thread that loses its CPU between the reads makes them disagree. Of a few attempts the
        // shortest is the one that was not interrupted.
        let (mut shortest, mut sample) = self.sample_once();
        for (took, other) in [self.sample_once(), self.sample_once()] {
            if took < shortest {
                (shortest, sample) = (took, other);
            }
        }
        sample
    }

    fn sample_once(&self) -> (Duration, ClockSample) {
        let taken_at = Instant::now();
        let tsc = host_tsc();
        let clock = self.fd.get_clock().ok();
        let took = taken_at.elapsed();
        // KVM says at which TSC it read kvmclock, where it derives kvmclock from the TSC.
        let with_tsc = clock.filter(|clock| clock.flags & KVM_CLOCK_HOST_TSC != 0);
        let sample = ClockSample {
            kvmclock_ns: clock.map(|clock| clock.clock),
            host_tsc: with_tsc.map_or(tsc, |clock| clock.host_tsc),
            taken_at,
        };
        (took, sample)
    }

    /// Sets the guest's kvmclock, in nanoseconds.
    ///
    /// # Errors
    /// Fails if KVM refuses.
    pub fn set_kvmclock(&self, nanoseconds: u64) -> Result<(), KvmError> {
        // No flags: with KVM_CLOCK_REALTIME KVM would add the time since a given wall-clock moment.
        // The caller has already decided how much of the stop counts.
        let data = kvm_clock_data {
            clock: nanoseconds,
            ..Default::default()
        };
        self.fd
            .set_clock(&data)
            .map_err(KvmError::new("set a VM's clock"))
    }
}
