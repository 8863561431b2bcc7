use std::fs::{self, OpenOptions};
use std::os::unix::fs::{FileExt as _, MetadataExt as _, symlink};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use memory::{RamBlock, RamConfig};
use proptest::prelude::*;
use serde_bytes::ByteBuf;
use tempfile::TempDir;
use uuid::Uuid;

use super::*;
use crate::message::{BlockInfo, Offer, Refusal};
use crate::pages::Block;
use crate::{Decision, Phase, Progress};

const FILES: [&str; 5] = [MANIFEST, MACHINE, STATE, MEMORY, HASHES];

fn block(name: &str, pages: usize) -> Block {
    let size = (pages * PAGE) as u64;
    Block {
        name: name.to_owned(),
        ram: Arc::new(RamBlock::new(&RamConfig::anonymous(size)).unwrap()),
    }
}

/// A guest with two blocks, of which the pages `written` have content.
pub(super) fn guest(written: &[usize]) -> Vec<Block> {
    let blocks = vec![block("low", 300), block("high", 7)];
    for &page in written {
        let (block, page) = if page < 300 {
            (0, page)
        } else {
            (1, page - 300)
        };
        let slice = blocks[block].ram.slice(page * PAGE, PAGE).unwrap();
        slice.copy_from(&[(page % 251 + 1) as u8; PAGE]);
    }
    blocks
}

pub(super) fn saved(blocks: &[Block]) -> Saved {
    let info = |block: &Block| BlockInfo {
        name: block.name.clone(),
        size: block.ram.len() as u64,
    };
    Saved {
        offer: Offer {
            vm: "web".to_owned(),
            machine: ByteBuf::from(b"the machine".to_vec()),
            blocks: blocks.iter().map(info).collect(),
            connections: 1,
            postcopy: false,
            given: false,
            verify: false,
            disks: Vec::new(),
        },
        state: b"the state".to_vec(),
        stopped_at: Instant::now() - Duration::from_secs(5),
        blocks: blocks.to_vec(),
    }
}

fn write_to(dir: &Path, blocks: &[Block]) -> (Result<(), Refusal>, Progress) {
    let (progress, decision) = (Progress::default(), Decision::default());
    let writing = Writing {
        id: Uuid::new_v4(),
        dir,
        sealing: &|| Ok(()),
        end: &|_| {
            assert!(!progress.report().phase.is_over());
            "; and this is left"
        },
        base: None,
        disks: None,
        progress: &progress,
        decision: &decision,
    };
    let written = write(&writing, || Ok(saved(blocks)));
    (written, progress)
}

pub(super) fn content(blocks: &[Block]) -> Vec<u8> {
    let mut all = Vec::new();
    for block in blocks {
        let mut part = vec![0; block.ram.len()];
        block
            .ram
            .slice(0, part.len())
            .unwrap()
            .copy_to(&mut part[..]);
        all.extend(part);
    }
    all
}

fn read_from(dir: &Path) -> Result<Vec<u8>, RestoreError> {
    let snapshot = Snapshot::open(dir)?;
    assert_eq!(snapshot.offer().machine.as_slice(), b"the machine");
    assert_eq!(snapshot.state(), b"the state");
    let blocks = guest(&[]);
    snapshot.fill(&blocks, &Progress::default(), &Decision::default())?;
    Ok(content(&blocks))
}

/// A folder with a snapshot of a guest whose pages 0, 5, 6, 299 and 301 have content.
pub(super) fn example() -> (TempDir, Vec<u8>) {
    let dir = tempfile::tempdir().unwrap();
    let blocks = guest(&[0, 5, 6, 299, 301]);
    write_to(dir.path(), &blocks).0.unwrap();
    (dir, content(&blocks))
}

