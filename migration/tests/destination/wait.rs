//! A destination that waits, its machines, and how to reach it.

use std::fs::File;
use std::io;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use memory::{RamBlock, RamConfig};
use migration::testing::Peer;
use migration::{
    Accept, Block, BlockInfo, ConnectionLimit, Decision, Destination, Dial, Fate, Host, Journal,
    Offer, Progress, Receiving, Refusal, Report, StartFailure, Step, Stream, receive,
};
use serde_json::json;
use uuid::Uuid;

pub(crate) const SIZE: u64 = 64 << 10;
/// Time limit of a test's waits.
pub(crate) const BOUND: Duration = Duration::from_secs(120);

/// The machine's behaviour.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Mood {
    #[default]
    Willing,
    Refuses,
    PanicsAtOffer,
    PanicsInLoad,
    PanicsInStart,
    Locked,
    NeverRuns,
    MayHaveRun,
}

#[derive(Default)]
pub(crate) struct Marks {
    mood: Mutex<Mood>,
    pub(crate) runs: AtomicBool,
    pub(crate) discarded: AtomicBool,
    pub(crate) steps: Mutex<Vec<Step>>,
    /// The memory of the last machine.
    pub(crate) ram: Mutex<Option<Arc<RamBlock>>>,
}

struct Machine(Arc<Marks>, Arc<RamBlock>);

impl Destination for Machine {
    fn blocks(&self) -> Vec<Block> {
        vec![Block {
            name: "ram".to_owned(),
            ram: Arc::clone(&self.1),
        }]
    }

    fn dry_run(&mut self, _: &[u8]) -> Result<(), Refusal> {
        Ok(())
    }

    fn load(&mut self, _: &[u8]) -> Result<(), Refusal> {
        assert_ne!(*self.0.mood.lock().unwrap(), Mood::PanicsInLoad);
        Ok(())
    }

    fn take_over(&mut self) -> Result<(), Refusal> {
        match *self.0.mood.lock().unwrap() {
            Mood::Locked => Err(Refusal::new("cannot-be-taken-over", "/disk.raw is in use")),
            _ => Ok(()),
        }
    }

    fn start(&mut self, _: Duration, _: bool) -> Result<Instant, StartFailure> {
        match *self.0.mood.lock().unwrap() {
            Mood::PanicsInStart => panic!("as the test says"),
            Mood::NeverRuns => {
                let why = Refusal::new("cannot-go-on", "KVM refuses");
                return Err(StartFailure::NeverRan(why));
            }
            Mood::MayHaveRun => {
                let why = Refusal::new("machine-gone", "the driver panicked");
                return Err(StartFailure::MayHaveRun(why));
            }
            _ => {}
        }
        self.0.runs.store(true, Ordering::SeqCst);
        Ok(Instant::now())
    }

    fn discard(&mut self) {
        self.0.discarded.store(true, Ordering::SeqCst);
        self.0.runs.store(false, Ordering::SeqCst);
    }
}

struct Machines(Arc<Marks>);

struct Paper(Arc<Marks>);

impl Journal for Paper {
    fn record(&mut self, step: Step) -> io::Result<()> {
        self.0.steps.lock().unwrap().push(step);
        Ok(())
    }
}

/// Migrations of which the journals know something.
pub(crate) const RAN: Uuid = Uuid::from_u128(1000);
pub(crate) const NEVER_RAN: Uuid = Uuid::from_u128(1001);

impl Host for Machines {
    fn prepare(&self, _: Uuid, _: &Offer, _: Vec<File>) -> Result<Box<dyn Destination>, Refusal> {
        let mood = *self.0.mood.lock().unwrap();
        match mood {
            Mood::Refuses => return Err(Refusal::new("cpu-lacks-features", "no such CPU")),
            Mood::PanicsAtOffer => panic!("as the test says"),
            _ => {}
        }
        let ram = Arc::new(RamBlock::new(&RamConfig::anonymous(SIZE)).unwrap());
        *self.0.ram.lock().unwrap() = Some(Arc::clone(&ram));
        Ok(Box::new(Machine(Arc::clone(&self.0), ram)))
    }

    fn journal(&self, _: Uuid, _: &str) -> io::Result<Box<dyn Journal>> {
        Ok(Box::new(Paper(Arc::clone(&self.0))))
    }

    fn fate(&self, migration: Uuid) -> Fate {
        match migration {
            RAN => Fate::Ran,
            NEVER_RAN => Fate::NeverRan,
            _ => Fate::Unknown,
        }
    }
}

struct Connections(Receiver<UnixStream>);

impl Accept for Connections {
    fn accept(&mut self, patience: Duration) -> io::Result<Option<Box<dyn Stream>>> {
        match self.0.recv_timeout(patience) {
            Ok(stream) => Ok(Some(Box::new(stream))),
            Err(RecvTimeoutError::Timeout) => Ok(None),
            Err(RecvTimeoutError::Disconnected) => Err(io::ErrorKind::NotConnected.into()),
        }
    }
}

