//! The service's HTTP interface, over [`control`] alone: it knows neither KVM nor how a VM is made.
//!
//! Two *faces* look at the same VMs:
//!
//! ```text
//!   service socket ──► /api/v1/vms, /api/v1/vms/{id}/boot, ...  ─┐
//!                                                                ├──► control::Registry ──► drivers
//!   one VM's socket ─► /api/v1/vm.create, /api/v1/vm.boot, ...  ─┘
//! ```
//!
//! - The **service's own** ([`Service::router`]) speaks of many VMs by name.
//! - **Cloud Hypervisor's** ([`Service::vm_router`]) speaks of one VM a socket, as that program's clients do:
//!   the paths, bodies and status codes are its contract's.
//!
//! A router is served on a [`Listener`] by [`serve`] until a [`Shutdown`] is requested. Each route's handler and
//! its description are one declaration, so [`document`] cannot leave one out. Whatever is refused is explained
//! by a problem body ([`spec::Problem`], RFC 9457).
//!
//! ```
//! # use control::{Registry, fake::Fake};
//! # tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(async {
//! # let directory = tempfile::tempdir().unwrap();
//! # let registry = Registry::new(Fake::default());
//! let about = spec::VmmPingResponse {
//!     build_version: "v1.2.3".into(), version: "1.2.3".into(), pid: 1, features: vec![],
//! };
//! let service = api::Service::new(registry, about);
//! let listener = api::Listener::unix(directory.path().join("api.sock"))?;
//! let serving = tokio::spawn(api::serve(listener, service.router(), service.shutdown().clone()));
//! // ... until a signal, or a client's vmm.shutdown:
//! service.shutdown().request();
//! serving.await.unwrap();
//! # Ok::<(), api::ListenError>(())
//! # }).unwrap();
//! ```

#![forbid(unsafe_code)]

mod access;
mod activity;
mod answer;
mod body;
mod claim;
mod commands;
mod descriptors;
mod docs;
mod document;
mod errors;
mod events;
mod extract;
mod generators;
mod host;
mod json;
pub mod limits;
mod listen;
mod metrics;
mod middleware;
mod migrations;
mod not_yet;
mod one_vm;
mod peer;
mod problem;
mod refusals;
mod request_counts;
mod routers;
mod routes;
mod serve;
mod service;
mod snapshots;
mod sockets;
mod tags;
mod vmm;
mod vms;

pub use access::{TcpAccess, TokenFileError, token_file};
pub use claim::{ClaimedVersion, InvalidVersion};
pub use listen::{ListenError, Listener, TcpSocket, UnixSocket};
pub use routers::document;
pub use serve::{Bounds, Shutdown, serve, serve_within};
pub use service::Service;
