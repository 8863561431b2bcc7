//! Output: tables for people, JSON for programs.

use std::io::{self, Write};
use std::path::Path;

use anyhow::Result;
use comfy_table::Table;
use comfy_table::presets::NOTHING;
use serde::Serialize;
use spec::{
    ConsoleMode, DiskConfig, MigrationInfo, MigrationSide, NetConfig, OverlayInfo, OverlayState,
    PendingResize, ResizeResource, VmCounters, VmInfo, VmSummary, VmmPingResponse,
};

/// The form of the output: text or JSON.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Printer {
    json: bool,
}

impl Printer {
    /// Prints JSON if the user asked for it, or started the program as `ch-remote`.
    pub(crate) fn new(json: bool) -> Self {
        let program = std::env::args_os().next().unwrap_or_default();
        let is_ch_remote = Path::new(&program).file_name() == Some("ch-remote".as_ref());
        Self {
            json: json || is_ch_remote,
        }
    }

    pub(crate) fn is_json(self) -> bool {
        self.json
    }

    /// The value as JSON, or as `people` shows it.
    pub(crate) fn show<T: Serialize>(
        self,
        value: &T,
        people: impl FnOnce(&T) -> String,
    ) -> Result<()> {
        if self.json {
            line(&serde_json::to_string_pretty(value)?)
        } else {
            line(people(value).trim_end())
        }
    }

    /// For what comes piece by piece: a line each.
    pub(crate) fn show_line<T: Serialize>(
        self,
        value: &T,
        people: impl FnOnce(&T) -> String,
    ) -> Result<()> {
        if self.json {
            line(&serde_json::to_string(value)?)
        } else {
            line(&people(value))
        }
    }
}

/// A line on standard output. (`println!` would panic where the reader has gone.)
pub(crate) fn line(text: &str) -> Result<()> {
    Ok(writeln!(io::stdout(), "{text}")?)
}

/// Bytes on standard output, at once.
pub(crate) fn raw(bytes: &[u8]) -> Result<()> {
    let mut stdout = io::stdout();
    stdout.write_all(bytes)?;
    Ok(stdout.flush()?)
}

/// A line each.
pub(crate) fn overlays(all: &[OverlayInfo]) -> String {
    let head = ["OVERLAY", "SIZE", "STATE", "REASON"].map(str::to_owned);
    let rows = all.iter().map(|overlay| {
        let state = match overlay.state {
            OverlayState::Unused => "unused",
            OverlayState::InUse => "in use",
            OverlayState::Backing => "backing",
            OverlayState::Snapshot => "snapshot",
            OverlayState::Removed => "removed",
        };
        let size = bytes(overlay.bytes);
        let reason = overlay.reason.clone().unwrap_or_default();
        [overlay.path.clone(), size, state.to_owned(), reason]
    });
    table(std::iter::once(head).chain(rows))
}

/// A line each.
pub(crate) fn migrations(all: &[MigrationInfo]) -> String {
    let head = ["ID", "VM", "SIDE", "ENDPOINT", "PHASE", "SENT"].map(str::to_owned);
    let rows = all.iter().map(|info| {
        let side = match info.side {
            MigrationSide::Source => "source",
            MigrationSide::Destination => "destination",
        };
        [
            info.id.clone(),
            info.vm
                .as_ref()
                .map(ToString::to_string)
                .unwrap_or_default(),
            side.to_owned(),
            info.endpoint.clone(),
            info.phase.to_string(),
            format!("{} MiB", info.sent_bytes >> 20),
        ]
    });
    table(std::iter::once(head).chain(rows))
}

pub(crate) fn table<const N: usize>(rows: impl IntoIterator<Item = [String; N]>) -> String {
    let mut table = Table::new();
    table.load_style(NOTHING);
    rows.into_iter().for_each(|row| {
        table.add_row(row);
    });
    table.trim_fmt()
}

