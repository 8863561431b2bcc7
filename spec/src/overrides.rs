//! VMs that are made from a snapshot, or forked from a VM, and differ from the VM that was saved.

use std::path::Path;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::console::{ConsoleMode, DebugConsoleConfig, SerialConfig};

use crate::device::TpmConfig;
use crate::devices::parse_mac;
use crate::disk::{DiskConfig, ImageType};
use crate::requests::SnapshotDisks;
use crate::service::{FieldProblem, VmId};
use crate::validate::problem;
use crate::vm::VmConfig;

/// Maximum number of VMs that one request makes.
pub const MAX_FORKS: u32 = 1024;

/// Settings of a restored VM that differ from those of the VM that was saved. In texts `{n}` stands for
/// the number of the VM, from 1 on.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Overrides {
    /// Images of disks.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub disks: Vec<DiskOverride>,
    /// Taps and MAC addresses of network interfaces.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub net: Vec<NetOverride>,
    /// CID and socket of the vsock device.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vsock: Option<VsockOverride>,
    /// The host's end of the serial port, in place of the one that was saved.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub serial: Option<SerialConfig>,
    /// The host's end of the virtio console, in place of the one that was saved.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub console: Option<SerialConfig>,
    /// The debug console, in place of the one that was saved. Its port stays where `iobase` is absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub debug_console: Option<DebugConsoleConfig>,
    /// The control socket of another swtpm, which gets the state of the TPM.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tpm: Option<TpmConfig>,
}

/// Another image for a disk. The guest must find in it what it left in the first.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct DiskOverride {
    /// The disk.
    pub id: String,
    /// Path of its image.
    pub path: String,
    /// Format of its image. When absent, a saved `Qcow2` stays. A saved `Raw` is detected anew, because the
    /// other image may have been made by tools of the host.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub image_type: Option<ImageType>,
    /// Whether the image may name a file below it, as in the configuration of a disk. As it was saved when
    /// absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub backing_files: Option<bool>,
}

impl DiskOverride {
    /// Configures a disk for this image, at `path`.
    fn apply(&self, path: String, disk: &mut DiskConfig) {
        disk.path = Some(path);
        if let Some(allowed) = self.backing_files {
            disk.backing_files = allowed;
        }
        match (self.image_type, disk.image_type) {
            // A header of qcow2 in an image that is served as raw would be the guest's to overwrite.
            (None, Some(ImageType::Raw)) => disk.image_type = None,
            (None, _) => return,
            (said, _) => disk.image_type = said,
        }
        disk.image_type_detected = false;
    }
}

/// Another tap or MAC address for a network interface.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct NetOverride {
    /// The interface.
    pub id: String,
    /// Tap interface of the host.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tap: Option<String>,
    /// MAC address of the first VM; each further VM has the next. The guest's driver sees it after its next
    /// start: until then it keeps the address that it has read.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mac: Option<String>,
}

/// Another CID or socket for the vsock device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct VsockOverride {
    /// CID of the first VM; each further VM has the next.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cid: Option<u64>,
    /// Unix socket on the host through which programs reach the guest.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub socket: Option<String>,
}

/// VMs to make from a VM. They are called `NAME-1`, `NAME-2` and so on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ForkVm {
    /// Number of VMs, 1 to 1024.
    #[serde(default = "one")]
    #[schema(minimum = 1, maximum = 1024)]
    pub count: u32,
    /// Start of their names; the VM's own name when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<VmId>,
    /// Resume their guests. The VM that is forked stays as it is: paused or running.
    #[serde(default)]
    pub resume: bool,
    /// Differences from the VM that is forked.
    #[serde(default)]
    pub overrides: Overrides,
    /// Treatment of the VM's disks. With `Overlay` the VM and each fork continue on overlays of their
    /// own; a VM that runs and has a disk that it can write is forked only so. `Copy` is refused.
    #[serde(default, skip_serializing_if = "SnapshotDisks::is_none")]
    pub disks: SnapshotDisks,
}

fn one() -> u32 {
    1
}

impl Default for ForkVm {
    fn default() -> Self {
        Self {
            count: one(),
            name: None,
            resume: false,
            overrides: Overrides::default(),
            disks: SnapshotDisks::None,
        }
    }
}

