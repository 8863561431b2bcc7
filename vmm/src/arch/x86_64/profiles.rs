//! CPU profiles: sets of features that hosts of different ages have in common.
//!
//! A guest with a profile sees what the profile says and nothing else of its host, so that it can move to
//! each host that has the profile. The sets of named models are those of QEMU's models, without TSX,
//! AMX, AVX10 and performance counters.

use hypervisor::arch::{CpuId, kvm_cpuid_entry2};
use spec::{CpuProfile, ProfileFit};

use super::cpu_model::{CpuModel, Vendor};
use super::feature_names::{self, Place};
use super::features;

/// A profile, by its difference from the one below it.
struct Step {
    below: Option<CpuProfile>,
    features: &'static str,
    /// Features of the profiles below that this one does not have.
    without: &'static str,
    vendor: Option<Vendor>,
    physical_bits: u32,
    /// Bits of `IA32_ARCH_CAPABILITIES` that the guest may see.
    arch_capabilities: u64,
}

/// Features that a guest of any profile gets where its host has them. Every KVM host has them, software sets
/// them, or they describe the arrangement of vCPUs.
const ALWAYS: &str = "vme de pse pge mtrr mca mce pat pse36 apic ss ht x2apic tsc_deadline osxsave \
    hypervisor arat tsc_adjust cmp_legacy topoext ospke \
    svm vmx";

/// Protections against speculation, for which updated microcode is enough on all models of the vendor. They are
/// not demanded of the host where a guest boots, and passed on where it has them: a guest is as safe as it would be
/// without a profile, and moves between hosts with the same protections.
const PROTECTIONS_OF_INTEL: &str = "spec_ctrl stibp ssbd flush_l1d md_clear";
const PROTECTIONS_OF_AMD: &str = "ibpb";
/// The same, of later models.
const PROTECTIONS: &str = "ibrs amd_stibp amd_ssbd virt_ssbd amd_psfd stibp_always_on lfence_rdtsc \
    null_sel_clr_base no_nested_data_bp auto_ibrs mcdt_no arch_capabilities";

/// The features of x86-64 level 1, as of the psABI of x86-64.
const LEVEL_1: &str = "fpu tsc msr pae cx8 sep cmov clflush mmx fxsr sse sse2 nx lm syscall";

/// KVM's paravirtual features of Linux 5.10: a later host has more.
const KVM_FEATURES: u32 = 0x0100_7efb;

const RDCTL_NO: u64 = 1;
const IBRS_ALL: u64 = 1 << 1;
const SKIP_L1DFL: u64 = 1 << 3;
const MDS_NO: u64 = 1 << 5;
const PSCHANGE_MC_NO: u64 = 1 << 6;
const TAA_NO: u64 = 1 << 8;
const SBDR_SSDP_NO: u64 = 1 << 13;
const FBSDP_NO: u64 = 1 << 14;
const PSDP_NO: u64 = 1 << 15;
const PBRSB_NO: u64 = 1 << 24;
const OF_CASCADELAKE: u64 = RDCTL_NO | IBRS_ALL | SKIP_L1DFL | MDS_NO;
const OF_ICELAKE: u64 = OF_CASCADELAKE | PSCHANGE_MC_NO | TAA_NO;
const OF_SAPPHIRE_RAPIDS: u64 = OF_ICELAKE | SBDR_SSDP_NO | FBSDP_NO | PSDP_NO;

/// Physical address bits of all CPUs of a level, of Intel's servers, and of AMD's.
const OF_LEVELS: u32 = 40;
const OF_INTEL: u32 = 46;
const OF_AMD: u32 = 48;

fn level(below: Option<CpuProfile>, features: &'static str) -> Step {
    Step {
        below,
        features,
        without: "",
        vendor: None,
        physical_bits: OF_LEVELS,
        arch_capabilities: 0,
    }
}

fn intel(below: CpuProfile, arch_capabilities: u64, features: &'static str) -> Step {
    Step {
        vendor: Some(Vendor::Intel),
        physical_bits: OF_INTEL,
        arch_capabilities,
        ..level(Some(below), features)
    }
}

fn amd(below: CpuProfile, features: &'static str) -> Step {
    Step {
        vendor: Some(Vendor::Amd),
        physical_bits: OF_AMD,
        ..level(Some(below), features)
    }
}

