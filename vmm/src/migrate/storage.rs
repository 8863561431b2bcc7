//! Disks that move with their VM: which ones, where their images are made, and what becomes of those.
//!
//! A source says of each disk that it copies its format and how much of it has content. A destination
//! makes the image in the directory that its operator named for that (`--migration-storage`), under a
//! name of its own, and deletes it again unless the guest came.

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use control::RequestError;
use devices::host_file::OpenError;
use migration::{DestinationDisk, MAX_COPIED, NewImage, Offer, ReadDisk, Refusal, SourceDisk};
use serde::{Deserialize, Serialize};
use spec::{DiskConfig, ImageType, LockGranularity, StartMigration, StorageMode, VmConfig, VmId};
use virtio_devices::block::{
    CreatedImage, DiskAccess, DiskContent, ImageError, ImageFormat, LockMode,
};

use super::invalid;

/// Maximum length of the name of a copied disk, which becomes a part of a file's name.
const MAX_NAME: usize = 64;

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
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct CopiedImage {
    format: CopiedFormat,
    /// About how many bytes have content.
    allocated: u64,
}

/// The disks of a VM that are copied, by the request that moves it.
#[derive(Clone, Debug)]
pub(super) struct Selection {
    all: StorageMode,
    others: BTreeMap<String, StorageMode>,
}

impl Selection {
    /// # Errors
    /// The request names a disk that the VM has not, or one twice, or copies disks with `local`.
    pub(super) fn new(what: &StartMigration, config: &VmConfig) -> Result<Self, RequestError> {
        let has = |id: &str| {
            let mut disks = config.disks.iter().flatten();
            disks.any(|disk| disk.id.as_deref() == Some(id))
        };
        let mut others = BTreeMap::new();
        for disk in what.disks.iter().flatten() {
            if !has(&disk.id) {
                let detail = format!("the VM has no disk {:?}", disk.id);
                return Err(invalid("disks", detail));
            }
            if others.insert(disk.id.clone(), disk.storage).is_some() {
                let detail = format!("the disk {:?} is named twice", disk.id);
                return Err(invalid("disks", detail));
            }
        }
        let selection = Self {
            all: what.storage,
            others,
        };
        let any = config.disks.iter().flatten();
        if what.local && any.flat_map(|disk| &disk.id).any(|id| selection.copies(id)) {
            let detail = "`local` moves the VM within this host, where the other process can use the \
                          same images: it cannot be combined with `storage` copy";
            return Err(invalid("storage", detail.to_owned()));
        }
        Ok(selection)
    }

    fn copies(&self, id: &str) -> bool {
        *self.others.get(id).unwrap_or(&self.all) == StorageMode::Copy
    }
}

/// A disk that is copied from here.
pub(super) struct CopiedDisk {
    id: String,
    content: Arc<DiskContent>,
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
        copied.map(|(id, access)| Self::of(id, access)).collect()
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
        let content = access.content().map_err(|error| unreadable(id, &error))?;
        Ok(Self {
            id: id.to_owned(),
            content: Arc::new(content),
        })
    }

    pub(super) fn content(&self) -> &DiskContent {
        &self.content
    }

    /// The format of the image.
    pub(super) fn format(&self) -> CopiedFormat {
        match self.content.format() {
            ImageFormat::Raw => CopiedFormat::Raw,
            ImageFormat::Qcow2 => CopiedFormat::Qcow2,
        }
    }

    /// Returns what the offer says of the disk.
    pub(super) fn for_offer(&self) -> (String, CopiedImage) {
        let (format, content) = (self.format(), self.content());
        let allocated = content.allocated().min(content.size());
        (self.id.clone(), CopiedImage { format, allocated })
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
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct PlannedImage {
    /// The JSON pointer of its path in the configuration.
    pub(super) pointer: String,
    id: String,
    path: PathBuf,
    format: CopiedFormat,
    size: u64,
    lock: LockGranularity,
}

/// Checks the disks of an offer whose content comes with it, and puts the paths of their images here into
/// the configuration. Nothing is made.
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
    let total = offer.disks.iter().map(|disk| disk.size);
    let total = total.fold(0, u64::saturating_add);
    if total > MAX_COPIED {
        let detail = format!(
            "the disks to copy have {total} bytes together; at most {MAX_COPIED} are copied"
        );
        return Err(Refusal::new("disks-too-large", detail));
    }
    let mut planned = Vec::new();
    for disk in &offer.disks {
        let id = &disk.name;
        let image = images.get(id);
        let image = image.ok_or_else(|| odd(format!("the machine has no image of disk {id:?}")))?;
        let mut disks = config.disks.iter_mut().flatten().enumerate();
        let (index, at) = disks
            .find(|(_, at)| at.id.as_deref() == Some(id))
            .ok_or_else(|| odd(format!("the VM has no disk {id:?}")))?;
        let path = image_path(&storage, vm, id, image.format)?;
        planned.push(PlannedImage {
            pointer: format!("/disks/{index}/path"),
            id: id.clone(),
            path: path.clone(),
            format: image.format,
            size: disk.size,
            lock: at.lock_granularity,
        });
        rewrite(at, path, image.format)?;
    }
    let allocated = images.values().map(|image| image.allocated);
    check_space(&storage, allocated.fold(0, u64::saturating_add))?;
    Ok(planned)
}

