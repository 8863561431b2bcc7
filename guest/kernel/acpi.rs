//! ACPI: which CPUs there are (MADT), and how to power off and reset (FADT). No AML: sleep type 5
//! is found by the name of its object.

use core::ptr;

use crate::boot::read;
use crate::cpu;
use crate::options::{MAX_CPUS, PortValue};
use crate::{tpm, virtio};

/// A register to write to (ACPI's Generic Address Structure), and what.
#[derive(Clone, Copy)]
pub enum Register {
    Port8(PortValue),
    Port16(u16, u16),
    Memory(u64, u8),
}

impl Register {
    pub fn write(self) {
        match self {
            Self::Port8(PortValue { port, value }) => cpu::out8(port, value),
            Self::Port16(port, value) => cpu::out16(port, value),
            Self::Memory(addr, value) => {
                // SAFETY: firmware says that a register is there; not being mapped is a fault
                // that will be reported.
                unsafe {
                    ptr::with_exposed_provenance_mut::<u8>(addr as usize).write_volatile(value)
                };
            }
        }
    }

    /// A byte-wide register from a Generic Address Structure.
    fn from_gas(at: u64, value: u8) -> Option<Self> {
        let addr: u64 = read(at + 4)?;
        match read::<u8>(at)? {
            _ if addr == 0 => None,
            0 => Some(Self::Memory(addr, value)),
            1 => Some(Self::Port8(PortValue {
                port: u16::try_from(addr).ok()?,
                value,
            })),
            _ => None,
        }
    }
}

/// The facts that the guest takes from the tables.
pub struct Platform {
    pub sleep: Option<Register>,
    pub reset: Option<Register>,
    pub apic_ids: [u32; MAX_CPUS as usize],
    pub cpus: u32,
}

impl Platform {
    /// Reads the tables that the RSDP leads to.
    pub fn read(rsdp: u64) -> Self {
        let mut platform = Self::default_ids();
        let is_rsdp = read(rsdp) == Some(*b"RSD PTR ");
        let Some(xsdt) = read::<u64>(rsdp.saturating_add(24)).filter(|_| is_rsdp) else {
            return platform;
        };
        let Some(len) = table(xsdt, *b"XSDT") else {
            return platform;
        };
        for at in (36..len.saturating_sub(7)).step_by(8) {
            let Some(address) = read::<u64>(xsdt + u64::from(at)) else {
                continue;
            };
            if let Some(len) = table(address, *b"FACP") {
                platform.read_fadt(address, len);
            } else if let Some(len) = table(address, *b"APIC") {
                platform.read_madt(address, len);
            } else if let Some(len) = table(address, *b"MCFG") {
                read_mcfg(address, len);
            } else if table(address, *b"TPM2").is_some_and(|len| len >= 52) {
                tpm::found(read(address + 40).unwrap_or(0));
            }
        }
        platform
    }

    fn default_ids() -> Self {
        let mut apic_ids = [0; MAX_CPUS as usize];
        for (id, place) in (0..).zip(&mut apic_ids) {
            *place = id;
        }
        Self {
            sleep: None,
            reset: None,
            apic_ids,
            cpus: 1,
        }
    }

    fn read_fadt(&mut self, fadt: u64, len: u32) {
        let flags: u32 = read(fadt + 112).unwrap_or(0);
        if flags & 1 << 10 != 0 && len >= 129 {
            let value = read(fadt + 128).unwrap_or(0);
            self.reset = Register::from_gas(fadt + 116, value);
        }
        let dsdt = Some(fadt + 140)
            .filter(|_| len >= 148)
            .and_then(read::<u64>)
            .filter(|at| *at != 0);
        let dsdt = dsdt
            .or_else(|| read::<u32>(fadt + 40).map(u64::from))
            .unwrap_or(0);
        let sleep_type = sleep_type_5(dsdt).unwrap_or(5) & 7;
        if flags & 1 << 20 != 0 && len >= 256 {
            // Hardware-reduced: the sleep type and SLP_EN in the sleep control register.
            self.sleep = Register::from_gas(fadt + 244, sleep_type << 2 | 1 << 5);
        } else {
            let control = read::<u32>(fadt + 64).and_then(|port| u16::try_from(port).ok());
            let value = u16::from(sleep_type) << 10 | 1 << 13;
            self.sleep = control
                .filter(|port| *port != 0)
                .map(|port| Register::Port16(port, value));
        }
    }

    fn read_madt(&mut self, madt: u64, len: u32) {
        let end = madt + u64::from(len);
        let mut at = madt + 44;
        let mut found = 0;
        while let Some([kind, size]) = read::<[u8; 2]>(at).filter(|_| at + 2 <= end) {
            let flags: u32 = read(at + 4).unwrap_or(0);
            // A local APIC that is enabled, and that xAPIC's 8-bit destinations reach.
            if kind == 0 && size >= 8 && flags & 1 != 0 {
                if let (Some(id), Some(place)) = (read::<u8>(at + 3), self.apic_ids.get_mut(found))
                {
                    *place = u32::from(id);
                    found += 1;
                }
            }
            // A structure of no length would never end the loop.
            if size < 2 {
                break;
            }
            at += u64::from(size);
        }
        self.cpus = (found as u32).max(1);
    }
}

/// The configuration spaces of PCI segments (PCI Firmware 3.2, 4.1.2).
fn read_mcfg(mcfg: u64, len: u32) {
    for at in (44..len.saturating_sub(15)).step_by(16) {
        let entry = mcfg + u64::from(at);
        if let (Some(ecam), Some(segment)) = (read(entry), read(entry + 8)) {
            virtio::add_segment(segment, ecam);
        }
    }
}

/// The length of a table, if it has this signature and its bytes add up to 0.
fn table(address: u64, signature: [u8; 4]) -> Option<u32> {
    let len: u32 = read(address + 4).filter(|_| read(address) == Some(signature))?;
    let mut sum = 0_u8;
    for offset in 0..u64::from(len.min(1 << 20)) {
        sum = sum.wrapping_add(read(address + offset)?);
    }
    (sum == 0).then_some(len)
}

/// The first element of the package `_S5_`.
fn sleep_type_5(dsdt: u64) -> Option<u8> {
    let end = dsdt + u64::from(table(dsdt, *b"DSDT")?);
    let name = (dsdt + 36..end).find(|at| read(*at) == Some(*b"_S5_"))?;
    // PackageOp, PkgLength (1 byte: such a package is short), NumElements, then an integer.
    let [op, _, _, first, second] = read::<[u8; 5]>(name + 4)?;
    match (op, first) {
        (0x12, 0x0a) => Some(second),
        (0x12, 0 | 1) => Some(first),
        _ => None,
    }
}
