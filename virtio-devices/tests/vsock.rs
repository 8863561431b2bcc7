//! Streams between a guest and unix sockets of the host: the test is the guest.

#![allow(clippy::unwrap_used, clippy::panic, reason = "tests")]

use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use devices::event_loop::EventLoop;
use state::{Store, Writer};
use virtio_devices::testing::{
    Heard, PATIENCE, TestBuffer, TestGuest, TestQueue, transport, workers,
};
use virtio_devices::vsock::Vsock;
use virtio_devices::{QueueState, Transport, TransportEvent, VirtioDevice};

const CID: u64 = 42;
const HOST: u64 = 2;
const HEADER: usize = 44;
const BUFFERS: u16 = 32;
const BUFFER_LEN: u32 = 8192;

const REQUEST: u16 = 1;
const RESPONSE: u16 = 2;
const RST: u16 = 3;
const SHUTDOWN: u16 = 4;
const RW: u16 = 5;
const CREDIT_UPDATE: u16 = 6;
const CREDIT_REQUEST: u16 = 7;

#[derive(Clone, Debug, PartialEq, Eq)]
struct Packet {
    guest_port: u32,
    host_port: u32,
    op: u16,
    flags: u32,
    buf_alloc: u32,
    fwd_cnt: u32,
    data: Vec<u8>,
}

struct Machine {
    guest: TestGuest,
    device: Vsock,
    queues: [TestQueue; 3],
    transport: Arc<Transport>,
    heard: Heard,
    path: PathBuf,
    rx_at: u64,
    _dir: tempfile::TempDir,
    _event_loop: EventLoop,
}

fn machine() -> Machine {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("vsock");
    let (event_loop, workers) = workers();
    let device = Vsock::new(CID, &path, workers).unwrap();
    let mut guest = TestGuest::new(8 << 20);
    let (transport, heard) = transport();
    let queues = [0, 1, 2].map(|index| TestQueue::new(&mut guest, index, 64));
    let rx_at = guest.alloc(u64::from(BUFFERS) * u64::from(BUFFER_LEN));
    let mut machine = Machine {
        guest,
        device,
        queues,
        transport,
        heard,
        path,
        rx_at,
        _dir: dir,
        _event_loop: event_loop,
    };
    machine.start([QueueState::default(); 3]);
    for index in 0..BUFFERS {
        machine.offer(index);
    }
    machine
}

impl Machine {
    fn start(&mut self, states: [QueueState; 3]) {
        self.device.activate(0, &self.transport).unwrap();
        for (queue, state) in self.queues.iter().zip(states) {
            let side = queue.device_side(&self.transport, state);
            self.device.start_queue(side).unwrap();
        }
    }

    fn stop(&mut self) -> [QueueState; 3] {
        [0, 1, 2].map(|index| self.device.stop_queue(index).unwrap())
    }

    fn offer(&mut self, index: u16) {
        let addr = self.rx_at + u64::from(index) * u64::from(BUFFER_LEN);
        let buffer = TestBuffer {
            addr,
            len: BUFFER_LEN,
            writable: true,
        };
        let head = self.queues[0].send(&[buffer]);
        assert_eq!(head % BUFFERS, index);
    }

    /// The next packet for the guest.
    fn receive(&mut self) -> Packet {
        let (head, len) = self.queues[0].wait_used();
        let index = head % BUFFERS;
        let at = self.rx_at + u64::from(index) * u64::from(BUFFER_LEN);
        let raw = self.guest.read(at, len as usize);
        self.offer(index);
        let word = |at: usize| u32::from_le_bytes(raw[at..at + 4].try_into().unwrap());
        assert_eq!(raw[..8], HOST.to_le_bytes());
        assert_eq!(raw[8..16], CID.to_le_bytes());
        assert_eq!(raw[28..30], 1_u16.to_le_bytes());
        assert_eq!(word(24) as usize, raw.len() - HEADER);
        Packet {
            host_port: word(16),
            guest_port: word(20),
            op: u16::from_le_bytes([raw[30], raw[31]]),
            flags: word(32),
            buf_alloc: word(36),
            fwd_cnt: word(40),
            data: raw[HEADER..].to_vec(),
        }
    }

    fn send(&mut self, packet: &Packet) {
        let mut raw = Vec::new();
        raw.extend(CID.to_le_bytes());
        raw.extend(HOST.to_le_bytes());
        let words = [
            packet.guest_port,
            packet.host_port,
            u32::try_from(packet.data.len()).unwrap(),
            1 | u32::from(packet.op) << 16,
            packet.flags,
            packet.buf_alloc,
            packet.fwd_cnt,
        ];
        words.iter().for_each(|word| raw.extend(word.to_le_bytes()));
        raw.extend(&packet.data);
        let buffer = TestBuffer {
            addr: self.guest.put(&raw),
            len: u32::try_from(raw.len()).unwrap(),
            writable: false,
        };
        self.queues[1].send(&[buffer]);
        self.queues[1].wait_used();
    }

