//! Attacks on the host: each breaks the rules, or costs its VMM more than a guest should be able to,
//! again and again. A step of an attack is one round; the heartbeat counts the rounds.

use core::sync::atomic::{Ordering::SeqCst, fence};

use crate::boot::Ram;
use crate::cpu;
use crate::options::Attack;
use crate::pattern::PAGE_SIZE;
use crate::virtio::{Buffer, Device, devices, read, write};
use crate::vsock::{HEADER, OP_REQUEST, OP_RST, VSOCK, packet};

const BLOCK: u32 = 2;
const RNG: u32 = 4;

/// The hotplug block's register of ejected slots, and the serial port's data register.
const EJECT_PORT: u16 = 0x628;
const SERIAL_DATA: u16 = 0x3f8;
/// Port accesses of one round.
const ACCESSES: u32 = 64;

const F_DISCARD: u32 = 1 << 13;
const F_INDIRECT_DESC: u32 = 1 << 28;
const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;

/// Entries of each queue. Any number of chains is put into it; the tables of one round fit.
const ENTRIES: u16 = 64;
/// Entries of the longest indirect table: many times those of its queue.
const TABLE: u16 = 4096;
const DESCRIPTOR: u64 = 16;
/// Looks at a ring before a round ends without an answer. The device may be broken on purpose.
const LOOKS: u32 = 200;
/// An address at which no guest of this kind has memory.
const NOWHERE: u64 = 1 << 44;

const VIRTIO_BLK_T_DISCARD: u32 = 11;
const SECTORS_MAX: u64 = 1 << 21;

/// Packets of one round: their headers fill half of a page.
const PACKETS: u16 = 32;
const FIRST_PORT: u32 = 1024;
/// The number of devices that are attacked.
const DEVICES: usize = 8;

/// An attack in progress.
pub struct Attacker {
    attack: Attack,
    devices: [Option<Device>; DEVICES],
    rings: [Rings; 2],
    /// A table of [`TABLE`] descriptors.
    table: u64,
    /// Requests and headers.
    data: u64,
    is_started: bool,
    rounds: u64,
    next_port: u32,
}

impl Attacker {
    /// Uses the first free pages that are one after the other.
    pub fn new(attack: Attack, ram: &Ram) -> Self {
        let mut found = devices().filter(|device| is_target(attack, device.kind));
        let table_pages = u64::from(TABLE) * DESCRIPTOR / PAGE_SIZE as u64;
        // Three pages for each of two queues, one for data, and the table.
        let base = contiguous(ram, 7 + table_pages);
        let page = |index: u64| base + index * PAGE_SIZE as u64;
        Self {
            attack,
            devices: [(); DEVICES].map(|()| found.next()),
            rings: [Rings::new(0, page(0)), Rings::new(1, page(3))],
            data: page(6),
            table: page(7),
            is_started: false,
            rounds: 0,
            next_port: FIRST_PORT,
        }
    }

    /// Attacks for one round.
    pub fn step(&mut self) {
        match self.attack {
            Attack::Eject => (0..ACCESSES).for_each(|_| cpu::out32(EJECT_PORT, u32::MAX)),
            Attack::SerialReads => (0..ACCESSES).for_each(|_| {
                cpu::in8(SERIAL_DATA);
            }),
            Attack::Status => self.each(|device| {
                // Rings in no memory: the device finds that out and needs a reset.
                if device.begin() {
                    device.enable(0, ENTRIES, [NOWHERE; 3]);
                    device.go();
                }
            }),
            Attack::Config => self.each(|device| device.move_about()),
            Attack::Requeue => self.requeue(),
            Attack::Chains => self.chains(),
            Attack::Discards => self.discards(),
            Attack::Vsock => self.vsock(),
        }
        self.rounds += 1;
    }

    fn each(&self, attack: impl Fn(&Device)) {
        self.devices.iter().flatten().for_each(attack);
    }

    /// The one device that the attack needs. Without it a round does nothing.
    fn device(&self) -> Option<Device> {
        *self.devices.first()?
    }

    /// Starts the device with these features and queues, unless it runs.
    fn start(&mut self, features: u32, queues: usize) -> Option<Device> {
        let device = self.device()?;
        if self.is_started && !device.needs_reset() {
            return Some(device);
        }
        self.is_started = device.begin_with(features);
        for rings in self.rings.iter_mut().take(queues) {
            rings.start(&device);
        }
        device.go();
        self.is_started.then_some(device)
    }

    /// Breaks a queue by an index that is too far ahead, then enables it again without a reset.
    fn requeue(&mut self) {
        self.is_started = false;
        let Some(device) = self.start(0, 1) else {
            return;
        };
        let [rings, _] = &mut self.rings;
        // The ring has room for half of them (virtio 1.3, 2.7): the index alone breaks the queue.
        rings.publish(ENTRIES * 2);
        for _ in 0..16 {
            device.enable_again(0);
            rings.ring();
        }
    }

    /// One chain for each entry of the queue, each an indirect table of empty buffers: in turn as
    /// long as the queue, which is legal, and far longer.
    fn chains(&mut self) {
        if self.start(F_INDIRECT_DESC, 1).is_none() {
            return;
        }
        let len = if self.rounds.is_multiple_of(2) {
            ENTRIES
        } else {
            TABLE
        };
        for at in 0..len {
            let next = if at + 1 == len { 0 } else { NEXT };
            descriptor(self.table, at, (self.data, 0, true), next, at + 1);
        }
        let [rings, _] = &mut self.rings;
        for head in 0..ENTRIES {
            let table = (self.table, u32::from(len) * DESCRIPTOR as u32, false);
            descriptor(rings.descriptors(), head, table, INDIRECT, 0);
            rings.offer(head, head);
        }
        // No more than the ring has room for: that would break the queue before the chains do.
        rings.publish(rings.taken());
        rings.wait();
    }

