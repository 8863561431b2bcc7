//! A source whose destination is slow, older, or misbehaves. What passes between them is written by
//! hand, message by message.

mod endless;
mod older;
mod panics;

use std::io;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicUsize, Ordering};
use std::sync::mpsc::{self, Receiver, Sender};
use std::thread;
use std::time::{Duration, Instant};

use memory::RamBlock;
use parking_lot::Mutex;
use uuid::Uuid;

use super::*;
use crate::journal::Step;
use crate::message::recv_hello;
use crate::pages::PAGE;
use crate::policy::{AtDeadline, Mode};
use crate::testing::{MemoryDisk, MemoryGuest, Moment, fill_page, ram};

const PAGES: usize = 4;

struct Pipe(Mutex<Sender<UnixStream>>);

impl Dial for Pipe {
    fn dial(&self) -> io::Result<Box<dyn Stream>> {
        let (near, far) = UnixStream::pair()?;
        let sent = self.0.lock().send(far);
        sent.map_err(|_| io::ErrorKind::ConnectionRefused)?;
        Ok(Box::new(near))
    }
}

/// Fails at one step.
struct Unwritable(Option<Step>);

impl Journal for Unwritable {
    fn record(&mut self, step: Step) -> io::Result<()> {
        if Some(step) == self.0 {
            return Err(io::ErrorKind::StorageFull.into());
        }
        Ok(())
    }
}

/// The other side, written by hand.
struct Peer {
    dialed: Receiver<UnixStream>,
    control: ControlChannel,
    channels: Vec<UnixStream>,
}

impl Peer {
    fn next(dialed: &Receiver<UnixStream>) -> Option<(Channel, UnixStream)> {
        let mut stream = dialed.recv_timeout(Duration::from_secs(10)).ok()?;
        stream.set_patience(Duration::from_secs(10)).unwrap();
        let hello = recv_hello(&mut stream).ok()?;
        Some((hello.channel, stream))
    }

    fn welcome(dialed: Receiver<UnixStream>, version: u32) -> Self {
        let (channel, stream) = Self::next(&dialed).unwrap();
        assert_eq!(channel, Channel::Control);
        let mut peer = Self {
            dialed,
            control: ControlChannel::new(Box::new(stream)),
            channels: Vec::new(),
        };
        peer.say(&ToSource::Welcome { version });
        peer
    }

    fn say(&mut self, message: &ToSource) {
        self.control.send(message).unwrap();
    }

    /// The next message that is no sign of life.
    fn recv(&mut self) -> ToDestination {
        loop {
            match self.control.recv().unwrap() {
                ToDestination::Ping(number) => self.say(&ToSource::Pong(number)),
                other => return other,
            }
        }
    }

    /// Why the source ended it.
    fn recv_abort(&mut self) -> String {
        loop {
            if let ToDestination::Abort(why) = self.control.recv().unwrap() {
                return why.code;
            }
        }
    }

    fn prepare(&mut self, connections: u16, postcopy: bool) -> Offer {
        let ToDestination::Prepare(offer) = self.recv() else {
            panic!("no offer");
        };
        self.say(&ToSource::Prepared {
            connections,
            postcopy,
        });
        *offer
    }

    fn accept(&mut self) -> Channel {
        let (channel, stream) = Self::next(&self.dialed).unwrap();
        self.channels.push(stream);
        channel
    }

    /// Up to the answer to the last state. Returns whether pages follow the guest.
    fn until_state(&mut self) -> bool {
        loop {
            match self.recv() {
                ToDestination::Guess => {
                    self.control.recv_state().unwrap();
                    self.say(&ToSource::GuessLoaded { us: 1 });
                }
                ToDestination::Round(round) => self.say(&ToSource::RoundDone(round)),
                ToDestination::State { postcopy, .. } => {
                    self.control.recv_state().unwrap();
                    if postcopy {
                        assert_eq!(self.accept(), Channel::Faults);
                    }
                    return postcopy;
                }
                other => panic!("{other:?}"),
            }
        }
    }

