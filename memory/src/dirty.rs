//! Which pages of a RAM block were written.
//!
//! Bits belong to the *block*, by offset into it, and not to the memslot or range through which
//! the block is seen: splitting, merging or moving those moves no bit and can lose none.
//!
//! A block of hotplugged memory also has a bit for each page that says whether the page is plugged.
//! Writes to unplugged pages are not tracked: the guest must not make any, and a migration does not
//! copy such pages.

use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

/// The unit of dirty tracking, in bytes: the x86 base page, whatever backs the block.
pub const PAGE_SIZE: u64 = 4096;

const BITS: usize = u64::BITS as usize;

/// One bit for each 4 KiB page of a RAM block.
///
/// Writers to the block set bits: devices through [`vm_memory::Bytes`], and the hypervisor when it
/// harvests the log of a memslot. The sender of pages takes them out. Setting is ignored while tracking
/// is [off](Self::set_enabled).
pub struct DirtyBitmap {
    words: Box<[AtomicU64]>,
    pages: usize,
    enabled: AtomicBool,
    /// Pages that are plugged, of a block of hotplugged memory; absent where all pages always are.
    plugged: Option<Box<[AtomicU64]>>,
}

/// Returns a bit for each of `pages` pages, all clear.
fn clear(pages: usize) -> Box<[AtomicU64]> {
    let words = (0..pages.div_ceil(BITS)).map(|_| AtomicU64::new(0));
    words.collect()
}

/// The words that hold the bits of pages `first` to `last`, and the mask of these bits in each.
fn masks(first: usize, last: usize) -> impl Iterator<Item = (usize, u64)> {
    (first / BITS..=last / BITS).map(move |index| {
        let from = first.saturating_sub(index * BITS).min(BITS - 1);
        let to = (last - index * BITS).min(BITS - 1);
        (index, u64::MAX << from & u64::MAX >> (BITS - 1 - to))
    })
}

impl DirtyBitmap {
    /// All clean and switched off, for a block of `len` bytes.
    #[must_use]
    pub fn new(len: usize) -> Self {
        let pages = len.div_ceil(PAGE_SIZE as usize);
        Self {
            words: clear(pages),
            pages,
            enabled: AtomicBool::new(false),
            plugged: None,
        }
    }

    /// The same as [`DirtyBitmap::new`], for a block of which nothing is plugged.
    pub(crate) fn unplugged(len: usize) -> Self {
        let bitmap = Self::new(len);
        Self {
            plugged: Some(clear(bitmap.pages)),
            ..bitmap
        }
    }

    /// How many pages it covers.
    #[must_use]
    pub fn pages(&self) -> usize {
        self.pages
    }

    /// Switches tracking on or off. What is marked already stays.
    pub fn set_enabled(&self, on: bool) {
        self.enabled.store(on, Ordering::SeqCst);
    }

    /// Whether writes are tracked.
    #[must_use]
    pub fn is_enabled(&self) -> bool {
        self.enabled.load(Ordering::Relaxed)
    }

    /// Marks the pages that hold `len` bytes from byte `offset` of the block on, if tracking is
    /// on; what is past the block's end is ignored.
    pub fn mark(&self, offset: usize, len: usize) {
        if len == 0 || !self.is_enabled() {
            return;
        }
        let first = offset / PAGE_SIZE as usize;
        let last = offset.saturating_add(len - 1) / PAGE_SIZE as usize;
        let last = last.min(self.pages.saturating_sub(1));
        if first > last {
            return;
        }
        // Word by word: a device's write is one page or two, and a migration's news many.
        for (index, bits) in masks(first, last) {
            if let Some(word) = self.words.get(index) {
                // Release pairs with the Acquire in `take`: the sender that takes the bit also sees
                // the bytes. Writers mark after they write. Marked earlier, a page could be taken
                // and sent with its old bytes, and the new ones would never follow.
                word.fetch_or(bits & self.plugged_word(index), Ordering::Release);
            }
        }
    }

