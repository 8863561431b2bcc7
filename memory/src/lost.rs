//! Guest RAM that the host cannot give any more: a file that shrank, a poisoned page, an empty pool of
//! huge pages. Touching such memory raises SIGBUS, whose default action ends the process, and with it
//! all VMs.
//!
//! The handler here answers faults of *registered* memory: it marks the block as
//! [lost](crate::Pages::Lost), puts a page of zeros in the place of the one that is gone, and returns, so
//! that the access finds zeros. Then a thread tells the block's [watchers](RamBlock::on_lost), which end
//! the VM. The block is marked before the zeros are there: code that copies from guest RAM and then
//! finds the block not to be lost has copied what the guest wrote.
//!
//! Any other fault keeps the action that it had before, and a SIGBUS that was sent ends the process.
//!
//! ```text
//!   access ─► SIGBUS ─► handler ─► mark, map zeros ─► return, the access is repeated
//!                          └─ eventfd ─► thread `ram-lost` ─► watchers
//! ```
//!
//! The handler runs on any thread at any time. It takes no lock, allocates nothing, and calls only
//! `mmap`, `write`, `signal` and `raise`: a system call filter must allow each thread those.

use std::io;
use std::os::fd::AsRawFd;
use std::ptr::{null, null_mut};
use std::sync::atomic::{
    AtomicBool, AtomicI32, AtomicPtr, AtomicU8, AtomicU64, AtomicUsize, Ordering,
};
use std::sync::{Arc, OnceLock};

use parking_lot::Mutex;
use vmm_sys_util::eventfd::EventFd;

use crate::ram::{Pages, RamBlock};

/// Faults that are answered page by page. A mapping for each page of a large block would be more than
/// a process may have, so that after these the rest of the block is replaced at once.
const PAGE_BY_PAGE: usize = 64;

/// Memory in which faults are answered. Entries are never freed, for the handler may be reading them;
/// one that is not in use is taken for the next block.
struct Entry {
    /// Odd while the fields change (a sequence lock).
    sequence: AtomicUsize,
    start: AtomicUsize,
    len: AtomicUsize,
    page: AtomicUsize,
    pages: AtomicU8,
    /// Faults that were answered.
    faults: AtomicUsize,
    /// The offset of the first page that was lost; `u64::MAX` while none is.
    first_lost: AtomicU64,
    next: *const Entry,
}

const FREE: usize = 0;

// SAFETY: `next` is written before the entry is shared, and points to an entry that is never freed.
unsafe impl Sync for Entry {}
// SAFETY: as above.
unsafe impl Send for Entry {}

static ENTRIES: AtomicPtr<Entry> = AtomicPtr::new(null_mut());
/// Serializes registrations; the handler does not take it.
static REGISTRATION: Mutex<()> = Mutex::new(());
/// The descriptor that the handler writes to; -1 before there is one.
static WAKE: AtomicI32 = AtomicI32::new(-1);
/// The action that was in force before the handler, which passes on to it what it does not answer.
static PREVIOUS: OnceLock<libc::sigaction> = OnceLock::new();
/// The handler is installed.
static INSTALLED: AtomicBool = AtomicBool::new(false);
static WATCHERS: Mutex<Vec<Watcher>> = Mutex::new(Vec::new());
static NEXT_WATCHER: AtomicU64 = AtomicU64::new(0);

struct Watcher {
    id: u64,
    entry: &'static Entry,
    /// Taken out when it is called.
    notify: Option<Box<dyn FnOnce(u64) + Send>>,
}

fn entries() -> impl Iterator<Item = &'static Entry> {
    let mut next = ENTRIES.load(Ordering::Acquire).cast_const();
    std::iter::from_fn(move || {
        // SAFETY: entries are never freed.
        let entry = unsafe { next.as_ref() }?;
        next = entry.next;
        Some(entry)
    })
}

/// A registration, until it is dropped. That must come before the memory is unmapped.
pub(crate) struct Registered {
    entry: &'static Entry,
}

