//! Socket device (virtio 1.3, 5.10): streams between ports of the guest and unix sockets of the
//! host.
//!
//! The device listens on a unix socket of the host. A client sends `CONNECT port` and a line feed. When
//! the guest accepts on that port, the client gets `OK port`, and the connection carries the stream. A
//! guest that connects to a port of the host (CID 2) reaches the listener at the same path with `_port`
//! appended. This is the convention of Firecracker and Cloud Hypervisor.

mod connection;
mod muxer;
mod packet;
mod saved;

use std::io;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use devices::Listening;
use state::{LoadError, LoadScope, SaveError, Scope};

use self::muxer::Muxer;
use crate::device::{DeviceError, DeviceId, VirtioDevice};
use crate::queue::{Queue, QueueState};
use crate::transport::Transport;
use crate::worker::{Running, Workers};

const QUEUE_SIZE: u16 = 256;
const RX: usize = 0;
const TX: usize = 1;
const EVENT: usize = 2;
const QUEUES: usize = 3;

/// The device's socket cannot be made.
#[derive(Debug, thiserror::Error)]
#[error("the socket {} cannot be created: {source}", path.display())]
pub struct VsockError {
    path: PathBuf,
    source: io::Error,
}

/// Connections at a time of a guest and its clients together, established or not. Each holds a
/// descriptor of the process.
pub const MAX_CONNECTIONS: usize = 256;

/// Limits of a guest and its clients together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct VsockLimits {
    /// [`MAX_CONNECTIONS`], and less in tests.
    connections: usize,
    /// How long a client may take to say where it wants to go, and the guest to accept it. Linux
    /// waits 2 s itself (`VSOCK_DEFAULT_CONNECT_TIMEOUT`).
    handshake: Duration,
}

impl Default for VsockLimits {
    fn default() -> Self {
        Self {
            connections: MAX_CONNECTIONS,
            handshake: Duration::from_secs(10),
        }
    }
}

#[derive(Default)]
struct Counters {
    rx_packets: AtomicU64,
    rx_bytes: AtomicU64,
    tx_packets: AtomicU64,
    tx_bytes: AtomicU64,
}

enum Task {
    Idle(Box<Muxer>),
    Running(Running<Muxer>),
    /// The loop that it ran on has dropped it.
    Gone,
}

/// A vsock device.
pub struct Vsock {
    cid: u64,
    socket: Listening,
    listener: Arc<UnixListener>,
    workers: Workers,
    transport: Option<Arc<Transport>>,
    task: Task,
    counters: Arc<Counters>,
}

impl Vsock {
    /// Creates a device for the guest with this CID, and listens at `path`. Replaces a socket without a
    /// listener.
    ///
    /// # Errors
    /// The socket cannot be created.
    pub fn new(cid: u64, path: &Path, workers: Workers) -> Result<Self, VsockError> {
        Self::on(cid, Listening::bind(path), path, workers)
    }

    /// Checks that [`Vsock::new`] could listen at a path. Nothing is made.
    ///
    /// # Errors
    /// As for [`Vsock::new`].
    pub fn check(path: &Path) -> Result<(), VsockError> {
        Listening::check(path).map_err(|source| VsockError {
            path: path.to_owned(),
            source,
        })
    }

    /// Like [`Vsock::new`], for an incoming migration: the source keeps `path` until the device takes over.
    ///
    /// # Errors
    /// The socket cannot be created.
    pub fn incoming(cid: u64, path: &Path, workers: Workers) -> Result<Self, VsockError> {
        Self::on(cid, Listening::bind_beside(path), path, workers)
    }

    fn on(
        cid: u64,
        bound: io::Result<Listening>,
        path: &Path,
        workers: Workers,
    ) -> Result<Self, VsockError> {
        let refused = |source| VsockError {
            path: path.to_owned(),
            source,
        };
        let socket = bound.map_err(refused)?;
        // The muxer moves to another thread and back, while the path belongs to the device.
        let listener = socket.listener().try_clone().map_err(refused)?;
        let (listener, counters) = (Arc::new(listener), Arc::<Counters>::default());
        let limits = VsockLimits::default();
        let (near, counted) = (Arc::clone(&listener), Arc::clone(&counters));
        let muxer = Muxer::new(cid, path, near, counted, limits);
        Ok(Self {
            cid,
            socket,
            listener,
            workers,
            transport: None,
            task: Task::Idle(Box::new(muxer)),
            counters,
        })
    }

