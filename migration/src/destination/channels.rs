//! The memory to which pages come, and the channels that bring them.

use std::sync::{Arc, OnceLock};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use memory::DirtyBitmap;
use parking_lot::{Condvar, Mutex};

use super::incoming_disks::IncomingDisks;
use super::postcopy::PostcopyReceiver;
use crate::disks::DestinationDisk;
use crate::link::{Closer, Stream};
use crate::pages::{self, Block, Content, PAGE};
use crate::progress::Progress;
use crate::threads::in_span;
use crate::verify::{Findings, Hashes};
use crate::wire::{Kind, Reader, WireError};
use crate::{MigrationError, PAGES_PATIENCE};

/// The memory to which pages come.
pub(super) struct IncomingMemory {
    pub(super) blocks: Vec<Block>,
    /// Pages that were written here, block by block: all others are zeros.
    pub(super) touched: Vec<DirtyBitmap>,
    /// Pages that come after the guest, as the source announced them.
    pub(super) missing: Mutex<Vec<DirtyBitmap>>,
    /// Set from when the guest may run without all of its pages.
    pub(super) receiver: OnceLock<PostcopyReceiver>,
    /// The source sends hashes of all pages.
    pub(super) verify: bool,
    /// The result of comparing them.
    pub(super) findings: Findings,
    /// Disks that arrive with the memory, numbered behind its blocks.
    pub(super) disks: IncomingDisks,
}

impl IncomingMemory {
    pub(super) fn new(blocks: Vec<Block>, disks: Vec<DestinationDisk>, verify: bool) -> Self {
        let bitmaps = || -> Vec<DirtyBitmap> {
            let bitmaps = blocks.iter().map(|block| {
                let bitmap = DirtyBitmap::new(block.ram.len());
                // A disabled bitmap ignores marks. Without this, `apply` would take every page for
                // untouched and skip zero pages that must erase old content.
                bitmap.set_enabled(true);
                bitmap
            });
            bitmaps.collect()
        };
        Self {
            touched: bitmaps(),
            missing: Mutex::new(bitmaps()),
            receiver: OnceLock::new(),
            verify,
            findings: Findings::default(),
            disks: IncomingDisks::new(disks, blocks.len()),
            blocks,
        }
    }
}

/// The ends of rounds on RAM channels that are connected together. A place for each channel, and no queue, which a
/// source could fill: nobody reads it while the source sends no other message.
struct RoundEnds {
    state: Mutex<Ends>,
    changed: Condvar,
}

struct Ends {
    /// The last round that ended, by channel; `None` for a channel that is not connected.
    rounds: Vec<Option<u32>>,
    /// Why the first channel ended that did.
    failure: Option<MigrationError>,
}

impl RoundEnds {
    fn new(channels: usize) -> Arc<Self> {
        Arc::new(Self {
            state: Mutex::new(Ends {
                rounds: vec![None; channels],
                failure: None,
            }),
            changed: Condvar::new(),
        })
    }

    fn set(&self, index: u16, round: u32) {
        if let Some(last) = self.state.lock().rounds.get_mut(usize::from(index)) {
            *last = Some(round);
        }
        self.changed.notify_all();
    }

    fn fail(&self, error: MigrationError) {
        self.state.lock().failure.get_or_insert(error);
        self.changed.notify_all();
    }

    /// Waits until each channel has ended this round, or `patience` is over. Returns whether they have.
    fn wait(&self, round: u32, patience: Duration) -> Result<bool, MigrationError> {
        let deadline = Instant::now() + patience;
        let mut state = self.state.lock();
        loop {
            // A channel carries its rounds in order, so the end of a later round covers this one.
            let has_ended = |ended: &Option<u32>| ended.is_some_and(|ended| ended >= round);
            if state.rounds.iter().all(has_ended) {
                return Ok(true);
            }
            if let Some(error) = state.failure.take() {
                return Err(error);
            }
            if self.changed.wait_until(&mut state, deadline).timed_out() {
                return Ok(false);
            }
        }
    }
}

/// The RAM and faults channels of a migration, with a thread for each RAM channel. Dropping them
/// closes the connections and waits for the threads.
pub(super) struct Channels {
    pub(super) memory: Arc<IncomingMemory>,
    progress: Progress,
    connections: u16,
    /// The ends of rounds on the channels that are connected now.
    ends: Arc<RoundEnds>,
    /// The channel for requests of missing pages.
    faults: Option<Box<dyn Stream>>,
    closers: Vec<Closer>,
    threads: Vec<JoinHandle<()>>,
}

