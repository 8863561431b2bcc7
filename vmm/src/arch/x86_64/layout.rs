//! The layout of a guest's physical memory.
//!
//! ```text
//!   0          ┌─────────────────────────────┐
//!              │ RAM (all of it, if it fits) │  boot structures below 640 KiB, ACPI tables at
//!   3 GiB      ├─────────────────────────────┤  0xe0000, SMBIOS at 0xf0000, the kernel from 1 MiB on
//!              │ PCI window, 32-bit          │
//!   0xe8000000 │ ECAM, one bus a segment     │
//!   0xfec00000 │ I/O APIC, local APICs, KVM  │
//!   4 GiB      ├─────────────────────────────┤
//!              │ the rest of RAM             │
//!              ├─────────────────────────────┤
//!              │ room for hotplugged memory  │  of each zone, from the next GiB up
//!              ├─────────────────────────────┤
//!              │ PCI window, 64-bit          │  from the next GiB up, to the last address bit
//!              └─────────────────────────────┘
//! ```
//!
//! The zones of a VM's memory follow each other without gaps, but for the one below 4 GiB, on both sides
//! of which a zone may have a part.

use devices::pci::ECAM_BUS_LEN;
use memory::AddrRange;

const GIB: u64 = 1 << 30;

/// Maximum end of RAM below 4 GiB.
pub(crate) const LOW_RAM_END: u64 = 3 * GIB;
/// PCI Express configuration space, one bus for each segment.
pub(crate) const ECAM: u64 = 0xe800_0000;
/// The end of the 32-bit PCI window.
const PCI32_END: u64 = ECAM;
/// The I/O APIC.
pub(crate) const IO_APIC: u32 = 0xfec0_0000;
/// The TPM, where PC software looks for it.
pub(crate) const TPM: u64 = 0xfed4_0000;
/// The local APICs.
pub(crate) const LOCAL_APIC: u32 = 0xfee0_0000;

/// Boot structures.
pub(crate) const GDT: u64 = 0x500;
pub(crate) const BOOT_INFO: u64 = 0x6000;
pub(crate) const ZERO_PAGE: u64 = 0x7000;
pub(crate) const PAGE_TABLES: u64 = 0x9000;
pub(crate) const CMDLINE: u64 = 0x2_0000;
/// The end of memory that a PC's software takes for its own below 1 MiB.
pub(crate) const LOW_MEMORY_END: u64 = 0xa_0000;
/// The page of the VM generation ID.
pub(crate) const VMGENID: u64 = 0xd_e000;
/// The page of the VMClock. Alone in its page, since a process of the guest may map it.
pub(crate) const VMCLOCK: u64 = 0xd_f000;
/// ACPI tables: the RSDP first, where a PC's software looks for it.
pub(crate) const ACPI: u64 = 0xe_0000;
pub(crate) const ACPI_END: u64 = SMBIOS;
/// SMBIOS tables: the entry point first. EDK2 for Cloud Hypervisor looks for it at this address only.
pub(crate) const SMBIOS: u64 = 0xf_0000;
pub(crate) const SMBIOS_END: u64 = 0x10_0000;
/// Load address of kernels.
pub(crate) const HIGH_MEMORY: u64 = 0x10_0000;

/// Interrupts: pins of the I/O APIC.
pub(crate) const SERIAL_IRQ: u32 = 4;
pub(crate) const GED_IRQ: u32 = 5;

/// Ports.
pub(crate) const SERIAL_PORT: u16 = 0x3f8;
pub(crate) const KEYBOARD_PORT: u16 = 0x64;
pub(crate) const DEBUG_PORT: u16 = 0x80;
pub(crate) const RTC_PORT: u16 = 0x70;
pub(crate) const POWER_PORT: u16 = 0x600;
/// The port at which EDK2 expects the timer of a Cloud Hypervisor guest.
pub(crate) const PM_TIMER_PORT: u16 = 0x608;
pub(crate) const HOTPLUG_PORT: u16 = 0x620;
pub(crate) const CPUS_PORT: u16 = 0x640;
pub(crate) const DIMMS_PORT: u16 = 0x670;
pub(crate) const PCI_PORT: u16 = 0xcf8;

