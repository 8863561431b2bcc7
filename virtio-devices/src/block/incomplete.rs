//! Images on which a guest runs before all of their blocks have come from the source of a migration.
//!
//! `IMAGE.incomplete` is beside such an image from before the guest can run until all blocks are in the image
//! and durable. Where both sides die meanwhile, it keeps the image from being used as if it were whole: what
//! is in the place of a missing block is not what the guest wrote.

use std::path::{Path, PathBuf};
use std::{fs, io};

use super::create::{sync_folder_of, write_note};
use super::image::ImageError;

/// Added to the name of an image.
const SUFFIX: &str = ".incomplete";
const TEXT: &str = "whimbrel: blocks of this image are still at the source of a migration\n";

fn path_of(image: &Path) -> PathBuf {
    let mut path = image.as_os_str().to_owned();
    path.push(SUFFIX);
    path.into()
}

/// Fails if an image lacks blocks.
pub(super) fn check(image: &Path) -> Result<(), ImageError> {
    // Also if a link leads to the image.
    let real = image.canonicalize().ok();
    let marks = [Some(path_of(image)), real.as_deref().map(path_of)];
    let mut marks = marks.into_iter().flatten();
    match marks.find(|mark| mark.symlink_metadata().is_ok()) {
        Some(mark) => Err(ImageError::Incomplete {
            path: image.to_owned(),
            mark,
        }),
        None => Ok(()),
    }
}

/// Says that an image lacks blocks. The file stays when this is dropped.
#[derive(Debug)]
pub struct IncompleteMark(PathBuf);

impl IncompleteMark {
    /// Marks an image, durably.
    ///
    /// # Errors
    /// The host cannot make the file.
    pub fn create(image: &Path) -> io::Result<Self> {
        let path = path_of(image);
        write_note(&path, TEXT)?;
        Ok(Self(path))
    }

    /// All blocks are in the image, and durable.
    ///
    /// # Errors
    /// The host cannot remove the file.
    pub fn remove(&self) -> io::Result<()> {
        remove(&self.0)?;
        // A mark that comes back with a crash only asks for a look at the image.
        let _ = sync_folder_of(&self.0);
        Ok(())
    }
}

/// Removes the mark of an image that is deleted, if it has one.
///
/// # Errors
/// The host cannot remove the file.
pub fn remove_mark(image: &Path) -> io::Result<()> {
    remove(&path_of(image))
}

fn remove(mark: &Path) -> io::Result<()> {
    match fs::remove_file(mark) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{MetadataExt as _, symlink};

    use super::*;
    use crate::block::Block;
    use crate::testing::{disk_config, qemu_img, workers};

    #[test]
    fn incomplete_images_are_not_opened() {
        let dir = tempfile::tempdir().unwrap();
        let [image, link, overlay] = ["image", "link", "overlay"].map(|name| dir.path().join(name));
        fs::write(&image, [1; 4096]).unwrap();
        symlink(&image, &link).unwrap();
        let base = ["-F", "raw", "-b", image.to_str().unwrap()];
        let create = ["create", "-q", "-f", "qcow2"];
        qemu_img(&[&create[..], &base, &[overlay.to_str().unwrap()]].concat());
        let (_event_loop, workers) = workers();
        let open = |path: &Path| {
            let mut config = disk_config(path);
            config.backing_files = true;
            Block::new(&config, workers.clone()).map(drop)
        };
        let mark = IncompleteMark::create(&image).unwrap();
        assert!(IncompleteMark::create(&image).is_err(), "it is marked");
        assert_eq!(mark.0.metadata().unwrap().mode() & 0o777, 0o600);
        for path in [&image, &link, &overlay] {
            let refused = open(path).unwrap_err();
            assert!(
                matches!(refused, ImageError::Incomplete { .. }),
                "{refused}"
            );
            assert!(
                refused.to_string().contains("image.incomplete"),
                "{refused}"
            );
        }
        mark.remove().unwrap();
        mark.remove().unwrap();
        for path in [&image, &link, &overlay] {
            open(path).unwrap();
        }
        let _mark = IncompleteMark::create(&image).unwrap();
        remove_mark(&image).unwrap();
        open(&image).unwrap();
    }
}
