//! The service's listeners: a unix socket, or TCP on the loopback interface.

use std::io;
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::path::PathBuf;

use rustix::net::{AddressFamily, SocketType, sockopt};
use sockets::{BindError, BoundSocket};

use crate::access::TcpAccess;

/// A place that cannot be listened on.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ListenError {
    /// The unix socket cannot be bound: another program listens there, or the host refuses.
    #[error(transparent)]
    Socket(#[from] BindError),
    /// The unix socket cannot be watched.
    #[error("cannot watch the socket {path}")]
    Watch {
        /// The socket.
        path: PathBuf,
        /// The host's answer.
        source: io::Error,
    },
    /// The inherited descriptor is something else than a unix socket that listens.
    #[error("the inherited descriptor is {0}; a bound, listening unix stream socket is needed")]
    NotListening(&'static str),
    /// The inherited socket cannot be examined or watched.
    #[error("cannot use the inherited socket")]
    Inherited(#[source] io::Error),
    /// The token and all that is sent would cross the network in plain text.
    #[error(
        "cannot serve on {0}: the API is not encrypted, so TCP is limited to loopback addresses \
         (127.0.0.1, [::1]), with a token (`--api-token-file`); to reach it from elsewhere, forward the \
         port or the unix socket with ssh, or put a proxy with TLS before it"
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
    Tcp(TcpSocket),
}

impl Listener {
    /// Listens on a unix socket at `path`; a file that a dead service left there is taken over.
    ///
    /// # Errors
    /// Fails if another program listens there, there is something other than a socket, or the host refuses.
    pub fn unix(path: impl Into<PathBuf>) -> Result<Self, ListenError> {
        UnixSocket::bind(path.into()).map(Self::Unix)
    }

    /// Listens on a unix socket that the program inherited: bound and listening. Its file stays when the
    /// listener is dropped, because the program that bound it owns the file.
    ///
    /// # Errors
    /// The descriptor is something else, or the host refuses.
    pub fn inherited(socket: OwnedFd) -> Result<Self, ListenError> {
        UnixSocket::inherited(socket).map(Self::Unix)
    }

    /// Listens on a TCP address, which must be a loopback one, for the clients that `access` lets in.
    /// Port 0 lets the host choose: see [`place`](Self::place).
    ///
    /// # Errors
    /// Fails if the address is not a loopback one, or the host refuses.
    pub async fn tcp(address: SocketAddr, access: TcpAccess) -> Result<Self, ListenError> {
        if !address.ip().is_loopback() {
            return Err(ListenError::NotLoopback(address));
        }
        tokio::net::TcpListener::bind(address)
            .await
            .map(|listener| Self::Tcp(TcpSocket { listener, access }))
            .map_err(|source| ListenError::BindTcp { address, source })
    }

    /// Returns the address for a message: a path, or `http://ADDRESS:PORT`.
    #[must_use]
    pub fn place(&self) -> String {
        match self {
            Self::Unix(socket) => socket.place(),
            Self::Tcp(socket) => socket.listener.local_addr().map_or_else(
                |_| "a TCP socket".to_owned(),
                |address| format!("http://{address}"),
            ),
        }
    }
}

/// A bound TCP socket, and who may use it.
#[derive(Debug)]
pub struct TcpSocket {
    pub(crate) listener: tokio::net::TcpListener,
    pub(crate) access: TcpAccess,
}

/// A bound unix socket, watched by the runtime.
#[derive(Debug)]
pub struct UnixSocket {
    listener: tokio::net::UnixListener,
    /// The socket's files, unless the socket was inherited.
    bound: Option<BoundSocket>,
}

impl UnixSocket {
    fn bind(path: PathBuf) -> Result<Self, ListenError> {
        let bound = BoundSocket::bind(path)?;
        let watch = |source: io::Error| ListenError::Watch {
            path: bound.path().to_owned(),
            source,
        };
        let listener = bound.listener().try_clone().map_err(watch)?;
        let listener = tokio::net::UnixListener::from_std(listener).map_err(watch)?;
        Ok(Self {
            listener,
            bound: Some(bound),
        })
    }

    fn inherited(socket: OwnedFd) -> Result<Self, ListenError> {
        let not_socket = |errno| match errno {
            rustix::io::Errno::NOTSOCK => ListenError::NotListening("not a socket"),
            other => ListenError::Inherited(other.into()),
        };
        let domain = sockopt::socket_domain(&socket).map_err(not_socket)?;
        if domain != AddressFamily::UNIX {
            return Err(ListenError::NotListening("a socket of another family"));
        }
        let failed = |errno: rustix::io::Errno| ListenError::Inherited(errno.into());
        if sockopt::socket_type(&socket).map_err(failed)? != SocketType::STREAM {
            return Err(ListenError::NotListening("not a stream socket"));
        }
        if !sockopt::socket_acceptconn(&socket).map_err(failed)? {
            return Err(ListenError::NotListening("a socket that does not listen"));
        }
        let listener = std::os::unix::net::UnixListener::from(socket);
        listener
            .set_nonblocking(true)
            .and_then(|()| tokio::net::UnixListener::from_std(listener))
            .map(|listener| Self {
                listener,
                bound: None,
            })
            .map_err(ListenError::Inherited)
    }

    fn place(&self) -> String {
        let address = self.listener.local_addr().ok();
        let path = match &self.bound {
            Some(bound) => Some(bound.path()),
            None => address.as_ref().and_then(|address| address.as_pathname()),
        };
        path.map_or("an inherited socket".to_owned(), |path| {
            path.display().to_string()
        })
    }

    pub(crate) async fn accept(&self) -> io::Result<tokio::net::UnixStream> {
        self.listener.accept().await.map(|(stream, _)| stream)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn socket_has_one_listener() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("api.sock");
        let listener = Listener::unix(&path).unwrap();
        assert_eq!(listener.place(), path.display().to_string());
        let refused = Listener::unix(&path).unwrap_err().to_string();
        assert!(refused.contains("listens there already"), "{refused}");
        drop(listener);
        assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 0);
    }

    #[tokio::test]
    async fn inherited_socket_must_listen_and_keeps_its_file() {
        use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream};
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("api.sock");
        let listening = UnixListener::bind(&path).unwrap();
        let listener = Listener::inherited(listening.into()).unwrap();
        assert_eq!(listener.place(), path.display().to_string());
        let client = UnixStream::connect(&path).unwrap();
        let Listener::Unix(socket) = &listener else {
            panic!("not a unix socket")
        };
        socket.accept().await.unwrap();
        drop((client, listener));
        assert!(path.exists(), "the file is its binder's");

        let tcp = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let connected = UnixStream::pair().unwrap().0;
        let datagrams = UnixDatagram::unbound().unwrap();
        for (fd, what) in [
            (
                OwnedFd::from(std::fs::File::open("/").unwrap()),
                "not a socket",
            ),
            (tcp.into(), "another family"),
            (connected.into(), "does not listen"),
            (datagrams.into(), "not a stream"),
        ] {
            let refused = Listener::inherited(fd).unwrap_err().to_string();
            assert!(refused.contains(what), "{refused}");
        }
    }

    #[tokio::test]
    async fn tcp_requires_loopback() {
        for address in ["0.0.0.0:0", "192.0.2.1:0", "[::]:0"] {
            let refused = Listener::tcp(address.parse().unwrap(), TcpAccess::AnyLocalUser)
                .await
                .unwrap_err();
            assert!(matches!(refused, ListenError::NotLoopback(_)), "{refused}");
        }
        let listener = Listener::tcp("127.0.0.1:0".parse().unwrap(), TcpAccess::AnyLocalUser)
            .await
            .unwrap();
        assert!(listener.place().starts_with("http://127.0.0.1:"));
    }
}
