//! Saved state of an endpoint. Frozen.

use serde::{Deserialize, Serialize};
use state::Saved;

/// MSI-X table and pending bits.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Msix {
    pub(super) entries: Vec<[u8; 16]>,
    pub(super) pending: Vec<u64>,
}

/// The first version.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct V1 {
    /// The first 256 bytes of configuration space.
    pub(super) header: Vec<u8>,
    pub(super) msix: Option<Msix>,
}

impl Saved for V1 {
    const VERSION: u16 = 1;
}
