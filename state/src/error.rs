//! Errors of saving and loading state.

use crate::limits;
use crate::path::{InvalidPath, SectionPath};

/// State cannot be saved.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SaveError {
    /// A device uses a name that is not a valid path.
    #[error(transparent)]
    Path(#[from] InvalidPath),
    /// Two devices save to the same section.
    #[error("section {0} was saved already")]
    Duplicate(SectionPath),
    /// The state cannot be encoded as CBOR.
    #[error("section {path} cannot be encoded: {reason}")]
    Encode {
        /// The section.
        path: SectionPath,
        /// The encoder's error.
        reason: String,
    },
    /// A section is longer than [`limits::SECTION_LEN`].
    #[error("section {path} is longer than {} bytes", limits::SECTION_LEN)]
    TooLong {
        /// The section.
        path: SectionPath,
    },
    /// All sections together exceed [`limits::SECTIONS`] or [`limits::TOTAL_LEN`].
    #[error(
        "section {path} exceeds the limits of saved state: {} sections, {} bytes",
        limits::SECTIONS,
        limits::TOTAL_LEN
    )]
    TooMuch {
        /// The first section that does not fit.
        path: SectionPath,
    },
}

/// Bytes that are not valid saved state.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum OpenError {
    /// The bytes do not start with the magic number.
    #[error("this is not saved state: the magic number is missing")]
    NotState,
    /// The format is not the one that this program reads.
    #[error("saved state has format {found}; this program reads format {known}")]
    Format {
        /// The value in the bytes.
        found: u32,
        /// The value that this program supports.
        known: u32,
    },
    /// The bytes end early.
    #[error("the saved state ends within {0}")]
    Truncated(&'static str),
    /// Bytes follow the last section.
    #[error("{0} bytes follow the last section of the saved state")]
    Trailing(usize),
    /// A checksum does not match.
    #[error("the checksum of {0} is wrong")]
    Checksum(String),
    /// A count or length exceeds its limit.
    #[error("{found} {what} exceed the limit of saved state ({most})")]
    TooMuch {
        /// The counted items.
        what: &'static str,
        /// The value in the bytes.
        found: u64,
        /// The limit.
        most: usize,
    },
    /// A section's name is not a valid path.
    #[error(transparent)]
    Path(#[from] InvalidPath),
    /// Two sections have the same name.
    #[error("section {0} occurs twice")]
    Duplicate(SectionPath),
}

/// State cannot be loaded.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LoadError {
    /// A device uses a name that is not a valid path.
    #[error(transparent)]
    Path(#[from] InvalidPath),
    /// A device of the machine has no section.
    #[error("the saved state has no section {0}")]
    Missing(SectionPath),
    /// Two devices ask for the same section.
    #[error("section {0} was taken already")]
    Taken(SectionPath),
    /// The section's version is not supported.
    #[error("section {path} has version {found}; the latest supported version is {latest}")]
    Version {
        /// The section.
        path: SectionPath,
        /// The version in the section.
        found: u16,
        /// The value that this program supports.
        latest: u16,
    },
    /// The body does not match the section's version.
    #[error("section {path} of version {version} cannot be decoded: {reason}")]
    Decode {
        /// The section.
        path: SectionPath,
        /// The version in the section.
        version: u16,
        /// The decoder's error.
        reason: String,
    },
    /// The section can be decoded, but its values are not valid for the device.
    #[error("section {path} is invalid: {reason}")]
    Refused {
        /// The section.
        path: SectionPath,
        /// The reason.
        reason: String,
    },
    /// Sections belong to no device of the machine.
    #[error("unexpected section {first} (and {more} more): the machine has no such device")]
    LeftOver {
        /// The first of them, by name.
        first: SectionPath,
        /// The number of further sections.
        more: usize,
    },
}
