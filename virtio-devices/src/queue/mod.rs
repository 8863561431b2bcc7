//! Split virtqueues (virtio 1.3, 2.7).

mod budget;
mod chain;
mod memory;
#[cfg(test)]
mod tests;

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use ::memory::{AddressSpace, WindowError};
use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_ring::VRING_AVAIL_F_NO_INTERRUPT;
use virtio_queue::{Queue as Split, QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::EventFd;

pub(crate) use self::budget::Budget;
pub use self::chain::Chain;
pub use self::memory::QueueMemory;
use crate::limits::MAX_QUEUE_SIZE;
use crate::transport::Transport;
use crate::worker::TaskFlow;

/// The guest broke the rules of the rings: the device needs a reset.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum QueueError {
    /// The rings are not where rings can be.
    #[error("the rings of queue {queue} cannot be used: {source}")]
    Rings {
        /// Which.
        queue: u16,
        /// The reason.
        source: WindowError,
    },
    /// The rings' addresses or size are invalid.
    #[error("queue {queue} cannot be used: {why}")]
    Setup {
        /// Which.
        queue: u16,
        /// The reason.
        why: &'static str,
    },
    /// The ring of available chains makes no sense.
    #[error("the available ring of queue {queue} is broken: {why}")]
    Available {
        /// Which.
        queue: u16,
        /// The reason.
        why: String,
    },
    /// A chain of descriptors makes no sense.
    #[error("the descriptor chain at {head} {why}")]
    Chain {
        /// The index of its first descriptor.
        head: u16,
        /// The reason.
        why: &'static str,
    },
    /// The guest's memory was at another host, which is gone.
    #[error("the memory of the descriptor chain at {head} is lost")]
    Lost {
        /// The index of its first descriptor.
        head: u16,
    },
}

/// How a driver has set a queue up: what the guest wrote, not checked yet.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Rings {
    /// Entries.
    pub size: u16,
    /// Guest address of the descriptor table.
    pub descriptors: u64,
    /// Guest address of the ring of available chains.
    pub available: u64,
    /// Guest address of the ring of used chains.
    pub used: u64,
}

impl Rings {
    /// Address and length of the descriptor table, the available ring and the used ring, with the
    /// fields for `EVENT_IDX` (virtio 1.3, 2.7).
    fn extents(&self) -> [(u64, u64); 3] {
        let size = u64::from(self.size);
        [
            // The two rings have two bytes of flags, two of index, and two for the event index
            // behind the entries (2.7.6, 2.7.8).
            (self.descriptors, 16 * size),
            (self.available, 6 + 2 * size),
            (self.used, 6 + 8 * size),
        ]
    }
}

/// The state of a stopped queue: all that a device must keep.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct QueueState {
    /// Next index to take from the available ring.
    pub next_avail: u16,
    /// Next index to fill in the used ring.
    pub next_used: u16,
}

/// The parts of a queue.
#[derive(Debug)]
pub struct QueueSetup {
    /// Which of the device's queues.
    pub index: u16,
    /// Addresses of the rings.
    pub rings: Rings,
    /// The state to continue from.
    pub state: QueueState,
    /// Whether `VIRTIO_RING_F_EVENT_IDX` was negotiated.
    pub event_idx: bool,
    /// The guest's memory.
    pub space: AddressSpace,
    /// Signalled when the driver makes chains available.
    pub kick: Arc<EventFd>,
    /// Interrupts the driver.
    pub transport: Arc<Transport>,
}

/// Result of serving one chain in [`Queue::turn`].
pub(crate) enum Served {
    /// The chain was served or kept; the number of bytes that were moved for it.
    Bytes(u64),
    /// The chain waits for something other than a kick, and goes back to the queue.
    NotYet,
}

/// A virtqueue that is being served.
pub struct Queue {
    index: u16,
    split: Split,
    memory: QueueMemory,
    kick: Arc<EventFd>,
    transport: Arc<Transport>,
    /// Something was pushed since the last notification.
    untold: bool,
}

