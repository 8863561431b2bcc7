//! Unix sockets on which the host reaches a device.

use std::io;
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;

/// Listens on a unix socket, without blocking. A socket that nobody listens on any more is
/// replaced.
///
/// # Errors
/// When the socket cannot be made: because somebody listens there, or something else is in the way.
pub fn bind_socket(path: &Path) -> io::Result<UnixListener> {
    let is_socket = path
        .symlink_metadata()
        .is_ok_and(|meta| meta.file_type().is_socket());
    if is_socket && UnixStream::connect(path).is_err() {
        std::fs::remove_file(path)?;
    }
    let listener = UnixListener::bind(path)?;
    listener.set_nonblocking(true)?;
    Ok(listener)
}
