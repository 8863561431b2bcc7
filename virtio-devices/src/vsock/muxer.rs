//! All connections of a guest, and the queues that they share.

mod clients;
#[cfg(test)]
mod tests;

use std::collections::{HashMap, VecDeque};
use std::io::{self, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

use devices::event_loop::Interest;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with};

use self::clients::{FIRST_PORT, Undecided};
use super::connection::{Connection, Notice, Over, Stage};
use super::packet::{HEADER_LEN, HOST_CID, Header, Op, Ports, STREAM};
use super::{Counters, EVENT, QUEUES, RX, TX, VsockLimits};
use crate::queue::{Budget, Chain, Queue, QueueError, QueueState, Served};
use crate::worker::{QueueTask, TaskEvent, TaskFlow, TaskSources};

/// Packets of one turn in each direction, and clients that are accepted in one.
const CHAINS: usize = 64;
/// Replies that may wait for room in the guest's receive queue. While there are this many, no packet of the
/// guest is taken.
const MAX_REPLIES: usize = 256;
/// Bytes of data of one packet.
const MAX_DATA: usize = 64 << 10;
/// `VIRTIO_VSOCK_EVENT_TRANSPORT_RESET`.
const TRANSPORT_RESET: [u8; 4] = [0; 4];

/// Keys of the event loop: the queues' kicks are 0 to 2.
const LISTENER: usize = 3;
const FIRST_STREAM: usize = 4;

/// The task that serves all three queues.
pub(super) struct Muxer {
    cid: u64,
    path: PathBuf,
    listener: Arc<UnixListener>,
    counters: Arc<Counters>,
    limits: VsockLimits,
    queues: [Option<Queue>; QUEUES],
    /// A queue was added whose kick is not watched yet.
    unwatched: bool,
    connections: HashMap<Ports, Connection>,
    streams: HashMap<usize, Ports>,
    undecided: HashMap<usize, Undecided>,
    /// When the first of those that wait for an answer is given up, or earlier.
    next_expiry: Option<Instant>,
    /// The listener may have clients that were not accepted yet.
    accepting: bool,
    replies: VecDeque<Header>,
    /// No packet of the guest is taken before it makes room for replies.
    stalled: bool,
    /// Connections that have something for the guest, each once.
    ready: VecDeque<Ports>,
    /// The guest must get a transport reset event: all its connections are gone.
    pub(super) reset_guest: bool,
    next_key: usize,
    next_port: u32,
    scratch: Vec<u8>,
}

impl Muxer {
    pub(super) fn new(
        cid: u64,
        path: &Path,
        listener: Arc<UnixListener>,
        counters: Arc<Counters>,
        limits: VsockLimits,
    ) -> Self {
        Self {
            cid,
            path: path.to_owned(),
            listener,
            counters,
            limits,
            queues: [const { None }; QUEUES],
            unwatched: false,
            connections: HashMap::new(),
            streams: HashMap::new(),
            undecided: HashMap::new(),
            next_expiry: None,
            accepting: false,
            replies: VecDeque::new(),
            stalled: false,
            ready: VecDeque::new(),
            reset_guest: false,
            next_key: FIRST_STREAM,
            next_port: FIRST_PORT,
            scratch: vec![0; MAX_DATA],
        }
    }

    /// Puts a queue in.
    pub(super) fn put(&mut self, queue: Queue) -> bool {
        let slot = self.queues.get_mut(usize::from(queue.index()));
        let there = slot.is_some();
        if let Some(slot) = slot {
            *slot = Some(queue);
            self.unwatched = true;
        }
        there
    }

    /// Takes a queue out.
    pub(super) fn take(&mut self, index: u16) -> Option<QueueState> {
        let queue = self.queues.get_mut(usize::from(index))?.take()?;
        Some(queue.state())
    }

    pub(super) fn state(&self, index: u16) -> Option<QueueState> {
        Some(self.queues.get(usize::from(index))?.as_ref()?.state())
    }

    pub(super) fn is_idle(&self) -> bool {
        self.queues.iter().all(Option::is_none)
    }

    /// Ends all connections, of which the guest knows nothing any more.
    pub(super) fn forget_all(&mut self) {
        self.connections.clear();
        self.streams.clear();
        self.undecided.clear();
        self.replies.clear();
        self.ready.clear();
    }

