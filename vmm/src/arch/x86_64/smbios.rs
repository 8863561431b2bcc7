//! SMBIOS tables (DSP0134 3.2): the identity that inventory, licence and cloud-init software reads.
//!
//! The entry point is where PC software and EDK2 look for it, and the structures follow it.

use spec::PlatformConfig;

use super::layout;

/// Bytes of the entry point (5.2.2).
const ENTRY_LEN: usize = 24;

const BIOS_INFORMATION: u8 = 0;
const SYSTEM_INFORMATION: u8 = 1;
const CHASSIS: u8 = 3;
const OEM_STRINGS: u8 = 11;
const END_OF_TABLE: u8 = 127;

const MANUFACTURER: &str = "Whimbrel";
const PRODUCT: &str = "Whimbrel virtual machine";

/// Returns the tables of a machine, to be loaded at [`layout::SMBIOS`]: the entry point, then the
/// structures.
pub(crate) fn tables(platform: Option<&PlatformConfig>) -> Vec<u8> {
    let mut table = Table::default();
    table.add(bios());
    table.add(system(platform));
    table.add(chassis(platform));
    let oem_strings = platform.and_then(|platform| platform.oem_strings.as_deref());
    if let Some(strings) = oem_strings.filter(|strings| !strings.is_empty()) {
        table.add(oem(strings));
    }
    table.add(Structure::new(END_OF_TABLE, &[]));
    let mut all = entry_point(table.bytes.len());
    all.extend(table.bytes);
    all
}

/// 7.1.
fn bios() -> Structure {
    const PCI: u64 = 1 << 7;
    const VIRTUAL_MACHINE: u8 = 1 << 4;
    /// A version that is not given.
    const NONE: u8 = 0xff;
    let mut bios = Structure::new(BIOS_INFORMATION, &[]);
    bios.string(Some(MANUFACTURER));
    bios.string(Some(env!("CARGO_PKG_VERSION")));
    bios.put(&[0; 2]); // no address below 1 MiB
    bios.string(None); // no release date
    bios.put(&[0]); // 64 KiB of ROM
    bios.put(&PCI.to_le_bytes());
    bios.put(&[0, VIRTUAL_MACHINE]);
    bios.put(&[NONE; 4]);
    bios.put(&[0; 2]); // no more ROM
    bios
}

/// 7.2.
fn system(platform: Option<&PlatformConfig>) -> Structure {
    const WAKE_UP_UNKNOWN: u8 = 2;
    let field = |get: fn(&PlatformConfig) -> &Option<String>| {
        platform.and_then(|platform| get(platform).as_deref())
    };
    let uuid = platform.and_then(PlatformConfig::uuid);
    let mut system = Structure::new(SYSTEM_INFORMATION, &[]);
    system.string(field(|p| &p.system_manufacturer).or(Some(MANUFACTURER)));
    system.string(field(|p| &p.system_product_name).or(Some(PRODUCT)));
    system.string(field(|p| &p.system_version));
    system.string(platform.and_then(PlatformConfig::system_serial));
    // The first three fields are little-endian (7.2.1); zeros say that there is none.
    system.put(&uuid.unwrap_or_default().to_bytes_le());
    system.put(&[WAKE_UP_UNKNOWN]);
    system.string(field(|p| &p.system_sku_number));
    system.string(field(|p| &p.system_family));
    system
}

/// 7.4.
fn chassis(platform: Option<&PlatformConfig>) -> Structure {
    const OTHER: u8 = 1;
    const SAFE: u8 = 3;
    const UNKNOWN: u8 = 2;
    let mut chassis = Structure::new(CHASSIS, &[]);
    chassis.string(Some(MANUFACTURER));
    chassis.put(&[OTHER]);
    chassis.string(None); // version
    chassis.string(None); // serial number
    chassis.string(platform.and_then(|platform| platform.chassis_asset_tag.as_deref()));
    chassis.put(&[SAFE, SAFE, SAFE, UNKNOWN]);
    chassis.put(&[0; 4]); // OEM-defined
    chassis.put(&[0; 4]); // height, power cords and contained elements: none
    chassis.string(None); // SKU
    chassis
}

/// 7.12.
fn oem(strings: &[String]) -> Structure {
    // The configuration has at most 255.
    let mut oem = Structure::new(
        OEM_STRINGS,
        &[u8::try_from(strings.len()).unwrap_or(u8::MAX)],
    );
    for string in strings {
        oem.add_string(string);
    }
    oem
}

