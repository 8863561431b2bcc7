//! The ports: a serial port that is always ready to send, and two registers.

use std::collections::VecDeque;
use std::sync::mpsc::Sender;
use std::sync::{Arc, Mutex};
use std::time::Instant;

use guest::{FIRST_INSTRUCTION_PORT, FIRST_INSTRUCTION_VALUE, Line};
use hypervisor::ExitHandler;

use super::{End, Event};

/// The sleep control register, and what the guest finds in the DSDT to write there.
pub(crate) const SLEEP_PORT: u16 = 0x600;
pub(crate) const SLEEP_VALUE: u8 = 3 << 2 | 1 << 5;
/// The reset register, and what the FADT says to write there.
pub(crate) const RESET_PORT: u16 = 0x610;
pub(crate) const RESET_VALUE: u8 = 0x0e;

const DATA: u16 = 0x3f8;
const LINE_STATUS: u16 = 0x3fd;

pub(crate) type Input = VecDeque<u8>;

/// One vCPU's view of them.
pub(crate) struct Ports {
    events: Sender<Event>,
    input: Arc<Mutex<Input>>,
    line: Arc<Mutex<Vec<u8>>>,
    pub(crate) end: Option<End>,
}

impl Ports {
    pub(crate) fn new(
        events: Sender<Event>,
        input: Arc<Mutex<Input>>,
        line: Arc<Mutex<Vec<u8>>>,
    ) -> Self {
        Self {
            events,
            input,
            line,
            end: None,
        }
    }

    fn print(&self, byte: u8) {
        let mut line = self.line.lock().expect("no panic");
        line.push(byte);
        if byte != b'\n' {
            return;
        }
        let text = String::from_utf8(std::mem::take(&mut *line)).expect("text");
        let line = Line::parse(&text).unwrap_or_else(|| panic!("a line that is none: {text:?}"));
        let _ = self.events.send(Event::Line(Instant::now(), line));
    }
}

impl ExitHandler for Ports {
    fn io_read(&mut self, port: u16, data: &mut [u8]) {
        let mut input = self.input.lock().expect("no panic");
        data.fill(match port {
            DATA => input.pop_front().unwrap_or(0),
            LINE_STATUS => 0x60 | u8::from(!input.is_empty()),
            _ => 0xff,
        });
    }

    fn io_write(&mut self, port: u16, data: &[u8]) {
        match (port, data) {
            (DATA, [byte]) => self.print(*byte),
            (FIRST_INSTRUCTION_PORT, [FIRST_INSTRUCTION_VALUE]) => {
                let _ = self.events.send(Event::FirstInstruction(Instant::now()));
            }
            (SLEEP_PORT, [value]) => self.end = Some(End::Sleep(*value)),
            (RESET_PORT, [value]) => self.end = Some(End::Reset(*value)),
            _ => {}
        }
    }

    fn mmio_read(&mut self, _: u64, data: &mut [u8]) {
        data.fill(0xff);
    }

    fn mmio_write(&mut self, _: u64, _: &[u8]) {}
}
