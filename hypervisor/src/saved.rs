//! Saved state of vCPUs, and of the VM's interrupt controllers, timer and clock.
//!
//! KVM's structures are its stable interface: they are kept as the bytes that KVM gives and takes.

use kvm_bindings::{
    KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, Msrs, kvm_irqchip,
    kvm_lapic_state, kvm_msr_entry, kvm_sregs,
};
use kvm_ioctls::VmFd;
use serde::{Deserialize, Serialize};
use serde_bytes::ByteBuf;
use state::Saved;
use zerocopy::{FromBytes, Immutable, IntoBytes};

use crate::clock::{IA32_TSC, IA32_TSC_DEADLINE, SaveClock, StoppedClock};
use crate::hyperv;
use crate::kvm::KvmError;
use crate::nested::NestedState;
use crate::vcpu::Vcpu;
use crate::vm::Vm;

/// State of a vCPU or a VM cannot be saved or loaded.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    /// KVM refused.
    #[error(transparent)]
    Kvm(#[from] KvmError),
    /// A saved structure has another size than KVM's.
    #[error("the saved {what} has {found} bytes; this host's KVM has {wanted}")]
    Length {
        /// The structure.
        what: &'static str,
        /// Bytes that were saved.
        found: usize,
        /// Bytes that KVM takes.
        wanted: usize,
    },
    /// The saved state has other interrupt controllers.
    #[error("the saved interrupt controllers are not the two 8259As and the I/O APIC")]
    Chips,
    /// Nested state cannot be saved.
    #[error(
        "the guest has nested virtualization enabled ({switch} is set), and this host's KVM \
         cannot save its nested state: {source}"
    )]
    Nested {
        /// The switch that is on.
        switch: &'static str,
        /// KVM's answer.
        source: std::io::Error,
    },
    /// Nested state cannot be loaded.
    #[error(
        "the guest uses nested virtualization, and this host's KVM refuses its nested state: \
         {source}"
    )]
    NestedRefused {
        /// KVM's answer.
        source: std::io::Error,
    },
    /// The guest's vCPU has another APIC id than the vCPU here.
    #[error(
        "the saved vCPU has APIC id {saved}, but the CPU topology gives it {here} on this host: \
         earlier versions numbered the vCPUs of such a topology differently"
    )]
    ApicId {
        /// The low eight bits of the saved id.
        saved: u32,
        /// The low eight bits of the id here.
        here: u32,
    },
    /// The guest uses an MSR that the host does not have.
    #[error(
        "MSR {index:#x} of the guest has the value {value:#x}, and this host does not have that MSR"
    )]
    Msr {
        /// The MSR.
        index: u32,
        /// The guest's value.
        value: u64,
    },
}

fn bytes<T: IntoBytes + Immutable>(value: &T) -> ByteBuf {
    ByteBuf::from(value.as_bytes())
}

fn whole<T: FromBytes>(bytes: &ByteBuf, what: &'static str) -> Result<T, StateError> {
    T::read_from_bytes(bytes).map_err(|_| StateError::Length {
        what,
        found: bytes.len(),
        wanted: size_of::<T>(),
    })
}

/// Saved state of a vCPU, but for nested state. Frozen as version 1.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VcpuState {
    regs: ByteBuf,
    sregs: ByteBuf,
    xsave: ByteBuf,
    xcrs: ByteBuf,
    debug_regs: ByteBuf,
    lapic: ByteBuf,
    events: ByteBuf,
    mp_state: u32,
    tsc_khz: u32,
    /// Index and value, in the order in which KVM names them.
    msrs: Vec<(u32, u64)>,
}

impl Saved for VcpuState {
    const VERSION: u16 = 1;
}

/// Saved state of interrupt controllers, timer and clock. Frozen as version 1.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VmState {
    /// Both 8259As and the I/O APIC.
    irqchips: Vec<ByteBuf>,
    pit: ByteBuf,
    /// Nanoseconds of kvmclock; absent where the host has none.
    clock: Option<u64>,
}

impl Saved for VmState {
    const VERSION: u16 = 1;
}

/// How much of a vCPU's state is loaded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Extent {
    /// Only what neither reads nor writes the guest's memory, which is still arriving.
    DryRun,
    Whole,
}

/// KVM takes 256 MSRs at once at most, and newer kernels list more.
const MSRS_AT_ONCE: usize = 128;

/// Whether KVM touches guest memory when this MSR is set: the paravirtual MSRs of KVM and Hyper-V,
/// which hold guest addresses.
fn touches_memory(index: u32) -> bool {
    matches!(index, 0x11 | 0x12 | 0x4b56_4d00..=0x4b56_4dff | 0x4000_0000..=0x4000_ffff)
}

