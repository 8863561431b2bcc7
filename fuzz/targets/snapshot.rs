//! Folders that claim to be snapshots: a manifest with arbitrary numbers or bytes, and arbitrary files, a
//! working set and copies of disks among them.

#![no_main]

use std::fs;
use std::sync::Arc;

use arbitrary::{Arbitrary, Unstructured};
use libfuzzer_sys::fuzz_target;
use memory::{RamBlock, RamConfig};
use migration::snapshot::Snapshot;
use migration::{Block, Decision, Progress};

#[derive(Arbitrary, Debug)]
struct Folder {
    manifest: Manifest,
    machine: Vec<u8>,
    state: Vec<u8>,
    memory: Vec<u8>,
    hashes: Vec<u8>,
    working_set: WorkingSet,
    disks: Vec<Disk>,
}

/// A copied disk: its image, and what the manifest says of it where that is not true.
#[derive(Arbitrary, Debug)]
struct Disk {
    name: String,
    content: Vec<u8>,
    size: Option<u64>,
    hash: Option<u64>,
}

impl Disk {
    /// The image: sectors, as many as there are bytes.
    fn image(&self) -> Vec<u8> {
        self.content.iter().flat_map(|byte| [*byte; 512]).collect()
    }

    fn info(&self) -> serde_json::Value {
        let image = self.image();
        let mut all = xxhash_rust::xxh3::Xxh3::new();
        for (at, part) in (0_u64..).step_by(1 << 20).zip(image.chunks(1 << 20)) {
            if part.iter().any(|byte| *byte != 0) {
                all.update(&at.to_le_bytes());
                all.update(part);
            }
        }
        serde_json::json!({
            "name": self.name, "size": self.size.unwrap_or(image.len() as u64),
            "hash": self.hash.unwrap_or_else(|| all.digest()),
        })
    }
}

#[derive(Arbitrary, Debug)]
enum WorkingSet {
    Bytes(Vec<u8>),
    Runs { runs: Vec<(u64, u64)>, small: bool, pages: Option<u64>, hash: Option<u64> },
}

impl WorkingSet {
    fn text(&self) -> Vec<u8> {
        let (runs, small, pages, other) = match self {
            Self::Bytes(bytes) => return bytes.clone(),
            Self::Runs { runs, small, pages, hash } => (runs, *small, *pages, *hash),
        };
        // Small numbers are within the memory more often than a fuzzer would find them.
        let small = |number: u64| if small { number % 64 } else { number };
        let runs: Vec<_> = runs.iter().map(|(first, count)| (small(*first), small(*count))).collect();
        let bytes: Vec<u8> =
            runs.iter().flat_map(|(first, count)| [first.to_le_bytes(), count.to_le_bytes()]).flatten().collect();
        let all = runs.iter().fold(0_u64, |all, (_, count)| all.wrapping_add(*count));
        serde_json::json!({
            "format": "whimbrel-working-set", "version": 1, "snapshot": "5f0b6a3e-6a7c-4c1a-9a55-3f3d1d0b7c11",
            "pages": pages.unwrap_or(all), "hash": other.unwrap_or_else(|| xxhash_rust::xxh3::xxh3_64(&bytes)),
            "runs": runs,
        })
        .to_string()
        .into_bytes()
    }
}

#[derive(Arbitrary, Debug)]
enum Manifest {
    Bytes(Vec<u8>),
    Fields {
        version: u8,
        blocks: Vec<u16>,
        machine: (u64, u64),
        hashes: Option<(u64, u64)>,
    },
}

/// The hash of the content, or another one.
fn info(content: &[u8], other: (u64, u64)) -> serde_json::Value {
    let (size, hash) = match other {
        (0, _) => (content.len() as u64, xxhash_rust::xxh3::xxh3_64(content)),
        other => other,
    };
    serde_json::json!({ "size": size, "hash": hash })
}

fuzz_target!(|data: &[u8]| {
    let Ok(folder) = Folder::arbitrary(&mut Unstructured::new(data)) else {
        return;
    };
    let dir = tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).unwrap();
    let pages = |blocks: &[u16]| blocks.iter().map(|pages| u64::from(*pages % 64)).collect::<Vec<_>>();
    let mut sizes = Vec::new();
    let manifest = match &folder.manifest {
        Manifest::Bytes(bytes) => bytes.clone(),
        Manifest::Fields { version, blocks, machine, hashes } => {
            sizes = pages(blocks);
            let memory: Vec<_> =
                sizes.iter().map(|pages| serde_json::json!({ "name": "b", "size": pages * 4096 })).collect();
            serde_json::json!({
                "format": "whimbrel-snapshot", "version": version % 5, "vm": "v", "created_ms": 1, "program": "p",
                "id": "5f0b6a3e-6a7c-4c1a-9a55-3f3d1d0b7c11", "page_size": 4096, "memory": memory,
                "machine": info(&folder.machine, *machine), "state": info(&folder.state, (0, 0)),
                "hashes": info(&folder.hashes, hashes.unwrap_or_default()),
                "disks": folder.disks.iter().map(Disk::info).collect::<Vec<_>>(),
            })
            .to_string()
            .into_bytes()
        }
    };
    for (name, content) in [
        ("manifest.json", &manifest),
        ("machine.json", &folder.machine),
        ("state.bin", &folder.state),
        ("hashes.bin", &folder.hashes),
        ("working-set.json", &folder.working_set.text()),
    ] {
        fs::write(dir.path().join(name), content).unwrap();
    }
    for (index, disk) in folder.disks.iter().enumerate() {
        fs::write(dir.path().join(format!("disk-{index}.raw")), disk.image()).unwrap();
    }
    let memory = dir.path().join("memory.bin");
    fs::write(&memory, &folder.memory).unwrap();
    // The size is right more often than a fuzzer would find it.
    let total: u64 = sizes.iter().sum();
    if total > 0 && folder.memory.len() % 2 == 0 {
        fs::File::options().write(true).open(&memory).unwrap().set_len(total * 4096).unwrap();
    }
    let Ok(snapshot) = Snapshot::open(dir.path()) else {
        return;
    };
    if let Some(set) = snapshot.working_set() {
        let total: u64 = snapshot.manifest().memory.iter().map(|block| block.size / 4096).sum();
        assert!(set.pages() <= total);
    }
    for (disk, path) in snapshot.disks() {
        assert_eq!(path.parent(), Some(dir.path()));
        assert_eq!(path.metadata().unwrap().len(), disk.size);
    }
    // The hash is checked by another reader of the same bytes.
    let is_true = |(disk, info): (&Disk, &migration::snapshot::DiskInfo)| {
        serde_json::to_value(info).unwrap()["hash"] == disk.info()["hash"] && disk.hash.is_none()
    };
    let listed = &snapshot.manifest().disks;
    if listed.len() == folder.disks.len() && folder.disks.iter().zip(listed).all(is_true) {
        snapshot.verify_disks(&Decision::default()).unwrap();
    } else {
        let _ = snapshot.verify_disks(&Decision::default());
    }
    let blocks = snapshot.manifest().memory.iter().map(|block| Block {
        name: block.name.clone(),
        ram: Arc::new(RamBlock::new(&RamConfig::anonymous(block.size)).unwrap()),
    });
    let blocks: Vec<_> = blocks.collect();
    let _ = snapshot.fill(&blocks, &Progress::default(), &Decision::default());
});
