//! Pages that follow the guest: those that it waits for first.

use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::Instant;

use parking_lot::Mutex;

use super::{Engine, gone, heartbeat, reach};
use crate::link::{Closer, Stream};
use crate::message::{Channel, Control, Hello, ToDestination, ToSource};
use crate::pages::{self, BATCH, Block, Run};
use crate::progress::{Phase, Progress, Resolution};
use crate::sender::{Haste, Pacer, Ram, batches, count, on_all};
use crate::wire::{Kind, Reader, WireError};
use crate::{ATTEMPTS, PAGES_PATIENCE, SIGNS, Trouble};

/// Whom one met who looked for the destination again.
enum Met {
    /// The destination, which said what it has not got.
    Again,
    /// One that needs nothing more: all pages are there, or the guest is no more.
    Over,
}

/// Serves the pages that the guest waits for, on a channel of their own.
pub(super) struct Urgent {
    thread: JoinHandle<Ram>,
    closer: Closer,
    haste: Arc<Haste>,
}

impl Urgent {
    /// `faults` tells which pages are waited for, `ram` carries them.
    pub(super) fn start(
        mut faults: Box<dyn Stream>,
        mut ram: Ram,
        blocks: Vec<Block>,
        progress: Progress,
    ) -> Result<Self, Trouble> {
        // A guest that misses nothing is silent.
        faults
            .set_patience(PAGES_PATIENCE)
            .map_err(WireError::from)?;
        let closer = faults.closer().map_err(WireError::from)?;
        let haste = Arc::new(Haste::default());
        let hurry = Arc::clone(&haste);
        let serve = move || {
            let mut reader = Reader::default();
            // It ends with the channel; whoever closed it knows why.
            while let Ok((_, body)) = reader.read(&mut *faults, &[Kind::Fault]) {
                let Ok((block, page)) = pages::decode_fault(body) else {
                    break;
                };
                hurry.is_needed();
                let found = blocks.get(block as usize);
                // One that is no page, or on its way already.
                let is_ours = found.is_some_and(|found| {
                    usize::try_from(page).is_ok_and(|page| found.ram.dirty().take_page(page))
                });
                let run = Run {
                    block,
                    first: page,
                    pages: 1,
                };
                if is_ours && ram.send_batch(&blocks, run, &progress).is_err() {
                    break;
                }
            }
            ram
        };
        let thread = thread::Builder::new()
            .name("migrate-urgent".to_owned())
            .spawn(serve)
            .map_err(|error| Trouble::here("host-refused", error))?;
        Ok(Self {
            thread,
            closer,
            haste,
        })
    }

    /// Ends it, and gives the channel back.
    pub(super) fn end(self) -> Option<Ram> {
        self.closer.close();
        self.thread.join().ok()
    }
}

impl Engine<'_, '_> {
    /// Tells the destination which pages it does not have, or has as they were.
    pub(super) fn tell_missing(&mut self, round: u32) -> Result<(), Trouble> {
        let missing: Vec<_> = self
            .blocks
            .iter()
            .map(|b| b.ram.dirty().snapshot())
            .collect();
        self.downtime.pages = 0;
        let first = self.rams.first_mut().ok_or_else(gone)?;
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
        self.rams.iter_mut().try_for_each(|ram| ram.end(round))
    }

    /// From before the guest goes on there until all pages are there, there is somebody who answers
    /// for those that are waited for.
    pub(super) fn serve_faults(&mut self) -> Result<(), Trouble> {
        let faults = self.connect(Channel::Faults)?;
        let ram = self.rams.pop().ok_or_else(gone)?;
        let urgent = Urgent::start(
            faults,
            ram,
            self.blocks.clone(),
            self.sending.progress.clone(),
        )?;
        self.urgent = Some(urgent);
        Ok(())
    }

