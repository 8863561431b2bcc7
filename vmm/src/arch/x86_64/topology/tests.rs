//! The leaves are read back as Linux does (arch/x86/kernel/cpu/topology_*.c), on each path that it
//! has for a vendor and a generation of CPUs.

use proptest::prelude::*;

use super::*;

fn leaf(function: u32, index: u32, registers: [u32; 4]) -> kvm_cpuid_entry2 {
    let [eax, ebx, ecx, edx] = registers;
    kvm_cpuid_entry2 {
        function,
        index,
        flags: 0,
        eax,
        ebx,
        ecx,
        edx,
        ..Default::default()
    }
}

/// CPUID as KVM returns it: caches of three levels, and one empty subleaf of each topology leaf.
fn host(basic: u32, extended: u32) -> Vec<kvm_cpuid_entry2> {
    let cache = |function, level: u32| leaf(function, level, [1 | level << 5, 0x3f, 0x3f, 0]);
    vec![
        leaf(0, 0, [basic, 0, 0, 0]),
        leaf(1, 0, [0, 0x0900_0000, 0, 1 << 28]),
        cache(4, 1),
        cache(4, 2),
        cache(4, 3),
        leaf(4, 4, [0; 4]),
        leaf(0xb, 0, [0; 4]),
        leaf(0x8000_0000, 0, [extended, 0, 0, 0]),
        leaf(0x8000_0008, 0, [0x3030, 0, 0x7001, 0]),
        cache(0x8000_001d, 3),
        leaf(0x8000_001e, 0, [9, 9, 9, 9]),
    ]
}

struct Decoder(Vec<kvm_cpuid_entry2>);

/// Numbers of a vCPU's package, die, core and thread, each unique in the machine, and its APIC id.
#[derive(Debug, PartialEq, Eq)]
struct Found {
    package: u32,
    die: u32,
    core: u32,
    apic_id: u32,
}

impl Decoder {
    fn get(&self, function: u32, index: u32) -> Option<&kvm_cpuid_entry2> {
        let mut entries = self.0.iter();
        entries.find(|entry| (entry.function, entry.index) == (function, index))
    }

    /// `parse_topology_leaf`: shifts past each level, by its type, to the first of type 0.
    fn levels(&self, function: u32) -> Option<(Vec<(u32, u32)>, u32)> {
        let mut levels = Vec::new();
        let first = self.get(function, 0)?;
        for index in 0.. {
            let entry = self.get(function, index)?;
            let (kind, count) = (entry.ecx >> 8 & 0xff, entry.ebx & 0xffff);
            assert_eq!(entry.ecx & 0xff, index);
            assert_eq!(entry.edx, first.edx);
            if kind == 0 || count == 0 {
                break;
            }
            levels.push((kind, entry.eax & 0x1f));
        }
        Some((levels, first.edx))
    }

    fn of_levels(&self, function: u32, core: u32, die: u32) -> Option<Found> {
        let (levels, apic_id) = self.levels(function)?;
        let shift = |kind| {
            let found = levels.iter().find(|level| level.0 == kind);
            found.map(|level| level.1)
        };
        let last = levels.last()?.1;
        Some(Found {
            package: apic_id >> last,
            die: apic_id >> shift(die).unwrap_or(last),
            core: apic_id >> shift(core)?,
            apic_id,
        })
    }

    /// `cpu_parse_topology_ext` for Intel with leaf 1F: the level below dies is that of cores.
    fn v2(&self) -> Option<Found> {
        self.of_levels(0x1f, 1, 2)
    }

    /// `cpu_parse_topology_ext` for AMD: the level below the socket is that of dies.
    fn amd(&self) -> Option<Found> {
        self.of_levels(0x8000_0026, 1, 3)
    }

    /// Leaf 0xB with the nodes of leaf 8000_001E, as for AMD before leaf 8000_0026.
    fn with_nodes(&self) -> Option<Found> {
        let nodes = self.get(0x8000_001e, 0)?;
        let found = self.of_levels(0xb, 1, 1)?;
        assert_eq!(nodes.eax, found.apic_id);
        Some(Found {
            die: nodes.ecx & 0xff,
            ..found
        })
    }

    /// `parse_8000_0008` and `parse_8000_001e`: the oldest path for AMD.
    fn nodes_alone(&self) -> Option<Found> {
        let (sizes, nodes) = (self.get(0x8000_0008, 0)?, self.get(0x8000_001e, 0)?);
        let shift = sizes.ecx >> 12 & 0xf;
        let threads = (nodes.ebx >> 8 & 0xff) + 1;
        Some(Found {
            package: nodes.eax >> shift,
            die: nodes.ecx & 0xff,
            core: nodes.eax >> threads.next_power_of_two().trailing_zeros(),
            apic_id: nodes.eax,
        })
    }

    /// `parse_legacy`: leaves 1 and 4, which do not know dies.
    fn legacy(&self) -> Option<Found> {
        let order = |count: u32| count.next_power_of_two().trailing_zeros();
        let (first, caches) = (self.get(1, 0)?, self.get(4, 1)?);
        let core_shift = order((caches.eax >> 26) + 1);
        let package_shift = match first.edx & 1 << 28 {
            0 => 0,
            _ => order(first.ebx >> 16 & 0xff),
        };
        let apic_id = first.ebx >> 24;
        Some(Found {
            package: apic_id >> package_shift,
            die: 0,
            core: apic_id >> (package_shift - core_shift),
            apic_id,
        })
    }
}

