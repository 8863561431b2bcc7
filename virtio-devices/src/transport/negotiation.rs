//! The common configuration structure (virtio 1.3, 4.1.4.3): what a driver negotiates by.
//!
//! Pure state: a write says what the transport is to do about it.

use state::LoadError;
use virtio_bindings::virtio_config::{
    VIRTIO_CONFIG_S_ACKNOWLEDGE, VIRTIO_CONFIG_S_DRIVER, VIRTIO_CONFIG_S_DRIVER_OK,
    VIRTIO_CONFIG_S_FAILED, VIRTIO_CONFIG_S_FEATURES_OK, VIRTIO_CONFIG_S_NEEDS_RESET,
    VIRTIO_F_RING_RESET, VIRTIO_F_VERSION_1,
};
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};

use super::NO_VECTOR;
use super::saved;
use crate::limits::{MAX_QUEUE_SIZE, MAX_QUEUES};
use crate::queue::{QueueState, Rings};

/// Bytes of the structure, with the fields of virtio 1.3.
pub(super) const LEN: usize = 64;

/// Features of every device: VERSION_1, indirect descriptors, event indices, and reset of single
/// queues.
const TRANSPORT_FEATURES: u64 = 1 << VIRTIO_F_VERSION_1
    | 1 << VIRTIO_RING_F_EVENT_IDX
    | 1 << VIRTIO_RING_F_INDIRECT_DESC
    | 1 << VIRTIO_F_RING_RESET;

const ACKNOWLEDGE: u8 = VIRTIO_CONFIG_S_ACKNOWLEDGE as u8;
const DRIVER: u8 = VIRTIO_CONFIG_S_DRIVER as u8;
const DRIVER_OK: u8 = VIRTIO_CONFIG_S_DRIVER_OK as u8;
const FEATURES_OK: u8 = VIRTIO_CONFIG_S_FEATURES_OK as u8;
const FAILED: u8 = VIRTIO_CONFIG_S_FAILED as u8;
/// `DEVICE_NEEDS_RESET`.
pub(super) const NEEDS_RESET: u8 = VIRTIO_CONFIG_S_NEEDS_RESET as u8;

/// The transport's action after a write.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Effect {
    /// Nothing more.
    None,
    /// Take the device back to its beginning.
    Reset,
    /// The driver is ready: activate the device, start the queues that are enabled.
    DriverOk,
    /// Start this queue, of a device that is active.
    StartQueue(u16),
    /// Stop this queue, and forget it.
    ResetQueue(u16),
    /// The vector of configuration changes is another.
    ConfigVector(u16),
    /// The vector of this queue is another.
    QueueVector(u16, u16),
    /// The driver broke the rules, and the device needs a reset.
    Broken(&'static str),
}

/// One queue, as the driver sets it up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct QueueRegisters {
    pub(super) max_size: u16,
    pub(super) rings: Rings,
    pub(super) vector: u16,
    pub(super) enabled: bool,
    /// The queue's state while it is stopped.
    pub(super) state: QueueState,
}

impl QueueRegisters {
    fn new(max_size: u16) -> Self {
        Self {
            max_size,
            rings: Rings {
                size: max_size,
                ..Rings::default()
            },
            vector: NO_VECTOR,
            enabled: false,
            state: QueueState::default(),
        }
    }
}

/// The structure's registers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct CommonConfig {
    offered: u64,
    vectors: u16,
    device_feature_select: u32,
    driver_feature_select: u32,
    driver_features: u64,
    config_vector: u16,
    status: u8,
    queue_select: u16,
    queues: Vec<QueueRegisters>,
}

impl CommonConfig {
    /// Creates the registers of a device with these features, queues and MSI-X vectors.
    pub(super) fn new(features: u64, queue_sizes: &[u16], vectors: u16) -> Self {
        let sizes = queue_sizes.iter().take(MAX_QUEUES);
        Self {
            offered: features | TRANSPORT_FEATURES,
            vectors,
            device_feature_select: 0,
            driver_feature_select: 0,
            driver_features: 0,
            config_vector: NO_VECTOR,
            status: 0,
            queue_select: 0,
            queues: sizes
                .map(|size| QueueRegisters::new((*size).min(MAX_QUEUE_SIZE)))
                .collect(),
        }
    }

