//! Virtio over PCI (virtio 1.3, 4.1): modern devices only.
//!
//! One BAR holds all structures, each on a page of its own:
//!
//! ```text
//!   0x0000 common configuration    0x3000 doorbells, four bytes apart
//!   0x1000 ISR status              0x4000 MSI-X table
//!   0x2000 device configuration    0x7000 MSI-X pending bits
//! ```

use std::fmt;
use std::sync::Arc;

use ::memory::{
    AddrRange, AddressSpace, DeviceOps, IoEventFd, PAGE_SIZE as PAGE, RegionId, TopologyError,
    Transaction,
};
use ::state::{LoadError, LoadScope, Save, SaveError, Scope};
use devices::pci::{
    BarError, BarMap, BarRequest, ConfigSpace, Endpoint, EndpointBuilder, Identity, MsiTarget,
    Msix, place_bar,
};

use super::function::{
    CommonRegisters, DOORBELL_STRIDE, DeviceRegisters, Doorbells, IsrRegister, VirtioFunction,
};
use super::negotiation;
use super::{Interrupts, Transport, TransportEvent};
use crate::device::{DeviceError, DeviceId, VirtioDevice};
use crate::limits::MAX_QUEUES;

/// Virtio's vendor id, and the id of its devices of kind zero (4.1.2).
const VENDOR: u16 = 0x1af4;
const FIRST_DEVICE: u16 = 0x1040;

/// Bytes of the BAR.
pub const BAR_LEN: u64 = 0x8000;
const BAR: u8 = 0;
const COMMON: u64 = 0;
const ISR: u64 = PAGE;
const DEVICE: u64 = 2 * PAGE;
const NOTIFY: u64 = 3 * PAGE;
const NOTIFY_LEN: u64 = MAX_QUEUES as u64 * DOORBELL_STRIDE;
const TABLE: u64 = 4 * PAGE;
const PENDING: u64 = 7 * PAGE;

/// The capabilities' `cfg_type` (4.1.4).
const CFG_COMMON: u8 = 1;
const CFG_NOTIFY: u8 = 2;
const CFG_ISR: u8 = 3;
const CFG_DEVICE: u8 = 4;
const CFG_PCI: u8 = 5;
/// "Vendor specific" (PCI 3.0, appendix H).
const VENDOR_CAPABILITY: u8 = 9;

