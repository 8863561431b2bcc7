//! Saved state of a balloon. Frozen.

use serde::{Deserialize, Serialize};
use state::Saved;

/// The first version.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct V1 {
    /// Pages of 4 KiB that it should hold.
    pub(super) wanted: u32,
    /// Pages of 4 KiB that it holds.
    pub(super) actual: u32,
}

impl Saved for V1 {
    const VERSION: u16 = 1;
}
