//! Image formats: which one a file has, and which one a guest would give it.

use std::fmt;
use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::os::unix::fs::FileExt;

use super::image::SECTOR;

/// The format of an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ImageFormat {
    /// The disk's bytes, one after the other.
    Raw,
    /// QEMU's copy-on-write format, version 2 or 3.
    Qcow2,
}

const QCOW2_MAGIC: [u8; 4] = *b"QFI\xfb";
const QCOW2: &str = "qcow2";

/// Formats by what is at this offset of the first sector.
const AT_START: [(usize, &[u8], &str); 14] = [
    (0, &QCOW2_MAGIC, QCOW2),
    (0, b"KDMV", "VMDK"),
    (0, b"COWD", "VMDK"),
    (0, b"# Disk DescriptorFile", "VMDK"),
    (0, b"vhdxfile", "VHDX"),
    (0, b"conectix", "VHD"),
    (0x40, b"\x7f\x10\xda\xbe", "VDI"),
    (0, b"QED\0", "QED"),
    (0, b"WithoutFreeSpace", "Parallels"),
    (0, b"WithouFreSpacExt", "Parallels"),
    (0, b"LUKS\xba\xbe", "LUKS"),
    (0, b"Bochs Virtual HD Image", "Bochs"),
    (0, b"#!/bin/sh\n#V2.0 Format", "cloop"),
    (0, b"OOOM", "UML copy-on-write"),
];
/// Formats by how the last sector begins: a VHD of a fixed size has a footer only.
const AT_END: [(&[u8], &str); 2] = [(b"conectix", "VHD"), (b"koly", "DMG")];

/// The format whose images begin with this sector, other than raw.
fn of_start(sector: &[u8]) -> Option<&'static str> {
    let begins = |&&(at, magic, _): &&(usize, &[u8], &str)| {
        sector.get(at..).is_some_and(|rest| rest.starts_with(magic))
    };
    AT_START.iter().find(begins).map(|(_, _, name)| *name)
}

/// The format whose images end with this sector, other than raw.
fn of_end(sector: &[u8]) -> Option<&'static str> {
    let ends = AT_END.iter().find(|(magic, _)| sector.starts_with(magic));
    ends.map(|(_, name)| *name)
}

/// The format of an image, which is `said` by its configuration or else detected. The error says why
/// the image cannot be used.
pub(super) fn check(file: &File, said: Option<ImageFormat>) -> Result<ImageFormat, String> {
    let (mut first, mut last) = ([0; SECTOR as usize], [0; SECTOR as usize]);
    // A file that is too short for a sector has no magic number: its size is refused later.
    let len = (&mut &*file).seek(SeekFrom::End(0)).unwrap_or(0);
    let read_first = read_up_to(file, &mut first, 0);
    let read_last = len
        .checked_sub(SECTOR)
        .map_or(0, |at| read_up_to(file, &mut last, at));
    let start = of_start(first.get(..read_first).unwrap_or_default());
    match (said, start) {
        (Some(ImageFormat::Qcow2), start) if start != Some(QCOW2) => {
            Err("is configured as qcow2, but does not start with a qcow2 header".to_owned())
        }
        (Some(format), _) => Ok(format),
        (None, Some(QCOW2)) => Ok(ImageFormat::Qcow2),
        (None, start) => match start.or(of_end(last.get(..read_last).unwrap_or_default())) {
            None => Ok(ImageFormat::Raw),
            Some(name) => Err(format!(
                "is a {name} image, a format that is not supported; set `image_type` to raw to \
                 serve its bytes unchanged"
            )),
        },
    }
}

fn read_up_to(file: &File, buffer: &mut [u8], at: u64) -> usize {
    let mut read = 0;
    while let Some(rest) = buffer.get_mut(read..).filter(|rest| !rest.is_empty()) {
        match file.read_at(rest, at + read as u64) {
            Ok(0) => break,
            Ok(len) => read += len,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(_) => break,
        }
    }
    read
}

/// Whether a write reaches the sectors by which a format is detected.
pub(super) fn is_telling(offset: u64, len: usize, capacity: u64) -> bool {
    let end = offset.saturating_add(len as u64);
    offset < SECTOR || end > capacity.saturating_sub(SECTOR)
}

/// The format other than raw that an image would have after a write of whole sectors.
pub(super) fn written(data: &[u8], offset: u64, capacity: u64) -> Option<&'static str> {
    let start = (offset == 0).then(|| of_start(data)).flatten();
    let last = capacity.checked_sub(SECTOR)?.checked_sub(offset)?;
    let last = usize::try_from(last).ok().and_then(|at| data.get(at..));
    start.or_else(|| last.filter(|last| !last.is_empty()).and_then(of_end))
}

/// A write that would make a raw image, whose format was detected, one of another format.
#[derive(Debug)]
pub(super) struct RefusedWrite {
    pub(super) format: &'static str,
}

impl std::error::Error for RefusedWrite {}

impl RefusedWrite {
    pub(super) fn is_cause_of(error: &io::Error) -> bool {
        let cause = error.get_ref();
        cause
            .and_then(|cause| cause.downcast_ref::<Self>())
            .is_some()
    }
}

impl fmt::Display for RefusedWrite {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let format = self.format;
        write!(
            f,
            "the write would turn the image, detected as raw, into a {format} image; set \
             `image_type` to raw in the disk's configuration to allow it"
        )
    }
}
