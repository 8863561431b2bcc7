//! Bases of copied disks: a destination that has a base with the same content gets only what is above it.
//!
//! ```text
//!   source, before it connects      reads the base once: size and hash of what a guest reads from it
//!   offer                           name of the base's file, format, size, hash
//!   destination                     looks for a file of that name below its `--image-dir` folders and its
//!                                   storage, if the peer may name it, and reads it once
//!   equal                           the new image is a qcow2 overlay on it; else it gets everything
//! ```
//!
//! The name in the offer is a hint where to look. Nothing of a base is believed: it is the same only if this
//! side finds the same hash. All that a source learns is whether a file that it may name as a disk has the
//! content whose hash it knows.

use std::path::{Component, Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::{Duration, Instant};

use migration::{Decision, Refusal};
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use spec::{MigratedBase, VmConfig};
use virtio_devices::block::{BaseImage, ContentId, ImageVersion, LockMode, OpenBase};

use super::super::trust::Allowed;
use super::{CopiedDisk, CopiedFormat, PlannedImage, check_space};
use crate::devices::open::lock_mode;

/// Identities that are remembered.
const MAX_KNOWN: usize = 64;
/// Maximum length of the name of a base.
const MAX_NAME: usize = 255;
/// How long a source waits for a destination that reads a base for the first time. Reading continues behind
/// that, so that the next migration finds the identity.
const PATIENCE: Duration = Duration::from_secs(45);
/// How often a reader that has not ended looks whether the migration was canceled.
const PERIOD: Duration = Duration::from_millis(50);

/// Bytes of a base after which its progress is noted.
const NOTED: u64 = 64 << 20;

/// The base of a disk that is copied, in an offer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(in crate::migrate) struct OfferedBase {
    /// The name of its file at the source.
    pub(super) name: String,
    pub(super) format: CopiedFormat,
    /// Bytes of the disk that the base is.
    pub(super) size: u64,
    /// The hash of its content, in hexadecimal digits.
    pub(super) sha256: String,
    /// About how many bytes the image above it has.
    pub(super) above: u64,
}

fn hex(bytes: [u8; 32]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// The identities of bases that were read, for as long as their files stay as they are. Kept in memory: what
/// is on a disk could be put there by another.
#[derive(Default)]
pub(crate) struct KnownBases {
    known: Mutex<Vec<(ImageVersion, ContentId)>>,
    /// A base is being read for a peer: one at a time.
    is_reading: AtomicBool,
}

/// Lets the next base be read for a peer, when it is dropped.
struct Turn(Arc<KnownBases>);

impl Drop for Turn {
    fn drop(&mut self) {
        self.0.is_reading.store(false, Ordering::Release);
    }
}

impl KnownBases {
    fn find(&self, version: &ImageVersion) -> Option<ContentId> {
        let known = self.known.lock();
        let found = known.iter().find(|(of, _)| of == version);
        found.map(|(_, id)| *id)
    }

    /// Returns the identity of a base, and reads it if need be; `None` if `goes_on` ends that.
    fn identify(
        &self,
        base: &OpenBase,
        goes_on: impl FnMut(u64) -> bool,
    ) -> std::io::Result<Option<ContentId>> {
        if let Some(id) = self.find(base.version()) {
            return Ok(Some(id));
        }
        // Before the base is read: a change in the same tick of the file system's clock would not show.
        let is_settled = base.version().is_settled();
        let id = base.identify(goes_on)?;
        if let (Some(id), true) = (id, is_settled) {
            let mut known = self.known.lock();
            if known.len() >= MAX_KNOWN {
                known.remove(0);
            }
            known.push((base.version().clone(), id));
        }
        Ok(id)
    }

    /// Returns the identity of a base on behalf of a peer, which waits for at most [`PATIENCE`].
    fn identify_for_peer(
        self: &Arc<Self>,
        base: &Arc<OpenBase>,
        decision: &Decision,
    ) -> Result<ContentId, String> {
        if let Some(id) = self.find(base.version()) {
            return Ok(id);
        }
        if self.is_reading.swap(true, Ordering::AcqRel) {
            return Err("another base is being read for the first time".to_owned());
        }
        let turn = Turn(Arc::clone(self));
        let is_canceled = Arc::new(AtomicBool::new(false));
        let (done, answer) = mpsc::channel();
        let (open, cancel) = (Arc::clone(base), Arc::clone(&is_canceled));
        let read = move || {
            let id = turn.0.identify(&open, |_| !cancel.load(Ordering::Acquire));
            // First: the next disk of the same migration may need a turn.
            drop(turn);
            // Gone, if the peer does not wait any more.
            let _ = done.send(id);
        };
        let builder = std::thread::Builder::new().name("base-identity".to_owned());
        builder.spawn(read).map_err(|error| error.to_string())?;
        let deadline = Instant::now() + PATIENCE;
        loop {
            match answer.recv_timeout(PERIOD) {
                Ok(Ok(Some(id))) => return Ok(id),
                Ok(Err(error)) => return Err(error.to_string()),
                Ok(Ok(None)) | Err(RecvTimeoutError::Disconnected) => {
                    return Err("reading it was ended".to_owned());
                }
                Err(RecvTimeoutError::Timeout) if decision.is_canceled() => {
                    is_canceled.store(true, Ordering::Release);
                    return Err("an operator canceled it".to_owned());
                }
                Err(RecvTimeoutError::Timeout) if Instant::now() >= deadline => {
                    return Err(format!(
                        "reading it for the first time takes longer than {} s; the next migration \
                         can use it",
                        PATIENCE.as_secs()
                    ));
                }
                Err(RecvTimeoutError::Timeout) => {}
            }
        }
    }
}

/// Notes about the bases of a migration's disks, which its object shows.
#[derive(Default)]
pub(in crate::migrate) struct BaseNotes(Mutex<Vec<MigratedBase>>);

impl BaseNotes {
    pub(in crate::migrate) fn all(&self) -> Vec<MigratedBase> {
        self.0.lock().clone()
    }

    /// An offer that came before was refused: its notes go.
    fn clear(&self) {
        self.0.lock().clear();
    }

    fn note(&self, disk: &str, base: &str, is_left_out: bool, detail: impl Into<String>) {
        let mut notes = self.0.lock();
        notes.retain(|note| note.disk != disk);
        notes.push(MigratedBase {
            disk: disk.to_owned(),
            base: base.to_owned(),
            is_left_out,
            detail: detail.into(),
        });
    }
}

/// The side that reads bases for a migration.
pub(in crate::migrate) struct BaseReader<'a> {
    pub(in crate::migrate) known: &'a Arc<KnownBases>,
    pub(in crate::migrate) decision: &'a Decision,
    pub(in crate::migrate) notes: &'a BaseNotes,
}

