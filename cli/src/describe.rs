//! Prints the manifest of a snapshot, of this version of the format or of a later one, with the images
//! that it needs and its working set.

use std::fs::{self, File};
use std::io::Read as _;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;

use anyhow::{Context as _, Result, ensure};
use openapi::with_causes;
use serde_json::{Value, json};

/// Maximum size of a manifest in bytes, in every version.
const MAX: u64 = 64 << 10;
/// Maximum size of the description of the machine.
const MAX_MACHINE: u64 = 1 << 20;
/// Maximum size of a working set.
const MAX_WORKING_SET: u64 = 5 << 20;

/// Reads a JSON file of at most `max` bytes.
fn read(path: &Path, max: u64) -> Result<Value> {
    let shown = path.display();
    let metadata = fs::metadata(path).with_context(|| format!("cannot read {shown}"))?;
    // The folder may be of a stranger, and the open of a FIFO would wait for a writer.
    ensure!(metadata.is_file(), "{shown} is not a regular file");
    let file = File::open(path).with_context(|| format!("cannot read {shown}"))?;
    let mut text = Vec::new();
    let read = file.take(max + 1).read_to_end(&mut text);
    read.with_context(|| format!("cannot read {shown}"))?;
    ensure!(
        text.len() as u64 <= max,
        "{shown} has more than {max} bytes"
    );
    serde_json::from_slice(&text).with_context(|| format!("{shown} is not JSON"))
}

/// Describes the snapshot in a folder of this host: its manifest; as `frozen_images` the images that it
/// has frozen; as `disk_images` the disks that it has copies of; as `other_images` the images of all other
/// disks, which a restore opens as they are then; as `working_set` what was recorded.
pub(crate) fn manifest(folder: &str) -> Result<Value> {
    let folder = Path::new(folder.strip_prefix("file://").unwrap_or(folder));
    let path = folder.join("manifest.json");
    let shown = path.display();
    let mut manifest = read(&path, MAX)?;
    let is_snapshot = manifest["format"] == "whimbrel-snapshot";
    ensure!(is_snapshot, "{shown} is not the manifest of a snapshot");
    // A later version may have another description of the machine: then there is nothing to add.
    if let Ok(machine) = read(&folder.join("machine.json"), MAX_MACHINE) {
        let frozen = frozen_images(&machine);
        let copied = disk_images(folder, &manifest);
        let others = other_images(&machine, &[&frozen[..], &copied[..]].concat());
        if !frozen.is_empty() {
            manifest["frozen_images"] = frozen.into();
        }
        if !copied.is_empty() {
            manifest["disk_images"] = copied.into();
        }
        if !others.is_empty() {
            manifest["other_images"] = others.into();
        }
    }
    let record = folder.join("working-set.json");
    if record.symlink_metadata().is_ok() {
        manifest["working_set"] = working_set(&record, &manifest["id"]);
    }
    Ok(manifest)
}

/// The disks that are frozen, and their images.
fn frozen_images(machine: &Value) -> Vec<Value> {
    let disks = machine["config"]["disks"].as_array();
    let frozen = machine["frozen"].as_array().into_iter().flatten();
    let image = |id: &Value| {
        let mut disks = disks.into_iter().flatten();
        let disk = disks.find(|disk| disk["id"] == *id);
        json!({ "disk": id, "path": disk.map_or(&Value::Null, |disk| &disk["path"]) })
    };
    frozen.map(image).collect()
}

/// The disks that were copied, with the paths of their images, their sizes, and what they take of the
/// folder's storage.
fn disk_images(folder: &Path, manifest: &Value) -> Vec<Value> {
    let disks = manifest["disks"].as_array().into_iter().flatten();
    let image = |(index, disk): (usize, &Value)| {
        let path = folder.join(format!("disk-{index}.raw"));
        let found = path.symlink_metadata();
        let allocated = found.ok().map(|found| found.blocks().saturating_mul(512));
        json!({
            "disk": disk["name"], "path": path.to_string_lossy(), "size": disk["size"],
            "allocated": allocated,
        })
    };
    disks.enumerate().map(image).collect()
}

/// The disks that are not among those that are frozen or copied, and their images, which must be as the guest
/// left them.
fn other_images(machine: &Value, kept: &[Value]) -> Vec<Value> {
    let disks = machine["config"]["disks"].as_array().into_iter().flatten();
    let others = disks.filter(|disk| kept.iter().all(|image| image["disk"] != disk["id"]));
    let image = |disk: &Value| json!({ "disk": disk["id"], "path": disk["path"], "readonly": disk["readonly"] == true });
    others.map(image).collect()
}

