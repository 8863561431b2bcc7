//! RAM blocks: the host memory behind guest RAM.

use std::fmt;
use std::fs::File;
use std::io;
use std::mem::ManuallyDrop;
use std::os::fd::{AsRawFd, FromRawFd};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use crate::dirty::{DirtyBitmap, PAGE_SIZE};
use crate::hugepages;
use crate::lost::Registered;
use crate::node;
use crate::ram_config::{RamConfig, RamError};
use crate::view::Backing;

/// A piece of host memory that guests see as RAM, whole or in slices.
///
/// It is unmapped when the last owner lets go: each flat view that shows it is one, and so is
/// each reader of such a view. Nothing is unmapped under a reader.
pub struct RamBlock {
    host: NonNull<u8>,
    len: usize,
    backing: Backing,
    /// Pieces of a [view](Backing::View) that were replaced by zeros.
    pub(crate) holes: AtomicUsize,
    dirty: DirtyBitmap,
    page_size: u64,
    /// Transparent huge pages are allowed.
    thp: bool,
    /// Plugging brings in the pages.
    pub(crate) populates: bool,
    /// The guest changes what is plugged.
    pub(crate) guest_plugs: bool,
    /// Writes are caught by a [`WriteProtection`](crate::WriteProtection).
    pub(crate) write_protected: AtomicBool,
    /// The mapping's entry for the SIGBUS handler, which also holds its [`Pages`]. Dropped before the
    /// mapping is removed.
    registered: ManuallyDrop<Registered>,
}

/// Whether the pages of a block are there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Pages {
    /// All are.
    There = 0,
    /// Some may come later: a thread that touches one waits ([`UserFaults`](crate::UserFaults)).
    Awaited = 1,
    /// Those that are missing do not come any more: a migration ended, or the host
    /// [lost](RamBlock::on_lost) them. The content found in their place is not the guest's, and must
    /// not be written to a disk, network or peer.
    Lost = 2,
}

// SAFETY: the block owns its mapping, and shares nothing but its address; all access to the bytes
// goes through volatile slices, which are made for memory that others write to at any time.
unsafe impl Send for RamBlock {}
// SAFETY: as above.
unsafe impl Sync for RamBlock {}

impl RamBlock {
    /// Maps host memory as `config` says.
    ///
    /// # Errors
    /// Fails if the size does not fit the page size, or the host refuses.
    pub fn new(config: &RamConfig) -> Result<Self, RamError> {
        Self::map(config, None)
    }

