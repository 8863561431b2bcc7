//! Connections between two sides: unix sockets and TCP.

use std::fmt;
use std::fs::File;
use std::io::{self, Read, Write};
use std::mem::MaybeUninit;
use std::net::{SocketAddr, TcpListener, TcpStream, ToSocketAddrs};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::retry_on_intr;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};
use socket2::SockRef;
use sockets::{BindError, BoundSocket};

/// Files that are given at a time.
const MOST_FILES: usize = 16;

/// How long a connection may take to be made.
const CONNECT_PATIENCE: Duration = Duration::from_secs(5);

/// A connection.
pub trait Stream: Read + Write + Send {
    /// How long a read or a write may make no progress; then it fails.
    ///
    /// # Errors
    /// Fails if the host refuses.
    fn set_patience(&self, patience: Duration) -> io::Result<()>;

    /// Limits how many bytes may wait on this side to be sent. What is on the way already is not
    /// counted: a long way needs much of it.
    ///
    /// # Errors
    /// Fails if the host refuses.
    fn limit_unsent(&self, bytes: u32) -> io::Result<()> {
        let _ = bytes;
        Ok(())
    }

    /// Returns a handle that closes the connection from another thread.
    ///
    /// # Errors
    /// The descriptor cannot be duplicated.
    fn closer(&self) -> io::Result<Closer>;

    /// Returns a handle that ends reading from another thread: a blocked read returns the end of the stream,
    /// and this side can still write. The control channel is closed like this, so that the other side can
    /// get the reason. A stream without half-close is closed as by [`Stream::closer`].
    ///
    /// # Errors
    /// The descriptor cannot be duplicated.
    fn read_closer(&self) -> io::Result<Closer> {
        self.closer()
    }

    /// Passes open files to the other side, with one byte of data (`SCM_RIGHTS`).
    ///
    /// # Errors
    /// Fails if the connection carries none: only unix sockets do.
    fn send_files(&self, files: &[File]) -> io::Result<()> {
        let _ = files;
        Err(io::ErrorKind::Unsupported.into())
    }

    /// Receives the files that the peer passed, at most `most`.
    ///
    /// # Errors
    /// Fails if the connection cannot carry files, or none arrive.
    fn recv_files(&self, most: usize) -> io::Result<Vec<File>> {
        let _ = most;
        Err(io::ErrorKind::Unsupported.into())
    }
}

/// Closes a connection from any thread: reads and writes in progress fail at once.
#[derive(Clone)]
pub struct Closer(Arc<dyn Fn() + Send + Sync>);

impl Closer {
    /// Returns a handle that calls `close`.
    pub fn new(close: impl Fn() + Send + Sync + 'static) -> Self {
        Self(Arc::new(close))
    }

    /// Ends it.
    pub fn close(&self) {
        (self.0)();
    }
}

impl fmt::Debug for Closer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Closer")
    }
}

impl Stream for UnixStream {
    fn limit_unsent(&self, bytes: u32) -> io::Result<()> {
        // What was sent is at the other side.
        SockRef::from(self).set_send_buffer_size(bytes as usize)
    }

    fn set_patience(&self, patience: Duration) -> io::Result<()> {
        self.set_read_timeout(Some(patience))?;
        self.set_write_timeout(Some(patience))
    }

    fn closer(&self) -> io::Result<Closer> {
        // `shutdown` acts on the socket, whichever descriptor it gets: a read that another thread
        // waits in returns. To close a duplicate would wake no reader.
        let stream = self.try_clone()?;
        Ok(Closer::new(move || {
            // It may have ended already.
            let _ = stream.shutdown(std::net::Shutdown::Both);
        }))
    }

    fn read_closer(&self) -> io::Result<Closer> {
        let stream = self.try_clone()?;
        Ok(Closer::new(move || {
            let _ = stream.shutdown(std::net::Shutdown::Read);
        }))
    }

    fn send_files(&self, files: &[File]) -> io::Result<()> {
        let fds: Vec<_> = files.iter().map(AsFd::as_fd).collect();
        let mut space = vec![MaybeUninit::uninit(); SendAncillaryMessage::ScmRights(&fds).size()];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        if !ancillary.push(SendAncillaryMessage::ScmRights(&fds)) {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let byte = [io::IoSlice::new(&[0])];
        // Not sent when it is interrupted: the one byte goes with its files, or neither does.
        retry_on_intr(|| sendmsg(self, &byte, &mut ancillary, SendFlags::NOSIGNAL))?;
        Ok(())
    }

    fn recv_files(&self, most: usize) -> io::Result<Vec<File>> {
        // The kernel discards descriptors that do not fit (`MSG_CTRUNC`), so a peer cannot fill the
        // descriptor table.
        let mut space = vec![MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MOST_FILES))];
        let mut ancillary = RecvAncillaryBuffer::new(&mut space);
        let mut byte = [0];
        let mut slices = [io::IoSliceMut::new(&mut byte)];
        // Atomic with the receive: a child that another thread starts must not inherit guest
        // memory.
        let flags = RecvFlags::CMSG_CLOEXEC;
        let got = retry_on_intr(|| recvmsg(self, &mut slices, &mut ancillary, flags))?;
        if got.bytes == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        let mut files = Vec::new();
        for message in ancillary.drain() {
            if let RecvAncillaryMessage::ScmRights(fds) = message {
                files.extend(fds.map(File::from));
            }
        }
        if files.is_empty() || files.len() > most {
            return Err(io::ErrorKind::InvalidData.into());
        }
        Ok(files)
    }
}

