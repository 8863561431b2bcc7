//! Where the service is reached: a unix socket, or TCP on the loopback interface.
//!
//! # One live service a socket
//! A bound socket's file outlives the program that bound it, so the file alone does not tell whether somebody
//! is there. The owner therefore holds a lock (`flock`) on `<socket>.lock` for as long as it lives; the kernel
//! lets go of it however the owner ends. Only the holder of the lock touches the socket's file:
//!
//! ```text
//!  lock <socket>.lock ── held by another ─────────► refused: in use
//!       │ got it
//!       ▼
//!  what is at <socket>?
//!       ├─ nothing ───────────────────────────────► bind
//!       ├─ a socket that nobody answers on ───────► remove, bind      (its owner was killed)
//!       ├─ a socket that somebody answers on ─────► refused: in use   (a program that takes no lock)
//!       └─ anything else ─────────────────────────► refused: not a socket
//! ```

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read as _, Seek as _, Write as _};
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, Mode, flock};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};

use crate::limits::BACKLOG;

/// Why there is nothing to listen on.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ListenError {
    /// Another program serves there.
    #[error(
        "cannot serve on {path}: {owner} serves there already; stop it, or choose another path"
    )]
    InUse {
        /// The socket.
        path: PathBuf,
        /// Who, as far as is known.
        owner: String,
    },
    /// There is a file of another kind, which may hold something.
    #[error(
        "cannot serve on {0}: there is a file that is not a socket; remove it, or choose another path"
    )]
    NotASocket(PathBuf),
    /// The lock could not be made or taken.
    #[error("cannot lock {path}")]
    Lock {
        /// The lock file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The socket could not be bound.
    #[error("cannot bind the socket {path}")]
    Bind {
        /// The socket.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Anybody on the network could drive the service.
    #[error(
        "cannot serve on {0}: the interface knows no authentication yet, so TCP is limited to loopback addresses \
         (127.0.0.1, [::1]); forward the port or the unix socket with ssh to reach it from elsewhere"
    )]
    NotLoopback(SocketAddr),
    /// The address could not be bound.
    #[error("cannot bind {address}")]
    BindTcp {
        /// The address.
        address: SocketAddr,
        /// Why.
        source: io::Error,
    },
}

/// A place to serve on. Dropping it lets go of it: the file of a unix socket is removed.
#[derive(Debug)]
pub enum Listener {
    /// A unix socket that only its owner may use (mode 0600).
    Unix(UnixSocket),
    /// TCP on a loopback address.
    Tcp(tokio::net::TcpListener),
}

impl Listener {
    /// Listens on a unix socket at `path`; a file that a dead service left there is taken over.
    ///
    /// # Errors
    /// When another service lives there, there is something other than a socket, or the host refuses.
    pub fn unix(path: impl Into<PathBuf>) -> Result<Self, ListenError> {
        UnixSocket::bind(path.into()).map(Self::Unix)
    }

    /// Listens on a TCP address, which must be a loopback one. Port 0 lets the host choose: see
    /// [`place`](Self::place).
    ///
    /// # Errors
    /// When the address is not a loopback one, or the host refuses.
    pub async fn tcp(address: SocketAddr) -> Result<Self, ListenError> {
        if !address.ip().is_loopback() {
            return Err(ListenError::NotLoopback(address));
        }
        tokio::net::TcpListener::bind(address)
            .await
            .map(Self::Tcp)
            .map_err(|source| ListenError::BindTcp { address, source })
    }

    /// Where that is, for a person: a path, or `http://ADDRESS:PORT`.
    #[must_use]
    pub fn place(&self) -> String {
        match self {
            Self::Unix(socket) => socket.path.display().to_string(),
            Self::Tcp(listener) => listener.local_addr().map_or_else(
                |_| "a TCP socket".to_owned(),
                |address| format!("http://{address}"),
            ),
        }
    }
}

/// A bound unix socket and the lock that goes with it.
#[derive(Debug)]
pub struct UnixSocket {
    listener: tokio::net::UnixListener,
    path: PathBuf,
    /// Device and inode of the file that `bind` made: only that one is removed.
    identity: (u64, u64),
    /// Last, so that it is let go of after the files are gone.
    _lock: LockFile,
}

impl UnixSocket {
    fn bind(path: PathBuf) -> Result<Self, ListenError> {
        let lock = LockFile::take(&path)?;
        clear_stale(&path)?;
        let failed = |source: io::Error| ListenError::Bind {
            path: path.clone(),
            source,
        };
        let listener = bind_private(&path).map_err(failed)?;
        let identity = identity(&path).map_err(failed)?;
        let listener = tokio::net::UnixListener::from_std(listener).map_err(failed)?;
        Ok(Self {
            listener,
            path,
            identity,
            _lock: lock,
        })
    }