impl Queue {
    /// A queue over rings that are in RAM.
    ///
    /// # Errors
    /// Fails if size, alignment or addresses are not what virtio 1.3, 2.7 asks for.
    pub fn new(setup: QueueSetup) -> Result<Self, QueueError> {
        let queue = setup.index;
        let refused = |why| QueueError::Setup { queue, why };
        let Rings { size, .. } = setup.rings;
        // The ring index is taken modulo the size (2.7): any other size would read entries past the
        // rings.
        if !size.is_power_of_two() || size > MAX_QUEUE_SIZE {
            return Err(refused("its size is not a power of two within limits"));
        }
        let mut split = Split::new(size).map_err(|_| refused("its size is 0"))?;
        split
            .try_set_desc_table_address(GuestAddress(setup.rings.descriptors))
            .map_err(|_| refused("its descriptor table is not aligned to 16 bytes"))?;
        split
            .try_set_avail_ring_address(GuestAddress(setup.rings.available))
            .map_err(|_| refused("its available ring is not aligned to 2 bytes"))?;
        split
            .try_set_used_ring_address(GuestAddress(setup.rings.used))
            .map_err(|_| refused("its used ring is not aligned to 4 bytes"))?;
        // Not checked against the ring: `pop` refuses an index that is further behind than the
        // queue is long.
        split.set_next_avail(setup.state.next_avail);
        split.set_next_used(setup.state.next_used);
        split.set_event_idx(setup.event_idx);
        split.set_ready(true);
        let memory = QueueMemory::new(setup.space, &setup.rings)
            .map_err(|source| QueueError::Rings { queue, source })?;
        Ok(Self {
            index: queue,
            split,
            memory,
            kick: setup.kick,
            transport: setup.transport,
            untold: false,
        })
    }

    /// Which of the device's queues it is.
    #[must_use]
    pub fn index(&self) -> u16 {
        self.index
    }

    /// Entries.
    #[must_use]
    pub fn size(&self) -> u16 {
        self.split.size()
    }

    /// Returns the descriptor that is signalled when the driver makes chains available.
    #[must_use]
    pub fn kick(&self) -> &Arc<EventFd> {
        &self.kick
    }

    /// Returns the queue's state.
    #[must_use]
    pub fn state(&self) -> QueueState {
        QueueState {
            next_avail: self.split.next_avail(),
            next_used: self.split.next_used(),
        }
    }

    /// The next chain, if the driver has made one available.
    ///
    /// # Errors
    /// Fails if the driver broke the rules.
    pub fn pop(&mut self) -> Result<Option<Chain>, QueueError> {
        let queue = self.index;
        self.memory
            .refresh()
            .map_err(|source| QueueError::Rings { queue, source })?;
        let before = self.split.next_avail();
        let available = |error: virtio_queue::Error| QueueError::Available {
            queue,
            why: error.to_string(),
        };
        let (memory, size) = (&self.memory, self.split.size());
        // Reads the index with acquire ordering, before any entry or descriptor that the driver
        // wrote first (2.7.13.3). The distance to our own index is checked against the size.
        let mut chains = self.split.iter(memory).map_err(available)?;
        match chains.next() {
            Some(chain) => Chain::new(chain, size, memory.view()).map(Some),
            // The iterator steps over what it cannot read.
            None if self.split.next_avail() == before => Ok(None),
            None => Err(QueueError::Available {
                queue,
                why: "its entry cannot be read".to_owned(),
            }),
        }
    }

    /// Returns the chain that begins at `head` once more: it was popped before, here or by the device whose
    /// saved state this one continues, and never given back.
    ///
    /// # Errors
    /// No chain at `head` can have been popped.
    pub fn again(&mut self, head: u16) -> Result<Chain, QueueError> {
        let queue = self.index;
        self.memory
            .refresh()
            .map_err(|source| QueueError::Rings { queue, source })?;
        let table = GuestAddress(self.split.desc_table());
        Chain::at(head, table, self.split.size(), &self.memory)
    }

    /// Puts the chain that was popped last back: the next [`Queue::pop`] gives it again.
    pub fn unpop(&mut self) {
        self.split.go_to_previous_position();
    }

    /// Gives a chain back to the driver, `written` bytes of it filled. [`Queue::notify`] tells the
    /// driver.
    ///
    /// # Errors
    /// Fails if the used ring is no longer in RAM.
    pub fn push(&mut self, head: u16, written: u32) -> Result<(), QueueError> {
        let queue = self.index;
        self.memory
            .refresh()
            .map_err(|source| QueueError::Rings { queue, source })?;
        // `add_used` writes the entry, and then the index with release ordering (2.7.8.2): a
        // driver that sees the index finds the entry.
        self.untold = true;
        let memory = &self.memory;
        self.split
            .add_used(memory, head, written)
            .map_err(|error| QueueError::Available {
                queue,
                why: error.to_string(),
            })
    }

