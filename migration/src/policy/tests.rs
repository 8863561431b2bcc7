//! Decisions after rounds, and limits of stops.

use super::*;

#[test]
fn memory_and_disks_have_speeds_of_their_own() {
    let mib = |memory: u64, disks: u64| Left {
        memory: memory << 8,
        disks: disks << 8,
    };
    let second = Duration::from_secs(1);
    let mut measured = Measured::default();
    // Disks come first: until memory was sent it counts as they do.
    let speed = measured.measure(mib(0, 10), 10 << 20, second);
    assert_eq!(speed, Some(10 << 20));
    assert_eq!(measured.transfer(mib(20, 10)), second * 3);
    measured.measure(mib(1000, 0), 1000 << 20, second);
    assert_eq!(measured.transfer(mib(500, 0)), second / 2);
    assert_eq!(measured.transfer(mib(0, 20)), second * 2);
    // Both in one round: the disks took one of its two seconds.
    measured.measure(mib(90, 10), 100 << 20, second * 2);
    assert_eq!(measured.transfer(mib(90, 10)), second * 2);
    // A round of zeros, or of next to nothing, is no measure of a slow link.
    assert_eq!(measured.measure(mib(900, 0), 1 << 20, second), None);
    assert_eq!(measured.measure(mib(0, 1), 4096, second), None);
    assert_eq!(measured.transfer(mib(90, 10)), second * 2);
}

fn situation() -> Situation {
    Situation {
        round: 5,
        dirty: 10_000,
        dirty_before: 10_000,
        predicted: Duration::from_secs(1),
        span: Duration::from_secs(1),
        elapsed: Duration::from_secs(5),
        can_postcopy: true,
        throttle: 0,
    }
}

/// Blocks of disks cannot follow a guest: whatever the policy for memory says, disks end in the stop,
/// and a guest that writes too much to them is slowed down.
#[test]
fn disks_never_follow_the_guest() {
    for mode in [Mode::Precopy, Mode::Hybrid, Mode::Postcopy, Mode::Auto] {
        for at_deadline in [
            AtDeadline::Cancel,
            AtDeadline::Throttle,
            AtDeadline::Postcopy,
            AtDeadline::Stop,
        ] {
            let policy = Policy {
                mode,
                deadline: Some(Duration::from_secs(4)),
                ..policy(at_deadline)
            };
            let next = policy.for_disks().next(&situation());
            let expected = match at_deadline {
                AtDeadline::Cancel => Next::GiveUp,
                AtDeadline::Stop => Next::Stop,
                AtDeadline::Throttle | AtDeadline::Postcopy => Next::Round { throttle: 20 },
            };
            assert_eq!(next, expected, "{mode:?} {at_deadline:?}");
            let slowest = Situation {
                throttle: MAX_THROTTLE,
                ..situation()
            };
            // It ends, however much the guest writes.
            assert_ne!(
                policy.for_disks().next(&slowest),
                Next::Round { throttle: 99 }
            );
            let early = Situation {
                round: 1,
                elapsed: Duration::ZERO,
                ..situation()
            };
            let round = Next::Round { throttle: 0 };
            assert_eq!(policy.for_disks().next(&early), round);
        }
    }
}

#[test]
fn long_stop_is_followed_as_the_policy_says() {
    use AfterCallOff::{Accept, GiveUp, Postcopy, Retry};

    let after = |at_deadline, can_postcopy| {
        let policy = policy(at_deadline);
        [1, 2, 3].map(|times| policy.after_call_off(times, can_postcopy))
    };
    assert_eq!(after(AtDeadline::Cancel, true), [Retry, Retry, GiveUp]);
    assert_eq!(after(AtDeadline::Stop, true), [Retry, Retry, Accept]);
    assert_eq!(after(AtDeadline::Throttle, true), [Retry, Retry, Accept]);
    assert_eq!(after(AtDeadline::Postcopy, true), [Postcopy; 3]);
    assert_eq!(after(AtDeadline::Postcopy, false), [Retry, Retry, Accept]);
}

