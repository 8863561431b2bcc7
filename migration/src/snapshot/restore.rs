//! Restoring: a guest that comes from a snapshot, or many that come from one.
//!
//! All machines are made and loaded before the first guest runs. If one cannot be made, none is left.

use std::thread;

use parking_lot::Mutex;
use uuid::Uuid;

use super::read::{RestoreError, Snapshot};
use super::record::Recorder;
use super::{conclude_with, on_demand, prefetch};
use crate::MigrationError;
use crate::decision::Decision;
use crate::destination::{Destination, Host, StartFailure};
use crate::message::{Offer, Refusal};
use crate::pages::Block;
use crate::progress::{Phase, Progress};
use crate::threads::in_span;

/// Machines that are made or started at the same time. A host with few CPUs has use for them, too: KVM
/// waits some milliseconds for a grace period of the kernel at each memslot and interrupt route, in which
/// no CPU works for this process.
const AT_ONCE: usize = 8;

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
    /// Records the working set of a guest on demand.
    pub recorder: Option<&'a Recorder>,
    /// Added to the reason of a failure: what the failure leaves that an operator should know.
    pub left: &'a str,
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
    conclude_with(restoring.progress, restore_all(restoring), restoring.left)
}

fn restore_all(restoring: &Restoring<'_>) -> Result<(), MigrationError> {
    let Restoring {
        snapshot,
        progress,
        decision,
        ..
    } = restoring;
    // Before there is a machine. `Copy` reads all of the snapshot before the guest runs; the other modes
    // exist so that the guest need not wait for that.
    if restoring.memory == Memory::Copy || restoring.verify {
        snapshot
            .verify_disks(decision)
            .map_err(MigrationError::from)?;
    }
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
            snapshot
                .verify(progress, decision)
                .map_err(MigrationError::from)?;
        }
        (Memory::Map | Memory::Copy, _) => {}
    }
    match snapshot.working_set() {
        Some(set) if restoring.memory == Memory::Map => prefetch::beside(restoring, set, make_all),
        _ => make_all(restoring, &|_| ()),
    }
}

/// Makes, loads and starts all machines. `made` gets the memory of each before it is loaded.
fn make_all(
    restoring: &Restoring<'_>,
    made: &(dyn Fn(&[Block]) + Sync),
) -> Result<(), MigrationError> {
    let decision = restoring.decision;
    let at_once = match restoring.memory {
        Memory::Map => AT_ONCE,
        // Limited by the speed of memory. One after another, so that a cancel leaves less half-done.
        Memory::Copy | Memory::OnDemand => 1,
    };
    let machines = for_each(at_once, restoring.offers.iter(), |offer| {
        if decision.is_canceled() {
            return Err(MigrationError::Canceled);
        }
        prepare(restoring, offer, made).map_err(|error| named(restoring, &offer.vm, error))
    })?;
    // From here on a cancel comes too late: the guests may run.
    if !decision.commit() {
        return Err(MigrationError::Canceled);
    }
    restoring.progress.enter(Phase::HandingOver);
    for_each(AT_ONCE, machines.into_iter(), |mut made| {
        let started = start(restoring, &mut *made.machine);
        started.map_err(|error| named(restoring, &made.vm, error))?;
        made.is_started = true;
        Ok(())
    })?;
    Ok(())
}

/// A machine that was made. If it is dropped before its guest was started, nothing of it stays.
struct Made {
    /// The name of its VM.
    vm: String,
    machine: Box<dyn Destination>,
    is_started: bool,
}

impl Drop for Made {
    fn drop(&mut self) {
        if !self.is_started {
            self.machine.discard();
        }
    }
}

/// Works on each item, on up to `at_once` threads, of which this is one. After an error no further item is
/// begun, and those that are left are dropped. Returns the results in no order, or the error of the first
/// item that has one.
fn for_each<T: Send, R: Send>(
    at_once: usize,
    items: impl ExactSizeIterator<Item = T> + Send,
    work: impl Fn(T) -> Result<R, MigrationError> + Sync,
) -> Result<Vec<R>, MigrationError> {
    let others = at_once.min(items.len()).saturating_sub(1);
    let items = Mutex::new(items.enumerate());
    let done = Mutex::new(Vec::new());
    let failed: Mutex<Option<(usize, MigrationError)>> = Mutex::new(None);
    let work_on = || {
        while failed.lock().is_none() {
            // In a statement of its own: the lock must not be held for the work.
            let next = items.lock().next();
            let Some((index, item)) = next else { return };
            match work(item) {
                Ok(result) => done.lock().push(result),
                Err(error) => {
                    let mut failed = failed.lock();
                    if failed.as_ref().is_none_or(|(first, _)| index < *first) {
                        *failed = Some((index, error));
                    }
                }
            }
        }
    };
    thread::scope(|scope| {
        for _ in 0..others {
            let thread = thread::Builder::new().name("restore".to_owned());
            if thread.spawn_scoped(scope, in_span(&work_on)).is_err() {
                // The threads that there are do all of the work.
                break;
            }
        }
        work_on();
    });
    match failed.into_inner() {
        Some((_, error)) => Err(error),
        None => Ok(done.into_inner()),
    }
}

/// Makes one of the machines, and loads it.
fn prepare(
    restoring: &Restoring<'_>,
    offer: &Offer,
    has_memory: &(dyn Fn(&[Block]) + Sync),
) -> Result<Made, MigrationError> {
    let snapshot = restoring.snapshot;
    let mut offer = offer.clone();
    let mut files = Vec::new();
    if restoring.memory == Memory::Map {
        offer.given = true;
        for _ in &offer.blocks {
            files.push(snapshot.memory().map_err(MigrationError::from)?);
        }
    }
    let machine = restoring.host.prepare(restoring.id, &offer, files);
    let mut made = Made {
        vm: offer.vm,
        machine: machine.map_err(MigrationError::Here)?,
        is_started: false,
    };
    restoring.progress.enter(Phase::Stopped);
    let blocks = made.machine.blocks();
    let filled = match restoring.memory {
        Memory::Map => snapshot.check_blocks(&blocks),
        Memory::Copy | Memory::OnDemand => {
            snapshot.fill(&blocks, restoring.progress, restoring.decision)
        }
    };
    filled.map_err(MigrationError::from)?;
    has_memory(&blocks);
    load(restoring, &mut *made.machine)?;
    Ok(made)
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

impl From<RestoreError> for MigrationError {
    fn from(error: RestoreError) -> Self {
        match error {
            RestoreError::Canceled => Self::Canceled,
            other => Self::Here(other.refusal()),
        }
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
    started.map_err(|failure| match failure {
        StartFailure::NeverRan(why) | StartFailure::MayHaveRun(why) => MigrationError::Here(why),
    })?;
    if restoring.resume {
        let elapsed = restoring.progress.elapsed_us();
        // Of several guests the last counts.
        restoring
            .progress
            .update(|report| report.first_instruction_us = Some(elapsed));
    }
    Ok(())
}
