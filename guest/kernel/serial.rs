//! COM1, a 16550.

use core::fmt::{self, Write};
use core::sync::atomic::{
    AtomicBool,
    Ordering::{Acquire, Relaxed, Release},
};

use crate::apic;
use crate::cpu::{self, in8, out8};
use crate::line::Line;

const DATA: u16 = 0x3f8;
const INTERRUPT_ENABLE: u16 = DATA + 1;
const FIFO_CONTROL: u16 = DATA + 2;
const MODEM_CONTROL: u16 = DATA + 4;
const LINE_STATUS: u16 = DATA + 5;

const DATA_READY: u8 = 1;
const TRANSMITTER_EMPTY: u8 = 1 << 5;
const FIFO_BYTES: usize = 16;
/// Its interrupt: pin of the I/O APIC.
const PIN: u32 = 4;

/// Lets received bytes interrupt the first CPU.
pub fn start(apic_id: u32) {
    out8(FIFO_CONTROL, 0x07);
    out8(MODEM_CONTROL, 0x0b);
    apic::route(PIN, apic_id);
    out8(INTERRUPT_ENABLE, 0x01);
}

static BUSY: AtomicBool = AtomicBool::new(false);

/// Prints a line, whole.
pub fn say(line: &Line) {
    // A CPU that has died while it printed must not silence the others.
    for _ in 0..100_000 {
        if BUSY.compare_exchange(false, true, Acquire, Relaxed).is_ok() {
            break;
        }
        core::hint::spin_loop();
    }
    let mut out = Fifo { room: 0 };
    // It cannot fail.
    let _ = write!(out, "{line}\r\n");
    BUSY.store(false, Release);
}

struct Fifo {
    room: usize,
}

impl Write for Fifo {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        for byte in text.bytes() {
            if self.room == 0 {
                // Bounded: a port where nothing is reads as all ones, but a device may be stuck.
                for _ in 0..1000 {
                    if in8(LINE_STATUS) & TRANSMITTER_EMPTY != 0 {
                        break;
                    }
                }
                self.room = FIFO_BYTES;
            }
            out8(DATA, byte);
            self.room -= 1;
            // Printing takes a while: it is no gap.
            cpu::look();
        }
        Ok(())
    }
}

/// A line that is coming in.
pub struct Input {
    line: [u8; 64],
    len: usize,
}

impl Input {
    pub const fn new() -> Self {
        Self {
            line: [0; 64],
            len: 0,
        }
    }

    /// Takes what was received; calls `act` with each line.
    pub fn poll(&mut self, mut act: impl FnMut(&str)) {
        // Bounded, for a port where nothing is reads as all ones.
        for _ in 0..4096 {
            let status = in8(LINE_STATUS);
            if status == 0xff || status & DATA_READY == 0 {
                return;
            }
            match in8(DATA) {
                b'\r' | b'\n' => {
                    if self.len > 0 {
                        let line = self.line.get(..self.len).unwrap_or_default();
                        act(core::str::from_utf8(line).unwrap_or("?"));
                    }
                    self.len = 0;
                }
                byte => {
                    // What is too long is no command; its end shows that.
                    let last = self.line.len() - 1;
                    self.line[self.len.min(last)] = byte;
                    self.len = (self.len + 1).min(last + 1);
                }
            }
        }
    }
}
