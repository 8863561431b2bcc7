//! Sending pages: over all RAM channels at once, within a bandwidth.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use memory::DirtyPages;
use parking_lot::Mutex;

use crate::MigrationError;
use crate::decision::Decision;
use crate::disks::{Contents, check_lost};
use crate::fault_priority::{FaultPriority, Turn};
use crate::link::Stream;
use crate::pages::{self, BATCH, Batch, Block, Encoded, PAGE, Run};
use crate::progress::Progress;
use crate::threads::in_span;
use crate::verify;
use crate::wire::{self, Kind};

/// The longest sleep to keep to a bandwidth. Between two of them the sender looks for a cancel.
const LONGEST_SLEEP: Duration = Duration::from_millis(100);

/// Pages of a batch in postcopy: 64 KiB.
pub(crate) const SMALL_BATCH: usize = 16;
/// Bytes that a channel may have to send while others wait for the link.
pub(crate) const UNSENT: u32 = 64 << 10;

/// Batches that a bandwidth limit has room for in a second.
const BATCHES_PER_SECOND: u64 = 10;

/// A RAM channel.
pub(crate) struct Ram {
    pub(crate) stream: Box<dyn Stream>,
    pub(crate) batch: Batch,
    /// Hashes go ahead of pages: verify mode in postcopy, where content no longer changes.
    pub(crate) announces_hashes: bool,
}

pub(crate) fn count(pages: &[DirtyPages]) -> u64 {
    pages.iter().map(|pages| pages.count() as u64).sum()
}

pub(crate) fn per_second(count: u64, span: Duration) -> u64 {
    let us = span.as_micros().max(1);
    u64::try_from(u128::from(count) * 1_000_000 / us).unwrap_or(u64::MAX)
}

/// Pages in batches: the runs of each are of one block. A bandwidth `limit` in bytes a second makes
/// batches smaller, so that bytes keep flowing: the destination takes pages that do not come for a lost
/// source.
pub(crate) fn batches(
    pending: &[DirtyPages],
    limit: Option<u64>,
) -> impl Iterator<Item = Vec<Run>> + Send + '_ {
    batches_of(pending, batch_pages(limit))
}

/// Pages in small batches, so that a page that is waited for does not have to wait for a large one.
pub(crate) fn small_batches(
    pending: &[DirtyPages],
    limit: Option<u64>,
) -> impl Iterator<Item = Vec<Run>> + Send + '_ {
    batches_of(pending, batch_pages(limit).min(SMALL_BATCH))
}

/// Splits pages into batches of at most `most` pages. Scattered pages share a batch, because a frame for
/// each would cost more than the page.
fn batches_of(pending: &[DirtyPages], most: usize) -> impl Iterator<Item = Vec<Run>> + Send + '_ {
    let mut runs = (0_u32..).zip(pending).flat_map(|(block, pages)| {
        let runs = pages.runs();
        runs.map(move |(first, pages)| (block, first, pages))
    });
    // A run that did not fit the last batch, or the rest of it.
    let mut rest = None;
    std::iter::from_fn(move || {
        let (mut batch, mut room): (Vec<Run>, _) = (Vec::new(), most);
        while room > 0 {
            let Some((block, first, pages)) = rest.take().or_else(|| runs.next()) else {
                break;
            };
            if batch.last().is_some_and(|last| last.block != block) {
                rest = Some((block, first, pages));
                break;
            }
            let here = pages.min(room);
            batch.push(Run {
                block,
                first: first as u64,
                // A batch has few.
                pages: here as u32,
            });
            room -= here;
            rest = (here < pages).then(|| (block, first + here, pages - here));
        }
        (!batch.is_empty()).then_some(batch)
    })
}

fn batch_pages(limit: Option<u64>) -> usize {
    let Some(limit) = limit else { return BATCH };
    let pages = usize::try_from(limit / BATCHES_PER_SECOND).unwrap_or(usize::MAX) / PAGE;
    pages.clamp(1, BATCH)
}

/// A round that several channels share.
pub(crate) struct Work<'a, I> {
    pub(crate) contents: Contents<'a>,
    pub(crate) batches: Mutex<I>,
    pub(crate) pacer: Pacer,
    /// The round ends at this time, whatever is left.
    pub(crate) cut: Option<Instant>,
    pub(crate) round: u32,
    pub(crate) progress: Progress,
    pub(crate) decision: Decision,
}

