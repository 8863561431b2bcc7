//! Verify mode at the destination: memory and pages are compared with hashes from the source.

use memory::DirtyBitmap;

use super::channels::IncomingMemory;
use super::postcopy::PostcopyReceiver;
use crate::MigrationError;
use crate::pages::{Decoded, PAGE};
use crate::progress::Progress;
use crate::verify::{Difference, Hashes};
use crate::wire::WireError;

impl IncomingMemory {
    /// Compares memory with hashes that arrived; in postcopy keeps them for the pages that follow.
    pub(super) fn take_hashes(
        &self,
        body: &[u8],
        progress: &Progress,
    ) -> Result<Hashes, WireError> {
        if !self.verify {
            return Err(WireError::damaged(
                "unexpected hashes: the migration does not `verify`",
            ));
        }
        let hashes = Hashes::decode(body, &self.blocks)?;
        if self.receiver.get().is_none() {
            // All rounds before this one have ended, so the pages are in place. A difference does not
            // end the channel: the round does, and reports the first difference of all channels.
            let difference = hashes.compare(&self.blocks, &self.touched);
            self.findings.note(hashes.count(), difference);
            progress.update(|report| report.verified_pages += hashes.count());
        }
        Ok(hashes)
    }

    /// Fills pages that come after the guest. One that has not the hash that was announced for it stays
    /// missing: the guest must not see it.
    pub(super) fn fill(
        &self,
        receiver: &PostcopyReceiver,
        pages: &Decoded<'_>,
        announced: &Hashes,
        progress: &Progress,
    ) -> Result<(), WireError> {
        if !self.verify {
            return receiver.fill(pages, |_, _| true);
        }
        let mut is_unannounced = false;
        receiver.fill(pages, |page, content| {
            // Before the page is filled: UFFDIO_COPY wakes the vCPU that waits, which would run on
            // at once with wrong content.
            let admitted = announced.admits(pages.block, page, content);
            // The closure cannot fail. The page stays missing, and the error follows after the
            // batch.
            is_unannounced |= admitted.is_none();
            let differs = admitted == Some(false);
            let block = pages.block;
            self.findings
                .note(1, differs.then_some(Difference { block, page }));
            progress.update(|report| report.verified_pages += 1);
            admitted == Some(true)
        })?;
        if is_unannounced {
            return Err(WireError::damaged("a page arrived without its hash"));
        }
        Ok(())
    }

    /// In verify mode, every page was compared but those that come after the guest.
    pub(super) fn check_all_compared(&self) -> Result<(), MigrationError> {
        if !self.verify {
            return Ok(());
        }
        // The count catches a source that leaves out hashes: no comparison would fail then. This
        // must run before `expect_postcopy` takes `missing`, or `later` would be 0.
        let all: usize = self.blocks.iter().map(|block| block.ram.len() / PAGE).sum();
        let later: usize = self.missing.lock().iter().map(DirtyBitmap::count).sum();
        let (wanted, compared) = (all.saturating_sub(later) as u64, self.findings.compared());
        if compared == wanted {
            return Ok(());
        }
        let why = format!("hashes of {compared} pages arrived, and {wanted} are needed");
        Err(WireError::damaged(why).into())
    }
}
