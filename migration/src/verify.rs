//! Verify mode: the destination compares every page with a hash that the source took of it.
//!
//! The checksum of a frame shows that the frame arrived as it was sent. It cannot show that the page
//! was sent again after the guest wrote to it for the last time, that it was written to the right
//! place, or that a page of zeros replaced what an earlier round had left there. Hashes of the final
//! content show all of that: they are taken from guest memory in the stop, by code that knows nothing
//! of rounds, batches and dirty bitmaps.
//!
//! The hash is XXH3 with 64 bits. It has a specification that does not change, so that two versions of
//! the program agree on it; it is faster than memory on any CPU, and needs no special instructions
//! (gxhash needs AES and changes between versions; BLAKE3 is several times slower). It is not
//! cryptographic and need not be: a source that lies about hashes could as well lie about pages. A
//! page that differs goes unseen once in 2^64.
//!
//! ```text
//!   block u32 | first page u64 | for each page: hash u64
//! ```

use parking_lot::Mutex;
use xxhash_rust::const_xxh3;
use xxhash_rust::xxh3::xxh3_64;

use memory::{DirtyBitmap, DirtyPages};

use crate::message::Refusal;
use crate::pages::{Block, PAGE, Run, is_zero};
use crate::wire::WireError;

/// The least version of the protocol that has hashes.
pub(crate) const VERSION: u32 = 2;
/// Pages of one frame of hashes at most: 8 KiB of hashes for 4 MiB of memory.
pub(crate) const HASHES: usize = 1024;
const HEAD: usize = 12;
/// The hash of a page of zeros.
const ZEROS: u64 = const_xxh3::xxh3_64(&[0; PAGE]);

/// Most pages of many guests are zeros: seeing that is cheaper than hashing.
fn hash(page: &[u8; PAGE]) -> u64 {
    if is_zero(page) { ZEROS } else { xxh3_64(page) }
}

/// A copy of a page, aligned for the reason that [`memory::PageBuffer`] gives.
#[repr(align(64))]
struct Content([u8; PAGE]);

/// Reads a page of a block as it is at this moment.
fn read(block: &Block, page: usize) -> Option<Content> {
    let mut content = Content([0; PAGE]);
    let slice = block.ram.slice(page.checked_mul(PAGE)?, PAGE)?;
    // A copy: the guest or a device may write to this memory, and a Rust reference to memory that
    // changes is undefined behaviour.
    slice.copy_to(&mut content.0[..]);
    Some(content)
}

/// The pages that are not in `except`, in runs of [`HASHES`] at most.
pub(crate) fn all_but(blocks: &[Block], except: &[DirtyPages]) -> Vec<Run> {
    let mut all = Vec::new();
    for (index, block) in blocks.iter().enumerate() {
        let mut from = 0;
        let mut add = |from: usize, to: usize| {
            let runs = (from..to).step_by(HASHES).map(|first| Run {
                // A machine has few blocks, and a run few pages.
                block: index as u32,
                first: first as u64,
                pages: HASHES.min(to - first) as u32,
            });
            all.extend(runs);
        };
        for (first, pages) in except.get(index).into_iter().flat_map(DirtyPages::runs) {
            add(from, first);
            from = first + pages;
        }
        add(from, block.ram.len() / PAGE);
    }
    all
}

/// Hashes a run of pages: the body of a frame.
pub(crate) fn encode(block: &Block, run: Run) -> Vec<u8> {
    let mut body = Vec::with_capacity(HEAD + run.pages as usize * 8);
    body.extend(run.block.to_le_bytes());
    body.extend(run.first.to_le_bytes());
    for page in run.first..run.first + u64::from(run.pages) {
        let mut content = Content([0; PAGE]);
        // Within the block. What is unplugged counts as zeros, and is not touched.
        let offset = (page as usize).saturating_mul(PAGE);
        if block.ram.read_pages(offset, &mut content.0) {
            body.extend(hash(&content.0).to_le_bytes());
        }
    }
    body
}

/// Hashes that arrived, checked against the memory that there is.
#[derive(Default)]
pub(crate) struct Hashes {
    block: usize,
    first: usize,
    hashes: Vec<u64>,
}

