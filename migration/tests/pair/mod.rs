//! A destination of memory alone, and a link to it that the test cuts and mends.

#![allow(
    clippy::unwrap_used,
    dead_code,
    reason = "tests, each of which uses a part"
)]

use std::fs::File;
use std::io;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::{Duration, Instant};

use memory::RamBlock;
use migration::testing::{blocks, ram};
use migration::{
    Accept, Block, Destination, Dial, Fate, Host, Journal, NoJournal, Offer, Refusal, StartFailure,
    Stream,
};
use uuid::Uuid;

pub(crate) const PAGES: usize = 3000;
pub(crate) const PATIENCE: Duration = Duration::from_secs(20);

/// Memory at the destination, once it is there.
pub(crate) type Shared = Arc<OnceLock<Arc<RamBlock>>>;

/// The destination of the guest; the test sees its memory.
pub(crate) struct Place(pub(crate) Shared);

struct Machine(Arc<RamBlock>);

impl Destination for Machine {
    fn blocks(&self) -> Vec<Block> {
        blocks(&self.0)
    }

    fn dry_run(&mut self, _: &[u8]) -> Result<(), Refusal> {
        Ok(())
    }

    fn load(&mut self, _: &[u8]) -> Result<(), Refusal> {
        Ok(())
    }

    fn take_over(&mut self) -> Result<(), Refusal> {
        Ok(())
    }

    fn start(&mut self, _: Duration, _: bool) -> Result<Instant, StartFailure> {
        Ok(Instant::now())
    }

    fn discard(&mut self) {}
}

impl Host for Place {
    fn prepare(&self, _: Uuid, _: &Offer, _: Vec<File>) -> Result<Box<dyn Destination>, Refusal> {
        let ram = self.0.get_or_init(|| ram(PAGES));
        Ok(Box::new(Machine(Arc::clone(ram))))
    }

    fn journal(&self, _: Uuid, _: &str) -> io::Result<Box<dyn Journal>> {
        Ok(Box::new(NoJournal))
    }

    fn fate(&self, _: Uuid) -> Fate {
        Fate::Unknown
    }
}

/// Connects to an [`Acceptor`], unless the way is cut.
pub(crate) struct Dialer {
    to: Mutex<Sender<UnixStream>>,
    open: Mutex<Vec<UnixStream>>,
    is_cut: AtomicBool,
}

impl Dialer {
    pub(crate) fn new() -> (Arc<Self>, Acceptor) {
        let (to, from) = mpsc::channel();
        let dialer = Self {
            to: Mutex::new(to),
            open: Mutex::default(),
            is_cut: AtomicBool::new(false),
        };
        (Arc::new(dialer), Acceptor(from))
    }

    /// Ends all connections, and lets none be made until the way is mended.
    pub(crate) fn cut(&self) {
        // Before the connections close: a side that reconnects at once must not get through.
        self.is_cut.store(true, Ordering::SeqCst);
        for stream in self.open.lock().unwrap().drain(..) {
            // It may have ended.
            let _ = stream.shutdown(std::net::Shutdown::Both);
        }
    }

    pub(crate) fn mend(&self) {
        self.is_cut.store(false, Ordering::SeqCst);
    }
}

impl Dial for Dialer {
    fn dial(&self) -> io::Result<Box<dyn Stream>> {
        if self.is_cut.load(Ordering::SeqCst) {
            return Err(io::ErrorKind::ConnectionRefused.into());
        }
        let (near, far) = UnixStream::pair()?;
        // A duplicate of the descriptor, so that `cut` can shut down a stream that the engine owns.
        self.open.lock().unwrap().push(near.try_clone()?);
        let sent = self.to.lock().unwrap().send(far);
        sent.map_err(|_| io::ErrorKind::ConnectionRefused)?;
        Ok(Box::new(near))
    }
}

pub(crate) struct Acceptor(pub(crate) Receiver<UnixStream>);

impl Accept for Acceptor {
    fn accept(&mut self, patience: Duration) -> io::Result<Option<Box<dyn Stream>>> {
        match self.0.recv_timeout(patience) {
            Ok(stream) => Ok(Some(Box::new(stream))),
            Err(RecvTimeoutError::Timeout) => Ok(None),
            Err(RecvTimeoutError::Disconnected) => Err(io::ErrorKind::NotConnected.into()),
        }
    }
}
