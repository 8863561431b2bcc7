//! The migration engine: empty so far.
//!
//! Its room is drawn so that nothing else moves in: it may use `memory` and `state`, and will know neither KVM
//! nor devices nor HTTP.

#![forbid(unsafe_code)]
