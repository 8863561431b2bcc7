//! Saved state of an entropy device: empty in version 1. Frozen.

use serde::{Deserialize, Serialize};
use state::Saved;

/// The first version.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct V1 {}

impl Saved for V1 {
    const VERSION: u16 = 1;
}
