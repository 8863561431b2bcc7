//! The guest runs here and its last pages follow.
//!
//! No way leads back: the guest has run, and half of its memory is at the source. So a connection that
//! is lost is awaited for as long as it takes. The guest runs on and waits only where it touches a
//! page that is not here.

use std::time::Instant;

use super::postcopy::PostcopyReceiver;
use super::receiving::Guest;
use super::{Ended, Failed, POLLS, answer_ping};
use crate::MigrationError;
use crate::decision::{Doubt, Question, Resolution};
use crate::journal::Step;
use crate::message::{ControlChannel, Refusal, ToDestination, ToSource};
use crate::progress::{Activity, Phase};
use crate::wire::WireError;

/// A guest that runs here without all of its pages.
pub(super) struct Postcopy<'a> {
    guest: Guest<'a>,
    /// Absent while the source is lost.
    control: Option<ControlChannel>,
    /// A source that asked while the one before was still being served.
    again: Option<ControlChannel>,
    /// Open while the source is lost: an operator can end the guest, which is then lost.
    question: Option<Question>,
}

/// How the wait for the source ended.
enum Reconnected {
    Yes,
    /// The connection was lost again.
    No,
    /// The machine has ended, and needs no pages.
    MachineEnded,
}

impl<'a> Postcopy<'a> {
    pub(super) fn new(guest: Guest<'a>, control: Option<ControlChannel>) -> Self {
        Self {
            guest,
            control,
            again: None,
            question: None,
        }
    }

    pub(super) fn run(mut self) -> Result<Ended, Failed> {
        let progress = self.guest.session.progress;
        progress.enter(Phase::Postcopy);
        progress.begin(Activity::Pages);
        // Every error counts as a lost connection, also one of the protocol: the guest has run
        // here, so there is no side to which it could return.
        while let Err(error) = self.until_whole() {
            // Storage that failed ended the connection, whatever that looks like.
            let failure = self.guest.channels.memory.disks.storage_failure();
            let error = failure.map_or(error, MigrationError::Here);
            self.disconnect(&error);
            // The VM was ended here: its last pages are of no use to anyone.
            if self.receiver()?.is_lost() {
                return self.ended(None);
            }
            while let Reconnected::No = match self.reconnect()? {
                Reconnected::MachineEnded => return self.ended(Some(&error)),
                other => other,
            } {
                self.control = None;
            }
        }
        let is_incomplete = self.guest.channels.memory.disks.left() > 0;
        if self.receiver()?.failure().is_some() || is_incomplete {
            return self.ended(None);
        }
        // All pages are here before the source hears `Completed`: after that it may free the only
        // other copy of them.
        self.receiver()?.end(progress);
        progress.update(|report| report.error = None);
        self.record_whole();
        let (session, control) = (self.guest.session, self.control.as_mut());
        let heard = control.is_some_and(|control| {
            control.send(&ToSource::Completed).is_ok()
                && matches!(session.recv(control), Ok(ToDestination::Complete))
        });
        Ok(self.finish(heard))
    }

    /// Keeps the guest. A source that did not hear that all pages are here may ask.
    fn finish(self, heard: bool) -> Ended {
        self.guest.keep();
        match heard {
            true => Ended::Heard,
            false => Ended::Unheard(ToSource::Completed),
        }
    }

    /// Records that nothing of the guest is missing any more.
    fn record_whole(&mut self) {
        // A failure changes nothing for the guest.
        if let Err(error) = self.guest.journal.record(Step::Running) {
            tracing::warn!(migration = %self.guest.id, %error, "a journal cannot be written");
        }
    }

