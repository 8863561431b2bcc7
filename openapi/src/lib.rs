//! The service's interface for those who use it: the generated document and a typed client.
//!
//! [`DOCUMENT`] describes every operation of the service. [`Client`] has a method for each of them, over the
//! types of [`spec`]; [`OPERATIONS`] is the table that both are compared with, so that neither can go ahead of
//! the other.
//!
//! ```no_run
//! # async fn example() -> Result<(), openapi::ClientError> {
//! use openapi::Client;
//! use spec::{CreateVm, PayloadConfig, VmConfig};
//!
//! let client = Client::unix("/run/whimbrel.sock");
//! println!("whimbrel {}", client.ping().await?.version);
//! let payload = PayloadConfig { kernel: Some("/boot/vmlinux".into()), ..PayloadConfig::default() };
//! let new = CreateVm { id: None, config: VmConfig::with_payload(payload) };
//! let vm = client.vms_create(&new).await?;
//! client.vms_boot(&vm.id).await?;
//! # Ok(())
//! # }
//! ```

#![forbid(unsafe_code)]

mod client;
mod error;
mod events;
mod operations;

pub use client::{Client, DEFAULT_TIMEOUT, default_socket};
pub use error::{ClientError, with_causes};
pub use events::{Events, News};
pub use operations::{OPERATIONS, Operation};

/// The OpenAPI 3.1 document of the service, both faces.
pub const DOCUMENT: &str = include_str!("../openapi.json");