impl<I: Iterator<Item = Vec<Run>>> Work<'_, I> {
    /// Marks pages that were not sent as dirty again.
    pub(crate) fn put_back(&self) {
        // All channels have ended: what the iterator still holds is what no channel took.
        for run in self.batches.lock().by_ref().flatten() {
            if let Some(dirty) = self.contents.dirty(run.block) {
                // Within the block.
                dirty.put_back_run(run.first as usize, run.pages as usize);
            }
        }
    }
}

/// Sends on a thread for each channel, and does `meanwhile` on this one. Until all have ended, calls `sign`
/// at the interval `every`. Returns the bytes that were sent, and the result of `meanwhile`.
pub(crate) fn on_all<R>(
    rams: &mut [Ram],
    send: impl Fn(&mut Ram) -> Result<u64, MigrationError> + Sync,
    every: Duration,
    mut sign: impl FnMut() -> Result<(), MigrationError>,
    meanwhile: impl FnOnce() -> R,
) -> Result<(u64, R), MigrationError> {
    thread::scope(|scope| {
        let (done, ended) = mpsc::channel();
        let (mut running, mut sent, mut failed) = (0, 0, None);
        for ram in rams {
            let (done, send) = (done.clone(), &send);
            let work = move || {
                // The loop below waits for a result of each thread, and would wait for ever for one
                // that a panic ended without any.
                let sent = catch_unwind(AssertUnwindSafe(|| send(ram)));
                let sent = sent.unwrap_or_else(|_| {
                    let why = "a thread that sends memory panicked";
                    Err(MigrationError::here("internal", why))
                });
                // The receiver waits for all of us.
                let _ = done.send(sent);
            };
            match thread::Builder::new().spawn_scoped(scope, in_span(work)) {
                Ok(_) => running += 1,
                Err(error) => failed = Some(MigrationError::here("host-refused", error)),
            }
        }
        // On this thread, so without keepalives: it has to be shorter than the peer's patience.
        let result = meanwhile();
        while running > 0 {
            match ended.recv_timeout(every) {
                Ok(one) => {
                    running -= 1;
                    match one {
                        Ok(bytes) => sent += bytes,
                        // The first error counts. Later ones are mostly its effects on the other
                        // channels.
                        Err(error) => drop(failed.get_or_insert(error)),
                    }
                }
                // A timeout: `done` lives in this scope. After a failure no keepalive is sent, and
                // the loop only waits for the threads, which borrow the channels.
                Err(_) if failed.is_none() => failed = sign().err(),
                Err(_) => {}
            }
        }
        failed.map_or(Ok((sent, result)), Err)
    })
}

/// Sends few pages over the first channel, on this thread.
pub(crate) fn send_inline(
    rams: &mut [Ram],
    contents: Contents<'_>,
    batches: impl Iterator<Item = Vec<Run>>,
    pacer: &Pacer,
    round: u32,
    progress: &Progress,
) -> Result<u64, MigrationError> {
    let mut sent = 0;
    if let Some(first) = rams.first_mut() {
        for batch in batches {
            let bytes = first.send_batch(contents, &batch, progress)?;
            sent += bytes;
            // Bounded by the caller, which sends few pages like this.
            pacer.wait(bytes, || false);
        }
    }
    // On all channels: the destination has a round when `End` came on each.
    for ram in rams {
        ram.end(round)?;
    }
    Ok(sent)
}

impl Ram {
    pub(crate) fn new(stream: Box<dyn Stream>) -> Self {
        Self {
            stream,
            batch: Batch::default(),
            announces_hashes: false,
        }
    }

    /// Announces pages that come after the guest.
    pub(crate) fn send_missing(&mut self, block: u32, runs: &[Run]) -> Result<(), MigrationError> {
        let body = pages::encode_missing(block, runs);
        Ok(wire::write(&mut *self.stream, Kind::Missing, &[&body])?)
    }

