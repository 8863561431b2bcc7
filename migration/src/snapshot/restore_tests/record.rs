//! Recording a working set, and restores that bring it first.

use std::fs;
use std::os::unix::fs::symlink;

use super::*;

/// Pages that a test's guest touches: the pages of `example` with content are 0, 5, 6, 299 and 301.
const TOUCHED: [usize; 4] = [299, 0, 1, 299];
/// The record of that behind page 6, which the load of the machine touches: page 1 is zeros.
const RECORDED: [u64; 3] = [6, 299, 0];

fn recorded_pages(dir: &Path) -> Option<Vec<u64>> {
    let snapshot = Snapshot::open(dir).unwrap();
    let set = snapshot.working_set()?;
    let mut pages: Vec<u64> = set.chunks().into_iter().flatten().collect();
    assert_eq!(pages.len() as u64, set.pages());
    pages.sort_unstable();
    Some(pages)
}

/// Records what a guest touches, until `end` ends it.
fn record(
    dir: &Path,
    recorder: &Recorder,
    to: &OnlyMemory,
    end: impl FnOnce() + Send,
) -> (Result<(), Refusal>, Progress) {
    let progress = Progress::default();
    to.0.lock().at_load = vec![6];
    to.0.lock().by_guest = TOUCHED.to_vec();
    let result = thread::scope(|scope| {
        scope.spawn(|| {
            let deadline = Instant::now() + Duration::from_secs(60);
            while to.0.lock().read.len() < 1 + TOUCHED.len() {
                assert!(Instant::now() < deadline, "the guest does not run");
                thread::sleep(Duration::from_millis(1));
            }
            end();
        });
        restored_with(dir, Memory::OnDemand, false, to, &progress, Some(recorder)).0
    });
    (result, progress)
}

/// A snapshot with a working set.
fn recorded_example() -> (tempfile::TempDir, Vec<u8>) {
    let (dir, expected) = example();
    let recorder = Recorder::new(Duration::from_secs(60));
    let to = OnlyMemory::default();
    let (result, _) = record(dir.path(), &recorder, &to, || assert!(recorder.ready()));
    result.unwrap();
    (dir, expected)
}

#[test]
fn records_what_is_touched_until_the_guest_is_ready() {
    let (dir, expected) = example();
    // Twice: the second record replaces the first, and is not made of what the first one brings.
    for _ in 0..2 {
        let recorder = Recorder::new(Duration::from_secs(60));
        let to = OnlyMemory::default();
        let (result, progress) = record(dir.path(), &recorder, &to, || assert!(recorder.ready()));
        result.unwrap();
        let report = progress.report();
        let shown = (
            report.phase,
            report.working_set_pages,
            report.working_set_us,
        );
        assert_eq!(shown, (Phase::Completed, Some(3), None));
        assert!(report.first_instruction_us.is_some());
        assert!(content(&to.0.lock().blocks) == expected);
        // It is over.
        assert!(!recorder.ready() && !recorder.cancel());
        let mut sorted = RECORDED;
        sorted.sort_unstable();
        assert_eq!(recorded_pages(dir.path()).unwrap(), sorted);
    }
    let text = fs::read_to_string(dir.path().join(WORKING_SET)).unwrap();
    let runs = format!("[{}]", RECORDED.map(|page| format!("[{page},1]")).join(","));
    assert!(text.contains(&runs), "in the order of the touches: {text}");
}

/// Restores with a guest that touches the pages when `begin` allows it. Returns the final report.
fn touching(dir: &Path, memory: Memory, has_set: bool, touch: fn(&OnlyMemory)) -> crate::Report {
    let (to, progress) = (OnlyMemory::default(), Progress::default());
    let (seen, shown) = (to.clone(), progress.clone());
    to.0.lock().at_start = Some(Box::new(move || {
        let deadline = Instant::now() + Duration::from_secs(60);
        while has_set && shown.report().working_set_us.is_none() {
            assert!(Instant::now() < deadline, "the working set does not come");
            thread::sleep(Duration::from_millis(1));
        }
        touch(&seen);
    }));
    let (result, arrived) = restored_with(dir, memory, false, &to, &progress, None);
    let early = has_set || memory == Memory::OnDemand;
    assert_eq!((result, arrived), (Ok(()), early), "{memory:?}");
    let report = progress.report();
    let pages = has_set.then_some(RECORDED.len() as u64);
    assert_eq!(report.phase, Phase::Completed);
    assert_eq!(report.working_set_pages, pages);
    assert_eq!(report.working_set_us.is_some(), has_set);
    report
}

#[test]
fn guest_on_demand_does_not_wait_for_its_working_set() {
    let touch = |to: &OnlyMemory| {
        let pages = RECORDED.map(|page| page as usize).to_vec();
        read(&to.0, pages);
        let seen = to.0.lock().read.clone();
        assert!(
            seen.iter()
                .all(|(page, byte, _)| *byte == (page % 251 + 1) as u8)
        );
    };
    let (with, _) = recorded_example();
    let (without, _) = example();
    let faults = |dir: &Path, has_set| touching(dir, Memory::OnDemand, has_set, touch).faults;
    assert_eq!(faults(without.path(), false), RECORDED.len() as u64);
    assert_eq!(faults(with.path(), true), 0);
}

/// Returns how many of the recorded pages are mapped: bit 63 of their entries (Linux, admin-guide/mm/pagemap).
fn mapped(to: &OnlyMemory) -> usize {
    let ram = Arc::clone(&to.0.lock().blocks[0].ram);
    let pagemap = File::open("/proc/self/pagemap").unwrap();
    let is_mapped = |page: &&u64| {
        let mut entry = [0; 8];
        let number = (ram.host_addr().addr() / PAGE) as u64 + **page;
        pagemap.read_exact_at(&mut entry, number * 8).unwrap();
        u64::from_le_bytes(entry) >> 63 == 1
    };
    RECORDED.iter().filter(is_mapped).count()
}

