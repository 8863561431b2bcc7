//! Limits on what hostile guests and silent clients can use of the host.

use std::io::Read;
use std::net::Shutdown;
use std::time::Duration;

use devices::event_loop::EventLoop;

use super::*;
use crate::testing::{
    Heard, PATIENCE, TestBuffer, TestGuest, TestQueue, transport, wait_idle, workers,
};
use crate::transport::Transport;
use crate::worker::Running;

const CID: u64 = 3;
const REQUEST: u16 = 1;
const RESET: u16 = 3;
const DATA: u16 = 5;

struct Machine {
    running: Running<Muxer>,
    guest: TestGuest,
    rx: TestQueue,
    tx: TestQueue,
    packet: u64,
    heard: Heard,
    path: PathBuf,
    event_loop: EventLoop,
    _transport: Arc<Transport>,
    _dir: tempfile::TempDir,
}

fn machine(limits: VsockLimits) -> Machine {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("vsock");
    let listener = UnixListener::bind(&path).unwrap();
    listener.set_nonblocking(true).unwrap();
    let (event_loop, workers) = workers();
    let (transport, heard) = transport();
    let mut guest = TestGuest::new(1 << 20);
    let [rx, tx] = [0, 1].map(|index| TestQueue::new(&mut guest, index, 64));
    let packet = guest.alloc(256);
    let mut muxer = Muxer::new(CID, &path, Arc::new(listener), Arc::default(), limits);
    for queue in [&rx, &tx] {
        assert!(muxer.put(queue.device_side(&transport, QueueState::default())));
    }
    Machine {
        running: Running::start(&workers, &transport, muxer),
        guest,
        rx,
        tx,
        packet,
        heard,
        path,
        event_loop,
        _transport: transport,
        _dir: dir,
    }
}

impl Machine {
    /// Sends a packet without data, with a megabyte of room for answers, and waits until it is taken.
    fn send(&mut self, guest_port: u32, host_port: u32, op: u16) {
        self.offer(guest_port, host_port, op);
        self.tx.wait_used();
    }

    /// Sends like [`send`](Self::send), without the wait.
    fn offer(&mut self, guest_port: u32, host_port: u32, op: u16) {
        let header = Header {
            src_cid: CID,
            dst_cid: HOST_CID,
            src_port: guest_port,
            dst_port: host_port,
            len: 0,
            kind: STREAM,
            op: None,
            flags: 0,
            buf_alloc: 1 << 20,
            fwd_cnt: 0,
        };
        let mut raw = header.bytes();
        raw[30..32].copy_from_slice(&op.to_le_bytes());
        self.guest.write(self.packet, &raw);
        let buffer = TestBuffer {
            addr: self.packet,
            len: HEADER_LEN as u32,
            writable: false,
        };
        self.tx.send(&[buffer]);
    }

    /// Makes a buffer of so many bytes available, and gives the packet that comes: its operation
    /// and its data.
    fn receive(&mut self, len: u32) -> (u16, Vec<u8>) {
        let addr = self.guest.alloc(len.into());
        let buffer = TestBuffer {
            addr,
            len,
            writable: true,
        };
        self.rx.send(&[buffer]);
        let (_, written) = self.rx.wait_used();
        let raw = self.guest.read(addr, written as usize);
        let op = u16::from_le_bytes([raw[30], raw[31]]);
        (op, raw[HEADER_LEN..].to_vec())
    }

    fn service(&self, port: u32) -> UnixListener {
        UnixListener::bind(format!("{}_{port}", self.path.display())).unwrap()
    }

    fn client(&self) -> UnixStream {
        let stream = UnixStream::connect(&self.path).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream
    }

    fn with<R>(&self, f: impl FnOnce(&mut Muxer) -> R) -> R {
        wait_idle(&self.event_loop);
        self.running.with(f).unwrap()
    }
}

#[test]
fn ready_list_is_bounded() {
    let mut machine = machine(VsockLimits::default());
    let _service = machine.service(80);
    // The guest never makes room for the answers.
    for _ in 0..200 {
        machine.send(1000, 80, REQUEST);
        machine.send(1000, 80, RESET);
    }
    machine.send(1000, 80, REQUEST);
    let (ready, connections) = machine.with(|muxer| (muxer.ready.len(), muxer.connections.len()));
    assert_eq!((ready, connections), (1, 1));
}

