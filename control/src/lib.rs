//! Handles to running VMs: typed requests in, typed replies and published status out.
//!
//! Every VM has one owner, its *driver*. Everybody else holds a [`VmHandle`] and sends requests,
//! or reads the status that the driver last published. This crate is what both ends agree on; it
//! knows neither KVM nor HTTP.
//!
//! ```text
//!   VmHandle ── Request ──► Inbox ──► driver ──► StatusPublisher
//!      ▲                      ▲ merged reports of     │
//!      │                      │ the machine, events   ▼
//!      └──────────── Reply ───┴──────────── VmStatus (watch, with a generation)
//! ```
//!
//! Whether a request may be asked at all is [`admit`]'s, a pure function of the state:
//!
//! ```text
//!   Created ──boot──► Running ◄──resume── Paused
//!                      │  ▲  └───pause─────►│
//!                      │ reboot             │
//!                      ▼                    ▼
//!                    Shutdown ◄──shutdown───┘      delete: from everywhere
//! ```
//!
//! ```
//! use control::{Verb, admit};
//! use spec::VmState;
//! assert!(admit(VmState::Created, Verb::Boot).is_ok());
//! let denied = admit(VmState::Created, Verb::Pause).unwrap_err();
//! assert_eq!(denied.to_string(), "a VM that is Created cannot be paused: it must be Running");
//! ```

#![forbid(unsafe_code)]

mod admission;
mod allowance;
mod error;
mod events;
#[cfg(feature = "fake")]
pub mod fake;
mod handle;
pub mod limits;
mod migrations;
mod registry;
mod request;
mod status;

pub use admission::{Denied, Verb, admit};
pub use allowance::Allowance;
pub use error::{Category, RequestError};
pub use events::{EventLog, Missed};
pub use handle::{Ask, EventSender, Inbox, Latch, Message, Peek, Reply, VmHandle, connect};
pub use migrations::{Accepted, Migrate, Migration, SnapshotOf, not_recording};
pub use registry::{Registry, Spawn};
pub use request::{NewDevice, Request};
pub use status::{Arrival, StatusPublisher, VmStatus};
