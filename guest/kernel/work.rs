//! The workloads, each vCPU's share of them.

use core::mem::MaybeUninit;
use core::ptr;
use core::sync::atomic::{
    AtomicPtr, AtomicU32, AtomicU64,
    Ordering::{Acquire, Relaxed, Release},
};

use crate::Blocks;
use crate::acpi::Platform;
use crate::apic;
use crate::attack::Attacker;
use crate::boot::Ram;
use crate::clock;
use crate::cpu::{self, Block};
use crate::io::{self, Io};
use crate::line::{Line, CommandError};
use crate::options::{Options, Order, Workload};
use crate::pattern::{self, PAGE_SIZE, Page};
use crate::selftest;
use crate::serial;
use crate::service::Service;
use crate::vsock::Vsock;

const PAGES_PER_MIB: u64 = (1 << 20) / PAGE_SIZE as u64;
/// The number of increments by each vCPU in [`Workload::Smp`].
pub const SMP_COUNTS: u64 = 100_000;

/// All that the vCPUs share.
pub struct Work {
    pub options: Options,
    pub platform: Platform,
    pub ram: Ram,
    pub blocks: Blocks,
    /// When it began.
    pub began: u64,
    /// Requests to verify; each vCPU answers the newest in its block.
    pub verify: AtomicU32,
    /// The counter that all vCPUs share in [`Workload::Smp`].
    pub counter: AtomicU64,
}

static WORK: AtomicPtr<Work> = AtomicPtr::new(ptr::null_mut());

/// Lets the vCPUs begin.
pub fn publish(options: Options, platform: Platform, ram: Ram, blocks: Blocks) {
    static mut STORE: MaybeUninit<Work> = MaybeUninit::uninit();
    let work = Work {
        options,
        platform,
        ram,
        blocks,
        began: cpu::rdtsc(),
        verify: AtomicU32::new(0),
        counter: AtomicU64::new(0),
    };
    let store = (&raw mut STORE).cast::<Work>();
    // SAFETY: called once, before anybody looks.
    unsafe { store.write(work) };
    // Released after all fields are written: a CPU that sees the pointer sees the work.
    WORK.store(store, Release);
    apic::wake_others();
}

/// The work, once there is some.
pub fn published() -> Option<&'static Work> {
    // SAFETY: null, or written once and never again.
    unsafe { WORK.load(Acquire).as_ref() }
}

impl Work {
    /// Pages that the workload writes to.
    fn region(&self) -> Result<u64, CommandError> {
        let free = self.ram.pages();
        match self.options.workload {
            Workload::Dirty {
                region_mib: Some(mib),
                ..
            } => match mib.checked_mul(PAGES_PER_MIB) {
                Some(pages) if pages <= free => Ok(pages),
                _ => Err(CommandError::Memory(free / PAGES_PER_MIB)),
            },
            Workload::Dirty { .. } | Workload::Touch => Ok(free),
            _ => Ok(0),
        }
    }

    /// Writes so far, of pages or to the port; or rounds of an attack.
    pub fn writes(&self) -> u64 {
        self.blocks.iter().map(|cpu| cpu.writes.load(Relaxed)).sum()
    }
}

/// Does the work, as this vCPU's share of it; the first one serves the host, too.
pub fn run(work: &'static Work) -> ! {
    let mut service = (cpu::this().index == 0).then(|| Service::new(work));
    let mut worker = Worker::new(work);
    loop {
        let now = cpu::look();
        let wake = match &mut service {
            Some(service) => service.serve(now),
            None => now + clock::us_to_tsc(1_000_000),
        };
        worker.answer_verify();
        match worker.step(now) {
            Step::Busy => {}
            Step::Until(deadline) => cpu::sleep_until(deadline.min(wake)),
            Step::Idle => cpu::sleep_until(wake),
        }
    }
}

/// The next action of a vCPU after a step.
enum Step {
    Busy,
    Until(u64),
    Idle,
}

