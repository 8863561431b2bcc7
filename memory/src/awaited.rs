//! Pages of a disk that are still at the source of a migration, while its guest runs here.
//!
//! ```text
//!            begin_fill            done: the content is written
//!   missing ───────────► claimed ──────────────────────────────► present
//!      ▲    admit(Change)   │
//!      └────────────────────┘ dropped: the write failed
//! ```
//!
//! The device asks before each operation ([`AwaitedBlocks::admit`]), and the engine before it writes a page
//! that came ([`AwaitedBlocks::begin_fill`]). At most one of them changes a missing page at a time: its
//! [claim](Claim). So a page that comes late never overwrites what the guest wrote, and no operation reads
//! what is in the image in the place of a missing page. A claim that ends without [`Claim::done`] leaves
//! the pages missing: their content comes again from the source, which keeps it until all is here.

#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use crate::dirty::{DirtyBitmap, DirtyPages, PAGE_SIZE};

const PAGE: usize = PAGE_SIZE as usize;

/// The use that an operation makes of a range of a disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BlockUse {
    /// The operation needs the content.
    Read,
    /// The operation replaces the content, as a write, a discard or a write of zeros does.
    Change,
}

/// A range of a disk in bytes, and its use.
#[derive(Clone, Copy, Debug)]
pub struct BlockRange {
    /// The first byte.
    pub offset: u64,
    /// How many bytes.
    pub len: u64,
    /// The use that is made of them.
    pub usage: BlockUse,
}

/// The answer to an operation that wants to begin.
#[derive(Debug)]
pub enum Admission {
    /// No page of the range is missing: the operation can begin.
    Free,
    /// The operation can begin, and makes missing pages present when it [is done](Claim::done).
    Claimed(Claim),
    /// The operation has to wait: its [`Waiter`] gets its ticket when to ask again.
    Waits,
}

/// Gets the tickets of operations that waited and may ask again.
pub struct Waiter {
    ready: Mutex<Vec<u64>>,
    wake: Box<dyn Fn() + Send + Sync>,
}

impl Waiter {
    /// Calls `wake`, which must not block, when there are tickets to [take](Self::take_ready).
    pub fn new(wake: impl Fn() + Send + Sync + 'static) -> Arc<Self> {
        Arc::new(Self {
            ready: Mutex::default(),
            wake: Box::new(wake),
        })
    }

    /// Takes the tickets of operations that may ask again.
    #[must_use]
    pub fn take_ready(&self) -> Vec<u64> {
        std::mem::take(&mut *self.ready.lock())
    }
}

/// An operation that waits.
struct Wait {
    waiter: Arc<Waiter>,
    ticket: u64,
    range: BlockRange,
}

/// A page that the source was asked for.
struct Asked {
    since: Instant,
    /// False when the connection that carried the request is lost.
    is_sent: bool,
}

#[derive(Default)]
struct State {
    /// Ends of the ranges of pages that are being changed, by their first page and the number of the claim.
    /// Each is an operation in flight. Two ranges may share pages that are present. Each has a missing page
    /// that no other has, so that none is within another: their ends have the order of their first pages.
    claims: BTreeMap<(usize, u64), usize>,
    next: u64,
    /// Bounded by the devices, each of which has as many operations at most as its queues have entries.
    waits: Vec<Wait>,
    asked: BTreeMap<usize, Asked>,
    /// Pages that operations wait for, and that may have to be asked for.
    due: BTreeSet<usize>,
}

impl State {
    /// The claims with pages before `end`, the last one first.
    fn claims_before(&self, end: usize) -> impl Iterator<Item = Range<usize>> + '_ {
        let claims = self.claims.range(..(end, 0)).rev();
        claims.map(|((start, _), end)| *start..*end)
    }

    /// Whether a missing page is being changed.
    fn is_claimed(&self, page: usize) -> bool {
        let mut claims = self.claims_before(page.saturating_add(1));
        claims.next().is_some_and(|claim| claim.contains(&page))
    }
}

/// The pages of a disk of which some are still elsewhere.
pub struct AwaitedBlocks {
    missing: DirtyBitmap,
    /// How many are missing: read without the lock by each operation once all are there.
    left: AtomicUsize,
    size: u64,
    /// An operation failed that may have written a part of a missing page.
    is_tainted: AtomicBool,
    state: Mutex<State>,
    on_wait: Box<dyn Fn() + Send + Sync>,
    /// How often a waiting operation, or a page that may be due, was looked at.
    #[cfg(test)]
    looks: AtomicUsize,
}

impl AwaitedBlocks {
    /// Returns the map of a disk of `size` bytes, whose `missing` pages are marked. `on_wait` is called when
    /// there may be [pages to ask for](Self::take_requests), and must not block.
    #[must_use]
    pub fn new(
        size: u64,
        missing: DirtyBitmap,
        on_wait: impl Fn() + Send + Sync + 'static,
    ) -> Arc<Self> {
        Arc::new(Self {
            left: AtomicUsize::new(missing.count()),
            missing,
            size,
            is_tainted: AtomicBool::new(false),
            state: Mutex::default(),
            on_wait: Box::new(on_wait),
            #[cfg(test)]
            looks: AtomicUsize::new(0),
        })
    }

