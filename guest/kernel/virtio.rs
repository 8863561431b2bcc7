//! Virtio devices (virtio 1.3) on the first bus of each PCI segment: found, started, and their queues.
//! Everything is polled; no interrupt is wanted.

use core::ptr;
use core::sync::atomic::{
    AtomicU64,
    Ordering::{Relaxed, SeqCst},
    fence,
};

use crate::cpu;

const CONFIG_ADDRESS: u16 = 0xcf8;
const CONFIG_DATA: u16 = 0xcfc;
const VIRTIO_VENDOR: u32 = 0x1af4;
const FIRST_DEVICE: u32 = 0x1040;
/// The register of which the third byte is the header type, and the bit that says that the slot has
/// more functions than this.
const HEADER_TYPE: u8 = 0x0c;
const MULTI_FUNCTION: u32 = 1 << 7;

/// The address window for BARs: part of the PCI root's window, and inside the identity map.
const BARS: u64 = 0xc000_0000;
const BAR_SPACING: u64 = 0x10_0000;
/// An address in the window at which no BAR is by itself.
const ELSEWHERE: u64 = BARS + 256 * BAR_SPACING;

/// Behind those, windows for the BARs of other segments, of which function 0 of each slot is used.
const SEGMENT_BARS: u64 = BARS + 512 * BAR_SPACING;
const SEGMENT_SPACING: u64 = 32 * BAR_SPACING;

/// Addresses of the configuration space (ECAM) of segments 1 to 4; 0 where there is no such segment.
static SEGMENTS: [AtomicU64; 4] = [const { AtomicU64::new(0) }; 4];

/// Notes where a segment's configuration space is. Segment 0 is reached by ports.
pub fn add_segment(segment: u16, ecam: u64) {
    let index = usize::from(segment).checked_sub(1);
    if let Some(place) = index.and_then(|index| SEGMENTS.get(index)) {
        place.store(ecam, Relaxed);
    }
}

const STATUS_ACKNOWLEDGE: u8 = 1;
const STATUS_DRIVER: u8 = 2;
const STATUS_DRIVER_OK: u8 = 4;
const STATUS_FEATURES_OK: u8 = 8;
const STATUS_NEEDS_RESET: u8 = 64;
const F_VERSION_1_HIGH: u32 = 1;

/// Entries of each queue, or fewer if the device has fewer: so few that its rings fit in one page.
const SIZE: u16 = 16;
/// Descriptors that belong to each chain.
const PER_CHAIN: u16 = 4;
/// Chains that can be with the device at a time.
pub const CHAINS: u16 = SIZE / PER_CHAIN;
const AVAILABLE: u64 = 0x200;
const USED: u64 = 0x400;

/// The address of a PCI function: segment, device and function number.
#[derive(Clone, Copy)]
struct Place {
    segment: u16,
    /// Address of the segment's configuration space; `None` if it is reached by ports.
    ecam: Option<u64>,
    slot: u8,
    function: u8,
}

impl Place {
    fn devfn(self) -> u32 {
        u32::from(self.slot) << 3 | u32::from(self.function)
    }

    fn read(self, at: u8) -> u32 {
        if let Some(ecam) = self.ecam {
            return read(ecam + u64::from(self.devfn() << 12) + u64::from(at & 0xfc));
        }
        cpu::out32(
            CONFIG_ADDRESS,
            1 << 31 | self.devfn() << 8 | u32::from(at & 0xfc),
        );
        cpu::in32(CONFIG_DATA)
    }

    fn write(self, at: u8, value: u32) {
        if let Some(ecam) = self.ecam {
            return write(ecam + u64::from(self.devfn() << 12) + u64::from(at & 0xfc), value);
        }
        // Sets the address port: the data port means that register from then on.
        self.read(at);
        cpu::out32(CONFIG_DATA, value);
    }

    /// Moves the first BAR, of 64 bits, to where it can be reached, and returns its address.
    fn map_bar(self) -> u64 {
        let bar = match self.segment.checked_sub(1) {
            None => BARS + u64::from(self.devfn()) * BAR_SPACING,
            Some(index) => {
                let window = SEGMENT_BARS + u64::from(index) * SEGMENT_SPACING;
                window + u64::from(self.slot) * BAR_SPACING
            }
        };
        // Decoding off while both halves of the address change: in between the BAR would be
        // somewhere else.
        self.write(4, 0);
        self.write(0x10, bar as u32);
        self.write(0x14, (bar >> 32) as u32);
        // Memory space and bus mastering.
        self.write(4, 6);
        bar
    }
}

/// All virtio devices of the bus.
pub fn devices() -> impl Iterator<Item = Device> {
    places().filter_map(Device::find)
}

/// Writes a panic to each pvpanic device (QEMU, docs/specs/pvpanic) that takes it: a byte in BAR 0.
pub fn report_panic() {
    const PVPANIC: u32 = 0x0011_1b36;
    const PANICKED: u8 = 1;
    for place in places().filter(|place| place.read(0) == PVPANIC) {
        let register = place.map_bar();
        if read::<u8>(register) & PANICKED != 0 {
            write(register, PANICKED);
        }
    }
}

