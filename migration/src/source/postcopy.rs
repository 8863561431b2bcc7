//! Pages that follow the guest.

use std::sync::Arc;
use std::time::Instant;

use memory::DirtyPages;
use parking_lot::Mutex;

use super::fault_server::FaultServer;
use super::{Contents, Engine, Whereabouts, dial_channel, disconnected, keepalive};
use crate::decision::{Doubt, Question, Resolution};
use crate::message::{Channel, ControlChannel, Hello, Refusal, ToDestination, ToSource};
use crate::pages::{BATCH, PAGE, Run};
use crate::policy::MAX_CONNECTIONS;
use crate::progress::{Activity, Phase, Progress};
use crate::sender::{Pacer, Ram, count, on_all, small_batches};
use crate::wire::WireError;
use crate::{ATTEMPTS, KEEPALIVES, MigrationError};

/// Result of reconnecting to the destination.
enum Reconnect {
    /// The destination, which said what it has not got.
    Again,
    /// The destination, which has all pages.
    Over,
    /// The destination; its guest ended before all pages had arrived.
    Lost,
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
        let mut attempt = self.push(&progress);
        let mut question: Option<Question> = None;
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
            // One question for all attempts. A new one each time would drop an answer that comes
            // while this side dials.
            let open = question.get_or_insert_with(|| self.sending.decision.ask(Doubt::Postcopy));
            progress.update(|report| {
                report.phase = Phase::PostcopyPaused;
                report.error = Some(error.refusal());
            });
            if was != Phase::PostcopyPaused {
                self.source.show(&Whereabouts::OutOfReach(error.refusal()));
            }
            let wait = self.sending.policy.patience / ATTEMPTS;
            if open.wait(wait) == Some(Resolution::Discard) {
                let why = format!(
                    "an operator gave the guest up, of which a part had not come to the destination: {}",
                    error.refusal().detail
                );
                return Err(Refusal::new("resolved", why));
            }
            attempt = match self.reconnect() {
                Ok(Reconnect::Again) => {
                    // Withdrawn before pages flow: a guest that makes progress must not be
                    // discarded.
                    question = None;
                    self.push(&progress)
                }
                Ok(Reconnect::Over) => break,
                Ok(Reconnect::Lost) => return Err(lost()),
                Err(error) => Err(error),
            };
        }
        progress.update(|report| report.error = None);
        Ok(())
    }

    fn disconnect(&mut self) {
        self.control = None;
        if let Some(fault_server) = self.fault_server.take() {
            fault_server.cut();
        }
        self.rams.clear();
    }

    fn push(&mut self, progress: &Progress) -> Result<(), MigrationError> {
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
        let (sent, ()) = on_all(rams, push, every, || keepalive(control), || ())?;
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
    fn reconnect(&mut self) -> Result<Reconnect, MigrationError> {
        let id = self.sending.id;
        let patience = self.sending.policy.patience;
        let dial = |channel| dial_channel(self.sending.dial, patience, &Hello::new(id, channel));
        let mut control = ControlChannel::new(dial(Channel::Again)?);
        // Losing the marks is safe: if this connection breaks half-way, the next one gets the whole
        // list again.
        // What is not there is known to the destination alone.
        for block in &self.blocks {
            drop(block.ram.dirty().take());
        }
        for disk in &self.disks {
            drop(disk.dirty.take());
        }
        let connections = loop {
            match control.recv()? {
                ToSource::StillMissing { block, first, bits } => {
                    let dirty = self.contents().dirty(block);
                    let dirty = dirty.ok_or_else(|| WireError::damaged("unknown memory block"))?;
                    let first = usize::try_from(first).unwrap_or(usize::MAX);
                    // `merge` ignores bits past the end of the block, so a wrong list names no
                    // other memory.
                    dirty.merge(first, &bits);
                }
                ToSource::Prepared { connections, .. } => break connections,
                ToSource::Refused(why) => return Err(MigrationError::There(why)),
                ToSource::Ended => return Ok(Reconnect::Lost),
                ToSource::Completed => {
                    let _ = control.send(&ToDestination::Complete);
                    return Ok(Reconnect::Over);
                }
                other => {
                    let why = format!("{other:?} is not a list of missing pages");
                    return Err(WireError::damaged(why).into());
                }
            }
        };
        // The number comes from the other side. Fewer than two do not do: one channel carries the
        // pages that are waited for, and none would be left for the others.
        for index in 0..connections.clamp(2, MAX_CONNECTIONS) {
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
}
