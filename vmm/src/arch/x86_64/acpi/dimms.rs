//! Memory devices, through which the guest finds memory that was plugged (ACPI 6.5, 9.11 and 6.3).
//!
//! ```text
//!   GED _EVT ──► MSCN: takes all notifications ──► MTFY(slot, code): Notify(Mnnn, code)
//!
//!   Mnnn._STA   whether its slot has bytes      Mnnn._OST   MPST(slot, code, status)
//!   Mnnn._CRS   the range of its memory
//! ```
//!
//! There is no `_EJ0`: memory that was added through ACPI stays.

use acpi_tables::Aml;
use acpi_tables::aml::{
    Add, AddressSpace, AddressSpaceCacheable, Arg, CreateQWordField, Device, EISAName, Equal,
    Field, FieldAccessType, FieldEntry, FieldLockRule, FieldUpdateRule, If, Local, Method,
    MethodCall, Name, NotEqual, Notify, ONE, OpRegion, OpRegionSpace, Path, ResourceTemplate,
    Return, Store, Subtract, ZERO,
};
use devices::dimms;

use super::Bytes;
use super::cpus::{notifiers, ost, within_sb};
use crate::arch::x86_64::layout;

/// `_STA` of a device that is present, enabled, shown and working.
const PLUGGED: u8 = 0xf;

/// Offsets in a QWord address space descriptor (6.4.3.5.1).
const MINIMUM: u8 = 14;
const MAXIMUM: u8 = 22;
const LENGTH: u8 = 38;

/// The names of a slot's device and of its registers.
struct Names {
    device: String,
    base: String,
    len: String,
}

fn names(slot: usize) -> Names {
    Names {
        device: format!("M{slot:03X}"),
        base: format!("MB{slot:02X}"),
        len: format!("ML{slot:02X}"),
    }
}

fn segment(name: &str) -> [u8; 4] {
    let mut segment = *b"____";
    segment
        .iter_mut()
        .zip(name.bytes())
        .for_each(|(to, from)| *to = from);
    segment
}

/// A memory device for each slot, and the methods that they share.
pub(super) fn aml() -> Vec<u8> {
    let mut out = Vec::new();
    registers().to_aml_bytes(&mut out);
    (0..dimms::SLOTS).for_each(|slot| device(slot).to_aml_bytes(&mut out));
    scan().to_aml_bytes(&mut out);
    out
}

fn registers() -> Bytes {
    // The field names the registers in this order, without gaps.
    const _: () = assert!(dimms::SLOT_LEN == 16 && dimms::EVENT == 16 * dimms::SLOTS as u64);
    const _: () = assert!(dimms::STATUS == dimms::EVENT + 4 && dimms::LEN == dimms::STATUS + 4);
    let names = (0..dimms::SLOTS).map(names);
    let slots = names.flat_map(|names| [names.base, names.len]);
    let slots = slots.map(|name| FieldEntry::Named(segment(&name), 64));
    let others = [*b"MPEV", *b"MPOS"].map(|name| FieldEntry::Named(name, 32));
    let (lock, update) = (FieldLockRule::NoLock, FieldUpdateRule::WriteAsZeroes);
    within_sb(vec![
        &OpRegion::new(
            "MPRG".into(),
            OpRegionSpace::SystemIO,
            &layout::DIMMS_PORT,
            &(dimms::LEN as u8),
        ),
        &Field::new(
            "MPRG".into(),
            FieldAccessType::DWord,
            lock,
            update,
            slots.chain(others).collect(),
        ),
        &ost("MPST", "MPOS"),
    ])
}

fn device(slot: usize) -> Bytes {
    let names = names(slot);
    let (base, len) = (Path::new(&names.base), Path::new(&names.len));
    let (is_plugged, plugged, absent) = (
        NotEqual::new(&len, &ZERO),
        Return::new(&PLUGGED),
        Return::new(&ZERO),
    );
    let status = If::new(&is_plugged, vec![&plugged]);
    let uid = slot as u8;
    let cacheable = AddressSpaceCacheable::Cacheable;
    let range = AddressSpace::new_memory(cacheable, true, 0_u64, 0xfff_u64, None);
    let (buffer, min, max, size) = (
        Path::new("MRES"),
        Path::new("MMIN"),
        Path::new("MMAX"),
        Path::new("MLEN"),
    );
    within_sb(vec![&Device::new(
        Path::new(&names.device),
        vec![
            &Name::new("_HID".into(), &EISAName::new("PNP0C80")),
            &Name::new("_UID".into(), &uid),
            &Method::new("_STA".into(), 0, false, vec![&status, &absent]),
            // Serialized, since it makes named objects.
            &Method::new(
                "_CRS".into(),
                0,
                true,
                vec![
                    &Name::new("MRES".into(), &ResourceTemplate::new(vec![&range])),
                    &CreateQWordField::new(&min, &buffer, &MINIMUM),
                    &CreateQWordField::new(&max, &buffer, &MAXIMUM),
                    &CreateQWordField::new(&size, &buffer, &LENGTH),
                    // The template is the same for all slots; the registers fill it in when the
                    // guest asks.
                    &Store::new(&min, &base),
                    &Store::new(&size, &len),
                    &Add::new(&Local(0), &min, &size),
                    &Subtract::new(&max, &Local(0), &ONE),
                    &Return::new(&buffer),
                ],
            ),
            &Method::new(
                "_OST".into(),
                3,
                true,
                vec![&MethodCall::new(
                    "MPST".into(),
                    vec![&uid, &Arg(0), &Arg(1)],
                )],
            ),
        ],
    )])
}

/// Notifies the devices of all memory that came.
fn scan() -> Bytes {
    let mut notices = Vec::new();
    for slot in 0..dimms::SLOTS {
        If::new(
            &Equal::new(&Arg(0), &(slot as u8)),
            vec![&Notify::new(&Path::new(&names(slot).device), &Arg(1))],
        )
        .to_aml_bytes(&mut notices);
    }
    notifiers(notices, ["MPEV", "MTFY", "MSCN"])
}
