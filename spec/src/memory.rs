//! Guest memory.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::defaults;

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
    /// The zone's name, and that of the device through which the zone grows.
    pub id: String,
    /// Bytes, a multiple of 2 MiB. The guest's memory has the zones in their order.
    pub size: u64,
    /// File behind the zone. (Not supported by this version.)
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
    /// Their size in bytes; 2 MiB when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hugepage_size: Option<u64>,
    /// NUMA node of the host from which all pages come.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub host_numa_node: Option<u32>,
    /// Bytes that can be added later with the method `VirtioMem`, a multiple of 128 MiB.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hotplug_size: Option<u64>,
    /// Bytes of `hotplug_size` that the guest has from the start; `vm.resize-zone` changes them.
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
    /// Bytes; 0 if there are `zones`.
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
    /// Parts with settings of their own, 32 at most. Beside them `size` is 0, and of the other fields
    /// only `hotplug_method` and `thp` are used.
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
}

/// 512 MiB.
impl Default for MemoryConfig {
    fn default() -> Self {
        Self::with_size(512 << 20)
    }
}
