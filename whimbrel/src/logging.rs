//! Destination, format and level of the log.

use std::fs::OpenOptions;
use std::io::{self, IsTerminal};
use std::os::unix::fs::OpenOptionsExt;
use std::sync::Mutex;

use anyhow::{Context, Result};
use rustix::fs::OFlags;
use tracing_subscriber::EnvFilter;
use tracing_subscriber::fmt::writer::BoxMakeWriter;

use crate::args::{LogFormat, LoggingArguments};

pub(crate) fn start(arguments: &LoggingArguments) -> Result<()> {
    let level = match arguments.verbose {
        0 => "warn",
        1 => "info",
        2 => "debug",
        _ => "trace",
    };
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new(level));
    let (writer, colours) = match &arguments.log_file {
        None => (BoxMakeWriter::new(io::stderr), io::stderr().is_terminal()),
        Some(path) => {
            // A terminal must not become the controlling one, whose hang-up would end the service.
            let mut options = OpenOptions::new();
            options.create(true).append(true);
            options.custom_flags(OFlags::NOCTTY.bits().cast_signed());
            let file = options.open(path);
            let file =
                file.with_context(|| format!("cannot write the log file {}", path.display()))?;
            (BoxMakeWriter::new(Mutex::new(file)), false)
        }
    };
    let lines = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(writer);
    match arguments.log_format {
        LogFormat::Text => lines.with_ansi(colours).init(),
        LogFormat::Json => lines.json().init(),
    }
    Ok(())
}
