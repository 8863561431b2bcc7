//! Interrupt routes: which event descriptor raises what in the guest.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use kvm_bindings::{
    KVM_IRQ_ROUTING_IRQCHIP, KVM_IRQ_ROUTING_MSI, KVM_IRQCHIP_IOAPIC, KvmIrqRouting,
    kvm_irq_routing_entry,
};
use kvm_ioctls::VmFd;
use parking_lot::Mutex;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::kvm::KvmError;

/// Pins of the I/O APIC; the GSIs of the same numbers.
const IOAPIC_PINS: u32 = 24;

/// The interrupt that a GSI raises.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Route {
    /// A pin of the I/O APIC.
    IoApic {
        /// 0 to 23.
        pin: u32,
    },
    /// A message-signalled interrupt (PCI 3.0, 6.8.1).
    Msi {
        /// The message's address.
        address: u64,
        /// The message's data.
        data: u32,
    },
}

/// The interrupt routes of a VM. Clones share them, and may be used from any thread. Each change,
/// of however many routes, is one call to KVM.
#[derive(Clone, Debug)]
pub struct IrqRoutes {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    vm: Arc<VmFd>,
    table: Mutex<Table>,
}

#[derive(Debug)]
struct Table {
    routes: BTreeMap<u32, Route>,
    /// Those that KVM was given last.
    given: BTreeMap<u32, Route>,
    /// GSIs that were handed out and given back.
    spare: Vec<u32>,
    /// The first GSI that was never handed out.
    fresh: u32,
    calls: u64,
    /// Changes are collected until [`Held`] is dropped or finished.
    held: bool,
    /// GSIs of vectors whose event descriptors KVM listens to.
    attached: BTreeSet<u32>,
    /// Descriptors to attach once KVM has been given the routes that are held back.
    waiting: BTreeMap<u32, Arc<EventFd>>,
    /// KVM is told no more.
    has_ended: bool,
}

/// Changes that are collected and not given to KVM yet, for instance while devices are loaded one by one.
#[must_use]
#[derive(Debug)]
pub struct Held(IrqRoutes);

impl Held {
    /// Gives KVM all collected changes in one call.
    ///
    /// # Errors
    /// Fails if KVM refuses.
    pub fn finish(self) -> Result<(), KvmError> {
        self.give()
    }

    fn give(&self) -> Result<(), KvmError> {
        let mut table = self.0.shared.table.lock();
        // `finish` consumes `self`, so `drop` runs this a second time and must do nothing.
        if !std::mem::take(&mut table.held) {
            return Ok(());
        }
        self.0.give(&mut table)?;
        // Routes first: KVM injects what a descriptor has counted as soon as it is attached.
        let waiting = std::mem::take(&mut table.waiting);
        let mut vectors = waiting.iter();
        vectors.try_for_each(|(gsi, fd)| self.0.listen(&mut table, *gsi, fd))
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        if let Err(error) = self.give() {
            tracing::warn!(%error, "interrupts may be lost");
        }
    }
}

impl IrqRoutes {
    /// All pins of the I/O APIC, and nothing else.
    pub(crate) fn new(vm: Arc<VmFd>) -> Result<Self, KvmError> {
        let pins = (0..IOAPIC_PINS).map(|pin| (pin, Route::IoApic { pin }));
        let table = Table {
            routes: pins.collect(),
            given: BTreeMap::new(),
            spare: Vec::new(),
            fresh: IOAPIC_PINS,
            calls: 0,
            held: false,
            attached: BTreeSet::new(),
            waiting: BTreeMap::new(),
            has_ended: false,
        };
        let routes = Self {
            shared: Arc::new(Shared {
                vm,
                table: Mutex::new(table),
            }),
        };
        let mut table = routes.shared.table.lock();
        // KVM_CREATE_IRQCHIP has routed the low GSIs to the 8259As too. This call replaces those
        // defaults, so that only the I/O APIC gets the pins' interrupts.
        routes.give(&mut table)?;
        drop(table);
        Ok(routes)
    }

    /// Sets the routes of GSIs, or removes them (`None`), all at once.
    ///
    /// # Errors
    /// Fails if KVM refuses; then the old routes are in force.
    pub fn set(&self, changes: &[(u32, Option<Route>)]) -> Result<(), KvmError> {
        self.change(&mut self.shared.table.lock(), changes)
    }

