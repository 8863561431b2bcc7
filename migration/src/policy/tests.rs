//! Decisions after rounds, and limits of stops.

use proptest::prelude::*;

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
        costs: Duration::from_secs(1),
        saves: Duration::ZERO,
        span: Duration::from_secs(1),
        elapsed: Duration::from_secs(5),
        can_postcopy: true,
        throttle: 0,
    }
}

/// Blocks of disks cannot follow a guest: whatever the policy for memory says, disks end in the stop,
/// and a guest that writes too much to them is slowed down.
#[test]
fn disks_that_cannot_follow_slow_the_guest_down() {
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
            let follow = policy.for_disks(true).next(&situation());
            let may_follow = at_deadline == AtDeadline::Postcopy || mode == Mode::Hybrid;
            assert_eq!(
                follow == Next::Postcopy,
                may_follow,
                "{mode:?} {at_deadline:?}"
            );
            let next = policy.for_disks(false).next(&situation());
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
                policy.for_disks(false).next(&slowest),
                Next::Round { throttle: 99 }
            );
            let early = Situation {
                round: 1,
                elapsed: Duration::ZERO,
                ..situation()
            };
            let round = Next::Round { throttle: 0 };
            assert_eq!(policy.for_disks(false).next(&early), round);
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
                    costs: Duration::from_micros(dirty * 4),
                    saves: Duration::ZERO,
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
fn deadline_beyond_the_clock_never_comes() {
    let now = Instant::now();
    for (deadline, cut) in [
        (None, None),
        (
            Some(Duration::from_secs(5)),
            Some(now + Duration::from_secs(5)),
        ),
        (Some(Duration::from_secs(u64::MAX)), None),
    ] {
        let policy = Policy {
            deadline,
            ..Policy::default()
        };
        assert_eq!(policy.cut(now), cut);
    }
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
    let ms = Duration::from_millis;
    let fits = Situation {
        predicted: ms(100),
        costs: ms(100),
        saves: ms(90),
        ..situation()
    };
    let round = Next::Round { throttle: 0 };
    let next = |now| Policy::default().next(&now);
    // The last round gained nothing, whatever is predicted of the next.
    assert_eq!(next(fits), Next::Stop);
    let shrinks = Situation {
        dirty: 4_000,
        ..fits
    };
    assert_eq!(next(shrinks), round);
    // 10 ms less of 100 are not worth 100 ms.
    let costly = Situation {
        saves: ms(10),
        ..shrinks
    };
    assert_eq!(next(costly), Next::Stop);
    // Of a limit of 300 ms, there is no margin.
    let close = Situation {
        predicted: ms(250),
        ..costly
    };
    assert_eq!(next(close), round);
    let few = Situation { dirty: 12, ..close };
    assert_eq!(next(few), Next::Stop);
}

/// A simulated guest, and the way to the destination.
#[derive(Clone, Copy, Debug)]
struct Simulation {
    /// Pages that the guest has, and those that it writes: in order, over and over.
    pages: u64,
    region: u64,
    /// Pages a second: written by the guest, and sent.
    rate: u64,
    speed: u64,
    /// Time that each round takes whatever it sends; `stop` is that of the stop.
    fixed: Duration,
    stop: Duration,
    /// From the decision to stop until the guest stops.
    reaction: Duration,
}

impl Simulation {
    /// Different pages that the guest writes in so much time.
    fn written(&self, span: Duration) -> u64 {
        let written = (span.as_secs_f64() * self.rate as f64) as u64;
        written.min(self.region)
    }

    fn sent(&self, pages: u64) -> Duration {
        Duration::from_secs_f64(pages as f64 / self.speed as f64)
    }

    fn measured(&self) -> Measured {
        Measured {
            save: self.stop / 2,
            load: self.stop / 2,
            memory_speed: self.speed * PAGE as u64,
            ..Measured::default()
        }
    }

    /// Copies rounds until `next` says to stop. Returns the time of all, and of it that of the stop; `None`
    /// if it does not within many rounds.
    fn run(&self, next: impl Fn(&Situation) -> Next) -> Option<(Duration, Duration)> {
        let measured = self.measured();
        let (mut left, mut elapsed) = (self.pages, Duration::ZERO);
        let memory = |memory| Left { memory, disks: 0 };
        for round in 1..1000 {
            let before = left;
            let span = self.fixed + self.sent(left);
            elapsed += span;
            left = self.written(span);
            let predicted = measured.downtime(memory(left));
            let another = measured.another(memory(left), span, self.fixed);
            let now = Situation {
                round,
                dirty: left,
                dirty_before: before,
                predicted,
                costs: another.costs,
                saves: predicted.saturating_sub(measured.downtime(another.leaves)),
                span,
                elapsed,
                can_postcopy: false,
                throttle: 0,
            };
            if next(&now) == Next::Stop {
                let left = (left + self.written(self.reaction)).min(self.region);
                let save = (self.stop / 2).max(self.sent(left));
                let stop = save + self.stop / 2 + Measured::BASE;
                return Some((elapsed + self.reaction + stop, stop));
            }
        }
        None
    }
}

proptest! {
    /// Against the naive rule, which stops as soon as the stop is predicted to be short enough: each
    /// millisecond by which more rounds shorten the stop costs four of the migration at most, and a
    /// guest that the naive rule stops is stopped by ours. A guest that writes few pages over and over has
    /// one round too many, because a shorter one leaves as many.
    #[test]
    fn more_rounds_pay_for_themselves(
        pages in 1_000_u64..4_000_000,
        region in prop_oneof![Just(u64::MAX), 0_u64..1_000_000],
        rate in 0_u64..400_000,
        speed in 2_000_u64..1_000_000,
        fixed in 100_u64..20_000,
        stop in 200_u64..10_000,
        max_downtime in 15_u64..2_000,
    ) {
        let simulation = Simulation {
            pages,
            region: region.min(pages),
            rate,
            speed,
            fixed: Duration::from_micros(fixed),
            stop: Duration::from_micros(stop),
            reaction: Duration::from_millis(2),
        };
        let policy = Policy {
            max_downtime: Duration::from_millis(max_downtime),
            ..Policy::default()
        };
        let naive = simulation.run(|now| match now.predicted <= policy.max_downtime {
            true => Next::Stop,
            false => Next::Round { throttle: 0 },
        });
        let ours = simulation.run(|now| policy.next(now));
        prop_assert_eq!(naive.is_some(), ours.is_some());
        let (Some(naive), Some(ours)) = (naive, ours) else {
            return Ok(());
        };
        // Pages that are written while the guest is being stopped are beyond all predictions; a guest
        // that converges writes them in less time than they take.
        prop_assert!(
            ours.1 <= policy.max_downtime + simulation.reaction,
            "{simulation:?} stops for {:?}", ours.1
        );
        let (longer, shorter) = (ours.0.saturating_sub(naive.0), naive.1.saturating_sub(ours.1));
        // Predictions are in whole pages.
        let rounding = simulation.sent(2) * PAYS;
        let has_margin = naive.1 <= policy.max_downtime * MARGIN.0 / MARGIN.1;
        let wasted = match has_margin && region == u64::MAX {
            true => Duration::ZERO,
            false => policy.max_downtime + simulation.fixed,
        };
        prop_assert!(
            longer <= shorter * PAYS + rounding + wasted,
            "{simulation:?} is {longer:?} longer and {shorter:?} shorter"
        );
    }
}
