//! The tags that group the operations of the OpenAPI document.

/// The service itself.
pub(crate) const SERVICE: &str = "Service";
/// Many VMs, on the service's own face.
pub(crate) const VMS: &str = "VMs";
/// Migrations.
pub(crate) const MIGRATIONS: &str = "Migrations";
/// Cloud Hypervisor's face.
pub(crate) const ONE_VM: &str = "One VM";

/// Each tag with the description that the document gives.
pub(crate) const TAGS: &[(&str, &str)] = &[
    (SERVICE, "The service itself."),
    (VMS, "Many VMs, by name: on the service's socket."),
    (
        MIGRATIONS,
        "Moving VMs between services while they run. One side waits, the other starts.",
    ),
    (
        ONE_VM,
        "Cloud Hypervisor's API, as its clients speak it: on a socket that serves one VM.",
    ),
];
