//! CPU features: those that guests are offered, and those that a migrating guest must find again.

use hypervisor::arch::CpuId;

use super::cpu_model::CpuModel;
use super::feature_names::{self, Place};

/// Removes from the host's CPUID the features whose state is not saved.
///
/// That is all supervisor state (`IA32_XSS`), which `KVM_GET_XSAVE` does not contain: above all
/// shadow stacks and indirect branch tracking (CET).
pub(crate) fn offered(mut supported: CpuId) -> CpuId {
    const SHADOW_STACK: u32 = 1 << 7;
    const BRANCH_TRACKING: u32 = 1 << 20;
    const SUPERVISOR_SHADOW_STACK: u32 = 1 << 18;
    const SUPERVISOR_STATE: u32 = 1;
    for entry in supported.as_mut_slice() {
        match (entry.function, entry.index) {
            (7, 0) => {
                entry.ecx &= !SHADOW_STACK;
                entry.edx &= !BRANCH_TRACKING;
            }
            (7, 1) => entry.edx &= !SUPERVISOR_SHADOW_STACK,
            // The components that XSS can enable, and what each of them is.
            (0xd, 1) => (entry.ecx, entry.edx) = (0, 0),
            (0xd, 2..) if entry.ecx & SUPERVISOR_STATE != 0 => {
                (entry.eax, entry.ebx, entry.ecx, entry.edx) = (0, 0, 0, 0);
            }
            _ => {}
        }
    }
    supported
}

/// Removes hardware virtualization, VMX of Intel and SVM of AMD, with which a guest would run guests of
/// its own. VMX is described by MSRs, which KVM denies without the feature; SVM has a leaf as well.
pub(crate) fn without_virtualization(mut cpuid: CpuId) -> CpuId {
    const VMX: u32 = 1 << 5;
    const SVM: u32 = 1 << 2;
    for entry in cpuid.as_mut_slice() {
        match entry.function {
            1 => entry.ecx &= !VMX,
            0x8000_0001 => entry.ecx &= !SVM,
            0x8000_000a => (entry.eax, entry.ebx, entry.ecx, entry.edx) = (0, 0, 0, 0),
            _ => {}
        }
    }
    cpuid
}

