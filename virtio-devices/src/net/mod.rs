//! Network device (virtio 1.3, 5.1), on a tap of the host.
//!
//! Each pair of queues has a queue of the tap: frames to the guest are copied once, to where the
//! driver has room; frames from the guest are sent from where they are.

mod control;
mod saved;
mod tap;
mod transfer;

use std::fmt;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU16, AtomicU64, Ordering};

use parking_lot::Mutex;
use state::{LoadError, LoadScope, SaveError, Scope};
use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_CSUM, VIRTIO_NET_F_CTRL_GUEST_OFFLOADS, VIRTIO_NET_F_CTRL_VQ,
    VIRTIO_NET_F_GUEST_ANNOUNCE, VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_ECN,
    VIRTIO_NET_F_GUEST_TSO4, VIRTIO_NET_F_GUEST_TSO6, VIRTIO_NET_F_HOST_ECN,
    VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_HOST_TSO6, VIRTIO_NET_F_MAC, VIRTIO_NET_F_MQ,
    VIRTIO_NET_F_MRG_RXBUF, VIRTIO_NET_F_MTU, VIRTIO_NET_F_STATUS, VIRTIO_NET_S_ANNOUNCE,
    VIRTIO_NET_S_LINK_UP,
};

use self::control::ControlQueue;
use self::tap::{HEADER_LEN, Tap};
pub use self::tap::{TapAddress, TapError, TapIp};
use self::transfer::{Receive, Send, Takes};
use crate::device::{DeviceError, DeviceId, VirtioDevice};
use crate::queue::{Queue, QueueState};
use crate::rate_limiter::{RateLimits, SharedLimiter};
use crate::transport::Transport;
use crate::worker::{Running, Workers};

/// Pairs of queues; with the queue for control they are the queues that a device can have.
pub const MAX_PAIRS: u16 = 15;
const CONTROL_SIZE: u16 = 64;
/// Bytes of device configuration space.
const CONFIG_LEN: usize = 12;

/// The tap of a network interface.
#[derive(Debug)]
pub enum TapSource {
    /// The tap with this name, created if it does not exist.
    Name(String),
    /// Descriptors of a tap that another program opened, one for each queue pair.
    Descriptors(Vec<OwnedFd>),
}

/// A network interface, as it is wanted.
#[derive(Debug)]
pub struct NetConfig {
    /// The host's side.
    pub tap: TapSource,
    /// The host's side address.
    pub address: TapAddress,
    /// The guest's hardware address.
    pub mac: [u8; 6],
    /// The largest packet that the guest should send.
    pub mtu: Option<u16>,
    /// Pairs of queues, 1 to 15.
    pub pairs: u16,
    /// Entries of each queue, a power of two.
    pub queue_size: u16,
    /// The guest may leave checksums to the host, and takes frames without them.
    pub offload_csum: bool,
    /// The guest may leave the cutting of segments to the host, and takes uncut ones.
    pub offload_tso: bool,
    /// Limits of each direction.
    pub limits: RateLimits,
}

#[derive(Default)]
struct Counters {
    rx_bytes: AtomicU64,
    rx_frames: AtomicU64,
    rx_drops: AtomicU64,
    tx_bytes: AtomicU64,
    tx_frames: AtomicU64,
    tx_drops: AtomicU64,
}

/// State that the queues of an interface share.
struct Shared {
    taps: Vec<Arc<Tap>>,
    mac: Mutex<[u8; 6]>,
    /// Pairs that the driver uses.
    pairs: AtomicU16,
    /// The offloads that the driver accepts, once it or a saved state has set them. An empty set counts.
    offloads: Mutex<Option<u32>>,
    tap_settings: Mutex<TapSettings>,
    announce: AtomicBool,
    rx_limiter: SharedLimiter,
    tx_limiter: SharedLimiter,
    counters: Counters,
    /// Set while a driver uses the interface, with what was negotiated.
    driver: Mutex<Option<(Arc<Transport>, u64)>>,
}

/// Settings of the tap, as the host has them. Absent before they were set, and if that failed.
#[derive(Default)]
struct TapSettings {
    /// The number of pairs whose queues get frames.
    pairs: Option<u16>,
    offloads: Option<u32>,
}

impl Shared {
    fn new(taps: Vec<Tap>, mac: [u8; 6], limits: RateLimits) -> Self {
        Self {
            taps: taps.into_iter().map(Arc::new).collect(),
            mac: Mutex::new(mac),
            pairs: AtomicU16::new(1),
            offloads: Mutex::new(None),
            tap_settings: Mutex::default(),
            announce: AtomicBool::new(false),
            rx_limiter: SharedLimiter::new(limits),
            tx_limiter: SharedLimiter::new(limits),
            counters: Counters::default(),
            driver: Mutex::new(None),
        }
    }

