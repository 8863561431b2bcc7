//! The content of RAM channels: batches of pages.
//!
//! ```text
//!   block u32 | runs u32 | each run: first page u64, pages u32 | for `Pages`: the pages' bytes
//! ```

use std::sync::Arc;

use memory::{PAGE_SIZE, PageBuffer, RamBlock};
use vm_memory::Bytes as _;

use crate::wire::WireError;

/// Bytes of a page.
pub(crate) const PAGE: usize = PAGE_SIZE as usize;
/// Maximum number of pages in a batch.
pub(crate) const BATCH: usize = 64;
const HEAD: usize = 8;
const RUN: usize = 12;
/// Maximum length of a batch in bytes.
pub(crate) const MOST: usize = HEAD + BATCH * (RUN + PAGE);

/// Memory of the guest, which has a name of its own in its machine.
#[derive(Clone, Debug)]
pub struct Block {
    /// Its name.
    pub name: String,
    /// The memory.
    pub ram: Arc<RamBlock>,
}

/// Neighbouring pages of a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Run {
    pub(crate) block: u32,
    pub(crate) first: u64,
    pub(crate) pages: u32,
}

/// A batch that is being put together: pages with something in them, and pages of zeros.
#[derive(Default)]
pub(crate) struct Batch {
    full: Vec<Run>,
    data: PageBuffer,
    zeros: Vec<Run>,
}

/// A batch in two parts: pages with something in them, with their content, and pages of zeros.
#[derive(Clone, Copy)]
pub(crate) struct Sorted<'a> {
    pub(crate) full: &'a [Run],
    pub(crate) data: &'a [u8],
    pub(crate) zeros: &'a [Run],
}

/// Frames' bodies of a batch.
pub(crate) struct Encoded<'a> {
    pub(crate) pages: Option<(Vec<u8>, &'a [u8])>,
    pub(crate) zeros: Option<Vec<u8>>,
    pub(crate) full_pages: u64,
    pub(crate) zero_pages: u64,
}

impl Batch {
    /// Reads runs of one block, at most [`BATCH`] pages, by `read`, and encodes them.
    ///
    /// # Errors
    /// Those of `read`.
    pub(crate) fn fill<E>(
        &mut self,
        runs: &[Run],
        read: impl FnMut(Run, &mut [u8]) -> Result<(), E>,
    ) -> Result<Encoded<'_>, E> {
        let block = runs.first().map_or(0, |first| first.block);
        let Sorted { full, data, zeros } = self.sort(runs, read)?;
        let count = |runs: &[Run]| runs.iter().map(|run| u64::from(run.pages)).sum();
        Ok(Encoded {
            full_pages: count(full),
            zero_pages: count(zeros),
            pages: (!full.is_empty()).then(|| (head(block, full), data)),
            zeros: (!zeros.is_empty()).then(|| head(block, zeros)),
        })
    }

    /// Reads runs of one block, at most [`BATCH`] pages, by `read`, and sorts out pages of zeros.
    ///
    /// # Errors
    /// Those of `read`.
    pub(crate) fn sort<E>(
        &mut self,
        runs: &[Run],
        mut read: impl FnMut(Run, &mut [u8]) -> Result<(), E>,
    ) -> Result<Sorted<'_>, E> {
        self.full.clear();
        self.zeros.clear();
        let len = |run: &Run| run.pages as usize * PAGE;
        let all = runs.iter().map(len).sum();
        // Grown and not cleared for each batch: clearing costs half as much as the copy itself.
        if self.data.len() < all {
            self.data = PageBuffer::new(all);
        }
        let data = self.data.get_mut(..all).unwrap_or_default();
        // All that follows uses the copy, since a page that is zero now may have content a moment
        // later.
        let mut rest = &mut *data;
        for run in runs {
            let Some((here, behind)) = rest.split_at_mut_checked(len(run)) else {
                break;
            };
            // The last page of a disk may end behind the disk, and its rest has to be zeros.
            if let Some(last) = here.last_chunk_mut::<PAGE>() {
                last.fill(0);
            }
            read(*run, here)?;
            rest = behind;
        }
        let pages = runs.iter().flat_map(|run| {
            (run.first..run.first + u64::from(run.pages)).map(|page| (run.block, page))
        });
        let mut kept = 0;
        for (index, (block, page)) in pages.enumerate() {
            let from = index * PAGE;
            let is_zero = data.get(from..from + PAGE).is_some_and(is_zero);
            let runs = if is_zero {
                &mut self.zeros
            } else {
                &mut self.full
            };
            push(runs, block, page);
            if !is_zero {
                if kept != from {
                    data.copy_within(from..from + PAGE, kept);
                }
                kept += PAGE;
            }
        }
        Ok(Sorted {
            full: &self.full,
            data: self.data.get(..kept).unwrap_or_default(),
            zeros: &self.zeros,
        })
    }
}

