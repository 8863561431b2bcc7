//! Hotplugged memory: parts of a RAM block that the guest has, or has not. Tests of memory that goes
//! back to the host.

use std::io;

use crate::dirty::PAGE_SIZE;
use crate::ram::RamBlock;

impl RamBlock {
    /// Plugs `len` bytes from `offset` on, whole pages of the block: the guest has them from now on.
    /// They are zeros unless the guest wrote to them before, which it must not.
    ///
    /// # Errors
    /// They are not whole pages of the block, or the host has no memory for them (only with
    /// `prefault` and huge pages of the pool, of which the block then has none).
    pub fn plug(&self, offset: usize, len: usize) -> io::Result<()> {
        self.check_part(offset, len)?;
        if self.populates && self.dirty().has_unplugged() {
            // SAFETY: whole pages of our mapping, as just checked. Populating writes nothing to pages
            // that are there.
            let populated = unsafe {
                let from = self.host_addr().add(offset).cast();
                libc::madvise(from, len, libc::MADV_POPULATE_WRITE)
            };
            if populated != 0 {
                let error = io::Error::last_os_error();
                // The part of them that the host had goes back.
                self.discard(offset, len)?;
                return Err(error);
            }
        }
        self.dirty().set_plugged(offset, len, true);
        // A guest that broke the rules may have written to them, which was not tracked.
        self.dirty().mark(offset, len);
        Ok(())
    }

    /// Unplugs `len` bytes from `offset` on, whole pages of the block: they go back to the host, and
    /// the guest does not use them any more. A guest that touches them all the same finds zeros.
    ///
    /// # Errors
    /// They are not whole pages of the block, or the host refuses; then they stay plugged.
    pub fn unplug(&self, offset: usize, len: usize) -> io::Result<()> {
        self.check_part(offset, len)?;
        // Before they are unplugged: `discard` marks them, so that a migration's destination, which may
        // have their content, gets zeros.
        self.discard(offset, len)?;
        self.dirty().set_plugged(offset, len, false);
        Ok(())
    }

    fn check_part(&self, offset: usize, len: usize) -> io::Result<()> {
        let page = usize::try_from(self.page_size()).unwrap_or(usize::MAX);
        let is_whole = offset.is_multiple_of(page) && len.is_multiple_of(page);
        match offset.checked_add(len) {
            Some(end) if is_whole && end <= self.len() => Ok(()),
            _ => Err(io::ErrorKind::InvalidInput.into()),
        }
    }

    /// Returns how many of the 4 KiB pages of `len` bytes from `offset` on are plugged: all of them,
    /// unless the block is hotplugged memory.
    #[must_use]
    pub fn plugged_pages(&self, offset: usize, len: usize) -> usize {
        self.dirty().plugged(offset, len)
    }

    /// Returns how many bytes of the block are plugged.
    #[must_use]
    pub fn plugged_len(&self) -> usize {
        (self.dirty().plugged(0, self.len()) * PAGE_SIZE as usize).min(self.len())
    }

