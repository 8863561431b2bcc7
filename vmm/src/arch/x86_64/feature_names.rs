//! Names of CPUID's feature bits, for profiles and for messages.
//!
//! The names are those of QEMU's CPU models and of `/proc/cpuinfo`, which operators know.

use std::fmt;

/// EAX, EBX, ECX and EDX, by their index in an entry's registers.
pub(super) const REGISTER_NAMES: [&str; 4] = ["EAX", "EBX", "ECX", "EDX"];

const EAX: usize = 0;
const EBX: usize = 1;
const ECX: usize = 2;
const EDX: usize = 3;

/// One register of a CPUID leaf.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Place {
    pub(super) function: u32,
    pub(super) index: u32,
    pub(super) register: usize,
}

/// Shows the register like `CPUID.7H:0.EBX`.
impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let register = REGISTER_NAMES.get(self.register).copied().unwrap_or("?");
        write!(f, "CPUID.{:X}H:{}.{register}", self.function, self.index)
    }
}

/// The registers whose bits have names. Words are the bits from 0 on; `-` is a bit without a name.
/// AMD repeats many bits of leaf 1 in leaf 8000_0001: those have no names there.
#[rustfmt::skip]
const NAMED: &[(u32, u32, usize, &str)] = &[
    (1, 0, ECX,
        "pni pclmulqdq dtes64 monitor ds_cpl vmx smx est tm2 ssse3 cid - fma cx16 xtpr pdcm \
         - pcid dca sse4_1 sse4_2 x2apic movbe popcnt tsc_deadline aes xsave osxsave avx f16c \
         rdrand hypervisor"),
    (1, 0, EDX,
        "fpu vme de pse tsc msr pae mce cx8 apic - sep mtrr pge mca cmov pat pse36 pn clflush - \
         ds acpi mmx fxsr sse sse2 ss ht tm ia64 pbe"),
    (6, 0, EAX, "- - arat"),
    (7, 0, EBX,
        "fsgsbase tsc_adjust sgx bmi1 hle avx2 fdp_excptn_only smep bmi2 erms invpcid rtm cqm \
         zero_fcs_fds mpx rdt_a avx512f avx512dq rdseed adx smap avx512ifma - clflushopt clwb \
         intel_pt avx512pf avx512er avx512cd sha_ni avx512bw avx512vl"),
    (7, 0, ECX,
        "prefetchwt1 avx512vbmi umip pku ospke waitpkg avx512_vbmi2 shstk gfni vaes vpclmulqdq \
         avx512_vnni avx512_bitalg tme avx512_vpopcntdq - la57 - - - - - rdpid kl \
         bus_lock_detect cldemote - movdiri movdir64b enqcmd sgx_lc pks"),
    (7, 0, EDX,
        "- - avx512_4vnniw avx512_4fmaps fsrm uintr - - avx512_vp2intersect srbds_ctrl md_clear \
         rtm_always_abort - - serialize hybrid tsx_ldtrk - pconfig arch_lbr ibt - amx_bf16 \
         avx512_fp16 amx_tile amx_int8 spec_ctrl stibp flush_l1d arch_capabilities \
         core_capabilities ssbd"),
    (7, 1, EAX,
        "sha512 sm3 sm4 - avx_vnni avx512_bf16 lass cmpccxadd arch_perfmon_ext - fzrm fsrs fsrc \
         - - - - fred lkgs wrmsrns nmi_src amx_fp16 hreset avx_ifma - - lam"),
    (7, 1, EDX,
        "- - - - avx_vnni_int8 avx_ne_convert - - amx_complex - avx_vnni_int16 - - - \
         prefetchiti - - - cet_sss avx10"),
    (7, 2, EDX, "intel_psfd ipred_ctrl rrsba_ctrl ddpd_u bhi_ctrl mcdt_no"),
    (0xd, 1, EAX, "xsaveopt xsavec xgetbv1 xsaves xfd"),
    (0x8000_0001, 0, ECX,
        "lahf_lm cmp_legacy svm extapic cr8legacy abm sse4a misalignsse 3dnowprefetch osvw ibs \
         xop skinit wdt - lwp fma4 tce - nodeid_msr - tbm topoext perfctr_core perfctr_nb - bpext \
         ptsc perfctr_llc mwaitx"),
    (0x8000_0001, 0, EDX,
        "- - - - - - - - - - - syscall - - - - - - - mp nx - mmxext - - fxsr_opt pdpe1gb rdtscp - \
         lm 3dnowext 3dnow"),
    (0x8000_0007, 0, EDX, "- - - - - - - - invtsc"),
    (0x8000_0008, 0, EBX,
        "clzero irperf xsaveerptr - rdpru - - - - wbnoinvd - - ibpb - ibrs amd_stibp - \
         stibp_always_on - - - - - - amd_ssbd virt_ssbd amd_no_ssb - amd_psfd btc_no ibpb_ret"),
    (0x8000_0021, 0, EAX,
        "no_nested_data_bp - lfence_rdtsc - - - null_sel_clr_base - auto_ibrs - - - - - - - - - - \
         - - - - - - - - sbpb ibpb_brtype srso_no"),
    (0x8000_0021, 0, ECX, "- tsa_sq_no tsa_l1_no"),
];

