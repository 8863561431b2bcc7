//! Whether the devices of a configuration make sense, alone and together.

use std::collections::HashSet;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use crate::console::ConsoleMode;
use crate::device::{self, NetConfig, VsockConfig};
use crate::disk::{DiskConfig, ImageType};
use crate::limits;
use crate::names;
use crate::rate_limit;
use crate::service::FieldProblem;
use crate::slots;
use crate::validate::{UNSUPPORTED, name, problem};
use crate::vm::VmConfig;

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
        if balloon.size > config.memory.size {
            let (size, all) = (balloon.size, config.memory.size);
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
        if let Some(wrong) = names::check_device_name(&pointer, id) {
            found.push(wrong);
        } else if !names.insert(id) {
            let detail = format!("another device has the id `{id}`");
            found.push(problem(&format!("{pointer}/id"), "duplicate", detail));
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
            let detail = "the queues of all devices share the service's event loops, so that none can be \
                          bound to CPUs; bind the process (`taskset`, a cpuset)";
            below.add("queue_affinity", UNSUPPORTED, detail);
        }
    }
}

/// An Ethernet address in the usual form: six bytes in hexadecimal with colons.
#[must_use]
pub fn parse_mac(text: &str) -> Option<[u8; 6]> {
    let mut parts = text.split(':');
    let mut mac = [0; 6];
    for byte in &mut mac {
        let part = parts.next().filter(|part| part.len() == 2)?;
        *byte = u8::from_str_radix(part, 16).ok()?;
    }
    parts.next().is_none().then_some(mac)
}

/// An address of the host on a tap that is created.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HostIp {
    /// Address and netmask; a netmask of the host's choice when absent.
    V4(Ipv4Addr, Option<Ipv4Addr>),
    /// Address and length of its prefix.
    V6(Ipv6Addr, u8),
}

