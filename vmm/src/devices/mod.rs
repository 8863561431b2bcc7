//! The virtio devices of a machine: opening them, placing them on the PCI bus, plugging and
//! unplugging them.

pub(crate) mod open;
mod pci;
pub(crate) mod slots;

use std::collections::BTreeMap;
use std::fs::File;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use ::devices::event_loop::EventLoop;
use ::devices::pci::{Bdf, Endpoint};
use ::devices::tpm::Emulator;
use memory::Transaction;
use spec::{DeviceNode, DeviceState, VmConfig};
use state::{Load as _, LoadError, Save as _, SaveError, SectionCopy, Store, Writer};
use virtio_devices::DeviceError;
use virtio_devices::block::DiskAccess;
use virtio_devices::mem::MemHandle;

pub(crate) use self::open::{
    ConsoleEnd, DeviceEnds, DeviceHandle, LimiterGroups, MemoryEnd, OpenContext, Opened,
    ResourceOwner,
};
use self::pci::Plugged;
pub(crate) use self::pci::{At, PciHost, SharedTopology};
use crate::arch::x86_64::cpu_model::CpuModel;
use crate::descriptors::Reservation;
use crate::failure::BuildError;
use crate::guest_event::Reporter;

/// A device in its place.
struct Entry {
    plugged: Plugged,
    control: DeviceHandle,
    state: DeviceState,
    /// What it has loaded last, while the machine was not resumed since.
    loaded: Option<SectionCopy>,
    _own_loop: Option<EventLoop>,
    /// Descriptors of a device that was added to the machine.
    _reserved: Vec<Arc<Reservation>>,
}

/// Properties of a machine that its configuration does not hold: those of the machine that it
/// replaces after a reset, or from which its guest migrates.
#[derive(Clone, Debug)]
pub(crate) struct MachineOrigin {
    /// The guest's CPUID; the host's when absent.
    pub(crate) cpu: Option<CpuModel>,
    /// The PCI addresses of devices, by their names. When empty, devices get the addresses that
    /// [`slots::assign`] chooses for a new machine.
    pub(crate) on_bus: BTreeMap<String, Bdf>,
    pub(crate) owner: ResourceOwner,
    /// Postcopy is possible. A device that waits for a missing page blocks its thread, so the
    /// machine gets event loops of its own and other VMs' devices do not wait with it.
    pub(crate) may_wait: bool,
    pub(crate) memory: MemoryOrigin,
    /// The TPM's emulator, which may end when the connection to it is closed.
    pub(crate) tpm: Option<Arc<Emulator>>,
}

/// The place from which a machine gets its memory.
#[derive(Clone, Debug)]
pub(crate) enum MemoryOrigin {
    /// The host, which gives pages of zeros.
    New,
    /// Another process, which gave the memory with its contents, a file for each block: a local
    /// migration.
    Given(Vec<Arc<File>>),
    /// A file of whose content the memory is a private view. Populated first if `prefault` is set.
    View { file: Arc<File>, prefault: bool },
}

impl Default for MachineOrigin {
    fn default() -> Self {
        Self {
            cpu: None,
            on_bus: BTreeMap::new(),
            owner: ResourceOwner::ThisMachine,
            may_wait: false,
            memory: MemoryOrigin::New,
            tpm: None,
        }
    }
}

/// The devices of a machine, opened and not on a bus yet.
pub(crate) struct OpenedDevices {
    all: Vec<Opened>,
    limiters: LimiterGroups,
}

impl OpenedDevices {
    /// Opens all that the specification asks for, which may wait for storage. Most boots that fail do so
    /// here, with an untouched bus and map.
    pub(crate) fn open(
        config: &VmConfig,
        ends: DeviceEnds,
        context: OpenContext<'_>,
    ) -> Result<Self, BuildError> {
        Ok(Self {
            all: open::all(config, ends, context)?,
            limiters: context.limiters.clone(),
        })
    }
}

/// The devices on a machine's PCI buses.
pub(crate) struct Devices {
    host: PciHost,
    entries: BTreeMap<String, Entry>,
    /// For disks that are added later.
    limiters: LimiterGroups,
    /// The panic notifier, which is no virtio device.
    pvpanic: Option<(Bdf, Arc<Endpoint>)>,
}

