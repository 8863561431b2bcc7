//! The threads of migrations.

use std::sync::Arc;
use std::thread;

use control::{Category, RequestError};

use super::ActiveMigration;

/// Announces the end of a migration when it is dropped, after a panic too: clients wait for it.
pub(super) struct Ending(pub(super) Arc<ActiveMigration>);

impl Drop for Ending {
    fn drop(&mut self) {
        self.0.end();
    }
}

/// Starts the thread of a migration, which ends with it. The thread's log lines belong to `span`: a peer decides
/// how many some of them are.
pub(super) fn start(
    name: &str,
    span: tracing::Span,
    migration: &Arc<ActiveMigration>,
    run: impl FnOnce() + Send + 'static,
) -> Result<(), RequestError> {
    let builder = thread::Builder::new().name(name.to_owned());
    let ending = Ending(Arc::clone(migration));
    let started = builder.spawn(move || {
        let _ending = ending;
        span.in_scope(run);
    });
    started.map(|_| ()).map_err(|error| {
        let detail = format!("cannot start a thread: {error}");
        RequestError::new(Category::Host, "host-refused", detail)
    })
}
