//! What is saved of an entropy device: nothing, as yet. Frozen.

use serde::{Deserialize, Serialize};
use state::Saved;

/// The first version.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct V1 {}

impl Saved for V1 {
    const VERSION: u16 = 1;
}
