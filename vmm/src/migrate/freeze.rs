//! Disks at the moment of a snapshot: each image is frozen, and the guest continues on an overlay.
//!
//! ```text
//!   create       the overlays exist, empty and durable          the guest may run
//!   switch       the disks are the overlays                     the guest is paused
//!   keep         the guest may write to them                    no way back from here
//!   mark         nothing may write to the images                the snapshot is complete but for its manifest
//!   finish       removes what a snapshot that failed leaves, if it was not kept
//! ```
//!
//! A crash before the switch leaves empty overlays that nothing names.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use migration::Refusal;
use parking_lot::Mutex;
use spec::{DiskConfig, ImageType, SnapshotDisks, VmConfig};
use uuid::Uuid;
use virtio_devices::block::{BaseImage, ImageError, NeededOverlay, beside};

use super::copies::without;
use super::overlays::SnapshotRecords;
use crate::devices::open::{image_format, lock_mode};
use crate::driver::{Caller, Driver, NewOverlay, SwitchedDisk};

/// The disks of one VM, of which a snapshot is taken.
pub(super) struct DiskFreeze {
    caller: Caller,
    /// Becomes a part of the overlays' names.
    id: Uuid,
    disks: Vec<String>,
    stage: Mutex<Stage>,
    /// The configuration and the folder of a snapshot, which needs the images of its disks as long as it is
    /// there. Forks have neither.
    folder: Option<(Arc<VmConfig>, String)>,
    records: Mutex<SnapshotRecords>,
    /// The images that must not change below the overlays.
    frozen: Mutex<Vec<PathBuf>>,
    /// Until the end, the overlays are needed though no disk may use them.
    needed: Mutex<Vec<NeededOverlay>>,
}

enum Stage {
    /// These overlays exist, and no disk is one of them.
    Created(Vec<NewOverlay>),
    /// The guest is paused, and has not written to them.
    Switched(Vec<SwitchedDisk>),
    /// They are the VM's. Their number.
    Kept(usize),
}

/// Names the disks that are frozen.
pub(super) fn disks_to_freeze(config: &VmConfig, what: SnapshotDisks) -> Vec<String> {
    let disks = config.disks.iter().flatten();
    match what {
        SnapshotDisks::None | SnapshotDisks::Copy => Vec::new(),
        SnapshotDisks::Overlay => disks
            .filter(|disk| !disk.readonly)
            .filter_map(|disk| disk.id.clone())
            .collect(),
    }
}

fn refused(error: &ImageError) -> Refusal {
    Refusal::new("no-overlay", error.to_string())
}

impl DiskFreeze {
    pub(super) fn new(caller: Caller, id: Uuid, disks: Vec<String>) -> Self {
        Self {
            caller,
            id,
            disks,
            stage: Mutex::new(Stage::Created(Vec::new())),
            folder: None,
            records: Mutex::default(),
            frozen: Mutex::default(),
            needed: Mutex::default(),
        }
    }

    /// Has the images recorded as those of a snapshot in this folder.
    pub(super) fn for_snapshot(mut self, config: Arc<VmConfig>, folder: String) -> Self {
        self.folder = Some((config, folder));
        self
    }

    /// Records which images the snapshot needs, and creates the overlays.
    pub(super) fn create(&self) -> Result<(), Refusal> {
        if let Some((config, folder)) = &self.folder {
            match SnapshotRecords::write(&without(config, &self.disks), self.id, folder) {
                Ok(records) => *self.records.lock() = records,
                // Its caller looks after the disks.
                Err(why) if self.disks.is_empty() => {
                    tracing::warn!(%why, "an overlay may be removed though a snapshot names it");
                }
                Err(why) => return Err(why),
            }
        }
        if self.disks.is_empty() {
            return Ok(());
        }
        let (disks, suffix) = (self.disks.clone(), self.id.to_string());
        let plan = move |driver: &mut Driver| driver.plan_overlays(&disks, &suffix);
        let planned = self.caller.attempt(plan)?;
        let mut stage = self.stage.lock();
        for (disk, plan) in planned {
            // Two disks may have a base in common.
            let mut frozen = self.frozen.lock();
            let images = plan.frozen_images().into_iter();
            let new: Vec<_> = images.filter(|image| !frozen.contains(image)).collect();
            frozen.extend(new);
            let needed = plan.create().map_err(|error| refused(&error))?;
            self.needed.lock().push(needed);
            if let Stage::Created(all) = &mut *stage {
                let path = plan.path;
                all.push(NewOverlay { disk, path });
            }
        }
        Ok(())
    }

