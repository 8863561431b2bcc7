//! Names of sections.

use std::fmt;

use crate::limits;

/// The path of a section: names separated by slashes, from the machine down to a part of a device,
/// as in `pci/disk-0/queue-1`. A name consists of ASCII letters, digits, `-`, `_`, `.` and `:`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SectionPath(String);

/// A string that is not a valid section path.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not a valid section path")]
pub struct InvalidPath(pub(crate) String);

impl SectionPath {
    /// Checks a path.
    ///
    /// # Errors
    /// A name is empty, a character is not allowed, or the path is longer than [`limits::PATH_LEN`].
    pub fn new(path: &str) -> Result<Self, InvalidPath> {
        let allowed = |c: u8| c.is_ascii_alphanumeric() || b"-_.:".contains(&c);
        let good = path.len() <= limits::PATH_LEN
            && path
                .split('/')
                .all(|name| !name.is_empty() && name.bytes().all(allowed));
        if good {
            Ok(Self(path.to_owned()))
        } else {
            // The path may come from a peer and have any length: the error keeps only its start.
            Err(InvalidPath(path.chars().take(limits::PATH_LEN).collect()))
        }
    }

    /// Returns the path of a part of this section's device.
    ///
    /// # Errors
    /// The same as those of [`SectionPath::new`].
    pub fn join(&self, name: &str) -> Result<Self, InvalidPath> {
        Self::new(&format!("{self}/{name}"))
    }

    /// What the paths of all parts of this section's device begin with. It is no path by itself.
    pub(crate) fn parts(&self) -> Self {
        Self(format!("{self}/"))
    }

    /// Returns the path as a string.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for SectionPath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}
