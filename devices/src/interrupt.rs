//! Interrupt lines.

use std::io;
use std::sync::Arc;

use vm_superio::Trigger;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

/// A line by which a device interrupts the guest: an event descriptor that the machine attaches
/// to an interrupt controller.
#[derive(Clone, Debug)]
pub struct InterruptLine(Arc<EventFd>);

impl InterruptLine {
    /// A line that leads nowhere yet.
    ///
    /// # Errors
    /// Fails if the host has no event descriptor left.
    pub fn new() -> io::Result<Self> {
        EventFd::new(EFD_NONBLOCK).map(|fd| Self(Arc::new(fd)))
    }

    /// Raises an edge.
    pub fn raise(&self) {
        // The write fails only if the counter is full of edges that are not taken yet. One more adds nothing.
        let _ = self.0.write(1);
    }

    /// Returns the descriptor to attach to the interrupt controller.
    #[must_use]
    pub fn event_fd(&self) -> &EventFd {
        &self.0
    }
}

impl Trigger for InterruptLine {
    type E = std::convert::Infallible;

    fn trigger(&self) -> Result<(), Self::E> {
        self.raise();
        Ok(())
    }
}
