//! Pages that follow the guest.

use std::sync::Arc;
use std::time::{Duration, Instant};

use memory::DirtyPages;
use parking_lot::Mutex;

use super::fault_server::FaultServer;
use super::watch::{STALLED, Watch, is_given_up};
use super::{Contents, Engine, Whereabouts, dial_channel, disconnected, keepalive};
use crate::decision::{Doubt, Question, Resolution};
use crate::link::Closer;
use crate::message::{Channel, ControlChannel, Hello, Refusal, ToDestination, ToSource};
use crate::pages::{BATCH, PAGE, Run};
use crate::policy::MAX_CONNECTIONS;
use crate::progress::{Activity, Phase, Progress};
use crate::sender::{Pacer, Ram, count, on_all, small_batches};
use crate::wire::WireError;
use crate::{ATTEMPTS, KEEPALIVES, MigrationError, STALL};

/// Looks for a stalled destination and for the operator's decision within one `patience`.
const LOOKS: u32 = 100;

/// Result of reconnecting to the destination.
enum Reconnect {
    /// The destination, which said what it has not got.
    Again,
    /// The destination, which has all pages.
    Over,
    /// The destination; its guest ended before all pages had arrived.
    Lost,
}

/// The answer of a destination to a source that is back.
enum Missing {
    /// Its list has come; it takes so many channels.
    Listed { connections: u16 },
    /// It has all pages.
    Nothing,
    /// Its guest ended before all pages had arrived.
    Lost,
}

/// The question to the operator whether the guest is given up, while the destination is lost.
#[derive(Default)]
struct Asks {
    question: Option<Question>,
    /// The destination was connected, and did not advance. Then the question stays open until less than this
    /// is left, in bytes: one that stalls again and again must not take the decision from the operator.
    until_below: Option<u64>,
}

impl Asks {
    /// Withdraws the question before pages flow: a guest that makes progress must not be discarded. Returns
    /// the decision if one was accepted before.
    fn withdraw(&mut self) -> Option<Resolution> {
        match self.until_below {
            None => self.question.take().and_then(Question::withdraw),
            Some(_) => None,
        }
    }
}

/// Bytes that are left to send.
fn left_bytes(progress: &Progress) -> u64 {
    let report = progress.report();
    let memory = report.remaining_pages.saturating_mul(PAGE as u64);
    memory.saturating_add(report.disk_remaining_bytes)
}

fn given_up(error: &MigrationError) -> Refusal {
    let why = format!(
        "an operator gave the guest up, of which a part had not come to the destination: {}",
        error.refusal().detail
    );
    Refusal::new("resolved", why)
}

/// The guest ended at the destination while parts of it were missing there, as when its service died.
pub(super) fn lost() -> Refusal {
    let detail = "the guest ended at the destination before all of its memory and disks had come there; \
                  keep the images of its copied disks at the source";
    Refusal::new("guest-lost", detail)
}

impl Engine<'_, '_> {
    /// The pages that come after the guest: a list for each block, and behind those one for each disk that
    /// may lack blocks.
    fn missing(&self) -> Vec<DirtyPages> {
        let follow = self.disks_can_follow();
        let memory = self.blocks.iter().map(|block| block.ram.dirty().snapshot());
        let disks = self.disks.iter().filter(|_| follow);
        memory
            .chain(disks.map(|disk| disk.dirty.snapshot()))
            .collect()
    }

    /// Tells the destination which pages it does not have, or has as they were.
    pub(super) fn announce_missing(&mut self, round: u32) -> Result<(), MigrationError> {
        // The marks stay: they are the list of pages that `push` and the fault server work off.
        let missing = self.missing();
        self.downtime.pages = 0;
        let first = self.rams.first_mut().ok_or_else(disconnected)?;
        for (block, pages) in (0..).zip(&missing) {
            let runs: Vec<Run> = pages
                .runs()
                .map(|(first, pages)| Run {
                    block,
                    first: first as u64,
                    pages: u32::try_from(pages).unwrap_or(u32::MAX),
                })
                .collect();
            for runs in runs.chunks(BATCH) {
                first.send_missing(block, runs)?;
            }
        }
        // On every channel, also on those that carried nothing: the round ends with the last `End`.
        self.rams.iter_mut().try_for_each(|ram| ram.end(round))
    }

    /// Starts the fault server. It runs from before the guest resumes at the destination until all pages are
    /// there.
    pub(super) fn serve_faults(&mut self) -> Result<(), MigrationError> {
        let faults = self.faults.take().ok_or_else(disconnected)?;
        let announces = self.verify;
        let rams = self.rams.iter_mut();
        rams.for_each(|ram| ram.announces_hashes = announces);
        // The fault server gets a channel of its own: a page that a vCPU waits for must not queue
        // behind bulk pages.
        let ram = self.rams.pop().ok_or_else(disconnected)?;
        let fault_server = FaultServer::start(
            faults,
            ram,
            self.blocks.clone(),
            self.disks.clone(),
            self.sending.progress.clone(),
        )?;
        self.fault_server = Some(fault_server);
        Ok(())
    }