    /// Up to the commit. Returns whether the guest stays paused.
    fn until_committed(&mut self) -> bool {
        self.until_state();
        self.say(&ToSource::Ready { load_us: 1 });
        match self.recv() {
            ToDestination::Commit { paused, .. } => paused,
            other => panic!("{other:?}"),
        }
    }
}

fn policy() -> Policy {
    Policy {
        patience: Duration::from_secs(3),
        connections: Some(1),
        ..Policy::default()
    }
}

/// Migrates to `peer`, which has a thread of its own.
fn migrate(
    policy: &Policy,
    fails_at: Option<Step>,
    peer: impl FnOnce(Receiver<UnixStream>, Decision) + Send + 'static,
) -> (Outcome, MemoryGuest) {
    migrate_guest(MemoryGuest::new(ram(PAGES)), policy, fails_at, peer)
}

fn migrate_guest(
    mut guest: MemoryGuest,
    policy: &Policy,
    fails_at: Option<Step>,
    peer: impl FnOnce(Receiver<UnixStream>, Decision) + Send + 'static,
) -> (Outcome, MemoryGuest) {
    let (to, dialed) = mpsc::channel();
    let decision = Decision::default();
    let theirs = decision.clone();
    let peer = thread::spawn(move || peer(dialed, theirs));
    let sending = Sending {
        id: Uuid::from_u128(1),
        policy,
        dial: &Pipe(Mutex::new(to)),
        journal: &mut Unwritable(fails_at),
        progress: &Progress::default(),
        decision: &decision,
    };
    let outcome = send(sending, &mut guest);
    peer.join().unwrap();
    (outcome, guest)
}

fn stayed(outcome: &Outcome) -> &str {
    match outcome {
        Outcome::Stayed { why, .. } => &why.code,
        Outcome::Moved | Outcome::Lost(_) => panic!("it moved"),
    }
}

/// A client that sees the end in the report may send its next request at once.
#[test]
fn source_is_freed_before_report_shows_end() {
    let progress = Progress::default();
    let (report, phases) = (progress.clone(), Arc::new(Mutex::new(Vec::new())));
    let seen = Arc::clone(&phases);
    let mut guest = MemoryGuest::with_hook(ram(PAGES), move |moment, _| {
        if moment == Moment::Ended {
            seen.lock().push(report.report().phase);
        }
    });
    let unreachable = Pipe(Mutex::new(mpsc::channel().0));
    let sending = Sending {
        id: Uuid::new_v4(),
        policy: &policy(),
        dial: &unreachable,
        journal: &mut Unwritable(None),
        progress: &progress,
        decision: &Decision::default(),
    };
    let outcome = send(sending, &mut guest);
    assert!(matches!(outcome, Outcome::Stayed { .. }));
    assert_eq!(*phases.lock(), [Phase::Connecting]);
    assert_eq!(progress.report().phase, Phase::Failed);
}

#[test]
fn busy_destination_does_not_hold_guest() {
    let policy = Policy {
        stop_limit: Some(Duration::from_millis(200)),
        ..policy()
    };
    let (outcome, guest) = migrate(&policy, None, |dialed, _| {
        let mut peer = Peer::welcome(dialed, 1);
        peer.prepare(1, false);
        peer.accept();
        peer.until_state();
        while peer.control.send(&ToSource::Busy).is_ok() {
            thread::sleep(Duration::from_millis(10));
        }
        assert_eq!(peer.recv_abort(), "stop-too-long");
    });
    assert_eq!(stayed(&outcome), "stop-too-long");
    assert!(guest.runs);
}

/// A guest whose first stops take longer than `policy` permits. Counts its stops.
fn slow_to_stop(policy: &Policy, long_stops: u32) -> (MemoryGuest, Arc<AtomicU32>) {
    let (stops, span) = (Arc::new(AtomicU32::new(0)), policy.promise());
    let count = Arc::clone(&stops);
    let hook = move |moment, memory: &RamBlock| {
        if moment == Moment::Stopped && count.fetch_add(1, Ordering::Relaxed) < long_stops {
            // Written in the stop by a device, and lost unless it is sent again.
            fill_page(memory, 1, 7);
            thread::sleep(span);
        }
    };
    (MemoryGuest::with_hook(ram(PAGES), hook), stops)
}

