//! The manifest: what a snapshot consists of.

use std::path::PathBuf;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::read::RestoreError;
use crate::disks::check_sizes;
use crate::message::BlockInfo;
use crate::pages::PAGE;

/// The newest version of the format that this program reads. A snapshot is written in the oldest version
/// that has all of its fields, 2 at least, so that older programs read those that they can.
///
/// | version | since |
/// |---|---|
/// | 1 | the first |
/// | 2 | `stopped_ns`, `base` |
/// | 3 | `disks` |
pub const VERSION: u32 = 3;

/// The version of snapshots without copied disks.
const WITHOUT_DISKS: u32 = 2;

/// Identifies the format.
const FORMAT: &str = "whimbrel-snapshot";

/// Maximum size of the manifest in bytes.
pub(super) const MAX_MANIFEST: u64 = 64 << 10;

/// Maximum size of the description of a machine in bytes, as in a migration.
const MAX_MACHINE: u64 = 1 << 20;

/// Maximum size of the saved state in bytes, as in a migration.
const MAX_STATE: u64 = 80 << 20;

/// Maximum number of memory blocks. A machine has one for each memory zone, or two if the zone can grow.
const MAX_BLOCKS: usize = 64;

/// Maximum number of copied disks.
pub(super) const MAX_DISKS: usize = 128;

/// The unit of a disk's size in bytes.
const SECTOR: u64 = 512;

/// The contents of a snapshot.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    format: String,
    /// Version of the format.
    pub version: u32,
    /// Identifies the snapshot: no two have the same.
    pub id: Uuid,
    /// The name that the VM had.
    pub vm: String,
    /// When the snapshot was taken, in milliseconds since 1970.
    pub created_ms: u64,
    /// When the guest's clocks were stopped, in nanoseconds since 1970. Since version 2.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stopped_ns: Option<u64>,
    /// The program that wrote it, for people.
    pub program: String,
    /// Bytes of a page of [`memory`](Self::memory) that has one hash.
    page_size: u64,
    /// The blocks of memory, in the order of their bytes in the file.
    pub memory: Vec<BlockInfo>,
    /// The snapshot that has the pages which are the same there. Since version 2.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub base: Option<BaseInfo>,
    /// The disks whose content is in the snapshot, in the order of their files `disk-0.raw`, `disk-1.raw`
    /// and so on. No path is in the manifest, so that none leaves the folder. Since version 3.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub disks: Vec<DiskInfo>,
    /// The description of the machine.
    pub machine: FileInfo,
    /// The state of vCPUs and devices.
    pub state: FileInfo,
    /// The hashes of the pages.
    pub hashes: FileInfo,
}

/// The snapshot on which an incremental one is based.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BaseInfo {
    /// Its identity.
    pub id: Uuid,
    /// Its folder when the incremental snapshot was written. A folder of the same name beside the
    /// incremental snapshot's is looked for first, so that both can be moved together.
    pub dir: PathBuf,
}

/// A disk whose content is in a snapshot, as a raw image.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DiskInfo {
    /// Its name in the configuration of the VM.
    pub name: String,
    /// Its size in bytes, and that of the image.
    pub size: u64,
    /// The XXH3 hash (64 bits) of the parts of the image that have content: of each part of 1 MiB that is
    /// not all zeros its offset (64 bits, little endian) and its bytes, in their order. The last part may be
    /// shorter.
    pub hash: u64,
}

/// Returns the name of the image of the disk with this index in the manifest.
pub(super) fn disk_file(index: usize) -> String {
    format!("disk-{index}.raw")
}

/// A file of a snapshot.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FileInfo {
    /// Its size in bytes.
    pub size: u64,
    /// The XXH3 hash (64 bits) of its content.
    pub hash: u64,
}

impl FileInfo {
    pub(super) fn of(content: &[u8]) -> Self {
        Self {
            size: content.len() as u64,
            hash: xxhash_rust::xxh3::xxh3_64(content),
        }
    }
}

fn program() -> String {
    concat!("whimbrel ", env!("CARGO_PKG_VERSION")).to_owned()
}

/// The version of a snapshot with these copied disks.
fn version_with(disks: &[DiskInfo]) -> u32 {
    match disks {
        [] => WITHOUT_DISKS,
        _ => VERSION,
    }
}

/// The part of a manifest that every version has.
#[derive(Deserialize)]
struct Head {
    format: String,
    version: u32,
}

impl Manifest {
    pub(super) fn new(
        id: Uuid,
        vm: String,
        memory: Vec<BlockInfo>,
        stopped_at: Instant,
        base: Option<BaseInfo>,
        disks: Vec<DiskInfo>,
        files: [FileInfo; 3],
    ) -> Self {
        let since_1970 = SystemTime::now().duration_since(UNIX_EPOCH);
        let since_1970 = since_1970.unwrap_or_default();
        let created_ms = since_1970.as_millis();
        let stopped = since_1970.saturating_sub(stopped_at.elapsed()).as_nanos();
        let [machine, state, hashes] = files;
        Self {
            format: FORMAT.to_owned(),
            version: version_with(&disks),
            id,
            vm,
            created_ms: u64::try_from(created_ms).unwrap_or(u64::MAX),
            stopped_ns: u64::try_from(stopped).ok(),
            program: program(),
            page_size: PAGE as u64,
            memory,
            base,
            disks,
            machine,
            state,
            hashes,
        }
    }