/// The least memory with which a machine can be built: what is below 1 MiB, and a MiB for a
/// kernel.
const MIN_RAM: u64 = 2 << 20;

/// Returns the address of a segment's part of the ECAM.
pub(crate) fn ecam(segment: u16) -> u64 {
    ECAM + u64::from(segment) * ECAM_BUS_LEN
}

// All segments are below the I/O APIC.
const _: () = assert!(ECAM + spec::limits::PCI_SEGMENTS as u64 * ECAM_BUS_LEN <= IO_APIC as u64);

/// A PCI segment's part of the PCI windows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Apertures {
    pub(crate) pci32: AddrRange,
    pub(crate) pci64: AddrRange,
}

/// Bytes of a memory zone: those that the guest boots with, and those that can be added.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct ZoneSize {
    pub(crate) boot: u64,
    pub(crate) room: u64,
}

/// Addresses of a memory zone.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct ZonePlace {
    /// RAM, ascending; the block's bytes in order.
    pub(crate) ram: Vec<AddrRange>,
    /// Room for memory that the guest gets later.
    pub(crate) hotplug: Option<AddrRange>,
}

/// Addresses of a machine's RAM and PCI windows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Layout {
    /// The zones of memory, at least one, in their order.
    pub(crate) zones: Vec<ZonePlace>,
    /// The PCI windows, divided among segments: those below 4 GiB, and those above, are contiguous.
    pub(crate) segments: Vec<Apertures>,
}

/// Memory that cannot be laid out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum LayoutError {
    #[error(
        "the memory, or its first zone, ({0} bytes) is less than a machine needs, {MIN_RAM} bytes"
    )]
    TooSmall(u64),
    #[error(
        "the memory ({size} bytes, with what can be added) does not fit the guest's {bits} physical \
         address bits"
    )]
    TooLarge { size: u64, bits: u8 },
    #[error(
        "PCI segment {0} gets less than 1 MiB of the PCI windows: raise its aperture weights, or lower \
         those of the others"
    )]
    NoAperture(usize),
}

impl Layout {
    /// Lays out memory of these zones, of which there is at least one, for CPUs with `bits` physical
    /// address bits.
    pub(crate) fn new(sizes: &[ZoneSize], bits: u8) -> Result<Self, LayoutError> {
        let all = sizes.iter().flat_map(|zone| [zone.boot, zone.room]);
        let too_large = LayoutError::TooLarge {
            size: all.fold(0, u64::saturating_add),
            bits,
        };
        // The first zone has all that is at fixed addresses below 1 MiB.
        let first = sizes.first().map_or(0, |zone| zone.boot);
        if first < MIN_RAM {
            return Err(LayoutError::TooSmall(first));
        }
        let mut end = 0;
        let ram = sizes.iter().map(|zone| place(zone.boot, &mut end));
        let ram: Option<Vec<_>> = ram.collect();
        let ram = ram.ok_or(too_large)?;
        let mut end = end.max(4 * GIB);
        let mut zones = Vec::new();
        for (zone, ram) in sizes.iter().zip(ram) {
            let mut hotplug = None;
            if zone.room > 0 {
                // Alignment for huge pages of any size, and for the guest's memory sections.
                let start = end.checked_next_multiple_of(GIB).ok_or(too_large)?;
                hotplug = AddrRange::new(start, zone.room);
                end = start.checked_add(zone.room).ok_or(too_large)?;
            }
            zones.push(ZonePlace { ram, hotplug });
        }
        // The window takes all that is left: devices with large BARs fit without a setting.
        // Addresses past the last bit do not exist for the guest.
        let space_end = 1_u64.checked_shl(bits.into()).ok_or(too_large)?;
        let pci64_start = end.checked_next_multiple_of(GIB).ok_or(too_large)?;
        let pci64_end = space_end.checked_sub(1).ok_or(too_large)?;
        Ok(Self {
            zones,
            segments: vec![Apertures {
                // From the maximum end of RAM, however little the guest has: the window is the same in
                // each machine.
                pci32: AddrRange::from_bounds(LOW_RAM_END, PCI32_END - 1).ok_or(too_large)?,
                pci64: AddrRange::from_bounds(pci64_start, pci64_end).ok_or(too_large)?,
            }],
        })
    }