impl Channels {
    pub(super) fn new(
        blocks: Vec<Block>,
        disks: Vec<DestinationDisk>,
        connections: u16,
        verify: bool,
        progress: Progress,
    ) -> Self {
        Self {
            memory: Arc::new(IncomingMemory::new(blocks, disks, verify)),
            progress,
            connections,
            ends: RoundEnds::new(connections.into()),
            faults: None,
            closers: Vec::new(),
            threads: Vec::new(),
        }
    }

    /// The number of RAM channels that were agreed on.
    pub(super) fn count(&self) -> u16 {
        self.connections
    }

    /// Whether all RAM channels are connected.
    pub(super) fn are_connected(&self) -> bool {
        self.ends.state.lock().rounds.iter().all(Option::is_some)
    }

    /// Receives pages from a connection, on a thread. Returns the handle that closes the connection.
    pub(super) fn start(
        &mut self,
        index: u16,
        stream: Box<dyn Stream>,
    ) -> Result<Closer, MigrationError> {
        // RAM channels carry no keepalives and are idle between rounds, so a limit of one
        // `patience` would end good ones.
        let prepared = stream
            .set_patience(PAGES_PATIENCE)
            .and_then(|()| Ok((stream.closer()?, stream.closer()?)));
        // Two handles, because two owners may close the connection: `disconnect`, and a cancel.
        let (ours, other) = prepared.map_err(|error| MigrationError::Wire(error.into()))?;
        // Before its thread may set it.
        self.ends.set(index, 0);
        let (ends, memory) = (Arc::clone(&self.ends), Arc::clone(&self.memory));
        let progress = self.progress.clone();
        self.spawn(move || take_pages(index, stream, &memory, &ends, &progress))?;
        self.closers.push(ours);
        Ok(other)
    }

    pub(super) fn set_faults(&mut self, stream: Box<dyn Stream>, patience: Duration) {
        // This side only writes here, mostly from the thread that also reads userfaultfd events.
        // That thread must not block for longer than `patience` on a source that does not read.
        let prepared = stream.set_patience(patience);
        match prepared.and_then(|()| stream.closer()) {
            Ok(closer) => {
                self.closers.push(closer);
                self.faults = Some(stream);
            }
            // The source waits for its answer in vain, and connects again.
            Err(error) => tracing::info!(%error, "a faults channel ended on arrival"),
        }
    }

    pub(super) fn take_faults(&mut self) -> Option<Box<dyn Stream>> {
        self.faults.take()
    }

    /// Serves the faults of a guest whose pages are missing, on a thread.
    pub(super) fn watch_faults(&mut self) -> Result<(), MigrationError> {
        let (memory, progress) = (Arc::clone(&self.memory), self.progress.clone());
        self.spawn(move || {
            if let Some(receiver) = memory.receiver.get() {
                receiver.watch(&progress);
            }
        })
    }

    /// Asks for blocks of disks that requests of the guest wait for, on a thread.
    pub(super) fn ask_for_blocks(&mut self) -> Result<(), MigrationError> {
        let memory = Arc::clone(&self.memory);
        self.spawn(move || {
            if let Some(receiver) = memory.receiver.get() {
                memory.disks.ask(receiver);
            }
        })
    }

    fn spawn(&mut self, work: impl FnOnce() + Send + 'static) -> Result<(), MigrationError> {
        let started = thread::Builder::new()
            .name("migrate-pages".to_owned())
            .spawn(in_span(work));
        let thread = started.map_err(|error| MigrationError::here("host-refused", error))?;
        self.threads.push(thread);
        Ok(())
    }

    /// Waits until each channel has ended this round, or `patience` is over. Returns whether they have.
    ///
    /// # Errors
    /// A channel has ended before.
    pub(super) fn wait_end(&self, round: u32, patience: Duration) -> Result<bool, MigrationError> {
        self.ends.wait(round, patience)
    }

    /// Closes all connections, so that others can take their places. Faults are still watched.
    pub(super) fn disconnect(&mut self) {
        self.closers.drain(..).for_each(|closer| closer.close());
        self.faults = None;
        // The ends of channels that were lost say nothing about those that come.
        self.ends = RoundEnds::new(self.connections.into());
        self.threads.retain(|thread| !thread.is_finished());
    }
}

impl Drop for Channels {
    fn drop(&mut self) {
        self.disconnect();
        // No thread of the guest is to wait for a page that does not come.
        if let Some(receiver) = self.memory.receiver.get() {
            receiver.end(&self.progress);
        }
        // Only now can every thread end. The connections are closed, and `end` has stopped both the
        // watch loop and a `fill` that retries.
        for thread in self.threads.drain(..) {
            if thread.join().is_err() {
                tracing::error!("a thread that received pages of a guest panicked");
            }
        }
    }
}

