//! Block device (virtio 1.3, 5.2): disks.
//!
//! ```text
//!   queue ─► BlockTask ─► Request ─┬─► Uring    raw images, the guest's own buffers
//!            (one a queue)         └─► Threads  qcow2, unaligned buffers, hosts without io_uring
//!                                          └───► Image (locked: no other writer)
//! ```

mod access;
mod base;
mod copy;
mod create;
mod extents;
mod format;
mod frozen;
mod geometry;
mod image;
mod incomplete;
mod mirror;
mod overlay;
mod qcow2;
mod request;
mod saved;
mod task;
mod threads;
mod unused;
mod uring;

use std::collections::HashSet;
use std::fmt;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use devices::host_file::OpenError;
pub use devices::host_file::{LockError, LockMode};
use memory::AwaitedBlocks;
use parking_lot::{Mutex, RwLock};
use state::{LoadError, LoadScope, SaveError, Scope};
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_CONFIG_WCE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH,
    VIRTIO_BLK_F_MQ, VIRTIO_BLK_F_RO, VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_F_SIZE_MAX,
    VIRTIO_BLK_F_TOPOLOGY, VIRTIO_BLK_F_WRITE_ZEROES,
};

use self::access::CopyGate;
pub use self::access::DiskAccess;
pub use self::base::{ContentId, ImageVersion, OpenBase};
pub use self::copy::{CreatedImage, DiskContent};
pub use self::format::ImageFormat;
pub use self::frozen::{FrozenMark, check_writable};
pub use self::image::ImageError;
use self::image::{Image, Kind, Opening, SECTOR, contained};
pub use self::incomplete::{IncompleteMark, remove_mark};
pub use self::overlay::{BaseImage, NeededOverlay, Overlay, PlannedOverlay, beside};
pub use self::qcow2::MAX_BACKING;
use self::request::Op;
use self::task::BlockTask;
pub use self::unused::{FoundOverlay, OverlayUse, find_overlays, record_snapshot};
use self::uring::Rings;
use crate::device::{DeviceError, DeviceId, VirtioDevice};
use crate::limits::MAX_QUEUES;
use crate::queue::{Queue, QueueState};
use crate::rate_limiter::SharedLimiter;
use crate::transport::Transport;
use crate::worker::{Running, Workers};

/// Bytes that are moved at a time for one request; longer ones are moved in parts. With
/// [`task::MAX_IN_FLIGHT`] it bounds how long a queue takes to stop.
const MAX_PART: usize = 32 << 20;
/// Sectors of one request to discard or to zero: 1 GiB.
const MAX_SEGMENT_SECTORS: u32 = 1 << 21;
/// Bytes of device configuration space.
const CONFIG_LEN: usize = 60;
/// Offset of the field by which the driver chooses write caching.
const WRITEBACK_AT: usize = 32;

/// The handling of a request on which the host fails.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum OnError {
    /// The guest gets an I/O error.
    #[default]
    Report,
    /// The request is kept, the machine's owner gets an event, and the request is tried again when its
    /// queue starts the next time.
    Pause,
}

/// A disk, as it is wanted.
#[derive(Clone, Debug)]
pub struct BlockConfig {
    /// Its image: a file or a block device.
    pub path: PathBuf,
    /// Refuse writes.
    pub readonly: bool,
    /// Bypass the page cache of the host.
    pub direct: bool,
    /// Format; detected when absent. [`BlockHandle::format`] says which it is: keep it, and give it
    /// the next time, for a guest may write to the disk what another detection finds.
    pub format: Option<ImageFormat>,
    /// The format was detected an earlier time. Writes that would make a raw image look like one of
    /// another format are refused then, as they are when `format` is absent.
    pub is_detected: bool,
    /// Allow an image that builds on others, which are opened read-only.
    pub backing_files: bool,
    /// Allow an image that keeps its data in another file, which is opened read-only.
    pub data_files: bool,
    /// Directories below which an image may name files, besides its own directory.
    pub image_dirs: Vec<PathBuf>,
    /// Queues, 1 to 32.
    pub queues: u16,
    /// Entries of each, a power of two.
    pub queue_size: u16,
    /// Serial number, of which the guest sees 20 bytes.
    pub serial: String,
    /// Give discarded blocks back to the host.
    pub sparse: bool,
    /// The locked part of the image.
    pub lock: LockMode,
    /// The guest is still elsewhere, and so is the lock.
    pub is_incoming: bool,
    /// Limiter of the whole disk, which it may share with others.
    pub limiter: SharedLimiter,
    /// The handling of the host's errors.
    pub on_error: OnError,
}

