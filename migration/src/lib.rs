//! The migration engine: moves a guest from one process to another.
//!
//! It knows memory, frames and the order in which things must happen, and neither KVM nor devices nor
//! HTTP: a machine is a [`Source`] here and a [`Target`] there.
//!
//! ```text
//!   source                                destination
//!   ── Prepare ───────────────────────►   makes the machine
//!   ══ pages, in rounds ══════════════►   memory            the guest runs at the source
//!   ── Guess ─────────────────────────►   loads it once, to see whether it can
//!   stops the guest
//!   ══ the last pages ════════════════►
//!   ── State ─────────────────────────►   loads it: one commit
//!   ◄──────────────────────── Ready ──
//!   writes down that the guest is given away
//!   ── Commit ────────────────────────►   writes down that it runs, and lets it run
//!   ◄────────────────────── Running ──
//! ```
//!
//! The source lets the guest run again if anything fails before it has written `Commit`, and never
//! after; the destination never before it has got it. Who does not know how it stands asks, or waits
//! for somebody to decide ([`Progress::resolve`]). docs/migration.md has the table of what happens
//! when.

#![forbid(unsafe_code)]

mod journal;
mod link;
mod message;
mod pages;
mod policy;
mod progress;
mod sender;
mod source;
mod target;
#[cfg(feature = "testing")]
pub mod testing;
mod tls;
mod wire;

use std::fmt;
use std::time::Duration;

pub use journal::{Entry, FileJournal, Journal, NoJournal, Side, Step};
pub use link::{Accept, Closer, Dial, Endpoint, InvalidEndpoint, Listener, Stream};
pub use message::{BlockInfo, Offer, Refusal};
pub use pages::Block;
pub use policy::{AtDeadline, MAX_CONNECTIONS, Mode, Policy};
pub use progress::{Downtime, Phase, Progress, Report, Resolution, TooLate};
pub use source::{Outcome, Sending, Source, Untold, send};
pub use target::{Fate, Host, Receiving, Target, receive};
pub use tls::{TlsDial, TlsError, TlsListener};
pub use wire::WireError;

/// Who knows more than the other side tells it, or answers when it asks, for so many times the
/// patience that one has with the other side.
pub(crate) const LINGER: u32 = 6;

/// As often as this, within the patience that one has with the other side, one tries to reach it.
pub(crate) const ATTEMPTS: u32 = 30;

/// Signs of life that are given within the patience that the other side has.
pub(crate) const SIGNS: u32 = 8;

/// How long a channel for pages may be silent: the control channel tells whether the other side lives.
pub(crate) const PAGES_PATIENCE: Duration = Duration::from_secs(3600);

/// Why a migration does not go on.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Trouble {
    /// The connection, or what came over it.
    #[error(transparent)]
    Wire(#[from] WireError),
    /// The machine at this side, or this side's policy.
    #[error(transparent)]
    Here(Refusal),
    /// The other side.
    #[error("the other side says: {0}")]
    There(Refusal),
    /// It was called off.
    #[error("the migration was called off")]
    Canceled,
}

impl Trouble {
    pub(crate) fn here(code: &str, error: impl fmt::Display) -> Self {
        Self::Here(Refusal::new(code, error.to_string()))
    }

    /// As it is told.
    pub(crate) fn refusal(&self) -> Refusal {
        let code = match self {
            Self::Wire(WireError::Damaged(_)) => "stream-damaged",
            Self::Wire(_) => "connection-lost",
            Self::Here(refusal) | Self::There(refusal) => &refusal.code,
            Self::Canceled => "canceled",
        };
        Refusal::new(code, self.to_string())
    }
}
