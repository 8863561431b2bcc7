//! Ring windows: guest memory that is translated once and used many times.
//!
//! A virtqueue's rings are read for every request. Their addresses hardly ever change what they
//! mean: only a commit can do that. So a [`RingWindow`] keeps the translation together with the
//! generation of the view that it was made from, and [`RingWindow::slice`] compares generations,
//! one atomic load, before it hands out memory: there is no way to use a stale one.

use std::sync::Arc;

use vm_memory::VolatileSlice;

use crate::flat_view::FlatView;
use crate::guest_memory::DirtySlice;
use crate::ram::RamBlock;
use crate::range::AddrRange;
use crate::space::AddressSpace;

/// A window cannot be made, or not again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum WindowError {
    /// No bytes, or past the last address.
    #[error("{len:#x} bytes at {addr:#x} are no range of guest addresses")]
    Range {
        /// Start, a guest address.
        addr: u64,
        /// Bytes.
        len: u64,
    },
    /// Not, or not all, in one range of RAM.
    #[error("{0} is not within one range of RAM")]
    NotRam(AddrRange),
}

/// A piece of guest RAM that is used again and again.
#[derive(Debug)]
pub struct RingWindow {
    range: AddrRange,
    generation: u64,
    block: Arc<RamBlock>,
    offset: usize,
    len: usize,
}

impl RingWindow {
    /// Translates the `len` bytes at guest address `addr`.
    ///
    /// # Errors
    /// When they are not all in one range of RAM.
    pub fn new(space: &AddressSpace, addr: u64, len: u64) -> Result<Self, WindowError> {
        let range = AddrRange::new(addr, len).ok_or(WindowError::Range { addr, len })?;
        Self::in_view(&space.view(), range)
    }

    fn in_view(view: &FlatView, range: AddrRange) -> Result<Self, WindowError> {
        let refused = WindowError::NotRam(range);
        let ram = view
            .find_ram(range.first())
            .filter(|ram| range.last() <= ram.last());
        let ram = ram.ok_or(refused)?;
        let offset = ram.block_offset(range.first()).ok_or(refused)?;
        let len = range
            .len()
            .and_then(|len| usize::try_from(len).ok())
            .ok_or(refused)?;
        Ok(Self {
            range,
            generation: view.generation(),
            block: Arc::clone(ram.block()),
            offset,
            len,
        })
    }

    /// The guest addresses it shows.
    #[must_use]
    pub fn range(&self) -> AddrRange {
        self.range
    }

    /// The memory, translated anew if a commit has come in between.
    ///
    /// # Errors
    /// When the addresses are no longer all in one range of RAM. The window stays, and may be
    /// good again after another commit.
    pub fn slice(
        &mut self,
        space: &AddressSpace,
    ) -> Result<VolatileSlice<'_, DirtySlice<'_>>, WindowError> {
        if self.generation != space.generation() {
            *self = Self::in_view(&space.view(), self.range)?;
        }
        self.block
            .slice(self.offset, self.len)
            .ok_or(WindowError::NotRam(self.range))
    }
}
