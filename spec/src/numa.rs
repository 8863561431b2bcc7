//! NUMA nodes of a guest: which has what, how far they are from each other, and the rules for both.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Display;

use crate::limits;
use crate::platform::{NumaConfig, NumaDistance};
use crate::service::FieldProblem;
use crate::validate::{UNSUPPORTED, problem};
use crate::vm::VmConfig;

/// Distance of a node from itself (ACPI 6.5, 5.2.17).
const LOCAL: u8 = 10;

/// Distance of two nodes for which none is configured, as in Cloud Hypervisor.
const REMOTE: u8 = 20;

impl VmConfig {
    /// Returns the guest's NUMA nodes.
    #[must_use]
    pub fn numa_nodes(&self) -> &[NumaConfig] {
        self.numa.as_deref().unwrap_or_default()
    }

    /// Returns the node of a vCPU, if the guest has nodes.
    #[must_use]
    pub fn node_of_vcpu(&self, vcpu: u32) -> Option<u32> {
        self.node_with(|node| node.cpus.iter().flatten().any(|cpu| *cpu == vcpu))
    }

    /// Returns the node of a memory zone, if the guest has nodes.
    #[must_use]
    pub fn node_of_zone(&self, id: &str) -> Option<u32> {
        self.node_with(|node| node.memory_zones.iter().flatten().any(|zone| zone == id))
    }

    /// Returns the node of a PCI segment, if it is in one.
    #[must_use]
    pub fn node_of_segment(&self, segment: u16) -> Option<u32> {
        self.node_with(|node| {
            node.pci_segments
                .iter()
                .flatten()
                .any(|one| *one == segment)
        })
    }

    /// Returns the distance from one node to another.
    #[must_use]
    pub fn numa_distance(&self, from: u32, to: u32) -> u8 {
        if from == to {
            return LOCAL;
        }
        let mut nodes = self.numa_nodes().iter();
        let node = nodes.find(|node| node.guest_numa_id == from);
        let mut distances = node
            .into_iter()
            .flat_map(|node| node.distances.iter().flatten());
        let configured = distances.find(|distance| distance.destination == to);
        configured.map_or(REMOTE, |distance| distance.distance)
    }

    fn node_with(&self, has: impl Fn(&NumaConfig) -> bool) -> Option<u32> {
        let node = self.numa_nodes().iter().find(|node| has(node));
        node.map(|node| node.guest_numa_id)
    }

    /// Adds the problems of the NUMA nodes.
    pub(crate) fn check_numa(&self, found: &mut Vec<FieldProblem>) {
        let nodes = self.numa_nodes();
        let most = limits::NUMA_NODES;
        if nodes.len() > most as usize {
            let detail = format!("`numa` has {} nodes; a VM can have {most}", nodes.len());
            return found.push(problem("/numa", "out-of-range", detail));
        }
        if nodes.is_empty() {
            return;
        }
        let zones = self.memory.all_zones();
        let zones: Vec<&str> = zones.iter().map(|zone| zone.id).collect();
        let (vcpus, segments) = (self.cpus.max_vcpus, self.pci_segment_count());
        let ids: BTreeSet<u32> = nodes.iter().map(|node| node.guest_numa_id).collect();
        let mut seen = BTreeSet::new();
        let mut with_cpu = Owners::new("cpus", "vCPU");
        let mut with_zone = Owners::new("memory_zones", "memory zone");
        let mut with_segment = Owners::new("pci_segments", "PCI segment");
        for (i, node) in nodes.iter().enumerate() {
            let (id, at) = (node.guest_numa_id, format!("/numa/{i}"));
            if id >= limits::NUMA_NODES {
                let detail = format!("`guest_numa_id` ({id}) must be less than {most}");
                found.push(problem(
                    &format!("{at}/guest_numa_id"),
                    "out-of-range",
                    detail,
                ));
            } else if !seen.insert(id) {
                let detail = format!("another node has the `guest_numa_id` {id}");
                found.push(problem(&format!("{at}/guest_numa_id"), "duplicate", detail));
            }
            if node.device_id.is_some() {
                let detail = "this version does not support `numa.device_id`".to_owned();
                found.push(problem(&format!("{at}/device_id"), UNSUPPORTED, detail));
            }
            let at_node = (at.as_str(), id);
            for cpu in node.cpus.iter().flatten() {
                let unknown = (*cpu >= vcpus)
                    .then(|| format!("vCPU {cpu} must be less than `cpus.max_vcpus` ({vcpus})"));
                with_cpu.claim(at_node, cpu, unknown, found);
            }
            for zone in node.memory_zones.iter().flatten() {
                let unknown = (!zones.contains(&zone.as_str())).then(|| {
                    format!(
                        "there is no memory zone `{zone}`: the VM has {}",
                        zones.join(", ")
                    )
                });
                with_zone.claim(at_node, zone, unknown, found);
            }
            for segment in node.pci_segments.iter().flatten() {
                let unknown = (*segment >= segments).then(|| {
                    format!(
                        "PCI segment {segment} must be less than `platform.num_pci_segments` \
                         ({segments})"
                    )
                });
                with_segment.claim(at_node, segment, unknown, found);
            }
            check_distances(&at, node, &ids, found);
        }
        // Linux uses no node at all if one of them lacks some of its memory, and guesses where vCPUs are.
        let cpus = (0..vcpus).filter(|cpu| !with_cpu.nodes.contains_key(cpu));
        let cpus: Vec<String> = cpus.map(|cpu| cpu.to_string()).collect();
        let zones = zones
            .into_iter()
            .filter(|zone| !with_zone.nodes.contains_key(*zone));
        let zones: Vec<String> = zones.map(str::to_owned).collect();
        for (what, field, lacking) in [
            ("vCPUs", "cpus", cpus),
            ("memory zones", "memory_zones", zones),
        ] {
            if !lacking.is_empty() {
                let detail = format!(
                    "these {what} are in no node: {}. Each must be in the `{field}` of one node",
                    lacking.join(", ")
                );
                found.push(problem("/numa", "missing", detail));
            }
        }
    }
}

