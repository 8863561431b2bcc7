//! Locks of files: advisory, and honoured by QEMU and its tools too.
//!
//! QEMU describes a user's accesses to an image by *permissions*, each a bit. A process that uses the
//! permission `i` holds a shared lock on byte 100 + i, and one that denies it to others a shared lock
//! on byte 200 + i. A newcomer finds the byte locked if its permission is denied, or if it denies one
//! that is in use. The locks belong to the open file
//! description (fcntl(2), "open file description locks"), and end with it.

use std::fs::{self, File};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use nix::fcntl::{FcntlArg, fcntl};

/// Bytes of permissions in use, and of permissions denied to others.
const USED: i64 = 100;
const DENIED: i64 = 200;
/// Byte that marks a file which an operation is still writing, for later users. QEMU ignores it.
const MAKING: i64 = 90;
/// Permissions, as bits.
const CONSISTENT_READ: u8 = 0;
const WRITE: u8 = 1;
const RESIZE: u8 = 3;

/// The locked part of an image.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum LockMode {
    /// The bytes that QEMU's tools lock.
    #[default]
    ByteRange,
    /// The whole file, which works on file systems that lock nothing less.
    Full,
}

/// An image is in use, or cannot be locked.
#[derive(Debug, thiserror::Error)]
pub enum LockError {
    /// Another process uses the image in a way that excludes this use.
    #[error("{} is in use by {holder}", path.display())]
    Held {
        /// The image.
        path: PathBuf,
        /// The other process, as far as the host shows it.
        holder: String,
    },
    /// The file system does not lock.
    #[error("{} cannot be locked: {source}", path.display())]
    Host {
        /// The image.
        path: PathBuf,
        /// The host's answer.
        source: io::Error,
    },
}

/// A file whose locks end with it. Closing the file is not enough: a child process that is being
/// started shares the open file description until it executes its program.
#[derive(Debug)]
pub struct Lockable(pub File);

impl Drop for Lockable {
    fn drop(&mut self) {
        release(&self.0);
    }
}

/// Locks `file` for reading, and for writing unless `readonly`. Locks that the file held
/// before are changed to these. The file must be open for reading.
///
/// # Errors
/// Fails if another user's lock is in the way, or the file system does not lock.
pub fn take(file: &File, path: &Path, readonly: bool, mode: LockMode) -> Result<(), LockError> {
    let host = |source| LockError::Host {
        path: path.to_owned(),
        source,
    };
    let taken = match mode {
        LockMode::Full => whole(file, readonly).map_err(host)?,
        LockMode::ByteRange => bytes(file, readonly).map_err(host)?,
    };
    if taken {
        return Ok(());
    }
    // Some bytes may be locked by now. Left behind, they would keep others out although this VM
    // does not use the image.
    release(file);
    Err(LockError::Held {
        path: path.to_owned(),
        holder: holder(file).unwrap_or_else(|| "another process".to_owned()),
    })
}

/// Changes a writer's locks to a reader's. No other program can lock the file for writing meanwhile.
///
/// # Errors
/// The file system does not lock.
pub fn stop_writing(file: &File, path: &Path, mode: LockMode) -> Result<(), LockError> {
    let changed = match mode {
        LockMode::Full => whole(file, true).map(drop),
        // The denials stay: until this user is gone, others still may not write, as a reader's
        // locks say.
        LockMode::ByteRange => [WRITE, RESIZE].iter().try_for_each(|bit| {
            let byte = USED + i64::from(*bit);
            set(file, libc::F_UNLCK, byte, 1).map(drop)
        }),
    };
    changed.map_err(|source| LockError::Host {
        path: path.to_owned(),
        source,
    })
}

/// Marks a new file as one that an operation needs, though nobody uses it yet, until the result is dropped.
/// Users are not kept from it, but by [`LockMode::Full`].
///
/// # Errors
/// The file system does not lock.
pub fn mark_needed(file: File) -> io::Result<Lockable> {
    set(&file, libc::F_RDLCK, MAKING, 1)?;
    Ok(Lockable(file))
}

/// Returns whether a file is [marked](mark_needed).
///
/// # Errors
/// The file system does not lock.
pub fn is_marked(file: &File) -> io::Result<bool> {
    is_locked(file, MAKING)
}