pub(crate) fn push(runs: &mut Vec<Run>, block: u32, page: u64) {
    match runs.last_mut() {
        Some(last) if last.first + u64::from(last.pages) == page => last.pages += 1,
        _ => runs.push(Run {
            block,
            first: page,
            pages: 1,
        }),
    }
}

/// Whether a page, or part of one, is zeros.
pub(crate) fn is_zero(page: &[u8]) -> bool {
    static ZEROS: [u8; PAGE] = [0; PAGE];
    // One comparison by the C library: its vector instructions are there in builds without optimisation,
    // too, and it ends where a page has content.
    page.chunks(PAGE).all(|piece| ZEROS.starts_with(piece))
}

fn head(block: u32, runs: &[Run]) -> Vec<u8> {
    let mut head = Vec::with_capacity(HEAD + runs.len() * RUN);
    head.extend(block.to_le_bytes());
    // At most `BATCH`.
    head.extend((runs.len() as u32).to_le_bytes());
    for run in runs {
        head.extend(run.first.to_le_bytes());
        head.extend(run.pages.to_le_bytes());
    }
    head
}

/// The body of a frame, checked against the memory that there is.
pub(crate) struct Decoded<'a> {
    pub(crate) block: usize,
    pub(crate) runs: Vec<(usize, usize)>,
    pub(crate) data: &'a [u8],
}

/// Returns the body of a frame that announces pages which come after the guest.
pub(crate) fn encode_missing(block: u32, runs: &[Run]) -> Vec<u8> {
    head(block, runs)
}

/// Returns the body of a frame that asks for a page: block u32, page u64.
pub(crate) fn encode_fault(block: u32, page: u64) -> [u8; 12] {
    let mut body = [0; 12];
    body[..4].copy_from_slice(&block.to_le_bytes());
    body[4..].copy_from_slice(&page.to_le_bytes());
    body
}

/// Returns the block and the page that are asked for. Neither is checked.
pub(crate) fn decode_fault(body: &[u8]) -> Result<(u32, u64), WireError> {
    match *body {
        [b0, b1, b2, b3, p0, p1, p2, p3, p4, p5, p6, p7] => Ok((
            u32::from_le_bytes([b0, b1, b2, b3]),
            u64::from_le_bytes([p0, p1, p2, p3, p4, p5, p6, p7]),
        )),
        _ => Err(WireError::damaged(
            "a request for a page has an invalid length",
        )),
    }
}

/// The kind of a frame about pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Content {
    /// The pages' content follows.
    Data,
    /// The pages are zeros.
    Zeros,
    /// They come later: runs of any length.
    Later,
}

/// The content with which neighbouring pages are filled.
#[derive(Clone, Copy)]
pub(crate) enum Filling<'a> {
    /// The content of each.
    Data(&'a [[u8; PAGE]]),
    /// This many pages of zeros.
    Zeros(usize),
}

impl<'a> Filling<'a> {
    /// The number of pages.
    pub(crate) fn len(self) -> usize {
        match self {
            Self::Data(pages) => pages.len(),
            Self::Zeros(pages) => pages,
        }
    }

    pub(crate) fn is_empty(self) -> bool {
        self.len() == 0
    }

    /// The content of a page; absent: zeros.
    pub(crate) fn get(self, index: usize) -> Option<&'a [u8; PAGE]> {
        match self {
            Self::Data(pages) => pages.get(index),
            Self::Zeros(_) => None,
        }
    }

    /// The first pages, at most so many, and those behind them.
    pub(crate) fn split(self, pages: usize) -> (Self, Self) {
        let at = pages.min(self.len());
        match self {
            Self::Data(pages) => {
                let (first, behind) = pages.split_at_checked(at).unwrap_or((pages, &[]));
                (Self::Data(first), Self::Data(behind))
            }
            Self::Zeros(pages) => (Self::Zeros(at), Self::Zeros(pages - at)),
        }
    }
}

