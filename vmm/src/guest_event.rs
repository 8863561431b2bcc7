//! Events that a machine reports to its owner, and the ports through which its guest speaks.
//!
//! Devices and vCPU threads report through a [`Reporter`]; they do not know that a driver receives
//! the events, so this module is below both.

use std::io::Write;
use std::sync::Arc;
use std::time::Instant;

use devices::PowerEvent;
use spec::Failure;
use virtio_devices::TransportEvent;

/// Something that happened in a machine.
#[derive(Debug)]
pub(crate) enum GuestEvent {
    /// The guest powered off, or asked for a reset.
    Power(PowerEvent),
    /// A vCPU cannot continue.
    Failed(Failure),
    /// The first vCPU entered the guest.
    FirstEntry(Instant),
    /// The guest wrote to the debug port for the first time.
    FirstDebugPort(Instant),
    /// The guest wrote to the serial port for the first time.
    FirstSerial(Instant),
    /// The guest has read all the input that was queued for it.
    Room(Port),
    /// The device of this name reports an event of its virtio transport.
    Device(String, TransportEvent),
    /// The guest ejected the devices in this PCI slot.
    Ejected(u8),
}

/// Reports the events of one machine. A report never blocks.
#[derive(Clone)]
pub(crate) struct Reporter(Arc<dyn Fn(GuestEvent) + Send + Sync>);

impl Reporter {
    /// Returns a reporter that passes each event to `receive`, on the thread that reports it.
    pub(crate) fn new(receive: impl Fn(GuestEvent) + Send + Sync + 'static) -> Self {
        Self(Arc::new(receive))
    }

    pub(crate) fn report(&self, event: GuestEvent) {
        (self.0)(event);
    }
}

/// A character device of the guest, and the key by which the event loop knows its descriptors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Port {
    Serial = 0,
    Console = 1,
}

impl Port {
    pub(crate) const BOTH: [Self; 2] = [Self::Serial, Self::Console];
}

/// The sinks of the guest's output; `None` where the machine has no such device.
#[derive(Default)]
pub(crate) struct Outputs {
    pub(crate) serial: Option<Box<dyn Write + Send>>,
    pub(crate) console: Option<Box<dyn Write + Send>>,
}
