//! Images that the caller of a restore gives.

use std::fs;
use std::path::Path;

use spec::RestoreConfig;
use tests::Service;
use tests::snapshots::from;

use crate::{apart, completed, port, qemu_img, writes_on};

/// Restores a guest, whose disk was raw, with an image of this kind that the caller gives.
pub(crate) async fn restored_with(at: &Service, disk: &Path, dir: &Path, kind: &str) {
    let given = fs::canonicalize(at.path("")).unwrap().join(kind);
    let (from_disk, to) = (disk.to_str().unwrap(), given.to_str().unwrap());
    let (mut image_type, mut backing_files) = (None, None);
    match kind {
        "raw" => drop(fs::copy(disk, &given).unwrap()),
        "qcow2" => drop(qemu_img(&["convert", "-O", "qcow2", from_disk, to])),
        _ => {
            let base = [
                "create", "-q", "-f", "qcow2", "-F", "raw", "-b", from_disk, to,
            ];
            qemu_img(&base);
            (image_type, backing_files) = (Some(spec::ImageType::Qcow2), Some(true));
        }
    }
    let mut overrides = apart(at, kind);
    overrides.disks = vec![spec::DiskOverride {
        id: "disk".to_owned(),
        path: to.to_owned(),
        image_type,
        backing_files,
    }];
    let what = RestoreConfig {
        count: Some(1),
        overrides: Some(overrides),
        ..from(dir, true)
    };
    let client = at.client();
    let begun = client.vms_restore(&kind.parse().unwrap(), &what).await;
    completed(at, begun.unwrap()).await;
    let name = format!("{kind}-1");
    writes_on(port(at, &name)).await;
    client.vms_delete(&name.parse().unwrap()).await.unwrap();
    // The guest wrote to the disk, and not over the header of its image.
    let format = if kind == "raw" { "raw" } else { "qcow2" };
    let info = qemu_img(&["info", to]);
    assert!(info.contains(&format!("file format: {format}")), "{info}");
}
