//! Destination, format and level of the log, and how many lines a VM or a migration may add to it.
//!
//! A guest or a peer can cause log lines as often as it likes, and the reader of a log can stop
//! reading. So lines are limited for each VM or migration and place in the code, and a thread of the log's own writes them: a
//! vCPU never waits for a disk or a terminal.

use std::collections::HashMap;
use std::env::VarError;
use std::fmt;
use std::fs::{File, OpenOptions};
use std::io::{self, IsTerminal, Write};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use clap::{Args, ValueEnum};
use control::Allowance;
use parking_lot::Mutex;
use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};
use rustix::io::Errno;
use tracing::callsite::Identifier;
use tracing::field::{Field, Visit};
use tracing::span::{Attributes, Id};
use tracing::{Event, Level, Subscriber};
use tracing_appender::non_blocking::{ErrorCounter, NonBlockingBuilder, WorkerGuard};
use tracing_subscriber::layer::{Context, Layer, SubscriberExt as _};
use tracing_subscriber::registry::LookupSpan;
use tracing_subscriber::util::SubscriberInitExt as _;
use tracing_subscriber::{EnvFilter, fmt as lines};

#[derive(Debug, Args)]
pub(crate) struct LoggingArguments {
    /// Log informational messages; twice adds debug, three times trace messages. RUST_LOG overrides
    /// this.
    #[arg(short, action = clap::ArgAction::Count, global = true)]
    pub(crate) verbose: u8,
    /// Log to this file instead of standard error.
    #[arg(long, value_name = "PATH", global = true)]
    pub(crate) log_file: Option<PathBuf>,
    /// Format of log lines.
    #[arg(long, value_name = "FORMAT", default_value = "text", global = true)]
    pub(crate) log_format: LogFormat,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum LogFormat {
    /// For people.
    Text,
    /// One JSON object per line.
    Json,
}

/// Lines that wait to be written; further ones are lost and counted.
const WAITING_MAX: usize = 8192;
/// Spans whose field `id` names the owner of the lines inside.
const OWNERS: [&str; 2] = ["vm", "migration"];
/// Lines of one owner and one place in the code that are written at once; then one each interval.
const AT_ONCE: u32 = 32;
const INTERVAL: Duration = Duration::from_secs(1);
/// How often the numbers of suppressed and lost lines are reported.
const REPORT: Duration = Duration::from_secs(10);

/// Starts logging. Lines that wait are written when the guard is dropped.
pub(crate) fn start(arguments: &LoggingArguments) -> Result<WorkerGuard> {
    let level = match arguments.verbose {
        0 => "warn",
        1 => "info",
        2 => "debug",
        _ => "trace",
    };
    let filter = match std::env::var(EnvFilter::DEFAULT_ENV) {
        Ok(directives) => EnvFilter::try_new(&directives)
            .with_context(|| format!("{} is {directives:?}", EnvFilter::DEFAULT_ENV))?,
        Err(VarError::NotPresent) => EnvFilter::new(level),
        Err(error) => {
            return Err(error).with_context(|| EnvFilter::DEFAULT_ENV.to_owned());
        }
    };
    let (to, colours): (Box<dyn Write + Send>, bool) = match &arguments.log_file {
        None => (Box::new(io::stderr()), io::stderr().is_terminal()),
        Some(path) => {
            let file = open(path);
            let file =
                file.with_context(|| format!("cannot write the log file {}", path.display()))?;
            (Box::new(file), false)
        }
    };
    let (writer, guard) = NonBlockingBuilder::default()
        // A full queue drops lines in place of waiting: a vCPU or a driver may be the one that
        // logs.
        .lossy(true)
        .buffered_lines_limit(WAITING_MAX)
        .thread_name("log")
        .finish(to);
    let (limits, lost) = (Limits::default(), writer.error_counter());
    let layer = lines::layer().with_writer(writer);
    let layer = match arguments.log_format {
        LogFormat::Text => layer.with_ansi(colours).boxed(),
        LogFormat::Json => layer.json().boxed(),
    };
    tracing_subscriber::registry()
        .with(filter)
        // Before the layer that formats: a suppressed line costs a lookup and no text.
        .with(limits.clone())
        .with(layer)
        .init();
    thread::Builder::new()
        .name("log-limits".to_owned())
        .spawn(move || report(&limits, &lost))
        .context("cannot start a thread for the log")?;
    Ok(guard)
}

/// Opens the log. A FIFO needs a reader: without one, opening it would wait for one.
fn open(path: &Path) -> io::Result<File> {
    let mut options = OpenOptions::new();
    options.create(true).append(true);
    // A terminal must not become the controlling one, whose hang-up would end the service.
    let flags = OFlags::NOCTTY | OFlags::NONBLOCK;
    options.custom_flags(flags.bits().cast_signed());
    let file = options.open(path).map_err(|error| {
        if error.raw_os_error() == Some(Errno::NXIO.raw_os_error()) {
            let why = "it is a FIFO that no program reads, or a socket";
            return io::Error::new(error.kind(), why);
        }
        error
    })?;
    // The thread that writes may wait.
    fcntl_setfl(&file, fcntl_getfl(&file)? - OFlags::NONBLOCK)?;
    Ok(file)
}

/// Reports, each [`REPORT`], how many lines were suppressed or lost.
fn report(limits: &Limits, lost: &ErrorCounter) {
    let mut reported = 0;
    loop {
        thread::sleep(REPORT);
        for (owner, lines) in limits.sweep(Instant::now()) {
            // In a span of the owner: the report has that owner's limit, too, so that many noisy
            // owners suppress no other's report.
            let span = owner.map(|(span, id)| match span {
                "migration" => tracing::error_span!("migration", %id),
                _ => tracing::error_span!("vm", %id),
            });
            let _entered = span.as_ref().map(tracing::Span::enter);
            tracing::warn!(lines, "log lines were suppressed");
        }
        let lines = lost.dropped_lines();
        if lines > reported {
            tracing::warn!(
                lines = lines - reported,
                "log lines were lost: the log was not written fast enough"
            );
            reported = lines;
        }
    }
}

/// The VM or migration to which a span belongs: the name of the span, and its id.
type Owner = (&'static str, Arc<str>);

type Source = (Option<Owner>, Identifier);

/// Limits lines by the VM or migration that causes them and the place in the code that writes them.
#[derive(Clone, Default)]
struct Limits(Arc<Mutex<HashMap<Source, Allowance>>>);

impl Limits {
    fn admits(&self, source: Source, now: Instant) -> bool {
        let mut sources = self.0.lock();
        let lines = sources
            .entry(source)
            .or_insert_with(|| Allowance::new(AT_ONCE, INTERVAL));
        lines.take(now).is_some()
    }

    /// Returns how many lines were suppressed, and forgets sources that are quiet.
    fn sweep(&self, now: Instant) -> Vec<(Option<Owner>, u64)> {
        let mut suppressed = HashMap::<_, u64>::new();
        self.0.lock().retain(|(owner, _), lines| {
            *suppressed.entry(owner.clone()).or_default() += lines.take_refused();
            // A service has many VMs over its life: sources that are quiet are forgotten, or the
            // map would grow for good.
            !lines.is_idle(now)
        });
        suppressed
            .into_iter()
            .filter(|(_, lines)| *lines > 0)
            .collect()
    }
}

impl<S: Subscriber + for<'a> LookupSpan<'a>> Layer<S> for Limits {
    fn on_new_span(&self, attributes: &Attributes<'_>, id: &Id, context: Context<'_, S>) {
        let kind = attributes.metadata().name();
        if !OWNERS.contains(&kind) {
            return;
        }
        let mut name = Name(None);
        attributes.record(&mut name);
        if let (Some(name), Some(span)) = (name.0, context.span(id)) {
            let owner: Owner = (kind, name.into());
            // Read once when the span begins: lines inside need no look at the fields.
            span.extensions_mut().insert(owner);
        }
    }

    fn event_enabled(&self, event: &Event<'_>, context: Context<'_, S>) -> bool {
        // An operator who asks for debug lines wants all of them.
        if *event.metadata().level() > Level::INFO {
            return true;
        }
        let owner = context
            .event_scope(event)
            .and_then(|mut scope| scope.find_map(|span| span.extensions().get::<Owner>().cloned()));
        self.admits((owner, event.metadata().callsite()), Instant::now())
    }
}

/// Finds the field `id`.
struct Name(Option<String>);

impl Visit for Name {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        if field.name() == "id" {
            self.0 = Some(format!("{value:?}"));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn log_in_a_fifo_needs_a_reader() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("fifo");
        let made = std::process::Command::new("mkfifo").arg(&path).status();
        assert!(made.unwrap().success());
        let refused = open(&path).unwrap_err().to_string();
        assert!(refused.contains("FIFO that no program reads"), "{refused}");
        let mut reader = OpenOptions::new();
        reader.read(true);
        reader.custom_flags(OFlags::NONBLOCK.bits().cast_signed());
        let _reader = reader.open(&path).unwrap();
        let log = open(&path).unwrap();
        assert!(!fcntl_getfl(&log).unwrap().contains(OFlags::NONBLOCK));
    }

    #[derive(Clone, Default)]
    struct Written(Arc<Mutex<Vec<u8>>>);

    impl Write for Written {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().extend(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn a_noisy_vm_or_migration_does_not_silence_others() {
        let (limits, written) = (Limits::default(), Written::default());
        let to = written.clone();
        let subscriber = tracing_subscriber::registry().with(limits.clone()).with(
            lines::layer()
                .with_ansi(false)
                .with_writer(move || to.clone()),
        );
        let warn = |vm: &str| {
            let span = tracing::error_span!("vm", id = %vm);
            span.in_scope(|| tracing::warn!("a device"));
        };
        let refuse = |id: &str| {
            let span = tracing::error_span!("migration", %id);
            span.in_scope(|| tracing::warn!("an offer"));
        };
        tracing::subscriber::with_default(subscriber, || {
            (0..10_000).for_each(|_| warn("noisy"));
            warn("quiet");
            (0..10_000).for_each(|_| refuse("hostile"));
            refuse("sound");
        });
        let text = String::from_utf8(written.0.lock().clone()).unwrap();
        let count = |name: &str| text.lines().filter(|line| line.contains(name)).count();
        // One more for each second that the test takes.
        assert!(count("noisy") < 1000, "{}", count("noisy"));
        assert!(count("hostile") < 1000, "{}", count("hostile"));
        assert_eq!((count("quiet"), count("sound")), (1, 1));
        let mut suppressed = limits.sweep(Instant::now());
        suppressed.sort();
        let left_out = |kind, id: &str| {
            let lines = 10_000 - count(id) as u64;
            (Some((kind, Arc::from(id))), lines)
        };
        let expected = [left_out("migration", "hostile"), left_out("vm", "noisy")];
        assert_eq!(suppressed, expected);
    }
}
