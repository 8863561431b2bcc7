//! Disks that move with their VM: which ones, where their images are made, and what becomes of those.
//!
//! A source says of each disk that it copies its format and how much of it has content. A destination
//! makes the image in the directory that its operator named for that (`--migration-storage`), under a
//! name of its own, and deletes it again unless the guest came.

mod bases;
mod late;
mod leftovers;
mod names;
mod selection;

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};

use devices::host_file::OpenError;
use memory::AwaitedBlocks;
use migration::{DestinationDisk, Offer, ReadDisk, Refusal, SourceDisk, check_sizes};
use serde::{Deserialize, Serialize};
use spec::{DiskConfig, ImageType, LockGranularity, VmConfig, VmId};
use virtio_devices::block::{
    CreatedImage, DiskAccess, DiskContent, ImageError, ImageFormat, check_writable, remove_mark,
};

pub(crate) use self::bases::KnownBases;
pub(super) use self::bases::{BaseNotes, BaseReader};
use self::bases::{FoundBase, OfferedBase};
use self::late::{LateDisk, Writer};
pub(crate) use self::leftovers::remove_leftovers;
use self::leftovers::{Marker, marker_path, remove_leftover_of};
use self::names::{check_absent, image_path};
pub(super) use self::selection::Selection;
use crate::devices::open::lock_mode;

/// The format of the image of a copied disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum CopiedFormat {
    Raw,
    Qcow2,
}

impl CopiedFormat {
    fn extension(self) -> &'static str {
        match self {
            Self::Raw => "raw",
            Self::Qcow2 => "qcow2",
        }
    }

    fn of(format: ImageFormat) -> Self {
        match format {
            ImageFormat::Raw => Self::Raw,
            ImageFormat::Qcow2 => Self::Qcow2,
        }
    }

    fn image(self) -> ImageFormat {
        match self {
            Self::Raw => ImageFormat::Raw,
            Self::Qcow2 => ImageFormat::Qcow2,
        }
    }

    pub(super) fn config(self) -> ImageType {
        match self {
            Self::Raw => ImageType::Raw,
            Self::Qcow2 => ImageType::Qcow2,
        }
    }
}

/// Description of the image of a copied disk, in an offer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct CopiedImage {
    format: CopiedFormat,
    /// About how many bytes have content.
    allocated: u64,
    /// The name that the image gets at the destination, where the request chose one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    name: Option<String>,
    /// The image right below it. Since version 4 of the protocol.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    base: Option<OfferedBase>,
}

/// A disk that is copied from here.
pub(super) struct CopiedDisk {
    id: String,
    /// The name of the image at the destination, if one was chosen.
    name: Option<String>,
    content: Arc<DiskContent>,
    /// Its base, once that is identified.
    base: Option<OfferedBase>,
}

struct Reader(Arc<DiskContent>);

impl ReadDisk for Reader {
    fn read(&self, offset: u64, data: &mut [u8]) -> io::Result<()> {
        self.0.read_at(offset, data)
    }
}

impl CopiedDisk {
    /// Returns the disks of a machine that are copied.
    pub(super) fn all(
        disks: &[(String, DiskAccess)],
        selection: &Selection,
    ) -> Result<Vec<Self>, Refusal> {
        let copied = disks.iter().filter(|(id, _)| selection.copies(id));
        let copied: Vec<_> = copied.collect();
        Self::check_sizes(copied.iter().map(|(id, access)| (id.as_str(), access)))?;
        let disk = |(id, access): &(String, DiskAccess)| {
            let name = selection.name(id).cloned();
            Ok(Self {
                name,
                ..Self::of(id, access)?
            })
        };
        copied.into_iter().map(disk).collect()
    }

