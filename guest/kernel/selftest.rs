//! Does this machine do what a guest relies on?

use core::hint::black_box;
use core::sync::atomic::Ordering::Relaxed;

use crate::boot::MAP_LIMIT;
use crate::clock;
use crate::cpu;
use crate::line::{Check, FailedChecks};

const NAPS: u64 = 5;
const NAP_US: u64 = 2000;

/// Runs all checks, on this vCPU.
pub fn run() -> FailedChecks {
    let mut failed = FailedChecks::default();
    let mut check = |what, passed: bool| {
        if !passed {
            failed.insert(what);
        }
    };
    let [read, privileged, invalid] = cpu::probes(MAP_LIMIT);
    check(Check::PageFault, read == 14);
    check(Check::GeneralProtection, privileged == 13);
    check(Check::InvalidOpcode, invalid == 6);

    // The same sum with interrupts in between must have the same bits: a host that loses
    // floating-point state on an exit changes them.
    let undisturbed = sum();
    let (tsc, clock) = (cpu::rdtsc(), cpu::this().clock.now());
    let counted = cpu::this().interrupts.load(Relaxed);
    let mut on_time = true;
    for _ in 0..NAPS {
        let deadline = cpu::rdtsc() + clock::us_to_tsc(NAP_US);
        while cpu::rdtsc() < deadline {
            cpu::sleep_until(deadline);
        }
        // With an interrupt in the middle.
        crate::apic::arm_timer(100_000);
        on_time &= sum().to_bits() == undisturbed.to_bits();
    }
    check(
        Check::FloatingPoint,
        on_time && (undisturbed - SUM).abs() < 1e-9,
    );
    let counted = cpu::this().interrupts.load(Relaxed) - counted;
    check(Check::Interrupts, counted >= NAPS);
    let by_tsc = clock::tsc_to_ns(cpu::rdtsc() - tsc);
    let by_clock = match (clock, cpu::this().clock.now()) {
        (Some(before), Some(after)) => after.saturating_sub(before),
        _ => by_tsc,
    };
    let apart = by_tsc.abs_diff(by_clock);
    check(
        Check::Clocks,
        by_tsc >= NAPS * NAP_US * 1000 && apart < by_tsc / 10 + 1_000_000,
    );
    failed
}

/// The sum of 1/k² up to 100,000.
const SUM: f64 = 1.644_924_066_898_2;

fn sum() -> f64 {
    (1..=100_000_u32)
        .rev()
        .map(|k| black_box(1.0 / (f64::from(k) * f64::from(k))))
        .sum()
}
