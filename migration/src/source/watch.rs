//! Watches over the talks with a destination whose guest waits for pages.
//!
//! No way leads back, so that the source waits for a lost destination for as long as it takes. One that only
//! shows that it lives (`Busy`, a byte now and then, lists without an end) must not hold the VM at the source
//! like that: it counts as lost after a while, and an operator who has given the guest up is obeyed at once.

use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

use crate::MigrationError;
use crate::decision::{Question, Resolution};
use crate::link::Closer;
use crate::threads::in_span;

/// Code of the error of a destination that does not advance.
pub(super) const STALLED: &str = "destination-stalled";

/// Why talks were cut off.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Cut {
    /// Nothing advanced for the whole limit.
    Stalled,
    /// An operator gave the guest up.
    Decided,
}

/// The connections of some talks, and how long nothing may advance.
pub(super) struct Watch {
    pub(super) closers: Vec<Closer>,
    pub(super) limit: Duration,
    /// From one look to the next.
    pub(super) tick: Duration,
}

impl Watch {
    /// Closes the connections if `advance` returns the same number for too long, or the operator answers the
    /// `question`, which `advance` may withdraw.
    ///
    /// # Errors
    /// The talks failed. If they were cut off, the error says so.
    pub(super) fn over<R>(
        self,
        question: &mut Option<Question>,
        mut advance: impl FnMut(&mut Option<Question>) -> u64 + Send,
        talk: impl FnOnce() -> Result<R, MigrationError>,
    ) -> Result<R, MigrationError> {
        let limit = self.limit;
        let (talked, cut) = thread::scope(|scope| {
            let (talking, ended) = mpsc::channel::<()>();
            let clock = move || {
                let (mut seen, mut since) = (advance(question), Instant::now());
                loop {
                    // The talks send nothing: any result but a timeout means that they have ended.
                    if ended.recv_timeout(self.tick) != Err(RecvTimeoutError::Timeout) {
                        return None;
                    }
                    let now = advance(question);
                    if now != seen {
                        (seen, since) = (now, Instant::now());
                    }
                    let cut = if is_given_up(question.as_ref()) {
                        Cut::Decided
                    } else if since.elapsed() >= self.limit {
                        Cut::Stalled
                    } else {
                        continue;
                    };
                    self.closers.iter().for_each(Closer::close);
                    return Some(cut);
                }
            };
            let clock = thread::Builder::new().spawn_scoped(scope, in_span(clock));
            let clock = clock.map_err(|error| MigrationError::here("host-refused", error))?;
            let talked = talk();
            drop(talking);
            Ok::<_, MigrationError>((talked, clock.join().unwrap_or(None)))
        })?;
        match (talked, cut) {
            // What was closed shows in errors of every kind.
            (Err(_), Some(Cut::Stalled)) => {
                let why = format!(
                    "the destination lives, and took no page and confirmed none for {} s",
                    limit.as_secs()
                );
                Err(MigrationError::here(STALLED, why))
            }
            (talked, _) => talked,
        }
    }
}

/// Whether the operator has given the guest up.
pub(super) fn is_given_up(question: Option<&Question>) -> bool {
    question.is_some_and(|open| open.wait(Duration::ZERO) == Some(Resolution::Discard))
}