    /// Checks disks that are to be copied together, before anything is made for one of them.
    pub(super) fn check_sizes<'a>(
        disks: impl Iterator<Item = (&'a str, &'a DiskAccess)>,
    ) -> Result<(), Refusal> {
        let size = |(id, access): (&str, &DiskAccess)| {
            let size = access.size();
            size.map_err(|error| unreadable(id, &error))
        };
        let sizes: Vec<u64> = disks.map(size).collect::<Result<_, _>>()?;
        check_sizes(sizes.into_iter())
    }

    pub(super) fn for_engine(&self) -> SourceDisk {
        SourceDisk {
            name: self.id.clone(),
            size: self.content.size(),
            dirty: Arc::clone(self.content.dirty()),
            content: Arc::new(Reader(Arc::clone(&self.content))),
        }
    }

    pub(super) fn of(id: &str, access: &DiskAccess) -> Result<Self, Refusal> {
        Self::check_sizes(std::iter::once((id, access)))?;
        let content = access.content().map_err(|error| unreadable(id, &error))?;
        Ok(Self {
            id: id.to_owned(),
            name: None,
            content: Arc::new(content),
            base: None,
        })
    }

    /// The name of the disk.
    pub(super) fn id(&self) -> &str {
        &self.id
    }

    pub(super) fn content(&self) -> &DiskContent {
        &self.content
    }

    /// The format of the image.
    pub(super) fn format(&self) -> CopiedFormat {
        CopiedFormat::of(self.content.format())
    }

    /// Leaves out of the copy what is in the base that was offered. False if none was.
    pub(super) fn leave_out_base(&self) -> bool {
        if self.base.is_some() {
            self.content.leave_out_base();
        }
        self.base.is_some()
    }

    /// Returns what the offer says of the disk.
    pub(super) fn for_offer(&self, with_base: bool) -> (String, CopiedImage) {
        let (format, content) = (self.format(), self.content());
        let image = CopiedImage {
            format,
            allocated: content.allocated().min(content.size()),
            name: self.name.clone(),
            base: self.base.clone().filter(|_| with_base),
        };
        (self.id.clone(), image)
    }

    pub(super) fn start(&self) -> Result<(), Refusal> {
        let started = self.content.start();
        started.map_err(|error| unreadable(&self.id, &error))
    }

    pub(super) fn stop(&self) {
        self.content.stop();
    }
}

/// Writes back what the host has cached of a disk's image, so that the stop need not.
pub(super) fn pre_sync(id: &str, disk: &DiskAccess) {
    if let Err(error) = disk.pre_sync() {
        tracing::debug!(disk = id, %error, "cannot flush a disk's image before the stop");
    }
}

fn unreadable(id: &str, error: &io::Error) -> Refusal {
    let detail = format!("cannot read the disk {id}: {error}");
    Refusal::new("disk-unreadable", detail)
}

/// An image to make for a disk that comes, checked.
pub(super) struct PlannedImage {
    /// The JSON pointer of its path in the configuration.
    pub(super) pointer: String,
    id: String,
    path: PathBuf,
    format: CopiedFormat,
    size: u64,
    lock: LockGranularity,
    /// The base at the source, of which nothing is checked yet.
    offered: Option<OfferedBase>,
    /// The base here.
    base: Option<FoundBase>,
    /// About how many bytes it will take.
    needed: u64,
}

/// Checks the disks of an offer whose content comes with it, and puts the paths of their images here into
/// the configuration. Nothing is made. Whether there is room depends on [bases](BaseReader::find_all).
pub(super) fn plan(
    offer: &Offer,
    images: &BTreeMap<String, CopiedImage>,
    vm: &VmId,
    config: &mut VmConfig,
    storage: Option<&Path>,
) -> Result<Vec<PlannedImage>, Refusal> {
    if offer.disks.is_empty() && images.is_empty() {
        return Ok(Vec::new());
    }
    let odd = |detail: String| Refusal::new("offer-unreadable", detail);
    if offer.disks.len() != images.len() {
        return Err(odd(
            "the offer lists other disks than its machine".to_owned()
        ));
    }
    let storage = storage_directory(storage)?;
    check_sizes(offer.disks.iter().map(|disk| disk.size))?;
    let mut planned = Vec::new();
    for disk in &offer.disks {
        let id = &disk.name;
        let image = images.get(id);
        let image = image.ok_or_else(|| odd(format!("the machine has no image of disk {id:?}")))?;
        let mut disks = config.disks.iter_mut().flatten().enumerate();
        let (index, at) = disks
            .find(|(_, at)| at.id.as_deref() == Some(id))
            .ok_or_else(|| odd(format!("the VM has no disk {id:?}")))?;
        let taken = |path: &Path| {
            planned
                .iter()
                .any(|other: &PlannedImage| other.path == path)
        };
        let path = image_path(&storage, vm, id, image, taken)?;
        planned.push(PlannedImage {
            pointer: format!("/disks/{index}/path"),
            id: id.clone(),
            path: path.clone(),
            format: image.format,
            size: disk.size,
            lock: at.lock_granularity,
            offered: image.base.clone(),
            base: None,
            needed: image.allocated,
        });
        rewrite(at, path, image.format)?;
    }
    Ok(planned)
}

/// The directory for new images, as the host knows it.
pub(super) fn storage_directory(storage: Option<&Path>) -> Result<PathBuf, Refusal> {
    let Some(directory) = storage else {
        let detail = "the disks come with the VM, and the destination has no directory for their \
                      images: its operator names one with `receive --storage` (`storage`), or \
                      `--migration-storage` of the service";
        return Err(Refusal::new("no-storage", detail));
    };
    let unusable = |why: String| {
        let detail = format!(
            "the directory for images at the destination, {}, cannot be used: {why}",
            directory.display()
        );
        Refusal::new("storage-unusable", detail)
    };
    let real = directory
        .canonicalize()
        .map_err(|error| unusable(error.to_string()))?;
    match real.is_dir() {
        true => Ok(real),
        false => Err(unusable("it is not a directory".to_owned())),
    }
}

