//! A virtual CPU.

use std::sync::Arc;
use std::sync::atomic::AtomicU8;

use kvm_bindings::{
    CpuId, KVM_CAP_HYPERV_SYNIC, KVM_EXIT_HYPERV_HCALL, Msrs, kvm_enable_cap, kvm_lapic_state,
    kvm_msr_entry, kvm_regs, kvm_run, kvm_sregs, kvm_xsave,
};
use kvm_ioctls::{VcpuExit, VcpuFd};

use crate::exit::{Exit, ExitHandler, RunFailure};
use crate::gate::{Gate, Seat};
use crate::hyperv;
use crate::kick::{Kicker, Running};
use crate::kvm::KvmError;
use crate::slots::MemSlots;

/// `KVM_EXIT_DIRTY_RING_FULL`.
const DIRTY_RING_FULL: u32 = 31;

/// A vCPU; owned by the thread that runs it.
#[derive(Debug)]
pub struct Vcpu {
    fd: VcpuFd,
    index: u32,
    apic_id: u32,
    kicker: Kicker,
    gate: Arc<Gate>,
    seat: Arc<Seat>,
    /// Own the memory that the guest can reach, which must stay mapped as long as the vCPU can run.
    slots: Arc<MemSlots>,
    /// The MSRs that KVM lists.
    msr_indices: Arc<[u32]>,
}

impl Vcpu {
    pub(crate) fn new(
        fd: VcpuFd,
        (index, apic_id): (u32, u32),
        gate: Arc<Gate>,
        slots: Arc<MemSlots>,
        msr_indices: Arc<[u32]>,
    ) -> Self {
        let kicker = Kicker::default();
        let seat = gate.seat(kicker.clone());
        Self {
            fd,
            index,
            apic_id,
            kicker,
            gate,
            seat,
            slots,
            msr_indices,
        }
    }

    pub(crate) fn fd(&self) -> &VcpuFd {
        &self.fd
    }

    pub(crate) fn msr_indices(&self) -> &[u32] {
        &self.msr_indices
    }

    pub(crate) fn set_xsave(&self, xsave: &kvm_xsave) -> Result<(), kvm_ioctls::Error> {
        // SAFETY: KVM reads as many bytes as it has state for, and no more than the structure has:
        // features with longer state need `ARCH_REQ_XCOMP_GUEST_PERM`, which is never requested.
        unsafe { self.fd.set_xsave(xsave) }
    }

    /// Its number among the VM's vCPUs.
    #[must_use]
    pub fn index(&self) -> u32 {
        self.index
    }

    pub(crate) fn apic_id(&self) -> u32 {
        self.apic_id
    }

    /// Returns the handle that kicks the vCPU.
    #[must_use]
    pub fn kicker(&self) -> Kicker {
        self.kicker.clone()
    }

    /// Runs the guest until an exit that needs the caller. `handler` answers accesses.
    ///
    /// The answer to a read reaches the guest with the next run.
    pub fn run(&mut self, handler: &mut impl ExitHandler) -> Exit {
        self.kicker.adopt();
        self.enter(handler, 0)
    }

    /// Lets an access that was answered finish inside KVM without running the guest, so that the
    /// registers are what the guest would see next. An access that KVM makes in parts is answered
    /// to its end.
    pub fn complete_access(&mut self, handler: &mut impl ExitHandler) {
        while self.enter(handler, 1) == Exit::Handled {}
    }