    fn change(&self, table: &mut Table, changes: &[(u32, Option<Route>)]) -> Result<(), KvmError> {
        let mut undo = Vec::with_capacity(changes.len());
        for (gsi, route) in changes {
            let old = match route {
                Some(route) => table.routes.insert(*gsi, *route),
                None => table.routes.remove(gsi),
            };
            if old != *route {
                undo.push((*gsi, old));
            }
        }
        if undo.is_empty() || table.held {
            return Ok(());
        }
        self.give(table).inspect_err(|_| {
            // Backwards: if a GSI is listed twice, its oldest route is the one to restore.
            for (gsi, old) in undo.into_iter().rev() {
                match old {
                    Some(route) => table.routes.insert(gsi, route),
                    None => table.routes.remove(&gsi),
                };
            }
        })
    }

    /// Sets or clears the messages (address and data) of vectors of several devices, in one
    /// call to KVM for all routes. See [`MsiVectors`] for a vector without a message.
    ///
    /// # Errors
    /// Fails if KVM refuses.
    pub fn batch<'a>(
        &self,
        changes: impl IntoIterator<Item = (&'a MsiVectors, (u16, Option<(u64, u32)>))>,
    ) -> Result<(), KvmError> {
        let mut table = self.shared.table.lock();
        let (mut routes, mut listening) = (Vec::new(), Vec::new());
        for (device, (vector, message)) in changes {
            let Some((gsi, fd)) = device.vectors.get(usize::from(vector)) else {
                continue;
            };
            match message {
                Some((address, data)) => {
                    routes.push((*gsi, Some(Route::Msi { address, data })));
                    listening.push((*gsi, fd));
                }
                // The route stays: with the descriptor detached nothing uses it, and a vector that
                // is unmasked with the same message needs no new one.
                None => self.ignore(&mut table, *gsi, fd)?,
            }
        }
        self.change(&mut table, &routes)?;
        // Only now: KVM injects at once what the descriptors have counted, by the routes in force.
        let mut listening = listening.into_iter();
        listening.try_for_each(|(gsi, fd)| self.listen(&mut table, gsi, fd))
    }

    /// Has KVM raise a vector's GSI for each write to its descriptor, and for those before.
    fn listen(&self, table: &mut Table, gsi: u32, fd: &Arc<EventFd>) -> Result<(), KvmError> {
        if table.held {
            table.waiting.insert(gsi, Arc::clone(fd));
        } else if !table.attached.contains(&gsi) {
            self.attach(fd, gsi)?;
            table.attached.insert(gsi);
        }
        Ok(())
    }

    /// Detaches a vector's descriptor: on return KVM has injected earlier writes, and the descriptor
    /// counts later ones.
    fn ignore(&self, table: &mut Table, gsi: u32, fd: &EventFd) -> Result<(), KvmError> {
        table.waiting.remove(&gsi);
        if table.attached.contains(&gsi) && !table.has_ended {
            self.detach(fd, gsi)?;
            table.attached.remove(&gsi);
        }
        Ok(())
    }

    /// Collects the changes of all clones until the result is finished or dropped.
    pub fn hold(&self) -> Held {
        self.shared.table.lock().held = true;
        Held(self.clone())
    }

    /// Tells KVM nothing more: the guest runs no more, and the VM ends, with its routes. To take the vectors
    /// of hundreds of queues back one by one, KVM waits for a grace period for each.
    pub fn end(&self) {
        self.shared.table.lock().has_ended = true;
    }

    /// How often KVM was given the routes.
    #[must_use]
    pub fn calls(&self) -> u64 {
        self.shared.table.lock().calls
    }

