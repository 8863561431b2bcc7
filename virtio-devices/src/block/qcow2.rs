//! Opening qcow2 images: what their headers say is checked before the library acts on it, and the
//! files that they name are opened read-only, below allowed directories.
//!
//! Format: QEMU's docs/interop/qcow2.rst.

use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use devices::host_file::lock::{self, Lockable};
use devices::host_file::{FileKind, LockMode, Request};
use imago::file::File as Storage;
use imago::format::Format;
use imago::format::gate::ImplicitOpenGate;
use imago::qcow2::Qcow2;
use imago::{FormatAccess, FormatDriverBuilder, StorageOpenOptions};
use parking_lot::Mutex;

use super::format::ImageFormat;
use super::image::{ImageError, Opening, contained};
use super::incomplete;

/// Images below an image.
pub const MAX_BACKING: usize = 32;
/// Bytes of an L1 table, and clusters of a refcount table: QEMU's limits.
const MAX_L1: u64 = 32 << 20;
const MAX_REFCOUNT_TABLE: u64 = 8 << 20;
/// Bytes of header extensions that are read.
const MAX_EXTENSIONS: u64 = 1 << 16;
/// The extension that names the format of the backing file.
const BACKING_FORMAT: u32 = 0xe279_2aca;

/// The fields of a header that say how large and where things are.
struct Header {
    version: u32,
    backing_file: u64,
    cluster_bits: u32,
    size: u64,
    crypt_method: u32,
    l1_entries: u64,
    l1_table: u64,
    refcount_table: u64,
    refcount_clusters: u64,
    header_len: u64,
}

impl Header {
    fn read(file: &File) -> io::Result<Self> {
        let mut raw = [0; 72];
        file.read_exact_at(&mut raw, 0)?;
        let word = |at: usize| raw.get(at..at + 4).and_then(|b| b.try_into().ok());
        let u32_at = |at| word(at).map_or(0, u32::from_be_bytes);
        let u64_at = |at| u64::from(u32_at(at)) << 32 | u64::from(u32_at(at + 4));
        let version = u32_at(4);
        let header_len = match version {
            0..=2 => 72,
            _ => {
                let mut len = [0; 4];
                file.read_exact_at(&mut len, 100)?;
                u32::from_be_bytes(len).into()
            }
        };
        Ok(Self {
            version,
            backing_file: u64_at(8),
            cluster_bits: u32_at(20),
            size: u64_at(24),
            crypt_method: u32_at(32),
            l1_entries: u32_at(36).into(),
            l1_table: u64_at(40),
            refcount_table: u64_at(48),
            refcount_clusters: u32_at(56).into(),
            header_len,
        })
    }

    /// Returns the fault of the header in an image of `len` bytes, if any.
    fn problem(&self, len: u64) -> Option<String> {
        if !(2..=3).contains(&self.version) {
            return Some(format!("version {} is not 2 or 3", self.version));
        }
        if self.crypt_method != 0 {
            return Some("it is encrypted".to_owned());
        }
        if !(9..=21).contains(&self.cluster_bits) {
            let bits = self.cluster_bits;
            return Some(format!(
                "its cluster size, 2^{bits} bytes, is not 2^9 to 2^21"
            ));
        }
        let cluster = 1_u64 << self.cluster_bits;
        // An entry of the L1 table maps a cluster of entries of 8 bytes.
        let needed = self.size.div_ceil(cluster * cluster / 8);
        if needed > MAX_L1 / 8 {
            let most = (MAX_L1 / 8).saturating_mul(cluster * cluster / 8);
            let size = self.size;
            return Some(format!(
                "its virtual size of {size} bytes is more than clusters of {cluster} bytes can \
                 map, {most}"
            ));
        }
        if self.l1_entries < needed || self.l1_entries > MAX_L1 / 8 {
            let (entries, most) = (self.l1_entries, MAX_L1 / 8);
            return Some(format!(
                "its L1 table has {entries} entries, and needs {needed} to {most}"
            ));
        }
        if self.refcount_clusters == 0 || self.refcount_clusters * cluster > MAX_REFCOUNT_TABLE {
            let clusters = self.refcount_clusters;
            return Some(format!(
                "its refcount table has {clusters} clusters; it must have 1 to {}",
                MAX_REFCOUNT_TABLE / cluster
            ));
        }
        let l1 = (self.l1_table, self.l1_entries * 8);
        let refcounts = (self.refcount_table, self.refcount_clusters * cluster);
        let tables = [("L1 table", l1), ("refcount table", refcounts)];
        for (name, (at, bytes)) in tables {
            // Cluster 0 has the header. A file may end within its last cluster.
            let end = at.checked_add(bytes);
            let fits = end.is_some_and(|end| end <= len.next_multiple_of(cluster));
            if bytes > 0 && (!at.is_multiple_of(cluster) || at < cluster || !fits) {
                return Some(format!(
                    "its {name}, {bytes} bytes at {at:#x}, is not aligned to clusters of \
                     {cluster} bytes, or not between the header and the end of the file at {len}"
                ));
            }
        }
        // Both ends are within the file, as was just checked.
        let overlap = l1.0 < refcounts.0 + refcounts.1 && refcounts.0 < l1.0 + l1.1;
        overlap.then(|| {
            let (l1, refcounts) = (l1.0, refcounts.0);
            format!("its L1 table at {l1:#x} overlaps its refcount table at {refcounts:#x}")
        })
    }