impl Devices {
    /// Places all devices that the specification asks for, as part of a change of the map.
    pub(crate) fn place_all(
        host: PciHost,
        tx: &mut Transaction<'_>,
        config: &VmConfig,
        opened: OpenedDevices,
        origin: &MachineOrigin,
        reporter: &Reporter,
    ) -> Result<Self, BuildError> {
        let mut devices = Self {
            host,
            entries: BTreeMap::new(),
            limiters: opened.limiters,
            pvpanic: None,
        };
        let opened = opened.all;
        let ids = opened.iter().map(|opened| opened.id.as_str());
        let ids: Vec<_> = ids.chain(config.pvpanic.then_some(spec::PVPANIC)).collect();
        let at = slots::assign(&ids, &origin.on_bus, &config.wanted_places());
        // The last, if there is one: of those that share a slot, the last function.
        let pvpanic_at = at.get(opened.len()).copied();
        let mut all: Vec<_> = at.into_iter().zip(opened).collect();
        // Function 0 of a slot before its others, and those that have a place before those that
        // take any.
        all.sort_by_key(|(at, _)| match at {
            At::Exactly(bdf) => (false, Some(*bdf)),
            At::AnySlot(_) => (true, None),
        });
        for (at, opened) in all {
            devices.plug(tx, opened, at, reporter)?;
        }
        if let Some(at) = pvpanic_at {
            devices.pvpanic = Some(devices.host.plug_pvpanic(tx, at, reporter)?);
        }
        Ok(devices)
    }

    /// Returns the limiters that disks share.
    pub(crate) fn limiters(&self) -> &LimiterGroups {
        &self.limiters
    }

    /// Puts a device at this place, as part of a change of the map.
    pub(crate) fn plug(
        &mut self,
        tx: &mut Transaction<'_>,
        opened: Opened,
        at: At,
        reporter: &Reporter,
    ) -> Result<(), BuildError> {
        let Opened {
            id,
            device,
            control,
            slot: _,
            reserved,
            own_loop,
        } = opened;
        let plugged = self.host.plug(tx, &id, device, at, reporter)?;
        let entry = Entry {
            plugged,
            control,
            state: DeviceState::Present,
            loaded: None,
            _own_loop: own_loop,
            _reserved: reserved,
        };
        self.entries.insert(id, entry);
        Ok(())
    }

    /// Undoes [`Self::plug`] where the change of the map came to nothing.
    pub(crate) fn forget(&mut self, id: &str) {
        if let Some(entry) = self.entries.remove(id) {
            self.host.forget(entry.plugged);
        }
    }

    /// Whether there is a device of this name.
    pub(crate) fn contains(&self, id: &str) -> bool {
        self.entries.contains_key(id)
    }

    /// Returns the control handle of the device of this name.
    pub(crate) fn control(&self, id: &str) -> Option<&DeviceHandle> {
        self.entries.get(id).map(|entry| &entry.control)
    }

    /// Returns the control handles of all devices.
    pub(crate) fn controls(&self) -> impl Iterator<Item = &DeviceHandle> {
        self.entries.values().map(|entry| &entry.control)
    }

    /// Bytes that the guest has given back, as they go.
    pub(crate) fn balloon(&self) -> Option<Arc<AtomicU64>> {
        self.controls().find_map(|control| match control {
            DeviceHandle::Balloon(handle) => Some(Arc::clone(handle.actual())),
            _ => None,
        })
    }

    /// Bytes of hotplugged memory that the guest has, as they come and go: a counter for each device
    /// through which memory grows.
    pub(crate) fn hotplugged(&self) -> impl Iterator<Item = Arc<AtomicU64>> {
        self.controls().filter_map(|control| match control {
            DeviceHandle::Memory(handle) => Some(Arc::clone(handle.plugged())),
            _ => None,
        })
    }

    /// The device through which memory grows, if the machine has one of this name.
    pub(crate) fn memory(&self, id: &str) -> Option<&MemHandle> {
        match self.control(id)? {
            DeviceHandle::Memory(handle) => Some(handle),
            _ => None,
        }
    }