    /// Gives KVM the routes. KVM replaces its whole table, and waits until no CPU uses the old one. So it
    /// gets none that it has: guests mask and unmask vectors often, and a load in the stop of a migration
    /// mostly sets what the dry run has set.
    fn give(&self, table: &mut Table) -> Result<(), KvmError> {
        if table.has_ended || table.given == table.routes {
            return Ok(());
        }
        let entries: Vec<_> = table
            .routes
            .iter()
            .map(|(gsi, route)| entry(*gsi, *route))
            .collect();
        let all = KvmIrqRouting::from_entries(&entries).map_err(|_| {
            let invalid = std::io::Error::from(std::io::ErrorKind::InvalidInput);
            KvmError::other("accept this many interrupt routes", invalid)
        })?;
        table.calls += 1;
        let given = self.shared.vm.set_gsi_routing(&all);
        given.map_err(KvmError::new("route interrupts"))?;
        table.given.clone_from(&table.routes);
        Ok(())
    }

    /// Lets `fd` raise this GSI.
    ///
    /// # Errors
    /// Fails if KVM refuses.
    pub fn attach(&self, fd: &EventFd, gsi: u32) -> Result<(), KvmError> {
        let attempt = format!("attach an event descriptor to GSI {gsi}");
        self.shared
            .vm
            .register_irqfd(fd, gsi)
            .map_err(KvmError::new(attempt))
    }

    /// Ends what [`IrqRoutes::attach`] began.
    ///
    /// # Errors
    /// Fails if KVM refuses.
    pub fn detach(&self, fd: &EventFd, gsi: u32) -> Result<(), KvmError> {
        let attempt = format!("detach an event descriptor from GSI {gsi}");
        self.shared
            .vm
            .unregister_irqfd(fd, gsi)
            .map_err(KvmError::new(attempt))
    }

    /// Allocates `count` vectors for a device, each with a GSI of its own and without a message.
    ///
    /// # Errors
    /// KVM has no free GSI.
    pub fn vectors(&self, count: u16) -> Result<MsiVectors, KvmError> {
        // Built before the loop, so that its `Drop` gives the GSIs back if a later step fails.
        let mut vectors = MsiVectors {
            routes: self.clone(),
            vectors: Vec::with_capacity(count.into()),
        };
        for _ in 0..count {
            let fd = EventFd::new(EFD_NONBLOCK)
                .map_err(|error| KvmError::other("create an event descriptor", error))?;
            vectors.vectors.push((self.take_gsi()?, Arc::new(fd)));
        }
        Ok(vectors)
    }

    fn take_gsi(&self) -> Result<u32, KvmError> {
        let mut table = self.shared.table.lock();
        // Reuse first: KVM bounds the GSI number itself and not only the number of routes, so
        // numbers that only grow would run out after enough hot-plugs.
        if let Some(gsi) = table.spare.pop() {
            return Ok(gsi);
        }
        let gsi = table.fresh;
        if gsi as usize >= kvm_bindings::KVM_MAX_IRQ_ROUTES {
            let full = std::io::Error::from(std::io::ErrorKind::StorageFull);
            return Err(KvmError::other("route this many interrupts", full));
        }
        table.fresh += 1;
        Ok(gsi)
    }
}

/// The message-signalled interrupts of a device. Each vector is an event descriptor that KVM turns
/// into the vector's message.
///
/// KVM listens to the descriptor only while the vector has a message. Without one (the guest has
/// masked the vector) the descriptor counts: when the vector gets a message again KVM finds the
/// count and injects the message; until then [`MsiVectors::take_pending`] reports the count.
/// No interrupt can be lost, whichever thread, or the kernel, writes to the descriptor.
#[derive(Debug)]
pub struct MsiVectors {
    routes: IrqRoutes,
    vectors: Vec<(u32, Arc<EventFd>)>,
}

impl MsiVectors {
    /// Sets or clears the messages (address and data) of vectors, in one call to KVM. Vectors
    /// that the device does not have are ignored.
    ///
    /// # Errors
    /// Fails if KVM refuses.
    pub fn route(
        &self,
        changes: impl IntoIterator<Item = (u16, Option<(u64, u32)>)>,
    ) -> Result<(), KvmError> {
        self.routes
            .batch(changes.into_iter().map(|change| (self, change)))
    }

    /// Interrupts the guest: now, or when the vector gets a message.
    pub fn raise(&self, vector: u16) {
        if let Some((_, fd)) = self.vectors.get(usize::from(vector)) {
            // A write fails only if the counter is full: one more says nothing new.
            let _ = fd.write(1);
        }
    }

