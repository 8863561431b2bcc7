//! What is saved of vCPUs and of the VM's interrupt controllers, timer and clock.
//!
//! KVM's structures are its stable interface: they are kept as the bytes that KVM gives and takes.

use kvm_bindings::{
    KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, Msrs, kvm_irqchip,
    kvm_msr_entry,
};
use kvm_ioctls::VmFd;
use serde::{Deserialize, Serialize};
use serde_bytes::ByteBuf;
use state::Saved;
use zerocopy::{FromBytes, Immutable, IntoBytes};

use crate::kvm::KvmError;
use crate::vcpu::Vcpu;
use crate::vm::{ClockState, Vm};

const IA32_TSC: u32 = 0x10;
const IA32_TSC_DEADLINE: u32 = 0x6e0;

/// What was saved of a vCPU or a VM cannot be loaded.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    /// KVM refused.
    #[error(transparent)]
    Kvm(#[from] KvmError),
    /// It makes no sense.
    #[error("{what} of {found} bytes was saved, and it has {wanted}")]
    Length {
        /// Of what.
        what: &'static str,
        /// Bytes that were saved.
        found: usize,
        /// Bytes that it has.
        wanted: usize,
    },
    /// It makes no sense.
    #[error("the saved interrupt controllers are not the three that there are")]
    Chips,
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

/// All that a guest has in a vCPU: what is saved, frozen as version 1.
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

/// Interrupt controllers, timer and clock: what is saved, frozen as version 1.
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

/// The clock of a vCPU that was loaded, which stands until [`Vcpu::start_clock`].
#[derive(Clone, Copy, Debug)]
pub struct StandingClock {
    tsc: u64,
    deadline: Option<u64>,
    khz: u32,
}

impl Vcpu {
    /// Saves all that the guest has in this vCPU. It is not in `KVM_RUN`, and no access of it is
    /// unfinished ([`Vcpu::complete_access`]).
    ///
    /// # Errors
    /// When KVM does not tell.
    pub fn save(&self) -> Result<VcpuState, KvmError> {
        let told = |what: &str| KvmError::new(format!("tell a vCPU's {what}"));
        let fd = self.fd();
        // First: reading it settles events that are pending in it.
        let mp_state = fd.get_mp_state().map_err(told("state"))?.mp_state;
        Ok(VcpuState {
            regs: bytes(&fd.get_regs().map_err(told("registers"))?),
            sregs: bytes(&fd.get_sregs().map_err(told("system registers"))?),
            xsave: bytes(&fd.get_xsave().map_err(told("extended state"))?),
            xcrs: bytes(&fd.get_xcrs().map_err(told("extended control registers"))?),
            debug_regs: bytes(&fd.get_debug_regs().map_err(told("debug registers"))?),
            lapic: bytes(&fd.get_lapic().map_err(told("local APIC"))?),
            events: bytes(&fd.get_vcpu_events().map_err(told("pending events"))?),
            mp_state,
            tsc_khz: fd.get_tsc_khz().unwrap_or(0),
            msrs: self.msrs()?,
        })
    }

    /// Goes on from what was saved. The clock stands.
    ///
    /// # Errors
    /// When what was saved makes no sense, or KVM refuses it.
    pub fn load(&self, saved: &VcpuState) -> Result<StandingClock, StateError> {
        let take = |what: &str| KvmError::new(format!("take a vCPU's {what}"));
        let fd = self.fd();
        let khz = fd.get_tsc_khz().unwrap_or(0);
        if saved.tsc_khz != 0 && khz.abs_diff(saved.tsc_khz) > khz / 4000 {
            // Beyond 250 ppm, which is what hardware counters differ among themselves.
            fd.set_tsc_khz(saved.tsc_khz)
                .map_err(take("TSC frequency, which this host does not have"))?;
        }
        let mut mp_state = kvm_bindings::kvm_mp_state::default();
        mp_state.mp_state = saved.mp_state;
        fd.set_mp_state(mp_state).map_err(take("state"))?;
        fd.set_regs(&whole(&saved.regs, "register block")?)
            .map_err(take("registers"))?;
        fd.set_sregs(&whole(&saved.sregs, "system register block")?)
            .map_err(take("system registers"))?;
        let xsave = whole(&saved.xsave, "extended state")?;
        self.set_xsave(&xsave).map_err(take("extended state"))?;
        fd.set_xcrs(&whole(&saved.xcrs, "extended control registers")?)
            .map_err(take("extended control registers"))?;
        fd.set_debug_regs(&whole(&saved.debug_regs, "debug registers")?)
            .map_err(take("debug registers"))?;
        fd.set_lapic(&whole(&saved.lapic, "local APIC")?)
            .map_err(take("local APIC"))?;
        let is_clock = |(index, _): &&(u32, u64)| matches!(*index, IA32_TSC | IA32_TSC_DEADLINE);
        let entries: Vec<_> = saved
            .msrs
            .iter()
            .filter(|msr| !is_clock(msr))
            .map(|(index, data)| entry(*index, *data))
            .collect();
        self.load_msrs(&entries)?;
        fd.set_vcpu_events(&whole(&saved.events, "pending events")?)
            .map_err(take("pending events"))?;
        let value = |index| {
            saved
                .msrs
                .iter()
                .find(|msr| msr.0 == index)
                .map(|msr| msr.1)
        };
        Ok(StandingClock {
            tsc: value(IA32_TSC).unwrap_or(0),
            deadline: value(IA32_TSC_DEADLINE).filter(|deadline| *deadline != 0),
            khz: if saved.tsc_khz == 0 {
                khz
            } else {
                saved.tsc_khz
            },
        })
    }

    /// Lets the vCPU's TSC go on: from where it was, and so many nanoseconds later.
    ///
    /// # Errors
    /// When KVM refuses.
    pub fn start_clock(&self, clock: &StandingClock, stood_for_ns: u64) -> Result<(), KvmError> {
        let ticks = u128::from(stood_for_ns) * u128::from(clock.khz) / 1_000_000;
        let tsc = clock.tsc.wrapping_add(u64::try_from(ticks).unwrap_or(0));
        let mut entries = vec![entry(IA32_TSC, tsc)];
        // Behind the TSC, by which the timer is set.
        entries.extend(clock.deadline.map(|at| entry(IA32_TSC_DEADLINE, at)));
        self.set_msrs(&entries)
    }

    /// All MSRs that KVM lists and can tell.
    fn msrs(&self) -> Result<Vec<(u32, u64)>, KvmError> {
        let mut left: &[u32] = self.msr_indices();
        let mut told = Vec::with_capacity(left.len());
        while !left.is_empty() {
            let entries: Vec<_> = left.iter().map(|index| entry(*index, 0)).collect();
            let mut msrs = Msrs::from_entries(&entries).map_err(|_| {
                KvmError::other("list so many MSRs", std::io::ErrorKind::InvalidData.into())
            })?;
            let count = self
                .fd()
                .get_msrs(&mut msrs)
                .map_err(KvmError::new("tell a vCPU's MSRs"))?;
            let got = msrs.as_slice().iter().take(count);
            told.extend(got.map(|msr| (msr.index, msr.data)));
            // One that is listed and that this vCPU does not have.
            left = left.get(count + 1..).unwrap_or_default();
        }
        Ok(told)
    }

    /// Sets MSRs. One that this host does not have may be left out where it says nothing.
    fn load_msrs(&self, entries: &[kvm_msr_entry]) -> Result<(), KvmError> {
        let mut left = entries;
        while !left.is_empty() {
            let msrs = Msrs::from_entries(left).map_err(|_| {
                KvmError::other("take so many MSRs", std::io::ErrorKind::InvalidData.into())
            })?;
            let count = self
                .fd()
                .set_msrs(&msrs)
                .map_err(KvmError::new("take a vCPU's MSRs"))?;
            match left.get(count) {
                Some(refused) if refused.data != 0 => {
                    let attempt = format!("take {:#x} in MSR {:#x}", refused.data, refused.index);
                    return Err(KvmError::other(
                        attempt,
                        std::io::ErrorKind::InvalidInput.into(),
                    ));
                }
                _ => left = left.get(count + 1..).unwrap_or_default(),
            }
        }
        Ok(())
    }
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
        .map_err(KvmError::new("tell an interrupt controller's state"))?;
    Ok(chip)
}

impl Vm {
    /// Saves interrupt controllers, timer and clock. No vCPU is in `KVM_RUN`. `clock` is where the
    /// clock stood when the guest did.
    ///
    /// # Errors
    /// When KVM does not tell.
    pub fn save(&self, clock: Option<ClockState>) -> Result<VmState, KvmError> {
        let fd = self.fd();
        let chips = CHIPS.map(|id| irqchip(fd, id).map(|chip| bytes(&chip)));
        let pit = fd
            .get_pit2()
            .map_err(KvmError::new("tell the interval timer's state"))?;
        Ok(VmState {
            irqchips: chips.into_iter().collect::<Result<_, _>>()?,
            pit: bytes(&pit),
            clock: clock.map(|clock| clock.nanoseconds),
        })
    }

    /// Goes on from what was saved; gives where the clock stood. No vCPU is in `KVM_RUN`.
    ///
    /// # Errors
    /// When what was saved makes no sense, or KVM refuses it.
    pub fn load(&self, saved: &VmState) -> Result<Option<ClockState>, StateError> {
        let fd = self.fd();
        if saved.irqchips.len() != CHIPS.len() {
            return Err(StateError::Chips);
        }
        for (id, raw) in CHIPS.iter().zip(&saved.irqchips) {
            let chip: kvm_irqchip = whole(raw, "interrupt controller")?;
            if chip.chip_id != *id {
                return Err(StateError::Chips);
            }
            fd.set_irqchip(&chip)
                .map_err(KvmError::new("take an interrupt controller's state"))?;
        }
        let pit = whole(&saved.pit, "interval timer")?;
        fd.set_pit2(&pit)
            .map_err(KvmError::new("take the interval timer's state"))?;
        Ok(saved.clock.map(|nanoseconds| ClockState { nanoseconds }))
    }
}