    /// Sends pages of these batches that were not sent yet. The caller sends the end of the round.
    pub(crate) fn push(
        &mut self,
        contents: Contents<'_>,
        batches: &Mutex<impl Iterator<Item = Vec<Run>>>,
        pacer: &Pacer,
        priority: &FaultPriority,
        progress: &Progress,
    ) -> Result<u64, MigrationError> {
        let mut sent = 0;
        // A host that does not know the option makes urgent pages wait longer, and nothing else.
        let _ = self.stream.limit_unsent(UNSENT);
        let mut turn = Turn::default();
        loop {
            turn.give_way(priority);
            let next = match priority.behind_fault(contents) {
                // A guest that reads on sequentially then finds the next pages there.
                Some(next) => Some(vec![next]),
                // A statement of its own: in a `while let` the lock would be held during the send,
                // and the channels would wait for each other.
                None => batches.lock().next(),
            };
            let Some(batch) = next else { return Ok(sent) };
            let mut runs: Vec<Run> = Vec::new();
            for run in batch {
                let Some(dirty) = contents.dirty(run.block) else {
                    continue;
                };
                let pages = run.first..run.first + u64::from(run.pages);
                // Within the block.
                for page in pages.filter(|page| dirty.take_page(*page as usize)) {
                    pages::push(&mut runs, run.block, page);
                }
            }
            let bytes = self.send_batch(contents, &runs, progress)?;
            sent += bytes;
            turn.sent(bytes);
            // Nothing cancels pages that follow a guest.
            pacer.wait(bytes, || false);
        }
    }

    /// Sends batches as long as there are some, and the end of the round.
    pub(crate) fn send(
        &mut self,
        work: &Work<'_, impl Iterator<Item = Vec<Run>>>,
    ) -> Result<u64, MigrationError> {
        let mut sent = 0;
        let is_cut = || work.cut.is_some_and(|cut| Instant::now() >= cut);
        while !is_cut() {
            let next = work.batches.lock().next();
            let Some(batch) = next else { break };
            if work.decision.is_canceled() {
                return Err(MigrationError::Canceled);
            }
            let bytes = self.send_batch(work.contents, &batch, &work.progress)?;
            sent += bytes;
            work.pacer
                .wait(bytes, || is_cut() || work.decision.is_canceled());
        }
        self.end(work.round)?;
        Ok(sent)
    }

    pub(crate) fn end(&mut self, round: u32) -> Result<(), MigrationError> {
        Ok(wire::write(
            &mut *self.stream,
            Kind::End,
            &[&round.to_le_bytes()],
        )?)
    }

    /// Hashes runs as long as there are some, and sends the end of the round.
    pub(crate) fn send_all_hashes(
        &mut self,
        blocks: &[Block],
        runs: &Mutex<impl Iterator<Item = Run>>,
        round: u32,
        progress: &Progress,
    ) -> Result<u64, MigrationError> {
        let mut sent = 0;
        loop {
            let next = runs.lock().next();
            let Some(run) = next else { break };
            if let Some(block) = blocks.get(run.block as usize) {
                sent += self.send_hashes(block, run, progress)?;
            }
        }
        self.end(round)?;
        Ok(sent)
    }

    fn send_hashes(
        &mut self,
        block: &Block,
        run: Run,
        progress: &Progress,
    ) -> Result<u64, MigrationError> {
        let body = verify::encode(block, run);
        check_lost(block)?;
        wire::write(&mut *self.stream, Kind::Hashes, &[&body])?;
        let sent = (wire::HEADER_LEN + body.len()) as u64;
        progress.update(|report| {
            report.sent_bytes += sent;
            report.verified_pages += u64::from(run.pages);
        });
        Ok(sent)
    }

    /// Sends runs of one block, [`BATCH`] pages at most.
    pub(crate) fn send_batch(
        &mut self,
        contents: Contents<'_>,
        runs: &[Run],
        progress: &Progress,
    ) -> Result<u64, MigrationError> {
        let Some(first) = runs.first() else {
            return Ok(0);
        };
        // In front of the page, on the same channel: the destination checks the page before it
        // installs it. Afterwards the guest may have written to it.
        if self.announces_hashes
            && let Some(block) = contents.block(first.block)
        {
            // The destination keeps the hashes of one run.
            if runs.len() > 1 {
                let each = runs.iter().map(std::slice::from_ref);
                return each
                    .map(|run| self.send_batch(contents, run, progress))
                    .sum();
            }
            self.send_hashes(block, *first, progress)?;
        }
        let batch = self
            .batch
            .fill(runs, |run, data| contents.read(run, data))?;
        let is_disk = contents.is_disk(first.block);
        send_encoded(&mut *self.stream, &batch, is_disk, progress)
    }
}