#[derive(Default)]
struct Counters {
    read_bytes: AtomicU64,
    read_ops: AtomicU64,
    write_bytes: AtomicU64,
    write_ops: AtomicU64,
    flushes: AtomicU64,
    discards: AtomicU64,
    errors: AtomicU64,
}

impl Counters {
    fn count(&self, op: Op) {
        let add = |counter: &AtomicU64, n| counter.fetch_add(n, Ordering::Relaxed);
        match op {
            Op::Read { len, .. } => {
                add(&self.read_bytes, len as u64);
                add(&self.read_ops, 1);
            }
            Op::Write { len, .. } => {
                add(&self.write_bytes, len as u64);
                add(&self.write_ops, 1);
            }
            Op::Flush => drop(add(&self.flushes, 1)),
            Op::Discard { .. } | Op::WriteZeroes { .. } => drop(add(&self.discards, 1)),
        }
    }
}

/// State that the queues of a disk share.
struct Shared {
    /// Replaced only while no queue of the disk runs.
    image: RwLock<Arc<Image>>,
    /// The image below the overlay on which the disk continues, until it is certain that it does.
    base: Mutex<Option<Arc<Image>>>,
    gate: CopyGate,
    /// The version of the image when it was opened, if the host says.
    opened: Option<ImageVersion>,
    /// The blocks that are still at the source of a migration.
    awaited: Mutex<Option<Arc<AwaitedBlocks>>>,
    /// Empty where the image is not raw, or the host has no io_uring.
    rings: RwLock<Arc<Rings>>,
    queues: u16,
    queue_size: u16,
    /// Bytes that the guest sees.
    capacity: AtomicU64,
    /// Writes are done when the host has cached them; a flush makes them durable.
    writeback: AtomicBool,
    serial: String,
    sparse: bool,
    limiter: SharedLimiter,
    counters: Counters,
    on_error: OnError,
    /// An event was sent that a request waits for the host.
    is_stalled: AtomicBool,
    /// Set while a driver uses the disk.
    transport: Mutex<Option<Arc<Transport>>>,
}

impl Shared {
    fn image(&self) -> Arc<Image> {
        Arc::clone(&self.image.read())
    }

    fn set_image(&self, image: Arc<Image>) {
        // The rings of a raw image wait while the disk is none.
        if let (Kind::Raw(_), true) = (&image.kind, self.rings().is_empty()) {
            let rings = rings(&image.kind, self.queues, self.queue_size);
            *self.rings.write() = Arc::new(rings);
        }
        *self.image.write() = image;
    }

    /// The blocks that are still at the source of a migration, if some are.
    fn awaited(&self) -> Option<Arc<AwaitedBlocks>> {
        let mut awaited = self.awaited.lock();
        awaited.take_if(|blocks| blocks.left() == 0);
        awaited.clone()
    }

    fn rings(&self) -> Arc<Rings> {
        Arc::clone(&self.rings.read())
    }

    /// Reports that a request waits for the host: once, until the disk is started again.
    fn stalled(&self, why: &str) {
        if !self.is_stalled.swap(true, Ordering::AcqRel)
            && let Some(transport) = &*self.transport.lock()
        {
            transport.stalled(why);
        }
    }
}

/// The rings by which an image is served. Not for threads that serve guests.
fn rings(kind: &Kind, queues: u16, entries: u16) -> Rings {
    match kind {
        Kind::Raw(_) => Rings::new(queues, entries).unwrap_or_else(|error| {
            tracing::warn!(%error, "the host has no io_uring; disks are served by threads");
            Rings::default()
        }),
        Kind::Qcow2(_) => Rings::default(),
    }
}

/// A disk.
pub struct Block {
    shared: Arc<Shared>,
    workers: Workers,
    flushes: bool,
    running: Vec<Option<Running<BlockTask>>>,
    /// The heads of chains to try again, for each queue that is stopped.
    kept: Vec<Vec<u16>>,
}

