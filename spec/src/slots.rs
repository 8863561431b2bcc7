//! The places on the PCI buses that devices of a configuration ask for.

use std::collections::{BTreeMap, HashSet};

use crate::console::ConsoleMode;
use crate::limits;
use crate::service::FieldProblem;
use crate::validate::problem;
use crate::vm::VmConfig;

/// A place that a device asks for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct WantedPlace {
    /// The PCI segment.
    pub segment: u16,
    /// The slot on the segment's bus; any when absent.
    pub slot: Option<u8>,
}

/// A device whose configuration can name a place.
struct Placed<'a> {
    pointer: String,
    id: Option<&'a String>,
    place: WantedPlace,
}

/// Returns the devices that can name a place.
fn placed(config: &VmConfig) -> Vec<Placed<'_>> {
    let mut all = Vec::new();
    let mut add = |pointer: String, id, segment: Option<u16>, slot| {
        let segment = segment.unwrap_or(0);
        let place = WantedPlace { segment, slot };
        all.push(Placed { pointer, id, place });
    };
    for (i, disk) in config.disks.iter().flatten().enumerate() {
        let (id, slot) = (disk.id.as_ref(), disk.pci_device_id);
        add(format!("/disks/{i}"), id, disk.pci_segment, slot);
    }
    for (i, net) in config.net.iter().flatten().enumerate() {
        let (id, slot) = (net.id.as_ref(), net.pci_device_id);
        add(format!("/net/{i}"), id, net.pci_segment, slot);
    }
    if let Some(one) = &config.vsock {
        let (id, slot) = (one.id.as_ref(), one.pci_device_id);
        add("/vsock".to_owned(), id, one.pci_segment, slot);
    }
    if let Some(one) = &config.balloon {
        let (id, slot) = (one.id.as_ref(), one.pci_device_id);
        add("/balloon".to_owned(), id, one.pci_segment, slot);
    }
    let (console, rng) = (&config.console, &config.rng);
    if console.mode != ConsoleMode::Off {
        let (id, slot) = (console.id.as_ref(), console.pci_device_id);
        add("/console".to_owned(), id, console.pci_segment, slot);
    }
    let (id, slot) = (rng.id.as_ref(), rng.pci_device_id);
    add("/rng".to_owned(), id, rng.pci_segment, slot);
    all
}

/// Checks that segments exist, that no two devices ask for one slot, and that the others have room
/// beside them.
pub(crate) fn check(config: &VmConfig, found: &mut Vec<FieldProblem>) {
    let mut taken = HashSet::new();
    let all = placed(config);
    for Placed { pointer, place, .. } in &all {
        found.extend(config.segment_problem(pointer, place.segment));
        if let Some(slot) = place.slot
            && !taken.insert((place.segment, slot))
        {
            let pointer = format!("{pointer}/pci_device_id");
            let detail = format!("another device has the `pci_device_id` {slot}");
            found.push(problem(&pointer, "duplicate", detail));
        }
    }
    for segment in 0..config.pci_segment_count() {
        let taken = taken.iter().filter(|(of, _)| *of == segment).count();
        let left = usize::from(limits::PCI_SLOTS).saturating_sub(taken);
        let there = |placed: &&Placed<'_>| placed.place.segment == segment;
        // Devices that cannot name a place are in segment 0.
        let unnamed = match segment {
            0 => config.bus_device_count().saturating_sub(all.len()),
            _ => 0,
        };
        let named = all.iter().filter(there).count();
        let others = named.saturating_add(unnamed).saturating_sub(taken);
        if others > left * limits::PCI_FUNCTIONS {
            let detail = format!(
                "{others} devices of segment {segment} have no `pci_device_id`, and the other \
                 devices leave {left} slots, enough for {}",
                left * limits::PCI_FUNCTIONS
            );
            found.push(problem("/disks", "out-of-range", detail));
        }
    }
}

impl VmConfig {
    /// Returns the places that devices ask for, by their names.
    #[must_use]
    pub fn wanted_places(&self) -> BTreeMap<String, WantedPlace> {
        let all = placed(self).into_iter();
        all.filter_map(|placed| Some((placed.id?.clone(), placed.place)))
            .collect()
    }

    /// Returns the number of PCI segments, at least 1.
    #[must_use]
    pub fn pci_segment_count(&self) -> u16 {
        let asked = self.platform.as_ref().and_then(|all| all.num_pci_segments);
        asked.unwrap_or(1).clamp(1, limits::PCI_SEGMENTS)
    }

    /// Returns the weights of each segment's share of the PCI windows below and above 4 GiB.
    #[must_use]
    pub fn pci_segment_weights(&self) -> Vec<[u32; 2]> {
        let weight = |segment: u16| {
            let mut configured = self.pci_segments.iter().flatten();
            let found = configured.find(|one| one.pci_segment == segment);
            let low = found.and_then(|one| one.mmio32_aperture_weight);
            let high = found.and_then(|one| one.mmio64_aperture_weight);
            [low.unwrap_or(1), high.unwrap_or(1)]
        };
        (0..self.pci_segment_count()).map(weight).collect()
    }

    /// Returns the problem of a device at `pointer` that asks for this segment, if it does not exist.
    #[must_use]
    pub fn segment_problem(&self, pointer: &str, segment: u16) -> Option<FieldProblem> {
        let count = self.pci_segment_count();
        (segment >= count).then(|| {
            let detail = format!(
                "`pci_segment` ({segment}) must be less than `platform.num_pci_segments` ({count})"
            );
            problem(&format!("{pointer}/pci_segment"), "out-of-range", detail)
        })
    }

