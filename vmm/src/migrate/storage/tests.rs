use ::devices::host_file::lock::{self, Lockable};
use migration::{BlockInfo, MAX_COPIED};
use serde_json::json;
use spec::{DiskStorage, StartMigration, StorageMode};

use super::super::trust::Allowed;
use super::*;

fn config(disks: &str) -> VmConfig {
    let body = format!(r#"{{"payload":{{}},"disks":[{disks}]}}"#);
    spec::parse(body.as_bytes()).unwrap()
}

fn offer(disks: &[(&str, u64)]) -> Offer {
    let info = |&(name, size): &(&str, u64)| BlockInfo {
        name: name.to_owned(),
        size,
    };
    Offer {
        vm: "web".to_owned(),
        machine: Default::default(),
        blocks: Vec::new(),
        connections: 1,
        postcopy: false,
        given: false,
        verify: false,
        disks: disks.iter().map(info).collect(),
    }
}

fn images(disks: &[(&str, u64)]) -> BTreeMap<String, CopiedImage> {
    let image = |&(name, allocated): &(&str, u64)| {
        let format = CopiedFormat::Qcow2;
        let image = CopiedImage {
            format,
            allocated,
            name: None,
            base: None,
        };
        (name.to_owned(), image)
    };
    disks.iter().map(image).collect()
}

fn planned(
    storage: Option<&Path>,
    disks: &[(&str, u64)],
    described: &[(&str, u64)],
) -> Result<(VmConfig, Vec<PlannedImage>), String> {
    let disk = |(id, _): &(&str, u64)| {
        let path = "/srv/a";
        json!({"id": id, "path": path, "backing_files": true, "image_type": "Raw"}).to_string()
    };
    let listed: Vec<_> = disks.iter().map(disk).collect();
    let mut config = config(&listed.join(","));
    let vm: VmId = "web".parse().unwrap();
    let planned = plan(&offer(disks), &images(described), &vm, &mut config, storage);
    let mut planned = planned.map_err(|why| why.code)?;
    let mut resolved = config.clone();
    let reader = BaseReader {
        known: &Arc::default(),
        decision: &migration::Decision::default(),
        notes: &BaseNotes::default(),
    };
    let (allowed, both) = (Allowed::all(), [&mut config, &mut resolved]);
    let found = reader.find_all(&mut planned, &[], &allowed, both);
    found.map_err(|why| why.code)?;
    Ok((config, planned))
}

#[test]
fn images_are_made_below_the_storage_directory_only() {
    let dir = tempfile::tempdir().unwrap();
    let storage = dir.path().join("images");
    std::fs::create_dir(&storage).unwrap();
    let one = [("_disk0", 4096)];
    let (config, plan) = planned(Some(&storage), &one, &one).unwrap();
    let disk = &config.disks.unwrap()[0];
    let expected = storage.canonicalize().unwrap().join("web-_disk0.qcow2");
    assert_eq!(disk.path.as_deref(), expected.to_str());
    assert_eq!(disk.image_type, Some(ImageType::Qcow2));
    assert!(!disk.backing_files);
    assert_eq!(plan[0].pointer, "/disks/0/path");
    assert!(!expected.exists(), "a plan makes nothing");
    for name in [
        "../x",
        "a/b",
        "",
        ".x/..",
        "a b",
        "ä",
        "a\0",
        &"x".repeat(65),
    ] {
        let disks = [(name, 4096)];
        assert_eq!(
            planned(Some(&storage), &disks, &disks).err().unwrap(),
            "disk-name",
            "{name:?}"
        );
    }
}

#[test]
fn storage_that_cannot_take_a_disk_refuses_it() {
    let dir = tempfile::tempdir().unwrap();
    let storage = dir.path();
    let one = [("a", 4096)];
    let code = |storage, disks: &[(&str, u64)], described: &[(&str, u64)]| {
        planned(storage, disks, described).err().unwrap()
    };
    assert_eq!(code(None, &one, &one), "no-storage");
    let none = storage.join("none");
    assert_eq!(code(Some(&none), &one, &one), "storage-unusable");
    assert_eq!(code(Some(storage), &one, &[]), "offer-unreadable");
    assert_eq!(code(Some(storage), &[], &one), "offer-unreadable");
    assert_eq!(code(Some(storage), &one, &[("b", 1)]), "offer-unreadable");
    let large = [("a", MAX_COPIED), ("b", 512)];
    assert_eq!(code(Some(storage), &large, &large), "disks-too-large");
    assert_eq!(
        code(Some(storage), &one, &[("a", u64::MAX)]),
        "storage-short"
    );
}

/// A file that is there stays, whatever it is: the image gets another name.
#[test]
fn image_gets_a_name_that_nothing_has() {
    let dir = tempfile::tempdir().unwrap();
    let storage = dir.path().canonicalize().unwrap();
    let disks = [("a", 4096), ("a-2", 4096)];
    let names = || {
        let (_, plan) = planned(Some(&storage), &disks, &disks)?;
        let names = plan
            .iter()
            .map(|image| image.path.strip_prefix(&storage).unwrap());
        Ok::<_, String>(
            names
                .map(|name| name.to_str().unwrap().to_owned())
                .collect::<Vec<_>>(),
        )
    };
    assert_eq!(names().unwrap(), ["web-a.qcow2", "web-a-2.qcow2"]);
    let absent = storage.join("absent");
    std::os::unix::fs::symlink(absent, storage.join("web-a.qcow2")).unwrap();
    assert_eq!(names().unwrap(), ["web-a-2.qcow2", "web-a-2-2.qcow2"]);
    // One that another service is about to make.
    std::fs::write(storage.join("web-a-2.qcow2.incoming"), "").unwrap();
    assert_eq!(names().unwrap(), ["web-a-3.qcow2", "web-a-2-2.qcow2"]);
    for number in 3..=names::MAX_NUMBER {
        std::fs::write(storage.join(format!("web-a-{number}.qcow2")), "").unwrap();
    }
    assert_eq!(names().unwrap_err(), "image-exists");
}

#[test]
fn image_gets_the_name_of_its_offer() {
    let dir = tempfile::tempdir().unwrap();
    let storage = dir.path().canonicalize().unwrap();
    std::fs::write(storage.join("taken"), "mine").unwrap();
    let vm: VmId = "web".parse().unwrap();
    let plan = |names: [&str; 2]| {
        let mut config = config(r#"{"id":"a","path":"/a"},{"id":"b","path":"/b"}"#);
        let disks = [("a", 4096), ("b", 4096)];
        let mut images = images(&disks);
        for (image, name) in images.values_mut().zip(names) {
            image.name = Some(name.to_owned());
        }
        let planned = super::plan(&offer(&disks), &images, &vm, &mut config, Some(&storage));
        planned.map(|_| config.disks.unwrap()[0].path.clone().unwrap())
    };
    let code = |names| plan(names).unwrap_err().code;
    let named = storage.join("root.img");
    assert_eq!(plan(["root.img", "b"]).unwrap(), named.to_str().unwrap());
    assert_eq!(code(["taken", "b"]), "image-exists");
    assert_eq!(code(["same", "same"]), "image-exists");
    let long = "x".repeat(129);
    for name in [
        "", ".", "..", "../x", "a/b", ".hidden", "-x", "a b", "a\0", "ä", &long,
    ] {
        assert_eq!(code([name, "b"]), "image-name", "{name:?}");
    }
}

#[test]
fn images_go_unless_they_are_kept() {
    let dir = tempfile::tempdir().unwrap();
    let disks = [("a", 1 << 20), ("b", 512)];
    let names = || std::fs::read_dir(dir.path()).unwrap().count();
    let (_, plan) = planned(Some(dir.path()), &disks, &disks).unwrap();
    drop(NewImages::create(&plan).unwrap());
    assert_eq!(names(), 0);
    // One that cannot be made takes the others with it.
    std::fs::write(&plan[1].path, "mine").unwrap();
    assert!(NewImages::create(&plan).is_err());
    assert_eq!(names(), 1);
    assert_eq!(std::fs::read(&plan[1].path).unwrap(), b"mine");
    std::fs::remove_file(&plan[1].path).unwrap();
    let mut kept = NewImages::create(&plan).unwrap();
    kept.unmark().unwrap();
    kept.keep();
    drop(kept);
    assert_eq!(names(), 2);
}

#[test]
fn requests_choose_disks_by_name() {
    let config = config(r#"{"id":"a","path":"/a"},{"id":"b","path":"/b"}"#);
    let disk = |id: &str, storage| DiskStorage {
        id: id.to_owned(),
        storage,
        name: None,
    };
    let what = |storage, disks: Vec<DiskStorage>| StartMigration {
        storage,
        disks: Some(disks),
        ..StartMigration::to("unix:/x")
    };
    let copied = |what: &StartMigration| {
        let selection =
            Selection::new(what, &config).map_err(|error| error.fields[0].pointer.clone())?;
        Ok::<_, String>(["a", "b"].map(|id| selection.copies(id)))
    };
    let (shared, copy) = (StorageMode::Shared, StorageMode::Copy);
    assert_eq!(copied(&what(shared, vec![])), Ok([false, false]));
    assert_eq!(
        copied(&what(copy, vec![disk("b", shared)])),
        Ok([true, false])
    );
    assert_eq!(
        copied(&what(shared, vec![disk("b", copy)])),
        Ok([false, true])
    );
    let refused = |what: &StartMigration, field: &str| {
        assert_eq!(copied(what), Err(field.to_owned()));
    };
    refused(&what(copy, vec![disk("c", copy)]), "/disks");
    refused(
        &what(copy, vec![disk("a", copy), disk("a", shared)]),
        "/disks",
    );
    let local = |storage| StartMigration {
        local: true,
        ..what(storage, vec![])
    };
    refused(&local(copy), "/storage");
    assert!(copied(&local(shared)).is_ok());
}

/// The machine may not get a lock of another disk. Then it is in doubt where the guest runs, and nobody else may
/// use the images that were made for it.
#[test]
fn images_that_were_not_taken_over_are_locked() {
    let dir = tempfile::tempdir().unwrap();
    let one = [("a", 4096)];
    let (_, plan) = planned(Some(dir.path()), &one, &one).unwrap();
    let made = NewImages::create(&plan).unwrap();
    let path = plan[0].path.clone();
    let is_locked = || {
        let file = std::fs::File::options().read(true).write(true).open(&path);
        let file = Lockable(file.unwrap());
        lock::take(&file.0, &path, false, lock_mode(plan[0].lock)).is_err()
    };
    assert!(is_locked());
    made.release();
    assert!(!is_locked());
    made.take_back();
    assert!(is_locked());
    made.release();
    assert!(!is_locked());
}