    /// Returns whether a vector without a message was raised since it lost the message, and forgets
    /// that it was. False for a vector that has a message: KVM has taken all.
    #[must_use]
    pub fn take_pending(&self, vector: u16) -> bool {
        let Some((gsi, fd)) = self.vectors.get(usize::from(vector)) else {
            return false;
        };
        // Locked, so that KVM is not made to listen meanwhile.
        let table = self.routes.shared.table.lock();
        !table.attached.contains(gsi) && !table.waiting.contains_key(gsi) && fd.read().is_ok()
    }
}

impl Drop for MsiVectors {
    fn drop(&mut self) {
        let gone: Vec<_> = self.vectors.iter().map(|(gsi, _)| (*gsi, None)).collect();
        let mut table = self.routes.shared.table.lock();
        for (gsi, fd) in &self.vectors {
            // A descriptor that KVM does not let go of is closed with the last reference.
            let _ = self.routes.ignore(&mut table, *gsi, fd);
            // Also if KVM refused: the next owner of this GSI must be able to attach.
            table.attached.remove(gsi);
        }
        // A route to which nothing is attached raises nothing, should KVM keep it.
        let _ = self.routes.change(&mut table, &gone);
        table.spare.extend(gone.iter().map(|(gsi, _)| *gsi));
    }
}

