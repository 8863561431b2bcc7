//! The guest's RAM: allocating it, and its place in the memory map.
//!
//! Each zone of a VM's memory has a RAM block. A zone that can grow has a second one, as large as what
//! can be added, of which only the plugged parts take memory of the host. Memory that is configured
//! without zones is one zone, whose blocks have the names that they had before there were zones.

use std::fs::File;
use std::sync::Arc;

use memory::{Label, LostWatch, Pages, RamBlock, RamConfig, RamSlice, SpaceKind, Transaction};
use migration::Block;
use spec::{MemoryConfig, MemoryZone, VmConfig};

use crate::arch::x86_64::layout::{self, Layout, ZoneSize};
use crate::devices::{MachineOrigin, MemoryEnd, MemoryOrigin};
use crate::failure::BuildError;
use crate::guest_event::{GuestEvent, Reporter};

/// A RAM block of a VM. Both sides of a migration derive the list from the configuration.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct BlockPlan {
    pub(crate) name: String,
    pub(crate) size: u64,
    /// Index of the zone.
    zone: usize,
    /// The block has the memory that is added to the zone, not that which the guest boots with.
    is_hotplug: bool,
}

/// Returns the RAM blocks of a VM, in their order.
pub(crate) fn plan(memory: &MemoryConfig) -> Vec<BlockPlan> {
    let mut blocks = Vec::new();
    for (index, zone) in memory.all_zones().iter().enumerate() {
        // No zone's name contains a slash: `a/hotplug` cannot be another zone.
        let names = match zone.is_listed {
            true => [format!("ram/{}", zone.id), format!("hotplug/{}", zone.id)],
            false => ["ram".to_owned(), "hotplug".to_owned()],
        };
        let sizes = [(zone.size, false), (zone.hotplug_region(), true)];
        for (name, (size, is_hotplug)) in names.into_iter().zip(sizes) {
            if size > 0 || !is_hotplug {
                blocks.push(BlockPlan {
                    name,
                    size,
                    zone: index,
                    is_hotplug,
                });
            }
        }
    }
    blocks
}

/// Returns the sizes of the zones for the layout.
pub(super) fn zone_sizes(memory: &MemoryConfig) -> Vec<ZoneSize> {
    let zones = memory.all_zones().into_iter();
    let size = |zone: MemoryZone<'_>| ZoneSize {
        boot: zone.size,
        room: zone.hotplug_region(),
    };
    zones.map(size).collect()
}

/// The RAM blocks of a guest.
#[derive(Clone, Debug)]
pub(crate) struct GuestRam {
    /// The block that begins at guest address 0: the first of all.
    first: Arc<RamBlock>,
    blocks: Vec<(BlockPlan, Arc<RamBlock>)>,
}

impl GuestRam {
    /// Allocates the guest's RAM, or maps what another process gave, and has its loss reported.
    pub(super) fn new(
        config: &VmConfig,
        origin: &MachineOrigin,
        reporter: &Reporter,
    ) -> Result<(Self, Vec<LostWatch>), BuildError> {
        let zones = config.memory.all_zones();
        let (mut blocks, mut watches, mut offset) = (Vec::new(), Vec::new(), 0);
        for (index, plan) in plan(&config.memory).into_iter().enumerate() {
            let Some(zone) = zones.get(plan.zone) else {
                continue;
            };
            let wanted = ram_config(zone, &plan);
            let made = new_block(&wanted, &origin.memory, index, offset);
            let ram = Arc::new(made.map_err(|error| of_zone(zone, error))?);
            let to = reporter.clone();
            // Memory of a file or another process may be cut off at any time (SIGBUS): the owner
            // must learn which page, and end the guest.
            watches.push(ram.on_lost(move |offset| to.report(GuestEvent::MemoryLost(offset))));
            offset += plan.size;
            blocks.push((plan, ram));
        }
        // Both sides of a migration number blocks by this order, and a snapshot concatenates them:
        // it never changes.
        let first = blocks.first().map(|(_, ram)| Arc::clone(ram));
        let first = first.ok_or_else(|| {
            BuildError::host("allocate memory")(std::io::ErrorKind::InvalidInput.into())
        })?;
        Ok((Self { first, blocks }, watches))
    }

    /// The block that begins at guest address 0.
    pub(crate) fn boot(&self) -> &RamBlock {
        &self.first
    }

    /// The block of the memory that is added to the zone of this index, if it can grow.
    pub(crate) fn hotplug(&self, zone: usize) -> Option<&Arc<RamBlock>> {
        self.of_zone(zone, true)
    }

