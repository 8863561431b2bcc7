//! RAM blocks that begin with the content of a file: private views, of which many share the file's pages
//! in the host's page cache.

use std::fs::File;
use std::io;
use std::sync::atomic::Ordering;

use crate::dirty::PAGE_SIZE;
use crate::ram::RamBlock;
use crate::ram_config::{RamConfig, RamError};

/// Pieces of a view that are replaced by zeros, at most. Each is up to two more mappings of the process,
/// of which all VMs together may have 65,530 (`vm.max_map_count`).
const MAX_HOLES: usize = 512;

/// The smallest piece that is replaced, in bytes: a guest that gives back single pages would use up
/// [`MAX_HOLES`] for next to nothing.
const MIN_HOLE: usize = 64 << 10;

/// The host memory of a block.
pub(crate) enum Backing {
    /// Private memory without a file.
    Anonymous,
    /// A file that other processes can be given, mapped shared.
    Shared(File),
    /// A file whose content the block begins with, from this offset on: it shares the host's page cache
    /// with all that map it, and its own writes go to private copies of the pages.
    View(File, u64),
}

impl Backing {
    pub(crate) fn file(&self) -> Option<&File> {
        match self {
            Self::Anonymous => None,
            Self::Shared(file) | Self::View(file, _) => Some(file),
        }
    }

    /// The offset in the file at which the block begins.
    pub(crate) fn offset(&self) -> u64 {
        match self {
            Self::Anonymous | Self::Shared(_) => 0,
            Self::View(_, offset) => *offset,
        }
    }
}

