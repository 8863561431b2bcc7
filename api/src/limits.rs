//! Limits on memory and time that a client can use.

use std::time::Duration;

/// Connections of one listener at a time; further ones wait in the kernel's queue.
pub const CONNECTIONS_MAX: usize = 1024;

/// From the first byte of a request to the end of its head, and from the start of a connection to the
/// end of its first head.
pub const HEADER_READ_TIMEOUT: Duration = Duration::from_secs(30);

/// From the end of an answer to the first byte of the next request. Clients of Cloud Hypervisor's API
/// keep one connection while a guest boots, and do not connect again when it is closed.
pub const IDLE_TIMEOUT: Duration = Duration::from_secs(15 * 60);

/// From the end of a request's head to the end of its body.
pub const BODY_READ_TIMEOUT: Duration = Duration::from_secs(30);

/// Bytes of a body that is read to its end only so that its sender can read the refusal.
pub const DISCARDED_BYTES_MAX: u64 = 16 << 20;

/// Bytes of a request's head.
pub const HEAD_BYTES_MAX: usize = 64 << 10;

/// Time for requests in progress after the service is asked to stop.
pub const SHUTDOWN_GRACE: Duration = Duration::from_secs(5);

/// Pause after the host ran out of something that accepting a connection needs.
pub const ACCEPT_RETRY: Duration = Duration::from_millis(100);

/// An `x-request-id` of a client that is taken over into logs and answers.
pub const REQUEST_ID_BYTES_MAX: usize = 128;

/// Descriptors that wait on one connection for the request that they belong to.
pub const DESCRIPTORS_MAX: usize = 64;
