//! VMs made from a snapshot, and forks: VMs made from a VM.

use std::ops::RangeInclusive;
use std::sync::Arc;
use std::time::Duration;

use control::{Category, Migration, Registry, RequestError, SnapshotOf, VmHandle};
use migration::snapshot::{Memory, Recorder, Restoring, Snapshot, restore};
use migration::{Offer, Refusal, Source as _};
use spec::{
    FieldProblem, ForkVm, MemoryRestoreMode, MigrationSide, Overrides, RecordWorkingSet,
    RestoreConfig, VmConfig, VmId, VmMemoryZoneUpdateData, fork_names,
};

use super::conflicts::check_forks;
use super::copies::{check_fork, offer_of};
use super::destination::{DestinationHost, GuestOrigin, record_failure};
use super::freeze::{CONTINUES, disks_to_freeze};
use super::snapshot::{LiveVm, path, save_paused, unusable};
use super::source::SourceVm;
use super::taps::GivenTaps;
use super::trust::Allowed;
use super::{ActiveMigration, offer, start};
use crate::driver::Purpose;
use crate::pool::Pool;

/// The VMs to make from a snapshot.
struct Children {
    names: Vec<VmId>,
    overrides: Overrides,
    taps: GivenTaps,
    zones: Vec<VmMemoryZoneUpdateData>,
    memory: Memory,
    verify: bool,
    resume: bool,
    /// Records the working set of the one VM.
    recorder: Option<Recorder>,
}

impl Children {
    /// Checks that the names are free.
    fn check_names(&self, registry: &Registry) -> Result<(), RequestError> {
        let mut names = self.names.iter();
        let Some(taken) = names.find(|name| registry.get(name.as_str()).is_ok()) else {
            return Ok(());
        };
        let detail = format!("there is a VM {:?} already", taken.as_str());
        Err(RequestError::new(Category::Conflict, "vm-exists", detail))
    }

    /// Returns the offers of their machines, which differ from the one that was saved by the overrides.
    fn offers(&self, saved: &Offer) -> Result<Vec<Offer>, RequestError> {
        let machine = offer::machine(saved).map_err(unusable)?;
        let mut zones = machine.config.memory.all_zones().into_iter();
        if self.memory != Memory::Copy && zones.any(|zone| zone.hugepages) {
            let detail = "memory of huge pages (`memory.hugepages`) cannot be restored OnDemand, \
                          mapped or forked: only `Copy` restores it";
            return Err(unusable(Refusal::new("not-mappable", detail)));
        }
        let offer = |(n, name): (u32, &VmId)| {
            let mut offer = saved.clone();
            name.as_str().clone_into(&mut offer.vm);
            let mut machine = machine.clone();
            if self.overrides != Overrides::default() || !self.zones.is_empty() {
                let updated = machine.config.memory.update_zones(&self.zones);
                updated.map_err(|found| RequestError::invalid(vec![found]))?;
                let applied = self.overrides.apply(n, &mut machine.config);
                applied.map_err(|found| RequestError::invalid(vec![found]))?;
                // The caller has made an image for this VM.
                let given = |id: &String| self.overrides.disks.iter().any(|disk| disk.id == *id);
                machine.frozen.retain(|id| !given(id));
                let text = serde_json::to_vec(&machine);
                let failed = |error: serde_json::Error| {
                    unusable(Refusal::new("offer-unreadable", error.to_string()))
                };
                offer.machine = text.map_err(failed)?.into();
            }
            // Before anything is done: the offer itself has no room for descriptors.
            self.taps.give(&mut machine.config).map_err(unusable)?;
            Ok(offer)
        };
        (1..).zip(&self.names).map(offer).collect()
    }

    /// Makes them, and writes the end into the report. The reason of a failure ends with `left`.
    fn make(
        &self,
        snapshot: &Snapshot,
        offers: Vec<Offer>,
        host: &DestinationHost,
        ours: &ActiveMigration,
        left: &str,
    ) {
        // The report has the failure, if it failed.
        let _ = restore(&Restoring {
            id: ours.id,
            snapshot,
            offers,
            memory: self.memory,
            verify: self.verify,
            host,
            resume: self.resume,
            recorder: self.recorder.as_ref(),
            left,
            arrived: &|| {
                ours.settled.send_replace(true);
            },
            progress: &ours.progress,
            decision: &ours.decision,
        });
    }
}

/// Starts to make a VM from a snapshot, or several.
pub(super) fn begin_restore(
    pool: &Pool,
    registry: &Registry,
    vm: &VmId,
    what: &RestoreConfig,
) -> Result<Arc<dyn Migration>, RequestError> {
    refuse_what_is_not_there(what)?;
    let names = match what.count {
        None => vec![vm.clone()],
        Some(count) => fork_names(vm, count).map_err(|found| RequestError::invalid(vec![found]))?,
    };
    let children = Children {
        names,
        overrides: what.overrides.clone().unwrap_or_default(),
        taps: GivenTaps::new(what.net_fds.as_ref()),
        zones: what.zone_updates.clone().unwrap_or_default(),
        memory: match what.memory_restore_mode {
            MemoryRestoreMode::Copy => Memory::Copy,
            MemoryRestoreMode::OnDemand => Memory::OnDemand,
            MemoryRestoreMode::Map => Memory::Map,
        },
        verify: what.verify,
        resume: what.resume,
        recorder: None,
    };
    let origin = GuestOrigin::Snapshot {
        prefault: what.prefault,
    };
    begin_children(pool, registry, vm, &what.source_url, children, origin)
}