    /// Returns the memory that the virtio-mem device of each zone that can grow manages.
    pub(super) fn ends(&self, layout: &Layout, reporter: &Reporter) -> Vec<MemoryEnd> {
        let zones = layout.zones.iter().enumerate();
        let ends = zones.filter_map(|(zone, place)| {
            let (range, block) = place.hotplug.zip(self.hotplug(zone))?;
            let to = reporter.clone();
            Some(MemoryEnd {
                zone,
                ram: Arc::clone(block),
                addr: range.first(),
                on_change: Box::new(move || to.report(GuestEvent::MemoryChanged)),
            })
        });
        ends.collect()
    }

    fn of_zone(&self, zone: usize, is_hotplug: bool) -> Option<&Arc<RamBlock>> {
        let wanted = |plan: &BlockPlan| (plan.zone, plan.is_hotplug) == (zone, is_hotplug);
        let mut blocks = self.blocks.iter();
        blocks.find_map(|(plan, ram)| wanted(plan).then_some(ram))
    }

    fn all(&self) -> impl Iterator<Item = &Arc<RamBlock>> {
        self.blocks.iter().map(|(_, ram)| ram)
    }

    /// All blocks, with their names.
    pub(crate) fn blocks(&self) -> Vec<Block> {
        let block = |(plan, ram): &(BlockPlan, Arc<RamBlock>)| Block {
            name: plan.name.clone(),
            ram: Arc::clone(ram),
        };
        self.blocks.iter().map(block).collect()
    }

    /// Returns how many bytes the guest has.
    pub(crate) fn plugged_len(&self) -> u64 {
        self.all().map(|ram| ram.plugged_len() as u64).sum()
    }

    /// Whether all pages of all blocks are there.
    pub(crate) fn pages(&self) -> Pages {
        let any = |pages| self.all().any(|ram| ram.pages() == pages);
        match (any(Pages::Lost), any(Pages::Awaited)) {
            // Lost wins: a guest that misses one page must not continue, however many are still
            // awaited.
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
        let zones = config.all_zones();
        for (index, (zone, place)) in zones.iter().zip(&layout.zones).enumerate() {
            let Some(boot) = self.of_zone(index, false) else {
                continue;
            };
            // One block may have two places, below and above 4 GiB: offsets continue from one to the
            // next.
            let mut offset = 0;
            for range in &place.ram {
                let name = match range.first() < layout::LOW_RAM_END {
                    true => "ram below 4G",
                    false => "ram above 4G",
                };
                let size = range.len().unwrap_or(0);
                let block = Arc::clone(boot);
                let region = tx.ram(label(zone, name), RamSlice { block, offset }, size)?;
                tx.map(SpaceKind::Memory, range.first(), region, 0)?;
                offset += size;
            }
            if let (Some(range), Some(block)) = (place.hotplug, self.hotplug(index))
                && zone.has_virtio_mem()
            {
                let (block, offset) = (Arc::clone(block), 0);
                let size = range.len().unwrap_or(0);
                let name = label(zone, "hotplugged ram");
                let region = tx.ram(name, RamSlice { block, offset }, size)?;
                tx.map(SpaceKind::Memory, range.first(), region, 0)?;
            }
        }
        Ok(())
    }
}

/// The label of a region, which names its zone if there are several.
fn label(zone: &MemoryZone<'_>, name: &str) -> Label {
    match zone.is_listed {
        true => Label::from((name, zone.id)),
        false => Label::from(name),
    }
}

/// Names the zone in the error of its block.
fn of_zone(zone: &MemoryZone<'_>, error: BuildError) -> BuildError {
    match error {
        BuildError::Ram(source) if zone.is_listed => BuildError::Zone {
            zone: zone.id.to_owned(),
            source,
        },
        error => error,
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
        // `of_file` checks the size of the file: the other process is no more trusted than a peer.
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

fn ram_config(zone: &MemoryZone<'_>, plan: &BlockPlan) -> RamConfig {
    RamConfig {
        size: plan.size,
        shared: zone.shared,
        hugepage_size: zone.hugepages.then(|| zone.page_size()),
        prefault: zone.prefault,
        mergeable: zone.mergeable,
        thp: zone.thp,
        reserve: zone.reserve,
        hotplug: plan.is_hotplug,
        guest_plugs: plan.is_hotplug && zone.has_virtio_mem(),
        host_node: zone.host_node,
    }
}
