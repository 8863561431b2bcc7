//! Driving virtio devices: what is written is read back and compared, what comes is sent back.

use core::sync::atomic::{
    AtomicU64,
    Ordering::{Acquire, Relaxed, Release},
};

use crate::boot::Ram;
use crate::clock;
use crate::line::Line;
use crate::pattern::{self, DISK_PAGES, PAGE_SIZE, Page};
use crate::tpm::{Answer, Tpm};
use crate::virtio::{Buffer, CHAINS, Device, Queue, devices, read, write};

pub const NET: u32 = 1;
const BLOCK: u32 = 2;
const CONSOLE: u32 = 3;
const RNG: u32 = 4;
const MEMORY: u32 = 24;
const WATCHDOG: u32 = 35;

const SECTORS_PER_PAGE: u64 = (PAGE_SIZE / 512) as u64;
/// Bytes in front of a frame (`virtio_net_hdr`, 5.1.6).
const NET_HEADER: u64 = 12;
/// Bytes for each buffer of a frame or of a console.
const BUFFER: u64 = 2048;

/// Progress so far. Only one CPU writes it.
#[derive(Default)]
pub struct Counts {
    devices: AtomicU64,
    random: AtomicU64,
    blocks: AtomicU64,
    frames: AtomicU64,
    chars: AtomicU64,
    tpm: AtomicU64,
    bad: AtomicU64,
}

pub static COUNTS: Counts = Counts {
    devices: AtomicU64::new(0),
    random: AtomicU64::new(0),
    blocks: AtomicU64::new(0),
    frames: AtomicU64::new(0),
    chars: AtomicU64::new(0),
    tpm: AtomicU64::new(0),
    bad: AtomicU64::new(0),
};

fn add(counter: &AtomicU64, count: u64) {
    counter.store(counter.load(Relaxed) + count, Release);
}

impl Counts {
    pub fn line(&self) -> Line {
        Line::Io {
            devices: self.devices.load(Acquire),
            random: self.random.load(Acquire),
            blocks: self.blocks.load(Acquire),
            frames: self.frames.load(Acquire),
            chars: self.chars.load(Acquire),
            tpm: self.tpm.load(Acquire),
            bad: self.bad.load(Acquire),
        }
    }
}

/// The devices that were found, the first of each kind.
pub struct Io {
    random: Option<Random>,
    disk: Option<Disk>,
    net: Option<Pair>,
    console: Option<Pair>,
    memory: Option<Memory>,
    watchdog: Option<Watchdog>,
    tpm: Option<Tpm>,
}

/// Free pages, one after the other.
pub struct Pages<'a> {
    ram: &'a Ram,
    next: u64,
}

impl<'a> Pages<'a> {
    /// All free pages.
    pub fn of(ram: &'a Ram) -> Self {
        Self { ram, next: 0 }
    }

    pub fn take(&mut self) -> u64 {
        self.next += 1;
        self.ram.page(self.next - 1)
    }
}

/// Starts all devices with all their queues.
pub fn start_all(ram: &Ram) -> Line {
    let mut pages = Pages::of(ram);
    let (mut started, mut queues) = (0, 0);
    for device in devices() {
        if !device.begin() {
            continue;
        }
        let count = device.queues();
        device.interrupt();
        for index in 0..count {
            device.interrupt_for(index);
            device.queue(index, pages.take());
        }
        device.go();
        started += 1;
        queues += u64::from(count);
    }
    Line::Queues {
        devices: started,
        queues,
    }
}

impl Io {
    pub fn start(ram: &Ram) -> Self {
        let mut io = Self {
            random: None,
            disk: None,
            net: None,
            console: None,
            memory: None,
            watchdog: None,
            tpm: Tpm::find(),
        };
        let mut pages = Pages::of(ram);
        for device in devices() {
            add(&COUNTS.devices, 1);
            if !device.begin() {
                add(&COUNTS.bad, 1);
                continue;
            }
            match device.kind {
                RNG if io.random.is_none() => io.random = Some(Random::new(&device, &mut pages)),
                BLOCK if io.disk.is_none() => io.disk = Some(Disk::new(&device, &mut pages)),
                NET if io.net.is_none() => io.net = Some(Pair::new(&device, &mut pages)),
                CONSOLE if io.console.is_none() => {
                    io.console = Some(Pair::new(&device, &mut pages));
                }
                WATCHDOG if io.watchdog.is_none() => {
                    io.watchdog = Some(Watchdog::new(&device, &mut pages));
                }
                MEMORY if io.memory.is_none() => {
                    io.memory = Some(Memory::new(&device, &mut pages));
                }
                _ => {}
            }
        }
        io
    }