/// Starts to make a VM from a snapshot, and to record its working set.
pub(super) fn begin_recording(
    pool: &Pool,
    registry: &Registry,
    vm: &VmId,
    what: &RecordWorkingSet,
) -> Result<Arc<dyn Migration>, RequestError> {
    const LIMIT_S: RangeInclusive<u32> = 1..=3600;
    if !LIMIT_S.contains(&what.limit_s) {
        let (limit, least, most) = (what.limit_s, LIMIT_S.start(), LIMIT_S.end());
        return Err(RequestError::invalid(vec![FieldProblem {
            pointer: "/limit_s".to_owned(),
            code: "invalid".to_owned(),
            detail: format!("`limit_s` ({limit}) must be {least} to {most}"),
        }]));
    }
    let limit = Duration::from_secs(what.limit_s.into());
    let children = Children {
        names: vec![vm.clone()],
        overrides: what.overrides.clone().unwrap_or_default(),
        taps: GivenTaps::default(),
        zones: Vec::new(),
        // Each touch of a page is a fault that the service sees.
        memory: Memory::OnDemand,
        verify: false,
        resume: true,
        recorder: Some(Recorder::new(limit)),
    };
    let origin = GuestOrigin::Snapshot { prefault: false };
    begin_children(pool, registry, vm, &what.source_url, children, origin)
}

/// Starts to make VMs from a snapshot.
fn begin_children(
    pool: &Pool,
    registry: &Registry,
    vm: &VmId,
    source_url: &str,
    children: Children,
    origin: GuestOrigin,
) -> Result<Arc<dyn Migration>, RequestError> {
    let dir = path("source_url", source_url)?;
    children.check_names(registry)?;
    let snapshot = Snapshot::open(&dir).map_err(|error| unusable(error.refusal()))?;
    let offers = children.offers(&offer_of(&snapshot).map_err(unusable)?)?;
    let url = source_url.to_owned();
    let (ours, host) = begin(pool, registry, &children, url, origin);
    let restoring = Arc::clone(&ours);
    let (id, registry) = (vm.clone(), registry.clone());
    let span = tracing::info_span!("vm", id = vm.as_str());
    start("restore", span, &restoring, move || {
        let manifest = snapshot.manifest();
        tracing::info!(
            restore = %ours.id, snapshot = %manifest.id, folder = ours.endpoint, from = manifest.vm,
            created_ms = manifest.created_ms, vms = offers.len(), memory = ?children.memory,
            "restore: begins"
        );
        registry.record(&id, "restoring", Some(format!("from {}", ours.endpoint)));
        children.make(&snapshot, offers, &host, &ours, "");
        if children.recorder.is_some() && *ours.settled.borrow() {
            // The VM is there, whatever became of the record.
            record_end(&ours, &registry, &id);
        } else {
            record_failure(&ours, &registry, &id, origin);
        }
        ours.log_end();
    })?;
    Ok(restoring)
}

/// Records what came of a recording.
fn record_end(ours: &ActiveMigration, registry: &Registry, vm: &VmId) {
    let report = ours.progress.report();
    match report.error {
        None => {
            let pages = report.working_set_pages.unwrap_or(0);
            let detail = format!("{pages} pages, for {}", ours.endpoint);
            registry.record(vm, "recorded", Some(detail));
        }
        Some(why) => registry.record(vm, "recording-failed", Some(why.detail)),
    }
}

fn refuse_what_is_not_there(what: &RestoreConfig) -> Result<(), RequestError> {
    let on_demand = what.memory_restore_mode == MemoryRestoreMode::OnDemand;
    let refused = if what.prefault && on_demand {
        "populate memory (`prefault`) that is restored OnDemand"
    } else if what.count.is_some() && on_demand {
        "make several VMs (`count`) OnDemand: use Map, which shares their memory, or Copy"
    } else if what.count.is_some() && !GivenTaps::new(what.net_fds.as_ref()).is_empty() {
        "make several VMs (`count`) with the same taps (`net_fds`): name a tap for each (`overrides.net`)"
    } else {
        return Ok(());
    };
    let detail = format!("this version cannot {refused}");
    let code = "not-supported";
    Err(RequestError::new(Category::Unsupported, code, detail))
}