pub(crate) struct Way(Mutex<Sender<UnixStream>>);

impl Dial for Way {
    fn dial(&self) -> io::Result<Box<dyn Stream>> {
        let (near, far) = UnixStream::pair()?;
        let sent = self.0.lock().unwrap().send(far);
        sent.map_err(|_| io::ErrorKind::ConnectionRefused)?;
        Ok(Box::new(near))
    }
}

/// A destination that waits, and how to reach it.
pub(crate) struct Wait {
    pub(crate) marks: Arc<Marks>,
    pub(crate) way: Way,
    pub(crate) progress: Progress,
    pub(crate) decision: Decision,
    receiver: Option<JoinHandle<Result<(), Refusal>>>,
}

impl Wait {
    pub(crate) fn new(patience: Duration, once: bool) -> Self {
        let (marks, (to, from)) = (Arc::new(Marks::default()), mpsc::channel());
        let (progress, decision) = (Progress::default(), Decision::default());
        let (report, decide) = (progress.clone(), decision.clone());
        let host = Machines(Arc::clone(&marks));
        let receiver = thread::spawn(move || {
            receive(Receiving {
                accept: &mut Connections(from),
                limit: &ConnectionLimit::default(),
                host: &host,
                progress: &report,
                decision: &decide,
                patience,
                once,
                lingers: &|| {},
            })
        });
        Self {
            marks,
            way: Way(Mutex::new(to)),
            progress,
            decision,
            receiver: Some(receiver),
        }
    }

    pub(crate) fn become_(&self, mood: Mood) {
        *self.marks.mood.lock().unwrap() = mood;
    }

    pub(crate) fn until(&self, wanted: impl Fn(&Report) -> bool) -> Report {
        let start = Instant::now();
        loop {
            let report = self.progress.report();
            if wanted(&report) {
                return report;
            }
            assert!(start.elapsed() < BOUND, "{report:?}");
            thread::sleep(Duration::from_millis(1));
        }
    }

    /// A source that has made its offer. The first thing that it hears is the answer to that.
    pub(crate) fn offered(&self, id: Uuid) -> Peer {
        let mut source = Peer::control(&self.way, id);
        assert_eq!(source.recv().unwrap(), "Welcome { version: 4 }");
        assert!(source.offer(&offer(1)));
        source
    }

    /// A source that has sent a guest, and heard that it is ready. Its RAM channel is the second.
    pub(crate) fn ready(&self, id: Uuid) -> (Peer, Peer) {
        let mut source = self.offered(id);
        assert!(source.recv().unwrap().starts_with("Prepared"));
        let mut ram = Peer::ram(&self.way, id, 0);
        send_guest(&mut source, &mut ram, false);
        (source, ram)
    }

    /// A source that has sent a guest of which pages may follow. Its RAM and faults channels are the others.
    pub(crate) fn ready_to_follow(&self, id: Uuid) -> (Peer, [Peer; 2]) {
        let mut source = self.offered(id);
        assert!(source.recv().unwrap().starts_with("Prepared"));
        let mut ram = Peer::ram(&self.way, id, 0);
        let faults = Peer::faults(&self.way, id);
        send_guest(&mut source, &mut ram, true);
        (source, [ram, faults])
    }

    /// Nobody can connect any more.
    pub(crate) fn close_way(&mut self) {
        self.way = Way(Mutex::new(mpsc::channel().0));
    }

    /// A source that nothing happens to, and which is the last.
    pub(crate) fn completes(mut self, id: Uuid) {
        self.become_(Mood::Willing);
        let (mut source, _ram) = self.ready(id);
        assert!(source.recv().unwrap().starts_with("Ready"));
        assert!(source.say(&commit()));
        assert!(source.recv().unwrap().starts_with("Running"));
        assert!(source.say("Complete"));
        assert_eq!(self.outcome(), Ok(()));
        assert!(self.marks.runs.load(Ordering::SeqCst));
    }

    pub(crate) fn outcome(&mut self) -> Result<(), Refusal> {
        self.receiver.take().unwrap().join().unwrap()
    }
}

/// Sends a guest of one round.
fn send_guest(source: &mut Peer, ram: &mut Peer, postcopy: bool) {
    assert!(ram.frame(18, &1_u32.to_le_bytes()), "the end of round 1");
    let state = json!({ "State": { "round": 1, "postcopy": postcopy, "paused": false } });
    assert!(source.say(&state) && source.frame(3, b"state"));
}

pub(crate) fn commit() -> serde_json::Value {
    json!({ "Commit": { "stood_for_ns": 1, "paused": false } })
}

pub(crate) fn offer(connections: u16) -> Offer {
    Offer {
        vm: "guest".to_owned(),
        machine: serde_bytes::ByteBuf::new(),
        blocks: vec![BlockInfo {
            name: "ram".to_owned(),
            size: SIZE,
        }],
        connections,
        postcopy: true,
        given: false,
        verify: false,
        disks: Vec::new(),
    }
}
