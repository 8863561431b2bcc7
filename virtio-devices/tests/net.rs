//! Network interfaces: the test is the guest, and the host's own stack is at the other end of the
//! tap. Wants `/dev/net/tun` and CAP_NET_ADMIN.

#![allow(clippy::unwrap_used, clippy::panic, reason = "tests")]

use std::net::{Ipv4Addr, UdpSocket};
use std::sync::Arc;
use std::time::{Duration, Instant};

use devices::event_loop::EventLoop;
use state::{Store, Writer};
use virtio_devices::net::{Net, NetConfig, NetHandle, TapAddress, TapIp, TapSource};
use virtio_devices::rate_limiter::RateLimits;
use virtio_devices::testing::{
    Heard, PATIENCE, TestBuffer, TestGuest, TestQueue, transport, workers,
};
use virtio_devices::{QueueState, Transport, VirtioDevice};

const HEADER: usize = 12;
const MAC: [u8; 6] = [0x02, 0x57, 0x68, 0x69, 0x6d, 0x01];
const MRG_RXBUF: u64 = 1 << 15;
/// Checksums, and that they can be turned off later.
const GUEST_CSUM: u64 = 1 << 1 | 1 << 2;
const ANNOUNCE: u64 = 1 << 21;
const RX_BUFFERS: u16 = 64;
const RX_LEN: u32 = 1024;

struct Machine {
    guest: TestGuest,
    device: Net,
    handle: NetHandle,
    rx: TestQueue,
    tx: TestQueue,
    control: TestQueue,
    transport: Arc<Transport>,
    heard: Heard,
    host: Ipv4Addr,
    ours: Ipv4Addr,
    rx_at: u64,
    tx_at: u64,
    features: u64,
    _event_loop: EventLoop,
}

fn config(name: &str, net: u8) -> NetConfig {
    NetConfig {
        tap: TapSource::Name(name.to_owned()),
        address: TapAddress {
            ip: Some(TapIp::V4(
                Ipv4Addr::new(10, 213, net, 1),
                Some(Ipv4Addr::new(255, 255, 255, 0)),
            )),
            mac: None,
            mtu: Some(1500),
        },
        mac: MAC,
        mtu: None,
        pairs: 1,
        queue_size: 128,
        offload_csum: true,
        offload_tso: true,
        limits: RateLimits::default(),
    }
}

fn machine(net: u8) -> Machine {
    let (event_loop, workers) = workers();
    let (device, handle) = Net::new(config("wbtest%d", net), workers).unwrap();
    let mut guest = TestGuest::new(8 << 20);
    let (transport, heard) = transport();
    let [rx, tx, control] = [0, 1, 2].map(|index| TestQueue::new(&mut guest, index, 128));
    let mut machine = Machine {
        guest,
        device,
        handle,
        rx,
        tx,
        control,
        transport,
        heard,
        host: Ipv4Addr::new(10, 213, net, 1),
        ours: Ipv4Addr::new(10, 213, net, 2),
        rx_at: 1 << 20,
        tx_at: 4 << 20,
        features: MRG_RXBUF | ANNOUNCE,
        _event_loop: event_loop,
    };
    for index in 0..RX_BUFFERS {
        machine.offer(index);
    }
    machine.start([QueueState::default(); 3]);
    machine
}

impl Machine {
    fn start(&mut self, states: [QueueState; 3]) {
        self.device
            .activate(self.features, &self.transport)
            .unwrap();
        for (queue, state) in [&self.rx, &self.tx, &self.control].into_iter().zip(states) {
            let side = queue.device_side(&self.transport, state);
            self.device.start_queue(side).unwrap();
        }
    }

    fn stop(&mut self) -> [QueueState; 3] {
        [0, 1, 2].map(|index| self.device.stop_queue(index).unwrap())
    }

    /// Makes the buffer of this index available for a frame.
    fn offer(&mut self, index: u16) {
        let head = self.rx.send(&[TestBuffer {
            addr: self.rx_at + u64::from(index) * u64::from(RX_LEN),
            len: RX_LEN,
            writable: true,
        }]);
        assert_eq!(
            head % RX_BUFFERS,
            index,
            "buffers go round with descriptors"
        );
    }

    /// The next frame to the guest, without its header.
    fn receive(&mut self) -> Vec<u8> {
        let mut frame = Vec::new();
        let mut left = 1;
        while left > 0 {
            let (head, len) = self.rx.wait_used();
            let index = head % RX_BUFFERS;
            let at = self.rx_at + u64::from(index) * u64::from(RX_LEN);
            let piece = self.guest.read(at, len as usize);
            if frame.is_empty() {
                left = u16::from_le_bytes([piece[10], piece[11]]);
            }
            frame.extend(piece);
            self.offer(index);
            left -= 1;
        }
        frame.split_off(HEADER)
    }