    /// Resets the registers, as after power-on.
    pub(super) fn reset(&mut self) {
        let sizes: Vec<u16> = self.queues.iter().map(|queue| queue.max_size).collect();
        let own = self.offered & !TRANSPORT_FEATURES;
        *self = Self::new(own, &sizes, self.vectors);
    }

    pub(super) fn queues(&self) -> &[QueueRegisters] {
        &self.queues
    }

    pub(super) fn queues_mut(&mut self) -> impl Iterator<Item = &mut QueueRegisters> {
        self.queues.iter_mut()
    }

    pub(super) fn config_vector(&self) -> u16 {
        self.config_vector
    }

    /// Returns the negotiated features.
    pub(super) fn features(&self) -> u64 {
        self.driver_features
    }

    pub(super) fn event_idx(&self) -> bool {
        self.driver_features & 1 << VIRTIO_RING_F_EVENT_IDX != 0
    }

    pub(super) fn driver_ok(&self) -> bool {
        self.status & DRIVER_OK != 0
    }

    /// The registers as they are in memory. `live` is what is not kept here: status bits that the
    /// device sets, and the generation of device configuration space.
    pub(super) fn image(&self, needs_reset: u8, generation: u8) -> [u8; LEN] {
        let half = |features: u64, select: u32| match select {
            0 => features as u32,
            1 => (features >> 32) as u32,
            _ => 0,
        };
        let queue = self.queues.get(usize::from(self.queue_select)).copied();
        // A queue that is not there has no size (4.1.4.3.1).
        let queue = queue.unwrap_or(QueueRegisters::new(0));
        let count = u16::try_from(self.queues.len()).unwrap_or(u16::MAX);
        let mut image = [0; LEN];
        let mut put = |at: usize, bytes: &[u8]| {
            if let Some(field) = image.get_mut(at..at + bytes.len()) {
                field.copy_from_slice(bytes);
            }
        };
        put(0, &self.device_feature_select.to_le_bytes());
        put(
            4,
            &half(self.offered, self.device_feature_select).to_le_bytes(),
        );
        put(8, &self.driver_feature_select.to_le_bytes());
        put(
            12,
            &half(self.driver_features, self.driver_feature_select).to_le_bytes(),
        );
        put(16, &self.config_vector.to_le_bytes());
        put(18, &count.to_le_bytes());
        put(20, &[self.status | needs_reset, generation]);
        put(22, &self.queue_select.to_le_bytes());
        put(24, &queue.rings.size.to_le_bytes());
        put(26, &queue.vector.to_le_bytes());
        put(28, &u16::from(queue.enabled).to_le_bytes());
        put(30, &self.queue_select.to_le_bytes());
        put(32, &queue.rings.descriptors.to_le_bytes());
        put(40, &queue.rings.available.to_le_bytes());
        put(48, &queue.rings.used.to_le_bytes());
        image
    }

    /// Takes a write. Those that are not of a field's width, or of half of a 64-bit field, are
    /// ignored (4.1.3.1 asks drivers for no others).
    pub(super) fn write(&mut self, at: usize, data: &[u8]) -> Effect {
        let mut bytes = [0; 8];
        match bytes.get_mut(..data.len()) {
            Some(low) => low.copy_from_slice(data),
            None => return Effect::None,
        }
        let value = u64::from_le_bytes(bytes);
        // The casts take what the width, which is matched beside, leaves.
        match (at, data.len()) {
            (0, 4) => self.device_feature_select = value as u32,
            (8, 4) => self.driver_feature_select = value as u32,
            (12, 4) => self.write_features(value as u32),
            (16, 2) => {
                self.config_vector = self.vector(value as u16);
                return Effect::ConfigVector(self.config_vector);
            }
            (20, 1) => return self.write_status(value as u8),
            (22, 2) => self.queue_select = value as u16,
            (24..64, _) => return self.write_queue(at, data.len(), value),
            _ => {}
        }
        Effect::None
    }

    /// One of the device's vectors, or none (4.1.5.1.2.1).
    fn vector(&self, value: u16) -> u16 {
        // 4.1.5.1.2.1: a vector that cannot be had reads back as NO_VECTOR, by which the driver
        // knows.
        if value < self.vectors {
            value
        } else {
            NO_VECTOR
        }
    }