    /// Looks at each device once; true if something was done.
    pub fn step(&mut self) -> bool {
        let mut busy = self.random.as_mut().is_some_and(Random::step);
        busy |= self.disk.as_mut().is_some_and(Disk::step);
        if let Some(net) = &mut self.net {
            busy |= net.step(answer_frame, &COUNTS.frames);
        }
        if let Some(console) = &mut self.console {
            busy |= console.step(|_, len| Some(len), &COUNTS.chars);
        }
        busy |= self.memory.as_mut().is_some_and(Memory::step);
        busy |= self.watchdog.as_mut().is_some_and(Watchdog::step);
        match self.tpm.as_mut().and_then(Tpm::step) {
            Some(Answer::Random(bytes)) => add(&COUNTS.tpm, bytes),
            Some(Answer::Bad) => add(&COUNTS.bad, 1),
            Some(Answer::Done) | None => {}
        }
        busy
    }
}

/// A watchdog (virtio device type 35): pings it every 100 ms, and checks the answer.
struct Watchdog {
    queue: Queue,
    page: u64,
    is_asked: bool,
    next_ms: u64,
}

impl Watchdog {
    const PERIOD_MS: u64 = 100;

    fn new(device: &Device, pages: &mut Pages<'_>) -> Self {
        let queue = device.queue(0, pages.take());
        device.go();
        Self {
            queue,
            page: pages.take(),
            is_asked: false,
            next_ms: 0,
        }
    }

    fn step(&mut self) -> bool {
        if self.is_asked {
            let Some((_, len)) = self.queue.done() else {
                return false;
            };
            let is_good = len == 1 && read::<u8>(self.page) == 1;
            add(&COUNTS.bad, u64::from(!is_good));
            self.is_asked = false;
            return true;
        }
        let now = clock::uptime_ms();
        if now < self.next_ms {
            return false;
        }
        self.next_ms = now + Self::PERIOD_MS;
        self.is_asked = true;
        write(self.page, 0_u8);
        self.queue.send(0, &[(self.page, 1, true)]);
        true
    }
}

/// The entropy device: asks for 64 bytes, again and again.
struct Random {
    queue: Queue,
    buffer: u64,
}

impl Random {
    const LEN: u32 = 64;

    fn new(device: &Device, pages: &mut Pages<'_>) -> Self {
        let queue = device.queue(0, pages.take());
        device.go();
        let mut random = Self {
            queue,
            buffer: pages.take(),
        };
        random.ask();
        random
    }

    fn ask(&mut self) {
        for at in (0..u64::from(Self::LEN)).step_by(8) {
            write(self.buffer + at, 0_u64);
        }
        self.queue.send(0, &[(self.buffer, Self::LEN, true)]);
    }

    fn step(&mut self) -> bool {
        let Some((_, len)) = self.queue.done() else {
            return false;
        };
        // That 8 of 64 random bytes are 0 one after the other does not happen.
        let given = u64::from(len / 8) * 8;
        let is_random = (0..given)
            .step_by(8)
            .all(|at| read::<u64>(self.buffer + at) != 0);
        add(&COUNTS.bad, u64::from(!is_random || len > Self::LEN));
        add(&COUNTS.random, u64::from(len));
        self.ask();
        true
    }
}

/// Hotplugged memory (virtio 1.3, 5.15): plugs the lowest blocks of the region, as many as are
/// requested, and writes to each, which is checked before the block is unplugged.
struct Memory {
    queue: Queue,
    config: u64,
    /// Request and answer.
    page: u64,
    /// The block that a request is about, and whether it plugs.
    asked: Option<(u64, bool)>,
}

