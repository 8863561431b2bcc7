//! The pocket guest's kernel. `../src/lib.rs` says what it does; entry.s is its ring 0.

#![no_std]
#![no_main]
#![warn(unsafe_op_in_unsafe_fn)]

mod acpi;
mod apic;
mod attack;
mod boot;
mod clock;
mod cpu;
mod io;
mod runtime;
mod selftest;
mod serial;
mod service;
mod tpm;
mod virtio;
mod vsock;
mod work;

#[allow(dead_code, reason = "the host's half of the vocabulary")]
#[path = "../src/line.rs"]
mod line;
#[allow(unused, reason = "the host's half of the vocabulary")]
#[path = "../src/names.rs"]
mod names;
#[allow(dead_code, reason = "the host's half of the vocabulary")]
#[path = "../src/options.rs"]
mod options;
#[path = "../src/pattern.rs"]
mod pattern;

pub use line::Line;
pub use options::Options;

use core::ptr;
use core::sync::atomic::Ordering::{Acquire, Relaxed, Release};

use acpi::{Platform, Register};
use boot::{Handover, Ram};
use cpu::{BLOCK_SIZE, Block};
use line::CommandError;
use options::MAX_CPUS;

core::arch::global_asm!(include_str!("entry.s"));

unsafe extern "C" {
    static trampoline: u8;
    static trampoline_end: u8;
    static mut ap_block: u64;
}

/// The start address of other CPUs: a page below 1 MiB that VMMs do not use.
const TRAMPOLINE_PAGE: u8 = 0x10;
const GIB: u64 = 1 << 30;
const MIB: u64 = 1 << 20;

/// Ring 3 of the first CPU.
#[unsafe(no_mangle)]
extern "C" fn first_cpu_main(block: *mut Block) -> ! {
    // SAFETY: entry.s has set these two; no reference to the block exists yet.
    let start_info = unsafe { (*block).start_info };
    // SAFETY: as above.
    unsafe { clear_block(block, 0, 0) };
    cpu::fill_idt();
    let mut handover = Handover::read(start_info);
    let options = Options::parse(handover.cmdline());
    let refused = options.err();
    let options = options.unwrap_or_default();
    let (tsc_khz, tsc_from) = clock::start(options.tsc_khz);
    let mut platform = Platform::read(handover.rsdp);
    platform.sleep = options.sleep_port.map(Register::Port8).or(platform.sleep);
    platform.reset = options.reset_port.map(Register::Port8).or(platform.reset);
    let cpus = options.cpus.unwrap_or(platform.cpus).clamp(1, MAX_CPUS);
    let ram_mib = handover.ram.total / MIB;
    serial::say(&Line::Hello {
        cpus,
        ram_mib,
        tsc_khz,
        tsc_from,
    });
    if let Some(error) = refused {
        serial::say(&Line::Refused { what: error.into() });
    }

    apic::mask_pics();
    apic::enable();
    serial::start(platform.apic_ids[0]);
    let blocks = start_others(&platform, cpus, &mut handover.ram);
    let free_mib = handover.ram.pages() * 4096 / MIB;
    serial::say(&Line::Ready {
        cpus: blocks.count as u32,
        free_mib,
    });
    work::publish(options, platform, handover.ram, blocks);
    begin()
}

/// The blocks of the CPUs that are up.
pub struct Blocks {
    blocks: [Option<&'static Block>; MAX_CPUS as usize],
    count: usize,
}

impl Blocks {
    pub fn iter(&self) -> impl Iterator<Item = &'static Block> + '_ {
        self.blocks.iter().flatten().copied()
    }

    pub fn count(&self) -> u32 {
        self.count as u32
    }
}

fn start_others(platform: &Platform, cpus: u32, ram: &mut Ram) -> Blocks {
    let mut blocks = Blocks {
        blocks: [None; MAX_CPUS as usize],
        count: 1,
    };
    blocks.blocks[0] = Some(cpu::this());
    if cpus > 1 {
        // SAFETY: copies code to a page that nothing else uses.
        unsafe {
            let len = (&raw const trampoline_end).offset_from(&raw const trampoline) as usize;
            let to = ptr::with_exposed_provenance_mut(usize::from(TRAMPOLINE_PAGE) << 12);
            ptr::copy_nonoverlapping(&raw const trampoline, to, len);
        }
    }
    for &apic_id in platform.apic_ids.iter().take(cpus as usize).skip(1) {
        let Some(address) = ram.take(BLOCK_SIZE, GIB) else {
            serial::say(&Line::Refused {
                what: CommandError::Memory(BLOCK_SIZE.div_ceil(MIB)),
            });
            break;
        };
        let block = ptr::with_exposed_provenance_mut::<Block>(address as usize);
        // SAFETY: free memory, ours now; the CPU that is started is given it alone.
        let is_up = unsafe {
            clear_block(block, blocks.count as u32, apic_id);
            (*block).entry = other_cpu_main as *const () as u64;
            // Read by the CPU that is started, which has no other way to find its block. One CPU
            // starts at a time.
            (&raw mut ap_block).write_volatile(address);
            &(*block).up
        };
        if !apic::start(apic_id, TRAMPOLINE_PAGE, || is_up.load(Acquire)) {
            serial::say(&Line::Refused {
                what: CommandError::Cpu(apic_id),
            });
            continue;
        }
        // SAFETY: from here on only atomics of it change.
        blocks.blocks[blocks.count] = Some(unsafe { &*block });
        blocks.count += 1;
    }
    blocks
}

/// # Safety
/// `block` is valid and exclusively ours. The fields of entry.s keep their values.
unsafe fn clear_block(block: *mut Block, index: u32, apic_id: u32) {
    // SAFETY: the caller's promise; all zeros is a valid block.
    unsafe {
        let bytes = block.cast::<u8>();
        bytes.write_bytes(0, cpu::GDTR_OFFSET);
        bytes.add(cpu::PORTS_OFFSET).write_bytes(0, 0x10000 / 8);
        // The processor reads bits by twos of bytes; the last one's second belongs to no port.
        bytes.add(cpu::PORTS_OFFSET + 0x10000 / 8).write(0xff);
        (&raw mut (*block).clock).write_bytes(0, 1);
        (*block).index = index;
        (*block).apic_id = apic_id;
    }
}

/// Ring 3 of the others. Entered by `iretq`, not by a call: the stack is set right first.
#[unsafe(naked)]
extern "C" fn other_cpu_main() -> ! {
    core::arch::naked_asm!("call {}", "ud2", sym other_cpu)
}

extern "C" fn other_cpu() -> ! {
    let cpu = cpu::this();
    apic::enable();
    cpu.clock.register();
    cpu.up.store(true, Release);
    begin()
}

/// Works, as soon as there is work. Until then it is halted, so that it does not keep others from
/// starting where CPUs are few.
fn begin() -> ! {
    let work = loop {
        let counted = cpu::this().interrupts.load(Relaxed);
        match work::published() {
            Some(work) => break work,
            None => cpu::halt(counted),
        }
    };
    cpu::start_looking();
    work::run(work)
}
