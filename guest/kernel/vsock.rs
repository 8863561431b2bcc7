//! Connections over vsock (virtio 1.3, 5.10): the guest says on each who it is.

use core::fmt::{self, Write as _};

use crate::boot::Ram;
use crate::io::{NET, Pages};
use crate::line::{Address, Line};
use crate::options::Workload;
use crate::virtio::{CHAINS, Device, Queue, devices, read, write};

/// The virtio device ID of a socket device.
pub const VSOCK: u32 = 19;
/// Bytes of a packet's header.
pub const HEADER: u32 = 44;
const HOST_CID: u64 = 2;

/// Operations of packets (5.10.6).
pub const OP_REQUEST: u16 = 1;
const OP_RESPONSE: u16 = 2;
pub const OP_RST: u16 = 3;
const OP_SHUTDOWN: u16 = 4;
const OP_RW: u16 = 5;
const OP_CREDIT_UPDATE: u16 = 6;
const OP_CREDIT_REQUEST: u16 = 7;

/// Bytes of a buffer for a packet.
const BUFFER: u32 = 2048;
/// Bytes of a buffer for an event, and of the space between two.
const EVENT: u32 = 8;
/// Connections at a time. Further ones are refused.
const CONNECTIONS: usize = 8;
/// Port of the guest's own first connection. The next one has the next port.
const FIRST_PORT: u32 = 2000;

/// The two ends of a connection.
#[derive(Clone, Copy, PartialEq)]
struct Ports {
    guest: u32,
    host: u32,
}

struct Connection {
    ports: Ports,
    /// Bytes of data that came, modulo 2^32 (`fwd_cnt`).
    received: u32,
}

/// The socket device, of which the guest listens at [`Workload::VSOCK_PORT`].
pub struct Vsock {
    config: u64,
    /// The first network interface, which shows its MAC address.
    net: Option<Device>,
    receive: Queue,
    send: Queue,
    events: Queue,
    received: [u64; CHAINS as usize],
    sent: [u64; CHAINS as usize],
    /// A page with a buffer for each event.
    event_page: u64,
    /// Chains that are not with the device, a bit each.
    free: u16,
    connections: [Option<Connection>; CONNECTIONS],
    /// The guest has yet to ask the host for this connection.
    is_calling: bool,
    resets: u64,
    lost: u64,
}

impl Vsock {
    /// Starts the first socket device, if there is one.
    pub fn start(ram: &Ram) -> Option<Self> {
        let device = devices().find(|device| device.kind == VSOCK)?;
        let net = devices().find(|device| device.kind == NET && device.begin());
        device.begin().then(|| {
            let mut pages = Pages::of(ram);
            let mut vsock = Self::new(&device, net, &mut pages);
            for chain in 0..CHAINS {
                vsock.offer(chain);
                vsock.offer_event(chain);
            }
            device.go();
            vsock
        })
    }

    fn new(device: &Device, net: Option<Device>, pages: &mut Pages<'_>) -> Self {
        Self {
            config: device.config,
            net,
            receive: device.queue(0, pages.take()),
            send: device.queue(1, pages.take()),
            events: device.queue(2, pages.take()),
            received: [(); CHAINS as usize].map(|()| pages.take()),
            sent: [(); CHAINS as usize].map(|()| pages.take()),
            event_page: pages.take(),
            free: (1 << CHAINS) - 1,
            connections: [const { None }; CONNECTIONS],
            is_calling: true,
            resets: 0,
            lost: 0,
        }
    }

    /// Looks at each queue once; true if something was done.
    pub fn step(&mut self) -> bool {
        let mut busy = self.take_events();
        while let Some((chain, _)) = self.send.done() {
            self.free |= 1 << chain;
            busy = true;
        }
        if self.is_calling && self.free != 0 {
            self.is_calling = false;
            let ports = Ports {
                guest: FIRST_PORT.wrapping_add(self.resets as u32),
                host: Workload::VSOCK_PORT,
            };
            self.put(ports, OP_REQUEST, 0, false);
        }
        // Each packet has one answer at most, for which there is a chain.
        while self.free != 0
            && let Some((chain, _)) = self.receive.done()
        {
            // The host reports a reset before it asks for new connections: a packet that is visible
            // here may be of after a reset that was not visible above.
            self.take_events();
            let buffer = self.received.get(usize::from(chain)).copied();
            self.packet(buffer.unwrap_or(0));
            self.offer(chain);
            busy = true;
        }
        busy
    }

    fn offer(&mut self, chain: u16) {
        let buffer = self.received.get(usize::from(chain)).copied();
        let buffer = (buffer.unwrap_or(0), BUFFER, true);
        self.receive.send(chain, &[buffer]);
    }

