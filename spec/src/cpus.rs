//! vCPUs.

use std::fmt;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// How vCPUs are arranged in cores, dies and packages, as the guest sees it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct CpuTopology {
    /// Threads of a core.
    pub threads_per_core: u32,
    /// Cores of a die.
    pub cores_per_die: u32,
    /// Dies of a package.
    pub dies_per_package: u32,
    /// Packages.
    pub packages: u32,
}

impl CpuTopology {
    /// The number of vCPUs, or `None` if it overflows.
    #[must_use]
    pub fn vcpus(&self) -> Option<u32> {
        [self.cores_per_die, self.dies_per_package, self.packages]
            .into_iter()
            .try_fold(self.threads_per_core, u32::checked_mul)
    }

    /// The bits of an APIC id that number the threads of a core, the cores of a die, and the dies
    /// of a package. Each level has bits of its own, so that software finds a vCPU's core, die and
    /// package by shifting; with a count that is not a power of two, some ids stay unused.
    #[must_use]
    pub fn apic_id_bits(&self) -> [u32; 3] {
        let bits = |count: u32| u32::BITS - count.saturating_sub(1).leading_zeros();
        [
            bits(self.threads_per_core),
            bits(self.cores_per_die),
            bits(self.dies_per_package),
        ]
    }

    /// The APIC id of a vCPU, or `None` if it has more than 32 bits.
    #[must_use]
    pub fn apic_id(&self, vcpu: u32) -> Option<u32> {
        let counts = [
            self.threads_per_core,
            self.cores_per_die,
            self.dies_per_package,
        ];
        let (mut id, mut shift, mut rest) = (0_u128, 0, vcpu);
        for (count, bits) in counts.into_iter().zip(self.apic_id_bits()) {
            // At most 32 bits, shifted by at most 96.
            id |= u128::from(rest.checked_rem(count)?) << shift;
            rest = rest.checked_div(count)?;
            shift += bits;
        }
        // The rest is the package's number.
        u32::try_from(id | u128::from(rest) << shift).ok()
    }
}

/// Host CPUs on which a vCPU may run.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct CpuAffinity {
    /// The vCPU.
    pub vcpu: u32,
    /// Host CPU numbers.
    pub host_cpus: Vec<usize>,
}

/// CPU features that are off by default.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct CpuFeatures {
    /// Advanced Matrix Extensions.
    #[serde(default)]
    pub amx: bool,
}

/// Threads that may run on the same core of the host as a vCPU at the same time, where cores have
/// several hardware threads (SMT).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub enum CoreSchedulingMode {
    /// vCPUs of the same VM.
    #[default]
    Vm,
    /// None.
    Vcpu,
    /// Any thread.
    Off,
}

/// The CPU that a guest sees.
///
/// `host` shows all that the host's KVM offers. The others show sets of features that CPUs of several
/// generations have in common, so that a guest can move between them: the levels of the x86-64 psABI, and the
/// models of Intel and AMD by the names that QEMU has for them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub enum CpuProfile {
    /// All that the host offers.
    #[default]
    #[serde(rename = "host", alias = "Host")]
    Host,
    /// SSE2.
    #[serde(rename = "x86-64-v1")]
    V1,
    /// SSE4.2.
    #[serde(rename = "x86-64-v2")]
    V2,
    /// AVX2.
    #[serde(rename = "x86-64-v3")]
    V3,
    /// AVX-512.
    #[serde(rename = "x86-64-v4")]
    V4,
    /// Intel, 2008.
    Nehalem,
    /// Intel, 2010.
    Westmere,
    /// Intel, 2011.
    SandyBridge,
    /// Intel, 2012.
    IvyBridge,
    /// Intel, 2013.
    Haswell,
    /// Intel, 2014.
    Broadwell,
    /// Intel, 2017.
    #[serde(rename = "Skylake-Server")]
    SkylakeServer,
    /// Intel, 2019.
    #[serde(rename = "Cascadelake-Server")]
    CascadelakeServer,
    /// Intel, 2021.
    #[serde(rename = "Icelake-Server")]
    IcelakeServer,
    /// Intel, 2023.
    SapphireRapids,
    /// Intel, 2024.
    GraniteRapids,
    /// AMD, 2017.
    #[serde(rename = "EPYC")]
    Epyc,
    /// AMD, 2019.
    #[serde(rename = "EPYC-Rome")]
    EpycRome,
    /// AMD, 2021.
    #[serde(rename = "EPYC-Milan")]
    EpycMilan,
    /// AMD, 2022.
    #[serde(rename = "EPYC-Genoa")]
    EpycGenoa,
}

impl CpuProfile {
    /// All profiles but `host`: the levels, then each maker's models, from the one with the fewest features on.
    pub const ALL: [Self; 19] = [
        Self::V1,
        Self::V2,
        Self::V3,
        Self::V4,
        Self::Nehalem,
        Self::Westmere,
        Self::SandyBridge,
        Self::IvyBridge,
        Self::Haswell,
        Self::Broadwell,
        Self::SkylakeServer,
        Self::CascadelakeServer,
        Self::IcelakeServer,
        Self::SapphireRapids,
        Self::GraniteRapids,
        Self::Epyc,
        Self::EpycRome,
        Self::EpycMilan,
        Self::EpycGenoa,
    ];
}

