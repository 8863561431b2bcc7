//! Port 0x80, to which firmware writes codes of its progress.

use std::time::Instant;

use memory::DeviceOps;
use parking_lot::Mutex;

/// Called once, with the moment of what it waits for.
pub(crate) type OnFirst = Mutex<Option<Box<dyn FnOnce(Instant) + Send>>>;

/// Notes when the first code came, and calls back for it.
pub struct DebugPort {
    on_first: OnFirst,
}

impl DebugPort {
    /// Calls `on_first` once, with the moment of the first write.
    pub fn new(on_first: impl FnOnce(Instant) + Send + 'static) -> Self {
        Self {
            on_first: Mutex::new(Some(Box::new(on_first))),
        }
    }
}

impl DeviceOps for DebugPort {
    fn read(&self, _: u64, data: &mut [u8]) {
        data.fill(0xff);
    }

    fn write(&self, _: u64, _: &[u8]) {
        let now = Instant::now();
        if let Some(tell) = self.on_first.lock().take() {
            tell(now);
        }
    }
}