/// Checks the image of a mirror, which is made at `partial`, and gets the name `target` when the disk
/// continues on it. Nothing is made.
pub(super) fn plan_mirror(
    disk: &DiskConfig,
    content: &DiskContent,
    format: CopiedFormat,
    target: &Path,
    partial: &Path,
) -> Result<PlannedImage, Refusal> {
    let size = content.size();
    check_sizes([size].into_iter())?;
    check_absent(target)?;
    check_writable(target).map_err(|error| image_refusal(&error))?;
    // What a killed service left of an earlier mirror to this path. All else at that path stays.
    remove_leftover_of(partial).map_err(|error| {
        let detail = format!(
            "cannot remove {}, an old mirror: {error}",
            partial.display()
        );
        Refusal::new("storage-unusable", detail)
    })?;
    check_absent(partial)?;
    check_space(
        target.parent().unwrap_or(target),
        content.allocated().min(size),
    )?;
    Ok(PlannedImage {
        pointer: String::new(),
        id: disk.id.clone().unwrap_or_default(),
        path: partial.to_owned(),
        format,
        size,
        lock: disk.lock_granularity,
        offered: None,
        base: None,
        needed: 0,
    })
}

/// Returns the refusal of an image that cannot be made or opened.
pub(crate) fn image_refusal(error: &ImageError) -> Refusal {
    let code = match error {
        ImageError::Lock(_) => "disk-in-use",
        ImageError::Frozen { .. } => "image-frozen",
        ImageError::Open(OpenError::Host { source, .. }) => match source.kind() {
            io::ErrorKind::AlreadyExists => "image-exists",
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => "storage-short",
            _ => "storage-unusable",
        },
        _ => "storage-unusable",
    };
    Refusal::new(code, error.to_string())
}

/// The disk is one of its own here: a new image without others below it.
fn rewrite(disk: &mut DiskConfig, path: PathBuf, format: CopiedFormat) -> Result<(), Refusal> {
    let path = path.into_os_string().into_string().map_err(|path| {
        let detail = format!("the path {} is not UTF-8", path.display());
        Refusal::new("storage-unusable", detail)
    })?;
    disk.path = Some(path);
    disk.image_type = Some(format.config());
    (disk.backing_files, disk.data_files) = (false, false);
    Ok(())
}

fn check_space(storage: &Path, needed: u64) -> Result<(), Refusal> {
    // A host that does not say is not in the way: an image that does not fit fails later.
    let found = rustix::fs::statvfs(storage).ok();
    // Without blocks it is in memory, as ramfs, and has no size.
    let Some(found) = found.filter(|found| found.f_blocks > 0) else {
        return Ok(());
    };
    let free = found.f_bavail.saturating_mul(found.f_frsize);
    if needed <= free {
        return Ok(());
    }
    let detail = format!(
        "the disks to copy have {} MiB of content, and {} has {} MiB free",
        needed.div_ceil(1 << 20),
        storage.display(),
        free >> 20
    );
    Err(Refusal::new("storage-short", detail))
}

struct MadeImage {
    disk: String,
    size: u64,
    image: Arc<CreatedImage>,
    marker: Marker,
    /// Set where blocks of the disk come after the guest.
    late: Option<LateDisk>,
    /// The machine's disk, once it has taken the image over and blocks still come.
    device: Arc<OnceLock<DiskAccess>>,
}

impl MadeImage {
    fn create(plan: &PlannedImage) -> Result<Self, Refusal> {
        let lock = lock_mode(plan.lock);
        let failed = |code: &str, why: String| {
            let detail = format!("cannot make the image of disk {}: {why}", plan.id);
            Refusal::new(code, detail)
        };
        let marker = Marker::create(&plan.path);
        let marker = marker.map_err(|error| {
            let why = format!(
                "cannot create {}: {error}",
                marker_path(&plan.path).display()
            );
            failed("storage-unusable", why)
        })?;
        let image = match &plan.base {
            Some(found) => CreatedImage::create_on(&found.base, &plan.path, plan.size, lock),
            None => CreatedImage::create(&plan.path, plan.format.image(), plan.size, lock),
        };
        let image = image.map_err(|error| {
            if let Err(error) = marker.remove() {
                tracing::warn!(%error, "cannot remove the marker of an image that was not made");
            }
            failed(&image_refusal(&error).code, error.to_string())
        })?;
        let made = Self {
            disk: plan.id.clone(),
            size: plan.size,
            image: Arc::new(image),
            marker,
            late: None,
            device: Arc::default(),
        };
        // The image has locked its base. One that a program without locks changed before is another.
        let base = plan.base.as_ref().map(|found| &found.open);
        if base.is_some_and(|open| !made.image.is_on(open.version())) {
            made.delete();
            let why = "its base was changed after it was compared: try again".to_owned();
            return Err(failed("base-changed", why));
        }
        Ok(made)
    }

