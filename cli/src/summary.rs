//! The result of a migration, snapshot, restore or mirror, for a person.

use spec::{MigrationDowntime, MigrationInfo, MigrationPhase, MigrationRound, MigrationSide, VmId};

use crate::steps::steps;

const PAGE: u64 = 4096;

/// The kinds of operation, by what they move and where to.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Migration,
    /// Copies a disk.
    Mirror,
    /// Writes to a folder; the merge of a chain of snapshots, too.
    Snapshot,
    /// Reads from a folder, or from a VM that is forked.
    Restore,
}

impl Kind {
    fn of(info: &MigrationInfo) -> Self {
        let is_local = ["file://", "fork:"]
            .iter()
            .any(|scheme| info.endpoint.starts_with(scheme));
        match info.side {
            _ if info.disk.is_some() => Self::Mirror,
            MigrationSide::Source if is_local => Self::Snapshot,
            MigrationSide::Destination if is_local => Self::Restore,
            MigrationSide::Source | MigrationSide::Destination => Self::Migration,
        }
    }
}

/// Describes the result for a person.
pub(crate) fn summary(info: &MigrationInfo) -> String {
    let kind = Kind::of(info);
    let vm = info.vm.as_ref().map_or("a VM", VmId::as_str);
    let vm = match &info.disk {
        Some(disk) => format!("disk {disk} of {vm}"),
        None => vm.to_owned(),
    };
    let how = match info.side {
        MigrationSide::Source => format!("{vm} to {}", info.endpoint),
        MigrationSide::Destination => format!("{vm} at {}", info.endpoint),
    };
    let mut lines = vec![format!("{}: {how}", info.phase)];
    let mut line = |name: &str, value: String| lines.push(format!("  {name:<12} {value}"));
    line("took", ms(info.elapsed_us));
    if kind == Kind::Mirror {
        let sent = info.sent_bytes >> 20;
        let rounds = counted(info.rounds.into(), "round");
        line("written", format!("{sent} MiB in {rounds}"));
    }
    if info.memory_bytes > 0 {
        line("memory", memory(info, kind));
    }
    if info.disk_bytes > 0 {
        line("disks", disks(info, kind));
    }
    for base in &info.bases {
        line("base", base.to_string());
    }
    if let [first, .., last] = &info.history[..] {
        line(
            "left",
            format!(
                "{} {} after round {}, {} after round {}",
                curve(&info.history),
                counted(first.dirty_pages, "page"),
                first.round,
                last.dirty_pages,
                last.round
            ),
        );
    }
    if !info.timeline.is_empty() {
        line("steps", steps(&info.timeline));
    }
    if let Some(downtime) = &info.downtime {
        line("stop", stop(info, downtime, kind));
    }
    if info.faults > 0 {
        line("faults", faults(info));
    }
    if let Some(us) = info.first_instruction_us {
        line("guest runs", format!("after {}", ms(us)));
    }
    if let Some(pages) = info.working_set_pages {
        let brought = info
            .working_set_us
            .map(|us| format!(", brought after {}", ms(us)));
        let brought = brought.unwrap_or_default();
        line(
            "working set",
            format!("{}{brought}", counted(pages, "page")),
        );
    }
    if let Some(error) = &info.error {
        line("error", format!("{} ({})", error.detail, error.code));
    }
    lines.join("\n")
}

fn memory(info: &MigrationInfo, kind: Kind) -> String {
    let MigrationInfo {
        pages, zero_pages, ..
    } = info;
    let (size, full) = (info.memory_bytes >> 20, pages.saturating_mul(PAGE) >> 20);
    let zeros = format!("{} of zeros", counted(*zero_pages, "page"));
    let written = format!("{size} MiB, of which {full} written; {zeros}");
    match kind {
        Kind::Snapshot => {
            // An increment has fewer pages than the memory.
            let seen = pages
                .saturating_add(*zero_pages)
                .saturating_add(info.remaining_pages);
            match (info.memory_bytes / PAGE).saturating_sub(seen) {
                0 => written,
                same => format!("{written}, {same} as in the base"),
            }
        }
        Kind::Restore => format!("{size} MiB, of which {full} read; {zeros}"),
        Kind::Migration | Kind::Mirror => format!(
            "{size} MiB; {} and {} sent in {} over {}: {} MiB",
            counted(*pages, "page"),
            counted(*zero_pages, "zero page"),
            counted(info.rounds.into(), "round"),
            counted(info.connections.into(), "connection"),
            info.sent_bytes >> 20,
        ),
    }
}

