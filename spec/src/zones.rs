//! Guest memory as a list of zones. Memory that is configured without zones is one zone.

use std::collections::HashSet;

use crate::limits;
use crate::memory::{HotplugMethod, MemoryConfig, MemoryZoneConfig};
use crate::names::{MEMORY_DEVICE, check_device_name};
use crate::requests::VmMemoryZoneUpdateData;
use crate::service::FieldProblem;
use crate::validate::{HostLimits, UNSUPPORTED, problem};

/// The name of a VM's memory that has no `zones`, as in Cloud Hypervisor.
pub const WHOLE_MEMORY: &str = "mem0";

/// A zone of guest memory: one of `memory.zones`, or all memory of a VM that has none.
#[derive(Clone, Copy, Debug)]
pub struct MemoryZone<'a> {
    /// The zone's name.
    pub id: &'a str,
    /// Whether the zone is one of `memory.zones`.
    pub is_listed: bool,
    /// Bytes that the guest boots with.
    pub size: u64,
    /// Path of the file behind the zone.
    pub file: Option<&'a str>,
    /// The host may merge equal pages.
    pub mergeable: bool,
    /// Other processes can map the memory.
    pub shared: bool,
    /// Huge pages of the host.
    pub hugepages: bool,
    /// Their size in bytes, if it was given.
    pub hugepage_size: Option<u64>,
    /// NUMA node of the host.
    pub host_node: Option<u32>,
    /// Bytes that can be added, as they were given.
    pub hotplug_size: Option<u64>,
    /// Bytes of them that the guest should have, as they were given.
    pub hotplugged_size: Option<u64>,
    /// How the zone grows.
    pub method: HotplugMethod,
    /// Populate the memory before boot.
    pub prefault: bool,
    /// Count the memory against the host's commit limit.
    pub reserve: bool,
    /// The host may use transparent huge pages.
    pub thp: bool,
}

impl MemoryConfig {
    /// Whether the memory is configured by `zones`.
    #[must_use]
    pub fn has_zones(&self) -> bool {
        self.zones.as_ref().is_some_and(|zones| !zones.is_empty())
    }