    /// Interrupts the driver, if it wants to know of what was pushed since the last time.
    ///
    /// # Errors
    /// Fails if the available ring is no longer in RAM.
    pub fn notify(&mut self) -> Result<(), QueueError> {
        if std::mem::take(&mut self.untold) && self.wants_interrupt()? {
            self.transport.used(self.index);
        }
        Ok(())
    }

    fn wants_interrupt(&mut self) -> Result<bool, QueueError> {
        let queue = self.index;
        let memory = &self.memory;
        let broken = |why: String| QueueError::Available { queue, why };
        if !self.split.event_idx_enabled() {
            // The index must be visible before the flag is read (2.7.7.2). Without a full fence the
            // CPU may read an old flag, and a driver that has just asked for interrupts would wait
            // for good.
            std::sync::atomic::fence(Ordering::SeqCst);
            let flags: u16 = memory
                .load(GuestAddress(self.split.avail_ring()), Ordering::Relaxed)
                .map_err(|error| broken(error.to_string()))?;
            return Ok(u32::from(u16::from_le(flags)) & VRING_AVAIL_F_NO_INTERRUPT == 0);
        }
        self.split
            .needs_notification(memory)
            .map_err(|error| broken(error.to_string()))
    }

    /// Asks the driver for kicks again. Returns true if chains came meanwhile, for which there may be no
    /// kick: the caller pops them.
    ///
    /// # Errors
    /// Fails if the rings are no longer in RAM, or the driver took back what it made available.
    pub fn enable_kicks(&mut self) -> Result<bool, QueueError> {
        let (queue, memory) = (self.index, &self.memory);
        let broken = |why: String| QueueError::Available { queue, why };
        // The library writes the event index or clears the flag, fences, and looks at the index
        // again (2.7.10): a chain between the last `pop` and the write is not missed.
        let more = self.split.enable_notification(memory);
        if !more.map_err(|error| broken(error.to_string()))? {
            return Ok(false);
        }
        // An index behind ours would be "more" for ever, without a chain to take.
        let index = self.split.avail_idx(memory, Ordering::Acquire);
        let index = index.map_err(|error| broken(error.to_string()))?.0;
        let ahead = index.wrapping_sub(self.split.next_avail());
        if ahead > self.split.size() {
            return Err(broken(format!(
                "its index moved to {index}, more than the queue's size"
            )));
        }
        Ok(ahead > 0)
    }

    /// One turn of a task that serves this queue alone: takes the kick, serves chains until there
    /// are none or the budget is spent, interrupts the driver, and asks it for kicks again.
    ///
    /// `serve` gives the chain back, or keeps it, and returns what became of it.
    ///
    /// # Errors
    /// Fails if the driver broke the rules.
    pub(crate) fn turn(
        &mut self,
        mut budget: Budget,
        mut serve: impl FnMut(&mut Self, Chain) -> Result<Served, QueueError>,
    ) -> Result<TaskFlow, QueueError> {
        // Kicks are counted together; the count is zero when another event came first.
        let _ = self.kick.read();
        while !budget.is_spent() {
            let Some(chain) = self.pop()? else {
                self.notify()?;
                return Ok(match self.enable_kicks()? {
                    true => TaskFlow::Again,
                    false => TaskFlow::Wait,
                });
            };
            budget.spend_chain(chain.descriptors());
            match serve(self, chain)? {
                Served::Bytes(bytes) => budget.spend_bytes(bytes),
                Served::NotYet => {
                    self.unpop();
                    self.notify()?;
                    return Ok(TaskFlow::Wait);
                }
            }
        }
        self.notify()?;
        // The budget is spent. The kick was taken, so the task itself must come back for the rest.
        Ok(TaskFlow::Again)
    }

    /// Tells the driver and the owner of the machine that the device needs a reset, as an error of
    /// the guest's demands.
    pub fn broken(&self, why: &QueueError) {
        self.transport.needs_reset(&why.to_string());
    }
}

impl fmt::Debug for Queue {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Queue")
            .field("index", &self.index)
            .field("size", &self.split.size())
            .field("state", &self.state())
            .finish_non_exhaustive()
    }
}