impl Block {
    /// Opens and locks the image.
    ///
    /// # Errors
    /// The image is not a usable disk, or is in use.
    pub fn new(config: &BlockConfig, workers: Workers) -> Result<(Self, BlockHandle), ImageError> {
        let image = Image::open(Opening {
            path: config.path.clone(),
            readonly: config.readonly,
            direct: config.direct,
            format: config.format,
            is_detected: config.is_detected || config.format.is_none(),
            backing_files: config.backing_files,
            data_files: config.data_files,
            directories: config.image_dirs.clone(),
            lock: config.lock,
            is_incoming: config.is_incoming,
        })?;
        let capacity = image.size().map_err(|source| OpenError::Host {
            path: config.path.clone(),
            source,
        })?;
        let queues = config.queues.clamp(1, MAX_QUEUES as u16);
        let rings = rings(&image.kind, queues, config.queue_size);
        let opened = ImageVersion::of(&image).ok();
        let shared = Arc::new(Shared {
            image: RwLock::new(Arc::new(image)),
            base: Mutex::default(),
            gate: CopyGate::open(),
            opened,
            awaited: Mutex::default(),
            rings: RwLock::new(Arc::new(rings)),
            queues,
            queue_size: config.queue_size,
            capacity: AtomicU64::new(capacity),
            writeback: AtomicBool::new(true),
            serial: config.serial.clone(),
            sparse: config.sparse,
            limiter: config.limiter.clone(),
            counters: Counters::default(),
            on_error: config.on_error,
            is_stalled: AtomicBool::new(false),
            transport: Mutex::new(None),
        });
        let device = Self {
            shared: Arc::clone(&shared),
            workers,
            flushes: false,
            running: (0..queues).map(|_| None).collect(),
            kept: vec![Vec::new(); queues.into()],
        };
        Ok((device, BlockHandle { shared }))
    }

    fn config(&self) -> [u8; CONFIG_LEN] {
        let mut space = [0; CONFIG_LEN];
        let mut put = |at: usize, bytes: &[u8]| {
            if let Some(field) = space.get_mut(at..at + bytes.len()) {
                field.copy_from_slice(bytes);
            }
        };
        let sectors = self.shared.capacity.load(Ordering::Acquire) / SECTOR;
        put(0, &sectors.to_le_bytes());
        // seg_max: what fits in a queue beside header and status; size_max, so that a request of
        // that many is moved at once.
        let segments = u32::from(self.shared.queue_size.saturating_sub(2).clamp(1, 1022));
        let most = MAX_PART as u32 / segments.next_power_of_two();
        put(8, &most.to_le_bytes());
        put(12, &segments.to_le_bytes());
        // Logical blocks; physical ones of so many, and the optimal size of a transfer, one of them.
        let geometry = self.shared.image().geometry;
        let in_physical = 1_u32.checked_shl(geometry.exponent().into()).unwrap_or(1);
        put(20, &(geometry.logical as u32).to_le_bytes());
        put(24, &[geometry.exponent(), 0]);
        let smallest = u16::try_from(in_physical).unwrap_or(u16::MAX);
        put(26, &smallest.to_le_bytes());
        put(28, &in_physical.to_le_bytes());
        put(
            WRITEBACK_AT,
            &[self.shared.writeback.load(Ordering::Acquire).into()],
        );
        put(34, &self.shared.queues.to_le_bytes());
        put(36, &MAX_SEGMENT_SECTORS.to_le_bytes());
        put(40, &1_u32.to_le_bytes());
        // Blocks are given back by the largest logical ones, in sectors.
        put(44, &((geometry::USUAL / SECTOR) as u32).to_le_bytes());
        put(48, &MAX_SEGMENT_SECTORS.to_le_bytes());
        put(52, &1_u32.to_le_bytes());
        put(56, &[self.shared.sparse.into()]);
        space
    }
}

impl Drop for Block {
    fn drop(&mut self) {
        self.shared.gate.close(&self.shared);
    }
}

impl VirtioDevice for Block {
    fn id(&self) -> DeviceId {
        DeviceId::BLOCK
    }