#[test]
fn pages_of_zeros_take_no_space() {
    let (dir, expected) = example();
    assert_eq!(read_from(dir.path()).unwrap(), expected);
    let memory = fs::metadata(dir.path().join(MEMORY)).unwrap();
    assert_eq!(memory.size(), 307 * PAGE as u64);
    assert!(
        memory.blocks() * 512 < 20 * PAGE as u64,
        "{} blocks",
        memory.blocks()
    );
    let names = fs::read_dir(dir.path()).unwrap().count();
    assert_eq!(names, FILES.len(), "nothing but the snapshot is left");
    assert_eq!(memory.mode() & 0o777, 0o600);
}

/// Hotplugged memory is as large as it can become, and mostly not there.
#[test]
fn unplugged_memory_takes_no_space() {
    const PAGES: usize = 64 * CHUNK;
    let dir = tempfile::tempdir().unwrap();
    let config = RamConfig {
        shared: true,
        hotplug: true,
        ..RamConfig::anonymous((PAGES * PAGE) as u64)
    };
    let blocks = vec![Block {
        name: "hotplug".to_owned(),
        ram: Arc::new(RamBlock::new(&config).unwrap()),
    }];
    let ram = &blocks[0].ram;
    ram.plug(CHUNK * PAGE, CHUNK * PAGE).unwrap();
    let slice = ram.slice(CHUNK * PAGE, PAGE).unwrap();
    slice.copy_from(&[7_u8; PAGE]);
    write_to(dir.path(), &blocks).0.unwrap();
    let size = |name| fs::metadata(dir.path().join(name)).unwrap();
    assert_eq!(size(MEMORY).size(), (PAGES * PAGE) as u64);
    assert_eq!(size(HASHES).size(), (PAGES * 8) as u64);
    for (name, pages) in [(MEMORY, 2), (HASHES, CHUNK * 8 / PAGE + 2)] {
        let taken = size(name).blocks() * 512;
        assert!(taken <= (pages * PAGE) as u64, "{name}: {taken} bytes");
    }
    let taken = ram.file().unwrap().metadata().unwrap().blocks() * 512;
    assert!(taken <= (CHUNK * PAGE) as u64, "{taken} bytes of memory");
    let restored = vec![Block {
        name: "hotplug".to_owned(),
        ram: Arc::new(RamBlock::new(&config).unwrap()),
    }];
    let snapshot = Snapshot::open(dir.path()).unwrap();
    snapshot
        .fill(&restored, &Progress::default(), &Decision::default())
        .unwrap();
    assert!(content(&restored) == content(&blocks));
}

pub(super) fn write_on(dir: &Path, base: &Path, blocks: &[Block]) -> (Result<(), Refusal>, u64) {
    let (progress, decision) = (Progress::default(), Decision::default());
    let base = Snapshot::open(base).unwrap();
    let writing = Writing {
        id: Uuid::new_v4(),
        dir,
        base: Some(&base),
        disks: None,
        sealing: &|| Ok(()),
        end: &|_| "",
        progress: &progress,
        decision: &decision,
    };
    let written = write(&writing, || Ok(saved(blocks)));
    (written, progress.report().pages)
}

/// Each of five increments has the changed pages only, and all of the memory when it is read.
#[test]
fn chain_of_increments_is_read_as_one() {
    let parent = tempfile::tempdir().unwrap();
    let dir = |i: usize| parent.path().join(i.to_string());
    let mut written = vec![0, 5, 6, 299, 301];
    let blocks = guest(&written);
    write_to(&dir(0), &blocks).0.unwrap();
    let mut expected = vec![content(&blocks)];
    for i in 1..6 {
        // A page with content, changed content, and a page of zeros where there was content.
        written.push(10 * i);
        let changed = |page: usize, byte: u8| {
            let slice = blocks[0].ram.slice(page * PAGE, PAGE).unwrap();
            slice.copy_from(&[byte; PAGE]);
        };
        changed(10 * i, 7);
        changed(5, i as u8);
        changed(6, if i % 2 == 0 { 6 } else { 0 });
        let (taken, pages) = write_on(&dir(i), &dir(i - 1), &blocks);
        taken.unwrap();
        assert_eq!(pages, if i % 2 == 0 { 3 } else { 2 });
        expected.push(content(&blocks));
    }
    for (i, expected) in expected.iter().enumerate() {
        assert!(read_from(&dir(i)).unwrap() == *expected, "increment {i}");
    }
    // They may be moved together.
    let other = tempfile::tempdir().unwrap();
    let moved = other.path().join("moved");
    fs::rename(parent.path(), &moved).unwrap();
    assert!(read_from(&moved.join("5")).unwrap() == expected[5]);
    fs::create_dir(parent.path()).unwrap();

    let refused = |dir: &Path| Snapshot::open(dir).unwrap_err().refusal();
    fs::rename(moved.join("3"), moved.join("gone")).unwrap();
    let why = refused(&moved.join("4"));
    assert_eq!(why.code, "snapshot-base", "{why:?}");
    // Another snapshot in its place.
    write_to(&moved.join("3"), &blocks).0.unwrap();
    assert_eq!(refused(&moved.join("4")).code, "snapshot-base");
}