    /// Frames come to the queues of the first `pairs` pairs.
    fn set_pairs(&self, pairs: u16) {
        self.pairs.store(pairs, Ordering::Release);
        let mut settings = self.tap_settings.lock();
        // Each change takes a lock of the host's network, and detaching a queue waits for a grace period
        // (`synchronize_net`). A load in the stop of a migration mostly changes none: the dry run did.
        let changed = match settings.pairs {
            Some(is) => is.min(pairs)..is.max(pairs),
            None => 0..u16::MAX,
        };
        let mut is_set = true;
        for (index, tap) in (0_u16..).zip(&self.taps) {
            if changed.contains(&index)
                && let Err(error) = tap.attach(index < pairs)
            {
                tracing::warn!(%error, tap = tap.name(), "cannot enable or disable a queue of a \
                                                          tap");
                is_set = false;
            }
        }
        settings.pairs = is_set.then_some(pairs);
    }

    fn set_offloads(&self, flags: u32) -> bool {
        *self.offloads.lock() = Some(flags);
        let mut settings = self.tap_settings.lock();
        if settings.offloads == Some(flags) {
            return true;
        }
        // Of the interface, whichever of its queues is asked.
        let first = self.taps.first();
        let set = first.map_or(Ok(()), |tap| tap.set_offloads(flags));
        settings.offloads = set.is_ok().then_some(flags);
        set.inspect_err(|error| tracing::warn!(%error, "cannot change the offloads of a tap"))
            .is_ok()
    }

    /// Forgets the driver, but for the settings of the tap.
    fn forget_driver(&self, first_mac: [u8; 6]) {
        *self.driver.lock() = None;
        *self.mac.lock() = first_mac;
        self.announce.store(false, Ordering::Release);
    }
}

enum Task {
    Receive(Running<Receive>),
    Send(Running<Send>),
    Control(Running<ControlQueue>),
}

/// A network interface.
pub struct Net {
    shared: Arc<Shared>,
    first_mac: [u8; 6],
    mtu: Option<u16>,
    queue_size: u16,
    offload_csum: bool,
    offload_tso: bool,
    workers: Workers,
    tasks: Vec<Option<Task>>,
}

impl Net {
    /// Opens the tap and brings it up. A tap that another program opened is left as it is, except for the
    /// settings that the configuration names.
    ///
    /// # Errors
    /// The tap cannot be used.
    pub fn new(config: NetConfig, workers: Workers) -> Result<(Self, NetHandle), TapError> {
        let (taps, is_ours) = match config.tap {
            TapSource::Name(name) => (Tap::open(&name, config.pairs.clamp(1, MAX_PAIRS))?, true),
            TapSource::Descriptors(descriptors) => (Tap::adopt(descriptors)?, false),
        };
        // All queues are of one interface, which is set up once.
        if let Some(first) = taps.first()
            && (is_ours || config.address.is_given())
        {
            first.set_up(&config.address)?;
        }
        // Receive and transmit of each pair, and the control queue behind them (5.1.2).
        let queues = taps.len() * 2 + 1;
        let shared = Arc::new(Shared::new(taps, config.mac, config.limits));
        shared.set_pairs(1);
        let device = Self {
            shared: Arc::clone(&shared),
            first_mac: config.mac,
            mtu: config.mtu,
            queue_size: config.queue_size,
            offload_csum: config.offload_csum,
            offload_tso: config.offload_tso,
            workers,
            tasks: (0..queues).map(|_| None).collect(),
        };
        Ok((device, NetHandle { shared }))
    }

    fn config(&self) -> [u8; CONFIG_LEN] {
        let mut space = [0; CONFIG_LEN];
        let announce = self.shared.announce.load(Ordering::Acquire);
        let status = VIRTIO_NET_S_LINK_UP | if announce { VIRTIO_NET_S_ANNOUNCE } else { 0 };
        let pairs = u16::try_from(self.shared.taps.len()).unwrap_or(1);
        space[..6].copy_from_slice(&*self.shared.mac.lock());
        space[6..8].copy_from_slice(&(status as u16).to_le_bytes());
        space[8..10].copy_from_slice(&pairs.to_le_bytes());
        space[10..].copy_from_slice(&self.mtu.unwrap_or(0).to_le_bytes());
        space
    }
}

impl VirtioDevice for Net {
    fn id(&self) -> DeviceId {
        DeviceId::NET
    }

