//! Events that a machine reports to its owner, and the ports through which its guest speaks.
//!
//! Devices and vCPU threads report through a [`Reporter`]; they do not know that a driver receives
//! the events, so this module is below both. A guest decides how often most of them happen, so the
//! driver's inbox does not queue them: it merges them into [`Reports`].

use std::collections::BTreeMap;
use std::io::Write;
use std::sync::Arc;
use std::time::Instant;

use control::Latch;
use devices::{PanicEvent, PowerEvent};
use spec::Failure;
use virtio_devices::TransportEvent;

const SANDBOX_VIOLATION: &str = "sandbox-violation";

/// The sandbox refused a system call of a thread that works for the guest. The thread may be under
/// the guest's control: the VM must end.
pub(crate) fn sandbox_violation(detail: &str, vcpu: Option<u32>) -> Failure {
    Failure {
        code: SANDBOX_VIOLATION.to_owned(),
        detail: detail.to_owned(),
        vcpu,
    }
}

/// Something that happened in a machine.
#[derive(Debug)]
pub(crate) enum GuestEvent {
    /// The guest powered off, or asked for a reset.
    Power(PowerEvent),
    /// A vCPU cannot continue.
    Failed(Failure),
    /// The host cannot give memory of the guest any more: the offset of the first page in its RAM block.
    MemoryLost(u64),
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
    /// The guest has plugged or unplugged memory.
    MemoryChanged,
    /// The guest reports a panic: once of each kind.
    Panic(PanicEvent),
    /// The guest ejected vCPUs, or refused what was asked of it: the registers say which.
    Cpus,
    /// The watchdog expired.
    Watchdog,
}

/// How a machine ends by itself.
#[derive(Debug)]
pub(crate) enum GuestEnd {
    Power(PowerEvent),
    Failed(Failure),
}

impl GuestEnd {
    /// Whether a thread of the guest's devices did what its sandbox forbids: the guest may control it.
    pub(crate) fn is_violation(&self) -> bool {
        matches!(self, Self::Failed(failure) if failure.code == SANDBOX_VIOLATION)
    }
}

/// The reports of one device.
#[derive(Debug, Default)]
pub(crate) struct DeviceReports {
    /// The last reason for which it needs a reset.
    pub(crate) needs_reset: Option<String>,
    /// The last reason for which it waits for the host.
    pub(crate) stalled: Option<String>,
}

/// All that one machine has reported and its driver has not seen. The size depends on the devices
/// of the machine, and not on how often its guest causes an event.
#[derive(Debug, Default)]
pub(crate) struct Reports {
    /// The number of the machine: a VM gets a new one at each reset.
    pub(crate) machine: u64,
    /// The first event that ends the machine; later ones are ignored.
    pub(crate) end: Option<GuestEnd>,
    pub(crate) memory_lost: Option<u64>,
    pub(crate) first_entry: Option<Instant>,
    pub(crate) first_debug_port: Option<Instant>,
    pub(crate) first_serial: Option<Instant>,
    /// By [`Port`].
    pub(crate) room: [bool; 2],
    /// PCI slots that were ejected, a bit each.
    pub(crate) ejected: u32,
    pub(crate) memory_changed: bool,
    /// Two at most, one of each kind.
    pub(crate) panics: Vec<PanicEvent>,
    /// vCPUs were ejected, or the guest refused what was asked of it.
    pub(crate) cpus: bool,
    pub(crate) watchdog: bool,
    /// By the names of the devices.
    pub(crate) devices: BTreeMap<String, DeviceReports>,
}

impl Latch for Reports {
    /// An event, and the number of the machine that reports it.
    type Report = (u64, GuestEvent);

    fn merge(&mut self, (machine, event): Self::Report) {
        match machine.cmp(&self.machine) {
            // An earlier machine is being taken apart: ignore its reports.
            std::cmp::Ordering::Less => return,
            std::cmp::Ordering::Equal => {}
            std::cmp::Ordering::Greater => {
                *self = Self {
                    machine,
                    ..Self::default()
                };
            }
        }
        match event {
            GuestEvent::Power(event) => {
                self.end.get_or_insert(GuestEnd::Power(event));
            }
            GuestEvent::Failed(failure) => {
                self.end.get_or_insert(GuestEnd::Failed(failure));
            }
            GuestEvent::MemoryLost(offset) => self.memory_lost = Some(offset),
            GuestEvent::FirstEntry(at) => self.first_entry = Some(at),
            GuestEvent::FirstDebugPort(at) => self.first_debug_port = Some(at),
            GuestEvent::FirstSerial(at) => self.first_serial = Some(at),
            GuestEvent::Room(port) => self.room[port as usize] = true,
            GuestEvent::Ejected(slot) => {
                self.ejected |= 1_u32.checked_shl(slot.into()).unwrap_or(0);
            }
            GuestEvent::MemoryChanged => self.memory_changed = true,
            GuestEvent::Panic(event) => {
                if !self.panics.contains(&event) {
                    self.panics.push(event);
                }
            }
            GuestEvent::Cpus => self.cpus = true,
            GuestEvent::Watchdog => self.watchdog = true,
            GuestEvent::Device(id, TransportEvent::NeedsReset(why)) => {
                self.devices.entry(id).or_default().needs_reset = Some(why);
            }
            GuestEvent::Device(id, TransportEvent::Stalled(why)) => {
                self.devices.entry(id).or_default().stalled = Some(why);
            }
            // Comes before what the guest asked for: a guest that controls a thread of its devices
            // must not choose how its machine ends.
            GuestEvent::Device(id, TransportEvent::Violation(detail)) => {
                let failure = sandbox_violation(&format!("{id}: {detail}"), None);
                self.end = Some(GuestEnd::Failed(failure));
            }
            GuestEvent::Device(_, TransportEvent::Activated | TransportEvent::Reset) => {}
        }
    }
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
    pub(crate) debug: Option<Box<dyn Write + Send>>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn event_storm_merges_into_flags() {
        let mut reports = Reports::default();
        for turn in 0..100_000_u64 {
            let why = format!("for the {turn}th time");
            for slot in 0..=255 {
                if turn % 256 == u64::from(slot) {
                    reports.merge((1, GuestEvent::Ejected(slot)));
                }
            }
            reports.merge((1, GuestEvent::Room(Port::Serial)));
            reports.merge((1, GuestEvent::Panic(PanicEvent::Panicked)));
            let event = TransportEvent::NeedsReset(why);
            reports.merge((1, GuestEvent::Device("disk0".to_owned(), event)));
            reports.merge((1, GuestEvent::Power(PowerEvent::Reset)));
        }
        reports.merge((1, GuestEvent::Power(PowerEvent::PowerOff)));
        assert_eq!((reports.ejected, reports.room), (u32::MAX, [true, false]));
        assert_eq!((reports.devices.len(), reports.panics.len()), (1, 1));
        let first = reports.end.as_ref();
        assert!(matches!(first, Some(GuestEnd::Power(PowerEvent::Reset))));
    }

    #[test]
    fn reports_of_an_earlier_machine_are_ignored() {
        let mut reports = Reports::default();
        reports.merge((1, GuestEvent::Power(PowerEvent::PowerOff)));
        reports.merge((2, GuestEvent::Ejected(3)));
        reports.merge((1, GuestEvent::Ejected(4)));
        assert_eq!((reports.machine, reports.ejected), (2, 1 << 3));
        assert!(reports.end.is_none());
    }
}
