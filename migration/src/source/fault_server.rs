//! Answers for pages that the destination waits for, in front of all others.
//!
//! ```text
//!   faults channel ──► reads requests ── memory ──────────────────────► RAM channel of its own
//!                            └────────── disks ─► queue ─► reads disks ────▲
//! ```
//!
//! A disk is read on a thread of its own: storage may take milliseconds for a block, and a guest whose
//! devices wait for many must not have a vCPU wait behind all of them.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, Receiver, SyncSender};
use std::thread::{self, JoinHandle};

use parking_lot::Mutex;

use super::Contents;
use crate::disks::SourceDisk;
use crate::fault_priority::FaultPriority;
use crate::link::{Closer, Stream};
use crate::pages::{self, Batch, Block, Run};
use crate::progress::Progress;
use crate::sender::{Ram, SMALL_BATCH, UNSENT, send_encoded};
use crate::threads::in_span;
use crate::wire::{Kind, Reader, WireError};
use crate::{MigrationError, PAGES_PATIENCE};

/// Requests for blocks of disks that may wait: 64 MiB. If there are more, those for memory wait, too.
const QUEUE: usize = 16 << 10;

/// Serves the pages that the guest waits for, on a channel of their own.
pub(super) struct FaultServer {
    serving: Serving,
    /// Ends the faults channel.
    closer: Closer,
    /// Ends the channel that carries the pages.
    pages: Closer,
    requests: JoinHandle<()>,
    /// Absent if the guest has no disks that are copied.
    blocks: Option<JoinHandle<()>>,
}

/// The state that the threads of the server share.
#[derive(Clone)]
struct Serving {
    ram: Arc<Mutex<Ram>>,
    memory: Vec<Block>,
    disks: Vec<SourceDisk>,
    progress: Progress,
    priority: Arc<FaultPriority>,
    has_ended: Arc<AtomicBool>,
}

impl FaultServer {
    /// `faults` tells which pages are waited for, `ram` carries them.
    pub(super) fn start(
        mut faults: Box<dyn Stream>,
        ram: Ram,
        memory: Vec<Block>,
        disks: Vec<SourceDisk>,
        progress: Progress,
    ) -> Result<Self, MigrationError> {
        // A guest that misses nothing is silent.
        let prepared = faults.set_patience(PAGES_PATIENCE);
        let closers =
            prepared.and_then(|()| Ok((faults.closer()?, faults.closer()?, ram.stream.closer()?)));
        let (closer, of_blocks, pages) = closers.map_err(WireError::from)?;
        // A page of memory waits for what the channel has to send of disks. A host that does not know the
        // option makes it wait longer, and nothing else.
        let _ = ram.stream.limit_unsent(UNSENT);
        let serving = Serving {
            ram: Arc::new(Mutex::new(ram)),
            memory,
            disks,
            progress,
            priority: Arc::default(),
            has_ended: Arc::default(),
        };
        let (queue, queued) = mpsc::sync_channel(QUEUE);
        let blocks = if serving.disks.is_empty() {
            None
        } else {
            let serving = serving.clone();
            let serve = move || serving.serve_disks(&queued, &of_blocks);
            Some(spawn("migrate-blocks", serve)?)
        };
        let server = serving.clone();
        let serve = move || server.serve(&mut *faults, &queue);
        // If it fails, the thread above ends with its queue.
        let requests = spawn("migrate-faults", serve)?;
        Ok(Self {
            serving,
            closer,
            pages,
            requests,
            blocks,
        })
    }

    /// The other channels yield to faults that this records.
    pub(super) fn priority(&self) -> &Arc<FaultPriority> {
        &self.serving.priority
    }

    /// The handles that end its channels.
    pub(super) fn closers(&self) -> [Closer; 2] {
        [self.closer.clone(), self.pages.clone()]
    }

