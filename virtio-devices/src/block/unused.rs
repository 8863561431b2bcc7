//! Overlays that nothing uses any more: found beside their image, and removed for an operator.
//!
//! An overlay may go if all of these hold:
//! - No VM or tool has it open: its lock is free, and it is held while the overlay is removed.
//! - No image in the directory is on top of it.
//! - No snapshot needs it: there is neither a [record](record_snapshot) of one beside it, nor a
//!   [mark](super::FrozenMark) that it is frozen.

use std::fs::{self, DirEntry, File};
use std::io;
use std::os::unix::fs::{FileExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};

use devices::host_file::lock::{self, Lockable};
use devices::host_file::{FileKind, Identity, LockMode, OpenError, Request};

use super::create::write_note;
use super::frozen;
use super::image::ImageError;
use super::overlay::{OVERLAY_MARK, failed};

/// Entries of a directory that are looked at.
const MAX_ENTRIES: usize = 1 << 16;
/// Bytes of the name of a backing file (QEMU's docs/interop/qcow2.rst).
const MAX_NAME: usize = 1023;
/// Bytes of a record that are shown.
const MAX_RECORD: usize = 4096;
/// Between the name of an overlay and the identity of a snapshot that needs it.
const RECORD_MARK: &str = ".snapshot-";

/// How an overlay is used.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum OverlayUse {
    /// By nothing.
    Unused,
    /// A process has it open: which, as far as the host shows it.
    Open(String),
    /// By this image on top of it.
    Backing(PathBuf),
    /// By a snapshot: the record of it, and the record's text.
    Snapshot(PathBuf, String),
}

/// An overlay beside an image.
#[derive(Debug)]
pub struct FoundOverlay {
    /// Its path.
    pub path: PathBuf,
    /// Bytes that it takes on the disk.
    pub bytes: u64,
    /// How it is used.
    pub used: OverlayUse,
    /// Locked as an image that is written, while nothing uses it: no VM can open it meanwhile.
    locked: Option<Lockable>,
}

impl FoundOverlay {
    /// Removes the overlay, unless something uses it. Returns whether it is gone.
    ///
    /// # Errors
    /// The host refuses.
    pub fn remove(&mut self) -> Result<bool, ImageError> {
        if self.locked.is_none() || self.used != OverlayUse::Unused {
            return Ok(false);
        }
        fs::remove_file(&self.path).map_err(|error| failed(&self.path, error))?;
        frozen::forget(&self.path);
        self.locked = None;
        Ok(true)
    }
}

fn odd(path: &Path, why: impl Into<String>) -> ImageError {
    ImageError::Format {
        path: path.to_owned(),
        why: why.into(),
    }
}

/// Finds the overlays beside an image, which may be gone, or beside one of its overlays. A link is followed.
/// Overlays that nothing uses, and that `may_go`, are locked until the result is dropped, and can be removed.
///
/// # Errors
/// The directory cannot be read. An image there has a backing file that cannot be read: it could be one of the
/// overlays.
pub fn find_overlays(
    image: &Path,
    may_go: &dyn Fn(&Path) -> bool,
) -> Result<Vec<FoundOverlay>, ImageError> {
    // Overlays are beside the file that a link leads to.
    let real = image.canonicalize();
    let image = real.as_deref().unwrap_or(image);
    let name = image.file_name().and_then(|name| name.to_str());
    let name =
        name.ok_or_else(|| odd(image, "has no name in UTF-8, as all images with overlays"))?;
    let (stem, _) = name.split_once(OVERLAY_MARK).unwrap_or((name, ""));
    let dir = image.parent().unwrap_or(Path::new("/"));
    let dir = dir.canonicalize().map_err(|error| failed(dir, error))?;
    let entries = fs::read_dir(&dir).map_err(|error| failed(&dir, error))?;
    let mut files = Vec::new();
    for entry in entries {
        if files.len() == MAX_ENTRIES {
            return Err(odd(&dir, format!("has more than {MAX_ENTRIES} entries")));
        }
        files.push(entry.map_err(|error| failed(&dir, error))?);
    }
    let start = format!("{stem}{OVERLAY_MARK}");
    let is_overlay = |entry: &&DirEntry| {
        let name = entry.file_name();
        let name = name.to_str().unwrap_or("");
        name.starts_with(&start) && name.ends_with(".qcow2")
    };
    let mut found = Vec::new();
    for entry in files.iter().filter(is_overlay) {
        found.extend(look_at(entry.path(), may_go)?);
    }
    // Behind the locks: an image that is put on top of an overlay now finds it in use.
    for entry in &files {
        note_backing(&entry.path(), &mut found)?;
    }
    for overlay in &mut found {
        note_records(overlay, &files);
    }
    found.sort_by(|a, b| a.path.cmp(&b.path));
    Ok(found)
}