#[test]
fn base_of_another_machine_is_refused() {
    let (dir, _) = example();
    let parent = tempfile::tempdir().unwrap();
    let other = vec![block("low", 300), block("high", 8)];
    let to = parent.path().join("new");
    let (written, _) = write_on(&to, dir.path(), &other);
    assert_eq!(written.unwrap_err().code, "base-mismatch");
    assert!(!to.exists());
}

/// A base of itself would be read for ever.
#[test]
fn chain_is_limited() {
    let (dir, _) = example();
    let path = dir.path().join(MANIFEST);
    let mut manifest: serde_json::Value =
        serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    manifest["base"] = serde_json::json!({ "id": manifest["id"], "dir": dir.path() });
    fs::write(&path, manifest.to_string()).unwrap();
    let why = Snapshot::open(dir.path()).unwrap_err().refusal();
    assert_eq!(why.code, "snapshot-base");
}

#[test]
fn age_counts_from_the_stop() {
    let (dir, _) = example();
    let snapshot = Snapshot::open(dir.path()).unwrap();
    assert!(snapshot.manifest().stopped_for() >= Duration::from_secs(5));
    let path = dir.path().join(MANIFEST);
    let mut manifest: serde_json::Value =
        serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    // The host's time was set back since.
    manifest["stopped_ns"] = u64::MAX.into();
    fs::write(&path, manifest.to_string()).unwrap();
    let snapshot = Snapshot::open(dir.path()).unwrap();
    assert_eq!(snapshot.manifest().stopped_for(), Duration::ZERO);
}

#[test]
fn report_counts_pages() {
    let dir = tempfile::tempdir().unwrap();
    let (written, progress) = write_to(&dir.path().join("new"), &guest(&[1, 2]));
    written.unwrap();
    let report = progress.report();
    assert_eq!(
        (report.phase, report.pages, report.zero_pages),
        (Phase::Completed, 2, 305)
    );
    assert_eq!(report.remaining_pages, 0);
}

#[test]
fn a_second_snapshot_does_not_replace_the_first() {
    let (dir, expected) = example();
    let (refused, _) = write_to(dir.path(), &guest(&[3]));
    let refused = refused.unwrap_err();
    assert_eq!(refused.code, "snapshot-exists");
    assert!(refused.detail.ends_with("; and this is left"));
    assert_eq!(read_from(dir.path()).unwrap(), expected);
}

