//! How RAM blocks are made, and why they cannot be.

use std::io;

/// How a RAM block is made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RamConfig {
    /// Bytes; a multiple of the page size in use.
    pub size: u64,
    /// Back it with a memfd mapped shared, so that other processes can be given it; otherwise it
    /// is private anonymous memory.
    pub shared: bool,
    /// Huge pages of this size (bytes, a power of two) from the host's pool.
    pub hugepage_size: Option<u64>,
    /// Touch every page now, so that the guest never waits for one.
    pub prefault: bool,
    /// Let the host merge equal pages (KSM).
    pub mergeable: bool,
    /// Let the host use transparent huge pages.
    pub thp: bool,
    /// Count the memory against the host's commit limit now, in place of when it is touched.
    pub reserve: bool,
    /// All of it is unplugged at first, and takes no memory of the host: `prefault` and huge pages of
    /// the pool take effect when a part is [plugged](crate::RamBlock::plug).
    pub hotplug: bool,
    /// The guest can reach what is not plugged, and changes what is, at any time: virtio-mem.
    pub guest_plugs: bool,
    /// Take all pages from this NUMA node of the host.
    pub host_node: Option<u32>,
}

impl RamConfig {
    /// Private anonymous memory of `size` bytes, made of what the host gives by default.
    #[must_use]
    pub fn anonymous(size: u64) -> Self {
        Self {
            size,
            shared: false,
            hugepage_size: None,
            prefault: false,
            mergeable: false,
            thp: true,
            reserve: false,
            hotplug: false,
            guest_plugs: false,
            host_node: None,
        }
    }
}

/// A RAM block could not be made.
#[derive(Debug, thiserror::Error)]
pub enum RamError {
    /// Zero bytes, or not a multiple of the page size.
    #[error("RAM of {size:#x} bytes is not a positive multiple of its page size, {page:#x}")]
    Size {
        /// The requested size.
        size: u64,
        /// The page size in use.
        page: u64,
    },
    /// A huge page size that is no power of two above the base page.
    #[error("huge page size {0:#x} must be a power of two above the base page size")]
    HugePage(u64),
    /// The host's pool has too few free huge pages.
    #[error(
        "{} MiB of huge pages are needed, {} pages of {page} bytes each, and {free} of them are \
         free in the host's pool", size >> 20, size / page
    )]
    NoHugePages {
        /// Bytes asked for.
        size: u64,
        /// Bytes of a huge page.
        page: u64,
        /// Pages that are free.
        free: u64,
    },
    /// The host has no huge pages of this size.
    #[error("the host has no huge pages of {0} bytes")]
    NoSuchHugePage(u64),
    /// The host has no such NUMA node.
    #[error("the host has no NUMA node {node}: its nodes are {online}")]
    NoSuchNode {
        /// The node.
        node: u32,
        /// The nodes that the host has, as the kernel lists them.
        online: String,
    },
    /// The host refused a step.
    #[error("the host refused to {attempt} {size:#x} bytes of guest RAM")]
    Host {
        /// The attempted operation.
        attempt: &'static str,
        /// Bytes asked for.
        size: u64,
        /// The host's answer.
        #[source]
        source: io::Error,
    },
}
