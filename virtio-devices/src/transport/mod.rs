//! Between a driver and its device: negotiation, status, interrupts.

mod function;
mod negotiation;
mod pci;
mod saved;

use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU16, Ordering};

use devices::sandbox::Violation;

pub(crate) use self::function::copy;
pub use self::pci::{BAR_LEN, Retired, Slot, VirtioPci, VirtioPciError, vectors};
use crate::limits::MAX_QUEUES;

/// "No vector" (virtio 1.3, 4.1.5.1.2.2: `VIRTIO_MSI_NO_VECTOR`).
pub(crate) const NO_VECTOR: u16 = 0xffff;

/// `ISR` bits (virtio 1.3, 4.1.4.5).
const ISR_QUEUE: u8 = 1;
const ISR_CONFIG: u8 = 2;

/// Interrupts the guest by MSI-X.
pub trait Interrupts: Send + Sync {
    /// Raises this vector, which the guest may have chosen at will.
    fn raise(&self, vector: u16);
}

/// An event of a device for the machine's owner.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TransportEvent {
    /// The driver is ready, and uses the device from now on.
    Activated,
    /// The guest broke the rules, or the device cannot continue: it does nothing until the driver resets
    /// it.
    NeedsReset(
        /// Why.
        String,
    ),
    /// The host failed on a request, and the guest got no error: the device tries the request again at its
    /// next start. The owner should pause the machine until then.
    Stalled(
        /// Why.
        String,
    ),
    /// The sandbox refused a system call that the device made. The device serves nothing more, and
    /// the VM must end: its guest may control the device's thread.
    Violation(
        /// The thread and the system call.
        String,
    ),
    /// The driver has reset it.
    Reset,
}

/// How a device reaches its driver, from any thread and without a lock.
pub struct Transport {
    interrupts: Box<dyn Interrupts>,
    report: Box<dyn Fn(TransportEvent) + Send + Sync>,
    config_vector: AtomicU16,
    queue_vectors: [AtomicU16; MAX_QUEUES],
    isr: AtomicU8,
    needs_reset: AtomicBool,
    driver_ok: AtomicBool,
    config_generation: AtomicU8,
}

impl Transport {
    /// A transport to a driver that has not said anything yet.
    pub fn new(
        interrupts: Box<dyn Interrupts>,
        report: impl Fn(TransportEvent) + Send + Sync + 'static,
    ) -> Self {
        Self {
            interrupts,
            report: Box::new(report),
            config_vector: AtomicU16::new(NO_VECTOR),
            queue_vectors: [const { AtomicU16::new(NO_VECTOR) }; MAX_QUEUES],
            isr: AtomicU8::new(0),
            needs_reset: AtomicBool::new(false),
            driver_ok: AtomicBool::new(false),
            config_generation: AtomicU8::new(0),
        }
    }

    /// Interrupts the driver for a queue.
    pub fn used(&self, queue: u16) {
        // Before the vector: a driver that polls the ISR from the interrupt's handler must find the
        // bit.
        self.isr.fetch_or(ISR_QUEUE, Ordering::AcqRel);
        let vector = self.queue_vectors.get(usize::from(queue));
        self.raise(vector.map_or(NO_VECTOR, |vector| vector.load(Ordering::Acquire)));
    }

    /// Tells the driver that device configuration space has changed.
    pub fn config_changed(&self) {
        self.next_generation();
        // Before DRIVER_OK the driver may not have set its vectors, and has yet to read the
        // configuration.
        if self.driver_ok.load(Ordering::Acquire) {
            self.isr.fetch_or(ISR_CONFIG, Ordering::AcqRel);
            self.raise(self.config_vector.load(Ordering::Acquire));
        }
    }

    /// Interrupts the driver once more for a change of the configuration, if there ever was one: nothing
    /// says whether the driver has seen the last one.
    fn repeat_config_changed(&self) {
        if self.isr.load(Ordering::Acquire) & ISR_CONFIG != 0 {
            self.raise(self.config_vector.load(Ordering::Acquire));
        }
    }

    /// Sets `DEVICE_NEEDS_RESET`, tells the driver, and the owner of the machine once.
    pub fn needs_reset(&self, why: &str) {
        // Several tasks may find the same fault at once: one report is enough for the owner.
        if !self.needs_reset.swap(true, Ordering::AcqRel) {
            // The flag is set first and read by `status`: a driver that the notification wakes
            // finds `DEVICE_NEEDS_RESET` (2.1.2).
            self.report(TransportEvent::NeedsReset(why.to_owned()));
            self.config_changed();
        }
    }

    /// Tells the owner of the machine that the device waits for the host.
    pub fn stalled(&self, why: &str) {
        self.report(TransportEvent::Stalled(why.to_owned()));
    }

    /// Tells the owner of the machine that the sandbox refused a system call of the device.
    pub(crate) fn violated(&self, violation: &Violation) {
        // Without an interrupt: the VM ends, and its guest runs no further.
        self.needs_reset.store(true, Ordering::Release);
        self.report(TransportEvent::Violation(violation.to_string()));
    }

    fn next_generation(&self) {
        self.config_generation.fetch_add(1, Ordering::AcqRel);
    }

    /// Whether the device needs a reset: none of its queues is served until then.
    pub(crate) fn is_broken(&self) -> bool {
        self.needs_reset.load(Ordering::Acquire)
    }

    fn report(&self, event: TransportEvent) {
        (self.report)(event);
    }

    fn set_config_vector(&self, vector: u16) {
        self.config_vector.store(vector, Ordering::Release);
    }

    fn set_queue_vector(&self, queue: u16, vector: u16) {
        if let Some(register) = self.queue_vectors.get(usize::from(queue)) {
            register.store(vector, Ordering::Release);
        }
    }

    /// The driver has forgotten everything, and so does its side of the transport.
    fn reset(&self) {
        // The queues have stopped, so no task can set `needs_reset` for the driver that comes next.
        self.driver_ok.store(false, Ordering::Release);
        self.needs_reset.store(false, Ordering::Release);
        self.set_config_vector(NO_VECTOR);
        (0..)
            .take(MAX_QUEUES)
            .for_each(|queue| self.set_queue_vector(queue, NO_VECTOR));
        self.isr.store(0, Ordering::Release);
    }

    fn raise(&self, vector: u16) {
        if vector != NO_VECTOR {
            self.interrupts.raise(vector);
        }
    }
}

impl fmt::Debug for Transport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Transport")
            .field("needs_reset", &self.needs_reset)
            .field("driver_ok", &self.driver_ok)
            .finish_non_exhaustive()
    }
}

#[cfg(feature = "testing")]
impl Transport {
    /// Sets the transport up like a ready driver: queue `i` has vector `i`.
    pub(crate) fn connect_for_test(&self, config_vector: u16) {
        self.config_vector.store(config_vector, Ordering::Release);
        for (vector, i) in self.queue_vectors.iter().zip(0..) {
            vector.store(i, Ordering::Release);
        }
        self.driver_ok.store(true, Ordering::Release);
    }
}
