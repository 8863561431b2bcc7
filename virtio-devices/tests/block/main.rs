//! Disks, driven over their queues, with real images behind them.

#![allow(clippy::unwrap_used, clippy::panic, reason = "tests")]

mod copy;
mod errors;
mod formats;
mod machine;
mod overlay;
mod refused;
mod requests;
