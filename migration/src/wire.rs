//! Frames: what every channel is made of (docs/migration-protocol.md).
//!
//! ```text
//!   kind u16 | 0 u16 | length of the body u32 | CRC-32 of the eight bytes before and the body u32 | body
//! ```
//!
//! Little endian. A frame that is longer than its kind may be, of a kind that does not belong on its
//! channel, or whose checksum is wrong ends the migration.

use std::io::{self, IoSlice, Read, Write};

/// Bytes in front of a body.
pub(crate) const HEADER_LEN: usize = 12;

/// Frames up to this length are copied into one buffer and sent by one call.
const IN_ONE_PIECE: usize = 16 << 10;

/// Bytes that are allocated for a body before any of it has arrived.
const FIRST_PIECE: usize = 64 << 10;

/// Kinds of frames.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u16)]
pub(crate) enum Kind {
    /// The first on every channel: names the migration and the channel.
    Hello = 1,
    /// A message of the control channel.
    Control = 2,
    /// Saved state, on the control channel.
    State = 3,
    /// Pages and what is in them.
    Pages = 16,
    /// Pages of zeros.
    Zeros = 17,
    /// A RAM channel has sent all of a round.
    End = 18,
    /// Pages that come after the guest.
    Missing = 19,
    /// Hashes of pages, in verify mode.
    Hashes = 20,
    /// A page that is waited for.
    Fault = 32,
}

impl Kind {
    fn of(raw: u16) -> Option<Self> {
        [
            Self::Hello,
            Self::Control,
            Self::State,
            Self::Pages,
            Self::Zeros,
            Self::End,
            Self::Missing,
            Self::Hashes,
            Self::Fault,
        ]
        .into_iter()
        .find(|kind| *kind as u16 == raw)
    }

    /// Maximum length of the body of such a frame.
    fn most(self) -> usize {
        match self {
            Self::Hello => 4 << 10,
            Self::Control => 1 << 20,
            // What saved state may have, and its checksums.
            Self::State => 80 << 20,
            Self::Pages => crate::pages::MOST,
            Self::Zeros | Self::End | Self::Missing | Self::Hashes | Self::Fault => 64 << 10,
        }
    }
}

/// A frame cannot be read or written.
#[derive(Debug, thiserror::Error)]
pub enum WireError {
    /// The connection is gone.
    #[error("the connection failed: {0}")]
    Connection(io::Error),
    /// Nothing could be received or sent for longer than `patience`.
    #[error("the other side has been silent for too long")]
    Silent,
    /// The stream was closed in order.
    #[error("the other side closed the connection")]
    Closed,
    /// The answer of an HTTP server.
    #[error(
        "the other side is an HTTP server, as the socket of an API is; name the endpoint of a `receive` \
         (or of `--accept-migrations`) at the destination"
    )]
    Http,
    /// Invalid bytes, or a frame that is not allowed here.
    #[error("the stream is damaged: {0}")]
    Damaged(String),
}

impl From<io::Error> for WireError {
    fn from(error: io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => Self::Silent,
            _ => Self::Connection(error),
        }
    }
}

impl WireError {
    pub(crate) fn damaged(why: impl Into<String>) -> Self {
        Self::Damaged(why.into())
    }
}

fn checksum(head: &[u8], parts: &[&[u8]]) -> u32 {
    let mut crc = crc32fast::Hasher::new();
    crc.update(head);
    parts.iter().for_each(|part| crc.update(part));
    crc.finalize()
}