impl Hashes {
    pub(crate) fn decode(body: &[u8], blocks: &[Block]) -> Result<Self, WireError> {
        let odd = || WireError::damaged("a frame of hashes has an invalid length");
        let (head, rest) = body.split_first_chunk::<HEAD>().ok_or_else(odd)?;
        let [b0, b1, b2, b3, f0, f1, f2, f3, f4, f5, f6, f7] = *head;
        let index = u32::from_le_bytes([b0, b1, b2, b3]) as usize;
        let first = u64::from_le_bytes([f0, f1, f2, f3, f4, f5, f6, f7]);
        let (hashes, rest) = rest.as_chunks::<8>();
        if !rest.is_empty() || hashes.len() > HASHES {
            return Err(odd());
        }
        let block = blocks
            .get(index)
            .ok_or_else(|| WireError::damaged(format!("the guest has no memory block {index}")))?;
        let end = usize::try_from(first)
            .ok()
            .and_then(|first| first.checked_add(hashes.len()));
        if end.is_none_or(|end| end > block.ram.len() / PAGE) {
            let (name, count) = (&block.name, hashes.len());
            let why =
                format!("hashes of {count} pages from {first} are not all within block {name}");
            return Err(WireError::Damaged(why));
        }
        Ok(Self {
            block: index,
            // Within the block, whose length is a `usize`.
            first: first as usize,
            hashes: hashes
                .iter()
                .map(|bytes| u64::from_le_bytes(*bytes))
                .collect(),
        })
    }

    pub(crate) fn count(&self) -> u64 {
        self.hashes.len() as u64
    }

    /// Returns the first page that has another hash here than at the source. A page that was never
    /// `touched` is zeros, and is not read: reading would have the host find room for it.
    pub(crate) fn compare(&self, blocks: &[Block], touched: &[DirtyBitmap]) -> Option<Difference> {
        let (block, touched) = (blocks.get(self.block)?, touched.get(self.block)?);
        let differs = |(page, expected): (usize, &u64)| {
            let here = if touched.is_dirty(page * PAGE) {
                hash(&read(block, page)?.0)
            } else {
                ZEROS
            };
            (here != *expected).then_some(Difference {
                block: self.block,
                page,
            })
        };
        (self.first..).zip(&self.hashes).find_map(differs)
    }

    /// Whether a page's content (`None`: zeros) has the hash that was announced for it. Absent if none
    /// was.
    pub(crate) fn admits(
        &self,
        block: usize,
        page: usize,
        content: Option<&[u8; PAGE]>,
    ) -> Option<bool> {
        let index = page
            .checked_sub(self.first)
            .filter(|_| block == self.block)?;
        let expected = self.hashes.get(index)?;
        Some(*expected == content.map_or(ZEROS, hash))
    }
}

/// A page that is not what it is at the source.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Difference {
    pub(crate) block: usize,
    pub(crate) page: usize,
}

/// The first difference over all channels.
#[derive(Default)]
pub(crate) struct Findings(Mutex<Found>);

#[derive(Default)]
struct Found {
    compared: u64,
    first: Option<Difference>,
}

impl Findings {
    pub(crate) fn note(&self, compared: u64, difference: Option<Difference>) {
        let mut found = self.0.lock();
        found.compared += compared;
        // The first in memory, whichever channel finds one first.
        found.first = [found.first, difference].into_iter().flatten().min();
    }

    /// Pages that were compared.
    pub(crate) fn compared(&self) -> u64 {
        self.0.lock().compared
    }

