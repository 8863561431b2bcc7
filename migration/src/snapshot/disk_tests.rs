//! Snapshots with copies of disks.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt as _, MetadataExt as _, symlink};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;
use std::time::Duration;

use parking_lot::Mutex;
use tempfile::TempDir;
use uuid::Uuid;

use super::disks::CopiedDisks;
use super::live::tests::{At, Guest, check, snapshot, snapshot_by};
use super::tests::{guest, saved};
use super::*;
use crate::disks::{ReadDisk, SourceDisk};
use crate::policy::Policy;
use crate::testing::MemoryDisk;
use crate::{Decision, Progress};

/// Bytes of a disk: several parts, of which the last is a half, and the last page is a part of one.
const SIZE: usize = (3 << 20) + (1 << 19) + 512;

/// A disk with content in its first page, in its second part and at its end.
fn disk() -> Arc<MemoryDisk> {
    let disk = MemoryDisk::new(SIZE);
    disk.fill(0, PAGE, 1);
    disk.fill((1 << 20) + 3 * PAGE, 9 * PAGE, 2);
    disk.fill(SIZE - 512, 512, 3);
    disk
}

/// Takes a snapshot of a paused guest with these disks.
fn write_with(
    dir: &Path,
    base: Option<&Snapshot>,
    disks: Vec<SourceDisk>,
    start: &dyn Fn() -> Result<(), Refusal>,
    decision: &Decision,
) -> (Result<(), Refusal>, Progress) {
    let (progress, policy) = (Progress::default(), Policy::default());
    let writing = Writing {
        id: Uuid::new_v4(),
        dir,
        base,
        disks: Some(CopiedDisks {
            disks,
            start_tracking: start,
            policy: &policy,
        }),
        sealing: &|| Ok(()),
        end: &|_| "",
        progress: &progress,
        decision,
    };
    let written = write(&writing, || Ok(saved(&guest(&[0, 5]))));
    (written, progress)
}

fn paused(dir: &Path, base: Option<&Snapshot>, disk: &Arc<MemoryDisk>) -> Progress {
    let start = || {
        disk.track(true);
        Ok(())
    };
    let from = vec![disk.at_source("root")];
    let (written, progress) = write_with(dir, base, from, &start, &Decision::default());
    written.unwrap();
    progress
}

fn example() -> (TempDir, Arc<MemoryDisk>) {
    let (dir, disk) = (tempfile::tempdir().unwrap(), disk());
    paused(dir.path(), None, &disk);
    (dir, disk)
}

fn refused(dir: &Path) -> Refusal {
    let read = Snapshot::open(dir).and_then(|snapshot| snapshot.verify_disks(&Decision::default()));
    read.unwrap_err().refusal()
}

fn edit(dir: &Path, change: impl FnOnce(&mut serde_json::Value)) {
    let path = dir.join(MANIFEST);
    let mut manifest = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    change(&mut manifest);
    fs::write(&path, manifest.to_string()).unwrap();
}

#[test]
fn disk_is_copied_and_its_zeros_are_holes() {
    let dir = tempfile::tempdir().unwrap();
    let folder = dir.path().join("new");
    let disk = disk();
    let report = paused(&folder, None, &disk).report();
    assert_eq!(
        (report.disk_bytes, report.disk_remaining_bytes),
        (SIZE as u64, 0)
    );
    let snapshot = Snapshot::open(&folder).unwrap();
    snapshot.verify_disks(&Decision::default()).unwrap();
    assert_eq!(snapshot.manifest().version, 3);
    let (info, path) = snapshot.disks().next().unwrap();
    assert_eq!((info.name.as_str(), info.size), ("root", SIZE as u64));
    assert_eq!(path, folder.join("disk-0.raw"));
    assert!(fs::read(&path).unwrap() == disk.contents());
    let metadata = fs::metadata(&path).unwrap();
    assert!(metadata.blocks() * 512 <= 12 * PAGE as u64, "{metadata:?}");
    assert_eq!(metadata.mode() & 0o777, 0o600);
    assert_eq!(
        fs::read_dir(&folder).unwrap().count(),
        6,
        "nothing else is left"
    );
}

