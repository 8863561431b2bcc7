//! The virtio PCI transport and its devices.
