//! The service's event log: numbered events, with a history of its own for each VM.
//!
//! A VM whose guest causes many events pushes out its own history and no other VM's. Histories of
//! VMs that are gone share one ring.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use parking_lot::Mutex;
use spec::{Event, VmId};
use tokio::sync::watch;

use crate::limits::{DETAIL_BYTES_MAX, EVENTS_KEPT_AFTER_VMS, EVENTS_KEPT_PER_VM};

#[derive(Debug)]
struct Shared {
    kept: Mutex<Kept>,
    /// The sequence number of the last event; 0 before the first.
    last: watch::Sender<u64>,
}

/// The events that are kept, by sequence number, and the order in which each VM's go.
#[derive(Debug, Default)]
struct Kept {
    events: BTreeMap<u64, Event>,
    by_vm: HashMap<VmId, History>,
    /// Events of VMs that are gone.
    of_gone: History,
}

/// Sequence numbers of events that are kept, oldest first.
#[derive(Debug, Default)]
struct History {
    kept: VecDeque<u64>,
    /// The last event that was pushed out; 0 when none was.
    dropped: u64,
    /// How many were pushed out.
    dropped_count: u64,
}

impl History {
    fn push(&mut self, sequence: u64, max: usize, events: &mut BTreeMap<u64, Event>) {
        if self.kept.len() >= max
            && let Some(oldest) = self.kept.pop_front()
        {
            events.remove(&oldest);
            self.dropped = self.dropped.max(oldest);
            self.dropped_count += 1;
        }
        self.kept.push_back(sequence);
    }
}

/// The service's events. A reader that knows the number of the last event it saw resumes behind
/// it, and learns when events in between are gone.
#[derive(Clone, Debug)]
pub struct EventLog(Arc<Shared>);

/// Events between the number asked for and the newest are gone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Missed {
    /// The oldest event behind the number asked for that is kept; the next to come when none is.
    pub oldest: u64,
    /// How many are gone. Exact for the events of all VMs; for those of one VM an upper bound, since
    /// no record says to which VM an event belonged that is gone.
    pub count: u64,
}

impl Default for EventLog {
    fn default() -> Self {
        Self(Arc::new(Shared {
            kept: Mutex::default(),
            last: watch::Sender::new(0),
        }))
    }
}

impl EventLog {
    /// Adds an event. A detail of more than [`DETAIL_BYTES_MAX`] bytes is cut.
    pub fn record(&self, vm: &VmId, event: &str, detail: Option<String>) {
        self.record_in(&mut self.0.kept.lock(), vm, event, detail);
    }

    /// Adds the last event of a VM, and moves the VM's history to that of VMs that are gone.
    pub fn record_last(&self, vm: &VmId, event: &str, detail: Option<String>) {
        let mut kept = self.0.kept.lock();
        self.record_in(&mut kept, vm, event, detail);
        kept.retire(vm);
    }

    /// Moves a VM's history to that of VMs that are gone.
    pub(crate) fn retire(&self, vm: &VmId) {
        self.0.kept.lock().retire(vm);
    }

    fn record_in(&self, kept: &mut Kept, vm: &VmId, event: &str, detail: Option<String>) {
        let since_1970 = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .unwrap_or_default();
        let time_ms = u64::try_from(since_1970.as_millis()).unwrap_or(u64::MAX);
        // Under the lock of `kept`, so numbers are given in the order in which events are kept.
        let sequence = *self.0.last.borrow() + 1;
        let detail = detail.map(|mut detail| {
            let mut len = detail.len().min(DETAIL_BYTES_MAX);
            while !detail.is_char_boundary(len) {
                len -= 1;
            }
            detail.truncate(len);
            detail
        });
        let history = kept.by_vm.entry(vm.clone()).or_default();
        history.push(sequence, EVENTS_KEPT_PER_VM, &mut kept.events);
        kept.events.insert(
            sequence,
            Event {
                sequence,
                time_ms,
                vm: vm.clone(),
                event: event.to_owned(),
                detail,
            },
        );
        self.0.last.send_replace(sequence);
    }

    /// The number of the last event, 0 before the first.
    #[must_use]
    pub fn last(&self) -> u64 {
        *self.0.last.borrow()
    }

    /// Returns the events after number `after` that are kept, of one VM or of all, and whether
    /// some are gone.
    #[must_use]
    pub fn after(&self, after: u64, vm: Option<&VmId>) -> (Vec<Event>, Option<Missed>) {
        let kept = self.0.kept.lock();
        let behind = after.saturating_add(1);
        let events: Vec<Event> = kept
            .events
            .range(behind..)
            .map(|(_, event)| event)
            .filter(|event| vm.is_none_or(|vm| event.vm == *vm))
            .cloned()
            .collect();
        let oldest = events
            .first()
            .map_or(self.last() + 1, |first| first.sequence);
        let missed = (kept.dropped(vm) > after).then(|| {
            let kept_behind = kept.events.range(behind..).count() as u64;
            // Every number up to the last was given to an event.
            let gone = self
                .last()
                .saturating_sub(after)
                .saturating_sub(kept_behind);
            let count = vm.map_or(gone, |vm| gone.min(kept.dropped_count(vm)));
            Missed { oldest, count }
        });
        (events, missed)
    }