/// The guest writes to its memory and its disk all the time.
#[test]
fn disk_of_a_running_guest_is_of_the_moment_of_its_memory() {
    let dir = tempfile::tempdir().unwrap();
    // As large as what the guest writes to, and a hole.
    let disk = MemoryDisk::new(4 << 20);
    let mut guest = Guest::with_disk(Some(disk), |_| Ok(()));
    for round in 0..4 {
        let folder = dir.path().join(round.to_string());
        let (written, progress) = snapshot(&folder, &mut guest, &Decision::default());
        written.unwrap();
        check(&folder);
        let report = progress.report();
        assert!(
            report.rounds >= 2,
            "before the protection and behind it: {report:?}"
        );
        assert!(report.downtime.unwrap().pages > 0, "{report:?}");
        assert_eq!(
            (report.disk_remaining_bytes, report.remaining_pages),
            (0, 0)
        );
        guest.runs();
    }
}

/// A disk that does something at one of its reads.
struct Hooked<F> {
    disk: Arc<MemoryDisk>,
    reads: AtomicU32,
    hook: F,
}

impl<F: Fn(u32) -> io::Result<()> + Send + Sync> ReadDisk for Hooked<F> {
    fn read(&self, offset: u64, data: &mut [u8]) -> io::Result<()> {
        (self.hook)(self.reads.fetch_add(1, Ordering::Relaxed))?;
        self.disk.read(offset, data)
    }
}

/// Each read of the disk fails in turn, or the snapshot is canceled there.
#[test]
fn failure_and_cancel_at_each_read_leave_nothing() {
    for cancels in [false, true] {
        let mut cut = 0;
        loop {
            let parent = tempfile::tempdir().unwrap();
            let (disk, decision) = (disk(), Decision::default());
            let canceler = decision.clone();
            let hook = move |read| match read == cut {
                true if cancels => {
                    canceler.cancel().unwrap();
                    Ok(())
                }
                true => Err(io::ErrorKind::UnexpectedEof.into()),
                false => Ok(()),
            };
            let from = SourceDisk {
                content: Arc::new(Hooked {
                    disk: Arc::clone(&disk),
                    reads: AtomicU32::new(0),
                    hook,
                }),
                ..disk.at_source("root")
            };
            let start = || {
                disk.track(true);
                Ok(())
            };
            let folder = parent.path().join("new");
            let (written, _) = write_with(&folder, None, vec![from], &start, &decision);
            let Err(why) = written else { break };
            let code = if cancels {
                "canceled"
            } else {
                "disk-unreadable"
            };
            assert_eq!(why.code, code, "read {cut}: {why:?}");
            assert_eq!(
                fs::read_dir(parent.path()).unwrap().count(),
                0,
                "read {cut}"
            );
            cut += 1;
        }
        assert!(cut >= 3, "{cut} reads");
    }
}

#[test]
fn cancel_at_each_step_leaves_nothing_of_a_disk() {
    for at in [At::Offer, At::Stop, At::Save, At::Resume, At::Sync] {
        let dir = tempfile::tempdir().unwrap();
        let decision = Decision::default();
        let canceler = decision.clone();
        let mut guest = Guest::with_disk(Some(MemoryDisk::new(4 << 20)), move |step| {
            if step == at {
                canceler.cancel().unwrap();
            }
            Ok(())
        });
        let (written, _) = snapshot(&dir.path().join("new"), &mut guest, &decision);
        assert_eq!(written.unwrap_err().code, "canceled", "{at:?}");
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0, "{at:?}");
        guest.stopped = None;
        guest.runs();
    }
}

/// Takes a snapshot of a guest of which so many stops take longer than its policy permits. Returns the steps.
fn with_long_stops(
    dir: &Path,
    long_stops: usize,
) -> (Result<(), Refusal>, Progress, Vec<At>, Guest) {
    let policy = Policy {
        max_downtime: Duration::from_millis(100),
        ..Policy::default()
    };
    let (disk, steps) = (MemoryDisk::new(4 << 20), Arc::new(Mutex::new(Vec::new())));
    let (written, seen, span) = (Arc::clone(&disk), Arc::clone(&steps), policy.promise());
    let mut guest = Guest::with_disk(Some(disk), move |step| {
        let mut seen = seen.lock();
        seen.push(step);
        let stops = seen.iter().filter(|step| **step == At::Stop).count();
        if step == At::Stop && stops <= long_stops {
            // At least one block is left to copy, which has no content.
            written.fill((4 << 20) - PAGE, PAGE, 0);
            thread::sleep(span);
        }
        Ok(())
    });
    let (snapshot, progress) = snapshot_by(&policy, dir, &mut guest, &Decision::default());
    let steps = steps.lock().clone();
    (snapshot, progress, steps, guest)
}