impl Memory {
    const ANSWER: u64 = 64;

    fn new(device: &Device, pages: &mut Pages<'_>) -> Self {
        let queue = device.queue(0, pages.take());
        device.go();
        Self {
            queue,
            config: device.config,
            page: pages.take(),
            asked: None,
        }
    }

    fn register(&self, at: u64) -> u64 {
        read(self.config + at)
    }

    fn step(&mut self) -> bool {
        // Read each time: the host may resize the region's requested size at any moment.
        let (block, start) = (self.register(0), self.register(16));
        if let Some((at, plugs)) = self.asked {
            if self.queue.done().is_none() {
                return false;
            }
            self.asked = None;
            let is_done = read::<u16>(self.page + Self::ANSWER) == 0;
            add(&COUNTS.bad, u64::from(!is_done));
            if plugs && is_done {
                // Newly plugged memory reads as zeros: content would be another guest's, or this
                // one's of before.
                let is_new = read::<u64>(start + at) == 0;
                add(&COUNTS.bad, u64::from(!is_new));
                // Different in each block: memory that moves to another address is found out at the
                // unplug.
                write(start + at, !at);
            }
            return true;
        }
        let (plugged, requested) = (self.register(40), self.register(48));
        if plugged == requested {
            return false;
        }
        let plugs = plugged < requested;
        let at = if plugs { plugged } else { plugged - block };
        if !plugs {
            let is_kept = read::<u64>(start + at) == !at;
            add(&COUNTS.bad, u64::from(!is_kept));
        }
        write(self.page, u64::from(!plugs));
        write(self.page + 8, start + at);
        write(self.page + 16, 1_u64);
        write(self.page + Self::ANSWER, u16::MAX);
        let chain: [Buffer; 2] = [(self.page, 24, false), (self.page + Self::ANSWER, 10, true)];
        self.queue.send(0, &chain);
        self.asked = Some((at, plugs));
        true
    }
}

#[derive(Clone, Copy, PartialEq)]
enum Turn {
    /// Reading what an earlier round wrote.
    Check,
    Write,
    ReadBack,
}

/// A disk: writes pages round and round, each checked before and after.
struct Disk {
    queue: Queue,
    /// Header and status.
    head: u64,
    page: u64,
    slots: u64,
    writes: u64,
    turn: Turn,
}

impl Disk {
    fn new(device: &Device, pages: &mut Pages<'_>) -> Self {
        let queue = device.queue(0, pages.take());
        device.go();
        let capacity: u64 = read(device.config);
        let mut disk = Self {
            queue,
            head: pages.take(),
            page: pages.take(),
            slots: (capacity / SECTORS_PER_PAGE).min(DISK_PAGES as u64),
            writes: 0,
            turn: Turn::Write,
        };
        if disk.slots > 0 {
            disk.ask();
        }
        disk
    }

    fn slot(&self) -> u64 {
        self.writes % self.slots
    }

    fn generation(&self) -> u64 {
        self.writes / self.slots + 1
    }

    fn page(&mut self) -> &mut Page {
        // SAFETY: a page that is the disk's alone, and not with the device.
        unsafe { &mut *core::ptr::with_exposed_provenance_mut::<Page>(self.page as usize) }
    }

    fn ask(&mut self) {
        let (slot, generation) = (self.slot(), self.generation());
        let is_write = self.turn == Turn::Write;
        if is_write {
            pattern::fill(self.page(), slot, generation);
        } else {
            // A device that reports success without reading leaves zeros, which match no pattern.
            self.page().fill(0);
        }
        write(self.head, u32::from(is_write));
        write(self.head + 4, 0_u32);
        write(self.head + 8, slot * SECTORS_PER_PAGE);
        // No status of virtio-blk: a device that completes without writing it is found out.
        write(self.head + 16, 0xff_u8);
        let chain: [Buffer; 3] = [
            (self.head, 16, false),
            (self.page, PAGE_SIZE as u32, !is_write),
            (self.head + 16, 1, true),
        ];
        self.queue.send(0, &chain);
    }

