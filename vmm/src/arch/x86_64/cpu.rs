//! A vCPU's CPUID, and its first registers.

use hypervisor::arch::{CpuId, kvm_dtable, kvm_lapic_state, kvm_msr_entry, kvm_regs, kvm_segment};
use hypervisor::{KvmError, StateError, Vcpu};
use memory::FlatView;
use spec::CpuTopology;
use vm_memory::{Bytes, GuestAddress, GuestMemoryError};

use super::features::ARCH_CAPABILITIES;
use super::layout;
use super::topology::Place;

const CR0_PE: u64 = 1;
const CR0_ET: u64 = 1 << 4;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;

const MSR_MISC_ENABLE: u32 = 0x1a0;
const MSR_MTRR_DEF_TYPE: u32 = 0x2ff;

/// A vCPU cannot be set up.
#[derive(Debug, thiserror::Error)]
pub(crate) enum CpuError {
    #[error(transparent)]
    Kvm(#[from] KvmError),
    #[error("the vCPUs have {0} CPUID leaves, more than KVM accepts")]
    TooManyLeaves(usize),
    #[error("vCPU {0} has no APIC id: the CPU topology does not contain it")]
    NoApicId(u32),
    #[error("the vCPU's tables do not fit guest memory: {0}")]
    Memory(#[from] GuestMemoryError),
    #[error("cannot reset a vCPU: {0}")]
    Reset(#[from] StateError),
    #[error("the host refused to start a vCPU thread: {0}")]
    Thread(std::io::Error),
    #[error(
        "the thread of vCPU {0} failed: the vCPU can be plugged again after a reboot of the VM"
    )]
    ThreadFailed(u32),
}

/// Physical address bits that a guest has, which are the host's unless the configuration says
/// fewer.
pub(crate) fn phys_bits(supported: &CpuId, configured: Option<u8>) -> u8 {
    let leaf = supported
        .as_slice()
        .iter()
        .find(|entry| entry.function == 0x8000_0008);
    // 36 bits for a CPU without the leaf (Intel SDM volume 3A, 4.1.4).
    let host = leaf.map_or(36, |entry| (entry.eax & 0xff) as u8);
    configured.map_or(host, |bits| bits.min(host))
}

/// The CPUID of one vCPU: the machine's, with the vCPU's own numbers and its place in the topology.
///
/// # Errors
/// Fails if these are more leaves than KVM takes.
pub(crate) fn cpuid(
    machine: &CpuId,
    topology: &CpuTopology,
    apic_id: u32,
    phys_bits: u8,
) -> Result<CpuId, CpuError> {
    const HYPERVISOR: u32 = 1 << 31;
    const TSC_DEADLINE: u32 = 1 << 24;
    let mut entries = machine.as_slice().to_vec();
    for entry in &mut entries {
        match entry.function {
            // KVM leaves TSC_DEADLINE out of what it supports, since it needs the in-kernel local
            // APIC (KVM API, KVM_GET_SUPPORTED_CPUID), which this machine has.
            1 => entry.ecx |= HYPERVISOR | TSC_DEADLINE,
            0x8000_0008 => entry.eax = entry.eax & !0xff | u32::from(phys_bits),
            _ => {}
        }
    }
    Place::new(topology, apic_id).shape(&mut entries);
    CpuId::from_entries(&entries).map_err(|_| CpuError::TooManyLeaves(entries.len()))
}

/// Gives every vCPU what it has after reset: MSRs, and the local interrupts of its APIC. Without
/// `arch_capabilities` the guest sees those of KVM, which not every host lets be set.
pub(crate) fn set_up(vcpu: &Vcpu, arch_capabilities: Option<u64>) -> Result<(), KvmError> {
    const FAST_STRINGS: u64 = 1;
    const MTRR_WRITE_BACK: u64 = 1 << 11 | 6;
    vcpu.set_msrs(&[
        kvm_msr_entry {
            index: MSR_MISC_ENABLE,
            data: FAST_STRINGS,
            ..Default::default()
        },
        kvm_msr_entry {
            // Write-back for all memory, as firmware leaves it.
            index: MSR_MTRR_DEF_TYPE,
            data: MTRR_WRITE_BACK,
            ..Default::default()
        },
    ])?;
    if let Some(data) = arch_capabilities {
        vcpu.set_msrs(&[kvm_msr_entry {
            index: ARCH_CAPABILITIES,
            data,
            ..Default::default()
        }])?;
    }
    const LVT_LINT0: usize = 0x350;
    const LVT_LINT1: usize = 0x360;
    const EXT_INT: u32 = 7 << 8;
    const NMI: u32 = 4 << 8;
    let mut lapic = vcpu.lapic()?;
    // As firmware leaves them: the PIC's output at LINT0, NMI at LINT1.
    set_register(&mut lapic, LVT_LINT0, EXT_INT);
    set_register(&mut lapic, LVT_LINT1, NMI);
    vcpu.set_lapic(&lapic)
}

fn set_register(lapic: &mut kvm_lapic_state, at: usize, value: u32) {
    for (register, byte) in lapic.regs[at..at + 4].iter_mut().zip(value.to_le_bytes()) {
        *register = byte.cast_signed();
    }
}

/// The entry of the boot vCPU, and its boot information.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Entry {
    /// The PVH boot ABI.
    Pvh { address: u64, start_info: u64 },
    /// The 64-bit boot protocol of Linux.
    Linux64 { address: u64, zero_page: u64 },
}

