//! The virtio devices of a machine: what a specification asks for, built and plugged in.

use std::collections::BTreeMap;
use std::path::Path;

use memory::Transaction;
use spec::{DeviceNode, VmConfig};
use virtio_devices::rng::Rng;
use virtio_devices::{VirtioDevice, Workers};

use crate::driver::Reporter;
use crate::failure::BuildError;
use crate::pci::{PciHost, Plugged};

/// As Cloud Hypervisor names the one of a VM.
const RNG: &str = "__rng";

/// The devices on a machine's PCI bus.
pub(crate) struct Devices {
    host: PciHost,
    plugged: BTreeMap<String, Plugged>,
}

impl Devices {
    /// All that the specification asks for, as part of a change of the map.
    pub(crate) fn build(
        mut host: PciHost,
        tx: &mut Transaction<'_>,
        config: &VmConfig,
        workers: &Workers,
        reporter: &Reporter,
    ) -> Result<Self, BuildError> {
        let mut plugged = BTreeMap::new();
        for (id, device) in wanted(config, workers)? {
            let device = host.plug(tx, &id, device, reporter)?;
            plugged.insert(id, device);
        }
        Ok(Self { host, plugged })
    }

    /// On return no device reads or writes guest memory. vCPUs are parked.
    pub(crate) fn pause(&self) {
        self.plugged
            .values()
            .for_each(|plugged| plugged.device.pause());
    }

    /// Lets the devices go on.
    pub(crate) fn resume(&self) {
        self.plugged
            .values()
            .for_each(|plugged| plugged.device.resume());
    }

    /// What each device counts.
    pub(crate) fn counters(&self) -> impl Iterator<Item = (&String, Vec<(&'static str, u64)>)> {
        let counted = |(id, plugged): (_, &Plugged)| (id, plugged.device.counters());
        self.plugged.iter().map(counted)
    }

    /// As the API shows them.
    pub(crate) fn tree(&self) -> BTreeMap<String, DeviceNode> {
        let node = |(id, plugged): (&String, &Plugged)| {
            let node = DeviceNode {
                id: id.clone(),
                resources: Vec::new(),
                children: Vec::new(),
                pci_bdf: Some(plugged.bdf.to_string()),
            };
            (id.clone(), node)
        };
        self.plugged.iter().map(node).collect()
    }
}

impl Drop for Devices {
    fn drop(&mut self) {
        // Their tasks run on loops that outlive the machine.
        self.pause();
    }
}

type Named = (String, Box<dyn VirtioDevice>);

/// The devices of a specification, in the order in which they are put on the bus.
fn wanted(config: &VmConfig, workers: &Workers) -> Result<Vec<Named>, BuildError> {
    let name = |given: &Option<String>, default: &str| given.clone().unwrap_or(default.to_owned());
    let mut all: Vec<Named> = Vec::new();
    let rng = Rng::new(Path::new(&config.rng.src), workers.clone())?;
    all.push((name(&config.rng.id, RNG), Box::new(rng)));
    Ok(all)
}
