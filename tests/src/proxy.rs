//! A proxy between two services that inspects every frame.

use std::io::{self, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use ciborium::Value;

/// The sender of a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// The source of a migration: it made the connection.
    Source,
    /// The destination.
    Destination,
}

/// A frame, as docs/migration-protocol.md describes it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Frame {
    /// The sender.
    pub from: Side,
    /// The message's name on the control channel, or the frame's kind (`Pages`, `End`, ...).
    pub name: String,
    /// How many of this name came before it, on all connections.
    pub before: usize,
}

/// The treatment of a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Pass it on.
    Pass,
    /// All connections end before it.
    Cut,
    /// All connections end in the middle of it.
    Truncate,
    /// Pass it on with a bit flipped.
    Corrupt,
    /// Hold it and all that follows on its connection, silently.
    Stall,
    /// Pass it on after a delay.
    Late(Duration),
}

type Judge = dyn Fn(&Frame) -> Verdict + Send + Sync;

/// A way from a socket to another, frame by frame. It knows the frames' heads, and nothing of the
/// program's code: what it understands is the documented protocol.
#[derive(Debug)]
pub struct Proxy;

struct Way {
    judge: Box<Judge>,
    /// Names of the frames that came.
    seen: Mutex<Vec<(Side, String)>>,
    /// All connections that are open.
    open: Mutex<Vec<UnixStream>>,
}

impl Proxy {
    /// Starts to forward connections at `from` to the listener at `to`, as `judge` decides, until the process
    /// ends.
    ///
    /// # Errors
    /// No socket can be created at `from`.
    pub fn between(
        from: &Path,
        to: &Path,
        judge: impl Fn(&Frame) -> Verdict + Send + Sync + 'static,
    ) -> io::Result<()> {
        let listener = UnixListener::bind(from)?;
        let way = Arc::new(Way {
            judge: Box::new(judge),
            seen: Mutex::default(),
            open: Mutex::default(),
        });
        let to = to.to_owned();
        thread::spawn(move || {
            for source in listener.incoming().flatten() {
                // Who listens no longer has its connections refused, as without us.
                if let Ok(destination) = UnixStream::connect(&to) {
                    // A connection that cannot be passed on ends, which both sides see.
                    let _ = way.join(source, destination);
                }
            }
        });
        Ok(())
    }
}

impl Way {
    fn join(self: &Arc<Self>, source: UnixStream, destination: UnixStream) -> io::Result<()> {
        for (from, input, output) in [
            (Side::Source, source.try_clone()?, destination.try_clone()?),
            (Side::Destination, destination, source),
        ] {
            if let Ok(mut open) = self.open.lock() {
                open.push(input.try_clone()?);
            }
            let way = self.clone();
            thread::spawn(move || {
                // One side is gone: close the other.
                let _ = way.pass(from, &input, &output);
                let _ = output.shutdown(std::net::Shutdown::Both);
                let _ = input.shutdown(std::net::Shutdown::Both);
            });
        }
        Ok(())
    }

    fn pass(&self, from: Side, mut input: &UnixStream, mut output: &UnixStream) -> io::Result<()> {
        loop {
            let mut frame = vec![0; 12];
            input.read_exact(&mut frame)?;
            let len = u32::from_le_bytes([frame[4], frame[5], frame[6], frame[7]]);
            input.take(len.into()).read_to_end(&mut frame)?;
            let kind = u16::from_le_bytes([frame[0], frame[1]]);
            let verdict = (self.judge)(&self.see(from, name(kind, &frame[12..])));
            match verdict {
                Verdict::Pass => output.write_all(&frame)?,
                Verdict::Late(by) => {
                    thread::sleep(by);
                    output.write_all(&frame)?;
                }
                Verdict::Corrupt => {
                    let middle = frame.len() / 2;
                    frame[middle] ^= 4;
                    output.write_all(&frame)?;
                }
                Verdict::Truncate => {
                    output.write_all(&frame[..frame.len() / 2])?;
                    self.cut();
                    return Ok(());
                }
                Verdict::Cut => {
                    self.cut();
                    return Ok(());
                }
                // Until it is closed from the other side.
                Verdict::Stall => {
                    io::copy(&mut input, &mut io::sink())?;
                }
            }
        }
    }

    fn see(&self, from: Side, name: String) -> Frame {
        let mut before = 0;
        if let Ok(mut seen) = self.seen.lock() {
            let one = (from, name.clone());
            before = seen.iter().filter(|other| **other == one).count();
            seen.push(one);
        }
        Frame { from, name, before }
    }

    fn cut(&self) {
        if let Ok(mut open) = self.open.lock() {
            for stream in open.drain(..) {
                let _ = stream.shutdown(std::net::Shutdown::Both);
            }
        }
    }
}

fn name(kind: u16, body: &[u8]) -> String {
    let known = match kind {
        1 => "Hello",
        3 => "SavedState",
        16 => "Pages",
        17 => "Zeros",
        18 => "End",
        19 => "Missing",
        20 => "Hashes",
        32 => "Fault",
        _ => {
            let message = match ciborium::from_reader(body) {
                Ok(Value::Text(name)) => Some(name),
                Ok(Value::Map(entries)) => entries
                    .into_iter()
                    .next()
                    .and_then(|(name, _)| name.into_text().ok()),
                _ => None,
            };
            return message.unwrap_or_else(|| format!("kind {kind}"));
        }
    };
    known.to_owned()
}
