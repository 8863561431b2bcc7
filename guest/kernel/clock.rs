//! Time: the TSC, its frequency, and kvmclock.

use core::ptr;
use core::sync::atomic::{AtomicU64, Ordering::Relaxed};

use crate::cpu;
use crate::line::TscSource;

static TSC_KHZ: AtomicU64 = AtomicU64::new(1_000_000);
static STARTED: AtomicU64 = AtomicU64::new(0);

const MSR_KVM_SYSTEM_TIME_NEW: u32 = 0x4b56_4d01;
const CPUID_KVM_SIGNATURE: u32 = 0x4000_0000;
const CPUID_KVM_FEATURES: u32 = 0x4000_0001;
const KVM_FEATURE_CLOCKSOURCE2: u32 = 1 << 3;

/// `struct pvclock_vcpu_time_info`, which KVM writes.
#[repr(C, align(64))]
pub struct KvmClock {
    version: u32,
    _pad: u32,
    tsc_timestamp: u64,
    system_time: u64,
    tsc_to_system_mul: u32,
    tsc_shift: i8,
    flags: u8,
    _pad2: [u8; 2],
}

impl KvmClock {
    /// Asks KVM to write this CPU's.
    pub fn register(&self) {
        let [_, b, c, d] = cpu::cpuid(CPUID_KVM_SIGNATURE);
        let is_kvm = [b, c, d] == [*b"KVMK", *b"VMKV", *b"M\0\0\0"].map(u32::from_le_bytes);
        if is_kvm && cpu::cpuid(CPUID_KVM_FEATURES)[0] & KVM_FEATURE_CLOCKSOURCE2 != 0 {
            cpu::write_msr(MSR_KVM_SYSTEM_TIME_NEW, ptr::from_ref(self) as u64 | 1);
        }
    }

    /// A consistent copy; nothing where KVM writes none.
    fn read(&self) -> Option<Self> {
        loop {
            // SAFETY: plain data; KVM marks what it is about to change with an odd version.
            // The version is read again behind the copy: equal and even means that KVM changed
            // nothing in between (KVM, MSR_KVM_SYSTEM_TIME_NEW).
            let copy = unsafe { ptr::from_ref(self).read_volatile() };
            // SAFETY: as above.
            let version = unsafe { (&raw const self.version).read_volatile() };
            if copy.version == 0 || copy.tsc_to_system_mul == 0 {
                return None;
            }
            if copy.version == version && version % 2 == 0 {
                return Some(copy);
            }
        }
    }

    /// Nanoseconds.
    pub fn now(&self) -> Option<u64> {
        let clock = self.read()?;
        // Saturating: after a migration the TSC may be a little behind the moment of the
        // parameters.
        let delta = cpu::rdtsc().saturating_sub(clock.tsc_timestamp);
        let delta = shifted(delta, clock.tsc_shift);
        let scaled = u128::from(delta) * u128::from(clock.tsc_to_system_mul) >> 32;
        Some(clock.system_time.wrapping_add(scaled as u64))
    }

    /// The TSC's frequency that the parameters tell, in kHz.
    fn tsc_khz(&self) -> Option<u64> {
        let clock = self.read()?;
        let khz = (1_000_000_u64 << 32) / u64::from(clock.tsc_to_system_mul);
        Some(shifted(khz, clock.tsc_shift.saturating_neg()))
    }
}

fn shifted(value: u64, by: i8) -> u64 {
    let places = u32::from(by.unsigned_abs());
    if by < 0 {
        value.checked_shr(places).unwrap_or(0)
    } else {
        value.checked_shl(places).unwrap_or(0)
    }
}

/// Finds the TSC's frequency out.
pub fn start(option: Option<u32>) -> (u64, TscSource) {
    let clock = &cpu::this().clock;
    clock.register();
    let (khz, source) = option
        .map(|khz| (u64::from(khz), TscSource::Option))
        .or_else(|| Some((cpuid_tsc_khz()?, TscSource::CpuidTsc)))
        .or_else(|| Some((cpuid_hypervisor_khz()?, TscSource::CpuidHypervisor)))
        .or_else(|| Some((clock.tsc_khz()?, TscSource::KvmClock)))
        .filter(|(khz, _)| *khz > 0)
        .unwrap_or((1_000_000, TscSource::Assumed));
    TSC_KHZ.store(khz, Relaxed);
    STARTED.store(cpu::rdtsc(), Relaxed);
    (khz, source)
}

fn cpuid_tsc_khz() -> Option<u64> {
    if cpu::cpuid(0)[0] < 0x15 {
        return None;
    }
    let [denominator, numerator, crystal_hz, _] = cpu::cpuid(0x15).map(u64::from);
    let hz = (crystal_hz * numerator).checked_div(denominator)?;
    Some(hz / 1000).filter(|khz| *khz > 0)
}

fn cpuid_hypervisor_khz() -> Option<u64> {
    if cpu::cpuid(CPUID_KVM_SIGNATURE)[0] < 0x4000_0010 {
        return None;
    }
    Some(u64::from(cpu::cpuid(0x4000_0010)[0])).filter(|khz| *khz > 0)
}

pub fn tsc_to_ns(tsc: u64) -> u64 {
    (u128::from(tsc) * 1_000_000 / u128::from(TSC_KHZ.load(Relaxed))) as u64
}

pub fn us_to_tsc(us: u64) -> u64 {
    us.saturating_mul(TSC_KHZ.load(Relaxed)) / 1000
}

/// TSC cycles since the guest started.
pub fn uptime(now: u64) -> u64 {
    now.saturating_sub(STARTED.load(Relaxed))
}

/// Milliseconds since the guest started.
pub fn uptime_ms() -> u64 {
    tsc_to_ns(uptime(cpu::rdtsc())) / 1_000_000
}
