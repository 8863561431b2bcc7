//! The cost of a network interface between its queues and the host's stack, as a table. This program is
//! the driver, so no exit of a guest is included. Needs `/dev/net/tun` and CAP_NET_ADMIN.
//!
//!     cargo bench -p virtio-devices --bench net
//!
//! Beside each row datagrams of the same size from a thread of the host to another, over loopback.

#![allow(
    clippy::unwrap_used,
    missing_docs,
    reason = "a benchmark that fails, fails"
)]

use std::net::{Ipv4Addr, SocketAddr, UdpSocket};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use devices::event_loop::EventLoop;
use virtio_devices::net::{Net, NetConfig, TapAddress, TapIp, TapSource};
use virtio_devices::rate_limiter::RateLimits;
use virtio_devices::testing::{TestBuffer, TestGuest, TestQueue, transport};
use virtio_devices::{QueueState, VirtioDevice, Workers};

const SPAN: Duration = Duration::from_millis(500);
const TIMES: usize = 5;
const ENTRIES: u16 = 256;
/// Maximum length of a frame with its virtio header.
const ROOM: u32 = 2048;
const HEADER: usize = 12;
const MAC: [u8; 6] = [0x02, 0x57, 0x68, 0x69, 0x6d, 0x02];
const HOST: Ipv4Addr = Ipv4Addr::new(10, 213, 77, 1);
const GUEST: Ipv4Addr = Ipv4Addr::new(10, 213, 77, 2);
const ALL: Ipv4Addr = Ipv4Addr::new(10, 213, 77, 255);

fn main() {
    println!("\nDatagrams through a tap: medians of {TIMES}.\n");
    println!(
        "| direction | bytes of data | frames/s | MiB/s | over loopback, without a device | ratio |"
    );
    println!("|---|---|---|---|---|---|");
    for size in [18, 1472] {
        let plain = median(|| loopback(size));
        let mut interface = Interface::new();
        for (direction, rate) in [
            ("to the guest", median(|| interface.receive(size))),
            ("from the guest", median(|| interface.send(size))),
        ] {
            println!(
                "| {direction} | {size} | {rate:.0} | {:.0} | {plain:.0} | {:.2} |",
                rate * size as f64 / f64::from(1 << 20),
                rate / plain
            );
        }
    }
}

fn median(mut measure: impl FnMut() -> f64) -> f64 {
    let mut rates: Vec<_> = (0..TIMES).map(|_| measure()).collect();
    rates.sort_by(f64::total_cmp);
    rates[TIMES / 2]
}

/// Sends datagrams as fast as the host accepts them, until `over` is set.
fn flood(socket: &UdpSocket, to: SocketAddr, size: usize, over: &AtomicBool) {
    let data = vec![7; size];
    while !over.load(Ordering::Relaxed) {
        // A queue that is full loses it.
        let _ = socket.send_to(&data, to);
    }
}

/// Datagrams a second that arrive.
fn loopback(size: usize) -> f64 {
    let to = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    to.set_read_timeout(Some(SPAN)).unwrap();
    let from = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let (address, over) = (to.local_addr().unwrap(), AtomicBool::new(false));
    thread::scope(|scope| {
        scope.spawn(|| flood(&from, address, size, &over));
        let (start, mut data, mut count) = (Instant::now(), [0; 2048], 0_u64);
        while start.elapsed() < SPAN {
            count += u64::from(to.recv(&mut data).is_ok());
        }
        over.store(true, Ordering::Relaxed);
        count as f64 / start.elapsed().as_secs_f64()
    })
}

struct Interface {
    guest: TestGuest,
    device: Net,
    rx: TestQueue,
    tx: TestQueue,
    /// The host's hardware address.
    host: Vec<u8>,
    _loops: Vec<EventLoop>,
}

impl Interface {
    fn new() -> Self {
        let loops: Vec<_> = (0..2).map(|_| EventLoop::start("bench").unwrap()).collect();
        let workers = Workers::new(loops.iter().map(|one| one.handle().clone()).collect()).unwrap();
        let config = NetConfig {
            tap: TapSource::Name("wbbench%d".to_owned()),
            address: TapAddress {
                ip: Some(TapIp::V4(HOST, Some(Ipv4Addr::new(255, 255, 255, 0)))),
                mac: None,
                mtu: Some(1500),
            },
            mac: MAC,
            mtu: None,
            pairs: 1,
            queue_size: ENTRIES,
            offload_csum: false,
            offload_tso: false,
            limits: RateLimits::default(),
        };
        let (mut device, _) = Net::new(config, workers).unwrap();
        let mut guest = TestGuest::new(8 << 20);
        let (transport, _) = transport();
        let [mut rx, tx, control] = [0, 1, 2].map(|i| TestQueue::new(&mut guest, i, ENTRIES));
        for index in 0..ENTRIES {
            offer(&mut rx, index);
        }
        device.activate(0, &transport).unwrap();
        for queue in [&rx, &tx, &control] {
            let side = queue.device_side(&transport, QueueState::default());
            device.start_queue(side).unwrap();
        }
        let mut interface = Self {
            guest,
            device,
            rx,
            tx,
            host: Vec::new(),
            _loops: loops,
        };
        // The host tells its address with whatever it sends.
        let (head, _) = {
            broadcaster().send_to(b"hello", (ALL, 9)).unwrap();
            interface.rx.wait_used()
        };
        let at = place(head) + HEADER as u64 + 6;
        interface.host = interface.guest.read(at, 6);
        offer(&mut interface.rx, head);
        interface
    }

