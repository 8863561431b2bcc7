//! The other end of a serial port or console: a file, a terminal, a socket.
//!
//! Output never waits for a reader: a vCPU is on the other side of it. Input is taken only as
//! fast as the guest reads it, so that it piles up where its sender can see it.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use parking_lot::Mutex;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};
use rustix::io::Errno;
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{OptionalActions, Termios, isatty, tcgetattr, tcsetattr};

use crate::client::Connected;
use crate::serial::write_or_lose;
use crate::unix::Listening;

/// A console's other end could not be made.
#[derive(Debug, thiserror::Error)]
pub enum ConsoleError {
    /// The file cannot be written.
    #[error("the console's file {} cannot be written: {source}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// The socket cannot be made.
    #[error("the console's socket {} cannot be made: {source}", path.display())]
    Socket {
        /// The socket.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// No pseudo terminal, or no terminal settings.
    #[error("the console's terminal cannot be set up: {0}")]
    Terminal(#[source] io::Error),
}

/// A receiver of a console's input: a serial port, or a virtio console.
pub trait ConsoleInput {
    /// Bytes that the guest has room for.
    fn room(&self) -> usize;
    /// Gives the guest as many of these as it has room for, and tells how many.
    fn receive(&self, bytes: &[u8]) -> usize;
}

/// The host's end of a serial port or virtio console.
pub struct Console {
    end: End,
    /// The guest has not room for all that there is to read.
    more: bool,
}

enum End {
    /// Output only.
    Quiet(Arc<Mutex<Box<dyn Write + Send>>>),
    Tty {
        _raw: Option<RawMode>,
    },
    Pty {
        master: Arc<File>,
        path: PathBuf,
    },
    Socket {
        listener: Listening,
        client: Client,
    },
}

/// The one client of a socket.
type Client = Arc<Mutex<Option<Connected>>>;

/// A change of the watched descriptors after [`Console::ready`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Watch {
    /// Tell when it is ready.
    Begin(RawFd),
    /// End watching: the descriptor is about to be closed.
    End(RawFd),
}

impl Console {
    /// Output is thrown away, and there is no input.
    #[must_use]
    pub fn null() -> Self {
        Self::quiet(Box::new(io::sink()))
    }

    fn quiet(output: Box<dyn Write + Send>) -> Self {
        Self {
            end: End::Quiet(Arc::new(Mutex::new(output))),
            more: false,
        }
    }

    /// Output goes to a file, which is made or emptied; there is no input.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn file(path: &Path) -> Result<Self, ConsoleError> {
        Self::to_file(File::create(path), path)
    }

    /// Appends to a file; otherwise like [`Console::file`].
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn more_of_file(path: &Path) -> Result<Self, ConsoleError> {
        let opened = OpenOptions::new().append(true).create(true).open(path);
        Self::to_file(opened, path)
    }

    fn to_file(opened: io::Result<File>, path: &Path) -> Result<Self, ConsoleError> {
        let file = opened.map_err(|source| ConsoleError::File {
            path: path.to_owned(),
            source,
        })?;
        Ok(Self::quiet(Box::new(file)))
    }

    /// This process's standard input and output. A terminal is set to raw mode, so that the guest
    /// gets each key, and back again when the console is dropped.
    ///
    /// # Errors
    /// When the terminal cannot be set.
    pub fn tty() -> Result<Self, ConsoleError> {
        let raw = if isatty(rustix::stdio::stdin()) {
            Some(RawMode::enter()?)
        } else {
            None
        };
        Ok(Self {
            end: End::Tty { _raw: raw },
            more: false,
        })
    }

