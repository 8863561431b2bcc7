//! Descriptors that clients send along with their requests over a unix socket (`SCM_RIGHTS`, unix(7)).
//!
//! They arrive with a byte of the request, as a rule its first. A plain read of the stream loses them
//! without an error.
//!
//! ```text
//!  socket ── Receiving ──► bytes ──► HTTP ──► request, with Enclosed ──► body read, descriptors taken
//!                │                                  ▲
//!                └── Arrived: descriptors ──────────┘
//! ```

use std::io::{self, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use parking_lot::Mutex;
use rustix::io::retry_on_intr;
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, recvmsg};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use crate::activity::Activity;
use crate::limits::DESCRIPTORS_MAX;
use crate::peer::Peer;

/// Maximum number of descriptors in one message (`SCM_MAX_FD`).
const OF_ONE_MESSAGE: usize = 253;
/// Bytes to read at a time.
const PIECE: usize = 64 << 10;

/// Descriptors that came over a connection and that no request has taken yet.
#[derive(Clone, Debug, Default)]
pub(crate) struct Arrived(Arc<Mutex<Vec<OwnedFd>>>);

impl Arrived {
    /// For a request whose head has just been read.
    pub(crate) fn enclose(&self) -> Enclosed {
        Enclosed {
            with_head: Self(Arc::new(Mutex::new(self.take()))),
            later: self.clone(),
        }
    }

    fn take(&self) -> Vec<OwnedFd> {
        std::mem::take(&mut *self.0.lock())
    }
}

/// Descriptors that came with a request. Those that no handler takes are closed.
#[derive(Clone, Debug)]
pub(crate) struct Enclosed {
    with_head: Arrived,
    later: Arrived,
}

impl Enclosed {
    /// All of them, once the body has been read.
    pub(crate) fn take(&self) -> Vec<OwnedFd> {
        let mut all = self.with_head.take();
        all.append(&mut self.later.take());
        all
    }
}

/// A connection that keeps the descriptors that come over it.
#[derive(Debug)]
pub(crate) struct Receiving {
    peer: Peer,
    arrived: Arrived,
    activity: Activity,
}

impl Receiving {
    pub(crate) fn new(peer: Peer, activity: Activity) -> Self {
        Self {
            peer,
            arrived: Arrived::default(),
            activity,
        }
    }

    pub(crate) fn arrived(&self) -> Arrived {
        self.arrived.clone()
    }

    fn receive(&self, to: &mut ReadBuf<'_>) -> io::Result<()> {
        let room = to.remaining().min(PIECE);
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(OF_ONE_MESSAGE))];
        let mut ancillary = RecvAncillaryBuffer::new(&mut space);
        let mut pieces = [IoSliceMut::new(to.initialize_unfilled_to(room))];
        let flags = RecvFlags::CMSG_CLOEXEC;
        let received = retry_on_intr(|| recvmsg(&self.peer, &mut pieces, &mut ancillary, flags))?;
        let mut arrived = self.arrived.0.lock();
        for message in ancillary.drain() {
            if let RecvAncillaryMessage::ScmRights(descriptors) = message {
                arrived.extend(descriptors);
            }
        }
        if received.flags.contains(ReturnFlags::CTRUNC) {
            let reason =
                "fewer descriptors arrived than were sent: the limit of open files may be reached";
            return Err(io::Error::other(reason));
        }
        if arrived.len() > DESCRIPTORS_MAX {
            let reason = "more descriptors were sent than any request accepts";
            return Err(io::Error::other(reason));
        }
        if received.bytes > 0 {
            self.activity.received();
        }
        to.advance(received.bytes);
        Ok(())
    }
}

impl AsyncRead for Receiving {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if buf.remaining() == 0 {
            return Poll::Ready(Ok(()));
        }
        self.peer.poll_read(cx, || self.receive(buf))
    }
}

impl AsyncWrite for Receiving {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.peer.poll_write(cx, &[io::IoSlice::new(buf)])
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.peer.poll_write(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    /// Sockets keep nothing back.
    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(self.peer.end_output())
    }
}
