//! Files in which pages of zeros are holes.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt as _;

use crate::pages::{PAGE, is_zero};
use crate::progress::Progress;

/// Reports that `total` bytes are going to be written.
pub(super) fn begin(total: u64, progress: &Progress) {
    progress.update(|report| {
        report.memory_bytes = total;
        report.remaining_pages = total / PAGE as u64;
    });
}

/// Writes whole pages to an empty part of a file, and reports them.
pub(super) fn put(
    file: &File,
    content: &[u8],
    position: u64,
    progress: &Progress,
) -> io::Result<()> {
    let zeros = write_full(file, content, position)?;
    let pages = (content.len() / PAGE) as u64;
    progress.update(|report| {
        report.pages += pages - zeros;
        report.zero_pages += zeros;
        report.remaining_pages = report.remaining_pages.saturating_sub(pages);
    });
    Ok(())
}

/// Writes the pages that are not zeros, neighbours at once, and what is behind the last whole page. Returns
/// the number of pages of zeros.
pub(super) fn write_full(file: &File, content: &[u8], position: u64) -> io::Result<u64> {
    let pages: Vec<bool> = content.chunks_exact(PAGE).map(is_zero).collect();
    let mut page = 0;
    for run in pages.chunk_by(|a, b| a == b) {
        let range = page * PAGE..(page + run.len()) * PAGE;
        if run.first() == Some(&false) {
            let at = position + range.start as u64;
            file.write_all_at(content.get(range).unwrap_or_default(), at)?;
        }
        page += run.len();
    }
    let rest = content.get(page * PAGE..).unwrap_or_default();
    file.write_all_at(rest, position + (page * PAGE) as u64)?;
    Ok(pages.iter().filter(|zero| **zero).count() as u64)
}
