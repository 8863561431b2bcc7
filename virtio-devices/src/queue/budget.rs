//! The budget of a turn: the work of a task before the others on its loop have their turns.

use crate::limits::{TURN_BYTES, TURN_DESCRIPTORS};

/// The rest of one turn. A guest chooses how long its chains and requests are, so chains alone say
/// little about the time that they take: descriptors and bytes are counted, too.
///
/// A turn may overrun by one chain, which has at most as many descriptors as its queue, and at
/// most as many bytes as its device moves for one request.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Budget {
    chains: usize,
    descriptors: usize,
    bytes: u64,
}

impl Budget {
    /// With this many chains, and [`TURN_DESCRIPTORS`] and [`TURN_BYTES`].
    pub(crate) fn new(chains: usize) -> Self {
        Self {
            chains,
            descriptors: TURN_DESCRIPTORS,
            bytes: TURN_BYTES,
        }
    }

    /// Counts a chain with this many `descriptors`.
    pub(crate) fn spend_chain(&mut self, descriptors: usize) {
        self.chains = self.chains.saturating_sub(1);
        self.descriptors = self.descriptors.saturating_sub(descriptors);
    }

    /// Counts what a request moves, or has the host move.
    pub(crate) fn spend_bytes(&mut self, bytes: u64) {
        self.bytes = self.bytes.saturating_sub(bytes);
    }

    /// Whether the turn is over.
    pub(crate) fn is_spent(&self) -> bool {
        self.chains == 0 || self.descriptors == 0 || self.bytes == 0
    }
}