/// Whether setting these registers makes KVM read the guest's page table: it does for the four
/// directory pointers of 32-bit PAE paging.
fn reads_page_table(sregs: &kvm_sregs) -> bool {
    const CR0_PG: u64 = 1 << 31;
    const CR4_PAE: u64 = 1 << 5;
    const EFER_LMA: u64 = 1 << 10;
    sregs.cr0 & CR0_PG != 0 && sregs.cr4 & CR4_PAE != 0 && sregs.efer & EFER_LMA == 0
}

/// The highest byte of the local APIC's id register, which has the low bits of the id in both modes of
/// the APIC.
const APIC_ID: usize = 0x23;

impl VcpuState {
    /// The same state, for a vCPU of another APIC id.
    pub(crate) fn with_apic_id(mut self, id: u32) -> Self {
        if let Some(byte) = self.lapic.get_mut(APIC_ID) {
            *byte = (id & 0xff) as u8;
        }
        self
    }

    /// The same state without this MSR.
    pub(crate) fn without_msr(mut self, index: u32) -> Self {
        self.msrs.retain(|msr| msr.0 != index);
        self
    }

    fn msr(&self, index: u32) -> Option<u64> {
        let found = self.msrs.iter().find(|msr| msr.0 == index);
        found.map(|msr| msr.1)
    }
}

impl Vcpu {
    /// Saves the vCPU's state, but for [nested state](Vcpu::save_nested).
    ///
    /// The vCPU is not in `KVM_RUN`. For a whole load, no access is unfinished
    /// ([`Vcpu::complete_access`]).
    ///
    /// # Errors
    /// Fails if KVM does not give a part of the state.
    pub fn save(&self, clock: SaveClock<'_>) -> Result<VcpuState, KvmError> {
        let failed = |what: &str| KvmError::new(format!("read a vCPU's {what}"));
        let fd = self.fd();
        // Two of these reads change what others return, so the order matters. Reading the events
        // delivers the payload of a pending exception into CR2 or DR6. Reading the MP state
        // accepts a pending INIT or SIPI, which sets CS and RIP, and resets the local APIC.
        let events = bytes(&fd.get_vcpu_events().map_err(failed("pending events"))?);
        let mp_state = fd.get_mp_state().map_err(failed("MP state"))?.mp_state;
        // KVM answers EIO on a host with an unstable TSC. 0 tells the destination that it need not
        // match the frequency.
        let tsc_khz = fd.get_tsc_khz().unwrap_or(0);
        let mut msrs = self.msrs()?;
        self.adjust_clock(&mut msrs, clock, tsc_khz)?;
        Ok(VcpuState {
            regs: bytes(&fd.get_regs().map_err(failed("registers"))?),
            sregs: bytes(&fd.get_sregs().map_err(failed("system registers"))?),
            xsave: bytes(&fd.get_xsave().map_err(failed("extended state"))?),
            xcrs: bytes(
                &fd.get_xcrs()
                    .map_err(failed("extended control registers"))?,
            ),
            debug_regs: bytes(&fd.get_debug_regs().map_err(failed("debug registers"))?),
            lapic: bytes(&fd.get_lapic().map_err(failed("local APIC"))?),
            events,
            mp_state,
            tsc_khz,
            msrs,
        })
    }

    /// Loads the state. The TSC does not count until [`Vcpu::start_clock`].
    ///
    /// # Errors
    /// Fails if a structure has the wrong size or KVM refuses a part.
    pub fn load(
        &self,
        saved: &VcpuState,
        nested: Option<&NestedState>,
    ) -> Result<StoppedClock, StateError> {
        let khz = self.load_parts(saved, nested, Extent::Whole)?;
        Ok(StoppedClock {
            tsc: saved.msr(IA32_TSC).unwrap_or(0),
            deadline: saved.msr(IA32_TSC_DEADLINE).filter(|at| *at != 0),
            khz,
        })
    }

    /// Loads the state of a running guest to find out whether this host can take it: its MSRs, its
    /// extended state, its TSC frequency. Leaves the guest's memory alone. [`Vcpu::load`] replaces
    /// all of it later.
    ///
    /// # Errors
    /// The same as those of [`Vcpu::load`].
    pub fn dry_run(&self, saved: &VcpuState) -> Result<(), StateError> {
        self.load_parts(saved, None, Extent::DryRun).map(|_| ())
    }

