//! Time that each step of a migration takes.

use spec::{MigrationActivity, MigrationStep};

use crate::{Case, MIB, median_of, ms};

/// The columns: a step that is not among them is not in our moves.
const SHOWN: [MigrationActivity; 12] = [
    MigrationActivity::Connect,
    MigrationActivity::Prepare,
    MigrationActivity::Track,
    MigrationActivity::Trial,
    MigrationActivity::Round,
    MigrationActivity::Sync,
    MigrationActivity::Pause,
    MigrationActivity::Save,
    MigrationActivity::Load,
    MigrationActivity::HandOver,
    MigrationActivity::Pages,
    MigrationActivity::Release,
];

/// How long each step of a move took, in microseconds, and how many rounds there were.
#[derive(Clone, Default)]
pub(crate) struct Steps {
    took: [u64; SHOWN.len()],
    rounds: u64,
}

impl Steps {
    pub(crate) fn of(timeline: &[MigrationStep]) -> Self {
        let mut steps = Self::default();
        for step in timeline {
            let shown = SHOWN.iter().position(|shown| *shown == step.step);
            if let Some(took) = shown.and_then(|index| steps.took.get_mut(index)) {
                *took += step.took_us;
            }
            steps.rounds += u64::from(step.step == MigrationActivity::Round);
        }
        steps
    }
}

/// Prints the medians of the steps of each case.
pub(crate) fn print(all: &[(Case, Vec<Steps>)]) {
    println!("\nWhere the time goes, at the source, in ms: medians of each step.\n");
    let names = SHOWN.map(|step| step.to_string());
    println!(
        "| memory | vCPUs | pages/s | mode | rounds | {} |",
        names.join(" | ")
    );
    println!("|---|---|---|---|---|{}", "---|".repeat(SHOWN.len()));
    for (case, moves) in all {
        let rounds = median_of(moves.iter().map(|steps| steps.rounds).collect());
        let median =
            |index: usize| ms(median_of(moves.iter().map(|one| one.took[index]).collect()));
        let columns: Vec<_> = (0..SHOWN.len()).map(median).collect();
        println!(
            "| {} MiB | {} | {} | {} | {rounds} | {} |",
            case.memory / MIB,
            case.vcpus,
            case.rate,
            case.mode,
            columns.join(" | ")
        );
    }
}
