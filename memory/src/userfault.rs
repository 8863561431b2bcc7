//! Missing pages, served on demand: userfaultfd (Linux, Documentation/admin-guide/mm/userfaultfd.rst).
//!
//! The crate `userfaultfd` makes the system calls. [`by_system_call`] adds what it lacks: a descriptor
//! for a process that may not open `/dev/userfaultfd` but may use the system call.

use std::ffi::c_void;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, IntoRawFd, OwnedFd, RawFd};
use std::sync::Arc;
use std::time::Duration;

use userfaultfd::{Error, Event, EventBuffer, FeatureFlags, Uffd, UffdBuilder};

use crate::dirty::PAGE_SIZE;
use crate::ram::{Pages, RamBlock};

/// Events that one [`UserFaults::wait`] reads at most.
const EVENTS: usize = 16;

const PAGE: usize = PAGE_SIZE as usize;

/// An event of memory in which pages are missing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// A thread waits for a page: the block's index, and the page's.
    Missing(usize, usize),
    /// Pages were given back to the host, and are zero from now on: the block's index, the first
    /// page, and the number of pages.
    Removed(usize, usize, usize),
}

/// RAM blocks in which pages are missing. A thread that touches a missing page waits until it is
/// filled, be it a vCPU, a device or the kernel.
#[derive(Debug)]
pub struct UserFaults {
    uffd: Uffd,
    blocks: Vec<Arc<RamBlock>>,
}

impl UserFaults {
    /// Registers the blocks as a whole. Pages that have content already are not missing.
    ///
    /// # Errors
    /// The host has no userfaultfd or does not permit it, or a block is made of huge pages.
    pub fn new(blocks: Vec<Arc<RamBlock>>) -> io::Result<Self> {
        if blocks.iter().any(|block| block.page_size() != PAGE_SIZE) {
            let why = "memory backed by huge pages cannot be filled page by page";
            return Err(io::Error::new(io::ErrorKind::Unsupported, why));
        }
        let uffd = open(features())?;
        for block in &blocks {
            uffd.register(address(block, 0), block.len())
                .map_err(into_io)?;
        }
        // Only when all are registered: on an error the descriptor is closed, which ends the
        // registrations so far, and no block may count as awaited then. A block that is lost already
        // stays lost.
        for block in &blocks {
            block.turn(Pages::There, Pages::Awaited);
        }
        Ok(Self { uffd, blocks })
    }

    /// Returns whether this host and this process can use userfaultfd.
    #[must_use]
    pub fn is_possible() -> bool {
        open(features()).is_ok()
    }

    /// Waits at most `patience` for an event, and returns those that are pending, in their order. The
    /// result is empty when the time is over.
    ///
    /// # Errors
    /// The descriptor cannot be read.
    pub fn wait(&self, patience: Duration) -> io::Result<Vec<Fault>> {
        match self.poll(patience)? {
            true => self.read(),
            false => Ok(Vec::new()),
        }
    }

    /// Waits at most `patience` for an event, and returns whether there is one to
    /// [read](UserFaults::read).
    ///
    /// # Errors
    /// The host refuses.
    pub fn poll(&self, patience: Duration) -> io::Result<bool> {
        poll(&self.uffd, patience)
    }

    /// Returns the pending events, in their order. A thread that gives memory back to the host waits
    /// until its event has been read, and takes the pages away behind that.
    ///
    /// # Errors
    /// The descriptor cannot be read.
    pub fn read(&self) -> io::Result<Vec<Fault>> {
        let events = read(&self.uffd)?;
        let faults = events.iter().filter_map(|event| self.fault(event));
        Ok(faults.collect())
    }

    fn fault(&self, event: &Event) -> Option<Fault> {
        match *event {
            Event::Pagefault { addr, .. } => {
                let (block, page) = find(&self.blocks, addr.addr())?;
                Some(Fault::Missing(block, page))
            }
            Event::Remove { start, end } => {
                let (block, first) = find(&self.blocks, start.addr())?;
                let pages = end.addr().saturating_sub(start.addr()).div_ceil(PAGE);
                Some(Fault::Removed(block, first, pages))
            }
            // `features` does not ask for these events, so the kernel sends none.
            Event::Fork { .. } | Event::Remap { .. } | Event::Unmap { .. } => None,
        }
    }