    /// Whether the header names the format of its backing file, if it has one. Without that the library
    /// would detect it, in a file that a guest may have written.
    fn says_backing_format(&self, file: &File) -> io::Result<bool> {
        if self.backing_file == 0 {
            return Ok(true);
        }
        let mut at = self.header_len;
        while at < self.header_len.saturating_add(MAX_EXTENSIONS) {
            let mut extension = [0; 8];
            file.read_exact_at(&mut extension, at)?;
            let [k0, k1, k2, k3, len @ ..] = extension;
            match u32::from_be_bytes([k0, k1, k2, k3]) {
                BACKING_FORMAT => return Ok(true),
                0 => return Ok(false),
                _ => {}
            }
            let len = u64::from(u32::from_be_bytes(len)).next_multiple_of(8);
            at = at.saturating_add(8 + len);
        }
        Ok(false)
    }
}

/// Refuses headers that cannot be, or that leave something to be detected.
fn check_header(file: &File) -> Result<(), String> {
    let unreadable = |error: io::Error| format!("its header cannot be read: {error}");
    let header = Header::read(file).map_err(unreadable)?;
    let len = (&mut &*file).seek(SeekFrom::End(0)).map_err(unreadable)?;
    match header.problem(len) {
        Some(problem) => Err(problem),
        None if header.says_backing_format(file).map_err(unreadable)? => Ok(()),
        None => Err(
            "it does not name the format of its backing file; set it with `qemu-img rebase -u -F \
             FORMAT`"
                .to_owned(),
        ),
    }
}

/// An image, and the files that it names.
pub(super) struct Opened {
    pub(super) image: FormatAccess<Storage>,
    /// Locked, unless another machine still has them.
    pub(super) below: Vec<Lockable>,
    /// The image right below it, by its real path, if its format is one that is served.
    pub(super) base: Option<(PathBuf, ImageFormat)>,
}

/// Opens an image, of which `file` is open and locked, and locks the files that it names, unless another
/// machine still has them.
pub(super) fn open(how: &Opening, file: &File) -> Result<Opened, ImageError> {
    let unusable = |why: String| ImageError::Format {
        path: how.path.clone(),
        why: format!("cannot be used as qcow2: {why}"),
    };
    let failed = |source: io::Error| unusable(source.to_string());
    check_header(file).map_err(unusable)?;
    let options = StorageOpenOptions::new()
        .filename(&how.path)
        .write(!how.readonly)
        .direct(how.direct);
    let storage = Storage::from_open_file(how.open_again(file)?, options).map_err(failed)?;
    let builder = Qcow2::<Storage>::builder(storage).write(!how.readonly);
    let shared = Arc::new(Mutex::new(Below {
        lock: (!how.is_incoming).then_some(how.lock),
        locked: Vec::new(),
        base: None,
        refused: None,
    }));
    let gate = Gate {
        how,
        directories: Arc::new(directories(how)),
        below: Arc::clone(&shared),
        opened: None,
        seen: vec![how.path.canonicalize().map_err(failed)?],
    };
    let opened = contained(|| builder.open(gate));
    let mut below = shared.lock();
    if let Some(refused) = below.refused.take() {
        return Err(refused);
    }
    let opened = opened.map_err(failed)?;
    Ok(Opened {
        image: FormatAccess::new(opened),
        below: std::mem::take(&mut below.locked),
        base: below.base.take(),
    })
}

