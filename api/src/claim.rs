//! The version of Cloud Hypervisor that a socket claims to be, and what follows from it.

use std::fmt;
use std::str::FromStr;

/// A version of Cloud Hypervisor.
///
/// Its clients derive from the version what they may send and what an answer means. A program for an
/// older one therefore works if the service claims that version.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct ClaimedVersion {
    major: u16,
    minor: u16,
    patch: u16,
}

impl ClaimedVersion {
    /// The first version that can be claimed: older clients have bodies of another form.
    const OLDEST: u16 = 15;

    /// The version whose API this program has.
    pub const NEWEST: Self = Self {
        major: 54,
        minor: 0,
        patch: 0,
    };

    /// Whether `vm.send-migration` answers as soon as the migration has started. Before version 53
    /// it answers when the migration is over.
    pub(crate) fn sends_at_once(self) -> bool {
        self.major >= 53
    }
}

impl Default for ClaimedVersion {
    fn default() -> Self {
        Self::NEWEST
    }
}

impl fmt::Display for ClaimedVersion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}.{}", self.major, self.minor, self.patch)
    }
}

/// Why a text is no [`ClaimedVersion`].
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum InvalidVersion {
    /// Not a version at all.
    #[error("{0:?} is not a version of the form 54.0.0 or v54.0")]
    NotOne(String),
    /// A version whose API this program does not have.
    #[error("version {0} cannot be claimed: it must be {oldest} to {newest}", oldest = ClaimedVersion::OLDEST, newest = ClaimedVersion::NEWEST)]
    OutOfRange(ClaimedVersion),
}

impl FromStr for ClaimedVersion {
    type Err = InvalidVersion;

    fn from_str(text: &str) -> Result<Self, InvalidVersion> {
        let not_one = || InvalidVersion::NotOne(text.chars().take(64).collect());
        let parts = text.strip_prefix('v').unwrap_or(text).split('.');
        let numbers: Option<Vec<u16>> = parts.map(|part| part.parse().ok()).collect();
        let (major, minor, patch) = match numbers.ok_or_else(not_one)?[..] {
            [major] => (major, 0, 0),
            [major, minor] => (major, minor, 0),
            [major, minor, patch] => (major, minor, patch),
            _ => return Err(not_one()),
        };
        let version = Self {
            major,
            minor,
            patch,
        };
        if major < Self::OLDEST || version > Self::NEWEST {
            return Err(InvalidVersion::OutOfRange(version));
        }
        Ok(version)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_read_and_bounded() {
        let read = |text: &str| text.parse::<ClaimedVersion>();
        assert_eq!(read("v54.0").unwrap(), ClaimedVersion::default());
        assert_eq!(read("51.1").unwrap().to_string(), "51.1.0");
        assert!(!read("52.9.9").unwrap().sends_at_once());
        assert!(read("53").unwrap().sends_at_once());
        for bad in ["", "v", "54.0.0.1", "fifty", "-1", "5.4.x"] {
            assert!(matches!(read(bad), Err(InvalidVersion::NotOne(_))), "{bad}");
        }
        let error = read("54.0.1").unwrap_err().to_string();
        assert_eq!(
            error,
            "version 54.0.1 cannot be claimed: it must be 15 to 54.0.0"
        );
        assert!(read("14.9").is_err());
    }
}
