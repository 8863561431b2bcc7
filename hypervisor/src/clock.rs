//! The guest's clocks: kvmclock and each vCPU's time stamp counter (TSC), read in one moment when
//! the guest has stopped, and set again when it resumes.
//!
//! ```text
//!   source        guest stops ──► ClockSample (kvmclock, host TSC, host time)
//!                                   │ each vCPU: its TSC at that moment
//!                                   ▼
//!                                 saved state ......... time passes
//!                                                             │
//!   destination                   ClockSample  ◄── resume ────┘
//!                                   │ each vCPU: saved TSC + ticks of the time since
//!                                   ▼
//!                                 guest runs
//! ```
//!
//! A TSC keeps counting while its guest is stopped. A value that is read late therefore contains a
//! part of the stop; adding the whole stop would count that part twice. All values here belong
//! to the moment of the sample, and only the time since that moment is added.

use std::io;
use std::time::{Duration, Instant};

use kvm_bindings::{KVM_VCPU_TSC_CTRL, KVM_VCPU_TSC_OFFSET, KVMIO, kvm_device_attr, kvm_msr_entry};
use kvm_ioctls::VcpuFd;
use vmm_sys_util::ioctl::ioctl_with_ref;
use vmm_sys_util::ioctl_iow_nr;

use crate::kvm::KvmError;
use crate::vcpu::Vcpu;

ioctl_iow_nr!(KVM_SET_DEVICE_ATTR, KVMIO, 0xe1, kvm_device_attr);
ioctl_iow_nr!(KVM_GET_DEVICE_ATTR, KVMIO, 0xe2, kvm_device_attr);

pub(crate) const IA32_TSC: u32 = 0x10;
pub(crate) const IA32_TSC_DEADLINE: u32 = 0x6e0;

/// The host's TSC.
pub(crate) fn host_tsc() -> u64 {
    // SAFETY: RDTSC exists on every x86-64 CPU and only reads a counter.
    unsafe { core::arch::x86_64::_rdtsc() }
}

/// kvmclock, the host's TSC and the host's monotonic time, read together.
#[derive(Clone, Copy, Debug)]
pub struct ClockSample {
    /// Nanoseconds of kvmclock; absent on a host without one.
    pub(crate) kvmclock_ns: Option<u64>,
    pub(crate) host_tsc: u64,
    pub(crate) taken_at: Instant,
}

impl ClockSample {
    /// Nanoseconds of kvmclock.
    #[must_use]
    pub fn kvmclock_ns(&self) -> Option<u64> {
        self.kvmclock_ns
    }

    /// The moment at which the clocks were read.
    #[must_use]
    pub fn taken_at(&self) -> Instant {
        self.taken_at
    }
}

/// The clock of a loaded vCPU, which does not count until [`Vcpu::start_clock`].
#[derive(Clone, Copy, Debug)]
pub struct StoppedClock {
    /// The TSC when the guest stopped.
    pub(crate) tsc: u64,
    /// When the local APIC's timer is due, in ticks of the TSC.
    pub(crate) deadline: Option<u64>,
    pub(crate) khz: u32,
}

impl StoppedClock {
    /// Returns the same clock, without a timer that is due.
    #[must_use]
    pub fn without_timer(self) -> Self {
        Self {
            deadline: None,
            ..self
        }
    }
}