fn disks(info: &MigrationInfo, kind: Kind) -> String {
    let copied = info.disk_bytes.saturating_sub(info.disk_remaining_bytes);
    let (copied, all) = (copied >> 20, info.disk_bytes >> 20);
    // Until the guest has come, a destination does not know how much is left.
    let is_arriving = !matches!(
        info.phase,
        MigrationPhase::Postcopy | MigrationPhase::PostcopyPaused | MigrationPhase::Completed
    );
    if kind == Kind::Migration && info.side == MigrationSide::Destination && is_arriving {
        let came = info.sent_bytes >> 20;
        return format!("{all} MiB; {came} MiB of memory and disks have arrived");
    }
    let disks = format!("{all} MiB, of which {copied} copied");
    if kind != Kind::Snapshot {
        return disks;
    }
    let content = info
        .sent_bytes
        .saturating_sub(info.pages.saturating_mul(PAGE))
        >> 20;
    let rounds = counted(info.rounds.into(), "round");
    format!("{disks}: {content} MiB of content in {rounds}")
}

/// The parts of the stop.
fn stop(info: &MigrationInfo, stop: &MigrationDowntime, kind: Kind) -> String {
    let (total, pause, save) = (ms(stop.total_us), ms(stop.pause_us), ms(stop.save_us));
    let (transfer, hand_over) = (ms(stop.transfer_us), ms(stop.hand_over_us));
    let blocks = counted(stop.pages, "block");
    match kind {
        // A live snapshot: nothing is sent or handed over.
        Kind::Snapshot | Kind::Restore => {
            let protect = ms(stop.protect_us);
            let disks = match info.disk_bytes {
                0 => String::new(),
                _ => format!("last {blocks} of disks {transfer}, "),
            };
            format!("{total}: pause {pause}, save {save}, {disks}protect memory {protect}")
        }
        Kind::Mirror => format!(
            "of the disk {total}: pause {pause}, last {blocks} {transfer}, switch {hand_over}"
        ),
        Kind::Migration => {
            let predicted = info.predicted_downtime_us;
            let predicted =
                predicted.map_or_else(String::new, |us| format!(" (predicted {})", ms(us)));
            let verify = match stop.verify_us {
                0 => String::new(),
                us => format!(", verify {}", ms(us)),
            };
            format!(
                "{total}{predicted}: pause {pause}, last {} and save {save}, transfer and load \
                 {transfer}{verify}, hand-over {hand_over}",
                counted(stop.pages, "page")
            )
        }
    }
}

fn faults(info: &MigrationInfo) -> String {
    if info.fault_p99_us == 0 {
        // A live snapshot, which does not measure how long the guest waited: some ten microseconds.
        return format!("{} that the guest waited for", counted(info.faults, "page"));
    }
    format!(
        "{} ({} of disks), median wait {}, 99 % within {}",
        info.faults,
        info.disk_faults,
        ms(info.fault_p50_us),
        ms(info.fault_p99_us)
    )
}

/// Formats a number of things, which a person reads: `1 round`, `2 rounds`.
pub(crate) fn counted(number: u64, thing: &str) -> String {
    match number {
        1 => format!("1 {thing}"),
        number => format!("{number} {thing}s"),
    }
}

/// Formats microseconds as milliseconds.
pub(crate) fn ms(us: u64) -> String {
    format!("{}.{:01} ms", us / 1000, us % 1000 / 100)
}

