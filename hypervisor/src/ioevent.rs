//! Doorbells: KVM's ioeventfds, kept in step with the flat view of one address space.

use std::sync::Arc;

use kvm_ioctls::{IoEventAddress, NoDatamatch, VmFd};
use memory::{AddrRange, FlatIoEventFd, ListenerError, MemoryListener, SpaceKind, ViewChange};

/// The memory listener that keeps a VM's ioeventfds of one space.
#[derive(Debug)]
pub struct IoEventFds {
    vm: Arc<VmFd>,
    space: SpaceKind,
}

impl IoEventFds {
    pub(crate) fn new(vm: Arc<VmFd>, space: SpaceKind) -> Self {
        Self { vm, space }
    }

    fn set(&self, doorbell: &FlatIoEventFd, register: bool) -> Result<(), ListenerError> {
        let at = match self.space {
            SpaceKind::Memory => IoEventAddress::Mmio(doorbell.addr),
            SpaceKind::PortIo => IoEventAddress::Pio(doorbell.addr),
        };
        let (vm, fd) = (&self.vm, &*doorbell.fd);
        // KVM takes the width from the type of the value, and a value is what KVM matches; for
        // "any value" of one width it has no word but that of width 0.
        macro_rules! call {
            ($value:expr) => {
                if register {
                    vm.register_ioevent(fd, &at, $value)
                } else {
                    vm.unregister_ioevent(fd, &at, $value)
                }
            };
        }
        let done = match (doorbell.width, doorbell.datamatch) {
            (2, Some(value)) => call!(truncated::<u16>(value)),
            (4, Some(value)) => call!(truncated::<u32>(value)),
            (8, Some(value)) => call!(value),
            (1, Some(value)) => call!(truncated::<u8>(value)),
            _ => call!(NoDatamatch),
        };
        done.map_err(|errno| {
            let verb = if register { "add" } else { "remove" };
            let why = format!("KVM refused to {verb} a doorbell: {errno}");
            match AddrRange::new(doorbell.addr, 1) {
                Some(range) => ListenerError::at(range, why),
                None => ListenerError::new(why),
            }
        })
    }
}

/// The value as a write of this width has it.
fn truncated<T: TryFrom<u64> + Default>(value: u64) -> T {
    let bits = size_of::<T>() * 8;
    T::try_from(value & ((1 << bits) - 1)).unwrap_or_default()
}

impl MemoryListener for IoEventFds {
    fn prepare(&self, _: &ViewChange) -> Result<(), ListenerError> {
        Ok(())
    }

    fn apply(&self, change: &ViewChange) -> Result<(), ListenerError> {
        // Removals first. A doorbell that only changes its descriptor may be in both lists, and KVM
        // refuses a second one at the same address and value with EEXIST.
        change
            .removed_ioeventfds
            .iter()
            .try_for_each(|doorbell| self.set(doorbell, false))?;
        change
            .added_ioeventfds
            .iter()
            .try_for_each(|doorbell| self.set(doorbell, true))
    }
}
