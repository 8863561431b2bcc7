//! CPUs of hosts and guests, as far as they decide where a guest can move.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::cpus::CpuProfile;

/// A leaf of CPUID. Numbers are those that the instruction takes and returns.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct CpuidLeaf {
    /// EAX before the instruction.
    pub function: u32,
    /// ECX before the instruction; 0 for leaves without subleaves.
    pub index: u32,
    /// EAX.
    pub eax: u32,
    /// EBX.
    pub ebx: u32,
    /// ECX.
    pub ecx: u32,
    /// EDX.
    pub edx: u32,
}

/// A CPU, by its CPUID and the MSR that lists weaknesses.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct CpuDescription {
    /// The profile that it was made from.
    #[serde(default)]
    pub profile: CpuProfile,
    /// Its maker, as in leaf 0 of CPUID.
    pub vendor: String,
    /// Names of its features, in the order of the leaves; a feature without a name is in `cpuid` only.
    pub features: Vec<String>,
    /// The leaves of CPUID, before the numbers of each vCPU are set.
    #[schema(max_items = 256)]
    pub cpuid: Vec<CpuidLeaf>,
    /// The MSR `IA32_ARCH_CAPABILITIES`, if the CPU has it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub arch_capabilities: Option<u64>,
}

/// The features that a host lacks of a profile.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ProfileFit {
    /// The profile.
    pub profile: CpuProfile,
    /// Number of features that a host must have for it. More is better for guests.
    pub features: u32,
    /// Features that the host lacks. The host can run the profile if there are none.
    pub lacking: Vec<String>,
}

/// The CPU of the service's host.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct HostCpu {
    /// The most that a guest can see.
    pub cpu: CpuDescription,
    /// All profiles, and what the host lacks of each.
    pub profiles: Vec<ProfileFit>,
}

/// The answer to whether a guest could run here.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct CpuCheck {
    /// Features and sizes of the guest's CPUs that this host cannot show. Empty if the guest could run here.
    pub lacking: Vec<String>,
}
