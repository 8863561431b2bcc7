//! Checks of a disk that the guest writes, made by the host.

use crate::pattern::{self, PAGE_SIZE, WORDS};

/// Checks the first `pages` pages of a disk, which the guest writes in turn.
///
/// # Errors
/// A page is torn or misplaced, or older than a round; or the disk has no page.
pub fn check_disk(disk: &[u8], pages: usize) -> Result<(), String> {
    let mut generations = Vec::new();
    for (slot, raw) in (0_u64..).zip(disk.chunks_exact(PAGE_SIZE).take(pages)) {
        let mut page = [0_u64; WORDS];
        for (word, raw) in page.iter_mut().zip(raw.as_chunks().0) {
            *word = u64::from_ne_bytes(*raw);
        }
        if !pattern::matches(&page, slot, page[0]) {
            return Err(format!("page {slot} is torn or misplaced"));
        }
        generations.push(page[0]);
    }
    match (generations.iter().min(), generations.iter().max()) {
        (Some(least), Some(most)) if most - least <= 1 => Ok(()),
        ends => Err(format!("generations, least and most: {ends:?}")),
    }
}
