//! Memory that a machine gets through ACPI while its guest runs.
//!
//! The RAM block is as large as what can be added. Only what is plugged is in the memory map, one
//! region for each slot, so a guest finds nothing at the other addresses.

use std::sync::Arc;

use ::devices::DimmBlock;
use ::devices::dimms::{self, DimmError, DimmRefusal};
use memory::{RamBlock, RamSlice, RegionId, SpaceKind, Transaction};
use spec::MemoryConfig;

use super::platform::map_port;
use super::{Active, GuestRam};
use crate::arch::x86_64::layout::{self, Layout};
use crate::devices::SharedTopology;
use crate::failure::{BuildError, MoveError};
use crate::guest_event::{GuestEvent, Reporter};

/// Memory of one slot in the map: its offset in the RAM block, its bytes, and its region.
struct Mapped {
    offset: u64,
    len: u64,
    region: RegionId,
}

/// The slots for memory that is added through ACPI.
pub(crate) struct Dimms {
    pub(crate) block: Arc<DimmBlock>,
    ram: Arc<RamBlock>,
    mapped: Vec<Mapped>,
}

impl Dimms {
    /// Maps the registers, and the memory that the guest has from the start. `None` where the
    /// machine has no room for memory that is added through ACPI.
    pub(super) fn map(
        tx: &mut Transaction<'_>,
        config: &MemoryConfig,
        layout: &Layout,
        ram: &GuestRam,
        reporter: &Reporter,
    ) -> Result<Option<Self>, BuildError> {
        // Zones that are listed grow by virtio-mem only: there is no other zone than this one.
        let place = layout.zones.first().and_then(|zone| zone.hotplug);
        let room = place.zip(ram.hotplug(0));
        let Some((region, ram)) = room.filter(|_| config.has_dimms()) else {
            return Ok(None);
        };
        let to = reporter.clone();
        let changed = move || to.report(GuestEvent::MemoryChanged);
        let block = DimmBlock::new(region, config.hotplugged(), changed).map_err(refused)?;
        let block = Arc::new(block);
        let registers = Arc::clone(&block) as _;
        let name = ("registers", "dimms");
        map_port(tx, name, layout::DIMMS_PORT, dimms::LEN, registers)?;
        let mut made = Self {
            block,
            ram: Arc::clone(ram),
            mapped: Vec::new(),
        };
        let wanted = made.block.plugged();
        made.plug(wanted.iter().map(|(_, len)| len).sum())?;
        made.mapped = made.place(tx, &wanted)?;
        Ok(Some(made))
    }

    /// Plugs the first `len` bytes of the RAM block, as far as they are not plugged.
    fn plug(&self, len: u64) -> Result<(), BuildError> {
        // After a load the memory is plugged and its pages may not have arrived. Plugging again would wait
        // for them.
        for offset in (0..len).step_by(dimms::UNIT as usize) {
            let (offset, unit) = (offset as usize, dimms::UNIT as usize);
            if self.ram.plugged_pages(offset, unit) == 0 {
                let plugged = self.ram.plug(offset, unit);
                plugged.map_err(BuildError::host("add memory to a guest"))?;
            }
        }
        Ok(())
    }

    /// Gives back to the host what is plugged of the RAM block from byte `len` on.
    fn unplug(&self, len: u64) {
        for offset in (len..self.ram.len() as u64).step_by(dimms::UNIT as usize) {
            let (offset, unit) = (offset as usize, dimms::UNIT as usize);
            if self.ram.plugged_pages(offset, unit) > 0
                && let Err(error) = self.ram.unplug(offset, unit)
            {
                tracing::error!(%error, "the host does not take back memory of a guest");
            }
        }
    }