/// Returns the names of `count` VMs: `NAME-1`, `NAME-2` and so on.
///
/// # Errors
/// `count` is 0 or more than [`MAX_FORKS`], or the names get too long.
pub fn fork_names(name: &VmId, count: u32) -> Result<Vec<VmId>, FieldProblem> {
    if !(1..=MAX_FORKS).contains(&count) {
        let detail = format!("`count` ({count}) must be 1 to {MAX_FORKS}");
        return Err(problem("/count", "out-of-range", detail));
    }
    let names = (1..=count).map(|n| format!("{name}-{n}").parse::<VmId>());
    let names: Result<_, _> = names.collect();
    names.map_err(|error| problem("/name", "out-of-range", error.to_string()))
}

impl Overrides {
    /// Applies the overrides to the configuration of the VM with the number `n`, from 1 on.
    ///
    /// # Errors
    /// There is no such device, a path is relative, or the number of a VM leads beyond what an address can be.
    pub fn apply(&self, n: u32, config: &mut VmConfig) -> Result<(), FieldProblem> {
        let text = |text: &String| text.replace("{n}", &n.to_string());
        let path = |field: &str, path: &String| absolute(field, text(path));
        let end = |field: &str, wanted: Option<&String>| {
            wanted.map(|wanted| path(field, wanted)).transpose()
        };
        let no_device = |pointer: String, id: &str| {
            let detail = format!("the snapshot has no such device `{id}`");
            problem(&pointer, "no-such-device", detail)
        };
        for (index, wanted) in self.disks.iter().enumerate() {
            let mut disks = config.disks.iter_mut().flatten();
            let found = disks.find(|disk| disk.id.as_ref() == Some(&wanted.id));
            let pointer = format!("/overrides/disks/{index}/id");
            let disk = found.ok_or_else(|| no_device(pointer, &wanted.id))?;
            wanted.apply(path(&format!("disks/{index}/path"), &wanted.path)?, disk);
        }
        for (index, wanted) in self.net.iter().enumerate() {
            let mut nets = config.net.iter_mut().flatten();
            let found = nets.find(|net| net.id.as_ref() == Some(&wanted.id));
            let pointer = format!("/overrides/net/{index}");
            let net = found.ok_or_else(|| no_device(format!("{pointer}/id"), &wanted.id))?;
            if let Some(tap) = &wanted.tap {
                net.tap = Some(text(tap));
                net.fds = None;
            }
            if let Some(mac) = &wanted.mac {
                net.mac = Some(next_mac(mac, n).ok_or_else(|| {
                    let detail = format!("`{mac}` is not the MAC address of VM {n}");
                    problem(&format!("{pointer}/mac"), "out-of-range", detail)
                })?);
            }
        }
        if let Some(wanted) = &self.vsock {
            let vsock = config.vsock.as_mut();
            let vsock = vsock.ok_or_else(|| no_device("/overrides/vsock".to_owned(), "vsock"))?;
            if let Some(cid) = wanted.cid {
                // The configuration as a whole is checked later.
                vsock.cid = cid.saturating_add(u64::from(n) - 1);
            }
            if let Some(socket) = &wanted.socket {
                vsock.socket = path("vsock/socket", socket)?;
            }
        }
        if let Some(wanted) = &self.serial {
            config.serial = SerialConfig {
                file: end("serial/file", wanted.file.as_ref())?,
                socket: end("serial/socket", wanted.socket.as_ref())?,
                mode: wanted.mode,
            };
        }
        if let Some(wanted) = &self.console {
            let console = &mut config.console;
            if (wanted.mode == ConsoleMode::Off) != (console.mode == ConsoleMode::Off) {
                let detail = "a snapshot keeps its virtio console, or has none: `mode` cannot \
                              change from or to `Off`";
                let pointer = "/overrides/console/mode";
                return Err(problem(pointer, "not-possible", detail.to_owned()));
            }
            console.mode = wanted.mode;
            console.file = end("console/file", wanted.file.as_ref())?;
            console.socket = end("console/socket", wanted.socket.as_ref())?;
        }
        if let Some(wanted) = &self.debug_console {
            let saved = config.debug_console.as_ref();
            config.debug_console = Some(DebugConsoleConfig {
                file: end("debug_console/file", wanted.file.as_ref())?,
                mode: wanted.mode,
                iobase: wanted.iobase.or(saved.and_then(|saved| saved.iobase)),
            });
        }
        if let Some(wanted) = &self.tpm {
            let tpm = config.tpm.as_mut();
            let tpm = tpm.ok_or_else(|| no_device("/overrides/tpm".to_owned(), "tpm"))?;
            tpm.socket = path("tpm/socket", &wanted.socket)?;
        }
        Ok(())
    }
}

