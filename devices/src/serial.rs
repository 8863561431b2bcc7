//! The serial port: a 16550A on vm-superio's.

use std::io::{self, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Instant;

use memory::DeviceOps;
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use state::{Load, LoadError, LoadScope, Save, SaveError, Saved, Scope};
use vm_superio::serial::{SerialEvents, SerialState};

use crate::console::ConsoleInput;
use crate::debug_port::OnFirst;
use crate::interrupt::InterruptLine;

/// Counters of the port.
#[derive(Debug, Default)]
struct Counts {
    bytes_out: AtomicU64,
    bytes_in: AtomicU64,
    bytes_lost: AtomicU64,
}

struct Hooks {
    counts: Arc<Counts>,
    on_first_byte: OnFirst,
    on_room: Box<dyn Fn() + Send + Sync>,
    /// The guest was given input, or had no room for it, since `on_room` was last called. A guest may read the empty
    /// buffer a million times a second: only a read that takes the last byte is news.
    has_input: AtomicBool,
}

impl SerialEvents for Hooks {
    fn buffer_read(&self) {
        self.counts.bytes_in.fetch_add(1, Ordering::Relaxed);
    }

    fn out_byte(&self) {
        if self.counts.bytes_out.fetch_add(1, Ordering::Relaxed) == 0
            && let Some(tell) = self.on_first_byte.lock().take()
        {
            tell(Instant::now());
        }
    }

    fn tx_lost_byte(&self) {
        self.counts.bytes_lost.fetch_add(1, Ordering::Relaxed);
    }

    fn in_buffer_empty(&self) {
        if self.has_input.swap(false, Ordering::AcqRel) {
            (self.on_room)();
        }
    }
}

/// Offset of the interrupt identification register.
const IDENTIFICATION: u8 = 2;
/// Bit 0 of that register: no interrupt is pending.
const NONE_PENDING: u8 = 1;
/// Bits 1 to 3 of that register when input is waiting.
const RECEIVED_DATA: u8 = 0b0100;

/// Whether there is input, and the guest has enabled its interrupt.
fn has_unread_input(state: &SerialState) -> bool {
    /// Bit 0 of the interrupt enable register.
    const ON_RECEIVED_DATA: u8 = 1;
    state.interrupt_enable & ON_RECEIVED_DATA != 0 && !state.in_buffer.is_empty()
}

type Output = Box<dyn Write + Send>;
type Uart = vm_superio::Serial<InterruptLine, Arc<Hooks>, Output>;

/// A 16550A: eight registers, a receive buffer of 64 bytes.
pub struct Serial {
    uart: Mutex<Uart>,
    line: InterruptLine,
    hooks: Arc<Hooks>,
    counts: Arc<Counts>,
}

impl Serial {
    /// Writes what the guest sends to `output`, which should not block; what it does not take is
    /// lost and counted. `on_first_byte` is called once; `on_room` when the guest has read all
    /// that it was given, so that more can be.
    pub fn new(
        line: InterruptLine,
        output: Box<dyn Write + Send>,
        on_first_byte: impl FnOnce(Instant) + Send + 'static,
        on_room: impl Fn() + Send + Sync + 'static,
    ) -> Self {
        let counts = Arc::new(Counts::default());
        let hooks = Hooks {
            counts: Arc::clone(&counts),
            on_first_byte: Mutex::new(Some(Box::new(on_first_byte))),
            on_room: Box::new(on_room),
            has_input: AtomicBool::new(false),
        };
        let hooks = Arc::new(hooks);
        let uart = Uart::with_events(line.clone(), Arc::clone(&hooks), output);
        Self {
            uart: Mutex::new(uart),
            line,
            hooks,
            counts,
        }
    }

    /// Raises the interrupt again if the port says that one is pending, for a guest that was
    /// loaded.
    pub fn repeat_interrupt(&self) {
        let state = self.uart.lock().state();
        // The line is an edge, which is not saved: an edge that was raised before the save, and not
        // taken, would be lost. One too many only makes the guest look.
        if state.interrupt_identification & NONE_PENDING == 0 || has_unread_input(&state) {
            self.line.raise();
        }
    }

    /// `bytes_out`, `bytes_in` and `bytes_lost` so far.
    #[must_use]
    pub fn counters(&self) -> [(&'static str, u64); 3] {
        let count = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        [
            ("bytes_out", count(&self.counts.bytes_out)),
            ("bytes_in", count(&self.counts.bytes_in)),
            ("bytes_lost", count(&self.counts.bytes_lost)),
        ]
    }
}

impl ConsoleInput for Serial {
    fn room(&self) -> usize {
        let uart = self.uart.lock();
        let room = uart.fifo_capacity();
        if room == 0 {
            // Full of input, or of what the guest sent itself in loopback mode: the caller waits.
            self.hooks.has_input.store(true, Ordering::Release);
        }
        room
    }

    fn receive(&self, bytes: &[u8]) -> usize {
        let mut uart = self.uart.lock();
        // In loopback mode (MCR bit 4) the receiver is cut off, and the UART refuses input.
        let taken = uart.enqueue_raw_bytes(bytes).unwrap_or(0);
        if taken > 0 {
            // Under the lock: the guest has not read them yet.
            self.hooks.has_input.store(true, Ordering::Release);
        }
        taken
    }
}

impl DeviceOps for Serial {
    fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0xff);
        // The registers are bytes; a wider access reaches the first one only.
        if let (Ok(offset), Some(first)) = (u8::try_from(offset), data.first_mut()) {
            let mut uart = self.uart.lock();
            *first = uart.read(offset);
            // A 16550A reports input for as long as there is some. vm-superio forgets it at the first byte
            // that is read. Linux reads 256 bytes at most for one report, and would never read the rest.
            if offset == IDENTIFICATION
                && *first & NONE_PENDING != 0
                && has_unread_input(&uart.state())
            {
                *first = *first & !NONE_PENDING | RECEIVED_DATA;
            }
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        if let (Ok(offset), Some(first)) = (u8::try_from(offset), data.first()) {
            // A write fails only if the output does, and the hook has counted the lost byte.
            let _ = self.uart.lock().write(offset, *first);
        }
    }
}

/// Saved state of the port, version 1. Frozen. Registers have their names in the 16550A's data sheet.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct V1 {
    divisor: [u8; 2],
    ier: u8,
    iir: u8,
    lcr: u8,
    lsr: u8,
    mcr: u8,
    msr: u8,
    scr: u8,
    /// Received and not read yet.
    received: Vec<u8>,
}

