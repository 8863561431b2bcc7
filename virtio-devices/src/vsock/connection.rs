//! One stream between a port of the guest and a unix socket of the host, with its credit
//! (virtio 1.3, 5.10.6.3).

use std::collections::VecDeque;
use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Instant;

use super::packet::{Header, NO_RECEIVE, NO_SEND, Op};

/// Bytes that are kept for a socket of the host that does not read.
pub(super) const BUFFER: u32 = 256 << 10;

/// The state of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Stage {
    /// A client of the host asked for the connection, and the guest has not answered yet.
    Requested {
        /// When the connection is given up.
        until: Instant,
    },
    /// Both sides may send.
    Established,
}

/// A packet that a connection owes the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Notice {
    pub(super) op: Op,
    pub(super) flags: u32,
}

impl Notice {
    pub(super) fn plain(op: Op) -> Self {
        Self { op, flags: 0 }
    }
}

/// The connection is over: the guest gets a reset.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Over;

/// A stream.
pub(super) struct Connection {
    pub(super) stream: Arc<UnixStream>,
    pub(super) stage: Stage,
    /// The name by which the event loop knows the stream.
    pub(super) key: usize,
    /// Bytes that the host's socket has not accepted yet.
    to_host: VecDeque<u8>,
    /// Bytes that the host's socket took, modulo 2^32 (`fwd_cnt`).
    forwarded: u32,
    /// The value of `forwarded` in the last packet to the guest.
    told: u32,
    /// Bytes that the guest was sent, modulo 2^32.
    sent: u32,
    guest_alloc: u32,
    guest_forwarded: u32,
    /// There may be something to read.
    readable: bool,
    /// The connection is in the list of those with packets for the guest.
    pub(super) queued: bool,
    asked_for_credit: bool,
    /// The host's socket has sent its end of stream.
    host_done: bool,
    guest_sends_no_more: bool,
    guest_receives_no_more: bool,
    notices: VecDeque<Notice>,
}

impl Connection {
    pub(super) fn new(stream: Arc<UnixStream>, key: usize, stage: Stage) -> Self {
        let first = match stage {
            Stage::Requested { .. } => Op::Request,
            Stage::Established => Op::Response,
        };
        Self {
            stream,
            stage,
            key,
            to_host: VecDeque::new(),
            forwarded: 0,
            told: 0,
            sent: 0,
            guest_alloc: 0,
            guest_forwarded: 0,
            readable: true,
            queued: false,
            asked_for_credit: false,
            host_done: false,
            guest_sends_no_more: false,
            guest_receives_no_more: false,
            notices: VecDeque::from([Notice::plain(first)]),
        }
    }

    /// Notes the guest's receive buffer and count, which each of its packets carries.
    pub(super) fn note_credit(&mut self, header: &Header) {
        self.guest_alloc = header.buf_alloc;
        self.guest_forwarded = header.fwd_cnt;
        // A guest that answers with no credit sends another update when it has some.
        self.asked_for_credit &= self.credit() == 0;
    }

    /// Bytes that the guest has room for.
    fn credit(&self) -> u32 {
        // Both count modulo 2^32 (5.10.6.3). A guest that lies about them gets no credit, or more
        // data than it has room for, and harms only itself.
        let on_the_way = self.sent.wrapping_sub(self.guest_forwarded);
        self.guest_alloc.saturating_sub(on_the_way)
    }

    /// Returns whether the connection has a packet for the guest.
    pub(super) fn has_more(&self) -> bool {
        !self.notices.is_empty() || self.can_send()
    }

    fn can_send(&self) -> bool {
        let open = self.stage == Stage::Established
            && self.readable
            && !self.host_done
            && !self.guest_receives_no_more;
        open && (self.credit() > 0 || !self.asked_for_credit)
    }

    /// The stream became readable, writable, or both.
    ///
    /// # Errors
    /// Fails if the host's socket is gone.
    pub(super) fn ready(&mut self) -> Result<(), Over> {
        self.readable = true;
        self.flush()
    }

    /// The guest has accepted what the host asked for.
    pub(super) fn establish(&mut self) {
        self.stage = Stage::Established;
        // The host may have written meanwhile, without an event.
        self.readable = true;
    }

