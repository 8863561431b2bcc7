//! The tags that group the operations of the OpenAPI document.
//!
//! Generators make names of modules and classes from them, so they are lower case: `VMs` becomes
//! `v_ms` in Python.

/// The service itself.
pub(crate) const SERVICE: &str = "service";
/// Many VMs, on the service's own face.
pub(crate) const VMS: &str = "vms";
/// Migrations.
pub(crate) const MIGRATIONS: &str = "migrations";
/// Cloud Hypervisor's face.
pub(crate) const ONE_VM: &str = "cloud-hypervisor";

/// Each tag with the description that the document gives.
pub(crate) const TAGS: &[(&str, &str)] = &[
    (SERVICE, "The service itself."),
    (VMS, "Many VMs, by name, on the service's socket."),
    (
        MIGRATIONS,
        "Moving VMs between services while they run: the destination waits, and the source starts.",
    ),
    (
        ONE_VM,
        "Cloud Hypervisor's API, for its clients, on a socket that serves one VM.",
    ),
];
