//! Bounds on what a topology may be.

/// Containers and aliases inside one another, from a space's root to a leaf.
pub const DEPTH: usize = 32;

/// Regions that one rendering may visit. Aliases of aliases can make a small tree large; this
/// bounds the work of a commit.
pub const VISITS: usize = 1 << 20;

/// Ports of the x86 I/O space.
pub const PORTS: u64 = 1 << 16;

/// NUMA nodes of a host that can be named, from 0 (`MAX_NUMNODES` of Linux on x86 is at most that).
pub const HOST_NODES: usize = 1024;
