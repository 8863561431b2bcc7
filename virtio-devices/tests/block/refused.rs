//! Images that are refused: of other formats, with impossible headers, and with the names of files that
//! they may not name.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use virtio_devices::block::{Block, BlockConfig, BlockHandle, ImageError, ImageFormat};
use virtio_devices::testing::{disk_config, qemu_img, workers};

fn open(config: &BlockConfig) -> Result<BlockHandle, ImageError> {
    let (_event_loop, workers) = workers();
    Block::new(config, workers).map(|(_, handle)| handle)
}

pub(crate) fn refusal(config: &BlockConfig) -> String {
    open(config)
        .err()
        .unwrap_or_else(|| panic!("{} is taken", config.path.display()))
        .to_string()
}

fn create(format: &str, options: &str, path: &Path) {
    let mut arguments = vec!["create", "-q", "-f", format];
    if !options.is_empty() {
        arguments.extend(["-o", options]);
    }
    let path = path.to_str().unwrap();
    arguments.extend([path, "2M"]);
    qemu_img(&arguments);
}

#[test]
fn rejects_other_formats_by_name() {
    let dir = tempfile::tempdir().unwrap();
    for (format, options, name) in [
        ("vmdk", "subformat=monolithicSparse", "VMDK"),
        ("vhdx", "subformat=fixed", "VHDX"),
        ("vpc", "subformat=dynamic", "VHD"),
        ("vpc", "subformat=fixed", "VHD"),
        ("vdi", "", "VDI"),
        ("qed", "", "QED"),
        ("parallels", "", "Parallels"),
    ] {
        let path = dir.path().join("disk");
        create(format, options, &path);
        let told = refusal(&disk_config(&path));
        let expected = format!("is a {name} image, a format that is not supported");
        assert!(told.contains(&expected), "{told}");
        assert!(told.contains("set `image_type` to raw"), "{told}");
        let mut bytes = fs::read(&path).unwrap();
        bytes.resize(bytes.len().next_multiple_of(512), 0);
        fs::write(&path, bytes).unwrap();
        let raw = BlockConfig {
            format: Some(ImageFormat::Raw),
            ..disk_config(&path)
        };
        assert_eq!(open(&raw).unwrap().format(), ImageFormat::Raw);
        fs::remove_file(&path).unwrap();
    }
    let luks = dir.path().join("luks");
    fs::write(&luks, [&b"LUKS\xba\xbe\0\x02"[..], &[0; 4088]].concat()).unwrap();
    assert!(refusal(&disk_config(&luks)).contains("is a LUKS image"));
}

#[test]
fn format_is_detected_only_if_absent() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk");
    create("qcow2", "", &path);
    assert_eq!(
        open(&disk_config(&path)).unwrap().format(),
        ImageFormat::Qcow2
    );
    let said = |format| BlockConfig {
        format: Some(format),
        ..disk_config(&path)
    };
    let size = fs::metadata(&path).unwrap().len();
    let file = fs::File::options().write(true).open(&path).unwrap();
    file.set_len(size.next_multiple_of(512)).unwrap();
    assert_eq!(
        open(&said(ImageFormat::Raw)).unwrap().format(),
        ImageFormat::Raw
    );
    fs::write(&path, [0; 4096]).unwrap();
    let told = refusal(&said(ImageFormat::Qcow2));
    assert!(told.contains("is configured as qcow2"), "{told}");
}

#[test]
fn rejects_impossible_headers() {
    let dir = tempfile::tempdir().unwrap();
    let good = dir.path().join("good");
    create("qcow2", "", &good);
    let image = fs::read(&good).unwrap();
    let u64_at = |at: usize| u64::from_be_bytes(image[at..at + 8].try_into().unwrap());
    let (l1_table, refcount_table) = (u64_at(40), u64_at(48));
    let far = 1_u64 << 55;
    let cases: [(usize, Vec<u8>, &str); 12] = [
        (4, 4_u32.to_be_bytes().into(), "version 4 is not 2 or 3"),
        (
            20,
            8_u32.to_be_bytes().into(),
            "its cluster size, 2^8 bytes",
        ),
        (
            20,
            63_u32.to_be_bytes().into(),
            "its cluster size, 2^63 bytes",
        ),
        (
            24,
            (1_u64 << 63).to_be_bytes().into(),
            "its virtual size of 9223372036854775808 bytes is more than",
        ),
        (24, u64::MAX.to_be_bytes().into(), "its virtual size of"),
        (32, 1_u32.to_be_bytes().into(), "it is encrypted"),
        (36, 0_u32.to_be_bytes().into(), "its L1 table has 0 entries"),
        (36, u32::MAX.to_be_bytes().into(), "its L1 table has"),
        (40, far.to_be_bytes().into(), "its L1 table, 8 bytes at"),
        (40, 0_u64.to_be_bytes().into(), "its L1 table, 8 bytes at"),
        (
            40,
            refcount_table.to_be_bytes().into(),
            "overlaps its refcount table",
        ),
        (
            48,
            (l1_table + 1).to_be_bytes().into(),
            "its refcount table, 65536 bytes at",
        ),
    ];
    let bad = dir.path().join("bad");
    for (at, bytes, expected) in cases {
        let mut image = image.clone();
        image[at..at + bytes.len()].copy_from_slice(&bytes);
        fs::write(&bad, image).unwrap();
        let told = refusal(&disk_config(&bad));
        assert!(told.contains(expected), "{expected}: {told}");
        assert!(told.contains("cannot be used as qcow2"), "{told}");
    }
    open(&disk_config(&good)).unwrap();
}