    fn offer_event(&mut self, chain: u16) {
        let buffer = self.event_page + u64::from(EVENT) * u64::from(chain);
        self.events.send(chain, &[(buffer, EVENT, true)]);
    }

    /// Takes the only event that there is: all connections are gone, and the CID may be another one
    /// (5.10.6.7).
    fn take_events(&mut self) -> bool {
        let mut busy = false;
        while let Some((chain, _)) = self.events.done() {
            self.resets += 1;
            for connection in &mut self.connections {
                self.lost += u64::from(connection.take().is_some());
            }
            self.is_calling = true;
            // A driver reads the address of its interface when it starts.
            self.net = self.net.filter(Device::begin);
            self.offer_event(chain);
            busy = true;
        }
        busy
    }

    fn packet(&mut self, at: u64) {
        let ports = Ports {
            guest: read(at + 20),
            host: read(at + 16),
        };
        let len = read::<u32>(at + 24);
        let known = self.connections.iter_mut().flatten();
        let known = known.into_iter().find(|known| known.ports == ports);
        match (read::<u16>(at + 30), known) {
            (OP_REQUEST, None) if ports.guest == Workload::VSOCK_PORT => match self.admit(ports) {
                true => self.put(ports, OP_RESPONSE, 0, false),
                false => self.put(ports, OP_RST, 0, false),
            },
            (OP_RESPONSE, None) if ports.host == Workload::VSOCK_PORT => match self.admit(ports) {
                true => self.put(ports, OP_RW, 0, true),
                false => self.put(ports, OP_RST, 0, false),
            },
            (OP_RW, Some(known)) => {
                known.received = known.received.wrapping_add(len);
                let received = known.received;
                self.put(ports, OP_RW, received, true);
            }
            (OP_CREDIT_REQUEST, Some(known)) => {
                let received = known.received;
                self.put(ports, OP_CREDIT_UPDATE, received, false);
            }
            (OP_CREDIT_UPDATE, Some(_)) | (OP_RST, None) => {}
            (OP_RST, Some(_)) => self.forget(ports),
            (OP_SHUTDOWN, Some(_)) => {
                self.forget(ports);
                self.put(ports, OP_RST, 0, false);
            }
            _ => self.put(ports, OP_RST, 0, false),
        }
    }

    /// Makes room for a connection; false if there is none.
    fn admit(&mut self, ports: Ports) -> bool {
        let mut slots = self.connections.iter_mut();
        let Some(slot) = slots.find(|slot| slot.is_none()) else {
            return false;
        };
        *slot = Some(Connection { ports, received: 0 });
        true
    }

    fn forget(&mut self, ports: Ports) {
        for slot in &mut self.connections {
            if slot.as_ref().is_some_and(|known| known.ports == ports) {
                *slot = None;
            }
        }
    }

    /// Sends a packet in a chain that is free, with the line that says who this is as its data.
    fn put(&mut self, ports: Ports, op: u16, received: u32, with_line: bool) {
        let chain = self.free.trailing_zeros() as u16;
        let Some(&at) = self.sent.get(usize::from(chain)) else {
            return;
        };
        self.free &= !(1 << chain);
        let mut text = Text {
            at: at + u64::from(HEADER),
            len: 0,
        };
        if with_line {
            // The line is shorter than a page.
            let _ = write!(text, "{}\r\n", self.line());
        }
        let cid = read(self.config);
        packet(at, cid, [ports.guest, ports.host], op);
        write(at + 24, text.len);
        write(at + 40, received);
        self.send.send(chain, &[(at, HEADER + text.len, false)]);
    }

    fn line(&self) -> Line {
        let byte = |net: Device, at: u64| u64::from(read::<u8>(net.config + at));
        let mac = |net| (0..6).fold(0, |mac, at| mac << 8 | byte(net, at));
        Line::Vsock {
            cid: read(self.config),
            mac: Address(self.net.map_or(0, mac)),
            connections: self.connections.iter().flatten().count() as u64,
            resets: self.resets,
            lost: self.lost,
        }
    }
}

/// Writes the header of a packet without data to the host (`virtio_vsock_hdr`, 5.10.6), which is
/// packed. The ports are the guest's and the host's.
pub fn packet(at: u64, cid: u64, [from, to]: [u32; 2], op: u16) {
    write(at, cid);
    write(at + 8, HOST_CID);
    write(at + 16, from);
    write(at + 20, to);
    write(at + 24, 0_u32);
    // A stream.
    write(at + 28, 1_u16);
    write(at + 30, op);
    write(at + 32, 0_u32);
    write(at + 36, 1_u32 << 16);
    write(at + 40, 0_u32);
}

/// Text that is written to memory.
struct Text {
    at: u64,
    len: u32,
}

impl fmt::Write for Text {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        for byte in text.bytes() {
            write(self.at + u64::from(self.len), byte);
            self.len += 1;
        }
        Ok(())
    }
}
