//! `wh-remote`: drives a VMM over its socket, as `ch-remote` does, and a service of many VMs.

#![forbid(unsafe_code)]

mod args;
mod cluster;
mod console;
mod cpu;
mod describe;
mod migrate;
mod print;
mod remote;
mod steps;
mod summary;

use std::ffi::OsStr;
use std::io::Write;
use std::path::Path;
use std::process::ExitCode;

use clap::{CommandFactory, FromArgMatches};
use openapi::with_causes;

use crate::args::{Arguments, Command};
use crate::remote::Remote;

fn main() -> ExitCode {
    let program = std::env::args_os().next();
    let matches = command(program.as_deref()).get_matches();
    let arguments = Arguments::from_arg_matches(&matches).unwrap_or_else(|error| error.exit());
    match &arguments.command {
        Command::Completions { shell } => {
            // In memory first: the generator panics where its reader has gone.
            let mut script = Vec::new();
            clap_complete::generate(*shell, &mut Arguments::command(), "wh-remote", &mut script);
            return finish(std::io::stdout().write_all(&script).map_err(Into::into));
        }
        Command::Man { directory } => {
            let written = std::fs::create_dir_all(directory)
                .and_then(|()| clap_mangen::generate_to(Arguments::command(), directory));
            return finish(written.map_err(|error| {
                anyhow::anyhow!("cannot write man pages to {}: {error}", directory.display())
            }));
        }
        _ => {}
    }
    finish(run(arguments))
}

/// The version of Cloud Hypervisor whose commands this program has, then its own.
const CH_REMOTE_VERSION: &str = concat!("v54.0.0\nwh-remote ", env!("CARGO_PKG_VERSION"));

/// Returns the command that a program started as `program` is. Started as `ch-remote`, by a link, its
/// `--version` prints the line that consumers parse.
fn command(program: Option<&OsStr>) -> clap::Command {
    match program.map(Path::new).and_then(Path::file_name) {
        Some(name) if name == "ch-remote" => Arguments::command()
            .name("ch-remote")
            .version(CH_REMOTE_VERSION),
        _ => Arguments::command(),
    }
}

fn run(arguments: Arguments) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let remote = Remote::new(&arguments)?;
    runtime.block_on(remote.perform(arguments.command))
}

fn finish(done: anyhow::Result<()>) -> ExitCode {
    match done {
        Ok(()) => ExitCode::SUCCESS,
        // The reader closed the pipe.
        Err(error) if is_broken_pipe(&error) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("wh-remote: {}", with_causes(error.as_ref()));
            ExitCode::FAILURE
        }
    }
}

fn is_broken_pipe(error: &anyhow::Error) -> bool {
    let io = error.downcast_ref::<std::io::Error>();
    io.is_some_and(|io| io.kind() == std::io::ErrorKind::BrokenPipe)
}