    /// The machine has ended, by a request or because its missing pages cannot be brought. `lost` is the error
    /// that ended the connection, if the machine ended while its source was awaited.
    fn ended(mut self, lost: Option<&MigrationError>) -> Result<Ended, Failed> {
        let why = match (
            self.receiver()?.failure(),
            self.guest.channels.memory.disks.incomplete(),
        ) {
            (None, None) => {
                if let Some(lost) = lost {
                    let why = ended_alone(self.receiver()?.left(), lost);
                    self.guest.keep();
                    return Err(Failed::Unheard(why, ToSource::Ended));
                }
                // An error of the connection to an ended machine is none of the migration.
                let progress = self.guest.session.progress;
                progress.update(|report| report.error = None);
                self.record_whole();
                return Ok(self.finish(false));
            }
            (Some(why), _) => {
                self.guest.fail(&why);
                why
            }
            (None, Some(why)) => {
                self.guest.keep();
                why
            }
        };
        // The source must not resume its copy: the guest has run here.
        Err(Failed::Unheard(why, ToSource::Ended))
    }

    fn receiver(&self) -> Result<&PostcopyReceiver, MigrationError> {
        let receiver = self.guest.postcopy();
        receiver.ok_or(MigrationError::Wire(WireError::Closed))
    }

    fn disconnect(&mut self, error: &MigrationError) {
        let session = self.guest.session;
        let left = self.guest.postcopy().map_or(0, PostcopyReceiver::left);
        let blocks = self.guest.channels.memory.disks.left();
        tracing::warn!(migration = %self.guest.id, %error, left, blocks, "the pages of a guest do \
                                                                          not arrive");
        if let (MigrationError::Here(why), Some(control)) = (error, &mut self.control) {
            // Such as a page that is not what it should be: it is asked for again. A source that does
            // not hear it sees that the connection ends.
            let _ = control.send(&ToSource::Refused(why.clone()));
        }
        // Requests are not lost with the connection: `waited` keeps them, and `connect` sends them
        // again.
        if let Some(receiver) = self.guest.postcopy() {
            receiver.disconnect();
        }
        self.guest.channels.disconnect();
        self.control = None;
        // Before the report shows the loss: an operator who sees it can decide.
        self.question
            .get_or_insert_with(|| session.decision.ask(Doubt::Postcopy));
        session.progress.update(|report| {
            report.phase = Phase::PostcopyPaused;
            report.error = Some(error.refusal());
        });
    }

    fn until_whole(&mut self) -> Result<(), MigrationError> {
        loop {
            let control = self.control.as_mut();
            let control = control.ok_or(MigrationError::Wire(WireError::Closed))?;
            let message = self.guest.session.recv(control)?;
            // The source pings, so that this is noticed in time.
            let disks = &self.guest.channels.memory.disks;
            let failure = self
                .receiver()?
                .failure()
                .or_else(|| disks.storage_failure());
            if let Some(why) = failure {
                return Err(MigrationError::Here(why));
            }
            // The VM was ended here. A source that only shows that it lives must not keep what is left.
            if self.receiver()?.is_lost() {
                return Ok(());
            }
            let control = self.control.as_mut();
            let control = control.ok_or(MigrationError::Wire(WireError::Closed))?;
            match message {
                ToDestination::PagesSent { round } => {
                    // `PagesSent` can overtake the pages, which come over other connections. The
                    // end of the round on each of these shows that all have arrived.
                    self.guest.wait_round(round, control)?;
                    let left = self.guest.channels.memory.disks.left();
                    let receiver = self.receiver()?;
                    return match receiver.left() + left {
                        0 => self.settle_disks(),
                        // `Completed` would make the source drop pages that only it has. The error
                        // forces a new connection instead, and with it a new list of missing pages.
                        left => {
                            let why = format!("{left} pages were not sent");
                            Err(WireError::damaged(why).into())
                        }
                    };
                }
                ToDestination::Complete => {}
                other => answer_ping(control, &other)?,
            }
        }
    }

    /// Makes the disks durable before the source hears that all has come: it may then free the only other
    /// copy.
    fn settle_disks(&mut self) -> Result<(), MigrationError> {
        if !self.guest.channels.memory.disks.have_followed() {
            return Ok(());
        }
        let control = self.control.as_mut();
        let control = control.ok_or(MigrationError::Wire(WireError::Closed))?;
        self.guest.sync_disks(control)?;
        let arrived = self.guest.target.blocks_arrived();
        arrived.map_err(MigrationError::Here)
    }