    /// Accepts data for the host.
    ///
    /// # Errors
    /// The guest sends more than its credit, or the socket is gone.
    pub(super) fn receive(&mut self, data: &[u8]) -> Result<(), Over> {
        let room = (BUFFER as usize).saturating_sub(self.to_host.len());
        // 5.10.6.3: a sender keeps to the credit. A guest that does not loses the connection, and
        // the buffer never grows past [`BUFFER`].
        if self.stage != Stage::Established || self.guest_sends_no_more || data.len() > room {
            return Err(Over);
        }
        self.to_host.extend(data);
        self.flush()
    }

    fn flush(&mut self) -> Result<(), Over> {
        while !self.to_host.is_empty() {
            let (first, _) = self.to_host.as_slices();
            match (&*self.stream).write(first) {
                Ok(0) => return Err(Over),
                Ok(len) => {
                    self.to_host.drain(..len);
                    // A buffer of a known size.
                    self.forwarded = self.forwarded.wrapping_add(len as u32);
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => return Err(Over),
            }
        }
        // A guest that got no update would stop sending when it has used up the room that it knows of.
        if self.forwarded.wrapping_sub(self.told) > BUFFER / 4 {
            self.notice(Notice::plain(Op::CreditUpdate));
        }
        if self.guest_sends_no_more && self.to_host.is_empty() {
            // The guest is done in both directions and all its data was passed on: the device ends the
            // connection by a reset (5.10.6.5).
            if self.guest_receives_no_more {
                return Err(Over);
            }
            // The client reads the end of the stream.
            let _ = self.stream.shutdown(Shutdown::Write);
        }
        Ok(())
    }

    /// Answers a guest that wants to know its credit.
    pub(super) fn tell_credit(&mut self) {
        self.notice(Notice::plain(Op::CreditUpdate));
    }

    fn notice(&mut self, notice: Notice) {
        // Each notice once: a guest cannot make this list longer than there are kinds of notices.
        if !self.notices.contains(&notice) {
            self.notices.push_back(notice);
        }
    }

    /// The guest will not send, or not receive, any more.
    ///
    /// # Errors
    /// Fails if nothing is left to do.
    pub(super) fn shut_down(&mut self, flags: u32) -> Result<(), Over> {
        self.guest_sends_no_more |= flags & NO_SEND != 0;
        self.guest_receives_no_more |= flags & NO_RECEIVE != 0;
        if self.guest_receives_no_more {
            let _ = self.stream.shutdown(Shutdown::Read);
        }
        self.flush()
    }

    /// Returns the next packet for the guest, if there is one: a notice, or a packet of data, whose bytes
    /// are put into `data`. If `data` has no room the packet is empty, and the bytes stay in the host's
    /// socket for the next buffer.
    ///
    /// # Errors
    /// Fails if the socket is gone.
    pub(super) fn produce(&mut self, data: &mut [u8]) -> Result<Option<(Notice, usize)>, Over> {
        if let Some(notice) = self.notices.pop_front() {
            return Ok(Some((notice, 0)));
        }
        if !self.can_send() {
            return Ok(None);
        }
        let room = usize::try_from(self.credit()).unwrap_or(usize::MAX);
        if room == 0 {
            self.asked_for_credit = true;
            return Ok(Some((Notice::plain(Op::CreditRequest), 0)));
        }
        if data.is_empty() {
            // A read of no bytes would look like the end of the stream.
            return Ok(Some((Notice::plain(Op::Data), 0)));
        }
        let room = room.min(data.len());
        match (&*self.stream).read(data.get_mut(..room).unwrap_or_default()) {
            Ok(0) => {
                // The guest may still send: only this direction is over.
                self.host_done = true;
                let flags = NO_SEND;
                Ok(Some((
                    Notice {
                        op: Op::Shutdown,
                        flags,
                    },
                    0,
                )))
            }
            Ok(len) => {
                self.sent = self.sent.wrapping_add(len as u32);
                Ok(Some((Notice::plain(Op::Data), len)))
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                self.readable = false;
                Ok(None)
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => Ok(None),
            Err(_) => Err(Over),
        }
    }

    /// Returns `buf_alloc` and `fwd_cnt` for a packet to the guest.
    pub(super) fn room(&mut self) -> (u32, u32) {
        self.told = self.forwarded;
        (BUFFER, self.forwarded)
    }
}