    fn watch_queues(&mut self, sources: &mut TaskSources<'_, '_>) -> io::Result<()> {
        self.unwatched = false;
        for (key, queue) in self.queues.iter().enumerate() {
            if let Some(queue) = queue {
                sources.watch(Arc::clone(queue.kick()), key, Interest::Read)?;
            }
        }
        Ok(())
    }

    /// A key for a new stream, which is watched from now on.
    fn watch_stream(
        &mut self,
        stream: &Arc<UnixStream>,
        sources: &mut TaskSources<'_, '_>,
    ) -> io::Result<usize> {
        let key = self.next_key;
        // Edge-triggered: `readable` and the queued bytes of the connection remember what an edge
        // said.
        sources.watch(Arc::clone(stream), key, Interest::Both)?;
        self.next_key += 1;
        Ok(key)
    }

    // To the guest.

    fn queue(&mut self, ports: Ports) {
        if let Some(connection) = self.connections.get_mut(&ports)
            && !connection.queued
            && connection.has_more()
        {
            connection.queued = true;
            self.ready.push_back(ports);
        }
    }

    fn header(&self, ports: Ports, notice: Notice, len: usize, room: (u32, u32)) -> Header {
        Header {
            src_cid: HOST_CID,
            dst_cid: self.cid,
            src_port: ports.host,
            dst_port: ports.guest,
            len: u32::try_from(len).unwrap_or(u32::MAX),
            kind: STREAM,
            op: Some(notice.op),
            flags: notice.flags,
            buf_alloc: room.0,
            fwd_cnt: room.1,
        }
    }

    fn forget(&mut self, ports: Ports, sources: &mut TaskSources<'_, '_>) {
        if let Some(gone) = self.connections.remove(&ports) {
            self.streams.remove(&gone.key);
            // Before the stream is closed with the last reference: its number may come to mean
            // another file.
            sources.forget(gone.key);
            if gone.queued {
                // Another connection may have the same ports soon, and an entry of its own.
                self.ready.retain(|ready| *ready != ports);
            }
        }
    }

    fn reset(&mut self, ports: Ports, sources: &mut TaskSources<'_, '_>) {
        self.forget(ports, sources);
        let reset = self.header(ports, Notice::plain(Op::Reset), 0, (0, 0));
        self.replies.push_back(reset);
    }

    /// Returns the header of the next packet for the guest. Its data, at most `most` bytes, is in `scratch`.
    fn next_packet(&mut self, most: usize, sources: &mut TaskSources<'_, '_>) -> Option<Header> {
        if let Some(reply) = self.replies.pop_front() {
            return Some(reply);
        }
        while let Some(ports) = self.ready.pop_front() {
            let Some(connection) = self.connections.get_mut(&ports) else {
                continue;
            };
            connection.queued = false;
            let data = self.scratch.get_mut(..most.min(MAX_DATA));
            match connection.produce(data.unwrap_or_default()) {
                Ok(Some((notice, len))) => {
                    let room = connection.room();
                    let header = self.header(ports, notice, len, room);
                    // Behind the others: none keeps the queue to itself.
                    self.queue(ports);
                    return Some(header);
                }
                Ok(None) => {}
                Err(Over) => {
                    self.reset(ports, sources);
                    return self.replies.pop_front();
                }
            }
        }
        None
    }

    /// Sends packets to the guest while there are both packets and room.
    fn send(&mut self, sources: &mut TaskSources<'_, '_>) -> Result<TaskFlow, QueueError> {
        if self.replies.is_empty() && self.ready.is_empty() {
            // Room without packets needs no kick.
            return Ok(TaskFlow::Wait);
        }
        self.turn(RX, |muxer, queue, chain| {
            let most = chain.writable_len().saturating_sub(HEADER_LEN);
            let Some(header) = muxer.next_packet(most, sources) else {
                return Ok(Served::NotYet);
            };
            chain.write(0, &header.bytes())?;
            let len = header.len as usize;
            let data = muxer.scratch.get(..len).unwrap_or_default();
            chain.write(HEADER_LEN, data)?;
            queue.push(chain.head(), header.len.saturating_add(HEADER_LEN as u32))?;
            let counters = &muxer.counters;
            counters.rx_packets.fetch_add(1, Ordering::Relaxed);
            counters.rx_bytes.fetch_add(len as u64, Ordering::Relaxed);
            Ok(Served::Bytes(len as u64))
        })
    }

