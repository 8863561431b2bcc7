//! PCI addresses of a machine's devices.
//!
//! A guest ejects whole slots, so a device that can be removed at run time has a slot of its own. If
//! there are more devices than slots, the last devices share slots, at most eight to a slot and as few
//! as possible. Some slots stay free for hot-added devices.

use std::collections::{BTreeMap, BTreeSet};

use devices::pci::Bdf;
use spec::limits::{PCI_FUNCTIONS, PCI_SLOTS};
use spec::{ConsoleMode, VmConfig, WantedPlace};

use super::At;

/// Slots that stay free when a machine is built.
const KEPT_FREE: usize = 4;

/// Returns the places of devices, in their order: the `known` ones or, if none is known, those that the
/// configuration asks for by slot and, for the others, the `usual` ones in the slots that
/// are left of their segment. A device that is not `wanted` anywhere is in segment 0.
pub(crate) fn assign(
    ids: &[&str],
    known: &BTreeMap<String, Bdf>,
    wanted: &BTreeMap<String, WantedPlace>,
) -> Vec<At> {
    let wanted = |id: &str| wanted.get(id).copied().unwrap_or_default();
    let mut places: BTreeMap<&str, Bdf> = BTreeMap::new();
    if known.is_empty() {
        let segments: BTreeSet<u16> = ids.iter().map(|id| wanted(id).segment).collect();
        for segment in segments {
            let here = || ids.iter().filter(|id| wanted(id).segment == segment);
            let taken: Vec<u8> = here().filter_map(|id| wanted(id).slot).collect();
            let left: Vec<u8> = (1..=PCI_SLOTS)
                .filter(|slot| !taken.contains(slot))
                .collect();
            let count = here().count().saturating_sub(taken.len());
            let mut usual = (0..count).map(|index| usual(index, count, &left));
            for id in here() {
                let at = match wanted(id).slot {
                    Some(slot) => Bdf::new(slot, 0),
                    None => usual.next().flatten(),
                };
                places.extend(at.map(|at| (*id, at.in_segment(segment))));
            }
        }
    } else {
        let ids = ids.iter();
        // A guest that moves has found its devices at these addresses, and would not look for them
        // elsewhere.
        places.extend(ids.filter_map(|id| Some((*id, *known.get(*id)?))));
    }
    let at = |id: &&str| match places.get(id) {
        Some(at) => At::Exactly(*at),
        None => At::AnySlot(wanted(id).segment),
    };
    ids.iter().map(at).collect()
}

/// Returns the place of device `index` of `count` in these slots. A shared slot holds all the devices
/// of an unshared one and seven more.
fn usual(index: usize, count: usize, slots: &[u8]) -> Option<Bdf> {
    let needed = count.div_ceil(PCI_FUNCTIONS);
    // As few shared slots as the free ones allow: a device in a shared slot cannot be removed.
    let used = slots.len().saturating_sub(KEPT_FREE).max(needed);
    // A slot that is shared holds eight devices in place of one, and so gains seven.
    let shared = count.saturating_sub(used).div_ceil(PCI_FUNCTIONS - 1);
    let own = used.saturating_sub(shared);
    let (slot, function) = match index.checked_sub(own) {
        Some(index) => (
            own.checked_add(index / PCI_FUNCTIONS)?,
            index % PCI_FUNCTIONS,
        ),
        None => (index, 0),
    };
    Bdf::new(*slots.get(slot)?, u8::try_from(function).ok()?)
}

/// Places as another service tells them, device and function number in a byte, do not make sense.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum PlaceError {
    #[error("the device `{0}` is in slot 0, which belongs to the host bridge")]
    HostBridge(String),
    #[error("the devices `{0}` and `{1}` are both at {2}")]
    Twice(String, String, Bdf),
    #[error("the device `{0}` is at {1}, but function 0 of that slot has no device")]
    NoFirst(String, Bdf),
    #[error("the device `{0}` has no PCI address")]
    Nowhere(String),
    #[error("the device `{0}` at {1} is not in the VM's configuration")]
    Unknown(String, Bdf),
}

