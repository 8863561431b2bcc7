//! bzImages: finding the packed kernel in one, and unpacking it.

use std::io::{self, Read};

/// The parts of a bzImage (Documentation/arch/x86/boot.rst) that matter here.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct BzImage<'a> {
    /// The packed kernel.
    pub(super) payload: &'a [u8],
}

impl<'a> BzImage<'a> {
    pub(super) fn parse(image: &'a [u8]) -> Result<Self, String> {
        const SETUP_SECTS: usize = 0x1f1;
        const BOOT_FLAG: usize = 0x1fe;
        const MAGIC: usize = 0x202;
        const VERSION: usize = 0x206;
        const PAYLOAD_OFFSET: usize = 0x248;
        const PAYLOAD_LENGTH: usize = 0x24c;
        /// The first version of the protocol that says where the payload is.
        const WITH_PAYLOAD: u16 = 0x0208;

        let neither = || "it is neither an ELF file nor a bzImage".to_owned();
        if field::<2>(image, BOOT_FLAG) != Some([0x55, 0xaa])
            || field::<4>(image, MAGIC) != Some(*b"HdrS")
        {
            return Err(neither());
        }
        let version = u16::from_le_bytes(field(image, VERSION).ok_or_else(neither)?);
        if version < WITH_PAYLOAD {
            let (major, minor) = (version >> 8, version & 0xff);
            return Err(format!(
                "its boot protocol, {major}.{minor:02}, is older than 2.08"
            ));
        }
        let number = |at| field(image, at).map(|bytes| u32::from_le_bytes(bytes) as usize);
        let sectors = match field::<1>(image, SETUP_SECTS) {
            // boot.rst: 0 means 4, for kernels that are older than the field.
            Some([0]) => 4,
            Some([sectors]) => usize::from(sectors),
            None => return Err(neither()),
        };
        let payload = || -> Option<&'a [u8]> {
            // The offset is from the start of the protected-mode code, behind the boot sector and
            // the setup sectors.
            let start = ((sectors + 1) * 512).checked_add(number(PAYLOAD_OFFSET)?)?;
            image.get(start..start.checked_add(number(PAYLOAD_LENGTH)?)?)
        };
        let payload = payload().filter(|payload| !payload.is_empty());
        payload
            .map(|payload| Self { payload })
            .ok_or_else(|| "the bzImage is truncated".to_owned())
    }
}

fn field<const N: usize>(image: &[u8], at: usize) -> Option<[u8; N]> {
    image.get(at..at + N)?.try_into().ok()
}

/// Memory limit of xz and lzma for unpacking a kernel: twice the 128 MiB that the kernel's own build asks
/// for at most. A header could ask for 4 GiB.
const DICTIONARY: u64 = 256 << 20;

/// Unpacks a kernel to at most `most` bytes.
pub(super) fn unpack(packed: &[u8], most: u64) -> Result<Vec<u8>, String> {
    let damaged = |format: &str, error: &dyn std::fmt::Display| {
        format!("its {format} payload is damaged: {error}")
    };
    // A kernel's build appends the unpacked size to what is packed, so each is read up to its own
    // end and no further.
    let reader = |format: &str, mut from: Box<dyn Read + '_>| {
        let mut bytes = Vec::new();
        from.by_ref()
            // A few KiB can unpack to gigabytes. The reader stops at the limit, and one byte more
            // says that there was more.
            .take(most)
            .read_to_end(&mut bytes)
            .map_err(|error| damaged(format, &error))?;
        match from.read(&mut [0]) {
            Ok(0) => Ok(bytes),
            Ok(_) => Err(format!(
                "unpacked, it is larger than the limit of {most} bytes"
            )),
            Err(error) => Err(damaged(format, &error)),
        }
    };
    match packed {
        [0x1f, 0x8b, ..] => reader("gzip", Box::new(flate2::bufread::GzDecoder::new(packed))),
        [0xfd, b'7', b'z', b'X', b'Z', 0, ..] => {
            let stream = liblzma::stream::Stream::new_stream_decoder(DICTIONARY, 0)
                .map_err(|error| damaged("xz", &error))?;
            reader(
                "xz",
                Box::new(liblzma::bufread::XzDecoder::new_stream(packed, stream)),
            )
        }
        [0x5d, 0, 0, ..] => {
            let stream = liblzma::stream::Stream::new_lzma_decoder(DICTIONARY)
                .map_err(|error| damaged("lzma", &error))?;
            reader(
                "lzma",
                Box::new(liblzma::bufread::XzDecoder::new_stream(packed, stream)),
            )
        }
        [0x28, 0xb5, 0x2f, 0xfd, ..] => {
            let decoder =
                zstd::Decoder::with_buffer(packed).map_err(|error| damaged("zstd", &error))?;
            reader("zstd", Box::new(decoder.single_frame()))
        }
        [0x02, 0x21, 0x4c, 0x18, rest @ ..] => {
            unpack_lz4(rest, most).map_err(|error| damaged("lz4", &error))
        }
        [b'B', b'Z', b'h', ..] => Err("it is packed with bzip2, which is not supported".to_owned()),
        [0x89, b'L', b'Z', b'O', ..] => {
            Err("it is packed with LZO, which is not supported".to_owned())
        }
        _ => Err("it is packed in an unknown format".to_owned()),
    }
}

