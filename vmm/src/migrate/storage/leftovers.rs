//! Images that a killed service was filling: of guests that did not come, and of mirrors on which no disk
//! continued.
//!
//! ```text
//!   before the image is made      `IMAGE.incoming` exists, locked, with the host's boot identity
//!   before the guest can run      it is removed: from here on the image may be the guest's only one
//!   the guest does not come       the image is removed, and then this
//! ```
//!
//! The image of a mirror has the name `PATH.partial` until its disk continues on it. Its marker goes behind
//! that change of its name, and then names nothing.
//!
//! So an unlocked marker of this boot of the host says that the guest never ran on its image. Nothing is
//! synced for that: what a killed process did is seen by the next one. After a restart of the host the
//! removal of a marker may be lost, and the image stays.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read as _, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

use devices::host_file::lock::{self, Lockable};
use devices::host_file::{FileKind, LockMode, Request};
use virtio_devices::block::remove_mark;

/// Added to the name of an image.
const SUFFIX: &str = ".incoming";
const TITLE: &str = "whimbrel: the guest of this image has not come; boot ";
/// Longer files are no markers.
const MAX_LEN: u64 = 256;

/// The path of an image's marker.
pub(super) fn marker_path(image: &Path) -> PathBuf {
    let mut path = image.as_os_str().to_owned();
    path.push(SUFFIX);
    path.into()
}

/// Marks an image as one on which no guest has run.
pub(super) struct Marker {
    path: PathBuf,
    _locked: Lockable,
}

impl Marker {
    /// Marks an image that is about to be made.
    pub(super) fn create(image: &Path) -> io::Result<Self> {
        let path = marker_path(image);
        let mut options = OpenOptions::new();
        options.create_new(true).read(true).write(true).mode(0o600);
        let file = Lockable(options.open(&path)?);
        let written = lock::take(&file.0, &path, false, LockMode::Full)
            .map_err(io::Error::other)
            .and_then(|()| writeln!(&mut &file.0, "{TITLE}{}", migration::boot_id()));
        written.inspect_err(|_| {
            let _ = fs::remove_file(&path);
        })?;
        Ok(Self {
            path,
            _locked: file,
        })
    }

    /// Removes it: the guest may run on the image from now on, or the image is gone.
    pub(super) fn remove(&self) -> io::Result<()> {
        match fs::remove_file(&self.path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        }
    }
}

/// Removes the images in a directory on which no guest has run, and that no service is filling.
pub(crate) fn remove_leftovers(storage: &Path) {
    let removed = fs::read_dir(storage).and_then(|files| {
        for file in files {
            let path = file?.path();
            let image = path.to_str().and_then(|path| path.strip_suffix(SUFFIX));
            if let Some(image) = image {
                remove_leftover(Path::new(image), &path)?;
            }
        }
        Ok(())
    });
    if let Err(error) = removed {
        tracing::warn!(
            directory = %storage.display(), %error,
            "cannot look for images of guests that did not come"
        );
    }
}

/// Removes one image, if a killed process left it as one on which no guest has run.
///
/// # Errors
/// The host cannot remove it. An image without a marker that says so stays, without an error.
pub(super) fn remove_leftover_of(image: &Path) -> io::Result<()> {
    remove_leftover(image, &marker_path(image))
}

fn remove_leftover(image: &Path, marker: &Path) -> io::Result<()> {
    let request = Request {
        access: devices::host_file::Access::Write,
        ..Request::read(marker, &[FileKind::Regular])
    };
    let is_link = marker
        .symlink_metadata()
        .is_ok_and(|file| file.is_symlink());
    // Not a marker, or one of a migration in progress, here or in another service.
    let Some(file) = request.open().ok().filter(|_| !is_link).map(Lockable) else {
        return Ok(());
    };
    if lock::take(&file.0, marker, false, LockMode::Full).is_err() {
        return Ok(());
    }
    let Some(boot) = boot_of(&file.0)? else {
        return Ok(());
    };
    let now = migration::boot_id();
    if boot != now || now.is_empty() {
        tracing::warn!(
            image = %image.display(),
            "an image may be of a guest that did not come before the host was started: delete it \
             and its .incoming file if nothing needs it"
        );
        return Ok(());
    }
    match image.symlink_metadata() {
        Ok(found) if found.is_file() => {
            fs::remove_file(image)?;
            remove_mark(image)?;
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Ok(_) => return Ok(()),
        Err(error) => return Err(error),
    }
    fs::remove_file(marker)?;
    tracing::info!(image = %image.display(), "removed the image of a guest that did not come");
    Ok(())
}

/// The boot of the host in which a marker was made; `None` of a file that is no marker.
fn boot_of(file: &File) -> io::Result<Option<String>> {
    let mut text = Vec::new();
    file.take(MAX_LEN).read_to_end(&mut text)?;
    let text = String::from_utf8(text).unwrap_or_default();
    let line = text.strip_suffix('\n');
    let boot = line.and_then(|line| line.strip_prefix(TITLE));
    Ok(boot.map(str::to_owned))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn images_on_which_no_guest_ran_are_removed() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        let mark = |name: &str| {
            fs::write(at(name), "image").unwrap();
            Marker::create(&at(name)).unwrap()
        };
        let [killed, ran, busy] = ["killed", "ran", "busy"].map(mark);
        ran.remove().unwrap();
        drop((killed, ran));
        assert!(Marker::create(&at("killed")).is_err(), "it is marked");
        // Files that are no markers, though they have the name of one.
        for (name, text) in [("a", "image"), ("b", ""), ("c", "whimbrel: mine\n")] {
            fs::write(at(name), "mine").unwrap();
            fs::write(at(&format!("{name}.incoming")), text).unwrap();
        }
        let earlier = format!("{TITLE}another\n");
        fs::write(at("earlier"), "image").unwrap();
        fs::write(at("earlier.incoming"), earlier).unwrap();
        // A marker that leads elsewhere, and one of an image that does.
        drop(mark("d"));
        fs::remove_file(at("d")).unwrap();
        std::os::unix::fs::symlink(at("a"), at("d")).unwrap();
        drop(mark("e"));
        fs::rename(at("e.incoming"), at("marker")).unwrap();
        std::os::unix::fs::symlink(at("marker"), at("e.incoming")).unwrap();
        remove_leftovers(dir.path());
        let there = |name: &str| at(name).exists();
        assert!(!there("killed") && !there("killed.incoming"));
        for name in ["ran", "busy", "a", "b", "c", "d", "e", "earlier"] {
            assert!(there(name), "{name}");
        }
        drop(busy);
        remove_leftovers(dir.path());
        assert!(!there("busy") && there("earlier"));
        // A marker without its image.
        drop(Marker::create(&at("none")).unwrap());
        remove_leftovers(dir.path());
        assert!(!there("none.incoming"));
        remove_leftovers(&at("nowhere"));
    }
}
