//! Saved state of a network interface. Frozen.

use serde::{Deserialize, Serialize};
use state::Saved;

/// The first version.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct V1 {
    pub(super) mac: [u8; 6],
    /// Queue pairs that the driver uses.
    pub(super) pairs: u16,
    /// Offloads that the driver understands, as it set them last (`TUN_F_*`).
    pub(super) offloads: u32,
    /// The driver has been asked to announce itself, and has not said that it did.
    pub(super) announce: bool,
}

impl Saved for V1 {
    const VERSION: u16 = 1;
}