    fn write_features(&mut self, half: u32) {
        // What was agreed upon stays (3.1.1, 5).
        if self.status & FEATURES_OK != 0 {
            return;
        }
        let (kept, new) = match self.driver_feature_select {
            0 => (!0 << 32, u64::from(half)),
            1 => (!0 >> 32, u64::from(half) << 32),
            _ => return,
        };
        self.driver_features = self.driver_features & kept | new;
    }

    fn write_status(&mut self, new: u8) -> Effect {
        if new == 0 {
            return Effect::Reset;
        }
        let old = self.status;
        let mut new = new & (ACKNOWLEDGE | DRIVER | DRIVER_OK | FEATURES_OK | FAILED);
        // Bits are only ever added, but by a reset (2.1.1).
        new |= old;
        if new & !old & FEATURES_OK != 0 && !self.features_acceptable() {
            // The driver reads it back, and sees that it is not set (3.1.1, 6).
            new &= !FEATURES_OK;
        }
        if new & !old & DRIVER_OK != 0 {
            if new & FEATURES_OK == 0 {
                // DRIVER_OK does not stay set: a device without agreed features must not be
                // activated (3.1.1).
                return Effect::Broken("its driver set DRIVER_OK before FEATURES_OK");
            }
            self.status = new;
            return Effect::DriverOk;
        }
        self.status = new;
        Effect::None
    }

    fn features_acceptable(&self) -> bool {
        is_modern(self.driver_features) && self.driver_features & !self.offered == 0
    }

    fn write_queue(&mut self, at: usize, width: usize, value: u64) -> Effect {
        let select = self.queue_select;
        let (driver_ok, resettable) = (
            self.driver_ok(),
            self.driver_features & 1 << VIRTIO_F_RING_RESET != 0,
        );
        let vector = self.vector(value as u16);
        // The guest may select any number. A queue that is not there swallows writes.
        let Some(queue) = self.queues.get_mut(usize::from(select)) else {
            return Effect::None;
        };
        let before = queue.rings;
        match (at, width) {
            (24, 2) => queue.rings.size = value as u16,
            (26, 2) => {
                queue.vector = vector;
                return Effect::QueueVector(select, vector);
            }
            // Writing 0 has no effect: only a reset of the queue disables it (4.1.4.3.2).
            (28, 2) if value == 1 && !queue.enabled => {
                let size = queue.rings.size;
                // Here and again when the queue starts: `Queue::new` also serves devices that were
                // loaded.
                if !size.is_power_of_two() || size > queue.max_size {
                    return Effect::Broken("a queue's size is not a power of two within its limit");
                }
                queue.enabled = true;
                return if driver_ok {
                    Effect::StartQueue(select)
                } else {
                    Effect::None
                };
            }
            (32, 4 | 8) => set(&mut queue.rings.descriptors, 0, width, value),
            (36, 4) => set(&mut queue.rings.descriptors, 4, width, value),
            (40, 4 | 8) => set(&mut queue.rings.available, 0, width, value),
            (44, 4) => set(&mut queue.rings.available, 4, width, value),
            (48, 4 | 8) => set(&mut queue.rings.used, 0, width, value),
            (52, 4) => set(&mut queue.rings.used, 4, width, value),
            // Only if RING_RESET was negotiated (2.6.1).
            (58, 2) if value == 1 && resettable => {
                *queue = QueueRegisters {
                    vector: queue.vector,
                    ..QueueRegisters::new(queue.max_size)
                };
                return Effect::ResetQueue(select);
            }
            _ => {}
        }
        // A driver sets these fields before it enables the queue (4.1.4.3.2). A task may be using
        // the rings by now: the old ones stay.
        if queue.enabled && queue.rings != before {
            queue.rings = before;
            return Effect::Broken("a queue was moved while it was enabled");
        }
        Effect::None
    }

    pub(super) fn save(&self) -> saved::Common {
        saved::Common {
            device_feature_select: self.device_feature_select,
            driver_feature_select: self.driver_feature_select,
            driver_features: self.driver_features,
            config_vector: self.config_vector,
            status: self.status,
            queue_select: self.queue_select,
            queues: self
                .queues
                .iter()
                .map(|queue| saved::Queue {
                    rings: queue.rings,
                    vector: queue.vector,
                    enabled: queue.enabled,
                    state: queue.state,
                })
                .collect(),
        }
    }

