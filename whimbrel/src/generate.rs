//! Completions and man pages, made from the command line's definition.

use std::fs;
use std::io::{self, Write};
use std::path::Path;
use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::CommandFactory;

use crate::args::Arguments;

pub(crate) fn completions(shell: clap_complete::Shell) -> Result<ExitCode> {
    // In memory first: the generator panics where its reader has gone.
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut Arguments::command(), "whimbrel", &mut script);
    match io::stdout().write_all(&script) {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => {
            Err(error).context("cannot write the completions")
        }
        _ => Ok(ExitCode::SUCCESS),
    }
}

pub(crate) fn man_pages(directory: &Path) -> Result<ExitCode> {
    fs::create_dir_all(directory)
        .and_then(|()| clap_mangen::generate_to(Arguments::command(), directory))
        .with_context(|| format!("cannot write man pages to {}", directory.display()))?;
    Ok(ExitCode::SUCCESS)
}
