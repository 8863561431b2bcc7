//! What the driver does for a snapshot and for a guest that is restored, beyond a migration's steps.

use std::sync::mpsc;
use std::time::{Duration, Instant};

use migration::snapshot::Core;
use migration::{Refusal, Stopped};

use super::Driver;
use super::migration::{no_machine, refused};
use super::outgoing::OutgoingState;

impl Driver {
    /// Stops the guest for a live snapshot, on another thread, and answers when its clocks stopped.
    pub(crate) fn stop_to_image(&mut self, answer: mpsc::Sender<Result<Stopped, Refusal>>) {
        self.stop_as(false, answer);
    }

    /// A live snapshot has the guest's state, and its memory is protected: the guest runs again, if it did
    /// before.
    pub(crate) fn resume_imaged(&mut self) -> Result<(), Refusal> {
        let ran = self.outgoing.as_ref().ok_or_else(no_machine)?;
        if ran.state.must_resume() {
            let resumed = self.on()?.resume();
            resumed.map_err(|error| Refusal::new("cannot-go-on", error.to_string()))?;
        }
        if let Some(outgoing) = &mut self.outgoing {
            outgoing.state = OutgoingState::Imaged;
        }
        Ok(())
    }

    /// A guest that comes from a snapshot is another copy, and its clocks were stopped for so long.
    pub(crate) fn announce_generation(
        &mut self,
        stopped_for: Duration,
        as_of: Instant,
    ) -> Result<(), Refusal> {
        self.expecting()?.announce_generation(stopped_for, as_of);
        Ok(())
    }

    /// Returns the registers and the memory of a paused guest, for a core dump.
    pub(crate) fn core(&mut self) -> Result<Core, Refusal> {
        self.on()?.core().map_err(refused("cannot-be-dumped"))
    }

    /// Returns since when the clocks of a guest that is paused are stopped.
    pub(crate) fn clocks_stopped_at(&mut self) -> Result<Option<Instant>, Refusal> {
        Ok(self.on()?.clocks_stopped_at())
    }
}