/// All places at which a function may be. Behind function 0 others are looked for where it says that
/// there are some (PCI Local Bus 3.0, 6.2.1).
fn places() -> impl Iterator<Item = Place> {
    let others = (1..).zip(&SEGMENTS).flat_map(|(segment, ecam)| {
        let ecam = Some(ecam.load(Relaxed)).filter(|ecam| *ecam != 0);
        let slots = 1..ecam.map_or(1, |_| 32);
        slots.map(move |slot| Place {
            segment,
            ecam,
            slot,
            function: 0,
        })
    });
    let first = (1..32).flat_map(|slot| {
        let first = Place {
            segment: 0,
            ecam: None,
            slot,
            function: 0,
        };
        let is_there = first.read(0) & 0xffff != 0xffff;
        let count = match is_there && first.read(HEADER_TYPE) >> 16 & MULTI_FUNCTION != 0 {
            true => 8,
            false => 1,
        };
        (0..count).map(move |function| Place { function, ..first })
    });
    first.chain(others)
}

/// Reads a register or a word that a device writes.
pub fn read<T: Copy>(addr: u64) -> T {
    // SAFETY: the address is of a device's registers, or of memory that is given to devices alone;
    // T is a plain integer.
    unsafe { ptr::with_exposed_provenance::<T>(addr as usize).read_volatile() }
}

/// Writes a register or a word that a device reads.
pub fn write<T: Copy>(addr: u64, value: T) {
    // SAFETY: as for `read`.
    unsafe { ptr::with_exposed_provenance_mut::<T>(addr as usize).write_volatile(value) }
}

/// A device that was found.
#[derive(Clone, Copy)]
pub struct Device {
    /// Returns the virtio device ID (virtio 1.3, section 5).
    pub kind: u32,
    common: u64,
    notify: u64,
    notify_multiplier: u32,
    /// Its configuration space.
    pub config: u64,
    place: Place,
    /// The offset of the MSI-X capability.
    msix: Option<u8>,
    bar: u64,
}

impl Device {
    /// The device at a place, if there is one. Its BAR is moved to where it can be reached.
    fn find(place: Place) -> Option<Self> {
        let id = place.read(0);
        let kind = (id >> 16).checked_sub(FIRST_DEVICE)?;
        if id & 0xffff != VIRTIO_VENDOR || kind > 63 {
            return None;
        }
        let bar = place.map_bar();
        let mut device = Self {
            kind,
            common: 0,
            notify: 0,
            notify_multiplier: 0,
            config: 0,
            place,
            msix: None,
            bar,
        };
        let mut at = (place.read(0x34) & 0xfc) as u8;
        // As many as fit in configuration space.
        for _ in 0..48 {
            if at == 0 {
                break;
            }
            let head = place.read(at);
            if head & 0xff == 9 {
                let structure = bar + u64::from(place.read(at + 8));
                match head >> 24 {
                    1 => device.common = structure,
                    2 => {
                        device.notify = structure;
                        device.notify_multiplier = place.read(at + 16);
                    }
                    4 => device.config = structure,
                    _ => {}
                }
            }
            if head & 0xff == 0x11 {
                device.msix = Some(at);
            }
            at = (head >> 8 & 0xfc) as u8;
        }
        (device.common != 0 && device.notify != 0).then_some(device)
    }

    /// Resets it, and agrees on nothing but virtio 1.0. False if it does not.
    pub fn begin(&self) -> bool {
        self.begin_with(0)
    }

    /// Resets it, and agrees on virtio 1.0 and these of the features 0 to 31. False if it does not.
    pub fn begin_with(&self, features: u32) -> bool {
        write::<u8>(self.common + 20, 0);
        // 4.1.4.3.2: the driver must wait until the status reads 0.
        while read::<u8>(self.common + 20) != 0 {}
        let mut status = STATUS_ACKNOWLEDGE | STATUS_DRIVER;
        write(self.common + 20, status);
        for (half, bits) in [(0_u32, features), (1, F_VERSION_1_HIGH)] {
            write(self.common + 8, half);
            write(self.common + 12, bits);
        }
        status |= STATUS_FEATURES_OK;
        write(self.common + 20, status);
        // 3.1.1: read back, since the device may refuse the features by clearing the bit.
        read::<u8>(self.common + 20) & STATUS_FEATURES_OK != 0
    }

    /// A queue, in a page that is the device's from now on.
    pub fn queue(&self, index: u16, page: u64) -> Queue {
        for offset in (0..4096).step_by(8) {
            write::<u64>(page + offset, 0);
        }
        // The driver wants no interrupts.
        write::<u16>(page + AVAILABLE, 1);
        write(self.common + 22, index);
        let size = SIZE.min(read(self.common + 24));
        let doorbell = self.enable(index, size, [page, page + AVAILABLE, page + USED]);
        Queue {
            index,
            size,
            page,
            doorbell,
            available: 0,
            used: 0,
        }
    }

