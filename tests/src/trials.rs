//! Many trials of one kind, each a case of a table.

use std::fmt::Debug;
use std::sync::Arc;

use tokio::sync::Semaphore;
use tokio::task::JoinSet;

/// Runs a trial for each case, `at_once` at a time, and prints how each ended.
///
/// The variable `CASE` selects the cases whose `Debug` text contains it.
///
/// # Panics
///
/// If a trial panicked, once all have ended.
pub async fn trials<C, T>(cases: Vec<C>, at_once: usize, trial: impl Fn(C) -> T)
where
    C: Debug,
    T: Future<Output = ()> + Send + 'static,
{
    let room = Arc::new(Semaphore::new(at_once));
    let only = std::env::var("CASE").unwrap_or_default();
    let mut running = JoinSet::new();
    for case in cases {
        let name = format!("{case:?}");
        if !name.contains(&only) {
            continue;
        }
        let room = room.clone();
        let trial = trial(case);
        running.spawn(async move {
            let _room = room.acquire_owned().await;
            // In a task of its own, a trial that panics ends no other.
            let passed = tokio::spawn(trial).await.is_ok();
            println!("{} {name}", if passed { "ok    " } else { "FAILED" });
            passed
        });
    }
    let outcomes = running.join_all().await;
    let failed = outcomes.iter().filter(|passed| !**passed).count();
    assert!(failed == 0, "{failed} of {} cases failed", outcomes.len());
}