/// Puts the boot vCPU where the payload starts. The others wait for the guest to start them.
pub(crate) fn enter(vcpu: &Vcpu, memory: &FlatView, entry: &Entry) -> Result<(), CpuError> {
    match *entry {
        Entry::Pvh {
            address,
            start_info,
        } => enter_pvh(vcpu, memory, address, start_info),
        Entry::Linux64 { address, zero_page } => enter_linux(vcpu, memory, address, zero_page),
    }
}

/// A flat segment: type, whether it is 64-bit code, and whether it is 32-bit.
fn segment(selector: u16, kind: u8, long: bool) -> kvm_segment {
    kvm_segment {
        base: 0,
        limit: 0xffff_ffff,
        selector,
        type_: kind,
        present: 1,
        dpl: 0,
        db: u8::from(!long),
        s: 1,
        l: u8::from(long),
        g: 1,
        ..Default::default()
    }
}

const CODE: u8 = 0xb;
const DATA: u8 = 0x3;

/// The descriptor of a flat segment (Intel SDM volume 3A, 3.4.5).
fn descriptor(kind: u8, long: bool) -> u64 {
    let flags = 0x8 | if long { 0x2 } else { 0x4 };
    0x0000_ffff | 0xf << 48 | u64::from(0x90 | kind) << 40 | flags << 52
}

fn write_gdt(memory: &FlatView, code_long: bool) -> Result<kvm_dtable, CpuError> {
    let table = [0, 0, descriptor(CODE, code_long), descriptor(DATA, false)];
    for (at, entry) in (layout::GDT..).step_by(8).zip(table) {
        memory.write_obj(entry, GuestAddress(at))?;
    }
    Ok(kvm_dtable {
        base: layout::GDT,
        limit: 4 * 8 - 1,
        ..Default::default()
    })
}

/// The PVH boot ABI: 32-bit protected mode, paging off, `ebx` at the start info.
fn enter_pvh(
    vcpu: &Vcpu,
    memory: &FlatView,
    address: u64,
    start_info: u64,
) -> Result<(), CpuError> {
    let mut sregs = vcpu.sregs()?;
    sregs.gdt = write_gdt(memory, false)?;
    sregs.cs = segment(0x10, CODE, false);
    let data = segment(0x18, DATA, false);
    (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
    // A task segment, busy, of the length of a TSS: VMX wants one.
    sregs.tr = kvm_segment {
        limit: 0x67,
        type_: 0xb,
        s: 0,
        db: 0,
        g: 0,
        ..segment(0, CODE, false)
    };
    sregs.cr0 = CR0_PE | CR0_ET;
    sregs.cr4 = 0;
    sregs.efer = 0;
    vcpu.set_sregs(&sregs)?;
    vcpu.set_regs(&kvm_regs {
        rip: address,
        rbx: start_info,
        // Bit 1 is always 1 (Intel SDM volume 1, 3.4.3); interrupts are off, as both boot protocols
        // ask.
        rflags: 2,
        ..Default::default()
    })?;
    Ok(())
}

/// The 64-bit boot protocol of Linux (Documentation/arch/x86/boot.rst): long mode, memory mapped
/// as it is, `rsi` at the zero page.
fn enter_linux(
    vcpu: &Vcpu,
    memory: &FlatView,
    address: u64,
    zero_page: u64,
) -> Result<(), CpuError> {
    const PRESENT_WRITABLE: u64 = 3;
    const LARGE: u64 = 1 << 7;
    // 4 GiB in pages of 2 MiB: a level 4 and a level 3 table, and four of level 2.
    let (pml4, pdpt, pds) = (
        layout::PAGE_TABLES,
        layout::PAGE_TABLES + 0x1000,
        layout::PAGE_TABLES + 0x2000,
    );
    memory.write_obj(pdpt | PRESENT_WRITABLE, GuestAddress(pml4))?;
    for gib in 0..4 {
        memory.write_obj(
            (pds + gib * 0x1000) | PRESENT_WRITABLE,
            GuestAddress(pdpt + gib * 8),
        )?;
    }
    for page in 0..2048 {
        memory.write_obj(
            page << 21 | PRESENT_WRITABLE | LARGE,
            GuestAddress(pds + page * 8),
        )?;
    }
    let mut sregs = vcpu.sregs()?;
    sregs.gdt = write_gdt(memory, true)?;
    sregs.cs = segment(0x10, CODE, true);
    let data = segment(0x18, DATA, false);
    (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
    sregs.tr = kvm_segment {
        limit: 0x67,
        type_: 0xb,
        s: 0,
        db: 0,
        g: 0,
        ..segment(0, CODE, false)
    };
    sregs.cr3 = pml4;
    // All at once: KVM checks the registers together, and EFER.LMA must agree with CR0.PG and
    // EFER.LME (Intel SDM volume 3A, 4.1).
    sregs.cr4 |= CR4_PAE;
    sregs.cr0 |= CR0_PE | CR0_PG | CR0_ET;
    sregs.efer |= EFER_LME | EFER_LMA;
    vcpu.set_sregs(&sregs)?;
    vcpu.set_regs(&kvm_regs {
        rip: address,
        rsi: zero_page,
        rflags: 2,
        ..Default::default()
    })?;
    Ok(())
}
