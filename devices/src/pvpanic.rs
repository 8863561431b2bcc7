//! The panic notifier of QEMU and Cloud Hypervisor as a PCI device (QEMU, docs/specs/pvpanic): one
//! register in BAR 0. Reading it says which events the device takes, writing reports one. Linux has
//! the driver `pvpanic-pci`.

use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};

use memory::{AddrRange, DeviceOps, Transaction};

use crate::pci::{BarError, BarMap, BarRequest, Endpoint, EndpointBuilder, Identity};

/// Bytes of BAR 0, the fewest that a BAR can have.
pub const BAR_LEN: u64 = 16;

const IDENTITY: Identity = Identity {
    vendor: 0x1b36,
    device: 0x0011,
    revision: 1,
    // A base system peripheral of no particular kind.
    class: 0x08_80_00,
    subsystem: (0, 0),
};

/// An event that a guest reports.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PanicEvent {
    /// The guest's kernel panicked, and nothing in the guest handles that.
    Panicked = 1 << 0,
    /// The guest's kernel panicked, and its crash kernel starts.
    CrashLoaded = 1 << 1,
}

impl PanicEvent {
    const ALL: [Self; 2] = [Self::Panicked, Self::CrashLoaded];

    /// The name that Cloud Hypervisor's events have.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Panicked => "panic",
            Self::CrashLoaded => "crash_loaded",
        }
    }
}

/// Makes a function with its BAR at `bar`, and calls `report` for the first event of each kind: a
/// guest can write as often as it likes.
///
/// # Errors
/// Fails if there is no room for the BAR's region.
pub fn pvpanic(
    tx: &mut Transaction<'_>,
    bar: AddrRange,
    map: Arc<dyn BarMap>,
    report: impl Fn(PanicEvent) + Send + Sync + 'static,
) -> Result<Endpoint, PvpanicError> {
    let register = Arc::new(Register {
        reported: AtomicU8::new(0),
        report: Box::new(report),
    });
    let region = tx.device(("register", "pvpanic"), BAR_LEN, register)?;
    let mut builder = EndpointBuilder::new(IDENTITY);
    builder.bar(&BarRequest {
        index: 0,
        region,
        size: BAR_LEN,
        address: bar.first(),
        // A 64-bit BAR may lie in the window above 4 GiB, where the allocator of the machine places
        // all BARs.
        wide: true,
        prefetchable: false,
    })?;
    Ok(builder.build(map))
}

/// A notifier cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum PvpanicError {
    /// Its region cannot be made.
    #[error(transparent)]
    Region(#[from] memory::TopologyError),
    /// Its BAR cannot be made.
    #[error(transparent)]
    Bar(#[from] BarError),
}

struct Register {
    /// Events that were reported already.
    reported: AtomicU8,
    report: Box<dyn Fn(PanicEvent) + Send + Sync>,
}

impl DeviceOps for Register {
    fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        if let (0, Some(first)) = (offset, data.first_mut()) {
            *first = PanicEvent::ALL
                .iter()
                .fold(0, |all, event| all | *event as u8);
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let (0, Some(bits)) = (offset, data.first()) else {
            return;
        };
        for event in PanicEvent::ALL {
            let bit = event as u8;
            // `fetch_or` decides the first report among vCPUs that panic at once. Without it a
            // guest could fill the VM's events by writing in a loop.
            if bits & bit != 0 && self.reported.fetch_or(bit, Ordering::AcqRel) & bit == 0 {
                (self.report)(event);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use parking_lot::Mutex;

    use super::*;

    #[test]
    fn each_event_is_reported_once() {
        let seen = Arc::new(Mutex::new(Vec::new()));
        let to = Arc::clone(&seen);
        let register = Register {
            reported: AtomicU8::new(0),
            report: Box::new(move |event| to.lock().push(event)),
        };
        let mut bits = [0xff; 2];
        register.read(0, &mut bits);
        assert_eq!(bits, [3, 0]);
        register.read(1, &mut bits);
        assert_eq!(bits, [0, 0]);
        for (offset, value) in [(0, 0x4), (1, 1), (0, 2), (0, 1), (0, 3), (0, 1)] {
            register.write(offset, &[value]);
        }
        register.write(0, &[]);
        assert_eq!(
            *seen.lock(),
            [PanicEvent::CrashLoaded, PanicEvent::Panicked]
        );
    }
}