    /// The bits of plugged pages in a word.
    fn plugged_word(&self, index: usize) -> u64 {
        let Some(plugged) = &self.plugged else {
            return u64::MAX;
        };
        let word = plugged.get(index);
        word.map_or(0, |word| word.load(Ordering::Acquire))
    }

    /// Notes that the pages of `len` bytes from byte `offset` on are plugged, or are not. Marks that
    /// these pages have stay, so that a sender takes notice of memory that has just gone.
    pub(crate) fn set_plugged(&self, offset: usize, len: usize, is: bool) {
        let (Some(plugged), Some(last)) = (&self.plugged, len.checked_sub(1)) else {
            return;
        };
        let page = PAGE_SIZE as usize;
        for (index, bits) in masks(offset / page, offset.saturating_add(last) / page) {
            match plugged.get(index) {
                Some(word) if is => drop(word.fetch_or(bits, Ordering::AcqRel)),
                Some(word) => drop(word.fetch_and(!bits, Ordering::AcqRel)),
                None => {}
            }
        }
    }

    /// How many of the pages of `len` bytes from byte `offset` on are plugged.
    pub(crate) fn plugged(&self, offset: usize, len: usize) -> usize {
        let page = PAGE_SIZE as usize;
        let end = offset.saturating_add(len).div_ceil(page).min(self.pages);
        let (first, Some(last)) = (offset / page, end.checked_sub(1)) else {
            return 0;
        };
        if first > last {
            return 0;
        }
        let there =
            |(index, bits): (usize, u64)| (self.plugged_word(index) & bits).count_ones() as usize;
        masks(first, last).map(there).sum()
    }

    /// Whether some pages may be unplugged.
    pub(crate) fn has_unplugged(&self) -> bool {
        self.plugged.is_some()
    }

    /// Adds `bits` (bit 0 of word 0 is the page `first_page`), tracking on or off: the log of a
    /// memslot that shows the block from that page on. Bits past the block's end are ignored.
    pub fn merge(&self, first_page: usize, bits: &[u64]) {
        let (word, shift) = (first_page / BITS, first_page % BITS);
        for (i, &bits) in bits.iter().enumerate().filter(|(_, bits)| **bits != 0) {
            self.set_word(word + i, bits << shift);
            // The log of a memslot need not start at a multiple of 64 pages of the block. A shift
            // by 64 overflows, so the aligned case must skip the second word.
            if shift != 0 {
                self.set_word(word + i + 1, bits >> (BITS - shift));
            }
        }
    }

    fn set_word(&self, index: usize, bits: u64) {
        // A log has whole words, a block need not. A bit past the block's end would make `count`
        // too high, and the sender would look for a page that does not exist.
        let bits = bits & self.valid(index);
        if bits != 0
            && let Some(word) = self.words.get(index)
        {
            word.fetch_or(bits, Ordering::Release);
        }
    }

    /// The bits of the word that stand for pages of the block that are plugged.
    fn valid(&self, index: usize) -> u64 {
        let there = match self.pages.saturating_sub(index.saturating_mul(BITS)) {
            0 => 0,
            left if left >= BITS => u64::MAX,
            left => (1 << left) - 1,
        };
        there & self.plugged_word(index)
    }

    /// Marks every page that is plugged, tracking on or off.
    pub fn mark_all(&self) {
        for (index, word) in self.words.iter().enumerate() {
            // Add and do not store: a page that was marked as it went must stay marked.
            word.fetch_or(self.valid(index), Ordering::Release);
        }
    }

    /// Whether the page that holds byte `offset` is marked.
    #[must_use]
    pub fn is_dirty(&self, offset: usize) -> bool {
        let page = offset / PAGE_SIZE as usize;
        self.words
            .get(page / BITS)
            .is_some_and(|word| word.load(Ordering::Acquire) & (1 << (page % BITS)) != 0)
    }

    /// How many pages are marked.
    #[must_use]
    pub fn count(&self) -> usize {
        self.words
            .iter()
            .map(|word| word.load(Ordering::Relaxed).count_ones() as usize)
            .sum()
    }

