//! The PCI buses of a machine, one for each segment: where its devices are, and how their BARs and interrupts reach KVM.

use std::sync::{Arc, Weak};

use devices::pci::{
    BarAllocator, BarMap, Bdf, Bus, BusError, ConfigSpace, Endpoint, MsiMessage, MsiTarget,
    place_bar,
};
use devices::{PVPANIC_BAR_LEN, pvpanic};
use hypervisor::{IrqRoutes, MsiVectors};
use memory::{AddrRange, AddressSpace, CommitError, RegionId, Topology, Transaction};
use parking_lot::Mutex;
use virtio_devices::{BAR_LEN, Slot, VirtioDevice, VirtioPci, vectors};

use crate::failure::BuildError;
use crate::guest_event::{GuestEvent, Reporter};

/// A machine's map. vCPU threads take the lock when their guest moves a BAR, and nothing else
/// while they hold it.
pub(crate) type SharedTopology = Arc<Mutex<Topology>>;

/// Resources of the machine for PCI devices.
pub(crate) struct PciHost {
    segments: Vec<Segment>,
    map: Arc<dyn BarMap>,
    space: AddressSpace,
    routes: IrqRoutes,
}

/// A PCI segment.
struct Segment {
    bus: Arc<Bus>,
    window: BarAllocator,
}

/// The place at which a device is plugged in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum At {
    Exactly(Bdf),
    /// The first slot of this segment that is free.
    AnySlot(u16),
}

impl At {
    fn segment(self) -> u16 {
        match self {
            Self::Exactly(bdf) => bdf.segment(),
            Self::AnySlot(segment) => segment,
        }
    }
}

/// A device on the bus.
pub(crate) struct Plugged {
    pub(crate) bdf: Bdf,
    pub(crate) device: Arc<VirtioPci>,
    bar: AddrRange,
}

impl PciHost {
    /// A bus for each segment, of which nothing but the host bridge is taken, and a window for its BARs.
    pub(crate) fn new(
        topology: &SharedTopology,
        space: AddressSpace,
        windows: impl Iterator<Item = AddrRange>,
        routes: IrqRoutes,
    ) -> Self {
        let segment = |(number, window)| Segment {
            bus: Bus::new(number),
            window: BarAllocator::new(window),
        };
        Self {
            segments: (0..).zip(windows).map(segment).collect(),
            map: Arc::new(InTopology(Arc::downgrade(topology))),
            space,
            routes,
        }
    }

    /// Returns the buses, that of segment 0 first.
    pub(crate) fn buses(&self) -> impl Iterator<Item = &Arc<Bus>> {
        self.segments.iter().map(|segment| &segment.bus)
    }

    fn segment(&mut self, number: u16) -> Result<&mut Segment, BuildError> {
        let found = self.segments.get_mut(usize::from(number));
        found.ok_or(BuildError::NoSegment(number))
    }

    /// Returns the place that is meant, if it is free.
    fn find(&mut self, at: At) -> Result<Bdf, BuildError> {
        let bus = &self.segment(at.segment())?.bus;
        match at {
            At::Exactly(bdf) if bus.functions().contains(&bdf) => {
                Err(BusError::Occupied(bdf).into())
            }
            At::Exactly(bdf) => Ok(bdf),
            At::AnySlot(_) => Ok(bus.free_slot()?),
        }
    }

    /// Puts a device at this place, as part of a change of the map.
    ///
    /// # Errors
    /// The place is taken or cannot be used, or there is no room for the BAR. Nothing of the device is left
    /// on the bus or in the window; the caller drops the change of the map.
    pub(crate) fn plug(
        &mut self,
        tx: &mut Transaction<'_>,
        id: &str,
        device: Box<dyn VirtioDevice>,
        at: At,
        reporter: &Reporter,
    ) -> Result<Plugged, BuildError> {
        // Before anything is made for it.
        let bdf = self.find(at)?;
        // Dropped with the device, or here if a later step fails: vectors are returned to KVM by
        // themselves.
        let vectors = self.routes.vectors(vectors(&*device))?;
        let bar = self.segment(bdf.segment())?.window.allocate(BAR_LEN)?;
        let (to, name) = (reporter.clone(), id.to_owned());
        let slot = Slot {
            tx,
            space: self.space.clone(),
            bar,
            map: Arc::clone(&self.map),
            msi: Arc::new(ByRoutes(vectors)),
            report: Box::new(move |event| to.report(GuestEvent::Device(name.clone(), event))),
        };
        let segment = self.segment(bdf.segment())?;
        let device = VirtioPci::new(id, device, slot).inspect_err(|_| segment.window.free(bar))?;
        let function = Arc::clone(&device) as Arc<dyn ConfigSpace>;
        if let Err(error) = segment.bus.attach(bdf, function) {
            drop(device.retire());
            segment.window.free(bar);
            return Err(error.into());
        }
        Ok(Plugged { bdf, device, bar })
    }

    /// Puts a panic notifier at this place, as part of a change of the map. It stays for as long as the
    /// machine.
    pub(crate) fn plug_pvpanic(
        &mut self,
        tx: &mut Transaction<'_>,
        at: At,
        reporter: &Reporter,
    ) -> Result<(Bdf, Arc<Endpoint>), BuildError> {
        let bdf = self.find(at)?;
        let map = Arc::clone(&self.map);
        let segment = self.segment(bdf.segment())?;
        let bar = segment.window.allocate(PVPANIC_BAR_LEN)?;
        let to = reporter.clone();
        let report = move |event| to.report(GuestEvent::Panic(event));
        let endpoint = pvpanic(tx, bar, map, report).inspect_err(|_| segment.window.free(bar))?;
        let endpoint = Arc::new(endpoint);
        let function = Arc::clone(&endpoint) as Arc<dyn ConfigSpace>;
        if let Err(error) = segment.bus.attach(bdf, function) {
            segment.window.free(bar);
            return Err(error.into());
        }
        Ok((bdf, endpoint))
    }