/// Reads the body of a frame of pages of memory.
#[cfg(test)]
pub(crate) fn decode_memory<'a>(
    body: &'a [u8],
    blocks: &[Block],
    content: Content,
) -> Result<Decoded<'a>, WireError> {
    decode(body, content, |index| {
        let block = blocks.get(index)?;
        Some((block.ram.len() / PAGE, block.name.as_str()))
    })
}

/// Reads the body of a frame of pages; `find` returns the pages and the name of a block by its number.
pub(crate) fn decode<'a, 'b>(
    body: &'a [u8],
    content: Content,
    find: impl FnOnce(usize) -> Option<(usize, &'b str)>,
) -> Result<Decoded<'a>, WireError> {
    let short = || WireError::damaged("a batch of pages is truncated");
    let (head, mut rest) = body.split_first_chunk::<HEAD>().ok_or_else(short)?;
    let [b0, b1, b2, b3, r0, r1, r2, r3] = *head;
    let index = u32::from_le_bytes([b0, b1, b2, b3]) as usize;
    let (there, name) =
        find(index).ok_or_else(|| WireError::damaged(format!("the guest has no block {index}")))?;
    let count = u32::from_le_bytes([r0, r1, r2, r3]) as usize;
    // The peer sends this number: limit it before it sizes an allocation.
    if count > BATCH {
        return Err(WireError::damaged("a batch has too many runs of pages"));
    }
    let (mut runs, mut total) = (Vec::with_capacity(count), 0_usize);
    for _ in 0..count {
        let (run, more) = rest.split_first_chunk::<RUN>().ok_or_else(short)?;
        rest = more;
        let [f0, f1, f2, f3, f4, f5, f6, f7, n0, n1, n2, n3] = *run;
        let first = u64::from_le_bytes([f0, f1, f2, f3, f4, f5, f6, f7]);
        let pages = u32::from_le_bytes([n0, n1, n2, n3]) as usize;
        let end = usize::try_from(first)
            .ok()
            .and_then(|first| first.checked_add(pages));
        if end.is_none_or(|end| end > there) {
            return Err(WireError::damaged(format!(
                "a run of pages from {first} is not within block {name}"
            )));
        }
        total = total.saturating_add(pages);
        // Within the block, whose length is a `usize`.
        runs.push((first as usize, pages));
    }
    let wanted = if content == Content::Data {
        total.saturating_mul(PAGE)
    } else {
        0
    };
    // Pages that come later carry no content here, so only the block limits the length of a run.
    if content != Content::Later && total > BATCH || rest.len() != wanted {
        return Err(WireError::damaged(
            "the length of a batch of pages does not match its header",
        ));
    }
    Ok(Decoded {
        block: index,
        runs,
        data: rest,
    })
}

