//! The output of consoles on this process's standard output.
//!
//! Standard output may be a pipe without a reader. It cannot be made non-blocking as a pseudo terminal
//! is: the flag belongs to the open file, which the process shares with the shell that started it. So a
//! thread of its own writes, and may wait for as long as it takes. Consoles hand it their bytes and
//! never wait; what there is no room for is lost, and counted by them.
//!
//! ```text
//!  vCPU, device thread ──► Writer ──► at most UNREAD bytes ──► thread `console-out` ──► standard output
//! ```
//!
//! There is one thread for the process, as there is one standard output: a VM that is booted again and
//! again without a reader costs no more.

use std::io::{self, Write};
use std::sync::{Arc, OnceLock};
use std::thread;
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;

use crate::client::{UNREAD, unread};

/// The writer of standard output, once a console uses it.
static STDOUT: OnceLock<Writer> = OnceLock::new();

/// Hands bytes to the thread. Clones write to the same place.
#[derive(Clone)]
pub(super) struct Writer(Arc<Shared>);

#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    waiting: Vec<u8>,
    /// Bytes that the thread has taken, and may not have written yet.
    in_flight: usize,
    /// Nothing can be written any more: the reader has closed its end.
    is_broken: bool,
}

/// Returns the writer of standard output.
pub(super) fn stdout() -> io::Result<Writer> {
    if let Some(writer) = STDOUT.get() {
        return Ok(writer.clone());
    }
    // Two consoles may come here at once. The thread of the one that is second waits for bytes that
    // never come, which happens once in a process at most.
    let writer = Writer::start(Stdout)?;
    Ok(STDOUT.get_or_init(|| writer).clone())
}

/// Waits until what consoles wrote to standard output is there, for `limit` at most: a process that
/// ends would lose the last lines of its guest.
pub fn flush_terminal(limit: Duration) {
    if let Some(writer) = STDOUT.get() {
        writer.drain(limit);
    }
}

impl Writer {
    fn start(mut to: impl Write + Send + 'static) -> io::Result<Self> {
        let shared = Arc::new(Shared::default());
        let ours = Arc::clone(&shared);
        let write = move || {
            while let Some(bytes) = ours.next() {
                let written = to.write_all(&bytes).and_then(|()| to.flush());
                ours.written(&written);
            }
        };
        thread::Builder::new()
            .name("console-out".to_owned())
            .spawn(write)?;
        Ok(Self(shared))
    }

    /// Waits until all is written, or nothing can be, for `limit` at most.
    fn drain(&self, limit: Duration) {
        let deadline = Instant::now() + limit;
        let mut state = self.0.state.lock();
        while state.len() > 0 && !state.is_broken {
            if self.0.changed.wait_until(&mut state, deadline).timed_out() {
                break;
            }
        }
    }
}

impl State {
    fn len(&self) -> usize {
        self.in_flight + self.waiting.len()
    }
}

impl Shared {
    /// Waits for bytes. Returns nothing when no more can be written.
    fn next(&self) -> Option<Vec<u8>> {
        let mut state = self.state.lock();
        while state.waiting.is_empty() && !state.is_broken {
            self.changed.wait(&mut state);
        }
        if state.is_broken {
            return None;
        }
        let bytes = std::mem::take(&mut state.waiting);
        // They count until they are written, so that the limit is one of all bytes that are kept.
        state.in_flight = bytes.len();
        Some(bytes)
    }

    fn written(&self, written: &io::Result<()>) {
        let mut state = self.state.lock();
        state.in_flight = 0;
        if let Err(error) = written {
            tracing::warn!(%error, "standard output cannot be written; the output of consoles is lost");
            // Ends the thread, by `next`. Later writes are refused, so that their consoles count
            // the bytes as lost.
            state.is_broken = true;
            state.waiting = Vec::new();
        }
        self.changed.notify_all();
    }
}

impl Write for Writer {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let mut state = self.0.state.lock();
        // The limit covers all consoles of the process: a guest that floods its console takes no
        // memory beyond it. The caller is a vCPU or a device thread and must not wait.
        if state.is_broken || state.len() + bytes.len() > UNREAD {
            return Err(unread());
        }
        // A guest writes byte by byte: only the first one finds the thread asleep.
        if state.waiting.is_empty() {
            self.0.changed.notify_all();
        }
        state.waiting.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Standard output, without the lock and the buffer of the standard library: `println` elsewhere must
/// not wait for a reader because a console does.
struct Stdout;

impl Write for Stdout {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let stdout = rustix::stdio::stdout();
        loop {
            match rustix::io::write(stdout, bytes) {
                // Another process with the same open file made it non-blocking.
                Err(Errno::WOULDBLOCK) => {
                    let mut ready = [PollFd::new(&stdout, PollFlags::OUT)];
                    match poll(&mut ready, None) {
                        Ok(_) | Err(Errno::INTR) => {}
                        Err(error) => return Err(error.into()),
                    }
                }
                written => return Ok(written?),
            }
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read as _;

    use memory::DeviceOps as _;

    use super::*;
    use crate::Serial;
    use crate::interrupt::InterruptLine;

    /// A pipe is full after 64 KiB, and then its writer blocks.
    #[test]
    fn pipe_that_is_not_read_holds_up_no_guest() {
        let (mut reader, pipe) = io::pipe().unwrap();
        let writer = Writer::start(pipe).unwrap();
        let line = InterruptLine::new().unwrap();
        let serial = Serial::new(line, Box::new(writer.clone()), |_| {}, || {});
        let text: Vec<u8> = (0..1_u32 << 20).map(|i| (i % 251) as u8).collect();
        // A vCPU does this: the call returns although there is no reader.
        text.iter().for_each(|byte| serial.write(0, &[*byte]));
        let [(_, out), _, (_, lost)] = serial.counters();
        assert!(lost >= (1 << 20) - UNREAD as u64 - (64 << 10), "{lost}");
        assert_eq!(out + lost, 1 << 20);
        // What was taken comes when it is read, from the first byte on.
        let mut read = vec![0; UNREAD];
        reader.read_exact(&mut read).unwrap();
        assert!(read == text[..UNREAD]);
        // There is room again, and the end of the process waits for what is left.
        let rest = thread::spawn(move || {
            let mut rest = Vec::new();
            let mut piece = vec![0; 4096];
            while !rest.ends_with(b"the last line") {
                let len = reader.read(&mut piece).unwrap();
                rest.extend_from_slice(&piece[..len]);
            }
        });
        writer.drain(Duration::from_secs(60));
        b"the last line"
            .iter()
            .for_each(|byte| serial.write(0, &[*byte]));
        writer.drain(Duration::from_secs(60));
        assert_eq!(writer.0.state.lock().len(), 0);
        rest.join().unwrap();
        assert_eq!(serial.counters()[2].1, lost);
    }

    #[test]
    fn output_without_a_reader_is_lost() {
        let (reader, pipe) = io::pipe().unwrap();
        drop(reader);
        let mut writer = Writer::start(pipe).unwrap();
        let start = Instant::now();
        // The first write tells; SIGPIPE is ignored in Rust's programs.
        while writer.write(b"x").is_ok() {
            assert!(start.elapsed() < Duration::from_secs(60));
            thread::yield_now();
        }
        writer.drain(Duration::from_secs(60));
        assert!(writer.write(b"x").is_err());
        assert_eq!(Arc::strong_count(&writer.0), 1, "the thread has ended");
    }
}
