//! Whether the devices of a configuration make sense, alone and together.

mod net;

use std::collections::HashSet;

pub use self::net::{HostIp, parse_mac};
use crate::console::ConsoleMode;
use crate::device::VsockConfig;
use crate::disk::{DiskConfig, ImageType};
use crate::limits;
use crate::names;
use crate::rate_limit;
use crate::service::FieldProblem;
use crate::slots;
use crate::validate::{UNSUPPORTED, name, problem};
use crate::vm::VmConfig;
use crate::zones::MemoryZone;

/// Checks all devices of a VM.
pub(crate) fn check(config: &VmConfig, found: &mut Vec<FieldProblem>) {
    for (i, disk) in config.disks.iter().flatten().enumerate() {
        disk.check(&format!("/disks/{i}"), found);
    }
    rate_limit::check(config, found);
    for (i, net) in config.net.iter().flatten().enumerate() {
        net.check(&format!("/net/{i}"), found);
    }
    if let Some(vsock) = &config.vsock {
        vsock.check("/vsock", found);
    }
    if let Some(balloon) = &config.balloon {
        let mut below = Below {
            pointer: "/balloon",
            found,
        };
        let all = config.memory.boot_size();
        if balloon.size > all {
            let size = balloon.size;
            let detail = format!("`size` ({size}) is more than the guest's memory ({all} bytes)");
            below.add("size", "out-of-range", detail);
        }
        below.placed(balloon.iommu, balloon.pci_device_id);
    }
    let (console, rng) = (&config.console, &config.rng);
    for (pointer, iommu, device) in [
        ("/console", console.iommu, console.pci_device_id),
        ("/rng", rng.iommu, rng.pci_device_id),
    ] {
        Below { pointer, found }.placed(iommu, device);
    }
    check_count(config, found);
    slots::check(config, found);
    let mut names = HashSet::new();
    for (pointer, id) in names::given(config) {
        let field = format!("{pointer}/id");
        if found.iter().any(|problem| problem.pointer == field) {
            // A memory zone, whose name was checked among those of the zones.
            names.insert(id);
        } else if let Some(wrong) = names::check_device_name(&pointer, id) {
            found.push(wrong);
        } else if !names.insert(id) {
            let detail = format!("another device has the id `{id}`");
            found.push(problem(&field, "duplicate", detail));
        }
    }
}

fn check_count(config: &VmConfig, found: &mut Vec<FieldProblem>) {
    let (count, most) = (config.device_count(), limits::DEVICES);
    if count > most {
        let disks = config.disks.iter().flatten().count();
        let net = config.net.iter().flatten().count();
        let pointer = if disks < net { "/net" } else { "/disks" };
        let detail = format!(
            "{count} devices are more than a VM can have, {most} (disks: {disks}, network \
             interfaces: {net}, others: {})",
            count.saturating_sub(disks).saturating_sub(net)
        );
        found.push(problem(pointer, "out-of-range", detail));
    }
}

impl VmConfig {
    /// The devices that it puts on the bus, with the console and the source of entropy.
    #[must_use]
    pub fn device_count(&self) -> usize {
        let others = [
            self.vsock.is_some(),
            self.balloon.is_some(),
            self.watchdog,
            self.console.mode != ConsoleMode::Off,
            // The source of entropy.
            true,
        ];
        let others = others.into_iter().filter(|is_there| *is_there).count();
        let zones = self.memory.all_zones().into_iter();
        let memory = zones.filter(MemoryZone::has_virtio_mem).count();
        let others = others.saturating_add(memory);
        let lists = self.disks.iter().flatten().count() + self.net.iter().flatten().count();
        lists.saturating_add(others)
    }
}

/// Adds problems with fields below one pointer.
struct Below<'a> {
    pointer: &'a str,
    found: &'a mut Vec<FieldProblem>,
}

