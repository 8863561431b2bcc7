//! Requests that wait for blocks which are still at the source of a migration.

use std::collections::BTreeMap;
use std::io;
use std::sync::Arc;

use memory::{Admission, AwaitedBlocks, Waiter};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::MAX_IN_FLIGHT;
use crate::block::request::{Op, Request, What};

/// The requests of a queue that wait. The queue serves others meanwhile.
pub(super) struct Parked {
    blocks: Arc<AwaitedBlocks>,
    waiter: Arc<Waiter>,
    event: Arc<EventFd>,
    /// By their turns.
    requests: BTreeMap<u64, Request>,
    /// Their load.
    load: u64,
}

impl Parked {
    pub(super) fn new(blocks: Arc<AwaitedBlocks>) -> io::Result<Self> {
        let event = Arc::new(EventFd::new(EFD_NONBLOCK)?);
        let wake = Arc::clone(&event);
        let waiter = Waiter::new(move || {
            // Full of events, it is ready as well.
            let _ = wake.write(1);
        });
        Ok(Self {
            blocks,
            waiter,
            event,
            requests: BTreeMap::new(),
            load: 0,
        })
    }

    /// Becomes ready when requests can begin.
    pub(super) fn event(&self) -> Arc<EventFd> {
        Arc::clone(&self.event)
    }

    /// Whether more requests may come to wait: a broken driver makes no more available than its queue has
    /// entries, and what the source is asked for is bounded in bytes.
    pub(super) fn has_room(&self, entries: u16) -> bool {
        self.requests.len() < usize::from(entries) && self.load < MAX_IN_FLIGHT
    }

    pub(super) fn is_empty(&self) -> bool {
        self.requests.is_empty()
    }

    /// Gives the request back if its operation can begin, or keeps it until it can.
    pub(super) fn admit(&mut self, mut request: Request, op: Op) -> Option<Request> {
        let Some(range) = op.range() else {
            return Some(request);
        };
        match self.blocks.admit(range, &self.waiter, request.turn) {
            Admission::Free => {}
            Admission::Claimed(claim) => request.claim = Some(Box::new(claim)),
            Admission::Waits => {
                self.load = self.load.saturating_add(request.load(op));
                self.requests.insert(request.turn, request);
                return None;
            }
        }
        Some(request)
    }

    /// Takes the requests that may begin.
    pub(super) fn take_ready(&mut self) -> Vec<Request> {
        let _ = self.event.read();
        let mut ready = Vec::new();
        for turn in self.waiter.take_ready() {
            let Some(request) = self.requests.remove(&turn) else {
                continue;
            };
            if let What::Io(whole) = request.what {
                let load = request.load(whole.part(request.done));
                self.load = self.load.saturating_sub(load);
            }
            ready.push(request);
        }
        ready
    }

    /// The queue stops: gives all requests back.
    pub(super) fn end(mut self) -> Vec<Request> {
        std::mem::take(&mut self.requests).into_values().collect()
    }
}

impl Drop for Parked {
    fn drop(&mut self) {
        self.blocks.forget(&self.waiter);
    }
}
