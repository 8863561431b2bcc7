//! Clients of the host: accepted, asked where they want to go, and given up when they do not say.

use std::io::{self, Read};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Instant;

use super::{CHAINS, MAX_REPLIES, Muxer};
use crate::vsock::connection::{Connection, Stage};
use crate::vsock::packet::Ports;
use crate::worker::TaskSources;

/// The longest `CONNECT port\n`.
const MAX_COMMAND: usize = 32;
/// The first port that is given to a connection of the host's: far from those that services use.
pub(super) const FIRST_PORT: u32 = 1 << 30;
/// A connection of the host's that has not said yet where it wants to go.
pub(super) struct Undecided {
    pub(super) stream: Arc<UnixStream>,
    pub(super) command: Vec<u8>,
    /// When it is turned away.
    pub(super) until: Instant,
}

impl Muxer {
    pub(super) fn accept(&mut self, sources: &mut TaskSources<'_, '_>) {
        // A flood of clients has its turn like everything else; `accepting` brings the task back.
        for _ in 0..CHAINS {
            let Ok((stream, _)) = self.listener.accept() else {
                self.accepting = false;
                return;
            };
            // Not either while answers pile up: a client that comes and goes causes one each.
            if !self.has_room()
                || self.replies.len() >= MAX_REPLIES
                || stream.set_nonblocking(true).is_err()
            {
                continue;
            }
            let stream = Arc::new(stream);
            let Ok(key) = self.watch_stream(&stream, sources) else {
                continue;
            };
            let undecided = Undecided {
                stream,
                command: Vec::new(),
                until: self.deadline(),
            };
            self.undecided.insert(key, undecided);
            self.listen_to(key, sources);
        }
        self.accepting = true;
    }

    pub(super) fn has_room(&self) -> bool {
        self.connections.len() + self.undecided.len() < self.limits.connections
    }

    /// When one that has to answer from now on is given up.
    pub(super) fn deadline(&mut self) -> Instant {
        let until = Instant::now() + self.limits.handshake;
        // All have the same time: an earlier one is given up earlier.
        self.next_expiry.get_or_insert(until);
        until
    }

    /// Gives up clients that did not say where they want to go, and connections that the guest did
    /// not accept, and sets the timer for the next.
    pub(super) fn expire(&mut self, sources: &mut TaskSources<'_, '_>) {
        let now = Instant::now();
        if self.next_expiry.is_some_and(|next| next <= now) {
            let mut next = None;
            let mut is_over = |until: Instant| {
                if until > now {
                    next = Some(next.map_or(until, |next: Instant| next.min(until)));
                }
                until <= now
            };
            let undecided = self.undecided.iter();
            let silent: Vec<usize> = undecided
                .filter_map(|(key, undecided)| is_over(undecided.until).then_some(*key))
                .collect();
            let connections = self.connections.iter();
            let unanswered: Vec<Ports> = connections
                .filter_map(|(ports, connection)| match connection.stage {
                    Stage::Requested { until } => is_over(until).then_some(*ports),
                    Stage::Established => None,
                })
                .collect();
            self.next_expiry = next;
            for key in silent {
                self.undecided.remove(&key);
                sources.forget(key);
            }
            for ports in unanswered {
                self.reset(ports, sources);
            }
        }
        sources.wake_at(self.next_expiry);
    }

    /// Gives all that wait for an answer their whole time again: the machine was paused.
    pub(super) fn renew_deadlines(&mut self) {
        self.next_expiry = None;
        let renewed = self.deadline();
        for undecided in self.undecided.values_mut() {
            undecided.until = renewed;
        }
        for connection in self.connections.values_mut() {
            if let Stage::Requested { until } = &mut connection.stage {
                *until = renewed;
            }
        }
    }

    /// Reads where a connection of the host's wants to go, byte by byte: what is behind the line is
    /// for the guest.
    pub(super) fn listen_to(&mut self, key: usize, sources: &mut TaskSources<'_, '_>) {
        let Some(undecided) = self.undecided.get_mut(&key) else {
            return;
        };
        let mut byte = [0];
        loop {
            match (&*undecided.stream).read(&mut byte) {
                Ok(1) if byte == *b"\n" => break,
                // Bounded, as the client may send anything before the line feed.
                Ok(1) if undecided.command.len() < MAX_COMMAND => {
                    undecided.command.push(byte[0]);
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                // The client went away, or speaks another protocol.
                _ => {
                    self.undecided.remove(&key);
                    sources.forget(key);
                    return;
                }
            }
        }
        let Some(Undecided {
            stream, command, ..
        }) = self.undecided.remove(&key)
        else {
            return;
        };
        let (Some(guest), Some(host)) = (port(&command), self.free_port()) else {
            sources.forget(key);
            return;
        };
        let ports = Ports { host, guest };
        let until = self.deadline();
        // The key stays: the stream is being watched already.
        let connection = Connection::new(stream, key, Stage::Requested { until });
        self.streams.insert(key, ports);
        self.connections.insert(ports, connection);
        self.queue(ports);
    }

    pub(super) fn free_port(&mut self) -> Option<u32> {
        for _ in 0..=self.limits.connections {
            let port = self.next_port;
            self.next_port = port.checked_add(1).unwrap_or(FIRST_PORT);
            if !self.connections.keys().any(|ports| ports.host == port) {
                return Some(port);
            }
        }
        None
    }
}

/// `CONNECT port`.
fn port(command: &[u8]) -> Option<u32> {
    let text = std::str::from_utf8(command).ok()?;
    let mut words = text.split_ascii_whitespace();
    let is_connect = words.next()?.eq_ignore_ascii_case("connect");
    let port = words.next()?.parse().ok()?;
    (is_connect && words.next().is_none()).then_some(port)
}
