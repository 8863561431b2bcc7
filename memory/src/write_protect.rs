//! Write protection of RAM blocks by userfaultfd, for snapshots of a running guest.
//!
//! ```text
//!   protect ──► a thread writes: it waits ──► wait() names the page ──► release ──► it writes
//! ```
//!
//! The kernel enforces the protection for every write through this process's mapping: of vCPUs, of
//! devices, and of the kernel for them (`read`, io_uring). Reads are not affected. Other processes
//! that map a shared block are not restricted.

use std::fmt;
use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use userfaultfd::{Event, FaultKind, FeatureFlags, RegisterMode, Uffd};

use crate::dirty::PAGE_SIZE;
use crate::ram::RamBlock;
use crate::userfault::{address, find, into_io, open, poll, read};

const PAGE: usize = PAGE_SIZE as usize;

/// The host cannot write-protect memory.
#[derive(Debug, thiserror::Error)]
#[error("the host cannot write-protect guest memory ({what}): {source}")]
pub struct WriteProtectError {
    what: &'static str,
    source: io::Error,
}

/// RAM blocks whose pages can be write-protected. Dropping it permits all writes again.
pub struct WriteProtection {
    uffd: Uffd,
    blocks: Vec<Arc<RamBlock>>,
}

impl WriteProtection {
    /// Bytes that one call to the kernel should protect or release at most. While it runs, KVM lets no
    /// vCPU map a page of the range, and while memory is unregistered the process can map no page at
    /// all. At some 80 ns for each page this range takes 0.1 ms; 8 GiB at once would stop the guest for
    /// 170 ms.
    pub const PIECE: usize = 4 << 20;

    /// Registers the blocks. No page is protected yet.
    ///
    /// # Errors
    /// The host's kernel is older than Linux 6.4 (5.19 if all blocks are shared) or does not permit
    /// userfaultfd; a block is made of huge pages, is registered by another user of userfaultfd, or maps
    /// a file that is not a memfd.
    pub fn new(blocks: Vec<Arc<RamBlock>>) -> Result<Self, WriteProtectError> {
        let refused = |what| move |source| WriteProtectError { what, source };
        if blocks.iter().any(|block| block.page_size() != PAGE_SIZE) {
            let why = "it is backed by huge pages";
            let source = io::Error::new(io::ErrorKind::Unsupported, why);
            return Err(refused("page by page")(source));
        }
        let may_change =
            |block: &Arc<RamBlock>| block.guest_plugs && block.plugged_len() < block.len();
        if blocks.iter().any(may_change) {
            let why = "the guest can plug more of it at any time";
            let source = io::Error::new(io::ErrorKind::Unsupported, why);
            return Err(refused("hotplugged memory")(source));
        }
        let is_shared = blocks.iter().all(|block| block.file().is_some());
        let what = if is_shared {
            "userfaultfd with WP_HUGETLBFS_SHMEM, which Linux has since 5.19"
        } else {
            "userfaultfd with WP_UNPOPULATED, which Linux has since 6.4"
        };
        let uffd = open(features(is_shared)).map_err(refused(what))?;
        let mut protection = Self {
            uffd,
            blocks: Vec::new(),
        };
        for block in blocks {
            // The drop of `protection` must not end the protection of another owner.
            if block.write_protected.swap(true, Ordering::AcqRel) {
                return Err(refused("another user")(io::ErrorKind::ResourceBusy.into()));
            }
            let (start, mode) = (address(&block, 0), RegisterMode::WRITE_PROTECT);
            let registered = protection.uffd.register_with_mode(start, block.len(), mode);
            if let Err(error) = registered {
                block.write_protected.store(false, Ordering::Release);
                return Err(refused("UFFDIO_REGISTER")(into_io(error)));
            }
            protection.blocks.push(block);
        }
        Ok(protection)
    }

    /// Protects `pages` pages from `first` on. Pages without content are protected, too.
    ///
    /// # Errors
    /// There are no such pages, or the host refuses.
    pub fn protect(&self, block: usize, first: usize, pages: usize) -> io::Result<()> {
        let (start, len) = self.range(block, first, pages)?;
        self.uffd.write_protect(start, len).map_err(into_io)
    }