/// Numbers that are equal where the others are.
fn groups(numbers: impl IntoIterator<Item = u32>) -> Vec<usize> {
    let numbers: Vec<_> = numbers.into_iter().collect();
    let first = |number| numbers.iter().position(|other| other == number);
    numbers.iter().filter_map(first).collect()
}

fn machine(topology: &CpuTopology, basic: u32, extended: u32) -> Vec<Vec<kvm_cpuid_entry2>> {
    let vcpus = 0..topology.vcpus().unwrap();
    let shaped = vcpus.map(|vcpu| {
        let mut entries = host(basic, extended);
        Place::new(topology, topology.apic_id(vcpu).unwrap()).shape(&mut entries);
        entries
    });
    shaped.collect()
}

fn check(
    topology: &CpuTopology,
    machine: &[Vec<kvm_cpuid_entry2>],
    knows_dies: bool,
    decode: impl Fn(&Decoder) -> Option<Found>,
) {
    let decoded = machine
        .iter()
        .map(|entries| decode(&Decoder(entries.clone())));
    let found: Vec<_> = decoded.map(Option::unwrap).collect();
    let core = topology.threads_per_core;
    let die = core * topology.cores_per_die;
    let package = die * topology.dies_per_package;
    let wanted = |size: u32| groups((0..topology.vcpus().unwrap()).map(|vcpu| vcpu / size));
    assert_eq!(groups(found.iter().map(|f| f.package)), wanted(package));
    assert_eq!(groups(found.iter().map(|f| f.core)), wanted(core));
    if knows_dies {
        assert_eq!(groups(found.iter().map(|f| f.die)), wanted(die));
    }
    assert_eq!(groups(found.iter().map(|f| f.apic_id)), wanted(1));
}

fn topology() -> impl Strategy<Value = CpuTopology> {
    let any = (1..4_u32, 1..10_u32, 1..4_u32, 1..5_u32);
    any.prop_map(|(threads, cores, dies, packages)| CpuTopology {
        threads_per_core: threads,
        cores_per_die: cores,
        dies_per_package: dies,
        packages,
    })
    .prop_filter("an APIC id is above 254", |topology| {
        let last = topology.vcpus().unwrap() - 1;
        topology.apic_id(last).is_some_and(|id| id <= 254)
    })
}

proptest! {
    #[test]
    fn linux_topology_paths_agree(topology in topology()) {
        check(&topology, &machine(&topology, 0x20, 0x8000_0008), true, Decoder::v2);
        check(&topology, &machine(&topology, 0x10, 0x8000_0026), true, Decoder::amd);
        check(&topology, &machine(&topology, 0x10, 0x8000_0021), true, Decoder::with_nodes);
        check(&topology, &machine(&topology, 0x7, 0x8000_001e), true, Decoder::nodes_alone);
        check(&topology, &machine(&topology, 0x7, 0x8000_0008), false, Decoder::legacy);
    }

    /// The vCPUs that share a cache are those of a core or of a die, by APIC ids: Linux divides
    /// them by the number that share it.
    #[test]
    fn caches_are_shared_in_a_core_and_in_a_die(topology in topology()) {
        let machine = machine(&topology, 0x10, 0x8000_0021);
        for (function, level) in [(4, 1), (4, 2), (4, 3), (0x8000_001d, 3)] {
            let shared = groups(machine.iter().map(|entries| {
                let decoder = Decoder(entries.clone());
                let sharing = (decoder.get(function, level).unwrap().eax >> 14 & 0xfff) + 1;
                decoder.get(0x8000_001e, 0).unwrap().eax / sharing
            }));
            let together = match level {
                3 => topology.threads_per_core * topology.cores_per_die,
                _ => topology.threads_per_core,
            };
            let wanted = groups((0..topology.vcpus().unwrap()).map(|vcpu| vcpu / together));
            prop_assert_eq!(shared, wanted);
        }
    }
}

#[test]
fn leaves_above_the_greatest_are_not_invented() {
    let topology = CpuTopology {
        threads_per_core: 1,
        cores_per_die: 2,
        dies_per_package: 1,
        packages: 1,
    };
    let mut entries = host(0x10, 0x8000_0021);
    entries.push(leaf(0x1f, 0, [0; 4]));
    Place::new(&topology, 1).shape(&mut entries);
    let has = |function| entries.iter().any(|entry| entry.function == function);
    assert!(has(0xb) && !has(0x1f) && !has(0x8000_0026));
    // The list of caches ends where it did.
    assert_eq!(Decoder(entries).get(4, 4).unwrap().eax, 0);
}

#[test]
fn intel_cpu_with_dies_has_leaf_1f() {
    let [one, two] = [1, 2].map(|dies| CpuTopology {
        threads_per_core: 1,
        cores_per_die: 3,
        dies_per_package: dies,
        packages: 1,
    });
    let shaped = |topology: &CpuTopology| {
        let vcpus = 0..topology.vcpus().unwrap();
        let shape = |vcpu| {
            let mut entries = host(0x16, 0x8000_0008);
            entries[0].ebx = GENUINE_INTEL;
            Place::new(topology, topology.apic_id(vcpu).unwrap()).shape(&mut entries);
            entries
        };
        vcpus.map(shape).collect::<Vec<_>>()
    };
    check(&two, &shaped(&two), true, Decoder::v2);
    assert_eq!(shaped(&two)[0][0].eax, 0x1f);
    assert_eq!(shaped(&one)[0][0].eax, 0x16);
}