/// Directories with images: those in `own` name each other and what is in `other`.
struct Images {
    dir: tempfile::TempDir,
}

impl Images {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        for name in ["own", "other"] {
            fs::create_dir(dir.path().join(name)).unwrap();
            fs::write(dir.path().join(name).join("base"), [7; 4096]).unwrap();
        }
        Self { dir }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn on(&self, name: &str, below: &str) -> BlockConfig {
        let path = self.path(name);
        let (image, below) = (path.to_str().unwrap(), self.path(below));
        let below = below.to_str().unwrap();
        qemu_img(&[
            "create", "-q", "-f", "qcow2", "-F", "raw", "-b", below, image,
        ]);
        BlockConfig {
            format: Some(ImageFormat::Qcow2),
            backing_files: true,
            ..disk_config(&path)
        }
    }
}

#[test]
fn an_image_names_files_below_allowed_directories_only() {
    let images = Images::new();
    open(&images.on("own/in", "own/base")).unwrap();
    let out = images.on("own/out", "other/base");
    let told = refusal(&out);
    assert!(
        told.contains("own/out names") && told.contains("other/base, which is not below"),
        "{told}"
    );
    let allowed = BlockConfig {
        image_dirs: vec![images.path("other")],
        ..out.clone()
    };
    open(&allowed).unwrap();
    // By where the file is, however its path is written.
    symlink(images.path("other/base"), images.path("own/link")).unwrap();
    assert!(refusal(&images.on("own/by_link", "own/link")).contains("is not below"));
    // A directory whose name only begins like the allowed one.
    fs::create_dir(images.path("own.d")).unwrap();
    fs::write(images.path("own.d/base"), [7; 4096]).unwrap();
    assert!(refusal(&images.on("own/prefix", "own.d/base")).contains("is not below"));
    // Also further down: the middle image is allowed, and what it names is not.
    drop(images.on("other/middle", "other/base"));
    let (top, middle) = (images.path("other/top"), images.path("other/middle"));
    let (top, middle) = (top.to_str().unwrap(), middle.to_str().unwrap());
    qemu_img(&[
        "create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", middle, top,
    ]);
    let top = BlockConfig {
        path: top.into(),
        ..out
    };
    open(&top).unwrap();
    qemu_img(&[
        "rebase",
        "-q",
        "-u",
        "-f",
        "qcow2",
        "-F",
        "raw",
        "-b",
        images.path("own/base").to_str().unwrap(),
        middle,
    ]);
    let told = refusal(&top);
    assert!(told.contains("other/middle names"), "{told}");
}

#[test]
fn backing_file_format_is_required() {
    let images = Images::new();
    let config = images.on("own/top", "own/base");
    open(&config).unwrap();
    let mut image = fs::read(&config.path).unwrap();
    // The extension becomes one that readers skip.
    let name = 0xe279_2aca_u32.to_be_bytes();
    let at = image.windows(4).position(|four| four == name).unwrap();
    image[at..at + 4].copy_from_slice(&[1, 2, 3, 4]);
    fs::write(&config.path, image).unwrap();
    let told = refusal(&config);
    assert!(
        told.contains("it does not name the format of its backing file"),
        "{told}"
    );
}

#[test]
fn data_file_is_opened_read_only() {
    let images = Images::new();
    let (path, data) = (images.path("own/disk"), images.path("own/data"));
    create(
        "qcow2",
        &format!("data_file={}", data.to_str().unwrap()),
        &path,
    );
    let secret = fs::metadata(&data).unwrap().len();
    let image = BlockConfig {
        readonly: true,
        format: Some(ImageFormat::Qcow2),
        ..disk_config(&path)
    };
    // A backing file is something else.
    for backing_files in [false, true] {
        let told = refusal(&BlockConfig {
            backing_files,
            ..image.clone()
        });
        assert!(told.contains("set `data_files` to allow it"), "{told}");
    }
    let allowed = BlockConfig {
        data_files: true,
        ..image
    };
    open(&allowed).unwrap();
    let told = refusal(&BlockConfig {
        readonly: false,
        ..allowed.clone()
    });
    assert!(told.contains("set `readonly` for the disk"), "{told}");
    assert_eq!(fs::metadata(&data).unwrap().len(), secret);
    fs::rename(&data, images.path("other/data")).unwrap();
    symlink(images.path("other/data"), &data).unwrap();
    assert!(refusal(&allowed).contains("is not below"));
}
