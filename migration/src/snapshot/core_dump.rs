//! Core dumps: the memory and registers of a paused guest as an ELF file, which `crash` and `gdb` read.
//!
//! ```text
//!   ELF header | PT_NOTE, a PT_LOAD for each range of RAM | notes | the ranges, from a page on
//! ```
//!
//! Like in a dump by QEMU without paging, both addresses of a range are its guest physical address. Pages
//! of zeros are holes of the file.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::sync::Arc;

use memory::RamBlock;
use uuid::Uuid;
use zerocopy::{Immutable, IntoBytes};

use super::memory_file::PageSink;
use super::write::{Folder, copy_paused, host};
use super::{conclude, sparse};
use crate::MigrationError;
use crate::decision::Decision;
use crate::message::Refusal;
use crate::pages::PAGE;
use crate::progress::{Phase, Progress};

const HEADER: usize = size_of::<Header>();
const PROGRAM_HEADER: usize = size_of::<ProgramHeader>();
/// From this number on, `e_phnum` has another meaning (`PN_XNUM`).
const PROGRAM_HEADERS: usize = 0xffff;

/// RAM of the guest, whole pages of it.
pub struct CoreRange {
    /// Guest physical address.
    pub addr: u64,
    /// The block.
    pub ram: Arc<RamBlock>,
    /// Offset in the block.
    pub offset: usize,
    /// Length in bytes.
    pub len: usize,
}

/// A paused guest, as a core dump shows it.
pub struct Core {
    /// Notes about its vCPUs, each padded to four bytes.
    pub notes: Vec<u8>,
    /// Its RAM, ascending.
    pub ranges: Vec<CoreRange>,
}

/// Parameters of a core dump.
pub struct CoreDump<'a> {
    /// Identifies the dump.
    pub id: Uuid,
    /// The file. Must not exist.
    pub path: &'a Path,
    /// Called with the outcome, before the report shows it: who sees it can have the guest at once.
    pub end: &'a dyn Fn(Result<(), &Refusal>),
    /// Receives the progress report.
    pub progress: &'a Progress,
    /// Carries the cancel request.
    pub decision: &'a Decision,
}

/// `Elf64_Ehdr`.
#[repr(C)]
#[derive(IntoBytes, Immutable)]
struct Header {
    ident: [u8; 16],
    kind: u16,
    machine: u16,
    version: u32,
    entry: u64,
    program_headers_at: u64,
    sections_at: u64,
    flags: u32,
    header_len: u16,
    program_header_len: u16,
    program_headers: u16,
    section_len: u16,
    sections: u16,
    names: u16,
}

/// `Elf64_Phdr`.
#[repr(C)]
#[derive(IntoBytes, Immutable)]
struct ProgramHeader {
    kind: u32,
    flags: u32,
    offset: u64,
    virtual_address: u64,
    physical_address: u64,
    file_len: u64,
    memory_len: u64,
    align: u64,
}

/// The part of a core dump before the memory, and the offset of the first range.
fn head(core: &Core) -> Result<(Vec<u8>, u64), Refusal> {
    const PT_LOAD: u32 = 1;
    const PT_NOTE: u32 = 4;
    let refused = |what: String| Err(Refusal::new("cannot-be-dumped", what));
    let count = core.ranges.len().saturating_add(1);
    if count >= PROGRAM_HEADERS {
        return refused(format!("{count} ranges of memory are too many for an ELF"));
    }
    let notes_at = HEADER + count * PROGRAM_HEADER;
    let ranges_at = (notes_at + core.notes.len()).next_multiple_of(PAGE) as u64;
    let mut bytes = Header {
        // 64 bits, little endian, version 1, System V.
        ident: *b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0",
        kind: 4,     // ET_CORE
        machine: 62, // EM_X86_64
        version: 1,
        entry: 0,
        program_headers_at: HEADER as u64,
        sections_at: 0,
        flags: 0,
        header_len: HEADER as u16,
        program_header_len: PROGRAM_HEADER as u16,
        program_headers: count as u16,
        section_len: 0,
        sections: 0,
        names: 0,
    }
    .as_bytes()
    .to_vec();
    let mut put = |kind, offset: u64, addr, len: usize| {
        let header = ProgramHeader {
            kind,
            flags: 0,
            offset,
            virtual_address: addr,
            physical_address: addr,
            file_len: len as u64,
            memory_len: len as u64,
            align: 0,
        };
        bytes.extend(header.as_bytes());
    };
    put(PT_NOTE, notes_at as u64, 0, core.notes.len());
    let mut offset = ranges_at;
    for range in &core.ranges {
        if !range.len.is_multiple_of(PAGE) {
            let (len, addr) = (range.len, range.addr);
            return refused(format!(
                "{len} bytes of memory at {addr:#x} are not whole pages"
            ));
        }
        put(PT_LOAD, offset, range.addr, range.len);
        offset += range.len as u64;
    }
    bytes.extend(&core.notes);
    Ok((bytes, ranges_at))
}

/// The memory in a core dump.
struct Memory<'a> {
    file: &'a File,
    path: &'a Path,
    /// Offset of the first range in the file.
    start: u64,
    progress: &'a Progress,
}

impl PageSink for Memory<'_> {
    fn put(&mut self, first: usize, content: &[u8]) -> Result<(), MigrationError> {
        let position = self.start + (first * PAGE) as u64;
        sparse::put(self.file, content, position, self.progress)
            .map_err(|error| host("write", self.path, &error))
    }
}

