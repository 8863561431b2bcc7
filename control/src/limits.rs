//! Bounds on what guests and clients can make a service keep.

/// Events kept for each VM.
pub const EVENTS_KEPT_PER_VM: usize = 128;

/// Events kept of VMs that are gone, of all together.
pub const EVENTS_KEPT_AFTER_VMS: usize = 1024;

/// Bytes of an event's detail, which may repeat what a guest, an image or a peer said.
pub const DETAIL_BYTES_MAX: usize = 4096;

/// Requests that wait for one driver. Further ones are refused, but for those that end the VM.
pub const REQUESTS_WAITING_MAX: usize = 256;

/// Requests that wait for one driver, those that end the VM included.
pub const ENDINGS_WAITING_MAX: usize = 512;