fn short_stops(at_deadline: AtDeadline) -> Policy {
    Policy {
        max_downtime: Duration::from_millis(100),
        at_deadline,
        ..policy()
    }
}

#[test]
fn long_stop_is_called_off_and_tried_again() {
    let policy = short_stops(AtDeadline::Stop);
    let (guest, stops) = slow_to_stop(&policy, 1);
    let (outcome, guest) = migrate_guest(guest, &policy, None, |dialed, _| {
        let mut peer = Peer::welcome(dialed, 1);
        peer.prepare(1, false);
        peer.accept();
        peer.until_committed();
        peer.say(&ToSource::NotHere(Refusal::new("test", "")));
    });
    assert_eq!(stayed(&outcome), "test");
    assert!(guest.runs && stops.load(Ordering::Relaxed) > 1);
}

#[test]
fn guest_that_never_stops_in_time_stays() {
    let policy = short_stops(AtDeadline::Cancel);
    let (guest, stops) = slow_to_stop(&policy, u32::MAX);
    let (outcome, guest) = migrate_guest(guest, &policy, None, |dialed, _| {
        let mut peer = Peer::welcome(dialed, 1);
        peer.prepare(1, false);
        peer.accept();
        loop {
            match peer.recv() {
                ToDestination::Guess => {
                    peer.control.recv_state().unwrap();
                    peer.say(&ToSource::GuessLoaded { us: 1 });
                }
                ToDestination::Round(round) => peer.say(&ToSource::RoundDone(round)),
                ToDestination::Abort(why) => break assert_eq!(why.code, "stop-too-long"),
                other => panic!("{other:?}"),
            }
        }
    });
    assert_eq!(stayed(&outcome), "stop-too-long");
    assert!(guest.runs);
    assert_eq!(stops.load(Ordering::Relaxed), 3);
}

#[test]
fn long_stop_is_followed_by_postcopy() {
    let policy = short_stops(AtDeadline::Postcopy);
    let (guest, stops) = slow_to_stop(&policy, 1);
    let (outcome, _) = migrate_guest(guest, &policy, None, |dialed, _| {
        let mut peer = Peer::welcome(dialed, 1);
        peer.prepare(2, true);
        peer.accept();
        peer.accept();
        assert!(peer.until_state());
        peer.say(&ToSource::Refused(Refusal::new("test", "")));
    });
    assert_eq!(stayed(&outcome), "test");
    assert_eq!(stops.load(Ordering::Relaxed), 2);
}

#[test]
fn guest_is_to_stay_paused() {
    for resume in [true, false] {
        let policy = Policy { resume, ..policy() };
        let (outcome, guest) = migrate(&policy, None, move |dialed, _| {
            let mut peer = Peer::welcome(dialed, 1);
            peer.prepare(1, false);
            peer.accept();
            assert_eq!(peer.until_committed(), !resume);
            peer.say(&ToSource::NotHere(Refusal::new("test", "")));
        });
        assert_eq!(stayed(&outcome), "test");
        assert!(guest.runs);
    }
}

#[test]
fn channel_count_is_limited() {
    for (offered, made) in [(u16::MAX, 3), (0, 1)] {
        let policy = Policy {
            connections: Some(3),
            ..policy()
        };
        let (outcome, guest) = migrate(&policy, None, move |dialed, _| {
            let mut peer = Peer::welcome(dialed, 1);
            peer.prepare(offered, false);
            for index in 0..made {
                assert_eq!(peer.accept(), Channel::Ram { index });
            }
            // No more come: the source continues.
            peer.until_committed();
            peer.say(&ToSource::NotHere(Refusal::new("test", "")));
            assert!(peer.dialed.try_recv().is_err());
        });
        assert_eq!(stayed(&outcome), "test");
        assert!(guest.runs);
    }
}

