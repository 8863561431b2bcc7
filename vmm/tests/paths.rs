//! The paths that a configuration names: each is refused by name where it cannot be used, nothing is
//! waited for, and nothing is emptied that is in use. On `/dev/kvm`, with the pocket guest.

#![expect(clippy::unwrap_used, reason = "a test that goes wrong panics")]

use std::fs;
use std::process::Command;
use std::time::Duration;

use control::{NewDevice, Registry, Request, RequestError, VmHandle};
use serde_json::{Value, json};
use spec::{ImageType, VmConfig, VmState};
use vmm::{Pool, PoolConfig};

/// Far more than a boot takes: what waits for the other end of a FIFO waits for ever.
const PATIENCE: Duration = Duration::from_secs(60);

struct Lab {
    dir: tempfile::TempDir,
    registry: Registry,
}

impl Lab {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("pocket"), guest::IMAGE).unwrap();
        fs::write(dir.path().join("disk"), vec![0; 1 << 20]).unwrap();
        // One thread: a VM that blocks it is in the way of all others.
        let config = PoolConfig {
            threads: Some(1),
            ..PoolConfig::default()
        };
        Self {
            dir,
            registry: Registry::new(Pool::start(&config).unwrap()),
        }
    }

    fn path(&self, name: &str) -> String {
        self.dir.path().join(name).to_string_lossy().into_owned()
    }

    fn bytes(&self, name: &str) -> Vec<u8> {
        fs::read(self.path(name)).unwrap()
    }

    /// A VM of the pocket guest with these fields, in which `@` is the directory.
    fn create(&self, fields: &Value) -> VmHandle {
        let mut body = json!({
            "payload": {"kernel": "@/pocket"}, "memory": {"size": 64 << 20},
            "console": {"mode": "Off"},
        });
        for (name, value) in fields.as_object().unwrap() {
            body[name] = value.clone();
        }
        let body = body.to_string().replace('@', &self.path(""));
        let config: VmConfig = spec::parse(body.as_bytes()).unwrap();
        self.registry.create(None, config).unwrap()
    }

    async fn boot(&self, fields: &Value) -> Result<VmHandle, RequestError> {
        let vm = self.create(fields);
        ask(&vm, Request::Boot).await.map(|()| vm)
    }

    async fn refusal(&self, fields: &Value) -> RequestError {
        match self.boot(fields).await {
            Err(refused) => refused,
            Ok(_) => unreachable!("{fields} boots"),
        }
    }
}

async fn ask(vm: &VmHandle, request: Request) -> Result<(), RequestError> {
    let answer = tokio::time::timeout(PATIENCE, vm.ask(request)).await;
    answer.unwrap().map(drop)
}

#[tokio::test]
async fn fifo_does_not_block() {
    let lab = Lab::new();
    let made = Command::new("mkfifo").arg(lab.path("fifo")).status();
    assert!(made.unwrap().success());
    for (fields, code) in [
        (
            json!({"serial": {"mode": "File", "file": "@/fifo"}}),
            "console-unusable",
        ),
        (
            json!({"console": {"mode": "File", "file": "@/fifo"}}),
            "console-unusable",
        ),
        (json!({"rng": {"src": "@/fifo"}}), "rng-unusable"),
        (json!({"disks": [{"path": "@/fifo"}]}), "disk-unusable"),
        (
            json!({"payload": {"kernel": "@/fifo"}}),
            "kernel-unreadable",
        ),
        (
            json!({"payload": {"kernel": "@/pocket", "initramfs": "@/fifo"}}),
            "initramfs-unreadable",
        ),
        (
            json!({"serial": {"mode": "Socket", "socket": "@/fifo"}}),
            "console-unusable",
        ),
    ] {
        let refused = lab.refusal(&fields).await;
        assert_eq!(refused.code, code, "{fields}: {refused}");
        assert!(refused.detail.contains("fifo"), "{refused}");
    }
    let vm = lab.boot(&json!({})).await.unwrap();
    ask(&vm, Request::Shutdown).await.unwrap();
}