/// Returns a description of the image's user. Takes no lock that could hinder another program.
///
/// # Errors
/// The file system does not lock.
pub fn user(file: &File) -> io::Result<Option<String>> {
    let mut found = region(libc::F_WRLCK, USED, DENIED + i64::from(u8::MAX) - USED);
    fcntl(file, FcntlArg::F_OFD_GETLK(&mut found))?;
    let is_used = i32::from(found.l_type) != libc::F_UNLCK;
    Ok(is_used.then(|| holder(file).unwrap_or_else(|| "another process".to_owned())))
}

/// Lets others use the image.
pub fn release(file: &File) {
    // Of the whole file. What was never locked is unlocked with success.
    let _ = set(file, libc::F_UNLCK, 0, 0);
}

fn whole(file: &File, readonly: bool) -> io::Result<bool> {
    let kind = if readonly {
        libc::F_RDLCK
    } else {
        libc::F_WRLCK
    };
    set(file, kind, 0, 0)
}

fn bytes(file: &File, readonly: bool) -> io::Result<bool> {
    let (used, denied): (&[u8], &[u8]) = match readonly {
        true => (&[CONSISTENT_READ], &[WRITE, RESIZE]),
        false => (&[CONSISTENT_READ, WRITE, RESIZE], &[WRITE, RESIZE]),
    };
    let at = |base: i64, bit: u8| base + i64::from(bit);
    let ours = used.iter().map(|bit| at(USED, *bit));
    let ours = ours.chain(denied.iter().map(|bit| at(DENIED, *bit)));
    for byte in ours {
        // A read lock: it conflicts only with a program that takes write locks on these bytes.
        if !set(file, libc::F_RDLCK, byte, 1)? {
            return Ok(false);
        }
    }
    // Lock first, then look: of two programs that come at once each sees the other, and at least one gives
    // up.
    let theirs = used.iter().map(|bit| at(DENIED, *bit));
    let theirs = theirs.chain(denied.iter().map(|bit| at(USED, *bit)));
    for byte in theirs {
        if is_locked(file, byte)? {
            return Ok(false);
        }
    }
    Ok(true)
}

fn region(kind: i32, start: i64, len: i64) -> libc::flock {
    libc::flock {
        // The constants are small; the field is narrower than they are.
        l_type: i16::try_from(kind).unwrap_or(i16::MAX),
        l_whence: 0,
        l_start: start,
        l_len: len,
        l_pid: 0,
    }
}

/// Returns false if another lock conflicts.
fn set(file: &File, kind: i32, start: i64, len: i64) -> io::Result<bool> {
    match fcntl(file, FcntlArg::F_OFD_SETLK(&region(kind, start, len))) {
        Ok(_) => Ok(true),
        // A file system on the network may wait for its server.
        Err(nix::errno::Errno::EINTR) => set(file, kind, start, len),
        Err(nix::errno::Errno::EAGAIN | nix::errno::Errno::EACCES) => Ok(false),
        Err(error) => Err(error.into()),
    }
}

/// Whether anybody else holds a lock on this byte.
fn is_locked(file: &File, byte: i64) -> io::Result<bool> {
    let mut found = region(libc::F_WRLCK, byte, 1);
    fcntl(file, FcntlArg::F_OFD_GETLK(&mut found))?;
    Ok(i32::from(found.l_type) != libc::F_UNLCK)
}

/// A process that has the file open, other than this one's descriptor. The kernel does not say
/// whose an open file description lock is.
fn holder(file: &File) -> Option<String> {
    let own = file.metadata().ok()?;
    let is_it = |path: &Path| {
        fs::metadata(path).is_ok_and(|other| (other.dev(), other.ino()) == (own.dev(), own.ino()))
    };
    let mut this_one = None;
    for process in fs::read_dir("/proc").ok()?.flatten() {
        let name = process.file_name();
        let Some(pid) = name.to_str().and_then(|name| name.parse::<u32>().ok()) else {
            continue;
        };
        let Ok(descriptors) = fs::read_dir(process.path().join("fd")) else {
            continue;
        };
        let own =
            |path: &Path| path.ends_with(format!("{}/fd/{}", std::process::id(), file.as_raw_fd()));
        let mut open = descriptors.flatten().map(|entry| entry.path());
        if open.any(|path| !own(&path) && is_it(&path)) {
            let name = fs::read_to_string(process.path().join("comm")).unwrap_or_default();
            let found = format!("process {pid} ({})", name.trim_end());
            if pid != std::process::id() {
                return Some(found);
            }
            // Another VM of this process, unless another process has it open, too.
            this_one = Some(found);
        }
    }
    this_one
}
