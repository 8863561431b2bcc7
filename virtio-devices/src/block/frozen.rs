//! Images that snapshots need as they are. Opening one for writing is refused: it would destroy the snapshots.
//!
//! `IMAGE.frozen` is a folder beside the image, with a file for each snapshot that needs it, named by the
//! snapshot's identity. A fixed name is found where the folder of the image cannot be listed. Copies of disks
//! in the folder of a snapshot need no such mark: they are known by the files beside them.

use std::fs;
use std::io::{self, Read as _};
use std::path::{Path, PathBuf};

use devices::host_file::{FileKind, Request};

use super::create::{sync_folder_of, write_note};
use super::image::{Image, ImageError};
use super::overlay::{BaseImage, failed};
use super::qcow2::MAX_BACKING;

/// Added to the name of an image.
const SUFFIX: &str = ".frozen";
/// Files of a snapshot's folder, beside its copies of disks. `migration` writes them.
const SNAPSHOT_FILES: [&str; 3] = ["manifest.json", "machine.json", "state.bin"];
/// Bytes of a mark that are shown.
const MAX_TEXT: u64 = 4096;
/// Marks of an image that are looked at.
const MAX_MARKS: usize = 1024;
/// Snapshots that a refusal names.
const MAX_NAMED: usize = 3;

/// Returns the folder of the marks of an image, which may be gone. A link is followed.
fn folder_of(image: &Path) -> Option<PathBuf> {
    let real = image.canonicalize().ok().or_else(|| {
        let folder = image.parent().filter(|at| !at.as_os_str().is_empty());
        let folder = folder.unwrap_or(Path::new(".")).canonicalize().ok()?;
        Some(folder.join(image.file_name()?))
    })?;
    let mut folder = real.into_os_string();
    folder.push(SUFFIX);
    Some(folder.into())
}

/// Fails if a snapshot needs the image, which is to be written.
///
/// # Errors
/// [`ImageError::Frozen`], with the snapshots and a way out.
pub fn check_writable(image: &Path) -> Result<(), ImageError> {
    let why = marked(image).or_else(|| copied(image));
    why.map_or(Ok(()), |why| {
        let path = image.to_owned();
        Err(ImageError::Frozen { path, why })
    })
}

fn marked(image: &Path) -> Option<String> {
    let folder = folder_of(image)?;
    if folder.symlink_metadata().is_err() {
        return None;
    }
    let (needed_by, release) = match marks(&folder) {
        Ok(all) if all.is_empty() => return None,
        Ok(all) => {
            let named = || all.iter().take(MAX_NAMED);
            let texts: Vec<_> = named().map(|(_, text)| text.as_str()).collect();
            let files: Vec<_> = named()
                .map(|(path, _)| path.display().to_string())
                .collect();
            let more = match all.len().saturating_sub(MAX_NAMED) {
                0 => String::new(),
                more => format!("; and {more} more"),
            };
            (texts.join("; ") + &more, files.join(", "))
        }
        // The rules of Landlock may allow the image and not the folder.
        Err(error) => {
            let folder = folder.display().to_string();
            (format!("a snapshot needs it ({folder}: {error})"), folder)
        }
    };
    Some(format!(
        "{needed_by}. Open the image with `readonly`, or write to an overlay or a copy of it; a restore makes \
         an overlay. When that snapshot, all copies of it and all overlays of the image are gone, remove {release}"
    ))
}

/// Returns the marks in a folder, and what each says.
fn marks(folder: &Path) -> io::Result<Vec<(PathBuf, String)>> {
    let mut all = Vec::new();
    for entry in fs::read_dir(folder)?.take(MAX_MARKS) {
        let entry = entry?;
        let text = match all.len() < MAX_NAMED {
            true => text_of(&entry.path()),
            false => None,
        };
        let named = || format!("the snapshot {} needs it", entry.file_name().display());
        all.push((entry.path(), text.unwrap_or_else(named)));
    }
    all.sort();
    Ok(all)
}

fn text_of(mark: &Path) -> Option<String> {
    let file = Request::read(mark, &[FileKind::Regular]).open().ok()?;
    let mut text = Vec::new();
    file.take(MAX_TEXT).read_to_end(&mut text).ok()?;
    let text = String::from_utf8_lossy(&text).trim().to_owned();
    (!text.is_empty()).then_some(text)
}