    /// Checks the number of segments, and their weights.
    pub(crate) fn check_segments(&self, found: &mut Vec<FieldProblem>) {
        let asked = self.platform.as_ref().and_then(|all| all.num_pci_segments);
        let most = limits::PCI_SEGMENTS;
        if let Some(count) = asked.filter(|count| !(1..=most).contains(count)) {
            let pointer = "/platform/num_pci_segments";
            let detail = format!("`num_pci_segments` ({count}) is not between 1 and {most}");
            found.push(problem(pointer, "out-of-range", detail));
        }
        let mut seen = HashSet::new();
        for (i, segment) in self.pci_segments.iter().flatten().enumerate() {
            let pointer = format!("/pci_segments/{i}");
            found.extend(self.segment_problem(&pointer, segment.pci_segment));
            if !seen.insert(segment.pci_segment) {
                let detail = format!("segment {} is listed twice", segment.pci_segment);
                found.push(problem(&pointer, "duplicate", detail));
            }
            for (field, weight) in [
                ("mmio32_aperture_weight", segment.mmio32_aperture_weight),
                ("mmio64_aperture_weight", segment.mmio64_aperture_weight),
            ] {
                if weight == Some(0) {
                    let detail = format!("`{field}` (0) must be at least 1");
                    found.push(problem(
                        &format!("{pointer}/{field}"),
                        "out-of-range",
                        detail,
                    ));
                }
            }
        }
    }

    /// All functions of the buses but the host bridges.
    fn bus_device_count(&self) -> usize {
        self.device_count().saturating_add(self.pvpanic.into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slots_are_asked_for_once() {
        let found = |json: &str| {
            let config: VmConfig = serde_json::from_str(json).unwrap();
            let mut found = Vec::new();
            check(&config, &mut found);
            let named = found.into_iter().map(|p| (p.pointer, p.code));
            (named.collect::<Vec<_>>(), config.wanted_places())
        };
        let (good, slots) = found(
            r#"{"payload":{}, "disks":[{"path":"/a","id":"a","pci_device_id":31},{"path":"/b"}],
                "rng":{"src":"/r","id":"__rng","pci_device_id":1},
                "console":{"mode":"Off","id":"__console","pci_device_id":1}}"#,
        );
        assert_eq!(good, []);
        let at = |slot| WantedPlace {
            segment: 0,
            slot: Some(slot),
        };
        assert_eq!(
            slots,
            BTreeMap::from([("a".into(), at(31)), ("__rng".into(), at(1))])
        );
        let (bad, _) = found(
            r#"{"payload":{}, "net":[{"pci_device_id":5}], "balloon":{"size":0,"pci_device_id":5}}"#,
        );
        assert_eq!(
            bad,
            [("/balloon/pci_device_id".to_owned(), "duplicate".to_owned())]
        );
        // 28 slots are taken: three are left, for 24 devices.
        let with_others = |others: usize| {
            let disk =
                |slot: Option<usize>| serde_json::json!({"path": "/a", "pci_device_id": slot});
            let disks = (1..=28).map(|slot| disk(Some(slot)));
            let disks: Vec<_> = disks.chain((0..others).map(|_| disk(None))).collect();
            let config = serde_json::json!({"payload": {}, "disks": disks});
            found(&config.to_string()).0
        };
        // With the console and the entropy device.
        assert_eq!(with_others(22), []);
        assert_eq!(
            with_others(23),
            [("/disks".to_owned(), "out-of-range".to_owned())]
        );
    }
    #[test]
    fn each_segment_has_slots_of_its_own() {
        let found = |segments: &str, devices: &str| {
            let config = format!(
                r#"{{"payload":{{}},"platform":{{"num_pci_segments":3}},"pci_segments":{segments},
                    "disks":{devices}}}"#
            );
            let config: VmConfig = crate::parse(config.as_bytes()).unwrap();
            let mut found = Vec::new();
            check(&config, &mut found);
            config.check_segments(&mut found);
            let named = found.into_iter().map(|p| (p.pointer, p.code));
            (named.collect::<Vec<_>>(), config.pci_segment_weights())
        };
        let (good, weights) = found(
            r#"[{"pci_segment":1,"mmio32_aperture_weight":4}]"#,
            r#"[{"path":"/a","pci_device_id":5},{"path":"/b","pci_segment":2,"pci_device_id":5}]"#,
        );
        assert_eq!(good, []);
        assert_eq!(weights, [[1, 1], [4, 1], [1, 1]]);
        let one = |pointer: &str, code: &str| vec![(pointer.to_owned(), code.to_owned())];
        for (segments, devices, pointer, code) in [
            (
                "[]",
                r#"[{"path":"/a","pci_segment":3}]"#,
                "/disks/0/pci_segment",
                "out-of-range",
            ),
            (
                r#"[{"pci_segment":3}]"#,
                "[]",
                "/pci_segments/0/pci_segment",
                "out-of-range",
            ),
            (
                r#"[{"pci_segment":1},{"pci_segment":1}]"#,
                "[]",
                "/pci_segments/1",
                "duplicate",
            ),
            (
                r#"[{"pci_segment":1,"mmio64_aperture_weight":0}]"#,
                "[]",
                "/pci_segments/0/mmio64_aperture_weight",
                "out-of-range",
            ),
            (
                "[]",
                r#"[{"path":"/a","pci_segment":1,"pci_device_id":5},
                    {"path":"/b","pci_segment":1,"pci_device_id":5}]"#,
                "/disks/1/pci_device_id",
                "duplicate",
            ),
        ] {
            assert_eq!(found(segments, devices).0, one(pointer, code));
        }
    }
}
