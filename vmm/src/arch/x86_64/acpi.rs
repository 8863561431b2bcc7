//! ACPI tables (ACPI 6.5): a hardware-reduced platform, which has no fixed hardware but a sleep
//! and a reset register, and tells events through a generic event device.

mod cpus;
mod dimms;
mod numa;
mod tpm;

use acpi_tables::Aml;
use acpi_tables::aml::{
    AddressSpace, AddressSpaceCacheable, And, Arg, Device, EISAName, Equal, Field, FieldAccessType,
    FieldEntry, FieldLockRule, FieldUpdateRule, IO, If, Interrupt, Local, Memory32Fixed, Method,
    MethodCall, Name, Notify, ONE, OpRegion, OpRegionSpace, Package, Path, ResourceTemplate, Scope,
    Store, ZERO,
};
use acpi_tables::mcfg::MCFG;
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use acpi_tables::xsdt::XSDT;
use devices::{hotplug, power};
use spec::VmConfig;

use super::generation;
use super::layout::{self, Apertures, Layout};

const OEM: [u8; 6] = *b"WHIMBR";
const TABLE: [u8; 8] = *b"WHIMBREL";

/// All tables, to be loaded at [`layout::ACPI`]; the RSDP is first.
pub(crate) fn tables(config: &VmConfig, layout: &Layout) -> Vec<u8> {
    let (cpus, has_tpm) = (&config.cpus, config.tpm.is_some());
    let mut placed = Placed::default();
    // The RSDP's place; what it points to is not known yet.
    placed.add(&[0; RSDP_LEN]);
    let dsdt = placed.add(&bytes(&dsdt(config, layout)));
    let fadt = placed.add(&bytes(&fadt(dsdt)));
    let madt = placed.add(&bytes(&cpus::madt(cpus)));
    let mcfg = placed.add(&bytes(&mcfg(layout.segments.len())));
    let tpm = has_tpm.then(|| placed.add(&bytes(&tpm::table())));
    let numa = match config.numa_nodes() {
        [] => Vec::new(),
        _ => [numa::srat(config, layout), numa::slit(config)]
            .map(|table| placed.add(&bytes(&table)))
            .to_vec(),
    };
    let mut xsdt = XSDT::new(OEM, TABLE, 1);
    [fadt, madt, mcfg]
        .into_iter()
        .chain(tpm)
        .chain(numa)
        .for_each(|table| xsdt.add_entry(table));
    let xsdt = placed.add(&bytes(&xsdt));
    let rsdp = bytes(&Rsdp::new(OEM, xsdt));
    // Last: the RSDP points to the XSDT, which points to all others.
    placed.bytes[..rsdp.len()].copy_from_slice(&rsdp);
    placed.bytes
}

const RSDP_LEN: usize = 36;

fn bytes(table: &dyn Aml) -> Vec<u8> {
    let mut bytes = Vec::new();
    table.to_aml_bytes(&mut bytes);
    bytes
}

#[derive(Default)]
struct Placed {
    bytes: Vec<u8>,
}

impl Placed {
    /// Puts a table behind the others and says at which guest address it is.
    fn add(&mut self, table: &[u8]) -> u64 {
        self.bytes.resize(self.bytes.len().next_multiple_of(16), 0);
        let at = layout::ACPI + self.bytes.len() as u64;
        self.bytes.extend_from_slice(table);
        at
    }
}

/// A generic address structure for a byte register in I/O space (5.2.3.2).
fn port_register(port: u64) -> [u8; 12] {
    let mut gas = [1, 8, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0];
    gas[4..].copy_from_slice(&port.to_le_bytes());
    gas
}

/// 5.2.9.
fn fadt(dsdt: u64) -> Sdt {
    const IAPC_BOOT_ARCH: usize = 109;
    const FLAGS: usize = 112;
    const RESET_REG: usize = 116;
    const RESET_VALUE: usize = 128;
    const MINOR_VERSION: usize = 131;
    const X_DSDT: usize = 140;
    const SLEEP_CONTROL_REG: usize = 244;
    const SLEEP_STATUS_REG: usize = 256;
    const LEN: u32 = 276;
    // No VGA, no CMOS clock.
    const BOOT_ARCH: u16 = 1 << 2 | 1 << 5;
    // WBINVD works, the buttons are devices, there is a reset register, hardware-reduced.
    const USED_FLAGS: u32 = 1 | 1 << 4 | 1 << 5 | 1 << 10 | 1 << 20;

    let port = u64::from(layout::POWER_PORT);
    let mut fadt = Sdt::new(*b"FACP", LEN, 6, OEM, TABLE, 1);
    fadt.write_u16(IAPC_BOOT_ARCH, BOOT_ARCH);
    fadt.write_u32(FLAGS, USED_FLAGS);
    fadt.write_bytes(RESET_REG, &port_register(port + power::RESET));
    fadt.write_u8(RESET_VALUE, power::RESET_VALUE);
    fadt.write_u8(MINOR_VERSION, 5);
    // The 32-bit field stays 0: an OS uses X_DSDT if that is not 0 (5.2.9).
    fadt.write_u64(X_DSDT, dsdt);
    fadt.write_bytes(
        SLEEP_CONTROL_REG,
        &port_register(port + power::SLEEP_CONTROL),
    );
    fadt.write_bytes(SLEEP_STATUS_REG, &port_register(port + power::SLEEP_STATUS));
    fadt.update_checksum();
    fadt
}

