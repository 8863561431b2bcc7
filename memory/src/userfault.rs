//! Pages that come when they are touched: userfaultfd (Linux, Documentation/admin-guide/mm/userfaultfd.rst).

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::sync::Arc;
use std::time::Duration;

use crate::dirty::PAGE_SIZE;
use crate::ram::{Pages, RamBlock};

const API: u64 = 0xaa;
const FEATURE_EVENT_REMOVE: u64 = 1 << 3;
const FEATURE_MISSING_SHMEM: u64 = 1 << 5;
const MODE_MISSING: u64 = 1;
const EVENT_PAGEFAULT: u8 = 0x12;
const EVENT_REMOVE: u8 = 0x15;

#[repr(C)]
struct UffdioApi {
    api: u64,
    features: u64,
    ioctls: u64,
}

#[repr(C)]
struct UffdioRange {
    start: u64,
    len: u64,
}

#[repr(C)]
struct UffdioRegister {
    range: UffdioRange,
    mode: u64,
    ioctls: u64,
}

#[repr(C)]
struct UffdioCopy {
    dst: u64,
    src: u64,
    len: u64,
    mode: u64,
    copied: i64,
}

#[repr(C)]
struct UffdioZeropage {
    range: UffdioRange,
    mode: u64,
    zeroed: i64,
}

/// No faults, if the error says that the call was interrupted or has nothing to give: the caller waits
/// again. A watch that gave up after SIGSTOP and SIGCONT would leave the guest waiting for ever.
fn nothing_yet(error: io::Error) -> io::Result<Vec<Fault>> {
    match error.kind() {
        io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted => Ok(Vec::new()),
        _ => Err(error),
    }
}

/// `_IOWR(0xAA, number, size)`, and `_IOR` where `dir` is 2.
const fn request(dir: u64, number: u64, size: usize) -> u64 {
    dir << 30 | (size as u64) << 16 | 0xaa << 8 | number
}

const UFFDIO_API: u64 = request(3, 0x3f, size_of::<UffdioApi>());
const UFFDIO_REGISTER: u64 = request(3, 0x00, size_of::<UffdioRegister>());
const UFFDIO_UNREGISTER: u64 = request(2, 0x01, size_of::<UffdioRange>());
const UFFDIO_WAKE: u64 = request(2, 0x02, size_of::<UffdioRange>());
const UFFDIO_COPY: u64 = request(3, 0x03, size_of::<UffdioCopy>());
const UFFDIO_ZEROPAGE: u64 = request(3, 0x04, size_of::<UffdioZeropage>());
/// `USERFAULTFD_IOC_NEW` of /dev/userfaultfd.
const NEW: u64 = 0xaa << 8;
/// Bytes of a `struct uffd_msg`.
const MESSAGE: usize = 32;

/// What happens to memory of which pages are missing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// Somebody waits for this page of a block: the block's number, and the page's.
    Missing(usize, usize),
    /// These pages of a block have been given back to the host: the block's number, the first page
    /// and how many. They are zero from now on.
    Removed(usize, usize, usize),
}

/// RAM blocks of which pages are missing: who touches one waits until it is filled, whether that is
/// the guest, a device or the kernel.
#[derive(Debug)]
pub struct UserFaults {
    fd: OwnedFd,
    blocks: Vec<Arc<RamBlock>>,
}