fn entry(gsi: u32, route: Route) -> kvm_irq_routing_entry {
    let mut entry = kvm_irq_routing_entry {
        gsi,
        ..Default::default()
    };
    match route {
        Route::IoApic { pin } => {
            entry.type_ = KVM_IRQ_ROUTING_IRQCHIP;
            entry.u.irqchip.irqchip = KVM_IRQCHIP_IOAPIC;
            entry.u.irqchip.pin = pin;
        }
        Route::Msi { address, data } => {
            entry.type_ = KVM_IRQ_ROUTING_MSI;
            entry.u.msi.address_lo = (address & u64::from(u32::MAX)) as u32;
            entry.u.msi.address_hi = (address >> 32) as u32;
            entry.u.msi.data = data;
        }
    }
    entry
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use crate::kvm::Kvm;
    use crate::vcpu::Vcpu;

    const VECTOR: u8 = 0x41;
    const MESSAGE: (u64, u32) = (0xfee0_0000, VECTOR as u32);

    /// Offsets of local APIC registers (SDM, 3A, table 12-1).
    const SPURIOUS: usize = 0xf0;
    const REQUESTS: usize = 0x200;

    /// Whether the vector waits in the local APIC, where it is forgotten.
    fn take_request(vcpu: &Vcpu) -> bool {
        let mut lapic = vcpu.lapic().unwrap();
        let byte = REQUESTS + usize::from(VECTOR) / 32 * 16 + usize::from(VECTOR) % 32 / 8;
        let bit = 1 << (VECTOR % 8);
        let is_there = lapic.regs[byte] & bit != 0;
        lapic.regs[byte] &= !bit;
        vcpu.set_lapic(&lapic).unwrap();
        is_there
    }

    /// KVM may inject on a kernel thread.
    fn wait_for_request(vcpu: &Vcpu, what: &str) {
        let from = Instant::now();
        while !take_request(vcpu) {
            assert!(from.elapsed() < Duration::from_secs(10), "{what}");
            std::thread::yield_now();
        }
    }

    /// Writes come from a device on another thread, or from the kernel, at any time.
    #[test]
    fn masked_vector_keeps_its_interrupt() {
        let vm = Kvm::open().unwrap().create_vm().unwrap();
        let vcpu = vm.create_vcpu(0, 0).unwrap();
        let mut lapic = vcpu.lapic().unwrap();
        lapic.regs[SPURIOUS] = -1;
        lapic.regs[SPURIOUS + 1] = 1;
        vcpu.set_lapic(&lapic).unwrap();
        let routes = vm.irq_routes();
        let vectors = routes.vectors(1).unwrap();
        vectors.raise(0);
        vectors.route([(0, Some(MESSAGE))]).unwrap();
        wait_for_request(&vcpu, "raised before there was a message");
        vectors.raise(0);
        wait_for_request(&vcpu, "raised with a message");
        vectors.route([(0, None)]).unwrap();
        assert!(!vectors.take_pending(0), "KVM had both");
        vectors.raise(0);
        vectors.raise(0);
        assert!(!take_request(&vcpu), "it is masked");
        vectors.route([(0, Some(MESSAGE))]).unwrap();
        wait_for_request(&vcpu, "raised while it was masked");
        // Routes that are held back: a device that is loaded.
        vectors.route([(0, None)]).unwrap();
        let held = routes.hold();
        vectors.route([(0, Some((0xfee0_0000, 0x42)))]).unwrap();
        vectors.route([(0, Some(MESSAGE))]).unwrap();
        vectors.raise(0);
        assert!(!take_request(&vcpu), "KVM does not know the message");
        held.finish().unwrap();
        wait_for_request(&vcpu, "raised while routes were held back");
        vectors.route([(0, None)]).unwrap();
        vectors.raise(0);
        assert!(vectors.take_pending(0) && !vectors.take_pending(0));
        vectors.route([(0, Some(MESSAGE))]).unwrap();
        assert!(!take_request(&vcpu), "it was taken back");
    }

    #[test]
    fn routes_change_in_one_call() {
        let vm = Kvm::open().unwrap().create_vm().unwrap();
        let routes = vm.irq_routes();
        let before = routes.calls();
        let vectors = routes.vectors(300).unwrap();
        assert_eq!(routes.calls(), before, "vectors have no messages at first");
        let message = |vector: u16| (0xfee0_0000, u32::from(vector % 200) + 32);
        let all = || (0..300).map(|vector| (vector, Some(message(vector))));
        vectors.route(all()).unwrap();
        assert_eq!(routes.calls(), before + 1);
        vectors.route(all()).unwrap();
        assert_eq!(routes.calls(), before + 1, "nothing changed");
        vectors.route([(7, None), (300, Some((1, 2)))]).unwrap();
        vectors.route([(7, Some(message(7)))]).unwrap();
        assert_eq!(routes.calls(), before + 1, "a mask changes no route");
        vectors.route([(7, None)]).unwrap();
        vectors.route([(7, Some(message(8)))]).unwrap();
        assert_eq!(routes.calls(), before + 2);
        drop(vectors);
        assert_eq!(routes.calls(), before + 3);
    }

    /// A load in the stop of a migration sets again what the dry run has set.
    #[test]
    fn held_routes_that_stay_cost_no_call() {
        let vm = Kvm::open().unwrap().create_vm().unwrap();
        let routes = vm.irq_routes();
        let vectors = routes.vectors(2).unwrap();
        let other = (MESSAGE.0, MESSAGE.1 + 1);
        let load = |second| {
            let held = routes.hold();
            vectors.route([(0, Some(other)), (1, Some(other))]).unwrap();
            vectors
                .route([(0, Some(MESSAGE)), (1, Some(second))])
                .unwrap();
            held.finish().unwrap();
            routes.calls()
        };
        let calls = load(MESSAGE);
        assert_eq!(load(MESSAGE), calls);
        assert_eq!(load(other), calls + 1);
        assert_eq!(load(other), calls + 1);
    }

    #[test]
    fn vm_that_ends_takes_no_vector_back() {
        let vm = Kvm::open().unwrap().create_vm().unwrap();
        let routes = vm.irq_routes();
        let vectors = routes.vectors(2).unwrap();
        vectors.route([(0, Some(MESSAGE))]).unwrap();
        let calls = routes.calls();
        routes.end();
        drop(vectors);
        assert_eq!(routes.calls(), calls);
    }

    #[test]
    fn gsis_are_reused_and_limited() {
        let vm = Kvm::open().unwrap().create_vm().unwrap();
        let routes = vm.irq_routes();
        for _ in 0..100 {
            let vectors = routes.vectors(100).unwrap();
            vectors.route([(99, Some((0xfee0_0000, 33)))]).unwrap();
        }
        let mut held = Vec::new();
        let refused = loop {
            match routes.vectors(500) {
                Ok(vectors) => held.push(vectors),
                Err(refused) => break refused,
            }
        };
        assert_eq!(held.len(), 8, "of 4096, 24 are pins");
        assert!(refused.to_string().contains("this many"), "{refused}");
    }
}
