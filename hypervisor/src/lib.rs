//! KVM: virtual machines, vCPUs, memslots, doorbells and interrupts.
//!
//! The only crate that names kvm-ioctls. It knows guest memory (it *is* the listener that keeps
//! KVM's memslots and ioeventfds in step with the flat view) and nothing of devices.
//!
//! ```text
//!   Kvm ── create_vm ──► Vm ── create_vcpu ──► Vcpu ── run(&mut handler) ──► Exit
//!                         │                      ▲
//!                         │ memory listeners     │ Kicker: out of KVM_RUN, now
//!                         ▼                      │
//!                      MemSlots ── closes ──► Gate: no vCPU in KVM_RUN while slots that a
//!                      IoEventFds                  guest may be using are replaced
//! ```
//!
//! [`Kvm::open`] says what to do where KVM is missing; [`Capabilities`] are probed, never assumed.
//!
//! ```no_run
//! use hypervisor::Kvm;
//! let kvm = Kvm::open()?;
//! println!("up to {} vCPUs", kvm.capabilities().max_vcpus);
//! # Ok::<(), hypervisor::OpenError>(())
//! ```

#![expect(
    unsafe_code,
    reason = "memslots hand host memory to KVM, and kvm_run is shared with it"
)]

mod clock;
mod core_note;
mod dirty;
mod exit;
mod gate;
mod hyperv;
mod ioevent;
mod irq;
mod kick;
mod kvm;
mod nested;
mod reset;
mod saved;
mod slots;
mod vcpu;
mod vm;

pub use clock::{ClockSample, SaveClock, StoppedClock};
pub use core_note::{CoreRegisters, core_notes};
pub use dirty::DirtyBackend;
pub use exit::{Exit, ExitHandler, RunFailure};
pub use gate::{Closed, Gate, Seat};
pub use ioevent::IoEventFds;
pub use irq::{Held, IrqRoutes, MsiVectors, Route};
pub use kick::Kicker;
pub use kvm::{Capabilities, Kvm, KvmError, OpenError};
pub use nested::NestedState;
pub use reset::ResetState;
pub use saved::{StateError, VcpuState, VmState};
pub use slots::{MemSlots, SlotStats};
pub use vcpu::Vcpu;
pub use vm::Vm;

/// The structures of KVM's interface that describe a vCPU.
pub mod arch {
    pub use kvm_bindings::{
        CpuId, kvm_cpuid_entry2, kvm_dtable, kvm_lapic_state, kvm_msr_entry, kvm_regs, kvm_segment,
        kvm_sregs,
    };
}
