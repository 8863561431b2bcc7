//! Images by threads that block: qcow2, buffers that are not aligned as the host wants them, and
//! hosts without io_uring.

use std::io;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::JoinHandle;

use memory::PageBuffer;
use parking_lot::Mutex;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::image::{Image, contained};
use super::request::{Op, Request};

/// Threads of one queue.
const THREADS: usize = 2;
/// Bytes that are moved in one piece: a request may be gigabytes.
const PIECE: usize = 256 << 10;

type Job = (Request, Op, bool);
type Done = (Request, io::Result<usize>);

/// Threads that work on one image.
pub(super) struct Threads {
    jobs: Option<Sender<Job>>,
    finished: Receiver<Done>,
    done: Arc<EventFd>,
    in_flight: usize,
    most: usize,
    threads: Vec<JoinHandle<()>>,
}

impl Threads {
    /// For so many operations at once.
    pub(super) fn new(image: &Arc<Image>, entries: u16) -> io::Result<Self> {
        let (jobs, to_do) = channel::<Job>();
        let (finish, finished) = channel();
        let done = Arc::new(EventFd::new(EFD_NONBLOCK)?);
        let to_do = Arc::new(Mutex::new(to_do));
        let start = |_| {
            let (to_do, finish) = (Arc::clone(&to_do), finish.clone());
            let (image, done) = (Arc::clone(image), Arc::clone(&done));
            let builder = std::thread::Builder::new().name("disk".to_owned());
            builder.spawn(move || work(&image, &to_do, &finish, &done))
        };
        Ok(Self {
            threads: (0..THREADS).map(start).collect::<io::Result<_>>()?,
            jobs: Some(jobs),
            finished,
            done,
            in_flight: 0,
            most: entries.into(),
        })
    }

    pub(super) fn done(&self) -> &Arc<EventFd> {
        &self.done
    }

    pub(super) fn in_flight(&self) -> usize {
        self.in_flight
    }

    pub(super) fn has_room(&self) -> bool {
        self.in_flight < self.most
    }

    pub(super) fn push(&mut self, request: Request, op: Op, durable: bool) -> Result<(), Request> {
        let Some(jobs) = &self.jobs else {
            return Err(request);
        };
        match jobs.send((request, op, durable)) {
            Ok(()) => {
                self.in_flight += 1;
                Ok(())
            }
            Err(back) => Err(back.0.0),
        }
    }

    /// The next operation that is done, if one is.
    pub(super) fn next_done(&mut self) -> Option<Done> {
        let done = self.finished.try_recv().ok()?;
        self.in_flight -= 1;
        Some(done)
    }

    /// Waits for the next operation that is done, if there is one.
    pub(super) fn wait(&mut self) -> Option<Done> {
        if self.in_flight == 0 {
            return None;
        }
        let done = self.finished.recv().ok()?;
        self.in_flight -= 1;
        Some(done)
    }
}

impl Drop for Threads {
    fn drop(&mut self) {
        self.jobs = None;
        for thread in self.threads.drain(..) {
            if thread.join().is_err() {
                tracing::error!("a disk's thread panicked");
            }
        }
    }
}

fn work(image: &Image, to_do: &Mutex<Receiver<Job>>, finish: &Sender<Done>, done: &EventFd) {
    let mut buffer = PageBuffer::new(PIECE);
    loop {
        // The lock is held while waiting: the thread that holds it is the one that waits.
        let job = to_do.lock().recv();
        let Ok((request, op, durable)) = job else {
            return;
        };
        let result = contained(|| perform(image, &request, op, durable, &mut buffer));
        if finish.send((request, result)).is_err() {
            return;
        }
        let _ = done.write(1);
    }
}

fn perform(
    image: &Image,
    request: &Request,
    op: Op,
    durable: bool,
    buffer: &mut [u8],
) -> io::Result<usize> {
    let broken = |error| io::Error::new(io::ErrorKind::InvalidData, error);
    match op {
        Op::Read { offset, len } => {
            for at in (0..len).step_by(PIECE) {
                let piece = buffer.get_mut(..PIECE.min(len - at)).unwrap_or_default();
                image.read_at(piece, offset + at as u64)?;
                let to = request.room_to_read() + at;
                request.chain.write(to, piece).map_err(broken)?;
            }
            Ok(len)
        }
        Op::Write { offset, len } => {
            for at in (0..len).step_by(PIECE) {
                let piece = buffer.get_mut(..PIECE.min(len - at)).unwrap_or_default();
                let from = request.data_to_write() + at;
                request.chain.read(from, piece).map_err(broken)?;
                image.write_at(piece, offset + at as u64)?;
            }
            if durable {
                image.flush()?;
            }
            Ok(len)
        }
        Op::Flush => image.flush().map(|()| 0),
        Op::Discard { offset, len } => image.discard(offset, len).map(|()| 0),
        Op::WriteZeroes { offset, len, unmap } => {
            image.write_zeroes(offset, len, unmap)?;
            if durable {
                image.flush()?;
            }
            Ok(0)
        }
    }
}