    /// Returns a muxer without connections.
    fn fresh(&self) -> Box<Muxer> {
        let (listener, counters) = (Arc::clone(&self.listener), Arc::clone(&self.counters));
        let limits = VsockLimits::default();
        Box::new(Muxer::new(
            self.cid,
            self.socket.path(),
            listener,
            counters,
            limits,
        ))
    }

    /// Takes the muxer from its loop if it has no queue any more.
    fn rest(&mut self) {
        if let Task::Running(running) = &self.task
            && running.with(|muxer| muxer.is_idle()) != Some(false)
            && let Task::Running(running) = std::mem::replace(&mut self.task, Task::Gone)
            // The connections stay in the muxer: a pause must not break the guest's streams.
            && let Some(muxer) = running.stop()
        {
            self.task = Task::Idle(Box::new(muxer));
        }
    }
}

impl VirtioDevice for Vsock {
    fn id(&self) -> DeviceId {
        DeviceId::VSOCK
    }

    fn features(&self) -> u64 {
        0
    }

    fn queue_sizes(&self) -> Vec<u16> {
        vec![QUEUE_SIZE; QUEUES]
    }

    fn config_space(&self) -> Vec<u8> {
        self.cid.to_le_bytes().to_vec()
    }

    fn activate(&mut self, _: u64, transport: &Arc<Transport>) -> Result<(), DeviceError> {
        self.transport = Some(Arc::clone(transport));
        Ok(())
    }

    fn start_queue(&mut self, queue: Queue) -> Result<(), DeviceError> {
        let index = queue.index();
        let missing = || DeviceError::NoSuchQueue(index);
        let transport = self.transport.clone().ok_or_else(missing)?;
        match &self.task {
            Task::Running(running) => {
                let there = running.with(|muxer| muxer.put(queue));
                // The task watches the new queue's kick, and looks for what is in the queue
                // already.
                running.wake();
                there.filter(|there| *there).ok_or_else(missing)?;
            }
            Task::Idle(_) | Task::Gone => {
                let mut muxer = match std::mem::replace(&mut self.task, Task::Gone) {
                    Task::Idle(muxer) => muxer,
                    _ => self.fresh(),
                };
                if !muxer.put(queue) {
                    self.task = Task::Idle(muxer);
                    return Err(missing());
                }
                self.task = Task::Running(Running::start(&self.workers, &transport, *muxer));
            }
        }
        Ok(())
    }

    fn stop_queue(&mut self, index: u16) -> Option<QueueState> {
        let Task::Running(running) = &self.task else {
            return None;
        };
        let state = running.with(|muxer| muxer.take(index)).flatten();
        self.rest();
        state
    }

    fn queue_state(&self, index: u16) -> Option<QueueState> {
        match &self.task {
            Task::Running(running) => running.with(|muxer| muxer.state(index)).flatten(),
            Task::Idle(_) | Task::Gone => None,
        }
    }

    fn reset(&mut self) {
        self.transport = None;
        match &mut self.task {
            Task::Idle(muxer) => {
                muxer.forget_all();
                muxer.reset_guest = false;
            }
            Task::Running(_) | Task::Gone => self.task = Task::Idle(self.fresh()),
        }
    }

    fn take_over(&mut self) -> Result<(), DeviceError> {
        let taken = self.socket.take_over();
        taken.map_err(DeviceError::host(
            "bind a vsock device's socket to its path",
        ))
    }

    fn save(&self, to: &mut Scope<'_>) -> Result<(), SaveError> {
        to.put(&saved::V1 { cid: self.cid })
    }

    fn load(&mut self, from: &mut LoadScope<'_, '_>) -> Result<(), LoadError> {
        // A VM made from a snapshot may have another CID than the one that was saved: the guest reads it
        // again when it gets the reset event.
        let saved::V1 { .. } = from.take()?;
        let mut muxer = self.fresh();
        // The connections were to sockets of another host. The guest's driver drops them when it
        // gets the reset event (virtio 1.3, 5.10.6.7).
        muxer.reset_guest = true;
        self.task = Task::Idle(muxer);
        Ok(())
    }

    fn counters(&self) -> Vec<(&'static str, u64)> {
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        vec![
            ("rx_packets", get(&self.counters.rx_packets)),
            ("rx_bytes", get(&self.counters.rx_bytes)),
            ("tx_packets", get(&self.counters.tx_packets)),
            ("tx_bytes", get(&self.counters.tx_bytes)),
        ]
    }
}