/// A muxer that is stalled is called again at once when there is room for answers. Without the queue that
/// stalled it there is no packet to take, and it would be called for ever.
#[test]
fn reset_of_the_queue_ends_a_stall() {
    let mut machine = machine(VsockLimits::default());
    // Each of these packets has an answer, for which the guest makes no room.
    for _ in 0..MAX_REPLIES {
        machine.send(1000, 80, DATA);
    }
    machine.offer(1000, 80, DATA);
    assert!(machine.with(|muxer| muxer.stalled));
    assert!(machine.with(|muxer| muxer.take(TX as u16)).is_some());
    assert_eq!(machine.receive(256).0, RESET);
    let (stalled, replies) = machine.with(|muxer| (muxer.stalled, muxer.replies.len()));
    assert_eq!((stalled, replies), (false, MAX_REPLIES - 1));
}

#[test]
fn small_buffer_does_not_end_stream() {
    let mut machine = machine(VsockLimits::default());
    let service = machine.service(80);
    machine.send(1000, 80, REQUEST);
    let (mut stream, _) = service.accept().unwrap();
    assert_eq!(machine.receive(256).0, 2, "it is accepted");
    stream.write_all(b"hello").unwrap();
    stream.shutdown(Shutdown::Write).unwrap();
    for _ in 0..3 {
        assert_eq!(machine.receive(HEADER_LEN as u32), (DATA, Vec::new()));
    }
    assert_eq!(machine.receive(256), (DATA, b"hello".to_vec()));
    assert_eq!(machine.receive(256).0, 4, "now it ends");
    assert!(machine.heard.events().is_empty());
}

#[test]
fn silent_peers_time_out() {
    let mut machine = machine(VsockLimits {
        handshake: Duration::from_millis(50),
        ..VsockLimits::default()
    });
    let mut silent = machine.client();
    let mut unanswered = machine.client();
    unanswered.write_all(b"CONNECT 7\n").unwrap();
    assert_eq!(machine.receive(256).0, REQUEST);
    assert_eq!(silent.read(&mut [0]).unwrap(), 0);
    assert_eq!(unanswered.read(&mut [0]).unwrap(), 0);
    assert_eq!(machine.receive(256).0, RESET);
    let left = machine.with(|muxer| (muxer.undecided.len(), muxer.connections.len()));
    assert_eq!(left, (0, 0));
}

/// A machine that is paused does not answer: its clients get their whole time again.
#[test]
fn pause_does_not_count_as_silence() {
    let machine = machine(VsockLimits::default());
    let mut client = machine.client();
    client.write_all(b"CONN").unwrap();
    let first = loop {
        if let Some(until) = machine.with(|muxer| muxer.undecided.values().next().map(|u| u.until))
        {
            break until;
        }
    };
    let Machine {
        running,
        event_loop,
        _transport,
        ..
    } = machine;
    let muxer = running.stop().unwrap();
    let workers = crate::Workers::new(vec![event_loop.handle().clone()]).unwrap();
    let running = Running::start(&workers, &_transport, muxer);
    wait_idle(&event_loop);
    let again = running.with(|muxer| muxer.undecided.values().next().map(|u| u.until));
    assert!(again.flatten().unwrap() > first);
}

#[test]
fn connections_of_a_guest_are_limited() {
    let limits = VsockLimits {
        connections: 8,
        ..VsockLimits::default()
    };
    let mut machine = machine(limits);
    let _service = machine.service(80);
    for port in 0..12 {
        machine.send(1000 + port, 80, REQUEST);
    }
    let ops: Vec<u16> = (0..12).map(|_| machine.receive(256).0).collect();
    assert_eq!(ops.iter().filter(|op| **op == RESET).count(), 4);
    // Clients of the host share the limit, and are turned away.
    let mut client = machine.client();
    assert_eq!(client.read(&mut [0]).unwrap(), 0);
    machine.send(1000, 80, RESET);
    let mut client = machine.client();
    client.write_all(b"CONNECT 7\n").unwrap();
    assert_eq!(machine.receive(256).0, REQUEST);
}