impl UserFaults {
    /// For these blocks, whole. Pages that have something in them already are not missing.
    ///
    /// # Errors
    /// When the host has no userfaultfd or does not permit it, or a block is made of huge pages.
    pub fn new(blocks: Vec<Arc<RamBlock>>) -> io::Result<Self> {
        if blocks.iter().any(|block| block.page_size() != PAGE_SIZE) {
            let why = "memory of huge pages cannot be filled page by page";
            return Err(io::Error::new(io::ErrorKind::Unsupported, why));
        }
        let faults = Self {
            fd: open()?,
            blocks,
        };
        let mut api = UffdioApi {
            api: API,
            features: FEATURE_EVENT_REMOVE | FEATURE_MISSING_SHMEM,
            ioctls: 0,
        };
        faults.call(UFFDIO_API, &mut api)?;
        for block in &faults.blocks {
            let mut register = UffdioRegister {
                range: range(block, 0, block.len()),
                mode: MODE_MISSING,
                ioctls: 0,
            };
            faults.call(UFFDIO_REGISTER, &mut register)?;
            block.turn(Pages::There, Pages::Awaited);
        }
        Ok(faults)
    }

    /// Whether this host can do it at all.
    #[must_use]
    pub fn is_possible() -> bool {
        open().is_ok()
    }

    fn call<T>(&self, request: u64, argument: &mut T) -> io::Result<()> {
        // SAFETY: each request is called with the structure that it is defined for, which lives
        // through the call.
        let done =
            unsafe { libc::ioctl(self.fd.as_raw_fd(), request, std::ptr::from_mut(argument)) };
        if done < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(())
    }

    /// What happened, one after the other: all that did, once something has, within this time.
    ///
    /// # Errors
    /// When the host does not tell.
    pub fn wait(&self, patience: Duration) -> io::Result<Vec<Fault>> {
        let mut asked = libc::pollfd {
            fd: self.fd.as_raw_fd(),
            events: libc::POLLIN,
            revents: 0,
        };
        let ms = i32::try_from(patience.as_millis()).unwrap_or(i32::MAX);
        // SAFETY: one structure, and it is told that there is one.
        let ready = unsafe { libc::poll(&raw mut asked, 1, ms) };
        if ready < 0 {
            return nothing_yet(io::Error::last_os_error());
        }
        if ready == 0 {
            return Ok(Vec::new());
        }
        let mut buffer = [0_u8; 16 * MESSAGE];
        // SAFETY: into a buffer of that length.
        let read = unsafe {
            libc::read(
                self.fd.as_raw_fd(),
                buffer.as_mut_ptr().cast(),
                buffer.len(),
            )
        };
        match usize::try_from(read) {
            Ok(read) => {
                let (messages, _) = buffer[..read].as_chunks::<MESSAGE>();
                Ok(messages
                    .iter()
                    .filter_map(|message| self.fault(message))
                    .collect())
            }
            Err(_) => nothing_yet(io::Error::last_os_error()),
        }
    }

    /// `struct uffd_msg`.
    fn fault(&self, message: &[u8; MESSAGE]) -> Option<Fault> {
        let word = |at: usize| {
            let bytes = message
                .get(at..at + 8)
                .and_then(|bytes| bytes.try_into().ok());
            bytes.map_or(0, u64::from_ne_bytes)
        };
        match message[0] {
            EVENT_PAGEFAULT => {
                let (block, page) = self.find(word(16))?;
                Some(Fault::Missing(block, page))
            }
            EVENT_REMOVE => {
                let (start, end) = (word(8), word(16));
                let (block, first) = self.find(start)?;
                let pages = end.saturating_sub(start).div_ceil(PAGE_SIZE);
                Some(Fault::Removed(block, first, usize::try_from(pages).ok()?))
            }
            _ => None,
        }
    }

    fn find(&self, address: u64) -> Option<(usize, usize)> {
        let within = |block: &Arc<RamBlock>| {
            let offset = address.checked_sub(block.host_addr() as u64)?;
            let page = usize::try_from(offset / PAGE_SIZE).ok()?;
            (page < block.len() / PAGE_SIZE as usize).then_some(page)
        };
        let mut blocks = self.blocks.iter().enumerate();
        blocks.find_map(|(index, block)| Some((index, within(block)?)))
    }

