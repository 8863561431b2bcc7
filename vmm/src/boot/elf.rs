//! Checks of an ELF kernel or firmware before any of it is loaded.
//!
//! The loader copies what the program headers say. The checks here make that safe: the file is for
//! this kind of CPU, it is complete, and its segments are in RAM above the tables below 1 MiB.

use std::io::{self, Read, Seek, SeekFrom};

use memory::AddrRange;

use crate::arch::x86_64::layout;

/// Addresses of a kernel's segments.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Segments {
    ranges: Vec<AddrRange>,
    /// The file says that its entry point is 32-bit code. Then only PVH's entry point can be used,
    /// as with EDK2's firmware for Cloud Hypervisor: a 64-bit ELF file whose header says i386.
    pub(super) is_i386: bool,
}

impl Segments {
    /// The first address after all segments.
    pub(super) fn end(&self) -> u64 {
        let last = self.ranges.iter().map(|segment| segment.last()).max();
        last.map_or(layout::HIGH_MEMORY, |last| last.saturating_add(1))
    }

    /// Whether a segment contains this address.
    pub(super) fn contain(&self, address: u64) -> bool {
        self.ranges.iter().any(|segment| segment.contains(address))
    }
}

/// Finds the segments of a kernel (System V ABI, chapters 4 and 5), all of which end at or below
/// `ram_end`.
pub(super) fn look_over<F: Read + Seek>(file: &mut F, ram_end: u64) -> Result<Segments, String> {
    const HEADER_LEN: usize = 64;
    const PROGRAM_HEADER_LEN: usize = 56;
    const CLASS: usize = 4;
    const MACHINE: usize = 18;
    const PROGRAM_HEADERS: usize = 32;
    const PROGRAM_HEADER_SIZE: usize = 54;
    const PROGRAM_HEADER_COUNT: usize = 56;
    const CLASS_64: u8 = 2;
    const I386: u16 = 3;
    const X86_64: u16 = 62;

    let len = file.seek(SeekFrom::End(0)).map_err(|error| said(&error))?;
    let header: [u8; HEADER_LEN] = read_at(file, 0)?;
    if header[CLASS] != CLASS_64 {
        return Err("it is a 32-bit ELF file; a 64-bit kernel is needed".to_owned());
    }
    let machine = u16_at(&header, MACHINE);
    if ![I386, X86_64].contains(&machine) {
        return Err(format!(
            "it is an ELF file for another kind of CPU (machine {machine}), not for x86-64"
        ));
    }
    let size = usize::from(u16_at(&header, PROGRAM_HEADER_SIZE));
    // The entries are read at this distance; another one would make fields of the file's choice out
    // of others.
    if size != PROGRAM_HEADER_LEN {
        return Err(format!("its ELF program headers have {size} bytes, not 56"));
    }
    let mut at = u64_at(&header, PROGRAM_HEADERS);
    let mut ranges = Vec::new();
    for _ in 0..u16_at(&header, PROGRAM_HEADER_COUNT) {
        let entry: [u8; PROGRAM_HEADER_LEN] = read_at(file, at)?;
        ranges.extend(segment(&entry, len, ram_end)?);
        at = at.saturating_add(PROGRAM_HEADER_LEN as u64);
    }
    if ranges.is_empty() {
        return Err("its ELF file has nothing to load".to_owned());
    }
    Ok(Segments {
        ranges,
        is_i386: machine == I386,
    })
}

/// The range that a program header loads to, if it loads anything.
fn segment(entry: &[u8], file_len: u64, ram_end: u64) -> Result<Option<AddrRange>, String> {
    const LOAD: u64 = 1;
    let [kind, offset, address, in_file, in_memory] =
        [0, 8, 24, 32, 40].map(|field| u64_at(entry, field));
    // The kind has 32 bits; flags are behind it.
    if kind & 0xffff_ffff != LOAD || in_file.max(in_memory) == 0 {
        return Ok(None);
    }
    if in_file > in_memory {
        return Err(format!(
            "an ELF segment has more bytes in the file ({in_file:#x}) than in memory \
             ({in_memory:#x})"
        ));
    }
    // Offsets are the file's word. The sum is checked so that it cannot wrap below the length.
    if offset.checked_add(in_file).is_none_or(|end| end > file_len) {
        return Err("its ELF file is truncated".to_owned());
    }
    AddrRange::new(address, in_memory)
        // Below are this machine's own tables, which a kernel of the file's choice must not
        // replace: the firmware tables would then describe another machine.
        .filter(|range| range.first() >= layout::HIGH_MEMORY && range.last() < ram_end)
        .map(Some)
        .ok_or_else(|| {
            format!(
                "an ELF segment of {in_memory:#x} bytes at {address:#x} is not within the guest's \
                 memory, which a kernel can use from {:#x} to {ram_end:#x}",
                layout::HIGH_MEMORY
            )
        })
}