    /// Enters the guest, and handles the exit as far as that can be done here.
    fn enter(&mut self, handler: &mut impl ExitHandler, immediate_exit_wanted: u8) -> Exit {
        // The order of the next steps makes kicks reliable: reset the byte, publish it to the
        // signal handler, check `pending`, enter. A kick before the check is found by the check.
        // The signal of a later kick finds the byte, and KVM_RUN returns at once with EINTR. A
        // reset after the check would erase that byte.
        self.fd.set_kvm_immediate_exit(immediate_exit_wanted);
        let run = &raw mut *self.fd.get_kvm_run();
        // SAFETY: `run` was just made from a reference.
        let immediate_exit = unsafe { &raw mut (*run).immediate_exit };
        // SAFETY: the byte is in the vCPU's mapping of `kvm_run`, which lives as long as `fd`;
        // the kernel and this thread's signal handler are the only ones that share it.
        let immediate_exit = unsafe { AtomicU8::from_ptr(immediate_exit) };
        // SAFETY: it is dropped before `fd` is.
        let running = unsafe { Running::new(immediate_exit) };
        if immediate_exit_wanted == 0 && self.kicker.take() {
            return Exit::Interrupted;
        }
        self.gate.enter(&self.seat);
        let left = self.fd.run();
        // Leave before the exit is handled. The handler may commit a change of the map on this
        // thread, and that commit closes the gate and would wait for this seat. Emptying the rings
        // takes the memslot lock, whose holder may also be waiting at the gate.
        self.gate.leave(&self.seat);
        // From here a signal interrupts nothing; its kick stays in `pending` for the next run.
        drop(running);

        // SAFETY: `run` is the mapping of this vCPU, as KVM left it with this exit.
        let exit = match unsafe { answer(left, run, handler) } {
            Answer::Exit(exit) => exit,
            Answer::RingFull => match self.slots.empty_rings() {
                Ok(()) => Exit::Handled,
                Err(error) => Exit::Failed(RunFailure::Unknown(error.to_string())),
            },
            Answer::InternalError => Exit::Failed(self.internal_error()),
        };
        if exit == Exit::Interrupted {
            self.fd.set_kvm_immediate_exit(0);
            // The caller now learns of the kick, so clear it, or the next run would report it
            // again. A second kick up to here merges with the first: both are reported by this
            // exit.
            self.kicker.take();
        }
        exit
    }

    fn internal_error(&mut self) -> RunFailure {
        let rip = self.fd.get_regs().map_or(0, |regs| regs.rip);
        let run = self.fd.get_kvm_run();
        // SAFETY: after this exit the kernel has filled in this member.
        let internal = unsafe { run.__bindgen_anon_1.internal };
        if internal.suberror != kvm_bindings::KVM_INTERNAL_ERROR_EMULATION {
            return RunFailure::Internal {
                suberror: internal.suberror,
                rip,
            };
        }
        // SAFETY: this suberror's own layout of the same member.
        let failure = unsafe { run.__bindgen_anon_1.emulation_failure };
        let told = failure.ndata > 0
            && failure.flags
                & u64::from(kvm_bindings::KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES)
                != 0;
        // SAFETY: plain bytes, whatever they are.
        let instruction = unsafe { failure.__bindgen_anon_1.__bindgen_anon_1 };
        let len = usize::from(instruction.insn_size).min(instruction.insn_bytes.len());
        let instruction = if told {
            instruction.insn_bytes[..len].to_vec()
        } else {
            Vec::new()
        };
        RunFailure::Emulation { rip, instruction }
    }

    /// Has the vCPU implement Hyper-V's synthetic interrupt controller, and its timers with it. Their MSRs
    /// are saved from then on.
    ///
    /// # Errors
    /// Fails if KVM refuses.
    pub fn enable_hyperv(&mut self) -> Result<(), KvmError> {
        let capability = kvm_enable_cap {
            cap: KVM_CAP_HYPERV_SYNIC,
            ..Default::default()
        };
        self.fd.enable_cap(&capability).map_err(KvmError::new(
            "enable Hyper-V's synthetic interrupt controller",
        ))?;
        // KVM lists the first of each kind to say that it has them all. They come last: a timer
        // expires into a source, which must be set by then.
        let listed = self.msr_indices.iter().copied();
        let others = listed.filter(|index| !hyperv::is_synthetic(*index));
        self.msr_indices = others.chain(hyperv::synthetic()).collect();
        Ok(())
    }

