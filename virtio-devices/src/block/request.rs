//! Requests of a driver to a disk (virtio 1.3, 5.2.6).

use std::fmt;

use memory::{BlockRange, BlockUse, Claim};

use super::image::SECTOR;
use super::{MAX_PART, MAX_SEGMENT_SECTORS};
use crate::limits::MAX_PIECES;
use crate::queue::{Chain, QueueError};

/// Bytes of a request's header.
const HEADER: usize = 16;
/// Bytes of a segment to discard or to zero.
const SEGMENT: usize = 16;
/// Bytes of a disk's serial number.
pub(super) const ID_LEN: usize = 20;

const T_IN: u32 = 0;
const T_OUT: u32 = 1;
const T_FLUSH: u32 = 4;
const T_GET_ID: u32 = 8;
const T_DISCARD: u32 = 11;
const T_WRITE_ZEROES: u32 = 13;
/// Bytes to discard that weigh as much as one to write.
const DISCARD_RATIO: u64 = 16;
/// Bytes in flight that weigh as much as a descriptor, for which the host keeps memory until its request
/// ends: a guest may spread a sector over thousands.
const DESCRIPTOR_WEIGHT: u64 = 1 << 10;
/// Segment flag: the blocks may be unmapped.
const FLAG_UNMAP: u32 = 1;

/// How a request ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum Status {
    Ok = 0,
    IoError = 1,
    Unsupported = 2,
}

/// An operation, with offsets and lengths in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Op {
    Read { offset: u64, len: usize },
    Write { offset: u64, len: usize },
    Flush,
    Discard { offset: u64, len: u64 },
    WriteZeroes { offset: u64, len: u64, unmap: bool },
}

impl Op {
    /// Bytes that it moves.
    pub(super) fn bytes(self) -> u64 {
        match self {
            Self::Read { len, .. } | Self::Write { len, .. } => len as u64,
            Self::Flush | Self::Discard { .. } | Self::WriteZeroes { .. } => 0,
        }
    }

    /// The next part of a transfer of which `done` bytes are done. Drivers that do not negotiate
    /// `VIRTIO_BLK_F_SIZE_MAX`, as EDK2's, ask for as much as they have room for. Such a request is
    /// moved in parts, so that a queue that stops need not wait for all of it.
    pub(super) fn part(self, done: usize) -> Self {
        let rest = |offset: u64, len: usize| {
            let offset = offset.saturating_add(done as u64);
            (offset, len.saturating_sub(done).min(MAX_PART))
        };
        match self {
            Self::Read { offset, len } => {
                let (offset, len) = rest(offset, len);
                Self::Read { offset, len }
            }
            Self::Write { offset, len } => {
                let (offset, len) = rest(offset, len);
                Self::Write { offset, len }
            }
            whole => whole,
        }
    }

    /// The range of the disk that it uses, if it uses one.
    pub(super) fn range(self) -> Option<BlockRange> {
        let (offset, len, usage) = match self {
            Self::Read { offset, len } => (offset, len as u64, BlockUse::Read),
            Self::Write { offset, len } => (offset, len as u64, BlockUse::Change),
            Self::Discard { offset, len } | Self::WriteZeroes { offset, len, .. } => {
                (offset, len, BlockUse::Change)
            }
            // Makes durable what is present.
            Self::Flush => return None,
        };
        Some(BlockRange { offset, len, usage })
    }

    /// Bytes that the host may have to move for it. Some disks are zeroed by writing; to discard is
    /// to change the map of a file, for which a sixteenth is ample.
    pub(super) fn weight(self) -> u64 {
        match self {
            Self::WriteZeroes { len, .. } => len,
            Self::Discard { len, .. } => len / DISCARD_RATIO,
            _ => self.bytes(),
        }
    }
}

impl fmt::Display for Op {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Read { offset, len } => write!(f, "to read {len} bytes at {offset}"),
            Self::Write { offset, len } => write!(f, "to write {len} bytes at {offset}"),
            Self::Flush => f.write_str("to flush"),
            Self::Discard { offset, len } => write!(f, "to discard {len} bytes at {offset}"),
            Self::WriteZeroes { offset, len, .. } => write!(f, "to zero {len} bytes at {offset}"),
        }
    }
}

