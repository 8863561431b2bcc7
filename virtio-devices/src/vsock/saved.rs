//! Saved state of a vsock device. Frozen. Connections are not saved: they end with their machine, and the
//! guest gets a transport reset event.

use serde::{Deserialize, Serialize};
use state::Saved;

/// The first version.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct V1 {
    pub(super) cid: u64,
}

impl Saved for V1 {
    const VERSION: u16 = 1;
}
