//! CPUs: the block that each has, what only ring 0 can do for it, exceptions, time and sleep.

use core::arch::{asm, x86_64};
use core::mem::offset_of;
use core::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering::Relaxed};

use crate::apic;
use crate::boot::MAP_LIMIT;
use crate::clock;
use crate::line::{Address, Line};
use crate::serial;

/// Bytes of a CPU's block, and its alignment.
pub const BLOCK_SIZE: u64 = 0x10000;

/// The data of one CPU. Its stacks are in the same 64 KiB. entry.s uses the first fields.
#[repr(C, align(0x1000))]
pub struct Block {
    pub interrupts: AtomicU64,
    pub nmis: AtomicU64,
    pub entry: u64,
    pub start_info: u64,
    /// Number in this guest, from 0.
    pub index: u32,
    pub apic_id: u32,
    pub up: AtomicBool,
    /// Writes made by this CPU in the order of its slots.
    pub writes: AtomicU64,
    /// The clocks when it last looked, and the largest gaps since they were reported.
    pub seen_tsc: AtomicU64,
    pub seen_clock: AtomicU64,
    pub gap_tsc: AtomicU64,
    pub gap_clock_ns: AtomicU64,
    /// The last request to verify that it has answered, and the answer.
    pub verified: AtomicU32,
    pub verified_bad: AtomicU64,
    pub verified_pages: AtomicU64,
    pub verified_first: AtomicU64,
    /// Its finite work is done.
    pub done: AtomicBool,
    _room: [u8; 0x377],
    _gdt_and_tss: [u8; 0xd0],
    pub clock: clock::KvmClock,
}

/// Fields of entry.s, from here up to the clock.
pub const GDTR_OFFSET: usize = 0x3f0;
/// Offset of the I/O permission bitmap. (IOPL 3 would do as well on hardware, but not on hosts that
/// run ring 3 as their own user mode and look ports up in the bitmap.)
pub const PORTS_OFFSET: usize = 0x3000;

const _: () = {
    assert!(offset_of!(Block, start_info) == 0x18);
    assert!(offset_of!(Block, _gdt_and_tss) == GDTR_OFFSET && offset_of!(Block, clock) == 0x4c0);
    assert!(size_of::<Block>() == 0x1000);
};

/// This CPU's block: where its stack is.
pub fn this() -> &'static Block {
    let sp: u64;
    // SAFETY: reads a register.
    unsafe { asm!("mov {}, rsp", out(reg) sp, options(nomem, nostack, preserves_flags)) };
    // SAFETY: each stack is in its CPU's block, which lives for ever; what changes is atomic.
    unsafe { &*((sp & !(BLOCK_SIZE - 1)) as *const Block) }
}

/// Calls of entry.s's `ring0_gate`.
#[derive(Clone, Copy)]
enum Ring0 {
    Halt = 0,
    WriteMsr = 1,
    Cpuid = 2,
    TripleFault = 3,
    Emulation = 4,
}

struct Regs {
    a: u32,
    b: u32,
    c: u32,
    d: u32,
}

fn ring0(call: Ring0, counted: u64, regs: Regs) -> Regs {
    let Regs {
        mut a,
        b,
        mut c,
        mut d,
    } = regs;
    let mut b = u64::from(b);
    // SAFETY: the gate changes these registers alone. LLVM keeps RBX for itself.
    unsafe {
        asm!("xchg rbx, {b}", "call ring0_gate", "xchg rbx, {b}", b = inout(reg) b,
            inout("eax") a, inout("ecx") c, inout("edx") d, in("rdi") counted,
            in("r8") call as u64);
    }
    let b = b as u32;
    Regs { a, b, c, d }
}

const NONE: Regs = Regs {
    a: 0,
    b: 0,
    c: 0,
    d: 0,
};

pub fn write_msr(msr: u32, value: u64) {
    let (a, d) = (value as u32, (value >> 32) as u32);
    ring0(
        Ring0::WriteMsr,
        0,
        Regs {
            a,
            c: msr,
            d,
            ..NONE
        },
    );
}

/// CPUID as ring 0 sees it: EAX, EBX, ECX, EDX. (Ring 3 may see the host's.)
pub fn cpuid(leaf: u32) -> [u32; 4] {
    let Regs { a, b, c, d } = ring0(Ring0::Cpuid, 0, Regs { a: leaf, ..NONE });
    [a, b, c, d]
}

pub fn triple_fault() -> ! {
    ring0(Ring0::TripleFault, 0, NONE);
    stop()
}

pub fn emulation_failure() -> ! {
    ring0(Ring0::Emulation, 0, NONE);
    stop()
}

/// Halts until an interrupt comes, if none has come since `counted` of them had.
pub fn halt(counted: u64) {
    ring0(Ring0::Halt, counted, NONE);
}

/// Halts for good.
pub fn stop() -> ! {
    loop {
        halt(this().interrupts.load(Relaxed));
    }
}

/// Starts looking for gaps.
pub fn start_looking() {
    look();
    this().gap_tsc.store(0, Relaxed);
    this().gap_clock_ns.store(0, Relaxed);
}