    /// Waits for the source, and tells it which pages are missing.
    fn reconnect(&mut self) -> Result<Reconnected, Failed> {
        let session = self.guest.session;
        let tick = session.patience / POLLS;
        let mut control = loop {
            if let Some(control) = self.again.take() {
                break control;
            }
            let decided = self.question.as_ref().and_then(|open| open.wait(tick));
            // The only possible decision: `Doubt::Postcopy` does not admit `Run`.
            if decided == Some(Resolution::Discard) {
                return Err(self.discarded());
            }
            if self.receiver()?.is_lost() {
                return Ok(Reconnected::MachineEnded);
            }
            // A connection that fails in its handshake does not count.
            if let Ok(Some(control)) = self.guest.take_arrivals(tick) {
                break control;
            }
        };
        // The loop above may have taken late channels of the lost connection. They go first, then
        // their slots become free. Both precede `Prepared`, which invites new channels.
        self.guest.channels.disconnect();
        session.router.reopen(session.id.get());
        let told = self.send_missing(&mut control);
        self.control = Some(control);
        if told.is_err() {
            return Ok(Reconnected::No);
        }
        match self.connect_channels() {
            Ok(()) => {
                self.question = None;
                session.progress.enter(Phase::Postcopy);
                Ok(Reconnected::Yes)
            }
            Err(error) => {
                tracing::info!(migration = %self.guest.id, %error, "the source was lost again");
                Ok(Reconnected::No)
            }
        }
    }

    fn send_missing(&self, control: &mut ControlChannel) -> Result<(), MigrationError> {
        // A thread of the old channels may still fill a page behind this snapshot. The page then
        // comes twice, and `fill` skips the second copy.
        let of_memory = self.receiver()?.still_missing();
        let of_disks = self.guest.channels.memory.disks.still_missing();
        for (block, first, bits) in of_memory.into_iter().chain(of_disks) {
            control.send(&ToSource::StillMissing { block, first, bits })?;
        }
        Ok(control.send(&ToSource::Prepared {
            connections: self.guest.channels.count(),
            postcopy: true,
        })?)
    }

    /// Waits for new RAM channels and a faults channel.
    fn connect_channels(&mut self) -> Result<(), MigrationError> {
        let patience = self.guest.session.patience;
        let again = self.guest.wait_channels()?;
        self.give_way(again)?;
        let deadline = Instant::now() + patience;
        let ask = loop {
            if let Some(ask) = self.guest.channels.take_faults() {
                break ask;
            }
            if Instant::now() > deadline {
                return Err(WireError::Silent.into());
            }
            let again = self.guest.take_arrivals(patience / POLLS)?;
            self.give_way(again)?;
        };
        // Last, because it repeats the pending requests: the pages come over RAM channels, which
        // have to exist by then.
        self.receiver()?.connect(ask);
        self.guest.channels.memory.disks.connected();
        Ok(())
    }

    /// A source that asks anew has given up the channels that are being connected.
    fn give_way(&mut self, again: Option<ControlChannel>) -> Result<(), MigrationError> {
        let has_come = again.is_some();
        self.again = again.or(self.again.take());
        match has_come {
            true => Err(WireError::Closed.into()),
            false => Ok(()),
        }
    }

    /// Discards the guest by the operator's decision. The source, which may still hold pages, gets that as
    /// the answer when it asks.
    fn discarded(&mut self) -> Failed {
        // The answer is `Ended` and not `NotHere`: the guest has run here, so the copy at the
        // source is old and must not resume.
        self.guest.discard();
        let detail = "an operator decided that the guest does not run at the destination";
        Failed::Unheard(Refusal::new("resolved", detail), ToSource::Ended)
    }
}

/// The reason of a migration whose guest was ended while pages were missing that nobody could bring.
fn ended_alone(pages: usize, lost: &MigrationError) -> Refusal {
    let why = format!(
        "the VM was deleted, or its guest ended, while the source was lost ({lost}) and {pages} pages of memory \
         had not arrived"
    );
    Refusal::new("guest-ended", why)
}
