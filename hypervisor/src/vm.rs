//! A virtual machine, as KVM has it.

use std::sync::Arc;

use kvm_bindings::{KVM_CLOCK_TSC_STABLE, KVM_PIT_SPEAKER_DUMMY, kvm_clock_data, kvm_pit_config};
use kvm_ioctls::VmFd;
use memory::SpaceKind;

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

/// Nanoseconds of a guest's kvmclock.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ClockState {
    /// Nanoseconds.
    pub nanoseconds: u64,
}

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

    /// What keeps the vCPUs out of the guest.
    #[must_use]
    pub fn gate(&self) -> &Arc<Gate> {
        &self.gate
    }

    /// A vCPU with this number, which is its APIC id.
    ///
    /// # Errors
    /// When KVM refuses, as it does for a number that is taken or too high.
    pub fn create_vcpu(&self, index: u32) -> Result<Vcpu, KvmError> {
        let fd = self
            .fd
            .create_vcpu(index.into())
            .map_err(KvmError::new(format!("create vCPU {index}")))?;
        self.slots.add_vcpu(&fd)?;
        Ok(Vcpu::new(
            fd,
            index,
            Arc::clone(&self.gate),
            Arc::clone(&self.slots),
            Arc::clone(&self.msr_indices),
        ))
    }

    /// The guest's kvmclock.
    ///
    /// # Errors
    /// When KVM does not tell.
    pub fn clock(&self) -> Result<ClockState, KvmError> {
        let data = self
            .fd
            .get_clock()
            .map_err(KvmError::new("tell a VM's clock"))?;
        Ok(ClockState {
            nanoseconds: data.clock,
        })
    }

    /// Lets the guest's kvmclock go on from here.
    ///
    /// # Errors
    /// When KVM refuses.
    pub fn set_clock(&self, clock: ClockState) -> Result<(), KvmError> {
        let data = kvm_clock_data {
            clock: clock.nanoseconds,
            ..Default::default()
        };
        debug_assert_eq!(data.flags & KVM_CLOCK_TSC_STABLE, 0);
        self.fd
            .set_clock(&data)
            .map_err(KvmError::new("set a VM's clock"))
    }
}