    /// Takes what was saved, checked against what this device offers and has.
    pub(super) fn load(
        &mut self,
        saved: &saved::Common,
        refuse: impl Fn(String) -> LoadError,
    ) -> Result<(), LoadError> {
        // Before FEATURES_OK a driver may have written any bits, which the device refuses later.
        let agreed = saved.status & FEATURES_OK != 0;
        let unknown = saved.driver_features & !self.offered;
        if agreed && unknown != 0 {
            return Err(refuse(format!(
                "the driver negotiated features {unknown:#x}, which this device does not offer"
            )));
        }
        if agreed && !is_modern(saved.driver_features) {
            return Err(refuse(
                "the driver set FEATURES_OK without VIRTIO_F_VERSION_1".to_owned(),
            ));
        }
        if saved.status & DRIVER_OK != 0 && !agreed {
            return Err(refuse(
                "the driver set DRIVER_OK without FEATURES_OK".to_owned(),
            ));
        }
        if saved.queues.len() != self.queues.len() {
            let (was, is) = (saved.queues.len(), self.queues.len());
            return Err(refuse(format!(
                "the saved device has {was} queues, and this one has {is}"
            )));
        }
        let vectors = saved.queues.iter().map(|queue| queue.vector);
        let mut vectors = vectors.chain([saved.config_vector]);
        if let Some(vector) = vectors.find(|vector| self.vector(*vector) != *vector) {
            return Err(refuse(format!("the device has no MSI-X vector {vector}")));
        }
        let mut queues = Vec::with_capacity(self.queues.len());
        for (index, (queue, here)) in saved.queues.iter().zip(&self.queues).enumerate() {
            let size = queue.rings.size;
            if queue.enabled && (!size.is_power_of_two() || size > here.max_size) {
                let most = here.max_size;
                return Err(refuse(format!(
                    "queue {index} has {size} entries; this device allows at most {most}"
                )));
            }
            queues.push(QueueRegisters {
                max_size: here.max_size,
                rings: queue.rings,
                vector: queue.vector,
                enabled: queue.enabled,
                state: queue.state,
            });
        }
        // All checks have passed, and nothing below fails.
        self.device_feature_select = saved.device_feature_select;
        self.driver_feature_select = saved.driver_feature_select;
        self.driver_features = saved.driver_features;
        self.config_vector = saved.config_vector;
        self.status = saved.status & !NEEDS_RESET;
        self.queue_select = saved.queue_select;
        self.queues = queues;
        Ok(())
    }
}

/// Whether a driver with these features is none of a legacy device, whose rings and headers have another
/// layout (6.1).
fn is_modern(features: u64) -> bool {
    features & 1 << VIRTIO_F_VERSION_1 != 0
}

