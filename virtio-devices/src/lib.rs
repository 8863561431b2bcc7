//! The virtio PCI transport and its devices.

#![forbid(unsafe_code)]
