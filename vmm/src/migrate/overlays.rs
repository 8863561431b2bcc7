//! Overlays that VMs leave: listed, and removed if nothing needs them.
//!
//! A snapshot that names an overlay as the image of a disk leaves a record beside it, which keeps it.

use std::fs;
use std::path::{Path, PathBuf};

use ::devices::host_file::{FileKind, Identity};
use control::{Category, Registry, RequestError};
use migration::Refusal;
use spec::{FieldProblem, FindOverlays, OverlayInfo, OverlayState, VmConfig, VmId};
use uuid::Uuid;
use virtio_devices::block::{
    FoundOverlay, FrozenMark, ImageError, MAX_BACKING, OverlayUse, find_overlays, record_snapshot,
};

/// Lists the overlays beside an image, and removes those that nothing uses if that is asked for.
pub(super) fn find(
    registry: &Registry,
    what: &FindOverlays,
) -> Result<Vec<OverlayInfo>, RequestError> {
    let path = Path::new(&what.path);
    if !path.is_absolute() || path.file_name().is_none() {
        return Err(RequestError::invalid(vec![FieldProblem {
            pointer: "/path".to_owned(),
            code: "invalid".to_owned(),
            detail: format!(
                "`path` ({:?}) must be the absolute path of an image",
                what.path
            ),
        }]));
    }
    check_kind(path)?;
    let named = images_of_vms(registry);
    let mut removed = Vec::new();
    // Each pass may free the overlays below those that it removes.
    for _ in 0..=MAX_BACKING {
        let may_go = |path: &Path| what.remove && named_by(path, &named).is_none();
        let found = find_overlays(path, &may_go);
        let mut found = found.map_err(|error| unreadable(&error))?;
        let before = removed.len();
        let mut infos = Vec::new();
        for overlay in &mut found {
            let mut info = describe(overlay, &named);
            if what.remove && info.state == OverlayState::Unused {
                remove(overlay, &mut info);
            }
            match info.state {
                OverlayState::Removed => removed.push(info),
                _ => infos.push(info),
            }
        }
        if removed.len() == before {
            removed.extend(infos);
            break;
        }
    }
    if removed.is_empty() && path.symlink_metadata().is_err() {
        let detail = format!("there is neither {} nor an overlay of it", what.path);
        return Err(RequestError::new(
            Category::Unprocessable,
            "no-such-image",
            detail,
        ));
    }
    Ok(removed)
}

/// Checks that a path can be that of an image: only regular files have overlays. One that is gone may have
/// left some.
fn check_kind(path: &Path) -> Result<(), RequestError> {
    let Ok(metadata) = path.metadata() else {
        return Ok(());
    };
    match FileKind::of(&metadata) {
        FileKind::Regular => Ok(()),
        other => Err(RequestError::invalid(vec![FieldProblem {
            pointer: "/path".to_owned(),
            code: "invalid".to_owned(),
            detail: format!(
                "`path` ({}) is {}; it must be a regular file",
                path.display(),
                other.name()
            ),
        }])),
    }
}

fn unreadable(error: &ImageError) -> RequestError {
    let code = "overlays-unreadable";
    RequestError::new(Category::Unprocessable, code, error.to_string())
}

/// The images that configurations of VMs name, whether these are on or off.
fn images_of_vms(registry: &Registry) -> Vec<(Identity, VmId)> {
    let mut named = Vec::new();
    for vm in registry.list() {
        let config = vm.status().config;
        for path in paths(&config) {
            let identity = Identity::of(Path::new(path));
            named.extend(identity.map(|identity| (identity, vm.id().clone())));
        }
    }
    named
}

fn paths(config: &VmConfig) -> impl Iterator<Item = &str> {
    let disks = config.disks.iter().flatten();
    disks.filter_map(|disk| disk.path.as_deref())
}

fn named_by<'a>(path: &Path, named: &'a [(Identity, VmId)]) -> Option<&'a VmId> {
    let identity = Identity::of(path);
    let mut named = named.iter();
    let found = named.find(|(image, _)| Some(image) == identity.as_ref());
    found.map(|(_, vm)| vm)
}

fn describe(overlay: &FoundOverlay, named: &[(Identity, VmId)]) -> OverlayInfo {
    let vm = named_by(&overlay.path, named);
    let (state, reason) = match (&overlay.used, vm) {
        (_, Some(vm)) => {
            let vm = vm.as_str();
            (OverlayState::InUse, Some(format!("the VM {vm:?} names it")))
        }
        (OverlayUse::Unused, None) => (OverlayState::Unused, None),
        (OverlayUse::Open(holder), None) => {
            (OverlayState::InUse, Some(format!("{holder} uses it")))
        }
        (OverlayUse::Backing(above), None) => {
            let reason = format!("{} is on top of it", above.display());
            (OverlayState::Backing, Some(reason))
        }
        (OverlayUse::Snapshot(record, text), None) => {
            let reason = format!(
                "{text}; if this snapshot is gone, remove the record {}",
                record.display()
            );
            (OverlayState::Snapshot, Some(reason))
        }
    };
    OverlayInfo {
        path: overlay.path.to_string_lossy().into_owned(),
        bytes: overlay.bytes,
        state,
        reason,
    }
}

