//! Saved state of a transport. Frozen.

use ::state::{LoadError, Saved, Section};
use serde::{Deserialize, Serialize};

use crate::queue::{QueueState, Rings};

/// One queue, with where it is.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Queue {
    pub(super) rings: Rings,
    pub(super) vector: u16,
    pub(super) enabled: bool,
    pub(super) state: QueueState,
}

/// The common configuration structure.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Common {
    pub(super) device_feature_select: u32,
    pub(super) driver_feature_select: u32,
    pub(super) driver_features: u64,
    pub(super) config_vector: u16,
    pub(super) status: u8,
    pub(super) queue_select: u16,
    pub(super) queues: Vec<Queue>,
}

/// The first version.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct V1 {
    /// The device's kind: another is refused.
    pub(super) device: u16,
    pub(super) common: Common,
    pub(super) isr: u8,
    pub(super) needs_reset: bool,
    pub(super) config_generation: u8,
}

impl Saved for V1 {
    const VERSION: u16 = 1;
}

/// With what is assumed of a driver that does not turn bus mastering on.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct V2 {
    /// The device's kind: another is refused.
    pub(super) device: u16,
    pub(super) common: Common,
    pub(super) isr: u8,
    pub(super) needs_reset: bool,
    pub(super) config_generation: u8,
    /// The device is served though its command register says that it is no bus master.
    pub(super) assumes_bus_master: bool,
}

impl Saved for V2 {
    const VERSION: u16 = 2;

    fn older(section: &Section<'_>) -> Result<Self, LoadError> {
        section.read::<V1>().map(|v1| Self {
            device: v1.device,
            common: v1.common,
            isr: v1.isr,
            needs_reset: v1.needs_reset,
            config_generation: v1.config_generation,
            // The first version served every driver, bus mastering or not.
            assumes_bus_master: true,
        })
    }
}
