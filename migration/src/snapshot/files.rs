//! The files of a snapshot's folder, as they are opened to be read.

use std::fs::File;
use std::io::{self, Read as _};
use std::path::{Path, PathBuf};

use rustix::fs::{Mode, OFlags, openat};

use super::manifest::{DiskInfo, FileInfo, disk_file};
use super::read::{RestoreError, damaged};

/// Checks that a file is as large as the manifest says.
pub(super) fn check_size(name: &str, size: u64, expected: u64) -> Result<(), RestoreError> {
    if size == expected {
        return Ok(());
    }
    let why = format!("{name} has {size} bytes, and the manifest says {expected}");
    Err(RestoreError::Damaged(why))
}

/// The folder of a snapshot. Files are opened relative to it, so that all are of one folder though its path
/// may change meanwhile.
pub(super) struct Folder {
    file: File,
    path: PathBuf,
}

impl Folder {
    pub(super) fn open(path: &Path) -> Result<Self, RestoreError> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let opened = rustix::fs::open(path, flags, Mode::empty());
        let opened = opened.map_err(|error| RestoreError::Host {
            path: path.to_owned(),
            source: error.into(),
        });
        Ok(Self {
            file: File::from(opened?),
            path: path.to_owned(),
        })
    }

    pub(super) fn unreadable(&self, name: &str, source: io::Error) -> RestoreError {
        RestoreError::Host {
            path: self.path.join(name),
            source,
        }
    }

    /// Opens a regular file, and returns its size too.
    pub(super) fn file(&self, name: &str) -> Result<(File, u64), RestoreError> {
        // Without waiting for the writer of a FIFO, and without following a link out of the folder.
        let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let opened = openat(&self.file, name, flags, Mode::empty());
        let file = File::from(opened.map_err(|error| self.unreadable(name, error.into()))?);
        let metadata = file
            .metadata()
            .map_err(|error| self.unreadable(name, error))?;
        if !metadata.is_file() {
            return Err(RestoreError::Damaged(format!(
                "{name} is not a regular file"
            )));
        }
        Ok((file, metadata.len()))
    }

    /// Reads a file that is as the manifest says.
    pub(super) fn content(&self, name: &str, info: &FileInfo) -> Result<Vec<u8>, RestoreError> {
        let (file, size) = self.file(name)?;
        check_size(name, size, info.size)?;
        let mut content = Vec::new();
        // The manifest's size is within the limits.
        let read = file.take(info.size).read_to_end(&mut content);
        read.map_err(|error| self.unreadable(name, error))?;
        if FileInfo::of(&content) != *info {
            return Err(damaged(name));
        }
        Ok(content)
    }

    /// Opens the images of disks, each of which is as large as its disk.
    pub(super) fn disk_images(&self, disks: &[DiskInfo]) -> Result<Vec<File>, RestoreError> {
        let image = |(index, disk): (usize, &DiskInfo)| {
            let name = disk_file(index);
            let (file, size) = self.file(&name)?;
            check_size(&name, size, disk.size)?;
            Ok(file)
        };
        disks.iter().enumerate().map(image).collect()
    }
}
