//! Restoring: a guest that comes from a snapshot, or many that come from one.
//!
//! All machines are made and loaded before the first guest runs. If one cannot be made, none is left.

use uuid::Uuid;

use super::read::{RestoreError, Snapshot};
use super::{conclude, on_demand};
use crate::MigrationError;
use crate::decision::Decision;
use crate::destination::{Destination, Host, StartFailure};
use crate::message::{Offer, Refusal};
use crate::progress::{Phase, Progress};

/// How a guest gets its memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Memory {
    /// All of it is copied before the guest runs.
    Copy,
    /// Pages are read when the guest touches them, and the others meanwhile.
    OnDemand,
    /// The memory is a private view of the file: pages that the guest does not write are those of the
    /// host's page cache.
    Map,
}

/// Parameters of a restore.
pub struct Restoring<'a> {
    /// Identifies the operation.
    pub id: Uuid,
    /// The snapshot.
    pub snapshot: &'a Snapshot,
    /// The offer of its machine for each VM that is made: with the VM's name, and with what differs from
    /// the machine that was saved.
    pub offers: Vec<Offer>,
    /// How the guest gets its memory.
    pub memory: Memory,
    /// Checks all of the memory before the guest runs, where the mode would not.
    pub verify: bool,
    /// Makes the machines.
    pub host: &'a dyn Host,
    /// Whether the guests run afterwards. If not, they are paused.
    pub resume: bool,
    /// Called when the VM is there, if pages of its memory are still missing.
    pub arrived: &'a (dyn Fn() + Sync),
    /// Receives the progress report.
    pub progress: &'a Progress,
    /// Carries the cancel request.
    pub decision: &'a Decision,
}

/// Makes the machines, loads the snapshot into them, and resumes the guests if that is wanted.
///
/// # Errors
/// A machine cannot be made, the snapshot is damaged, or restoring was canceled. The report says the
/// same, and all machines are gone. If a guest cannot be started, those that were started before stay. A
/// guest on demand of whose memory a page cannot be read has [failed](Destination::fail).
pub fn restore(restoring: &Restoring<'_>) -> Result<(), Refusal> {
    restoring.progress.enter(Phase::Preparing);
    conclude(restoring.progress, restore_all(restoring))
}

fn restore_all(restoring: &Restoring<'_>) -> Result<(), MigrationError> {
    let Restoring {
        snapshot,
        progress,
        decision,
        ..
    } = restoring;
    match (restoring.memory, &restoring.offers[..]) {
        (Memory::OnDemand, [offer]) => {
            let mut offer = offer.clone();
            offer.postcopy = true;
            let prepared = restoring.host.prepare(restoring.id, &offer, Vec::new());
            let mut machine = prepared.map_err(MigrationError::Here)?;
            progress.enter(Phase::Stopped);
            return on_demand::restore(restoring, &mut *machine);
        }
        (Memory::OnDemand, _) => {
            let why = "memory on demand is for one VM; several are copied or mapped";
            return Err(MigrationError::here("not-supported", why));
        }
        (Memory::Map, _) if restoring.verify => {
            // Before there is a machine: nothing else would notice a damaged page.
            snapshot.verify(progress, decision).map_err(failed)?;
        }
        (Memory::Map | Memory::Copy, _) => {}
    }
    let mut machines = Machines(Vec::new());
    for offer in &restoring.offers {
        if decision.is_canceled() {
            return Err(MigrationError::Canceled);
        }
        let made = prepare(restoring, offer, &mut machines);
        made.map_err(|error| named(restoring, &offer.vm, error))?;
    }
    // From here on a cancel comes too late: the guests may run.
    if !decision.commit() {
        return Err(MigrationError::Canceled);
    }
    progress.enter(Phase::HandingOver);
    while let Some((vm, machine)) = machines.0.last_mut() {
        let started = start(restoring, &mut **machine);
        started.map_err(|error| named(restoring, vm, error))?;
        // Not discarded any more.
        machines.0.pop();
    }
    Ok(())
}

/// Machines that were made, with the names of their VMs. Those that are left when it is dropped go.
struct Machines(Vec<(String, Box<dyn Destination>)>);

impl Drop for Machines {
    fn drop(&mut self) {
        for (_, machine) in &mut self.0 {
            machine.discard();
        }
    }
}

/// Makes one of the machines, and loads it.
fn prepare(
    restoring: &Restoring<'_>,
    offer: &Offer,
    machines: &mut Machines,
) -> Result<(), MigrationError> {
    let snapshot = restoring.snapshot;
    let mut offer = offer.clone();
    let mut files = Vec::new();
    if restoring.memory == Memory::Map {
        offer.given = true;
        for _ in &offer.blocks {
            files.push(snapshot.memory().map_err(failed)?);
        }
    }
    let made = restoring.host.prepare(restoring.id, &offer, files);
    machines
        .0
        .push((offer.vm, made.map_err(MigrationError::Here)?));
    let Some((_, machine)) = machines.0.last_mut() else {
        return Ok(());
    };
    restoring.progress.enter(Phase::Stopped);
    let blocks = machine.blocks();
    let filled = match restoring.memory {
        Memory::Map => snapshot.check_blocks(&blocks),
        Memory::Copy | Memory::OnDemand => {
            snapshot.fill(&blocks, restoring.progress, restoring.decision)
        }
    };
    filled.map_err(failed)?;
    load(restoring, &mut **machine)
}

/// Says which of several VMs it is that fails.
fn named(restoring: &Restoring<'_>, vm: &str, error: MigrationError) -> MigrationError {
    match error {
        MigrationError::Here(why) if restoring.offers.len() > 1 => {
            MigrationError::here(&why.code, format!("VM {vm}: {}", why.detail))
        }
        other => other,
    }
}

pub(super) fn failed(error: RestoreError) -> MigrationError {
    match error {
        RestoreError::Canceled => MigrationError::Canceled,
        other => MigrationError::Here(other.refusal()),
    }
}

/// Loads the state of vCPUs and devices into a machine that has its memory.
pub(super) fn load(
    restoring: &Restoring<'_>,
    machine: &mut dyn Destination,
) -> Result<(), MigrationError> {
    machine
        .load(restoring.snapshot.state())
        .and_then(|()| machine.take_over())
        .map_err(MigrationError::Here)
}

pub(super) fn start(
    restoring: &Restoring<'_>,
    machine: &mut dyn Destination,
) -> Result<(), MigrationError> {
    // The guest's clocks count the time since the snapshot, so that its time of day is right. A guest with
    // a kvmclock is told that it was stopped, for the sake of its watchdogs.
    let stopped_for = restoring.snapshot.manifest().stopped_for();
    let started = machine.start(stopped_for, !restoring.resume);
    started.map(|_| ()).map_err(|failure| match failure {
        StartFailure::NeverRan(why) | StartFailure::MayHaveRun(why) => MigrationError::Here(why),
    })
}
