//! The CPU that guests see.

use std::fmt;

use hypervisor::arch::{CpuId, kvm_cpuid_entry2};
use spec::{CpuDescription, CpuProfile, CpuidLeaf};

use super::feature_names::{self, Place};

/// Makers of CPUs that have profiles of their own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Vendor {
    Intel,
    Amd,
}

impl fmt::Display for Vendor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Intel => "a CPU from GenuineIntel",
            Self::Amd => "a CPU from AuthenticAMD",
        })
    }
}

/// CPUID and feature MSRs as a guest sees them, before the numbers of each vCPU are set. A host has one too: the
/// most that it can show.
#[derive(Clone, Debug)]
pub(crate) struct CpuModel {
    pub(crate) cpuid: CpuId,
    /// `IA32_ARCH_CAPABILITIES`, which the guest reads if CPUID shows it; `None` if the value is not known.
    pub(crate) arch_capabilities: Option<u64>,
}

impl CpuModel {
    /// The register of a leaf; 0 if there is no such leaf.
    pub(super) fn register(&self, at: Place) -> u32 {
        let mut entries = self.cpuid.as_slice().iter();
        let found = entries.find(|entry| (entry.function, entry.index) == (at.function, at.index));
        let registers = found.map_or([0; 4], |e| [e.eax, e.ebx, e.ecx, e.edx]);
        registers.get(at.register).copied().unwrap_or(0)
    }

    /// Returns whether this named feature is there.
    pub(super) fn has(&self, feature: &str) -> bool {
        let found = feature_names::find(feature);
        found.is_some_and(|(at, bit)| self.register(at) & 1 << bit != 0)
    }

    /// Describes it for a client.
    pub(crate) fn describe(&self, profile: CpuProfile) -> CpuDescription {
        let leaf = |e: &kvm_cpuid_entry2| CpuidLeaf {
            function: e.function,
            index: e.index,
            eax: e.eax,
            ebx: e.ebx,
            ecx: e.ecx,
            edx: e.edx,
        };
        CpuDescription {
            profile,
            vendor: self.vendor_name(),
            features: self.features().into_iter().map(str::to_owned).collect(),
            cpuid: self.cpuid.as_slice().iter().map(leaf).collect(),
            arch_capabilities: self.visible_arch_capabilities(),
        }
    }

    /// The CPU that a client describes; `None` if there are more leaves than KVM takes.
    pub(crate) fn described(description: &CpuDescription) -> Option<Self> {
        let entry = |leaf: &CpuidLeaf| kvm_cpuid_entry2 {
            function: leaf.function,
            index: leaf.index,
            eax: leaf.eax,
            ebx: leaf.ebx,
            ecx: leaf.ecx,
            edx: leaf.edx,
            ..Default::default()
        };
        let entries: Vec<_> = description.cpuid.iter().map(entry).collect();
        Some(Self {
            cpuid: CpuId::from_entries(&entries).ok()?,
            arch_capabilities: description.arch_capabilities,
        })
    }

    /// The names of all features that have one.
    fn features(&self) -> Vec<&'static str> {
        let bits = |at: Place| {
            let value = self.register(at);
            let set = (0..32).filter(move |bit| value & 1 << bit != 0);
            set.filter_map(move |bit| feature_names::name(at, bit))
        };
        feature_names::named_registers().flat_map(bits).collect()
    }

    /// The value of `IA32_ARCH_CAPABILITIES` that the guest sees, if it sees that MSR.
    pub(crate) fn visible_arch_capabilities(&self) -> Option<u64> {
        self.arch_capabilities
            // The value alone does not count: a guest reads the MSR only if CPUID announces it.
            .filter(|_| self.has("arch_capabilities"))
    }

    /// The maker's name, 12 bytes in leaf 0.
    pub(super) fn vendor_name(&self) -> String {
        // In the order EBX, EDX, ECX.
        let word = |register| {
            let at = Place {
                function: 0,
                index: 0,
                register,
            };
            self.register(at).to_le_bytes()
        };
        String::from_utf8_lossy(&[word(1), word(3), word(2)].concat()).into_owned()
    }

    pub(super) fn vendor(&self) -> Option<Vendor> {
        match self.vendor_name().as_str() {
            "GenuineIntel" => Some(Vendor::Intel),
            // Hygon's CPUs are AMD's.
            "AuthenticAMD" | "HygonGenuine" => Some(Vendor::Amd),
            _ => None,
        }
    }
}

#[cfg(test)]
pub(super) mod testing {
    use super::*;

    /// CPUID of these leaves: function, index, and EAX to EDX.
    pub(in super::super) fn cpuid(leaves: &[(u32, u32, [u32; 4])]) -> CpuId {
        let entry =
            |&(function, index, [eax, ebx, ecx, edx]): &(u32, u32, [u32; 4])| kvm_cpuid_entry2 {
                function,
                index,
                eax,
                ebx,
                ecx,
                edx,
                ..Default::default()
            };
        let entries: Vec<_> = leaves.iter().map(entry).collect();
        CpuId::from_entries(&entries).unwrap()
    }
}