    /// Frames a second that arrive in the guest's buffers.
    fn receive(&mut self, size: usize) -> f64 {
        let (socket, over) = (broadcaster(), AtomicBool::new(false));
        thread::scope(|scope| {
            scope.spawn(|| flood(&socket, (ALL, 9).into(), size, &over));
            let (start, mut count) = (Instant::now(), 0_u64);
            while start.elapsed() < SPAN {
                let before = count;
                while let Some((head, _)) = self.rx.take_used() {
                    offer(&mut self.rx, head);
                    count += 1;
                }
                if count == before {
                    thread::yield_now();
                } else {
                    self.rx.kick.write(1).unwrap();
                }
            }
            over.store(true, Ordering::Relaxed);
            count as f64 / start.elapsed().as_secs_f64()
        })
    }

    /// Frames a second that the tap takes.
    fn send(&mut self, size: usize) -> f64 {
        let socket = UdpSocket::bind((HOST, 0)).unwrap();
        let frame = frame(&self.host, socket.local_addr().unwrap().port(), size);
        let at = 6 << 20;
        self.guest.write(at, &frame);
        let buffer = TestBuffer {
            addr: at,
            len: u32::try_from(frame.len()).unwrap(),
            writable: false,
        };
        let mut in_flight = 0;
        let (start, mut count) = (Instant::now(), 0_u64);
        while start.elapsed() < SPAN {
            let mut turned = 0_u16;
            while self.tx.take_used().is_some() {
                (in_flight, count) = (in_flight - 1, count + 1);
            }
            while in_flight < ENTRIES / 2 {
                let head = self.tx.describe(&[buffer]);
                self.tx.offer(head);
                (in_flight, turned) = (in_flight + 1, turned + 1);
            }
            if turned > 0 {
                self.tx.kick.write(1).unwrap();
            } else {
                thread::yield_now();
            }
        }
        let rate = count as f64 / start.elapsed().as_secs_f64();
        for _ in 0..in_flight {
            self.tx.wait_used();
        }
        rate
    }
}

impl Drop for Interface {
    fn drop(&mut self) {
        for index in 0..3 {
            self.device.stop_queue(index);
        }
    }
}

fn broadcaster() -> UdpSocket {
    let socket = UdpSocket::bind((HOST, 0)).unwrap();
    socket.set_broadcast(true).unwrap();
    socket
}

fn place(index: u16) -> u64 {
    (1 << 20) + u64::from(index % ENTRIES) * u64::from(ROOM)
}

/// Makes the buffer of this index available: they go round with the descriptors.
fn offer(rx: &mut TestQueue, index: u16) {
    let head = rx.describe(&[TestBuffer {
        addr: place(index),
        len: ROOM,
        writable: true,
    }]);
    assert_eq!(head, index % ENTRIES, "buffers go round with descriptors");
    rx.offer(head);
}

/// A UDP datagram to the host, behind a virtio header, without a checksum of its data (RFC 768).
fn frame(host: &[u8], port: u16, size: usize) -> Vec<u8> {
    let total = u16::try_from(28 + size).unwrap();
    let mut ip = vec![0x45, 0];
    ip.extend(total.to_be_bytes());
    ip.extend([0, 0, 0, 0, 64, 17, 0, 0]);
    ip.extend(GUEST.octets());
    ip.extend(HOST.octets());
    let words = ip
        .chunks(2)
        .map(|pair| u32::from(u16::from_be_bytes([pair[0], pair[1]])));
    let sum: u32 = words.sum();
    let sum = !((sum & 0xffff) + (sum >> 16)) as u16;
    ip[10..12].copy_from_slice(&sum.to_be_bytes());
    let mut frame = vec![0; HEADER];
    frame.extend(host);
    frame.extend(MAC);
    frame.extend([8, 0]);
    frame.extend(ip);
    frame.extend(9_u16.to_be_bytes());
    frame.extend(port.to_be_bytes());
    frame.extend((total - 20).to_be_bytes());
    frame.extend([0, 0]);
    frame.extend(vec![7; size]);
    frame
}
