//! Whether the devices of a configuration make sense, alone and together.

use std::collections::HashSet;

use crate::device::NetConfig;
use crate::disk::{DiskConfig, ImageType, RateLimiterConfig};
use crate::limits;
use crate::service::FieldProblem;
use crate::validate::{UNSUPPORTED, name, problem};
use crate::vm::VmConfig;

/// Checks all devices of a VM.
pub(crate) fn check(config: &VmConfig, found: &mut Vec<FieldProblem>) {
    for (i, disk) in config.disks.iter().flatten().enumerate() {
        disk.check(&format!("/disks/{i}"), found);
    }
    for (i, net) in config.net.iter().flatten().enumerate() {
        net.check(&format!("/net/{i}"), found);
    }
    let mut names = HashSet::new();
    for (pointer, id) in ids(config) {
        let pointer = format!("{pointer}/id");
        if id.is_empty() || id.starts_with("__") {
            let detail = format!("`{id}` is no name for a device");
            found.push(problem(&pointer, "out-of-range", detail));
        } else if !names.insert(id) {
            let detail = format!("there is another device of the name `{id}`");
            found.push(problem(&pointer, "duplicate", detail));
        }
    }
}

/// The names that were given, with the devices that have them.
fn ids(config: &VmConfig) -> impl Iterator<Item = (String, &str)> {
    let disks = config.disks.iter().flatten().enumerate();
    let disks = disks.map(|(i, disk)| (format!("/disks/{i}"), disk.id.as_deref()));
    let net = config.net.iter().flatten().enumerate();
    let net = net.map(|(i, net)| (format!("/net/{i}"), net.id.as_deref()));
    let rng = [("/rng".to_owned(), config.rng.id.as_deref())];
    disks
        .chain(net)
        .chain(rng)
        .filter_map(|(pointer, id)| Some((pointer, id?)))
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

    fn queues(&mut self, count: usize, size: u16, most: usize) {
        if count == 0 || count > most {
            let detail = format!("{count} queues are not between 1 and {most}");
            self.add("num_queues", "out-of-range", detail);
        }
        if !size.is_power_of_two() || !(2..=limits::QUEUE_SIZE).contains(&size) {
            let detail = format!(
                "{size} entries are no size of a queue: a power of two from 2 to {}",
                limits::QUEUE_SIZE
            );
            self.add("queue_size", "out-of-range", detail);
        }
    }

    fn rate_limiter(&mut self, config: Option<&RateLimiterConfig>) {
        let buckets = config.map(|config| [("bandwidth", &config.bandwidth), ("ops", &config.ops)]);
        for (kind, bucket) in buckets.into_iter().flatten() {
            if bucket
                .as_ref()
                .is_some_and(|bucket| bucket.refill_time == 0)
            {
                let field = format!("rate_limiter_config/{kind}/refill_time");
                self.add(&field, "out-of-range", "a bucket takes some time to fill");
            }
        }
    }
}

impl DiskConfig {
    /// All that is wrong with a disk that is to be added.
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
            None => below.add("path", "missing", "a disk needs an image"),
            Some("") => below.add("path", "out-of-range", "the path is empty"),
            Some(_) => {}
        }
        below.queues(self.num_queues, self.queue_size, limits::QUEUES);
        below.rate_limiter(self.rate_limiter_config.as_ref());
        if self
            .serial
            .as_ref()
            .is_some_and(|serial| serial.len() > limits::DISK_SERIAL_LEN)
        {
            let most = limits::DISK_SERIAL_LEN;
            below.add(
                "serial",
                "out-of-range",
                format!("a guest sees {most} bytes of it at most"),
            );
        }
        let other = matches!(
            self.image_type,
            Some(ImageType::FixedVhd | ImageType::Vhdx | ImageType::Unknown)
        );
        below.unsupported("image_type", other);
        below.unsupported("vhost_user", self.vhost_user);
        below.unsupported("vhost_socket", self.vhost_socket.is_some());
        below.unsupported("iommu", self.iommu);
        below.unsupported(
            "pci_segment",
            self.pci_segment.is_some_and(|segment| segment != 0),
        );
        below.unsupported("pci_device_id", self.pci_device_id.is_some());
        below.unsupported("rate_limit_group", self.rate_limit_group.is_some());
        below.unsupported("queue_affinity", self.queue_affinity.is_some());
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