    fn features(&self) -> u64 {
        let mut bits = vec![
            VIRTIO_NET_F_MAC,
            VIRTIO_NET_F_MRG_RXBUF,
            VIRTIO_NET_F_STATUS,
            VIRTIO_NET_F_CTRL_VQ,
            VIRTIO_NET_F_GUEST_ANNOUNCE,
        ];
        if self.offload_csum {
            bits.extend([
                VIRTIO_NET_F_CSUM,
                VIRTIO_NET_F_GUEST_CSUM,
                VIRTIO_NET_F_CTRL_GUEST_OFFLOADS,
            ]);
        }
        // 5.1.3.1: without checksums there is no segmentation.
        if self.offload_csum && self.offload_tso {
            bits.extend([
                VIRTIO_NET_F_HOST_TSO4,
                VIRTIO_NET_F_HOST_TSO6,
                VIRTIO_NET_F_HOST_ECN,
                VIRTIO_NET_F_GUEST_TSO4,
                VIRTIO_NET_F_GUEST_TSO6,
                VIRTIO_NET_F_GUEST_ECN,
            ]);
        }
        if self.mtu.is_some() {
            bits.push(VIRTIO_NET_F_MTU);
        }
        if self.shared.taps.len() > 1 {
            bits.push(VIRTIO_NET_F_MQ);
        }
        bits.into_iter().fold(0, |all, bit| all | 1 << bit)
    }

    fn queue_sizes(&self) -> Vec<u16> {
        let mut sizes = vec![self.queue_size; self.shared.taps.len() * 2];
        sizes.push(CONTROL_SIZE);
        sizes
    }

    fn config_space(&self) -> Vec<u8> {
        self.config().to_vec()
    }

    fn activate(&mut self, features: u64, transport: &Arc<Transport>) -> Result<(), DeviceError> {
        let was = self
            .shared
            .driver
            .lock()
            .replace((Arc::clone(transport), features));
        // After a load, or a resume, the driver's last choice by the control queue holds and not
        // what it negotiated at first.
        if was.is_none() && self.shared.offloads.lock().is_none() {
            self.shared.set_offloads(control::offloads(features));
        }
        Ok(())
    }

    fn start_queue(&mut self, queue: Queue) -> Result<(), DeviceError> {
        let index = queue.index();
        let Some((transport, features)) = self.shared.driver.lock().clone() else {
            return Err(DeviceError::NoSuchQueue(index));
        };
        let has = |bit: u32| features & 1 << bit != 0;
        let takes = Takes {
            mergeable: has(VIRTIO_NET_F_MRG_RXBUF),
            checksums: has(VIRTIO_NET_F_GUEST_CSUM),
        };
        let host = DeviceError::host;
        let (workers, shared) = (&self.workers, &self.shared);
        let tap = shared.taps.get(usize::from(index / 2)).map(Arc::clone);
        // Without several pairs in use the queue for control is the third (5.1.2).
        let one_pair = !has(VIRTIO_NET_F_MQ);
        let is_control = usize::from(index) == shared.taps.len() * 2 || one_pair && index == 2;
        let task = match (tap, index % 2) {
            _ if is_control => {
                let task = ControlQueue::new(queue, shared);
                Task::Control(Running::start(workers, &transport, task))
            }
            (Some(tap), 0) => {
                let task = Receive::new(queue, tap, shared, takes);
                let task = task.map_err(host("prepare an interface's queue"))?;
                Task::Receive(Running::start(workers, &transport, task))
            }
            (Some(tap), _) => {
                let task = Send::new(queue, tap, shared);
                let task = task.map_err(host("prepare an interface's queue"))?;
                Task::Send(Running::start(workers, &transport, task))
            }
            (None, _) => return Err(DeviceError::NoSuchQueue(index)),
        };
        match self.tasks.get_mut(usize::from(index)) {
            Some(slot) => *slot = Some(task),
            None => return Err(DeviceError::NoSuchQueue(index)),
        }
        Ok(())
    }

    fn stop_queue(&mut self, index: u16) -> Option<QueueState> {
        match self.tasks.get_mut(usize::from(index))?.take()? {
            Task::Receive(running) => Some(running.stop()?.state()),
            Task::Send(running) => Some(running.stop()?.state()),
            Task::Control(running) => Some(running.stop()?.state()),
        }
    }

    fn queue_state(&self, index: u16) -> Option<QueueState> {
        match self.tasks.get(usize::from(index))?.as_ref()? {
            Task::Receive(running) => running.with(|task| task.state()),
            Task::Send(running) => running.with(|task| task.state()),
            Task::Control(running) => running.with(|task| task.state()),
        }
    }

