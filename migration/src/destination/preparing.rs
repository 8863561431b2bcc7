//! From an offer to a machine that is ready for pages.

use super::channels::Channels;
use super::receiving::{Guest, Receiving};
use super::router::Offered;
use super::{Destination, Session};
use crate::MigrationError;
use crate::journal::{Journal, Step};
use crate::message::{ControlChannel, Offer, Refusal, ToSource};
use crate::policy::MAX_CONNECTIONS;
use crate::progress::{Activity, Phase};
use memory::UserFaults;

/// Why a source that made an offer is not the one that is waited for.
pub(super) enum NotPrepared {
    /// This host refuses the offer; the source has the reason.
    Refused(Refusal),
    /// The source was lost, or the operator canceled.
    Failed(MigrationError),
}

impl NotPrepared {
    pub(super) fn refusal(&self) -> Refusal {
        match self {
            Self::Refused(why) => why.clone(),
            Self::Failed(error) => error.refusal(),
        }
    }
}

/// A source whose offer is being examined.
pub(super) struct Preparing<'a> {
    session: &'a Session<'a>,
    offered: Offered,
}

impl<'a> Preparing<'a> {
    pub(super) fn new(session: &'a Session<'a>, offered: Offered) -> Self {
        Self { session, offered }
    }

    /// Makes the machine and answers `Prepared`. Until then the source is a stranger: whatever fails
    /// leaves nothing behind, and another source is awaited.
    pub(super) fn prepare(self) -> Result<Receiving<'a>, NotPrepared> {
        let session = self.session;
        let Offered {
            id,
            control,
            offer,
            files,
            ..
        } = self.offered;
        session.progress.enter(Phase::Preparing);
        session.progress.begin(Activity::Prepare);
        // Before the host builds the machine, which can take long: a cancel has to reach this
        // connection meanwhile.
        let adopted = session.adopt(control.stream).map_err(NotPrepared::Failed);
        let mut control = adopted?;
        let made = session.host.prepare(id, &offer, files);
        let agreed = made.and_then(|mut target| match agree(session, id, &offer, &*target) {
            Ok(journal) => Ok((target, journal)),
            Err(why) => {
                // No `Guest` owns the machine yet, so nothing else would end it.
                target.discard();
                Err(why)
            }
        });
        let (target, journal) = match agreed {
            Ok(made) => made,
            Err(why) => {
                // A source that does not hear it sees that the connection ends.
                let _ = control.send(&ToSource::Refused(why.clone()));
                return Err(NotPrepared::Refused(why));
            }
        };
        // The number comes from the peer. With 0 channels no page could come, and each one costs a
        // thread.
        let connections = offer.connections.clamp(1, MAX_CONNECTIONS);
        let progress = session.progress.clone();
        let disks = target.disks();
        let on_bases = disks.iter().filter(|disk| disk.image.has_base());
        let bases: Vec<_> = on_bases.map(|disk| disk.name.clone()).collect();
        let channels = Channels::new(target.blocks(), disks, connections, offer.verify, progress);
        // From here on the machine is discarded, and its journal closed, whatever fails.
        let mut guest = Guest::new(session, id, target, journal, channels);
        if session.decision.is_canceled() {
            guest.record_aborted();
            return Err(NotPrepared::Failed(MigrationError::Canceled));
        }
        // Before the answer: channels may come right behind it.
        if let Err(why) = session.router.open(id, connections) {
            guest.record_aborted();
            let _ = control.send(&ToSource::Refused(why.clone()));
            return Err(NotPrepared::Refused(why));
        }
        session.id.set(id);
        let prepared = ToSource::Prepared {
            connections,
            postcopy: UserFaults::is_possible(),
        };
        // An image on a base is made only if the offer named the base: its source knows this message.
        let told = if bases.is_empty() {
            Ok(())
        } else {
            control.send(&ToSource::HasBases(bases))
        };
        if let Err(error) = told.and_then(|()| control.send(&prepared)) {
            guest.record_aborted();
            drop(guest);
            // While the slots are open, the router refuses every other offer as `busy`.
            session.router.close(id);
            return Err(NotPrepared::Failed(error.into()));
        }
        session.show_prepared(id, &offer, connections);
        Ok(Receiving::new(guest, control))
    }
}

/// Compares the memory and the disks of both sides, and begins the journal.
fn agree(
    session: &Session<'_>,
    id: uuid::Uuid,
    offer: &Offer,
    target: &dyn Destination,
) -> Result<Box<dyn Journal>, Refusal> {
    let unwritable = |error: std::io::Error| {
        Refusal::new("journal", format!("cannot write the journal: {error}"))
    };
    let here: Vec<_> = target
        .blocks()
        .iter()
        .map(|block| (block.name.clone(), block.ram.len() as u64))
        .collect();
    let there: Vec<_> = offer
        .blocks
        .iter()
        .map(|block| (block.name.clone(), block.size))
        .collect();
    // Frames name a block by its index, so the order has to agree as well as the names and sizes.
    if here != there {
        let detail = format!(
            "the guest's memory is {there:?} at the source, and {here:?} at the destination"
        );
        return Err(Refusal::new("memory-differs", detail));
    }
    let here: Vec<_> = target
        .disks()
        .iter()
        .map(|disk| (disk.name.clone(), disk.size))
        .collect();
    let there: Vec<_> = offer
        .disks
        .iter()
        .map(|disk| (disk.name.clone(), disk.size))
        .collect();
    if here != there {
        let detail = format!(
            "the disks to copy are {there:?} at the source, and {here:?} at the destination"
        );
        return Err(Refusal::new("disks-differ", detail));
    }
    // Only now, so that a refused offer leaves no file behind; and before `Prepared`, so that a
    // host which restarts can answer for every migration that it accepted.
    let mut journal = session.host.journal(id, &offer.vm).map_err(unwritable)?;
    journal.record(Step::Prepare).map_err(unwritable)?;
    Ok(journal)
}

impl Session<'_> {
    /// Shows that the machine is built, and what will arrive.
    fn show_prepared(&self, id: uuid::Uuid, offer: &Offer, connections: u16) {
        // The sizes come from the peer.
        let memory = offer.blocks.iter().map(|block| block.size);
        let memory = memory.fold(0, u64::saturating_add);
        let disks = offer.disks.iter().map(|disk| disk.size);
        let disks = disks.fold(0, u64::saturating_add);
        self.progress.update(|report| {
            report.phase = Phase::Precopy;
            report.memory_bytes = memory;
            report.disk_bytes = disks;
            report.connections = connections;
            // The error of an earlier source that was refused.
            report.error = None;
        });
        tracing::info!(
            migration = %id,
            vm = offer.vm,
            memory_bytes = memory,
            disk_bytes = disks,
            connections,
            verify = offer.verify,
            "migration: the machine is built, memory arrives"
        );
    }

    /// Makes a control connection one that a cancel closes.
    pub(super) fn adopt(
        &self,
        stream: Box<dyn crate::link::Stream>,
    ) -> Result<ControlChannel, MigrationError> {
        let adopted = stream
            .set_patience(self.patience)
            // A cancel ends only reading, so that this side can still send the reason.
            .and_then(|()| stream.read_closer());
        let closer = adopted.map_err(|error| MigrationError::Wire(error.into()))?;
        self.decision.close_on_cancel(closer);
        Ok(ControlChannel::new(stream))
    }
}