/// Writes a frame, whose body is given in parts.
pub(crate) fn write(to: &mut dyn Write, kind: Kind, parts: &[&[u8]]) -> Result<(), WireError> {
    let len: usize = parts.iter().map(|part| part.len()).sum();
    if len > kind.most() {
        let why = format!("a frame of {len} bytes exceeds the limit");
        return Err(io::Error::new(io::ErrorKind::InvalidInput, why).into());
    }
    let mut header = [0; HEADER_LEN];
    header[..2].copy_from_slice(&(kind as u16).to_le_bytes());
    // Below the limits of the kinds, which fit.
    header[4..8].copy_from_slice(&(len as u32).to_le_bytes());
    // TCP's 16-bit checksum misses some damage, and a flipped bit in guest memory would go unseen.
    // The header is covered as well: a wrong length would misread all that follows.
    let crc = checksum(&header[..8], parts);
    header[8..].copy_from_slice(&crc.to_le_bytes());
    if len > IN_ONE_PIECE {
        let mut slices = Vec::with_capacity(parts.len() + 1);
        slices.push(IoSlice::new(&header));
        slices.extend(parts.iter().map(|part| IoSlice::new(part)));
        write_all(to, &mut slices)?;
    } else {
        // The other side need not wait for a second packet.
        let mut whole = Vec::with_capacity(HEADER_LEN + len);
        whole.extend_from_slice(&header);
        parts.iter().for_each(|part| whole.extend_from_slice(part));
        to.write_all(&whole)?;
    }
    // TLS may still hold records in its buffer.
    uninterrupted(|| to.flush())?;
    Ok(())
}

