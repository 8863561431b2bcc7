//! A simulated guest writes numbers to its pages in turn, so that its number of steps says what each
//! page must contain at that moment.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;

use memory::{RamBlock, RamConfig};
use serde_bytes::ByteBuf;
use uuid::Uuid;
use vm_memory::Bytes as _;

use super::super::Snapshot;
use super::super::disks::CopiedDisks;
use super::*;
use crate::message::BlockInfo;
use crate::policy::Policy;
use crate::testing::MemoryDisk;

/// Pages of each of the two blocks.
const PAGES: usize = 3000;

/// A step of the engine at which a guest fails or is canceled.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::snapshot) enum At {
    Offer,
    Stop,
    Save,
    Resume,
    CallOff,
    Sync,
}

pub(in crate::snapshot) struct Guest {
    pub(in crate::snapshot) blocks: Vec<Block>,
    /// A block of it has the number of the step that wrote it last.
    disk: Option<Arc<MemoryDisk>>,
    /// Held during each step: a stop takes it.
    steps: Arc<Mutex<u64>>,
    over: Arc<AtomicBool>,
    thread: Option<thread::JoinHandle<()>>,
    pub(in crate::snapshot) stopped:
        Option<parking_lot::lock_api::ArcMutexGuard<parking_lot::RawMutex, u64>>,
    at_step: Box<dyn FnMut(At) -> Result<(), Refusal>>,
}

fn write_number(blocks: &[Block], step: u64) {
    let page = (step * 7) as usize % (2 * PAGES);
    let ram = &blocks[page / PAGES].ram;
    let slice = ram.slice(page % PAGES * PAGE, PAGE).unwrap();
    slice.write_obj(step, 16).unwrap();
}

/// Blocks of the disk that a guest writes to.
const BLOCKS: u64 = 500;

/// Writes to the guest's disk in this step.
fn write_block(disk: &MemoryDisk, step: u64) {
    // Now and then a block becomes zeros.
    let byte = (step % 251) as u8;
    disk.fill((step * 11 % BLOCKS) as usize * PAGE, PAGE, byte);
}

impl Guest {
    fn new(at_step: impl FnMut(At) -> Result<(), Refusal> + 'static) -> Self {
        Self::with_disk(None, at_step)
    }

    /// A guest that writes to this disk, too.
    pub(in crate::snapshot) fn with_disk(
        disk: Option<Arc<MemoryDisk>>,
        at_step: impl FnMut(At) -> Result<(), Refusal> + 'static,
    ) -> Self {
        let block = |name: &str, shared| {
            let config = RamConfig {
                shared,
                ..RamConfig::anonymous((PAGES * PAGE) as u64)
            };
            Block {
                name: name.to_owned(),
                ram: Arc::new(RamBlock::new(&config).unwrap()),
            }
        };
        let blocks = vec![block("private", false), block("shared", true)];
        let (steps, over) = (Arc::new(Mutex::new(1)), Arc::new(AtomicBool::new(false)));
        let (counter, ended, memory) = (Arc::clone(&steps), Arc::clone(&over), blocks.clone());
        let written = disk.clone();
        let thread = thread::spawn(move || {
            while !ended.load(Ordering::Relaxed) {
                let mut step = counter.lock();
                write_number(&memory, *step);
                if let Some(disk) = &written {
                    write_block(disk, *step);
                }
                *step += 1;
            }
        });
        Self {
            blocks,
            disk,
            steps,
            over,
            thread: Some(thread),
            stopped: None,
            at_step: Box::new(at_step),
        }
    }

    /// Waits until the guest has made some more steps.
    pub(in crate::snapshot) fn runs(&self) {
        let before = *self.steps.lock();
        let deadline = Instant::now() + Duration::from_secs(60);
        while *self.steps.lock() < before + 10_000 {
            assert!(Instant::now() < deadline, "the guest does not run");
            thread::yield_now();
        }
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        self.stopped = None;
        self.over.store(true, Ordering::Relaxed);
        self.thread.take().unwrap().join().unwrap();
    }
}