    /// Has the disks of the paused guest continue on the overlays.
    pub(super) fn switch(&self) -> Result<(), Refusal> {
        let mut stage = self.stage.lock();
        let overlays = match &*stage {
            Stage::Created(overlays) if !overlays.is_empty() => overlays.clone(),
            Stage::Created(_) | Stage::Switched(_) | Stage::Kept(_) => return Ok(()),
        };
        let switch = move |driver: &mut Driver, answer| driver.switch_disks(overlays, answer);
        *stage = Stage::Switched(self.caller.attempt_later(switch)?);
        Ok(())
    }

    /// From here on the guest may write to the overlays.
    pub(super) fn keep(&self) {
        let mut stage = self.stage.lock();
        if let Stage::Switched(disks) = &*stage {
            *stage = Stage::Kept(disks.len());
            // A machine that is gone has closed its images.
            let _ = self.caller.attempt(Driver::keep_overlays);
        }
    }

    /// Has the images marked as frozen, so that nothing writes to them any more. Their mark is durable before
    /// the snapshot is complete.
    pub(super) fn mark(&self) -> Result<(), Refusal> {
        self.mark_in(&mut self.records.lock())
    }

    fn mark_in(&self, records: &mut SnapshotRecords) -> Result<(), Refusal> {
        match &self.folder {
            Some((_, folder)) => records.freeze(&self.frozen.lock(), self.id, folder),
            None => Ok(()),
        }
    }

    /// The VM continues on overlays though the snapshot failed: what is below them must not be written.
    fn keep_frozen(&self, records: &mut SnapshotRecords) {
        if let Err(why) = self.mark_in(records) {
            tracing::warn!(%why, "an image below an overlay of the VM is not marked as frozen");
        }
        records.keep_frozen();
    }

    /// Concludes a snapshot, before its VM may do something else: the overlays stay, or everything is as it
    /// was before. Returns what an operator should know.
    pub(super) fn finish(&self, is_complete: bool) -> &'static str {
        let mut records = std::mem::take(&mut *self.records.lock());
        if is_complete {
            self.keep();
            records.keep();
            return "";
        }
        let mut stage = self.stage.lock();
        let stage = std::mem::replace(&mut *stage, Stage::Kept(0));
        let overlays = match stage {
            Stage::Created(overlays) => overlays,
            Stage::Switched(disks) => {
                let overlays = disks.iter().map(|disk| disk.overlay.clone()).collect();
                let back =
                    move |driver: &mut Driver, answer| driver.switch_disks_back(disks, answer);
                if let Err(error) = self.caller.attempt_later(back) {
                    tracing::warn!(%error, "the VM's disks continue on overlays");
                    self.keep_frozen(&mut records);
                    return CONTINUES;
                }
                overlays
            }
            Stage::Kept(0) => return "",
            Stage::Kept(_) => {
                self.keep_frozen(&mut records);
                return CONTINUES;
            }
        };
        for NewOverlay { path, .. } in overlays {
            remove(&path);
        }
        ""
    }
}

/// For the event and the report of a snapshot that fails after its guest has resumed, and of forks that fail
/// after the copy of their VM.
pub(super) const CONTINUES: &str =
    "; the VM's disks continue on overlays, and the images below them stay frozen";

impl Drop for DiskFreeze {
    fn drop(&mut self) {
        // A panic: what no disk uses goes, and a disk that was switched stays as it is.
        if let Stage::Created(overlays) = self.stage.get_mut() {
            overlays.iter().for_each(|overlay| remove(&overlay.path));
        }
    }
}

