//! Images that others build on, by their content: whether two hosts have the same base.
//!
//! A base has the same identity at two hosts if a guest reads the same from it, whatever its format, its
//! clusters and its holes. It is read once for that: the identity holds for as long as no file that it was
//! read from changes.

use std::fs::File;
use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use memory::PageBuffer;
use sha2::{Digest as _, Sha256};

use super::extents::all_extents;
use super::image::{Image, ImageError, Opening, contained};
use super::overlay::BaseImage;

/// Bytes that are hashed together; those that are all zeros are left out. A part of the identity.
const CHUNK: usize = 64 << 10;
/// Separates this use of the hash from all others.
const TITLE: &[u8] = b"whimbrel base image 1\n";
/// A file that was changed less than this ago may be changed again without a new time: file systems count
/// in ticks of some milliseconds, or in seconds.
const SETTLED: Duration = Duration::from_secs(3);

/// Identity of what a guest reads from an image: its size, and a SHA-256 of its content.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ContentId {
    /// Bytes of the disk.
    pub size: u64,
    /// The hash.
    pub sha256: [u8; 32],
}

/// A file in the version that was read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct FileVersion {
    device: u64,
    inode: u64,
    size: u64,
    /// Seconds and nanoseconds: of the content, and of the file's attributes, which no program can set.
    modified: (i64, i64),
    changed: (i64, i64),
}

impl FileVersion {
    fn of(file: &File) -> io::Result<Self> {
        let found = file.metadata()?;
        Ok(Self {
            device: found.dev(),
            inode: found.ino(),
            size: found.size(),
            modified: (found.mtime(), found.mtime_nsec()),
            changed: (found.ctime(), found.ctime_nsec()),
        })
    }

    fn is_settled(&self, now: SystemTime) -> bool {
        let age = |(seconds, nanoseconds): (i64, i64)| {
            let whole = Duration::from_secs(u64::try_from(seconds).ok()?);
            let part = Duration::from_nanos(u64::try_from(nanoseconds).ok()?);
            now.duration_since(UNIX_EPOCH + whole + part).ok()
        };
        let is_old = |at| age(at).is_some_and(|age| age >= SETTLED);
        is_old(self.modified) && is_old(self.changed)
    }
}

/// The files of an image, in the versions that were read: its own and those below it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ImageVersion(Vec<FileVersion>);

impl ImageVersion {
    /// The files of an image that are below it.
    pub(super) fn below(image: &Image) -> io::Result<Self> {
        let files: io::Result<Vec<_>> = image.named_files(FileVersion::of).into_iter().collect();
        Ok(Self(files?))
    }

    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub(super) fn of(image: &Image) -> io::Result<Self> {
        let mut files = vec![FileVersion::of(image.file())?];
        files.extend(Self::below(image)?.0);
        Ok(Self(files))
    }

    /// Whether a later change of a file would show: the identity of the image can be remembered.
    #[must_use]
    pub fn is_settled(&self) -> bool {
        let now = SystemTime::now();
        self.0.iter().all(|file| file.is_settled(now))
    }
}

/// A base that is open: no cooperating program writes to it.
pub struct OpenBase {
    image: Image,
    version: ImageVersion,
}

impl BaseImage {
    /// Opens the image, and those below it, and locks them for reading.
    ///
    /// # Errors
    /// It is not usable, or is in use by one who writes.
    pub fn open(&self) -> Result<OpenBase, ImageError> {
        let image = Image::open(self.opening())?;
        let version =
            ImageVersion::of(&image).map_err(|error| super::overlay::failed(&self.path, error))?;
        Ok(OpenBase { image, version })
    }

    pub(super) fn opening(&self) -> Opening {
        Opening {
            path: self.path.clone(),
            readonly: true,
            direct: false,
            format: Some(self.format),
            is_detected: false,
            backing_files: self.backing_files,
            data_files: false,
            directories: self.image_dirs.clone(),
            lock: self.lock,
            is_incoming: false,
        }
    }
}

impl OpenBase {
    /// The versions of its files when it was opened.
    #[must_use]
    pub fn version(&self) -> &ImageVersion {
        &self.version
    }

    /// Path of the image.
    #[must_use]
    pub fn path(&self) -> &Path {
        self.image.path()
    }

    /// Bytes of the disk.
    ///
    /// # Errors
    /// The host cannot say.
    pub fn size(&self) -> io::Result<u64> {
        self.image.size()
    }