/// How much was recorded for the snapshot `id`, or why that cannot be used. Restores check more of it.
fn working_set(path: &Path, id: &Value) -> Value {
    let unusable = |why: String| json!({ "unusable": why });
    let record = match read(path, MAX_WORKING_SET) {
        Ok(record) => record,
        Err(error) => return unusable(with_causes(error.as_ref())),
    };
    if record["format"] != "whimbrel-working-set" {
        return unusable(format!("{} is no working set", path.display()));
    }
    if record["snapshot"] != *id {
        return unusable(format!("it belongs to the snapshot {}", record["snapshot"]));
    }
    let runs = record["runs"].as_array().map_or(0, Vec::len);
    json!({ "version": record["version"], "pages": record["pages"], "runs": runs })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn describes_manifests_of_any_version() {
        let dir = tempfile::tempdir().unwrap();
        let folder = dir.path().to_str().unwrap();
        let path = dir.path().join("manifest.json");
        assert!(manifest(folder).is_err());
        for (text, good) in [
            (
                r#"{"format":"whimbrel-snapshot","version":99,"new":1}"#,
                true,
            ),
            (r#"{"format":"other","version":1}"#, false),
            ("[1]", false),
            ("{", false),
        ] {
            std::fs::write(&path, text).unwrap();
            assert_eq!(
                manifest(&format!("file://{folder}")).is_ok(),
                good,
                "{text}"
            );
        }
        std::fs::write(&path, vec![b' '; (MAX + 1) as usize]).unwrap();
        let refused = manifest(folder).unwrap_err().to_string();
        assert!(refused.contains("more than 65536 bytes"), "{refused}");
        std::fs::remove_file(&path).unwrap();
        let made = std::process::Command::new("mkfifo").arg(&path).status();
        assert!(made.unwrap().success());
        let refused = manifest(folder).unwrap_err().to_string();
        assert!(refused.contains("not a regular file"), "{refused}");
    }

    #[test]
    fn names_frozen_images_and_the_working_set() {
        let dir = tempfile::tempdir().unwrap();
        let folder = dir.path().to_str().unwrap();
        let write = |name: &str, content: Value| {
            std::fs::write(dir.path().join(name), content.to_string()).unwrap();
        };
        write(
            "manifest.json",
            json!({ "format": "whimbrel-snapshot", "id": "a" }),
        );
        let plain = manifest(folder).unwrap();
        assert_eq!(plain.as_object().unwrap().len(), 2);
        let disks = json!([{ "id": "a", "path": "/a" }, { "id": "b", "path": "/b" }]);
        write(
            "machine.json",
            json!({ "config": { "disks": disks }, "frozen": ["b"] }),
        );
        let described = manifest(folder).unwrap();
        assert_eq!(
            described["frozen_images"],
            json!([{ "disk": "b", "path": "/b" }])
        );
        // A restore needs it, too.
        let other = json!([{ "disk": "a", "path": "/a", "readonly": false }]);
        assert_eq!(described["other_images"], other);
        write("machine.json", json!({ "config": { "disks": disks } }));
        let described = manifest(folder).unwrap();
        assert_eq!(described["other_images"].as_array().unwrap().len(), 2);
        assert!(described["frozen_images"].is_null());

        write(
            "manifest.json",
            json!({ "format": "whimbrel-snapshot", "id": "a", "disks": [{ "name": "a", "size": 512 }] }),
        );
        std::fs::write(dir.path().join("disk-0.raw"), [1; 512]).unwrap();
        let described = manifest(folder).unwrap();
        let copy = &described["disk_images"][0];
        assert_eq!((&copy["disk"], &copy["size"]), (&json!("a"), &json!(512)));
        assert_eq!(copy["path"], json!(dir.path().join("disk-0.raw")));
        assert!(copy["allocated"].as_u64().unwrap() >= 512, "{copy}");
        assert_eq!(
            described["other_images"],
            json!([{ "disk": "b", "path": "/b", "readonly": false }])
        );

        let record = |snapshot: &str| {
            json!({
                "format": "whimbrel-working-set", "version": 1, "snapshot": snapshot, "pages": 3,
                "hash": 1, "runs": [[1, 2], [9, 1]],
            })
        };
        write("working-set.json", record("a"));
        let described = manifest(folder).unwrap();
        let expected = json!({ "version": 1, "pages": 3, "runs": 2 });
        assert_eq!(described["working_set"], expected);
        for bad in [record("b"), json!({}), json!([])] {
            write("working-set.json", bad);
            let described = manifest(folder).unwrap();
            assert!(described["working_set"]["unusable"].is_string());
        }
        std::fs::write(dir.path().join("machine.json"), "{").unwrap();
        assert!(manifest(folder).unwrap()["frozen_images"].is_null());
    }
}