/// A device cannot be put together.
#[derive(Debug, thiserror::Error)]
pub enum VirtioPciError {
    /// The host refused something.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// Its BAR cannot be.
    #[error(transparent)]
    Bar(#[from] BarError),
    /// Its registers cannot be in the map.
    #[error(transparent)]
    Topology(#[from] TopologyError),
    /// The capabilities do not fit into configuration space.
    #[error("the capabilities do not fit in configuration space")]
    Capabilities,
}

/// The machine's resources for a device.
pub struct Slot<'a, 'b> {
    /// The change of the map of which the device is a part.
    pub tx: &'a mut Transaction<'b>,
    /// The guest's memory.
    pub space: AddressSpace,
    /// The first address of the BAR.
    pub bar: AddrRange,
    /// Shows its BAR where the guest wants it.
    pub map: Arc<dyn BarMap>,
    /// Delivers its interrupts: as many vectors as [`vectors`] says.
    pub msi: Arc<dyn MsiTarget>,
    /// Receives the device's events.
    pub report: Box<dyn Fn(TransportEvent) + Send + Sync>,
}

/// How many MSI-X vectors a device wants: one for each queue, and one for its configuration.
#[must_use]
pub fn vectors(device: &dyn VirtioDevice) -> u16 {
    u16::try_from(device.queue_sizes().len().min(MAX_QUEUES) + 1).unwrap_or(1)
}

/// A virtio device on the PCI bus.
pub struct VirtioPci {
    function: Arc<VirtioFunction>,
    endpoint: Endpoint,
    /// Offset of the PCI configuration access capability (virtio 1.3, 4.1.4.9).
    window: usize,
    /// The regions of the BAR, itself last.
    regions: Vec<RegionId>,
    structures: Vec<(AddrRange, Arc<dyn DeviceOps>)>,
}

/// Interrupts by MSI-X, of an endpoint that is still being put together.
struct ByMsix(std::sync::OnceLock<Arc<Msix>>);

impl Interrupts for Arc<ByMsix> {
    fn raise(&self, vector: u16) {
        if let Some(msix) = self.0.get() {
            msix.raise(vector);
        }
    }
}

impl VirtioPci {
    /// Puts the device behind the registers of a PCI function. Where it is on the bus is the
    /// caller's to say.
    ///
    /// # Errors
    /// Fails if the host or the map refuses a part of it.
    pub fn new(
        label: &str,
        device: Box<dyn VirtioDevice>,
        slot: Slot<'_, '_>,
    ) -> Result<Arc<Self>, VirtioPciError> {
        let vectors = vectors(&*device);
        let id = device.id();
        let interrupts = Arc::new(ByMsix(std::sync::OnceLock::new()));
        let transport = Transport::new(Box::new(Arc::clone(&interrupts)), slot.report);
        let function = VirtioFunction::new(device, Arc::new(transport), slot.space, vectors)?;
        let function = Arc::new(function);

        let bar = slot.tx.container((label, id.name()), BAR_LEN)?;
        let mut builder = EndpointBuilder::new(identity(id));
        let window = capabilities(&mut builder).ok_or(VirtioPciError::Capabilities)?;
        let offsets = (TABLE as u32, PENDING as u32);
        let msix = builder
            .msix(vectors, BAR, offsets, slot.msi)
            .ok_or(VirtioPciError::Capabilities)?;
        builder.bar(&BarRequest {
            index: BAR,
            region: bar,
            size: BAR_LEN,
            address: slot.bar.first(),
            wide: true,
            prefetchable: false,
        })?;
        let structures = structures(&function, &msix);
        let mut regions = Vec::new();
        for (name, range, ops) in &structures {
            let len = range.len().unwrap_or(PAGE);
            let region = slot.tx.device((*name, label), len, Arc::clone(ops))?;
            // On an error the caller drops the transaction, which undoes all that was made in it.
            slot.tx.place(region, bar, range.first(), 0)?;
            if range.first() == NOTIFY {
                for (kick, at) in function.kicks().iter().zip((0..).step_by(4)) {
                    let doorbell = IoEventFd {
                        offset: at,
                        width: 2,
                        // Each queue has an address of its own, so the value need not be compared
                        // (4.1.4.4).
                        datamatch: None,
                        fd: Arc::clone(kick),
                    };
                    slot.tx.add_ioeventfd(region, doorbell)?;
                }
            }
            regions.push(region);
        }
        regions.push(bar);
        // It is set only here.
        let _ = interrupts.0.set(msix);
        Ok(Arc::new(Self {
            function,
            endpoint: builder.build(slot.map),
            window,
            regions,
            structures: structures
                .into_iter()
                .map(|(_, range, ops)| (range, ops))
                .collect(),
        }))
    }

    /// Returns the device's kind.
    #[must_use]
    pub fn id(&self) -> DeviceId {
        self.function.id()
    }

    /// Pauses the device: on return it has nothing in flight and reads no guest memory. The vCPUs may
    /// run: the doorbells keep what the guest asks for, and an access to other registers waits until
    /// the queues have stopped.
    pub fn pause(&self) {
        self.function.pause();
    }

    /// Resumes the device. Its rings are looked up now: for a device that was loaded, this comes after the
    /// commit of the load.
    pub fn resume(&self) {
        self.function.resume();
    }

    /// Resets the device, as after power-on.
    pub fn reset(&self) {
        self.function.reset();
        self.endpoint.reset();
        self.follow_bus_master();
    }

    fn follow_bus_master(&self) {
        self.function
            .follow_bus_master(|| self.endpoint.is_bus_master());
    }

    /// Makes durable all that the guest wrote. The device is paused.
    ///
    /// # Errors
    /// Fails if the host cannot write.
    pub fn flush(&self) -> Result<(), DeviceError> {
        self.function.flush()
    }

    /// Releases what only one machine may have at a time: the guest is given to another. The device is
    /// paused and flushed.
    pub fn hand_over(&self) {
        self.function.hand_over();
    }

    /// Acquires exclusive host resources. The device is paused.
    ///
    /// # Errors
    /// Another process holds one.
    pub fn take_over(&self) -> Result<(), DeviceError> {
        self.function.take_over()
    }

    /// Interrupts the driver for each queue and for its configuration, whether there is news or not: for
    /// a device that was loaded, and resumed.
    pub fn repeat_interrupts(&self) {
        self.function.repeat_interrupts();
    }

    /// Returns the device's counters.
    #[must_use]
    pub fn counters(&self) -> Vec<(&'static str, u64)> {
        self.function.counters()
    }

    /// The device goes: on return it has nothing in flight, and nothing that the guest does makes
    /// it start again. The caller takes it off the bus before, and from the map after.
    pub fn retire(self: Arc<Self>) -> Retired {
        // The function first: a vCPU inside a register access finishes, or finds the device gone.
        // Then no BAR moves any more, and the caller may change the map.
        self.function.retire();
        Retired {
            shown: self.endpoint.withdraw(),
            regions: self.regions.clone(),
        }
    }

    /// Loads saved state: registers now, queues at [`VirtioPci::resume`]. BARs move through `tx`.
    ///
    /// # Errors
    /// The state belongs to another device, or is invalid.
    pub fn load(
        &self,
        from: &mut LoadScope<'_, '_>,
        tx: &mut Transaction<'_>,
    ) -> Result<(), LoadError> {
        self.endpoint.load(&mut from.child("pci")?, tx)?;
        let is_old = self.function.load(&mut from.child("virtio")?)?;
        // A guest that was saved by a version which ignored the bit may run without it, and must keep
        // working.
        if is_old && !self.endpoint.is_bus_master() {
            self.endpoint.assume_bus_master();
        }
        // After the write took effect, and without the lock of the registers: stopping queues may
        // wait for a task that reads this function's configuration.
        self.follow_bus_master();
        Ok(())
    }

    /// An access through configuration space (4.1.4.9): offset and length are in the capability.
    fn through_window(&self, data: Access<'_>) {
        let mut register = [0; 4];
        let mut get = |at: usize| {
            self.endpoint.read(self.window + at, &mut register);
            u32::from_le_bytes(register)
        };
        let (bar, offset, len) = (get(4) & 0xff, u64::from(get(8)), get(12));
        // The guest wrote all three fields. 4.1.4.9 allows aligned accesses of 1, 2 or 4 bytes;
        // anything else is ignored.
        let fits = matches!(len, 1 | 2 | 4) && offset.is_multiple_of(u64::from(len));
        let Some(range) = AddrRange::new(offset, u64::from(len)) else {
            return;
        };
        // A structure must hold the whole access, so the sum cannot reach another one or wrap.
        let found = self.structures.iter().find(|(at, _)| at.covers(range));
        let Some((at, ops)) = found.filter(|_| fits && bar == u32::from(BAR)) else {
            return;
        };
        let (offset, len) = (offset - at.first(), len as usize);
        match data {
            Access::Read(data) => {
                let mut wide = [0; 4];
                ops.read(offset, &mut wide[..len]);
                let given = data.len().min(4);
                data[..given].copy_from_slice(&wide[..given]);
            }
            Access::Write(data) => {
                if let Some(data) = data.get(..len) {
                    ops.write(offset, data);
                }
            }
        }
    }

    fn is_window(&self, at: usize) -> bool {
        at == self.window + WINDOW_DATA
    }
}

/// The rest of a device that was retired.
#[must_use]
pub struct Retired {
    shown: Vec<RegionId>,
    regions: Vec<RegionId>,
}

impl Retired {
    /// Takes the device from the map.
    ///
    /// # Errors
    /// Fails if it is not in this map.
    pub fn remove(self, tx: &mut Transaction<'_>) -> Result<(), TopologyError> {
        // The BAR leaves the address space before its parts are destroyed.
        for region in self.shown {
            place_bar(tx, region, None)?;
        }
        let bar = self.regions.last();
        for region in self.regions.iter().filter(|region| Some(*region) != bar) {
            tx.unplace(*region)?;
            tx.destroy(*region)?;
        }
        bar.map_or(Ok(()), |bar| tx.destroy(*bar))
    }
}

/// Offset of the data in the window's capability.
const WINDOW_DATA: usize = 16;

enum Access<'a> {
    Read(&'a mut [u8]),
    Write(&'a [u8]),
}

impl ConfigSpace for VirtioPci {
    fn read(&self, at: usize, data: &mut [u8]) {
        self.endpoint.read(at, data);
        if self.is_window(at) {
            self.through_window(Access::Read(data));
        }
    }

    fn write(&self, at: usize, data: &[u8]) {
        self.endpoint.write(at, data);
        self.follow_bus_master();
        if self.is_window(at) {
            self.through_window(Access::Write(data));
        }
    }
}

impl Save for VirtioPci {
    fn save(&self, to: &mut Scope<'_>) -> Result<(), SaveError> {
        self.endpoint.save(&mut to.child("pci")?)?;
        let assumed = self.endpoint.assumes_bus_master();
        self.function.save(&mut to.child("virtio")?, assumed)
    }
}

impl fmt::Debug for VirtioPci {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "VirtioPci({:?})", self.id())
    }
}

fn identity(id: DeviceId) -> Identity {
    // PCI Code and ID Assignment 1.11; for the others, "no class".
    let class = match id {
        DeviceId::NET => 0x02_00_00,
        DeviceId::BLOCK => 0x01_80_00,
        DeviceId::CONSOLE => 0x07_80_00,
        _ => 0xff_00_00,
    };
    let device = FIRST_DEVICE.saturating_add(id.0);
    Identity {
        vendor: VENDOR,
        device,
        // 4.1.2.1: a modern device has a revision of at least 1.
        revision: 1,
        class,
        subsystem: (VENDOR, device),
    }
}

/// Adds the capabilities by which a driver finds the structures, and gives the place of the one
/// that is a window to the BAR.
fn capabilities(builder: &mut EndpointBuilder) -> Option<usize> {
    let at = |offset: u64, len: u64| (offset as u32, len as u32);
    let structures = [
        (CFG_COMMON, at(COMMON, negotiation::LEN as u64), None),
        (
            CFG_NOTIFY,
            at(NOTIFY, NOTIFY_LEN),
            Some(DOORBELL_STRIDE as u32),
        ),
        (CFG_ISR, at(ISR, 4), None),
        (CFG_DEVICE, at(DEVICE, PAGE), None),
    ];
    for (kind, (offset, len), extra) in structures {
        let body = structure(kind, BAR, offset, len, extra);
        builder.capability(VENDOR_CAPABILITY, &body, &[])?;
    }
    let window = structure(CFG_PCI, 0, 0, 0, Some(0));
    // Bar, offset, length and data are the driver's to write; cfg_type, id and padding are not.
    let mut writable = [0xff; 18];
    writable[..2].fill(0);
    writable[3..6].fill(0);
    builder.capability(VENDOR_CAPABILITY, &window, &writable)
}

/// `virtio_pci_cap` behind its first two bytes (4.1.4).
fn structure(kind: u8, bar: u8, offset: u32, len: u32, extra: Option<u32>) -> Vec<u8> {
    let whole = if extra.is_some() { 20 } else { 16 };
    let mut body = vec![whole, kind, bar, 0, 0, 0];
    body.extend(offset.to_le_bytes());
    body.extend(len.to_le_bytes());
    body.extend(extra.iter().flat_map(|extra| extra.to_le_bytes()));
    body
}

type Structure = (&'static str, AddrRange, Arc<dyn DeviceOps>);

/// Returns the layout of the BAR.
fn structures(function: &Arc<VirtioFunction>, msix: &Arc<Msix>) -> Vec<Structure> {
    let part = |name, first: u64, len: u64, ops: Arc<dyn DeviceOps>| {
        AddrRange::new(first, len).map(|range| (name, range, ops))
    };
    let table = u64::from(msix.count()) * 16;
    let pending = u64::from(msix.count()).div_ceil(64) * 8;
    let of = || Arc::clone(function);
    let common = negotiation::LEN as u64;
    [
        part("common", COMMON, common, Arc::new(CommonRegisters(of()))),
        part("isr", ISR, 4, Arc::new(IsrRegister(of()))),
        part("device", DEVICE, PAGE, Arc::new(DeviceRegisters(of()))),
        part("notify", NOTIFY, NOTIFY_LEN, Arc::new(Doorbells(of()))),
        part("msix-table", TABLE, table, Arc::new(msix.table())),
        part("msix-pba", PENDING, pending, Arc::new(msix.pba())),
    ]
    .into_iter()
    .flatten()
    .collect()
}
