//! Reading ahead below a TLS session.

use std::io::{self, IoSlice, Read, Write};
use std::ops::Range;
use std::time::Duration;

use crate::link::{Closer, Stream};

/// Bytes that are read at a time: eight records.
const AHEAD: usize = 128 << 10;

/// A connection that is read in large pieces. rustls asks for 4 KiB, a quarter of a record, and each
/// would be a system call.
pub(super) struct ReadAhead {
    stream: Box<dyn Stream>,
    /// Empty before [`AHEAD`] bytes were read: most connections carry less, and strangers can open
    /// hundreds.
    buffer: Vec<u8>,
    /// The part of the buffer that was not taken yet.
    left: Range<usize>,
    /// Bytes that were read without a buffer.
    unbuffered: usize,
}

impl ReadAhead {
    pub(super) fn new(stream: Box<dyn Stream>) -> Self {
        Self {
            stream,
            buffer: Vec::new(),
            left: 0..0,
            unbuffered: 0,
        }
    }
}

impl Read for ReadAhead {
    fn read(&mut self, data: &mut [u8]) -> io::Result<usize> {
        if self.left.is_empty() {
            if self.unbuffered < AHEAD {
                let read = self.stream.read(data)?;
                self.unbuffered = self.unbuffered.saturating_add(read);
                return Ok(read);
            }
            if data.len() >= AHEAD {
                return self.stream.read(data);
            }
            self.buffer.resize(AHEAD, 0);
            self.left = 0..self.stream.read(&mut self.buffer)?;
        }
        let read = self.left.len().min(data.len());
        let from = self.left.start..self.left.start + read;
        if let (Some(to), Some(from)) = (data.get_mut(..read), self.buffer.get(from)) {
            to.copy_from_slice(from);
        }
        self.left.start += read;
        Ok(read)
    }
}

impl Write for ReadAhead {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        self.stream.write(data)
    }

    fn write_vectored(&mut self, parts: &[IoSlice<'_>]) -> io::Result<usize> {
        self.stream.write_vectored(parts)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.stream.flush()
    }
}

impl Stream for ReadAhead {
    fn limit_unsent(&self, bytes: u32) -> io::Result<()> {
        self.stream.limit_unsent(bytes)
    }

    fn set_patience(&self, patience: Duration) -> io::Result<()> {
        self.stream.set_patience(patience)
    }

    fn closer(&self) -> io::Result<Closer> {
        self.stream.closer()
    }

    fn read_closer(&self) -> io::Result<Closer> {
        self.stream.read_closer()
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;
    use std::thread;

    use super::*;

    #[test]
    fn all_bytes_come_in_order_however_they_are_read() {
        let (near, mut far) = UnixStream::pair().unwrap();
        let sent: Vec<u8> = (0..5 * AHEAD).map(|at| (at / 7) as u8).collect();
        let copy = sent.clone();
        let writer = thread::spawn(move || {
            // A part that ends within the buffer, and the rest behind a pause.
            let (first, rest) = copy.split_at(2 * AHEAD + 5);
            far.write_all(first).unwrap();
            far.write_all(rest).unwrap();
        });
        let mut reader = ReadAhead::new(Box::new(near));
        let mut received = Vec::new();
        for len in [1, 4096, 100, AHEAD, 16 << 10, 3].into_iter().cycle() {
            let mut piece = vec![0; len];
            match reader.read(&mut piece).unwrap() {
                0 => break,
                read => received.extend_from_slice(&piece[..read]),
            }
            // A connection that carries little has no buffer.
            assert!(received.len() > AHEAD || reader.buffer.is_empty());
        }
        assert_eq!(reader.buffer.len(), AHEAD);
        writer.join().unwrap();
        assert!(received == sent);
    }
}