/// One vCPU's share.
struct Worker {
    work: &'static Work,
    cpu: &'static Block,
    /// Its pages: so many, from this one on, visited in strides.
    first: u64,
    slots: u64,
    stride: u64,
    /// From when on it keeps its rate, and how many writes it had made then.
    paced_from: (u64, u64),
    io: Option<Io>,
    attacker: Option<Attacker>,
    vsock: Option<Vsock>,
}

impl Worker {
    fn new(work: &'static Work) -> Self {
        let cpu = cpu::this();
        let region = work.region().unwrap_or_else(|what| {
            if cpu.index == 0 {
                serial::say(&Line::Refused { what });
            }
            0
        });
        let (index, cpus) = (u64::from(cpu.index), u64::from(work.blocks.count()));
        // Shares differ by a page at most, and cover the region without gaps.
        let first = region * index / cpus;
        let slots = region * (index + 1) / cpus - first;
        let stride = match work.options.workload {
            Workload::Dirty {
                order: Order::Scattered,
                ..
            } => scattering_stride(slots),
            _ => 1,
        };
        let paced_from = (cpu::rdtsc(), 0);
        let is_peer = matches!(work.options.workload, Workload::Vsock) && cpu.index == 0;
        let vsock = is_peer.then(|| Vsock::start(&work.ram)).flatten();
        Self {
            work,
            cpu,
            first,
            slots,
            stride,
            paced_from,
            io: None,
            attacker: None,
            vsock,
        }
    }

    fn step(&mut self, now: u64) -> Step {
        if self.cpu.done.load(Relaxed) {
            return Step::Idle;
        }
        match self.work.options.workload {
            Workload::Idle | Workload::Crash(_) => Step::Idle,
            Workload::Spin => Step::Busy,
            Workload::Dirty { rate, .. } => self.dirty(now, rate),
            Workload::Touch => {
                let left = self.slots - self.cpu.writes.load(Relaxed).min(self.slots);
                self.write_pages(left.min(32));
                self.finish_if(left <= 32)
            }
            Workload::Exits { port, count } => {
                // In port 0x80's tradition the value means nothing.
                let left = count - self.cpu.writes.load(Relaxed).min(count);
                // Few at a time, so that the first CPU still answers commands between them.
                for _ in 0..left.min(16) {
                    cpu::out8(port, 0);
                    cpu::look();
                }
                self.cpu.writes.fetch_add(left.min(16), Relaxed);
                self.finish_if(left <= 16)
            }
            Workload::Smp => {
                for _ in 0..SMP_COUNTS {
                    self.work.counter.fetch_add(1, Relaxed);
                }
                self.finish_if(true)
            }
            Workload::Io => self.drive_devices(now),
            Workload::Vsock => match self.vsock.as_mut().map(Vsock::step) {
                None => Step::Idle,
                Some(true) => Step::Busy,
                // Many guests may wait at a time, and each look is an exit or two.
                Some(false) => Step::Until(now + clock::us_to_tsc(5000)),
            },
            Workload::Attack(attack) => {
                if self.cpu.index != 0 {
                    return Step::Idle;
                }
                let work = self.work;
                let attacker = self
                    .attacker
                    .get_or_insert_with(|| Attacker::new(attack, &work.ram));
                attacker.step();
                self.cpu.writes.fetch_add(1, Relaxed);
                cpu::look();
                Step::Busy
            }
            Workload::Queues => {
                if self.cpu.index == 0 {
                    serial::say(&io::start_all(&self.work.ram));
                }
                self.finish_if(true)
            }
            Workload::SelfTest => {
                if self.cpu.index == 0 {
                    serial::say(&Line::SelfTest {
                        failed: selftest::run(),
                    });
                }
                self.finish_if(true)
            }
        }
    }

