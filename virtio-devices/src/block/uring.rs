//! Raw images through io_uring(7): the guest's own buffers, and no thread in between.

#![expect(
    unsafe_code,
    reason = "the kernel is given addresses of the guest's memory"
)]

use std::collections::VecDeque;
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::time::Duration;

use io_uring::register::Restriction;
use io_uring::{IoUring, opcode, squeue, types};
use parking_lot::Mutex;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::copy::Written;
use super::request::{Op, Request, What, fits};

/// How often a ring that cannot be entered is looked at, and for how long by one who goes.
const LOOK_AGAIN: Duration = Duration::from_millis(1);
const PATIENCE: Duration = Duration::from_secs(10);

/// A submitted operation: it keeps the memory that the kernel was given.
struct Pending {
    request: Request,
    /// The vectors that the kernel reads at submission. Kept until completion for kernels that read them
    /// later.
    _pieces: Box<[libc::iovec]>,
}

// SAFETY: the pieces name memory that the request's chain keeps mapped, wherever it moves.
unsafe impl Send for Pending {}

/// A ring that no queue uses yet, and the descriptor that becomes ready when operations are done.
pub(super) struct Ring {
    ring: IoUring,
    done: Arc<EventFd>,
}

impl Ring {
    /// Makes a ring for so many operations at once. The kernel does what this file asks for with such
    /// a ring, and nothing else: operations of io_uring pass by the filters of system calls, so that
    /// a ring without restrictions would open files and sockets for a guest that took over a thread.
    fn new(entries: u16) -> io::Result<Self> {
        let ring = Self::disabled(entries)?;
        let submitter = ring.ring.submitter();
        // Later registrations are none of these, and therefore refused as well.
        submitter.register_restrictions(&mut [
            Restriction::sqe_op(opcode::Readv::CODE),
            Restriction::sqe_op(opcode::Writev::CODE),
            Restriction::sqe_op(opcode::Fsync::CODE),
            Restriction::sqe_op(opcode::Fallocate::CODE),
        ])?;
        submitter.register_enable_rings()?;
        Ok(ring)
    }

    /// Makes a ring that the kernel refuses to look at until it is enabled.
    fn disabled(entries: u16) -> io::Result<Self> {
        let ring = IoUring::builder()
            .setup_r_disabled()
            .build(entries.into())?;
        let done = EventFd::new(EFD_NONBLOCK)?;
        ring.submitter().register_eventfd(done.as_raw_fd())?;
        Ok(Self {
            ring,
            done: Arc::new(done),
        })
    }
}

/// The rings of a disk, one for each queue. They are made when the disk is opened: the threads that
/// serve guests cannot make any. A queue that stops gives its ring back.
#[derive(Default)]
pub(super) struct Rings(Mutex<Vec<Ring>>);

impl Rings {
    /// Makes rings for so many queues of this size.
    ///
    /// # Errors
    /// When the host has no io_uring, or one without restrictions (before Linux 5.10).
    pub(super) fn new(queues: u16, entries: u16) -> io::Result<Self> {
        let rings = (0..queues).map(|_| Ring::new(entries));
        Ok(Self(Mutex::new(rings.collect::<Result<_, _>>()?)))
    }

    /// Whether there is none that no queue uses.
    pub(super) fn is_empty(&self) -> bool {
        self.0.lock().is_empty()
    }

    fn take(&self) -> Option<Ring> {
        self.0.lock().pop()
    }

    fn give_back(&self, ring: Ring) {
        self.0.lock().push(ring);
    }
}

/// A ring of operations on one file.
pub(super) struct Uring {
    /// Taken by `Drop` only.
    ring: Option<Ring>,
    /// The pool to which the ring returns.
    home: Arc<Rings>,
    file: Arc<File>,
    written: Arc<Written>,
    done: Arc<EventFd>,
    pending: Vec<Option<Pending>>,
    free: Vec<usize>,
    /// Indices in `pending` that the kernel has not taken yet, in order.
    unsent: VecDeque<usize>,
    /// The kernel is given no more.
    given_up: bool,
}

impl Uring {
    /// With room for so many operations at once, by one of the disk's rings; `None` when there is
    /// none left.
    pub(super) fn new(
        home: &Arc<Rings>,
        file: Arc<File>,
        written: &Arc<Written>,
        entries: u16,
    ) -> Option<Self> {
        let ring = home.take()?;
        let written = Arc::clone(written);
        Some(Self::on(ring, Arc::clone(home), file, written, entries))
    }

    fn on(
        ring: Ring,
        home: Arc<Rings>,
        file: Arc<File>,
        written: Arc<Written>,
        entries: u16,
    ) -> Self {
        Self {
            written,
            done: Arc::clone(&ring.done),
            ring: Some(ring),
            home,
            file,
            pending: (0..entries).map(|_| None).collect(),
            free: (0..usize::from(entries)).collect(),
            unsent: VecDeque::new(),
            given_up: false,
        }
    }

