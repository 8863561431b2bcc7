//! The memory that a queue reaches.

use std::sync::Arc;

use memory::{AddressSpace, FlatView, RamRange, RingWindow, WindowError};
use vm_memory::{GuestAddress, GuestAddressSpace, GuestMemoryBackend};

use super::Rings;

/// Guest memory as a queue sees it: its rings through windows that were translated once, all else
/// through the view in force.
#[derive(Debug)]
pub struct QueueMemory {
    space: AddressSpace,
    view: Arc<FlatView>,
    windows: [RingWindow; 3],
}

impl QueueMemory {
    /// Translates the rings.
    pub(super) fn new(space: AddressSpace, rings: &Rings) -> Result<Self, WindowError> {
        let view = space.memory();
        let window = |(addr, len)| RingWindow::of(&view, addr, len);
        let [descriptors, available, used] = rings.extents();
        // The order of use: `find_region` asks the windows from the first on.
        let windows = [window(available)?, window(used)?, window(descriptors)?];
        Ok(Self {
            space,
            view,
            windows,
        })
    }

    /// Takes the view in force, if there were commits since the last call. Between two calls the memory
    /// stays what it was, and mapped.
    pub(super) fn refresh(&mut self) -> Result<(), WindowError> {
        // A load and a comparison for each access, in place of a translation of three rings.
        if self.view.generation() == self.space.generation() {
            return Ok(());
        }
        self.view = self.space.memory();
        self.windows
            .iter_mut()
            .try_for_each(|window| window.refresh(&self.view))
    }

    pub(super) fn view(&self) -> &Arc<FlatView> {
        &self.view
    }
}

impl GuestMemoryBackend for QueueMemory {
    type R = RamRange;

    fn num_regions(&self) -> usize {
        self.view.num_regions()
    }

    fn find_region(&self, addr: GuestAddress) -> Option<&RamRange> {
        let windows = self.windows.iter();
        windows
            .filter_map(|window| window.within(&self.view))
            .find(|ram| ram.contains(addr.0))
            // Indirect tables may be anywhere in RAM.
            .or_else(|| self.view.find_region(addr))
    }

    fn iter(&self) -> impl Iterator<Item = &RamRange> {
        GuestMemoryBackend::iter(&*self.view)
    }
}