    /// Places exactly this memory in the map, given as offsets and bytes. The caller keeps the result
    /// when the transaction is committed.
    fn place(
        &self,
        tx: &mut Transaction<'_>,
        wanted: &[(u64, u64)],
    ) -> Result<Vec<Mapped>, BuildError> {
        let mut mapped = Vec::new();
        let has = |old: &&Mapped| wanted.contains(&(old.offset, old.len));
        for old in &self.mapped {
            if has(&old) {
                mapped.push(Mapped { ..*old });
            } else {
                tx.unplace(old.region)?;
                tx.destroy(old.region)?;
            }
        }
        let start = self.block.region().first();
        for &(offset, len) in wanted {
            if !mapped.iter().any(|old| old.offset == offset) {
                let block = Arc::clone(&self.ram);
                let region = tx.ram("hotplugged ram", RamSlice { block, offset }, len)?;
                tx.map(SpaceKind::Memory, start + offset, region, 0)?;
                mapped.push(Mapped {
                    offset,
                    len,
                    region,
                });
            }
        }
        Ok(mapped)
    }

    /// Changes the map so that the guest has exactly what the registers say, and `more` bytes behind
    /// it. On an error nothing has changed.
    fn remap(&mut self, topology: &SharedTopology, more: u64) -> Result<(), BuildError> {
        let mut wanted = self.block.plugged();
        let before: u64 = self.mapped.iter().map(|mapped| mapped.len).sum();
        let mut len = self.block.plugged_len();
        if more > 0 {
            wanted.push((self.block.check(more).map_err(refused)?, more));
            len += more;
        }
        // RAM first, then the map: a guest that reads the new range at once finds memory behind it.
        let placed = self.plug(len).and_then(|()| {
            let mut topology = topology.lock();
            topology.transaction(|tx| self.place(tx, &wanted))
        });
        match placed {
            Ok(mapped) => self.mapped = mapped,
            Err(error) => {
                // The transaction has changed nothing, so the old length is what the map has.
                self.unplug(before);
                return Err(error);
            }
        }
        // After the map has let go of it.
        self.unplug(len);
        Ok(())
    }
}

fn refused(error: DimmError) -> BuildError {
    BuildError::host("add memory to a guest")(std::io::Error::other(error))
}

impl Active {
    /// The slots for memory that is added through ACPI, if the machine has them.
    pub(crate) fn dimms(&self) -> Option<&DimmBlock> {
        self.parts.dimms.as_ref().map(|dimms| &*dimms.block)
    }

    /// Plugs vCPUs until there are `vcpus`, and `memory` more bytes through ACPI. On an error nothing
    /// has changed for the guest.
    pub(crate) fn grow(&mut self, vcpus: Option<u32>, memory: u64) -> Result<(), BuildError> {
        let topology = Arc::clone(&self.parts.topology);
        if memory > 0 {
            let dimms = self.parts.dimms.as_mut();
            let dimms = dimms.ok_or_else(|| refused(DimmError::NoSlot))?;
            // Memory before the vCPUs, since it is the part that can be undone without the guest.
            dimms.remap(&topology, memory)?;
        }
        let plugged = vcpus.map_or(Ok(()), |count| self.plug_vcpus(count));
        let Some(dimms) = self.parts.dimms.as_mut().filter(|_| memory > 0) else {
            return Ok(plugged?);
        };
        if let Err(error) = plugged {
            // The guest has not seen the memory: the registers do not name it.
            dimms.remap(&topology, 0)?;
            return Err(error.into());
        }
        dimms.block.plug(memory).map_err(refused)?;
        self.parts.power.announce_memory();
        Ok(())
    }

    /// Notifies the guest again of memory that it has not accepted.
    pub(crate) fn offer_memory_again(&self) {
        if self.dimms().is_some_and(DimmBlock::offer_again) {
            self.parts.power.announce_memory();
        }
    }

    /// Returns what the guest refused of its memory since the last call.
    pub(crate) fn take_memory_refusals(&self) -> Vec<DimmRefusal> {
        self.dimms().map_or_else(Vec::new, DimmBlock::take_refusals)
    }

    /// Changes the map to what the registers say, which were loaded.
    pub(super) fn load_memory_map(&mut self) -> Result<(), MoveError> {
        let topology = Arc::clone(&self.parts.topology);
        match &mut self.parts.dimms {
            Some(dimms) => {
                let mapped = dimms.remap(&topology, 0);
                mapped.map_err(|error| MoveError::Memory(error.to_string()))
            }
            None => Ok(()),
        }
    }
}
