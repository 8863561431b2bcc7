//! Why a vCPU left the guest.

use std::fmt;

/// Answers a vCPU's accesses to what is not RAM.
///
/// `data` has the width of the access; a string instruction on a port is cut into its accesses.
pub trait ExitHandler {
    /// The guest reads from a port.
    fn io_read(&mut self, port: u16, data: &mut [u8]);
    /// The guest writes to a port.
    fn io_write(&mut self, port: u16, data: &[u8]);
    /// The guest reads from memory that no slot holds.
    fn mmio_read(&mut self, addr: u64, data: &mut [u8]);
    /// The guest writes to memory that no slot holds, or to a read-only slot.
    fn mmio_write(&mut self, addr: u64, data: &[u8]);
}

/// Why [`crate::Vcpu::run`] returned.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Exit {
    /// An access was answered, or nothing needs to be done: run again.
    Handled,
    /// The vCPU was kicked.
    Interrupted,
    /// The guest's CPU shut down: on x86, a triple fault.
    Shutdown,
    /// The guest cannot continue.
    Failed(RunFailure),
}

/// Why a vCPU cannot run on.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RunFailure {
    /// KVM could not emulate an instruction.
    #[error(
        "KVM cannot emulate the instruction at {rip:#x} ({})",
        Bytes(instruction)
    )]
    Emulation {
        /// Its guest virtual address.
        rip: u64,
        /// Its bytes, as far as KVM tells.
        instruction: Vec<u8>,
    },
    /// Another internal error of KVM.
    #[error("KVM had an internal error (suberror {suberror}) at {rip:#x}")]
    Internal {
        /// `KVM_INTERNAL_ERROR_*`.
        suberror: u32,
        /// The guest's instruction pointer.
        rip: u64,
    },
    /// The CPU refused the guest's state.
    #[error("the CPU refused to enter the guest (hardware reason {reason:#x})")]
    Entry {
        /// The hardware's reason.
        reason: u64,
    },
    /// The guest touched memory that the host cannot give it.
    #[error("the host cannot provide guest memory at {gpa:#x}")]
    MemoryFault {
        /// The guest physical address.
        gpa: u64,
    },
    /// An exit that we do not know.
    #[error("KVM exited the guest with an unknown exit reason: {0}")]
    Unknown(String),
    /// `KVM_RUN` itself failed.
    #[error("KVM_RUN failed: {}", std::io::Error::from_raw_os_error(*.0))]
    Run(i32),
}

struct Bytes<'a>(&'a [u8]);

impl fmt::Display for Bytes<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.0.is_empty() {
            return f.write_str("bytes unknown");
        }
        for (i, byte) in self.0.iter().enumerate() {
            write!(f, "{}{byte:02x}", if i == 0 { "" } else { " " })?;
        }
        Ok(())
    }
}