/// PCI Firmware 3.2, 4.1.2.
fn mcfg(segments: usize) -> MCFG {
    let mut mcfg = MCFG::new(OEM, TABLE, 1);
    for segment in (0..).take(segments) {
        mcfg.add_ecam(layout::ecam(segment), segment, 0, 0);
    }
    mcfg
}

fn dsdt(config: &VmConfig, layout: &Layout) -> Sdt {
    let mut dsdt = Sdt::new(*b"DSDT", 36, 6, OEM, TABLE, 1);
    let parts = [
        power_aml(config.memory.has_dimms()),
        pci_aml(config, &layout.segments),
        hotplug_aml(),
        serial_aml(),
        generation_aml(),
        cpus::aml(config),
    ];
    let dimms = config.memory.has_dimms().then(dimms::aml);
    let tpm = config.tpm.as_ref().map(|_| tpm::aml());
    for part in parts.into_iter().chain(dimms).chain(tpm) {
        dsdt.append_slice(&part);
    }
    dsdt.update_checksum();
    dsdt
}

/// The sleep type of S5, the power button, and the generic event device that tells of it.
fn power_aml(has_dimms: bool) -> Vec<u8> {
    let mut dimms = Vec::new();
    if has_dimms {
        And::new(&Local(1), &Local(0), &power::MEMORY_HOTPLUG).to_aml_bytes(&mut dimms);
        If::new(
            &Equal::new(&Local(1), &power::MEMORY_HOTPLUG),
            vec![&MethodCall::new("\\_SB_.MSCN".into(), vec![])],
        )
        .to_aml_bytes(&mut dimms);
    }
    let events = layout::POWER_PORT + power::EVENTS as u16;
    let mut out = Vec::new();
    Name::new(
        "_S5_".into(),
        &Package::new(vec![&power::S5, &ZERO, &ZERO, &ZERO]),
    )
    .to_aml_bytes(&mut out);
    Scope::new(
        "_SB_".into(),
        vec![
            &Device::new(
                "PWRB".into(),
                vec![
                    &Name::new("_HID".into(), &EISAName::new("PNP0C0C")),
                    &Name::new("_UID".into(), &ZERO),
                ],
            ),
            &Device::new(
                "GED_".into(),
                vec![
                    &Name::new("_HID".into(), &"ACPI0013"),
                    &Name::new("_UID".into(), &ZERO),
                    &Name::new(
                        "_CRS".into(),
                        &ResourceTemplate::new(vec![&Interrupt::new(
                            true,
                            true,
                            false,
                            false,
                            layout::GED_IRQ,
                        )]),
                    ),
                    &OpRegion::new("EVRG".into(), OpRegionSpace::SystemIO, &events, &ONE),
                    &Field::new(
                        "EVRG".into(),
                        FieldAccessType::Byte,
                        FieldLockRule::NoLock,
                        FieldUpdateRule::WriteAsZeroes,
                        vec![FieldEntry::Named(*b"EVTS", 8)],
                    ),
                    &Method::new(
                        "_EVT".into(),
                        1,
                        true,
                        vec![
                            // Reading takes the bits, so once is enough and twice too much.
                            &Store::new(&Local(0), &Path::new("EVTS")),
                            &And::new(&Local(1), &Local(0), &power::POWER_BUTTON),
                            &If::new(
                                &Equal::new(&Local(1), &power::POWER_BUTTON),
                                vec![&Notify::new(&Path::new("\\_SB_.PWRB"), &0x80_u8)],
                            ),
                            &And::new(&Local(1), &Local(0), &power::PCI_HOTPLUG),
                            &If::new(
                                &Equal::new(&Local(1), &power::PCI_HOTPLUG),
                                vec![&MethodCall::new("\\_SB_.PCI0.PCNT".into(), vec![])],
                            ),
                            &And::new(&Local(1), &Local(0), &power::CPU_HOTPLUG),
                            &If::new(
                                &Equal::new(&Local(1), &power::CPU_HOTPLUG),
                                vec![&MethodCall::new("\\_SB_.CSCN".into(), vec![])],
                            ),
                            &Bytes(dimms),
                            &And::new(&Local(1), &Local(0), &power::GENERATION),
                            &If::new(
                                &Equal::new(&Local(1), &power::GENERATION),
                                vec![&Notify::new(&Path::new("\\_SB_.VGEN"), &0x80_u8)],
                            ),
                            &And::new(&Local(1), &Local(0), &power::CLOCK),
                            &If::new(
                                &Equal::new(&Local(1), &power::CLOCK),
                                vec![&Notify::new(&Path::new("\\_SB_.VCLK"), &0x80_u8)],
                            ),
                        ],
                    ),
                ],
            ),
        ],
    )
    .to_aml_bytes(&mut out);
    out
}