fn file_name(base: &BaseImage) -> Option<&str> {
    base.path.file_name()?.to_str()
}

impl BaseReader<'_> {
    /// Reads the base of a disk at its source, unless its identity is known.
    pub(in crate::migrate) fn identify(&self, disk: &mut CopiedDisk) {
        let (id, content) = (disk.id.clone(), Arc::clone(&disk.content));
        let base = content.base();
        let Some((base, name)) = base.and_then(|base| Some((base, file_name(base)?))) else {
            return;
        };
        let note = |detail: String| self.notes.note(&id, name, false, detail);
        let identified = base
            .open()
            .map_err(|error| error.to_string())
            .and_then(|open| {
                let size = open.size().map_err(|error| error.to_string())?;
                let mut noted = None;
                let goes_on = |done: u64| {
                    let part = Some(done / NOTED);
                    if noted != part {
                        noted = part;
                        let all = size.div_ceil(1 << 20);
                        note(format!("it is read: {} of {all} MiB", done >> 20));
                    }
                    !self.decision.is_canceled()
                };
                let id = self.known.identify(&open, goes_on);
                id.map_err(|error| error.to_string())
            });
        match identified {
            Ok(Some(id)) => {
                note("the destination was not asked for it".to_owned());
                let base = OfferedBase {
                    name: name.to_owned(),
                    format: CopiedFormat::of(base.format),
                    size: id.size,
                    sha256: hex(id.sha256),
                    above: content.allocated_above_base(),
                };
                disk.base = Some(base);
            }
            // Canceled: so is the migration.
            Ok(None) => {}
            // It is copied with the rest, which fails if it cannot be read at all.
            Err(why) => note(format!("it cannot be compared: {why}")),
        }
    }

    /// Notes what the destination said of the bases that were offered.
    pub(in crate::migrate) fn answered(notes: &BaseNotes, disks: &[CopiedDisk], has: &[String]) {
        for disk in disks {
            let Some(base) = &disk.base else { continue };
            let is_left_out = has.contains(&disk.id);
            let detail = match is_left_out {
                true => "the destination has an image with this content",
                false => "the destination has no image of this name and content that it may use",
            };
            notes.note(&disk.id, &base.name, is_left_out, detail);
        }
    }

    /// Finds bases at the destination for images that are about to be made, and has the configurations
    /// allow them. Nothing is made.
    ///
    /// # Errors
    /// The storage has no room for what is to be copied.
    pub(in crate::migrate) fn find_all(
        &self,
        images: &mut [PlannedImage],
        image_dirs: &[PathBuf],
        allowed: &Allowed,
        configs: [&mut VmConfig; 2],
    ) -> Result<(), Refusal> {
        self.notes.clear();
        for image in &mut *images {
            let Some(offered) = image.offered.take() else {
                continue;
            };
            let found = self.find(image, &offered, image_dirs, allowed);
            let (is_left_out, detail) = match &found {
                Ok(base) => (true, format!("{} has this content", base.path().display())),
                Err(why) => (false, why.clone()),
            };
            self.notes
                .note(&image.id, &offered.name, is_left_out, detail);
            if let Ok(base) = found {
                image.needed = offered.above;
                image.base = Some(base);
            }
        }
        for disk in configs
            .into_iter()
            .flat_map(|config| config.disks.iter_mut().flatten())
        {
            let is_on_base =
                |image: &&PlannedImage| image.base.is_some() && disk.id.as_ref() == Some(&image.id);
            if images.iter().find(is_on_base).is_some() {
                disk.backing_files = true;
            }
        }
        let needed = images.iter().map(|image| image.needed);
        let needed = needed.fold(0, u64::saturating_add);
        match images.first().and_then(|image| image.path.parent()) {
            Some(storage) => check_space(storage, needed),
            None => Ok(()),
        }
    }

    /// Finds the base of an image, or returns why there is none.
    fn find(
        &self,
        image: &PlannedImage,
        offered: &OfferedBase,
        image_dirs: &[PathBuf],
        allowed: &Allowed,
    ) -> Result<FoundBase, String> {
        if image.format != CopiedFormat::Qcow2 {
            return Err("only qcow2 images have bases".to_owned());
        }
        let plain = plain_name(&offered.name)?;
        let storage = image.path.parent();
        let folders = image_dirs.iter().map(PathBuf::as_path).chain(storage);
        let mut why =
            format!("there is no {plain:?} in a folder of `--image-dir`, or beside the image");
        for folder in folders {
            let Ok(folder) = folder.canonicalize() else {
                continue;
            };
            // Links are followed before a path is judged.
            let Ok(path) = folder.join(plain).canonicalize() else {
                continue;
            };
            // In this order: nothing is opened that the peer could not name as a disk.
            if !path.starts_with(&folder) || !allowed.is_below(&path) {
                why = format!("{plain:?} is not below a folder that this peer may use");
                continue;
            }
            let base = BaseImage {
                path,
                format: offered.format.image(),
                // Its content is compared as a whole. What it names is below the operator's folders, as if the
                // peer had named it as a disk with `backing_files`.
                backing_files: true,
                image_dirs: image_dirs.to_vec(),
                lock: image.lock_mode(),
            };
            match self.compare(&base, offered) {
                Ok(open) => return Ok(FoundBase { base, open }),
                Err(different) => why = different,
            }
        }
        Err(why)
    }

    fn compare(&self, base: &BaseImage, offered: &OfferedBase) -> Result<Arc<OpenBase>, String> {
        let path = base.path.display();
        let unusable = |why: String| format!("{path} cannot be used: {why}");
        let open = base.open().map_err(|error| unusable(error.to_string()))?;
        let size = open.size().map_err(|error| unusable(error.to_string()))?;
        if size != offered.size {
            let there = offered.size;
            return Err(format!(
                "{path} has {size} bytes, and the source's base {there}"
            ));
        }
        let open = Arc::new(open);
        let id = self.known.identify_for_peer(&open, self.decision);
        match hex(id.map_err(unusable)?.sha256) == offered.sha256 {
            true => Ok(open),
            false => Err(format!("{path} has other content")),
        }
    }
}

/// The name of a file, which leads nowhere else.
fn plain_name(name: &str) -> Result<&str, String> {
    let mut parts = Path::new(name).components();
    let is_plain = matches!(
        (parts.next(), parts.next()),
        (Some(Component::Normal(part)), None) if part == name
    );
    match is_plain && name.len() <= MAX_NAME && !name.contains('\0') {
        true => Ok(name),
        false => Err("its name is not the name of a file".to_owned()),
    }
}

/// A base with the content of the source's. It stays locked for reading until the image above it has locked
/// it, too.
#[derive(Clone)]
pub(super) struct FoundBase {
    pub(super) base: BaseImage,
    pub(super) open: Arc<OpenBase>,
}

impl FoundBase {
    fn path(&self) -> &Path {
        &self.base.path
    }
}

impl PlannedImage {
    fn lock_mode(&self) -> LockMode {
        lock_mode(self.lock)
    }
}
