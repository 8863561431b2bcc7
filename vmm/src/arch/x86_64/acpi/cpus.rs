//! Processors: the MADT, and the devices through which the guest plugs and ejects vCPUs (ACPI 6.5,
//! 5.2.12, 6.3 and 8.4).
//!
//! ```text
//!   GED _EVT ──► CSCN: takes all notifications ──► CTFY(vCPU, code): Notify(Cnnn, code)
//!
//!   Cnnn._STA   its bit in the registers       Cnnn._EJ0   its number to the eject register
//!   Cnnn._MAT   its MADT entry, enabled        Cnnn._OST   CPST(vCPU, code, status)
//! ```

use acpi_tables::Aml;
use acpi_tables::aml::{
    And, Arg, BufferData, Device, Equal, Field, FieldAccessType, FieldEntry, FieldLockRule,
    FieldUpdateRule, If, Local, Method, MethodCall, Name, NotEqual, Notify, OpRegion,
    OpRegionSpace, Or, Path, Return, Scope, ShiftLeft, ShiftRight, Store, While, ZERO,
};
use acpi_tables::sdt::Sdt;
use devices::cpus;
use spec::{CpusConfig, VmConfig};

use super::numa::pxm;
use super::{Bytes, OEM, TABLE};
use crate::arch::x86_64::layout;

/// Flags of a local APIC in the MADT: the processor is there, or it may be plugged later.
const ENABLED: u32 = 1;
const ONLINE_CAPABLE: u32 = 1 << 1;

/// `_STA` of a processor that is present, enabled, shown and working, and of one that is not there.
const PLUGGED: u8 = 0xf;

/// 5.2.12. A processor's unique id is its `_UID`, which is the vCPU's index. All vCPUs that the VM can
/// have are listed: a guest sizes its tables by them.
pub(super) fn madt(cpus: &CpusConfig) -> Sdt {
    let mut madt = Sdt::new(*b"APIC", 44, 5, OEM, TABLE, 1);
    madt.write_u32(36, layout::LOCAL_APIC);
    for vcpu in 0..cpus.max_vcpus {
        let flags = match vcpu < cpus.boot_vcpus {
            true => ENABLED,
            // Not both flags: ONLINE_CAPABLE is reserved where ENABLED is set (5.2.12.2).
            false => ONLINE_CAPABLE,
        };
        madt.append_slice(&local_apic(cpus, vcpu, flags));
    }
    // The I/O APIC. Its id 0 may equal that of a vCPU: guests do not compare them.
    madt.append_slice(&[1, 12, 0, 0]);
    madt.append_slice(&layout::IO_APIC.to_le_bytes());
    madt.append_slice(&0_u32.to_le_bytes());
    madt.update_checksum();
    madt
}

/// The local APIC structure of a vCPU. APIC ids past 254 need the x2APIC structure.
fn local_apic(cpus: &CpusConfig, vcpu: u32, flags: u32) -> Vec<u8> {
    let mut entry = Vec::new();
    let Some(apic_id) = cpus.arrangement().apic_id(vcpu) else {
        return entry;
    };
    match (u8::try_from(vcpu), u8::try_from(apic_id)) {
        (Ok(uid), Ok(apic_id)) if apic_id < 255 => {
            entry.extend([0, 8, uid, apic_id]);
            entry.extend(flags.to_le_bytes());
        }
        _ => {
            entry.extend([9, 16, 0, 0]);
            for field in [apic_id, flags, vcpu] {
                entry.extend(field.to_le_bytes());
            }
        }
    }
    entry
}

/// The name of the vCPU's device, and of the bit that says whether it is plugged.
fn names(vcpu: u32) -> (String, [u8; 4]) {
    let bit = format!("P{vcpu:03X}");
    let mut name = *b"P000";
    name.iter_mut()
        .zip(bit.bytes())
        .for_each(|(to, from)| *to = from);
    (format!("C{vcpu:03X}"), name)
}

