//! How often something may happen.

use std::time::{Duration, Instant};

/// Bounds what a guest can cause: a number of times at once, and once an interval from then on.
///
/// ```
/// use std::time::{Duration, Instant};
/// let (mut lines, now) = (control::Allowance::new(2, Duration::from_secs(1)), Instant::now());
/// assert_eq!([lines.take(now), lines.take(now), lines.take(now)], [Some(0), Some(0), None]);
/// let later = now + Duration::from_secs(1);
/// assert_eq!(lines.take(later), Some(1), "one was refused before");
/// ```
#[derive(Clone, Debug)]
pub struct Allowance {
    interval: Duration,
    /// The amount that may be taken ahead of time.
    slack: Duration,
    /// When the allowance will be whole again; in the past when it is.
    whole_at: Option<Instant>,
    refused: u64,
}

impl Allowance {
    /// An allowance of `burst` times at once, which must be at least 1, and of one more each
    /// `interval`.
    #[must_use]
    pub fn new(burst: u32, interval: Duration) -> Self {
        Self {
            interval,
            slack: interval.saturating_mul(burst.saturating_sub(1)),
            whole_at: None,
            refused: 0,
        }
    }

    /// Takes one if there is one, and returns how many were refused since the last that was taken.
    pub fn take(&mut self, now: Instant) -> Option<u64> {
        if !self.wait(now).is_zero() {
            self.refused = self.refused.saturating_add(1);
            return None;
        }
        self.reserve(now);
        Some(std::mem::take(&mut self.refused))
    }

    /// Takes one, and returns how long to wait for it.
    pub fn reserve(&mut self, now: Instant) -> Duration {
        let wait = self.wait(now);
        let from = self.whole_at.map_or(now, |whole| whole.max(now));
        self.whole_at = Some(from + self.interval);
        wait
    }

    /// Whether nothing was taken lately and nothing refused.
    #[must_use]
    pub fn is_idle(&self, now: Instant) -> bool {
        self.refused == 0 && self.whole_at.is_none_or(|whole| whole <= now)
    }

    /// Returns how many were refused since the last that was taken, and forgets them.
    pub fn take_refused(&mut self) -> u64 {
        std::mem::take(&mut self.refused)
    }

    fn wait(&self, now: Instant) -> Duration {
        let ahead = self
            .whole_at
            .map(|whole| whole.saturating_duration_since(now));
        ahead.unwrap_or_default().saturating_sub(self.slack)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    #[test]
    fn storm_is_limited_to_one_per_interval() {
        let (mut allowance, start) = (Allowance::new(8, SECOND), Instant::now());
        let times = (0..100_000).map(|ms| start + Duration::from_millis(ms));
        let taken: Vec<_> = times.filter_map(|now| allowance.take(now)).collect();
        assert_eq!(taken.len(), 8 + 99);
        let refused: u64 = taken.iter().sum::<u64>() + allowance.take_refused();
        assert_eq!(refused, 100_000 - taken.len() as u64);
        assert!(!allowance.is_idle(start + 100 * SECOND));
        assert!(allowance.is_idle(start + 200 * SECOND));
    }

    #[test]
    fn reservations_are_spread() {
        let (mut allowance, now) = (Allowance::new(2, SECOND), Instant::now());
        let waits = [0; 4].map(|_| allowance.reserve(now).as_secs());
        assert_eq!(waits, [0, 0, 1, 2]);
        assert_eq!(allowance.reserve(now + 10 * SECOND), Duration::ZERO);
    }
}
