//! The working set of a snapshot: the pages that a guest touched after a restore, in that order.
//!
//! A file beside the snapshot, `working-set.json`. Later restores bring these pages first. The file is a
//! hint: a restore without it, or with one that is damaged or of another snapshot, is slower and nothing
//! else. Like all files of the folder it is untrusted input.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write as _};
use std::ops::Range;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;

use serde::{Deserialize, Serialize};
use uuid::Uuid;
use xxhash_rust::xxh3::Xxh3;

use super::write::host;
use super::{CHUNK, WORKING_SET};
use crate::MigrationError;

/// The version of the format that this program writes, and the newest that it reads.
const VERSION: u32 = 1;

/// Identifies the format.
const FORMAT: &str = "whimbrel-working-set";

/// Runs of neighbouring pages at most: a working set of 512 MiB if no two pages are neighbours.
const MAX_RUNS: usize = 128 << 10;

/// Size of the file in bytes at most: the largest numbers of a run take 36.
pub(super) const MAX_FILE: u64 = 5 << 20;

/// Pages that are sorted before they are brought: 16 MiB. Neighbours among them become one run, and the
/// pages that were touched first still come early.
const BATCH: u64 = 4096;

/// Neighbouring pages: the number of the first in all of the memory, and how many they are.
type Run = (u64, u64);

/// Pages in the order in which a guest touched them, each once.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct WorkingSet {
    runs: Vec<Run>,
    pages: u64,
}

/// The content of the file.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Content {
    format: String,
    version: u32,
    /// The snapshot whose pages these are.
    snapshot: Uuid,
    /// The pages of all runs.
    pages: u64,
    /// The XXH3 hash (64 bits) of the runs: each number in 8 bytes, little endian.
    hash: u64,
    runs: Vec<Run>,
}

/// The part of the file that every version has.
#[derive(Deserialize)]
struct Head {
    format: String,
    version: u32,
}

fn hash(runs: &[Run]) -> u64 {
    let mut all = Xxh3::new();
    for (first, pages) in runs {
        all.update(&first.to_le_bytes());
        all.update(&pages.to_le_bytes());
    }
    all.digest()
}

impl WorkingSet {
    /// Adds a page that was not added before. Returns false if there is no room for it.
    pub(super) fn add(&mut self, page: u64) -> bool {
        let is_full = self.runs.len() == MAX_RUNS;
        match self.runs.last_mut() {
            Some((first, pages)) if *first + *pages == page => *pages += 1,
            _ if is_full => return false,
            _ => self.runs.push((page, 1)),
        }
        self.pages += 1;
        true
    }

    /// The number of pages.
    #[must_use]
    pub fn pages(&self) -> u64 {
        self.pages
    }

    /// Reads the working set of the snapshot `id`, whose memory has `total` pages.
    ///
    /// # Errors
    /// The text is no working set of that snapshot and this version, or contradicts itself: a sentence.
    pub fn parse(text: &[u8], id: Uuid, total: u64) -> Result<Self, String> {
        let invalid = |error: serde_json::Error| error.to_string();
        let head: Head = serde_json::from_slice(text).map_err(invalid)?;
        if head.format != FORMAT {
            return Err(format!("its format is {:?}, not {FORMAT:?}", head.format));
        }
        if head.version != VERSION {
            let version = head.version;
            return Err(format!(
                "it has version {version} of the format; this program reads version {VERSION}"
            ));
        }
        let content: Content = serde_json::from_slice(text).map_err(invalid)?;
        if content.snapshot != id {
            return Err(format!("it belongs to the snapshot {}", content.snapshot));
        }
        if content.runs.len() > MAX_RUNS {
            let count = content.runs.len();
            return Err(format!(
                "it has {count} runs of pages, more than {MAX_RUNS}"
            ));
        }
        let mut pages = 0_u64;
        for (first, count) in &content.runs {
            if *count == 0 || first.checked_add(*count).is_none_or(|end| end > total) {
                return Err(format!(
                    "it names {count} pages from page {first} on, of {total}"
                ));
            }
            pages = pages.saturating_add(*count);
        }
        // A page is there once, so that what is brought is bounded by the memory.
        if pages > total || pages != content.pages {
            let said = content.pages;
            return Err(format!("its runs have {pages} pages, not {said}"));
        }
        if hash(&content.runs) != content.hash {
            return Err("it differs from its hash".to_owned());
        }
        Ok(Self {
            runs: content.runs,
            pages,
        })
    }