    /// Returns the guest's TSC frequency in kHz.
    fn load_parts(
        &self,
        saved: &VcpuState,
        nested: Option<&NestedState>,
        extent: Extent,
    ) -> Result<u32, StateError> {
        let refused = |what: &str| KvmError::new(format!("set a vCPU's {what}"));
        let fd = self.fd();
        // First: KVM scales TSC values that are set later by this frequency.
        let khz = self.load_tsc_khz(saved.tsc_khz)?;
        let mut mp_state = kvm_bindings::kvm_mp_state::default();
        mp_state.mp_state = saved.mp_state;
        fd.set_mp_state(mp_state).map_err(refused("MP state"))?;
        fd.set_regs(&whole(&saved.regs, "register block")?)
            .map_err(refused("registers"))?;
        let sregs = whole(&saved.sregs, "system register block")?;
        if extent == Extent::Whole || !reads_page_table(&sregs) {
            fd.set_sregs(&sregs).map_err(refused("system registers"))?;
        }
        if let Some(nested) = nested {
            // KVM checks nested state against the feature MSRs as well as against EFER and CR4.
            self.load_msrs(saved, is_vmx_feature)?;
            self.load_nested(nested)?;
        }
        let xsave = whole(&saved.xsave, "extended state")?;
        self.set_xsave(&xsave).map_err(refused("extended state"))?;
        fd.set_xcrs(&whole(&saved.xcrs, "extended control registers")?)
            .map_err(refused("extended control registers"))?;
        fd.set_debug_regs(&whole(&saved.debug_regs, "debug registers")?)
            .map_err(refused("debug registers"))?;
        // After the system registers: their APIC base selects xAPIC or x2APIC mode, and KVM reads
        // the id in the saved page by that mode.
        let lapic = whole(&saved.lapic, "local APIC")?;
        self.check_apic_id(&lapic)?;
        fd.set_lapic(&lapic).map_err(refused("local APIC"))?;
        self.load_msrs(saved, |index| match extent {
            Extent::Whole => true,
            Extent::DryRun => !touches_memory(index),
        })?;
        // Last: KVM_SET_REGS drops a pending exception, and KVM_SET_SREGS may queue an interrupt.
        // The saved events must have the final word.
        fd.set_vcpu_events(&whole(&saved.events, "pending events")?)
            .map_err(refused("pending events"))?;
        Ok(khz)
    }

    /// KVM would take another id, and the guest's interrupts would go astray.
    fn check_apic_id(&self, lapic: &kvm_lapic_state) -> Result<(), StateError> {
        let (saved, here) = (lapic.regs[APIC_ID].cast_unsigned(), self.apic_id() & 0xff);
        if u32::from(saved) != here {
            return Err(StateError::ApicId {
                saved: saved.into(),
                here,
            });
        }
        Ok(())
    }

    pub(crate) fn load_tsc_khz(&self, saved: u32) -> Result<u32, KvmError> {
        let khz = self.fd().get_tsc_khz().unwrap_or(0);
        if saved == 0 {
            return Ok(khz);
        }
        // Within 250 ppm, by which hardware counters differ among themselves, nothing is set.
        if khz.abs_diff(saved) > khz / 4000 {
            let attempt = format!("run a vCPU's TSC at {saved} kHz (the host's has {khz} kHz)");
            self.fd()
                .set_tsc_khz(saved)
                .map_err(KvmError::new(attempt))?;
        }
        Ok(saved)
    }

    /// Reads an MSR; `None` if the vCPU does not have it.
    pub(crate) fn msr(&self, index: u32) -> Result<Option<u64>, KvmError> {
        Ok(self.read_msrs(&[index])?.first().map(|msr| msr.1))
    }

    /// All MSRs that KVM lists and the vCPU has.
    fn msrs(&self) -> Result<Vec<(u32, u64)>, KvmError> {
        self.read_msrs(self.msr_indices())
    }

    pub(crate) fn read_msrs(&self, mut left: &[u32]) -> Result<Vec<(u32, u64)>, KvmError> {
        let mut read = Vec::with_capacity(left.len());
        while !left.is_empty() {
            let some = left.iter().take(MSRS_AT_ONCE);
            let entries: Vec<_> = some.map(|index| entry(*index, 0)).collect();
            let mut msrs = Msrs::from_entries(&entries).map_err(|_| {
                KvmError::other(
                    "list this many MSRs",
                    std::io::ErrorKind::InvalidData.into(),
                )
            })?;
            let count = self
                .fd()
                .get_msrs(&mut msrs)
                .map_err(KvmError::new("read a vCPU's MSRs"))?;
            let got = msrs.as_slice().iter().take(count);
            read.extend(got.map(|msr| (msr.index, msr.data)));
            // KVM stops at one that is listed and that this vCPU does not have.
            let skipped = usize::from(count < entries.len());
            left = left.get(count + skipped..).unwrap_or_default();
        }
        Ok(read)
    }

