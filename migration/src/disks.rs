//! Disks whose content moves with the guest.
//!
//! A disk is copied like a block of memory: in runs of pages of 4 KiB, over the same channels and under
//! the same bandwidth limit, first what is allocated, then in rounds what the guest wrote meanwhile. In
//! frames, disks are numbered behind the blocks of memory.
//!
//! ```text
//!   source                                      destination
//!   SourceDisk ── read ─► Pages, Zeros ══════►  DestinationDisk ─► NewImage::write, zero
//!       ▲ dirty bitmap: marked by the device      └─ sync after each round, and before `Ready`
//! ```
//!
//! In postcopy, blocks may follow the guest as pages of memory do, if both sides speak version 4: the source
//! announces them in `Missing`, and the destination's devices wait for them ([`AwaitedBlocks`]). Otherwise
//! all blocks are at the destination before the guest runs there. The image at the source is whole until
//! the destination has all.

use std::io;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use memory::{AwaitedBlocks, DirtyBitmap, PAGE_SIZE};
use parking_lot::Mutex;

use crate::MigrationError;
use crate::message::{BlockInfo, Refusal};
use crate::pages::{Block, Decoded, PAGE, Run, Sorted};

/// The version of the protocol that first copied disks.
pub(crate) const VERSION: u32 = 3;
/// The version in which blocks of disks may follow the guest.
pub(crate) const FOLLOW_VERSION: u32 = 4;
/// The version in which an offer may name the bases of disks.
pub(crate) const BASES_VERSION: u32 = 4;

/// Maximum size of all copied disks of a VM together: 8 TiB. Each side has a bit for each page.
pub const MAX_COPIED: u64 = 8 << 40;

/// Checks the sizes of the copied disks of a VM.
///
/// # Errors
/// `disks-too-large`: they have more than [`MAX_COPIED`] together.
pub fn check_sizes(sizes: impl Iterator<Item = u64>) -> Result<(), Refusal> {
    let total = sizes.fold(0, u64::saturating_add);
    if total <= MAX_COPIED {
        return Ok(());
    }
    let why =
        format!("the disks to copy have {total} bytes together; at most {MAX_COPIED} are copied");
    Err(Refusal::new("disks-too-large", why))
}

/// Reads the content of a disk, beside the guest that uses it.
pub trait ReadDisk: Send + Sync {
    /// Reads `data.len()` bytes from `offset` on, which are within the disk.
    ///
    /// # Errors
    /// The host cannot read.
    fn read(&self, offset: u64, data: &mut [u8]) -> io::Result<()>;
}

/// A disk that is copied, at the source.
#[derive(Clone)]
pub struct SourceDisk {
    /// Its name in the configuration of the VM.
    pub name: String,
    /// Bytes that the guest sees.
    pub size: u64,
    /// The pages that may differ from what was read last. At the start of tracking those that may have
    /// content; later those that the guest wrote, marked when the write has ended.
    pub dirty: Arc<DirtyBitmap>,
    /// Its content.
    pub content: Arc<dyn ReadDisk>,
}

/// An image that a destination has made for a disk: of zeros, or with the content of a base.
pub trait NewImage: Send + Sync {
    /// Whether it has the content of the source's base, above which the source sends everything. Otherwise
    /// it is zeros.
    fn has_base(&self) -> bool {
        false
    }

    /// Writes within the disk.
    ///
    /// # Errors
    /// The host cannot write.
    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()>;

    /// Makes a range of the disk zeros again.
    ///
    /// # Errors
    /// The host cannot write.
    fn zero(&self, offset: u64, len: u64) -> io::Result<()>;

    /// Makes durable all that was written.
    ///
    /// # Errors
    /// The host cannot write.
    fn sync(&self) -> io::Result<()>;
}

/// A disk that is copied, at the destination.
#[derive(Clone)]
pub struct DestinationDisk {
    /// Its name in the configuration of the VM.
    pub name: String,
    /// Bytes that the guest sees.
    pub size: u64,
    /// Its image.
    pub image: Arc<dyn NewImage>,
}

/// The memory and the disks that a source sends in pages. Disks are numbered behind blocks of memory.
#[derive(Clone, Copy)]
pub(crate) struct Contents<'a> {
    pub(crate) blocks: &'a [Block],
    pub(crate) disks: &'a [SourceDisk],
}

