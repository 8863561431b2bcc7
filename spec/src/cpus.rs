//! vCPUs.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::defaults;

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
    /// The vCPUs that it arranges, if that is a number.
    #[must_use]
    pub fn vcpus(&self) -> Option<u32> {
        [self.cores_per_die, self.dies_per_package, self.packages]
            .into_iter()
            .try_fold(self.threads_per_core, u32::checked_mul)
    }
}

/// On which CPUs of the host a vCPU may run.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct CpuAffinity {
    /// The vCPU.
    pub vcpu: u32,
    /// Host CPU numbers.
    pub host_cpus: Vec<usize>,
}

/// CPU features that are off unless asked for.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct CpuFeatures {
    /// Advanced Matrix Extensions.
    #[serde(default)]
    pub amx: bool,
}

/// Who may share a core of the host with a vCPU.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub enum CoreSchedulingMode {
    /// vCPUs of the same VM.
    #[default]
    Vm,
    /// Nobody.
    Vcpu,
    /// Anybody.
    Off,
}

/// vCPUs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct CpusConfig {
    /// vCPUs at boot.
    #[schema(minimum = 1)]
    pub boot_vcpus: u32,
    /// vCPUs that there can ever be.
    #[schema(minimum = 1)]
    pub max_vcpus: u32,
    /// How they are arranged; each a package of its own when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub topology: Option<CpuTopology>,
    /// Offer the interfaces of Hyper-V.
    #[serde(default)]
    pub kvm_hyperv: bool,
    /// Limit the physical address bits that the guest sees.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_phys_bits: Option<u8>,
    /// Let the guest run VMs of its own, where the host can.
    #[serde(default = "defaults::yes")]
    pub nested: bool,
    /// On which CPUs of the host each vCPU may run.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub affinity: Option<Vec<CpuAffinity>>,
    /// Features that are off unless asked for.
    #[serde(default)]
    pub features: CpuFeatures,
    /// Who may share a core of the host with a vCPU.
    #[serde(default)]
    pub core_scheduling: CoreSchedulingMode,
}

impl CpusConfig {
    /// So many vCPUs, and all else as by default.
    #[must_use]
    pub fn with_vcpus(vcpus: u32) -> Self {
        Self {
            boot_vcpus: vcpus,
            max_vcpus: vcpus,
            topology: None,
            kvm_hyperv: false,
            max_phys_bits: None,
            nested: true,
            affinity: None,
            features: CpuFeatures::default(),
            core_scheduling: CoreSchedulingMode::Vm,
        }
    }
}

/// One.
impl Default for CpusConfig {
    fn default() -> Self {
        Self::with_vcpus(1)
    }
}