    /// Sets the MSRs that are wanted, but for the clock's. A host need not have one that is 0.
    fn load_msrs(&self, saved: &VcpuState, wanted: impl Fn(u32) -> bool) -> Result<(), StateError> {
        let is_clock =
            |index| matches!(index, IA32_TSC | IA32_TSC_DEADLINE) || hyperv::is_derived(index);
        let entries: Vec<_> = saved
            .msrs
            .iter()
            .filter(|(index, _)| !is_clock(*index) && wanted(*index))
            .map(|(index, data)| entry(*index, *data))
            .collect();
        let mut left = &entries[..];
        while !left.is_empty() {
            let some = left.get(..MSRS_AT_ONCE).unwrap_or(left);
            let msrs = Msrs::from_entries(some).map_err(|_| {
                KvmError::other("set this many MSRs", std::io::ErrorKind::InvalidData.into())
            })?;
            let count = self
                .fd()
                .set_msrs(&msrs)
                .map_err(KvmError::new("set a vCPU's MSRs"))?;
            // KVM stops at the first MSR that it refuses and returns how many it has set. A refused
            // 0 is skipped: it is most likely an MSR that the guest does not use.
            match some.get(count) {
                None => left = left.get(count..).unwrap_or_default(),
                Some(refused) if refused.data != 0 => {
                    return Err(StateError::Msr {
                        index: refused.index,
                        value: refused.data,
                    });
                }
                Some(_) => left = left.get(count + 1..).unwrap_or_default(),
            }
        }
        Ok(())
    }
}

/// `IA32_FEATURE_CONTROL`, and the MSRs that say what VMX can do.
fn is_vmx_feature(index: u32) -> bool {
    matches!(index, 0x3a | 0x480..=0x493)
}

fn entry(index: u32, data: u64) -> kvm_msr_entry {
    kvm_msr_entry {
        index,
        data,
        ..Default::default()
    }
}

const CHIPS: [u32; 3] = [
    KVM_IRQCHIP_PIC_MASTER,
    KVM_IRQCHIP_PIC_SLAVE,
    KVM_IRQCHIP_IOAPIC,
];

fn irqchip(fd: &VmFd, chip_id: u32) -> Result<kvm_irqchip, KvmError> {
    let mut chip = kvm_irqchip {
        chip_id,
        ..Default::default()
    };
    fd.get_irqchip(&mut chip)
        .map_err(KvmError::new("read an interrupt controller's state"))?;
    Ok(chip)
}

impl Vm {
    /// Saves interrupt controllers and timer, and the nanoseconds of kvmclock when the guest
    /// stopped. No vCPU is in `KVM_RUN`.
    ///
    /// # Errors
    /// Fails if KVM does not give a part of the state.
    pub fn save(&self, kvmclock_ns: Option<u64>) -> Result<VmState, KvmError> {
        let fd = self.fd();
        let chips = CHIPS.map(|id| irqchip(fd, id).map(|chip| bytes(&chip)));
        let pit = fd
            .get_pit2()
            .map_err(KvmError::new("read the interval timer's state"))?;
        Ok(VmState {
            irqchips: chips.into_iter().collect::<Result<_, _>>()?,
            pit: bytes(&pit),
            clock: kvmclock_ns,
        })
    }

    /// Loads the state, and returns the nanoseconds of kvmclock when the guest stopped. No vCPU is
    /// in `KVM_RUN`.
    ///
    /// # Errors
    /// Fails if a structure has the wrong size or KVM refuses a part.
    pub fn load(&self, saved: &VmState) -> Result<Option<u64>, StateError> {
        let fd = self.fd();
        if saved.irqchips.len() != CHIPS.len() {
            return Err(StateError::Chips);
        }
        for (id, raw) in CHIPS.iter().zip(&saved.irqchips) {
            let chip: kvm_irqchip = whole(raw, "interrupt controller")?;
            // KVM picks the controller by the `chip_id` in the structure. Without this check, saved
            // state that names one chip three times would leave two others untouched.
            if chip.chip_id != *id {
                return Err(StateError::Chips);
            }
            fd.set_irqchip(&chip)
                .map_err(KvmError::new("set an interrupt controller's state"))?;
        }
        // After the controllers: KVM_SET_PIT2 restarts the timer of channel 0. If it fires early,
        // its interrupt must not be overwritten by the load of the I/O APIC.
        let pit = whole(&saved.pit, "interval timer")?;
        fd.set_pit2(&pit)
            .map_err(KvmError::new("set the interval timer's state"))?;
        Ok(saved.clock)
    }
}

#[cfg(test)]
mod tests;
