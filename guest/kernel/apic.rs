//! The local APIC (Intel SDM volume 3, chapter "Advanced Programmable Interrupt Controller"), the
//! I/O APIC's pin for the serial port, and starting other CPUs. All through MMIO, from ring 3.

use core::ptr;

use crate::clock;
use crate::cpu::{self, VECTOR, VECTOR_SPURIOUS};

const LOCAL_APIC: u64 = 0xfee0_0000;
const SPURIOUS: u64 = 0xf0;
const COMMAND_LOW: u64 = 0x300;
const COMMAND_HIGH: u64 = 0x310;
const LVT_TIMER: u64 = 0x320;
const TIMER_COUNT: u64 = 0x380;
const TIMER_DIVIDE: u64 = 0x3e0;
const LVT_LINT0: u64 = 0x350;
const MASKED: u32 = 1 << 16;

const INIT: u32 = 0x4500;
const STARTUP: u32 = 0x4600;
const ALL_BUT_SELF: u32 = 0xc_4000;

const IO_APIC: u64 = 0xfec0_0000;
const IO_APIC_REDIRECTION: u32 = 0x10;

fn write(register: u64, value: u32) {
    // SAFETY: the local APIC's page is mapped, and its registers do not touch memory.
    unsafe {
        ptr::with_exposed_provenance_mut::<u32>((LOCAL_APIC + register) as usize)
            .write_volatile(value)
    };
}

/// Turns this CPU's on.
pub fn enable() {
    // The VMM leaves the PIC's output here, as firmware does. Its interrupts have no handler.
    write(LVT_LINT0, MASKED);
    write(SPURIOUS, 0x100 | u32::from(VECTOR_SPURIOUS));
    write(TIMER_DIVIDE, 0b1011);
    write(LVT_TIMER, u32::from(VECTOR));
}

/// Interrupts this CPU once, in so many nanoseconds (or in 4 s, if that is sooner). KVM's APIC
/// bus has 1 GHz.
pub fn arm_timer(ns: u64) {
    write(
        TIMER_COUNT,
        u32::try_from(ns)
            .unwrap_or(u32::MAX)
            .clamp(1, 4_000_000_000),
    );
}

/// Masks the old interrupt controllers, where there are any.
pub fn mask_pics() {
    cpu::out8(0x21, 0xff);
    cpu::out8(0xa1, 0xff);
}

/// Sends a pin of the I/O APIC to a CPU: edge-triggered, active high.
pub fn route(pin: u32, apic_id: u32) {
    let set = |register: u32, value: u32| {
        // SAFETY: as for the local APIC.
        unsafe {
            ptr::with_exposed_provenance_mut::<u32>(IO_APIC as usize).write_volatile(register);
            ptr::with_exposed_provenance_mut::<u32>(IO_APIC as usize + 0x10).write_volatile(value);
        }
    };
    // The destination before the half that unmasks the pin.
    set(IO_APIC_REDIRECTION + 2 * pin + 1, apic_id << 24);
    set(IO_APIC_REDIRECTION + 2 * pin, u32::from(VECTOR));
}

/// Wakes all other CPUs.
pub fn wake_others() {
    write(COMMAND_LOW, ALL_BUT_SELF | u32::from(VECTOR));
}

/// Starts a CPU in real mode at `page << 12`, as the MP specification says: INIT, STARTUP twice
/// where once is not enough.
pub fn start(apic_id: u32, page: u8, is_up: impl Fn() -> bool) -> bool {
    let send = |command| {
        write(COMMAND_HIGH, apic_id << 24);
        write(COMMAND_LOW, command);
    };
    send(INIT);
    // Intel SDM volume 3A, "MP Initialization Protocol", asks for 10 ms on hardware. A virtual APIC
    // needs no time.
    wait(10, || false);
    send(STARTUP | u32::from(page));
    if wait(20_000, &is_up) {
        return true;
    }
    send(STARTUP | u32::from(page));
    if wait(5_000_000, is_up) {
        return true;
    }
    // Should it come late, it would take what is given to the next one.
    send(INIT);
    false
}

/// Waits until it is so, at most so many microseconds.
fn wait(us: u64, until: impl Fn() -> bool) -> bool {
    let end = cpu::rdtsc() + clock::us_to_tsc(us);
    while !until() {
        if cpu::rdtsc() > end {
            return false;
        }
        core::hint::spin_loop();
    }
    true
}