/// The PCI roots, and the ECAM as a reserved resource of the motherboard.
fn pci_aml(config: &VmConfig, segments: &[Apertures]) -> Vec<u8> {
    let mut out = Vec::new();
    for (segment, apertures) in (0..).zip(segments) {
        let node = config.node_of_segment(segment);
        pci_root_aml(segment, node, apertures, &mut out);
    }
    // PCI Firmware 3.2, 4.1.2 has the firmware reserve the ECAM as a resource of the motherboard.
    // Linux ignores an MCFG entry whose range is not reserved.
    let ecam_len = segments.len() as u32 * devices::pci::ECAM_BUS_LEN as u32;
    Scope::new(
        "_SB_".into(),
        vec![&Device::new(
            "MBRD".into(),
            vec![
                &Name::new("_HID".into(), &EISAName::new("PNP0C02")),
                &Name::new("_UID".into(), &ZERO),
                &Name::new(
                    "_CRS".into(),
                    &ResourceTemplate::new(vec![&Memory32Fixed::new(
                        true,
                        layout::ECAM as u32,
                        ecam_len,
                    )]),
                ),
            ],
        )],
    )
    .to_aml_bytes(&mut out);
    out
}

/// The root of a segment's bus, its NUMA node, and its windows.
fn pci_root_aml(segment: u16, node: Option<u32>, apertures: &Apertures, out: &mut Vec<u8>) {
    let Apertures { pci32, pci64 } = apertures;
    let name = match segment {
        0 => "PCI0".to_owned(),
        _ => format!("PC{segment:02X}"),
    };
    // The last bytes of the lower window are within 32 bits: the layout says so.
    let (first32, last32) = (pci32.first() as u32, pci32.last() as u32);
    let window = AddressSpaceCacheable::NotCacheable;
    let bus = AddressSpace::new_bus_number(0_u16, 0_u16);
    let ports = IO::new(layout::PCI_PORT, layout::PCI_PORT, 1, 8);
    let low = AddressSpace::new_memory(window, true, first32, last32, None);
    let window = AddressSpaceCacheable::NotCacheable;
    let high = AddressSpace::new_memory(window, true, pci64.first(), pci64.last(), None);
    let mut resources: Vec<&dyn Aml> = vec![&bus, &low, &high];
    if segment == 0 {
        // The ports reach segment 0 only.
        resources.insert(1, &ports);
    }
    Scope::new(
        "_SB_".into(),
        vec![&Device::new(
            Path::new(&name),
            vec![
                &Name::new("_HID".into(), &EISAName::new("PNP0A08")),
                &Name::new("_CID".into(), &EISAName::new("PNP0A03")),
                &Name::new("_SEG".into(), &segment),
                &Name::new("_BBN".into(), &ZERO),
                &Name::new("_UID".into(), &segment),
                &Name::new("_CCA".into(), &ONE),
                &numa::pxm(node),
                &Name::new("_CRS".into(), &ResourceTemplate::new(resources)),
            ],
        )],
    )
    .to_aml_bytes(out);
}