pub(crate) fn ping(vmm: &VmmPingResponse) -> String {
    // On Cloud Hypervisor's face `version` is the one that the program claims to be.
    format!("{} (process {})", vmm.build_version, vmm.pid)
}

pub(crate) fn list(vms: &[VmSummary]) -> String {
    if vms.is_empty() {
        return "no VMs; `wh-remote --vm ID create FILE` creates one".to_owned();
    }
    let heads = ["ID", "STATE", "VCPUS", "MEMORY", "API SOCKET"].map(str::to_owned);
    let rows = vms.iter().map(|vm| {
        let socket = vm.api_socket.clone().unwrap_or_default();
        [
            vm.id.to_string(),
            vm.state.to_string(),
            vm.vcpus.to_string(),
            bytes(vm.memory),
            socket,
        ]
    });
    table(std::iter::once(heads).chain(rows))
}

/// With the largest unit that leaves a whole number.
fn bytes(count: u64) -> String {
    let units = [(40, "TiB"), (30, "GiB"), (20, "MiB"), (10, "KiB")];
    let unit = units
        .iter()
        .find(|(shift, _)| count > 0 && count.trailing_zeros() >= *shift);
    unit.map_or_else(
        || format!("{count} B"),
        |(shift, unit)| format!("{} {unit}", count >> shift),
    )
}

/// How many vCPUs the guest has, and how many it can have.
fn vcpus(vm: &VmInfo) -> String {
    let cpus = &vm.config.cpus;
    let actual = vm.vcpus_actual_count.unwrap_or(cpus.boot_vcpus);
    match cpus.max_vcpus > cpus.boot_vcpus.max(actual) {
        true => format!("{actual} of {}", cpus.max_vcpus),
        false => actual.to_string(),
    }
}

/// A resize that the guest has not completed.
pub(crate) fn pending(resize: &PendingResize) -> String {
    let amount = |count| match resize.resource {
        ResizeResource::Vcpus => format!("{count}"),
        ResizeResource::Memory => bytes(count),
    };
    let [from, to, actual] = [resize.from, resize.to, resize.actual].map(amount);
    let zone = resize.zone.as_ref();
    let zone = zone.map_or_else(String::new, |zone| format!(" zone {zone}"));
    format!("{}{zone}: {from} to {to}, {actual} now", resize.resource)
}

/// The state and what explains it, then what the VM has.
pub(crate) fn info(vm: &VmInfo) -> String {
    let config = &vm.config;
    let mut rows = vec![("state", vm.state.to_string())];
    if let Some(failure) = &vm.failure {
        rows.push(("failure", format!("{} ({})", failure.detail, failure.code)));
    }
    rows.push(("vcpus", vcpus(vm)));
    let mut memory = bytes(vm.memory_actual_size);
    let zones = config.memory.all_zones().into_iter();
    let room = zones.fold(0_u64, |room, zone| {
        room.saturating_add(zone.hotplug_region())
    });
    if room > 0 {
        let most = config.memory.boot_size().saturating_add(room);
        memory = format!("{memory} (of at most {})", bytes(most));
    }
    rows.push(("memory", memory));
    let resizes = vm.pending_resizes.iter();
    rows.extend(resizes.map(|resize| ("resize", pending(resize))));
    rows.extend(
        config
            .disks
            .iter()
            .flatten()
            .map(|disk| ("disk", disk_line(disk))),
    );
    rows.extend(
        config
            .net
            .iter()
            .flatten()
            .map(|net| ("net", net_line(net))),
    );
    if let Some(vsock) = &config.vsock {
        rows.push(("vsock", format!("cid {} at {}", vsock.cid, vsock.socket)));
    }
    if let Some(balloon) = &config.balloon {
        rows.push(("balloon", bytes(balloon.size)));
    }
    let (serial, console) = (&config.serial, &config.console);
    rows.push((
        "serial",
        port_line(serial.mode, [&serial.file, &serial.socket]),
    ));
    rows.push((
        "console",
        port_line(console.mode, [&console.file, &console.socket]),
    ));
    if let Some(debug) = &config.debug_console {
        rows.push(("debug", port_line(debug.mode, [&debug.file, &None])));
    }
    let payload = &config.payload;
    for (name, value) in [
        ("firmware", &payload.firmware),
        ("kernel", &payload.kernel),
        ("initramfs", &payload.initramfs),
        ("cmdline", &payload.cmdline),
    ] {
        rows.extend(value.iter().map(|value| (name, value.clone())));
    }
    let boot = vm.boot.unwrap_or_default();
    for (name, us) in [
        ("built after", boot.built_us),
        ("first serial byte after", boot.first_serial_us),
    ] {
        rows.extend(us.map(|us| (name, format!("{us} us"))));
    }
    table(
        rows.into_iter()
            .map(|(name, value)| [name.to_owned(), value]),
    )
}