impl RamBlock {
    /// Maps pages of a view before they are touched, reading them from the file where the page cache lacks
    /// them. No private copy is made.
    ///
    /// # Errors
    /// The range is not of whole pages of the block, or the host cannot read them or lacks
    /// `MADV_POPULATE_READ` (Linux 5.14).
    pub fn populate(&self, offset: usize, len: usize) -> io::Result<()> {
        let is_within = offset.checked_add(len).is_some_and(|end| end <= self.len());
        if !is_within || !offset.is_multiple_of(PAGE_SIZE as usize) {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let from = self.host_addr().wrapping_add(offset);
        // SAFETY: the range is within our mapping, and reading pages does not change their contents.
        match unsafe { libc::madvise(from.cast(), len, libc::MADV_POPULATE_READ) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }

    /// Maps a private view of a file from `offset` on, in bytes, a multiple of the page size.
    ///
    /// The block begins with the file's content, and no write of the guest reaches the file. Nothing is
    /// read before it is touched, and all views of one file share the pages that were not written. The
    /// file must not change while it is mapped: pages that this block did not write would change with
    /// it. If the file shrinks, the block is [lost](crate::Pages::Lost).
    ///
    /// # Errors
    /// `config` asks for huge pages or for shared memory, the file is too short, or the host refuses.
    pub fn view_of_file(config: &RamConfig, file: File, offset: u64) -> Result<Self, RamError> {
        let refused = |why: &str| RamError::Host {
            attempt: "map a file as",
            size: config.size,
            source: io::Error::new(io::ErrorKind::InvalidInput, why),
        };
        if config.shared {
            let why = "memory that other processes share (`shared`) is no private view of a file";
            return Err(refused(why));
        }
        if config.hugepage_size.is_some() {
            return Err(refused("a file is not made of huge pages (`hugepages`)"));
        }
        let size = file.metadata().map_or(0, |metadata| metadata.len());
        if offset.checked_add(config.size).is_none_or(|end| end > size) {
            return Err(refused("the file is too short"));
        }
        Self::map(config, Some(Backing::View(file, offset)))
    }

    /// Puts zeros in the place of whole pages of a view, and gives those back to the host. Returns how
    /// many bytes they are: 0 if they keep their content, because they are too few, or the guest has
    /// given back too many pieces before.
    pub(crate) fn replace(&self, first: usize, len: usize) -> io::Result<u64> {
        let ordering = Ordering::Relaxed;
        let next = |holes| (holes < MAX_HOLES).then_some(holes + 1);
        // The guest chooses the pieces. Their number is limited, because all VMs of the process share
        // one limit for mappings.
        if len < MIN_HOLE || self.holes.fetch_update(ordering, ordering, next).is_err() {
            return Ok(0);
        }
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED | libc::MAP_NORESERVE;
        let access = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: the caller's pages are within the block.
        let at = unsafe { self.host_addr().add(first) }.cast();
        // MADV_DONTNEED would show the file's old content again, in place of zeros.
        // SAFETY: whole pages of the block's own mapping, swapped in one step. What others read or
        // write there meanwhile is what a guest may do to its memory at any time: all access is volatile.
        let mapped = unsafe { libc::mmap(at, len, access, flags, -1, 0) };
        if mapped == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        // The advice of the first mapping went with it: guest memory stays out of core dumps.
        // SAFETY: as above; the advice changes no content.
        unsafe { libc::madvise(at, len, libc::MADV_DONTDUMP) };
        // After the pages are gone, as for every discard: a sender that took the marks earlier would
        // never send the zeros.
        self.dirty().mark(first, len);
        Ok(len as u64)
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt as _;
    use std::sync::{Arc, mpsc};
    use std::time::Duration;

    use super::*;
    use crate::{PAGE_SIZE, Pages};

    const PAGE: usize = PAGE_SIZE as usize;

    /// A file of pages of which each has its number plus one in every byte.
    fn file(pages: usize) -> File {
        let file = tempfile::tempfile().unwrap();
        for page in 0..pages {
            let content = [(page % 251 + 1) as u8; PAGE];
            file.write_all_at(&content, (page * PAGE) as u64).unwrap();
        }
        file
    }

    fn view(file: &File, pages: usize) -> Arc<RamBlock> {
        let config = RamConfig::anonymous((pages * PAGE) as u64);
        let block = RamBlock::view_of_file(&config, file.try_clone().unwrap(), 0);
        Arc::new(block.unwrap())
    }

    fn first_bytes(block: &RamBlock) -> Vec<u8> {
        let pages = 0..block.len() / PAGE;
        let first = |page| {
            let mut byte = [0_u8];
            block.slice(page * PAGE, 1).unwrap().copy_to(&mut byte[..]);
            byte[0]
        };
        pages.map(first).collect()
    }

    #[test]
    fn writes_stay_in_the_view() {
        let file = file(8);
        let (one, other) = (view(&file, 8), view(&file, 8));
        one.slice(3 * PAGE, 1).unwrap().copy_from(&[99_u8]);
        assert_eq!(first_bytes(&one), [1, 2, 3, 99, 5, 6, 7, 8]);
        assert_eq!(first_bytes(&other), [1, 2, 3, 4, 5, 6, 7, 8]);
        let mut byte = [0];
        file.read_exact_at(&mut byte, 3 * PAGE_SIZE).unwrap();
        assert_eq!(byte, [4]);
        assert!(
            one.file().is_none(),
            "another process must not get the file"
        );
    }

    #[test]
    fn discarded_pages_are_zero_and_not_of_the_file() {
        let file = file(64);
        let block = view(&file, 64);
        block.slice(20 * PAGE, 1).unwrap().copy_from(&[99_u8]);
        block.dirty().set_enabled(true);
        assert_eq!(block.discard(16 * PAGE, 16 * PAGE).unwrap(), 16 * PAGE_SIZE);
        // Too few to be worth a mapping: they keep their content.
        assert_eq!(block.discard(40 * PAGE, PAGE).unwrap(), 0);
        let bytes = first_bytes(&block);
        for (page, byte) in bytes.iter().enumerate() {
            let gone = (16..32).contains(&page);
            assert_eq!(*byte, if gone { 0 } else { page as u8 + 1 }, "page {page}");
            assert_eq!(block.dirty().is_dirty(page * PAGE), gone);
        }
    }

    /// Each piece is a mapping of its own, of which a process has 65,530.
    #[test]
    fn number_of_discarded_pieces_is_limited() {
        const PIECE: usize = MIN_HOLE / PAGE;
        let pages = (MAX_HOLES + 8) * 2 * PIECE;
        let file = tempfile::tempfile().unwrap();
        file.set_len((pages * PAGE) as u64).unwrap();
        let block = view(&file, pages);
        let pieces = (0..pages).step_by(2 * PIECE);
        let freed = pieces.filter(|page| block.discard(page * PAGE, MIN_HOLE).unwrap() > 0);
        assert_eq!(freed.count(), MAX_HOLES);
    }

    #[test]
    fn view_of_file_that_shrinks_is_lost() {
        let file = file(32);
        let block = view(&file, 32);
        let (tell, told) = mpsc::channel();
        let _watch = block.on_lost(move |at| tell.send(at).unwrap());
        block.slice(9 * PAGE, 1).unwrap().copy_from(&[99_u8]);
        file.set_len(8 * PAGE_SIZE).unwrap();
        let bytes = first_bytes(&block);
        assert_eq!(bytes[..8], [1, 2, 3, 4, 5, 6, 7, 8]);
        assert_eq!(block.pages(), Pages::Lost);
        let at = told.recv_timeout(Duration::from_secs(60)).unwrap();
        assert_eq!(at, 8 * PAGE_SIZE);

        // A vCPU meets the hole, and this process does not: the file's size tells.
        let block = view(&file, 8);
        file.set_len(2 * PAGE_SIZE).unwrap();
        block.check_file();
        assert_eq!(block.first_lost(), Some(2 * PAGE_SIZE));
    }

    #[test]
    fn view_begins_at_its_offset() {
        let file = file(8);
        let config = RamConfig::anonymous(3 * PAGE_SIZE);
        let at =
            |page| RamBlock::view_of_file(&config, file.try_clone().unwrap(), page * PAGE_SIZE);
        let block = Arc::new(at(5).unwrap());
        assert_eq!(first_bytes(&block), [6, 7, 8]);
        assert!(at(6).is_err() && at(u64::MAX / PAGE_SIZE).is_err());
        file.set_len(7 * PAGE_SIZE).unwrap();
        block.check_file();
        assert_eq!(block.first_lost(), Some(2 * PAGE_SIZE));
    }

    #[test]
    fn rejects_what_a_view_cannot_be() {
        let size = 8 * PAGE_SIZE;
        for config in [
            RamConfig {
                shared: true,
                ..RamConfig::anonymous(size)
            },
            RamConfig {
                hugepage_size: Some(2 << 20),
                ..RamConfig::anonymous(size)
            },
            RamConfig::anonymous(2 * size),
        ] {
            assert!(
                RamBlock::view_of_file(&config, file(8), 0).is_err(),
                "{config:?}"
            );
        }
    }
}
