//! What all devices share, and the platform's own: interrupts, PCI, serial, power management.
