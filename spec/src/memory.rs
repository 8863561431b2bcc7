//! Guest memory.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::defaults;
use crate::limits;
use crate::service::FieldProblem;
use crate::validate::{HostLimits, problem};

/// How the memory of a running guest grows.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub enum HotplugMethod {
    /// ACPI: memory devices are added in whole.
    #[default]
    Acpi,
    /// A virtio-mem device: the guest plugs and unplugs parts of a region.
    VirtioMem,
}

/// A part of guest memory with settings of its own.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct MemoryZoneConfig {
    /// Its name.
    pub id: String,
    /// Bytes.
    pub size: u64,
    /// File behind it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub file: Option<String>,
    /// Let the host merge equal pages (KSM).
    #[serde(default)]
    pub mergeable: bool,
    /// Allocate memory that other processes can map.
    #[serde(default)]
    pub shared: bool,
    /// Use huge pages of the host.
    #[serde(default)]
    pub hugepages: bool,
    /// Their size in bytes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hugepage_size: Option<u64>,
    /// NUMA node of the host.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub host_numa_node: Option<u32>,
    /// Bytes that can be added later.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hotplug_size: Option<u64>,
    /// Bytes of `hotplug_size` that are plugged already.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hotplugged_size: Option<u64>,
    /// Populate the memory before boot.
    #[serde(default)]
    pub prefault: bool,
    /// Count the memory against the host's commit limit.
    #[serde(default)]
    pub reserve: bool,
}

/// Guest memory.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct MemoryConfig {
    /// Bytes.
    pub size: u64,
    /// Bytes that can be added later: with `VirtioMem` a multiple of 128 MiB, with `Acpi` rounded
    /// down to one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hotplug_size: Option<u64>,
    /// Bytes of `hotplug_size` that the guest has from the start; `vm.resize` changes them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hotplugged_size: Option<u64>,
    /// Let the host merge equal pages (KSM).
    #[serde(default)]
    pub mergeable: bool,
    /// How memory is added: `Acpi` or `VirtioMem`. A string in the contract.
    #[serde(default)]
    #[schema(value_type = String)]
    pub hotplug_method: HotplugMethod,
    /// Allocate memory that other processes can map.
    #[serde(default)]
    pub shared: bool,
    /// Use huge pages of the host.
    #[serde(default)]
    pub hugepages: bool,
    /// Their size in bytes; 2 MiB when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hugepage_size: Option<u64>,
    /// Populate the memory before boot.
    #[serde(default)]
    pub prefault: bool,
    /// Count the memory against the host's commit limit.
    #[serde(default)]
    pub reserve: bool,
    /// Let the host use transparent huge pages.
    #[serde(default = "defaults::yes")]
    pub thp: bool,
    /// Parts with settings of their own, in place of `size`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub zones: Option<Vec<MemoryZoneConfig>>,
}

impl MemoryConfig {
    /// Returns a configuration of `size` bytes with defaults otherwise.
    #[must_use]
    pub fn with_size(size: u64) -> Self {
        Self {
            size,
            hotplug_size: None,
            hotplugged_size: None,
            mergeable: false,
            hotplug_method: HotplugMethod::Acpi,
            shared: false,
            hugepages: false,
            hugepage_size: None,
            prefault: false,
            reserve: false,
            thp: true,
            zones: None,
        }
    }

    /// Returns the size of the pages behind the memory.
    #[must_use]
    pub fn page_size(&self) -> u64 {
        match (self.hugepages, self.hugepage_size) {
            (true, size) => size.unwrap_or(2 << 20),
            (false, _) => limits::PAGE,
        }
    }

    /// Returns the bytes by which the memory can grow. With `Acpi`, clients ask for room of any size,
    /// of which whole memory devices can be used.
    #[must_use]
    pub fn hotplug_region(&self) -> u64 {
        let room = self.hotplug_size.unwrap_or(0);
        match self.hotplug_method {
            HotplugMethod::Acpi => room - room % self.hotplug_alignment().max(1),
            HotplugMethod::VirtioMem => room,
        }
    }

    /// Whether the memory grows by memory devices of ACPI.
    #[must_use]
    pub fn has_dimms(&self) -> bool {
        self.hotplug_method == HotplugMethod::Acpi && self.hotplug_region() > 0
    }

    /// Whether the memory grows through a device of its own.
    #[must_use]
    pub fn has_virtio_mem(&self) -> bool {
        self.hotplug_method == HotplugMethod::VirtioMem && self.hotplug_region() > 0
    }

    /// Returns the bytes of the hotplug region that the guest should have.
    #[must_use]
    pub fn hotplugged(&self) -> u64 {
        match self.hotplug_region() {
            0 => 0,
            _ => self.hotplugged_size.unwrap_or(0),
        }
    }

    /// Returns the bytes in multiples of which memory is added and removed.
    #[must_use]
    pub fn hotplug_unit(&self) -> u64 {
        match self.hotplug_method {
            HotplugMethod::Acpi => limits::HOTPLUG_ALIGNMENT.max(self.page_size()),
            HotplugMethod::VirtioMem => limits::HOTPLUG_BLOCK.max(self.page_size()),
        }
    }

    /// Returns the alignment of the hotplug region in the guest's memory.
    #[must_use]
    pub fn hotplug_alignment(&self) -> u64 {
        limits::HOTPLUG_ALIGNMENT.max(self.page_size())
    }

    pub(crate) fn check_hotplug(&self, host: &HostLimits, found: &mut Vec<FieldProblem>) {
        let region = self.hotplug_region();
        let align = self.hotplug_alignment();
        let mut add = |field: &str, detail: String| {
            found.push(problem(&format!("/memory/{field}"), "out-of-range", detail));
        };
        if !region.is_multiple_of(align) {
            let detail =
                format!("`hotplug_size` ({region}) must be a multiple of {align} with `VirtioMem`");
            add("hotplug_size", detail);
        } else if region > host.max_memory.saturating_sub(self.size) {
            let (size, most) = (self.size, host.max_memory);
            let detail = format!(
                "`size` ({size}) and `hotplug_size` ({region}) are more than this host can map for a \
                 guest ({most})"
            );
            add("hotplug_size", detail);
        }
        let (plugged, unit) = (self.hotplugged_size.unwrap_or(0), self.hotplug_unit());
        if plugged > region {
            let detail = format!(
                "`hotplugged_size` ({plugged}) is more than `hotplug_size` has room for ({region})"
            );
            add("hotplugged_size", detail);
        } else if !plugged.is_multiple_of(unit) {
            let detail = format!("`hotplugged_size` ({plugged}) must be a multiple of {unit}");
            add("hotplugged_size", detail);
        }
    }
}

/// 512 MiB.
impl Default for MemoryConfig {
    fn default() -> Self {
        Self::with_size(512 << 20)
    }
}