/// The nodes that have the things of one kind, each of which can be in one node only.
struct Owners<T> {
    /// The list of a node that names these things.
    field: &'static str,
    kind: &'static str,
    nodes: BTreeMap<T, u32>,
}

impl<T: Clone + Ord + Display> Owners<T> {
    fn new(field: &'static str, kind: &'static str) -> Self {
        Self {
            field,
            kind,
            nodes: BTreeMap::new(),
        }
    }

    /// Notes that the node `id` at the pointer `at` has one more. Adds the problem if that is `unknown`, or
    /// a node has it already.
    fn claim(
        &mut self,
        (at, id): (&str, u32),
        one: &T,
        unknown: Option<String>,
        found: &mut Vec<FieldProblem>,
    ) {
        let Self { field, kind, nodes } = self;
        let pointer = format!("{at}/{field}");
        let (code, detail) = match unknown {
            Some(detail) => ("out-of-range", detail),
            None => match nodes.insert(one.clone(), id) {
                Some(other) => {
                    let detail = format!("{kind} {one} is in node {other} already");
                    ("duplicate", detail)
                }
                None => return,
            },
        };
        // One problem a list: a list can be as long as a request.
        if found.iter().all(|problem| problem.pointer != pointer) {
            found.push(problem(&pointer, code, detail));
        }
    }
}