/// Returns the 64-bit entry point (5.2.2) of a table of `len` bytes.
fn entry_point(len: usize) -> Vec<u8> {
    const CHECKSUM: usize = 5;
    let mut entry = Vec::with_capacity(ENTRY_LEN);
    entry.extend(b"_SM3_");
    entry.extend([0, ENTRY_LEN as u8, 3, 2, 0, 1, 0]);
    entry.extend(u32::try_from(len).unwrap_or(u32::MAX).to_le_bytes());
    entry.extend((layout::SMBIOS + ENTRY_LEN as u64).to_le_bytes());
    let sum = entry
        .iter()
        .fold(0, |sum: u8, byte| sum.wrapping_add(*byte));
    if let Some(byte) = entry.get_mut(CHECKSUM) {
        *byte = sum.wrapping_neg();
    }
    entry
}

/// A structure without its header (6.1.2): fields, and the strings that they name by number.
struct Structure {
    kind: u8,
    fields: Vec<u8>,
    strings: Vec<String>,
}

impl Structure {
    fn new(kind: u8, fields: &[u8]) -> Self {
        Self {
            kind,
            fields: fields.to_vec(),
            strings: Vec::new(),
        }
    }

    fn put(&mut self, bytes: &[u8]) {
        self.fields.extend(bytes);
    }

    fn add_string(&mut self, text: &str) {
        self.strings.push(text.to_owned());
    }

    /// Adds a field that names a string; zero where there is none.
    fn string(&mut self, text: Option<&str>) {
        let number = match text {
            Some(text) => {
                self.add_string(text);
                self.strings.len() as u8
            }
            None => 0,
        };
        self.put(&[number]);
    }
}

#[derive(Default)]
struct Table {
    bytes: Vec<u8>,
    /// Handles are the structures' numbers.
    next: u16,
}

impl Table {
    fn add(&mut self, structure: Structure) {
        const HEADER_LEN: usize = 4;
        // At most 0x20 bytes or so: strings are not counted (6.1.2).
        let len = (HEADER_LEN + structure.fields.len()) as u8;
        self.bytes.extend([structure.kind, len]);
        self.bytes.extend(self.next.to_le_bytes());
        self.bytes.extend(structure.fields);
        for string in &structure.strings {
            self.bytes.extend(string.as_bytes());
            self.bytes.push(0);
        }
        // A second NUL ends the strings; where there are none, both are needed.
        let ends = if structure.strings.is_empty() { 2 } else { 1 };
        self.bytes.resize(self.bytes.len() + ends, 0);
        self.next += 1;
    }
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    fn platform(json: &str) -> PlatformConfig {
        spec::parse(json.as_bytes()).unwrap()
    }