fn remove(path: &Path) {
    if let Err(error) = fs::remove_file(path) {
        tracing::warn!(%error, path = %path.display(), "cannot remove an overlay that is not needed");
    }
}

/// Overlays that were made for a VM which comes from a snapshot. Removed unless they are kept.
#[derive(Default)]
pub(super) struct OwnOverlays(Vec<(PathBuf, NeededOverlay)>);

impl OwnOverlays {
    /// Makes an overlay for each frozen disk of a configuration, whose paths are checked, and has the
    /// configurations name it.
    pub(super) fn make(
        frozen: &[String],
        suffix: &str,
        image_dirs: &[PathBuf],
        config: &mut VmConfig,
        resolved: &mut VmConfig,
    ) -> Result<Self, Refusal> {
        let mut made = Self::default();
        for id in frozen {
            let disk = find(resolved, id).ok_or_else(|| {
                let why = format!("the frozen disk {id} is not in the VM's configuration");
                Refusal::new("offer-unreadable", why)
            })?;
            let base = base_image(disk, image_dirs)?;
            let (_, overlay) = beside(&base.path, suffix).map_err(|error| refused(&error))?;
            let needed = base.create_overlay(&overlay);
            let needed = needed.map_err(|error| refused(&error))?;
            made.0.push((overlay.clone(), needed));
            for config in [&mut *config, &mut *resolved] {
                find(config, id)
                    .into_iter()
                    .for_each(|disk| name_overlay(disk, &overlay));
            }
        }
        Ok(made)
    }

    /// The VM uses them.
    pub(super) fn keep(&mut self) {
        self.0.clear();
    }
}

impl Drop for OwnOverlays {
    fn drop(&mut self) {
        self.0.iter().for_each(|(path, _)| remove(path));
    }
}

fn find<'a>(config: &'a mut VmConfig, id: &str) -> Option<&'a mut DiskConfig> {
    let mut disks = config.disks.iter_mut().flatten();
    disks.find(|disk| disk.id.as_deref() == Some(id))
}

/// Returns the images that must not change because these disks are frozen: theirs, and those below them in the
/// same folder. An image that is gone is none.
pub(super) fn images_of(
    config: &mut VmConfig,
    frozen: &[String],
    image_dirs: &[PathBuf],
) -> Vec<PathBuf> {
    let mut all = Vec::new();
    for id in frozen {
        let disk = find(config, id);
        let base = disk.and_then(|disk| base_image(disk, image_dirs).ok());
        all.extend(base.iter().flat_map(BaseImage::in_folder));
    }
    all.sort();
    all.dedup();
    all
}

fn base_image(disk: &DiskConfig, image_dirs: &[PathBuf]) -> Result<BaseImage, Refusal> {
    let path = PathBuf::from(disk.path.clone().unwrap_or_default());
    // A machine that was saved has recorded the formats of its images.
    let format = disk.image_type.and_then(image_format).ok_or_else(|| {
        let path = path.display();
        let why = format!("the format of the frozen image {path} is not known");
        Refusal::new("offer-unreadable", why)
    })?;
    let path = path.canonicalize().map_err(|error| {
        let why = format!("the frozen image {}: {error}", path.display());
        Refusal::new("no-overlay", why)
    })?;
    Ok(BaseImage {
        path,
        format,
        backing_files: disk.backing_files,
        image_dirs: image_dirs.to_vec(),
        lock: lock_mode(disk.lock_granularity),
    })
}

/// Has a disk's configuration name an overlay of its image.
pub(crate) fn name_overlay(disk: &mut DiskConfig, overlay: &Path) {
    // Its name begins with that of an image from a configuration, which is UTF-8.
    disk.path = Some(overlay.to_string_lossy().into_owned());
    disk.image_type = Some(ImageType::Qcow2);
    disk.image_type_detected = false;
    disk.backing_files = true;
}