    fn send(&mut self, frame: &[u8]) {
        let slot = self.tx_at;
        let mut whole = vec![0; HEADER];
        whole.extend(frame);
        self.guest.write(slot, &whole);
        let buffer = |addr, len: usize| TestBuffer {
            addr,
            len: u32::try_from(len).unwrap(),
            writable: false,
        };
        let rest = whole.len() - HEADER;
        let head = self
            .tx
            .send(&[buffer(slot, HEADER), buffer(slot + HEADER as u64, rest)]);
        assert_eq!(self.tx.wait_used().0, head);
    }

    /// Answers ARP until a frame of another kind for us comes, and gives its payload as UDP.
    fn datagram(&mut self) -> Vec<u8> {
        let from = Instant::now();
        loop {
            assert!(from.elapsed() < PATIENCE, "no datagram came");
            let frame = self.receive();
            match &frame[12..14] {
                [0x08, 0x06] if frame[38..42] == self.ours.octets() && frame[21] == 1 => {
                    let mut answer = frame[6..12].to_vec();
                    answer.extend(MAC);
                    answer.extend([8, 6, 0, 1, 8, 0, 6, 4, 0, 2]);
                    answer.extend(MAC);
                    answer.extend(self.ours.octets());
                    answer.extend(&frame[22..32]);
                    self.send(&answer);
                }
                [0x08, 0x00] if frame[23] == 17 && frame[30..34] == self.ours.octets() => {
                    let len = usize::from(u16::from_be_bytes([frame[38], frame[39]]));
                    return frame[42..34 + len].to_vec();
                }
                _ => {}
            }
        }
    }
}

fn ip_checksum(header: &[u8]) -> u16 {
    let sum = header
        .chunks(2)
        .map(|pair| u32::from(u16::from_be_bytes([pair[0], pair[1]])));
    let sum: u32 = sum.sum();
    !((sum & 0xffff) + (sum >> 16)) as u16
}

/// A UDP datagram from the guest, without a checksum (RFC 768 allows that).
fn udp(machine: &Machine, to_mac: &[u8], port: u16, data: &[u8]) -> Vec<u8> {
    let mut frame = to_mac.to_vec();
    frame.extend(MAC);
    frame.extend([8, 0]);
    let total = u16::try_from(28 + data.len()).unwrap();
    let mut ip = vec![0x45, 0];
    ip.extend(total.to_be_bytes());
    ip.extend([0, 0, 0, 0, 64, 17, 0, 0]);
    ip.extend(machine.ours.octets());
    ip.extend(machine.host.octets());
    let sum = ip_checksum(&ip);
    ip[10..12].copy_from_slice(&sum.to_be_bytes());
    frame.extend(ip);
    frame.extend([0x30, 0x39]);
    frame.extend(port.to_be_bytes());
    frame.extend((total - 20).to_be_bytes());
    frame.extend([0, 0]);
    frame.extend(data);
    frame
}

#[test]
fn datagrams_come_and_go_across_pulses() {
    let mut machine = machine(1);
    let socket = UdpSocket::bind((machine.host, 0)).unwrap();
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
    let port = socket.local_addr().unwrap().port();
    // The first frame tells us who the host is.
    socket.send_to(b"who", (machine.ours, 12345)).unwrap();
    let arp = loop {
        let frame = machine.receive();
        if frame[12..14] == [8, 6] && frame[38..42] == machine.ours.octets() {
            break frame;
        }
    };
    let host_mac = arp[6..12].to_vec();
    for round in 0..30_u16 {
        let data: Vec<u8> = (0..1300_u16).map(|i| (i ^ round) as u8).collect();
        // To the guest: more than one buffer each.
        socket.send_to(&data, (machine.ours, 12345)).unwrap();
        let got = loop {
            let got = machine.datagram();
            if got != b"who" {
                break got;
            }
        };
        assert_eq!(got, data, "round {round}");
        // From the guest.
        let frame = udp(&machine, &host_mac, port, &data);
        machine.send(&frame);
        let mut buffer = [0; 2000];
        let (len, from) = socket.recv_from(&mut buffer).unwrap();
        assert_eq!(
            (&buffer[..len], from.ip()),
            (&data[..], machine.ours.into())
        );
        // The pulse.
        let states = machine.stop();
        let mut writer = Writer::default();
        machine
            .device
            .save(&mut writer.scope("net").unwrap())
            .unwrap();
        let bytes = writer.finish();
        machine.device.reset();
        let mut store = Store::open(&bytes).unwrap();
        machine
            .device
            .load(&mut store.scope("net").unwrap())
            .unwrap();
        machine.start(states);
    }
    let counters = machine.device.counters();
    let count = |name| counters.iter().find(|(n, _)| *n == name).unwrap().1;
    assert!(
        count("tx_frames") >= 31 && count("rx_frames") >= 32,
        "{counters:?}"
    );
    assert_eq!((count("tx_drops"), count("rx_drops")), (0, 0));
    assert!(machine.heard.events().is_empty());
}