    /// Notes that the guest is asked to let go of a device, and says in which slot it is.
    pub(crate) fn leave(&mut self, id: &str) -> Option<u8> {
        let entry = self.entries.get_mut(id)?;
        // Noted before the guest is asked: it may answer at once.
        entry.state = DeviceState::Leaving;
        Some(entry.plugged.bdf.device())
    }

    /// Slots of segment 0, the only one with hotplug, with a device that the guest was asked to let go of, a
    /// bit each.
    pub(crate) fn leaving_slots(&self) -> u32 {
        let entries = self.entries.values();
        let leaving = entries.filter(|entry| entry.state == DeviceState::Leaving);
        let slots = leaving.map(|entry| entry.plugged.bdf.device());
        slots.fold(0, |slots, slot| {
            slots | 1_u32.checked_shl(slot.into()).unwrap_or(0)
        })
    }

    /// Returns the disks, by their names.
    pub(crate) fn disks(&self) -> Vec<(String, DiskAccess)> {
        let disk = |(id, entry): (&String, &Entry)| match &entry.control {
            DeviceHandle::Disk(handle) => Some((id.clone(), handle.access())),
            _ => None,
        };
        self.entries.iter().filter_map(disk).collect()
    }

    /// Pauses one device: on return no queue of it is served, while the vCPUs may run.
    pub(crate) fn pause_one(&self, id: &str) {
        if let Some(entry) = self.entries.get(id) {
            entry.plugged.device.pause();
        }
    }

    /// Undoes [`Devices::pause_one`].
    pub(crate) fn resume_one(&self, id: &str) {
        if let Some(entry) = self.entries.get(id) {
            entry.plugged.device.resume();
        }
    }

    /// Whether the guest was asked to let go of this device, and has not yet.
    pub(crate) fn is_leaving(&self, id: &str) -> bool {
        let entry = self.entries.get(id);
        entry.is_some_and(|entry| entry.state == DeviceState::Leaving)
    }

    /// A device that the guest was asked to let go of, and has not yet.
    pub(crate) fn leaving(&self) -> Option<&str> {
        let mut all = self.entries.iter();
        let leaving = all.find(|(_, entry)| entry.state == DeviceState::Leaving);
        leaving.map(|(id, _)| id.as_str())
    }

    /// The guest has let go of what is in a slot: if it was asked to, the device goes. Gives its
    /// name.
    pub(crate) fn ejected(
        &mut self,
        slot: u8,
        topology: &SharedTopology,
    ) -> Option<(String, Result<(), BuildError>)> {
        let there = |(_, entry): &(&String, &Entry)| {
            let at = entry.plugged.bdf;
            (at.segment(), at.device()) == (0, slot)
        };
        // Only one: a device that can be ejected has a slot of its own.
        let (id, entry) = self.entries.iter().find(there)?;
        // A guest may write any slot to the register at any time. Unasked, the owner would lose a
        // device, its locks and its place without a word.
        if entry.state != DeviceState::Leaving {
            tracing::debug!(id, "a guest ejects a device without a request");
            return None;
        }
        let id = id.clone();
        let entry = self.entries.remove(&id)?;
        Some((id, self.host.unplug(topology, entry.plugged)))
    }

    /// On return no device reads or writes guest memory. vCPUs are parked.
    pub(crate) fn pause(&self) {
        let all = self.entries.values();
        all.for_each(|entry| entry.plugged.device.pause());
    }

    /// Resumes the devices.
    pub(crate) fn resume(&mut self) {
        for entry in self.entries.values_mut() {
            entry.loaded = None;
            entry.plugged.device.resume();
        }
    }

