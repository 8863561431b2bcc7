//! What happened to VMs, in order, for those who want to follow.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use parking_lot::Mutex;
use spec::{Event, VmId};
use tokio::sync::watch;

/// Events that are kept for those who come late.
const KEPT: usize = 1024;

#[derive(Debug)]
struct Shared {
    kept: Mutex<VecDeque<Event>>,
    /// The sequence number of the last event; 0 before the first.
    last: watch::Sender<u64>,
}

/// The service's events: the last ones are kept, each has a sequence number, and a reader picks
/// up where it left off.
#[derive(Clone, Debug)]
pub struct EventLog(Arc<Shared>);

/// Events between the number asked for and the oldest that is kept are gone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Missed {
    /// The oldest that is kept.
    pub oldest: u64,
}

impl Default for EventLog {
    fn default() -> Self {
        let kept = Mutex::new(VecDeque::with_capacity(KEPT));
        Self(Arc::new(Shared {
            kept,
            last: watch::Sender::new(0),
        }))
    }
}

impl EventLog {
    /// Adds an event.
    pub fn record(&self, vm: &VmId, event: &str, detail: Option<String>) {
        let since_1970 = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .unwrap_or_default();
        let time_ms = u64::try_from(since_1970.as_millis()).unwrap_or(u64::MAX);
        let mut kept = self.0.kept.lock();
        let sequence = *self.0.last.borrow() + 1;
        if kept.len() == KEPT {
            kept.pop_front();
        }
        kept.push_back(Event {
            sequence,
            time_ms,
            vm: vm.clone(),
            event: event.to_owned(),
            detail,
        });
        self.0.last.send_replace(sequence);
    }

    /// The number of the last event, 0 before the first.
    #[must_use]
    pub fn last(&self) -> u64 {
        *self.0.last.borrow()
    }

    /// The events after number `after` that are kept, and whether some are gone.
    #[must_use]
    pub fn after(&self, after: u64) -> (Vec<Event>, Option<Missed>) {
        let kept = self.0.kept.lock();
        let missed = kept
            .front()
            .filter(|first| first.sequence > after.saturating_add(1));
        let missed = missed.map(|first| Missed {
            oldest: first.sequence,
        });
        (
            kept.iter()
                .filter(|event| event.sequence > after)
                .cloned()
                .collect(),
            missed,
        )
    }

    /// Waits until there is an event after number `after`.
    pub async fn wait_after(&self, after: u64) {
        let mut last = self.0.last.subscribe();
        // The sender is in `self`, so it does not go while we wait.
        let _ = last.wait_for(|last| *last > after).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_reader_picks_up_where_it_left_off() {
        let (log, vm) = (EventLog::default(), VmId::unique());
        log.record(&vm, "created", None);
        log.wait_after(0).await;
        log.record(&vm, "booted", None);
        let (events, missed) = log.after(1);
        assert_eq!((events.len(), events[0].sequence, missed), (1, 2, None));
        for _ in 0..KEPT {
            log.record(&vm, "paused", None);
        }
        assert_eq!(log.after(1).1, Some(Missed { oldest: 3 }));
        assert_eq!(log.after(2).1, None);
    }
}