#[test]
fn guest_is_announced() {
    let mut machine = machine(2);
    let status = |machine: &Machine| {
        let mut data = [0; 2];
        machine.device.read_config(6, &mut data);
        u16::from_le_bytes(data)
    };
    assert_eq!(status(&machine), 1);
    machine.handle.announce();
    assert_eq!(status(&machine), 3);
    assert_eq!(
        machine.heard.raised(virtio_devices::testing::CONFIG_VECTOR),
        1
    );
    let request = machine.guest.put(&[3, 0]);
    let answer = machine.guest.put(&[0xff, 0xff]);
    let buffer = TestBuffer::new;
    let head = machine
        .control
        .send(&[buffer(request, 2, false), buffer(answer, 2, true)]);
    assert_eq!(machine.control.wait_used(), (head, 1));
    assert_eq!(machine.guest.read(answer, 2), [0, 0xff]);
    assert_eq!(status(&machine), 1);
    // What it does not know it refuses; what is cut short breaks the rules.
    machine.guest.write(request, &[9, 9]);
    machine
        .control
        .send(&[buffer(request, 2, false), buffer(answer, 1, true)]);
    machine.control.wait_used();
    assert_eq!(machine.guest.read(answer, 1), [1]);
    machine
        .control
        .send(&[buffer(request, 1, false), buffer(answer, 1, true)]);
    let from = Instant::now();
    while machine.heard.events().is_empty() && from.elapsed() < PATIENCE {
        std::thread::sleep(Duration::from_millis(1));
    }
    assert!(format!("{:?}", machine.heard.events()).contains("too short"));
}

#[test]
fn disabled_offloads_survive_migration() {
    let mut machine = machine(5);
    let save = |machine: &Machine| {
        let mut writer = Writer::default();
        let mut scope = writer.scope("net").unwrap();
        machine.device.save(&mut scope).unwrap();
        writer.finish()
    };
    machine.stop();
    machine.device.reset();
    machine.features |= GUEST_CSUM;
    let mut states = [QueueState::default(); 3];
    machine.start(states);
    let with_checksums = save(&machine);
    let request = machine.guest.put(&[5, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
    let answer = machine.guest.put(&[0xff]);
    let buffer = TestBuffer::new;
    machine
        .control
        .send(&[buffer(request, 10, false), buffer(answer, 1, true)]);
    machine.control.wait_used();
    assert_eq!(machine.guest.read(answer, 1), [0]);
    let without = save(&machine);
    assert!(without != with_checksums);
    for saved in [&without, &with_checksums] {
        states = machine.stop();
        machine.device.reset();
        let mut store = Store::open(saved).unwrap();
        let mut scope = store.scope("net").unwrap();
        machine.device.load(&mut scope).unwrap();
        machine.start(states);
        assert!(save(&machine) == *saved);
    }
    // Another driver says anew what it takes.
    machine.stop();
    machine.device.reset();
    machine.start(states);
    assert!(save(&machine) == with_checksums);
}

#[test]
fn invalid_frames_are_counted() {
    let mut machine = machine(3);
    let data = machine.guest.alloc(4096);
    for len in [1, 11] {
        machine.tx.send(&[TestBuffer {
            addr: data,
            len,
            writable: false,
        }]);
        machine.tx.wait_used();
    }
    // 70,000 bytes, in pieces.
    let piece = TestBuffer {
        addr: data,
        len: 3500,
        writable: false,
    };
    machine.tx.send(&[piece; 20]);
    machine.tx.wait_used();
    assert!(machine.device.counters().contains(&("tx_drops", 3)));
    assert!(machine.heard.events().is_empty());
}

#[test]
fn rejects_unusable_tap() {
    let (_event_loop, workers) = workers();
    let refused = |name: &str, net| Net::new(config(name, net), workers.clone()).err().unwrap();
    for name in ["", "a name", "sixteen-letters-", "a/b"] {
        assert!(
            refused(name, 4)
                .to_string()
                .contains("not an interface name"),
            "{name}"
        );
    }
    assert!(refused("lo", 4).to_string().contains("`lo`"));
    let held = machine(4);
    let told = refused(held.handle.tap().unwrap(), 4).to_string();
    assert!(told.contains("another program uses it"), "{told}");
}
