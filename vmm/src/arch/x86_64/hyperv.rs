//! Hyper-V's paravirtual interfaces (Hypervisor Top Level Functional Specification 6.0b, 2), without which
//! Windows uses timers and interrupts that are costly to emulate.
//!
//! KVM implements them; the leaves of CPUID show them to the guest. KVM's own leaves move up, to where
//! Linux looks for them, too.

use hypervisor::arch::{CpuId, kvm_cpuid_entry2};

use super::cpu_model::CpuModel;

/// The first of a hypervisor's leaves, and how far apart those of two hypervisors are.
const BASE: u32 = 0x4000_0000;
const SPACING: u32 = 0x100;

/// Leaves, from [`BASE`] on: signature, interface, version, features, recommendations, limits.
const INTERFACE: u32 = BASE + 1;
const VERSION: u32 = BASE + 2;
const FEATURES: u32 = BASE + 3;
const RECOMMENDATIONS: u32 = BASE + 4;
const LIMITS: u32 = BASE + 5;

/// `Hv#1`: the interface is Microsoft's, whatever the signature.
const MICROSOFT_INTERFACE: u32 = u32::from_le_bytes(*b"Hv#1");

/// Features (EAX): the reference counter, the synthetic interrupt controller and its timers, the APIC by
/// MSRs, hypercalls, the number of a virtual processor, the page with the TSC's scale.
const WANTED_FEATURES: u32 = 1 << 1 | 1 << 2 | 1 << 3 | 1 << 4 | 1 << 5 | 1 << 6 | 1 << 9;
/// The features without which the others are of no use: counter, interrupt controller, hypercalls,
/// number.
const NEEDED_FEATURES: u32 = 1 << 1 | 1 << 2 | 1 << 5 | 1 << 6;
/// Recommendations (EAX): the APIC by MSRs; no watchdogs that a stolen CPU would trip.
const WANTED_RECOMMENDATIONS: u32 = 1 << 3 | 1 << 5;
/// EBX of the recommendations: a spinlock never asks the hypervisor for help.
const NO_SPIN_NOTICE: u32 = u32::MAX;
/// Windows 10 with this build number.
const BUILD: u32 = 0x3839;
const MAJOR_MINOR: u32 = 10 << 16;
/// Virtual processors of a VM: as many as there are APIC ids.
const PROCESSORS: u32 = spec::limits::APIC_ID + 1;

/// The host's KVM lacks the interfaces.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "`cpus.kvm_hyperv` needs a KVM with Hyper-V's interfaces (CONFIG_KVM_HYPERV, Linux 5.11), which this \
     host lacks"
)]
pub(crate) struct Unavailable;

fn entry(function: u32, [eax, ebx, ecx, edx]: [u32; 4]) -> kvm_cpuid_entry2 {
    kvm_cpuid_entry2 {
        function,
        eax,
        ebx,
        ecx,
        edx,
        ..Default::default()
    }
}

/// Shows the interfaces beside those of KVM in a guest's CPUID, as far as KVM has them (`supported`).
///
/// # Errors
/// Fails if KVM lacks what Windows needs.
pub(crate) fn shown(cpuid: &CpuId, supported: Option<&CpuId>) -> Result<CpuId, Unavailable> {
    let supported = supported.ok_or(Unavailable)?.as_slice();
    let eax = |function| {
        let found = supported.iter().find(|entry| entry.function == function);
        found.map_or(0, |entry| entry.eax)
    };
    let features = eax(FEATURES) & WANTED_FEATURES;
    // Half of them is of no use: synthetic timers need the counter and the interrupt controller.
    if features & NEEDED_FEATURES != NEEDED_FEATURES {
        return Err(Unavailable);
    }
    let recommended = eax(RECOMMENDATIONS) & WANTED_RECOMMENDATIONS;
    let [ebx, ecx, edx] = [*b"Linu", *b"x KV", *b"M Hv"].map(u32::from_le_bytes);
    let own = [
        entry(BASE, [LIMITS, ebx, ecx, edx]),
        entry(INTERFACE, [MICROSOFT_INTERFACE, 0, 0, 0]),
        entry(VERSION, [BUILD, MAJOR_MINOR, 0, 0]),
        entry(FEATURES, [features, 0, 0, 0]),
        entry(RECOMMENDATIONS, [recommended, NO_SPIN_NOTICE, 0, 0]),
        entry(LIMITS, [PROCESSORS, PROCESSORS, 0, 0]),
    ];
    let moved = cpuid.as_slice().iter().map(|entry| {
        let mut entry = *entry;
        if (BASE..BASE + SPACING).contains(&entry.function) {
            // The signature's EAX names the last leaf; 0 means the next.
            if entry.function == BASE {
                entry.eax = entry.eax.max(BASE + 1) + SPACING;
            }
            entry.function += SPACING;
        }
        entry
    });
    let all: Vec<_> = moved.chain(own).collect();
    // As many leaves as fit in KVM's table is for the caller to see: these are six more.
    CpuId::from_entries(&all).map_err(|_| Unavailable)
}