    /// Returns the manifest of a snapshot of the same moment that needs no base, with these files.
    pub(super) fn merged(&self, id: Uuid, files: [FileInfo; 3]) -> Self {
        let [machine, state, hashes] = files;
        Self {
            version: version_with(&self.disks),
            id,
            program: program(),
            base: None,
            machine,
            state,
            hashes,
            // The name, the memory, the disks, and the times: the guest was stopped when the chain says.
            ..self.clone()
        }
    }

    /// Returns for how long the guest's clocks have been stopped, by the host's time of day: 0 if the
    /// snapshot does not say or the time is not past yet.
    #[must_use]
    pub fn stopped_for(&self) -> Duration {
        let stopped = self.stopped_ns.map(Duration::from_nanos);
        let now = SystemTime::now().duration_since(UNIX_EPOCH).ok();
        let age = stopped.and_then(|stopped| now?.checked_sub(stopped));
        age.unwrap_or_default()
    }

    /// Reads a manifest, and checks all that it says by itself.
    ///
    /// # Errors
    /// The text is no manifest, has a newer version, or contradicts itself or the limits of the format.
    pub fn parse(text: &[u8]) -> Result<Self, RestoreError> {
        let damaged =
            |error: serde_json::Error| RestoreError::Damaged(format!("the manifest: {error}"));
        // First what tells whether the rest can be understood.
        let head: Head = serde_json::from_slice(text).map_err(damaged)?;
        if head.format != FORMAT {
            return Err(RestoreError::Foreign(head.format));
        }
        if head.version == 0 || head.version > VERSION {
            return Err(RestoreError::Version(head.version));
        }
        let manifest: Self = serde_json::from_slice(text).map_err(damaged)?;
        manifest.validate()?;
        Ok(manifest)
    }

    /// Checks what does not depend on the files.
    pub(super) fn validate(&self) -> Result<(), RestoreError> {
        let odd = |what: String| Err(RestoreError::Damaged(format!("the manifest: {what}")));
        if self.page_size != PAGE as u64 {
            return odd(format!("page_size is {}, not {PAGE}", self.page_size));
        }
        if self.memory.is_empty() || self.memory.len() > MAX_BLOCKS {
            let count = self.memory.len();
            return odd(format!("memory has {count} blocks, not 1 to {MAX_BLOCKS}"));
        }
        for block in &self.memory {
            if block.size == 0 || block.size % PAGE as u64 != 0 {
                let (name, size) = (&block.name, block.size);
                return odd(format!(
                    "the block {name:?} has {size} bytes, not a multiple of {PAGE}"
                ));
            }
        }
        let Some(pages) = self.memory_size().map(|size| size / PAGE as u64) else {
            return odd("the blocks of memory are too large".to_owned());
        };
        if self.hashes.size != pages * 8 {
            let size = self.hashes.size;
            return odd(format!("hashes has {size} bytes for {pages} pages"));
        }
        for (what, file, most) in [
            ("machine", &self.machine, MAX_MACHINE),
            ("state", &self.state, MAX_STATE),
        ] {
            if file.size > most {
                return odd(format!("{what} has {} bytes, more than {most}", file.size));
            }
        }
        self.validate_disks().or_else(odd)
    }

    fn validate_disks(&self) -> Result<(), String> {
        if self.version <= WITHOUT_DISKS && !self.disks.is_empty() {
            return Err(format!(
                "version {} of the format has no copied disks",
                self.version
            ));
        }
        if self.disks.len() > MAX_DISKS {
            let count = self.disks.len();
            return Err(format!("disks has {count} disks, more than {MAX_DISKS}"));
        }
        for (index, DiskInfo { name, size, .. }) in self.disks.iter().enumerate() {
            if *size == 0 || size % SECTOR != 0 {
                return Err(format!(
                    "the disk {name:?} has {size} bytes, not a multiple of {SECTOR}"
                ));
            }
            let before = self.disks.get(..index).unwrap_or_default();
            if before.iter().any(|other| other.name == *name) {
                return Err(format!("the disk {name:?} is listed twice"));
            }
        }
        let sizes = self.disks.iter().map(|disk| disk.size);
        check_sizes(sizes).map_err(|why| why.detail)
    }

    /// Returns the bytes of all blocks; `None` if they are more than a file can have.
    pub(super) fn memory_size(&self) -> Option<u64> {
        let sizes = self.memory.iter().map(|block| block.size);
        sizes
            .into_iter()
            .try_fold(0_u64, u64::checked_add)
            .filter(|size| i64::try_from(*size).is_ok())
    }
}
