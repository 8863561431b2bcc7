//! Pages by which a guest learns that it is another copy of itself, or that its clocks were disturbed.
//!
//! | device | page | changes |
//! |---|---|---|
//! | VM generation ID (ACPI `VMGENCTR`) | a GUID | when the guest is restored from a snapshot or forked |
//! | VMClock (ACPI `AMZNC10C`) | `vmclock_abi` of Linux | its `vm_generation_counter` as the GUID; its `disruption_marker` also at a migration |
//!
//! Both pages are guest RAM that the memory map reserves, so that they are saved and moved with it. They
//! are outside the RAM that earlier versions reported to their guests, which can be restored as well.
//! A change takes effect with the interrupt that [`PowerBlock`](devices::PowerBlock) raises.

use std::sync::atomic::{Ordering, fence};

use memory::{FlatView, RamBlock};
use uuid::Uuid;
use vm_memory::{Bytes, GuestAddress, GuestMemoryError};

use super::layout;

/// "VCLK".
const MAGIC: u32 = 0x4b4c_4356;
/// Bytes of the structure's page.
pub(crate) const VMCLOCK_LEN: u32 = 0x1000;
const VERSION: u16 = 1;
/// There is no relation to a counter: the page has the markers only.
const COUNTER_INVALID: u8 = 0xff;
const GENERATION_PRESENT: u64 = 1 << 8;
const NOTIFICATION_PRESENT: u64 = 1 << 9;

/// Offsets in `vmclock_abi` (include/uapi/linux/vmclock-abi.h).
const SIZE: usize = 4;
const VERSION_AT: usize = 8;
const COUNTER_ID: usize = 10;
const SEQUENCE: usize = 12;
const DISRUPTION: usize = 16;
const FLAGS: usize = 24;
const GENERATION: usize = 104;

/// Writes the pages of a guest that boots.
pub(crate) fn write(memory: &FlatView) -> Result<(), GuestMemoryError> {
    let mut page = [0; VMCLOCK_LEN as usize];
    let flags = GENERATION_PRESENT | NOTIFICATION_PRESENT;
    for (at, bytes) in [
        (0, MAGIC.to_le_bytes().as_slice()),
        (SIZE, &VMCLOCK_LEN.to_le_bytes()),
        (VERSION_AT, &VERSION.to_le_bytes()),
        (COUNTER_ID, &[COUNTER_INVALID]),
        (FLAGS, &flags.to_le_bytes()),
    ] {
        page[at..at + bytes.len()].copy_from_slice(bytes);
    }
    memory.write_slice(&page, GuestAddress(layout::VMCLOCK))?;
    memory.write_slice(&Uuid::new_v4().to_bytes_le(), GuestAddress(layout::VMGENID))
}

/// Gives a guest that was restored or forked an identity of its own. The guest does not run.
pub(crate) fn renew(ram: &RamBlock) {
    let id = Uuid::new_v4().to_bytes_le();
    if let Some(page) = page(ram, layout::VMGENID) {
        page.copy_from(&id[..]);
    }
    change(ram, true);
}

/// Marks the clocks of a guest that moves to another host as disturbed. The guest does not run.
pub(crate) fn disrupt(ram: &RamBlock) {
    change(ram, false);
}

type Page<'a> = vm_memory::VolatileSlice<'a, memory::DirtySlice<'a>>;

/// A page of low memory, which is where the block begins.
fn page(ram: &RamBlock, at: u64) -> Option<Page<'_>> {
    ram.slice(usize::try_from(at).ok()?, VMCLOCK_LEN as usize)
}

fn change(ram: &RamBlock, is_other_copy: bool) {
    let Some(page) = page(ram, layout::VMCLOCK) else {
        return;
    };
    // All accesses are within the page. The guest may have written anything to it.
    let add = |at: usize| {
        let value = page.load::<u64>(at, Ordering::Relaxed).unwrap_or(0);
        let _ = page.store(value.wrapping_add(1), at, Ordering::Relaxed);
    };
    let magic: u32 = page.load(0, Ordering::Relaxed).unwrap_or(0);
    if magic != MAGIC {
        // A guest that an earlier version booted has no such page.
        return;
    }
    // An odd sequence says that the page is being changed, should a process of the guest map it.
    let sequence: u32 = page.load(SEQUENCE, Ordering::Relaxed).unwrap_or(0) & !1;
    let _ = page.store(sequence.wrapping_add(1), SEQUENCE, Ordering::Relaxed);
    // The markers must not become visible before the odd sequence, nor the even one before the
    // markers: a reader takes what is between two equal even numbers.
    fence(Ordering::SeqCst);
    add(DISRUPTION);
    if is_other_copy {
        add(GENERATION);
    }
    fence(Ordering::SeqCst);
    let _ = page.store(sequence.wrapping_add(2), SEQUENCE, Ordering::Relaxed);
}

#[cfg(test)]
mod tests {
    use memory::{CommitError, RamConfig, RamSlice, SpaceKind, Topology};

    use super::*;

    fn u64_at(ram: &RamBlock, at: u64) -> u64 {
        let at = usize::try_from(at).unwrap();
        ram.slice(at, 8).unwrap().read_obj(0).unwrap()
    }

    fn markers(ram: &RamBlock) -> (u64, u64, u64) {
        let field = |at: usize| u64_at(ram, layout::VMCLOCK + at as u64);
        (
            field(DISRUPTION),
            field(GENERATION),
            field(SEQUENCE - 4) >> 32,
        )
    }

    fn id(ram: &RamBlock) -> [u64; 2] {
        [
            u64_at(ram, layout::VMGENID),
            u64_at(ram, layout::VMGENID + 8),
        ]
    }

    #[test]
    fn restored_and_moved_guests_find_their_changes() {
        let ram = RamBlock::new(&RamConfig::anonymous(2 << 20)).unwrap();
        let ram = std::sync::Arc::new(ram);
        let mut topology = Topology::new();
        topology
            .transaction(|tx| {
                let whole = RamSlice {
                    block: std::sync::Arc::clone(&ram),
                    offset: 0,
                };
                let region = tx.ram("ram", whole, ram.len() as u64).unwrap();
                tx.map(SpaceKind::Memory, 0, region, 0).unwrap();
                Ok::<_, CommitError>(())
            })
            .unwrap();
        let view = topology.space(SpaceKind::Memory).view();
        write(&view).unwrap();
        let (first, (_, generation, _)) = (id(&ram), markers(&ram));
        assert_ne!(first, [0, 0]);
        assert_eq!(u64_at(&ram, layout::VMCLOCK), 0x1000_4b4c_4356);
        disrupt(&ram);
        assert_eq!((id(&ram), markers(&ram)), (first, (1, generation, 2)));
        renew(&ram);
        assert_ne!(id(&ram), first);
        assert_eq!(markers(&ram), (2, generation + 1, 4));
        ram.slice(0, ram.len())
            .unwrap()
            .copy_from(&vec![0_u8; ram.len()]);
        renew(&ram);
        assert_eq!(markers(&ram), (0, 0, 0), "a guest without the page");
    }
}