/// The step of a profile; `None` for the host's own CPU.
fn step(profile: CpuProfile) -> Option<Step> {
    use CpuProfile as P;
    Some(match profile {
        P::Host => return None,
        P::V1 => level(None, LEVEL_1),
        P::V2 => level(Some(P::V1), "cx16 lahf_lm popcnt pni sse4_1 sse4_2 ssse3"),
        // Beyond the level's own: what all CPUs of both vendors with AVX2 have.
        P::V3 => level(
            Some(P::V2),
            "avx avx2 bmi1 bmi2 f16c fma abm movbe xsave xsaveopt aes pclmulqdq rdrand fsgsbase \
             smep rdtscp",
        ),
        // Beyond the level's own: what Skylake-Server and EPYC-Genoa have in common.
        P::V4 => level(
            Some(P::V3),
            "avx512f avx512bw avx512cd avx512dq avx512vl xsavec xgetbv1 xsaves 3dnowprefetch adx \
             clwb erms invpcid pcid pdpe1gb pku rdseed smap",
        ),
        P::Nehalem => intel(P::V2, 0, ""),
        P::Westmere => intel(P::Nehalem, 0, "aes pclmulqdq"),
        P::SandyBridge => intel(P::Westmere, 0, "avx rdtscp xsave xsaveopt"),
        P::IvyBridge => intel(P::SandyBridge, 0, "erms f16c fsgsbase rdrand smep"),
        P::Haswell => intel(P::IvyBridge, 0, "abm avx2 bmi1 bmi2 fma invpcid movbe pcid"),
        P::Broadwell => intel(P::Haswell, 0, "3dnowprefetch adx rdseed smap"),
        P::SkylakeServer => intel(
            P::Broadwell,
            0,
            "avx512bw avx512cd avx512dq avx512f avx512vl clwb pdpe1gb pku xgetbv1 xsavec xsaves",
        ),
        P::CascadelakeServer => intel(
            P::SkylakeServer,
            OF_CASCADELAKE,
            "arch_capabilities avx512_vnni clflushopt",
        ),
        P::IcelakeServer => intel(
            P::CascadelakeServer,
            OF_ICELAKE,
            "avx512_vpopcntdq avx512_bitalg avx512ifma avx512vbmi avx512_vbmi2 fsrm gfni la57 \
             rdpid sha_ni umip vaes vpclmulqdq wbnoinvd",
        ),
        P::SapphireRapids => intel(
            P::IcelakeServer,
            OF_SAPPHIRE_RAPIDS,
            "avx_vnni avx512_bf16 avx512_fp16 bus_lock_detect cldemote fsrc fsrs fzrm movdir64b \
             movdiri serialize tsx_ldtrk",
        ),
        P::GraniteRapids => Step {
            without: "tsx_ldtrk",
            ..intel(
                P::SapphireRapids,
                OF_SAPPHIRE_RAPIDS | PBRSB_NO,
                "prefetchiti mcdt_no",
            )
        },
        P::Epyc => amd(
            P::V3,
            "3dnowprefetch adx clflushopt clzero cr8legacy fxsr_opt mmxext misalignsse osvw \
             pdpe1gb rdseed sha_ni smap sse4a xgetbv1 xsavec xsaveerptr xsaves",
        ),
        P::EpycRome => Step {
            // Rome's XSAVES is faulty (erratum 1386), so that updated hosts hide it.
            without: "xsaves",
            ..amd(P::Epyc, "amd_ssbd amd_stibp clwb ibrs rdpid umip wbnoinvd")
        },
        P::EpycMilan => amd(
            P::EpycRome,
            "amd_psfd erms fsrm invpcid lfence_rdtsc no_nested_data_bp null_sel_clr_base pcid pku \
             stibp_always_on vaes vpclmulqdq xsaves",
        ),
        P::EpycGenoa => amd(
            P::EpycMilan,
            "auto_ibrs avx512_bf16 avx512_vpopcntdq avx512_bitalg avx512bw avx512cd avx512dq \
             avx512f avx512ifma avx512vbmi avx512_vbmi2 avx512vl avx512_vnni gfni la57",
        ),
    })
}