impl RunningGuest for Guest {
    fn offer(&mut self) -> Result<Offer, Refusal> {
        (self.at_step)(At::Offer)?;
        let info = |block: &Block| BlockInfo {
            name: block.name.clone(),
            size: block.ram.len() as u64,
        };
        Ok(Offer {
            vm: "web".to_owned(),
            machine: ByteBuf::new(),
            blocks: self.blocks.iter().map(info).collect(),
            connections: 1,
            postcopy: false,
            given: false,
            verify: false,
            disks: Vec::new(),
        })
    }

    fn blocks(&self) -> Vec<Block> {
        self.blocks.clone()
    }

    fn stop(&mut self) -> Result<Stopped, Refusal> {
        (self.at_step)(At::Stop)?;
        self.stopped = Some(Mutex::lock_arc(&self.steps));
        Ok(Stopped {
            was_paused: false,
            clocks_at: Instant::now(),
        })
    }

    fn save(&mut self) -> Result<Vec<u8>, Refusal> {
        (self.at_step)(At::Save)?;
        Ok(self.stopped.as_ref().unwrap().to_le_bytes().to_vec())
    }

    fn resume(&mut self) -> Result<(), Refusal> {
        (self.at_step)(At::Resume)?;
        self.stopped = None;
        Ok(())
    }

    fn resumed(&mut self) {
        assert!(self.stopped.is_none());
    }

    fn resume_copying(&mut self) -> Result<(), Refusal> {
        (self.at_step)(At::CallOff)?;
        self.stopped = None;
        Ok(())
    }

    fn sync(&mut self) {
        (self.at_step)(At::Sync).unwrap();
    }
}

pub(in crate::snapshot) fn snapshot(
    dir: &Path,
    guest: &mut Guest,
    decision: &Decision,
) -> (Result<(), Refusal>, Progress) {
    snapshot_by(&Policy::default(), dir, guest, decision)
}

pub(in crate::snapshot) fn snapshot_by(
    policy: &Policy,
    dir: &Path,
    guest: &mut Guest,
    decision: &Decision,
) -> (Result<(), Refusal>, Progress) {
    let progress = Progress::default();
    let disk = guest.disk.clone();
    let start_tracking = || {
        disk.iter().for_each(|disk| disk.track(true));
        Ok(())
    };
    let writing = Writing {
        id: Uuid::new_v4(),
        dir,
        sealing: &|| Ok(()),
        end: &|_| "",
        base: None,
        disks: disk.as_ref().map(|disk| CopiedDisks {
            disks: vec![disk.at_source("root")],
            start_tracking: &start_tracking,
            policy,
        }),
        progress: &progress,
        decision,
    };
    (write_live(&writing, guest), progress)
}

/// Checks that the memory in the snapshot, and a copied disk, are those of the moment of its state.
pub(in crate::snapshot) fn check(dir: &Path) {
    let snapshot = Snapshot::open(dir).unwrap();
    let steps = u64::from_le_bytes(snapshot.state().try_into().unwrap());
    let block = |name: &str| Block {
        name: name.to_owned(),
        ram: Arc::new(RamBlock::new(&RamConfig::anonymous((PAGES * PAGE) as u64)).unwrap()),
    };
    let blocks = [block("private"), block("shared")];
    snapshot
        .fill(&blocks, &Progress::default(), &Decision::default())
        .unwrap();
    check_memory(&blocks, steps);
    snapshot.verify_disks(&Decision::default()).unwrap();
    for (disk, path) in snapshot.disks() {
        let expected = MemoryDisk::new(disk.size as usize);
        (1..steps).for_each(|step| write_block(&expected, step));
        assert!(fs::read(path).unwrap() == expected.contents(), "the disk");
    }
}