/// Slots whose devices come and go (6.3): each has its number and a method by which the guest lets
/// go of what is in it, and `PCNT` notifies those that the registers name.
fn hotplug_aml() -> Vec<u8> {
    const DEVICE_CHECK: u8 = 1;
    const EJECT_REQUEST: u8 = 3;
    let port = layout::HOTPLUG_PORT;
    let mut out = Vec::new();
    let mut notices = Vec::new();
    for slot in 1..32_u8 {
        let (name, bit) = (format!("S{slot:03X}"), 1_u32 << slot);
        Scope::new(
            "\\_SB_.PCI0".into(),
            vec![&Device::new(
                Path::new(&name),
                vec![
                    &Name::new("_SUN".into(), &slot),
                    &Name::new("_ADR".into(), &(u32::from(slot) << 16)),
                    &Method::new(
                        "_EJ0".into(),
                        1,
                        true,
                        vec![&Store::new(&Path::new("\\_SB_.PCI0.PHEJ"), &bit)],
                    ),
                ],
            )],
        )
        .to_aml_bytes(&mut out);
        And::new(&Local(0), &Arg(0), &bit).to_aml_bytes(&mut notices);
        If::new(
            &Equal::new(&Local(0), &bit),
            vec![&Notify::new(&Path::new(&name), &Arg(1))],
        )
        .to_aml_bytes(&mut notices);
    }
    // The field below names the registers in this order, without gaps.
    const _: () =
        assert!(hotplug::INSERTED == 0 && hotplug::WANTED_BACK == 4 && hotplug::EJECT == 8);
    Scope::new(
        "\\_SB_.PCI0".into(),
        vec![
            &OpRegion::new(
                "PHRG".into(),
                OpRegionSpace::SystemIO,
                &port,
                &(hotplug::LEN as u8),
            ),
            &Field::new(
                "PHRG".into(),
                FieldAccessType::DWord,
                FieldLockRule::NoLock,
                FieldUpdateRule::WriteAsZeroes,
                vec![
                    FieldEntry::Named(*b"PHIN", 32),
                    FieldEntry::Named(*b"PHOT", 32),
                    FieldEntry::Named(*b"PHEJ", 32),
                ],
            ),
            &Method::new("PNTF".into(), 2, true, vec![&Bytes(notices)]),
            &Method::new(
                "PCNT".into(),
                0,
                true,
                vec![
                    // Reading takes the bits.
                    &Store::new(&Local(0), &Path::new("PHIN")),
                    &MethodCall::new("PNTF".into(), vec![&Local(0), &DEVICE_CHECK]),
                    &Store::new(&Local(0), &Path::new("PHOT")),
                    &MethodCall::new("PNTF".into(), vec![&Local(0), &EJECT_REQUEST]),
                ],
            ),
        ],
    )
    .to_aml_bytes(&mut out);
    out
}

/// AML that is there already.
struct Bytes(Vec<u8>);

impl Aml for Bytes {
    fn to_aml_bytes(&self, sink: &mut dyn acpi_tables::AmlSink) {
        sink.vec(&self.0);
    }
}

fn serial_aml() -> Vec<u8> {
    let mut out = Vec::new();
    Scope::new(
        "_SB_".into(),
        vec![&Device::new(
            "COM1".into(),
            vec![
                &Name::new("_HID".into(), &EISAName::new("PNP0501")),
                &Name::new("_UID".into(), &ZERO),
                &Name::new(
                    "_CRS".into(),
                    &ResourceTemplate::new(vec![
                        &Interrupt::new(true, true, false, false, layout::SERIAL_IRQ),
                        &IO::new(layout::SERIAL_PORT, layout::SERIAL_PORT, 1, 8),
                    ]),
                ),
            ],
        )],
    )
    .to_aml_bytes(&mut out);
    out
}

/// The VM generation ID, whose `ADDR` names its page, and the VMClock.
fn generation_aml() -> Vec<u8> {
    let mut out = Vec::new();
    // Both pages are below 4 GiB.
    let (id, clock) = (layout::VMGENID as u32, layout::VMCLOCK as u32);
    Scope::new(
        "_SB_".into(),
        vec![
            &Device::new(
                "VGEN".into(),
                vec![
                    &Name::new("_HID".into(), &"VMGENCTR"),
                    &Name::new("_CID".into(), &"VM_Gen_Counter"),
                    &Name::new("_DDN".into(), &"VM_Gen_Counter"),
                    &Name::new("ADDR".into(), &Package::new(vec![&id, &ZERO])),
                ],
            ),
            &Device::new(
                "VCLK".into(),
                vec![
                    &Name::new("_HID".into(), &"AMZNC10C"),
                    &Name::new("_CID".into(), &"VMCLOCK"),
                    &Name::new("_DDN".into(), &"VMCLOCK"),
                    &Name::new(
                        "_CRS".into(),
                        &ResourceTemplate::new(vec![&Memory32Fixed::new(
                            false,
                            clock,
                            generation::VMCLOCK_LEN,
                        )]),
                    ),
                ],
            ),
        ],
    )
    .to_aml_bytes(&mut out);
    out
}

