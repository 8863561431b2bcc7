//! The policy of a migration, and the decision when to stop the guest.

use std::time::{Duration, Instant};

use crate::pages::PAGE;
use crate::sender::per_second;

/// Action at the deadline of a migration that has not converged.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum AtDeadline {
    /// Cancel; the guest stays at the source.
    #[default]
    Cancel,
    /// Slow the vCPUs down more and more, until the stop is short enough.
    Throttle,
    /// Switch to postcopy: the guest moves, and its pages follow.
    Postcopy,
    /// Stop the guest for as long as the rest of its memory takes.
    Stop,
}

/// When pages go.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Mode {
    /// All memory is copied before the guest moves.
    #[default]
    Precopy,
    /// Some rounds are copied before the guest moves, and the rest after it.
    Hybrid,
    /// All memory is copied after the guest has moved.
    Postcopy,
    /// All memory is copied before the guest moves, if that is predicted to end by the deadline. If not,
    /// [`Policy::at_deadline`] is done as soon as that is known.
    Auto,
}

/// Limits and modes of a migration.
#[derive(Clone, Debug, PartialEq)]
pub struct Policy {
    /// How long the guest may stand.
    pub max_downtime: Duration,
    /// Time limit from the start; `None` for no limit.
    pub deadline: Option<Duration>,
    /// Action at the deadline.
    pub at_deadline: AtDeadline,
    /// When pages go.
    pub mode: Mode,
    /// RAM channels, 1 to [`MAX_CONNECTIONS`]; chosen when absent.
    pub connections: Option<u16>,
    /// Bytes that may be sent in a second, all channels together; as many as there can when absent.
    pub max_bandwidth: Option<u64>,
    /// The destination is another process of this host, and is given the memory itself, where it is of
    /// a kind that can be.
    pub local: bool,
    /// The destination compares a hash of every page before the guest runs there. Adds to the stop,
    /// beyond `max_downtime`.
    pub verify: bool,
    /// How long the guest may be paused before the commit point; then it resumes at the source. When
    /// absent, ten times the longer of `max_downtime` and the stop that was predicted when it began,
    /// and 10 seconds at least.
    pub stop_limit: Option<Duration>,
    /// How long the guest stays paused after its state was sent, if the destination is lost before it
    /// answers and cannot be told that the guest stays here. A host that is fenced in this time has
    /// not run the guest since. When absent, the guest resumes as soon as the destination is lost.
    pub hold: Option<Duration>,
    /// How long the other side may be silent.
    pub patience: Duration,
}

/// A stop is given up after this many times the one that was accepted.
const STOP_LIMIT_FACTOR: u32 = 10;
/// No stop is given up earlier. As long as the silence that counts as a lost connection: threads of a
/// busy host may wait for a CPU for seconds, and such a host must be able to hand its guests over.
const STOP_LIMIT_LEAST: Duration = Duration::from_secs(10);
/// How much longer a stop may take for each GiB that is verified. Hashing takes 0.15 s, and twenty
/// times that on an emulated host.
const STOP_LIMIT_VERIFY: Duration = Duration::from_secs(4);

/// Maximum number of RAM channels of a migration.
pub const MAX_CONNECTIONS: u16 = 16;

impl Default for Policy {
    fn default() -> Self {
        Self {
            max_downtime: Duration::from_millis(300),
            deadline: None,
            at_deadline: AtDeadline::Cancel,
            mode: Mode::Precopy,
            connections: None,
            max_bandwidth: None,
            local: false,
            verify: false,
            stop_limit: None,
            hold: None,
            patience: Duration::from_secs(10),
        }
    }
}

/// Measured parts of the stop, for its prediction.
#[derive(Clone, Copy, Default)]
pub(crate) struct Measured {
    /// There and back.
    pub(crate) round_trip: Duration,
    pub(crate) save: Duration,
    pub(crate) load: Duration,
    /// Bytes of memory that are sent in a second; 0 before it is known.
    pub(crate) memory_speed: u64,
    /// Bytes of disks that are sent in a second; 0 before it is known. Storage is slower than memory, so
    /// that a common speed would be wrong for both.
    pub(crate) disk_speed: u64,
}

/// Pages that are left to send.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Left {
    pub(crate) memory: u64,
    /// Blocks of disks of the same size.
    pub(crate) disks: u64,
}

impl Left {
    pub(crate) fn count(self) -> u64 {
        self.memory.saturating_add(self.disks)
    }
}

/// The least speed that is taken for true, in bytes per second.
const LEAST_SPEED: u64 = 1 << 20;

impl Measured {
    /// A stop costs this beside what was measured: vCPUs leave the guest, and a thread wakes up at
    /// each step.
    const BASE: Duration = Duration::from_micros(400);