/// Returns why a copy of a disk in the folder of a snapshot must not be written.
fn copied(image: &Path) -> Option<String> {
    let real = image.canonicalize().ok()?;
    let number = real
        .file_name()?
        .to_str()?
        .strip_prefix("disk-")?
        .strip_suffix(".raw")?;
    let is_copy = !number.is_empty()
        && number.bytes().all(|byte| byte.is_ascii_digit())
        && SNAPSHOT_FILES
            .iter()
            .all(|name| real.with_file_name(name).exists());
    is_copy.then(|| {
        format!(
            "it is a disk in the snapshot in {}. Open it with `readonly`, or restore the snapshot, which makes \
             an overlay; move it to another folder to write to it all the same",
            real.parent().unwrap_or(Path::new("/")).display()
        )
    })
}

/// Returns the mark of an image that a snapshot needs as it is, and what the mark says.
pub(super) fn first_mark(image: &Path) -> Option<(PathBuf, String)> {
    let folder = folder_of(image)?;
    match marks(&folder) {
        Ok(all) => all.into_iter().next(),
        Err(error) if error.kind() == io::ErrorKind::NotFound => None,
        Err(error) => Some((folder, error.to_string())),
    }
}

/// Removes the folder of the marks of an image that is gone, if no snapshot has one there.
pub(super) fn forget(image: &Path) {
    if let Some(folder) = folder_of(image) {
        let _ = fs::remove_dir(folder);
    }
}

/// The mark of a snapshot that needs an image as it is. Stays when this is dropped.
#[derive(Debug)]
pub struct FrozenMark(PathBuf);

impl FrozenMark {
    /// Marks an image durably: `text` says which snapshot needs it.
    ///
    /// # Errors
    /// The snapshot has marked it already, or the host refuses.
    pub fn create(image: &Path, id: &str, text: &str) -> Result<Self, ImageError> {
        let real = image.canonicalize().map_err(|error| failed(image, error))?;
        let folder = folder_of(&real).unwrap_or_default();
        let host = |error| failed(&folder, error);
        match fs::create_dir(&folder) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(host(error)),
            _ => {}
        }
        let mark = folder.join(id);
        if let Err(error) = write_note(&mark, &format!("{text}\n")) {
            let _ = fs::remove_dir(&folder);
            return Err(host(error));
        }
        let mark = Self(mark);
        if let Err(error) = sync_folder_of(&folder) {
            // Or the image would stay frozen for a snapshot that is not made.
            let _ = mark.remove();
            return Err(host(error));
        }
        Ok(mark)
    }

    /// The snapshot was not completed.
    ///
    /// # Errors
    /// The host cannot remove the file.
    pub fn remove(&self) -> Result<(), ImageError> {
        fs::remove_file(&self.0).map_err(|error| failed(&self.0, error))?;
        if let Some(folder) = self.0.parent() {
            // Fails if another snapshot needs the image.
            let _ = fs::remove_dir(folder);
        }
        Ok(())
    }
}