    /// How many pages are missing.
    #[must_use]
    pub fn left(&self) -> usize {
        // Acquire pairs with the Release in `end`: an operation that finds nothing missing also sees
        // what was written.
        self.left.load(Ordering::Acquire)
    }

    /// The pages that are missing.
    #[must_use]
    pub fn missing(&self) -> DirtyPages {
        // A page that is being filled counts as missing: it would come twice, which is harmless.
        self.missing.snapshot()
    }

    fn is_missing(&self, page: usize) -> bool {
        self.missing.is_dirty(page * PAGE)
    }

    /// The pages of which a range has a part, and of which a change has only a part.
    fn pages(&self, range: BlockRange) -> (Range<usize>, [Option<usize>; 2]) {
        let end = range.offset.saturating_add(range.len).min(self.size);
        let first = range.offset / PAGE_SIZE;
        // A disk has no more pages than its bitmap, whose length is a usize.
        let pages = first as usize..end.div_ceil(PAGE_SIZE) as usize;
        let cuts_first = !range.offset.is_multiple_of(PAGE_SIZE);
        // The last page of a disk may end with the disk.
        let cuts_last = !end.is_multiple_of(PAGE_SIZE) && end < self.size;
        let last = pages.end.saturating_sub(1);
        let edges = [cuts_first.then_some(pages.start), cuts_last.then_some(last)];
        (pages, edges)
    }

