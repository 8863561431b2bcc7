//! Ranges of addresses.

use std::fmt;

/// A range of addresses, by its first and its last address, so that it is never empty and the
/// whole 64-bit space is a range like any other.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct AddrRange {
    first: u64,
    last: u64,
}

impl AddrRange {
    /// Every 64-bit address.
    pub const ALL: Self = Self {
        first: 0,
        last: u64::MAX,
    };

    /// Returns the `len` addresses from `start` on; `None` if `len` is 0 or the range would go past
    /// the last 64-bit address.
    #[must_use]
    pub const fn new(start: u64, len: u64) -> Option<Self> {
        match len.checked_sub(1) {
            Some(more) => match start.checked_add(more) {
                Some(last) => Some(Self { first: start, last }),
                None => None,
            },
            None => None,
        }
    }

    /// Returns the range from `first` to `last`, both included; `None` if `last` is before `first`.
    #[must_use]
    pub const fn from_bounds(first: u64, last: u64) -> Option<Self> {
        if first <= last {
            Some(Self { first, last })
        } else {
            None
        }
    }

    /// The first address.
    #[must_use]
    pub const fn first(self) -> u64 {
        self.first
    }

    /// The last address, which is part of the range.
    #[must_use]
    pub const fn last(self) -> u64 {
        self.last
    }

    /// The number of addresses; `None` for [`AddrRange::ALL`], because 2^64 does not fit a `u64`.
    #[must_use]
    pub const fn len(self) -> Option<u64> {
        (self.last - self.first).checked_add(1)
    }

    /// Returns false: a range holds at least one address.
    #[must_use]
    pub const fn is_empty(self) -> bool {
        false
    }

    /// Whether `addr` is in the range.
    #[must_use]
    pub const fn contains(self, addr: u64) -> bool {
        self.first <= addr && addr <= self.last
    }

    /// Whether all of `other` is in the range.
    #[must_use]
    pub const fn covers(self, other: Self) -> bool {
        self.first <= other.first && other.last <= self.last
    }

    /// Returns the intersection of both ranges.
    #[must_use]
    pub fn intersection(self, other: Self) -> Option<Self> {
        Self::from_bounds(self.first.max(other.first), self.last.min(other.last))
    }

    /// Whether `next` starts right behind the end of this one.
    #[must_use]
    pub const fn is_followed_by(self, next: Self) -> bool {
        match self.last.checked_add(1) {
            Some(end) => end == next.first,
            None => false,
        }
    }

    /// This range and `next`, which [follows](Self::is_followed_by) it, as one.
    #[must_use]
    pub(crate) const fn joined(self, next: Self) -> Self {
        Self {
            first: self.first,
            last: next.last,
        }
    }
}

impl fmt::Debug for AddrRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// `0x1000-0x1fff`, both ends included, padded to 16 digits with `{:#}`.
impl fmt::Display for AddrRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if f.alternate() {
            write!(f, "{:016x}-{:016x}", self.first, self.last)
        } else {
            write!(f, "{:#x}-{:#x}", self.first, self.last)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_edges_of_the_space() {
        assert_eq!(AddrRange::new(0, 0), None);
        assert_eq!(AddrRange::new(u64::MAX, 2), None);
        assert_eq!(
            AddrRange::new(u64::MAX, 1),
            AddrRange::from_bounds(u64::MAX, u64::MAX)
        );
        assert_eq!(AddrRange::ALL.len(), None);
        assert_eq!(AddrRange::new(1, u64::MAX).unwrap().len(), Some(u64::MAX));
        assert!(!AddrRange::ALL.is_followed_by(AddrRange::new(0, 1).unwrap()));
        assert!(
            AddrRange::new(0, 16)
                .unwrap()
                .is_followed_by(AddrRange::new(16, 1).unwrap())
        );
    }

    #[test]
    fn intersections() {
        let r = |a, b| AddrRange::from_bounds(a, b).unwrap();
        assert_eq!(r(0, 10).intersection(r(5, 20)), Some(r(5, 10)));
        assert_eq!(r(0, 10).intersection(r(11, 20)), None);
        assert!(r(0, 10).covers(r(0, 10)) && !r(0, 10).covers(r(0, 11)));
    }
}