    /// The guest runs there: sends all that is left. A connection that is lost is made again, for as
    /// long as it takes: there is no way back.
    ///
    /// # Errors
    /// The guest ended before all of it was there, or an operator gave it up.
    pub(super) fn follow_with_pages(&mut self) -> Result<(), Refusal> {
        let progress = self.sending.progress.clone();
        let mut asks = Asks::default();
        let mut attempt = self.push(&progress, &mut asks);
        while let Err(error) = attempt {
            let (id, was) = (self.sending.id, progress.report().phase);
            if was == Phase::PostcopyPaused {
                tracing::debug!(migration = %id, %error, "the destination was not reached again");
            } else {
                tracing::warn!(migration = %id, %error, "cannot send the remaining pages of a \
                                                         guest; retrying");
            }
            // Start over: pages on the old channels arrived or did not, and only the destination
            // knows.
            self.disconnect();
            if matches!(&error, MigrationError::Here(why) if why.code == STALLED) {
                let left = left_bytes(&progress);
                asks.until_below = Some(asks.until_below.map_or(left, |before| before.min(left)));
            }
            // One question for all attempts. A new one each time would drop an answer that comes
            // while this side dials.
            let open = asks
                .question
                .get_or_insert_with(|| self.sending.decision.ask(Doubt::Postcopy));
            progress.update(|report| {
                report.phase = Phase::PostcopyPaused;
                report.error = Some(error.refusal());
            });
            if was != Phase::PostcopyPaused {
                self.source.show(&Whereabouts::OutOfReach(error.refusal()));
            }
            let wait = self.sending.policy.patience / ATTEMPTS;
            if open.wait(wait) == Some(Resolution::Discard) {
                return Err(given_up(&error));
            }
            attempt = match self.reconnect(&mut asks.question) {
                Ok(Reconnect::Again) => {
                    if asks.withdraw() == Some(Resolution::Discard) {
                        return Err(given_up(&error));
                    }
                    self.push(&progress, &mut asks)
                }
                Ok(Reconnect::Over) => break,
                Ok(Reconnect::Lost) => return Err(lost()),
                Err(error) => Err(error),
            };
        }
        progress.update(|report| report.error = None);
        Ok(())
    }

    /// Has the connections of an attempt end when nothing advances any more, or an operator gives the guest
    /// up.
    fn watch(&self, closers: Vec<Closer>) -> Watch {
        let policy = self.sending.policy;
        // A limit of the bandwidth may let a page pass now and then, over each channel.
        let paced = policy.max_bandwidth.map_or(0, |limit| {
            u64::from(MAX_CONNECTIONS) * PAGE as u64 / limit.max(1)
        });
        Watch {
            closers,
            limit: policy.patience * STALL + Duration::from_secs(paced),
            tick: policy.patience / LOOKS,
        }
    }

    fn disconnect(&mut self) {
        self.control = None;
        if let Some(fault_server) = self.fault_server.take() {
            fault_server.cut();
        }
        self.rams.clear();
    }

    /// Sends all that is left, and waits until the destination has it.
    fn push(&mut self, progress: &Progress, asks: &mut Asks) -> Result<(), MigrationError> {
        let control = self.control.as_ref().ok_or_else(disconnected)?;
        let mut closers = vec![control.stream.closer().map_err(WireError::from)?];
        for ram in &self.rams {
            closers.push(ram.stream.closer().map_err(WireError::from)?);
        }
        closers.extend(self.fault_server.iter().flat_map(FaultServer::closers));
        let watch = self.watch(closers.clone());
        let until_below = asks.until_below;
        let advance = |question: &mut Option<Question>| {
            if until_below.is_some_and(|least| left_bytes(progress) < least) {
                *question = None;
            }
            progress.report().sent_bytes
        };
        let push = || self.push_watched(progress, &closers);
        watch.over(&mut asks.question, advance, push)
    }