impl BaseImage {
    /// Returns the real paths of the image and of those below it in the same folder: writing to any of them
    /// changes what an overlay of this image shows. Bases in other folders are not the VM's own.
    #[must_use]
    pub fn in_folder(&self) -> Vec<PathBuf> {
        let mut all = Vec::new();
        let folder = self.path.parent().map(Path::to_owned);
        let mut next = Some(self.clone());
        while let Some(base) = next
            && all.len() <= MAX_BACKING
        {
            next = Image::open(base.opening())
                .ok()
                .and_then(|image| image.base());
            all.push(base.path);
        }
        all.retain(|path| path.parent() == folder.as_deref());
        all
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use devices::host_file::LockMode;

    use super::super::{Block, CreatedImage, ImageFormat, beside};
    use super::*;
    use crate::testing::{disk_config, workers};

    fn image(dir: &Path) -> PathBuf {
        let path = dir.canonicalize().unwrap().join("web.raw");
        fs::write(&path, [1; 4096]).unwrap();
        path
    }

    fn refusal(path: &Path) -> String {
        match check_writable(path).unwrap_err() {
            ImageError::Frozen { why, .. } => why,
            other => panic!("{other}"),
        }
    }

    #[test]
    fn frozen_images_are_opened_for_reading_only() {
        let dir = tempfile::tempdir().unwrap();
        let image = image(dir.path());
        let link = dir.path().join("link");
        symlink(&image, &link).unwrap();
        let (_event_loop, workers) = workers();
        let open = |path: &Path, readonly| {
            let mut config = disk_config(path);
            config.readonly = readonly;
            Block::new(&config, workers.clone()).map(drop)
        };
        open(&link, false).unwrap();
        let mark = FrozenMark::create(&link, "1-2-3", "the snapshot 1-2-3 needs it").unwrap();
        assert!(FrozenMark::create(&image, "1-2-3", "again").is_err());
        for path in [&image, &link] {
            open(path, true).unwrap();
            let refused = open(path, false).unwrap_err();
            assert!(matches!(refused, ImageError::Frozen { .. }), "{refused}");
            let refused = refused.to_string();
            let file = image.with_file_name("web.raw.frozen").join("1-2-3");
            assert!(refused.contains("the snapshot 1-2-3 needs it"), "{refused}");
            assert!(
                refused.contains(&format!("remove {}", file.display())),
                "{refused}"
            );
        }
        // Each snapshot has a mark of its own, and all count.
        let more: Vec<_> = (0..4)
            .map(|n| FrozenMark::create(&image, &format!("s{n}"), "").unwrap())
            .collect();
        mark.remove().unwrap();
        let why = refusal(&image);
        assert!(
            why.contains("the snapshot s0 needs it") && why.contains("1 more"),
            "{why}"
        );
        // An image that is gone, and a new one at its path.
        fs::remove_file(&image).unwrap();
        let create = || CreatedImage::create(&image, ImageFormat::Raw, 4096, LockMode::ByteRange);
        assert!(matches!(create(), Err(ImageError::Frozen { .. })));
        assert!(!image.exists());
        for mark in more {
            refusal(&image);
            mark.remove().unwrap();
        }
        assert!(!image.with_file_name("web.raw.frozen").exists());
        drop(create().unwrap());
        open(&image, false).unwrap();
        // What an operator leaves who removes the file only.
        fs::create_dir(image.with_file_name("web.raw.frozen")).unwrap();
        open(&image, false).unwrap();
    }

    #[test]
    fn copies_in_the_folder_of_a_snapshot_are_frozen() {
        let dir = tempfile::tempdir().unwrap();
        let file = |name: &str| {
            let path = dir.path().join(name);
            fs::write(&path, [1; 512]).unwrap();
            path
        };
        let copy = file("disk-0.raw");
        for name in SNAPSHOT_FILES {
            check_writable(&copy).unwrap();
            file(name);
        }
        assert!(refusal(&copy).contains("it is a disk in the snapshot in"));
        for other in [
            "disk-.raw",
            "disk-x.raw",
            "disk-0.raw.overlay-1.qcow2",
            "my-disk-0.raw",
        ] {
            check_writable(&file(other)).unwrap();
        }
    }

    #[test]
    fn images_below_a_frozen_one_are_those_of_its_folder() {
        let [dir, other] = [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()];
        let golden = image(other.path());
        let base = |path: &Path, format| BaseImage {
            path: path.to_owned(),
            format,
            backing_files: true,
            image_dirs: vec![golden.parent().unwrap().to_owned()],
            lock: LockMode::ByteRange,
        };
        let first = dir.path().canonicalize().unwrap().join("first.qcow2");
        let lock = LockMode::ByteRange;
        let raw = base(&golden, ImageFormat::Raw);
        drop(CreatedImage::create_on(&raw, &first, 4096, lock).unwrap());
        let (_, second) = beside(&first, "2").unwrap();
        let below = base(&first, ImageFormat::Qcow2);
        drop(below.create_overlay(&second).unwrap());
        let all = base(&second, ImageFormat::Qcow2).in_folder();
        assert_eq!(all, [second, first]);
        assert_eq!(raw.in_folder(), [golden]);
    }
}
