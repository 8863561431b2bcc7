//! The faults of a run, chosen by its seed.

use std::time::Duration;

use migration::Mode;

use crate::link::{Fault, Plan};
use crate::{LONG_PATIENCE, PATIENCE};

/// SplitMix64.
pub(crate) struct Dice(pub(crate) u64);

impl Dice {
    pub(crate) fn roll(&mut self, below: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)) % below
    }
}

/// The faults of a run.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Script {
    /// Runs without faults have no time pressure.
    pub(crate) is_patient: bool,
    pub(crate) mode: Mode,
    pub(crate) connections: u16,
    pub(crate) writes: u64,
    pub(crate) verify: bool,
    /// Stops that take longer than the policy permits.
    pub(crate) long_stops: u32,
    /// Disks that are copied.
    pub(crate) disks: usize,
    pub(crate) plan: Option<Plan>,
    pub(crate) source_dies_at: Option<u64>,
    pub(crate) destination_dies_at: Option<u64>,
    pub(crate) cancel_after_us: Option<u64>,
    /// At the destination, which it is not asked for once it is ready.
    pub(crate) refuse_after_us: Option<u64>,
}

impl Script {
    pub(crate) fn patience(&self) -> Duration {
        if self.is_patient {
            LONG_PATIENCE
        } else {
            PATIENCE
        }
    }
}

pub(crate) fn script_of(seed: u64) -> Script {
    let mut dice = Dice(seed);
    let mut script = Script {
        mode: [Mode::Precopy, Mode::Auto, Mode::Hybrid, Mode::Postcopy][dice.roll(4) as usize],
        connections: 1 + dice.roll(3) as u16,
        writes: [0, 10, 100][dice.roll(3) as usize],
        verify: dice.roll(4) > 0,
        ..Script::default()
    };
    script.disks = dice.roll(3) as usize;
    // In one run of three, up to more than are tried again. Of other dice, so that each seed has the
    // faults that it had.
    script.long_stops = (Dice(!seed).roll(12) as u32).saturating_sub(7);
    match dice.roll(6) {
        0 | 1 => {
            // Early bytes are hellos and small messages, late ones the hand-over.
            let range = [200, 2_000, 1_400_000][dice.roll(3) as usize];
            script.plan = Some(Plan {
                connection: dice.roll(u64::from(script.connections) + 1),
                after: dice.roll(range),
                sending: dice.roll(3) > 0,
                fault: [Fault::Cut, Fault::Stall, Fault::Corrupt][dice.roll(3) as usize],
            });
        }
        2 => script.source_dies_at = Some(dice.roll(25)),
        3 => script.destination_dies_at = Some(dice.roll(12)),
        4 => script.cancel_after_us = Some(dice.roll(6_000)),
        _ => script.refuse_after_us = Some(dice.roll(6_000)),
    }
    script
}
