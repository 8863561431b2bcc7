//! Guest address spaces: the content of each address, changes of it, and listeners.
//!
//! The model is QEMU's memory API, and so are the terms. A machine has a [`Topology`]: a tree of
//! *regions* for each of two *address spaces* (memory and port I/O). Containers hold regions,
//! aliases show parts of others, RAM and ROM show slices of a [`RamBlock`], devices answer
//! accesses. Rendering the tree gives the [`FlatView`], which is all that guests and devices see.
//!
//! ```text
//!   Topology ── begin ──► Transaction ── commit ──► render ─► difference ─► listeners: prepare
//!   (the tree)             (edits)                                              │
//!        ▲                    │ drop: nothing happened                          ▼
//!        └────────────────────┴─────────────────────────── publish ─► listeners: apply
//!                                                             │
//!   vCPUs, queues: AddressSpace::view() ◄── arc-swap ─────────┘
//! ```
//!
//! - A change is a [`Transaction`], a value that borrows the topology. Code that reads the map while
//!   one is open does not compile, and readers see all of a change or nothing of it.
//! - Readers take the view in force without a lock, and what they hold stays mapped.
//! - [`MemoryListener`]s receive, once per commit, what was removed, added and kept.
//! - [`DirtyBitmap`]s belong to RAM blocks, so no change of the map moves a bit.
//! - Memory that the host [lost](RamBlock::on_lost) reads as zeros and ends its VM, not the process.
//! - [`RingWindow`]s are translated once and cannot be used when stale.
//!
//! [`Topology::transaction`] has an example.

#![expect(unsafe_code, reason = "this is the crate that maps guest memory")]

mod awaited;
mod buffer;
mod change;
mod dirty;
mod dump;
mod error;
mod flat_view;
mod guest_memory;
mod hugepages;
pub mod limits;
mod listener;
mod lost;
mod node;
mod plug;
mod populated;
mod ram;
mod ram_config;
mod range;
mod region;
mod render;
mod space;
#[doc(hidden)]
pub mod sync;
mod topology;
mod transaction;
mod userfault;
mod view;
mod window;
mod write_protect;

pub use awaited::{Admission, AwaitedBlocks, BlockRange, BlockUse, Claim, Waiter};
pub use buffer::PageBuffer;
pub use change::ViewChange;
pub use dirty::{DirtyBitmap, DirtyPages, PAGE_SIZE};
pub use dump::{FlatNode, TreeNode};
pub use error::{CommitError, ListenerError, TopologyError};
pub use flat_view::{FlatIoEventFd, FlatRange, FlatView, Target};
pub use guest_memory::{DirtySlice, RamRange};
pub use listener::{ListenerHandle, MemoryListener};
pub use lost::LostWatch;
#[cfg(any(test, feature = "testing"))]
pub use lost::testing;
pub use ram::{Pages, RamBlock};
pub use ram_config::{RamConfig, RamError};
pub use range::AddrRange;
pub use region::{DeviceOps, IoEventFd, RamSlice, RegionId};
pub use space::{Access, AddressSpace, CachedView, SpaceKind};
pub use topology::{Stats, Topology};
pub use transaction::{Label, Transaction};
pub use userfault::{Fault, UserFaults};
pub use window::{RingWindow, WindowError};
pub use write_protect::{WriteProtectError, WriteProtection};