    /// Returns the zones in the order of their addresses, at least one.
    #[must_use]
    pub fn all_zones<'a>(&'a self) -> Vec<MemoryZone<'a>> {
        if !self.has_zones() {
            return vec![MemoryZone {
                id: WHOLE_MEMORY,
                is_listed: false,
                size: self.size,
                file: None,
                mergeable: self.mergeable,
                shared: self.shared,
                hugepages: self.hugepages,
                hugepage_size: self.hugepage_size,
                host_node: None,
                hotplug_size: self.hotplug_size,
                hotplugged_size: self.hotplugged_size,
                method: self.hotplug_method,
                prefault: self.prefault,
                reserve: self.reserve,
                thp: self.thp,
            }];
        }
        let zone = |zone: &'a MemoryZoneConfig| MemoryZone {
            id: &zone.id,
            is_listed: true,
            size: zone.size,
            file: zone.file.as_deref(),
            mergeable: zone.mergeable,
            shared: zone.shared,
            hugepages: zone.hugepages,
            hugepage_size: zone.hugepage_size,
            host_node: zone.host_numa_node,
            hotplug_size: zone.hotplug_size,
            hotplugged_size: zone.hotplugged_size,
            method: self.hotplug_method,
            prefault: zone.prefault,
            reserve: zone.reserve,
            thp: self.thp,
        };
        self.zones.iter().flatten().map(zone).collect()
    }

    /// Returns the zone of this name.
    #[must_use]
    pub fn zone(&self, id: &str) -> Option<MemoryZone<'_>> {
        self.all_zones().into_iter().find(|zone| zone.id == id)
    }

    /// Returns the bytes that the guest boots with.
    #[must_use]
    pub fn boot_size(&self) -> u64 {
        let sizes = self.all_zones().into_iter().map(|zone| zone.size);
        sizes.fold(0, u64::saturating_add)
    }

    /// Returns the bytes of all hotplug regions that the guest should have.
    #[must_use]
    pub fn hotplugged(&self) -> u64 {
        let sizes = self.all_zones().into_iter().map(|zone| zone.hotplugged());
        sizes.fold(0, u64::saturating_add)
    }

    /// Sets the bytes of the zone's hotplug region that the guest should have.
    pub fn set_hotplugged(&mut self, zone: &str, hotplugged: u64) {
        let hotplugged = (hotplugged > 0).then_some(hotplugged);
        if !self.has_zones() {
            self.hotplugged_size = hotplugged;
        }
        for listed in self.zones.iter_mut().flatten() {
            if listed.id == zone {
                listed.hotplugged_size = hotplugged;
            }
        }
    }

    /// Sets whether all memory is populated before the guest runs.
    pub fn set_prefault(&mut self, prefault: bool) {
        if !self.has_zones() {
            self.prefault = prefault;
        }
        for zone in self.zones.iter_mut().flatten() {
            zone.prefault = prefault;
        }
    }

    /// Takes zones from other NUMA nodes of the host, as a request's `zone_updates` say.
    ///
    /// # Errors
    /// There is no such zone, or it is named twice.
    pub fn update_zones(&mut self, updates: &[VmMemoryZoneUpdateData]) -> Result<(), FieldProblem> {
        let mut seen = HashSet::new();
        for (i, update) in updates.iter().enumerate() {
            let pointer = format!("/zone_updates/{i}/id");
            let mut zones = self.zones.iter_mut().flatten();
            let Some(zone) = zones.find(|zone| zone.id == update.id) else {
                let detail = format!("the VM has no memory zone `{}`", update.id);
                return Err(problem(&pointer, "out-of-range", detail));
            };
            if !seen.insert(&update.id) {
                let detail = format!("the memory zone `{}` is named twice", update.id);
                return Err(problem(&pointer, "duplicate", detail));
            }
            zone.host_numa_node = Some(update.host_numa_node);
        }
        Ok(())
    }

    /// Whether the memory grows by memory devices of ACPI.
    #[must_use]
    pub fn has_dimms(&self) -> bool {
        let mut zones = self.all_zones().into_iter();
        zones.any(|zone| zone.method == HotplugMethod::Acpi && zone.hotplug_region() > 0)
    }

    /// Adds the problems of the memory.
    pub(crate) fn check(&self, host: &HostLimits, found: &mut Vec<FieldProblem>) {
        let count = self.zones.iter().flatten().count();
        if count > limits::MEMORY_ZONES {
            let most = limits::MEMORY_ZONES;
            let detail = format!("`zones` has {count} zones; a VM can have {most}");
            return found.push(problem("/memory/zones", "out-of-range", detail));
        }
        if self.has_zones() {
            self.check_beside_zones(found);
        }
        let mut left = host.max_memory;
        let mut names = HashSet::new();
        for (i, zone) in self.all_zones().into_iter().enumerate() {
            let at = zone.pointer(i);
            if let Some(wrong) = check_device_name(&at, zone.id) {
                found.push(wrong);
            } else if !names.insert(zone.id) {
                let detail = format!("another zone has the id `{}`", zone.id);
                found.push(problem(&format!("{at}/id"), "duplicate", detail));
            }
            zone.check(&at, host.max_memory, &mut left, found);
        }
    }

    /// Refuses fields that zones have of their own.
    fn check_beside_zones(&self, found: &mut Vec<FieldProblem>) {
        if self.size > 0 {
            let detail = format!(
                "`size` ({}) must be 0 beside `zones`, which have sizes of their own",
                self.size
            );
            found.push(problem("/memory/size", "inconsistent", detail));
        }
        for (field, is_given) in [
            ("hotplug_size", self.hotplug_size.is_some()),
            ("hotplugged_size", self.hotplugged_size.is_some()),
            ("mergeable", self.mergeable),
            ("shared", self.shared),
            ("hugepages", self.hugepages),
            ("hugepage_size", self.hugepage_size.is_some()),
            ("prefault", self.prefault),
            ("reserve", self.reserve),
        ] {
            if is_given {
                let detail = format!(
                    "`{field}` has no effect beside `zones`: set it for each zone that needs it"
                );
                found.push(problem(&format!("/memory/{field}"), "inconsistent", detail));
            }
        }
    }
}

