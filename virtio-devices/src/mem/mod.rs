//! Memory device (virtio 1.3, 5.15): the guest plugs and unplugs parts of a region of its memory.
//!
//! The region is as large as the memory can become, is in the guest's map from the start, and is
//! backed by a RAM block of its own. The block knows which of its pages are plugged; the device has
//! no list of its own. Unplugged memory takes no memory of the host, and reads as zeros.
//!
//! ```text
//!   owner ── resize ──► requested_size ── configuration change ──► driver
//!                                                                    │ PLUG, UNPLUG
//!   owner ◄── on_change ── plugged_size ◄── RamBlock::plug/unplug ◄──┘
//! ```

mod request;
mod saved;
mod task;

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use memory::RamBlock;
use parking_lot::Mutex;
use state::{LoadError, LoadScope, SaveError, Scope};

use self::task::MemTask;
use crate::device::{DeviceError, DeviceId, VirtioDevice};
use crate::queue::{Queue, QueueState};
use crate::transport::Transport;
use crate::worker::{Running, Workers};

/// Feature bits (5.15.3).
const VIRTIO_MEM_F_ACPI_PXM: u32 = 0;
const VIRTIO_MEM_F_UNPLUGGED_INACCESSIBLE: u32 = 1;

const QUEUE_SIZE: u16 = 128;
/// The smallest block: a huge page of x86, so that no block splits one.
pub const MIN_BLOCK: u64 = 2 << 20;

/// A memory device, as it is wanted.
pub struct MemConfig {
    /// The memory of the region, all of it: a block for hotplugged memory.
    pub ram: Arc<RamBlock>,
    /// Guest address of the region, a multiple of `block_size`.
    pub addr: u64,
    /// Bytes that are plugged and unplugged at once: a power of two, [`MIN_BLOCK`] at least, that
    /// divides the region's length.
    pub block_size: u64,
    /// The proximity domain of the region, if the guest has NUMA nodes.
    pub node: Option<u16>,
    /// Bytes that the guest should plug.
    pub requested: u64,
}

/// The state that the device, its queue and its owner share.
struct Shared {
    ram: Arc<RamBlock>,
    addr: u64,
    block_size: u64,
    requested: AtomicU64,
    /// Bytes that are plugged. Changed by the one queue, and by a load.
    plugged: Arc<AtomicU64>,
    on_change: Box<dyn Fn() + Send + Sync>,
    /// Set while a driver uses the device.
    transport: Mutex<Option<Arc<Transport>>>,
    plug_requests: AtomicU64,
    unplug_requests: AtomicU64,
    refused_requests: AtomicU64,
}

impl Shared {
    fn region_size(&self) -> u64 {
        self.ram.len() as u64
    }

    /// Blocks of the region.
    fn blocks(&self) -> u64 {
        self.region_size() / self.block_size
    }

    fn count_plugged(&self) {
        let bytes = self.ram.plugged_len() as u64;
        self.plugged.store(bytes, Ordering::Release);
    }
}

/// A memory device.
pub struct Mem {
    shared: Arc<Shared>,
    node: Option<u16>,
    workers: Workers,
    running: Option<Running<MemTask>>,
}

impl Mem {
    /// Returns a device of which nothing is plugged. It calls `on_change` when the driver has plugged
    /// or unplugged memory.
    #[must_use]
    pub fn new(
        config: MemConfig,
        workers: Workers,
        on_change: impl Fn() + Send + Sync + 'static,
    ) -> (Self, MemHandle) {
        let shared = Arc::new(Shared {
            ram: config.ram,
            addr: config.addr,
            block_size: config.block_size,
            requested: AtomicU64::new(config.requested),
            plugged: Arc::default(),
            on_change: Box::new(on_change),
            transport: Mutex::default(),
            plug_requests: AtomicU64::new(0),
            unplug_requests: AtomicU64::new(0),
            refused_requests: AtomicU64::new(0),
        });
        shared.count_plugged();
        let device = Self {
            shared: Arc::clone(&shared),
            node: config.node,
            workers,
            running: None,
        };
        (device, MemHandle { shared })
    }
}

impl VirtioDevice for Mem {
    fn id(&self) -> DeviceId {
        DeviceId::MEM
    }

