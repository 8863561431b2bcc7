//! The interface between transport and devices.

use std::fmt;
use std::sync::Arc;

use state::{LoadError, LoadScope, SaveError, Scope};

use crate::queue::{Queue, QueueError, QueueState};
use crate::transport::{Transport, copy};

/// A virtio device ID (virtio 1.3, section 5).
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct DeviceId(pub u16);

impl DeviceId {
    /// Network device (5.1).
    pub const NET: Self = Self(1);
    /// Block device (5.2).
    pub const BLOCK: Self = Self(2);
    /// Console device (5.3).
    pub const CONSOLE: Self = Self(3);
    /// Entropy device (5.4).
    pub const RNG: Self = Self(4);
    /// Memory balloon device (5.5).
    pub const BALLOON: Self = Self(5);
    /// Socket device (5.10).
    pub const VSOCK: Self = Self(19);

    /// Memory device (5.15).
    pub const MEM: Self = Self(24);
    /// Watchdog device (reserved in section 5, without a section of its own).
    pub const WATCHDOG: Self = Self(35);

    /// Returns the name in logs and in the API.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::NET => "net",
            Self::BLOCK => "block",
            Self::CONSOLE => "console",
            Self::RNG => "rng",
            Self::BALLOON => "balloon",
            Self::VSOCK => "vsock",
            Self::MEM => "mem",
            Self::WATCHDOG => "watchdog",
            _ => "unknown",
        }
    }
}

impl fmt::Debug for DeviceId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "virtio-{} ({})", self.name(), self.0)
    }
}

/// A device cannot do what the transport asked of it.
#[derive(Debug, thiserror::Error)]
pub enum DeviceError {
    /// The queue, as the guest has set it up, cannot be used.
    #[error(transparent)]
    Queue(#[from] QueueError),
    /// The device has no queue of this index.
    #[error("the device has no queue {0}")]
    NoSuchQueue(u16),
    /// The host refused something.
    #[error("the host refused to {attempt}: {source}")]
    Host {
        /// The attempted operation.
        attempt: &'static str,
        /// The host's answer.
        source: std::io::Error,
    },
    /// Another process holds an exclusive resource.
    #[error("{0}")]
    Taken(String),
}

impl DeviceError {
    /// For `map_err` on what the host answers.
    pub fn host(attempt: &'static str) -> impl FnOnce(std::io::Error) -> Self {
        move |source| Self::Host { attempt, source }
    }
}

/// A virtio device, without its transport.
///
/// The transport calls it one call at a time, on whichever thread the guest's access or the
/// machine's request comes by, and expects it back within microseconds: the work on queues is done
/// by [`QueueTask`](crate::QueueTask)s.
///
/// ```text
///             activate          start_queue, each        stop_queue, each
///   inactive ──────────► active ──────────────► running ──────────────────► active (paused)
///       ▲                                          │                           │
///       └──────────────── reset ◄──────────────────┴───────────────────────────┘
/// ```
pub trait VirtioDevice: Send {
    /// Its kind.
    fn id(&self) -> DeviceId;

    /// The feature bits of its own that it offers (0 to 23 and 50 on; 24 to 49 are the
    /// transport's and the rings', which the transport offers).
    fn features(&self) -> u64;

    /// The greatest size of each queue, a power of two each: as many as there are queues.
    fn queue_sizes(&self) -> Vec<u16>;

    /// Returns device configuration space as it is now.
    fn config_space(&self) -> Vec<u8>;

    /// Fills `data` with device configuration space from `offset` on; zeros past its end.
    fn read_config(&self, offset: usize, data: &mut [u8]) {
        copy(&self.config_space(), offset, data);
    }

    /// Handles the guest's write to device configuration space, of any width at any offset.
    fn write_config(&mut self, offset: usize, data: &[u8]) {
        let _ = (offset, data);
    }

    /// The driver is ready (`DRIVER_OK`): `features` were negotiated, all bits included, and
    /// `transport` reaches the driver until [`VirtioDevice::reset`]. Also called on a device that
    /// was loaded, before its queues start.
    ///
    /// # Errors
    /// Fails if the host refuses what is needed; the device then needs a reset.
    fn activate(&mut self, features: u64, transport: &Arc<Transport>) -> Result<(), DeviceError>;

    /// Begins to serve a queue, at the point where its state says.
    ///
    /// # Errors
    /// Fails if the host refuses what is needed; the device then needs a reset.
    fn start_queue(&mut self, queue: Queue) -> Result<(), DeviceError>;

    /// Ends to serve a queue: on return no request of it is in flight and its memory has been let
    /// go. `None` if it was not being served.
    fn stop_queue(&mut self, index: u16) -> Option<QueueState>;

    /// Resets a queue. Requests in hand are completed; the queue's state is discarded, since the driver sets
    /// the queue up again before it starts it.
    fn reset_queue(&mut self, index: u16) {
        let _ = self.stop_queue(index);
    }

    /// Returns the state of a queue that is being served, at this moment.
    fn queue_state(&self, index: u16) -> Option<QueueState>;

    /// Forgets the driver: as after power-on. All queues have been stopped.
    fn reset(&mut self);

    /// Forgets the driver, as [`VirtioDevice::reset`] does, right before a [`VirtioDevice::load`], which sets
    /// everything again: what the host has already need not be changed twice.
    fn prepare_load(&mut self) {
        self.reset();
    }

    /// Makes durable all that the guest wrote, before the guest moves to another machine. No queue is
    /// being served. What only one machine may have stays here until [`VirtioDevice::hand_over`].
    ///
    /// # Errors
    /// Fails if the host cannot write.
    fn flush(&mut self) -> Result<(), DeviceError> {
        Ok(())
    }

    /// Releases what only one machine may have at a time, such as the lock of an image: the guest is
    /// given to another machine. No queue is being served, and [`VirtioDevice::flush`] succeeded.
    fn hand_over(&mut self) {}

    /// Acquires exclusive host resources: at the destination of a migration, or at a source whose guest
    /// stays after all.
    ///
    /// # Errors
    /// Another process holds a resource, or the host refuses.
    fn take_over(&mut self) -> Result<(), DeviceError> {
        Ok(())
    }

    /// Saves what is the device's own, next to what the transport saves of it.
    ///
    /// # Errors
    /// Fails if it does not fit.
    fn save(&self, to: &mut Scope<'_>) -> Result<(), SaveError>;

    /// Loads saved state. The device is not active and serves no queue.
    ///
    /// # Errors
    /// The state cannot be decoded, or does not fit this device.
    fn load(&mut self, from: &mut LoadScope<'_, '_>) -> Result<(), LoadError>;

    /// Returns the counters, by the names that the API shows.
    fn counters(&self) -> Vec<(&'static str, u64)>;
}