impl<'a> MemoryZone<'a> {
    /// Returns the name of the device through which the zone grows, if it has one.
    #[must_use]
    pub fn device(&self) -> Option<&'a str> {
        let name = if self.is_listed {
            self.id
        } else {
            MEMORY_DEVICE
        };
        self.has_virtio_mem().then_some(name)
    }

    /// Returns the JSON pointer of the fields of this zone, which is number `index`.
    pub(crate) fn pointer(&self, index: usize) -> String {
        match self.is_listed {
            true => format!("/memory/zones/{index}"),
            false => "/memory".to_owned(),
        }
    }

    /// Returns the size of the pages behind the zone.
    #[must_use]
    pub fn page_size(&self) -> u64 {
        match (self.hugepages, self.hugepage_size) {
            (true, size) => size.unwrap_or(2 << 20),
            (false, _) => limits::PAGE,
        }
    }

    /// Returns the bytes by which the zone can grow. With `Acpi`, clients ask for room of any size, of
    /// which whole memory devices can be used.
    #[must_use]
    pub fn hotplug_region(&self) -> u64 {
        let room = self.hotplug_size.unwrap_or(0);
        match self.method {
            HotplugMethod::Acpi => room - room % self.hotplug_alignment().max(1),
            HotplugMethod::VirtioMem => room,
        }
    }

    /// Whether the zone grows through a device of its own.
    #[must_use]
    pub fn has_virtio_mem(&self) -> bool {
        self.method == HotplugMethod::VirtioMem && self.hotplug_region() > 0
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
        match self.method {
            HotplugMethod::Acpi => limits::HOTPLUG_ALIGNMENT.max(self.page_size()),
            HotplugMethod::VirtioMem => limits::HOTPLUG_BLOCK.max(self.page_size()),
        }
    }

    /// Returns the alignment of the hotplug region in the guest's memory.
    #[must_use]
    pub fn hotplug_alignment(&self) -> u64 {
        limits::HOTPLUG_ALIGNMENT.max(self.page_size())
    }

    /// Adds the problems of the zone, whose fields are at the pointer `at`. The zones together may have
    /// `most` bytes, of which `left` are left for this one and those behind it.
    fn check(&self, at: &str, most: u64, left: &mut u64, found: &mut Vec<FieldProblem>) {
        let mut add = |field: &str, code: &str, detail: String| {
            found.push(problem(&format!("{at}/{field}"), code, detail));
        };
        if self.file.is_some() {
            let detail = "this version does not support `memory.zones.file`".to_owned();
            add("file", UNSUPPORTED, detail);
        }
        if !self.hugepages && self.hugepage_size.is_some() {
            let detail = "`hugepage_size` has no effect without `hugepages`".to_owned();
            add("hugepage_size", "inconsistent", detail);
        }
        let (size, page) = (self.size, self.page_size());
        let unit = match self.is_listed {
            true => page.max(limits::ZONE_UNIT),
            false => page,
        };
        if !page.is_power_of_two() || page < limits::PAGE {
            let detail =
                format!("`hugepage_size` ({page}) must be a power of two of at least 4096");
            return add("hugepage_size", "out-of-range", detail);
        }
        if size == 0 {
            let without = if self.is_listed {
                ""
            } else {
                " without `zones`"
            };
            let detail = format!("`size` must not be 0{without}");
            return add("size", "out-of-range", detail);
        }
        if !size.is_multiple_of(unit) {
            let detail = match unit == page {
                true => format!("`size` ({size}) must be a multiple of the page size ({page})"),
                false => format!("`size` ({size}) must be a multiple of {unit}"),
            };
            return add("size", "out-of-range", detail);
        }
        let Some(rest) = left.checked_sub(size) else {
            let before = most - *left;
            let detail = match before {
                0 => format!("`size` ({size}) is more than this host can map for a guest ({most})"),
                _ => format!(
                    "`size` ({size}) and the zones before this one ({before}) are more than this host \
                     can map for a guest ({most})"
                ),
            };
            return add("size", "out-of-range", detail);
        };
        *left = rest;
        self.check_hotplug(most, left, add);
    }

    fn check_hotplug(&self, most: u64, left: &mut u64, mut add: impl FnMut(&str, &str, String)) {
        let (region, align) = (self.hotplug_region(), self.hotplug_alignment());
        if self.is_listed && self.method == HotplugMethod::Acpi && self.hotplug_size.is_some() {
            let detail =
                "zones grow with `memory.hotplug_method` `VirtioMem` only, and it is `Acpi`";
            add("hotplug_size", "inconsistent", detail.to_owned());
        } else if !region.is_multiple_of(align) {
            let detail =
                format!("`hotplug_size` ({region}) must be a multiple of {align} with `VirtioMem`");
            add("hotplug_size", "out-of-range", detail);
        } else if region > *left {
            let before = most - *left;
            let detail = format!(
                "`hotplug_size` ({region}) and the memory before it ({before}) are more than this host \
                 can map for a guest ({most})"
            );
            add("hotplug_size", "out-of-range", detail);
        } else {
            *left -= region;
        }
        let (plugged, unit) = (self.hotplugged_size.unwrap_or(0), self.hotplug_unit());
        if plugged > region {
            let detail = format!(
                "`hotplugged_size` ({plugged}) is more than `hotplug_size` has room for ({region})"
            );
            add("hotplugged_size", "out-of-range", detail);
        } else if !plugged.is_multiple_of(unit) {
            let detail = format!("`hotplugged_size` ({plugged}) must be a multiple of {unit}");
            add("hotplugged_size", "out-of-range", detail);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    const HOST: HostLimits = HostLimits {
        max_vcpus: 8,
        max_memory: 1 << 40,
        host_cpus: 64,
    };

    fn found(memory: &str) -> Vec<(String, String)> {
        let memory: MemoryConfig = serde_json::from_str(memory).unwrap();
        let mut found = Vec::new();
        memory.check(&HOST, &mut found);
        let named = found
            .into_iter()
            .map(|problem| (problem.pointer, problem.code));
        named.collect()
    }

    #[test]
    fn zones_are_the_memory() {
        let mut memory: MemoryConfig = serde_json::from_str(
            r#"{"size":0,"hotplug_method":"VirtioMem","zones":[{"id":"a","size":2097152},
                {"id":"b","size":4194304,"hotplug_size":134217728,"hotplugged_size":2097152,
                 "host_numa_node":1,"shared":true,"hugepages":true,"hugepage_size":2097152}]}"#,
        )
        .unwrap();
        let mut problems = Vec::new();
        memory.check(&HOST, &mut problems);
        assert_eq!(problems, []);
        assert_eq!(
            (memory.boot_size(), memory.hotplugged()),
            (6 * MIB, 2 * MIB)
        );
        memory.set_hotplugged("b", 0);
        memory.set_hotplugged("c", 4 * MIB);
        assert_eq!((memory.hotplugged(), memory.hotplugged_size), (0, None));
        let devices: Vec<_> = memory.all_zones().iter().map(MemoryZone::device).collect();
        assert_eq!(devices, [None, Some("b")]);

        let whole = MemoryConfig::with_size(MIB);
        let ids: Vec<_> = whole.all_zones().iter().map(|zone| zone.id).collect();
        assert_eq!((ids, whole.boot_size()), (vec![WHOLE_MEMORY], MIB));
    }

    #[test]
    fn each_problem_names_its_zone() {
        for (memory, pointer, code) in [
            (
                r#""size":4096,"zones":[{"id":"a","size":2097152}]"#,
                "size",
                "inconsistent",
            ),
            (
                r#""size":0,"shared":true,"zones":[{"id":"a","size":2097152}]"#,
                "shared",
                "inconsistent",
            ),
            (
                r#""size":0,"hotplug_size":0,"zones":[{"id":"a","size":2097152}]"#,
                "hotplug_size",
                "inconsistent",
            ),
            (
                r#""size":0,"zones":[{"id":"a","size":0}]"#,
                "zones/0/size",
                "out-of-range",
            ),
            (
                r#""size":0,"zones":[{"id":"a","size":4096}]"#,
                "zones/0/size",
                "out-of-range",
            ),
            (
                r#""size":0,"zones":[{"id":"a","size":2097152},{"id":"b","size":1099511627776}]"#,
                "zones/1/size",
                "out-of-range",
            ),
            (
                r#""size":0,"zones":[{"id":"a/b","size":2097152}]"#,
                "zones/0/id",
                "out-of-range",
            ),
            (
                r#""size":0,"zones":[{"id":"a","size":2097152},{"id":"a","size":2097152}]"#,
                "zones/1/id",
                "duplicate",
            ),
            (
                r#""size":0,"zones":[{"id":"a","size":2097152,"file":"/f"}]"#,
                "zones/0/file",
                "unsupported",
            ),
            (
                r#""size":0,"zones":[{"id":"a","size":2097152,"hotplug_size":134217728}]"#,
                "zones/0/hotplug_size",
                "inconsistent",
            ),
            (
                r#""size":0,"zones":[{"id":"a","size":2097152,"hotplugged_size":2097152}]"#,
                "zones/0/hotplugged_size",
                "out-of-range",
            ),
            (
                r#""size":0,"hotplug_method":"VirtioMem","zones":[{"id":"a","size":2097152,"hotplug_size":4096}]"#,
                "zones/0/hotplug_size",
                "out-of-range",
            ),
            (
                r#""size":0,"zones":[{"id":"a","size":2097152,"hugepage_size":2097152}]"#,
                "zones/0/hugepage_size",
                "inconsistent",
            ),
        ] {
            let problems = found(&format!("{{{memory}}}"));
            assert_eq!(
                problems,
                [(format!("/memory/{pointer}"), code.to_owned())],
                "{memory}"
            );
        }
        let many = |count| {
            let zone = |i| format!(r#"{{"id":"z{i}","size":2097152}}"#);
            let zones: Vec<_> = (0..count).map(zone).collect();
            found(&format!(r#"{{"size":0,"zones":[{}]}}"#, zones.join(",")))
        };
        assert_eq!((many(32), many(33).len()), (vec![], 1));
    }
}