impl fmt::Display for CpuProfile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.serialize(f)
    }
}

fn is_host(profile: &CpuProfile) -> bool {
    *profile == CpuProfile::Host
}

/// vCPUs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct CpusConfig {
    /// Number of vCPUs at boot.
    #[schema(minimum = 1)]
    pub boot_vcpus: u32,
    /// Highest number of vCPUs that the VM can have.
    #[schema(minimum = 1)]
    pub max_vcpus: u32,
    /// CPU topology; all vCPUs are cores of one package when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub topology: Option<CpuTopology>,
    /// Offer Hyper-V's paravirtual interfaces, for Windows. A VM that has them cannot be moved or saved.
    #[serde(default)]
    pub kvm_hyperv: bool,
    /// The CPU that the guest sees.
    #[serde(default, skip_serializing_if = "is_host")]
    pub profile: CpuProfile,
    /// Limit the physical address bits that the guest sees. When absent, 46 on Cloud Hypervisor's face, and those
    /// of the host on the service's own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_phys_bits: Option<u8>,
    /// Let the guest run VMs of its own (nested virtualization), if the host supports it. When absent, false on
    /// the service's own face and true on Cloud Hypervisor's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub nested: Option<bool>,
    /// Host CPUs on which each vCPU may run.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub affinity: Option<Vec<CpuAffinity>>,
    /// CPU features that are off by default.
    #[serde(default)]
    pub features: CpuFeatures,
    /// Threads that may share a core of the host with a vCPU.
    #[serde(default)]
    pub core_scheduling: CoreSchedulingMode,
}

impl CpusConfig {
    /// Returns a configuration of `count` vCPUs with defaults otherwise.
    #[must_use]
    pub fn with_vcpus(vcpus: u32) -> Self {
        Self {
            boot_vcpus: vcpus,
            max_vcpus: vcpus,
            topology: None,
            kvm_hyperv: false,
            profile: CpuProfile::Host,
            max_phys_bits: None,
            nested: None,
            affinity: None,
            features: CpuFeatures::default(),
            core_scheduling: CoreSchedulingMode::Vm,
        }
    }

    /// Whether the guest may run VMs of its own. A configuration that does not choose says no.
    #[must_use]
    pub fn is_nested(&self) -> bool {
        self.nested.unwrap_or(false)
    }

    /// Fills in what Cloud Hypervisor's contract has as defaults and the service's own face leaves to the
    /// host, so that its clients find these fields in `vm.info`.
    pub fn fill_in_for_cloud_hypervisor(&mut self) {
        const MAX_PHYS_BITS: u8 = 46;
        self.nested.get_or_insert(true);
        self.max_phys_bits.get_or_insert(MAX_PHYS_BITS);
    }

    /// How the vCPUs are arranged: as configured, or as cores of one package.
    #[must_use]
    pub fn arrangement(&self) -> CpuTopology {
        self.topology.clone().unwrap_or(CpuTopology {
            threads_per_core: 1,
            cores_per_die: self.max_vcpus,
            dies_per_package: 1,
            packages: 1,
        })
    }
}

/// One.
impl Default for CpusConfig {
    fn default() -> Self {
        Self::with_vcpus(1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ids(counts: [u32; 4]) -> Vec<Option<u32>> {
        let [threads_per_core, cores_per_die, dies_per_package, packages] = counts;
        let topology = CpuTopology {
            threads_per_core,
            cores_per_die,
            dies_per_package,
            packages,
        };
        let vcpus = 0..topology.vcpus().unwrap_or(1);
        vcpus.map(|vcpu| topology.apic_id(vcpu)).collect()
    }

    #[test]
    fn apic_ids_have_bits_for_each_level() {
        assert_eq!(ids([1, 4, 1, 1]), [0, 1, 2, 3].map(Some));
        assert_eq!(ids([2, 2, 1, 2]), [0, 1, 2, 3, 4, 5, 6, 7].map(Some));
        // Three cores take two bits: id 3 does not exist.
        assert_eq!(ids([1, 3, 1, 2]), [0, 1, 2, 4, 5, 6].map(Some));
        assert_eq!(ids([3, 1, 3, 1]), [0, 1, 2, 4, 5, 6, 8, 9, 10].map(Some));
    }

    #[test]
    fn rejects_oversized_apic_id() {
        let huge = CpuTopology {
            threads_per_core: u32::MAX,
            cores_per_die: u32::MAX,
            dies_per_package: u32::MAX,
            packages: u32::MAX,
        };
        assert_eq!(huge.apic_id(5), Some(5));
        assert_eq!(huge.apic_id(u32::MAX), None);
        assert_eq!(ids([0, 1, 1, 1]), []);
        let none = CpuTopology {
            threads_per_core: 0,
            ..huge
        };
        assert_eq!(none.apic_id(0), None);
    }
}
