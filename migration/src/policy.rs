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

/// When pages are copied.
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
    /// The longest stop of the guest that the rounds aim at.
    pub max_downtime: Duration,
    /// Time limit from the start; `None` for no limit.
    pub deadline: Option<Duration>,
    /// Action at the deadline.
    pub at_deadline: AtDeadline,
    /// When pages are copied.
    pub mode: Mode,
    /// RAM channels, 1 to [`MAX_CONNECTIONS`]; chosen when absent.
    pub connections: Option<u16>,
    /// Bytes that may be sent in a second, all channels together; no limit when absent.
    pub max_bandwidth: Option<u64>,
    /// The destination is another process of this host, and is given the memory itself if all of it is
    /// shared memory.
    pub local: bool,
    /// The guest runs at the destination at once. Otherwise it stays paused there, until its owner
    /// resumes it.
    pub resume: bool,
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

/// A stop that was predicted to be short enough is called off once it takes this many times
/// `max_downtime`.
const CALL_OFF_FACTOR: u32 = 3;
/// No stop is called off earlier: on a busy host, threads wait for a CPU for as long.
const CALL_OFF_LEAST: Duration = Duration::from_millis(50);
/// Stops that are called off before [`Policy::after_call_off`] no longer tries again.
const CALL_OFFS: u32 = 3;
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
            resume: true,
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
    /// The time from a ping to its answer.
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

/// The least speed that a measurement can give, in bytes per second.
const LEAST_SPEED: u64 = 1 << 20;

impl Measured {
    /// A stop costs this beside what was measured: vCPUs leave the guest, and a thread wakes up at
    /// each step.
    const BASE: Duration = Duration::from_micros(400);

    pub(crate) fn downtime(&self, left: Left) -> Duration {
        // Three half round trips: the state, `Ready`, and `Commit`. With many pages, saving overlaps with
        // sending, so the longer of the two counts.
        self.round_trip * 3 / 2 + self.save.max(self.transfer(left)) + self.load + Self::BASE
    }

    /// Returns how long these pages take to be sent. A speed that was never measured counts as that of the
    /// other kind.
    fn transfer(&self, left: Left) -> Duration {
        let of = |pages: u64, speed: u64, other: u64| {
            let speed = if speed == 0 { other } else { speed };
            let bytes = pages.saturating_mul(PAGE as u64);
            Duration::from_micros(bytes.saturating_mul(1_000_000) / speed.max(1))
        };
        let memory = of(left.memory, self.memory_speed, self.disk_speed);
        memory.saturating_add(of(left.disks, self.disk_speed, self.memory_speed))
    }

    /// Records a round of these pages: `sent` bytes in the time `span`. Returns the round's speed, in bytes per
    /// second, if it says something.
    pub(crate) fn measure(&mut self, pages: Left, sent: u64, span: Duration) -> Option<u64> {
        let speed = per_second(sent, span).max(LEAST_SPEED);
        // A short transfer, or one of mostly zeros, gives no maximum of the link's speed;
        // but it gives a minimum.
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

    /// The prediction of a round behind one that took `span`, in which the guest wrote these pages:
    /// `fixed` is what a round costs whatever it sends.
    pub(crate) fn another(&self, left: Left, span: Duration, fixed: Duration) -> Another {
        let costs = fixed.saturating_add(self.transfer(left));
        // A guest keeps its rate. It never leaves more than it did in a longer round.
        let share = (costs.as_secs_f64() / span.as_secs_f64().max(1e-6)).min(1.0);
        let part = |pages: u64| (pages as f64 * share) as u64;
        Another {
            costs,
            leaves: Left {
                memory: part(left.memory),
                disks: part(left.disks),
            },
        }
    }

    /// Returns the time that these blocks of disks add to the stop. A batch or two count as nothing:
    /// however short the stop is to be, another round would leave as many.
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

/// One more round, as predicted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Another {
    /// How long it takes.
    pub(crate) costs: Duration,
    /// Pages to be sent behind it.
    pub(crate) leaves: Left,
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
    /// How long another round would take, and by how much it would shorten the stop.
    pub(crate) costs: Duration,
    pub(crate) saves: Duration,
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
    /// Another round, with vCPUs kept out of the guest for `throttle` percent of the time.
    Round { throttle: u8 },
    /// Stop the guest: what is left goes in the stop.
    Stop,
    /// Stop the guest: what is left goes after it.
    Postcopy,
    /// Give up.
    GiveUp,
}

/// The next step after a stop was called off because it took too long.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum AfterCallOff {
    /// More rounds, and another stop that is called off if it takes too long.
    Retry,
    /// More rounds, and a stop that takes as long as it takes.
    Accept,
    /// Another stop, behind which pages follow.
    Postcopy,
    /// Give up.
    GiveUp,
}