    /// Removes a device from the bus and the map. The guest has ejected it.
    pub(crate) fn unplug(
        &mut self,
        topology: &SharedTopology,
        plugged: Plugged,
    ) -> Result<(), BuildError> {
        let segment = self.segment(plugged.bdf.segment())?;
        // Off the bus first: from here on no new access of a vCPU reaches the device. Then it
        // retires, which waits for accesses in progress. Only then may the map change, since a vCPU
        // that moves a BAR holds the device and waits for the map.
        segment.bus.detach(plugged.bdf);
        let retired = plugged.device.retire();
        topology.lock().transaction(|tx| -> Result<_, BuildError> {
            retired.remove(tx)?;
            Ok(())
        })?;
        // Only if the map has let go of it: two devices must never share an address.
        segment.window.free(plugged.bar);
        Ok(())
    }

    /// Undoes [`Self::plug`] where the change of the map that it was a part of came to nothing.
    pub(crate) fn forget(&mut self, plugged: Plugged) {
        let Ok(segment) = self.segment(plugged.bdf.segment()) else {
            return;
        };
        segment.bus.detach(plugged.bdf);
        drop(plugged.device.retire());
        segment.window.free(plugged.bar);
    }
}

/// Moves BARs in the machine's map, a commit each. The map holds the devices' registers, and so the
/// devices do not hold the map.
struct InTopology(Weak<Mutex<Topology>>);

impl BarMap for InTopology {
    fn place(&self, region: RegionId, at: Option<u64>) {
        // The machine is being taken apart.
        let Some(topology) = self.0.upgrade() else {
            return;
        };
        let mut topology = topology.lock();
        let moved = topology.transaction(|tx| -> Result<(), CommitError> {
            if let Err(error) = place_bar(tx, region, at) {
                tracing::debug!(%error, "a guest moves a BAR to an invalid address");
                // Shown nowhere.
                // Within the same commit: the guest sees the BAR leave its old address, whatever it
                // asked for.
                if let Err(error) = place_bar(tx, region, None) {
                    tracing::debug!(%error, "a BAR no longer exists");
                }
            }
            Ok(())
        });
        if let Err(error) = moved {
            tracing::warn!(%error, "a BAR cannot be moved");
        }
    }
}

/// Interrupts through KVM.
struct ByRoutes(MsiVectors);

impl MsiTarget for ByRoutes {
    fn route(&self, changes: &[(u16, Option<MsiMessage>)]) {
        let changes = changes.iter().map(|(vector, message)| {
            let message = message.map(|message| (message.address, message.data));
            (*vector, message)
        });
        if let Err(error) = self.0.route(changes) {
            tracing::warn!(%error, "a device's interrupts may be lost");
        }
    }

    fn raise(&self, vector: u16) {
        self.0.raise(vector);
    }

    fn take_pending(&self, vector: u16) -> bool {
        self.0.take_pending(vector)
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use devices::event_loop::EventLoop;
    use hypervisor::{Kvm, Vm};
    use memory::SpaceKind;
    use virtio_devices::Workers;
    use virtio_devices::watchdog::Watchdog;

    use super::*;

    /// A bus of a VM whose window has room for one BAR of this length.
    fn host_with_room(bar: u64) -> (Vm, SharedTopology, PciHost) {
        let vm = Kvm::open().unwrap().create_vm().unwrap();
        let topology = Topology::new();
        let space = topology.space(SpaceKind::Memory);
        let topology = Arc::new(Mutex::new(topology));
        let window = AddrRange::new(1 << 32, bar).unwrap();
        let routes = vm.irq_routes().clone();
        let host = PciHost::new(&topology, space, [window].into_iter(), routes);
        (vm, topology, host)
    }

    /// A device that cannot be put on the bus gives its BAR back, so that the window stays whole.
    #[test]
    fn failed_plug_frees_its_bar() {
        let (_vm, topology, mut host) = host_with_room(BAR_LEN);
        let event_loop = EventLoop::start("test").unwrap();
        let workers = Workers::new(vec![event_loop.handle().clone()]).unwrap();
        let reporter = Reporter::new(|_| {});
        let mut plug = |at| {
            let device = Watchdog::new(Duration::from_secs(1), || {}, workers.clone());
            topology
                .lock()
                .transaction(|tx| host.plug(tx, "watchdog", Box::new(device), at, &reporter))
        };
        // Behind a function 0 that is not there.
        let lone = At::Exactly(Bdf::new(3, 1).unwrap());
        for _ in 0..2 {
            let refused = plug(lone).err().unwrap();
            assert!(matches!(refused, BuildError::Bus(_)), "{refused:?}");
        }
        plug(At::AnySlot(0)).unwrap();
        assert!(plug(At::AnySlot(0)).is_err(), "the window is full");
    }

    #[test]
    fn failed_plug_of_panic_notifier_frees_its_bar() {
        let (_vm, topology, mut host) = host_with_room(PVPANIC_BAR_LEN);
        let reporter = Reporter::new(|_| {});
        let mut plug = |at| {
            topology
                .lock()
                .transaction(|tx| host.plug_pvpanic(tx, at, &reporter))
        };
        let lone = At::Exactly(Bdf::new(3, 1).unwrap());
        assert!(plug(lone).is_err());
        plug(At::AnySlot(0)).unwrap();
    }
}
