//! Links that fail: cut, silent or damaged, and processes that die at a step.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use migration::{Accept, Closer, Dial, Refusal, Stream};

use crate::{LONG_PATIENCE, PATIENCE};

/// A fault of a connection.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Fault {
    Cut,
    /// Both directions stall silently.
    Stall,
    /// One bit changes.
    Corrupt,
}

/// Which connection, in the order in which they are made, and after how many bytes.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Plan {
    pub(crate) connection: u64,
    pub(crate) after: u64,
    /// The direction, seen from the source.
    pub(crate) sending: bool,
    pub(crate) fault: Fault,
}

/// A simulated process: it dies at the step of this number and loses all its state.
#[derive(Default)]
pub(crate) struct Life {
    pub(crate) steps: AtomicU64,
    pub(crate) dies_at: Option<u64>,
    pub(crate) dead: AtomicBool,
    pub(crate) closers: Mutex<Vec<Closer>>,
}

impl Life {
    pub(crate) fn new(dies_at: Option<u64>) -> Arc<Self> {
        Arc::new(Self {
            dies_at,
            ..Self::default()
        })
    }

    pub(crate) fn step(&self) -> Result<(), Refusal> {
        let step = self.steps.fetch_add(1, Ordering::SeqCst);
        if Some(step) == self.dies_at {
            self.dead.store(true, Ordering::SeqCst);
            self.closers.lock().unwrap().iter().for_each(Closer::close);
        }
        if self.is_dead() {
            return Err(Refusal::new("dead", "the process is dead"));
        }
        Ok(())
    }

    pub(crate) fn is_dead(&self) -> bool {
        self.dead.load(Ordering::SeqCst)
    }
}

pub(crate) struct FaultyStream {
    pub(crate) inner: UnixStream,
    pub(crate) plan: Option<Plan>,
    pub(crate) passed: u64,
    pub(crate) life: Arc<Life>,
}

impl FaultyStream {
    /// How much of what passes may, and what happens then.
    pub(crate) fn pass(&mut self, sending: bool, len: usize) -> (usize, Option<Fault>) {
        let Some(plan) = self.plan.filter(|plan| plan.sending == sending) else {
            return (len, None);
        };
        let left = plan.after.saturating_sub(self.passed);
        if left >= len as u64 {
            self.passed += len as u64;
            return (len, None);
        }
        // The bytes before the fault still pass, so that it hits the exact offset of the plan.
        self.passed += left;
        (left as usize, Some(plan.fault))
    }

    pub(crate) fn fail(&mut self, fault: Fault) -> io::Error {
        if let Fault::Stall = fault {
            // A silent link never reports an error by itself. The sleep stands for the read timeout
            // that ends the wait.
            thread::sleep(PATIENCE);
            return io::ErrorKind::TimedOut.into();
        }
        let _ = self.inner.shutdown(std::net::Shutdown::Both);
        io::ErrorKind::BrokenPipe.into()
    }
}

impl Read for FaultyStream {
    fn read(&mut self, data: &mut [u8]) -> io::Result<usize> {
        match self.pass(false, data.len()) {
            (_, None) => self.inner.read(data),
            (0, Some(Fault::Corrupt)) => {
                let len = self.inner.read(data)?;
                data[0] ^= 4;
                // One bit is enough: the checksum of the frame has to find it.
                self.plan = None;
                Ok(len)
            }
            (0, Some(fault)) => Err(self.fail(fault)),
            (some, Some(_)) => self.inner.read(&mut data[..some]),
        }
    }
}

impl Write for FaultyStream {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        match self.pass(true, data.len()) {
            (_, None) => self.inner.write(data),
            (0, Some(Fault::Corrupt)) => {
                let mut wrong = data.to_vec();
                wrong[0] ^= 4;
                self.plan = None;
                self.inner.write(&wrong)
            }
            (0, Some(fault)) => Err(self.fail(fault)),
            (some, Some(_)) => self.inner.write(&data[..some]),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Stream for FaultyStream {
    fn set_patience(&self, patience: Duration) -> io::Result<()> {
        // RAM channels ask for an hour. The cap lets a broken run end within the time of a test.
        Stream::set_patience(&self.inner, patience.min(LONG_PATIENCE))
    }

    fn closer(&self) -> io::Result<Closer> {
        let closer = Stream::closer(&self.inner)?;
        self.life.closers.lock().unwrap().push(closer);
        Stream::closer(&self.inner)
    }

    fn read_closer(&self) -> io::Result<Closer> {
        let closer = Stream::closer(&self.inner)?;
        self.life.closers.lock().unwrap().push(closer);
        Stream::read_closer(&self.inner)
    }
}

pub(crate) struct TestDial {
    pub(crate) to: Mutex<Option<Sender<UnixStream>>>,
    pub(crate) count: AtomicU64,
    pub(crate) plan: Option<Plan>,
    pub(crate) life: Arc<Life>,
}

impl Dial for TestDial {
    fn dial(&self) -> io::Result<Box<dyn Stream>> {
        if self.life.is_dead() {
            return Err(io::ErrorKind::NotConnected.into());
        }
        let (near, far) = UnixStream::pair()?;
        let to = self.to.lock().unwrap();
        let sent = to.as_ref().map(|to| to.send(far));
        if !matches!(sent, Some(Ok(()))) {
            return Err(io::ErrorKind::ConnectionRefused.into());
        }
        let number = self.count.fetch_add(1, Ordering::SeqCst);
        Ok(Box::new(FaultyStream {
            inner: near,
            plan: self.plan.filter(|plan| plan.connection == number),
            passed: 0,
            life: Arc::clone(&self.life),
        }))
    }
}

pub(crate) struct TestAccept {
    pub(crate) from: Receiver<UnixStream>,
    pub(crate) life: Arc<Life>,
}

impl Accept for TestAccept {
    fn accept(&mut self, patience: Duration) -> io::Result<Option<Box<dyn Stream>>> {
        match self.from.recv_timeout(patience) {
            _ if self.life.is_dead() => Err(io::ErrorKind::NotConnected.into()),
            Ok(inner) => Ok(Some(Box::new(FaultyStream {
                inner,
                // The dialing side injects the faults, in both directions.
                plan: None,
                passed: 0,
                life: Arc::clone(&self.life),
            }))),
            Err(RecvTimeoutError::Timeout) => Ok(None),
            Err(RecvTimeoutError::Disconnected) => Err(io::ErrorKind::NotConnected.into()),
        }
    }
}
