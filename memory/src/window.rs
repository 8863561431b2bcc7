//! Ring windows: guest memory that is translated once and used many times.
//!
//! A virtqueue's rings are read for every request. Their addresses hardly ever change what they
//! mean: only a commit can do that. So a [`RingWindow`] keeps the translation together with the
//! generation of the view that it was made from, and [`RingWindow::slice`] compares generations,
//! one atomic load, before it hands out memory: there is no way to use a stale one.

use vm_memory::{GuestMemoryRegion, MemoryRegionAddress, VolatileSlice};

use crate::flat_view::FlatView;
use crate::guest_memory::{DirtySlice, RamRange};
use crate::range::AddrRange;
use crate::space::AddressSpace;

/// The reason why a window cannot be made or refreshed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum WindowError {
    /// The range is empty, or its end is past the last address.
    #[error("{len:#x} bytes at {addr:#x} exceed guest addresses")]
    Range {
        /// Start, a guest address.
        addr: u64,
        /// Bytes.
        len: u64,
    },
    /// The range is not within a single range of RAM.
    #[error("{0} is not within a single RAM range")]
    NotRam(AddrRange),
}

/// A piece of guest RAM that is used again and again.
#[derive(Debug)]
pub struct RingWindow {
    ram: RamRange,
    generation: u64,
}

impl RingWindow {
    /// Translates the `len` bytes at guest address `addr`.
    ///
    /// # Errors
    /// Fails if they are not all in one range of RAM.
    pub fn new(space: &AddressSpace, addr: u64, len: u64) -> Result<Self, WindowError> {
        Self::of(&space.view(), addr, len)
    }

    /// Translates the `len` bytes at guest address `addr` as they are in `view`.
    ///
    /// # Errors
    /// Fails if they are not all in one range of RAM.
    pub fn of(view: &FlatView, addr: u64, len: u64) -> Result<Self, WindowError> {
        let range = AddrRange::new(addr, len).ok_or(WindowError::Range { addr, len })?;
        Ok(Self {
            ram: view.one_ram(range)?,
            generation: view.generation(),
        })
    }

    /// The guest addresses it shows.
    #[must_use]
    pub fn range(&self) -> AddrRange {
        self.ram.range()
    }

    /// Translates the window by `view`, if it was translated by another.
    ///
    /// # Errors
    /// Fails if the addresses are no longer all in one range of RAM. The window stays, and may be
    /// good again after another commit.
    pub fn refresh(&mut self, view: &FlatView) -> Result<(), WindowError> {
        if self.generation != view.generation() {
            // On an error the old generation stays, so the window remains stale and hands out
            // nothing.
            self.ram = view.one_ram(self.range())?;
            self.generation = view.generation();
        }
        Ok(())
    }

    /// The memory, if the window is of `view`; `None` if it is stale.
    #[must_use]
    pub fn within(&self, view: &FlatView) -> Option<&RamRange> {
        (self.generation == view.generation()).then_some(&self.ram)
    }

    /// Returns the memory, translated again if there was a commit since the last call.
    ///
    /// # Errors
    /// As [`RingWindow::refresh`].
    pub fn slice(
        &mut self,
        space: &AddressSpace,
    ) -> Result<VolatileSlice<'_, DirtySlice<'_>>, WindowError> {
        // A commit may come right after this check. The slice then shows memory of the old view,
        // which is safe: `self.ram` owns its block, and no commit unmaps that.
        if self.generation != space.generation() {
            self.refresh(&space.view())?;
        }
        let whole = usize::try_from(self.ram.len()).ok();
        whole
            .and_then(|len| self.ram.get_slice(MemoryRegionAddress(0), len).ok())
            .ok_or(WindowError::NotRam(self.range()))
    }
}
