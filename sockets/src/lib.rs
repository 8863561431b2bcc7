//! Unix sockets that one program at a time listens on, and to which only their owner can connect.
//!
//! # One live listener a path
//! A bound socket's file outlives the program that bound it, so the file alone does not tell whether a
//! program listens. The listener therefore holds a lock (`flock`) on `<socket>.lock` for as long as it
//! lives; the kernel releases it however the program ends. Only the holder of the lock touches the
//! socket's file:
//!
//! ```text
//!  lock <socket>.lock ── held by another ─────────► refused: in use
//!       │ got it
//!       ▼
//!  what is at <socket>?
//!       ├─ nothing ───────────────────────────────► bind
//!       ├─ a socket without a listener ───────────► remove, bind      (its owner was killed)
//!       ├─ a socket with a listener ──────────────► refused: in use   (a program that takes no lock)
//!       └─ anything else ─────────────────────────► refused: not a socket
//! ```
//!
//! ```
//! # let directory = tempfile::tempdir()?;
//! let path = directory.path().join("api.sock");
//! let first = sockets::BoundSocket::bind(&path)?;
//! let refused = sockets::BoundSocket::bind(&path).unwrap_err();
//! assert!(refused.to_string().contains("listens there already"));
//! drop(first);
//! sockets::BoundSocket::bind(&path)?;
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

#![forbid(unsafe_code)]

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read as _, Seek as _, Write as _};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::fs::{FlockOperation, Mode, flock};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};

/// How long another program may hold the lock on a socket's directory.
const LOCK_PATIENCE: Duration = Duration::from_secs(1);

/// How long a program may take between binding its socket and listening on it, and to accept a connection
/// where others fill the queue.
const LISTEN_PATIENCE: Duration = Duration::from_secs(1);

/// Connections that wait to be accepted.
const BACKLOG: i32 = 128;

/// A path on which no socket can be bound.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BindError {
    /// Another program listens there.
    #[error(
        "cannot listen on {path}: {owner} listens there already; end what listens there, or choose another \
         path"
    )]
    InUse {
        /// The socket.
        path: PathBuf,
        /// The program, as far as is known.
        owner: String,
    },
    /// There is a file of another kind, which may hold something.
    #[error(
        "cannot listen on {0}: the path is a file that is not a socket; remove it, or choose \
         another path"
    )]
    NotASocket(PathBuf),
    /// The lock could not be made or taken.
    #[error("cannot lock {path}: {source}")]
    Lock {
        /// The lock file.
        path: PathBuf,
        /// The host's answer.
        source: io::Error,
    },
    /// The socket could not be bound.
    #[error("cannot bind the socket {path}: {source}")]
    Bind {
        /// The socket.
        path: PathBuf,
        /// The host's answer.
        source: io::Error,
    },
}

/// A bound unix socket that only its owner may connect to (mode 0600), and the lock that goes with it.
/// Dropping it removes both files.
#[derive(Debug)]
pub struct BoundSocket {
    listener: UnixListener,
    path: PathBuf,
    /// Device and inode of the file that `bind` made: only that one is removed.
    identity: (u64, u64),
    /// Last, so that it is released after the files are gone.
    _lock: LockFile,
}

impl BoundSocket {
    /// Listens on a unix socket at `path`, without blocking. The file that a dead program left there is
    /// taken over.
    ///
    /// # Errors
    /// Another program listens there, there is something other than a socket, or the host refuses.
    pub fn bind(path: impl Into<PathBuf>) -> Result<Self, BindError> {
        let path = path.into();
        let lock = LockFile::take(&path)?;
        clear_stale(&path)?;
        let failed = |source: io::Error| BindError::Bind {
            path: path.clone(),
            source,
        };
        let listener = bind_private(&path).map_err(failed)?;
        let identity = identity(&path).map_err(failed)?;
        Ok(Self {
            listener,
            path,
            identity,
            _lock: lock,
        })
    }

    /// Accepts the connections.
    #[must_use]
    pub fn listener(&self) -> &UnixListener {
        &self.listener
    }

    /// The socket's file.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for BoundSocket {
    fn drop(&mut self) {
        // Another program may have moved the file away and put its own there.
        if identity(&self.path).is_ok_and(|found| found == self.identity)
            && let Err(error) = fs::remove_file(&self.path)
        {
            tracing::warn!(path = %self.path.display(), %error, "cannot remove the socket");
        }
    }
}

fn identity(path: &Path) -> io::Result<(u64, u64)> {
    fs::symlink_metadata(path).map(|found| (found.dev(), found.ino()))
}