    /// Fills a page if it is still missing, and wakes the threads that wait for it.
    ///
    /// # Errors
    /// There is no such page, or the host refuses. `WouldBlock`: a thread is giving memory back to
    /// the host and waits until [`UserFaults::wait`] has returned that event. The caller must not
    /// try again before.
    pub fn fill(&self, block: usize, page: usize, data: &[u8; PAGE]) -> io::Result<()> {
        let to = self.page(block, page)?;
        // The kernel copies to a new page and maps it when it is complete: no thread sees half of
        // it. That is why a plain write to the mapping cannot replace this call.
        // SAFETY: the kernel copies from `data`, of a page's length, to a page of a block that is
        // registered and mapped: `self.blocks` keeps it. It writes only pages that are missing, of
        // which no reference can exist.
        let filled = unsafe { self.uffd.copy(data.as_ptr().cast(), to, PAGE, true) };
        self.there(filled, to)
    }

    /// Fills neighbouring pages in their order, until one is not missing or memory is being given back,
    /// and wakes the threads that wait for them. Returns how many were filled, which may be none: the
    /// caller [fills](UserFaults::fill) the next one by itself.
    ///
    /// # Errors
    /// There are no such pages, or the host refuses.
    pub fn fill_run(&self, block: usize, first: usize, data: &[[u8; PAGE]]) -> io::Result<usize> {
        let Some(to) = self.run(block, first, data.len())? else {
            return Ok(0);
        };
        let len = data.len() * PAGE;
        // SAFETY: as in `fill`; `data` has as many pages as the kernel copies.
        let filled = unsafe { self.uffd.copy(data.as_ptr().cast(), to, len, true) };
        match filled {
            Ok(bytes) => Ok(bytes / PAGE),
            // While memory is being given back, Linux writes its error (-EAGAIN) where the number of
            // bytes belongs, and the crate passes that on as it is.
            Err(Error::PartiallyCopied(bytes)) if bytes <= len => Ok(bytes / PAGE),
            Err(error) => none_filled(error),
        }
    }

    /// Fills neighbouring pages with zeros, as [`UserFaults::fill_run`] fills them: all of them, or none
    /// that the caller need know of. Some may have been filled where none is returned.
    ///
    /// # Errors
    /// As for [`UserFaults::fill_run`].
    pub fn zero_run(&self, block: usize, first: usize, pages: usize) -> io::Result<usize> {
        let Some(to) = self.run(block, first, pages)? else {
            return Ok(0);
        };
        // SAFETY: as for `copy` in `fill`.
        let filled = unsafe { self.uffd.zeropage(to, pages * PAGE, true) };
        filled.map_or_else(none_filled, |_| Ok(pages))
    }

    /// The address of the first of these pages, which are all within the block; `None` for no pages.
    fn run(&self, block: usize, first: usize, pages: usize) -> io::Result<Option<*mut c_void>> {
        let Some(last) = pages.checked_sub(1) else {
            return Ok(None);
        };
        // Both ends are within the block, and therefore all between them.
        self.page(block, first.saturating_add(last))?;
        self.page(block, first).map(Some)
    }

    /// Fills a page with zeros, as [`UserFaults::fill`] does.
    ///
    /// # Errors
    /// As for [`UserFaults::fill`].
    pub fn zero(&self, block: usize, page: usize) -> io::Result<()> {
        let to = self.page(block, page)?;
        // SAFETY: as for `copy` in `fill`.
        let filled = unsafe { self.uffd.zeropage(to, PAGE, true) };
        self.there(filled, to)
    }