    /// Permits writes to `pages` pages from `first` on, and wakes the threads that wait for that.
    ///
    /// # Errors
    /// There are no such pages, or the host refuses.
    pub fn release(&self, block: usize, first: usize, pages: usize) -> io::Result<()> {
        let (start, len) = self.range(block, first, pages)?;
        self.uffd
            .remove_write_protection(start, len, true)
            .map_err(into_io)
    }

    fn range(
        &self,
        block: usize,
        first: usize,
        pages: usize,
    ) -> io::Result<(*mut libc::c_void, usize)> {
        let found = self.blocks.get(block).ok_or(io::ErrorKind::InvalidInput)?;
        let end = first.checked_add(pages);
        let end = end.filter(|end| pages > 0 && *end <= found.len() / PAGE);
        end.ok_or(io::ErrorKind::InvalidInput)?;
        Ok((address(found, first * PAGE), pages * PAGE))
    }

    /// Waits at most `patience` for writes to protected pages. Returns the block's index and the page's
    /// for each; a thread waits until that page is [released](Self::release).
    ///
    /// # Errors
    /// The descriptor cannot be read.
    pub fn wait(&self, patience: Duration) -> io::Result<Vec<(usize, usize)>> {
        let page = |event: &Event| match *event {
            Event::Pagefault {
                kind: FaultKind::WriteProtected,
                addr,
                ..
            } => find(&self.blocks, addr.addr()),
            // Neither asked for nor registered for.
            _ => None,
        };
        if !poll(&self.uffd, patience)? {
            return Ok(Vec::new());
        }
        Ok(read(&self.uffd)?.iter().filter_map(page).collect())
    }

    /// Permits all writes, and wakes all threads that wait. Later calls have no effect.
    pub fn end(&self) {
        for block in &self.blocks {
            if block.write_protected.swap(false, Ordering::AcqRel) {
                // Removes the protection of each page. Linux wakes waiters then only if the range is
                // registered for missing pages too, so the wake is a call of its own. Both fail only
                // for a range that is not registered or not mapped.
                for start in (0..block.len()).step_by(Self::PIECE) {
                    let len = Self::PIECE.min(block.len() - start);
                    let _ = self.uffd.unregister(address(block, start), len);
                    let _ = self.uffd.wake(address(block, start), len);
                }
            }
        }
    }
}

impl Drop for WriteProtection {
    fn drop(&mut self) {
        self.end();
    }
}

impl fmt::Debug for WriteProtection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "WriteProtection({:?})", self.blocks)
    }
}

impl RamBlock {
    /// Waits until a [`WriteProtection`] permits writes to these pages. Without this, a discard would
    /// destroy content that a snapshot has yet to copy: dropping a page is no write fault.
    pub(crate) fn await_copies(&self, first: usize, len: usize) -> io::Result<()> {
        loop {
            // SAFETY: whole pages of our mapping. The kernel faults them in as a write would, and
            // changes no content.
            let populated = unsafe {
                libc::madvise(
                    self.host_addr().add(first).cast(),
                    len,
                    libc::MADV_POPULATE_WRITE,
                )
            };
            if populated == 0 {
                return Ok(());
            }
            match io::Error::last_os_error() {
                error if error.kind() == io::ErrorKind::Interrupted => {}
                error => return Err(error),
            }
        }
    }
}