#[test]
fn working_set_of_a_mapped_guest_is_mapped() {
    let (with, _) = recorded_example();
    let (without, _) = example();
    touching(without.path(), Memory::Map, false, |to| {
        assert_eq!(mapped(to), 0);
    });
    touching(with.path(), Memory::Map, true, |to| {
        assert_eq!(mapped(to), RECORDED.len());
    });
}

#[test]
fn canceled_recording_leaves_the_vm_and_no_record() {
    let (dir, expected) = example();
    let recorder = Recorder::new(Duration::from_secs(60));
    let to = OnlyMemory::default();
    let (result, progress) = record(dir.path(), &recorder, &to, || assert!(recorder.cancel()));
    assert_eq!(result.unwrap_err().code, "canceled");
    assert_eq!(progress.report().phase, Phase::Canceled);
    assert_eq!(recorded_pages(dir.path()), None);
    // Its memory is whole.
    let seen = to.0.lock();
    assert!(content(&seen.blocks) == expected);
    assert!(seen.failed.is_none() && seen.discarded == 0);
}

#[test]
fn recording_ends_with_its_vm() {
    let (dir, _) = example();
    let recorder = Recorder::new(Duration::from_secs(60));
    let to = OnlyMemory::default();
    let lose = || to.0.lock().blocks[0].ram.lose_awaited();
    let (result, _) = record(dir.path(), &recorder, &to, lose);
    assert_eq!(result.unwrap_err().code, "recording-ended");
    assert_eq!(recorded_pages(dir.path()), None);
}

#[test]
fn recording_ends_after_its_limit() {
    let (dir, expected) = example();
    let recorder = Recorder::new(Duration::ZERO);
    let to = OnlyMemory::default();
    to.0.lock().at_load = vec![6];
    let progress = Progress::default();
    let mode = Memory::OnDemand;
    let (result, _) = restored_with(dir.path(), mode, false, &to, &progress, Some(&recorder));
    result.unwrap();
    assert_eq!(recorded_pages(dir.path()), Some(vec![6]));
    assert!(content(&to.0.lock().blocks) == expected);
}

#[test]
fn record_that_cannot_be_written_leaves_the_vm() {
    let (dir, expected) = example();
    // A folder is in the way.
    fs::create_dir(dir.path().join(WORKING_SET)).unwrap();
    let recorder = Recorder::new(Duration::from_secs(60));
    let to = OnlyMemory::default();
    let (result, _) = record(dir.path(), &recorder, &to, || assert!(recorder.ready()));
    let why = result.unwrap_err();
    assert_eq!(why.code, "host-refused");
    assert!(why.detail.contains(WORKING_SET), "{why}");
    let seen = to.0.lock();
    assert!(content(&seen.blocks) == expected && seen.failed.is_none());
}

/// An increment is recorded and brought from its chain, and has no use for the working set of its base. It
/// cannot be mapped, which is said by name.
#[test]
fn increment_has_a_working_set_of_its_own() {
    let (base, _) = recorded_example();
    let parent = tempfile::tempdir().unwrap();
    let dir = parent.path().join("increment");
    let blocks = guest(&[0, 5, 6, 299, 301, 20]);
    let expected = content(&blocks);
    tests::write_on(&dir, base.path(), &blocks).0.unwrap();
    assert_eq!(recorded_pages(&dir), None);
    let recorder = Recorder::new(Duration::from_secs(60));
    let to = OnlyMemory::default();
    let (result, _) = record(&dir, &recorder, &to, || assert!(recorder.ready()));
    result.unwrap();
    assert_eq!(recorded_pages(&dir), Some(vec![0, 6, 299]));
    let to = OnlyMemory::default();
    let (result, progress, _) = restored(&dir, Memory::OnDemand, false, &to);
    result.unwrap();
    assert!(progress.report().working_set_us.is_some());
    assert!(content(&to.0.lock().blocks) == expected);

    let to = OnlyMemory::default();
    let (result, _, _) = restored(&dir, Memory::Map, false, &to);
    let why = result.unwrap_err();
    assert_eq!(why.code, "snapshot-base");
    assert!(why.detail.contains("`Map`"), "{why}");
    assert!(to.0.lock().machines.is_empty(), "no machine was made");
}

/// A working set that is damaged, of another snapshot or no file is not used, and the restore is as without.
#[test]
fn restore_without_a_usable_working_set() {
    let (dir, expected) = recorded_example();
    let path = dir.path().join(WORKING_SET);
    let good = fs::read(&path).unwrap();
    let (other, _) = recorded_example();
    let foreign = fs::read(other.path().join(WORKING_SET)).unwrap();
    let outside = other.path().join("outside");
    fs::write(&outside, &good).unwrap();
    let large = [&good[..], &vec![b' '; working_set::MAX_FILE as usize]].concat();
    for bad in [&good[1..], &foreign, &large, b""] {
        fs::write(&path, bad).unwrap();
        assert_eq!(recorded_pages(dir.path()), None);
    }
    fs::remove_file(&path).unwrap();
    symlink(&outside, &path).unwrap();
    assert_eq!(recorded_pages(dir.path()), None);
    for mode in [Memory::Copy, Memory::OnDemand, Memory::Map] {
        let to = OnlyMemory::default();
        let (result, progress, _) = restored(dir.path(), mode, false, &to);
        result.unwrap();
        assert_eq!(progress.report().working_set_pages, None);
        assert!(content(&to.0.lock().blocks) == expected);
    }
}