fn check_distances(
    at: &str,
    node: &NumaConfig,
    nodes: &BTreeSet<u32>,
    found: &mut Vec<FieldProblem>,
) {
    let mut seen = BTreeSet::new();
    for (i, distance) in node.distances.iter().flatten().enumerate() {
        let NumaDistance {
            destination,
            distance,
        } = *distance;
        let at = format!("{at}/distances/{i}");
        if !nodes.contains(&destination) {
            let detail = format!("there is no node {destination}");
            found.push(problem(
                &format!("{at}/destination"),
                "out-of-range",
                detail,
            ));
        } else if !seen.insert(destination) {
            let detail = format!("the distance to node {destination} is given twice");
            found.push(problem(&format!("{at}/destination"), "duplicate", detail));
        } else if (destination == node.guest_numa_id) != (distance == LOCAL) || distance < LOCAL {
            let detail = format!(
                "`distance` ({distance}) to node {destination} must be {LOCAL} for the node itself, and \
                 {} to 255 for others (255: out of reach)",
                LOCAL + 1
            );
            found.push(problem(&format!("{at}/distance"), "out-of-range", detail));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(numa: &str) -> VmConfig {
        let body = format!(
            r#"{{"payload":{{}},"cpus":{{"boot_vcpus":2,"max_vcpus":4}},
                "memory":{{"size":0,"zones":[{{"id":"a","size":4194304}},{{"id":"b","size":4194304}}]}},
                "platform":{{"num_pci_segments":2}},"numa":[{numa}]}}"#
        );
        serde_json::from_str(&body).unwrap()
    }

    fn found(numa: &str) -> Vec<(String, String)> {
        let mut found = Vec::new();
        config(numa).check_numa(&mut found);
        found
            .into_iter()
            .map(|one| (one.pointer, one.code))
            .collect()
    }

    const FIRST: &str = r#"{"guest_numa_id":0,"cpus":[0,2],"memory_zones":["a"],
        "distances":[{"destination":1,"distance":25},{"destination":0,"distance":10}]}"#;

    #[test]
    fn nodes_have_all_vcpus_and_zones_once() {
        assert_eq!(found(""), []);
        let second = r#"{"guest_numa_id":1,"cpus":[1,3],"memory_zones":["b"],"pci_segments":[1]}"#;
        let both = format!("{FIRST},{second}");
        assert_eq!(found(&both), []);
        let config = config(&both);
        assert_eq!(
            (
                config.node_of_vcpu(2),
                config.node_of_vcpu(3),
                config.node_of_vcpu(4)
            ),
            (Some(0), Some(1), None)
        );
        assert_eq!(
            (config.node_of_zone("b"), config.node_of_zone("c")),
            (Some(1), None)
        );
        assert_eq!(
            (config.node_of_segment(0), config.node_of_segment(1)),
            (None, Some(1))
        );
        let distances = [(0, 0), (0, 1), (1, 0)].map(|(from, to)| config.numa_distance(from, to));
        assert_eq!(distances, [10, 25, 20]);
    }

    #[test]
    fn each_rule_names_its_field() {
        for (second, pointer, code) in [
            (
                r#""guest_numa_id":0,"cpus":[1,3],"memory_zones":["b"]"#,
                "/1/guest_numa_id",
                "duplicate",
            ),
            (
                r#""guest_numa_id":64,"cpus":[1,3],"memory_zones":["b"]"#,
                "/1/guest_numa_id",
                "out-of-range",
            ),
            (
                r#""guest_numa_id":1,"cpus":[1,2,3],"memory_zones":["b"]"#,
                "/1/cpus",
                "duplicate",
            ),
            (
                r#""guest_numa_id":1,"cpus":[3,1,3,3],"memory_zones":["b"]"#,
                "/1/cpus",
                "duplicate",
            ),
            (
                r#""guest_numa_id":1,"cpus":[1,3,4],"memory_zones":["b"]"#,
                "/1/cpus",
                "out-of-range",
            ),
            (
                r#""guest_numa_id":1,"cpus":[1],"memory_zones":["b"]"#,
                "",
                "missing",
            ),
            (r#""guest_numa_id":1,"cpus":[1,3]"#, "", "missing"),
            (
                r#""guest_numa_id":1,"cpus":[1,3],"memory_zones":["b","a"]"#,
                "/1/memory_zones",
                "duplicate",
            ),
            (
                r#""guest_numa_id":1,"cpus":[1,3],"memory_zones":["b","c"]"#,
                "/1/memory_zones",
                "out-of-range",
            ),
            (
                r#""guest_numa_id":1,"cpus":[1,3],"memory_zones":["b"],"pci_segments":[2]"#,
                "/1/pci_segments",
                "out-of-range",
            ),
            (
                r#""guest_numa_id":1,"cpus":[1,3],"memory_zones":["b"],"pci_segments":[1,1]"#,
                "/1/pci_segments",
                "duplicate",
            ),
            (
                r#""guest_numa_id":1,"cpus":[1,3],"memory_zones":["b"],"device_id":"x""#,
                "/1/device_id",
                "unsupported",
            ),
            (
                r#""guest_numa_id":1,"cpus":[1,3],"memory_zones":["b"],"distances":[{"destination":2,"distance":20}]"#,
                "/1/distances/0/destination",
                "out-of-range",
            ),
            (
                r#""guest_numa_id":1,"cpus":[1,3],"memory_zones":["b"],"distances":[{"destination":0,"distance":10}]"#,
                "/1/distances/0/distance",
                "out-of-range",
            ),
            (
                r#""guest_numa_id":1,"cpus":[1,3],"memory_zones":["b"],"distances":[{"destination":1,"distance":11}]"#,
                "/1/distances/0/distance",
                "out-of-range",
            ),
        ] {
            let first = FIRST.replace(r#"{"destination":1,"distance":25},"#, "");
            let problems = found(&format!("{first},{{{second}}}"));
            assert_eq!(
                problems,
                [(format!("/numa{pointer}"), code.to_owned())],
                "{second}"
            );
        }
    }

    #[test]
    fn memory_without_zones_is_a_zone() {
        let whole = |zone: &str| {
            let body = format!(
                r#"{{"payload":{{}},"numa":[{{"guest_numa_id":0,"cpus":[0],"memory_zones":["{zone}"]}}]}}"#
            );
            let config: VmConfig = serde_json::from_str(&body).unwrap();
            let mut found = Vec::new();
            config.check_numa(&mut found);
            found.len()
        };
        assert_eq!((whole("mem0"), whole("ram")), (0, 2));
    }
}