impl Stream for TcpStream {
    fn limit_unsent(&self, bytes: u32) -> io::Result<()> {
        // Not the size of the send buffer (SO_SNDBUF), which also has what was sent and is not
        // acknowledged: so little of that would make a connection of some milliseconds slow.
        SockRef::from(self).set_tcp_notsent_lowat(bytes)
    }

    fn set_patience(&self, patience: Duration) -> io::Result<()> {
        self.set_read_timeout(Some(patience))?;
        self.set_write_timeout(Some(patience))
    }

    fn closer(&self) -> io::Result<Closer> {
        let stream = self.try_clone()?;
        Ok(Closer::new(move || {
            let _ = stream.shutdown(std::net::Shutdown::Both);
        }))
    }

    fn read_closer(&self) -> io::Result<Closer> {
        let stream = self.try_clone()?;
        Ok(Closer::new(move || {
            // Linux sends the peer nothing for this: only this side stops to wait.
            let _ = stream.shutdown(std::net::Shutdown::Read);
        }))
    }
}

/// Makes connections to the other side.
pub trait Dial: Send + Sync {
    /// A new connection.
    ///
    /// # Errors
    /// Fails if the other side cannot be reached.
    fn dial(&self) -> io::Result<Box<dyn Stream>>;
}

/// Accepts connections from the other side.
pub trait Accept: Send {
    /// The next connection; `None` when there was none for so long.
    ///
    /// # Errors
    /// Fails if no more can come.
    fn accept(&mut self, patience: Duration) -> io::Result<Option<Box<dyn Stream>>>;
}

/// The address of a listener: `unix:PATH` or `tcp:HOST:PORT`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Endpoint {
    /// A unix socket.
    Unix(PathBuf),
    /// A host and a port, as in `10.0.0.1:7000`, `[::1]:7000` or `host:7000`.
    Tcp(String),
}

/// The text is not an endpoint.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not an endpoint: use `unix:PATH` or `tcp:HOST:PORT`")]
pub struct InvalidEndpoint(String);

impl FromStr for Endpoint {
    type Err = InvalidEndpoint;

    fn from_str(text: &str) -> Result<Self, InvalidEndpoint> {
        let invalid = || InvalidEndpoint(text.to_owned());
        match text.split_once(':') {
            Some(("unix", path)) if !path.is_empty() => Ok(Self::Unix(path.into())),
            Some(("tcp", place)) => {
                // `tcp://host:port` means the same.
                let place = place.strip_prefix("//").unwrap_or(place);
                let (host, port) = place.rsplit_once(':').ok_or_else(invalid)?;
                let is_port = port.parse::<u16>().is_ok();
                (is_port && !host.is_empty())
                    .then(|| Self::Tcp(place.to_owned()))
                    .ok_or_else(invalid)
            }
            _ => Err(invalid()),
        }
    }
}

impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
            Self::Tcp(place) => write!(f, "tcp:{place}"),
        }
    }
}

impl Dial for Endpoint {
    fn dial(&self) -> io::Result<Box<dyn Stream>> {
        self.connect().map_err(|error| {
            let why = format!("cannot connect to {self}: {error}");
            io::Error::new(error.kind(), why)
        })
    }
}

impl Endpoint {
    fn connect(&self) -> io::Result<Box<dyn Stream>> {
        match self {
            Self::Unix(path) => Ok(Box::new(sockets::connect_to_bound(path)?)),
            Self::Tcp(place) => {
                let mut last = io::Error::from(io::ErrorKind::AddrNotAvailable);
                // A name may have several addresses, of which the host can reach only some. Without
                // a limit of our own, the kernel repeats a lost SYN for about two minutes.
                for address in place.to_socket_addrs()? {
                    match TcpStream::connect_timeout(&address, CONNECT_PATIENCE) {
                        Ok(stream) => {
                            // Small messages are sent at once.
                            stream.set_nodelay(true)?;
                            return Ok(Box::new(stream));
                        }
                        Err(error) => last = error,
                    }
                }
                Err(last)
            }
        }
    }
}

/// Listens for the other side.
#[derive(Debug)]
pub enum Listener {
    /// On a unix socket, to which only its owner can connect. Its file goes with it.
    Unix(BoundSocket),
    /// On a TCP port.
    Tcp(TcpListener),
}

