//! Images that a snapshot needs as they are: nothing opens them for writing.

use super::*;

fn config(at: &Service, name: &str, disk: &serde_json::Value) -> spec::VmConfig {
    let mut config = at.pocket(name, Options::default()).unwrap().0;
    config.disks = serde_json::from_value(serde_json::json!([disk])).unwrap();
    config
}

/// Boots a VM of this name with a disk, and returns the refusal.
async fn booted(
    at: &Service,
    name: &str,
    disk: serde_json::Value,
) -> Result<(), openapi::ClientError> {
    let vm = at.create(name, config(at, name, &disk)).await.unwrap();
    let booted = at.client().vms_boot(&vm).await;
    at.client().vms_delete(&vm).await.unwrap();
    booted.map(drop)
}

async fn failed(at: &Service, begun: spec::MigrationInfo) -> String {
    let ended = over(at, &begun).await.error.unwrap();
    assert_eq!(ended.code, "image-frozen", "{ended:?}");
    ended.detail
}

/// A snapshot without disks, from before the images were frozen, names them as images to write to.
#[tokio::test]
async fn frozen_images_are_not_written() {
    let service = Service::start(Face::Many).await.unwrap();
    let client = service.client();
    let (vm, disk) = boot(&service, "raw").await;
    writes_on(port(&service, "guest")).await;
    client.vms_pause(&vm).await.unwrap();
    let [bare, first, second] = ["bare", "first", "second"].map(|name| service.path(name));
    let mut images = Vec::new();
    for what in [to(&bare), with_overlays(&first), with_overlays(&second)] {
        completed(&service, client.vms_snapshot(&vm, &what).await.unwrap()).await;
        images.push(
            client.vms_info(&vm).await.unwrap().config.disks.unwrap()[0]
                .path
                .clone(),
        );
    }
    // The second snapshot froze what the first put on top of the image.
    let below = PathBuf::from(images[1].clone().unwrap());
    client.vms_delete(&vm).await.unwrap();
    let frozen = [fs::read(&disk).unwrap(), fs::read(&below).unwrap()];

    let begun = client.vms_restore(&vm, &from(&bare, true)).await.unwrap();
    let why = failed(&service, begun).await;
    assert!(why.contains(first.to_str().unwrap()), "{why}");
    assert!(
        why.contains(second.to_str().unwrap()),
        "the second is on top of it: {why}"
    );
    let of = |path: &Path| match path == disk {
        true => serde_json::json!({ "path": path }),
        false => {
            serde_json::json!({ "path": path, "image_type": "Qcow2", "backing_files": true })
        }
    };
    for path in [&disk, &below] {
        refused(booted(&service, "one", of(path)).await, 422, "image-frozen");
        let mut readonly = of(path);
        readonly["readonly"] = true.into();
        booted(&service, "one", readonly).await.unwrap();
    }
    // A disk that is added, and the name of a new image.
    let scratch = service.path("scratch");
    fs::write(&scratch, vec![0; 2 << 20]).unwrap();
    let text = serde_json::json!({ "id": "scratch", "path": scratch });
    let plain = service
        .create("plain", config(&service, "plain", &text))
        .await
        .unwrap();
    client.vms_boot(&plain).await.unwrap();
    let add = serde_json::from_value(of(&disk)).unwrap();
    refused(client.vms_add_disk(&plain, &add).await, 422, "image-frozen");
    assert_eq!(
        [fs::read(&disk).unwrap(), fs::read(&below).unwrap()],
        frozen
    );
    let moved = service.path("moved");
    fs::rename(&below, &moved).unwrap();
    let mirror = spec::MirrorDisk::at(below.to_str().unwrap());
    refused(
        client.vms_mirror_disk(&plain, "scratch", &mirror).await,
        422,
        "image-frozen",
    );
    assert!(!below.exists());
    fs::rename(&moved, &below).unwrap();
    client.vms_delete(&plain).await.unwrap();

    // Both snapshots are as they were. The way out: their owner is done with them.
    for dir in [&first, &second] {
        writes_on_again(&service, dir).await;
    }
    records(&disk)
        .into_iter()
        .for_each(|record| fs::remove_file(record).unwrap());
    booted(&service, "one", of(&disk)).await.unwrap();
}

/// The copies in the folder of a snapshot, too.
#[tokio::test]
async fn copies_of_disks_are_not_written() {
    let service = Service::start(Face::Many).await.unwrap();
    let client = service.client();
    let (vm, _) = boot(&service, "raw").await;
    let dir = service.path("snapshot");
    let what = VmSnapshotConfig {
        disks: SnapshotDisks::Copy,
        ..to(&dir)
    };
    completed(&service, client.vms_snapshot(&vm, &what).await.unwrap()).await;
    let of = |readonly: bool| serde_json::json!({ "path": dir.join("disk-0.raw"), "readonly": readonly });
    refused(
        booted(&service, "one", of(false)).await,
        422,
        "image-frozen",
    );
    booted(&service, "one", of(true)).await.unwrap();
}
