//! Whether a network interface makes sense.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use super::Below;
use crate::device::{self, NetConfig};
use crate::limits;
use crate::service::FieldProblem;
use crate::validate::UNSUPPORTED;

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

    pub(super) fn check(&self, pointer: &str, found: &mut Vec<FieldProblem>) {
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

#[cfg(test)]
mod tests {
    use super::*;

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
}