    /// A new pseudo terminal.
    ///
    /// # Errors
    /// When the host gives none.
    pub fn pty() -> Result<Self, ConsoleError> {
        let make = || -> io::Result<(OwnedFd, PathBuf)> {
            let master = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC)?;
            grantpt(&master)?;
            unlockpt(&master)?;
            let path = PathBuf::from(ptsname(&master, Vec::new())?.to_string_lossy().into_owned());
            // The terminal's line discipline is not to change or echo what the guest writes.
            let slave = OpenOptions::new().read(true).write(true).open(&path)?;
            let mut settings = tcgetattr(&slave)?;
            settings.make_raw();
            tcsetattr(&slave, OptionalActions::Now, &settings)?;
            fcntl_setfl(&master, fcntl_getfl(&master)? | OFlags::NONBLOCK)?;
            Ok((master, path))
        };
        let (master, path) = make().map_err(ConsoleError::Terminal)?;
        Ok(Self {
            end: End::Pty {
                master: Arc::new(File::from(master)),
                path,
            },
            more: false,
        })
    }

    /// A unix socket, on which one client at a time is served; another is turned away. A socket
    /// that nobody listens on any more is replaced.
    ///
    /// # Errors
    /// When it cannot be made.
    pub fn socket(path: &Path) -> Result<Self, ConsoleError> {
        Self::on_socket(Listening::bind(path), path)
    }

    /// As [`Console::socket`], beside the one that another program has there until
    /// [`Console::take_over`].
    ///
    /// # Errors
    /// When it cannot be made.
    pub fn next_socket(path: &Path) -> Result<Self, ConsoleError> {
        Self::on_socket(Listening::bind_beside(path), path)
    }

    fn on_socket(bound: io::Result<Listening>, path: &Path) -> Result<Self, ConsoleError> {
        let refused = |source| ConsoleError::Socket {
            path: path.to_owned(),
            source,
        };
        let end = End::Socket {
            listener: bound.map_err(refused)?,
            client: Client::default(),
        };
        Ok(Self { end, more: false })
    }

    /// Takes the path of its socket from the program that had it.
    ///
    /// # Errors
    /// When the host refuses.
    pub fn take_over(&mut self) -> io::Result<()> {
        match &mut self.end {
            End::Socket { listener, .. } => listener.take_over(),
            _ => Ok(()),
        }
    }

    /// The path of a pseudo terminal.
    #[must_use]
    pub fn pty_path(&self) -> Option<&Path> {
        match &self.end {
            End::Pty { path, .. } => Some(path),
            _ => None,
        }
    }

    /// Where the guest's output goes: the same place each time, so that a machine that takes
    /// another's place goes on where that one ended.
    pub fn output(&self) -> Box<dyn Write + Send> {
        match &self.end {
            End::Quiet(output) => Box::new(Shared(Arc::clone(output))),
            End::Tty { .. } => Box::new(Flushed(io::stdout())),
            End::Pty { master, .. } => Box::new(Lossy(Arc::clone(master))),
            End::Socket { client, .. } => Box::new(ToClient(Arc::clone(client))),
        }
    }

    /// The descriptors to watch at first.
    #[must_use]
    pub fn sources(&self) -> Vec<RawFd> {
        match &self.end {
            End::Quiet(_) => Vec::new(),
            End::Tty { .. } => vec![rustix::stdio::stdin().as_raw_fd()],
            End::Pty { master, .. } => vec![master.as_raw_fd()],
            End::Socket { listener, client } => {
                let client = client.lock();
                let client = client.as_ref().map(|client| client.stream.as_raw_fd());
                client.into_iter().chain([listener.as_raw_fd()]).collect()
            }
        }
    }

    /// Takes what there is: input to the guest, a new client. Call it when a watched descriptor is
    /// ready, and when the guest has room again.
    pub fn ready(&mut self, to: &dyn ConsoleInput) -> Vec<Watch> {
        self.more = false;
        match &mut self.end {
            End::Quiet(_) => Vec::new(),
            End::Tty { .. } => {
                self.more = pump(rustix::stdio::stdin(), to).more;
                Vec::new()
            }
            End::Pty { master, .. } => {
                self.more = pump(&**master, to).more;
                Vec::new()
            }
            End::Socket { listener, client } => {
                let (watches, more) = serve(listener.listener(), client, to);
                self.more = more;
                watches
            }
        }
    }

    /// Whether there is input that the guest had no room for.
    #[must_use]
    pub fn has_more(&self) -> bool {
        self.more
    }
}

