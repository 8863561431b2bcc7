//! MSRs of Hyper-V's paravirtual interfaces (Hypervisor Top Level Functional Specification 6.0b,
//! appendix F).

/// The number of a virtual processor, which KVM chooses.
pub(crate) const VP_INDEX: u32 = 0x4000_0002;
/// The reference counter, and the frequencies of the TSC and the APIC's timer.
const DERIVED: [u32; 3] = [0x4000_0020, 0x4000_0022, 0x4000_0023];

/// MSRs of the synthetic interrupt controller: control, version, pages of event flags and messages.
const SCONTROL: u32 = 0x4000_0080;
const SIMP: u32 = 0x4000_0083;
/// Its 16 interrupt sources.
const SINT0: u32 = 0x4000_0090;
const SINT15: u32 = 0x4000_009f;
/// The four timers: configuration and count by turns.
const STIMER0_CONFIG: u32 = 0x4000_00b0;
const STIMER3_COUNT: u32 = 0x4000_00b7;

/// Whether KVM computes this MSR from its clocks, and ignores what it is set to. KVM has them for guests
/// that do not see the interfaces, too, and a KVM that was built without the interfaces refuses them.
pub(crate) fn is_derived(index: u32) -> bool {
    DERIVED.contains(&index)
}

/// Whether this is an MSR of the synthetic interrupt controller or a timer.
pub(crate) fn is_synthetic(index: u32) -> bool {
    matches!(index, SCONTROL..=SINT15 | STIMER0_CONFIG..=STIMER3_COUNT)
}

/// The MSRs of the synthetic interrupt controller and the timers, in the order in which they are set.
///
/// KVM starts a timer that is enabled when either of its MSRs is set, so that the order of
/// configuration and count does not matter. The MSR between pages and sources (EOM) holds nothing.
pub(crate) fn synthetic() -> impl Iterator<Item = u32> {
    (SCONTROL..=SIMP)
        .chain(SINT0..=SINT15)
        .chain(STIMER0_CONFIG..=STIMER3_COUNT)
}