    /// The guest runs there: sends all that is left. A connection that is lost is made again, for as
    /// long as it takes: there is no way back.
    pub(super) fn follow_with_pages(&mut self) {
        let progress = self.sending.progress.clone();
        let mut attempt = self.push(&progress);
        while let Err(trouble) = attempt {
            let (id, was) = (self.sending.id, progress.report().phase);
            if was == Phase::PostcopyPaused {
                tracing::debug!(migration = %id, %trouble, "the destination was not met again");
            } else {
                tracing::warn!(migration = %id, %trouble, "pages cannot follow their guest; trying again");
            }
            self.disconnect();
            progress.update(|report| {
                report.phase = Phase::PostcopyPaused;
                report.error = Some(trouble.refusal());
            });
            let wait = self.sending.policy.patience / ATTEMPTS;
            if progress.wait_resolution(wait) == Some(Resolution::Discard) {
                return;
            }
            attempt = match self.meet_again() {
                Ok(Met::Again) => self.push(&progress),
                Ok(Met::Over) => break,
                Err(trouble) => Err(trouble),
            };
        }
        progress.update(|report| report.error = None);
    }

    fn disconnect(&mut self) {
        self.control = None;
        drop(self.urgent.take().and_then(Urgent::end));
        self.rams.clear();
    }

    fn push(&mut self, progress: &Progress) -> Result<(), Trouble> {
        progress.enter(Phase::Postcopy);
        let left: Vec<_> = self
            .blocks
            .iter()
            .map(|b| b.ram.dirty().snapshot())
            .collect();
        let round = progress.report().rounds + 1;
        progress.update(|report| {
            report.rounds = round;
            report.remaining_pages = count(&left);
        });
        let batches = Mutex::new(batches(&left));
        let haste = self.urgent.as_ref().map(|urgent| Arc::clone(&urgent.haste));
        let haste = &*haste.unwrap_or_default();
        let pacer = Pacer::new(self.sending.policy.max_bandwidth);
        let every = self.sending.policy.patience / SIGNS;
        let (blocks, rams) = (&self.blocks, &mut self.rams);
        let control = self.control.as_mut().ok_or_else(gone)?;
        let start = Instant::now();
        let push = |ram: &mut Ram| ram.push(blocks, &batches, &pacer, haste, progress);
        let (sent, ()) = on_all(rams, push, every, || heartbeat(control), || ())?;
        // Nobody takes pages any more but who is in the middle of it.
        let urgent = self.urgent.take().and_then(Urgent::end);
        self.rams.push(urgent.ok_or_else(gone)?);
        self.rams.iter_mut().try_for_each(|ram| ram.end(round))?;
        let speed = crate::sender::per_second(sent, start.elapsed());
        progress.update(|report| report.bytes_per_second = report.bytes_per_second.max(speed));
        self.say(&ToDestination::PagesSent { round })?;
        self.expect(|answer| matches!(answer, ToSource::Completed).then_some(()))?;
        // So that it need not wait for us to ask again.
        let _ = self.say(&ToDestination::Complete);
        Ok(())
    }

    /// New connections to the destination, which says what it has not got.
    fn meet_again(&mut self) -> Result<Met, Trouble> {
        let id = self.sending.id;
        let patience = self.sending.policy.patience;
        let dial = |channel| reach(self.sending.dial, patience, &Hello::new(id, channel));
        let mut control = Control::new(dial(Channel::Again)?);
        for block in &self.blocks {
            // What is not there is known to the destination alone.
            drop(block.ram.dirty().take());
        }
        let connections = loop {
            match control.hear()? {
                ToSource::StillMissing { block, first, bits } => {
                    let block = self.blocks.get(block as usize);
                    let block = block.ok_or_else(|| WireError::damaged("no such block"))?;
                    let first = usize::try_from(first).unwrap_or(usize::MAX);
                    block.ram.dirty().merge(first, &bits);
                }
                ToSource::Prepared { connections, .. } => break connections,
                ToSource::Refused(why) => return Err(Trouble::There(why)),
                ToSource::Ended => return Ok(Met::Over),
                ToSource::Completed => {
                    let _ = control.say(&ToDestination::Complete);
                    return Ok(Met::Over);
                }
                other => {
                    let why = format!("{other:?} does not say what is missing");
                    return Err(WireError::damaged(why).into());
                }
            }
        };
        for index in 0..connections {
            self.rams.push(Ram::new(dial(Channel::Ram { index })?));
        }
        let faults = dial(Channel::Faults)?;
        let ram = self.rams.pop().ok_or_else(gone)?;
        let progress = self.sending.progress.clone();
        self.urgent = Some(Urgent::start(faults, ram, self.blocks.clone(), progress)?);
        self.control = Some(control);
        Ok(Met::Again)
    }
}
