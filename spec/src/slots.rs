//! The slots of the PCI bus that devices of a configuration ask for.

use std::collections::{BTreeMap, HashSet};

use crate::console::ConsoleMode;
use crate::limits;
use crate::service::FieldProblem;
use crate::validate::problem;
use crate::vm::VmConfig;

/// The slots that devices ask for, with the pointers and names of these devices.
fn wanted(config: &VmConfig) -> impl Iterator<Item = (String, Option<&String>, u8)> {
    let disks = config.disks.iter().flatten().enumerate();
    let disks =
        disks.map(|(i, disk)| (format!("/disks/{i}"), disk.id.as_ref(), disk.pci_device_id));
    let net = config.net.iter().flatten().enumerate();
    let net = net.map(|(i, net)| (format!("/net/{i}"), net.id.as_ref(), net.pci_device_id));
    let vsock = config.vsock.iter();
    let vsock = vsock.map(|one| ("/vsock".to_owned(), one.id.as_ref(), one.pci_device_id));
    let balloon = config.balloon.iter();
    let balloon = balloon.map(|one| ("/balloon".to_owned(), one.id.as_ref(), one.pci_device_id));
    let (console, rng) = (&config.console, &config.rng);
    let has_console = console.mode != ConsoleMode::Off;
    let console_slot = console.pci_device_id.filter(|_| has_console);
    let others = [
        ("/console".to_owned(), console.id.as_ref(), console_slot),
        ("/rng".to_owned(), rng.id.as_ref(), rng.pci_device_id),
    ];
    let all = disks.chain(net).chain(vsock).chain(balloon).chain(others);
    all.filter_map(|(pointer, id, slot)| Some((pointer, id, slot?)))
}

/// Checks that no two devices ask for one slot, and that the others have room beside them.
pub(crate) fn check(config: &VmConfig, found: &mut Vec<FieldProblem>) {
    let mut taken = HashSet::new();
    for (pointer, _, slot) in wanted(config) {
        if !taken.insert(slot) {
            let pointer = format!("{pointer}/pci_device_id");
            let detail = format!("another device has the `pci_device_id` {slot}");
            found.push(problem(&pointer, "duplicate", detail));
        }
    }
    let left = usize::from(limits::PCI_SLOTS).saturating_sub(taken.len());
    let others = config.bus_device_count().saturating_sub(taken.len());
    if others > left * limits::PCI_FUNCTIONS {
        let detail = format!(
            "{others} devices have no `pci_device_id`, and the other devices leave {left} slots, \
             enough for {}",
            left * limits::PCI_FUNCTIONS
        );
        found.push(problem("/disks", "out-of-range", detail));
    }
}

impl VmConfig {
    /// Returns the slots that devices ask for, by their names.
    #[must_use]
    pub fn wanted_slots(&self) -> BTreeMap<String, u8> {
        let named = wanted(self).filter_map(|(_, id, slot)| Some((id?.clone(), slot)));
        named.collect()
    }

    /// All functions of the bus but the host bridge.
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
            (named.collect::<Vec<_>>(), config.wanted_slots())
        };
        let (good, slots) = found(
            r#"{"payload":{}, "disks":[{"path":"/a","id":"a","pci_device_id":31},{"path":"/b"}],
                "rng":{"src":"/r","id":"__rng","pci_device_id":1},
                "console":{"mode":"Off","id":"__console","pci_device_id":1}}"#,
        );
        assert_eq!(good, []);
        assert_eq!(
            slots,
            BTreeMap::from([("a".into(), 31), ("__rng".into(), 1)])
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
}