#[cfg(test)]
mod tests {
    use spec::{CpusConfig, NumaConfig, PayloadConfig, TpmConfig};

    use super::*;

    fn u64_at(bytes: &[u8], at: usize) -> u64 {
        u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
    }

    fn table(all: &[u8], addr: u64) -> &[u8] {
        let at = usize::try_from(addr - layout::ACPI).unwrap();
        let len = u32::from_le_bytes(all[at + 4..at + 8].try_into().unwrap()) as usize;
        &all[at..at + len]
    }

    fn sum(bytes: &[u8]) -> u8 {
        bytes.iter().fold(0, |sum, byte| sum.wrapping_add(*byte))
    }

    fn node(id: u16) -> NumaConfig {
        NumaConfig {
            guest_numa_id: id.into(),
            cpus: None,
            distances: None,
            memory_zones: (id == 0).then(|| vec![spec::WHOLE_MEMORY.to_owned()]),
            pci_segments: Some(vec![id]),
            device_id: None,
        }
    }

    #[test]
    fn tables_can_be_found_and_add_up() {
        for (vcpus, segments) in [(1, 1), (2, 2), (255, 1), (64, 96), (255, 64)] {
            let (boot, room) = (8 << 30, 1 << 30);
            let layout = Layout::new(&[layout::ZoneSize { boot, room }], 46).unwrap();
            let layout = layout.with_segments(&vec![[1, 1]; segments]).unwrap();
            let mut config = VmConfig::with_payload(PayloadConfig::default());
            config.cpus = CpusConfig::with_vcpus(vcpus);
            config.memory.hotplug_size = Some(1 << 30);
            config.tpm = (vcpus == 2).then(|| TpmConfig {
                socket: "/tpm".to_owned(),
            });
            if (vcpus, segments) == (255, 64) {
                // As many nodes as there can be.
                let mut nodes: Vec<NumaConfig> = (0..64).map(node).collect();
                nodes[0].cpus = Some((0..255).collect());
                config.numa = Some(nodes);
            }
            let all = tables(&config, &layout);
            assert!(
                all.len() as u64 <= layout::ACPI_END - layout::ACPI,
                "{}",
                all.len()
            );
            assert_eq!(
                (&all[..8], sum(&all[..20]), sum(&all[..36])),
                (&b"RSD PTR "[..], 0, 0)
            );
            let xsdt = table(&all, u64_at(&all, 24));
            assert_eq!((&xsdt[..4], sum(xsdt)), (&b"XSDT"[..], 0));
            let names: Vec<_> = xsdt[36..]
                .chunks(8)
                .map(|entry| {
                    let table = table(&all, u64_at(entry, 0));
                    assert_eq!(sum(table), 0);
                    String::from_utf8_lossy(&table[..4]).into_owned()
                })
                .collect();
            let more: &[&str] = match (vcpus, segments) {
                (2, _) => &["TPM2"],
                (_, 64) => &["SRAT", "SLIT"],
                _ => &[],
            };
            assert_eq!(names, [&["FACP", "APIC", "MCFG"], more].concat());
            if vcpus == 2 {
                let tpm = table(&all, u64_at(&xsdt[60..], 0));
                // The control area, and the start method of a command response buffer.
                assert_eq!(
                    (u64_at(tpm, 40), &tpm[48..]),
                    (0xfed4_0040, &[7, 0, 0, 0][..])
                );
            }
            let mcfg = table(&all, u64_at(&xsdt[52..], 0));
            let entries: Vec<_> = mcfg[44..].chunks(16).collect();
            assert_eq!(entries.len(), segments);
            for (segment, entry) in (0..).zip(entries) {
                assert_eq!(u64_at(entry, 0), layout::ecam(segment));
                assert_eq!(entry[8..10], segment.to_le_bytes());
            }
            let fadt = table(&all, u64_at(&xsdt[36..], 0));
            let dsdt = table(&all, u64_at(fadt, 140));
            assert_eq!((fadt.len(), &dsdt[..4], sum(dsdt)), (276, &b"DSDT"[..], 0));
            if let Ok(dir) = std::env::var("ACPI_DUMP") {
                std::fs::write(format!("{dir}/dsdt.dat"), dsdt).unwrap();
                std::fs::write(format!("{dir}/facp.dat"), fadt).unwrap();
                std::fs::write(
                    format!("{dir}/apic.dat"),
                    table(&all, u64_at(&xsdt[44..], 0)),
                )
                .unwrap();
            }
        }
    }
}