    /// The missing pages whose content an operation needs before it can begin.
    fn needed(&self, range: BlockRange) -> impl Iterator<Item = usize> + '_ {
        let (pages, edges) = self.pages(range);
        let (whole, edges) = match range.usage {
            BlockUse::Read => (pages, [None; 2]),
            BlockUse::Change => (0..0, edges),
        };
        let edges = edges.into_iter().flatten();
        whole.chain(edges).filter(|page| self.is_missing(*page))
    }

    fn is_ready(&self, state: &State, range: BlockRange) -> bool {
        #[cfg(test)]
        self.looks.fetch_add(1, Ordering::Relaxed);
        if self.needed(range).next().is_some() {
            return false;
        }
        let (pages, _) = self.pages(range);
        // Claim by claim and not page by page: a discard has hundreds of thousands of pages.
        let is_in_the_way = |claim: Range<usize>| {
            let mut both = claim.start.max(pages.start)..claim.end.min(pages.end);
            both.any(|page| self.is_missing(page))
        };
        let claims = state.claims_before(pages.end);
        let mut claims = claims.take_while(|claim| claim.end > pages.start);
        range.usage == BlockUse::Read || !claims.any(is_in_the_way)
    }

    /// Asks whether an operation can begin. If it waits, `waiter` gets the ticket once it may ask again.
    #[must_use]
    pub fn admit(
        self: &Arc<Self>,
        range: BlockRange,
        waiter: &Arc<Waiter>,
        ticket: u64,
    ) -> Admission {
        if self.left() == 0 {
            return Admission::Free;
        }
        let mut state = self.state.lock();
        let (pages, _) = self.pages(range);
        if !pages.clone().any(|page| self.is_missing(page)) {
            return Admission::Free;
        }
        if self.is_ready(&state, range) {
            return Admission::Claimed(self.claim(&mut state, pages, true));
        }
        state.waits.push(Wait {
            waiter: Arc::clone(waiter),
            ticket,
            range,
        });
        state.due.extend(self.needed(range));
        drop(state);
        (self.on_wait)();
        Admission::Waits
    }

    fn claim(
        self: &Arc<Self>,
        state: &mut State,
        pages: Range<usize>,
        is_operation: bool,
    ) -> Claim {
        let id = state.next;
        state.next += 1;
        state.claims.insert((pages.start, id), pages.end);
        Claim {
            of: Arc::clone(self),
            id,
            pages,
            is_operation,
        }
    }

    /// Whether there may be something in the place of a missing page that the migration did not write: zeros
    /// that come must be written then.
    #[must_use]
    pub fn is_tainted(&self) -> bool {
        self.is_tainted.load(Ordering::Acquire)
    }

    /// Claims those of the pages that may be filled with what came from the source: all others are present,
    /// or the guest is changing them.
    ///
    /// If such a change fails, its pages are missing still, and the source has sent them. It sends them
    /// again over the next connection, which is made when the source has sent all and some are missing.
    #[must_use]
    pub fn begin_fill(self: &Arc<Self>, first: usize, pages: usize) -> Vec<Claim> {
        let mut claims: Vec<Claim> = Vec::new();
        if self.left() == 0 {
            return claims;
        }
        let mut state = self.state.lock();
        let mut run = first..first;
        for page in first..first.saturating_add(pages) {
            if self.is_missing(page) && !state.is_claimed(page) {
                run.end = page + 1;
                continue;
            }
            if !run.is_empty() {
                claims.push(self.claim(&mut state, run, false));
            }
            run = page + 1..page + 1;
        }
        if !run.is_empty() {
            claims.push(self.claim(&mut state, run, false));
        }
        claims
    }

    /// Ends a claim. Returns how long operations waited for those of its pages that were asked for.
    fn end(&self, claim: &Claim, is_done: bool) -> Vec<Duration> {
        let pages = &claim.pages;
        let mut state = self.state.lock();
        let mut waited = Vec::new();
        if state.claims.remove(&(pages.start, claim.id)).is_none() {
            // It was ended by `Claim::done`.
            return waited;
        }
        if is_done {
            let came = pages.clone();
            let came = came.filter(|page| self.missing.take_page(*page));
            for page in came {
                self.left.fetch_sub(1, Ordering::Release);
                if let Some(asked) = state.asked.remove(&page) {
                    waited.push(asked.since.elapsed());
                }
            }
        }
        let waits = std::mem::take(&mut state.waits);
        // No other operation waited for this claim. With thousands that wait and thousands of claims, a
        // look at all pairs would take the lock for a good part of a second.
        let concerns = |wait: &Wait| {
            let (theirs, _) = self.pages(wait.range);
            theirs.start < pages.end && pages.start < theirs.end
        };
        let (ready, waits): (Vec<_>, _) = waits
            .into_iter()
            .partition(|wait| concerns(wait) && self.is_ready(&state, wait.range));
        let is_waiting = !waits.is_empty();
        if !is_done {
            // Pages that were claimed may have to be asked for now.
            let concerned = waits.iter().filter(|wait| concerns(wait));
            let needed = concerned.flat_map(|wait| self.needed(wait.range));
            state.due.extend(needed.filter(|page| pages.contains(page)));
        }
        state.waits = waits;
        drop(state);
        for Wait { waiter, ticket, .. } in ready {
            waiter.ready.lock().push(ticket);
            (waiter.wake)();
        }
        if !is_done && is_waiting {
            (self.on_wait)();
        }
        waited
    }

    /// Returns missing pages that operations wait for and that were not requested from the source yet.
    #[must_use]
    pub fn take_requests(&self) -> Vec<usize> {
        let mut state = self.state.lock();
        let mut requests = Vec::new();
        // Not all pages that are waited for, of which there may be thousands: each call has a few.
        for page in std::mem::take(&mut state.due) {
            #[cfg(test)]
            self.looks.fetch_add(1, Ordering::Relaxed);
            // One that is claimed becomes present, or is due again.
            if !self.is_missing(page) || state.is_claimed(page) {
                continue;
            }
            let asked = state.asked.entry(page).or_insert_with(|| Asked {
                since: Instant::now(),
                is_sent: false,
            });
            if !std::mem::replace(&mut asked.is_sent, true) {
                requests.push(page);
            }
        }
        requests
    }

    /// Marks all requests as not sent, because the connection was lost: they are sent again.
    pub fn ask_again(&self) {
        let mut state = self.state.lock();
        let State { asked, due, .. } = &mut *state;
        for (page, asked) in asked {
            asked.is_sent = false;
            due.insert(*page);
        }
        drop(state);
        (self.on_wait)();
    }

    /// Forgets the operations of a waiter that wait: its queue stops.
    pub fn forget(&self, waiter: &Arc<Waiter>) {
        let mut state = self.state.lock();
        state
            .waits
            .retain(|wait| !Arc::ptr_eq(&wait.waiter, waiter));
        let needed: BTreeSet<usize> = state
            .waits
            .iter()
            .flat_map(|wait| self.needed(wait.range))
            .collect();
        // A guest that resets its queues again and again must not make these lists grow.
        state.asked.retain(|page, _| needed.contains(page));
        state.due.retain(|page| needed.contains(page));
    }
}

impl fmt::Debug for AwaitedBlocks {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("AwaitedBlocks")
            .field("left", &self.left())
            .finish_non_exhaustive()
    }
}

/// The right to change pages of a disk that are missing. Dropped without [`Claim::done`], it leaves them
/// missing.
#[must_use]
pub struct Claim {
    of: Arc<AwaitedBlocks>,
    id: u64,
    pages: Range<usize>,
    /// An operation of the guest has the claim, and not pages that came.
    is_operation: bool,
}

impl Claim {
    /// The pages, of which some may be present.
    #[must_use]
    pub fn pages(&self) -> Range<usize> {
        self.pages.clone()
    }

    /// The content is in the image: the pages are present. Returns how long operations waited for those that
    /// the source was asked for.
    pub fn done(mut self) -> Vec<Duration> {
        // `drop` ends the claim once more, which changes nothing.
        self.is_operation = false;
        self.of.end(&self, true)
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        if self.is_operation {
            // Before the end: the page may be filled right behind it.
            self.of.is_tainted.store(true, Ordering::Release);
        }
        drop(self.of.end(self, false));
    }
}

impl fmt::Debug for Claim {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Claim").field(&self.pages).finish()
    }
}