    /// Completes a fill. A page that exists already needs a wake: a thread may have begun to wait
    /// just before it was filled.
    fn there(&self, filled: Result<usize, Error>, page: *mut c_void) -> io::Result<()> {
        match filled.map_err(into_io) {
            Ok(_) => Ok(()),
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                self.uffd.wake(page, PAGE).map_err(into_io)
            }
            Err(error) => Err(error),
        }
    }

    fn page(&self, block: usize, page: usize) -> io::Result<*mut c_void> {
        let found = self.blocks.get(block);
        let found = found.filter(|found| page < found.len() / PAGE);
        let found = found.ok_or(io::ErrorKind::InvalidInput)?;
        Ok(address(found, page * PAGE))
    }

    /// Returns whether the machine that owns the memory has ended, so that its pages are not needed.
    #[must_use]
    pub fn is_lost(&self) -> bool {
        self.blocks.iter().any(|block| block.pages() == Pages::Lost)
    }

    /// Ends the service: no page is missing any more. A thread that touches a page that was never
    /// filled finds zeros.
    ///
    /// # Errors
    /// The host refuses.
    pub fn end(&self) -> io::Result<()> {
        self.blocks.iter().try_for_each(|block| {
            // Unregistering wakes the waiting threads, which then get zeros from the ordinary
            // fault. Huge pages come last: one that forms earlier could cover pages that have not
            // arrived.
            let unregistered = self.uffd.unregister(address(block, 0), block.len());
            unregistered.map_err(into_io)?;
            block.turn(Pages::Awaited, Pages::There);
            block.permit_huge_pages();
            Ok(())
        })
    }
}

/// No page of a run was filled, because the first is there or memory is being given back.
fn none_filled(error: Error) -> io::Result<usize> {
    let error = into_io(error);
    match error.kind() {
        io::ErrorKind::AlreadyExists | io::ErrorKind::WouldBlock => Ok(0),
        _ => Err(error),
    }
}

/// Waits at most `patience` for an event, and returns whether there is one to read.
pub(crate) fn poll(uffd: &Uffd, patience: Duration) -> io::Result<bool> {
    let mut asked = libc::pollfd {
        fd: uffd.as_raw_fd(),
        events: libc::POLLIN,
        revents: 0,
    };
    let ms = i32::try_from(patience.as_millis()).unwrap_or(i32::MAX);
    // SAFETY: one `pollfd`, which lives through the call.
    match unsafe { libc::poll(&raw mut asked, 1, ms) } {
        ready if ready < 0 => nothing_yet(io::Error::last_os_error()).map(|_| false),
        ready => Ok(ready > 0),
    }
}

/// Returns the pending events, in their order.
pub(crate) fn read(uffd: &Uffd) -> io::Result<Vec<Event>> {
    let mut buffer = EventBuffer::new(EVENTS);
    // The descriptor does not block. Between `poll` and this read the pending fault can vanish,
    // and the read then fails with EAGAIN.
    match uffd.read_events(&mut buffer) {
        Ok(events) => events.map(|event| event.map_err(into_io)).collect(),
        Err(error) => nothing_yet(into_io(error)),
    }
}

/// Finds the block that has this host address, and the number of the page in it.
pub(crate) fn find(blocks: &[Arc<RamBlock>], address: usize) -> Option<(usize, usize)> {
    let within = |block: &Arc<RamBlock>| {
        let page = address.checked_sub(block.host_addr().addr())? / PAGE;
        (page < block.len() / PAGE).then_some(page)
    };
    let mut blocks = blocks.iter().enumerate();
    blocks.find_map(|(index, block)| Some((index, within(block)?)))
}

/// Returns no events if a signal interrupted the wait: the caller waits again. A thread that gave up
/// after SIGSTOP and SIGCONT would leave its guest waiting for ever.
fn nothing_yet(error: io::Error) -> io::Result<Vec<Event>> {
    match error.kind() {
        io::ErrorKind::Interrupted | io::ErrorKind::WouldBlock => Ok(Vec::new()),
        _ => Err(error),
    }
}

/// The host address of a byte of a block.
pub(crate) fn address(block: &RamBlock, offset: usize) -> *mut c_void {
    block.host_addr().wrapping_add(offset).cast()
}

fn features() -> FeatureFlags {
    FeatureFlags::EVENT_REMOVE | FeatureFlags::MISSING_SHMEM
}

