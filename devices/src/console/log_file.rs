//! The file that takes a console's output.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::ConsoleError;
use crate::host_file::lock::{self, Lockable};
use crate::host_file::{Access, FileKind, LockError, LockMode, OpenError, Request};

/// A file that takes output.
pub(super) struct LogFile {
    /// With the lock.
    file: Lockable,
    /// The same open file.
    output: Arc<File>,
    kind: FileKind,
    path: PathBuf,
}

impl LogFile {
    pub(super) fn open(path: &Path) -> Result<Self, ConsoleError> {
        let request = Request {
            access: Access::Append,
            ..Request::read(
                path,
                &[FileKind::Regular, FileKind::Null, FileKind::Terminal],
            )
        };
        let (file, kind) = request.open_with_kind()?;
        // The lock belongs to the open file description, which both share, and goes with `file`.
        let output = file.try_clone().map_err(|source| OpenError::Host {
            path: path.to_owned(),
            source,
        })?;
        Ok(Self {
            file: Lockable(file),
            output: Arc::new(output),
            kind,
            path: path.to_owned(),
        })
    }

    /// Any number of VMs may use a device.
    pub(super) fn lock(&self) -> Result<(), ConsoleError> {
        if self.kind != FileKind::Regular {
            return Ok(());
        }
        match lock::take(&self.file.0, &self.path, false, LockMode::ByteRange) {
            // A log is worth less than an image: it may be on a file system without locks.
            Err(LockError::Host { path, source }) => {
                tracing::warn!(path = %path.display(), %source, "a console's file cannot be locked");
                Ok(())
            }
            other => Ok(other?),
        }
    }

    pub(super) fn empty(&self) -> Result<(), ConsoleError> {
        if self.kind != FileKind::Regular {
            return Ok(());
        }
        self.output
            .set_len(0)
            .map_err(|source| ConsoleError::Empty {
                path: self.path.clone(),
                source,
            })
    }

    /// Lets another machine take the lock.
    pub(super) fn unlock(&self) {
        lock::release(&self.file.0);
    }

    /// The writer to the file, which does not wait for a terminal.
    pub(super) fn output(&self) -> Arc<File> {
        Arc::clone(&self.output)
    }
}
