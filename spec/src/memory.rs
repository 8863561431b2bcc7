//! Guest memory.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::defaults;

fn acpi() -> String {
    "Acpi".to_owned()
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
    /// Bytes that can be added later.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hotplug_size: Option<u64>,
    /// Bytes of `hotplug_size` that are plugged already.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hotplugged_size: Option<u64>,
    /// Let the host merge equal pages (KSM).
    #[serde(default)]
    pub mergeable: bool,
    /// How memory is added: `Acpi` or `VirtioMem`.
    #[serde(default = "acpi")]
    pub hotplug_method: String,
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
            hotplug_method: acpi(),
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
