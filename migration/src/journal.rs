//! Journals: the steps of a hand-over at each side, for the time after a crash.
//!
//! Each side of a migration has one file in the service's state directory, with a line of JSON for each
//! step. Only the first line is synced to the disk, before the guest stops. Later lines survive the
//! death of the process without a sync. They may not survive the death of the host, but then the first
//! line shows that the host has rebooted since.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read as _, Write};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use rustix::fs::{FlockOperation, OFlags, flock};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

/// A side.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Side {
    /// From where the guest moves.
    Source,
    /// The side to which the guest moves.
    Destination,
}

/// A step of a hand-over.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Step {
    /// The migration has begun.
    Prepare,
    /// The destination could let the guest run. (Destination.)
    Ready,
    /// The guest is given away: from now on it does not run at the source. (Source.)
    Commit,
    /// The guest runs at the destination. (At both sides; the source records it when it gets the answer.)
    Running,
    /// The guest stays at the source, and never ran at the destination.
    Aborted,
}

/// A line.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Entry {
    /// The step.
    pub step: Step,
    /// When, in milliseconds since 1970.
    pub time_ms: u64,
    /// The VM's name.
    pub vm: String,
    /// The boot of the host in which it happened.
    pub boot: String,
    /// The address of the other side at the source, and of this side at the destination. Only the first
    /// line has it; empty in journals of older versions.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub endpoint: String,
    /// The guest runs at the destination without all of its memory and disks, which follow it. Absent in
    /// journals of older versions, which ignore it: to them the guest runs.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub incomplete: bool,
}

/// A recorder of steps.
pub trait Journal: Send {
    /// Writes a step down. [`Step::Prepare`] is durable on return.
    ///
    /// # Errors
    /// Fails if it cannot be written; then the step must not be taken.
    fn record(&mut self, step: Step) -> io::Result<()>;

    /// Writes [`Step::Running`] of a guest whose pages or blocks follow it. When all have come,
    /// [`Step::Running`] is recorded again.
    ///
    /// # Errors
    /// As for [`record`](Self::record).
    fn record_incomplete(&mut self) -> io::Result<()> {
        self.record(Step::Running)
    }
}

/// Names of journals end with this.
const SUFFIX: &str = ".journal";

/// In a file.
#[derive(Debug)]
pub struct FileJournal {
    file: File,
    vm: String,
    boot: String,
    /// Not written yet.
    endpoint: String,
}

fn path(dir: &Path, migration: Uuid, side: Side) -> PathBuf {
    let side = match side {
        Side::Source => "source",
        Side::Destination => "destination",
    };
    dir.join(format!("{migration}.{side}{SUFFIX}"))
}

/// Reads the steps in a journal. What is no regular file is none, and a FIFO is not waited for.
fn read(path: &Path) -> io::Result<Vec<Entry>> {
    let mut file = OpenOptions::new()
        .read(true)
        .custom_flags(OFlags::NONBLOCK.bits().cast_signed())
        .open(path)?;
    if !file.metadata()?.is_file() {
        let why = "it is not a regular file";
        return Err(io::Error::new(io::ErrorKind::InvalidData, why));
    }
    let mut bytes = Vec::new();
    file.read_to_end(&mut bytes)?;
    let lines = bytes.split_inclusive(|byte| *byte == b'\n');
    // A damaged line ends the list of steps, as one that was cut short.
    Ok(lines
        .map_while(|line| serde_json::from_slice(line).ok())
        .collect())
}

/// Returns the identity of the host's current boot; empty if the host does not show it.
#[must_use]
pub fn boot_id() -> String {
    let id = fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    id.trim().to_owned()
}

impl FileJournal {
    /// Begins one in `dir`, which is made if need be. The journal is locked until it is dropped.
    ///
    /// # Errors
    /// The journal cannot be written, or there is one of this migration and side already: a peer that used an
    /// identifier again would overwrite the outcome of an earlier migration.
    pub fn create(dir: &Path, migration: Uuid, side: Side, vm: &str) -> io::Result<Self> {
        fs::create_dir_all(dir)?;
        let file = OpenOptions::new()
            .create_new(true)
            .append(true)
            .open(path(dir, migration, side))?;
        // The kernel releases the lock when the process dies, however it dies. So a journal without
        // a lock has no writer, and its last step is final.
        flock(&file, FlockOperation::NonBlockingLockExclusive)?;
        // The name, too: after a power failure a synced file without a directory entry is lost.
        File::open(dir)?.sync_all()?;
        Ok(Self {
            file,
            vm: vm.to_owned(),
            boot: boot_id(),
            endpoint: String::new(),
        })
    }

    /// Has the first line name the migration's endpoint.
    #[must_use]
    pub fn at(mut self, endpoint: &str) -> Self {
        endpoint.clone_into(&mut self.endpoint);
        self
    }

