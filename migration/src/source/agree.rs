//! Agreement with the destination on what is copied.

use std::fs::File;
use std::time::Duration;

use super::{Engine, disconnected};
use crate::MigrationError;
use crate::journal::Step;
use crate::message::{
    BlockInfo, Channel, ControlChannel, Offer, ToDestination, ToSource, VERSIONS,
};
use crate::pages::{Block, PAGE};
use crate::progress::{Activity, Phase};
use crate::sender::Ram;
use crate::wire::WireError;
use crate::{disks, verify};

/// How long the destination may take to make a machine.
const PREPARE_PATIENCE: Duration = Duration::from_secs(120);

impl Engine<'_, '_> {
    /// Agrees with the destination on a version and the offer, has it build the machine, and opens the RAM
    /// channels.
    pub(super) fn prepare(&mut self) -> Result<(), MigrationError> {
        self.sending.progress.begin(Activity::Connect);
        let stream = self.connect(Channel::Control)?;
        self.control = Some(ControlChannel::new(stream));
        self.version = self.expect(|answer| match answer {
            ToSource::Welcome { version } if (VERSIONS.0..=VERSIONS.1).contains(version) => {
                Some(*version)
            }
            _ => None,
        })?;
        self.sending.progress.enter(Phase::Preparing);
        self.sending.progress.begin(Activity::Prepare);
        let wanted = self.sending.policy.connections(self.memory_bytes());
        let (offer, files) = self.offer(wanted)?;
        // Before the destination makes a machine: a source that cannot keep a journal does not migrate.
        let prepared = self.sending.journal.record(Step::Prepare);
        prepared.map_err(|error| MigrationError::here("journal", error))?;
        // `Prepared` comes when the machine is built, which may take much longer than `patience`.
        let policy = self.sending.policy;
        self.patience(PREPARE_PATIENCE.max(policy.patience))?;
        self.send(&ToDestination::Prepare(Box::new(offer)))?;
        // Right behind the offer: descriptors travel with a byte that is no frame, and the
        // destination reads it before the next frame.
        if let Some(files) = files {
            let control = self.control.as_ref().ok_or_else(disconnected)?;
            control.stream.send_files(&files).map_err(WireError::from)?;
        }
        let (connections, postcopy) = self.prepared()?;
        // A huge page cannot be filled piece by piece.
        let is_small = |block: &Block| block.ram.page_size() == PAGE as u64;
        self.can_postcopy = postcopy && policy.may_postcopy() && self.blocks.iter().all(is_small);
        self.patience(policy.patience)?;
        // The number comes from the other side: each channel costs a descriptor and a thread.
        for index in 0..connections.clamp(1, wanted) {
            let stream = self.connect(Channel::Ram { index })?;
            self.rams.push(Ram::new(stream));
        }
        let count = self.rams.len() as u16;
        self.sending
            .progress
            .update(|report| report.connections = count);
        Ok(())
    }

    /// Describes the VM, its memory and disks for the destination, and how this migration copies them.
    /// Returns the memory's files too if the destination gets those instead of pages.
    fn offer(&mut self, connections: u16) -> Result<(Offer, Option<Vec<File>>), MigrationError> {
        if self.version >= disks::BASES_VERSION {
            self.source.may_offer_bases();
        }
        let mut offer = self.source.offer().map_err(MigrationError::Here)?;
        let policy = self.sending.policy;
        offer.connections = connections;
        offer.postcopy = policy.may_postcopy();
        // Absent if one block has no file. Then its pages are copied like those of any migration.
        let files = if policy.local { self.files() } else { None };
        self.is_given = files.is_some();
        offer.given = self.is_given;
        // Memory that is given is not copied: there is nothing to compare.
        self.verify = policy.verify && !self.is_given;
        // An older destination rejects an offer with a field that it does not know. Dropping the
        // field instead would leave memory unverified although the user asked for it.
        if self.verify && self.version < verify::VERSION {
            let why = format!(
                "the destination supports version {} of the migration protocol, and `verify` \
                 needs version {}: update the destination, or migrate without `verify`",
                self.version,
                verify::VERSION
            );
            return Err(MigrationError::here("verify-unsupported", why));
        }
        offer.verify = self.verify;
        offer.disks = self.disks_to_offer()?;
        let memory = self.memory_bytes();
        let disks = self.disks.iter().map(|disk| disk.size).sum();
        self.sending.progress.update(|report| {
            report.memory_bytes = memory;
            report.disk_bytes = disks;
            report.disk_remaining_bytes = disks;
        });
        Ok((offer, files))
    }

    fn memory_bytes(&self) -> u64 {
        self.blocks.iter().map(|block| block.ram.len() as u64).sum()
    }

    /// The files of all blocks, if they have some.
    fn files(&self) -> Option<Vec<File>> {
        let file = |block: &Block| block.ram.file()?.try_clone().ok();
        self.blocks.iter().map(file).collect()
    }

    /// Waits until the destination is prepared. Returns how many channels it takes, and whether pages may
    /// follow the guest.
    fn prepared(&mut self) -> Result<(u16, bool), MigrationError> {
        let mut answer = self.recv()?;
        if let ToSource::HasBases(disks) = &answer {
            // Unless this side offered bases of them, the peer is wrong, and nothing was copied yet.
            let left_out = self.source.leave_out_bases(disks);
            left_out.map_err(MigrationError::Here)?;
            answer = self.recv()?;
        }
        match answer {
            ToSource::Prepared {
                connections,
                postcopy,
            } => Ok((connections, postcopy)),
            other => {
                Err(WireError::damaged(format!("{other:?} is not the expected answer")).into())
            }
        }
    }

    /// The disks to copy, if the destination can take them.
    fn disks_to_offer(&self) -> Result<Vec<BlockInfo>, MigrationError> {
        if !self.disks.is_empty() && self.version < disks::VERSION {
            let why = format!(
                "the destination supports version {} of the migration protocol, and copying disks \
                 needs version {}: update the destination, or put the disks on shared storage",
                self.version,
                disks::VERSION
            );
            return Err(MigrationError::here("storage-copy-unsupported", why));
        }
        if !self.disks.is_empty() && self.is_given {
            let why = "disks are not copied together with `local`: the other process of this host \
                       can use the same images";
            return Err(MigrationError::here("storage-copy-unsupported", why));
        }
        Ok(disks::infos(&self.disks))
    }
}
