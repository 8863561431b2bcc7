//! A function's registers.

use std::ops::Range;

use super::{CONFIG_LEN, Identity};

const VENDOR: usize = 0x00;
const DEVICE: usize = 0x02;
/// The command register.
pub(super) const COMMAND: usize = 0x04;
/// Command register: memory BARs are decoded.
pub(super) const COMMAND_MEMORY: u16 = 1 << 1;
/// Bit of the command register: the function may read and write memory, and send messages.
pub(super) const COMMAND_MASTER: u16 = 1 << 2;
const STATUS: usize = 0x06;
const STATUS_CAPABILITIES: u16 = 1 << 4;
const REVISION: usize = 0x08;
const CLASS: usize = 0x09;
/// Offset of the header type.
pub(super) const HEADER_TYPE: usize = 0x0e;
/// Header type of a function 0: the slot has other functions.
pub(super) const MULTI_FUNCTION: u8 = 1 << 7;
/// The first of six BARs.
pub(super) const BARS: usize = 0x10;
const SUBSYSTEM_VENDOR: usize = 0x2c;
const SUBSYSTEM: usize = 0x2e;
const CAPABILITIES: usize = 0x34;
const INTERRUPT_LINE: usize = 0x3c;
/// The area of capabilities.
const CAPABILITY_AREA: Range<usize> = 0x40..0x100;

/// A function's register file: what reads give, and which bits writes change.
#[derive(Clone)]
pub struct Registers {
    bytes: Box<[u8; CONFIG_LEN]>,
    writable: Box<[u8; CONFIG_LEN]>,
    /// The area of each capability, in the order of the list.
    capabilities: Vec<Range<usize>>,
}

impl Registers {
    /// A function of type 0 without BARs and capabilities. The guest may set the command
    /// register's bits and the interrupt line.
    #[must_use]
    pub fn new(identity: Identity) -> Self {
        let mut registers = Self {
            bytes: Box::new([0; CONFIG_LEN]),
            writable: Box::new([0; CONFIG_LEN]),
            capabilities: Vec::new(),
        };
        registers.set(VENDOR, &identity.vendor.to_le_bytes());
        registers.set(DEVICE, &identity.device.to_le_bytes());
        registers.set(REVISION, &[identity.revision]);
        registers.set(CLASS, &identity.class.to_le_bytes()[..3]);
        registers.set(SUBSYSTEM_VENDOR, &identity.subsystem.0.to_le_bytes());
        registers.set(SUBSYSTEM, &identity.subsystem.1.to_le_bytes());
        // I/O space, memory space, bus master, interrupt disable.
        registers.allow(COMMAND, &0x0407_u16.to_le_bytes());
        registers.allow(INTERRUPT_LINE, &[0xff]);
        registers
    }

    pub(super) fn set(&mut self, at: usize, value: &[u8]) {
        if let Some(bytes) = self.bytes.get_mut(at..at + value.len()) {
            bytes.copy_from_slice(value);
        }
    }

    pub(super) fn allow(&mut self, at: usize, mask: &[u8]) {
        if let Some(bytes) = self.writable.get_mut(at..at + mask.len()) {
            bytes.copy_from_slice(mask);
        }
    }

    /// Fills `data` with the registers from `at` on; past the end, with ones.
    pub fn read(&self, at: usize, data: &mut [u8]) {
        for (i, byte) in data.iter_mut().enumerate() {
            *byte = at
                .checked_add(i)
                .and_then(|at| self.bytes.get(at))
                .copied()
                .unwrap_or(0xff);
        }
    }

    /// Changes the bits that may be changed.
    pub fn write(&mut self, at: usize, data: &[u8]) {
        for (i, value) in data.iter().enumerate() {
            let Some(at) = at.checked_add(i).filter(|at| *at < CONFIG_LEN) else {
                return;
            };
            // Read-only bits keep their values, which PCI asks for (3.0, 6.1): a write never
            // faults. The same masks make BAR sizing work: the low bits of an address register are
            // read-only zeros.
            let mask = self.writable[at];
            self.bytes[at] = self.bytes[at] & !mask | value & mask;
        }
    }

    /// Adds a capability (PCI Local Bus 3.0, 6.7) with this body behind its two-byte header, and
    /// these bits of the body for the guest to write. Returns the capability's offset; `None` when
    /// there is no room for it.
    #[must_use]
    pub fn add_capability(&mut self, id: u8, body: &[u8], writable: &[u8]) -> Option<usize> {
        let (link, free) = match self.capabilities.last() {
            Some(last) => (last.start + 1, last.end),
            None => (CAPABILITIES, CAPABILITY_AREA.start),
        };
        // Capabilities start at multiples of 4 (PCI Local Bus 3.0, 6.7): the low two bits of the
        // link are reserved.
        let end = free.checked_add(2 + body.len())?.next_multiple_of(4);
        if end > CAPABILITY_AREA.end {
            return None;
        }
        // The link is written after the check of the room, so that a list never points at a
        // capability that is not there.
        self.bytes[link] = u8::try_from(free).ok()?;
        self.set(free, &[id, 0]);
        self.set(free + 2, body);
        self.allow(free + 2, writable);
        self.capabilities.push(free..end);
        let status = self.get_u16(STATUS) | STATUS_CAPABILITIES;
        self.set(STATUS, &status.to_le_bytes());
        Some(free)
    }

    pub(super) fn is_master(&self) -> bool {
        self.get_u16(COMMAND) & COMMAND_MASTER != 0
    }

    pub(super) fn get_u16(&self, at: usize) -> u16 {
        let mut bytes = [0; 2];
        self.read(at, &mut bytes);
        u16::from_le_bytes(bytes)
    }

    pub(super) fn get_u32(&self, at: usize) -> u32 {
        let mut bytes = [0; 4];
        self.read(at, &mut bytes);
        u32::from_le_bytes(bytes)
    }

    /// The first 256 bytes: all that a guest can have changed.
    pub(super) fn header(&self) -> &[u8] {
        &self.bytes[..CAPABILITY_AREA.end]
    }

    /// Takes what the guest had written into a function like this one.
    ///
    /// # Errors
    /// The first register that differs though the guest cannot have written it.
    pub(super) fn restore(&mut self, header: &[u8; CAPABILITY_AREA.end]) -> Result<(), usize> {
        // Identity, BAR sizes and capabilities must be those of this function: state of another
        // device would make the guest's driver talk to the wrong registers.
        let differs = |at: &usize| (self.bytes[*at] ^ header[*at]) & !self.writable[*at] != 0;
        if let Some(at) = (0..header.len()).find(differs) {
            return Err(at);
        }
        self.bytes[..header.len()].copy_from_slice(header);
        Ok(())
    }
}