/// A request, understood.
#[derive(Debug)]
pub(super) struct Request {
    pub(super) chain: Chain,
    pub(super) what: What,
    /// Offset of the status in the writable part.
    status_at: usize,
    /// Which of its queue's requests it is, counted since the queue was started.
    pub(super) turn: u64,
    /// Bytes of a transfer that earlier parts have moved.
    pub(super) done: usize,
    /// The claim to blocks that are still at the source of a migration, and that this part changes. Dropped
    /// with the request if it fails.
    pub(super) claim: Option<Box<Claim>>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum What {
    /// For the image.
    Io(Op),
    /// The serial number.
    Id,
    /// Nothing to do but to say so.
    Refused(Status),
}

/// The limits that requests are checked against.
#[derive(Clone, Copy, Debug)]
pub(super) struct Limits {
    pub(super) capacity: u64,
    pub(super) readonly: bool,
    /// The smallest transfer, in bytes.
    pub(super) block: u64,
    /// Whether blocks may be given back to the host.
    pub(super) sparse: bool,
}

impl Request {
    /// # Errors
    /// When the chain is too short for a header and a status.
    pub(super) fn parse(chain: Chain, limits: Limits) -> Result<Self, QueueError> {
        let mut header = [0; HEADER];
        chain.read(0, &mut header)?;
        let writable = chain.writable_len();
        // The status is the last byte.
        let Some(status_at) = writable.checked_sub(1) else {
            return Err(QueueError::Chain {
                head: chain.head(),
                why: "has no room for a status",
            });
        };
        let [t0, t1, t2, t3, _, _, _, _, sector @ ..] = header;
        let sector = u64::from_le_bytes(sector);
        let readable = chain.readable_len().saturating_sub(HEADER);
        let what = match u32::from_le_bytes([t0, t1, t2, t3]) {
            T_IN => transfer(limits, sector, status_at, |offset, len| Op::Read {
                offset,
                len,
            }),
            T_OUT if limits.readonly => What::Refused(Status::IoError),
            T_OUT => transfer(limits, sector, readable, |offset, len| Op::Write {
                offset,
                len,
            }),
            T_FLUSH => What::Io(Op::Flush),
            T_GET_ID if status_at < ID_LEN => What::Refused(Status::IoError),
            T_GET_ID => What::Id,
            T_DISCARD | T_WRITE_ZEROES if limits.readonly => What::Refused(Status::IoError),
            // It is not offered then, and blocks are not to be given back.
            T_DISCARD if !limits.sparse => What::Refused(Status::Unsupported),
            // To unmap is what a discard is for, and not a flag of it (5.2.6.2).
            T_DISCARD => segment(&chain, limits, readable, 0, |offset, len, _| Op::Discard {
                offset,
                len,
            })?,
            T_WRITE_ZEROES => segment(
                &chain,
                limits,
                readable,
                FLAG_UNMAP,
                |offset, len, unmap| Op::WriteZeroes { offset, len, unmap },
            )?,
            _ => What::Refused(Status::Unsupported),
        };
        Ok(Self {
            chain,
            what,
            status_at,
            turn: 0,
            done: 0,
            claim: None,
        })
    }

    /// See [`Op::weight`].
    pub(super) fn weight(&self) -> u64 {
        match self.what {
            What::Io(op) => op.weight(),
            What::Id | What::Refused(_) => 0,
        }
    }

    /// Returns what counts against [`MAX_IN_FLIGHT`](super::task::MAX_IN_FLIGHT) while this operation, the
    /// request or a part of it, is in flight or waits for blocks.
    pub(super) fn load(&self, op: Op) -> u64 {
        op.weight() + self.chain.descriptors() as u64 * DESCRIPTOR_WEIGHT
    }

    /// Returns the bytes that the rate limit counts: all of a transfer. Zeroes and discards count as one part at
    /// most: the debt of gigabytes would stop the disk for minutes.
    pub(super) fn charge(&self) -> u64 {
        match self.what {
            What::Io(op @ (Op::Discard { .. } | Op::WriteZeroes { .. })) => {
                op.weight().min(MAX_PART as u64)
            }
            _ => self.weight(),
        }
    }

    /// Offset of the current part's data in the readable part of the chain.
    pub(super) fn data_to_write(&self) -> usize {
        HEADER + self.done
    }

    /// Offset of the current part's data in the writable part of the chain.
    pub(super) fn room_to_read(&self) -> usize {
        self.done
    }

    /// Says how it ended, and how many bytes were written in all.
    pub(super) fn finish(&self, status: Status, data: usize) -> Result<u32, QueueError> {
        self.chain.write(self.status_at, &[status as u8])?;
        // The used length is of what was written from the start on: of a part of the data nothing
        // can be said, and the status is behind all of it.
        let whole = data >= self.status_at;
        let written = if whole { self.status_at + 1 } else { data };
        Ok(u32::try_from(written).unwrap_or(u32::MAX))
    }
}

fn transfer(limits: Limits, sector: u64, len: usize, op: impl Fn(u64, usize) -> Op) -> What {
    let range = sector
        .checked_mul(SECTOR)
        .and_then(|offset| Some((offset, offset.checked_add(len as u64)?)));
    match range {
        Some((offset, end))
            if end <= limits.capacity
                && len > 0
                && (len as u64).is_multiple_of(limits.block)
                && offset.is_multiple_of(limits.block) =>
        {
            What::Io(op(offset, len))
        }
        _ => What::Refused(Status::IoError),
    }
}

/// One segment is what the device says it takes (`max_discard_seg`, `max_write_zeroes_seg`), and
/// no longer than it says.
fn segment(
    chain: &Chain,
    limits: Limits,
    len: usize,
    known_flags: u32,
    op: impl Fn(u64, u64, bool) -> Op,
) -> Result<What, QueueError> {
    if len != SEGMENT {
        return Ok(What::Refused(Status::IoError));
    }
    let mut raw = [0; SEGMENT];
    chain.read(HEADER, &mut raw)?;
    let [s0, s1, s2, s3, s4, s5, s6, s7, n0, n1, n2, n3, flags @ ..] = raw;
    let sector = u64::from_le_bytes([s0, s1, s2, s3, s4, s5, s6, s7]);
    let count = u64::from(u32::from_le_bytes([n0, n1, n2, n3]));
    let flags = u32::from_le_bytes(flags);
    let counts = 1..=u64::from(MAX_SEGMENT_SECTORS);
    let range = sector
        .checked_mul(SECTOR)
        .and_then(|offset| Some((offset, offset.checked_add(count * SECTOR)?)));
    Ok(match range {
        _ if flags & !known_flags != 0 => What::Refused(Status::Unsupported),
        Some((offset, end)) if end <= limits.capacity && counts.contains(&count) => {
            let unmap = flags & FLAG_UNMAP != 0 && limits.sparse;
            What::Io(op(offset, count * SECTOR, unmap))
        }
        _ => What::Refused(Status::IoError),
    })
}

/// Whether the kernel takes so many pieces of memory in one call.
pub(super) fn fits(pieces: usize) -> bool {
    pieces <= MAX_PIECES
}