impl Registered {
    /// Faults in these `len` bytes from `start` on, mapped in pages of `page` bytes, are answered from
    /// now on.
    pub(crate) fn new(start: *mut u8, len: usize, page: u64) -> io::Result<Self> {
        let _registration = REGISTRATION.lock();
        install(libc::sigaction)?;
        let unused = entries().find(|entry| entry.len.load(Ordering::Relaxed) == FREE);
        let entry = unused.unwrap_or_else(|| {
            let entry = Box::leak(Box::new(Entry {
                sequence: AtomicUsize::new(0),
                start: AtomicUsize::new(0),
                len: AtomicUsize::new(FREE),
                page: AtomicUsize::new(0),
                pages: AtomicU8::new(Pages::There as u8),
                faults: AtomicUsize::new(0),
                first_lost: AtomicU64::new(u64::MAX),
                next: ENTRIES.load(Ordering::Relaxed),
            }));
            // Release: the handler may find the entry on another thread at once, and must see its
            // fields. `REGISTRATION` makes this the only writer, so a plain store is enough.
            ENTRIES.store(entry, Ordering::Release);
            entry
        });
        // No fault reaches this entry while `len` is `FREE`, so these stores may be relaxed.
        // `change` comes last and publishes them: the state of the former block must not show up in
        // this one.
        entry.pages.store(Pages::There as u8, Ordering::Relaxed);
        entry.faults.store(0, Ordering::Relaxed);
        entry.first_lost.store(u64::MAX, Ordering::Relaxed);
        entry.change(start.addr(), len, usize::try_from(page).unwrap_or(len));
        Ok(Self { entry })
    }

    /// The state of the memory's pages: [`Pages`], as a number.
    pub(crate) fn pages(&self) -> &AtomicU8 {
        &self.entry.pages
    }

    fn first_lost(&self) -> Option<u64> {
        Some(self.entry.first_lost.load(Ordering::Acquire)).filter(|at| *at != u64::MAX)
    }
}

impl Drop for Registered {
    fn drop(&mut self) {
        let _registration = REGISTRATION.lock();
        self.entry.change(0, FREE, 0);
    }
}

impl Entry {
    /// The caller holds `REGISTRATION`.
    fn change(&self, start: usize, len: usize, page: usize) {
        // SeqCst throughout: with weaker orderings a sequence lock needs fences of its own.
        // Registrations are rare, and so are faults.
        self.sequence.fetch_add(1, Ordering::SeqCst);
        self.start.store(start, Ordering::SeqCst);
        self.len.store(len, Ordering::SeqCst);
        self.page.store(page, Ordering::SeqCst);
        self.sequence.fetch_add(1, Ordering::SeqCst);
    }

    /// Start, length and page size, as they are together; `None` while another thread changes them. The
    /// memory of the fault is in use, so that its own entry does not change.
    fn extent(&self) -> Option<(usize, usize, usize)> {
        let before = self.sequence.load(Ordering::SeqCst);
        let extent = (
            self.start.load(Ordering::SeqCst),
            self.len.load(Ordering::SeqCst),
            self.page.load(Ordering::SeqCst),
        );
        let after = self.sequence.load(Ordering::SeqCst);
        (before == after && before.is_multiple_of(2) && extent.1 != FREE).then_some(extent)
    }