/// Sets 4 or 8 bytes of a 64-bit register.
fn set(register: &mut u64, byte: u32, width: usize, value: u64) {
    *register = match (byte, width) {
        (_, 8) => value,
        (0, _) => *register & !0 << 32 | value & !0 >> 32,
        _ => *register & !0 >> 32 | value << 32,
    };
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn config() -> CommonConfig {
        CommonConfig::new(0b101, &[256, 128], 3)
    }

    fn negotiate(config: &mut CommonConfig, features: u64) {
        config.write(20, &[ACKNOWLEDGE]);
        config.write(20, &[ACKNOWLEDGE | DRIVER]);
        for half in [0_u32, 1] {
            config.write(8, &half.to_le_bytes());
            config.write(12, &((features >> (32 * half)) as u32).to_le_bytes());
        }
        config.write(20, &[ACKNOWLEDGE | DRIVER | FEATURES_OK]);
    }

    #[test]
    fn negotiates_offered_modern_features() {
        let version_1 = 1 << VIRTIO_F_VERSION_1;
        for (features, accepted) in [
            (version_1, true),
            (version_1 | 0b101, true),
            (version_1 | 0b111, false),
            (0b101, false),
            (version_1 | 1 << 63, false),
        ] {
            let mut config = config();
            negotiate(&mut config, features);
            let status = config.image(0, 0)[20];
            assert_eq!(status & FEATURES_OK != 0, accepted, "{features:#x}");
        }
    }

    /// Features that no driver can negotiate are refused in saved state, too.
    #[test]
    fn loads_only_features_that_can_be_negotiated() {
        let version_1 = 1 << VIRTIO_F_VERSION_1;
        let agreed = ACKNOWLEDGE | DRIVER | FEATURES_OK;
        for (features, status, accepted) in [
            (version_1 | 0b1, agreed, true),
            (version_1 | 0b1, agreed | DRIVER_OK, true),
            (0b1, agreed, false),
            (0, agreed | DRIVER_OK, false),
            (version_1 | 0b10, agreed, false),
            (version_1, DRIVER_OK, false),
            // Nothing is agreed upon yet.
            (0b11, ACKNOWLEDGE | DRIVER, true),
        ] {
            let saved = saved::Common {
                driver_features: features,
                status,
                ..config().save()
            };
            let refuse = |reason| LoadError::Refused {
                path: state::SectionPath::new("common").unwrap(),
                reason,
            };
            let loaded = config().load(&saved, refuse);
            assert_eq!(loaded.is_ok(), accepted, "{features:#x} {status:#x}");
        }
    }

    #[test]
    fn negotiated_features_are_fixed() {
        let mut config = config();
        negotiate(&mut config, 1 << VIRTIO_F_VERSION_1);
        config.write(8, &0_u32.to_le_bytes());
        config.write(12, &1_u32.to_le_bytes());
        assert_eq!(config.features(), 1 << VIRTIO_F_VERSION_1);
    }

    #[test]
    fn early_driver_ok_breaks_device() {
        let mut config = config();
        assert!(matches!(config.write(20, &[DRIVER_OK]), Effect::Broken(_)));
        negotiate(&mut config, 1 << VIRTIO_F_VERSION_1);
        assert_eq!(config.write(20, &[DRIVER_OK]), Effect::DriverOk);
        assert_eq!(config.write(20, &[DRIVER_OK]), Effect::None, "once");
        assert_eq!(config.write(20, &[0]), Effect::Reset);
    }

    #[test]
    fn only_a_reset_queue_can_be_moved() {
        let mut config = config();
        negotiate(
            &mut config,
            1 << VIRTIO_F_VERSION_1 | 1 << VIRTIO_F_RING_RESET,
        );
        config.write(22, &1_u16.to_le_bytes());
        config.write(32, &0x1000_u64.to_le_bytes());
        config.write(24, &64_u16.to_le_bytes());
        assert_eq!(config.write(28, &1_u16.to_le_bytes()), Effect::None);
        // The same again says nothing.
        assert_eq!(config.write(32, &0x1000_u32.to_le_bytes()), Effect::None);
        assert!(matches!(
            config.write(36, &1_u32.to_le_bytes()),
            Effect::Broken(_)
        ));
        assert_eq!(config.queues()[1].rings.descriptors, 0x1000);
        assert_eq!(
            config.write(58, &1_u16.to_le_bytes()),
            Effect::ResetQueue(1)
        );
        assert!(!config.queues()[1].enabled);
        assert_eq!(config.queues()[1].rings.size, 128);
    }

    #[test]
    fn absent_queue_has_no_size() {
        let mut config = config();
        config.write(22, &2_u16.to_le_bytes());
        assert_eq!(config.image(0, 0)[24..26], [0, 0]);
        let before = config.clone();
        config.write(24, &8_u16.to_le_bytes());
        assert_eq!(config.write(28, &1_u16.to_le_bytes()), Effect::None);
        assert_eq!(config, before);
    }

    proptest! {
        #[test]
        fn any_access_keeps_state_loadable(
            writes in prop::collection::vec((0_usize..80, prop::collection::vec(any::<u8>(), 0..10)), 0..64)
        ) {
            let mut config = config();
            for (at, data) in writes {
                if config.write(at, &data) == Effect::Reset {
                    config.reset();
                }
                let mut enabled = config.queues().iter().filter(|queue| queue.enabled);
                let fits = enabled.all(|queue| queue.rings.size <= queue.max_size);
                prop_assert!(fits);
            }
            let mut loaded = self::config();
            loaded.load(&config.save(), |why| panic!("{why}")).unwrap();
            prop_assert_eq!(loaded, config);
        }
    }
}