/// Checks that memory is as the guest had it after so many steps.
fn check_memory(blocks: &[Block], steps: u64) {
    let mut expected = vec![0; 2 * PAGES];
    for step in 1..steps {
        expected[(step * 7) as usize % (2 * PAGES)] = step;
    }
    for (page, expected) in expected.into_iter().enumerate() {
        let ram = &blocks[page / PAGES].ram;
        let slice = ram.slice(page % PAGES * PAGE, PAGE).unwrap();
        assert_eq!(slice.read_obj::<u64>(16).unwrap(), expected, "page {page}");
    }
}

#[test]
fn image_is_of_one_moment() {
    let dir = tempfile::tempdir().unwrap();
    let mut guest = Guest::new(|_| Ok(()));
    for round in 0..5 {
        // The first while most pages have no content, the later ones while all have.
        let folder = dir.path().join(round.to_string());
        let (written, progress) = snapshot(&folder, &mut guest, &Decision::default());
        written.unwrap();
        check(&folder);
        let report = progress.report();
        assert_eq!(report.phase, Phase::Completed);
        assert_eq!(report.pages + report.zero_pages, 2 * PAGES as u64);
        assert_eq!(report.remaining_pages, 0);
        assert!(report.downtime.unwrap().total_us > 0);
        guest.runs();
    }
}

/// Memory that was added by the host is in the snapshot, and the rest of its room is zeros.
#[test]
fn room_that_is_not_plugged_is_zeros() {
    const ROOM: usize = 8 * CHUNK;
    let dir = tempfile::tempdir().unwrap();
    let folder = dir.path().join("new");
    let mut guest = Guest::new(|_| Ok(()));
    let room = |guest_plugs| {
        let config = RamConfig {
            hotplug: true,
            guest_plugs,
            ..RamConfig::anonymous((ROOM * PAGE) as u64)
        };
        Block {
            name: "hotplug".to_owned(),
            ram: Arc::new(RamBlock::new(&config).unwrap()),
        }
    };
    let plugged = room(false);
    plugged.ram.plug(0, 2 * CHUNK * PAGE).unwrap();
    const LAST: usize = (2 * CHUNK - 1) * PAGE;
    let page = plugged.ram.slice(LAST, PAGE).unwrap();
    page.write_obj(7_u64, 16).unwrap();
    guest.blocks.push(plugged);
    let (written, progress) = snapshot(&folder, &mut guest, &Decision::default());
    written.unwrap();
    let report = progress.report();
    let copied = (2 * PAGES + ROOM) as u64;
    assert_eq!(report.pages + report.zero_pages, copied);
    assert_eq!(report.remaining_pages, 0);

    let block = |name: &str| Block {
        name: name.to_owned(),
        ram: Arc::new(RamBlock::new(&RamConfig::anonymous((PAGES * PAGE) as u64)).unwrap()),
    };
    let there = room(false);
    there.ram.plug(0, 2 * CHUNK * PAGE).unwrap();
    let blocks = [block("private"), block("shared"), there];
    let filled = Snapshot::open(&folder).unwrap();
    filled
        .fill(&blocks, &Progress::default(), &Decision::default())
        .unwrap();
    let page = blocks[2].ram.slice(LAST, PAGE).unwrap();
    assert_eq!(page.read_obj::<u64>(16).unwrap(), 7);

    // A guest that plugs by itself could change what is to be copied.
    guest.blocks[2] = room(true);
    let folder = dir.path().join("refused");
    let (refused, _) = snapshot(&folder, &mut guest, &Decision::default());
    assert_eq!(refused.unwrap_err().code, "live-unsupported");
}