    /// Answers a fault at `addr`; false if the memory is not this entry's, or the host refuses.
    fn answer(&self, addr: usize) -> bool {
        let Some((start, len, page)) = self.extent() else {
            return false;
        };
        let Some(offset) = addr.checked_sub(start).filter(|offset| *offset < len) else {
            return false;
        };
        // Round down to the block's page size: MAP_FIXED cannot replace a part of a huge page.
        let offset = offset - offset % page;
        // As soon as the zeros are mapped, other threads read them without a fault. They must find
        // the mark by then.
        self.pages.store(Pages::Lost as u8, Ordering::SeqCst);
        let _ = self.first_lost.compare_exchange(
            u64::MAX,
            offset as u64,
            Ordering::SeqCst,
            Ordering::SeqCst,
        );
        // Replacing the whole block also drops pages that are intact. The VM ends anyway, while the
        // limit on mappings (vm.max_map_count) is shared by all VMs of this process.
        let (at, bytes) = match self.faults.fetch_add(1, Ordering::SeqCst) {
            ..PAGE_BY_PAGE => (start + offset, page),
            _ => (start, len),
        };
        // MAP_FIXED swaps the pages in one step. With `munmap` first, another thread could fault in
        // the hole, or get these addresses for a mapping of its own.
        // SAFETY: whole pages of a mapping that belongs to a RAM block. All access to guest RAM is
        // volatile, and made for memory that others change at any time.
        let mapped = unsafe {
            libc::mmap(
                at as *mut libc::c_void,
                bytes,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED | libc::MAP_NORESERVE,
                -1,
                0,
            )
        };
        wake();
        mapped != libc::MAP_FAILED
    }
}

/// Wakes the thread that calls the watchers.
fn wake() {
    let one = 1_u64.to_ne_bytes();
    // SAFETY: eight bytes, for an event descriptor or none. A full counter wakes as well.
    unsafe { libc::write(WAKE.load(Ordering::Acquire), one.as_ptr().cast(), one.len()) };
}

/// Reads or sets the action of a signal, as `sigaction` does.
type SetAction =
    unsafe extern "C" fn(libc::c_int, *const libc::sigaction, *mut libc::sigaction) -> libc::c_int;

/// Installs the handler by `set_action` and starts the thread, once. The caller holds `REGISTRATION`.
fn install(set_action: SetAction) -> io::Result<()> {
    if INSTALLED.load(Ordering::Acquire) {
        return Ok(());
    }
    // If an earlier call failed behind this, the thread runs already.
    if WAKE.load(Ordering::Acquire) < 0 {
        let event = EventFd::new(libc::EFD_CLOEXEC)?;
        let fd = event.as_raw_fd();
        let builder = std::thread::Builder::new().name("ram-lost".to_owned());
        builder.spawn(move || {
            // The thread, and with it the descriptor, lives as long as the process.
            while event.read().is_ok() {
                tell_watchers();
            }
        })?;
        WAKE.store(fd, Ordering::Release);
    }
    // SAFETY: plain data, for which zeros are a value.
    let mut previous: libc::sigaction = unsafe { std::mem::zeroed() };
    // SAFETY: reads the action that is in force.
    if unsafe { set_action(libc::SIGBUS, null(), &raw mut previous) } != 0 {
        return Err(io::Error::last_os_error());
    }
    // Before the handler can run. It says nothing of whether the handler is installed: that may still fail,
    // and the next call tries again.
    let _ = PREVIOUS.set(previous);
    // SAFETY: as above.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    action.sa_sigaction = handle as *const () as usize;
    // On the alternate stack that Rust's threads have: the fault may be that of a small stack.
    action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK | libc::SA_RESTART;
    // SAFETY: the handler does what a handler may.
    if unsafe { set_action(libc::SIGBUS, &raw const action, null_mut()) } != 0 {
        return Err(io::Error::last_os_error());
    }
    INSTALLED.store(true, Ordering::Release);
    Ok(())
}