/// The legacy frame of lz4, which kernels use: blocks of up to 8 MiB, each behind its packed size.
fn unpack_lz4(mut rest: &[u8], most: u64) -> io::Result<Vec<u8>> {
    const BLOCK: usize = 8 << 20;
    let invalid = |what: &str| io::Error::new(io::ErrorKind::InvalidData, what.to_owned());
    let mut bytes = Vec::new();
    let mut block = vec![0; BLOCK];
    while let Some((size, behind)) = rest.split_first_chunk::<4>() {
        let size = u32::from_le_bytes(*size) as usize;
        // The unpacked size that a kernel's build appends looks like a block that is not there.
        let Some((packed, behind)) = behind.split_at_checked(size).filter(|_| size > 0) else {
            break;
        };
        let len = lz4_flex::block::decompress_into(packed, &mut block)
            .map_err(|error| invalid(&error.to_string()))?;
        // Each block is at most 8 MiB, so the check comes in time even for a hostile file.
        if (bytes.len() + len) as u64 > most {
            return Err(invalid("larger than the guest's memory"));
        }
        bytes.extend_from_slice(&block[..len]);
        rest = behind;
    }
    if bytes.is_empty() {
        Err(invalid("no block found"))
    } else {
        Ok(bytes)
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use proptest::prelude::*;

    use super::*;

    fn kernel() -> Vec<u8> {
        (0..100_000_u32)
            .flat_map(|i| (i / 7).to_le_bytes())
            .collect()
    }

    fn packed_in_all_ways(bytes: &[u8]) -> Vec<(&'static str, Vec<u8>)> {
        let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        gzip.write_all(bytes).unwrap();
        let mut xz = liblzma::write::XzEncoder::new(Vec::new(), 1);
        xz.write_all(bytes).unwrap();
        let mut lz4 = vec![0x02, 0x21, 0x4c, 0x18];
        for block in bytes.chunks(8 << 20) {
            let block = lz4_flex::block::compress(block);
            lz4.extend(u32::try_from(block.len()).unwrap().to_le_bytes());
            lz4.extend(block);
        }
        vec![
            ("gzip", gzip.finish().unwrap()),
            ("xz", xz.finish().unwrap()),
            ("zstd", zstd::encode_all(bytes, 1).unwrap()),
            ("lz4", lz4),
        ]
    }

    #[test]
    fn unpacks_every_format() {
        let kernel = kernel();
        for (format, mut packed) in packed_in_all_ways(&kernel) {
            let len = kernel.len() as u64;
            assert_eq!(unpack(&packed, len).unwrap(), kernel, "{format}");
            packed.extend(u32::try_from(len).unwrap().to_le_bytes());
            assert_eq!(
                unpack(&packed, len).unwrap(),
                kernel,
                "{format} with its size behind it"
            );
            let bomb = unpack(&packed, len - 1).unwrap_err();
            assert!(bomb.contains("larger than"), "{format}: {bomb}");
            let cut = unpack(&packed[..packed.len() / 2], len);
            assert!(cut.is_err() || cut.unwrap() != kernel, "{format}");
        }
        // A dictionary of 3 GiB for nothing.
        let mut greedy = vec![0x5d, 0, 0, 0, 0xc0];
        greedy.extend([0xff; 8]);
        greedy.extend([0; 32]);
        let refused = unpack(&greedy, 1 << 20).unwrap_err();
        assert!(refused.contains("memory"), "{refused}");
        assert!(unpack(b"BZh9", 1).unwrap_err().contains("bzip2"));
        assert!(unpack(b"", 1).is_err());
    }

    fn image() -> Vec<u8> {
        let mut image = vec![0; 2048];
        image[0x1f1] = 1;
        image[0x1fe..0x200].copy_from_slice(&[0x55, 0xaa]);
        image[0x202..0x206].copy_from_slice(b"HdrS");
        image[0x206..0x208].copy_from_slice(&0x020f_u16.to_le_bytes());
        image[0x248..0x24c].copy_from_slice(&16_u32.to_le_bytes());
        image[0x24c..0x250].copy_from_slice(&100_u32.to_le_bytes());
        image
    }

    #[test]
    fn finds_payload_by_header() {
        let image = image();
        assert_eq!(BzImage::parse(&image).unwrap().payload, &image[1040..1140]);
        assert!(
            BzImage::parse(&image[..1100])
                .unwrap_err()
                .contains("truncated")
        );
        assert!(BzImage::parse(b"MZ").unwrap_err().contains("neither"));
    }

    proptest! {
        #[test]
        fn no_header_and_no_payload_makes_it_panic(
            changes in prop::collection::vec((0_usize..2048, any::<u8>()), 0..40),
            garbage in prop::collection::vec(any::<u8>(), 0..200),
            which in 0_usize..4,
        ) {
            let mut image = image();
            for (at, byte) in changes {
                image[at] = byte;
            }
            let _ = BzImage::parse(&image);
            let (_, mut packed) = packed_in_all_ways(&[7; 1000]).swap_remove(which);
            for (at, byte) in garbage.iter().enumerate() {
                let at = 8 + at * 3 % packed.len().saturating_sub(8).max(1);
                if let Some(place) = packed.get_mut(at) {
                    *place ^= byte;
                }
            }
            if let Ok(bytes) = unpack(&packed, 5000) {
                prop_assert!(bytes.len() <= 5000);
            }
        }
    }
}
