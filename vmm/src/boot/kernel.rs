//! Kernels and firmware: what a file holds, and loading it.

use std::fs::File;
use std::io::{Cursor, Read, Seek};
use std::path::Path;

use linux_loader::loader::elf::{Elf, PvhBootCapability};
use linux_loader::loader::{KernelLoader, KernelLoaderResult};
use memory::FlatView;
use vm_memory::{GuestAddress, ReadVolatile};

use super::elf::look_over;
use super::unpack::{BzImage, unpack};
use super::{BootError, open};
use crate::arch::x86_64::layout::{self, Layout};

/// A kernel or firmware in guest memory.
#[derive(Debug)]
pub(super) struct Kernel {
    /// The entry point, unless the kernel has another for PVH.
    pub(super) entry: u64,
    /// The entry point of the PVH boot ABI, if the kernel has one.
    pub(super) pvh_entry: Option<u64>,
    /// The first address after it.
    pub(super) end: u64,
}

const ELF_MAGIC: &[u8] = b"\x7fELF";

/// The kind of file that the configuration names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// An ELF file or a bzImage.
    Kernel,
    /// An ELF file with a PVH note.
    Firmware,
}

impl Kind {
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Kernel => "kernel",
            Self::Firmware => "firmware",
        }
    }
}

pub(super) fn load(
    kind: Kind,
    path: &Path,
    memory: &FlatView,
    layout: &Layout,
) -> Result<Kernel, BootError> {
    let (mut file, len) = open(kind.name(), path)?;
    let refused = |reason: String| BootError::NotAKernel {
        path: path.to_owned(),
        what: kind.name(),
        reason,
    };
    let unreadable = |source| BootError::Unreadable {
        what: kind.name(),
        path: path.to_owned(),
        source,
    };
    let mut magic = [0; 4];
    if len < magic.len() as u64 {
        return Err(refused(format!(
            "its {len} bytes are too short for a {}",
            kind.name()
        )));
    }
    file.read_exact(&mut magic).map_err(unreadable)?;
    file.rewind().map_err(unreadable)?;
    if magic == ELF_MAGIC {
        return load_elf(&mut file, memory, layout)
            .and_then(|kernel| match (kind, kernel.pvh_entry) {
                (Kind::Firmware, None) => Err("its ELF file has no PVH note".to_owned()),
                _ => Ok(kernel),
            })
            .map_err(refused);
    }
    if kind == Kind::Firmware {
        return Err(refused(
            "it is not an ELF file with a PVH note, as EDK2's CLOUDHV.fd is".to_owned(),
        ));
    }
    let image = read_whole(&mut file, len, layout).map_err(refused)?;
    let image = BzImage::parse(&image).map_err(refused)?;
    // What the kernel unpacks to has to fit into memory anyway.
    let unpacked = unpack(image.payload, layout.low_ram_end()).map_err(refused)?;
    if !unpacked.starts_with(ELF_MAGIC) {
        return Err(refused(
            "the payload of the bzImage is not an ELF kernel".to_owned(),
        ));
    }
    load_elf(&mut Cursor::new(unpacked), memory, layout).map_err(refused)
}

fn read_whole(file: &mut File, len: u64, layout: &Layout) -> Result<Vec<u8>, String> {
    if len > layout.low_ram_end() {
        return Err(format!("its {len} bytes exceed the guest's memory"));
    }
    let mut bytes = Vec::new();
    file.take(len)
        .read_to_end(&mut bytes)
        .map_err(|error| error.to_string())?;
    Ok(bytes)
}

fn load_elf<F: Read + ReadVolatile + Seek>(
    file: &mut F,
    memory: &FlatView,
    layout: &Layout,
) -> Result<Kernel, String> {
    // Before the loader writes anything: a refused file leaves guest memory as it was.
    let segments = look_over(file, layout.low_ram_end())?;
    let first = GuestAddress(layout::HIGH_MEMORY);
    let loaded: KernelLoaderResult = Elf::load(memory, None, file, Some(first))
        .map_err(|error| format!("its ELF file cannot be loaded: {error}"))?;
    let pvh_entry = match loaded.pvh_boot_cap {
        PvhBootCapability::PvhEntryPresent(entry) => Some(entry.0),
        _ => None,
    };
    if segments.is_i386 && pvh_entry.is_none() {
        return Err("its ELF header says i386; such a file needs a PVH note".to_owned());
    }
    let kernel = Kernel {
        entry: loaded.kernel_load.0,
        pvh_entry,
        end: segments.end(),
    };
    // The note is part of the file, and could name any address. Outside the segments the vCPU would
    // execute zeros.
    let start = pvh_entry.unwrap_or(kernel.entry);
    if segments.contain(start) {
        Ok(kernel)
    } else {
        Err(format!(
            "its entry point, {start:#x}, is in none of its segments"
        ))
    }
}
