//! What goes wrong with saved state.

use crate::limits;
use crate::path::{InvalidPath, SectionPath};

/// State could not be saved.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SaveError {
    /// A device named itself or a part of itself so.
    #[error(transparent)]
    Path(#[from] InvalidPath),
    /// Two devices save in the same place.
    #[error("section {0} was saved already")]
    Duplicate(SectionPath),
    /// The state cannot be put in CBOR.
    #[error("section {path} cannot be encoded: {reason}")]
    Encode {
        /// Where it was to go.
        path: SectionPath,
        /// What the encoder said.
        reason: String,
    },
    /// A device has more state than a section takes.
    #[error("section {path} is longer than {} bytes", limits::SECTION_LEN)]
    TooLong {
        /// Where it was to go.
        path: SectionPath,
    },
    /// The whole is too much.
    #[error(
        "section {path} would be more than {} sections or {} bytes of state",
        limits::SECTIONS,
        limits::TOTAL_LEN
    )]
    TooMuch {
        /// The first that has no room.
        path: SectionPath,
    },
}

/// The bytes are not saved state.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum OpenError {
    /// Something else altogether.
    #[error("this is not saved state: it does not start as such")]
    NotState,
    /// Written by a later program.
    #[error("saved state of format {found} cannot be read, only of format {known}")]
    Format {
        /// What the bytes say.
        found: u32,
        /// What this program knows.
        known: u32,
    },
    /// The end came early.
    #[error("the saved state ends within {0}")]
    Truncated(&'static str),
    /// Bytes after the end.
    #[error("{0} bytes follow the last section of the saved state")]
    Trailing(usize),
    /// Bits were lost.
    #[error("the checksum of {0} is wrong")]
    Checksum(String),
    /// A count or length beyond its limit.
    #[error("{found} {what} are more than the {most} that saved state may have")]
    TooMuch {
        /// Of what.
        what: &'static str,
        /// What the bytes say.
        found: u64,
        /// The limit.
        most: usize,
    },
    /// A section's name is no path.
    #[error(transparent)]
    Path(#[from] InvalidPath),
    /// Two sections of one name.
    #[error("section {0} is there twice")]
    Duplicate(SectionPath),
}

/// State could not be loaded.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LoadError {
    /// A device named itself or a part of itself so.
    #[error(transparent)]
    Path(#[from] InvalidPath),
    /// The machine has a device that the state knows nothing of.
    #[error("there is no section {0} in the saved state")]
    Missing(SectionPath),
    /// Two devices ask for the same.
    #[error("section {0} was taken already")]
    Taken(SectionPath),
    /// Too old, or too new.
    #[error("section {path} is of version {found}, and the latest that can be read is {latest}")]
    Version {
        /// Which section.
        path: SectionPath,
        /// What it says.
        found: u16,
        /// What this program knows.
        latest: u16,
    },
    /// Not what its version says.
    #[error("section {path} of version {version} cannot be decoded: {reason}")]
    Decode {
        /// Which section.
        path: SectionPath,
        /// What it says.
        version: u16,
        /// What the decoder said.
        reason: String,
    },
    /// It can be read, and the device will have none of it.
    #[error("section {path} makes no sense: {reason}")]
    Refused {
        /// Which section.
        path: SectionPath,
        /// Why.
        reason: String,
    },
    /// The state knows of devices that the machine does not have.
    #[error("nobody took section {first}, nor {more} more")]
    LeftOver {
        /// The first of them by name.
        first: SectionPath,
        /// How many there are besides.
        more: usize,
    },
}