/// Writes all of these slices, in one call where the stream takes them: a header that is sent by itself
/// wakes the other side for twelve bytes.
fn write_all(to: &mut dyn Write, mut slices: &mut [IoSlice<'_>]) -> io::Result<()> {
    // Skips empty slices: a write of 0 bytes for one would look like a closed stream.
    IoSlice::advance_slices(&mut slices, 0);
    while !slices.is_empty() {
        match uninterrupted(|| to.write_vectored(slices))? {
            0 => return Err(io::ErrorKind::WriteZero.into()),
            written => IoSlice::advance_slices(&mut slices, written),
        }
    }
    Ok(())
}

/// Repeats an operation that a signal interrupts.
///
/// A socket with a timeout (`SO_RCVTIMEO`) fails with `EINTR` when its process is stopped and
/// continued (SIGSTOP, SIGCONT; signal(7)), also where no signal handler is installed: a suspended
/// service or a debugger must not look like a lost connection. `read_exact`, `read_to_end` and
/// `write_all` repeat by themselves; a bare `read` or `flush` does not.
fn uninterrupted<T>(mut operation: impl FnMut() -> io::Result<T>) -> io::Result<T> {
    loop {
        match operation() {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            done => return done,
        }
    }
}

/// Reads frames into a buffer that is used again.
#[derive(Default)]
pub(crate) struct Reader {
    /// Its beginning is the body of the last frame.
    body: Vec<u8>,
}

impl Reader {
    /// The next frame, which must be one of `allowed`.
    pub(crate) fn read(
        &mut self,
        from: &mut dyn Read,
        allowed: &[Kind],
    ) -> Result<(Kind, &[u8]), WireError> {
        let mut header = [0; HEADER_LEN];
        // Not `read_exact`: an end in front of a frame is a close in order, an end inside a frame
        // is a lost connection.
        match uninterrupted(|| from.read(&mut header))? {
            0 => return Err(WireError::Closed),
            some => from.read_exact(header.get_mut(some..).unwrap_or_default())?,
        }
        if header.starts_with(b"HTTP/") {
            return Err(WireError::Http);
        }
        let [k0, k1, r0, r1, l0, l1, l2, l3, c0, c1, c2, c3] = header;
        let raw = u16::from_le_bytes([k0, k1]);
        let kind = Kind::of(raw).filter(|kind| allowed.contains(kind) && (r0, r1) == (0, 0));
        let kind =
            kind.ok_or_else(|| WireError::damaged(format!("unexpected frame of kind {raw:#x}")))?;
        let len = u32::from_le_bytes([l0, l1, l2, l3]) as usize;
        if len > kind.most() {
            let why = format!("a frame's length of {len} bytes exceeds its limit");
            return Err(WireError::Damaged(why));
        }
        let body = self.read_body(from, len)?;
        if checksum(&header[..8], &[body]) != u32::from_le_bytes([c0, c1, c2, c3]) {
            return Err(WireError::damaged("the checksum of a frame is wrong"));
        }
        Ok((kind, body))
    }

    fn read_body(&mut self, from: &mut dyn Read, len: usize) -> Result<&[u8], WireError> {
        let mut got = 0;
        while got < len {
            if got == self.body.len() {
                // What is not sent is not allocated: a length alone costs little. The buffer is used
                // again, so that it is cleared once, and not for each frame.
                let more = (2 * got).clamp(FIRST_PIECE, len.max(FIRST_PIECE));
                self.body.resize(more, 0);
            }
            let room = self.body.len().min(len);
            let part = self.body.get_mut(got..room).unwrap_or_default();
            match uninterrupted(|| from.read(part))? {
                0 => return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into()),
                some => got += some,
            }
        }
        Ok(self.body.get(..len).unwrap_or_default())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn frame_format_is_stable() {
        let mut bytes = Vec::new();
        write(&mut bytes, Kind::End, &[&[1, 2], &[3]]).unwrap();
        assert_eq!(bytes, [18, 0, 0, 0, 3, 0, 0, 0, 116, 143, 8, 6, 1, 2, 3]);
    }

    /// A stream on which a signal interrupts every second call.
    #[derive(Default)]
    struct Interrupted {
        bytes: std::collections::VecDeque<u8>,
        calls: u32,
    }

    impl Interrupted {
        fn call(&mut self) -> io::Result<()> {
            self.calls += 1;
            if self.calls % 2 == 1 {
                return Err(io::ErrorKind::Interrupted.into());
            }
            Ok(())
        }
    }

    impl Read for Interrupted {
        fn read(&mut self, data: &mut [u8]) -> io::Result<usize> {
            self.call()?;
            // Few at a time, so that each frame needs many calls.
            let few = data.len().min(5);
            self.bytes.read(&mut data[..few])
        }
    }

    impl Write for Interrupted {
        fn write(&mut self, data: &[u8]) -> io::Result<usize> {
            self.call()?;
            let few = data.len().min(5);
            self.bytes.write(&data[..few])
        }

        fn flush(&mut self) -> io::Result<()> {
            self.call()
        }
    }

    /// A migration that is sent to the socket of an API.
    #[test]
    fn http_server_is_recognised() {
        let answer = b"HTTP/1.1 400 Bad Request\r\ncontent-length: 0\r\n\r\n";
        let read = Reader::default()
            .read(&mut &answer[..], &[Kind::Hello])
            .map(|(kind, _)| kind);
        let error = crate::MigrationError::Wire(read.unwrap_err()).refusal();
        assert_eq!(error.code, "not-a-destination");
        assert!(error.detail.contains("HTTP server"), "{error:?}");
    }

    #[test]
    fn an_interrupted_call_is_repeated() {
        let mut stream = Interrupted::default();
        for len in [0, 1, 100, IN_ONE_PIECE + 1] {
            let body = vec![7; len];
            write(&mut stream, Kind::State, &[&body]).unwrap();
            let mut reader = Reader::default();
            let (_, read) = reader.read(&mut stream, &[Kind::State]).unwrap();
            assert!(read == body);
        }
    }

    proptest! {
        #[test]
        fn frames_survive_and_detect_bit_flips(
            body in prop::collection::vec(any::<u8>(), 0..200),
            bit in any::<prop::sample::Index>(),
        ) {
            let mut bytes = Vec::new();
            write(&mut bytes, Kind::Control, &[&body]).unwrap();
            let mut reader = Reader::default();
            let (kind, read) = reader.read(&mut &bytes[..], &[Kind::Control]).unwrap();
            prop_assert_eq!((kind, read), (Kind::Control, &body[..]));
            let bit = bit.index(bytes.len() * 8);
            bytes[bit / 8] ^= 1 << (bit % 8);
            prop_assert!(reader.read(&mut &bytes[..], &[Kind::Control, Kind::End]).is_err());
        }

        #[test]
        fn no_bytes_make_it_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let _ = Reader::default().read(&mut &bytes[..], &[Kind::Pages, Kind::Control]);
        }
    }
}