/// The clock values that a saved vCPU gets.
#[derive(Clone, Copy, Debug)]
pub enum SaveClock<'a> {
    /// Those of this moment, for a dry run: the guest runs.
    Now,
    /// Those at the sample, which was taken when the guest stopped.
    At(&'a ClockSample),
    /// Those that were loaded: the guest has not run since.
    Loaded(&'a StoppedClock),
}

/// Ticks of a counter of this frequency in this time.
fn ticks(time: Duration, khz: u32) -> u64 {
    let ticks = time.as_nanos() * u128::from(khz) / 1_000_000;
    u64::try_from(ticks).unwrap_or(u64::MAX)
}

/// Access to one vCPU's TSC, and the clocks of the host.
trait Counter {
    fn host_tsc(&self) -> u64;
    fn now(&self) -> Instant;
    /// The guest's TSC, now.
    fn tsc(&self) -> Result<u64, KvmError>;
    fn set_tsc(&self, value: u64) -> Result<(), KvmError>;
    /// The guest's TSC minus the host's, on kernels that have `KVM_VCPU_TSC_OFFSET`.
    fn offset(&self) -> Option<u64>;
    fn set_offset(&self, offset: u64) -> io::Result<()>;
}

/// Returns the offset in force, if the guest's TSC is the host's TSC plus this offset.
///
/// Returns `None` on hosts that scale the TSC for this guest, that have no such attribute, or that
/// accept the attribute and do nothing. Reading the guest's TSC between two reads of the host's
/// finds all three.
fn offset_in_force(counter: &impl Counter) -> Result<Option<u64>, KvmError> {
    let Some(offset) = counter.offset() else {
        return Ok(None);
    };
    let before = counter.host_tsc();
    let guest = counter.tsc()?;
    let after = counter.host_tsc();
    // In differences, for a counter may wrap.
    let (since, between) = (guest.wrapping_sub(offset), after.wrapping_sub(before));
    Ok((since.wrapping_sub(before) <= between).then_some(offset))
}

/// The guest's TSC at the moment of `sample`, which is in the past.
fn tsc_at(counter: &impl Counter, sample: &ClockSample, khz: u32) -> Result<u64, KvmError> {
    if let Some(offset) = offset_in_force(counter)? {
        return Ok(sample.host_tsc.wrapping_add(offset));
    }
    // The counter has counted on since the sample: take that off.
    let now = counter.tsc()?;
    let since = counter.now().saturating_duration_since(sample.taken_at);
    Ok(now.wrapping_sub(ticks(since, khz)))
}

/// Sets the guest's TSC such that it was `tsc` at the moment of `sample`.
fn set_tsc_at(
    counter: &impl Counter,
    sample: &ClockSample,
    tsc: u64,
    khz: u32,
) -> Result<(), KvmError> {
    let wanted = tsc.wrapping_sub(sample.host_tsc);
    // All vCPUs get their values relative to one sample, so that they agree to the tick, whenever
    // their threads come to it.
    if offset_in_force(counter)?.is_some()
        && counter.set_offset(wanted).is_ok()
        && offset_in_force(counter)? == Some(wanted)
    {
        return Ok(());
    }
    // Each vCPU thread computes a value of its own here, with a small error. KVM evens it out: it
    // treats writes that differ by less than a second as an attempt to synchronise the TSCs and
    // gives these vCPUs one offset, if the host's TSC is stable.
    let since = counter.now().saturating_duration_since(sample.taken_at);
    counter.set_tsc(tsc.wrapping_add(ticks(since, khz)))
}

struct VcpuCounter<'a>(&'a Vcpu);

/// The attribute, with its value at `value`.
fn offset_attribute(value: *const u64) -> kvm_device_attr {
    kvm_device_attr {
        group: KVM_VCPU_TSC_CTRL,
        attr: KVM_VCPU_TSC_OFFSET.into(),
        addr: value as u64,
        flags: 0,
    }
}

impl VcpuCounter<'_> {
    fn fd(&self) -> &VcpuFd {
        self.0.fd()
    }
}

