//! Memory that a running guest gets, and gives back.
//!
//! With virtio-mem the guest follows a new size in its own time, up and down. Through ACPI the host
//! adds memory at once, and the guest answers whether it uses it; memory that was added stays until
//! the next boot.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use ::devices::dimms::{DimmBlock, DimmError, DimmRefusal};
use control::{Category, RequestError};
use spec::{HotplugMethod, MemoryZone, ResizeResource, VmConfig, VmResizeZone};
use virtio_devices::mem::MemHandle;

use super::resize::Resized;
use super::{Driver, Stage};

/// All memory, of a VM without zones.
const MEMORY: ResizeResource = ResizeResource::Memory;

/// A new size of a zone of the guest's memory, which was checked.
#[derive(Clone)]
pub(super) struct MemoryPlan {
    /// The name of the zone.
    zone: String,
    /// Bytes of hotplugged memory that the configuration gets.
    hotplugged: u64,
    /// Bytes that the host adds through ACPI now.
    pub(super) added: u64,
}

fn refused<T>(code: &'static str, detail: String) -> Result<T, RequestError> {
    Err(RequestError::new(Category::Unprocessable, code, detail))
}

fn unsupported<T>(detail: String) -> Result<T, RequestError> {
    let code = "unsupported-resize";
    Err(RequestError::new(Category::Unsupported, code, detail))
}

/// The name under which a resize of the zone is pending.
fn resized(zone: &MemoryZone<'_>) -> Resized {
    Resized {
        resource: MEMORY,
        zone: zone.is_listed.then(|| zone.id.to_owned()),
    }
}

impl Driver {
    /// Checks a new size of the guest's memory, which has no zones. Returns nothing if the guest has that
    /// size already.
    pub(super) fn plan_memory(&self, desired: u64) -> Result<Option<MemoryPlan>, RequestError> {
        let zones = self.config.memory.all_zones();
        match &zones[..] {
            [whole] if !whole.is_listed => self.plan_zone_of(whole, desired),
            zones => {
                let names: Vec<_> = zones.iter().map(|zone| zone.id).collect();
                unsupported(format!(
                    "the VM's memory has zones ({}): resize one of them, by `vm.resize-zone`",
                    names.join(", ")
                ))
            }
        }
    }

    /// Checks a new size of a memory zone.
    pub(super) fn plan_zone(
        &self,
        wanted: &VmResizeZone,
    ) -> Result<Option<MemoryPlan>, RequestError> {
        let zones = self.config.memory.all_zones();
        let mut listed = zones.iter().filter(|zone| zone.is_listed);
        if let Some(zone) = listed.find(|zone| zone.id == wanted.id) {
            return self.plan_zone_of(zone, wanted.desired_ram);
        }
        let listed = zones.iter().filter(|zone| zone.is_listed);
        let names: Vec<_> = listed.map(|zone| zone.id).collect();
        let has = match names[..] {
            [] => "none: resize all memory, by `vm.resize`".to_owned(),
            _ => names.join(", "),
        };
        let detail = format!("there is no memory zone `{}`; the VM has {has}", wanted.id);
        refused("no-such-zone", detail)
    }

