//! Memory that a running guest gets, and gives back.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use control::{Category, RequestError};
use spec::{HotplugMethod, ResizeResource, VmConfig};

use super::{Driver, Stage};

impl Driver {
    /// Checks a new size of the guest's memory, and returns the bytes of hotplugged memory that make
    /// it up; nothing if the guest has that size already.
    pub(super) fn plan_memory(&self, desired: u64) -> Result<Option<u64>, RequestError> {
        let memory = &self.config.memory;
        let (boot, room) = (memory.size, memory.hotplug_region());
        if desired == boot.saturating_add(memory.hotplugged()) {
            return Ok(None);
        }
        let refused = |code, detail| Err(RequestError::new(Category::Unprocessable, code, detail));
        if room == 0 {
            let detail = match memory.hotplug_method {
                HotplugMethod::Acpi if memory.hotplug_size.is_some() => {
                    "this version does not add memory with `hotplug_method` `Acpi`: create the VM \
                     with `VirtioMem`"
                }
                _ => {
                    "the VM's memory cannot grow: create the VM with `hotplug_size` and \
                     `hotplug_method` `VirtioMem`"
                }
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
        self.check_no_resize(ResizeResource::Memory)?;
        Ok(Some(hotplugged))
    }

    /// Has the guest use so many bytes of hotplugged memory, which [`Driver::plan_memory`] checked.
    pub(super) fn resize_memory(&mut self, hotplugged: u64) {
        let before = self.memory_size();
        self.set_hotplugged(hotplugged);
        let boot = self.config.memory.size;
        if let (Some(before), Stage::On(active)) = (before, &self.stage)
            && let Some(handle) = active.devices().memory()
        {
            handle.resize(hotplugged);
            let to = boot.saturating_add(hotplugged);
            self.begin_resize(ResizeResource::Memory, before, to);
            // The guest may have that already: it has not followed an earlier request.
            self.memory_changed();
        }
    }

    /// The guest has plugged or unplugged memory.
    pub(super) fn memory_changed(&mut self) {
        if let Some(size) = self.memory_size() {
            self.resize_progressed(ResizeResource::Memory, size);
        }
    }

    /// The guest did not complete a resize: what it has is what it should have.
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

    /// Bytes of memory that the guest has, if it can change them.
    fn memory_size(&self) -> Option<u64> {
        let Stage::On(active) = &self.stage else {
            return None;
        };
        let plugged = active.devices().memory()?.plugged().load(Ordering::Acquire);
        Some(self.config.memory.size.saturating_add(plugged))
    }

    fn set_hotplugged(&mut self, hotplugged: u64) {
        let mut config = VmConfig::clone(&self.config);
        config.memory.hotplugged_size = (hotplugged > 0).then_some(hotplugged);
        self.set_config(Arc::new(config));
    }
}