/// The directory for new images, as the host knows it.
fn storage_directory(storage: Option<&Path>) -> Result<PathBuf, Refusal> {
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
    if size > MAX_COPIED {
        let detail = format!("the disk has {size} bytes; at most {MAX_COPIED} are copied");
        return Err(Refusal::new("disks-too-large", detail));
    }
    check_absent(target)?;
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
    })
}

/// Returns the refusal of an image that cannot be made or opened.
pub(crate) fn image_refusal(error: &ImageError) -> Refusal {
    let code = match error {
        ImageError::Lock(_) => "disk-in-use",
        ImageError::Open(OpenError::Host { source, .. }) => match source.kind() {
            io::ErrorKind::AlreadyExists => "image-exists",
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => "storage-short",
            _ => "storage-unusable",
        },
        _ => "storage-unusable",
    };
    Refusal::new(code, error.to_string())
}

/// The path of a new image. Its name is made here: of the VM's name, which is checked, and the disk's, of
/// which letters, digits, `-`, `_` and `.` are taken, so that it is one component of a path.
fn image_path(
    storage: &Path,
    vm: &VmId,
    disk: &str,
    format: CopiedFormat,
) -> Result<PathBuf, Refusal> {
    let is_plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    if disk.is_empty() || disk.len() > MAX_NAME || !disk.chars().all(is_plain) {
        let detail = format!(
            "the disk {disk:?} cannot be copied: its name must be 1 to {MAX_NAME} letters, digits, \
             `-`, `_` and `.`, to be a part of a file's name"
        );
        return Err(Refusal::new("disk-name", detail));
    }
    let path = storage.join(format!("{vm}-{disk}.{}", format.extension()));
    check_absent(&path)?;
    Ok(path)
}

/// Fails with `image-exists` if there is something at the path of a new image.
fn check_absent(path: &Path) -> Result<(), Refusal> {
    match path.symlink_metadata() {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => {
            let detail = format!("cannot look for {}: {error}", path.display());
            Err(Refusal::new("storage-unusable", detail))
        }
        Ok(_) => {
            let detail = format!(
                "{} exists: move it away or delete it, if nothing needs it",
                path.display()
            );
            Err(Refusal::new("image-exists", detail))
        }
    }
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

/// The images of a VM that comes. They are deleted when this is dropped, unless they are kept.
#[derive(Default)]
pub(super) struct NewImages {
    images: Vec<(String, u64, Arc<CreatedImage>)>,
    are_kept: bool,
}

impl NewImages {
    /// Makes the images, locked.
    pub(super) fn create(planned: &[PlannedImage]) -> Result<Self, Refusal> {
        let mut made = Self::default();
        for plan in planned {
            let lock = match plan.lock {
                LockGranularity::ByteRange => LockMode::ByteRange,
                LockGranularity::Full => LockMode::Full,
            };
            let image = CreatedImage::create(&plan.path, plan.format.image(), plan.size, lock);
            let image = image.map_err(|error| {
                let refusal = image_refusal(&error);
                let detail = format!("cannot make the image of disk {}: {error}", plan.id);
                Refusal::new(&refusal.code, detail)
            })?;
            made.images
                .push((plan.id.clone(), plan.size, Arc::new(image)));
        }
        Ok(made)
    }

    pub(super) fn for_engine(&self) -> Vec<DestinationDisk> {
        let images = self.images.iter();
        let disk = |(name, size, image): &(String, u64, Arc<CreatedImage>)| DestinationDisk {
            name: name.clone(),
            size: *size,
            image: Arc::new(Writer(Arc::clone(image))),
        };
        images.map(disk).collect()
    }

    /// The only image of a mirror.
    pub(super) fn of_mirror(&self) -> Option<(DestinationDisk, Arc<CreatedImage>)> {
        let disk = self.for_engine().pop()?;
        let (_, _, image) = self.images.last()?;
        Some((disk, Arc::clone(image)))
    }

    pub(super) fn count(&self) -> usize {
        self.images.len()
    }

    /// Lets the machine's disks take the locks.
    pub(super) fn release(&self) {
        self.images.iter().for_each(|(_, _, image)| image.release());
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
        for (_, _, image) in &self.images {
            let path = image.path();
            if let Err(error) = std::fs::remove_file(path) {
                tracing::warn!(path = %path.display(), %error, "cannot delete an image that is not \
                                                                needed");
            }
        }
    }
}

struct Writer(Arc<CreatedImage>);

impl NewImage for Writer {
    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.0.write_at(offset, data)
    }

    fn zero(&self, offset: u64, len: u64) -> io::Result<()> {
        self.0.zero(offset, len)
    }

    fn sync(&self) -> io::Result<()> {
        self.0.sync()
    }
}

#[cfg(test)]
mod tests;
