//! Hosts that are network namespaces, on one Ethernet.

use std::process::Command;

use anyhow::{Context as _, Result, ensure};

/// The test's own address in it: it is the router that guests know.
pub const ROUTER: &str = "192.168.249.1";

/// A bridge, with this process and the hosts on it. Each host has a bridge of its own, `br0`, that
/// leads to it and to `tap0`, for a guest: one that moves from host to host keeps its address, and the
/// bridges learn where it is from what it sends. Wants the kernel's bridge and veth.
#[derive(Debug)]
pub struct Network {
    hosts: Vec<&'static str>,
}

impl Network {
    /// Makes it, with hosts of these names. Host `n` (from 0) has the address [`address`](Self::address).
    ///
    /// # Errors
    /// When the kernel has no such devices, or they are there already.
    pub fn with_hosts(hosts: &[&'static str]) -> Result<Self> {
        // Taken down again, wherever the making ends.
        let network = Self {
            hosts: hosts.to_vec(),
        };
        ip("link add lan type bridge")?;
        ip(&format!("addr add {ROUTER}/24 dev lan"))?;
        ip("link set lan up")?;
        for (host, address) in hosts.iter().zip(11..) {
            ip(&format!("netns add {host}"))?;
            let cable = format!("link add lan-{host} type veth peer name uplink netns {host}");
            ip(&cable)?;
            ip(&format!("link set lan-{host} master lan up"))?;
            for there in [
                "link set lo up",
                "link add br0 type bridge",
                &format!("addr add 192.168.249.{address}/24 dev br0"),
                "link set br0 up",
                "link set uplink master br0 up",
                "tuntap add tap0 mode tap",
                "link set tap0 master br0 up",
            ] {
                ip(&format!("-n {host} {there}"))?;
            }
        }
        Ok(network)
    }

    /// Returns the address of a host.
    ///
    /// # Errors
    /// There is no host of this name.
    pub fn address(&self, host: &str) -> Result<String> {
        let at = self.hosts.iter().position(|name| *name == host);
        let at = at.with_context(|| format!("there is no host {host}"))?;
        Ok(format!("192.168.249.{}", 11 + at))
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        for host in &self.hosts {
            let _ = ip(&format!("netns del {host}"));
        }
        let _ = ip("link del lan");
    }
}

fn ip(arguments: &str) -> Result<()> {
    let output = Command::new("ip")
        .args(arguments.split(' '))
        .output()
        .context("run ip")?;
    let error = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "ip {arguments}: {error}");
    Ok(())
}