#[test]
fn failure_leaves_nothing() {
    let parent = tempfile::tempdir().unwrap();
    let dir = parent.path().join("new");
    let (progress, decision) = (Progress::default(), Decision::default());
    let writing = |decision| Writing {
        id: Uuid::new_v4(),
        dir: &dir,
        sealing: &|| Ok(()),
        end: &|_| "",
        base: None,
        disks: None,
        progress: &progress,
        decision,
    };
    let refused = write(&writing(&decision), || Err(Refusal::new("gone", "gone")));
    assert_eq!(refused.unwrap_err().code, "gone");
    assert!(!dir.exists());

    decision.cancel().unwrap();
    let refused = write(&writing(&decision), || Ok(saved(&guest(&[1]))));
    assert_eq!(refused.unwrap_err().code, "canceled");
    assert_eq!(progress.report().phase, Phase::Canceled);
    assert!(!dir.exists());

    // A folder that was there before stays, empty.
    fs::create_dir(&dir).unwrap();
    write(&writing(&decision), || Ok(saved(&guest(&[1])))).unwrap_err();
    assert_eq!(fs::read_dir(&dir).unwrap().count(), 0);
}

/// A paused guest is saved while the operator cancels. The base of an increment stays.
#[test]
fn cancel_while_the_state_is_saved_leaves_nothing() {
    let (parent, expected) = example();
    let dir = parent.path().join("new");
    let base = Snapshot::open(parent.path()).unwrap();
    for base in [None, Some(&base)] {
        let (progress, decision) = (Progress::default(), Decision::default());
        let writing = Writing {
            id: Uuid::new_v4(),
            dir: &dir,
            sealing: &|| Ok(()),
            end: &|_| "",
            base,
            disks: None,
            progress: &progress,
            decision: &decision,
        };
        let refused = write(&writing, || {
            decision.cancel().unwrap();
            Ok(saved(&guest(&[1])))
        });
        assert_eq!(refused.unwrap_err().code, "canceled");
        assert_eq!(progress.report().phase, Phase::Canceled);
        assert!(!dir.exists());
    }
    assert_eq!(read_from(parent.path()).unwrap(), expected);
}

#[test]
fn folder_without_a_manifest_holds_no_snapshot() {
    let (dir, _) = example();
    fs::remove_file(dir.path().join(MANIFEST)).unwrap();
    let refused = Snapshot::open(dir.path()).unwrap_err();
    assert_eq!(refused.refusal().code, "snapshot-unreadable");
}

#[test]
fn newer_and_foreign_formats_are_named() {
    let (dir, _) = example();
    let path = dir.path().join(MANIFEST);
    let text = fs::read_to_string(&path).unwrap();
    fs::write(
        &path,
        text.replace("\"version\": 2", "\"version\": 9, \"later\": true"),
    )
    .unwrap();
    assert_eq!(
        Snapshot::open(dir.path()).unwrap_err().to_string(),
        "the snapshot has version 9 of the format; this program reads versions 1 to 3"
    );
    fs::write(&path, text.replace("whimbrel-snapshot", "qemu")).unwrap();
    let refused = Snapshot::open(dir.path()).unwrap_err();
    assert_eq!(refused.refusal().code, "not-a-snapshot");
}

#[test]
fn every_changed_byte_and_length_is_found() {
    let (dir, _) = example();
    for name in FILES {
        let path = dir.path().join(name);
        let whole = fs::read(&path).unwrap();
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .open(&path)
            .unwrap();
        // Bytes of data: a changed byte in a hole is content where the hash says zeros, which is never read.
        let ends = [0, whole.len() / 2, whole.len() - 1];
        let data = whole.iter().position(|byte| *byte > 1).unwrap();
        let offsets = if name == MEMORY {
            vec![data]
        } else {
            ends.to_vec()
        };
        for offset in offsets {
            file.write_all_at(&[whole[offset] ^ 0x55], offset as u64)
                .unwrap();
            let refused = read_from(dir.path()).unwrap_err();
            assert_eq!(
                refused.refusal().code,
                "snapshot-damaged",
                "{name} {offset}: {refused}"
            );
            file.write_all_at(&whole[offset..=offset], offset as u64)
                .unwrap();
        }
        for len in [0, whole.len() as u64 - 1, whole.len() as u64 + 1] {
            fs::write(&path, &whole).unwrap();
            file.set_len(len).unwrap();
            // A byte of zero behind JSON is no JSON.
            assert!(read_from(dir.path()).is_err(), "{name} of {len} bytes");
        }
        fs::write(&path, &whole).unwrap();
    }
    read_from(dir.path()).unwrap();
}