    /// Returns the counters of each device.
    pub(crate) fn counters(&self) -> impl Iterator<Item = (&String, Vec<(&'static str, u64)>)> {
        let all = self.entries.iter();
        all.map(|(id, entry)| (id, entry.plugged.device.counters()))
    }

    /// Returns the PCI address of a device.
    pub(crate) fn place(&self, id: &str) -> Option<Bdf> {
        self.entries.get(id).map(|entry| entry.plugged.bdf)
    }

    /// Returns the PCI addresses of all devices.
    pub(crate) fn places(&self) -> BTreeMap<String, Bdf> {
        let place = |(id, entry): (&String, &Entry)| (id.clone(), entry.plugged.bdf);
        let pvpanic = self.pvpanic.iter();
        let pvpanic = pvpanic.map(|(bdf, _)| (spec::PVPANIC.to_owned(), *bdf));
        self.entries.iter().map(place).chain(pvpanic).collect()
    }

    /// Returns the PCI address of the device of this name if other devices share its slot.
    pub(crate) fn shared_place(&self, id: &str) -> Option<Bdf> {
        let at = self.place(id)?;
        let mut others = self.places().into_values();
        let is_shared = others.any(|other| other != at && other.first() == at.first());
        is_shared.then_some(at)
    }

    /// Makes durable all that the guest wrote. The devices are paused.
    pub(crate) fn flush(&self) -> Result<(), DeviceError> {
        let mut all = self.entries.values();
        all.try_for_each(|entry| entry.plugged.device.flush())
    }

    /// Each device releases what only one machine may have. They are paused and flushed.
    /// Those named in `kept` keep theirs.
    pub(crate) fn hand_over(&self, kept: &[String]) {
        let all = self.entries.iter().filter(|(id, _)| !kept.contains(id));
        all.for_each(|(_, entry)| entry.plugged.device.hand_over());
    }

    /// Each device takes what only one machine may have. They are paused.
    pub(crate) fn take_over(&self) -> Result<(), DeviceError> {
        let mut all = self.entries.values();
        // On an error some devices have taken theirs: the caller has all release them, or drops the
        // machine.
        all.try_for_each(|entry| entry.plugged.device.take_over())
    }

    /// For devices that were loaded, and resumed: an interrupt too many is better than one too few.
    pub(crate) fn repeat_interrupts(&self) {
        let all = self.entries.values();
        all.for_each(|entry| entry.plugged.device.repeat_interrupts());
    }

    pub(crate) fn save(&self, to: &mut Writer) -> Result<(), SaveError> {
        // The ports, and with them the address register, are of segment 0.
        if let Some(bus) = self.host.buses().next() {
            bus.save(&mut to.scope("pci")?)?;
        }
        for (id, entry) in &self.entries {
            let mut scope = to.scope("devices")?;
            entry.plugged.device.save(&mut scope.child(id)?)?;
        }
        if let Some((_, endpoint)) = &self.pvpanic {
            endpoint.save(&mut to.scope("devices")?.child(spec::PVPANIC)?)?;
        }
        Ok(())
    }

    /// Loads the devices' state within a transaction. The devices are paused. A device whose state is what it
    /// loaded before, in the dry run, has nothing to do: most queues of a machine are idle.
    pub(crate) fn load(
        &mut self,
        from: &mut Store<'_>,
        tx: &mut Transaction<'_>,
    ) -> Result<(), LoadError> {
        if let Some(bus) = self.host.buses().next() {
            (&**bus).load(&mut from.scope("pci")?, &mut ())?;
        }
        for (id, entry) in &mut self.entries {
            let mut scope = from.scope("devices")?;
            let mut scope = scope.child(id)?;
            if let Some(loaded) = &entry.loaded
                && scope.take_same(loaded)
            {
                continue;
            }
            // An error leaves a part of the devices loaded. The caller drops the transaction, and
            // then the machine.
            entry.loaded = Some(scope.copy());
            entry.plugged.device.load(&mut scope, tx)?;
        }
        if let Some((_, endpoint)) = &self.pvpanic {
            let mut scope = from.scope("devices")?;
            endpoint.load(&mut scope.child(spec::PVPANIC)?, tx)?;
        }
        Ok(())
    }

    /// Returns the device tree that the API shows.
    pub(crate) fn tree(&self) -> BTreeMap<String, DeviceNode> {
        let node = |(id, bdf): (String, Bdf)| {
            let entry = self.entries.get(&id);
            let node = DeviceNode {
                id: id.clone(),
                resources: Vec::new(),
                children: Vec::new(),
                pci_bdf: Some(bdf.to_string()),
                state: entry.map_or(DeviceState::Present, |entry| entry.state),
            };
            (id, node)
        };
        self.places().into_iter().map(node).collect()
    }
}

impl Drop for Devices {
    fn drop(&mut self) {
        // Their tasks run on loops that outlive the machine.
        self.pause();
    }
}
