//! Traditional memory balloon device (virtio 1.3, 5.5): the guest gives memory back to the host.
//!
//! Pages in the balloon, and pages that the guest reports as free, go back to the host at once. The guest
//! finds zeros when it touches them again.

mod saved;
mod task;

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use self::task::{BalloonTask, Role};
use crate::device::{DeviceError, DeviceId, VirtioDevice};
use crate::queue::{Queue, QueueState};
use crate::transport::Transport;
use crate::worker::{Running, Workers};
use parking_lot::Mutex;
use state::{LoadError, LoadScope, SaveError, Scope};

/// Feature bits (5.5.3).
const VIRTIO_BALLOON_F_STATS_VQ: u32 = 1;
const VIRTIO_BALLOON_F_DEFLATE_ON_OOM: u32 = 2;
const VIRTIO_BALLOON_F_REPORTING: u32 = 5;
/// The balloon's pages have 4 KiB, whatever the guest's have (5.5.6).
const PAGE_SHIFT: u32 = 12;

const QUEUE_SIZE: u16 = 128;
/// Device configuration space: `num_pages` and `actual` (5.5.4).
const ACTUAL_AT: usize = 4;
/// Inflate, deflate, statistics, reporting.
const MAX_QUEUES: usize = 4;

/// A balloon, as it is wanted.
#[derive(Clone, Copy, Debug)]
pub struct BalloonConfig {
    /// Bytes that it takes from the guest.
    pub size: u64,
    /// The guest may take memory out of it before it runs out.
    pub deflate_on_oom: bool,
    /// The guest reports what it does not use.
    pub free_page_reporting: bool,
}

/// State that the queues of a balloon share.
#[derive(Default)]
struct Shared {
    wanted: AtomicU32,
    /// Bytes.
    actual: Arc<AtomicU64>,
    inflated_bytes: AtomicU64,
    reported_bytes: AtomicU64,
    /// The guest's latest statistics.
    statistics: Mutex<BTreeMap<&'static str, u64>>,
    /// Set while a driver uses the balloon.
    transport: Mutex<Option<Arc<Transport>>>,
}

/// Returns how many pages of the balloon `bytes` are.
fn pages(bytes: u64) -> u32 {
    u32::try_from(bytes >> PAGE_SHIFT).unwrap_or(u32::MAX)
}

/// Returns how many bytes `pages` of the balloon are.
fn bytes(pages: u32) -> u64 {
    u64::from(pages) << PAGE_SHIFT
}

/// A balloon.
pub struct Balloon {
    shared: Arc<Shared>,
    deflate_on_oom: bool,
    free_page_reporting: bool,
    workers: Workers,
    features: u64,
    running: [Option<Running<BalloonTask>>; MAX_QUEUES],
}

impl Balloon {
    /// A balloon that is empty until the guest fills it.
    #[must_use]
    pub fn new(config: &BalloonConfig, workers: Workers) -> (Self, BalloonHandle) {
        let shared = Arc::new(Shared {
            wanted: AtomicU32::new(pages(config.size)),
            ..Shared::default()
        });
        let device = Self {
            shared: Arc::clone(&shared),
            deflate_on_oom: config.deflate_on_oom,
            free_page_reporting: config.free_page_reporting,
            workers,
            features: 0,
            running: [const { None }; MAX_QUEUES],
        };
        (device, BalloonHandle { shared })
    }

    fn has(&self, bit: u32) -> bool {
        self.features & 1 << bit != 0
    }

    /// Returns the role of a queue. Queues of features that were not negotiated do not count (virtio 1.3,
    /// 5.5.2).
    fn role(&self, index: u16) -> Option<Role> {
        let optional = [
            (VIRTIO_BALLOON_F_STATS_VQ, Role::Statistics),
            (VIRTIO_BALLOON_F_REPORTING, Role::Reporting),
        ];
        let there = optional.into_iter().filter(|(bit, _)| self.has(*bit));
        let mut roles = [Role::Inflate, Role::Deflate]
            .into_iter()
            .chain(there.map(|(_, role)| role));
        roles.nth(index.into())
    }
}

impl VirtioDevice for Balloon {
    fn id(&self) -> DeviceId {
        DeviceId::BALLOON
    }

    fn features(&self) -> u64 {
        let mut features = 1 << VIRTIO_BALLOON_F_STATS_VQ;
        if self.deflate_on_oom {
            features |= 1 << VIRTIO_BALLOON_F_DEFLATE_ON_OOM;
        }
        if self.free_page_reporting {
            features |= 1 << VIRTIO_BALLOON_F_REPORTING;
        }
        features
    }

