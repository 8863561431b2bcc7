//! Saved state of a watchdog, version 1. Frozen.

use serde::{Deserialize, Serialize};
use state::Saved;

/// The first version.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct V1 {
    /// The driver has pinged. The time of the last ping is not saved: the timeout begins anew.
    pub(super) armed: bool,
}

impl Saved for V1 {
    const VERSION: u16 = 1;
}