    fn drive_devices(&mut self, now: u64) -> Step {
        if self.cpu.index != 0 {
            return Step::Idle;
        }
        let work = self.work;
        let io = self.io.get_or_insert_with(|| Io::start(&work.ram));
        if io.step() {
            Step::Busy
        } else {
            Step::Until(now + clock::us_to_tsc(50))
        }
    }

    fn finish_if(&self, done: bool) -> Step {
        self.cpu.done.store(done, Release);
        Step::Busy
    }

    fn dirty(&mut self, now: u64, rate: Option<u64>) -> Step {
        if self.slots == 0 {
            return Step::Idle;
        }
        let Some(rate) = rate else {
            self.write_pages(32);
            return Step::Busy;
        };
        let (index, cpus) = (
            u64::from(self.cpu.index),
            u64::from(self.work.blocks.count()),
        );
        let rate = rate / cpus + u64::from(index < rate % cpus);
        let (from, had) = self.paced_from;
        let written = self.cpu.writes.load(Relaxed) - had;
        // 128 bits: nanoseconds of days times a rate exceed 64.
        let due = u128::from(clock::tsc_to_ns(now.saturating_sub(from))) * u128::from(rate);
        let due = (due / 1_000_000_000) as u64;
        if due > written.saturating_add(rate) {
            // More than a second behind: it was stopped, or the rate is too high. No catching up.
            self.paced_from = (now, self.cpu.writes.load(Relaxed));
            return Step::Busy;
        }
        if due <= written {
            return Step::Until(now + clock::us_to_tsc(1000));
        }
        self.write_pages((due - written).min(32));
        Step::Busy
    }

    fn write_pages(&self, count: u64) {
        for _ in 0..count {
            let writes = self.cpu.writes.load(Relaxed);
            let addr = self.page(writes % self.slots);
            // SAFETY: free memory that is this vCPU's share.
            let page = unsafe { &mut *ptr::with_exposed_provenance_mut::<Page>(addr as usize) };
            pattern::fill(page, addr, writes / self.slots + 1);
            self.cpu.writes.store(writes + 1, Relaxed);
            cpu::look();
        }
    }

    fn page(&self, slot: u64) -> u64 {
        let index = u128::from(slot) * u128::from(self.stride) % u128::from(self.slots);
        self.work.ram.page(self.first + index as u64)
    }

    /// Checks this vCPU's share, if that was asked for.
    fn answer_verify(&self) {
        let asked = self.work.verify.load(Acquire);
        if asked == self.cpu.verified.load(Relaxed) {
            return;
        }
        let counts_pages = matches!(
            self.work.options.workload,
            Workload::Dirty { .. } | Workload::Touch
        );
        let writes = if counts_pages {
            self.cpu.writes.load(Relaxed)
        } else {
            0
        };
        let written = writes.min(self.slots);
        let (mut bad, mut first_bad) = (0, u64::MAX);
        for slot in 0..written {
            let addr = self.page(slot);
            // SAFETY: as in `write_pages`.
            let page = unsafe { &*ptr::with_exposed_provenance::<Page>(addr as usize) };
            if !pattern::matches(page, addr, pattern::generation(writes, slot, self.slots)) {
                bad += 1;
                first_bad = first_bad.min(addr);
            }
            cpu::look();
        }
        self.cpu.verified_pages.store(written, Relaxed);
        self.cpu.verified_bad.store(bad, Relaxed);
        self.cpu.verified_first.store(first_bad, Relaxed);
        // The number last, with release: the first CPU reads the results once it sees the number.
        self.cpu.verified.store(asked, Release);
    }
}

/// A stride that visits all slots, far from each other: near the golden section, and prime to
/// their number.
fn scattering_stride(slots: u64) -> u64 {
    let near = slots / 1000 * 618 + slots % 1000 * 618 / 1000;
    (near.max(1)..)
        .find(|stride| gcd(*stride, slots) == 1)
        .unwrap_or(1)
}

fn gcd(mut a: u64, mut b: u64) -> u64 {
    while b != 0 {
        (a, b) = (b, a % b);
    }
    a
}
