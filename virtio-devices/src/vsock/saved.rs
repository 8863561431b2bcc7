//! What is saved of a vsock device: frozen. Connections are not: they end with the machine that
//! they were made from, and the guest is told.

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