    pub(crate) fn downtime(&self, left: Left) -> Duration {
        // State and answer, order.
        // With many pages, saving overlaps with sending, so the longer of the two counts.
        self.round_trip * 3 / 2 + self.save.max(self.transfer(left)) + self.load + Self::BASE
    }

    /// How long so many pages take to be sent. What was never measured counts as the other kind.
    fn transfer(&self, left: Left) -> Duration {
        let of = |pages: u64, speed: u64, other: u64| {
            let speed = if speed == 0 { other } else { speed };
            let bytes = pages.saturating_mul(PAGE as u64);
            Duration::from_micros(bytes.saturating_mul(1_000_000) / speed.max(1))
        };
        let memory = of(left.memory, self.memory_speed, self.disk_speed);
        memory.saturating_add(of(left.disks, self.disk_speed, self.memory_speed))
    }

    /// Takes in a round of these pages: `sent` bytes in so much time. Returns the round's speed, in bytes per
    /// second, if it says something.
    pub(crate) fn measure(&mut self, pages: Left, sent: u64, span: Duration) -> Option<u64> {
        let speed = per_second(sent, span).max(LEAST_SPEED);
        // What little there was, or the looking for zeros, says nothing of how fast much would be;
        // but it was as fast as that.
        let is_much = sent > 1 << 20 && sent > pages.count() * PAGE as u64 / 2;
        let (of_kind, known) = match (pages.memory, pages.disks) {
            (_, 0) => (speed, &mut self.memory_speed),
            (0, _) => (speed, &mut self.disk_speed),
            // Rounds of both come behind rounds of disks alone: disks take as long as they took there.
            (memory, disks) => {
                let of_disks = self.transfer(Left { memory: 0, disks });
                let rest = span.saturating_sub(of_disks).max(span / 4);
                let share = u128::from(sent) * u128::from(memory) / u128::from(pages.count());
                let share = u64::try_from(share).unwrap_or(u64::MAX);
                let of_memory = per_second(share, rest).max(LEAST_SPEED);
                (of_memory, &mut self.memory_speed)
            }
        };
        let is_news = is_much || of_kind > *known;
        if is_news {
            *known = of_kind;
        }
        is_news.then_some(speed)
    }

    /// The time that so many blocks of disks add to the stop. A batch or two count as nothing: however short the
    /// stop is to be, another round would leave as many.
    pub(crate) fn downtime_of_disks(&self, blocks: u64) -> Duration {
        match blocks <= FEW {
            true => Duration::ZERO,
            false => self.transfer(Left {
                memory: 0,
                disks: blocks,
            }),
        }
    }
}

/// The situation after a round.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Situation {
    pub(crate) round: u32,
    /// Pages to be sent.
    pub(crate) dirty: u64,
    /// Dirty pages after the previous round.
    pub(crate) dirty_before: u64,
    /// How long the stop would be now.
    pub(crate) predicted: Duration,
    /// How long the round took.
    pub(crate) span: Duration,
    pub(crate) elapsed: Duration,
    /// Pages can follow the guest.
    pub(crate) can_postcopy: bool,
    /// Percent.
    pub(crate) throttle: u8,
}

/// The next step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Next {
    /// Another round, with vCPUs slowed down by so many percent.
    Round { throttle: u8 },
    /// Stop the guest: what is left goes in the stop.
    Stop,
    /// Stop the guest: what is left goes after it.
    Postcopy,
    /// Give up.
    GiveUp,
}

/// Pages that are not worth another round: a batch or two.
const FEW: u64 = 128;
/// Rounds before pages follow the guest in [`Mode::Hybrid`], if it does not converge before. In [`Mode::Auto`],
/// rounds before a prediction is trusted: the first one also copies what the guest wrote long ago.
const HYBRID_ROUNDS: u32 = 3;
/// The most that vCPUs are slowed down, in percent.
const MAX_THROTTLE: u8 = 99;

