//! Host files that a configuration names: opening and locking them.
//!
//! A path from a configuration may name anything: a FIFO without a reader, a directory, a terminal,
//! a disk that another VM uses. So every such path is opened here, in this order:
//!
//! 1. `stat`, and the kind of file is checked: opening some devices has effects already.
//! 2. `open` with `O_CLOEXEC | O_NOCTTY | O_NONBLOCK`: a FIFO does not wait for its other end, and a
//!    terminal does not become the controlling one, whose hang-up would end this process.
//! 3. `fstat`, and the kind is checked again: the path may name something else by now.
//!
//! Nothing is emptied here. A file is emptied by its user, as the last step of what is being built,
//! behind its [`lock`].
//!
//! ```
//! use devices::host_file::{FileKind, Request};
//! let error = Request::read("/dev".as_ref(), &[FileKind::Regular]).open().unwrap_err();
//! assert_eq!(error.to_string(), "/dev is a directory; it must be a regular file");
//! ```

pub mod lock;

use std::fs::{File, Metadata, OpenOptions};
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::{
    Access as Permission, AtFlags, CWD, OFlags, accessat, fcntl_getfl, fcntl_setfl, major, minor,
};
use rustix::termios::isatty;

pub use self::lock::{LockError, LockMode};

/// The kind of file that a path names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FileKind {
    /// A regular file.
    Regular,
    /// A block device.
    BlockDevice,
    /// `/dev/null`.
    Null,
    /// `/dev/random`, `/dev/urandom` or `/dev/hwrng`.
    Random,
    /// A terminal: a serial port of the host, a pseudo terminal.
    Terminal,
    /// Any other character device.
    CharDevice,
    /// A directory.
    Directory,
    /// A FIFO, or another end of a pipe.
    Fifo,
    /// A unix socket.
    Socket,
}

/// Majors of terminals (Linux, Documentation/admin-guide/devices.txt).
const TERMINALS: [u32; 4] = [4, 166, 188, 204];
const PSEUDO_TERMINALS: std::ops::RangeInclusive<u32> = 136..=143;

impl FileKind {
    /// The kind of file that `metadata` are of.
    #[must_use]
    pub fn of(metadata: &Metadata) -> Self {
        let kind = metadata.file_type();
        let device = metadata.rdev();
        match (major(device), minor(device)) {
            _ if kind.is_file() => Self::Regular,
            _ if kind.is_block_device() => Self::BlockDevice,
            _ if kind.is_dir() => Self::Directory,
            _ if kind.is_fifo() => Self::Fifo,
            _ if kind.is_socket() => Self::Socket,
            (1, 3) => Self::Null,
            (1, 8 | 9) | (10, 183) => Self::Random,
            // /dev/tty and /dev/console.
            (5, 0 | 1) => Self::Terminal,
            (major, _) if TERMINALS.contains(&major) => Self::Terminal,
            (major, _) if PSEUDO_TERMINALS.contains(&major) => Self::Terminal,
            _ => Self::CharDevice,
        }
    }

    /// The kind with its article, for messages.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Regular => "a regular file",
            Self::BlockDevice => "a block device",
            Self::Null => "/dev/null",
            Self::Random => "a source of random numbers",
            Self::Terminal => "a terminal",
            Self::CharDevice => "a character device",
            Self::Directory => "a directory",
            Self::Fifo => "a FIFO",
            Self::Socket => "a socket",
        }
    }

    /// The kind of a file whose path a message has named.
    fn found_name(self) -> &'static str {
        match self {
            Self::Null => "the null device",
            other => other.name(),
        }
    }
}

/// A file that cannot be opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// The host refuses.
    #[error("{} cannot be opened: {source}", path.display())]
    Host {
        /// The file.
        path: PathBuf,
        /// The host's answer.
        source: io::Error,
    },
    /// The path names another kind of file than the purpose takes.
    #[error("{} is {}; it must be {}", path.display(), found.found_name(), wanted(allowed))]
    Kind {
        /// The file.
        path: PathBuf,
        /// Its kind.
        found: FileKind,
        /// The kinds that the purpose takes.
        allowed: Vec<FileKind>,
    },
}

fn wanted(allowed: &[FileKind]) -> String {
    let names: Vec<&str> = allowed.iter().map(|kind| kind.name()).collect();
    names.join(" or ")
}

/// How a file is used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Read.
    Read,
    /// Read and write.
    Write,
    /// Read, and write at the end. A file that does not exist is made.
    Append,
}

/// A request to open a file: the path and the mode.
#[derive(Clone, Copy, Debug)]
pub struct Request<'a> {
    /// The file.
    pub path: &'a Path,
    /// How it is used.
    pub access: Access,
    /// The kinds of file that the purpose takes.
    pub allowed: &'a [FileKind],
    /// Bypass the page cache of the host (`O_DIRECT`).
    pub direct: bool,
    /// Follow no symbolic link, in no part of the path.
    pub no_links: bool,
}