#[tokio::test]
async fn used_serial_file_is_not_truncated() {
    let lab = Lab::new();
    let serial = |name: &str| json!({"mode": "File", "file": format!("@/{name}")});
    let running = lab
        .boot(&json!({"disks": [{"path": "@/disk"}], "serial": serial("log")}))
        .await
        .unwrap();
    fs::write(lab.path("earlier"), "an earlier boot").unwrap();
    let disks = json!([{"path": "@/own"}]);
    fs::write(lab.path("own"), [1; 4096]).unwrap();
    for (fields, told) in [
        // Another VM's disk, and another VM's log.
        (json!({"serial": serial("disk")}), "is in use by process"),
        (json!({"serial": serial("log")}), "is in use by process"),
        (
            json!({"serial": serial("pocket")}),
            "`payload.kernel` and `serial.file` both name",
        ),
        (
            json!({"serial": serial("own"), "disks": disks}),
            "`disks.0.path` and `serial.file` both name",
        ),
    ] {
        let refused = lab.refusal(&fields).await;
        assert_eq!(refused.code, "file-in-use", "{fields}: {refused}");
        assert!(refused.detail.contains(told), "{fields}: {refused}");
    }
    // What cannot be built has emptied nothing.
    let payload = json!({"kernel": "@/pocket", "initramfs": "@/missing"});
    let fields = json!({"serial": serial("earlier"), "payload": payload});
    assert_eq!(lab.refusal(&fields).await.code, "initramfs-unreadable");
    assert_eq!(lab.bytes("earlier"), b"an earlier boot");
    assert_eq!(lab.bytes("pocket"), guest::IMAGE);
    assert_eq!(lab.bytes("disk").len(), 1 << 20);
    assert_eq!(lab.bytes("own"), [1; 4096]);
    assert!(!lab.bytes("log").is_empty());
    // A device that comes later, too.
    let new = json!({"path": lab.path("log")});
    let new = NewDevice::Disk(serde_json::from_value(new).unwrap());
    let refused = ask(&running, Request::AddDevice(new)).await.unwrap_err();
    assert_eq!(refused.code, "file-in-use", "{refused}");
    ask(&running, Request::Shutdown).await.unwrap();
    lab.boot(&json!({"serial": serial("log")})).await.unwrap();
}

/// Whether this process has the file open.
fn is_open(path: &str) -> bool {
    let open = fs::read_dir("/proc/self/fd").unwrap().flatten();
    let open = open.filter_map(|entry| fs::read_link(entry.path()).ok());
    open.into_iter().any(|to| to.to_str() == Some(path))
}

/// A guest that could turn its raw disk into a qcow2 image would name a file of the host in it, and
/// find that file on its disk after a reboot.
#[tokio::test]
async fn disk_format_is_detected_once() {
    let lab = Lab::new();
    let (secret, evil) = (lab.path("secret"), lab.path("evil"));
    fs::write(&secret, vec![0x5a; 1 << 20]).unwrap();
    let options = format!("data_file={secret},data_file_raw=on");
    let made = Command::new("qemu-img")
        .args(["create", "-q", "-f", "qcow2", "-o", &options, &evil, "1M"])
        .status();
    assert!(made.unwrap().success());
    fs::write(&secret, vec![0x5a; 1 << 20]).unwrap();
    let header = fs::read(&evil).unwrap();

    let vm = lab
        .boot(&json!({"disks": [{"path": "@/disk"}]}))
        .await
        .unwrap();
    let format = |vm: &VmHandle| {
        let info = vm.info();
        let disk = &info.config.disks.as_ref().unwrap()[0];
        (disk.image_type, disk.image_type_detected)
    };
    assert_eq!(format(&vm), (Some(ImageType::Raw), true));
    // The device refuses such a write (virtio-devices/tests/block.rs); should it come all the same:
    let disk = fs::File::options()
        .write(true)
        .open(lab.path("disk"))
        .unwrap();
    std::os::unix::fs::FileExt::write_all_at(&disk, &header, 0).unwrap();
    for request in [Request::Reboot, Request::Shutdown, Request::Boot] {
        ask(&vm, request).await.unwrap();
        assert_eq!(format(&vm), (Some(ImageType::Raw), true));
        assert!(!is_open(&secret));
    }
    assert_eq!(vm.info().state, VmState::Running);
    // A disk that is added while the guest runs is recorded, too.
    fs::write(lab.path("later"), [0; 4096]).unwrap();
    let new = json!({"path": lab.path("later")});
    let new = NewDevice::Disk(serde_json::from_value(new).unwrap());
    ask(&vm, Request::AddDevice(new)).await.unwrap();
    let info = vm.info();
    let added = &info.config.disks.as_ref().unwrap()[1];
    assert_eq!(added.image_type, Some(ImageType::Raw));
    ask(&vm, Request::Shutdown).await.unwrap();

    // A VM that is configured anew detects qcow2, and its file is not opened without being asked for.
    let refused = lab.refusal(&json!({"disks": [{"path": "@/disk"}]})).await;
    assert!(refused.detail.contains("`data_files`"), "{refused}");
    let disks = json!([{"path": "@/disk", "image_type": "Qcow2", "data_files": true}]);
    let refused = lab.refusal(&json!({"disks": disks})).await;
    assert!(refused.detail.contains("`readonly`"), "{refused}");
    assert_eq!(lab.bytes("secret"), vec![0x5a; 1 << 20]);
}

#[tokio::test]
async fn rejects_missing_host_cpu() {
    let lab = Lab::new();
    let cpus = json!({
        "boot_vcpus": 1, "max_vcpus": 1, "affinity": [{"vcpu": 0, "host_cpus": [0, 99_999]}],
    });
    let body = json!({"payload": {"kernel": "/k"}, "cpus": cpus}).to_string();
    let config: VmConfig = spec::parse(body.as_bytes()).unwrap();
    let refused = lab.registry.create(None, config).unwrap_err();
    let [field] = &refused.fields[..] else {
        unreachable!("{refused}")
    };
    assert_eq!(field.pointer, "/cpus/affinity/0/host_cpus");
    assert!(field.detail.contains("CPU 99999"), "{}", field.detail);
}
