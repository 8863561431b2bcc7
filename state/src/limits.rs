//! Limits of saved state. The writer obeys them, and the reader checks them.

/// Maximum number of sections of a VM.
pub const SECTIONS: usize = 4096;

/// Maximum length of a section's path, in bytes.
pub const PATH_LEN: usize = 128;

/// Maximum length of a section's body, in bytes. Guest memory is not in sections.
pub const SECTION_LEN: usize = 1 << 20;

/// Maximum length of all bodies together, in bytes.
pub const TOTAL_LEN: usize = 64 << 20;

/// Maximum nesting of arrays and maps in a body.
pub const NESTING: usize = 16;

// The wire format has 32 bits for lengths of bodies, and 16 for those of paths.
const _: () = assert!(TOTAL_LEN <= u32::MAX as usize && PATH_LEN <= u16::MAX as usize);