    pub(crate) async fn accept(&self) -> io::Result<tokio::net::UnixStream> {
        self.listener.accept().await.map(|(stream, _)| stream)
    }
}

impl Drop for UnixSocket {
    fn drop(&mut self) {
        // Somebody may have moved the file away and put another there.
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

/// Binds and listens, with nobody but the owner allowed to connect at any time.
fn bind_private(path: &Path) -> io::Result<std::os::unix::net::UnixListener> {
    let address = SocketAddrUnix::new(path).map_err(|errno| {
        if errno == rustix::io::Errno::NAMETOOLONG {
            io::Error::new(
                io::ErrorKind::InvalidInput,
                "the path is too long: unix sockets allow 107 bytes",
            )
        } else {
            errno.into()
        }
    })?;
    let socket: OwnedFd = rustix::net::socket_with(
        AddressFamily::UNIX,
        SocketType::STREAM,
        SocketFlags::CLOEXEC | SocketFlags::NONBLOCK,
        None,
    )?;
    // The file gets the mode of the socket less the umask (unix_bind_bsd in net/unix/af_unix.c): set before
    // `bind`, there is no moment at which the file is open to others.
    rustix::fs::fchmod(&socket, Mode::RUSR | Mode::WUSR)?;
    rustix::net::bind(&socket, &address)?;
    rustix::net::listen(&socket, BACKLOG)?;
    Ok(socket.into())
}

/// Makes way for a socket at `path`. The caller holds the lock.
fn clear_stale(path: &Path) -> Result<(), ListenError> {
    let failed = |source| ListenError::Bind {
        path: path.to_owned(),
        source,
    };
    match fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(failed(error)),
        Ok(found) if !found.file_type().is_socket() => {
            return Err(ListenError::NotASocket(path.to_owned()));
        }
        Ok(_) => {}
    }
    match UnixStream::connect(path) {
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
            tracing::info!(path = %path.display(), "taking over the socket of a service that is gone");
            fs::remove_file(path).map_err(failed)
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        // Whatever else the answer is: somebody listens.
        Ok(_) | Err(_) => Err(ListenError::InUse {
            path: path.to_owned(),
            owner: "another program".to_owned(),
        }),
    }
}

/// The lock of a socket, held until dropped; its file is removed with it.
#[derive(Debug)]
struct LockFile {
    path: PathBuf,
    _held: File,
}

impl LockFile {
    fn take(socket: &Path) -> Result<Self, ListenError> {
        let mut path = socket.as_os_str().to_owned();
        path.push(".lock");
        let path = PathBuf::from(path);
        let failed = |source: io::Error| ListenError::Lock {
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
                    return Err(ListenError::InUse {
                        path: socket.to_owned(),
                        owner: owner(&mut file),
                    });
                }
                Err(errno) => return Err(failed(errno.into())),
            }
            // The holder before may have removed the file between our open and our lock: then the lock is on
            // a file that nobody else will ever open.
            let held = file.metadata().map_err(failed)?;
            if identity(&path).is_ok_and(|found| found == (held.dev(), held.ino())) {
                write_owner(&mut file).map_err(failed)?;
                return Ok(Self { path, _held: file });
            }
        }
    }
}

/// While the lock is still held, so that nobody's file but ours is removed.
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