/// A processor device for each vCPU that the VM can have, and the methods that they share.
pub(super) fn aml(config: &VmConfig) -> Vec<u8> {
    let cpus = &config.cpus;
    let mut out = Vec::new();
    registers(cpus.max_vcpus).to_aml_bytes(&mut out);
    for vcpu in 0..cpus.max_vcpus {
        processor(cpus, vcpu, config.node_of_vcpu(vcpu)).to_aml_bytes(&mut out);
    }
    scan(cpus.max_vcpus).to_aml_bytes(&mut out);
    out
}

pub(super) fn within_sb(parts: Vec<&dyn Aml>) -> Bytes {
    let mut out = Vec::new();
    Scope::new("_SB_".into(), parts).to_aml_bytes(&mut out);
    Bytes(out)
}

/// The registers: a bit for each vCPU, and three more of 32 bits each.
fn registers(vcpus: u32) -> Bytes {
    // The second field names the registers in this order, without gaps.
    const _: () = assert!(cpus::PRESENT == 0 && cpus::EJECT == cpus::EVENT + 4);
    const _: () = assert!(cpus::STATUS == cpus::EJECT + 4 && cpus::LEN == cpus::STATUS + 4);
    let region = |name: &str, from: u64, to: u64| {
        let mut out = Vec::new();
        let (port, len) = (layout::CPUS_PORT + from as u16, (to - from) as u8);
        OpRegion::new(name.into(), OpRegionSpace::SystemIO, &port, &len).to_aml_bytes(&mut out);
        Bytes(out)
    };
    let field = |region: &str, access, entries| {
        let (lock, update) = (FieldLockRule::NoLock, FieldUpdateRule::WriteAsZeroes);
        Field::new(region.into(), access, lock, update, entries)
    };
    let bits = (0..vcpus).map(|vcpu| FieldEntry::Named(names(vcpu).1, 1));
    let registers = [*b"CPEV", *b"CPEJ", *b"CPOS"].map(|name| FieldEntry::Named(name, 32));
    within_sb(vec![
        &region("CPPR", cpus::PRESENT, cpus::EVENT),
        &field("CPPR", FieldAccessType::Byte, bits.collect()),
        &region("CPRG", cpus::EVENT, cpus::LEN),
        &field("CPRG", FieldAccessType::DWord, registers.into()),
        &ost("CPST", "CPOS"),
    ])
}

/// 8.4. vCPU 0 cannot be ejected.
fn processor(cpus: &CpusConfig, vcpu: u32, node: Option<u32>) -> Bytes {
    let (name, bit) = names(vcpu);
    let bit = Path::new(&String::from_utf8_lossy(&bit));
    let (is_plugged, entry) = (
        Equal::new(&bit, &1_u8),
        BufferData::new(local_apic(cpus, vcpu, ENABLED)),
    );
    let (plugged, absent, entry) = (
        Return::new(&PLUGGED),
        Return::new(&ZERO),
        Return::new(&entry),
    );
    let status = If::new(&is_plugged, vec![&plugged]);
    let eject = Store::new(&Path::new("CPEJ"), &vcpu).to_bytes();
    let answer = MethodCall::new("CPST".into(), vec![&vcpu, &Arg(0), &Arg(1)]);
    let (hid, uid) = (
        Name::new("_HID".into(), &"ACPI0007"),
        Name::new("_UID".into(), &vcpu),
    );
    let sta = Method::new("_STA".into(), 0, false, vec![&status, &absent]);
    let mat = Method::new("_MAT".into(), 0, false, vec![&entry]);
    let ej0 = Method::new("_EJ0".into(), 1, true, vec![&eject]);
    let ost = Method::new("_OST".into(), 3, true, vec![&answer]);
    // Of a vCPU that is plugged later, some guests look here.
    let node = pxm(node);
    let mut parts: Vec<&dyn Aml> = vec![&hid, &uid, &node, &sta, &mat];
    if vcpu > 0 {
        parts.extend([&ej0 as &dyn Aml, &ost]);
    }
    within_sb(vec![&Device::new(Path::new(&name), parts)])
}

/// Notifies the devices of all vCPUs that came or should go.
fn scan(vcpus: u32) -> Bytes {
    let mut notices = Vec::new();
    for vcpu in 0..vcpus {
        If::new(
            &Equal::new(&Arg(0), &vcpu),
            vec![&Notify::new(&Path::new(&names(vcpu).0), &Arg(1))],
        )
        .to_aml_bytes(&mut notices);
    }
    notifiers(notices, ["CPEV", "CTFY", "CSCN"])
}