#[test]
fn links_and_fifos_are_not_followed() {
    let (dir, _) = example();
    let path = dir.path().join(STATE);
    fs::rename(&path, dir.path().join("elsewhere")).unwrap();
    symlink(dir.path().join("elsewhere"), &path).unwrap();
    assert!(read_from(dir.path()).is_err());
    fs::remove_file(&path).unwrap();
    rustix::fs::mknodat(
        rustix::fs::CWD,
        &path,
        rustix::fs::FileType::Fifo,
        rustix::fs::Mode::RUSR,
        0,
    )
    .unwrap();
    let refused = read_from(dir.path()).unwrap_err();
    assert_eq!(
        refused.to_string(),
        "the snapshot is damaged: state.bin is not a regular file"
    );
}

#[test]
fn golden_manifest_of_version_1() {
    let text = include_bytes!("manifest-v1.json");
    let manifest = Manifest::parse(text).unwrap();
    assert_eq!((manifest.vm.as_str(), manifest.version), ("web", 1));
    assert_eq!(manifest.stopped_for(), Duration::ZERO, "it does not say");
    assert_eq!(manifest.memory_size(), Some(512 << 20));
}

/// A whole snapshot that version 1 wrote. Its memory is that of [`guest`], whose hashes are in it.
#[test]
fn golden_snapshot_of_version_1() {
    let dir = tempfile::tempdir().unwrap();
    let written = [0, 5, 6, 299, 301];
    let golden = Path::new(concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/src/snapshot/golden-v1"
    ));
    for name in [MANIFEST, MACHINE, STATE, HASHES] {
        fs::copy(golden.join(name), dir.path().join(name)).unwrap();
    }
    let memory = content(&guest(&written));
    fs::write(dir.path().join(MEMORY), &memory).unwrap();
    assert_eq!(read_from(dir.path()).unwrap(), memory);
    let manifest = Snapshot::open(dir.path()).unwrap().manifest().clone();
    assert_eq!((manifest.version, manifest.vm.as_str()), (1, "web"));
}

proptest! {
    // Each case syncs files.
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn memory_comes_back(written in prop::collection::btree_set(0_usize..307, 0..60)) {
        let dir = tempfile::tempdir().unwrap();
        let written: Vec<usize> = written.into_iter().collect();
        let blocks = guest(&written);
        write_to(dir.path(), &blocks).0.unwrap();
        prop_assert_eq!(read_from(dir.path()).unwrap(), content(&blocks));
    }

    #[test]
    fn manifests_of_any_bytes_are_answered(text in prop::collection::vec(any::<u8>(), 0..200)) {
        prop_assert!(Manifest::parse(&text).is_err());
    }

    #[test]
    fn manifests_with_any_numbers_are_within_limits(
        sizes in prop::collection::vec(any::<u64>(), 0..4),
        state in any::<u64>(),
        hashes in any::<u64>(),
    ) {
        let mut golden: serde_json::Value =
            serde_json::from_slice(include_bytes!("manifest-v1.json")).unwrap();
        golden["memory"] = sizes.iter().map(|size| serde_json::json!({ "name": "b", "size": size })).collect();
        golden["state"]["size"] = state.into();
        golden["hashes"]["size"] = hashes.into();
        if let Ok(manifest) = Manifest::parse(golden.to_string().as_bytes()) {
            prop_assert!(manifest.state.size <= 80 << 20);
            prop_assert_eq!(manifest.memory_size().unwrap() / PAGE as u64 * 8, manifest.hashes.size);
        }
    }
}

fn merge_to(dir: &Path, chain: &Path, decision: &Decision) -> (Result<(), Refusal>, Progress) {
    let progress = Progress::default();
    let writing = Writing {
        id: Uuid::new_v4(),
        dir,
        base: None,
        disks: None,
        sealing: &|| Ok(()),
        end: &|_| "",
        progress: &progress,
        decision,
    };
    let merged = merge(&writing, &Snapshot::open(chain).unwrap());
    (merged, progress)
}

