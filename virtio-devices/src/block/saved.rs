//! Saved state of a disk. Frozen.

use serde::{Deserialize, Serialize};
use state::{LoadError, Saved, Section};

/// The first version.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct V1 {
    /// Bytes, which the image must have where it is loaded.
    pub(super) capacity: u64,
    pub(super) writeback: bool,
}

impl Saved for V1 {
    const VERSION: u16 = 1;
}

/// With what the guest knows of blocks, and what it waits for.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct V2 {
    /// Bytes, which the image must have where it is loaded.
    pub(super) capacity: u64,
    pub(super) writeback: bool,
    /// The block size in bytes that the guest was given. Unknown in version 1.
    pub(super) block: Option<u64>,
    /// The heads of chains to try again, by queue and in order.
    pub(super) kept: Vec<Vec<u16>>,
}

impl Saved for V2 {
    const VERSION: u16 = 2;

    fn older(section: &Section<'_>) -> Result<Self, LoadError> {
        section.read::<V1>().map(|v1| Self {
            capacity: v1.capacity,
            writeback: v1.writeback,
            block: None,
            kept: Vec::new(),
        })
    }
}
