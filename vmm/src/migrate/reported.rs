//! Parts of the engine's report, as the service's API shows them.

use migration::Activity;
use spec::{MigrationActivity, MigrationRound, MigrationStep};

pub(super) fn round(round: migration::Round) -> MigrationRound {
    MigrationRound {
        round: round.round,
        pages: round.pages,
        took_us: round.took_us,
        bytes_per_second: round.bytes_per_second,
        dirty_pages: round.dirty_pages,
        predicted_downtime_us: round.predicted_downtime_us,
        throttle_percent: round.throttle_percent,
    }
}

pub(super) fn step(span: migration::Span) -> MigrationStep {
    MigrationStep {
        step: match span.activity {
            Activity::Connect => MigrationActivity::Connect,
            Activity::Prepare => MigrationActivity::Prepare,
            Activity::Track => MigrationActivity::Track,
            Activity::Trial => MigrationActivity::Trial,
            Activity::Round => MigrationActivity::Round,
            Activity::Sync => MigrationActivity::Sync,
            Activity::Pause => MigrationActivity::Pause,
            Activity::Save => MigrationActivity::Save,
            Activity::Load => MigrationActivity::Load,
            Activity::HandOver => MigrationActivity::HandOver,
            Activity::Pages => MigrationActivity::Pages,
            Activity::Release => MigrationActivity::Release,
        },
        at_us: span.at_us,
        took_us: span.took_us,
    }
}