impl Counter for VcpuCounter<'_> {
    fn host_tsc(&self) -> u64 {
        host_tsc()
    }

    fn now(&self) -> Instant {
        Instant::now()
    }

    fn tsc(&self) -> Result<u64, KvmError> {
        let entry = self.0.msr(IA32_TSC)?;
        entry.ok_or_else(|| KvmError::other("read a vCPU's TSC", io::ErrorKind::Unsupported.into()))
    }

    fn set_tsc(&self, value: u64) -> Result<(), KvmError> {
        self.0.set_msrs(&[kvm_msr_entry {
            index: IA32_TSC,
            data: value,
            ..Default::default()
        }])
    }

    fn offset(&self) -> Option<u64> {
        let mut offset = 0_u64;
        let attribute = offset_attribute(&raw mut offset);
        // SAFETY: the kernel writes eight bytes to `offset`, which outlives the call.
        let got = unsafe { ioctl_with_ref(self.fd(), KVM_GET_DEVICE_ATTR(), &attribute) };
        (got == 0).then_some(offset)
    }

    fn set_offset(&self, offset: u64) -> io::Result<()> {
        let attribute = offset_attribute(&raw const offset);
        // SAFETY: the kernel reads eight bytes from `offset`, which outlives the call.
        match unsafe { ioctl_with_ref(self.fd(), KVM_SET_DEVICE_ATTR(), &attribute) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }
}

impl Vcpu {
    /// Replaces clock values among saved MSRs.
    pub(crate) fn adjust_clock(
        &self,
        msrs: &mut [(u32, u64)],
        clock: SaveClock<'_>,
        khz: u32,
    ) -> Result<(), KvmError> {
        let mut set = |index, value| {
            let found = msrs.iter_mut().find(|msr| msr.0 == index);
            found.into_iter().for_each(|msr| msr.1 = value);
        };
        match clock {
            SaveClock::Now => {}
            SaveClock::At(sample) => set(IA32_TSC, tsc_at(&VcpuCounter(self), sample, khz)?),
            SaveClock::Loaded(clock) => {
                set(IA32_TSC, clock.tsc);
                set(IA32_TSC_DEADLINE, clock.deadline.unwrap_or(0));
            }
        }
        Ok(())
    }

    /// Returns the TSC at the moment of `sample`, for other vCPUs to follow.
    ///
    /// # Errors
    /// Fails if KVM does not give the counter.
    pub fn clock_at(&self, sample: &ClockSample) -> Result<StoppedClock, KvmError> {
        let khz = self.fd().get_tsc_khz().unwrap_or(0);
        Ok(StoppedClock {
            tsc: tsc_at(&VcpuCounter(self), sample, khz)?,
            deadline: None,
            khz,
        })
    }

    /// Has the TSC of a vCPU that never ran count as that of another did at the moment `at`: guests
    /// give a TSC up that differs between vCPUs. Without `at` only the frequency is set, and
    /// [`Vcpu::start_clock`] follows.
    ///
    /// # Errors
    /// Fails if KVM refuses to set the frequency or the counter.
    pub fn follow_clock(
        &self,
        other: &StoppedClock,
        at: Option<&ClockSample>,
    ) -> Result<(), KvmError> {
        self.load_tsc_khz(other.khz)?;
        match at {
            Some(sample) => set_tsc_at(&VcpuCounter(self), sample, other.tsc, other.khz),
            None => Ok(()),
        }
    }

    /// Starts the TSC of a loaded vCPU, and the timer that depends on it. At the moment of `now`
    /// the guest had been stopped for `stopped_for`.
    ///
    /// # Errors
    /// Fails if KVM refuses to set the counter or the timer.
    pub fn start_clock(
        &self,
        clock: &StoppedClock,
        now: &ClockSample,
        stopped_for: Duration,
    ) -> Result<(), KvmError> {
        let tsc = clock.tsc.wrapping_add(ticks(stopped_for, clock.khz));
        set_tsc_at(&VcpuCounter(self), now, tsc, clock.khz)?;
        // `load` has set the local APIC before: KVM ignores a deadline while the timer's LVT entry
        // is not in TSC-deadline mode.
        match clock.deadline {
            // After the TSC: KVM arms the timer by the TSC of that moment.
            Some(deadline) => self.set_msrs(&[kvm_msr_entry {
                index: IA32_TSC_DEADLINE,
                data: deadline,
                ..Default::default()
            }]),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests;
