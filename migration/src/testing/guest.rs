//! A guest that consists of memory alone: a [`Source`] for tests of the engine without a machine.

use std::sync::Arc;
use std::time::Instant;

use memory::{PAGE_SIZE, RamBlock, RamConfig};

use crate::message::{BlockInfo, Offer, Refusal};
use crate::pages::Block;
use crate::source::{Outcome, Source, Stopped, Whereabouts};

/// Returns anonymous memory of so many pages.
#[must_use]
pub fn ram(pages: usize) -> Arc<RamBlock> {
    let size = pages as u64 * PAGE_SIZE;
    Arc::new(RamBlock::new(&RamConfig::anonymous(size)).unwrap())
}

/// Returns the list of blocks of a guest that has this memory and no other.
#[must_use]
pub fn blocks(ram: &Arc<RamBlock>) -> Vec<Block> {
    vec![Block {
        name: "ram".to_owned(),
        ram: Arc::clone(ram),
    }]
}

/// Returns a copy of the memory.
#[must_use]
pub fn contents(ram: &RamBlock) -> Vec<u8> {
    let mut all = vec![0_u8; ram.len()];
    ram.slice(0, all.len()).unwrap().copy_to(&mut all[..]);
    all
}

/// Fills a page with a byte, as the guest's CPU does: the page becomes dirty.
pub fn fill_page(ram: &RamBlock, page: usize, byte: u8) {
    const PAGE: usize = PAGE_SIZE as usize;
    let slice = ram.slice(page * PAGE, PAGE).unwrap();
    slice.copy_from(&[byte; PAGE]);
}

/// A moment in a migration, in which a test may act.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Moment {
    /// Dirty pages are collected; the guest may run.
    Harvest,
    /// The guest was stopped.
    Stopped,
    /// The source has committed, and has not sent `Commit`.
    Committed,
    /// The outcome is known, and the report does not show it.
    Ended,
}

type Hook = Box<dyn FnMut(Moment, &RamBlock) + Send>;

/// A guest of memory alone.
pub struct MemoryGuest {
    /// Its memory.
    pub ram: Arc<RamBlock>,
    /// Whether it runs.
    pub runs: bool,
    /// The reports of where the guest is, in their order.
    pub shown: Vec<Whereabouts>,
    hook: Hook,
}

impl MemoryGuest {
    /// The device state that a dry run saves.
    pub const DRY_RUN: [u8; 100] = [1; 100];

    /// Returns a running guest.
    #[must_use]
    pub fn new(ram: Arc<RamBlock>) -> Self {
        Self::with_hook(ram, |_, _| {})
    }

    /// Returns a running guest; the engine's calls at each [`Moment`] run `hook`.
    #[must_use]
    pub fn with_hook(
        ram: Arc<RamBlock>,
        hook: impl FnMut(Moment, &RamBlock) + Send + 'static,
    ) -> Self {
        Self {
            ram,
            runs: true,
            shown: Vec::new(),
            hook: Box::new(hook),
        }
    }
}

impl Source for MemoryGuest {
    fn offer(&mut self) -> Result<Offer, Refusal> {
        Ok(Offer {
            vm: "guest".to_owned(),
            machine: serde_bytes::ByteBuf::new(),
            blocks: vec![BlockInfo {
                name: "ram".to_owned(),
                size: self.ram.len() as u64,
            }],
            connections: 1,
            postcopy: false,
            given: false,
            verify: false,
        })
    }

    fn blocks(&self) -> Vec<Block> {
        blocks(&self.ram)
    }

    fn start_tracking(&mut self) -> Result<(), Refusal> {
        self.ram.dirty().set_enabled(true);
        self.ram.dirty().mark_all();
        Ok(())
    }

    fn stop_tracking(&mut self) -> Result<(), Refusal> {
        self.ram.dirty().set_enabled(false);
        Ok(())
    }

    fn harvest(&mut self) -> Result<(), Refusal> {
        (self.hook)(Moment::Harvest, &self.ram);
        Ok(())
    }

    fn throttle(&mut self, _: u8) {}

    fn dry_run(&mut self) -> Result<Vec<u8>, Refusal> {
        Ok(Self::DRY_RUN.to_vec())
    }

    fn pre_sync(&mut self) {}

    fn stop(&mut self) -> Result<Stopped, Refusal> {
        self.runs = false;
        (self.hook)(Moment::Stopped, &self.ram);
        Ok(Stopped {
            was_paused: false,
            clocks_at: Instant::now(),
        })
    }

    fn save(&mut self) -> Result<Vec<u8>, Refusal> {
        Ok(vec![2])
    }

    fn flush(&mut self) -> Result<(), Refusal> {
        Ok(())
    }

    fn hand_over(&mut self) -> Result<(), Refusal> {
        (self.hook)(Moment::Committed, &self.ram);
        Ok(())
    }

    fn show(&mut self, guest: &Whereabouts) {
        self.shown.push(guest.clone());
    }

    fn resume(&mut self) -> Result<(), Refusal> {
        self.runs = true;
        Ok(())
    }

    fn gone(&mut self) {}

    fn ended(&mut self, _: &Outcome) {
        (self.hook)(Moment::Ended, &self.ram);
    }
}
