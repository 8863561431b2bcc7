//! The debug console: a port that takes text, as `isa-debugcon` of QEMU and of Bochs.

use std::io::Write;

use memory::DeviceOps;
use parking_lot::Mutex;

/// The port's answer to a read, by which software finds that the device exists.
const PRESENT: u8 = 0xe9;

/// Passes each byte that the guest writes to an output. The device has no state and no interrupt.
pub struct DebugConsole(Mutex<Box<dyn Write + Send>>);

impl DebugConsole {
    /// Writes to `output`, which should not block. Bytes that it does not take are lost.
    #[must_use]
    pub fn new(output: Box<dyn Write + Send>) -> Self {
        Self(Mutex::new(output))
    }
}

impl DeviceOps for DebugConsole {
    fn read(&self, _: u64, data: &mut [u8]) {
        data.fill(PRESENT);
    }

    fn write(&self, _: u64, data: &[u8]) {
        // A vCPU is here: an output that fails, or is full, must not hold it up.
        let _ = self.0.lock().write_all(data);
    }
}

#[cfg(test)]
mod tests {
    use std::io;
    use std::sync::Arc;

    use super::*;

    struct Sink(Arc<Mutex<Vec<u8>>>);

    impl Write for Sink {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            let mut taken = self.0.lock();
            if taken.len() == 3 {
                return Err(io::ErrorKind::BrokenPipe.into());
            }
            taken.extend(bytes);
            Ok(bytes.len())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn passes_bytes_on_and_outlives_its_output() {
        let taken = Arc::new(Mutex::new(Vec::new()));
        let console = DebugConsole::new(Box::new(Sink(Arc::clone(&taken))));
        console.write(0, b"a");
        console.write(0, b"bc");
        console.write(0, b"lost");
        console.write(0, &[]);
        assert_eq!(*taken.lock(), b"abc");
        let mut answer = [0];
        console.read(0, &mut answer);
        assert_eq!(answer, [PRESENT]);
    }
}