    /// Maps memory that another process has given: the [file](Self::file) of a block that it made
    /// with the same `config`. The content stays.
    ///
    /// # Errors
    /// Fails if the file is not such memory, is not sealed against shrinking, or the host refuses.
    pub fn of_file(config: &RamConfig, file: File) -> Result<Self, RamError> {
        let refused = |why: &str| RamError::Host {
            attempt: "take over",
            size: config.size,
            source: io::Error::new(io::ErrorKind::InvalidInput, why),
        };
        if !config.shared {
            return Err(refused(
                "private memory cannot be handed over: only shared memory has a descriptor",
            ));
        }
        let size = file.metadata().map_or(0, |metadata| metadata.len());
        if size != config.size {
            return Err(refused("the file has another size"));
        }
        // The giver could shrink an unsealed file, and each access of the guest would raise SIGBUS.
        // SAFETY: takes no argument beyond the command.
        let seals = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_GET_SEALS) };
        if seals < 0 || seals & libc::F_SEAL_SHRINK == 0 {
            return Err(refused("the file is not sealed against shrinking"));
        }
        Self::map(config, Some(Backing::Shared(file)))
    }

    pub(crate) fn map(config: &RamConfig, given: Option<Backing>) -> Result<Self, RamError> {
        let page_size = match config.hugepage_size {
            None => PAGE_SIZE,
            Some(size) if size.is_power_of_two() && size > PAGE_SIZE => size,
            Some(size) => return Err(RamError::HugePage(size)),
        };
        let size = config.size;
        // Offsets into one allocation must fit an `isize`, or pointer arithmetic is undefined.
        let len = usize::try_from(size)
            .ok()
            .filter(|len| {
                *len > 0 && isize::try_from(*len).is_ok() && size.is_multiple_of(page_size)
            })
            .ok_or(RamError::Size {
                size,
                page: page_size,
            })?;
        let backing = match given {
            Some(given) => given,
            None if config.shared => Backing::Shared(
                memfd(config).map_err(|error| host_error(config, "allocate", error))?,
            ),
            None => Backing::Anonymous,
        };
        let host = map_pages(config, &backing, len)?;
        let registered = Registered::new(host.as_ptr(), len, page_size).map_err(|source| {
            // There is no `RamBlock` yet whose drop would unmap.
            // SAFETY: the mapping was just made, and is not used yet.
            unsafe { libc::munmap(host.as_ptr().cast(), len) };
            RamError::Host {
                attempt: "watch",
                size,
                source,
            }
        })?;
        let is_view = matches!(backing, Backing::View(..));
        let block = Self {
            host,
            len,
            backing,
            holes: AtomicUsize::new(0),
            dirty: if config.hotplug {
                DirtyBitmap::unplugged(len)
            } else {
                DirtyBitmap::new(len)
            },
            guest_plugs: config.guest_plugs,
            populates: !is_view && (config.prefault || config.hugepage_size.is_some()),
            page_size,
            thp: config.thp && config.hugepage_size.is_none() && !is_view,
            write_protected: AtomicBool::new(false),
            registered: ManuallyDrop::new(registered),
        };
        block.set_policies(config)?;
        Ok(block)
    }

    /// Tells the host how to back the pages, and populates them if the configuration asks for it.
    fn set_policies(&self, config: &RamConfig) -> Result<(), RamError> {
        let refused = |attempt| {
            move |source| RamError::Host {
                attempt,
                size: config.size,
                source,
            }
        };
        let is_view = matches!(self.backing, Backing::View(..));
        if let Some(node) = config.host_node {
            // SAFETY: the block's own mapping, which was just made.
            unsafe { node::bind(self.host.as_ptr(), self.len, node)? };
        }
        if config.mergeable {
            self.advise(libc::MADV_MERGEABLE)
                .map_err(refused("make mergeable"))?;
        }
        // A view has the pages of the page cache, whatever their size.
        if config.hugepage_size.is_none() && !is_view {
            let thp = if config.thp {
                libc::MADV_HUGEPAGE
            } else {
                libc::MADV_NOHUGEPAGE
            };
            // Advice: a kernel that is built without them works just as well.
            let _ = self.advise(thp);
        }
        // A core dump of the VMM is not the place for the guest's memory.
        let _ = self.advise(libc::MADV_DONTDUMP);
        // The reservation of huge pages does not say on which node they are. A page that the node lacks
        // would be a bus error when the guest touches it.
        let may_lack = config.hugepage_size.is_some() && config.host_node.is_some();
        if (config.prefault || may_lack) && !config.hotplug {
            // Populate after the advice: memory that is touched before it gets small pages.
            // MADV_POPULATE_WRITE reports a lack of memory now. MAP_POPULATE would ignore it, and the
            // guest would meet it later.
            // A view is populated with the file's pages: a private copy of each would share nothing.
            let populate = match is_view {
                true => libc::MADV_POPULATE_READ,
                false => libc::MADV_POPULATE_WRITE,
            };
            self.advise(populate).map_err(refused("populate"))?;
        }
        Ok(())
    }

    fn advise(&self, advice: libc::c_int) -> io::Result<()> {
        // SAFETY: the mapping is ours, and none of the advice used here changes its contents.
        match unsafe { libc::madvise(self.host.as_ptr().cast(), self.len, advice) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }

    /// Disables transparent huge pages. Postcopy needs this: a huge page would cover pages that have not
    /// arrived.
    ///
    /// # Errors
    /// `madvise` fails.
    pub fn refuse_huge_pages(&self) -> io::Result<()> {
        match self.advise(libc::MADV_NOHUGEPAGE) {
            // A kernel that is built without them makes none.
            Err(error) if error.kind() == io::ErrorKind::InvalidInput => Ok(()),
            done => done,
        }
    }

    /// Allows transparent huge pages again, if the block was configured with them.
    pub(crate) fn permit_huge_pages(&self) {
        if self.thp {
            // Advice, as it was when the block was made.
            let _ = self.advise(libc::MADV_HUGEPAGE);
        }
    }

    /// Gives the pages that are wholly among `len` bytes from `offset` on back to the host; they read
    /// as zeros from now on, and count as written. Returns how many bytes they are: 0 if a private view
    /// of a file keeps them, as they are, because they are too few or in too many pieces.
    ///
    /// # Errors
    /// Fails if the host refuses.
    pub fn discard(&self, offset: usize, len: usize) -> io::Result<u64> {
        let page = usize::try_from(self.page_size).unwrap_or(usize::MAX);
        // Round inwards: a page of which only a part was named still holds data of the guest.
        let end = offset.saturating_add(len).min(self.len);
        let first = offset.checked_next_multiple_of(page).unwrap_or(end);
        let last = end - end % page;
        let Some(len) = last.checked_sub(first).filter(|len| *len > 0) else {
            return Ok(0);
        };
        if self.write_protected.load(Ordering::Acquire) {
            self.await_copies(first, len)?;
        }
        // On shared memory MADV_DONTNEED drops only this process's page table entries: the memfd
        // keeps the pages. MADV_REMOVE punches a hole into the file, which the seals permit: they
        // fix its size only. Private anonymous memory has no file, and MADV_REMOVE fails there.
        let advice = match &self.backing {
            Backing::Shared(_) => libc::MADV_REMOVE,
            Backing::Anonymous => libc::MADV_DONTNEED,
            // Either advice would show the file's content again, in place of zeros.
            Backing::View(..) => return self.replace(first, len),
        };
        // SAFETY: whole pages of our mapping. What others read or write there meanwhile is what a
        // guest may do to its memory at any time: all access is volatile.
        let refused = unsafe { libc::madvise(self.host.as_ptr().add(first).cast(), len, advice) };
        if refused != 0 {
            return Err(io::Error::last_os_error());
        }
        // Mark after the host has taken the pages: a sender that took the marks earlier would read
        // the old bytes and never send the zeros.
        self.dirty.mark(first, len);
        Ok(len as u64)
    }

    /// Bytes.
    #[must_use]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Never: a block of no bytes cannot be made.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        false
    }

    /// Returns the block's host virtual address.
    #[must_use]
    pub fn host_addr(&self) -> *mut u8 {
        self.host.as_ptr()
    }

    /// The memfd behind a shared block, mapped from its start on.
    #[must_use]
    pub fn file(&self) -> Option<&File> {
        match &self.backing {
            Backing::Shared(file) => Some(file),
            Backing::Anonymous | Backing::View(..) => None,
        }
    }

    /// The file behind the block, shared or not.
    pub(crate) fn backing(&self) -> &Backing {
        &self.backing
    }

    /// The size of the pages behind it, in bytes.
    #[must_use]
    pub fn page_size(&self) -> u64 {
        self.page_size
    }

    /// Which of its pages were written.
    #[must_use]
    pub fn dirty(&self) -> &DirtyBitmap {
        &self.dirty
    }

    /// Whether all its pages are there.
    #[must_use]
    pub fn pages(&self) -> Pages {
        match self.registered.pages().load(Ordering::Acquire) {
            0 => Pages::There,
            1 => Pages::Awaited,
            _ => Pages::Lost,
        }
    }

    /// Marks awaited pages as lost, because the machine ends. Waiting threads resume soon and see that.
    pub fn lose_awaited(&self) {
        self.turn(Pages::Awaited, Pages::Lost);
    }

    pub(crate) fn registered(&self) -> &Registered {
        &self.registered
    }

    pub(crate) fn turn(&self, from: Pages, to: Pages) {
        let (from, to) = (from as u8, to as u8);
        // Compare and exchange: the SIGBUS handler may store `Lost` at any time, and no other state
        // may replace that one. On failure the state is not `from`, and stays.
        let _ =
            self.registered
                .pages()
                .compare_exchange(from, to, Ordering::AcqRel, Ordering::Acquire);
    }
}

