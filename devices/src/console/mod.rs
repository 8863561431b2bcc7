//! The other end of a serial port or console: a file, a terminal, a socket.
//!
//! Output never waits for a reader: a vCPU is on the other side of it. Input is taken only as
//! fast as the guest reads it, so that it piles up where its sender can see it.

mod log_file;
mod terminal;

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};

use ::terminal::{Escape, RawMode};
use parking_lot::Mutex;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{Mode, OFlags, fcntl_getfl, fcntl_setfl};
use rustix::io::Errno;
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{OptionalActions, isatty, tcgetattr, tcsetattr};

use self::log_file::LogFile;
pub use self::terminal::flush_terminal;
use crate::client::Connected;
use crate::host_file::{LockError, OpenError, check_directory};
use crate::serial::write_or_lose;
use crate::unix::Listening;

/// A console's other end could not be made. The text goes on behind the name of the console: "the serial
/// port's".
#[derive(Debug, thiserror::Error)]
pub enum ConsoleError {
    /// The file cannot be opened for writing.
    #[error("file cannot be used: {0}")]
    File(#[from] OpenError),
    /// Another program or VM uses the file, as its disk or as its console.
    #[error("file cannot be used: {0}")]
    Locked(#[from] LockError),
    /// The file cannot be emptied.
    #[error("file {} cannot be truncated: {source}", path.display())]
    Empty {
        /// The file.
        path: PathBuf,
        /// The host's answer.
        source: io::Error,
    },
    /// The socket cannot be made.
    #[error("socket {} cannot be created: {source}", path.display())]
    Socket {
        /// The socket.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// No pseudo terminal, or no terminal settings.
    #[error("terminal cannot be set up: {0}")]
    Terminal(#[source] io::Error),
}

/// A receiver of a console's input: a serial port, or a virtio console.
pub trait ConsoleInput {
    /// Bytes that the guest has room for.
    fn room(&self) -> usize;
    /// Gives the guest as many of these bytes as it has room for, and returns how many.
    fn receive(&self, bytes: &[u8]) -> usize;
}

/// The host's end of a serial port or virtio console.
pub struct Console {
    end: End,
    /// The guest has not room for all that there is to read.
    more: bool,
}

enum End {
    /// Output is thrown away.
    Null,
    File(LogFile),
    Tty {
        output: terminal::Writer,
        keyboard: Option<Keyboard>,
    },
    /// Standard output alone.
    Stdout(terminal::Writer),
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
        Self::with(End::Null)
    }

    fn with(end: End) -> Self {
        Self { end, more: false }
    }

    /// Output goes behind what is in a file, which is made if it does not exist; there is no input. The
    /// file is locked, as a disk's image is, so that no two VMs write to it. [`Console::empty`] empties
    /// it.
    ///
    /// # Errors
    /// Fails if the path names something else than a regular file, `/dev/null` or a terminal, cannot be
    /// written, or is in use.
    pub fn file(path: &Path) -> Result<Self, ConsoleError> {
        let file = LogFile::open(path)?;
        file.lock()?;
        Ok(Self::with(End::File(file)))
    }

    /// Checks that [`Console::file`] could use a path. Nothing is made.
    ///
    /// # Errors
    /// As for [`Console::file`].
    pub fn check_file(path: &Path) -> Result<(), ConsoleError> {
        if path.exists() {
            return Self::file(path).map(drop);
        }
        let path = path.to_owned();
        check_directory(&path).map_err(|source| OpenError::Host { path, source }.into())
    }

    /// Checks that [`Console::socket`] could listen at a path. Nothing is made.
    ///
    /// # Errors
    /// As for [`Console::socket`].
    pub fn check_socket(path: &Path) -> Result<(), ConsoleError> {
        Listening::check(path).map_err(|source| ConsoleError::Socket {
            path: path.to_owned(),
            source,
        })
    }

    /// Opens like [`Console::file`] while another machine still holds the lock, until
    /// [`Console::take_over`].
    ///
    /// # Errors
    /// As for [`Console::file`].
    pub fn next_file(path: &Path) -> Result<Self, ConsoleError> {
        Ok(Self::with(End::File(LogFile::open(path)?)))
    }

    /// Empties the console's file, if there is one. What was in it is lost, so that this is the last
    /// step of a boot, after everything that can be refused.
    ///
    /// # Errors
    /// Fails if the host refuses.
    pub fn empty(&self) -> Result<(), ConsoleError> {
        match &self.end {
            End::File(file) => file.empty(),
            _ => Ok(()),
        }
    }

    /// This process's standard input and output. A terminal is set to raw mode, so that the guest
    /// gets each key, and back again when the console is dropped. Output is written by a thread: see
    /// [`flush_terminal`].
    ///
    /// # Errors
    /// Fails if the terminal cannot be set, or the host gives no thread.
    pub fn tty() -> Result<Self, ConsoleError> {
        let output = terminal::stdout().map_err(ConsoleError::Terminal)?;
        let keyboard = Keyboard::open()?;
        Ok(Self::with(End::Tty { output, keyboard }))
    }

    /// This process's standard output, for a device without input. Another console may use it, and the
    /// terminal's input, as well.
    ///
    /// # Errors
    /// Fails if the host cannot start a thread.
    pub fn stdout() -> Result<Self, ConsoleError> {
        let output = terminal::stdout().map_err(ConsoleError::Terminal)?;
        Ok(Self::with(End::Stdout(output)))
    }

    /// A new pseudo terminal.
    ///
    /// # Errors
    /// Fails if the host has none left.
    pub fn pty() -> Result<Self, ConsoleError> {
        let make = || -> io::Result<(OwnedFd, PathBuf)> {
            // NONBLOCK comes last: the settings below may have to wait. CLOEXEC is set from the
            // start, since another thread may start a program at any time.
            let master = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC)?;
            grantpt(&master)?;
            unlockpt(&master)?;
            let path = PathBuf::from(ptsname(&master, Vec::new())?.to_string_lossy().into_owned());
            // The terminal's line discipline is not to change or echo what the guest writes. Without
            // O_NOCTTY, the slave would become the controlling terminal of a service that has none, and
            // closing the master would send SIGHUP to that service.
            let flags = OFlags::RDWR | OFlags::NOCTTY | OFlags::CLOEXEC;
            let slave = rustix::fs::open(&path, flags, Mode::empty())?;
            let mut settings = tcgetattr(&slave)?;
            settings.make_raw();
            tcsetattr(&slave, OptionalActions::Now, &settings)?;
            fcntl_setfl(&master, fcntl_getfl(&master)? | OFlags::NONBLOCK)?;
            Ok((master, path))
        };
        let (master, path) = make().map_err(ConsoleError::Terminal)?;
        let master = Arc::new(File::from(master));
        Ok(Self::with(End::Pty { master, path }))
    }

    /// A unix socket, on which one client at a time is served; another is turned away. A socket
    /// without a listener is replaced.
    ///
    /// # Errors
    /// Fails if it cannot be created.
    pub fn socket(path: &Path) -> Result<Self, ConsoleError> {
        Self::on_socket(Listening::bind(path), path)
    }

    /// Binds like [`Console::socket`], beside the one that another program has there until
    /// [`Console::take_over`].
    ///
    /// # Errors
    /// Fails if it cannot be created.
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
        Ok(Self::with(end))
    }

    /// Takes the path of the socket, or the lock of the file, from the machine that had it.
    ///
    /// # Errors
    /// Fails if the host refuses, or the other machine still holds the lock.
    pub fn take_over(&mut self) -> Result<(), ConsoleError> {
        match &mut self.end {
            End::Socket { listener, .. } => {
                let path = listener.path().to_owned();
                let refused = |source| ConsoleError::Socket { path, source };
                listener.take_over().map_err(refused)
            }
            End::File(file) => file.lock(),
            _ => Ok(()),
        }
    }

    /// Lets another machine take the file over. The path of a socket is taken without that.
    pub fn hand_over(&mut self) {
        if let End::File(file) = &self.end {
            file.unlock();
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

    /// Destination of the guest's output: the same each time, so that a machine that replaces
    /// another continues where that one ended.
    pub fn output(&self) -> Box<dyn Write + Send> {
        match &self.end {
            End::Null => Box::new(io::sink()),
            // A terminal that does not take more loses output; a file takes all of it.
            End::File(file) => Box::new(Lossy(file.output())),
            End::Tty { output, .. } | End::Stdout(output) => Box::new(output.clone()),
            End::Pty { master, .. } => Box::new(Lossy(Arc::clone(master))),
            End::Socket { client, .. } => Box::new(ToClient(Arc::clone(client))),
        }
    }

    /// The descriptors to watch at first.
    #[must_use]
    pub fn sources(&self) -> Vec<RawFd> {
        match &self.end {
            End::Null | End::File(_) | End::Stdout(_) => Vec::new(),
            End::Tty { .. } => vec![rustix::stdio::stdin().as_raw_fd()],
            End::Pty { master, .. } => vec![master.as_raw_fd()],
            End::Socket { listener, client } => {
                let client = client.lock();
                let client = client.as_ref().map(|client| client.stream.as_raw_fd());
                client.into_iter().chain([listener.as_raw_fd()]).collect()
            }
        }
    }

    /// Serves what is ready: input for the guest, or a new client. Call it when a watched descriptor is
    /// ready, and when the guest has room again.
    pub fn ready(&mut self, to: &dyn ConsoleInput) -> Vec<Watch> {
        self.more = false;
        match &mut self.end {
            End::Null | End::File(_) | End::Stdout(_) => Vec::new(),
            End::Tty { keyboard, .. } => {
                let stdin = rustix::stdio::stdin();
                self.more = match (keyboard, ON_ESCAPE.get()) {
                    (Some(Keyboard { escape, .. }), Some(leave)) => {
                        pump(stdin, &Typed { to, escape, leave }).more
                    }
                    _ => pump(stdin, to).more,
                };
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

    /// Whether there is input that the guest had no room for, or that is left for the next turn. Call
    /// [`Console::ready`] again when the guest has read all that it was given.
    #[must_use]
    pub fn has_more(&self) -> bool {
        self.more
    }
}

fn serve(listener: &UnixListener, client: &Client, to: &dyn ConsoleInput) -> (Vec<Watch>, bool) {
    let (mut watches, mut more) = (Vec::new(), false);
    // The lock is held only for moments: a vCPU that writes output needs it. So input is read from
    // a duplicate of the descriptor.
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
        // A second client is closed at once, so that it sees the end and does not wait for output
        // that goes to the first. `accept` continues until the backlog is empty: the listener is
        // edge-triggered.
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

/// Bytes of input in one turn. A guest that reads as fast as a client writes would keep the owner's thread,
/// which other VMs share.
const TURN: usize = 64 << 10;

/// Moves bytes to the guest until there are none, it has no room, or [`TURN`] bytes were moved.
///
/// It reads the descriptor itself: a reader with a buffer of its own, as that of the standard
/// library for standard input, would keep back what the guest has no room for, where no poll of
/// the descriptor finds it.
fn pump(from: impl AsFd, to: &dyn ConsoleInput) -> Pumped {
    // The size of a 16550A's buffer here. A larger one would gain nothing for a serial port.
    let mut buffer = [0; 64];
    let mut left = TURN;
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
        // Only behind the poll: without input there is nothing to come back for, and `more` would
        // have the owner wake for nothing.
        if room == 0 || left == 0 {
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
                // The owner comes back for the rest when the guest has read what it got by now.
                left = left.saturating_sub(len);
            }
            Err(Errno::INTR) => {}
            Err(error) => {
                // A pseudo terminal whose last user closed it answers EIO: that is an end, too.
                let ended = error != Errno::WOULDBLOCK;
                return Pumped { more: false, ended };
            }
        }
    }
}

/// Called when the user of the terminal leaves the console by the escape key.
static ON_ESCAPE: OnceLock<Box<dyn Fn() + Send + Sync>> = OnceLock::new();

/// Has the escape key, Ctrl-A x, looked for in what is typed at this process's terminal, and `leave`
/// called when it comes. Without this all keys go to the guest. Only the first call counts, as there is
/// one terminal.
pub fn on_terminal_escape(leave: impl Fn() + Send + Sync + 'static) {
    let _ = ON_ESCAPE.set(Box::new(leave));
}

/// A terminal in raw mode, whose user can leave.
struct Keyboard {
    _raw: RawMode,
    escape: Mutex<Escape>,
}

impl Keyboard {
    /// Sets the terminal on standard input to raw mode, if there is one.
    fn open() -> Result<Option<Self>, ConsoleError> {
        if !isatty(rustix::stdio::stdin()) {
            return Ok(None);
        }
        Ok(Some(Self {
            _raw: RawMode::enter().map_err(ConsoleError::Terminal)?,
            escape: Mutex::default(),
        }))
    }
}

/// The guest's input, without the escape key.
struct Typed<'a> {
    to: &'a dyn ConsoleInput,
    escape: &'a Mutex<Escape>,
    leave: &'a (dyn Fn() + Send + Sync),
}

impl ConsoleInput for Typed<'_> {
    fn room(&self) -> usize {
        // For a Ctrl-A that was kept back until the next key came.
        self.to.room().saturating_sub(1)
    }

    fn receive(&self, bytes: &[u8]) -> usize {
        let (keys, leaves) = self.escape.lock().filter(bytes);
        self.to.receive(&keys);
        if leaves {
            (self.leave)();
        }
        bytes.len()
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
mod tests;
