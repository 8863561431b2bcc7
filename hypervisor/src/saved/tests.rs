//! Saving and loading a vCPU, on `/dev/kvm`.

use kvm_bindings::{KVM_CAP_EXCEPTION_PAYLOAD, KVM_VCPUEVENT_VALID_PAYLOAD, kvm_enable_cap};
use kvm_bindings::{kvm_sregs, kvm_vcpu_events};
use memory::{RamBlock, RamConfig, RamSlice, SpaceKind, Topology};

use super::*;
use crate::kvm::Kvm;

const PAGE_FAULT: u8 = 14;
const KVM_WALL_CLOCK: u32 = 0x4b56_4d00;

fn vcpu() -> (Vm, Vcpu) {
    let kvm = Kvm::open().unwrap();
    let vm = kvm.create_vm().unwrap();
    let vcpu = vm.create_vcpu(0, 0).unwrap();
    vcpu.set_cpuid(&kvm.supported_cpuid().unwrap()).unwrap();
    (vm, vcpu)
}

/// Whether KVM leaves the payload of a pending exception where it is, or delivers it into CR2 or
/// DR6 when it is asked for the events.
fn keep_payloads(vm: &Vm, keep: bool) {
    let cap = kvm_enable_cap {
        cap: KVM_CAP_EXCEPTION_PAYLOAD,
        args: [keep.into(), 0, 0, 0],
        ..Default::default()
    };
    vm.fd().enable_cap(&cap).unwrap();
}

/// Most kernels deliver the payload when they give the events, and only then: there, reading the
/// system registers first loses the address. (Newer kernels deliver it at either.)
#[test]
fn the_address_of_a_pending_page_fault_is_saved() {
    let (vm, vcpu) = vcpu();
    keep_payloads(&vm, true);
    let mut events = kvm_vcpu_events {
        flags: KVM_VCPUEVENT_VALID_PAYLOAD,
        exception_has_payload: 1,
        exception_payload: 0xdead_b000,
        ..Default::default()
    };
    (events.exception.nr, events.exception.pending) = (PAGE_FAULT, 1);
    (events.exception.has_error_code, events.exception.error_code) = (1, 2);
    vcpu.fd().set_vcpu_events(&events).unwrap();
    keep_payloads(&vm, false);

    let saved = vcpu.save(SaveClock::Now).unwrap();
    let sregs: kvm_sregs = whole(&saved.sregs, "system register block").unwrap();
    assert_eq!(sregs.cr2, 0xdead_b000);
    let events: kvm_vcpu_events = whole(&saved.events, "pending events").unwrap();
    // Without a payload, KVM gives a pending exception as an injected one.
    assert_eq!(events.exception.nr, PAGE_FAULT);
}

#[test]
fn loaded_state_is_saved_again() {
    let ((vm, first), (_other, second)) = (vcpu(), vcpu());
    let regs = kvm_bindings::kvm_regs {
        rax: 0x1234,
        rip: 0xfff0,
        rflags: 2,
        ..Default::default()
    };
    first.set_regs(&regs).unwrap();
    let sample = vm.sample_clocks();
    let saved = first.save(SaveClock::At(&sample)).unwrap();
    second.dry_run(&saved).unwrap();
    let clock = second.load(&saved, None).unwrap();
    assert_eq!(Some(clock.tsc), saved.msr(IA32_TSC));
    // A guest that came and has not run yet can leave again: its clocks have not counted.
    assert_eq!(second.save(SaveClock::Loaded(&clock)).unwrap(), saved);
}

#[test]
fn a_dry_run_names_the_msr_that_the_host_lacks() {
    let (_vm, vcpu) = vcpu();
    let mut saved = vcpu.save(SaveClock::Now).unwrap();
    saved.msrs.push((0x1234_5678, 0));
    vcpu.dry_run(&saved).unwrap();
    saved.msrs.push((0x1234_5679, 7));
    let why = vcpu.dry_run(&saved).unwrap_err();
    assert!(
        matches!(
            why,
            StateError::Msr {
                index: 0x1234_5679,
                value: 7
            }
        ),
        "{why}"
    );
}

#[test]
fn a_dry_run_refuses_structures_of_another_size() {
    let (_vm, vcpu) = vcpu();
    let saved = vcpu.save(SaveClock::Now).unwrap();
    let mut longer = saved.clone();
    longer.xsave.push(0);
    let why = vcpu.dry_run(&longer).unwrap_err();
    assert!(
        matches!(why, StateError::Length { found: 4097, .. }),
        "{why}"
    );
}

/// A dry run is made while the guest's pages arrive. Loading the address of the wall clock makes
/// KVM write there at once.
#[test]
fn a_dry_run_leaves_guest_memory_alone() {
    const WALL_CLOCK: usize = 0x3000;
    let (vm, vcpu) = vcpu();
    let mut topology = Topology::new();
    let _slots = topology
        .register(SpaceKind::Memory, 0, vm.memslots())
        .unwrap();
    let block = std::sync::Arc::new(RamBlock::new(&RamConfig::anonymous(1 << 20)).unwrap());
    let slice = RamSlice {
        block: std::sync::Arc::clone(&block),
        offset: 0,
    };
    let mut tx = topology.begin();
    let region = tx.ram("ram", slice, 1 << 20).unwrap();
    tx.map(SpaceKind::Memory, 0, region, 0).unwrap();
    tx.commit().unwrap();
    let written = || {
        let mut bytes = [0_u8; 12];
        block.slice(WALL_CLOCK, 12).unwrap().copy_to(&mut bytes);
        bytes != [0; 12]
    };

    let mut saved = vcpu.save(SaveClock::Now).unwrap();
    saved.msrs.retain(|msr| msr.0 != KVM_WALL_CLOCK);
    saved.msrs.push((KVM_WALL_CLOCK, WALL_CLOCK as u64));
    vcpu.dry_run(&saved).unwrap();
    assert!(!written(), "the dry run wrote to the guest's memory");
    vcpu.load(&saved, None).unwrap();
    assert!(
        written(),
        "this KVM writes no wall clock: the test shows nothing"
    );
}

