//! The virtio PCI transport, and each device in a folder of its own (virtio 1.3).
//!
//! ```text
//!   guest's driver                                                    what is behind it
//!        │ configuration space, MSI-X    ┌───────────────┐ config    ┌──────────────┐
//!        ├──────────────────────────────►│ transport     ├──────────►│ VirtioDevice │
//!        │                               │ negotiation,  │ activate  │ block, net,  │
//!        │                               │ status, reset │ start/    │ console, …   │
//!        │                               └───────▲───────┘ stop_queue└──────┬───────┘
//!        │ doorbell (ioeventfd)                  │ needs reset              │ Running
//!        └─────────────────────────► kick ───────┼──────────────────► ┌─────▼─────┐
//!        ◄──────────────── interrupt ◄───────────┴─── Queue::push ────┤ QueueTask │ on an event loop
//!                                                                     └───────────┘
//! ```
//!
//! - A [`VirtioDevice`] says what it is and what it can do. It owns nothing of the guest until
//!   [`VirtioDevice::start_queue`] hands it a [`Queue`], and gives it back as a [`QueueState`]
//!   when [`VirtioDevice::stop_queue`] asks: a paused device holds no reader of guest memory.
//! - A [`Queue`] is a split virtqueue. Its rings are translated once, to ring windows that no
//!   commit can make stale unseen; what it pops is a [`Chain`], all of whose buffers have been
//!   checked.
//! - A [`QueueTask`] does the work, on an event loop that it shares with others. An error of the
//!   guest's ends the task and sets `DEVICE_NEEDS_RESET`; other devices and VMs are unaffected.
//!
//! Nothing here knows KVM, the API, or how a VM migrates.

#![deny(unsafe_code)]

pub mod balloon;
pub mod block;
pub mod console;
mod device;
pub mod limits;
pub mod mem;
pub mod net;
mod queue;
pub mod rate_limiter;
pub mod rng;
#[cfg(feature = "testing")]
pub mod testing;
mod transport;
pub mod vsock;
pub mod watchdog;
mod worker;

pub use device::{DeviceError, DeviceId, VirtioDevice};
pub use queue::{Chain, Queue, QueueError, QueueMemory, QueueSetup, QueueState, Rings};
pub use transport::{
    BAR_LEN, Interrupts, Retired, Slot, Transport, TransportEvent, VirtioPci, VirtioPciError,
    vectors,
};
pub use worker::{QueueTask, Running, TaskEvent, TaskFlow, TaskSources, Workers};