impl Below<'_> {
    fn add(&mut self, field: &str, code: &str, detail: impl Into<String>) {
        let pointer = format!("{}/{field}", self.pointer);
        self.found.push(problem(&pointer, code, detail.into()));
    }

    /// Refuses what this version cannot do.
    fn unsupported(&mut self, field: &str, is_there: bool) {
        if is_there {
            let whole = format!("{}/{field}", self.pointer);
            let detail = format!("this version does not support `{}`", name(&whole));
            self.add(field, UNSUPPORTED, detail);
        }
    }

    /// Refuses slots that no bus has, and a virtual IOMMU. Segments are checked with the whole
    /// configuration, which has their number.
    fn placed(&mut self, iommu: bool, slot: Option<u8>) {
        self.unsupported("iommu", iommu);
        if let Some(slot) = slot.filter(|slot| !(1..=limits::PCI_SLOTS).contains(slot)) {
            let last = limits::PCI_SLOTS;
            let detail =
                format!("`pci_device_id` ({slot}) must be 1 to {last}: 0 is the host bridge's");
            self.add("pci_device_id", "out-of-range", detail);
        }
    }

    /// Checks a number of queues, and their size against the least with which the device works.
    fn queues(&mut self, count: usize, most: usize, size: u16, least: u16) {
        if count == 0 || count > most {
            let detail = format!("`num_queues` ({count}) must be 1 to {most}");
            self.add("num_queues", "out-of-range", detail);
        }
        if !size.is_power_of_two() || !(least..=limits::QUEUE_SIZE).contains(&size) {
            let largest = limits::QUEUE_SIZE;
            let mut detail =
                format!("`queue_size` ({size}) must be a power of two from {least} to {largest}");
            if size < least {
                // A smaller size is legal, but no driver could send a request.
                detail += ": a request must fit in the queue";
            }
            self.add("queue_size", "out-of-range", detail);
        }
    }
}

impl DiskConfig {
    /// Returns the problems of a disk to add.
    #[must_use]
    pub fn problems(&self) -> Vec<FieldProblem> {
        let mut found = Vec::new();
        self.check("", &mut found);
        found
    }

    fn check(&self, pointer: &str, found: &mut Vec<FieldProblem>) {
        let mut below = Below { pointer, found };
        match self.path.as_deref() {
            None if self.vhost_user => {}
            None => below.add(
                "path",
                "missing",
                "`path` is missing: a disk needs an image",
            ),
            Some("") => below.add("path", "out-of-range", "`path` is empty"),
            Some(_) => {}
        }
        below.queues(
            self.num_queues,
            limits::QUEUES,
            self.queue_size,
            limits::DISK_QUEUE_SIZE_MIN,
        );
        if self
            .serial
            .as_ref()
            .is_some_and(|serial| serial.len() > limits::DISK_SERIAL_LEN)
        {
            let most = limits::DISK_SERIAL_LEN;
            below.add(
                "serial",
                "out-of-range",
                format!("`serial` must have at most {most} bytes"),
            );
        }
        for (field, is_on) in [
            ("backing_files", self.backing_files),
            ("data_files", self.data_files),
        ] {
            // A guest could write the header that a detection would find.
            if is_on && self.image_type.is_none() {
                let detail = format!(
                    "`{field}` needs `image_type`: an image of a detected format may not name \
                     other files"
                );
                below.add(field, "inconsistent", detail);
            }
        }
        let other = matches!(
            self.image_type,
            Some(ImageType::FixedVhd | ImageType::Vhdx | ImageType::Unknown)
        );
        below.unsupported("image_type", other);
        below.unsupported("vhost_user", self.vhost_user);
        below.unsupported("vhost_socket", self.vhost_socket.is_some());
        below.placed(self.iommu, self.pci_device_id);
        if self
            .queue_affinity
            .as_ref()
            .is_some_and(|all| !all.is_empty())
        {
            let detail = "this version does not support `queue_affinity`: the queues of all devices share \
                          the service's event loops; bind the process (`taskset`, a cpuset)";
            below.add("queue_affinity", UNSUPPORTED, detail);
        }
    }
}

impl VsockConfig {
    /// Returns the problems of a vsock device to add.
    #[must_use]
    pub fn problems(&self) -> Vec<FieldProblem> {
        let mut found = Vec::new();
        self.check("", &mut found);
        found
    }