    /// A connection from the host to a port of the guest, which accepts it.
    fn accept(&mut self, port: u32) -> (UnixStream, Packet) {
        let mut stream = UnixStream::connect(&self.path).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        writeln!(stream, "CONNECT {port}").unwrap();
        let request = self.receive();
        assert_eq!((request.op, request.guest_port), (REQUEST, port));
        let answer = from(&request, RESPONSE);
        self.send(&answer);
        let expected = format!("OK {}\n", request.host_port);
        let mut told = vec![0; expected.len()];
        stream.read_exact(&mut told).unwrap();
        assert_eq!(told, expected.as_bytes());
        (stream, answer)
    }
}

/// A packet of the guest's on the connection of `packet`, with a megabyte of room.
fn from(packet: &Packet, op: u16) -> Packet {
    Packet {
        op,
        flags: 0,
        buf_alloc: 1 << 20,
        fwd_cnt: 0,
        data: Vec::new(),
        ..packet.clone()
    }
}

fn hello(host_port: u32) -> Packet {
    Packet {
        guest_port: 1234,
        host_port,
        op: REQUEST,
        flags: 0,
        buf_alloc: 1 << 20,
        fwd_cnt: 0,
        data: Vec::new(),
    }
}

#[test]
fn guest_connects_to_host() {
    let mut machine = machine();
    let mut space = [0xff; 10];
    machine.device.read_config(0, &mut space);
    assert_eq!(space, [42, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
    let service = UnixListener::bind(format!("{}_80", machine.path.display())).unwrap();
    machine.send(&hello(80));
    let (mut stream, _) = service.accept().unwrap();
    let response = machine.receive();
    assert_eq!((response.op, response.host_port), (RESPONSE, 80));
    assert!(response.buf_alloc >= 64 << 10);

    let mut data = from(&response, RW);
    data.data = b"from the guest".to_vec();
    machine.send(&data);
    let mut seen = [0; 14];
    stream.read_exact(&mut seen).unwrap();
    assert_eq!(seen, *b"from the guest");
    stream.write_all(b"from the host").unwrap();
    let answer = machine.receive();
    assert_eq!((answer.op, &answer.data[..]), (RW, &b"from the host"[..]));
    assert_eq!(answer.fwd_cnt, 14);

    // The host has said all; the guest has not.
    stream.shutdown(std::net::Shutdown::Write).unwrap();
    let done = machine.receive();
    assert_eq!((done.op, done.flags), (SHUTDOWN, 2));
    machine.send(&data);
    stream.read_exact(&mut seen).unwrap();
    let mut end = from(&response, SHUTDOWN);
    end.flags = 3;
    machine.send(&end);
    assert_eq!(machine.receive().op, RST);
    assert_eq!(stream.read(&mut seen).unwrap(), 0);
}

#[test]
fn connect_without_listener_is_reset() {
    let mut machine = machine();
    machine.send(&hello(81));
    assert_eq!(machine.receive().op, RST);
    // On a connection that there is not.
    machine.send(&from(&hello(81), RW));
    assert_eq!(machine.receive().op, RST);
    // The guest does not listen.
    let mut stream = UnixStream::connect(&machine.path).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream.write_all(b"connect 99\n").unwrap();
    let request = machine.receive();
    machine.send(&from(&request, RST));
    assert_eq!(stream.read(&mut [0]).unwrap(), 0);
    for talk in [
        &b"GET / HTTP/1.1\n"[..],
        b"CONNECT\n",
        b"CONNECT 1 2\n",
        &[b'x'; 100],
    ] {
        let mut stream = UnixStream::connect(&machine.path).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.write_all(talk).unwrap();
        match stream.read(&mut [0]) {
            Ok(0) => {}
            Err(error) if error.kind() == ErrorKind::ConnectionReset => {}
            other => panic!("{other:?}"),
        }
    }
    assert!(machine.heard.events().is_empty());
}

#[test]
fn host_respects_guest_credit() {
    let mut machine = machine();
    let (mut stream, mut answer) = machine.accept(7);
    let sent: Vec<u8> = (0..2_500_000_u32).map(|i| (i % 251) as u8).collect();
    let copy = sent.clone();
    let writer = std::thread::spawn(move || stream.write_all(&copy).map(|()| stream));
    let mut seen = Vec::new();
    let mut asked = 0;
    while seen.len() < sent.len() {
        let packet = machine.receive();
        match packet.op {
            RW => seen.extend(packet.data),
            CREDIT_REQUEST => {
                asked += 1;
                // It has more once the guest has passed on what there was.
                answer.op = CREDIT_UPDATE;
                answer.fwd_cnt = u32::try_from(seen.len()).unwrap();
                machine.send(&answer);
            }
            other => panic!("op {other}"),
        }
        assert!(seen.len() <= (answer.fwd_cnt + answer.buf_alloc) as usize);
    }
    assert_eq!(seen, sent);
    assert!(asked >= 2);
    drop(writer.join().unwrap().unwrap());
}

#[test]
fn late_host_reader_gets_everything() {
    let mut machine = machine();
    let (mut stream, answer) = machine.accept(7);
    let sent: Vec<u8> = (0..700_000_u32).map(|i| (i % 241) as u8).collect();
    let expected = sent.clone();
    let reader = std::thread::spawn(move || {
        std::thread::sleep(std::time::Duration::from_millis(50));
        let mut seen = vec![0; expected.len()];
        stream.read_exact(&mut seen).unwrap();
        assert!(seen == expected);
        stream
    });
    let (mut at, mut passed_on, room) = (0, 0, 256 << 10);
    while at < sent.len() {
        let len = 4096.min(sent.len() - at);
        while at + len - passed_on > room {
            let packet = machine.receive();
            assert_eq!(packet.op, CREDIT_UPDATE);
            passed_on = packet.fwd_cnt as usize;
        }
        let mut data = from(&answer, RW);
        data.data = sent[at..at + len].to_vec();
        machine.send(&data);
        at += len;
        if at % (1 << 16) == 0 {
            let states = machine.stop();
            machine.start(states);
        }
    }
    drop(reader.join().unwrap());
    assert!(machine.heard.events().is_empty());
}

#[test]
fn credit_violation_resets_connection() {
    let mut machine = machine();
    let (_stream, answer) = machine.accept(7);
    let mut data = from(&answer, RW);
    data.data = vec![0; 32 << 10];
    let from = Instant::now();
    // The client does not read: the socket's buffer and ours fill up.
    for _ in 0..60 {
        machine.send(&data);
        assert!(from.elapsed() < PATIENCE);
    }
    loop {
        match machine.receive().op {
            CREDIT_UPDATE => {}
            op => break assert_eq!(op, RST),
        }
    }
}

#[test]
fn invalid_packet_breaks_only_device() {
    for (len, raw_len) in [(100_u32, 44_usize), (0, 43)] {
        let mut machine = machine();
        let mut raw = vec![0; raw_len.max(HEADER)];
        raw[24..28].copy_from_slice(&len.to_le_bytes());
        let addr = machine.guest.put(&raw);
        let short = TestBuffer {
            addr,
            len: u32::try_from(raw_len).unwrap(),
            writable: false,
        };
        machine.queues[1].send(&[short]);
        let from = Instant::now();
        while machine.heard.events().is_empty() {
            assert!(from.elapsed() < PATIENCE);
            std::thread::yield_now();
        }
        assert!(matches!(
            &machine.heard.events()[..],
            [TransportEvent::NeedsReset(_)]
        ));
        machine.stop();
        machine.device.reset();
    }
}

/// Connections do not migrate: the guest gets an event, and makes new ones.
#[test]
fn migration_resets_connections() {
    let mut machine = machine();
    let (mut stream, _) = machine.accept(7);
    let states = machine.stop();
    let mut writer = Writer::default();
    machine
        .device
        .save(&mut writer.scope("vsock").unwrap())
        .unwrap();
    let bytes = writer.finish();
    machine.device.reset();
    let mut store = Store::open(&bytes).unwrap();
    machine
        .device
        .load(&mut store.scope("vsock").unwrap())
        .unwrap();
    machine.start(states);
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    assert_eq!(stream.read(&mut [0]).unwrap(), 0);
    let addr = machine.guest.alloc(8);
    let buffer = TestBuffer {
        addr,
        len: 8,
        writable: true,
    };
    machine.queues[2].send(&[buffer]);
    assert_eq!(machine.queues[2].wait_used().1, 4);
    assert_eq!(machine.guest.read(addr, 4), [0; 4]);
    drop(machine.accept(8));
}

/// A VM that is made from a snapshot of another may have a CID of its own, which the guest reads when it
/// hears of the reset.
#[test]
fn restored_device_has_its_own_cid() {
    let machine = machine();
    let mut writer = Writer::default();
    machine
        .device
        .save(&mut writer.scope("vsock").unwrap())
        .unwrap();
    let bytes = writer.finish();
    let (_loop, workers) = workers();
    let path = machine.path.with_file_name("other");
    let mut other = Vsock::new(CID + 1, &path, workers).unwrap();
    let mut store = Store::open(&bytes).unwrap();
    other.load(&mut store.scope("vsock").unwrap()).unwrap();
    assert_eq!(other.config_space(), (CID + 1).to_le_bytes());
}

#[test]
fn replaces_only_dead_sockets() {
    let machine = machine();
    let (_other, workers) = workers();
    let refused = Vsock::new(CID, &machine.path, workers.clone())
        .err()
        .unwrap();
    assert!(refused.to_string().contains("vsock"), "{refused}");
    let path = machine.path.clone();
    let dir = machine._dir;
    drop(machine.device);
    assert!(!path.exists());
    drop(UnixListener::bind(&path).unwrap());
    assert!(path.exists());
    Vsock::new(CID, &path, workers).unwrap();
    drop(dir);
}