fn words(list: &'static str) -> impl Iterator<Item = &'static str> {
    list.split_ascii_whitespace()
}

fn is_protection(feature: &str) -> bool {
    let all = [PROTECTIONS_OF_INTEL, PROTECTIONS_OF_AMD, PROTECTIONS];
    all.into_iter().flat_map(words).any(|word| word == feature)
}

/// A profile, with all that it has from those below it.
struct Set {
    /// All that the guest may see.
    visible: Vec<&'static str>,
    vendor: Option<Vendor>,
    physical_bits: u32,
    arch_capabilities: u64,
}

impl Set {
    /// The set of a profile; `None` for the host's own CPU.
    fn of(profile: CpuProfile) -> Option<Self> {
        let top = step(profile)?;
        let mut visible: Vec<&str> = words(ALWAYS).collect();
        let protections = match top.vendor {
            Some(Vendor::Intel) => [PROTECTIONS_OF_INTEL, ""],
            Some(Vendor::Amd) => [PROTECTIONS_OF_AMD, ""],
            None => [PROTECTIONS_OF_INTEL, PROTECTIONS_OF_AMD],
        };
        visible.extend(protections.into_iter().flat_map(words));
        let mut steps = vec![top];
        while let Some(below) = steps.last().and_then(|last| last.below).and_then(step) {
            steps.push(below);
        }
        for step in steps.iter().rev() {
            // From the lowest step up, so that a later one may add again what an earlier one took
            // away (XSAVES on Milan).
            visible.retain(|feature| words(step.without).all(|gone| gone != *feature));
            visible.extend(words(step.features));
        }
        let top = steps.swap_remove(0);
        Some(Self {
            visible,
            vendor: top.vendor,
            physical_bits: top.physical_bits,
            arch_capabilities: top.arch_capabilities,
        })
    }

    /// Features without which a host cannot run the profile.
    fn required(&self) -> impl Iterator<Item = &'static str> {
        let optional = |feature: &&str| {
            is_protection(feature) || words(ALWAYS).any(|always| always == *feature)
        };
        self.visible
            .iter()
            .copied()
            .filter(move |name| !optional(name))
    }

    fn has(&self, feature: &str) -> bool {
        self.visible.contains(&feature)
    }

    fn mask(&self, at: Place) -> u32 {
        let places = self
            .visible
            .iter()
            .filter_map(|name| feature_names::find(name));
        let bits = places.filter(|(place, _)| *place == at);
        bits.fold(0, |mask, (_, bit)| mask | 1 << bit)
    }

    /// Components of extended state that the features need (Intel SDM volume 1, 13.1).
    fn components(&self) -> u32 {
        const X87_SSE: u32 = 3;
        [("avx", 1 << 2), ("avx512f", 7 << 5), ("pku", 1 << 9)]
            .iter()
            .filter(|(feature, _)| self.has(feature))
            .fold(X87_SSE, |all, (_, bits)| all | bits)
    }

    /// Lists the features that a host lacks.
    fn lacking(&self, host: &CpuModel) -> Vec<String> {
        let vendor = host.vendor();
        let foreign = self.vendor.filter(|wanted| Some(*wanted) != vendor);
        let missing = self.required().filter(|feature| !host.has(feature));
        let foreign = foreign.into_iter().map(|wanted| wanted.to_string());
        foreign.chain(missing.map(str::to_owned)).collect()
    }

    /// Leaves of `cpu` as far as a guest of this profile sees them.
    fn cut(&self, cpu: &CpuModel) -> CpuModel {
        let mut entries = cpu.cpuid.as_slice().to_vec();
        let components = self.components();
        // Components of features that the guest does not see would enlarge its XSAVE area, and a
        // host without them could not load it.
        entries.retain(|entry| {
            let is_component = entry.function == 0xd && (2..32).contains(&entry.index);
            !is_component || components & 1 << entry.index != 0
        });
        // With the standard layout, each component has a place of its own.
        let ends = entries.iter().filter(|e| e.function == 0xd && e.index >= 2);
        // CPUID leaf 0DH: EAX is the size of a component and EBX its offset (Intel SDM volume 1,
        // 13.2).
        let size = ends.map(|entry| entry.eax.saturating_add(entry.ebx)).max();
        let size = size.unwrap_or(0).max(LEGACY_AND_HEADER);
        for entry in &mut entries {
            self.cut_entry(entry, components, size);
        }
        // Entries were taken away only, so that those that are left fit.
        let cpuid = CpuId::from_entries(&entries).unwrap_or_else(|_| cpu.cpuid.clone());
        let arch_capabilities = match (self.arch_capabilities, cpu.arch_capabilities) {
            // Without visible bits the guest sees no such MSR at all.
            (0, _) | (_, None) => None,
            (visible, Some(value)) => Some(value & (visible | features::HAZARDS)),
        };
        CpuModel {
            cpuid,
            arch_capabilities,
        }
    }

    fn cut_entry(&self, entry: &mut kvm_cpuid_entry2, components: u32, size: u32) {
        let (function, index) = (entry.function, entry.index);
        let mut cleared = [0; 4];
        let registers = [entry.eax, entry.ebx, entry.ecx, entry.edx];
        for (register, value) in registers.into_iter().enumerate() {
            let at = Place {
                function,
                index,
                register,
            };
            let is_named = feature_names::named_registers().any(|place| place == at);
            cleared[register] = if is_named {
                value & (self.mask(at) | repeated(at))
            } else if features::is_ignored(function, index, register) {
                value
            } else {
                0
            };
        }
        let [eax, ebx, ecx, edx] = cleared;
        (entry.eax, entry.ebx, entry.ecx, entry.edx) = match (function, index) {
            // The size of a cache line; the hypervisor's name; SVM, which the configuration hides;
            // where a component of extended state is.
            (1, _) => (eax, registers[1], ecx, edx),
            (0x4000_0000 | 0x8000_000a, _) | (0xd, 2..) => registers.into(),
            (0x4000_0001, _) => (registers[0] & KVM_FEATURES, ebx, ecx, edx),
            (0xd, 0) => (registers[0] & components, size, size, 0),
            (0x8000_0008, _) => {
                // A guest that sized its page tables by more bits could not move to a host with
                // fewer.
                let physical = (registers[0] & 0xff).min(self.physical_bits);
                let most = if self.has("la57") { 57 } else { 48 };
                let linear = (registers[0] >> 8 & 0xff).min(most);
                (linear << 8 | physical, ebx, ecx, edx)
            }
            _ => (eax, ebx, ecx, edx),
        };
    }
}

