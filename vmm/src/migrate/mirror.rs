//! Mirrors of disks: copies on which the disks continue, shown as migrations whose other end is a file.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use control::{Category, Migration, RequestError, VmHandle};
use migration::{
    DestinationDisk, Downtime, Finish, MirroredDisk, Mirroring, Policy, Refusal, mirror,
};
use parking_lot::Mutex;
use spec::{MigrationSide, MirrorDisk, NewImageFormat};
use uuid::Uuid;
use virtio_devices::block::{CreatedImage, DiskAccess};

use super::copies::rounds_policy;
use super::storage::{CopiedDisk, CopiedFormat, NewImages, plan_mirror, pre_sync};
use super::{ActiveMigration, invalid, start};
use crate::descriptors;
use crate::driver::{Caller, Driver, ListedMirror, MirrorParts, NewMirror, Successor};
use crate::pool::Pool;

/// Added to the path of the new image for as long as the disk does not continue on it.
const PARTIAL: &str = ".partial";

/// Returns the path of the new image, and its path until the switch.
fn paths(what: &MirrorDisk) -> Result<[PathBuf; 2], RequestError> {
    let path = PathBuf::from(&what.path);
    if !path.is_absolute() || path.file_name().is_none() || what.path.ends_with('/') {
        let detail = format!(
            "`path` ({:?}) must be the absolute path of a file",
            what.path
        );
        return Err(invalid("path", detail));
    }
    let partial = PathBuf::from(format!("{}{PARTIAL}", what.path));
    Ok([path, partial])
}

/// Returns the error of a request whose new image cannot be made.
fn not_made(why: Refusal) -> RequestError {
    let category = match why.code.as_str() {
        "image-exists" => Category::Conflict,
        "storage-short" => Category::Host,
        _ => Category::Unprocessable,
    };
    RequestError::new(category, &why.code, why.detail)
}

/// The new images to which this service mirrors disks, and what writes each.
#[derive(Clone, Default)]
pub(crate) struct MirrorTargets(Arc<Mutex<BTreeMap<PathBuf, String>>>);

/// A path to which a mirror writes, until this is dropped.
struct Target {
    all: MirrorTargets,
    path: PathBuf,
}

impl MirrorTargets {
    /// Takes a path for a mirror.
    ///
    /// # Errors
    /// Another mirror has it, which the refusal names.
    fn take(&self, path: &Path, mirror: String) -> Result<Target, Refusal> {
        // Its folder as the host knows it, for the path may be written in several ways.
        let folder = path.parent().and_then(|folder| folder.canonicalize().ok());
        let real = folder.and_then(|folder| Some(folder.join(path.file_name()?)));
        let real = real.unwrap_or_else(|| path.to_owned());
        match self.0.lock().entry(real.clone()) {
            Entry::Occupied(taken) => {
                let detail = format!(
                    "{} is being written by the mirror of {}: choose another path, or wait until \
                     that migration ends, or cancel it",
                    path.display(),
                    taken.get()
                );
                Err(Refusal::new("image-exists", detail))
            }
            Entry::Vacant(free) => {
                free.insert(mirror);
                Ok(Target {
                    all: self.clone(),
                    path: real,
                })
            }
        }
    }
}

impl Drop for Target {
    fn drop(&mut self) {
        self.all.0.lock().remove(&self.path);
    }
}

/// A disk that is mirrored, and its new image.
struct MirroredVmDisk {
    mirror: Uuid,
    caller: Caller,
    listed: Option<ListedMirror>,
    id: String,
    access: DiskAccess,
    copied: CopiedDisk,
    /// The format of the new image.
    format: CopiedFormat,
    /// The request named no format.
    keeps_format: bool,
    target: PathBuf,
    images: NewImages,
}

impl MirroredVmDisk {
    /// Makes the new image.
    fn new(
        mirror: Uuid,
        parts: MirrorParts,
        what: &MirrorDisk,
        [target, partial]: [PathBuf; 2],
    ) -> Result<Self, Refusal> {
        let id = parts.config.id.clone().unwrap_or_default();
        let copied = CopiedDisk::of(&id, &parts.access)?;
        let format = match what.format {
            None => copied.format(),
            Some(NewImageFormat::Raw) => CopiedFormat::Raw,
            Some(NewImageFormat::Qcow2) => CopiedFormat::Qcow2,
        };
        let planned = plan_mirror(&parts.config, copied.content(), format, &target, &partial)?;
        Ok(Self {
            mirror,
            caller: parts.caller,
            listed: Some(parts.listed),
            id,
            access: parts.access,
            copied,
            format,
            keeps_format: what.format.is_none(),
            images: NewImages::create(&[planned])?,
            target,
        })
    }