    fn features(&self) -> u64 {
        let mut bits = vec![
            VIRTIO_BLK_F_SIZE_MAX,
            VIRTIO_BLK_F_SEG_MAX,
            VIRTIO_BLK_F_BLK_SIZE,
            VIRTIO_BLK_F_FLUSH,
            VIRTIO_BLK_F_TOPOLOGY,
            VIRTIO_BLK_F_CONFIG_WCE,
        ];
        if self.shared.queues > 1 {
            bits.push(VIRTIO_BLK_F_MQ);
        }
        if self.shared.image().readonly {
            bits.push(VIRTIO_BLK_F_RO);
        } else {
            bits.push(VIRTIO_BLK_F_WRITE_ZEROES);
            if self.shared.sparse {
                bits.push(VIRTIO_BLK_F_DISCARD);
            }
        }
        bits.into_iter().fold(0, |all, bit| all | 1 << bit)
    }

    fn queue_sizes(&self) -> Vec<u16> {
        vec![self.shared.queue_size; self.shared.queues.into()]
    }

    fn config_space(&self) -> Vec<u8> {
        self.config().to_vec()
    }

    fn write_config(&mut self, offset: usize, data: &[u8]) {
        if let (WRITEBACK_AT, [mode]) = (offset, data) {
            self.shared
                .writeback
                .store(*mode & 1 != 0, Ordering::Release);
        }
    }

    fn activate(&mut self, features: u64, transport: &Arc<Transport>) -> Result<(), DeviceError> {
        self.flushes = features & 1 << VIRTIO_BLK_F_FLUSH != 0;
        self.shared.is_stalled.store(false, Ordering::Release);
        *self.shared.transport.lock() = Some(Arc::clone(transport));
        Ok(())
    }

    fn start_queue(&mut self, queue: Queue) -> Result<(), DeviceError> {
        let index = queue.index();
        let transport = self.shared.transport.lock().clone();
        let at = usize::from(index);
        let (slot, kept) = (self.running.get_mut(at), self.kept.get_mut(at));
        let (Some(slot), Some(kept), Some(transport)) = (slot, kept, transport) else {
            return Err(DeviceError::NoSuchQueue(index));
        };
        let mut task = BlockTask::new(queue, &self.shared, self.flushes)
            .map_err(DeviceError::host("prepare a disk's queue"))?;
        task.try_again(std::mem::take(kept));
        *slot = Some(Running::start(&self.workers, &transport, task));
        Ok(())
    }

    fn stop_queue(&mut self, index: u16) -> Option<QueueState> {
        let at = usize::from(index);
        let running = self.running.get_mut(at)?.take()?;
        let (state, kept) = running.stop()?.finish();
        if let Some(slot) = self.kept.get_mut(at) {
            *slot = kept;
        }
        Some(state)
    }

    fn reset_queue(&mut self, index: u16) {
        let _ = self.stop_queue(index);
        if let Some(kept) = self.kept.get_mut(usize::from(index)) {
            kept.clear();
        }
    }

    fn queue_state(&self, index: u16) -> Option<QueueState> {
        let running = self.running.get(usize::from(index))?.as_ref()?;
        running.with(|task| task.state())
    }

    fn reset(&mut self) {
        *self.shared.transport.lock() = None;
        self.shared.writeback.store(true, Ordering::Release);
        self.flushes = false;
        self.kept.iter_mut().for_each(Vec::clear);
    }

    fn flush(&mut self) -> Result<(), DeviceError> {
        let image = self.shared.image();
        if image.readonly {
            return Ok(());
        }
        contained(|| image.flush()).map_err(DeviceError::host("flush a disk's image"))
    }

    fn hand_over(&mut self) {
        self.shared.image().hand_over();
    }

    fn take_over(&mut self) -> Result<(), DeviceError> {
        let taken = |error: ImageError| DeviceError::Taken(error.to_string());
        self.shared.image().take_over().map_err(taken)?;
        let capacity = self.shared.image().size();
        let capacity = capacity.map_err(DeviceError::host("report the size of an image"))?;
        if self.shared.capacity.swap(capacity, Ordering::AcqRel) != capacity
            && let Some(transport) = &*self.shared.transport.lock()
        {
            transport.config_changed();
        }
        Ok(())
    }

