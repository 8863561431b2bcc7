//! Console device (virtio 1.3, 5.3), with one port.

mod saved;

use std::collections::VecDeque;
use std::fmt;
use std::io::{self, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use devices::ConsoleInput;
use devices::event_loop::Interest;
use parking_lot::Mutex;
use state::{LoadError, LoadScope, SaveError, Scope};

use crate::device::{DeviceError, DeviceId, VirtioDevice};
use crate::queue::{Budget, Chain, Queue, QueueError, QueueState, Served};
use crate::transport::Transport;
use crate::worker::{QueueTask, Running, TaskEvent, TaskFlow, TaskSources, Workers};

const QUEUE_SIZE: u16 = 256;
/// `receiveq(port0)` and `transmitq(port0)`.
const RX: u16 = 0;
const TX: u16 = 1;
/// Requests of one turn.
const CHAINS: usize = 16;
/// Bytes that are passed on in one turn: a write may be a call of the host for each piece. Linux's
/// requests have 32 KiB at most; a longer one is passed on in several turns.
const TURN_OUTPUT: usize = 64 << 10;
/// Bytes of a request that are written in one go.
const PIECE: usize = 4096;
/// Bytes of an unfinished request that are passed on when its queue stops. What is beyond is lost,
/// and counted: a stop does not wait for gigabytes.
const STOP_BYTES: usize = 1 << 20;
/// Bytes of input that are kept for a guest that does not read.
const INPUT: usize = 4096;

struct Shared {
    input: Mutex<VecDeque<u8>>,
    output: Mutex<Box<dyn Write + Send>>,
    /// Called when there is room for input where there was none.
    on_room: Box<dyn Fn() + Send + Sync>,
    /// There is a driver, which can be given input.
    is_driven: AtomicBool,
    receive: Mutex<Option<Running<Receive>>>,
    bytes_in: AtomicU64,
    bytes_out: AtomicU64,
    bytes_lost: AtomicU64,
}

/// A console.
pub struct Console {
    shared: Arc<Shared>,
    workers: Workers,
    transport: Option<Arc<Transport>>,
    send: Option<Running<Transmit>>,
}

impl Console {
    /// Writes what the guest says to `output`, which should not block; what it does not take is
    /// lost and counted. `on_room` is called when the guest has read all that it was given, and
    /// when its driver is ready: until then there is no room, and input stays where it comes from.
    #[must_use]
    pub fn new(
        output: Box<dyn Write + Send>,
        on_room: impl Fn() + Send + Sync + 'static,
        workers: Workers,
    ) -> (Self, ConsoleHandle) {
        let shared = Arc::new(Shared {
            input: Mutex::default(),
            output: Mutex::new(output),
            on_room: Box::new(on_room),
            is_driven: AtomicBool::new(false),
            receive: Mutex::new(None),
            bytes_in: AtomicU64::new(0),
            bytes_out: AtomicU64::new(0),
            bytes_lost: AtomicU64::new(0),
        });
        let device = Self {
            shared: Arc::clone(&shared),
            workers,
            transport: None,
            send: None,
        };
        (device, ConsoleHandle { shared })
    }
}

impl VirtioDevice for Console {
    fn id(&self) -> DeviceId {
        DeviceId::CONSOLE
    }

    fn features(&self) -> u64 {
        0
    }

    fn queue_sizes(&self) -> Vec<u16> {
        vec![QUEUE_SIZE; 2]
    }

    fn config_space(&self) -> Vec<u8> {
        Vec::new()
    }

    fn activate(&mut self, _: u64, transport: &Arc<Transport>) -> Result<(), DeviceError> {
        self.transport = Some(Arc::clone(transport));
        Ok(())
    }

    fn start_queue(&mut self, queue: Queue) -> Result<(), DeviceError> {
        let index = queue.index();
        let missing = || DeviceError::NoSuchQueue(index);
        let transport = self.transport.as_ref().ok_or_else(missing)?;
        let shared = Arc::clone(&self.shared);
        match index {
            RX => {
                let task = Receive {
                    queue,
                    shared: Arc::clone(&shared),
                };
                // Locked meanwhile: input finds either no task, and is there when it starts, or one.
                let mut receive = shared.receive.lock();
                *receive = Some(Running::start(&self.workers, transport, task));
                drop(receive);
                if !shared.is_driven.swap(true, Ordering::AcqRel) {
                    (shared.on_room)();
                }
            }
            TX => {
                let task = Transmit {
                    queue,
                    shared,
                    current: None,
                };
                self.send = Some(Running::start(&self.workers, transport, task));
            }
            _ => return Err(missing()),
        }
        Ok(())
    }

    fn stop_queue(&mut self, index: u16) -> Option<QueueState> {
        match index {
            RX => {
                // The lock is free before `stop` waits for the task: `receive` of the host's side
                // takes it, too.
                let running = self.shared.receive.lock().take()?;
                Some(running.stop()?.queue.state())
            }
            TX => Some(self.send.take()?.stop()?.finish()),
            _ => None,
        }
    }

    fn queue_state(&self, index: u16) -> Option<QueueState> {
        match index {
            RX => self
                .shared
                .receive
                .lock()
                .as_ref()?
                .with(|task| task.queue.state()),
            TX => self.send.as_ref()?.with(|task| task.queue.state()),
            _ => None,
        }
    }

    fn reset(&mut self) {
        self.transport = None;
        self.shared.is_driven.store(false, Ordering::Release);
        self.shared.input.lock().clear();
    }

    fn save(&self, to: &mut Scope<'_>) -> Result<(), SaveError> {
        let input = self.shared.input.lock().iter().copied().collect();
        to.put(&saved::V1 { input })
    }

    fn load(&mut self, from: &mut LoadScope<'_, '_>) -> Result<(), LoadError> {
        let saved::V1 { input } = from.take()?;
        if input.len() > INPUT {
            let len = input.len();
            return Err(from.refuse(format!("{len} bytes of input are more than {INPUT}")));
        }
        *self.shared.input.lock() = input.into();
        Ok(())
    }

    fn counters(&self) -> Vec<(&'static str, u64)> {
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        vec![
            ("bytes_in", get(&self.shared.bytes_in)),
            ("bytes_lost", get(&self.shared.bytes_lost)),
            ("bytes_out", get(&self.shared.bytes_out)),
        ]
    }
}

/// Gives the guest its input.
struct Receive {
    queue: Queue,
    shared: Arc<Shared>,
}

impl QueueTask for Receive {
    fn watch(&mut self, sources: &mut TaskSources<'_, '_>) -> io::Result<()> {
        sources.watch(Arc::clone(self.queue.kick()), 0, Interest::Read)
    }

    fn call(&mut self, _: TaskEvent, _: &mut TaskSources<'_, '_>) -> Result<TaskFlow, QueueError> {
        let Self { queue, shared } = self;
        let mut input = shared.input.lock();
        if input.is_empty() {
            // Buffers without input need no kick: input wakes the task.
            return Ok(TaskFlow::Wait);
        }
        let flow = queue.turn(Budget::new(CHAINS), |queue, chain| {
            // Input of no bytes would be an empty answer. The chain waits for the next input.
            if input.is_empty() {
                return Ok(Served::NotYet);
            }
            let len = chain.writable_len().min(input.len());
            let bytes: Vec<u8> = input.drain(..len).collect();
            chain.write(0, &bytes)?;
            // `len` is at most INPUT.
            queue.push(chain.head(), len as u32)?;
            shared.bytes_in.fetch_add(len as u64, Ordering::Relaxed);
            Ok(Served::Bytes(len as u64))
        })?;
        let all_read = input.is_empty();
        // `on_room` may give more input at once, which takes the same lock.
        drop(input);
        if all_read {
            (shared.on_room)();
        }
        Ok(flow)
    }
}

/// Passes on what the guest writes.
struct Transmit {
    queue: Queue,
    shared: Arc<Shared>,
    /// The chain that was popped last, and how many of its bytes were passed on.
    current: Option<(Chain, usize)>,
}

impl Transmit {
    /// Passes on up to `left` bytes of the request in hand, if there is one.
    fn step(&mut self, left: &mut usize) -> Result<(), QueueError> {
        let Some((chain, mut at)) = self.current.take() else {
            return Ok(());
        };
        let mut piece = [0; PIECE];
        let whole = chain.readable_len();
        while at < whole {
            if *left == 0 {
                // The rest of the write is for the next turn: a request of 4 GiB must not hold the
                // thread.
                self.current = Some((chain, at));
                return Ok(());
            }
            let len = PIECE.min(whole - at).min(*left);
            let bytes = piece.get_mut(..len).unwrap_or_default();
            chain.read(at, bytes)?;
            self.pass_on(bytes);
            at += len;
            *left -= len;
        }
        self.queue.push(chain.head(), 0)
    }

    /// Ends the request that was begun, and says where the queue is.
    fn finish(mut self) -> QueueState {
        if self.current.is_some()
            && let Err(error) = self.end_current()
        {
            self.queue.broken(&error);
        }
        self.queue.state()
    }

    fn end_current(&mut self) -> Result<(), QueueError> {
        let mut left = STOP_BYTES;
        self.step(&mut left)?;
        if let Some((chain, at)) = self.current.take() {
            let lost = chain.readable_len().saturating_sub(at);
            let counter = &self.shared.bytes_lost;
            counter.fetch_add(lost as u64, Ordering::Relaxed);
            self.queue.push(chain.head(), 0)?;
        }
        self.queue.notify()
    }

    fn pass_on(&self, bytes: &[u8]) {
        let count = |counter: &AtomicU64| counter.fetch_add(bytes.len() as u64, Ordering::Relaxed);
        match self.shared.output.lock().write_all(bytes) {
            Ok(()) => count(&self.shared.bytes_out),
            Err(_) => count(&self.shared.bytes_lost),
        };
    }
}

impl QueueTask for Transmit {
    fn watch(&mut self, sources: &mut TaskSources<'_, '_>) -> io::Result<()> {
        sources.watch(Arc::clone(self.queue.kick()), 0, Interest::Read)
    }

    fn call(&mut self, _: TaskEvent, _: &mut TaskSources<'_, '_>) -> Result<TaskFlow, QueueError> {
        let _ = self.queue.kick().read();
        let (mut budget, mut left) = (Budget::new(CHAINS), TURN_OUTPUT);
        while !budget.is_spent() && left > 0 {
            if self.current.is_none() {
                let Some(chain) = self.queue.pop()? else {
                    self.queue.notify()?;
                    return Ok(match self.queue.enable_kicks()? {
                        true => TaskFlow::Again,
                        false => TaskFlow::Wait,
                    });
                };
                budget.spend_chain(chain.descriptors());
                self.current = Some((chain, 0));
            }
            self.step(&mut left)?;
        }
        self.queue.notify()?;
        Ok(TaskFlow::Again)
    }
}

/// A console, seen by the owner of the machine: what takes its input.
#[derive(Clone)]
pub struct ConsoleHandle {
    shared: Arc<Shared>,
}

impl ConsoleInput for ConsoleHandle {
    fn room(&self) -> usize {
        if !self.shared.is_driven.load(Ordering::Acquire) {
            return 0;
        }
        INPUT.saturating_sub(self.shared.input.lock().len())
    }

    fn receive(&self, bytes: &[u8]) -> usize {
        let mut input = self.shared.input.lock();
        let is_driven = self.shared.is_driven.load(Ordering::Acquire);
        // Looked at again under the lock: two callers may have seen the same room.
        let room = if is_driven { INPUT } else { 0 }.saturating_sub(input.len());
        let taken = bytes.get(..room).unwrap_or(bytes);
        input.extend(taken);
        drop(input);
        // Behind the input's lock, which the task takes when it runs: it finds the bytes.
        if let Some(running) = &*self.shared.receive.lock() {
            running.wake();
        }
        taken.len()
    }
}

impl fmt::Debug for ConsoleHandle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("ConsoleHandle")
    }
}
