//! The layout of the bytes; integers are little-endian.
//!
//! ```text
//!   header:   "WHSTATE\0" | format: u32 | sections: u32 | crc of these: u32
//!   section:  path length: u16 | version: u16 | body length: u32 | crc of all else: u32 | path | body
//! ```

/// The magic number at the start of saved state.
pub(crate) const MAGIC: [u8; 8] = *b"WHSTATE\0";

/// The number of the format that this module describes.
pub(crate) const FORMAT: u32 = 1;

/// Returns the bytes of a header.
pub(crate) fn header(sections: u32) -> Vec<u8> {
    let mut bytes = MAGIC.to_vec();
    bytes.extend(FORMAT.to_le_bytes());
    bytes.extend(sections.to_le_bytes());
    bytes.extend(crc32fast::hash(&bytes).to_le_bytes());
    bytes
}

/// Returns the checksum of a section.
pub(crate) fn section_crc(version: u16, path: &[u8], body: &[u8]) -> u32 {
    let mut crc = crc32fast::Hasher::new();
    // With the lengths, no other split of the same bytes into path and body has this checksum.
    crc.update(&(path.len() as u64).to_le_bytes());
    crc.update(&(body.len() as u64).to_le_bytes());
    crc.update(&version.to_le_bytes());
    crc.update(path);
    crc.update(body);
    crc.finalize()
}

/// A reader that consumes bytes from the front.
pub(crate) struct Cursor<'a>(pub(crate) &'a [u8]);

impl<'a> Cursor<'a> {
    /// Returns the next `len` bytes; `None` if fewer are left.
    pub(crate) fn bytes(&mut self, len: usize) -> Option<&'a [u8]> {
        let (taken, rest) = self.0.split_at_checked(len)?;
        self.0 = rest;
        Some(taken)
    }

    /// Returns the next `N` bytes; `None` if fewer are left.
    pub(crate) fn array<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (taken, rest) = self.0.split_first_chunk()?;
        self.0 = rest;
        Some(*taken)
    }

    pub(crate) fn u16(&mut self) -> Option<u16> {
        self.array().map(u16::from_le_bytes)
    }

    pub(crate) fn u32(&mut self) -> Option<u32> {
        self.array().map(u32::from_le_bytes)
    }
}