    fn plan_zone_of(
        &self,
        zone: &MemoryZone<'_>,
        desired: u64,
    ) -> Result<Option<MemoryPlan>, RequestError> {
        let (boot, room) = (zone.size, zone.hotplug_region());
        let dimms = self.dimms();
        // Through ACPI, what the guest has may differ from what it should have.
        let is_open = dimms.is_some_and(|dimms| Some(dimms.plugged_len()) != self.hotplugged(zone));
        if desired == boot.saturating_add(zone.hotplugged()) && !is_open {
            return Ok(None);
        }
        if room == 0 {
            let whose = match zone.is_listed {
                true => format!("memory zone `{}`", zone.id),
                false => "VM's memory".to_owned(),
            };
            return unsupported(match zone.hotplug_size {
                Some(size) => format!(
                    "the {whose} cannot grow: its `hotplug_size` ({size}) is less than one unit, {}",
                    zone.hotplug_unit()
                ),
                None => format!("the {whose} cannot grow: create the VM with `hotplug_size`"),
            });
        }
        let Some(hotplugged) = desired.checked_sub(boot) else {
            let detail = format!(
                "`desired_ram` ({desired}) is less than the memory that the VM boots with ({boot}): use \
                 a balloon (`desired_balloon`) to have less"
            );
            return refused("memory-too-small", detail);
        };
        if hotplugged > room {
            let most = boot.saturating_add(room);
            let detail = format!(
                "`desired_ram` ({desired}) is more than `size` and `hotplug_size` allow ({most})"
            );
            return refused("memory-too-large", detail);
        }
        let unit = zone.hotplug_unit();
        if !hotplugged.is_multiple_of(unit) {
            let detail = format!(
                "`desired_ram` ({desired}) must be `size` ({boot}) and a multiple of {unit}, the size of \
                 a block of hotplugged memory"
            );
            return refused("memory-unaligned", detail);
        }
        self.check_no_resize(resized(zone))?;
        let added = match dimms {
            Some(dimms) => hotplugged.saturating_sub(dimms.plugged_len()),
            None => 0,
        };
        if let Some(dimms) = dimms.filter(|_| added > 0)
            && let Err(error) = dimms.check(added)
        {
            let code = match error {
                DimmError::NoSlot => "memory-slots-used",
                DimmError::NoRoom { .. } => "memory-too-large",
                DimmError::Unaligned(_) => "memory-unaligned",
            };
            return refused(code, error.to_string());
        }
        Ok(Some(MemoryPlan {
            zone: zone.id.to_owned(),
            hotplugged,
            added,
        }))
    }

    /// Asks the guest to use the planned bytes of hotplugged memory. The host has added its memory by now.
    pub(super) fn resize_memory(&mut self, plan: &MemoryPlan) {
        self.set_hotplugged(&plan.zone, plan.hotplugged);
        let config = Arc::clone(&self.config);
        let Some(zone) = config.memory.zone(&plan.zone) else {
            return;
        };
        let to = zone.size.saturating_add(plan.hotplugged);
        let (Some(before), Stage::On(active)) = (self.memory_size(&zone), &self.stage) else {
            return;
        };
        if let Some(dimms) = active.dimms() {
            let plugged = dimms.plugged_len();
            if plan.hotplugged < plugged {
                // As in Cloud Hypervisor: the next boot has less.
                let stays = zone.size.saturating_add(plugged);
                let detail = format!(
                    "memory: {stays} to {to}, stays at {stays}: what was added with `Acpi` stays until \
                     the VM is rebooted"
                );
                self.publisher.record("resize-failed", Some(detail));
                return;
            }
            if plan.added == 0 {
                active.offer_memory_again();
            }
        } else if let Some(handle) = zone.device().and_then(|id| active.devices().memory(id)) {
            handle.resize(plan.hotplugged);
        }
        self.begin_resize(resized(&zone), before, to);
        // The guest may have that already: it has not followed an earlier request, or it was faster
        // than this thread.
        self.memory_changed();
    }

    /// The guest has plugged or unplugged memory, or has answered for memory that was added.
    pub(super) fn memory_changed(&mut self) {
        let Stage::On(active) = &self.stage else {
            return self.report_memory_again();
        };
        let refusals = active.take_memory_refusals();
        let is_over = active.dimms().is_some_and(|dimms| !dimms.is_open());
        let config = Arc::clone(&self.config);
        for zone in config.memory.all_zones() {
            if let Some(size) = self.memory_size(&zone) {
                self.resize_progressed(resized(&zone), size);
            }
        }
        for refusal in refusals {
            let why = describe(refusal);
            tracing::warn!(why, "a guest refused memory");
            self.resize_refused(MEMORY, &why);
        }
        if is_over {
            self.resize_failed(MEMORY, "the guest refused memory");
        }
    }