fn remove(overlay: &mut FoundOverlay, info: &mut OverlayInfo) {
    match overlay.remove() {
        Ok(true) => {
            info.state = OverlayState::Removed;
            tracing::info!(
                path = info.path,
                bytes = info.bytes,
                "removed an overlay that nothing uses"
            );
        }
        Ok(false) => {}
        Err(error) => {
            tracing::warn!(%error, path = info.path, "cannot remove an overlay that nothing uses");
            info.reason = Some(error.to_string());
        }
    }
}

/// Records of a snapshot beside the images that it names. Removed unless they are kept.
#[derive(Default)]
pub(super) struct SnapshotRecords {
    /// Beside overlays, which may be written and must not be removed.
    needed: Vec<PathBuf>,
    /// Marks of images that must not be written.
    frozen: Vec<FrozenMark>,
}

impl SnapshotRecords {
    /// Writes those of overlays that a configuration names, before the snapshot is complete.
    ///
    /// # Errors
    /// The host refuses (`no-overlay`).
    pub(super) fn write(config: &VmConfig, id: Uuid, folder: &str) -> Result<Self, Refusal> {
        let mut records = Self::default();
        for path in paths(config) {
            let record =
                record_snapshot(Path::new(path), &id.to_string(), &needed_text(id, folder));
            let record = record.map_err(|error| unrecorded(Path::new(path), &error))?;
            records.needed.extend(record);
        }
        Ok(records)
    }

    /// Marks images that are frozen, when they are written no more. May be called again with the same images,
    /// to mark those that an error left out.
    ///
    /// # Errors
    /// The host refuses (`no-overlay`).
    pub(super) fn freeze(
        &mut self,
        images: &[PathBuf],
        id: Uuid,
        folder: &str,
    ) -> Result<(), Refusal> {
        for image in images.iter().skip(self.frozen.len()) {
            let mark = FrozenMark::create(image, &id.to_string(), &frozen_text(id, folder));
            self.frozen
                .push(mark.map_err(|error| unrecorded(image, &error))?);
        }
        Ok(())
    }

    /// The snapshot is complete.
    pub(super) fn keep(mut self) {
        self.needed.clear();
        self.frozen.clear();
    }

    /// The snapshot failed, and its VM continues on overlays: the images below them stay frozen.
    pub(super) fn keep_frozen(&mut self) {
        self.frozen.clear();
    }
}

fn needed_text(id: Uuid, folder: &str) -> String {
    format!("the snapshot {id} in {folder} needs it")
}

fn frozen_text(id: Uuid, folder: &str) -> String {
    format!("the snapshot {id} in {folder} froze it: that snapshot and overlays of it need it")
}

fn unrecorded(image: &Path, error: &ImageError) -> Refusal {
    let image = image.display();
    let why = format!("cannot record that the snapshot needs {image}: {error}");
    Refusal::new("no-overlay", why)
}

impl Drop for SnapshotRecords {
    fn drop(&mut self) {
        for path in &self.needed {
            if let Err(error) = fs::remove_file(path) {
                tracing::warn!(%error, path = %path.display(), "cannot remove a record that is not needed");
            }
        }
        for mark in &self.frozen {
            if let Err(error) = mark.remove() {
                tracing::warn!(%error, "cannot remove the mark of an image that is not frozen");
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use rustix::fs::{CWD, FileType, Mode, mknodat};

    use super::*;

    #[test]
    fn only_regular_files_have_overlays() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        fs::write(at("image"), "").unwrap();
        mknodat(CWD, at("fifo"), FileType::Fifo, Mode::RUSR, 0).unwrap();
        symlink(at("fifo"), at("link")).unwrap();
        check_kind(&at("image")).unwrap();
        check_kind(&at("gone")).unwrap();
        for (path, kind) in [
            (dir.path().to_owned(), "a directory"),
            (at("fifo"), "a FIFO"),
            (at("link"), "a FIFO"),
            (PathBuf::from("/dev/zero"), "a character device"),
        ] {
            let refused = check_kind(&path).unwrap_err();
            let detail = &refused.fields[0].detail;
            let shown = format!("{}) is {kind};", path.display());
            assert!(detail.contains(&shown), "{detail}");
        }
    }
}
