//! A destination that says something that is no answer, and does not stop.

use super::*;

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
