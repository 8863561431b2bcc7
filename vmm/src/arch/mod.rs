//! Code that differs between architectures.

pub(crate) mod x86_64;
