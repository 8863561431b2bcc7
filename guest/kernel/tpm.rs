//! A TPM 2.0 with a command response buffer (TCG PC Client Platform TPM Profile, 6.5): starts it,
//! extends a PCR, and ten times a second asks for random numbers or reads the PCR, in turn. Nothing
//! but a reset of the machine may change the PCR.

use core::sync::atomic::{AtomicU64, Ordering::Relaxed};

use crate::clock;
use crate::virtio::{read, write};

/// The address of the registers; 0 where ACPI lists no TPM.
static BASE: AtomicU64 = AtomicU64::new(0);

/// Notes where the control area is, behind the first 0x40 bytes of registers.
pub fn found(control_area: u64) {
    BASE.store(control_area.saturating_sub(0x40), Relaxed);
}

const LOC_CTRL: u64 = 0x08;
const CTRL_REQ: u64 = 0x40;
const CTRL_STS: u64 = 0x44;
const START: u64 = 0x4c;
const BUFFER: u64 = 0x80;
const PERIOD_MS: u64 = 100;
/// Bytes of each answer.
const RANDOM: u16 = 16;

/// TPM2_Startup (clear) and TPM2_GetRandom (TPM 2.0 Library, part 3): a header of tag, length and code,
/// and a parameter of two bytes.
const STARTUP: [u8; 12] = [0x80, 1, 0, 0, 0, 12, 0, 0, 1, 0x44, 0, 0];
const GET_RANDOM: [u8; 12] = [0x80, 1, 0, 0, 0, 12, 0, 0, 1, 0x7b, 0, RANDOM as u8];
/// TPM2_PCR_Extend of PCR 16, authorised by an empty password, by one digest: that of SHA-256, which
/// consists of the 32 bytes behind this.
const EXTEND: [u8; 33] = [
    0x80, 2, 0, 0, 0, 65, 0, 0, 1, 0x82, // header
    0, 0, 0, 16, // PCR
    0, 0, 0, 9, 0x40, 0, 0, 9, 0, 0, 0, 0, 0, // authorisation
    0, 0, 0, 1, 0, 0xb, // digest
];
const DIGEST: u64 = 32;
/// TPM2_PCR_Read of PCR 16 with SHA-256.
const PCR_READ: [u8; 20] = [
    0x80, 1, 0, 0, 0, 20, 0, 0, 1, 0x7e, 0, 0, 0, 1, 0, 0xb, 3, 0, 0, 1,
];
/// Offset of the first 8 bytes of the PCR in the response.
const PCR: u64 = 30;

/// The commands, in their order. The last two take turns.
#[derive(Clone, Copy)]
enum Step {
    Startup,
    Extend,
    GetRandom,
    ReadPcr,
}

pub struct Tpm {
    base: u64,
    step: Step,
    is_asked: bool,
    next_ms: u64,
    /// The start of the PCR, once it was read.
    pcr: Option<u64>,
}

/// An answer of the TPM.
pub enum Answer {
    /// Random bytes.
    Random(u64),
    /// No random bytes, as it should be.
    Done,
    /// A failure.
    Bad,
}

impl Tpm {
    /// The TPM that ACPI lists.
    pub fn find() -> Option<Self> {
        let base = Some(BASE.load(Relaxed)).filter(|base| *base != 0)?;
        write(base + LOC_CTRL, 1_u32);
        Some(Self {
            base,
            step: Step::Startup,
            is_asked: false,
            next_ms: 0,
            pcr: None,
        })
    }

    fn ask(&mut self) {
        let (command, digest): (&[u8], u64) = match self.step {
            Step::Startup => (&STARTUP, 0),
            Step::Extend => (&EXTEND, DIGEST),
            Step::GetRandom => (&GET_RANDOM, 0),
            Step::ReadPcr => (&PCR_READ, 0),
        };
        // The driver asks for the ready state before it fills the buffer (PTP 1.05, 6.5).
        write(self.base + CTRL_REQ, 1_u32);
        let mut at = self.base + BUFFER;
        for byte in command {
            write(at, *byte);
            at += 1;
        }
        for at in at..at + digest {
            write(at, 0x5a_u8);
        }
        write(self.base + START, 1_u32);
        self.is_asked = true;
    }

    pub fn step(&mut self) -> Option<Answer> {
        if !self.is_asked {
            let now = clock::uptime_ms();
            if now >= self.next_ms {
                self.next_ms = now + PERIOD_MS;
                self.ask();
            }
            return None;
        }
        if read::<u32>(self.base + START) != 0 {
            return None;
        }
        self.is_asked = false;
        let code = u32::from_be(read(self.base + BUFFER + 6));
        if read::<u32>(self.base + CTRL_STS) & 1 != 0 || code != 0 {
            return Some(Answer::Bad);
        }
        match self.step {
            Step::Startup => {
                self.step = Step::Extend;
                Some(Answer::Done)
            }
            Step::Extend => {
                self.step = Step::ReadPcr;
                Some(Answer::Done)
            }
            Step::GetRandom => {
                self.step = Step::ReadPcr;
                Some(self.random())
            }
            Step::ReadPcr => {
                self.step = Step::GetRandom;
                let now = read::<u64>(self.base + BUFFER + PCR);
                // An extended PCR that begins with 8 bytes of 0 does not happen.
                let is_right = now != 0 && *self.pcr.get_or_insert(now) == now;
                Some(if is_right { Answer::Done } else { Answer::Bad })
            }
        }
    }

    fn random(&self) -> Answer {
        let len = u16::from_be(read(self.base + BUFFER + 10));
        // That 8 of 16 random bytes are 0 one after the other does not happen.
        let is_random = read::<u32>(self.base + BUFFER + 12) != 0
            || read::<u32>(self.base + BUFFER + 16) != 0;
        match len == RANDOM && is_random {
            true => Answer::Random(len.into()),
            false => Answer::Bad,
        }
    }
}