/// In postcopy, too, when connections are made again; and the VM is shown for what it is meanwhile.
#[test]
fn postcopy_guest_out_of_reach() {
    let policy = Policy {
        mode: Mode::Postcopy,
        ..policy()
    };
    let (outcome, guest) = migrate(&policy, None, |dialed, _| {
        let mut peer = Peer::welcome(dialed, 2);
        peer.prepare(2, true);
        peer.accept();
        peer.accept();
        peer.until_committed();
        peer.say(&ToSource::Running { us: 1, told_us: 1 });
        let Peer { dialed, .. } = peer;
        for (offered, made) in [(u16::MAX, 16), (0, 2)] {
            let (channel, stream) = Peer::next(&dialed).unwrap();
            assert_eq!(channel, Channel::Again);
            let mut control = ControlChannel::new(Box::new(stream));
            let prepared = ToSource::Prepared {
                connections: offered,
                postcopy: true,
            };
            control.send(&prepared).unwrap();
            let mut channels = Vec::new();
            for index in 0..made {
                let (channel, stream) = Peer::next(&dialed).unwrap();
                assert_eq!(channel, Channel::Ram { index });
                channels.push(stream);
            }
            assert_eq!(Peer::next(&dialed).unwrap().0, Channel::Faults);
        }
        let (_, stream) = Peer::next(&dialed).unwrap();
        let mut control = ControlChannel::new(Box::new(stream));
        control.send(&ToSource::Ended).unwrap();
    });
    let Outcome::Lost(why) = outcome else {
        panic!("{outcome:?}");
    };
    assert_eq!(why.code, "guest-lost");
    assert!(!guest.runs);
    let is_lost = |shown: &Whereabouts| matches!(shown, Whereabouts::OutOfReach(_));
    assert_eq!(guest.shown.first(), Some(&Whereabouts::AtDestination));
    assert!(is_lost(&guest.shown[1]), "{:?}", guest.shown);
    assert!(is_lost(guest.shown.last().unwrap()), "{:?}", guest.shown);
}

#[test]
fn source_without_journal_fails_early() {
    let (outcome, _) = migrate(&policy(), Some(Step::Prepare), |dialed, _| {
        let mut peer = Peer::welcome(dialed, 2);
        // In place of an offer: no machine is made for a guest that does not come.
        let ToDestination::Abort(why) = peer.recv() else {
            panic!("no abort");
        };
        assert_eq!(why.code, "journal");
    });
    assert_eq!(stayed(&outcome), "journal");
    let (outcome, guest) = migrate(&policy(), Some(Step::Commit), |dialed, _| {
        let mut peer = Peer::welcome(dialed, 2);
        peer.prepare(1, false);
        peer.accept();
        peer.until_state();
        peer.say(&ToSource::Ready { load_us: 1 });
        assert_eq!(peer.recv_abort(), "journal");
        peer.say(&ToSource::NotHere(Refusal::new("journal", "")));
    });
    assert_eq!(stayed(&outcome), "journal");
    assert!(guest.runs, "it was not given away");
}

#[test]
fn cancel_reaches_destination() {
    let (outcome, guest) = migrate(&policy(), None, |dialed, decision| {
        let mut peer = Peer::welcome(dialed, 2);
        peer.prepare(1, false);
        peer.accept();
        while !matches!(peer.recv(), ToDestination::Guess) {}
        // The source waits for an answer.
        decision.cancel().unwrap();
        peer.control.recv_state().unwrap();
        assert_eq!(peer.recv_abort(), "canceled");
    });
    assert_eq!(stayed(&outcome), "canceled");
    assert!(guest.runs);
}

/// A guest whose resumptions at the source are counted.
fn counted_guest() -> (MemoryGuest, Arc<AtomicUsize>) {
    let resumed = Arc::new(AtomicUsize::new(0));
    let count = Arc::clone(&resumed);
    let guest = MemoryGuest::with_hook(ram(PAGES), move |moment, _| {
        if moment == Moment::Resumed {
            count.fetch_add(1, Ordering::SeqCst);
        }
    });
    (guest, resumed)
}

fn hold(hold: Duration) -> Policy {
    Policy {
        hold: Some(hold),
        ..policy()
    }
}