/// Binds a socket at `path` and listens, without blocking. Only the owner of this process may connect
/// (mode 0600, whatever the umask): a client of the API, of a console or of a vsock has the rights of the
/// operator.
///
/// Takes no lock and removes no file: see [`BoundSocket`] and [`bind_replacing`] for sockets that replace a
/// dead program's.
///
/// # Errors
/// There is a file at `path`, the path is longer than 107 bytes, or the host refuses.
pub fn bind_private(path: &Path) -> io::Result<UnixListener> {
    let address = address(path)?;
    let socket = socket()?;
    // The file gets the mode of the socket less the umask (unix_bind_bsd in net/unix/af_unix.c): set before
    // `bind`, there is no moment at which the file is open to others.
    rustix::fs::fchmod(&socket, Mode::RUSR | Mode::WUSR)?;
    rustix::net::bind(&socket, &address)?;
    rustix::net::listen(&socket, BACKLOG)?;
    Ok(socket.into())
}

fn address(path: &Path) -> io::Result<SocketAddrUnix> {
    SocketAddrUnix::new(path).map_err(|errno| {
        if errno == rustix::io::Errno::NAMETOOLONG {
            io::Error::new(
                io::ErrorKind::InvalidInput,
                "the path is too long: unix sockets allow 107 bytes",
            )
        } else {
            errno.into()
        }
    })
}

/// Binds as [`bind_private`] does, in the place of a socket whose program has ended.
///
/// Holds a lock (`flock`) on the directory meanwhile and leaves no lock file: between the moment at which a
/// program looks for a listener and the moment at which it removes the file, another may have bound its own
/// socket there. Where the directory cannot be locked, no socket is replaced.
///
/// # Errors
/// The same as those of [`bind_private`]: a program listens at `path`, or the file is not a socket.
pub fn bind_replacing(path: &Path) -> io::Result<UnixListener> {
    let locked = lock_directory(path)?;
    if locked.is_some() && is_abandoned(path) {
        tracing::info!(path = %path.display(), "replacing the socket of a program that has ended");
        fs::remove_file(path)?;
    }
    bind_private(path).map_err(|error| match error.kind() {
        io::ErrorKind::AddrInUse => taken(path),
        _ => error,
    })
}

/// Checks that nothing at `path` keeps [`bind_replacing`] from making a socket there. Nothing is made or
/// removed.
///
/// # Errors
/// The path is longer than 107 bytes, a program listens there, or the file is not a socket.
pub fn check_free(path: &Path) -> io::Result<()> {
    address(path)?;
    match fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(error),
        Ok(_) if is_abandoned(path) => Ok(()),
        Ok(_) => Err(taken(path)),
    }
}

/// The error of a path that cannot be bound because of the file that is there.
fn taken(path: &Path) -> io::Error {
    let why = match fs::symlink_metadata(path).map(|found| found.file_type()) {
        Ok(kind) if kind.is_socket() => "another program listens there",
        Ok(kind) if kind.is_dir() => "the path is a directory",
        Ok(_) => "the path is a file that is not a socket",
        Err(_) => "another program had a socket there",
    };
    io::Error::new(io::ErrorKind::AddrInUse, why)
}

/// Locks the directory of a socket until the file is dropped, or returns `None` where that is not possible.
fn lock_directory(socket: &Path) -> io::Result<Option<File>> {
    let directory = match socket.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    let Ok(file) = File::open(directory) else {
        return Ok(None);
    };
    let deadline = Instant::now() + LOCK_PATIENCE;
    loop {
        match flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => return Ok(Some(file)),
            // The lock is held for microseconds, unless a program holds it that is none of ours.
            Err(rustix::io::Errno::WOULDBLOCK) if Instant::now() < deadline => {
                std::thread::sleep(Duration::from_millis(1));
            }
            Err(rustix::io::Errno::WOULDBLOCK) => {
                let why = format!("another program holds a lock on {}", directory.display());
                return Err(io::Error::new(io::ErrorKind::TimedOut, why));
            }
            Err(_) => return Ok(None),
        }
    }
}

/// Makes way for a socket at `path`. Returns whether one was removed. The caller holds the lock.
fn clear_stale(path: &Path) -> Result<bool, BindError> {
    let failed = |source| BindError::Bind {
        path: path.to_owned(),
        source,
    };
    match fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
        Err(error) => return Err(failed(error)),
        Ok(found) if !found.file_type().is_socket() => {
            return Err(BindError::NotASocket(path.to_owned()));
        }
        Ok(_) => {}
    }
    match connect(path) {
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
            tracing::info!(path = %path.display(), "replacing the socket of a program that has \
                                                    ended");
            fs::remove_file(path).map_err(failed)?;
            Ok(true)
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        // Any other answer: a program listens, if only with a full backlog (EAGAIN).
        Ok(_) | Err(_) => Err(BindError::InUse {
            path: path.to_owned(),
            owner: "another program".to_owned(),
        }),
    }
}

