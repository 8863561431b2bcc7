//! The virtio PCI transport and its devices: empty so far.
//!
//! Their room is drawn so that nothing else moves in: it may use `devices`, `memory` and `state`, and will know
//! neither KVM nor the API nor how a VM migrates.

#![forbid(unsafe_code)]
