//! The steps of a migration.

use std::fmt;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// A step of a migration.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct MigrationStep {
    /// The step.
    pub step: MigrationActivity,
    /// Its beginning, in microseconds since the migration began.
    pub at_us: u64,
    /// Its duration in microseconds, so far or until the next step began.
    pub took_us: u64,
}

/// Step of one side of a migration.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum MigrationActivity {
    /// The source connects.
    Connect,
    /// Both sides check the offer, and the destination builds the machine.
    Prepare,
    /// The source connects for memory, and starts dirty tracking.
    Track,
    /// The device state is saved and loaded for a trial.
    Trial,
    /// A round of pages is copied while the guest runs.
    Round,
    /// The source writes dirty disk caches back.
    Sync,
    /// The source pauses vCPUs and devices.
    Pause,
    /// The source sends the last pages, and saves the machine.
    Save,
    /// The destination loads the machine.
    Load,
    /// The source hands the guest over, and the destination starts it.
    HandOver,
    /// Pages follow the guest.
    Pages,
    /// The source releases what is left of the machine, or the guest resumes there.
    Release,
}

impl fmt::Display for MigrationActivity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Connect => "connect",
            Self::Prepare => "prepare",
            Self::Track => "track",
            Self::Trial => "trial",
            Self::Round => "round",
            Self::Sync => "sync",
            Self::Pause => "pause",
            Self::Save => "save",
            Self::Load => "load",
            Self::HandOver => "hand-over",
            Self::Pages => "pages",
            Self::Release => "release",
        })
    }
}
