//! Notes of a core dump about vCPUs, as QEMU's `dump-guest-memory` writes them
//! (`target/i386/arch_dump.c`): `crash` and `gdb` read them.
//!
//! ```text
//!   "CORE", NT_PRSTATUS (1)   Linux's `struct elf_prstatus`: the general registers
//!   "QEMU", 0                 `QEMUCPUState`: these, the segments, and the control registers
//! ```

use kvm_bindings::{kvm_dtable, kvm_regs, kvm_segment, kvm_sregs};
use zerocopy::{Immutable, IntoBytes};

use crate::kvm::KvmError;
use crate::vcpu::Vcpu;

const NT_PRSTATUS: u32 = 1;
const QEMU_VERSION: u32 = 1;
/// `IA32_KERNEL_GS_BASE`.
const KERNEL_GS_BASE: u32 = 0xc000_0102;

/// The registers of a vCPU in a core dump.
#[derive(Clone, Debug)]
pub struct CoreRegisters {
    regs: kvm_regs,
    sregs: kvm_sregs,
    kernel_gs_base: u64,
}

/// Linux's `struct elf_prstatus` on x86-64, of which only these fields are used.
#[repr(C)]
#[derive(IntoBytes, Immutable)]
struct PrStatus {
    pad1: [u8; 32],
    pid: u32,
    pad2: [u8; 76],
    /// In the order of `struct user_regs_struct`.
    regs: [u64; 27],
    pad3: [u8; 8],
}

#[repr(C)]
#[derive(IntoBytes, Immutable)]
struct Segment {
    selector: u32,
    limit: u32,
    flags: u32,
    pad: u32,
    base: u64,
}

#[repr(C)]
#[derive(IntoBytes, Immutable)]
struct QemuCpuState {
    version: u32,
    size: u32,
    /// RAX, RBX, RCX, RDX, RSI, RDI, RSP, RBP, R8 to R15, RIP, RFLAGS.
    regs: [u64; 18],
    /// CS, DS, ES, FS, GS, SS, LDT, TR, GDT, IDT.
    segments: [Segment; 10],
    /// CR0 to CR4.
    cr: [u64; 5],
    kernel_gs_base: u64,
}

impl From<&kvm_segment> for Segment {
    /// The flags are the second word of a descriptor, without its parts of base and limit.
    fn from(segment: &kvm_segment) -> Self {
        let bit = |value: u8, at: u32| u32::from(value) << at;
        Self {
            selector: segment.selector.into(),
            limit: segment.limit,
            flags: bit(segment.type_, 8)
                | bit(segment.s, 12)
                | bit(segment.dpl, 13)
                | bit(segment.present, 15)
                | bit(segment.avl, 20)
                | bit(segment.l, 21)
                | bit(segment.db, 22)
                | bit(segment.g, 23),
            pad: 0,
            base: segment.base,
        }
    }
}

impl From<&kvm_dtable> for Segment {
    fn from(table: &kvm_dtable) -> Self {
        Self {
            selector: 0,
            limit: table.limit.into(),
            flags: 0,
            pad: 0,
            base: table.base,
        }
    }
}

impl CoreRegisters {
    /// `index` is the vCPU's number. Threads of a core have numbers from 1 on.
    fn prstatus(&self, index: u32) -> PrStatus {
        let (r, s) = (&self.regs, &self.sregs);
        PrStatus {
            pad1: [0; 32],
            pid: index.saturating_add(1),
            pad2: [0; 76],
            regs: [
                r.r15,
                r.r14,
                r.r13,
                r.r12,
                r.rbp,
                r.rbx,
                r.r11,
                r.r10,
                r.r9,
                r.r8,
                r.rax,
                r.rcx,
                r.rdx,
                r.rsi,
                r.rdi,
                0, // the original RAX of a system call
                r.rip,
                s.cs.selector.into(),
                r.rflags,
                r.rsp,
                s.ss.selector.into(),
                s.fs.base,
                s.gs.base,
                s.ds.selector.into(),
                s.es.selector.into(),
                s.fs.selector.into(),
                s.gs.selector.into(),
            ],
            pad3: [0; 8],
        }
    }