/// Returns the CPU of this host as a guest with `wanted` CPUs would see it: with the interfaces if that
/// guest sees them.
///
/// # Errors
/// Fails if the guest sees them and KVM lacks them.
pub(crate) fn as_seen_by(
    wanted: &CpuModel,
    here: CpuModel,
    supported: Option<&CpuId>,
) -> Result<CpuModel, Unavailable> {
    let mut leaves = wanted.cpuid.as_slice().iter();
    let is_interface =
        |leaf: &kvm_cpuid_entry2| (leaf.function, leaf.eax) == (INTERFACE, MICROSOFT_INTERFACE);
    if !leaves.any(is_interface) {
        return Ok(here);
    }
    let cpuid = shown(&here.cpuid, supported)?;
    Ok(CpuModel { cpuid, ..here })
}

#[cfg(test)]
mod tests {
    use super::super::cpu_model::testing::cpuid;
    use super::super::features;
    use super::*;

    fn registers(cpuid: &CpuId, function: u32) -> Option<[u32; 4]> {
        let mut found = cpuid.as_slice().iter().filter(|e| e.function == function);
        let first = found.next()?;
        assert!(found.next().is_none(), "{function:#x} is there twice");
        Some([first.eax, first.ebx, first.ecx, first.edx])
    }

    #[test]
    fn interfaces_stand_before_those_of_kvm() {
        let kvm = [BASE + 1, 0x4b4d_564b, 0x564b_4d56, 0x4d];
        let guest = cpuid(&[
            (1, 0, [1, 2, 3, 4]),
            (BASE, 0, kvm),
            (BASE + 1, 0, [0xfb, 0, 0, 9]),
        ]);
        let all = cpuid(&[
            (FEATURES, 0, [u32::MAX; 4]),
            (RECOMMENDATIONS, 0, [0xff, 0, 0, 0]),
        ]);
        let shown = shown(&guest, Some(&all)).unwrap();
        assert_eq!(registers(&shown, 1), Some([1, 2, 3, 4]));
        let [last, name @ ..] = registers(&shown, BASE).unwrap();
        let name: Vec<u8> = name.into_iter().flat_map(u32::to_le_bytes).collect();
        assert_eq!((last, &name[..]), (LIMITS, &b"Linux KVM Hv"[..]));
        assert_eq!(registers(&shown, INTERFACE).unwrap()[0], 0x3123_7648);
        assert_eq!(
            registers(&shown, FEATURES),
            Some([WANTED_FEATURES, 0, 0, 0])
        );
        assert_eq!(
            registers(&shown, RECOMMENDATIONS).unwrap()[0],
            1 << 3 | 1 << 5
        );
        let moved = registers(&shown, BASE + SPACING).unwrap();
        assert_eq!(moved, [BASE + SPACING + 1, kvm[1], kvm[2], kvm[3]]);
        assert_eq!(registers(&shown, BASE + SPACING + 1), Some([0xfb, 0, 0, 9]));
    }

    #[test]
    fn hosts_are_compared_as_the_guest_sees_them() {
        let model = |cpuid: CpuId| CpuModel {
            cpuid,
            arch_capabilities: None,
        };
        let kvm = [BASE + 1, 0x4b4d_564b, 0x564b_4d56, 0x4d];
        let host = cpuid(&[(BASE, 0, kvm), (BASE + 1, 0, [0xfb, 0, 0, 9])]);
        let fewer = cpuid(&[(BASE, 0, kvm), (BASE + 1, 0, [0xfa, 0, 0, 0])]);
        let all = cpuid(&[(FEATURES, 0, [u32::MAX; 4])]);
        let few = cpuid(&[(FEATURES, 0, [NEEDED_FEATURES, 0, 0, 0])]);
        let guest = model(shown(&host, Some(&all)).unwrap());
        let lacking = |here: &CpuId, supported| {
            let here = as_seen_by(&guest, model(here.clone()), supported);
            here.map(|here| features::lacking(&here, &guest))
        };
        assert_eq!(lacking(&host, Some(&all)), Ok(vec![]));
        // The counter's page and the APIC by MSRs; KVM's own features where they moved to. Hints are
        // none.
        assert_eq!(lacking(&host, Some(&few)).map(|all| all.len()), Ok(3));
        assert_eq!(lacking(&fewer, Some(&all)).map(|all| all.len()), Ok(1));
        assert_eq!(lacking(&host, None), Err(Unavailable));
        // A guest without them needs none of it.
        let plain = as_seen_by(&model(host.clone()), model(host.clone()), None).unwrap();
        assert_eq!(features::lacking(&plain, &model(host)), [""; 0]);
    }

    #[test]
    fn a_host_without_them_is_refused() {
        let guest = cpuid(&[(BASE, 0, [0; 4])]);
        assert_eq!(shown(&guest, None).unwrap_err(), Unavailable);
        let no_synic = cpuid(&[(FEATURES, 0, [!(1 << 2), 0, 0, 0])]);
        assert_eq!(shown(&guest, Some(&no_synic)).unwrap_err(), Unavailable);
        // What is not supported is not shown.
        let few = cpuid(&[(FEATURES, 0, [NEEDED_FEATURES, 0, 0, 0])]);
        let few = shown(&guest, Some(&few)).unwrap();
        assert_eq!(registers(&few, FEATURES).unwrap()[0], NEEDED_FEATURES);
    }
}