    fn save(&self, to: &mut Scope<'_>) -> Result<(), SaveError> {
        let kept = self.running.iter().zip(&self.kept);
        let kept = kept.map(|(running, kept)| {
            let live = running
                .as_ref()
                .and_then(|running| running.with(|task| task.kept()));
            live.unwrap_or_else(|| kept.clone())
        });
        to.put(&saved::V2 {
            capacity: self.shared.capacity.load(Ordering::Acquire),
            writeback: self.shared.writeback.load(Ordering::Acquire),
            block: Some(self.shared.image().geometry.logical),
            kept: kept.collect(),
        })
    }

    fn load(&mut self, from: &mut LoadScope<'_, '_>) -> Result<(), LoadError> {
        let saved: saved::V2 = from.take()?;
        let here = self.shared.capacity.load(Ordering::Acquire);
        if saved.capacity != here {
            let was = saved.capacity;
            return Err(from.refuse(format!(
                "the saved disk has {was} bytes, and this one has {here}"
            )));
        }
        let here = self.shared.image().geometry.logical;
        if let Some(was) = saved.block.filter(|was| *was < here) {
            return Err(from.refuse(format!(
                "the guest uses blocks of {was} bytes, and direct I/O on this host needs {here}"
            )));
        }
        let mut kept = saved.kept;
        check_kept(&kept, self.shared.queues, self.shared.queue_size)
            .map_err(|why| from.refuse(why))?;
        kept.resize(self.shared.queues.into(), Vec::new());
        self.kept = kept;
        self.shared
            .writeback
            .store(saved.writeback, Ordering::Release);
        Ok(())
    }

    fn counters(&self) -> Vec<(&'static str, u64)> {
        let counters = &self.shared.counters;
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        vec![
            ("read_bytes", get(&counters.read_bytes)),
            ("read_ops", get(&counters.read_ops)),
            ("write_bytes", get(&counters.write_bytes)),
            ("write_ops", get(&counters.write_ops)),
            ("flushes", get(&counters.flushes)),
            ("discards", get(&counters.discards)),
            ("errors", get(&counters.errors)),
        ]
    }
}

/// Whether requests can have been kept like that; their chains are read when their queue is started.
fn check_kept(kept: &[Vec<u16>], queues: u16, entries: u16) -> Result<(), String> {
    if kept.len() > queues.into() {
        let count = kept.len();
        return Err(format!(
            "{count} queues have requests to retry, and the disk has {queues} queues"
        ));
    }
    for heads in kept {
        let mut seen = HashSet::new();
        for head in heads {
            if *head >= entries {
                return Err(format!(
                    "the chain to retry at {head} is not within a queue of {entries} entries"
                ));
            }
            if !seen.insert(head) {
                return Err(format!("the chain to retry at {head} is listed twice"));
            }
        }
    }
    Ok(())
}

/// A disk, seen by the owner of the machine.
#[derive(Clone)]
pub struct BlockHandle {
    shared: Arc<Shared>,
}

impl BlockHandle {
    /// The format of the image, as it was configured or detected.
    #[must_use]
    pub fn format(&self) -> ImageFormat {
        self.shared.image().format()
    }

    /// Returns access to the content, for copies of it.
    #[must_use]
    pub fn access(&self) -> DiskAccess {
        DiskAccess::new(self)
    }

    /// Gives the disk another size, in bytes, and tells the guest.
    ///
    /// # Errors
    /// When it is no size of a disk, or the image cannot have it.
    pub fn resize(&self, size: u64) -> io::Result<()> {
        let refused = |why| Err(io::Error::new(io::ErrorKind::InvalidInput, why));
        if size == 0 || !size.is_multiple_of(self.shared.image().geometry.logical) {
            return refused(format!(
                "the size of the disk ({size} bytes) must be a positive multiple of its block size"
            ));
        }
        if self.shared.image().readonly {
            return refused("the disk is read-only".to_owned());
        }
        self.shared.image().resize(size)?;
        let there = self.shared.image().size()?;
        if there != size {
            return refused(format!(
                "the disk cannot be resized: it still has {there} bytes"
            ));
        }
        self.shared.capacity.store(size, Ordering::Release);
        if let Some(transport) = &*self.shared.transport.lock() {
            transport.config_changed();
        }
        Ok(())
    }
}

impl fmt::Debug for BlockHandle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("BlockHandle")
    }
}
