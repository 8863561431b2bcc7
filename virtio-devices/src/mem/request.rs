//! Requests of the driver (virtio 1.3, 5.15.6), and the answers to them.

use std::io;
use std::ops::Range;
use std::sync::atomic::Ordering;

use super::Shared;

/// Bytes of a request: a type, and the address and number of blocks.
pub(super) const REQUEST: usize = 24;
/// Bytes of an answer: a type, and a state.
pub(super) const ANSWER: usize = 10;

pub(super) const VIRTIO_MEM_REQ_PLUG: u16 = 0;
pub(super) const VIRTIO_MEM_REQ_UNPLUG: u16 = 1;
pub(super) const VIRTIO_MEM_REQ_UNPLUG_ALL: u16 = 2;
const VIRTIO_MEM_REQ_STATE: u16 = 3;

const VIRTIO_MEM_STATE_PLUGGED: u16 = 0;
const VIRTIO_MEM_STATE_UNPLUGGED: u16 = 1;
const VIRTIO_MEM_STATE_MIXED: u16 = 2;

/// The device's answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Answer {
    /// Done. The state is that of a `STATE` request, and 0 otherwise.
    Ack(u16),
    /// Refused: the driver would have more than `requested_size`.
    Nack,
    /// The host has no memory now; the driver may try again.
    Busy,
    /// The request is invalid.
    Error,
}

impl Answer {
    pub(super) fn encode(self) -> [u8; ANSWER] {
        let (kind, state): (u16, u16) = match self {
            Self::Ack(state) => (0, state),
            Self::Nack => (1, 0),
            Self::Busy => (2, 0),
            Self::Error => (3, 0),
        };
        let mut raw = [0; ANSWER];
        raw[..2].copy_from_slice(&kind.to_le_bytes());
        raw[8..].copy_from_slice(&state.to_le_bytes());
        raw
    }
}

/// A change of blocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Change {
    Plug,
    Unplug,
    /// Some are unplugged already.
    UnplugAll,
}

/// A request that changes blocks, all of which may be changed. It is done in steps: a driver may name
/// more than a device may do in one turn of its event loop.
#[derive(Debug)]
pub(super) struct Job {
    change: Change,
    first: u64,
    /// Blocks that are not done.
    left: Range<u64>,
}

/// Outcome of reading a request.
#[derive(Debug)]
pub(super) enum Begun {
    Answered(Answer),
    Job(Job),
}

impl Shared {
    fn bytes(&self, first: u64, blocks: u64) -> (usize, usize) {
        // Blocks of the region, whose length is a `usize`.
        let bytes = |blocks: u64| blocks.saturating_mul(self.block_size) as usize;
        (bytes(first), bytes(blocks))
    }

    /// How many pages of these blocks are plugged.
    pub(super) fn plugged_pages(&self, first: u64, blocks: u64) -> u64 {
        let (offset, len) = self.bytes(first, blocks);
        self.ram.plugged_pages(offset, len) as u64
    }

    pub(super) fn plug(&self, first: u64, blocks: u64) -> io::Result<()> {
        let (offset, len) = self.bytes(first, blocks);
        self.ram.plug(offset, len)
    }

    pub(super) fn unplug(&self, first: u64, blocks: u64) -> io::Result<()> {
        let (offset, len) = self.bytes(first, blocks);
        self.ram.unplug(offset, len)
    }

    /// The blocks from an address on, if the region has them.
    fn range(&self, addr: u64, blocks: u16) -> Option<Range<u64>> {
        // Address and count are the guest's: each step is checked, and the end is compared with the
        // region in blocks, where nothing overflows.
        let offset = addr.checked_sub(self.addr)?;
        if blocks == 0 || !offset.is_multiple_of(self.block_size) {
            return None;
        }
        let first = offset / self.block_size;
        let end = first.checked_add(blocks.into())?;
        (end <= self.blocks()).then_some(first..end)
    }

    /// Reads a request, and answers it or says what there is to do.
    pub(super) fn begin(&self, raw: &[u8; REQUEST]) -> Begun {
        // `struct virtio_mem_req` (5.15.6). Type and number of blocks have 16 bits each, with padding.
        let fields = raw.as_chunks::<8>().0;
        let field = |at: usize| fields.get(at).map_or(0, |bytes| u64::from_le_bytes(*bytes));
        let (kind, addr, blocks) = (field(0) as u16, field(1), field(2) as u16);
        let range = self.range(addr, blocks);
        let begun = match (kind, range) {
            (VIRTIO_MEM_REQ_PLUG, Some(range)) => self.begin_plug(range),
            (VIRTIO_MEM_REQ_UNPLUG, Some(range)) => self.begin_unplug(range),
            (VIRTIO_MEM_REQ_UNPLUG_ALL, _) => Begun::Job(Job {
                change: Change::UnplugAll,
                first: 0,
                left: 0..self.blocks(),
            }),
            (VIRTIO_MEM_REQ_STATE, Some(range)) => Begun::Answered(self.state_of(&range)),
            _ => Begun::Answered(Answer::Error),
        };
        if let Begun::Answered(Answer::Nack | Answer::Error) = begun {
            self.refused_requests.fetch_add(1, Ordering::Relaxed);
        }
        begun
    }

