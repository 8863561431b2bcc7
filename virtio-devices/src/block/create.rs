//! New image files: of zeros, or with the content of another image.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;

use devices::host_file::OpenError;
use imago::file::File as Storage;
use imago::qcow2::Qcow2;
use imago::{FormatCreateBuilder as _, StorageOpenOptions};

use super::format::ImageFormat;
use super::image::{ImageError, contained};

/// Writes a small file beside an image, durably: a host that crashes must not lose it and keep the image. What
/// fails half-way is removed.
pub(super) fn write_note(path: &Path, text: &str) -> io::Result<()> {
    let mut options = OpenOptions::new();
    options.create_new(true).write(true).mode(0o600);
    let mut file = options.open(path)?;
    let written = file
        .write_all(text.as_bytes())
        .and_then(|()| file.sync_all())
        .and_then(|()| sync_folder_of(path));
    written.inspect_err(|_| {
        let _ = fs::remove_file(path);
    })
}

/// Makes durable which files are beside this one.
pub(super) fn sync_folder_of(path: &Path) -> io::Result<()> {
    let folder = path.parent().filter(|at| !at.as_os_str().is_empty());
    File::open(folder.unwrap_or(Path::new(".")))?.sync_all()
}

/// The image below a new one.
pub(super) struct Backing {
    /// Its name, absolute or relative to the directory of the new image.
    pub(super) name: String,
    pub(super) format: ImageFormat,
}

/// Creates an image at a path at which there is nothing, with mode 0600, and makes it and its name durable.
/// Its content is zeros, or that of `backing`, which only a qcow2 image has.
///
/// # Errors
/// There is something at the path, or the host refuses. Nothing is left.
pub(super) fn create_file(
    path: &Path,
    format: ImageFormat,
    size: u64,
    backing: Option<Backing>,
) -> Result<(), ImageError> {
    let failed = |source| OpenError::Host {
        path: path.to_owned(),
        source,
    };
    let mut options = OpenOptions::new();
    // Exclusive: neither a file nor a link is ever taken over.
    options.create_new(true).read(true).write(true).mode(0o600);
    let file = options.open(path).map_err(failed)?;
    let made = format_file(file, path, format, size, backing);
    made.map_err(|error| {
        // The file is this call's own.
        let _ = fs::remove_file(path);
        failed(error).into()
    })
}

fn format_file(
    file: File,
    path: &Path,
    format: ImageFormat,
    size: u64,
    backing: Option<Backing>,
) -> io::Result<()> {
    let ours = file.try_clone()?;
    match format {
        ImageFormat::Raw => file.set_len(size)?,
        ImageFormat::Qcow2 => {
            let options = StorageOpenOptions::new().filename(path).write(true);
            let storage = Storage::from_open_file(file, options)?;
            let mut builder = Qcow2::<Storage>::create_builder(storage).size(size);
            if let Some(backing) = backing {
                let format = match backing.format {
                    ImageFormat::Raw => "raw",
                    ImageFormat::Qcow2 => "qcow2",
                };
                builder = builder.backing(backing.name, format.to_owned());
            }
            contained(|| builder.create())?;
        }
    }
    ours.sync_all()?;
    // The name, too, must survive a crash of the host once a guest uses the image.
    let folder = path
        .parent()
        .filter(|parent| !parent.as_os_str().is_empty());
    File::open(folder.unwrap_or(Path::new(".")))?.sync_all()
}