    fn check(&self, pointer: &str, found: &mut Vec<FieldProblem>) {
        let mut below = Below { pointer, found };
        // 0 to 2 are the hypervisor's, the guest's own and the host's; the last is "any".
        if !(3..u64::from(u32::MAX)).contains(&self.cid) {
            let detail = format!("`cid` ({}) must be 3 to 4294967294", self.cid);
            below.add("cid", "out-of-range", detail);
        }
        if self.socket.is_empty() || self.socket.len() > limits::SOCKET_PATH_LEN {
            let most = limits::SOCKET_PATH_LEN;
            let detail = format!("`socket` must be a path of 1 to {most} bytes");
            below.add("socket", "out-of-range", detail);
        }
        below.placed(self.iommu, self.pci_device_id);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Descriptors, HostLimits, NetConfig, PayloadConfig};

    fn found(disks: &str) -> Vec<(String, String)> {
        let mut config = VmConfig::with_payload(PayloadConfig {
            kernel: Some("/k".into()),
            ..Default::default()
        });
        config.disks = Some(serde_json::from_str(disks).unwrap());
        let host = HostLimits {
            max_vcpus: 8,
            max_memory: 1 << 40,
            host_cpus: 64,
        };
        let problems = config.validate(&host).err().unwrap_or_default();
        problems
            .into_iter()
            .map(|problem| (problem.pointer, problem.code))
            .collect()
    }