fn said(error: &io::Error) -> String {
    match error.kind() {
        io::ErrorKind::UnexpectedEof => "its ELF file is truncated".to_owned(),
        _ => error.to_string(),
    }
}

fn read_at<const N: usize>(file: &mut (impl Read + Seek), at: u64) -> Result<[u8; N], String> {
    let mut bytes = [0; N];
    file.seek(SeekFrom::Start(at))
        .and_then(|_| file.read_exact(&mut bytes))
        .map_err(|error| said(&error))?;
    Ok(bytes)
}

fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([bytes[at], bytes[at + 1]])
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    let field = bytes[at..].iter().take(8).rev();
    field.fold(0, |value, byte| value << 8 | u64::from(*byte))
}

#[cfg(test)]
mod tests {
    use std::io::Cursor;
    use std::path::Path;
    use std::sync::Arc;

    use memory::{CommitError, RamBlock, RamConfig, RamSlice, SpaceKind, Topology};
    use proptest::prelude::*;
    use vm_memory::{Bytes, GuestAddress};

    use super::super::kernel;
    use super::*;
    use crate::arch::x86_64::layout::{Layout, ZoneSize};

    const RAM: u64 = 8 << 20;

    /// A header, one segment of 0x100 bytes in the file and 0x3000 in memory, and the note of an
    /// entry point.
    fn kernel() -> Vec<u8> {
        let mut file = vec![0; 0x300];
        let mut put = |at: usize, bytes: &[u8]| file[at..at + bytes.len()].copy_from_slice(bytes);
        put(0, b"\x7fELF\x02\x01\x01");
        put(16, &2_u16.to_le_bytes());
        put(18, &62_u16.to_le_bytes());
        put(24, &0x20_0010_u64.to_le_bytes());
        put(32, &64_u64.to_le_bytes());
        put(54, &56_u16.to_le_bytes());
        put(56, &2_u16.to_le_bytes());
        for (at, fields) in [
            (64, [1, 0x200, 0x20_0000, 0x20_0000, 0x100, 0x3000]),
            (120, [4, 0x180, 0, 0, 20, 20]),
        ] {
            for (at, field) in (at..).step_by(8).zip(fields) {
                put(at, &u64::to_le_bytes(field));
            }
        }
        for (at, word) in (0x180..).step_by(4).zip([4_u32, 4, 18]) {
            put(at, &word.to_le_bytes());
        }
        put(0x18c, b"Xen\0");
        put(0x190, &0x20_0020_u32.to_le_bytes());
        put(0x200, &[0xf4; 0x100]);
        file
    }

    fn changed(at: usize, bytes: &[u8]) -> Vec<u8> {
        let mut file = kernel();
        file[at..at + bytes.len()].copy_from_slice(bytes);
        file
    }

    fn refusal(file: Vec<u8>) -> String {
        look_over(&mut Cursor::new(file), RAM).unwrap_err()
    }

    fn topology() -> Topology {
        let block = RamBlock::new(&RamConfig::anonymous(RAM));
        let mut topology = Topology::new();
        let slice = RamSlice {
            block: Arc::new(block.unwrap()),
            offset: 0,
        };
        topology
            .transaction(|tx| -> Result<(), CommitError> {
                let ram = tx.ram("ram", slice, RAM).unwrap();
                tx.map(SpaceKind::Memory, 0, ram, 0).unwrap();
                Ok(())
            })
            .unwrap();
        topology
    }

    fn load(file: &[u8], topology: &Topology) -> Result<kernel::Kernel, super::super::BootError> {
        load_as(kernel::Kind::Kernel, file, topology)
    }

    fn load_as(
        kind: kernel::Kind,
        file: &[u8],
        topology: &Topology,
    ) -> Result<kernel::Kernel, super::super::BootError> {
        let dir = tempfile::tempdir().unwrap();
        let path: &Path = &dir.path().join("kernel");
        std::fs::write(path, file).unwrap();
        let view = topology.space(SpaceKind::Memory).view();
        let layout = Layout::new(&[ZoneSize { boot: RAM, room: 0 }], 40).unwrap();
        kernel::load(kind, path, &view, &layout)
    }