impl Saved for V1 {
    const VERSION: u16 = 1;
}

impl Save for Serial {
    fn save(&self, to: &mut Scope<'_>) -> Result<(), SaveError> {
        let state = self.uart.lock().state();
        to.put(&V1 {
            divisor: [state.baud_divisor_low, state.baud_divisor_high],
            ier: state.interrupt_enable,
            iir: state.interrupt_identification,
            lcr: state.line_control,
            lsr: state.line_status,
            mcr: state.modem_control,
            msr: state.modem_status,
            scr: state.scratch,
            received: state.in_buffer,
        })
    }
}

impl Load for &Serial {
    fn load(&mut self, from: &mut LoadScope<'_, '_>, _: &mut ()) -> Result<(), LoadError> {
        let saved: V1 = from.take()?;
        let has_input = !saved.received.is_empty();
        let state = SerialState {
            baud_divisor_low: saved.divisor[0],
            baud_divisor_high: saved.divisor[1],
            interrupt_enable: saved.ier,
            interrupt_identification: saved.iir,
            line_control: saved.lcr,
            line_status: saved.lsr,
            modem_control: saved.mcr,
            modem_status: saved.msr,
            scratch: saved.scr,
            in_buffer: saved.received,
        };
        let make = |state: &SerialState, output: Output| {
            Uart::from_state(state, self.line.clone(), Arc::clone(&self.hooks), output)
        };
        // The UART of the running machine owns the output. A trial with an empty output finds out
        // first whether the state is accepted.
        let trial = make(&state, Box::new(io::sink()));
        let trial = trial.map_err(|error| from.refuse(format!("{error:?}")))?;
        // The state was accepted, so that the output can move over: a refusal above has changed nothing.
        let mut uart = self.uart.lock();
        let output = std::mem::replace(&mut *uart, trial).into_writer();
        *uart = make(&state, output).map_err(|error| from.refuse(format!("{error:?}")))?;
        self.hooks.has_input.store(has_input, Ordering::Release);
        Ok(())
    }
}