/// Receives pages until the channel ends.
fn take_pages(
    index: u16,
    mut stream: Box<dyn Stream>,
    memory: &IncomingMemory,
    ends: &RoundEnds,
    progress: &Progress,
) {
    let mut reader = Reader::default();
    // In postcopy, hashes come ahead of their pages on the same channel.
    let mut announced = Hashes::default();
    let mut take = || take_frame(&mut reader, &mut *stream, memory, &mut announced, progress);
    loop {
        match take() {
            Ok(None) => {}
            Ok(Some(round)) => ends.set(index, round),
            Err(error) => {
                // Before the guest runs here, it must not wait for pages that no channel brings.
                if let Some(receiver) = memory.receiver.get() {
                    receiver.give_up();
                }
                return ends.fail(error.into());
            }
        }
    }
}

/// Receives one frame and applies it. Returns the number of a round that has ended.
fn take_frame(
    reader: &mut Reader,
    stream: &mut dyn Stream,
    memory: &IncomingMemory,
    announced: &mut Hashes,
    progress: &Progress,
) -> Result<Option<u32>, WireError> {
    let allowed = [
        Kind::Pages,
        Kind::Zeros,
        Kind::Missing,
        Kind::Hashes,
        Kind::End,
    ];
    let (kind, body) = reader.read(stream, &allowed)?;
    if kind == Kind::End {
        let round = <[u8; 4]>::try_from(body);
        let round = round.map_err(|_| WireError::damaged("the end of a round has no number"))?;
        return Ok(Some(u32::from_le_bytes(round)));
    }
    if kind == Kind::Hashes {
        // One frame of hashes is kept, not a table: its pages follow on this channel before the
        // next frame of hashes.
        *announced = memory.take_hashes(body, progress)?;
        return Ok(None);
    }
    let content = match kind {
        Kind::Pages => Content::Data,
        Kind::Missing => Content::Later,
        _ => Content::Zeros,
    };
    let decoded = pages::decode(body, content, |index| match memory.blocks.get(index) {
        Some(block) => Some((block.ram.len() / PAGE, block.name.as_str())),
        None => memory.disks.find(index),
    })?;
    let bytes = body.len() as u64;
    if let Some(waited) = memory.disks.take(&decoded, content)? {
        progress.update(|report| {
            report.sent_bytes = report.sent_bytes.saturating_add(bytes);
            report.disk_faults = report.disk_faults.saturating_add(waited.len() as u64);
        });
        if let Some(receiver) = memory.receiver.get() {
            receiver.record_waits(&waited);
            memory.disks.report(progress);
        }
        return Ok(None);
    }
    match (content, memory.receiver.get()) {
        (Content::Later, None) => {
            decoded.mark(&memory.missing.lock());
            return Ok(None);
        }
        (Content::Later, Some(_)) => {
            // The receiver owns the bitmap now. The mark would be lost, and the guest would run on
            // what an earlier round left in the page.
            let why = "unexpected announcement of missing pages: the guest is loaded already";
            return Err(WireError::damaged(why));
        }
        // Memory is registered with userfaultfd. A plain write to a missing page would fault and
        // block this thread, which is the one that brings the page.
        (_, Some(receiver)) => memory.fill(receiver, &decoded, announced, progress)?,
        (_, None) => decoded.apply(&memory.blocks, &memory.touched),
    }
    let count = decoded.count();
    progress.update(|report| {
        // `wait_round` takes growing bytes as the sign that the source still sends.
        report.sent_bytes = report.sent_bytes.saturating_add(bytes);
        match kind {
            Kind::Zeros => report.zero_pages = report.zero_pages.saturating_add(count),
            _ => report.pages = report.pages.saturating_add(count),
        }
    });
    Ok(None)
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;

    use super::*;
    use crate::testing::{blocks, ram};
    use crate::wire;

    /// A source that ends round after round, and no more, takes no memory: all that is kept is the last.
    #[test]
    fn ends_of_rounds_are_not_queued() {
        let mut channels =
            Channels::new(blocks(&ram(4)), Vec::new(), 2, false, Progress::default());
        let mut sources = [0, 1].map(|index| {
            let (near, far) = UnixStream::pair().unwrap();
            drop(channels.start(index, Box::new(far)).unwrap());
            near
        });
        for round in 1..=1000_u32 {
            wire::write(&mut sources[0], Kind::End, &[&round.to_le_bytes()]).unwrap();
        }
        wire::write(&mut sources[1], Kind::End, &[&7_u32.to_le_bytes()]).unwrap();
        drop(sources);
        for thread in channels.threads.drain(..) {
            thread.join().unwrap();
        }
        // What was ended counts, also where the channel has ended since.
        assert!(channels.wait_end(7, Duration::ZERO).unwrap());
        assert!(channels.wait_end(8, Duration::ZERO).is_err());
    }
}