/// The directories below which the image may name files, as the host knows them.
fn directories(how: &Opening) -> Vec<PathBuf> {
    let own = match how.path.parent() {
        Some(parent) if parent.as_os_str().is_empty() => Path::new("."),
        Some(parent) => parent,
        None => Path::new("/"),
    };
    let all = how.directories.iter().map(PathBuf::as_path).chain([own]);
    all.filter_map(|directory| directory.canonicalize().ok())
        .collect()
}

/// Images found below an image while it was opened.
struct Below {
    /// How files are locked, if they are.
    lock: Option<LockMode>,
    locked: Vec<Lockable>,
    base: Option<(PathBuf, ImageFormat)>,
    /// The reason of a refusal: the library passes on texts only.
    refused: Option<ImageError>,
}

/// Decides about each file that an image names.
struct Gate<'a> {
    how: &'a Opening,
    directories: Arc<Vec<PathBuf>>,
    below: Arc<Mutex<Below>>,
    /// The file that was opened last, of which the format is opened next.
    opened: Option<File>,
    /// The images from the top down to this one.
    seen: Vec<PathBuf>,
}

impl Gate<'_> {
    fn refuse(&self, refused: ImageError) -> io::Error {
        let error = io::Error::other(refused.to_string());
        self.below.lock().refused.get_or_insert(refused);
        error
    }

    /// The image whose file is being opened.
    fn image(&self) -> PathBuf {
        self.seen.last().unwrap_or(&self.how.path).clone()
    }

    fn refuse_format(&self, why: String) -> io::Error {
        let path = self.image();
        self.refuse(ImageError::Format { path, why })
    }

    /// The file, as the host knows it, if the image may name it.
    fn allowed(&self, named: &Path) -> io::Result<PathBuf> {
        let unusable = |error| self.refuse_format(format!("names {}: {error}", named.display()));
        let real = named.canonicalize().map_err(unusable)?;
        if self.seen.contains(&real) {
            return Err(self.refuse_format("is its own backing file".to_owned()));
        }
        let is_below = |directory: &PathBuf| real.starts_with(directory);
        if !self.directories.iter().any(is_below) {
            let path = self.image();
            let named = named.to_owned();
            return Err(self.refuse(ImageError::Outside { path, named }));
        }
        Ok(real)
    }

    /// Opens a file that the image names: read-only, and not through a link that was put there after its
    /// path was checked.
    fn open_named(&self, real: &Path) -> io::Result<File> {
        let request = Request {
            no_links: true,
            ..Request::read(real, &[FileKind::Regular, FileKind::BlockDevice])
        };
        let file = request.open().map_err(|error| self.refuse(error.into()))?;
        incomplete::check(real).map_err(|error| self.refuse(error))?;
        Ok(file)
    }

    /// Opens like [`Gate::open_named`], and locks the file.
    fn open_locked(&self, real: &Path) -> io::Result<File> {
        let file = self.open_named(real)?;
        let lockable = Lockable(file.try_clone()?);
        let mode = self.below.lock().lock;
        if let Some(mode) = mode {
            let taken = lock::take(&lockable.0, real, true, mode);
            taken.map_err(|error| self.refuse(error.into()))?;
            self.below.lock().locked.push(lockable);
        }
        Ok(file)
    }
}