    fn qemu(&self) -> QemuCpuState {
        let (r, s) = (&self.regs, &self.sregs);
        QemuCpuState {
            version: QEMU_VERSION,
            size: size_of::<QemuCpuState>() as u32,
            regs: [
                r.rax, r.rbx, r.rcx, r.rdx, r.rsi, r.rdi, r.rsp, r.rbp, r.r8, r.r9, r.r10, r.r11,
                r.r12, r.r13, r.r14, r.r15, r.rip, r.rflags,
            ],
            segments: [
                (&s.cs).into(),
                (&s.ds).into(),
                (&s.es).into(),
                (&s.fs).into(),
                (&s.gs).into(),
                (&s.ss).into(),
                (&s.ldt).into(),
                (&s.tr).into(),
                (&s.gdt).into(),
                (&s.idt).into(),
            ],
            cr: [s.cr0, 0, s.cr2, s.cr3, s.cr4],
            kernel_gs_base: self.kernel_gs_base,
        }
    }
}

impl Vcpu {
    /// Reads the registers that a core dump shows. The vCPU is not in `KVM_RUN`.
    ///
    /// # Errors
    /// Fails if KVM refuses.
    pub fn core_registers(&self) -> Result<CoreRegisters, KvmError> {
        let base = self.read_msrs(&[KERNEL_GS_BASE])?;
        Ok(CoreRegisters {
            regs: self.regs()?,
            sregs: self.sregs()?,
            kernel_gs_base: base.first().map_or(0, |(_, value)| *value),
        })
    }
}

/// Returns the notes of these vCPUs, by their numbers: all of one kind before those of the other, as
/// QEMU's are.
#[must_use]
pub fn core_notes(vcpus: &[(u32, CoreRegisters)]) -> Vec<u8> {
    let mut notes = Vec::new();
    for (index, vcpu) in vcpus {
        let status = vcpu.prstatus(*index);
        note(&mut notes, b"CORE\0", NT_PRSTATUS, status.as_bytes());
    }
    for (_, vcpu) in vcpus {
        note(&mut notes, b"QEMU\0", 0, vcpu.qemu().as_bytes());
    }
    notes
}

/// Appends a note: three words of head, then name and content, each to a multiple of four bytes.
fn note(notes: &mut Vec<u8>, name: &[u8], kind: u32, content: &[u8]) {
    for word in [name.len() as u32, content.len() as u32, kind] {
        notes.extend(word.to_le_bytes());
    }
    for part in [name, content] {
        notes.extend(part);
        notes.resize(notes.len().next_multiple_of(4), 0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The offsets are those of QEMU's structures.
    #[test]
    fn notes_have_the_layout_of_qemu() {
        let mut sregs = kvm_sregs {
            cr3: 0x3000,
            ..Default::default()
        };
        sregs.cs = kvm_segment {
            selector: 0x10,
            limit: u32::MAX,
            type_: 0xb,
            s: 1,
            present: 1,
            l: 1,
            g: 1,
            ..Default::default()
        };
        let vcpu = CoreRegisters {
            regs: kvm_regs {
                rip: 0x1234_5678,
                rax: 7,
                r15: 15,
                ..Default::default()
            },
            sregs,
            kernel_gs_base: 0x6b67_7362,
        };
        let notes = core_notes(&[(0, vcpu.clone()), (1, vcpu)]);
        let word = |at: usize| u32::from_le_bytes(notes[at..at + 4].try_into().unwrap());
        let long = |at: usize| u64::from_le_bytes(notes[at..at + 8].try_into().unwrap());
        const STATUS: usize = 12 + 8 + 336;
        for (at, pid) in [(0, 1), (STATUS, 2)] {
            assert_eq!((word(at), word(at + 4), word(at + 8)), (5, 336, 1));
            assert_eq!(&notes[at + 12..at + 20], b"CORE\0\0\0\0");
            let status = at + 20;
            assert_eq!(word(status + 32), pid);
            assert_eq!(long(status + 112), 15, "R15 is the first register");
            assert_eq!(long(status + 112 + 16 * 8), 0x1234_5678, "RIP");
        }
        let at = 2 * STATUS;
        assert_eq!((word(at), word(at + 4), word(at + 8)), (5, 440, 0));
        assert_eq!(&notes[at + 12..at + 20], b"QEMU\0\0\0\0");
        let state = at + 20;
        assert_eq!((word(state), word(state + 4)), (1, 440));
        assert_eq!(
            (long(state + 8), long(state + 8 + 16 * 8)),
            (7, 0x1234_5678)
        );
        let cs = state + 8 + 18 * 8;
        assert_eq!((word(cs), word(cs + 8)), (0x10, 0x00a0_9b00));
        let cr = cs + 10 * 24;
        assert_eq!((long(cr + 3 * 8), long(cr + 5 * 8)), (0x3000, 0x6b67_7362));
        assert_eq!(notes.len(), 2 * STATUS + 2 * (20 + 440));
    }
}
