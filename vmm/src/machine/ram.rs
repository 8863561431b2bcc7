//! The guest's RAM: allocating it, and its place in the memory map.
//!
//! A VM whose memory can grow has a second RAM block, as large as what can be added, of which only
//! the plugged parts take memory of the host.

use std::fs::File;
use std::sync::Arc;

use memory::{LostWatch, Pages, RamBlock, RamConfig, RamSlice, SpaceKind, Transaction};
use migration::Block;
use spec::{MemoryConfig, VmConfig};

use crate::arch::x86_64::layout::Layout;
use crate::devices::{MachineOrigin, MemoryOrigin};
use crate::failure::BuildError;
use crate::guest_event::{GuestEvent, Reporter};

/// The name of the block that the guest boots with.
const BOOT: &str = "ram";
/// The name of the block of hotplugged memory.
const HOTPLUG: &str = "hotplug";

/// Names and sizes of the RAM blocks of a VM, in the order of [`GuestRam::blocks`].
pub(crate) fn sizes(memory: &MemoryConfig) -> Vec<(&'static str, u64)> {
    let mut sizes = vec![(BOOT, memory.size)];
    if memory.hotplug_region() > 0 {
        sizes.push((HOTPLUG, memory.hotplug_region()));
    }
    sizes
}

/// The RAM blocks of a guest.
#[derive(Clone, Debug)]
pub(crate) struct GuestRam {
    boot: Arc<RamBlock>,
    hotplug: Option<Arc<RamBlock>>,
}

impl GuestRam {
    /// Allocates the guest's RAM, or maps what another process gave, and has its loss reported.
    pub(super) fn new(
        config: &VmConfig,
        origin: &MachineOrigin,
        reporter: &Reporter,
    ) -> Result<(Self, Vec<LostWatch>), BuildError> {
        let (mut blocks, mut watches, mut offset) = (Vec::new(), Vec::new(), 0);
        for (index, (name, size)) in sizes(&config.memory).into_iter().enumerate() {
            let wanted = ram_config(&config.memory, size, name == HOTPLUG);
            let ram = Arc::new(new_block(&wanted, &origin.memory, index, offset)?);
            let to = reporter.clone();
            watches.push(ram.on_lost(move |offset| to.report(GuestEvent::MemoryLost(offset))));
            blocks.push(ram);
            offset += size;
        }
        let mut blocks = blocks.into_iter();
        let boot = blocks.next().ok_or_else(|| {
            BuildError::host("allocate memory")(std::io::ErrorKind::InvalidInput.into())
        })?;
        let hotplug = blocks.next();
        Ok((Self { boot, hotplug }, watches))
    }

    /// The block that begins at guest address 0.
    pub(crate) fn boot(&self) -> &RamBlock {
        &self.boot
    }

    /// The block of hotplugged memory, if the VM's memory can grow.
    pub(crate) fn hotplug(&self) -> Option<&Arc<RamBlock>> {
        self.hotplug.as_ref()
    }

    fn all(&self) -> impl Iterator<Item = &Arc<RamBlock>> {
        std::iter::once(&self.boot).chain(&self.hotplug)
    }

    /// All blocks, with their names.
    pub(crate) fn blocks(&self) -> Vec<Block> {
        let named = [BOOT, HOTPLUG].into_iter().zip(self.all());
        let block = |(name, ram): (&str, &Arc<RamBlock>)| Block {
            name: name.to_owned(),
            ram: Arc::clone(ram),
        };
        named.map(block).collect()
    }

    /// Returns how many bytes the guest has.
    pub(crate) fn plugged_len(&self) -> u64 {
        self.all().map(|ram| ram.plugged_len() as u64).sum()
    }

    /// Whether all pages of all blocks are there.
    pub(crate) fn pages(&self) -> Pages {
        let any = |pages| self.all().any(|ram| ram.pages() == pages);
        match (any(Pages::Lost), any(Pages::Awaited)) {
            (true, _) => Pages::Lost,
            (false, true) => Pages::Awaited,
            (false, false) => Pages::There,
        }
    }

    /// Marks awaited pages as lost, because the machine ends.
    pub(crate) fn lose_awaited(&self) {
        self.all().for_each(|ram| ram.lose_awaited());
    }

    /// Looks whether the files behind the memory have become shorter.
    pub(crate) fn check_file(&self) {
        self.all().for_each(|ram| ram.check_file());
    }

    /// The offset in its block of the first page that the host lost, if it has.
    pub(crate) fn first_lost(&self) -> Option<u64> {
        self.all().find_map(|ram| ram.first_lost())
    }

    /// Puts the blocks in their places. With virtio-mem, what is not plugged of the hotplug region is
    /// there, too: the guest's driver decides what it uses, and the map need not change while it runs.
    /// What is plugged through ACPI has its place from [`Dimms`](super::dimms::Dimms).
    pub(super) fn map(
        &self,
        tx: &mut Transaction<'_>,
        config: &MemoryConfig,
        layout: &Layout,
    ) -> Result<(), BuildError> {
        let mut offset = 0;
        for (range, name) in layout.ram.iter().zip(["ram below 4G", "ram above 4G"]) {
            let size = range.len().unwrap_or(0);
            let block = Arc::clone(&self.boot);
            let region = tx.ram(name, RamSlice { block, offset }, size)?;
            tx.map(SpaceKind::Memory, range.first(), region, 0)?;
            offset += size;
        }
        if let (Some(range), Some(block)) = (layout.hotplug, &self.hotplug)
            && config.has_virtio_mem()
        {
            let (block, offset) = (Arc::clone(block), 0);
            let size = range.len().unwrap_or(0);
            let region = tx.ram("hotplugged ram", RamSlice { block, offset }, size)?;
            tx.map(SpaceKind::Memory, range.first(), region, 0)?;
        }
        Ok(())
    }
}

/// Makes the block of this index, whose content is at `offset` of a snapshot's memory.
fn new_block(
    wanted: &RamConfig,
    origin: &MemoryOrigin,
    index: usize,
    offset: u64,
) -> Result<RamBlock, BuildError> {
    let duplicate = |file: &File| {
        let why = "duplicate the descriptor of a guest's memory";
        file.try_clone().map_err(BuildError::host(why))
    };
    Ok(match origin {
        MemoryOrigin::New => RamBlock::new(wanted)?,
        MemoryOrigin::Given(files) => match files.get(index) {
            Some(file) => RamBlock::of_file(wanted, duplicate(file)?)?,
            None => {
                let why = "take over a guest's memory, of which a part was not given";
                return Err(BuildError::host(why)(
                    std::io::ErrorKind::UnexpectedEof.into(),
                ));
            }
        },
        MemoryOrigin::View { file, prefault } => {
            let wanted = RamConfig {
                prefault: *prefault,
                // Its own writes are no other process's matter, until a reboot.
                shared: false,
                ..wanted.clone()
            };
            RamBlock::view_of_file(&wanted, duplicate(file)?, offset)?
        }
    })
}

fn ram_config(memory: &MemoryConfig, size: u64, hotplug: bool) -> RamConfig {
    RamConfig {
        size,
        shared: memory.shared,
        hugepage_size: memory.hugepages.then(|| memory.page_size()),
        prefault: memory.prefault,
        mergeable: memory.mergeable,
        thp: memory.thp,
        reserve: memory.reserve,
        hotplug,
        guest_plugs: hotplug && memory.has_virtio_mem(),
    }
}
