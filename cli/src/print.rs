//! Output: tables for people, JSON for programs.

use std::io::{self, IsTerminal, Write};

use anyhow::Result;
use comfy_table::Table;
use comfy_table::presets::NOTHING;
use serde::Serialize;
use spec::{MigrationInfo, MigrationSide, VmCounters, VmInfo, VmSummary, VmmPingResponse};

/// Which of the two.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Printer {
    json: bool,
}

impl Printer {
    /// Prints JSON if it was asked for, or if standard output is not a terminal.
    pub(crate) fn new(json: bool) -> Self {
        Self {
            json: json || !io::stdout().is_terminal(),
        }
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

fn table<const N: usize>(rows: impl IntoIterator<Item = [String; N]>) -> String {
    let mut table = Table::new();
    table.load_style(NOTHING);
    rows.into_iter().for_each(|row| {
        table.add_row(row);
    });
    table.trim_fmt()
}

pub(crate) fn ping(vmm: &VmmPingResponse) -> String {
    format!("whimbrel {} (process {})", vmm.version, vmm.pid)
}

pub(crate) fn list(vms: &[VmSummary]) -> String {
    if vms.is_empty() {
        return "no VMs; `wh-remote --vm ID create FILE` makes one".to_owned();
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

pub(crate) fn info(vm: &VmInfo) -> String {
    let text = |value: &Option<String>| value.clone().unwrap_or_else(|| "-".to_owned());
    let serial = &vm.config.serial;
    let path = serial.file.as_ref().or(serial.socket.as_ref());
    let mut rows = vec![
        ["state".to_owned(), vm.state.to_string()],
        ["vcpus".to_owned(), vm.config.cpus.boot_vcpus.to_string()],
        ["memory".to_owned(), bytes(vm.memory_actual_size)],
        ["kernel".to_owned(), text(&vm.config.payload.kernel)],
        ["initramfs".to_owned(), text(&vm.config.payload.initramfs)],
        ["cmdline".to_owned(), text(&vm.config.payload.cmdline)],
        [
            "serial".to_owned(),
            format!("{:?} {}", serial.mode, path.map_or("", String::as_str))
                .trim_end()
                .to_owned(),
        ],
    ];
    let boot = vm.boot.unwrap_or_default();
    for (name, us) in [
        ("built after", boot.built_us),
        ("first serial byte after", boot.first_serial_us),
    ] {
        rows.extend(us.map(|us| [name.to_owned(), format!("{us} us")]));
    }
    if let Some(failure) = &vm.failure {
        rows.push([
            "failure".to_owned(),
            format!("{} ({})", failure.detail, failure.code),
        ]);
    }
    table(rows)
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
    fn sizes_are_whole_numbers() {
        assert_eq!(
            ["0 B", "4 KiB", "1536 MiB", "2 GiB", "4097 B"],
            [0, 4096, 1536 << 20, 2 << 30, 4097].map(bytes)
        );
    }
}
