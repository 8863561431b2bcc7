//! What a guest cannot exceed.

/// Queues of one device.
pub const MAX_QUEUES: usize = 32;
/// Entries of one queue (virtio 1.3, 2.7: a split virtqueue has at most 32768; no driver wants
/// more than this).
pub const MAX_QUEUE_SIZE: u16 = 4096;
/// Buffers of one request. Linux's drivers use at most 1024 + 2.
pub const MAX_CHAIN: usize = 4096;