impl NetConfig {
    /// Returns the host's address, if one is configured.
    ///
    /// # Errors
    /// The field, code and description of what is wrong with `ip` or `mask`.
    pub fn host_ip(&self) -> Result<Option<HostIp>, (&'static str, &'static str, String)> {
        /// The prefix of an IPv6 address whose mask is not given.
        const PREFIX: u8 = 64;
        let parse = |field: &'static str, text: &str| match text {
            // As for Cloud Hypervisor, an empty address is none.
            "" => Ok(None),
            text => text.parse::<IpAddr>().map(Some).map_err(|_| {
                let detail = format!("`{field}` (`{text}`) is not an IP address");
                (field, "out-of-range", detail)
            }),
        };
        let (ip, mask) = (parse("ip", &self.ip)?, parse("mask", &self.mask)?);
        match (ip, mask) {
            (None, _) => Ok(None),
            (Some(IpAddr::V4(ip)), None) => Ok(Some(HostIp::V4(ip, None))),
            (Some(IpAddr::V4(ip)), Some(IpAddr::V4(mask))) => Ok(Some(HostIp::V4(ip, Some(mask)))),
            (Some(IpAddr::V6(ip)), None) => Ok(Some(HostIp::V6(ip, PREFIX))),
            // The default of `mask` says nothing about an IPv6 address.
            (Some(IpAddr::V6(ip)), Some(IpAddr::V4(_))) if self.mask == device::default_mask() => {
                Ok(Some(HostIp::V6(ip, PREFIX)))
            }
            (Some(IpAddr::V6(ip)), Some(IpAddr::V6(mask))) => {
                let bits = mask.to_bits();
                if bits.leading_ones() != bits.count_ones() {
                    let detail = format!("`mask` ({mask}) must be ones, and then zeros");
                    return Err(("mask", "out-of-range", detail));
                }
                Ok(Some(HostIp::V6(ip, bits.leading_ones() as u8)))
            }
            (Some(ip), Some(mask)) => {
                let detail = format!("`mask` ({mask}) is of another family than `ip` ({ip})");
                Err(("mask", "inconsistent", detail))
            }
        }
    }

    /// Returns the problems of a network interface to add.
    #[must_use]
    pub fn problems(&self) -> Vec<FieldProblem> {
        let mut found = Vec::new();
        self.check("", &mut found);
        found
    }

    fn check(&self, pointer: &str, found: &mut Vec<FieldProblem>) {
        let mut below = Below { pointer, found };
        if self.tap.as_deref() == Some("") {
            below.add("tap", "out-of-range", "`tap` is empty");
        }
        if let Some(fds) = self.tap_descriptors() {
            if !fds.are_here() {
                let detail = "`fds` needs the descriptors themselves: send them with the request \
                              that adds the interface, over a unix socket";
                below.add("fds", UNSUPPORTED, detail);
            } else if self.tap.is_some() {
                let detail = "`tap` cannot be combined with `fds`: the tap of the descriptors has \
                              a name already";
                below.add("tap", "inconsistent", detail);
            } else if fds.count() != self.num_queues / 2 {
                let (count, queues) = (fds.count(), self.num_queues);
                let detail = format!(
                    "`num_queues` ({queues}) needs one descriptor per queue pair, and {count} \
                     were sent"
                );
                below.add("num_queues", "inconsistent", detail);
            }
        }
        for (field, mac) in [("mac", &self.mac), ("host_mac", &self.host_mac)] {
            let Some(text) = mac else { continue };
            match parse_mac(text) {
                None => below.add(
                    field,
                    "out-of-range",
                    format!("`{field}` (`{text}`) is not an Ethernet address"),
                ),
                // The lowest bit of the first byte says that it is of a group.
                Some([first, ..]) if first & 1 != 0 => {
                    let detail = format!(
                        "`{field}` (`{text}`) is a multicast address; an interface needs a \
                         unicast address"
                    );
                    below.add(field, "out-of-range", detail);
                }
                Some(_) => {}
            }
        }
        if let Err((field, code, detail)) = self.host_ip() {
            below.add(field, code, detail);
        }
        if let Some(mtu) = self.mtu.filter(|mtu| *mtu < limits::MIN_MTU) {
            let least = limits::MIN_MTU;
            below.add(
                "mtu",
                "out-of-range",
                format!("`mtu` ({mtu}) must be at least {least}"),
            );
        }
        below.queues(
            self.num_queues,
            2 * limits::NET_PAIRS + 1,
            self.queue_size,
            limits::NET_QUEUE_SIZE_MIN,
        );
        if self.num_queues == 1 {
            let detail = "`num_queues` (1) must be at least 2: two for each queue pair";
            below.add("num_queues", "out-of-range", detail);
        }
        below.unsupported("vhost_user", self.vhost_user);
        below.unsupported("vhost_socket", self.vhost_socket.is_some());
        below.unsupported("vhost_mode", self.vhost_mode != "Client");
        below.placed(self.iommu, self.pci_device_id);
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
    use crate::{Descriptors, HostLimits, PayloadConfig};

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
    fn addresses_of_both_families() {
        let ip = |json: &str| {
            let net: NetConfig = serde_json::from_str(json).unwrap();
            assert_eq!(net.problems(), [], "{json}");
            net.host_ip().unwrap()
        };
        let (four, six) = (Ipv4Addr::new(10, 0, 0, 1), "fd00::1".parse().unwrap());
        let mask = |last| Some(Ipv4Addr::new(255, 255, last, 0));
        assert_eq!(ip("{}"), None);
        assert_eq!(
            ip(r#"{"ip":"10.0.0.1"}"#),
            Some(HostIp::V4(four, mask(255)))
        );
        assert_eq!(
            ip(r#"{"ip":"10.0.0.1","mask":"255.255.0.0"}"#),
            Some(HostIp::V4(four, mask(0)))
        );
        assert_eq!(
            ip(r#"{"ip":"10.0.0.1","mask":""}"#),
            Some(HostIp::V4(four, None))
        );
        for (mask, prefix) in [
            ("", 64),
            (r#","mask":"ffff:ff00::""#, 24),
            (r#","mask":"::""#, 0),
            (r#","mask":"ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff""#, 128),
        ] {
            let json = format!(r#"{{"ip":"fd00::1"{mask}}}"#);
            assert_eq!(ip(&json), Some(HostIp::V6(six, prefix)), "{json}");
        }
    }

    #[test]
    fn each_problem_of_an_interface_names_its_field() {
        let found = |json: &str| {
            let net: NetConfig = serde_json::from_str(json).unwrap();
            let problems = net.problems().into_iter();
            problems.map(|p| (p.pointer, p.code)).collect::<Vec<_>>()
        };
        assert_eq!(
            found(r#"{"tap":"t","mac":"52:54:00:12:34:56","num_queues":4}"#),
            []
        );
        assert_eq!(found(r#"{"queue_size":32}"#), []);
        assert_eq!(found(r#"{"num_queues":3,"ip":"","mask":""}"#), []);
        for (net, field, code) in [
            (r#"{"tap":""}"#, "tap", "out-of-range"),
            (r#"{"mac":"52:54:00:12:34"}"#, "mac", "out-of-range"),
            (r#"{"mac":"53:54:00:12:34:56"}"#, "mac", "out-of-range"),
            (r#"{"ip":"1.2.3"}"#, "ip", "out-of-range"),
            (
                r#"{"ip":"fd00::1","mask":"ffff::1"}"#,
                "mask",
                "out-of-range",
            ),
            (
                r#"{"ip":"fd00::1","mask":"255.0.0.0"}"#,
                "mask",
                "inconsistent",
            ),
            (
                r#"{"ip":"10.0.0.1","mask":"ffff::"}"#,
                "mask",
                "inconsistent",
            ),
            (r#"{"mtu":100}"#, "mtu", "out-of-range"),
            (r#"{"num_queues":1}"#, "num_queues", "out-of-range"),
            (r#"{"num_queues":32}"#, "num_queues", "out-of-range"),
            (r#"{"queue_size":16}"#, "queue_size", "out-of-range"),
            (r#"{"queue_size":48}"#, "queue_size", "out-of-range"),
            (r#"{"vhost_user":true}"#, "vhost_user", "unsupported"),
        ] {
            assert_eq!(
                found(net),
                [(format!("/{field}"), code.to_owned())],
                "{net}"
            );
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