fn disk_line(disk: &DiskConfig) -> String {
    let id = disk.id.as_deref().unwrap_or("-");
    let path = disk.path.as_deref().unwrap_or("-");
    let access = if disk.readonly { ", read-only" } else { "" };
    format!("{id}: {path}{access}")
}

fn net_line(net: &NetConfig) -> String {
    let id = net.id.as_deref().unwrap_or("-");
    let mac = net.mac.as_deref().unwrap_or("-");
    let tap = net.tap.as_deref().unwrap_or("-");
    format!("{id}: mac {mac}, tap {tap}")
}

fn port_line(mode: ConsoleMode, paths: [&Option<String>; 2]) -> String {
    let path = paths.into_iter().flatten().next();
    path.map_or_else(|| format!("{mode:?}"), |path| format!("{mode:?} {path}"))
}

pub(crate) fn counters(counters: &VmCounters) -> String {
    let rows = counters.iter().flat_map(|(device, counts)| {
        counts
            .iter()
            .map(move |(name, count)| [device.clone(), name.clone(), count.to_string()])
    });
    table(rows)
}

pub(crate) fn event(event: &spec::Event) -> String {
    let detail = event
        .detail
        .as_ref()
        .map_or_else(String::new, |detail| format!(": {detail}"));
    format!(
        "{:>6}  {}  {}{detail}",
        event.sequence, event.vm, event.event
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn info_shows_state_and_failure_first() {
        let vm = serde_json::json!({
            "state": "Shutdown", "memory_actual_size": 1 << 29,
            "failure": { "code": "triple-fault", "detail": "vCPU 0 met a triple fault" },
            "config": {
                "payload": { "kernel": "/k" },
                "disks": [{ "path": "/d", "id": "root", "readonly": true }],
                "net": [{ "id": "n", "mac": "52:54:00:00:00:01", "tap": "tap0" }],
                "vsock": { "cid": 3, "socket": "/v" },
                "balloon": { "size": 4096 },
                "serial": { "mode": "File", "file": "/log" },
            },
        });
        let text = info(&serde_json::from_value(vm).unwrap());
        let rows: Vec<String> = text
            .lines()
            .map(|row| row.split_whitespace().collect::<Vec<_>>().join(" "))
            .collect();
        let expected = [
            "state Shutdown",
            "failure vCPU 0 met a triple fault (triple-fault)",
            "vcpus 1",
            "memory 512 MiB",
            "disk root: /d, read-only",
            "net n: mac 52:54:00:00:00:01, tap tap0",
            "vsock cid 3 at /v",
            "balloon 4 KiB",
            "serial File /log",
        ];
        assert_eq!(rows[..expected.len()], expected);
    }

    #[test]
    fn sizes_are_whole_numbers() {
        assert_eq!(
            ["0 B", "4 KiB", "1536 MiB", "2 GiB", "4097 B"],
            [0, 4096, 1536 << 20, 2 << 30, 4097].map(bytes)
        );
    }
}
