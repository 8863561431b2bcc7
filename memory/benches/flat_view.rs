//! Lookup and commit, as a table: `cargo bench -p memory --bench flat_view`.
//!
//! Lookups are of random addresses that are all in RAM, in maps of so many ranges, beside those of vm-memory's own
//! `GuestMemoryMmap` in the same run. Numbers are medians of 21 rounds.

#![expect(clippy::unwrap_used, reason = "a benchmark that goes wrong panics")]

use std::hint::black_box;
use std::sync::Arc;
use std::time::{Duration, Instant};

use memory::{RamBlock, RamConfig, RamSlice, RegionId, SpaceKind, Topology};
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryMmap};

const PAGE: u64 = 4096;
const ROUNDS: usize = 21;
const LOOKUPS: u64 = 20_000;

fn main() {
    println!(
        "{:>8}  {:>14} {:>14} {:>7}  {:>14}",
        "ranges", "lookup", "vm-memory", "ratio", "one commit"
    );
    for ranges in [10, 100, 1_000, 10_000] {
        let (mut topology, last) = topology(ranges);
        let mmap = mmap(ranges);
        let space = topology.space(SpaceKind::Memory);
        let ours = median(|| {
            lookups(ranges, |addr| {
                let view = space.view();
                black_box(view.find_region(GuestAddress(addr)).is_some());
            })
        });
        let theirs = median(|| {
            lookups(ranges, |addr| {
                black_box(mmap.find_region(GuestAddress(addr)).is_some());
            })
        });
        let mut at = 0;
        let commit = median(|| {
            at ^= PAGE;
            let start = Instant::now();
            let mut tx = topology.begin();
            tx.move_to(last, ranges * 2 * PAGE + at).unwrap();
            tx.commit().unwrap();
            start.elapsed()
        });
        let each = |round: Duration| round.as_secs_f64() * 1e9 / LOOKUPS as f64;
        println!(
            "{ranges:>8}  {:>11.1} ns {:>11.1} ns {:>7.2}  {:>11.1} us",
            each(ours),
            each(theirs),
            ours.as_secs_f64() / theirs.as_secs_f64(),
            commit.as_secs_f64() * 1e6,
        );
    }
}

/// Pages of one block, each with a hole behind it, so that none merge.
fn topology(ranges: u64) -> (Topology, RegionId) {
    let block = Arc::new(RamBlock::new(&RamConfig::anonymous(ranges * PAGE)).unwrap());
    let mut topology = Topology::new();
    let mut tx = topology.begin();
    let mut last = None;
    for index in 0..ranges {
        let slice = RamSlice {
            block: Arc::clone(&block),
            offset: index * PAGE,
        };
        let page = tx.ram("page", slice, PAGE).unwrap();
        tx.map(SpaceKind::Memory, index * 2 * PAGE, page, 0)
            .unwrap();
        last = Some(page);
    }
    tx.commit().unwrap();
    (topology, last.unwrap())
}

fn mmap(ranges: u64) -> GuestMemoryMmap {
    let page = usize::try_from(PAGE).unwrap();
    let all: Vec<_> = (0..ranges)
        .map(|index| (GuestAddress(index * 2 * PAGE), page))
        .collect();
    GuestMemoryMmap::from_ranges(&all).unwrap()
}

fn lookups(ranges: u64, mut look: impl FnMut(u64)) -> Duration {
    let mut random = 0x9e37_79b9_7f4a_7c15_u64;
    let start = Instant::now();
    for _ in 0..LOOKUPS {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        look(random % ranges * 2 * PAGE + random % PAGE);
    }
    start.elapsed()
}

fn median(mut round: impl FnMut() -> Duration) -> Duration {
    let mut all: Vec<_> = (0..ROUNDS).map(|_| round()).collect();
    all.sort();
    all[ROUNDS / 2]
}
