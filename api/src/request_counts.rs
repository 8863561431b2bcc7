//! Counts of answered requests, for the metrics.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use http::StatusCode;

/// Answers so far, by the class of their status. Cheap to clone; clones share the counters.
#[derive(Clone, Debug, Default)]
pub(crate) struct Requests(Arc<[AtomicU64; 3]>);

impl Requests {
    const CLASSES: [&str; 3] = ["ok", "refused", "failed"];

    pub(crate) fn count(&self, status: StatusCode) {
        let class = match status.as_u16() {
            ..400 => 0,
            400..500 => 1,
            500.. => 2,
        };
        if let Some(counter) = self.0.get(class) {
            counter.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Returns each class with its count.
    pub(crate) fn by_class(&self) -> impl Iterator<Item = (&'static str, u64)> {
        let counts = self.0.iter().map(|count| count.load(Ordering::Relaxed));
        Self::CLASSES.into_iter().zip(counts)
    }
}