/// Checks the PCI addresses that another service offers for all devices of a VM. Their segments are in
/// the configuration.
pub(crate) fn from_offer(
    config: &VmConfig,
    devfns: &BTreeMap<String, u8>,
) -> Result<BTreeMap<String, Bdf>, PlaceError> {
    let mut config = config.clone();
    // Also for one that came without.
    config.name_devices();
    let mut names = config.device_names();
    if let (ConsoleMode::Off, Some(id)) = (config.console.mode, &config.console.id) {
        names.remove(id);
    }
    let wanted = config.wanted_places();
    let mut there: BTreeMap<Bdf, &String> = BTreeMap::new();
    for (id, devfn) in devfns {
        let segment = wanted.get(id).map_or(0, |place| place.segment);
        // A byte has no bad values: five bits of device and three of function.
        let at = Bdf::from_devfn(*devfn).in_segment(segment);
        if at.device() == 0 {
            return Err(PlaceError::HostBridge(id.clone()));
        }
        // Each name once, so that a peer cannot put a device in two places.
        if !names.remove(id) {
            return Err(PlaceError::Unknown(id.clone(), at));
        }
        if let Some(other) = there.insert(at, id) {
            return Err(PlaceError::Twice(other.clone(), id.clone(), at));
        }
    }
    if let Some(id) = names.into_iter().min() {
        return Err(PlaceError::Nowhere(id));
    }
    let alone = there
        .iter()
        .find(|(at, _)| !there.contains_key(&at.first()));
    match alone {
        Some((at, id)) => Err(PlaceError::NoFirst((*id).clone(), *at)),
        None => Ok(there.into_iter().map(|(at, id)| (id.clone(), at)).collect()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn assigned(count: usize, known: &BTreeMap<String, Bdf>) -> Vec<At> {
        let ids: Vec<String> = (0..count).map(|i| format!("d{i}")).collect();
        let ids: Vec<_> = ids.iter().map(String::as_str).collect();
        assign(&ids, known, &BTreeMap::new())
    }

    fn exactly(at: At) -> Bdf {
        match at {
            At::Exactly(at) => at,
            At::AnySlot(segment) => panic!("any slot of segment {segment}"),
        }
    }

    fn slot(slot: u8) -> WantedPlace {
        WantedPlace {
            segment: 0,
            slot: Some(slot),
        }
    }

    #[test]
    fn devices_get_own_slots_first() {
        for count in 1..=spec::limits::DEVICES {
            let all: Vec<Bdf> = assigned(count, &BTreeMap::new())
                .into_iter()
                .map(exactly)
                .collect();
            assert_eq!(all.len(), count);
            assert!(all.is_sorted_by(|a, b| a < b), "{all:?}");
            assert!(all.iter().all(|at| (1..=27).contains(&at.device())));
            let first_of = |at: &Bdf| all.contains(&at.first());
            assert!(all.iter().all(first_of), "{all:?}");
            let sharing = |at: &&Bdf| {
                let same = all.iter().filter(|other| other.device() == at.device());
                same.count() > 1
            };
            let shared = all.iter().filter(sharing).count();
            let expected = match count {
                ..=27 => 0,
                28 => 2,
                34 => 8,
                35 => 10,
                64 => 43,
                _ => continue,
            };
            assert_eq!(shared, expected, "of {count}");
        }
    }

    #[test]
    fn wanted_slots_come_before_all_others() {
        let ids: Vec<String> = (0..64).map(|i| format!("d{i}")).collect();
        let ids: Vec<_> = ids.iter().map(String::as_str).collect();
        let wanted = BTreeMap::from([("d1".to_owned(), slot(1)), ("d5".to_owned(), slot(30))]);
        let all = assign(&ids[..6], &BTreeMap::new(), &wanted);
        let all: Vec<_> = all.into_iter().map(|at| exactly(at).devfn()).collect();
        assert_eq!(all, [2, 1, 3, 4, 5, 30].map(|slot| slot << 3));
        // As many as there can be: all have a place of their own, behind function 0 of their slot.
        for taken in 0..=26_u8 {
            let wanted = (0..taken)
                .map(|i| (format!("d{i}"), slot(31 - i)))
                .collect();
            let all = assign(&ids, &BTreeMap::new(), &wanted);
            let all: BTreeSet<_> = all.into_iter().map(exactly).collect();
            assert_eq!(all.len(), 64, "{taken}");
            assert!(all.iter().all(|at| all.contains(&at.first())), "{taken}");
        }
        let at = Bdf::new(9, 0).unwrap();
        let known = BTreeMap::from([("d1".to_owned(), at)]);
        assert_eq!(
            assign(&ids[..2], &known, &wanted),
            [At::AnySlot(0), At::Exactly(at)]
        );
    }

    #[test]
    fn segments_have_slots_of_their_own() {
        let wanted = |segment, slot| WantedPlace { segment, slot };
        let wanted = BTreeMap::from([
            ("a".to_owned(), wanted(0, None)),
            ("b".to_owned(), wanted(2, Some(1))),
            ("c".to_owned(), wanted(2, None)),
            ("e".to_owned(), wanted(1, None)),
        ]);
        let all = assign(&["a", "b", "c", "d", "e"], &BTreeMap::new(), &wanted);
        let all: Vec<_> = all.into_iter().map(|at| exactly(at).to_string()).collect();
        let expected = [
            "0000:00:01.0",
            "0002:00:01.0",
            "0002:00:02.0",
            "0000:00:02.0",
            "0001:00:01.0",
        ];
        assert_eq!(all, expected);
    }

    #[test]
    fn known_devices_keep_their_slots() {
        let at = |slot, function| Bdf::new(slot, function).unwrap();
        let known = BTreeMap::from([("d0".to_owned(), at(9, 0)), ("d2".to_owned(), at(9, 3))]);
        assert_eq!(
            assigned(3, &known),
            [At::Exactly(at(9, 0)), At::AnySlot(0), At::Exactly(at(9, 3))]
        );
    }

    #[test]
    fn rejects_invalid_addresses() {
        let mut config: VmConfig = serde_json::from_str(
            r#"{"payload":{"kernel":"/k"},"disks":[{"path":"/a"},{"path":"/b"}],
                "console":{"mode":"Off"}}"#,
        )
        .unwrap();
        config.name_devices();
        let offered = |places: &[(&str, u8)]| {
            let places = places.iter().map(|(id, at)| ((*id).to_owned(), *at));
            from_offer(&config, &places.collect())
        };
        let (a, b, rng) = ("_disk0", "_disk1", "__rng");
        let good = offered(&[(a, 2 << 3 | 1), (b, 31 << 3), (rng, 2 << 3)]).unwrap();
        assert_eq!(good[a].to_string(), "0000:00:02.1");
        assert_eq!(good.len(), 3);
        let bdf = |devfn| Bdf::from_devfn(devfn);
        let owned = str::to_owned;
        for (places, error) in [
            (
                vec![(a, 8), (b, 16), (rng, 1)],
                PlaceError::HostBridge(owned(rng)),
            ),
            (
                vec![(a, 8), (b, 16), (rng, 8)],
                PlaceError::Twice(owned(rng), owned(a), bdf(8)),
            ),
            (
                vec![(a, 8), (b, 17), (rng, 9)],
                PlaceError::NoFirst(owned(b), bdf(17)),
            ),
            (vec![(a, 8), (rng, 16)], PlaceError::Nowhere(owned(b))),
            (
                vec![(a, 8), (b, 16), (rng, 24), ("__console", 32)],
                PlaceError::Unknown(owned("__console"), bdf(32)),
            ),
        ] {
            assert_eq!(offered(&places), Err(error));
        }
    }
}