/// Fails if a path is relative: the client and the service are in different folders.
fn absolute(field: &str, path: String) -> Result<String, FieldProblem> {
    if Path::new(&path).is_absolute() {
        return Ok(path);
    }
    let detail = format!(
        "{path:?} must be an absolute path: a relative one would be below the folder of the service"
    );
    Err(problem(&format!("/overrides/{field}"), "invalid", detail))
}

/// Returns the MAC address of the VM with this number: the last three bytes count.
fn next_mac(first: &str, n: u32) -> Option<String> {
    let [a, b, c, d, e, f] = parse_mac(first)?;
    let last = u32::from_be_bytes([0, d, e, f]).checked_add(n.checked_sub(1)?)?;
    let [0, d, e, f] = last.to_be_bytes() else {
        return None;
    };
    Some(format!("{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{f:02x}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::PayloadConfig;

    fn config() -> VmConfig {
        let mut config = VmConfig::with_payload(PayloadConfig::default());
        config.disks = serde_json::from_str(r#"[{"id":"root","path":"/a"}]"#).unwrap();
        config.net =
            serde_json::from_str(r#"[{"id":"eth","tap":"t","mac":"02:00:00:00:00:01"}]"#).unwrap();
        config.vsock = serde_json::from_str(r#"{"cid":3,"socket":"/s"}"#).unwrap();
        config.debug_console = serde_json::from_str(r#"{"mode":"Null","iobase":1026}"#).unwrap();
        config.tpm = serde_json::from_str(r#"{"socket":"/tpm"}"#).unwrap();
        config
    }

    fn applied(overrides: &str, n: u32) -> Result<VmConfig, FieldProblem> {
        let overrides: Overrides = serde_json::from_str(overrides).unwrap();
        let mut config = config();
        overrides.apply(n, &mut config).map(|()| config)
    }

    #[test]
    fn overrides_count_through_the_vms() {
        let config = applied(
            r#"{"disks":[{"id":"root","path":"/over/{n}.qcow2"}],
                "net":[{"id":"eth","tap":"tap{n}","mac":"02:00:00:00:00:ff"}],
                "vsock":{"cid":100,"socket":"/run/{n}/{n}.sock"},
                "serial":{"mode":"File","file":"/log/{n}"},
                "console":{"mode":"Socket","socket":"/con/{n}"},
                "debug_console":{"mode":"File","file":"/debug/{n}"},
                "tpm":{"socket":"/tpm/{n}"}}"#,
            12,
        )
        .unwrap();
        assert_eq!(
            config.disks.unwrap()[0].path.as_deref(),
            Some("/over/12.qcow2")
        );
        let net = &config.net.unwrap()[0];
        assert_eq!(net.tap.as_deref(), Some("tap12"));
        assert_eq!(net.mac.as_deref(), Some("02:00:00:00:01:0a"));
        let vsock = config.vsock.unwrap();
        assert_eq!((vsock.cid, vsock.socket.as_str()), (111, "/run/12/12.sock"));
        assert_eq!(config.serial.file.as_deref(), Some("/log/12"));
        assert_eq!(config.console.socket.as_deref(), Some("/con/12"));
        assert_eq!(config.console.mode, ConsoleMode::Socket);
        assert_eq!(config.tpm.unwrap().socket, "/tpm/12");
        let debug = config.debug_console.unwrap();
        assert_eq!(
            (debug.file.as_deref(), debug.iobase),
            (Some("/debug/12"), Some(0x402))
        );
    }

    #[test]
    fn relative_paths_are_refused() {
        for (overrides, pointer) in [
            (r#"{"disks":[{"id":"root","path":"b{n}"}]}"#, "disks/0/path"),
            (r#"{"vsock":{"socket":"s"}}"#, "vsock/socket"),
            (r#"{"serial":{"mode":"File","file":"./s"}}"#, "serial/file"),
            (
                r#"{"serial":{"mode":"Socket","socket":"s"}}"#,
                "serial/socket",
            ),
            (r#"{"console":{"mode":"File","file":"c"}}"#, "console/file"),
            (
                r#"{"console":{"mode":"Socket","socket":"c"}}"#,
                "console/socket",
            ),
            (
                r#"{"debug_console":{"mode":"File","file":"d"}}"#,
                "debug_console/file",
            ),
            (r#"{"tpm":{"socket":""}}"#, "tpm/socket"),
        ] {
            let refused = applied(overrides, 1).unwrap_err();
            assert_eq!(refused.pointer, format!("/overrides/{pointer}"));
            assert!(refused.detail.contains("must be an absolute path"));
        }
    }

    #[test]
    fn format_of_another_image_is_said_or_detected() {
        let formats = |saved: &str, wanted: &str| {
            let mut config = config();
            let disks = format!(r#"[{{"id":"root","path":"/a"{saved}}}]"#);
            config.disks = serde_json::from_str(&disks).unwrap();
            let overrides = format!(r#"{{"disks":[{{"id":"root","path":"/b"{wanted}}}]}}"#);
            let overrides: Overrides = serde_json::from_str(&overrides).unwrap();
            overrides.apply(1, &mut config).unwrap();
            let disk = config.disks.unwrap().remove(0);
            (
                disk.image_type,
                disk.image_type_detected,
                disk.backing_files,
            )
        };
        let raw = r#","image_type":"Raw","image_type_detected":true"#;
        let qcow2 = r#","image_type":"Qcow2","backing_files":true"#;
        let (is_raw, is_qcow2) = (Some(ImageType::Raw), Some(ImageType::Qcow2));
        assert_eq!(formats(raw, ""), (None, false, false));
        assert_eq!(formats(raw, qcow2), (is_qcow2, false, true));
        assert_eq!(formats(qcow2, ""), (is_qcow2, false, true));
        let alone = r#","image_type":"Raw","backing_files":false"#;
        assert_eq!(formats(qcow2, alone), (is_raw, false, false));
    }

    #[test]
    fn absent_overrides_change_nothing() {
        assert_eq!(applied("{}", 1).unwrap(), config());
        let same = applied(r#"{"net":[{"id":"eth"}],"vsock":{}}"#, 1).unwrap();
        assert_eq!(same, config());
    }

    #[test]
    fn impossible_overrides_are_refused_by_name() {
        for (overrides, pointer) in [
            (
                r#"{"disks":[{"id":"no","path":"/x"}]}"#,
                "/overrides/disks/0/id",
            ),
            (r#"{"net":[{"id":"no"}]}"#, "/overrides/net/0/id"),
            (
                r#"{"net":[{"id":"eth","mac":"x"}]}"#,
                "/overrides/net/0/mac",
            ),
            (
                r#"{"net":[{"id":"eth","mac":"02:00:00:ff:ff:ff"}]}"#,
                "/overrides/net/0/mac",
            ),
            (r#"{"console":{"mode":"Off"}}"#, "/overrides/console/mode"),
        ] {
            assert_eq!(
                applied(overrides, 2).unwrap_err().pointer,
                pointer,
                "{overrides}"
            );
        }
    }

    #[test]
    fn overrides_add_no_tpm() {
        let overrides: Overrides = serde_json::from_str(r#"{"tpm":{"socket":"/t"}}"#).unwrap();
        let mut config = VmConfig::with_payload(PayloadConfig::default());
        let refused = overrides.apply(1, &mut config).unwrap_err();
        assert_eq!(refused.pointer, "/overrides/tpm");
    }

    #[test]
    fn names_are_counted_and_limited() {
        let name: VmId = "web".parse().unwrap();
        let names = fork_names(&name, 3).unwrap();
        assert_eq!(
            names.iter().map(VmId::as_str).collect::<Vec<_>>(),
            ["web-1", "web-2", "web-3"]
        );
        assert!(fork_names(&name, 0).is_err() && fork_names(&name, MAX_FORKS + 1).is_err());
        let long: VmId = "a".repeat(name_limit()).parse().unwrap();
        assert_eq!(fork_names(&long, 1).unwrap_err().pointer, "/name");
    }

    /// The longest name of a VM.
    fn name_limit() -> usize {
        let is_name = |len: &usize| "a".repeat(*len).parse::<VmId>().is_ok();
        (1..1000).take_while(is_name).last().unwrap()
    }
}
