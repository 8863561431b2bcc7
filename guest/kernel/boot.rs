//! The boot information from the VMM (Xen's `hvm_start_info`, public/arch-x86/hvm/start_info.h), and which
//! RAM is free. The VMM is trusted as firmware is; all the same each pointer is checked.

use core::ptr;
use core::sync::atomic::{AtomicU64, Ordering::Relaxed};

use crate::pattern::PAGE_SIZE;

const MAGIC: u32 = 0x336e_c578;
const TYPE_RAM: u32 = 1;
const GIB: u64 = 1 << 30;
const MIB: u64 = 1 << 20;
const RANGES: usize = 16;

/// Page tables map this much: 512 directories.
pub const MAP_LIMIT: u64 = 512 * GIB;

/// The end of the identity map, which starts at 0 and has no holes.
static MAPPED: AtomicU64 = AtomicU64::new(GIB);

/// Reads from physical memory, if it is mapped.
pub fn read<T: Copy>(addr: u64) -> Option<T> {
    let end = addr.checked_add(size_of::<T>() as u64)?;
    if addr == 0 || end > MAPPED.load(Relaxed) {
        return None;
    }
    // SAFETY: mapped, and T is a plain integer or an array of them (a private promise).
    Some(unsafe { ptr::with_exposed_provenance::<T>(addr as usize).read_unaligned() })
}

#[derive(Clone, Copy, Default)]
struct Range {
    start: u64,
    end: u64,
}

/// RAM: all of it is counted; what is above the kernel is free.
pub struct Ram {
    pub total: u64,
    free: [Range; RANGES],
    count: usize,
}

unsafe extern "C" {
    static image_start: u8;
    static image_end: u8;
    static mut page_directories: [u64; 512];
}

/// The command line (cut off where it is too long), the RAM, and where the RSDP is.
pub struct Handover {
    pub cmdline: [u8; 2048],
    pub cmdline_len: usize,
    pub ram: Ram,
    pub rsdp: u64,
}

impl Handover {
    pub fn read(start_info: u64) -> Self {
        // `read` refuses what is not mapped, so a VMM that hands over nonsense gives a guest
        // without memory and not one that faults before it can print.
        let field = |offset: u64| read::<u64>(start_info + offset).unwrap_or(0);
        let is_valid = read(start_info) == Some(MAGIC);
        let cmdline_addr = if is_valid { field(24) } else { 0 };
        let mut cmdline = [0; 2048];
        let mut cmdline_len = 0;
        while let Some(byte) = read::<u8>(cmdline_addr.saturating_add(cmdline_len as u64)) {
            if byte == 0 || cmdline_addr == 0 || cmdline_len == cmdline.len() {
                break;
            }
            cmdline[cmdline_len] = byte;
            cmdline_len += 1;
        }
        let entries = if is_valid {
            read::<u32>(start_info + 48).unwrap_or(0)
        } else {
            0
        };
        let ram = Ram::read(field(40), entries.min(256));
        let rsdp = if is_valid { field(32) } else { 0 };
        Self {
            cmdline,
            cmdline_len,
            ram,
            rsdp,
        }
    }

    pub fn cmdline(&self) -> &str {
        // A word in another encoding is none of ours; what is before it may be.
        let bytes = self.cmdline.get(..self.cmdline_len).unwrap_or_default();
        core::str::from_utf8(bytes).unwrap_or_else(|error| {
            core::str::from_utf8(&bytes[..error.valid_up_to()]).unwrap_or_default()
        })
    }
}

impl Ram {
    fn read(map: u64, entries: u32) -> Self {
        let mut ram = Self {
            total: 0,
            free: [Range::default(); RANGES],
            count: 0,
        };
        let image = (&raw const image_start as u64, &raw const image_end as u64);
        let mut highest = 0;
        for entry in 0..u64::from(entries) {
            let at = map + 24 * entry;
            let (Some(start), Some(size), Some(TYPE_RAM)) =
                (read::<u64>(at), read::<u64>(at + 8), read::<u32>(at + 16))
            else {
                continue;
            };
            let end = start.saturating_add(size).min(MAP_LIMIT);
            if start >= end {
                continue;
            }
            ram.total += end - start;
            highest = highest.max(end);
            // Below the kernel is what the VMM handed over; it stays as it is.
            let start = if end > image.1 {
                start.max(image.1)
            } else {
                end
            };
            ram.add(
                start.next_multiple_of(PAGE_SIZE as u64),
                end & !(PAGE_SIZE as u64 - 1),
            );
        }
        ram.map_up_to(highest);
        ram
    }

    fn add(&mut self, start: u64, end: u64) {
        if start < end
            && let Some(range) = self.free.get_mut(self.count)
        {
            *range = Range { start, end };
            self.count += 1;
        }
    }

    /// Extends the identity map: all below 4 GiB, and above as far as there is RAM, with room for
    /// what is plugged later.
    fn map_up_to(&mut self, highest: u64) {
        let end = highest.max(4 * GIB).div_ceil(GIB).saturating_add(1).min(512);
        // entry.s has mapped the first GiB, and the fourth without caching for MMIO.
        for gib in (1..3).chain(4..end) {
            // From the first GiB: only that is mapped when the first tables are written.
            let Some(directory) = self.take(PAGE_SIZE as u64, GIB) else {
                return;
            };
            for (entry, address) in (gib * GIB..)
                .step_by(2 * MIB as usize)
                .take(512)
                .enumerate()
            {
                // SAFETY: a free page of mapped RAM, that is ours now.
                unsafe {
                    ptr::with_exposed_provenance_mut::<u64>(directory as usize)
                        .add(entry)
                        .write(address | 0xe7);
                }
            }
            // SAFETY: only this CPU runs, and the entry was not present.
            unsafe {
                (&raw mut page_directories)
                    .cast::<u64>()
                    .add(gib as usize)
                    .write_volatile(directory | 0x67);
            }
            // The fourth GiB is there already: the map has no holes once the third is in.
            MAPPED.store(if gib == 2 { 4 * GIB } else { (gib + 1) * GIB }, Relaxed);
        }
    }

    /// Takes `size` bytes, aligned to `size`, that end below `limit`.
    pub fn take(&mut self, size: u64, limit: u64) -> Option<u64> {
        let free = &mut self.free[..self.count];
        free.iter_mut().find_map(|range| {
            let start = range.start.next_multiple_of(size);
            let end = start.checked_add(size)?;
            if end > range.end.min(limit) {
                return None;
            }
            range.start = end;
            Some(start)
        })
    }

    /// Free pages.
    pub fn pages(&self) -> u64 {
        let pages = self.free[..self.count]
            .iter()
            .map(|range| range.end - range.start);
        pages.sum::<u64>() / PAGE_SIZE as u64
    }

    /// The address of a free page.
    pub fn page(&self, index: u64) -> u64 {
        let mut offset = index * PAGE_SIZE as u64;
        for range in &self.free[..self.count] {
            if offset < range.end - range.start {
                return range.start + offset;
            }
            offset -= range.end - range.start;
        }
        panic!("no free page has this index")
    }
}