impl<'a> Contents<'a> {
    fn disk(self, index: u32) -> Option<&'a SourceDisk> {
        let index = (index as usize).checked_sub(self.blocks.len())?;
        self.disks.get(index)
    }

    pub(crate) fn is_disk(self, index: u32) -> bool {
        index as usize >= self.blocks.len()
    }

    pub(crate) fn block(self, index: u32) -> Option<&'a Block> {
        self.blocks.get(index as usize)
    }

    pub(crate) fn dirty(self, index: u32) -> Option<&'a DirtyBitmap> {
        let memory = self.block(index).map(|block| block.ram.dirty());
        memory.or_else(|| self.disk(index).map(|disk| &*disk.dirty))
    }

    /// Reads a run of pages as they are at this moment. The guest may write meanwhile. A torn page does no
    /// harm: the write marks it dirty, and it is sent again.
    pub(crate) fn read(self, run: Run, data: &mut [u8]) -> Result<(), MigrationError> {
        if let Some(block) = self.block(run.block) {
            let offset = usize::try_from(run.first)
                .unwrap_or(usize::MAX)
                .saturating_mul(PAGE);
            // Runs are within their block.
            let _ = block.ram.read_pages(offset, data);
            return check_lost(block);
        }
        let Some(disk) = self.disk(run.block) else {
            return Ok(());
        };
        let offset = run.first.saturating_mul(PAGE_SIZE);
        // The last page of a disk may end behind the disk: its rest stays zeros.
        let len = within(disk.size, offset, data.len());
        let data = data.get_mut(..len).unwrap_or_default();
        disk.content.read(offset, data).map_err(|error| {
            let why = format!(
                "cannot read the disk {} at offset {offset:#x}: {error}",
                disk.name
            );
            MigrationError::here("disk-unreadable", why)
        })
    }
}

/// Fails if the host lost memory of the block. Called behind a read: what that found in the place of
/// lost memory is not the guest's.
pub(crate) fn check_lost(block: &Block) -> Result<(), MigrationError> {
    let Some(offset) = block.ram.first_lost() else {
        return Ok(());
    };
    let why = format!("the host lost memory of the guest at offset {offset:#x} of its RAM");
    Err(MigrationError::here("memory-lost", why))
}

/// How many of `len` bytes from `offset` on are within the first `size`.
fn within(size: u64, offset: u64, len: usize) -> usize {
    let left = size.saturating_sub(offset);
    usize::try_from(left).map_or(len, |left| left.min(len))
}

/// The list of disks in an offer.
pub(crate) fn infos(disks: &[SourceDisk]) -> Vec<BlockInfo> {
    let info = |disk: &SourceDisk| BlockInfo {
        name: disk.name.clone(),
        size: disk.size,
    };
    disks.iter().map(info).collect()
}

/// A disk that arrives.
pub(crate) struct IncomingDisk {
    disk: DestinationDisk,
    /// Pages that may have content. All others are holes of the new image, and zeros for them are not
    /// written: a region of zeros takes no space. On a base, any page may have content.
    touched: DirtyBitmap,
    /// Pages that come after the guest, as the source announced them; absent where it announced none.
    announced: Mutex<Option<DirtyBitmap>>,
    /// The same, once the guest may run here.
    awaited: OnceLock<Arc<AwaitedBlocks>>,
}

fn bitmap(size: u64) -> DirtyBitmap {
    let bitmap = DirtyBitmap::new(usize::try_from(size).unwrap_or(usize::MAX));
    // A disabled bitmap ignores marks.
    bitmap.set_enabled(true);
    bitmap
}

impl IncomingDisk {
    pub(crate) fn new(disk: DestinationDisk) -> Self {
        let touched = bitmap(disk.size);
        if disk.image.has_base() {
            touched.mark(0, usize::try_from(disk.size).unwrap_or(usize::MAX));
        }
        Self {
            touched,
            disk,
            announced: Mutex::default(),
            awaited: OnceLock::new(),
        }
    }

    /// Notes pages, which are within the disk, that come after the guest.
    pub(crate) fn announce(&self, came: &Decoded<'_>) {
        let mut announced = self.announced.lock();
        let bitmap = announced.get_or_insert_with(|| bitmap(self.disk.size));
        for &(first, pages) in &came.runs {
            bitmap.mark(first * PAGE, pages * PAGE);
        }
    }

