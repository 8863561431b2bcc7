//! The power management timer (ACPI 6.5, 4.8.3.3), by which EDK2 measures time in Cloud Hypervisor's
//! guests: it knows the port and does not look for it in the tables. The FADT does not name it, so
//! that Linux does not check its clocks against a timer that stops during a migration.

use std::time::Duration;

use memory::DeviceOps;
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use state::{Load, LoadError, LoadScope, Save, SaveError, Saved, Scope};

/// Ports of the timer: one register of 32 bits.
pub const LEN: u64 = 4;
/// Ticks of a second.
const FREQUENCY: u128 = 3_579_545;
/// The timer has 24 bits.
const MASK: u32 = 0xff_ffff;

/// Returns the time since some moment.
type Now = dyn Fn() -> Duration + Send + Sync;

/// The timer.
pub struct PmTimer {
    now: Box<Now>,
    /// Ticks to add to those since the beginning of `now`.
    ahead: Mutex<u32>,
}

impl PmTimer {
    /// Makes a timer that counts with `now`, a time that never goes back.
    pub fn new(now: impl Fn() -> Duration + Send + Sync + 'static) -> Self {
        Self {
            now: Box::new(now),
            ahead: Mutex::new(0),
        }
    }

    /// Ticks since the beginning of `now`, of which the low bits are all that is needed.
    fn elapsed(&self) -> u32 {
        // 128 bits hold the product for 10^15 years of nanoseconds. The cast keeps the low bits,
        // which is what a counter that wraps needs.
        ((self.now)().as_nanos().wrapping_mul(FREQUENCY) / 1_000_000_000) as u32
    }

    fn ticks(&self) -> u32 {
        self.elapsed().wrapping_add(*self.ahead.lock()) & MASK
    }
}

impl DeviceOps for PmTimer {
    fn read(&self, offset: u64, data: &mut [u8]) {
        let ticks = self.ticks().to_le_bytes();
        let from = ticks.iter().skip(usize::try_from(offset).unwrap_or(4));
        let mut from = from.copied();
        data.fill_with(|| from.next().unwrap_or(0));
    }

    fn write(&self, _: u64, _: &[u8]) {}
}

/// Saved state, version 1. Frozen.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct V1 {
    ticks: u32,
}

impl Saved for V1 {
    const VERSION: u16 = 1;
}

impl Save for PmTimer {
    fn save(&self, to: &mut Scope<'_>) -> Result<(), SaveError> {
        to.put(&V1 {
            ticks: self.ticks(),
        })
    }
}

impl Load for &PmTimer {
    /// The timer continues where it was saved, if it was: machines of older versions have none.
    fn load(&mut self, from: &mut LoadScope<'_, '_>, _: &mut ()) -> Result<(), LoadError> {
        if let Some(V1 { ticks }) = from.take_if_there()? {
            // `now` starts at another point on each host. Only the distance to the saved count is
            // kept, so that firmware that waits in a loop sees the timer continue.
            *self.ahead.lock() = ticks.wrapping_sub(self.elapsed());
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read<const N: usize>(timer: &PmTimer, offset: u64) -> [u8; N] {
        let mut data = [0xff; N];
        timer.read(offset, &mut data);
        data
    }

    #[test]
    fn counts_24_bits_at_its_frequency() {
        let timer = |now| PmTimer::new(move || now);
        let ticks = |now| u32::from_le_bytes(read(&timer(now), 0));
        assert_eq!(ticks(Duration::ZERO), 0);
        assert_eq!(ticks(Duration::from_secs(1)), 3_579_545);
        assert_eq!(ticks(Duration::from_secs(5)), (5 * 3_579_545) & MASK);
        let years = Duration::from_secs(10 * 365 * 86_400);
        assert_eq!(
            u64::from(ticks(years)),
            (years.as_secs() * 3_579_545) & u64::from(MASK)
        );
        let second = timer(Duration::from_secs(1));
        assert_eq!(read::<1>(&second, 1), [(3_579_545_u32 >> 8) as u8]);
        assert_eq!(read::<2>(&second, 3), [0, 0]);
        assert_eq!(read::<2>(&second, u64::MAX), [0, 0]);
    }
}