/// Bytes of the legacy area and the header of XSAVE.
const LEGACY_AND_HEADER: u32 = 512 + 64;

/// Bits of leaf 1 that AMD repeats in leaf 8000_0001.
fn repeated(at: Place) -> u32 {
    const OF_LEAF_1: u32 = 0x0183_f3ff;
    let is_it = (at.function, at.register) == (0x8000_0001, 3);
    if is_it { OF_LEAF_1 } else { 0 }
}

/// A profile that this host's CPU cannot show a guest.
#[derive(Debug, thiserror::Error)]
#[error("this host cannot run the CPU profile {profile}: it lacks {}", .lacking.join(", "))]
pub struct ProfileError {
    profile: CpuProfile,
    lacking: Vec<String>,
}

/// The CPU that a guest of this profile sees on a host whose guests can have `host`.
///
/// # Errors
/// Names what the host lacks.
pub(crate) fn apply(profile: CpuProfile, host: &CpuModel) -> Result<CpuModel, ProfileError> {
    let Some(set) = Set::of(profile) else {
        return Ok(host.clone());
    };
    match set.lacking(host) {
        lacking if lacking.is_empty() => Ok(set.cut(host)),
        lacking => Err(ProfileError { profile, lacking }),
    }
}

/// The part of a host's CPU that a guest of this profile sees, whether or not it is all there.
pub(crate) fn cut(profile: CpuProfile, host: &CpuModel) -> CpuModel {
    Set::of(profile).map_or_else(|| host.clone(), |set| set.cut(host))
}

/// How well each profile fits a host.
pub(crate) fn fits(host: &CpuModel) -> Vec<ProfileFit> {
    let fit = |profile: CpuProfile| {
        let set = Set::of(profile)?;
        Some(ProfileFit {
            profile,
            features: u32::try_from(set.required().count()).unwrap_or(u32::MAX),
            lacking: set.lacking(host),
        })
    };
    CpuProfile::ALL.into_iter().filter_map(fit).collect()
}

#[cfg(test)]
mod tests;