    fn reset(&mut self) {
        self.shared.forget_driver(self.first_mac);
        self.shared.set_pairs(1);
        // The tap outlives the driver. With the old flags a firmware that comes next would get
        // frames that it cannot read.
        self.shared.set_offloads(0);
        *self.shared.offloads.lock() = None;
    }

    fn prepare_load(&mut self) {
        self.shared.forget_driver(self.first_mac);
        // The tap keeps its settings, such as those of the dry run, and the load changes what differs.
        *self.shared.offloads.lock() = None;
    }

    fn save(&self, to: &mut Scope<'_>) -> Result<(), SaveError> {
        to.put(&saved::V1 {
            mac: *self.shared.mac.lock(),
            pairs: self.shared.pairs.load(Ordering::Acquire),
            offloads: self.shared.offloads.lock().unwrap_or(0),
            announce: self.shared.announce.load(Ordering::Acquire),
        })
    }

    fn load(&mut self, from: &mut LoadScope<'_, '_>) -> Result<(), LoadError> {
        let saved: saved::V1 = from.take()?;
        let here = self.shared.taps.len();
        if saved.pairs == 0 || usize::from(saved.pairs) > here {
            let was = saved.pairs;
            return Err(from.refuse(format!(
                "the saved interface uses {was} queue pairs, and this one has {here}"
            )));
        }
        if saved.offloads & !control::ALL_OFFLOADS != 0 {
            return Err(from.refuse(format!("unknown offloads {:#x}", saved.offloads)));
        }
        *self.shared.mac.lock() = saved.mac;
        self.shared
            .announce
            .store(saved.announce, Ordering::Release);
        self.shared.set_pairs(saved.pairs);
        // Before the guest runs here: it would get frames that its driver cannot take, or send some
        // that the host refuses.
        if !self.shared.set_offloads(saved.offloads) {
            return Err(from.refuse("the tap lacks offloads that the guest's driver negotiated"));
        }
        Ok(())
    }

    fn counters(&self) -> Vec<(&'static str, u64)> {
        let counters = &self.shared.counters;
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        vec![
            ("rx_bytes", get(&counters.rx_bytes)),
            ("rx_frames", get(&counters.rx_frames)),
            ("rx_drops", get(&counters.rx_drops)),
            ("tx_bytes", get(&counters.tx_bytes)),
            ("tx_frames", get(&counters.tx_frames)),
            ("tx_drops", get(&counters.tx_drops)),
        ]
    }
}

/// A network interface, seen by the owner of the machine.
#[derive(Clone)]
pub struct NetHandle {
    shared: Arc<Shared>,
}

impl NetHandle {
    /// The name of the tap.
    #[must_use]
    pub fn tap(&self) -> Option<&str> {
        self.shared.taps.first().map(|tap| tap.name())
    }

    /// Tells the network where the guest is now, as after a migration: by a frame of ours (RARP,
    /// RFC 903), and by asking the driver to announce its addresses, if it can.
    pub fn announce(&self) {
        let mac = *self.shared.mac.lock();
        if let Some(tap) = self.shared.taps.first()
            && let Err(error) = tap.write_bytes(&rarp(mac))
        {
            tracing::warn!(%error, "cannot announce a guest to the network");
        }
        if let Some((transport, features)) = &*self.shared.driver.lock()
            && features & 1 << VIRTIO_NET_F_GUEST_ANNOUNCE != 0
        {
            self.shared.announce.store(true, Ordering::Release);
            // The driver reads the status and acknowledges by the control queue; `announce` stays
            // set until then, also over a migration.
            transport.config_changed();
        }
    }
}

impl fmt::Debug for NetHandle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "NetHandle({:?})", self.tap())
    }
}

/// A broadcast from the guest that teaches switches its port, behind an empty header.
fn rarp(mac: [u8; 6]) -> [u8; HEADER_LEN + 60] {
    let mut frame = [0; HEADER_LEN + 60];
    let mut at = HEADER_LEN;
    let mut put = |bytes: &[u8]| {
        if let Some(field) = frame.get_mut(at..at + bytes.len()) {
            field.copy_from_slice(bytes);
        }
        at += bytes.len();
    };
    put(&[0xff; 6]);
    put(&mac);
    // RARP; Ethernet, IPv4, their lengths; "request reverse".
    put(&[0x80, 0x35, 0, 1, 8, 0, 6, 4, 0, 3]);
    put(&mac);
    put(&[0; 4]);
    put(&mac);
    frame
}