    /// Becomes ready when operations are done.
    pub(super) fn done(&self) -> &Arc<EventFd> {
        &self.done
    }

    pub(super) fn in_flight(&self) -> usize {
        self.pending.len() - self.free.len()
    }

    pub(super) fn has_room(&self) -> bool {
        !self.free.is_empty()
    }

    /// Takes an operation, to be given to the kernel by [`Uring::submit`]. With `durable`, what is
    /// written is on the disk when it is done. The request comes back when it cannot be taken, as one
    /// that zeroes durably: that is two operations for the kernel.
    pub(super) fn push(&mut self, request: Request, op: Op, durable: bool) -> Result<(), Request> {
        if self.given_up {
            return Err(request);
        }
        if durable && matches!(op, Op::WriteZeroes { .. }) {
            return Err(request);
        }
        let Some(&index) = self.free.last() else {
            return Err(request);
        };
        let slices = match op {
            Op::Read { len, .. } => request.chain.writable(request.room_to_read(), len),
            Op::Write { len, .. } => request.chain.readable(request.data_to_write(), len),
            _ => Ok(Vec::new()),
        };
        let pieces: Box<[libc::iovec]> = match slices {
            Ok(slices) => slices
                .iter()
                .map(|slice| libc::iovec {
                    iov_base: slice.ptr_guard_mut().as_ptr().cast(),
                    iov_len: slice.len(),
                })
                .collect(),
            Err(_) => return Err(request),
        };
        if !fits(pieces.len()) {
            return Err(request);
        }
        let fd = types::Fd(self.file.as_raw_fd());
        let count = u32::try_from(pieces.len()).unwrap_or(u32::MAX);
        let entry = match op {
            Op::Read { offset, .. } => opcode::Readv::new(fd, pieces.as_ptr(), count)
                .offset(offset)
                .build(),
            Op::Write { offset, .. } => {
                let flags = if durable { libc::RWF_DSYNC } else { 0 };
                opcode::Writev::new(fd, pieces.as_ptr(), count)
                    .offset(offset)
                    .rw_flags(flags)
                    .build()
            }
            Op::Flush => opcode::Fsync::new(fd)
                .flags(types::FsyncFlags::DATASYNC)
                .build(),
            Op::Discard { offset, len } => {
                let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
                allocate(fd, offset, len, mode)
            }
            Op::WriteZeroes { offset, len, unmap } => {
                let how = if unmap {
                    libc::FALLOC_FL_PUNCH_HOLE
                } else {
                    libc::FALLOC_FL_ZERO_RANGE
                };
                allocate(fd, offset, len, how | libc::FALLOC_FL_KEEP_SIZE)
            }
        };
        let entry = entry.user_data(index as u64);
        // SAFETY: the file stays open and the memory mapped until the operation is done: `pending`
        // keeps the chain, whose view keeps the mapping, and the pieces; `Drop` waits for all.
        let push = |Ring { ring, .. }: &mut Ring| unsafe { ring.submission().push(&entry) };
        let pushed = self.ring.as_mut().map(push);
        if !matches!(pushed, Some(Ok(()))) {
            return Err(request);
        }
        self.free.pop();
        self.unsent.push_back(index);
        if let Some(slot) = self.pending.get_mut(index) {
            *slot = Some(Pending {
                request,
                _pieces: pieces,
            });
        }
        Ok(())
    }

    /// Gives the kernel what was pushed. What it does not take it can be given again.
    pub(super) fn submit(&mut self) -> io::Result<()> {
        if self.unsent.is_empty() {
            return Ok(());
        }
        self.enter(0)
    }

    /// Gives the kernel what was pushed, and waits until one operation is done, if there is one.
    pub(super) fn wait(&mut self) -> io::Result<()> {
        self.enter(usize::from(self.in_flight() > 0))
    }

