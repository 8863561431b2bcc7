//! The state of a guest that moves away, or of which a snapshot is written.

use std::sync::Arc;

use control::{RequestError, SnapshotOf, Verb};
use migration::{Decision, Phase, Refusal};
use spec::{Failure, VmState};

use super::migration::moving;
use super::{Caller, Driver};

/// A guest that is moving away.
pub(super) struct Outgoing {
    /// Tells it from those before and after it.
    pub(super) mark: Arc<()>,
    pub(super) decision: Decision,
    pub(super) state: OutgoingState,
    pub(super) purpose: Purpose,
}

/// How far a guest that moves away has come. `ran` says whether it ran before it was stopped: a guest
/// that its owner had paused stays paused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum OutgoingState {
    /// Its memory is copied; the guest runs or is paused as its owner wants it.
    Copying,
    /// The guest is paused and stays so until a snapshot or core dump of it is written.
    Snapshot,
    /// A live snapshot has its state, and copies the memory that it had then. The guest runs or is paused
    /// as its owner wants it, and nothing that happens to it changes the snapshot.
    Imaged,
    /// The migration has stopped it.
    Stopped { ran: bool },
    /// Resources that only one machine can hold (locks, paths of sockets) were released.
    HandedOver { ran: bool },
    /// The engine failed behind that, and has no way to find out whether the guest runs at its destination.
    /// It must not run here again.
    Abandoned,
    /// The guest stays, and what was released could not be taken back, or the vCPUs did not start. It is
    /// paused; `resume` tries again from where this failed.
    Stranded { ran: bool, is_handed_over: bool },
}

impl OutgoingState {
    /// Whether the guest is stopped because it moves.
    fn is_stopped(self) -> bool {
        match self {
            Self::Copying | Self::Snapshot | Self::Imaged => false,
            Self::Stopped { .. }
            | Self::HandedOver { .. }
            | Self::Abandoned
            | Self::Stranded { .. } => true,
        }
    }

    /// Whether the guest ran and must run again if it stays.
    pub(super) fn must_resume(self) -> bool {
        match self {
            Self::Copying | Self::Snapshot | Self::Imaged | Self::Abandoned => false,
            Self::Stopped { ran } | Self::HandedOver { ran } | Self::Stranded { ran, .. } => ran,
        }
    }

    pub(super) fn is_handed_over(self) -> bool {
        match self {
            Self::Copying | Self::Snapshot | Self::Imaged | Self::Stopped { .. } => false,
            Self::HandedOver { .. } | Self::Abandoned => true,
            Self::Stranded { is_handed_over, .. } => is_handed_over,
        }
    }
}

impl Outgoing {
    /// Ends what needs the guest's machine, which is gone. A migration cannot go on with the next machine: its
    /// memory and devices are others.
    pub(super) fn interrupt(&self, code: &str, why: &str) {
        if self.state != OutgoingState::Imaged {
            // A request that ended the guest has canceled it before.
            let _ = self.decision.interrupt(Refusal::new(code, why));
        }
    }

    /// Says why the VM cannot be moved or saved, or its devices changed.
    pub(super) fn busy(&self) -> &'static str {
        match self.purpose {
            Purpose::Move => {
                "the VM's guest is moving to another service; cancel the migration first"
            }
            Purpose::Snapshot(_) => {
                "a snapshot of the VM is being written, or forks of it are made; cancel that first"
            }
            Purpose::CoreDump => "a core dump of the VM is being written; cancel that first",
        }
    }

    /// Why a request cannot be done while a snapshot or core dump is written, if it cannot.
    pub(super) fn refused_while_saving(&self, verb: Verb) -> Option<RequestError> {
        match verb {
            Verb::Reboot | Verb::Shutdown | Verb::Delete => {
                // Too late if the snapshot is complete, which is no reason to keep the machine.
                let _ = self.decision.cancel();
                None
            }
            // A live snapshot has copied all of the machine but its memory.
            _ if self.state == OutgoingState::Imaged => None,
            // The snapshot has the state and the devices of the paused guest.
            Verb::Resume
            | Verb::AddDevice
            | Verb::RemoveDevice
            | Verb::Resize
            | Verb::ResizeZone
            | Verb::ResizeDisk => Some(moving(self.busy())),
            Verb::MemoryMap
            | Verb::Cpu
            | Verb::Counters
            | Verb::Boot
            | Verb::Pause
            | Verb::PowerButton
            | Verb::Nmi => None,
        }
    }

    /// Whether the guest is stopped because it moves.
    pub(super) fn is_stopped(&self) -> bool {
        self.state.is_stopped()
    }

    /// Whether nobody knows where the guest runs.
    pub(super) fn is_abandoned(&self) -> bool {
        self.state == OutgoingState::Abandoned
    }

    /// Whether the guest stays and is paused because it lacks what it needs.
    pub(super) fn is_stranded(&self) -> bool {
        matches!(self.state, OutgoingState::Stranded { .. })
    }
}