/// A snapshot, and an increment on it.
fn short_chain(parent: &Path) -> (std::path::PathBuf, Vec<Block>) {
    let blocks = guest(&[0, 5, 6, 299, 301]);
    write_to(&parent.join("0"), &blocks).0.unwrap();
    for (page, byte) in [(5, 9), (6, 0), (40, 7)] {
        let slice = blocks[0].ram.slice(page * PAGE, PAGE).unwrap();
        slice.copy_from(&[byte; PAGE]);
    }
    let top = parent.join("1");
    write_on(&top, &parent.join("0"), &blocks).0.unwrap();
    (top, blocks)
}

/// A merged chain is the same guest at the same moment, and needs no base.
#[test]
fn merged_chain_is_read_without_its_bases() {
    let parent = tempfile::tempdir().unwrap();
    let (top, blocks) = short_chain(parent.path());
    let whole = parent.path().join("whole");
    let (merged, progress) = merge_to(&whole, &top, &Decision::default());
    merged.unwrap();
    let report = progress.report();
    assert_eq!((report.pages, report.remaining_pages), (5, 0));
    assert_eq!(report.phase, Phase::Completed);
    let of_chain = Snapshot::open(&top).unwrap();
    fs::remove_dir_all(parent.path().join("0")).unwrap();
    assert!(read_from(&whole).unwrap() == content(&blocks));
    let merged = Snapshot::open(&whole).unwrap();
    let (old, new) = (of_chain.manifest(), merged.manifest());
    assert!(new.base.is_none() && new.id != old.id);
    assert_eq!(
        (&new.vm, new.created_ms, new.stopped_ns, &new.memory),
        (&old.vm, old.created_ms, old.stopped_ns, &old.memory)
    );
    assert_eq!(merged.state(), of_chain.state());
    assert_eq!(merged.offer().machine, of_chain.offer().machine);
    // Holes stay holes.
    let metadata = fs::metadata(whole.join(MEMORY)).unwrap();
    assert!(metadata.blocks() * 512 < 64 * PAGE as u64, "{metadata:?}");
    // Never over another one.
    let (again, _) = merge_to(&whole, &whole, &Decision::default());
    assert_eq!(again.unwrap_err().code, "snapshot-exists");
}

/// Nothing is left of a merged snapshot if a file of the chain is damaged, or it is canceled.
#[test]
fn failed_merge_leaves_nothing() {
    let parent = tempfile::tempdir().unwrap();
    let (top, _) = short_chain(parent.path());
    let new = parent.path().join("new");
    let damage = |file: &Path, at: u64| {
        let file = OpenOptions::new().read(true).write(true).open(file);
        let (file, mut byte) = (file.unwrap(), [0]);
        file.read_exact_at(&mut byte, at).unwrap();
        file.write_all_at(&[!byte[0]], at).unwrap();
    };
    // A page of the increment, a page of the base, and a hash.
    for (file, at) in [
        (top.join(MEMORY), 40 * PAGE as u64),
        (parent.path().join("0").join(MEMORY), 0),
        (top.join(HASHES), 8 * 17),
    ] {
        damage(&file, at);
        let (failed, progress) = merge_to(&new, &top, &Decision::default());
        assert_eq!(failed.unwrap_err().code, "snapshot-damaged", "{file:?}");
        assert_eq!(progress.report().phase, Phase::Failed);
        assert!(!new.exists(), "{file:?}");
        damage(&file, at);
    }
    let canceled = Decision::default();
    canceled.cancel().unwrap();
    let (merged, progress) = merge_to(&new, &top, &canceled);
    assert_eq!(merged.unwrap_err().code, "canceled");
    assert_eq!(progress.report().phase, Phase::Canceled);
    assert!(!new.exists());
    merge_to(&new, &top, &Decision::default()).0.unwrap();
}