    /// Discards the whole disk with each chain.
    fn discards(&mut self) {
        let Some(device) = self.start(F_DISCARD, 1) else {
            return;
        };
        let sectors = read::<u64>(device.config).min(SECTORS_MAX);
        let data = self.data;
        write(data, VIRTIO_BLK_T_DISCARD);
        write(data + 4, 0_u32);
        write(data + 8, 0_u64);
        // The segment: first sector, sectors, flags.
        write(data + 16, 0_u64);
        write(data + 24, sectors as u32);
        write(data + 28, 0_u32);
        let [rings, _] = &mut self.rings;
        let chains = ENTRIES / 3;
        for chain in 0..chains {
            let head = chain * 3;
            let table = rings.descriptors();
            descriptor(table, head, (data, 16, false), NEXT, head + 1);
            descriptor(table, head + 1, (data + 16, 16, false), NEXT, head + 2);
            let status = data + 64 + u64::from(chain);
            descriptor(table, head + 2, (status, 1, true), 0, 0);
            rings.offer(chain, head);
        }
        rings.publish(chains.min(rings.taken()));
        rings.wait();
    }

    /// Asks for connections and takes each third back at once. The host's end never accepts the
    /// others; each costs the host a descriptor.
    fn vsock(&mut self) {
        let Some(device) = self.start(0, 2) else {
            return;
        };
        let cid = read::<u64>(device.config);
        let data = self.data;
        let [rx, tx] = &mut self.rings;
        for index in 0..ENTRIES {
            // All answers go to the same place: nothing reads them.
            let answer = (data + PAGE_SIZE as u64 / 2, 64, true);
            descriptor(rx.descriptors(), index, answer, 0, 0);
            rx.offer(index, index);
        }
        rx.publish(rx.taken());
        for index in 0..PACKETS {
            let is_reset = index % 4 == 1;
            if !is_reset {
                self.next_port = self.next_port.wrapping_add(1).max(FIRST_PORT);
            }
            let header = data + u64::from(index) * 64;
            packet(
                header,
                cid,
                [self.next_port, Attack::VSOCK_PORT],
                if is_reset { OP_RST } else { OP_REQUEST },
            );
            let buffer = (header, HEADER, false);
            descriptor(tx.descriptors(), index, buffer, 0, 0);
            tx.offer(index, index);
        }
        tx.publish(PACKETS.min(tx.taken()));
        tx.wait();
    }
}

fn is_target(attack: Attack, kind: u32) -> bool {
    match attack {
        Attack::Eject | Attack::SerialReads => false,
        Attack::Status | Attack::Config => true,
        Attack::Requeue | Attack::Chains => kind == RNG,
        Attack::Discards => kind == BLOCK,
        Attack::Vsock => kind == VSOCK,
    }
}

/// Returns the first of so many free pages that are one after the other.
fn contiguous(ram: &Ram, count: u64) -> u64 {
    let is_whole = |first: &u64| {
        let end = ram.page(*first) + (count - 1) * PAGE_SIZE as u64;
        ram.page(first + count - 1) == end
    };
    let first = (0..ram.pages().saturating_sub(count)).find(is_whole);
    ram.page(first.unwrap_or(0))
}

fn descriptor(table: u64, index: u16, (addr, len, writable): Buffer, flags: u16, next: u16) {
    let at = table + DESCRIPTOR * u64::from(index);
    write(at, addr);
    write(at + 8, len);
    write(at + 12, flags | if writable { WRITE } else { 0 });
    write(at + 14, next);
}

/// A queue of [`ENTRIES`] entries whose driver keeps no book of its chains.
struct Rings {
    index: u16,
    /// The pages of descriptors, available ring and used ring.
    pages: u64,
    doorbell: u64,
    available: u16,
}

impl Rings {
    fn new(index: u16, pages: u64) -> Self {
        Self {
            index,
            pages,
            doorbell: 0,
            available: 0,
        }
    }

    fn descriptors(&self) -> u64 {
        self.pages
    }

    fn available(&self) -> u64 {
        self.pages + PAGE_SIZE as u64
    }

    fn used(&self) -> u64 {
        self.pages + 2 * PAGE_SIZE as u64
    }

    fn start(&mut self, device: &Device) {
        for offset in (0..3 * PAGE_SIZE as u64).step_by(8) {
            write::<u64>(self.pages + offset, 0);
        }
        self.available = 0;
        let rings = [self.descriptors(), self.available(), self.used()];
        self.doorbell = device.enable(self.index, ENTRIES, rings);
    }

    /// Puts a chain in place `at` behind those that are published.
    fn offer(&self, at: u16, head: u16) {
        let slot = self.available.wrapping_add(at) % ENTRIES;
        write(self.available() + 4 + 2 * u64::from(slot), head);
    }

    /// Gives the device the next `count` entries of the ring, and rings its doorbell.
    fn publish(&mut self, count: u16) {
        self.available = self.available.wrapping_add(count);
        fence(SeqCst);
        write(self.available() + 2, self.available);
        self.ring();
    }

    fn ring(&self) {
        fence(SeqCst);
        write(self.doorbell, self.index);
    }

    /// Entries of the ring that the device does not have.
    fn taken(&self) -> u16 {
        let used = read::<u16>(self.used() + 2);
        ENTRIES - self.available.wrapping_sub(used).min(ENTRIES)
    }

    /// Waits until the device has used all, but not for ever: it may be broken.
    fn wait(&self) {
        for _ in 0..LOOKS {
            if self.taken() == ENTRIES {
                return;
            }
            // The way to the host costs more than the look and lets other threads run.
            cpu::out8(0x80, 0);
        }
    }
}