    /// Returns true while a migration in progress writes this journal, in whatever process. Its last
    /// step is then not its outcome.
    #[must_use]
    pub fn is_in_use(dir: &Path, migration: Uuid, side: Side) -> bool {
        let Ok(file) = File::open(path(dir, migration, side)) else {
            return false;
        };
        // A shared lock: two processes that look at once do not take each other for the writer.
        let locked = flock(&file, FlockOperation::NonBlockingLockShared);
        locked.is_err_and(|errno| errno == Errno::WOULDBLOCK)
    }

    /// All that are in `dir`: each side of each migration, with its steps. A line that was cut short
    /// by a crash, and what follows it, is left out. A journal that cannot be read is left out with a warning.
    ///
    /// # Errors
    /// Fails if the directory cannot be read.
    pub fn list(dir: &Path) -> io::Result<Vec<(Uuid, Side, Vec<Entry>)>> {
        let mut found = Vec::new();
        let files = match fs::read_dir(dir) {
            Ok(files) => files,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(found),
            Err(error) => return Err(error),
        };
        for file in files {
            let name = file?.file_name();
            let name = name.to_string_lossy();
            let mut parts = name.split('.');
            let id = parts.next().and_then(|id| id.parse().ok());
            let side = match parts.next() {
                Some("source") => Side::Source,
                Some("destination") => Side::Destination,
                _ => continue,
            };
            let Some(id) = id else { continue };
            let path = path(dir, id, side);
            match read(&path) {
                Ok(entries) => found.push((id, side, entries)),
                // One that has just been removed is none.
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => {
                    tracing::warn!(path = %path.display(), %error, "cannot read the journal of a migration");
                }
            }
        }
        Ok(found)
    }

    /// The steps of one side of a migration, as [`list`](Self::list) has them.
    ///
    /// # Errors
    /// There is no such journal, or it cannot be read.
    pub fn read(dir: &Path, migration: Uuid, side: Side) -> io::Result<Vec<Entry>> {
        read(&path(dir, migration, side))
    }

    /// Removes all but the newest `keep` journals of `dir`, by the time of their last steps.
    ///
    /// # Errors
    /// The directory cannot be read, or a journal cannot be removed.
    pub fn prune(dir: &Path, keep: usize) -> io::Result<()> {
        let mut all = Vec::new();
        for file in fs::read_dir(dir)? {
            let file = file?;
            let is_journal = file.file_name().to_string_lossy().ends_with(SUFFIX);
            // One that has just been removed is none.
            if let (true, Ok(meta)) = (is_journal, file.metadata()) {
                all.push((meta.modified()?, file.path()));
            }
        }
        all.sort();
        let too_many = all.len().saturating_sub(keep);
        for (_, path) in all.into_iter().take(too_many) {
            fs::remove_file(path)?;
        }
        Ok(())
    }

    /// Forgets one that is over.
    ///
    /// # Errors
    /// Fails if it cannot be removed.
    pub fn remove(dir: &Path, migration: Uuid, side: Side) -> io::Result<()> {
        fs::remove_file(path(dir, migration, side))
    }

    /// Whether the host has been started anew since these steps.
    #[must_use]
    pub fn is_of_an_earlier_boot(entries: &[Entry]) -> bool {
        let now = boot_id();
        entries.iter().any(|entry| entry.boot != now)
    }
}

impl FileJournal {
    fn write(&mut self, step: Step, incomplete: bool) -> io::Result<()> {
        let since_1970 = SystemTime::now().duration_since(UNIX_EPOCH);
        let entry = Entry {
            step,
            time_ms: u64::try_from(since_1970.unwrap_or_default().as_millis()).unwrap_or(u64::MAX),
            vm: self.vm.clone(),
            boot: self.boot.clone(),
            endpoint: std::mem::take(&mut self.endpoint),
            incomplete,
        };
        let mut line = serde_json::to_vec(&entry)?;
        line.push(b'\n');
        // A whole line at once: a crash leaves the line or a part of it, which `list` leaves out.
        self.file.write_all(&line)?;
        // `fsync` may take hundreds of milliseconds. Here the guest runs; the later steps fall into
        // the stop.
        if step == Step::Prepare {
            self.file.sync_all()?;
        }
        Ok(())
    }
}

impl Journal for FileJournal {
    fn record(&mut self, step: Step) -> io::Result<()> {
        self.write(step, false)
    }

    fn record_incomplete(&mut self) -> io::Result<()> {
        self.write(Step::Running, true)
    }
}

/// A journal that records nothing, for hand-overs that need not survive the process.
#[derive(Clone, Copy, Debug, Default)]
pub struct NoJournal;

impl Journal for NoJournal {
    fn record(&mut self, _: Step) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use rustix::fs::Mode;

    use super::*;