impl Drop for RamBlock {
    fn drop(&mut self) {
        // SAFETY: dropped here and nowhere else. Another thread may get these addresses from the host as
        // soon as they are unmapped.
        unsafe { ManuallyDrop::drop(&mut self.registered) };
        // SAFETY: the mapping is ours, and has no users left: each of them owns the block.
        unsafe { libc::munmap(self.host.as_ptr().cast(), self.len) };
    }
}

impl fmt::Debug for RamBlock {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "RamBlock({:#x} bytes at {:p})", self.len, self.host)
    }
}

/// Maps `len` bytes of `backing` where the kernel finds room for them.
fn map_pages(config: &RamConfig, backing: &Backing, len: usize) -> Result<NonNull<u8>, RamError> {
    // A memfd of huge pages fixes the page size of its mappings, so only anonymous memory needs
    // MAP_HUGETLB.
    let mut flags = match (backing, config.hugepage_size) {
        (Backing::Shared(_), _) => libc::MAP_SHARED,
        (Backing::View(..), _) => libc::MAP_PRIVATE,
        (Backing::Anonymous, None) => libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
        (Backing::Anonymous, Some(page)) => {
            let huge = libc::MAP_HUGETLB | huge_flag(page).cast_signed();
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | huge
        }
    };
    // Huge pages are always reserved: a page that the pool does not have when it is touched would be
    // a bus error, in the middle of the guest's run. Those of hotplugged memory are taken from the
    // pool when a part is plugged, because most of it may never be.
    let is_reserved = match config.hugepage_size {
        Some(_) => !config.hotplug,
        None => config.reserve,
    };
    if !is_reserved {
        flags |= libc::MAP_NORESERVE;
    }
    // `view_of_file` has checked that the bytes are within the file.
    let offset = libc::off_t::try_from(backing.offset()).unwrap_or(libc::off_t::MAX);
    let raw_fd = backing.file().map_or(-1, AsRawFd::as_raw_fd);
    // SAFETY: a new mapping where the kernel finds room for it, so it replaces nothing.
    let host = unsafe {
        libc::mmap(
            std::ptr::null_mut(),
            len,
            libc::PROT_READ | libc::PROT_WRITE,
            flags,
            raw_fd,
            offset,
        )
    };
    let error = match host {
        libc::MAP_FAILED => io::Error::last_os_error(),
        _ => io::ErrorKind::InvalidData.into(),
    };
    NonNull::new(host.cast::<u8>())
        .filter(|_| host != libc::MAP_FAILED)
        .ok_or_else(|| host_error(config, "map", error))
}

