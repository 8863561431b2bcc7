//! Loading what the guest boots.
//!
//! The guest never runs a decompressor: a bzImage is unpacked here, to the ELF kernel inside it,
//! which is entered through its PVH note, or by the 64-bit boot protocol where it has none. A
//! firmware is an ELF file with such a note.

mod elf;
mod handover;
mod kernel;
mod unpack;

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};

use devices::host_file::{FileKind, OpenError, Request};
use memory::{FlatView, PAGE_SIZE};
use spec::VmConfig;
use vm_memory::{Bytes, GuestAddress, GuestMemoryError};

use self::kernel::Kind;
use crate::arch::x86_64::cpu::Entry;
use crate::arch::x86_64::layout::{self, Layout};
use crate::arch::x86_64::smbios;
use crate::arch::x86_64::{acpi, generation};

/// A payload cannot be booted.
#[derive(Debug, thiserror::Error)]
pub enum BootError {
    /// The configuration names neither a kernel nor a firmware.
    #[error("there is nothing to boot: `payload.kernel` and `payload.firmware` are missing")]
    NoKernel,
    /// A file cannot be read.
    #[error("the {what} {} cannot be read: {source}", path.display())]
    Unreadable {
        /// `kernel`, `firmware` or `initramfs`.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// The path names a directory, a device, or the like.
    #[error("the {what} {} is {}; it must be a regular file", path.display(), found.name())]
    NotAFile {
        /// `kernel`, `firmware` or `initramfs`.
        what: &'static str,
        /// The path.
        path: PathBuf,
        /// The kind of file that it names.
        found: FileKind,
    },
    /// The file is empty.
    #[error("the {what} {} is empty", path.display())]
    Empty {
        /// `kernel`, `firmware` or `initramfs`.
        what: &'static str,
        /// The file.
        path: PathBuf,
    },
    /// The file is not an ELF kernel or bzImage, or is damaged.
    #[error("{} is not a {what} that can be booted: {reason}", path.display())]
    NotAKernel {
        /// `kernel` or `firmware`.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// The reason.
        reason: String,
    },
    /// The initramfs has no room behind the kernel.
    #[error(
        "the initramfs {} ({size} bytes) does not fit in the guest's memory after the kernel \
         ({room} bytes)", path.display()
    )]
    InitramfsTooLarge {
        /// The file.
        path: PathBuf,
        /// Its bytes.
        size: u64,
        /// Bytes that there are.
        room: u64,
    },
    /// The boot structures do not fit.
    #[error("the guest's memory has no room for {what}")]
    NoRoom {
        /// The payload that does not fit.
        what: &'static str,
    },
    /// Guest memory is not where it should be.
    #[error("guest memory cannot be written: {0}")]
    Memory(#[from] GuestMemoryError),
}

/// Loads the kernel or firmware, its initramfs, its command line and all tables into guest memory.
pub(crate) fn load(
    config: &VmConfig,
    memory: &FlatView,
    layout: &Layout,
) -> Result<Entry, BootError> {
    let payload = &config.payload;
    let (kind, path) = match (&payload.firmware, &payload.kernel) {
        (Some(path), _) => (Kind::Firmware, path),
        (None, Some(path)) => (Kind::Kernel, path),
        (None, None) => return Err(BootError::NoKernel),
    };
    // The kernel first: its end bounds the initramfs.
    let kernel = kernel::load(kind, Path::new(path), memory, layout)?;
    let initramfs = match payload.initramfs.as_deref() {
        Some(path) => Some(load_initramfs(Path::new(path), memory, layout, kernel.end)?),
        None => None,
    };
    let tables = acpi::tables(config, layout);
    // The tables grow with vCPUs and segments, and the SMBIOS tables follow them.
    if tables.len() as u64 > layout::ACPI_END - layout::ACPI {
        return Err(BootError::NoRoom {
            what: "the ACPI tables of this many vCPUs and PCI segments",
        });
    }
    memory.write_slice(&tables, GuestAddress(layout::ACPI))?;
    let tables = smbios::tables(config.platform.as_ref());
    if tables.len() as u64 > layout::SMBIOS_END - layout::SMBIOS {
        return Err(BootError::NoRoom {
            what: "the SMBIOS tables: the strings of `platform` are too long",
        });
    }
    memory.write_slice(&tables, GuestAddress(layout::SMBIOS))?;
    generation::write(memory)?;
    let cmdline = payload.cmdline.as_deref().unwrap_or("");
    memory.write_slice(cmdline.as_bytes(), GuestAddress(layout::CMDLINE))?;
    // The kernel reads up to this NUL. Validation has limited the length, so that the text ends
    // below the next structure.
    memory.write_obj(0_u8, GuestAddress(layout::CMDLINE + cmdline.len() as u64))?;
    let facts = handover::Facts {
        layout,
        initramfs,
        cmdline_len: cmdline.len(),
    };
    match kernel.pvh_entry {
        Some(address) => Ok(Entry::Pvh {
            address,
            start_info: handover::write_start_info(memory, &facts)?,
        }),
        None => Ok(Entry::Linux64 {
            address: kernel.entry,
            zero_page: handover::write_zero_page(memory, &facts)?,
        }),
    }
}

/// Opens a file that there should be, and says how long it is.
fn open(what: &'static str, path: &Path) -> Result<(File, u64), BootError> {
    let unreadable = |source| BootError::Unreadable {
        what,
        path: path.to_owned(),
        source,
    };
    // A FIFO or device could block the boot, or have no end.
    let opened = Request::read(path, &[FileKind::Regular]).open();
    let file = opened.map_err(|error| match error {
        OpenError::Host { source, .. } => unreadable(source),
        OpenError::Kind { path, found, .. } => BootError::NotAFile { what, path, found },
    })?;
    let len = file.metadata().map_err(unreadable)?.len();
    if len == 0 {
        return Err(BootError::Empty {
            what,
            path: path.to_owned(),
        });
    }
    Ok((file, len))
}

/// Address and length of an initramfs.
type Placed = (u64, u64);

/// Loads the initramfs at the end of RAM below 4 GiB, away from the kernel, which unpacks and grows.
fn load_initramfs(
    path: &Path,
    memory: &FlatView,
    layout: &Layout,
    kernel_end: u64,
) -> Result<Placed, BootError> {
    let (mut file, size) = open("initramfs", path)?;
    let room = layout
        .low_ram_end()
        .saturating_sub(kernel_end.next_multiple_of(PAGE_SIZE));
    let too_large = || BootError::InitramfsTooLarge {
        path: path.to_owned(),
        size,
        room,
    };
    // `size` is what the file says now; `read_exact` below fails if the file has become shorter
    // since.
    let padded = size
        .checked_next_multiple_of(PAGE_SIZE)
        .filter(|padded| *padded <= room);
    let at = layout.low_ram_end() - padded.ok_or_else(too_large)?;
    let len = usize::try_from(size).map_err(|_| too_large())?;
    memory
        // Straight into guest memory: an initramfs may have gigabytes.
        .read_exact_volatile_from(GuestAddress(at), &mut file, len)
        .map_err(|error| {
            let source = io::Error::other(error);
            BootError::Unreadable {
                what: "initramfs",
                path: path.to_owned(),
                source,
            }
        })?;
    Ok((at, size))
}
