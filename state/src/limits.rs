//! Bounds on what saved state may hold. Who writes obeys them, and who reads checks them.

/// Sections of one VM.
pub const SECTIONS: usize = 4096;

/// Bytes of a section's path.
pub const PATH_LEN: usize = 128;

/// Bytes of a section's body. Guest memory is not in sections; no device has this much else.
pub const SECTION_LEN: usize = 1 << 20;

/// Bytes of all of it.
pub const TOTAL_LEN: usize = 64 << 20;

/// Arrays and maps inside one another in a body.
pub const NESTING: usize = 16;

// What is counted in 32 bits on the wire, and in 16.
const _: () = assert!(TOTAL_LEN <= u32::MAX as usize && PATH_LEN <= u16::MAX as usize);
