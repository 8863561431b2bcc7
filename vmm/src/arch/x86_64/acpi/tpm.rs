//! The TPM in the ACPI tables (TCG ACPI Specification 1.3, 8): where its control area is, and how a
//! command starts.

use acpi_tables::Aml as _;
use acpi_tables::aml::{Device, Memory32Fixed, Name, ResourceTemplate, Scope, ZERO};
use acpi_tables::sdt::Sdt;

use super::{OEM, TABLE};
use crate::arch::x86_64::layout;

/// `TPM2`, without a log of events: there is no firmware of ours that would write one.
pub(super) fn table() -> Sdt {
    const LEN: u32 = 52;
    const CONTROL_AREA: usize = 40;
    const START_METHOD: usize = 48;
    /// Command Response Buffer: a register starts a command.
    const CRB: u32 = 7;
    let mut table = Sdt::new(*b"TPM2", LEN, 4, OEM, TABLE, 1);
    table.write_u64(CONTROL_AREA, layout::TPM + devices::tpm::CONTROL_AREA);
    table.write_u32(START_METHOD, CRB);
    table.update_checksum();
    table
}

/// The device, by the name to which drivers for TPM 2.0 bind.
pub(super) fn aml() -> Vec<u8> {
    let mut out = Vec::new();
    Scope::new(
        "_SB_".into(),
        vec![&Device::new(
            "TPM2".into(),
            vec![
                &Name::new("_HID".into(), &"MSFT0101"),
                &Name::new("_UID".into(), &ZERO),
                &Name::new("_STA".into(), &0xf_u8),
                &Name::new(
                    "_CRS".into(),
                    &ResourceTemplate::new(vec![&Memory32Fixed::new(
                        true,
                        layout::TPM as u32,
                        devices::tpm::LEN as u32,
                    )]),
                ),
            ],
        )],
    )
    .to_aml_bytes(&mut out);
    out
}