/// The operation that makes VMs, and the maker of their machines.
fn begin(
    pool: &Pool,
    registry: &Registry,
    children: &Children,
    endpoint: String,
    origin: GuestOrigin,
) -> (Arc<ActiveMigration>, DestinationHost) {
    let one = match &children.names[..] {
        [one] => Some(one.clone()),
        _ => None,
    };
    let ours = ActiveMigration {
        recorder: children.recorder.clone(),
        ..ActiveMigration::new(MigrationSide::Destination, one, endpoint)
    };
    *ours.makes.lock() = children.names.clone();
    let ours = Arc::new(ours);
    // Whoever asks may create a VM with any configuration, so the snapshot's may be any too.
    let host = DestinationHost::new(
        pool,
        registry.clone(),
        Arc::clone(&ours),
        Allowed::all(),
        origin,
    )
    .with_taps(children.taps.clone());
    (ours, host)
}

/// Starts to make VMs from a VM: all are mapped from one copy of its memory. A running guest stops for
/// its device state only.
pub(super) fn begin_fork(
    pool: &Pool,
    registry: &Registry,
    vm: &VmHandle,
    what: &ForkVm,
) -> Result<Arc<dyn Migration>, RequestError> {
    check_fork(what.disks)?;
    let id = vm.id().clone();
    let names = fork_names(what.name.as_ref().unwrap_or(&id), what.count);
    let children = Children {
        names: names.map_err(|found| RequestError::invalid(vec![found]))?,
        overrides: what.overrides.clone(),
        taps: GivenTaps::default(),
        zones: Vec::new(),
        memory: Memory::Map,
        verify: false,
        resume: what.resume,
        recorder: None,
    };
    children.check_names(registry)?;
    let origin = GuestOrigin::Snapshot { prefault: false };
    let (ours, host) = begin(pool, registry, &children, format!("fork:{id}"), origin);
    let caller = pool.caller(&id).ok_or_else(RequestError::driver_gone)?;
    let of = SnapshotOf::PausedOrRunning;
    let (decision, progress) = (ours.decision.clone(), ours.progress.clone());
    let parts = caller
        .call(move |driver, _| driver.depart(Purpose::Snapshot(of), &decision, &progress))
        .map_err(|_| RequestError::driver_gone())??;
    let (is_paused, config) = (parts.is_paused, Arc::clone(&parts.config));
    let frozen = disks_to_freeze(&config, what.disks);
    let has_frozen = !frozen.is_empty();
    let mut source = SourceVm::new(id.clone(), parts).freezing(frozen.clone());
    let disks = source.freeze(ours.id);
    // The guest stays as it is if the request cannot be met.
    let offers = source
        .offer()
        .map_err(|why| RequestError::new(Category::Conflict, &why.code, why.detail))
        .and_then(|saved| {
            let offers = children.offers(&saved)?;
            if !is_paused && !has_frozen {
                no_disk_is_written(&config)?;
            }
            check_forks((&id, &config), &frozen, &offers, registry, pool.host())
                .map_err(unusable)?;
            Ok((offers, saved))
        });
    let (offers, saved) = offers.inspect_err(|error| {
        source.end("fork-failed", error.detail.clone());
    })?;
    let forking = Arc::clone(&ours);
    let span = tracing::info_span!("vm", id = id.as_str());
    start("fork", span, &forking, move || {
        tracing::info!(
            fork = %ours.id, vm = id.as_str(), vms = offers.len(), live = !is_paused, "fork: begins"
        );
        let ending = source.ending();
        let end = |outcome: Result<(), &Refusal>| {
            // First: behind the end the VM may be resumed.
            let more = disks.finish(outcome.is_ok());
            match outcome {
                // From here on the guest is free: its forks have a copy.
                Ok(()) => ending.end("forked", format!("{} VMs", offers.len())),
                Err(why) => ending.end("fork-failed", format!("{}{more}", why.detail)),
            }
            more
        };
        let (progress, decision) = (&ours.progress, &ours.decision);
        let captured = if is_paused {
            let saved = save_paused(&mut source, saved, &disks);
            Snapshot::capture(saved, end, progress, decision)
        } else {
            let mut guest = LiveVm {
                source,
                disks: &disks,
            };
            Snapshot::capture_live(&mut guest, end, progress, decision)
        };
        // The report has the failure, if it failed.
        if let Ok(snapshot) = captured {
            let left = if has_frozen { CONTINUES } else { "" };
            children.make(&snapshot, offers, &host, &ours, left);
        }
        ours.log_end();
    })?;
    Ok(forking)
}

/// A running VM goes on writing to its disks while its forks are made, so that no image holds what the
/// forks left there.
fn no_disk_is_written(config: &VmConfig) -> Result<(), RequestError> {
    let mut disks = config.disks.iter().flatten();
    let Some(disk) = disks.find(|disk| !disk.readonly) else {
        return Ok(());
    };
    let name = disk.id.as_deref().unwrap_or("");
    let detail = format!(
        "the disk {name} is written while the VM runs, so that its forks could not have it as it was \
         at their moment: fork with `disks` set to `Overlay`, pause the VM, or make the disk \
         readonly"
    );
    Err(RequestError::new(
        Category::Conflict,
        "disk-written",
        detail,
    ))
}
