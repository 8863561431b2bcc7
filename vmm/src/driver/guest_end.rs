//! The end of a guest by itself, or by a failure; and the blocks of its disks that it waits for.

use std::time::Instant;

use ::devices::PowerEvent;
use ::devices::event_loop::Sources;
use control::{Category, RequestError, Verb};
use migration::{Progress, Refusal};
use spec::Failure;
use virtio_devices::block::DiskAccess;

use super::{Driver, End, Stage};
use crate::guest_event::GuestEnd;

const BLOCKS_ARRIVING: &str = "blocks of the VM's disks are still arriving from the source of its migration; wait \
                               until that migration is Completed, or give the guest up with \
                               `resolve-migration ID discard` if its source is lost";

/// Blocks of the disks that come after the guest.
#[derive(Default)]
pub(super) struct LateBlocks {
    pub(super) are_awaited: bool,
    /// The guest's own end, which waits for them: its disks are whole then.
    held: Option<GuestEnd>,
}

impl LateBlocks {
    /// Why a request cannot be done before all blocks have come, if it cannot.
    pub(super) fn refuse(&self, verb: Verb) -> Option<RequestError> {
        // The image would lack them for ever. `Delete` says that nothing of the VM is needed.
        let needs_all = matches!(verb, Verb::Reboot | Verb::Shutdown);
        let refused = || RequestError::new(Category::Conflict, "pages-arriving", BLOCKS_ARRIVING);
        (self.are_awaited && needs_all).then(refused)
    }
}

impl Driver {
    /// Does what follows the end of a guest.
    pub(super) fn guest_ended(&mut self, end: GuestEnd, sources: &mut Sources<'_>) {
        match end {
            GuestEnd::Power(PowerEvent::PowerOff) => self.switch_off(End::PowerOff, sources),
            GuestEnd::Power(PowerEvent::Reset) => {
                // A guest can reset in a loop, and each reset costs the host a build. The delay
                // passes in `Ending`, where the guest does not run.
                let now = Instant::now();
                let not_before = now + self.resets.reserve(now);
                self.rebuild(None, not_before);
            }
            GuestEnd::Failed(failure) => {
                // A guest that finds zeros in place of its memory fails in many ways.
                let mut failure = self.find_lost_memory().unwrap_or(failure);
                self.add_progress(&mut failure);
                tracing::warn!(
                    code = failure.code,
                    detail = failure.detail,
                    "a guest failed"
                );
                self.switch_off(End::Failed(failure), sources);
            }
        }
    }

    /// Adds to the failure of a guest which phase and round its migration is in, if one is in progress.
    pub(super) fn add_progress(&self, failure: &mut Failure) {
        let Some(report) = self.progress.as_ref().map(Progress::report) else {
            return;
        };
        if !report.phase.is_over() {
            let phase = crate::migrate::phase(report.phase);
            failure.detail = format!(
                "{}; its migration is in phase {phase}, round {}",
                failure.detail, report.rounds
            );
        }
    }

    /// Ends a guest whose memory cannot be read any more.
    pub(crate) fn fail_guest(&mut self, failure: Failure, sources: &mut Sources<'_>) {
        tracing::error!(detail = failure.detail, "a guest lost memory and is ended");
        self.switch_off(End::Failed(failure), sources);
    }

    /// Notes that blocks of the disks come after the guest. Returns the disks of the machine.
    pub(crate) fn await_blocks(&mut self) -> Result<Vec<(String, DiskAccess)>, Refusal> {
        let disks = self.expecting()?.devices().disks();
        self.late_blocks.are_awaited = true;
        Ok(disks)
    }

    /// Holds the end of a guest whose disks still lack blocks. No vCPU of it runs. A reset would open the images
    /// anew, and a guest that is off would leave them incomplete.
    pub(super) fn hold_end(&mut self, end: GuestEnd) {
        if let Stage::On(active) = &self.stage {
            active.halter().halt();
        }
        tracing::info!(?end, "the guest's end waits for blocks of its disks");
        let detail = "it waits until all blocks of the VM's disks have arrived from the source";
        self.publisher
            .record("end-deferred", Some(detail.to_owned()));
        self.late_blocks.held.get_or_insert(end);
    }

    /// All blocks of the disks have come.
    pub(crate) fn blocks_arrived(&mut self, sources: &mut Sources<'_>) {
        let late = std::mem::take(&mut self.late_blocks);
        if let Some(end) = late.held {
            self.guest_ended(end, sources);
        }
    }
}