    /// Returns the pages that were announced, if some were: the guest may run here without them from now
    /// on. `on_wait` is called when the source should be asked for some.
    pub(crate) fn expect(
        &self,
        on_wait: impl Fn() + Send + Sync + 'static,
    ) -> Option<Arc<AwaitedBlocks>> {
        let announced = self.announced.lock().take();
        let missing = announced.filter(|missing| missing.count() > 0)?;
        let blocks = || AwaitedBlocks::new(self.disk.size, missing, on_wait);
        Some(Arc::clone(self.awaited.get_or_init(blocks)))
    }

    /// The pages that come after the guest, if it may run without them.
    pub(crate) fn awaited(&self) -> Option<&Arc<AwaitedBlocks>> {
        self.awaited.get()
    }

    /// Writes pages that followed the guest, unless it has written them meanwhile. Returns how long its
    /// requests waited for them.
    pub(crate) fn fill(
        &self,
        blocks: &Arc<AwaitedBlocks>,
        came: &Decoded<'_>,
    ) -> Result<Vec<Duration>, Refusal> {
        let (mut waited, mut data) = (Vec::new(), came.data);
        for &(first, pages) in &came.runs {
            let (here, rest) = data.split_at_checked(pages * PAGE).unwrap_or_default();
            data = rest;
            for claim in blocks.begin_fill(first, pages) {
                let run = claim.pages();
                let (from, to) = ((run.start - first) * PAGE, (run.end - first) * PAGE);
                // Without content, they are zeros.
                let here = here.get(from..to).unwrap_or_default();
                if here.is_empty() && blocks.is_tainted() {
                    // A write of the guest that failed may have left something there.
                    self.touched.mark(run.start * PAGE, run.len() * PAGE);
                }
                // A claim that is dropped leaves its pages missing.
                self.write_runs([(run.start, run.len())].into_iter(), here)?;
                waited.extend(claim.done());
            }
        }
        Ok(waited)
    }

    pub(crate) fn name(&self) -> &str {
        &self.disk.name
    }

    /// Pages of the disk, the last of which may be a part of one.
    pub(crate) fn pages(&self) -> usize {
        self.touched.pages()
    }

    pub(crate) fn sync(&self) -> Result<(), Refusal> {
        self.disk.image.sync().map_err(|error| self.failed(&error))
    }

    fn failed(&self, error: &io::Error) -> Refusal {
        let why = format!(
            "cannot write the new image of the disk {}: {error}",
            self.disk.name
        );
        let code = match error.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => "disk-full",
            _ => "disk-unwritable",
        };
        Refusal::new(code, why)
    }

    /// Writes pages that came, which are within the disk.
    pub(crate) fn apply(&self, came: &Decoded<'_>) -> Result<(), Refusal> {
        self.write_runs(came.runs.iter().copied(), came.data)
    }

    /// Writes pages of a batch, which are within the disk.
    pub(crate) fn write(&self, batch: Sorted<'_>) -> Result<(), Refusal> {
        // Within the disk, whose pages have a bit each.
        let runs = |runs: &[Run]| -> Vec<(usize, usize)> {
            let run = |run: &Run| (run.first as usize, run.pages as usize);
            runs.iter().map(run).collect()
        };
        if !batch.full.is_empty() {
            self.write_runs(runs(batch.full).into_iter(), batch.data)?;
        }
        self.write_runs(runs(batch.zeros).into_iter(), &[])
    }

    /// Writes runs of pages, whose content is `data`, or which are zeros if that is empty.
    fn write_runs(
        &self,
        runs: impl Iterator<Item = (usize, usize)>,
        mut data: &[u8],
    ) -> Result<(), Refusal> {
        let is_data = !data.is_empty();
        for (first, pages) in runs {
            let offset = first as u64 * PAGE_SIZE;
            let written = if is_data {
                let (here, rest) = data.split_at_checked(pages * PAGE).unwrap_or((data, &[]));
                data = rest;
                // Marked before the write: one that fails half-way has written something.
                self.touched.mark(first * PAGE, pages * PAGE);
                let here = here.get(..within(self.disk.size, offset, here.len()));
                self.disk.image.write(offset, here.unwrap_or_default())
            } else {
                self.zero(first, pages)
            };
            written.map_err(|error| self.failed(&error))?;
        }
        Ok(())
    }

    fn zero(&self, first: usize, pages: usize) -> io::Result<()> {
        for page in first..first + pages {
            if self.touched.is_dirty(page * PAGE) {
                let offset = page as u64 * PAGE_SIZE;
                let len = within(self.disk.size, offset, PAGE) as u64;
                self.disk.image.zero(offset, len)?;
            }
        }
        Ok(())
    }
}