extern "C" fn handle(signal: i32, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    // SAFETY: the kernel passes a valid `siginfo_t`.
    let (code, addr) = unsafe { ((*info).si_code, (*info).si_addr().addr()) };
    // Positive codes are the kernel's: it has an address. Others were sent by a process.
    if code > 0 {
        // SAFETY: the thread's own error number, which the interrupted code may be about to read.
        let errno = unsafe { *libc::__errno_location() };
        let answered = entries().any(|entry| entry.answer(addr));
        // SAFETY: as above.
        unsafe { *libc::__errno_location() = errno };
        if answered {
            return;
        }
    }
    let previous = PREVIOUS.get();
    let action = previous.map_or(libc::SIG_DFL, |previous| previous.sa_sigaction);
    match action {
        libc::SIG_IGN if code <= 0 => {}
        // The standard library's handler would take the signal for a fault that is repeated.
        _ if code <= 0 => {
            // SAFETY: restores the default action, and sends the signal again.
            unsafe {
                libc::signal(signal, libc::SIG_DFL);
                libc::raise(signal);
            }
        }
        libc::SIG_DFL | libc::SIG_IGN => {
            // SAFETY: restores the default action: the fault is repeated when this returns, and ends the
            // process.
            unsafe { libc::signal(signal, libc::SIG_DFL) };
        }
        handler if previous.is_some_and(|p| p.sa_flags & libc::SA_SIGINFO != 0) => {
            type Handler = extern "C" fn(i32, *mut libc::siginfo_t, *mut libc::c_void);
            // SAFETY: `SA_SIGINFO` says that the handler takes these.
            let handler = unsafe { std::mem::transmute::<usize, Handler>(handler) };
            handler(signal, info, context);
        }
        handler => {
            // SAFETY: a handler without `SA_SIGINFO` takes the number alone.
            let handler = unsafe { std::mem::transmute::<usize, extern "C" fn(i32)>(handler) };
            handler(signal);
        }
    }
}

fn tell_watchers() {
    // Hold the lock during the calls: a watcher that was dropped is then never called afterwards.
    // In turn `notify` must not drop a `LostWatch` or call `on_lost`, which take the same lock.
    for watcher in &mut *WATCHERS.lock() {
        let lost = watcher.entry.first_lost.load(Ordering::Acquire);
        if lost != u64::MAX
            && let Some(notify) = watcher.notify.take()
        {
            notify(lost);
        }
    }
}

/// Watches a block, until it is dropped.
pub struct LostWatch {
    id: u64,
    /// The entry is this block's as long as the block lives.
    _ram: Arc<RamBlock>,
}

impl Drop for LostWatch {
    fn drop(&mut self) {
        WATCHERS.lock().retain(|watcher| watcher.id != self.id);
    }
}

impl RamBlock {
    /// Calls `notify` once when memory of the block is lost, or if it has been already, with the offset of
    /// the first page that was: on a thread that all blocks share, so that it must not wait.
    #[must_use]
    pub fn on_lost(self: &Arc<Self>, notify: impl FnOnce(u64) + Send + 'static) -> LostWatch {
        let id = NEXT_WATCHER.fetch_add(1, Ordering::Relaxed);
        WATCHERS.lock().push(Watcher {
            id,
            entry: self.registered().entry,
            notify: Some(Box::new(notify)),
        });
        // The block may have been lost before the watcher was in the list, and that wake-up is
        // over.
        wake();
        LostWatch {
            id,
            _ram: Arc::clone(self),
        }
    }

    /// The offset of the first page that the host could not give any more, if there is one.
    #[must_use]
    pub fn first_lost(&self) -> Option<u64> {
        self.registered().first_lost()
    }

    /// Looks whether the file behind the block still holds all of it. The kernel tells a vCPU that
    /// touches a missing page, not this process.
    pub fn check_file(&self) {
        let len = self.backing().file().and_then(|file| file.metadata().ok());
        if let Some(len) =
            len.map(|metadata| metadata.len().saturating_sub(self.backing().offset()))
            && len < self.len() as u64
        {
            let offset = usize::try_from(len).unwrap_or(0);
            let addr = self.host_addr().addr();
            self.registered().entry.answer(addr.saturating_add(offset));
        }
    }
}

/// Takes memory away, as the host may.
#[cfg(any(test, feature = "testing"))]
pub mod testing {
    use std::io;
    use std::os::fd::{AsRawFd, FromRawFd};
    use std::sync::atomic::{AtomicBool, Ordering};