    fn full() -> PlatformConfig {
        platform(
            r#"{"system_manufacturer": "Acme", "system_product_name": "Road Runner",
            "system_version": "7.1", "system_serial_number": "SN-0815", "system_family": "Birds",
            "system_sku_number": "SKU-42", "chassis_asset_tag": "tag 99",
            "system_uuid": "00112233-4455-6677-8899-aabbccddeeff",
            "oem_strings": ["first=1", "second string"]}"#,
        )
    }

    /// Type, formatted part and strings of each structure, as a reader of the specification finds them.
    fn decode(all: &[u8]) -> Vec<(u8, Vec<u8>, Vec<String>)> {
        assert_eq!(
            (&all[..5], all[6], &all[7..9]),
            (&b"_SM3_"[..], 24, &[3, 2][..])
        );
        assert_eq!(
            all[..24].iter().fold(0, |sum: u8, b| sum.wrapping_add(*b)),
            0
        );
        assert_eq!(all[16..24], (layout::SMBIOS + 24).to_le_bytes());
        let len = u32::from_le_bytes(all[12..16].try_into().unwrap()) as usize;
        let mut rest = &all[24..];
        assert_eq!(rest.len(), len);
        let mut found = Vec::new();
        while !rest.is_empty() {
            let (kind, len) = (rest[0], usize::from(rest[1]));
            assert_eq!(rest[2..4], u16::to_le_bytes(found.len() as u16), "handle");
            let formatted = rest[..len].to_vec();
            let end = rest[len..]
                .windows(2)
                .position(|pair| pair == [0, 0])
                .unwrap();
            let strings = &rest[len..len + end];
            let strings = strings.split(|byte| *byte == 0).filter(|s| !s.is_empty());
            let strings = strings.map(|s| String::from_utf8(s.to_vec()).unwrap());
            found.push((kind, formatted, strings.collect()));
            rest = &rest[len + end + 2..];
        }
        found
    }

    #[test]
    fn structures_hold_the_configured_strings() {
        let all = decode(&tables(Some(&full())));
        let kinds: Vec<_> = all
            .iter()
            .map(|(kind, fields, _)| (*kind, fields.len()))
            .collect();
        assert_eq!(kinds, [(0, 0x1a), (1, 0x1b), (3, 0x16), (11, 5), (127, 4)]);
        let (_, system, strings) = &all[1];
        let at = |field: usize| strings[usize::from(system[field]) - 1].as_str();
        assert_eq!(
            [4, 5, 6, 7, 0x19, 0x1a].map(at),
            ["Acme", "Road Runner", "7.1", "SN-0815", "SKU-42", "Birds"]
        );
        assert_eq!(
            system[8..24],
            [
                0x33, 0x22, 0x11, 0, 0x55, 0x44, 0x77, 0x66, 0x88, 0x99, 0xaa, 0xbb, 0xcc, 0xdd,
                0xee, 0xff
            ]
        );
        let (_, chassis, strings) = &all[2];
        assert_eq!(strings[usize::from(chassis[8]) - 1], "tag 99");
        assert_eq!(
            (all[3].1[4], &all[3].2[..]),
            (2, &["first=1".to_owned(), "second string".into()][..])
        );
    }

    #[test]
    fn old_names_mean_the_same() {
        let old =
            platform(r#"{"serial_number": "S", "uuid": "{00112233-4455-6677-8899-AABBCCDDEEFF}"}"#);
        let new = platform(
            r#"{"system_serial_number": "S", "system_uuid": "00112233445566778899aabbccddeeff"}"#,
        );
        assert_eq!(tables(Some(&old)), tables(Some(&new)));
    }

    #[test]
    fn nothing_configured_leaves_fields_empty() {
        let all = decode(&tables(None));
        assert_eq!(all, decode(&tables(Some(&platform("{}")))));
        let kinds: Vec<_> = all.iter().map(|(kind, ..)| *kind).collect();
        assert_eq!(kinds, [0, 1, 3, 127]);
        let (_, system, strings) = &all[1];
        assert_eq!(*strings, [MANUFACTURER, PRODUCT]);
        assert_eq!(system[6..24], [0; 18]);
    }

    /// The largest configuration that validation accepts fits in its place.
    #[test]
    fn longest_strings_fit() {
        let text = "x".repeat(spec::limits::SMBIOS_LEN / 255 - 1);
        let json = serde_json::json!({ "oem_strings": vec![text; 255] });
        let all = tables(Some(&platform(&json.to_string())));
        assert!(
            all.len() as u64 <= layout::SMBIOS_END - layout::SMBIOS,
            "{}",
            all.len()
        );
        assert_eq!(decode(&all)[3].2.len(), 255);
    }

    /// The opinion of another implementation, where the machine has it.
    #[test]
    fn dmidecode_reads_the_tables() {
        let dir = tempfile::tempdir().unwrap();
        let dump = dir.path().join("dump");
        let mut all = tables(Some(&full()));
        // dmidecode's dumps have the table at 32.
        let table = all.split_off(ENTRY_LEN);
        all[16..24].copy_from_slice(&32_u64.to_le_bytes());
        all[5] = 0;
        all[5] = all
            .iter()
            .fold(0, |sum: u8, b| sum.wrapping_add(*b))
            .wrapping_neg();
        all.resize(32, 0);
        all.extend(table);
        std::fs::write(&dump, all).unwrap();
        let path = format!(
            "{}:/usr/sbin:/sbin",
            std::env::var("PATH").unwrap_or_default()
        );
        let run = Command::new("dmidecode")
            .env("PATH", path)
            .arg("--from-dump")
            .arg(&dump)
            .output();
        let Ok(run) = run else {
            println!("not tried: there is no dmidecode");
            return;
        };
        let printed = String::from_utf8_lossy(&run.stdout).into_owned();
        for line in [
            "SMBIOS 3.2.0 present.",
            "Product Name: Road Runner",
            "Serial Number: SN-0815",
            "UUID: 00112233-4455-6677-8899-aabbccddeeff",
            "SKU Number: SKU-42",
            "Family: Birds",
            "Asset Tag: tag 99",
            "System is a virtual machine",
            "String 2: second string",
            "End Of Table",
        ] {
            assert!(printed.contains(line), "{printed}, not {line}");
        }
        for complaint in ["Wrong", "broken", "truncated", "<BAD INDEX>", "invalid"] {
            assert!(!printed.contains(complaint), "{printed}");
        }
    }
}
