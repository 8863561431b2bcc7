//! The change by a commit: the difference of two flat views.

use std::sync::Arc;

use crate::flat_view::{FlatIoEventFd, FlatRange, FlatView};

/// One commit's change of one address space, as listeners receive it.
#[derive(Debug)]
pub struct ViewChange {
    /// The view before the commit.
    pub old: Arc<FlatView>,
    /// The view after the commit.
    pub new: Arc<FlatView>,
    /// Ranges of the old view that the new one does not have unchanged; descending, the reverse of the
    /// order in which ranges are added.
    pub removed: Vec<FlatRange>,
    /// Ranges of the new view that the old one did not have unchanged; ascending.
    pub added: Vec<FlatRange>,
    /// Ranges that both views have; ascending.
    pub kept: Vec<FlatRange>,
    /// Doorbells that are removed; descending.
    pub removed_ioeventfds: Vec<FlatIoEventFd>,
    /// Doorbells that are added; ascending.
    pub added_ioeventfds: Vec<FlatIoEventFd>,
}

impl ViewChange {
    pub(crate) fn between(old: Arc<FlatView>, new: Arc<FlatView>) -> Self {
        let (mut removed, added, kept) =
            difference(old.ranges(), new.ranges(), |flat| flat.range.first());
        let (mut removed_ioeventfds, added_ioeventfds, _) =
            difference(old.ioeventfds(), new.ioeventfds(), FlatIoEventFd::key);
        removed.reverse();
        removed_ioeventfds.reverse();
        Self {
            old,
            new,
            removed,
            added,
            kept,
            removed_ioeventfds,
            added_ioeventfds,
        }
    }

    /// Whether the views are the same to a guest.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.removed.is_empty()
            && self.added.is_empty()
            && self.removed_ioeventfds.is_empty()
            && self.added_ioeventfds.is_empty()
    }
}

/// Returns the items only in `old`, only in `new`, and in both. Both ascend by `key`.
fn difference<T: Clone + PartialEq, K: Ord>(
    old: &[T],
    new: &[T],
    key: impl Fn(&T) -> K,
) -> (Vec<T>, Vec<T>, Vec<T>) {
    let (mut removed, mut added, mut kept) = (Vec::new(), Vec::new(), Vec::new());
    let (mut olds, mut news) = (old.iter().peekable(), new.iter().peekable());
    loop {
        match (olds.peek(), news.peek()) {
            (Some(o), Some(n)) if o == n => {
                kept.push((*o).clone());
                olds.next();
                news.next();
            }
            // Equal keys with unequal items are a range that changed in place. The old one is
            // removed, and the next turn adds the new one.
            (Some(o), n) if n.is_none_or(|n| key(o) <= key(n)) => {
                removed.push((*o).clone());
                olds.next();
            }
            (_, Some(n)) => {
                added.push((*n).clone());
                news.next();
            }
            (_, None) => return (removed, added, kept),
        }
    }
}