/// How a part of a register is compared, between the CPU that a guest has seen (wanted) and a
/// host's (here).
#[derive(Clone, Copy)]
enum Rule {
    /// Every bit of this mask that is wanted must be set here.
    Subset(u32),
    /// Every bit of this mask that is set here must be wanted: a set bit takes something away.
    Superset(u32),
    /// The number in these bits must be at least as large here.
    AtLeast(u32, u32, &'static str),
    /// The number in these bits must be the same.
    Equal(u32, u32, &'static str),
}

use Rule::{AtLeast, Equal, Subset, Superset};

type Rules = &'static [Rule];

const IGNORED: Rules = &[];
const FEATURES: Rules = &[Subset(u32::MAX)];

/// The rules for EAX, EBX, ECX and EDX of a leaf. A leaf that is not known has feature bits.
#[rustfmt::skip]
fn rules(function: u32, index: u32) -> [Rules; 4] {
    // Set by software (CR4), or described by the topology.
    const OSXSAVE: u32 = 1 << 27;
    const HTT: u32 = 1 << 28;
    const OSPKE: u32 = 1 << 4;
    // x87 state that newer CPUs do not save any more.
    const LESS_X87: u32 = 1 << 6 | 1 << 13;
    // A number in the middle of feature bits, for bound directory entries.
    const MAWAU: u32 = 0x1f << 17;
    const SAME: Rules = &[Equal(0, 31, "this value")];
    match (function, index) {
        // The vendor is compared by its name.
        (0, _) => [IGNORED; 4],
        (1, _) => [
            IGNORED,
            &[Equal(8, 15, "a cache line that CLFLUSH writes back, in units of 8 bytes")],
            &[Subset(!OSXSAVE)],
            &[Subset(!HTT)],
        ],
        // Power states, of which KVM passes on that the APIC timer runs in all of them.
        (6, _) => [FEATURES, IGNORED, FEATURES, IGNORED],
        (7, 0) => [
            IGNORED,
            &[Subset(!LESS_X87), Superset(LESS_X87)],
            &[Subset(!(OSPKE | MAWAU))],
            FEATURES,
        ],
        (0xa, _) => [
            &[
                AtLeast(0, 7, "version of performance monitoring"),
                AtLeast(8, 15, "performance counters"),
                AtLeast(16, 23, "bits of a performance counter"),
            ],
            // A set bit says that an event is not counted.
            &[Superset(u32::MAX)],
            FEATURES,
            &[AtLeast(0, 4, "fixed performance counters"), AtLeast(5, 12, "bits of a fixed counter")],
        ],
        // Size of extended state: EBX depends on what the guest has enabled.
        (0xd, 0) => [FEATURES, IGNORED, &[AtLeast(0, 31, "bytes of extended state")], FEATURES],
        (0xd, 1) => [FEATURES, IGNORED, FEATURES, FEATURES],
        // Where a component is in the guest's own XSAVE areas.
        (0xd, _) => [
            &[Equal(0, 31, "bytes of this component of extended state")],
            &[Equal(0, 31, "offset of this component of extended state")],
            &[Equal(0, 1, "alignment of this component of extended state")],
            IGNORED,
        ],
        // AMX tiles.
        (0x1d, 1..) | (0x1e, _) => [SAME; 4],
        // AVX10.
        (0x24, 0) => [IGNORED, &[AtLeast(0, 7, "version of AVX10"), Subset(!0xff)], IGNORED, IGNORED],
        // The hypervisor's name: its paravirtual interface is another one.
        (0x4000_0000 | 0x4000_0100, _) => [IGNORED, SAME, SAME, SAME],
        // KVM's features (EDX has hints), and the name of Hyper-V's interface: beside it, KVM's own
        // leaves are 0x100 further up.
        (0x4000_0001 | 0x4000_0101, _) => [FEATURES, IGNORED, IGNORED, IGNORED],
        // Hyper-V's version, recommendations and limits.
        (0x4000_0002 | 0x4000_0004 | 0x4000_0005, _) => [IGNORED; 4],
        (0x8000_0001, _) => [IGNORED, IGNORED, FEATURES, FEATURES],
        (0x8000_0007, _) => [IGNORED, FEATURES, IGNORED, FEATURES],
        (0x8000_0008, _) => [
            &[
                AtLeast(0, 7, "physical address bits"),
                AtLeast(8, 15, "linear address bits"),
                AtLeast(16, 23, "guest physical address bits"),
            ],
            FEATURES,
            IGNORED,
            IGNORED,
        ],
        // SVM.
        (0x8000_000a, _) => [
            &[AtLeast(0, 7, "revision of SVM")],
            &[AtLeast(0, 31, "address space identifiers")],
            IGNORED,
            FEATURES,
        ],
        // EBX: the size of microcode patches.
        (0x8000_0021, _) => [FEATURES, IGNORED, FEATURES, FEATURES],
        (0x8000_0022, _) => [
            FEATURES,
            &[AtLeast(0, 3, "performance counters of a core")],
            IGNORED,
            IGNORED,
        ],
        // Caches and TLBs, power, frequencies, names, and hints of what is fast.
        (2 | 4 | 5 | 0x15 | 0x16 | 0x18 | 0x8000_0000 | 0x8000_0002..=0x8000_0006 | 0x8000_0019
            | 0x8000_001a | 0x8000_001d, _) => [IGNORED; 4],
        // Described by the machine's own topology.
        (0xb | 0x1f | 0x8000_001e | 0x8000_0026, _) => [IGNORED; 4],
        // The list of subleaves, and memory encryption, which KVM does not give to guests.
        (0x1d, 0) | (0x8000_001f, _) => [IGNORED; 4],
        _ => [FEATURES; 4],
    }
}

/// The number of the MSR `IA32_ARCH_CAPABILITIES`, which lists the weaknesses that a CPU does not have.
pub(crate) const ARCH_CAPABILITIES: u32 = 0x10a;

/// Bits of `IA32_ARCH_CAPABILITIES` that say that a CPU has a weakness: RSBA and RRSBA, whose return predictor
/// can be misled. A guest that does not know of it has no defence.
pub(super) const HAZARDS: u64 = 1 << 2 | 1 << 19;

/// Whether a register says nothing that a guest depends on.
pub(super) fn is_ignored(function: u32, index: u32, register: usize) -> bool {
    rules(function, index)
        .get(register)
        .is_none_or(|rules| rules.is_empty())
}

/// Lists what `wanted` CPUs have and these lack. A guest that has seen it relies on it.
pub(crate) fn lacking(here: &CpuModel, wanted: &CpuModel) -> Vec<String> {
    let mut lacking = Vec::new();
    let (ours, theirs) = (here.vendor_name(), wanted.vendor_name());
    if ours != theirs {
        lacking.push(format!("a CPU from {theirs} (this host's is from {ours})"));
    }
    for entry in wanted.cpuid.as_slice() {
        let (function, index) = (entry.function, entry.index);
        for (register, rules) in rules(function, index).into_iter().enumerate() {
            let at = Place {
                function,
                index,
                register,
            };
            let (wanted, here) = (wanted.register(at), here.register(at));
            for rule in rules {
                rule.judge(at, wanted, here, &mut lacking);
            }
        }
    }
    if let Some(seen) = wanted.visible_arch_capabilities() {
        let here = here.arch_capabilities.unwrap_or(0);
        let bits = |set: u64| (0..64).filter(move |bit| set & 1 << bit != 0);
        let fewer = bits(seen & !here & !HAZARDS);
        lacking.extend(fewer.map(|bit| format!("IA32_ARCH_CAPABILITIES[{bit}]")));
        // The other way round: a bit that is set here and was not seen is a weakness that the guest
        // does not defend against.
        let more = bits(here & !seen & HAZARDS);
        lacking.extend(more.map(|bit| format!("a clear IA32_ARCH_CAPABILITIES[{bit}]")));
    }
    lacking
}

impl Rule {
    fn judge(self, place: Place, wanted: u32, here: u32, lacking: &mut Vec<String>) {
        let bits = |set: u32| (0..32).filter(move |bit| set & 1 << bit != 0);
        let number = |register: u32, low: u32, high: u32| {
            let width = high - low + 1;
            register >> low & 1_u32.checked_shl(width).map_or(u32::MAX, |power| power - 1)
        };
        match self {
            Subset(mask) => {
                let fewer = bits(wanted & !here & mask);
                lacking.extend(fewer.map(|bit| match feature_names::name(place, bit) {
                    Some(name) => format!("{name} ({place}[{bit}])"),
                    None => format!("{place}[{bit}]"),
                }));
            }
            Superset(mask) => {
                let more = bits(here & !wanted & mask);
                lacking.extend(more.map(|bit| format!("a clear {place}[{bit}]")));
            }
            AtLeast(low, high, what) => {
                let (wanted, here) = (number(wanted, low, high), number(here, low, high));
                if here < wanted {
                    let place = format!("{place}[{high}:{low}]");
                    lacking.push(format!("{wanted} {what} in {place} ({here} here)"));
                }
            }
            Equal(low, high, what) => {
                let (wanted, here) = (number(wanted, low, high), number(here, low, high));
                if here != wanted {
                    let place = format!("{place}[{high}:{low}]");
                    lacking.push(format!("{what} {wanted:#x} in {place} ({here:#x} here)"));
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::cpu_model::testing::cpuid;
    use super::*;

    fn lacking(here: &CpuId, wanted: &CpuId) -> Vec<String> {
        let model = |cpuid: &CpuId| CpuModel {
            cpuid: cpuid.clone(),
            arch_capabilities: None,
        };
        super::lacking(&model(here), &model(wanted))
    }

    fn registers(cpuid: &CpuId, at: usize) -> [u32; 4] {
        let entry = &cpuid.as_slice()[at];
        [entry.eax, entry.ebx, entry.ecx, entry.edx]
    }

    fn of(leaf: (u32, u32), wanted: [u32; 4], here: [u32; 4]) -> Vec<String> {
        let side = |registers| cpuid(&[(leaf.0, leaf.1, registers)]);
        lacking(&side(here), &side(wanted))
    }

    /// A guest may move to a CPU that has more, and not to one that lacks something, in each leaf
    /// that has features or sizes.
    #[test]
    fn each_kind_of_leaf_is_compared() {
        for (leaf, register, more, fewer) in [
            ((1, 0), 2, 0b11, 0b01),
            ((7, 0), 3, 0b11, 0b01),
            ((7, 1), 3, 1 << 4, 0),
            ((7, 2), 3, 1 << 5, 0),
            ((0xd, 0), 2, 2688, 832),
            ((0xa, 0), 0, 2 << 8, 1 << 8),
            ((0x4000_0001, 0), 0, 1 << 24, 0),
            ((0x8000_0008, 0), 0, 48 << 8 | 48, 48 << 8 | 39),
            ((0x8000_0008, 0), 0, 57 << 8 | 48, 48 << 8 | 48),
            ((0x8000_0008, 0), 1, 1 << 14, 0),
            ((0x8000_0021, 0), 0, 1 << 8, 0),
            ((0x8000_0021, 0), 2, 0b100, 0),
            // A leaf that is not defined yet.
            ((0x2a, 3), 1, 1, 0),
        ] {
            let (mut high, mut low) = ([0; 4], [0; 4]);
            (high[register], low[register]) = (more, fewer);
            assert_eq!(of(leaf, low, high), [""; 0], "{leaf:x?} to a CPU with more");
            let found = of(leaf, high, low);
            assert_eq!(found.len(), 1, "{leaf:x?}: {found:?}");
            assert!(found[0].contains(&format!("CPUID.{:X}H:{}", leaf.0, leaf.1)));
            // The leaf is not there at all.
            assert!(!lacking(&cpuid(&[]), &cpuid(&[(leaf.0, leaf.1, high)])).is_empty());
        }
    }

    #[test]
    fn compares_equal_values_and_inverted_bits() {
        // An XSAVE component at another offset.
        let (wanted, here) = ([64, 832, 0, 0], [64, 2432, 0, 0]);
        assert_eq!(of((0xd, 5), wanted, here).len(), 1);
        assert_eq!(of((0xd, 5), here, wanted).len(), 1);
        assert_eq!(of((1, 0), [0, 8 << 8, 0, 0], [0, 4 << 8, 0, 0]).len(), 1);
        assert_eq!(of((0x4000_0000, 0), [1, 2, 3, 4], [1, 2, 3, 5]).len(), 1);
        // A CPU that saves less of the x87, and one that counts an event less.
        assert_eq!(
            of((7, 0), [0; 4], [0, 1 << 13, 0, 0]),
            ["a clear CPUID.7H:0.EBX[13]"]
        );
        assert_eq!(of((7, 0), [0, 1 << 13, 0, 0], [0; 4]), [""; 0]);
        assert_eq!(of((0xa, 0), [0; 4], [0, 1, 0, 0]).len(), 1);
    }

    #[test]
    fn names_frequencies_and_topology_may_differ() {
        for leaf in [
            0xb,
            0x16,
            0x1f,
            0x8000_0002,
            0x8000_001d,
            0x8000_001e,
            0x8000_0026,
            4,
            2,
        ] {
            assert_eq!(of((leaf, 0), [5; 4], [6; 4]), [""; 0], "{leaf:x}");
        }
        // Family and model, the vCPU's own APIC id.
        assert_eq!(
            of((1, 0), [5, 5 << 24, 0, 1 << 28], [6, 6 << 24, 0, 0]),
            [""; 0]
        );
    }

    #[test]
    fn another_vendor_is_named() {
        let vendor = |name: &[u8; 12]| {
            let word = |at: usize| u32::from_le_bytes(name[at..at + 4].try_into().unwrap());
            cpuid(&[(0, 0, [1, word(0), word(8), word(4)])])
        };
        let found = lacking(&vendor(b"AuthenticAMD"), &vendor(b"GenuineIntel"));
        assert_eq!(
            found,
            ["a CPU from GenuineIntel (this host's is from AuthenticAMD)"]
        );
    }

    #[test]
    fn guest_without_nesting_sees_no_virtualization() {
        let all = [u32::MAX; 4];
        let leaves = [(1, 0), (7, 0), (0x8000_0001, 0), (0x8000_000a, 0)];
        let here = cpuid(&leaves.map(|(function, index)| (function, index, all)));
        let hidden = without_virtualization(here.clone());
        let registers = |at: usize| registers(&hidden, at);
        assert_eq!(registers(0), [u32::MAX, u32::MAX, !(1 << 5), u32::MAX]);
        assert_eq!(registers(1), all, "other leaves stay");
        assert_eq!(registers(2), [u32::MAX, u32::MAX, !(1 << 2), u32::MAX]);
        assert_eq!(registers(3), [0; 4]);
        // The guest may move to a host without it, and one that has seen it may not.
        assert_eq!(lacking(&hidden, &hidden), [""; 0]);
        assert_eq!(lacking(&here, &hidden), [""; 0]);
        assert!(!lacking(&hidden, &here).is_empty());
    }

    /// The MSR that lists weaknesses: a guest that knows that its CPU has none stays on such CPUs.
    #[test]
    fn weaknesses_are_compared_where_the_guest_sees_them() {
        const VISIBLE: u32 = 1 << 29;
        let model = |edx: u32, arch_capabilities: Option<u64>| CpuModel {
            cpuid: cpuid(&[(7, 0, [0, 0, 0, edx])]),
            arch_capabilities,
        };
        let of = |here: u64, wanted: Option<u64>| {
            super::lacking(&model(VISIBLE, Some(here)), &model(VISIBLE, wanted))
        };
        assert_eq!(
            of(0b101, Some(0b001)),
            ["a clear IA32_ARCH_CAPABILITIES[2]"]
        );
        assert_eq!(of(0b001, Some(0b101)), [""; 0]);
        assert_eq!(of(0b001, Some(0b1001)), ["IA32_ARCH_CAPABILITIES[3]"]);
        // A source that does not say, and a guest that cannot see it.
        assert_eq!(of(0, None), [""; 0]);
        let hidden = model(0, Some(1));
        assert_eq!(super::lacking(&model(0, Some(0)), &hidden), [""; 0]);
    }

    #[test]
    fn state_that_is_not_saved_is_not_offered() {
        let all = [u32::MAX; 4];
        let offered = offered(cpuid(&[
            (7, 0, all),
            (7, 1, all),
            (0xd, 1, all),
            (0xd, 2, [256, 576, 0, 0]),
            (0xd, 11, [16, 0, 1, 0]),
        ]));
        let registers = |at: usize| registers(&offered, at);
        let [_, _, ecx, edx] = registers(0);
        assert_eq!(
            (ecx & 1 << 7, edx & 1 << 20),
            (0, 0),
            "shadow stacks, branch tracking"
        );
        assert_eq!(
            (!ecx).count_ones() + (!edx).count_ones(),
            2,
            "and nothing else"
        );
        assert_eq!(registers(1)[3], !(1 << 18), "supervisor shadow stacks");
        assert_eq!(
            registers(2)[2..],
            [0, 0],
            "no supervisor state can be enabled"
        );
        assert_eq!(registers(3), [256, 576, 0, 0]);
        assert_eq!(registers(4), [0; 4]);
    }
}