/// Takes all that it can at once and says that the rest is lost, rather than wait.
pub(crate) fn write_or_lose(to: &mut impl Write, bytes: &[u8]) -> io::Result<usize> {
    match to.write(bytes) {
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => Err(io::Error::new(
            io::ErrorKind::BrokenPipe,
            "the console has no reader",
        )),
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Clone, Default)]
    struct Sink(Arc<Mutex<Vec<u8>>>);

    impl Write for Sink {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().extend(bytes);
            Ok(bytes.len())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn transfers_both_ways() {
        let (sink, rooms) = (Sink::default(), Arc::new(AtomicU64::new(0)));
        let (line, told) = (InterruptLine::new().unwrap(), Arc::clone(&rooms));
        let first = Arc::new(AtomicU64::new(0));
        let firsts = Arc::clone(&first);
        let serial = Serial::new(
            line,
            Box::new(sink.clone()),
            move |_| {
                firsts.fetch_add(1, Ordering::Relaxed);
            },
            move || {
                told.fetch_add(1, Ordering::Relaxed);
            },
        );
        for byte in b"hi" {
            serial.write(0, &[*byte]);
        }
        assert_eq!(*sink.0.lock(), b"hi");
        assert_eq!(first.load(Ordering::Relaxed), 1);
        let input = [7_u8; 100];
        let taken = serial.receive(&input);
        assert_eq!((taken, serial.room()), (64, 0));
        for _ in 0..taken {
            let mut byte = [0];
            serial.read(0, &mut byte);
            assert_eq!(byte, [7]);
        }
        assert_eq!(rooms.load(Ordering::Relaxed), 1);
        assert_eq!(
            serial.counters(),
            [("bytes_out", 2), ("bytes_in", 64), ("bytes_lost", 0)]
        );
    }

    /// Each call may be an event for the owner of the machine.
    #[test]
    fn empty_reads_report_no_room() {
        let rooms = Arc::new(AtomicU64::new(0));
        let (line, told) = (InterruptLine::new().unwrap(), Arc::clone(&rooms));
        let on_room = move || {
            told.fetch_add(1, Ordering::Relaxed);
        };
        let serial = Serial::new(line, Box::new(io::sink()), |_| {}, on_room);
        let read = |count| {
            for _ in 0..count {
                serial.read(0, &mut [0]);
            }
            rooms.load(Ordering::Relaxed)
        };
        assert_eq!(read(1000), 0, "nothing was there to be read");
        serial.receive(b"two");
        assert_eq!(read(2), 0);
        assert_eq!(read(1000), 1);
        serial.receive(b"x");
        let mut writer = state::Writer::default();
        serial.save(&mut writer.scope("serial").unwrap()).unwrap();
        let saved = writer.finish();
        read(1);
        let mut store = state::Store::open(&saved).unwrap();
        let mut scope = store.scope("serial").unwrap();
        (&serial).load(&mut scope, &mut ()).unwrap();
        assert_eq!(read(1000), 3, "once each");
    }

    /// Linux reads at most 256 bytes for each time that the identification register reports input.
    #[test]
    fn input_is_reported_until_all_is_read() {
        let (line, sink) = (InterruptLine::new().unwrap(), Box::new(io::sink()));
        let serial = Serial::new(line, sink, |_| {}, || {});
        let register = |offset| {
            let mut data = [0];
            serial.read(offset, &mut data);
            data[0]
        };
        serial.receive(b"before the driver");
        assert_eq!(register(2), 0b1100_0001, "its interrupt is not enabled");
        serial.write(1, &[1]);
        serial.receive(b"and behind it");
        let mut input = Vec::new();
        while register(2) & 1 == 0 {
            for _ in 0..4 {
                if register(5) & 1 != 0 {
                    input.push(register(0));
                }
            }
        }
        assert_eq!(input, b"before the driverand behind it");
        assert_eq!(register(2), 0b1100_0001);
    }

    #[test]
    fn state_survives_save_and_load() {
        let serial = |sink: &Sink| {
            let line = InterruptLine::new().unwrap();
            Serial::new(line, Box::new(sink.clone()), |_| {}, || {})
        };
        let save = |serial: &Serial| {
            let mut writer = state::Writer::default();
            serial.save(&mut writer.scope("serial").unwrap()).unwrap();
            writer.finish()
        };
        let sink = Sink::default();
        let (here, there) = (serial(&sink), serial(&sink));
        here.write(7, b"s");
        here.write(1, &[1]);
        here.receive(b"half a line");
        let saved = save(&here);
        let mut store = state::Store::open(&saved).unwrap();
        let mut scope = store.scope("serial").unwrap();
        (&there).load(&mut scope, &mut ()).unwrap();
        assert_eq!(save(&there), saved);
        // Whatever loading raised was raised before the guest's interrupt controllers were loaded.
        there.line.event_fd().read().unwrap();
        there.repeat_interrupt();
        assert_eq!(there.line.event_fd().read().unwrap(), 1, "input is waiting");
        let mut byte = [0];
        there.read(0, &mut byte);
        assert_eq!(byte, *b"h");
        (0..10).for_each(|_| there.read(0, &mut byte));
        there.repeat_interrupt();
        assert!(there.line.event_fd().read().is_err(), "nothing is pending");
        there.write(0, b"!");
        assert_eq!(*sink.0.lock(), b"!");
    }

    #[test]
    fn accesses_of_any_width_and_place_are_answered() {
        let line = InterruptLine::new().unwrap();
        let serial = Serial::new(line, Box::new(io::sink()), |_| {}, || {});
        for offset in [0, 1, 7, 8, 255, 256, u64::MAX] {
            let mut data = [0; 8];
            serial.read(offset, &mut data);
            serial.write(offset, &data);
            serial.read(offset, &mut []);
            serial.write(offset, &[]);
        }
    }
}
