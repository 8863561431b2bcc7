//! Events of userfaultfd that cannot be read, as no test can have the kernel refuse to read them.

use std::cell::RefCell;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

thread_local! {
    static CHOSEN: RefCell<UnreadableFaults> = RefCell::default();
}

/// A switch that makes the reads of memory's events fail.
#[derive(Clone, Debug, Default)]
pub struct UnreadableFaults(Arc<AtomicBool>);

impl UnreadableFaults {
    /// Returns a switch for the memory to which pages come that this thread registers from now on.
    #[must_use]
    pub fn new() -> Self {
        let switch = Self::default();
        CHOSEN.set(switch.clone());
        switch
    }

    pub(crate) fn of_this_thread() -> Self {
        CHOSEN.with_borrow(Self::clone)
    }

    /// From now on no event can be read.
    pub fn fail(&self) {
        self.0.store(true, Ordering::SeqCst);
    }

    pub(crate) fn check(&self) -> io::Result<()> {
        match self.0.load(Ordering::SeqCst) {
            true => Err(io::Error::other("the test makes this read fail")),
            false => Ok(()),
        }
    }
}