    /// Writes the file beside the snapshot `id` in a folder. An older one is replaced, and stays if this
    /// fails.
    pub(super) fn save(&self, dir: &Path, id: Uuid) -> Result<(), MigrationError> {
        let content = Content {
            format: FORMAT.to_owned(),
            version: VERSION,
            snapshot: id,
            pages: self.pages,
            hash: hash(&self.runs),
            runs: self.runs.clone(),
        };
        let text = serde_json::to_vec(&content);
        let text = text.map_err(|error| MigrationError::here("cannot-be-saved", error))?;
        let path = dir.join(WORKING_SET);
        // Two recordings at the same time have a file each: the last one stays.
        let partial = dir.join(format!(".{WORKING_SET}.{}", Uuid::new_v4()));
        let written = || -> io::Result<()> {
            let mut options = OpenOptions::new();
            let mut file = options
                .write(true)
                .create_new(true)
                .mode(0o600)
                .open(&partial)?;
            file.write_all(&text)?;
            // Before the rename: a name must not lead to content that is lost with the power.
            file.sync_all()?;
            fs::rename(&partial, &path)?;
            File::open(dir)?.sync_all()
        };
        written().map_err(|error| {
            let _ = fs::remove_file(&partial);
            host("write", &path, &error)
        })
    }

    /// Runs to bring one after another, of [`CHUNK`] pages at most: early pages first, and neighbours among
    /// a batch as one run.
    pub(super) fn chunks(&self) -> Vec<Range<u64>> {
        let mut all = Vec::new();
        let mut batch: Vec<Run> = Vec::new();
        let mut pages = 0;
        for run in &self.runs {
            batch.push(*run);
            pages += run.1;
            if pages >= BATCH {
                merge(&mut batch, &mut all);
                pages = 0;
            }
        }
        merge(&mut batch, &mut all);
        all
    }
}

