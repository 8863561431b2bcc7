//! Interrupt routes: which event descriptor raises what in the guest.

use std::collections::BTreeMap;
use std::sync::Arc;

use kvm_bindings::{
    KVM_IRQ_ROUTING_IRQCHIP, KVM_IRQ_ROUTING_MSI, KVM_IRQCHIP_IOAPIC, KvmIrqRouting,
    kvm_irq_routing_entry,
};
use kvm_ioctls::VmFd;
use vmm_sys_util::eventfd::EventFd;

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

/// The routes of a VM: changed at will, and given to KVM together, once.
#[derive(Debug)]
pub struct IrqRoutes {
    vm: Arc<VmFd>,
    routes: BTreeMap<u32, Route>,
    changed: bool,
}

impl IrqRoutes {
    pub(crate) fn new(vm: Arc<VmFd>) -> Self {
        let routes = (0..IOAPIC_PINS)
            .map(|pin| (pin, Route::IoApic { pin }))
            .collect();
        Self {
            vm,
            routes,
            changed: true,
        }
    }

    /// Routes a GSI, or with `None` no longer; in force from the next [`IrqRoutes::commit`] on.
    pub fn set(&mut self, gsi: u32, route: Option<Route>) {
        let old = match route {
            Some(route) => self.routes.insert(gsi, route),
            None => self.routes.remove(&gsi),
        };
        self.changed |= old != route;
    }

    /// A GSI that is not routed, past the I/O APIC's pins.
    #[must_use]
    pub fn free_gsi(&self) -> Option<u32> {
        (IOAPIC_PINS..kvm_bindings::KVM_MAX_IRQ_ROUTES.try_into().unwrap_or(4096))
            .find(|gsi| !self.routes.contains_key(gsi))
    }

    /// Gives KVM all routes in one call, if any has changed.
    ///
    /// # Errors
    /// When KVM refuses; then the old ones are in force.
    pub fn commit(&mut self) -> Result<(), KvmError> {
        if !self.changed {
            return Ok(());
        }
        let entries: Vec<_> = self
            .routes
            .iter()
            .map(|(gsi, route)| entry(*gsi, *route))
            .collect();
        let table = KvmIrqRouting::from_entries(&entries).map_err(|_| {
            let invalid = std::io::Error::from(std::io::ErrorKind::InvalidInput);
            KvmError::other("take so many interrupt routes", invalid)
        })?;
        self.vm
            .set_gsi_routing(&table)
            .map_err(KvmError::new("route interrupts"))?;
        self.changed = false;
        Ok(())
    }

    /// Lets `fd` raise this GSI.
    ///
    /// # Errors
    /// When KVM refuses.
    pub fn attach(&self, fd: &EventFd, gsi: u32) -> Result<(), KvmError> {
        let attempt = format!("attach an event descriptor to GSI {gsi}");
        self.vm
            .register_irqfd(fd, gsi)
            .map_err(KvmError::new(attempt))
    }

    /// Ends what [`IrqRoutes::attach`] began.
    ///
    /// # Errors
    /// When KVM refuses.
    pub fn detach(&self, fd: &EventFd, gsi: u32) -> Result<(), KvmError> {
        let attempt = format!("detach an event descriptor from GSI {gsi}");
        self.vm
            .unregister_irqfd(fd, gsi)
            .map_err(KvmError::new(attempt))
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
