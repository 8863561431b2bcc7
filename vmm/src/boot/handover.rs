//! Boot information for a kernel: PVH's start info, or Linux's zero page.

use memory::{AddrRange, FlatView};
use vm_memory::{Bytes, GuestAddress};

use super::{BootError, Placed};
use crate::arch::x86_64::layout::{self, Layout};

/// The boot information.
pub(super) struct Facts<'a> {
    pub(super) layout: &'a Layout,
    pub(super) initramfs: Option<Placed>,
    pub(super) cmdline_len: usize,
}

const RAM: u32 = 1;
const RESERVED: u32 = 2;

/// The memory map as firmware would tell it: ranges and what they are.
fn memory_map(layout: &Layout) -> Vec<(AddrRange, u32)> {
    let mut map = Vec::new();
    let mut add = |first: u64, end: u64, kind| {
        map.extend(
            end.checked_sub(1)
                .and_then(|last| AddrRange::from_bounds(first, last))
                .map(|r| (r, kind)),
        );
    };
    // The gaps matter: what is not listed is no RAM. The tables below 1 MiB are reserved, so that
    // no kernel takes them for free memory before it has read them.
    add(0, layout::LOW_MEMORY_END, RAM);
    add(layout::VMGENID, layout::SMBIOS_END, RESERVED);
    add(layout::HIGH_MEMORY, layout.low_ram_end(), RAM);
    add(layout::ECAM, layout.ecam_end(), RESERVED);
    map.extend(layout.ram().into_iter().skip(1).map(|range| (range, RAM)));
    map
}

/// A structure that is written field by field, little endian.
struct Writer<'a> {
    memory: &'a FlatView,
    at: u64,
}

impl Writer<'_> {
    fn put<const N: usize>(&mut self, bytes: [u8; N]) -> Result<(), BootError> {
        self.memory.write_slice(&bytes, GuestAddress(self.at))?;
        self.at += N as u64;
        Ok(())
    }

    fn u32(&mut self, value: u32) -> Result<(), BootError> {
        self.put(value.to_le_bytes())
    }

    fn u64(&mut self, value: u64) -> Result<(), BootError> {
        self.put(value.to_le_bytes())
    }
}

/// Writes `hvm_start_info` of Xen's public headers (arch-x86/hvm/start_info.h, version 1), and
/// says where.
pub(super) fn write_start_info(memory: &FlatView, facts: &Facts<'_>) -> Result<u64, BootError> {
    const MAGIC: u32 = 0x336e_c578;
    const MODULES: u64 = layout::BOOT_INFO + 0x100;
    // Each part has room for what is written: 0x100 bytes for the one module, and the map's few
    // entries below the zero page.
    const MAP: u64 = layout::BOOT_INFO + 0x200;
    let map = memory_map(facts.layout);
    let mut info = Writer {
        memory,
        at: layout::BOOT_INFO,
    };
    info.u32(MAGIC)?;
    info.u32(1)?;
    info.u32(0)?;
    info.u32(u32::from(facts.initramfs.is_some()))?;
    info.u64(if facts.initramfs.is_some() {
        MODULES
    } else {
        0
    })?;
    info.u64(layout::CMDLINE)?;
    info.u64(layout::ACPI)?;
    info.u64(MAP)?;
    info.u32(u32::try_from(map.len()).unwrap_or(0))?;
    info.u32(0)?;
    if let Some((at, size)) = facts.initramfs {
        let mut module = Writer {
            memory,
            at: MODULES,
        };
        [at, size, 0, 0]
            .into_iter()
            .try_for_each(|field| module.u64(field))?;
    }
    let mut entries = Writer { memory, at: MAP };
    for (range, kind) in map {
        entries.u64(range.first())?;
        entries.u64(range.len().unwrap_or(0))?;
        entries.u32(kind)?;
        entries.u32(0)?;
    }
    Ok(layout::BOOT_INFO)
}

/// Writes the zero page (Documentation/arch/x86/zero-page.rst), and says where.
pub(super) fn write_zero_page(memory: &FlatView, facts: &Facts<'_>) -> Result<u64, BootError> {
    const ACPI_RSDP: u64 = 0x070;
    const E820_ENTRIES: u64 = 0x1e8;
    const BOOT_FLAG: u64 = 0x1fe;
    const MAGIC: u64 = 0x202;
    const VERSION: u64 = 0x206;
    const TYPE_OF_LOADER: u64 = 0x210;
    const LOADFLAGS: u64 = 0x211;
    const RAMDISK_IMAGE: u64 = 0x218;
    const RAMDISK_SIZE: u64 = 0x21c;
    const CMD_LINE_PTR: u64 = 0x228;
    const CMDLINE_SIZE: u64 = 0x238;
    const E820_TABLE: u64 = 0x2d0;
    /// A loader without a number of its own.
    const UNKNOWN_LOADER: u8 = 0xff;
    const LOADED_HIGH: u8 = 1;

    let put =
        |at: u64, bytes: &[u8]| memory.write_slice(bytes, GuestAddress(layout::ZERO_PAGE + at));
    let word = |value: u64| u32::try_from(value).unwrap_or(0).to_le_bytes();
    // Fields that are not set must be zero (boot.rst, "64-bit boot protocol").
    put(0, &[0; 4096])?;
    put(ACPI_RSDP, &layout::ACPI.to_le_bytes())?;
    put(BOOT_FLAG, &[0x55, 0xaa])?;
    put(MAGIC, b"HdrS")?;
    // The header is the loader's to fill, since the kernel's own is in the bzImage and was not
    // loaded: boot protocol 2.15.
    put(VERSION, &0x020f_u16.to_le_bytes())?;
    put(TYPE_OF_LOADER, &[UNKNOWN_LOADER])?;
    put(LOADFLAGS, &[LOADED_HIGH])?;
    put(CMD_LINE_PTR, &word(layout::CMDLINE))?;
    put(CMDLINE_SIZE, &word(facts.cmdline_len as u64))?;
    if let Some((at, size)) = facts.initramfs {
        put(RAMDISK_IMAGE, &word(at))?;
        put(RAMDISK_SIZE, &word(size))?;
    }
    let map = memory_map(facts.layout);
    put(E820_ENTRIES, &[u8::try_from(map.len()).unwrap_or(0)])?;
    for (at, (range, kind)) in (E820_TABLE..).step_by(20).zip(map) {
        put(at, &range.first().to_le_bytes())?;
        put(at + 8, &range.len().unwrap_or(0).to_le_bytes())?;
        put(at + 16, &kind.to_le_bytes())?;
    }
    Ok(layout::ZERO_PAGE)
}
