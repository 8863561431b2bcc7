//! The parts of an image that have content.

use std::fs::File;
use std::io;

use imago::file::File as Storage;
use imago::{FormatAccess, Mapping, ShallowMapping};
use rustix::fs::{SeekFrom, seek};
use rustix::io::Errno;

use super::image::{Image, Kind};

/// A range of an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Extent {
    pub(super) at: u64,
    pub(super) len: u64,
    /// What was asked for: whether it may have content, or is not as in the base.
    pub(super) counts: bool,
}

/// All ranges of an image, in their order: those that do not count read as zeros. A damaged image may have more
/// than can be kept.
pub(super) fn all_extents(
    image: &Image,
    size: u64,
) -> impl Iterator<Item = io::Result<Extent>> + '_ {
    let extent = move |at| match &image.kind {
        Kind::Raw(file) => raw_extent(file, at, size),
        Kind::Qcow2(image) => {
            let image = image.read();
            let (mapping, len) = image.get_mapping(at, size - at)?;
            let is_zero = matches!(mapping, Mapping::Zero { .. } | Mapping::Eof { .. });
            Ok((!is_zero, len))
        }
    };
    walk(size, extent)
}

/// Calls `found` with each range that may have content; all others read as zeros.
pub(super) fn extents(image: &Image, size: u64, found: impl FnMut(u64, u64)) -> io::Result<()> {
    those_that_count(all_extents(image, size), found)
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
    those_that_count(walk(size, extent), found)
}

fn those_that_count(
    extents: impl Iterator<Item = io::Result<Extent>>,
    mut found: impl FnMut(u64, u64),
) -> io::Result<()> {
    for extent in extents {
        let Extent { at, len, counts } = extent?;
        if counts {
            found(at, len);
        }
    }
    Ok(())
}

/// Returns all extents, up to the first error. `extent` returns whether the one at an offset counts, and its
/// length.
fn walk(
    size: u64,
    extent: impl Fn(u64) -> io::Result<(bool, u64)>,
) -> impl Iterator<Item = io::Result<Extent>> {
    let mut at = 0;
    std::iter::from_fn(move || {
        let left = size.checked_sub(at).filter(|left| *left > 0)?;
        let found = extent(at).map(|(counts, len)| match len {
            // An extent without a length says nothing of the rest.
            0 => (true, left),
            len => (counts, len.min(left)),
        });
        let found = found.map(|(counts, len)| Extent { at, len, counts });
        at = found.as_ref().map_or(size, |extent| at + extent.len);
        Some(found)
    })
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