impl ImplicitOpenGate<Storage> for Gate<'_> {
    fn open_format<F: FormatDriverBuilder<Storage>>(
        &mut self,
        builder: F,
    ) -> io::Result<FormatAccess<Storage>> {
        let real = builder
            .get_image_path()
            .ok_or_else(|| self.refuse_format("has a backing file without a name".to_owned()))?;
        if self.seen.len() > MAX_BACKING {
            return Err(self.refuse_format(format!("has more than {MAX_BACKING} backing files")));
        }
        if self.seen.len() == 1 {
            let format = match F::FORMAT {
                Format::Raw => Some(ImageFormat::Raw),
                Format::Qcow2 => Some(ImageFormat::Qcow2),
                _ => None,
            };
            self.below.lock().base = format.map(|format| (real.clone(), format));
        }
        let mut seen = self.seen.clone();
        seen.push(real.clone());
        let below = Gate {
            how: self.how,
            directories: Arc::clone(&self.directories),
            below: Arc::clone(&self.below),
            opened: None,
            seen,
        };
        if F::FORMAT == Format::Qcow2 {
            // The file that the builder has, and not what its path names by now.
            let file = self.opened.take();
            let file = file.ok_or_else(|| self.refuse_format("has no backing file".to_owned()))?;
            let wrong = |why| below.refuse_format(format!("cannot be used as qcow2: {why}"));
            check_header(&file).map_err(wrong)?;
        }
        Ok(FormatAccess::new(builder.open(below)?))
    }

    fn open_storage(&mut self, options: StorageOpenOptions) -> io::Result<Storage> {
        // The library asks for a data file to write to it, and never so for a backing file.
        let is_data = options.get_writable();
        let how = self.how;
        let path = self.image();
        if is_data && !how.data_files {
            return Err(self.refuse(ImageError::Data { path }));
        }
        if !is_data && !how.backing_files {
            return Err(self.refuse(ImageError::Backing { path }));
        }
        if is_data && !how.readonly && self.seen.len() == 1 {
            let why =
                "has an external data file, which is opened read-only: set `readonly` for the disk";
            return Err(self.refuse_format(why.to_owned()));
        }
        let named = options
            .get_filename()
            .ok_or_else(|| self.refuse_format("has a data file without a name".to_owned()))?;
        let real = self.allowed(named)?;
        let file = self.open_locked(&real)?;
        self.opened = Some(file.try_clone()?);
        // Relative names in it are relative to where it is.
        let options = StorageOpenOptions::new().filename(&real).write(false);
        Storage::from_open_file(file, options)
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use rustix::fs::{CWD, FileType, Mode, mknodat};

    use super::super::create::create_file;
    use super::super::image::Image;
    use super::*;

    /// The file was checked and locked. What is at its path by then is neither opened nor waited for.
    #[test]
    fn image_that_was_replaced_is_not_opened() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk");
        for (direct, format) in [
            (false, ImageFormat::Qcow2),
            (true, ImageFormat::Qcow2),
            (true, ImageFormat::Raw),
        ] {
            create_file(&path, format, 1 << 20, None).unwrap();
            let how = Opening {
                path: path.clone(),
                readonly: false,
                direct,
                format: Some(format),
                is_detected: false,
                backing_files: false,
                data_files: false,
                directories: Vec::new(),
                lock: LockMode::ByteRange,
                is_incoming: true,
            };
            let image = Image::open(how.clone()).unwrap();
            let replaced = || match format {
                ImageFormat::Qcow2 => image.take_over(),
                ImageFormat::Raw => how.open_again(image.file()).map(drop),
            };
            // A file with the same content, and one that nobody writes.
            let old = dir.path().join("old");
            fs::rename(&path, &old).unwrap();
            fs::copy(&old, &path).unwrap();
            let why = replaced().unwrap_err().to_string();
            assert!(why.contains("replaced"), "{why}");
            fs::remove_file(&path).unwrap();
            mknodat(CWD, &path, FileType::Fifo, Mode::from_raw_mode(0o600), 0).unwrap();
            let why = replaced().unwrap_err().to_string();
            assert!(why.contains("FIFO"), "{why}");
            fs::rename(&old, &path).unwrap();
            replaced().unwrap();
            drop(image);
            fs::remove_file(&path).unwrap();
        }
    }
}
