//! The migration engine: moves a guest from one process to another.
//!
//! The engine handles memory, frames and the order of steps. It knows neither KVM nor devices nor HTTP: a
//! machine is a [`Source`] at one side and a [`Destination`] at the other.
//!
//! ```text
//!   source                                destination
//!   ── Prepare ───────────────────────►   builds the machine
//!   ══ pages, in rounds ══════════════►   memory            the guest runs at the source
//!   ── Guess ─────────────────────────►   loads the devices on trial
//!   stops the guest
//!   ══ the last pages ════════════════►
//!   ── State ─────────────────────────►   loads all state in one commit
//!   ◄──────────────────────── Ready ──
//!   journals the commit
//!   ── Commit ────────────────────────►   journals that the guest runs, and resumes it
//!   ◄────────────────────── Running ──
//! ```
//!
//! If anything fails before the source has journalled `Commit`, the source resumes the guest; after that
//! it does not, unless the destination says that the guest never ran there. The destination resumes the
//! guest only after it has received `Commit`. A side that is in doubt asks the other, or waits for an
//! operator ([`Decision::resolve`]). docs/migration.md has the table of failures.

#![forbid(unsafe_code)]

mod copier;
mod decision;
mod destination;
mod disks;
mod fault_priority;
mod journal;
mod link;
mod message;
mod mirror;
mod pages;
mod policy;
mod progress;
mod sender;
pub mod snapshot;
mod source;
#[cfg(feature = "testing")]
pub mod testing;
mod threads;
mod tls;
mod verify;
mod wire;

use std::fmt;
use std::time::Duration;

pub use decision::{Decision, Resolution, TooLate};
pub use destination::{
    Arriving, ConnectionLimit, Destination, Fate, Host, MOST_AT_ONCE, Party, Receiving, Standing,
    StartFailure, receive, receive_all,
};
pub use disks::{DestinationDisk, MAX_COPIED, NewImage, ReadDisk, SourceDisk, check_sizes};
pub use journal::{Entry, FileJournal, Journal, NoJournal, Side, Step, boot_id};
pub use link::{Accept, Closer, Dial, Endpoint, InvalidEndpoint, Listener, Stream};
pub use message::{BlockInfo, Offer, Refusal};
pub use mirror::{Finish, MirroredDisk, Mirroring, mirror};
pub use pages::Block;
pub use policy::{AtDeadline, MAX_CONNECTIONS, Mode, Policy};
pub use progress::{Activity, Downtime, Phase, Progress, Report, Round, Span};
pub use source::{Outcome, PendingAbort, Sending, Source, Stopped, Whereabouts, send};

pub use tls::{PeerNames, TlsDial, TlsError, TlsListener};
pub use wire::WireError;

/// How long a finished side keeps answering a peer that missed the outcome, in multiples of
/// `patience`.
pub(crate) const LINGER: u32 = 6;

/// Attempts to reach the other side again within one `patience`.
pub(crate) const ATTEMPTS: u32 = 30;

/// Keepalives that a busy side sends within one `patience`.
pub(crate) const KEEPALIVES: u32 = 8;

/// How long a source may show that it lives and send nothing of its guest, and a destination take none of
/// the pages that follow, in multiples of `patience`: 2 minutes by default, the longest stop that a source
/// accepts by default.
pub(crate) const STALL: u32 = if cfg!(test) { 3 } else { 12 };

/// How long a RAM or faults channel may be silent. Those have no keepalives: the control channel
/// shows whether the other side lives.
pub(crate) const PAGES_PATIENCE: Duration = Duration::from_secs(3600);

/// Why a migration fails.
#[derive(Debug, thiserror::Error)]
pub(crate) enum MigrationError {
    /// The connection failed, or carried something that the protocol does not allow.
    #[error(transparent)]
    Wire(#[from] WireError),
    /// This side's machine or policy refuses.
    #[error(transparent)]
    Here(Refusal),
    /// The other side refuses.
    #[error("the other side refuses: {0}")]
    There(Refusal),
    /// The operator canceled the migration.
    #[error("an operator canceled it")]
    Canceled,
}

impl MigrationError {
    pub(crate) fn here(code: &str, error: impl fmt::Display) -> Self {
        Self::Here(Refusal::new(code, error.to_string()))
    }

    /// Returns the error in the form that the report and the peer get.
    pub(crate) fn refusal(&self) -> Refusal {
        let code = match self {
            Self::Wire(WireError::Damaged(_)) => "stream-damaged",
            Self::Wire(WireError::Http) => "not-a-destination",
            Self::Wire(_) => "connection-lost",
            Self::Here(refusal) | Self::There(refusal) => &refusal.code,
            Self::Canceled => "canceled",
        };
        Refusal::new(code, self.to_string())
    }
}
