//! The client of a console's socket.

use std::collections::VecDeque;
use std::io::{self, Write};
use std::os::unix::net::UnixStream;

/// Bytes that are kept for a client that does not read them at once. A guest writes byte by byte, of
/// which a socket holds but some hundred.
pub(crate) const UNREAD: usize = 256 << 10;

pub(crate) struct Connected {
    pub(crate) stream: UnixStream,
    /// Written by the guest and not taken by the socket.
    unread: VecDeque<u8>,
}

impl Connected {
    pub(crate) fn new(stream: UnixStream) -> Self {
        Self {
            stream,
            unread: VecDeque::new(),
        }
    }

    /// Passes on what the socket takes now.
    pub(crate) fn flush(&mut self) -> io::Result<()> {
        while !self.unread.is_empty() {
            match self.stream.write(self.unread.as_slices().0) {
                Ok(0) => break,
                Ok(taken) => drop(self.unread.drain(..taken)),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    pub(crate) fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        // All or nothing: a client that falls behind misses whole writes, not parts of one, and a
        // guest cannot make this buffer grow past its limit.
        if self.unread.len() + bytes.len() > UNREAD {
            return Err(unread());
        }
        // Behind what is kept already: bytes must reach the client in the guest's order.
        self.unread.extend(bytes);
        self.flush()?;
        Ok(bytes.len())
    }
}

pub(crate) fn unread() -> io::Error {
    io::Error::new(io::ErrorKind::BrokenPipe, "the console has no reader")
}
