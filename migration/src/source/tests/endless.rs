//! A destination that says something that is no answer, and does not stop.

use std::io::Write as _;

use super::*;
use crate::Resolution;

/// Sends something that is no answer, as long as the other side listens.
fn talk_on(control: &mut ControlChannel) {
    let start = Instant::now();
    while control.send(&ToSource::Pong(0)).is_ok() {
        assert!(start.elapsed() < Duration::from_secs(60), "it listens");
        thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn talk_without_end_does_not_hold_a_stopped_guest() {
    let (outcome, guest) = migrate(&policy(), None, |dialed, _| {
        let mut peer = Peer::welcome(dialed, 4);
        peer.prepare(1, false);
        assert_eq!(peer.accept(), Channel::Ram { index: 0 });
        peer.until_state();
        // No answer to `State`.
        peer.say(&ToSource::RoundDone(77));
        talk_on(&mut peer.control);
    });
    assert_eq!(stayed(&outcome), "stream-damaged");
    assert!(guest.runs);
}

#[test]
fn talk_without_end_does_not_hold_a_notice() {
    let pending = PendingAbort {
        id: Uuid::from_u128(1),
        why: Refusal::new("canceled", "the operator canceled it"),
        patience: Duration::from_millis(100),
    };
    let (to, dialed) = mpsc::channel();
    let peer = thread::spawn(move || {
        for stream in dialed {
            let mut control = ControlChannel::new(Box::new(stream));
            control.send(&ToSource::Waiting).unwrap();
            talk_on(&mut control);
        }
    });
    assert!(!pending.send(&Pipe(Mutex::new(to))));
    peer.join().unwrap();
}

/// Sends this for as long as the other side listens.
fn repeat(control: &mut ControlChannel, message: &ToSource) {
    let start = Instant::now();
    while control.send(message).is_ok() {
        assert!(start.elapsed() < Duration::from_secs(60), "it listens");
        thread::sleep(Duration::from_millis(1));
    }
}

/// A destination at which a guest runs that waits for pages.
fn follow(dialed: Receiver<UnixStream>) -> Peer {
    let mut peer = Peer::welcome(dialed, 4);
    peer.prepare(2, true);
    peer.accept();
    peer.accept();
    peer.until_committed();
    peer.say(&ToSource::Running { us: 1, told_us: 1 });
    peer
}

/// The source that is back.
fn again(dialed: &Receiver<UnixStream>) -> ControlChannel {
    let (channel, stream) = Peer::next(dialed).unwrap();
    assert_eq!(channel, Channel::Again);
    ControlChannel::new(Box::new(stream))
}

fn until_all_sent(control: &mut ControlChannel) {
    loop {
        match control.recv().unwrap() {
            ToDestination::Ping(number) => control.send(&ToSource::Pong(number)).unwrap(),
            ToDestination::Complete => {}
            ToDestination::PagesSent { .. } => return,
            other => panic!("{other:?}"),
        }
    }
}

fn postcopy() -> Policy {
    Policy {
        mode: Mode::Postcopy,
        patience: Duration::from_secs(1),
        ..policy()
    }
}

/// The source has sent all, and the destination is busy with it for ever. It counts as lost, and from then on
/// an operator can give the guest up at any time, whether or not it is connected again.
#[test]
fn busy_destination_leaves_the_decision_to_an_operator() {
    let (outcome, _) = migrate(&postcopy(), None, |dialed, decision| {
        let mut peer = follow(dialed);
        until_all_sent(&mut peer.control);
        assert!(!decision.resolve(Resolution::Discard), "it is connected");
        repeat(&mut peer.control, &ToSource::Busy);
        let mut control = again(&peer.dialed);
        let prepared = ToSource::Prepared {
            connections: 2,
            postcopy: true,
        };
        control.send(&prepared).unwrap();
        for _ in 0..3 {
            peer.accept();
        }
        until_all_sent(&mut control);
        assert!(decision.resolve(Resolution::Discard), "it stalled before");
        repeat(&mut control, &ToSource::Busy);
        assert!(decision.outcome(Duration::from_secs(60)).is_ok());
    });
    let Outcome::Lost(why) = outcome else {
        panic!("{outcome:?}");
    };
    assert_eq!(why.code, "resolved");
}

/// The operator is obeyed at once, and not when the list ends.
#[test]
fn list_without_end_does_not_delay_an_operator() {
    let policy = Policy {
        // The list alone would be listened to for longer than this test waits.
        patience: Duration::from_secs(60),
        ..postcopy()
    };
    let (outcome, _) = migrate(&policy, None, |dialed, decision| {
        let Peer { dialed, .. } = follow(dialed);
        let mut control = again(&dialed);
        let missing = ToSource::StillMissing {
            block: 0,
            first: 0,
            bits: vec![1],
        };
        control.send(&missing).unwrap();
        assert!(decision.resolve(Resolution::Discard));
        repeat(&mut control, &missing);
    });
    let Outcome::Lost(why) = outcome else {
        panic!("{outcome:?}");
    };
    assert_eq!(why.code, "resolved");
}

/// An answer to `Commit` that never ends is none.
#[test]
fn answer_without_end_leaves_a_doubt() {
    let (outcome, guest) = migrate(&policy(), None, |dialed, decision| {
        let mut peer = Peer::welcome(dialed, 4);
        peer.prepare(1, false);
        peer.accept();
        peer.until_committed();
        let start = Instant::now();
        // The beginning of a control message of 1 MiB.
        let mut head = [2, 0, 0, 0, 0, 0, 16, 0].into_iter();
        while (peer.control.stream.write_all(&[head.next().unwrap_or(0)])).is_ok() {
            assert!(start.elapsed() < Duration::from_secs(60), "it listens");
            thread::sleep(Duration::from_millis(50));
        }
        drop(peer.dialed);
        while !decision.resolve(Resolution::Run) {
            assert!(start.elapsed() < Duration::from_secs(60), "no doubt");
            thread::sleep(Duration::from_millis(1));
        }
    });
    assert_eq!(stayed(&outcome), "resolved");
    assert!(guest.runs);
}