    use super::{Entry, entries};

    static UNSEALED: AtomicBool = AtomicBool::new(false);

    /// Has the files of shared blocks made so that they can shrink, as a file that another program made
    /// may.
    pub fn unseal() {
        UNSEALED.store(true, Ordering::Release);
    }

    pub(crate) fn is_unsealed() -> bool {
        UNSEALED.load(Ordering::Acquire)
    }

    /// Makes all registered memory of blocks of `size` bytes unusable from `offset` on, as if a file
    /// behind it had shrunk. Returns how many blocks there were.
    ///
    /// # Panics
    /// When the host refuses.
    #[must_use]
    pub fn lose(size: usize, offset: usize) -> usize {
        let extents = entries().filter_map(Entry::extent);
        let matching = extents.filter(|(_, len, _)| *len == size);
        matching
            .map(|(start, len, _)| empty(start + offset, len - offset))
            .count()
    }

    fn empty(at: usize, len: usize) {
        // SAFETY: the name is a C string, and the result is checked.
        let fd = unsafe { libc::memfd_create(c"nothing".as_ptr(), libc::MFD_CLOEXEC) };
        assert!(fd >= 0, "{}", io::Error::last_os_error());
        // SAFETY: a new descriptor.
        let file = unsafe { std::fs::File::from_raw_fd(fd) };
        // SAFETY: within a registered mapping, of which all access is volatile.
        let mapped = unsafe {
            libc::mmap(
                at as *mut libc::c_void,
                len,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED | libc::MAP_FIXED,
                file.as_raw_fd(),
                0,
            )
        };
        assert!(mapped != libc::MAP_FAILED, "{}", io::Error::last_os_error());
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::process::ExitStatusExt;
    use std::process::{Command, Output};
    use std::sync::mpsc;
    use std::time::Duration;

    use super::*;
    use crate::{PAGE_SIZE, RamConfig};

    const PAGE: usize = PAGE_SIZE as usize;

    fn block(pages: usize, shared: bool) -> Arc<RamBlock> {
        let config = RamConfig {
            shared,
            thp: false,
            ..RamConfig::anonymous((pages * PAGE) as u64)
        };
        let block = Arc::new(RamBlock::new(&config).unwrap());
        let whole = block.slice(0, block.len()).unwrap();
        whole.copy_from(&vec![7_u8; block.len()]);
        block
    }

    fn read(block: &RamBlock, page: usize) -> Vec<u8> {
        let mut bytes = vec![1; PAGE];
        let slice = block.slice(page * PAGE, PAGE).unwrap();
        slice.copy_to(&mut bytes[..]);
        bytes
    }

    #[test]
    fn lost_memory_reads_as_zeros() {
        for (pages, shared) in [(1001, false), (1003, true)] {
            let (ram, other) = (block(pages, shared), block(8, shared));
            let (tell, told) = mpsc::channel();
            let _watch = ram.on_lost(move |at| tell.send(at).unwrap());
            assert_eq!(testing::lose(pages * PAGE, 10 * PAGE), 1);
            assert_eq!((ram.pages(), ram.first_lost()), (Pages::There, None));
            assert_eq!(read(&ram, 12), vec![0; PAGE]);
            assert_eq!(ram.pages(), Pages::Lost);
            let at = told.recv_timeout(Duration::from_secs(60)).unwrap();
            assert_eq!(
                (at, ram.first_lost()),
                (12 * PAGE_SIZE, Some(12 * PAGE_SIZE))
            );
            // Writes work as well, and intact pages keep their content.
            ram.slice(20 * PAGE, 1).unwrap().copy_from(&[1_u8]);
            assert_eq!(read(&ram, 9), vec![7; PAGE]);
            assert_eq!(read(&other, 0), vec![7; PAGE]);
            assert_eq!((other.pages(), other.first_lost()), (Pages::There, None));
            // A watcher that is added late is called as well, and only once.
            let (tell, told) = mpsc::channel();
            let _late = ram.on_lost(move |at| tell.send(at).unwrap());
            let at = told.recv_timeout(Duration::from_secs(60)).unwrap();
            assert_eq!(at, 12 * PAGE_SIZE);
            assert!(told.recv().is_err());
        }
    }

    /// Each page would be a mapping of its own, of which a process has 65,530.
    #[test]
    fn a_large_loss_takes_few_mappings() {
        const PAGES: usize = 20_011;
        let ram = block(PAGES, true);
        assert_eq!(testing::lose(PAGES * PAGE, 0), 1);
        for page in (0..PAGES).step_by(2) {
            assert_eq!(read(&ram, page)[0], 0);
        }
        let (first, last) = (ram.host_addr().addr(), ram.host_addr().addr() + ram.len());
        let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
        let starts = maps.lines().filter_map(|line| line.split('-').next());
        let starts = starts.filter_map(|start| usize::from_str_radix(start, 16).ok());
        let within = starts.filter(|start| (first..last).contains(start)).count();
        assert!(within <= 2 * PAGE_BY_PAGE + 2, "{within} mappings");
    }

    #[test]
    fn reuses_entries_of_dropped_blocks() {
        let before = entries().count();
        for _ in 0..100 {
            drop(block(3, false));
        }
        // Other tests have blocks at the same time.
        assert!(entries().count() < before + 50);
        let ram = block(3, false);
        assert_eq!((ram.pages(), ram.first_lost()), (Pages::There, None));
    }

    /// Runs a test of this file in a process of its own.
    fn run_alone(test: &str) -> Output {
        Command::new(std::env::current_exe().unwrap())
            .args(["--exact", &format!("lost::tests::{test}"), "--ignored"])
            .output()
            .unwrap()
    }

    fn dies_of_sigbus(test: &str) {
        let run = run_alone(test);
        assert_eq!(run.status.signal(), Some(libc::SIGBUS), "{run:?}");
    }

    #[test]
    fn handler_that_was_refused_is_installed_by_the_next_call() {
        let run = run_alone("inner_refused_handler");
        let text = String::from_utf8_lossy(&run.stdout);
        assert!(run.status.success() && text.contains("1 passed"), "{run:?}");
    }

    #[test]
    #[ignore = "needs a process without a handler: another test runs it"]
    fn inner_refused_handler() {
        /// Reads the action, and refuses to set one.
        unsafe extern "C" fn refuse(
            signal: libc::c_int,
            new: *const libc::sigaction,
            old: *mut libc::sigaction,
        ) -> libc::c_int {
            if new.is_null() {
                // SAFETY: as the caller's.
                unsafe { libc::sigaction(signal, new, old) }
            } else {
                -1
            }
        }
        for _ in 0..2 {
            assert!(install(refuse).is_err());
        }
        let ram = block(8, true);
        assert_eq!(testing::lose(8 * PAGE, 0), 1);
        assert_eq!(read(&ram, 0), vec![0; PAGE]);
        assert_eq!(ram.pages(), Pages::Lost);
    }

    #[test]
    fn faults_elsewhere_end_the_process() {
        dies_of_sigbus("inner_fault_elsewhere");
        dies_of_sigbus("inner_signal_that_was_sent");
    }

    #[test]
    #[ignore = "ends its process: another test runs it"]
    fn inner_fault_elsewhere() {
        let ram = block(8, true);
        let addr = ram.host_addr();
        let entry = ram.registered().entry;
        assert_eq!(testing::lose(8 * PAGE, 0), 1);
        // As memory that was never registered.
        entry.change(0, FREE, 0);
        // SAFETY: mapped memory.
        let _ = unsafe { addr.read_volatile() };
    }

    #[test]
    #[ignore = "ends its process: another test runs it"]
    fn inner_signal_that_was_sent() {
        let _ram = block(8, true);
        // SAFETY: takes a number.
        unsafe { libc::raise(libc::SIGBUS) };
    }
}
