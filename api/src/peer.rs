//! The client at the other end of a connection: whether it is still there.
//!
//! A client that shuts down its sending side may still wait for its answer, so the end of what it
//! sends does not end a connection. A stream of events would then keep the slot of a client that
//! is gone until the next line is written to it. The stream therefore asks the socket:
//!
//! ```text
//!  client                     seen by the socket            stream
//!  closes a unix socket       hang-up                       ends
//!  closes a TCP socket        end of input; a reset         writes a comment line, which is
//!                             answers the next bytes        reset; then hang-up: ends
//!  shuts its sending side     end of input                  stays
//! ```

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{Shutdown, shutdown};
use tokio::io::Interest;
use tokio::net::{TcpStream, UnixStream};

/// How often a socket whose input has ended is asked whether its client hung up.
const RECHECK: Duration = Duration::from_millis(200);

/// A connection's socket, shared by the stream that carries HTTP and by handlers that ask for its
/// client.
#[derive(Clone, Debug)]
pub(crate) enum Peer {
    Unix(Arc<UnixStream>),
    Tcp(Arc<TcpStream>),
}

impl Peer {
    /// Waits until the client has sent all that it will: it shut its sending side, or is gone.
    pub(crate) async fn sent_all(&self) {
        // Tokio counts the end of input as readiness for priority data.
        let ended = match self {
            Self::Unix(stream) => stream.ready(Interest::PRIORITY).await,
            Self::Tcp(stream) => stream.ready(Interest::PRIORITY).await,
        };
        if let Err(error) = ended {
            tracing::debug!(%error, "a connection cannot be watched");
        }
    }

    /// Waits until the client is gone, which must have [sent all](Self::sent_all).
    pub(crate) async fn gone(&self) {
        while !self.has_hung_up() {
            tokio::time::sleep(RECHECK).await;
        }
    }

    fn has_hung_up(&self) -> bool {
        let fd = self.as_fd();
        // Hang-ups and errors are reported without being asked for.
        let mut asked = [PollFd::new(&fd, PollFlags::empty())];
        let now = Timespec {
            tv_sec: 0,
            tv_nsec: 0,
        };
        match poll(&mut asked, Some(&now)) {
            Ok(_) => asked[0]
                .revents()
                .intersects(PollFlags::HUP | PollFlags::ERR),
            Err(error) => io::Error::from(error).kind() != io::ErrorKind::Interrupted,
        }
    }
}

impl AsFd for Peer {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Unix(stream) => stream.as_fd(),
            Self::Tcp(stream) => stream.as_fd(),
        }
    }
}

/// The stream's methods. Tokio implements its traits only for sockets with one owner.
impl Peer {
    /// Calls `read` when there may be something to read, until it does not fail by `WouldBlock`.
    pub(crate) fn poll_read(
        &self,
        cx: &mut Context<'_>,
        mut read: impl FnMut() -> io::Result<()>,
    ) -> Poll<io::Result<()>> {
        loop {
            let done = match self {
                Self::Unix(stream) => {
                    ready!(stream.poll_read_ready(cx))?;
                    stream.try_io(Interest::READABLE, &mut read)
                }
                Self::Tcp(stream) => {
                    ready!(stream.poll_read_ready(cx))?;
                    stream.try_io(Interest::READABLE, &mut read)
                }
            };
            if !is_retried(&done) {
                return Poll::Ready(done);
            }
        }
    }

    pub(crate) fn poll_write(
        &self,
        cx: &mut Context<'_>,
        pieces: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        loop {
            let done = match self {
                Self::Unix(stream) => {
                    ready!(stream.poll_write_ready(cx))?;
                    stream.try_write_vectored(pieces)
                }
                Self::Tcp(stream) => {
                    ready!(stream.poll_write_ready(cx))?;
                    stream.try_write_vectored(pieces)
                }
            };
            if !is_retried(&done) {
                return Poll::Ready(done);
            }
        }
    }

    /// Ends what is sent to the client.
    pub(crate) fn end_output(&self) -> io::Result<()> {
        Ok(shutdown(self, Shutdown::Write)?)
    }
}

fn is_retried<T>(done: &io::Result<T>) -> bool {
    let kind = done.as_ref().err().map(io::Error::kind);
    matches!(
        kind,
        Some(io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted)
    )
}