/// Looks at the clocks, and remembers the largest gap since it looked last.
pub fn look() -> u64 {
    let cpu = this();
    let tsc = rdtsc();
    let gap = tsc.saturating_sub(cpu.seen_tsc.load(Relaxed));
    cpu.seen_tsc.store(tsc, Relaxed);
    cpu.gap_tsc.fetch_max(gap, Relaxed);
    if let Some(now) = cpu.clock.now() {
        let gap = now.saturating_sub(cpu.seen_clock.load(Relaxed));
        cpu.seen_clock.store(now, Relaxed);
        cpu.gap_clock_ns.fetch_max(gap, Relaxed);
    }
    tsc
}

/// Halts until the TSC is `deadline`, or another interrupt comes. The time slept is no gap.
pub fn sleep_until(deadline: u64) {
    let cpu = this();
    let counted = cpu.interrupts.load(Relaxed);
    let now = look();
    let Some(left) = deadline.checked_sub(now).filter(|left| *left > 0) else {
        return;
    };
    // Before the halt, and with `counted` from before that: an interrupt in between changes the
    // count, and ring 0 does not halt.
    apic::arm_timer(clock::tsc_to_ns(left));
    halt(counted);
    let woken = rdtsc();
    let slept = woken.min(deadline).saturating_sub(now);
    // The clock moves on by the sleep that was asked for. What the CPU slept longer stays a gap:
    // the host did not wake it in time.
    cpu.seen_tsc.store(now + slept, Relaxed);
    cpu.seen_clock.fetch_add(clock::tsc_to_ns(slept), Relaxed);
    look();
}

pub fn rdtsc() -> u64 {
    // SAFETY: reads a counter.
    unsafe { x86_64::_rdtsc() }
}

pub fn out8(port: u16, value: u8) {
    // SAFETY: devices of this guest cannot touch its memory through a port.
    unsafe { asm!("out dx, al", in("dx") port, in("al") value, options(nostack, nomem)) };
}

pub fn out16(port: u16, value: u16) {
    // SAFETY: as above.
    unsafe { asm!("out dx, ax", in("dx") port, in("ax") value, options(nostack, nomem)) };
}

pub fn out32(port: u16, value: u32) {
    // SAFETY: ports do not touch memory.
    unsafe { asm!("out dx, eax", in("dx") port, in("eax") value, options(nostack, nomem)) };
}

pub fn in32(port: u16) -> u32 {
    let value;
    // SAFETY: as above.
    unsafe { asm!("in eax, dx", in("dx") port, out("eax") value, options(nostack, nomem)) };
    value
}

pub fn in8(port: u16) -> u8 {
    let value;
    // SAFETY: as above.
    unsafe { asm!("in al, dx", in("dx") port, out("al") value, options(nostack, nomem)) };
    value
}

unsafe extern "C" {
    fn exception_stubs();
    fn interrupt();
    fn interrupt_spurious();
    fn probe_read(address: u64) -> u64;
    fn probe_privileged() -> u64;
    fn probe_invalid() -> u64;
}

/// The vector of the exception that each probe raises; all ones where it raised none.
pub fn probes(unmapped: u64) -> [u64; 3] {
    // SAFETY: entry.s recovers from each at a known address.
    unsafe { [probe_read(unmapped), probe_privileged(), probe_invalid()] }
}

/// Reads from where nothing is, and does not recover.
pub fn fault() {
    // SAFETY: it is not; the exception is what is asked for.
    unsafe { asm!("mov {0}, qword ptr [{0}]", inout(reg) MAP_LIMIT => _, options(nostack)) };
}

/// Vector of the local APIC's timer, of the serial port and of wake-ups: all are only counted.
pub const VECTOR: u8 = 0x20;
/// Vector of spurious interrupts.
pub const VECTOR_SPURIOUS: u8 = 0xff;

#[repr(C, align(16))]
struct Idt([[u64; 2]; 256]);

#[unsafe(no_mangle)]
static mut IDT: Idt = Idt([[0; 2]; 256]);

/// Fills the interrupt descriptor table that all CPUs share.
pub fn fill_idt() {
    let gate = |handler: u64| {
        // An interrupt gate for code segment 0x10, ring 0 only.
        // Type 14, present, DPL 0 (Intel SDM volume 3A, 6.11). Without an IST each handler runs on
        // ring 0's stack of the TSS.
        let low = handler & 0xffff | 0x10 << 16 | 0x8e00 << 32 | (handler & 0xffff_0000) << 32;
        [low, handler >> 32]
    };
    // SAFETY: nothing else writes it, and no interrupt comes before there is an APIC.
    let idt = unsafe { &mut *(&raw mut IDT) };
    for (vector, entry) in idt.0.iter_mut().enumerate() {
        *entry = match vector {
            0..32 => gate(exception_stubs as *const () as u64 + 16 * vector as u64),
            0xff => gate(interrupt_spurious as *const () as u64),
            _ => gate(interrupt as *const () as u64),
        };
    }
}

/// Called by entry.s for an exception that no probe raised.
#[unsafe(no_mangle)]
extern "C" fn unexpected_exception(vector: u64, code: u64, rip: u64, cr2: u64) -> ! {
    serial::say(&Line::Fault {
        cpu: this().index,
        vector,
        code: Address(code),
        rip: Address(rip),
        address: Address(cr2),
    });
    stop()
}