    /// Returns the RAM of all zones, ascending, in ranges as long as they can be.
    pub(crate) fn ram(&self) -> Vec<AddrRange> {
        let mut all: Vec<AddrRange> = Vec::new();
        for range in self.zones.iter().flat_map(|zone| &zone.ram) {
            match all.last_mut() {
                Some(before) if range.first().checked_sub(1) == Some(before.last()) => {
                    let joined = AddrRange::from_bounds(before.first(), range.last());
                    *before = joined.unwrap_or(*before);
                }
                _ => all.push(*range),
            }
        }
        all
    }

    /// Divides the PCI windows of the only segment among several by their weights, of which each has one
    /// below and one above 4 GiB.
    pub(crate) fn with_segments(mut self, weights: &[[u32; 2]]) -> Result<Self, LayoutError> {
        let [whole] = self.segments[..] else {
            return Ok(self);
        };
        let shares = |window: AddrRange, which: fn(&[u32; 2]) -> u32| {
            divide(window, &weights.iter().map(which).collect::<Vec<_>>())
        };
        let low = shares(whole.pci32, |[low, _]| *low);
        let high = shares(whole.pci64, |[_, high]| *high);
        let both = low.into_iter().zip(high).enumerate();
        let segments = both.map(|(segment, (pci32, pci64))| {
            let both = pci32.zip(pci64);
            let (pci32, pci64) = both.ok_or(LayoutError::NoAperture(segment))?;
            Ok(Apertures { pci32, pci64 })
        });
        self.segments = segments.collect::<Result<_, _>>()?;
        Ok(self)
    }

    /// The end of all segments' configuration space.
    pub(crate) fn ecam_end(&self) -> u64 {
        ECAM + self.segments.len() as u64 * ECAM_BUS_LEN
    }

    /// The end of RAM below 4 GiB.
    pub(crate) fn low_ram_end(&self) -> u64 {
        self.ram().first().map_or(0, |low| low.last() + 1)
    }
}

/// Places `size` bytes of RAM at the address `end`, on both sides of the gap below 4 GiB if need be, and
/// moves `end` behind them. `None` where they exceed the addresses.
fn place(size: u64, end: &mut u64) -> Option<Vec<AddrRange>> {
    // The gap below 4 GiB has what 32-bit software needs at fixed places: the PCI window, ECAM and
    // the APICs.
    let low = size.min(LOW_RAM_END.saturating_sub(*end));
    let mut ranges = Vec::new();
    ranges.extend(AddrRange::new(*end, low));
    *end = end.checked_add(low)?;
    let high = size - low;
    if high > 0 {
        *end = (*end).max(4 * GIB);
        ranges.extend(AddrRange::new(*end, high));
        *end = end.checked_add(high)?;
    }
    Some(ranges)
}

