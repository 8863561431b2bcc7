//! What is saved of a disk: frozen.

use serde::{Deserialize, Serialize};
use state::Saved;

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