/// The error of a host that did not `attempt` an allocation. For huge pages it says what the pool lacks.
fn host_error(config: &RamConfig, attempt: &'static str, source: io::Error) -> RamError {
    match config.hugepage_size {
        Some(page) => hugepages::refusal(config.size, page, source),
        None => RamError::Host {
            attempt,
            size: config.size,
            source,
        },
    }
}

/// The bits that name huge pages of `page` bytes: the kernel takes log2 of the size in the upper bits of
/// the flags. `MFD_HUGE_SHIFT` equals `MAP_HUGE_SHIFT`, so they serve `memfd_create` and `mmap`.
fn huge_flag(page: u64) -> u32 {
    page.trailing_zeros() << libc::MAP_HUGE_SHIFT
}

/// Creates a sealed memfd of the configured size, of huge pages if the configuration asks for them.
fn memfd(config: &RamConfig) -> io::Result<File> {
    let huge = config.hugepage_size;
    let flags = libc::MFD_CLOEXEC
        | libc::MFD_ALLOW_SEALING
        | huge.map_or(0, |page| libc::MFD_HUGETLB | huge_flag(page));
    // SAFETY: the name is a C string, and the result is checked.
    let fd = unsafe { libc::memfd_create(c"guest-ram".as_ptr(), flags) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: a new descriptor without another owner.
    let file = unsafe { File::from_raw_fd(fd) };
    // Set the size before the seals: F_SEAL_GROW forbids it afterwards.
    file.set_len(config.size)?;
    #[cfg(any(test, feature = "testing"))]
    if crate::lost::testing::is_unsealed() {
        return Ok(file);
    }
    // A process that receives the file can rely on its size.
    // F_SEAL_SEAL keeps a receiver from adding seals, such as one that forbids writable mappings.
    let seals = libc::F_SEAL_SHRINK | libc::F_SEAL_GROW | libc::F_SEAL_SEAL;
    // SAFETY: takes a number.
    if unsafe { libc::fcntl(file.as_raw_fd(), libc::F_ADD_SEALS, seals) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(file)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use super::*;

    #[test]
    fn rejects_invalid_sizes() {
        for size in [0, 1, PAGE_SIZE + 1, u64::MAX, u64::MAX - PAGE_SIZE + 1] {
            let refused = RamBlock::new(&RamConfig::anonymous(size)).unwrap_err();
            assert!(
                matches!(refused, RamError::Size { .. }),
                "{size:#x}: {refused}"
            );
        }
        let odd = RamConfig {
            hugepage_size: Some(3),
            ..RamConfig::anonymous(PAGE_SIZE)
        };
        assert!(matches!(RamBlock::new(&odd), Err(RamError::HugePage(3))));
    }

    #[test]
    fn rejects_unmappable_size() {
        let refused = RamBlock::new(&RamConfig::anonymous(1 << 60)).unwrap_err();
        assert!(
            matches!(refused, RamError::Host { attempt: "map", .. }),
            "{refused}"
        );
    }

    #[test]
    fn shared_file_moves_to_new_block() {
        let config = RamConfig {
            shared: true,
            ..RamConfig::anonymous(4 * PAGE_SIZE)
        };
        let first = RamBlock::new(&config).unwrap();
        first.slice(0, 4).unwrap().copy_from(b"kept");
        let file = || first.file().unwrap().try_clone().unwrap();
        let second = RamBlock::of_file(&config, file()).unwrap();
        let mut seen = [0_u8; 4];
        second.slice(0, 4).unwrap().copy_to(&mut seen[..]);
        assert_eq!(&seen, b"kept");
        let larger = RamConfig {
            size: 8 * PAGE_SIZE,
            ..config.clone()
        };
        assert!(RamBlock::of_file(&larger, file()).is_err());
        let other = tempfile::tempfile().unwrap();
        other.set_len(config.size).unwrap();
        let refused = RamBlock::of_file(&config, other).unwrap_err();
        assert!(
            std::error::Error::source(&refused)
                .unwrap()
                .to_string()
                .contains("shrink")
        );
    }

    #[test]
    fn shared_memory_matches_file() {
        let config = RamConfig {
            shared: true,
            prefault: true,
            ..RamConfig::anonymous(4 * PAGE_SIZE)
        };
        let block = RamBlock::new(&config).unwrap();
        block
            .file()
            .unwrap()
            .write_all_at(b"over the file", PAGE_SIZE)
            .unwrap();
        // SAFETY: inside the block, and no one else writes to it.
        let seen = unsafe { block.host_addr().add(PAGE_SIZE as usize).read() };
        assert_eq!(seen, b'o');
    }
}