    fn push_watched(
        &mut self,
        progress: &Progress,
        closers: &[Closer],
    ) -> Result<(), MigrationError> {
        progress.enter(Phase::Postcopy);
        progress.begin(Activity::Pages);
        // Not before it is known: a VM that is shown as running here must not run there as well.
        self.source.show(&Whereabouts::AtDestination);
        // A snapshot will do: `Ram::push` takes the mark of each page before it sends the page, and
        // skips those that the fault server has sent meanwhile.
        let left = self.missing();
        let round = progress.report().rounds + 1;
        let (of_memory, of_disks) = left.split_at_checked(self.blocks.len()).unwrap_or_default();
        progress.update(|report| {
            report.rounds = round;
            report.remaining_pages = count(of_memory);
            report.disk_remaining_bytes = count(of_disks) * PAGE as u64;
        });
        tracing::info!(
            migration = %self.sending.id,
            pages = count(of_memory),
            disk_bytes = count(of_disks) * PAGE as u64,
            "migration: the rest follows the guest"
        );
        let batches = Mutex::new(small_batches(&left, self.sending.policy.max_bandwidth));
        let priority = self
            .fault_server
            .as_ref()
            .map(|fault_server| Arc::clone(fault_server.priority()));
        let priority = &*priority.unwrap_or_default();
        // The limit holds for bulk pages only. Pages that the guest waits for are never delayed.
        let pacer = Pacer::new(self.sending.policy.max_bandwidth);
        let every = self.sending.policy.patience / KEEPALIVES;
        let rams = &mut self.rams;
        let contents = Contents {
            blocks: &self.blocks,
            disks: &self.disks,
        };
        let control = self.control.as_mut().ok_or_else(disconnected)?;
        let start = Instant::now();
        let push = |ram: &mut Ram| ram.push(contents, &batches, &pacer, priority, progress);
        // A channel over which the destination takes a byte now and then does not end by itself.
        let sign = || keepalive(control).inspect_err(|_| closers.iter().for_each(Closer::close));
        let (sent, ()) = on_all(rams, push, every, sign, || ())?;
        // No batch is left: the fault server ends after the page that it is sending.
        let fault_server = self.fault_server.take().and_then(FaultServer::end);
        self.rams.push(fault_server.ok_or_else(disconnected)?);
        // Not before the fault server's channel is back: its `End` has to follow its last page.
        self.rams.iter_mut().try_for_each(|ram| ram.end(round))?;
        let speed = crate::sender::per_second(sent, start.elapsed());
        progress.update(|report| report.bytes_per_second = report.bytes_per_second.max(speed));
        self.send(&ToDestination::PagesSent { round })?;
        self.expect(|answer| matches!(answer, ToSource::Completed).then_some(()))?;
        // So that it need not wait for us to ask again.
        let _ = self.send(&ToDestination::Complete);
        Ok(())
    }

    /// New connections to the destination, which says what it has not got.
    fn reconnect(&mut self, question: &mut Option<Question>) -> Result<Reconnect, MigrationError> {
        let id = self.sending.id;
        let patience = self.sending.policy.patience;
        let dial = |channel| dial_channel(self.sending.dial, patience, &Hello::new(id, channel));
        let mut control = ControlChannel::new(dial(Channel::Again)?);
        let closer = control.stream.closer().map_err(WireError::from)?;
        // A list without an end is no advance.
        let listen = || self.recv_missing(&mut control);
        let watch = self.watch(vec![closer]);
        let connections = match watch.over(question, |_| 0, listen)? {
            Missing::Listed { connections } => connections,
            Missing::Nothing => return Ok(Reconnect::Over),
            Missing::Lost => return Ok(Reconnect::Lost),
        };
        // The number comes from the other side. Fewer than two do not do: one channel carries the
        // pages that are waited for, and none would be left for the others.
        for index in 0..connections.clamp(2, MAX_CONNECTIONS) {
            if is_given_up(question.as_ref()) {
                return Err(disconnected());
            }
            let mut ram = Ram::new(dial(Channel::Ram { index })?);
            ram.announces_hashes = self.verify;
            self.rams.push(ram);
        }
        let faults = dial(Channel::Faults)?;
        let ram = self.rams.pop().ok_or_else(disconnected)?;
        let progress = self.sending.progress.clone();
        self.fault_server = Some(FaultServer::start(
            faults,
            ram,
            self.blocks.clone(),
            self.disks.clone(),
            progress,
        )?);
        self.control = Some(control);
        Ok(Reconnect::Again)
    }

    /// Receives the list of what the destination has not got.
    fn recv_missing(&self, control: &mut ControlChannel) -> Result<Missing, MigrationError> {
        // Losing the marks is safe: if this connection breaks half-way, the next one gets the whole
        // list again.
        // What is not there is known to the destination alone.
        for block in &self.blocks {
            drop(block.ram.dirty().take());
        }
        for disk in &self.disks {
            drop(disk.dirty.take());
        }
        loop {
            match control.recv()? {
                ToSource::StillMissing { block, first, bits } => {
                    let dirty = self.contents().dirty(block);
                    let dirty = dirty.ok_or_else(|| WireError::damaged("unknown memory block"))?;
                    let first = usize::try_from(first).unwrap_or(usize::MAX);
                    // `merge` ignores bits past the end of the block, so a wrong list names no
                    // other memory.
                    dirty.merge(first, &bits);
                }
                ToSource::Prepared { connections, .. } => {
                    return Ok(Missing::Listed { connections });
                }
                ToSource::Refused(why) => return Err(MigrationError::There(why)),
                ToSource::Ended => return Ok(Missing::Lost),
                ToSource::Completed => {
                    let _ = control.send(&ToDestination::Complete);
                    return Ok(Missing::Nothing);
                }
                other => {
                    let why = format!("{other:?} is not a list of missing pages");
                    return Err(WireError::damaged(why).into());
                }
            }
        }
    }
}