impl Listener {
    /// Listens. The file of a unix socket whose program is gone is replaced.
    ///
    /// # Errors
    /// Fails if another program listens there, or the host refuses.
    pub fn bind(endpoint: &Endpoint) -> io::Result<Self> {
        match endpoint {
            Endpoint::Unix(path) => {
                let bound = BoundSocket::bind(path).map_err(|error| match error {
                    BindError::InUse { .. } => io::Error::new(io::ErrorKind::AddrInUse, error),
                    error => io::Error::other(error),
                });
                bound.map(Self::Unix)
            }
            Endpoint::Tcp(place) => {
                let addresses: Vec<SocketAddr> = place.to_socket_addrs()?.collect();
                let listener = TcpListener::bind(&addresses[..])?;
                // A connection may be gone between `poll` and `accept`. A blocking `accept` would
                // hang.
                listener.set_nonblocking(true)?;
                Ok(Self::Tcp(listener))
            }
        }
    }

    /// Returns the listener's address, with the port that the host chose for port 0.
    ///
    /// # Errors
    /// The socket's name cannot be read.
    pub fn endpoint(&self) -> io::Result<Endpoint> {
        match self {
            Self::Unix(socket) => Ok(Endpoint::Unix(socket.path().to_owned())),
            Self::Tcp(listener) => Ok(Endpoint::Tcp(listener.local_addr()?.to_string())),
        }
    }
}

impl Accept for Listener {
    fn accept(&mut self, patience: Duration) -> io::Result<Option<Box<dyn Stream>>> {
        let fd = match &*self {
            Self::Unix(socket) => socket.listener().as_fd(),
            Self::Tcp(listener) => listener.as_fd(),
        };
        let timeout = Timespec {
            tv_sec: i64::try_from(patience.as_secs()).unwrap_or(i64::MAX),
            tv_nsec: patience.subsec_nanos().into(),
        };
        match poll(&mut [PollFd::new(&fd, PollFlags::IN)], Some(&timeout)) {
            Ok(0) | Err(rustix::io::Errno::INTR) => return Ok(None),
            Ok(_) => {}
            Err(error) => return Err(error.into()),
        }
        let accepted: io::Result<Box<dyn Stream>> = match self {
            Self::Unix(socket) => socket.listener().accept().and_then(|(stream, _)| {
                // `SO_RCVTIMEO` needs a blocking socket. Whether `accept` inherits `O_NONBLOCK`
                // depends on the system.
                stream.set_nonblocking(false)?;
                Ok(Box::new(stream) as _)
            }),
            Self::Tcp(listener) => listener.accept().and_then(|(stream, _)| {
                stream.set_nonblocking(false)?;
                stream.set_nodelay(true)?;
                Ok(Box::new(stream) as _)
            }),
        };
        match accepted {
            Ok(stream) => Ok(Some(stream)),
            // It went before it was taken.
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(None),
            Err(error) if error.kind() == io::ErrorKind::ConnectionAborted => Ok(None),
            Err(error) => Err(error),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn endpoints_are_read_and_written() {
        for text in [
            "unix:/run/m",
            "tcp:10.0.0.1:7000",
            "tcp:[::1]:7000",
            "tcp:host:1",
        ] {
            assert_eq!(text.parse::<Endpoint>().unwrap().to_string(), text);
        }
        assert_eq!("tcp://h:1".parse(), Ok(Endpoint::Tcp("h:1".to_owned())));
        for text in [
            "",
            "unix:",
            "tcp:",
            "tcp:host",
            "tcp:host:port",
            "tcp::7",
            "udp:h:1",
            "/run/m",
        ] {
            assert!(text.parse::<Endpoint>().is_err(), "{text}");
        }
    }

    #[test]
    fn files_pass_over_a_unix_socket() {
        let (near, far) = UnixStream::pair().unwrap();
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        fs::write(&path, "inside").unwrap();
        near.send_files(&[File::open(&path).unwrap()]).unwrap();
        let mut files = far.recv_files(1).unwrap();
        let mut text = String::new();
        files[0].read_to_string(&mut text).unwrap();
        assert_eq!(text, "inside");
        (&near).write_all(b"x").unwrap();
        assert!(far.recv_files(1).is_err(), "a byte and no file");
        drop(near);
        assert!(far.recv_files(1).is_err());
    }

    #[test]
    fn unix_and_tcp_connect_and_close() {
        let dir = tempfile::tempdir().unwrap();
        let unix = Endpoint::Unix(dir.path().join("m"));
        for endpoint in [unix, Endpoint::Tcp("127.0.0.1:0".to_owned())] {
            let mut listener = Listener::bind(&endpoint).unwrap();
            assert!(listener.accept(Duration::ZERO).unwrap().is_none());
            let mut near = listener.endpoint().unwrap().dial().unwrap();
            let mut far = listener.accept(Duration::from_secs(5)).unwrap().unwrap();
            near.write_all(b"ping").unwrap();
            let mut read = [0; 4];
            far.read_exact(&mut read).unwrap();
            assert_eq!(&read, b"ping");
            let closer = far.closer().unwrap();
            let reader = std::thread::spawn(move || far.read(&mut [0]).unwrap_or(0));
            closer.close();
            assert_eq!(reader.join().unwrap(), 0);
        }
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
    }
}
