//! Interrupt routes: which event descriptor raises what in the guest.

use std::collections::BTreeMap;
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

/// What a GSI raises.
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

/// The routes of a VM, shared by all who change them, from any thread: each change, of however
/// many routes, is one call to KVM.
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
    /// GSIs that were handed out and given back.
    spare: Vec<u32>,
    /// The first GSI that was never handed out.
    fresh: u32,
    calls: u64,
    /// Changes are collected until [`Held`] is dropped or finished.
    held: bool,
}

/// Routes that are changed and not given to KVM yet: as devices are loaded, one after the other.
#[must_use]
#[derive(Debug)]
pub struct Held(IrqRoutes);

impl Held {
    /// Gives KVM all that was changed, in one call.
    ///
    /// # Errors
    /// When KVM refuses.
    pub fn finish(self) -> Result<(), KvmError> {
        self.give()
    }

    fn give(&self) -> Result<(), KvmError> {
        let mut table = self.0.shared.table.lock();
        if !std::mem::take(&mut table.held) {
            return Ok(());
        }
        self.0.give(&mut table)
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
            spare: Vec::new(),
            fresh: IOAPIC_PINS,
            calls: 0,
            held: false,
        };
        let routes = Self {
            shared: Arc::new(Shared {
                vm,
                table: Mutex::new(table),
            }),
        };
        let mut table = routes.shared.table.lock();
        routes.give(&mut table)?;
        drop(table);
        Ok(routes)
    }

    /// Routes GSIs, or with `None` no longer, all at once.
    ///
    /// # Errors
    /// When KVM refuses; then the old routes are in force.
    pub fn set(&self, changes: &[(u32, Option<Route>)]) -> Result<(), KvmError> {
        let mut table = self.shared.table.lock();
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
        self.give(&mut table).inspect_err(|_| {
            for (gsi, old) in undo.into_iter().rev() {
                match old {
                    Some(route) => table.routes.insert(gsi, route),
                    None => table.routes.remove(&gsi),
                };
            }
        })
    }

    /// Gives vectors of several devices messages (address and data), or takes them away, in one
    /// call to KVM.
    ///
    /// # Errors
    /// When KVM refuses.
    pub fn batch<'a>(
        &self,
        changes: impl IntoIterator<Item = (&'a MsiVectors, (u16, Option<(u64, u32)>))>,
    ) -> Result<(), KvmError> {
        let changes: Vec<_> = changes
            .into_iter()
            .filter_map(|(device, (vector, message))| device.change(vector, message))
            .collect();
        self.set(&changes)
    }

    /// Collects changes, by whomever, until what this returns is finished.
    pub fn hold(&self) -> Held {
        self.shared.table.lock().held = true;
        Held(self.clone())
    }

    /// How often KVM was given the routes.
    #[must_use]
    pub fn calls(&self) -> u64 {
        self.shared.table.lock().calls
    }

    fn give(&self, table: &mut Table) -> Result<(), KvmError> {
        let entries: Vec<_> = table
            .routes
            .iter()
            .map(|(gsi, route)| entry(*gsi, *route))
            .collect();
        let all = KvmIrqRouting::from_entries(&entries).map_err(|_| {
            let invalid = std::io::Error::from(std::io::ErrorKind::InvalidInput);
            KvmError::other("take so many interrupt routes", invalid)
        })?;
        table.calls += 1;
        let given = self.shared.vm.set_gsi_routing(&all);
        given.map_err(KvmError::new("route interrupts"))
    }

    /// Lets `fd` raise this GSI.
    ///
    /// # Errors
    /// When KVM refuses.
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
    /// When KVM refuses.
    pub fn detach(&self, fd: &EventFd, gsi: u32) -> Result<(), KvmError> {
        let attempt = format!("detach an event descriptor from GSI {gsi}");
        self.shared
            .vm
            .unregister_irqfd(fd, gsi)
            .map_err(KvmError::new(attempt))
    }

    /// So many vectors of a device, each with a GSI of its own and no message yet.
    ///
    /// # Errors
    /// When KVM has no more of them.
    pub fn vectors(&self, count: u16) -> Result<MsiVectors, KvmError> {
        let mut vectors = MsiVectors {
            routes: self.clone(),
            vectors: Vec::with_capacity(count.into()),
        };
        for _ in 0..count {
            let fd = EventFd::new(EFD_NONBLOCK)
                .map_err(|error| KvmError::other("make an event descriptor", error))?;
            let gsi = self.take_gsi()?;
            // Given back with the others, also when this attempt fails.
            vectors.vectors.push((gsi, fd));
            if let Some((gsi, fd)) = vectors.vectors.last() {
                self.attach(fd, *gsi)?;
            }
        }
        Ok(vectors)
    }

    fn take_gsi(&self) -> Result<u32, KvmError> {
        let mut table = self.shared.table.lock();
        if let Some(gsi) = table.spare.pop() {
            return Ok(gsi);
        }
        let gsi = table.fresh;
        if gsi as usize >= kvm_bindings::KVM_MAX_IRQ_ROUTES {
            let full = std::io::Error::from(std::io::ErrorKind::StorageFull);
            return Err(KvmError::other("route so many interrupts", full));
        }
        table.fresh += 1;
        Ok(gsi)
    }
}

/// A device's message-signalled interrupts: each vector is an event descriptor that KVM turns into
/// the vector's message. A vector without a message raises nothing; whoever raises keeps count of
/// what a masked vector missed, since KVM does not.
#[derive(Debug)]
pub struct MsiVectors {
    routes: IrqRoutes,
    vectors: Vec<(u32, EventFd)>,
}

impl MsiVectors {
    /// Gives vectors messages (address and data), or takes them away, in one call to KVM. Those
    /// that are not there are ignored.
    ///
    /// # Errors
    /// When KVM refuses.
    pub fn route(
        &self,
        changes: impl IntoIterator<Item = (u16, Option<(u64, u32)>)>,
    ) -> Result<(), KvmError> {
        self.routes
            .batch(changes.into_iter().map(|change| (self, change)))
    }

    fn change(&self, vector: u16, message: Option<(u64, u32)>) -> Option<(u32, Option<Route>)> {
        let (gsi, _) = self.vectors.get(usize::from(vector))?;
        let route = message.map(|(address, data)| Route::Msi { address, data });
        Some((*gsi, route))
    }

    /// Interrupts the guest.
    pub fn raise(&self, vector: u16) {
        if let Some((_, fd)) = self.vectors.get(usize::from(vector)) {
            // It can only be full, of messages that nobody took: one more says nothing new.
            let _ = fd.write(1);
        }
    }
}

impl Drop for MsiVectors {
    fn drop(&mut self) {
        let gone: Vec<_> = self.vectors.iter().map(|(gsi, _)| (*gsi, None)).collect();
        for (gsi, fd) in &self.vectors {
            // One that was never attached, when it failed half-way: there is nothing to end.
            let _ = self.routes.detach(fd, *gsi);
        }
        // A route to which nothing is attached raises nothing, should KVM keep it.
        let _ = self.routes.set(&gone);
        let mut table = self.routes.shared.table.lock();
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
    use crate::kvm::Kvm;

    #[test]
    fn a_change_of_many_routes_is_one_call_and_none_is_none() {
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
        assert_eq!(routes.calls(), before + 2, "and there is no vector 300");
        drop(vectors);
        assert_eq!(routes.calls(), before + 3);
    }

    #[test]
    fn gsis_are_given_back_and_run_out() {
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
        assert!(refused.to_string().contains("so many"), "{refused}");
    }
}