    /// Takes all marks out and returns them; a mark made meanwhile is either in what is returned
    /// or still there.
    #[must_use]
    pub fn take(&self) -> DirtyPages {
        let words = self
            .words
            .iter()
            // Load first: most words are 0 in a late round. A swap would take each cache line away
            // from the writers. A bit that appears after the load stays for the next harvest.
            .map(|word| match word.load(Ordering::Relaxed) {
                0 => 0,
                _ => word.swap(0, Ordering::AcqRel),
            });
        DirtyPages {
            words: words.collect(),
        }
    }

    /// Takes the mark of one page out; false when it has none.
    #[must_use]
    pub fn take_page(&self, page: usize) -> bool {
        let bit = 1 << (page % BITS);
        let word = self.words.get(page / BITS);
        // Two threads may want the same page. The old value of the bit gives it to exactly one of
        // them.
        word.is_some_and(|word| word.fetch_and(!bit, Ordering::AcqRel) & bit != 0)
    }

    /// All marks, which stay.
    #[must_use]
    pub fn snapshot(&self) -> DirtyPages {
        let words = self.words.iter().map(|word| word.load(Ordering::Acquire));
        DirtyPages {
            words: words.collect(),
        }
    }

    /// Puts back marks that were [taken](Self::take), because the pages could not be sent.
    pub fn put_back(&self, pages: &DirtyPages) {
        // Set and do not store: writers may have marked other pages since the take. Not by `merge`:
        // a page that was marked as it went must stay marked.
        for (word, bits) in self.words.iter().zip(&pages.words) {
            word.fetch_or(*bits, Ordering::Release);
        }
    }

    /// Puts back the marks of `pages` neighbours from `first` on, as [`DirtyBitmap::put_back`] does. What
    /// is past the end is ignored.
    pub fn put_back_run(&self, first: usize, pages: usize) {
        let Some(last) = pages.checked_sub(1) else {
            return;
        };
        let last = first.saturating_add(last).min(self.pages.saturating_sub(1));
        if first > last {
            return;
        }
        // Not by `mark`, which leaves out pages that are not plugged: the destination must get zeros
        // for those that were unplugged before they were taken.
        for (index, bits) in masks(first, last) {
            if let Some(word) = self.words.get(index) {
                word.fetch_or(bits, Ordering::Release);
            }
        }
    }
}

impl fmt::Debug for DirtyBitmap {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DirtyBitmap")
            .field("pages", &self.pages)
            .field("enabled", &self.is_enabled())
            .finish_non_exhaustive()
    }
}

/// Marks that were taken out of a [`DirtyBitmap`]; by default none.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct DirtyPages {
    words: Vec<u64>,
}

impl DirtyPages {
    /// Returns an empty set for a block of `pages` pages.
    pub(crate) fn none(pages: usize) -> Self {
        Self {
            words: vec![0; pages.div_ceil(BITS)],
        }
    }

    /// Marks `pages` neighbours from `first` on; what is past the end is ignored.
    pub(crate) fn set(&mut self, first: usize, pages: usize) {
        let Some(last) = pages.checked_sub(1) else {
            return;
        };
        let end = self.words.len() * BITS;
        let last = first.saturating_add(last).min(end.saturating_sub(1));
        if first > last {
            return;
        }
        for (index, bits) in masks(first, last) {
            if let Some(word) = self.words.get_mut(index) {
                *word |= bits;
            }
        }
    }

    /// Removes the marks that `others` does not have.
    pub(crate) fn retain(&mut self, others: &Self) {
        for (index, word) in self.words.iter_mut().enumerate() {
            *word &= others.words.get(index).copied().unwrap_or(0);
        }
    }

    /// How many pages are marked.
    #[must_use]
    pub fn count(&self) -> usize {
        self.words
            .iter()
            .map(|word| word.count_ones() as usize)
            .sum()
    }

    /// The marks: bit 0 of the first word is page 0.
    #[must_use]
    pub fn words(&self) -> &[u64] {
        &self.words
    }

    /// The marked pages as runs of neighbours: `(first page, pages)`, ascending.
    pub fn runs(&self) -> impl Iterator<Item = (usize, usize)> + '_ {
        Runs {
            words: &self.words,
            at: 0,
        }
    }
}

