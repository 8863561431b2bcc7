//! The state that a vCPU has after reset, for vCPUs that are used again.
//!
//! KVM cannot destroy a vCPU, and has no call that resets one. A vCPU that was just made has the
//! wanted state; it is saved then and loaded later, into any vCPU of the VM.

use crate::clock::SaveClock;
use crate::hyperv;
use crate::kvm::KvmError;
use crate::nested::NestedState;
use crate::saved::{StateError, VcpuState};
use crate::vcpu::Vcpu;

/// The state of a vCPU that was not used yet.
#[derive(Clone, Debug)]
pub struct ResetState(VcpuState);

impl Vcpu {
    /// Returns the state of this vCPU, which has not run and waits for the guest to start it.
    ///
    /// # Errors
    /// Fails if KVM does not give a part of the state.
    pub fn reset_state(&self) -> Result<ResetState, KvmError> {
        self.save(SaveClock::Now).map(ResetState)
    }

    /// Resets the vCPU: whatever its guest did with it, it waits for the guest to start it. Its TSC
    /// keeps counting. The vCPU is not in `KVM_RUN`.
    ///
    /// # Errors
    /// Fails if KVM refuses a part of the state.
    pub fn reset(&self, to: &ResetState) -> Result<(), StateError> {
        // KVM accepts an INIT or SIPI that other vCPUs have sent when it is asked for the state of
        // the vCPU, or enters it. Left pending, it would start the vCPU at the next entry.
        let failed = KvmError::new("read a vCPU's MP state");
        self.fd().get_mp_state().map_err(failed)?;
        if self.uses_vmx()? {
            // KVM refuses to clear CR4.VMXE, as the reset state has it, in VMX operation. Of SVM it
            // takes care itself.
            self.load_nested(&NestedState::no_vmx())?;
        }
        let state = to.0.clone().with_apic_id(self.apic_id());
        // The number is the vCPU's own, and not that of the vCPU of which this is the state.
        let state = state.without_msr(hyperv::VP_INDEX);
        self.load(&state, None).map(|_| ())
    }
}

#[cfg(test)]
mod tests {
    use kvm_bindings::{KVM_MP_STATE_UNINITIALIZED, kvm_msi, kvm_regs};

    use super::*;
    use crate::arch::kvm_msr_entry;
    use crate::clock::IA32_TSC;
    use crate::kvm::Kvm;
    use crate::vm::Vm;

    /// The boot vCPU and two others.
    fn vcpus() -> (Vm, [Vcpu; 3]) {
        let kvm = Kvm::open().unwrap();
        let vm = kvm.create_vm().unwrap();
        let cpuid = kvm.supported_cpuid().unwrap();
        let make = |index| {
            let vcpu = vm.create_vcpu(index, index).unwrap();
            vcpu.set_cpuid(&cpuid).unwrap();
            vcpu
        };
        let vcpus = [make(0), make(1), make(2)];
        (vm, vcpus)
    }

    /// Has the VM send an interrupt of this delivery mode to an APIC.
    fn send(vm: &Vm, apic_id: u32, mode: u32, vector: u32) {
        const ASSERT: u32 = 1 << 14;
        let msi = kvm_msi {
            address_lo: 0xfee0_0000 | apic_id << 12,
            data: ASSERT | mode << 8 | vector,
            ..Default::default()
        };
        vm.fd().signal_msi(msi).unwrap();
    }

    #[test]
    fn used_vcpu_is_as_a_new_one_after_reset() {
        const INIT: u32 = 5;
        const STARTUP: u32 = 6;
        const KERNEL_GS_BASE: u32 = 0xc000_0102;
        let (vm, [_boot, new, used]) = vcpus();
        let reset = new.reset_state().unwrap();
        let before = used.save(SaveClock::Now).unwrap();

        used.set_runnable().unwrap();
        let regs = kvm_regs {
            rax: 0x1234,
            rip: 0x5678,
            rflags: 0x202,
            ..Default::default()
        };
        used.set_regs(&regs).unwrap();
        let mut sregs = used.sregs().unwrap();
        (sregs.cr2, sregs.cs.base, sregs.cs.selector) = (0xdead_b000, 0x4000, 0x400);
        used.set_sregs(&sregs).unwrap();
        let msr = |index, data| kvm_msr_entry {
            index,
            data,
            ..Default::default()
        };
        used.set_msrs(&[msr(KERNEL_GS_BASE, 0x1000)]).unwrap();
        let mut lapic = used.lapic().unwrap();
        lapic.regs[0x80] = 0x20;
        used.set_lapic(&lapic).unwrap();
        used.nmi().unwrap();
        // Another vCPU starts it while it is no longer plugged.
        send(&vm, 2, INIT, 0);
        send(&vm, 2, STARTUP, 0x10);

        used.reset(&reset).unwrap();
        let mp_state = used.fd().get_mp_state().unwrap().mp_state;
        assert_eq!(mp_state, KVM_MP_STATE_UNINITIALIZED);
        let after = used.save(SaveClock::Now).unwrap();
        assert_eq!(after.without_msr(IA32_TSC), before.without_msr(IA32_TSC));
        // It can be started as any other.
        send(&vm, 2, INIT, 0);
        send(&vm, 2, STARTUP, 0x10);
        assert_ne!(
            used.fd().get_mp_state().unwrap().mp_state,
            KVM_MP_STATE_UNINITIALIZED
        );
    }

    #[test]
    fn clock_of_a_later_vcpu_follows_the_first() {
        let (vm, [first, later, _]) = vcpus();
        // As after a migration from a host that was started at another time.
        let (start, now) = (1 << 50, vm.sample_clocks());
        let khz = first.clock_at(&now).unwrap().khz;
        let loaded = crate::clock::StoppedClock {
            tsc: start,
            deadline: None,
            khz,
        };
        first
            .start_clock(&loaded, &now, std::time::Duration::ZERO)
            .unwrap();
        std::thread::sleep(std::time::Duration::from_millis(20));
        let sample = vm.sample_clocks();
        let clock = first.clock_at(&sample).unwrap();
        later.follow_clock(&clock, Some(&sample)).unwrap();
        let sample = vm.sample_clocks();
        let (one, other) = (
            first.clock_at(&sample).unwrap().tsc,
            later.clock_at(&sample).unwrap().tsc,
        );
        // Exact where KVM has offsets; elsewhere it takes the TSC as set at another moment.
        let apart = one.abs_diff(other);
        assert!(apart < u64::from(khz), "{apart} ticks apart");
    }
}