    /// Ends it behind the pages that it is sending, and gives the channel back.
    pub(super) fn end(self) -> Option<Ram> {
        // Requests in the queue need no answer: the pages are sent already, or the guest stays here, or
        // they are asked for again over the next connection.
        self.serving.has_ended.store(true, Ordering::Release);
        self.closer.close();
        let threads = [Some(self.requests), self.blocks];
        for thread in threads.into_iter().flatten() {
            thread.join().ok()?;
        }
        Arc::into_inner(self.serving.ram).map(Mutex::into_inner)
    }

    /// Ends it at once: the other side may not read the pages that it is sending.
    pub(super) fn cut(self) {
        self.pages.close();
        drop(self.end());
    }
}

fn spawn(
    name: &str,
    work: impl FnOnce() + Send + 'static,
) -> Result<JoinHandle<()>, MigrationError> {
    let thread = thread::Builder::new().name(name.to_owned());
    let started = thread.spawn(in_span(work));
    started.map_err(|error| MigrationError::here("host-refused", error))
}

impl Serving {
    fn contents(&self) -> Contents<'_> {
        Contents {
            blocks: &self.memory,
            disks: &self.disks,
        }
    }

    /// Answers requests until the channel ends; the closing side reports the reason.
    fn serve(&self, faults: &mut dyn Stream, queue: &SyncSender<(u32, u64)>) {
        let mut reader = Reader::default();
        while let Ok((_, body)) = reader.read(faults, &[Kind::Fault]) {
            let Ok((block, page)) = pages::decode_fault(body) else {
                break;
            };
            // First of all: from here on the bulk channels leave the link to this page.
            self.priority.is_needed();
            let contents = self.contents();
            // A disk that there is not is no page, either.
            let is_disk = contents.is_disk(block) && contents.dirty(block).is_some();
            let served = if is_disk {
                // It fails once the other thread has ended: then nothing is served.
                queue.send((block, page)).is_ok()
            } else {
                let run = self.take_run(block, page, 1);
                let mut ram = self.ram.lock();
                run.is_none_or(|run| ram.send_batch(contents, &[run], &self.progress).is_ok())
            };
            if !served {
                break;
            }
        }
    }

    /// Reads blocks of disks, and sends them. A failure ends the faults channel.
    fn serve_disks(&self, queued: &Receiver<(u32, u64)>, faults: &Closer) {
        let mut batch = Batch::default();
        for (block, page) in queued {
            if self.has_ended.load(Ordering::Acquire) {
                return;
            }
            // A request of a guest is rarely for one block, and each read of storage costs more than its
            // bytes.
            let Some(run) = self.take_run(block, page, SMALL_BATCH) else {
                continue;
            };
            if self.send_blocks(&mut batch, run).is_err() {
                return faults.close();
            }
        }
    }

    fn send_blocks(&self, batch: &mut Batch, run: Run) -> Result<(), MigrationError> {
        let contents = self.contents();
        let encoded = batch.fill(&[run], |run, data| contents.read(run, data))?;
        // Behind the read: pages of memory use the channel meanwhile.
        let mut ram = self.ram.lock();
        let is_disk = true;
        send_encoded(&mut *ram.stream, &encoded, is_disk, &self.progress).map(drop)
    }

    /// Takes the marks of a page that is waited for and of those behind it that are sent with it; `None` for
    /// one that is no page, or is on its way already. The atomic clear settles the race with the bulk
    /// channels: each page is sent once.
    fn take_run(&self, block: u32, page: u64, most: usize) -> Option<Run> {
        let dirty = self.contents().dirty(block)?;
        let first = usize::try_from(page).ok()?;
        let pages = first..first.saturating_add(most);
        let pages = pages.take_while(|page| dirty.take_page(*page)).count();
        self.priority
            .follow(block, page.saturating_add(pages.max(1) as u64));
        (pages > 0).then_some(Run {
            block,
            first: page,
            pages: pages as u32,
        })
    }
}

#[cfg(test)]
mod tests {
    use std::io;
    use std::os::unix::net::UnixStream;
    use std::time::Duration;