impl<'a> Request<'a> {
    /// A file that is read.
    #[must_use]
    pub fn read(path: &'a Path, allowed: &'a [FileKind]) -> Self {
        Self {
            path,
            access: Access::Read,
            allowed,
            direct: false,
            no_links: false,
        }
    }

    /// Opens the file.
    ///
    /// # Errors
    /// Fails if the host refuses, or the file is of a kind that is not allowed.
    pub fn open(&self) -> Result<File, OpenError> {
        self.open_with_kind().map(|(file, _)| file)
    }

    /// Opens the file, and says what kind of file it is.
    ///
    /// # Errors
    /// As for [`Request::open`].
    pub fn open_with_kind(&self) -> Result<(File, FileKind), OpenError> {
        let failed = |source| OpenError::Host {
            path: self.path.to_owned(),
            source,
        };
        match self.path.metadata() {
            Ok(metadata) => drop(self.check(&metadata)?),
            Err(error)
                if error.kind() == io::ErrorKind::NotFound && self.access == Access::Append => {}
            Err(error) => return Err(failed(error)),
        }
        let file = self.open_without_waiting().map_err(failed)?;
        let kind = self.check(&file.metadata().map_err(failed)?)?;
        match kind {
            // io_uring would answer EAGAIN in place of waiting for a disk.
            FileKind::Regular | FileKind::BlockDevice => {
                let flags = fcntl_getfl(&file).map_err(|errno| failed(errno.into()))?;
                fcntl_setfl(&file, flags - OFlags::NONBLOCK)
                    .map_err(|errno| failed(errno.into()))?;
            }
            // The device's number alone does not make it one.
            FileKind::Terminal if !isatty(&file) => {
                return Err(self.refused(FileKind::CharDevice));
            }
            _ => {}
        }
        Ok((file, kind))
    }

    fn open_without_waiting(&self) -> io::Result<File> {
        let direct = if self.direct {
            OFlags::DIRECT
        } else {
            OFlags::empty()
        };
        let flags = direct | OFlags::CLOEXEC | OFlags::NOCTTY | OFlags::NONBLOCK;
        if self.no_links {
            use rustix::fs::{Mode, ResolveFlags, openat2};
            let access = match self.access {
                Access::Read => OFlags::RDONLY,
                Access::Write => OFlags::RDWR,
                Access::Append => OFlags::RDWR | OFlags::APPEND,
            };
            let opened = openat2(
                CWD,
                self.path,
                access | flags,
                Mode::empty(),
                ResolveFlags::NO_SYMLINKS,
            )?;
            return Ok(opened.into());
        }
        OpenOptions::new()
            .read(true)
            .write(self.access == Access::Write)
            .append(self.access == Access::Append)
            .create(self.access == Access::Append)
            .custom_flags(flags.bits().cast_signed())
            .open(self.path)
    }

    fn check(&self, metadata: &Metadata) -> Result<FileKind, OpenError> {
        let kind = FileKind::of(metadata);
        match self.allowed.contains(&kind) {
            true => Ok(kind),
            false => Err(self.refused(kind)),
        }
    }

    fn refused(&self, found: FileKind) -> OpenError {
        OpenError::Kind {
            path: self.path.to_owned(),
            found,
            allowed: self.allowed.to_vec(),
        }
    }
}

/// The file that a path names, however the path is written.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Identity {
    /// A file of this device and inode number.
    Inode(u64, u64),
    /// The block device of this number, whatever names it.
    BlockDevice(u64),
    /// No file yet.
    Absent(PathBuf),
}

impl Identity {
    /// Returns the identity of the file at `path`; `None` for devices that any number of users
    /// share, such as `/dev/null`.
    #[must_use]
    pub fn of(path: &Path) -> Option<Self> {
        let Ok(metadata) = path.metadata() else {
            return Some(Self::Absent(absent(path)));
        };
        match FileKind::of(&metadata) {
            // Two device nodes with different inodes may be one disk: the device's number decides.
            FileKind::BlockDevice => Some(Self::BlockDevice(metadata.rdev())),
            FileKind::Null | FileKind::Random | FileKind::CharDevice => None,
            _ => Some(Self::Inode(metadata.dev(), metadata.ino())),
        }
    }
}

/// The path of a file that does not exist, with its directory as the host knows it.
fn absent(path: &Path) -> PathBuf {
    match (directory(path).canonicalize(), path.file_name()) {
        (Ok(directory), Some(name)) => directory.join(name),
        _ => path.to_owned(),
    }
}

fn directory(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    }
}

