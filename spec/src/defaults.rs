//! Values of absent fields, where serde wants a function.

pub(crate) fn yes() -> bool {
    true
}

pub(crate) fn one_queue() -> usize {
    1
}
