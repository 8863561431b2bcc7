//! Pages for which the host has found no memory yet. They are zeros, and no sender need read them: a
//! read would have the host find memory for a page of a shared block, and map its page of zeros for one
//! of a private block.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt as _;

use crate::dirty::{DirtyPages, PAGE_SIZE};
use crate::ram::{Pages, RamBlock};
use crate::view::Backing;

const PAGE: usize = PAGE_SIZE as usize;

/// Entries of the page map that are read at a time: those of 32 MiB.
const ENTRIES: usize = 8192;
/// Bits 63 and 62 of an entry of `/proc/PID/pagemap`: the page is present, or it is in swap or about to
/// move (pagemap.rst of the kernel).
const PRESENT_OR_SWAPPED: u64 = 3 << 62;

/// Ranges of a file with content that are looked for. A file in more pieces counts as populated behind
/// them, because each piece costs two system calls.
const MAX_PIECES: usize = 1 << 16;

impl RamBlock {
    /// Removes pages that are not populated from `pages`. Whether such a page is written to meanwhile is
    /// for the dirty bitmap to say: take `pages` out of it first.
    ///
    /// Removes nothing where the host cannot tell: for huge pages of the pool, and memory with content
    /// that is not there yet (a view of a file, pages that come after a guest).
    pub fn remove_unpopulated(&self, pages: &mut DirtyPages) {
        if self.page_size() != PAGE_SIZE || self.pages() != Pages::There {
            return;
        }
        let mut populated = DirtyPages::none(self.dirty().pages());
        let found = match self.backing() {
            Backing::Anonymous => self.find_in_page_map(&mut populated),
            // Not the page map: another process may have written through its own mapping.
            Backing::Shared(file) => self.find_in_file(file, &mut populated),
            Backing::View(..) => return,
        };
        // A kernel without a page map, or a process that may not read it: all pages are sent.
        if found.is_ok() {
            pages.retain(&populated);
        }
    }

    fn find_in_page_map(&self, populated: &mut DirtyPages) -> io::Result<()> {
        let map = File::open("/proc/self/pagemap")?;
        let base = self.host_addr().addr() / PAGE;
        let mut bytes = vec![0; ENTRIES * size_of::<u64>()];
        let all = self.len() / PAGE;
        for first in (0..all).step_by(ENTRIES) {
            let count = ENTRIES.min(all - first);
            let piece = &mut bytes[..count * size_of::<u64>()];
            map.read_exact_at(piece, ((base + first) * size_of::<u64>()) as u64)?;
            let (entries, _) = piece.as_chunks::<{ size_of::<u64>() }>();
            for (page, entry) in (first..).zip(entries) {
                if u64::from_ne_bytes(*entry) & PRESENT_OR_SWAPPED != 0 {
                    populated.set(page, 1);
                }
            }
        }
        Ok(())
    }

    fn find_in_file(&self, file: &File, populated: &mut DirtyPages) -> io::Result<()> {
        let mut at = 0;
        for _ in 0..MAX_PIECES {
            let Some(data) = seek(file, at, libc::SEEK_DATA)? else {
                return Ok(());
            };
            let end = seek(file, data, libc::SEEK_HOLE)?.unwrap_or(self.len());
            let end = end.min(self.len());
            populated.set(data / PAGE, end.div_ceil(PAGE).saturating_sub(data / PAGE));
            if end == self.len() {
                return Ok(());
            }
            at = end;
        }
        populated.set(at / PAGE, (self.len() - at) / PAGE);
        Ok(())
    }
}

/// The next data or hole of a file; `None` behind the last.
fn seek(file: &File, from: usize, what: libc::c_int) -> io::Result<Option<usize>> {
    let from = libc::off_t::try_from(from).map_err(io::Error::other)?;
    // The position of the descriptor changes, which nothing uses: memory files are only mapped.
    // SAFETY: takes numbers.
    let found = unsafe { libc::lseek(file.as_raw_fd(), from, what) };
    match usize::try_from(found) {
        Ok(found) => Ok(Some(found)),
        Err(_) => match io::Error::last_os_error() {
            error if error.raw_os_error() == Some(libc::ENXIO) => Ok(None),
            error => Err(error),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ram_config::RamConfig;

    /// All pages of a block, as at the start of tracking.
    fn all(block: &RamBlock) -> DirtyPages {
        block.dirty().mark_all();
        block.dirty().take()
    }

    fn populated(block: &RamBlock) -> Vec<(usize, usize)> {
        let mut pages = all(block);
        block.remove_unpopulated(&mut pages);
        pages.runs().collect()
    }

    fn block(shared: bool, pages: u64) -> RamBlock {
        let config = RamConfig {
            shared,
            thp: false,
            ..RamConfig::anonymous(pages * PAGE_SIZE)
        };
        RamBlock::new(&config).unwrap()
    }

    #[test]
    fn only_populated_pages_stay() {
        for shared in [false, true] {
            // More than are read at a time.
            let block = block(shared, ENTRIES as u64 + 100);
            assert_eq!(populated(&block), []);
            for page in [3, 4, 70, ENTRIES, ENTRIES + 99] {
                block
                    .slice(page * PAGE, PAGE)
                    .unwrap()
                    .copy_from(&[7; PAGE]);
            }
            let written = [(3, 2), (70, 1), (ENTRIES, 1), (ENTRIES + 99, 1)];
            assert_eq!(populated(&block), written, "{shared}");
            // Only pages that were asked about.
            let mut none = DirtyPages::none(block.dirty().pages());
            block.remove_unpopulated(&mut none);
            assert_eq!(none.count(), 0);
            block.discard(0, 10 * PAGE).unwrap();
            assert_eq!(populated(&block), written[1..], "{shared}");
        }
    }

    #[test]
    fn pages_that_are_elsewhere_stay() {
        use std::io::Write as _;

        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&vec![7; 8 * PAGE]).unwrap();
        let config = RamConfig::anonymous(8 * PAGE_SIZE);
        let view = RamBlock::map(&config, Some(Backing::View(file, 0))).unwrap();
        assert_eq!(populated(&view), [(0, 8)]);

        let awaited = std::sync::Arc::new(block(false, 8));
        let faults = crate::UserFaults::new(vec![awaited.clone()]);
        // A host may permit no userfaultfd.
        if let Ok(faults) = faults {
            assert_eq!(populated(&awaited), [(0, 8)]);
            drop(faults);
        }
    }

    /// Memory that was given to another process has pages that this one never touched.
    #[test]
    fn pages_that_another_mapping_wrote_stay() {
        let near = block(true, 8);
        let config = RamConfig {
            shared: true,
            ..RamConfig::anonymous(8 * PAGE_SIZE)
        };
        let file = near.file().unwrap().try_clone().unwrap();
        let far = RamBlock::of_file(&config, file).unwrap();
        far.slice(5 * PAGE, 1).unwrap().copy_from(&[7_u8]);
        assert_eq!(populated(&near), [(5, 1)]);
    }
}