/// Who wrote the lock file, for the message: what it says binds nobody.
fn owner(file: &mut File) -> String {
    let mut text = String::new();
    let mut start = file.take(32);
    match start
        .read_to_string(&mut text)
        .map(|_| text.trim().parse::<u32>())
    {
        Ok(Ok(pid)) => format!("process {pid}"),
        _ => "another service".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt as _;
    use std::sync::Arc;

    fn socket() -> (tempfile::TempDir, PathBuf) {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("api.sock");
        (directory, path)
    }

    #[tokio::test]
    async fn a_socket_is_private_and_leaves_nothing_behind() {
        let (directory, path) = socket();
        let listener = Listener::unix(&path).unwrap();
        assert_eq!(
            fs::metadata(&path).unwrap().permissions().mode() & 0o777,
            0o600
        );
        assert_eq!(listener.place(), path.display().to_string());
        drop(listener);
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 0);
    }

    #[tokio::test]
    async fn a_second_service_on_a_live_socket_is_refused_by_name() {
        let (_directory, path) = socket();
        let first = Listener::unix(&path).unwrap();
        let refusal = Listener::unix(&path).unwrap_err().to_string();
        assert!(refusal.contains(&path.display().to_string()), "{refusal}");
        assert!(
            refusal.contains(&format!("process {}", std::process::id())),
            "{refusal}"
        );
        assert!(
            UnixStream::connect(&path).is_ok(),
            "the first one is left alone"
        );
        drop(first);
        Listener::unix(&path).unwrap();
    }

    #[tokio::test]
    async fn the_socket_of_a_dead_service_is_taken_over() {
        let (_directory, path) = socket();
        // As `kill -9` leaves it: the file without a listener, and a lock file that nobody holds.
        drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
        fs::write(path.with_extension("sock.lock"), "4194304\n").unwrap();
        assert!(path.exists());
        let _listener = Listener::unix(&path).unwrap();
        assert!(UnixStream::connect(&path).is_ok());
    }

    #[tokio::test]
    async fn a_live_socket_without_a_lock_is_respected() {
        let (_directory, path) = socket();
        let _other = std::os::unix::net::UnixListener::bind(&path).unwrap();
        assert!(matches!(
            Listener::unix(&path),
            Err(ListenError::InUse { .. })
        ));
        assert!(path.exists());
    }

    #[tokio::test]
    async fn a_file_is_never_replaced() {
        let (_directory, path) = socket();
        fs::write(&path, "precious").unwrap();
        assert!(matches!(
            Listener::unix(&path),
            Err(ListenError::NotASocket(_))
        ));
        assert_eq!(fs::read_to_string(&path).unwrap(), "precious");
    }

    #[tokio::test]
    async fn a_path_that_cannot_be_is_named() {
        let (directory, path) = socket();
        let missing = path.join("deeper.sock");
        let refusal = Listener::unix(&missing).unwrap_err().to_string();
        assert!(refusal.contains("deeper.sock"), "{refusal}");
        let long = directory.path().join("l".repeat(120));
        let ListenError::Bind { source, .. } = Listener::unix(&long).unwrap_err() else {
            panic!("another refusal");
        };
        assert!(source.to_string().contains("107 bytes"), "{source}");
    }

    /// Many start at once over a stale file: exactly one serves, whatever the order.
    #[tokio::test(flavor = "multi_thread", worker_threads = 4)]
    async fn of_many_that_start_at_once_one_serves() {
        for _ in 0..20 {
            let (_directory, path) = socket();
            drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
            let start = Arc::new(tokio::sync::Barrier::new(8));
            let tries: Vec<_> = (0..8)
                .map(|_| {
                    let (path, start) = (path.clone(), start.clone());
                    tokio::spawn(async move {
                        start.wait().await;
                        Listener::unix(path)
                    })
                })
                .collect();
            let mut serving = Vec::new();
            for one in tries {
                serving.extend(one.await.unwrap());
            }
            assert_eq!(serving.len(), 1);
            assert!(UnixStream::connect(&path).is_ok());
        }
    }

    /// Services come and go on one socket, cleanly and as if killed: there are never two.
    #[tokio::test(flavor = "multi_thread", worker_threads = 4)]
    async fn of_many_that_come_and_go_one_serves_at_a_time() {
        use std::sync::atomic::{AtomicUsize, Ordering};

        let (_directory, path) = socket();
        let (alive, served) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
        let churn = |killed: bool| {
            let (path, alive, served) = (path.clone(), alive.clone(), served.clone());
            tokio::spawn(async move {
                for _ in 0..200 {
                    if let Ok(listener) = Listener::unix(&path) {
                        assert_eq!(alive.fetch_add(1, Ordering::SeqCst), 0);
                        tokio::task::yield_now().await;
                        alive.fetch_sub(1, Ordering::SeqCst);
                        served.fetch_add(1, Ordering::SeqCst);
                        if let (true, Listener::Unix(mut socket)) = (killed, listener) {
                            // Its file stays behind.
                            socket.identity = (0, 0);
                        }
                    }
                }
            })
        };
        for one in [churn(false), churn(true), churn(false), churn(true)] {
            one.await.unwrap();
        }
        assert!(served.load(Ordering::SeqCst) > 0);
    }

    #[tokio::test]
    async fn tcp_is_for_loopback_only() {
        for address in ["0.0.0.0:0", "192.0.2.1:0", "[::]:0"] {
            let refused = Listener::tcp(address.parse().unwrap()).await.unwrap_err();
            assert!(matches!(refused, ListenError::NotLoopback(_)), "{refused}");
        }
        let listener = Listener::tcp("127.0.0.1:0".parse().unwrap()).await.unwrap();
        assert!(listener.place().starts_with("http://127.0.0.1:"));
    }
}
