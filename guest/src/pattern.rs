//! The content that the guest writes to a page: words that depend on the page's address and on the
//! number of times that it was written. A page that is stale, lost, torn or misplaced does not match.
//!
//! The guest keeps no table of what it wrote. Each vCPU visits its pages in a fixed order, so
//! *one* counter tells the generation of each page; see [`generation`].

/// Bytes of a page.
pub const PAGE_SIZE: usize = 4096;
/// Words of a page.
pub const WORDS: usize = PAGE_SIZE / 8;

/// Pages of a disk that the guest uses, in turn, if the disk has so many. A test waits for rounds of them, and of
/// each page the guest takes three exits at least, which take longest where KVM emulates its kernel.
pub const DISK_PAGES: usize = 64;

/// A page, as words.
pub type Page = [u64; WORDS];

/// Writes the page at guest physical address `addr` for the `generation`th time.
pub fn fill(page: &mut Page, addr: u64, generation: u64) {
    let seed = seed(addr, generation);
    for (index, word) in (0_u64..).zip(page.iter_mut()) {
        *word = seed.wrapping_add(index.wrapping_mul(STEP));
    }
    page[0] = generation;
    page[1] = addr;
}

/// Returns whether the page at `addr` has the content of its `generation`th write.
#[must_use]
pub fn matches(page: &Page, addr: u64, generation: u64) -> bool {
    let seed = seed(addr, generation);
    let head = page[0] == generation && page[1] == addr;
    let body = (0_u64..)
        .zip(page)
        .skip(2)
        // Folded, not short-circuited: the loop over a good page is the one that must be fast.
        .fold(0, |wrong, (index, word)| {
            wrong | (word ^ seed.wrapping_add(index.wrapping_mul(STEP)))
        });
    head && body == 0
}

/// Returns how many times the page in `slot` of `slots` was written after `writes` writes that visit
/// the slots in turn.
#[must_use]
pub fn generation(writes: u64, slot: u64, slots: u64) -> u64 {
    if slots == 0 {
        return 0;
    }
    writes / slots + u64::from(slot < writes % slots)
}

const STEP: u64 = 0x9e37_79b9_7f4a_7c15;

/// The finaliser of SplitMix64 over both.
fn seed(addr: u64, generation: u64) -> u64 {
    let mut z = addr ^ generation.wrapping_mul(STEP);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}