/// Opens a descriptor through `/dev/userfaultfd`, which an administrator can give to others, or else
/// through the system call.
pub(crate) fn open(features: FeatureFlags) -> io::Result<Uffd> {
    let opened = UffdBuilder::new()
        .close_on_exec(true)
        .non_blocking(true)
        // Devices and KVM touch guest memory from kernel mode, too.
        .user_mode_only(false)
        .require_features(features)
        .create();
    match opened {
        // The crate gives up here; the sysctl vm.unprivileged_userfaultfd may permit the call.
        Err(Error::OpenDevUserfaultfd(_)) => by_system_call(features),
        other => other.map_err(into_io),
    }
}

/// Opens a descriptor by the system call alone.
fn by_system_call(features: FeatureFlags) -> io::Result<Uffd> {
    /// `struct uffdio_api` of linux/userfaultfd.h.
    #[repr(C)]
    struct UffdioApi {
        api: u64,
        features: u64,
        ioctls: u64,
    }
    /// `_IOWR(UFFDIO, 0x3f, struct uffdio_api)`.
    const UFFDIO_API: u64 = 3 << 30 | (size_of::<UffdioApi>() as u64) << 16 | 0xaa << 8 | 0x3f;

    let flags = libc::O_CLOEXEC | libc::O_NONBLOCK;
    // SAFETY: takes flags, and returns a descriptor or an error.
    let fd = unsafe { libc::syscall(libc::SYS_userfaultfd, flags) };
    let fd = match RawFd::try_from(fd) {
        // SAFETY: a new descriptor without another owner.
        Ok(fd) if fd >= 0 => unsafe { OwnedFd::from_raw_fd(fd) },
        _ => return Err(io::Error::last_os_error()),
    };
    let mut api = UffdioApi {
        api: 0xaa,
        features: features.bits(),
        ioctls: 0,
    };
    // SAFETY: the request is defined for this structure, which lives through the call.
    if unsafe { libc::ioctl(fd.as_raw_fd(), UFFDIO_API, &raw mut api) } < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the descriptor is a userfaultfd with its API negotiated, and changes its owner.
    Ok(unsafe { Uffd::from_raw_fd(fd.into_raw_fd()) })
}