impl NetConfig {
    /// All that is wrong with an interface that is to be added.
    #[must_use]
    pub fn problems(&self) -> Vec<FieldProblem> {
        let mut found = Vec::new();
        self.check("", &mut found);
        found
    }

    fn check(&self, pointer: &str, found: &mut Vec<FieldProblem>) {
        let mut below = Below { pointer, found };
        if self.tap.as_deref() == Some("") {
            below.add("tap", "out-of-range", "the name is empty");
        }
        for (field, mac) in [("mac", &self.mac), ("host_mac", &self.host_mac)] {
            let Some(text) = mac else { continue };
            match parse_mac(text) {
                None => below.add(
                    field,
                    "out-of-range",
                    format!("`{text}` is no Ethernet address"),
                ),
                // The lowest bit of the first byte says that it is of a group.
                Some([first, ..]) if first & 1 != 0 => {
                    let detail = format!("`{text}` is the address of a group, not of an interface");
                    below.add(field, "out-of-range", detail);
                }
                Some(_) => {}
            }
        }
        for (field, ip) in [("ip", &self.ip), ("mask", &self.mask)] {
            if ip.parse::<std::net::Ipv4Addr>().is_err() {
                below.add(field, "out-of-range", format!("`{ip}` is no IPv4 address"));
            }
        }
        if let Some(mtu) = self.mtu.filter(|mtu| *mtu < limits::MIN_MTU) {
            let least = limits::MIN_MTU;
            below.add(
                "mtu",
                "out-of-range",
                format!("{mtu} bytes are fewer than {least}"),
            );
        }
        below.queues(self.num_queues, self.queue_size, 2 * limits::NET_PAIRS);
        if !self.num_queues.is_multiple_of(2) {
            let detail = format!("{} queues are no pairs", self.num_queues);
            below.add("num_queues", "out-of-range", detail);
        }
        below.rate_limiter(self.rate_limiter_config.as_ref());
        below.unsupported("vhost_user", self.vhost_user);
        below.unsupported("vhost_socket", self.vhost_socket.is_some());
        below.unsupported("iommu", self.iommu);
        below.unsupported(
            "pci_segment",
            self.pci_segment.is_some_and(|segment| segment != 0),
        );
        below.unsupported("pci_device_id", self.pci_device_id.is_some());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{HostLimits, PayloadConfig};

    fn found(disks: &str) -> Vec<(String, String)> {
        let mut config = VmConfig::with_payload(PayloadConfig {
            kernel: Some("/k".into()),
            ..Default::default()
        });
        config.disks = Some(serde_json::from_str(disks).unwrap());
        let host = HostLimits {
            max_vcpus: 8,
            max_memory: 1 << 40,
        };
        let problems = config.validate(&host).err().unwrap_or_default();
        problems
            .into_iter()
            .map(|problem| (problem.pointer, problem.code))
            .collect()
    }

    #[test]
    fn each_problem_of_a_disk_names_its_field() {
        assert_eq!(
            found(r#"[{"path":"/a"},{"path":"/b","id":"b","queue_size":256}]"#),
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
                "unsupported",
            ),
            (r#"{"path":"/a","id":"__rng"}"#, "id", "out-of-range"),
            (
                r#"{"path":"/a","rate_limiter_config":{"ops":{"size":1,"refill_time":0}}}"#,
                "rate_limiter_config/ops/refill_time",
                "out-of-range",
            ),
        ] {
            let expected = (format!("/disks/0/{field}"), code.to_owned());
            assert_eq!(found(&format!("[{disk}]")), [expected], "{disk}");
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
        for (net, field, code) in [
            (r#"{"tap":""}"#, "tap", "out-of-range"),
            (r#"{"mac":"52:54:00:12:34"}"#, "mac", "out-of-range"),
            (r#"{"mac":"53:54:00:12:34:56"}"#, "mac", "out-of-range"),
            (r#"{"ip":"1.2.3"}"#, "ip", "out-of-range"),
            (r#"{"mtu":100}"#, "mtu", "out-of-range"),
            (r#"{"num_queues":3}"#, "num_queues", "out-of-range"),
            (r#"{"num_queues":32}"#, "num_queues", "out-of-range"),
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
    fn two_devices_of_one_name_are_refused() {
        let twice = found(r#"[{"path":"/a","id":"x"},{"path":"/b","id":"x"}]"#);
        assert_eq!(twice, [("/disks/1/id".to_owned(), "duplicate".to_owned())]);
    }
}
