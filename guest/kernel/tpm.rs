//! A TPM 2.0 with a command response buffer (TCG PC Client Platform TPM Profile, 6.5): starts it and
//! asks for random numbers, ten times a second.

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
const fn command(code: u16, parameter: u16) -> [u8; 12] {
    let ([a, b], [c, d]) = (code.to_be_bytes(), parameter.to_be_bytes());
    [0x80, 1, 0, 0, 0, 12, 0, 0, a, b, c, d]
}

pub struct Tpm {
    base: u64,
    is_started: bool,
    is_asked: bool,
    next_ms: u64,
}

/// An answer of the TPM.
pub enum Answer {
    /// Random bytes.
    Random(u64),
    /// None, which is right.
    Started,
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
            is_started: false,
            is_asked: false,
            next_ms: 0,
        })
    }

    fn ask(&mut self, command: [u8; 12]) {
        write(self.base + CTRL_REQ, 1_u32);
        for (at, byte) in (self.base + BUFFER..).zip(command) {
            write(at, byte);
        }
        write(self.base + START, 1_u32);
        self.is_asked = true;
    }

    pub fn step(&mut self) -> Option<Answer> {
        if !self.is_asked {
            let now = clock::uptime_ms();
            if now >= self.next_ms {
                self.next_ms = now + PERIOD_MS;
                self.ask(match self.is_started {
                    false => command(0x144, 0),
                    true => command(0x17b, RANDOM),
                });
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
        if !self.is_started {
            self.is_started = true;
            return Some(Answer::Started);
        }
        let len = u16::from_be(read(self.base + BUFFER + 10));
        // That 8 of 16 random bytes are 0 one after the other does not happen.
        let is_random = read::<u32>(self.base + BUFFER + 12) != 0
            || read::<u32>(self.base + BUFFER + 16) != 0;
        Some(match len == RANDOM && is_random {
            true => Answer::Random(len.into()),
            false => Answer::Bad,
        })
    }
}
