//! The CPUID leaves that say how vCPUs are arranged in packages, dies, cores and threads (Intel SDM
//! volume 2A, CPUID; AMD APM volume 3, appendix E).
//!
//! All of them describe APIC ids: which bits number the threads of a core, the cores of a die and
//! the dies of a package. Software looks at several, by vendor and age, so all must agree. The
//! host's own values are of no use: they describe other APIC ids.

use hypervisor::arch::kvm_cpuid_entry2;
use spec::CpuTopology;

/// `KVM_CPUID_FLAG_SIGNIFCANT_INDEX`: the leaf has subleaves.
const BY_INDEX: u32 = 1;

const EXTENDED_TOPOLOGY: u32 = 0xb;
const EXTENDED_TOPOLOGY_V2: u32 = 0x1f;
const AMD_EXTENDED_TOPOLOGY: u32 = 0x8000_0026;

/// The first four bytes of Intel's name, in EBX of leaf 0.
const GENUINE_INTEL: u32 = u32::from_le_bytes(*b"Genu");

/// One vCPU's place, and the APIC id bits of the arrangement.
pub(crate) struct Place {
    apic_id: u32,
    threads_per_core: u32,
    threads_per_die: u32,
    threads_per_package: u32,
    dies_per_package: u32,
    /// APIC id bits below the core's, the die's and the package's number.
    core_shift: u32,
    die_shift: u32,
    package_shift: u32,
}

impl Place {
    /// Returns the place of the vCPU with this APIC id.
    pub(crate) fn new(topology: &CpuTopology, apic_id: u32) -> Self {
        let [thread_bits, core_bits, die_bits] = topology.apic_id_bits();
        let threads_per_die = topology
            .threads_per_core
            .saturating_mul(topology.cores_per_die);
        Self {
            apic_id,
            threads_per_core: topology.threads_per_core,
            threads_per_die,
            threads_per_package: threads_per_die.saturating_mul(topology.dies_per_package),
            dies_per_package: topology.dies_per_package,
            core_shift: thread_bits,
            die_shift: thread_bits + core_bits,
            package_shift: thread_bits + core_bits + die_bits,
        }
    }

    /// Makes the leaves of this vCPU out of the host's.
    pub(crate) fn shape(&self, entries: &mut Vec<kvm_cpuid_entry2>) {
        if let Some(first) = entries.iter_mut().find(|entry| entry.function == 0)
            && first.ebx == GENUINE_INTEL
            && self.dies_per_package > 1
        {
            // The one leaf in which Intel's CPUs have dies. AMD's have them in leaf 8000_001E.
            first.eax = first.eax.max(EXTENDED_TOPOLOGY_V2);
        }
        let greatest = |base| {
            let entry = entries.iter().find(|entry| entry.function == base);
            entry.map_or(0, |entry| entry.eax)
        };
        let (basic, extended) = (greatest(0), greatest(0x8000_0000));
        // The host's levels may be more than ours: left in, software would find a second, different
        // topology behind the first.
        entries.retain(|entry| {
            !matches!(
                entry.function,
                EXTENDED_TOPOLOGY | EXTENDED_TOPOLOGY_V2 | AMD_EXTENDED_TOPOLOGY
            )
        });
        entries.iter_mut().for_each(|entry| self.adjust(entry));
        if basic >= EXTENDED_TOPOLOGY {
            entries.extend(self.levels(EXTENDED_TOPOLOGY, &self.basic_levels()));
        }
        if basic >= EXTENDED_TOPOLOGY_V2 {
            entries.extend(self.levels(EXTENDED_TOPOLOGY_V2, &self.v2_levels()));
        }
        if extended >= AMD_EXTENDED_TOPOLOGY {
            entries.extend(self.levels(AMD_EXTENDED_TOPOLOGY, &self.amd_levels()));
        }
    }

    /// Level type, shift to the number of the next level, logical processors.
    fn basic_levels(&self) -> [(u32, u32, u32); 2] {
        const SMT: u32 = 1;
        const CORE: u32 = 2;
        [
            (SMT, self.core_shift, self.threads_per_core),
            // There is no level of dies in this leaf: its last one ends at the package.
            (CORE, self.package_shift, self.threads_per_package),
        ]
    }