/// The guest writes to all pages at once when it resumes: the fault thread copies most of them.
#[test]
fn pages_that_are_waited_for_are_copied_first() {
    let dir = tempfile::tempdir().unwrap();
    let folder = dir.path().join("new");
    let mut guest = Guest::new(|_| Ok(()));
    guest.runs();
    let blocks = guest.blocks.clone();
    guest.at_step = Box::new(move |at| {
        if at == At::Resume {
            // Before the engine's next step: the writer has copied nothing yet.
            let reader = blocks[1].ram.slice(0, PAGE).unwrap();
            reader.write_obj(u64::MAX, 16).unwrap();
            assert_eq!(blocks[0].ram.discard(0, 9 * PAGE).unwrap(), 9 * PAGE as u64);
        }
        Ok(())
    });
    let (written, progress) = snapshot(&folder, &mut guest, &Decision::default());
    written.unwrap();
    check(&folder);
    assert!(progress.report().faults >= 10, "{:?}", progress.report());
    guest.runs();
}

/// The same for forks of a running guest, which are mapped from memory of this process.
#[test]
fn captured_image_is_of_one_moment() {
    let (progress, decision) = (Progress::default(), Decision::default());
    let mut guest = Guest::new(|_| Ok(()));
    for _ in 0..3 {
        let free = AtomicBool::new(false);
        let end = |outcome: Result<(), &Refusal>| {
            outcome.unwrap();
            free.store(true, Ordering::Relaxed);
            ""
        };
        let captured = Snapshot::capture_live(&mut guest, end, &progress, &decision).unwrap();
        assert!(free.load(Ordering::Relaxed) && !progress.report().phase.is_over());
        guest.runs();
        let steps = u64::from_le_bytes(captured.state().try_into().unwrap());
        let size = (PAGES * PAGE) as u64;
        let view = |(index, name): (u64, &str)| {
            let (config, file) = (RamConfig::anonymous(size), captured.memory().unwrap());
            let ram = RamBlock::view_of_file(&config, file, index * size).unwrap();
            Block {
                name: name.to_owned(),
                ram: Arc::new(ram),
            }
        };
        let blocks: Vec<Block> = (0..).zip(["private", "shared"]).map(view).collect();
        check_memory(&blocks, steps);
    }
}

/// A cancel or a failure of a live capture leaves a guest that runs and is not protected.
#[test]
fn capture_that_fails_lets_the_guest_run() {
    for cancels in [true, false] {
        let (progress, decision) = (Progress::default(), Decision::default());
        let canceler = decision.clone();
        let mut guest = Guest::new(move |step| match (step, cancels) {
            (At::Resume, true) => {
                canceler.cancel().unwrap();
                Ok(())
            }
            (At::Save, false) => Err(Refusal::new("gone", "gone")),
            _ => Ok(()),
        });
        let mut why = None;
        let end = |outcome: Result<(), &Refusal>| {
            why = outcome.err().map(|why| why.code.clone());
            "; and this is left"
        };
        let refused = Snapshot::capture_live(&mut guest, end, &progress, &decision).unwrap_err();
        assert_eq!(refused.code, if cancels { "canceled" } else { "gone" });
        assert_eq!(why, Some(refused.code));
        assert!(refused.detail.ends_with("; and this is left"));
        assert!(progress.report().phase.is_over());
        // The owner of a guest that cannot be saved resumes it, as the driver does.
        guest.stopped = None;
        guest.runs();
        assert_eq!(guest.blocks[0].ram.discard(0, PAGE).unwrap(), PAGE as u64);
    }
}

#[test]
fn cancel_at_each_step_leaves_nothing_and_the_guest_runs() {
    for at in [At::Offer, At::Stop, At::Save, At::Resume, At::Sync] {
        let dir = tempfile::tempdir().unwrap();
        let decision = Decision::default();
        let canceler = decision.clone();
        let mut guest = Guest::new(move |step| {
            if step == at {
                canceler.cancel().unwrap();
            }
            Ok(())
        });
        let (written, progress) = snapshot(&dir.path().join("new"), &mut guest, &decision);
        assert_eq!(written.unwrap_err().code, "canceled", "{at:?}");
        assert_eq!(progress.report().phase, Phase::Canceled);
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0, "{at:?}");
        guest.runs();
        assert!(guest.blocks.iter().all(|block| {
            // Nothing is protected any more, so that this waits for nothing.
            block.ram.discard(0, PAGE).unwrap() == PAGE as u64
        }));
    }
}

