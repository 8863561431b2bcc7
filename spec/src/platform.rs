//! The payload to boot, and its platform.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;
use uuid::Uuid;

use crate::defaults;
use crate::limits;
use crate::service::FieldProblem;
use crate::validate::problem;

/// The payload to boot.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct PayloadConfig {
    /// Firmware to start in place of a kernel: an ELF file with a PVH note, such as EDK2's
    /// `CLOUDHV.fd`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub firmware: Option<String>,
    /// Kernel: an ELF `vmlinux` or a bzImage.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kernel: Option<String>,
    /// The kernel's command line.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cmdline: Option<String>,
    /// Initial RAM file system.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub initramfs: Option<String>,
    /// An IGVM file.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub igvm: Option<String>,
    /// Data for the attestation of a confidential guest.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub host_data: Option<String>,
}

/// The platform's identity and extras. All absent or off by default.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct PlatformConfig {
    /// PCI segments.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub num_pci_segments: Option<u16>,
    /// Segments behind a virtual IOMMU.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub iommu_segments: Option<Vec<u16>>,
    /// Address bits of the virtual IOMMU.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub iommu_address_width_bits: Option<u8>,
    /// SMBIOS system serial number.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub system_serial_number: Option<String>,
    /// Old name of `system_serial_number`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(deprecated)]
    pub serial_number: Option<String>,
    /// SMBIOS system UUID.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub system_uuid: Option<String>,
    /// Old name of `system_uuid`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(deprecated)]
    pub uuid: Option<String>,
    /// SMBIOS OEM strings.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub oem_strings: Option<Vec<String>>,
    /// SMBIOS system manufacturer.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub system_manufacturer: Option<String>,
    /// SMBIOS product name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub system_product_name: Option<String>,
    /// SMBIOS version.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub system_version: Option<String>,
    /// SMBIOS family.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub system_family: Option<String>,
    /// SMBIOS SKU number.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub system_sku_number: Option<String>,
    /// SMBIOS chassis asset tag.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub chassis_asset_tag: Option<String>,
    /// Intel TDX.
    #[serde(default)]
    pub tdx: bool,
    /// AMD SEV-SNP.
    #[serde(default)]
    pub sev_snp: bool,
    /// Use iommufd for devices of the host.
    #[serde(default)]
    pub iommufd: bool,
    /// Let devices of the host reach one another.
    #[serde(default = "defaults::yes")]
    pub vfio_p2p_dma: bool,
}

impl PlatformConfig {
    /// The serial number, under either name.
    #[must_use]
    pub fn system_serial(&self) -> Option<&str> {
        let either = self.system_serial_number.as_ref();
        either.or(self.serial_number.as_ref()).map(String::as_str)
    }

    /// The UUID, under either name; `None` if it is not one, which validation refuses.
    #[must_use]
    pub fn uuid(&self) -> Option<Uuid> {
        let either = self.system_uuid.as_deref().or(self.uuid.as_deref());
        either.and_then(|text| Uuid::parse_str(text).ok())
    }

    /// Checks what the SMBIOS tables are made of.
    pub(crate) fn check_identity(&self, found: &mut Vec<FieldProblem>) {
        let fields = [
            ("system_serial_number", &self.system_serial_number),
            ("serial_number", &self.serial_number),
            ("system_manufacturer", &self.system_manufacturer),
            ("system_product_name", &self.system_product_name),
            ("system_version", &self.system_version),
            ("system_family", &self.system_family),
            ("system_sku_number", &self.system_sku_number),
            ("chassis_asset_tag", &self.chassis_asset_tag),
        ];
        let fields = fields.into_iter();
        let fields = fields.filter_map(|(name, text)| Some((name.to_owned(), text.as_ref()?)));
        let oem = self.oem_strings.iter().flatten().enumerate();
        let oem = oem.map(|(i, text)| (format!("oem_strings/{i}"), text));
        let mut refuse = |field: &str, code: &str, detail: String| {
            found.push(problem(&format!("/platform{field}"), code, detail));
        };
        let mut len = 0;
        for (name, text) in fields.chain(oem) {
            // The table ends each string with a NUL, and has no empty strings.
            if text.is_empty() || text.chars().any(char::is_control) {
                let detail = format!("`{name}` must have text without control characters");
                refuse(&format!("/{name}"), "out-of-range", detail);
            }
            len += text.len() + 1;
        }
        if len > limits::SMBIOS_LEN {
            let most = limits::SMBIOS_LEN;
            let detail = format!("the strings have {len} bytes together; at most {most} fit");
            refuse("", "out-of-range", detail);
        }
        let count = self.oem_strings.as_ref().map_or(0, Vec::len);
        if count > limits::OEM_STRINGS {
            let most = limits::OEM_STRINGS;
            let detail = format!("`oem_strings` has {count} strings; at most {most} are possible");
            refuse("/oem_strings", "out-of-range", detail);
        }
        self.check_both_names(refuse);
    }

    /// Checks the UUIDs, and that a value that has two names is the same under both.
    fn check_both_names(&self, mut refuse: impl FnMut(&str, &str, String)) {
        let mut read = |name: &str, text: &Option<String>| {
            let text = text.as_deref()?;
            let uuid = Uuid::parse_str(text).ok();
            if uuid.is_none() {
                let detail = format!("`{name}` ({text}) is not a UUID");
                refuse(&format!("/{name}"), "out-of-range", detail);
            }
            uuid
        };
        let (new, old) = (
            read("system_uuid", &self.system_uuid),
            read("uuid", &self.uuid),
        );
        if let (Some(new), Some(old)) = (new, old)
            && new != old
        {
            let detail = format!("`uuid` ({old}) is the old name of `system_uuid` ({new})");
            refuse("/uuid", "inconsistent", detail);
        }
        if let (Some(new), Some(old)) = (&self.system_serial_number, &self.serial_number)
            && new != old
        {
            let detail = "`serial_number` is the old name of `system_serial_number`, which differs";
            refuse("/serial_number", "inconsistent", detail.to_owned());
        }
    }
}

/// A PCI segment's share of the address space.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct PciSegmentConfig {
    /// The segment.
    pub pci_segment: u16,
    /// Weight of its share below 4 GiB.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mmio32_aperture_weight: Option<u32>,
    /// Weight of its share above 4 GiB.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mmio64_aperture_weight: Option<u32>,
}

/// Distance of a NUMA node from another.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct NumaDistance {
    /// The other node.
    pub destination: u32,
    /// 10 is the node itself; 20 is twice as far.
    pub distance: u8,
}

/// A NUMA node of the guest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct NumaConfig {
    /// Its number.
    pub guest_numa_id: u32,
    /// vCPUs in it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cpus: Option<Vec<u32>>,
    /// Distances to the other nodes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub distances: Option<Vec<NumaDistance>>,
    /// Memory zones in it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory_zones: Option<Vec<String>>,
    /// PCI segments in it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pci_segments: Option<Vec<u16>>,
    /// The device that forms the node.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub device_id: Option<String>,
}

/// A path that the sandbox leaves open.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct LandlockConfig {
    /// The path.
    pub path: String,
    /// `r`, `w` or `rw`.
    pub access: String,
}