/// Checks that a file can be made at `path`, which makes nothing: its directory is there, and this process may
/// write to it.
///
/// # Errors
/// It is not there, is something else, or the host refuses.
pub fn check_directory(path: &Path) -> io::Result<()> {
    let directory = directory(path);
    let failed = |error: io::Error| {
        let why = format!("the directory {}: {error}", directory.display());
        io::Error::new(error.kind(), why)
    };
    if !directory.metadata().map_err(failed)?.is_dir() {
        return Err(failed(io::ErrorKind::NotADirectory.into()));
    }
    let needed = Permission::WRITE_OK | Permission::EXEC_OK;
    accessat(CWD, directory, needed, AtFlags::EACCESS).map_err(|errno| failed(errno.into()))
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::symlink;
    use std::os::unix::net::UnixListener;

    use rustix::fs::{FileType, Mode, mknodat};

    use super::*;

    const ALL: [Access; 3] = [Access::Read, Access::Write, Access::Append];

    #[test]
    fn rejects_other_file_kinds() {
        let dir = tempfile::tempdir().unwrap();
        let (fifo, socket) = (dir.path().join("fifo"), dir.path().join("socket"));
        mknodat(CWD, &fifo, FileType::Fifo, Mode::from_raw_mode(0o600), 0).unwrap();
        let _listener = UnixListener::bind(&socket).unwrap();
        for access in ALL {
            for (path, kind) in [
                (fifo.as_path(), "a FIFO"),
                (socket.as_path(), "a socket"),
                (dir.path(), "a directory"),
                (Path::new("/dev/zero"), "a character device"),
                (Path::new("/dev/urandom"), "a source of random numbers"),
            ] {
                let allowed = [FileKind::Regular, FileKind::Null];
                let request = Request {
                    access,
                    ..Request::read(path, &allowed)
                };
                let refused = request.open().unwrap_err().to_string();
                let expected = format!(
                    "{} is {kind}; it must be a regular file or /dev/null",
                    path.display()
                );
                assert_eq!(refused, expected);
            }
        }
    }

    #[test]
    fn names_device_that_is_refused() {
        let null = Path::new("/dev/null");
        let refused = Request::read(null, &[FileKind::Regular]).open();
        assert_eq!(
            refused.unwrap_err().to_string(),
            "/dev/null is the null device; it must be a regular file"
        );
    }

    #[test]
    fn directory_must_be_there() {
        let dir = tempfile::tempdir().unwrap();
        let (file, new) = (dir.path().join("file"), dir.path().join("new"));
        fs::write(&file, "").unwrap();
        check_directory(&new).unwrap();
        check_directory(Path::new("new")).unwrap();
        for (path, why) in [
            (file.join("new"), "/file: not a directory"),
            (new.join("new"), "/new: No such file or directory"),
        ] {
            let refused = check_directory(&path).unwrap_err().to_string();
            assert!(refused.contains(why), "{refused}");
        }
        assert!(!new.exists());
    }

    #[test]
    fn only_logs_are_created() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        let open = |access| {
            let request = Request {
                access,
                ..Request::read(&path, &[FileKind::Regular])
            };
            request.open()
        };
        assert!(open(Access::Read).is_err() && open(Access::Write).is_err());
        open(Access::Append).unwrap();
        fs::write(&path, "kept").unwrap();
        for access in ALL {
            let file = open(access).unwrap();
            assert!(!fcntl_getfl(&file).unwrap().contains(OFlags::NONBLOCK));
            assert_eq!(fs::read(&path).unwrap(), b"kept");
        }
    }

    #[test]
    fn follows_links_only_if_allowed() {
        let dir = tempfile::tempdir().unwrap();
        let (file, link) = (dir.path().join("file"), dir.path().join("link"));
        fs::write(&file, "x").unwrap();
        symlink(&file, &link).unwrap();
        let mut request = Request::read(&link, &[FileKind::Regular]);
        request.open().unwrap();
        request.no_links = true;
        assert!(matches!(request.open(), Err(OpenError::Host { .. })));
    }

    #[test]
    fn same_file_by_any_name() {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name);
        fs::write(path("a"), "x").unwrap();
        fs::hard_link(path("a"), path("b")).unwrap();
        symlink(path("a"), path("c")).unwrap();
        symlink(dir.path(), path("d")).unwrap();
        let a = Identity::of(&path("a"));
        assert!(a == Identity::of(&path("b")) && a == Identity::of(&path("c")));
        assert_eq!(a, Identity::of(&path("d/a")));
        let absent = Identity::of(&path("new"));
        assert_eq!(absent, Identity::of(&path("d/new")));
        assert_ne!(absent, a);
        assert_eq!(Identity::of(Path::new("/dev/null")), None);
    }
}
