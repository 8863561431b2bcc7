//! Memory that a running guest gets, and gives back.
//!
//! With virtio-mem the guest follows a new size in its own time, up and down. Through ACPI the host
//! adds memory at once, and the guest answers whether it uses it; memory that was added stays until
//! the next boot.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use ::devices::dimms::{DimmBlock, DimmError, DimmRefusal};
use control::{Category, RequestError};
use spec::{HotplugMethod, ResizeResource, VmConfig};

use super::{Driver, Stage};

const MEMORY: ResizeResource = ResizeResource::Memory;

/// A new size of the guest's memory, which was checked.
#[derive(Clone, Copy)]
pub(super) struct MemoryPlan {
    /// Bytes of hotplugged memory that the configuration gets.
    hotplugged: u64,
    /// Bytes that the host adds through ACPI now.
    pub(super) added: u64,
}

fn refused<T>(code: &'static str, detail: String) -> Result<T, RequestError> {
    Err(RequestError::new(Category::Unprocessable, code, detail))
}

impl Driver {
    /// Checks a new size of the guest's memory. Returns nothing if the guest has that size already.
    pub(super) fn plan_memory(&self, desired: u64) -> Result<Option<MemoryPlan>, RequestError> {
        let memory = &self.config.memory;
        let (boot, room) = (memory.size, memory.hotplug_region());
        let dimms = self.dimms();
        // Through ACPI, what the guest has may differ from what it should have.
        let is_open = dimms.is_some_and(|dimms| dimms.plugged_len() != self.hotplugged());
        if desired == boot.saturating_add(memory.hotplugged()) && !is_open {
            return Ok(None);
        }
        if room == 0 {
            let detail = match memory.hotplug_size {
                Some(size) => format!(
                    "the VM's memory cannot grow: its `hotplug_size` ({size}) is less than one unit, {}",
                    memory.hotplug_unit()
                ),
                None => "the VM's memory cannot grow: create the VM with `hotplug_size`".to_owned(),
            };
            let code = "unsupported-resize";
            return Err(RequestError::new(Category::Unsupported, code, detail));
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
        let unit = memory.hotplug_unit();
        if !hotplugged.is_multiple_of(unit) {
            let detail = format!(
                "`desired_ram` ({desired}) must be `size` ({boot}) and a multiple of {unit}, the size of \
                 a block of hotplugged memory"
            );
            return refused("memory-unaligned", detail);
        }
        self.check_no_resize(MEMORY)?;
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
        Ok(Some(MemoryPlan { hotplugged, added }))
    }

    /// Has the guest use so many bytes of hotplugged memory. What the host adds is there by now.
    pub(super) fn resize_memory(&mut self, plan: MemoryPlan) {
        let before = self.memory_size();
        self.set_hotplugged(plan.hotplugged);
        let to = self.config.memory.size.saturating_add(plan.hotplugged);
        let (Some(before), Stage::On(active)) = (before, &self.stage) else {
            return;
        };
        if let Some(dimms) = active.dimms() {
            let plugged = dimms.plugged_len();
            if plan.hotplugged < plugged {
                // As in Cloud Hypervisor: the next boot has less.
                let boot = self.config.memory.size;
                let stays = boot.saturating_add(plugged);
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
        } else if let Some(handle) = active.devices().memory() {
            handle.resize(plan.hotplugged);
        }
        self.begin_resize(MEMORY, before, to);
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
        if let Some(size) = self.memory_size() {
            self.resize_progressed(MEMORY, size);
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
    pub(super) fn withdraw_memory(&mut self) {
        let Stage::On(active) = &self.stage else {
            return;
        };
        if let Some(handle) = active.devices().memory() {
            let plugged = handle.plugged().load(Ordering::Acquire);
            handle.resize(plugged);
            self.set_hotplugged(plugged);
        }
    }

    /// A guest came with its memory: what it has not answered for is pending here from now on.
    pub(super) fn memory_arrived(&mut self) {
        let Some(dimms) = self.dimms() else {
            return;
        };
        let (is_open, plugged) = (dimms.is_open(), dimms.plugged_len());
        let to = self.config.memory.size.saturating_add(plugged);
        if let Some(before) = self.memory_size().filter(|_| is_open) {
            self.begin_resize(MEMORY, before, to);
        }
    }

    /// The slots for memory that is added through ACPI, while there is a machine that has them.
    fn dimms(&self) -> Option<&DimmBlock> {
        match &self.stage {
            Stage::On(active) => active.dimms(),
            _ => None,
        }
    }

    /// Bytes of hotplugged memory that the guest has.
    fn hotplugged(&self) -> u64 {
        let Stage::On(active) = &self.stage else {
            return 0;
        };
        let hotplugged = active.hotplugged();
        hotplugged.map_or(0, |bytes| bytes.load(Ordering::Acquire))
    }

    /// Bytes of memory that the guest has or should have, whichever is more.
    pub(super) fn all_memory(&self) -> u64 {
        let memory = &self.config.memory;
        let hotplugged = memory.hotplugged().max(self.hotplugged());
        memory.size.saturating_add(hotplugged)
    }

    /// Bytes of memory that the guest has, if it can change them.
    fn memory_size(&self) -> Option<u64> {
        let Stage::On(active) = &self.stage else {
            return None;
        };
        active.hotplugged()?;
        Some(self.config.memory.size.saturating_add(self.hotplugged()))
    }

    fn set_hotplugged(&mut self, hotplugged: u64) {
        let mut config = VmConfig::clone(&self.config);
        config.memory.hotplugged_size = (hotplugged > 0).then_some(hotplugged);
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
