//! Names of new images: one that the request of a migration chose, or one that nothing has.

use std::io;
use std::path::{Path, PathBuf};

use migration::Refusal;
use spec::{DiskStorage, VmId};

use super::CopiedImage;
use super::leftovers::marker_path;

/// Images of a disk that a directory may have: the last number in the name that a new one gets.
pub(super) const MAX_NUMBER: u32 = 99;

/// Maximum length of the name of a copied disk, which becomes a part of a file's name.
const MAX_NAME: usize = 64;

pub(super) fn no_image_name(name: &str) -> String {
    let most = DiskStorage::NAME_LEN;
    format!(
        "{name:?} is no name of an image: use 1 to {most} letters, digits, `-`, `_` and `.`, not starting \
         with `.` or `-`"
    )
}

/// The path of a new image. Its name is that of the offer, which is checked, or made here: of the VM's name,
/// which is checked, and the disk's, of which letters, digits, `-`, `_` and `.` are taken, so that it is one
/// component of a path. A name that is made here is one that nothing has. The image that an earlier move of
/// the VM left may have the first one.
pub(super) fn image_path(
    storage: &Path,
    vm: &VmId,
    disk: &str,
    image: &CopiedImage,
    is_planned: impl Fn(&Path) -> bool,
) -> Result<PathBuf, Refusal> {
    let is_plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    if disk.is_empty() || disk.len() > MAX_NAME || !disk.chars().all(is_plain) {
        let detail = format!(
            "the disk {disk:?} cannot be copied: its name must be 1 to {MAX_NAME} letters, digits, \
             `-`, `_` and `.`, to be a part of a file's name"
        );
        return Err(Refusal::new("disk-name", detail));
    }
    if let Some(name) = &image.name {
        if !DiskStorage::is_image_name(name) {
            return Err(Refusal::new("image-name", no_image_name(name)));
        }
        let path = storage.join(name);
        if is_planned(&path) {
            let detail = format!("two disks of the VM get the image {}", path.display());
            return Err(Refusal::new("image-exists", detail));
        }
        check_absent(&path)?;
        return Ok(path);
    }
    let extension = image.format.extension();
    for number in 1..=MAX_NUMBER {
        let name = match number {
            1 => format!("{vm}-{disk}.{extension}"),
            number => format!("{vm}-{disk}-{number}.{extension}"),
        };
        let path = storage.join(name);
        if !is_planned(&path) && !exists(&path)? && !exists(&marker_path(&path))? {
            return Ok(path);
        }
    }
    let detail = format!(
        "{} has {MAX_NUMBER} images of the disk {disk} of {vm}: delete those that nothing needs",
        storage.display()
    );
    Err(Refusal::new("image-exists", detail))
}

fn exists(path: &Path) -> Result<bool, Refusal> {
    match path.symlink_metadata() {
        Ok(_) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => {
            let detail = format!("cannot look for {}: {error}", path.display());
            Err(Refusal::new("storage-unusable", detail))
        }
    }
}

/// Fails with `image-exists` if there is something at the path of a new image.
pub(super) fn check_absent(path: &Path) -> Result<(), Refusal> {
    if !exists(path)? {
        return Ok(());
    }
    let detail = format!(
        "{} exists: choose another name, or delete it if nothing needs it",
        path.display()
    );
    Err(Refusal::new("image-exists", detail))
}