fn write_to(
    file: &File,
    core: &Core,
    dump: &CoreDump<'_>,
    path: &Path,
) -> Result<(), MigrationError> {
    let refused = |error: io::Error| host("write", path, &error);
    let (head, start) = head(core).map_err(MigrationError::Here)?;
    let total: u64 = core.ranges.iter().map(|range| range.len as u64).sum();
    // The last pages may be holes.
    file.set_len(start + total).map_err(refused)?;
    file.write_all_at(&head, 0).map_err(refused)?;
    let progress = dump.progress;
    sparse::begin(total, progress);
    let mut memory = Memory {
        file,
        path,
        start,
        progress,
    };
    let part = |range: &'_ CoreRange| range.offset..range.offset + range.len;
    let parts = core.ranges.iter().map(|range| (&*range.ram, part(range)));
    copy_paused(parts, dump.decision, &mut memory)?;
    file.sync_all().map_err(refused)
}

/// Writes a core dump of the guest that `save` describes. The file has another name until it is complete.
///
/// # Errors
/// `save` fails, there is such a file, the host cannot write it, or the dump was canceled. The report
/// says the same, and no file is left.
pub fn write_core(
    dump: &CoreDump<'_>,
    save: impl FnOnce() -> Result<Core, Refusal>,
) -> Result<(), Refusal> {
    dump.progress.enter(Phase::Stopped);
    let write = || -> Result<(), MigrationError> {
        let (mut folder, name) = Folder::beside(dump.path, dump.id)?;
        let written = (|| {
            let core = save().map_err(MigrationError::Here)?;
            let (file, path) = folder.create(&name)?;
            write_to(&file, &core, dump, &path)?;
            // From here on a cancel comes too late.
            if !dump.decision.commit() {
                return Err(MigrationError::Canceled);
            }
            folder.commit()
        })();
        if written.is_err() {
            folder.remove();
        }
        written
    };
    let written = write();
    let why = written.as_ref().err().map(MigrationError::refusal);
    (dump.end)(why.as_ref().map_or(Ok(()), Err));
    conclude(dump.progress, written)
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::MetadataExt as _;

    use memory::RamConfig;

    use super::*;

    fn dump_to(path: &Path, core: Core, cancel: bool) -> Result<(), Refusal> {
        let (progress, decision) = (Progress::default(), Decision::default());
        if cancel {
            decision.cancel().unwrap();
        }
        let dump = CoreDump {
            id: Uuid::new_v4(),
            path,
            end: &|_| assert!(!progress.report().phase.is_over()),
            progress: &progress,
            decision: &decision,
        };
        let written = write_core(&dump, || Ok(core));
        assert!(progress.report().phase.is_over());
        written
    }

    fn core(pages: usize, notes: &[u8]) -> Core {
        let config = RamConfig::anonymous((pages * PAGE) as u64);
        let ram = Arc::new(RamBlock::new(&config).unwrap());
        for page in 0..2 {
            let slice = ram.slice(page * PAGE, PAGE).unwrap();
            slice.copy_from(&[page as u8 + 1; PAGE]);
        }
        let range = |addr, first: usize, count: usize| CoreRange {
            addr,
            ram: Arc::clone(&ram),
            offset: first * PAGE,
            len: count * PAGE,
        };
        Core {
            notes: notes.to_vec(),
            ranges: vec![range(0x1000, 0, 1), range(1 << 32, 1, pages - 1)],
        }
    }

    #[test]
    fn dump_is_a_sparse_elf_with_each_range() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("core");
        let notes = [7; 5000];
        dump_to(&path, core(10_000, &notes), false).unwrap();
        let bytes = fs::read(&path).unwrap();
        let u16_at = |at: usize| u16::from_le_bytes(bytes[at..at + 2].try_into().unwrap());
        let u64_at = |at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap());
        assert_eq!(&bytes[..7], b"\x7fELF\x02\x01\x01");
        assert_eq!((u16_at(16), u16_at(18), u16_at(56)), (4, 62, 3));
        let header = |index: usize| {
            let at = 64 + 56 * index;
            (
                u64_at(at + 8) as usize,
                u64_at(at + 24),
                u64_at(at + 32) as usize,
            )
        };
        let (at, _, len) = header(0);
        assert_eq!(&bytes[at..at + len], &notes);
        for (index, addr, pages, first) in [(1, 0x1000, 1, 1), (2, 1 << 32, 9_999, 2)] {
            let (at, there, len) = header(index);
            assert_eq!((there, len, at % PAGE), (addr, pages * PAGE, 0));
            assert_eq!(bytes[at..at + PAGE], [first; PAGE]);
            assert!(bytes[at + PAGE..at + len].iter().all(|byte| *byte == 0));
        }
        let metadata = fs::metadata(&path).unwrap();
        assert_eq!(metadata.mode() & 0o777, 0o600);
        assert!(metadata.blocks() * 512 < 1 << 20, "{}", metadata.blocks());
        // What is there is not replaced.
        let refused = dump_to(&path, core(2, &[]), false).unwrap_err();
        assert_eq!(refused.code, "file-exists");
        assert_eq!(fs::read(&path).unwrap().len(), bytes.len());
    }

    #[test]
    fn failed_dump_leaves_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("core");
        let refused = dump_to(&path, core(2, &[]), true).unwrap_err();
        assert_eq!(refused.code, "canceled", "{refused}");
        let mut uneven = core(2, &[]);
        uneven.ranges[0].len = 1;
        let refused = dump_to(&path, uneven, false).unwrap_err();
        assert_eq!(refused.code, "cannot-be-dumped");
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
        let nowhere = dir.path().join("none/core");
        let refused = dump_to(&nowhere, core(2, &[]), false).unwrap_err();
        assert_eq!(refused.code, "host-refused");
        assert!(!nowhere.parent().unwrap().exists());
    }
}
