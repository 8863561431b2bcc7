use std::collections::BTreeMap;

use hypervisor::arch::kvm_cpuid_entry2;

use super::super::cpu_model::testing::cpuid;
use super::*;

const INTEL: &[u8; 12] = b"GenuineIntel";
const AMD: &[u8; 12] = b"AuthenticAMD";

/// A host that has these features, and every leaf that a guest might see.
fn host(vendor: &[u8; 12], features: &[&str]) -> CpuModel {
    let word = |at: usize| u32::from_le_bytes(vendor[at..at + 4].try_into().unwrap());
    let mut leaves = vec![
        (0, 0, [0x20, word(0), word(8), word(4)]),
        (1, 0, [0x000a_06f8, 8 << 8, 0, 0]),
        (4, 0, [0x21; 4]),
        // Performance counters, whose features have no names.
        (0xa, 0, [0x0830_0802, 0, 7, 0x603]),
        (0xd, 0, [0x2e7, 2696, 2696, 0]),
        (0xd, 2, [256, 576, 0, 0]),
        (0xd, 5, [64, 1088, 0, 0]),
        (0xd, 6, [512, 1152, 0, 0]),
        (0xd, 7, [1024, 1664, 0, 0]),
        (0xd, 9, [8, 2688, 0, 0]),
        (0x14, 0, [1, 2, 3, 4]),
        (0x4000_0000, 0, [0x4000_0001, 1, 2, 3]),
        (0x4000_0001, 0, [0x0103_fefb, 0, 0, 0]),
        (0x8000_0008, 0, [57 << 8 | 52, 0, 0x7001, 0]),
        (0x8000_0022, 0, [7, 0x106, 0, 0]),
    ];
    for feature in features {
        let (at, bit) = feature_names::find(feature).unwrap_or_else(|| panic!("{feature}"));
        let found = leaves
            .iter_mut()
            .find(|leaf| (leaf.0, leaf.1) == (at.function, at.index));
        let bits = 1 << bit;
        match found {
            Some(leaf) => leaf.2[at.register] |= bits,
            None => {
                let mut registers = [0; 4];
                registers[at.register] = bits;
                leaves.push((at.function, at.index, registers));
            }
        }
    }
    CpuModel {
        cpuid: cpuid(&leaves),
        arch_capabilities: Some(u64::MAX),
    }
}

/// A host with just the features of a profile, and one with `more` than that.
fn host_of(profile: CpuProfile, more: &[&str]) -> CpuModel {
    let set = Set::of(profile).unwrap();
    let vendor = match set.vendor {
        Some(Vendor::Amd) => AMD,
        _ => INTEL,
    };
    let mut features: Vec<&str> = set.required().collect();
    features.extend(more);
    host(vendor, &features)
}

fn lacking(profile: CpuProfile, host: &CpuModel) -> Vec<String> {
    Set::of(profile).unwrap().lacking(host)
}

/// Each word in the tables is the name of a feature: a misspelled one would hide it from all guests.
#[test]
fn each_word_names_a_feature() {
    for profile in CpuProfile::ALL {
        let step = step(profile).unwrap();
        for list in [step.features, step.without] {
            for word in words(list) {
                assert!(feature_names::find(word).is_some(), "{profile}: {word}");
            }
        }
    }
    let lists = [
        ALWAYS,
        PROTECTIONS,
        PROTECTIONS_OF_AMD,
        PROTECTIONS_OF_INTEL,
    ];
    for word in lists.into_iter().flat_map(words) {
        assert!(feature_names::find(word).is_some(), "{word}");
    }
}

/// Each profile runs on a host that has its features, and on none that lacks one of them, which is named.
#[test]
fn each_feature_of_a_profile_is_needed() {
    for profile in CpuProfile::ALL {
        let full = host_of(profile, &[]);
        assert_eq!(lacking(profile, &full), [""; 0], "{profile}");
        for feature in Set::of(profile).unwrap().required() {
            let mut poor = full.clone();
            let (at, bit) = feature_names::find(feature).unwrap();
            for entry in poor.cpuid.as_mut_slice() {
                if (entry.function, entry.index) == (at.function, at.index) {
                    let register = match at.register {
                        0 => &mut entry.eax,
                        1 => &mut entry.ebx,
                        2 => &mut entry.ecx,
                        _ => &mut entry.edx,
                    };
                    *register &= !(1 << bit);
                }
            }
            assert_eq!(lacking(profile, &poor), [feature], "{profile}");
            let refused = apply(profile, &poor).unwrap_err().to_string();
            assert!(refused.contains(feature) && refused.contains(&profile.to_string()));
        }
    }
}

/// Leaves that say something, in order. KVM answers 0 for one that is not there.
fn shown(model: &CpuModel) -> BTreeMap<(u32, u32), [u32; 4]> {
    let row = |e: &kvm_cpuid_entry2| ((e.function, e.index), [e.eax, e.ebx, e.ecx, e.edx]);
    let all = model.cpuid.as_slice().iter().map(row);
    all.filter(|(_, registers)| *registers != [0; 4]).collect()
}