impl Decoded<'_> {
    /// How many pages they are.
    pub(crate) fn count(&self) -> u64 {
        self.runs.iter().map(|(_, pages)| *pages as u64).sum()
    }

    /// The first page of each run, and what its pages are filled with.
    pub(crate) fn fillings(&self) -> impl Iterator<Item = (usize, Filling<'_>)> {
        let (pages, _) = self.data.as_chunks::<PAGE>();
        let mut rest = match pages {
            [] => None,
            pages => Some(Filling::Data(pages)),
        };
        self.runs.iter().map(move |&(first, pages)| {
            let all = rest.unwrap_or(Filling::Zeros(pages));
            let (run, behind) = all.split(pages);
            rest = rest.map(|_| behind);
            (first, run)
        })
    }

    /// Marks the pages.
    pub(crate) fn mark(&self, bitmaps: &[memory::DirtyBitmap]) {
        if let Some(bitmap) = bitmaps.get(self.block) {
            for &(first, pages) in &self.runs {
                bitmap.mark(first * PAGE, pages * PAGE);
            }
        }
    }

    /// Writes the pages to their places. `touched` marks each page to which anything was written
    /// before: all others are zeros already.
    pub(crate) fn apply(&self, blocks: &[Block], touched: &[memory::DirtyBitmap]) {
        let (Some(block), Some(touched)) = (blocks.get(self.block), touched.get(self.block)) else {
            return;
        };
        let mut data = self.data;
        for &(first, pages) in &self.runs {
            let len = pages * PAGE;
            let Some(slice) = block.ram.slice(first * PAGE, len) else {
                continue;
            };
            match data.split_at_checked(len) {
                Some((here, rest)) if !self.data.is_empty() => {
                    slice.copy_from(here);
                    touched.mark(first * PAGE, len);
                    data = rest;
                }
                _ => {
                    for page in 0..pages {
                        // A write to an untouched page would have the host allocate memory for
                        // zeros.
                        if touched.is_dirty((first + page) * PAGE) {
                            let _ = slice.write_slice(&[0; PAGE], page * PAGE);
                        }
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use memory::{DirtyBitmap, RamConfig};
    use proptest::prelude::*;

    use super::*;
    use crate::disks::Contents;

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

    fn read(block: &Block) -> Vec<u8> {
        let mut all = vec![0; block.ram.len()];
        block.ram.slice(0, all.len()).unwrap().copy_to(&mut all[..]);
        all
    }

    /// 40 pages in runs that end at each cut, those with an odd number first.
    fn pieces(cuts: &BTreeSet<u64>) -> Vec<Run> {
        let ends = cuts.iter().copied().chain([40]);
        let starts = [0].into_iter().chain(cuts.iter().copied());
        let runs = starts.zip(ends).map(|(first, end)| Run {
            block: 0,
            first,
            pages: (end - first) as u32,
        });
        let (odd, even): (Vec<_>, Vec<_>) = runs.partition(|run| run.first % 2 == 1);
        [odd, even].concat()
    }

    proptest! {
        #[test]
        fn sent_pages_arrive(
            before in prop::collection::vec(0_u8..3, 40),
            after in prop::collection::vec(0_u8..3, 40),
            cuts in prop::collection::btree_set(1_u64..40, 0..10),
        ) {
            let (here, there) = (block(40), [block(40)]);
            let touched = [DirtyBitmap::new(40 * PAGE)];
            touched[0].set_enabled(true);
            let mut batch = Batch::default();
            for round in [before, after] {
                for (page, byte) in round.iter().enumerate() {
                    write(&here, page, *byte);
                }
                let runs = pieces(&cuts);
                let blocks = std::slice::from_ref(&here);
                let contents = Contents { blocks, disks: &[] };
                let encoded = batch.fill(&runs, |run, data| contents.read(run, data)).unwrap();
                prop_assert_eq!(encoded.full_pages + encoded.zero_pages, 40);
                if let Some((head, data)) = encoded.pages {
                    let body = [&head, data].concat();
                    decode_memory(&body, &there, Content::Data).unwrap().apply(&there, &touched);
                }
                if let Some(body) = encoded.zeros {
                    decode_memory(&body, &there, Content::Zeros).unwrap().apply(&there, &touched);
                }
                prop_assert!(read(&there[0]) == read(&here));
            }
        }

        #[test]
        fn invalid_pages_write_nothing(
            block_index in prop_oneof![Just(0_u32), any::<u32>()],
            count in prop_oneof![0_u32..3, any::<u32>()],
            body in prop::collection::vec(prop_oneof![Just(0_u8), any::<u8>()], 0..60),
            content in prop::sample::select(vec![Content::Data, Content::Zeros, Content::Later]),
        ) {
            let there = [block(4)];
            let touched = [DirtyBitmap::new(4 * PAGE)];
            let raw = [&block_index.to_le_bytes()[..], &count.to_le_bytes(), &body].concat();
            if let Ok(decoded) = decode_memory(&raw, &there, content) {
                decoded.apply(&there, &touched);
                decoded.mark(&touched);
            }
            let _ = decode_fault(&raw);
        }
    }

    #[test]
    fn rejects_pages_outside_block() {
        let there = [block(4)];
        let run = |block, first, pages| {
            head(
                block,
                &[Run {
                    block,
                    first,
                    pages,
                }],
            )
        };
        for body in [
            run(1, 0, 1),
            run(0, 4, 1),
            run(0, 3, 2),
            run(0, u64::MAX, 2),
            run(0, 0, u32::MAX),
        ] {
            assert!(decode_memory(&body, &there, Content::Zeros).is_err());
        }
        assert!(decode_memory(&run(0, 0, 4), &there, Content::Zeros).is_ok());
        assert!(decode_memory(&run(0, 0, 4), &there, Content::Data).is_err());
    }
}
