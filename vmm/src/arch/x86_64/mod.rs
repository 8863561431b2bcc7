//! x86-64: what a machine looks like to its guest.
//!
//! In the order of their use: [`layout::Layout`] says where RAM goes, [`cpu::cpuid`] what each
//! vCPU is; then the payload is loaded (`crate::boot`), [`acpi::tables`] and [`smbios::tables`] beside it, and
//! [`cpu::enter`] points the first vCPU at it.

pub(crate) mod acpi;
pub(crate) mod cpu;
pub(crate) mod cpu_model;
mod feature_names;
pub(crate) mod features;
pub(crate) mod generation;
pub(crate) mod hyperv;
pub(crate) mod layout;
pub(crate) mod profiles;
pub(crate) mod smbios;
mod topology;
