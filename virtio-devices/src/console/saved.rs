//! Saved state of a console. Frozen.

use serde::{Deserialize, Serialize};
use state::Saved;

/// The first version.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct V1 {
    /// Input that the guest has not read yet.
    pub(super) input: Vec<u8>,
}

impl Saved for V1 {
    const VERSION: u16 = 1;
}