/// Sends a batch of memory or of a disk. Returns its bytes.
pub(crate) fn send_encoded(
    stream: &mut dyn Stream,
    batch: &Encoded<'_>,
    is_disk: bool,
    progress: &Progress,
) -> Result<u64, MigrationError> {
    let mut sent = 0;
    if let Some((head, data)) = &batch.pages {
        wire::write(stream, Kind::Pages, &[head, data])?;
        sent += (wire::HEADER_LEN + head.len() + data.len()) as u64;
    }
    if let Some(head) = &batch.zeros {
        wire::write(stream, Kind::Zeros, &[head])?;
        sent += (wire::HEADER_LEN + head.len()) as u64;
    }
    let (full, zero) = (batch.full_pages, batch.zero_pages);
    progress.update(|report| {
        report.sent_bytes += sent;
        if is_disk {
            let bytes = (full + zero) * PAGE as u64;
            report.disk_remaining_bytes = report.disk_remaining_bytes.saturating_sub(bytes);
            return;
        }
        report.pages += full;
        report.zero_pages += zero;
        report.remaining_pages = report.remaining_pages.saturating_sub(full + zero);
    });
    Ok(sent)
}

/// Keeps all channels together to a bandwidth.
pub(crate) struct Pacer {
    limit: Option<u64>,
    begun: Instant,
    sent: AtomicU64,
}

impl Pacer {
    pub(crate) fn new(limit: Option<u64>) -> Self {
        Self {
            limit,
            begun: Instant::now(),
            sent: AtomicU64::new(0),
        }
    }

    /// Returns whether the bandwidth limit lets `bytes` be sent `within` this time.
    pub(crate) fn has_room(&self, bytes: u64, within: Duration) -> bool {
        self.due(bytes) <= within
    }

    /// Accounts for `bytes` that were sent, and waits until the bandwidth allows more, or the round
    /// `is_over`.
    pub(crate) fn wait(&self, bytes: u64, is_over: impl Fn() -> bool) {
        self.wait_by(bytes, is_over, || self.begun.elapsed(), thread::sleep);
    }

    /// The wait by a clock: `elapsed` is the time since the pacer was made.
    fn wait_by(
        &self,
        bytes: u64,
        is_over: impl Fn() -> bool,
        elapsed: impl Fn() -> Duration,
        sleep: impl Fn(Duration),
    ) {
        // Measured against the total since the start, so that channels share one limit, and sleeps
        // that take too long are made up for.
        let due = self.due(self.sent.fetch_add(bytes, Ordering::Relaxed) + bytes);
        loop {
            let ahead = due.saturating_sub(elapsed());
            // Sleeps end late by about a millisecond: shorter ones are skipped, and made up for later.
            if ahead <= Duration::from_millis(1) || is_over() {
                return;
            }
            sleep(ahead.min(LONGEST_SLEEP));
        }
    }