    /// Has the disk wait for blocks that come after the guest, and marks its image.
    fn await_blocks(&mut self, blocks: Arc<AwaitedBlocks>, device: DiskAccess) -> io::Result<()> {
        self.late = Some(LateDisk::new(self.image.path(), blocks, device)?);
        Ok(())
    }

    /// Deletes the image, and then the marker that would have the next service do so.
    fn delete(&self) {
        let path = self.image.path();
        let removed = std::fs::remove_file(path).and_then(|()| remove_mark(path));
        let removed = removed.and_then(|()| self.marker.remove());
        if let Err(error) = removed {
            tracing::warn!(path = %path.display(), %error, "cannot delete an image that is not \
                                                            needed");
        }
    }
}

/// The images of a VM that comes. They are deleted when this is dropped, unless they are kept.
#[derive(Default)]
pub(super) struct NewImages {
    images: Vec<MadeImage>,
    are_kept: bool,
}

impl NewImages {
    /// Makes the images, locked.
    pub(super) fn create(planned: &[PlannedImage]) -> Result<Self, Refusal> {
        let mut made = Self::default();
        for plan in planned {
            made.images.push(MadeImage::create(plan)?);
        }
        Ok(made)
    }

    pub(super) fn for_engine(&self) -> Vec<DestinationDisk> {
        let disk = |made: &MadeImage| DestinationDisk {
            name: made.disk.clone(),
            size: made.size,
            image: Arc::new(Writer::new(&made.image, &made.device)),
        };
        self.images.iter().map(disk).collect()
    }

    /// The only image of a mirror.
    pub(super) fn of_mirror(&self) -> Option<(DestinationDisk, Arc<CreatedImage>)> {
        let disk = self.for_engine().pop()?;
        let made = self.images.last()?;
        Some((disk, Arc::clone(&made.image)))
    }

    pub(super) fn count(&self) -> usize {
        self.images.len()
    }

    /// Has the disks of the machine wait for blocks that come after the guest.
    pub(super) fn await_blocks(
        &mut self,
        awaited: &[Option<Arc<AwaitedBlocks>>],
        disks: &[(String, DiskAccess)],
    ) -> Result<(), Refusal> {
        for (made, blocks) in self.images.iter_mut().zip(awaited) {
            let Some(blocks) = blocks else { continue };
            let device = disks.iter().find(|(id, _)| *id == made.disk);
            let awaited = match device {
                Some((_, device)) => made.await_blocks(Arc::clone(blocks), device.clone()),
                None => Err(io::ErrorKind::NotFound.into()),
            };
            awaited.map_err(|error| {
                let detail = format!(
                    "the disk {} cannot wait for blocks that come after the guest: {error}",
                    made.disk
                );
                Refusal::new("storage-unusable", detail)
            })?;
        }
        Ok(())
    }

    /// Lets the machine's disks take the locks. Blocks that come from here on are written by these disks:
    /// each keeps the tables of its image, so that two writers would destroy it.
    pub(super) fn release(&self) {
        for made in &self.images {
            if let Some(late) = &made.late {
                made.device.get_or_init(|| late.device.clone());
            }
            made.image.release();
        }
    }

    /// The machine's disks did not take the locks over: nobody else may use the images while it is in doubt
    /// where the guest runs.
    pub(super) fn take_back(&self) {
        for made in &self.images {
            if let Err(error) = made.image.take_back() {
                tracing::error!(disk = made.disk, %error, "the image of a guest in doubt is not locked");
            }
        }
    }

    /// All blocks are in the images, and durable.
    pub(super) fn blocks_arrived(&self) -> Result<(), Refusal> {
        let mut late = self.images.iter().filter_map(|made| made.late.as_ref());
        let removed = late.try_for_each(|late| late.mark.remove());
        removed.map_err(|error| {
            let detail = format!("cannot remove the mark of an image that is complete: {error}");
            Refusal::new("storage-unusable", detail)
        })
    }

    /// The guest may run here from now on: no later service may take the images for leftovers.
    pub(super) fn unmark(&self) -> Result<(), Refusal> {
        let mut markers = self.images.iter().map(|made| &made.marker);
        markers.try_for_each(Marker::remove).map_err(|error| {
            let detail = format!("cannot remove the marker of an image that came: {error}");
            Refusal::new("storage-unusable", detail)
        })
    }

    /// The guest is here, and so are its disks.
    pub(super) fn keep(&mut self) {
        self.are_kept = true;
    }
}

impl Drop for NewImages {
    fn drop(&mut self) {
        if self.are_kept {
            return;
        }
        self.images.iter().for_each(MadeImage::delete);
    }
}

#[cfg(test)]
mod tests;