/// The error of the system call behind an error of the crate.
pub(crate) fn into_io(error: Error) -> io::Error {
    match error {
        Error::CopyFailed(errno) | Error::ZeropageFailed(errno) | Error::SystemError(errno) => {
            io::Error::from_raw_os_error(errno as i32)
        }
        // UFFDIO_COPY of one page fails with EAGAIN while memory is being given back.
        Error::PartiallyCopied(_) => io::ErrorKind::WouldBlock.into(),
        Error::OpenDevUserfaultfd(error) => error,
        other => io::Error::other(other),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ram_config::RamConfig;

    /// A run is filled up to a page that is there already, whose content stays.
    #[test]
    fn run_ends_at_a_page_that_is_there() {
        let block = Arc::new(RamBlock::new(&RamConfig::anonymous(8 * PAGE_SIZE)).unwrap());
        block
            .slice(3 * PAGE, PAGE)
            .unwrap()
            .copy_from(&[9_u8; PAGE]);
        let faults = UserFaults::new(vec![Arc::clone(&block)]).unwrap();
        let data = [[1_u8; PAGE]; 8];
        assert_eq!(faults.fill_run(0, 1, &data[..5]).unwrap(), 2);
        assert_eq!(faults.fill_run(0, 3, &data[..2]).unwrap(), 0);
        assert_eq!(faults.fill_run(0, 4, &data[..4]).unwrap(), 4);
        assert_eq!(faults.fill_run(0, 4, &[]).unwrap(), 0);
        for (first, pages) in [(8, 1), (4, 5), (usize::MAX, 2)] {
            assert!(faults.fill_run(0, first, &data[..pages]).is_err());
        }
        assert!(faults.zero_run(0, 7, 2).is_err());
        assert_eq!(faults.zero_run(0, 0, 0).unwrap(), 0);
        // Up to the second.
        assert_eq!(faults.zero_run(0, 0, 2).unwrap(), 0);
        faults.end().unwrap();
        let mut seen = [0_u8; 8];
        for (page, byte) in seen.iter_mut().enumerate() {
            let mut first = [0_u8];
            block.slice(page * PAGE, 1).unwrap().copy_to(&mut first[..]);
            *byte = first[0];
        }
        assert_eq!(seen, [0, 1, 1, 9, 1, 1, 1, 1]);
    }

    /// Linux returns its error as the number of bytes then, which was taken for 2^52 filled pages.
    #[test]
    fn run_is_not_filled_while_memory_is_given_back() {
        let block = Arc::new(RamBlock::new(&RamConfig::anonymous(8 * PAGE_SIZE)).unwrap());
        let faults = UserFaults::new(vec![Arc::clone(&block)]).unwrap();
        std::thread::scope(|scope| {
            // It waits until its event is read.
            let giver = scope.spawn(|| block.discard(0, PAGE).unwrap());
            assert!(faults.poll(Duration::from_secs(60)).unwrap());
            let filled = faults.fill_run(0, 2, &[[1_u8; PAGE]; 4]);
            let zeroed = faults.zero_run(0, 2, 4);
            assert_eq!(faults.read().unwrap(), [Fault::Removed(0, 0, 1)]);
            giver.join().unwrap();
            assert_eq!((filled.unwrap(), zeroed.unwrap()), (0, 0));
        });
        assert_eq!(faults.zero_run(0, 2, 4).unwrap(), 4);
        assert_eq!(faults.fill_run(0, 2, &[[1_u8; PAGE]; 4]).unwrap(), 0);
        faults.end().unwrap();
    }

    #[test]
    fn failed_registration_leaves_no_block_awaited() {
        let block = || Arc::new(RamBlock::new(&RamConfig::anonymous(PAGE_SIZE)).unwrap());
        let (free, taken) = (block(), block());
        let owner = UserFaults::new(vec![Arc::clone(&taken)]).unwrap();
        let refused = UserFaults::new(vec![Arc::clone(&free), Arc::clone(&taken)]).unwrap_err();
        assert_eq!(refused.kind(), io::ErrorKind::ResourceBusy);
        assert_eq!(free.pages(), Pages::There);
        assert_eq!(taken.pages(), Pages::Awaited);
        owner.end().unwrap();
    }

    #[test]
    fn missing_page_is_filled_on_access() {
        for shared in [false, true] {
            let config = RamConfig {
                shared,
                ..RamConfig::anonymous(8 * PAGE_SIZE)
            };
            let block = Arc::new(RamBlock::new(&config).unwrap());
            // It is there, and not missing.
            block.slice(0, PAGE).unwrap().copy_from(&[1_u8; PAGE]);
            let faults = UserFaults::new(vec![Arc::clone(&block)]).unwrap();
            assert!(faults.wait(Duration::ZERO).unwrap().is_empty());
            let reader = Arc::clone(&block);
            let touched = std::thread::spawn(move || {
                let mut seen = [0_u8; 3];
                for (page, byte) in seen.iter_mut().enumerate() {
                    let mut first = [0_u8];
                    reader
                        .slice(page * PAGE, 1)
                        .unwrap()
                        .copy_to(&mut first[..]);
                    *byte = first[0];
                }
                seen
            });
            let next = || loop {
                if let [fault, ..] = faults.wait(Duration::from_secs(10)).unwrap()[..] {
                    return fault;
                }
            };
            assert_eq!(next(), Fault::Missing(0, 1));
            faults.fill(0, 1, &[7; PAGE]).unwrap();
            assert_eq!(next(), Fault::Missing(0, 2));
            faults.zero(0, 2).unwrap();
            assert_eq!(touched.join().unwrap(), [1, 7, 0]);
            // A second time changes nothing.
            faults.fill(0, 1, &[9; PAGE]).unwrap();
            assert!(faults.fill(0, 8, &[9; PAGE]).is_err());
            assert!(faults.fill(1, 0, &[9; PAGE]).is_err());
            let remover = Arc::clone(&block);
            let removed = std::thread::spawn(move || remover.discard(0, 2 * PAGE).unwrap());
            assert_eq!(next(), Fault::Removed(0, 0, 2));
            assert_eq!(removed.join().unwrap(), 2 * PAGE_SIZE);
            faults.end().unwrap();
            let mut last = [1_u8];
            block.slice(7 * PAGE, 1).unwrap().copy_to(&mut last[..]);
            assert_eq!(last, [0]);
        }
    }
}