    /// Fills a page, if it is missing still, and lets go on who waits for it.
    ///
    /// # Errors
    /// When there is no such page, or the host refuses. `WouldBlock`: memory is being given back, which
    /// goes on when [`UserFaults::wait`] has told of it; who calls that must not try again before.
    pub fn fill(
        &self,
        block: usize,
        page: usize,
        data: &[u8; PAGE_SIZE as usize],
    ) -> io::Result<()> {
        let range = self.page(block, page)?;
        let mut copy = UffdioCopy {
            dst: range.start,
            src: data.as_ptr() as u64,
            len: PAGE_SIZE,
            mode: 0,
            copied: 0,
        };
        let filled = self.call(UFFDIO_COPY, &mut copy);
        self.there(filled, range)
    }

    /// As [`UserFaults::fill`], with zeros.
    ///
    /// # Errors
    /// As for [`UserFaults::fill`].
    pub fn zero(&self, block: usize, page: usize) -> io::Result<()> {
        let range = self.page(block, page)?;
        let UffdioRange { start, len } = range;
        let mut zero = UffdioZeropage {
            range: UffdioRange { start, len },
            mode: 0,
            zeroed: 0,
        };
        let filled = self.call(UFFDIO_ZEROPAGE, &mut zero);
        self.there(filled, range)
    }

    /// A page that was there already may have somebody who does not know it.
    fn there(&self, filled: io::Result<()>, mut range: UffdioRange) -> io::Result<()> {
        match filled {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                self.call(UFFDIO_WAKE, &mut range)
            }
            other => other,
        }
    }

    fn page(&self, block: usize, page: usize) -> io::Result<UffdioRange> {
        let found = self.blocks.get(block);
        let found = found.filter(|found| page < found.len() / PAGE_SIZE as usize);
        let found = found.ok_or(io::ErrorKind::InvalidInput)?;
        Ok(range(found, page * PAGE_SIZE as usize, PAGE_SIZE as usize))
    }

    /// Whether the machine ended whose memory it is: nobody needs the pages.
    #[must_use]
    pub fn is_lost(&self) -> bool {
        self.blocks.iter().any(|block| block.pages() == Pages::Lost)
    }

    /// No page is missing any more: who touches one that nobody filled finds zeros.
    ///
    /// # Errors
    /// When the host refuses.
    pub fn end(&self) -> io::Result<()> {
        self.blocks.iter().try_for_each(|block| {
            let mut all = range(block, 0, block.len());
            self.call(UFFDIO_UNREGISTER, &mut all)?;
            block.turn(Pages::Awaited, Pages::There);
            block.permit_huge_pages();
            Ok(())
        })
    }
}

fn range(block: &RamBlock, offset: usize, len: usize) -> UffdioRange {
    UffdioRange {
        start: block.host_addr() as u64 + offset as u64,
        len: len as u64,
    }
}

/// By the device, which an administrator can give to others, or else by the system call.
fn open() -> io::Result<OwnedFd> {
    let flags = libc::O_CLOEXEC | libc::O_NONBLOCK;
    if let Ok(device) = File::options()
        .read(true)
        .write(true)
        .open("/dev/userfaultfd")
    {
        // SAFETY: the request takes flags, and gives a descriptor or an error.
        let fd = unsafe { libc::ioctl(device.as_raw_fd(), NEW, flags) };
        if fd >= 0 {
            // SAFETY: a new descriptor that nobody else owns.
            return Ok(unsafe { OwnedFd::from_raw_fd(fd) });
        }
    }
    // SAFETY: takes flags, and gives a descriptor or an error.
    let fd = unsafe { libc::syscall(libc::SYS_userfaultfd, flags) };
    match RawFd::try_from(fd) {
        // SAFETY: a new descriptor that nobody else owns.
        Ok(fd) if fd >= 0 => Ok(unsafe { OwnedFd::from_raw_fd(fd) }),
        _ => Err(io::Error::last_os_error()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ram::RamConfig;

    const PAGE: usize = PAGE_SIZE as usize;

    #[test]
    fn a_page_comes_when_it_is_touched() {
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
