//! NUMA nodes: which node has which vCPUs and which memory (SRAT), and how far the nodes are from each
//! other (SLIT). A node's number is its proximity domain.

use acpi_tables::Aml;
use acpi_tables::aml::Name;
use acpi_tables::sdt::Sdt;
use memory::AddrRange;
use spec::VmConfig;

use super::{Bytes, OEM, TABLE};
use crate::arch::x86_64::layout::Layout;

/// Flags of both kinds of entry, and one more of memory.
const ENABLED: u32 = 1;
const HOT_PLUGGABLE: u32 = 1 << 1;

/// The proximity domain of a device that has one.
pub(super) fn pxm(node: Option<u32>) -> Bytes {
    let mut out = Vec::new();
    if let Some(node) = node {
        Name::new("_PXM".into(), &node).to_aml_bytes(&mut out);
    }
    Bytes(out)
}

/// 5.2.16. All vCPUs that the VM can have are listed, and all memory that can be added: Linux reads the
/// table at boot only.
pub(super) fn srat(config: &VmConfig, layout: &Layout) -> Sdt {
    let mut srat = Sdt::new(*b"SRAT", 48, 3, OEM, TABLE, 1);
    // Reserved, and 1 for compatibility with the first revision.
    srat.write_u32(36, 1);
    let arrangement = config.cpus.arrangement();
    for vcpu in 0..config.cpus.max_vcpus {
        if let (Some(node), Some(apic_id)) = (config.node_of_vcpu(vcpu), arrangement.apic_id(vcpu))
        {
            srat.append_slice(&processor(node, apic_id));
        }
    }
    for (zone, place) in config.memory.all_zones().iter().zip(&layout.zones) {
        let Some(node) = config.node_of_zone(zone.id) else {
            continue;
        };
        for range in &place.ram {
            srat.append_slice(&memory(node, *range, ENABLED));
        }
        if let Some(range) = place.hotplug {
            srat.append_slice(&memory(node, range, ENABLED | HOT_PLUGGABLE));
        }
    }
    srat.update_checksum();
    srat
}

/// The affinity of an x2APIC (5.2.16.3), which any APIC id fits.
fn processor(node: u32, apic_id: u32) -> Vec<u8> {
    let mut entry = vec![2, 24, 0, 0];
    // The last two: a clock domain, which is optional, and reserved bytes.
    for field in [node, apic_id, ENABLED, 0, 0] {
        entry.extend(field.to_le_bytes());
    }
    entry
}

/// The affinity of a range of memory (5.2.16.2).
fn memory(node: u32, range: AddrRange, flags: u32) -> Vec<u8> {
    let mut entry = vec![1, 40];
    entry.extend(node.to_le_bytes());
    entry.extend([0; 2]);
    entry.extend(range.first().to_le_bytes());
    entry.extend(range.len().unwrap_or(0).to_le_bytes());
    entry.extend([0; 4]);
    entry.extend(flags.to_le_bytes());
    entry.extend([0; 8]);
    entry
}

/// 5.2.17. The table has a row for each proximity domain from 0 on, also for those that no node has.
pub(super) fn slit(config: &VmConfig) -> Sdt {
    let nodes = config.numa_nodes().iter();
    let count = nodes.map(|node| node.guest_numa_id + 1).max().unwrap_or(0);
    let mut slit = Sdt::new(*b"SLIT", 44, 1, OEM, TABLE, 1);
    slit.write_u64(36, count.into());
    for from in 0..count {
        let row = (0..count).map(|to| config.numa_distance(from, to));
        slit.append_slice(&row.collect::<Vec<_>>());
    }
    slit.update_checksum();
    slit
}

#[cfg(test)]
mod tests {
    use super::super::bytes;
    use super::*;
    use crate::arch::x86_64::layout::ZoneSize;

    const MIB: u64 = 1 << 20;

    /// Two zones, of which the second lies on both sides of the gap below 4 GiB and can grow.
    fn config() -> (VmConfig, Layout) {
        let config: VmConfig = serde_json::from_str(
            r#"{"payload":{}, "cpus":{"boot_vcpus":1,"max_vcpus":3},
                "memory":{"size":0,"hotplug_method":"VirtioMem","zones":[
                    {"id":"a","size":1073741824},
                    {"id":"b","size":3221225472,"hotplug_size":134217728}]},
                "numa":[{"guest_numa_id":2,"cpus":[0,2],"memory_zones":["b"],
                         "distances":[{"destination":0,"distance":30}]},
                        {"guest_numa_id":0,"cpus":[1],"memory_zones":["a"]}]}"#,
        )
        .unwrap();
        let zones = [(1024, 0), (3072, 128)].map(|(boot, room)| ZoneSize {
            boot: boot * MIB,
            room: room * MIB,
        });
        (config, Layout::new(&zones, 40).unwrap())
    }

    fn u32_at(bytes: &[u8], at: usize) -> u32 {
        u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap())
    }

    fn u64_at(bytes: &[u8], at: usize) -> u64 {
        u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
    }

    #[test]
    fn all_vcpus_and_memory_have_their_node() {
        let (config, layout) = config();
        let table = bytes(&srat(&config, &layout));
        let mut rest = &table[48..];
        let (mut vcpus, mut memory) = (Vec::new(), Vec::new());
        while let [kind, len, ..] = *rest {
            let (entry, after) = rest.split_at(len.into());
            match (kind, len) {
                (2, 24) => vcpus.push((u32_at(entry, 4), u32_at(entry, 8), u32_at(entry, 12))),
                (1, 40) => memory.push((
                    u32_at(entry, 2),
                    u64_at(entry, 8) / MIB,
                    u64_at(entry, 16) / MIB,
                    u32_at(entry, 28),
                )),
                other => panic!("{other:?}"),
            }
            rest = after;
        }
        assert_eq!(vcpus, [(2, 0, 1), (0, 1, 1), (2, 2, 1)]);
        let expected = [
            (0, 0, 1024, 1),
            (2, 1024, 2048, 1),
            (2, 4096, 1024, 1),
            (2, 5120, 128, 3),
        ];
        assert_eq!(memory, expected);
    }

    #[test]
    fn distances_have_a_row_for_each_domain() {
        let table = bytes(&slit(&config().0));
        assert_eq!(u64_at(&table, 36), 3);
        assert_eq!(table[44..], [10, 20, 20, 20, 10, 20, 30, 20, 10]);
    }
}