impl fmt::Debug for DirtyPages {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.runs()).finish()
    }
}

/// Walks a bitmap word by word: the cost is that of the runs, not of the bits.
struct Runs<'a> {
    words: &'a [u64],
    at: usize,
}

impl Runs<'_> {
    /// The first page from `from` on whose bit is `set`; the end of the bitmap if there is none.
    fn seek(&self, from: usize, set: bool) -> usize {
        let mut index = from / BITS;
        let mut keep = u64::MAX << (from % BITS);
        while let Some(&word) = self.words.get(index) {
            // In a `let` the whole `if` is the left operand, so `keep` masks both cases. It hides
            // the pages before `from`, and only in the first word.
            let word = if set { word } else { !word } & keep;
            if word != 0 {
                return index * BITS + word.trailing_zeros() as usize;
            }
            keep = u64::MAX;
            index += 1;
        }
        self.words.len() * BITS
    }
}

impl Iterator for Runs<'_> {
    type Item = (usize, usize);

    fn next(&mut self) -> Option<Self::Item> {
        let first = self.seek(self.at, true);
        if first == self.words.len() * BITS {
            return None;
        }
        // Bits past the block's end are never set, so a run ends with the block at the latest.
        self.at = self.seek(first, false);
        Some((first, self.at - first))
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    const PAGES: usize = 300;

    fn pages_of(taken: &DirtyPages) -> BTreeSet<usize> {
        taken
            .runs()
            .flat_map(|(first, n)| first..first + n)
            .collect()
    }

    #[derive(Clone, Debug)]
    enum Step {
        Mark(usize, usize),
        Merge(usize, Vec<u64>),
        Take,
        TakeAndPutBack,
        Enable(bool),
    }

    fn step() -> impl Strategy<Value = Step> {
        let bytes = PAGES * PAGE_SIZE as usize;
        prop_oneof![
            (0..bytes * 2, 0..bytes).prop_map(|(at, len)| Step::Mark(at, len)),
            (0..PAGES + 100, prop::collection::vec(any::<u64>(), 0..6))
                .prop_map(|(at, bits)| Step::Merge(at, bits)),
            Just(Step::Take),
            Just(Step::TakeAndPutBack),
            any::<bool>().prop_map(Step::Enable),
        ]
    }

    proptest! {
        #[test]
        fn behaves_like_a_set_of_pages(steps in prop::collection::vec(step(), 0..40)) {
            let bitmap = DirtyBitmap::new(PAGES * PAGE_SIZE as usize);
            let (mut model, mut on) = (BTreeSet::new(), false);
            for step in steps {
                match step {
                    Step::Mark(at, len) => {
                        bitmap.mark(at, len);
                        if on && len > 0 {
                            let page = PAGE_SIZE as usize;
                            model.extend((at / page..=(at + len - 1) / page).filter(|p| *p < PAGES));
                        }
                    }
                    Step::Merge(at, bits) => {
                        bitmap.merge(at, &bits);
                        model.extend((0..bits.len() * BITS)
                            .filter(|i| bits[i / BITS] >> (i % BITS) & 1 == 1)
                            .map(|i| at + i)
                            .filter(|p| *p < PAGES));
                    }
                    Step::Take => {
                        prop_assert_eq!(pages_of(&bitmap.take()), std::mem::take(&mut model));
                    }
                    Step::TakeAndPutBack => bitmap.put_back(&bitmap.take()),
                    Step::Enable(is) => { bitmap.set_enabled(is); on = is; }
                }
                prop_assert_eq!(bitmap.count(), model.len());
                for page in 0..PAGES {
                    prop_assert_eq!(bitmap.is_dirty(page * PAGE_SIZE as usize), model.contains(&page));
                }
            }
        }
    }

    #[test]
    fn whole_block_is_marked_exactly() {
        let bitmap = DirtyBitmap::new(65 * PAGE_SIZE as usize);
        bitmap.mark_all();
        assert_eq!(bitmap.take().runs().collect::<Vec<_>>(), [(0, 65)]);
        assert_eq!(bitmap.count(), 0);
    }
}
