//! The parts of an image that have content.

use std::fs::File;
use std::io;

use imago::file::File as Storage;
use imago::{FormatAccess, Mapping, ShallowMapping};
use rustix::fs::{SeekFrom, seek};
use rustix::io::Errno;

use super::image::{Image, Kind};

/// Calls `found` with each range that may have content; all others read as zeros.
pub(super) fn extents(image: &Image, size: u64, found: impl FnMut(u64, u64)) -> io::Result<()> {
    let extent = |at| match &image.kind {
        Kind::Raw(file) => raw_extent(file, at, size),
        Kind::Qcow2(image) => {
            let image = image.read();
            let (mapping, len) = image.get_mapping(at, size - at)?;
            let is_zero = matches!(mapping, Mapping::Zero { .. } | Mapping::Eof { .. });
            Ok((!is_zero, len))
        }
    };
    walk(size, extent, found)
}

/// Calls `found` with each range that is not as in the base of the image. Zeros count, too: they may hide
/// what the base has.
pub(super) fn own_extents(
    image: &FormatAccess<Storage>,
    size: u64,
    found: impl FnMut(u64, u64),
) -> io::Result<()> {
    let extent = |at| {
        let (mapping, len) = image.get_shallow_mapping(at, size - at)?;
        Ok((!matches!(mapping, ShallowMapping::Indirect { .. }), len))
    };
    walk(size, extent, found)
}

/// Calls `found` with the offset and length of each extent that counts. `extent` returns whether the one at
/// an offset counts, and its length.
fn walk(
    size: u64,
    extent: impl Fn(u64) -> io::Result<(bool, u64)>,
    mut found: impl FnMut(u64, u64),
) -> io::Result<()> {
    let mut at = 0;
    while at < size {
        // An extent without a length says nothing of the rest.
        let (counts, len) = match extent(at)? {
            (_, 0) => (true, size - at),
            (counts, len) => (counts, len.min(size - at)),
        };
        if counts {
            found(at, len);
        }
        at += len;
    }
    Ok(())
}

/// The extent of a file at this offset, and whether it has content.
fn raw_extent(file: &File, at: u64, size: u64) -> io::Result<(bool, u64)> {
    let data = match seek(file, SeekFrom::Data(at)) {
        Ok(data) if data > at => return Ok((false, data.min(size) - at)),
        Ok(_) => at,
        // Nothing but a hole from here on.
        Err(Errno::NXIO) => return Ok((false, size - at)),
        // A block device, or a file system that does not say: all of it may have content.
        Err(Errno::INVAL | Errno::OPNOTSUPP | Errno::NOTTY) => return Ok((true, size - at)),
        Err(error) => return Err(error.into()),
    };
    let hole = seek(file, SeekFrom::Hole(data))?;
    Ok((true, hole.saturating_sub(at)))
}
