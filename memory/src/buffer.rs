//! Bytes that begin at a page.

use std::ops::{Deref, DerefMut};

use crate::dirty::PAGE_SIZE;

const ALIGN: usize = PAGE_SIZE as usize;

/// Bytes on the heap that begin at a page of the host. Guest memory and files are copied into such a
/// buffer, and not into a plain `Vec`:
///
/// - Direct I/O (`O_DIRECT`) wants it.
/// - The C library and Linux copy by `rep movsb`, which on AMD's Zen 3 takes five to ten times as long where
///   the target begins 1 to 31 bytes behind its source, both counted within their pages. The C library's
///   large allocations begin 16 bytes behind a page, and guest memory begins at one.
#[derive(Debug, Default)]
pub struct PageBuffer {
    memory: Vec<u8>,
    start: usize,
    len: usize,
}

impl PageBuffer {
    /// Allocates so many bytes of zeros. The host finds their pages when they are first used.
    #[must_use]
    pub fn new(len: usize) -> Self {
        let memory = vec![0; len + ALIGN];
        // The start of a `Vec` that never grows stays where it is.
        let start = memory.as_ptr().align_offset(ALIGN).min(ALIGN);
        Self { memory, start, len }
    }
}

impl Deref for PageBuffer {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        let bytes = self.memory.get(self.start..self.start + self.len);
        bytes.unwrap_or_default()
    }
}

impl DerefMut for PageBuffer {
    fn deref_mut(&mut self) -> &mut [u8] {
        let bytes = self.memory.get_mut(self.start..self.start + self.len);
        bytes.unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn begins_at_a_page() {
        for len in [0, 1, ALIGN, 3 * ALIGN + 1, 1 << 20] {
            let mut buffer = PageBuffer::new(len);
            assert_eq!(buffer.len(), len);
            assert_eq!(buffer.as_ptr().addr() % ALIGN, 0);
            buffer.fill(1);
            // It may move as a value; its bytes stay.
            let moved = Box::new(buffer);
            assert_eq!(moved.as_ptr().addr() % ALIGN, 0);
            assert!(moved.iter().all(|byte| *byte == 1));
        }
        assert!(PageBuffer::default().is_empty());
    }
}
