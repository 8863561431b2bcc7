//! Threads of a migration.

/// Returns `work` inside the log span of the caller, for a thread that is to do it. The service limits
/// its log by span, so a line without one would count against everybody's limit.
pub(crate) fn in_span<R>(work: impl FnOnce() -> R) -> impl FnOnce() -> R {
    let span = tracing::Span::current();
    move || span.in_scope(work)
}