    /// Refuses if a page differs, by its block and number, and forgets it: it may be sent again.
    pub(crate) fn check(&self, blocks: &[Block]) -> Result<(), Refusal> {
        let Some(Difference { block, page }) = self.0.lock().first.take() else {
            return Ok(());
        };
        let name = blocks.get(block).map_or("?", |block| &block.name);
        let address = page.saturating_mul(PAGE);
        let detail = format!(
            "the memory of the destination differs from the source's, first in page {page} of \
             block {name} (offset {address:#x})"
        );
        Err(Refusal::new("memory-differs-at", detail))
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use memory::{RamBlock, RamConfig};
    use proptest::prelude::*;

    use super::*;

    fn block(pages: usize) -> Block {
        let size = (pages * PAGE) as u64;
        Block {
            name: "ram".to_owned(),
            ram: Arc::new(RamBlock::new(&RamConfig::anonymous(size)).unwrap()),
        }
    }

    fn write(block: &Block, page: usize, byte: u8) {
        let slice = block.ram.slice(page * PAGE, PAGE).unwrap();
        slice.copy_from(&[byte; PAGE]);
    }

    fn run(first: u64, pages: u32) -> Run {
        Run {
            block: 0,
            first,
            pages,
        }
    }

    #[test]
    fn hashes_on_the_wire_never_change() {
        let here = block(2);
        write(&here, 1, 7);
        let body = encode(&here, run(0, 2));
        let hex: String = body.iter().map(|byte| format!("{byte:02x}")).collect();
        assert_eq!(
            hex,
            "000000000000000000000000ba89c648e16fd7939d85b67487bfa663"
        );
    }

    #[test]
    fn names_differing_page() {
        let (here, there) = (block(9), [block(9)]);
        let touched = [DirtyBitmap::new(9 * PAGE)];
        touched[0].set_enabled(true);
        for page in [2, 5, 7] {
            write(&here, page, 1);
            write(&there[0], page, 1);
            touched[0].mark(page * PAGE, PAGE);
        }
        let findings = Findings::default();
        let compare = || {
            for first in (0..9).step_by(3) {
                let body = encode(&here, run(first, 3));
                let hashes = Hashes::decode(&body, &there).unwrap();
                findings.note(hashes.count(), hashes.compare(&there, &touched));
            }
            findings.check(&there)
        };
        assert_eq!(compare(), Ok(()));
        assert_eq!(findings.compared(), 9);
        // A bit is turned over, and a page that is zeros at the source is not at the destination.
        there[0]
            .ram
            .slice(7 * PAGE + 99, 1)
            .unwrap()
            .copy_from(&[0_u8]);
        assert!(
            compare()
                .unwrap_err()
                .detail
                .contains("page 7 of block ram")
        );
        write(&there[0], 2, 0);
        let why = compare().unwrap_err();
        assert_eq!(why.code, "memory-differs-at");
        assert!(
            why.detail.contains("page 2 of block ram (offset 0x2000)"),
            "{why}"
        );
        // It was never sent.
        write(&here, 0, 1);
        assert!(
            compare()
                .unwrap_err()
                .detail
                .contains("page 0 of block ram")
        );
    }

    #[test]
    fn announced_hashes_admit_their_pages_only() {
        let here = [block(4)];
        write(&here[0], 1, 3);
        let hashes = Hashes::decode(&encode(&here[0], run(1, 2)), &here).unwrap();
        assert_eq!(hashes.admits(0, 1, Some(&[3; PAGE])), Some(true));
        assert_eq!(hashes.admits(0, 1, Some(&[4; PAGE])), Some(false));
        assert_eq!(hashes.admits(0, 1, None), Some(false));
        assert_eq!(hashes.admits(0, 2, None), Some(true));
        for (block, page) in [(0, 0), (0, 3), (1, 1)] {
            assert_eq!(hashes.admits(block, page, None), None);
        }
    }

    proptest! {
        #[test]
        fn every_page_is_hashed_or_excluded(dirty in prop::collection::vec(any::<bool>(), 200)) {
            let here = [block(200), block(3)];
            let bitmaps = [DirtyBitmap::new(200 * PAGE), DirtyBitmap::new(3 * PAGE)];
            bitmaps[0].set_enabled(true);
            for (page, _) in dirty.iter().enumerate().filter(|(_, dirty)| **dirty) {
                bitmaps[0].mark(page * PAGE, PAGE);
            }
            let except = bitmaps.each_ref().map(DirtyBitmap::snapshot);
            let mut times = [vec![0; 200], vec![0; 3]];
            for run in all_but(&here, &except) {
                prop_assert!(run.pages as usize <= HASHES);
                for page in run.first..run.first + u64::from(run.pages) {
                    times[run.block as usize][page as usize] += 1;
                }
            }
            let wanted: Vec<i32> = dirty.iter().map(|dirty| i32::from(!dirty)).collect();
            prop_assert_eq!(&times[0], &wanted);
            prop_assert_eq!(&times[1], &[1; 3]);
        }

        #[test]
        fn no_body_makes_it_panic(
            first in prop_oneof![0_u64..5, any::<u64>()],
            index in prop_oneof![Just(0_u32), any::<u32>()],
            rest in prop::collection::vec(any::<u8>(), 0..60),
        ) {
            let there = [block(4)];
            let touched = [DirtyBitmap::new(4 * PAGE)];
            let body = [&index.to_le_bytes()[..], &first.to_le_bytes(), &rest].concat();
            if let Ok(hashes) = Hashes::decode(&body, &there) {
                let _ = hashes.compare(&there, &touched);
                let _ = hashes.admits(0, 2, None);
            }
        }
    }
}