impl Policy {
    /// Decides after a round.
    pub(crate) fn next(&self, now: &Situation) -> Next {
        let shrinks = now.dirty.saturating_mul(2) < now.dirty_before;
        let fits = now.predicted <= self.max_downtime;
        // It would do, but less is better as long as a round costs little and gains much.
        if fits && (now.dirty <= FEW || !shrinks) {
            return Next::Stop;
        }
        // A round that halves the rest is worth more than the switch: each page that is left may
        // become a fault at the destination.
        if self.mode == Mode::Hybrid && now.round >= HYBRID_ROUNDS && !shrinks {
            return Next::Postcopy;
        }
        let is_late = self
            .deadline
            .is_some_and(|deadline| now.elapsed >= deadline);
        let throttle = now.throttle;
        if !is_late && !self.is_hopeless(now) {
            return Next::Round { throttle };
        }
        let action = match self.at_deadline {
            // With a destination that cannot, `Auto` takes the next best.
            AtDeadline::Postcopy if self.mode == Mode::Auto && !now.can_postcopy => {
                AtDeadline::Throttle
            }
            action => action,
        };
        match action {
            // Converged after all: the actions are for a guest that does not.
            _ if fits => Next::Stop,
            AtDeadline::Cancel => Next::GiveUp,
            AtDeadline::Stop => Next::Stop,
            AtDeadline::Postcopy => Next::Postcopy,
            AtDeadline::Throttle if shrinks => Next::Round { throttle },
            // It does not run as good as at all, and still writes too much, or the stop is too long
            // without a page: more rounds change nothing.
            AtDeadline::Throttle if throttle == MAX_THROTTLE => Next::Stop,
            AtDeadline::Throttle => Next::Round {
                throttle: match throttle {
                    0 => 20,
                    some => some.saturating_add(20).min(MAX_THROTTLE),
                },
            },
        }
    }

    /// Whether [`Mode::Auto`] need not wait for the deadline: rounds would not make the stop short enough by then.
    fn is_hopeless(&self, now: &Situation) -> bool {
        let is_judged = self.mode == Mode::Auto && now.round >= HYBRID_ROUNDS;
        if !is_judged || self.at_deadline == AtDeadline::Cancel {
            return false;
        }
        // Each round takes as long as there are pages, and leaves the same part of them: a geometric
        // series, whose sum is this. It ends in a stop without pages, so few pages that are too many say
        // that the stop is too long even then.
        let gained = now.dirty_before.saturating_sub(now.dirty);
        if gained == 0 || now.dirty <= FEW {
            return true;
        }
        let rest = now.span.as_secs_f64() * now.dirty as f64 / gained as f64;
        let left = self
            .deadline
            .map(|deadline| deadline.saturating_sub(now.elapsed));
        left.is_some_and(|left| rest > left.as_secs_f64())
    }

    /// The policy for rounds of disks alone. Disks do not follow a guest, so that the vCPUs are slowed
    /// down where memory would follow.
    pub(crate) fn for_disks(&self) -> Self {
        Self {
            mode: match self.mode {
                Mode::Auto => Mode::Auto,
                Mode::Precopy | Mode::Hybrid | Mode::Postcopy => Mode::Precopy,
            },
            at_deadline: match self.at_deadline {
                AtDeadline::Postcopy => AtDeadline::Throttle,
                other => other,
            },
            ..self.clone()
        }
    }

    /// When a round that began earlier is cut short: at the deadline, unless rounds go on behind it.
    pub(crate) fn cut(&self, begun: Instant) -> Option<Instant> {
        let deadline = self.deadline?;
        (self.at_deadline != AtDeadline::Throttle).then(|| begun + deadline)
    }

    /// Whether pages may come to follow the guest.
    pub(crate) fn may_postcopy(&self) -> bool {
        self.mode != Mode::Precopy || self.at_deadline == AtDeadline::Postcopy
    }

    /// How long a stop may take that is `predicted` to take so long, with so much memory.
    pub(crate) fn stop_limit(&self, predicted: Duration, memory: u64) -> Duration {
        let accepted = self.max_downtime.max(predicted);
        let derived = accepted
            .saturating_mul(STOP_LIMIT_FACTOR)
            .max(STOP_LIMIT_LEAST);
        let gib = u32::try_from(memory.div_ceil(1 << 30)).unwrap_or(u32::MAX);
        let verify = STOP_LIMIT_VERIFY.saturating_mul(if self.verify { gib } else { 0 });
        // On top of an explicit limit, too: hashing grows with memory, and would exceed a limit
        // that was chosen for the stop alone.
        self.stop_limit.unwrap_or(derived).saturating_add(verify)
    }

    /// RAM channels to ask for: one more where pages may be waited for.
    pub(crate) fn connections(&self, memory: u64) -> u16 {
        let cpus = std::thread::available_parallelism().map_or(1, usize::from);
        let useful = match memory >> 30 {
            0 => 1,
            1..4 => 2,
            _ => 4,
        };
        // Each channel is a thread that copies and checksums: more of them than CPUs gain nothing.
        let auto = u16::try_from(cpus.min(useful)).unwrap_or(1);
        let wanted = self.connections.unwrap_or(auto).max(1);
        let fault_server = u16::from(self.may_postcopy());
        wanted.saturating_add(fault_server).min(MAX_CONNECTIONS)
    }
}

#[cfg(test)]
mod tests {
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
}
