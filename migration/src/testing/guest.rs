//! A guest that consists of memory alone: a [`Source`] for tests of the engine without a machine.

use std::io;
use std::sync::{Arc, Mutex};
use std::time::Instant;

use memory::{DirtyBitmap, PAGE_SIZE, RamBlock, RamConfig};

use crate::disks::{self, DestinationDisk, NewImage, ReadDisk, SourceDisk};
use crate::message::{BlockInfo, Offer, Refusal};
use crate::pages::Block;
use crate::source::{Outcome, Source, Stopped, Whereabouts};

/// Returns anonymous memory of `pages` pages.
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

/// A disk in memory: that of a guest, or its image at a destination.
pub struct MemoryDisk {
    content: Mutex<Vec<u8>>,
    dirty: Arc<DirtyBitmap>,
    /// Bytes that were written since the last sync.
    unsynced: Mutex<u64>,
}

impl MemoryDisk {
    /// Returns a disk of `size` bytes of zeros.
    #[must_use]
    pub fn new(size: usize) -> Arc<Self> {
        Arc::new(Self {
            content: Mutex::new(vec![0; size]),
            dirty: Arc::new(DirtyBitmap::new(size)),
            unsynced: Mutex::new(0),
        })
    }

    /// Returns a copy of the content.
    #[must_use]
    pub fn contents(&self) -> Vec<u8> {
        self.content.lock().unwrap().clone()
    }

    /// Whether all that was written was synced.
    #[must_use]
    pub fn is_synced(&self) -> bool {
        *self.unsynced.lock().unwrap() == 0
    }

    /// Returns `len` bytes, as the guest's device reads them.
    #[must_use]
    pub fn read_back(&self, offset: usize, len: usize) -> Vec<u8> {
        self.content.lock().unwrap()[offset..offset + len].to_vec()
    }

    /// Fills `len` bytes, as the guest's device does: the bytes first, then the mark.
    pub fn fill(&self, offset: usize, len: usize, byte: u8) {
        let mut content = self.content.lock().unwrap();
        let end = content.len().min(offset.saturating_add(len));
        if let Some(range) = content.get_mut(offset..end) {
            range.fill(byte);
        }
        drop(content);
        self.dirty.mark(offset, len);
    }

    /// Begins or ends tracking; at the start all pages with content are dirty.
    pub fn track(&self, on: bool) {
        self.dirty.set_enabled(on);
        let content = self.content.lock().unwrap();
        for (page, bytes) in content.chunks(PAGE_SIZE as usize).enumerate() {
            if on && bytes.iter().any(|byte| *byte != 0) {
                self.dirty.mark(page * PAGE_SIZE as usize, 1);
            }
        }
    }

    /// Returns the disk as a source sees it.
    #[must_use]
    pub fn at_source(self: &Arc<Self>, name: &str) -> SourceDisk {
        SourceDisk {
            name: name.to_owned(),
            size: self.content.lock().unwrap().len() as u64,
            dirty: Arc::clone(&self.dirty),
            content: Arc::clone(self) as Arc<dyn ReadDisk>,
        }
    }

    /// Returns the disk as a destination sees it.
    #[must_use]
    pub fn at_destination(self: &Arc<Self>, name: &str) -> DestinationDisk {
        DestinationDisk {
            name: name.to_owned(),
            size: self.content.lock().unwrap().len() as u64,
            image: Arc::clone(self) as Arc<dyn NewImage>,
        }
    }
}

impl ReadDisk for MemoryDisk {
    fn read(&self, offset: u64, data: &mut [u8]) -> io::Result<()> {
        let offset = offset as usize;
        let content = self.content.lock().unwrap();
        // A read past the end is a fault of the engine.
        data.copy_from_slice(&content[offset..offset + data.len()]);
        Ok(())
    }
}

impl NewImage for MemoryDisk {
    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        let offset = offset as usize;
        self.content.lock().unwrap()[offset..offset + data.len()].copy_from_slice(data);
        *self.unsynced.lock().unwrap() += data.len() as u64;
        Ok(())
    }

    fn zero(&self, offset: u64, len: u64) -> io::Result<()> {
        self.write(offset, &vec![0; len as usize])
    }

    fn sync(&self) -> io::Result<()> {
        *self.unsynced.lock().unwrap() = 0;
        Ok(())
    }
}

/// A moment in a migration, in which a test may act.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Moment {
    /// Dirty pages are collected; the guest may run.
    Harvest,
    /// The guest was stopped.
    Stopped,
    /// The guest resumes at the source.
    Resumed,
    /// The source has committed, and has not sent `Commit`.
    Committed,
    /// The outcome is known, and the report does not show it.
    Ended,
}

type Hook = Box<dyn FnMut(Moment, &RamBlock) + Send>;

/// Returns the name of the disk with this index.
#[must_use]
pub fn disk_name(index: usize) -> String {
    format!("disk{index}")
}

/// A guest of memory and disks alone.
pub struct MemoryGuest {
    /// Its memory.
    pub ram: Arc<RamBlock>,
    /// Its disks, which are copied.
    pub disks: Vec<Arc<MemoryDisk>>,
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
            disks: Vec::new(),
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
            disks: disks::infos(&self.disks()),
        })
    }

    fn blocks(&self) -> Vec<Block> {
        blocks(&self.ram)
    }

    fn disks(&self) -> Vec<SourceDisk> {
        let named = |(index, disk): (usize, &Arc<MemoryDisk>)| disk.at_source(&disk_name(index));
        self.disks.iter().enumerate().map(named).collect()
    }

    fn start_tracking(&mut self) -> Result<(), Refusal> {
        self.ram.dirty().set_enabled(true);
        self.ram.dirty().mark_all();
        self.disks.iter().for_each(|disk| disk.track(true));
        Ok(())
    }

    fn stop_tracking(&mut self) -> Result<(), Refusal> {
        self.ram.dirty().set_enabled(false);
        self.disks.iter().for_each(|disk| disk.track(false));
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

    fn resume_copying(&mut self) -> Result<(), Refusal> {
        self.runs = true;
        Ok(())
    }

    fn resume(&mut self) -> Result<(), Refusal> {
        (self.hook)(Moment::Resumed, &self.ram);
        self.runs = true;
        Ok(())
    }

    fn gone(&mut self) {}

    fn ended(&mut self, _: &Outcome) {
        (self.hook)(Moment::Ended, &self.ram);
    }
}