    /// Enables a queue whose descriptors, available ring and used ring are at these addresses, and
    /// returns the address of its doorbell.
    pub fn enable(&self, index: u16, size: u16, rings: [u64; 3]) -> u64 {
        let common = self.common;
        write(common + 22, index);
        write(common + 24, size);
        // 4.1.3.1 allows 64-bit fields to be written in halves.
        for (register, ring) in [32, 40, 48].into_iter().zip(rings) {
            write(common + register, ring as u32);
            write(common + register + 4, (ring >> 32) as u32);
        }
        write::<u16>(common + 28, 1);
        let doorbell = u64::from(read::<u16>(common + 30)) * u64::from(self.notify_multiplier);
        self.notify + doorbell
    }

    /// Enables a queue once more, where it is.
    pub fn enable_again(&self, index: u16) {
        write(self.common + 22, index);
        write::<u16>(self.common + 28, 1);
    }

    /// Whether the device wants to be reset (virtio 1.3, 2.1.2).
    pub fn needs_reset(&self) -> bool {
        read::<u8>(self.common + 20) & STATUS_NEEDS_RESET != 0
    }

    /// Takes the BAR out of the map, shows it elsewhere, resets the device there, and puts it back.
    pub fn move_about(&self) {
        let at = |bar: u64| {
            self.place.write(4, 0);
            self.place.write(0x10, bar as u32);
            self.place.write(0x14, (bar >> 32) as u32);
            self.place.write(4, 6);
        };
        let elsewhere = ELSEWHERE - self.bar;
        at(self.bar + elsewhere);
        write::<u8>(self.common + elsewhere + 20, 0);
        if let Some(msix) = self.msix {
            // Enable and function mask, on and off.
            let control = self.place.read(msix);
            self.place.write(msix, control ^ 3 << 30);
            self.place.write(msix, control);
        }
        at(self.bar);
    }

    /// How many queues it has.
    pub fn queues(&self) -> u16 {
        read(self.common + 18)
    }

    /// Has all its interrupts sent to the first CPU (PCI Local Bus 3.0, 6.8.2).
    pub fn interrupt(&self) {
        let Some(at) = self.msix else { return };
        let control = self.place.read(at);
        let table = self.bar + u64::from(self.place.read(at + 4) & !7);
        for entry in 0..=u64::from(control >> 16 & 0x7ff) {
            let entry = table + 16 * entry;
            write::<u32>(entry, 0xfee0_0000);
            write::<u32>(entry + 4, 0);
            write::<u32>(entry + 8, cpu::VECTOR.into());
            write::<u32>(entry + 12, 0);
        }
        self.place.write(at, control | 1 << 31);
    }

    /// Gives a queue the interrupt behind the one for changes.
    pub fn interrupt_for(&self, queue: u16) {
        write(self.common + 22, queue);
        write(self.common + 26, queue + 1);
    }

    /// Sets DRIVER_OK: the device may use its queues.
    pub fn go(&self) {
        let status = read::<u8>(self.common + 20);
        write(self.common + 20, status | STATUS_DRIVER_OK);
    }
}

/// A buffer: address, length, and whether the device writes it.
pub type Buffer = (u64, u32, bool);

/// A queue with [`CHAINS`] chains of up to four buffers.
pub struct Queue {
    index: u16,
    size: u16,
    page: u64,
    doorbell: u64,
    available: u16,
    used: u16,
}

impl Queue {
    /// Gives the device a chain, which must not be with it.
    pub fn send(&mut self, chain: u16, buffers: &[Buffer]) {
        let head = chain * PER_CHAIN;
        let last = buffers.len().saturating_sub(1);
        for ((index, (addr, len, writable)), place) in
            buffers.iter().enumerate().zip(head..head + PER_CHAIN)
        {
            let flags = u16::from(index != last) | u16::from(*writable) << 1;
            let at = self.page + 16 * u64::from(place);
            write(at, *addr);
            write(at + 8, *len);
            write(at + 12, flags);
            write(at + 14, place + 1);
        }
        let slot = u64::from(self.available % self.size);
        write(self.page + AVAILABLE + 4 + 2 * slot, head);
        self.available = self.available.wrapping_add(1);
        // Entry and descriptors before the index (2.7.13.3); then the index before the doorbell.
        fence(SeqCst);
        write(self.page + AVAILABLE + 2, self.available);
        fence(SeqCst);
        write(self.doorbell, self.index);
    }

    /// A chain that the device is done with, and how many bytes it wrote.
    pub fn done(&mut self) -> Option<(u16, u32)> {
        if read::<u16>(self.page + USED + 2) == self.used {
            return None;
        }
        fence(SeqCst);
        // The fence keeps this read behind that of the index: the entry may be older otherwise
        // (2.7.14).
        let at = self.page + USED + 4 + 8 * u64::from(self.used % self.size);
        self.used = self.used.wrapping_add(1);
        Some((read::<u32>(at) as u16 / PER_CHAIN, read(at + 4)))
    }
}
