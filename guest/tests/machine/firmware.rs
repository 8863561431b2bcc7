//! The part of firmware: tables in memory, and the first vCPU's state (Xen's PVH boot ABI,
//! docs/misc/pvh.pandoc).

use hypervisor::Vcpu;
use hypervisor::arch::{kvm_regs, kvm_segment};

use super::Spec;
use super::ports::{RESET_PORT, RESET_VALUE, SLEEP_PORT};

/// The start of the upper RAM. It is 1 GiB above the least possible address, which makes a hole.
pub(crate) const HIGH_RAM: u64 = 5 << 30;

const START_INFO: u64 = 0x6000;
const MEMORY_MAP: u64 = 0x6100;
const COMMAND_LINE: u64 = 0x7000;
const RSDP: u64 = 0xe_0000;
const XSDT: u64 = 0xe_0100;
const FADT: u64 = 0xe_0200;
const MADT: u64 = 0xe_0400;
const DSDT: u64 = 0xe_0800;

/// Writes all that the guest is handed over.
pub(crate) fn hand_over(spec: &Spec, put: &impl Fn(u64, &[u8])) {
    let text = spec
        .text
        .map_or_else(|| spec.options.to_string(), str::to_owned);
    put(COMMAND_LINE, format!("console=ttyS0 {text}\0").as_bytes());
    let mut map = vec![0, 0x9_fc00, 1];
    map.extend([0x10_0000, (spec.ram_mib << 20) - 0x10_0000, 1]);
    map.extend([HIGH_RAM, spec.high_mib << 20, 1]);
    put(MEMORY_MAP, &words(&map));
    let mut info = Vec::new();
    info.extend(
        [0x336e_c578_u32, 1, 0, 0]
            .iter()
            .flat_map(|word| word.to_le_bytes()),
    );
    let rsdp = if spec.acpi { RSDP } else { 0 };
    info.extend(words(&[0, COMMAND_LINE, rsdp, MEMORY_MAP, 3]));
    put(START_INFO, &info);
    if spec.acpi {
        put_acpi(spec.vcpus, put);
    }
}

fn put_acpi(vcpus: u32, put: &impl Fn(u64, &[u8])) {
    let mut rsdp = b"RSD PTR \0TEST  \x02".to_vec();
    rsdp.extend([0; 8]);
    rsdp.extend(words(&[XSDT]));
    put(RSDP, &rsdp);
    put(XSDT, &table(*b"XSDT", &words(&[FADT, MADT])));

    let mut fadt = vec![0; 276 - 36];
    let mut field =
        |at: usize, bytes: &[u8]| fadt[at - 36..at - 36 + bytes.len()].copy_from_slice(bytes);
    field(112, &(1_u32 << 10 | 1 << 20).to_le_bytes());
    field(116, &port_register(RESET_PORT));
    field(128, &[RESET_VALUE]);
    field(140, &DSDT.to_le_bytes());
    field(244, &port_register(SLEEP_PORT));
    put(FADT, &table(*b"FACP", &fadt));

    let mut madt = vec![0; 8];
    for id in 0..u8::try_from(vcpus).expect("few vCPUs") {
        madt.extend([0, 8, id, id, 1, 0, 0, 0]);
    }
    put(MADT, &table(*b"APIC", &madt));
    // Name (_S5_, Package () { 3, 3 })
    put(
        DSDT,
        &table(*b"DSDT", b"\x08_S5_\x12\x06\x02\x0a\x03\x0a\x03"),
    );
}

fn port_register(port: u16) -> [u8; 12] {
    let mut gas = [1, 8, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0];
    gas[4..6].copy_from_slice(&port.to_le_bytes());
    gas
}

/// A table with its header (ACPI 6.5, section 5.2.6).
fn table(signature: [u8; 4], body: &[u8]) -> Vec<u8> {
    let len = u32::try_from(36 + body.len()).expect("a short table");
    let mut table = [&signature[..], &len.to_le_bytes(), &[6, 0]].concat();
    table.resize(36, b' ');
    table.extend(body);
    table[9] = 0_u8.wrapping_sub(table.iter().fold(0, |sum, byte| sum.wrapping_add(*byte)));
    table
}

fn words(words: &[u64]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}

/// 32-bit protected mode with flat segments and without paging; EBX has the start info.
pub(crate) fn enter(vcpu: &Vcpu, entry: u64) {
    let segment = |selector, type_| kvm_segment {
        base: 0,
        limit: 0xffff_ffff,
        selector,
        type_,
        present: 1,
        db: 1,
        s: 1,
        g: 1,
        ..Default::default()
    };
    let mut sregs = vcpu.sregs().expect("registers");
    sregs.cs = segment(0x08, 0xb);
    let data = segment(0x10, 3);
    (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
    sregs.tr = kvm_segment {
        limit: 0x67,
        type_: 0xb,
        present: 1,
        selector: 0x18,
        ..Default::default()
    };
    sregs.cr0 = 1;
    sregs.cr4 = 0;
    vcpu.set_sregs(&sregs).expect("registers");
    let regs = kvm_regs {
        rip: entry,
        rbx: START_INFO,
        rflags: 2,
        ..Default::default()
    };
    vcpu.set_regs(&regs).expect("registers");
}