    /// Receives packets from the guest, until [`MAX_REPLIES`] replies wait for room.
    fn receive(&mut self, sources: &mut TaskSources<'_, '_>) -> Result<TaskFlow, QueueError> {
        self.stalled = false;
        self.turn(TX, |muxer, queue, chain| {
            // Most packets are answered (5.10.6.1). A guest that sends and never makes room would
            // otherwise fill the host's memory with answers.
            muxer.stalled = muxer.replies.len() >= MAX_REPLIES;
            if muxer.stalled {
                // The guest kicks the receive queue when it has made room.
                return Ok(Served::NotYet);
            }
            let bytes = chain.readable_len() as u64;
            muxer.packet(&chain, sources)?;
            queue.push(chain.head(), 0)?;
            Ok(Served::Bytes(bytes))
        })
    }

    /// Has a turn of one queue, if the driver uses it. The queue leaves its slot meanwhile, since `serve`
    /// changes the muxer.
    fn turn(
        &mut self,
        index: usize,
        mut serve: impl FnMut(&mut Self, &mut Queue, Chain) -> Result<Served, QueueError>,
    ) -> Result<TaskFlow, QueueError> {
        let Some(mut queue) = self.queues.get_mut(index).and_then(Option::take) else {
            return Ok(TaskFlow::Wait);
        };
        let flow = queue.turn(Budget::new(CHAINS), |queue, chain| {
            serve(self, queue, chain)
        });
        // Also after an error: the device's stop takes the queue from here.
        self.queues[index] = Some(queue);
        flow
    }

    fn packet(
        &mut self,
        chain: &Chain,
        sources: &mut TaskSources<'_, '_>,
    ) -> Result<(), QueueError> {
        let mut raw = [0; HEADER_LEN];
        chain.read(0, &mut raw)?;
        let header = Header::parse(&raw);
        // The guest claims the length: it is limited before it becomes an allocation.
        let mut data = vec![0; (header.len as usize).min(MAX_DATA)];
        chain.read(HEADER_LEN, &mut data)?;
        self.counters.tx_packets.fetch_add(1, Ordering::Relaxed);
        let bytes = data.len() as u64;
        self.counters.tx_bytes.fetch_add(bytes, Ordering::Relaxed);
        let ports = header.ports();
        let addressed = header.src_cid == self.cid
            && header.dst_cid == HOST_CID
            && header.kind == STREAM
            && header.len as usize <= MAX_DATA;
        match header.op {
            // No answer to a reset, or two sides that know nothing would reset each other for good.
            Some(Op::Reset) => {
                self.forget(ports, sources);
                return Ok(());
            }
            Some(Op::Request) if addressed => {
                self.connect(ports, &header, sources);
                return Ok(());
            }
            Some(op) if addressed => {
                let heard = match self.connections.get_mut(&ports) {
                    Some(connection) => {
                        connection.note_credit(&header);
                        obey(connection, op, &header, &data, ports)
                    }
                    None => Err(Over),
                };
                match heard {
                    Ok(()) => self.queue(ports),
                    Err(Over) => self.reset(ports, sources),
                }
            }
            _ => self.reset(ports, sources),
        }
        Ok(())
    }

    /// The guest wants to reach a port of the host: a socket beside ours, with the port at the end
    /// of its name.
    fn connect(&mut self, ports: Ports, header: &Header, sources: &mut TaskSources<'_, '_>) {
        let stream = if self.has_room() && !self.connections.contains_key(&ports) {
            dial(&self.path, ports.host)
        } else {
            None
        };
        let stream = stream.map(Arc::new);
        let watched = stream.and_then(|stream| {
            let key = self.watch_stream(&stream, sources).ok()?;
            Some((stream, key))
        });
        let Some((stream, key)) = watched else {
            self.reset(ports, sources);
            return;
        };
        let mut connection = Connection::new(stream, key, Stage::Established);
        connection.note_credit(header);
        self.streams.insert(key, ports);
        self.connections.insert(ports, connection);
        self.queue(ports);
    }