    fn enter(&mut self, count: usize) -> io::Result<()> {
        if self.given_up {
            // What is in flight gets done without being asked for.
            std::thread::sleep(LOOK_AGAIN);
            return Ok(());
        }
        let Some(Ring { ring, .. }) = &self.ring else {
            return Ok(());
        };
        loop {
            match ring.submitter().submit_and_wait(count) {
                Ok(taken) => {
                    self.unsent.drain(..taken.min(self.unsent.len()));
                    return Ok(());
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
    }

    /// Takes back what the kernel has not taken, and gives it no more: what is in flight remains to
    /// be collected.
    pub(super) fn give_up(&mut self) -> Vec<Request> {
        // What was pushed stays in the ring, of which the kernel takes nothing unless it is entered.
        self.given_up = true;
        let mut back = Vec::new();
        for index in self.unsent.drain(..) {
            if let Some(pending) = self.pending.get_mut(index).and_then(Option::take) {
                self.free.push(index);
                back.push(pending.request);
            }
        }
        back
    }

    /// The next operation that is done: its request, and bytes moved or the error.
    pub(super) fn next_done(&mut self) -> Option<(Request, io::Result<usize>)> {
        loop {
            let entry = self.ring.as_mut()?.ring.completion().next()?;
            let index = usize::try_from(entry.user_data()).ok()?;
            let Some(pending) = self.pending.get_mut(index).and_then(Option::take) else {
                continue;
            };
            self.free.push(index);
            // Here, and not where the driver is answered: `Drop` collects operations of which no driver
            // hears, and those have changed the image as well.
            if let What::Io(whole) = pending.request.what {
                self.written.mark_op(whole.part(pending.request.done));
            }
            let result = match usize::try_from(entry.result()) {
                Ok(bytes) => Ok(bytes),
                Err(_) => Err(io::Error::from_raw_os_error(-entry.result())),
            };
            return Some((pending.request, result));
        }
    }
}

impl Drop for Uring {
    fn drop(&mut self) {
        // The kernel may write to the guest's memory until it says that it is done.
        let mut patience = PATIENCE.as_millis() / LOOK_AGAIN.as_millis();
        while self.in_flight() > 0 {
            if self.wait().is_err() {
                drop(self.give_up());
            }
            if self.given_up {
                patience = patience.saturating_sub(1);
            }
            if patience == 0 {
                // It cannot be waited for: the memory is left mapped for good.
                self.pending.drain(..).flatten().for_each(std::mem::forget);
                return;
            }
            while self.next_done().is_some() {}
        }
        // A ring that was given up holds what the kernel did not take.
        if let (false, Some(ring)) = (self.given_up, self.ring.take()) {
            self.home.give_back(ring);
        }
    }
}

fn allocate(fd: types::Fd, offset: u64, len: u64, mode: i32) -> squeue::Entry {
    opcode::Fallocate::new(fd, len)
        .offset(offset)
        .mode(mode)
        .build()
}

/// A ring that the kernel refuses to look at until it is enabled.
#[cfg(test)]
impl Uring {
    pub(super) fn disabled(file: Arc<File>, entries: u16) -> io::Result<Self> {
        let ring = Ring::disabled(entries)?;
        Ok(Self::on(
            ring,
            Arc::default(),
            file,
            Arc::default(),
            entries,
        ))
    }

    pub(super) fn enable(&self) -> io::Result<()> {
        let ring = self.ring.as_ref().ok_or(io::ErrorKind::NotFound)?;
        ring.ring.submitter().register_enable_rings()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::block::request::{Limits, What};
    use crate::queue::QueueState;
    use crate::testing::{TestBuffer, TestGuest, TestQueue, transport};

    #[test]
    fn restricted_ring_refuses_other_operations() {
        let rings = Arc::new(Rings::new(1, 4).unwrap());
        let mut ring = rings.take().unwrap();
        assert!(rings.take().is_none());
        let at = types::Fd(libc::AT_FDCWD);
        let open = opcode::OpenAt::new(at, c"/dev/null".as_ptr()).build();
        // SAFETY: the path is static.
        unsafe { ring.ring.submission().push(&open) }.unwrap();
        ring.ring.submit_and_wait(1).unwrap();
        let result = ring.ring.completion().next().unwrap().result();
        assert_eq!(result, -libc::EACCES);
        rings.give_back(ring);
    }

    #[test]
    fn stopped_queue_returns_its_ring() {
        let rings = Arc::new(Rings::new(1, 4).unwrap());
        let file = Arc::new(tempfile::tempfile().unwrap());
        for _ in 0..3 {
            let uring = Uring::new(&rings, Arc::clone(&file), &Arc::default(), 4).unwrap();
            assert!(Uring::new(&rings, Arc::clone(&file), &Arc::default(), 4).is_none());
            drop(uring);
        }
    }

    #[test]
    fn durable_zeroing_flushes() {
        let mut guest = TestGuest::new(1 << 20);
        let (transport, _) = transport();
        let mut driver = TestQueue::new(&mut guest, 0, 4);
        let mut header = vec![13, 0, 0, 0];
        header.extend([0; 12 + 8]);
        header.extend([8, 0, 0, 0, 0, 0, 0, 0]);
        let (header, status) = (guest.put(&header), guest.alloc(1));
        let buffer = TestBuffer::new;
        driver.send(&[buffer(header, 32, false), buffer(status, 1, true)]);
        let mut queue = driver.device_side(&transport, QueueState::default());
        let chain = queue.pop().unwrap().unwrap();
        let limits = Limits {
            capacity: 4096,
            readonly: false,
            block: 512,
            sparse: true,
        };
        let request = Request::parse(chain, limits).unwrap();
        let What::Io(op) = request.what else {
            panic!("{:?}", request.what);
        };
        let rings = Arc::new(Rings::new(1, 4).unwrap());
        let file = Arc::new(tempfile::tempfile().unwrap());
        let written = Arc::new(Written::default());
        let mut uring = Uring::new(&rings, file, &written, 4).unwrap();
        let request = uring.push(request, op, true).unwrap_err();
        uring.push(request, op, false).unwrap();
        uring.wait().unwrap();
        assert!(uring.next_done().unwrap().1.is_ok());
    }
}