    #[test]
    fn loads_complete_kernel() {
        let topology = topology();
        let loaded = load(&kernel(), &topology).unwrap();
        assert_eq!(
            (loaded.entry, loaded.pvh_entry, loaded.end),
            (0x20_0010, Some(0x20_0020), 0x20_3000)
        );
        let view = topology.space(SpaceKind::Memory).view();
        let byte: u8 = view.read_obj(GuestAddress(0x20_00ff)).unwrap();
        assert_eq!(byte, 0xf4);
        let bss = changed(64 + 32, &0_u64.to_le_bytes());
        let segments = look_over(&mut Cursor::new(bss), RAM).unwrap();
        assert_eq!(segments.end(), 0x20_3000, "what is not in the file counts");
    }

    /// The header of EDK2's CLOUDHV.fd says i386, and its entry point is in the PVH note.
    #[test]
    fn loads_firmware_by_its_pvh_note() {
        let i386 = changed(18, &3_u16.to_le_bytes());
        for kind in [kernel::Kind::Firmware, kernel::Kind::Kernel] {
            let loaded = load_as(kind, &i386, &topology()).unwrap();
            assert_eq!(loaded.pvh_entry, Some(0x20_0020));
        }
        let without_note = |mut file: Vec<u8>| {
            file[0x188] = 17;
            file
        };
        for (kind, file, told) in [
            (kernel::Kind::Kernel, without_note(i386), "needs a PVH note"),
            (
                kernel::Kind::Firmware,
                without_note(kernel()),
                "has no PVH note",
            ),
            (
                kernel::Kind::Firmware,
                vec![0xff; 4096],
                "is not an ELF file",
            ),
        ] {
            let refused = load_as(kind, &file, &topology()).unwrap_err().to_string();
            assert!(refused.contains(told), "{refused}, not {told}");
        }
        assert!(load(&without_note(kernel()), &topology()).is_ok());
    }

    #[test]
    fn explains_unloadable_kernels() {
        let (low, high) = (0x9_f000_u64.to_le_bytes(), (RAM - 1).to_le_bytes());
        for (file, told) in [
            (changed(4, &[1]), "32-bit"),
            (changed(18, &183_u16.to_le_bytes()), "machine 183"),
            (changed(54, &[32]), "32 bytes, not 56"),
            (changed(56, &[0]), "nothing to load"),
            (changed(64 + 24, &low), "at 0x9f000 is not within"),
            (changed(64 + 24, &high), "is not within"),
            (changed(64 + 24, &[0xff; 8]), "is not within"),
            (changed(64 + 40, &[0; 8]), "more bytes in the file (0x100)"),
            (changed(64 + 8, &[0xff; 8]), "truncated"),
            (kernel()[..0x2ff].to_vec(), "truncated"),
            (kernel()[..100].to_vec(), "truncated"),
            (changed(32, &[0xff; 7]), "truncated"),
        ] {
            let refused = refusal(file);
            assert!(refused.contains(told), "{refused}, not {told}");
        }
        let astray = load(&changed(0x190, &[0, 0, 0x50, 0]), &topology()).unwrap_err();
        assert!(
            astray.to_string().contains("its entry point, 0x500000"),
            "{astray}"
        );
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(256))]
        #[test]
        fn no_header_makes_it_panic_or_write_elsewhere(
            changes in prop::collection::vec((4_usize..0x1a0, any::<u8>()), 0..8),
            len in 0x40_usize..=0x300,
        ) {
            let mut file = kernel();
            for (at, byte) in changes {
                file[at] = byte;
            }
            file.truncate(len);
            let topology = topology();
            let loaded = load(&file, &topology);
            let view = topology.space(SpaceKind::Memory).view();
            let mut below = vec![0; 1 << 20];
            view.read_slice(&mut below, GuestAddress(0)).unwrap();
            prop_assert!(below.iter().all(|byte| *byte == 0));
            if let Ok(kernel) = loaded {
                prop_assert!(kernel.end <= RAM);
                prop_assert!(kernel.pvh_entry.unwrap_or(kernel.entry) < kernel.end);
            }
        }
    }
}