/// Divides a window in proportion to weights, at multiples of 1 MiB. `None` for a part without room.
fn divide(window: AddrRange, weights: &[u32]) -> Vec<Option<AddrRange>> {
    const UNIT: u64 = 1 << 20;
    let total: u128 = weights.iter().copied().map(u128::from).sum();
    let len = u128::from(window.last() - window.first()) + 1;
    // At most the window's length, which is below 2^64: it starts above 0.
    let edge = |sum: u128| {
        let part = (len * sum).checked_div(total).unwrap_or(0) as u64;
        window.first() + part / UNIT * UNIT
    };
    let mut sum = 0;
    let mut parts = Vec::new();
    for weight in weights {
        let first = edge(sum);
        sum += u128::from(*weight);
        let last = match sum == total {
            // The last segment takes what rounding has left over.
            true => window.last(),
            false => edge(sum) - 1,
        };
        parts.push(AddrRange::from_bounds(first, last).filter(|_| last - first >= UNIT - 1));
    }
    parts
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn one(boot: u64, room: u64) -> [ZoneSize; 1] {
        [ZoneSize { boot, room }]
    }

    proptest! {
        #[test]
        fn segments_divide_the_windows(
            bits in 36_u8..=52,
            weights in prop::collection::vec((1_u32..8, 1_u32..8), 1..97),
        ) {
            let layout = Layout::new(&one(1 << 30, 0), bits).unwrap();
            let weights: Vec<_> = weights.into_iter().map(|(low, high)| [low, high]).collect();
            let [whole] = layout.segments[..] else { panic!("several segments") };
            let parts = layout.with_segments(&weights).unwrap().segments;
            for (window, part) in [
                (whole.pci32, parts.iter().map(|part| part.pci32).collect::<Vec<_>>()),
                (whole.pci64, parts.iter().map(|part| part.pci64).collect()),
            ] {
                // Without gaps, from one end to the other.
                prop_assert_eq!(part[0].first(), window.first());
                prop_assert_eq!(part[part.len() - 1].last(), window.last());
                prop_assert!(part.windows(2).all(|two| two[0].last() + 1 == two[1].first()));
            }
        }

        #[test]
        fn a_segment_without_room_is_named(many in (1_u32 << 20)..) {
            let layout = Layout::new(&one(1 << 30, 0), 46).unwrap();
            let refused = layout.with_segments(&[[1, 1], [many, 1]]).unwrap_err();
            prop_assert_eq!(refused, LayoutError::NoAperture(0));
        }

        #[test]
        fn ram_ranges_are_complete_and_disjoint(
            zones in prop::collection::vec(
                (2_u64..(1 << 22), prop_oneof![Just(0_u64), 1_u64..(1 << 22)]),
                1..9,
            ),
            bits in 36_u8..=52,
        ) {
            let zones = zones.into_iter();
            let zones = zones.map(|(boot, room)| ZoneSize { boot: boot << 20, room: room << 20 });
            let zones: Vec<_> = zones.collect();
            let all: u64 = zones.iter().map(|zone| zone.boot + zone.room).sum();
            let Ok(layout) = Layout::new(&zones, bits) else {
                // A GiB for the alignment of each region, and of the window behind them.
                prop_assert!(all > (1 << bits) - (6 + zones.len() as u64) * GIB);
                return Ok(());
            };
            let len = |range: &AddrRange| range.len().unwrap();
            for (size, place) in zones.iter().zip(&layout.zones) {
                prop_assert_eq!(place.ram.iter().map(len).sum::<u64>(), size.boot);
                prop_assert_eq!(place.hotplug.iter().map(len).sum::<u64>(), size.room);
                prop_assert!(place.hotplug.is_none_or(|range| range.first() % GIB == 0));
            }
            // RAM has one gap at most, and all zones in their order.
            let ram: Vec<_> = layout.zones.iter().flat_map(|zone| zone.ram.clone()).collect();
            let boot: u64 = zones.iter().map(|zone| zone.boot).sum();
            let (low, high) = (boot.min(LOW_RAM_END), boot.saturating_sub(LOW_RAM_END));
            let whole = [AddrRange::new(0, low), AddrRange::new(4 * GIB, high)];
            prop_assert_eq!(layout.ram(), whole.into_iter().flatten().collect::<Vec<_>>());
            prop_assert!(ram.is_sorted());

            let mut all = ram;
            all.extend(layout.zones.iter().filter_map(|zone| zone.hotplug));
            let Apertures { pci32, pci64 } = layout.segments[0];
            all.extend([pci32, pci64, AddrRange::new(ECAM, 96 << 20).unwrap()]);
            all.extend(AddrRange::new(IO_APIC.into(), 0x1000));
            all.extend(AddrRange::new(LOCAL_APIC.into(), 0x1000));
            all.sort();
            prop_assert!(all.windows(2).all(|w| w[0].last() < w[1].first()), "{:?}", all);
            prop_assert!(all.last().unwrap().last() < 1 << bits);
        }
    }

    #[test]
    fn rejects_too_little_or_too_much_ram() {
        assert_eq!(
            Layout::new(&one(4096, 0), 40),
            Err(LayoutError::TooSmall(4096))
        );
        assert_eq!(
            Layout::new(&one(1 << 40, 0), 40),
            Err(LayoutError::TooLarge {
                size: 1 << 40,
                bits: 40
            })
        );
        for (size, room) in [
            (u64::MAX, 0),
            (GIB, u64::MAX),
            (u64::MAX, u64::MAX),
            (GIB, 1 << 52),
        ] {
            assert!(Layout::new(&one(size, room), 52).is_err());
            let two = [one(GIB, 0), one(size, room)].concat();
            assert!(Layout::new(&two, 52).is_err());
        }
    }
}
