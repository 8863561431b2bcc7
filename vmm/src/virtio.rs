//! The virtio devices of a machine: plugged in, asked for things, and taken out again.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use devices::pci::Bdf;
use memory::Transaction;
use spec::{DeviceNode, DeviceState, VmConfig};
use virtio_devices::Workers;

use crate::driver::Reporter;
use crate::failure::BuildError;
use crate::open::{self, ConsoleEnd, Control, Opened};
use crate::pci::{PciHost, Plugged, SharedTopology};

/// A device in its slot.
struct Entry {
    plugged: Plugged,
    control: Control,
    state: DeviceState,
}

/// The devices on a machine's PCI bus.
pub(crate) struct Devices {
    host: PciHost,
    entries: BTreeMap<String, Entry>,
}

impl Devices {
    /// All that the specification asks for, as part of a change of the map.
    pub(crate) fn build(
        host: PciHost,
        tx: &mut Transaction<'_>,
        config: &VmConfig,
        console: Option<ConsoleEnd>,
        workers: &Workers,
        reporter: &Reporter,
    ) -> Result<Self, BuildError> {
        let mut devices = Self {
            host,
            entries: BTreeMap::new(),
        };
        for opened in open::all(config, console, workers)? {
            devices.plug(tx, opened, reporter)?;
        }
        Ok(devices)
    }

    /// Puts a device in the first free slot, as part of a change of the map.
    pub(crate) fn plug(
        &mut self,
        tx: &mut Transaction<'_>,
        opened: Opened,
        reporter: &Reporter,
    ) -> Result<(), BuildError> {
        let Opened {
            id,
            device,
            control,
        } = opened;
        let plugged = self.host.plug(tx, &id, device, reporter)?;
        let entry = Entry {
            plugged,
            control,
            state: DeviceState::Present,
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

    /// What the device of this name can be asked.
    pub(crate) fn control(&self, id: &str) -> Option<&Control> {
        self.entries.get(id).map(|entry| &entry.control)
    }

    /// What all devices can be asked.
    pub(crate) fn controls(&self) -> impl Iterator<Item = &Control> {
        self.entries.values().map(|entry| &entry.control)
    }

    /// Bytes that the guest has given back, as they go.
    pub(crate) fn balloon(&self) -> Option<Arc<AtomicU64>> {
        self.controls().find_map(|control| match control {
            Control::Balloon(handle) => Some(Arc::clone(handle.actual())),
            _ => None,
        })
    }

    /// Notes that the guest is asked to let go of a device, and says in which slot it is.
    pub(crate) fn leave(&mut self, id: &str) -> Option<u8> {
        let entry = self.entries.get_mut(id)?;
        entry.state = DeviceState::Leaving;
        Some(entry.plugged.bdf.device())
    }

    /// The guest has let go of what is in a slot: if it was asked to, the device goes. Gives its
    /// name.
    pub(crate) fn ejected(
        &mut self,
        slot: u8,
        topology: &SharedTopology,
    ) -> Option<(String, Result<(), BuildError>)> {
        let there = |(_, entry): &(&String, &Entry)| entry.plugged.bdf.device() == slot;
        let (id, entry) = self.entries.iter().find(there)?;
        if entry.state != DeviceState::Leaving {
            tracing::debug!(id, "a guest lets go of a device that nobody wants back");
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

    /// Lets the devices go on.
    pub(crate) fn resume(&self) {
        let all = self.entries.values();
        all.for_each(|entry| entry.plugged.device.resume());
    }

    /// What each device counts.
    pub(crate) fn counters(&self) -> impl Iterator<Item = (&String, Vec<(&'static str, u64)>)> {
        let all = self.entries.iter();
        all.map(|(id, entry)| (id, entry.plugged.device.counters()))
    }

    /// Where a device is.
    pub(crate) fn place(&self, id: &str) -> Option<Bdf> {
        self.entries.get(id).map(|entry| entry.plugged.bdf)
    }

    /// As the API shows them.
    pub(crate) fn tree(&self) -> BTreeMap<String, DeviceNode> {
        let node = |(id, entry): (&String, &Entry)| {
            let node = DeviceNode {
                id: id.clone(),
                resources: Vec::new(),
                children: Vec::new(),
                pci_bdf: Some(entry.plugged.bdf.to_string()),
                state: entry.state,
            };
            (id.clone(), node)
        };
        self.entries.iter().map(node).collect()
    }
}

impl Drop for Devices {
    fn drop(&mut self) {
        // Their tasks run on loops that outlive the machine.
        self.pause();
    }
}
