//! Snapshots of a VM: migrations whose other end is a folder.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use control::{Category, Migration, RequestError, SnapshotOf, VmHandle};
use migration::snapshot::{
    CopiedDisks, RunningGuest, Saved, Snapshot, Writing, merge, write, write_live,
};
use migration::{Block, Offer, Refusal, Source as _, Stopped};
use parking_lot::Mutex;
use spec::{
    FieldProblem, MergeSnapshots, MigrationSide, SnapshotDisks, VmConfig, VmSnapshotConfig,
};

use super::copies::{self, DiskCopies, offer_of};
use super::freeze::{DiskFreeze, disks_to_freeze, images_of};
use super::overlays::SnapshotRecords;
use super::source::SourceVm;
use super::{ActiveMigration, offer, start};
use crate::descriptors::{self, Reservation};
use crate::driver::{Purpose, SourceParts};
use crate::pool::Pool;

/// Returns the folder or file that a URL names.
pub(super) fn path(field: &str, url: &str) -> Result<PathBuf, RequestError> {
    let path = url.strip_prefix("file://").map(PathBuf::from);
    path.filter(|path| path.is_absolute()).ok_or_else(|| {
        RequestError::invalid(vec![FieldProblem {
            pointer: format!("/{field}"),
            code: "invalid".to_owned(),
            detail: format!("{url:?} is not of the form file:///absolute/path"),
        }])
    })
}

/// Returns the configuration in the snapshot at a `file://` URL. The snapshot's files are checked, the
/// values of the configuration are not. Disks of which the snapshot has copies name these.
///
/// # Errors
/// The URL names no folder, or the folder holds no snapshot that this version reads.
pub fn snapshot_config(url: &str) -> Result<VmConfig, RequestError> {
    let dir = path("source_url", url)?;
    let snapshot = open(&dir)?;
    let offer = offer_of(&snapshot).map_err(unusable)?;
    Ok(offer::machine(&offer).map_err(unusable)?.config)
}

pub(super) fn unusable(why: Refusal) -> RequestError {
    RequestError::new(Category::Unprocessable, &why.code, why.detail)
}

fn open(dir: &Path) -> Result<Snapshot, RequestError> {
    Snapshot::open(dir).map_err(|error| unusable(error.refusal()))
}

/// A running guest, for a live snapshot or forks.
pub(super) struct LiveVm<'a> {
    pub(super) source: SourceVm,
    pub(super) disks: &'a DiskFreeze,
}

impl RunningGuest for LiveVm<'_> {
    fn offer(&mut self) -> Result<Offer, Refusal> {
        // While the guest runs: creating files takes time.
        self.disks.create()?;
        self.source.offer()
    }

    fn blocks(&self) -> Vec<Block> {
        self.source.blocks()
    }

    fn stop(&mut self) -> Result<Stopped, Refusal> {
        self.source.stop_to_image()
    }

    fn save(&mut self) -> Result<Vec<u8>, Refusal> {
        let state = self.source.save()?;
        self.disks.switch()?;
        Ok(state)
    }

    fn resume(&mut self) -> Result<(), Refusal> {
        self.disks.keep();
        self.source.resume_imaged()
    }

    fn resumed(&mut self) {
        // The guest writes to the overlays: nothing else may write to the images from here on, also if this
        // process ends. Tried again when the snapshot is complete, and fails it there.
        if let Err(why) = self.disks.mark() {
            tracing::warn!(%why, "images below the VM's overlays are not marked as frozen yet");
        }
    }

    fn resume_copying(&mut self) -> Result<(), Refusal> {
        self.source.resume_copying()
    }

    fn sync(&mut self) {
        self.source.pre_sync();
    }
}

/// Writes the snapshot of a guest that its owner has paused.
fn write_paused(
    writing: &Writing<'_>,
    source: &mut SourceVm,
    disks: &DiskFreeze,
) -> Result<(), Refusal> {
    write(writing, || {
        let offer = source.offer()?;
        save_paused(source, offer, disks)
    })
}

/// Saves a paused guest. Its disks belong to what is saved: all that the guest wrote is on them.
pub(super) fn save_paused(
    source: &mut SourceVm,
    offer: Offer,
    disks: &DiskFreeze,
) -> Result<Saved, Refusal> {
    disks.create()?;
    source.flush()?;
    let saved = Saved {
        offer,
        state: source.save()?,
        stopped_at: source.clocks_stopped_at()?,
        blocks: source.blocks(),
    };
    // The guest stays paused until the snapshot is complete, so that this can be undone.
    disks.switch()?;
    Ok(saved)
}

