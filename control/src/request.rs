//! Requests to a driver, with their parameters.

use spec::{
    DiskConfig, FieldProblem, NetConfig, VmConfig, VmRemoveDevice, VmResize, VmResizeDisk,
    VmResizeZone, VsockConfig,
};

use crate::admission::Verb;

/// A request to a driver.
#[derive(Clone, Debug, PartialEq)]
#[expect(missing_docs, reason = "the names are the API's")]
pub enum Request {
    Boot,
    Pause,
    Resume,
    Reboot,
    Shutdown,
    Delete,
    PowerButton,
    Nmi,
    Counters,
    MemoryMap,
    Cpu,
    AddDevice(NewDevice),
    RemoveDevice(VmRemoveDevice),
    Resize(VmResize),
    ResizeZone(VmResizeZone),
    ResizeDisk(VmResizeDisk),
}

impl Request {
    /// Returns the kind of the request.
    #[must_use]
    pub fn verb(&self) -> Verb {
        match self {
            Self::Boot => Verb::Boot,
            Self::Pause => Verb::Pause,
            Self::Resume => Verb::Resume,
            Self::Reboot => Verb::Reboot,
            Self::Shutdown => Verb::Shutdown,
            Self::Delete => Verb::Delete,
            Self::PowerButton => Verb::PowerButton,
            Self::Nmi => Verb::Nmi,
            Self::Counters => Verb::Counters,
            Self::MemoryMap => Verb::MemoryMap,
            Self::Cpu => Verb::Cpu,
            Self::AddDevice(_) => Verb::AddDevice,
            Self::RemoveDevice(_) => Verb::RemoveDevice,
            Self::Resize(_) => Verb::Resize,
            Self::ResizeZone(_) => Verb::ResizeZone,
            Self::ResizeDisk(_) => Verb::ResizeDisk,
        }
    }
}

/// A device that a VM is given while it is there.
#[derive(Clone, Debug, PartialEq)]
pub enum NewDevice {
    /// A disk.
    Disk(Box<DiskConfig>),
    /// A network interface.
    Net(Box<NetConfig>),
    /// A socket between guest and host, of which a VM has one at most.
    Vsock(VsockConfig),
}

impl NewDevice {
    /// The name that it was given.
    #[must_use]
    pub fn id(&self) -> Option<&str> {
        match self {
            Self::Disk(disk) => disk.id.as_deref(),
            Self::Net(net) => net.id.as_deref(),
            Self::Vsock(vsock) => vsock.id.as_deref(),
        }
    }

    /// The slot that it asks for.
    #[must_use]
    pub fn slot(&self) -> Option<u8> {
        match self {
            Self::Disk(disk) => disk.pci_device_id,
            Self::Net(net) => net.pci_device_id,
            Self::Vsock(vsock) => vsock.pci_device_id,
        }
    }

    /// The PCI segment that it asks for.
    #[must_use]
    pub fn segment(&self) -> u16 {
        let segment = match self {
            Self::Disk(disk) => disk.pci_segment,
            Self::Net(net) => net.pci_segment,
            Self::Vsock(vsock) => vsock.pci_segment,
        };
        segment.unwrap_or(0)
    }

    /// Makes up what it was not given: a name that is not `taken`, and an interface's address.
    pub fn fill_in(&mut self, taken: impl Fn(&str) -> bool) {
        let (id, kind) = match self {
            Self::Disk(disk) => (&mut disk.id, "disk"),
            Self::Net(net) => {
                net.give_mac();
                (&mut net.id, "net")
            }
            Self::Vsock(vsock) => (&mut vsock.id, "vsock"),
        };
        if id.is_none() {
            *id = spec::free_name(kind, taken);
        }
    }

    /// All that is wrong with it by itself, and with what it names of the VM's configuration.
    #[must_use]
    pub fn problems(&self, config: &VmConfig) -> Vec<FieldProblem> {
        let mut problems = match self {
            Self::Disk(disk) => disk.problems_in(config),
            Self::Net(net) => net.problems(),
            Self::Vsock(vsock) => vsock.problems(),
        };
        problems.extend(self.id().and_then(|id| spec::check_device_name("", id)));
        problems.extend(config.segment_problem("", self.segment()));
        problems
    }

    /// Makes it part of a configuration, behind the devices of its kind that are there.
    pub fn add_to(self, config: &mut VmConfig) {
        match self {
            Self::Disk(disk) => config.disks.get_or_insert_default().push(*disk),
            Self::Net(net) => config.net.get_or_insert_default().push(*net),
            Self::Vsock(vsock) => config.vsock = Some(vsock),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn generates_missing_mac_once() {
        for (given, name) in [("{}", "_net1"), (r#"{"id":"lan"}"#, "lan")] {
            let mut new = NewDevice::Net(Box::new(spec::parse(given.as_bytes()).unwrap()));
            new.fill_in(|taken| taken == "_net0");
            let once = new.clone();
            new.fill_in(|_| false);
            assert_eq!(new, once);
            let NewDevice::Net(net) = new else { return };
            assert_eq!(net.id.as_deref(), Some(name));
            assert!(net.mac.as_deref().and_then(spec::parse_mac).is_some());
        }
    }
}