#[test]
fn long_stop_is_called_off_and_tried_again() {
    let dir = tempfile::tempdir().unwrap();
    let (written, progress, steps, guest) = with_long_stops(dir.path(), 1);
    written.unwrap();
    let count = |wanted: At| steps.iter().filter(|step| **step == wanted).count();
    assert!(count(At::CallOff) >= 1, "{steps:?}");
    assert_eq!(count(At::Stop), count(At::CallOff) + 1);
    assert_eq!(count(At::Resume), 1);
    let report = progress.report();
    assert_eq!(report.called_off as usize, count(At::CallOff));
    // Memory and disk are of the last stop.
    check(dir.path());
    guest.runs();
}

#[test]
fn guest_that_never_stops_in_time_has_no_snapshot() {
    let parent = tempfile::tempdir().unwrap();
    let (written, progress, steps, guest) = with_long_stops(&parent.path().join("new"), usize::MAX);
    let why = written.unwrap_err();
    assert_eq!(why.code, "stop-too-long");
    assert!(why.detail.contains("100 ms (`max_downtime_ms`)"), "{why:?}");
    assert_eq!(steps.iter().filter(|step| **step == At::Stop).count(), 3);
    assert_eq!(progress.report().called_off, 3);
    assert_eq!(fs::read_dir(parent.path()).unwrap().count(), 0);
    guest.runs();
}

#[test]
fn disk_that_cannot_be_tracked_leaves_nothing() {
    let parent = tempfile::tempdir().unwrap();
    let start = || Err(Refusal::new("disk-unreadable", "gone"));
    let from = vec![disk().at_source("root")];
    let folder = parent.path().join("new");
    let (written, _) = write_with(&folder, None, from, &start, &Decision::default());
    assert_eq!(written.unwrap_err().code, "disk-unreadable");
    assert!(!folder.exists());
}

/// Found before the disk is read: the end of the copy would be late.
#[test]
fn image_is_not_replaced() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("disk-0.raw"), "mine").unwrap();
    let start = || panic!("not tracked");
    let from = vec![disk().at_source("root")];
    let (written, _) = write_with(dir.path(), None, from, &start, &Decision::default());
    assert_eq!(written.unwrap_err().code, "snapshot-exists");
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    assert_eq!(fs::read(dir.path().join("disk-0.raw")).unwrap(), b"mine");
}

#[test]
fn changed_images_are_found() {
    let (dir, _) = example();
    let path = dir.path().join("disk-0.raw");
    let whole = fs::read(&path).unwrap();
    let file = OpenOptions::new().write(true).open(&path).unwrap();
    // In content, in a hole, and at the end.
    for offset in [0, (1 << 20) + 4 * PAGE, 2 << 20, SIZE - 1] {
        file.write_all_at(&[whole[offset] ^ 0x55], offset as u64)
            .unwrap();
        let why = refused(dir.path());
        assert_eq!(why.code, "snapshot-damaged", "{offset}");
        assert!(why.detail.contains("disk-0.raw"), "{why:?}");
        file.write_all_at(&whole[offset..=offset], offset as u64)
            .unwrap();
    }
    // Zeros may be written where there was a hole: that is the same disk.
    Snapshot::open(dir.path())
        .unwrap()
        .verify_disks(&Decision::default())
        .unwrap();
    for len in [0, SIZE as u64 - 512, SIZE as u64 + 512] {
        file.set_len(len).unwrap();
        let why = refused(dir.path());
        assert_eq!(why.code, "snapshot-damaged", "{len}");
        assert!(why.detail.contains("disk-0.raw has"), "{why:?}");
    }
    fs::remove_file(&path).unwrap();
    assert_eq!(refused(dir.path()).code, "snapshot-unreadable");
}

#[test]
fn images_are_files_of_the_folder() {
    let (dir, _) = example();
    let path = dir.path().join("disk-0.raw");
    let outside = tempfile::tempdir().unwrap();
    let secret = outside.path().join("secret");
    File::create(&secret).unwrap().set_len(SIZE as u64).unwrap();
    fs::remove_file(&path).unwrap();
    symlink(&secret, &path).unwrap();
    assert_eq!(refused(dir.path()).code, "snapshot-unreadable");
    fs::remove_file(&path).unwrap();
    fs::create_dir(&path).unwrap();
    assert_eq!(refused(dir.path()).code, "snapshot-damaged");
    // The manifest names no path: the name of a disk is that of the VM's disk, and of nothing else.
    let (dir, _) = example();
    edit(dir.path(), |manifest| {
        manifest["disks"][0]["name"] = "../../etc/passwd".into();
    });
    let snapshot = Snapshot::open(dir.path()).unwrap();
    let (_, path) = snapshot.disks().next().unwrap();
    assert_eq!(path, dir.path().join("disk-0.raw"));
}