    #[test]
    fn other_files_need_image_type() {
        for field in ["backing_files", "data_files"] {
            let problems = |more: &str| {
                let body = format!(r#"{{"path":"/d","{field}":true{more}}}"#);
                let disk: DiskConfig = crate::parse(body.as_bytes()).unwrap();
                disk.problems()
            };
            assert_eq!(problems(r#","image_type":"Qcow2""#), []);
            let [problem] = &problems("")[..] else {
                panic!("{field} without a format is accepted");
            };
            assert_eq!(problem.pointer, format!("/{field}"));
            assert!(problem.detail.contains("needs `image_type`"), "{problem:?}");
        }
    }

    #[test]
    fn each_problem_of_a_disk_names_its_field() {
        assert_eq!(
            found(r#"[{"path":"/a"},{"path":"/b","id":"b","queue_size":256}]"#),
            []
        );
        let off = r#"{"bandwidth":{"size":0,"refill_time":1},"ops":{"size":1,"refill_time":0}}"#;
        assert_eq!(
            found(&format!(r#"[{{"path":"/a","rate_limiter_config":{off}}}]"#)),
            []
        );
        for (disk, field, code) in [
            (r#"{}"#, "path", "missing"),
            (r#"{"path":""}"#, "path", "out-of-range"),
            (
                r#"{"path":"/a","num_queues":0}"#,
                "num_queues",
                "out-of-range",
            ),
            (
                r#"{"path":"/a","num_queues":33}"#,
                "num_queues",
                "out-of-range",
            ),
            (
                r#"{"path":"/a","queue_size":100}"#,
                "queue_size",
                "out-of-range",
            ),
            (
                r#"{"path":"/a","queue_size":2}"#,
                "queue_size",
                "out-of-range",
            ),
            (
                r#"{"path":"/a","queue_size":8192}"#,
                "queue_size",
                "out-of-range",
            ),
            (
                r#"{"path":"/a","serial":"123456789012345678901"}"#,
                "serial",
                "out-of-range",
            ),
            (
                r#"{"path":"/a","image_type":"Vhdx"}"#,
                "image_type",
                "unsupported",
            ),
            (
                r#"{"path":"/a","vhost_user":true}"#,
                "vhost_user",
                "unsupported",
            ),
            (r#"{"path":"/a","iommu":true}"#, "iommu", "unsupported"),
            (
                r#"{"path":"/a","pci_segment":1}"#,
                "pci_segment",
                "out-of-range",
            ),
            (
                r#"{"path":"/a","pci_device_id":0}"#,
                "pci_device_id",
                "out-of-range",
            ),
            (
                r#"{"path":"/a","pci_device_id":32}"#,
                "pci_device_id",
                "out-of-range",
            ),
            (r#"{"path":"/a","id":"__rng"}"#, "id", "out-of-range"),
        ] {
            let expected = (format!("/disks/0/{field}"), code.to_owned());
            assert_eq!(found(&format!("[{disk}]")), [expected], "{disk}");
        }
    }

    #[test]
    fn tap_descriptors_match_queue_pairs() {
        let found = |json: &str, count: usize| {
            let open = || std::fs::File::open("/dev/null").unwrap().into();
            let mut net: NetConfig = serde_json::from_str(json).unwrap();
            net.fds = Some(Descriptors::new((0..count).map(|_| open()).collect()));
            let problems = net.problems().into_iter();
            problems.map(|p| (p.pointer, p.code)).collect::<Vec<_>>()
        };
        let problem = |field: &str, code: &str| [(format!("/{field}"), code.to_owned())];
        assert_eq!(found("{}", 1), []);
        assert_eq!(found(r#"{"num_queues":4}"#, 2), []);
        assert_eq!(found("{}", 2), problem("num_queues", "inconsistent"));
        assert_eq!(found(r#"{"tap":"t"}"#, 1), problem("tap", "inconsistent"));
        // What a body has of them.
        for (body, expected) in [
            (r#"{"fds":null}"#, vec![]),
            (r#"{"fds":[]}"#, vec![]),
            (r#"{"fds":[7]}"#, problem("fds", UNSUPPORTED).to_vec()),
        ] {
            let net: NetConfig = serde_json::from_str(body).unwrap();
            let problems = net.problems().into_iter();
            let problems: Vec<_> = problems.map(|p| (p.pointer, p.code)).collect();
            assert_eq!(problems, expected, "{body}");
        }
    }

    #[test]
    fn each_problem_of_a_socket_names_its_field() {
        let found = |json: &str| {
            let vsock: VsockConfig = serde_json::from_str(json).unwrap();
            let problems = vsock.problems().into_iter();
            problems.map(|p| (p.pointer, p.code)).collect::<Vec<_>>()
        };
        assert_eq!(found(r#"{"cid":3,"socket":"/s"}"#), []);
        for (vsock, field) in [
            (r#"{"cid":2,"socket":"/s"}"#, "cid"),
            (r#"{"cid":4294967295,"socket":"/s"}"#, "cid"),
            (r#"{"cid":3,"socket":""}"#, "socket"),
        ] {
            let expected = (format!("/{field}"), "out-of-range".to_owned());
            assert_eq!(found(vsock), [expected], "{vsock}");
        }
    }

    #[test]
    fn rejects_too_many_devices() {
        let disks = |count| format!("[{}]", vec![r#"{"path":"/a"}"#; count].join(","));
        assert_eq!(found(&disks(62)), []);
        let of_disks = ("/disks".to_owned(), "out-of-range".to_owned());
        assert_eq!(found(&disks(63)), [of_disks]);

        let mut config: VmConfig = serde_json::from_str(&format!(
            r#"{{"payload":{{"kernel":"/k"}},"net":[{}],"vsock":{{"cid":3,"socket":"/s"}},
                "balloon":{{"size":0}},"console":{{"mode":"Off"}},"disks":[{{"path":"/a"}}]}}"#,
            vec!["{}"; 61].join(",")
        ))
        .unwrap();
        let mut problems = Vec::new();
        check(&config, &mut problems);
        let [problem] = &problems[..] else {
            unreachable!("{problems:?}")
        };
        assert_eq!(problem.pointer, "/net");
        let detail = "65 devices are more than a VM can have, 64 (disks: 1, network \
                      interfaces: 61, others: 3)";
        assert_eq!(problem.detail, detail);
        config.balloon = None;
        problems.clear();
        check(&config, &mut problems);
        assert_eq!((config.device_count(), problems.len()), (64, 0));
    }

    #[test]
    fn rejects_duplicate_device_id() {
        let twice = found(r#"[{"path":"/a","id":"x"},{"path":"/b","id":"x"}]"#);
        assert_eq!(twice, [("/disks/1/id".to_owned(), "duplicate".to_owned())]);
    }
}