#[test]
fn failure_of_the_guest_leaves_nothing() {
    for at in [At::Offer, At::Stop, At::Save, At::Resume] {
        let dir = tempfile::tempdir().unwrap();
        let mut guest = Guest::new(move |step| match step == at {
            true => Err(Refusal::new("gone", "gone")),
            false => Ok(()),
        });
        let (written, _) = snapshot(&dir.path().join("new"), &mut guest, &Decision::default());
        assert_eq!(written.unwrap_err().code, "gone", "{at:?}");
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0, "{at:?}");
        // The owner resumes it, as the driver does.
        guest.stopped = None;
        guest.runs();
    }
}

/// Memory that another user of userfaultfd has registered.
#[test]
fn memory_that_cannot_be_protected_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let mut guest = Guest::new(|_| Ok(()));
    let other = WriteProtection::new(vec![Arc::clone(&guest.blocks[1].ram)]).unwrap();
    let (written, _) = snapshot(&dir.path().join("new"), &mut guest, &Decision::default());
    assert_eq!(written.unwrap_err().code, "live-unsupported");
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
    guest.runs();
    drop(other);
}

#[test]
fn pages_near_each_other_are_one_run() {
    let runs = [(0, 2), (3, 1), (4 + GAP, 5), (10 + 2 * GAP, 1)];
    let near = joined(runs.into_iter(), GAP);
    assert_eq!(near, [(0, 9 + GAP), (10 + 2 * GAP, 1)]);
    assert_eq!(
        joined([(1, 1), (2, 1), (4, 1)].into_iter(), 0),
        [(1, 2), (4, 1)]
    );
}

/// The disk is full when a part of the memory is written.
#[test]
fn full_disk_leaves_nothing_and_the_guest_runs() {
    // A file system of its own needs a mount namespace, and that a process of its own.
    let dir = tempfile::tempdir().unwrap();
    let test = "snapshot::live::tests::inner_full_disk";
    let script = r#"mount -t tmpfs -o size=4m snapshot "$1" && exec "$2" --exact "$3" --ignored"#;
    let run = Command::new("unshare")
        .args(["--mount", "sh", "-c", script, "sh"])
        .arg(dir.path())
        .arg(std::env::current_exe().unwrap())
        .arg(test)
        .env("WHIMBREL_TEST_FULL", dir.path())
        .output()
        .unwrap();
    let output = String::from_utf8_lossy(&run.stdout);
    assert!(run.status.success(), "{run:?}");
    assert!(output.contains("1 passed"), "{output}");
}

#[test]
#[ignore = "needs a small file system: another test runs it"]
fn inner_full_disk() {
    let dir = std::env::var_os("WHIMBREL_TEST_FULL").unwrap();
    let dir = Path::new(&dir);
    let mut guest = Guest::new(|_| Ok(()));
    guest.runs();
    let folder = dir.join("new");
    let (written, progress) = snapshot(&folder, &mut guest, &Decision::default());
    assert_eq!(written.unwrap_err().code, "no-space");
    assert!(progress.report().pages > 0, "a part was written");
    assert_eq!(fs::read_dir(dir).unwrap().count(), 0);
    guest.runs();
    // With less and less room, so that it ends in each part of a copied disk and of the memory.
    let mut guest = Guest::with_disk(Some(MemoryDisk::new(BLOCKS as usize * PAGE)), |_| Ok(()));
    guest.runs();
    for taken in (0..16).map(|part| part << 18) {
        let filler = dir.join("filler");
        fs::write(&filler, vec![1; taken]).unwrap();
        let (written, _) = snapshot(&folder, &mut guest, &Decision::default());
        assert_eq!(written.unwrap_err().code, "no-space", "{taken}");
        assert!(!folder.exists(), "{taken}");
        guest.runs();
    }
}
