//! Disks that continue on a new image, to which their content was copied while the guest wrote.
//!
//! ```text
//!   copy      rounds, by [`DiskContent`](super::DiskContent)      the disk is what it was
//!   switch    no queue of the disk runs; the last blocks are      the disk is the new image, and
//!             there: open, lock, rename                           the old one is closed
//! ```
//!
//! The new image has another name until the switch, so that an image of the final name is always whole:
//! whatever ends the process, the disk's newest content is there exactly if the name is.

use std::fs::{self, File};
use std::io;
use std::path::Path;
use std::sync::Arc;

use devices::host_file::OpenError;
use rustix::fs::{CWD, RenameFlags, renameat_with};
use rustix::io::Errno;

use super::copy::CreatedImage;
use super::image::{ImageError, contained};
use super::{BlockHandle, ImageFormat};

impl BlockHandle {
    /// Has the disk continue on a new image that has its content, under the name `path`. No queue of the
    /// disk is served. The image that the disk had is closed, and its lock ends. With `is_detected` the
    /// format of the new image is one that no operator has confirmed.
    ///
    /// # Errors
    /// The image is not as the disk needs it, another user has locked it, or there is a file of that name.
    /// The disk stays as it is, and there is nothing of the name `path` that was not there before.
    pub fn switch_to(
        &self,
        new: &CreatedImage,
        path: &Path,
        is_detected: bool,
    ) -> Result<(), ImageError> {
        let old = self.shared.image();
        if !old.readonly
            && let Err(error) = contained(|| old.flush())
        {
            // Its storage may be the reason for the switch. What the guest flushed is in the new image.
            tracing::warn!(path = %old.path().display(), %error, "cannot flush the image that a disk leaves");
        }
        let failed = |source| OpenError::Host {
            path: path.to_owned(),
            source,
        };
        // The tables of a qcow2 image are read from the file.
        new.sync().map_err(failed)?;
        let is_detected = is_detected && new.format() == ImageFormat::Raw;
        let mut image = old.open_successor(new.path(), new.format(), is_detected)?;
        new.release();
        image.lock_opened()?;
        rename(new.path(), path).map_err(failed)?;
        image.renamed(path);
        new.renamed(path);
        self.shared.set_image(Arc::new(image));
        Ok(())
    }
}

/// Gives a file a name that nothing has, and makes the name durable. Both are in one directory.
fn rename(from: &Path, to: &Path) -> io::Result<()> {
    match renameat_with(CWD, from, CWD, to, RenameFlags::NOREPLACE) {
        Ok(()) => {}
        // A file system on the network: a second name, which replaces nothing either.
        Err(Errno::INVAL | Errno::NOSYS) => {
            fs::hard_link(from, to)?;
            fs::remove_file(from)?;
        }
        Err(error) => return Err(error.into()),
    }
    let folder = to.parent().filter(|parent| !parent.as_os_str().is_empty());
    let synced = File::open(folder.unwrap_or(Path::new("."))).and_then(|folder| folder.sync_all());
    synced.inspect_err(|_| {
        // This call's own: a name that may vanish in a crash must not be the disk's.
        let _ = fs::remove_file(to);
    })
}