    fn features(&self) -> u64 {
        // A driver that accepts it does not even read unplugged memory, which would have the host
        // find pages for a shared block. One that does not accept it finds zeros (5.15.6.2).
        let inaccessible = 1 << VIRTIO_MEM_F_UNPLUGGED_INACCESSIBLE;
        let pxm = self.node.map_or(0, |_| 1 << VIRTIO_MEM_F_ACPI_PXM);
        inaccessible | pxm
    }

    fn queue_sizes(&self) -> Vec<u16> {
        vec![QUEUE_SIZE]
    }

    /// `struct virtio_mem_config` (5.15.4). All of the region can be used.
    fn config_space(&self) -> Vec<u8> {
        let Shared {
            requested, plugged, ..
        } = &*self.shared;
        let mut node = [0; 8];
        node[..2].copy_from_slice(&self.node.unwrap_or(0).to_le_bytes());
        [
            self.shared.block_size.to_le_bytes(),
            node,
            self.shared.addr.to_le_bytes(),
            self.shared.region_size().to_le_bytes(),
            self.shared.region_size().to_le_bytes(),
            plugged.load(Ordering::Acquire).to_le_bytes(),
            requested.load(Ordering::Acquire).to_le_bytes(),
        ]
        .concat()
    }

    fn activate(&mut self, _: u64, transport: &Arc<Transport>) -> Result<(), DeviceError> {
        *self.shared.transport.lock() = Some(Arc::clone(transport));
        Ok(())
    }

    fn start_queue(&mut self, queue: Queue) -> Result<(), DeviceError> {
        let index = queue.index();
        let transport = self.shared.transport.lock().clone();
        let transport = transport.filter(|_| index == 0);
        let transport = transport.ok_or(DeviceError::NoSuchQueue(index))?;
        let task = MemTask::new(queue, &self.shared);
        self.running = Some(Running::start(&self.workers, &transport, task));
        Ok(())
    }

    fn stop_queue(&mut self, index: u16) -> Option<QueueState> {
        let running = self.running.take_if(|_| index == 0)?;
        Some(running.stop()?.finish())
    }

    fn queue_state(&self, index: u16) -> Option<QueueState> {
        let running = self.running.as_ref().filter(|_| index == 0)?;
        running.with(|task| task.state())
    }

    /// Forgets the driver. Plugged memory stays plugged (5.15.5): the next driver finds out, or unplugs
    /// it all.
    fn reset(&mut self) {
        *self.shared.transport.lock() = None;
    }

    fn save(&self, to: &mut Scope<'_>) -> Result<(), SaveError> {
        to.put(&saved::V1::of(&self.shared))
    }

    fn load(&mut self, from: &mut LoadScope<'_, '_>) -> Result<(), LoadError> {
        let saved: saved::V1 = from.take()?;
        saved.restore(&self.shared).map_err(|why| from.refuse(why))
    }

    fn counters(&self) -> Vec<(&'static str, u64)> {
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        vec![
            ("requested_bytes", get(&self.shared.requested)),
            ("plugged_bytes", get(&self.shared.plugged)),
            ("plug_requests", get(&self.shared.plug_requests)),
            ("unplug_requests", get(&self.shared.unplug_requests)),
            ("refused_requests", get(&self.shared.refused_requests)),
        ]
    }
}

/// A memory device, seen by the owner of the machine.
#[derive(Clone)]
pub struct MemHandle {
    shared: Arc<Shared>,
}

impl MemHandle {
    /// Asks the guest to plug `bytes` bytes of the region, a multiple of the block size and at most
    /// the region's size. The guest decides when it follows, and how far.
    pub fn resize(&self, bytes: u64) {
        // Before the notification: the driver reads the size as soon as it is interrupted.
        self.shared.requested.store(bytes, Ordering::Release);
        if let Some(transport) = &*self.shared.transport.lock() {
            transport.config_changed();
        }
    }

    /// Returns how many bytes the guest should have.
    #[must_use]
    pub fn requested(&self) -> u64 {
        self.shared.requested.load(Ordering::Acquire)
    }

    /// Bytes that are plugged. The counter changes as the guest plugs and unplugs.
    #[must_use]
    pub fn plugged(&self) -> &Arc<AtomicU64> {
        &self.shared.plugged
    }
}

impl fmt::Debug for MemHandle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("MemHandle")
    }
}