    fn pages(&self, range: &Range<u64>) -> (u64, u64) {
        let blocks = range.end - range.start;
        let all = blocks * (self.block_size / memory::PAGE_SIZE);
        (self.plugged_pages(range.start, blocks), all)
    }

    fn begin_plug(&self, range: Range<u64>) -> Begun {
        // Before the size is looked at: a request that names a plugged block is wrong, whatever size
        // the driver was asked for.
        if self.pages(&range).0 > 0 {
            return Begun::Answered(Answer::Error);
        }
        let more = (range.end - range.start) * self.block_size;
        let there = self.plugged.load(Ordering::Acquire);
        // The requested size is the limit that keeps a guest from taking memory that its owner did
        // not give.
        if there.saturating_add(more) > self.requested.load(Ordering::Acquire) {
            return Begun::Answered(Answer::Nack);
        }
        self.plug_requests.fetch_add(1, Ordering::Relaxed);
        Begun::Job(Job {
            change: Change::Plug,
            first: range.start,
            left: range,
        })
    }

    fn begin_unplug(&self, range: Range<u64>) -> Begun {
        let (there, all) = self.pages(&range);
        if there != all {
            return Begun::Answered(Answer::Error);
        }
        self.unplug_requests.fetch_add(1, Ordering::Relaxed);
        Begun::Job(Job {
            change: Change::Unplug,
            first: range.start,
            left: range,
        })
    }

    fn state_of(&self, range: &Range<u64>) -> Answer {
        Answer::Ack(match self.pages(range) {
            (0, _) => VIRTIO_MEM_STATE_UNPLUGGED,
            (there, all) if there == all => VIRTIO_MEM_STATE_PLUGGED,
            _ => VIRTIO_MEM_STATE_MIXED,
        })
    }

    /// Does `limit` bytes of a job, a block at least, and returns the answer when all of it is done.
    pub(super) fn advance(&self, job: &mut Job, limit: u64) -> Option<Answer> {
        // One block at least: a block may be larger than the limit, and the job must end.
        let most = (limit / self.block_size).max(1);
        let blocks = (job.left.end - job.left.start).min(most);
        let at = job.left.start;
        let done = match job.change {
            Change::Plug => self.plug(at, blocks),
            // Most of the region may have nothing.
            Change::UnplugAll if self.plugged_pages(at, blocks) == 0 => Ok(()),
            Change::Unplug | Change::UnplugAll => self.unplug(at, blocks),
        };
        let answer = match done {
            Ok(()) => {
                job.left.start += blocks;
                if !job.left.is_empty() {
                    return None;
                }
                Answer::Ack(0)
            }
            Err(error) => {
                tracing::warn!(%error, "the host cannot change the memory of a guest");
                self.undo(job);
                Answer::Busy
            }
        };
        // Also after a failure: `undo` may have failed, too, and the count says what is there.
        self.count_plugged();
        (self.on_change)();
        Some(answer)
    }

    /// Ends a job whose queue stops: the guest is paused, or moves, and must not wait until the host has
    /// found or freed all that the request names. Returns the answer, or `None` if the request is to be
    /// repeated, as if it had not been taken.
    pub(super) fn stop(&self, mut job: Job) -> Option<Answer> {
        match job.change {
            // Repeated where a part is plugged, it would be refused. What was populated is freed sooner than
            // the rest is populated.
            Change::Plug => self.undo(&job),
            // Done, as a repetition would be refused, and the content of a part is gone. It is of 65,535
            // blocks at most, where Linux asks for one at a time.
            Change::Unplug => return self.advance(&mut job, u64::MAX),
            // A repetition unplugs the rest, which may be all the memory of a large guest that boots.
            Change::UnplugAll => {}
        }
        self.count_plugged();
        (self.on_change)();
        None
    }

    /// A request is done as a whole or not at all.
    fn undo(&self, job: &Job) {
        let blocks = job.left.start - job.first;
        let undone = match job.change {
            Change::Plug => self.unplug(job.first, blocks),
            // The driver does not use them. Their content is gone, and it did not need that.
            Change::Unplug => self.plug(job.first, blocks),
            // A driver that asks for this does not say what is plugged, and asks again.
            Change::UnplugAll => Ok(()),
        };
        if let Err(error) = undone {
            tracing::error!(%error, "the host does not take back a change of a guest's memory");
        }
    }
}