/// The engine's hold on a guest that moves away or is saved. Dropping it frees the VM if nothing else has: the
/// operation could not begin, or panicked.
pub(crate) struct Departure {
    pub(super) caller: Caller,
    pub(super) mark: Arc<()>,
}

impl Drop for Departure {
    fn drop(&mut self) {
        let mark = Arc::clone(&self.mark);
        // Not waited for: what follows over this way comes behind it, and a driver may drop it itself.
        self.caller.send(move |driver, _| driver.abandon(&mark));
    }
}

impl Driver {
    /// Keeps a guest whose operation was given up without an end. One that was handed over stays paused, and
    /// can only be ended here: it may run at its destination.
    fn abandon(&mut self, mark: &Arc<()>) {
        let Some(outgoing) = &mut self.outgoing else {
            return;
        };
        if !Arc::ptr_eq(&outgoing.mark, mark) || outgoing.is_stranded() {
            return;
        }
        if outgoing.state.is_handed_over() {
            outgoing.state = OutgoingState::Abandoned;
            let detail = "the service failed when the guest was handed over, which may run at its \
                          destination: `shutdown` or `delete` ends it here"
                .to_owned();
            self.publisher.update(|status| {
                status.state = VmState::Paused;
                status.failure = Some(Failure {
                    code: "migration-failed".to_owned(),
                    detail: detail.clone(),
                    vcpu: None,
                });
            });
            return self.record("migration-failed", detail);
        }
        let event = match outgoing.purpose {
            Purpose::Move => "migration-failed",
            Purpose::Snapshot(_) => "snapshot-failed",
            Purpose::CoreDump => "core-dump-failed",
        };
        if let Err(error) = self.stay() {
            tracing::warn!(%error, "a guest that stays cannot resume");
        }
        self.record(event, "the service could not begin or finish it".to_owned());
    }
}

/// The reason for which a guest's state is taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Purpose {
    /// The guest moves to another service, and may run meanwhile.
    Move,
    /// A snapshot of it is written. A guest that is paused stays so; one that runs is stopped for a moment,
    /// unless the caller [demands](control::SnapshotOf) a paused guest.
    Snapshot(SnapshotOf),
    /// A core dump of it is written. It is paused, and stays so.
    CoreDump,
}

/// Adds what an operator can do to the reason of a refusal, where waiting may not help.
pub(super) fn with_advice(detail: &str, phase: Option<Phase>) -> String {
    let advice = match phase {
        Some(Phase::InDoubt) => {
            "its migration is in doubt, until the other side is back or an operator decides: \
             `wh-remote resolve-migration ID discard` ends the guest at this side, and `... run` runs it \
             here, if it runs nowhere else"
        }
        Some(Phase::PostcopyPaused) => {
            "its migration waits for the other side: if that does not come back, `wh-remote \
             resolve-migration ID discard` gives the guest up"
        }
        _ => return detail.to_owned(),
    };
    format!("{detail}; {advice} (`wh-remote migrations` lists the ID)")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refusals_name_the_way_out_of_a_stuck_migration() {
        for phase in [Phase::InDoubt, Phase::PostcopyPaused] {
            let told = with_advice("no", Some(phase));
            assert!(told.contains("resolve-migration ID discard"), "{told}");
        }
        for phase in [None, Some(Phase::Precopy), Some(Phase::Completed)] {
            assert_eq!(with_advice("no", phase), "no");
        }
    }
}