#[test]
fn a_vcpu_with_another_apic_id_is_refused() {
    let kvm = Kvm::open().unwrap();
    let vm = kvm.create_vm().unwrap();
    let [first, second] = [0, 4].map(|apic_id| {
        let vcpu = vm.create_vcpu(apic_id / 4, apic_id).unwrap();
        vcpu.set_cpuid(&kvm.supported_cpuid().unwrap()).unwrap();
        vcpu
    });
    let saved = second.save(SaveClock::Now).unwrap();
    second.dry_run(&saved).unwrap();
    let why = first.dry_run(&saved).unwrap_err();
    assert!(
        matches!(why, StateError::ApicId { saved: 4, here: 0 }),
        "{why}"
    );
}

#[test]
fn the_msrs_and_tables_in_guest_memory_are_known() {
    for index in [0x11, 0x12, KVM_WALL_CLOCK, 0x4b56_4d01, 0x4000_0001] {
        assert!(touches_memory(index), "{index:#x}");
    }
    for index in [IA32_TSC, 0x3a, 0x1a0, 0xc000_0080] {
        assert!(!touches_memory(index), "{index:#x}");
    }
    let paging = |cr0, cr4, efer| {
        reads_page_table(&kvm_sregs {
            cr0,
            cr4,
            efer,
            ..Default::default()
        })
    };
    assert!(paging(1 << 31, 1 << 5, 0), "PAE");
    assert!(!paging(1 << 31, 1 << 5, 1 << 10), "long mode");
    assert!(!paging(0, 1 << 5, 0), "no paging");
}

#[test]
fn guest_with_svm_is_saved_or_refused() {
    let (_vm, vcpu) = vcpu();
    let mut sregs = vcpu.sregs().unwrap();
    assert_eq!(vcpu.save_nested().unwrap(), None);
    sregs.efer |= 1 << 12;
    if vcpu.set_sregs(&sregs).is_err() || vcpu.sregs().unwrap().efer != sregs.efer {
        // A host without SVM.
        return;
    }
    match vcpu.save_nested() {
        Ok(nested) => assert!(nested.is_some()),
        Err(why) => assert!(why.to_string().contains("EFER.SVME"), "{why}"),
    }
}

#[test]
fn msrs_are_set_and_read_in_parts() {
    const KERNEL_GS_BASE: u32 = 0xc000_0102;
    let (_vm, vcpu) = vcpu();
    let mut saved = vcpu.save(SaveClock::Now).unwrap();
    // One that no host has, at the end of a part, and the last of them all counts.
    saved.msrs.extend((1..=127).map(|_| (0x1234_5678, 0)));
    saved
        .msrs
        .extend((1..=300).map(|value| (KERNEL_GS_BASE, value)));
    vcpu.dry_run(&saved).unwrap();
    assert_eq!(vcpu.msr(KERNEL_GS_BASE).unwrap(), Some(300));
    let many = vec![KERNEL_GS_BASE; 300];
    assert_eq!(vcpu.read_msrs(&many).unwrap().len(), 300);
}

/// Hyper-V's synthetic interrupt controller, with a message timer that has not expired.
#[test]
fn synthetic_interrupts_and_timers_are_saved() {
    const GUEST_OS_ID: u32 = 0x4000_0000;
    let wanted = [
        (GUEST_OS_ID, 0x8100_0000_0000_0000),
        // Control, the pages of event flags and messages, source 2 with its vector.
        (0x4000_0080, 1),
        (0x4000_0082, 0x4001),
        (0x4000_0083, 0x5001),
        (0x4000_0092, 0x30),
        // Timer 1: into source 2, in some years.
        (0x4000_00b2, 2 << 16 | 1),
        (0x4000_00b3, 1 << 60),
    ];
    let vcpus = || {
        let (vm, mut first) = vcpu();
        let mut other = vm.create_vcpu(1, 1).unwrap();
        let enabled = first.enable_hyperv().and(other.enable_hyperv());
        enabled.map(|()| (vm, first, other))
    };
    let Ok((vm, first, other)) = vcpus() else {
        // A host whose KVM lacks Hyper-V's interfaces.
        return;
    };
    let (_second_vm, second, _) = vcpus().unwrap();
    let reset = first.reset_state().unwrap();
    let entries: Vec<_> = wanted.map(|(index, data)| entry(index, data)).into();
    first.set_msrs(&entries).unwrap();
    let sample = vm.sample_clocks();
    let saved = first.save(SaveClock::At(&sample)).unwrap();
    for (index, value) in wanted {
        assert_eq!(saved.msr(index), Some(value), "{index:#x}");
    }
    second.load(&saved, None).unwrap();
    for (index, value) in wanted {
        assert_eq!(second.msr(index).unwrap(), Some(value), "{index:#x}");
    }

    // Another vCPU that is reset has nothing of it, and keeps its own number.
    other.set_msrs(&entries).unwrap();
    other.reset(&reset).unwrap();
    assert_eq!(other.msr(hyperv::VP_INDEX).unwrap(), Some(1));
    // Masked.
    assert_eq!(other.msr(0x4000_0092).unwrap(), Some(1 << 16));
    assert_eq!(other.msr(0x4000_00b2).unwrap(), Some(0));
}