    #[test]
    fn the_newest_journals_are_kept() {
        let dir = tempfile::tempdir().unwrap();
        let create = |id| FileJournal::create(dir.path(), Uuid::from_u128(id), Side::Source, "vm");
        let mut first = create(1).unwrap();
        for id in 2..6 {
            create(id).unwrap().record(Step::Prepare).unwrap();
        }
        fs::write(dir.path().join("notes"), "").unwrap();
        // A step makes a journal new again. Times of files are those of the kernel's clock ticks.
        std::thread::sleep(std::time::Duration::from_millis(20));
        first.record(Step::Prepare).unwrap();
        let kept = |keep| {
            FileJournal::prune(dir.path(), keep).unwrap();
            let listed = FileJournal::list(dir.path()).unwrap();
            let mut ids: Vec<_> = listed.iter().map(|(id, ..)| id.as_u128()).collect();
            ids.sort_unstable();
            ids
        };
        assert_eq!(kept(5), [1, 2, 3, 4, 5]);
        assert!(kept(3).contains(&1));
        assert_eq!(kept(1), [1]);
        assert!(dir.path().join("notes").exists());
    }

    #[test]
    fn unreadable_journal_hides_no_other() {
        let dir = tempfile::tempdir().unwrap();
        let named = |id| path(dir.path(), Uuid::from_u128(id), Side::Source);
        for id in 1..4 {
            let id = Uuid::from_u128(id);
            let mut journal = FileJournal::create(dir.path(), id, Side::Source, "vm").unwrap();
            journal.record(Step::Prepare).unwrap();
        }
        // A line that is no UTF-8 ends its journal.
        let mut first = OpenOptions::new().append(true).open(named(1)).unwrap();
        first.write_all(b"\xff\xfe\n").unwrap();
        fs::remove_file(named(2)).unwrap();
        fs::create_dir(named(2)).unwrap();
        fs::remove_file(named(3)).unwrap();
        let fifo = rustix::fs::FileType::Fifo;
        rustix::fs::mknodat(rustix::fs::CWD, named(3), fifo, Mode::RUSR, 0).unwrap();
        let listed = FileJournal::list(dir.path()).unwrap();
        let steps = listed
            .iter()
            .map(|(id, _, steps)| (id.as_u128(), steps.len()));
        assert_eq!(steps.collect::<Vec<_>>(), [(1, 1)]);
    }

    #[test]
    fn missing_pages_are_recorded_until_they_have_come() {
        let dir = tempfile::tempdir().unwrap();
        let id = Uuid::from_u128(7);
        let mut journal = FileJournal::create(dir.path(), id, Side::Destination, "vm").unwrap();
        let last = || {
            let listed = FileJournal::list(dir.path()).unwrap();
            let last = listed[0].2.last().unwrap();
            (last.step, last.incomplete)
        };
        journal.record_incomplete().unwrap();
        assert_eq!(last(), (Step::Running, true));
        journal.record(Step::Running).unwrap();
        assert_eq!(last(), (Step::Running, false));
        let text = fs::read_to_string(path(dir.path(), id, Side::Destination)).unwrap();
        assert_eq!(text.matches("incomplete").count(), 1, "{text}");
    }

    #[test]
    fn journal_survives_crash() {
        let dir = tempfile::tempdir().unwrap();
        let dir = dir.path().join("migrations");
        assert!(FileJournal::list(&dir).unwrap().is_empty());
        let id = Uuid::from_u128(7);
        let journal = FileJournal::create(&dir, id, Side::Source, "vm").unwrap();
        let mut journal = journal.at("unix:/run/m");
        journal.record(Step::Prepare).unwrap();
        journal.record(Step::Commit).unwrap();
        journal.file.write_all(b"{\"step\":\"runn").unwrap();
        let listed = FileJournal::list(&dir).unwrap();
        let [(found, Side::Source, entries)] = &listed[..] else {
            unreachable!("{listed:?}");
        };
        let steps: Vec<_> = entries.iter().map(|entry| entry.step).collect();
        assert_eq!(
            (*found, &steps[..]),
            (id, &[Step::Prepare, Step::Commit][..])
        );
        let endpoints: Vec<_> = entries.iter().map(|entry| &entry.endpoint[..]).collect();
        assert_eq!(endpoints, ["unix:/run/m", ""]);
        assert!(!FileJournal::is_of_an_earlier_boot(entries));
        let again = FileJournal::create(&dir, id, Side::Source, "vm");
        assert_eq!(again.unwrap_err().kind(), io::ErrorKind::AlreadyExists);
        assert!(FileJournal::is_in_use(&dir, id, Side::Source));
        assert!(!FileJournal::is_in_use(&dir, id, Side::Destination));
        drop(journal);
        assert!(!FileJournal::is_in_use(&dir, id, Side::Source));
        FileJournal::remove(&dir, id, Side::Source).unwrap();
        assert!(FileJournal::list(&dir).unwrap().is_empty());
    }
}