    fn v2_levels(&self) -> Vec<(u32, u32, u32)> {
        const SMT: u32 = 1;
        const CORE: u32 = 2;
        const DIE: u32 = 5;
        let mut levels = vec![
            (SMT, self.core_shift, self.threads_per_core),
            (CORE, self.die_shift, self.threads_per_die),
        ];
        if self.dies_per_package > 1 {
            levels.push((DIE, self.package_shift, self.threads_per_package));
        }
        levels
    }

    fn amd_levels(&self) -> [(u32, u32, u32); 4] {
        const CORE: u32 = 1;
        const COMPLEX: u32 = 2;
        const DIE: u32 = 3;
        const SOCKET: u32 = 4;
        [
            (CORE, self.core_shift, self.threads_per_core),
            // A die has one complex.
            (COMPLEX, self.die_shift, self.threads_per_die),
            (DIE, self.die_shift, self.threads_per_die),
            (SOCKET, self.package_shift, self.threads_per_package),
        ]
    }

    fn levels(&self, function: u32, levels: &[(u32, u32, u32)]) -> Vec<kvm_cpuid_entry2> {
        // A level of type 0 ends the list.
        let all = levels.iter().copied().chain([(0, 0, 0)]);
        let subleaf = |(index, (kind, shift, count)): (u32, (u32, u32, u32))| kvm_cpuid_entry2 {
            function,
            index,
            flags: BY_INDEX,
            eax: shift,
            ebx: count,
            ecx: kind << 8 | index,
            edx: self.apic_id,
            ..Default::default()
        };
        (0..).zip(all).map(subleaf).collect()
    }

    fn adjust(&self, entry: &mut kvm_cpuid_entry2) {
        const HTT: u32 = 1 << 28;
        match entry.function {
            1 => {
                // APIC ids that a package can have, and this vCPU's.
                // The field has 8 bits (Intel SDM volume 2A, CPUID leaf 01H): more ids than 255 are
                // only in leaf 0BH.
                let ids = (1_u32 << self.package_shift.min(8)).min(255);
                entry.ebx = entry.ebx & 0x0000_ffff | ids << 16 | (self.apic_id & 0xff) << 24;
                entry.edx &= !HTT;
                if self.threads_per_package > 1 {
                    entry.edx |= HTT;
                }
            }
            // A cache of type 0 ends the list.
            4 if entry.eax & 0x1f != 0 => {
                // EAX[31:26] of leaf 04H is the greatest core id of a package, so a mask and not a
                // count.
                let cores = mask(self.package_shift - self.core_shift, 6);
                entry.eax = entry.eax & 0x3fff | self.sharing(entry.eax) << 14 | cores << 26;
            }
            0x8000_0008 => {
                let last = (self.threads_per_package - 1).min(0xff);
                entry.ecx = entry.ecx & !0xf0ff | self.package_shift.min(15) << 12 | last;
            }
            0x8000_001d if entry.eax & 0x1f != 0 => {
                entry.eax = entry.eax & !(0xfff << 14) | self.sharing(entry.eax) << 14;
            }
            0x8000_001e => {
                let in_package = self.apic_id & mask(self.package_shift, 32);
                let core = in_package >> self.core_shift;
                let package = self.apic_id >> self.package_shift;
                let die = package * self.dies_per_package + (in_package >> self.die_shift);
                entry.eax = self.apic_id;
                entry.ebx = (self.threads_per_core - 1).min(0xff) << 8 | core & 0xff;
                entry.ecx = (self.dies_per_package - 1).min(7) << 8 | die & 0xff;
                entry.edx = 0;
            }
            _ => {}
        }
    }

    /// APIC ids that share a cache, minus one: those of a die share the third level, those of a
    /// core the others.
    fn sharing(&self, eax: u32) -> u32 {
        match eax >> 5 & 7 {
            3.. => mask(self.die_shift, 12),
            _ => mask(self.core_shift, 12),
        }
    }
}

/// Returns a mask of `bits` ones, at most `most`.
fn mask(bits: u32, most: u32) -> u32 {
    let bits = bits.min(most);
    1_u32.checked_shl(bits).map_or(u32::MAX, |power| power - 1)
}

#[cfg(test)]
mod tests;