/// Opens a file of the directory; `None` for what is no file, and for one that was removed meanwhile.
fn open_file(path: &Path) -> Result<Option<File>, OpenError> {
    if !fs::symlink_metadata(path).is_ok_and(|metadata| metadata.is_file()) {
        return Ok(None);
    }
    // Without waiting: it may be a FIFO by now.
    match Request::read(path, &[FileKind::Regular]).open() {
        Ok(file) => Ok(Some(file)),
        Err(OpenError::Host { source, .. }) if source.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

/// Finds who uses an overlay. Locks it if nobody does and it `may_go`; else no user meets a lock here. There is
/// none if the path is no file.
fn look_at(
    path: PathBuf,
    may_go: &dyn Fn(&Path) -> bool,
) -> Result<Option<FoundOverlay>, ImageError> {
    let Some(file) = open_file(&path)? else {
        return Ok(None);
    };
    let host = |error| failed(&path, error);
    let metadata = file.metadata().map_err(host)?;
    let (used, locked) = if lock::is_marked(&file).map_err(host)? {
        let maker = "an operation that makes it".to_owned();
        (OverlayUse::Open(maker), None)
    } else if let Some(user) = lock::user(&file).map_err(host)? {
        (OverlayUse::Open(user), None)
    } else if may_go(&path) {
        match lock::take(&file, &path, false, LockMode::ByteRange) {
            Ok(()) => (OverlayUse::Unused, Some(Lockable(file))),
            Err(lock::LockError::Held { holder, .. }) => (OverlayUse::Open(holder), None),
            Err(error) => return Err(error.into()),
        }
    } else {
        (OverlayUse::Unused, None)
    };
    Ok(Some(FoundOverlay {
        path,
        // Of 512 bytes each, whatever the file system's blocks are.
        bytes: metadata.blocks().saturating_mul(512),
        used,
        locked,
    }))
}

/// Notes that an image is on top of one of the overlays.
fn note_backing(path: &Path, found: &mut [FoundOverlay]) -> Result<(), ImageError> {
    let Some(below) = backing(path)? else {
        return Ok(());
    };
    let Some(identity) = Identity::of(&below) else {
        return Ok(());
    };
    for overlay in found {
        let is_it = Identity::of(&overlay.path) == Some(identity.clone());
        if is_it && overlay.used == OverlayUse::Unused {
            overlay.used = OverlayUse::Backing(path.to_owned());
        }
    }
    Ok(())
}

/// Returns the path of the backing file of an image; `None` if the file is no qcow2 image or has none.
fn backing(path: &Path) -> Result<Option<PathBuf>, ImageError> {
    let Some(file) = open_file(path)? else {
        return Ok(None);
    };
    let mut head = [0; 20];
    match file.read_exact_at(&mut head, 0) {
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(None),
        read => read.map_err(|error| failed(path, error))?,
    }
    let [magic, _, high, low, len] = std::array::from_fn(|word| {
        let word = head.get(4 * word..4 * word + 4);
        word.and_then(|word| word.try_into().ok())
            .map_or(0, u32::from_be_bytes)
    });
    let (offset, len) = (u64::from(high) << 32 | u64::from(low), len as usize);
    if magic != u32::from_be_bytes(*b"QFI\xfb") || offset == 0 || len == 0 {
        return Ok(None);
    }
    if len > MAX_NAME {
        return Err(odd(
            path,
            format!("has a backing file's name of {len} bytes"),
        ));
    }
    let mut name = vec![0; len];
    file.read_exact_at(&mut name, offset)
        .map_err(|error| failed(path, error))?;
    let name = String::from_utf8(name).map_err(|_| odd(path, "has a backing file not in UTF-8"))?;
    let name = name.strip_prefix("file:").unwrap_or(&name);
    // QEMU takes what is before a colon for a protocol, unless a slash is before it.
    let head = name.split('/').next().unwrap_or("");
    if head.contains(':') {
        let why = format!("has the backing file {name:?}, which may be any file");
        return Err(odd(path, why));
    }
    let dir = path.parent().unwrap_or(Path::new("/"));
    Ok(Some(dir.join(name)))
}

fn note_records(overlay: &mut FoundOverlay, files: &[DirEntry]) {
    if overlay.used == OverlayUse::Unused
        && let Some((mark, text)) = frozen::first_mark(&overlay.path)
    {
        overlay.used = OverlayUse::Snapshot(mark, text);
        return;
    }
    let name = overlay.path.file_name().unwrap_or_default();
    let start = format!("{}{RECORD_MARK}", name.to_string_lossy());
    let record = files.iter().find(|entry| {
        let name = entry.file_name();
        name.to_string_lossy().starts_with(&start)
    });
    if let Some(record) = record
        && overlay.used == OverlayUse::Unused
    {
        let path = record.path();
        let text = Request::read(&path, &[FileKind::Regular]).open();
        let mut bytes = [0; MAX_RECORD];
        let read = text.and_then(|file| {
            let read = file.read_at(&mut bytes, 0);
            read.map_err(|source| OpenError::Host {
                path: path.clone(),
                source,
            })
        });
        let text = bytes.get(..read.unwrap_or(0)).unwrap_or_default();
        let text = String::from_utf8_lossy(text).trim().to_owned();
        overlay.used = OverlayUse::Snapshot(path, text);
    }
}

/// Records, beside an overlay and durably, that a snapshot needs it: `text` says which one. Returns the path of
/// the record; `None` if the image is no overlay, which nothing removes, or is gone.
///
/// # Errors
/// The image is no file, there is such a record, or the host refuses.
pub fn record_snapshot(image: &Path, id: &str, text: &str) -> Result<Option<PathBuf>, ImageError> {
    let real = match image.canonicalize() {
        Ok(real) => real,
        // A snapshot may be older than its images.
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(failed(image, error)),
    };
    let name = real.file_name().and_then(|name| name.to_str());
    let Some(name) = name.filter(|name| name.contains(OVERLAY_MARK)) else {
        return Ok(None);
    };
    let path = real.with_file_name(format!("{name}{RECORD_MARK}{id}"));
    match write_note(&path, &format!("{text}\n")) {
        Ok(()) => Ok(Some(path)),
        Err(error) => Err(failed(&path, error)),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::super::format::ImageFormat;
    use super::super::overlay::{BaseImage, NeededOverlay, beside};
    use super::*;

    /// Makes an overlay of an image, with this end of its name.
    fn overlay(image: &Path, format: ImageFormat, suffix: &str) -> (PathBuf, NeededOverlay) {
        let base = BaseImage {
            path: image.to_owned(),
            format,
            backing_files: true,
            image_dirs: Vec::new(),
            lock: LockMode::ByteRange,
        };
        let (_, path) = beside(image, suffix).unwrap();
        let needed = base.create_overlay(&path).unwrap();
        (path, needed)
    }

    fn image(dir: &Path) -> PathBuf {
        let path = dir.canonicalize().unwrap().join("web.raw");
        File::create(&path).unwrap().set_len(1 << 20).unwrap();
        path
    }

    /// Returns the overlays that nothing uses.
    fn unused(image: &Path) -> Vec<PathBuf> {
        let found = find_overlays(image, &|_| false).unwrap();
        let unused = found
            .into_iter()
            .filter(|one| one.used == OverlayUse::Unused);
        unused.map(|one| one.path).collect()
    }

    fn use_of(image: &Path, overlay: &Path) -> OverlayUse {
        let mut found = find_overlays(image, &|_| false).unwrap().into_iter();
        found.find(|one| one.path == overlay).unwrap().used
    }

    #[test]
    fn finds_what_nothing_uses() {
        let [dir, other_dir] = [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()];
        let image = image(dir.path());
        let (first, needed) = overlay(&image, ImageFormat::Raw, "1");
        assert!(matches!(use_of(&image, &first), OverlayUse::Open(_)));
        drop(needed);
        let (second, _) = overlay(&first, ImageFormat::Qcow2, "2");
        // None of these is an overlay of the image, or a file.
        let (other, _) = overlay(&second, ImageFormat::Qcow2, "3");
        fs::rename(&other, dir.path().join("elsewhere")).unwrap();
        symlink(&first, dir.path().join("web.raw.overlay-4.qcow2")).unwrap();
        fs::create_dir(dir.path().join("web.raw.overlay-5.qcow2")).unwrap();
        assert!(unused(&image).is_empty());
        let backing = OverlayUse::Backing(second.clone());
        assert_eq!(use_of(&image, &first), backing);
        let above = dir.path().canonicalize().unwrap().join("elsewhere");
        assert_eq!(use_of(&image, &second), OverlayUse::Backing(above.clone()));
        fs::remove_file(above).unwrap();
        assert_eq!(unused(&second), std::slice::from_ref(&second));

        // A search keeps no user from its lock.
        let looked = find_overlays(&image, &|_| false).unwrap();
        let user = File::open(&second).unwrap();
        lock::take(&user, &second, true, LockMode::ByteRange).unwrap();
        drop((looked, Lockable(user)));

        // A user, and a user who comes while it is being removed.
        let user = File::open(&second).unwrap();
        lock::take(&user, &second, true, LockMode::ByteRange).unwrap();
        let mut found = find_overlays(&image, &|_| true).unwrap();
        assert!(found.iter_mut().all(|one| !one.remove().unwrap()));
        assert!(matches!(use_of(&image, &second), OverlayUse::Open(_)));
        drop(found);
        lock::release(&user);
        let mut found = find_overlays(&image, &|_| true).unwrap();
        assert!(lock::take(&user, &second, true, LockMode::ByteRange).is_err());
        let removed = found
            .iter_mut()
            .filter_map(|one| one.remove().unwrap().then_some(&one.path));
        assert_eq!(removed.collect::<Vec<_>>(), [&second]);
        drop(found);
        let link = other_dir.path().join("link");
        symlink(&image, &link).unwrap();
        assert_eq!(unused(&link), std::slice::from_ref(&first));
        // The image itself may be gone.
        fs::remove_file(&image).unwrap();
        assert_eq!(unused(&image), [first]);
    }

    #[test]
    fn record_keeps_the_image_of_a_snapshot() {
        let dir = tempfile::tempdir().unwrap();
        let image = image(dir.path());
        assert_eq!(record_snapshot(&image, "s", "s needs it").unwrap(), None);
        let gone = dir.path().join("web.raw.overlay-0.qcow2");
        assert_eq!(record_snapshot(&gone, "s", "s needs it").unwrap(), None);
        let (first, _) = overlay(&image, ImageFormat::Raw, "1");
        let record = record_snapshot(&first, "s", "s needs it").unwrap().unwrap();
        assert!(record_snapshot(&first, "s", "again").is_err());
        let used = OverlayUse::Snapshot(record.clone(), "s needs it".to_owned());
        assert_eq!(use_of(&image, &first), used);
        let mut found = find_overlays(&image, &|_| true).unwrap();
        assert!(!found.iter_mut().any(|one| one.remove().unwrap()));
        drop(found);
        fs::remove_file(record).unwrap();
        assert_eq!(unused(&image), [first]);
    }

    /// Nothing is removed beside an image that may build on anything.
    #[test]
    fn backing_file_that_may_be_any_file_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let image = image(dir.path());
        let (first, _) = overlay(&image, ImageFormat::Raw, "1");
        let other = dir.path().join("other");
        let with = |version: u32, offset: u64, len: u32, name: &[u8]| {
            let mut bytes = b"QFI\xfb".to_vec();
            bytes.extend(version.to_be_bytes());
            bytes.extend(offset.to_be_bytes());
            bytes.extend(len.to_be_bytes());
            bytes.extend(name);
            fs::write(&other, bytes).unwrap();
            find_overlays(&image, &|_| false).map(|found| found.len())
        };
        let name = b"./web.raw.overlay-1.qcow2";
        assert_eq!(with(3, 20, 25, name).unwrap(), 1);
        assert_eq!(
            use_of(&image, &first),
            OverlayUse::Backing(other.canonicalize().unwrap())
        );
        for bad in [
            with(3, 20, 26, name),
            with(3, u64::MAX, 25, name),
            with(3, 20, 1024, &[b'a'; 1024]),
            with(3, 20, 8, b"json:{}}"),
            with(3, 20, 2, &[0xff, 0xfe]),
        ] {
            let why = bad.unwrap_err().to_string();
            assert!(why.contains("other"), "{why}");
        }
        assert_eq!(with(3, 0, 0, b"").unwrap(), 1);
        assert_eq!(unused(&image), [first]);
    }
}
