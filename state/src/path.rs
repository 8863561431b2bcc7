//! Names of sections.

use std::fmt;

use crate::limits;

/// The name of a section: names with slashes between, from the machine down to the part of a
/// device, as in `pci/disk-0/queue-1`. Names are of small letters, digits, `-`, `_`, `.` and `:`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SectionPath(String);

/// It is no name of a section.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is no path of a section")]
pub struct InvalidPath(pub(crate) String);

impl SectionPath {
    /// Checks a path.
    ///
    /// # Errors
    /// When a name is empty, a character is not allowed, or the whole is too long.
    pub fn new(path: &str) -> Result<Self, InvalidPath> {
        let allowed = |c: u8| c.is_ascii_alphanumeric() || b"-_.:".contains(&c);
        let good = path.len() <= limits::PATH_LEN
            && path
                .split('/')
                .all(|name| !name.is_empty() && name.bytes().all(allowed));
        if good {
            Ok(Self(path.to_owned()))
        } else {
            // It may be anybody's, and of any length.
            Err(InvalidPath(path.chars().take(limits::PATH_LEN).collect()))
        }
    }

    /// The path of a part of this.
    ///
    /// # Errors
    /// As for [`SectionPath::new`].
    pub fn join(&self, name: &str) -> Result<Self, InvalidPath> {
        Self::new(&format!("{self}/{name}"))
    }

    /// As it is written.
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
