//! The steps of a migration, in a line.

use spec::{MigrationActivity, MigrationStep};

use crate::summary::ms;

/// How long each step took, rounds together.
pub(crate) fn steps(timeline: &[MigrationStep]) -> String {
    let mut all: Vec<(MigrationActivity, u64, u32)> = Vec::new();
    for step in timeline {
        match all.iter_mut().find(|(activity, ..)| *activity == step.step) {
            Some((_, took, times)) => {
                *took = took.saturating_add(step.took_us);
                *times += 1;
            }
            None => all.push((step.step, step.took_us, 1)),
        }
    }
    let shown = all.into_iter().map(|(activity, took, times)| match times {
        1 => format!("{activity} {}", ms(took)),
        _ => format!("{times} times {activity} {}", ms(took)),
    });
    shown.collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn steps_are_summed_by_kind() {
        use MigrationActivity::{Connect, Round, Sync};
        let mut at_us = 0;
        let timeline = [(Connect, 1500), (Round, 30_000), (Round, 2_100), (Sync, 40)].map(
            |(step, took_us)| {
                let step = MigrationStep {
                    step,
                    at_us,
                    took_us,
                };
                at_us += took_us;
                step
            },
        );
        let shown = steps(&timeline);
        assert_eq!(shown, "connect 1.5 ms, 2 times round 32.1 ms, sync 0.0 ms");
    }
}
