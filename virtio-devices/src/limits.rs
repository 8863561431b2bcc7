//! Limits that a guest cannot exceed.

/// Queues of one device.
pub const MAX_QUEUES: usize = 32;
/// Entries of one queue (virtio 1.3, 2.7: a split virtqueue has at most 32768; no driver wants
/// more than this). A descriptor chain is at most as long as its queue (2.7.5.3.1), also in an
/// indirect table.
pub const MAX_QUEUE_SIZE: u16 = 4096;
/// Descriptors that a task takes before the others on its loop have their turn: a quarter of a
/// millisecond.
pub const TURN_DESCRIPTORS: usize = 1024;
/// Bytes that a task moves before the others on its loop have their turn.
pub const TURN_BYTES: u64 = 1 << 20;
/// Pieces of memory that the kernel takes in one call (`UIO_MAXIOV`).
pub(crate) const MAX_PIECES: usize = 1024;