/// A guest of a profile moves between hosts that have different features besides those of the profile, and
/// different sizes: what it sees is the same.
#[test]
fn guest_of_a_profile_moves_between_unlike_hosts() {
    let extra = [
        "avx512_vp2intersect",
        "rtm",
        "hle",
        "waitpkg",
        "perfctr_core",
        "invtsc",
        "zero_fcs_fds",
        "avx10",
        "srso_no",
        "amx_tile",
    ];
    for profile in CpuProfile::ALL {
        let plain = host_of(profile, &[]);
        let rich = host_of(profile, &extra);
        let (left, right) = (
            apply(profile, &plain).unwrap(),
            apply(profile, &rich).unwrap(),
        );
        assert_eq!(shown(&left), shown(&right), "{profile}");
        assert_eq!(features::lacking(&right, &left), [""; 0], "{profile}");
        assert_eq!(features::lacking(&left, &right), [""; 0], "{profile}");
        // Without the profile, the rich host's guest could not move.
        assert!(!features::lacking(&plain, &rich).is_empty());
    }
}

/// Models in the order of their age: a guest of the older one runs on the newer CPU.
#[test]
fn newer_models_run_older_profiles() {
    use CpuProfile as P;
    let rows: [&[CpuProfile]; 4] = [
        &[P::V1, P::V2, P::V3, P::V4, P::SkylakeServer],
        &[
            P::V2,
            P::Nehalem,
            P::Westmere,
            P::SandyBridge,
            P::IvyBridge,
            P::Haswell,
            P::Broadwell,
        ],
        &[
            P::V4,
            P::SkylakeServer,
            P::CascadelakeServer,
            P::IcelakeServer,
            P::SapphireRapids,
        ],
        &[P::V3, P::EpycRome, P::EpycMilan, P::EpycGenoa],
    ];
    for row in rows {
        for (at, old) in row.iter().enumerate() {
            for new in &row[at..] {
                let model = host_of(*new, &[]);
                assert_eq!(lacking(*old, &model), [""; 0], "{old} on {new}");
            }
        }
    }
    assert_eq!(lacking(P::V4, &host_of(P::EpycGenoa, &[])), [""; 0]);
    assert_eq!(lacking(P::V3, &host_of(P::Haswell, &[])), [""; 0]);
    // Of the other maker.
    let foreign = lacking(P::EpycRome, &host_of(P::IcelakeServer, &[]));
    assert_eq!(foreign[0], "a CPU from AuthenticAMD");
    assert_eq!(
        lacking(P::GraniteRapids, &host_of(P::SapphireRapids, &[])),
        ["prefetchiti"]
    );
}

#[test]
fn profile_sets_sizes_and_unnamed_features() {
    let all = host_of(CpuProfile::IcelakeServer, &["pni"]);
    let seen = |profile: CpuProfile, function: u32, index: u32| {
        let model = cut(profile, &all);
        let mut entries = model.cpuid.as_slice().iter();
        let found = entries.find(|entry| (entry.function, entry.index) == (function, index));
        found.map(|entry| [entry.eax, entry.ebx, entry.ecx, entry.edx])
    };
    use CpuProfile::{Haswell, Host, IcelakeServer, V1, V4};
    // Extended state: x87 and SSE alone, with AVX, with AVX-512 and protection keys.
    assert_eq!(seen(V1, 0xd, 0), Some([3, 576, 576, 0]));
    assert_eq!(seen(V1, 0xd, 2), None);
    assert_eq!(seen(Haswell, 0xd, 0), Some([7, 832, 832, 0]));
    assert_eq!(seen(V4, 0xd, 0), Some([0x2e7, 2696, 2696, 0]));
    assert_eq!(seen(V4, 0xd, 9), Some([8, 2688, 0, 0]));
    // Addresses: 57 linear bits with five-level paging only.
    assert_eq!(seen(V4, 0x8000_0008, 0).unwrap()[0], 48 << 8 | 40);
    assert_eq!(
        seen(IcelakeServer, 0x8000_0008, 0).unwrap()[0],
        57 << 8 | 46
    );
    // Performance counters and processor trace.
    assert_eq!(seen(V4, 0xa, 0), Some([0; 4]));
    assert_eq!(seen(V4, 0x14, 0), Some([0; 4]));
    assert_eq!(seen(Host, 0x14, 0), Some([1, 2, 3, 4]));
    // KVM's features of a later kernel; caches stay.
    assert_eq!(seen(V4, 0x4000_0001, 0).unwrap()[0], KVM_FEATURES);
    assert_eq!(seen(V4, 4, 0), Some([0x21; 4]));
    // Which weaknesses the CPU has not, as far as the model knows them.
    let msr = |profile| cut(profile, &all).arch_capabilities;
    assert_eq!(msr(V4), None);
    assert_eq!(msr(IcelakeServer), Some(OF_ICELAKE | features::HAZARDS));
}

/// This host, whatever it is: a guest of each profile that it says it can run gets a vCPU.
#[test]
fn kvm_takes_the_cpuid_of_each_profile_that_fits() {
    let kvm = hypervisor::Kvm::open().unwrap();
    let here = CpuModel {
        cpuid: features::offered(kvm.supported_cpuid().unwrap()),
        arch_capabilities: kvm.feature_msr(features::ARCH_CAPABILITIES).unwrap(),
    };
    let fitting = fits(&here).into_iter().filter(|fit| fit.lacking.is_empty());
    let mut count = 0;
    for fit in fitting {
        let model = apply(fit.profile, &here).unwrap();
        let vm = kvm.create_vm().unwrap();
        let vcpu = vm.create_vcpu(0, 0).unwrap();
        vcpu.set_cpuid(&model.cpuid).unwrap();
        super::super::cpu::set_up(&vcpu, model.visible_arch_capabilities()).unwrap();
        count += 1;
    }
    assert!(count > 0, "a host without x86-64-v1");
}