    fn record(&self, event: &'static str, detail: String) {
        let _ = self
            .caller
            .call(move |driver, _| driver.record(event, detail));
    }

    /// Copies the disk, and has it continue on the new image.
    fn run(mut self, ours: &ActiveMigration, policy: &Policy, target: Target) {
        let Some((to, _)) = self.images.of_mirror() else {
            return;
        };
        let from = self.copied.for_engine();
        tracing::info!(
            mirror = %ours.id,
            disk = self.id,
            file = ours.endpoint,
            disk_bytes = from.size,
            allocated_bytes = self.copied.content().allocated(),
            "mirror: begins"
        );
        let mirroring = Mirroring {
            id: ours.id,
            from,
            to,
            policy,
            progress: &ours.progress,
            decision: &ours.decision,
        };
        // The report has the failure, if it failed.
        let _ = mirror(&mirroring, &mut self);
        // Free before anyone hears so.
        drop(target);
        ours.log_end();
    }
}

impl MirroredDisk for MirroredVmDisk {
    fn start_tracking(&mut self) -> Result<(), Refusal> {
        self.copied.start()
    }

    fn switch(&mut self, finish: Finish) -> Result<Downtime, Refusal> {
        let made: Option<(DestinationDisk, Arc<CreatedImage>)> = self.images.of_mirror();
        let Some((_, image)) = made else {
            return Err(Refusal::new("internal", "the mirror has no image"));
        };
        let to = Successor {
            mirror: self.mirror,
            disk: self.id.clone(),
            image,
            path: self.target.clone(),
            image_type: self.format.config(),
            keeps_format: self.keeps_format,
        };
        // The image that the disk leaves is flushed in the switch, too, with little left to write.
        pre_sync(&self.id, &self.access);
        self.caller
            .attempt_later(move |driver: &mut Driver, answer| {
                driver.switch_disk(to, finish, answer);
            })
    }

    fn ended(&mut self, outcome: Result<(), &Refusal>) {
        self.copied.stop();
        if outcome.is_ok() {
            // The image has its final name, so that its marker names nothing. One that stays is removed
            // by the next mirror to this path.
            if let Err(error) = self.images.unmark() {
                tracing::warn!(%error, "cannot remove the marker of a mirror");
            }
            self.images.keep();
        }
        // The image that no disk uses goes before anyone learns that the mirror has ended.
        self.images = NewImages::default();
        self.listed = None;
        let (id, target) = (&self.id, self.target.display());
        match outcome {
            Ok(()) => self.record("disk-mirrored", format!("{id} to {target}")),
            Err(why) => {
                let detail = format!("{id} to {target}: {}", why.detail);
                self.record("disk-mirror-failed", detail);
            }
        }
    }
}

/// Starts to mirror a disk.
pub(super) fn begin(
    pool: &Pool,
    vm: &VmHandle,
    disk: &str,
    what: &MirrorDisk,
) -> Result<Arc<dyn Migration>, RequestError> {
    let policy = rounds_policy(what.max_downtime_ms, what.deadline_s, what.max_bandwidth)?;
    let paths = paths(what)?;
    let id = vm.id().clone();
    let endpoint = format!("file://{}", what.path);
    let mirroring = Arc::new(ActiveMigration {
        disk: Some(disk.to_owned()),
        max_downtime_ms: Some(what.max_downtime_ms),
        ..ActiveMigration::new(MigrationSide::Source, Some(id.clone()), endpoint)
    });
    let caller = pool.caller(&id).ok_or_else(RequestError::driver_gone)?;
    let [path, _] = &paths;
    let what_mirror = format!("disk `{disk}` of VM {id} (migration {})", mirroring.id);
    let target = pool.mirror_targets().take(path, what_mirror);
    let target = target.map_err(not_made)?;
    let new = NewMirror {
        id: mirroring.id,
        disk: disk.to_owned(),
        target: what.path.clone().into(),
        decision: mirroring.decision.clone(),
    };
    let reserved = pool
        .host()
        .descriptors
        .reserve(descriptors::of_new_images(1), None);
    let reserved = reserved.map_err(|error| {
        RequestError::new(Category::Host, "too-few-descriptors", error.to_string())
    })?;
    let parts = caller.call(move |driver, _| driver.begin_mirror(new));
    let parts = parts.map_err(|_| RequestError::driver_gone())??;
    let mirrored = MirroredVmDisk::new(mirroring.id, parts, what, paths).map_err(not_made)?;
    let shown = mirrored.target.display();
    mirrored.record("disk-mirroring", format!("{disk} to {shown}"));
    let ours = Arc::clone(&mirroring);
    let span = tracing::error_span!("vm", %id);
    start("mirror", span, &mirroring, move || {
        mirrored.run(&ours, &policy, target);
        drop(reserved);
    })?;
    Ok(mirroring)
}
