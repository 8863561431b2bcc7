//! A machine: building it from a specification, running it, and the threads that do.
//!
//! A [`Pool`] creates drivers. It has a fixed number of event-loop threads, each with the drivers of some
//! VMs. A driver owns its machine, receives requests and guest events in turn, and publishes its status.
//! No other code touches the machine.
//!
//! ```text
//!   control::VmHandle ──► Inbox ──► Driver ── owns ──► Active machine ──► vCPU threads
//!                           ▲                              │                  │
//!                           └── guest events ◄─────────────┴──────────────────┘
//!
//!   VmConfig ──► Built (VM, RAM, devices, vCPUs) ── boot ──► Active (payload loaded, parked)
//! ```
//!
//! ```no_run
//! # async fn example() -> Result<(), Box<dyn std::error::Error>> {
//! use control::{Registry, Request};
//! let registry = Registry::new(vmm::Pool::start(&vmm::PoolConfig::default())?);
//! let config = spec::parse(br#"{"payload": {"kernel": "/boot/vmlinux"}}"#)?;
//! let vm = registry.create(None, config)?;
//! vm.ask(Request::Boot).await?;
//! # Ok(()) }
//! ```

#![forbid(unsafe_code)]

mod arch;
mod boot;
mod descriptors;
mod devices;
mod driver;
mod failure;
mod guest_event;
mod machine;
mod migrate;
mod paths;
mod pool;

pub use ::devices::on_terminal_escape;
pub use ::devices::sandbox::{Confinement, Sandbox, ThreadKind, Violation};
pub use boot::BootError;
pub use descriptors::TooFewDescriptors;
pub use failure::BuildError;
pub use migrate::{MigrationTrust, snapshot_config};
pub use pool::{Pool, PoolConfig, StartError};