#[test]
fn auto_acts_once_the_deadline_cannot_be_kept() {
    let auto = |deadline: u64, at_deadline| Policy {
        mode: Mode::Auto,
        deadline: Some(Duration::from_secs(deadline)),
        ..policy(at_deadline)
    };
    let shrinking = |dirty| Situation {
        dirty,
        ..situation()
    };
    let round = Next::Round { throttle: 0 };
    let postcopy = auto(100, AtDeadline::Postcopy);
    // A guest that writes as fast as pages go.
    assert_eq!(postcopy.next(&situation()), Next::Postcopy);
    // 9,000 of 10,000 pages are left after each round: 9 s more, and there are 95.
    assert_eq!(postcopy.next(&shrinking(9_000)), round);
    // 99 s more.
    assert_eq!(postcopy.next(&shrinking(9_900)), Next::Postcopy);
    assert_eq!(
        auto(10, AtDeadline::Postcopy).next(&shrinking(9_000)),
        Next::Postcopy
    );
    // The first rounds say nothing yet.
    let early = Situation {
        round: HYBRID_ROUNDS - 1,
        ..situation()
    };
    assert_eq!(postcopy.next(&early), round);
    // A stop that is too long without a page.
    assert_eq!(postcopy.next(&shrinking(FEW)), Next::Postcopy);
    // What else there is to do.
    let unable = Situation {
        can_postcopy: false,
        ..situation()
    };
    assert_eq!(postcopy.next(&unable), Next::Round { throttle: 20 });
    assert_eq!(auto(100, AtDeadline::Stop).next(&situation()), Next::Stop);
    assert_eq!(auto(100, AtDeadline::Cancel).next(&situation()), round);
    let late = auto(4, AtDeadline::Cancel).next(&situation());
    assert_eq!(late, Next::GiveUp);
    // Nobody counts a fit as hopeless.
    let fits = Situation {
        predicted: Duration::ZERO,
        ..situation()
    };
    assert_eq!(postcopy.next(&fits), Next::Stop);
}

/// Whatever the guest does, one that keeps its pace is not asked for ever: with a destination without
/// postcopy, the guest is slowed down and then stopped.
#[test]
fn auto_ends_for_each_guest() {
    for can_postcopy in [true, false] {
        for percent in [0_u64, 50, 90, 99, 100, 120] {
            let policy = Policy {
                mode: Mode::Auto,
                ..policy(AtDeadline::Postcopy)
            };
            let (mut dirty, mut throttle, mut elapsed) = (1 << 18, 0, Duration::ZERO);
            let mut ended = None;
            for round in 1..100 {
                let before = dirty;
                // Slowed down, it writes less.
                dirty = before * percent * (100 - u64::from(throttle)) / 10_000;
                let span = Duration::from_micros(before * 4);
                elapsed += span;
                let now = Situation {
                    round,
                    dirty,
                    dirty_before: before,
                    predicted: Duration::from_micros(dirty * 4),
                    span,
                    elapsed,
                    can_postcopy,
                    throttle,
                };
                match policy.next(&now) {
                    Next::Round { throttle: wanted } => throttle = wanted,
                    next => {
                        ended = Some(next);
                        break;
                    }
                }
            }
            let wanted = if can_postcopy && percent >= 90 {
                Next::Postcopy
            } else {
                Next::Stop
            };
            assert_eq!(ended, Some(wanted), "{percent} % left, {can_postcopy}");
        }
    }
}

fn policy(at_deadline: AtDeadline) -> Policy {
    Policy {
        deadline: Some(Duration::from_secs(4)),
        at_deadline,
        ..Policy::default()
    }
}

#[test]
fn deadline_follows_policy() {
    let next = |at| policy(at).next(&situation());
    assert_eq!(next(AtDeadline::Cancel), Next::GiveUp);
    assert_eq!(next(AtDeadline::Stop), Next::Stop);
    assert_eq!(next(AtDeadline::Postcopy), Next::Postcopy);
    assert_eq!(next(AtDeadline::Throttle), Next::Round { throttle: 20 });
    let slowest = Situation {
        throttle: MAX_THROTTLE,
        ..situation()
    };
    assert_eq!(policy(AtDeadline::Throttle).next(&slowest), Next::Stop);
    let never = Policy::default().next(&situation());
    assert_eq!(never, Next::Round { throttle: 0 });
}

#[test]
fn stop_is_limited() {
    let second = Duration::from_secs(1);
    let mut policy = Policy::default();
    assert_eq!(policy.stop_limit(Duration::ZERO, 0), second * 10);
    policy.max_downtime = second * 2;
    assert_eq!(policy.stop_limit(second, 0), second * 20);
    // `at_deadline` may accept a stop that is longer than `max_downtime`.
    assert_eq!(policy.stop_limit(second * 60, 0), second * 600);
    policy.verify = true;
    assert_eq!(policy.stop_limit(second, 3 << 29), second * 28);
    policy.stop_limit = Some(second);
    assert_eq!(policy.stop_limit(second * 60, 1), second * 5);
    assert!(policy.stop_limit(Duration::MAX, u64::MAX) > second);
}

#[test]
fn stop_waits_for_useful_rounds() {
    let fits = Situation {
        predicted: Duration::from_millis(100),
        ..situation()
    };
    assert_eq!(Policy::default().next(&fits), Next::Stop);
    let gains = Situation {
        dirty: 4_000,
        ..fits
    };
    assert_eq!(Policy::default().next(&gains), Next::Round { throttle: 0 });
    let few = Situation { dirty: 12, ..fits };
    assert_eq!(Policy::default().next(&few), Next::Stop);
}