    /// Sets what the guest sees with the CPUID instruction.
    ///
    /// # Errors
    /// Fails if KVM refuses.
    pub fn set_cpuid(&self, cpuid: &CpuId) -> Result<(), KvmError> {
        self.fd
            .set_cpuid2(cpuid)
            .map_err(KvmError::new("set a vCPU's CPUID"))
    }

    /// The general registers.
    ///
    /// # Errors
    /// Fails if KVM refuses.
    pub fn regs(&self) -> Result<kvm_regs, KvmError> {
        self.fd
            .get_regs()
            .map_err(KvmError::new("read a vCPU's registers"))
    }

    /// Sets the general registers.
    ///
    /// # Errors
    /// Fails if KVM refuses.
    pub fn set_regs(&self, regs: &kvm_regs) -> Result<(), KvmError> {
        self.fd
            .set_regs(regs)
            .map_err(KvmError::new("set a vCPU's registers"))
    }

    /// The system registers.
    ///
    /// # Errors
    /// Fails if KVM refuses.
    pub fn sregs(&self) -> Result<kvm_sregs, KvmError> {
        self.fd
            .get_sregs()
            .map_err(KvmError::new("read a vCPU's system registers"))
    }

    /// Sets the system registers.
    ///
    /// # Errors
    /// Fails if KVM refuses.
    pub fn set_sregs(&self, sregs: &kvm_sregs) -> Result<(), KvmError> {
        self.fd
            .set_sregs(sregs)
            .map_err(KvmError::new("set a vCPU's system registers"))
    }

    /// Sets model-specific registers.
    ///
    /// # Errors
    /// Fails if KVM refuses one; the text names it.
    pub fn set_msrs(&self, entries: &[kvm_msr_entry]) -> Result<(), KvmError> {
        let invalid = || std::io::Error::from(std::io::ErrorKind::InvalidInput);
        let msrs = Msrs::from_entries(entries)
            .map_err(|_| KvmError::other("set this many MSRs", invalid()))?;
        let done = self
            .fd
            .set_msrs(&msrs)
            .map_err(KvmError::new("set a vCPU's MSRs"))?;
        match entries.get(done) {
            None => Ok(()),
            Some(refused) => Err(KvmError::other(
                format!("set MSR {:#x}", refused.index),
                invalid(),
            )),
        }
    }

    /// The local APIC's registers.
    ///
    /// # Errors
    /// Fails if KVM refuses.
    pub fn lapic(&self) -> Result<kvm_lapic_state, KvmError> {
        self.fd
            .get_lapic()
            .map_err(KvmError::new("read a local APIC"))
    }

    /// Sets the local APIC's registers.
    ///
    /// # Errors
    /// Fails if KVM refuses.
    pub fn set_lapic(&self, lapic: &kvm_lapic_state) -> Result<(), KvmError> {
        self.fd
            .set_lapic(lapic)
            .map_err(KvmError::new("set a local APIC"))
    }

    /// Injects a non-maskable interrupt.
    ///
    /// # Errors
    /// Fails if KVM refuses.
    pub fn nmi(&self) -> Result<(), KvmError> {
        self.fd.nmi().map_err(KvmError::new("inject an NMI"))
    }

    /// Tells a guest with a kvmclock that it was stopped, so that its soft-lockup watchdog does not
    /// fire (`KVM_KVMCLOCK_CTRL`).
    pub fn forgive_stop(&self) {
        // EINVAL: this guest uses no kvmclock.
        let _ = self.fd.kvmclock_ctrl();
    }

    /// The frequency of the guest's TSC in kHz.
    ///
    /// # Errors
    /// Fails if KVM refuses.
    pub fn tsc_khz(&self) -> Result<u32, KvmError> {
        self.fd
            .get_tsc_khz()
            .map_err(KvmError::new("read a vCPU's TSC frequency"))
    }
}

