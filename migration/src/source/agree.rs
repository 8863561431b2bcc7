//! Agreement with the destination on what is copied.

use super::{Engine, MigrationError};
use crate::disks;
use crate::message::{BlockInfo, ToSource};
use crate::wire::WireError;

impl Engine<'_, '_> {
    /// Waits until the destination is prepared. Returns how many channels it takes, and whether pages may
    /// follow the guest.
    pub(super) fn prepared(&mut self) -> Result<(u16, bool), MigrationError> {
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
    pub(super) fn disks_to_offer(&self) -> Result<Vec<BlockInfo>, MigrationError> {
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