    use super::*;
    use crate::disks::ReadDisk;
    use crate::pages::PAGE;
    use crate::testing::{blocks, fill_page, ram};
    use crate::wire;

    /// Storage that does not answer before the test lets it.
    struct Slow(Mutex<Receiver<()>>);

    impl ReadDisk for Slow {
        fn read(&self, _: u64, data: &mut [u8]) -> io::Result<()> {
            let told = self.0.lock().recv_timeout(Duration::from_secs(60));
            told.map_err(|_| io::ErrorKind::TimedOut)?;
            data.fill(5);
            Ok(())
        }
    }

    /// A vCPU does not wait for the storage that a device waits for.
    #[test]
    fn memory_is_served_while_a_disk_is_read() {
        let memory = ram(4);
        fill_page(&memory, 2, 7);
        memory.dirty().set_enabled(true);
        memory.dirty().mark_all();
        let (go, told) = mpsc::channel();
        let dirty = Arc::new(memory::DirtyBitmap::new(64 * PAGE));
        dirty.set_enabled(true);
        dirty.mark(0, 64 * PAGE);
        let disk = SourceDisk {
            name: "disk".to_owned(),
            size: 64 * PAGE as u64,
            dirty,
            content: Arc::new(Slow(Mutex::new(told))),
        };
        let (faults, mut asks) = UnixStream::pair().unwrap();
        let (ram, mut pages) = UnixStream::pair().unwrap();
        let patience = Some(Duration::from_secs(60));
        pages.set_read_timeout(patience).unwrap();
        let server = FaultServer::start(
            Box::new(faults),
            Ram::new(Box::new(ram)),
            blocks(&memory),
            vec![disk],
            Progress::default(),
        )
        .unwrap();
        let mut ask = |block, page| {
            let body = pages::encode_fault(block, page);
            wire::write(&mut asks, Kind::Fault, &[&body]).unwrap();
        };
        let mut reader = Reader::default();
        let mut next = || {
            let (_, body) = reader.read(&mut pages, &[Kind::Pages]).unwrap();
            // Block, runs, and the first one: its first page and its length.
            (body[0], body[8], body[16], body[body.len() - 1])
        };
        // Neither a block nor a disk.
        ask(2, 0);
        ask(1, 0);
        ask(1, 32);
        ask(0, 2);
        assert_eq!(next(), (0, 2, 1, 7));
        go.send(()).unwrap();
        assert_eq!(next(), (1, 0, SMALL_BATCH as u8, 5));
        // The second is in the queue, or is being read and is sent before the end.
        go.send(()).unwrap();
        assert!(server.end().is_some());
    }

    /// A destination that asks for pages and does not read them holds nothing up.
    #[test]
    fn cut_does_not_wait_for_the_reader() {
        const MANY: usize = 128;
        let memory = ram(MANY);
        memory.dirty().set_enabled(true);
        (0..MANY).for_each(|page| fill_page(&memory, page, 7));
        memory.dirty().mark_all();
        let (faults, mut asks) = UnixStream::pair().unwrap();
        let (ram, mut pages) = UnixStream::pair().unwrap();
        let (memory, ram) = (blocks(&memory), Ram::new(Box::new(ram)));
        let server = FaultServer::start(
            Box::new(faults),
            ram,
            memory,
            Vec::new(),
            Progress::default(),
        );
        for page in 0..MANY as u64 {
            let body = pages::encode_fault(0, page);
            wire::write(&mut asks, Kind::Fault, &[&body]).unwrap();
        }
        // It has begun, and 512 KiB do not fit into the socket.
        let mut reader = Reader::default();
        reader.read(&mut pages, &[Kind::Pages]).unwrap();
        let (ended, ends) = mpsc::channel();
        thread::spawn(move || {
            server.unwrap().cut();
            ended.send(())
        });
        ends.recv_timeout(Duration::from_secs(60)).unwrap();
    }
}