/// The method `name`, to which `_OST` passes the number of a device, the notification's code and a status,
/// and which writes them as one value to `register`: bits 0-15, 16-23 and 24-31.
pub(super) fn ost(name: &str, register: &str) -> Bytes {
    Method::new(
        name.into(),
        3,
        true,
        vec![
            // Only the low byte of the code counts: an ejection that the guest began by itself has 0x103,
            // and is one as well.
            &And::new(&Local(0), &Arg(1), &0xff_u8),
            &ShiftLeft::new(&Local(0), &Local(0), &16_u8),
            &Or::new(&Local(0), &Local(0), &Arg(0)),
            &And::new(&Local(1), &Arg(2), &0xff_u8),
            &ShiftLeft::new(&Local(1), &Local(1), &24_u8),
            &Or::new(&Path::new(register), &Local(0), &Local(1)),
        ],
    )
    .to_bytes()
}

/// Methods that take the notifications of a register block, and pass them on by `notices`. Named are
/// the register of notifications, the method that notifies one device, and the method that scans.
pub(super) fn notifiers(notices: Vec<u8>, [event, notify, scan]: [&str; 3]) -> Bytes {
    // Reading takes a notification; 0 means that none is left.
    let next = Store::new(&Local(0), &Path::new(event)).to_bytes();
    within_sb(vec![
        &Method::new(notify.into(), 2, true, vec![&Bytes(notices)]),
        &Method::new(
            scan.into(),
            0,
            true,
            vec![
                &next,
                // The guest takes notifications until there are none: one interrupt may stand for
                // several.
                &While::new(
                    &NotEqual::new(&Local(0), &ZERO),
                    vec![
                        &And::new(&Local(1), &Local(0), &0xffff_u16),
                        &ShiftRight::new(&Local(2), &Local(0), &16_u8),
                        &MethodCall::new(notify.into(), vec![&Local(1), &Local(2)]),
                        &next,
                    ],
                ),
            ],
        ),
    ])
}

/// AML of an object that lives no longer than the statement that makes it.
pub(super) trait ToBytes: Aml {
    fn to_bytes(&self) -> Bytes {
        let mut out = Vec::new();
        self.to_aml_bytes(&mut out);
        Bytes(out)
    }
}

impl<T: Aml> ToBytes for T {}

#[cfg(test)]
mod tests {
    use super::*;

    /// The local APIC entries: unique id, APIC id, flags.
    fn entries(cpus: &CpusConfig) -> Vec<(u8, u8, u8)> {
        let madt = super::super::bytes(&madt(cpus));
        let local = madt[44..].chunks(8);
        let local = local.take_while(|entry| entry[..2] == [0, 8]);
        local.map(|entry| (entry[2], entry[3], entry[4])).collect()
    }

    #[test]
    fn processors_have_the_apic_ids_of_the_topology() {
        let mut cpus = CpusConfig::with_vcpus(6);
        cpus.topology = Some(spec::CpuTopology {
            threads_per_core: 1,
            cores_per_die: 3,
            dies_per_package: 1,
            packages: 2,
        });
        let ids = entries(&cpus).into_iter().map(|(uid, id, _)| (uid, id));
        assert!(ids.eq([(0, 0), (1, 1), (2, 2), (3, 4), (4, 5), (5, 6)]));
    }

    #[test]
    fn pluggable_vcpus_are_online_capable() {
        let mut cpus = CpusConfig::with_vcpus(4);
        cpus.boot_vcpus = 2;
        let wanted = [(0, 0, 1), (1, 1, 1), (2, 2, 2), (3, 3, 2)];
        assert_eq!(entries(&cpus), wanted);
    }

    #[test]
    fn highest_vcpu_has_its_own_names() {
        assert_eq!(names(0), ("C000".to_owned(), *b"P000"));
        assert_eq!(names(254), ("C0FE".to_owned(), *b"P0FE"));
    }
}