    fn step(&mut self) -> bool {
        if self.queue.done().is_none() {
            return false;
        }
        let (slot, generation) = (self.slot(), self.generation());
        let good = read::<u8>(self.head + 16) == 0
            && match self.turn {
                Turn::Check => pattern::matches(self.page(), slot, generation - 1),
                Turn::Write => true,
                Turn::ReadBack => pattern::matches(self.page(), slot, generation),
            };
        add(&COUNTS.bad, u64::from(!good));
        self.turn = match self.turn {
            Turn::Check => Turn::Write,
            Turn::Write => Turn::ReadBack,
            Turn::ReadBack => {
                self.writes += 1;
                add(&COUNTS.blocks, 1);
                if self.generation() > 1 {
                    Turn::Check
                } else {
                    Turn::Write
                }
            }
        };
        self.ask();
        true
    }
}

/// A queue that receives and one that sends: what comes is answered from the same buffer.
struct Pair {
    receive: Queue,
    send: Queue,
    buffers: [u64; CHAINS as usize],
}

impl Pair {
    fn new(device: &Device, pages: &mut Pages<'_>) -> Self {
        let (receive, send) = (device.queue(0, pages.take()), device.queue(1, pages.take()));
        device.go();
        let mut pair = Self {
            receive,
            send,
            buffers: [0; CHAINS as usize],
        };
        for chain in 0..CHAINS {
            if let Some(buffer) = pair.buffers.get_mut(usize::from(chain)) {
                *buffer = pages.take();
            }
            pair.offer(chain);
        }
        pair
    }

    fn buffer(&self, chain: u16) -> u64 {
        self.buffers.get(usize::from(chain)).copied().unwrap_or(0)
    }

    fn offer(&mut self, chain: u16) {
        let buffer = self.buffer(chain);
        self.receive.send(chain, &[(buffer, BUFFER as u32, true)]);
    }

    /// Has `answer` make an answer of what came, in place, and say how long it is.
    fn step(&mut self, answer: impl Fn(u64, u32) -> Option<u32>, count: &AtomicU64) -> bool {
        let mut busy = false;
        if let Some((chain, _)) = self.send.done() {
            self.offer(chain);
            busy = true;
        }
        if let Some((chain, len)) = self.receive.done() {
            let buffer = self.buffer(chain);
            match answer(buffer, len) {
                Some(len) => {
                    // A console's are counted each, frames together.
                    let one = core::ptr::eq(count, &COUNTS.frames);
                    add(count, if one { 1 } else { u64::from(len) });
                    // From the buffer that it came in: the chain is offered for receiving again
                    // when it was sent.
                    self.send.send(chain, &[(buffer, len, false)]);
                }
                None => self.offer(chain),
            }
            busy = true;
        }
        busy
    }
}

/// Answers who has any address (ARP), and sends UDP datagrams back.
fn answer_frame(buffer: u64, len: u32) -> Option<u32> {
    let frame = buffer + NET_HEADER;
    let byte = |at: u64| read::<u8>(frame + at);
    let swap = |a: u64, b: u64, len: u64| {
        for at in 0..len {
            let (first, second) = (byte(a + at), byte(b + at));
            write(frame + a + at, second);
            write(frame + b + at, first);
        }
    };
    let header = || {
        for at in 0..NET_HEADER {
            write(buffer + at, 0_u8);
        }
    };
    match (byte(12), byte(13)) {
        // ARP, a request.
        (8, 6) if len >= 54 && byte(21) == 1 => {
            header();
            write(frame + 21, 2_u8);
            // The asked becomes the sender, with an address of our own.
            swap(22, 32, 10);
            for at in 0..6 {
                write(frame + at, byte(6 + at));
            }
            for (at, part) in (0..).zip([0x02_u8, 0x57, 0x68, 0x69, 0x6d, 0x42]) {
                write(frame + 6 + at, part);
                write(frame + 22 + at, part);
            }
            Some(len)
        }
        // UDP in IPv4: sums stay, for they do not mind the order.
        (8, 0) if len >= 54 && byte(14) == 0x45 && byte(23) == 17 => {
            header();
            swap(0, 6, 6);
            swap(26, 30, 4);
            swap(34, 36, 2);
            Some(len)
        }
        _ => None,
    }
}
