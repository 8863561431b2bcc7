//! Unix sockets on which the host reaches a device.

use std::fs;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

use sockets::{bind_replacing, check_free};

use crate::host_file::check_directory;

/// A socket that is listened on, without blocking. Its path goes with it, unless another socket
/// has taken the path over.
#[derive(Debug)]
pub struct Listening {
    listener: UnixListener,
    path: PathBuf,
    /// The temporary path, until the socket takes over its own.
    beside: Option<PathBuf>,
    inode: (u64, u64),
}

impl Listening {
    /// Listens at `path`. Replaces a socket that has no listener any more.
    ///
    /// # Errors
    /// The socket cannot be created: another process listens there, or the path is not a socket.
    pub fn bind(path: &Path) -> io::Result<Self> {
        Self::at(path, None)
    }

    /// Checks that [`Listening::bind`] could listen at `path`. Nothing is made.
    ///
    /// # Errors
    /// As for [`Listening::bind`].
    pub fn check(path: &Path) -> io::Result<()> {
        check_free(path)?;
        check_directory(path)
    }

    /// Listens at a temporary path beside `path` until [`Listening::take_over`]. `path` may be in use.
    ///
    /// # Errors
    /// As for [`Listening::bind`].
    pub fn bind_beside(path: &Path) -> io::Result<Self> {
        let mut beside = path.as_os_str().to_owned();
        beside.push(".incoming");
        Self::at(path, Some(beside.into()))
    }

    fn at(path: &Path, beside: Option<PathBuf>) -> io::Result<Self> {
        let at = beside.as_deref().unwrap_or(path);
        let listener = bind_replacing(at)?;
        // The inode says later whether the path is still this socket's: see `drop`.
        let made = at.symlink_metadata()?;
        Ok(Self {
            listener,
            path: path.to_owned(),
            beside,
            inode: (made.dev(), made.ino()),
        })
    }

    /// Takes the path over from its present owner. Later connections reach this socket.
    ///
    /// # Errors
    /// The rename fails.
    pub fn take_over(&mut self) -> io::Result<()> {
        if let Some(beside) = &self.beside {
            // A rename is atomic: each client reaches either the old owner or this socket, and none
            // finds the path missing.
            fs::rename(beside, &self.path)?;
            self.beside = None;
        }
        Ok(())
    }

    /// Returns the listening socket.
    #[must_use]
    pub fn listener(&self) -> &UnixListener {
        &self.listener
    }

    /// The path that it has, or will have.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl AsRawFd for Listening {
    fn as_raw_fd(&self) -> RawFd {
        self.listener.as_raw_fd()
    }
}

impl Drop for Listening {
    fn drop(&mut self) {
        let at = self.beside.as_deref().unwrap_or(&self.path);
        let there = at.symlink_metadata();
        // During a hand-over the new owner has renamed its socket over this path already. Removing
        // the path then would leave the VM's console without one.
        if there.is_ok_and(|there| (there.dev(), there.ino()) == self.inode) {
            let _ = fs::remove_file(at);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;
    use std::os::unix::net::UnixStream;

    use super::*;

    #[test]
    fn keeps_listener_that_never_accepts() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("socket");
        let listening = Listening::bind(&path).unwrap();
        rustix::net::listen(listening.listener(), 0).unwrap();
        // One fits into a backlog of 0.
        let _waiting = UnixStream::connect(&path).unwrap();
        let refused = Listening::bind(&path).unwrap_err();
        assert_eq!(refused.kind(), io::ErrorKind::AddrInUse);
        drop(listening);
        assert!(!path.exists());
        drop(UnixListener::bind(&path).unwrap());
        Listening::bind(&path).unwrap();
    }

    /// The usual umask (022) would leave them open to read and execute, and some others to write.
    #[test]
    fn socket_has_owner_mode() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("socket");
        let mode = |path: &Path| path.metadata().unwrap().permissions().mode() & 0o777;
        let _first = Listening::bind(&path).unwrap();
        assert_eq!(mode(&path), 0o600);
        let mut second = Listening::bind_beside(&path).unwrap();
        second.take_over().unwrap();
        assert_eq!(mode(&path), 0o600);
        UnixStream::connect(&path).unwrap();
    }

    #[test]
    fn path_moves_to_new_owner() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("socket");
        let first = Listening::bind(&path).unwrap();
        assert!(Listening::bind(&path).is_err(), "somebody listens there");
        let mut second = Listening::bind_beside(&path).unwrap();
        UnixStream::connect(&path).unwrap();
        first.listener().accept().unwrap();
        second.take_over().unwrap();
        UnixStream::connect(&path).unwrap();
        second.listener().accept().unwrap();
        drop(first);
        assert!(path.exists(), "it is the second's");
        let third = Listening::bind_beside(&path).unwrap();
        drop(third);
        drop(second);
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
    }

    #[test]
    fn check_makes_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("socket");
        Listening::check(&path).unwrap();
        let refused = Listening::check(&dir.path().join("none/socket")).unwrap_err();
        assert!(refused.to_string().contains("directory"), "{refused}");
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
        let _first = Listening::bind(&path).unwrap();
        assert!(Listening::check(&path).is_err());
    }
}
