//! The serial port: a 16550A on vm-superio's.

use std::io::{self, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use memory::DeviceOps;
use parking_lot::Mutex;
use vm_superio::serial::SerialEvents;

use crate::console::ConsoleInput;
use crate::debug_port::OnFirst;
use crate::interrupt::InterruptLine;

/// What happened on the port so far.
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
        (self.on_room)();
    }
}

type Uart = vm_superio::Serial<InterruptLine, Hooks, Box<dyn Write + Send>>;

/// A 16550A: eight registers, a receive buffer of 64 bytes.
pub struct Serial {
    uart: Mutex<Uart>,
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
        };
        Self {
            uart: Mutex::new(Uart::with_events(line, hooks, output)),
            counts,
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
        self.uart.lock().fifo_capacity()
    }

    fn receive(&self, bytes: &[u8]) -> usize {
        self.uart.lock().enqueue_raw_bytes(bytes).unwrap_or(0)
    }
}

impl DeviceOps for Serial {
    fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0xff);
        // The registers are bytes; a wider access reaches the first one only.
        if let (Ok(offset), Some(first)) = (u8::try_from(offset), data.first_mut()) {
            *first = self.uart.lock().read(offset);
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        if let (Ok(offset), Some(first)) = (u8::try_from(offset), data.first()) {
            // It fails when the output does, and then counts a lost byte.
            let _ = self.uart.lock().write(offset, *first);
        }
    }
}

/// Takes all that it can at once and says that the rest is lost, rather than wait.
pub(crate) fn write_or_lose(to: &mut impl Write, bytes: &[u8]) -> io::Result<usize> {
    match to.write(bytes) {
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => Err(io::Error::new(
            io::ErrorKind::BrokenPipe,
            "nobody reads the console",
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
    fn bytes_go_both_ways_and_room_is_told() {
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