    /// Reads the whole image, and returns its identity; `None` if `goes_on`, which is called with the number
    /// of bytes that are done, returns false.
    ///
    /// # Errors
    /// The image cannot be read, or a file of it was changed meanwhile.
    pub fn identify(&self, mut goes_on: impl FnMut(u64) -> bool) -> io::Result<Option<ContentId>> {
        let size = self.image.size()?;
        let mut hash = Sha256::new();
        hash.update(TITLE);
        hash.update(size.to_le_bytes());
        let mut chunk = PageBuffer::new(CHUNK);
        // The first chunk that is not read yet: ranges may share one.
        let mut next = 0;
        // One after the other: an image of a few megabytes can have tables of more than fit into memory.
        let mut extents = all_extents(&self.image, size);
        while let Some(extent) = contained(|| extents.next().transpose())? {
            if !extent.counts {
                // Zeros, which are not read.
                if !goes_on(extent.at) {
                    return Ok(None);
                }
                continue;
            }
            next = next.max(extent.at / CHUNK as u64);
            while next * (CHUNK as u64) < extent.at + extent.len {
                let at = next * CHUNK as u64;
                if !goes_on(at) {
                    return Ok(None);
                }
                let len = usize::try_from(size - at).map_or(CHUNK, |left| left.min(CHUNK));
                let data = chunk.get_mut(..len).unwrap_or_default();
                contained(|| self.image.read_at(data, at))?;
                if data.iter().any(|byte| *byte != 0) {
                    hash.update(next.to_le_bytes());
                    hash.update(&*data);
                }
                next += 1;
            }
        }
        if ImageVersion::of(&self.image)? != self.version {
            let why = format!("{} was changed while it was read", self.path().display());
            return Err(io::Error::other(why));
        }
        let sha256 = hash.finalize().into();
        Ok(Some(ContentId { size, sha256 }))
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt as _;
    use std::process::Command;

    use devices::host_file::LockMode;

    use super::super::{CreatedImage, ImageFormat};
    use super::*;

    const SIZE: u64 = 3 << 20;

    fn base(path: &Path, format: ImageFormat) -> BaseImage {
        BaseImage {
            path: path.to_owned(),
            format,
            backing_files: false,
            image_dirs: Vec::new(),
            lock: LockMode::ByteRange,
        }
    }

    fn identity(path: &Path, format: ImageFormat) -> ContentId {
        let open = base(path, format).open().unwrap();
        open.identify(|_| true).unwrap().unwrap()
    }

    #[test]
    fn identity_is_that_of_the_content_in_any_format() {
        let dir = tempfile::tempdir().unwrap();
        let [raw, full, qcow2, other] =
            ["raw", "full", "qcow2", "other"].map(|name| dir.path().join(name));
        let file = File::create_new(&raw).unwrap();
        file.set_len(SIZE).unwrap();
        file.write_all_at(&[7; 512], 65536 - 512).unwrap();
        file.write_all_at(&[8; 70000], SIZE - 70000).unwrap();
        let one = identity(&raw, ImageFormat::Raw);
        assert_eq!(one.size, SIZE);
        // Frozen: hosts of other versions compare with it.
        let hex: String = one.sha256[..8]
            .iter()
            .map(|byte| format!("{byte:02x}"))
            .collect();
        assert_eq!(hex, "0e138441da042a7d");
        // Without holes.
        std::fs::write(&full, std::fs::read(&raw).unwrap()).unwrap();
        assert_eq!(identity(&full, ImageFormat::Raw), one);
        let convert = ["convert", "-f", "raw", "-O", "qcow2", "-c"];
        let run = Command::new("qemu-img")
            .args(convert)
            .args([&raw, &qcow2])
            .status();
        assert!(run.unwrap().success());
        assert_eq!(identity(&qcow2, ImageFormat::Qcow2), one);
        // One bit, one place and one size.
        for change in 0..3 {
            let mut bytes = std::fs::read(&raw).unwrap();
            match change {
                0 => bytes[65535] ^= 1,
                1 => bytes.swap(65535, 65536),
                _ => bytes.extend([0; 512]),
            }
            std::fs::write(&other, bytes).unwrap();
            assert_ne!(identity(&other, ImageFormat::Raw), one, "{change}");
        }
    }

    #[test]
    fn changes_of_a_base_show() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("base");
        let file = File::create_new(&path).unwrap();
        file.set_len(SIZE).unwrap();
        file.write_all_at(&[7; 512], 0).unwrap();
        let open = base(&path, ImageFormat::Raw).open().unwrap();
        // Just made: a change in this tick of the clock would not show later.
        assert!(!open.version().is_settled());
        assert_eq!(open.identify(|_| false).unwrap(), None);
        // Also where there is nothing to read.
        let mut at = Vec::new();
        let goes_on = |offset| {
            at.push(offset);
            at.len() < 2
        };
        assert_eq!(open.identify(goes_on).unwrap(), None);
        assert!(at[1] >= 4096, "behind the content: {at:?}");
        assert!(open.identify(|_| true).unwrap().is_some());
        file.set_len(SIZE + 512).unwrap();
        assert!(open.identify(|_| true).is_err());
        let old = SystemTime::now() - SETTLED * 2;
        let version = FileVersion {
            modified: (1, 0),
            changed: (1, 0),
            ..FileVersion::of(&file).unwrap()
        };
        assert!(version.is_settled(old));
        // One who writes to it.
        drop(open);
        let other = Image::open(Opening {
            readonly: false,
            ..base(&path, ImageFormat::Raw).opening()
        });
        let _other = other.unwrap();
        assert!(base(&path, ImageFormat::Raw).open().is_err());
    }

    #[test]
    fn image_on_a_base_that_changes_is_not_synced() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().canonicalize().unwrap().join("base");
        let file = File::create_new(&path).unwrap();
        file.set_len(SIZE).unwrap();
        file.write_all_at(&[7; 512], 4096).unwrap();
        let base = base(&path, ImageFormat::Raw);
        let open = base.open().unwrap();
        let overlay = dir.path().join("overlay");
        let made = CreatedImage::create_on(&base, &overlay, SIZE, LockMode::ByteRange).unwrap();
        assert!(made.has_base() && made.is_on(open.version()));
        // Zeros hide what the base has.
        made.zero(4096, 512).unwrap();
        made.sync().unwrap();
        // By a program that does not look at locks.
        file.set_len(SIZE * 2).unwrap();
        assert!(made.sync().is_err());
        assert!(!made.is_on(base.open().unwrap().version()));
        drop(made);
        let image = Image::open(Opening {
            path: overlay,
            backing_files: true,
            format: Some(ImageFormat::Qcow2),
            ..base.opening()
        });
        let mut sector = [1; 512];
        image.unwrap().read_at(&mut sector, 4096).unwrap();
        assert_eq!(sector, [0; 512]);
    }
}