/// A round pays for itself if it shortens the stop by at least a quarter (1 / this) of the time that it
/// takes.
const PAYS: u32 = 4;
/// Parts of `max_downtime` that a stop is predicted to take at most, unless rounds no longer make it shorter:
/// the guest writes on until it is stopped, and the last pages may be slower than those before.
const MARGIN: (u32, u32) = (3, 4);
/// Pages that are not worth another round: two batches.
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
        let has_margin = now.predicted <= self.max_downtime * MARGIN.0 / MARGIN.1;
        let pays = now.saves.saturating_mul(PAYS) >= now.costs;
        // The stop would keep to the limit. Another round is worth its time only if the last one was: for
        // a guest that writes in bursts each prediction of a gain is wrong.
        if fits && !(shrinks && (pays || !has_margin && now.dirty > FEW)) {
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
            // `Auto` has a fallback if the destination does not support postcopy.
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
            // The guest hardly runs and still writes too much, or the stop is too long even without
            // pages: more rounds change nothing.
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
        // Each round takes time in proportion to its pages, and leaves the same part of them: `rest` is the
        // sum of that geometric series. It ends in a stop without pages. So if few pages are left and the
        // stop is still too long, it stays too long.
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

    /// The policy for rounds of disks alone. Where blocks of disks cannot follow the guest, the vCPUs are
    /// slowed down instead.
    pub(crate) fn for_disks(&self, can_follow: bool) -> Self {
        Self {
            mode: match self.mode {
                Mode::Hybrid if can_follow => Mode::Hybrid,
                Mode::Auto => Mode::Auto,
                Mode::Precopy | Mode::Hybrid | Mode::Postcopy => Mode::Precopy,
            },
            at_deadline: match self.at_deadline {
                AtDeadline::Postcopy if !can_follow => AtDeadline::Throttle,
                other => other,
            },
            ..self.clone()
        }
    }

    /// Returns when a running round is cut short: at the deadline, unless rounds continue after it.
    pub(crate) fn cut(&self, begun: Instant) -> Option<Instant> {
        let deadline = self.deadline?;
        // A deadline that the host's clock cannot express never comes.
        let end = begun.checked_add(deadline);
        end.filter(|_| self.at_deadline != AtDeadline::Throttle)
    }

    /// Whether pages may come to follow the guest.
    pub(crate) fn may_postcopy(&self) -> bool {
        self.mode != Mode::Precopy || self.at_deadline == AtDeadline::Postcopy
    }

    /// How long a stop may take that was predicted to keep to `max_downtime`, until the destination is
    /// sent the state. Behind that [`Policy::stop_limit`] is the limit.
    pub(crate) fn promise(&self) -> Duration {
        self.max_downtime
            .saturating_mul(CALL_OFF_FACTOR)
            .max(CALL_OFF_LEAST)
    }

    /// Decides what follows after `times` stops were called off.
    pub(crate) fn after_call_off(&self, times: u32, can_postcopy: bool) -> AfterCallOff {
        match self.at_deadline {
            AtDeadline::Postcopy if can_postcopy => AfterCallOff::Postcopy,
            _ if times < CALL_OFFS => AfterCallOff::Retry,
            AtDeadline::Cancel => AfterCallOff::GiveUp,
            AtDeadline::Postcopy | AtDeadline::Throttle | AtDeadline::Stop => AfterCallOff::Accept,
        }
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
mod tests;