fn features(is_shared: bool) -> FeatureFlags {
    /// `UFFD_FEATURE_WP_HUGETLBFS_SHMEM` (Linux 5.19): shared memory can be protected.
    const SHARED: u64 = 1 << 12;
    /// `UFFD_FEATURE_WP_UNPOPULATED` (Linux 6.4): pages of private memory that have no content yet are
    /// protected. Without it the first write to such a page is not noticed. Shared memory needs no feature
    /// for that.
    const UNPOPULATED: u64 = 1 << 13;
    let more = if is_shared {
        SHARED
    } else {
        SHARED | UNPOPULATED
    };
    FeatureFlags::PAGEFAULT_FLAG_WP | FeatureFlags::from_bits_retain(more)
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsRawFd;
    use std::thread;

    use super::*;
    use crate::ram_config::RamConfig;

    fn block(shared: bool) -> Arc<RamBlock> {
        block_of(shared, 8)
    }

    fn block_of(shared: bool, pages: u64) -> Arc<RamBlock> {
        let config = RamConfig {
            shared,
            ..RamConfig::anonymous(pages * PAGE_SIZE)
        };
        let block = Arc::new(RamBlock::new(&config).unwrap());
        block.slice(0, PAGE).unwrap().copy_from(&[1_u8; PAGE]);
        block
    }

    fn read(block: &RamBlock, page: usize) -> u8 {
        let mut byte = [0_u8];
        block.slice(page * PAGE, 1).unwrap().copy_to(&mut byte[..]);
        byte[0]
    }

    fn next(protection: &WriteProtection) -> (usize, usize) {
        loop {
            if let [fault, ..] = protection.wait(Duration::from_secs(10)).unwrap()[..] {
                return fault;
            }
        }
    }

    /// Pages with content and without, of private and of shared memory.
    #[test]
    fn writes_wait_until_their_page_is_released() {
        for shared in [false, true] {
            let ram = block(shared);
            let protection = WriteProtection::new(vec![Arc::clone(&ram)]).unwrap();
            protection.protect(0, 0, 8).unwrap();
            let writer = Arc::clone(&ram);
            let written = thread::spawn(move || {
                for page in [0, 5] {
                    writer.slice(page * PAGE, 1).unwrap().copy_from(&[9_u8]);
                }
            });
            for (page, before) in [(0, 1), (5, 0)] {
                assert_eq!(next(&protection), (0, page));
                assert_eq!(read(&ram, page), before, "the write has not happened");
                protection.release(0, page, 1).unwrap();
            }
            written.join().unwrap();
            assert_eq!((read(&ram, 0), read(&ram, 5)), (9, 9));
            assert!(protection.release(0, 8, 1).is_err());
            assert!(protection.protect(1, 0, 1).is_err());
            assert!(protection.protect(0, 7, usize::MAX).is_err());
        }
    }

    /// A disk read into guest memory is a write by the kernel.
    #[test]
    fn kernel_waits_as_threads_do() {
        for shared in [false, true] {
            let ram = block(shared);
            let protection = WriteProtection::new(vec![Arc::clone(&ram)]).unwrap();
            protection.protect(0, 0, 8).unwrap();
            let target = Arc::clone(&ram);
            let done = thread::spawn(move || {
                let zeros = std::fs::File::open("/dev/zero").unwrap();
                // SAFETY: a page of the block, which lives through the call.
                unsafe { libc::read(zeros.as_raw_fd(), target.host_addr().cast(), PAGE) }
            });
            assert_eq!(next(&protection), (0, 0));
            assert_eq!(read(&ram, 0), 1);
            protection.release(0, 0, 1).unwrap();
            assert_eq!(done.join().unwrap(), PAGE as isize);
            assert_eq!(read(&ram, 0), 0);
        }
    }

    #[test]
    fn discard_waits_until_its_pages_are_released() {
        for shared in [false, true] {
            let ram = block(shared);
            let protection = WriteProtection::new(vec![Arc::clone(&ram)]).unwrap();
            protection.protect(0, 0, 8).unwrap();
            let balloon = Arc::clone(&ram);
            let discarded = thread::spawn(move || balloon.discard(0, 2 * PAGE).unwrap());
            for page in 0..2 {
                assert_eq!(next(&protection), (0, page));
                assert_eq!(read(&ram, page), u8::from(page == 0));
                protection.release(0, page, 1).unwrap();
            }
            assert_eq!(discarded.join().unwrap(), 2 * PAGE_SIZE);
            assert_eq!(read(&ram, 0), 0);
        }
    }

    /// The memory is more than one piece, and not a multiple of one.
    #[test]
    fn end_permits_all_writes() {
        let pages = 2 * WriteProtection::PIECE / PAGE + 1;
        for shared in [false, true] {
            let ram = block_of(shared, pages as u64);
            let protection = WriteProtection::new(vec![Arc::clone(&ram)]).unwrap();
            // A block that is registered already, by whichever user.
            WriteProtection::new(vec![Arc::clone(&ram)]).unwrap_err();
            protection.protect(0, 0, pages).unwrap();
            let writer = Arc::clone(&ram);
            let written = thread::spawn(move || {
                for page in (0..pages).step_by(pages / 2) {
                    writer.slice(page * PAGE, 1).unwrap().copy_from(&[9_u8]);
                }
            });
            next(&protection);
            protection.end();
            written.join().unwrap();
            assert_eq!(ram.discard(0, PAGE).unwrap(), PAGE_SIZE);
            drop(protection);
            WriteProtection::new(vec![ram]).unwrap();
        }
    }
}