/// Removes the socket at `path` and its lock file, if the program that bound it has ended. Returns whether
/// there was such a socket.
///
/// # Errors
/// A program listens there, there is something other than a socket, or the host refuses.
pub fn remove_abandoned(path: &Path) -> Result<bool, BindError> {
    let _lock = LockFile::take(path)?;
    clear_stale(path)
}

/// Whether `path` is a socket on which no program listens any more.
fn is_abandoned(path: &Path) -> bool {
    // The kernel refuses a connection to a file of another kind with the same error.
    let is_socket = fs::symlink_metadata(path).is_ok_and(|found| found.file_type().is_socket());
    is_socket && connect(path).is_err_and(|error| error.kind() == io::ErrorKind::ConnectionRefused)
}

/// Connects to the socket of a program that may have started just now.
///
/// The file of a [`BoundSocket`] is there for a moment before its program listens: `bind` makes the file, and
/// `listen` needs a bound socket. A client that waits for the file may connect in between. The kernel refuses
/// that as it refuses a connection to a dead program's socket, so the lock file, which is made before the
/// socket, tells the two apart: with a lock file, the call tries again for up to a second.
///
/// # Errors
/// There is no socket, no program listens there, the program accepts no connection (`TimedOut`, after a second
/// in which its queue was full), or the host refuses.
pub fn connect_to_bound(path: &Path) -> io::Result<UnixStream> {
    let deadline = Instant::now() + LISTEN_PATIENCE;
    loop {
        let error = match connect(path) {
            Ok(stream) => {
                stream.set_nonblocking(false)?;
                return Ok(stream);
            }
            Err(error) => error,
        };
        let is_late = Instant::now() >= deadline;
        match error.kind() {
            io::ErrorKind::ConnectionRefused if !is_late && lock_path(path).exists() => {}
            io::ErrorKind::WouldBlock if !is_late => {}
            io::ErrorKind::WouldBlock => {
                let why = "the program that listens there accepts no connection";
                return Err(io::Error::new(io::ErrorKind::TimedOut, why));
            }
            _ => return Err(error),
        }
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Connects without waiting: a listener that accepts nothing would block a blocking `connect`.
fn connect(path: &Path) -> io::Result<UnixStream> {
    let socket = socket()?;
    rustix::net::connect(&socket, &SocketAddrUnix::new(path)?)?;
    Ok(socket.into())
}

fn socket() -> rustix::io::Result<OwnedFd> {
    rustix::net::socket_with(
        AddressFamily::UNIX,
        SocketType::STREAM,
        SocketFlags::CLOEXEC | SocketFlags::NONBLOCK,
        None,
    )
}

fn lock_path(socket: &Path) -> PathBuf {
    let mut path = socket.as_os_str().to_owned();
    path.push(".lock");
    PathBuf::from(path)
}

/// The lock of a socket, held until dropped; its file is removed with it.
#[derive(Debug)]
struct LockFile {
    path: PathBuf,
    _held: File,
}

impl LockFile {
    fn take(socket: &Path) -> Result<Self, BindError> {
        let path = lock_path(socket);
        let failed = |source: io::Error| BindError::Lock {
            path: path.clone(),
            source,
        };
        loop {
            let mut file = OpenOptions::new()
                .read(true)
                .write(true)
                .create(true)
                .truncate(false)
                .mode(0o600)
                .open(&path)
                .map_err(failed)?;
            match flock(&file, FlockOperation::NonBlockingLockExclusive) {
                Ok(()) => {}
                Err(rustix::io::Errno::WOULDBLOCK) => {
                    return Err(BindError::InUse {
                        path: socket.to_owned(),
                        owner: owner(&mut file),
                    });
                }
                Err(errno) => return Err(failed(errno.into())),
            }
            // The holder before may have removed the file between our open and our lock: then the lock is on
            // a file that no other program will ever open.
            let held = file.metadata().map_err(failed)?;
            if identity(&path).is_ok_and(|found| found == (held.dev(), held.ino())) {
                write_owner(&mut file).map_err(failed)?;
                return Ok(Self { path, _held: file });
            }
        }
    }
}

/// Removes the file while the lock is still held, so that no other program's file is removed.
impl Drop for LockFile {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_file(&self.path) {
            tracing::warn!(path = %self.path.display(), %error, "cannot remove the lock file");
        }
    }
}

fn write_owner(file: &mut File) -> io::Result<()> {
    file.set_len(0)?;
    file.rewind()?;
    writeln!(file, "{}", std::process::id())
}

/// The writer of the lock file, for the message only.
fn owner(file: &mut File) -> String {
    let mut text = String::new();
    let mut start = file.take(32);
    match start
        .read_to_string(&mut text)
        .map(|_| text.trim().parse::<u32>())
    {
        Ok(Ok(pid)) if pid == std::process::id() => "this process".to_owned(),
        Ok(Ok(pid)) => format!("process {pid}"),
        _ => "another program".to_owned(),
    }
}

#[cfg(test)]
mod tests;