/// Sorts a batch of runs, and moves it to `all` in pieces of [`CHUNK`] pages at most.
fn merge(batch: &mut Vec<Run>, all: &mut Vec<Range<u64>>) {
    batch.sort_unstable();
    let mut merged: Vec<Range<u64>> = Vec::new();
    for (first, pages) in batch.drain(..) {
        match merged.last_mut() {
            Some(last) if last.end == first => last.end = first + pages,
            _ => merged.push(first..first + pages),
        }
    }
    for run in merged {
        let starts = run.clone().step_by(CHUNK);
        all.extend(starts.map(|start| start..run.end.min(start + CHUNK as u64)));
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn of(pages: &[u64]) -> WorkingSet {
        let mut set = WorkingSet::default();
        assert!(pages.iter().all(|page| set.add(*page)));
        set
    }

    fn text(dir: &Path) -> Vec<u8> {
        fs::read(dir.join(WORKING_SET)).unwrap()
    }

    #[test]
    fn is_read_as_it_was_saved() {
        let (dir, id) = (tempfile::tempdir().unwrap(), Uuid::new_v4());
        for pages in [&[][..], &[7], &[5, 6, 7, 3, 4, 299]] {
            let set = of(pages);
            set.save(dir.path(), id).unwrap();
            let read = WorkingSet::parse(&text(dir.path()), id, 300).unwrap();
            assert_eq!(read, set);
            assert_eq!(read.pages(), pages.len() as u64);
        }
        // Nothing else is left of several.
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }

    #[test]
    fn every_changed_byte_and_length_is_found() {
        let (dir, id) = (tempfile::tempdir().unwrap(), Uuid::new_v4());
        let set = of(&[5, 6, 7, 3, 4, 299]);
        set.save(dir.path(), id).unwrap();
        let good = text(dir.path());
        for len in 0..good.len() {
            WorkingSet::parse(&good[..len], id, 300).unwrap_err();
        }
        for at in 0..good.len() {
            for bit in 0..8 {
                let mut bad = good.clone();
                bad[at] ^= 1 << bit;
                // A change that JSON does not tell apart, as of a digit of an escape, is none.
                if let Ok(read) = WorkingSet::parse(&bad, id, 300) {
                    assert_eq!(read, set, "byte {at}, bit {bit}");
                }
            }
        }
    }

    #[test]
    fn foreign_newer_and_impossible_ones_are_refused() {
        let id = Uuid::new_v4();
        let parse = |change: &dyn Fn(&mut Content)| {
            let mut content = Content {
                format: FORMAT.to_owned(),
                version: VERSION,
                snapshot: id,
                pages: 3,
                hash: 0,
                runs: vec![(1, 2), (9, 1)],
            };
            change(&mut content);
            content.hash = hash(&content.runs);
            WorkingSet::parse(&serde_json::to_vec(&content).unwrap(), id, 10)
        };
        assert_eq!(parse(&|_| ()).unwrap().pages(), 3);
        type Change<'a> = (&'a dyn Fn(&mut Content), &'a str);
        let refused: [Change<'_>; 8] = [
            (&|content| content.format = "other".to_owned(), "\"other\""),
            (&|content| content.version = 2, "version 2"),
            (&|content| content.snapshot = Uuid::nil(), "belongs to"),
            (
                &|content| content.runs[1] = (10, 1),
                "from page 10 on, of 10",
            ),
            (&|content| content.runs[1] = (u64::MAX, 1), "of 10"),
            (&|content| content.runs[0] = (1, 0), "0 pages"),
            (&|content| content.runs = vec![(0, 10), (0, 10)], "20 pages"),
            (
                &|content| content.runs = vec![(0, 1); MAX_RUNS + 1],
                "more than",
            ),
        ];
        for (change, why) in refused {
            let error = parse(change).unwrap_err();
            assert!(error.contains(why), "{error}");
        }
    }

    #[test]
    fn runs_are_limited() {
        let mut set = WorkingSet::default();
        for page in 0..MAX_RUNS as u64 {
            assert!(set.add(2 * page));
        }
        assert!(!set.add(1));
        // A neighbour needs no room.
        assert!(set.add(2 * MAX_RUNS as u64 - 1));
        assert_eq!(set.pages(), MAX_RUNS as u64 + 1);
        // A file of memory has at most 2^51 pages.
        let widest = (1_u64 << 51, 1_u64 << 51);
        let text = serde_json::to_vec(&vec![widest; 2]).unwrap();
        let bytes = (text.len() as u64 - 2) / 2 * MAX_RUNS as u64;
        assert!(bytes < MAX_FILE, "the largest fits in the file");
    }

    #[test]
    fn failure_keeps_the_older_one() {
        let (dir, id) = (tempfile::tempdir().unwrap(), Uuid::new_v4());
        let missing = dir.path().join("missing");
        assert!(of(&[1]).save(&missing, id).is_err());
        // A folder is in the way of the name, and is not replaced.
        fs::create_dir(dir.path().join(WORKING_SET)).unwrap();
        assert!(of(&[1]).save(dir.path(), id).is_err());
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }

    proptest! {
        #[test]
        fn chunks_have_each_page_once(pages in proptest::collection::hash_set(0_u64..20_000, 0..6000)) {
            let set = of(&pages.iter().copied().collect::<Vec<_>>());
            let chunks = set.chunks();
            prop_assert!(chunks.iter().all(|chunk| chunk.end - chunk.start <= CHUNK as u64));
            let mut all: Vec<u64> = chunks.into_iter().flatten().collect();
            prop_assert_eq!(all.len(), pages.len());
            all.sort_unstable();
            let mut expected: Vec<u64> = pages.into_iter().collect();
            expected.sort_unstable();
            prop_assert_eq!(all, expected);
        }

        #[test]
        fn any_text_is_read_or_refused(text in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = WorkingSet::parse(&text, Uuid::nil(), 300);
        }
    }

    /// A sparse file can be as large as numbers are.
    #[test]
    fn runs_that_overflow_are_refused() {
        let total = 1 << 60;
        let runs = vec![(0, total); 16];
        let content = Content {
            format: FORMAT.to_owned(),
            version: VERSION,
            snapshot: Uuid::nil(),
            pages: 0,
            hash: hash(&runs),
            runs,
        };
        let text = serde_json::to_vec(&content).unwrap();
        let refused = WorkingSet::parse(&text, Uuid::nil(), total).unwrap_err();
        assert!(refused.contains("its runs have"), "{refused}");
    }
}