fn words(bits: &'static str) -> impl Iterator<Item = &'static str> {
    bits.split_ascii_whitespace()
}

fn place(function: u32, index: u32, register: usize) -> Place {
    Place {
        function,
        index,
        register,
    }
}

/// The name of a bit.
pub(super) fn name(at: Place, bit: u32) -> Option<&'static str> {
    let mut named = NAMED.iter();
    let found = named.find(|row| place(row.0, row.1, row.2) == at)?;
    let name = words(found.3).nth(usize::try_from(bit).ok()?)?;
    (name != "-").then_some(name)
}

/// Returns the place of a named bit; `None` if there is no such name.
pub(super) fn find(feature: &str) -> Option<(Place, u32)> {
    NAMED.iter().find_map(|row| {
        let bit = words(row.3).position(|word| word == feature && word != "-")?;
        Some((place(row.0, row.1, row.2), u32::try_from(bit).ok()?))
    })
}

/// All registers whose bits have names.
pub(super) fn named_registers() -> impl Iterator<Item = Place> {
    NAMED.iter().map(|row| place(row.0, row.1, row.2))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_name_stands_for_one_bit() {
        let mut seen = std::collections::BTreeSet::new();
        for (function, index, register, bits) in NAMED {
            let at = place(*function, *index, *register);
            assert!(words(bits).count() <= 32, "{at}");
            for (bit, word) in (0..).zip(words(bits)).filter(|(_, word)| *word != "-") {
                assert!(seen.insert(word), "{word} twice");
                assert_eq!(find(word), Some((at, bit)));
                assert_eq!(name(at, bit), Some(word));
            }
        }
        assert_eq!(find("-"), None);
        assert_eq!(find("avx1024"), None);
    }

    /// Spot checks against the manuals: the last named bit of each long row, by its number.
    #[test]
    fn bits_are_those_of_the_manuals() {
        for (feature, function, register, bit) in [
            ("hypervisor", 1, ECX, 31),
            ("x2apic", 1, ECX, 21),
            ("pbe", 1, EDX, 31),
            ("clflush", 1, EDX, 19),
            ("avx512vl", 7, EBX, 31),
            ("avx512f", 7, EBX, 16),
            ("rdpid", 7, ECX, 22),
            ("la57", 7, ECX, 16),
            ("pks", 7, ECX, 31),
            ("ssbd", 7, EDX, 31),
            ("ibt", 7, EDX, 20),
            ("mwaitx", 0x8000_0001, ECX, 29),
            ("topoext", 0x8000_0001, ECX, 22),
            ("3dnow", 0x8000_0001, EDX, 31),
            ("nx", 0x8000_0001, EDX, 20),
            ("ibpb_ret", 0x8000_0008, EBX, 30),
            ("ibpb", 0x8000_0008, EBX, 12),
            ("srso_no", 0x8000_0021, EAX, 29),
            ("auto_ibrs", 0x8000_0021, EAX, 8),
        ] {
            assert_eq!(
                find(feature),
                Some((place(function, 0, register), bit)),
                "{feature}"
            );
        }
        assert_eq!(find("lam"), Some((place(7, 1, EAX), 26)));
        assert_eq!(find("avx10"), Some((place(7, 1, EDX), 19)));
    }
}