    /// Returns the time that `bytes` take at the bandwidth limit.
    fn due(&self, bytes: u64) -> Duration {
        let Some(limit) = self.limit else {
            return Duration::ZERO;
        };
        let us = u128::from(bytes) * 1_000_000 / u128::from(limit.max(1));
        Duration::from_micros(u64::try_from(us).unwrap_or(u64::MAX))
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;
    use std::os::unix::net::UnixStream;

    use super::*;

    /// A panic in one thread must end the round with an error. Before, the round waited for ever.
    #[test]
    fn panic_of_a_channel_is_an_error() {
        let (to, ended) = mpsc::channel();
        thread::spawn(move || {
            let streams = [(); 3].map(|()| UnixStream::pair().unwrap());
            let mut rams = streams.map(|(near, _)| Ram::new(Box::new(near)));
            let turn = AtomicU64::new(0);
            let send = |_: &mut Ram| match turn.fetch_add(1, Ordering::Relaxed) {
                1 => panic!("as the test says"),
                other => Ok(other),
            };
            let all = on_all(&mut rams, send, Duration::from_secs(1), || Ok(()), || ());
            to.send(all.map_err(|error| error.refusal().code)).unwrap();
        });
        let result = ended.recv_timeout(Duration::from_secs(60));
        assert_eq!(result.expect("it ends"), Err("internal".to_owned()));
    }

    /// Waits on a clock that only sleeping moves. Returns the time that it shows, and the longest sleep.
    fn time_for(pacer: &Pacer, batches: u64, bytes: u64) -> (Duration, Duration) {
        let (now, longest) = (Cell::new(Duration::ZERO), Cell::new(Duration::ZERO));
        for _ in 0..batches {
            let sleep = |span: Duration| {
                now.set(now.get() + span);
                longest.set(longest.get().max(span));
            };
            pacer.wait_by(bytes, || false, || now.get(), sleep);
        }
        (now.get(), longest.get())
    }

    #[test]
    fn bandwidth_is_kept_however_low() {
        const MIB: u64 = 1 << 20;
        // The last is less than a batch of 256 KiB in 100 ms, which was exceeded.
        for limit in [1 << 30, 8 * MIB, MIB, 4096] {
            let (batches, bytes) = (40, 256 << 10);
            let (took, longest) = time_for(&Pacer::new(Some(limit)), batches, bytes);
            let exact = Duration::from_micros(batches * bytes * 1_000_000 / limit);
            let error = exact.abs_diff(took);
            assert!(
                error <= Duration::from_millis(1),
                "{limit}: {took:?}, {exact:?}"
            );
            assert!(longest <= LONGEST_SLEEP, "a cancel waits for {longest:?}");
        }
        assert_eq!(time_for(&Pacer::new(None), 1000, 1 << 30).0, Duration::ZERO);
    }

    #[test]
    fn wait_ends_with_its_round() {
        let (pacer, now) = (Pacer::new(Some(1)), Cell::new(Duration::ZERO));
        let is_over = || now.get() > Duration::from_secs(1);
        let sleep = |span| now.set(now.get() + span);
        pacer.wait_by(1 << 40, is_over, || now.get(), sleep);
        assert!(now.get() <= Duration::from_secs(1) + 2 * LONGEST_SLEEP);
    }

    /// The destination may have old content of pages that were unplugged: they go as zeros, also when
    /// their round is cut short.
    #[test]
    fn unsent_pages_of_unplugged_memory_stay_marked() {
        let config = memory::RamConfig {
            hotplug: true,
            ..memory::RamConfig::anonymous(8 * memory::PAGE_SIZE)
        };
        let ram = std::sync::Arc::new(memory::RamBlock::new(&config).unwrap());
        ram.plug(0, 8 * PAGE).unwrap();
        ram.dirty().set_enabled(true);
        ram.unplug(2 * PAGE, 3 * PAGE).unwrap();
        let pending = [ram.dirty().take()];
        assert_eq!(pending[0].runs().collect::<Vec<_>>(), [(2, 3)]);
        let name = "ram".to_owned();
        let work = Work {
            contents: Contents {
                blocks: &[Block {
                    name,
                    ram: ram.clone(),
                }],
                disks: &[],
            },
            batches: Mutex::new(batches(&pending, None)),
            pacer: Pacer::new(None),
            cut: None,
            round: 1,
            progress: Progress::default(),
            decision: Decision::default(),
        };
        work.put_back();
        let marked = ram.dirty().take();
        assert_eq!(marked.runs().collect::<Vec<_>>(), [(2, 3)]);
    }

    #[test]
    fn scattered_pages_share_batches() {
        let marked = |runs: &[(usize, usize)]| {
            let bitmap = memory::DirtyBitmap::new(1000 * PAGE);
            bitmap.set_enabled(true);
            for (first, pages) in runs {
                bitmap.mark(first * PAGE, pages * PAGE);
            }
            bitmap.take()
        };
        let pending = [
            marked(&[(3, 1), (9, 2), (20, 5)]),
            marked(&[(0, 1), (7, 3)]),
        ];
        let runs = |batch: Vec<Run>| -> Vec<_> {
            let runs = batch.iter();
            runs.map(|run| (run.block, run.first, run.pages)).collect()
        };
        let found: Vec<_> = batches_of(&pending, 4).map(runs).collect();
        let expected = [
            vec![(0, 3, 1), (0, 9, 2), (0, 20, 1)],
            vec![(0, 21, 4)],
            vec![(1, 0, 1), (1, 7, 3)],
        ];
        assert_eq!(found, expected);
    }

    #[test]
    fn low_bandwidth_makes_batches_small() {
        assert_eq!(batch_pages(None), BATCH);
        assert_eq!(batch_pages(Some(u64::MAX)), BATCH);
        assert_eq!(batch_pages(Some(1 << 20)), 25);
        assert_eq!(batch_pages(Some(1)), 1);
        // At 64 KiB/s, each wait is far below the 10 s of silence that end a migration.
        let pacer = Pacer::new(Some(64 << 10));
        let bytes = (batch_pages(pacer.limit) * PAGE) as u64;
        assert!(pacer.has_room(bytes, Duration::from_millis(100)));
        assert!(!pacer.has_room(64 << 10, Duration::from_millis(999)));
    }
}