/// How the pages that were left after each round became fewer: a column for each of the last rounds, on a
/// logarithmic scale, since a guest that converges leaves a part of them each time.
pub(crate) fn curve(history: &[MigrationRound]) -> String {
    const COLUMNS: [char; 8] = ['▁', '▂', '▃', '▄', '▅', '▆', '▇', '█'];
    const SHOWN: usize = 24;
    let shown = &history[history.len().saturating_sub(SHOWN)..];
    let height = |pages: u64| (pages.saturating_add(1)).ilog2();
    let most = shown.iter().map(|round| height(round.dirty_pages)).max();
    let most = most.unwrap_or(0).max(1);
    let column = |round: &MigrationRound| {
        let level = height(round.dirty_pages) * 7 / most;
        COLUMNS.get(level as usize).copied().unwrap_or('█')
    };
    shown.iter().map(column).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn curve_shows_how_rounds_became_smaller() {
        let round = |dirty_pages: u64| MigrationRound {
            round: 1,
            pages: 0,
            took_us: 1,
            bytes_per_second: 1,
            dirty_pages,
            predicted_downtime_us: 1,
            throttle_percent: 0,
        };
        let of = |left: &[u64]| curve(&left.iter().map(|pages| round(*pages)).collect::<Vec<_>>());
        assert_eq!(of(&[65_535, 4_095, 255, 0]), "█▆▄▁");
        assert_eq!(of(&[0, 0]), "▁▁");
        assert_eq!(of(&[u64::MAX, 1]), "█▁");
        assert_eq!(of(&vec![5; 100]).chars().count(), 24);
        assert_eq!(of(&[]), "");
    }

    fn operation(side: &str, endpoint: &str) -> MigrationInfo {
        let info = serde_json::json!({
            "id": "a", "side": side, "vm": "web", "endpoint": endpoint, "started_ms": 1,
            "elapsed_us": 1500, "phase": "completed", "memory_bytes": 8 << 20, "pages": 512,
            "zero_pages": 1000, "sent_bytes": 5 << 20, "rounds": 2, "connections": 0,
            "remaining_pages": 0, "dirty_pages_per_second": 0, "bytes_per_second": 0,
            "faults": 0, "fault_p50_us": 0, "fault_p99_us": 0, "throttle_percent": 0,
            "max_downtime_ms": null, "eta_us": null, "predicted_downtime_us": null, "downtime": null,
        });
        serde_json::from_value(info).unwrap()
    }

    #[test]
    fn stop_has_the_parts_that_there_were() {
        let mut migration = operation("source", "unix:/s");
        migration.downtime = Some(MigrationDowntime {
            total_us: 2000,
            pages: 7,
            ..MigrationDowntime::default()
        });
        let text = summary(&migration);
        assert!(text.contains("2.0 ms: pause 0.0 ms"), "{text}");
        assert!(!text.contains("verify"), "{text}");
        migration.predicted_downtime_us = Some(1500);
        migration.downtime.as_mut().unwrap().verify_us = 900;
        let text = summary(&migration);
        assert!(text.contains("2.0 ms (predicted 1.5 ms): pause"), "{text}");
        assert!(text.contains("verify 0.9 ms, hand-over"), "{text}");
    }

    /// A snapshot sends nothing, and has no connections.
    #[test]
    fn snapshots_and_restores_have_words_of_their_own() {
        let mut snapshot = operation("source", "file:///s");
        snapshot.disk_bytes = 64 << 20;
        snapshot.downtime = Some(MigrationDowntime {
            total_us: 900,
            protect_us: 100,
            pages: 7,
            ..MigrationDowntime::default()
        });
        let text = summary(&snapshot);
        for part in [
            "memory       8 MiB, of which 2 written; 1000 pages of zeros, 536 as in the base\n",
            "disks        64 MiB, of which 64 copied: 3 MiB of content in 2 rounds\n",
            "last 7 blocks of disks 0.0 ms, protect memory 0.1 ms",
        ] {
            assert!(text.contains(part), "{part:?} in {text}");
        }
        for (side, endpoint) in [("destination", "file:///s"), ("destination", "fork:web")] {
            let text = summary(&operation(side, endpoint));
            assert!(
                text.contains("8 MiB, of which 2 read; 1000 pages of zeros"),
                "{text}"
            );
            assert!(!text.contains("connections"), "{text}");
        }
        let mut migration = operation("source", "unix:/s");
        for (number, part) in [
            (
                2,
                "2 pages and 2 zero pages sent in 2 rounds over 2 connections: 5 MiB",
            ),
            (
                1,
                "1 page and 1 zero page sent in 1 round over 1 connection: 5 MiB",
            ),
        ] {
            (migration.pages, migration.zero_pages) = (number, number);
            migration.rounds = u32::try_from(number).unwrap();
            migration.connections = u16::try_from(number).unwrap();
            let text = summary(&migration);
            assert!(text.contains(part), "{text}");
        }
        let mut arriving = operation("destination", "unix:/s");
        arriving.disk_bytes = 64 << 20;
        assert!(summary(&arriving).contains("64 MiB, of which 64 copied"));
        arriving.phase = MigrationPhase::Precopy;
        let text = summary(&arriving);
        assert!(
            text.contains("64 MiB; 5 MiB of memory and disks have arrived"),
            "{text}"
        );
    }
}
