//! Lines of the log without an owner.
//!
//! The service limits its log for each VM and each migration. Lines of neither share one limit, so a
//! guest or a peer that causes some would silence those of others.

use std::sync::OnceLock;

use parking_lot::Mutex;
use tracing::{Event, Level, Subscriber};
use tracing_subscriber::layer::{Context, Layer, SubscriberExt as _};
use tracing_subscriber::registry::LookupSpan;

static LINES: Mutex<Vec<String>> = Mutex::new(Vec::new());

struct Stray;

impl<S: Subscriber + for<'a> LookupSpan<'a>> Layer<S> for Stray {
    fn on_event(&self, event: &Event<'_>, context: Context<'_, S>) {
        let has_owner = context
            .event_scope(event)
            .is_some_and(|mut scope| scope.any(|span| matches!(span.name(), "vm" | "migration")));
        // Debug lines are for an operator who wants all of them, and have no limit.
        if *event.metadata().level() <= Level::INFO && !has_owner {
            LINES.lock().push(event.metadata().name().to_owned());
        }
    }
}

/// Watches the log of this process from now on.
pub(crate) fn watch() {
    static WATCHED: OnceLock<()> = OnceLock::new();
    WATCHED.get_or_init(|| {
        let subscriber = tracing_subscriber::registry().with(Stray);
        tracing::subscriber::set_global_default(subscriber).unwrap();
    });
}

/// Returns the places in the code of lines that had no owner.
pub(crate) fn lines() -> Vec<String> {
    LINES.lock().clone()
}
