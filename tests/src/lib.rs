//! Out-of-process tests and benchmarks: the programs as users start them, through the client only.
//!
//! [`Service`] starts `whimbrel` on a socket of its own in a folder of its own, and ends it with
//! the test. [`Service::boot_pocket`] boots the [pocket guest](guest) in it, whose serial port
//! goes to a file that [`Serial`] reads; [`Shell`] logs in to a Debian guest, and
//! [`Machine`] is a whole Debian system that can be moved.
//!
//! The programs are those that were last built beside the tests, or what `WHIMBREL` names:
//! `ci/test unit` builds them first.

#![forbid(unsafe_code)]

mod benchmark;
pub mod debian;
pub mod dirtier;
mod machine;
mod network;
mod program;
mod proxy;
mod serial;
mod service;
mod shell;
pub mod snapshots;
mod trials;
mod vsock;

pub use benchmark::options;
pub use machine::{BOOTS, Machine, RUNS};
pub use network::{Network, ROUTER};
pub use program::{Mapped, Program, beyond_ram, pss};
pub use proxy::{Frame, Proxy, Side, Verdict};
pub use serial::Serial;
pub use service::{Face, Service, await_anyone, built};
pub use shell::Shell;
pub use trials::trials;
pub use vsock::{vsock_ask, vsock_ask_again, vsock_echo};
