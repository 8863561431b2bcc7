//! A VM of KVM that is made before it is needed.
//!
//! KVM gives a new VM its interrupt controllers and interval timer behind grace periods of the
//! kernel (SRCU) that last some milliseconds. It does not wait for their end; but the first memslot
//! does, and with it each boot and restore. To a VM that is a little older memory is given in 0.2 ms.

use std::sync::Arc;

use hypervisor::{Kvm, KvmError, Vm};
use parking_lot::Mutex;

use super::background::Background;

/// Makes VMs, and keeps one ready.
pub(crate) struct SpareVm {
    kvm: Arc<Kvm>,
    background: Background,
    spare: Arc<Mutex<Spare>>,
}

enum Spare {
    None,
    BeingMade,
    Ready(Vm),
}

impl SpareVm {
    /// Has the first VM made on another thread.
    pub(crate) fn new(kvm: Arc<Kvm>, background: &Background) -> Self {
        let spare = Self {
            kvm,
            background: background.clone(),
            spare: Arc::new(Mutex::new(Spare::None)),
        };
        spare.take_ready();
        spare
    }

    /// Returns the VM that is ready, or makes one. Has the next one made on another thread.
    ///
    /// # Errors
    /// KVM refuses.
    pub(crate) fn take(&self) -> Result<Vm, KvmError> {
        let Some(vm) = self.take_ready() else {
            return self.kvm.create_vm();
        };
        // It counts from the creation, and a guest expects the time since its start.
        vm.set_kvmclock(0)?;
        Ok(vm)
    }

    fn take_ready(&self) -> Option<Vm> {
        let mut spare = self.spare.lock();
        // A boot does not wait for the other thread: making one here takes as long.
        if matches!(*spare, Spare::BeingMade) {
            return None;
        }
        let was = std::mem::replace(&mut *spare, Spare::BeingMade);
        drop(spare);
        let (kvm, spare) = (Arc::clone(&self.kvm), Arc::clone(&self.spare));
        self.background.run(move || {
            let made = kvm.create_vm();
            *spare.lock() = match made {
                Ok(vm) => Spare::Ready(vm),
                Err(error) => {
                    // The next boot gets the error, if it persists.
                    tracing::debug!(%error, "no spare VM");
                    Spare::None
                }
            };
        });
        match was {
            Spare::Ready(vm) => Some(vm),
            Spare::None | Spare::BeingMade => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn spare_vm_is_taken_once_and_replaced() {
        let background = Background::start().unwrap();
        let spare = SpareVm::new(Arc::new(Kvm::open().unwrap()), &background);
        for _ in 0..3 {
            assert!(background.wait(Duration::from_secs(60)));
            assert!(matches!(*spare.spare.lock(), Spare::Ready(_)));
            spare.take().unwrap();
            // The next one is being made, or is ready.
            spare.take().unwrap();
        }
    }

    #[test]
    fn kvmclock_of_a_spare_begins_when_taken() {
        let background = Background::start().unwrap();
        let spare = SpareVm::new(Arc::new(Kvm::open().unwrap()), &background);
        assert!(background.wait(Duration::from_secs(60)));
        std::thread::sleep(Duration::from_millis(300));
        let begun = std::time::Instant::now();
        let vm = spare.take().unwrap();
        // Without a reset the clock would have counted the pause.
        let clock = vm.sample_clocks().kvmclock_ns().unwrap();
        let age = Duration::from_nanos(clock);
        assert!(
            age <= begun.elapsed(),
            "{age:?} after {:?}",
            begun.elapsed()
        );
    }
}
