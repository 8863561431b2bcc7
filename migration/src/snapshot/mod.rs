//! Snapshots: a guest that moves into files, and out of them again.
//!
//! A snapshot is a migration whose other end is a folder. The machine is described by the same
//! [`Offer`](crate::Offer), its state is the same, and it is loaded into the same
//! [`Destination`](crate::Destination).
//!
//! ```text
//!   manifest.json   version, identity, blocks of memory, size and hash of each file below
//!   machine.json    the machine: configuration, PCI addresses, CPUs
//!   state.bin       vCPUs and devices, as a migration sends them
//!   memory.bin      the blocks, one after another; sparse: pages of zeros are holes
//!   hashes.bin      for each page its XXH3 hash (64 bits, little endian), or 0 for a page of zeros
//!   disk-0.raw ...  the content of disks, if they were copied; sparse
//!   working-set.json  if it was recorded: the pages that a guest touches first, a hint
//! ```
//!
//! The manifest is the commit: it is written last, under a temporary name, synced, and renamed. A folder
//! without one holds no snapshot, so that a crash at any step leaves none.
//!
//! The files are untrusted input. Each size and offset is checked against the files and the limits here
//! before it is used. The hashes show damage; they do not show who wrote the files.

mod capture;
mod core_dump;
mod disks;
mod files;
mod live;
mod manifest;
mod memory_file;
mod merge;
mod on_demand;
mod prefetch;
mod read;
mod record;
mod restore;
mod sparse;
mod working_set;
mod write;

#[cfg(test)]
mod disk_tests;
#[cfg(test)]
mod restore_tests;
#[cfg(test)]
mod tests;

pub use self::core_dump::{Core, CoreDump, CoreRange, write_core};
pub use self::disks::CopiedDisks;
pub use self::live::{RunningGuest, write_live};
pub use self::manifest::{DiskInfo, Manifest, VERSION};
pub use self::merge::merge;
pub use self::read::{RestoreError, Snapshot};
pub use self::record::Recorder;
pub use self::restore::{Memory, Restoring, restore};
pub use self::working_set::WorkingSet;
pub use self::write::{Saved, Writing, write};

use crate::MigrationError;
use crate::message::Refusal;
use crate::pages::{PAGE, is_zero};
use crate::progress::{Phase, Progress};

const MANIFEST: &str = "manifest.json";
const MACHINE: &str = "machine.json";
const STATE: &str = "state.bin";
const MEMORY: &str = "memory.bin";
const HASHES: &str = "hashes.bin";
const WORKING_SET: &str = "working-set.json";

/// Pages that are read or written at once: 1 MiB.
const CHUNK: usize = 256;

/// The mark of a page of zeros in the file of hashes.
const ZEROS: u64 = 0;

/// Writes the end of a snapshot or restore into its report.
pub(crate) fn conclude(
    progress: &Progress,
    ended: Result<(), MigrationError>,
) -> Result<(), Refusal> {
    conclude_with(progress, ended, "")
}

/// Writes the end into the report as [`conclude`] does. The reason of a failure ends with `more`.
fn conclude_with(
    progress: &Progress,
    ended: Result<(), MigrationError>,
    more: &str,
) -> Result<(), Refusal> {
    let Err(error) = ended else {
        progress.enter(Phase::Completed);
        return Ok(());
    };
    let mut refusal = error.refusal();
    refusal.detail.push_str(more);
    progress.update(|report| {
        report.phase = match error {
            MigrationError::Canceled => Phase::Canceled,
            _ => Phase::Failed,
        };
        report.error = Some(refusal.clone());
    });
    Err(refusal)
}

/// Returns the hash of a page. A page whose hash is the mark of zeros gets another one.
fn hash(page: &[u8]) -> u64 {
    if is_zero(page) {
        return ZEROS;
    }
    xxhash_rust::xxh3::xxh3_64(page).max(ZEROS + 1)
}

/// The hashes of the pages in `content`, whose length is a multiple of a page.
fn hashes(content: &[u8]) -> impl Iterator<Item = u64> {
    content.chunks_exact(PAGE).map(hash)
}