    /// Sends the transport reset event: all connections that the guest knew are gone (5.10.6.7).
    fn tell_reset(&mut self) -> Result<(), QueueError> {
        let Some(queue) = self.queues[EVENT].as_mut().filter(|_| self.reset_guest) else {
            return Ok(());
        };
        // A driver that has given no buffer gets the event when it has: `reset_guest` stays set
        // until then (5.10.6.7).
        if let Some(chain) = queue.pop()? {
            chain.write(0, &TRANSPORT_RESET)?;
            queue.push(chain.head(), TRANSPORT_RESET.len() as u32)?;
            queue.notify()?;
            self.reset_guest = false;
        }
        Ok(())
    }
}

/// Handles a packet of an existing connection.
fn obey(
    connection: &mut Connection,
    op: Op,
    header: &Header,
    data: &[u8],
    ports: Ports,
) -> Result<(), Over> {
    match op {
        Op::Response if matches!(connection.stage, Stage::Requested { .. }) => {
            connection.establish();
            // The client gets the port that it was given, by which the guest knows it.
            let answer = format!("OK {}\n", ports.host);
            match (&*connection.stream).write(answer.as_bytes()) {
                Ok(len) if len == answer.len() => Ok(()),
                _ => Err(Over),
            }
        }
        Op::Data => connection.receive(data),
        Op::CreditUpdate => Ok(()),
        Op::CreditRequest => {
            connection.tell_credit();
            Ok(())
        }
        Op::Shutdown => connection.shut_down(header.flags),
        Op::Request | Op::Response | Op::Reset => Err(Over),
    }
}

/// Connects to `path_port`, without waiting for anybody.
fn dial(path: &Path, port: u32) -> Option<UnixStream> {
    let mut name = path.as_os_str().to_owned();
    name.push(format!("_{port}"));
    let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
    let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None).ok()?;
    // A non-blocking connect to a unix socket succeeds at once, or fails if the listener's backlog
    // is full. The guest gets a reset then and may try again.
    connect(&socket, &SocketAddrUnix::new(Path::new(&name)).ok()?).ok()?;
    Some(UnixStream::from(socket))
}

impl QueueTask for Muxer {
    fn watch(&mut self, sources: &mut TaskSources<'_, '_>) -> io::Result<()> {
        self.watch_queues(sources)?;
        self.renew_deadlines();
        self.accepting = true;
        sources.watch(Arc::clone(&self.listener), LISTENER, Interest::Read)?;
        let connected = self.connections.values();
        for connection in connected {
            sources.watch(
                Arc::clone(&connection.stream),
                connection.key,
                Interest::Both,
            )?;
        }
        for (key, undecided) in &self.undecided {
            sources.watch(Arc::clone(&undecided.stream), *key, Interest::Both)?;
        }
        Ok(())
    }

    fn call(
        &mut self,
        event: TaskEvent,
        sources: &mut TaskSources<'_, '_>,
    ) -> Result<TaskFlow, QueueError> {
        // A queue that starts while the task runs: only the task may watch its kick, since the loop
        // is the task's.
        if self.unwatched
            && let Err(error) = self.watch_queues(sources)
        {
            tracing::warn!(%error, "cannot watch a queue of a vsock device");
        }
        match event {
            TaskEvent::Ready(key) if key < QUEUES => {
                if let Some(queue) = self.queues.get(key).and_then(Option::as_ref) {
                    // Kicks are counted together.
                    let _ = queue.kick().read();
                }
            }
            TaskEvent::Ready(LISTENER) => self.accepting = true,
            TaskEvent::Ready(key) => match self.streams.get(&key).copied() {
                None => self.listen_to(key, sources),
                Some(ports) => {
                    let connection = self.connections.get_mut(&ports);
                    match connection.map_or(Ok(()), Connection::ready) {
                        Ok(()) => self.queue(ports),
                        Err(Over) => self.reset(ports, sources),
                    }
                }
            },
            TaskEvent::Started | TaskEvent::Again => {}
        }
        if self.accepting {
            self.accept(sources);
        }
        // Each call, as the loop has one timer for the task and does not say why it calls.
        self.expire(sources);
        self.tell_reset()?;
        let flows = [self.receive(sources)?, self.send(sources)?];
        // The turn of the other queue has made room for answers.
        let can_receive = self.stalled && self.replies.len() < MAX_REPLIES;
        Ok(match flows {
            [TaskFlow::Wait, TaskFlow::Wait] if !can_receive && !self.accepting => TaskFlow::Wait,
            _ => TaskFlow::Again,
        })
    }
}