    /// Copies whole pages of the block, as they are at this moment, to `data`; unplugged pages are
    /// zeros and are not touched. False where `data` is more than the block has.
    #[must_use]
    pub fn read_pages(&self, offset: usize, data: &mut [u8]) -> bool {
        let page = PAGE_SIZE as usize;
        let Some(slice) = self.slice(offset, data.len()) else {
            return false;
        };
        let pages = data.len().div_ceil(page);
        if self.plugged_pages(offset, data.len()) == pages {
            slice.copy_to(data);
            return true;
        }
        // To read an unplugged page would have the host find memory for it, if the block is shared.
        for (index, into) in data.chunks_mut(page).enumerate() {
            let at = offset.saturating_add(index * page);
            match self.slice(at, into.len()) {
                Some(slice) if self.plugged_pages(at, into.len()) > 0 => {
                    slice.copy_to(into);
                }
                _ => into.fill(0),
            }
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ram_config::RamConfig;

    #[test]
    fn discarded_memory_is_zero_and_dirty() {
        for shared in [false, true] {
            let config = RamConfig {
                shared,
                ..RamConfig::anonymous(8 * PAGE_SIZE)
            };
            let block = RamBlock::new(&config).unwrap();
            let page = PAGE_SIZE as usize;
            let fill = block.slice(0, block.len()).unwrap();
            fill.copy_from(&vec![7_u8; block.len()]);
            block.dirty().set_enabled(true);
            drop(block.dirty().take());
            // Of the second page and the fifth only a part.
            assert_eq!(block.discard(page + 1, 3 * page).unwrap(), 2 * PAGE_SIZE);
            assert_eq!(block.discard(7 * page, 99 * page).unwrap(), PAGE_SIZE);
            assert_eq!(block.discard(usize::MAX, usize::MAX).unwrap(), 0);
            let mut seen = vec![0_u8; block.len()];
            block.slice(0, block.len()).unwrap().copy_to(&mut seen);
            let gone: Vec<_> = (0..8).filter(|i| seen[i * page] == 0).collect();
            assert_eq!(gone, [2, 3, 7]);
            assert!(seen.iter().filter(|byte| **byte == 7).count() == 5 * page);
            let dirty: Vec<_> = (0..8)
                .filter(|i| block.dirty().is_dirty(i * page))
                .collect();
            assert_eq!(dirty, gone);
        }
    }

    #[test]
    fn unplugged_memory_is_neither_read_nor_tracked() {
        let page = PAGE_SIZE as usize;
        for shared in [false, true] {
            let config = RamConfig {
                shared,
                prefault: true,
                hotplug: true,
                ..RamConfig::anonymous(256 * PAGE_SIZE)
            };
            let block = RamBlock::new(&config).unwrap();
            let write = |at: usize, byte| {
                block
                    .slice(at * page, page)
                    .unwrap()
                    .copy_from(&vec![byte; page]);
            };
            let blocks_of_file = |block: &RamBlock| {
                use std::os::unix::fs::MetadataExt;
                block.file().map(|file| file.metadata().unwrap().blocks())
            };
            assert_eq!(block.plugged_len(), 0);
            block.dirty().set_enabled(true);
            block.dirty().mark_all();
            write(3, 7);
            assert_eq!(block.dirty().count(), 0, "nothing is plugged");

            block.plug(64 * page, 66 * page).unwrap();
            assert_eq!(block.plugged_pages(0, 65 * page), 1);
            assert_eq!(block.plugged_len(), 66 * page);
            assert_eq!(block.dirty().take().runs().collect::<Vec<_>>(), [(64, 66)]);
            write(65, 8);
            block.dirty().mark_all();
            assert_eq!(block.dirty().count(), 66);
            assert_eq!(block.dirty().take().count(), 66);

            block.unplug(65 * page, 2 * page).unwrap();
            // The zeros that are there now have to reach a destination, also from a later round.
            let gone = block.dirty().take();
            assert_eq!(gone.runs().collect::<Vec<_>>(), [(65, 2)]);
            block.dirty().put_back(&gone);
            assert_eq!(block.dirty().count(), 2);
            drop(block.dirty().take());
            write(65, 9);
            assert_eq!(block.dirty().count(), 0);
            let mut seen = vec![1; 3 * page];
            assert!(block.read_pages(64 * page, &mut seen));
            assert!(
                seen.iter().all(|byte| *byte == 0),
                "unplugged pages are zeros"
            );

            // Reading what is unplugged takes no memory.
            block.unplug(0, block.len()).unwrap();
            assert!(matches!(blocks_of_file(&block), None | Some(0)));
            let mut all = vec![1; block.len()];
            assert!(block.read_pages(0, &mut all));
            assert!(all.iter().all(|byte| *byte == 0));
            assert!(matches!(blocks_of_file(&block), None | Some(0)));
            assert!(!block.read_pages(page, &mut all));

            for (at, len) in [
                (1, page),
                (0, 1),
                (0, 257 * page),
                (usize::MAX - 4095, page),
            ] {
                assert!(block.plug(at, len).is_err(), "{at:#x} {len:#x}");
                assert!(block.unplug(at, len).is_err(), "{at:#x} {len:#x}");
            }
        }
        let whole = RamBlock::new(&RamConfig::anonymous(PAGE_SIZE)).unwrap();
        assert_eq!(
            (whole.plugged_len(), whole.plugged_pages(0, 9000)),
            (page, 1)
        );
    }
}