impl Drop for Vcpu {
    fn drop(&mut self) {
        self.gate.forget(&self.seat);
    }
}

#[cfg(test)]
impl Vcpu {
    /// Lets a vCPU run that would wait for the guest to start it, as all but the first do.
    pub(crate) fn set_runnable(&self) -> Result<(), kvm_ioctls::Error> {
        let runnable = kvm_bindings::kvm_mp_state {
            mp_state: kvm_bindings::KVM_MP_STATE_RUNNABLE,
        };
        self.fd.set_mp_state(runnable)
    }
}

/// The result of handling an exit of KVM.
enum Answer {
    Exit(Exit),
    /// The vCPU's dirty ring must be emptied before it runs again.
    RingFull,
    /// KVM failed; the reason is in `kvm_run`.
    InternalError,
}

/// Has `handler` answer the guest's access, if that was the reason of the exit.
///
/// # Safety
/// `run` is the vCPU's mapping of `kvm_run`, of which `left` is the exit.
unsafe fn answer(
    left: Result<VcpuExit<'_>, kvm_ioctls::Error>,
    run: *mut kvm_run,
    handler: &mut impl ExitHandler,
) -> Answer {
    Answer::Exit(match left {
        Ok(VcpuExit::IoIn(port, data)) => {
            // SAFETY: after this exit the kernel has filled in this member.
            let width = unsafe { (*run).__bindgen_anon_1.io.size };
            for part in data.chunks_mut(usize::from(width.max(1))) {
                handler.io_read(port, part);
            }
            Exit::Handled
        }
        Ok(VcpuExit::IoOut(port, data)) => {
            // SAFETY: after this exit the kernel has filled in this member.
            let width = unsafe { (*run).__bindgen_anon_1.io.size };
            for part in data.chunks(usize::from(width.max(1))) {
                handler.io_write(port, part);
            }
            Exit::Handled
        }
        Ok(VcpuExit::MmioRead(addr, data)) => {
            handler.mmio_read(addr, data);
            Exit::Handled
        }
        Ok(VcpuExit::MmioWrite(addr, data)) => {
            handler.mmio_write(addr, data);
            Exit::Handled
        }
        Ok(VcpuExit::Intr | VcpuExit::IrqWindowOpen | VcpuExit::Hlt) => Exit::Handled,
        Ok(VcpuExit::Unsupported(DIRTY_RING_FULL)) => return Answer::RingFull,
        Ok(VcpuExit::Hyperv) => {
            // SAFETY: after this exit the kernel has filled in this member.
            let exit = unsafe { &mut (*run).__bindgen_anon_1.hyperv };
            if exit.type_ == KVM_EXIT_HYPERV_HCALL {
                /// `HV_STATUS_INVALID_HYPERCALL_CODE`: there are no messages to other partitions.
                const INVALID: u64 = 2;
                // KVM reads the result when the vCPU next runs.
                exit.u.hcall.result = INVALID;
            }
            // Other exits report that the guest has set up its interrupt controller.
            Exit::Handled
        }
        Ok(VcpuExit::Shutdown) => Exit::Shutdown,
        Ok(VcpuExit::FailEntry(reason, _)) => Exit::Failed(RunFailure::Entry { reason }),
        Ok(VcpuExit::MemoryFault { gpa, .. }) => Exit::Failed(RunFailure::MemoryFault { gpa }),
        Ok(VcpuExit::InternalError) => return Answer::InternalError,
        Ok(other) => Exit::Failed(RunFailure::Unknown(format!("{other:?}"))),
        // EAGAIN: an application processor has left its wait for INIT or SIPI.
        Err(errno) if matches!(errno.errno(), libc::EINTR | libc::EAGAIN) => Exit::Interrupted,
        Err(errno) => Exit::Failed(RunFailure::Run(errno.errno())),
    })
}