/// Starts to write a snapshot of a VM. A running guest stops for its device state only.
pub(super) fn take(
    pool: &Pool,
    vm: &VmHandle,
    what: &VmSnapshotConfig,
    of: SnapshotOf,
) -> Result<Arc<dyn Migration>, RequestError> {
    let dir = path("destination_url", &what.destination_url)?;
    let policy = copies::policy(what)?;
    let base = match &what.base_url {
        Some(url) => Some(open(&path("base_url", url)?)?),
        None => None,
    };
    let id = vm.id().clone();
    let endpoint = what.destination_url.clone();
    let max_downtime = u64::try_from(policy.max_downtime.as_millis()).unwrap_or(u64::MAX);
    let taking = Arc::new(ActiveMigration {
        max_downtime_ms: (what.disks == SnapshotDisks::Copy).then_some(max_downtime),
        ..ActiveMigration::new(MigrationSide::Source, Some(id.clone()), endpoint)
    });
    let caller = pool.caller(&id).ok_or_else(RequestError::driver_gone)?;
    let (decision, progress) = (taking.decision.clone(), taking.progress.clone());
    let parts = caller
        .call(move |driver, _| driver.depart(Purpose::Snapshot(of), &decision, &progress))
        .map_err(|_| RequestError::driver_gone())??;
    let (ours, disks) = (Arc::clone(&taking), what.disks);
    let config = Arc::clone(&parts.config);
    let frozen = disks_to_freeze(&config, disks);
    let copied = prepare_copies(pool, &parts, disks);
    let is_paused = parts.is_paused;
    let memory_bytes = parts.ram.plugged_len();
    let mut source = SourceVm::new(id.clone(), parts).freezing(frozen);
    let (copies, reserved) = copied.map_err(|why| {
        source.end("snapshot-failed", why.detail.clone());
        RequestError::new(Category::Conflict, &why.code, why.detail)
    })?;
    let needed = Arc::new(copies::without(&config, &copies.names()));
    let span = tracing::info_span!("vm", id = id.as_str());
    start("snapshot", span, &taking, move || {
        tracing::info!(
            snapshot = %ours.id, vm = id.as_str(), folder = ours.endpoint, memory_bytes,
            live = !is_paused, copied_disks = copies.count(), "snapshot: begins"
        );
        let ending = source.ending();
        let disks = source.freeze(ours.id);
        let disks = disks.for_snapshot(needed, ours.endpoint.clone());
        let start_tracking = || copies.start();
        let writing = Writing {
            id: ours.id,
            dir: &dir,
            base: base.as_ref(),
            disks: (copies.count() > 0).then(|| CopiedDisks {
                disks: copies.for_engine(),
                start_tracking: &start_tracking,
                policy: &policy,
            }),
            sealing: &|| disks.mark(),
            end: &|outcome| {
                // First: behind the end the VM may be resumed, and its disks be mirrored.
                copies.stop();
                let more = disks.finish(outcome.is_ok());
                match outcome {
                    Ok(()) => ending.end("snapshotted", ours.endpoint.clone()),
                    Err(why) => ending.end("snapshot-failed", format!("{}{more}", why.detail)),
                }
                more
            },
            progress: &ours.progress,
            decision: &ours.decision,
        };
        // The report has the failure, if it failed.
        let _ = if is_paused {
            write_paused(&writing, &mut source, &disks)
        } else {
            let disks = &disks;
            write_live(&writing, &mut LiveVm { source, disks })
        };
        ours.log_end();
        drop(reserved);
    })?;
    Ok(taking)
}

/// Returns the disks to copy, and the descriptors of their images.
fn prepare_copies(
    pool: &Pool,
    parts: &SourceParts,
    what: SnapshotDisks,
) -> Result<(DiskCopies, Vec<Arc<Reservation>>), Refusal> {
    let copies = DiskCopies::of(&parts.config, &parts.disks, what)?;
    let count = descriptors::of_new_images(copies.count());
    let reserved = pool.host().descriptors.reserve(count, None);
    let reserved =
        reserved.map_err(|error| Refusal::new("too-few-descriptors", error.to_string()))?;
    Ok((copies, reserved))
}

/// Starts to write a snapshot that needs no base from a chain of increments. No VM is involved.
pub(super) fn merge_chain(
    what: &MergeSnapshots,
    image_dirs: &[PathBuf],
) -> Result<Arc<dyn Migration>, RequestError> {
    let dir = path("destination_url", &what.destination_url)?;
    let chain = open(&path("source_url", &what.source_url)?)?;
    let url = what.destination_url.clone();
    let merging = Arc::new(ActiveMigration::new(MigrationSide::Source, None, url));
    // The images below the VM are those of the chain, and needed as long as one of both snapshots is there.
    let machine = offer::machine(&chain.offer()).map_err(unusable)?;
    let copied = chain.manifest().disks.iter();
    let copied: Vec<_> = copied.map(|disk| disk.name.clone()).collect();
    let mut config = copies::without(&machine.config, &copied);
    let images = images_of(&mut config, &machine.frozen, image_dirs);
    let config = copies::without(&config, &machine.frozen);
    let mut records =
        SnapshotRecords::write(&config, merging.id, &merging.endpoint).map_err(unusable)?;
    let marked = records.freeze(&images, merging.id, &merging.endpoint);
    marked.map_err(unusable)?;
    let records = Mutex::new(records);
    let ours = Arc::clone(&merging);
    let span = tracing::info_span!("merge", folder = merging.endpoint);
    start("snapshot", span, &merging, move || {
        let manifest = chain.manifest();
        tracing::info!(
            merge = %ours.id, snapshot = %manifest.id, from = manifest.vm, "merge: begins"
        );
        let writing = Writing {
            id: ours.id,
            dir: &dir,
            base: None,
            disks: None,
            sealing: &|| Ok(()),
            end: &|outcome| {
                let records = std::mem::take(&mut *records.lock());
                if outcome.is_ok() {
                    records.keep();
                }
                ""
            },
            progress: &ours.progress,
            decision: &ours.decision,
        };
        // The report has the failure, if it failed.
        let _ = merge(&writing, &chain);
        ours.log_end();
    })?;
    Ok(merging)
}