fn serve(listener: &UnixListener, client: &Client, to: &dyn ConsoleInput) -> (Vec<Watch>, bool) {
    let (mut watches, mut more) = (Vec::new(), false);
    let reader = client.lock().as_mut().and_then(|client| {
        // There may be room for what was not taken before. Whether the client is gone shows next.
        let _ = client.flush();
        client.stream.try_clone().ok()
    });
    if let Some(reader) = reader {
        let pumped = pump(&reader, to);
        more = pumped.more;
        if pumped.ended {
            let gone = client.lock().take();
            watches.extend(gone.map(|gone| Watch::End(gone.stream.as_raw_fd())));
        }
    }
    while let Ok((stream, _)) = listener.accept() {
        let mut client = client.lock();
        if client.is_none() && stream.set_nonblocking(true).is_ok() {
            watches.push(Watch::Begin(stream.as_raw_fd()));
            *client = Some(Connected::new(stream));
        }
    }
    (watches, more)
}

#[derive(Default)]
struct Pumped {
    more: bool,
    ended: bool,
}

/// Moves bytes to the guest until there are none, or it has no room.
///
/// It reads the descriptor itself: a reader with a buffer of its own, as that of the standard
/// library for standard input, would keep back what the guest has no room for, where no poll of
/// the descriptor finds it.
fn pump(from: impl AsFd, to: &dyn ConsoleInput) -> Pumped {
    let mut buffer = [0; 64];
    loop {
        let room = to.room().min(buffer.len());
        // Standard input may be shared with others, and blocks: ask before reading.
        let mut asked = [PollFd::new(&from, PollFlags::IN)];
        if !poll(
            &mut asked,
            Some(&Timespec {
                tv_sec: 0,
                tv_nsec: 0,
            }),
        )
        .is_ok_and(|ready| ready > 0)
        {
            return Pumped::default();
        }
        if room == 0 {
            return Pumped {
                more: true,
                ended: false,
            };
        }
        match rustix::io::read(&from, &mut buffer[..room]) {
            Ok(0) => {
                return Pumped {
                    more: false,
                    ended: true,
                };
            }
            Ok(len) => {
                to.receive(&buffer[..len]);
            }
            Err(Errno::INTR) => {}
            Err(error) => {
                let ended = error != Errno::WOULDBLOCK;
                return Pumped { more: false, ended };
            }
        }
    }
}

/// Raw mode of the terminal on standard input, until it is dropped.
struct RawMode(Termios);

impl RawMode {
    fn enter() -> Result<Self, ConsoleError> {
        let stdin = rustix::stdio::stdin();
        let set = || -> io::Result<Termios> {
            let before = tcgetattr(stdin)?;
            let mut raw = before.clone();
            raw.make_raw();
            tcsetattr(stdin, OptionalActions::Now, &raw)?;
            Ok(before)
        };
        set().map(Self).map_err(ConsoleError::Terminal)
    }
}

impl Drop for RawMode {
    fn drop(&mut self) {
        // The terminal may be gone.
        let _ = tcsetattr(rustix::stdio::stdin(), OptionalActions::Now, &self.0);
    }
}

/// Shows each byte at once.
struct Flushed<W: Write>(W);

impl<W: Write> Write for Flushed<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let len = self.0.write(bytes)?;
        self.0.flush()?;
        Ok(len)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.0.flush()
    }
}

struct Shared(Arc<Mutex<Box<dyn Write + Send>>>);

impl Write for Shared {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.0.lock().flush()
    }
}

struct Lossy(Arc<File>);