    /// Waits until there is an event after number `after`.
    pub async fn wait_after(&self, after: u64) {
        let mut last = self.0.last.subscribe();
        // The sender is in `self`, so it does not go while we wait.
        let _ = last.wait_for(|last| *last > after).await;
    }
}

impl Kept {
    fn retire(&mut self, vm: &VmId) {
        let Some(history) = self.by_vm.remove(vm) else {
            return;
        };
        self.of_gone.dropped = self.of_gone.dropped.max(history.dropped);
        self.of_gone.dropped_count += history.dropped_count;
        for sequence in history.kept {
            self.of_gone
                .push(sequence, EVENTS_KEPT_AFTER_VMS, &mut self.events);
        }
    }

    /// The last event that was pushed out of a VM's history, or of any. An event of a VM that is
    /// gone counts for every VM: the name may have been used again.
    fn dropped(&self, vm: Option<&VmId>) -> u64 {
        let histories = match vm {
            Some(vm) => self.by_vm.get(vm).map(|history| history.dropped),
            None => self.by_vm.values().map(|history| history.dropped).max(),
        };
        histories.unwrap_or(0).max(self.of_gone.dropped)
    }

    /// The most events of a VM that were pushed out: its own, and those of all VMs that are gone.
    fn dropped_count(&self, vm: &VmId) -> u64 {
        let own = self.by_vm.get(vm);
        own.map_or(0, |history| history.dropped_count) + self.of_gone.dropped_count
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn reader_resumes_after_last_event() {
        let (log, vm) = (EventLog::default(), VmId::unique());
        log.record(&vm, "created", None);
        log.wait_after(0).await;
        log.record(&vm, "booted", None);
        let (events, missed) = log.after(1, None);
        assert_eq!((events.len(), events[0].sequence, missed), (1, 2, None));
        for _ in 0..EVENTS_KEPT_PER_VM {
            log.record(&vm, "paused", None);
        }
        let missed = Missed {
            oldest: 3,
            count: 1,
        };
        assert_eq!(log.after(1, None).1, Some(missed));
        assert_eq!(log.after(2, None).1, None);
    }

    #[test]
    fn a_noisy_vm_pushes_out_its_own_events_only() {
        let log = EventLog::default();
        let (quiet, noisy) = (VmId::unique(), VmId::unique());
        log.record(&quiet, "created", None);
        for _ in 0..10 * EVENTS_KEPT_PER_VM {
            log.record(&noisy, "device-needs-reset", None);
        }
        log.record(&quiet, "booted", None);
        let (events, missed) = log.after(0, Some(&quiet));
        assert_eq!((events.len(), missed), (2, None));
        let (events, missed) = log.after(0, Some(&noisy));
        assert_eq!(events.len(), EVENTS_KEPT_PER_VM);
        let gone = 9 * EVENTS_KEPT_PER_VM as u64;
        assert_eq!(missed.map(|missed| missed.count), Some(gone));
        let (all, missed) = log.after(0, None);
        assert_eq!(all.len(), EVENTS_KEPT_PER_VM + 2);
        let missed_all = Missed {
            oldest: 1,
            count: gone,
        };
        assert_eq!(missed, Some(missed_all));
        assert!(all.is_sorted_by_key(|event| event.sequence));
    }

    #[test]
    fn deleted_vms_keep_bounded_history() {
        let log = EventLog::default();
        for _ in 0..2 * EVENTS_KEPT_AFTER_VMS {
            let vm = VmId::unique();
            log.record(&vm, "created", None);
            log.record_last(&vm, "deleted", None);
        }
        let (events, missed) = log.after(0, None);
        assert_eq!(events.len(), EVENTS_KEPT_AFTER_VMS);
        // Each VM had two events.
        let gone = 3 * EVENTS_KEPT_AFTER_VMS as u64;
        assert_eq!(missed.map(|missed| missed.count), Some(gone));
        assert!(log.0.kept.lock().by_vm.is_empty());
    }

    #[test]
    fn a_detail_is_cut_between_characters() {
        let (log, vm) = (EventLog::default(), VmId::unique());
        log.record(&vm, "failed", Some("ü".repeat(DETAIL_BYTES_MAX)));
        let detail = log.after(0, None).0.remove(0).detail.unwrap();
        assert!(detail.len() <= DETAIL_BYTES_MAX && detail.len() > DETAIL_BYTES_MAX - 4);
    }
}