/// The destination may have a copy that a cluster runs if it fences this host: the guest must not run here
/// until that copy is gone.
#[test]
fn held_guest_resumes_when_destination_knows() {
    let (guest, resumed) = counted_guest();
    let seen = Arc::clone(&resumed);
    let policy = hold(Duration::from_secs(3600));
    let (outcome, guest) = migrate_guest(guest, &policy, None, move |dialed, _| {
        let mut peer = Peer::welcome(dialed, 1);
        peer.prepare(1, false);
        peer.accept();
        peer.until_state();
        let Peer {
            dialed, control, ..
        } = peer;
        drop(control);
        for answer in [
            ToSource::Refused(Refusal::new("out-of-order", "it is still in progress")),
            ToSource::Waiting,
        ] {
            let (channel, stream) = Peer::next(&dialed).unwrap();
            assert_eq!(channel, Channel::Again);
            assert_eq!(seen.load(Ordering::SeqCst), 0, "the guest runs");
            let mut control = ControlChannel::new(Box::new(stream));
            control.send(&answer).unwrap();
            if answer == ToSource::Waiting {
                let heard: ToDestination = control.recv().unwrap();
                assert!(matches!(heard, ToDestination::Abort(_)), "{heard:?}");
                let told = ToSource::NotHere(Refusal::new("connection-lost", ""));
                control.send(&told).unwrap();
            }
        }
    });
    assert_eq!(stayed(&outcome), "connection-lost");
    let Outcome::Stayed { pending_abort, .. } = outcome else {
        panic!("{outcome:?}")
    };
    assert_eq!(pending_abort, None, "the destination knows");
    assert_eq!(resumed.load(Ordering::SeqCst), 1);
    assert!(guest.runs);
}

/// The destination cannot be reached: the guest resumes after the time of the hold, and not before, or when the migration is
/// canceled.
#[test]
fn hold_ends_by_time_or_by_cancel() {
    const SHORT: Duration = Duration::from_millis(300);
    for (policy, is_canceled) in [
        (hold(SHORT), false),
        (hold(Duration::from_secs(3600)), true),
    ] {
        let (guest, resumed) = counted_guest();
        let (to_main, lost) = mpsc::channel();
        let (outcome, guest) = migrate_guest(guest, &policy, None, move |dialed, decision| {
            let mut peer = Peer::welcome(dialed, 1);
            peer.prepare(1, false);
            peer.accept();
            peer.until_state();
            to_main.send(Instant::now()).unwrap();
            drop(peer);
            if is_canceled {
                decision.cancel().unwrap();
            }
        });
        let lost = lost.recv().unwrap();
        assert!(is_canceled || lost.elapsed() >= SHORT);
        assert!(matches!(outcome, Outcome::Stayed { .. }));
        assert_eq!(resumed.load(Ordering::SeqCst), 1);
        assert!(guest.runs);
    }
}

/// A destination that is still loading the guest refuses to answer: the notice is sent again.
#[test]
fn abort_notice_waits_for_destination() {
    let (to, dialed) = mpsc::channel();
    let notice = PendingAbort {
        id: Uuid::from_u128(1),
        why: Refusal::new("canceled", ""),
        patience: Duration::from_secs(1),
    };
    let peer = thread::spawn(move || {
        for answer in [
            ToSource::Refused(Refusal::new("out-of-order", "it is still in progress")),
            ToSource::Waiting,
        ] {
            let (channel, stream) = Peer::next(&dialed).unwrap();
            assert_eq!(channel, Channel::Again);
            let mut control = ControlChannel::new(Box::new(stream));
            control.send(&answer).unwrap();
            if answer == ToSource::Waiting {
                let heard: ToDestination = control.recv().unwrap();
                assert!(matches!(heard, ToDestination::Abort(_)), "{heard:?}");
                let told = ToSource::NotHere(Refusal::new("canceled", ""));
                control.send(&told).unwrap();
            }
        }
    });
    assert!(notice.send(&Pipe(Mutex::new(to))));
    peer.join().unwrap();
}