impl Write for Lossy {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        write_or_lose(&mut &*self.0, bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

struct ToClient(Client);

impl Write for ToClient {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match &mut *self.0.lock() {
            Some(client) => client.write(bytes),
            // No client is connected, which is not a fault.
            None => Ok(bytes.len()),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::os::unix::net::UnixStream;

    use super::*;
    use crate::Serial;
    use crate::client::UNREAD;
    use crate::interrupt::InterruptLine;

    fn serial(console: &Console) -> Serial {
        Serial::new(
            InterruptLine::new().unwrap(),
            console.output(),
            |_| {},
            || {},
        )
    }

    fn guest_writes(serial: &Serial, text: &[u8]) {
        use memory::DeviceOps;
        text.iter().for_each(|byte| serial.write(0, &[*byte]));
    }

    #[test]
    fn a_client_that_reads_late_reads_all() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("console");
        let mut console = Console::socket(&path).unwrap();
        let serial = serial(&console);
        let mut client = UnixStream::connect(&path).unwrap();
        assert_eq!(console.ready(&serial).len(), 1);
        let text: Vec<u8> = (0..20_000_u32).map(|i| (i % 251) as u8).collect();
        guest_writes(&serial, &text);
        let mut read = vec![0; text.len()];
        let mut at = 0;
        client.set_nonblocking(true).unwrap();
        while at < read.len() {
            match client.read(&mut read[at..]) {
                Ok(len) => at += len,
                // The loop finds that there is room.
                Err(_) => assert!(console.ready(&serial).is_empty()),
            }
        }
        assert!(read == text);
        assert_eq!(serial.counters()[2], ("bytes_lost", 0));
        // Output that no client reads is lost, and counted.
        let much = vec![0; UNREAD + 300_000];
        guest_writes(&serial, &much);
        assert!(serial.counters()[2].1 > 0);
    }

    #[test]
    fn a_socket_serves_one_client_and_then_the_next() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("console");
        let mut console = Console::socket(&path).unwrap();
        let serial = serial(&console);
        guest_writes(&serial, b"nobody hears this");
        for text in ["first", "second"] {
            let mut client = UnixStream::connect(&path).unwrap();
            assert!(matches!(console.ready(&serial)[..], [Watch::Begin(_)]));
            guest_writes(&serial, text.as_bytes());
            let mut heard = vec![0; text.len()];
            client.read_exact(&mut heard).unwrap();
            assert_eq!(heard, text.as_bytes());
            let mut turned_away = UnixStream::connect(&path).unwrap();
            assert_eq!(console.ready(&serial), []);
            assert_eq!(turned_away.read(&mut [0]).unwrap(), 0);
            drop(client);
            assert!(matches!(console.ready(&serial)[..], [Watch::End(_)]));
        }
        drop(console);
        assert!(!path.exists());
    }

    #[test]
    fn input_waits_where_it_is_until_the_guest_reads() {
        let dir = tempfile::tempdir().unwrap();
        let mut console = Console::socket(&dir.path().join("console")).unwrap();
        let serial = serial(&console);
        let mut client = UnixStream::connect(dir.path().join("console")).unwrap();
        client.write_all(&[1; 100]).unwrap();
        console.ready(&serial);
        console.ready(&serial);
        assert!(console.has_more() && serial.room() == 0);
    }

    #[test]
    fn what_the_guest_had_no_room_for_comes_when_it_has() {
        use memory::DeviceOps;
        let serial = serial(&Console::null());
        let (reader, mut writer) = std::io::pipe().unwrap();
        let sent: Vec<u8> = (0..200).collect();
        writer.write_all(&sent).unwrap();
        let mut came = Vec::new();
        // Nothing more is written: what is left can only come from the descriptor.
        while pump(&reader, &serial).more {
            while serial.room() < 64 {
                let mut byte = [0];
                serial.read(0, &mut byte);
                came.extend(byte);
            }
        }
        came.resize_with(sent.len(), || {
            let mut byte = [0];
            serial.read(0, &mut byte);
            byte[0]
        });
        assert_eq!(came, sent);
        drop(writer);
        assert!(pump(&reader, &serial).ended);
    }

    #[test]
    fn a_pseudo_terminal_has_a_path_and_loses_what_nobody_reads() {
        let console = Console::pty().unwrap();
        assert!(console.pty_path().unwrap().starts_with("/dev/pts"));
        let serial = serial(&console);
        guest_writes(&serial, &[b'x'; 100_000]);
        let lost = serial.counters()[2].1;
        assert!(lost > 0 && lost < 100_000, "{lost}");
    }

    #[test]
    fn what_cannot_be_written_is_named() {
        let refused = Console::file(Path::new("/nowhere/log"))
            .err()
            .unwrap()
            .to_string();
        assert!(
            refused.starts_with("the console's file /nowhere/log cannot be written"),
            "{refused}"
        );
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let _first = Console::socket(&path).unwrap();
        assert!(matches!(
            Console::socket(&path),
            Err(ConsoleError::Socket { .. })
        ));
    }
}
