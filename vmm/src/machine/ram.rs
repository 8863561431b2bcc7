//! The guest's RAM: allocating it, and its place in the memory map.

use std::fs::File;
use std::sync::Arc;

use memory::{LostWatch, RamBlock, RamConfig, RamSlice, SpaceKind, Transaction};
use spec::VmConfig;

use crate::arch::x86_64::layout::Layout;
use crate::devices::{MachineOrigin, MemoryOrigin};
use crate::failure::BuildError;
use crate::guest_event::{GuestEvent, Reporter};

/// Allocates the guest's RAM, or maps what another process gave, and has its loss reported.
pub(super) fn new(
    config: &VmConfig,
    origin: &MachineOrigin,
    reporter: &Reporter,
) -> Result<(Arc<RamBlock>, LostWatch), BuildError> {
    let wanted = ram_config(config);
    let duplicate = |file: &File| {
        let why = "duplicate the descriptor of a guest's memory";
        file.try_clone().map_err(BuildError::host(why))
    };
    let ram = match &origin.memory {
        MemoryOrigin::New => RamBlock::new(&wanted)?,
        MemoryOrigin::Given(file) => RamBlock::of_file(&wanted, duplicate(file)?)?,
        MemoryOrigin::View { file, prefault } => {
            let wanted = RamConfig {
                prefault: *prefault,
                ..wanted
            };
            RamBlock::view_of_file(&wanted, duplicate(file)?, 0)?
        }
    };
    let ram = Arc::new(ram);
    let to = reporter.clone();
    let lost = ram.on_lost(move |offset| to.report(GuestEvent::MemoryLost(offset)));
    Ok((ram, lost))
}

fn ram_config(config: &VmConfig) -> RamConfig {
    let memory = &config.memory;
    RamConfig {
        size: memory.size,
        shared: memory.shared,
        hugepage_size: memory
            .hugepages
            .then(|| memory.hugepage_size.unwrap_or(2 << 20)),
        prefault: memory.prefault,
        mergeable: memory.mergeable,
        thp: memory.thp,
        reserve: memory.reserve,
        hotplug: false,
    }
}

pub(super) fn map(
    tx: &mut Transaction<'_>,
    layout: &Layout,
    ram: &Arc<RamBlock>,
) -> Result<(), BuildError> {
    let mut offset = 0;
    for (range, name) in layout.ram.iter().zip(["ram below 4G", "ram above 4G"]) {
        let size = range.len().unwrap_or(0);
        let region = tx.ram(
            name,
            RamSlice {
                block: Arc::clone(ram),
                offset,
            },
            size,
        )?;
        tx.map(SpaceKind::Memory, range.first(), region, 0)?;
        offset += size;
    }
    Ok(())
}