#[test]
fn manifests_with_odd_disks_are_refused() {
    let (dir, _) = example();
    let text = fs::read(dir.path().join(MANIFEST)).unwrap();
    let disk = |name: &str, size: u64| serde_json::json!({ "name": name, "size": size, "hash": 1 });
    let size = SIZE as u64;
    let many: Vec<_> = (0..129).map(|n| disk(&n.to_string(), 512)).collect();
    for (disks, why) in [
        (vec![disk("a", 0)], "not a multiple of 512"),
        (vec![disk("a", size + 1)], "not a multiple of 512"),
        (vec![disk("a", 512), disk("a", 512)], "listed twice"),
        (
            vec![disk("a", 8 << 40), disk("b", 512)],
            "at most 8796093022208",
        ),
        (vec![disk("a", u64::MAX - 511), disk("b", 512)], "at most"),
        (many, "more than 128"),
    ] {
        edit(dir.path(), |manifest| manifest["disks"] = disks.into());
        let refused = refused(dir.path());
        assert_eq!(refused.code, "snapshot-damaged");
        assert!(refused.detail.contains(why), "{refused:?}");
        fs::write(dir.path().join(MANIFEST), &text).unwrap();
    }
    // A version that does not have them.
    edit(dir.path(), |manifest| manifest["version"] = 2.into());
    assert!(refused(dir.path()).detail.contains("version 2"));
}

/// An increment has whole disks, and so has what it is merged into.
#[test]
fn increments_and_merged_chains_have_their_disks() {
    let parent = tempfile::tempdir().unwrap();
    let dir = |name: &str| parent.path().join(name);
    let disk = disk();
    paused(&dir("base"), None, &disk);
    disk.fill(0, 2 * PAGE, 0);
    disk.fill(2 << 20, 512, 8);
    let base = Snapshot::open(&dir("base")).unwrap();
    paused(&dir("top"), Some(&base), &disk);
    // Those of a base are of another moment, and not needed.
    fs::remove_file(dir("base").join("disk-0.raw")).unwrap();
    let chain = Snapshot::open(&dir("top")).unwrap();
    let (progress, decision) = (Progress::default(), Decision::default());
    let (whole, damaged) = (dir("whole"), dir("damaged"));
    let writing = |dir| Writing {
        id: Uuid::new_v4(),
        dir,
        base: None,
        disks: None,
        sealing: &|| Ok(()),
        end: &|_| "",
        progress: &progress,
        decision: &decision,
    };
    merge(&writing(&whole), &chain).unwrap();
    for name in ["top", "whole"] {
        let snapshot = Snapshot::open(&dir(name)).unwrap();
        snapshot.verify_disks(&decision).unwrap();
        let (info, path) = snapshot.disks().next().unwrap();
        assert_eq!(info, &chain.manifest().disks[0]);
        assert!(fs::read(&path).unwrap() == disk.contents(), "{name}");
        let taken = fs::metadata(&path).unwrap().blocks() * 512;
        assert!(taken <= 12 * PAGE as u64, "{name}: {taken} bytes");
    }
    assert_eq!(Snapshot::open(&whole).unwrap().manifest().version, 3);
    // A damaged image is not copied.
    let image = OpenOptions::new()
        .write(true)
        .open(dir("top").join("disk-0.raw"));
    image.unwrap().write_all_at(&[7], SIZE as u64 - 1).unwrap();
    let why = merge(&writing(&damaged), &chain).unwrap_err();
    assert_eq!(why.code, "snapshot-damaged");
    assert!(!damaged.exists());
}

/// A whole snapshot that version 3 wrote. Its memory and its disk are those of this file's example.
#[test]
fn golden_snapshot_of_version_3() {
    let golden = Path::new(concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/src/snapshot/golden-v3"
    ));
    let dir = tempfile::tempdir().unwrap();
    for name in [MANIFEST, MACHINE, STATE, HASHES] {
        fs::copy(golden.join(name), dir.path().join(name)).unwrap();
    }
    let memory = super::tests::content(&guest(&[0, 5]));
    fs::write(dir.path().join(MEMORY), memory).unwrap();
    fs::write(dir.path().join("disk-0.raw"), disk().contents()).unwrap();
    let snapshot = Snapshot::open(dir.path()).unwrap();
    let (progress, decision) = (Progress::default(), Decision::default());
    snapshot.verify(&progress, &decision).unwrap();
    snapshot.verify_disks(&decision).unwrap();
    assert_eq!(snapshot.manifest().version, 3);
    assert_eq!(snapshot.disks().next().unwrap().0.name, "root");
}