    /// The guest did not complete a resize. With virtio-mem, what it has is what it should have.
    /// Memory that was added through ACPI stays: the guest may take it late.
    pub(super) fn withdraw_memory(&mut self, what: &Resized) {
        let config = Arc::clone(&self.config);
        let mut zones = config.memory.all_zones().into_iter();
        let Some(zone) = zones.find(|zone| resized(zone) == *what) else {
            return;
        };
        let Stage::On(active) = &self.stage else {
            return;
        };
        if let Some(handle) = zone.device().and_then(|id| active.devices().memory(id)) {
            let plugged = handle.plugged().load(Ordering::Acquire);
            handle.resize(plugged);
            self.set_hotplugged(zone.id, plugged);
        }
    }

    /// A guest came with its memory: what it has not answered for is pending here from now on.
    pub(super) fn memory_arrived(&mut self) {
        let Some(dimms) = self.dimms() else {
            return;
        };
        let (is_open, plugged) = (dimms.is_open(), dimms.plugged_len());
        let config = Arc::clone(&self.config);
        for zone in config.memory.all_zones() {
            let to = zone.size.saturating_add(plugged);
            if let Some(before) = self.memory_size(&zone).filter(|_| is_open) {
                self.begin_resize(resized(&zone), before, to);
            }
        }
    }

    /// The slots for memory that is added through ACPI, while there is a machine that has them.
    fn dimms(&self) -> Option<&DimmBlock> {
        match &self.stage {
            Stage::On(active) => active.dimms(),
            _ => None,
        }
    }

    /// Bytes of memory that the guest has or should have, whichever is more.
    pub(super) fn all_memory(&self) -> u64 {
        let zones = self.config.memory.all_zones().into_iter();
        let all = zones.map(|zone| {
            let hotplugged = self.hotplugged(&zone).unwrap_or(0);
            zone.size.saturating_add(hotplugged.max(zone.hotplugged()))
        });
        all.fold(0, u64::saturating_add)
    }

    /// Bytes of hotplugged memory of a zone that the guest has, if it can change them.
    fn hotplugged(&self, zone: &MemoryZone<'_>) -> Option<u64> {
        let Stage::On(active) = &self.stage else {
            return None;
        };
        let handle = zone.device().and_then(|id| active.devices().memory(id));
        let plugged = handle.map(MemHandle::plugged);
        let dimms = active.dimms().map(DimmBlock::accepted);
        let bytes: &Arc<AtomicU64> = plugged.or(dimms)?;
        Some(bytes.load(Ordering::Acquire))
    }

    /// Bytes of a memory zone that the guest has, if it can change them.
    fn memory_size(&self, zone: &MemoryZone<'_>) -> Option<u64> {
        Some(zone.size.saturating_add(self.hotplugged(zone)?))
    }

    fn set_hotplugged(&mut self, zone: &str, hotplugged: u64) {
        let mut config = VmConfig::clone(&self.config);
        config.memory.set_hotplugged(zone, hotplugged);
        self.set_config(Arc::new(config));
    }

    /// Another thread has the machine: what the machine reported is handled after that.
    fn report_memory_again(&self) {
        let is_acpi = self.config.memory.hotplug_method == HotplugMethod::Acpi;
        if matches!(self.stage, Stage::Busy(_)) && is_acpi {
            let event = crate::guest_event::GuestEvent::MemoryChanged;
            self.reporter().report(event);
        }
    }
}

/// The refusal in words (ACPI 6.5, table 6.67).
fn describe(refusal: DimmRefusal) -> String {
    let DimmRefusal { slot, status } = refusal;
    let why = match status {
        0x81 => ": its driver failed",
        0x82 => ": it does not support that",
        _ => "",
    };
    format!("the guest refused to use the memory in slot {slot}{why} (_OST status {status:#x})")
}