    fn queue_sizes(&self) -> Vec<u16> {
        vec![QUEUE_SIZE; 3 + usize::from(self.free_page_reporting)]
    }

    fn config_space(&self) -> Vec<u8> {
        let wanted = self.shared.wanted.load(Ordering::Acquire);
        let actual = pages(self.shared.actual.load(Ordering::Acquire));
        [wanted.to_le_bytes(), actual.to_le_bytes()].concat()
    }

    fn write_config(&mut self, offset: usize, data: &[u8]) {
        if let (ACTUAL_AT, Ok(actual)) = (offset, <[u8; 4]>::try_from(data)) {
            // The driver reports this number (5.5.4). It is only shown, since a guest can report any.
            let actual = bytes(u32::from_le_bytes(actual));
            self.shared.actual.store(actual, Ordering::Release);
        }
    }

    fn activate(&mut self, features: u64, transport: &Arc<Transport>) -> Result<(), DeviceError> {
        self.features = features;
        *self.shared.transport.lock() = Some(Arc::clone(transport));
        Ok(())
    }

    fn start_queue(&mut self, queue: Queue) -> Result<(), DeviceError> {
        let index = queue.index();
        let transport = self.shared.transport.lock().clone();
        let role = self.role(index);
        let slot = self.running.get_mut(usize::from(index));
        let (Some(role), Some(slot), Some(transport)) = (role, slot, transport) else {
            return Err(DeviceError::NoSuchQueue(index));
        };
        let task = BalloonTask::new(queue, role, &self.shared);
        *slot = Some(Running::start(&self.workers, &transport, task));
        Ok(())
    }

    fn stop_queue(&mut self, index: u16) -> Option<QueueState> {
        let running = self.running.get_mut(usize::from(index))?.take()?;
        Some(running.stop()?.finish())
    }

    fn queue_state(&self, index: u16) -> Option<QueueState> {
        let running = self.running.get(usize::from(index))?.as_ref()?;
        running.with(|task| task.state())
    }

    fn reset(&mut self) {
        *self.shared.transport.lock() = None;
        // The driver has taken all pages back, or forgotten that it gave them.
        self.shared.actual.store(0, Ordering::Release);
        self.shared.statistics.lock().clear();
        self.features = 0;
    }

    fn save(&self, to: &mut Scope<'_>) -> Result<(), SaveError> {
        to.put(&saved::V1 {
            wanted: self.shared.wanted.load(Ordering::Acquire),
            actual: pages(self.shared.actual.load(Ordering::Acquire)),
        })
    }

    fn load(&mut self, from: &mut LoadScope<'_, '_>) -> Result<(), LoadError> {
        let saved::V1 { wanted, actual } = from.take()?;
        self.shared.wanted.store(wanted, Ordering::Release);
        self.shared.actual.store(bytes(actual), Ordering::Release);
        Ok(())
    }

    /// Includes the guest's memory statistics as of the previous call: each call also requests
    /// new ones from the guest.
    fn counters(&self) -> Vec<(&'static str, u64)> {
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let mut all = vec![
            (
                "wanted_bytes",
                bytes(self.shared.wanted.load(Ordering::Acquire)),
            ),
            ("actual_bytes", get(&self.shared.actual)),
            ("inflated_bytes", get(&self.shared.inflated_bytes)),
            ("reported_bytes", get(&self.shared.reported_bytes)),
        ];
        all.extend(self.shared.statistics.lock().iter().map(|(k, v)| (*k, *v)));
        for running in self.running.iter().flatten() {
            if running.with(BalloonTask::asks_again) == Some(true) {
                running.wake();
            }
        }
        all
    }
}

/// A balloon, seen by the owner of the machine.
#[derive(Clone)]
pub struct BalloonHandle {
    shared: Arc<Shared>,
}

impl BalloonHandle {
    /// Asks the guest to give `size` bytes to the balloon. The guest decides when it follows.
    pub fn resize(&self, size: u64) {
        self.shared.wanted.store(pages(size), Ordering::Release);
        // Without a driver nobody needs the interrupt: a driver that starts later reads the size.
        if let Some(transport) = &*self.shared.transport.lock() {
            transport.config_changed();
        }
    }

    /// Bytes that the guest has given to the balloon. The counter changes as the guest follows.
    #[must_use]
    pub fn actual(&self) -> &Arc<AtomicU64> {
        &self.shared.actual
    }
}

impl fmt::Debug for BalloonHandle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("BalloonHandle")
    }
}
