//! Saved state: named, versioned, size-capped sections.
